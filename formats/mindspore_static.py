"""What a layer of Golden Stick says of its weights' grid and of its inputs, and what it only says together.

Where inputs have a scale in the file there is none of the weights, but its product with the inputs' scale; an input scale for each input
holds the smoothing too; and 0.6.0 merges what the inputs' zero point makes into the bias. ``mindspore`` has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import derived
from .checkpoint import FLOATS, IntegralZeros
from .errors import UnreadableError
from .ir import Array, ArrayLike, QuantArgs, read
from .safetensors_file import TensorSet
from .workspace import Workspace


def read_grid(tensors: TensorSet, module: str, leaf: str, dtypes: tuple[str, ...], out: int) -> tuple[ArrayLike, int]:
    """Scales or zero points [out] or, as they are stored [groups, out], [out, groups]; and how many groups there are."""
    info = tensors[f"{module}.{leaf}"]
    if info.dtype not in dtypes or len(info.shape) not in {1, 2} or info.shape[-1] != out or 0 in info.shape:
        wanted = f"{' or '.join(dtypes)} [{out}] or [groups, {out}]"
        raise UnreadableError(f"{module}: {leaf} is {info.dtype} {list(info.shape)}, wanted {wanted}")
    stored: Any = tensors.tensor(f"{module}.{leaf}")
    return (stored, 1) if len(info.shape) == 1 else (stored.T, info.shape[0])


def read_weights(
    tensors: TensorSet, module: str, scale: str, zero: str, shape: tuple[int, int], bits: int, *, negated: bool
) -> tuple[QuantArgs, ArrayLike, IntegralZeros | None]:
    """(scheme, scales, zero points) of weights [out, in], from the tensors ``scale`` and ``zero`` of a module; zero "" for none.

    negated  zero points are floats that are added; else int32 that are taken off
    raises   UnreadableError
    """
    out, in_ = shape
    scales, groups = read_grid(tensors, module, scale, FLOATS, out)
    zeros = None
    if zero:
        half = 1 << (bits - 1)
        stored, also = read_grid(tensors, module, zero, FLOATS if negated else ("I32",), out)
        if also != groups:
            raise UnreadableError(f"{module}: {zero} has {also} groups, {scale} {groups}; they must agree")
        zeros = IntegralZeros(f"{module}.{zero}", stored, -half, half if negated else half - 1, negated=negated)
    if in_ % groups:
        raise UnreadableError(f"{module}: {groups} groups do not divide {in_} inputs")
    whole = len(tensors[f"{module}.{scale}"].shape) == 1
    args = QuantArgs(bits, "int", zeros is None, "channel" if whole else "group", None if whole else in_ // groups)
    return args, scales, zeros


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
