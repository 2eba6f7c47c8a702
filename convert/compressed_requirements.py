"""Kinds of requirements of compressed-tensors' folders, in the words of ``requirements``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from formats.compressed_config import CompressedConfig, is_embedding

from .fitting import FUSED
from .requirements import (
    REQUANTIZE,
    ROW_PARALLEL,
    TO_COMPRESSED,
    TO_DENSE,
    FolderFacts,
    LayerFacts,
    Requirement,
    Unmet,
    by_layer,
    part_of,
)


def known_scheme(objection: Callable[[LayerFacts], str | None], wanted: str, source: str, mend: str = REQUANTIZE) -> Requirement:
    """A loader has a class for every layer's weights and inputs together; ``objection`` says why it has none."""
    return Requirement("scheme", by_layer(objection), wanted, mend, source)


def symmetric_with_inputs(source: str) -> Requirement:
    """Integer weights are symmetric where inputs are quantized, by what the file says."""

    def wrong(layer: LayerFacts) -> str | None:
        return "zero points" if layer.inputs and layer.scheme is not None and not layer.scheme.weights.symmetric else None

    mend = "quantize again with symmetric weights, or: " + TO_DENSE
    return Requirement("symmetric", by_layer(wrong), "symmetric weights where inputs are quantized", mend, source)


def no_group_order(source: str) -> Requirement:
    """No group of config_groups has the actorder "group"."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        found = []
        for name, group in _objects(facts.said.get("config_groups")):
            order = _object(group.get("weights")).get("actorder")
            if order is True or (isinstance(order, str) and order.lower() in {"group", "dynamic"}):
                found.append((f"config_groups.{name}", f"actorder {order!r}"))
        return found

    mend = "quantize again with actorder 'weight' or without, or: " + TO_DENSE
    return Requirement("act-order", unmet, "no actorder 'group'", mend, source)


def floats_ignored(source: str, head: bool = False) -> Requirement:
    """``ignore`` names every linear in float, or no target matches it; head: lm_head and what else is outside of the blocks too."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        config, quantized = CompressedConfig(facts.said), {layer.name for layer in facts.layers}
        names = [*facts.floats, *(name for name in (*facts.others, "lm_head") if head and not is_embedding(name))]
        groups = ((name, config.find(name)) for name in dict.fromkeys(names) if name not in quantized)
        return [(name, "float, but not in ignore") for name, group in groups if group is not None and group.weights is not None]

    return Requirement("ignore", unmet, "every float linear in ignore", TO_COMPRESSED + ", which lists them", source)


def whole_blocks(source: str) -> Requirement:
    """Blocks of outputs do not lie across what is fused, or across ranks; blocks of inputs not across ranks."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        found = []
        last = {fused[-1] for fused in FUSED}
        merged = {leaf for fused in FUSED for leaf in fused}
        for layer in facts.layers:
            block = None if layer.scheme is None else layer.scheme.weights.block
            if block is None:
                continue
            rows, columns = part_of(layer, facts)
            split = facts.tp > 1 and layer.leaf not in ROW_PARALLEL
            cut = rows % block[0] and (split or (layer.leaf in merged and layer.leaf not in last))
            if cut or (facts.tp > 1 and layer.leaf in ROW_PARALLEL and columns % block[1]):
                found.append((layer.name, f"a part of {[rows, columns]} in blocks of {list(block)}"))
        return found

    mend = "use fewer ranks, or leave this linear and those fused with it in float, or: " + TO_DENSE
    return Requirement("blocks", unmet, "whole blocks in each part of fused and split linears", mend, source)


def one_input_scale(source: str) -> Requirement:
    """Linears that are fused have one static scale and zero point of their inputs, which are the same inputs."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        scales = {layer.name: layer.input_scale for layer in facts.layers if layer.input_scale}
        found = []
        for name, scale in scales.items():
            parent, _, leaf = name.rpartition(".")
            siblings = (f"{parent}.{other}" for fused in FUSED if leaf in fused for other in fused)
            odd = next((sibling for sibling in siblings if scales.get(sibling, scale) != scale), None)
            if odd is not None:
                found.append((name, f"{scale[0]:.6g}, and {odd.rpartition('.')[2]} has {scales[odd][0]:.6g}"))
        return found

    mend = "quantize again with one scale for what is fused, or: weighbridge convert {dir} OUT --to dense --allow activations-dropped"
    return Requirement("input-scale", unmet, "one input_scale, and one zero point, for q/k/v, and for gate/up", mend, source)


def kv_cache_in(strategies: Iterable[str], source: str) -> Requirement:
    """A quantized KV cache is of symmetric 8-bit floats, with scales per one of ``strategies``."""
    fits = tuple(strategies)

    def unmet(facts: FolderFacts) -> list[Unmet]:
        said = facts.said.get("kv_cache_scheme")
        if said is None:
            return []
        scheme = _object(said)
        known = scheme.get("type") == "float" and scheme.get("num_bits") == 8 and scheme.get("symmetric") is True
        if known and scheme.get("strategy") in fits:
            return []
        sign = "symmetric" if scheme.get("symmetric") else "asymmetric"
        return [("kv_cache_scheme", f"{scheme.get('num_bits')}-bit {scheme.get('type')}, {sign}, per {scheme.get('strategy')}")]

    mend = 'write "kv_cache_scheme": null into config.json: the cache will be kept in float'
    return Requirement("kv-cache", unmet, f"a KV cache of symmetric 8-bit floats per {' or '.join(fits)}, or none", mend, source)


def formats_said(source: str) -> Requirement:
    """Every group has a format, its own or that of the whole."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        whole = facts.said.get("format")
        whole = None if whole == "mixed-precision" else whole
        groups = _objects(facts.said.get("config_groups"))
        return [(f"config_groups.{name}", "no format") for name, group in groups if group.get("format", whole) is None]

    return Requirement("format-said", unmet, "a format for every group of config_groups", TO_COMPRESSED, source)


def packed_as_now(source: str) -> Requirement:
    """Words are packed as the tool has packed them since 0.18, and zero points too (since 0.9.4)."""

    def unmet(facts: FolderFacts) -> list[Unmet]:
        version = str(facts.said.get("version", ""))
        parts = [int(part) for part in re.findall(r"\d{1,6}", version)[:3]]
        if not parts:
            return []
        found = []
        for layer in facts.layers:
            if "weight_packed" not in layer.parts or layer.element != "int":
                continue
            if parts < [0, 18] and 32 % layer.bits:
                found.append((layer.name, f"{layer.bits}-bit codes in words of {version}"))
            elif parts < [0, 9, 4] and "weight_zero_point" in layer.parts and not layer.one_scale:
                found.append((layer.name, f"zero points as {version} stored them"))
        return found

    mend = "4- and 8-bit codes: " + TO_COMPRESSED + "; others: " + TO_DENSE
    return Requirement("packing", unmet, "words as they are packed since 0.18, zero points as since 0.9.4", mend, source)


def _object(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, dict) else {}


def _objects(found: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """The entries of a JSON object that are objects themselves."""
    return [(name, entry) for name, entry in _object(found).items() if isinstance(entry, dict)]
