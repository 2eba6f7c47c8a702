"""Bits and dtypes by the tools' own recipes, in plain NumPy: the words that AutoAWQ, AutoGPTQ, compressed-tensors and msModelSlim pack."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from checkpoints import DTYPES, Array

from .verdict import insist

SMALLEST_NORMAL = {"F16": 2.0**-14, "BF16": 2.0**-126, "F32": 2.0**-126}


def cast(values: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(np.float32).astype(DTYPES[dtype])


def pack(lanes: Array, bits: int) -> Array:
    """int32 words of a little-endian bit stream along the last axis of unsigned ``lanes`` [rows, n]."""
    span = 32 if 32 % bits else 32 // bits
    spans = lanes.reshape(lanes.shape[0], -1, span)
    words = np.zeros((*spans.shape[:2], span * bits // 32), np.uint32)
    for lane in range(span):
        word, shift = divmod(lane * bits, 32)
        value = spans[:, :, lane].astype(np.uint32)
        words[:, :, word] |= value << np.uint32(shift)
        if shift + bits > 32:
            words[:, :, word + 1] |= value >> np.uint32(32 - shift)
    return words.reshape(lanes.shape[0], -1).view(np.int32)


def unpack(words: Array, bits: int) -> Array:
    """The unsigned lanes [rows, n] of ``pack``."""
    span = 32 if 32 % bits else 32 // bits
    spans = np.ascontiguousarray(words).view(np.uint32).reshape(words.shape[0], -1, span * bits // 32)
    lanes = np.empty((*spans.shape[:2], span), np.uint8)
    for lane in range(span):
        word, shift = divmod(lane * bits, 32)
        value = spans[:, :, word] >> np.uint32(shift)
        if shift + bits > 32:
            value |= spans[:, :, word + 1] << np.uint32(32 - shift)
        lanes[:, :, lane] = value & np.uint32((1 << bits) - 1)
    return lanes.reshape(words.shape[0], -1)


def unsigned(codes: Array, bits: int) -> Array:
    return (codes.astype(np.int16) + (1 << bits - 1)).astype(np.uint8)


def signed(lanes: Array, bits: int) -> Array:
    return lanes.astype(np.int16) - (1 << bits - 1)


def pack_padded(lanes: Array, bits: int) -> Array:
    """compressed-tensors' words of whole lanes along the last axis; idle lanes of the last word are 0."""
    return pack(pad(lanes, -(-lanes.shape[1] // (32 // bits)) * (32 // bits)), bits)


def unpack_padded(words: Array, bits: int, count: int) -> Array:
    """The first ``count`` lanes of each row; what lies behind them must be 0."""
    insist(words.shape[1] == -(-count // (32 // bits)), "words are", list(words.shape), "for", count, "codes of", bits, "bits")
    lanes = unpack(words, bits)
    insist(not lanes[:, count:].any(), "idle lanes are not 0")
    return lanes[:, :count]


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def in_eights(matrix: Array, order: Any) -> Array:
    """Each eight columns in ``order``."""
    return matrix.reshape(matrix.shape[0], -1, 8)[:, :, order].reshape(matrix.shape)


def _fast_order() -> Array:
    """Of 4 x 64 codes, those that AutoAWQ's ``pack_intweight`` puts into the lanes of 64 int16 words."""
    pairs = np.arange(256).reshape(4, 2, 4, 4, 2).transpose(0, 1, 3, 2, 4)
    return pairs.reshape(4, 2, 4, 4, 2).transpose(0, 1, 2, 4, 3).reshape(-1)


def _marlin_order() -> Array:
    """Of four blocks of 16 inputs by 16 outputs, the codes in the lanes of 128 words, as in AutoAWQ's ``_get_perms``."""
    order = []
    for thread in range(32):
        rows = [2 * (thread % 4), 2 * (thread % 4) + 1, 2 * (thread % 4 + 4), 2 * (thread % 4 + 4) + 1]
        one = [16 * row + thread // 4 + 8 * block for block in (0, 1) for row in rows]
        order += [code + 256 * block for block in range(4) for code in one]
    return in_eights(np.array(order).reshape(-1, 8), AWQ_ORDER).reshape(-1)


FAST_ORDER, MARLIN_ORDER = _fast_order(), _marlin_order()
MARLIN_SCALES = [i + 8 * j for i in range(8) for j in range(8)]
MARLIN_SINGLE = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def pack_fast(codes: Array) -> Array:
    out, in_ = codes.shape
    tiles = codes.reshape(out // 4, 4, in_ // 64, 64).transpose(0, 2, 1, 3).reshape(-1, 256)[:, FAST_ORDER]
    return pack(tiles, 4).view(np.int16).reshape(out // 4, in_)


def unpack_fast(stored: Array) -> Array:
    out, in_ = stored.shape[0] * 4, stored.shape[1]
    tiles = unpack(np.ascontiguousarray(stored).reshape(-1, 64).view(np.int32), 4)[:, np.argsort(FAST_ORDER)]
    return tiles.reshape(out // 4, in_ // 64, 4, 64).transpose(0, 2, 1, 3).reshape(out, in_)


def pack_marlin(codes: Array) -> Array:
    out, in_ = codes.shape
    blocks = codes.T.reshape(in_ // 16, 16, out // 16, 16).transpose(0, 2, 1, 3).reshape(-1, 1024)[:, MARLIN_ORDER]
    return pack(blocks, 4).reshape(in_ // 16, out * 2)


def unpack_marlin(stored: Array) -> Array:
    in_, out = stored.shape[0] * 16, stored.shape[1] // 2
    blocks = unpack(np.ascontiguousarray(stored).reshape(-1, 128), 4)[:, np.argsort(MARLIN_ORDER)]
    return blocks.reshape(in_ // 16, out // 16, 16, 16).transpose(0, 2, 1, 3).reshape(in_, out).T


def marlin_scales(scales: Array) -> Array:
    """[groups, out] in Marlin's order."""
    order = MARLIN_SCALES if scales.shape[0] > 1 else MARLIN_SINGLE
    return scales.reshape(-1, len(order))[:, order].reshape(scales.shape)


def padded_groups(groups: int, group: int) -> int:
    """Columns of AutoAWQ's GEMV scales: ``8 * calculate_zeros_width``."""
    at_once = {64: 2, 32: 4}.get(group, 1)
    return 8 * math.ceil(math.ceil(groups / 8) / at_once) * at_once


def pad(grid: Array, columns: int) -> Array:
    return np.pad(grid, ((0, 0), (0, columns - grid.shape[1])))


def nibbles(codes: Array, axis: int) -> Array:
    """ascendv1: two signed codes a byte along ``axis``, the first in the low nibble."""
    lanes = codes.astype(np.uint8) & 15
    even, odd = (lanes[::2], lanes[1::2]) if axis == 0 else (lanes[:, ::2], lanes[:, 1::2])
    return (even | odd << 4).astype(np.uint8).view(np.int8)


def codes_of_nibbles(stored: Array, axis: int) -> Array:
    lanes = stored.view(np.uint8)
    both = np.stack([lanes & 15, lanes >> 4], axis + 1)
    codes = both.reshape((-1, stored.shape[1]) if axis == 0 else (stored.shape[0], -1)).astype(np.int8)
    return ((codes ^ 8) - 8).astype(np.int8)
