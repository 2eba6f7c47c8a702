"""Memory that a worker uses again for every tile, so that no tile pays for fresh pages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .regions import Array


class Workspace:
    """Named scratch arrays of one worker. An array that was taken is valid until its name is taken again."""

    def __init__(self) -> None:
        self._held: dict[str, Array] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """An uninitialized C-contiguous array."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        held = self._held.get(name)
        if held is None or held.nbytes < size:
            held = self._held[name] = np.empty(-(-size // 4096) * 4096, dtype=np.uint8)
        taken: Array = held[:size].view(kind).reshape(shape)
        return taken

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self._held.values())


def empty(work: Workspace | None, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """``work``'s array, or without one a fresh array."""
    return np.empty(shape, dtype=dtype) if work is None else work.take(name, shape, dtype)
