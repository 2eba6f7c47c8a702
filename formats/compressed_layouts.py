"""How compressed-tensors lays out codes and scales: whole lanes or a dense stream in 32-bit words, nibbles, exponents in a byte.

Up to 0.17 a word of ``pack-quantized`` holds ``32 // bits`` codes, and where bits do not divide 32 its top bits are idle; since
0.18 codes are one little-endian bit stream. For 1, 2, 4 and 8 bits both are the same, and a ``PackLayout``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from .ir import Array, ArrayLike, read
from .layouts import Axis, PackedMatrix, PackLayout
from .stored_tensor import StoredTensor
from .workspace import Workspace

INT8 = PackLayout(bits=8, word="i1", low=-128)
"""int-quantized: one code a byte, zero points too."""
FLOAT8 = PackLayout(bits=8, word="u1")
"""float-quantized and mxfp8-quantized: one bit pattern a byte."""
FLOAT4 = PackLayout(bits=4, word="u1")
"""nvfp4 and mxfp4: two bit patterns a byte."""


@functools.cache
def packed_layout(bits: int, axis: Axis = "in") -> PackLayout:
    """pack-quantized codes, and with axis "out" zero points [out, groups]; widths that do not divide a word: from 0.18 on."""
    return PackLayout(bits, "<i4", axis, offset=1 << (bits - 1), low=-(1 << (bits - 1)))


@dataclass(frozen=True, slots=True)
class Lanes:
    """Signed codes in 32-bit words for which there is no ``PackLayout``: words with idle bits, or more of them than codes (``LazyArray``).

    shape   [out, x] of what is packed; axis: along which; dense: codes lie across words
    """

    stored: ArrayLike
    shape: tuple[int, int]
    bits: int
    axis: Axis
    dense: bool
    dtype_name: str = "i1"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype_name)

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        if self.axis == "in":
            return self._read(rows, cols, work)
        return np.ascontiguousarray(self._read(cols, rows, work).T)

    def _read(self, across: slice, along: slice, work: Workspace | None) -> Array:
        """[across, along], where codes are packed along the second axis."""
        code = np.arange(self.shape[1 if self.axis == "in" else 0])[along]
        if not code.size:
            return np.empty((len(range(*across.indices(self.shape[0 if self.axis == "in" else 1]))), 0), dtype=self.dtype)
        lanes = 32 // self.bits
        bit = code * self.bits if self.dense else code // lanes * 32 + code % lanes * self.bits
        first = int(bit[0]) // 32
        near = slice(first, (int(bit[-1]) + self.bits - 1) // 32 + 1)
        part = read(self.stored, across, near, work) if self.axis == "in" else read(self.stored, near, across, work).T
        codes = np.empty((part.shape[0], code.size), dtype=self.dtype)
        word, shift = bit // 32 - first, (bit % 32).astype(np.uint64)
        step = max(1, (1 << 16) // code.size)
        for start in range(0, part.shape[0], step):
            low = np.pad(part[start : start + step].astype(np.int32, copy=False).view(np.uint32).astype(np.uint64), ((0, 0), (0, 1)))
            both = low[:, word] | low[:, word + 1] << np.uint64(32)
            codes[start : start + step] = (both >> shift & np.uint64((1 << self.bits) - 1)).astype(np.int16) - (1 << self.bits - 1)
        return codes


_EXPONENTS = (np.arange(256, dtype=np.uint32) << np.uint32(23)).view(np.float32)
_EXPONENTS[0] = 2.0**-127  # the only one that is not a normal number
_EXPONENTS = _EXPONENTS.astype(ml_dtypes.bfloat16)


@dataclass(frozen=True, slots=True)
class SmallScales:
    """Scales that are stored in a byte each: MX's exponents as bfloat16, NVFP4's float8_e4m3fn as float32 (``LazyArray``)."""

    stored: ArrayLike

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(ml_dtypes.bfloat16 if self.stored.dtype == np.uint8 else np.float32)

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        part = read(self.stored, rows, cols, work)
        return np.asarray(_EXPONENTS[part] if part.dtype == np.uint8 else part.astype(np.float32))


def lanes_of(stored: Any, shape: tuple[int, int], bits: int, axis: Axis, dense: bool, dtype: str) -> ArrayLike:
    """Signed integers of ``shape`` out of words packed along ``axis``: by a layout where one can say it, else lane by lane."""
    along = 1 if axis == "in" else 0
    held, filled = divmod(32 * stored.shape[along], bits)
    if (dense or 32 % bits == 0) and filled == 0 and (axis == "in" or held == shape[0]):
        width = shape[1] if axis == "in" and held != shape[1] else None
        return PackedMatrix(packed_layout(bits, axis), stored, dtype, width)
    return Lanes(stored, shape, bits, axis, dense, dtype)


def as_bytes(stored: Any) -> Any:
    """A tensor of bytes of another dtype as uint8, unread where it can be."""
    return replace(stored, dtype=np.dtype("u1")) if isinstance(stored, StoredTensor) else stored.view(np.uint8)
