"""Where a layer lies inside stored tensors: fused, interleaved, permuted, split over experts or tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import UnreadableError

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Region:
    """Where a layer lies inside a stored tensor.

    tensor           name of the stored tensor
    index            leading indices, e.g. (expert,) of a 3-D [experts, out, in] tensor
    rows, cols       (start, stop, step) within the stored tensor once it is unpacked to [out, in]; step 2 is an
                     element-wise interleaved gate/up
    at               (out, in) where this part begins in the layer, (out, group) for scales: ranks hold parts
    head_dim         set if rows were permuted for interleaved RoPE: stored row ``2*j + h`` of each head
                     holds canonical row ``h * head_dim // 2 + j``
    """

    tensor: str
    index: tuple[int, ...] = ()
    rows: tuple[int, int, int] | None = None
    cols: tuple[int, int, int] | None = None
    at: tuple[int, int] = (0, 0)
    head_dim: int | None = None

    def take(self, stored: Array) -> Array:
        """The part's canonical ``[out, ...]`` array out of ``stored`` (a view unless permuted)."""
        part = (stored[self.index] if self.index else stored)[self._cut(stored.ndim - len(self.index))]
        return part if self.head_dim is None else part[self._stored_row(part.shape[0])]

    def put(self, stored: Array, part: Array) -> None:
        """The inverse of ``take``: writes ``part`` to its place in ``stored``."""
        if self.head_dim is not None:
            permuted = np.empty_like(part)
            permuted[self._stored_row(part.shape[0])] = part
            part = permuted
        (stored[self.index] if self.index else stored)[self._cut(stored.ndim - len(self.index))] = part

    def _cut(self, dimensions: int) -> tuple[slice, ...]:
        cuts = tuple(slice(None) if cut is None else slice(*cut) for cut in (self.rows, self.cols))
        return cuts[:dimensions]

    def _stored_row(self, rows: int) -> Array:
        """For each canonical row, the stored row that holds it."""
        assert self.head_dim is not None
        head, within = np.divmod(np.arange(rows), self.head_dim)
        half, j = np.divmod(within, self.head_dim // 2)
        return np.asarray(head * self.head_dim + 2 * j + half)


def assemble(regions: Sequence[Region], stored: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """The layer's whole array (``[out, in]``, or ``[out]`` for a bias) out of all its parts; a copy.

    raises UnreadableError if a stored tensor is missing, dtypes differ, or the parts do not tile ``shape`` exactly
    """
    parts: list[tuple[tuple[slice, ...], Array]] = []
    for region in regions:
        if region.tensor not in stored:
            raise UnreadableError(f"{region.tensor}: is missing, and a part of the layer lies in it")
        part = region.take(stored[region.tensor])
        place = tuple(slice(begin, begin + length) for begin, length in zip(region.at, part.shape, strict=False))
        if part.ndim != len(shape) or any(cut.stop > length for cut, length in zip(place, shape, strict=True)):
            raise UnreadableError(f"{region.tensor}: a part of shape {part.shape} at {region.at} leaves the layer's {shape}")
        if any(all(a.start < b.stop and b.start < a.stop for a, b in zip(place, other, strict=True)) for other, _ in parts):
            raise UnreadableError(f"{region.tensor}: a part of shape {part.shape} at {region.at} lies upon another")
        if parts and part.dtype != parts[0][1].dtype:
            raise UnreadableError(f"{region.tensor}: is {part.dtype}, another part of the layer {parts[0][1].dtype}")
        parts.append((place, part))
    if not parts or sum(part.size for _, part in parts) != int(np.prod(shape)):
        raise UnreadableError(f"{len(parts)} parts do not fill a layer of shape {shape}; one is missing")
    whole = np.empty(shape, dtype=parts[0][1].dtype)
    for place, part in parts:
        whole[place] = part
    return whole
