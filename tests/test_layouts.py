"""Bit layouts: words written out by hand, then the NumPy reference and the Numba kernels on random layouts, bit for bit."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from formats import awq, gptq, ir, layouts, mindspore_target, msmodelslim
from formats.errors import UnreadableError, WeighbridgeError
from formats.ir import Array, QuantArgs, QuantizedLinear, QuantScheme
from formats.layouts import PackedMatrix, PackLayout, pack_reference, unpack_reference

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="Numba is not installed")
ENGINES = [pytest.param("numba", marks=needs_numba), "numpy"]
unhurried = settings(deadline=None, max_examples=150)


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Inside, the layouts use the Numba kernels ("numba") or the reference ("numpy")."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEIGHBRIDGE_KERNELS", name)
        assert (layouts.kernels() is None) == (name == "numpy")
        yield


def words(*rows: list[int]) -> Array:
    """Stored int32 words, a list a row; the lowest bits are at the right of a hexadecimal literal."""
    return np.array(rows, dtype=np.uint32).view("<i4")


def unsigned(*rows: list[int], zero: int = 8) -> Array:
    """Signed codes from unsigned ones."""
    return (np.array(rows) - zero).astype(np.int8)


def assert_spelled(layout: PackLayout, codes: Array, stored: Array, name: str) -> None:
    with engine(name):
        packed = layout.pack(codes)
        assert packed.dtype == stored.dtype
        np.testing.assert_array_equal(packed, stored)
        np.testing.assert_array_equal(layout.unpack(stored), codes)


# Words written out by hand


@pytest.mark.parametrize("name", ENGINES)
def test_awq_qweight_holds_even_columns_in_the_low_half_of_a_word(name: str) -> None:
    """Lane i, counted from the right, holds column ORDER[i] = 0 2 4 6 1 3 5 7: column n holding n reads 7531 6420."""
    by_input = unsigned(list(range(16)), list(range(15, -1, -1)))
    assert_spelled(awq.GEMM, by_input.T, words([0x75316420, 0xFDB9ECA8], [0x8ACE9BDF, 0x02461357]), name)


@pytest.mark.parametrize("name", ENGINES)
def test_awq_qzeros_hold_the_unsigned_zero_point_as_it_is(name: str) -> None:
    """Group 0 is symmetric (zero point 0, unsigned 8); group 1 holds 0 to 7 in the same lane order."""
    by_group = unsigned([8] * 8, list(range(8)))
    assert_spelled(awq.GEMM, by_group.T, words([0x88888888], [0x75316420]), name)


@pytest.mark.parametrize("name", ENGINES)
def test_gptq_qweight_of_4_bits_holds_input_0_in_the_lowest_nibble(name: str) -> None:
    """A column of words a row of outputs: output 0 has the inputs 1..8, output 1 has 15 8 0 0 0 0 0 7."""
    codes = unsigned([1, 2, 3, 4, 5, 6, 7, 8], [15, 8, 0, 0, 0, 0, 0, 7])
    assert_spelled(gptq.codes_layout(4), codes, words([0x87654321, 0x7000008F]), name)


@pytest.mark.parametrize("name", ENGINES)
def test_gptq_qweight_of_8_bits_holds_input_0_in_the_lowest_byte(name: str) -> None:
    """The signed codes -127 0 127 -128 are 01 80 ff 00 unsigned."""
    codes = np.array([[-127, 0, 127, -128]], dtype=np.int8)
    assert_spelled(gptq.codes_layout(8), codes, words([0x00FF8001]), name)


@pytest.mark.parametrize("name", ENGINES)
def test_gptq_qweight_of_2_bits_holds_four_inputs_a_byte(name: str) -> None:
    """0 1 2 3 from the right is 11 10 01 00 = e4; 3 3 3 3 is ff; 1 0 0 0 is 01."""
    codes = unsigned([0, 1, 2, 3, 3, 3, 3, 3, 0, 0, 0, 0, 1, 0, 0, 0], zero=2)
    assert_spelled(gptq.codes_layout(2), codes, words([0x0100FFE4]), name)


@pytest.mark.parametrize("name", ENGINES)
def test_gptq_qweight_of_3_bits_straddles_words(name: str) -> None:
    """32 inputs in 96 bits. Input 10 has bits 30..32: two in word 0, one in word 1; input 21 has 63..65: one and two.

    Output 0: input 0 = 111 (bits 0..2); input 10 = 101 (bit 30, and bit 0 of word 1); input 21 = 110 (bits 0 and 1
    of word 2); input 31 = 001 (bit 93, bit 29 of word 2).
    Output 1: input 10 = 010 (bit 31); input 21 = 011 (bit 31 of word 1 and bit 0 of word 2).
    """
    lanes = np.zeros((2, 32), dtype=np.int8)
    lanes[0, [0, 10, 21, 31]] = 0b111, 0b101, 0b110, 0b001
    lanes[1, [10, 21]] = 0b010, 0b011
    stored = words([0x40000007, 0x80000000], [0x00000001, 0x80000000], [0x20000003, 0x00000001])
    assert_spelled(gptq.codes_layout(3), lanes - np.int8(4), stored, name)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    ("bits", "variant", "zero_points", "stored"),
    [
        (4, "v2", range(8), [0x76543210]),
        (4, "v1", range(8), [0x6543210F]),  # z - 1: 0 becomes -1, which wraps to f
        (4, "v1", [8] * 8, [0x77777777]),  # a symmetric layer as AutoGPTQ writes it
        (8, "v2", [0, 1, 128, 255], [0xFF800100]),
        (8, "v1", [0, 1, 128, 255], [0xFE7F00FF]),  # 0 wraps to ff
        (2, "v1", [0, 1, 2, 3] * 4, [0x93939393]),  # lanes 3 0 1 2 from the right: 10 01 00 11
        (3, "v1", [4] * 32, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),  # lanes 011, 32 times, over three words
        (3, "v2", [4] * 32, [0x24924924, 0x49249249, 0x92492492]),  # lanes 100
    ],
)
def test_gptq_qzeros_hold_one_less_in_v1_and_the_zero_point_in_v2(
    bits: int, variant: str, zero_points: Any, stored: Any, name: str
) -> None:
    one_group = unsigned(list(zero_points), zero=1 << (bits - 1)).T
    assert_spelled(gptq.zeros_layout(bits, variant), one_group, words(stored), name)


@pytest.mark.parametrize("name", ENGINES)
def test_msmodelslim_packs_two_output_rows_a_byte_the_even_one_low(name: str) -> None:
    """Column 0: rows 1 and -1 (nibbles 1 and f) are f1; column 1: -8 and 7 (8 and 7) are 78; then 0 and 1, -1 and 0."""
    codes = np.array([[1, -8], [-1, 7], [0, -1], [1, 0]], dtype=np.int8)
    assert_spelled(msmodelslim.PACKED_ROWS, codes, np.array([[0xF1, 0x78], [0x10, 0x0F]], dtype=np.uint8).view("i1"), name)


@pytest.mark.parametrize("name", ENGINES)
def test_msmodelslim_packs_two_inputs_a_byte_the_even_one_low(name: str) -> None:
    codes = np.array([[1, -1, -8, 7], [0, 1, -1, 0]], dtype=np.int8)
    assert_spelled(msmodelslim.PACKED_COLUMNS, codes, np.array([[0xF1, 0x78], [0x10, 0x0F]], dtype=np.uint8).view("i1"), name)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("outputs", [4, 8, 12, 24])
def test_golden_stick_packs_two_outputs_a_byte_by_input(outputs: int, name: str) -> None:
    """Output o of input 0 holds o modulo 8, of input 1 -8: bytes 10 32 54 76 10 ... and 88 88 ..., the even output low."""
    by_input = np.array([[o % 8 for o in range(outputs)], [-8] * outputs], dtype=np.int8)
    stored = np.array([([0x10, 0x32, 0x54, 0x76] * 3)[: outputs // 2], [0x88] * (outputs // 2)], dtype=np.uint8).view("i1")
    assert_spelled(mindspore_target.NIBBLES, by_input.T, stored, name)


@pytest.mark.parametrize("name", ENGINES)
def test_a_container_byte_is_the_code_and_is_read_without_copying(name: str) -> None:
    codes = np.array([[-128, -1, 0], [1, 7, 127]], dtype=np.int8)
    assert_spelled(msmodelslim.CONTAINER, codes, codes.copy(), name)
    assert np.shares_memory(msmodelslim.CONTAINER.unpack(codes), codes)


# Random layouts


DECLARED = (
    awq.GEMM,
    *(gptq.codes_layout(bits) for bits in gptq.BITS),
    *(gptq.zeros_layout(bits, variant) for bits in gptq.BITS for variant in ("v1", "v2")),
    msmodelslim.CONTAINER,
    msmodelslim.PACKED_ROWS,
    msmodelslim.PACKED_COLUMNS,
    mindspore_target.NIBBLES,
)


@st.composite
def any_layout(draw: st.DrawFn) -> PackLayout:
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    half = 1 << (bits - 1)
    word = draw(st.sampled_from(["i1", "<i2", "<i4", "<i8"]))
    lanes = 8 * np.dtype(word).itemsize // bits
    length = draw(st.one_of(st.just(0), st.just(lanes), st.integers(1, 12)))
    return PackLayout(
        bits,
        word,
        draw(st.sampled_from(["out", "in"])),
        draw(st.booleans()),
        tuple(draw(st.permutations(range(length)))),
        *draw(st.sampled_from([(0, -half), (half, -half), (half - 1, -half), (0, 0)])),
    )


LAYOUTS = st.one_of(st.sampled_from(DECLARED), any_layout())


@st.composite
def layouts_with_codes(draw: st.DrawFn, spans: int = 9, lines: int = 70) -> tuple[PackLayout, Array]:
    """A layout and codes that it holds; more words and lines than a block of the kernels, and a whole number of spans."""
    layout = draw(LAYOUTS)
    packed, other = layout.span * draw(st.integers(1, spans)), draw(st.integers(1, lines))
    shape = (packed, other) if layout.axis == "out" else (other, packed)
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    codes = random.integers(layout.low, layout.low + (1 << layout.bits), shape)
    return layout, codes.astype(code_dtype(layout))


def code_dtype(layout: PackLayout) -> str:
    return "i1" if layout.low < 0 or layout.bits < 8 else "i2"


def inside(array: Array, padding: int) -> Array:
    """``array`` as a part of a larger one, ``padding`` elements from its left and its right."""
    larger = np.full((array.shape[0] + 2, array.shape[1] + 2 * padding), 1, dtype=array.dtype)
    part = larger[1:-1, padding : padding + array.shape[1]]
    part[...] = array
    return part


def every_other(array: Array, axis: int) -> Array:
    part = np.repeat(array, 2, axis=axis)
    return part[::2] if axis == 0 else part[:, ::2]


def at_odd_byte(array: Array) -> Array:
    """``array`` read-only at an address that is no multiple of its element, as in a mapped file."""
    return np.frombuffer(b"\0" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)


VIEWS: dict[str, Callable[[Array], Array]] = {
    "inside, aligned": lambda array: inside(array, 8),
    "inside, unaligned": lambda array: inside(array, 3),
    "every other row": lambda array: every_other(array, 0),
    "every other column": lambda array: every_other(array, 1),
    "rows backwards": lambda array: array[::-1].copy()[::-1],
    "columns backwards": lambda array: array[:, ::-1].copy()[:, ::-1],
    "columns first": np.asfortranarray,
    "odd byte": at_odd_byte,
}


@needs_numba
@unhurried
@given(layouts_with_codes())
def test_kernels_are_bit_exact_with_the_reference(case: tuple[PackLayout, Array]) -> None:
    layout, codes = case
    stored = pack_reference(layout, codes)
    with engine("numba"):
        packed, unpacked = layout.pack(codes), layout.unpack(stored, dtype=code_dtype(layout))
    assert packed.dtype == stored.dtype == layout.word_dtype
    assert packed.shape == stored.shape == layout.stored_shape(codes.shape)
    assert packed.tobytes() == stored.tobytes()
    np.testing.assert_array_equal(unpacked, unpack_reference(layout, stored, code_dtype(layout)))
    assert unpacked.dtype == code_dtype(layout)


@pytest.mark.parametrize("name", ENGINES)
@unhurried
@given(case=layouts_with_codes())
def test_unpack_is_the_inverse_of_pack(name: str, case: tuple[PackLayout, Array]) -> None:
    layout, codes = case
    before = codes.tobytes()
    with engine(name):
        stored = layout.pack(codes)
        words_before = stored.tobytes()
        again = layout.unpack(stored, dtype=code_dtype(layout))
        np.testing.assert_array_equal(again, codes)
        np.testing.assert_array_equal(layout.pack(again), stored)
    assert codes.tobytes() == before
    assert stored.tobytes() == words_before
    assert layout.canonical_shape(stored.shape) == codes.shape


@pytest.mark.parametrize("name", ENGINES)
@unhurried
@given(layout=LAYOUTS, shape=st.tuples(st.integers(1, 3), st.integers(1, 5)), data=st.data())
def test_any_words_are_read_alike_and_written_back(name: str, layout: PackLayout, shape: tuple[int, int], data: st.DataObject) -> None:
    """Whatever bits a file holds, a lane is a code: unpacking loses nothing."""
    packed = layout.span * shape[0]
    stored_shape = layout.stored_shape((packed, shape[1]) if layout.axis == "out" else (shape[1], packed))
    stored = data.draw(hnp.arrays(layout.word_dtype, stored_shape))
    with engine(name):
        codes = layout.unpack(stored, dtype=code_dtype(layout))
        np.testing.assert_array_equal(codes, unpack_reference(layout, stored, code_dtype(layout)))
        np.testing.assert_array_equal(layout.pack(codes), stored)


@pytest.mark.parametrize("name", ENGINES)
@unhurried
@given(case=layouts_with_codes(), data=st.data())
def test_a_rectangle_is_the_slice_of_the_whole(name: str, case: tuple[PackLayout, Array], data: st.DataObject) -> None:
    layout, codes = case
    cuts = []
    for axis, length in zip(("out", "in"), codes.shape, strict=True):
        step = layout.span if axis == layout.axis else 1
        start = data.draw(st.integers(0, length // step - 1)) * step
        cuts.append(slice(start, data.draw(st.integers(start // step + 1, length // step + 1)) * step))
    with engine(name):
        matrix = PackedMatrix(layout, layout.pack(codes), code_dtype(layout))
        assert matrix.shape == codes.shape
        np.testing.assert_array_equal(matrix.read(*cuts), codes[tuple(cuts)])
        assert matrix.read(*cuts).dtype == matrix.dtype


@pytest.mark.parametrize("name", ENGINES)
@unhurried
@given(case=layouts_with_codes(spans=3, lines=20), of_codes=st.sampled_from(sorted(VIEWS)), of_words=st.sampled_from(sorted(VIEWS)))
def test_strided_and_unaligned_views_are_read_as_copies_are(
    name: str, case: tuple[PackLayout, Array], of_codes: str, of_words: str
) -> None:
    layout, codes = case
    stored = pack_reference(layout, codes)
    codes_view, words_view = VIEWS[of_codes](codes), VIEWS[of_words](stored)
    for view in (codes_view, words_view):
        view.flags.writeable = False
    with engine(name):
        np.testing.assert_array_equal(layout.pack(codes_view), stored)
        np.testing.assert_array_equal(layout.unpack(words_view, dtype=code_dtype(layout)), codes)
    np.testing.assert_array_equal(codes_view, codes)
    np.testing.assert_array_equal(words_view, stored)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("layout", DECLARED, ids=str)
def test_a_larger_array_around_the_input_is_not_written_to(name: str, layout: PackLayout) -> None:
    codes = np.full((layout.span * 2, layout.span * 2), layout.low, dtype=np.int8)
    with engine(name):
        around = inside(codes, 8)
        whole = np.asarray(around.base)
        before = whole.copy()
        layout.pack(around)
        np.testing.assert_array_equal(whole, before)
        stored = inside(layout.pack(codes), 8)
        whole = np.asarray(stored.base)
        before = whole.copy()
        np.testing.assert_array_equal(layout.unpack(stored), codes)
        np.testing.assert_array_equal(whole, before)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("padding", [8, 3])
@pytest.mark.parametrize("layout", DECLARED, ids=str)
def test_packing_into_a_part_of_an_array_leaves_the_rest(name: str, layout: PackLayout, padding: int) -> None:
    shape = (layout.span * 8, layout.span * 8)
    codes = np.random.default_rng(padding).integers(layout.low, layout.low + (1 << layout.bits), shape).astype(np.int8)
    expected = inside(pack_reference(layout, codes), padding)
    place = inside(np.zeros(layout.stored_shape(shape), layout.word_dtype), padding)
    with engine(name):
        layout.pack(codes, place)
    np.testing.assert_array_equal(np.asarray(place.base), np.asarray(expected.base))


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("offset", [0, 1, 3, 5])
@pytest.mark.parametrize("layout", DECLARED, ids=str)
def test_a_mapped_file_is_read_at_any_byte_offset(name: str, layout: PackLayout, offset: int, tmp_path: Path) -> None:
    codes = np.random.default_rng(offset).integers(layout.low, -layout.low, (layout.span * 2, layout.span * 2)).astype(np.int8)
    stored = pack_reference(layout, codes)
    file = tmp_path / "words"
    file.write_bytes(b"?" * offset + stored.tobytes())
    mapped = np.memmap(file, stored.dtype, "r", offset, stored.shape)
    with engine(name):
        np.testing.assert_array_equal(layout.unpack(mapped), codes)
        corner = slice(layout.span, None), slice(0, layout.span)
        np.testing.assert_array_equal(layout.unpack(mapped, *corner), codes[corner])
    assert file.read_bytes() == b"?" * offset + stored.tobytes()


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("layout", DECLARED, ids=str)
def test_matrices_without_codes_have_shapes_still(name: str, layout: PackLayout) -> None:
    for shape in ((0, layout.span), (layout.span, 0)):
        with engine(name):
            stored = layout.pack(np.zeros(shape, dtype=np.int8))
            assert stored.shape == layout.stored_shape(shape)
            assert layout.unpack(stored).shape == shape


# What the layouts refuse


@pytest.mark.parametrize("name", ENGINES)
@given(layout=LAYOUTS, above=st.booleans(), by=st.integers(1, 300))
@settings(deadline=None)
def test_a_code_outside_the_lane_is_refused(name: str, layout: PackLayout, above: bool, by: int) -> None:
    codes = np.full((layout.span, layout.span), layout.low, dtype=np.int16)
    codes[-1, -1] = layout.low + (1 << layout.bits) - 1
    with engine(name):
        layout.pack(codes)
        codes[-1, -1] = layout.low + (1 << layout.bits) - 1 + by if above else layout.low - by
        with pytest.raises(WeighbridgeError, match=f"do not fit lanes of {layout.bits} bits that hold {layout.low} to"):
            layout.pack(codes)


def test_gptq_cannot_say_a_zero_point_above_its_lanes() -> None:
    for bits in gptq.BITS:
        layout = gptq.zeros_layout(bits, "v1")
        with pytest.raises(WeighbridgeError, match="do not fit"):
            layout.pack(np.full((32, 1), 1 << (bits - 1), dtype=np.int16))


@given(layout=LAYOUTS, spans=st.integers(0, 3), data=st.data())
def test_codes_that_do_not_fill_a_span_are_refused(layout: PackLayout, spans: int, data: st.DataObject) -> None:
    if layout.span == 1:
        layout.stored_shape((3, 5))
        return
    packed = layout.span * spans + data.draw(st.integers(1, layout.span - 1))
    shape = (packed, 4) if layout.axis == "out" else (4, packed)
    with pytest.raises(UnreadableError, match=f"{packed} codes along {layout.axis} do not fill spans of {layout.span} codes"):
        layout.stored_shape(shape)
    with pytest.raises(UnreadableError):
        layout.pack(np.full(shape, layout.low, dtype=np.int16))


@pytest.mark.parametrize("cut", [slice(1, 8), slice(0, 9), slice(4, None)])
def test_a_cut_through_a_span_is_refused(cut: slice) -> None:
    stored = awq.GEMM.pack(np.zeros((16, 2), dtype=np.int8))
    with pytest.raises(WeighbridgeError, match="along out splits a span of 8 codes"):
        awq.GEMM.unpack(stored, cut)


def test_a_cut_with_a_step_is_refused() -> None:
    stored = awq.GEMM.pack(np.zeros((16, 2), dtype=np.int8))
    with pytest.raises(WeighbridgeError, match="not with step 2"):
        awq.GEMM.unpack(stored, slice(None), slice(None, None, 2))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_lanes_have_one_to_eight_bits(bits: int) -> None:
    with pytest.raises(WeighbridgeError, match="layouts hold 1 to 8"):
        PackLayout(bits)


@pytest.mark.parametrize("order", [(0, 0), (1, 2), (0, 2)])
def test_a_lane_order_is_a_permutation(order: tuple[int, ...]) -> None:
    with pytest.raises(WeighbridgeError, match="is not a permutation"):
        PackLayout(4, order=order)


def test_bytes_in_a_lane_order_come_back_in_their_own_order() -> None:
    layout = PackLayout(8, "i1", order=(1, 0), low=-128)
    codes = np.array([[1, 2, 3, 4]], dtype=np.int8)
    np.testing.assert_array_equal(layout.unpack(layout.pack(codes)), codes)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("bits", [4, 8])
def test_signed_and_offset_layouts_serve_one_after_the_other(bits: int, name: str) -> None:
    """One kernel serves both, with a constant to flip bits by that needs 64 bits in one of them and none in the other."""
    half = 1 << (bits - 1)
    codes = np.array([[-half, -1, 0, half - 1] * 2] * 4, dtype=np.int8)
    with engine(name):
        for offset in (0, half, 0, half):
            layout = PackLayout(bits, transposed=True, offset=offset, low=-half)
            np.testing.assert_array_equal(layout.pack(codes), pack_reference(layout, codes))
            np.testing.assert_array_equal(layout.unpack(layout.pack(codes)), codes)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("length", [4, 16])
def test_a_lane_order_may_be_shorter_or_longer_than_a_word(length: int, name: str) -> None:
    """Eight lanes a word, in the layout that AWQ has: the order repeats within a word, or runs over two."""
    layout = PackLayout(4, "<i4", "out", transposed=True, order=tuple(range(length))[::-1], low=-8)
    codes = (np.arange(32).reshape(32, 1) % 16 - 8).astype(np.int8)
    with engine(name):
        np.testing.assert_array_equal(layout.pack(codes), pack_reference(layout, codes))
        np.testing.assert_array_equal(layout.unpack(layout.pack(codes)), codes)


# The law


@st.composite
def layers(draw: st.DrawFn) -> QuantizedLinear:
    """Layers with groups of any size, one scale a row, or an irregular g_idx; with and without zero points."""
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    half = 1 << (bits - 1)
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 40)))
    size = draw(st.one_of(st.none(), st.integers(1, 40)))
    groups = 1 if size is None else -(-shape[1] // size)
    symmetric, irregular = draw(st.booleans()), draw(st.booleans())
    codes = draw(hnp.arrays(np.int8, shape, elements=st.integers(-half, half - 1)))
    scales = draw(hnp.arrays(np.float32, (shape[0], groups), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
    zeros = None if symmetric else draw(hnp.arrays(np.int16, (shape[0], groups), elements=st.integers(-half, half)))
    g_idx = draw(hnp.arrays(np.int32, shape[1], elements=st.integers(0, groups - 1))) if irregular else None
    args = QuantArgs(bits, symmetric=symmetric, strategy="channel" if size is None else "group", group_size=size)
    return QuantizedLinear("layer", shape, QuantScheme(args), codes, scales, zeros, g_idx=g_idx)


def law_by_kernel(layer: QuantizedLinear, leaf_cols: int) -> Array:
    """The kernel's weights, brought from leaf order back to [out, in]."""
    from formats import kernels

    codes, group = np.ascontiguousarray(layer.codes), layer.group_of()
    zeros = None if layer.zero_points is None else np.asarray(layer.zero_points).astype(np.float32)
    border = np.arange(len(group)) % leaf_cols == 0
    starts = np.flatnonzero(border | (np.diff(group, prepend=-1) != 0))
    runs = kernels.Runs(starts, np.append(starts[1:], len(group)), group[starts].astype(np.int64))
    weights = np.full(codes.size, np.nan, dtype=np.float32)
    before = codes.copy()
    codes.flags.writeable = False
    kernels.dequantize_leaves(codes, np.ascontiguousarray(layer.scales), zeros, runs, leaf_cols, weights)
    np.testing.assert_array_equal(codes, before)
    rows, cols = codes.shape
    ends = [*range(0, cols, leaf_cols), cols]
    return np.hstack([weights[rows * left : rows * right].reshape(rows, right - left) for left, right in pairwise(ends)])


@needs_numba
@unhurried
@given(layers(), st.integers(1, 41))
def test_the_kernel_computes_the_law_bit_for_bit_leaf_after_leaf(layer: QuantizedLinear, leaf_cols: int) -> None:
    """Leaves of one column to the whole row, the last of them narrower, and groups that end in the middle of a leaf."""
    with np.errstate(over="ignore"):
        wanted = ir.dequantize(layer) + np.float32(0)
    np.testing.assert_array_equal(law_by_kernel(layer, leaf_cols).view(np.uint32), wanted.view(np.uint32))


@needs_numba
@pytest.mark.parametrize("zeros", [None, np.zeros((1, 1), dtype=np.int16)])
@pytest.mark.parametrize("leaf_cols", [2, 1024])
def test_the_kernel_gives_plus_zero_where_the_law_gives_minus_zero(zeros: Array | None, leaf_cols: int) -> None:
    codes, scales = np.zeros((1, 3), dtype=np.int8), np.full((1, 1), -2, dtype=np.float32)
    layer = QuantizedLinear("layer", (1, 3), QuantScheme(QuantArgs(4)), codes, scales, zeros)
    assert np.signbit(ir.dequantize(layer)).all()
    assert law_by_kernel(layer, leaf_cols).tobytes() == bytes(12)


INT8_MATRICES = hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))


@needs_numba
@unhurried
@given(INT8_MATRICES, st.sampled_from(sorted(VIEWS)))
@example(np.full((1, 1), -128, dtype=np.int8), "odd byte")
@example(np.full((1, 1), 127, dtype=np.int8), "odd byte")
def test_code_range_is_the_smallest_and_the_largest_code(codes: Array, view: str) -> None:
    from formats import kernels

    assert kernels.code_range(VIEWS[view](codes)) == (codes.min(), codes.max())


@needs_numba
@unhurried
@given(INT8_MATRICES, st.data())
def test_equal_sees_every_code(codes: Array, data: st.DataObject) -> None:
    from formats import kernels

    left, right = (VIEWS[data.draw(st.sampled_from(sorted(VIEWS)))] for _ in range(2))
    assert kernels.equal(left(codes), right(codes))
    other = codes.copy()
    other[tuple(data.draw(st.integers(0, side - 1)) for side in codes.shape)] ^= np.int8(1 << data.draw(st.integers(0, 6)))
    assert not kernels.equal(left(codes), right(other))
    assert not kernels.equal(left(other), right(codes))


# Which engine serves


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    layouts._load_kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "formats.kernels", raising=False)
    monkeypatch.delattr("formats.kernels", raising=False)
    yield
    layouts._load_kernels.cache_clear()


def test_without_numba_the_reference_serves_with_the_same_result(without_numba: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEIGHBRIDGE_KERNELS", raising=False)
    monkeypatch.setattr(layouts, "_expected_codes", layouts.NUMBA_PAYS_FROM)
    assert layouts.kernels() is None
    for layout in DECLARED:
        codes = np.random.default_rng(0).integers(layout.low, -layout.low, (layout.span, layout.span)).astype(np.int8)
        np.testing.assert_array_equal(layout.pack(codes), pack_reference(layout, codes))
        np.testing.assert_array_equal(layout.unpack(layout.pack(codes)), codes)


def test_without_numba_asking_for_it_is_an_error(without_numba: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHBRIDGE_KERNELS", "numba")
    with pytest.raises(WeighbridgeError, match="Numba is not installed: pip install numba"):
        layouts.kernels()


@needs_numba
def test_only_work_that_pays_for_it_loads_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEIGHBRIDGE_KERNELS", raising=False)
    monkeypatch.setattr(layouts, "_expected_codes", 0)
    layouts.expect_work(layouts.NUMBA_PAYS_FROM - 1)
    assert layouts.kernels() is None
    layouts.expect_work(layouts.NUMBA_PAYS_FROM)
    assert layouts.kernels() is not None
    monkeypatch.setenv("WEIGHBRIDGE_KERNELS", "numpy")
    assert layouts.kernels() is None
