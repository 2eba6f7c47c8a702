"""safetensors files: a header parser that trusts nothing, tensors read by position, and a writer that lays files out first.

The format (huggingface/safetensors, README "Format"): 8 bytes little-endian header length; a JSON object
``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}``; then the data.
Rules checked here, each with an error that names file and tensor:

1. the file holds at least 8 bytes, and the header lies inside it and is no longer than 100 MB;
2. the header is UTF-8 JSON, an object, without duplicate keys at any level, NaN or deep nesting;
3. each tensor has exactly dtype, shape and data_offsets, of the right types, with a known dtype;
4. a shape's element count does not overflow 2**63 and gives the byte length that the offsets say;
5. offsets lie in the data, do not overlap and leave no gap, and the data ends where the file ends.

Sub-byte floats (F4) hold two elements a byte. The reference library aligns nothing between tensors but sorts them by
element size; the writer here does the same, so that every tensor is aligned to its element.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import math
import os
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np
import xxhash

from .errors import HeaderError, UnreadableError
from .files import Readable, ReadableFile
from .ir import Array, ArrayLike
from .stored_tensor import StoredTensor

if TYPE_CHECKING:
    from .laid_out import LaidOut

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 32
"""What NumPy 1 holds; weights have two or three."""

DEFAULT_SHARD_BYTES = 5_000_000_000
FORMAT: Mapping[str, str] = {"format": "pt"}
"""The metadata without which transformers refuses a file."""

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "C64": np.dtype("<c8"),
}
"""NumPy dtype by safetensors name. F4 (two elements a byte) is read as its bytes, uint8."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: its dtype name, shape, and byte range counted from the start of the file.

    stride   elements from one row to the next, where the tensor is some columns of a stored one; 0: its own width. ``end`` then is
             ``begin`` and the bytes that are its own
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    file: int = 0
    stride: int = 0

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class TensorTable(Mapping[str, TensorInfo]):
    """The tensors of a file by name, in the order of their data, in columns: a model may have hundreds of thousands."""

    def __init__(self, file: int = 0) -> None:
        self._names: list[str] = []
        self._dtypes: list[str] = []
        self._shapes: list[tuple[int, ...]] = []
        self._bounds = array("q")
        self._strides: dict[int, int] = {}
        self._rows: dict[str, int] = {}
        self._file = file

    def add(self, name: str, dtype: str, shape: tuple[int, ...], begin: int, end: int, stride: int = 0) -> None:
        """Append a tensor."""
        if stride:
            self._strides[len(self._names)] = stride
        self._names.append(name)
        self._dtypes.append(sys.intern(dtype))
        self._shapes.append(_same_tuple(shape))
        self._bounds.append(begin)
        self._bounds.append(end)

    def row(self, number: int, file: int | None = None) -> TensorInfo:
        """The tensor with this number, in the order of the data; file: as one of this file's."""
        begin, end = self._bounds[2 * number], self._bounds[2 * number + 1]
        where = self._file if file is None else file
        return TensorInfo(self._dtypes[number], self._shapes[number], begin, end, where, self._strides.get(number, 0))

    def _by_name(self) -> dict[str, int]:
        """Numbers by name; made when first asked for, since a set of files has a list of its own."""
        if len(self._rows) != len(self._names):
            self._rows = {name: number for number, name in enumerate(self._names)}
        return self._rows

    def __getitem__(self, name: str) -> TensorInfo:
        return self.row(self._by_name()[name])

    def __contains__(self, name: object) -> bool:
        return name in self._by_name()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def items(self) -> Any:
        return zip(self._names, self.values(), strict=True)

    def values(self) -> Any:
        return map(self.row, range(len(self._names)))

    def copy_for(self, file: int) -> TensorTable:
        """The same tensors, as those of another file of a set; columns are shared."""
        twin = TensorTable(file)
        twin._names, twin._dtypes, twin._shapes, twin._bounds = self._names, self._dtypes, self._shapes, self._bounds
        twin._strides = self._strides
        return twin


class TensorIndex(Mapping[str, TensorInfo]):
    """The tensors of several tables under one mapping.

    clash   is called with a name that is there twice and the numbers of its tables; it raises
    """

    def __init__(self, tables: Sequence[TensorTable], clash: Callable[[str, int, int], None]) -> None:
        self._tables = tables
        self._starts = list(itertools.accumulate((len(table) for table in tables), initial=0))
        self._numbers: dict[str, int] = {}
        for table, start in zip(tables, self._starts, strict=False):
            for number, name in enumerate(table, start):
                if self._numbers.setdefault(name, number) != number:
                    clash(name, self.table_of(name), bisect.bisect_right(self._starts, number) - 1)

    def table_of(self, name: str) -> int:
        """The number of the table that holds ``name``."""
        return bisect.bisect_right(self._starts, self._numbers[name]) - 1

    def __getitem__(self, name: str) -> TensorInfo:
        number = self._numbers[name]
        table = bisect.bisect_right(self._starts, number) - 1
        return self._tables[table].row(number - self._starts[table], table)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


@functools.lru_cache(maxsize=4096)
def _same_tuple(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape``, as one object for equal ones."""
    return shape


@dataclass(frozen=True, slots=True)
class SourceFile:
    """Identity of an input file: enough to notice that it changed. ``digest`` is XXH3-128 of its header."""

    name: str
    size: int
    mtime_ns: int
    digest: str

    @classmethod
    def joined(cls, files: Sequence[SourceFile], more: str = "") -> SourceFile:
        """Of files that are read as one. more: what else they are read by."""
        name = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
        digest = xxhash.xxh3_128_hexdigest("".join([*(file.digest for file in files), more]).encode())
        return cls(name, sum(file.size for file in files), max(file.mtime_ns for file in files), digest)


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; F4 packs two elements a byte."""
    count = math.prod(shape)
    return count // 2 if dtype == "F4" else count * DTYPES[dtype].itemsize


def load_json(text: bytes | bytearray, what: str, compact: Callable[[dict[str, Any]], Any] = lambda found: found) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or Infinity.

    text      is emptied if it can be; what: names it in errors; compact: what to keep of each object instead of a dictionary
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = {sys.intern(key): value for key, value in pairs}
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise HeaderError(f"{what}: the key {twice!r} is there twice; which one counts cannot be known")
        return compact(result)  # type: ignore[no-any-return]

    def constant(name: str) -> Any:
        raise HeaderError(f"{what}: {name} is not JSON")

    try:
        escaped, decoded = b"\\u" in text, text.decode("utf-8")
        if isinstance(text, bytearray):
            text.clear()  # whoever holds it: a list of all tensors is large enough to be held once only
        document = json.loads(decoded, object_pairs_hook=unique, parse_constant=constant)
        del decoded
        if escaped:  # an escape may name half of a surrogate pair, which no text holds
            json.dumps(document, ensure_ascii=False).encode()
        return document
    except UnicodeDecodeError as error:
        raise HeaderError(f"{what}: not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise HeaderError(f"{what}: an escape names half of a character") from None
    except RecursionError:
        raise HeaderError(f"{what}: nested too deeply to be what it claims to be") from None
    except ValueError as error:
        raise HeaderError(f"{what}: not valid JSON ({error})") from None


def parse_header(
    header: bytes | bytearray, name: str, data_start: int, file_size: int, number: int = 0
) -> tuple[TensorTable, dict[str, str]]:
    """Check a header against every rule of the module docstring.

    header        the JSON bytes; name: the file, for errors; data_start, file_size in bytes; number: the file's, in its set
    returns       ({tensor: info}, metadata), tensors in the order of their data
    raises        HeaderError
    """
    root = load_json(header, f"{name}: header", _compact)
    if not isinstance(root, dict):
        raise HeaderError(f"{name}: the header is a JSON {type(root).__name__}, wanted an object")
    metadata = root.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"{name}: __metadata__ must map strings to strings")
    for key, entry in root.items():
        _check_tensor(key, entry, name)
    expected, table = data_start, TensorTable(number)
    for key in sorted(root, key=lambda key: root[key][2]):  # what was checked is a tuple, its offsets last
        dtype, shape, (begin, end) = root.pop(key)
        begin, end = data_start + begin, data_start + end
        if end > file_size:
            raise HeaderError(f"{name}: tensor {key!r} ends at byte {end}, but the file has {file_size}; it is truncated: copy it again")
        if begin != expected:
            how = "overlaps the tensor before it" if begin < expected else "leaves a gap before it"
            raise HeaderError(f"{name}: tensor {key!r} begins at byte {begin}, wanted {expected}: it {how}")
        expected = end
        table.add(sys.intern(key), dtype, shape, begin, end)
    if expected != file_size:
        raise HeaderError(f"{name}: {file_size - expected} bytes follow the last tensor; they belong to nothing")
    return table, metadata


def _compact(found: dict[str, Any]) -> Any:
    """An entry of a header as a tuple, which is a third of a dictionary, where it has nothing wrong in its types."""
    if found.keys() != {"dtype", "shape", "data_offsets"}:
        return found
    dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    lists = (shape, offsets)
    if type(dtype) is not str or not all(type(value) is list and all(type(number) is int for number in value) for value in lists):
        return found
    return sys.intern(dtype), _same_tuple(tuple(shape)), tuple(offsets)


def _check_tensor(key: str, entry: Any, name: str) -> None:
    if isinstance(entry, tuple):
        dtype, shape, offsets = entry[0], list(entry[1]), list(entry[2])
    elif not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{name}: tensor {key!r} must have exactly dtype, shape and data_offsets")
    else:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in DTYPES and dtype != "F4"):
        raise HeaderError(f"{name}: tensor {key!r} has the unknown dtype {dtype!r}")
    for what, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(number) is int and number >= 0 for number in value):
            raise HeaderError(f"{name}: tensor {key!r}: {what} must be a list of integers that are not negative")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"{name}: tensor {key!r}: data_offsets {offsets} must be [begin, end] with begin <= end")
    if len(shape) > MAX_DIMENSIONS or math.prod(number or 1 for number in shape) >= 1 << 60:
        raise HeaderError(f"{name}: tensor {key!r}: shape {shape[:4]} is larger than any tensor can be")
    if dtype == "F4" and math.prod(shape) % 2:
        raise HeaderError(f"{name}: tensor {key!r}: F4 {shape} does not fill whole bytes")
    if nbytes(dtype, shape) != offsets[1] - offsets[0]:
        raise HeaderError(
            f"{name}: tensor {key!r}: {dtype} {shape} takes {nbytes(dtype, shape)} bytes, "
            f"but its data_offsets span {offsets[1] - offsets[0]}"
        )


class SafetensorsFile:
    """One safetensors file: a header that was checked, and tensors that are read when asked for. Never written, never mapped."""

    exempt = 0

    def __init__(self, path: Path, number: int = 0) -> None:
        self.path = path
        self._file = ReadableFile(path)
        size = self._file.size
        if size < 8:
            raise HeaderError(f"{path.name}: {size} bytes long; a safetensors file begins with an 8-byte length")
        length = int.from_bytes(self._file.read(0, 8), "little")
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise HeaderError(
                f"{path.name}: the header claims {length} bytes, but the file has {size} "
                f"(and {MAX_HEADER_BYTES} is the most a header may have); it is truncated or not safetensors"
            )
        header = self._file.read(8, length)
        self.identity = SourceFile(path.name, size, self._file.mtime_ns, xxhash.xxh3_128_hexdigest(header))
        self.tensors, self.metadata = parse_header(header, path.name, 8 + length, size, number)

    def tensor(self, name: str, info: TensorInfo | None = None) -> StoredTensor:
        """The tensor (F4 as its bytes), unread. info: its own, if it is at hand."""
        return stored_tensor(self._file, name, info or self.tensors[name])

    def array(self, name: str) -> Array:
        """The whole tensor in memory: for small ones."""
        return self.tensor(name).read()

    def unchanged(self) -> bool:
        """Whether the file on disk still is the one that was opened, with its size and time."""
        return self._file.unchanged()


def stored_tensor(file: Readable, name: str, info: TensorInfo) -> StoredTensor:
    """The tensor that ``info`` says lies in ``file``; F4 as its bytes, uint8 in one row."""
    dtype = DTYPES.get(info.dtype, np.dtype("u1"))
    shape = (info.nbytes,) if info.dtype == "F4" else info.shape
    return StoredTensor(file, name, dtype, shape, info.begin, info.stride or (shape[-1] if shape else 1))


class StoredFile(Protocol):
    """What a set of tensors asks of a file, whatever its container."""

    path: Path
    identity: SourceFile
    metadata: dict[str, str]
    exempt: int
    """Bytes that reading it may hold in memory whatever limit is set."""

    @property
    def tensors(self) -> TensorTable:
        """Every tensor by name, in the order of the data."""
        ...

    def tensor(self, name: str, info: TensorInfo | None = None) -> ArrayLike:
        """The tensor, unread where the container allows it. info: its own, if it is at hand."""
        ...

    def unchanged(self) -> bool:
        """Whether the file on disk is still what was opened."""
        ...


class TensorSet(Mapping[str, TensorInfo]):
    """The tensors of one file, or of the shards that an index lists, under one mapping. Files open when first read."""

    def __init__(
        self,
        files: Sequence[Path],
        weight_map: Mapping[str, str] | None = None,
        index: str = "",
        opener: Callable[[Path, int], StoredFile] = SafetensorsFile,
    ) -> None:
        self.files = [opener(path, number) for number, path in enumerate(files)]
        self._index = TensorIndex([file.tensors for file in self.files], self._clash)
        if weight_map is not None:
            self._check_index(weight_map, index)

    def _clash(self, name: str, first: int, second: int) -> None:
        where = f"in {self.files[first].path.name} and again in {self.files[second].path.name}"
        raise HeaderError(f"tensor {name!r} is {where}; which one counts cannot be known")

    def _check_index(self, weight_map: Mapping[str, str], index: str) -> None:
        for name, shard in weight_map.items():
            home = self.files[self._index.table_of(name)].path.name if name in self._index else None
            if home != shard:
                where = "no shard has it" if home is None else f"it is in {home}"
                raise HeaderError(f"{index}: says that tensor {name!r} is in {shard}, but {where}")
        if len(weight_map) != len(self._index):
            extra = next(name for name in self._index if name not in weight_map)
            home = self.files[self._index.table_of(extra)].path.name
            raise HeaderError(f"{index}: does not list tensor {extra!r}, which {home} holds")

    def __getitem__(self, name: str) -> TensorInfo:
        return self._index[name]

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def tensor(self, name: str) -> ArrayLike:
        """The tensor, unread."""
        return self.files[self._index.table_of(name)].tensor(name, self._index[name])

    def array(self, name: str) -> Array:
        """The whole tensor in memory: for small ones."""
        return np.asarray(self.tensor(name))

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for file in self.files for info in file.tensors.values())


def open_index(folder: Path, index: Path, opener: Callable[[Path, int], StoredFile] = SafetensorsFile, document: Any = None) -> TensorSet:
    """The shards that ``index`` (``{"weight_map": {tensor: file}}``) lists, all inside ``folder``.

    document   the index's content, if it is not to be read
    raises HeaderError for an index of the wrong types, a name that leaves the folder, or one that disagrees with the shards
    """
    on_disk = document is None
    document = load_json(_read_bytes(index), index.name) if on_disk else document
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise HeaderError(f"{index.name}: weight_map must map tensor names to file names")
    for name, shard in weight_map.items():
        weight_map[name] = sys.intern(shard)
    del document
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if shard != Path(shard).name or shard in {"", ".", ".."} or "\\" in shard or "\0" in shard:
            raise HeaderError(f"{index.name}: the shard name {shard!r} leaves the folder; only plain file names are followed")
        if len(os.fsencode(shard)) > 255 or not (folder / shard).is_file():
            raise HeaderError(f"{index.name}: lists {shard[:80]}, which is not in the folder: copy it there")
    tensors = TensorSet([folder / shard for shard in shards], weight_map, index.name, opener)
    if on_disk:
        _refuse_strays(folder, index, shards)
    return tensors


def _refuse_strays(folder: Path, index: Path, shards: Sequence[str]) -> None:
    """HeaderError for a shard of the index's own series that it does not list: its tensors would be lost without a word."""
    series = re.compile(re.escape(index.name.removesuffix(".safetensors.index.json")) + r"-\d{5}-of-\d{5}\.safetensors")
    strays = sorted(name for name in os.listdir(folder) if series.fullmatch(name) and name not in shards)
    if strays:
        raise HeaderError(f"{index.name}: does not list {strays[0]}, which lies beside it; remove the file, or correct the index")


def _read_bytes(path: Path) -> bytearray:
    file = ReadableFile(path)
    if file.size > MAX_HEADER_BYTES:
        raise HeaderError(f"{path.name}: {file.size} bytes is more than such a file can need")
    return file.read(0, file.size)


def read_json(path: Path) -> dict[str, Any]:
    """A strict JSON object from a file of at most 100 MB; ``UnreadableError`` says what is wrong with it."""
    document = load_json(_read_bytes(path), path.name)
    if not isinstance(document, dict):
        raise UnreadableError(f"{path.name}: a JSON {type(document).__name__}, wanted an object")
    return document


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A safetensors file that is fully laid out before a byte of data exists (``laid_out.LaidOut``).

    tensors       {name: TensorInfo with absolute offsets}, in the order of their data; size in bytes
    metadata      of the header
    """

    name: str
    tensors: TensorTable
    size: int
    metadata: Mapping[str, str] = field(default_factory=lambda: FORMAT)

    @property
    def shared(self) -> tuple[tuple[str, ...], ...]:
        return ()

    @property
    def parts(self) -> tuple[OutputFile]:
        return (self,)

    def pieces(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return ((offset, length),)

    def heads(self) -> Iterator[tuple[int, bytes]]:
        at, pieces = 0, self.header_pieces()
        while part := b"".join(itertools.islice(pieces, 4096)):
            yield at, part
            at += len(part)

    def growing(self, path: Path) -> Readable:
        return ReadableFile(path, growing=True)

    def sealed(self, data: Readable) -> OutputFile:
        return self

    @property
    def header(self) -> bytes:
        """The 8-byte length and the JSON."""
        return b"".join(self.header_pieces())

    def header_pieces(self) -> Iterator[bytes]:
        """The header piece by piece; made anew, since those of a large model together are large."""
        begin = min((info.begin for info in self.tensors.values()), default=self.size)
        yield (begin - 8).to_bytes(8, "little")
        length = 8
        for piece in _header_text(((name, info.dtype, info.shape, info.nbytes) for name, info in self.tensors.items()), self.metadata):
            length += len(piece)
            yield piece
        yield b" " * (begin - length)


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    stem: str = "model",
    single_name: str | None = None,
    metadata: Mapping[str, str] = FORMAT,
) -> list[OutputFile]:
    """Decide every output file from (name, dtype, shape) triples: shards in the given order, offsets, headers.

    A shard is closed when the next tensor would make it larger than ``max_shard_bytes``. One shard is called
    ``{stem}.safetensors`` (or ``single_name``), several ``{stem}-00001-of-0000N.safetensors``.
    """
    files: list[OutputFile] = []
    shard: list[_Sized] = []
    held = 0
    for name, dtype, shape in tensors:
        size = nbytes(dtype, shape)
        if shard and held + size > max_shard_bytes:
            files.append(_lay_out_file(shard, metadata))
            shard, held = [], 0
        shard.append((name, dtype, shape, size))
        held += size
    files.append(_lay_out_file(shard, metadata))
    if len(files) == 1:
        return [replace(files[0], name=single_name or f"{stem}.safetensors")]
    return [replace(file, name=f"{stem}-{i:05d}-of-{len(files):05d}.safetensors") for i, file in enumerate(files, 1)]


_Sized = tuple[str, str, tuple[int, ...], int]


def _lay_out_file(tensors: list[_Sized], metadata: Mapping[str, str]) -> OutputFile:
    ordered = sorted(tensors, key=lambda tensor: -DTYPES[tensor[1]].itemsize if tensor[1] in DTYPES else -1)
    length = sum(map(len, _header_text(ordered, metadata)))
    length += -length % 8
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"{tensors[0][0]}: the header of its file would need {length} bytes; use a smaller --max-shard-size")
    begin, table = 8 + length, TensorTable()
    for name, dtype, shape, size in ordered:
        table.add(name, dtype, tuple(shape), begin, begin + size)
        begin += size
    return OutputFile("", table, begin, metadata)


_COMPACT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


def _header_text(ordered: Iterable[_Sized], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The header's JSON, without its padding, for tensors in the order of their data; piece by piece."""
    yield f'{{"__metadata__":{_COMPACT.encode(dict(metadata))}'.encode()
    position = 0
    for name, dtype, shape, size in ordered:
        entry = {"dtype": dtype, "shape": shape, "data_offsets": (position, position + size)}
        yield f",{_COMPACT.encode(name)}:{_COMPACT.encode(entry)}".encode()
        position += size
    yield b"}"


def index_of(files: Sequence[LaidOut]) -> dict[str, Any]:
    """The content of the shards' index: true total_size (bytes of tensor data) and weight_map."""
    total = sum(info.nbytes for file in files for info in file.tensors.values())
    weight_map = {name: file.name for file in files for name in file.tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def index_json(files: Sequence[LaidOut]) -> str:
    """``model.safetensors.index.json`` for the shards."""
    return "".join(index_pieces(files))


def index_pieces(files: Sequence[LaidOut]) -> Iterator[str]:
    """``index_json`` piece by piece."""
    yield from json.JSONEncoder(indent=2).iterencode(index_of(files))
    yield "\n"
