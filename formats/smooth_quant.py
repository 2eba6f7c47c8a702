"""Folders of LMDeploy's ``lite smooth_quant``: 8-bit weights whose inputs are quantized at run time, for its PyTorch engine.

Defined by LMDeploy 0.18.0 (``lmdeploy/lite/apis/smooth_quant.py``, ``pytorch/models/q_modules.py``). An ordinary Hugging Face folder in
safetensors, and in config.json ``{"quant_method": "smooth_quant", "quant_dtype": "int8"}``, or ``float8_e4m3fn``, ``float8_e5m2``.

======  ====================  ======================================================================
weight  int8 or float8 [N,K]  codes
scale   float32 [N, 1]        ``absmax / 127``, of float8 the largest weight over the largest number
bias    float16 [N]           only where the layer has one
======  ====================  ======================================================================

Law: ``w[o, i] = weight[o, i] * scale[o]``. Each token has a scale of its own, found at run time; nothing of it is stored, and smoothing
is in the norms' weights already.

Quirks:

1. The scale is called ``scale``, not ``weight_scale``, so that no other engine knows it.
2. ``modules_to_not_convert`` and ``ignored_layers`` are parts of names, of which a module has one or not; without them every linear of
   the decoder's layers is quantized. lm_head is not among those.
3. Without ``quant_dtype`` int8 is meant. LMDeploy 0.2 wrote no quantization_config, and classes of its own beside the weights.
4. ``inputs_stats.pth`` and ``outputs_stats.pth`` beside the weights are what was measured, and no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .checkpoint import Checkpoint, Location
from .compressed_layouts import as_bytes
from .errors import UnreadableError
from .ir import Element, QuantArgs, QuantizedLinear, QuantScheme
from .layouts import PackedMatrix, PackLayout
from .spec import Capabilities, FormatSpec, LayerTarget, ModelFacts, Objection, TensorSpec, Variant

METHOD = "smooth_quant"
_ELEMENTS: dict[str, Element] = {"I8": "int", "F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
_DTYPES = {element: dtype for dtype, element in _ELEMENTS.items()}
_SAID = {"int8": "int", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
_WORDS = {element: said for said, element in _SAID.items()}
INT8 = PackLayout(bits=8, word="i1", low=-128)
FLOAT8 = PackLayout(bits=8, word="u1")


def detect(location: Location) -> str | None:
    """ "int8" or "fp8" if config.json says that this is one, else None."""
    config = location.json("config.json")
    said = None if config is None else config.get("quantization_config")
    if not isinstance(said, dict) or said.get("quant_method") != METHOD:
        return None
    return "int8" if _element(said) == "int" else "fp8"


def _element(said: Mapping[str, Any]) -> str:
    """The element that a quantization_config says."""
    dtype = said.get("quant_dtype") or "int8"
    if not isinstance(dtype, str) or dtype not in _SAID:
        raise UnreadableError(f"config.json: quant_dtype is {dtype!r}, wanted {', '.join(_SAID)}")
    return _SAID[dtype]


class SmoothQuant(Checkpoint):
    """Reader of either element. A linear is quantized if its weight has a scale."""

    def __init__(self, location: Location, variant: str) -> None:
        super().__init__(location, METHOD, variant, location.tensors())
        self._said = _element(self.quantization if isinstance(self.quantization, dict) else {})
        for name in self.tensors:
            module, _, leaf = name.rpartition(".")
            quantized = f"{module}.weight" in self.tensors and f"{module}.scale" in self.tensors
            if leaf == "weight" and quantized:
                self.entries.append(("layer", module))
            elif not (quantized and leaf in {"scale", "bias"}):
                if self.tensors[name].dtype in _ELEMENTS and leaf == "weight":
                    raise UnreadableError(f"{module}: has {self.tensors[name].dtype} weights and no scale; the checkpoint is incomplete")
                self.entries.append(("plain", name))

    def layer_tensors(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{part}" for part in ("weight", "scale", "bias") if f"{name}.{part}" in self.tensors)

    def layer(self, name: str) -> QuantizedLinear:
        weight, scale = self.tensors[f"{name}.weight"], self.tensors[f"{name}.scale"]
        if weight.dtype not in _ELEMENTS or len(weight.shape) != 2:
            raise UnreadableError(f"{name}: weight is {weight.dtype} {list(weight.shape)}, wanted {' or '.join(_ELEMENTS)} [out, in]")
        out, in_ = weight.shape
        if scale.dtype not in {"F32", "F16", "BF16"} or scale.shape not in {(out, 1), (out,)}:
            raise UnreadableError(f"{name}: scale is {scale.dtype} {list(scale.shape)}, wanted F32 [{out}, 1]")
        element = _ELEMENTS[weight.dtype]
        if element != self._said:
            raise UnreadableError(f"{name}: weight is {weight.dtype}, and config.json says {_WORDS[self._said]}; correct quant_dtype")
        stored: Any = self.tensors.tensor(f"{name}.weight")
        codes = PackedMatrix(INT8, stored) if element == "int" else PackedMatrix(FLOAT8, as_bytes(stored), "u1")
        inputs = QuantArgs(8, element, strategy="token", dynamic=True)
        scheme = QuantScheme(QuantArgs(8, element), inputs)
        layer = QuantizedLinear(name, (out, in_), scheme, codes, self.tensors.tensor(f"{name}.scale"), bias=self.bias(name))
        layer.check()
        return layer


def outputs(layer: LayerTarget, variant: str) -> tuple[TensorSpec, ...]:
    """The tensors that spell ``layer``."""
    name, (out, _), element = layer.name, layer.shape, layer.scheme.weights.element
    specs = (
        TensorSpec(f"{name}.weight", _DTYPES[element], layer.shape, "codes", INT8 if element == "int" else FLOAT8),
        TensorSpec(f"{name}.scale", layer.scale_dtype, (out, 1), "scales"),
    )
    return specs if layer.bias_dtype is None else (*specs, TensorSpec(f"{name}.bias", layer.bias_dtype, (out,), "bias"))


def quantization_config(model: ModelFacts, variant: str) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """({}, config.json's quantization_config). Linears of the decoder's layers that stay in float are named in full."""
    config: dict[str, Any] = {"quant_dtype": "int8" if variant == "int8" else "float8_e4m3fn", "quant_method": METHOD}
    if model.float_linears:
        config["modules_to_not_convert"] = list(model.float_linears)
    return {}, config


def objection(layer: LayerTarget, variant: str) -> Objection | None:
    """Layers whose inputs are not quantized have no spelling, nor have groups."""
    if layer.inputs is None:
        hint = "convert to compressed-tensors, gptq or dense, which have inputs in float"
        return Objection("type", "8-bit weights with inputs in float", "quantizes inputs at run time", hint)
    if layer.scheme.weights.strategy == "group":
        return Objection(
            "group-size", f"groups of {layer.group_size} inputs", "has one scale per channel", "convert to compressed-tensors, or dense"
        )
    return None


_HOLDS: dict[str, Any] = {
    "bits": (8,), "strategies": ("channel",), "scale_dtypes": ("F32",), "zero_points": False, "inputs": ("dynamic",),
}  # fmt: skip

SPEC = FormatSpec(
    name=METHOD,
    tool="LMDeploy 0.18.0",
    about="8-bit weights with inputs quantized at run time, for LMDeploy's PyTorch engine",
    variants=(
        Variant("int8", "int8", Capabilities(**_HOLDS), "LMDeploy's PyTorch engine"),
        Variant("fp8", "float8_e4m3fn", Capabilities(**_HOLDS, elements=("e4m3",)), "LMDeploy's PyTorch engine"),
    ),
    detect=detect,
    open=SmoothQuant,
    outputs=outputs,
    quantization_config=quantization_config,
    objection=objection,
    default_variant="int8",
)
