"""A float model by Golden Stick's recipes, from the folder to the file: what was observed, what is written, and what stops it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import convert
from formats import open_checkpoint
from formats.errors import DestinationError, RefusedError, UnreadableError, UsageError
from formats.ir import dequantize, read
from formats.mindspore_file import MindSporeFile
from quantize.calibration import calibration_data
from quantize.golden_stick_data import question_texts
from quantize.golden_stick_run import quantize_golden_stick
from quantize.models import load_model, load_tokenizer
from quantize.quant_ckpt import app
from quantize.recipe import RECIPES, load, loads
from quantize.run import quantize_model
from quantize.streamed import is_streamed, quantize_streamed

OWN = [name for name in RECIPES if name.startswith("gs-")]
IDS = [[torch.arange(3 + shift, 40 + 5 * shift).reshape(1, -1)] * 1 for shift in range(3)]
SAMPLES = [[ids[0], torch.ones_like(ids[0])] for ids in IDS]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of a Llama in float16, with some inputs far larger than others."""
    torch.manual_seed(4)
    folder = tiny.model_folder(tmp_path_factory.mktemp("model") / "tiny")
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=512, tie_word_embeddings=False, dtype="float16",
    )  # fmt: skip
    model = LlamaForCausalLM(config).half()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[::37] *= 6
            layer.post_attention_layernorm.weight[::37] *= 6
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "generation_config.json").unlink()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.questions(tmp_path_factory.mktemp("calib") / "calib.jsonl")


@pytest.fixture(scope="module")
def seen(source: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """By linear, the lowest and highest input of each channel, in the whole float model; by layer's "key" and "value" the same."""
    model, found = load_model(source), dict[str, list[Tensor]]()

    def hook(name: str) -> Any:
        return lambda module, args: found.setdefault(name, []).append(args[0][0])

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for ids, _ in SAMPLES:
            cache = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
            for index, layer in enumerate(cache.layers):
                for part, states in (("key", layer.keys), ("value", layer.values)):
                    found.setdefault(f"{index}.{part}", []).append(states[0].transpose(0, 1).flatten(1))
    return {name: (torch.cat(rows).amin(0), torch.cat(rows).amax(0)) for name, rows in found.items()}


def made(source: Path, out: Path, text: str, to: str = "mindspore", **options: Any) -> Any:
    recipe = load(text) if text.startswith("gs-") else loads(text)
    return quantize_model(source, out, recipe, to, calib=SAMPLES, **options)


def stored(folder: Path) -> dict[str, tuple[str, bytes]]:
    """dtype and bytes of every tensor of a folder's checkpoint."""
    (path,) = (folder / "rank_0").iterdir()
    file = MindSporeFile(path)
    return {name: (info.dtype, np.asarray(read(file.tensor(name))).tobytes()) for name, info in file.tensors.items()}


def weight_of(source: Path, name: str) -> np.ndarray:
    return np.asarray(open_checkpoint(source).tensors.array(f"{name}.weight"))


@pytest.mark.parametrize("name", OWN)
def test_every_recipe_makes_what_it_says(name: str, source: Path, calib: Path, tmp_path: Path) -> None:
    recipe = load(name)
    result = quantize_model(source, tmp_path / "out", name, "mindspore", calib=calib, samples=1 if "awq" in name else 3)
    down = "w2" in recipe.golden_stick_settings().modules_to_not_convert
    assert len(result.layers) == (12 if down else 14)
    assert result.written.exact
    assert result.notes == ()
    settings = recipe.golden_stick_settings()
    assert result.smoothed == (0 if settings.outliers_suppression == "none" else len(result.layers))
    out = open_checkpoint(tmp_path / "out")
    assert (out.format, out.variant, bool(out.attention)) == ("mindspore", "gs1.2", settings.kv_bit == 8)
    for layer_name in out.layer_names:
        layer, weight = out.layer(layer_name), weight_of(source, layer_name).astype(np.float32)
        found = dequantize(layer)  # the smoothing too: the float weight again, nearly
        assert np.linalg.norm(found - weight) / np.linalg.norm(weight) < {4: 0.3, 8: 0.02}[settings.w_bit]
        assert (layer.scheme.inputs is None) == (settings.a_bit == 16)
    certificate = json.loads((tmp_path / "out" / "weighbridge.json").read_text())
    assert loads(json.dumps(certificate["options"]["recipe"]), name) == recipe


@pytest.mark.parametrize("text", ["gs-rtn-a16w8", "gs-ptq-a16w4", "golden_stick: {a_bit: 8, is_dynamic: true}"])
def test_what_is_streamed_is_what_the_layers_give(text: str, source: Path, tmp_path: Path) -> None:
    recipe = load(text) if text.startswith("gs-") else loads(text)
    assert is_streamed(recipe)
    streamed = quantize_streamed(source, tmp_path / "streamed", recipe, "mindspore")
    whole = quantize_model(source, tmp_path / "whole", recipe, "mindspore")
    ours, theirs = (stored(tmp_path / side) for side in ("streamed", "whole"))
    assert ours == theirs  # in another order
    others = {layer.name: layer for layer in whole.layers}
    for one in streamed.layers:
        other = others[one.name]
        assert one.kind == other.kind
        # The float16 law is ((code * scale) rounded), and the streamed figure is of the float32 law.
        assert one.weight_error == pytest.approx(other.weight_error, rel=1e-3)


def test_static_inputs_are_those_of_the_float_model(source: Path, seen: dict[str, Any], tmp_path: Path) -> None:
    made(source, tmp_path / "out", "golden_stick: {a_bit: 8}")
    out = open_checkpoint(tmp_path / "out")
    for name in out.layer_names:
        low, high = (float(end) for end in (seen[name][0].min(), seen[name][1].max()))
        scale = (high - low) / 255
        layer = out.layer(name)
        assert layer.input_scale.tolist() == [np.float16(scale)]
        assert layer.input_zero_point.tolist() == [round(-128 - low / scale)]
        weight = weight_of(source, name)
        scales = np.abs(weight.astype(np.float64)).max(1) * 2 / 255
        bits = np.asarray(out.tensors.array(f"{name}._layer.matmul.dequant_scale")).astype(np.uint32).view(np.float32)
        np.testing.assert_array_equal(bits, np.float32(scale) * scales.astype(np.float32))


def test_smooth_quant_from_the_float_model(source: Path, seen: dict[str, Any], tmp_path: Path) -> None:
    made(source, tmp_path / "out", "gs-smooth-a8w8", "mindspore:gs0.6")
    out = open_checkpoint(tmp_path / "out")
    assert len(out.layer_names) == 12
    for name in out.layer_names:
        low, high = (end.float().numpy() for end in seen[name])
        weight = weight_of(source, name)
        columns = np.abs(weight.astype(np.float32)).max(0)
        smooth = torch.from_numpy(np.maximum(np.abs(low), np.abs(high))).pow(0.5).numpy() / torch.from_numpy(columns).pow(0.5).numpy()
        wide = weight.astype(np.float32) * smooth
        scales = (np.abs(wide).max(1, keepdims=True) * 2 / np.float32(255)).astype(np.float32)
        quotient = wide.astype(np.float16).astype(np.float32) / scales.astype(np.float16).astype(np.float32)
        codes = np.clip(np.rint(quotient.astype(np.float16).astype(np.float32)), -128, 127)
        np.testing.assert_array_equal(np.asarray(out.tensors.array(f"{name}._layer.weight")), codes)
        least, most = (low * (1 / smooth)).min(), (high * (1 / smooth)).max()
        scale = (most - least) / np.float32(255)
        bits = np.asarray(out.tensors.array(f"{name}._layer.matmul.dequant_scale")).astype(np.uint32).view(np.float32)
        np.testing.assert_array_equal(bits, scale * scales[:, 0])
        np.testing.assert_array_equal(
            np.asarray(out.tensors.array(f"{name}.input_scale")), (scale.astype(np.float64) * smooth).astype(np.float32).astype(np.float16)
        )


@pytest.mark.parametrize("version", ["gs0.6", "gs1.2"])
def test_a_cache_alone(version: str, source: Path, seen: dict[str, Any], tmp_path: Path) -> None:
    result = made(source, tmp_path / "out", "golden_stick: {approach: rtn, w_bit: 16, kv_bit: 8}", f"mindspore:{version}")
    assert result.layers == ()
    (weights,) = (tmp_path / "out" / "rank_0").iterdir()
    file = MindSporeFile(weights)
    names = {"gs0.6": "{}_t_scale", "gs1.2": "quant_pa.{}_scale_no_fusion"}[version]
    for index in (0, 1):
        for part in ("key", "value"):
            low, high = seen[f"{index}.{part}"]
            wanted = (torch.maximum(low.abs(), high.abs()).double() * 2 / 255).half()
            place = f"model.layers.{index}.attention.infer_attention.paged_attention_mgr."
            found = np.asarray(read(file.tensor(place + names.format(part if version == "gs0.6" else part[0]))))
            np.testing.assert_array_equal(found, wanted.numpy())
    (yaml,) = (tmp_path / "out").glob("predict_*.yaml")
    assert "kvcache_dtype: int8" in yaml.read_text()
    assert "weight_dtype: None" in yaml.read_text()


@pytest.mark.parametrize("text", ["gs-smooth-a8w8", "golden_stick: {a_bit: 8, is_dynamic: true, outliers_suppression: smooth}"])
def test_what_is_one_linear_to_the_tool_is_smoothed_as_one(text: str, source: Path, seen: dict[str, Any], tmp_path: Path) -> None:
    recipe = load(text) if text.startswith("gs-") else loads(text)
    quantize_golden_stick(source, tmp_path / "out", recipe, "mindspore", calib=SAMPLES, qkv_concat=True)
    out = open_checkpoint(tmp_path / "out")
    (weights,) = (tmp_path / "out" / "rank_0").iterdir()
    assert "model.layers.0.attention.w_qkv._layer.weight" in MindSporeFile(weights).tensors
    names = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    low, high = seen[names[0]]
    columns = np.abs(np.concatenate([weight_of(source, name) for name in names]).astype(np.float32)).max(0)
    wanted = np.sqrt(np.maximum(np.abs(low.float().numpy()), np.abs(high.float().numpy())) / columns)
    found = [out.layer(name).input_smooth for name in names]
    assert all(np.array_equal(found[0], other) for other in found)
    ratio = np.asarray(found[0], np.float32) * wanted  # smooth is 1 / s, but for a factor beside static inputs
    np.testing.assert_allclose(ratio / ratio[0], 1, rtol=3e-3)
    for name in names:
        weight = weight_of(source, name).astype(np.float32)
        assert np.linalg.norm(dequantize(out.layer(name)) - weight) / np.linalg.norm(weight) < 0.03


def test_awq_of_fused_linears_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="qkv_concat: AWQ searches a scale for q, k and v each"):
        quantize_golden_stick(source, tmp_path / "out", load("gs-awq-a16w4"), "mindspore", calib=SAMPLES, qkv_concat=True)


def test_gptq_passes_on_what_the_rounded_layer_makes(source: Path, tmp_path: Path) -> None:
    """So the second layer's codes are not those that the float model's inputs would give; without GPTQ they are."""
    made(source, tmp_path / "both", "golden_stick: {w_bit: 4, group_size: 64, precision_recovery: gptq}")
    first = "golden_stick: {w_bit: 4, group_size: 64, precision_recovery: gptq, layer_policies: {'model.layers.0': null}}"
    made(source, tmp_path / "second", first, "compressed-tensors")
    both, second = open_checkpoint(tmp_path / "both"), open_checkpoint(tmp_path / "second")
    name = "model.layers.1.self_attn.q_proj"
    assert (np.asarray(read(both.layer(name).codes)) != np.asarray(read(second.layer(name).codes))).any()
    plain = weight_of(source, name).astype(np.float32)
    assert np.linalg.norm(dequantize(both.layer(name)) - plain) / np.linalg.norm(plain) < 0.3


def test_biases_are_kept(calib: Path, tmp_path: Path) -> None:
    """Qwen2, in bfloat16."""
    quantize_model(tiny.TINYLM, tmp_path / "out", loads("golden_stick: {a_bit: 8}"), "mindspore", calib=calib, samples=2)
    out, source = open_checkpoint(tmp_path / "out"), open_checkpoint(tiny.TINYLM)
    name = "model.layers.3.self_attn.k_proj"
    layer = out.layer(name)
    np.testing.assert_array_equal(np.asarray(read(layer.bias)), np.asarray(source.tensors.array(f"{name}.bias")))
    assert out.tensors[f"{name}._layer.matmul.dequant_scale"].dtype == "F32"  # networks of bfloat16 have no Int64
    assert out.tensors[f"{name}.quant_op.input_scale"].dtype == "BF16"


def test_an_interrupted_run_ends_with_the_same_bytes(source: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, of: int, layer: object) -> None:
        if done == 13:
            raise KeyboardInterrupt

    text = "golden_stick: {a_bit: 8, outliers_suppression: smooth}"
    with pytest.raises(KeyboardInterrupt):
        made(source, tmp_path / "out", text, progress=stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DestinationError, match="an interrupted run left its work"):
        made(source, tmp_path / "out", "golden_stick: {a_bit: 8}")
    result = made(source, tmp_path / "out", text, resume=True)
    assert result.resumed_layers == 2  # the second layer was safe when it was told of
    assert "were there from a run that was interrupted" in result.notes[-1]
    made(source, tmp_path / "whole", text)
    (found,), (wanted,) = ([*(tmp_path / side / "rank_0").iterdir()] for side in ("out", "whole"))
    assert found.name.replace("out", "") == wanted.name.replace("whole", "")
    assert found.read_bytes() == wanted.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_questions_are_put_as_the_versions_put_them(calib: Path, source: Path) -> None:
    one, two = question_texts(calib, "boolq-gs0.6", 2)
    first = tiny.QUESTIONS[0]
    assert one == (
        "Read the passage below and answer the question with yes or no.\n### Passage:\n"
        f"{first['title']} -- {first['passage']}\n### Question:\n{first['question']}\n### Answer:yes"
    )
    assert two.endswith("### Answer:no")
    (new,) = question_texts(calib, "boolq-gs1.2", 1)
    assert new.startswith("Please read the following passage and answer the question directly with either 'yes' or 'no' without analysis")
    assert question_texts(["a text", {"text": "another"}], "boolq-gs1.2", 5) == ["a text", {"text": "another"}]
    with pytest.raises(UsageError, match=r"manual\.txt: template boolq-gs1\.2 puts questions"):
        question_texts(Path("manual.txt"), "boolq-gs1.2", 1)
    tokenizer = load_tokenizer(source)
    assert [len(sample[0][0]) for sample in calibration_data([one], tokenizer)] == [len(tokenizer(one)["input_ids"])]


@pytest.mark.parametrize(
    ("text", "to", "words"),
    [
        ("gs-smooth-a8w8", "awq", "q_proj: needs"),
        ("gs-smooth-a8w8", "mindspore:float", "holds no quantized weights"),
        ("gs-ptq-a8dynw8", "mindspore:gs0.6", "q_proj: needs"),
        ("golden_stick: {w_bit: 8, group_size: 64}", "mindspore", "q_proj: needs groups of 8-bit codes"),
        (
            "golden_stick: {layer_policies: {'.*feed_forward': {a_bit: 8, is_dynamic: true}}}",
            "mindspore",
            "quantization_config has one for all",
        ),
    ],
)
def test_what_a_target_cannot_hold_is_refused_before_the_work(text: str, to: str, words: str, source: Path, tmp_path: Path) -> None:
    def never(*told: object) -> None:
        raise AssertionError("the work was begun")

    with pytest.raises((RefusedError, UsageError), match=words):
        made(source, tmp_path / "out", text, to, progress=never)
    assert list(tmp_path.iterdir()) == []


def with_config(source: Path, folder: Path, **keys: int) -> Path:
    """A copy whose config says something else."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


def test_what_cannot_be_done_is_one_sentence(source: Path, calib: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="recipe gs-smooth-a8w8: needs calibration data"):
        quantize_model(source, tmp_path / "out", "gs-smooth-a8w8", "mindspore")
    narrow = with_config(source, tmp_path / "narrow", hidden_size=64)
    with pytest.raises(UsageError, match=r"q_proj: 64 inputs are not several whole groups of 64"):
        quantize_model(narrow, tmp_path / "out", loads("golden_stick: {w_bit: 4, group_size: 64}"), "mindspore")
    with pytest.raises(UnreadableError, match=r"has no config\.json"):
        quantize_model(tmp_path, tmp_path / "out", "gs-rtn-a16w8", "mindspore")
    quantize_model(source, tmp_path / "done", "gs-rtn-a16w8", "mindspore")
    with pytest.raises(RefusedError, match="is quantized already"):
        quantize_model(tmp_path / "done", tmp_path / "out", "gs-rtn-a16w8", "mindspore")
    with pytest.raises(DestinationError, match="exists already"):
        quantize_model(source, tmp_path / "done", "gs-rtn-a16w8", "mindspore")
    assert not (tmp_path / "out").exists()
    assert convert.fingerprint(tmp_path / "done").digest


def test_the_script_makes_of_a_checkpoint_what_the_recipe_makes_of_the_folder(
    source: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert.convert(source, tmp_path / "float", "mindspore:float")
    (path,) = (tmp_path / "float").glob("predict_*.yaml")
    (weights,) = (tmp_path / "float" / "rank_0").iterdir()
    content = {**yaml.safe_load(path.read_text()), "load_checkpoint": str(weights), "output_dir": str(tmp_path / "output")}
    path.write_text(yaml.safe_dump({**content, "trainer": {"model_name": "tiny"}}))
    shutil.copy(source / "tokenizer.json", tmp_path / "float")
    done = CliRunner().invoke(app, ["-c", str(path), "-q", "smooth_quant", "-t", "boolq", "-s", str(calib), "--samples", "3"])
    assert done.exit_code == 0, done.output
    quantize_model(source, tmp_path / "out", "gs-smooth-a8w8", "mindspore:gs0.6", calib=calib, samples=3)
    assert stored(tmp_path / "output" / "tiny_smooth_quant_ckpt") == stored(tmp_path / "out")
