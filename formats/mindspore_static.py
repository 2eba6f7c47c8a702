"""Layers of Golden Stick whose inputs have a scale in the file: what the file says of them, and what it only says together.

There is no scale of the weights, but its product with the inputs' scale; an input scale for each input holds the smoothing too; and
0.6.0 merges what the inputs' zero point makes into the bias. ``mindspore`` has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import derived
from .checkpoint import FLOATS
from .errors import UnreadableError
from .ir import Array, ArrayLike, read
from .safetensors_file import TensorSet
from .workspace import Workspace


def read_inputs(tensors: TensorSet, scale_name: str, zero_name: str, in_: int) -> tuple[Array, Array, Array | None]:
    """(input_scale [1], input_zero_point [1] int16, input_smooth [in] float32 or None) out of a scale and a zero point, [1] or [in].

    raises   UnreadableError
    """
    scale_info, zero_info = tensors[scale_name], tensors[zero_name]
    for what, info, dtypes in ((scale_name, scale_info, FLOATS), (zero_name, zero_info, ("I8", "I32"))):
        if info.dtype not in dtypes or info.shape not in {(1,), (in_,)}:
            raise UnreadableError(f"{what}: is {info.dtype} {list(info.shape)}, wanted {' or '.join(dtypes)} [1] or [{in_}]")
    scale, zero = np.asarray(tensors.array(scale_name)), np.asarray(tensors.array(zero_name)).astype(np.int32)
    wide = scale.astype(np.float32)
    if not (np.isfinite(wide).all() and (wide > 0).all()):
        raise UnreadableError(f"{scale_name}: holds {wide[~(np.isfinite(wide) & (wide > 0))][0]}, wanted positive numbers")
    if (zero != zero[0]).any() or not -128 <= int(zero[0]) <= 127:
        raise UnreadableError(f"{zero_name}: holds {int(zero.min())} to {int(zero.max())}, wanted one zero point of int8 for all inputs")
    found = zero[:1].astype(np.int16)
    if (wide == wide[0]).all():
        return scale[:1], found, None
    return np.ones(1, np.float32), found, 1 / wide


@dataclass(frozen=True, slots=True)
class DecodedScale:
    """The weights' scale [out, 1] float32 out of a stored product with the inputs' (``LazyArray``)."""

    stored: ArrayLike
    input_scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stored.shape[0], 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        found = derived.decode_deq_scale(np.asarray(read(self.stored, rows))) / np.float32(self.input_scale)
        return found.reshape(-1, 1)[:, cols]


@dataclass(frozen=True, slots=True)
class TakenApart:
    """The model's bias [out], in the stored dtype, out of one into which the inputs' zero point was merged (``LazyArray``).

    What is left of a bias that the model does not have is less than the tool's rounding, and is 0 here.
    """

    stored: ArrayLike
    codes: ArrayLike
    dequant: ArrayLike
    zero: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.stored.dtype)

    @property
    def ndim(self) -> int:
        return 1

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        stored = np.asarray(read(self.stored, rows)).astype(np.float64)
        scale = derived.decode_deq_scale(np.asarray(read(self.dequant, rows))).astype(np.float64)
        merged = self.zero * derived.sums_of(self.codes, rows) * scale
        found = stored + merged
        half_step = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(self.dtype.name, 2.0**-24)
        found[np.abs(found) <= half_step * np.abs(stored) + 2.0**-25] = 0
        return np.asarray(found.astype(self.dtype))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = self.read()
        return whole if dtype is None else whole.astype(dtype)
