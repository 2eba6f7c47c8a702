"""A model that MindSpore saved in parts, one for each rank, as one file: what lies where is told by the strategy file of the run.

Defined by MindSpore 2.7.1 (``node_strategy.proto``, ``parallel/checkpoint_transform.py``). ``ckpt_strategy_rank_N.ckpt`` is a message of
Protocol Buffers, whose ``parallel_layout_item``s (3) say of each parameter (1) its layout (2):

=========================  =================================================================================================
``dev_matrix``             1, list of whole numbers (``dim``, 1): the devices of a stage as an array; a rank's place in it is row-major
``tensor_map``             2, list: of each axis the dimension of dev_matrix that it is split over, counted from the last; -1: none
``param_split_shape``      3, lengths of uneven parts, which are refused if there are any
``field``                  5, of a sharded embedding, refused unless it is 0
``opt_weight_shard_size``  7, further shards of an optimizer, refused unless it is 0 or 1
=========================  =================================================================================================

A parameter without a layout is whole in every rank. Ranks that hold the same part are copies, of which the first is read. Nothing is
joined in memory: a byte of the whole tensor has an address, and reading it reads the rank that has it.
"""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import RefusedError, UnreadableError
from .files import Read, Readable, ReadableFile
from .mindspore_file import MindSporeFile
from .protobuf import LENGTH, VARINT, Field, WireReader, bytes_field, varint_field
from .safetensors_file import DTYPES, SourceFile, TensorInfo, TensorTable

_MOST = 64 << 20
"""Bytes of a strategy file."""


@dataclass(frozen=True, slots=True)
class ParameterLayout:
    """How a parameter is split. devices: the stage's as an array; split: of each axis the dimension from the last, -1 for none."""

    devices: tuple[int, ...]
    split: tuple[int, ...]

    def counts(self) -> tuple[int, ...]:
        """Parts along each axis."""
        return tuple(1 if axis < 0 else self.devices[-1 - axis] for axis in self.split)

    def grid(self) -> tuple[int, int]:
        """Parts along rows and columns of the stored tensor; a vector is one row."""
        return _two(self.counts(), 1)

    def cell(self, rank: int) -> tuple[int, int]:
        """(row, column) of the part in ``grid`` that a rank holds."""
        return _two(self.place(rank), 0)

    def place(self, rank: int) -> tuple[int, ...]:
        """Which part along each axis a rank holds."""
        found = []
        for axis in self.split:
            below = math.prod(self.devices[len(self.devices) - axis :]) if axis > 0 else 1
            found.append(0 if axis < 0 else rank // below % self.devices[-1 - axis])
        return tuple(found)


def _two(numbers: tuple[int, ...], rest: int) -> tuple[int, int]:
    """Of rows and of columns; ``rest`` stands for an axis that is not there."""
    row, column = (rest, *numbers) if len(numbers) == 1 else (*numbers, rest, rest)[:2]
    return row, column


def read_strategy(path: Path) -> dict[str, ParameterLayout]:
    """The layout of every parameter that a strategy file has one for.

    raises   UnreadableError for what is no strategy file; RefusedError for a way of splitting that is not read
    """
    file = ReadableFile(path)
    if not 0 < file.size <= _MOST:
        raise UnreadableError(f"{path.name}: {file.size} bytes, wanted a strategy file of 1 to {_MOST}")
    wire, found = WireReader(file), dict[str, ParameterLayout]()
    for item in wire.fields(0, file.size):
        if item.number != 3:
            continue
        parts = _messages(wire, item)
        if 1 not in parts or 2 not in parts:
            raise UnreadableError(f"{path.name}: a parameter has no name or no layout; the file is damaged")
        name = wire.bytes_at(parts[1].value, parts[1].end).decode(errors="replace")
        found[name] = _layout(wire, parts[2], f"{path.name}: {name[:120]}")
    if not found:
        raise UnreadableError(f"{path.name}: says how no parameter is split; give the strategy file of the run that saved the ranks")
    return found


def strategy_bytes(layouts: Mapping[str, ParameterLayout]) -> bytes:
    """A strategy file of these layouts. MindSpore's own merge leaves out what it says nothing of, so it must name every parameter."""
    items = []
    for name, layout in layouts.items():
        lists = [b"".join(varint_field(1, number % (1 << 64)) for number in numbers) for numbers in (layout.devices, layout.split, (), ())]
        said = b"".join(bytes_field(number, content) for number, content in enumerate(lists, 1))
        said += b"".join(varint_field(number, 0) for number in (5, 6, 7))
        items.append(bytes_field(3, bytes_field(1, name.encode()) + bytes_field(2, said)))
    return varint_field(1, 0) + b"".join(items)


def _messages(wire: WireReader, outer: Field) -> dict[int, Field]:
    if outer.wire != LENGTH:
        raise UnreadableError(f"a field {outer.number} of the strategy is no message; it is damaged")
    return {field.number: field for field in wire.fields(outer.value, outer.end)}


def _layout(wire: WireReader, outer: Field, where: str) -> ParameterLayout:
    parts = _messages(wire, outer)
    lists = {number: _numbers(wire, parts[number]) if number in parts else () for number in (1, 2, 3)}
    single = {number: parts[number].value if number in parts and parts[number].wire == VARINT else 0 for number in (5, 7)}
    if lists[3] or single[5] or single[7] not in {0, 1}:
        raise RefusedError(
            f"{where}: is split unevenly, as a sharded embedding or once more for an optimizer, which is not read; "
            "merge the ranks with MindSpore's transform_checkpoints"
        )
    devices, split = lists[1], lists[2]
    if not devices or min(devices) < 1 or math.prod(devices) > 1 << 20 or any(not -1 <= axis < len(devices) for axis in split):
        raise UnreadableError(f"{where}: is split by {list(split)} over devices {list(devices)}, which contradict one another")
    return ParameterLayout(devices, split)


def _numbers(wire: WireReader, outer: Field) -> tuple[int, ...]:
    """A message's ``dim``s, one by one or packed, signed."""
    found: list[int] = []
    for field in wire.fields(outer.value, outer.end):
        if field.number != 1:
            continue
        if field.wire == VARINT:
            found.append(field.value)
            continue
        position = field.value
        while position < field.end:
            value, position = wire.varint(position, field.end)
            found.append(value)
    return tuple(value - (1 << 64) if value >> 63 else value for value in found)


@dataclass(frozen=True, slots=True)
class _Extent:
    """A whole tensor's addresses. width: of it, and high, wide: of each part, widths in bytes; parts: (file, byte) by row, column.

    head   see ``RankedData.add``
    """

    begin: int
    end: int
    width: int
    high: int
    wide: int
    parts: tuple[tuple[tuple[Readable, int], ...], ...]
    head: int = 0

    def stored_row(self, row: int) -> int:
        """Where a row is stored."""
        if not self.head:
            return row
        pair, at = divmod(row % self.head, self.head // 2)
        return row // self.head * self.head + 2 * at + pair


class RankedData(Readable):
    """The bytes of tensors that lie in parts, by address."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._begins: list[int] = []
        self._extents: list[_Extent] = []

    def add(self, info: TensorInfo, layout: ParameterLayout, parts: Sequence[tuple[Readable, TensorInfo]], head: int = 0) -> int:
        """Take a tensor of which every rank holds a part of the size of ``info``, in the order of the ranks; its first address.

        head   rows of an attention head, whose rows m and m + head / 2 are stored as rows 2m and 2m + 1; 0: as they are
        """
        item, counts = DTYPES[info.dtype].itemsize, layout.grid()
        high = info.shape[0] if len(info.shape) > 1 else 1
        wide = info.nbytes // max(1, high)
        begin, total = self.size, info.nbytes * counts[0] * counts[1]
        found: dict[tuple[int, int], tuple[Readable, int]] = {}
        for rank, (file, part) in enumerate(parts):
            found.setdefault(layout.cell(rank), (file, part.begin))
        places = tuple(tuple(found[row, column] for column in range(counts[1])) for row in range(counts[0]))
        self._begins.append(begin)
        self._extents.append(_Extent(begin, begin + total, wide * counts[1], max(high, 1), max(wide, item), places, head))
        self.size += total
        return begin

    @contextlib.contextmanager
    def reading(self) -> Iterator[Read]:
        """Reads every piece from the rank that has it."""

        def read(view: memoryview, address: int) -> None:
            while view:
                extent = self._extents[bisect.bisect_right(self._begins, address) - 1]
                row, at = divmod(address - extent.begin, extent.width)
                row = extent.stored_row(row)
                column = at // extent.wide
                file, begin = extent.parts[row // extent.high][column]
                within = row % extent.high * extent.wide + at % extent.wide
                left = extent.wide - at % extent.wide
                if extent.width == extent.wide and not extent.head:  # whole rows follow one another
                    left = extent.high * extent.wide - within
                length = min(len(view), left)
                file.read_into(view[:length], begin + within)
                view, address = view[length:], address + length

        yield read


class RankedFile:
    """The ranks of one model as one file, with what ``MindSporeFile`` offers.

    files      of rank 0, 1, ...; strategy: of every parameter that is split
    raises     UnreadableError for ranks that do not fit the strategy, or one another
    """

    def __init__(self, files: Sequence[Path], strategy: Mapping[str, ParameterLayout], number: int = 0) -> None:
        self.path = files[0]
        self.files = [MindSporeFile(path, number) for path in files]
        first = self.files[0]
        self.metadata, self.texts, self.exempt = first.metadata, first.texts, sum(file.exempt for file in self.files)
        self.tensors = TensorTable(number)
        self.data = RankedData(files[0])
        for name, info in first.tensors.items():
            self._add(name, info, strategy.get(name))
        self.identity = SourceFile.joined([file.identity for file in self.files])

    def unchanged(self) -> bool:
        """Whether every rank's file still is the one that was opened."""
        return all(file.unchanged() for file in self.files)

    def _add(self, name: str, info: TensorInfo, layout: ParameterLayout | None) -> None:
        if layout is None:
            layout = ParameterLayout((len(self.files),), (-1,) * len(info.shape))
        if len(layout.split) != len(info.shape) or math.prod(layout.devices) != len(self.files):
            raise UnreadableError(
                f"{name}: has the shape {list(info.shape)} in rank 0 of {len(self.files)}, and the strategy splits {len(layout.split)} "
                f"axes over {math.prod(layout.devices)} devices; it is of another run"
            )
        counts = layout.counts()
        if any(count > 1 for count in counts[2:]):
            raise RefusedError(f"{name}: is split along axis 3 or later, which is not read; merge the ranks with MindSpore")
        parts: list[tuple[Readable, TensorInfo]] = []
        for rank, file in enumerate(self.files):
            other = file.tensors.get(name)
            if (
                other is None
                or (other.dtype, other.shape) != (info.dtype, info.shape)
                or (name in file.metadata) != (name in self.metadata)
            ):
                what = "is not there" if other is None else f"is {other.dtype} {list(other.shape)}"
                raise UnreadableError(
                    f"{name}: {what} in rank {rank}, and {info.dtype} {list(info.shape)} in rank 0; a rank is of another run"
                )
            parts.append((file.data, other))
        begin = self.data.add(info, layout, parts)
        shape = tuple(length * count for length, count in zip(info.shape, counts, strict=True))
        self.tensors.add(name, info.dtype, shape, begin, begin + info.nbytes * math.prod(counts))
