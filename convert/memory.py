"""How the memory that a conversion may use is shared out: a promise over the bare interpreter, whatever the model weighs."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sized
from dataclasses import dataclass

from formats.errors import UsageError

MIB = 1 << 20
DEFAULT_MEMORY = 256 * MIB

LIBRARIES = 62 * MIB
"""NumPy, Numba and the rest, imported and warm."""

WORKER = 18 * MIB
"""A worker beyond what its tile holds: strips, their values, small tensors on their way."""

SMALLEST_TILE = 1 * MIB
LARGEST_TILE = 32 * MIB

_M_MMAP_THRESHOLD = -3
"""glibc's name for the size from which a block is mapped, so that freeing it gives it back."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Shares of a limit. limit, headers (lists of tensors and layers), tile (held packed by each of ``jobs`` workers) and kept (by the
    source's reader) in bytes."""

    limit: int
    jobs: int
    headers: int
    tile: int
    kept: int = 0

    @property
    def peak(self) -> int:
        """Bytes of anonymous memory at most, over the bare interpreter."""
        return LIBRARIES + self.headers + self.kept + self.jobs * (WORKER + self.tile)


def share(limit: int, jobs: int, headers: int, kept: int = 0) -> Memory:
    """Share ``limit`` bytes out over at most ``jobs`` workers; UsageError if not even one can work within it."""
    free = limit - LIBRARIES - headers - kept
    least = WORKER + SMALLEST_TILE
    if free < least:
        needed = -(-(LIBRARIES + headers + kept + least) // MIB)
        parts = f"{headers // MIB} of them for its headers" + (f" and {kept // MIB} for its scales" if kept else "")
        raise UsageError(f"--max-memory {limit // MIB}MiB: this checkpoint needs {needed}MiB at least, {parts}")
    jobs = min(jobs, free // least)
    return Memory(limit, jobs, headers, min(LARGEST_TILE, free // jobs - WORKER), kept)


def header_bytes(tensors: Sized, layers: int = 0, outputs: int = 0) -> int:
    """Bytes that lists of so many tensors to read, layers to plan and tensors to write take, about."""
    return 400 * len(tensors) + 700 * layers + 240 * outputs


def give_back_at_once() -> None:
    """Let the C library return freed blocks of 1 MiB and more to the system, in a process that is ours.

    glibc stops doing so for blocks of the size of weights once a few were freed, and a process that loads one layer after the other then
    holds the memory of several (measured: 740 MiB instead of 400 for layers of 100). Where there is no ``mallopt`` nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MIB)
