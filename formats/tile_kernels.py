"""Numba kernels for tiles of 4-bit codes in the order that tensor cores and GEMV kernels want, bit-exact with the NumPy reference.

Every tile that a format here has is made of *fragments*: four runs of 8 codes along in, which become 16 bytes. Byte 2j holds code j of the
first run below code j of the second, byte 2j + 1 code j of the third below code j of the fourth; each four bytes are a word. Formats differ
in where the four runs lie in a tile, and in how far apart its words lie. That is read off the order of a layout, so that
a format with other tiles of fragments has a kernel as it is declared; one without fragments has the reference.

As in ``formats.kernels``: flat arrays and strides, and nothing here checks bounds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .ir import Array
from .kernels import flat_words, frozen, jit, target, whole_words
from .layouts import TileLayout

_LINE = 64
"""Bytes of a cache line: tiles beside one another share lines of codes, and are gone through together."""


@dataclass(frozen=True, slots=True)
class Fragments:
    """What a tile is made of.

    rows, cols   int64 [fragments, 4]: where in the tile each run begins
    words        int64 [fragments]: the first word of 32 bits; apart: words from each to the next of the four
    """

    rows: Array
    cols: Array
    words: Array
    apart: int


@functools.lru_cache(maxsize=16)
def fragments_of(layout: TileLayout) -> Fragments | None:
    """The fragments of the layout's tiles; None if they are not made of any."""
    if layout.bits != 4 or (layout.offset, layout.low) != (8, -8) or layout.tile[1] % 8 or len(layout.order) % 32:
        return None
    lanes = np.asarray(layout.order, np.int64).reshape(-1, 8)
    (words,) = np.nonzero(lanes[:, 0] % 8 == 0)
    runs, number, lane = lanes[words, :4], np.arange(4), np.arange(8)
    wanted = runs[:, None, lane % 4] + 2 * number[:, None] + lane // 4
    if len(words) * 4 != len(lanes) or (runs % 8).any():
        return None
    for apart in (1, 4):
        found = words[:, None] + apart * number
        if found.max() < len(lanes) and np.array_equal(lanes[found], wanted):
            rows, cols = np.divmod(runs, layout.tile[1])
            return Fragments(rows, cols, words.astype(np.int64), apart)
    return None


def pack_tiles(layout: TileLayout, codes: Array, stored: Array) -> None:
    """Pack int8 ``codes`` [out, in] of whole tiles into ``stored``, a 2-D array whose rows are contiguous."""
    source, stride = flat_words(codes, np.dtype(np.uint64))
    into = stored if whole_words(stored) else np.empty(stored.shape, stored.dtype)
    words, line = target(into, np.uint32)
    _pack(frozen(source), *_steps(layout, codes.shape, stride, line), words)
    if into is not stored:
        stored[...] = into


def unpack_tiles(layout: TileLayout, stored: Array, codes: Array) -> None:
    """Unpack whole tiles, ``stored`` being a 2-D view whose rows are contiguous, into the C-contiguous int8 array ``codes`` [out, in]."""
    words, line = flat_words(stored, np.dtype(np.uint32))
    _unpack(words, *_steps(layout, codes.shape, codes.shape[1] // 8, line), codes.reshape(-1).view(np.uint64))


def _steps(layout: TileLayout, shape: tuple[int, ...], stride: int, line: int) -> tuple[object, ...]:
    """(runs, words, apart, tiles along out and in, eights of codes from tile to tile along both, words alike, tiles to a line).

    stride   eights of codes from row to row; line: words from stored row to stored row
    """
    fragments = fragments_of(layout)
    assert fragments is not None
    (high, wide), size = layout.tile, len(layout.order) // 8
    runs = fragments.rows * stride + fragments.cols // 8
    words = (size, line) if layout.transposed else (line, size)
    return runs, fragments.words, fragments.apart, shape[0] // high, shape[1] // wide, high * stride, wide // 8, *words, -(-_LINE // wide)


@jit
def _spread(x):
    """Bytes 0 to 3 in bytes 0, 2, 4 and 6."""
    x = (x | (x << np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    return (x | (x << np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)


@jit
def _join(x):
    """Bytes 0, 2, 4 and 6 in bytes 0 to 3."""
    x &= np.uint64(0x00FF00FF00FF00FF)
    x = (x | (x >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
    return (x | (x >> np.uint64(16))) & np.uint64(0xFFFFFFFF)


@jit
def _signed(x):
    """Nibbles from 0 to 15, one in each byte, less 8."""
    high = np.uint64(0x8080808080808080)
    return (((x & np.uint64(0x0F0F0F0F0F0F0F0F)) | high) - np.uint64(0x0808080808080808)) ^ high


@jit
def _pack(codes, runs, words, apart, outs, ins, out_codes, in_codes, out_words, in_words, block, stored):
    low = np.uint64(0x0F0F0F0F0F0F0F0F)
    turn = np.uint64(0x8888888888888888)
    half = np.uint64(0xFFFFFFFF)
    for o in range(outs):
        for i0 in range(0, ins, block):
            for f in range(len(words)):
                first, second = o * out_codes + runs[f, 0], o * out_codes + runs[f, 1]
                third, fourth = o * out_codes + runs[f, 2], o * out_codes + runs[f, 3]
                for i in range(i0, min(i0 + block, ins)):
                    at = i * in_codes
                    x = ((codes[first + at] & low) | ((codes[second + at] & low) << np.uint64(4))) ^ turn
                    y = ((codes[third + at] & low) | ((codes[fourth + at] & low) << np.uint64(4))) ^ turn
                    left = _spread(x & half) | (_spread(y & half) << np.uint64(8))
                    right = _spread(x >> np.uint64(32)) | (_spread(y >> np.uint64(32)) << np.uint64(8))
                    word = o * out_words + i * in_words + words[f]
                    stored[word] = np.uint32(left & half)
                    stored[word + apart] = np.uint32(left >> np.uint64(32))
                    stored[word + 2 * apart] = np.uint32(right & half)
                    stored[word + 3 * apart] = np.uint32(right >> np.uint64(32))


@jit
def _unpack(stored, runs, words, apart, outs, ins, out_codes, in_codes, out_words, in_words, block, codes):
    for o in range(outs):
        for i0 in range(0, ins, block):
            for f in range(len(words)):
                first, second = o * out_codes + runs[f, 0], o * out_codes + runs[f, 1]
                third, fourth = o * out_codes + runs[f, 2], o * out_codes + runs[f, 3]
                for i in range(i0, min(i0 + block, ins)):
                    word = o * out_words + i * in_words + words[f]
                    left = np.uint64(stored[word]) | (np.uint64(stored[word + apart]) << np.uint64(32))
                    right = np.uint64(stored[word + 2 * apart]) | (np.uint64(stored[word + 3 * apart]) << np.uint64(32))
                    x = _join(left) | (_join(right) << np.uint64(32))
                    y = _join(left >> np.uint64(8)) | (_join(right >> np.uint64(8)) << np.uint64(32))
                    at = i * in_codes
                    codes[first + at] = _signed(x)
                    codes[second + at] = _signed(x >> np.uint64(4))
                    codes[third + at] = _signed(y)
                    codes[fourth + at] = _signed(y >> np.uint64(4))
