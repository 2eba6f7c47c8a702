"""Exact moves: each comes back by its inverse, changes nothing it was given, and the inverse refuses what it cannot undo."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from convert import moves
from convert.matrices import scales_of
from formats import awq, gptq, msmodelslim
from formats.errors import WeighbridgeError
from formats.ir import Array, QuantArgs, QuantizedLinear, QuantScheme, dequantize
from formats.layouts import PackLayout

GRIDS = hnp.arrays(
    st.sampled_from([np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.int16)]),
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements={"allow_nan": False},
)
"""Scales or zero points, [out, groups]."""

COMES_BACK = {
    "repack": "test_repacked_codes_come_back",
    "rebase-zero-point": "test_rebased_zero_points_come_back",
    "repeat-scales": "test_repeated_groups_merge_again",
    "split-groups": "test_repeated_groups_merge_again",
    "spell-zero-point": "test_a_zero_point_that_was_spelled_out_can_be_dropped",
    "drop-zero-point": "test_a_zero_point_that_was_dropped_can_be_spelled_out",
    "widen-codes": "test_widened_codes_come_back",
    "spell-g_idx": "test_a_g_idx_that_was_spelled_out_can_be_dropped",
    "merge-scales": "test_merged_scales_come_apart_again",
    "dequantize": "test_dequantized_weights_give_the_codes_back",
}


def frozen(array: Array) -> Array:
    """A copy that cannot be written to: a move that tries to is an error."""
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def test_every_move_that_a_plan_can_name_has_its_inverse_tested_here() -> None:
    assert set(moves.MOVES) == set(COMES_BACK)
    assert set(COMES_BACK.values()) <= set(globals())


# Groups


@given(GRIDS, st.integers(1, 5))
def test_repeated_groups_merge_again(grid: Array, times: int) -> None:
    grid = frozen(grid)
    repeated = frozen(moves.repeat_groups(grid, times))
    assert repeated.shape == (grid.shape[0], grid.shape[1] * times)
    assert all(repeated[:, g].tobytes() == grid[:, g // times].tobytes() for g in range(repeated.shape[1]))
    merged = moves.merge_groups(repeated, times)
    assert merged.dtype == repeated.dtype == grid.dtype
    np.testing.assert_array_equal(merged, grid)


@given(GRIDS, st.integers(2, 5), st.data())
def test_groups_that_differ_do_not_merge(grid: Array, times: int, data: st.DataObject) -> None:
    repeated = moves.repeat_groups(grid, times)
    row, group = (data.draw(st.integers(0, side - 1)) for side in repeated.shape)
    repeated[row, group] = 1 if repeated[row, group] != 1 else 2
    with pytest.raises(WeighbridgeError, match=f"groups that differ cannot be merged {times} to one"):
        moves.merge_groups(repeated, times)


def test_groups_that_do_not_fill_whole_ones_do_not_merge() -> None:
    with pytest.raises(WeighbridgeError):
        moves.merge_groups(np.ones((2, 3), dtype=np.float16), 2)


# Zero points


@given(st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_a_zero_point_that_was_spelled_out_can_be_dropped(shape: tuple[int, int]) -> None:
    spelled = moves.spell_zero_point(shape)
    assert (spelled.shape, spelled.dtype) == (shape, np.int16)
    assert not spelled.any()
    moves.drop_zero_point(frozen(spelled))


@given(st.tuples(st.integers(1, 5), st.integers(1, 5)), st.sampled_from([2, 3, 4, 8]), st.data())
def test_a_zero_point_that_was_dropped_can_be_spelled_out(shape: tuple[int, int], bits: int, data: st.DataObject) -> None:
    """The law says the same without a zero point, with one that is spelled out, and with nothing after it was dropped."""
    codes = data.draw(hnp.arrays(np.int8, shape, elements=st.integers(-(1 << bits - 1), (1 << bits - 1) - 1)))
    scheme, scales = QuantScheme(QuantArgs(bits)), np.full((shape[0], 1), 0.37, dtype=np.float32)
    spelled = frozen(moves.spell_zero_point((shape[0], 1)))
    said = dequantize(QuantizedLinear("layer", shape, scheme, codes, scales, spelled))
    unsaid = dequantize(QuantizedLinear("layer", shape, scheme, codes, scales, moves.drop_zero_point(spelled)))
    np.testing.assert_array_equal(said, unsaid)


@given(st.tuples(st.integers(1, 5), st.integers(1, 5)), st.integers(-128, 128).filter(bool), st.data())
def test_a_zero_point_that_is_not_zero_is_not_dropped(shape: tuple[int, int], value: int, data: st.DataObject) -> None:
    zero_points = moves.spell_zero_point(shape)
    zero_points[tuple(data.draw(st.integers(0, side - 1)) for side in shape)] = value
    with pytest.raises(WeighbridgeError, match=f"a zero point of {value} cannot be left unsaid"):
        moves.drop_zero_point(frozen(zero_points))


# g_idx


@given(st.integers(1, 60), st.one_of(st.just(-1), st.integers(1, 60)))
def test_a_g_idx_that_was_spelled_out_can_be_dropped(in_features: int, group_size: int) -> None:
    g_idx = frozen(moves.spell_g_idx(in_features, group_size))
    assert g_idx.dtype == np.int32
    assert g_idx.tolist() == [0 if group_size == -1 else i // group_size for i in range(in_features)]
    moves.drop_g_idx(g_idx, group_size)


@given(st.integers(1, 60), st.one_of(st.just(-1), st.integers(1, 60)), st.data())
def test_an_irregular_g_idx_is_not_dropped(in_features: int, group_size: int, data: st.DataObject) -> None:
    g_idx = moves.spell_g_idx(in_features, group_size)
    g_idx[data.draw(st.integers(0, in_features - 1))] += data.draw(st.sampled_from([-1, 1, 2]))
    with pytest.raises(WeighbridgeError, match="an irregular g_idx cannot be left unsaid"):
        moves.drop_g_idx(frozen(g_idx), group_size)


def test_a_g_idx_of_other_groups_is_not_dropped() -> None:
    with pytest.raises(WeighbridgeError, match="irregular"):
        moves.drop_g_idx(moves.spell_g_idx(8, 2), 4)


# Two levels of scales


OUTERS = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(1)), elements=st.floats(2**-100, 2**100, width=32))
"""Outer scales, [out, 1]."""


def two_levels(outer: Array, inner: Array) -> QuantizedLinear:
    """A layer of 4 bits whose codes are all that there are, in each of its groups of 16."""
    out, groups = inner.shape
    codes = frozen(np.tile(np.arange(-8, 8, dtype=np.int8), (out, groups)))
    scheme = QuantScheme(QuantArgs(4, strategy="group", group_size=16))
    return QuantizedLinear("layer", (out, 16 * groups), scheme, codes, frozen(inner), outer=frozen(outer))


@given(OUTERS, st.integers(1, 4), st.data())
def test_merged_scales_come_apart_again(outer: Array, groups: int, data: st.DataObject) -> None:
    """msModelSlim's inner scales are small whole numbers, so the outer ones divide them out of the product, rounded as it is."""
    inner = data.draw(hnp.arrays(np.float32, (len(outer), groups), elements=st.integers(1, 1 << 12).map(float)))
    merged = frozen(scales_of(two_levels(outer, inner)))
    assert (merged.shape, merged.dtype) == (inner.shape, np.float32)
    np.testing.assert_array_equal(np.rint(merged / outer), inner)


@given(OUTERS, st.integers(1, 4), st.data())
def test_merged_scales_give_the_same_weights(outer: Array, groups: int, data: st.DataObject) -> None:
    """Whatever they are: the law itself multiplies the levels in float32 first."""
    elements = st.floats(2**-20, 2**20, width=32)
    layer = two_levels(outer, data.draw(hnp.arrays(np.float32, (len(outer), groups), elements=elements)))
    one_level = QuantizedLinear("layer", layer.shape, layer.scheme, layer.codes, frozen(scales_of(layer)))
    np.testing.assert_array_equal(dequantize(one_level), dequantize(layer))
    wanted = (np.asarray(layer.outer) * np.asarray(layer.scales)).repeat(16, axis=1) * np.asarray(layer.codes)
    np.testing.assert_array_equal(dequantize(one_level), wanted)


# Codes, which the layouts move


def codes_of(layout: PackLayout, seed: int, shape: tuple[int, int] = (32, 32)) -> Array:
    return np.random.default_rng(seed).integers(layout.low, layout.low + (1 << layout.bits), shape).astype(np.int16)


FOUR_BITS = (awq.GEMM, gptq.codes_layout(4), msmodelslim.PACKED_ROWS, msmodelslim.PACKED_COLUMNS)


@given(st.sampled_from(FOUR_BITS), st.sampled_from(FOUR_BITS), st.integers(0, 1 << 32))
def test_repacked_codes_come_back(source: PackLayout, target: PackLayout, seed: int) -> None:
    stored = frozen(source.pack(codes_of(source, seed)))
    moved = frozen(target.pack(source.unpack(stored)))
    again = source.pack(target.unpack(moved))
    assert again.dtype == stored.dtype
    np.testing.assert_array_equal(again, stored)


@given(st.sampled_from(gptq.BITS), st.integers(0, 1 << 32))
def test_rebased_zero_points_come_back(bits: int, seed: int) -> None:
    """Signed in the IR, minus one in v1, unsigned in v2: three spellings of one integer, one lane apart."""
    v1, v2 = gptq.zeros_layout(bits, "v1"), gptq.zeros_layout(bits, "v2")
    zero_points = frozen(codes_of(v1, seed))
    one_less = frozen(v1.pack(zero_points))
    as_it_is = frozen(v2.pack(v1.unpack(one_less, dtype="<i2")))
    np.testing.assert_array_equal(v1.pack(v2.unpack(as_it_is, dtype="<i2")), one_less)
    np.testing.assert_array_equal(v2.unpack(as_it_is, dtype="<i2"), zero_points)
    np.testing.assert_array_equal(v2.unpack(one_less, dtype="<i2"), np.where(zero_points == v1.low, -v1.low, zero_points) - 1)


@given(st.sampled_from([2, 3, 4]), st.sampled_from([gptq.codes_layout(8), msmodelslim.CONTAINER]), st.integers(0, 1 << 32))
def test_widened_codes_come_back(bits: int, carrier: PackLayout, seed: int) -> None:
    narrow = gptq.codes_layout(bits)
    stored = frozen(narrow.pack(codes_of(narrow, seed)))
    codes = frozen(narrow.unpack(stored))
    carried = frozen(carrier.pack(codes))
    np.testing.assert_array_equal(carrier.unpack(carried), codes)
    np.testing.assert_array_equal(narrow.pack(carrier.unpack(carried)), stored)


@given(st.sampled_from([2, 3, 4]), st.integers(0, 1 << 32), st.data())
def test_codes_that_need_the_wider_carrier_are_not_narrowed(bits: int, seed: int, data: st.DataObject) -> None:
    narrow, carrier = gptq.codes_layout(bits), gptq.codes_layout(8)
    codes = codes_of(narrow, seed)
    beyond = st.one_of(st.integers(-128, narrow.low - 1), st.integers(-narrow.low, 127))
    codes[data.draw(st.integers(0, 31)), data.draw(st.integers(0, 31))] = data.draw(beyond)
    with pytest.raises(WeighbridgeError, match=re.escape(f"do not fit lanes of {bits} bits that hold {narrow.low} to {-narrow.low - 1}")):
        narrow.pack(carrier.unpack(carrier.pack(codes)))


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    scale=st.floats(2**-100, 2**100, width=32),
    zero=st.integers(-128, 128),
    symmetric=st.booleans(),
)
def test_dequantized_weights_give_the_codes_back(bits: int, scale: float, zero: int, symmetric: bool) -> None:
    """With the scale and the zero point known, the law's float32 values hold every code."""
    half = 1 << (bits - 1)
    codes = frozen(np.arange(-half, half, dtype=np.int8)[None])
    zero_points = None if symmetric else frozen(np.full((1, 1), zero % half, dtype=np.int16))
    scales = frozen(np.full((1, 1), scale, dtype=np.float32))
    layer = QuantizedLinear("layer", (1, 2 * half), QuantScheme(QuantArgs(bits, symmetric=symmetric)), codes, scales, zero_points)
    again = np.rint(dequantize(layer) / scales) + (0 if zero_points is None else zero_points)
    np.testing.assert_array_equal(again, codes)
