"""What holds for the samples of every format's tensor table together: schemes as JSON, regions both ways, refused shapes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_spelling_rows_awq as awq
import test_spelling_rows_compressed_tensors as compressed_tensors
import test_spelling_rows_golden_stick as golden_stick
import test_spelling_rows_gptq as gptq
import test_spelling_rows_lmdeploy as lmdeploy
import test_spelling_rows_marlin as marlin
import test_spelling_rows_msmodelslim as msmodelslim
from hypothesis import given
from hypothesis import strategies as st
from spelling import ATTENTION, AttentionSample, LinearSample, Row, assert_same_values, group, linear, refused_message

from formats.errors import UnreadableError
from formats.ir import Array, AttentionQuant, QuantArgs, QuantizedLinear, QuantScheme, Region, assemble, scale_grid

FAMILIES = (awq, compressed_tensors, golden_stick, gptq, lmdeploy, marlin, msmodelslim)


ROWS = {f"{family.__name__}.{name}": row for family in FAMILIES for name, row in family.ROWS.items()}


def schemes_of(row: Row) -> list[QuantScheme]:
    """The schemes of a row's sample; the args of an attention sample's operands stand for weights."""
    sample = row()
    if isinstance(sample, LinearSample):
        return [sample.layer.scheme]
    return [QuantScheme(args) for args in sample.attention.args.values()] if isinstance(sample, AttentionSample) else []


def test_schemes_come_back_from_json() -> None:
    for name, row in ROWS.items():
        for scheme in schemes_of(row):
            again = QuantScheme.from_json(scheme.to_json())
            assert again == scheme, name
            assert hash(again) == hash(scheme), name
            assert again.to_json() == scheme.to_json(), name


def test_schemes_are_equal_exactly_if_their_json_is() -> None:
    schemes = [scheme for row in ROWS.values() for scheme in schemes_of(row)]
    for one, other in itertools.combinations(schemes, 2):
        assert (one == other) == (one.to_json() == other.to_json())


@given(
    heads=st.integers(1, 3),
    half=st.integers(1, 4),
    permuted=st.booleans(),
    experts=st.integers(0, 2),
    width=st.integers(1, 4),
    before=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    step=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    all_columns=st.booleans(),
)
def test_region_put_is_the_inverse_of_take(
    heads: int,
    half: int,
    permuted: bool,
    experts: int,
    width: int,
    before: tuple[int, int],
    step: tuple[int, int],
    all_columns: bool,
) -> None:
    height = 2 * half * heads
    stop = (before[0] + step[0] * height, before[1] + step[1] * width)
    shape = (stop[0] + 2, width if all_columns else stop[1] + 1)
    index = () if experts == 0 else (experts - 1,)
    stored = np.arange(np.prod(shape) * max(experts, 1)).reshape((experts, *shape) if experts else shape)
    region = Region(
        "fused",
        index,
        rows=(before[0], stop[0], step[0]),
        cols=None if all_columns else (before[1], stop[1], step[1]),
        head_dim=2 * half if permuted else None,
    )
    part = region.take(stored).copy()
    # canonical rows of a head are its stored rows 0, 2, 4, ..., then 1, 3, 5, ...
    order = np.arange(height).reshape(heads, half, 2).swapaxes(1, 2).ravel() if permuted else np.arange(height)
    columns = np.arange(width) if all_columns else before[1] + step[1] * np.arange(width)
    np.testing.assert_array_equal(part, stored[index][np.ix_(before[0] + step[0] * order, columns)])
    again = stored.copy()
    region.put(again, part)
    np.testing.assert_array_equal(again, stored)
    region.put(again, part + 10_000)
    np.testing.assert_array_equal(region.take(again), part + 10_000)
    assert int((again != stored).sum()) == part.size


def test_region_of_a_rotary_permutation_written_out() -> None:
    """A head of 6 rows: stored row 2j + h holds canonical row 3h + j."""
    stored = np.array([[0], [3], [1], [4], [2], [5]])
    assert Region("q", head_dim=6).take(stored)[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_region_of_columns_written_out() -> None:
    expert = np.array([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    stored = np.stack([expert, expert + 100])
    region = Region("fused", index=(1,), rows=(1, 3, 1), cols=(0, 5, 2))
    assert region.take(stored).tolist() == [[105, 107, 109], [110, 112, 114]]
    assert Region("bias", rows=(1, 3, 1), cols=(0, 5, 2)).take(np.array([0, 1, 2, 3])).tolist() == [1, 2]


@st.composite
def tiled(draw: st.DrawFn) -> tuple[list[Region], dict[str, Array], Array]:
    """A layer cut into a grid of parts in any order, each amid other values of a stored tensor of its own."""
    heights, widths = (draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)) for _ in range(2))
    whole = np.arange(sum(heights) * sum(widths)).reshape(sum(heights), sum(widths))
    regions, stored = [], {}
    for (row, height), (column, width) in itertools.product(enumerate(heights), enumerate(widths)):
        at = sum(heights[:row]), sum(widths[:column])
        margin, step = draw(st.integers(0, 2)), draw(st.integers(1, 2))
        name = f"part {row} {column}"
        cuts = [(margin, margin + step * extent, step) for extent in (height, width)]
        stored[name] = np.full((cuts[0][1] + 1, cuts[1][1] + 1), -1)
        part = whole[at[0] : at[0] + height, at[1] : at[1] + width]
        for (i, j), value in np.ndenumerate(part):
            stored[name][margin + step * i, margin + step * j] = value
        regions.append(Region(name, rows=cuts[0], cols=cuts[1], at=at))
    return draw(st.permutations(regions)), stored, whole


@given(tiled())
def test_assemble_of_parts_in_any_order(case: tuple[list[Region], dict[str, Array], Array]) -> None:
    regions, stored, whole = case
    shape = whole.shape[0], whole.shape[1]
    np.testing.assert_array_equal(assemble(regions, stored, shape), whole)
    before = {name: array.copy() for name, array in stored.items()}
    assemble(regions, stored, shape)[...] = -2  # a copy
    for name, array in stored.items():
        np.testing.assert_array_equal(array, before[name])
    with pytest.raises(UnreadableError, match="one is missing"):
        assemble(regions[1:], stored, shape)
    with pytest.raises(UnreadableError, match="lies upon another"):
        assemble([*regions, regions[0]], stored, shape)
    del stored[regions[0].tensor]
    with pytest.raises(UnreadableError, match=f"{regions[0].tensor}: is missing"):
        assemble(regions, stored, shape)
    stored[regions[0].tensor] = before[regions[0].tensor]
    with pytest.raises(UnreadableError, match=regions[0].tensor):
        assemble([replace(regions[0], at=(shape[0], 0)), *regions[1:]], stored, shape)


RANKS = {"w.0": np.array([[1, 2]]), "w.1": np.array([[3, 4]])}


def test_assemble_refuses_a_part_upon_another() -> None:
    with pytest.raises(UnreadableError, match=r"w\.1: .* lies upon another"):
        assemble([Region("w.0"), Region("w.1")], RANKS, (2, 2))


def test_assemble_refuses_parts_of_two_dtypes() -> None:
    parts = {"w.0": np.array([[1, 2]], dtype=np.int8), "w.1": np.array([[300.5, 4.0]], dtype=np.float32)}
    with pytest.raises(UnreadableError, match=r"w\.1: is float32, another part of the layer int8"):
        assemble([Region("w.0"), Region("w.1", at=(1, 0))], parts, (2, 2))


def test_assemble_of_a_bias() -> None:
    """w_qkv.{r}.bias [(q + k + v) / tp]."""
    biases = {"w_qkv.0.bias": np.array([1, 2, 5]), "w_qkv.1.bias": np.array([3, 4, 6])}
    regions = [Region("w_qkv.0.bias", rows=(0, 2, 1)), Region("w_qkv.1.bias", rows=(0, 2, 1), at=(2, 0))]
    assert assemble(regions, biases, (4,)).tolist() == [1, 2, 3, 4]


def eight_groups(**parts: Any) -> QuantizedLinear:
    """[2 out, 8 in] in 4 groups."""
    return linear(group(4, 2), np.zeros((2, 8), dtype=np.int8), np.ones((2, 4), dtype=np.float32), **parts)


FITTING = {
    "input_scale": ((1,), (8,)),
    "input_zero_point": ((1,), (8,)),
    "outer": ((1,), (2, 1)),
}
UNFITTING = {
    "input_scale": ((), (2,), (4,), (1, 1), (8, 1)),
    "input_zero_point": ((), (2,), (4,), (1, 1), (8, 1)),
    "outer": ((), (2,), (2, 0), (2, 2), (2, 3), (2, 8), (1, 2), (4, 2), (2, 2, 1)),
}


@pytest.mark.parametrize(("part", "shape"), [(part, shape) for part, shapes in FITTING.items() for shape in shapes])
def test_check_accepts(part: str, shape: tuple[int, ...]) -> None:
    layer = eight_groups(**{part: np.ones(shape, dtype=np.float32)})
    layer.check()
    assert scale_grid(layer).shape == (2, 4)


@pytest.mark.parametrize(("part", "shape"), [(part, shape) for part, shapes in UNFITTING.items() for shape in shapes])
def test_check_refuses(part: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UnreadableError) as caught:
        eight_groups(**{part: np.ones(shape, dtype=np.float32)}).check()
    assert refused_message(caught.value, [part, str(shape)])


def test_outer_blocks_fit_the_groups() -> None:
    """Blocks of outer_size inputs, the last one cut short: 3 of 6 inputs cover 3 + 3, of 4 inputs 4 + 4, groups of 2 whole in each."""
    eight_groups(outer=np.ones((2, 2), dtype=np.float32), outer_size=6).check()
    with pytest.raises(UnreadableError, match="splits its groups"):
        eight_groups(outer=np.ones((2, 3), dtype=np.float32), outer_size=3).check()
    with pytest.raises(UnreadableError, match="outer has shape"):
        eight_groups(outer=np.ones((2, 3), dtype=np.float32), outer_size=6).check()


@given(size=st.sampled_from((2, 4, 6, 8)), divides=st.booleans(), data=st.data())
def test_outer_by_hand(size: int, divides: bool, data: st.DataObject) -> None:
    """scales[o, g] times (or over) outer[o, 2 * g // size], in float64 and rounded once."""
    factors = st.floats(2**-10, 2**10, width=32)
    scales, outer = ([[data.draw(factors) for _ in range(n)] for _ in range(2)] for n in (4, -(-8 // size)))
    outer_parts = {"outer": np.array(outer, dtype=np.float32), "outer_size": size, "outer_divides": divides}
    layer = replace(eight_groups(**outer_parts), scales=np.array(scales, dtype=np.float32))
    layer.check()
    wanted = [
        [scale / outer[o][2 * g // size] if divides else scale * outer[o][2 * g // size] for g, scale in enumerate(row)]
        for o, row in enumerate(scales)
    ]
    assert_same_values(scale_grid(layer), np.array(wanted))


ONE = np.ones((2, 1), dtype=np.float32)
KEY = {"key": QuantArgs(8)}
DYNAMIC = QuantArgs(8, dynamic=True)


@pytest.mark.parametrize(
    ("attention", "found"),
    [
        (AttentionQuant(ATTENTION, "fa", {}, scales={"key": ONE}), "key has a scale but no arguments"),
        (AttentionQuant(ATTENTION, "fa", KEY, scales={"key": ONE}, zero_points={"key": ONE[:1]}), "zero points of shape (1, 1)"),
        (AttentionQuant(ATTENTION, "fa", KEY, scales={"key": ONE}, offsets={"key": ONE[:, 0]}), "offsets of shape (2,)"),
        (AttentionQuant(ATTENTION, "fa", KEY, scales={}), "key is quantized statically but has no scale"),
        (AttentionQuant(ATTENTION, "fa", {"key": DYNAMIC}, scales={}, zero_points={"key": ONE}), "no scale"),
        (AttentionQuant(ATTENTION, "fa", {"key": DYNAMIC}, scales={}, offsets={"key": ONE}), "no scale"),
    ],
)
def test_attention_check_refuses(attention: AttentionQuant, found: str) -> None:
    with pytest.raises(UnreadableError) as caught:
        attention.check()
    assert str(caught.value).startswith(ATTENTION)
    assert found in str(caught.value)
