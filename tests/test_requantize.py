"""``--allow requantize``: weights rounded anew to 8 bits per channel, only when asked, and measured.

The expected side is plain NumPy throughout: each source's weights are decoded here, and rounded here.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import BFLOAT16, CONFIG, FIXTURES, Array, Model, decode_awq, decode_gptq, linear, model, replaced, write_msmodelslim
from killing import counted_pwrites, kill_after, small_tiles
from places import HIDDEN, names, snapshot
from plan_cases import read_safetensors

from convert import convert, plan, verify
from convert.engine import Result
from convert.verification import fingerprint
from formats.errors import RefusedError

AWQ_GPTQ, COMPRESSED, W8 = FIXTURES / "awq_gptq", FIXTURES / "compressed_tensors", FIXTURES / "msmodelslim_w8"
TARGET = "msmodelslim:vllm-ascend"
ASKED = ("requantize", "activations-dropped")

SOURCES = {
    AWQ_GPTQ / "awq_gemm_g128_zp": 14,
    AWQ_GPTQ / "gptq_v1_4b_g128_sym": 14,
    AWQ_GPTQ / "gptq_v1_8b_g128_sym": 14,
    COMPRESSED / "w4a16_gptq_g32_actgroup_asym_fp16": 7,
    COMPRESSED / "w4a16_gptq_g64_actgroup_sym_bf16": 7,
    COMPRESSED / "w4a16_pc_asym_fp16": 7,
    COMPRESSED / "fp8_dynamic_fp16": 7,
    COMPRESSED / "fp8_static_fp16": 7,
    COMPRESSED / "fp8_block_bf16": 6,
    COMPRESSED / "nvfp4a16_bf16": 7,
    W8 / "w4a8_dynamic_g32_bf16": 7,
}
"""Group-wise, asymmetric, in act order, FP8 of three strategies, and of two levels: how many layers there are."""
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


def name_of(source: Any) -> str:
    return source.name if isinstance(source, Path) else str(source)


def tensors_of(folder: Path) -> dict[str, Array]:
    paths = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("golden_")]
    return dict(itertools.chain.from_iterable(read_safetensors(path).items() for path in paths))


def lanes(words: Array, bits: int) -> Array:
    """The unsigned lanes of the last axis, lowest bits first."""
    found = words.view(np.uint32)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & np.uint32((1 << bits) - 1)
    return found.reshape(*words.shape[:-1], -1).astype(np.int16)


def weights_of(source: Path) -> dict[str, Array]:
    """{layer: float32 weights [out, in]}, each product rounded to float32 once."""
    tensors = tensors_of(source)
    found: dict[str, Array] = {}
    for key in tensors:
        scales: Array
        name, _, leaf = key.rpartition(".")
        part = {other.rpartition(".")[2]: tensors[other] for other in tensors if other.rpartition(".")[0] == name}
        if leaf == "qweight":
            bits = 8 if "8b" in source.name else 4
            layer = decode_awq(tensors, name) if "awq" in source.name else decode_gptq(tensors, name, bits)
            scales, zeros = (grid.astype(np.float32)[:, layer.g_idx] for grid in (layer.scales, layer.zeros))
            found[name] = (layer.codes - zeros) * scales
        elif leaf == "weight_packed" and "weight_global_scale" in part:
            codes = np.stack([tensors[key] & 15, tensors[key] >> 4], axis=2).reshape(len(tensors[key]), -1)
            scales = part["weight_scale"].astype(np.float32) / part["weight_global_scale"]
            found[name] = E2M1[codes] * scales.repeat(16, axis=1)
        elif leaf == "weight_packed":
            out, in_ = (int(side) for side in part["weight_shape"])
            codes, scales = lanes(tensors[key], 4)[:, :in_], part["weight_scale"].astype(np.float32)
            zeros = np.full(scales.shape, 8, np.int16)
            if "weight_zero_point" in part:
                zeros = lanes(np.ascontiguousarray(part["weight_zero_point"].T), 4)[:, :out].T
            g_idx = part.get("weight_g_idx", np.arange(in_) // (in_ // scales.shape[1]))
            found[name] = (codes - zeros[:, g_idx]).astype(np.float32) * scales[:, g_idx]
        elif leaf == "weight" and "weight_scale_second" in part:
            scales = part["weight_scale"] * part["weight_scale_second"]
            found[name] = tensors[key].astype(np.float32) * scales.repeat(tensors[key].shape[1] // scales.shape[1], axis=1)
        elif leaf == "weight" and tensors[key].dtype == np.dtype(ml_dtypes.float8_e4m3fn):
            scales, (out, in_) = part["weight_scale"].astype(np.float32), tensors[key].shape
            if "block" in source.name:
                scales = scales.repeat(128, axis=0)[:out].repeat(128, axis=1)[:, :in_]
            found[name] = tensors[key].astype(np.float32) * (scales if scales.ndim == 2 else scales.reshape(1, 1))
    return found


def rounded(weights: Array, half: np.dtype[Any]) -> tuple[Array, Array, float]:
    """(int8 codes, scales [out, 1] in ``half``, largest error against the largest weight of all)."""
    largest = np.abs(weights).max(axis=1, keepdims=True)
    scales = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(half)
    smallest = np.array(1, np.uint16).view(half)
    scales[scales == 0] = smallest
    codes = np.clip(np.rint(weights / scales.astype(np.float32)), -127, 127)
    error = np.abs(codes.astype(np.float64) * scales.astype(np.float64) - weights.astype(np.float64))
    return codes.astype(np.int8), scales, float(error.max() / largest.max())


def bound_of(result: Result) -> float:
    (loss,) = [loss for loss in result.losses if loss.code == "requantize"]
    return loss.bound


def half_of(source: Path) -> np.dtype[Any]:
    config = json.loads((source / "config.json").read_text("utf-8")) if (source / "config.json").exists() else {}
    said = {config.get("torch_dtype"), config.get("dtype")} - {None}
    return BFLOAT16 if "bfloat16" in said or (not said and "bf16" in source.name) else np.dtype(np.float16)


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_codes_scales_and_bound_are_those_of_plain_numpy(source: Path, tmp_path: Path) -> None:
    result = convert(source, tmp_path / "out", TARGET, allow=ASKED)
    assert not result.exact
    ours, wanted, worst = tensors_of(tmp_path / "out"), weights_of(source), 0.0
    assert len(wanted) == SOURCES[source]
    assert all(layer.requantized for layer in result.plan.layers)
    assert {layer.target.name for layer in result.plan.layers} == set(wanted)
    half = {ours[f"{name}.weight_scale"].dtype for name in wanted}
    assert half == {half_of(source)}
    for name, weights in wanted.items():
        codes, scales, error = rounded(weights, half_of(source))
        np.testing.assert_array_equal(ours[f"{name}.weight"], codes, name, strict=True)
        np.testing.assert_array_equal(ours[f"{name}.weight_scale"], scales, name, strict=True)
        np.testing.assert_array_equal(ours[f"{name}.weight_offset"], np.zeros_like(scales), name, strict=True)
        worst = max(worst, error)
    (loss,) = [loss for loss in result.losses if loss.code == "requantize"]
    assert loss.layers == SOURCES[source]
    assert loss.bound == pytest.approx(worst, rel=1e-5)
    # A scale that was rounded down clips the largest weight by as much: 2**-11 in float16, 2**-9 in bfloat16.
    assert 0.0035 < worst <= 1 / 254 + (2.0**-11 if half_of(source) == np.float16 else 2.0**-9)


@pytest.mark.parametrize("source", [source for source in SOURCES if "bf16" not in source.name], ids=name_of)
def test_everything_else_is_carried(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", TARGET, allow=ASKED)
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(source)
    layers = set(weights_of(source))
    plain = [name for name in theirs if name.rpartition(".")[0] not in layers]
    assert plain
    for name in plain:
        assert (ours[name].dtype, ours[name].tobytes()) == (theirs[name].dtype, theirs[name].tobytes()), name
    biases = [name for name in ours if name.endswith(".bias")]
    assert all(ours[name].tobytes() == theirs[name].astype(ours[name].dtype).tobytes() for name in biases)
    added = {f"{name}.{part}" for name in layers for part in ("weight", "weight_scale", "weight_offset")}
    assert set(ours) == {*plain, *added, *biases}


def test_the_certificate_has_both_fingerprints_and_the_measured_bound(tmp_path: Path) -> None:
    source = AWQ_GPTQ / "awq_gemm_g128_zp"
    result = convert(source, tmp_path / "out", TARGET, allow=ASKED)
    certificate = json.loads((tmp_path / "out" / "weighbridge.json").read_text("utf-8"))
    text = json.dumps(certificate)
    prints = [fingerprint(source).digest, fingerprint(tmp_path / "out").digest]
    assert prints[0] != prints[1]
    assert result.source_fingerprint is not None
    assert result.target_fingerprint is not None
    assert [result.source_fingerprint.digest, result.target_fingerprint.digest] == prints
    assert all(digest in text for digest in prints)
    (loss,) = certificate["losses"]
    worst = max(rounded(weights, np.dtype(np.float16))[2] for weights in weights_of(source).values())
    assert (loss["code"], loss["layers"]) == ("requantize", 14)
    assert loss["bound"] == pytest.approx(worst, rel=1e-5)
    # What only the headers say is the promise; what was measured may exceed it by the scale's rounding alone.
    (promised,) = [loss for loss in result.plan.losses if loss.code == "requantize"]
    assert promised.bound == pytest.approx(1 / 254)
    verdict = verify(source, tmp_path / "out")
    assert not verdict.same


def test_what_was_rounded_once_is_exact_from_then_on(tmp_path: Path) -> None:
    convert(AWQ_GPTQ / "gptq_v1_4b_g128_sym", tmp_path / "first", TARGET, allow=ASKED)
    again = convert(tmp_path / "first", tmp_path / "second", TARGET, allow=ASKED)
    assert again.exact
    assert again.losses == []
    assert tensors_of(tmp_path / "first").keys() == tensors_of(tmp_path / "second").keys()
    assert verify(tmp_path / "first", tmp_path / "second").same


# --- never unasked ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_nothing_is_rounded_anew_without_being_asked(source: Path, tmp_path: Path) -> None:
    others = ["activations-dropped", "scale-subnormal", "deq-scale-differs", "kv-cache-dropped"]
    decided = plan(source, TARGET, allow=others)
    assert {refusal.layer for refusal in decided.refusals} == set(weights_of(source))
    assert not any(layer.requantized for layer in decided.layers)
    assert "requantize" not in {loss.code for loss in decided.losses}
    with pytest.raises(RefusedError):
        convert(source, tmp_path / "out", TARGET, allow=others)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", [AWQ_GPTQ / "gptq_v1_4b_gm1_sym", COMPRESSED / "w8a8_static_asym_fp16"], ids=name_of)
def test_what_has_an_exact_spelling_is_not_rounded_though_it_may(source: Path, tmp_path: Path) -> None:
    result = convert(source, tmp_path / "out", TARGET, allow=ASKED)
    assert result.exact
    assert not any(layer.requantized for layer in result.plan.layers)
    assert "requantize" not in {loss.code for loss in result.losses}


def test_strict_refuses_it_though_it_is_allowed() -> None:
    decided = plan(AWQ_GPTQ / "awq_gemm_g128_zp", TARGET, allow=ASKED, strict=True)
    assert "requantize" in {refusal.code for refusal in decided.refusals}


def test_a_target_without_8_bits_refuses_as_before() -> None:
    source = AWQ_GPTQ / "gptq_v1_8b_g128_sym"
    codes = [[refusal.code for refusal in plan(source, "awq", allow=allow).refusals] for allow in ((), ASKED)]
    assert codes[0] == codes[1] == ["bits"] * 14


def test_what_rounding_does_not_lift_is_refused_still() -> None:
    """Fused siblings of which one is float."""
    decided = plan(FIXTURES / "msmodelslim" / "w8a8_mix_cfg_fp16", TARGET, allow=ASKED)
    assert {refusal.code for refusal in decided.refusals} == {"fused"}


def test_only_the_layers_that_need_it_are_rounded(tmp_path: Path) -> None:
    """down_proj has a single group, which is a channel: its codes stay as they are."""
    source = COMPRESSED / "w4a16_g128_sym_bf16"
    result = convert(source, tmp_path / "out", TARGET, allow=ASKED)
    anew = {layer.target.name.rpartition(".")[2]: layer.requantized for layer in result.plan.layers}
    assert anew == {f"{leaf}_proj": leaf != "down" for leaf in ("q", "k", "v", "o", "gate", "up", "down")}
    ours, wanted = tensors_of(tmp_path / "out"), weights_of(source)
    for name, weights in wanted.items():
        codes, scales, _ = rounded(weights, BFLOAT16)
        if name.endswith("down_proj"):
            product = ours[f"{name}.weight"] * ours[f"{name}.weight_scale"].astype(np.float32)
            np.testing.assert_array_equal(product, weights, name)
            assert not np.array_equal(ours[f"{name}.weight"], codes)
        else:
            np.testing.assert_array_equal(ours[f"{name}.weight"], codes, name)
            np.testing.assert_array_equal(ours[f"{name}.weight_scale"], scales, name)


def test_inputs_stay_quantized_where_only_weights_are_rounded(tmp_path: Path) -> None:
    result = convert(COMPRESSED / "w8a8_dynamic_wasym_fp16", tmp_path / "out", TARGET, allow=["requantize"])
    assert [loss.code for loss in result.losses] == ["requantize"]
    assert {layer.target.inputs for layer in result.plan.layers} == {"dynamic"}
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text("utf-8"))
    assert description["model_quant_type"] == "W8A8_DYNAMIC"


# --- numbers at the edges -----------------------------------------------------------------------------------------------

LAYER = "model.layers.0.self_attn.o_proj"


def edges(tmp_path: Path, dtype: str) -> tuple[Path, Array]:
    """One layer [128, 128] in groups of 64; row 3 is all zero, the scales of rows 5 to 7 are tiny, row 9 has one weight."""
    made = Model({LAYER: linear(128, 128, group=64)}, model(blocks=1).plain)
    one = made.linears[LAYER]
    codes, scales = one.codes.copy(), one.scales.copy()
    codes[3], scales[5], scales[6], scales[7] = 0, 2e-9, 1e-6, 3e-7
    codes[9] = 0
    codes[9, 77] = -8
    made = replaced(made, LAYER, codes=codes, scales=scales)
    source = write_msmodelslim(tmp_path / "source", made, config={**CONFIG, "torch_dtype": dtype})
    return source, made.linears[LAYER].weights()


@pytest.mark.parametrize(("dtype", "half"), [("float16", np.dtype(np.float16)), ("bfloat16", BFLOAT16)])
def test_rows_of_zeros_and_scales_that_underflow(dtype: str, half: np.dtype[Any], tmp_path: Path) -> None:
    """Zeros have a scale of 1; a scale that float16 rounds to 0 becomes its smallest number: against the layer's weights, nothing."""
    source, weights = edges(tmp_path, dtype)
    result = convert(source, tmp_path / "out", TARGET, allow=ASKED)
    ours = tensors_of(tmp_path / "out")
    codes, scales, error = rounded(weights, half)
    np.testing.assert_array_equal(ours[f"{LAYER}.weight"], codes, strict=True)
    np.testing.assert_array_equal(ours[f"{LAYER}.weight_scale"], scales, strict=True)
    assert not ours[f"{LAYER}.weight"][3].any()
    assert ours[f"{LAYER}.weight_scale"][3, 0] == 1
    assert sorted(np.unique(ours[f"{LAYER}.weight"][9])) == [-127, 0]
    assert (ours[f"{LAYER}.weight_scale"].astype(np.float32) > 0).all()
    assert ours[f"{LAYER}.weight"].min() >= -127
    assert bound_of(result) == pytest.approx(error, rel=1e-5)
    if half == np.float16:
        assert ours[f"{LAYER}.weight_scale"][5].view(np.uint16) == 1
        assert not ours[f"{LAYER}.weight"][5].any()
    assert error <= 1 / 254 + 2.0**-9


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_scale_that_overflows_is_refused(tmp_path: Path) -> None:
    """Weights of 1e8 want a scale that float16 does not have; bfloat16 holds it."""
    made = Model({LAYER: linear(128, 128, group=64)}, model(blocks=1).plain)
    made = replaced(made, LAYER, scales=np.full_like(made.linears[LAYER].scales, 1e7))
    for dtype in ("bfloat16", "float16"):
        source = write_msmodelslim(tmp_path / dtype, made, config={**CONFIG, "torch_dtype": dtype})
        if dtype == "bfloat16":
            assert bound_of(convert(source, tmp_path / "wide", TARGET, allow=ASKED)) <= 1 / 254 + 2.0**-9
            continue
        with pytest.raises(RefusedError, match=LAYER):
            convert(source, tmp_path / "out", TARGET, allow=ASKED)
        assert not (tmp_path / "out").exists()


def test_scales_that_are_not_written_are_no_loss() -> None:
    """Rounding that only the target's own objection asks for: W4A8's two levels, merged, would have been rounded to float16."""
    decided = plan(W8 / "w4a8_dynamic_g32_bf16", TARGET, allow=ASKED)
    assert {loss.code: loss.layers for loss in decided.losses} == {"requantize": 7}


# --- the same bytes, however they come ------------------------------------------------------------------------------


def written(folder: Path) -> dict[str, bytes | None]:
    """All files but the certificate and its summary, which tell how it was run."""
    return {name: content for name, content in snapshot(folder).items() if name not in {"weighbridge.json", "README.md"}}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer of three by four tiles of one leaf, the last row of them cut, among others."""
    made = model(blocks=1)
    big = {"model.layers.0.mlp.down_proj": linear(224, 3072, bias=True)}
    return write_msmodelslim(tmp_path_factory.mktemp("wide") / "source", Model({**made.linears, **big}, made.plain))


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("proof", [True, False])
def test_jobs_tiles_and_proof_change_no_byte(jobs: int, proof: bool, wide: Path, tmp_path: Path) -> None:
    whole = convert(wide, tmp_path / "whole", TARGET, allow=ASKED)
    with small_tiles():
        result = convert(wide, tmp_path / "tiles", TARGET, allow=ASKED, jobs=jobs, proof=proof)
    assert written(tmp_path / "tiles") == written(tmp_path / "whole")
    if proof:
        assert bound_of(result) == bound_of(whole)
        assert result.target_fingerprint == whole.target_fingerprint
    else:
        assert result.source_fingerprint is None
        assert bound_of(result) == pytest.approx(1 / 254), "without a proof only the promise is known"


def test_a_killed_conversion_is_finished_with_the_same_bytes(wide: Path, tmp_path: Path) -> None:
    whole = convert(wide, tmp_path / "whole", TARGET, allow=ASKED)
    with small_tiles(), counted_pwrites() as count:
        convert(wide, tmp_path / "counted", TARGET, allow=ASKED, jobs=1)
    resumed = 0
    for part in (0.3, 0.6, 0.9):
        place = tmp_path / f"place-{part}"
        place.mkdir()
        kill_after(int(count[0] * part), place, wide, place / "out", TARGET, allow=list(ASKED), jobs=1)
        assert HIDDEN in names(place)
        with small_tiles():
            result = convert(wide, place / "out", TARGET, allow=ASKED, jobs=1)
        resumed += result.resumed
        assert written(place / "out") == written(tmp_path / "whole")
        assert bound_of(result) == bound_of(whole)
        assert result.target_fingerprint == whole.target_fingerprint
        assert result.source_fingerprint == whole.source_fingerprint
        assert HIDDEN not in names(place)
    assert resumed == 3
