"""Where output grows: a hidden folder beside the destination that becomes it when whole, and files that take tiles."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from formats.errors import DestinationError
from formats.ir import Array
from formats.safetensors_file import OutputFile, TensorInfo

from .folder import CARRIED


@contextlib.contextmanager
def staging(destination: Path, size: int, sources: Sequence[Path], overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside ``destination`` that becomes it when the block ends well, and vanishes otherwise.

    size      bytes that it must have room for; sources: folders that are read, which the destination must leave alone
    raises    DestinationError: the destination exists and may not be overwritten, has no room, or cannot be written
    """
    target = Path(os.path.abspath(destination))
    _check_destination(target, size, sources, overwrite)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.weighbridge-", dir=target.parent))
    except OSError as error:
        raise DestinationError(f"{target.parent}: cannot be written ({error.strerror or error}); choose another destination") from None
    try:
        os.chmod(folder, 0o777 & ~_umask())
        yield folder
        _make_durable(folder)
        _rename(folder, target)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not target.parent.exists():
            raise DestinationError(f"{target.parent}: vanished while it was being written to") from None
        raise DestinationError(f"{target}: cannot be written ({error.strerror or error}); nothing was left there") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_destination(target: Path, size: int, sources: Sequence[Path], overwrite: bool) -> None:
    parent = target.parent
    if not parent.is_dir():
        raise DestinationError(f"{parent}: there is no such folder to write into; make it first")
    there = target.resolve()
    for source in (folder.resolve() for folder in sources):
        if there == source or there in source.parents or source in there.parents:
            raise DestinationError(f"{target}: is, holds or lies in the source, which is never written: choose another destination")
    if target.exists() or target.is_symlink():
        if not overwrite:
            raise DestinationError(f"{target}: exists already; choose another destination, or pass --overwrite to replace it")
        if not target.is_dir() or target.is_symlink():
            raise DestinationError(f"{target}: is no folder, so --overwrite will not replace it; remove it yourself")
        if (stranger := _stranger(target)) is not None:
            raise DestinationError(f"{target}: is not a model folder ({stranger}), so --overwrite will not replace it; remove it yourself")
    try:
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise DestinationError(f"{parent}: cannot be examined ({error.strerror or error})") from None
    if free < size:
        raise DestinationError(f"{parent}: {_gb(size)} are needed and {_gb(free)} are free; make room, or choose another disk")


MODEL_FILES = ("*.safetensors", "*.json", "README.md", ".gitattributes", *CARRIED)
"""What a folder that --overwrite may replace consists of."""


def _stranger(folder: Path) -> str | None:
    """What speaks against replacing ``folder``, in words; None if only a model (or nothing) would be lost."""
    entries = list(folder.iterdir())
    for entry in entries:
        if not entry.is_file() or not any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in MODEL_FILES):
            return f"it holds {entry.name}"
    if entries and not any(entry.name in {"config.json", "weighbridge.json"} or entry.suffix == ".safetensors" for entry in entries):
        return "it holds neither a config nor weights"
    return None


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _make_durable(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _rename(folder: Path, target: Path) -> None:
    """Put the finished folder in place of whatever ``target`` is; the old one goes only after the new one is there."""
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.weighbridge-old-", dir=target.parent))
        os.rename(target, old / target.name)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(old / target.name, target)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(folder, target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Output:
    """One laid-out output file: as a context manager, open for tiles."""

    def __init__(self, folder: Path, file: OutputFile) -> None:
        self._path, self._file = folder / file.name, file
        self.fd = -1

    def __enter__(self) -> Output:
        self.fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.ftruncate(self.fd, self._file.size)
            write_all(self.fd, self._file.header, 0)
        except BaseException:
            os.close(self.fd)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.fd)

    def write(self, info: TensorInfo, array: Array, row: int, col: int) -> None:
        """Write a rectangle of a 2-D (or, with row 0, 1-D) stored tensor: ``array`` at [row, col]."""
        width = info.shape[-1]
        item = array.itemsize
        block = np.ascontiguousarray(array).reshape(-1, array.shape[-1])
        begin = info.begin + (row * width + col) * item
        if block.shape[1] == width:
            write_all(self.fd, block.view(np.uint8).reshape(-1), begin)
            return
        for number, line in enumerate(block):
            write_all(self.fd, line.view(np.uint8), begin + number * width * item)


def write_all(fd: int, data: Any, offset: int) -> None:
    """``pwrite`` until everything is written."""
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(fd, view, offset)
        view = view[done:]
        offset += done
