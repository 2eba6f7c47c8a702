"""Plan a conversion from headers: what each layer needs, what the target offers, and what every output file will be.

This is the only place where a layer is compared with a target. For each layer the result is exact moves, a loss with a code
and a measured bound, or a refusal that names the layer, what it needs, what the target offers and what to do. What headers
cannot say (zero points, scales that overflow) is settled by ``probe``, which reads only the small tensors.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from formats import Checkpoint, find_format, open_checkpoint
from formats.checkpoint import Location, float_linears, float_matrices, modules_in_every_block, zeros_reading
from formats.derived import bias_error, contradiction
from formats.errors import RefusedError, UnreadableError, UsageError
from formats.ir import ArrayLike, QuantArgs, QuantizedLinear, QuantScheme, Strategy, read
from formats.layouts import expect_work
from formats.safetensors_file import DEFAULT_SHARD_BYTES, DTYPES, NAMES, OutputFile, lay_out
from formats.spec import Capabilities, FormatSpec, InputKind, LayerTarget, ModelFacts, Variant, input_kind

from .matrices import scales_of
from .memory import DEFAULT_MEMORY, header_bytes, share
from .probe import Cast, Facts, check_codes, measure_cast, zero_range
from .records import HALF_STEP, LOSSES, LayerPlan, Loss, Plan, Refusal, model_config

T = TypeVar("T")
SCALE_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
TORCH_NAMES = {name: torch for torch, name in SCALE_DTYPES.items()}

REQUANTIZABLE = frozenset({"bits", "group-size", "act-order", "two-level", "zero-point", "type"})
"""Codes of refusals that rounding the weights anew lifts."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linears that engines fuse into one, by leaf name: their schemes must agree."""


def plan(
    src: str | os.PathLike[str],
    to: str,
    *,
    base_model: str | os.PathLike[str] | None = None,
    allow: Iterable[str] = (),
    strict: bool = False,
    scale_dtype: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    jobs: int | None = None,
    max_memory: int = DEFAULT_MEMORY,
    probe: bool = True,
    description: str | os.PathLike[str] | None = None,
    serve_dtype: str | None = None,
    gptq_zeros: str | None = None,
    consumer: str | None = None,
) -> Plan:
    """Decide how ``src`` becomes format ``to``; reads headers, and with ``probe`` the small tensors; writes nothing.

    to             "awq", "gptq", "gptq:v1", "dense", ...
    base_model     folder with config.json and tokenizer; None: beside the source
    allow          loss codes (``LOSSES``) that may happen beyond those done by default
    strict         refuse every loss, rounding too
    scale_dtype    "keep", "float16", "bfloat16", "float32"; None: what the target's loaders want
    serve_dtype    msmodelslim only: "float16" or "bfloat16", in which the NPU will compute: the dtype of per-channel scales
    gptq_zeros     "mask", "plain" or "carry": how the top lane of GPTQ v1 zero points is read; None: as the file's writer meant it
    consumer       what will load the folder ("vllm", "vllm-ascend", "mindie", ...): its dialect of the format is written, and what it
                   requires and would not find is refused
    max_shard_size bytes of tensor data per output file; jobs: worker threads (None: the CPUs that may be used)
    max_memory     bytes of anonymous memory that the conversion may use over the bare interpreter; fewer workers run if it is little
    raises         UsageError, UnreadableError; refusals are in the plan, not raised
    """
    spec, variant, named = find_format(to)
    if consumer is not None:
        from .consumers import CONSUMERS

        if consumer not in CONSUMERS:
            raise UsageError(f"--for {consumer}: there is no such consumer; there are {', '.join(CONSUMERS)}")
        dialect = spec.variant(consumer)
        variant, named = (dialect, True) if dialect is not None and not named else (variant, named)
    if spec.outputs is None or variant.holds is None:
        raise RefusedError(f"{spec.name}:{variant.name} can be read, but not written yet; `weighbridge formats` says what can")
    unknown = [code for code in allow if code not in LOSSES]
    if unknown:
        raise UsageError(f"--allow {unknown[0]}: there is no such loss; codes are {', '.join(LOSSES)}")
    if scale_dtype not in {None, "keep", *SCALE_DTYPES}:
        raise UsageError(f"--scale-dtype {scale_dtype}: wanted keep, {', '.join(SCALE_DTYPES)}")
    if serve_dtype not in {None, "float16", "bfloat16"} or (serve_dtype is not None and "keep" not in variant.holds.scale_dtypes):
        raise UsageError(f"--serve-dtype {serve_dtype}: wanted float16 or bfloat16, with --to msmodelslim")
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs}: wanted 1 or more")
    if max_shard_size < 1:
        raise UsageError(f"--max-shard-size {max_shard_size}: wanted a positive number of bytes")
    base = Location.of(base_model) if base_model is not None else None
    if base is not None and "config.json" not in base.names:
        raise UnreadableError(f"{base.folder.name}: --base-model has no config.json; point at the float model's folder")
    with _no_cyclic_collection():
        checkpoint = open_checkpoint(Location.of(src, description, base, zeros_reading(gptq_zeros)))
        planner = Planner(
            checkpoint,
            spec,
            variant,
            named,
            tuple(allow),
            strict,
            scale_dtype,
            jobs or available_cpus(),
            serve_dtype=serve_dtype,
            max_memory=max_memory,
            base=base,
        )
        found = planner.plan(base, max_shard_size, probe)
    if consumer is not None and not found.refusals:
        from .checking import unmet_by

        found.refusals += unmet_by(found, consumer)
    return found


@contextlib.contextmanager
def _no_cyclic_collection() -> Iterator[None]:
    """Headers of 190,000 tensors are a million objects without a cycle: going through them again and again is a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def available_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _dtype_of(array: ArrayLike | None) -> str | None:
    """Its safetensors dtype name."""
    return None if array is None else NAMES[np.dtype(array.dtype)]


@dataclass(frozen=True, slots=True)
class _Header:
    """A layer's header facts, light enough to keep for every layer of a model."""

    name: str
    shape: tuple[int, int]
    scheme: QuantScheme
    scale_dtype: str
    bias_dtype: str | None
    has_g_idx: bool
    smoothed: bool
    outer_dtype: str | None
    input_dtype: str | None
    derived: tuple[tuple[str, str], ...]

    @property
    def inputs(self) -> InputKind | None:
        return input_kind(self.scheme, self.input_dtype is not None)


def _served_as(target: LayerTarget) -> tuple[Any, ...]:
    """What must agree between linears that engines fuse."""
    args = target.scheme.weights
    return args.element, args.bits, target.group_size if args.strategy != "block" else args.block, target.inputs


class Planner:
    """One planning run: the source, the target, what may happen, and what was found so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: FormatSpec,
        variant: Variant,
        named: bool,
        allow: tuple[str, ...],
        strict: bool,
        scale_dtype: str | None,
        jobs: int,
        bits: int | None = None,
        hints: Mapping[str, str] = MappingProxyType({}),
        serve_dtype: str | None = None,
        max_memory: int = DEFAULT_MEMORY,
        base: Location | None = None,
    ) -> None:
        assert variant.holds is not None
        self.checkpoint, self.spec, self.variant, self.named = checkpoint, spec, variant, named
        self.holds: Capabilities = variant.holds
        self.allow, self.strict, self.scale_dtype, self.jobs = allow, strict, scale_dtype, jobs
        self.refusals: list[Refusal] = []
        self.notes: list[str] = []
        self.both: list[str] = []
        self.odd: list[str] = []
        self._shared: dict[Any, Any] = {}
        self.errors: dict[str, list[tuple[float, str]]] = defaultdict(list)
        self.dense = self.holds.dequantized
        self.bits, self.hints, self.serve_dtype, self.max_memory = bits, hints, serve_dtype, max_memory
        config = model_config(checkpoint, base) or {}
        self.half = "BF16" if "bfloat16" in {config.get("torch_dtype"), config.get("dtype")} else "F16"
        self.weight_dtype = self._weight_dtype() if self.dense else ""
        alike = spec.name == checkpoint.format  # a cache's scales have a spelling in their own format only
        self.attention = tuple(name for name in checkpoint.attention if alike and ".fa_" not in name)

    def plan(self, base: Location | None, max_shard_size: int, probe: bool) -> Plan:
        self._refuse_unreadable_parts()
        headers = self._headers()
        group_size = self._common_group_size(headers)
        layers = [self._settle(header, group_size) for header in headers]
        del headers
        self._check_fused(layers)
        self._check_left_out(probe)
        expect_work(sum(layer.target.shape[0] * layer.target.shape[1] for layer in layers))
        facts = self._probe(layers) if probe else {}  # refused or not: an unreadable source is said first
        layers = [self._apply(layer, facts[layer.target.name]) if facts else layer for layer in layers]
        self._choose_variant(facts)
        losses = self._judge_losses()
        by_name = {layer.target.name: layer for layer in layers}
        plain = [*(name for kind, name in self.checkpoint.entries if kind == "plain"), *self.attention]
        targets = tuple(layer.target for layer in layers)
        model = ModelFacts(
            targets,
            tuple(self._left_in_float(by_name)),
            self._model_dtype(layers),
            self.checkpoint.entries,
            tuple(float_matrices(self.checkpoint)),
            self.attention,
            self.checkpoint.said,
        )
        files: list[OutputFile] = []
        if not self.refusals:
            files = lay_out(self._tensors(by_name), max_shard_size, self.spec.stem(model, self.variant.name))
        self._note(layers, base, model)
        options = {
            "allow": sorted(self.allow),
            "strict": self.strict,
            "scale_dtype": self.scale_dtype or "default",
            "serve_dtype": self.serve_dtype or "default",
            "max_shard_size": max_shard_size,
        }
        outputs = sum(len(file.tensors) for file in files)
        memory = share(self.max_memory, self.jobs, header_bytes(self.checkpoint.tensors, len(layers), outputs))
        return Plan(
            self.checkpoint, self.spec, self.variant, layers, plain, files, losses, self.refusals, self.notes,
            model, base, self.allow, bool(probe), memory, options,
        )  # fmt: skip

    def _refuse(self, code: str, layer: str, needs: str, offers: str, hint: str) -> None:
        self.refusals.append(Refusal(code, layer, needs, f"{self.spec.name}:{self.variant.name} {offers}", hint))

    def _refuse_unreadable_parts(self) -> None:
        for part in self.checkpoint.unsupported:
            self._refuse("type", part.name, f"the type {part.type}", "is not reached from it yet", part.why)
        for tensor in self.checkpoint.functional:
            hint = "convert a checkpoint that was quantized without rotation or low-rank parts"
            self._refuse("functional", tensor, "a step of its own at run time", "has no slot for it", hint)
        for tensor in self.checkpoint.attention:
            if tensor not in self.attention:
                cache = ".kv_cache_" in tensor or tensor.endswith(("k_scale", "v_scale"))
                self.errors["kv-cache-dropped" if cache else "attention-dropped"].append((1.0, tensor))
        if not self.checkpoint.layer_names and not self.checkpoint.unsupported:
            hint = "there is nothing to convert: copy the folder, or quantize it first"
            self._refuse("nothing", self.checkpoint.location.folder.name, "a quantized layer", "holds quantized layers", hint)

    def _headers(self) -> list[_Header]:
        """What the comparison needs of every layer; nothing that holds on to its tensors."""
        schemes: dict[QuantScheme, QuantScheme] = {}
        headers = []
        for name in self.checkpoint.layer_names:
            layer = self.checkpoint.layer(name)
            scheme = schemes.setdefault(layer.scheme, layer.scheme)
            has_scale = layer.input_scale is not None
            asked = None if self.serve_dtype is None else SCALE_DTYPES[self.serve_dtype]
            model_dtype = asked if "deq_scale" in layer.extras else asked or self.half
            headers.append(
                _Header(
                    name, layer.shape, scheme, _dtype_of(layer.scales) or "F32", _dtype_of(layer.bias), layer.g_idx is not None,
                    layer.input_smooth is not None, _dtype_of(layer.outer), _dtype_of(layer.input_scale),
                    self._one(self.spec.derived(layer, input_kind(layer.scheme, has_scale), model_dtype)),
                )
            )  # fmt: skip
            for part, extra in layer.extras.items():
                if extra.kind == "functional":
                    self.checkpoint.functional.append(f"{name}.{part}")
        return headers

    def _common_group_size(self, headers: list[_Header]) -> int | None:
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

    def _settle(self, header: _Header, group_size: int | None) -> LayerPlan:
        """Compare one layer's header with the target: exact moves, or refusals."""
        before = len(self.refusals)
        plan = self._compare(header, group_size)
        if {refusal.code for refusal in self.refusals[before:]} <= REQUANTIZABLE and self._requantizes(len(self.refusals) - before):
            del self.refusals[before:]
            return self._requantize(plan, header.scale_dtype)
        return plan

    def _requantizes(self, objections: int) -> bool:
        """Whether a layer with so many objections that rounding anew would lift is to be rounded anew."""
        possible = 8 in self.holds.bits and "int" in self.holds.elements and "channel" in self.holds.strategies and not self.dense
        return bool(objections) and possible and "requantize" in self.allow

    def _requantize(self, plan: LayerPlan, stored: str) -> LayerPlan:
        """The layer in 8 bits per channel."""
        scheme = QuantScheme(QuantArgs(8), plan.target.scheme.inputs)
        dtype = self._scale_dtype(stored if stored in {"F16", "BF16"} else self.half, True)
        self.errors["requantize"].append((HALF_STEP, plan.target.name))
        target = replace(plan.target, scheme=self._one(scheme), scale_dtype=dtype, outer_dtype=None)
        return LayerPlan(target, plan.source, (), requantized=True)

    def _compare(self, header: _Header, group_size: int | None) -> LayerPlan:
        """The exact moves of a layer into the target, or refusals."""
        name, (out, in_), args, holds = header.name, header.shape, header.scheme.weights, self.holds
        wanted = self._carrier(args.bits)
        if wanted not in holds.bits or args.element not in holds.elements:
            hint = "convert to gptq, which holds 8 bits" if wanted == 8 else "quantize to bits that it holds"
            if args.element != "int":
                hint = "convert to compressed-tensors, which holds FP8, or dense"
            bits = " or ".join(str(bits) for bits in holds.bits)
            self._refuse("bits", name, f"{wanted}-bit {args.element} codes", f"holds {bits}-bit {'/'.join(holds.elements)}", hint)
        elif wanted < args.bits:
            hint = f"write {args.bits} bits, or quantize again"
            self._refuse("bits", name, f"{args.bits} bits", f"was asked to hold them in {wanted}, which would clamp every code", hint)
        if out % holds.multiple_of[0] or in_ % holds.multiple_of[1]:
            offers = f"packs multiples of {holds.multiple_of[0]} x {holds.multiple_of[1]}"
            hint = "leave this layer in float when quantizing, or convert to dense"
            self._refuse("shape-multiple", name, f"[out, in] = {[out, in_]}", offers, hint)
        if name.split(".")[-1] == "lm_head" and not holds.lm_head:
            self._refuse("lm-head", name, "a quantized lm_head", "keeps lm_head in float", "convert to gptq, or quantize without it")
        inputs = self._inputs(header)
        if not self.dense and (header.smoothed or (header.outer_dtype is not None and args.element != "int")):
            self._refuse("two-level", name, "a second level of scales", "has one", "choose another target, or dense")
        if args.actorder and header.has_g_idx and args.actorder not in holds.act_order:
            hint = "convert to gptq, which carries g_idx, or dense"
            self._refuse("act-order", name, "an irregular g_idx (act order)", "has groups of consecutive inputs only", hint)
        moves, target_args, repeat = self._regroup(header, group_size if inputs is None else None)
        merged = header.outer_dtype is not None and not holds.outer and not self.dense
        moves = (*moves, "merge-scales") if merged else moves
        bias_dtype = None if header.bias_dtype is None else self._bias_dtype(header.bias_dtype, inputs is not None)
        stored = "F32" if merged else header.scale_dtype
        scale_dtype = self._scale_dtype(stored, target_args.strategy == "channel", inputs is not None)
        input_dtype = None
        if inputs is not None and header.input_dtype is not None:
            input_dtype = self._scale_dtype(header.input_dtype, True, True)
        if not ({"keep", scale_dtype} & set(holds.scale_dtypes)):
            offers = f"stores them in {' or '.join(TORCH_NAMES[dtype] for dtype in holds.scale_dtypes)}"
            hint = "leave --scale-dtype out: rounding is measured, and what rounds too much is refused"
            self._refuse("scale-dtype", name, f"scales in {TORCH_NAMES[scale_dtype]}", offers, hint)
        scheme = self._one(QuantScheme(target_args, inputs))
        outer_dtype = header.outer_dtype if holds.outer else None
        derived = () if inputs is None else header.derived
        target = LayerTarget(name, self._one(header.shape), scheme, scale_dtype, bias_dtype, input_dtype, outer_dtype, derived)
        return LayerPlan(target, header.scheme, self._one(moves), repeat)

    def _inputs(self, header: _Header) -> QuantArgs | None:
        """How the target quantizes the layer's inputs; dropping it is a loss."""
        kind, args = header.inputs, header.scheme.inputs
        if kind is None or args is None:
            return None
        fits = args.bits == 8 and args.element in self.holds.elements and args.strategy in {"tensor", "token"}
        if fits and kind in self.holds.inputs:
            return args
        if fits and kind == "both" and "static" in self.holds.inputs:
            self.both.append(header.name)
            return replace(args, dynamic=False, strategy="tensor", symmetric=False)
        self.errors["activations-dropped"].append((1.0, header.name))
        return None

    def _one(self, value: T) -> T:
        """``value``, as one object for all layers that have an equal one: a model may have tens of thousands."""
        found: T = self._shared.setdefault(value, value)
        return found

    def _regroup(self, header: _Header, group_size: int | None) -> tuple[tuple[str, ...], QuantArgs, int]:
        """(moves, target's weight args, how often each stored group is repeated)."""
        args, in_ = header.scheme.weights, header.shape[1]
        if self.dense:
            return ("dequantize",), args, 1
        kept = args.strategy in self.holds.strategies and (args.element != "int" or args.strategy == "tensor")
        if kept or args.element != "int":
            if not kept:
                hint = "convert to dense"
                self._refuse("group-size", header.name, f"{args.element} scales per {args.strategy}", "does not have those", hint)
            return ("repack",), args, 1
        own = args.group_size or in_
        group_size = (args.group_size or -1) if group_size is None else group_size
        wanted = in_ if group_size == -1 else group_size
        if own % wanted or (args.actorder == "group" and own != wanted):
            sizes = ", ".join(str(size) for size in self.holds.group_sizes)
            hint, offers = (
                "quantize with a group size that it takes, or convert to dense",
                f"has groups of {sizes}, one size for all layers",
            )
            if not sizes:
                offers = "has one scale per channel"
                hint = "exact are gptq, awq and compressed-tensors; --allow requantize rounds it anew to 8 bits per channel, measured"
            self._refuse("group-size", header.name, f"groups of {own} inputs", offers, hint)
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
        strategy: Strategy = "channel" if group_size == -1 else "group"
        size = None if group_size == -1 else group_size
        order = args.actorder if args.actorder in self.holds.act_order else None
        target = replace(args, bits=carrier, strategy=strategy, group_size=size, actorder=order)
        return tuple(moves), target, own // wanted

    def _weight_dtype(self) -> str:
        """dense: the dtype of its weights: asked for, or the model's own."""
        if self.scale_dtype is not None:
            return SCALE_DTYPES.get(self.scale_dtype, "F32")
        checkpoint = self.checkpoint
        dtypes = Counter(checkpoint.tensors[name].dtype for name in checkpoint.plain_names if len(checkpoint.tensors[name].shape) == 2)
        return next((dtype for dtype, _ in dtypes.most_common() if dtype in {"F16", "BF16", "F32"}), "F16")

    def _carrier(self, bits: int) -> int:
        """Bits that codes are stored in: those asked for, else the fewest that the target has and that hold them."""
        return self.bits or min((held for held in self.holds.bits if held >= bits), default=bits)

    def _scale_dtype(self, stored: str, per_channel: bool = False, has_inputs: bool = False) -> str:
        if self.dense:
            return self.weight_dtype
        if self.serve_dtype is not None and per_channel:
            return SCALE_DTYPES[self.serve_dtype]
        if self.scale_dtype == "keep":
            return stored
        if self.scale_dtype is not None:
            return SCALE_DTYPES[self.scale_dtype]
        wanted = self.holds.scale_dtypes[0]
        if wanted in {"model", "half"}:
            return self.half if stored == "F32" and not (wanted == "half" and has_inputs) else stored
        return stored if wanted == "keep" else wanted

    def _bias_dtype(self, stored: str, has_inputs: bool) -> str:
        wanted = stored if self.dense else self._scale_dtype(stored, has_inputs=has_inputs)
        return stored if wanted == "F32" else wanted

    def _check_fused(self, layers: list[LayerPlan]) -> None:
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
                        found = "is float" if sibling in others else f"is {quantized[sibling].scheme}"
                        needs = f"its own scheme while {sibling.rpartition('.')[2]} {found}"
                        if self.spec.name == self.checkpoint.format and not self.holds.for_engine:
                            self.odd.append(f"{name} {needs.removeprefix('its own scheme ')}")
                            break
                        hint = f"quantize or roll back {' and '.join(fused)} together, or convert to dense"
                        self._refuse("fused", name, needs, "is served with both fused into one matrix", hint)
                        break

    def _check_left_out(self, probe: bool) -> None:
        """Tensors that the reader leaves out under a condition: check it on the data."""
        if self.checkpoint.left_out:
            kinds = Counter(item.why for item in self.checkpoint.left_out)
            self.notes.extend(f"{count} tensors are not carried: {why}" for why, count in kinds.items())
        if not probe:
            return
        self.notes.extend(f"{finding.where}: {finding.what}" for finding in self.checkpoint.data_findings())
        tensors = self.checkpoint.tensors
        for item in self.checkpoint.left_out:
            data = tensors.array(item.tensor)
            holds = not data.any() if item.condition == "zero" else data.tobytes() == tensors.array(item.other).tobytes()
            if not holds:
                hint = "undo the smoothing before quantizing, or convert a checkpoint made without it"
                self._refuse("norm", item.tensor, f"to be kept, since {item.why} {item.otherwise}", "has no slot for it", hint)

    def _probe(self, layers: list[LayerPlan]) -> dict[str, Facts]:
        """Read the small tensors of every layer, in parallel."""
        facts: dict[str, Facts] = {}
        parts = [layers[start : start + 64] for start in range(0, len(layers), 64)]  # a task for each layer would be too many
        with ThreadPoolExecutor(self.jobs) as pool:
            for found in pool.map(lambda part: [self._probe_layer(layer) for layer in part], parts):
                facts.update((name, self._one(fact)) for name, fact in found)
        return facts

    def _probe_layer(self, plan: LayerPlan) -> tuple[str, Facts]:
        header = self.checkpoint.layer(plan.target.name)
        half = 1 << (plan.target.scheme.weights.bits - 1)
        low, high = (0, 0) if plan.requantized else zero_range(header.zero_points)
        target = None if self.dense or plan.requantized else DTYPES[plan.target.scale_dtype]
        scale = measure_cast(header.name, "weight scale", scales_of(header) if plan.merged else header.scales, target)
        if plan.target.input_dtype is not None and header.input_scale is not None:
            scale = scale.with_other(measure_cast(header.name, "input scale", header.input_scale, DTYPES[plan.target.input_dtype]))
        bias_dtype = plan.target.bias_dtype
        bias = Cast() if header.bias is None or bias_dtype is None else measure_cast(header.name, "bias", header.bias, DTYPES[bias_dtype])
        self._check_container(header)
        inputs = zero_range(header.input_zero_point) == (0, 0)
        differs = contradiction(header) if "deq_scale" in header.extras else 0.0
        steps = bias_error(header) if "quant_bias" in dict(plan.target.derived) and "quant_bias" not in header.extras else 0.0
        return plan.target.name, Facts(low + half, high + half, low == high == 0, scale, bias, inputs, differs, steps)

    def _check_container(self, header: QuantizedLinear) -> None:
        """The first codes of a layer must fit its bits: bytes that do not are packed, whatever the description says."""
        sample = read(header.codes, slice(0, min(64, header.shape[0])), slice(0, min(4096, header.shape[1])))
        if sample.size:
            check_codes(header, int(sample.min()), int(sample.max()))

    def _apply(self, plan: LayerPlan, facts: Facts) -> LayerPlan:
        """Take what the probe found into a layer's plan."""
        name = plan.target.name
        if facts.scale.overflow is not None:
            dtype = plan.target.scale_dtype
            needs, offers = f"a scale of {facts.scale.overflow:.4g}", f"was asked to hold it in {TORCH_NAMES[dtype]}"
            self._refuse("scale-overflow", name, needs, offers, "use --scale-dtype bfloat16 or float32")
        if facts.bias.overflow is not None:
            needs, offers = f"a bias of {facts.bias.overflow:.4g}", f"was asked to hold it in {plan.target.bias_dtype}"
            self._refuse("bias-overflow", name, needs, offers, "use --scale-dtype bfloat16 or keep")
        for code, error in (
            ("scale-rounded", facts.scale.rounded),
            ("scale-subnormal", facts.scale.subnormal),
            ("bias-rounded", max(facts.bias.rounded, facts.bias.subnormal)),
            ("quant-bias-rounded", facts.quant_bias),
            ("deq-scale-differs", 0.0 if plan.target.derived else facts.differs),
        ):
            if error:
                self.errors[code].append((error, name))
        if self.dense and self.weight_dtype != "F32":
            self.errors["weight-rounded"].append((float(2.0 ** -(11 if self.weight_dtype == "F16" else 8)), name))
        args = replace(plan.target.scheme.weights, symmetric=facts.symmetric)
        spelled = "spell-zero-point" if self.holds.zero_points and "zero_points" not in self.holds.omits else "drop-zero-point"
        moves = (*plan.moves, spelled) if facts.symmetric and "repack" in plan.moves else plan.moves
        if not (facts.symmetric or self.holds.zero_points):
            zero = next(zero for zero in (facts.zero_low, facts.zero_high) if zero != 1 << (args.bits - 1))
            hint = f"convert to {self.spec.name}, which says zero points in its default variant"
            offers = f"has symmetric layers only (zero point {1 << (args.bits - 1)})"
            self._refuse("zero-point", name, f"a zero point of {zero}", offers, hint)
        if not self.dense and facts.zero_high >= 1 << args.bits:
            hint = "read its zero points in another way (--gptq-zeros mask), or convert to dense"
            self._refuse("zero-point", name, f"a zero point of {facts.zero_high}", f"ends at {(1 << args.bits) - 1}", hint)
        source = replace(plan.source, weights=replace(plan.source.weights, symmetric=facts.symmetric))
        inputs = plan.target.scheme.inputs
        if inputs is not None and not inputs.dynamic:
            inputs = replace(inputs, symmetric=facts.input_symmetric)
        target = replace(plan.target, scheme=self._one(QuantScheme(args, inputs)))
        found = self.spec.objection(target, self.variant.name)
        if found is not None and found.code in REQUANTIZABLE and not plan.requantized and self._requantizes(1):
            again = self._requantize(replace(plan, target=target), target.scale_dtype)
            return self._apply(replace(again, source=source), replace(facts, symmetric=True, zero_low=128, zero_high=128))
        if found is not None:
            self._refuse(found.code, name, found.needs, found.offers, found.hint)
        return replace(plan, target=target, source=self._one(source), moves=self._one(moves))

    def _choose_variant(self, facts: dict[str, Facts]) -> None:
        """The first variant that holds every zero point, unless the user named one."""
        too_low = [name for name, fact in facts.items() if fact.zero_low < self.holds.smallest_zero]
        if not too_low or self.dense:
            return
        for variant in () if self.named else self.spec.variants:
            if variant.holds is not None and variant.holds.smallest_zero == 0:
                self.notes.append(
                    f"written as {self.spec.name}:{variant.name}, because {len(too_low)} layers (first: {too_low[0]}) have a zero point "
                    f"that {self.spec.name}:{self.variant.name} cannot say; it is read by {variant.readers}"
                )
                self.variant, self.holds = variant, variant.holds
                return
        hint = self.hints.get("zero-point", f"use --to {self.spec.name}, which chooses a variant that can")
        for name in too_low:
            self._refuse("zero-point", name, f"a zero point of {facts[name].zero_low}", f"starts at {self.holds.smallest_zero}", hint)

    def _judge_losses(self) -> list[Loss]:
        """Losses with their largest error; those that were not allowed become refusals."""
        losses = []
        for code, found in self.errors.items():
            bound, worst = max(found)
            loss = Loss(code, len(found), bound, worst)
            losses.append(loss)
            by_default, about = LOSSES[code]
            if self.strict or not (by_default or code in self.allow):
                hint = self.hints.get("allow", "allow it with --allow {code}").format(code=code)
                if by_default or code in self.allow:
                    hint = "convert without --strict"
                if self.strict and code.startswith("scale-"):
                    hint += ", or keep the scales with --scale-dtype keep"
                much = f"in {len(found)} places" if code.endswith("-dropped") else f"relative error up to {bound:.3g}"
                self._refuse(code, worst, f"what would be lost: {about} ({much})", "cannot hold it exactly", hint)
        return losses

    def _tensors(self, layers: dict[str, LayerPlan]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Every output tensor in order: the source's order, each layer's tensors together."""
        assert self.spec.outputs is not None
        for kind, name in [*self.checkpoint.entries, *(("plain", name) for name in self.attention)]:
            if kind == "plain":
                info = self.checkpoint.tensors[name]
                yield name, info.dtype, info.shape
            else:
                for spec in self.spec.outputs(layers[name].target, self.variant.name):
                    yield spec.name, spec.dtype, spec.shape

    def _left_in_float(self, layers: dict[str, LayerPlan]) -> list[str]:
        return [name for name in float_linears(self.checkpoint) if name not in layers]

    def _model_dtype(self, layers: list[LayerPlan]) -> str | None:
        """The dtype that engines should compute in: that of the scales, where it is a half precision one."""
        if self.serve_dtype is not None:
            return self.serve_dtype
        dtypes = {layer.target.scale_dtype for layer in layers if layer.target.inputs is None}
        if len(dtypes) != 1 or (dtypes == {"F32"} and not self.dense):
            return None
        return TORCH_NAMES[dtypes.pop()]

    def _note(self, layers: list[LayerPlan], base: Location | None, model: ModelFacts) -> None:
        if exempt := sum(file.exempt for file in self.checkpoint.tensors.files):
            self.notes.append(
                f"--max-memory does not bind what torch does with .bin files: up to {exempt / 1e9:.2f} GB more may be held; "
                "save them as safetensors first if that is too much"
            )
        if self.odd:
            self.notes.append(
                f"{len(self.odd)} linears differ from those with which engines fuse them, in the source too (first: {self.odd[0]}): "
                f"`weighbridge check` says which engines take that"
            )
        if self.both:
            self.notes.append(
                f"{len(self.both)} layers quantize inputs by a scale in one phase and at run time in another (first: {self.both[0]}): "
                f"{self.spec.name} has one way for both, and gets the scale"
            )
        config = model_config(self.checkpoint, base)
        if config is None:
            self.notes.append(
                "no config.json beside the source: the weights will be written without one; pass --base-model for a folder that loads"
            )
        elif model.model_dtype is not None and config.get("torch_dtype", config.get("dtype")) not in (None, model.model_dtype):
            was = config.get("torch_dtype", config.get("dtype"))
            self.notes.append(
                f"config.json will say torch_dtype {model.model_dtype} instead of {was}: the dtype of the scales, in which kernels compute"
            )
        if self.spec.name == "gptq" and model.float_linears and not self.refusals:
            alike = modules_in_every_block([layer.target.name for layer in layers], model.float_linears)
            readers = "AutoGPTQ does not" if alike else "transformers and AutoGPTQ do not, since blocks differ"
            self.notes.append(f"{len(model.float_linears)} linears stay in float: GPTQModel and vLLM read this; {readers}")
        if self.spec.name == "gptq" and layers and not all(layer.target.scheme.weights.symmetric for layer in layers) and not self.refusals:
            readers = (
                "GPTQModel and transformers" if self.variant.name == "v2" else "AutoGPTQ and transformers (GPTQModel: with --to gptq:v2)"
            )
            self.notes.append(f"some layers have zero points: vLLM and SGLang read only symmetric GPTQ; {readers} read this")
