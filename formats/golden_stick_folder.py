"""Golden Stick 1.4's folders: safetensors under Hugging Face's names, and a description of its own.

Written by MindSpore Golden Stick 1.4.1 (``save_quantized``), and measured on what it wrote. Shards are
``quant-model-00001-of-0000N.safetensors``, their index is ``model.safetensors.index.json``, and ``quantization_description.json`` maps
every tensor's name to its type, with no other key in it. config.json is the float model's, unchanged. It looks like msModelSlim's, and
is not: scales have one axis, zero points are int32, and inputs have a scale for each.

===============  =====================================================================================================================
W8A16            ``weight`` int8 [N, K]; ``weight_scale`` float [N]; ``weight_offset`` int32 [N], taken off: ``(weight - offset) * scale``
W4A16            ``weight`` as Int4 [K, N/2] (the file's metadata say so), or int8 [N, K] with a code of -8 to 7 in each byte where there
                 was no backend; scales and offsets [N] or [K/g, N]
W8A8             W8A16's; ``input_scale`` float and ``input_offset`` int8 [K], one value said again (or [1], int32, where there was no
                 backend); ``deq_scale`` float32 or int64 [N], their scales' product; ``quant_bias`` int32 [N], ``-offset * sum(weight)``
W8A8_DYNAMIC     W8A16's; inputs are measured at run time
FLOAT            unchanged
===============  =====================================================================================================================

Law: ``w[o, i] = (weight[o, i] - weight_offset[o]) * weight_scale[o]``; here the offset is not negated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from .checkpoint import Checkpoint, Location, Unsupported
from .errors import UnreadableError
from .ir import Array, Extra, QuantArgs, QuantizedLinear, QuantScheme, unknowable
from .laid_out import LaidOut
from .layouts import PackedMatrix
from .mindformers_file import INT4
from .mindspore_safetensors import MindSporeSafetensors, lay_out_mindspore_safetensors
from .mindspore_static import read_inputs, read_weights
from .mindspore_target import NIBBLES
from .msmodelslim_target import CONTAINER
from .safetensors_file import SafetensorsFile, nbytes
from .spec import InputKind, LayerTarget, ModelFacts, TensorSpec

DESCRIPTION = "quantization_description.json"
INDEX = "model.safetensors.index.json"
TYPES: dict[str, tuple[int, InputKind | None]] = {
    "W8A16": (8, None),
    "W4A16": (4, None),
    "W8A8": (8, "static"),
    "W8A8_DYNAMIC": (8, "dynamic"),
}
OTHER_TYPES = frozenset({"W4A8_DYNAMIC", "UNKNOWN"})
ATTENTION_TYPES = frozenset({"C8", "FAQuant"})
PARTS = ("weight", "weight_scale", "weight_offset", "bias", "input_scale", "input_offset", "deq_scale", "quant_bias")


class GoldenStickFolder(Checkpoint):
    """Reader of the folders."""

    respells = True

    def __init__(self, location: Location, variant: str) -> None:
        opened = location if location.opener is not SafetensorsFile else replace(location, opener=MindSporeSafetensors)
        super().__init__(location, "mindspore", "hf", opened.tensors())
        self._int4 = {name for file in self.tensors.files for name, said in file.metadata.items() if said == INT4}
        said = location.json(DESCRIPTION) or {}
        self._types = {name: type_ for name, type_ in said.items() if isinstance(type_, str)}
        self._kinds: dict[str, str] = {}
        for name in self._types:
            if name not in self.tensors:
                raise UnreadableError(f"{DESCRIPTION}: describes {name!r}, which no weight file holds; a shard is missing")
        for name, type_ in self._types.items():
            module, _, leaf = name.rpartition(".")
            if leaf != "weight" or type_ == "FLOAT":
                continue
            if type_ in TYPES:
                self._kinds[module] = type_
            elif type_ in OTHER_TYPES or type_ in ATTENTION_TYPES:
                self.unsupported.append(Unsupported(module, type_, f"type {type_} is not read yet"))
            else:
                raise UnreadableError(f"{DESCRIPTION}: {name!r} has the unknown type {type_!r}")
        self._sort()

    def _sort(self) -> None:
        """Give every stored tensor its place."""
        unread = {part.name for part in self.unsupported}
        for name in self.tensors:
            module, _, leaf = name.rpartition(".")
            if module in self._kinds:
                if leaf == "weight":
                    self.entries.append(("layer", module))
                elif leaf not in PARTS:
                    self.functional.append(name)
            elif self._types.get(name) in ATTENTION_TYPES:
                self.attention.append(name)
            elif module not in unread:
                if name in self._int4 or (leaf in PARTS[1:] and leaf != "bias"):
                    raise UnreadableError(f"{DESCRIPTION}: {name!r} belongs to a quantized layer, and its weight is FLOAT or missing")
                self.entries.append(("plain", name))

    def is_cache(self, tensor: str) -> bool:
        return self._types[tensor] == "C8"

    def layer_tensors(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{part}" for part in PARTS if f"{name}.{part}" in self.tensors)

    def layer(self, name: str) -> QuantizedLinear:
        type_ = self._kinds[name]
        bits, kind = TYPES[type_]
        info = self.tensors[f"{name}.weight"]
        if info.dtype != "I8" or len(info.shape) != 2 or (f"{name}.weight" in self._int4 and bits != 4):
            raise UnreadableError(f"{name}: weight is {info.dtype} {list(info.shape)}, wanted int8 in two dimensions for {type_}")
        codes = PackedMatrix(NIBBLES if f"{name}.weight" in self._int4 else CONTAINER, self.tensors.tensor(f"{name}.weight"))
        out, in_ = codes.shape
        self._insist(name, type_, "weight_scale")
        zero = "weight_offset" if f"{name}.weight_offset" in self.tensors else ""
        weights, scales, zeros = read_weights(self.tensors, name, "weight_scale", zero, (out, in_), bits, negated=False)
        inputs = (
            None
            if kind is None
            else QuantArgs(8, "int", kind == "dynamic", "token" if kind == "dynamic" else "tensor", dynamic=kind == "dynamic")
        )
        scale, offset, extras = self._inputs(name, type_, in_, out) if kind == "static" else (None, None, {})
        layer = QuantizedLinear(
            name, codes.shape, QuantScheme(weights, inputs), codes, scales, zeros, bias=self.bias(name), input_scale=scale,
            input_zero_point=offset, extras=extras,
        )  # fmt: skip
        layer.check()
        return layer

    def _insist(self, name: str, type_: str, part: str) -> None:
        if f"{name}.{part}" not in self.tensors:
            raise UnreadableError(f"{name}: has no tensor {part!r}, which {type_} needs; the checkpoint is incomplete")

    def _inputs(self, name: str, type_: str, in_: int, out: int) -> tuple[Array, Array, dict[str, Extra]]:
        for part in ("input_scale", "input_offset"):
            self._insist(name, type_, part)
        scale, zero, smooth = read_inputs(self.tensors, f"{name}.input_scale", f"{name}.input_offset", in_)
        if smooth is not None:
            raise unknowable(name, "a W8A8 layer with a scale for each input", "how they and weight_scale make deq_scale is not said")
        extras = {}
        for part, known, dtypes in (("deq_scale", "dequant_scale", ("F32", "I64")), ("quant_bias", "zero_point_bias", ("I32",))):
            info = self.tensors.get(f"{name}.{part}")
            if info is None:
                continue
            if info.dtype not in dtypes or info.shape != (out,):
                raise UnreadableError(f"{name}: {part} is {info.dtype} {list(info.shape)}, wanted {' or '.join(dtypes)} [{out}]")
            extras[known] = Extra("derived", self.tensors.tensor(f"{name}.{part}"))
        return scale, zero, extras


def type_of(layer: LayerTarget) -> str:
    """The type that the description gives the layer's tensors."""
    return next(type_ for type_, said in TYPES.items() if said == (layer.scheme.weights.bits, layer.inputs))


def outputs(layer: LayerTarget) -> tuple[TensorSpec, ...]:
    """The tensors that spell ``layer``, as for the Ascend backend."""
    name, (out, in_), weights = layer.name, layer.shape, layer.scheme.weights
    layout = NIBBLES if weights.bits == 4 else CONTAINER
    grid = (layer.groups, out) if weights.strategy == "group" else (out,)
    specs = [
        TensorSpec(f"{name}.weight", INT4 if weights.bits == 4 else "I8", layout.stored_shape(layer.shape), "codes", layout),
        TensorSpec(f"{name}.weight_scale", layer.scale_dtype, grid, "scales", transposed=True),
        TensorSpec(f"{name}.weight_offset", "I32", grid, "zero_points", transposed=True),
    ]
    if layer.bias_dtype is not None:
        specs.append(TensorSpec(f"{name}.bias", layer.bias_dtype, (out,), "bias"))
    if layer.input_dtype is not None:
        specs.append(TensorSpec(f"{name}.input_scale", layer.input_dtype, (in_,), "input_scale"))
        specs.append(TensorSpec(f"{name}.input_offset", "I8", (in_,), "input_zero_point"))
        specs.append(TensorSpec(f"{name}.deq_scale", dict(layer.derived)["dequant_scale"], (out,), "deq_scale"))
        specs.append(TensorSpec(f"{name}.quant_bias", "I32", (out,), "zero_point_bias"))
    return tuple(specs)


def description(model: ModelFacts) -> Mapping[str, str]:
    """quantization_description.json: every tensor's type."""
    layers, found = {layer.name: layer for layer in model.layers}, dict[str, str]()
    for entry, name in model.entries:
        if entry == "plain":
            found[name] = "FLOAT"
            continue
        found |= {spec.name: "FLOAT" if spec.part == "bias" else type_of(layers[name]) for spec in outputs(layers[name])}
    return found


def lay_out_folder(tensors: Iterable[tuple[str, str, tuple[int, ...]]], shard_bytes: int) -> list[LaidOut]:
    """quant-model-0000i-of-0000N.safetensors. RefusedError for what MindSpore would not load."""
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    held = 0
    for name, dtype, shape in tensors:
        size = nbytes("I8" if dtype == INT4 else dtype, shape)
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append((name, dtype, shape))
        held += size
    count = len(shards)
    return [lay_out_mindspore_safetensors(shard, f"quant-model-{i:05d}-of-{count:05d}.safetensors") for i, shard in enumerate(shards, 1)]
