"""How a model is spelled in msModelSlim's format: tensors of a layer, description, file names, and what each reader takes.

The facts are in ``formats.msmodelslim``. Two variants are layouts of the tool (``safe_tensor``, ``ascendv1``); two more are one of
these with the names, types and config keys that an engine looks for:

- ``vllm-ascend`` is ascendv1 with the types that vllm-ascend 0.30 registers for linears, spelled as its parameters are: W8A16, W8A8,
  W8A8_DYNAMIC and W8A8_MIX with one scale per channel, in the model's dtype. 4-bit codes per channel go into 8 bits.
- ``mindie`` is safe_tensor with the description's name that MindIE-LLM looks for first, and config.json says ``quantize`` and the
  group size, which is 0, 64, 128 or 256.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .derived import SPLIT
from .ir import QuantizedLinear
from .layouts import PackLayout
from .spec import Capabilities, InputKind, LayerTarget, ModelFacts, Objection, TensorSpec, Variant

CONTAINER = PackLayout(bits=8, word="i1", low=-128)
"""One code a byte."""
PACKED_ROWS = PackLayout(bits=4, word="i1", axis="out", low=-8)
"""ascendv1 per group, and W4A8: two output rows a byte."""
PACKED_COLUMNS = PackLayout(bits=4, word="i1", axis="in", low=-8)
"""ascendv1 with one scale a row: two inputs a byte."""

ATTENTION_KEYS = ("kv_cache_type", "kv_quant_type", "fa_quant_type")
"""What a description says of a quantized KV cache and of quantized attention."""
_PACKED = frozenset({"ascendv1", "vllm-ascend"})
"""Variants that pack 4-bit codes."""
_SPLIT_INPUTS = ("down", "o_proj")
"""Parts of the names of layers whose scale_bias has 16 columns; the tool looks for these substrings."""


def type_of(layer: LayerTarget, variant: str) -> str:
    """The type that the description gives the layer's tensors."""
    bits = layer.scheme.weights.bits
    if layer.inputs is None:
        return f"W{bits}A16"
    if layer.inputs == "dynamic":
        return f"W{bits}A8_DYNAMIC"
    if layer.scheme.weights.sparse:
        return f"W{bits}A8S"
    # The tool's safe_tensor has no word for both: the same files are W8A8 there.
    return f"W{bits}A8_MIX" if layer.inputs == "both" and variant in _PACKED else f"W{bits}A8"


def _model_type(model: ModelFacts, variant: str) -> str:
    """model_quant_type: what the source calls itself, if a layer has that type, else the type of most."""
    types, said = Counter(type_of(layer, variant) for layer in model.layers), model.said.get("model_quant_type")
    return str(said) if said in types else types.most_common(1)[0][0]


def outputs(layer: LayerTarget, variant: str) -> tuple[TensorSpec, ...]:
    """The tensors that spell ``layer``: weight, bias, scales and offsets, and for quantized inputs theirs and what follows from them."""
    layout, weights = CONTAINER, layer.scheme.weights
    if variant in _PACKED and weights.bits == 4:
        layout = PACKED_COLUMNS if layer.groups == 1 and layer.inputs is None else PACKED_ROWS
    name, out = layer.name, layer.shape[0]
    specs = [TensorSpec(f"{name}.weight", "I8", layout.stored_shape(layer.shape), "codes", layout)]
    if layer.bias_dtype is not None:
        specs.append(TensorSpec(f"{name}.bias", layer.bias_dtype, (out,), "bias"))
    whole = weights.strategy == "tensor"
    grid = (1,) if whole else (out, layer.groups)
    if layer.outer_dtype is not None:
        specs.append(TensorSpec(f"{name}.weight_scale", layer.outer_dtype, (out, 1), "outer"))
        specs.append(TensorSpec(f"{name}.weight_offset", layer.outer_dtype, (out, 1), "outer_zeros"))
        specs.append(TensorSpec(f"{name}.weight_scale_second", layer.scale_dtype, grid, "scales"))
        specs.append(TensorSpec(f"{name}.weight_offset_second", "I64", grid, "zero_points"))
    elif not weights.sparse:
        shapes = [() if part in layer.scalars else grid for part in ("scales", "zero_points")]
        specs.append(TensorSpec(f"{name}.weight_scale", layer.scale_dtype, shapes[0], "scales"))
        specs.append(TensorSpec(f"{name}.weight_offset", layer.scale_dtype, shapes[1], "zero_points"))
    if layer.input_dtype is not None:
        specs.append(TensorSpec(f"{name}.input_scale", layer.input_dtype, (1,), "input_scale"))
        specs.append(TensorSpec(f"{name}.input_offset", layer.input_dtype, (1,), "input_zero_point"))
        dtypes = dict(layer.derived)
        specs.append(TensorSpec(f"{name}.deq_scale", dtypes["deq_scale"], (1,) if whole else (out,), "deq_scale"))
        specs.append(TensorSpec(f"{name}.quant_bias", dtypes["quant_bias"], (out,), "quant_bias"))
    if variant in _PACKED and weights.bits == 4 and layer.inputs == "dynamic":
        specs.append(TensorSpec(f"{name}.scale_bias", "F32", (out, scale_bias_columns(name, layer.shape[1])), "scale_bias"))
    return tuple(specs)


def scale_bias_columns(name: str, inputs: int) -> int:
    """Parts along its inputs for which the scale_bias of the linear ``name`` has a sum each."""
    return SPLIT if any(part in name.rpartition(".")[2] for part in _SPLIT_INPUTS) and inputs % SPLIT == 0 else 1


def derived(layer: QuantizedLinear, kind: InputKind | None, model_dtype: str | None) -> tuple[tuple[str, str], ...]:
    """deq_scale and quant_bias of a layer with a static input scale, with their dtypes.

    deq_scale keeps the dtype that it has, unless ``model_dtype`` says which one the serving engine reads.
    """
    if kind not in {"static", "both"}:
        return ()
    kept = layer.extras.get("deq_scale")
    if model_dtype is None and kept is not None:
        return ("deq_scale", "I64" if kept.value.dtype.kind == "i" else "F32"), ("quant_bias", "I32")
    return ("deq_scale", "I64" if model_dtype in {"F16", "F32"} else "F32"), ("quant_bias", "I32")


def objection(layer: LayerTarget, variant: str) -> Objection | None:
    """Why no type of the tool, or of the engine that the variant is for, says this layer; None if one does."""
    weights, kind = layer.scheme.weights, layer.inputs
    name = type_of(layer, variant)
    if weights.bits == 4 and kind in {"static", "both"}:
        hint = "pass --allow activations-dropped, or quantize inputs dynamically"
        return Objection("type", "4-bit weights with static input scales", "has no type for that", hint)
    if kind is not None and weights.bits == 8 and weights.strategy == "group":
        return Objection("group-size", f"groups in {name}", "has one scale per channel there", "convert to compressed-tensors or dense")
    if kind is not None and weights.bits == 4 and weights.strategy == "group" and layer.outer_dtype is None:
        hint = "convert to compressed-tensors, which has one level of groups"
        return Objection("type", "4-bit groups with one level of scales", f"has two levels in {name}", hint)
    if kind is not None and not weights.symmetric:
        return Objection("zero-point", f"zero points in {name}", "is symmetric there", "convert to compressed-tensors or dense")
    if variant == "vllm-ascend" and name == "W8A16" and not weights.symmetric:
        hint = "pass --allow requantize, which is measured, or convert to gptq or awq and serve it on a GPU"
        return Objection("zero-point", "zero points in W8A16", "is served with wrong weights if it has them (0.30.0rc2)", hint)
    return None


def quantization_config(model: ModelFacts, variant: str) -> tuple[Mapping[str, Any], dict[str, Any] | None]:
    """({description file: object}, what config.json says): only MindIE looks into config.json."""
    kind = _model_type(model, variant)
    layers = {layer.name: layer for layer in model.layers}
    description: dict[str, Any] = {"model_quant_type": kind}
    sizes = {layer.group_size for layer in model.layers} - {-1}
    group_size = sizes.pop() if len(sizes) == 1 else None
    if variant in _PACKED:
        description["version"] = "1.0.0"
        if group_size is not None:
            description["group_size"] = group_size
    if model.attention:
        description |= {key: model.said[key] for key in ATTENTION_KEYS if key in model.said}
    labels = model.said.get("labels", {})  # of attention's tensors, and of AntiOutlier's copies of norms
    for entry, name in model.entries:
        if entry == "plain":
            description[name] = labels.get(name, "FLOAT")
            continue
        for spec in outputs(layers[name], variant):
            description[spec.name] = "FLOAT" if spec.part == "bias" else type_of(layers[name], variant)
    description |= {name: labels.get(name, "C8") for name in model.attention}
    suffix = f"_{kind.lower()}" if variant == "safe_tensor" else ""
    config = None
    if variant == "mindie":
        kv = model.said.get("kv_quant_type") if model.attention else None
        config = {"group_size": group_size or 0, "kv_quant_type": kv, "fa_quant_type": None}
    return {f"quant_model_description{suffix}.json": description}, config


def config_keys(model: ModelFacts, variant: str) -> Mapping[str, Any]:
    """MindIE: config.json's ``quantize``, the type of most layers in small letters."""
    return {"quantize": _model_type(model, variant).lower()} if variant == "mindie" else {}


def stem(model: ModelFacts, variant: str) -> str:
    """quant_model_weight_<type>, in both of V0's variants."""
    return f"quant_model_weight_{_model_type(model, variant).lower()}"


_HOLDS = Capabilities(
    bits=(4, 8),
    strategies=("tensor", "channel", "group"),
    group_sizes=(256, 128, 64, 32),
    scale_dtypes=("keep", "F16", "BF16", "F32"),
    inputs=("static", "dynamic"),
    outer=True,
    sparse=True,
    lm_head=True,
)

VARIANTS = (
    Variant("safe_tensor", "Python API, save_type safe_tensor: codes a byte each", _HOLDS, "MindIE"),
    Variant(
        "ascendv1",
        "Python API, save_type ascendV1: 4-bit codes packed",
        replace(_HOLDS, multiple_of=(2, 2), inputs=("static", "dynamic", "both")),
        "MindIE, vllm-ascend (8 bits per channel)",
    ),
    Variant(
        "vllm-ascend",
        "ascendv1 in the types that vllm-ascend registers",
        replace(
            _HOLDS,
            bits=(8,),
            strategies=("channel",),
            group_sizes=(),
            scale_dtypes=("model", "F16", "BF16"),
            inputs=("static", "dynamic", "both"),
            outer=False,
            sparse=False,
            for_engine=True,
        ),
        "vllm-ascend",
    ),
    Variant(
        "mindie",
        "safe_tensor, with MindIE's names and keys",
        replace(_HOLDS, group_sizes=(256, 128, 64), strategies=("channel", "group")),
        "MindIE",
    ),
    Variant("v1", "command line (modelslim_v1)", None),
    Variant("numpy", "Python API, save_type numpy: dictionaries in .npy files", None),
)
