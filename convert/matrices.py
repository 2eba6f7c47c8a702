"""The tensors of a model as the proof sees them: matrices of float32 values, quantized or plain, read and digested in tiles.

A quantized layer counts as its float weight ``<name>.weight``; beside it stand its bias, and the scale and zero point of its
inputs where the file holds them. What leaves and fingerprints are: ``convert.proof``. A tile is a rectangle of whole leaves
(``convert.tiling``); it is gone through in strips that stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from formats import Checkpoint
from formats.checkpoint import Entry
from formats.ir import Array, ArrayLike, QuantizedLinear, dequantize, read, scale_grid, value_table
from formats.layouts import PackedMatrix, code_range, kernels
from formats.safetensors_file import DTYPES
from formats.stored_tensor import StoredTensor
from formats.workspace import Workspace

from .probe import check_codes, to_float32

LEAF_ROWS = 64
LEAF_COLS = 1024
BAND_ROWS = 1024
"""Rows of a leaf of what is no float, which is digested by its bytes, in whole rows."""

STRIP = 1 << 19
"""Codes of a strip, about: with their words and values they fit a core's second-level cache."""

_FLOATS = frozenset(DTYPES[name] for name in ("F16", "BF16", "F32"))


@dataclass(frozen=True)
class Matrix:
    """One tensor of a model as the proof sees it: [rows, cols] of float32 values, quantized or plain.

    name     canonical tensor name; shape: as stored (plain) or [out, in]; nbytes: what reading it takes, about, for progress
    """

    name: str
    shape: tuple[int, ...]
    layer: QuantizedLinear | None
    plain: ArrayLike | None
    nbytes: int

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the 2-D view."""
        if len(self.shape) == 0:
            return 1, 1
        cols = self.shape[-1]
        return (int(np.prod(self.shape)) // cols if cols else 0), cols

    @property
    def leaf(self) -> tuple[int, int]:
        """(rows, cols) of a leaf."""
        return (LEAF_ROWS, LEAF_COLS) if self.is_float() else (BAND_ROWS, max(1, self.grid[1]))

    def is_float(self) -> bool:
        return self.plain is None or np.dtype(self.plain.dtype) in _FLOATS

    @property
    def itemsize(self) -> int:
        """Bytes of an element of a plain tensor."""
        assert self.plain is not None
        return np.dtype(self.plain.dtype).itemsize

    def as_matrix(self) -> ArrayLike:
        """A plain tensor's 2-D view."""
        assert self.plain is not None
        return self.plain.as_matrix() if isinstance(self.plain, StoredTensor) else np.asarray(self.plain).reshape(self.grid)


class Tile:
    """One side of a rectangle of a matrix: reads its codes and its float32 values, strip by strip."""

    def __init__(self, matrix: Matrix, rows: slice, cols: slice, work: Workspace) -> None:
        self.matrix, self.rows, self.cols, self.work = matrix, rows, cols, work
        layer = matrix.layer
        self._codes: ArrayLike | None = None
        self._engine = kernels() if layer is not None and is_countable(layer) and layer.input_smooth is None else None
        if layer is not None and is_countable(layer):
            self._read_small(layer)

    def _read_small(self, layer: QuantizedLinear) -> None:
        """Scales and zero points of the tile's groups, and its columns as runs of one group; values of bit patterns."""
        element = layer.scheme.weights.element
        self._table = None if element == "int" else np.resize(value_table(element), 256)
        group = layer.group_of()[self.cols]
        first, last = int(group.min()), int(group.max()) + 1
        self.group = group - first
        self.scales = np.ascontiguousarray(to_float32(scales_of(layer, self.rows)[:, first:last]))
        zeros = None if layer.zero_points is None else layer.grid("zero_points", self.rows)[:, first:last]
        self.zeros = None if zeros is None or not zeros.any() else np.ascontiguousarray(zeros, dtype=np.float32)
        if self._engine is not None:
            border = np.arange(len(group)) % LEAF_COLS == 0
            starts = np.flatnonzero(border | (np.diff(group, prepend=-1) != 0)).astype(np.int64)
            self._runs = self._engine.Runs(starts, np.append(starts[1:], len(group)), self.group[starts].astype(np.int64))

    def strips(self) -> Iterator[slice]:
        """The tile's rows in strips of whole leaves."""
        width = max(1, self.cols.stop - self.cols.start)
        height = max(1, STRIP // width // LEAF_ROWS) * LEAF_ROWS
        for start in range(self.rows.start, self.rows.stop, height):
            yield slice(start, min(start + height, self.rows.stop))

    def words(self) -> Array:
        """The tile's words, as they are stored in a packed layout."""
        assert self.matrix.layer is not None
        if self._codes is None:
            self._codes = _fetch(self.matrix.layer.codes, self.rows, self.cols, self.work)
        if isinstance(self._codes, PackedMatrix):
            return np.asarray(self._codes.stored)
        assert isinstance(self.matrix.layer.codes, PackedMatrix)
        return _words(self.matrix.layer.codes, self.rows, self.cols, self.work)

    def codes(self, strip: slice) -> Array:
        """Codes [strip, cols], C-contiguous, checked against the layer's bits where their container is wider."""
        assert self.matrix.layer is not None
        if self._codes is None:
            self._codes = _fetch(self.matrix.layer.codes, self.rows, self.cols, self.work)
        codes = read_codes(self.matrix.layer, self._codes, slice(strip.start - self.rows.start, strip.stop - self.rows.start), self.work)
        return codes if codes.flags.c_contiguous else np.ascontiguousarray(codes)

    def values(self, strip: slice, codes: Array | None = None) -> Array:
        """Values [strip, cols], float32, C-contiguous, -0.0 as +0.0. codes: the layer's, if they were read already."""
        layer, zero = self.matrix.layer, np.float32(0)
        if layer is None:
            return np.ascontiguousarray(to_float32(read(self.matrix.as_matrix(), strip, self.cols, self.work)) + zero)
        if self._engine is None:
            codes = self.codes(strip) if codes is None else codes
            return np.ascontiguousarray(dequantize(layer, strip, self.cols, codes) + zero)
        return self._dequantized(strip, self.codes(strip) if codes is None else codes, max(1, self.cols.stop - self.cols.start))

    def leaves(self, strip: slice, codes: Array | None = None) -> bytes:
        """Digests of the strip's leaves, row by row of leaves. codes: the layer's, if they were read already."""
        found = []
        if self._engine is not None:
            codes = self.codes(strip) if codes is None else codes
            for top in range(strip.start, strip.stop, LEAF_ROWS):
                rows = slice(top, min(top + LEAF_ROWS, strip.stop))
                part = codes[top - strip.start : rows.stop - strip.start]
                flat, height = self._dequantized(rows, part, LEAF_COLS).reshape(-1), part.shape[0]
                ends = range(LEAF_COLS * height, flat.size + LEAF_COLS * height, LEAF_COLS * height)
                found += [xxhash.xxh3_128_digest(flat[end - LEAF_COLS * height : end]) for end in ends]
            return b"".join(found)
        return leaves_of(self.values(strip, codes))

    def _dequantized(self, rows: slice, codes: Array, leaf_cols: int) -> Array:
        """The law's values of whole rows of the tile, leaf after leaf."""
        here = slice(rows.start - self.rows.start, rows.stop - self.rows.start)
        weights = self.work.take("values", (codes.size,), np.float32)
        assert self._engine is not None
        if self._table is not None:
            self._engine.look_up_leaves(codes, self._table, self.scales[here], self._runs, leaf_cols, weights)
        else:
            zeros = None if self.zeros is None else self.zeros[here]
            self._engine.dequantize_leaves(codes, self.scales[here], zeros, self._runs, leaf_cols, weights)
        return weights.reshape(codes.shape)


def leaves_of(values: Array) -> bytes:
    """Digests of the leaves of float32 ``values`` [rows, cols], row by row of leaves."""
    found = []
    for top in range(0, values.shape[0], LEAF_ROWS):
        for left in range(0, values.shape[1], LEAF_COLS):
            leaf = np.ascontiguousarray(values[top : top + LEAF_ROWS, left : left + LEAF_COLS])
            found.append(xxhash.xxh3_128_digest(leaf.reshape(-1)))
    return b"".join(found)


def _fetch(codes: ArrayLike, rows: slice, cols: slice, work: Workspace) -> ArrayLike:
    """The rectangle as an array of its own whose strips are cheap to read.

    What a file stores by input would be read in snippets, strip by strip: its words are read at once.
    """
    if isinstance(codes, PackedMatrix) and codes.width is None:
        if not codes.layout.transposed:
            return _Rectangle(codes, rows, cols)
        return PackedMatrix(codes.layout, _words(codes, rows, cols, work), codes.dtype_name)
    return _Rectangle(codes, rows, cols)


def _words(codes: PackedMatrix, rows: slice, cols: slice, work: Workspace) -> Array:
    """The stored rectangle of a canonical one."""
    (top, left), (bottom, right) = codes.layout.corner(rows.start, cols.start), codes.layout.corner(rows.stop, cols.stop)
    return read(codes.stored, slice(top, bottom), slice(left, right), _Named(work, "words"))


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """A rectangle of a lazy matrix."""

    whole: ArrayLike
    rows: slice
    cols: slice

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.stop - self.rows.start, self.cols.stop - self.cols.start

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.whole.dtype)

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        start, stop, _ = rows.indices(self.shape[0])
        return read(self.whole, slice(self.rows.start + start, self.rows.start + stop), self.cols, work)[:, cols]


class _Named(Workspace):
    """A workspace whose arrays are another's under one name, so that they outlast what is read later."""

    def __init__(self, work: Workspace, name: str) -> None:
        self._work, self._name = work, name

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        return self._work.take(f"{self._name} {name}", shape, dtype)


def read_codes(layer: QuantizedLinear, codes: ArrayLike, rows: slice, work: Workspace | None = None) -> Array:
    """Rows of ``codes``, which are a rectangle of the layer's, checked against its bits where their container is wider."""
    found = read(codes, rows, slice(None), work)
    bits = layer.scheme.weights.bits
    if bits < 8 and found.size and not (isinstance(layer.codes, PackedMatrix) and layer.codes.layout.bits == bits):
        check_codes(layer, *code_range(found))
    return found


def layer_matrices(checkpoint: Checkpoint, name: str) -> list[Matrix]:
    """A quantized layer as the proof sees it: its float weight; apart, its bias and what quantizes its inputs statically."""
    layer = checkpoint.layer(name)
    size = sum(checkpoint.tensors[tensor].nbytes for tensor in checkpoint.layer_tensors(name))
    result = [Matrix(f"{name}.weight", layer.shape, layer, None, size)]
    if layer.bias is not None:
        result.append(Matrix(f"{name}.bias", tuple(layer.bias.shape), None, layer.bias, 0))
    if layer.input_scale is not None:
        result.append(Matrix(f"{name}.input_scale", tuple(layer.input_scale.shape), None, layer.input_scale, 0))
    if layer.input_zero_point is not None:
        zeros = layer.input_zero_point.astype(np.int16)
        result.append(Matrix(f"{name}.input_zero_point", tuple(zeros.shape), None, zeros, 0))
    return result


def plain_matrix(checkpoint: Checkpoint, name: str) -> Matrix:
    """A plain tensor as the proof sees it."""
    plain = checkpoint.plain(name)
    shape = tuple(plain.data.shape) if plain.dtype == "F4" else plain.shape
    return Matrix(name, shape, None, plain.data, checkpoint.tensors[name].nbytes)


class Matrices(Mapping[str, Matrix]):
    """Every tensor of a model by canonical name: layers as their float weight, the rest of them apart, plain tensors, and the
    scales of a quantized KV cache or attention as they are stored.

    A matrix is made when it is asked for, and not kept.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._layers = frozenset(checkpoint.layer_names)
        self._plain = frozenset([*checkpoint.plain_names, *checkpoint.attention])

    def __getitem__(self, name: str) -> Matrix:
        module = name.rpartition(".")[0]
        if name in self._plain:
            return plain_matrix(self._checkpoint, name)
        if module in self._layers:
            for matrix in layer_matrices(self._checkpoint, module):
                if matrix.name == name:
                    return matrix
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        module = str(name).rpartition(".")[0]
        return name in self._plain or (module in self._layers and any(m.name == name for m in layer_matrices(self._checkpoint, module)))

    def __iter__(self) -> Iterator[str]:
        return self.names(frozenset())

    def names(self, without: Collection[str]) -> Iterator[str]:
        """The names of matrices that are not among ``without``."""
        for kind, name in self._entries():
            if kind == "plain":
                found = [name]
            elif f"{name}.weight" in without and not any(part.endswith(_APART) for part in self._checkpoint.layer_tensors(name)):
                continue  # a layer has nothing else
            else:
                found = [matrix.name for matrix in layer_matrices(self._checkpoint, name)]
            yield from (name for name in found if name not in without)

    def _entries(self) -> list[Entry]:
        return self._checkpoint.entries_with(self._checkpoint.attention)

    def items(self) -> Any:
        return ((matrix.name, matrix) for matrix in self.values())

    def values(self) -> Any:
        for kind, name in self._entries():
            yield from [plain_matrix(self._checkpoint, name)] if kind == "plain" else layer_matrices(self._checkpoint, name)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def weights(self) -> int:
        """Weights of quantized layers, about: what the kernels will have to do."""
        tensors = self._checkpoint.tensors
        return sum(tensors[part].nbytes for name in self._layers for part in self._checkpoint.layer_tensors(name)[:1])


_APART = (".bias", ".input_scale", ".input_offset", ".input_zero_point")
"""Ends of the names of a layer's tensors that are matrices of their own."""


def counts_as_none(matrix: Matrix) -> bool:
    """Whether this is a bias, or a zero point of inputs, that is all zeros: tools differ in whether they store it."""
    return matrix.name.endswith((".bias", ".input_zero_point")) and matrix.plain is not None and not np.asarray(matrix.plain).any()


def is_countable(layer: QuantizedLinear) -> bool:
    """Whether codes, zero points and scales by output and group are the layer's weights, but for a scale of its inputs."""
    simple = layer.scheme.weights.element == "int" and layer.scheme.weights.strategy != "block"
    return simple or layer.zero_points is None


def scales_of(layer: QuantizedLinear, rows: slice = slice(None)) -> Array:
    """[rows, groups] as the law multiplies by them: as stored, or float32 with the outer level taken in; blocks spelled out."""
    block = layer.scheme.weights.block
    if layer.scheme.weights.strategy != "block" or block is None:
        return layer.grid("scales", rows) if layer.outer is None else scale_grid(layer, rows)
    whole = layer.grid("scales") if layer.outer is None else scale_grid(layer)
    return whole[np.arange(layer.shape[0])[rows] // block[0]]
