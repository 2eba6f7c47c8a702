"""The whole way from a float folder to a quantized one: in every format, by every recipe, and what stops it before it begins."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

import convert
import quantize.layerwise
import quantize.run
from convert.cli import app
from formats import open_checkpoint
from formats.errors import DestinationError, RefusedError, UnreadableError, UsageError
from formats.ir import dequantize
from quantize import Calibrator, QuantConfig
from quantize.blocks import Weights
from quantize.calibration import calibration_data
from quantize.models import load_model, load_tokenizer
from quantize.plots import draw
from quantize.progress import LayerFigures, blocks, shown
from quantize.recipe import load, loads
from quantize.rounded_tiles import Rounding
from quantize.run import quantize_model
from quantize.streamed import quantize_streamed, round_folder, rounding_of

LINEARS = 6 * 7
IDS = torch.arange(3, 27).reshape(1, -1)


def digest(folder: Path) -> str:
    return convert.fingerprint(folder).digest


# --- formats and recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.IN_MSMODELSLIMS_WORDS)
def test_every_recipe_makes_what_it_says(name: str, source: Path, calib: Path, tmp_path: Path) -> None:
    data = calib if load(name).needs_data else None
    result = quantize_model(source, tmp_path / "out", name, "msmodelslim", calib=data, samples=10)
    assert len(result.layers) == LINEARS
    assert result.float_names == ("lm_head",)
    assert result.samples == (10 if data else 0)
    assert result.written.exact
    assert all(0 < layer.weight_error < 0.3 for layer in result.layers)
    assert all((layer.range_parm is not None) == (data is not None) for layer in result.layers)
    norms, ups = 12, 6  # LMDeploy smooths no value projection of grouped heads
    assert result.smoothed == (24 if load(name).anti_outlier else norms + ups if name.startswith("lmdeploy-awq") else 0)
    assert result.notes == ()
    (description,) = (tmp_path / "out").glob("quant_model_description*.json")
    types = json.loads(description.read_text())
    assert ("kv_quant_type" in types) == (name == "w8a8-kv8")
    assert types["lm_head.weight"] == "FLOAT"
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 256


@pytest.mark.parametrize(
    ("name", "to", "consumers"),
    [
        ("w4a16-rtn", "awq", ["autoawq", "vllm", "transformers"]),
        ("w4a16-rtn", "gptq", ["gptqmodel", "vllm"]),
        ("w4a16-rtn", "gptq:v2", ["gptqmodel"]),
        ("w4a16-rtn", "compressed-tensors", ["vllm"]),
        ("w8a16", "gptq", ["gptqmodel", "vllm"]),
        ("w8a8", "compressed-tensors", ["vllm"]),
        ("w8a8-dynamic", "compressed-tensors", ["vllm"]),
    ],
)
def test_straight_to_a_format_is_by_way_of_msmodelslim(
    name: str, to: str, consumers: list[str], source: Path, calib: Path, tmp_path: Path
) -> None:
    data = calib if load(name).needs_data else None
    straight = quantize_model(source, tmp_path / "straight", name, to, calib=data)
    quantize_model(source, tmp_path / "ms", name, "msmodelslim", calib=data)
    convert.convert(tmp_path / "ms", tmp_path / "converted", to)
    assert digest(tmp_path / "straight") == digest(tmp_path / "converted") == straight.written.target_fingerprint.digest
    found, wanted = (load_file(tmp_path / side / "model.safetensors") for side in ("straight", "converted"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[tensor], wanted[tensor]) for tensor in wanted)
    for consumer in consumers:
        report = convert.check(tmp_path / "straight", consumer)
        assert report.ok, report.unmet


def test_the_folder_is_what_the_calibrator_saves(source: Path, calib: Path, tmp_path: Path) -> None:
    recipe = load("w8a8-sparse")
    quantize_model(source, tmp_path / "out", recipe, "msmodelslim", calib=calib)
    model = load_model(source)
    data = calibration_data(calib, load_tokenizer(source), samples=recipe.calibration.samples)
    calibrator = Calibrator(model, recipe.quant_config(), data)
    calibrator.run()
    calibrator.save(tmp_path / "saved", save_type="safe_tensor")
    (saved,) = (tmp_path / "saved").glob("*.safetensors")
    assert (tmp_path / "out" / saved.name).read_bytes() == saved.read_bytes()


def test_the_folder_computes_what_the_fake_quantized_model_computes(source: Path, tmp_path: Path) -> None:
    """In float32: in bfloat16 the fake weights have codes of -128 here and there, which the saved ones do not (rounding, quirk 5)."""
    floats = load_model(source).float()
    floats.save_pretrained(tmp_path / "float32")
    quantize_model(tmp_path / "float32", tmp_path / "out", "w8a16", "msmodelslim")
    model = load_model(tmp_path / "float32")
    Calibrator(model, load("w8a16").quant_config()).run()
    convert.convert(tmp_path / "out", tmp_path / "dense", "dense", scale_dtype="keep")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        found, wanted, unrounded = (one(IDS).logits for one in (dense, model, floats))
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)
    assert (unrounded - wanted).abs().max() > 0.02


def test_smoothed_weights_are_in_the_folder(source: Path, calib: Path, tmp_path: Path) -> None:
    """Of static W8A8 with smoothing: the dequantized weight is the smoothed one to half a step, and not the source's."""
    quantize_model(source, tmp_path / "out", "w8a8", "compressed-tensors", calib=calib)
    checkpoint, floats = open_checkpoint(tmp_path / "out"), load_file(source / "model.safetensors")
    name = "model.layers.2.self_attn.q_proj"
    layer = checkpoint.layer(name)
    norm = load_file(tmp_path / "out" / "model.safetensors")["model.layers.2.input_layernorm.weight"].float()
    scale = floats["model.layers.2.input_layernorm.weight"].float() / norm
    assert (scale - 1).abs().max() > 0.5
    weight = floats[f"{name}.weight"].float()
    error = torch.from_numpy(dequantize(layer)) / scale - weight
    assert error.norm() / weight.norm() < 0.03
    assert (torch.from_numpy(dequantize(layer)) - weight).norm() / weight.norm() > 0.1


@pytest.mark.parametrize(
    ("name", "rounding"), [("w4a16-rtn", Rounding(4, 128)), ("w8a16", Rounding(8)), ("w8a8-dynamic", Rounding(8, dynamic=True))]
)
def test_a_calibrated_folder_is_the_streamed_one(name: str, rounding: Rounding, source: Path, tmp_path: Path) -> None:
    quantize_model(source, tmp_path / "out", name, "msmodelslim")
    round_folder(source, tmp_path / "streamed", rounding, "msmodelslim")
    assert digest(tmp_path / "out") == digest(tmp_path / "streamed")


def small(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, **more,
    }  # fmt: skip


def random_samples() -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(0, 128, (1, 40), generator=generator)] for _ in range(12)]


@pytest.mark.parametrize("to", ["msmodelslim", "compressed-tensors"])
def test_what_chooses_experts_stays_float(to: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**small(moe_intermediate_size=128, head_dim=32, num_experts=4, num_experts_per_tok=2))
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "moe")
    result = quantize_model(tmp_path / "moe", tmp_path / "out", "w8a8", to, calib=random_samples())
    assert set(result.float_names) == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"}
    assert len(result.layers) == 2 * (4 + 3 * 4)
    assert result.smoothed == 2 * 2


def test_a_sharded_model_with_tied_embeddings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**small(tie_word_embeddings=True))).float()
    model.save_pretrained(tmp_path / "tied", max_shard_size="400KB")
    assert len([*(tmp_path / "tied").glob("*.safetensors")]) > 1
    quantize_model(tmp_path / "tied", tmp_path / "out", "w8a16", "msmodelslim")
    assert capfd.readouterr() == ("", "")
    convert.convert(tmp_path / "out", tmp_path / "dense", "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        assert (dense(IDS).logits - model(IDS).logits).abs().max() < 0.02 < model(IDS).logits.abs().max()


def test_mixed_and_rolled_back_layers(source: Path, calib: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("quant: {mm_tensor: false}\nmix_cfg: {'*.q_proj': float, '*.o_proj': w8a8_dynamic}\ndisable_level: L2\n")
    result = quantize_model(source, tmp_path / "out", path, "msmodelslim", calib=calib)
    kinds = {layer.name: layer.kind for layer in result.layers}
    assert {kind for name, kind in kinds.items() if name.endswith("o_proj")} <= {"W8A8_DYNAMIC"}
    assert not any(name.endswith("q_proj") for name in kinds)
    assert sum(name.endswith("down_proj") for name in kinds) == 4  # whose inputs are the widest
    assert set(kinds.values()) == {"W8A8", "W8A8_DYNAMIC"}
    assert len(result.float_names) == 1 + 6 + 2
    assert set(open_checkpoint(tmp_path / "out").layer_names) == set(kinds)


def test_the_certificate_says_what_was_done(source: Path, calib: Path, tmp_path: Path) -> None:
    for name, count in (("a", 6), ("b", 6), ("c", 7)):
        quantize_model(source, tmp_path / name, "w8a8", "msmodelslim", calib=calib, samples=count)
    options = [json.loads((tmp_path / name / "weighbridge.json").read_text())["options"] for name in "abc"]
    assert options[0] == options[1]
    assert options[0]["content"] != options[2]["content"]  # so that an interrupted run is not finished with other data
    again = loads(json.dumps(options[0]["recipe"]), "w8a8")
    assert again == load("w8a8")


def test_one_that_was_interrupted_is_not_finished_with_other_data(source: Path, calib: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, of: int, layer: LayerFigures | None) -> None:
        if what == "writing" and done > of // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(source, tmp_path / "out", "w8a8", "msmodelslim", calib=calib, samples=6, progress=stop)
    assert not (tmp_path / "out").exists()
    if (tmp_path / ".out.weighbridge").exists():
        with pytest.raises(DestinationError, match="an interrupted run left its work"):
            quantize_model(source, tmp_path / "out", "w8a8", "msmodelslim", calib=calib, samples=7)
        convert.clean(tmp_path)
    quantize_model(source, tmp_path / "out", "w8a8", "msmodelslim", calib=calib, samples=7)
    quantize_model(source, tmp_path / "whole", "w8a8", "msmodelslim", calib=calib, samples=7)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_few_and_repeated_samples_are_noted(source: Path, tmp_path: Path) -> None:
    result = quantize_model(source, tmp_path / "out", loads("quant: {mm_tensor: false}"), "msmodelslim", calib=["one text"] * 3)
    assert "2 of 3 calibration samples repeat" in result.notes[0]
    assert "3 calibration samples are few" in result.notes[1]


# --- progress and plots -----------------------------------------------------------------------------------------------


def test_progress_tells_every_layer_with_its_figures(source: Path, calib: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int, LayerFigures | None]] = []
    result = quantize_model(source, tmp_path / "out", "w8a8", "msmodelslim", calib=calib, samples=5, progress=lambda *one: told.append(one))
    steps = {what: [(done, of) for name, done, of, _ in told if name == what] for what, *_ in told}
    assert list(steps) == ["calibrating", "quantizing", "writing"]
    assert steps["quantizing"] == [(done, LINEARS) for done in range(1, LINEARS + 1)]
    assert steps["calibrating"] == [(done, 5) for done in range(1, 6)] * 6  # once for each decoder layer
    assert steps["writing"][-1][0] == steps["writing"][-1][1]
    assert [layer for what, _, _, layer in told if what == "quantizing"] == list(result.layers)


def test_a_terminal_shows_bars_and_a_line_for_each_decoder_layer(
    source: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "160")
    with shown(quiet=True) as nothing:
        assert nothing is None
    with shown() as progress:
        result = quantize_model(source, tmp_path / "out", "w8a8", "msmodelslim", calib=calib, samples=5, progress=progress)
    said = sys.stderr.getvalue()
    for block in blocks(result.layers):
        assert said.count(str(block)) == 1
    for step in ("quantizing", "calibrating", "writing"):
        assert step in said
    assert "42/42" in said
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with shown() as nothing:
        assert nothing is None


def test_figures_by_decoder_layer() -> None:
    layers = [
        LayerFigures("model.layers.0.mlp.up_proj", "W8A8", 0.01, 3.0),
        LayerFigures("model.layers.0.mlp.down_proj", "W8A8", 0.03, 41.21875),
        LayerFigures("model.layers.10.mlp.up_proj", "W4A16", 0.1),
        LayerFigures("lm_head", "W8A16", 0.2),
    ]
    found = blocks(layers)
    assert [block.name for block in found] == ["model.layers.0", "model.layers.10", "lm_head"]
    assert str(found[0]) == (
        "model.layers.0: 2 linears, weight error 0.0200, at most 0.0300 (down_proj), range_parm at most 41.22 (down_proj)"
    )
    assert str(found[1]) == "model.layers.10: 1 linears, weight error 0.1000, at most 0.1000 (up_proj)"


def test_a_plot_shows_every_figure(source: Path, calib: Path, tmp_path: Path) -> None:
    result = quantize_model(source, tmp_path / "out", "w8a8", "msmodelslim", calib=calib, samples=5, plot=tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG\r\n")
    ranges, errors = draw(result.layers).axes
    assert len(ranges.lines) == 7
    leaves = list(dict.fromkeys(layer.leaf for layer in result.layers))
    down = ranges.lines[leaves.index("down_proj")]
    assert list(down.get_ydata()) == [layer.range_parm for layer in result.layers if layer.leaf == "down_proj"]
    assert sorted(np.concatenate([line.get_ydata() for line in errors.lines])) == sorted(layer.weight_error for layer in result.layers)


def test_a_plot_without_ranges_has_one_panel() -> None:
    layers = [LayerFigures("model.layers.0.mlp.up_proj", "W4A16", 0.1), LayerFigures("model.layers.1.mlp.up_proj", "W4A16", 0.2)]
    (errors,) = draw(layers).axes
    assert [list(line.get_ydata()) for line in errors.lines] == [[0.1, 0.2]]
    assert errors.get_ylabel() == "relative error of the weight"


def test_an_svg_of_layers_without_ranges(source: Path, tmp_path: Path) -> None:
    quantize_model(source, tmp_path / "out", "w8a16", "gptq", plot=tmp_path / "p.svg")
    assert ElementTree.parse(tmp_path / "p.svg").getroot().tag.endswith("svg")


# --- what stops it, before the model is touched -----------------------------------------------------------------------


def test_a_consumer_that_would_not_load_it(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LMDeploy's kernels know groups of 128 only; those are written."""
    with monkeypatch.context() as patched:
        patched.setattr(Weights, "fill", lambda self, module, path: pytest.fail("was loaded"))
        small = loads("quant: {w_bit: 4, a_bit: 16, is_lowbit: true, open_outlier: false, group_size: 64, w_method: HQQ}")
        with pytest.raises(RefusedError, match=r"needs group size 64; lmdeploy 0\.18\.0 wants group size 128"):
            quantize_model(source, tmp_path / "out", small, "lmdeploy")
    quantize_model(source, tmp_path / "out", "w4a16-rtn", "lmdeploy")
    assert convert.check(tmp_path / "out", "lmdeploy").ok


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"to": "awc"}, UsageError, "there is no format 'awc'"),
        ({"to": "awq:llm-awq"}, RefusedError, "can be read, but not written yet"),
        ({"to": "dense"}, UsageError, "holds no quantized weights"),
        ({"recipe": "w9a9"}, UsageError, "the recipes are w8a8,"),
        ({"recipe": "w8a8"}, UsageError, "recipe w8a8: needs calibration data; pass --calib"),
        ({"device": "tpu"}, UsageError, "dev_type: 'tpu'"),
        ({"device": "npu:0"}, UsageError, "torch_npu is not installed"),
        ({"plot": "plot.pdf"}, UsageError, r"--plot plot\.pdf: wanted a name that ends in \.png or \.svg"),
        ({"plot": "/no/such/folder/p.png"}, DestinationError, "no such folder to draw into"),
        ({"model_dir": "/no/such/model"}, UnreadableError, "no such file or folder"),
        ({"out": "/no/such/folder/out"}, DestinationError, "no such folder to write into"),
    ],
)
def test_what_is_said_before_the_model_is_loaded(
    change: dict[str, str], error: type[Exception], words: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Weights, "fill", lambda self, module, path: pytest.fail("was loaded"))
    options = {"model_dir": source, "out": tmp_path / "out", "recipe": "w8a16", "to": "gptq", **change}
    with pytest.raises(error, match=words):
        quantize_model(**options)
    assert list(tmp_path.iterdir()) == []


def test_destinations_that_are_there(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_model(source, tmp_path / "out", "w8a16", "gptq")
    before = digest(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Weights, "fill", lambda self, module, path: pytest.fail("was loaded"))
        with pytest.raises(DestinationError, match="exists already"):
            quantize_model(source, tmp_path / "out", "w4a16-rtn", "awq")
    assert digest(tmp_path / "out") == before
    quantize_model(source, tmp_path / "out", "w4a16-rtn", "awq", overwrite=True)
    assert open_checkpoint(tmp_path / "out").format == "awq"
    with pytest.raises(RefusedError, match="is quantized already"):
        quantize_model(tmp_path / "out", tmp_path / "again", "w8a16", "gptq")
    for inside in (source / "out", source):
        with pytest.raises(DestinationError, match="which is never written"):
            quantize_model(source, inside, "w8a16", "gptq", overwrite=True)
    assert not (source / "out").exists()


GROUPS = "w_bit: 4, a_bit: 16, is_lowbit: true, open_outlier: false, group_size: 64"


@pytest.mark.parametrize(
    ("name", "to", "words"),
    [
        ("w8a8", "awq", "needs 8-bit"),
        ("w8a8-kv8", "compressed-tensors", "kv-cache-dropped"),
        (loads(f"quant: {{{GROUPS}, w_method: GPTQ}}\ngptq: {{act_order: true}}"), "msmodelslim", r"irregular g_idx \(act order\)"),
    ],
    ids=["w8a8 awq", "kv8 compressed-tensors", "act order msmodelslim"],
)
def test_what_the_format_cannot_hold_is_refused_before_calibration(
    name: Any, to: str, words: str, source: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize.run, "_way", lambda *_, **__: pytest.fail("was calibrated"))
    with pytest.raises(RefusedError, match=words):
        quantize_model(source, tmp_path / "out", name, to, calib=calib)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quant: {disable_names: [model.layers.9.mlp.up_proj]}", r"disable_names: 'model\.layers\.9\.mlp\.up_proj' is no linear"),
        ("quant: {disable_names: [model.layers.9.self_attn]}\nfa_quant: {}", r"disable_names: 'model\.layers\.9\.self_attn' is no linear"),
        ("quant: {}\nanti_outlier: {anti_method: m4, disable_anti_names: [model.layers.9.up]}", r"disable_anti_names: 'model\.layers\.9"),
        ("quant: {nonuniform: true}", "nonuniform is not supported"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_first_layer(
    text: str, words: str, source: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize.layerwise.LayerRun, "begin", lambda self: pytest.fail("was begun"))
    with pytest.raises(UsageError, match=words):
        quantize_model(source, tmp_path / "out", loads(text), "msmodelslim", calib=calib)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(source: Path, calib: Path, tmp_path: Path) -> None:
    bad = tiny.model_folder(tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    for name in ("w8a16", "w8a8"):
        with pytest.raises(UnreadableError, match=r"model\.layers\.3\.mlp\.\w+_proj"):
            quantize_model(bad, tmp_path / "out", name, "msmodelslim", calib=calib)
        assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UnreadableError, match=r"has no config\.json"):
        quantize_model(tmp_path / "model", tmp_path / "out", "w8a16", "gptq")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UnreadableError, match=r"no \.safetensors file"):
        quantize_model(tmp_path / "model", tmp_path / "out", "w8a16", "gptq")
    with pytest.raises(UsageError, match="is a file, and the folder of a model was wanted"):
        quantize_model(tmp_path / "model" / "config.json", tmp_path / "out", "w8a16", "gptq")


def test_code_of_the_folder_is_not_run(source: Path, tmp_path: Path) -> None:
    evil = tiny.model_folder(tmp_path / "evil")
    config = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    (evil / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(UnreadableError, match="cannot load it"):
        quantize_model(evil, tmp_path / "out", "w8a16", "gptq")
    assert not (tmp_path / "was_run").exists()


# --- the command line -------------------------------------------------------------------------------------------------


def invoke(*args: object):
    return CliRunner().invoke(app, ["quantize", *map(str, args)])


def test_the_command_line(source: Path, calib: Path, tmp_path: Path) -> None:
    result = invoke(source, tmp_path / "out", "--recipe", "w8a8", "--to", "msmodelslim", "--calib", calib, "--samples", 11)
    assert result.exit_code == 0, result.output
    assert "model.layers.5" in result.stdout
    assert "42 quantized layers" in result.stdout
    assert "proved exact" in result.stdout
    result = invoke(
        source, tmp_path / "json", "--recipe", "w8a8", "--to", "msmodelslim", "--calib", calib, "--samples", 11, "--device", "cpu",
        "--plot", tmp_path / "p.svg", "--json",
    )  # fmt: skip
    said = json.loads(result.stdout)
    assert said["fingerprint_target"] == digest(tmp_path / "out") == digest(tmp_path / "json")
    assert (said["samples"], said["recipe"]["name"], len(said["layers"]), said["exact"]) == (11, "w8a8", LINEARS, True)
    assert (tmp_path / "p.svg").is_file()


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16-rtn", "w8a8-dynamic"])
def test_the_command_line_says_the_errors_of_what_it_streams(recipe: str, source: Path, tmp_path: Path) -> None:
    """As it does of calibrated runs; the calibrated model's weights are rounded to bfloat16, the figures of a folder are not."""
    options = ("--recipe", recipe, "--to", "msmodelslim", "--jobs", 1, "--max-memory", "128MiB")
    result = invoke(source, tmp_path / "out", *options, "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert all(text in result.stdout for text in ("model.layers.5", "weight error", "42 quantized layers", "proved exact", "write "))
    assert "range_parm" not in result.stdout
    said = json.loads(invoke(source, tmp_path / "json", *options, "--json").stdout)
    assert (said["recipe"]["name"], said["samples"], said["float_linears"]) == (recipe, 0, ["lm_head"])
    calibrated = quantize_model(source, tmp_path / "calibrated", recipe, "msmodelslim")
    wanted = {layer.name: (layer.kind, pytest.approx(layer.weight_error, rel=0.08)) for layer in calibrated.layers}
    assert {layer["name"]: (layer["kind"], layer["weight_error"]) for layer in said["layers"]} == wanted
    assert len(wanted) == LINEARS


@pytest.mark.parametrize("recipe", ["w4a16-rtn", "lmdeploy-rtn", "gs-ptq-a16w4"])
def test_scales_are_stored_in_the_dtype_that_is_asked_for(recipe: str, source: Path, calib: Path, tmp_path: Path) -> None:
    """Streamed, layer by layer, and as Golden Stick does; of the same codes and zero points."""
    options = ["--recipe", recipe, "--to", "awq", *(["--calib", calib, "--samples", 2] if load(recipe).needs_data else [])]
    made = {}
    for dtype in ("float16", "float32"):
        result = invoke(source, tmp_path / dtype, *options, "--scale-dtype", dtype)
        assert result.exit_code == 0, result.output
        made[dtype] = load_file(tmp_path / dtype / "model.safetensors")
    half, single = made["float16"], made["float32"]
    scales = [name for name in half if name.endswith(".scales")]
    assert len(scales) == LINEARS
    for name in half:
        assert torch.equal(half[name], single[name].to(half[name].dtype)), name  # biases are stored in the scales' half precision
    assert {single[name].dtype for name in scales} == {torch.float32}


def test_the_writing_of_a_calibrated_model_takes_jobs_and_memory(source: Path, calib: Path, tmp_path: Path) -> None:
    result = quantize_model(source, tmp_path / "out", "w8a8", "msmodelslim", calib=calib, samples=5, jobs=1, max_memory=100 << 20)
    assert (result.written.plan.memory.jobs, result.written.plan.memory.limit) == (1, 100 << 20)


def test_what_the_model_itself_is_needed_for_is_not_streamed() -> None:
    assert rounding_of(load("w4a16-rtn")) == Rounding(4, 128)
    for text in (
        "quant: {a_bit: 16, mm_tensor: false, disable_last_linear: false}",
        "quant: {a_bit: 16, mm_tensor: false, w_sym: false}",
        "quant: {a_bit: 16}",
        "quant: {mm_tensor: false}",
    ):
        assert rounding_of(loads(text)) is None


def test_linears_that_a_streamed_recipe_names_stay_float(source: Path, tmp_path: Path) -> None:
    left = "model.layers.3.mlp.down_proj"
    recipe = loads(f"quant: {{a_bit: 16, mm_tensor: false, disable_names: [{left}, lm_head]}}\nmix_cfg: {{'*.1.*.o_proj': float}}")
    result = quantize_streamed(source, tmp_path / "out", recipe, "gptq")
    assert result.float_names == ("model.layers.1.self_attn.o_proj", left, "lm_head")
    assert set(open_checkpoint(tmp_path / "out").layer_names) == {layer.name for layer in result.layers}
    with pytest.raises(UsageError, match=r"disable_names: 'model\.layers\.9"):
        quantize_streamed(
            source, tmp_path / "no", loads(f"quant: {{a_bit: 16, mm_tensor: false, disable_names: ['{left[:13]}9']}}"), "gptq"
        )


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["--recipe", "w8a8", "--to", "awq"], 2, "needs calibration data"),
        (["--recipe", "w8a16", "--to", "gptq", "--plot", "p.pdf"], 2, "wanted a name that ends in .png or .svg"),
        (["--recipe", "w8a16", "--to", "gptq", "--max-memory", "70MiB"], 2, "--max-memory 70MiB: this checkpoint needs"),
        (["--recipe", "w8a16", "--to", "awq"], 3, "needs 8-bit"),
        (["--recipe", "w4a16-rtn", "--to", "awq", "--scale-dtype", "float8"], 2, "--scale-dtype float8: wanted keep, float16"),
        (["--recipe", "lmdeploy-rtn", "--to", "awq:gemv", "--scale-dtype", "float32"], 3, "needs scales in float32"),
        (["--recipe", "w8a16", "--to", "gptq", "--device", "npu:0"], 2, "torch_npu is not installed"),
        (["--recipe", "w8a16", "--to", "gptq", "--device", "npu:x"], 2, "give one index"),
    ],
)
def test_the_command_line_fails_with_one_line(change: list[str], code: int, words: str, source: Path, tmp_path: Path) -> None:
    result = invoke(source, tmp_path / "out", *change)
    assert (result.exit_code, result.stdout) == (code, "")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert json.loads(invoke(source, tmp_path / "out", *change, "--json").stdout)["exit_code"] == code


@pytest.mark.parametrize("missing", ["torch", "transformers", "yaml"])
def test_what_is_not_installed_is_named_with_the_extra(missing: str, source: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['weighbridge', 'quantize', {str(source)!r}, {str(tmp_path / 'out')!r}, "
        "'--recipe', 'w8a8', '--to', 'gptq', '--calib', 'x.jsonl']; from convert.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"weighbridge quantize: {missing} is not installed; pip install 'weighbridge[quantize]'\n"


def test_without_matplotlib_only_a_plot_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "quantize.plots", raising=False)
    monkeypatch.delattr(quantize, "plots", raising=False)
    with pytest.raises(UsageError, match=r"p\.png: matplotlib.* is not installed; pip install 'weighbridge\[quantize\]'"):
        quantize_model(source, tmp_path / "out", "w8a16", "gptq", plot=tmp_path / "p.png")
    with pytest.raises(UsageError, match=r"p\.png: matplotlib.* is not installed; pip install 'weighbridge\[quantize\]'"):
        quantize_streamed(source, tmp_path / "out", load("w8a16"), "gptq", plot=tmp_path / "p.png")
    quantize_streamed(source, tmp_path / "streamed", load("w8a16"), "gptq")
    quantize_model(source, tmp_path / "out", "w8a16", "gptq")


def test_the_core_and_the_start_of_the_command_line_stay_light() -> None:
    code = (
        "import sys, formats, convert, convert.cli; convert.plan, convert.convert, convert.verify; "
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"quantize", "torch", "transformers", "pydantic", "yaml", "matplotlib"}


def test_a_recipe_of_ones_own_device_is_the_callers(source: Path) -> None:
    assert load("w8a16").quant_config("npu", 3).device == "npu:3"
    assert load("w8a16").quant_config() == QuantConfig(a_bit=16, mm_tensor=False)


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16-rtn", "w8a8-dynamic"])
def test_what_needs_no_data_needs_no_torch(recipe: str, source: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules['torch'] = None; sys.argv = ['weighbridge', 'quantize', {str(source)!r}, {str(tmp_path / 'out')!r}, "
        f"'--recipe', {recipe!r}, '--to', 'msmodelslim']; from convert.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "proved exact" in done.stdout
    quantize_model(source, tmp_path / "loaded", recipe, "msmodelslim")
    assert digest(tmp_path / "out") == digest(tmp_path / "loaded")
