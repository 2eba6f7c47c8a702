"""``--allow requantize``: weights rounded anew to 8 bits per channel, where a target has no exact spelling for them.

Each output's scale is its largest weight over 127, in the dtype that the target stores; codes are the nearest to the law's float32
weights. The proof digests the source's own weights on one side and what was written on the other, so the certificate has both, and
the largest difference that was found, against the largest weight of the layer: at most half a step, 1/254, and the scale's rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from formats import Checkpoint
from formats.errors import NotSameError, RefusedError, UnreadableError
from formats.ir import Array, QuantizedLinear, dequantize
from formats.safetensors_file import DTYPES
from formats.workspace import Workspace

from .matrices import Tile, leaves_of
from .probe import to_float32
from .proof import Found
from .records import HALF_STEP, LayerPlan, Plan
from .tiling import tiles_of
from .writing import LayerWriter, Place, Task, Works, cast, write_vector

LARGEST = 127
"""Largest code; -128 is not used, as symmetric quantizers do."""

_PIECE = 1 << 22


def steps_of(weights: Array, scales: Array, out: Array | None = None) -> Array:
    """Whole steps [rows, cols], as float32, nearest to float32 ``weights``, of float32 ``scales`` [rows, 1]."""
    steps: Array = np.divide(weights, scales, out=out)
    np.rint(steps, out=steps)
    return np.clip(steps, -LARGEST, LARGEST, out=steps)


@dataclass(frozen=True, slots=True)
class _Codes:
    """The new codes of a layer, made from its weights when they are read (``LazyArray``)."""

    layer: QuantizedLinear
    scales: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int8)

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        return steps_of(dequantize(self.layer, rows, cols), to_float32(self.scales[rows])).astype(np.int8)


class RequantizingWriter(LayerWriter):
    """Writes a layer as symmetric 8-bit codes with one scale per output."""

    def __init__(self, plan: Plan, target: Checkpoint | None, layer: LayerPlan, places: Mapping[str, Place]) -> None:
        super().__init__(plan, target, layer, places)
        self._made: QuantizedLinear | None = None
        self._largest = np.zeros(0, np.float32)
        self._lock = threading.Lock()

    def requantized(self) -> QuantizedLinear:
        """The layer as it will be; goes through all its weights once."""
        with self._lock:
            if self._made is None:
                self._made = self._make()
        return self._made

    def _make(self) -> QuantizedLinear:
        layer, target, work = self.source, self._layer.target, Workspace()
        self._largest = np.zeros(layer.shape[0], np.float32)
        for rows, cols in tiles_of([self.matrices[0]], _PIECE):
            tile = Tile(self.matrices[0], rows, cols, work)
            for strip in tile.strips():
                found = np.abs(tile.values(strip)).max(axis=1)
                np.maximum(self._largest[strip], found, out=self._largest[strip])
        if not np.isfinite(self._largest).all():
            raise UnreadableError(
                f"{layer.name}: a weight is not finite; the checkpoint is damaged, or was quantized from weights that were"
            )
        scales = np.where(self._largest > 0, self._largest / np.float32(LARGEST), np.float32(1)).astype(np.float32)
        stored = cast(scales, DTYPES[target.scale_dtype])
        # A scale that rounds to 0 would divide by it: the dtype's smallest number says such an output well enough.
        stored = np.where(to_float32(stored) > 0, stored, np.nextafter(stored, np.ones_like(stored))).reshape(-1, 1)
        error = np.abs(to_float32(stored)[:, 0] - scales) * (self._largest > 0) * LARGEST
        if not (error <= HALF_STEP * self._largest.max()).all():
            raise RefusedError(
                f"{layer.name}: rounded anew it needs scales of up to {scales.max():.3g}, which {target.scale_dtype} does not hold within "
                "the half step that was promised; use --scale-dtype bfloat16 or float32"
            )
        return replace(
            layer, scheme=target.scheme, codes=_Codes(layer, stored), scales=stored, zero_points=None, outer=None, g_idx=None, extras={}
        )

    def small(self) -> Iterator[Task]:
        for spec in self._others:
            yield partial(self._write_small, spec)

    def _write_small(self, spec: Any) -> None:
        output, info = self._places[spec.name]
        layer = self.requantized()
        if spec.part in {"scales", "zero_points"}:
            data = np.asarray(layer.scales) if spec.part == "scales" else np.zeros(spec.shape, DTYPES[spec.dtype])
            output.write(info, data.T if spec.transposed else data, 0, 0)
        else:
            write_vector(layer, self._layer, spec, output, info)

    def write(self, rows: slice, cols: slice, works: Works) -> tuple[Found | None, int]:
        (output, info), layout = self._places[self._spec.name], self._spec.layout
        assert layout is not None
        ours, layer = Tile(self.matrices[0], rows, cols, works[0]), self.requantized()
        shape = (rows.stop - rows.start, cols.stop - cols.start)
        block = works[1].take("block", layout.stored_shape(shape), layout.word_dtype)
        left, right, bound = [], [], 0.0
        for strip in ours.strips():
            values, scales = ours.values(strip), to_float32(np.asarray(layer.scales)[strip])
            steps = steps_of(values, scales, works[1].take("steps", values.shape, np.float32))
            codes = works[1].take("codes", values.shape, np.int8)
            np.copyto(codes, steps, casting="unsafe")  # whole, and within int8
            top, begin = layout.corner(strip.start - rows.start, 0)
            high, wide = layout.stored_shape(codes.shape)
            words = layout.pack(codes, block[top : top + high, begin : begin + wide])
            if not self._theirs:
                continue
            if not np.array_equal(layout.unpack(words), codes):
                raise NotSameError(f"{self._spec.name}: what was packed does not unpack; this is a fault in Weighbridge: please report it")
            made = np.multiply(steps, scales, out=steps)
            made += np.float32(0)
            left.append(leaves_of(values))
            right.append(leaves_of(made))
            apart = np.subtract(made, values, out=made)
            furthest = max(float(apart.max(initial=0)), -float(apart.min(initial=0)))
            bound = max(bound, furthest / (float(self._largest.max()) or 1.0))
        corner = layout.corner(rows.start, cols.start)
        output.write(info, block, *corner)
        if not self._theirs:
            return None, block.nbytes
        if not output.holds(info, block, *corner, works[1]):
            raise NotSameError(f"{self._spec.name}: the file does not hold what was written to it; check the disk, and run it again")
        return Found(b"".join(left), b"".join(right), scales="rounded", bound=bound), block.nbytes
