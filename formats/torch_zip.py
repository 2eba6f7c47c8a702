"""What ``torch.save`` writes since torch 1.6: a zip of storages and one pickle that says what lies where. Read without torch, and not run.

Defined by torch (``torch/serialization.py``, ``caffe2/serialize/inline_container.cc``). Every record is stored, never compressed, under one
folder, whose name is the file's or ``archive``:

=================  ======================================================================================================
``data.pkl``       a pickle (``pickle_tree``) of a dictionary {name: tensor} (``torch_tree``), an ``OrderedDict`` for ``state_dict()``
``data/KEY``       the elements of a storage, which is the persistent id ``("storage", torch.HalfStorage, KEY, device, count)``
``byteorder``      ``little``; missing before torch 2.1
``version``        3
=================  ======================================================================================================

A storage lies in the file as it is, so a tensor is read from there when asked for.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from .errors import UnreadableError
from .files import ReadableFile
from .ir import ArrayLike
from .pickle_tree import Call, Name, PickleFile, Reference
from .safetensors_file import DTYPES, SourceFile, TensorInfo, TensorTable
from .torch_tree import ELEMENTS, NAMES, ORDERED, Storage, are_sizes, kind_of, pickled_tensor, read_tensor

MAX_DIRECTORY = 64 << 20
"""Bytes of the zip's list of records: about 100 for each."""


class TorchZipFile:
    """One such file, with what ``SafetensorsFile`` offers: tensors by name, read when asked for.

    raises   UnreadableError for a file that is damaged, or whose pickle names anything but tensors
    """

    exempt = 0

    def __init__(self, path: Path, number: int = 0) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self.data = ReadableFile(path)
        self._records = self._list()
        self._pickle = PickleFile(self.data, NAMES)
        self.tensors = TensorTable(number)
        self._strides: dict[str, tuple[int, ...]] = {}
        for name, value in self._dictionary().items():
            tensor = pickled_tensor(path.name, name, value, self._storage)
            self.tensors.add(name, tensor.dtype, tensor.shape, tensor.begin, tensor.end)
            if tensor.stride is not None:
                self._strides[name] = tensor.stride
        listing = "".join(f"{name} {info.dtype} {info.shape} {info.begin}\n" for name, info in self.tensors.items())
        digest = xxhash.xxh3_128_hexdigest(listing.encode())
        self.identity = SourceFile(path.name, self.data.size, self.data.mtime_ns, digest)

    def tensor(self, name: str, info: TensorInfo | None = None) -> ArrayLike:
        """The tensor: unread, unless its elements do not lie in order (``lies_in_order``)."""
        return read_tensor(self.data, name, info or self.tensors[name], self._strides.get(name))

    def lies_in_order(self, name: str) -> bool:
        """Whether a tensor's elements lie one after another from its first byte."""
        return name not in self._strides

    def unchanged(self) -> bool:
        """Whether the file on disk still is the one that was opened, with its size and time."""
        return self.data.unchanged()

    def _bad(self, what: str) -> UnreadableError:
        return UnreadableError(f"{self.path.name}: {what}")

    def _list(self) -> dict[str, tuple[int, int]]:
        """(first byte, length) of every record, by its name within the folder."""
        try:
            with zipfile.ZipFile(_Stream(self.data)) as archive:
                listed = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, UnicodeDecodeError) as error:
            raise self._bad(f"is no zip as torch.save writes ({error}); it is damaged or truncated: copy it again") from None
        found: dict[str, tuple[int, int]] = {}
        pickles = [info.filename for info in listed if info.filename.endswith("data.pkl") and info.filename.count("/") == 1]
        if len(pickles) != 1:
            raise self._bad("is a zip without one data.pkl, and not what torch.save writes")
        folder = pickles[0].removesuffix("data.pkl")
        for info in listed:
            name = info.filename.removeprefix(folder)
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
                raise self._bad(f"its record {info.filename[:120]!r} is compressed or encrypted, which torch.save never does")
            if name in found:
                raise self._bad(f"has the record {info.filename[:120]!r} twice; which one counts cannot be known")
            found[name] = (self._begin(info), info.file_size)
        order = found.get("byteorder")
        if order is not None and bytes(self.data.read(order[0], min(order[1], 16))) != b"little":
            raise self._bad("was saved on a big-endian machine, which is not read; save it again on another")
        return found

    def _begin(self, info: zipfile.ZipInfo) -> int:
        """The first byte of a record's content: after its local header, which has lengths of its own."""
        where, size = info.header_offset, self.data.size
        head = bytes(self.data.read(where, 30)) if 0 <= where <= size - 30 else b""
        begin = where + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        if head[:4] != b"PK\x03\x04" or begin + info.file_size > size:
            raise self._bad(f"its record {info.filename[:120]!r} does not lie where the zip says; it is truncated: copy it again")
        return begin

    def _dictionary(self) -> Mapping[str, Any]:
        begin, length = self._records["data.pkl"]
        value, stop = self._pickle.read(begin, begin + length)
        if stop != begin + length:
            raise self._bad(f"{begin + length - stop} bytes follow the pickle; they belong to nothing")
        if isinstance(value, Call) and value.name == ORDERED and not value.arguments:
            value = value.held or {}
        if not isinstance(value, dict):
            raise self._bad(f"holds a {kind_of(value)}, wanted a dictionary of tensors")
        return value

    def _storage(self, name: str, value: Any) -> Storage:
        what = value.what if isinstance(value, Reference) else None
        if not isinstance(what, tuple) or len(what) != 5 or what[0] != "storage" or not isinstance(what[1], Name):
            raise self._bad(f"the storage of {name[:120]!r} is a {kind_of(value)}, wanted one storage")
        if what[1].path not in ELEMENTS or type(what[2]) is not str or not are_sizes((what[4],)):
            raise self._bad(f"the storage of {name[:120]!r} is not described as torch.save describes one")
        dtype, count = ELEMENTS[what[1].path], what[4]
        begin, length = self._records.get(f"data/{what[2]}", (0, -1))
        if length != count * DTYPES[dtype].itemsize:
            there = "is not there" if length < 0 else f"has {length} bytes"
            raise self._bad(f"the storage of {name[:120]!r} {there}, wanted {count} elements of {dtype}; the file is damaged")
        return dtype, begin, count


class _Stream(io.RawIOBase):
    """The file as zipfile reads it: its list of records, at most ``MAX_DIRECTORY`` bytes at once."""

    def __init__(self, file: ReadableFile) -> None:
        self._file, self._position = file, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        if base + offset < 0:
            raise ValueError("a place before the file's first byte")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(self._file.size - self._position, 0)
        length = left if size < 0 else min(size, left)
        if length > MAX_DIRECTORY:
            raise ValueError(f"a list of records of {length} bytes, more than a model can need")
        found = bytes(self._file.read(self._position, length))
        self._position += length
        return found


def is_zip(path: Path) -> bool:
    """Whether a file begins as a zip does."""
    file = ReadableFile(path)
    return file.size >= 4 and bytes(file.read(0, 4)) == b"PK\x03\x04"
