"""MindSpore's ``.ckpt`` files: tensors, scalars and texts in Protocol Buffers, read without MindSpore and without reading data.

Defined by MindSpore (PyPI ``mindspore`` 2.7.1 and 2.10.0, ``train/serialization.py`` and ``checkpoint.proto``). A file is records of
``Checkpoint``, one after another, with no magic, index or length of its own:

=====================  =====================================================================================================
``Checkpoint.value``   1, repeated message: one tensor, or one chunk of one
``Value.tag``          1, text: the parameter's name
``Value.tensor``       2, ``TensorProto``
``Value.maptensor``    3, a hash table of MapParameter, which is refused
``TensorProto.dims``   1, repeated int64, one by one (packed is read too)
``.tensor_type``       2, text: ``str(mindspore.dtype)``, a key of ``TYPES``, or ``str``
``.tensor_content``    3, bytes: little-endian, row-major
=====================  =====================================================================================================

1. **Chunks.** A tensor of more than 512 MiB is several records, one after another, which repeat tag, dims and type; their contents are
   joined. ``save_checkpoint`` cuts every 2**29 bytes, so within rows; with ``async_save`` it cuts into even runs of rows.
2. **Int4** is two 4-bit codes a byte (``qint4x2``), and dims count bytes: read as I8, and ``metadata`` says ``{name: "Int4"}``, as it
   does in MindSpore's safetensors.
3. **Texts** have the dims [0] and 4 bytes a character, UTF-32 little-endian; an empty one is four zero bytes.
4. **Scalars** have no dims, or the dims [0] and one element, which its loader takes for one too.
5. **CRC.** ``crc_check`` appends ``crc_num`` and ten bytes, big-endian: zlib's CRC-32 of all before them. 0x63 begins no record.
6. **Encrypted** files are blocks of ciphertext (``mindspore_cipher``).
7. Files of more than 2 GiB, which Protocol Buffers leave to each reader, are loaded by MindSpore (2.34 GiB, 2.7.1).
8. ``ckpt_strategy_*.ckpt`` is the plan of a parallel run, with no tensor in it; it begins with a number.

MindSpore pads contents that are too short, cuts those that are too long, joins what has one tag by chance, and takes a record without
a tag for ``''``. Here that is an error, which names the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from . import crc32
from .errors import UnreadableError
from .files import Readable, ReadableFile
from .ir import Array
from .mindspore_cipher import DecryptedFile, is_encrypted
from .protobuf import LENGTH, VARINT, Field, WireReader
from .safetensors_file import DTYPES, MAX_DIMENSIONS, SourceFile, TensorInfo, TensorTable, stored_tensor
from .seams import SeamlessFile, Seams
from .stored_tensor import StoredTensor

TYPES = {
    "Bool": "BOOL",
    "Int8": "I8",
    "UInt8": "U8",
    "Int16": "I16",
    "UInt16": "U16",
    "Int32": "I32",
    "UInt32": "U32",
    "Int64": "I64",
    "UInt64": "U64",
    "Float16": "F16",
    "BFloat16": "BF16",
    "Float32": "F32",
    "Float64": "F64",
    "Int4": "I8",
    "Complex64": "C64",
}
"""safetensors' dtype by MindSpore's. Complex64 is saved by MindSpore, which cannot load it."""

TEXT = "str"
CRC_MAGIC = b"crc_num"
CRC_BYTES = len(CRC_MAGIC) + 10

MAX_RECORDS = 1_000_000
MAX_NAME = 4096
"""Bytes of a tensor's name."""
MAX_TEXT = 64 << 20
"""Bytes of all texts of a file."""

_VALUE = {1: "tag", 2: "tensor", 3: "maptensor"}
_TENSOR = {1: "dims", 2: "tensor_type", 3: "tensor_content"}
_OTHERS = {b"PK": "a zip file, as torch.save writes", b"\x80": "a pickle, as torch.save writes", b"\x89HDF": "an HDF5 file"}


@dataclass(frozen=True, slots=True)
class _Record:
    """One chunk of a tensor, or a text. begin, end: of its content, in bytes of the (decrypted) file."""

    name: str
    type: str
    dims: tuple[int, ...]
    begin: int
    end: int


class MindSporeFile:
    """One ``.ckpt`` file, with what ``SafetensorsFile`` offers: tensors by name, read in rectangles when asked for.

    key          of an encrypted file, 16, 24 or 32 bytes; None: the environment says it (``mindspore_cipher.find_key``)
    metadata     {name: "Int4"} of tensors that hold two 4-bit codes a byte
    texts        what was saved as text, by name; names: of tensors and texts, in the order of the file
    crc          what the file says its CRC is, or None
    encryption   "AES-GCM", "AES-CBC", "SM4-CBC" or None
    data         what the tensors' offsets count in
    exempt       memory that blocks of an encrypted file take, in bytes

    A chunked tensor's offsets are addresses, which leave out what lies between its chunks (``Seams``).
    raises       UnreadableError
    """

    def __init__(self, path: Path, number: int = 0, key: bytes | None = None) -> None:
        self.path = path
        self._file = ReadableFile(path)
        self.encryption: str | None = None
        self.exempt = 0
        source: Readable = self._file
        if is_encrypted(self._file):
            source = decrypted = DecryptedFile(self._file, key)
            self.encryption, self.exempt = decrypted.mode, decrypted.held
        self.tensors = TensorTable(number)
        self.metadata: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.names: list[str] = []
        self.crc: int | None = None
        self._plain, seams, self._text_bytes = source, Seams(), 0
        try:
            self._read_records(seams)
        except UnreadableError:
            if self.encryption in {None, "AES-GCM"} or self.names:  # CBC takes any key, and gives other bytes
                raise
            raise self._bad("decrypts to nothing that MindSpore saves; give the key that it was encrypted with") from None
        self.data = SeamlessFile(source, seams) if seams else source
        listing = "".join(f"{name} {info.dtype} {info.shape} {info.begin}\n" for name, info in self.tensors.items())
        digest = xxhash.xxh3_128_hexdigest(f"{listing}{self.metadata} {self.texts} {self.crc}".encode())
        self.identity = SourceFile(path.name, self._file.size, self._file.mtime_ns, digest)

    def tensor(self, name: str, info: TensorInfo | None = None) -> StoredTensor:
        """The tensor (Int4 as its bytes, int8), unread. info: its own, if it is at hand."""
        return stored_tensor(self.data, name, info or self.tensors[name])

    def array(self, name: str) -> Array:
        """The whole tensor in memory: for small ones."""
        return self.tensor(name).read()

    def unchanged(self) -> bool:
        """Whether the file on disk still is the one that was opened, with its size and time."""
        return self._file.unchanged()

    def check_crc(self, jobs: int = 1) -> None:
        """Read the whole file and compare its CRC with the one it holds; UnreadableError if they differ, or it holds none."""
        if self.crc is None:
            raise UnreadableError(f"{self.path.name}: holds no CRC to check; it was saved without crc_check")
        found = crc32.of_range(self._plain, 0, self._plain.size - CRC_BYTES, jobs=jobs)
        if found != self.crc:
            raise UnreadableError(
                f"{self.path.name}: its CRC is {found:#010x}, and {self.crc:#010x} is what it was saved with; it is damaged: copy it again"
            )

    def _bad(self, what: str) -> UnreadableError:
        return UnreadableError(f"{self.path.name}: {what}")

    def _read_records(self, seams: Seams) -> None:
        """Fill ``tensors``, ``metadata``, ``texts`` and ``names`` from the records, and ``crc`` from what follows them."""
        seen: set[str] = set()
        joint: _Joint | None = None
        for record in self._records():
            if joint is not None and joint.takes(record):
                joint.join(record, seams)
                continue
            if joint is not None:
                self._close(joint)
                joint = None
            if record.name in seen:
                raise self._bad(f"tensor {record.name!r} is there twice; which one counts cannot be known")
            seen.add(record.name)
            self.names.append(record.name)
            if record.type == TEXT:
                self.texts[record.name] = self._text(record)
            else:
                joint = _Joint(self.path.name, record, seams)
        if joint is not None:
            self._close(joint)
        if not seen:
            raise self._bad("holds no tensor")

    def _close(self, joint: _Joint) -> None:
        """Take a tensor whose chunks are all there."""
        if joint.held != joint.size:
            raise self._bad(
                f"tensor {joint.name!r} {joint.type} {list(joint.shape)} takes {joint.size} bytes, and {joint.held} are there; "
                "a chunk of it is missing or cut: save it again"
            )
        self.tensors.add(joint.name, TYPES[joint.type], joint.shape, joint.address, joint.address + joint.size)
        if joint.type == "Int4":
            self.metadata[joint.name] = "Int4"

    def _records(self) -> Iterator[_Record]:
        """The file's records in order; then ``crc`` is known."""
        source = self._plain
        wire, size, position, count = WireReader(source), source.size, 0, 0
        self._refuse_others(wire, size)
        while position < size:
            if wire.bytes_at(position, min(size, position + len(CRC_MAGIC))) == CRC_MAGIC:
                if size - position != CRC_BYTES:
                    raise self._bad(f"ends with {size - position} bytes that begin as a CRC does, which has {CRC_BYTES}: copy it again")
                self.crc = int.from_bytes(wire.bytes_at(position + len(CRC_MAGIC), size), "big")
                return
            field = wire.field(position, size)
            if (field.number, field.wire) != (1, LENGTH):
                raise self._bad(f"at byte {position} no tensor begins; what follows belongs to nothing, or the file is damaged")
            count += 1
            if count > MAX_RECORDS:
                raise self._bad(f"holds more than {MAX_RECORDS} records, more than a model can need")
            yield self._record(wire, position, field)
            position = field.end

    def _refuse_others(self, wire: WireReader, size: int) -> None:
        """UnreadableError for what is no checkpoint at all, by what it is."""
        if not size:
            raise self._bad("is empty; a checkpoint holds at least one tensor")
        begin = wire.bytes_at(0, min(4, size))
        if begin[:1] == b"\x08":
            raise self._bad("is the strategy of a parallel run (ckpt_strategy), which holds no tensors; name the checkpoint itself")
        other = next((what for magic, what in _OTHERS.items() if begin.startswith(magic)), None)
        if other is not None:
            raise self._bad(f"is {other}, not a checkpoint of MindSpore")
        if begin[:1] != b"\x0a":
            raise self._bad(f"begins with the byte {begin[0]:#04x}, wanted 0x0a: it is no checkpoint of MindSpore")

    def _record(self, wire: WireReader, position: int, record: Field) -> _Record:
        where = f"the record at byte {position}"
        parts = self._parts(wire, record.value, record.end, _VALUE, where)
        if 1 not in parts:
            raise self._bad(f"{where} has no tag; its tensor has no name")
        name = self._string(wire, parts[1], f"the name in {where}", MAX_NAME)
        if not name:
            raise self._bad(f"{where} has an empty tag; its tensor has no name")
        if 3 in parts:
            raise self._bad(f"{name!r} is a MapParameter, a hash table, which is no tensor; save the model without it")
        if 2 not in parts:
            raise self._bad(f"{name!r} has no tensor")
        where, dims = f"tensor {name[:120]!r}", list[int]()
        tensor = self._parts(wire, parts[2].value, parts[2].end, _TENSOR, where, dims)
        for number in (2, 3):
            if number not in tensor:
                raise self._bad(f"{where} has no {_TENSOR[number]}")
        type = self._string(wire, tensor[2], f"the type of {where}", 64)
        if type not in TYPES and type != TEXT:
            raise self._bad(f"{where} has the type {type!r}, wanted one of those that MindSpore 2.7 saves ({', '.join(TYPES)})")
        if len(dims) > MAX_DIMENSIONS or math.prod(dim or 1 for dim in dims) >= 1 << 60:
            raise self._bad(f"{where} has {len(dims)} dims {dims[:4]}, larger than any tensor can be")
        return _Record(name, type, tuple(dims), tensor[3].value, tensor[3].end)

    def _parts(
        self, wire: WireReader, begin: int, end: int, known: Mapping[int, str], where: str, dims: list[int] | None = None
    ) -> dict[int, Field]:
        """The fields of a message by number, each of which may be there once; dims: takes field 1, which may be there often."""
        found: dict[int, Field] = {}
        for field in wire.fields(begin, end):
            if field.number not in known:
                raise self._bad(f"{where} has a field {field.number}, which no checkpoint of MindSpore has")
            if dims is not None and field.number == 1:
                self._take_dims(wire, field, dims, where)
                continue
            if field.wire != LENGTH:
                raise self._bad(f"{where}: its {known[field.number]} has the wire type {field.wire}, wanted {LENGTH}")
            if field.number in found:
                raise self._bad(f"{where} has two fields {known[field.number]!r}; which one counts cannot be known")
            found[field.number] = field
        return found

    def _take_dims(self, wire: WireReader, field: Field, dims: list[int], where: str) -> None:
        found = [field.value]
        if field.wire == LENGTH:
            found, position = [], field.value
            while position < field.end and len(found) <= MAX_DIMENSIONS:
                dim, position = wire.varint(position, field.end)
                found.append(dim)
        elif field.wire != VARINT:
            raise self._bad(f"{where}: its dims have the wire type {field.wire}, wanted {VARINT}")
        if any(dim >> 63 for dim in found):
            raise self._bad(f"{where} has a negative dim")
        dims += found
        if len(dims) > MAX_DIMENSIONS:
            raise self._bad(f"{where} has more than {MAX_DIMENSIONS} dims, larger than any tensor can be")

    def _string(self, wire: WireReader, field: Field, where: str, most: int) -> str:
        if field.end - field.value > most:
            raise self._bad(f"{where} has {field.end - field.value} bytes, wanted at most {most}")
        try:
            return wire.bytes_at(field.value, field.end).decode()
        except UnicodeDecodeError:
            raise self._bad(f"{where} is not UTF-8; the file is damaged") from None

    def _text(self, record: _Record) -> str:
        size, where = record.end - record.begin, f"text {record.name[:120]!r}"
        if record.dims != (0,) or size % 4 or not size:
            raise self._bad(f"{where} has the dims {list(record.dims)} and {size} bytes, wanted [0] and 4 for each character")
        self._text_bytes += size
        if self._text_bytes > MAX_TEXT:
            raise self._bad(f"{where} makes more than {MAX_TEXT} bytes of text, more than a model can need")
        try:
            text = self._plain.read(record.begin, size).decode("utf-32-le")
        except UnicodeDecodeError:
            raise self._bad(f"{where} is not UTF-32; the file is damaged") from None
        if "\0" in (text := text.rstrip("\0")):
            raise self._bad(f"{where} holds a character 0, at which it would end")
        return text


class _Joint:
    """A tensor whose chunks are being put together.

    shape         of the tensor; size: its bytes; held: bytes of the chunks so far
    address       of its first byte, as ``Seams`` count
    """

    def __init__(self, file: str, first: _Record, seams: Seams) -> None:
        self._file, self._first, self._end = file, first, first.end
        self.name, self.type, self.held = first.name, first.type, first.end - first.begin
        item = DTYPES[TYPES[first.type]].itemsize
        scalar = first.dims == (0,) and self.held == item
        self.shape = () if scalar else first.dims
        self.size = math.prod(self.shape) * item
        self.address = first.begin - seams.total
        self._refuse_more(self.held)

    def takes(self, record: _Record) -> bool:
        """Whether ``record`` is a chunk of this tensor: it has its name, and there is room, or it is empty behind all others."""
        chunk = record.name == self.name and record.type != TEXT
        return chunk and (self.held < self.size or (self.size > 0 and record.begin == record.end))

    def join(self, record: _Record, seams: Seams) -> None:
        """Take the next chunk."""
        if (record.type, record.dims) != (self._first.type, self._first.dims):
            raise UnreadableError(
                f"{self._file}: tensor {self.name!r} is {self.type} {list(self._first.dims)} in one chunk and {record.type} "
                f"{list(record.dims)} in another; wanted the same in all"
            )
        self._refuse_more(self.held + record.end - record.begin)
        if record.end > record.begin:
            seams.add(self._end, record.begin)
            self.held, self._end = self.held + record.end - record.begin, record.end

    def _refuse_more(self, held: int) -> None:
        if held > self.size:
            raise UnreadableError(
                f"{self._file}: tensor {self.name!r} {self.type} {list(self.shape)} takes {self.size} bytes, and {held} are there; "
                "it was saved wrongly, or is damaged"
            )
