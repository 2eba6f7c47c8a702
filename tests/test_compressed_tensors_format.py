"""compressed-tensors: what llm-compressor wrote reads to the weights that its own decompressor makes of it; configs; hostile folders.

The expected side is the tool's: digests in ``dequant_sha256.json``, of the float32 bytes of what it returned in ``dtype``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import FIXTURES, write_raw

from formats import detect, open_checkpoint
from formats.checkpoint import Location
from formats.compressed_config import PRESETS, CompressedConfig
from formats.compressed_layouts import Lanes
from formats.compressed_tensors import SPEC, CompressedTensors, objection, outputs, quantization_config
from formats.errors import RefusedError, UnreadableError, WeighbridgeError
from formats.ir import QuantArgs, QuantizedLinear, QuantScheme, as_grid, dequantize, read
from formats.layouts import PackedMatrix
from formats.safetensors_file import DTYPES, NAMES, TensorSet
from formats.spec import LayerTarget, ModelFacts

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, Array]
Config = dict[str, Any]

ROOT = FIXTURES / "compressed_tensors"
SCHEMES = {
    "fp8_block_bf16": (6, "W8A8 e4m3 block (128, 128) sym dynamic"),
    "fp8_dynamic_fp16": (7, "W8A8 e4m3 per channel sym dynamic"),
    "fp8_dynamic_kv_fp8_fp16": (7, "W8A8 e4m3 per channel sym dynamic"),
    "fp8_static_fp16": (7, "W8A8 e4m3 per tensor sym static"),
    "mxfp4_bf16": (7, "W4A4 e2m1 g32 sym dynamic"),
    "mxfp8_bf16": (7, "W8A8 e4m3 g32 sym dynamic"),
    "naive_w8a16_g64_sym_fp16": (7, "W8A16 g64 sym"),
    "nvfp4_bf16": (7, "W4A4 e2m1 g16 sym dynamic"),
    "nvfp4a16_bf16": (7, "W4A16 e2m1 g16 sym"),
    "w3a16_g32_sym_fp16": (7, "W3A16 g32 sym"),
    "w4a16_g128_asym_bf16": (7, "W4A16 g128 asym"),
    "w4a16_g128_sym_bf16": (7, "W4A16 g128 sym"),
    "w4a16_g32_asym_fp16": (7, "W4A16 g32 asym"),
    "w4a16_gptq_g32_actgroup_asym_fp16": (7, "W4A16 g32 asym act-order(group)"),
    "w4a16_gptq_g32_actweight_sym_fp16": (7, "W4A16 g32 sym act-order(static)"),
    "w4a16_gptq_g64_actgroup_sym_bf16": (7, "W4A16 g64 sym act-order(group)"),
    "w4a16_pc_asym_fp16": (7, "W4A16 per channel asym"),
    "w4a16_pc_sym_fp16": (7, "W4A16 per channel sym"),
    "w4a16_sharded_fp16": (14, "W4A16 g64 sym"),
    "w4a8_g32_dynamic_fp16": (7, "W4A8 g32 sym dynamic"),
    "w8a16_g64_asym_fp16": (7, "W8A16 g64 asym"),
    "w8a16_pc_sym_fp16": (7, "W8A16 per channel sym"),
    "w8a8_dynamic_fp16": (7, "W8A8 per channel sym dynamic"),
    "w8a8_dynamic_kv_int8_fp16": (7, "W8A8 per channel sym dynamic"),
    "w8a8_dynamic_wasym_fp16": (7, "W8A8 per channel asym dynamic"),
    "w8a8_static_asym_fp16": (7, "W8A8 per channel sym static"),
    "w8a8_static_sym_bf16": (7, "W8A8 per channel sym static"),
    "w8a8_tensor_static_asym_fp16": (7, "W8A8 per tensor sym static"),
}
"""Goldens with one scheme for all layers: how many those are, and the scheme."""

MIXED = {"self_attn": "W8A8 per channel sym dynamic", "gate_proj": "W4A16 g32 sym", "up_proj": "W4A16 g32 sym"}
ATTENTION = "model.layers.0.self_attn"
DOWN = "model.layers.0.mlp.down_proj"
TOOLS_DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def digests(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "dequant_sha256.json").read_text())["tensors"]
    return found


def digest(layer: QuantizedLinear, dtype: str) -> str:
    """Of the law's weights, rounded once."""
    weights = dequantize(layer).astype(TOOLS_DTYPES[dtype])
    return hashlib.sha256(weights.astype("<f4").tobytes()).hexdigest()


def stored(folder: Path) -> Tensors:
    """Every tensor, read by an own few lines."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = np.frombuffer(content[start + begin : start + end], DTYPES[entry["dtype"]]).reshape(entry["shape"]).copy()
    return tensors


def write(folder: Path, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> Path:
    """A folder of ``tensors`` with a config.json."""
    header, data = {}, b""
    for name, array in tensors.items():
        part = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    folder.mkdir(exist_ok=True)
    write_raw(folder / "model.safetensors", header, data)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def said(groups: Mapping[str, Any], **more: Any) -> Config:
    """A config.json."""
    return {
        "quantization_config": {"quant_method": "compressed-tensors", "quantization_status": "compressed", "config_groups": groups, **more}
    }


ChangeTensors = Callable[[Tensors], object] | None
ChangeConfig = Callable[[Config], object] | None


def changed(case: str, folder: Path, tensors: ChangeTensors = None, config: ChangeConfig = None) -> Path:
    """A copy of a golden after its tensors and its quantization_config have been edited in place."""
    held, document = stored(ROOT / case), json.loads((ROOT / case / "config.json").read_text())
    if tensors is not None:
        tensors(held)
    if config is not None:
        config(document["quantization_config"])
    return write(folder, held, document)


def opened(folder: Path) -> CompressedTensors:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, CompressedTensors)
    return checkpoint


# --- goldens ----------------------------------------------------------------------------------------------------------


def test_every_golden_is_listed() -> None:
    assert {path.parent.name for path in ROOT.glob("*/golden_case.json")} == {*SCHEMES, "mixed_fp16", "kv_fp8_head_fp16"}


@pytest.mark.parametrize("case", SCHEMES)
def test_golden_reads_to_the_tools_weights(case: str) -> None:
    checkpoint, expected = opened(ROOT / case), digests(ROOT / case)
    count, scheme = SCHEMES[case]
    assert sorted(f"{name}.weight" for name in checkpoint.layer_names) == sorted(expected)
    assert len(expected) == count
    for name in checkpoint.layer_names:
        layer, wanted = checkpoint.layer(name), expected[f"{name}.weight"]
        assert str(layer.scheme) == scheme
        assert list(layer.shape) == wanted["shape"]
        assert digest(layer, wanted["dtype"]) == wanted["sha256_float32_le"], name


def test_golden_of_three_schemes_reads_to_the_tools_weights() -> None:
    checkpoint, expected = opened(ROOT / "mixed_fp16"), digests(ROOT / "mixed_fp16")
    assert sorted(f"{name}.weight" for name in checkpoint.layer_names) == sorted(expected)
    assert len(expected) == 13
    for name in checkpoint.layer_names:
        layer, wanted = checkpoint.layer(name), expected[f"{name}.weight"]
        scheme = next((scheme for part, scheme in MIXED.items() if part in name), "W8A8 e4m3 per channel sym dynamic")
        assert str(layer.scheme) == ("W4A16 g32 sym" if name == DOWN else scheme), name
        assert digest(layer, "float16") == wanted["sha256_float32_le"], name
    assert "model.layers.1.self_attn.o_proj.weight" in checkpoint.plain_names


@pytest.mark.parametrize("case", [*SCHEMES, "mixed_fp16", "kv_fp8_head_fp16"])
def test_golden_accounts_for_every_tensor(case: str) -> None:
    """Each is plain, verbatim, or of exactly one layer, or of the KV cache; layers stand where their codes do."""
    checkpoint, everything = opened(ROOT / case), stored(ROOT / case)
    parts = [tensor for name in checkpoint.layer_names for tensor in checkpoint.layer_tensors(name)]
    assert sorted(parts + checkpoint.plain_names + checkpoint.attention) == sorted(everything)
    assert checkpoint.left_out == checkpoint.unsupported == checkpoint.functional == []
    for name in checkpoint.plain_names:
        assert np.asarray(checkpoint.plain(name).data).tobytes() == everything[name].tobytes()
    keys = {name: next(part for part in ("weight_packed", "weight") if f"{name}.{part}" in everything) for name in checkpoint.layer_names}
    assert all(checkpoint.layer_tensors(name)[0] == f"{name}.{key}" for name, key in keys.items())
    order = [name if kind == "plain" else f"{name}.{keys[name]}" for kind, name in checkpoint.entries]
    assert order == [tensor for tensor in checkpoint.tensors if tensor in set(order)]
    biases = [name for name in checkpoint.layer_names if checkpoint.layer(name).bias is not None]
    assert len(biases) == (3 if (ROOT / case / "config.json").read_text().find('"qwen2"') >= 0 else 0)


def test_static_inputs_are_read_in_their_own_dtype() -> None:
    for case, dtype, symmetric in (
        ("w8a8_static_sym_bf16", ml_dtypes.bfloat16, True),
        ("w8a8_static_asym_fp16", np.float16, False),
        ("fp8_static_fp16", np.float16, True),
    ):
        checkpoint, everything = opened(ROOT / case), stored(ROOT / case)
        for name in checkpoint.layer_names:
            layer = checkpoint.layer(name)
            assert layer.input_scale is not None
            assert layer.input_scale.dtype == dtype
            assert layer.input_scale.tobytes() == everything[f"{name}.input_scale"].tobytes()
            element = "e4m3" if case.startswith("fp8") else "int"
            assert layer.scheme.inputs == QuantArgs(8, element, symmetric, "tensor")  # type: ignore[arg-type]
            if symmetric:
                assert layer.input_zero_point is None
            else:
                assert layer.input_zero_point is not None
                assert layer.input_zero_point.dtype == np.int16
                assert layer.input_zero_point.tolist() == everything[f"{name}.input_zero_point"].tolist() != [0]


def test_inputs_found_at_run_time() -> None:
    wanted = {
        "w8a8_dynamic_fp16": QuantArgs(8, "int", True, "token", dynamic=True),
        "fp8_block_bf16": QuantArgs(8, "e4m3", True, "group", 128, dynamic=True),
        "mxfp4_bf16": QuantArgs(4, "e2m1", True, "group", 32, dynamic=True),
        "nvfp4_bf16": QuantArgs(4, "e2m1", True, "group", 16, dynamic=True),
        "nvfp4a16_bf16": None,
        "w4a16_g128_sym_bf16": None,
    }
    for case, inputs in wanted.items():
        checkpoint = opened(ROOT / case)
        for layer in map(checkpoint.layer, checkpoint.layer_names):
            assert layer.scheme.inputs == inputs
            assert layer.input_scale is layer.input_zero_point is None
            assert set(layer.extras) == ({"input_global_scale"} if case == "nvfp4_bf16" else set())


def test_outer_scales_of_nvfp4() -> None:
    layer, everything = opened(ROOT / "nvfp4_bf16").layer(DOWN), stored(ROOT / "nvfp4_bf16")
    assert layer.outer_divides
    assert np.asarray(layer.outer).tolist() == everything[f"{DOWN}.weight_global_scale"].tolist()
    extra = layer.extras["input_global_scale"]
    assert extra.kind == "functional"
    assert np.asarray(extra.value).tobytes() == everything[f"{DOWN}.input_global_scale"].tobytes()


def test_kv_cache_scales_are_named_with_what_the_config_says_of_them() -> None:
    for case, strategy, kind in (
        ("fp8_dynamic_kv_fp8_fp16", "tensor", "float"),
        ("w8a8_dynamic_kv_int8_fp16", "tensor", "int"),
        ("kv_fp8_head_fp16", "attn_head", "float"),
    ):
        checkpoint = opened(ROOT / case)
        assert checkpoint.attention == [f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"]
        scheme = checkpoint.said["kv_cache_scheme"]
        assert (scheme["strategy"], scheme["type"], scheme["num_bits"]) == (strategy, kind, 8)
    assert opened(ROOT / "kv_fp8_head_fp16").layer_names == []
    assert opened(ROOT / "w8a8_dynamic_fp16").said == {}


@pytest.mark.parametrize("case", ["w3a16_g32_sym_fp16", "w4a16_g32_asym_fp16", "fp8_static_fp16", "nvfp4_bf16", "mxfp8_bf16"])
def test_a_rectangle_is_that_part_of_the_whole(case: str) -> None:
    layer = opened(ROOT / case).layer(DOWN)
    whole = dequantize(layer)
    for rows, cols in ((slice(3, 50), slice(64, 128)), (slice(127, 128), slice(128, 192)), (slice(0, 0), slice(0, 64))):
        np.testing.assert_array_equal(dequantize(layer, rows, cols), whole[rows, cols], strict=True)
        assert read(layer.codes, rows, cols).dtype == layer.codes.dtype


# --- single weights ---------------------------------------------------------------------------------------------------


def edges(version: str = "") -> Path:
    return ROOT / f"edge_linear{version and '_' + version}"


def edge_folder(folder: Path, version: str = "") -> Path:
    """The edge weights under a config that says of each what it is; the record has its arguments, or its bits and group size."""
    groups = {}
    for name, row in digests(edges(version)).items():
        args = row.get("weights") or {"num_bits": row["bits"], "symmetric": False, "group_size": row["group_size"], "strategy": "group"}
        groups[name] = {"targets": [name], "weights": args, "format": row.get("format", "pack-quantized")}
    return write(folder, stored(edges(version)), said(groups, version=version or "0.17.0", format="mixed-precision"))


@pytest.mark.parametrize(("version", "count"), [("", 12), ("0.9.3", 2), ("0.20.0", 8)])
def test_single_weights_read_to_the_tools_weights(tmp_path: Path, version: str, count: int) -> None:
    """Shapes that fill neither words nor blocks, and words of other versions."""
    checkpoint, expected = opened(edge_folder(tmp_path / "edges", version)), digests(edges(version))
    assert sorted(checkpoint.layer_names) == sorted(expected)
    assert len(expected) == count
    for name, wanted in expected.items():
        assert digest(checkpoint.layer(name), wanted["dtype"]) == wanted["sha256_float32_le"], name


@pytest.mark.parametrize("version", ["0.9.3", "0.20.0"])
def test_codes_and_zero_points_of_other_versions(tmp_path: Path, version: str) -> None:
    checkpoint, everything = opened(edge_folder(tmp_path / "edges", version)), stored(edges(version))
    for name in checkpoint.layer_names:
        layer = checkpoint.layer(name)
        np.testing.assert_array_equal(read(layer.codes), everything[f"{name}.codes"], name)
        np.testing.assert_array_equal(layer.grid("zero_points"), everything[f"{name}.zeros"], name)


@pytest.mark.parametrize("version", ["", "0.9.3", "0.20.0"])
def test_an_edge_folder_alone_says_nothing(version: str) -> None:
    with pytest.raises(UnreadableError, match=r"neither a config\.json"):
        open_checkpoint(edges(version))


@pytest.mark.parametrize(
    ("version", "name"), [("", "pack3_asym_n35_k96"), ("0.20.0", "pack5_asym_n35_k96"), ("0.20.0", "pack3_asym_n40_k160")]
)
def test_odd_words_are_read_in_any_rectangle(tmp_path: Path, version: str, name: str) -> None:
    layer = opened(edge_folder(tmp_path / "edges", version)).layer(name)
    codes = Lanes(layer.codes.stored, layer.shape, layer.scheme.weights.bits, "in", version != "")  # type: ignore[union-attr]
    zeros = layer.zero_points
    assert isinstance(zeros, Lanes)
    whole = read(layer.codes), read(zeros)
    for array, expected in ((codes, whole[0]), (zeros, whole[1])):
        for rows in (slice(None), slice(0, 1), slice(11, 33), slice(34, 35), slice(5, 5)):
            for cols in (slice(None), slice(0, 1), slice(1, 3), slice(2, 2)):
                np.testing.assert_array_equal(array.read(rows, cols), expected[rows, cols], strict=True)


def words_of(tmp_path: Path, version: str | None) -> CompressedTensors:
    """Eleven codes of three bits in two words, which is what old and new files take."""
    tensors = {
        "x.weight_packed": np.array([[0b10_001_000_111_110_101_100_011_010_001_000, 0b101]], dtype=np.int64)
        .astype(np.uint32)
        .view(np.int32),
        "x.weight_scale": np.array([[1.0]], dtype=np.float32),
        "x.weight_shape": np.array([1, 11]),
    }
    group = {"targets": ["Linear"], "weights": {"num_bits": 3, "strategy": "channel"}}
    return opened(write(tmp_path / "words", tensors, said({"group_0": group}, **({} if version is None else {"version": version}))))


def test_the_version_says_what_two_words_of_eleven_codes_are(tmp_path: Path) -> None:
    first = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]  # lanes of three bits, the lowest first; the word's two highest bits are 10
    old, new = words_of(tmp_path, "0.17.1"), words_of(tmp_path, "0.18.0")
    assert (read(old.layer("x").codes) + 4).tolist() == [[*first, 0b101]]
    assert (read(new.layer("x").codes) + 4).tolist() == [[*first, 0b110]]  # 10, and above it the second word's lowest bit
    with pytest.raises(UnreadableError, match="x: 11 codes of 3 bits fill 2 words in old and in new files"):
        words_of(tmp_path, None).layer("x")


def test_widths_that_layouts_can_say_are_read_by_layouts(tmp_path: Path) -> None:
    """Kernels serve those alone."""
    checkpoint = opened(ROOT / "w4a16_g32_asym_fp16")
    for layer in map(checkpoint.layer, checkpoint.layer_names):
        assert isinstance(layer.codes, PackedMatrix)
        assert layer.codes.width is None
        assert isinstance(layer.zero_points, PackedMatrix)
    edge = opened(edge_folder(tmp_path / "edges")).layer("pack4_sym_n36_k100").codes
    assert isinstance(edge, PackedMatrix)
    assert edge.width == 100


# --- writing ----------------------------------------------------------------------------------------------------------

WRITTEN = sorted({*SCHEMES, "mixed_fp16", "kv_fp8_head_fp16"} - {"mxfp4_bf16", "mxfp8_bf16", "nvfp4_bf16", "nvfp4a16_bf16"})
WRITTEN.remove("w3a16_g32_sym_fp16")
WRITTEN.remove("naive_w8a16_g64_sym_fp16")


def target_of(layer: QuantizedLinear) -> LayerTarget:
    """The layer to be written as it was read."""
    names = [None if array is None else NAMES[np.dtype(array.dtype)] for array in (layer.bias, layer.input_scale)]
    return LayerTarget(layer.name, layer.shape, layer.scheme, NAMES[np.dtype(layer.scales.dtype)], *names)


def facts_of(checkpoint: CompressedTensors, **changes: Any) -> ModelFacts:
    layers = tuple(target_of(checkpoint.layer(name)) for name in checkpoint.layer_names)
    floats = tuple(name.removesuffix(".weight") for name in checkpoint.plain_names if name.endswith("_proj.weight"))
    facts: dict[str, Any] = {"others": ("lm_head", "model.embed_tokens"), "attention": tuple(checkpoint.attention), "said": checkpoint.said}
    return ModelFacts(layers, floats, None, **(facts | changes))


@pytest.mark.parametrize("case", WRITTEN)
def test_a_golden_would_be_written_as_the_tool_wrote_it(case: str) -> None:
    """The same tensors, dtypes and shapes; codes and zero points pack to the same bytes."""
    checkpoint, everything = opened(ROOT / case), stored(ROOT / case)
    for name in checkpoint.layer_names:
        layer = checkpoint.layer(name)
        specs = outputs(target_of(layer), "compressed")
        wanted = {tensor: (NAMES[everything[tensor].dtype], everything[tensor].shape) for tensor in checkpoint.layer_tensors(name)}
        assert {spec.name: (spec.dtype, spec.shape) for spec in specs} == wanted
        assert specs[0].part == "codes"
        for spec in specs:
            if spec.layout is not None:
                grid = read(layer.codes) if spec.part == "codes" else layer.grid("zero_points")
                assert spec.layout.pack(np.ascontiguousarray(grid)).tobytes() == everything[spec.name].tobytes(), spec.name


@pytest.mark.parametrize("case", sorted(set(WRITTEN) - {"mixed_fp16", "kv_fp8_head_fp16"}))
def test_a_goldens_config_would_be_written_as_the_tool_wrote_it(case: str) -> None:
    """All but who observed the ranges, which nobody knows of a converted folder."""
    files, found = quantization_config(facts_of(opened(ROOT / case)), "compressed")
    wanted = json.loads((ROOT / case / "config.json").read_text())["quantization_config"]
    for operand in ("weights", "input_activations"):
        if wanted["config_groups"]["group_0"][operand] is not None:
            assert found["config_groups"]["group_0"][operand]["observer"] is None
            wanted["config_groups"]["group_0"][operand]["observer"] = None
    wanted["ignore"] = sorted(wanted["ignore"])
    assert found == wanted
    assert files == {}


def test_the_config_of_several_schemes_says_each_layers(tmp_path: Path) -> None:
    checkpoint = opened(ROOT / "mixed_fp16")
    _, written = quantization_config(facts_of(checkpoint), "compressed")
    assert written["format"] == "mixed-precision"
    assert written["ignore"] == ["lm_head", "model.layers.1.self_attn.o_proj"]
    targets = [group["targets"] for group in written["config_groups"].values()]
    assert [len(names) for names in targets] == [1, 5, 1]
    assert targets[0] == ["Linear"]
    again = opened(write(tmp_path / "again", stored(ROOT / "mixed_fp16"), {"quantization_config": written}))
    assert again.layer_names
    assert [again.layer(name).scheme for name in again.layer_names] == [checkpoint.layer(name).scheme for name in checkpoint.layer_names]


def test_a_config_of_the_kv_cache_alone() -> None:
    checkpoint = opened(ROOT / "kv_fp8_head_fp16")
    _, written = quantization_config(facts_of(checkpoint), "compressed")
    assert (written["format"], written["config_groups"]) == ("dense", {})
    assert written["kv_cache_scheme"] == checkpoint.said["kv_cache_scheme"]
    assert len(written["ignore"]) == 8
    _, without = quantization_config(facts_of(checkpoint, attention=()), "compressed")
    assert without["kv_cache_scheme"] is None


def test_a_quantized_lm_head_is_a_target_by_its_name() -> None:
    layers = tuple(LayerTarget(name, (64, 64), QuantScheme(QuantArgs(4)), "F16", None) for name in ("lm_head", "model.layers.0.x"))
    _, written = quantization_config(ModelFacts(layers, (), None, others=("model.embed_tokens", "visual.merger")), "compressed")
    assert written["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert written["ignore"] == ["visual.merger"]


def inputs_written(inputs: QuantArgs, dtype: str | None) -> tuple[Config, list[tuple[str, str]]]:
    layer = LayerTarget("x", (64, 64), QuantScheme(QuantArgs(8), inputs), "F32", None, dtype)
    _, written = quantization_config(ModelFacts((layer,), (), None), "compressed")
    return written["config_groups"]["group_0"]["input_activations"], [(spec.part, spec.dtype) for spec in outputs(layer, "compressed")]


def test_inputs_are_written_static_if_there_are_scales() -> None:
    both = QuantArgs(8, "int", False, "token", dynamic=True)
    args, parts = inputs_written(both, "BF16")
    assert (args["dynamic"], args["strategy"], args["symmetric"], args["zp_dtype"]) == (False, "tensor", False, "torch.int8")
    assert parts == [("codes", "I8"), ("scales", "F32"), ("input_scale", "BF16"), ("input_zero_point", "I8")]
    args, parts = inputs_written(QuantArgs(8, dynamic=True), None)
    assert (args["dynamic"], args["strategy"], args["symmetric"], args["zp_dtype"]) == (True, "token", True, None)
    assert parts == [("codes", "I8"), ("scales", "F32")]


def test_fp8_inputs_of_4_bit_integers_are_written_packed() -> None:
    args = QuantScheme(QuantArgs(4, strategy="group", group_size=32), QuantArgs(8, "e4m3", True, "token", dynamic=True))
    layer = LayerTarget("x", (64, 64), args, "F16", None)
    assert [spec.name for spec in outputs(layer, "compressed")] == ["x.weight_packed", "x.weight_scale", "x.weight_shape"]
    assert objection(layer, "compressed") is None


@pytest.mark.parametrize(
    ("weights", "inputs", "code"),
    [
        (QuantArgs(8, "e4m3", True, "group", 32), None, "strategy"),
        (QuantArgs(8, "int", True, "block", None, (128, 128)), None, "strategy"),
        (QuantArgs(8, "e4m3"), QuantArgs(8, dynamic=True), "activations"),
        (QuantArgs(8), QuantArgs(8, "e4m3", dynamic=True), "activations"),
    ],
)
def test_what_no_engine_loads_is_objected_to(weights: QuantArgs, inputs: QuantArgs | None, code: str) -> None:
    found = objection(LayerTarget("x", (64, 64), QuantScheme(weights, inputs), "F16", None), "compressed")
    assert found is not None
    assert found.code == code


# --- configs ----------------------------------------------------------------------------------------------------------


def config_of(groups: Mapping[str, Any], **more: Any) -> CompressedConfig:
    found: Config = said(groups, **more)["quantization_config"]
    return CompressedConfig(found)


def group_of(bits: int, *targets: str) -> Config:
    return {"targets": list(targets), "weights": {"num_bits": bits}}


def bits_of(config: CompressedConfig, name: str) -> int | None:
    group = config.find(name)
    return None if group is None or group.weights is None else group.weights.bits


def test_a_name_counts_before_an_expression_and_that_before_a_class() -> None:
    config = config_of({"c": group_of(2, "Linear"), "b": group_of(3, "re:.*q_proj"), "a": group_of(4, "layers.0.q_proj")})
    found = [bits_of(config, name) for name in ("layers.0.q_proj", "layers.1.q_proj", "layers.1.k_proj")]
    assert found == [4, 3, 2]


def test_of_expressions_the_first_by_text_counts() -> None:
    config = config_of({"a": group_of(2, "re:.*z", "re:layers.*"), "b": group_of(3, "re:.*q_proj")})
    assert bits_of(config, "layers.0.q_proj") == 3
    assert bits_of(config, "layers.0.k_proj") == 2
    assert bits_of(config, "model.layers.0.k_proj") is None, "an expression is matched at the beginning"


def test_a_target_of_two_groups_is_the_last_ones() -> None:
    assert bits_of(config_of({"a": group_of(2, "Linear"), "b": group_of(3, "Linear")}), "x") == 3


def test_ignore_counts_before_everything() -> None:
    config = config_of({"a": group_of(4, "Linear", "lm_head", "re:.*k")}, ignore=["lm_head", "re:.*vision", "Embedding"])
    found = {name: bits_of(config, name) for name in ("lm_head", "model.lm_head", "a.vision.k", "embed_tokens", "k")}
    assert found == {"lm_head": None, "model.lm_head": 4, "a.vision.k": None, "embed_tokens": None, "k": 4}


def test_embeddings_are_no_linears() -> None:
    config = config_of({"a": group_of(4, "Linear"), "b": group_of(8, "Embedding")})
    assert [bits_of(config, name) for name in ("model.embed_tokens", "wte", "h.0.mlp")] == [8, 8, 4]


def test_a_class_by_another_name_is_every_layers_if_it_is_the_only_one() -> None:
    assert bits_of(config_of({"a": group_of(4, "LlamaMLPLinear")}), "x") == 4
    assert bits_of(config_of({"a": group_of(4, "First"), "b": group_of(8, "Second")}), "x") is None


def test_arguments_that_are_left_out_are_inferred() -> None:
    def read_as(**args: Any) -> QuantArgs | None:
        group = config_of({"a": {"targets": ["Linear"], "weights": args}}).find("x")
        return None if group is None else group.weights

    assert read_as() == QuantArgs(8, "int", True, "tensor")
    assert read_as(group_size=-1, num_bits=4) == QuantArgs(4, "int", True, "channel")
    assert read_as(group_size=64) == QuantArgs(8, "int", True, "group", 64)
    assert read_as(strategy="block", block_structure="2x4", type="float") == QuantArgs(8, "e4m3", True, "block", None, (2, 4))
    assert read_as(strategy="GROUP", group_size=32, actorder=True) == QuantArgs(8, "int", True, "group", 32, None, "group")
    assert read_as(group_size=32, actorder="dynamic") == QuantArgs(8, "int", True, "group", 32, None, "group")
    assert read_as(group_size=32, actorder="static") == QuantArgs(8, "int", True, "group", 32, None, "static")


PRESET_SCHEMES = {
    "W8A16": "W8A16 g128 sym",
    "W4A16": "W4A16 g128 sym",
    "w4a16_asym": "W4A16 g128 asym",
    "W8A8": "W8A8 per channel sym dynamic",
    "INT8": "W8A8 per channel sym dynamic",
    "W4A8": "W4A8 g128 sym dynamic",
    "W4AFP8": "W4A8 g128 sym dynamic",
    "FP8": "W8A8 e4m3 per tensor sym static",
    "FP8_DYNAMIC": "W8A8 e4m3 per channel sym dynamic",
    "FP8_BLOCK": "W8A8 e4m3 block (128, 128) sym dynamic",
    "NVFP4A16": "W4A16 e2m1 g16 sym",
    "NVFP4": "W4A4 e2m1 g16 sym dynamic",
    "MXFP4A16": "W4A16 e2m1 g32 sym",
    "MXFP4": "W4A4 e2m1 g32 sym dynamic",
    "MXFP8A16": "W8A16 e4m3 g32 sym",
    "MXFP8": "W8A8 e4m3 g32 sym dynamic",
}


def test_presets_are_schemes() -> None:
    assert {name.upper() for name in PRESET_SCHEMES} | {"UNQUANTIZED"} == set(PRESETS)
    for name, scheme in PRESET_SCHEMES.items():
        group = config_of({name: ["Linear"]}).find("x")
        assert group is not None
        assert group.weights is not None
        assert str(QuantScheme(group.weights, group.inputs)) == scheme
    assert bits_of(config_of({"UNQUANTIZED": ["Linear"]}), "x") is None


@pytest.mark.parametrize(("case", "preset"), [("w4a16_g128_sym_bf16", "W4A16"), ("w8a8_dynamic_fp16", "W8A8"), ("nvfp4_bf16", "NVFP4")])
def test_a_golden_reads_alike_by_its_preset(tmp_path: Path, case: str, preset: str) -> None:
    other = opened(changed(case, tmp_path / "preset", config=lambda said: said.update(config_groups={preset: ["Linear"]})))
    assert other.layer(DOWN).scheme == opened(ROOT / case).layer(DOWN).scheme


def weights_of(**args: Any) -> Config:
    return {"group_0": {"targets": ["Linear"], "weights": args}}


WRONG_CONFIGS: dict[str, tuple[Config, str]] = {
    "unknown key in arguments": ({"config_groups": weights_of(num_bit=4)}, "weights has the unknown key 'num_bit'"),
    "unknown key in a group": ({"config_groups": {"g": {"targets": [], "weight": {}}}}, "config_groups.g has the unknown key 'weight'"),
    "no targets": ({"config_groups": {"g": {"weights": {}}}}, "config_groups.g has no targets"),
    "targets of numbers": ({"config_groups": {"g": {"targets": [1]}}}, "config_groups.g.targets"),
    "groups in a list": ({"config_groups": []} | {"config_groups": [1]}, "config_groups is '[1]', wanted an object"),
    "no group at all": ({"config_groups": {"g": 4}}, "config_groups.g is '4'"),
    "unknown preset": ({"config_groups": {"W5A5": ["Linear"]}}, "'W5A5' is no preset"),
    "bits in words": ({"config_groups": weights_of(num_bits="4")}, "num_bits is '4'"),
    "bits that are true": ({"config_groups": weights_of(num_bits=True)}, "num_bits is 'True'"),
    "no bits": ({"config_groups": weights_of(num_bits=0)}, "num_bits is '0'"),
    "unknown type": ({"config_groups": weights_of(type="complex")}, "type is 'complex'"),
    "unknown strategy": ({"config_groups": weights_of(strategy="row")}, "strategy is 'row'"),
    "strategy in a list": ({"config_groups": weights_of(strategy=["group"])}, "strategy is"),
    "groups without size": ({"config_groups": weights_of(strategy="group")}, "the strategy 'group' and the group_size None"),
    "channels with size": (
        {"config_groups": weights_of(strategy="channel", group_size=32)},
        "'channel' and the group_size 32",
    ),
    "group size of zero": ({"config_groups": weights_of(group_size=0)}, "group_size is '0'"),
    "blocks without extent": ({"config_groups": weights_of(strategy="block")}, "the block_structure None"),
    "extent without blocks": ({"config_groups": weights_of(block_structure=[1, 2])}, "the block_structure [1, 2]"),
    "block of zero": ({"config_groups": weights_of(strategy="block", block_structure=[0, 2])}, "block_structure is '[0, 2]'"),
    "static tokens": ({"config_groups": weights_of(strategy="token")}, "one static scale per token"),
    "local groups": ({"config_groups": weights_of(group_size=16, dynamic="local")}, "dynamic 'local'"),
    "unknown dynamic": ({"config_groups": weights_of(dynamic="yes")}, "dynamic is 'yes'"),
    "unknown order": ({"config_groups": weights_of(actorder="random")}, "actorder is 'random'"),
    "order in a list": ({"config_groups": weights_of(actorder=[])}, "actorder is '[]'"),
    "order of channels": ({"config_groups": weights_of(strategy="channel", actorder="group")}, "actorder 'group', which needs groups"),
    "asymmetric floats": ({"config_groups": weights_of(type="float", symmetric=False)}, "floats that are not symmetric"),
    "symmetry in words": ({"config_groups": weights_of(symmetric="yes")}, "symmetric is 'yes'"),
    "mixed in a group": ({"config_groups": {"g": {"targets": [], "format": "mixed-precision"}}}, "'mixed-precision', which only the whole"),
    "ignore in words": ({"ignore": "lm_head"}, "ignore is 'lm_head', wanted a list"),
    "format by number": ({"format": 4}, "format is '4', wanted a text"),
    "a broken expression": ({"config_groups": {"g": {"targets": ["re:("]}}}, "pattern '(' is no regular expression"),
    "a broken expression to ignore": ({"ignore": ["re:["]}, "pattern '[' is no regular expression"),
    "a huge expression": ({"ignore": ["re:" + "a" * 20_000]}, "quantization_config has a pattern of 20000 characters"),
    "unknown key of the KV cache": ({"kv_cache_scheme": {"bits": 8}}, "kv_cache_scheme has the unknown key 'bits'"),
    "KV cache in words": ({"kv_cache_scheme": "fp8"}, "kv_cache_scheme is 'fp8'"),
    "sparsity in words": ({"sparsity_config": "2:4"}, "sparsity_config is '2:4'"),
}
REFUSED_CONFIGS: dict[str, tuple[Config, str]] = {
    "sparse bitmasks": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'"),
    "marlin-24": ({"format": "marlin-24"}, "'marlin-24'"),
    "marlin-24 in a group": ({"config_groups": {"g": {"targets": [], "format": "marlin-24"}}}, "'marlin-24'"),
    "rotations": ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "are rotated"),
    "six-bit floats": ({"config_groups": weights_of(num_bits=6, type="float")}, "float of 6 bits"),
    "sixteen bits": ({"config_groups": weights_of(num_bits=16)}, "int of 16 bits"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_wrong_config_is_unreadable(tmp_path: Path, case: str) -> None:
    changes, words = WRONG_CONFIGS[case]
    folder = changed("w4a16_g128_sym_bf16", tmp_path / "wrong", config=lambda said: said.update(changes))
    with pytest.raises(UnreadableError) as caught:
        open_checkpoint(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_what_is_not_read_is_refused(tmp_path: Path, case: str) -> None:
    changes, words = REFUSED_CONFIGS[case]
    folder = changed("w4a16_g128_sym_bf16", tmp_path / "refused", config=lambda said: said.update(changes))
    with pytest.raises(RefusedError, match=words):
        open_checkpoint(folder)


def test_what_changes_nothing_is_read(tmp_path: Path) -> None:
    empty = {"sparsity_config": {"format": "dense"}, "transform_config": {"config_groups": {}}, "run_compressed": True, "new": 1}
    folder = changed("w4a16_g128_sym_bf16", tmp_path / "read", config=lambda said: said.update(empty))
    assert len(opened(folder).layer_names) == 7


BOMBS = [r"re:(a|a)*$", r"re:(.*.*.*.*.*.*)*!", "re:" + "(" * 12 + "a*" + ")*" * 12 + "!", r"re:(?=(.*,)*x).*"]


@pytest.mark.parametrize("bomb", BOMBS)
def test_an_expression_cannot_hang_the_reader(bomb: str) -> None:
    """None of them matches; ``re`` would not live to say so."""
    name, started = "a" * 20_000 + "b", time.monotonic()
    assert bits_of(config_of({"a": group_of(4, bomb), "b": group_of(8, "Linear")}), name) == 8
    assert bits_of(config_of({"a": group_of(8, "Linear")}, ignore=[bomb]), name) == 8
    assert time.monotonic() - started < 30


def test_a_budget_that_is_used_up_is_an_error_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("formats.patterns.Budget.__init__.__defaults__", (10, "quantization_config"))
    config = config_of({"a": group_of(4, "re:x.*y")})
    with pytest.raises(UnreadableError, match="quantization_config's patterns take longer"):
        [config.find(f"x{number}") for number in range(10)]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_detection() -> None:
    for case in ("w4a16_g128_sym_bf16", "kv_fp8_head_fp16"):
        assert detect(Location.of(ROOT / case)) == (SPEC, "compressed")
    for case in ("compressed_tensors/src_llama_fp16", "awq_gptq/awq_gemm_g128_zp"):
        assert detect(Location.of(FIXTURES / case))[0] is not SPEC


def test_an_old_folders_compression_config_is_read_and_not_carried(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(ROOT / "w4a16_g128_sym_bf16", folder)
    document = json.loads((folder / "config.json").read_text())
    document["compression_config"] = document.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(document))
    checkpoint = opened(folder)
    assert len(checkpoint.layer_names) == 7
    assert checkpoint.quantization == document["compression_config"]
    assert checkpoint.config is not None
    assert "compression_config" not in checkpoint.config


@pytest.mark.parametrize(("status", "found"), [("compressed", []), ("frozen", ["status"]), (None, ["status"])])
def test_a_status_that_transformers_stumbles_over_is_a_finding(tmp_path: Path, status: str | None, found: list[str]) -> None:
    folder = changed("w8a8_dynamic_fp16", tmp_path / "status", config=lambda said: said.update(quantization_status=status))
    checkpoint = opened(folder)
    assert [finding.code for finding in checkpoint.findings] == found
    assert digest(checkpoint.layer(DOWN), "float16") == digests(ROOT / "w8a8_dynamic_fp16")[f"{DOWN}.weight"]["sha256_float32_le"]


def test_act_order_by_groups_is_a_finding() -> None:
    assert [finding.code for finding in opened(ROOT / "w4a16_gptq_g64_actgroup_sym_bf16").findings] == ["act-order"]
    assert opened(ROOT / "w4a16_gptq_g32_actweight_sym_fp16").findings == []


ORDERED = "w4a16_gptq_g64_actgroup_sym_bf16"


def test_a_g_idx_that_holds_minus_one_does_not_count(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{DOWN}.weight_g_idx"][3] = -1

    assert opened(ROOT / ORDERED).layer(DOWN).g_idx is not None
    layer = opened(changed(ORDERED, tmp_path / "spoiled", spoil)).layer(DOWN)
    assert layer.g_idx is None
    assert layer.scheme.weights.actorder == "static"


def test_a_regular_g_idx_says_nothing(tmp_path: Path) -> None:
    def straighten(tensors: Tensors) -> None:
        tensors[f"{DOWN}.weight_g_idx"] = np.arange(128, dtype=np.int32) // 64

    layer = opened(changed(ORDERED, tmp_path / "regular", straighten)).layer(DOWN)
    assert layer.g_idx is None
    assert layer.scheme.weights.actorder == "static"


@pytest.mark.parametrize("part", ["weight_zero_point", "input_zero_point"])
def test_zero_points_of_what_is_symmetric_must_be_zeros(tmp_path: Path, part: str) -> None:
    def add(tensors: Tensors) -> None:
        tensors[f"{DOWN}.{part}"] = np.zeros((256, 1) if part == "weight_zero_point" else (1,), dtype=np.int8)

    checkpoint = opened(changed("w8a8_static_sym_bf16", tmp_path / "zeros", add))
    assert [(item.tensor, item.condition) for item in checkpoint.left_out] == [(f"{DOWN}.{part}", "zero")]
    layer = checkpoint.layer(DOWN)
    assert layer.zero_points is layer.input_zero_point is None


def test_old_files_lack_zero_points_that_are_all_zero(tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> None:
        del tensors[f"{DOWN}.weight_zero_point"]

    old = opened(changed("w8a8_dynamic_wasym_fp16", tmp_path / "old", drop, lambda said: said.update(version="0.8.1")))
    assert old.layer(DOWN).zero_points is None
    assert old.layer(DOWN).scheme.weights.symmetric
    with pytest.raises(UnreadableError, match=r"down_proj\.weight_zero_point: is missing"):
        opened(changed("w8a8_dynamic_wasym_fp16", tmp_path / "new", drop)).layer(DOWN)


def test_scalars_count_as_one_value(tmp_path: Path) -> None:
    def squeeze(tensors: Tensors) -> None:
        for part in ("weight_scale", "input_scale"):
            tensors[f"{DOWN}.{part}"] = tensors[f"{DOWN}.{part}"].reshape(())

    layer = opened(changed("fp8_static_fp16", tmp_path / "scalars", squeeze)).layer(DOWN)
    assert layer.scales.shape == (1,)
    assert layer.input_scale is not None
    assert layer.input_scale.shape == (1,)
    assert digest(layer, "float16") == digests(ROOT / "fp8_static_fp16")[f"{DOWN}.weight"]["sha256_float32_le"]


def test_groups_wider_than_the_layer_are_one_per_channel(tmp_path: Path) -> None:
    tensors = {
        "x.weight": np.arange(-32, 32, dtype=np.int8).reshape(2, 32),
        "x.weight_scale": np.array([[0.5], [2]], dtype=np.float32),
    }
    folder = write(tmp_path / "narrow", tensors, said({"g": {"targets": ["Linear"], "weights": {"group_size": 128}}}))
    layer = opened(folder).layer("x")
    assert layer.scheme.weights == QuantArgs(8, "int", True, "channel")
    np.testing.assert_array_equal(dequantize(layer), tensors["x.weight"] * tensors["x.weight_scale"])


def test_exponents_of_mx_are_powers_of_two(tmp_path: Path) -> None:
    """All 256: the smallest is no normal number, and the largest is infinite to the tool too."""
    tensors = {
        "x.weight": np.full((256, 32), 0x38, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),  # 1.0
        "x.weight_scale": np.arange(256, dtype=np.uint8).reshape(256, 1),
    }
    layer = opened(write(tmp_path / "mx", tensors, said({"MXFP8A16": ["Linear"]}))).layer("x")
    assert layer.scales.dtype == ml_dtypes.bfloat16
    wanted = np.array([2.0 ** (exponent - 127) for exponent in range(255)] + [np.inf], dtype=np.float64)
    np.testing.assert_array_equal(dequantize(layer)[:, 0].astype(np.float64), wanted)


def test_experts_in_three_dimensions_are_named(tmp_path: Path) -> None:
    tensors = {
        "mlp.experts.weight_packed": np.zeros((2, 8, 4), dtype=np.int32),
        "mlp.experts.weight_scale": np.ones((2, 8, 1), dtype=np.float16),
        "norm.weight": np.ones(8, dtype=np.float16),
    }
    checkpoint = opened(write(tmp_path / "experts", tensors, said({"W4A16": ["Linear"]})))
    assert [part.name for part in checkpoint.unsupported] == ["mlp.experts"]
    assert checkpoint.entries == [("plain", "norm.weight")]


def test_output_scales_are_not_passed_over(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors[f"{ATTENTION}.k_proj.output_scale"] = tensors[f"{ATTENTION}.o_proj.output_scale"] = np.ones(1, dtype=np.float16)

    checkpoint = opened(changed("w8a8_dynamic_fp16", tmp_path / "outputs", add))
    assert checkpoint.attention == [f"{ATTENTION}.k_proj.output_scale"]
    assert checkpoint.functional == [f"{ATTENTION}.o_proj.output_scale"]


def put(part: str, array: Any) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{DOWN}.{part}": np.asarray(array)})


def gone(*parts: str) -> Callable[[Tensors], object]:
    def drop(tensors: Tensors) -> None:
        for part in parts:
            del tensors[f"{DOWN}.{part}"]

    return drop


def cut(part: str, index: Any) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{DOWN}.{part}": tensors[f"{DOWN}.{part}"][index]})


def as_type(part: str, dtype: Any) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{DOWN}.{part}": (tensors[f"{DOWN}.{part}"] % 100).astype(dtype)})


def args(**changes: Any) -> Callable[[Config], object]:
    return lambda said: said["config_groups"]["group_0"]["weights"].update(changes)


def inputs(**changes: Any) -> Callable[[Config], object]:
    return lambda said: said["config_groups"]["group_0"]["input_activations"].update(changes)


def whole(**changes: Any) -> Callable[[Config], object]:
    return lambda said: said.update(changes)


def group(**changes: Any) -> Callable[[Config], object]:
    return lambda said: said["config_groups"]["group_0"].update(changes)


PACKED, ASYM, STATIC, NV = "w4a16_g32_asym_fp16", "w4a16_g32_asym_fp16", "w8a8_static_asym_fp16", "nvfp4_bf16"
CONTRADICTIONS: dict[str, tuple[str, ChangeTensors, ChangeConfig, str]] = {
    # down_proj of the Llama is [128, 192]
    "packed words cut": (PACKED, cut("weight_packed", np.s_[:, :-1]), None, "weight_packed is [128, 23], and weight_shape says [128, 192]"),
    "packed rows cut": (PACKED, cut("weight_packed", np.s_[:-1]), None, "weight_packed is [127, 24]"),
    "another shape": (PACKED, put("weight_shape", [128, 200]), None, "weight_shape says [128, 200], which takes [128, 25] words"),
    "a negative shape": (PACKED, put("weight_shape", [128, -192]), None, "weight_shape says [128, -192]"),
    "a shape of floats": (PACKED, put("weight_shape", np.array([128.0, 192.0])), None, "weight_shape is F64 [2]"),
    "a shape of three": (PACKED, put("weight_shape", [1, 128, 192]), None, "weight_shape is I64 [3]"),
    "no shape": (PACKED, gone("weight_shape"), None, "weight_shape is missing"),
    "other bits": (PACKED, None, args(num_bits=8), "weight_packed is [128, 24], and weight_shape says [128, 192]"),
    "other groups": (PACKED, None, args(group_size=64), "weight_scale is [128, 6], wanted [128, 3]"),
    "groups that do not divide": (PACKED, None, args(group_size=80), "192 inputs in groups of 80"),
    "scales cut": (PACKED, cut("weight_scale", np.s_[:-1]), None, "weight_scale is [127, 6], wanted [128, 6]"),
    "scales of integers": (PACKED, as_type("weight_scale", np.int32), None, "weight_scale I32, which no format"),
    "zero points cut": (ASYM, cut("weight_zero_point", np.s_[:-1]), None, "weight_zero_point is I32 [15, 6], wanted int8"),
    "zero points of floats": (ASYM, as_type("weight_zero_point", np.float16), None, "weight_zero_point is F16"),
    "zero points gone": (ASYM, gone("weight_zero_point"), None, "weight_zero_point: is missing"),
    "packed zero points of the symmetric": (ASYM, None, args(symmetric=True), "has packed zero points, and the config says"),
    "words of bytes": (PACKED, as_type("weight_packed", np.int8), None, "weight_packed is I8"),
    "weight beside its words": (PACKED, put("weight", np.zeros((128, 192), np.int8)), None, "has weight and weight_packed"),
    "words gone": (PACKED, gone("weight_packed"), None, "no codes that it belongs to"),
    "scale gone": (PACKED, gone("weight_scale"), None, "has no weight_scale"),
    "outer scale of integers": (PACKED, put("weight_global_scale", np.ones(1, np.float32)), None, "has weight_global_scale, which"),
    "an order that is not said": (
        PACKED, put("weight_g_idx", np.arange(192, dtype=np.int32)[::-1] // 32), None, "does not say actorder 'group'",
    ),
    "an order that is not there": (PACKED, None, args(actorder="group"), "weight_g_idx: is missing"),
    "ignored": (PACKED, None, whole(ignore=["re:.*down_proj"]), "is stored quantized, and ignore says"),
    "nobody's": (PACKED, None, group(targets=["re:.*self_attn"]), "is stored quantized, and no group"),
    "a group without weights": (PACKED, None, group(weights=None), "is stored quantized, and no group"),
    "said to be whole bytes": (PACKED, None, group(format="int-quantized"), "so it is pack-quantized; the config says int-quantized"),
    "said to be floats": (PACKED, None, args(type="float", symmetric=True), "4 bits of e2m1"),
    "weights of the frozen": ("w8a8_dynamic_fp16", as_type("weight", np.float16), None, "save the model compressed"),
    "a bare int8 weight": ("w8a8_dynamic_fp16", gone("weight_scale"), None, "weight is I8, but has no weight_scale"),
    "unpacked zero points cut": ("w8a8_dynamic_wasym_fp16", cut("weight_zero_point", np.s_[1:]), None, "weight_zero_point is I8 [127, 1]"),
    "one scale for the tensor": ("w8a8_dynamic_fp16", None, args(strategy="tensor"), "weight_scale is [128, 1], wanted [1]"),
    "one scale per token": ("w8a8_dynamic_fp16", None, args(strategy="token", dynamic=True), "one scale per token"),
    "no input scale": (STATIC, gone("input_scale"), None, "input_scale is missing, and the config says that inputs are static"),
    "no input zero point": (STATIC, gone("input_zero_point"), None, "input_zero_point: is missing"),
    "many input scales": (STATIC, put("input_scale", np.ones(192, np.float16)), None, "input_scale is F16 [192]"),
    "an input zero point too wide": (STATIC, put("input_zero_point", np.array([9], np.int8)), inputs(num_bits=4), "wanted -8 to 7"),
    "input zero points of words": (STATIC, as_type("input_zero_point", np.int32), None, "input_zero_point is I32"),
    "inputs that are dynamic": (STATIC, None, inputs(dynamic=True), "input_scale is there, and the config says that inputs are dynamic"),
    "inputs that are float": (STATIC, None, group(input_activations=None), "input_scale is there"),
    "no outer scale": (NV, gone("weight_global_scale"), None, "weight_global_scale is missing"),
    "no outer scale of inputs": (NV, gone("input_global_scale"), None, "input_global_scale is missing"),
    "outer scales per row": (NV, put("weight_global_scale", np.ones(128, np.float32)), None, "weight_global_scale is F32 [128]"),
    "MX per channel": ("mxfp8_bf16", None, args(strategy="channel", group_size=None), "weight_scale is [128, 6], wanted [128, 1]"),
    "blocks of another size": ("fp8_block_bf16", None, args(block_structure=[64, 64]), "for one scale per block"),
    "a bias of integers": (PACKED, put("bias", np.zeros(128, np.int32)), None, "bias is I32"),
    "a bias too short": (PACKED, put("bias", np.zeros(127, np.float16)), None, "bias has shape (127,)"),
    "groups out of range": (ORDERED, put("weight_g_idx", np.r_[np.full(127, 1), 2].astype(np.int32)), None, "does not give every group"),
    "groups of unequal size": (ORDERED, put("weight_g_idx", np.r_[np.zeros(63), np.ones(65)].astype(np.int32)), None, "exactly 64 inputs"),
    "an order too short": (ORDERED, put("weight_g_idx", np.zeros(64, np.int32)), None, "weight_g_idx is I32 [64]"),
}  # fmt: skip


def read_all(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.layer_names:
        dequantize(checkpoint.layer(name))


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_unreadable(tmp_path: Path, case: str) -> None:
    golden, tensors, config, words = CONTRADICTIONS[case]
    folder = changed(golden, tmp_path / "same")
    read_all(folder)
    with pytest.raises(UnreadableError) as caught:
        read_all(changed(golden, tmp_path / "wrong", tensors, config))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "proj" in str(caught.value)


def test_zero_points_outside_their_bits_are_unreadable(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["pack4_asym_n36_k96.weight_zero_point"][1, 1] = 8

    folder = edge_folder(tmp_path / "edges", "0.9.3")
    tensors = stored(folder)
    spoil(tensors)
    layer = opened(write(folder, tensors, json.loads((folder / "config.json").read_text()))).layer("pack4_asym_n36_k96")
    with pytest.raises(UnreadableError, match=r"weight_zero_point: holds the zero point 8\.0, wanted integers from -8 to 7"):
        dequantize(layer)


def test_a_file_cut_short_is_unreadable(tmp_path: Path) -> None:
    folder = changed(PACKED, tmp_path / "cut")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnreadableError, match="it is truncated"):
        open_checkpoint(folder)


@pytest.mark.parametrize("seed", range(40))
def test_any_config_is_read_or_an_error_of_ours(tmp_path: Path, seed: int) -> None:
    """One value anywhere in the config exchanged for a value of another kind."""
    random = np.random.default_rng(seed)
    document = json.loads((ROOT / "mixed_fp16" / "config.json").read_text())
    places = list(values_in(document["quantization_config"]))
    outcomes = set()
    for _ in range(10):
        changed_document = copy.deepcopy(document)
        where = places[int(random.integers(len(places)))]
        inner = changed_document["quantization_config"]
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = [None, True, -1, 7, 1e9, "x", "group", [], [[]], {}, {"x": []}][int(random.integers(11))]
        folder = write(tmp_path / "any", stored(ROOT / "mixed_fp16"), changed_document)
        try:
            read_all(folder)
            outcomes.add("read")
        except WeighbridgeError as error:
            outcomes.add(type(error).__name__)
    assert outcomes <= {"read", "UnreadableError", "RefusedError"}


def values_in(document: Any, where: tuple[Any, ...] = ()) -> Iterable[tuple[Any, ...]]:
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in items:
        if (*where, key) != ("quant_method",):
            yield (*where, key)
        yield from values_in(value, (*where, key))


def test_scales_have_the_shapes_that_the_law_takes() -> None:
    """``as_grid`` broadcasts every golden's scales to its groups."""
    for case in SCHEMES:
        layer = opened(ROOT / case).layer(DOWN) if case != "fp8_block_bf16" else opened(ROOT / case).layer(f"{ATTENTION}.q_proj")
        assert as_grid(DOWN, "scales", layer.scales, layer.groups).shape == layer.groups


def test_nothing_is_read_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a folder reads headers and the config."""
    monkeypatch.setattr(TensorSet, "array", lambda self, name: pytest.fail(f"{name} was read"))
    assert len(opened(ROOT / ORDERED).layer_names) == 7
