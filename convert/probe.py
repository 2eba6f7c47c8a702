"""What headers cannot say: zero points, scales that overflow or round, codes that their bits cannot hold. Reads small tensors only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from formats.errors import UnreadableError
from formats.ir import Array, ArrayLike, QuantizedLinear, read
from formats.layouts import kernels
from formats.safetensors_file import DTYPES

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Cast:
    """What storing values in another dtype does: measured, not assumed.

    rounded, subnormal   largest relative error among results that are normal, and that are subnormal or 0
    overflow             a finite value that the dtype cannot hold, or None
    """

    rounded: float = 0.0
    subnormal: float = 0.0
    overflow: float | None = None

    def with_other(self, other: Cast) -> Cast:
        """The worse of both."""
        overflow = other.overflow if self.overflow is None else self.overflow
        return Cast(max(self.rounded, other.rounded), max(self.subnormal, other.subnormal), overflow)


@dataclass(frozen=True, slots=True)
class Facts:
    """What only the data says of a layer. zero points are in steps above the smallest code.

    differs      how far what the NPU computes with is from scales and bias, beyond the tools' roundings
    quant_bias   what rounding the bias to whole steps does
    """

    zero_low: int
    zero_high: int
    symmetric: bool
    scale: Cast
    bias: Cast
    input_symmetric: bool = True
    differs: float = 0.0
    quant_bias: float = 0.0


def zero_range(zero_points: ArrayLike | None) -> tuple[int, int]:
    """Smallest and largest zero point, signed domain; (0, 0) without any."""
    if zero_points is None:
        return 0, 0
    if zero_points.shape == ():
        zero_points = read(zero_points).reshape(1)
    low, high = [], []
    rows = zero_points.shape[0]
    step = max(1, _CHUNK // max(1, int(np.prod(zero_points.shape[1:]))))
    for start in range(0, rows, step):
        part = read(zero_points, slice(start, min(start + step, rows)))
        low.append(int(part.min()))
        high.append(int(part.max()))
    return min(low), max(high)


def measure_cast(name: str, what: str, values: ArrayLike, dtype: np.dtype[Any] | None) -> Cast:
    """What storing ``values`` in ``dtype`` does; None: only check that they are finite. UnreadableError for NaN or infinity."""
    if values.shape == ():
        values = np.asarray(values).reshape(1)
    rounded = subnormal = 0.0
    overflow: float | None = None
    step = max(1, _CHUNK // max(1, int(np.prod(values.shape[1:]))))
    for start in range(0, values.shape[0], step):
        found = read(values, slice(start, min(start + step, values.shape[0])))
        part = np.ascontiguousarray(to_float32(found)).reshape(-1)
        if not np.isfinite(part).all():
            bad = part[~np.isfinite(part)][0]
            raise UnreadableError(f"{name}: a {what} is {bad}; the checkpoint is damaged, or was quantized from weights that were")
        if dtype is None or dtype == values.dtype:
            continue
        with np.errstate(over="ignore"):
            stored = to_float32(part.astype(dtype))
        if np.isinf(stored).any():
            overflow = float(part[np.isinf(stored)][0])
            continue
        errors = _cast_error(part, stored, _smallest_normal(dtype))
        rounded, subnormal = max(rounded, errors[0]), max(subnormal, errors[1])
    return Cast(rounded, subnormal, overflow)


def _cast_error(values: Array, stored: Array, smallest_normal: float) -> tuple[float, float]:
    """Largest relative difference of ``stored`` from ``values``: where it is normal, and where it is subnormal or 0."""
    engine = kernels()
    if engine is not None:
        found: tuple[float, float] = engine.cast_error(values, stored, smallest_normal)
        return found
    changed = stored != values
    if not changed.any():
        return 0.0, 0.0
    relative = np.abs(stored[changed] - values[changed]) / np.abs(values[changed])
    normal = np.abs(stored[changed]) >= smallest_normal
    return float(relative[normal].max(initial=0)), float(relative[~normal].max(initial=0))


def to_float32(array: Array) -> Array:
    """float16, bfloat16 or float32 values as float32, exactly."""
    if array.dtype == DTYPES["BF16"]:
        wide = np.ascontiguousarray(array).view(np.uint16).astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32)
    return array.astype(np.float32, copy=False)


def _smallest_normal(dtype: np.dtype[Any]) -> float:
    limits: Any = ml_dtypes.finfo
    return float(limits(dtype).smallest_normal)


def check_codes(layer: QuantizedLinear, low: int, high: int) -> None:
    """UnreadableError if codes from ``low`` to ``high``, stored in wider containers, do not fit the layer's bits."""
    bits = layer.scheme.weights.bits
    if layer.scheme.weights.element == "int" and (low < -(1 << bits - 1) or high >= 1 << bits - 1):
        raise UnreadableError(
            f"{layer.name}: codes run from {low} to {high}, which {bits} bits cannot hold; the weights are packed two to a byte "
            "while the description does not say so, or are of another type"
        )
