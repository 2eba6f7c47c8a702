"""safetensors files: a header parser that trusts nothing, memory-mapped tensors, and a writer that lays files out first.

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

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import xxhash

from .errors import HeaderError, UnreadableError
from .ir import Array

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 32
"""What NumPy 1 holds; weights have two or three."""

DEFAULT_SHARD_BYTES = 5_000_000_000

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
    """One tensor of a file: its dtype name, shape, and byte range counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    file: int = 0

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class SourceFile:
    """Identity of an input file: enough to notice that it changed. ``digest`` is XXH3-128 of its header."""

    name: str
    size: int
    mtime_ns: int
    digest: str


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; F4 packs two elements a byte."""
    count = math.prod(shape)
    return count // 2 if dtype == "F4" else count * DTYPES[dtype].itemsize


def load_json(text: bytes, what: str) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or Infinity. ``what`` names the text in errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise HeaderError(f"{what}: the key {twice!r} is there twice; which one counts cannot be known")
        return result

    def constant(name: str) -> Any:
        raise HeaderError(f"{what}: {name} is not JSON")

    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
        if b"\\u" in text:  # an escape may name half of a surrogate pair, which no text holds
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
    header: bytes, name: str, data_start: int, file_size: int, number: int = 0
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Check a header against every rule of the module docstring.

    header        the JSON bytes; name: the file, for errors; data_start, file_size in bytes; number: the file's, in its set
    returns       ({tensor: info}, metadata), tensors in the order of their data
    raises        HeaderError
    """
    root = load_json(header, f"{name}: header")
    if not isinstance(root, dict):
        raise HeaderError(f"{name}: the header is a JSON {type(root).__name__}, wanted an object")
    metadata = root.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"{name}: __metadata__ must map strings to strings")
    tensors = {key: _parse_tensor(key, entry, name, data_start, number) for key, entry in root.items()}
    ordered = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    expected = data_start
    for key, info in ordered:
        if info.end > file_size:
            raise HeaderError(
                f"{name}: tensor {key!r} ends at byte {info.end}, but the file has {file_size}; it is truncated: copy it again"
            )
        if info.begin != expected:
            how = "overlaps the tensor before it" if info.begin < expected else "leaves a gap before it"
            raise HeaderError(f"{name}: tensor {key!r} begins at byte {info.begin}, wanted {expected}: it {how}")
        expected = info.end
    if expected != file_size:
        raise HeaderError(f"{name}: {file_size - expected} bytes follow the last tensor; they belong to nothing")
    return dict(ordered), metadata


def _parse_tensor(key: str, entry: Any, name: str, data_start: int, number: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{name}: tensor {key!r} must have exactly dtype, shape and data_offsets")
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
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1], number)


class SafetensorsFile:
    """One open safetensors file: validated header, read-only memory map, tensors as views. Never written."""

    def __init__(self, path: Path, number: int = 0) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                prefix = file.read(8)
                if len(prefix) < 8:
                    raise HeaderError(f"{path.name}: {len(prefix)} bytes long; a safetensors file begins with an 8-byte length")
                length = int.from_bytes(prefix, "little")
                if length > MAX_HEADER_BYTES or 8 + length > status.st_size:
                    raise HeaderError(
                        f"{path.name}: the header claims {length} bytes, but the file has {status.st_size} "
                        f"(and {MAX_HEADER_BYTES} is the most a header may have); it is truncated or not safetensors"
                    )
                header = file.read(length)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UnreadableError(f"{path.name}: cannot be read ({error.strerror or error})") from None
        self.tensors, self.metadata = parse_header(header, path.name, 8 + length, status.st_size, number)
        digest = xxhash.xxh3_128_hexdigest(header)
        self.identity = SourceFile(path.name, status.st_size, status.st_mtime_ns, digest)

    def array(self, name: str) -> Array:
        """The tensor as a read-only view of the mapped file (F4 as its bytes); nothing is copied."""
        info = self.tensors[name]
        dtype = DTYPES.get(info.dtype, np.dtype("u1"))
        flat = np.frombuffer(self._map, dtype, count=info.nbytes // dtype.itemsize, offset=info.begin)
        return flat if info.dtype == "F4" else flat.reshape(info.shape)

    def release(self, name: str) -> None:
        """Give back the pages of a tensor that has been read, so that resident memory does not grow."""
        info = self.tensors[name]
        begin = -(-info.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = info.end // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if length > 0 and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, length)

    def unchanged(self) -> bool:
        """Whether the file on disk still has the size and time it had when it was opened."""
        try:
            status = self.path.stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.identity.size, self.identity.mtime_ns)


class StoredFile(Protocol):
    """What a set of tensors asks of a file, whatever its container."""

    path: Path
    identity: SourceFile
    metadata: dict[str, str]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, in the order of the data."""
        ...

    def array(self, name: str) -> Array:
        """The tensor as a read-only view."""
        ...

    def release(self, name: str) -> None:
        """Give back the pages of a tensor that has been read."""
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
        self._tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, info in file.tensors.items():
                if name in self._tensors:
                    other = self.files[self._tensors[name].file].path.name
                    raise HeaderError(f"tensor {name!r} is in {other} and again in {file.path.name}; which one counts cannot be known")
                self._tensors[name] = info
        if weight_map is not None:
            self._check_index(weight_map, index)

    def _check_index(self, weight_map: Mapping[str, str], index: str) -> None:
        for name, shard in weight_map.items():
            info = self._tensors.get(name)
            if info is None or self.files[info.file].path.name != shard:
                where = "no shard has it" if info is None else f"it is in {self.files[info.file].path.name}"
                raise HeaderError(f"{index}: says that tensor {name!r} is in {shard}, but {where}")
        if len(weight_map) != len(self._tensors):
            extra = next(name for name in self._tensors if name not in weight_map)
            raise HeaderError(f"{index}: does not list tensor {extra!r}, which {self.files[self._tensors[extra].file].path.name} holds")

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def array(self, name: str) -> Array:
        """The tensor as a read-only view of its mapped file."""
        return self.files[self._tensors[name].file].array(name)

    def release(self, name: str) -> None:
        self.files[self._tensors[name].file].release(name)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self._tensors.values())


def open_index(folder: Path, index: Path, opener: Callable[[Path, int], StoredFile] = SafetensorsFile) -> TensorSet:
    """The shards that ``index`` (``{"weight_map": {tensor: file}}``) lists, all inside ``folder``.

    raises HeaderError for an index of the wrong types, a name that leaves the folder, or one that disagrees with the shards
    """
    document = load_json(_read_bytes(index), index.name)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise HeaderError(f"{index.name}: weight_map must map tensor names to file names")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if shard != Path(shard).name or shard in {"", ".", ".."} or "\\" in shard or "\0" in shard:
            raise HeaderError(f"{index.name}: the shard name {shard!r} leaves the folder; only plain file names are followed")
        if len(os.fsencode(shard)) > 255 or not (folder / shard).is_file():
            raise HeaderError(f"{index.name}: lists {shard[:80]}, which is not in the folder: copy it there")
    return TensorSet([folder / shard for shard in shards], weight_map, index.name, opener)


def _read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise HeaderError(f"{path.name}: {path.stat().st_size} bytes is more than such a file can need")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableError(f"{path.name}: cannot be read ({error.strerror or error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A strict JSON object from a file of at most 100 MB; ``UnreadableError`` says what is wrong with it."""
    document = load_json(_read_bytes(path), path.name)
    if not isinstance(document, dict):
        raise UnreadableError(f"{path.name}: a JSON {type(document).__name__}, wanted an object")
    return document


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A safetensors file that is fully laid out before a byte of data exists.

    header        the 8-byte length and the JSON; tensors: {name: TensorInfo with absolute offsets}; size in bytes
    """

    name: str
    header: bytes
    tensors: dict[str, TensorInfo]
    size: int


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    stem: str = "model",
    single_name: str | None = None,
) -> list[OutputFile]:
    """Decide every output file from (name, dtype, shape) triples: shards in the given order, offsets, headers.

    A shard is closed when the next tensor would make it larger than ``max_shard_bytes``. One shard is called
    ``{stem}.safetensors`` (or ``single_name``), several ``{stem}-00001-of-0000N.safetensors``.
    """
    shards: list[list[_Sized]] = [[]]
    held = 0
    for name, dtype, shape in tensors:
        size = nbytes(dtype, shape)
        if shards[-1] and held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append((name, dtype, shape, size))
        held += size
    if len(shards) == 1:
        return [_lay_out_file(single_name or f"{stem}.safetensors", shards[0])]
    return [_lay_out_file(f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors", shard) for i, shard in enumerate(shards, 1)]


_Sized = tuple[str, str, tuple[int, ...], int]


def _lay_out_file(file_name: str, tensors: list[_Sized]) -> OutputFile:
    ordered = sorted(tensors, key=lambda tensor: -DTYPES[tensor[1]].itemsize if tensor[1] in DTYPES else -1)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, size in ordered:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (position, position + size)}
        position += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise HeaderError(f"{file_name}: its header would need {len(text)} bytes; use a smaller --max-shard-size")
    begin = 8 + len(text)
    infos = {}
    for name, dtype, shape, size in ordered:
        infos[name] = TensorInfo(dtype, shape, begin, begin + size)
        begin += size
    return OutputFile(file_name, len(text).to_bytes(8, "little") + text, infos, begin)


def index_json(files: Sequence[OutputFile]) -> str:
    """``model.safetensors.index.json`` for the shards: true total_size (bytes of tensor data) and weight_map."""
    total = sum(info.nbytes for file in files for info in file.tensors.values())
    weight_map = {name: file.name for file in files for name in file.tensors}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
