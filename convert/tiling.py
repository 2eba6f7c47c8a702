"""How a matrix is cut into tiles: rectangles of whole leaves, so wide and so high that files are read and written in long pieces.

A format that stores a matrix by output is read well in whole rows, one that stores it by input in whole columns. A tile that goes
from one to the other must be wide for the one and high for the other, and is held in memory packed: that is what the budget
bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from formats.ir import ArrayLike, QuantizedLinear
from formats.layouts import Layout, PackedMatrix

from .matrices import LEAF_COLS, LEAF_ROWS, STRIP, Matrix

PIECE = 4096
"""Bytes of a file that are worth a system call."""

WIDEST = 20480
"""Columns of a tile of what both sides store in whole rows."""

MOST = 1 << 25
"""Codes of a tile: what a crash costs at most."""


@dataclass(frozen=True, slots=True)
class Side:
    """How one side stores a matrix: bytes of a stored row per output (``by_input``) or per input, and bytes held per code."""

    by_input: bool
    per_step: float
    held: float

    @classmethod
    def of_layout(cls, layout: Layout, shape: tuple[int, int], held: bool) -> Side:
        """A side of packed codes; held: whether all words of a tile are in memory at once."""
        rows, words = layout.stored_shape(shape)
        row = words * layout.word_dtype.itemsize
        by_input = bool(layout.transposed)
        return cls(by_input, row / shape[0 if by_input else 1], rows * row / (shape[0] * shape[1]) if held else 0.0)

    @classmethod
    def of_codes(cls, codes: ArrayLike, shape: tuple[int, int]) -> Side:
        """A side to read from."""
        if isinstance(codes, PackedMatrix) and codes.width is None:
            return cls.of_layout(codes.layout, shape, bool(codes.layout.transposed))
        return cls(False, 1.0, 0.0)


def side_of(matrix: Matrix) -> Side:
    """How a matrix is read."""
    if matrix.layer is not None:
        return Side.of_codes(matrix.layer.codes, matrix.layer.shape)
    return Side(False, float(matrix.itemsize), matrix.itemsize + 8.0)


def tile_shape(grid: tuple[int, int], sides: Sequence[Side], budget: int, scales: float = 0.0) -> tuple[int, int]:
    """(rows, cols) of the tiles of a matrix [rows, cols]; multiples of a leaf, but for the whole of an axis.

    budget   bytes that a tile may hold; scales: bytes of scales and zero points held per code
    """
    if not (grid[0] and grid[1]):
        return 1, 1
    (rows, cols), held = grid, max(sum(side.held for side in sides) + scales, 0.25)
    area = max(LEAF_ROWS * LEAF_COLS, min(MOST, int(budget / held)))
    high = min(rows, max([LEAF_ROWS] + [PIECE / side.per_step for side in sides if side.by_input]))
    wide = min(cols, max([LEAF_COLS] + [PIECE / side.per_step for side in sides if not side.by_input]))
    while high * wide > area and (high > LEAF_ROWS or wide > LEAF_COLS):
        high, wide = max(LEAF_ROWS, high / 2), max(LEAF_COLS, wide / 2)
    if all(side.by_input for side in sides):
        high = max(high, area / wide)
        wide = max(wide, area / min(high, rows))
    else:
        wide = max(wide, area / min(high, rows))
        high = max(high, area / min(wide, cols))
    # A strip has at least the height of a leaf, and should fit a cache; codes in whole rows on both sides are worth more than that.
    whole = all(not side.by_input and side.per_step <= 1 for side in sides)
    wide = min(wide, WIDEST if whole else STRIP // LEAF_ROWS)
    return _even(rows, max(high, min(rows, area / wide)), LEAF_ROWS), _even(cols, wide, LEAF_COLS)


def _even(length: int, step: float, unit: int) -> int:
    """The step in multiples of ``unit`` that cuts ``length`` into pieces of about equal size, none above ``step``."""
    if length <= step:
        return max(length, 1)
    pieces = -(-length // max(unit, int(step) // unit * unit))
    return -(-length // (pieces * unit)) * unit


def tiles(grid: tuple[int, int], shape: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """The tiles of a matrix, top to bottom, then left to right."""
    for top in range(0, grid[0], shape[0]):
        for left in range(0, grid[1], shape[1]):
            yield slice(top, min(top + shape[0], grid[0])), slice(left, min(left + shape[1], grid[1]))


def tiles_of(matrices: Sequence[Matrix], budget: int) -> Iterator[tuple[slice, slice]]:
    """The tiles in which matrices of one shape are gone through together."""
    first = matrices[0]
    if not all(matrix.is_float() for matrix in matrices):
        return tiles(first.grid, (max(matrix.leaf[0] for matrix in matrices), max(1, first.grid[1])))
    sides = [side_of(matrix) for matrix in matrices]
    return tiles(first.grid, tile_shape(first.grid, sides, budget, sum(bytes_of_scales(matrix.layer) for matrix in matrices)))


def bytes_of_scales(layer: QuantizedLinear | None) -> float:
    """Bytes per code that a tile holds for a side's scales and zero points: float32 of each, and what they are made from."""
    return 0.0 if layer is None else 16 * layer.groups[0] * layer.groups[1] / (layer.shape[0] * layer.shape[1])
