"""AWQ's gemv, gemv_fast, Marlin and llm-awq: AutoAWQ's own files, read to its weights and written again byte for byte."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    FIXTURES,
    Array,
    Model,
    change_json,
    change_tensors,
    linear,
    model,
    read_folder,
    read_tensors,
    weight_file,
    write_msmodelslim,
)
from test_spelling_rows_awq import FAST_Q, FAST_QWEIGHT
from test_spelling_rows_marlin import B, Q

from convert import convert
from convert.planning import plan
from convert.verification import verify
from formats import open_checkpoint
from formats.awq import GEMV_FAST, words_of_groups
from formats.errors import RefusedError, UnreadableError, WeighbridgeError
from formats.ir import dequantize
from formats.layouts import TileLayout, pack_tiles_reference, unpack_tiles_reference
from formats.marlin import MARLIN, PermutedScales
from formats.scaled_zeros import ScaledZeros, scale_zeros

AWQ = FIXTURES / "awq_gptq"
CASES = {
    "gemm": "awq_gemm_g128_zp",
    "gemv": "awq_gemv_g128_zp",
    "gemv_fast": "awq_gemvfast_g128_zp",
    "marlin": "awq_marlin_g128_nozp",
}


def copy(case: str, folder: Path) -> Path:
    shutil.copytree(AWQ / case, folder)
    return folder


def digest(weights: Array) -> str:
    return hashlib.sha256(weights.astype(np.float16).astype("<f4").tobytes()).hexdigest()


# --- what AutoAWQ wrote -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CASES)
def test_golden_is_recognised_with_its_scheme(variant: str) -> None:
    checkpoint = open_checkpoint(AWQ / CASES[variant])
    assert (checkpoint.format, checkpoint.variant) == ("awq", variant)
    assert len(checkpoint.layer_names) == 14
    args = {checkpoint.layer(name).scheme.weights for name in checkpoint.layer_names}
    assert {(one.bits, one.strategy, one.group_size, one.symmetric) for one in args} == {(4, "group", 128, variant == "marlin")}


def test_marlin_reads_to_what_autoawq_rounded() -> None:
    """AutoAWQ recorded ``round(w / s) * s``, where a small negative weight is -0.0; its sign is the float model's."""
    checkpoint, source = open_checkpoint(AWQ / CASES["marlin"]), open_checkpoint(AWQ / "src_qwen2")
    recorded = json.loads((AWQ / CASES["marlin"] / "dequant_sha256.json").read_text("utf-8"))["tensors"]
    assert {f"{name}.weight" for name in checkpoint.layer_names} == set(recorded)
    for name in checkpoint.layer_names:
        weights = dequantize(checkpoint.layer(name))
        negative = np.signbit(source.plain(f"{name}.weight").data)
        signed = np.where((weights == 0) & negative, np.float32(-0.0), weights)
        assert digest(signed) == recorded[f"{name}.weight"]["sha256_float32_le"], name
        assert (weights == 0).any()


def test_gemm_gemv_and_gemv_fast_goldens_are_the_same_model() -> None:
    folders = [AWQ / CASES[variant] for variant in ("gemm", "gemv", "gemv_fast")]
    for other in folders[1:]:
        assert verify(folders[0], other).same


# --- the writers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
@pytest.mark.parametrize("variant", CASES)
def test_golden_written_again_in_its_variant_is_the_same_bytes(
    variant: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """codes, zero points (padding and the sign of -0.0 too), scales, and every other tensor."""
    monkeypatch.setenv("WEIGHBRIDGE_KERNELS", kernels)
    result = convert(AWQ / CASES[variant], tmp_path / "out", f"awq:{variant}")
    assert result.exact
    wanted, found = read_folder(AWQ / CASES[variant]), read_folder(tmp_path / "out")
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape, found[name].tobytes()) == (array.dtype, array.shape, array.tobytes()), name


@pytest.mark.parametrize("variant", CASES)
def test_config_says_what_autoawq_says(variant: str, tmp_path: Path) -> None:
    convert(AWQ / CASES[variant], tmp_path / "out", f"awq:{variant}")
    wanted, found = (json.loads((folder / "config.json").read_text("utf-8")) for folder in (AWQ / CASES[variant], tmp_path / "out"))
    assert found["quantization_config"] == wanted["quantization_config"]


@pytest.mark.parametrize("variant", ["gemv", "gemv_fast"])
def test_gemm_golden_becomes_the_variants_own_golden(variant: str, tmp_path: Path) -> None:
    """AutoAWQ packed the same rounded weights three ways: our conversion of one is its own file of the other."""
    convert(AWQ / CASES["gemm"], tmp_path / "out", f"awq:{variant}")
    wanted, found = read_folder(AWQ / CASES[variant]), read_folder(tmp_path / "out")
    assert set(found) == set(wanted)
    assert [name for name in wanted if found[name].tobytes() != wanted[name].tobytes()] == []


@pytest.mark.parametrize("variant", ["gemv", "gemv_fast", "marlin"])
def test_there_and_back_is_the_same_fingerprint(variant: str, tmp_path: Path) -> None:
    source = AWQ / CASES["marlin" if variant == "marlin" else "gemm"]
    there = convert(source, tmp_path / "gemm", "awq:gemm")
    middle = convert(tmp_path / "gemm", tmp_path / "middle", f"awq:{variant}")
    back = convert(tmp_path / "middle", tmp_path / "back", "awq:gemm")
    digests = {result.source_fingerprint.digest for result in (there, middle, back) if result.source_fingerprint}
    digests |= {result.target_fingerprint.digest for result in (there, middle, back) if result.target_fingerprint}
    assert len(digests) == 1
    assert there.exact
    assert middle.exact
    assert back.exact


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("variant", ["gemv", "gemv_fast"])
def test_smaller_groups_are_padded_as_their_kernels_load_them(variant: str, group: int, tmp_path: Path) -> None:
    source = write_msmodelslim(tmp_path / "source", model(group=group, symmetric=False, scale_dtype="F16"))
    result = convert(source, tmp_path / "out", f"awq:{variant}")
    assert result.exact
    width = 8 * {32: 4, 64: 2}[group]
    scales = read_folder(tmp_path / "out")["model.layers.0.mlp.down_proj.scales"]
    groups = 192 // group
    padded = scales if variant == "gemv" else scales.T
    assert padded.shape == (128, width)
    assert padded[:, :groups].all()
    assert not padded[:, groups:].any()
    back = convert(tmp_path / "out", tmp_path / "back", "awq:gemm")
    assert back.target_fingerprint is not None
    assert result.target_fingerprint is not None
    assert back.target_fingerprint.digest == result.target_fingerprint.digest


@pytest.mark.parametrize(("groups", "size", "words"), [(2, 128, 1), (9, 128, 2), (4, 64, 2), (17, 64, 4), (2, 32, 4), (33, 32, 8)])
def test_words_of_groups(groups: int, size: int, words: int) -> None:
    assert words_of_groups(groups, size) == words


# --- what they cannot hold --------------------------------------------------------------------------------------------


def test_marlin_refuses_zero_points_by_name() -> None:
    found = plan(AWQ / CASES["gemm"], "awq:marlin")
    assert {refusal.code for refusal in found.refusals} == {"zero-point"}
    assert len(found.refusals) == 14
    text = str(found.refusals[0])
    assert "a zero point of" in text
    assert "symmetric layers only (zero point 8)" in text
    assert "model.layers." in text


def test_marlin_refuses_what_does_not_fill_its_tiles(tmp_path: Path) -> None:
    """down_proj has 192 inputs, no multiple of 128."""
    found = plan(write_msmodelslim(tmp_path / "source", model(group=64)), "awq:marlin")
    assert {refusal.layer.rpartition(".")[2] for refusal in found.refusals if refusal.code == "shape-multiple"} == {"down_proj"}


def test_symmetric_layers_reach_marlin_from_other_formats(tmp_path: Path) -> None:
    source = AWQ / "gptq_v1_4b_g128_sym"
    result = convert(source, tmp_path / "out", "awq:marlin")
    assert result.exact
    assert result.plan.move_counts()["drop-zero-point"] == 14
    assert not [name for name in read_folder(tmp_path / "out") if name.endswith("qzeros")]


def test_marlin_with_one_group_has_the_scale_order_of_channels(tmp_path: Path) -> None:
    """AutoAWQ takes the other permutation where the group is the whole row."""
    made = Model({"model.layers.0.self_attn.o_proj": linear(128, 128, group=128, dtype="F16")}, {})
    source = write_msmodelslim(tmp_path / "source", made)
    assert convert(source, tmp_path / "out", "awq:marlin").exact
    stored = read_folder(tmp_path / "out")["model.layers.0.self_attn.o_proj.scales"]
    scales = made.linears["model.layers.0.self_attn.o_proj"].scales[:, 0]
    np.testing.assert_array_equal(stored[0, :9], scales[[0, 1, 8, 9, 16, 17, 24, 25, 2]])
    assert convert(tmp_path / "out", tmp_path / "back", "awq").exact


def test_product_of_zero_point_and_scale_that_overflows_is_refused() -> None:
    scales, zeros = np.array([[60000]], dtype=np.float16), np.array([[7]], dtype=np.int16)
    with pytest.raises(RefusedError, match="layer: a zero point times its scale does not fit float16"):
        scale_zeros("layer", scales, zeros, 4)


# --- llm-awq ----------------------------------------------------------------------------------------------------------


def test_llm_awq_is_gemv_fast_with_another_name(tmp_path: Path) -> None:
    folder = copy(CASES["gemv_fast"], tmp_path / "llm")

    def rename(tensors: dict[str, Array]) -> None:
        for name in [name for name in tensors if name.endswith(".qzeros")]:
            tensors[name.replace(".qzeros", ".scaled_zeros")] = tensors.pop(name)

    change_tensors(folder / "model.safetensors", rename)
    change_json(folder / "config.json", lambda config: config["quantization_config"].update(version="gemv_fast", backend="llm-awq"))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.variant == "llm-awq"
    assert verify(AWQ / CASES["gemv_fast"], folder).same
    with pytest.raises(RefusedError, match="awq:llm-awq can be read, but not written yet"):
        plan(folder, "awq:llm-awq")


# --- damaged files ----------------------------------------------------------------------------------------------------

LAYER = "model.layers.0.self_attn.k_proj"


def change(case: str, folder: Path, part: str, to: Any) -> Path:
    copy(case, folder)
    change_tensors(weight_file(folder), lambda tensors: tensors.update({f"{LAYER}.{part}": to(tensors[f"{LAYER}.{part}"])}))
    return folder


@pytest.mark.parametrize(
    ("variant", "part", "to", "says"),
    [
        ("gemv", "scales", lambda array: array[:, :4].copy(), "scales is [128, 4], wanted [128, 8]"),
        ("gemv", "qzeros", lambda array: np.repeat(array, 2, axis=1), "qzeros is [128, 2], wanted [128, 1]"),
        ("gemv_fast", "qzeros", lambda array: array[:4].copy(), "qzeros is [4, 128], wanted [8, 128]"),
        ("gemv_fast", "qweight", lambda array: array.view(np.int32), "qweight is I32 [32, 128]; AWQ's GEMVFast layout has"),
        ("gemv_fast", "qweight", lambda array: array[:, :100].copy(), "rows of 100 words do not hold whole tiles of 64 words"),
        ("marlin", "scales", lambda array: array[:, :64].copy(), "they contradict one another"),
        ("marlin", "qweight", lambda array: array[:, :200].copy(), "rows of 200 words do not hold whole tiles of 128 words"),
    ],
)
def test_shapes_that_contradict_one_another(variant: str, part: str, to: Any, says: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(change(CASES[variant], tmp_path / "bad", part, to))
    with pytest.raises(UnreadableError) as caught:
        checkpoint.layer(LAYER)
    assert says in str(caught.value)


def test_zeros_that_are_no_multiples_of_their_scales_are_damaged(tmp_path: Path) -> None:
    folder = change(CASES["gemv_fast"], tmp_path / "bad", "qzeros", lambda array: (array * np.float16(1.3)).astype(np.float16))
    with pytest.raises(UnreadableError, match=f"{LAYER}: zeros divided by scales are"):
        plan(folder, "awq:gemm")


def test_padded_layers_need_the_configs_group_size(tmp_path: Path) -> None:
    folder = copy(CASES["gemv"], tmp_path / "bad")
    change_json(folder / "config.json", lambda config: config["quantization_config"].update(group_size=None))
    with pytest.raises(UnreadableError, match="group_size None in the config"):
        open_checkpoint(folder).layer(LAYER)


def test_unknown_version_is_refused_by_name(tmp_path: Path) -> None:
    folder = copy(CASES["gemm"], tmp_path / "ipex")
    change_json(folder / "config.json", lambda config: config["quantization_config"].update(version="bitblas"))
    with pytest.raises(RefusedError, match="AWQ bitblas"):
        plan(folder, "awq").raise_if_refused()


# --- tiles ------------------------------------------------------------------------------------------------------------

TILES = {"marlin": (MARLIN, B, (Q.astype(np.int8) - 8).T), "gemv_fast": (GEMV_FAST, FAST_QWEIGHT.reshape(1, 64), FAST_Q - 8)}


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
@pytest.mark.parametrize("tile", TILES)
def test_tile_written_out_by_hand(tile: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHBRIDGE_KERNELS", kernels)
    layout, stored, codes = TILES[tile]
    np.testing.assert_array_equal(layout.pack(codes), stored)
    np.testing.assert_array_equal(layout.unpack(stored), codes)


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
@pytest.mark.parametrize("tile", TILES)
def test_rectangles_of_tiles(tile: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rectangle of whole tiles reads as that part of the codes, and packs to the words at its corner."""
    monkeypatch.setenv("WEIGHBRIDGE_KERNELS", kernels)
    layout = TILES[tile][0]
    (high, wide) = layout.tile
    codes = np.random.default_rng(7).integers(-8, 8, (3 * high, 5 * wide)).astype(np.int8)
    stored = layout.pack(codes)
    assert stored.shape == layout.stored_shape(codes.shape)
    assert layout.canonical_shape(stored.shape) == codes.shape
    rebuilt = np.zeros_like(stored)
    for top in range(3):
        for left in range(5):
            for rows, cols in ((slice(top * high, 3 * high), slice(left * wide, 5 * wide)), (slice(None), slice(left * wide, None))):
                np.testing.assert_array_equal(layout.unpack(stored, rows, cols), codes[rows, cols])
            part = layout.pack(codes[top * high : (top + 1) * high, left * wide : (left + 1) * wide])
            row, col = layout.corner(top * high, left * wide)
            rebuilt[row : row + part.shape[0], col : col + part.shape[1]] = part
    np.testing.assert_array_equal(rebuilt, stored)
    with pytest.raises(WeighbridgeError, match="splits a tile"):
        layout.unpack(stored, slice(1, high + 1))
    with pytest.raises(UnreadableError, match="do not fill tiles"):
        layout.pack(codes[:-1])
    with pytest.raises(WeighbridgeError, match="do not fit lanes of 4 bits"):
        layout.pack(codes + np.int8(1) + np.int8(codes.max() < 8))


def test_tile_whose_order_is_no_permutation() -> None:
    with pytest.raises(WeighbridgeError, match="not a permutation"):
        TileLayout(4, "<i4", (2, 4), (0, 1, 2, 3, 4, 5, 6, 6))
    with pytest.raises(WeighbridgeError, match="does not fill words"):
        TileLayout(4, "<i4", (2, 2), (0, 1, 2, 3))


def test_marlins_scales_come_back_in_order() -> None:
    """As test_spelling_rows_marlin has them: in groups 0, 8, ... 56, then 1; with one group 0, 1, 8, 9, ... 25, then 2, 3."""
    grouped = np.arange(256, dtype=np.float16).reshape(2, 128)
    stored = grouped.reshape(2, 2, 8, 8).transpose(0, 1, 3, 2).reshape(2, 128)
    assert stored[0, :3].tolist() == [0, 8, 16]
    np.testing.assert_array_equal(PermutedScales(stored).read(), grouped.T)
    np.testing.assert_array_equal(PermutedScales(stored).read(slice(70, 99), slice(1, 2)), grouped.T[70:99, 1:])
    channels = np.arange(128, dtype=np.float16).reshape(1, 128)
    stored = channels.reshape(4, 4, 4, 2).transpose(0, 2, 1, 3).reshape(1, 128)
    assert stored[0, :5].tolist() == [0, 1, 8, 9, 16]
    np.testing.assert_array_equal(PermutedScales(stored).read(), channels.T)


@pytest.mark.parametrize("dtype", [np.float16])
def test_every_zero_point_comes_back_from_its_product(dtype: Any) -> None:
    """All normal scales whose products do not overflow, and all zero points; under a scale of 0 the middle code."""
    every = np.arange(0x0400, 0x7C00, dtype=np.uint16).view(dtype)
    scales = every[every.astype(np.float32) * 15 < 65504][:, None]
    zeros = np.tile(np.arange(-8, 8, dtype=np.int16), (len(scales), 1))
    wide = np.broadcast_to(scales, zeros.shape)
    np.testing.assert_array_equal(ScaledZeros("layer", scale_zeros("layer", wide, zeros, 4), wide, 4).read(), zeros)
    nothing = np.zeros((1, 16), dtype=dtype)
    np.testing.assert_array_equal(ScaledZeros("layer", scale_zeros("layer", nothing, zeros[:1], 4), nothing, 4).read(), 0)


def test_zero_points_under_a_scale_of_zero_do_not_matter(tmp_path: Path) -> None:
    """gemv_fast cannot say them, and the weights are 0 all the same."""
    folder = copy(CASES["gemm"], tmp_path / "source")

    def silence(tensors: dict[str, Array]) -> None:
        tensors[f"{LAYER}.scales"][0, :8] = 0

    change_tensors(folder / "model.safetensors", silence)
    result = convert(folder, tmp_path / "out", "awq:gemv_fast")
    assert result.exact
    assert not read_tensors(tmp_path / "out" / "model.safetensors")[f"{LAYER}.qzeros"][0, :8].any()


@pytest.mark.parametrize("tile", TILES)
def test_tile_kernels_are_the_reference(tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, on whole matrices and on rectangles whose rows lie apart, aligned to words or not."""
    monkeypatch.setenv("WEIGHBRIDGE_KERNELS", "numba")
    layout = TILES[tile][0]
    high, wide = layout.tile
    rng = np.random.default_rng(11)
    codes = rng.integers(-8, 8, (2 * high, 7 * wide + 5)).astype(np.int8)[:, 3 : 3 + 7 * wide]
    stored = layout.pack(codes)
    np.testing.assert_array_equal(stored, pack_tiles_reference(layout, codes))
    assert stored.dtype == layout.word_dtype
    shifted = np.frombuffer(b"x" + stored.tobytes(), dtype=np.uint8)[1:].view(stored.dtype).reshape(stored.shape)
    for source in (stored, shifted):
        np.testing.assert_array_equal(layout.unpack(source), unpack_tiles_reference(layout, stored))
        found = layout.unpack(source, slice(high, None), slice(wide, 3 * wide), "i2")
        np.testing.assert_array_equal(found, codes[high:, wide : 3 * wide])
        assert found.dtype == np.int16


@pytest.mark.parametrize("case", ["gptq_v1_2b_g64_asym", "gptq_v1_3b_g128_asym", "gptqmodel_v2_3b_g128"])
def test_fewer_bits_keep_their_weights_where_zero_points_are_multiplied_by_scales(case: str, tmp_path: Path) -> None:
    source = Path(__file__).parent.parent / "fixtures" / "awq_gptq" / case
    result = convert(source, tmp_path / "out", "awq:gemv_fast", proof=False)
    assert "widen-codes" in result.plan.move_counts()
    assert verify(source, tmp_path / "out").same
