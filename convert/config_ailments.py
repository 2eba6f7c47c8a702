"""What can be wrong with the configs of an AWQ or GPTQ folder: keys against what the tensors say, one file against the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from formats.errors import UnreadableError
from formats.patterns import Budget, Pattern

from .patient import INSIDE, QUANTIZE, Patient
from .stored import is_irregular, is_symmetric

OLD_NAMES = {"bits": "w_bit", "group_size": "q_group_size"}
MEANT = ("quant_method", "bits", "group_size", "desc_act", "sym", "checkpoint_format", "lm_head", "dynamic")
"""Keys of quantize_config.json that change how weights are read; the others are provenance."""


def config_name(patient: Patient) -> str:
    """The file whose quantization config readers look at first."""
    return INSIDE if patient.inside is not None or patient.beside is None else QUANTIZE


class DynamicRules:
    """GPTQModel's rules for modules, as far as they can be read: the first pattern that matches, "-:" ones before others."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        rules = config.get("dynamic")
        self._budget = Budget()
        self._rules: list[tuple[Pattern, Mapping[str, Any]]] = []
        for pattern, rule in sorted(rules.items(), key=lambda item: not item[0].startswith("-:")) if isinstance(rules, Mapping) else ():
            with contextlib.suppress(UnreadableError):
                read = Pattern(pattern.removeprefix("-:").removeprefix("+:"))
                self._rules.append((read, rule if isinstance(rule, Mapping) else {}))

    def find(self, name: str) -> Mapping[str, Any] | None:
        """The rule for a module; None if no pattern matches it."""
        return next((rule for pattern, rule in self._rules if pattern.matches(name, self._budget)), None)


def _truth(patient: Patient, rules: DynamicRules) -> Iterator[tuple[str, Any, bool, str]]:
    """(key, value that shapes and data give, whether the claim agrees, what speaks for it). None: they give none."""
    claims, spelling = patient.claims, patient.spelling
    plain = [layer for layer in patient.sound if rules.find(layer.name) is None]
    if not plain:
        return
    yield "quant_method", spelling, str(claims.get("quant_method", "")).lower() == spelling, "the tensors' shapes"
    bits = {layer.bits for layer in plain}
    claimed = claims.get("bits", claims.get("w_bit") if spelling == "awq" else None)
    agrees = all(layer.bits == claimed for layer in plain)
    yield "bits", next(iter(bits)) if len(bits) == 1 else None, agrees, "the tensors' shapes"
    claimed = claims.get("group_size", claims.get("q_group_size") if spelling == "awq" else None)
    sizes = {layer.in_ // layer.groups for layer in plain}
    fits = all(layer.in_ // layer.groups == (layer.in_ if claimed == -1 else claimed) for layer in plain)
    grouped = any(layer.groups > 1 for layer in plain)
    derived = next(iter(sizes)) if len(sizes) == 1 else None
    yield "group_size", derived if grouped else -1, fits, "the tensors' shapes"
    if spelling == "awq":
        yield "zero_point", True, claims.get("zero_point") is True, "qzeros, which the GEMM layout always has"
        yield "version", "gemm", str(claims.get("version", "")).lower() == "gemm", "the tensors' shapes"
        return
    irregular = any(is_irregular(patient.tensors, layer) for layer in plain)
    if not any(item.code == "g_idx-range" for item in patient.ailments):
        yield "desc_act", irregular, isinstance(claims.get("desc_act"), bool) and (claims["desc_act"] or not irregular), "g_idx"
    if all("qzeros" in layer.parts for layer in plain) and not any(item.code == "mixed-versions" for item in patient.ailments):
        symmetric = all(is_symmetric(patient.tensors, layer, patient.version) for layer in plain)
        yield "sym", symmetric, claims.get("sym") is symmetric, "the zero points"


def configs(patient: Patient) -> None:
    """Keys against shapes, and the two configs against one another."""
    where, claims = config_name(patient), patient.claims
    rules, right = DynamicRules(claims), dict[str, Any]()
    for key, value, agrees, evidence in _truth(patient, rules):
        said = key in claims or (patient.spelling == "awq" and OLD_NAMES.get(key) in claims)
        if agrees:
            right[key] = claims.get(key, value)
            continue
        if value is not None:
            right[key] = value
        how = f"write {key} {value!r}" if value is not None else "layers differ, so no one value is right"
        if not said:
            patient.add("key-missing", where, f"there is no {key!r}", how, mendable=value is not None)
        else:
            found = f"{key} is {claims.get(key)!r}, but by {evidence} it is {'not one value' if value is None else repr(value)}"
            patient.add("key-contradicts", where, found, how, mendable=value is not None)
    if patient.version != patient.says:
        right["checkpoint_format"] = "gptq_v2" if patient.version == "v2" else "gptq"
        right |= {"format": right["checkpoint_format"]} if "format" in claims else {}
    elif patient.version_is_certain and ("checkpoint_format" in claims or "checkpoint_format" in (patient.beside or {})):
        right["checkpoint_format"] = claims.get("checkpoint_format", "gptq_v2" if patient.version == "v2" else "gptq")
    _dynamic(patient, rules)
    base = {key: value for key, value in claims.items() if key not in OLD_NAMES.values()}
    mended = {**base, **right}
    unlike_claims = any(claims.get(key) != value for key, value in right.items())
    if patient.config is None:
        patient.add("no-config", INSIDE, "there is no config.json", "copy the float model's config.json beside the weights")
    elif patient.inside is None:
        patient.cure.inside = mended
        found = "it has no quantization_config, without which transformers and vLLM take the weights for float"
        patient.add("config-missing", INSIDE, found, "put in what quantization config there is, and what shapes say", mendable=True)
    elif unlike_claims:
        patient.cure.inside = mended
    if patient.spelling == "gptq":
        _beside(patient, mended, right)


def _meaning(config: Mapping[str, Any], key: str) -> Any:
    """What a key says, or what its absence does."""
    if key == "checkpoint_format":
        return config.get(key) or config.get("format") or "gptq"
    return config.get(key) or False if key in {"lm_head", "dynamic"} else config.get(key)


def _beside(patient: Patient, mended: dict[str, Any], right: dict[str, Any]) -> None:
    """quantize_config.json, the only config that AutoGPTQ reads, against config.json's."""
    if patient.beside is None:
        patient.cure.beside = mended
        patient.add("quantize-config-missing", QUANTIZE, "AutoGPTQ reads no other config", "write what config.json says", mendable=True)
        return
    beside, inside = patient.beside, patient.inside or {}
    for key in MEANT if patient.inside is not None else ():
        if _meaning(inside, key) != _meaning(beside, key):
            found = f"it says {key} {beside.get(key)!r}, config.json {inside.get(key)!r}"
            how = "write into both what the tensors say" if key in right else "which is meant cannot be derived from the tensors"
            patient.add("configs-differ", QUANTIZE, found, how, mendable=key in right)
    if any(beside.get(key) != value for key, value in right.items()):
        patient.cure.beside = {**beside, **right}


def _dynamic(patient: Patient, rules: DynamicRules) -> None:
    """Layers under a rule of their own: the rule against their shapes."""
    for layer in patient.sound:
        rule = rules.find(layer.name)
        if rule is None:
            continue
        bits, size = rule.get("bits", patient.claims.get("bits")), rule.get("group_size", patient.claims.get("group_size"))
        if bits != layer.bits or layer.in_ // layer.groups != (layer.in_ if size == -1 else size):
            found = f"dynamic says {bits} bits, groups of {size}; its shapes {layer.bits} bits, groups of {layer.in_ // layer.groups}"
            patient.add("key-contradicts", layer.name, found, "correct the rule in dynamic")
