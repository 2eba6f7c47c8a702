"""compressed-tensors' ``quantization_config``: which module is quantized how.

``config_groups`` maps group names to objects with ``targets`` and the arguments of ``weights``, ``input_activations`` and
``output_activations``, or maps a preset's name to its targets alone. A key that the tool does not know is an error in a group or
in arguments, and ignored at the top.

A target or an entry of ``ignore`` is ``re:`` and an expression that is matched at the beginning of a module's name, or a name, or
the name of a class. ``ignore`` counts before everything. Of several targets an exact name counts first, then an expression, then
a class; among expressions the first in the order of their text, wherever they stand in the file. A checkpoint does not say its
modules' classes: every layer is a ``Linear`` here, or an ``Embedding`` where its name says so.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import RefusedError, UnreadableError
from .ir import ActOrder, Element, QuantArgs, Strategy
from .patterns import Budget, Pattern
from .spec import LayerTarget, ModelFacts

METHOD = "compressed-tensors"
VERSION = "0.17.0"
"""What written folders call themselves: vLLM 0.32 pins it, and its layouts of 4 and 8 bits are those of 0.9.4 to 0.20."""

ARGUMENTS = (
    "actorder", "block_structure", "dynamic", "group_size", "num_bits", "observer", "observer_kwargs", "scale_dtype", "strategy",
    "symmetric", "type", "zp_dtype",
)  # fmt: skip
"""The keys of one operand's arguments, as the tool orders them."""

GROUP_KEYS = ("format", "input_activations", "output_activations", "targets", "weights")
_STRATEGIES: dict[str, Strategy] = {
    "tensor": "tensor",
    "channel": "channel",
    "group": "group",
    "block": "block",
    "token": "token",
    "tensor_group": "group",
}
_ACT_ORDERS: dict[Any, ActOrder | None] = {
    None: None,
    False: None,
    True: "group",
    "group": "group",
    "dynamic": "group",
    "weight": "static",
    "static": "static",
}
_FLOATS: dict[int, Element] = {4: "e2m1", 8: "e4m3"}
_SPARSE = "sparse layouts were removed from compressed-tensors and are not read; ask for the checkpoint without sparse compression"


def _int(bits: int, strategy: str = "channel", group_size: int | None = None, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group_size, **more}


def _float(bits: int, strategy: str, group_size: int | None = None, **more: Any) -> dict[str, Any]:
    return _int(bits, strategy, group_size, **more) | {"type": "float"}


def _preset(weights: dict[str, Any] | None = None, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"weights": weights, "input_activations": inputs}


_W8A8 = _preset(_int(8), _int(8, "token", dynamic=True))
PRESETS: dict[str, dict[str, Any]] = {
    "UNQUANTIZED": _preset(),
    "W8A16": _preset(_int(8, "group", 128)),
    "W4A16": _preset(_int(4, "group", 128)),
    "W4A16_ASYM": _preset(_int(4, "group", 128, symmetric=False)),
    "W8A8": _W8A8,
    "INT8": _W8A8,
    "W4A8": _preset(_int(4, "group", 128), _int(8, "token", dynamic=True)),
    "W4AFP8": _preset(_int(4, "group", 128), _float(8, "token", dynamic=True)),
    "FP8": _preset(_float(8, "tensor"), _float(8, "tensor")),
    "FP8_DYNAMIC": _preset(_float(8, "channel"), _float(8, "token", dynamic=True)),
    "FP8_BLOCK": _preset(_float(8, "block", block_structure=[128, 128]), _float(8, "group", 128, dynamic=True)),
    "NVFP4A16": _preset(_float(4, "tensor_group", 16)),
    "NVFP4": _preset(_float(4, "tensor_group", 16), _float(4, "tensor_group", 16, dynamic="local")),
    "MXFP4A16": _preset(_float(4, "group", 32)),
    "MXFP4": _preset(_float(4, "group", 32), _float(4, "group", 32, dynamic=True)),
    "MXFP8A16": _preset(_float(8, "group", 32)),
    "MXFP8": _preset(_float(8, "group", 32), _float(8, "group", 32, dynamic=True)),
}
"""Schemes that a config may name instead of spelling them (compressed-tensors 0.17.0, ``quant_scheme.py``)."""


@dataclass(frozen=True, slots=True)
class Group:
    """One entry of config_groups.

    local   inputs have a static outer scale, and inner ones that are found at run time (``dynamic: "local"``)
    format  how its layers are stored, if the group or the whole config says it
    """

    name: str
    weights: QuantArgs | None
    inputs: QuantArgs | None
    outputs: QuantArgs | None
    local: bool
    format: str | None


class CompressedConfig:
    """A ``quantization_config``, checked.

    raises  UnreadableError (contradictory or unknown), RefusedError (sparse layouts and rotations, which are not read)
    """

    def __init__(self, said: Mapping[str, Any]) -> None:
        self.format = _text(said, "format")
        self.status = _text(said, "quantization_status") or "initialized"
        self.version = _version(_text(said, "version"))
        self._refuse_what_is_not_read(said)
        groups = said.get("config_groups") or {}
        if not isinstance(groups, dict):
            raise _wrong("config_groups", groups, "an object")
        self._named: dict[str, Group] = {}
        patterns: dict[str, Group] = {}
        for name, group in groups.items():
            targets, read = self._group(name, group)
            for target in targets:
                (patterns if target.startswith("re:") else self._named)[target] = read
        self._patterns = [(_pattern(target), patterns[target]) for target in sorted(patterns)]
        ignore = _texts(said.get("ignore") or [], "ignore")
        self._ignored = frozenset(entry for entry in ignore if not entry.startswith("re:"))
        self._ignored_patterns = [_pattern(entry) for entry in ignore if entry.startswith("re:")]
        self._budget = Budget(what="quantization_config")
        self._found: dict[str, Group | None] = {}
        kv_cache = said.get("kv_cache_scheme")
        if kv_cache is not None:
            read_args(kv_cache, "kv_cache_scheme")
        self.kv_cache: dict[str, Any] | None = None if kv_cache is None else dict(kv_cache)

    def _refuse_what_is_not_read(self, said: Mapping[str, Any]) -> None:
        sparsity, transform = said.get("sparsity_config") or {}, said.get("transform_config") or {}
        if not isinstance(sparsity, dict):
            raise _wrong("sparsity_config", sparsity, "an object")
        for layout in (self.format, sparsity.get("format")):
            if isinstance(layout, str) and (layout.startswith("sparse") or layout == "marlin-24"):
                raise RefusedError(f"config.json: the weights are stored as {layout!r}; {_SPARSE}")
        if transform.get("config_groups") if isinstance(transform, dict) else transform:
            raise RefusedError(
                "config.json: transform_config says that weights and activations are rotated, and no other format can say that; "
                "convert a checkpoint that was quantized without transforms"
            )

    def _group(self, name: str, group: Any) -> tuple[list[str], Group]:
        where = f"config_groups.{name}"
        if isinstance(group, list):
            if name.upper() not in PRESETS:
                raise UnreadableError(f"config.json: {where} lists targets, and {name!r} is no preset that is known: {', '.join(PRESETS)}")
            group = {"targets": group, **PRESETS[name.upper()]}
        if not isinstance(group, dict):
            raise _wrong(where, group, "an object, or a list of targets")
        _known(group, GROUP_KEYS, where)
        if "targets" not in group:
            raise UnreadableError(f"config.json: {where} has no targets; add the modules that it is about")
        operands = {
            key: None if group.get(key) is None else read_args(group[key], f"{where}.{key}")
            for key in ("weights", "input_activations", "output_activations")
        }
        inputs = group.get("input_activations") or {}
        stated = _text(group, "format", f"{where}.")
        if stated == "mixed-precision":
            raise UnreadableError(
                f"config.json: {where} has the format 'mixed-precision', which only the whole can have; correct the config"
            )
        if stated is not None and (stated.startswith("sparse") or stated == "marlin-24"):
            raise RefusedError(f"config.json: {where} is stored as {stated!r}; {_SPARSE}")
        whole = None if self.format == "mixed-precision" else self.format
        local = isinstance(inputs.get("dynamic"), str)
        return _texts(group["targets"], f"{where}.targets"), Group(
            name, operands["weights"], operands["input_activations"], operands["output_activations"], local, stated or whole
        )

    def find(self, name: str) -> Group | None:
        """The group that module ``name`` belongs to, or None: it stays in float, or no target matches it."""
        if name not in self._found:
            self._found[name] = None if self.ignores(name) else self._first(name)
        return self._found[name]

    def ignores(self, name: str) -> bool:
        """Whether ``ignore`` leaves the module in float."""
        if name in self._ignored or class_of(name) in self._ignored:
            return True
        return any(pattern.matches(name, self._budget) for pattern in self._ignored_patterns)

    def _first(self, name: str) -> Group | None:
        if name in self._named:
            return self._named[name]
        for pattern, group in self._patterns:
            if pattern.matches(name, self._budget):
                return group
        return self._named.get(class_of(name)) or self._only_class

    @functools.cached_property
    def _only_class(self) -> Group | None:
        """The group of classes by other names than Linear and Embedding, if there is one with weights."""
        found = {group for target, group in self._named.items() if re.fullmatch(r"[A-Z]\w*", target) and group.weights is not None}
        found -= {self._named.get("Linear"), self._named.get("Embedding")}
        return found.pop() if len(found) == 1 else None


def class_of(name: str) -> str:
    """The class of module ``name``, as far as its name says it."""
    return "Embedding" if is_embedding(name) else "Linear"


def is_embedding(name: str) -> bool:
    """Whether a module is an embedding by its name."""
    return any("embed" in part or part in {"wte", "wpe"} for part in name.split("."))


def read_args(said: Any, where: str) -> QuantArgs:
    """One operand's arguments; ``attn_head`` counts as one scale per channel. UnreadableError, or RefusedError for unread widths."""
    if not isinstance(said, dict):
        raise _wrong(where, said, "an object")
    _known(said, ARGUMENTS, where)
    kind, bits = said.get("type", "int"), said.get("num_bits", 8)
    kind = kind.lower() if isinstance(kind, str) else kind
    if kind not in ("int", "float"):
        raise _wrong(f"{where}.type", kind, "'int' or 'float'")
    if type(bits) is not int or bits < 1:
        raise _wrong(f"{where}.num_bits", bits, "a number of bits")
    if bits > 8 or (kind == "float" and bits not in _FLOATS):
        raise RefusedError(f"config.json: {where} has {kind} of {bits} bits, which is not read yet; integers have 1 to 8, floats 4 or 8")
    symmetric, dynamic = said.get("symmetric", True), said.get("dynamic", False)
    dynamic = dynamic.lower() if isinstance(dynamic, str) else dynamic
    if type(symmetric) is not bool:
        raise _wrong(f"{where}.symmetric", symmetric, "true or false")
    if not (type(dynamic) is bool or dynamic == "local"):
        raise _wrong(f"{where}.dynamic", dynamic, "true, false or 'local'")
    if kind == "float" and not symmetric:
        raise UnreadableError(f"config.json: {where} has floats that are not symmetric, which compressed-tensors cannot store; correct it")
    strategy, group_size, block = _sharing(said, where)
    order = said.get("actorder")
    order = order.lower() if isinstance(order, str) else order
    if not isinstance(order, (str, bool, type(None))) or order not in _ACT_ORDERS:
        raise _wrong(f"{where}.actorder", order, "null, 'group' or 'weight'")
    if strategy == "token" and not dynamic:
        raise UnreadableError(f"config.json: {where} has one static scale per token, which cannot be; correct the config")
    if dynamic == "local" and said.get("strategy") != "tensor_group":
        raise UnreadableError(f"config.json: {where} is dynamic 'local', which only the strategy 'tensor_group' can be; correct the config")
    if _ACT_ORDERS[order] == "group" and strategy != "group":
        raise UnreadableError(f"config.json: {where} has the actorder 'group', which needs groups; correct the config")
    element: Element = "int" if kind == "int" else _FLOATS[bits]
    return QuantArgs(bits, element, symmetric, strategy, group_size, block, _ACT_ORDERS[order], bool(dynamic))


def _sharing(said: Mapping[str, Any], where: str) -> tuple[Strategy, int | None, tuple[int, int] | None]:
    """(strategy, group size, block): what shares a scale."""
    size, strategy, block = said.get("group_size"), said.get("strategy"), said.get("block_structure")
    if size is not None and (type(size) is not int or size < -1 or size == 0):
        raise _wrong(f"{where}.group_size", size, "null, -1 or the inputs of a group")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = strategy.lower() if isinstance(strategy, str) else strategy
    if strategy == "attn_head":
        strategy = "channel"
    if not isinstance(strategy, str) or strategy not in _STRATEGIES:
        raise _wrong(f"{where}.strategy", strategy, f"one of {', '.join(_STRATEGIES)}")
    read = _STRATEGIES[strategy]
    grouped = size is not None and size > 0
    if grouped is not (read == "group"):
        raise UnreadableError(f"config.json: {where} has the strategy {strategy!r} and the group_size {size}; correct one of them")
    if isinstance(block, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", block):
        block = [int(extent) for extent in block.split("x")]
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise _wrong(f"{where}.block_structure", block, "null or [outputs, inputs]")
    if (block is None) is (read == "block"):
        raise UnreadableError(f"config.json: {where} has the strategy {strategy!r} and the block_structure {block}; correct one of them")
    return read, size if grouped else None, None if block is None else (block[0], block[1])


def _pattern(target: str) -> Pattern:
    return Pattern(target.removeprefix("re:"), "quantization_config")


def _version(said: str | None) -> tuple[int, int] | None:
    """(major, minor) of "0.17.1.a20250101", or None if nothing is said or it is no version."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})", said or "")
    return None if match is None else (int(match[1]), int(match[2]))


def _known(said: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in said:
        if key not in keys:
            raise UnreadableError(f"config.json: {where} has the unknown key {key[:80]!r}; compressed-tensors knows {', '.join(keys)}")


def _text(said: Mapping[str, Any], key: str, where: str = "") -> str | None:
    found = said.get(key)
    if found is not None and not isinstance(found, str):
        raise _wrong(f"{where}{key}", found, "a text")
    return found


def _texts(found: Any, where: str) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise _wrong(where, found, "a list of texts")
    return found


def _wrong(where: str, found: Any, wanted: str) -> UnreadableError:
    return UnreadableError(f"config.json: {where} is {str(found)[:80]!r}, wanted {wanted}; correct the config")


def format_of(layer: LayerTarget) -> str:
    """The format in which a layer is written; vLLM takes 4-bit integers with FP8 inputs packed."""
    weights, inputs = layer.scheme.weights, layer.scheme.inputs
    if weights.element != "int":
        return "float-quantized"
    return "pack-quantized" if inputs is None or (weights.bits, inputs.element) == (4, "e4m3") else "int-quantized"


def quantization_config(model: ModelFacts, variant: str) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """({}, config.json's quantization_config): the scheme of most layers for all Linear, every other for its layers by name."""
    schemes: dict[str, list[str]] = defaultdict(list)
    for layer in model.layers:
        schemes[json.dumps(_written_group(layer), sort_keys=True)].append(layer.name)
    most = [scheme for scheme, _ in Counter({scheme: len(names) for scheme, names in schemes.items()}).most_common()]
    groups = {}
    for number, scheme in enumerate(most):
        targets = schemes[scheme] if number else ["Linear", *(name for name in schemes[scheme] if _is_lm_head(name))]
        groups[f"group_{number}"] = json.loads(scheme) | {"targets": targets}
    formats = {group["format"] for group in groups.values()}
    ignore = {*model.float_linears, *(name for name in model.others if not is_embedding(name))}
    if not any(_is_lm_head(layer.name) for layer in model.layers):
        ignore.add("lm_head")
    return {}, {
        "config_groups": groups,
        "format": "mixed-precision" if len(formats) > 1 else next(iter(formats), "dense"),
        "global_compression_ratio": None,
        "ignore": sorted(ignore),
        "kv_cache_scheme": model.said.get("kv_cache_scheme") if model.attention else None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _is_lm_head(name: str) -> bool:
    return name.rpartition(".")[2] == "lm_head"


def _written_group(layer: LayerTarget) -> dict[str, Any]:
    """A group of config_groups without its targets. Inputs with scales in the file are static, whatever else they can be."""
    inputs = None
    if layer.scheme.inputs is not None:
        args, dynamic = layer.scheme.inputs, layer.inputs == "dynamic"
        found_at_run_time = args.strategy if args.strategy in {"tensor", "group"} else "token"
        strategy = found_at_run_time if dynamic else "tensor"
        args = replace(args, strategy=strategy, group_size=args.group_size if strategy == "group" else None, block=None, actorder=None)
        inputs = _written_args(args, dynamic)
    return {
        "format": format_of(layer),
        "input_activations": inputs,
        "output_activations": None,
        "weights": _written_args(layer.scheme.weights),
    }


def _written_args(args: QuantArgs, dynamic: bool = False) -> dict[str, Any]:
    """``args`` with the keys that the tool writes; of inputs, ``dynamic`` says whether scales are found at run time."""
    orders: dict[ActOrder | None, str | None] = {None: None, "group": "group", "static": "weight"}
    return {
        "actorder": orders[args.actorder],
        "block_structure": None if args.block is None else list(args.block),
        "dynamic": dynamic,
        "group_size": args.group_size,
        "num_bits": args.bits,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": args.strategy,
        "symmetric": args.symmetric,
        "type": "int" if args.element == "int" else "float",
        "zp_dtype": None if args.symmetric else "torch.int8",
    }
