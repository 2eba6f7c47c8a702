"""Files that the real tools wrote read to the weights that the tools meant.

The expected side never uses the project: msModelSlim's integers come from ``oracles.raw_msmodelslim``, the float models from
their own files, AutoAWQ's, AutoGPTQ's and GPTQModel's weights from digests that those tools recorded.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import FIXTURES, GOLDENS, MSMODELSLIM, Array, read_folder, read_tensors
from oracles.raw_msmodelslim import Layer, read_layers

from convert.planning import plan
from convert.verification import fingerprint
from formats import open_checkpoint
from formats.ir import dequantize

EXACT_RTN = 0.5 + 2e-5
"""Steps by which round-to-nearest may be off; 2e-5 is float32's own error in quotients up to 127."""

BOUNDS = {
    # Per group, the tool divides in float32.
    "w4a16_g128_sym_bf16": EXACT_RTN,
    "w4a16_g128_asym_fp16": EXACT_RTN,
    "w4a16_ascendv1_g128_sym_bf16": EXACT_RTN,
    "w8a16_g128_sym_bf16": EXACT_RTN,
    # Per channel, it divides in the model's dtype: a bfloat16 quotient in 4..8 is off by up to 2**-6 before it is rounded.
    "w4a16_pc_sym_bf16": 0.5 + 2**-6,
    "w4a16_ascendv1_pc_sym_bf16": 0.5 + 2**-6,
    # A bfloat16 quotient in 64..128 has steps of 0.5, so it is off by up to 0.25.
    "v1_w8a16_pc": 0.75,
    # float16: a quotient in 128..256 is off by 2**-4, and so is the offset's; a scale rounded down by 2**-11 clips 255 * 2**-11.
    "w8a16_pc_asym_fp16": 0.5 + 2 * 2**-4 + 255 * 2**-11,
}

SMOOTHED = "w4a16_awq_m3_g128_sym_bf16"
OPTIMIZED = "w4a16_gptq_pc_sym_fp16"
TWINS = {
    "w4a16_ascendv1_g128_sym_bf16": "w4a16_g128_sym_bf16",
    "w4a16_ascendv1_pc_sym_bf16": "w4a16_pc_sym_bf16",
}
AWQ_GPTQ = sorted({path.parent.name for path in (FIXTURES / "awq_gptq").glob("*/dequant_sha256.json")} - {"awq_marlin_g128_nozp"})
"""Marlin's record has zeros with a sign, which its file has not: ``test_awq_variants`` compares it."""


def expected_weights(layer: Layer) -> Array:
    """float32 [out, in] of ``(weight - weight_offset) * weight_scale``."""
    return (layer.codes - spread(layer.zeros, layer)).astype(np.float32) * spread(layer.scales, layer)


def spread(grid: Array, layer: Layer) -> Array:
    """A [groups, out] array for every weight, [out, in]."""
    return grid.T.repeat(layer.codes.shape[1] // grid.shape[0], axis=1)


def float_source(case: str) -> dict[str, Array]:
    return read_folder(MSMODELSLIM / GOLDENS[case].base)


def steps_off(layer: Layer, wanted: Array) -> float:
    """Largest distance from the float weights, in steps of the layer's own scale."""
    return float((np.abs(expected_weights(layer) - wanted.astype(np.float32)) / spread(layer.scales, layer)).max())


def test_every_golden_is_listed() -> None:
    found = {path.parent.name for path in MSMODELSLIM.glob("*/quant_model_weight*.safetensors")}
    assert found == {*GOLDENS, "w8a8_mix_cfg_fp16"}


@pytest.mark.parametrize("case", GOLDENS)
def test_golden_reads_to_the_laws_weights(case: str) -> None:
    folder, golden = MSMODELSLIM / case, GOLDENS[case]
    expected = read_layers(folder)
    checkpoint = open_checkpoint(folder)
    assert sorted(checkpoint.layer_names) == sorted(expected)
    assert len(expected) == (7 if case.startswith("v1") else 14)
    for name, wanted in expected.items():
        layer = checkpoint.layer(name)
        args = layer.scheme.weights
        assert (args.bits, args.strategy, args.group_size or 0) == (golden.bits, "group" if golden.group else "channel", golden.group)
        np.testing.assert_array_equal(dequantize(layer), expected_weights(wanted), name, strict=True)


@pytest.mark.parametrize("case", GOLDENS)
def test_golden_carries_everything_else_verbatim(case: str) -> None:
    """Biases of layers, and every float tensor but AntiOutlier's norm copies and zero biases."""
    (path,) = (MSMODELSLIM / case).glob("quant_model_weight*.safetensors")
    stored = read_tensors(path)
    checkpoint = open_checkpoint(MSMODELSLIM / case)
    layers = set(checkpoint.layer_names)
    source_names = float_source(case)
    plain = {name for name in source_names if name.rpartition(".")[0] not in layers}
    assert set(checkpoint.plain_names) == plain
    for name in plain:
        found = np.asarray(checkpoint.plain(name).data)
        assert (found.dtype, found.tobytes()) == (stored[name].dtype, stored[name].tobytes()), name
    for name in layers:
        bias = checkpoint.layer(name).bias
        assert (bias is not None) == (f"{name}.bias" in source_names)
        assert bias is None or np.asarray(bias).tobytes() == stored[f"{name}.bias"].tobytes()


@pytest.mark.parametrize("case", BOUNDS)
def test_golden_is_its_float_source_within_half_a_step(case: str) -> None:
    source = float_source(case)
    worst = {name: steps_off(layer, source[f"{name}.weight"]) for name, layer in read_layers(MSMODELSLIM / case).items()}
    assert max(worst.values()) <= BOUNDS[case], worst
    assert min(worst.values()) > 0.49, "no weight lies near a boundary: the scales cannot be those of this source"


def test_smoothed_golden_is_its_float_source_within_half_a_step() -> None:
    """AntiOutlier m3 multiplies columns of q, k, v, gate and up before rounding; o and down are as they were."""
    source, anti = float_source(SMOOTHED), read_tensors(MSMODELSLIM / SMOOTHED / "golden_anti.safetensors")
    smoothed = 0
    for name, layer in read_layers(MSMODELSLIM / SMOOTHED).items():
        weights, factor = source[f"{name}.weight"].astype(np.float32), anti.get(f"{name}.weight.ratio_median_over_rows")
        if factor is None:
            assert name.endswith(("o_proj", "down_proj"))
            assert steps_off(layer, weights) <= EXACT_RTN
            continue
        smoothed += 1
        # The product was rounded to bfloat16 (2**-9 of up to 7 steps), and the recorded factor is a median of such (as much again).
        assert steps_off(layer, weights * factor) <= 0.5 + 2 * 7 * 2**-9
        assert steps_off(layer, weights) > 1, f"{name} was not smoothed"
    assert smoothed == 10


def test_optimized_golden_follows_its_float_source() -> None:
    """GPTQ moves weights by whole steps to spare the outputs, so only their bulk is near the source."""
    source = float_source(OPTIMIZED)
    for name, layer in read_layers(MSMODELSLIM / OPTIMIZED).items():
        found, wanted = expected_weights(layer).ravel(), source[f"{name}.weight"].astype(np.float32).ravel()
        assert np.corrcoef(found, wanted)[0, 1] > 0.98, name
        assert np.linalg.norm(found - wanted) < 0.2 * np.linalg.norm(wanted), name
        assert steps_off(layer, source[f"{name}.weight"]) > 0.75, f"{name} is plain rounding"


@pytest.mark.parametrize("case", GOLDENS)
def test_probe_finds_each_layers_symmetry(case: str) -> None:
    """That offsets are all 0 is in the data alone: every msModelSlim layer has an offset tensor."""
    expected = {name: bool((layer.zeros == 2 ** (layer.bits - 1)).all()) for name, layer in read_layers(MSMODELSLIM / case).items()}
    assert set(expected.values()) == {GOLDENS[case].symmetric}
    found = plan(MSMODELSLIM / case, "dense")
    assert {layer.target.name: layer.source.weights.symmetric for layer in found.layers} == expected


@pytest.mark.parametrize("case", TWINS)
def test_packed_and_unpacked_twins_are_the_same_weights(case: str) -> None:
    packed, unpacked = fingerprint(MSMODELSLIM / case), fingerprint(MSMODELSLIM / TWINS[case])
    assert packed.tensors == unpacked.tensors
    assert packed.digest == unpacked.digest
    assert len(packed.tensors) == len(float_source(case))


def test_fingerprints_tell_other_goldens_apart() -> None:
    alike = len(TWINS)
    assert len({fingerprint(MSMODELSLIM / case).digest for case in GOLDENS}) == len(GOLDENS) - alike


MIXED = {
    "self_attn.q_proj": "static",
    "self_attn.v_proj": "static",
    "self_attn.o_proj": None,
    "mlp.gate_proj": "dynamic",
    "mlp.up_proj": "dynamic",
    "mlp.down_proj": "dynamic",
}
"""How each linear of the mixed golden quantizes its inputs; k_proj stayed in float."""


def test_mixed_golden_reads_to_the_laws_weights_and_inputs() -> None:
    """W8A16, W8A8 and W8A8_DYNAMIC in one file, each within float16's quotient error (2**-5 in 64..128) of half a step."""
    folder = MSMODELSLIM / "w8a8_mix_cfg_fp16"
    stored, checkpoint = read_folder(folder), open_checkpoint(folder)
    assert set(checkpoint.layer_names) == {f"model.layers.{block}.{leaf}" for block in (0, 1) for leaf in MIXED}
    assert checkpoint.unsupported == []
    source = read_folder(MSMODELSLIM / "src_fp16")
    worst = {}
    for name in checkpoint.layer_names:
        codes, scales, offsets = (stored[f"{name}.{part}"].astype(np.float32) for part in ("weight", "weight_scale", "weight_offset"))
        layer, kind = checkpoint.layer(name), MIXED[name.split(".", 3)[3]]
        np.testing.assert_array_equal(dequantize(layer), (codes - offsets) * scales, name, strict=True)
        worst[name] = np.abs((codes - offsets) - source[f"{name}.weight"].astype(np.float32) / scales).max()
        found = None if layer.scheme.inputs is None else "dynamic" if layer.scheme.inputs.dynamic else "static"
        assert found == kind, name
        if kind == "static":
            assert layer.input_scale is not None
            assert layer.input_zero_point is not None
            assert layer.input_scale.tobytes() == stored[f"{name}.input_scale"].tobytes()
            assert layer.input_zero_point.tolist() == stored[f"{name}.input_offset"].tolist()
        else:
            assert layer.input_scale is layer.input_zero_point is None
    assert 0.49 < max(worst.values()) <= 0.5 + 2**-5, worst
    floats = [name for name in checkpoint.plain_names if name.endswith("k_proj.weight")]
    assert floats == [f"model.layers.{block}.self_attn.k_proj.weight" for block in (0, 1)]


@pytest.mark.parametrize("case", AWQ_GPTQ)
def test_awq_and_gptq_goldens_read_to_what_their_tool_computes(case: str) -> None:
    """The tools multiply in float16: our float32 product, rounded once to float16, has their digest in every layer."""
    folder: Path = FIXTURES / "awq_gptq" / case
    recorded = json.loads((folder / "dequant_sha256.json").read_text("utf-8"))["tensors"]
    checkpoint = open_checkpoint(folder)
    assert {f"{name}.weight" for name in checkpoint.layer_names} == set(recorded)
    for name in checkpoint.layer_names:
        weights = dequantize(checkpoint.layer(name))
        found = hashlib.sha256(weights.astype(np.float16).astype("<f4").tobytes()).hexdigest()
        assert list(weights.shape) == recorded[f"{name}.weight"]["shape"]
        assert found == recorded[f"{name}.weight"]["sha256_float32_le"], name


def test_every_awq_and_gptq_golden_is_listed() -> None:
    assert len(AWQ_GPTQ) == 12
