"""msModelSlim layers with quantized inputs: W8A8 in its dialects, W4A8, and C8 caches, as the real tool wrote them.

The expected side never uses the project: ``decoded`` reads a golden with the safetensors package and plain NumPy, and the float
models of which the goldens were made say that what it reads is what was meant.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import BFLOAT16, DTYPES, FIXTURES, MSMODELSLIM, Array, Tensors, change_json, change_tensors, pack_nibbles, read_folder
from safetensors.numpy import load_file

from convert import convert, plan, verify
from convert.verification import fingerprint
from formats import derived, msmodelslim, open_checkpoint
from formats.errors import RefusedError, UnreadableError
from formats.ir import QuantizedLinear, dequantize, read

W8 = FIXTURES / "msmodelslim_w8"
LOST = "w8a8_numpy_fp16"
NUMPY = "w8a8_numpy_nobias_fp16"
CASES = sorted(path.name for path in W8.iterdir() if path.name not in {LOST, NUMPY})
STATIC = [case for case in CASES if "w8a8" in case and "dynamic" not in case]
V0 = [case for case in CASES if not case.startswith("v1_")]
PARTS = ("weight_scale", "weight_offset", "weight_scale_second", "weight_offset_second", "input_scale", "input_offset", "deq_scale")
assert ml_dtypes.bfloat16  # teaches the safetensors package bfloat16


# --- an independent reading -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoded:
    """A layer by the words of the tool: its type, float32 weights and steps [out, in], and what quantizes its inputs."""

    type: str
    weights: Array
    steps: Array
    input_scale: Array | None
    input_offset: Array | None


def described(folder: Path) -> dict[str, Any]:
    """The description: the JSON, of whatever name, that speaks of tensors."""
    found = [json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")]
    (content,) = [content for content in found if "model.norm.weight" in content]
    return content  # type: ignore[no-any-return]


def stored(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def decoded(folder: Path) -> dict[str, Decoded]:
    """Every quantized layer of a folder."""
    tensors, description = stored(folder), described(folder)
    layers = {}
    for key, type_ in description.items():
        name = key.removesuffix(".weight")
        if not key.endswith(".weight") or type_ == "FLOAT" or tensors[key].ndim == 1:
            continue
        part = {part: tensors[f"{name}.{part}"].astype(np.float32) for part in PARTS if f"{name}.{part}" in tensors and part != "deq_scale"}
        codes = tensors[key]
        if type_ == "W4A8_DYNAMIC" and "version" in description:
            codes = np.stack([(codes << 4) >> 4, codes >> 4], axis=1).reshape(-1, codes.shape[1])
        scale: Array
        if "weight_scale" in part:
            scale = part["weight_scale"].reshape(-1, 1)
        else:
            product = tensors[f"{name}.deq_scale"]
            if product.dtype == np.int64:
                product = np.array([int(value) & 0xFFFFFFFF for value in product], np.uint32).view(np.float32)
            scale = (product / part["input_scale"]).reshape(-1, 1)
        zero: Array = part.get("weight_offset", np.zeros(1, np.float32)).reshape(-1, 1)
        if "weight_scale_second" in part:
            size = codes.shape[1] // part["weight_scale_second"].shape[1]
            assert not zero.any()
            scale = (scale * part["weight_scale_second"]).repeat(size, axis=1)
            zero = part["weight_offset_second"].repeat(size, axis=1)
        steps = np.broadcast_to(scale, codes.shape)
        weights = (codes.astype(np.float32) - zero) * steps
        inputs = (tensors.get(f"{name}.input_scale"), tensors.get(f"{name}.input_offset"))
        layers[name] = Decoded(type_, weights, steps, *inputs)
    return layers


KINDS = {"W8A16": None, "W8A8": "static", "W8A8S": "static", "W8A8_MIX": "both", "W8A8_DYNAMIC": "dynamic", "W4A8_DYNAMIC": "dynamic"}


def kind_of(layer: QuantizedLinear) -> str | None:
    inputs = layer.scheme.inputs
    if inputs is None:
        return None
    assert (inputs.bits, inputs.element) == (8, "int")
    return "static" if not inputs.dynamic else "both" if layer.input_scale is not None else "dynamic"


def test_every_golden_is_read_here() -> None:
    assert len(CASES) == 18
    assert len(STATIC) == 13


@pytest.mark.parametrize("case", CASES)
def test_a_golden_reads_to_the_laws_weights_and_inputs(case: str) -> None:
    wanted, checkpoint = decoded(W8 / case), open_checkpoint(W8 / case)
    assert sorted(checkpoint.layer_names) == sorted(wanted)
    assert len(wanted) == 7 * (2 if "sharded" in case else 1) - ("mix_cfg" in case)
    assert checkpoint.unsupported == []
    for name, expected in wanted.items():
        layer = checkpoint.layer(name)
        np.testing.assert_array_equal(dequantize(layer), expected.weights, name, strict=True)
        assert kind_of(layer) == KINDS[expected.type], name
        assert layer.scheme.weights.bits == (4 if expected.type.startswith("W4") else 8)
        assert (layer.input_scale is None) == (expected.input_scale is None)
        if expected.input_scale is not None and expected.input_offset is not None:
            assert layer.input_scale is not None
            assert layer.input_zero_point is not None
            assert layer.input_scale.tobytes() == expected.input_scale.tobytes()
            assert layer.input_zero_point.tolist() == expected.input_offset.tolist()


SOURCES = {case: json.loads((W8 / case / "golden_case.json").read_text("utf-8"))["src"] for case in V0}
ROUNDED = [case for case in CASES if "anti" not in case and "w8a8s" not in case and case != "v1_w4a8_dynamic"]
"""Those of plain rounding: AntiOutlier moves weights first, W8A8S clips them, and so does V1 in 4 bits."""
STEPS_OFF = {"fp16": 0.5 + 2**-5, "bf16": 0.75, "dynamic": 0.75, "static": 0.75 + 127 * 2**-8}
"""The tool divides in the model's dtype: a quotient in 64..128 is off by 2**-5 in float16, by a quarter in bfloat16. V1's static scale
comes from a product rounded to bfloat16, twice."""


@pytest.mark.parametrize("case", ROUNDED)
def test_a_golden_is_its_float_source_within_its_rounding(case: str) -> None:
    source = read_folder(FIXTURES / "compressed_tensors" / SOURCES[case] if case in SOURCES else MSMODELSLIM / "src1l_bf16_tok")
    worst, dtype = 0.0, np.float16 if case.endswith("fp16") else BFLOAT16
    for name, layer in decoded(W8 / case).items():
        floats = source[f"{name}.weight"].astype(dtype).astype(np.float32)
        worst = max(worst, float((np.abs(layer.weights - floats) / layer.steps).max()))
    bound = STEPS_OFF[case.rpartition("_")[2]]
    assert 0.49 < worst <= bound, worst


@pytest.mark.parametrize("case", STATIC)
def test_layers_that_read_one_input_quantize_it_alike(case: str) -> None:
    """q, k and v have one input scale and offset, so have gate and up: engines that fuse them lose nothing."""
    checkpoint, seen = open_checkpoint(W8 / case), 0
    for name in checkpoint.layer_names:
        parent, _, leaf = name.rpartition(".")
        first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(leaf)
        layer = checkpoint.layer(name)
        if first is not None and layer.input_scale is not None:
            other = checkpoint.layer(f"{parent}.{first}")
            seen += 1
            assert other.input_scale is not None
            assert other.input_zero_point is not None
            assert layer.input_zero_point is not None
            assert (layer.input_scale.tobytes(), layer.input_zero_point[0]) == (other.input_scale.tobytes(), other.input_zero_point[0])
    assert seen


# --- twins ------------------------------------------------------------------------------------------------------------


def raw(folder: Path) -> dict[str, tuple[Any, tuple[int, ...], bytes]]:
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in stored(folder).items()}


def typed(folder: Path) -> dict[str, Any]:
    return {name: label for name, label in described(folder).items() if "." in name}


AS_IT_IS = [case for case in V0 if not any(word in case for word in ("anti", "tensor", "mix_cfg"))]
SPARSE = [case for case in V0 if "w8a8s" in case]


def again(case: str, out: Path, variant: str = "") -> dict[str, Any]:
    """Convert a golden into its own variant, or one that is named; returns the description."""
    own = open_checkpoint(W8 / case).variant
    result = convert(W8 / case, out, f"msmodelslim:{variant or {'v1': 'ascendv1', 'numpy': 'safe_tensor'}.get(own, own)}")
    assert result.exact
    assert result.plan.losses == []
    assert verify(W8 / case, out).same
    return described(out)


@pytest.mark.parametrize("case", AS_IT_IS)
def test_a_golden_is_written_again_as_it_is(case: str, tmp_path: Path) -> None:
    """Every tensor in its dtype, byte for byte, and the description key for key; shards and chosen names are not the format's."""
    assert again(case, tmp_path / "out") == described(W8 / case)
    assert raw(tmp_path / "out") == raw(W8 / case)


def test_a_mixed_golden_is_written_again_under_its_own_name(tmp_path: Path) -> None:
    """The tool names the type of the main config, which the tensors do not tell: W8A8, though most layers are W8A8_DYNAMIC."""
    case = "w8a8_mix_cfg_ascendv1_bf16"
    assert again(case, tmp_path / "out") == described(W8 / case)
    assert described(W8 / case)["model_quant_type"] == "W8A8"
    assert raw(tmp_path / "out") == raw(W8 / case)


def test_one_scale_of_a_tensor_stays_one(tmp_path: Path) -> None:
    case = "w8a8_static_tensor_fp16"
    assert again(case, tmp_path / "out") == described(W8 / case)
    assert raw(tmp_path / "out") == raw(W8 / case)


def test_for_vllm_ascend_it_is_spelled_for_every_output(tmp_path: Path) -> None:
    case = "w8a8_static_tensor_fp16"
    convert(W8 / case, tmp_path / "out", "msmodelslim", consumer="vllm-ascend", serve_dtype="float16")
    ours, theirs = stored(tmp_path / "out"), stored(W8 / case)
    assert ours.keys() == theirs.keys()
    spelled = [name for name in ours if name.endswith((".deq_scale", ".weight_scale", ".weight_offset"))]
    assert len(spelled) == 7 * 3
    for name in ours:
        if name in spelled:
            assert theirs[name].shape == (1,)
            out = len(ours[f"{name.rpartition('.')[0]}.weight"])
            wanted = np.repeat(theirs[name], out) if name.endswith("deq_scale") else np.repeat(theirs[name][None], out, axis=0)
            np.testing.assert_array_equal(ours[name], wanted, name, strict=True)
        else:
            np.testing.assert_array_equal(ours[name], theirs[name], name, strict=True)


def test_norms_that_anti_outlier_wrapped_stay_behind(tmp_path: Path) -> None:
    case = "w8a8_static_anti_m4_bf16"
    found, wanted = again(case, tmp_path / "out"), described(W8 / case)
    norms = {name for name in raw(W8 / case) if "norm" in name and not name.endswith("norm.weight")}
    assert len(norms) == 3 + 6
    assert raw(tmp_path / "out") == {name: tensor for name, tensor in raw(W8 / case).items() if name not in norms}
    assert found == {name: label for name, label in wanted.items() if name not in norms}


@pytest.mark.parametrize("shapes", [((), ()), ((), (1,))], ids=["lowbit", "hqq"])
def test_one_scale_without_dimensions_stays_so(shapes: tuple[tuple[int, ...], ...], tmp_path: Path) -> None:
    """As the tool stores them: is_lowbit both, HQQ the scale only."""
    case = "w8a8_static_tensor_fp16"
    bare = tmp_path / "bare"
    shutil.copytree(W8 / case, bare)
    (path,) = bare.glob("*.safetensors")

    def strip(tensors: Tensors) -> None:
        for part, shape in zip((".weight_scale", ".weight_offset"), shapes, strict=True):
            tensors.update({name: array.reshape(shape) for name, array in tensors.items() if name.endswith(part)})

    change_tensors(path, strip)
    result = convert(bare, tmp_path / "out", "msmodelslim:safe_tensor")
    assert result.exact
    assert raw(tmp_path / "out") == raw(bare)
    assert raw(bare)["model.layers.0.mlp.up_proj.weight_scale"][1] == ()
    for other in ("compressed-tensors", "msmodelslim:vllm-ascend"):
        convert(bare, tmp_path / "from bare", other, overwrite=True)
        assert verify(W8 / case, tmp_path / "from bare").same


@pytest.mark.parametrize("case", SPARSE)
def test_w8a8s_stays_w8a8s_for_either_dtype_of_the_npu(case: str, tmp_path: Path) -> None:
    """deq_scale is all that says a scale, so nothing is rounded; it becomes the int64 that an NPU in float16 reads."""
    for dtype, stored_as in (("float16", np.int64), ("bfloat16", np.float32)):
        result = convert(W8 / case, tmp_path / dtype, "msmodelslim", serve_dtype=dtype)
        assert result.exact
        ours, theirs = stored(tmp_path / dtype), stored(W8 / case)
        assert typed(tmp_path / dtype) == typed(W8 / case)
        for name, array in ours.items():
            if name.endswith("deq_scale"):
                assert array.dtype == stored_as
                np.testing.assert_array_equal(derived.decode_deq_scale(array), derived.decode_deq_scale(theirs[name]), name)
            elif not name.endswith((".bias", "lm_head.weight")):
                np.testing.assert_array_equal(array, theirs[name], name, strict=True)


@pytest.mark.parametrize("case", SPARSE)
def test_w8a8s_without_quant_bias_gets_one_and_keeps_its_scales(case: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(W8 / case, bare)
    change_tensors(
        next(bare.glob("*.safetensors")), lambda tensors: [tensors.pop(name) for name in [*tensors] if name.endswith("quant_bias")]
    )
    change_json(next(bare.glob("quant_model*.json")), lambda said: [said.pop(name) for name in [*said] if name.endswith("quant_bias")])
    assert convert(bare, tmp_path / "out", "msmodelslim").exact
    ours, theirs = stored(tmp_path / "out"), stored(W8 / case)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        if name.endswith("quant_bias"):  # the tool rounds bias / deq_scale in the model's dtype
            np.testing.assert_allclose(ours[name], array, rtol=2**-7, atol=1)
        else:
            np.testing.assert_array_equal(ours[name], array, name, strict=True)


@pytest.mark.parametrize("case", SPARSE)
def test_w8a8s_is_w8a8_to_who_has_no_word_for_it(case: str, tmp_path: Path) -> None:
    """vllm-ascend has no W8A8S: its loader gets a weight_scale, which its static scheme does not use."""
    convert(W8 / case, tmp_path / "ascend", "msmodelslim", consumer="vllm-ascend")
    ours, theirs = stored(tmp_path / "ascend"), stored(W8 / case)
    layers = decoded(W8 / case)
    added = {f"{name}.{part}" for name in layers for part in ("weight_scale", "weight_offset")}
    assert ours.keys() == theirs.keys() | added
    for name, layer in layers.items():
        np.testing.assert_array_equal(ours[f"{name}.weight"], theirs[f"{name}.weight"], name, strict=True)
        scale = layer.steps[:, :1].astype(ours[f"{name}.weight_scale"].dtype)
        np.testing.assert_array_equal(ours[f"{name}.weight_scale"], scale, name, strict=True)
        assert not ours[f"{name}.weight_offset"].any()
    labels = {name: label.replace("W8A8S", "W8A8") for name, label in typed(W8 / case).items()}
    assert typed(tmp_path / "ascend") == labels | dict.fromkeys(added, "W8A8")


@pytest.mark.parametrize("case", SPARSE)
def test_w8a8s_is_an_exact_w8a8_elsewhere(case: str, tmp_path: Path) -> None:
    result = convert(W8 / case, tmp_path / "out", "compressed-tensors")
    assert result.exact
    checkpoint = open_checkpoint(tmp_path / "out")
    for name, expected in decoded(W8 / case).items():
        layer = checkpoint.layer(name)
        np.testing.assert_array_equal(dequantize(layer), expected.weights, name, strict=True)
        assert (kind_of(layer), layer.scheme.weights.sparse) == ("static", False)


@pytest.mark.parametrize("case", ["v1_w4a8_dynamic", "v1_w8a8_dynamic", "v1_w8a8_static"])
def test_generation_v1_is_written_as_v0(case: str, tmp_path: Path) -> None:
    """The tensors stay; a static layer gets its scale. The description's words for the tool itself are not carried."""
    found, wanted = again(case, tmp_path / "out"), described(W8 / case)
    ours, theirs = raw(tmp_path / "out"), raw(W8 / case)
    layers = decoded(W8 / case) if case == "v1_w8a8_static" else {}
    added = {f"{name}.{part}" for name in layers for part in ("weight_scale", "weight_offset")}
    assert {name: tensor for name, tensor in ours.items() if name not in added} == theirs
    assert ours.keys() - theirs.keys() == added
    assert typed(tmp_path / "out") == typed(W8 / case) | dict.fromkeys(added, "W8A8")
    assert found["model_quant_type"] == case[3:].upper().removesuffix("_STATIC")
    assert set(found) - set(wanted) == added
    assert set(wanted) - set(found) == {"optional", "metadata", "group_size"}


def test_packed_and_unpacked_w8a8_are_the_same_tensors(tmp_path: Path) -> None:
    """The tool wrote one model in safe_tensor (with a C8 cache), in ascendV1, as numpy: only 4-bit codes would be packed."""
    ascend = raw(W8 / "w8a8_static_ascendv1_fp16")
    again(NUMPY, tmp_path / "numpy")
    assert raw(tmp_path / "numpy") == ascend
    wanted = described(W8 / "w8a8_static_ascendv1_fp16")
    assert wanted.pop("version") == "1.0.0"
    assert described(tmp_path / "numpy") == wanted
    again("w8a8_static_ascendv1_fp16", tmp_path / "safe", "safe_tensor")
    assert raw(tmp_path / "safe") == ascend
    without_cache = {name: tensor for name, tensor in raw(W8 / "w8a8_c8_asym_fp16").items() if "kv_cache" not in name}
    assert without_cache == ascend


def test_both_kinds_in_one_are_static_where_the_variant_has_no_word_for_both(tmp_path: Path) -> None:
    """The tool's own files of W8A8_MIX and W8A8 are the same bytes; the labels differ."""
    case = "w8a8_pdmix_ascendv1_bf16"
    assert raw(W8 / case) == raw(W8 / "w8a8_static_bf16")
    result = convert(W8 / case, tmp_path / "out", "msmodelslim:safe_tensor")
    assert result.exact
    assert raw(tmp_path / "out") == raw(W8 / case)
    assert described(tmp_path / "out") == described(W8 / "w8a8_static_bf16")


def test_w4a8_is_unpacked_and_packed_again(tmp_path: Path) -> None:
    packed, plain = "w4a8_dynamic_ascendv1_g128_bf16", "w4a8_dynamic_g32_bf16"
    again(packed, tmp_path / "plain", "safe_tensor")
    ours, theirs = stored(tmp_path / "plain"), stored(W8 / packed)
    for name in decoded(W8 / packed):
        np.testing.assert_array_equal(pack_nibbles(ours[f"{name}.weight"], along_out=True), theirs[f"{name}.weight"], name, strict=True)
    assert not [name for name in ours if name.endswith("scale_bias")]
    again(plain, tmp_path / "packed", "ascendv1")
    ours, theirs = stored(tmp_path / "packed"), stored(W8 / plain)
    for name, layer in decoded(W8 / plain).items():
        np.testing.assert_array_equal(ours[f"{name}.weight"], pack_nibbles(theirs[f"{name}.weight"], along_out=True), name, strict=True)
        parts = 16 if name.endswith(("o_proj", "down_proj")) else 1
        sums = 8 * layer.weights.astype(np.float64).reshape(len(layer.weights), parts, -1).sum(axis=2)
        np.testing.assert_array_equal(ours[f"{name}.scale_bias"], sums.astype(np.float32), name, strict=True)
    verdict = convert(tmp_path / "packed", tmp_path / "again", "msmodelslim:safe_tensor")
    assert verdict.exact
    assert raw(tmp_path / "again") == raw(W8 / plain)


def test_shards_are_written_when_asked_for(tmp_path: Path) -> None:
    case = "w8a8_sharded_named_bf16"
    convert(W8 / case, tmp_path / "out", "msmodelslim", max_shard_size=100_000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"quant_model_weight_w8a8-00001-of-{len(shards):05}.safetensors"
    assert raw(tmp_path / "out") == raw(W8 / case)
    assert verify(W8 / case, tmp_path / "out").same


def test_a_missing_shard_is_said_by_name(tmp_path: Path) -> None:
    source = shutil.copytree(W8 / "w8a8_sharded_named_bf16", tmp_path / "source")
    (source / "mine-00002-of-00003.safetensors").unlink()
    with pytest.raises(UnreadableError, match="mine-00002-of-00003"):
        open_checkpoint(source)


def test_weights_that_the_numpy_files_lost_are_refused_by_name() -> None:
    with pytest.raises(UnreadableError, match=r"^model\.layers\.0\.self_attn\.q_proj: its bias lies .* and of 2 more layers"):
        open_checkpoint(W8 / LOST)


# --- what follows from the law ----------------------------------------------------------------------------------------


def static_layers(case: str) -> list[QuantizedLinear]:
    checkpoint = open_checkpoint(W8 / case)
    found = [checkpoint.layer(name) for name in checkpoint.layer_names]
    return [layer for layer in found if layer.input_scale is not None]


def exact_product(name: str, tensors: Tensors, out: int) -> Array:
    """[out] float64: input_scale * weight_scale, without rounding."""
    scale = tensors[f"{name}.weight_scale"].astype(np.float64).reshape(-1)
    return np.broadcast_to(scale * tensors[f"{name}.input_scale"].astype(np.float64)[0], (out,))


@pytest.mark.parametrize("case", [case for case in STATIC if "w8a8s" not in case and not case.startswith("v1")])
def test_deq_scale_and_quant_bias_are_what_the_formulas_say(case: str) -> None:
    """In float64, of the stored scales, codes and bias: what is computed has the same float32, the same integers."""
    tensors = stored(W8 / case)
    for layer in static_layers(case):
        name, bare = layer.name, replace(layer, extras={})
        product = exact_product(name, tensors, layer.shape[0]).astype(np.float32)
        np.testing.assert_array_equal(derived.deq_scale(bare), product, name, strict=True)
        offset = int(tensors[f"{name}.input_offset"].astype(np.float64)[0])
        sums = tensors[f"{name}.weight"].astype(np.int64).sum(axis=1)
        bias = tensors[f"{name}.bias"].astype(np.float64) if f"{name}.bias" in tensors else np.zeros(layer.shape[0])
        wanted = np.rint(bias / product.astype(np.float64) - sums * offset)
        np.testing.assert_array_equal(derived.quant_bias(bare), wanted.astype(np.int32), name, strict=True)


TOOLS_ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-10, "v1": 2e-7}
"""Of the product of scales, relatively: half a step of the model's dtype. V1's, and W8A8S's, scale is that product divided again."""


@pytest.mark.parametrize("case", STATIC)
def test_what_is_computed_is_the_tools_within_its_rounding(case: str) -> None:
    bound = TOOLS_ROUNDING["v1" if case.startswith("v1") or "w8a8s" in case else case.rpartition("_")[2]]
    offsets, units = set(), 0
    for layer in static_layers(case):
        theirs, quant_bias = derived.deq_scale(layer), read(layer.extras["quant_bias"].value).astype(np.int64)
        ours = derived.deq_scale(replace(layer, extras={}))
        assert (np.abs(ours - theirs) <= bound * theirs).all(), layer.name
        with_theirs = derived.quant_bias(replace(layer, extras={"deq_scale": layer.extras["deq_scale"]})).astype(np.int64)
        units = max(units, int(np.abs(with_theirs - quant_bias).max()))
        bias = np.zeros(1) if layer.bias is None else read(layer.bias).astype(np.float64)
        with_ours = derived.quant_bias(replace(layer, extras={})).astype(np.int64)
        slack = 1 + (8 if case.startswith("v1") else 0) + np.abs(bias / theirs) * bound
        assert (np.abs(with_ours - quant_bias) <= slack).all(), layer.name
        assert layer.input_zero_point is not None
        offsets.add(int(layer.input_zero_point[0]))
    # V1 rounds the quotient of bias and deq_scale to bfloat16, whose steps are 8 and more from 1024 on.
    assert 0 < units <= 8 if case.startswith("v1") else units == 0
    assert offsets - {0}, "without an offset the sums of codes are not tested"


def test_a_subnormal_product_of_float16_is_within_its_steps() -> None:
    """The tool's deq_scale of float16 models below 2**-14 has steps of 2**-24; ours has float32's."""
    found = []
    for case in STATIC:
        if case.endswith("fp16") and "w8a8s" not in case:
            for layer in static_layers(case):
                theirs, ours = derived.deq_scale(layer), derived.deq_scale(replace(layer, extras={}))
                small = theirs < 2.0**-14
                assert (np.abs(ours - theirs)[small] <= 2.0**-25).all()
                found += (np.abs(ours - theirs)[small] / theirs[small]).tolist()
    assert found
    assert max(found) <= 0.0083


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("v1_w4a8", "w4a8_dynamic_ascend"))])
def test_scale_bias_is_the_tools(case: str) -> None:
    """8 times the sums of weights; V0 of bfloat16 sums weights that it rounded to it."""
    checkpoint = open_checkpoint(W8 / case)
    for name, expected in decoded(W8 / case).items():
        layer = checkpoint.layer(name)
        theirs = read(layer.extras["scale_bias"].value).astype(np.float64)
        parts = theirs.shape[1]
        assert parts == (16 if name.endswith(("o_proj", "down_proj")) else 1)
        groups = expected.weights.astype(np.float64).reshape(len(theirs), parts, -1)
        ours = derived.scale_bias(replace(layer, extras={}), parts)
        np.testing.assert_array_equal(ours, (8 * groups.sum(axis=2)).astype(np.float32), name, strict=True)
        assert (np.abs(ours - theirs) <= 8 * np.abs(groups).sum(axis=2) * (2.0**-8 if "bf16" in case else 2.0**-20)).all(), name


@pytest.mark.parametrize(("model", "kept"), [("F16", None), ("BF16", None), (None, "I64"), (None, "F32")])
def test_deq_scale_is_stored_as_the_engine_reads_it(model: str | None, kept: str | None) -> None:
    """int64 for float16 models, float32 for bfloat16; without a word about the engine, as it was."""
    case = "w8a8_static_ascendv1_fp16" if kept == "I64" else "w8a8_static_bf16"
    layer = static_layers(case)[0]
    wanted = kept or {"F16": "I64", "BF16": "F32"}[model or ""]
    assert dict(msmodelslim.SPEC.derived(layer, "static", model)) == {"deq_scale": wanted, "quant_bias": "I32"}
    values = derived.deq_scale(layer)
    spelled = derived.encode_deq_scale(values, wanted)
    assert spelled.dtype == DTYPES[wanted]
    if wanted == "I64":
        assert [int(value).to_bytes(8, "little") for value in spelled] == [value.tobytes() + bytes(4) for value in values]
    np.testing.assert_array_equal(derived.decode_deq_scale(spelled), values, strict=True)


@pytest.mark.parametrize(("serve", "stored_as"), [("float16", np.int64), ("bfloat16", np.float32)])
@pytest.mark.parametrize("case", ["w8a8_static_bf16", "w8a8_static_ascendv1_fp16"])
def test_serve_dtype_is_that_of_scales_and_says_how_deq_scale_is_stored(case: str, serve: str, stored_as: Any, tmp_path: Path) -> None:
    convert(W8 / case, tmp_path / "out", "msmodelslim", serve_dtype=serve, allow=["scale-subnormal"])
    ours, theirs = stored(tmp_path / "out"), stored(W8 / case)
    half = {"float16": np.dtype(np.float16), "bfloat16": BFLOAT16}[serve]
    for name in decoded(W8 / case):
        assert ours[f"{name}.deq_scale"].dtype == stored_as
        for part in ("weight_scale", "input_scale"):
            wanted = theirs[f"{name}.{part}"].astype(np.float32).astype(half)
            np.testing.assert_array_equal(ours[f"{name}.{part}"], wanted, f"{name}.{part}", strict=True)
        np.testing.assert_array_equal(ours[f"{name}.weight"], theirs[f"{name}.weight"])


# --- contradictions ---------------------------------------------------------------------------------------------------


def changed(case: str, tmp_path: Path, change: Callable[[Tensors], object], source: str = "source") -> Path:
    """A copy of a golden with other tensors; the description forgets those that are gone."""
    folder = tmp_path / source
    folder.mkdir()
    for path in (W8 / case).iterdir():
        shutil.copyfile(path, folder / path.name)
    (weights,) = folder.glob("*.safetensors")
    change_tensors(weights, change)
    names = set(stored(folder))
    (path,) = folder.glob("quant_model_description*.json")
    change_json(path, lambda entries: [entries.pop(key) for key in list(entries) if "." in key and key not in names])
    return folder


Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


def times(tensor: str, factor: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[tensor] = (tensors[tensor].astype(np.float64) * factor).astype(tensors[tensor].dtype)

    return change


def plus(tensor: str, step: float, index: int = 3) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[tensor][index] += np.array(step, tensors[tensor].dtype)

    return change


LIES: dict[str, Callable[[Tensors], None]] = {
    "quant_bias": plus(f"{Q_PROJ}.quant_bias", 5000),
    "quant_bias of a layer without bias": plus(f"{DOWN}.quant_bias", 2),
    "deq_scale of a layer without bias": times(f"{DOWN}.deq_scale", 1.02),
    "deq_scale": times(f"{Q_PROJ}.deq_scale", 1.02),
    "bias": times(f"{Q_PROJ}.bias", 1.5),
    "weight_scale": times(f"{Q_PROJ}.weight_scale", 2),
    "input_scale": times(f"{Q_PROJ}.input_scale", 2),
    "input_offset": plus(f"{Q_PROJ}.input_offset", 1, 0),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_contradicts_the_law_is_lost_only_by_name(lie: str, tmp_path: Path) -> None:
    """The NPU would compute with it, a target without it would not: that is a loss where the target lacks it, and none where it is kept."""
    source = changed("w8a8_static_bf16", tmp_path, LIES[lie])
    layer = DOWN if "without" in lie else Q_PROJ
    for target in ("compressed-tensors", "dense", "gptq"):
        decided = plan(source, target, allow=["activations-dropped"])
        (refusal,) = [refusal for refusal in decided.refusals if refusal.code == "deq-scale-differs"]
        assert refusal.layer == layer
        assert "--allow deq-scale-differs" in refusal.hint
        (loss,) = [loss for loss in decided.losses if loss.code == "deq-scale-differs"]
        assert (loss.layers, loss.worst) == (1, layer)
        assert 0 < loss.bound <= 2
        allowed = plan(source, target, allow=["activations-dropped", "deq-scale-differs"])
        assert allowed.refusals == []
    again = plan(source, "msmodelslim")
    assert (again.refusals, again.losses) == ([], [])
    convert(source, tmp_path / "out", "msmodelslim")
    assert raw(tmp_path / "out") == raw(source)


def test_how_far_deq_scale_is_off_is_measured(tmp_path: Path) -> None:
    source = changed("w8a8_static_bf16", tmp_path, times(f"{DOWN}.deq_scale", 1.25))
    tensors = stored(source)
    product = exact_product(DOWN, tensors, 256)
    deq = tensors[f"{DOWN}.deq_scale"].astype(np.float64)
    wanted = (np.abs(deq - product) / np.maximum(deq, product))[:64].max()
    assert wanted == pytest.approx(0.2, rel=0.02)
    (loss,) = [loss for loss in plan(source, "compressed-tensors").losses if loss.code == "deq-scale-differs"]
    assert loss.bound == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("case", [*CASES, NUMPY])
def test_the_tools_own_roundings_contradict_nothing(case: str) -> None:
    for target in ("dense", "compressed-tensors"):
        allow = ["activations-dropped", "kv-cache-dropped"]
        assert "deq-scale-differs" not in {loss.code for loss in plan(W8 / case, target, allow=allow).losses}


# --- norms and caches -------------------------------------------------------------------------------------------------

NORM = "model.layers.0.input_layernorm"


def test_a_norm_bias_of_zeros_is_left_out_and_another_is_refused(tmp_path: Path) -> None:
    case = "w8a8_static_anti_m4_bf16"
    assert plan(W8 / case, "compressed-tensors").refusals == []
    for part in ("bias", "module.bias", "module.weight"):
        source = changed(case, tmp_path, plus(f"{NORM}.{part}", 0.5), part)
        for target in ("compressed-tensors", "msmodelslim"):
            decided = plan(source, target)
            assert {refusal.code for refusal in decided.refusals} == {"norm"}
            assert {refusal.layer.rpartition("norm.")[0] for refusal in decided.refusals} == {NORM.removesuffix("norm")}


C8 = ("w8a8_c8_sym_bf16", "w8a8_c8_asym_fp16")


@pytest.mark.parametrize("case", C8)
@pytest.mark.parametrize("variant", ["safe_tensor", "ascendv1", "vllm-ascend", "mindie"])
def test_a_c8_cache_is_carried_within_the_format(case: str, variant: str, tmp_path: Path) -> None:
    found = again(case, tmp_path / "out", variant)
    caches = {name for name in raw(W8 / case) if ".kv_cache_" in name}
    assert len(caches) == 4
    ours = raw(tmp_path / "out")
    assert {name: ours[name] for name in caches} == {name: raw(W8 / case)[name] for name in caches}
    assert {found[name] for name in caches} == {"C8"}
    assert (found["kv_cache_type"], found["kv_quant_type"]) == ("C8", "C8")
    again_in_one = again_from(tmp_path / "out", tmp_path / "back")
    assert again_in_one == raw(W8 / case)


def again_from(source: Path, out: Path) -> dict[str, Any]:
    convert(source, out, "msmodelslim:safe_tensor")
    return raw(out)


@pytest.mark.parametrize("case", C8)
@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "dense"])
def test_a_c8_cache_is_lost_elsewhere_only_by_name(case: str, target: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        convert(W8 / case, tmp_path / "out", target, allow=["activations-dropped"])
    assert [refusal.code for refusal in caught.value.refusals] == ["kv-cache-dropped"]  # type: ignore[attr-defined]
    assert "(in 4 places)" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    result = convert(W8 / case, tmp_path / "out", target, allow=["activations-dropped", "kv-cache-dropped"])
    assert {"kv-cache-dropped"} <= {loss.code for loss in result.losses}
    assert not [name for name in stored(tmp_path / "out") if "kv_cache" in name]


# --- damage -----------------------------------------------------------------------------------------------------------


def becomes(part: str, value: Any, dtype: Any = None, layer: str = Q_PROJ) -> Callable[[Tensors], None]:
    """A tensor of another value, dtype (its own if None) or shape."""

    def change(tensors: Tensors) -> None:
        name = f"{layer}.{part}"
        tensors[name] = np.asarray(value).astype(tensors[name].dtype if dtype is None else dtype)

    return change


def gone(*parts: str, layer: str = Q_PROJ) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for part in parts:
            del tensors[f"{layer}.{part}"]

    return change


PLAIN_W8A8, SPARSE, DYNAMIC = "w8a8_static_bf16", "w8a8s_lowbit_bf16", "w8a8_dynamic_bf16"
W4A8, PACKED_W4A8 = "w4a8_dynamic_g32_bf16", "w4a8_dynamic_ascendv1_g128_bf16"

DAMAGE: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "input_offset beyond int8": (PLAIN_W8A8, becomes("input_offset", [300]), r"input_offset is 300\.0"),
    "input_offset below int8": (PLAIN_W8A8, becomes("input_offset", [-129], np.float32), r"input_offset is -129\.0"),
    "input_offset between integers": (PLAIN_W8A8, becomes("input_offset", [0.5]), r"input_offset is 0\.5"),
    "input_offset is NaN": (PLAIN_W8A8, becomes("input_offset", [np.nan]), "input_offset is nan"),
    "input_offset of two": (PLAIN_W8A8, becomes("input_offset", [1, 1]), r"input_offset has shape \[2\]"),
    "input_offset of I32": (PLAIN_W8A8, becomes("input_offset", [1], np.int32), "input_offset is I32"),
    "input_offset missing": (PLAIN_W8A8, gone("input_offset"), "no tensor 'input_offset'"),
    "input_scale is 0": (PLAIN_W8A8, becomes("input_scale", [0]), r"input_scale is 0\.0"),
    "input_scale is negative": (PLAIN_W8A8, becomes("input_scale", [-1]), r"input_scale is -1\.0"),
    "input_scale is NaN": (PLAIN_W8A8, becomes("input_scale", [np.nan]), "input_scale is nan"),
    "input_scale is infinite": (PLAIN_W8A8, becomes("input_scale", [np.inf]), "input_scale is inf"),
    "input_scale of two": (PLAIN_W8A8, becomes("input_scale", [1, 1]), r"input_scale has shape \[2\]"),
    "input_scale in two dimensions": (PLAIN_W8A8, becomes("input_scale", [[1]]), r"input_scale is BF16 \[1, 1\]"),
    "input_scale is integral": (PLAIN_W8A8, becomes("input_scale", [1], np.int8), "input_scale is I8"),
    "input_scale missing": (PLAIN_W8A8, gone("input_scale"), "no tensor 'input_scale'"),
    "no scale at all": (SPARSE, gone("deq_scale"), "no tensor 'weight_scale'"),
    "deq_scale is float16": (SPARSE, becomes("deq_scale", np.ones(256), np.float16), "deq_scale is F16"),
    "deq_scale too short": (SPARSE, becomes("deq_scale", np.ones(255)), r"deq_scale has shape \[255\]"),
    "deq_scale is NaN": (SPARSE, becomes("deq_scale", np.full(256, np.nan)), "nan"),
    "deq_scale too short beside weight_scale": (PLAIN_W8A8, becomes("deq_scale", np.ones(255)), r"deq_scale is float32 \[255\]"),
    "quant_bias is float": (PLAIN_W8A8, becomes("quant_bias", np.zeros(256), np.float32), "quant_bias is float32"),
    "quant_bias too short": (PLAIN_W8A8, becomes("quant_bias", np.zeros(255)), r"quant_bias is int32 \[255\]"),
    "weight is int32": (PLAIN_W8A8, becomes("weight", np.zeros((256, 256)), np.int32), "weight is I32"),
    "weight_scale missing of dynamic": (DYNAMIC, gone("weight_scale"), "no tensor 'weight_scale'"),
    "weight_scale of half the outputs": (DYNAMIC, becomes("weight_scale", np.ones((64, 1))), r"weight_scale has shape \[64, 1\]"),
    "offset of an outer scale": (W4A8, plus(f"{Q_PROJ}.weight_offset", 1), "weight_offset: is not zero beside"),
    "inner offset beyond 4 bits": (W4A8, plus(f"{Q_PROJ}.weight_offset_second", 16), "weight_offset_second"),
    "inner scales of odd groups": (W4A8, becomes("weight_scale_second", np.ones((128, 3))), r"\[128, 3\]"),
    "inner offsets of other groups": (W4A8, becomes("weight_offset_second", np.zeros((128, 2))), "they must agree"),
    "scale_bias of other parts": (PACKED_W4A8, becomes("scale_bias", np.zeros((256, 3))), r"scale_bias is float32 \[256, 3\]"),
    "bias is integral": (PLAIN_W8A8, becomes("bias", np.zeros(256), np.int32), "bias is I32"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_said_with_the_layers_name(damage: str, tmp_path: Path) -> None:
    case, change, words = DAMAGE[damage]
    source = changed(case, tmp_path, change)
    with pytest.raises(UnreadableError, match=words) as caught:
        plan(source, "msmodelslim")
    assert Q_PROJ in str(caught.value)
    assert "\n" not in str(caught.value)


def test_codes_of_w4a8_that_are_no_four_bits_are_said(tmp_path: Path) -> None:
    source = changed("w4a8_dynamic_g32_bf16", tmp_path, plus(f"{Q_PROJ}.weight", 8, 5))
    with pytest.raises(UnreadableError, match=Q_PROJ):
        plan(source, "msmodelslim")


def test_a_tensor_that_the_description_promises_is_missed(tmp_path: Path) -> None:
    source = shutil.copytree(W8 / "w8a8_static_bf16", tmp_path / "source")
    (weights,) = source.glob("*.safetensors")
    change_tensors(weights, gone("deq_scale"))
    with pytest.raises(UnreadableError, match=rf"describes '{Q_PROJ}\.deq_scale' \(W8A8\), which no weight file holds"):
        plan(source, "msmodelslim")


def test_w8a8_without_the_derived_tensors_gets_them(tmp_path: Path) -> None:
    """They follow from the law: computed in float32, beside the tool's own within its rounding."""
    source = changed("w8a8_static_bf16", tmp_path, gone("deq_scale", "quant_bias"))
    result = convert(source, tmp_path / "out", "msmodelslim", base_model=FIXTURES / "compressed_tensors" / "src_qwen2_bf16")
    assert result.exact
    assert {loss.code: loss.layers for loss in result.plan.losses} == {"quant-bias-rounded": 1}
    ours, theirs = stored(tmp_path / "out"), stored(W8 / "w8a8_static_bf16")
    assert ours.keys() == theirs.keys()
    product = exact_product(Q_PROJ, theirs, 256)
    np.testing.assert_array_equal(ours[f"{Q_PROJ}.deq_scale"], product.astype(np.float32), strict=True)
    bias, offset = theirs[f"{Q_PROJ}.bias"].astype(np.float64), theirs[f"{Q_PROJ}.input_offset"].astype(np.float64)[0]
    steps = bias / product.astype(np.float32).astype(np.float64)
    wanted = np.rint(steps - theirs[f"{Q_PROJ}.weight"].astype(np.int64).sum(axis=1) * offset)
    np.testing.assert_array_equal(ours[f"{Q_PROJ}.quant_bias"], wanted.astype(np.int32), strict=True)
    # How much that rounds the bias, against the largest: the loss says it, and it is half a step at most.
    error = (np.abs(np.rint(steps) - steps) * product).max() / np.abs(bias).max()
    assert result.plan.losses[0].bound == pytest.approx(error, rel=1e-6)
    assert 0 < error <= 0.5 * product.max() / np.abs(bias).max()


# --- through compressed-tensors and back ------------------------------------------------------------------------------

THERE_AND_BACK = [case for case in CASES if case not in C8 and "mix_cfg" not in case]


@pytest.mark.parametrize("case", THERE_AND_BACK)
def test_there_and_back_through_compressed_tensors(case: str, tmp_path: Path) -> None:
    """Codes, scales, zero points and biases come back bit for bit where the scales are no product (W4A8's levels become one)."""
    two_levels = "weight_scale_second" in "".join(stored(W8 / case))
    there = convert(W8 / case, tmp_path / "ct", "compressed-tensors", scale_dtype="float32" if two_levels else None)
    assert there.exact
    assert there.losses == []
    prints = [fingerprint(folder).digest for folder in (W8 / case, tmp_path / "ct")]
    assert prints[0] == prints[1]
    if two_levels:
        ours = stored(tmp_path / "ct")
        for name, layer in decoded(W8 / case).items():
            groups = ours[f"{name}.weight_scale"].shape[1]
            product = layer.steps[:, :: layer.steps.shape[1] // groups]
            np.testing.assert_array_equal(ours[f"{name}.weight_scale"], product, name, strict=True)
        with pytest.raises(RefusedError, match="two levels"):
            convert(tmp_path / "ct", tmp_path / "back", "msmodelslim")
        return
    variant = "ascendv1" if "version" in described(W8 / case) else "safe_tensor"
    back = convert(tmp_path / "ct", tmp_path / "back", f"msmodelslim:{variant}", scale_dtype="keep")
    assert back.exact
    assert {loss.code for loss in back.losses} <= {"quant-bias-rounded"}
    assert fingerprint(tmp_path / "back").digest == prints[0]
    ours, theirs = stored(tmp_path / "back"), stored(W8 / case)
    layers = decoded(W8 / case)
    for name, layer in layers.items():
        np.testing.assert_array_equal(ours[f"{name}.weight"], theirs[f"{name}.weight"], name)
        scale = np.broadcast_to(ours[f"{name}.weight_scale"].astype(np.float32), (len(layer.steps), 1))
        np.testing.assert_array_equal(scale, layer.steps[:, :1], name)
        assert not ours[f"{name}.weight_offset"].any()
        if layer.input_scale is not None and layer.input_offset is not None:
            np.testing.assert_array_equal(ours[f"{name}.input_scale"].astype(np.float32), layer.input_scale.astype(np.float32), name)
            np.testing.assert_array_equal(ours[f"{name}.input_offset"].astype(np.float32), layer.input_offset.astype(np.float32), name)
        if f"{name}.bias" in theirs:
            np.testing.assert_array_equal(ours[f"{name}.bias"].astype(np.float32), theirs[f"{name}.bias"].astype(np.float32), name)
    left_out = {item.tensor for item in there.plan.checkpoint.left_out}
    for name in theirs:
        if name.rpartition(".")[0] not in layers and name not in left_out:
            np.testing.assert_array_equal(ours[name], theirs[name], name, strict=True)


@pytest.mark.parametrize("case", ["w4a8_dynamic_g32_bf16", "w4a8_dynamic_ascendv1_g128_bf16"])
def test_two_levels_in_one_are_rounded_by_name_where_nothing_else_is_asked(case: str, tmp_path: Path) -> None:
    """vLLM's kernel for 4 bits with quantized inputs computes with half precision scales; a product of two has more bits."""
    result = convert(W8 / case, tmp_path / "ct", "compressed-tensors")
    assert not result.exact
    (loss,) = result.losses
    assert (loss.code, loss.layers) == ("scale-rounded", 7)
    ours, worst = stored(tmp_path / "ct"), 0.0
    for name, layer in decoded(W8 / case).items():
        scales = ours[f"{name}.weight_scale"]
        assert scales.dtype.itemsize == 2
        product = layer.steps[:, :: layer.steps.shape[1] // scales.shape[1]]
        np.testing.assert_array_equal(scales, product.astype(scales.dtype), name, strict=True)
        worst = max(worst, float((np.abs(scales.astype(np.float64) - product) / product).max()))
    assert loss.bound == pytest.approx(worst, rel=1e-5)
    assert 0 < worst <= 2.0**-8
