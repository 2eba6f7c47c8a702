"""Numba kernels for layouts and the law: tiled, without the GIL, cached on disk, bit-exact with the NumPy reference.

Every kernel takes flat arrays and row strides (in elements) instead of 2-D views, because LLVM vectorizes
contiguous inner loops only when it knows that they are contiguous; a view into a memory-mapped tensor is not.
Nothing here checks bounds: ``pack`` and ``unpack`` have checked shapes and code ranges before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from .ir import Array
from .layouts import PackLayout

_WORDS = 16
"""Words per block of a transposing kernel: 16 words of 4 bytes fill a cache line."""

jit: Any = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")


@dataclass(frozen=True, slots=True)
class Runs:
    """Columns cut into runs of one group: int64 vectors of where each begins and ends, and of its group."""

    starts: Array
    ends: Array
    group: Array


def pack(layout: PackLayout, codes: Array, stored: Array) -> None:
    """Pack int8 ``codes`` [out, x] into ``stored``, a 2-D array whose rows are contiguous."""
    flip = layout.offset
    swar = layout.transposed and layout.axis == "in" and layout.word == "<i4" and not layout.order
    if swar and layout.bits in (4, 8) and flip in (0, 1 << (layout.bits - 1)):
        lanes, stride = flat_words(codes, np.dtype(np.uint64 if layout.bits == 4 else np.uint32))
        kernel: Any = _pack_in_transposed_4 if layout.bits == 4 else _pack_in_transposed_8
        kernel(lanes, stride, codes.shape[0], stored.shape[0], *target(stored, np.uint32), np.uint64(flip * 0x0101010101010101))
    elif _nibbles(layout):
        source, stride = _flat(codes)
        kernel = _pack_nibble_rows if layout.axis == "out" else _pack_nibble_columns
        kernel(source, stride, stored.shape[0], stored.shape[1] * stored.itemsize, *target(stored, np.uint8), layout.offset)
    elif _bytes(layout):
        np.add(codes.view(np.uint8), np.uint8(layout.offset), out=stored.view(np.uint8))
    elif _word_by_word(layout) and layout.bits == 4 and whole_words(stored):
        source, stride = _flat(codes)
        words = codes.shape[0] // 8
        args = (source, stride, words, codes.shape[1], *target(stored, np.uint32), _nibble_rows(layout))
        _pack_out_transposed_4(*args, np.uint8(layout.offset & 15))
    elif _word_by_word(layout) and layout.word == "<i4":
        source, stride = _flat(codes)
        args = (source, stride, stored.shape[1], codes.shape[1], *target(stored, np.uint32), _shifts(layout))
        _pack_out_transposed(*args, layout.offset, (1 << layout.bits) - 1)
    else:
        source, stride = _flat(codes)
        words = stored if stored.flags.c_contiguous else np.empty(stored.shape, stored.dtype)
        _pack_stream(source, *_stream(layout, codes.shape, stride), target(words, np.uint8)[0])
        if words is not stored:
            stored[...] = words


def unpack(layout: PackLayout, stored: Array, codes: Array) -> None:
    """Unpack ``stored`` (a 2-D view whose rows are contiguous) into the C-contiguous int8 array ``codes`` [out, x]."""
    shape = codes.shape
    shift = (layout.offset + layout.low) & ((1 << layout.bits) - 1)
    swar = layout.transposed and layout.axis == "in" and layout.word == "<i4" and not layout.order and shift == 0
    if swar and layout.bits == 4 and layout.low == -8:
        words, stride = flat_words(stored, np.dtype(np.uint32))
        _unpack_in_transposed_4(words, stride, shape[0], stored.shape[0], codes.reshape(-1).view(np.uint64))
    elif swar and layout.bits == 8 and layout.low == -128:
        words, stride = flat_words(stored, np.dtype(np.uint32))
        _unpack_in_transposed_8(words, stride, shape[0], stored.shape[0], codes.reshape(-1).view(np.uint32))
    elif _nibbles(layout):
        source, stride = _flat(stored)
        size = stored.itemsize
        kernel: Any = _unpack_nibble_rows if layout.axis == "out" else _unpack_nibble_columns
        shape_in_bytes = (stride * size, stored.shape[0], stored.shape[1] * size)
        kernel(source.view(np.int8), *shape_in_bytes, codes.reshape(-1), layout.offset + layout.low, layout.low)
    elif _bytes(layout):
        stored = stored if stored.strides[-1] == stored.itemsize else np.ascontiguousarray(stored)
        np.subtract(stored.view(np.uint8), np.uint8(layout.offset), out=codes.view(np.uint8))
    elif _word_by_word(layout) and layout.bits == 4 and not shape[0] % 8:
        words, stride = flat_words(stored, np.dtype(np.uint32))
        out = (words, stride, shape[0] // 8, shape[1], codes.reshape(-1), _nibble_rows(layout))
        _unpack_out_transposed_4(*out, np.uint8((layout.offset + layout.low) & 15), np.uint8(layout.low & 255))
    elif _word_by_word(layout) and layout.word == "<i4":
        words, stride = flat_words(stored, np.dtype(np.uint32))
        out = (words, stride, stored.shape[1], shape[1], codes.reshape(-1), _shifts(layout))
        _unpack_out_transposed(*out, layout.offset + layout.low, (1 << layout.bits) - 1, layout.low)
    else:
        source = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        _unpack_stream(codes.reshape(-1), *_stream(layout, shape, shape[1]), frozen(source), layout.low)


def dequantize_leaves(codes: Array, scales: Array, zero_points: Array | None, runs: Runs, leaf_cols: int, weights: Array) -> None:
    """float32 ``scales[r, g] * (codes[r, c] - zero_points[r, g])``, -0.0 as +0.0, leaf by leaf.

    codes int8 [rows, cols], scales and zero_points float32 [rows, groups], all C-contiguous; weights a float32 vector that takes
    [rows, leaf_cols] for the first ``leaf_cols`` columns, then for the next, ...
    """
    zeros = _NO_ZEROS if zero_points is None else frozen(zero_points.reshape(-1))
    shape = (codes.shape[0], codes.shape[1], scales.shape[1])
    bounds = (runs.starts, runs.ends, runs.group)
    _dequantize(frozen(codes.reshape(-1)), *shape, frozen(scales.reshape(-1)), zeros, zero_points is not None, *bounds, leaf_cols, weights)


def look_up_leaves(codes: Array, table: Array, scales: Array, runs: Runs, leaf_cols: int, weights: Array) -> None:
    """As ``dequantize_leaves``, ``scales[r, g] * table[codes[r, c]]`` of uint8 bit patterns: what small floats are.

    table   float32 [256], the value of every pattern
    """
    shape = (codes.shape[0], codes.shape[1], scales.shape[1])
    bounds = (runs.starts, runs.ends, runs.group)
    _look_up(frozen(codes.reshape(-1)), *shape, frozen(scales.reshape(-1)), table, *bounds, leaf_cols, weights)


def code_range(codes: Array) -> tuple[int, int]:
    """Smallest and largest of int8 ``codes`` (rows contiguous, not empty)."""
    source, stride = _flat(codes)
    low, high = _code_range(source, stride, codes.shape[0], codes.shape[1])
    return int(low), int(high)


def equal(left: Array, right: Array) -> bool:
    """Whether two int8 arrays of one shape (rows contiguous), or two uint8 ones, hold the same codes."""
    a, a_stride = _flat(left.view(np.int8))
    b, b_stride = _flat(right.view(np.int8))
    return bool(_equal(a, a_stride, b, b_stride, left.shape[0], left.shape[1]))


def cast_error(values: Array, stored: Array, smallest_normal: float) -> tuple[float, float]:
    """Largest relative difference of float32 ``stored`` from ``values``, both vectors: (where it is normal, where it is subnormal or 0)."""
    rounded, subnormal = _cast_error(frozen(values), frozen(stored), np.float32(smallest_normal))
    return float(rounded), float(subnormal)


_NO_ZEROS = np.zeros(1, dtype=np.float32)
_NO_ZEROS.flags.writeable = False


def frozen(array: Array) -> Array:
    """A read-only view, so that mapped files and fresh arrays share one compiled kernel."""
    view = array.view()
    view.flags.writeable = False
    return view


def target(stored: Array, dtype: Any) -> tuple[Array, int]:
    """A 2-D array with contiguous rows as (flat writeable array of ``dtype``, row stride in its elements), without copying."""
    if stored.flags.c_contiguous:
        return stored.reshape(-1).view(dtype), stored.shape[1] * stored.itemsize // np.dtype(dtype).itemsize
    stride = stored.strides[0] // stored.itemsize if stored.shape[0] > 1 else stored.shape[1]
    length = (stored.shape[0] - 1) * stride + stored.shape[1]
    flat = np.lib.stride_tricks.as_strided(stored, shape=(length,), strides=(stored.itemsize,)).view(dtype)
    return flat, stride * stored.itemsize // flat.itemsize


def _flat(view: Array) -> tuple[Array, int]:
    """A 2-D array with contiguous rows as (flat read-only array, row stride in elements), without copying."""
    if view.flags.c_contiguous:
        return frozen(view.reshape(-1)), view.shape[1]
    if view.strides[1] != view.itemsize or view.strides[0] < 0 or view.strides[0] % view.itemsize:
        view = np.ascontiguousarray(view)
    stride = view.strides[0] // view.itemsize if view.shape[0] > 1 else view.shape[1]
    length = (view.shape[0] - 1) * stride + view.shape[1] if view.size else 0
    flat = np.lib.stride_tricks.as_strided(view, shape=(length,), strides=(view.itemsize,), writeable=False)
    return flat, stride


def flat_words(view: Array, word: np.dtype[Any]) -> tuple[Array, int]:
    """Like ``_flat`` in units of ``word``; copies the tile if its rows are not aligned to words."""
    size = word.itemsize
    if view.strides[1] != view.itemsize or view.strides[0] % size or view.ctypes.data % size:
        view = np.ascontiguousarray(view)
        if view.ctypes.data % size:
            view = view.copy()
    flat, stride = _flat(view)
    per_word = size // view.itemsize if size > view.itemsize else 1
    length = len(flat) // per_word * per_word
    return flat[:length].view(word), stride // per_word


def _nibbles(layout: PackLayout) -> bool:
    """Whether each byte holds two consecutive codes, the first one low, and rows are output channels.

    Words along [in] are such bytes too, being little-endian.
    """
    plain = layout.bits == 4 and not layout.order and not layout.transposed
    return plain and (layout.word == "i1" or layout.axis == "in")


def _bytes(layout: PackLayout) -> bool:
    """Whether each byte holds one code, and rows are output channels."""
    plain = layout.bits == 8 and not layout.order and not layout.transposed and layout.low == -128
    return plain and (layout.word_dtype.itemsize == 1 or layout.axis == "in")


def _word_by_word(layout: PackLayout) -> bool:
    """Whether each 32-bit word holds whole lanes of consecutive output rows, in an order that stays within the word.

    Bytes of two codes are such words too, four and four, being little-endian.
    """
    whole = layout.word == "<i4" and 32 % layout.bits == 0 and len(layout.order) in {0, 32 // layout.bits}
    bytes_of_two = layout.word == "i1" and layout.bits == 4 and not layout.order
    return (whole or bytes_of_two) and layout.axis == "out" and layout.transposed


def whole_words(stored: Array) -> bool:
    """Whether every row of ``stored``, 2-D with contiguous rows, is whole 32-bit words that lie where words may."""
    places = (stored.shape[1] * stored.itemsize, stored.ctypes.data, stored.strides[0] if stored.shape[0] > 1 else 0)
    return not any(place % 4 for place in places)


def _shifts(layout: PackLayout) -> Array:
    """For each element of a word's span, the bit where its lane begins."""
    lanes = 32 // layout.bits
    order = layout.order or tuple(range(lanes))
    return np.asarray(np.argsort(order) * layout.bits, dtype=np.uint32)


def _nibble_rows(layout: PackLayout) -> Array:
    """For each nibble of a word, lowest first, which of its eight rows it holds."""
    return np.asarray(layout.order or range(8), dtype=np.int64)


def _stream(layout: PackLayout, shape: tuple[int, ...], stride: int) -> tuple[Any, ...]:
    """Strides and lane facts for the bit-stream kernels: (code strides, counts, byte strides, bits, order, offset)."""
    word = layout.word_dtype.itemsize
    along, lines = (shape[1], shape[0]) if layout.axis == "in" else (shape[0], shape[1])
    code_axis, code_line = (1, stride) if layout.axis == "in" else (stride, 1)
    words = along * layout.bits // (8 * word)
    packed_is_inner = (layout.axis == "in") != layout.transposed
    byte_axis, byte_line = (word, words * word) if packed_is_inner else (lines * word, word)
    order = np.asarray(layout.order or (0,), dtype=np.int64)
    return code_axis, code_line, along, lines, byte_axis, byte_line, word, layout.bits, order, layout.offset


@jit
def _pack_in_transposed_4(lanes, stride, rows, words, stored, line_stride, flip):
    # Fold along a row, where loads and stores are contiguous and LLVM vectorizes; then transpose whole words.
    low = np.uint64(0x0F0F0F0F0F0F0F0F)
    turn = np.uint64(flip)
    block = np.empty((_WORDS, 64), dtype=np.uint32)
    for r0 in range(0, rows, _WORDS):
        rn = min(_WORDS, rows - r0)
        for w0 in range(0, words, 64):
            wn = min(64, words - w0)
            for r in range(rn):
                at = (r0 + r) * stride + w0
                row, folded = lanes[at : at + wn], block[r]
                for w in range(wn):
                    x = (row[w] ^ turn) & low
                    x = (x | (x >> np.uint64(4))) & np.uint64(0x00FF00FF00FF00FF)
                    x = (x | (x >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
                    folded[w] = np.uint32((x | (x >> np.uint64(16))) & np.uint64(0xFFFFFFFF))
            for w in range(wn):
                line = stored[(w0 + w) * line_stride + r0 : (w0 + w) * line_stride + r0 + rn]
                for r in range(rn):
                    line[r] = block[r, w]


@jit
def _unpack_in_transposed_4(words, stride, rows, count, codes):
    high = np.uint64(0x8080808080808080)
    eight = np.uint64(0x0808080808080808)
    block = np.empty((_WORDS, 64), dtype=np.uint32)
    for r0 in range(0, rows, _WORDS):
        rn = min(_WORDS, rows - r0)
        for w0 in range(0, count, 64):
            wn = min(64, count - w0)
            for w in range(wn):
                line = words[(w0 + w) * stride + r0 : (w0 + w) * stride + r0 + rn]
                for r in range(rn):
                    block[r, w] = line[r]
            for r in range(rn):
                at = (r0 + r) * count + w0
                row, folded = codes[at : at + wn], block[r]
                for w in range(wn):
                    x = np.uint64(folded[w])
                    x = (x | (x << np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
                    x = (x | (x << np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
                    x = (x | (x << np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
                    row[w] = ((x | high) - eight) ^ high


@jit
def _pack_in_transposed_8(lanes, stride, rows, words, stored, line_stride, flip):
    turn = np.uint32(flip & np.uint64(0xFFFFFFFF))
    for r0 in range(0, rows, _WORDS):
        r1 = min(r0 + _WORDS, rows)
        for w in range(words):
            for r in range(r0, r1):
                stored[w * line_stride + r] = lanes[r * stride + w] ^ turn


@jit
def _unpack_in_transposed_8(words, stride, rows, count, codes):
    for r0 in range(0, rows, _WORDS):
        r1 = min(r0 + _WORDS, rows)
        for w in range(count):
            for r in range(r0, r1):
                codes[r * count + w] = words[w * stride + r] ^ np.uint32(0x80808080)


@jit
def _pack_out_transposed(source, stride, words, cols, stored, line_stride, shifts, offset, mask):
    span = len(shifts)
    block = np.empty((_WORDS, 64), dtype=np.uint32)
    for w0 in range(0, words, _WORDS):
        wn = min(_WORDS, words - w0)
        for c0 in range(0, cols, 64):
            cn = min(64, cols - c0)
            for w in range(wn):
                for c in range(cn):
                    block[w, c] = 0
                for j in range(span):
                    at = ((w0 + w) * span + j) * stride + c0
                    shift = shifts[j]
                    row, lanes = source[at : at + cn], block[w]
                    for c in range(cn):
                        lanes[c] |= np.uint32((np.int32(row[c]) + np.int32(offset)) & np.int32(mask)) << shift
            for c in range(cn):
                line = stored[(c0 + c) * line_stride + w0 : (c0 + c) * line_stride + w0 + wn]
                for w in range(wn):
                    line[w] = block[w, c]


@jit
def _pack_out_transposed_4(source, stride, words, cols, stored, line_stride, rows, offset):
    # Pair nibbles to bytes, 64 columns at a time, then bytes to words: each step in the narrowest lanes that hold it.
    block = np.empty((_WORDS, 64), dtype=np.uint32)
    pairs = np.empty((4, 64), dtype=np.uint8)
    for w0 in range(0, words, _WORDS):
        wn = min(_WORDS, words - w0)
        for c0 in range(0, cols, 64):
            cn = min(64, cols - c0)
            for w in range(wn):
                for k in range(4):
                    at = ((w0 + w) * 8 + rows[2 * k]) * stride + c0
                    low = source[at : at + cn]
                    at = ((w0 + w) * 8 + rows[2 * k + 1]) * stride + c0
                    high = source[at : at + cn]
                    pair = pairs[k]
                    for c in range(cn):
                        first = np.uint8(np.uint8(low[c]) + offset) & np.uint8(15)
                        pair[c] = np.uint8(first | np.uint8(np.uint8(np.uint8(high[c]) + offset) << np.uint8(4)))
                lanes, p0, p1, p2, p3 = block[w], pairs[0], pairs[1], pairs[2], pairs[3]
                for c in range(cn):
                    half = np.uint32(p0[c]) | (np.uint32(p1[c]) << np.uint32(8))
                    lanes[c] = half | (np.uint32(p2[c]) << np.uint32(16)) | (np.uint32(p3[c]) << np.uint32(24))
            for c in range(cn):
                line = stored[(c0 + c) * line_stride + w0 : (c0 + c) * line_stride + w0 + wn]
                for w in range(wn):
                    line[w] = block[w, c]


@jit
def _unpack_out_transposed_4(words, stride, count, cols, codes, rows, turn, low):
    block = np.empty((_WORDS, 64), dtype=np.uint32)
    pair = np.empty(64, dtype=np.uint8)
    for w0 in range(0, count, _WORDS):
        wn = min(_WORDS, count - w0)
        for c0 in range(0, cols, 64):
            cn = min(64, cols - c0)
            for c in range(cn):
                line = words[(c0 + c) * stride + w0 : (c0 + c) * stride + w0 + wn]
                for w in range(wn):
                    block[w, c] = line[w]
            for w in range(wn):
                lanes = block[w]
                for k in range(4):
                    shift = np.uint32(8 * k)
                    for c in range(cn):
                        pair[c] = np.uint8(lanes[c] >> shift)
                    at = ((w0 + w) * 8 + rows[2 * k]) * cols + c0
                    first = codes[at : at + cn]
                    at = ((w0 + w) * 8 + rows[2 * k + 1]) * cols + c0
                    second = codes[at : at + cn]
                    for c in range(cn):
                        first[c] = np.int8(np.uint8((np.uint8(pair[c] - turn) & np.uint8(15)) + low))
                        second[c] = np.int8(np.uint8((np.uint8((pair[c] >> np.uint8(4)) - turn) & np.uint8(15)) + low))


@jit
def _unpack_out_transposed(words, stride, count, cols, codes, shifts, turn, mask, low):
    span = len(shifts)
    block = np.empty((_WORDS, 64), dtype=np.uint32)
    for w0 in range(0, count, _WORDS):
        wn = min(_WORDS, count - w0)
        for c0 in range(0, cols, 64):
            cn = min(64, cols - c0)
            for c in range(cn):
                line = words[(c0 + c) * stride + w0 : (c0 + c) * stride + w0 + wn]
                for w in range(wn):
                    block[w, c] = line[w]
            for w in range(wn):
                for j in range(span):
                    at = ((w0 + w) * span + j) * cols + c0
                    shift = shifts[j]
                    row, lanes = codes[at : at + cn], block[w]
                    for c in range(cn):
                        row[c] = np.int8(((np.int32(lanes[c] >> shift) - np.int32(turn)) & np.int32(mask)) + np.int32(low))


@jit
def _pack_nibble_rows(source, stride, rows, cols, stored, line_stride, offset):
    for r in range(rows):
        first = source[2 * r * stride : 2 * r * stride + cols]
        second = source[(2 * r + 1) * stride : (2 * r + 1) * stride + cols]
        packed = stored[r * line_stride : r * line_stride + cols]
        for c in range(cols):
            low = (np.int32(first[c]) + np.int32(offset)) & np.int32(15)
            high = (np.int32(second[c]) + np.int32(offset)) & np.int32(15)
            packed[c] = np.uint8(low | (high << np.int32(4)))


@jit
def _pack_nibble_columns(source, stride, rows, cols, stored, line_stride, offset):
    for r in range(rows):
        row = source[r * stride : r * stride + 2 * cols]
        packed = stored[r * line_stride : r * line_stride + cols]
        for c in range(cols):
            low = (np.int32(row[2 * c]) + np.int32(offset)) & np.int32(15)
            high = (np.int32(row[2 * c + 1]) + np.int32(offset)) & np.int32(15)
            packed[c] = np.uint8(low | (high << np.int32(4)))


@jit
def _unpack_nibble_rows(stored, stride, rows, cols, codes, turn, low):
    for r in range(rows):
        packed = stored[r * stride : r * stride + cols]
        first = codes[2 * r * cols : (2 * r + 1) * cols]
        second = codes[(2 * r + 1) * cols : (2 * r + 2) * cols]
        for c in range(cols):
            byte = np.int32(packed[c])
            first[c] = np.int8(((byte - np.int32(turn)) & np.int32(15)) + np.int32(low))
            second[c] = np.int8((((byte >> np.int32(4)) - np.int32(turn)) & np.int32(15)) + np.int32(low))


@jit
def _unpack_nibble_columns(stored, stride, rows, cols, codes, turn, low):
    for r in range(rows):
        packed = stored[r * stride : r * stride + cols]
        row = codes[2 * r * cols : 2 * (r + 1) * cols]
        for c in range(cols):
            byte = np.int32(packed[c])
            row[2 * c] = np.int8(((byte - np.int32(turn)) & np.int32(15)) + np.int32(low))
            row[2 * c + 1] = np.int8((((byte >> np.int32(4)) - np.int32(turn)) & np.int32(15)) + np.int32(low))


@jit
def _pack_stream(source, code_axis, code_line, along, lines, byte_axis, byte_line, word, bits, order, offset, stored):
    mask = np.uint32((1 << bits) - 1)
    for line in range(lines):
        held = np.uint32(0)
        filled = 0
        byte = 0
        for j0 in range(0, along, len(order)):
            for i in range(len(order)):
                code = np.int32(source[line * code_line + (j0 + order[i]) * code_axis])
                held |= (np.uint32(code + np.int32(offset)) & mask) << np.uint32(filled)
                filled += bits
                while filled >= 8:
                    stored[line * byte_line + (byte // word) * byte_axis + byte % word] = np.uint8(held & np.uint32(255))
                    held >>= np.uint32(8)
                    filled -= 8
                    byte += 1


@jit
def _unpack_stream(codes, code_axis, code_line, along, lines, byte_axis, byte_line, word, bits, order, offset, stored, low):
    mask = np.uint32((1 << bits) - 1)
    turn = np.int32(offset + low)
    for line in range(lines):
        held = np.uint32(0)
        filled = 0
        byte = 0
        for j0 in range(0, along, len(order)):
            for i in range(len(order)):
                while filled < bits:
                    read = np.uint32(stored[line * byte_line + (byte // word) * byte_axis + byte % word])
                    held |= read << np.uint32(filled)
                    filled += 8
                    byte += 1
                lane = (np.int32(held & mask) - turn) & np.int32(mask)
                codes[line * code_line + (j0 + order[i]) * code_axis] = np.int8(lane + np.int32(low))
                held >>= np.uint32(bits)
                filled -= bits


@jit
def _dequantize(codes, rows, cols, groups, scales, zeros, has_zero, starts, ends, run_group, leaf_cols, weights):
    nought = np.float32(0.0)
    for run in range(len(starts)):
        first = starts[run] // leaf_cols * leaf_cols
        width = min(leaf_cols, cols - first)
        count = ends[run] - starts[run]
        group = run_group[run]
        for r in range(rows):
            scale = scales[r * groups + group]
            zero = zeros[r * groups + group] if has_zero else nought
            at = r * cols + starts[run]
            to = first * rows + r * width + starts[run] - first
            code_run, weight_run = codes[at : at + count], weights[to : to + count]
            for c in range(count):
                weight_run[c] = scale * (np.float32(code_run[c]) - zero) + nought


@jit
def _look_up(codes, rows, cols, groups, scales, table, starts, ends, run_group, leaf_cols, weights):
    nought = np.float32(0.0)
    for run in range(len(starts)):
        first = starts[run] // leaf_cols * leaf_cols
        width = min(leaf_cols, cols - first)
        count = ends[run] - starts[run]
        group = run_group[run]
        for r in range(rows):
            scale = scales[r * groups + group]
            at = r * cols + starts[run]
            to = first * rows + r * width + starts[run] - first
            code_run, weight_run = codes[at : at + count], weights[to : to + count]
            for c in range(count):
                weight_run[c] = scale * table[code_run[c]] + nought


@jit
def _cast_error(values, stored, smallest_normal):
    rounded = np.float32(0.0)
    subnormal = np.float32(0.0)
    for i in range(len(values)):
        error = abs(stored[i] - values[i])
        if error > 0:
            relative = error / abs(values[i])
            if abs(stored[i]) >= smallest_normal:
                rounded = max(rounded, relative)
            else:
                subnormal = max(subnormal, relative)
    return rounded, subnormal


@jit
def _code_range(codes, stride, rows, cols):
    low = np.int8(127)
    high = np.int8(-128)
    for r in range(rows):
        row = codes[r * stride : r * stride + cols]
        for c in range(cols):
            low = min(low, row[c])
            high = max(high, row[c])
    return low, high


@jit
def _equal(left, left_stride, right, right_stride, rows, cols):
    for r in range(rows):
        different = np.int8(0)
        left_row = left[r * left_stride : r * left_stride + cols]
        right_row = right[r * right_stride : r * right_stride + cols]
        for c in range(cols):
            different |= left_row[c] ^ right_row[c]
        if different:
            return False
    return True
