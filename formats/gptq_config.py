"""What a GPTQ config says beyond numbers: rules for single modules, biases that a tool made up, and who wrote the file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .checkpoint import ZerosReading
from .errors import UnreadableError
from .patterns import Budget, Pattern

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_BIASED: dict[str, tuple[str, ...]] = {
    "gemma": (),
    "gemma2": (),
    "llama": (),
    "mistral": (),
    "qwen2": ("q_proj", "k_proj", "v_proj"),
    "qwen3": (),
}
"""By model_type, the linears of a block that have a bias in transformers, where config.json does not say otherwise."""


class ModuleRules:
    """GPTQModel's ``dynamic``: by regular expression, what is quantized otherwise ("+:" or no sign) or left in float ("-:").

    An expression is matched at the beginning of the module's name; "-:" rules come first, then the first that matches wins.
    Rules for one whole name (``^model\\.layers\\.0$``) are looked up, so that thousands of them cost nothing; all others are
    matched within a budget of steps.
    """

    def __init__(self, rules: Any) -> None:
        if rules is not None and not isinstance(rules, dict):
            raise UnreadableError(f"config.json: dynamic is a {type(rules).__name__}, wanted an object of patterns")
        self._whole: dict[str, tuple[int, Mapping[str, Any] | None]] = {}
        self._patterns: list[tuple[int, Pattern, Mapping[str, Any] | None]] = []
        self._budget = Budget()
        for position, (sign, rule) in enumerate(sorted((rules or {}).items(), key=lambda item: not item[0].startswith("-:"))):
            pattern, leaves = sign.removeprefix("+:").removeprefix("-:"), sign.startswith("-:")
            if not (leaves or isinstance(rule, dict)):
                raise UnreadableError(f"config.json: dynamic's rule for {sign!r} is a {type(rule).__name__}, wanted an object")
            said = None if leaves else rule
            body = pattern[1:-1]
            name = re.sub(r"\\(.)", r"\1", body)
            if pattern == f"^{body}$" and re.escape(name) == body:
                self._whole.setdefault(name, (position, said))
                continue
            self._patterns.append((position, Pattern(pattern), said))

    def find(self, name: str) -> Mapping[str, Any] | None:
        """What the rules say of module ``name`` ({} if nothing); None: it stays in float."""
        position, said = self._whole.get(name, (None, {}))
        for place, pattern, rule in self._patterns:
            if (position is None or place < position) and pattern.matches(name, self._budget):
                return rule
        return said


def has_bias(config: Mapping[str, Any], name: str) -> bool:
    """Whether the model that config.json describes has a bias in linear ``name``; True where that is not known."""
    kind, leaf = config.get("model_type"), name.rpartition(".")[2]
    if not isinstance(kind, str) or kind not in _BIASED or leaf not in (*_ATTENTION, *_MLP):
        return True
    said = "attention_bias" if leaf in _ATTENTION else "mlp_bias"
    return leaf in _BIASED[kind] or bool(config.get(said, False))


def usual_reading(config: Mapping[str, Any], bits: int) -> ZerosReading:
    """How the tool that wrote a v1 file reads zero points stored as the largest value.

    GPTQModel adds a word of ones, with carry (3 bits: lane by lane); AutoGPTQ adds 1 to every lane and masks, but for 3 bits
    masks first.
    """
    meta = config.get("meta")
    quantizer = str(meta.get("quantizer", "") if isinstance(meta, dict) else "").lower()
    if "gptqmodel" in quantizer:
        return "mask" if bits == 3 else "carry"
    return "plain" if bits == 3 else "mask"
