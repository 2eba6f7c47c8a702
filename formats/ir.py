"""The canonical quantized-tensor representation (IR): what every checkpoint format spells in its own way.

One law, in ``torch.nn.Linear`` orientation, says what a quantized layer is::

    w[o, i] = outer[o] * scales[o, g(i)] * (value(codes[o, i]) - zero_points[o, g(i)]) * input_smooth[i]
    y[o] = sum_i w[o, i] * x[i] + bias[o]

It is computed in float32, ``float32(scale) * (value - zero)``, with one rounding per product. Where a tool divides by its
outer scale (NVFP4), ``outer_divides`` says so, and the law does too.
``g(i)`` is ``g_idx[i]`` where there is one, else ``i // group_size``; for block schemes the scale's
row is ``o // block[0]`` as well. ``dequantize`` below is that law, written plainly; every kernel,
reader and writer is tested against it.

Axis names used everywhere: ``out`` (output features, N), ``in`` (input features, K), ``groups``.
Integer codes live in the signed domain, ``[-2**(bits-1), 2**(bits-1) - 1]``; formats that store them unsigned add
``2**(bits-1)`` in their layouts. Zero points live in the same domain plus one: GPTQ v1 read without a mask can say
``2**(bits-1)``. Float elements (FP8, FP4, NF4) keep their bit pattern in ``codes`` as uint8.

Conventions that the fields alone do not say:

- ``input_scale`` quantizes ``x * input_smooth``: smoothing comes first.
- Static input scales beside ``inputs.dynamic`` (msModelSlim W8A8_MIX) serve a mode in which the engine does not measure them.
- Where a file has no weight scale (W8A8S; static W8A8 of msModelSlim V1 and Golden Stick), the reader derives it in float32 as
  ``deq_scale / input_scale`` and keeps the stored tensor as a *derived* extra, so that it can be written back as it was.
- A stored bias into which a tool merged a zero-point correction (Golden Stick 0.6) is taken apart; the original stays an extra.
- Scales per time step (W8A8_TIMESTEP) are a *functional* extra: ``input_scale`` holds one scale, or one per input.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from .errors import RefusedError, UnreadableError
from .regions import Array, Region, assemble
from .workspace import Workspace

__all__ = [
    "E2M1_VALUES", "NF4_VALUES", "ActOrder", "Array", "ArrayLike", "AttentionQuant", "Element", "Extra", "LazyArray", "PlainTensor",
    "QuantArgs", "QuantScheme", "QuantizedLinear", "Region", "Strategy", "as_grid", "assemble", "check_grid", "dequantize",
    "element_values", "read", "scale_grid", "unknowable",
]  # fmt: skip

Element = Literal["int", "e4m3", "e5m2", "e2m1", "nf4"]
Strategy = Literal["tensor", "channel", "group", "block", "token"]
ActOrder = Literal["group", "static"]

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
"""FP4 (E2M1) values by code, as the OCP Microscaling specification 1.0 lists them; bit 3 is the sign."""

NF4_VALUES = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=np.float32,
)  # fmt: skip
"""NormalFloat4 values by code (Dettmers et al., QLoRA, appendix E)."""


@runtime_checkable
class LazyArray(Protocol):
    """A 2-D array that is read in rectangles; NumPy arrays are accepted wherever one is."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        """The rectangle ``[rows, cols]`` as a NumPy array, which may be one of ``work``."""
        ...


ArrayLike = Array | LazyArray


def read(array: ArrayLike, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
    """``array[rows, cols]`` (of a vector its rows), whether it is lazy or a NumPy array; ``work`` may hold the result."""
    if isinstance(array, np.ndarray):
        return array[rows, cols] if array.ndim == 2 else array[rows] if array.ndim else array
    return array.read(rows, cols, work)


@dataclass(frozen=True, slots=True)
class QuantArgs:
    """How one operand (weights, inputs or outputs) is quantized; compressed-tensors' vocabulary.

    bits          stored bits of a code
    element       what a code means: an integer or a small float
    symmetric     no zero point (it is exactly 0)
    strategy      what shares a scale: the tensor, an output channel, a group of inputs, a 2-D block, a token
    group_size    inputs per group (strategy "group")
    block         (out, in) extent of a block (strategy "block")
    actorder      None; "group": columns were sorted, g_idx is irregular; "static": groups kept their order
    dynamic       scales are computed at run time (activations)
    sparse        made so that most codes are small, for an engine that compresses them; it says nothing of the law
    """

    bits: int
    element: Element = "int"
    symmetric: bool = True
    strategy: Strategy = "channel"
    group_size: int | None = None
    block: tuple[int, int] | None = None
    actorder: ActOrder | None = None
    dynamic: bool = False
    sparse: bool = False


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """What was quantized in a layer, to how many bits, in which groups. Frozen; equal if its JSON is."""

    weights: QuantArgs
    inputs: QuantArgs | None = None
    outputs: QuantArgs | None = None

    def to_json(self) -> str:
        """The scheme as compact JSON with sorted keys; ``from_json`` restores an equal scheme."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> QuantScheme:
        def args(value: dict[str, Any] | None) -> QuantArgs | None:
            if value is None:
                return None
            return QuantArgs(**{**value, "block": tuple(value["block"]) if value["block"] else None})

        parts = json.loads(text)
        weights = args(parts["weights"])
        if weights is None:
            raise UnreadableError("a scheme without weights: its JSON lacks the key 'weights'")
        return cls(weights, args(parts["inputs"]), args(parts["outputs"]))

    def __str__(self) -> str:
        """Short form for people: ``W4A16 g128 sym``."""
        w, a = self.weights, self.inputs
        kind = ("" if w.element == "int" else f" {w.element}") + (" sparse" if w.sparse else "")
        where = {"group": f"g{w.group_size}", "block": f"block {w.block}"}.get(w.strategy, f"per {w.strategy}")
        order = f" act-order({w.actorder})" if w.actorder else ""
        acts = "" if a is None else (" dynamic" if a.dynamic else " static")
        return f"W{w.bits}A{16 if a is None else a.bits}{kind} {where} {'sym' if w.symmetric else 'asym'}{order}{acts}"


ExtraKind = Literal["derived", "functional", "provenance"]


@dataclass(frozen=True, slots=True)
class Extra:
    """A tensor that a format keeps beside the law.

    derived       can be recomputed from the law (quant_bias, deq_scale, scale_bias)
    functional    changes what the model computes (rotations, low-rank parts): a target that cannot say it refuses
    provenance    says how it came to be (smoothing strengths, observer ranges)
    """

    kind: ExtraKind
    value: ArrayLike


@dataclass(frozen=True)
class QuantizedLinear:
    """One quantized linear layer: lazily readable codes and the small tensors that give them meaning.

    name               canonical unfused Hugging Face module path
    shape              (out, in)
    codes              [out, in] int8, or uint8 bit patterns for float elements
    scales             as stored: [1], [out], [out, 1], [out, groups], or [out/r, in/c] for blocks; its dtype kept
    zero_points        like scales, integral, signed domain; None means exactly 0
    outer              None, [1], [out, 1] or [out, ceil(in / outer_size)]: the outer level of two-level schemes
    outer_size         inputs that share an outer scale; None: all
    outer_divides      the tool divides by outer instead of multiplying
    g_idx              [in] group of each input; None means ``i // group_size``
    bias               [out] or None
    input_scale        [1] or [in]; input_zero_point the same: static activation quantization
    input_smooth       [in] or None: multiplies x at run time, so it is part of the law
    regions            where the codes lie in the stored tensors, if not alone in one; several for tensor-parallel ranks
    extras             namespaced tensors beside the law
    """

    name: str
    shape: tuple[int, int]
    scheme: QuantScheme
    codes: ArrayLike
    scales: ArrayLike
    zero_points: ArrayLike | None = None
    outer: ArrayLike | None = None
    outer_size: int | None = None
    outer_divides: bool = False
    g_idx: Array | None = None
    bias: ArrayLike | None = None
    input_scale: Array | None = None
    input_zero_point: Array | None = None
    input_smooth: Array | None = None
    regions: tuple[Region, ...] = ()
    extras: Mapping[str, Extra] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[int, int]:
        """(rows, columns) of the grid that scales broadcast to: (out, groups), or block counts."""
        w, (out, in_) = self.scheme.weights, self.shape
        if w.strategy == "block":
            if w.block is None:
                raise UnreadableError(f"{self.name}: a block scheme without its block extent")
            return -(-out // w.block[0]), -(-in_ // w.block[1])
        if w.strategy == "group":
            if not w.group_size or w.group_size < 1:
                raise UnreadableError(f"{self.name}: a group scheme without a positive group size")
            return out, -(-in_ // w.group_size)
        return out, 1

    def grid(self, which: Literal["scales", "zero_points"], rows: slice = slice(None)) -> Array:
        """``scales`` or ``zero_points`` broadcast to ``[out, groups]`` (``[out/r, in/c]`` for blocks), rows cut out."""
        array = self.scales if which == "scales" else self.zero_points
        if array is None:
            raise UnreadableError(f"{self.name}: {which} were asked for and the layer has none")
        return as_grid(self.name, which, array, self.groups, rows)

    def group_of(self) -> Array:
        """[in] int32: the group of every input column. Read-only, computed once."""
        return self._group_of

    @functools.cached_property
    def _group_of(self) -> Array:
        w, in_ = self.scheme.weights, self.shape[1]
        if self.g_idx is not None:
            return np.asarray(self.g_idx, dtype=np.int32)
        if w.strategy == "group":
            assert w.group_size is not None
            return np.arange(in_, dtype=np.int32) // np.int32(w.group_size)
        if w.strategy == "block":
            assert w.block is not None
            return np.arange(in_, dtype=np.int32) // np.int32(w.block[1])
        return np.zeros(in_, dtype=np.int32)

    def check(self) -> None:
        """Raise ``UnreadableError`` if the parts' shapes do not fit one another.

        Values are not looked at: what only the data can say is probed by the plan.
        """
        out, in_ = self.shape
        if not (out and in_):
            raise UnreadableError(f"{self.name}: has shape [out, in] = {[out, in_]}; a layer without weights is none")
        if tuple(self.codes.shape) != self.shape:
            raise UnreadableError(f"{self.name}: codes have shape {tuple(self.codes.shape)}, wanted {self.shape}")
        check_grid(self.name, "scales", tuple(self.scales.shape), self.groups)
        if self.zero_points is not None:
            check_grid(self.name, "zero_points", tuple(self.zero_points.shape), self.groups)
        for what, vector, length in (
            ("g_idx", self.g_idx, in_),
            ("bias", self.bias, out),
            ("input_smooth", self.input_smooth, in_),
        ):
            if vector is not None and tuple(vector.shape) != (length,):
                raise UnreadableError(f"{self.name}: {what} has shape {vector.shape}, wanted ({length},)")
        for what, vector in (("input_scale", self.input_scale), ("input_zero_point", self.input_zero_point)):
            if vector is not None and vector.shape not in {(1,), (in_,)}:
                raise UnreadableError(f"{self.name}: {what} has shape {vector.shape}, wanted (1,) or ({in_},)")
        if self.outer is not None:
            count = 1 if self.outer_size is None else -(-in_ // self.outer_size)
            wanted = {(1,)} if self.scheme.weights.strategy == "block" else {(1,), (out, count)}
            if tuple(self.outer.shape) not in wanted:
                raise UnreadableError(f"{self.name}: outer has shape {tuple(self.outer.shape)}, wanted one of {sorted(wanted)}")
            if count > 1 and (self.scheme.weights.group_size is None or (self.outer_size or 1) % self.scheme.weights.group_size):
                raise UnreadableError(f"{self.name}: an outer scale for every {self.outer_size} inputs splits its groups")


@dataclass(frozen=True)
class AttentionQuant:
    """Quantization of what attention keeps or multiplies: the KV cache, or FAQuant's q, k, v and p (the probabilities).

    The law of one operand: ``x = (code - zero_point) * scale + offset``.

    name           the attention module's path
    target         "kv_cache" or "fa" (quantized inside attention)
    args           per operand: its bits and element (FAQuant may keep q and k in int8 and v in FP8)
    scales         per operand ("key", "value", "query", "probability"); absent for dynamic operands: [1], [heads, 1] or [heads * head_dim]
    zero_points    like scales, signed domain; absent means 0
    offsets        like scales, real valued (LMDeploy's midpoint); absent means 0
    rope           whether the statistics were taken "before" or "after" the rotary embedding; None if unknown
    """

    name: str
    target: Literal["kv_cache", "fa"]
    args: Mapping[str, QuantArgs]
    scales: Mapping[str, Array]
    zero_points: Mapping[str, Array] = field(default_factory=dict)
    offsets: Mapping[str, Array] = field(default_factory=dict)
    rope: Literal["before", "after"] | None = None

    def dequantize(self, operand: str, codes: Array) -> Array:
        """float32 values of ``codes`` (signed int8, or uint8 bit patterns) whose last axis broadcasts against the scales."""
        value = (element_values(codes, self.args[operand].element) - _f32(self.zero_points.get(operand, 0))) * _f32(self.scales[operand])
        return np.asarray(value + _f32(self.offsets.get(operand, 0)), dtype=np.float32)

    def check(self) -> None:
        """Raise ``UnreadableError`` if an operand lacks its scale or arguments, or its parts' shapes disagree."""
        for operand, args in self.args.items():
            if operand not in self.scales and not args.dynamic:
                raise UnreadableError(f"{self.name}: {operand} is quantized statically but has no scale")
        for operand, scale in self.scales.items():
            if operand not in self.args:
                raise UnreadableError(f"{self.name}: {operand} has a scale but no arguments")
            for what, parts in (("zero point", self.zero_points), ("offset", self.offsets)):
                if operand in parts and parts[operand].shape != scale.shape:
                    raise UnreadableError(f"{self.name}: {operand} has {what}s of shape {parts[operand].shape}, wanted {scale.shape}")
        if stray := (set(self.zero_points) | set(self.offsets)) - set(self.scales):
            raise UnreadableError(f"{self.name}: {min(stray)} has a zero point or offset but no scale")


@dataclass(frozen=True)
class PlainTensor:
    """A tensor that is carried, not interpreted: embeddings, norms, biases, layers left in float.

    transform names an invertible change of spelling ("identity": bytes verbatim; "transpose"); regions say where the tensor
    lies if it shares stored tensors with others (a fused float qkv).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: ArrayLike
    transform: Literal["identity", "transpose"] = "identity"
    regions: tuple[Region, ...] = ()


def check_grid(name: str, which: str, shape: tuple[int, ...], grid: tuple[int, int]) -> None:
    """UnreadableError if an array of ``shape`` does not broadcast to ``grid`` as scales may."""
    if shape not in {grid, (), (1,), (1, 1), (grid[0],), (grid[0], 1)}:
        raise UnreadableError(
            f"{name}: {which} have shape {shape}, which does not broadcast to [out, groups] = {list(grid)}; "
            "the file contradicts its own shapes"
        )


def as_grid(name: str, which: str, array: ArrayLike, grid: tuple[int, int], rows: slice = slice(None)) -> Array:
    """``array`` (any of the stored shapes) broadcast to ``grid``, with only ``rows`` of it, as a view where possible."""
    shape = tuple(array.shape)
    check_grid(name, which, shape, grid)
    if shape == grid:
        return read(array, rows)
    count = len(range(*rows.indices(grid[0])))
    if len(shape) == 2 and shape[0] == grid[0]:
        return np.broadcast_to(read(array, rows), (count, grid[1]))
    whole = np.asarray(array if isinstance(array, np.ndarray) else array.read())
    column = whole.reshape(1, 1) if whole.size == 1 else whole[rows].reshape(-1, 1)
    return np.broadcast_to(column, (count, grid[1]))


def element_values(codes: Array, element: Element) -> Array:
    """float32 ``value(codes)``: integers as they are, float elements by their bit pattern."""
    if element == "int":
        return codes.astype(np.float32)
    table = value_table(element)
    if len(table) == 16 and codes.size and int(codes.max()) > 15:
        raise UnreadableError(f"a 4-bit {element} code is {int(codes.max())}, wanted 0 to 15")
    return np.asarray(table[codes.view(np.uint8)])


@functools.cache
def value_table(element: Element) -> Array:
    """float32 value of every bit pattern of a float element: [256], or [16] of one with 4 bits. Read-only."""
    if element in {"e2m1", "nf4"}:
        table = E2M1_VALUES if element == "e2m1" else NF4_VALUES
    else:
        dtype: Any = ml_dtypes.float8_e4m3fn if element == "e4m3" else ml_dtypes.float8_e5m2
        table = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    table.flags.writeable = False
    return table


def dequantize(layer: QuantizedLinear, rows: slice = slice(None), cols: slice = slice(None), codes: Array | None = None) -> Array:
    """The law: float32 weights ``[rows, cols]`` of ``layer``. Plain NumPy, the reference for every kernel.

    codes   the rectangle's codes, if they were read already
    """
    w = layer.scheme.weights
    row_index = np.arange(layer.shape[0])[rows]
    group_row = row_index // w.block[0] if w.strategy == "block" and w.block else row_index
    group = layer.group_of()[cols]
    value = element_values(np.ascontiguousarray(read(layer.codes, rows, cols) if codes is None else codes), w.element)
    if layer.zero_points is not None:
        value = value - _f32(layer.grid("zero_points"))[np.ix_(group_row, group)]
    scale = scale_grid(layer)[np.ix_(group_row, group)]
    weight = scale * value
    if layer.input_smooth is not None:
        weight = weight * _f32(layer.input_smooth)[cols]
    return np.asarray(weight, dtype=np.float32)


def scale_grid(layer: QuantizedLinear, rows: slice = slice(None)) -> Array:
    """float32 ``[out, groups]`` scales with the outer level taken in: ``outer * scales``, or ``scales / outer``."""
    scale = _f32(layer.grid("scales", rows))
    if layer.outer is None:
        return scale
    outer = _f32(layer.outer if isinstance(layer.outer, np.ndarray) else layer.outer.read())
    if outer.shape != (1,):
        size = layer.outer_size or layer.shape[1]
        first_input = np.arange(layer.groups[1]) * (layer.scheme.weights.group_size or 0)
        outer = outer[rows][:, first_input // size]
    return np.asarray(scale / outer if layer.outer_divides else outer * scale, dtype=np.float32)


def unknowable(name: str, found: str, why: str) -> RefusedError:
    """The refusal for a stored layer whose weights the file itself does not determine."""
    return RefusedError(f"{name}: {found} cannot be dequantized, since {why}; quantize it again from the float weights")


def _f32(array: Any) -> Array:
    return np.asarray(array).astype(np.float32)
