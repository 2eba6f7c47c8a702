"""Writes a TurboMind workspace's weights (``formats.turbomind_files``, ``formats.placement``)."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from formats.ir import Array
from formats.placement import PIECE, Place, read_lines, write_lines
from formats.safetensors_file import TensorInfo
from formats.turbomind_files import WorkspaceOutput
from formats.workspace import Workspace


class WorkspaceFiles:
    """The weights of a TurboMind workspace (``Output``): many files at once, into which tensors are put piece by piece."""

    def __init__(self, folder: Path, file: WorkspaceOutput) -> None:
        self.path, self.file = folder / file.name, file
        self._dirty, self._sizes = False, file.sizes
        self._turns = {name: threading.Lock() for name in file.sizes}
        self._places: dict[int, Place] = {info.begin: file.places[name] for name, info in file.tensors.items()}

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for name, size in self._sizes.items():
            handle = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                os.ftruncate(handle, size)
            finally:
                os.close(handle)

    def finish(self) -> None:
        """There is nothing in the files but data."""

    def write(self, info: TensorInfo, array: Array, row: int, col: int) -> None:
        data = _bytes(array)
        with _Handles(self.path) as handles:
            self._places[info.begin].write(handles.read, handles.write, self._turns.__getitem__, data, row, col * array.itemsize)
        self._dirty = True

    def holds(self, info: TensorInfo, array: Array, row: int, col: int, work: Workspace) -> bool:
        data, place, item = _bytes(array), self._places[info.begin], array.itemsize
        rows, width = data.shape
        # in pieces of whole lines of the file
        high = rows if place.turned else max(1, PIECE // width)
        wide = max(item, PIECE // rows // item * item) if place.turned else width
        with _Handles(self.path) as handles:
            for top in range(0, rows, high):
                for left in range(0, width, wide):
                    part = data[top : top + high, left : left + wide]
                    again = work.take("read back", part.shape, np.uint8)
                    place.read(handles.read, again, row + top, col * item + left)
                    if not np.array_equal(again, part):
                        return False
        return True

    def is_turned(self, info: TensorInfo) -> bool:
        return self._places[info.begin].turned

    def sync(self) -> None:
        if not self._dirty:
            return
        self._dirty = False
        for name in self._sizes:
            with _opened(self.path / name) as handle:
                os.fdatasync(handle)


def _bytes(array: Array) -> Array:
    block = np.ascontiguousarray(array).reshape(-1, array.shape[-1])
    return block.view(np.uint8)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield handle
    finally:
        os.close(handle)


class _Handles:
    """The files of a folder, open for one piece of work."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, contextlib.ExitStack()
        self._open: dict[str, int] = {}

    def __enter__(self) -> _Handles:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _handle(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = self._stack.enter_context(_opened(self._folder / name))
        return self._open[name]

    def read(self, name: str, block: Array, offset: int, pitch: int) -> None:
        read_lines(self._handle(name), block, offset, pitch, self._folder / name)

    def write(self, name: str, block: Array, offset: int, pitch: int) -> None:
        write_lines(self._handle(name), block, offset, pitch)
