"""What one layer or plain tensor of a plan is written by: small tensors whole, the large one in tiles, each proved as it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from formats import Checkpoint, derived
from formats.errors import NotSameError, RefusedError, UnreadableError
from formats.ir import Array, QuantizedLinear, read
from formats.layouts import PackedMatrix
from formats.placement import PlacedTensor
from formats.safetensors_file import DTYPES, TensorInfo
from formats.scaled_zeros import scale_zeros
from formats.spec import TensorSpec
from formats.stored_tensor import StoredTensor
from formats.workspace import Workspace

from . import moves
from .matrices import LEAF_ROWS, Matrix, Tile, layer_matrices, leaves_of, plain_matrix, scales_of
from .outputs import Output
from .probe import to_float32
from .proof import CodeProof, Found, ValueProof, digest_tile
from .records import LayerPlan, Plan
from .tiling import Side, bytes_of_scales, side_of, tile_shape, tiles, tiles_of

Works = tuple[Workspace, Workspace]
Place = tuple[Output, TensorInfo]
Task = Callable[[], None]

GRID = 1 << 18
"""Scales or zero points that are written at once."""


class Writer(Protocol):
    """Writes one entry of a checkpoint. ``matrices`` are its tensors as the proof sees them; tiles are those of the first."""

    matrices: list[Matrix]

    def small(self) -> Iterator[Task]:
        """Tasks that write everything but the first matrix; they are done before its tiles."""
        ...

    def look_again(self) -> None:
        """Open what was written through the target's reader, and see that it takes it for what was meant."""
        ...

    def tiles(self, budget: int) -> Iterator[tuple[slice, slice]]:
        """Rectangles of the first matrix; each holds at most ``budget`` bytes in memory."""
        ...

    def write(self, rows: slice, cols: slice, works: Works) -> tuple[Found | None, int]:
        """Write a tile, prove it if asked to, and say how many bytes were written."""
        ...

    def read_back(self) -> list[Matrix]:
        """``matrices`` as the target's reader sees them."""
        ...


class LayerWriter:
    """Writes a quantized layer: as codes, scales and zero points, or dequantized."""

    def __init__(self, plan: Plan, target: Checkpoint | None, layer: LayerPlan, places: Mapping[str, Place]) -> None:
        self._plan, self._target, self._layer, self._places = plan, target, layer, places
        self.matrices = layer_matrices(plan.checkpoint, layer.target.name)
        if layer.target.input_dtype is None:
            self.matrices = [matrix for matrix in self.matrices if not matrix.name.endswith((".input_scale", ".input_zero_point"))]
        specs = plan.outputs(layer.target)
        self._spec = next(spec for spec in specs if spec.part in {"codes", "weight"})
        self._others = [spec for spec in specs if spec is not self._spec]
        self._theirs: list[Matrix] = []

    @property
    def source(self) -> QuantizedLinear:
        layer = self.matrices[0].layer
        assert layer is not None
        return layer

    def small(self) -> Iterator[Task]:
        layer = self.source
        for spec in self._others:
            output, info = self._places[spec.name]
            if spec.part in {"scales", "zero_points", "scaled_zeros"}:
                step = max(64, GRID // max(1, layer.groups[1] * self._layer.repeat) // 64 * 64)
                if spec.shape in {(1,), ()}:
                    yield partial(self._write_one, spec)
                    continue
                for start in range(0, layer.groups[0], step):
                    rows = slice(start, min(start + step, layer.groups[0]))
                    yield partial(_write_grid, layer, self._layer, self._smallest_zero(), spec, output, info, rows)
            else:
                yield partial(write_vector, layer, self._layer, spec, output, info)

    def _write_one(self, spec: TensorSpec) -> None:
        """The scale or zero point of a whole tensor."""
        output, info = self._places[spec.name]
        stored: Any = self.source.scales if spec.part == "scales" else self.source.zero_points
        stored = np.zeros(1, np.int16) if stored is None else stored
        value = np.asarray(stored if isinstance(stored, np.ndarray) else stored.read()).reshape(1, 1)
        output.write(info, cast(value, DTYPES[spec.dtype]) if spec.part == "scales" else value.astype(DTYPES[spec.dtype]), 0, 0)

    def _smallest_zero(self) -> int:
        """In the signed domain."""
        return self._plan.holds.smallest_zero - (1 << (self._layer.target.scheme.weights.bits - 1))

    def look_again(self) -> None:
        if self._target is None:
            return
        name = self._layer.target.name
        if self._plan.holds.dequantized:
            self._theirs = [plain_matrix(self._target, matrix.name) for matrix in self.matrices]
            found: Any = self._theirs[0].plain
            layout = None
        else:
            self._theirs = layer_matrices(self._target, name)
            theirs = self._theirs[0].layer
            assert theirs is not None
            codes = theirs.codes
            found, layout = (codes.stored, codes.layout) if isinstance(codes, PackedMatrix) else (codes, None)
        if layout != self._spec.layout or self._theirs[0].shape != self.matrices[0].shape:
            raise NotSameError(f"{name}: is read in another layout than it is written in; this is a fault in Weighbridge: please report it")
        _check_place(found, self._spec.name, self._places[self._spec.name])

    def read_back(self) -> list[Matrix]:
        return self._theirs

    def tiles(self, budget: int) -> Iterator[tuple[slice, slice]]:
        shape, layout = self.source.shape, self._spec.layout
        if layout is None:
            size = DTYPES[self._spec.dtype].itemsize
            into = Side(False, float(size), float(size))
        else:
            into = Side.of_layout(layout, shape, True)
        scales = bytes_of_scales(self.source) * (1 + self._layer.repeat)
        return tiles(shape, tile_shape(shape, [side_of(self.matrices[0]), into], budget, scales))

    def write(self, rows: slice, cols: slice, works: Works) -> tuple[Found | None, int]:
        output, info = self._places[self._spec.name]
        ours = Tile(self.matrices[0], rows, cols, works[0])
        block, corner, found = (self._dequantize if self._spec.layout is None else self._repack)(ours, works[1])
        output.write(info, block, *corner)
        if found is not None and not output.holds(info, block, *corner, works[1]):
            raise NotSameError(f"{self._spec.name}: the file does not hold what was written to it; check the disk, and run it again")
        return found, block.nbytes

    def _repack(self, ours: Tile, work: Workspace) -> tuple[Array, tuple[int, int], Found | None]:
        """A tile's words, and the proof that they unpack to its codes; the source's own words where the layout is the same."""
        layout, rows, cols = self._spec.layout, ours.rows, ours.cols
        assert layout is not None
        if self._may_copy():
            return self._copy(ours, work)
        width = cols.stop - cols.start
        block = work.take("block", layout.stored_shape((rows.stop - rows.start, width)), layout.word_dtype)
        proof = CodeProof(ours, Tile(self._theirs[0], rows, cols, work)) if self._theirs else None
        for strip in ours.strips():
            codes = ours.codes(strip)
            top, left = layout.corner(strip.start - rows.start, 0)
            high, wide = layout.stored_shape(codes.shape)
            words = layout.pack(codes, block[top : top + high, left : left + wide])
            if proof is not None:
                proof.add(strip, codes, np.ascontiguousarray(layout.unpack(words, dtype=codes.dtype.str, work=work)))
        return block, layout.corner(rows.start, cols.start), None if proof is None else proof.found()

    def _may_copy(self) -> bool:
        """Whether the source's words are the target's."""
        codes, bits = self.source.codes, self.source.scheme.weights.bits
        return isinstance(codes, PackedMatrix) and codes.width is None and codes.layout == self._spec.layout and codes.layout.bits == bits

    def _copy(self, ours: Tile, work: Workspace) -> tuple[Array, tuple[int, int], Found | None]:
        """A tile's words as they are, and the proof of what they mean."""
        layout, rows, cols = self._spec.layout, ours.rows, ours.cols
        assert layout is not None
        found = None
        if self._theirs:
            proof = CodeProof(ours, Tile(self._theirs[0], rows, cols, work))
            for strip in ours.strips():
                codes = ours.codes(strip)
                proof.add(strip, codes, codes)
            found = proof.found()
        return ours.words(), layout.corner(rows.start, cols.start), found

    def _dequantize(self, ours: Tile, work: Workspace) -> tuple[Array, tuple[int, int], Found | None]:
        """A tile's weights, and the proof that they are the law's, rounded."""
        rows, cols = ours.rows, ours.cols
        block = work.take("block", (rows.stop - rows.start, cols.stop - cols.start), DTYPES[self._spec.dtype])
        proof = ValueProof(ours) if self._theirs else None
        for strip in ours.strips():
            values = ours.values(strip)
            part = block[strip.start - rows.start : strip.stop - rows.start]
            with np.errstate(over="ignore"):
                part[...] = values
            if not np.isfinite(to_float32(part)).all():
                raise RefusedError(
                    f"{self._layer.target.name}: a weight does not fit {self._spec.dtype}; use --scale-dtype bfloat16 or float32"
                )
            if proof is not None:
                proof.add(strip, values, part)
        return block, (rows.start, cols.start), None if proof is None else proof.found()


class PlainWriter:
    """Writes a plain tensor, byte for byte."""

    def __init__(self, plan: Plan, target: Checkpoint | None, name: str, place: Place) -> None:
        self._target, self._place = target, place
        self.matrices = [plain_matrix(plan.checkpoint, name)]
        self._theirs: list[Matrix] = []

    def small(self) -> Iterator[Task]:
        return iter(())

    def look_again(self) -> None:
        if self._target is not None:
            ours = self.matrices[0]
            self._theirs = [plain_matrix(self._target, ours.name)]
            _check_place(self._theirs[0].plain, ours.name, self._place)

    def read_back(self) -> list[Matrix]:
        return self._theirs

    def _turned(self) -> tuple[bool, bool]:
        """Whether the tensor's rows lie across the lines of the file that is read, and of that which is written."""
        (output, info), plain = self._place, self.matrices[0].plain
        return isinstance(plain, PlacedTensor) and plain.place.turned, output.is_turned(info)

    def tiles(self, budget: int) -> Iterator[tuple[slice, slice]]:
        matrix = self.matrices[0]
        if not (any(self._turned()) and matrix.is_float()):
            return tiles_of(self.matrices, budget)
        sides = [Side(turned, float(matrix.itemsize), float(matrix.itemsize)) for turned in self._turned()]
        return tiles(matrix.grid, tile_shape(matrix.grid, sides, budget))

    def write(self, rows: slice, cols: slice, works: Works) -> tuple[Found | None, int]:
        (output, info), matrix = self._place, self.matrices[0]
        leaves, written = [], 0
        info = replace(info, shape=matrix.grid)
        for strip, part in [(rows, cols)] if any(self._turned()) else _parts(rows, cols, matrix.itemsize, matrix.is_float()):
            data = read(matrix.as_matrix(), strip, part, works[0])
            output.write(info, data, strip.start, part.start)
            written += data.nbytes
            if self._theirs and not output.holds(info, data, strip.start, part.start, works[1]):
                raise NotSameError(f"{matrix.name}: the file does not hold what was written to it; check the disk, and run it again")
            if self._theirs and matrix.is_float():
                for top in range(0, len(data), LEAF_ROWS):
                    values = to_float32(data[top : top + LEAF_ROWS])
                    leaves.append(leaves_of(np.add(values, np.float32(0), out=works[1].take("values", values.shape, np.float32))))
        if not self._theirs:
            return None, written
        digest = b"".join(leaves) if matrix.is_float() else digest_tile(matrix, rows, cols, works[0])
        return Found(digest, digest), written


def _parts(rows: slice, cols: slice, item: int, by_leaf: bool) -> Iterator[tuple[slice, slice]]:
    """Strips of a plain tile: whole rows of it, which keep to leaves; for what has no leaves, pieces of about 1 MiB."""
    width = max(1, cols.stop - cols.start)
    high = max(64, (1 << 19) // width // 64 * 64) if by_leaf else max(1, (1 << 20) // (width * item))
    wide = width if by_leaf else max(1, (1 << 20) // item)
    for top in range(rows.start, rows.stop, high):
        for left in range(cols.start, cols.stop, wide):
            yield slice(top, min(top + high, rows.stop)), slice(left, min(left + wide, cols.stop))


def _check_place(found: Any, name: str, place: Place) -> None:
    """NotSameError if the reader does not find a tensor where it is written."""
    output, info = place
    same = isinstance(found, StoredTensor) and not found.turned and (found.name, found.begin) == (name, info.begin)
    byte, dtype = np.dtype("u1"), DTYPES.get(info.dtype, np.dtype("u1"))
    if not same or found.file.path != output.path or not (found.dtype == dtype or (found.dtype == byte and dtype.itemsize == 1)):
        raise NotSameError(f"{name}: is not read from where it is written; this is a fault in Weighbridge: please report it")


def _write_grid(
    layer: QuantizedLinear, plan: LayerPlan, smallest_zero: int, spec: TensorSpec, output: Output, info: TensorInfo, rows: slice
) -> None:
    """Scales or zero points of some output rows, repeated, cast and packed as the target stores them."""
    zeros: Array | None = None
    if spec.part != "scales":
        grid = moves.spell_zero_point(layer.groups)[rows] if layer.zero_points is None else layer.grid("zero_points", rows)
        if grid.size and int(grid.min()) < smallest_zero:
            raise UnreadableError(
                f"{layer.name}: a zero point is {int(grid.min())}, which the plan did not find; the source changed: run again"
            )
        zeros = moves.repeat_groups(grid, plan.repeat)
    if zeros is not None and spec.part == "zero_points":
        if spec.layout is None:
            stored = ((-zeros if spec.negated == "integer" else zeros) + spec.added).astype(DTYPES[spec.dtype])
            stored = -stored if spec.negated == "float" else stored
            output.write(info, stored.T if spec.transposed else stored, *((0, rows.start) if spec.transposed else (rows.start, 0)))
            return
        packed = spec.layout.pack(_padded(zeros, spec.columns, -spec.layout.offset))
        output.write(info, packed, *spec.layout.corner(rows.start, 0))
        return
    stored = scales_of(layer, rows) if plan.merged else layer.grid("scales", rows)
    scales = cast(moves.repeat_groups(stored, plan.repeat), DTYPES[spec.dtype])
    if not np.isfinite(scales.astype(np.float32)).all():
        raise UnreadableError(
            f"{layer.name}: a scale does not fit {spec.dtype}, which the plan did not find; the source changed: run again"
        )
    if zeros is not None:
        scales = scale_zeros(layer.name, scales, zeros, plan.target.scheme.weights.bits)  # those of the carrier
    if spec.order:
        scales = scales.reshape(-1, len(spec.order), scales.shape[1])[:, list(spec.order)].reshape(scales.shape)
    scales = _padded(scales, spec.columns, 0)
    output.write(info, scales.T if spec.transposed else scales, *((0, rows.start) if spec.transposed else (rows.start, 0)))


def _padded(grid: Array, columns: int, value: int) -> Array:
    """``grid`` [rows, groups] with columns of ``value`` after its own, up to ``columns`` of them."""
    if columns <= grid.shape[1]:
        return grid
    padded = np.full((grid.shape[0], columns), value, dtype=grid.dtype)
    padded[:, : grid.shape[1]] = grid
    return padded


def write_vector(layer: QuantizedLinear, plan: LayerPlan, spec: TensorSpec, output: Output, info: TensorInfo) -> None:
    """One of the tensors that are small whole."""
    data = vector(layer, plan, spec)
    if data.size == 1:  # of the inputs, said again for each
        data = np.broadcast_to(data.reshape(-1), info.shape)
    output.write(info, data.reshape(info.shape if len(info.shape) == 2 else (1, -1)), 0, 0)


def vector(layer: QuantizedLinear, plan: LayerPlan, spec: TensorSpec) -> Array:
    """The values of one of the tensors that are small whole, in the dtype of ``spec``."""
    dtype, found = DTYPES[spec.dtype], None
    if spec.part == "g_idx":
        found = moves.spell_g_idx(layer.shape[1], plan.target.group_size) if layer.g_idx is None else layer.g_idx
    elif spec.part == "shape":
        found = np.array(layer.shape)
    elif spec.part == "input_zero_point":
        found = np.zeros(1, np.int16) if layer.input_zero_point is None else layer.input_zero_point
    elif spec.part == "outer_zeros":
        found = np.zeros(spec.shape)
    elif spec.part == "deq_scale":
        found = derived.encode_deq_scale(derived.deq_scale(_as_stored(layer, plan))[: spec.shape[0]], spec.dtype)
    elif spec.part == "quant_bias":
        found = derived.quant_bias(_as_stored(layer, plan))
    elif spec.part == "scale_bias":
        found = derived.scale_bias(layer, spec.shape[1])
    elif spec.part == "zero_point_bias":
        found = derived.zero_point_bias(_as_stored(layer, plan))
    elif spec.part == "merged_bias":
        found = derived.merged_bias(_as_stored(layer, plan), derived.deq_scale(_as_stored(layer, plan)))
    elif spec.part == "smoothed_input_scale":
        found = read(layer.extras["smoothed_input_scale"].value)
    if found is not None:
        return found.astype(dtype)
    stored = {"bias": layer.bias, "input_scale": layer.input_scale, "outer": layer.outer, "input_smooth": layer.input_smooth}[spec.part]
    assert stored is not None
    return cast(read(stored), dtype)


def _as_stored(layer: QuantizedLinear, plan: LayerPlan) -> QuantizedLinear:
    """The layer with the scales that the target stores: what follows from rounded ones is not what the source kept."""
    if not plan.derives_anew(layer) or plan.target.scheme.weights.sparse:
        return layer
    assert layer.input_scale is not None
    scales = cast(layer.grid("scales"), DTYPES[plan.target.scale_dtype])
    input_scale = cast(layer.input_scale, DTYPES[str(plan.target.input_dtype)])
    return replace(layer, scales=scales, input_scale=input_scale, extras={})


def cast(values: Array, dtype: np.dtype[Any]) -> Array:
    """``values`` in ``dtype``, by way of float32 (exact for half precision), so rounded once; unchanged if it is theirs already."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        return to_float32(values).astype(dtype)
