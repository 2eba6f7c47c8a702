"""Marlin's tile: 4-bit codes and their scales in the order in which tensor cores take them; AutoAWQ and AutoGPTQ store the same.

Defined by AutoAWQ 0.2.9 (``awq/modules/linear/marlin.py``) and AutoGPTQ 0.7.1 (``qlinear_marlin.py``).

- Codes: 16 inputs by 64 outputs are 128 words. A thread holds the inputs ``2t, 2t + 1, 2t + 8, 2t + 9`` of one output of each
  eight; the four words of a thread are the four blocks of 16 outputs. Stored [in / 16, 2 * out].
- Scales [groups, out]: of 64 outputs first 0, 8, ... 56, then 1, 9, ... 57; with one group, of 32 outputs first
  0, 1, 8, 9, 16, 17, 24, 25, then 2, 3, 10, 11 and so on.
- The zero point is the middle code (8 of 0..15) and is not stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .ir import Array, ArrayLike, read
from .layouts import TileLayout
from .workspace import Workspace


def _tile_order() -> tuple[int, ...]:
    """For each nibble of a tile's 128 words its code, ``16 * output + input``."""
    outputs, inputs = np.indices((64, 16))
    thread = outputs % 8 * 4 + inputs % 8 // 2
    word = thread * 4 + outputs // 16
    nibble = 4 * (inputs % 2) + 2 * (outputs // 8 % 2) + inputs // 8
    return tuple(int(code) for code in np.argsort((8 * word + nibble).reshape(-1)))


MARLIN = TileLayout(4, "<i4", (64, 16), _tile_order(), transposed=True, offset=8, low=-8)

GROUPED_SCALES = tuple(output + 8 * block for output in range(8) for block in range(8))
CHANNEL_SCALES = tuple(2 * pair + 8 * block + one for pair in range(4) for block in range(4) for one in range(2))


def scale_order(groups: int) -> tuple[int, ...]:
    """Place i of so many stored scales holds that of output ``order[i]``."""
    return GROUPED_SCALES if groups > 1 else CHANNEL_SCALES


@dataclass(frozen=True, slots=True)
class PermutedScales:
    """Marlin's scales, stored [groups, out] in ``scale_order``, as [out, groups] (``LazyArray``)."""

    stored: ArrayLike

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[1], self.stored.shape[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.stored.dtype

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        order = scale_order(self.stored.shape[0])
        output = np.arange(self.stored.shape[1])[rows]
        place = output // len(order) * len(order) + np.argsort(order)[output % len(order)]
        first = int(place.min(initial=self.shape[0]))
        near = read(self.stored, cols, slice(first, int(place.max(initial=first)) + 1))
        return np.ascontiguousarray(near.T[place - first])
