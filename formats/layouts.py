"""Bit layouts: how integer codes sit in the words of a stored tensor.

A ``PackLayout`` is a few declared facts, and one engine reads and writes them all: the plain NumPy
reference in this module (obviously right, any layout), and the Numba kernels of ``formats.kernels``
(tiled, without the GIL, bit-exact with the reference), which serve where Numba is installed and the work
is large enough to pay for loading it.

The packed axis is a little-endian bit stream: code ``j`` occupies bits ``[j * bits, (j + 1) * bits)`` of it,
so widths that do not divide a word (3 bits) straddle words. ``order`` permutes codes inside a span.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .errors import UnreadableError, WeighbridgeError
from .ir import Array

if TYPE_CHECKING:
    from types import ModuleType

Axis = Literal["out", "in"]

NUMBA_PAYS_FROM = 1 << 25
"""Codes in a run from which loading and warming the Numba kernels costs less than it saves."""


@dataclass(frozen=True, slots=True)
class PackLayout:
    """One way to store a canonical ``[out, in]`` (or ``[out, groups]``) integer matrix.

    bits          bits of one stored lane: 1 to 8
    word          NumPy dtype of the stored tensor, e.g. "<i4", "i1", "<i2", "<i8"
    axis          the canonical axis that is packed
    transposed    the stored array is [in, out] instead of [out, in]
    order         lane i of a span holds the span's element ``order[i]``; () means natural order
    offset        a lane is ``(code + offset) mod 2**bits``
    low           the smallest code; lanes decode into ``[low, low + 2**bits - 1]``
    """

    bits: int
    word: str = "<i4"
    axis: Axis = "in"
    transposed: bool = False
    order: tuple[int, ...] = ()
    offset: int = 0
    low: int = field(default=0)

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise WeighbridgeError(f"a lane of {self.bits} bits; layouts hold 1 to 8")
        if self.order and sorted(self.order) != list(range(len(self.order))):
            raise WeighbridgeError(f"lane order {self.order} is not a permutation")

    @property
    def word_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.word)

    @property
    def span(self) -> int:
        """Codes in the smallest whole number of words: tiles and matrices are cut at multiples of it."""
        word_bits = 8 * self.word_dtype.itemsize
        return math.lcm(math.lcm(self.bits, word_bits) // self.bits, len(self.order) or 1)

    def stored_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the stored tensor for a canonical matrix of ``shape``."""
        packed = shape[0 if self.axis == "out" else 1]
        if packed % self.span:
            raise UnreadableError(f"{packed} codes along {self.axis} do not fill spans of {self.span} codes")
        words = packed * self.bits // (8 * self.word_dtype.itemsize)
        out, other = (words, shape[1]) if self.axis == "out" else (shape[0], words)
        return (other, out) if self.transposed else (out, other)

    def canonical_shape(self, stored: tuple[int, int]) -> tuple[int, int]:
        """The inverse of ``stored_shape``."""
        out, other = (stored[1], stored[0]) if self.transposed else stored
        scale = 8 * self.word_dtype.itemsize
        if self.axis == "out":
            return out * scale // self.bits, other
        return out, other * scale // self.bits

    def pack(self, codes: Array) -> Array:
        """Canonical integer ``[out, x]`` -> a new stored array. Codes outside the lane's range raise ``WeighbridgeError``."""
        if codes.size and not (self.low <= int(codes.min()) and int(codes.max()) < self.low + (1 << self.bits)):
            raise WeighbridgeError(
                f"codes from {int(codes.min())} to {int(codes.max())} do not fit lanes of {self.bits} bits "
                f"that hold {self.low} to {self.low + (1 << self.bits) - 1}"
            )
        stored = np.empty(self.stored_shape((codes.shape[0], codes.shape[1])), dtype=self.word_dtype)
        engine = kernels() if self._in_bytes else None
        if engine is None:
            stored[...] = pack_reference(self, codes)
        else:
            engine.pack(self, codes.astype(np.int8, copy=False), stored)
        return stored

    def unpack(self, stored: Array, rows: slice = slice(None), cols: slice = slice(None), dtype: str = "i1") -> Array:
        """A rectangle of the canonical matrix out of the whole ``stored`` array.

        ``rows`` and ``cols`` are canonical; along the packed axis they must begin at a multiple of ``span``.
        A layout that stores one code per byte as it is gives a view, without copying.
        """
        if self.is_verbatim and dtype == "i1":
            return (stored.T if self.transposed else stored)[rows, cols]
        engine = kernels() if self._in_bytes else None
        part = self._cut(stored, rows, cols)
        if engine is None:
            return unpack_reference(self, part, dtype)
        return np.asarray(engine.unpack(self, part)).astype(dtype, copy=False)

    @property
    def _in_bytes(self) -> bool:
        """Whether every code fits the kernels' int8."""
        return self.low >= -128 and self.low + (1 << self.bits) <= 128

    @property
    def is_verbatim(self) -> bool:
        """Whether a stored byte is the code itself."""
        return self.bits == 8 and self.word_dtype == np.int8 and not self.order and self.offset == 0 and self.low == -128

    def _cut(self, stored: Array, rows: slice, cols: slice) -> Array:
        """The part of ``stored`` that holds the canonical rectangle."""
        shape = self.canonical_shape((stored.shape[0], stored.shape[1]))
        cuts = []
        for axis, cut, length in (("out", rows, shape[0]), ("in", cols, shape[1])):
            start, stop, step = cut.indices(length)
            if step != 1:
                raise WeighbridgeError(f"a packed matrix is read in rectangles, not with step {step}")
            if axis == self.axis:
                if start % self.span or (stop % self.span and stop != length):
                    raise WeighbridgeError(f"a cut at {start}:{stop} along {axis} splits a span of {self.span} codes")
                word_bits = 8 * self.word_dtype.itemsize
                start, stop = start * self.bits // word_bits, stop * self.bits // word_bits
            cuts.append(slice(start, stop))
        return stored[cuts[1], cuts[0]] if self.transposed else stored[cuts[0], cuts[1]]


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A lazily readable canonical ``[out, x]`` integer matrix: a layout over the stored array (``LazyArray``)."""

    layout: PackLayout
    stored: Array
    dtype_name: str = "i1"

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.canonical_shape((self.stored.shape[0], self.stored.shape[1]))

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype_name)

    def read(self, rows: slice = slice(None), cols: slice = slice(None)) -> Array:
        """Codes ``[rows, cols]``; cuts along the packed axis at multiples of the layout's span."""
        return self.layout.unpack(self.stored, rows, cols, self.dtype_name)


def pack_reference(layout: PackLayout, codes: Array) -> Array:
    """Codes ``[out, x]`` -> stored words, by writing the bit stream out bit by bit. The reference."""
    if not codes.size:
        return np.empty(layout.stored_shape((codes.shape[0], codes.shape[1])), dtype=layout.word_dtype)
    matrix = codes if layout.axis == "in" else codes.T
    lanes = ((matrix.astype(np.int16) + layout.offset) & ((1 << layout.bits) - 1)).astype(np.uint8)
    if layout.order:
        lanes = lanes.reshape(lanes.shape[0], -1, len(layout.order))[:, :, list(layout.order)].reshape(lanes.shape)
    bits = (lanes[:, :, None] >> np.arange(layout.bits, dtype=np.uint8)) & np.uint8(1)
    stream = np.packbits(bits.reshape(lanes.shape[0], -1), axis=1, bitorder="little")
    words = np.ascontiguousarray(stream).view(layout.word_dtype)
    stored = words if layout.axis == "in" else words.T
    return np.ascontiguousarray(stored.T if layout.transposed else stored)


def unpack_reference(layout: PackLayout, stored: Array, dtype: str = "i1") -> Array:
    """The inverse of ``pack_reference``, by reading the bit stream bit by bit. The reference."""
    if not stored.size:
        return np.empty(layout.canonical_shape((stored.shape[0], stored.shape[1])), dtype=dtype)
    words = stored.T if layout.transposed else stored
    words = np.ascontiguousarray(words if layout.axis == "in" else words.T, dtype=layout.word_dtype)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    bits = bits.reshape(words.shape[0], -1, layout.bits).astype(np.int16)
    lanes = (bits << np.arange(layout.bits, dtype=np.int16)).sum(axis=2, dtype=np.int16)
    if layout.order:
        inverse = np.argsort(layout.order)
        lanes = lanes.reshape(lanes.shape[0], -1, len(layout.order))[:, :, inverse].reshape(lanes.shape)
    codes = ((lanes - layout.offset - layout.low) & ((1 << layout.bits) - 1)) + layout.low
    return np.ascontiguousarray((codes if layout.axis == "in" else codes.T).astype(dtype))


_expected_codes = 0


def expect_work(codes: int) -> None:
    """Tell the engine how many codes a run will move, so that small runs do not pay for loading Numba."""
    global _expected_codes
    _expected_codes = codes


def kernels() -> ModuleType | None:
    """``formats.kernels`` if this run should use it. WEIGHBRIDGE_KERNELS=numba|numpy decides outright."""
    choice = os.environ.get("WEIGHBRIDGE_KERNELS", "")
    if choice == "numpy" or (choice != "numba" and _expected_codes < NUMBA_PAYS_FROM):
        return None
    return _load_kernels(choice == "numba")


@functools.cache
def _load_kernels(required: bool) -> ModuleType | None:
    try:
        from . import kernels as module
    except ImportError:
        if required:
            raise WeighbridgeError("WEIGHBRIDGE_KERNELS=numba, but Numba is not installed: pip install numba") from None
        return None
    return module
