"""The words that ``consumers`` is written in: facts of layers and folders, a requirement, and the kinds of requirements.

A requirement is a predicate over facts that says where it is not met and what was found there; it reads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from formats.ir import QuantScheme

from .fitting import FUSED

Unmet = tuple[str, str]
"""(layer or file, what was found there)"""


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One quantized layer. group_size -1: per channel; bits 0 and sizes 0 where nothing says them; parts: which tensors are there.

    type            msModelSlim's type ("W8A16"), else ""
    one_scale       its group is the whole tensor
    wrong_version   GPTQ: every zero point is the middle code of the version that the config does not say
    scheme          how weights and inputs are quantized; None where only stored shapes were looked at (GPTQ, AWQ)
    inputs          "static", "dynamic", "both"; "": they are not quantized
    input_scale     static scale of the inputs, and their zero point
    deq_dtype       msModelSlim: dtype of deq_scale; "": there is none
    """

    name: str
    out: int
    in_: int
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    scale_dtype: str
    parts: frozenset[str]
    type: str = ""
    wrong_version: bool = False
    one_scale: bool = False
    scheme: QuantScheme | None = None
    inputs: str = ""
    input_scale: tuple[float, ...] = ()
    deq_dtype: str = ""

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def element(self) -> str:
        """What a code of the weights means."""
        return "int" if self.scheme is None else self.scheme.weights.element

    @property
    def weight_only(self) -> bool:
        """Whether it has integer codes, and inputs in float."""
        return self.element == "int" and not self.inputs


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """One folder, for ``tp`` ranks of tensor parallelism.

    configs        JSON objects by name: "config.json" (whole), "quantization_config" (in it), "quantize_config.json", "quant_config.json"
    files          names of the weight files; names: of everything in the folder
    floats         linears in blocks that are left in float; others: modules outside of the blocks with a float matrix
    undescribed    msModelSlim: linears that the description does not name
    """

    format: str
    variant: str
    configs: Mapping[str, Mapping[str, Any]]
    files: tuple[str, ...]
    names: tuple[str, ...]
    layers: tuple[LayerFacts, ...] = ()
    floats: tuple[str, ...] = ()
    undescribed: tuple[str, ...] = ()
    tp: int = 1
    others: tuple[str, ...] = ()

    @property
    def said(self) -> Mapping[str, Any]:
        """config.json's quantization_config, or {}."""
        return self.configs.get("quantization_config", {})

    @property
    def model_dtype(self) -> str | None:
        """The dtype that config.json says, by torch's name; None if it leaves it open."""
        config = self.configs.get("config.json", {})
        dtype = config.get("dtype", config.get("torch_dtype"))
        return None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One thing that a consumer needs.

    unmet    every place where the facts do not meet it, with what was found; pure
    wanted   what is needed, in words; mend: a command ({dir} and OUT are folders) or what else to do; source: document, version
    """

    code: str
    unmet: Callable[[FolderFacts], list[Unmet]]
    wanted: str
    mend: str
    source: str


Where = Literal["quantization_config", "quantize_config.json", "quant_config.json", "config.json"]

TO_GPTQ, TO_AWQ, TO_DENSE, TO_COMPRESSED = (
    f"weighbridge convert {{dir}} OUT --to {name}" for name in ("gptq", "awq", "dense", "compressed-tensors")
)
FOR_VLLM_ASCEND = "weighbridge convert {dir} OUT --to msmodelslim --for vllm-ascend"
FOR_MINDIE = "weighbridge convert {dir} OUT --to msmodelslim --for mindie"
DOCTOR = "weighbridge doctor {dir} --fix OUT"
REQUANTIZE = "quantize again with a scheme that it takes, or: " + TO_DENSE


def by_layer(wrong: Callable[[LayerFacts], str | None]) -> Callable[[FolderFacts], list[Unmet]]:
    """Places where ``wrong`` finds something in a layer."""
    return lambda facts: [(layer.name, found) for layer in facts.layers if (found := wrong(layer)) is not None]


def bits(allowed: Iterable[int], source: str, mend: str = REQUANTIZE) -> Requirement:
    """Layers have one of ``allowed`` bits."""
    fits = tuple(allowed)

    def wrong(layer: LayerFacts) -> str | None:
        found = f"{layer.bits} bits" if layer.bits else "bits that nothing says"
        return None if layer.bits in fits else found

    return Requirement("bits", by_layer(wrong), f"{'/'.join(map(str, fits))}-bit weights", mend, source)


def groups(allowed: Iterable[int], source: str, mend: str = REQUANTIZE, said: bool = False) -> Requirement:
    """Layers have one of ``allowed`` group sizes; a group as long as the input is per channel too. said: the config says so, if any."""
    fits = tuple(allowed)

    def wrong(layer: LayerFacts) -> str | None:
        own = layer.in_ if layer.group_size == -1 else layer.group_size
        return None if layer.group_size in fits or own in fits or (own == layer.in_ and -1 in fits) else f"group size {layer.group_size}"

    def unmet(facts: FolderFacts) -> list[Unmet]:
        spoken = facts.said.get("group_size")
        odd = [("quantization_config", f"group_size {spoken!r}")] if said and spoken not in (None, 0, *fits) else []
        return by_layer(wrong)(facts) or odd

    return Requirement("group-size", unmet, f"group size {', '.join(map(str, fits))} (-1: per channel)", mend, source)


def symmetric(source: str, mend: str = "quantize again, symmetric; or, of 4 bits: " + TO_AWQ) -> Requirement:
    """No layer has zero points besides the middle code."""
    return Requirement("symmetric", by_layer(lambda layer: None if layer.symmetric else "zero points"), "symmetric weights", mend, source)


def sym_said(source: str, default: object = None) -> Requirement:
    """The config says that symmetric weights are symmetric; ``default``: what a config without ``sym`` says."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        said = facts.configs.get("quantization_config", {}).get("sym", default)
        return [("quantization_config", f"sym {said!r}")] if said is not True and all(layer.symmetric for layer in facts.layers) else []

    return Requirement("sym", unmet, "sym true", DOCTOR, source)


def right_version(source: str) -> Requirement:
    """GPTQ: zero points are stored as checkpoint_format says."""
    wrong = by_layer(lambda layer: "zero points of the other version" if layer.wrong_version else None)
    return Requirement("zero-point-version", wrong, "zero points as checkpoint_format says", DOCTOR, source)


def no_act_order(source: str, channel: bool = False) -> Requirement:
    """desc_act is false (``channel``: or there is one group a channel)."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        said = facts.configs.get("quantization_config", {}).get("desc_act") is True
        ordered = [layer for layer in facts.layers if (said or layer.act_order) and not (channel and layer.group_size == -1)]
        return [(layer.name, "an irregular g_idx" if layer.act_order else "desc_act true") for layer in ordered]

    wanted = "desc_act false" + (", or group size -1" if channel else "")
    mend = "where g_idx is regular, write desc_act false into both configs (no weight changes); else: " + TO_DENSE
    return Requirement("act-order", unmet, wanted, mend, source)


def scales(allowed: Iterable[str], source: str) -> Requirement:
    """Scales are stored in one of ``allowed`` dtypes."""
    fits = tuple(allowed)
    mend = "weighbridge convert {dir} OUT --to {format} --scale-dtype float16"
    wrong = by_layer(lambda layer: None if layer.scale_dtype in fits else layer.scale_dtype)
    return Requirement("scale-dtype", wrong, f"scales in {' or '.join(fits)}", mend, source)


def scales_of_model(source: str) -> Requirement:
    """Scales are in the model's dtype, or in half precision: float32 ones would be rounded where the model is not float32."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        if facts.model_dtype == "float32":
            return []
        return [(layer.name, layer.scale_dtype) for layer in facts.layers if layer.element == "int" and layer.scale_dtype == "F32"]

    mend = "weighbridge convert {dir} OUT --to {format} --scale-dtype bfloat16, or float16: rounded before the proof, and measured"
    return Requirement("scale-dtype", unmet, "scales in the model's dtype", mend, source)


def multiple(out: int, in_: int, source: str) -> Requirement:
    """[out, in] of every layer, and of every rank's part of it, are multiples."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        found = []
        for layer in facts.layers:
            rows, columns = part_of(layer, facts)
            if rows % out or columns % in_:
                found.append(
                    (layer.name, f"[out, in] = {[layer.out, layer.in_]}" + (f", a rank's part {[rows, columns]}" if facts.tp > 1 else ""))
                )
        return found

    return Requirement(
        "shape-multiple", unmet, f"[out, in] of each rank's part in multiples of {out} x {in_}", "use fewer ranks, or: " + TO_DENSE, source
    )


ROW_PARALLEL = frozenset({"o_proj", "down_proj", "w2", "out_proj", "fc2", "dense_4h_to_h"})
"""Linears that engines split along their inputs; all others along their outputs."""


def part_of(layer: LayerFacts, facts: FolderFacts) -> tuple[float, float]:
    """[out, in] of one rank's part; a fraction where ranks do not divide it. k and v heads are copied where there are too few."""
    if layer.leaf in ROW_PARALLEL:
        return layer.out, _divided(layer.in_, facts.tp)
    ranks = facts.tp
    heads = facts.configs.get("config.json", {}).get("num_key_value_heads")
    if layer.leaf in {"k_proj", "v_proj"} and isinstance(heads, int) and 0 < heads < ranks:
        ranks = heads
    return _divided(layer.out, ranks), layer.in_


def _divided(size: int, ranks: int) -> float:
    return size // ranks if size % ranks == 0 else size / ranks


def whole_groups(source: str) -> Requirement:
    """With tensor parallelism each rank has whole groups."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        found = []
        for layer in facts.layers:
            rows, columns = part_of(layer, facts)
            size = layer.group_size
            if rows != int(rows) or columns != int(columns) or (size > 0 and columns % size):
                found.append((layer.name, f"a rank's part is {[rows, columns]}, groups have {size}"))
        return found

    mend = "use fewer ranks, or smaller groups"
    return Requirement("tensor-parallel", unmet, "whole groups of inputs on each rank", mend, source)


def fused_alike(source: str, exactly: bool = False, only: tuple[tuple[str, ...], ...] = FUSED) -> Requirement:
    """Of ``only``, linears that are fused are all quantized alike, or all float; exactly: to every argument of the scheme."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        schemes: dict[str, object] = {
            layer.name: (layer.bits, layer.group_size, layer.type, layer.scheme if exactly else layer.inputs) for layer in facts.layers
        }
        schemes |= dict.fromkeys(facts.floats, "float")
        found = []
        for layer in facts.layers:
            parent = layer.name[: -len(layer.leaf)]
            for fused in only:
                odd = [
                    other
                    for other in fused
                    if layer.leaf in fused and schemes.get(parent + other, schemes[layer.name]) != schemes[layer.name]
                ]
                if odd:
                    found.append((layer.name, f"its scheme differs from that of {odd[0]}"))
        return found

    wanted = "q/k/v quantized alike, and gate/up" if only == FUSED else "gate/up quantized alike"
    return Requirement("fused", unmet, wanted, "quantize or roll back all of them together, or: " + TO_DENSE, source)


def part(name: str, source: str, why: str) -> Requirement:
    """Every layer has the tensor ``name``."""
    return Requirement(
        f"no-{name}", by_layer(lambda layer: None if name in layer.parts else f"no {name}"), f"{name} of each layer ({why})", DOCTOR, source
    )


def keys(where: Where, names: Iterable[str], source: str, mend: str = DOCTOR) -> Requirement:
    """``where`` has each of ``names``; "a|b": either."""
    wanted = tuple(names)

    def unmet(facts: FolderFacts) -> list[Unmet]:
        config = facts.configs.get(where)
        if config is None:
            return [(where, "is not there")]
        absent = [name for name in wanted if not any(choice in config for choice in name.split("|"))]
        return [(where, f"no {', '.join(absent)}")] if absent else []

    return Requirement("config-keys", unmet, f"{where} with {', '.join(wanted)}", mend, source)


def value(
    where: Where,
    key: str,
    allowed: Iterable[object],
    source: str,
    mend: str,
    *,
    code: str = "",
    default: object = None,
    exactly: bool = False,
) -> Requirement:
    """``key`` of ``where`` is one of ``allowed`` (text: in any case, unless ``exactly``)."""
    fits = tuple(allowed)

    def unmet(facts: FolderFacts) -> list[Unmet]:
        found = facts.configs.get(where, {}).get(key, default)
        plain = found.lower() if isinstance(found, str) and not exactly else found
        return [] if plain in fits else [(where, f"{key} {found!r}")]

    return Requirement(code or key.replace("_", "-"), unmet, f"{key} {' or '.join(repr(one) for one in fits)}", mend, source)


def without_key(where: Where, key: str, source: str, mend: str) -> Requirement:
    """``where`` does not have ``key`` at all (or nothing in it)."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        config = facts.configs.get(where, {})
        return [(where, f"{key} {config[key]!r}"[:80])] if key in config and config[key] not in (None, {}) else []

    return Requirement(key.replace("_", "-"), unmet, f"no {key} in {where}", mend, source)


def standard_names(source: str, mend: str = TO_GPTQ) -> Requirement:
    """The weights are model.safetensors, or shards with model.safetensors.index.json."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        if "model.safetensors" in facts.files or "model.safetensors.index.json" in facts.names:
            return []
        return [(facts.files[0] if facts.files else "the folder", "another name")]

    return Requirement("file-names", unmet, "model.safetensors, or shards and model.safetensors.index.json", mend, source)


def one_file(source: str) -> Requirement:
    """The weights are not sharded."""
    return Requirement(
        "one-file",
        lambda facts: [(facts.files[0], f"{len(facts.files)} shards")] if len(facts.files) > 1 else [],
        "one weight file",
        "weighbridge convert {dir} OUT --to {format} --max-shard-size 1000GB",
        source,
    )


def variant(allowed: Iterable[str], source: str, mend: str) -> Requirement:
    """The format's variant, by its name here, is one of ``allowed``."""
    fits = tuple(allowed)
    return Requirement(
        "variant",
        lambda facts: [] if facts.variant in fits else [("the folder", f"{facts.format}:{facts.variant}")],
        f"variant {' or '.join(fits)}",
        mend,
        source,
    )


def version_word(source: str) -> Requirement:
    """AutoGPTQ compares AWQ's version with the capital word."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        config = facts.configs.get("quant_config.json", facts.configs.get("quantize_config.json"))
        if config is None:
            return [("quant_config.json", "is not there")]
        return [] if config.get("version") == "GEMM" else [("quant_config.json", f"version {config.get('version')!r}")]

    return Requirement("version", unmet, 'quant_config.json with version exactly "GEMM"', TO_GPTQ, source)


def types(allowed: Iterable[str], source: str, mend: str) -> Requirement:
    """msModelSlim types of linears, where a description says them."""
    fits = frozenset(allowed)
    return Requirement(
        "type",
        by_layer(lambda layer: None if layer.type in fits or not layer.type else f"type {layer.type}"),
        f"a type of {', '.join(sorted(fits))}",
        mend,
        source,
    )


def file_named(name: str, source: str, mend: str) -> Requirement:
    """The folder has a file of exactly this name."""
    return Requirement(
        "file-names", lambda facts: [] if name in facts.names else [("the folder", f"no {name}")], f"a file {name}", mend, source
    )


def yaml_beside(source: str) -> Requirement:
    """A YAML file lies beside MindSpore's weights, from which the network is built."""
    mend = "weighbridge convert {dir} OUT --to mindspore --base-model with the float model's folder"
    return Requirement(
        "file-names",
        lambda facts: [] if any(name.endswith((".yaml", ".yml")) for name in facts.names) else [("the folder", "no YAML")],
        "a predict_*.yaml beside the weights",
        mend,
        source,
    )


def rank_for_each(source: str) -> Requirement:
    """A folder of ranks has one for each card."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        ranks = {found[0] for name in facts.names if (found := re.match(r"rank_\d+", name))}
        return [("the folder", f"parts for {len(ranks)} ranks, on {facts.tp}")] if len(ranks) > 1 and len(ranks) != facts.tp else []

    mend = "weighbridge convert {dir} OUT --to mindspore --tp with that number; or check with --tp as it is"
    return Requirement("ranks", unmet, "one file, or a rank for each card", mend, source)


PER_CHANNEL = frozenset({"W8A16", "W8A8", "W8A8_DYNAMIC", "W8A8_MIX"})
"""Types whose scales vllm-ascend holds as [N, 1]."""


def not_per_channel(layer: LayerFacts) -> str | None:
    """What a layer of ``PER_CHANNEL`` has that is not one scale per channel."""
    if layer.type not in PER_CHANNEL or not (layer.one_scale or layer.group_size > 0):
        return None
    return "one scale" if layer.one_scale else f"groups of {layer.group_size}"


def deq_scales(source: str) -> Requirement:
    """msModelSlim: deq_scale is stored as the engine holds it, float32 for bfloat16 models, int64 for float16 ones."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        wanted = {"bfloat16": "F32", "float16": "I64"}.get(facts.model_dtype or "")
        if facts.model_dtype is None:
            return []
        found = [(layer, f"{layer.deq_dtype} in a model of {facts.model_dtype}") for layer in facts.layers if layer.deq_dtype]
        return [(layer.name, found) for layer, found in found if layer.deq_dtype != wanted]

    mend = "serve it in the other dtype (--dtype), or: " + FOR_VLLM_ASCEND + " --serve-dtype float16, or bfloat16"
    return Requirement("deq-scale", unmet, "deq_scale in float32 for bfloat16, in int64 for float16", mend, source)


def says_quantize(source: str) -> Requirement:
    """MindIE: config.json's ``quantize`` names the description's file, unless that has the name that is looked for first."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        quantize = facts.configs.get("config.json", {}).get("quantize")
        if "quant_model_description.json" in facts.names:
            return []
        if quantize is None:
            return [("config.json", "no quantize")]
        name = f"quant_model_description_{str(quantize).lower()}.json"
        return [] if name in facts.names else [("the folder", f"no {name}")]

    wanted = "quant_model_description.json, or config.json's quantize and quant_model_description_<quantize>.json"
    return Requirement("config-keys", unmet, wanted, FOR_MINDIE, source)


def says_group_size(allowed: Iterable[int], source: str) -> Requirement:
    """MindIE: groups are of one of ``allowed`` sizes (0: none), and config.json says which, unless the description does."""
    fits = frozenset(allowed)

    def unmet(facts: FolderFacts) -> list[Unmet]:
        said = facts.said.get("group_size")
        odd = [] if said is None or said in fits else [("quantization_config", f"group_size {said!r}")]
        grouped = [layer for layer in facts.layers if layer.group_size > 0]
        odd += [(layer.name, f"groups of {layer.group_size}") for layer in grouped if layer.group_size not in fits]
        if not odd and said is None and grouped and "quant_model_description.json" not in facts.names:
            return [("quantization_config", "no group_size")]
        if said is not None:
            odd += [(layer.name, f"groups of {layer.group_size}, not {said}") for layer in grouped if layer.group_size != said]
        return odd

    wanted = f"groups of {', '.join(str(size) for size in sorted(fits) if size)}, and their size in quantization_config"
    return Requirement("group-size", unmet, wanted, FOR_MINDIE + ", or quantize again with such groups", source)


def described(source: str) -> Requirement:
    """Every linear that engines fuse with others has a type in msModelSlim's description, float ones too."""
    mend = 'add "<module>.weight": "FLOAT" to the description for each'

    def unmet(facts: FolderFacts) -> list[Unmet]:
        return [(name, "no type") for name in facts.undescribed if any(name.rpartition(".")[2] in fused for fused in FUSED)]

    return Requirement("described", unmet, "a type for every shard of a fused linear", mend, source)


def lm_head_float(source: str) -> Requirement:
    """lm_head is not quantized."""
    wrong = by_layer(lambda layer: "quantized" if layer.leaf == "lm_head" else None)
    return Requirement("lm-head", wrong, "lm_head in float", TO_GPTQ, source)


def lm_head_said(source: str) -> Requirement:
    """A quantized lm_head is said in the config."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        said = facts.configs.get("quantization_config", {}).get("lm_head") is True
        return [(layer.name, "quantized, but lm_head is not true") for layer in facts.layers if layer.leaf == "lm_head" and not said]

    return Requirement("lm-head", unmet, "lm_head true in quantization_config", 'write "lm_head": true into both configs', source)


def floats_named(source: str) -> Requirement:
    """AWQ: linears left in float are named in modules_to_not_convert (whole names satisfy every loader's way of matching)."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        named = facts.configs.get("quantization_config", {}).get("modules_to_not_convert") or []
        parts = [str(part) for part in named] if isinstance(named, list) else []
        return [(name, "float, but not named") for name in facts.floats if not any(part in name for part in parts)]

    mend = "name them in modules_to_not_convert, or: weighbridge convert {dir} OUT --to awq"
    return Requirement("modules-to-not-convert", unmet, "every float linear in modules_to_not_convert", mend, source)


def half_precision(source: str) -> Requirement:
    """config.json's dtype is a half-precision one, or left out."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        return [] if facts.model_dtype in (None, "float16", "bfloat16") else [("config.json", f"dtype {facts.model_dtype}")]

    return Requirement(
        "model-dtype", unmet, "dtype float16 or bfloat16", "serve it with --dtype float16, or write it into config.json", source
    )


def only_in(variants: Iterable[str], requirement: Requirement) -> Requirement:
    """``requirement`` of some variants of the format; others are free of it."""
    fits = frozenset(variants)
    return replace(requirement, unmet=lambda facts: requirement.unmet(facts) if facts.variant in fits else [])


def of(which: Callable[[LayerFacts], bool], requirement: Requirement) -> Requirement:
    """``requirement`` of some layers only; nothing is required of a folder without any of them."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        layers = tuple(layer for layer in facts.layers if which(layer))
        return requirement.unmet(replace(facts, layers=layers)) if layers else []

    return replace(requirement, unmet=unmet)
