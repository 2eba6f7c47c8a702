"""The journal of a conversion: what was done, so that the same command finishes what was interrupted.

A file of records, each a length, an XXH3-64 of its content, and the content; whatever follows the first record that is cut or
damaged is forgotten. Records are

    B   JSON: a run began; what it converts, and on which boot of which machine
    T   a tile is written: entry, rows, cols, its leaves on both sides, how scales agree and their bound
    E   an entry of the checkpoint is written and proved; JSON: the verdict on each of its tensors
    S   JSON: everything that the first ``upto`` bytes of the journal say is on the disk

A process that is killed loses nothing that it handed to the kernel, so all records count if the machine is still up. After a
power cut only those count that an S vouches for.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from formats.errors import DestinationError

_FRAME = struct.Struct("<IQ")
_TILE = struct.Struct("<IIIIIBdI")
_ENTRY = struct.Struct("<I")

Key = tuple[int, int, int, int, int]
"""(entry, first row, end row, first column, end column)."""


@dataclass(frozen=True, slots=True)
class TileRecord:
    """A finished tile: its leaves on both sides (empty without proof), whether values were rounded, and by how much."""

    left: bytes = b""
    right: bytes = b""
    rounded: bool = False
    bound: float = 0.0


@dataclass
class Done:
    """What a journal says was done. end: bytes that say so; vouched: bytes whose data is known to be on the disk.

    tiles     of entries that are not finished; entries: where the verdicts of finished ones stand in the file, and their length
    """

    began: dict[str, Any] | None = None
    tiles: dict[Key, TileRecord] = field(default_factory=dict)
    entries: dict[int, tuple[int, int]] = field(default_factory=dict)
    end: int = 0
    vouched: int = 0


class Journal:
    """The journal at ``path``, locked for this process while it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file = _open_locked(path)
        self.done = _read(self._file)
        self._end = self.done.end
        self._worked = self._doubted = False

    def begin(self, what: dict[str, Any]) -> None:
        """Start a run of ``what``; whatever is not trusted goes."""
        os.ftruncate(self._file, self._end)
        self._append(b"B" + json.dumps({**what, "boot": boot()}, sort_keys=True).encode())
        if self.done.vouched:
            self._vouch(self.done.vouched)  # again: the record that did lies behind what it vouched for, and may have gone

    def restart(self) -> None:
        """Forget everything."""
        os.ftruncate(self._file, 0)
        self.done, self._end = Done(), 0

    def tile(self, key: Key, record: TileRecord) -> None:
        """A tile is written."""
        self._worked = True
        head = _TILE.pack(*key, record.rounded, record.bound, len(record.left))
        self._append(b"T" + head + record.left + (b"" if record.right == record.left else record.right))

    def entry(self, number: int, verdicts: list[Any]) -> None:
        """An entry is written and proved; ``verdicts`` is JSON-ready."""
        self._worked = True
        self._append(b"E" + _ENTRY.pack(number) + json.dumps(verdicts).encode())

    def verdicts(self, number: int) -> list[Any] | None:
        """The verdicts on an entry that an earlier run finished, or None."""
        if number not in self.done.entries:
            return None
        at, length = self.done.entries[number]
        found: list[Any] = json.loads(os.pread(self._file, length, at))
        return found

    @property
    def holds_work(self) -> bool:
        """Whether anything was done that is worth keeping."""
        return bool(self.done.vouched) if self._doubted else self._worked or bool(self.done.tiles or self.done.entries)

    @property
    def end(self) -> int:
        """Bytes of the journal so far."""
        return self._end

    def synced(self, upto: int) -> None:
        """All data that the first ``upto`` bytes of the journal speak of is on the disk."""
        os.fdatasync(self._file)
        self._vouch(upto)
        os.fdatasync(self._file)

    def _vouch(self, upto: int) -> None:
        self._append(b"S" + json.dumps({"upto": upto}).encode())
        self.done.vouched = upto

    def doubt(self) -> None:
        """Data may have been lost on its way to the disk: from now on only what was synced before counts."""
        self._doubted = True
        if self.done.vouched:
            self._append(b"B" + json.dumps({"boot": ""}).encode())

    def close(self) -> None:
        """Let go of the lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _append(self, content: bytes) -> None:
        record = memoryview(_FRAME.pack(len(content), xxhash.xxh3_64_intdigest(content)) + content)
        with self._lock:
            at = self._end
            while record:
                written = os.pwrite(self._file, record, at)
                record, at = record[written:], at + written
            self._end = at


def boot() -> str:
    """Names this boot of this machine: what the page cache holds outlives a process, but not a boot."""
    try:
        number = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        number = str(os.getpid())  # unknown: trust only what was synced
    return f"{platform.node()} {number}"


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise DestinationError(
                f"{path.parent}: another conversion is writing there; wait for it, or choose another destination"
            ) from None
        except OSError:  # a file system without locks
            return descriptor
        try:
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its folder was removed between the two calls
        if not path.parent.is_dir():
            raise DestinationError(f"{path.parent}: vanished; run it again")


def _read(descriptor: int) -> Done:
    """What the records say, up to where the disk is known to hold it. They are gone through twice, and never held together."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        began, boots, vouched, end = None, "", 0, 0
        for at, content in _records(file):
            end = at + _FRAME.size + len(content)
            if content[:1] == b"B":
                said = json.loads(content[1:])
                began, boots = began or said, said["boot"]
            elif content[:1] == b"S":
                vouched = max(vouched, json.loads(content[1:])["upto"])
        done = Done(began, vouched=vouched)
        upto = end if began is not None and boots == boot() else vouched
        for at, content in _records(file):
            if at >= upto:
                break
            done.end = at + _FRAME.size + len(content)
            kind, rest = content[:1], content[1:]
            if kind == b"T":
                *key, rounded, bound, length = _TILE.unpack(rest[: _TILE.size])
                left = rest[_TILE.size : _TILE.size + length]
                done.tiles[tuple(key)] = TileRecord(left, rest[_TILE.size + length :] or left, bool(rounded), bound)
            elif kind == b"E":
                (number,) = _ENTRY.unpack(rest[: _ENTRY.size])
                done.entries[number] = at + _FRAME.size + 1 + _ENTRY.size, len(rest) - _ENTRY.size
                done.tiles = {found: record for found, record in done.tiles.items() if found[0] != number}
    return done


def _records(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(where it begins, content) of each record before the first that is cut or damaged."""
    size, at = os.fstat(file.fileno()).st_size, 0
    file.seek(0)
    while at + _FRAME.size <= size:
        length, digest = _FRAME.unpack(file.read(_FRAME.size))
        if at + _FRAME.size + length > size:
            return
        content = file.read(length)
        if not content or xxhash.xxh3_64_intdigest(content) != digest:
            return
        yield at, content
        at += _FRAME.size + length
