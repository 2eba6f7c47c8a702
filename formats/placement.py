"""Tensors whose elements lie scattered over several files: read and written in rectangles, in the order that a model has them.

TurboMind stores several linears in one matrix, turned, cut into ranks, with the rows of each head in another order
(``formats.turbomind_tree`` says what lies where). A ``Place`` says that of one tensor in a few numbers; here they become bytes.

A tensor is seen as lines of units. A *unit* is what stays together: an element, or a run of packed words. A file holds some of the
lines, ``pitch`` bytes from one to the next, and in each some of the units, ``step`` bytes from one to the next.
Files are read and written by position, never mapped (``formats.files``).
"""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .errors import UnreadableError
from .files import Read, Readable, ReadableFile, read_at
from .regions import Array
from .safetensors_file import DTYPES, TensorInfo, TensorTable
from .stored_tensor import StoredTensor
from .workspace import Workspace, empty

Lines = Callable[[str, Array, int, int], None]
"""Reads or writes the rows of an array (uint8, C-contiguous): a file, the array, where its first row lies, bytes from row to row."""

Guard = Callable[[str], contextlib.AbstractContextManager[Any]]
"""What lets one at a time write a file."""

Split = Literal["lines", "slots", ""]
"""What ranks share out of a tensor."""

PIECE = 1 << 20
"""Bytes of a file that are held at once, about, where they are not read straight into place."""

PANEL = 128
"""Rows and columns that are turned at once."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies.

    files        one for each rank; copies: of so many, one after another, each holds the same, and the first is read
    lines, slots of the whole tensor; split: which of them the ranks share out, in order
    unit         bytes of a unit; 0: half a byte, the low one first
    offset       of a rank's first unit in its file; pitch, step: bytes from line to line and from unit to unit (of half bytes, 0)
    head         units of a head, whose halves are stored alternately (unit j of half s at ``2 * j + s``); 0: in order
    turned       the tensor's rows are slots and its columns lines
    """

    files: tuple[str, ...]
    lines: int
    slots: int
    unit: int
    offset: int
    pitch: int
    step: int
    split: Split = ""
    head: int = 0
    turned: bool = False
    copies: int = 1

    def read(self, read_lines: Lines, found: Array, top: int, left: int) -> None:
        """Fill ``found`` (uint8 [rows, bytes], C-contiguous) with the tensor's rows from ``top``, bytes from ``left``."""
        for part in self._parts(found, top, left):
            rank = self.files.index(part.file)
            first = rank // self.copies * self.copies
            if rank == first:
                part.read(read_lines)
                continue
            again = replace(part, data=found.copy())
            again.read(read_lines)
            if not np.array_equal(again.data, found):
                raise UnreadableError(f"{part.file}: differs from {self.files[first]}, of which it must be a copy; it is damaged")

    def write(self, read_lines: Lines, write_lines: Lines, guard: Guard, data: Array, top: int, left: int) -> None:
        """Put ``data`` (uint8 [rows, bytes]) there. What lies between is read and written again, so ``guard`` lets one at a time."""
        for part in self._parts(data, top, left):
            part.write(read_lines, write_lines, guard)

    def _parts(self, data: Array, top: int, left: int) -> Iterator[_Part]:
        """The rectangle's pieces, one for each rank that has any of it (of copies: each rank)."""
        rows, width = data.shape
        if self.unit >= 2 and (left % self.unit or width % self.unit):
            raise ValueError(f"bytes {left} to {left + width} split a unit of {self.unit}")
        first, last = (2 * left, 2 * (left + width)) if self.unit == 0 else (left // self.unit, (left + width) // self.unit)
        lines, slots = range(top, top + rows), range(first, last)
        if self.turned:
            lines, slots = slots, lines
        shares = len(self.files) // self.copies if self.split else 1
        per_line = self.lines // (shares if self.split == "lines" else 1)
        per_slot = self.slots // (shares if self.split == "slots" else 1)
        for rank in range(shares * self.copies):
            line = rank // self.copies * per_line if self.split == "lines" else 0
            slot = rank // self.copies * per_slot if self.split == "slots" else 0
            here = range(max(lines.start, line), min(lines.stop, line + per_line))
            there = range(max(slots.start, slot), min(slots.stop, slot + per_slot))
            if here and there:
                part = slice(here.start - lines.start, here.stop - lines.start), slice(there.start - slots.start, there.stop - slots.start)
                yield _Part(self, self.files[rank], data, *part, here.start - line, there.start - slot)


@dataclass(frozen=True, slots=True)
class _Part:
    """A rectangle of one rank. line, slot: its first, in the rank's file; lines, slots: which of ``data`` they are."""

    place: Place
    file: str
    data: Array
    lines: slice
    slots: slice
    line: int
    slot: int

    def _span(self) -> tuple[int, int, Array | None]:
        """(first slot, slots) as they lie in the file, whole heads, and which of those each slot is; None: in order."""
        count, head = self.slots.stop - self.slots.start, self.place.head
        if not head:
            return self.slot, count, None
        first, last = self.slot // head * head, -(-(self.slot + count) // head) * head
        number = np.arange(self.slot, self.slot + count)
        within, half = number % head, head // 2
        return first, last - first, number - within + within % half * 2 + within // half - first

    def _view(self) -> Array:
        """The rectangle as units [lines, slots] (of bytes: [lines, slots, unit]); not of half bytes."""
        unit, data = self.place.unit, self.data
        kind = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}.get(unit)
        units = data.view(kind) if kind else data.view("<u8").reshape(data.shape[0], -1, unit // 8)
        if self.place.turned:
            units = units.swapaxes(0, 1)
        found: Array = units[self.lines, self.slots]
        return found

    def _straight(self, order: Array | None) -> Array | None:
        """The rectangle as bytes [lines, bytes] that lie in the file as they are; None if they lie there otherwise."""
        place, unit = self.place, self.place.unit
        if not unit or place.turned or order is not None or place.step != unit:
            return None
        found: Array = self.data[self.lines, self.slots.start * unit : self.slots.stop * unit]
        return found

    def _halves(self, lines: slice) -> Array:
        """Lines of the rectangle as bytes, of units that are half bytes."""
        part = slice(self.lines.start + lines.start, self.lines.start + lines.stop)
        found: Array = self.data[part, self.slots.start // 2 : self.slots.stop // 2]
        return found

    def _blocks(self, wide: int) -> Iterator[slice]:
        """The lines, as many at a time as are held at once."""
        count, high = self.lines.stop - self.lines.start, max(1, PIECE // max(1, wide))
        for start in range(0, count, high):
            yield slice(start, min(start + high, count))

    def _stored(self, block: Array, slots: int) -> Array:
        """Units [lines, slots] of a block of the file's bytes."""
        unit, step = self.place.unit, self.place.step
        if unit in {1, 2, 4, 8}:
            return np.ndarray((len(block), slots), f"<u{unit}", block.data, 0, (block.strides[0], step))
        return np.ndarray((len(block), slots, unit // 8), "<u8", block.data, 0, (block.strides[0], step, 8))

    def _bytes(self, first: int, slots: int) -> tuple[int, int]:
        """(byte of the first slot in a line, bytes of so many)."""
        place = self.place
        if place.unit == 0:
            return first // 2, slots // 2
        return first * place.step, (slots - 1) * place.step + place.unit

    def read(self, read_lines: Lines) -> None:
        first, slots, order = self._span()
        begin, wide = self._bytes(first, slots)
        straight = self._straight(order)
        if straight is not None and straight.flags.c_contiguous:
            read_lines(self.file, straight, self._offset(slice(0, 0), begin), self.place.pitch)
            return
        for lines in self._blocks(wide):
            block = self._fetch(read_lines, lines, begin, wide)
            if self.place.unit == 0:
                assert order is not None
                whole = len(order) == slots
                self._halves(lines)[...] = parted(block, self.place.head) if whole else _joined(_nibbles(block)[:, order])
                continue
            units, view = self._stored(block, slots), self._view()[lines]
            if self.place.turned and (order is None or len(order) == slots):
                for ours, theirs in self._runs(slots):
                    turn(view[:, ours].T, units[:, theirs].T)
            else:
                view[...] = units if order is None else units[:, order]

    def write(self, read_lines: Lines, write_lines: Lines, guard: Guard) -> None:
        first, slots, order = self._span()
        begin, wide = self._bytes(first, slots)
        whole = order is None or len(order) == slots
        gaps = not whole or (self.place.unit > 0 and self.place.step != self.place.unit)
        straight = self._straight(order)
        for lines in self._blocks(wide):
            offset = self._offset(lines, begin)
            if straight is not None:
                block = straight[lines]
            elif not gaps:
                block = self._filled(np.empty((lines.stop - lines.start, wide), np.uint8), lines, slots, order)
            with guard(self.file):
                if gaps:
                    block = self._filled(self._fetch(read_lines, lines, begin, wide), lines, slots, order)
                write_lines(self.file, block, offset, self.place.pitch)

    def _filled(self, block: Array, lines: slice, slots: int, order: Array | None) -> Array:
        """The file's bytes of some lines: ``block`` with the rectangle put in."""
        whole = order is None or len(order) == slots
        if self.place.unit == 0:
            if whole:
                return paired(self._halves(lines), self.place.head)
            nibbles = _nibbles(block)
            nibbles[:, order] = _nibbles(self._halves(lines))
            return _joined(nibbles)
        units, view = self._stored(block, slots), self._view()[lines]
        if self.place.turned and whole:
            for ours, theirs in self._runs(slots):
                turn(units[:, theirs], view[:, ours])
        else:
            units[:, slice(None) if order is None else order] = view
        return block

    def _runs(self, slots: int) -> Iterator[tuple[slice, slice]]:
        """(the tensor's slots, the file's) in runs of one half of a head, of whole heads; all of them, where there are no heads."""
        head = self.place.head
        if not head:
            yield slice(None), slice(None)
            return
        for first in range(0, slots, head):
            for half in range(2):
                start = first + half * head // 2
                yield slice(start, start + head // 2), slice(first + half, first + head, 2)

    def _offset(self, lines: slice, begin: int) -> int:
        """Byte of the file at which some of the lines begin."""
        return int(self.place.offset + (self.line + lines.start) * self.place.pitch + begin)

    def _fetch(self, read_lines: Lines, lines: slice, begin: int, wide: int) -> Array:
        block = np.empty((lines.stop - lines.start, wide), np.uint8)
        read_lines(self.file, block, self._offset(lines, begin), self.place.pitch)
        return block


def read_lines(descriptor: int, block: Array, offset: int, pitch: int, path: Path) -> None:
    """Fill the rows of ``block`` from bytes ``offset``, ``offset + pitch`` and so on of a file."""
    flat, width = memoryview(block.reshape(-1)), block.shape[1]
    if width == pitch:
        read_at(descriptor, flat, offset, path)
        return
    for begin in range(0, len(flat), width):
        line = flat[begin : begin + width]
        if os.preadv(descriptor, (line,), offset) != width:
            read_at(descriptor, line, offset, path)
        offset += pitch


def write_lines(descriptor: int, block: Array, offset: int, pitch: int) -> None:
    """Write the rows of ``block`` there."""
    flat, width = memoryview(np.ascontiguousarray(block).reshape(-1)), block.shape[1]
    step = len(flat) if width == pitch else width
    for begin in range(0, len(flat), step):
        line, at = flat[begin : begin + step], offset
        while line:
            done = os.pwrite(descriptor, line, at)
            line, at = line[done:], at + done
        offset += pitch


def turn(target: Array, source: Array) -> None:
    """``target[...] = source``, both [rows, cols]; of source columns are contiguous, or nearly, of target rows.

    In panels that stay in cache: of a whole matrix every element would cost a cache line.
    """
    panel = np.empty((PANEL, PANEL + 16), target.dtype)  # wider, so that rows do not fall into the same cache lines
    for top in range(0, source.shape[0], PANEL):
        for left in range(0, source.shape[1], PANEL):
            part = source[top : top + PANEL, left : left + PANEL].T
            near = panel[: part.shape[0], : part.shape[1]]
            near[...] = part
            target[top : top + PANEL, left : left + PANEL] = near.T


def parted(block: Array, head: int) -> Array:
    """uint8 [lines, bytes] of whole heads of half bytes, out of pairs of one of each half: the first half, then the second."""
    words = block.reshape(block.shape[0], -1, head // 4, 2).astype(np.uint8, copy=False)
    even, odd = words[..., 0], words[..., 1]
    found = np.empty((*even.shape[:2], 2, head // 4), np.uint8)
    found[:, :, 0] = even & 15 | odd << 4
    found[:, :, 1] = even >> 4 | odd & 240
    return found.reshape(block.shape)


def paired(block: Array, head: int) -> Array:
    """The inverse of ``parted``."""
    halves = block.reshape(block.shape[0], -1, 2, head // 4)
    first, second = halves[:, :, 0], halves[:, :, 1]
    found = np.empty((*first.shape, 2), np.uint8)
    found[..., 0] = first & 15 | second << 4
    found[..., 1] = first >> 4 | second & 240
    return found.reshape(block.shape)


def _joined(nibbles: Array) -> Array:
    """The inverse of ``_nibbles``."""
    found: Array = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return found


def _nibbles(block: Array) -> Array:
    """uint8 [lines, 2 * bytes]: the halves of each byte, the low one first."""
    found = np.empty((block.shape[0], 2 * block.shape[1]), np.uint8)
    found[:, 0::2], found[:, 1::2] = block & 15, block >> 4
    return found


class PlacedFiles(Readable):
    """Files of a folder as one, by the addresses of the tensors that lie in them.

    tensors, places   tensors by name, one after another in a space of addresses, and where each lies
    growing           the files are being written by this process
    """

    def __init__(self, folder: Path, tensors: TensorTable, places: Mapping[str, Place], growing: bool = False) -> None:
        self.path, self.tensors, self.places, self._growing = folder, tensors, places, growing
        self._names = list(tensors)
        self._begins = [info.begin for info in tensors.values()]
        self.size = max((info.end for info in tensors.values()), default=0)
        self.files: dict[str, ReadableFile] = {}

    def file(self, name: str) -> ReadableFile:
        """One of the files."""
        if name not in self.files:
            self.files[name] = ReadableFile(self.path / name, self._growing)
        return self.files[name]

    def read_lines(self, name: str, block: Array, offset: int, pitch: int) -> None:
        """Fill rows from one of the files."""
        file = self.file(name)
        with file.opened() as descriptor:
            read_lines(descriptor, block, offset, pitch, file.path)

    def tensor(self, name: str, info: TensorInfo | None = None) -> PlacedTensor:
        """The tensor, unread."""
        info = info or self.tensors[name]
        stride = info.shape[-1] if info.shape else 1
        return PlacedTensor(self, name, DTYPES[info.dtype], info.shape, info.begin, stride, False, self.places[name])

    @contextlib.contextmanager
    def reading(self) -> Iterator[Read]:
        """Reads by address, across the ends of tensors."""
        yield self._read

    def _read(self, view: memoryview, address: int) -> None:
        while view:
            name = self._names[bisect.bisect_right(self._begins, address) - 1]
            info, at = self.tensors[name], address - self.tensors[name].begin
            width = info.nbytes // max(1, info.nbytes // _row_bytes(info))
            row, left = divmod(at, width)
            wide = min(width - left, len(view))
            high = max(1, len(view) // width) if not left and wide == width else 1
            high = min(high, info.nbytes // width - row)
            block = np.empty((high, wide), np.uint8)
            self.places[name].read(self.read_lines, block, row, left)
            view[: block.size] = memoryview(block.reshape(-1))
            view, address = view[block.size :], address + block.size


def _row_bytes(info: TensorInfo) -> int:
    return (info.shape[-1] if info.shape else 1) * DTYPES[info.dtype].itemsize


@dataclass(frozen=True, slots=True)
class PlacedTensor(StoredTensor):
    """A tensor that lies as ``place`` says; ``begin`` is its address in ``file``."""

    place: Any = None

    def _read(self, rows: slice, cols: slice, shape: tuple[int, ...], work: Workspace | None) -> Array:
        (top, bottom, row_step), (left, right, col_step) = rows.indices(shape[0]), cols.indices(shape[1])
        if row_step != 1 or col_step != 1:
            raise ValueError(f"{self.name}: a stored tensor is read in rectangles, not in steps")
        found = empty(work, "stored", (max(bottom - top, 0), max(right - left, 0)), self.dtype)
        if found.size:
            files: Any = self.file
            item = self.dtype.itemsize
            self.place.read(files.read_lines, found.view(np.uint8).reshape(found.shape[0], -1), top, left * item)
        return found
