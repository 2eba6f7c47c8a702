"""Numba kernels for tiles of 4-bit codes in the order that tensor cores and GEMV kernels want, bit-exact with the NumPy reference.

Every tile that a format here has is made of *fragments*: four runs of 8 codes along in, which become 16 bytes. Byte 2j holds code j of the
first run below code j of the second, byte 2j + 1 code j of the third below code j of the fourth; each four bytes are a word. Formats differ
in where the four runs lie in a tile, and in how far apart its words lie. That is read off the order of a layout, so that
a format with other tiles of fragments has a kernel as it is declared; one without fragments has the reference.

Fragments of the same rows follow one another at even distances along in, across tiles. They are gone through in a row: what is done to
bytes then works on contiguous buffers, which LLVM vectorizes, and only whole words and runs are gathered and scattered.

As in ``formats.kernels``: flat arrays and strides, and nothing here checks bounds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .ir import Array
from .kernels import flat_words, frozen, jit, target, whole_words
from .layouts import TileLayout

_HELD = 128
"""Fragments that are gone through at once: their buffers stay in the first-level cache."""


@dataclass(frozen=True, slots=True)
class Fragments:
    """What a tile is made of: bands of fragments of the same rows, in the order of their columns.

    rows, cols   int64 [bands, 4]: where in the tile the runs of a band's first fragment begin
    step         columns from a fragment to the next, into the next tile too
    words        int64 [bands, fragments]: the first word of 32 bits of each; apart: words from each to the next of the four
    """

    rows: Array
    cols: Array
    step: int
    words: Array
    apart: int


@functools.lru_cache(maxsize=16)
def fragments_of(layout: TileLayout) -> Fragments | None:
    """The fragments of the layout's tiles; None if they are not made of any that there is a kernel for."""
    wide = layout.tile[1]
    if layout.bits != 4 or (layout.offset, layout.low) != (8, -8) or wide % 8 or len(layout.order) % 32:
        return None
    lanes = np.asarray(layout.order, np.int64).reshape(-1, 8)
    (first,) = np.nonzero(lanes[:, 0] % 8 == 0)
    first = first[np.argsort(lanes[first, 0])].astype(np.int64)  # by row, then by column
    runs, number, lane = lanes[first, :4], np.arange(4), np.arange(8)
    if len(first) * 4 != len(lanes) or (runs % 8).any():
        return None
    wanted = runs[:, None, lane % 4] + 2 * number[:, None] + lane // 4
    many = int((runs[:, 0] // wide == runs[0, 0] // wide).sum())  # fragments of a band
    step = wide // many
    bands = runs.reshape(-1, many, 4)
    if step not in _STEPS or many > _HELD or not np.array_equal(bands, bands[:, :1] + step * np.arange(many)[:, None]):
        return None
    for apart in (1, 4):
        words = first[:, None] + apart * number
        if words.max() < len(lanes) and np.array_equal(lanes[words], wanted):
            rows, cols = np.divmod(bands[:, 0], wide)
            return Fragments(rows, cols, step, first.reshape(-1, many), apart)
    return None


_STEPS = (16, 32)
"""Columns from fragment to fragment that the kernels are compiled for."""


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
    """(runs, step, words, apart, tiles along out and in, eights of codes from tile to tile along out, words along out and in).

    stride   eights of codes from row to row; line: words from stored row to stored row
    """
    fragments = fragments_of(layout)
    assert fragments is not None
    (high, wide), size = layout.tile, len(layout.order) // 8
    runs = fragments.rows * stride + fragments.cols // 8
    along = (size, line) if layout.transposed else (line, size)
    return runs, fragments.step // 8, fragments.words, fragments.apart, shape[0] // high, shape[1] // wide, high * stride, *along


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
    """The low nibble of each byte, less 8."""
    high = np.uint64(0x8080808080808080)
    return (((x & np.uint64(0x0F0F0F0F0F0F0F0F)) | high) - np.uint64(0x0808080808080808)) ^ high


@jit
def _fold(first, second, third, fourth, step, left, right):
    """Runs of codes, ``step`` apart -> the first two words and the last two of each fragment."""
    low = np.uint64(0x0F0F0F0F0F0F0F0F)
    turn = np.uint64(0x8888888888888888)
    half = np.uint64(0xFFFFFFFF)
    for v in range(len(left)):
        x = ((first[step * v] & low) | ((second[step * v] & low) << np.uint64(4))) ^ turn
        y = ((third[step * v] & low) | ((fourth[step * v] & low) << np.uint64(4))) ^ turn
        left[v] = _spread(x & half) | (_spread(y & half) << np.uint64(8))
        right[v] = _spread(x >> np.uint64(32)) | (_spread(y >> np.uint64(32)) << np.uint64(8))


@jit
def _pack(codes, runs, step, words, apart, outs, ins, out_codes, out_words, in_words, stored):
    many = words.shape[1]
    block = _HELD // many
    lefts, rights = np.empty(_HELD, dtype=np.uint64), np.empty(_HELD, dtype=np.uint64)
    for o in range(outs):
        for i0 in range(0, ins, block):
            tiles = min(block, ins - i0)
            count = tiles * many
            left, right = lefts[:count], rights[:count]
            for band in range(len(words)):
                corner, length = o * out_codes + i0 * many * step, (count - 1) * step + 1
                first = codes[corner + runs[band, 0] : corner + runs[band, 0] + length]
                second = codes[corner + runs[band, 1] : corner + runs[band, 1] + length]
                third = codes[corner + runs[band, 2] : corner + runs[band, 2] + length]
                fourth = codes[corner + runs[band, 3] : corner + runs[band, 3] + length]
                if step == 2:  # LLVM vectorizes what is a constant number apart
                    _fold(first, second, third, fourth, 2, left, right)
                else:
                    _fold(first, second, third, fourth, 4, left, right)
                for f in range(many):
                    word = o * out_words + i0 * in_words + words[band, f]
                    for v in range(f, count, many):
                        stored[word] = np.uint32(left[v] & np.uint64(0xFFFFFFFF))
                        stored[word + apart] = np.uint32(left[v] >> np.uint64(32))
                        stored[word + 2 * apart] = np.uint32(right[v] & np.uint64(0xFFFFFFFF))
                        stored[word + 3 * apart] = np.uint32(right[v] >> np.uint64(32))
                        word += in_words


@jit
def _unpack(stored, runs, step, words, apart, outs, ins, out_codes, out_words, in_words, codes):
    many = words.shape[1]
    block = _HELD // many
    lefts, rights = np.empty(_HELD, dtype=np.uint64), np.empty(_HELD, dtype=np.uint64)
    lows, highs = np.empty(_HELD, dtype=np.uint64), np.empty(_HELD, dtype=np.uint64)
    for o in range(outs):
        for i0 in range(0, ins, block):
            tiles = min(block, ins - i0)
            count = tiles * many
            left, right, low, high = lefts[:count], rights[:count], lows[:count], highs[:count]
            for band in range(len(words)):
                for f in range(many):
                    word = o * out_words + i0 * in_words + words[band, f]
                    for v in range(f, count, many):
                        left[v] = np.uint64(stored[word]) | (np.uint64(stored[word + apart]) << np.uint64(32))
                        right[v] = np.uint64(stored[word + 2 * apart]) | (np.uint64(stored[word + 3 * apart]) << np.uint64(32))
                        word += in_words
                for v in range(count):
                    low[v] = _join(left[v]) | (_join(right[v]) << np.uint64(32))
                    high[v] = _join(left[v] >> np.uint64(8)) | (_join(right[v] >> np.uint64(8)) << np.uint64(32))
                corner = o * out_codes + i0 * many * step
                first, second = corner + runs[band, 0], corner + runs[band, 1]
                third, fourth = corner + runs[band, 2], corner + runs[band, 3]
                for v in range(count):
                    codes[first + step * v] = _signed(low[v])
                    codes[second + step * v] = _signed(low[v] >> np.uint64(4))
                    codes[third + step * v] = _signed(high[v])
                    codes[fourth + step * v] = _signed(high[v] >> np.uint64(4))
