"""MindSpore checkpoints of Golden Stick and MindFormers: what the tool wrote is read, and written again byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoints import FIXTURES, change_tensors
from places import fails, succeeds
from safetensors import safe_open
from safetensors.numpy import save_file

from convert import convert, fingerprint, inspect, plan, verify
from formats import open_checkpoint
from formats.errors import RefusedError, UnreadableError
from formats.ir import Array, dequantize
from formats.mindspore_file import MindSporeFile
from formats.mindspore_output import lay_out_checkpoint, save
from formats.mindspore_yaml import read_quantization
from formats.safetensors_file import NAMES

GOLDENS = FIXTURES / "golden_stick"
CELLS = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A golden in a folder without config.json."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(GOLDENS / "rtn_a16w8_gs060.ckpt", folder)
    return folder


def float_bits(stored: Array) -> Array:
    """The float32 that the low half of an int64 holds."""
    assert not (stored >> 32).any()
    return stored.astype(np.uint32).view(np.float32)


def nibbles(stored: Array) -> Array:
    """[in, out / 2] bytes -> [out, in]: the even output in the low nibble, two's complement."""
    low, high = (stored.astype(np.int16) & 15), (stored.astype(np.int16) >> 4) & 15
    both = np.stack([low, high], axis=2).reshape(stored.shape[0], -1)
    return np.where(both > 7, both - 16, both).T


def rows(cell: str, layer: str) -> slice:
    """Where a layer lies in w_qkv [256 + 128 + 128, 256] or w_gate_hidden [512 + 512, 256]."""
    begin, end = {
        "q_proj": (0, 256), "k_proj": (256, 384), "v_proj": (384, 512), "gate_proj": (0, 512), "up_proj": (512, 1024),
    }[layer.rpartition(".")[2]] if cell.endswith(("w_qkv", "w_gate_hidden")) else (0, None)  # fmt: skip
    return slice(begin, end)


def f32(array: Array) -> Array:
    return array.astype(np.float32)


def old_rtn(get: Any) -> Array:
    return (f32(get("_handler.weight")) + f32(get("_weight_quantizer.zp_neg"))[:, None]) * f32(get("_weight_quantizer.scale"))[:, None]


def old_ptq(get: Any) -> Array:
    return (f32(get("_layer.weight")) + f32(get("_layer.matmul.t_zp_neg"))[:, None]) * f32(get("_layer.matmul.t_scale"))[:, None]


def old_smooth(get: Any) -> Array:
    deq = float_bits(get("_output_quantizer.scale"))
    return f32(get("_handler.weight")) * deq[:, None] * (np.float32(1) / f32(get("_input_quantizer.t_scale")))


def new_ptq(get: Any) -> Array:
    return (f32(get("_layer.weight")) + f32(get("_layer.matmul.weight_zp"))[:, None]) * f32(get("_layer.matmul.weight_scale"))[:, None]


def new_groups(get: Any) -> Array:
    codes, group = nibbles(get("_layer.weight")), np.arange(get("_layer.weight").shape[0]) // 64
    zero, scale = get("_layer.matmul.weight_zp").T[:, group], get("_layer.matmul.weight_scale").T[:, group]
    return (f32(codes) + f32(zero)) * f32(scale)


def new_static(get: Any) -> Array:
    scale = float_bits(get("_layer.matmul.dequant_scale")) / f32(get("quant_op.input_scale"))
    return f32(get("_layer.weight")) * scale[:, None]


def new_dynamic(get: Any) -> Array:
    return f32(get("_layer.weight")) * f32(get("_layer.matmul.weight_scale"))[:, None] * f32(get("dyn_quant_op.smooth_scale"))


LAWS: Mapping[str, tuple[str, str, Any]] = {
    "rtn_a16w8_gs060": ("gs0.6", "W8A16 per channel asym", old_rtn),
    "ptq_a16w8_gs060": ("gs0.6", "W8A16 per channel asym", old_ptq),
    "sq_a8w8_gs060": ("gs0.6", "W8A8 per channel sym static", old_smooth),
    "ptq_a16w8_gs120": ("gs1.2", "W8A16 per channel asym", new_ptq),
    "ptq_a16w4_pg_gs120": ("gs1.2", "W4A16 g64 asym", new_groups),
    "ptq_a8w8_gs120": ("gs1.2", "W8A8 per channel sym static", new_static),
    "ptq_smooth_a8dynw8_gs120_qkvconcat": ("gs1.2", "W8A8 per channel sym dynamic", new_dynamic),
}
"""Golden: the variant, the scheme of its layers, and the law, written out again."""


@pytest.mark.parametrize("golden", LAWS)
def test_every_layer_is_what_the_tools_formula_makes_of_its_tensors(golden: str) -> None:
    variant, scheme, law = LAWS[golden]
    checkpoint, raw = open_checkpoint(GOLDENS / f"{golden}.ckpt"), MindSporeFile(GOLDENS / f"{golden}.ckpt")
    assert (checkpoint.format, checkpoint.variant) == ("mindspore", variant)
    fused = golden.endswith("qkvconcat")
    found = 0
    for block in range(2):
        for module, cell in CELLS.items():
            name, stored = f"model.layers.{block}.{module}", cell
            if fused and module.rpartition(".")[2] in {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}:
                stored = "attention.w_qkv" if "attention" in cell else "feed_forward.w_gate_hidden"
            if golden.startswith("sq") and cell.endswith("w2"):
                assert name in {entry.removesuffix(".weight") for entry in checkpoint.plain_names}
                continue
            layer = checkpoint.layer(name)
            assert str(layer.scheme) == scheme
            wanted = law(lambda leaf, stored=stored, block=block: raw.array(f"model.layers.{block}.{stored}.{leaf}"))
            np.testing.assert_array_equal(dequantize(layer), wanted[rows(stored, module)])
            found += 1
    assert found == len(checkpoint.layer_names)
    plain = {"model.embed_tokens.weight": "model.tok_embeddings.embedding_weight", "model.norm.weight": "model.norm_out.weight"}
    for name, stored in plain.items():
        assert np.asarray(checkpoint.plain(name).data).tobytes() == raw.array(stored).tobytes()


AGAIN: Mapping[str, tuple[str, str, bool]] = {
    "rtn_a16w8_gs060": ("rtn_a16w8_gs060", "gs0.6", False),
    "ptq_a16w8_gs120": ("ptq_a16w8_gs120", "gs1.2", False),
    "ptq_a16w4_pg_gs120": ("ptq_a16w4_pg_gs120", "gs1.2", False),
    "ptq_a8w8_gs120": ("ptq_a8w8_gs120", "gs1.2", False),
    "ptq_smooth_a8dynw8_gs120_qkvconcat": ("ptq_smooth_a8dynw8_gs120_qkvconcat", "gs1.2", True),
    "ptq_a16w8_gs060 as 1.2": ("ptq_a16w8_gs120", "gs1.2", False),
    "ptq_a16w8_gs120 as 0.6": ("rtn_a16w8_gs060", "gs0.6", False),
}
"""A golden: the golden that it becomes, and how."""


@pytest.mark.parametrize("case", AGAIN)
def test_what_is_written_is_byte_for_byte_what_the_tool_wrote(case: str, tmp_path: Path) -> None:
    """From 0.6.0 to 1.2.0 too: names, the sign of zero points and of zero, order and types of tensors are the tool's."""
    wanted, variant, fused = AGAIN[case]
    convert(GOLDENS / f"{case.partition(' ')[0]}.ckpt", tmp_path / "out", f"mindspore:{variant}", qkv_concat=fused)
    (file,) = (tmp_path / "out" / "rank_0").iterdir()
    assert file.suffix == ".ckpt"
    assert file.read_bytes() == (GOLDENS / f"{wanted}.ckpt").read_bytes()


HOLDS: Mapping[str, tuple[str, ...]] = {
    "rtn_a16w8_gs060": ("gptq", "msmodelslim", "compressed-tensors", "mindspore:gs1.2"),
    "ptq_a16w4_pg_gs120": ("gptq", "awq", "msmodelslim", "compressed-tensors"),
    "sq_a8w8_gs060": ("mindspore:gs1.2",),
    "ptq_a8w8_gs120": ("mindspore:gs0.6",),
}


@pytest.mark.parametrize(("golden", "target"), [(golden, target) for golden, targets in HOLDS.items() for target in targets])
def test_there_and_back_the_fingerprint_stays(golden: str, target: str, tmp_path: Path) -> None:
    source, there, back = GOLDENS / f"{golden}.ckpt", tmp_path / "there", tmp_path / "back"
    convert(source, there, target)
    convert(there, back, f"mindspore:{LAWS[golden][0]}")
    assert fingerprint(source).digest == fingerprint(there).digest == fingerprint(back).digest


@pytest.mark.parametrize("golden", ["sq_a8w8_gs060", "ptq_smooth_a8dynw8_gs120_qkvconcat"])
def test_smoothing_is_a_part_of_the_weights(golden: str, tmp_path: Path) -> None:
    """What has no slot for it refuses; dequantized it is multiplied in."""
    for target in ("gptq", "compressed-tensors", "msmodelslim"):
        assert "two-level" in {refusal.code for refusal in plan(GOLDENS / f"{golden}.ckpt", target, allow=["activations-dropped"]).refusals}
    convert(GOLDENS / f"{golden}.ckpt", tmp_path / "dense", "dense", allow=["activations-dropped"], scale_dtype="float32")
    ours, theirs = fingerprint(GOLDENS / f"{golden}.ckpt").tensors, fingerprint(tmp_path / "dense").tensors
    weights = [name for name in theirs if name.endswith("_proj.weight")]
    assert weights
    assert {name: ours[name] for name in weights} == {name: theirs[name] for name in weights}


def test_a_bias_that_the_tool_merged_is_taken_apart(tmp_path: Path) -> None:
    """0.6.0 adds what the inputs' zero point makes to a bias; of a model without biases nothing is left."""
    raw, name = MindSporeFile(GOLDENS / "sq_a8w8_gs060.ckpt"), "model.layers.1.self_attn.o_proj"
    assert raw.array("model.layers.1.attention.wo._handler.bias").any()
    assert open_checkpoint(GOLDENS / "sq_a8w8_gs060.ckpt").layer(name).bias is None, "config.json says that Llama has none"
    shutil.copy(GOLDENS / "sq_a8w8_gs060.ckpt", tmp_path)
    bias = open_checkpoint(tmp_path).layer(name).bias
    assert bias is not None
    assert not np.asarray(bias).any()


def test_a_bias_of_the_model_comes_back_out_of_a_merged_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    codes = rng.integers(-128, 128, (8, 16)).astype(np.int8)
    deq = np.full(8, 2.0**-10, np.float32)
    bias = np.arange(-4, 4).astype(np.float64)
    cell = "model.layers.0.attention.wq"
    path = write(
        tmp_path / "w.ckpt",
        {
            f"{cell}._handler.weight": codes,
            f"{cell}._handler.bias": (bias - 3 * codes.sum(1, dtype=np.int64) * deq).astype(np.float16),
            f"{cell}._input_quantizer.t_scale": np.full(16, 0.125, np.float16),
            f"{cell}._input_quantizer.t_zp": np.full(16, 3, np.int8),
            f"{cell}._output_quantizer.scale": deq.view(np.uint32).astype(np.int64),
        },
    )
    layer = open_checkpoint(path).layer("model.layers.0.self_attn.q_proj")
    np.testing.assert_array_equal(np.asarray(layer.bias), bias)
    assert (layer.input_scale, layer.input_zero_point) == (np.float16(0.125), 3)
    np.testing.assert_array_equal(dequantize(layer), codes * np.float32(2.0**-7))


def write(path: Path, tensors: Mapping[str, Array], int4: tuple[str, ...] = ()) -> Path:
    """A .ckpt file of arrays."""
    entries: list[Any] = [(name, "Int4" if name in int4 else NAMES[array.dtype], array.shape) for name, array in tensors.items()]
    path.parent.mkdir(exist_ok=True)
    save(path, lay_out_checkpoint(entries, path.name), tensors.__getitem__)
    return path


def test_observers_are_left_out_and_said_so() -> None:
    report = inspect(GOLDENS / "sq_a8w8_gs060.ckpt")
    assert [finding.where for finding in report.findings if finding.code == "left-out"] == ["132 tensors"]
    notes = plan(GOLDENS / "sq_a8w8_gs060.ckpt", "mindspore:gs0.6").notes
    assert any(note.startswith("132 tensors are not carried: what Golden Stick's observers measured") for note in notes)


@pytest.mark.parametrize(("golden", "variant"), [("ptq_c8_gs060", "gs0.6"), ("ptq_c8_gs120_f16", "gs1.2")])
def test_a_quantized_cache_is_seen(golden: str, variant: str) -> None:
    checkpoint = open_checkpoint(GOLDENS / f"{golden}.ckpt")
    assert checkpoint.variant == variant
    assert len(checkpoint.attention) == 10
    assert checkpoint.entries == []


@pytest.mark.parametrize(("weights", "cache"), [("rtn_a16w8_gs060", "ptq_c8_gs060"), ("ptq_a16w8_gs120", "ptq_c8_gs120_f16")])
def test_a_quantized_cache_stays_in_its_version_or_is_dropped_by_name(weights: str, cache: str, tmp_path: Path) -> None:
    """Records follow one another, so a file with both is both files, one behind the other."""
    both, variant = tmp_path / "source" / "w.ckpt", LAWS[weights][0]
    both.parent.mkdir()
    both.write_bytes((GOLDENS / f"{weights}.ckpt").read_bytes() + (GOLDENS / f"{cache}.ckpt").read_bytes())
    convert(both, tmp_path / "out", f"mindspore:{variant}", base_model=GOLDENS)
    (path,) = (tmp_path / "out" / "rank_0").iterdir()
    assert path.read_bytes() == both.read_bytes()
    (text,) = (tmp_path / "out").glob("predict_*.yaml")
    assert "kvcache_dtype: int8\n" in text.read_text()
    other = "mindspore:gs1.2" if variant == "gs0.6" else "mindspore:gs0.6"
    for target in ("gptq", other):
        assert {refusal.code for refusal in plan(both, target).refusals} == {"kv-cache-dropped"}
    convert(both, tmp_path / "dropped", "gptq", base_model=GOLDENS, allow=["kv-cache-dropped"])
    ours, theirs = fingerprint(GOLDENS / f"{weights}.ckpt").digest, fingerprint(tmp_path / "dropped").digest
    assert ours == theirs


AWQ = FIXTURES / "awq_gptq" / "awq_gemm_g128_zp"


def test_awq_and_golden_stick_hold_the_same_bits_both_ways(tmp_path: Path) -> None:
    """Each 4-bit code, zero point and scale goes over and comes back in the very words of AutoAWQ."""
    convert(AWQ, tmp_path / "Qwen", "mindspore")
    (path,) = (tmp_path / "Qwen" / "rank_0").iterdir()
    raw, awq = MindSporeFile(path), open_checkpoint(AWQ)
    layer, cell = awq.layer("model.layers.1.mlp.down_proj"), "model.layers.1.feed_forward.w2"
    np.testing.assert_array_equal(nibbles(raw.array(f"{cell}._layer.weight")), layer.codes.read())  # type: ignore[union-attr]
    np.testing.assert_array_equal(raw.array(f"{cell}._layer.matmul.weight_zp"), -layer.grid("zero_points").T.astype(np.float16))
    np.testing.assert_array_equal(raw.array(f"{cell}._layer.matmul.weight_scale"), awq.tensors.array("model.layers.1.mlp.down_proj.scales"))
    convert(tmp_path / "Qwen", tmp_path / "back", "awq")
    assert fingerprint(AWQ).digest == fingerprint(tmp_path / "Qwen").digest
    before, after = awq.tensors, open_checkpoint(tmp_path / "back").tensors
    assert {name: before.array(name).tobytes() for name in before} == {name: after.array(name).tobytes() for name in after}


FUSED = {
    "attention.w_qkv": ("attention.wq", "attention.wk", "attention.wv"),
    "feed_forward.w_gate_hidden": ("feed_forward.w1", "feed_forward.w3"),
}


@pytest.mark.parametrize("golden", ["rtn_a16w8_gs060", "ptq_a16w4_pg_gs120", "ptq_a8w8_gs120"])
def test_layers_stored_as_one_lie_one_after_another(golden: str, tmp_path: Path) -> None:
    convert(GOLDENS / f"{golden}.ckpt", tmp_path / "out", f"mindspore:{LAWS[golden][0]}", qkv_concat=True)
    (path,) = (tmp_path / "out" / "rank_0").iterdir()
    one, many = MindSporeFile(path), MindSporeFile(GOLDENS / f"{golden}.ckpt")
    checked = 0
    for name in one.tensors:
        whole = next((whole for whole in FUSED if whole in name), None)
        if whole is None:
            assert one.array(name).tobytes() == many.array(name).tobytes()
            continue
        parts = [many.array(name.replace(whole, part)) for part in FUSED[whole]]
        along_last = name in one.metadata or (parts[0].ndim == 2 and not name.endswith("weight"))
        wanted = parts[0] if "quant_op" in name else np.concatenate(parts, axis=1 if along_last else 0)
        np.testing.assert_array_equal(one.array(name), wanted)
        checked += 1
    assert checked >= 12
    assert verify(GOLDENS / f"{golden}.ckpt", tmp_path / "out").same


def test_layers_whose_inputs_differ_are_not_stored_as_one(tmp_path: Path) -> None:
    decided = plan(GOLDENS / "sq_a8w8_gs060.ckpt", "mindspore:gs1.2", qkv_concat=True)
    assert {refusal.code for refusal in decided.refusals} == {"fused-inputs"}
    assert "other values than" in str(decided.refusals[0])
    assert "--qkv-concat" in fails(2, "convert", AWQ, tmp_path / "out", "--to", "gptq", "--qkv-concat")


QWEN = FIXTURES / "awq_gptq" / "src_qwen2"


@pytest.mark.parametrize("fused", [False, True])
def test_a_float_model_goes_over_and_back(fused: bool, tmp_path: Path) -> None:
    """Names change and nothing else; biases too. The variant that is not named is the float one."""
    convert(QWEN, tmp_path / "ms", "mindspore", qkv_concat=fused)
    (path,) = (tmp_path / "ms" / "rank_0").iterdir()
    raw, source = MindSporeFile(path), open_checkpoint(QWEN)
    names = {name for name in raw.tensors if name.startswith("model.layers.0.attention.")}
    leaf = ("w_qkv",) if fused else ("wq", "wk", "wv")
    assert names == {f"model.layers.0.attention.{one}" for one in ("wo.weight", *(f"{x}.{y}" for x in leaf for y in ("weight", "bias")))}
    q = source.tensors.array("model.layers.0.self_attn.q_proj.bias")
    np.testing.assert_array_equal(raw.array(f"model.layers.0.attention.{leaf[0]}.bias")[: len(q)], q)
    convert(tmp_path / "ms", tmp_path / "hf", "dense")
    after = open_checkpoint(tmp_path / "hf").tensors
    assert {name: source.tensors.array(name).tobytes() for name in source.tensors} == {name: after.array(name).tobytes() for name in after}


def test_qwen3_has_names_of_its_own(tmp_path: Path) -> None:
    from formats.mindformers_names import MCORE

    assert MCORE.stored("model.layers.3.self_attn.q_norm.weight") == ("decoder.layers.3.self_attention.q_layernorm.weight", 0)
    assert MCORE.stored("model.layers.3.mlp.up_proj.weight") == ("decoder.layers.3.mlp.linear_fc1.weight", 1)
    assert MCORE.canonical("decoder.layers.3.mlp.linear_fc1.weight") == (
        "model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight",
    )  # fmt: skip
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.3.input_layernorm.weight"):
        stored = MCORE.stored(name)
        assert stored is not None
        assert MCORE.canonical(stored[0]) == (name,)


def test_the_folder_is_named_alike_and_its_yaml_is_whole(tmp_path: Path) -> None:
    convert(AWQ, tmp_path / "out", "mindspore", qkv_concat=True)
    name = "awq_gemm_g128_zp_a16w4"
    assert (tmp_path / "out" / "rank_0" / f"{name}.ckpt").is_file()
    text = (tmp_path / "out" / f"predict_{name}.yaml").read_text()
    found = yaml.safe_load(text)
    config = json.loads((AWQ / "config.json").read_text())
    said = found["model"]["model_config"]
    assert (said["num_layers"], said["num_heads"], said["n_kv_heads"]) == (
        config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"],
    )  # fmt: skip
    assert said["qkv_concat"] is True
    assert said["qkv_has_bias"] is True
    assert said["quantization_config"] == {
        "quant_method": "ptq", "weight_dtype": "int4", "activation_dtype": "None", "kvcache_dtype": "None",
        "outliers_suppression": "None", "modules_to_not_convert": ["lm_head"], "algorithm_args": {},
        "weight_quant_granularity": "per_group", "group_size": 128,
    }  # fmt: skip
    assert "outliers_suppression: None\n" in text


def test_without_a_config_the_weights_are_written_and_what_is_missing_is_said(bare: Path, tmp_path: Path) -> None:
    said = succeeds("convert", bare, tmp_path / "out", "--to", "mindspore:gs0.6")
    assert "predict_bare_a16w8.yaml: pass --base-model" in said
    assert [path.name for path in (tmp_path / "out" / "rank_0").iterdir()] == ["bare_a16w8.ckpt"]
    decided = plan(bare / "rtn_a16w8_gs060.ckpt", "mindspore:gs0.6")
    assert [file.name for file in decided.files] == ["rank_0/rtn_a16w8_gs060_a16w8.ckpt"]
    assert not list((tmp_path / "out").glob("*.yaml"))


YAML = """model:
  model_config:
    type: LlamaConfig
    quantization_config:
      quant_method: 'rtn'
      weight_dtype: 'int8'
      activation_dtype: None
      kvcache_dtype: null
      outliers_suppression: None
      modules_to_not_convert: ['lm_head']
      algorithm_args: {}
"""


def test_mindformers_own_yaml_is_read(tmp_path: Path) -> None:
    (tmp_path / "predict.yaml").write_text(YAML)
    found = read_quantization(tmp_path / "predict.yaml")
    assert found is not None
    assert (found["weight_dtype"], found["activation_dtype"], found["kvcache_dtype"]) == ("int8", "None", None)


WRONG = {
    "null where it is a KeyError": ("outliers_suppression: None", "outliers_suppression: null", "line 9: outliers_suppression is None"),
    "a word that is not known": ("'int8'", "'int3'", "line 6: weight_dtype is 'int3', wanted int8, int4, None"),
    "a key that is missing": ("      algorithm_args: {}\n", "", "line 5: quantization_config has no algorithm_args"),
    "a key that is there twice": ("kvcache_dtype: null", "weight_dtype: 'int8'", "line 8: weight_dtype is there twice"),
    "no YAML at all": ("['lm_head']", "['lm_head'", "is no YAML"),
    "an alias": ("'rtn'", "*rtn", "line 5: an alias *rtn"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_yaml_that_is_wrong_is_said_by_key_and_line(case: str, tmp_path: Path) -> None:
    old, new, wanted = WRONG[case]
    (tmp_path / "predict.yaml").write_text(YAML.replace(old, new, 1))
    with pytest.raises(UnreadableError) as caught:
        read_quantization(tmp_path / "predict.yaml")
    assert str(caught.value).startswith("predict.yaml")
    assert wanted in str(caught.value)


def test_a_yaml_that_contradicts_the_weights_is_found(tmp_path: Path) -> None:
    shutil.copy(GOLDENS / "ptq_a16w4_pg_gs120.ckpt", tmp_path / "w.ckpt")
    (tmp_path / "predict.yaml").write_text(YAML)
    (found,) = (finding for finding in inspect(tmp_path).findings if finding.code == "yaml")
    assert found.what == "says weight_dtype int8 of quantization, and the weights have 4 bits: MindFormers would not load them"


def test_a_checkpoint_is_found_by_file_by_folder_and_in_rank_0(tmp_path: Path) -> None:
    rank = tmp_path / "rtn-a16w8_ckpt" / "rank_0"
    rank.mkdir(parents=True)
    shutil.copy(GOLDENS / "rtn_a16w8_gs060.ckpt", rank / "rtn-a16w8.ckpt")
    shutil.copy(FIXTURES / "mindspore" / "ckpt_strategy_rank_0.ckpt", rank / "ckpt_strategy_rank_0.ckpt")
    prints = {fingerprint(place).digest for place in (rank / "rtn-a16w8.ckpt", rank, rank.parent)}
    assert prints == {fingerprint(GOLDENS / "rtn_a16w8_gs060.ckpt").digest}
    assert "mindspore:gs0.6" in succeeds("inspect", rank / "rtn-a16w8.ckpt")


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    strategy = tmp_path / "model.ckpt"
    shutil.copy(FIXTURES / "mindspore" / "ckpt_strategy_rank_0.ckpt", strategy)
    assert "strategy of a parallel run" in fails(5, "inspect", strategy)
    assert "key" in fails(5, "inspect", FIXTURES / "mindspore" / "enc_AES-GCM_16.ckpt")
    shutil.copy(GOLDENS / "ptq_a16w8_gs120.ckpt", tmp_path / "other.ckpt")
    assert "2 .ckpt files (model.ckpt, other.ckpt); name the one to read" in fails(5, "inspect", tmp_path)


CELL = "model.layers.0.attention.wq"
BROKEN: Mapping[str, tuple[dict[str, Array], str]] = {
    "a scale is missing": ({f"{CELL}._layer.weight": np.zeros((4, 8), np.int8)}, "q_proj: has _layer.weight but no _layer.matmul.t_scale"),
    "a scale of another length": (
        {
            f"{CELL}._layer.weight": np.zeros((4, 8), np.int8),
            f"{CELL}._layer.matmul.weight_scale": np.ones(5, np.float16),
            f"{CELL}._layer.matmul.weight_zp": np.zeros(5, np.float16),
        },
        "q_proj: _layer.matmul.weight_scale is F16 [5], wanted F16 or BF16 or F32 [4] or [groups, 4]",
    ),
    "groups that do not divide": (
        {
            f"{CELL}._layer.weight": np.zeros((8, 2), np.int8),
            f"{CELL}._layer.matmul.weight_scale": np.ones((3, 4), np.float16),
            f"{CELL}._layer.matmul.weight_zp": np.zeros((3, 4), np.float16),
        },
        "q_proj: 3 groups do not divide 8 inputs",
    ),
    "two versions": (
        {
            f"{CELL}._handler.weight": np.zeros((4, 8), np.int8),
            f"{CELL}._weight_quantizer.scale": np.ones(4, np.float16),
            f"{CELL}._weight_quantizer.zp_neg": np.zeros(4, np.float16),
            f"{CELL[:-1]}k._layer.weight": np.zeros((4, 8), np.int8),
            f"{CELL[:-1]}k._layer.matmul.weight_scale": np.ones(4, np.float16),
            f"{CELL[:-1]}k._layer.matmul.weight_zp": np.zeros(4, np.float16),
        },
        "layers of gs0.6 and gs1.2 in one file",
    ),
    "q, k and v without the output projection": (
        {"model.layers.0.attention.w_qkv.weight": np.zeros((8, 8), np.float16)},
        "holds q, k and v, and model.layers.0.attention.wo, whose inputs say how much of it is q's, is not there",
    ),
    "an input scale of 0": (
        {
            f"{CELL}._layer.weight": np.zeros((4, 8), np.int8),
            f"{CELL}._layer.matmul.dequant_scale": np.ones(4, np.int64),
            f"{CELL}.quant_op.input_scale": np.zeros(1, np.float16),
            f"{CELL}.quant_op.input_zp": np.zeros(1, np.int8),
        },
        "q_proj.quant_op.input_scale: holds 0.0, wanted positive numbers",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    tensors, wanted = BROKEN[case]
    assert wanted in fails(5, "inspect", write(tmp_path / "w.ckpt", tensors))


def test_a_fractional_zero_point_is_refused(tmp_path: Path) -> None:
    tensors = {
        f"{CELL}._layer.weight": np.zeros((4, 8), np.int8),
        f"{CELL}._layer.matmul.weight_scale": np.ones(4, np.float16),
        f"{CELL}._layer.matmul.weight_zp": np.full(4, 0.5, np.float16),
    }
    with pytest.raises(UnreadableError, match=r"weight_zp: holds the zero point -0\.5"):
        plan(write(tmp_path / "w.ckpt", tensors), "gptq")


def test_what_mindformers_has_no_name_for_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(QWEN, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))
    with pytest.raises(RefusedError, match="names of this model are not known here; those of llama, qwen2 and qwen3 are"):
        convert(folder, tmp_path / "out", "mindspore")
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": {"type": "linear", "factor": 2.0}}))
    with pytest.raises(RefusedError, match="rope_scaling"):
        convert(folder, tmp_path / "out", "mindspore")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "tensor", "size"),
    [({"qkv_concat": True}, "attention.w_qkv", 256 * 256), ({"tp": 2}, "attention.wq", 256 * 64)],
    ids=["fused", "ranks"],
)
def test_a_tensor_beyond_a_chunk_is_cut_and_joined(
    options: Any, tensor: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that are stored as one, or in ranks, in chunks that end within rows are the same weights."""
    from formats import mindspore_target
    from formats.mindformers_file import lay_out_mindformers

    def small(*arguments: Any, **more: Any) -> Any:
        return lay_out_mindformers(*arguments, **more, chunk_bytes=10_000)

    monkeypatch.setattr(mindspore_target, "lay_out_mindformers", small)
    convert(GOLDENS / "ptq_a16w4_pg_gs120.ckpt", tmp_path / "out", "mindspore", **options)
    (path,) = (tmp_path / "out" / "rank_0").iterdir()
    assert path.read_bytes().count(f"{tensor}._layer.weight".encode()) == 2 * -(-size // 10_000)
    assert fingerprint(tmp_path / "out").digest == fingerprint(GOLDENS / "ptq_a16w4_pg_gs120.ckpt").digest


FOLDERS = {"a16w8_ascend": "W8A16 per channel asym", "a16w4_pg_ascend": "W4A16 g64 asym", "a8w8_ascend": "W8A8 per channel asym static"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_1_4_is_what_its_formula_makes_of_it(folder: str) -> None:
    checkpoint = open_checkpoint(GOLDENS / folder)
    assert (checkpoint.format, checkpoint.variant, len(checkpoint.layer_names)) == ("mindspore", "hf", 14)
    with safe_open(GOLDENS / folder / "quant-model-00001-of-00001.safetensors", "np") as file:
        for name in checkpoint.layer_names:
            layer, weight = checkpoint.layer(name), file.get_tensor(f"{name}.weight")
            scale, offset = file.get_tensor(f"{name}.weight_scale"), file.get_tensor(f"{name}.weight_offset")
            assert str(layer.scheme) == FOLDERS[folder]
            if (file.metadata() or {}).get(f"{name}.weight") != "Int4":
                wanted = (f32(weight) - f32(offset)[:, None]) * f32(scale)[:, None]
            else:
                group = np.arange(weight.shape[0]) // 64
                wanted = (f32(nibbles(weight)) - f32(offset.T[:, group])) * f32(scale.T[:, group])
            np.testing.assert_array_equal(dequantize(layer), wanted)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("by", ["mindspore:hf", "mindspore:gs1.2", "gptq"])
def test_a_folder_of_1_4_goes_over_and_back(folder: str, by: str, tmp_path: Path) -> None:
    """To .ckpt, where zero points are negated, and to GPTQ; description, index and every tensor come back."""
    source, there, back = GOLDENS / folder, tmp_path / "there", tmp_path / "back"
    if folder == "a8w8_ascend" and by == "gptq":
        assert {refusal.code for refusal in plan(source, by).refusals} == {"activations-dropped"}
        return
    convert(source, there, by, base_model=None if by == "mindspore:hf" else GOLDENS)
    convert(there, back, "mindspore:hf")
    assert fingerprint(source).digest == fingerprint(there).digest == fingerprint(back).digest
    assert json.loads((back / "quantization_description.json").read_text()) == json.loads(
        (source / "quantization_description.json").read_text()
    )
    indexes = [json.loads((place / "model.safetensors.index.json").read_text())["weight_map"] for place in (source, back)]
    assert indexes[0] == indexes[1]
    before, after = open_checkpoint(source).tensors, open_checkpoint(back).tensors
    differ = {name.rpartition(".")[2] for name in before if before.array(name).tobytes() != after.array(name).tobytes()}
    # A .ckpt file has the product of both scales alone, in float32.
    assert differ == ({"weight_scale"} if (folder, by) == ("a8w8_ascend", "mindspore:gs1.2") else set())
    assert before.files[0].metadata == after.files[0].metadata


def test_folders_of_1_4_are_sharded_with_the_metadata_of_each_shard(tmp_path: Path) -> None:
    convert(GOLDENS / "a16w4_pg_ascend", tmp_path / "out", "mindspore:hf", max_shard_size=300_000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("quant-model-*.safetensors"))
    assert shards == [f"quant-model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2
    for name in shards:
        with safe_open(tmp_path / "out" / name, "np") as file:
            keys, metadata = set(file.keys()), file.metadata()
        assert metadata.pop("format") == "ms"
        assert set(metadata) == {key for key in keys if key.endswith("_proj.weight")}
    assert verify(GOLDENS / "a16w4_pg_ascend", tmp_path / "out").same


def test_a_description_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in (path.name for path in (GOLDENS / "a16w8_ascend").iterdir()):
        shutil.copy(GOLDENS / "a16w8_ascend" / name, tmp_path / name)
    description = json.loads((tmp_path / "quantization_description.json").read_text())
    for change, wanted in (
        ({"model.layers.9.mlp.up_proj.weight": "W8A16"}, "which no weight file holds"),
        ({"model.layers.0.mlp.up_proj.weight": "W3A16"}, "has the unknown type 'W3A16'"),
        ({"model.layers.0.mlp.up_proj.weight": "FLOAT"}, "belongs to a quantized layer, and its weight is FLOAT"),
    ):
        (tmp_path / "quantization_description.json").write_text(json.dumps({**description, **change}))
        assert wanted in fails(5, "inspect", tmp_path)


def test_an_interrupted_conversion_is_finished_and_a_finished_one_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in rank_0 are journalled and durable like any other."""
    from convert import engine

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    source, out = GOLDENS / "ptq_a16w4_pg_gs120.ckpt", tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_sidecars", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, "mindspore", max_memory=1 << 30)
    assert not out.exists()
    assert convert(source, out, "mindspore", max_memory=1 << 30).resumed
    (path,) = (out / "rank_0").iterdir()
    assert path.read_bytes() == source.read_bytes()
    convert(source, out, "mindspore", qkv_concat=True, overwrite=True)
    assert verify(source, out).same


def test_qwen3_goes_over_and_back(tmp_path: Path) -> None:
    """Its networks have q, k, v and gate, up as one whether asked or not, and norms of q and k; there is no YAML for 1.3.2."""
    rng, folder = np.random.default_rng(3), tmp_path / "Qwen3"
    folder.mkdir()
    shapes = {
        "model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,), "lm_head.weight": (32, 16),
        **{f"model.layers.0.self_attn.{x}_proj.weight": y for x, y in {"q": (32, 16), "k": (8, 16), "v": (8, 16), "o": (16, 32)}.items()},
        **{f"model.layers.0.mlp.{x}_proj.weight": y for x, y in {"gate": (24, 16), "up": (24, 16), "down": (16, 24)}.items()},
        **{f"model.layers.0.{x}.weight": (16,) for x in ("input_layernorm", "post_attention_layernorm")},
        **{f"model.layers.0.self_attn.{x}_norm.weight": (8,) for x in "qk"},
    }  # fmt: skip
    weights = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "torch_dtype": "float16"}))
    result = convert(folder, tmp_path / "ms", "mindspore")
    assert any("qwen3 is none of the models that MindFormers 1.3.2 configures" in what for what in result.missing)
    (path,) = (tmp_path / "ms" / "rank_0").iterdir()
    raw = MindSporeFile(path)
    fused = np.concatenate([weights[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"])
    np.testing.assert_array_equal(raw.array("decoder.layers.0.self_attention.linear_qkv.weight"), fused)
    assert {name.rpartition(".")[0] for name in raw.tensors} >= {"embedding.word_embeddings", "decoder.final_layernorm", "output_layer"}
    convert(tmp_path / "ms", tmp_path / "hf", "dense")
    after = open_checkpoint(tmp_path / "hf").tensors
    assert {name: array.tobytes() for name, array in weights.items()} == {name: after.array(name).tobytes() for name in after}


REFUSED: Mapping[str, tuple[str, str, str, str]] = {
    "a bias that would be merged": ("msmodelslim_w8/w8a8_static_bf16", "mindspore:gs0.6", "type", "a bias beside static inputs"),
    "4 bits with quantized inputs": (
        "msmodelslim_w8/w4a8_dynamic_ascendv1_g128_bf16",
        "mindspore",
        "type",
        "4-bit weights with quantized inputs",
    ),
    "groups of 8 bits": ("msmodelslim/w8a16_g128_sym_bf16", "mindspore", "group-size", ""),
}
"""What it is: fixture, target, code, words."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_golden_stick_has_no_words_for_is_refused(case: str) -> None:
    fixture, target, code, words = REFUSED[case]
    refusals = plan(FIXTURES / fixture, target).refusals
    assert code in {refusal.code for refusal in refusals}
    assert any(words in str(refusal) for refusal in refusals)


def test_layers_quantized_in_two_ways_have_no_yaml(tmp_path: Path) -> None:
    """A file may hold them, and goes to other formats; MindFormers' configuration has one scheme for all."""
    scale, zero = np.ones(8, np.float16), np.zeros(8, np.float16)
    tensors = {
        "model.layers.0.attention.wo._layer.weight": np.ones((8, 8), np.int8),
        "model.layers.0.attention.wo._layer.matmul.weight_scale": scale,
        "model.layers.0.attention.wo._layer.matmul.weight_zp": zero,
        "model.layers.0.feed_forward.w2._layer.weight": np.ones((16, 4), np.int8),
        "model.layers.0.feed_forward.w2._layer.matmul.weight_scale": scale,
        "model.layers.0.feed_forward.w2._layer.matmul.weight_zp": zero,
    }
    path = write(tmp_path / "w.ckpt", tensors, int4=("model.layers.0.feed_forward.w2._layer.weight",))
    (refusal,) = plan(path, "mindspore").refusals
    assert str(refusal).startswith(
        "model.layers.0.mlp.down_proj: needs a place in it; mindspore:gs1.2 cannot hold it: is quantized in another"
    )
    assert plan(path, "mindspore:hf").refusals == []


def test_a_static_product_is_made_of_the_scales_not_of_msmodelslims_rounded_one(tmp_path: Path) -> None:
    """msModelSlim rounds deq_scale to the model's dtype; Golden Stick's is exact, and the weights' scale comes out of it."""
    source = FIXTURES / "msmodelslim_w8" / "w8a8_static_ascendv1_fp16"
    convert(source, tmp_path / "out", "mindspore:gs1.2")
    assert verify(source, tmp_path / "out").same
    (path,) = (tmp_path / "out" / "rank_0").iterdir()
    raw, before = MindSporeFile(path), open_checkpoint(source)
    name = before.layer_names[0]
    cell = "model.layers.0.attention.wq" if name.endswith("q_proj") else "model.layers.0.feed_forward.w2"
    layer, stored = before.layer(name), float_bits(raw.array(f"{cell}._layer.matmul.dequant_scale"))
    assert layer.input_scale is not None
    np.testing.assert_array_equal(stored, f32(layer.grid("scales"))[:, 0] * f32(layer.input_scale))
    zero, codes = int(raw.array(f"{cell}.quant_op.input_zp")[0]), raw.array(f"{cell}._layer.weight").astype(np.int64)
    np.testing.assert_array_equal(raw.array(f"{cell}._layer.matmul.quant_bias"), -zero * codes.sum(1))


def test_a_float32_scale_comes_back_from_its_product_where_it_was_a_quotient() -> None:
    """Of Golden Stick's static layers only the product is stored: what is read from one can be written again, by way of any format."""
    from formats.derived import comes_back
    from formats.ir import QuantArgs, QuantizedLinear, QuantScheme

    rng, scheme = np.random.default_rng(3), QuantScheme(QuantArgs(8), QuantArgs(8, strategy="tensor"))

    def layer(scales: Array, inputs: Array) -> QuantizedLinear:
        return QuantizedLinear("l", (len(scales), 4), scheme, np.zeros((len(scales), 4), np.int8), scales, input_scale=inputs)

    products = rng.uniform(1e-6, 1e-2, 5000).astype(np.float32)
    for inputs in rng.uniform(1e-3, 1, (20, 1)).astype(np.float32):
        assert comes_back(layer(products / inputs, inputs))
    assert not comes_back(layer(rng.uniform(1e-6, 1e-2, 5000).astype(np.float32), np.array([0.0371], np.float32)))
    assert comes_back(layer(products.astype(np.float16), np.array([0.0371], np.float16)))  # 22 bits, which float32 holds


def test_a_float32_scale_that_does_not_come_back_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    convert(GOLDENS / "ptq_a8w8_gs120.ckpt", source, "msmodelslim:safe_tensor", scale_dtype="keep")
    assert convert(source, tmp_path / "out", "mindspore:gs1.2").exact  # these were quotients

    def random_scales(tensors: dict[str, Array]) -> None:
        rng = np.random.default_rng(0)
        for name, array in tensors.items():
            if name.endswith("weight_scale"):
                array[...] = rng.uniform(1e-4, 1e-2, array.shape)

    (weights,) = source.glob("*.safetensors")
    change_tensors(weights, random_scales)
    refusals = plan(source, "mindspore:gs1.2").refusals
    assert {refusal.code for refusal in refusals} == {"type"}
    assert "a float32 scale beside the inputs' own" in str(refusals[0])


def test_a_quantized_cache_of_a_float_model_is_carried_to_its_own_version(tmp_path: Path) -> None:
    """Without quantized weights: written as the version that it is of, byte for byte; to others it is a loss that must be allowed."""
    for golden, target in (("ptq_c8_gs060", "mindspore:gs0.6"), ("ptq_c8_gs120_f16", "mindspore:gs1.2")):
        source = GOLDENS / f"{golden}.ckpt"
        result = convert(source, tmp_path / golden, "mindspore", base_model=GOLDENS)
        assert result.plan.target_name == target
        (path,) = (tmp_path / golden / "rank_0").iterdir()
        assert path.read_bytes() == source.read_bytes()
        (document,) = (tmp_path / golden).glob("predict_*.yaml")
        said = read_quantization(document)
        assert said is not None
        assert (said["weight_dtype"], said["kvcache_dtype"]) == ("None", "int8")
        assert "--allow kv-cache-dropped" in fails(3, "convert", source, tmp_path / "out", "--to", "dense")
