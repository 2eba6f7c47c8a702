"""MindSpore ``.ckpt`` files, laid out before a byte of data exists, and written byte for byte as ``mindspore.save_checkpoint`` does.

The format is ``mindspore_file``'s. Lengths follow from names and shapes, so that tiles can be written in any order (``LaidOut``), or
everything in order, in constant memory (``save``). Two of MindSpore's functions cut large tensors:

``save_checkpoint``                every ``chunk_bytes`` (512 MiB), wherever that falls
``save_checkpoint(async_save=..)`` into ``ceil(bytes / chunk_bytes)`` runs of rows, which differ by one at most (``numpy.array_split``)

What MindSpore loses or cannot load is refused: a vector of no elements (loaded as a scalar), dtypes other than ``TYPES``' (FP8 among
them) and complex numbers, a name twice, a text with a character 0. Other tensors without elements are written as ``async_save`` does;
``save_checkpoint`` drops them.
"""

from __future__ import annotations

import contextlib
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from . import crc32
from .errors import DestinationError, RefusedError
from .files import Readable, ReadableFile
from .ir import Array, ArrayLike
from .mindspore_cipher import encrypt
from .mindspore_file import CRC_BYTES, CRC_MAGIC, MAX_NAME, TEXT, TYPES, MindSporeFile
from .protobuf import bytes_field, length_key, varint_field
from .safetensors_file import DTYPES, TensorTable
from .seams import SeamlessFile, Seams
from .stored_tensor import raw_chunks
from .workspace import Workspace

CHUNK_BYTES = 512 << 20
PIECE = 1 << 18
"""Bytes that ``save`` holds at once, of each tensor."""

_TYPES = {dtype: type for type, dtype in TYPES.items() if type not in {"Int4", "Complex64"}} | {"Int4": "Int4"}


@dataclass(frozen=True, slots=True)
class Text:
    """A text among the tensors, as ``append_dict`` may have one."""

    name: str
    text: str


Entry = Text | tuple[str, str, tuple[int, ...]]
"""A text, or a tensor's (name, dtype, shape): dtype is a name of ``safetensors_file.DTYPES``, or "Int4" for two 4-bit codes a byte."""


@dataclass(frozen=True, slots=True)
class _Record:
    """A chunk of a tensor, or a text. head: what stands before the content (and a text's content); length: bytes of the content."""

    name: str
    head: bytes
    length: int


@dataclass(frozen=True, slots=True)
class MindSporeOutput:
    """A ``.ckpt`` file that is fully laid out (``laid_out.LaidOut``). Offsets of ``tensors`` leave out what lies between chunks.

    entries      as they were given; metadata: {name: "Int4"} of packed ones
    size         in bytes; by_rows, chunk_bytes: how large tensors are cut
    has_crc      whether a CRC ends the file; crc: its value once it is known
    """

    name: str
    entries: tuple[Entry, ...]
    by_rows: bool
    chunk_bytes: int
    has_crc: bool
    tensors: TensorTable = field(default_factory=TensorTable)
    metadata: dict[str, str] = field(default_factory=dict)
    size: int = 0
    seams: Seams = field(default_factory=Seams)
    crc: int | None = None

    def records(self) -> Iterator[_Record]:
        """Every record of the file, in order; made anew, since those of a large model together are large."""
        for entry in self.entries:
            if isinstance(entry, Text):
                content = entry.text.encode("utf-32-le") or bytes(4)
                yield _Record(entry.name, _head(entry.name, TEXT, (0,), len(content)) + content, 0)
                continue
            name, dtype, shape = entry
            for length in _chunks(shape, _itemsize(dtype), self.by_rows, self.chunk_bytes):
                yield _Record(name, _head(name, _TYPES[dtype], shape, length), length)

    def chunks(self, name: str) -> list[tuple[int, int]]:
        """Where the tensor's data lie in the file: (first byte, length) of each chunk."""
        info = self.tensors[name]
        return list(self.seams.pieces(info.begin, info.nbytes))

    @property
    def shared(self) -> tuple[tuple[str, ...], ...]:
        return ()

    @property
    def parts(self) -> tuple[MindSporeOutput]:
        return (self,)

    def pieces(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return self.seams.pieces(offset, length)

    def heads(self) -> Iterator[tuple[int, bytes]]:
        """What stands before each chunk, the texts, and the CRC, which must be known (``sealed``)."""
        position = 0
        for record in self.records():
            yield position, record.head
            position += len(record.head) + record.length
        if self.has_crc:
            if self.crc is None:
                raise ValueError(f"{self.name}: its CRC is not known before the data are")
            yield position, crc_trailer(self.crc)

    def growing(self, path: Path) -> Readable:
        return SeamlessFile(ReadableFile(path, growing=True), self.seams)

    def sealed(self, data: Readable, jobs: int = 1) -> MindSporeOutput:
        """The same with its CRC, for which ``data`` are read, if it is to have one; by ``jobs`` threads."""
        if not self.has_crc:
            return self
        found, begins = 0, {name: info.begin for name, info in self.tensors.items()}
        for record in self.records():
            found = zlib.crc32(record.head, found)
            if record.length:
                begin = begins[record.name]
                begins[record.name] = end = begin + record.length
                found = crc32.of_range(data, begin, end, found, jobs)
        return replace(self, crc=found)


def crc_trailer(crc: int) -> bytes:
    """What ends a file with a CRC."""
    return CRC_MAGIC + crc.to_bytes(CRC_BYTES - len(CRC_MAGIC), "big")


def _itemsize(dtype: str) -> int:
    return 1 if dtype == "Int4" else DTYPES[dtype].itemsize


def _head(name: str, type: str, dims: tuple[int, ...], length: int) -> bytes:
    """What stands before ``length`` bytes of content."""
    tag = bytes_field(1, name.encode())
    tensor = b"".join(varint_field(1, dim) for dim in dims) + bytes_field(2, type.encode()) + length_key(3, length)
    value = tag + length_key(2, len(tensor) + length) + tensor
    return length_key(1, len(value) + length) + value


def _chunks(shape: tuple[int, ...], itemsize: int, by_rows: bool, chunk_bytes: int) -> Iterator[int]:
    """Bytes of each chunk of a tensor."""
    size = math.prod(shape) * itemsize
    if size <= chunk_bytes:
        yield size
    elif by_rows:
        count = -(-size // chunk_bytes)
        rows, left = divmod(shape[0], count)
        for number in range(count):
            yield (rows + (number < left)) * (size // shape[0])
    else:
        for begin in range(0, size, chunk_bytes):
            yield min(chunk_bytes, size - begin)


def lay_out_checkpoint(
    entries: Iterable[Entry], name: str, *, crc: bool = False, by_rows: bool = False, chunk_bytes: int = CHUNK_BYTES
) -> MindSporeOutput:
    """Decide every byte but the data of the file ``name``, which holds ``entries`` in their order.

    crc       whether a CRC ends it (``crc_check``)
    by_rows   cut large tensors as ``async_save`` does
    raises    RefusedError for what MindSpore would not load as it was
    """
    taken = tuple(entries)
    names: set[str] = set()
    for entry in taken:
        _check_entry(entry, names)
    if not taken:
        raise RefusedError(f"{name}: would hold no tensor, which MindSpore does not load")
    file = MindSporeOutput(name, taken, by_rows, chunk_bytes, crc)
    shapes = {entry[0]: entry for entry in taken if not isinstance(entry, Text)}
    position, opened, end = 0, "", 0
    for record in file.records():
        begin = position + len(record.head)
        position = begin + record.length
        if record.name in shapes and record.name != opened:
            _, dtype, shape = shapes[record.name]
            address, opened, end = begin - file.seams.total, record.name, position
            file.tensors.add(record.name, TYPES[_TYPES[dtype]], shape, address, address + math.prod(shape) * _itemsize(dtype))
            if dtype == "Int4":
                file.metadata[record.name] = "Int4"
        elif record.length:  # one more chunk
            file.seams.add(end, begin)
            end = position
    return replace(file, size=position + CRC_BYTES * crc)


def _check_entry(entry: Entry, names: set[str]) -> None:
    name = entry.name if isinstance(entry, Text) else entry[0]
    if not name or len(name.encode(errors="replace")) > MAX_NAME or name in names:
        why = "is there twice" if name in names else f"is no name of 1 to {MAX_NAME} bytes"
        raise RefusedError(f"{name[:120]!r}: {why}; MindSpore cannot hold it")
    names.add(name)
    try:
        f"{name}{entry.text if isinstance(entry, Text) else ''}".encode()
    except UnicodeEncodeError:
        raise RefusedError(f"{name[:120]!r}: holds half of a character; MindSpore cannot hold it") from None
    if isinstance(entry, Text):
        if "\0" in entry.text:
            raise RefusedError(f"{name}: a text with a character 0, at which MindSpore ends it; leave it out")
        return
    _, dtype, shape = entry
    if dtype not in _TYPES:
        raise RefusedError(f"{name}: is {dtype}, which MindSpore cannot load; it takes {', '.join(_TYPES)}")
    if shape == (0,):
        raise RefusedError(f"{name}: is a vector of no elements, which MindSpore loads as a scalar; leave it out")


def append_dict(values: Mapping[str, str | bool | int | float]) -> tuple[list[Entry], dict[str, Array]]:
    """What ``save_checkpoint(append_dict=values)`` adds to a file, behind the tensors: entries, and the data of those that are numbers.

    A whole number is a scalar of 64 bits, a float one of 32, rounded, as MindSpore has it.
    raises   RefusedError for a whole number of more than 64 bits
    """
    entries: list[Entry] = []
    data: dict[str, Array] = {}
    for name, value in values.items():
        if isinstance(value, str):
            entries.append(Text(name, value))
            continue
        dtype = "BOOL" if isinstance(value, bool) else "I64" if isinstance(value, int) else "F32"
        try:
            data[name] = np.array(value, dtype=DTYPES[dtype])
        except OverflowError:
            raise RefusedError(f"{name}: {value} does not fit 64 bits; MindSpore cannot hold it") from None
        entries.append((name, dtype, ()))
    return entries, data


def entries_of(file: MindSporeFile) -> list[Entry]:
    """What ``file`` holds, to be written again in its order."""
    entries: list[Entry] = []
    for name in file.names:
        if name in file.texts:
            entries.append(Text(name, file.texts[name]))
        else:
            info = file.tensors[name]
            entries.append((name, file.metadata.get(name, info.dtype), info.shape))
    return entries


def stream(file: MindSporeOutput, data: Callable[[str], ArrayLike]) -> Iterator[bytes | memoryview]:
    """The file's bytes in order, in pieces that are valid until the next; data: gives a tensor by its name."""
    crc = 0
    for piece in _plain_pieces(file, data):
        crc = zlib.crc32(piece, crc) if file.has_crc else 0
        yield piece
    if file.has_crc:
        yield crc_trailer(crc)


def _plain_pieces(file: MindSporeOutput, data: Callable[[str], ArrayLike]) -> Iterator[bytes | memoryview]:
    opened: tuple[str, ArrayLike] | None = None
    begin, work = 0, Workspace()
    for record in file.records():
        yield record.head
        if record.length and (opened is None or opened[0] != record.name):
            opened, begin = (record.name, _checked(file, record.name, data)), 0
        if record.length and opened is not None:
            for _, part in raw_chunks(opened[1], PIECE, begin, begin + record.length, work):
                yield memoryview(part)
            begin += record.length


def _checked(file: MindSporeOutput, name: str, data: Callable[[str], ArrayLike]) -> ArrayLike:
    info, tensor = file.tensors[name], data(name)
    if (tuple(tensor.shape), tensor.dtype) != (info.shape, DTYPES[info.dtype]):
        raise ValueError(f"{name}: is {tensor.dtype} {list(tensor.shape)}, and {info.dtype} {list(info.shape)} was laid out")
    return tensor


def save(path: Path, file: MindSporeOutput, data: Callable[[str], ArrayLike], encryption: tuple[str, bytes] | None = None) -> None:
    """Write the file in order, in constant memory: beside ``path`` first, and then in its place.

    data         gives a tensor by its name: an array, or one that lies in a file
    encryption   ("AES-GCM", "AES-CBC" or "SM4-CBC", key); the plain bytes then touch no disk
    raises       RefusedError for an encrypted file with a CRC, which MindSpore writes and cannot load; DestinationError if ``path`` is
                 there already or cannot be written. Nothing is left then
    """
    pieces = stream(file, data)
    if encryption is not None:
        if file.has_crc:
            raise RefusedError(f"{path.name}: encrypted and with a CRC, which MindSpore writes and cannot load; wanted one of both")
        pieces = encrypt(pieces, *encryption)
    if os.path.lexists(path):
        raise DestinationError(f"{path}: exists already; choose another name, or remove it")
    growing = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(growing, "xb", buffering=0) as target:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[target.write(view) :]
            os.fsync(target.fileno())
        os.replace(growing, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            growing.unlink()
        if isinstance(error, OSError):
            raise DestinationError(f"{path}: cannot be written ({error.strerror or error})") from None
        raise
