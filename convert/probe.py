"""What headers cannot say: zero points, scales that overflow or round, codes that their bits cannot hold. Reads small tensors only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from formats.errors import UnreadableError
from formats.ir import Array, ArrayLike, QuantizedLinear, read
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


@dataclass(frozen=True, slots=True)
class Facts:
    """What only the data says of a layer. zero points are in steps above the smallest code."""

    zero_low: int
    zero_high: int
    symmetric: bool
    scale: Cast
    bias: Cast


def zero_range(zero_points: ArrayLike | None) -> tuple[int, int]:
    """Smallest and largest zero point, signed domain; (0, 0) without any."""
    if zero_points is None:
        return 0, 0
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
    array = values if isinstance(values, np.ndarray) else values.read()
    rounded = subnormal = 0.0
    overflow: float | None = None
    step = max(1, _CHUNK // max(1, int(np.prod(array.shape[1:]))))
    for start in range(0, array.shape[0], step):
        part = to_float32(array[start : start + step])
        if not np.isfinite(part).all():
            bad = part[~np.isfinite(part)].flat[0]
            raise UnreadableError(f"{name}: a {what} is {bad}; the checkpoint is damaged, or was quantized from weights that were")
        if dtype is None or dtype == array.dtype:
            continue
        with np.errstate(over="ignore"):
            stored = part.astype(dtype).astype(np.float32)
        if np.isinf(stored).any():
            overflow = float(part[np.isinf(stored)].flat[0])
            continue
        error = np.abs(stored - part)
        changed = error > 0
        if changed.any():
            relative = error[changed] / np.abs(part[changed])
            normal = np.abs(stored[changed]) >= float(_smallest_normal(dtype))
            rounded = max(rounded, float(relative[normal].max(initial=0)))
            subnormal = max(subnormal, float(relative[~normal].max(initial=0)))
    return Cast(rounded, subnormal, overflow)


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
