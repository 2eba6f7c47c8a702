"""``check``: will this consumer load the folder? Its requirements (``consumers``) against facts from headers and small tensors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from formats import FORMATS, Checkpoint, Location, open_checkpoint
from formats.awq import OLD_CONFIG
from formats.checkpoint import float_linears, float_matrices
from formats.errors import RefusedError, UnreadableError, UsageError
from formats.ir import QuantizedLinear
from formats.msmodelslim import find_description
from formats.msmodelslim_target import type_of
from formats.safetensors_file import NAMES, TensorSet, read_json
from formats.spec import input_kind

from .consumers import CONSUMERS, Consumer
from .folder import configs
from .probe import zero_range
from .records import Plan, Refusal
from .requirements import FolderFacts, LayerFacts, Requirement
from .stored import StoredLayer, is_irregular, is_symmetric, open_weights, stored_layers

FLOAT_LINEARS = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
"""Names of linears that loaders would quantize; routers and embeddings are not among them."""
CONFIGS = ("quantize_config.json", OLD_CONFIG)


@dataclass(frozen=True, slots=True)
class UnmetRequirement:
    """One requirement that the folder does not meet: in how many places, the first of them, what was found there, what would mend it."""

    code: str
    count: int
    first: str
    found: str
    wanted: str
    mend: str
    source: str

    def __str__(self) -> str:
        more = f" and {self.count - 1} more" if self.count > 1 else ""
        return f"{self.first}{more}: {self.found}; wanted {self.wanted}; {self.mend} [{self.code}; {self.source}]"


@dataclass(frozen=True)
class CheckReport:
    """What ``check`` found. ``checked``: how many requirements were looked at."""

    format: str
    consumer: str
    version: str
    tp: int
    checked: int
    unmet: list[UnmetRequirement]

    @property
    def ok(self) -> bool:
        return not self.unmet

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def check(path: str | os.PathLike[str], consumer: str, tp: int = 1) -> CheckReport:
    """Compare a folder with what ``consumer`` (a key of ``CONSUMERS``) requires, on ``tp`` ranks of tensor parallelism.

    raises   UsageError (no such consumer), UnreadableError (``doctor`` may say more), RefusedError (a format that is not read yet)
    """
    if consumer not in CONSUMERS:
        raise UsageError(f"--for {consumer}: there is no such consumer; there are {', '.join(CONSUMERS)}")
    if tp < 1:
        raise UsageError(f"--tp {tp}: wanted 1 or more")
    wanted = CONSUMERS[consumer]
    facts = facts_of(Location.of(path), tp)
    name = f"{facts.format}:{facts.variant}"
    requirements = wanted.formats.get(facts.format)
    if requirements is None:
        quantized = facts.format != "dense"
        mend = f"weighbridge convert {path} OUT --to {_instead(wanted, facts)}" if quantized else "quantize it first: its weights are float"
        source = wanted.source or f"{wanted.name} {wanted.version} has no loader for {facts.format}"
        unmet = UnmetRequirement("format", 1, "the folder", name, " or ".join(wanted.formats), mend, source)
        return CheckReport(name, wanted.name, wanted.version, tp, 1, [unmet])
    found = [_compare(requirement, facts, os.fspath(path)) for requirement in requirements]
    return CheckReport(name, wanted.name, wanted.version, tp, len(requirements), [one for one in found if one is not None])


def _instead(consumer: Consumer, facts: FolderFacts) -> str:
    """What ``--to`` writes that the consumer reads and that may hold the folder's layers."""
    if "compressed-tensors" in consumer.formats and any(layer.inputs or layer.element != "int" for layer in facts.layers):
        return "compressed-tensors"
    return consumer.name


def _compare(requirement: Requirement, facts: FolderFacts, path: str) -> UnmetRequirement | None:
    places = requirement.unmet(facts)
    if not places:
        return None
    mend = requirement.mend.replace("{dir}", path).replace("{format}", facts.format)
    return UnmetRequirement(requirement.code, len(places), *places[0], requirement.wanted, mend, requirement.source)


def facts_of(location: Location, tp: int = 1) -> FolderFacts:
    """What the requirements ask about a folder. Reads configs, headers, g_idx and zero points.

    Layers in GPTQ's and AWQ's GEMM shapes are looked at as they are stored, so that missing tensors and keys are facts too; all
    others through their format's reader.
    """
    config = location.json("config.json") or {}
    configs: dict[str, Any] = {"config.json": config} if config else {}
    if isinstance(config.get("quantization_config"), dict):
        configs["quantization_config"] = config["quantization_config"]
    configs |= {name: found for name in CONFIGS if (found := location.json(name)) is not None}
    with contextlib.suppress(UnreadableError):
        tensors = open_weights(location)
        if (stored := list(stored_layers(tensors))) and _is_plain(configs, stored):
            return _stored_facts(location, tensors, stored, configs, tp)
    return _reader_facts(open_checkpoint(location), configs, tp)


def _is_plain(configs: dict[str, Any], stored: list[StoredLayer]) -> bool:
    """Whether the layers are GPTQ's or AWQ GEMM's: other layouts of AWQ may have the same shapes."""
    said = configs.get("quantization_config", {})
    version = str(said.get("version", "gemm")).lower()
    return stored[0].spelling == "awq" or said.get("quant_method") != "awq" or version == "gemm"


def _stored_facts(location: Location, tensors: TensorSet, stored: list[StoredLayer], configs: dict[str, Any], tp: int) -> FolderFacts:
    spelling = stored[0].spelling
    said = configs.get("quantization_config", configs.get("quantize_config.json", {}))
    version = "v2" if str(said.get("checkpoint_format", said.get("format", ""))).lower() == "gptq_v2" else "v1"
    layers = tuple(_stored_layer(tensors, layer, version) for layer in stored)
    floats = tuple(name.removesuffix(".weight") for name in tensors if name.endswith(FLOAT_LINEARS))
    files = tuple(file.path.name for file in tensors.files)
    return FolderFacts(spelling, "gemm" if spelling == "awq" else version, configs, files, location.names, layers, floats, tp=tp)


def consumers_of(plan: Plan, tp: int | None = None) -> dict[str, list[str]]:
    """For every consumer, the codes of what it would miss in the folder that ``plan`` writes; none if it would load it.

    tp   ranks of tensor parallelism; None: those that the folder is written for
    """
    facts = _plan_facts(plan, tp or plan.model.ranks)
    result = {}
    for name, consumer in CONSUMERS.items():
        rows = consumer.formats.get(facts.format)
        result[name] = ["format"] if rows is None else [row.code for row in rows if row.unmet(facts)]
    return result


def unmet_by(plan: Plan, consumer: str) -> list[Refusal]:
    """Refusals for what ``consumer`` requires and would not find in the folder that ``plan`` writes."""
    wanted = CONSUMERS[consumer]
    rows, offers = wanted.formats.get(plan.spec.name), f"{wanted.name} {wanted.version}"
    if rows is None:
        hint = f"write what it reads: --to {' or --to '.join(wanted.formats)}"
        return [Refusal("format", "the folder", plan.target_name, f"{offers} does not read it", hint)]
    facts, found = _plan_facts(plan, plan.model.ranks), []
    for row in rows:
        if (unmet := _compare(row, facts, "DIR")) is not None:
            more = f" and {unmet.count - 1} more" if unmet.count > 1 else ""
            found.append(
                Refusal(row.code, f"{unmet.first}{more}", unmet.found, f"{offers} wants {unmet.wanted}", f"{unmet.mend} [{unmet.source}]")
            )
    return found


def _plan_facts(plan: Plan, tp: int) -> FolderFacts:
    written: dict[str, Mapping[str, Any]] = dict(configs(plan))
    if "quantization_config" in written.get("config.json", {}):
        written["quantization_config"] = written["config.json"]["quantization_config"]
    layers = []
    for layer in plan.layers:
        target = layer.target
        args = target.scheme.weights
        static = target.input_dtype is not None
        layers.append(
            LayerFacts(
                target.name,
                *target.shape,
                args.bits,
                target.group_size,
                args.symmetric,
                args.actorder is not None,
                target.scale_dtype,
                frozenset(spec.name.rpartition(".")[2] for spec in plan.outputs(target)),
                type_of(target, plan.variant.name) if plan.spec.name == "msmodelslim" else "",
                one_scale=args.strategy == "tensor",
                scheme=target.scheme,
                inputs=target.inputs or "",
                input_scale=_input_scale(plan.checkpoint.layer(target.name)) if static else (),
                deq_dtype=dict(target.derived).get("deq_scale", ""),
            )
        )
    files = tuple(part.name for part in plan.parts)
    index = () if plan.index is None else (plan.index,)
    names = (*files, *index, *(name for name in written if name != "quantization_config"))
    model = plan.model
    return FolderFacts(plan.spec.name, plan.variant.name, written, files, names, tuple(layers), model.float_linears, (), tp, model.others)


def _input_scale(layer: QuantizedLinear) -> tuple[float, ...]:
    """(scale, zero point) of inputs that are quantized by a static scale, or ()."""
    if layer.input_scale is None:
        return ()
    parts = [layer.input_scale, np.zeros(1) if layer.input_zero_point is None else layer.input_zero_point]
    return tuple(float(value) for part in parts for value in np.asarray(part).astype(np.float32).ravel())


def _stored_layer(tensors: TensorSet, layer: StoredLayer, version: str) -> LayerFacts:
    right = is_symmetric(tensors, layer, version)
    wrong = not right and layer.spelling == "gptq" and is_symmetric(tensors, layer, "v1" if version == "v2" else "v2")
    return LayerFacts(
        name=layer.name,
        out=layer.out,
        in_=layer.in_,
        bits=layer.bits or 0,
        group_size=layer.group_size,
        symmetric=right or wrong,
        act_order=is_irregular(tensors, layer),
        scale_dtype=layer.scale_dtype,
        parts=layer.parts,
        wrong_version=wrong,
    )


def _reader_facts(checkpoint: Checkpoint, configs: dict[str, Any], tp: int) -> FolderFacts:
    types = _types(checkpoint)
    layers = []
    for name in checkpoint.layer_names:
        layer = checkpoint.layer(name)
        args = layer.scheme.weights
        symmetric = zero_range(layer.zero_points) == (0, 0)
        parts = frozenset(tensor.rpartition(".")[2] for tensor in checkpoint.layer_tensors(name))
        size, ordered, dtype = args.group_size or -1, args.actorder is not None, NAMES[layer.scales.dtype]
        layers.append(
            LayerFacts(
                name,
                *layer.shape,
                args.bits,
                size,
                symmetric,
                ordered,
                dtype,
                parts,
                types.get(name, ""),
                one_scale=args.strategy == "tensor",
                scheme=layer.scheme,
                inputs=input_kind(layer.scheme, layer.input_scale is not None) or "",
                input_scale=_input_scale(layer),
                deq_dtype=NAMES[layer.extras["deq_scale"].value.dtype] if "deq_scale" in layer.extras else "",
            )
        )
    if checkpoint.format != "msmodelslim" and checkpoint.unsupported:
        part = checkpoint.unsupported[0]
        raise RefusedError(f"{checkpoint.location.folder.name}: {part.type}: {part.why}, so what it needs cannot be said")
    for part in checkpoint.unsupported:
        shape = checkpoint.tensors[f"{part.name}.weight"].shape if f"{part.name}.weight" in checkpoint.tensors else ()
        out, in_ = shape if len(shape) == 2 else (0, 0)
        layers.append(LayerFacts(part.name, out, in_, 0, -1, True, False, "", frozenset(), types.get(part.name, part.type)))
    floats = tuple(float_linears(checkpoint))
    undescribed = tuple(name for name in floats if types and name not in types)
    files = tuple(file.name for file in checkpoint.files)
    names = checkpoint.location.names
    others = tuple(float_matrices(checkpoint))
    return FolderFacts(checkpoint.format, checkpoint.variant, configs, files, names, tuple(layers), floats, undescribed, tp, others)


def _types(checkpoint: Checkpoint) -> dict[str, str]:
    """msModelSlim: the type of each module's weight; {} for other formats."""
    path = find_description(checkpoint.location) if checkpoint.format == "msmodelslim" else None
    if path is None:
        return {}
    return {key.removesuffix(".weight"): kind for key, kind in read_json(path).items() if key.endswith(".weight") and isinstance(kind, str)}


assert {name for consumer in CONSUMERS.values() for name in consumer.formats} <= {spec.name for spec in FORMATS}
