"""Plan a conversion from headers: what each layer needs, what the target offers, and what every output file will be.

This is the only place where a layer is compared with a target. For each layer the result is exact moves, a loss with a code
and a measured bound, or a refusal that names the layer, what it needs, what the target offers and what to do. What headers
cannot say (zero points, scales that overflow) is settled by ``probe``, which reads only the small tensors.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from formats import Checkpoint, open_checkpoint
from formats.checkpoint import Location, float_linears, float_matrices, zeros_reading
from formats.derived import bias_error, comes_back, contradiction
from formats.errors import RanksRefusedError, RefusedError, UnreadableError
from formats.ir import QuantizedLinear, QuantScheme, read
from formats.laid_out import LaidOut
from formats.layouts import expect_work
from formats.safetensors_file import DTYPES, lay_out
from formats.spec import Capabilities, ModelFacts, input_kind

from .fitting import REQUANTIZABLE, Fitter, Header, Ledger, float_dtype, fused_name, header_of
from .matrices import scales_of
from .memory import header_bytes, share
from .notes import notes_of
from .options import SCALE_DTYPES, TORCH_NAMES, Options, Settings
from .probe import Cast, Facts, check_codes, measure_cast, zero_range
from .records import LOSSES, LayerPlan, Loss, Plan, model_config
from .targets import Target, find_target

if TYPE_CHECKING:
    from .options import Unpack


def plan(src: str | os.PathLike[str], to: str, *, probe: bool = True, **options: Unpack[Options]) -> Plan:
    """Decide how ``src`` becomes format ``to``; reads headers, and with ``probe`` the small tensors; writes nothing.

    to        "awq", "gptq", "gptq:v1", "compressed-tensors", "dense", ... or what will load it: "lmdeploy", "vllm", ...
    options   ``Options``
    raises    UsageError, UnreadableError; refusals are in the plan, not raised
    """
    settings = Settings(**options)
    target = find_target(to, settings.consumer)
    settings.check_for(target.spec.name)
    base = Location.of(settings.base_model) if settings.base_model is not None else None
    if base is not None and "config.json" not in base.names:
        raise UnreadableError(f"{base.folder.name}: --base-model has no config.json; point at the float model's folder")
    with _no_cyclic_collection():
        spec, location = target.spec, Location.of(src, settings.description, base, zeros_reading(settings.gptq_zeros))
        checkpoint = open_checkpoint(location if spec.source is None else spec.source(location))
        base = checkpoint.beside(base, spec.name)
        checkpoint.leave_out(spec.ignores, f"{spec.name}'s engine computes them itself")
        return Planner(checkpoint, target, settings, base).plan(probe)


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


class Planner:
    """One planning run: the source, the target, what may happen, and what was found so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        target: Target,
        settings: Settings,
        base: Location | None = None,
        bits: int | None = None,
        hints: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        spec, variant, named, self.consumer = target
        if not named and not checkpoint.layer_names and not checkpoint.unsupported:
            if spec.name == checkpoint.format and checkpoint.attention:  # a float model with a quantized cache, in its own spelling
                variant = spec.variant(checkpoint.variant) or variant
            else:  # a float model in the format's float spelling
                variant = next((found for found in spec.variants if found.holds is not None and found.holds.dequantized), variant)
        assert variant.holds is not None
        self.checkpoint, self.spec, self.variant, self.named = checkpoint, spec, variant, named
        self.holds: Capabilities = variant.holds
        self.settings, self.base, self.hints = settings, base, hints
        self.notes: list[str] = []
        self.dense = self.holds.dequantized
        config = model_config(checkpoint, base) or {}
        said = config.get("torch_dtype", config.get("dtype"))
        self.half = "BF16" if said == "bfloat16" or (said is None and float_dtype(checkpoint) == "BF16") else "F16"
        self.ledger = Ledger(f"{spec.name}:{variant.name}")
        self.fitter = Fitter(checkpoint, spec, variant, settings, self.ledger, self.half, bits)
        # A cache's scales have a spelling in their own format only.
        alike = spec.name == checkpoint.format and (not spec.cache_by_variant or variant.name == checkpoint.variant)
        self.attention = tuple(checkpoint.attention if alike else ())
        self.entries = checkpoint.entries_with(self.attention)

    def plan(self, probe: bool) -> Plan:
        self._refuse_unreadable_parts()
        headers = self._headers()
        group_size = self.fitter.common_group_size(headers)
        layers = [self.fitter.settle(header, group_size) for header in headers]
        del headers
        self.fitter.check_fused(layers)
        self._check_left_out(probe)
        expect_work(sum(layer.target.shape[0] * layer.target.shape[1] for layer in layers))
        facts = self._probe(layers) if probe else {}  # refused or not: an unreadable source is said first
        layers = [self._apply(layer, facts[layer.target.name]) if facts else layer for layer in layers]
        layers = self._declare_alike(layers)
        self._choose_variant(facts)
        losses = self._judge_losses()
        by_name = {layer.target.name: layer for layer in layers}
        plain = [name for kind, name in self.entries if kind == "plain"]
        model = ModelFacts(
            tuple(layer.target for layer in layers),
            tuple(name for name in float_linears(self.checkpoint) if name not in by_name),
            self._model_dtype(layers),
            self.checkpoint.entries,
            tuple(float_matrices(self.checkpoint)),
            self.attention,
            self.checkpoint.said,
            model_config(self.checkpoint, self.base),
            (self.base or self.checkpoint.location).model_name,
            self.settings.qkv_concat,
            self.settings.tp,
            self.checkpoint.tensors,
            self.settings.model_name or "",
        )
        files = [] if self.ledger.refusals else self._lay_out(by_name, model)
        self.notes += notes_of(self.checkpoint, self.spec, self.variant, self.base, model, self.ledger)
        options = {
            "allow": sorted(self.settings.allow),
            "strict": self.settings.strict,
            "scale_dtype": self.settings.scale_dtype or "default",
            "serve_dtype": self.settings.serve_dtype or "default",
            **({"qkv_concat": True} if self.settings.qkv_concat else {}),
            **({"tp": self.settings.tp} if self.settings.tp > 1 else {}),
            **({"model_name": self.settings.model_name} if self.settings.model_name is not None else {}),
            "max_shard_size": self.settings.max_shard_size,
        }
        outputs = sum(len(file.tensors) for file in files)
        headers_size = header_bytes(self.checkpoint.tensors, len(layers), outputs)
        memory = share(self.settings.max_memory, self.settings.workers, headers_size, self.checkpoint.kept)
        found = Plan(
            self.checkpoint, self.spec, self.variant, layers, plain, files, losses, self.ledger.refusals, self.notes,
            model, self.base, tuple(self.settings.allow), bool(probe), memory, options,
        )  # fmt: skip
        if self.consumer is not None and not found.refusals:
            from .checking import unmet_by

            found.refusals += unmet_by(found, self.consumer)
        return found

    def _headers(self) -> list[Header]:
        """What the comparison needs of every layer; nothing that holds on to its tensors."""
        headers = []
        asked = None if self.settings.serve_dtype is None else SCALE_DTYPES[self.settings.serve_dtype]
        for name in self.checkpoint.layer_names:
            layer = self.checkpoint.layer(name)
            kind = input_kind(layer.scheme, layer.input_scale is not None)
            derived = self.spec.derived(layer, kind, asked if "deq_scale" in layer.extras else asked or self.half)
            header = header_of(layer, self.fitter.one(layer.scheme), self.fitter.one(derived))
            if self.spec.stores_product and kind == "static" and header.scale_dtype == "F32":
                header = replace(header, product_divides=comes_back(layer))
            headers.append(header)
            for part, extra in layer.extras.items():
                # What belongs to the inputs' quantization goes with it: carried by its own format, dropped by name elsewhere.
                if extra.kind == "functional" and not part.startswith("input_"):
                    self._refuse_functional(f"{name}.{part}")
        return headers

    def _refuse_unreadable_parts(self) -> None:
        for part in self.checkpoint.unsupported:
            self.ledger.refuse("type", part.name, f"the type {part.type}", "is not reached from it yet", part.why)
        for tensor in self.checkpoint.functional:
            self._refuse_functional(tensor)
        for tensor in self.checkpoint.attention:
            if tensor not in self.attention:
                self.ledger.lose("kv-cache-dropped" if self.checkpoint.is_cache(tensor) else "attention-dropped", 1.0, tensor)
        respelled = self.holds.respells or (self.dense and self.checkpoint.respells)
        if not (self.checkpoint.layer_names or self.checkpoint.unsupported or self.attention or respelled):
            hint = "there is nothing to convert: copy the folder, or quantize it first"
            self.ledger.refuse("nothing", self.checkpoint.location.folder.name, "a quantized layer", "holds quantized layers", hint)

    def _refuse_functional(self, tensor: str) -> None:
        hint = "convert a checkpoint that was quantized without rotation or low-rank parts"
        self.ledger.refuse("functional", tensor, "a step of its own at run time", "has no slot for it", hint)

    def _check_left_out(self, probe: bool) -> None:
        """Tensors that the reader leaves out under a condition: check it on the data."""
        if self.checkpoint.left_out:
            kinds = Counter(item.why for item in self.checkpoint.left_out)
            self.notes.extend(f"{count} tensors are not carried: {why}" for why, count in kinds.items())
        if not probe:
            return
        self.notes.extend(f"{finding.where}: {finding.what}" for finding in self.checkpoint.data_findings())
        for item in self.checkpoint.left_out:
            if not item.holds(self.checkpoint.tensors):
                hint = "undo the smoothing before quantizing, or convert a checkpoint made without it"
                self.ledger.refuse("norm", item.tensor, f"to be kept, since {item.why} {item.otherwise}", "has no slot for it", hint)

    def _probe(self, layers: list[LayerPlan]) -> dict[str, Facts]:
        """Read the small tensors of every layer, in parallel."""
        facts: dict[str, Facts] = {}
        parts = [layers[start : start + 64] for start in range(0, len(layers), 64)]  # a task for each layer would be too many
        with ThreadPoolExecutor(self.settings.workers) as pool:
            for found in pool.map(lambda part: [self._probe_layer(layer) for layer in part], parts):
                facts.update((name, self.fitter.one(fact)) for name, fact in found)
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
        steps = bias_error(header) if "quant_bias" in dict(plan.target.derived) and plan.derives_anew(header) else 0.0
        return plan.target.name, Facts(low + half, high + half, low == high == 0, scale, bias, inputs, differs, steps)

    def _check_container(self, header: QuantizedLinear) -> None:
        """The first codes of a layer must fit its bits: bytes that do not are packed, whatever the description says."""
        sample = read(header.codes, slice(0, min(64, header.shape[0])), slice(0, min(4096, header.shape[1])))
        if sample.size:
            check_codes(header, int(sample.min()), int(sample.max()))

    def _apply(self, plan: LayerPlan, facts: Facts) -> LayerPlan:
        """Take what the probe found into a layer's plan."""
        name, args = plan.target.name, replace(plan.target.scheme.weights, symmetric=facts.symmetric)
        source, inputs = replace(plan.source, weights=replace(plan.source.weights, symmetric=facts.symmetric)), plan.target.scheme.inputs
        if inputs is not None and not inputs.dynamic:
            inputs = replace(inputs, symmetric=facts.input_symmetric)
        target = replace(plan.target, scheme=self.fitter.one(QuantScheme(args, inputs)))
        found = self.spec.objection(target, self.variant.name)
        if found is not None and found.code in REQUANTIZABLE and not plan.requantized and self.fitter.requantizes(1):
            plan = replace(self.fitter.requantize(replace(plan, target=target), target.scale_dtype), source=source)
            return self._apply(plan, replace(facts, symmetric=True, zero_low=128, zero_high=128, scale=Cast()))
        if found is not None:
            self.ledger.refuse(found.code, name, found.needs, found.offers, found.hint)
        if facts.scale.overflow is not None:
            dtype = plan.target.scale_dtype
            needs, offers = f"a scale of {facts.scale.overflow:.4g}", f"was asked to hold it in {TORCH_NAMES[dtype]}"
            self.ledger.refuse("scale-overflow", name, needs, offers, "use --scale-dtype bfloat16 or float32")
        if facts.bias.overflow is not None:
            needs, offers = f"a bias of {facts.bias.overflow:.4g}", f"was asked to hold it in {plan.target.bias_dtype}"
            self.ledger.refuse("bias-overflow", name, needs, offers, "use --scale-dtype bfloat16 or keep")
        for code, error in (
            ("scale-rounded", facts.scale.rounded),
            ("scale-subnormal", facts.scale.subnormal),
            ("bias-rounded", max(facts.bias.rounded, facts.bias.subnormal)),
            ("quant-bias-rounded", facts.quant_bias),
            ("deq-scale-differs", 0.0 if plan.target.derived else facts.differs),
        ):
            self.ledger.lose(code, error, name)
        if self.dense and plan.target.scale_dtype != "F32":
            self.ledger.lose("weight-rounded", 2.0 ** -(11 if plan.target.scale_dtype == "F16" else 8), name)
        spelled = "spell-zero-point" if self.holds.zero_points and "zero_points" not in self.holds.omits else "drop-zero-point"
        moves = (*plan.moves, spelled) if facts.symmetric and "repack" in plan.moves else plan.moves
        if not (facts.symmetric or self.holds.zero_points):
            zero = next(zero for zero in (facts.zero_low, facts.zero_high) if zero != 1 << (args.bits - 1))
            hint = f"convert to {self.spec.name}, which says zero points in its default variant"
            offers = f"has symmetric layers only (zero point {1 << (args.bits - 1)})"
            self.ledger.refuse("zero-point", name, f"a zero point of {zero}", offers, hint)
        if not self.dense and facts.zero_high >= 1 << args.bits:
            hint = "read its zero points in another way (--gptq-zeros mask), or convert to dense"
            self.ledger.refuse("zero-point", name, f"a zero point of {facts.zero_high}", f"ends at {(1 << args.bits) - 1}", hint)
        return replace(plan, target=target, source=self.fitter.one(source), moves=self.fitter.one(moves))

    def _declare_alike(self, layers: list[LayerPlan]) -> list[LayerPlan]:
        """Where zero points may be left unsaid, a symmetric layer that engines fuse with an asymmetric one says its own."""
        if "zero_points" not in self.holds.omits:
            return layers
        asymmetric = {fused_name(layer.target.name) for layer in layers if not layer.target.scheme.weights.symmetric}
        found = []
        for layer in layers:
            args = layer.target.scheme.weights
            if args.symmetric and args.element == "int" and fused_name(layer.target.name) in asymmetric:
                scheme = self.fitter.one(replace(layer.target.scheme, weights=replace(args, symmetric=False)))
                moves = tuple("spell-zero-point" if move == "drop-zero-point" else move for move in layer.moves)
                layer = replace(layer, target=replace(layer.target, scheme=scheme), moves=moves)
            found.append(layer)
        return found

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
            self.ledger.refuse("zero-point", name, f"a zero point of {facts[name].zero_low}", f"starts at {self.holds.smallest_zero}", hint)

    def _judge_losses(self) -> list[Loss]:
        """Losses with their largest error; those that were not allowed become refusals."""
        losses = []
        for code, found in self.ledger.errors.items():
            bound, worst = max(found)
            loss = Loss(code, len(found), bound, worst)
            losses.append(loss)
            by_default, about = LOSSES[code]
            if self.settings.strict or not (by_default or code in self.settings.allow):
                hint = self.hints.get("allow", "allow it with --allow {code}").format(code=code)
                if by_default or code in self.settings.allow:
                    hint = "convert without --strict"
                if self.settings.strict and code.startswith("scale-"):
                    hint += ", or keep the scales with --scale-dtype keep"
                much = f"in {len(found)} places" if code.endswith("-dropped") else f"relative error up to {bound:.3g}"
                self.ledger.refuse(code, worst, f"what would be lost: {about} ({much})", "cannot hold it exactly", hint)
        return losses

    def _tensors(self, layers: dict[str, LayerPlan]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Every output tensor in order: the source's order, each layer's tensors together."""
        assert self.spec.outputs is not None
        for kind, name in self.entries:
            if kind == "plain":
                info = self.checkpoint.tensors[name]
                yield name, info.dtype, info.shape
            else:
                for spec in self.spec.outputs(layers[name].target, self.variant.name):
                    yield spec.name, spec.dtype, spec.shape

    def _lay_out(self, layers: dict[str, LayerPlan], model: ModelFacts) -> list[LaidOut]:
        """Every output file; a tensor that the format cannot hold becomes a refusal."""
        if self.spec.lay_out is None:
            return list(lay_out(self._tensors(layers), self.settings.max_shard_size, self.spec.stem(model, self.variant.name)))
        try:
            files = self.spec.lay_out(self._tensors(layers), model, self.variant.name, self.settings.max_shard_size)
            for file in files:
                self._check_shared(file.shared, layers)
            return files
        except RefusedError as error:
            name, _, why = str(error).partition(": ")
            why, _, hint = why.rpartition("; ")
            if isinstance(error, RanksRefusedError):
                self.ledger.refuse("ranks", name, f"a part for each of {self.settings.tp} ranks", f"cannot split it: {why}", hint)
            else:
                self.ledger.refuse("tensor", name, "a place in it", f"cannot hold it: {why}", hint)
            return []

    def _check_shared(self, shared: Sequence[tuple[str, ...]], layers: dict[str, LayerPlan]) -> None:
        """Refuse tensors that would lie in one place and differ: scales of the inputs of layers that are stored as one."""
        from .writing import vector

        assert self.spec.outputs is not None
        wanted = {name for names in shared for name in names}
        found: dict[str, bytes] = {}
        for name, layer in layers.items() if wanted else ():
            specs = [spec for spec in self.spec.outputs(layer.target, self.variant.name) if spec.name in wanted]
            for spec in specs:
                found[spec.name] = vector(self.checkpoint.layer(name), layer, spec).tobytes()
        for names in shared:
            odd = next((name for name in names if found.get(name) != found.get(names[0])), None)
            if odd is not None:
                needs = f"other values than {names[0]}, with which it would be stored once"
                self.ledger.refuse("fused-inputs", odd, needs, "has one for layers that are stored as one", "convert without --qkv-concat")

    def _model_dtype(self, layers: list[LayerPlan]) -> str | None:
        """The dtype that engines should compute in: that of the scales, where it is a half precision one."""
        if self.settings.serve_dtype is not None:
            return self.settings.serve_dtype
        dtypes = {layer.target.scale_dtype for layer in layers if layer.target.inputs is None}
        if len(dtypes) != 1 or (dtypes == {"F32"} and not self.dense):
            return None
        return TORCH_NAMES[dtypes.pop()]
