"""One layer against one target, from headers alone: the exact moves that carry it, a loss, or a refusal with what to do.

``Fitter`` looks at what a variant holds (``Capabilities``) and nothing else; what only the data can say comes later
(``convert.planning``, ``convert.probe``).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from formats import Checkpoint
from formats.ir import ArrayLike, QuantArgs, QuantizedLinear, QuantScheme, Strategy
from formats.safetensors_file import NAMES
from formats.spec import Capabilities, FormatSpec, InputKind, LayerTarget, Part, Variant, input_kind

from .options import SCALE_DTYPES, TORCH_NAMES, Settings
from .records import HALF_STEP, LayerPlan, Refusal

T = TypeVar("T")

REQUANTIZABLE = frozenset({"bits", "group-size", "act-order", "two-level", "zero-point", "type"})
"""Codes of refusals that rounding the weights anew lifts."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linears that engines fuse into one, by leaf name: their schemes must agree."""


def fused_name(name: str) -> str:
    """What engines call the matrix that linear ``name`` becomes a part of; its own name if it stays alone."""
    parent, _, leaf = name.rpartition(".")
    return next((f"{parent}.{'+'.join(fused)}" for fused in FUSED if leaf in fused), name)


def float_dtype(checkpoint: Checkpoint) -> str:
    """The float dtype of most plain matrices; F16 if there are none."""
    dtypes = Counter(checkpoint.tensors[name].dtype for name in checkpoint.plain_names if len(checkpoint.tensors[name].shape) == 2)
    return next((dtype for dtype, _ in dtypes.most_common() if dtype in {"F16", "BF16", "F32"}), "F16")


class Ledger:
    """What planning found so far: refusals, losses by code with their size and place, and layers worth a note."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.refusals: list[Refusal] = []
        self.errors: dict[str, list[tuple[float, str]]] = defaultdict(list)
        self.both: list[str] = []
        self.odd: list[str] = []

    def refuse(self, code: str, layer: str, needs: str, offers: str, hint: str) -> None:
        self.refusals.append(Refusal(code, layer, needs, f"{self.target} {offers}", hint))

    def lose(self, code: str, error: float, where: str) -> None:
        """Note a loss of a relative size, if it is one."""
        if error:
            self.errors[code].append((error, where))


def _dtype_of(array: ArrayLike | None) -> str | None:
    """Its safetensors dtype name."""
    return None if array is None else NAMES[np.dtype(array.dtype)]


def _scalars_of(layer: QuantizedLinear) -> tuple[Part, ...]:
    """The parts that are stored as one number without dimensions."""
    parts: tuple[tuple[Part, ArrayLike | None], ...] = (("scales", layer.scales), ("zero_points", layer.zero_points))
    return tuple(part for part, array in parts if array is not None and array.shape == ())


@dataclass(frozen=True, slots=True)
class Header:
    """A layer's header facts, light enough to keep for every layer of a model."""

    name: str
    shape: tuple[int, int]
    scheme: QuantScheme
    scale_dtype: str
    bias_dtype: str | None
    has_g_idx: bool
    smooth_dtype: str | None
    scalars: tuple[Part, ...]
    outer_dtype: str | None
    input_dtype: str | None
    derived: tuple[tuple[str, str], ...]
    product_divides: bool = False

    @property
    def inputs(self) -> InputKind | None:
        return input_kind(self.scheme, self.input_dtype is not None)


def header_of(layer: QuantizedLinear, scheme: QuantScheme, derived: tuple[tuple[str, str], ...]) -> Header:
    """A layer's header facts; ``scheme`` is its own, shared with others, ``derived`` what the target would write beside it."""
    return Header(
        layer.name,
        layer.shape,
        scheme,
        _dtype_of(layer.scales) or "F32",
        _dtype_of(layer.bias),
        layer.g_idx is not None,
        _dtype_of(layer.input_smooth),
        _scalars_of(layer),
        _dtype_of(layer.outer),
        _dtype_of(layer.input_scale),
        derived,
        "dequant_scale" in layer.extras,
    )


def _served_as(target: LayerTarget) -> tuple[Any, ...]:
    """What must agree between linears that engines fuse."""
    args = target.scheme.weights
    return args.element, args.bits, target.group_size if args.strategy != "block" else args.block, target.inputs


class Fitter:
    """Compares layers with what a variant holds.

    bits   of the codes, if the user says them; half: the model's half precision; weight_dtype: of dequantized weights
    """

    def __init__(
        self, checkpoint: Checkpoint, spec: FormatSpec, variant: Variant, settings: Settings, ledger: Ledger, half: str, bits: int | None
    ) -> None:
        assert variant.holds is not None
        self.checkpoint, self.spec, self.settings, self.ledger = checkpoint, spec, settings, ledger
        self.holds: Capabilities = variant.holds
        self.dense, self.half, self.bits = self.holds.dequantized, half, bits
        self.weight_dtype = self._weight_dtype() if self.dense else ""
        self._shared: dict[Any, Any] = {}

    def common_group_size(self, headers: list[Header]) -> int | None:
        """The largest group size of the target that divides every layer's groups; -1 per channel; None: each keeps its own."""
        if self.dense or self.holds.mixed_groups or not headers:
            return None
        headers = [header for header in headers if header.inputs is None or not self.holds.inputs]  # others keep their own
        sizes = {header.scheme.weights.group_size for header in headers}
        if sizes == {None} and "channel" in self.holds.strategies:
            return -1
        if not self.holds.group_sizes:
            return -1
        ins = {header.shape[1] for header in headers if header.scheme.weights.group_size is None}
        fits = (size for size in self.holds.group_sizes if all(g % size == 0 for g in sizes if g) and all(k % size == 0 for k in ins))
        return next(fits, None) or min(self.holds.group_sizes)

    def settle(self, header: Header, group_size: int | None) -> LayerPlan:
        """Compare one layer's header with the target: exact moves, or refusals."""
        before = len(self.ledger.refusals)
        plan = self._compare(header, group_size)
        found = self.ledger.refusals[before:]
        if {refusal.code for refusal in found} <= REQUANTIZABLE and self.requantizes(len(found)):
            del self.ledger.refusals[before:]
            return self.requantize(plan, header.scale_dtype)
        return plan

    def requantizes(self, objections: int) -> bool:
        """Whether a layer with so many objections that rounding anew would lift is to be rounded anew."""
        possible = 8 in self.holds.bits and "int" in self.holds.elements and "channel" in self.holds.strategies and not self.dense
        return bool(objections) and possible and "requantize" in self.settings.allow

    def requantize(self, plan: LayerPlan, stored: str) -> LayerPlan:
        """The layer in 8 bits per channel."""
        scheme = QuantScheme(QuantArgs(8), plan.target.scheme.inputs)
        dtype = self._scale_dtype(stored if stored in {"F16", "BF16"} else self.half, True)
        self.ledger.lose("requantize", HALF_STEP, plan.target.name)
        target = replace(plan.target, scheme=self.one(scheme), scale_dtype=dtype, outer_dtype=None)
        return LayerPlan(target, plan.source, (), requantized=True)

    def _compare(self, header: Header, group_size: int | None) -> LayerPlan:
        """The exact moves of a layer into the target, or refusals."""
        name, (out, in_), args, holds = header.name, header.shape, header.scheme.weights, self.holds
        wanted = self._carrier(args.bits)
        if wanted not in holds.bits or args.element not in holds.elements:
            hint = "convert to gptq, which holds 8 bits" if wanted == 8 else "quantize to bits that it holds"
            if args.element != "int":
                hint = "convert to compressed-tensors, which holds FP8, or dense"
            bits = " or ".join(str(bits) for bits in holds.bits)
            self.ledger.refuse("bits", name, f"{wanted}-bit {args.element} codes", f"holds {bits}-bit {'/'.join(holds.elements)}", hint)
        elif wanted < args.bits:
            hint = f"write {args.bits} bits, or quantize again"
            self.ledger.refuse("bits", name, f"{args.bits} bits", f"was asked to hold them in {wanted}, which would clamp every code", hint)
        if out % holds.multiple_of[0] or in_ % holds.multiple_of[1]:
            offers = f"packs multiples of {holds.multiple_of[0]} x {holds.multiple_of[1]}"
            hint = "leave this layer in float when quantizing, or convert to dense"
            self.ledger.refuse("shape-multiple", name, f"[out, in] = {[out, in_]}", offers, hint)
        if name.split(".")[-1] == "lm_head" and not holds.lm_head:
            self.ledger.refuse("lm-head", name, "a quantized lm_head", "keeps lm_head in float", "convert to gptq, or quantize without it")
        inputs = self._inputs(header)
        if not self.dense and ((header.smooth_dtype and not holds.smooth) or (header.outer_dtype is not None and args.element != "int")):
            self.ledger.refuse("two-level", name, "a second level of scales", "has one", "choose another target, or dense")
        if args.actorder and header.has_g_idx and args.actorder not in holds.act_order:
            hint = "convert to gptq, which carries g_idx, or dense"
            self.ledger.refuse("act-order", name, "an irregular g_idx (act order)", "has groups of consecutive inputs only", hint)
        moves, target_args, repeat = self._regroup(header, group_size if inputs is None else None)
        merged = header.outer_dtype is not None and not holds.outer and not self.dense
        moves = (*moves, "merge-scales") if merged else moves
        bias_dtype = None if header.bias_dtype is None else self._bias_dtype(header.bias_dtype, inputs is not None)
        stored = "F32" if merged else header.scale_dtype
        scale_dtype = self._scale_dtype(stored, target_args.strategy == "channel", inputs is not None and target_args.bits == 8)
        input_dtype = None
        if inputs is not None and header.input_dtype is not None:
            input_dtype = self._scale_dtype(header.input_dtype, True, True)
        if args.sparse and self.holds.sparse and input_dtype is not None:
            scale_dtype, input_dtype = stored, header.input_dtype  # deq_scale says the product of both, so neither can be rounded
        elif args.sparse:
            target_args = replace(target_args, sparse=False)
        if not ({"keep", scale_dtype} & set(holds.scale_dtypes)):
            offers = f"stores them in {' or '.join(TORCH_NAMES[dtype] for dtype in holds.scale_dtypes if dtype in TORCH_NAMES)}"
            hint = "leave --scale-dtype out: rounding is measured, and what rounds too much is refused"
            self.ledger.refuse("scale-dtype", name, f"scales in {TORCH_NAMES[scale_dtype]}", offers, hint)
        scheme = self.one(QuantScheme(target_args, inputs))
        outer_dtype = header.outer_dtype if holds.outer else None
        derived = () if inputs is None else header.derived
        smooth_dtype = header.smooth_dtype if holds.smooth else None
        own = self.spec.name == self.checkpoint.format and target_args.strategy == "tensor"
        target = LayerTarget(
            name,
            self.one(header.shape),
            scheme,
            scale_dtype,
            bias_dtype,
            input_dtype,
            outer_dtype,
            derived,
            header.scalars if own else (),
            smooth_dtype,
            header.product_divides and input_dtype in {None, "F32", header.input_dtype},
        )
        return LayerPlan(target, header.scheme, self.one(moves), repeat)

    def _inputs(self, header: Header) -> QuantArgs | None:
        """How the target quantizes the layer's inputs; dropping it is a loss."""
        kind, args = header.inputs, header.scheme.inputs
        if kind is None or args is None:
            return None
        own = self.spec.name == self.checkpoint.format  # which says whatever it said: asymmetric at run time, FP8 by blocks
        usual = args.strategy == "token" and args.symmetric if kind == "dynamic" else args.strategy in {"tensor", "token"}
        fits = args.bits == 8 and args.element in self.holds.elements and (own or usual)
        if fits and kind in self.holds.inputs:
            return args
        if fits and kind == "both" and "static" in self.holds.inputs:
            self.ledger.both.append(header.name)
            return replace(args, dynamic=False, strategy="tensor", symmetric=False)
        self.ledger.lose("activations-dropped", 1.0, header.name)
        return None

    def one(self, value: T) -> T:
        """``value``, as one object for all layers that have an equal one: a model may have tens of thousands."""
        found: T = self._shared.setdefault(value, value)
        return found

    def _regroup(self, header: Header, group_size: int | None) -> tuple[tuple[str, ...], QuantArgs, int]:
        """(moves, target's weight args, how often each stored group is repeated)."""
        args, in_ = header.scheme.weights, header.shape[1]
        if self.dense:
            return ("dequantize",), args, 1
        # One scale of a whole tensor is kept where inputs are quantized too, or the format was the source's; engines' kernels for
        # weights alone want one per channel.
        source_format = self.spec.name == self.checkpoint.format and not self.holds.mixed_groups
        whole = args.strategy == "tensor" and (header.inputs is not None or source_format)
        kept = args.strategy in self.holds.strategies and (args.element != "int" or whole)
        if kept or args.element != "int":
            if not kept:
                hint = "convert to dense"
                self.ledger.refuse("group-size", header.name, f"{args.element} scales per {args.strategy}", "does not have those", hint)
            return ("repack",), args, 1
        own = args.group_size or in_
        group_size = (args.group_size or -1) if group_size is None else group_size
        wanted = in_ if group_size == -1 else group_size
        if own % wanted or (args.actorder == "group" and own != wanted):
            sizes = ", ".join(str(size) for size in self.holds.group_sizes)
            offers = f"has groups of {sizes}, one size for all layers"
            hint = "quantize with a group size that it takes, or convert to dense"
            if not sizes:
                offers = "has one scale per channel"
                hint = "exact are gptq, awq and compressed-tensors; --allow requantize rounds it anew to 8 bits per channel, measured"
            self.ledger.refuse("group-size", header.name, f"groups of {own} inputs", offers, hint)
            return (), args, 1
        moves = ["repack", "rebase-zero-point"]
        if own != wanted:
            moves.append("split-groups" if args.strategy == "group" else "repeat-scales")
        elif args.strategy == "tensor":
            moves.append("repeat-scales")
        if self.holds.act_order and not header.has_g_idx and "g_idx" not in self.holds.omits:
            moves.append("spell-g_idx")
        carrier = self._carrier(args.bits)
        if carrier > args.bits:
            moves.append("widen-codes")
        per_channel = header.inputs is not None and wanted == in_ and "channel" in self.holds.strategies and not self.holds.mixed_groups
        strategy: Strategy = "channel" if group_size == -1 or per_channel else "group"
        size = None if strategy == "channel" else group_size
        order = args.actorder if args.actorder in self.holds.act_order else None
        target = replace(args, bits=carrier, strategy=strategy, group_size=size, actorder=order)
        return tuple(moves), target, own // wanted

    def _weight_dtype(self) -> str:
        """dense: the dtype of its weights: asked for, or the model's own."""
        if self.settings.scale_dtype is not None:
            return SCALE_DTYPES.get(self.settings.scale_dtype, "F32")
        return float_dtype(self.checkpoint)

    def _carrier(self, bits: int) -> int:
        """Bits that codes are stored in: those asked for, else the fewest that the target has and that hold them."""
        return self.bits or min((held for held in self.holds.bits if held >= bits), default=bits)

    def _scale_dtype(self, stored: str, per_channel: bool = False, has_inputs: bool = False) -> str:
        if self.dense:
            return self.weight_dtype
        if self.settings.serve_dtype is not None and per_channel:
            return SCALE_DTYPES[self.settings.serve_dtype]
        if self.settings.scale_dtype == "keep":
            return stored
        if self.settings.scale_dtype is not None:
            return SCALE_DTYPES[self.settings.scale_dtype]
        wanted = self.holds.scale_dtypes[0]
        if wanted in {"model", "half"}:
            return self.half if stored == "F32" and not (wanted == "half" and has_inputs) else stored
        return stored if wanted == "keep" else wanted

    def _bias_dtype(self, stored: str, has_inputs: bool) -> str:
        wanted = stored if self.dense else self._scale_dtype(stored, has_inputs=has_inputs)
        return stored if wanted == "F32" else wanted

    def check_fused(self, layers: list[LayerPlan]) -> None:
        """q/k/v and gate/up become one matrix in the engines: all quantized alike, or none."""
        if not self.holds.fused_alike:
            return
        quantized = {layer.target.name: layer.target for layer in layers}
        others = {name[: -len(".weight")] for name in self.checkpoint.plain_names if name.endswith(".weight")}
        for name, target in quantized.items():
            parent, _, leaf = name.rpartition(".")
            for fused in FUSED:
                if leaf not in fused:
                    continue
                siblings = [f"{parent}.{other}" for other in fused if other != leaf]
                for sibling in siblings:
                    if sibling in others or (sibling in quantized and _served_as(quantized[sibling]) != _served_as(target)):
                        found = "is float" if sibling in others else f"is {str(quantized[sibling].scheme).replace(' asym', '')}"
                        needs = f"its own scheme while {sibling.rpartition('.')[2]} {found}"
                        if self.spec.name == self.checkpoint.format and not self.holds.for_engine:
                            self.ledger.odd.append(f"{name} {needs.removeprefix('its own scheme ')}")
                            break
                        hint = f"quantize or roll back {' and '.join(fused)} together, or convert to dense"
                        self.ledger.refuse("fused", name, needs, "is served with both fused into one matrix", hint)
                        break
