"""How a model is spelled in MindSpore's checkpoints: what Golden Stick calls a layer's tensors, in its versions, and file names.

The facts are in ``formats.mindspore``. A layer is written as the version's usual algorithm has it: 0.6.0 as RTN (inputs in float) and
PTQ (static inputs), 1.x as PTQ. Zero points of 0 are +0.0 in RTN and -0.0 in PTQ, as the tool leaves them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .errors import RanksRefusedError, RefusedError
from .ir import QuantizedLinear
from .laid_out import LaidOut
from .layouts import PackLayout
from .mindformers_file import lay_out_mindformers
from .mindformers_names import LLAMA, names_for
from .mindspore_yaml import document, missing_key
from .msmodelslim_target import CONTAINER
from .safetensors_file import NAMES
from .spec import FLOAT_WEIGHTS, Capabilities, InputKind, LayerTarget, ModelFacts, Objection, TensorSpec, Variant

NIBBLES = PackLayout(bits=4, word="i1", axis="out", transposed=True, low=-8)
"""Int4: [in, out / 2], the even output in the low nibble, two's complement."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """What a quantized layer's tensors are called after its module's name; "" for what it does not have.

    scale, zero      of the weights; dequant: of weights and inputs together
    merged           a bias into which the inputs' zero point was merged; correction: what the zero point makes, apart from the bias
    copies           tensors that are there twice
    dynamic          inputs are measured at run time
    """

    variant: str
    weight: str
    scale: str = ""
    zero: str = ""
    smooth: str = ""
    bias: str = ""
    dequant: str = ""
    input_scale: str = ""
    input_zero: str = ""
    merged: str = ""
    correction: str = ""
    copies: Mapping[str, str] | None = None
    dynamic: bool = False

    def needs(self) -> tuple[str, ...]:
        """What must be there."""
        return tuple(leaf for leaf in (self.weight, self.scale, self.zero, self.dequant, self.input_scale, self.input_zero) if leaf)

    def leaves(self) -> tuple[str, ...]:
        """Everything that may be there, but for copies."""
        return tuple(leaf for leaf in (*self.needs(), self.smooth, self.bias, self.merged, self.correction) if leaf)


RTN = Spelling("gs0.6", "_handler.weight", "_weight_quantizer.scale", "_weight_quantizer.zp_neg", bias="_handler.bias")
SMOOTH_QUANT = Spelling(
    "gs0.6",
    "_handler.weight",
    dequant="_output_quantizer.scale",
    input_scale="_input_quantizer.t_scale",
    input_zero="_input_quantizer.t_zp",
    merged="_handler.bias",
)
OLD_PTQ = Spelling("gs0.6", "_layer.weight", "_layer.matmul.t_scale", "_layer.matmul.t_zp_neg", bias="_layer.bias")
OLD_STATIC = Spelling(
    "gs0.6",
    "_layer.weight",
    dequant="_layer.matmul.dequant_scale",
    input_scale="input_scale",
    input_zero="input_zp",
    merged="_layer.bias",
    copies={"_layer.matmul.input_scale": "input_scale", "_layer.matmul.input_zp": "input_zp"},
)
PTQ = Spelling(
    "gs1.2",
    "_layer.weight",
    "_layer.matmul.weight_scale",
    "_layer.matmul.weight_zp",
    smooth="_layer.matmul.smooth_scale",
    bias="_layer.bias",
)
STATIC = Spelling(
    "gs1.2",
    "_layer.weight",
    dequant="_layer.matmul.dequant_scale",
    input_scale="quant_op.input_scale",
    input_zero="quant_op.input_zp",
    correction="_layer.matmul.quant_bias",
    bias="_layer.bias",
)
DYNAMIC = Spelling(
    "gs1.2",
    "_layer.weight",
    "_layer.matmul.weight_scale",
    smooth="dyn_quant_op.smooth_scale",
    bias="_layer.bias",
    dynamic=True,
)
SPELLINGS = (RTN, SMOOTH_QUANT, OLD_PTQ, OLD_STATIC, PTQ, STATIC, DYNAMIC)
"""PTQ comes before DYNAMIC, which needs less."""


def outputs(layer: LayerTarget, variant: str) -> tuple[TensorSpec, ...]:
    """The tensors that spell ``layer``, under Hugging Face's name of the module."""
    if variant == "float":
        return _float_outputs(layer)
    spelling = spelling_of(layer, variant)
    name, (out, in_), weights = layer.name, layer.shape, layer.scheme.weights
    layout = NIBBLES if weights.bits == 4 else CONTAINER
    dtype = "Int4" if weights.bits == 4 else "I8"
    specs = [TensorSpec(f"{name}.{spelling.weight}", dtype, layout.stored_shape(layer.shape), "codes", layout)]
    grid = (layer.groups, out) if weights.strategy == "group" else (out,)
    if spelling.scale:
        specs.append(TensorSpec(f"{name}.{spelling.scale}", layer.scale_dtype, grid, "scales", transposed=True))
    if spelling.zero:
        sign: Any = "integer" if spelling is RTN else "float"
        specs.append(TensorSpec(f"{name}.{spelling.zero}", layer.scale_dtype, grid, "zero_points", transposed=True, negated=sign))
    if spelling.smooth and layer.smooth_dtype is not None:
        specs.append(TensorSpec(f"{name}.{spelling.smooth}", layer.smooth_dtype, (in_,), "input_smooth"))
    if spelling.bias and layer.bias_dtype is not None:
        specs.append(TensorSpec(f"{name}.{spelling.bias}", layer.bias_dtype, (out,), "bias"))
    if spelling.dequant:
        specs += _static_outputs(layer, spelling)
    return tuple(specs)


def _static_outputs(layer: LayerTarget, spelling: Spelling) -> list[TensorSpec]:
    """What a layer with a static input scale has beside its codes, in the tool's order."""
    name, (out, in_), dtypes = layer.name, layer.shape, dict(layer.derived)
    specs = []
    if spelling.merged:
        specs.append(TensorSpec(f"{name}.{spelling.merged}", dtypes["merged_bias"], (out,), "merged_bias"))
    if spelling.correction:
        specs.append(TensorSpec(f"{name}.{spelling.correction}", "I32", (out,), "zero_point_bias"))
    specs.append(TensorSpec(f"{name}.{spelling.dequant}", dtypes["dequant_scale"], (out,), "deq_scale"))
    smoothed = dtypes.get("smoothed_input_scale")
    shape = (in_,) if smoothed is not None or spelling.variant == "gs0.6" else (1,)
    if smoothed is not None:
        specs.append(TensorSpec(f"{name}.{spelling.input_scale}", smoothed, shape, "smoothed_input_scale"))
    else:
        specs.append(TensorSpec(f"{name}.{spelling.input_scale}", layer.input_dtype or "F16", shape, "input_scale"))
    specs.append(TensorSpec(f"{name}.{spelling.input_zero}", "I8", shape, "input_zero_point"))
    return specs


def _float_outputs(layer: LayerTarget) -> tuple[TensorSpec, ...]:
    weight = TensorSpec(f"{layer.name}.weight", layer.scale_dtype, layer.shape, "weight")
    if layer.bias_dtype is None:
        return (weight,)
    return weight, TensorSpec(f"{layer.name}.bias", layer.bias_dtype, (layer.shape[0],), "bias")


def spelling_of(layer: LayerTarget, variant: str) -> Spelling:
    """How a version spells a layer."""
    if variant == "gs0.6":
        return RTN if layer.inputs is None else OLD_STATIC
    return {None: PTQ, "static": STATIC}.get(layer.inputs, DYNAMIC)


def derived(layer: QuantizedLinear, kind: InputKind | None, model_dtype: str | None) -> tuple[tuple[str, str], ...]:
    """What a layer with a static input scale has beside the law, with dtypes: as they are, or as a network of ``model_dtype`` has them."""
    if kind not in {"static", "both"}:
        return ()
    kept = layer.extras.get("dequant_scale")
    integers = model_dtype != "BF16" if kept is None else kept.value.dtype.kind == "i"
    found = [("dequant_scale", "I64" if integers else "F32")]
    merged = layer.extras.get("merged_bias")
    if merged is not None:
        found.append(("merged_bias", NAMES[np.dtype(merged.value.dtype)]))
    elif layer.bias is None:  # a bias that is merged does not come back exactly
        found.append(("merged_bias", "F16" if integers else "BF16"))
    if "smoothed_input_scale" in layer.extras:
        dtype = layer.extras["smoothed_input_scale"].value.dtype
        found.append(("smoothed_input_scale", {"float16": "F16", "bfloat16": "BF16"}.get(dtype.name, "F32")))
    return tuple(found)


def objection(layer: LayerTarget, variant: str) -> Objection | None:
    """Why Golden Stick has no words for a layer; None if it has."""
    weights, kind = layer.scheme.weights, layer.inputs
    if variant == "float":
        return None
    if kind is not None and weights.bits == 4:
        hint = "pass --allow activations-dropped, which leaves inputs in float"
        return Objection("type", "4-bit weights with quantized inputs", "has no spelling for them that networks load", hint)
    if weights.strategy == "group" and weights.bits == 8:
        return Objection("group-size", "groups of 8-bit codes", "has one scale per channel there", "convert to gptq or dense")
    if kind is not None and not weights.symmetric:
        return Objection("zero-point", "zero points of weights beside quantized inputs", "is symmetric there", "convert to dense")
    smoothed = "smoothed_input_scale" in dict(layer.derived)
    if variant != "hf" and kind == "static" and layer.scale_dtype == "F32" and not (smoothed or layer.product_divides):
        hint = "pass --allow activations-dropped, which leaves inputs in float"
        offers = "stores their product alone, from which it does not come back"
        return Objection("type", "a float32 scale beside the inputs' own", offers, hint)
    if variant == "gs0.6" and kind == "static" and "merged_bias" not in dict(layer.derived):
        offers = "merges it with what the inputs' zero point makes, rounded, from which it does not come back"
        return Objection("type", "a bias beside static inputs", offers, "convert to mindspore:gs1.2 or mindspore:hf, which keep it")
    if layer.smooth_dtype is not None and kind != "static" and variant == "gs0.6":
        return Objection("two-level", "a scale of its inputs", "has no slot for it in 0.6", "convert to mindspore:gs1.2, or dense")
    if layer.smooth_dtype is not None and kind == "static" and not smoothed:
        return Objection("two-level", "smoothing beside a static input scale", "stores their quotient alone", "convert to dense")
    return None


def lay_out_model(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], model: ModelFacts, variant: str, name: str | None = None
) -> list[LaidOut]:
    """rank_0/NAME.ckpt, or that of every rank; ``name``: another than ``name_of``. RefusedError for what MindFormers has no name for."""
    kind = None if model.config is None else model.config.get("model_type")
    names = names_for(kind)
    if names is None:
        raise RefusedError(f"{kind}: MindFormers' names of this model are not known here; those of llama, qwen2 and qwen3 are")
    for layer in model.layers[1:] if variant != "float" else ():
        first = model.layers[0]
        if (layer.scheme.weights.bits, layer.group_size, layer.inputs) != (first.scheme.weights.bits, first.group_size, first.inputs):
            raise RefusedError(
                f"{layer.name}: is quantized in another way than {first.name}, and MindFormers' quantization_config has one for all; "
                "convert to mindspore:hf, or to mindspore:float"
            )
    yaml_of(model, variant)  # refuses what the YAML could not say, before any work
    heads = (model.config or {}).get("num_key_value_heads") or (model.config or {}).get("num_attention_heads")
    if isinstance(heads, int) and heads % model.ranks:
        raise RanksRefusedError(
            f"config.json: {heads} heads of keys do not divide over {model.ranks} ranks, which MindFormers refuses; "
            "give --tp a number that divides them"
        )
    return [lay_out_mindformers(tensors, f"{name or name_of(model, variant)}.ckpt", names, model.fused, ranks=model.ranks)]


def name_of(model: ModelFacts, variant: str) -> str:
    """NAME of the files: the model's folder and what its weights and inputs are, as MindFormers writes names."""
    found = re.sub(r"[^a-z0-9]+", "_", model.folder.lower()).strip("_") or "model"
    if not model.layers or variant == "float":
        return found
    layer = model.layers[0]
    kind = f"a{16 if layer.inputs is None else 8}w{layer.scheme.weights.bits}"
    return found if found.endswith(kind) else f"{found}_{kind}"


def yaml_of(model: ModelFacts, variant: str) -> Mapping[str, Any]:
    """{predict_NAME.yaml: its content}; nothing if config.json does not say enough (``missing``)."""
    if variant == "hf" or missing(model, variant):
        return {}
    name = name_of(model, variant)
    return {f"predict_{name}.yaml": document(model, variant, name)}


def missing(model: ModelFacts, variant: str) -> list[str]:
    """Why there is no YAML, in words; [] if there is one."""
    if variant == "hf":
        return []
    if model.config is None:
        return [f"predict_{name_of(model, variant)}.yaml: pass --base-model with the float model's folder, whose config.json it is made of"]
    kind = model.config.get("model_type")
    if kind not in LLAMA.models:
        return [f"predict_{name_of(model, variant)}.yaml: {kind} is none of the models that MindFormers 1.3.2 configures; write it by hand"]
    key = missing_key(model.config)
    return [] if key is None else [f"predict_{name_of(model, variant)}.yaml: config.json has no {key}, which it needs"]


_HOLDS: dict[str, Any] = {"scale_dtypes": ("half", "F16", "BF16", "F32"), "smooth": True, "mixed_groups": False}

VARIANTS = (
    Variant(
        "gs0.6",
        "Golden Stick 0.6: 8-bit weights, inputs in float or static",
        Capabilities(**_HOLDS, bits=(8,), strategies=("channel",), inputs=("static",)),
        "MindFormers 1.3.2 with Golden Stick 0.6.0",
    ),
    Variant(
        "gs1.2",
        "Golden Stick 1.0 to 1.2: 4 and 8-bit weights, inputs in float, static or measured",
        Capabilities(
            **_HOLDS,
            bits=(4, 8),
            strategies=("channel", "group"),
            group_sizes=(128, 64),
            inputs=("static", "dynamic"),
            multiple_of=(2, 1),
        ),
        "MindFormers 1.3.2 to 1.6 with Golden Stick 1.0 to 1.2",
    ),
    Variant(
        "float",
        "float weights",
        replace(FLOAT_WEIGHTS, respells=True),
        "MindFormers 1.3.2 to 1.6",
    ),
    Variant(
        "hf",
        "Golden Stick 1.4: safetensors with Hugging Face's names",
        Capabilities(
            bits=(4, 8),
            strategies=("channel", "group"),
            group_sizes=(128, 64),
            scale_dtypes=("half", "F16", "BF16", "F32"),
            inputs=("static", "dynamic"),
            multiple_of=(2, 1),
        ),
        "MindOne; MindFormers 1.7 and later (8-bit weights and inputs)",
    ),
)
