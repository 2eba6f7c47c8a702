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
name), ``v1`` (weight file ``quant_model_weights*``), ``numpy`` (V0's default: pickled dictionaries in .npy files and no
description; ``formats.npy_file``).

Law: ``w = (weight - weight_offset) * weight_scale``; the offset is subtracted. Inputs: ``x_q = clamp(round(x / input_scale +
input_offset), -128, 127)``; the offset is added.

==========================  =============================================================================================
W8A16, W4A16 per channel    ``weight`` int8 [N, K]; ``weight_scale``, ``weight_offset`` [N, 1] in the model's dtype (F32 in V1)
... per tensor              scale and offset [1] (``mm_tensor=True``, which is the tool's default); ``is_lowbit``: both []; HQQ: scale []
... per group               scale and offset [N, K/g], F32 for MinMax, the model's dtype for GPTQ and HQQ
W4A16 in ascendv1           per group: int8 [N/2, K], two consecutive output rows a byte, low nibble the even row;
                            one scale per row: int8 [N, K/2], two consecutive inputs a byte, low nibble the even column;
                            nibbles are two's complement
W8A8 (static)               W8A16's tensors per channel or tensor (V1: no scale, no offset), and ``input_scale``, ``input_offset``
                            [1] in the model's dtype (F32 in V1), ``deq_scale`` [N] F32 or I64, ``quant_bias`` [N] I32
W8A8S                       as W8A8, without weight_scale and weight_offset: sparse by its values, not by its layout
W8A8_DYNAMIC                W8A16's tensors per channel
W8A8_MIX                    W8A8's tensors; inputs are quantized by the static scale or at run time, by the phase of generation
W4A8_DYNAMIC                ``weight_scale``, ``weight_offset`` F32 [N, 1]; V0 also ``weight_scale_second`` F32 and
                            ``weight_offset_second`` I64 [N, K/g]; with a version key int8 [N/2, K] (two rows a byte) and
                            ``scale_bias`` F32 [N, 1] or [N, 16]; else int8 [N, K]
C8                          ``<attn>.k_proj.kv_cache_scale``, ``kv_cache_offset`` and those of v_proj: [kv_heads * head_dim]
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
7. Two things say what a static W8A8 layer computes: weight_scale, and deq_scale, which the NPU uses (``formats.derived``). The
   law here is weight_scale where there is one, else ``deq_scale / input_scale`` in float32. ``quant_bias`` holds the bias,
   rounded, and ``bias`` is stored as well: the latter is the law's. W8A8S that has a weight_scale all the same is read as W8A8.
8. Inputs of W8A8_DYNAMIC are symmetric per token on the NPU (its operator has no offset); the tool's own simulation rounds them
   asymmetrically.
9. ``q_proj``, ``k_proj`` and ``v_proj`` have one input scale, and so have ``gate_proj`` and ``up_proj``.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import msmodelslim_target as target
from .checkpoint import FLOATS, Checkpoint, Finding, IntegralZeros, LeftOut, Location, Unsupported
from .derived import DERIVED, decode_deq_scale
from .errors import UnreadableError
from .ir import Array, ArrayLike, Extra, QuantArgs, QuantizedLinear, QuantScheme, Strategy, read
from .layouts import PackedMatrix, PackLayout
from .msmodelslim_target import CONTAINER, PACKED_COLUMNS, PACKED_ROWS
from .spec import FormatSpec, InputKind
from .workspace import Workspace

TYPES: dict[str, tuple[int, InputKind | None]] = {
    "W4A16": (4, None),
    "W8A16": (8, None),
    "W8A8": (8, "static"),
    "W8A8S": (8, "static"),
    "W8A8_MIX": (8, "both"),
    "W8A8_DYNAMIC": (8, "dynamic"),
    "W4A8_DYNAMIC": (4, "dynamic"),
}
"""Types that are read: bits of the weights, and how inputs are quantized."""

OTHER_TYPES = frozenset(
    "W8A8SC W8A8_TIMESTEP W4A4_DYNAMIC W4A4_FLATQUANT_DYNAMIC "
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

_ONLY_QUANTIZED = (
    "weight_scale", "weight_offset", "weight_scale_second", "weight_offset_second", "input_scale", "input_offset", *DERIVED,
)  # fmt: skip
"""Leaf names that nothing but a quantized layer has."""
LAYER_PARTS = ("weight", "bias", *_ONLY_QUANTIZED)


def detect(location: Location) -> str | None:
    """The variant that the folder says it is, or None."""
    description = find_description(location)
    if description is None:
        return "numpy" if "quant_weight.npy" in location.names else None
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
    if not found and any(name.endswith(".safetensors") for name in location.names):
        found = [name for name in location.names if _describes(location, name)]
    if len(found) > 1:
        raise UnreadableError(f"{location.folder.name}: several descriptions ({', '.join(found)}); name the weight file or one of them")
    return location.folder / found[0] if found else None


_ELSEWHERE = re.compile(r"(config|tokenizer|vocab|added_tokens|special_tokens_map|chat_template|processor|index|weighbridge)\b|_config")
"""Names of other tools' JSON files."""


def _describes(location: Location, name: str) -> bool:
    """Whether a JSON file of any name is a description: the caller of the tool chooses its name."""
    if not name.endswith(".json") or _ELSEWHERE.search(name.removesuffix(".json")):
        return False
    try:
        found = location.read_json(location.folder / name)
    except UnreadableError:
        return False
    return "model_quant_type" in found and any(key.endswith(".weight") for key in found)


def _types(description: dict[str, Any]) -> dict[str, str]:
    """The type of every tensor that the description names."""
    return {sys.intern(key): sys.intern(value) for key, value in description.items() if isinstance(value, str) and key not in NOT_TENSORS}


class MsModelSlim(Checkpoint):
    """Reader of both generations; types beyond ``TYPES`` are listed as unsupported."""

    def __init__(self, location: Location, variant: str) -> None:
        if variant == "numpy":
            from .npy_file import numpy_tensors, numpy_types

            tensors, packed, said, name = numpy_tensors(location), False, dict[str, Any](), "quant_weight.npy"
            types = numpy_types(tensors)
        else:
            path = find_description(location)
            if path is None:
                raise UnreadableError(f"{location.folder.name}: no quant_model_description*.json beside the weights")
            description = location.read_json(path)
            packed, types, name = "version" in description, _types(description), path.name
            said = {key: description[key] for key in ("model_quant_type", *target.ATTENTION_KEYS) if isinstance(description.get(key), str)}
            del description  # before the headers are read: either is large for a model of many experts
            tensors = location.tensors("quant_model_weight")
        super().__init__(location, "msmodelslim", variant, tensors)
        self._packed, self._types, self.said = packed, types, said
        self._kinds: dict[str, str] = {}
        self._model_type = self.model_type
        self._check_description(name)
        self._sort_tensors(name)
        self.said["labels"] = {tensor: self._types[tensor] for tensor in self.attention if tensor in self._types}

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
                if type_ in TYPES:
                    self._kinds[module] = sys.intern(type_)
                elif type_ in OTHER_TYPES or type_ in ATTENTION_TYPES:
                    unsupported[module] = type_
                else:
                    raise UnreadableError(f"{description}: {tensor!r} has the unknown type {type_!r}")
        self.unsupported = [Unsupported(name, type_, f"type {type_} is not read yet") for name, type_ in unsupported.items()]
        for tensor in self.tensors:
            module, _, leaf = map(sys.intern, tensor.rpartition("."))
            if module in self._kinds and leaf in LAYER_PARTS:
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
        if leaf in _ONLY_QUANTIZED or (leaf == "weight" and self.tensors[tensor].dtype == "I8"):
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
        type_ = self._kinds[name]
        bits, kind = TYPES[type_]
        static = kind in {"static", "both"}
        self._require(name, type_, "weight", ("I8",), 2)
        if f"{name}.bias" in self.tensors:
            self._require(name, type_, "bias", FLOATS, 1)
        if static:
            self._require(name, type_, "input_scale", FLOATS, 1)
        if not (static and self._is_derived(name)):
            self._require(name, type_, "weight_scale", FLOATS)
        second = f"{name}.weight_scale_second" in self.tensors
        layout = self._layout(name, type_, bits)
        codes = PackedMatrix(layout, self.tensors.tensor(f"{name}.weight"))
        input_scale, input_zero_point = self._inputs(name, type_) if static else (None, None)
        outer, scales = None, self._scales(name, type_, codes.shape[0], input_scale)
        part = "weight_scale"
        if second:
            self._require(name, type_, "weight_scale_second", ("F32", "F16", "BF16"), 2)
            outer, scales, part = scales, self.tensors.tensor(f"{name}.weight_scale_second"), "weight_scale_second"
            self._insist_on_zeros(name)
        strategy, group_size = _strategy(name, codes.shape, tuple(scales.shape))
        zeros = self._zero_points(name, bits, tuple(scales.shape), part)
        weights = QuantArgs(bits, "int", zeros is None, strategy, group_size, sparse=type_ == "W8A8S" and self._is_derived(name))
        measured = kind != "static"  # W8A8_MIX: in one of its two modes
        inputs = None if kind is None else QuantArgs(8, "int", kind == "dynamic", "token" if measured else "tensor", dynamic=measured)
        bias = self.tensors.tensor(f"{name}.bias") if f"{name}.bias" in self.tensors else None
        extras = {part: Extra("derived", self.tensors.tensor(f"{name}.{part}")) for part in DERIVED if f"{name}.{part}" in self.tensors}
        layer = QuantizedLinear(
            name, codes.shape, QuantScheme(weights, inputs), codes, scales, zeros, outer=outer, bias=bias,
            input_scale=input_scale, input_zero_point=input_zero_point, extras=extras,
        )  # fmt: skip
        layer.check()
        self._check_extras(layer)
        return layer

    def _require(self, name: str, type_: str, part: str, dtypes: tuple[str, ...], dimensions: int | None = None) -> None:
        """UnreadableError if a layer's part is missing, or of another dtype or number of dimensions."""
        info = self.tensors.get(f"{name}.{part}")
        if info is None:
            raise UnreadableError(f"{name}: has no tensor {part!r}, which {type_} needs; the checkpoint is incomplete")
        if info.dtype not in dtypes or dimensions not in {None, len(info.shape)}:
            wanted = f"{' or '.join(sorted(dtypes))}{'' if dimensions is None else f' in {dimensions} dimensions'}"
            raise UnreadableError(f"{name}: {part} is {info.dtype} {list(info.shape)}, wanted {wanted} for {type_}")

    def _is_derived(self, name: str) -> bool:
        """Whether the weight's scale is only in deq_scale (quirk 7)."""
        return f"{name}.weight_scale" not in self.tensors and f"{name}.deq_scale" in self.tensors

    def _scales(self, name: str, type_: str, out: int, input_scale: Array | None) -> ArrayLike:
        if input_scale is None or not self._is_derived(name):
            return self.tensors.tensor(f"{name}.weight_scale")
        self._require(name, type_, "deq_scale", ("F32", "I64"), 1)
        stored = self.tensors.tensor(f"{name}.deq_scale")
        if stored.shape not in {(out,), (1,)}:
            raise UnreadableError(f"{name}: deq_scale has shape {list(stored.shape)}, wanted [{out}] or [1]")
        return ScaleOfProduct(name, stored, float(input_scale.astype(np.float32)[0]))

    def _inputs(self, name: str, type_: str) -> tuple[Array, Array]:
        """Static input scale and zero point, [1] each."""
        self._require(name, type_, "input_offset", (*FLOATS, "I8"), 1)
        found = {part: np.asarray(self.tensors.array(f"{name}.{part}")) for part in ("input_scale", "input_offset")}
        for part, array in found.items():
            if array.shape != (1,):
                raise UnreadableError(f"{name}: {part} has shape {list(array.shape)}, wanted [1] for {type_}")
        scale, offset = (float(array.astype(np.float32)[0]) for array in found.values())
        if not (np.isfinite(scale) and scale > 0):
            raise UnreadableError(f"{name}: input_scale is {scale}, wanted a positive number; the checkpoint is damaged")
        if offset != np.rint(offset) or not -128 <= offset <= 127:
            raise UnreadableError(f"{name}: input_offset is {offset}, wanted an integer from -128 to 127; the checkpoint is damaged")
        return found["input_scale"], np.array([int(offset)], dtype=np.int16)

    def _insist_on_zeros(self, name: str) -> None:
        """Offsets of the outer scales of W4A8: the tool writes zeros, and the law has no place for others."""
        tensor = f"{name}.weight_offset"
        if tensor in self.tensors and np.asarray(self.tensors.array(tensor)).any():
            raise UnreadableError(f"{tensor}: is not zero beside weight_scale_second; what that means is not known: quantize it again")

    def _check_extras(self, layer: QuantizedLinear) -> None:
        out = layer.shape[0]
        shapes: dict[str, set[tuple[int, ...]]] = {
            "deq_scale": {(out,), (1,)},
            "quant_bias": {(out,)},
            "scale_bias": {(out, 1), (out, 16), (out,), layer.shape},
        }
        dtypes = {"deq_scale": ("float32", "int64"), "quant_bias": ("int32",), "scale_bias": ("float32", "bfloat16", "float16")}
        for part, extra in layer.extras.items():
            if tuple(extra.value.shape) not in shapes[part] or extra.value.dtype.name not in dtypes[part]:
                wanted = f"{' or '.join(dtypes[part])} {' or '.join(str(list(shape)) for shape in sorted(shapes[part]))}"
                raise UnreadableError(f"{layer.name}: {part} is {extra.value.dtype} {list(extra.value.shape)}, wanted {wanted}")

    def _layout(self, name: str, type_: str, bits: int) -> PackLayout:
        if bits == 8:
            return CONTAINER
        rows, scale = self.tensors[f"{name}.weight"].shape[0], self.tensors[f"{name}.weight_scale"].shape
        if type_ == "W4A8_DYNAMIC":
            return PACKED_ROWS if self._packed and scale[0] == 2 * rows else CONTAINER
        if not self._packed:
            return CONTAINER
        return PACKED_COLUMNS if scale[-1] == 1 else PACKED_ROWS

    def _zero_points(self, name: str, bits: int, scale: tuple[int, ...], part: str) -> IntegralZeros | None:
        tensor = f"{name}.{part.replace('scale', 'offset')}"
        if tensor not in self.tensors:
            return None
        stored: Any = self.tensors.tensor(tensor)
        if stored.shape != scale and not {stored.shape, scale} <= {(), (1,)}:  # HQQ per tensor has a scale [] and an offset [1]
            raise UnreadableError(f"{tensor}: has shape {list(stored.shape)}, {part} {list(scale)}; they must agree")
        matrix = stored.reshape(1, -1) if isinstance(stored, np.ndarray) else stored.as_matrix()
        return IntegralZeros(tensor, matrix if stored.ndim == 1 else stored, -(1 << bits - 1), (1 << bits - 1) - 1)


def _strategy(name: str, shape: tuple[int, int], scale: tuple[int, ...]) -> tuple[Strategy, int | None]:
    """(strategy, group size) that the shapes say."""
    out, in_ = shape
    if scale in {(1,), ()}:
        return "tensor", None
    if scale == (out, 1):
        return "channel", None
    if len(scale) == 2 and scale[0] == out and scale[1] and in_ % scale[1] == 0:
        return "group", in_ // scale[1]
    raise UnreadableError(
        f"{name}: weight_scale has shape {list(scale)}, wanted [1], [{out}, 1] or [{out}, groups] with groups dividing {in_}"
    )


@dataclass(frozen=True, slots=True)
class ScaleOfProduct:
    """The weight's scale, [out, 1] or [1] float32, out of deq_scale, the product of it and the input's (``LazyArray``)."""

    name: str
    stored: ArrayLike
    input_scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (1,) if self.stored.shape == (1,) else (self.stored.shape[0], 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        found = decode_deq_scale(np.asarray(read(self.stored, rows))) / np.float32(self.input_scale)
        return found if len(self.shape) == 1 else found.reshape(-1, 1)[:, cols]


SPEC = FormatSpec(
    name="msmodelslim",
    tool="msModelSlim 8.2 to 26.1",
    about="safetensors and a description JSON, for Ascend NPUs",
    variants=target.VARIANTS,
    detect=detect,
    open=MsModelSlim,
    outputs=target.outputs,
    quantization_config=target.quantization_config,
    stem=target.stem,
    config_keys=target.config_keys,
    derived=target.derived,
    objection=target.objection,
    owner_writes_only=True,
    default_variant="safe_tensor",
)
