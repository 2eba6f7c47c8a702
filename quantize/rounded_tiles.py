"""Float weights, seen rounded: codes and scales are made from the rectangle that is read, and how far they are from the weights is summed.

What ``quantize.rounding`` does to symmetric MinMax weights in torch is done here in NumPy or Numba, bit for bit. Scales are read several
times (to be written, and for every tile of codes), and each time anew would read the weights again: ``ScaleBands`` keeps the latest, in
memory that the plan counts.

Golden Stick rounds another way (``golden_stick``): its scale is 2 absmax / (2^b - 1), its codes are all 2^b, and every quotient is of the
weight's dtype, by the scale as that dtype holds it.

The error of a layer is ``||scale * code - weight|| / ||weight||``, of the float32 weights that the law gives. Its sums are taken in the
pass that makes the codes, so each code must be made once: the conversion engine reads a layer in rectangles that do not overlap.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from convert.probe import to_float32
from formats.errors import UnreadableError, UsageError
from formats.ir import Array, ArrayLike, read
from formats.layouts import kernels
from formats.workspace import Workspace

EPSILON = np.float32(2.0**-23)
"""The smallest scale, as in ``quantize.rounding``."""
LOST = {"float16": 13, "bfloat16": 16, "float32": 0}
"""Bits that a float32's mantissa loses in a dtype."""
PIECE = 1 << 20
"""Weights that are rounded at once."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How linears are rounded: bits, inputs of a group (-1: per channel), and whether inputs are quantized at run time.

    golden_stick   as Golden Stick rounds, not as msModelSlim does
    """

    bits: int
    group_size: int = -1
    dynamic: bool = False
    golden_stick: bool = False

    def __post_init__(self) -> None:
        if self.bits not in {4, 8} or (self.group_size != -1 and self.group_size not in {32, 64, 128, 256}):
            raise UsageError(f"{self.bits} bits in groups of {self.group_size}: wanted 4 or 8 bits, in groups of 32, 64, 128, 256 or -1")

    @property
    def top(self) -> int:
        return (1 << self.bits - 1) - 1

    @property
    def low(self) -> int:
        """The lowest code."""
        return -self.top - 1 if self.golden_stick else -self.top

    @property
    def kind(self) -> str:
        """The type that msModelSlim gives such a layer."""
        return f"W{self.bits}A8_DYNAMIC" if self.dynamic else f"W{self.bits}A16"


def absmax(values: Array, group_size: int) -> Array:
    """float32 [rows, groups]: the largest magnitude of each group of float32 ``values`` [rows, in]."""
    engine = _engine()
    if engine is not None:
        found: Array = engine.absmax(values, group_size)
        return found
    rows = values.shape[0]
    return np.asarray(np.abs(values.reshape(rows, -1, group_size)).max(axis=2))


def codes_of(
    values: Array, scales: Array, group_size: int, lost: int, top: int, sums: Array | None = None, low: int | None = None
) -> Array:
    """int8 codes [rows, in] of float32 ``values``: quotients by float32 ``scales`` [rows, groups], rounded to a dtype that loses so many
    bits of the mantissa, then to the nearest integer, half to even.

    sums   [2] float64, to which the squares of ``scales * codes - values`` and of ``values`` are added
    low    the lowest code, -top if it is not given; top: the highest
    """
    sums, low = np.zeros(2) if sums is None else sums, -top if low is None else low
    engine = _engine()
    if engine is not None:
        found: Array = engine.codes_of(values, scales, group_size, lost, (low, top), sums)
        return found
    rows = values.shape[0]
    grouped = values.reshape(rows, -1, group_size)
    quotients = (grouped / scales[:, :, None]).astype(np.float32)
    if lost:
        bits = quotients.view(np.uint32)
        keep = np.uint32(0xFFFFFFFF << lost & 0xFFFFFFFF)
        odd = bits >> np.uint32(lost) & np.uint32(1)
        quotients = ((bits + odd + np.uint32((1 << lost - 1) - 1)) & keep).view(np.float32)
    steps = np.clip(np.rint(quotients), low, top)
    sums += np.square(steps * scales[:, :, None] - grouped).sum(dtype=np.float64), np.square(grouped).sum(dtype=np.float64)
    return steps.astype(np.int8).reshape(values.shape)


def _engine() -> Any:
    if kernels() is None:
        return None
    from . import kernels as own

    return own


class ScaleBands:
    """Scales of the layers on their way, by layer and band of rows: those used last, of at most ``limit`` bytes together."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._bands: OrderedDict[tuple[str, int], Array] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, name: str, band: int, make: Callable[[], Array]) -> Array:
        """The band, which ``make`` makes if it is not kept."""
        with self._lock:
            found = self._bands.get((name, band))
            if found is not None:
                self._bands.move_to_end((name, band))
                return found
        made = make()
        with self._lock:
            if (name, band) not in self._bands:
                self._bands[name, band] = made
                self._held += made.nbytes
            while self._held > self._limit:
                self._held -= self._bands.popitem(last=False)[1].nbytes
        return made


class Errors:
    """How far the codes of each layer are from its weights, as they are made."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[tuple[int, ...], Array]] = {}
        self._left: dict[str, int] = {}
        self._found: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, shape: tuple[int, ...], corners: tuple[int, int, int, int], sums: Array) -> None:
        """The sums of the rectangle (top, bottom, left, right) of layer ``name``; the same rectangle again changes nothing."""
        top, bottom, left, right = corners
        with self._lock:
            parts = self._parts.setdefault(name, {})
            if name in self._found or corners in parts:
                return
            parts[corners] = sums
            self._left[name] = self._left.get(name, math.prod(shape)) - (bottom - top) * (right - left)
            if self._left[name] == 0:
                error, size = (math.fsum(part[which] for part in parts.values()) for which in (0, 1))  # in whatever order they came
                self._found[name] = math.sqrt(error / size) if size else 0.0
                parts.clear()

    def of(self, name: str) -> float | None:
        """The relative error of a layer; None as long as some of its codes were not made."""
        return self._found.get(name)

    def forget(self, name: str) -> None:
        """Begin again with a layer that is not done."""
        with self._lock:
            self._parts.pop(name, None)
            self._left.pop(name, None)


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of a layer, [out, groups], made from its weights [out, in] when they are read (``LazyArray``)."""

    name: str
    weight: ArrayLike
    rounding: Rounding
    bands: ScaleBands

    @property
    def group_size(self) -> int:
        return self.weight.shape[1] if self.rounding.group_size == -1 else self.rounding.group_size

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape[0], self.weight.shape[1] // self.group_size

    @property
    def dtype(self) -> np.dtype[Any]:
        """Per channel the model's own, per group float32; of Golden Stick the model's own, or what inputs measured at run time want."""
        own = np.dtype(self.weight.dtype)
        if self.rounding.golden_stick:
            return np.dtype(np.float32) if self.rounding.dynamic and own.name != "bfloat16" else own
        return own if self.rounding.group_size == -1 else np.dtype(np.float32)

    @property
    def lost(self) -> int:
        """Bits that the mantissa of a quotient loses."""
        own = self.rounding.group_size == -1 or self.rounding.golden_stick
        return LOST[np.dtype(self.weight.dtype).name] if own else 0

    def divisors(self, rows: slice, groups: slice) -> Array:
        """What weights are divided by, float32 [rows, groups]."""
        scales = self.read(rows, groups)
        if self.rounding.golden_stick:
            scales = _held(scales, np.dtype(self.weight.dtype))
        return to_float32(scales)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        (out, in_), (start, stop, _) = self.weight.shape, rows.indices(self.shape[0])
        height = max(1, PIECE // in_)
        parts = []
        for band in range(start // height, -(-stop // height)):
            top, bottom = band * height, min((band + 1) * height, out)
            made = self.bands.take(self.name, band, partial(self._make, slice(top, bottom)))
            parts.append(made[max(start, top) - top : min(stop, bottom) - top, cols])
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, self.shape[1]), self.dtype)[:, cols], *parts])

    def _make(self, rows: slice) -> Array:
        found = absmax(np.ascontiguousarray(to_float32(read(self.weight, rows))), self.group_size)
        if not np.isfinite(found).all():
            raise UnreadableError(f"{self.name}: its weight has NaN or infinite values")
        if self.rounding.golden_stick:
            return self._golden_stick_scales(found)
        scales = found / np.float32(self.rounding.top)
        if self.rounding.group_size == -1:
            return np.maximum(scales.astype(self.dtype), EPSILON.astype(self.dtype))
        return np.where(scales == 0, EPSILON, scales)

    def _golden_stick_scales(self, largest: Array) -> Array:
        """Of the largest magnitudes, float32 [rows, groups]."""
        scales = largest * 2 / np.float32((1 << self.rounding.bits) - 1)
        return _held(np.where(largest == 0, np.float32(1), scales), self.dtype)


def _held(scales: Array, dtype: np.dtype[Any]) -> Array:
    """Positive float32 scales as ``dtype`` holds them, never 0."""
    least: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return np.maximum(scales.astype(dtype), least.smallest_subnormal)


@dataclass(frozen=True, slots=True)
class Codes:
    """The codes of a layer, made from its weights in the rectangle that is read (``LazyArray``)."""

    scales: Scales
    errors: Errors

    @property
    def shape(self) -> tuple[int, ...]:
        return self.scales.weight.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int8)

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        rounding, weight = self.scales.rounding, self.scales.weight
        per_channel = rounding.group_size == -1
        (start, stop, _), (left, right, _) = rows.indices(self.shape[0]), cols.indices(self.shape[1])
        group = max(1, right - left) if per_channel else self.scales.group_size
        begin, end = (left, right) if per_channel else (left // group * group, -(-right // group) * group)
        groups = slice(0, 1) if per_channel else slice(begin // group, end // group)
        scales = self.scales.divisors(rows, groups)
        found, sums = np.empty((scales.shape[0], end - begin), np.int8), np.zeros(2)
        step = max(1, PIECE // max(1, end - begin))
        for top in range(start, stop, step):
            bottom = min(top + step, stop)
            values = np.ascontiguousarray(to_float32(read(weight, slice(top, bottom), slice(begin, end), work)))
            here = slice(top - start, bottom - start)
            found[here] = codes_of(values, np.ascontiguousarray(scales[here]), group, self.scales.lost, rounding.top, sums, rounding.low)
        self.errors.add(self.scales.name, self.shape, (start, stop, begin, end), sums)
        return found[:, left - begin : right - begin]
