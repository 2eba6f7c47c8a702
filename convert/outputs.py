"""Output files while they grow: tiles are written anywhere, headers last, and what was written is brought to the disk.

A model's weights lie in one ``Output`` for every file, or, where ranks hold parts of each tensor, in one ``RankedOutput`` for all; those of
a TurboMind workspace in ``WorkspaceFiles``. Until
``finish`` a file has no header, so that nothing takes it for a model.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from formats.errors import NotSameError
from formats.ir import Array
from formats.laid_out import LaidOut, LaidOutFile
from formats.mindspore_ranks_output import RanksLaidOut
from formats.safetensors_file import TensorIndex, TensorInfo, TensorSet
from formats.turbomind_files import WorkspaceOutput
from formats.workspace import Workspace

from .journal import Journal
from .workspace_output import WorkspaceFiles

SYNC_BYTES = 1 << 30
"""Bytes after which what was written is brought to the disk: what a power cut costs at most."""

READ_BACK = 1 << 20
"""Bytes that are read back and compared at once."""


class Output(Protocol):
    """Where tensors are written: one laid-out file, or several that hold parts. path: of the (first) file."""

    path: Path

    @property
    def file(self) -> LaidOut: ...

    def make(self) -> None:
        """Make every file at its full size, without data, or accept what an earlier run left of it."""
        ...

    def write(self, info: TensorInfo, array: Array, row: int, col: int) -> None:
        """Write a rectangle of a 2-D (or, with row 0, 1-D) stored tensor: ``array`` at [row, col]."""
        ...

    def holds(self, info: TensorInfo, array: Array, row: int, col: int, work: Workspace) -> bool:
        """Whether that rectangle is there, byte for byte."""
        ...

    def finish(self) -> None:
        """Write what is not data, headers, and see that it is there: the files are whole."""
        ...

    def sync(self) -> None:
        """Bring what was written since the last time to the disk."""
        ...

    def is_turned(self, info: TensorInfo) -> bool:
        """Whether a tensor's rows lie across the file's lines, so that it is written well in high pieces only."""
        ...


def output_of(folder: Path, file: LaidOut) -> Output:
    """What writes ``file`` in ``folder``."""
    if isinstance(file, RanksLaidOut):
        return RankedOutput(folder, file)
    return WorkspaceFiles(folder, file) if isinstance(file, WorkspaceOutput) else FileOutput(folder, cast(LaidOutFile, file))


class FileOutput:
    """One laid-out output file (``Output``)."""

    def __init__(self, folder: Path, file: LaidOutFile) -> None:
        self.path, self.file = folder / file.name, file
        self._turn = threading.Lock()
        self.dirty = False

    def make(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            os.ftruncate(handle, self.file.size)
        finally:
            os.close(handle)

    def finish(self) -> None:
        sealed = self.file.sealed(self.file.growing(self.path))
        with self.opened() as handle:
            for at, part in sealed.heads():
                write_all(handle, part, at)
                again = bytearray(len(part))
                if not _read_back(handle, memoryview(again), at) or again != part:
                    raise NotSameError(
                        f"{self.path.name}: does not hold the header that was written to it; check the disk, and run it again"
                    )

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor to write with and read back from."""
        handle = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            yield handle
        finally:
            os.close(handle)

    def write(self, info: TensorInfo, array: Array, row: int, col: int) -> None:
        lines, begin, step = _lines(info, array, row, col)
        with self._turn, self.opened() as handle:  # one at a time: writers of one file would spin on its lock, line by line
            for number, line in enumerate(lines):
                self._write_line(handle, memoryview(line), begin + number * step)
        self.dirty = True  # after the writes: a sync that clears it now comes after them

    def holds(self, info: TensorInfo, array: Array, row: int, col: int, work: Workspace) -> bool:
        lines, begin, step = _lines(info, array, row, col)
        high, wide = max(1, READ_BACK // max(1, lines.shape[1])), max(1, min(READ_BACK, lines.shape[1]))
        with self.opened() as handle:
            for first in range(0, lines.shape[0], high):
                for left in range(0, lines.shape[1], wide):
                    part = lines[first : first + high, left : left + wide]
                    again = work.take("read back", part.shape, np.uint8)
                    for number, line in enumerate(again, first):
                        if not self._read_line(handle, memoryview(line), begin + number * step + left):
                            return False
                    if not np.array_equal(again, part):
                        return False
        return True

    def is_turned(self, info: TensorInfo) -> bool:
        return False

    def sync(self) -> None:
        if self.dirty:
            self.dirty = False
            with self.opened() as handle:
                os.fdatasync(handle)

    def _write_line(self, handle: int, line: memoryview, offset: int) -> None:
        done = 0
        for begin, length in self.file.pieces(offset, len(line)):
            write_all(handle, line[done : done + length], begin)
            done += length

    def _read_line(self, handle: int, line: memoryview, offset: int) -> bool:
        done = 0
        for begin, length in self.file.pieces(offset, len(line)):
            if not _read_back(handle, line[done : done + length], begin):
                return False
            done += length
        return True


class RankedOutput:
    """The ranks of one model (``Output``): each rectangle goes to the ranks that hold some of it."""

    def __init__(self, folder: Path, file: RanksLaidOut) -> None:
        self.path, self.file = folder / file.name, file
        self._parts = [FileOutput(folder, part) for part in file.parts]

    def make(self) -> None:
        for part in self._parts:
            part.make()

    def write(self, info: TensorInfo, array: Array, row: int, col: int) -> None:
        block = array.reshape(-1, array.shape[-1])
        for cut in self.file.cuts(info, row, col, block.shape):
            self._parts[cut.rank].write(cut.info, block[cut.rows, cut.cols], cut.row, cut.col)

    def holds(self, info: TensorInfo, array: Array, row: int, col: int, work: Workspace) -> bool:
        block = array.reshape(-1, array.shape[-1])
        cuts = self.file.cuts(info, row, col, block.shape)
        return all(self._parts[cut.rank].holds(cut.info, block[cut.rows, cut.cols], cut.row, cut.col, work) for cut in cuts)

    def finish(self) -> None:
        for part in self._parts:
            part.finish()

    def is_turned(self, info: TensorInfo) -> bool:
        return False

    def sync(self) -> None:
        for part in self._parts:
            part.sync()


class Places(Mapping[str, tuple[Output, TensorInfo]]):
    """Where every tensor of a set of output files lies. tensors: all of them under one mapping, if there is one already."""

    def __init__(self, outputs: Sequence[Output], tensors: TensorSet | None) -> None:
        self._outputs = {output.path.name: output for output in outputs}
        self._index = TensorIndex([output.file.tensors for output in outputs], _twice) if tensors is None else tensors
        self._files = [output.path.name for output in outputs] if tensors is None else [file.path.name for file in tensors.files]

    def __getitem__(self, name: str) -> tuple[Output, TensorInfo]:
        info = self._index[name]
        return self._outputs[self._files[info.file]], info

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


def _twice(name: str, first: int, second: int) -> None:
    raise NotSameError(f"{name}: was to be written twice; this is a fault in Weighbridge: please report it")


def _lines(info: TensorInfo, array: Array, row: int, col: int) -> tuple[Array, int, int]:
    """The rectangle as (uint8 [pieces that lie together in the file, bytes], where the first lies, bytes from one to the next)."""
    width, item = (info.shape or (1,))[-1], array.itemsize
    block = np.ascontiguousarray(array).reshape(-1, array.shape[-1])
    rows = info.nbytes // (width * item) if width else 0
    if row + block.shape[0] > rows or col + block.shape[1] > width:
        raise ValueError(f"a block {block.shape} at {(row, col)} leaves a tensor {info.shape}")
    stride = info.stride or width
    data, begin = block.view(np.uint8), info.begin + (row * stride + col) * item
    if block.shape[1] < stride:
        return data, begin, stride * item
    return data.reshape(1, -1), begin, data.size


def write_all(fd: int, data: Any, offset: int) -> None:
    """``pwrite`` until everything is written."""
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(fd, view, offset)
        view = view[done:]
        offset += done


def _read_back(fd: int, view: memoryview, offset: int) -> bool:
    while view:
        done = os.preadv(fd, [view], offset)
        if not done:
            return False
        view = view[done:]
        offset += done
    return True


class Syncer:
    """Brings output to the disk in the background after every ``SYNC_BYTES``, and says so in the journal."""

    def __init__(self, outputs: Sequence[Output], journal: Journal) -> None:
        self._outputs, self._journal = outputs, journal
        self._lock = threading.Lock()
        self._since = 0
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def wrote(self, count: int) -> None:
        """So many bytes were written."""
        with self._lock:
            self._since += count
            if self._since < SYNC_BYTES or (self._running is not None and not self._running.done()):
                return
            if self._running is not None:
                self._running.result()
            self._since = 0
            self._running = self._pool.submit(self._sync, self._journal.end)

    def _sync(self, upto: int) -> None:
        try:
            for output in self._outputs:
                output.sync()
            self._journal.synced(upto)
        except OSError:
            self._journal.doubt()
            raise

    def close(self) -> None:
        """Wait for what is under way; raises OSError if it failed."""
        self._pool.shutdown(wait=True)
        if self._running is not None:
            self._running.result()
