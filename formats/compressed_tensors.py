"""compressed-tensors: what llm-compressor writes and vLLM reads; weights, inputs and KV cache, integers and small floats.

Defined by compressed-tensors (PyPI ``compressed-tensors``; here 0.17.0, ``compressors/`` and ``quantization/``), used by
llm-compressor 0.12; read by vLLM, SGLang and transformers. Facts here were measured on files of 0.9.3, 0.17.0 and 0.20.0. An ordinary
Hugging Face folder whose config.json has a ``quantization_config`` (``formats.compressed_config``); until 0.6 its key could be
``compression_config``. A module is quantized if it has ``weight_packed``, or ``weight_scale`` beside ``weight``.

Law: ``w = scale * (code - zero_point)`` in float32, rounded once to the scale's dtype (NVFP4, MXFP4 and MXFP8: to bfloat16). N is
out, K is in, G is K / group_size; D is the model's dtype, b the bits of a code.

====================  ===========================================================================================================
pack-quantized        ``weight_packed`` int32 [N, words]; ``weight_scale`` D [1], [N, 1] or [N, G]; ``weight_shape`` int64 [2],
                      (N, K); asymmetric: ``weight_zero_point``; actorder "group": ``weight_g_idx`` int32 [K]
int-quantized         ``weight`` int8 [N, K], 4-bit codes too; ``weight_scale`` as above; asymmetric: ``weight_zero_point`` int8 of
                      the scale's shape; static inputs: ``input_scale`` D [1], asymmetric: ``input_zero_point`` int8 [1]
float-quantized       ``weight`` float8_e4m3fn [N, K]; ``weight_scale`` D [1], [N, 1] or per block [N / h, K / w], rounded up;
                      static inputs: ``input_scale`` D [1]
naive-quantized       as one of the two, whatever the inputs are
nvfp4-pack-quantized  ``weight_packed`` uint8 [N, K/2], the low nibble is the even input; ``weight_scale`` float8_e4m3fn [N, K/16];
                      ``weight_global_scale`` float32 [1], by which scales are divided; inputs: ``input_global_scale`` float32 [1]
mxfp4-pack-quantized  ``weight_packed`` likewise; ``weight_scale`` uint8 [N, K/32], the exponent of two plus 127
mxfp8-quantized       ``weight`` float8_e4m3fn; ``weight_scale`` likewise
KV cache              ``<attention>.k_scale``, ``.v_scale`` (``.q_scale``) D [1], or [heads, 1, 1]
====================  ===========================================================================================================

Words hold ``code + 2**(b-1)``, the first in the lowest bits, along K. Up to 0.17 a word has ``32 // b`` lanes and its highest bits
stay 0; from 0.18 on codes are one bit stream, across words. For 1, 2, 4 and 8 bits that is the same; for others the number of words
says which it is, and where even that is the same, ``version`` does. The last word is filled up with zero bits.

Quirks:

1. Packed zero points are int32 [words, G], packed along N like codes along K. Up to 0.9.3 they are int8 [N, G]; with one scale for
   the tensor they are int8 [1] in every version.
2. Up to 0.8 zero points that are all 0 were not stored, whatever ``symmetric`` says. Tools ignore those of symmetric layers.
3. ``weight_g_idx`` holds the group of each input, codes stay in the order of the inputs. It counts only with actorder "group", and not
   if it holds -1. Since 0.19 the tool, and vLLM, refuse such files. actorder "weight" is an ordinary file.
4. ``quantization_status`` other than "compressed": transformers leaves the weights at random, without an error; vLLM does not look.
5. 0.17's own decompressor guesses FP8 blocks from the scale's shape and is wrong where the last block is cut, or is the only one of
   its row. The config's ``block_structure`` is the law.
6. ``dynamic: "local"`` (NVFP4's inputs) has a static outer scale. No field of the IR holds it, and nothing else says it: it is the
   functional extra ``input_global_scale``.
7. Every float linear must be listed in ``ignore``: what is not listed is taken for quantized by whoever loads the folder.
8. Of vLLM's classes not all are called Linear (``ParallelLMHead``): a quantized lm_head is a target by its name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .checkpoint import FLOATS, Checkpoint, Finding, IntegralZeros, LeftOut, Location, Unsupported
from .compressed_config import METHOD, CompressedConfig, Group, format_of, quantization_config
from .compressed_layouts import FLOAT4, FLOAT8, INT8, SmallScales, as_bytes, lanes_of, packed_layout
from .errors import UnreadableError
from .ir import Array, ArrayLike, Extra, QuantArgs, QuantizedLinear, QuantScheme
from .layouts import PackedMatrix
from .spec import Capabilities, FormatSpec, LayerTarget, Objection, TensorSpec, Variant
from .stored_tensor import StoredTensor

PARTS = (
    "weight_packed", "weight", "weight_scale", "weight_global_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale",
    "input_zero_point", "input_global_scale", "bias",
)  # fmt: skip
ONLY_QUANTIZED = frozenset(PARTS) - {"weight", "bias"}
"""Leaf names that nothing but a quantized layer has."""
ATTENTION = frozenset(f"{operand}_{part}" for operand in "qkv" for part in ("scale", "zero_point", "global_scale"))
OUTPUTS = ("output_scale", "output_zero_point")


@dataclass(frozen=True, slots=True)
class Storage:
    """How a layer of one format is stored: dtypes by part, which bits of which type it holds, and the names of formats that it can have."""

    codes: str
    dtype: str
    scales: tuple[str, ...]
    elements: tuple[str, ...]
    parts: frozenset[str]
    called: tuple[str, ...]


_INT_PARTS = frozenset({"weight_scale", "weight_zero_point", "weight_g_idx"})
_FLOAT_PARTS = frozenset({"weight_scale"})
STORAGES = (
    Storage("weight_packed", "I32", FLOATS, ("int",), _INT_PARTS | {"weight_shape"}, ("pack-quantized",)),
    Storage("weight", "I8", FLOATS, ("int",), _INT_PARTS, ("int-quantized", "naive-quantized")),
    Storage("weight", "F8_E4M3", FLOATS, ("e4m3",), _FLOAT_PARTS, ("float-quantized", "naive-quantized")),
    Storage("weight_packed", "U8", ("F8_E4M3",), ("e2m1",), _FLOAT_PARTS | {"weight_global_scale"}, ("nvfp4-pack-quantized",)),
    Storage("weight_packed", "U8", ("U8",), ("e2m1",), _FLOAT_PARTS, ("mxfp4-pack-quantized",)),
    Storage("weight", "F8_E4M3", ("U8",), ("e4m3",), _FLOAT_PARTS, ("mxfp8-quantized",)),
)


_ONE: tuple[tuple[int, ...], ...] = ((1,), (), (1, 1))
"""Shapes in which one value is stored."""


def detect(location: Location) -> str | None:
    """The variant that the folder says it is, or None."""
    return None if quantization_of(location) is None else "compressed"


def quantization_of(location: Location) -> dict[str, Any] | None:
    """config.json's quantization_config if it is of this format; until 0.6 it could be called compression_config."""
    config = location.json("config.json") or {}
    found = config.get("quantization_config")
    found = config.get("compression_config") if found is None else found
    return found if isinstance(found, dict) and str(found.get("quant_method", "")).lower() == METHOD else None


class CompressedTensors(Checkpoint):
    """Reader of every format of the table. Shapes and dtypes must be what the config's group says of the module.

    said   {"kv_cache_scheme": its arguments}, or {}
    """

    def __init__(self, location: Location, variant: str) -> None:
        said = quantization_of(location)
        if said is None:
            raise UnreadableError(f"{location.folder.name}: config.json has no quantization_config of {METHOD}; put it back")
        super().__init__(location, METHOD, variant, location.tensors())
        if self.config is not None and self.quantization is None:
            del self.config["compression_config"]
        self.quantization = said
        self._said = CompressedConfig(said)
        self.said: dict[str, Any] = {} if self._said.kv_cache is None else {"kv_cache_scheme": self._said.kv_cache}
        for tensor in self.tensors:
            self._sort(tensor)
        self._add_findings()

    def _sort(self, tensor: str) -> None:
        """Give a stored tensor its place: part of a layer, of the KV cache, left out, plain, or a reason to stop."""
        module, _, leaf = map(sys.intern, tensor.rpartition("."))
        key = self._key(module)
        if leaf in ATTENTION:
            self.attention.append(tensor)
        elif leaf in OUTPUTS:
            (self.attention if module.endswith(("k_proj", "v_proj")) else self.functional).append(tensor)
        elif key is not None and leaf in PARTS:
            if leaf == key:
                self._sort_layer(module, tensor)
            elif leaf == "weight":
                raise UnreadableError(
                    f"{module}: has weight and weight_packed; which one counts cannot be known: remove the one that is old"
                )
            elif leaf.endswith("zero_point"):
                self._leave_out(module, leaf)
        elif leaf in ONLY_QUANTIZED:
            raise UnreadableError(f"{module}: has {leaf}, but no codes that it belongs to; the checkpoint is incomplete")
        elif leaf == "weight" and self.tensors[tensor].dtype in {"I8", "F8_E4M3"}:
            raise UnreadableError(
                f"{module}: weight is {self.tensors[tensor].dtype}, but has no weight_scale; the checkpoint is incomplete"
            )
        else:
            self.entries.append(("plain", tensor))

    def _key(self, module: str) -> str | None:
        """The leaf name of a layer's codes; None if ``module`` is not quantized."""
        if f"{module}.weight_packed" in self.tensors:
            return "weight_packed"
        return "weight" if f"{module}.weight_scale" in self.tensors and f"{module}.weight" in self.tensors else None

    def _sort_layer(self, module: str, tensor: str) -> None:
        if len(self.tensors[tensor].shape) == 3:
            why = "experts in one tensor of three dimensions are not read yet; save them as modules of their own"
            self.unsupported.append(Unsupported(module, "fused experts", why))
        else:
            self.entries.append(("layer", module))

    def _leave_out(self, module: str, leaf: str) -> None:
        """Zero points of what is symmetric are ignored by every tool, so they must be zeros (quirk 2)."""
        group = self._said.find(module)
        args = None if group is None else group.weights if leaf == "weight_zero_point" else group.inputs
        if args is not None and args.symmetric and self.tensors[f"{module}.{leaf}"].dtype != "I32":
            why = "zero points of what the config calls symmetric"
            self.left_out.append(LeftOut(f"{module}.{leaf}", "zero", "", why, "are not zero, and the config says that they are"))

    def _add_findings(self) -> None:
        if self._said.status != "compressed" and self.layer_names:
            what = f"quantization_status is {self._said.status!r}: transformers would leave all weights at random without a word"
            self.findings.append(Finding("status", "config.json", f"{what}; it should be 'compressed'"))
        ordered = [name for name in self.layer_names if f"{name}.weight_g_idx" in self.tensors]
        if ordered:
            where = ordered[0] if len(ordered) == 1 else f"{ordered[0]} and {len(ordered) - 1} more layers"
            self.findings.append(
                Finding("act-order", where, "weight_g_idx (actorder 'group') is refused by vLLM 0.32 and the tool since 0.19")
            )

    def layer_tensors(self, name: str) -> tuple[str, ...]:
        key = self._key(name)
        found = {f"{name}.{part}": self.tensors.get(f"{name}.{part}") for part in PARTS}
        stored = [(tensor != f"{name}.{key}", info.file, info.begin, tensor) for tensor, info in found.items() if info is not None]
        return tuple(tensor for *_, tensor in sorted(stored))

    def layer(self, name: str) -> QuantizedLinear:
        group, weights = self._group(name)
        storage = self._storage(name, group, weights)
        codes, dense = self._codes(name, storage, weights)
        (out, in_), args = codes.shape, weights
        if args.group_size is not None and in_ < args.group_size:
            args = replace(args, strategy="channel", group_size=None, actorder=None)
        if args.group_size is not None and in_ % args.group_size:
            raise UnreadableError(f"{name}: {in_} inputs in groups of {args.group_size}, which do not divide them; correct the config")
        grid = _grid(args, (out, in_))
        scales = self._scales(name, storage, args, grid)
        zeros = self._zero_points(name, args, grid, dense)
        g_idx = self._g_idx(name, args, in_)
        if args.actorder == "group" and g_idx is None:
            args = replace(args, actorder="static")
        args = replace(args, symmetric=zeros is None)
        outer = self._small(name, "weight_global_scale", ("F32",)) if "weight_global_scale" in storage.parts else None
        input_scale, input_zero_point, extras = self._inputs(name, group)
        inputs = group.inputs
        if inputs is not None and not inputs.dynamic:
            inputs = replace(inputs, symmetric=input_zero_point is None)
        layer = QuantizedLinear(
            name,
            (out, in_),
            QuantScheme(args, inputs, group.outputs),
            codes,
            scales,
            zeros,
            outer,
            outer_divides=outer is not None,
            g_idx=g_idx,
            bias=self.bias(name),
            input_scale=input_scale,
            input_zero_point=input_zero_point,
            extras=extras,
        )
        layer.check()
        return layer

    def _group(self, name: str) -> tuple[Group, QuantArgs]:
        group = self._said.find(name)
        if group is None or group.weights is None:
            why = "ignore says that it is left in float" if self._said.ignores(name) else "no group of config_groups quantizes it"
            raise UnreadableError(f"{name}: is stored quantized, and {why}; correct the config")
        return group, group.weights

    def _storage(self, name: str, group: Group, weights: QuantArgs) -> Storage:
        """The format that dtypes say; UnreadableError if it is none, or the config says another."""
        key = self._key(name)
        codes, scale = self.tensors[f"{name}.{key}"], self.tensors.get(f"{name}.weight_scale")
        if scale is None:
            raise UnreadableError(f"{name}: has no weight_scale; the checkpoint is incomplete")
        found = [storage for storage in STORAGES if (storage.codes, storage.dtype) == (key, codes.dtype) and scale.dtype in storage.scales]
        if not found or len(codes.shape) != 2:
            raise UnreadableError(
                f"{name}: {key} is {codes.dtype} {list(codes.shape)} and weight_scale {scale.dtype}, which no format of {METHOD} has; "
                "save the model compressed"
            )
        (storage,) = found
        if group.format not in {None, "dense", "fakequant", *storage.called} or weights.element not in storage.elements:
            raise UnreadableError(
                f"{name}: {key} is {codes.dtype} and weight_scale {scale.dtype}, so it is {storage.called[0]}; the config says "
                f"{group.format}, {weights.bits} bits of {weights.element}; correct the config"
            )
        for part in sorted(ONLY_QUANTIZED - storage.parts - {key, "input_scale", "input_zero_point", "input_global_scale"}):
            if f"{name}.{part}" in self.tensors:
                raise UnreadableError(f"{name}: has {part}, which {storage.called[0]} does not have; the tensors contradict one another")
        return storage

    def _codes(self, name: str, storage: Storage, weights: QuantArgs) -> tuple[ArrayLike, bool]:
        """(codes, whether words are one bit stream)."""
        stored: Any = self.tensors.tensor(f"{name}.{storage.codes}")
        if storage.dtype == "I8":
            return PackedMatrix(INT8, stored), False
        if storage.dtype == "F8_E4M3":
            return PackedMatrix(FLOAT8, as_bytes(stored), "u1"), False
        if storage.dtype == "U8":
            return PackedMatrix(FLOAT4, stored, "u1"), False
        shape, bits = self._shape(name), weights.bits
        dense = self._is_dense(name, stored.shape, shape, bits)
        return lanes_of(stored, shape, bits, "in", dense, "i1"), dense

    def _shape(self, name: str) -> tuple[int, int]:
        info = self.tensors.get(f"{name}.weight_shape")
        if info is None or info.dtype not in {"I64", "I32"} or info.shape != (2,):
            found = "is missing" if info is None else f"is {info.dtype} {list(info.shape)}"
            raise UnreadableError(f"{name}: weight_shape {found}, wanted the two integers out and in; the checkpoint is incomplete")
        out, in_ = (int(extent) for extent in self.tensors.array(f"{name}.weight_shape"))
        return out, in_

    def _is_dense(self, name: str, stored: tuple[int, ...], shape: tuple[int, int], bits: int) -> bool:
        """Whether words hold one bit stream; UnreadableError if they can be neither, or both."""
        out, in_ = shape
        lanes = 32 // bits
        padded, dense = -(-in_ // lanes), -(-in_ * bits // 32)
        if stored[0] != out or stored[1] not in {padded, dense} or in_ < 1:
            raise UnreadableError(
                f"{name}: weight_packed is {list(stored)}, and weight_shape says {list(shape)}, which takes {[out, dense]} words of "
                f"{bits}-bit codes; they contradict one another: the file is damaged, or the config says the wrong bits"
            )
        if padded != dense or 32 % bits == 0 or in_ <= lanes:
            return stored[1] != padded
        if self._said.version is None:
            raise UnreadableError(
                f"{name}: {in_} codes of {bits} bits fill {dense} words in old and in new files of {METHOD}, and the config has no version "
                "that says which it is; put it back"
            )
        return self._said.version >= (0, 18)

    def _scales(self, name: str, storage: Storage, args: QuantArgs, grid: tuple[int, int]) -> ArrayLike:
        stored: Any = self.tensors.tensor(f"{name}.weight_scale")
        wanted = _ONE if args.strategy == "tensor" else (grid,)
        if tuple(stored.shape) not in wanted or args.strategy == "token":
            raise UnreadableError(
                f"{name}: weight_scale is {list(stored.shape)}, wanted {list(wanted[0])} for one scale per {args.strategy}; "
                "they contradict one another: correct the config"
            )
        if storage.scales == FLOATS:
            return _at_least_1d(stored)
        if args.strategy != "group":
            raise UnreadableError(f"{name}: {storage.called[0]} has scales per group, and the config says per {args.strategy}; correct it")
        return SmallScales(stored)

    def _zero_points(self, name: str, args: QuantArgs, grid: tuple[int, int], dense: bool) -> ArrayLike | None:
        """Signed zero points; None where they are exactly 0 by rule (quirk 2)."""
        tensor = f"{name}.weight_zero_point"
        info = self.tensors.get(tensor)
        if args.symmetric:
            if info is not None and info.dtype == "I32":
                raise UnreadableError(f"{name}: has packed zero points, and the config says that it is symmetric; correct the config")
            return None
        if info is None:
            self._check_unstored_zeros(tensor)
            return None
        stored: Any = self.tensors.tensor(tensor)
        bits, shape = args.bits, (1, 1) if args.strategy == "tensor" else grid
        if info.dtype == "I8" and info.shape in (_ONE if args.strategy == "tensor" else (grid,)):
            matrix = stored.reshape(1, -1) if isinstance(stored, np.ndarray) and stored.ndim < 2 else stored
            matrix = matrix.as_matrix() if isinstance(matrix, StoredTensor) else matrix
            return IntegralZeros(tensor, matrix, -(1 << bits - 1), (1 << bits - 1) - 1)
        words = -(-grid[0] * bits // 32) if dense else -(-grid[0] // (32 // bits))
        packed = f"{name}.weight_packed" in self.tensors and args.strategy in {"channel", "group"}
        if not packed or info.dtype != "I32" or info.shape != (words, grid[1]):
            wanted = f"int8 {list(shape)}" + (f" or int32 {[words, grid[1]]}" if packed else "")
            raise UnreadableError(
                f"{name}: weight_zero_point is {info.dtype} {list(info.shape)}, wanted {wanted}; the file contradicts itself"
            )
        return lanes_of(stored, grid, bits, "out", dense, "<i2")

    def _check_unstored_zeros(self, tensor: str) -> None:
        """UnreadableError if zero points of what is asymmetric may not be missing (quirk 2)."""
        if self._said.version is None or self._said.version >= (0, 9):
            raise UnreadableError(f"{tensor}: is missing, and the config says that there are zero points; the checkpoint is incomplete")

    def _g_idx(self, name: str, args: QuantArgs, in_: int) -> Array | None:
        """The group of each input if that is irregular and counts (quirk 3), else None."""
        tensor = f"{name}.weight_g_idx"
        info = self.tensors.get(tensor)
        if info is None:
            if args.actorder == "group":
                raise UnreadableError(f"{tensor}: is missing, and the config says actorder 'group'; the checkpoint is incomplete")
            return None
        if info.dtype not in {"I32", "I64"} or info.shape != (in_,) or args.group_size is None:
            raise UnreadableError(f"{name}: weight_g_idx is {info.dtype} {list(info.shape)}, wanted the group of each of {in_} inputs")
        g_idx = self.tensors.array(tensor)
        regular = np.arange(in_) // args.group_size
        if (g_idx == -1).any() or np.array_equal(g_idx, regular):
            return None
        if args.actorder != "group":
            raise UnreadableError(f"{name}: weight_g_idx is irregular, and the config does not say actorder 'group'; correct the config")
        if not np.array_equal(np.sort(g_idx), regular):
            raise UnreadableError(
                f"{name}: weight_g_idx does not give every group from 0 to {int(regular[-1])} exactly {args.group_size} inputs, and tools "
                "differ on what that means; quantize again"
            )
        return g_idx.astype(np.int32)

    def _inputs(self, name: str, group: Group) -> tuple[Array | None, Array | None, dict[str, Extra]]:
        """(input scale, input zero point, extras), which must be there as the config says."""
        args = group.inputs
        allowed = set() if args is None else {"input_global_scale"} if group.local else set() if args.dynamic else {"input_scale"}
        found = {part for part in ("input_scale", "input_global_scale") if f"{name}.{part}" in self.tensors}
        if found != allowed:
            part = min(found ^ allowed)
            how = "not quantized" if args is None else "local" if group.local else "dynamic" if args.dynamic else "static"
            there = "is there" if part in found else "is missing"
            raise UnreadableError(f"{name}: {part} {there}, and the config says that inputs are {how}; correct the config")
        if group.local:
            return None, None, {"input_global_scale": Extra("functional", self._small(name, "input_global_scale", ("F32",)))}
        if args is None or args.dynamic:
            if f"{name}.input_zero_point" in self.tensors and (args is None or not args.symmetric):
                raise UnreadableError(f"{name}: has input_zero_point, and the config says no static inputs; correct the config")
            return None, None, {}
        scale = self._small(name, "input_scale", FLOATS)
        if args.symmetric:
            return scale, None, {}
        if f"{name}.input_zero_point" not in self.tensors:
            self._check_unstored_zeros(f"{name}.input_zero_point")
            return scale, None, {}
        zero = self._small(name, "input_zero_point", ("I8",)).astype(np.int16)
        half = 1 << (args.bits - 1)
        if not -half <= int(zero[0]) < half:
            raise UnreadableError(f"{name}: input_zero_point is {int(zero[0])}, wanted {-half} to {half - 1}; the file is damaged")
        return scale, zero, {}

    def _small(self, name: str, part: str, dtypes: tuple[str, ...]) -> Array:
        """A tensor of one value, as [1], in its own dtype."""
        info = self.tensors.get(f"{name}.{part}")
        if info is None or info.dtype not in dtypes or info.shape not in {(1,), ()}:
            found = "is missing" if info is None else f"is {info.dtype} {list(info.shape)}"
            raise UnreadableError(f"{name}: {part} {found}, wanted {' or '.join(dtypes)} [1]; the checkpoint is damaged or incomplete")
        return self.tensors.array(f"{name}.{part}").reshape(1)


def _grid(args: QuantArgs, shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of scales that are stored in two dimensions."""
    if args.block is not None:
        return -(-shape[0] // args.block[0]), -(-shape[1] // args.block[1])
    return shape[0], 1 if args.group_size is None else shape[1] // args.group_size


def _at_least_1d(stored: Any) -> ArrayLike:
    """A scalar as [1], unread where it can be."""
    found: ArrayLike = stored
    if stored.shape == ():
        found = replace(stored, shape=(1,), stride=1) if isinstance(stored, StoredTensor) else stored.reshape(1)
    return found


def objection(layer: LayerTarget, variant: str) -> Objection | None:
    """Why no reader of the format would take ``layer``, or None."""
    weights, inputs = layer.scheme.weights, layer.scheme.inputs
    kind = "integers" if weights.element == "int" else "FP8 weights"
    if weights.strategy == ("block" if weights.element == "int" else "group"):
        hint = "convert to dense, or quantize again"
        return Objection("strategy", f"{kind} with a scale per {weights.strategy}", "has a form for them that no engine loads", hint)
    if inputs is not None and inputs.element != weights.element and format_of(layer) != "pack-quantized":
        hint = "quantize weights and inputs alike"
        return Objection("activations", f"{kind} with inputs of {inputs.element}", "has no engine that multiplies the two", hint)
    return None


def outputs(layer: LayerTarget, variant: str) -> tuple[TensorSpec, ...]:
    """The tensors that spell ``layer``: codes first, bias last."""
    name, (out, in_), args = layer.name, layer.shape, layer.scheme.weights
    grid = (1,) if args.strategy == "tensor" else _grid(args, layer.shape)
    scale = TensorSpec(f"{name}.weight_scale", layer.scale_dtype, grid, "scales")
    specs = [scale]
    if format_of(layer) == "float-quantized":
        specs.insert(0, TensorSpec(f"{name}.weight", "F8_E4M3", layer.shape, "codes", FLOAT8))
    elif format_of(layer) == "int-quantized":
        specs.insert(0, TensorSpec(f"{name}.weight", "I8", layer.shape, "codes", INT8))
    else:
        layout = packed_layout(args.bits)
        specs.insert(0, TensorSpec(f"{name}.weight_packed", "I32", layout.stored_shape(layer.shape), "codes", layout))
    if not args.symmetric:
        zero = f"{name}.weight_zero_point"
        if format_of(layer) == "int-quantized" or args.strategy == "tensor":
            specs.append(TensorSpec(zero, "I8", grid, "zero_points", INT8))
        else:
            rows = packed_layout(args.bits, "out")
            specs.append(TensorSpec(zero, "I32", rows.stored_shape((out, layer.groups)), "zero_points", rows))
    if format_of(layer) == "pack-quantized":
        specs.append(TensorSpec(f"{name}.weight_shape", "I64", (2,), "shape"))
    if args.actorder == "group":
        specs.append(TensorSpec(f"{name}.weight_g_idx", "I32", (in_,), "g_idx"))
    if layer.input_dtype is not None:
        specs.append(TensorSpec(f"{name}.input_scale", layer.input_dtype, (1,), "input_scale"))
        if layer.scheme.inputs is not None and not layer.scheme.inputs.symmetric:
            specs.append(TensorSpec(f"{name}.input_zero_point", "I8", (1,), "input_zero_point"))
    if layer.bias_dtype is not None:
        specs.append(TensorSpec(f"{name}.bias", layer.bias_dtype, (out,), "bias"))
    return tuple(specs)


SPEC = FormatSpec(
    name=METHOD,
    tool="llm-compressor 0.12, compressed-tensors 0.6 to 0.20",
    about="integers and FP8, of weights and inputs; read by vLLM, SGLang, transformers",
    variants=(
        Variant(
            "compressed",
            "pack-quantized, int-quantized or float-quantized, as each layer's scheme wants",
            Capabilities(
                elements=("int", "e4m3"),
                bits=(4, 8),
                strategies=("tensor", "channel", "group", "block"),
                group_sizes=(128, 64, 32),
                act_order=("group", "static"),
                omits=("zero_points", "g_idx"),
                scale_dtypes=("half", "F16", "BF16", "F32"),
                inputs=("static", "dynamic"),
                multiple_of=(8, 8),
                mixed_groups=True,
                lm_head=True,
            ),
            readers="vLLM, SGLang, transformers (act order by groups: compressed-tensors up to 0.18 alone)",
        ),
    ),
    detect=detect,
    open=CompressedTensors,
    outputs=outputs,
    quantization_config=quantization_config,
    objection=objection,
    default_variant="compressed",
)
