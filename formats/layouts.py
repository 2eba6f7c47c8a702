"""Bit layouts: how integer codes sit in the words of a stored tensor.

A ``PackLayout`` is a few declared facts, and one engine reads and writes them all: the plain NumPy
reference in this module (obviously right, any layout), and the Numba kernels of ``formats.kernels``
(tiled, without the GIL, bit-exact with the reference), which serve where Numba is installed and the work
is large enough to pay for loading it.

The packed axis is a little-endian bit stream: code ``j`` occupies bits ``[j * bits, (j + 1) * bits)`` of it,
so widths that do not divide a word (3 bits) straddle words. ``order`` permutes codes inside a span.

A ``TileLayout`` is the other kind: rectangles of [out, in] that are stored whole, their codes in an order of their own
(what tensor cores or a GEMV kernel want). Both are a ``Layout``.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from .errors import UnreadableError, WeighbridgeError
from .ir import Array, ArrayLike, read
from .workspace import Workspace, empty

if TYPE_CHECKING:
    from types import ModuleType

Axis = Literal["out", "in"]

NUMBA_PAYS_FROM = 1 << 25
"""Codes in a run from which loading and warming the Numba kernels costs less than it saves."""


class Layout(Protocol):
    """How a canonical integer matrix [out, x] sits in a stored tensor; whole matrices and rectangles cut at its borders."""

    @property
    def bits(self) -> int: ...

    @property
    def offset(self) -> int: ...

    @property
    def word_dtype(self) -> np.dtype[Any]: ...

    @property
    def is_verbatim(self) -> bool: ...

    @property
    def transposed(self) -> bool:
        """Whether a stored row runs along out, so that the matrix is stored by input."""
        ...

    def stored_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the stored tensor for a canonical matrix of ``shape``."""
        ...

    def canonical_shape(self, stored: tuple[int, int]) -> tuple[int, int]:
        """The inverse of ``stored_shape``."""
        ...

    def corner(self, row: int, col: int) -> tuple[int, int]:
        """Where canonical [row, col], at a border of the layout, lies in the stored array."""
        ...

    def pack(self, codes: Array, stored: Array | None = None) -> Array:
        """Canonical integers -> a stored array: a new one, or ``stored``, whose rows are contiguous."""
        ...

    def unpack(
        self, stored: ArrayLike, rows: slice = slice(None), cols: slice = slice(None), dtype: str = "i1", work: Workspace | None = None
    ) -> Array:
        """A rectangle of the canonical matrix out of the whole ``stored`` array; ``work`` may hold it."""
        ...


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

    def corner(self, row: int, col: int) -> tuple[int, int]:
        """Where canonical [row, col] lies in the stored array; along the packed axis a multiple of ``span``."""
        word_bits = 8 * self.word_dtype.itemsize
        if self.axis == "out":
            row = row * self.bits // word_bits
        else:
            col = col * self.bits // word_bits
        return (col, row) if self.transposed else (row, col)

    def pack(self, codes: Array, stored: Array | None = None) -> Array:
        """Canonical integer ``[out, x]`` -> a stored array: a new one, or ``stored``, whose rows are contiguous.

        Codes outside the lane's range raise ``WeighbridgeError``.
        """
        _check_lanes(codes, self.bits, self.low)
        stored = _place_for(self, codes, stored)
        engine = kernels() if self._in_bytes else None
        if self.is_verbatim:
            stored[...] = codes.T if self.transposed else codes
        elif engine is None or not codes.size:
            stored[...] = pack_reference(self, codes)
        else:
            engine.pack(self, codes.astype(np.int8, copy=False), stored)
        return stored

    def unpack(
        self, stored: ArrayLike, rows: slice = slice(None), cols: slice = slice(None), dtype: str = "i1", work: Workspace | None = None
    ) -> Array:
        """A rectangle of the canonical matrix out of the whole ``stored`` array.

        ``rows`` and ``cols`` are canonical; along the packed axis they must begin at a multiple of ``span``.
        A layout that stores one code per byte as it is gives what it reads, without copying.
        """
        if self.is_verbatim and np.dtype(dtype) == self.word_dtype:
            return read(stored, cols, rows, work).T if self.transposed else read(stored, rows, cols, work)
        part = read(stored, *self._cut(stored, rows, cols), work)
        engine = kernels() if self._in_bytes else None
        if engine is None or not part.size:
            return unpack_reference(self, part, dtype)
        codes = empty(work, "codes", self.canonical_shape((part.shape[0], part.shape[1])), np.int8)
        engine.unpack(self, part, codes)
        return codes.astype(dtype, copy=False)

    @property
    def _in_bytes(self) -> bool:
        """Whether every code fits the kernels' int8."""
        return self.low >= -128 and self.low + (1 << self.bits) <= 128

    @property
    def is_verbatim(self) -> bool:
        """Whether a stored byte is the code itself."""
        low = {"i1": -128, "u1": 0}.get(self.word)
        return self.bits == 8 and self.low == low and not self.order and self.offset == 0

    def _cut(self, stored: ArrayLike, rows: slice, cols: slice) -> tuple[slice, slice]:
        """The rectangle of ``stored`` that holds the canonical one."""
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
        return (cuts[1], cuts[0]) if self.transposed else (cuts[0], cuts[1])


def _place_for(layout: Layout, codes: Array, stored: Array | None) -> Array:
    """Where ``codes`` will be packed: ``stored`` if its shape and dtype fit, or a new array."""
    shape = layout.stored_shape((codes.shape[0], codes.shape[1]))
    if stored is None:
        return np.empty(shape, dtype=layout.word_dtype)
    if stored.shape != shape or stored.dtype != layout.word_dtype:
        raise WeighbridgeError(f"codes {list(codes.shape)} take {layout.word_dtype} {list(shape)}, not {stored.dtype} {list(stored.shape)}")
    return stored


def code_range(codes: Array) -> tuple[int, int]:
    """Smallest and largest of integer ``codes`` that are not empty."""
    engine = kernels() if codes.dtype == np.int8 and codes.ndim == 2 else None
    return (int(codes.min()), int(codes.max())) if engine is None else engine.code_range(codes)


def _check_lanes(codes: Array, bits: int, low: int) -> None:
    if not codes.size or (bits == 8 and (codes.dtype, low) in {(np.dtype(np.int8), -128), (np.dtype(np.uint8), 0)}):
        return
    smallest, largest = code_range(codes)
    if smallest < low or largest >= low + (1 << bits):
        raise WeighbridgeError(
            f"codes from {smallest} to {largest} do not fit lanes of {bits} bits that hold {low} to {low + (1 << bits) - 1}"
        )


@dataclass(frozen=True, slots=True)
class TileLayout:
    """Tiles of a canonical ``[out, in]`` matrix, each stored in one row of words, its codes in an order of their own.

    bits          bits of one stored lane: 1 to 8
    word          NumPy dtype of the stored tensor
    tile          (out, in) extent of a tile
    order         lane i of a tile's words, the lowest bits of the first word first, holds the tile's code ``order[i]``,
                  counted along in, then out
    transposed    tiles that follow one another along out lie in one stored row, instead of those along in
    offset, low   as in ``PackLayout``
    """

    bits: int
    word: str
    tile: tuple[int, int]
    order: tuple[int, ...] = field(repr=False, hash=False)
    transposed: bool = False
    offset: int = 0
    low: int = 0

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(self.tile[0] * self.tile[1])):
            raise WeighbridgeError(f"the lane order of a tile of {self.tile} is not a permutation of its codes")
        if len(self.order) * self.bits % (8 * self.word_dtype.itemsize):
            raise WeighbridgeError(f"a tile of {self.tile} codes of {self.bits} bits does not fill words of {self.word}")

    @property
    def word_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.word)

    @property
    def is_verbatim(self) -> bool:
        return False

    @property
    def words(self) -> int:
        """Words of a tile."""
        return len(self.order) * self.bits // (8 * self.word_dtype.itemsize)

    def stored_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the stored tensor for a canonical matrix of ``shape``."""
        if shape[0] % self.tile[0] or shape[1] % self.tile[1]:
            raise UnreadableError(f"codes [out, in] = {list(shape)} do not fill tiles of {list(self.tile)}")
        return self.corner(*shape)

    def canonical_shape(self, stored: tuple[int, int]) -> tuple[int, int]:
        """The inverse of ``stored_shape``."""
        if stored[1] % self.words:
            raise UnreadableError(f"rows of {stored[1]} words do not hold whole tiles of {self.words} words")
        first, second = stored[0], stored[1] // self.words
        out, in_ = (second, first) if self.transposed else (first, second)
        return out * self.tile[0], in_ * self.tile[1]

    def corner(self, row: int, col: int) -> tuple[int, int]:
        """Where canonical [row, col], the corner of a tile, lies in the stored array."""
        out, in_ = row // self.tile[0], col // self.tile[1]
        return (in_, out * self.words) if self.transposed else (out, in_ * self.words)

    def pack(self, codes: Array, stored: Array | None = None) -> Array:
        """Canonical integer ``[out, in]`` of whole tiles -> a stored array: a new one, or ``stored``, whose rows are contiguous.

        Codes outside the lane's range raise ``WeighbridgeError``.
        """
        _check_lanes(codes, self.bits, self.low)
        stored = _place_for(self, codes, stored)
        engine = self._engine()
        if engine is None or not codes.size:
            stored[...] = pack_tiles_reference(self, codes)
        else:
            engine.pack_tiles(self, codes.astype(np.int8, copy=False), stored)
        return stored

    def unpack(
        self, stored: ArrayLike, rows: slice = slice(None), cols: slice = slice(None), dtype: str = "i1", work: Workspace | None = None
    ) -> Array:
        """A rectangle of whole tiles of the canonical matrix out of the whole ``stored`` array."""
        shape = self.canonical_shape((stored.shape[0], stored.shape[1]))
        cuts = []
        for axis, cut, length, tile in (("out", rows, shape[0], self.tile[0]), ("in", cols, shape[1], self.tile[1])):
            start, stop, step = cut.indices(length)
            if step != 1 or start % tile or stop % tile:
                raise WeighbridgeError(f"a cut at {start}:{stop}:{step} along {axis} splits a tile of {tile} codes")
            cuts.append((start, max(stop, start)))
        (row, end_row), (col, end_col) = cuts
        begin, end = self.corner(row, col), self.corner(end_row, end_col)
        part = read(stored, slice(begin[0], end[0]), slice(begin[1], end[1]), work)
        engine = self._engine()
        if engine is None or not part.size:
            return unpack_tiles_reference(self, part, dtype)
        codes = empty(work, "codes", self.canonical_shape((part.shape[0], part.shape[1])), np.int8)
        engine.unpack_tiles(self, part, codes)
        return codes.astype(dtype, copy=False)

    def _engine(self) -> ModuleType | None:
        """``formats.tile_kernels`` if this run should use it, and it knows such tiles."""
        if kernels() is None:
            return None
        from . import tile_kernels

        return tile_kernels if tile_kernels.fragments_of(self) is not None else None


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A lazily readable canonical ``[out, x]`` integer matrix: a layout over the stored array (``LazyArray``).

    width   columns that mean something, where the stored ones are padded; None: all
    """

    layout: Layout
    stored: ArrayLike
    dtype_name: str = "i1"
    width: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        out, columns = self.layout.canonical_shape((self.stored.shape[0], self.stored.shape[1]))
        return out, columns if self.width is None else self.width

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype_name)

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        """Codes ``[rows, cols]``; cuts along the packed axis at multiples of the layout's span."""
        if self.width is not None:
            return self.layout.unpack(self.stored, rows, dtype=self.dtype_name, work=work)[:, : self.width][:, cols]
        return self.layout.unpack(self.stored, rows, cols, self.dtype_name, work)


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


def pack_tiles_reference(layout: TileLayout, codes: Array) -> Array:
    """Codes ``[out, in]`` -> stored words, tile by tile: its codes in the layout's order, written as a bit stream. The reference."""
    (tile_out, tile_in), (out, in_) = layout.tile, codes.shape
    tiles = codes.reshape(out // tile_out, tile_out, in_ // tile_in, tile_in).transpose(0, 2, 1, 3)
    lanes = tiles.reshape(-1, len(layout.order))[:, list(layout.order)]
    stored = pack_reference(PackLayout(layout.bits, layout.word, offset=layout.offset, low=layout.low), lanes)
    stored = stored.reshape(out // tile_out, in_ // tile_in, layout.words)
    if layout.transposed:
        stored = stored.transpose(1, 0, 2)
    return np.ascontiguousarray(stored).reshape(layout.stored_shape((out, in_)))


def unpack_tiles_reference(layout: TileLayout, stored: Array, dtype: str = "i1") -> Array:
    """The inverse of ``pack_tiles_reference``. The reference."""
    shape, (tile_out, tile_in) = layout.canonical_shape((stored.shape[0], stored.shape[1])), layout.tile
    words = np.ascontiguousarray(stored).reshape(stored.shape[0], -1, layout.words)
    if layout.transposed:
        words = words.transpose(1, 0, 2)
    lanes = unpack_reference(
        PackLayout(layout.bits, layout.word, offset=layout.offset, low=layout.low),
        np.ascontiguousarray(words).reshape(-1, layout.words),
        dtype,
    )
    tiles = lanes[:, np.argsort(layout.order)].reshape(shape[0] // tile_out, shape[1] // tile_in, tile_out, tile_in)
    return np.ascontiguousarray(tiles.transpose(0, 2, 1, 3)).reshape(shape)


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
