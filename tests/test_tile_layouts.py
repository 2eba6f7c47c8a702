"""Tiles: words of a fragment decoded by hand, then the NumPy reference and the Numba kernels on any number of tiles, bit for bit."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layouts import VIEWS, inside

from formats.awq import GEMV_FAST
from formats.ir import Array
from formats.layouts import TileLayout, pack_tiles_reference, unpack_tiles_reference
from formats.marlin import MARLIN
from formats.turbomind_tree import HALF_MMA, MMA

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="Numba is not installed")
ENGINES = [pytest.param("numba", marks=needs_numba), "numpy"]
unhurried = settings(deadline=None, max_examples=100)
TILES = {"mma": MMA, "half mma": HALF_MMA, "marlin": MARLIN, "gemv_fast": GEMV_FAST}


@contextmanager
def engine(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEIGHBRIDGE_KERNELS", name)
        yield


def shuffled(order: tuple[int, ...]) -> TileLayout:
    """A tile whose order no fragment has."""
    return TileLayout(4, "<i4", (4, 16), order, transposed=True, offset=8, low=-8)


@st.composite
def cases(draw: st.DrawFn) -> tuple[TileLayout, Array]:
    """A layout and codes of some tiles."""
    layout = draw(st.sampled_from([*TILES.values(), shuffled(tuple(random.Random(1).sample(range(64), 64)))]))
    (high, wide), tiles = layout.tile, (draw(st.integers(1, 4)), draw(st.integers(1, 7)))
    codes = np.random.default_rng(draw(st.integers(0, 1 << 32))).integers(-8, 8, (tiles[0] * high, tiles[1] * wide))
    return layout, codes.astype(np.int8)


# The operand A of mma.m16n8k16, half precision: thread t has a0 a1 of row t / 4 and columns 2 (t % 4) and the next, a2 a3 of the row 8
# below, a4 a5 of 8 columns further on, a6 a7 of both. A word has a0, a2, a4, a6 in its low half and a1, a3, a5, a7 in its high one.


@pytest.mark.parametrize("name", ENGINES)
def test_a_tile_of_mma_is_four_operands(name: str) -> None:
    codes = np.random.default_rng(2).integers(0, 16, (64, 96))
    wanted = np.zeros((3, 2, 32, 4), np.uint32)
    for k32, m32, thread, w in np.ndindex(wanted.shape):
        a = codes[32 * m32 + w % 2 * 16 :, 32 * k32 + w // 2 * 16 :]
        row, col = thread // 4, thread % 4 * 2
        nibbles = [a[row, col], a[row + 8, col], a[row, col + 8], a[row + 8, col + 8]]
        nibbles += [a[row, col + 1], a[row + 8, col + 1], a[row, col + 9], a[row + 8, col + 9]]
        wanted[k32, m32, thread, w] = sum(int(nibble) << 4 * place for place, nibble in enumerate(nibbles))
    with engine(name):
        np.testing.assert_array_equal(MMA.pack((codes - 8).astype(np.int8)).view("<u4"), wanted.reshape(3, 256))
        np.testing.assert_array_equal(MMA.unpack(wanted.reshape(3, 256).view("<i4")), codes - 8)


@pytest.mark.parametrize("name", ENGINES)
def test_two_halves_share_a_tile_of_mma(name: str) -> None:
    """Outputs in turn from two matrices: every second 16 words of each are one's."""
    first, second = np.random.default_rng(3).integers(-8, 8, (2, 48, 64)).astype(np.int8)
    together = np.stack([first, second], axis=1).reshape(96, 64)
    with engine(name):
        runs = MMA.pack(together).reshape(2, 24, 16)
        for half, codes in enumerate((first, second)):
            np.testing.assert_array_equal(runs[:, half::2].reshape(2, -1), HALF_MMA.pack(codes))


@needs_numba
@pytest.mark.parametrize("layout", TILES.values(), ids=TILES)
def test_every_declared_tile_has_a_kernel(layout: TileLayout) -> None:
    from formats.tile_kernels import fragments_of

    assert fragments_of(layout) is not None


@pytest.mark.parametrize("name", ENGINES)
@unhurried
@given(case=cases(), of_codes=st.sampled_from(sorted(VIEWS)), of_words=st.sampled_from(sorted(VIEWS)))
def test_kernels_are_the_reference(name: str, case: tuple[TileLayout, Array], of_codes: str, of_words: str) -> None:
    layout, codes = case
    stored = pack_tiles_reference(layout, codes)
    codes_view, words_view = VIEWS[of_codes](codes), VIEWS[of_words](stored)
    for view in (codes_view, words_view):
        view.flags.writeable = False
    with engine(name):
        packed = layout.pack(codes_view)
        assert (packed.dtype, packed.shape) == (layout.word_dtype, layout.stored_shape(codes.shape))
        np.testing.assert_array_equal(packed, stored)
        np.testing.assert_array_equal(layout.unpack(words_view), codes)
        assert layout.unpack(words_view, dtype="i2").dtype == np.int16


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("layout", TILES.values(), ids=TILES)
def test_any_words_are_read_alike_and_written_back(name: str, layout: TileLayout) -> None:
    shape = layout.stored_shape((3 * layout.tile[0], 2 * layout.tile[1]))
    stored = np.frombuffer(np.random.default_rng(4).bytes(shape[0] * shape[1] * layout.word_dtype.itemsize), layout.word_dtype).reshape(
        shape
    )
    with engine(name):
        codes = layout.unpack(stored)
        np.testing.assert_array_equal(codes, unpack_tiles_reference(layout, stored))
        np.testing.assert_array_equal(layout.pack(codes), stored)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("padding", [4, 3, 1])
@pytest.mark.parametrize("layout", TILES.values(), ids=TILES)
def test_packing_into_a_part_of_an_array_leaves_the_rest(name: str, layout: TileLayout, padding: int) -> None:
    codes = np.random.default_rng(padding).integers(-8, 8, (2 * layout.tile[0], 3 * layout.tile[1])).astype(np.int8)
    expected = inside(pack_tiles_reference(layout, codes), padding)
    place = inside(np.zeros(layout.stored_shape(codes.shape), layout.word_dtype), padding)
    with engine(name):
        layout.pack(codes, place)
    np.testing.assert_array_equal(np.asarray(place.base), np.asarray(expected.base))


@needs_numba
def test_an_order_that_only_looks_like_fragments_has_no_kernel() -> None:
    from formats.tile_kernels import fragments_of

    for one, other in ((0, 8), (1, 2), (31, 1000)):
        order = list(MMA.order)
        order[one], order[other] = order[other], order[one]
        assert fragments_of(replace(MMA, order=tuple(order))) is None
    assert fragments_of(replace(MMA, offset=0)) is None
