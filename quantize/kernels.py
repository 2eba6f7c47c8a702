"""Rounding of float32 rows to codes, in Numba: without the GIL, bit-exact with the NumPy of ``quantize.rounded_tiles``."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from formats.ir import Array

_jit = numba.njit(nogil=True, cache=True, fastmath=False, error_model="numpy")
_jit_sums = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"}, error_model="numpy")
"""For sums, whose order may change so that they take vectors."""


def absmax(values: Array, group_size: int) -> Array:
    """float32 [rows, groups] of C-contiguous float32 ``values`` [rows, in]."""
    found: Array = np.empty((values.shape[0], values.shape[1] // group_size), np.float32)
    _absmax(values, group_size, found)
    return found


def codes_of(values: Array, scales: Array, group_size: int, lost: int, ends: tuple[int, int], sums: Array) -> Array:
    """int8 [rows, in]: float32 quotients, cut to a mantissa of ``23 - lost`` bits, to the nearest integer, half to even both times.
    ``ends`` are the lowest and the highest code.

    ``sums`` [2] float64 grow by the squares of ``scales * codes - values`` and of ``values``, which are added up by group in float32.
    """
    found: Array = np.empty(values.shape, np.int8)
    _codes(values, scales, group_size, np.uint32(lost), np.float32(ends[0]), np.float32(ends[1]), found, sums)
    return found


@_jit
def _absmax(values: Any, group_size: Any, found: Any) -> None:
    for row in range(values.shape[0]):
        for group in range(found.shape[1]):
            part = values[row, group * group_size : (group + 1) * group_size]
            largest = np.float32(0)
            for i in range(group_size):
                size = abs(part[i])
                if size > largest or size != size:  # a NaN stays, to be found
                    largest = size
            found[row, group] = largest


@_jit_sums
def _squares(values: Any, codes: Any, scale: Any) -> Any:
    apart, size = np.float32(0), np.float32(0)
    for i in range(values.size):
        value = values[i]
        error = np.float32(codes[i]) * scale - value
        apart += error * error
        size += value * value
    return apart, size


@_jit
def _codes(values: Any, scales: Any, group_size: Any, lost: Any, low: Any, high: Any, found: Any, sums: Any) -> None:
    quotients = np.empty(group_size, np.float32)
    bits = quotients.view(np.uint32)
    one = np.uint32(1)
    for row in range(values.shape[0]):
        for group in range(scales.shape[1]):
            begin = group * group_size
            scale = scales[row, group]
            for i in range(group_size):
                quotients[i] = values[row, begin + i] / scale
            if lost:
                half = (one << (lost - one)) - one
                keep = ~((one << lost) - one)
                for i in range(group_size):
                    bits[i] = (bits[i] + ((bits[i] >> lost) & one) + half) & keep
            for i in range(group_size):
                found[row, begin + i] = np.int8(min(max(np.rint(quotients[i]), low), high))
            apart, size = _squares(values[row, begin : begin + group_size], found[row, begin : begin + group_size], scale)
            sums[0] += apart
            sums[1] += size
