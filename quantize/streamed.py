"""Data-free rounding of a float folder, streamed: the conversion engine reads float weights and writes codes, without torch.

A model that needs no calibration data (W8A16, W4A16, W8A8_DYNAMIC by MinMax, symmetric) need not be a model: its linears are read in
tiles, rounded as ``quantize.rounding`` rounds them, bit for bit, and written like any conversion: in constant memory, resumable,
and with a certificate. What is proved is that the file holds these codes and scales; how far they are from the float weights is the
rounding's own doing (half a step).

Linears are the 2-D ``.weight`` tensors of numbered blocks; routers of experts (``gate``) and what lies outside the blocks (lm_head,
embeddings) stay float, as with msModelSlim's ``disable_last_linear``.
"""

from __future__ import annotations

import fnmatch
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.engine import Progress, Result, run
from convert.options import Settings
from convert.planning import Planner
from convert.probe import to_float32
from formats import find_target, open_checkpoint
from formats.checkpoint import Checkpoint, float_linears
from formats.errors import UnreadableError, UsageError
from formats.ir import Array, ArrayLike, QuantArgs, QuantizedLinear, QuantScheme, read
from formats.layouts import kernels
from formats.safetensors_file import DEFAULT_SHARD_BYTES
from formats.workspace import Workspace

if TYPE_CHECKING:
    from .recipe import Recipe

EPSILON = np.float32(2.0**-23)
"""The smallest scale, as in ``quantize.rounding``."""
ROUTERS = ("gate", "shared_expert_gate", "router")
"""Leaf names of linears that choose experts."""
_PIECE = 1 << 20
_KEPT = {"F16": 13, "BF16": 16, "F32": 0}
"""Bits that a float32's mantissa loses in a dtype."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How linears are rounded: bits, inputs of a group (-1: per channel), and whether inputs are quantized at run time."""

    bits: int
    group_size: int = -1
    dynamic: bool = False

    def __post_init__(self) -> None:
        if self.bits not in {4, 8} or (self.group_size != -1 and self.group_size not in {32, 64, 128, 256}):
            raise UsageError(f"{self.bits} bits in groups of {self.group_size}: wanted 4 or 8 bits, in groups of 32, 64, 128, 256 or -1")

    @property
    def top(self) -> int:
        return (1 << self.bits - 1) - 1


def rounding_of(recipe: Recipe) -> tuple[Rounding, tuple[str, ...]] | None:
    """(how a recipe rounds, patterns of linears that stay float) if it needs no data and no model; None if it does."""
    config = recipe.quant_config()
    plain = config.w_method == "MinMax" and config.w_sym and not config.co_sparse and set(recipe.mix_cfg.values()) <= {"float"}
    if recipe.needs_data or not plain or config.model_quant_type not in {"W8A16", "W4A16", "W8A8_DYNAMIC"}:
        return None
    if not config.is_per_group and (config.is_lowbit or config.mm_tensor):
        return None
    group_size = config.group_size if config.is_per_group else -1
    floats = (*recipe.mix_cfg, *(config.disable_names or ()))
    return Rounding(config.w_bit, group_size, config.model_quant_type == "W8A8_DYNAMIC"), floats


def absmax(values: Array, group_size: int) -> Array:
    """float32 [rows, groups]: the largest magnitude of each group of float32 ``values`` [rows, in]."""
    engine = _engine()
    if engine is not None:
        found: Array = engine.absmax(values, group_size)
        return found
    rows = values.shape[0]
    return np.asarray(np.abs(values.reshape(rows, -1, group_size)).max(axis=2))


def codes_of(values: Array, scales: Array, group_size: int, lost: int, top: int) -> Array:
    """int8 codes [rows, in] of float32 ``values``: quotients by float32 ``scales`` [rows, groups], rounded to a dtype that loses so many
    bits of the mantissa, then to the nearest integer, half to even."""  # fmt: skip
    engine = _engine()
    if engine is not None:
        found: Array = engine.codes_of(values, scales, group_size, lost, top)
        return found
    rows = values.shape[0]
    quotients = (values.reshape(rows, -1, group_size) / scales[:, :, None]).astype(np.float32)
    if lost:
        bits = quotients.view(np.uint32)
        keep = np.uint32(0xFFFFFFFF << lost & 0xFFFFFFFF)
        odd = bits >> np.uint32(lost) & np.uint32(1)
        quotients = ((bits + odd + np.uint32((1 << lost - 1) - 1)) & keep).view(np.float32)
    return np.clip(np.rint(quotients), -top, top).astype(np.int8).reshape(values.shape)


def _engine() -> Any:
    if kernels() is None:
        return None
    from . import kernels as own

    return own


@dataclass
class _Scales:
    """The scales of a layer, [out, groups], made from its weights when they are first read (``LazyArray``)."""

    name: str
    weight: ArrayLike
    rounding: Rounding
    made: list[Array] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def group_size(self) -> int:
        return self.weight.shape[1] if self.rounding.group_size == -1 else self.rounding.group_size

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape[0], self.weight.shape[1] // self.group_size

    @property
    def dtype(self) -> np.dtype[Any]:
        """Per channel the model's own dtype, per group float32."""
        return np.dtype(self.weight.dtype) if self.rounding.group_size == -1 else np.dtype(np.float32)

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        with self.lock:
            if not self.made:
                self.made.append(self._make())
        return self.made[0][rows, cols]

    def _make(self) -> Array:
        (out, in_), work = self.weight.shape, Workspace()
        found = np.empty(self.shape, np.float32)
        step = max(1, _PIECE // in_)
        for top in range(0, out, step):
            rows = slice(top, min(top + step, out))
            found[rows] = absmax(np.ascontiguousarray(to_float32(read(self.weight, rows, slice(None), work))), self.group_size)
        if not np.isfinite(found).all():
            raise UnreadableError(f"{self.name}: its weight has NaN or infinite values")
        scales = found / np.float32(self.rounding.top)
        if self.rounding.group_size == -1:
            return np.maximum(scales.astype(self.dtype), EPSILON.astype(self.dtype))
        return np.where(scales == 0, EPSILON, scales)


@dataclass(frozen=True, slots=True)
class _Codes:
    """The codes of a layer, made from its weights in the rectangle that is read (``LazyArray``)."""

    weight: ArrayLike
    scales: _Scales

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int8)

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        group, (left, right, _) = self.scales.group_size, cols.indices(self.shape[1])
        begin, end = left // group * group, -(-right // group) * group
        scales = to_float32(self.scales.read(rows, slice(begin // group, end // group)))
        found, (start, stop, _) = np.empty((scales.shape[0], end - begin), np.int8), rows.indices(self.shape[0])
        lost = _KEPT["F32"] if self.scales.rounding.group_size != -1 else _lost(self.weight.dtype)
        step = max(1, _PIECE // max(1, end - begin))
        for top in range(start, stop, step):
            bottom = min(top + step, stop)
            values = np.ascontiguousarray(to_float32(read(self.weight, slice(top, bottom), slice(begin, end), work)))
            here = slice(top - start, bottom - start)
            found[here] = codes_of(values, np.ascontiguousarray(scales[here]), group, lost, self.scales.rounding.top)
        return found[:, left - begin : right - begin]


def _lost(dtype: Any) -> int:
    return {"float16": _KEPT["F16"], "bfloat16": _KEPT["BF16"]}.get(np.dtype(dtype).name, 0)


class Rounded(Checkpoint):
    """A float folder whose linears are seen rounded."""

    def __init__(self, dense: Checkpoint, rounding: Rounding, disable_names: tuple[str, ...] = (), patterns: tuple[str, ...] = ()) -> None:
        super().__init__(dense.location, "float", f"w{rounding.bits}a{8 if rounding.dynamic else 16}", dense.tensors)
        if dense.format != "dense":
            raise UsageError(f"{dense.location.folder.name}: is quantized ({dense.format}) already; give the float model")
        self.rounding = rounding
        linears = float_linears(dense)
        for name in disable_names:
            if name not in linears:
                raise UsageError(f"disable_names: {name!r} is no linear of this model; its first is {next(iter(linears), 'none')!r}")
        floats = {name for name in linears for rule in patterns if fnmatch.fnmatchcase(name, rule)} | set(disable_names)
        self.linears = frozenset(name for name in linears if name not in floats and name.rpartition(".")[2] not in ROUTERS)
        for name in self.linears:
            self._check(name)
        for _, tensor in dense.entries:
            module, _, leaf = tensor.rpartition(".")
            if module not in self.linears:
                self.entries.append(("plain", tensor))
            elif leaf == "weight":
                self.entries.append(("layer", module))

    def _check(self, name: str) -> None:
        info = self.tensors[f"{name}.weight"]
        if info.dtype not in _KEPT:
            raise UnreadableError(f"{name}: weight is {info.dtype}, wanted F16, BF16 or F32; the model is not a float one")
        if self.rounding.group_size != -1 and info.shape[1] % self.rounding.group_size:
            raise UsageError(
                f"{name}: {info.shape[1]} inputs are not whole groups of {self.rounding.group_size}; choose another group size, or "
                "add the layer to disable_names"
            )

    def layer_tensors(self, name: str) -> tuple[str, ...]:
        return tuple(tensor for tensor in (f"{name}.weight", f"{name}.bias") if tensor in self.tensors)

    def layer(self, name: str) -> QuantizedLinear:
        weight: Any = self.tensors.tensor(f"{name}.weight")
        scales = _Scales(name, weight, self.rounding)
        group = None if self.rounding.group_size == -1 else self.rounding.group_size
        args = QuantArgs(self.rounding.bits, "int", True, "channel" if group is None else "group", group)
        inputs = QuantArgs(8, "int", True, "token", dynamic=True) if self.rounding.dynamic else None
        bias = self.tensors.tensor(f"{name}.bias") if f"{name}.bias" in self.tensors else None
        layer = QuantizedLinear(name, weight.shape, QuantScheme(args, inputs), _Codes(weight, scales), scales, bias=bias)
        layer.check()
        return layer


def round_folder(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    rounding: Rounding,
    to: str,
    *,
    disable_names: tuple[str, ...] = (),
    patterns: tuple[str, ...] = (),
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    proof: bool = True,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Round the linears of a float folder and write it as format ``to``, into folder ``out``.

    disable_names   linears that stay float; patterns: the same, as ``fnmatch`` patterns that need not match any

    raises  UsageError, UnreadableError, RefusedError, DestinationError, NotSameError; nothing visible is left at ``out``
    """
    spec, variant, named = find_target(to)
    checkpoint = Rounded(open_checkpoint(Path(model)), rounding, disable_names, patterns)
    settings = Settings(jobs=jobs, max_shard_size=max_shard_size, scale_dtype="keep" if spec.name == "msmodelslim" else None)
    # A probe would read every weight, to find what is so by construction: symmetric, finite, in range.
    plan = Planner(checkpoint, spec, variant, named, settings).plan(probe=False)
    return run(plan, out, overwrite=overwrite, proof=proof, progress=progress)
