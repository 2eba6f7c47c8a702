"""msModelSlim: what Huawei's quantizer for Ascend NPUs writes.

Defined by msModelSlim (PyPI ``msmodelslim``, 8.2 to 26.1): ``pytorch/llm_ptq`` writes generation V0, the command line
(``apiversion: modelslim_v1``) generation V1. Facts here were measured on files written by 26.1.0.

Files. A safetensors weight file (``quant_model_weight_<type>.safetensors`` in V0, ``quant_model_weights.safetensors`` in V1;
sharded: ``<prefix>-00001-of-0000N.safetensors`` with ``<prefix>.safetensors.index.json``) and a description JSON
(``quant_model_description_<type>.json``; ``quant_model_description.json`` in ascendV1 and V1). Both names can be chosen
freely by the caller. Weights have mode 0400.

Description: a flat map from tensor name to type, beside top-level keys of any JSON type
(``model_quant_type``, ``version``, ``group_size``, ``metadata``, ``optional``, ``kv_cache_type``, ...).

Variants: ``safe_tensor`` (V0, no ``version`` key), ``ascendv1`` (V0 save_type ascendV1: ``version``, one-type weight file
name), ``v1`` (weight file ``quant_model_weights*``).

Law: ``w = (weight - weight_offset) * weight_scale``; the offset is subtracted.

==========================  =============================================================================================
W8A16, W4A16 per channel    ``weight`` int8 [N, K]; ``weight_scale``, ``weight_offset`` [N, 1] in the model's dtype (F32 in V1)
... per tensor              scale and offset [1] (``mm_tensor=True``, which is the tool's default)
... per group               scale and offset [N, K/g], F32 for MinMax, the model's dtype for GPTQ and HQQ
W4A16 in ascendv1           per group: int8 [N/2, K], two consecutive output rows a byte, low nibble the even row;
                            one scale per row: int8 [N, K/2], two consecutive inputs a byte, low nibble the even column;
                            nibbles are two's complement
FLOAT                       unchanged; ``.bias`` of a quantized layer is FLOAT too
==========================  =============================================================================================

Quirks that this reader handles:

1. Unpacked W4A16 keeps one code a byte, -8..7; only the ``version`` key (and, per group, the scale's rows) tells packed from unpacked.
2. A per-group layer with a single group has a scale [N, 1] and takes the per-channel packing.
3. AntiOutlier m1 to m5 wrap norms: ``<norm>.bias`` (float32 zeros) appears, and in safe_tensor also
   ``<norm>.module.weight`` and ``<norm>.module.bias``, copies that carry the *quantized* type's label. They are no part of a
   Hugging Face model: the copies are left out if they are equal, the bias if it is zero and the model's norms have none.
4. Tensors may be in the file without a description entry (rotations), and entries without a tensor (``<attn>.quant_type``).
5. Per-channel codes were rounded in the model's own dtype arithmetic, so codes must be copied, never derived again.
6. Symmetric layers have an offset tensor of zeros: that a layer is symmetric is in the data, not in the header.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import Checkpoint, Finding, IntegralZeros, LeftOut, Location, Unsupported
from .errors import UnreadableError
from .ir import QuantArgs, QuantizedLinear, QuantScheme, Strategy
from .layouts import PackedMatrix, PackLayout
from .spec import Capabilities, FormatSpec, LayerTarget, ModelFacts, TensorSpec, Variant

BITS = {"W4A16": 4, "W8A16": 8}
"""Types that are read, with their bits."""

OTHER_TYPES = frozenset(
    "W8A8 W8A8S W8A8SC W8A8_DYNAMIC W8A8_MIX W8A8_TIMESTEP W4A8_DYNAMIC W4A4_DYNAMIC W4A4_FLATQUANT_DYNAMIC "
    "W8A8_FLATQUANT_DYNAMIC W4A4_FLATQUANT W8A8_FLATQUANT WFP8AFP8_DYNAMIC W8A8FP8_DYNAMIC W8A8_MXFP8 W4A4_MXFP4 W4A8_MXFP "
    "W4A4_MXFP4_DUALSCALE W4A4_MXFP4_SVD W8A8_MXFP8_SVD NF4 W16A16S W16A16SC".split()
)
"""Types that the tool writes and that are recognised by name, but not read yet."""

ATTENTION_TYPES = frozenset({"C8", "FAQuant", "FAKQuant", "INT8_DYNAMIC", "FP8_DYNAMIC", "QK_INT8_V_FP8"})
FUNCTIONAL = re.compile(
    r"\.(heads_rotation|kronecker_rotation_[mn]|left_trans|right_trans|clip_ratio|div\.mul_scale|svd_lowrank_l[12]|weight_dual_scale)$"
)
"""Tensors that change what a layer computes (rotations, smoothing divisors, low-rank parts)."""

NOT_TENSORS = frozenset({"model_quant_type", "version", "metadata", "optional", "reduce_quant_type", "ascend_quant_method"})

RMS_NORM_MODELS = frozenset(
    "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe internlm internlm2 internlm3 baichuan deepseek deepseek_v2 deepseek_v3 "
    "gemma gemma2 gemma3_text granite phi3 minicpm chatglm glm4".split()
)
"""config.json model_type values whose norms are RMSNorm: no bias in the Hugging Face model."""

LAYER_PARTS = ("weight", "weight_scale", "weight_offset", "bias")

CONTAINER = PackLayout(bits=8, word="i1", low=-128)
"""One code a byte."""
PACKED_ROWS = PackLayout(bits=4, word="i1", axis="out", low=-8)
"""ascendv1 per group: two output rows a byte."""
PACKED_COLUMNS = PackLayout(bits=4, word="i1", axis="in", low=-8)
"""ascendv1 with one scale a row: two inputs a byte."""


def detect(location: Location) -> str | None:
    """The variant that the folder says it is, or None."""
    description = find_description(location)
    if description is None:
        return None
    if "version" not in location.read_json(description):
        return "safe_tensor"
    return "v1" if any(name.startswith("quant_model_weights") for name in location.names) else "ascendv1"


def find_description(location: Location) -> Path | None:
    """The description JSON: named by the user, the named weight file's twin, or the only one of the folder."""
    if location.description is not None:
        return location.description
    named = location.file
    if named is not None and named.suffix == ".json" and not named.name.endswith(".index.json"):
        return named if "quant_model_description" in named.name else None
    found = [name for name in location.names if name.startswith("quant_model_description") and name.endswith(".json")]
    if named is not None and len(found) > 1:
        kind = re.sub(r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?$", "", named.name).removeprefix("quant_model_weight")
        found = [name for name in found if name == f"quant_model_description{kind}.json"] or found
    if len(found) > 1:
        raise UnreadableError(f"{location.folder.name}: several descriptions ({', '.join(found)}); name the weight file or one of them")
    return location.folder / found[0] if found else None


def _types(description: dict[str, Any]) -> dict[str, str]:
    """The type of every tensor that the description names."""
    return {sys.intern(key): sys.intern(value) for key, value in description.items() if isinstance(value, str) and key not in NOT_TENSORS}


class MsModelSlim(Checkpoint):
    """Reader of W4A16 and W8A16 folders of both generations; other types are listed as unsupported."""

    def __init__(self, location: Location, variant: str) -> None:
        path = find_description(location)
        if path is None:
            raise UnreadableError(f"{location.folder.name}: no quant_model_description*.json beside the weights")
        description = location.read_json(path)
        packed, types = "version" in description, _types(description)
        del description  # before the headers are read: either is large for a model of many experts
        super().__init__(location, "msmodelslim", variant, location.tensors("quant_model_weight"))
        self._packed, self._types = packed, types
        self._bits: dict[str, int] = {}
        self._model_type = self.model_type
        self._check_description(path.name)
        self._sort_tensors(path.name)

    def _check_description(self, name: str) -> None:
        for tensor, type_ in self._types.items():
            if "." not in tensor or tensor in self.tensors or tensor.endswith(".quant_type"):
                continue
            raise UnreadableError(
                f"{name}: describes {tensor!r} ({type_}), which no weight file holds; a shard or a part of the checkpoint is missing"
            )

    def _sort_tensors(self, description: str) -> None:
        """Give every stored tensor its place: part of a layer, plain, left out, or a reason to refuse."""
        unsupported: dict[str, str] = {}
        for tensor, type_ in self._types.items():
            module, _, leaf = map(sys.intern, tensor.rpartition("."))
            if leaf == "weight" and type_ != "FLOAT" and not self._is_norm_copy(module):
                if type_ in BITS:
                    self._bits[module] = BITS[type_]
                elif type_ in OTHER_TYPES or type_ in ATTENTION_TYPES:
                    unsupported[module] = type_
                else:
                    raise UnreadableError(f"{description}: {tensor!r} has the unknown type {type_!r}")
        self.unsupported = [Unsupported(name, type_, f"type {type_} is not read yet") for name, type_ in unsupported.items()]
        for tensor in self.tensors:
            module, _, leaf = map(sys.intern, tensor.rpartition("."))
            if module in self._bits and leaf in LAYER_PARTS:
                if leaf == "weight":
                    self.entries.append(("layer", module))
            elif FUNCTIONAL.search(tensor):
                self.functional.append(tensor)
            elif ".kv_cache_" in tensor or ".fa_" in tensor or self._types.get(tensor) in ATTENTION_TYPES:
                self.attention.append(tensor)
            elif module in unsupported or self._leave_out(tensor, module, leaf):
                continue
            else:
                self._check_plain(tensor, leaf, description)
                self.entries.append(("plain", tensor))
                if tensor not in self._types:
                    self.findings.append(Finding("undescribed", tensor, "is in the weights but not in the description; carried as it is"))

    def _is_norm_copy(self, module: str) -> bool:
        """Whether ``module`` is the inner copy of a wrapped norm (quirk 3), whose label says nothing."""
        weight = self.tensors.get(f"{module}.weight")
        return module.endswith(".module") and (weight is None or len(weight.shape) == 1)

    def _check_plain(self, tensor: str, leaf: str, description: str) -> None:
        """A tensor that only a quantized layer has must not be carried as if it were float."""
        if leaf in {"weight_scale", "weight_offset"} or (leaf == "weight" and self.tensors[tensor].dtype == "I8"):
            label = self._types.get(tensor)
            found = f"labels it {label}" if label else "does not mention it"
            raise UnreadableError(
                f"{description}: {tensor!r} ({self.tensors[tensor].dtype}) belongs to a quantized layer, but the description {found}; "
                "put the description that was written with these weights beside them"
            )

    def _leave_out(self, tensor: str, module: str, leaf: str) -> bool:
        """Whether ``tensor`` is one of AntiOutlier's norm tensors (quirk 3)."""
        if module.endswith(".module") and f"{module.removesuffix('.module')}.{leaf}" in self.tensors:
            twin = f"{module.removesuffix('.module')}.{leaf}"
            why = "AntiOutlier's copy of the norm"
            self.left_out.append(LeftOut(tensor, "equal", twin, why, "differs from it, so which one the model uses is unknown"))
            return True
        if leaf == "bias" and self._norm_without_bias(module):
            why = "a bias of zeros that AntiOutlier added to an RMSNorm"
            otherwise = "is not zero: AntiOutlier shifted this norm, and an RMSNorm has no bias to hold the shift"
            self.left_out.append(LeftOut(tensor, "zero", "", why, otherwise))
            return True
        return False

    def _norm_without_bias(self, module: str) -> bool:
        weight = self.tensors.get(f"{module}.weight")
        if weight is None or len(weight.shape) != 1:
            return False
        if self._model_type is not None:
            return self._model_type in RMS_NORM_MODELS
        return f"{module}.module.weight" in self.tensors

    def layer_tensors(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{part}" for part in LAYER_PARTS if f"{name}.{part}" in self.tensors)

    def layer(self, name: str) -> QuantizedLinear:
        bits = self._bits[name]
        for part in ("weight", "weight_scale"):
            if f"{name}.{part}" not in self.tensors:
                raise UnreadableError(f"{name}: has no tensor {part!r}, which W{bits}A16 needs; the checkpoint is incomplete")
        stored = self.tensors[f"{name}.weight"]
        scale = self.tensors[f"{name}.weight_scale"]
        if stored.dtype != "I8" or len(stored.shape) != 2:
            raise UnreadableError(f"{name}: weight is {stored.dtype} {list(stored.shape)}, wanted int8 [out, in] for W{bits}A16")
        bias_info = self.tensors.get(f"{name}.bias")
        if bias_info is not None and bias_info.dtype not in {"F16", "BF16", "F32"}:
            raise UnreadableError(f"{name}: bias is {bias_info.dtype}, wanted a float dtype")
        if scale.dtype not in {"F16", "BF16", "F32"}:
            raise UnreadableError(f"{name}: weight_scale is {scale.dtype}, wanted a float dtype")
        layout = self._layout(bits, stored.shape, scale.shape)
        codes = PackedMatrix(layout, self.tensors.tensor(f"{name}.weight"))
        strategy, group_size = _strategy(name, codes.shape, scale.shape)
        zeros = self._zero_points(name, bits, scale.shape)
        weights = QuantArgs(bits, "int", zeros is None, strategy, group_size)
        bias = self.tensors.tensor(f"{name}.bias") if f"{name}.bias" in self.tensors else None
        scales = self.tensors.tensor(f"{name}.weight_scale")
        layer = QuantizedLinear(name, codes.shape, QuantScheme(weights), codes, scales, zeros, bias=bias)
        layer.check()
        return layer

    def _layout(self, bits: int, weight: tuple[int, ...], scale: tuple[int, ...]) -> PackLayout:
        if bits == 8 or not self._packed:
            return CONTAINER
        return PACKED_COLUMNS if scale[-1] == 1 else PACKED_ROWS

    def _zero_points(self, name: str, bits: int, scale: tuple[int, ...]) -> IntegralZeros | None:
        tensor = f"{name}.weight_offset"
        if tensor not in self.tensors:
            return None
        stored: Any = self.tensors.tensor(tensor)
        if stored.shape != scale:
            raise UnreadableError(f"{name}: weight_offset has shape {list(stored.shape)}, weight_scale {list(scale)}; they must agree")
        matrix = stored.reshape(1, -1) if isinstance(stored, np.ndarray) else stored.as_matrix()
        return IntegralZeros(tensor, matrix if stored.ndim == 1 else stored, -(1 << bits - 1), (1 << bits - 1) - 1)


def _strategy(name: str, shape: tuple[int, int], scale: tuple[int, ...]) -> tuple[Strategy, int | None]:
    """(strategy, group size) that the shapes say."""
    out, in_ = shape
    if scale == (1,):
        return "tensor", None
    if scale == (out, 1):
        return "channel", None
    if len(scale) == 2 and scale[0] == out and scale[1] and in_ % scale[1] == 0:
        return "group", in_ // scale[1]
    raise UnreadableError(
        f"{name}: weight_scale has shape {list(scale)}, wanted [1], [{out}, 1] or [{out}, groups] with groups dividing {in_}"
    )


def _type(layer: LayerTarget) -> str:
    return f"W{layer.scheme.weights.bits}A16"


def _model_type(model: ModelFacts) -> str:
    """model_quant_type: the type of most layers."""
    return Counter(_type(layer) for layer in model.layers).most_common(1)[0][0]


def outputs(layer: LayerTarget, variant: str) -> tuple[TensorSpec, ...]:
    """The tensors that spell ``layer``, in the tool's order: weight, bias, weight_scale, weight_offset."""
    layout = CONTAINER
    if variant == "ascendv1" and layer.scheme.weights.bits == 4:
        layout = PACKED_COLUMNS if layer.groups == 1 else PACKED_ROWS
    name, out = layer.name, layer.shape[0]
    weight = TensorSpec(f"{name}.weight", "I8", layout.stored_shape(layer.shape), "codes", layout)
    bias = () if layer.bias_dtype is None else (TensorSpec(f"{name}.bias", layer.bias_dtype, (out,), "bias"),)
    shape = (out, layer.groups)
    scale = TensorSpec(f"{name}.weight_scale", layer.scale_dtype, shape, "scales")
    offset = TensorSpec(f"{name}.weight_offset", layer.scale_dtype, shape, "zero_points")
    return (weight, *bias, scale, offset)


def quantization_config(model: ModelFacts, variant: str) -> tuple[Mapping[str, Any], None]:
    """({description file: object}, None): config.json says nothing of msModelSlim's quantization."""
    kind = _model_type(model)
    layers = {layer.name: layer for layer in model.layers}
    description: dict[str, Any] = {"model_quant_type": kind}
    if variant == "ascendv1":
        description["version"] = "1.0.0"
        sizes = {layer.group_size for layer in model.layers} - {-1}
        if len(sizes) == 1:
            description["group_size"] = sizes.pop()
    for entry, name in model.entries:
        if entry == "plain":
            description[name] = "FLOAT"
            continue
        for spec in outputs(layers[name], variant):
            description[spec.name] = "FLOAT" if spec.part == "bias" else _type(layers[name])
    suffix = "" if variant == "ascendv1" else f"_{kind.lower()}"
    return {f"quant_model_description{suffix}.json": description}, None


def stem(model: ModelFacts, variant: str) -> str:
    """quant_model_weight_<type>, in both of V0's variants."""
    return f"quant_model_weight_{_model_type(model).lower()}"


_HOLDS = Capabilities(
    bits=(4, 8),
    strategies=("channel", "group"),
    group_sizes=(256, 128, 64, 32),
    scale_dtypes=("keep", "F16", "BF16", "F32"),
    lm_head=True,
)

SPEC = FormatSpec(
    name="msmodelslim",
    tool="msModelSlim 8.2 to 26.1",
    about="safetensors and a description JSON, for Ascend NPUs",
    variants=(
        Variant("safe_tensor", "Python API, save_type safe_tensor: codes a byte each", _HOLDS, "MindIE"),
        Variant(
            "ascendv1",
            "Python API, save_type ascendV1: 4-bit codes packed",
            replace(_HOLDS, multiple_of=(2, 2)),
            "MindIE, vllm-ascend (W8A16)",
        ),
        Variant("v1", "command line (modelslim_v1): read only", None),
    ),
    detect=detect,
    open=MsModelSlim,
    outputs=outputs,
    quantization_config=quantization_config,
    stem=stem,
    owner_writes_only=True,
    default_variant="safe_tensor",
)
