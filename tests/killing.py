"""Conversions in processes of their own that are killed on the way, and counts of the tiles that a conversion writes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from convert import tiling
from convert.engine import convert
from convert.writing import LayerWriter, PlainWriter

TileKey = tuple[str, int, int]
"""(tensor, first row, first column)."""


@contextmanager
def small_tiles() -> Iterator[None]:
    """Inside, a tile is a single leaf: 64 x 1024."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "MOST", 1)
        yield


@contextmanager
def watched() -> Iterator[list[TileKey]]:
    """The tiles whose writing began inside."""
    begun: list[TileKey] = []
    with pytest.MonkeyPatch.context() as patch:
        for writer in (LayerWriter, PlainWriter):
            real = writer.write

            def write(self: Any, rows: slice, cols: slice, works: Any, real: Any = real) -> Any:
                begun.append((self.matrices[0].name, rows.start, cols.start))
                return real(self, rows, cols, works)

            patch.setattr(writer, "write", write)
        yield begun


@contextmanager
def counted_pwrites() -> Iterator[list[int]]:
    """How many times something was written inside, as the only item."""
    count, real = [0], os.pwrite

    def pwrite(*args: Any) -> int:
        count[0] += 1
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        yield count


def convert_until_killed(pwrites: int, log: Path, source: Path, out: Path, to: str, options: dict[str, Any]) -> None:
    """Runs in a process of its own: convert in small tiles, and be killed in the middle of a write. ``log`` tells what began."""
    left, real = [pwrites], os.pwrite

    def pwrite(fd: int, data: Any, offset: int) -> int:
        left[0] -= 1
        if left[0] == 0:
            log.write_text("".join(f"{name} {row} {col}\n" for name, row, col in list(begun)), "utf-8")
            real(fd, memoryview(data)[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(fd, data, offset)

    os.pwrite = pwrite
    with small_tiles(), watched() as begun:
        convert(source, out, to, **options)


def kill_after(pwrites: int, tmp_path: Path, source: Path, out: Path, to: str, **options: Any) -> set[TileKey]:
    """Convert in a process that is killed in its ``pwrites``-th write; returns the tiles that it had begun."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killing"])
    process = context.Process(target=convert_until_killed, args=(pwrites, tmp_path / "log", source, out, to, options))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    lines = (line.split() for line in (tmp_path / "log").read_text("utf-8").splitlines())
    return {(name, int(row), int(col)) for name, row, col in lines}
