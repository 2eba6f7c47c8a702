"""Proof that two checkpoints hold the same weights: fingerprints, comparisons, and the verbs ``verify`` and ``fingerprint``.

A *leaf* is the XXH3-128 digest of a fixed block of the law's float32 values, ``LEAF_ROWS`` x ``LEAF_COLS`` of [out, in],
little-endian, -0.0 as +0.0. A matrix's digest is that of its leaves in row-major order; a model's *fingerprint* is that of its
tensors' names, shapes and digests, sorted by name. Names are the unfused Hugging Face ones, and a layer counts as its float
weight ``<name>.weight`` however it is spelled, so the same weights have the same fingerprint in every format, float included,
and for every number of workers. A bias that is all zeros counts as none (some tools add such biases).

Blocks are two-dimensional, rather than whole rows, so that formats stored along [in] can be read and digested in tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import xxhash

from formats import Checkpoint
from formats.ir import Array, QuantizedLinear, dequantize, scale_grid
from formats.layouts import PackedMatrix, kernels
from formats.safetensors_file import DTYPES

from .probe import check_codes, to_float32

LEAF_ROWS = 64
LEAF_COLS = 1024
BAND_ROWS = 1024

Agreement = Literal["equal", "rounded", "different"]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Matrix:
    """One tensor of a model as the proof sees it: [rows, cols] of float32 values, quantized or plain.

    name     canonical tensor name; shape: as stored (plain) or [out, in]; stored: names whose pages to give back
    """

    name: str
    shape: tuple[int, ...]
    layer: QuantizedLinear | None
    plain: Array | None
    stored: tuple[str, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the 2-D view."""
        if len(self.shape) == 0:
            return 1, 1
        cols = self.shape[-1]
        return (int(np.prod(self.shape)) // cols if cols else 0), cols

    @property
    def dtype(self) -> str:
        return "law" if self.plain is None else str(self.plain.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that reading it takes, about: for progress."""
        if self.plain is not None:
            return int(self.plain.nbytes)
        assert self.layer is not None
        return self.shape[0] * self.shape[1] * self.layer.scheme.weights.bits // 8

    def is_float(self) -> bool:
        return self.plain is None or self.plain.dtype in {DTYPES["F16"], DTYPES["BF16"], DTYPES["F32"]}

    def band(self, rows: slice) -> BandValues:
        """A reader of float32 values in these rows."""
        return BandValues(self, rows)


class BandValues:
    """Reads float32 values of one band, -0.0 as +0.0, C-contiguous; what the band's tiles share is made once."""

    def __init__(self, matrix: Matrix, rows: slice) -> None:
        self._matrix, self._rows = matrix, rows
        layer = matrix.layer
        self._engine = None
        if (
            layer is not None
            and layer.scheme.weights.element == "int"
            and layer.scheme.weights.strategy != "block"
            and layer.input_smooth is None
        ):
            self._engine = kernels()
        if self._engine is not None and layer is not None:
            scales = to_float32(layer.grid("scales", rows)) if layer.outer is None else scale_grid(layer, rows)
            self._scales = np.ascontiguousarray(scales)
            zeros = None if layer.zero_points is None else layer.grid("zero_points", rows)
            self._zeros = None if zeros is None or not zeros.any() else np.ascontiguousarray(zeros, dtype=np.float32)

    def read(self, cols: slice, codes: Array | None = None) -> Array:
        """Values [rows, cols]. codes: the layer's, if they were read already."""
        matrix, rows = self._matrix, self._rows
        if matrix.plain is not None:
            return np.ascontiguousarray(to_float32(matrix.plain.reshape(matrix.grid)[rows, cols]) + np.float32(0))
        assert matrix.layer is not None
        if self._engine is None:
            if codes is None and matrix.layer.scheme.weights.element == "int":
                read_codes(matrix.layer, rows, cols)
            return np.ascontiguousarray(dequantize(matrix.layer, rows, cols) + np.float32(0))
        codes = read_codes(matrix.layer, rows, cols) if codes is None else codes
        weights = np.empty(codes.shape, dtype=np.float32)
        self._engine.dequantize(codes, self._scales, self._zeros, matrix.layer.group_of()[cols], weights)
        return weights


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


def read_codes(layer: QuantizedLinear, rows: slice, cols: slice) -> Array:
    """Codes of a rectangle, checked against the layer's bits where their container is wider."""
    source = layer.codes
    codes = source[rows, cols] if isinstance(source, np.ndarray) else source.read(rows, cols)
    bits = layer.scheme.weights.bits
    if bits < 8 and codes.size and not (isinstance(source, PackedMatrix) and source.layout.bits == bits):
        engine = kernels()
        check_codes(layer, *(engine.code_range(codes) if engine is not None else (int(codes.min()), int(codes.max()))))
    return codes


def layer_matrices(checkpoint: Checkpoint, name: str) -> list[Matrix]:
    """A quantized layer as the proof sees it: its float weight, and its bias apart."""
    layer = checkpoint.layer(name)
    result = [Matrix(f"{name}.weight", layer.shape, layer, None, checkpoint.layer_tensors(name))]
    if layer.bias is not None:
        result.append(Matrix(f"{name}.bias", layer.bias.shape, None, layer.bias, ()))
    return result


def plain_matrix(checkpoint: Checkpoint, name: str) -> Matrix:
    """A plain tensor as the proof sees it."""
    plain = checkpoint.plain(name)
    return Matrix(name, plain.shape, None, plain.data, (name,))


def matrices(checkpoint: Checkpoint) -> dict[str, Matrix]:
    """Every tensor of the model by canonical name: layers as their float weight, their biases apart, plain tensors."""
    result: dict[str, Matrix] = {}
    for kind, name in checkpoint.entries:
        found = layer_matrices(checkpoint, name) if kind == "layer" else [plain_matrix(checkpoint, name)]
        result.update((matrix.name, matrix) for matrix in found)
    return result


def bands(matrix: Matrix) -> Iterator[slice]:
    """Row bands in which a matrix is digested and compared: whole leaves, independent of one another."""
    rows, _ = matrix.grid
    for start in range(0, rows, BAND_ROWS):
        yield slice(start, min(start + BAND_ROWS, rows))


class Leaves:
    """Collects a band's leaves from its tiles, which come in column order, ``LEAF_COLS`` wide."""

    def __init__(self, rows: slice) -> None:
        self._leaves: list[list[bytes]] = [[] for _ in range(-(-(rows.stop - rows.start) // LEAF_ROWS))]

    def add(self, values: Array) -> None:
        """Digest float32 values [rows of the band, cols of the tile], C-contiguous."""
        for number, leaves in enumerate(self._leaves):
            leaves.append(xxhash.xxh3_128_digest(values[number * LEAF_ROWS : (number + 1) * LEAF_ROWS].reshape(-1)))

    def joined(self) -> bytes:
        """All leaves in row-major order."""
        return b"".join(leaf for leaves in self._leaves for leaf in leaves)


def tiles(matrix: Matrix) -> Iterator[slice]:
    """Column cuts of a band."""
    width = matrix.grid[1]
    for start in range(0, width, LEAF_COLS):
        yield slice(start, min(start + LEAF_COLS, width))


def digest_band(matrix: Matrix, rows: slice) -> bytes:
    """The leaves of a band, concatenated in row-major order of leaves; for what is no float, one digest of its bytes."""
    if not matrix.is_float():
        assert matrix.plain is not None
        raw = np.ascontiguousarray(matrix.plain.reshape(matrix.grid)[rows])
        return xxhash.xxh3_128_digest(raw.view(np.uint8).reshape(-1))
    leaves, band = Leaves(rows), matrix.band(rows)
    for cols in tiles(matrix):
        leaves.add(band.read(cols))
    return leaves.joined()


def is_zero_bias(matrix: Matrix) -> bool:
    """Whether this is a bias that is all zeros, which counts as none."""
    return matrix.name.endswith(".bias") and matrix.plain is not None and not matrix.plain.any()


def fold(matrix: Matrix, leaves: list[bytes]) -> str:
    """A matrix's digest from its bands' leaves; "" for a bias that is all zeros."""
    if is_zero_bias(matrix):
        return ""
    digest = xxhash.xxh3_128()
    for part in leaves:
        digest.update(part)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Band:
    """What comparing one band found."""

    left: bytes
    right: bytes
    codes: Agreement
    zero_points: Agreement
    scales: Agreement
    bound: float
    detail: str = ""


def compare_band(left: Matrix, right: Matrix, rows: slice) -> Band:
    """Compare one band of two matrices of one shape, and digest both."""
    a, b = left.layer, right.layer
    if a is None or b is None or not (_countable(a) and _countable(b)):
        return _compare_values(left, right, rows)
    zero_points, scales, bound, detail = _compare_small(a, b, rows)
    codes: Agreement = "equal"
    # Equal codes, scales and zero points give equal values, the law being a function of them: then one digest is both.
    differ = not (scales == "equal" and zero_points == "equal")
    engine = kernels()
    ours_leaves, theirs_leaves = Leaves(rows), Leaves(rows)
    ours_band, theirs_band = left.band(rows), right.band(rows)
    for cols in tiles(left):
        ours, theirs = read_codes(a, rows, cols), read_codes(b, rows, cols)
        same = engine.equal(ours, theirs) if engine is not None else np.array_equal(ours, theirs)
        if not same and codes == "equal":
            codes = "different"
            row, col = np.argwhere(ours != theirs)[0]
            at = f"[{rows.start + row}, {cols.start + col}]"
            detail = f"code {at} is {ours[row, col]} on the left and {theirs[row, col]} on the right"
        ours_leaves.add(ours_band.read(cols, ours))
        if differ:
            theirs_leaves.add(theirs_band.read(cols, theirs))
    digest = ours_leaves.joined()
    if differ:
        return Band(digest, theirs_leaves.joined(), codes, zero_points, scales, bound, detail)
    other = digest if codes == "equal" else digest_band(right, rows)
    return Band(digest, other, codes, zero_points, scales, bound, detail)


def _countable(layer: QuantizedLinear) -> bool:
    """Whether codes, zero points and scales alone are the layer's weights."""
    plain = layer.outer is None and layer.input_smooth is None
    return layer.scheme.weights.element == "int" and layer.scheme.weights.strategy != "block" and plain


def _compare_small(a: QuantizedLinear, b: QuantizedLinear, rows: slice) -> tuple[Agreement, Agreement, float, str]:
    """Zero points and scales of a band, on the common refinement of both sides' groups."""
    groups = np.stack([a.group_of(), b.group_of()])
    pairs = groups[:, np.append(True, (np.diff(groups) != 0).any(axis=0))]
    zero_points: Agreement = "equal"
    detail = ""
    if a.zero_points is not None or b.zero_points is not None:
        ours, theirs = (_zeros(layer, rows, pairs[side]) for side, layer in enumerate((a, b)))
        differ = ours != theirs
        if differ.any():  # under a scale of 0 all weights are 0, and formats that multiply zero points by it lose them
            differ &= (to_float32(_columns(a.grid("scales", rows), pairs[0])) != 0) | (
                to_float32(_columns(b.grid("scales", rows), pairs[1])) != 0
            )
        if differ.any():
            zero_points = "different"
            row, group = np.argwhere(differ)[0]
            found = f"{ours[row, group]} on the left and {theirs[row, group]} on the right"
            detail = f"the zero point of output {rows.start + row}, group {pairs[0][group]}, is {found}"
    ours, theirs = (_columns(layer.grid("scales", rows), pairs[side]) for side, layer in enumerate((a, b)))
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
    ours, theirs = to_float32(left), to_float32(right)
    if np.array_equal(ours, theirs):
        return "equal", 0.0
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        narrowed = to_float32(ours.astype(right.dtype)), to_float32(theirs.astype(left.dtype))
        rounded = np.array_equal(narrowed[0], theirs) or np.array_equal(narrowed[1], ours)
        size = np.maximum(np.abs(ours), np.abs(theirs))
        bound = float((np.abs(ours - theirs) / np.where(size > 0, size, 1)).max(initial=0))
    return ("rounded" if rounded else "different"), bound


def _compare_values(left: Matrix, right: Matrix, rows: slice) -> Band:
    """Compare by float32 value where a side is not integer codes."""
    digests = digest_band(left, rows), digest_band(right, rows)
    if digests[0] == digests[1]:
        return Band(*digests, "equal", "equal", "equal", 0.0)
    if not (left.is_float() and right.is_float()):
        return Band(*digests, "equal", "equal", "different", 1.0, "the bytes differ")
    bound, agreement, detail = 0.0, "equal", ""
    readers = left.band(rows), right.band(rows)
    for cols in tiles(left):
        ours, theirs = (_in_own_dtype(matrix, reader.read(cols)) for matrix, reader in zip((left, right), readers, strict=True))
        part, error = compare_rounded(ours, theirs)
        bound = max(bound, error)
        if part == "different" and agreement != "different":
            wide = to_float32(ours), to_float32(theirs)
            row, col = np.argwhere(wide[0] != wide[1])[0]
            values = f"{wide[0][row, col]:.9g} on the left and {wide[1][row, col]:.9g} on the right"
            detail = f"weight [{rows.start + row}, {cols.start + col}] is {values}"
        agreement = part if part == "different" or agreement == "equal" else agreement
    return Band(*digests, "equal", "equal", agreement, bound, detail)  # type: ignore[arg-type]


def _in_own_dtype(matrix: Matrix, values: Array) -> Array:
    return values if matrix.plain is None else values.astype(matrix.plain.dtype)


def join(left: Matrix, right: Matrix, found: list[Band]) -> Comparison:
    """One tensor's comparison from its bands'."""

    def worst(agreements: list[Agreement]) -> Agreement:
        order: tuple[Agreement, ...] = ("different", "rounded")
        return next((agreement for agreement in order if agreement in agreements), "equal")

    return Comparison(
        left.name,
        worst([band.codes for band in found]),
        worst([band.zero_points for band in found]),
        worst([band.scales for band in found]),
        max((band.bound for band in found), default=0.0),
        fold(left, [band.left for band in found]),
        fold(right, [band.right for band in found]),
        next((band.detail for band in found if band.detail), ""),
    )
