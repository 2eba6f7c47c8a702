"""A tensor as it lies in a file: read in rectangles, when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import Readable
from .regions import Array
from .workspace import Workspace, empty

if TYPE_CHECKING:
    from .ir import ArrayLike


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A row-major tensor in a file (``LazyArray``); only ``read`` and ``np.asarray`` touch its data.

    shape    of what is seen; begin: byte of its first element in the file
    stride   elements from one stored row to the next
    turned   rows and columns are exchanged: what is seen is [stored columns, stored rows]
    """

    file: Readable
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    stride: int
    turned: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> StoredTensor:  # noqa: N802
        """The transposed matrix."""
        return replace(self, shape=self.shape[::-1], turned=not self.turned)

    def corner(self, rows: int, cols: int) -> StoredTensor:
        """The first ``rows`` and ``cols`` of a matrix."""
        return replace(self, shape=(min(rows, self.shape[0]), min(cols, self.shape[1])))

    def as_matrix(self) -> StoredTensor:
        """[all leading axes, last axis]; a scalar is [1, 1] and a vector [1, n]."""
        if self.ndim == 2:
            return self
        cols = self.shape[-1] if self.shape else 1
        return replace(self, shape=(math.prod(self.shape[:-1]), cols), stride=cols)

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        """``[rows, cols]`` as a new array, or one of ``work``; of a vector its ``rows``, of other ranks all."""
        if self.turned:
            return self._read(cols, rows, self.shape[::-1], work).T
        if self.ndim == 2:
            return self._read(rows, cols, self.shape, work)
        if self.ndim == 1:
            return self._read(slice(0, 1), rows, (1, self.shape[0]), work).reshape(-1)
        return self._read(slice(None), slice(None), (1, self.size), work).reshape(self.shape)

    def _read(self, rows: slice, cols: slice, shape: tuple[int, ...], work: Workspace | None) -> Array:
        (top, bottom, row_step), (left, right, col_step) = rows.indices(shape[0]), cols.indices(shape[1])
        if row_step != 1 or col_step != 1:
            raise ValueError(f"{self.name}: a stored tensor is read in rectangles, not in steps")
        found = empty(work, "stored", (max(bottom - top, 0), max(right - left, 0)), self.dtype)
        if not found.size:
            return found
        item = self.dtype.itemsize
        begin, flat = self.begin + (top * self.stride + left) * item, memoryview(found.reshape(-1).view(np.uint8))
        with self.file.reading() as read:
            if found.shape[1] == self.stride or found.shape[0] == 1:
                read(flat, begin)
            else:
                width, step = found.shape[1] * item, self.stride * item
                for row in range(found.shape[0]):
                    read(flat[row * width : (row + 1) * width], begin + row * step)
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = self.read()
        return whole if dtype is None else whole.astype(dtype)


def raw_chunks(
    tensor: ArrayLike, size: int, begin: int = 0, end: int | None = None, work: Workspace | None = None
) -> Iterator[tuple[int, Array]]:
    """The bytes of a tensor that is not turned, in order: (offset in the tensor, uint8 array of at most ``size``).

    begin, end   of the bytes that are wanted; all by default
    work         may hold a chunk, until the next one
    """
    if not isinstance(tensor, StoredTensor):
        data = np.ascontiguousarray(np.asarray(tensor)).reshape(-1).view(np.uint8)[:end]
        for start in range(begin, data.size, size):
            yield start, data[start : start + size]
        return
    end = tensor.nbytes if end is None else end
    for start in range(begin, end, size):
        chunk = empty(work, "raw", (min(size, end - start),), np.uint8)
        tensor.file.read_into(chunk, tensor.begin + start)
        yield start, chunk
