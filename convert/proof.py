"""Proof that two checkpoints hold the same weights: fingerprints, comparisons, and the verbs ``verify`` and ``fingerprint``.

A *leaf* is the XXH3-128 digest of a fixed block of the law's float32 values, ``LEAF_ROWS`` x ``LEAF_COLS`` of [out, in],
little-endian, -0.0 as +0.0. A matrix's digest is that of its leaves in row-major order; a model's *fingerprint* is that of its
tensors' names, shapes and digests, sorted by name. Names are the unfused Hugging Face ones, and a layer counts as its float
weight ``<name>.weight`` however it is spelled, so the same weights have the same fingerprint in every format, float included,
and for every number of workers. A bias that is all zeros counts as none (some tools add such biases).

Blocks are two-dimensional, rather than whole rows, so that formats stored along [in] can be read and digested in tiles. A tile
is a rectangle of whole leaves (``convert.tiling``); it is gone through in strips that stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import xxhash

from formats.ir import Array, QuantizedLinear, read
from formats.layouts import kernels
from formats.workspace import Workspace

from .matrices import BAND_ROWS, Matrix, Tile, counts_as_none, is_countable, leaves_of, scales_of
from .probe import to_float32

Agreement = Literal["equal", "rounded", "different"]
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How one tensor compares between two checkpoints.

    codes, zero_points   "equal" or "different"; "equal" too where a side is not quantized and only weights can be compared
    scales               "equal", "rounded" (equal after storing them in the other's dtype) or "different"
    bound                largest relative difference of scales (of weights where a side is not quantized)
    left, right          hex digests of the float32 weights
    """

    name: str
    codes: Agreement
    zero_points: Agreement
    scales: Agreement
    bound: float
    left: str
    right: str
    detail: str = ""

    @property
    def same(self) -> bool:
        return "different" not in (self.codes, self.zero_points, self.scales)


@dataclass
class Fingerprint:
    """Digests of a checkpoint's tensors by canonical name; the total covers names, shapes and digests."""

    tensors: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)

    def add(self, name: str, shape: tuple[int, ...], digest: str) -> None:
        if digest:
            self.tensors[name] = (shape, digest)

    @property
    def digest(self) -> str:
        """Total over everything, 32 hex digits."""
        return self._total(lambda name, shape: True)

    @property
    def weights(self) -> str:
        """Total over matrices that end in ``.weight``: linears and embeddings, quantized or not."""
        return self._total(_is_weight)

    @property
    def rest(self) -> str:
        """Total over everything else: norms, biases."""
        return self._total(lambda name, shape: not _is_weight(name, shape))

    def _total(self, wanted: Callable[[str, tuple[int, ...]], bool]) -> str:
        digest = xxhash.xxh3_128()
        for name in sorted(self.tensors):
            shape, leaf = self.tensors[name]
            if wanted(name, shape):
                digest.update(f"{name} {list(shape)} {leaf}\n".encode())
        return digest.hexdigest()


def _is_weight(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) > 1


class LeafGrid:
    """All leaves of one matrix, filled tile by tile."""

    def __init__(self, matrix: Matrix) -> None:
        (rows, cols), self._leaf = matrix.grid, matrix.leaf
        self._wide = -(-cols // self._leaf[1])
        self._leaves = np.zeros((-(-rows // self._leaf[0]), self._wide, 16), dtype=np.uint8)

    def put(self, rows: slice, cols: slice, leaves: bytes) -> None:
        """The leaves of a tile, row by row of leaves."""
        top, left = rows.start // self._leaf[0], cols.start // self._leaf[1]
        bottom, right = -(-rows.stop // self._leaf[0]), -(-cols.stop // self._leaf[1])
        self._leaves[top:bottom, left:right] = np.frombuffer(leaves, np.uint8).reshape(bottom - top, right - left, 16)

    def digest(self) -> str:
        """The matrix's digest."""
        return xxhash.xxh3_128_hexdigest(self._leaves.tobytes())


@dataclass(frozen=True, slots=True)
class Found:
    """What comparing one tile found: the leaves of both sides, and how they agree."""

    left: bytes
    right: bytes
    codes: Agreement = "equal"
    zero_points: Agreement = "equal"
    scales: Agreement = "equal"
    bound: float = 0.0
    detail: str = ""


def digest_tile(matrix: Matrix, rows: slice, cols: slice, work: Workspace) -> bytes:
    """The leaves of a tile; for what is no float, digests of its bytes."""
    if not matrix.is_float():
        return _digest_bytes(matrix, rows, work)
    tile = Tile(matrix, rows, cols, work)
    return b"".join(tile.leaves(strip) for strip in tile.strips())


def _digest_bytes(matrix: Matrix, rows: slice, work: Workspace) -> bytes:
    found, width = [], matrix.grid[1]
    items = max(1, (1 << 20) // matrix.itemsize)
    high = max(1, items // max(1, width))
    for top in range(rows.start, rows.stop, BAND_ROWS):
        digest, bottom = xxhash.xxh3_128(), min(top + BAND_ROWS, rows.stop)
        for row in range(top, bottom, high):
            for left in range(0, width, items):
                part = read(matrix.as_matrix(), slice(row, min(row + high, bottom)), slice(left, min(left + items, width)), work)
                digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
        found.append(digest.digest())
    return b"".join(found)


def compare_tile(left: Matrix, right: Matrix, rows: slice, cols: slice, works: tuple[Workspace, Workspace]) -> Found:
    """Compare one tile of two matrices of one shape, and digest both."""
    if not (left.is_float() and right.is_float()):
        ours, theirs = (_digest_bytes(matrix, rows, work) for matrix, work in zip((left, right), works, strict=True))
        return Found(ours, theirs) if ours == theirs else Found(ours, theirs, "equal", "equal", "different", 1.0, "the bytes differ")
    a, b = left.layer, right.layer
    tiles = Tile(left, rows, cols, works[0]), Tile(right, rows, cols, works[1])
    if a is None or b is None or not _are_countable(a, b):
        values = ValueProof(tiles[0])
        for strip in tiles[0].strips():
            values.add(strip, _in_own_dtype(left, tiles[0].values(strip)), _in_own_dtype(right, tiles[1].values(strip)))
        return values.found()
    proof = CodeProof(*tiles)
    for strip in tiles[0].strips():
        proof.add(strip, tiles[0].codes(strip), tiles[1].codes(strip))
    return proof.found()


def _are_countable(a: QuantizedLinear, b: QuantizedLinear) -> bool:
    """Whether two layers are the same weights if their codes, zero points and scales are."""
    alike = a.scheme.weights.element == b.scheme.weights.element and _same_smooth(a, b)
    return is_countable(a) and is_countable(b) and alike


def _same_smooth(a: QuantizedLinear, b: QuantizedLinear) -> bool:
    """Whether both scale their inputs alike."""
    if a.input_smooth is None or b.input_smooth is None:
        return a.input_smooth is b.input_smooth
    return np.array_equal(to_float32(a.input_smooth), to_float32(b.input_smooth))


class CodeProof:
    """Compares two sides of a tile by codes, zero points and scales, and digests both."""

    def __init__(self, left: Tile, right: Tile) -> None:
        self._sides = left, right
        a, b = left.matrix.layer, right.matrix.layer
        assert a is not None
        assert b is not None
        self._small: tuple[Agreement, Agreement, float, str] = "equal", "equal", 0.0, ""
        # Equal codes, scales and zero points give equal values, the law being a function of them: then one digest is both.
        if left.cols.start == 0:
            self._small = _compare_small(a, b, left.rows)
        if not _same_smooth(a, b):
            self._small = "equal", "different", 1.0, "the scale of the inputs differs"
        self._alike = _same_small(left, right) and _same_smooth(a, b)
        self._codes: Agreement = "equal"
        self._detail = self._small[3]
        self._leaves: tuple[list[bytes], list[bytes]] = [], []

    def add(self, strip: slice, ours: Array, theirs: Array) -> None:
        """Codes [strip, cols] of both sides, C-contiguous."""
        left, right = self._sides
        engine = kernels()
        same = engine.equal(ours, theirs) if engine is not None else np.array_equal(ours, theirs)
        if not same and self._codes == "equal":
            self._codes = "different"
            row, col = np.argwhere(ours != theirs)[0]
            at = f"[{strip.start + row}, {left.cols.start + col}]"
            self._detail = f"code {at} is {ours[row, col]} on the left and {theirs[row, col]} on the right"
        leaves = left.leaves(strip, ours)
        self._leaves[0].append(leaves)
        self._leaves[1].append(leaves if same and self._alike else right.leaves(strip, theirs))

    def found(self) -> Found:
        """The tile's verdict."""
        zero_points, scales, bound, _ = self._small
        return Found(b"".join(self._leaves[0]), b"".join(self._leaves[1]), self._codes, zero_points, scales, bound, self._detail)


class ValueProof:
    """Compares two sides of a tile by value, where a side is not integer codes, and digests both."""

    def __init__(self, tile: Tile) -> None:
        self._cols = tile.cols
        self._leaves: tuple[list[bytes], list[bytes]] = [], []
        self._agreement: Agreement = "equal"
        self._bound, self._detail = 0.0, ""

    def add(self, strip: slice, ours: Array, theirs: Array) -> None:
        """Values [strip, cols] of both sides, each in its own dtype."""
        part, error = compare_rounded(ours, theirs)
        wide = [np.asarray(to_float32(side) + np.float32(0)) for side in (ours, theirs)]
        self._bound = max(self._bound, error)
        if part == "different" and self._agreement != "different":
            row, col = np.argwhere(wide[0] != wide[1])[0]
            values = f"{wide[0][row, col]:.9g} on the left and {wide[1][row, col]:.9g} on the right"
            self._detail = f"weight [{strip.start + row}, {self._cols.start + col}] is {values}"
        self._agreement = part if part == "different" or self._agreement == "equal" else self._agreement
        left = leaves_of(wide[0])
        self._leaves[0].append(left)
        self._leaves[1].append(left if part == "equal" else leaves_of(wide[1]))

    def found(self) -> Found:
        """The tile's verdict."""
        left, right = (b"".join(leaves) for leaves in self._leaves)
        return Found(left, right, "equal", "equal", self._agreement, self._bound, self._detail)


def _same_small(left: Tile, right: Tile) -> bool:
    """Whether scales and zero points of a tile are the same for every column."""
    pairs = _distinct(np.stack([left.group, right.group]))
    if not np.array_equal(_columns(left.scales, pairs[0]), _columns(right.scales, pairs[1])):
        return False
    if left.zeros is None or right.zeros is None:
        return left.zeros is right.zeros
    return np.array_equal(_columns(left.zeros, pairs[0]), _columns(right.zeros, pairs[1]))


def _compare_small(a: QuantizedLinear, b: QuantizedLinear, rows: slice) -> tuple[Agreement, Agreement, float, str]:
    """Zero points and scales of a band, on the common refinement of both sides' groups."""
    pairs = _distinct(np.stack([a.group_of(), b.group_of()]))
    zero_points: Agreement = "equal"
    detail = ""
    if a.zero_points is not None or b.zero_points is not None:
        ours, theirs = (_zeros(layer, rows, pairs[side]) for side, layer in enumerate((a, b)))
        differ = ours != theirs
        if differ.any():  # under a scale of 0 all weights are 0, and formats that multiply zero points by it lose them
            differ &= (to_float32(_columns(scales_of(a, rows), pairs[0])) != 0) | (to_float32(_columns(scales_of(b, rows), pairs[1])) != 0)
        if differ.any():
            zero_points = "different"
            row, group = np.argwhere(differ)[0]
            found = f"{ours[row, group]} on the left and {theirs[row, group]} on the right"
            detail = f"the zero point of output {rows.start + row}, group {pairs[0][group]}, is {found}"
    ours, theirs = (_columns(scales_of(layer, rows), pairs[side]) for side, layer in enumerate((a, b)))
    scales, bound = compare_rounded(ours, theirs)
    if scales == "different" and not detail:
        wide = to_float32(ours), to_float32(theirs)
        row, group = np.argwhere(wide[0] != wide[1])[0]
        found = f"{wide[0][row, group]:.9g} on the left and {wide[1][row, group]:.9g} on the right"
        detail = f"the scale of output {rows.start + row}, group {pairs[0][group]}, is {found}: more than rounding"
    return zero_points, scales, bound, detail


def _zeros(layer: QuantizedLinear, rows: slice, groups: Array) -> Array:
    if layer.zero_points is None:
        return np.zeros((len(range(*rows.indices(layer.shape[0]))), len(groups)), dtype=np.int16)
    return _columns(layer.grid("zero_points", rows), groups)


def _columns(grid: Array, groups: Array) -> Array:
    """``grid[:, groups]``, without a copy where that is all of it in order."""
    return grid if np.array_equal(groups, np.arange(grid.shape[1])) else grid[:, groups]


def compare_rounded(left: Array, right: Array) -> tuple[Agreement, float]:
    """Whether two float arrays are equal, equal after rounding one to the other's dtype, or different; largest relative difference."""
    equal, bound, narrows = True, 0.0, [True, True]
    sides = left.reshape(-1), right.reshape(-1)
    for start in range(0, sides[0].size, 1 << 16):
        a, b = (side[start : start + (1 << 16)] for side in sides)
        ours, theirs = to_float32(a), to_float32(b)
        if np.array_equal(ours, theirs):
            continue
        equal = False
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            narrows[0] &= np.array_equal(to_float32(ours.astype(right.dtype)), theirs)
            narrows[1] &= np.array_equal(to_float32(theirs.astype(left.dtype)), ours)
            size = np.maximum(np.abs(ours), np.abs(theirs))
            bound = max(bound, float((np.abs(ours - theirs) / np.where(size > 0, size, 1)).max(initial=0)))
    return ("equal" if equal else "rounded" if any(narrows) else "different"), bound


def _distinct(pairs: Array) -> Array:
    """The distinct columns of ``pairs`` [2, n], integers from 0. (``np.unique`` by axis would load numpy.ma.)"""
    count = int(pairs[1].max()) + 1
    keys = np.sort(pairs[0].astype(np.int64) * count + pairs[1])
    keys = keys[np.append(True, np.diff(keys) != 0)]
    return np.stack([keys // count, keys % count])


def _in_own_dtype(matrix: Matrix, values: Array) -> Array:
    return values if matrix.plain is None else values.astype(matrix.plain.dtype)


def join(left: Matrix, right: Matrix, found: list[tuple[slice, slice, Found]]) -> Comparison:
    """One tensor's comparison from its tiles'. A bias that is all zeros has no digest."""
    sides = LeafGrid(left), LeafGrid(right)
    for rows, cols, tile in found:
        sides[0].put(rows, cols, tile.left)
        sides[1].put(rows, cols, tile.right)

    def worst(agreements: list[Agreement]) -> Agreement:
        order: tuple[Agreement, ...] = ("different", "rounded")
        return next((agreement for agreement in order if agreement in agreements), "equal")

    tiles = [tile for _, _, tile in found]
    return Comparison(
        left.name,
        worst([tile.codes for tile in tiles]),
        worst([tile.zero_points for tile in tiles]),
        worst([tile.scales for tile in tiles]),
        max((tile.bound for tile in tiles), default=0.0),
        "" if counts_as_none(left) else sides[0].digest(),
        "" if counts_as_none(right) else sides[1].digest(),
        next((tile.detail for tile in tiles if tile.detail), ""),
    )
