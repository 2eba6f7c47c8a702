"""Reading files by position: regular files only, whole or not at all, never mapped.

A mapped file that another process truncates, or whose disk fails, kills the process that reads it. Here every read is a
``pread`` into memory of ours, so whatever happens to the file becomes one ``UnreadableError``.
"""

from __future__ import annotations

import contextlib
import os
import resource
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import ReadFailedError, UnreadableError

MAX_OPEN = max(4, min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
"""Files held open at once; a checkpoint may have more shards than a process may have descriptors."""


Read = Callable[[memoryview, int], None]
"""Fills bytes of memory from an offset. UnreadableError if they are not all there, or the disk fails."""


class Readable:
    """Bytes to be read by position: a file, or what is made of one.

    path, size   of the file, for errors; bytes that can be read
    """

    path: Path
    size: int

    def reading(self) -> contextlib.AbstractContextManager[Read]:
        """What reads inside a block; cheaper than to ask for every piece anew."""
        raise NotImplementedError

    def read_into(self, buffer: Any, offset: int) -> None:
        """Fill the contiguous ``buffer`` from byte ``offset``. UnreadableError if the file ends before, or its disk fails."""
        with self.reading() as read:
            read(memoryview(buffer).cast("B"), offset)

    def read(self, offset: int, length: int) -> bytearray:
        """``length`` bytes from ``offset``."""
        buffer = bytearray(length)
        self.read_into(buffer, offset)
        return buffer


class ReadableFile(Readable):
    """One regular file to read from. It is opened when first read, and again after others were (``MAX_OPEN``).

    size, mtime_ns   as they were when it was first looked at; a file that differs later is refused
    growing          it is being written by this process: only its inode must stay
    """

    def __init__(self, path: Path, growing: bool = False) -> None:
        self.path, self._growing = path, growing
        self._descriptor: int | None = None
        self._readers = 0
        self._identity: tuple[int, ...] = ()
        self.size = self.mtime_ns = 0
        with self.opened():
            pass

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """The file's descriptor, which stays open inside the block."""
        with _lock:
            if self._descriptor is None:
                self._descriptor = self._open()
            self._readers += 1
            _open_files[id(self)] = weakref.ref(self)
            _open_files.move_to_end(id(self))
            if len(_open_files) > MAX_OPEN:
                _close_idle()
        try:
            yield self._descriptor
        finally:
            with _lock:
                self._readers -= 1

    def _open(self) -> int:
        try:  # not blocking: a FIFO would wait for a writer
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(descriptor)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            gone = "has vanished since it was opened" if self._identity else "cannot be read"
            raise UnreadableError(f"{self.path.name}: {gone} ({why})") from None
        found = (*((0, 0) if self._growing else (status.st_size, status.st_mtime_ns)), status.st_dev, status.st_ino)
        if not stat.S_ISREG(status.st_mode) or self._identity not in {(), found}:
            os.close(descriptor)
            what = "is not a regular file" if not stat.S_ISREG(status.st_mode) else "was replaced while it was being read; run it again"
            raise UnreadableError(f"{self.path.name}: {what}")
        self._identity, self.size, self.mtime_ns = found, status.st_size, status.st_mtime_ns
        return descriptor

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        try:  # noqa: SIM105 - when the interpreter ends, contextlib is gone before the last file
            self._close()
        except Exception:
            pass

    @contextlib.contextmanager
    def reading(self) -> Iterator[Read]:
        """``pread`` from the file, which stays open inside the block."""
        with self.opened() as descriptor:
            yield lambda view, offset: read_at(descriptor, view, offset, self.path)

    def unchanged(self) -> bool:
        """Whether the file at the path still is the one that was opened, with its size and time."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino) == self._identity


def read_at(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """``preadv`` until ``view`` (bytes) is full."""
    while view:
        try:
            done = os.preadv(descriptor, [view], offset)
        except OSError as error:
            raise ReadFailedError(f"{path.name}: cannot be read at byte {offset} ({error.strerror or error})") from None
        if not done:
            raise UnreadableError(f"{path.name}: ends at byte {offset}, {len(view)} bytes too early; it was truncated while it was read")
        view = view[done:]
        offset += done


_lock = threading.Lock()
_open_files: OrderedDict[int, weakref.ref[ReadableFile]] = OrderedDict()
"""Least recently read first. Weak: a checkpoint that is let go of gives its descriptors back."""


def _close_idle() -> None:
    """Close what is read by nobody until ``MAX_OPEN`` files are open, the longest unread first. Under the lock."""
    for key, weak in list(_open_files.items()):
        file = weak()
        if file is None:
            del _open_files[key]
        elif not file._readers and len(_open_files) > MAX_OPEN:
            del _open_files[key]
            file._close()
