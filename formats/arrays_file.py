"""Tensors in memory with what a weight file offers, so that what was just made is read as a checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from .ir import Array
from .safetensors_file import NAMES, SourceFile, TensorInfo, TensorTable


class ArraysFile:
    """Arrays by name in the place of a file at ``path`` (``StoredFile``)."""

    exempt = 0

    def __init__(self, path: Path, arrays: Mapping[str, Array], number: int = 0) -> None:
        self.path, self._arrays = path, arrays
        self.metadata: dict[str, str] = {}
        self.tensors = TensorTable(number)
        listing = xxhash.xxh3_128()
        for name, array in arrays.items():
            self.tensors.add(name, NAMES[array.dtype], array.shape, 0, array.nbytes)
            listing.update(f"{name} {array.dtype} {array.shape}\n".encode())
            listing.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        self.identity = SourceFile(path.name, sum(array.nbytes for array in arrays.values()), 0, listing.hexdigest())

    def tensor(self, name: str, info: TensorInfo | None = None) -> Array:
        """The array, read-only."""
        view: Array = np.ascontiguousarray(self._arrays[name]).reshape(self._arrays[name].shape).view()
        view.flags.writeable = False
        return view

    def unchanged(self) -> bool:
        """Nothing on a disk can change it."""
        return True
