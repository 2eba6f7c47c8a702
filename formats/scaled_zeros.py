"""Zero points that are stored multiplied by their scales: ``-(scale * z)``, z unsigned, so that a kernel only has to add them.

The zero point comes back by division and rounding: the product was rounded to half precision, so the quotient is off by at
most 15 * 2**-10 (float16) or 15 * 2**-7 (bfloat16), far from half a step. Where a scale is 0 the weights are 0 whatever the
zero point is; it reads as the middle code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import RefusedError, UnreadableError
from .ir import Array, ArrayLike, read
from .workspace import Workspace

_TOLERANCE = 0.125
"""Of a step: more than rounding can do to any zero point whose scale is a normal number."""


def scale_zeros(name: str, scales: Array, zero_points: Array, bits: int) -> Array:
    """``-(scale * z)`` [out, groups] in the scales' dtype, of signed ``zero_points``; RefusedError where a product overflows it."""
    unsigned = zero_points.astype(np.float32) + np.float32(1 << (bits - 1))
    with np.errstate(over="ignore"):
        products = np.asarray(-(scales.astype(np.float32) * unsigned).astype(scales.dtype))
    if not np.isfinite(products.astype(np.float32)).all():
        raise RefusedError(f"{name}: a zero point times its scale does not fit {scales.dtype}; choose a variant that stores zero points")
    return products


@dataclass(frozen=True, slots=True)
class ScaledZeros:
    """Signed int16 zero points [out, groups] out of ``scale_zeros`` and the scales, both [out, groups] (``LazyArray``)."""

    name: str
    scaled: ArrayLike
    scales: ArrayLike
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.scaled.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int16)

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        """raises UnreadableError where a quotient is no zero point of the layer's bits"""
        half = 1 << (self.bits - 1)
        scales = read(self.scales, rows, cols).astype(np.float32)
        scaled = read(self.scaled, rows, cols).astype(np.float32)
        silent = scales == 0
        with np.errstate(all="ignore"):
            quotient = np.where(silent, np.float32(half), -scaled / scales)
            whole = np.rint(quotient)
            tiny = np.abs(scales) < np.finfo(np.float16).tiny  # the product's own rounding is a larger part of a step
            bad = ~((whole >= 0) & (whole < 2 * half) & ((np.abs(quotient - whole) <= _TOLERANCE) | tiny))
        if bad.any():
            raise UnreadableError(
                f"{self.name}: zeros divided by scales are {quotient[bad].flat[0]:.6g}, wanted 0 to {2 * half - 1}; "
                "the file is damaged or was written by another tool"
            )
        return np.asarray(whole - half, dtype=np.int16)
