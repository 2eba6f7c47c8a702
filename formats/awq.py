"""AWQ in AutoAWQ's GEMM layout: 4-bit weights for GPUs, groups of inputs, explicit zero points.

Defined by AutoAWQ 0.2.9 (``awq/modules/linear/gemm.py``, ``awq/utils/packing_utils.py``); read by transformers, vLLM, SGLang,
LMDeploy, GPTQModel. Facts here were checked on a checkpoint that AutoAWQ wrote.

========  ======  ==========  ====================================================================================
qweight   int32   [K, N/8]    lane i (bits 4i..4i+3) of word c holds column ``8c + ORDER[i]``; unsigned code 0..15
qzeros    int32   [G, N/8]    the same packing; the zero point as it is, no minus one
scales    float16 [G, N]      AutoAWQ writes float16; float32 and bfloat16 occur (LMDeploy, other exporters)
bias      float16 [N]         only where the layer has one
========  ======  ==========  ====================================================================================

Law: ``w[n, k] = (q[k, n] - z[k // g, n]) * scales[k // g, n]``; G = K / g.

Quirks:

1. ORDER and its inverse (0, 4, 1, 5, 2, 6, 3, 7) are different permutations: mixed up, shapes fit and weights are wrong.
2. Zero points are always stored; a symmetric layer has zeros of 8. ``zero_point: true`` is the only value that readers of the
   GEMM layout honour (AutoAWQ cannot even write ``false``).
3. AutoAWQ asserts N % 8 == 0 and K % g == 0; kernels want multiples of 32 in both.
4. Engines match ``modules_to_not_convert`` in three ways (substring, prefix, suffix): full dotted names satisfy all of them.
5. config.json holds the only ``quantization_config`` that AutoAWQ reads. Old releases wrote ``quant_config.json`` with
   ``w_bit`` and ``q_group_size``; vLLM and SGLang still take it.
6. A missing ``quant_method`` key makes transformers and vLLM refuse the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .checkpoint import Checkpoint, Location, Unsupported
from .errors import UnreadableError
from .ir import QuantArgs, QuantizedLinear, QuantScheme
from .layouts import PackedMatrix, PackLayout
from .spec import Capabilities, FormatSpec, LayerTarget, ModelFacts, TensorSpec, Variant

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GEMM = PackLayout(bits=4, word="<i4", axis="out", transposed=True, order=ORDER, offset=8, low=-8)
"""qweight, and with [out, groups] for [out, in] also qzeros."""

OLD_CONFIG = "quant_config.json"
OTHER_VERSIONS = frozenset({"gemv", "gemv_fast", "marlin", "llm-awq", "exllama", "ipex"})
PARTS = ("qweight", "qzeros", "scales", "bias")


def detect(location: Location) -> str | None:
    """The variant that the folder says it is, or None."""
    config = quantization_of(location)
    return "gemm" if config is not None and str(config.get("quant_method", "")).lower() == "awq" else None


def quantization_of(location: Location) -> dict[str, Any] | None:
    """The AWQ quantization config: config.json's, or the old quant_config.json."""
    config = location.json("config.json")
    found = None if config is None else config.get("quantization_config")
    if found is None and OLD_CONFIG in location.names:
        found = {"quant_method": "awq", **(location.json(OLD_CONFIG) or {})}
    if found is not None and not isinstance(found, dict):
        raise UnreadableError(f"config.json: quantization_config is a {type(found).__name__}, wanted an object")
    return found


class Awq(Checkpoint):
    """Reader of GEMM folders. Bits and group size come from shapes and must agree with the config."""

    def __init__(self, location: Location, variant: str) -> None:
        config = quantization_of(location) or {}
        version = str(config.get("version", "gemm")).lower()
        super().__init__(location, "awq", variant, location.tensors())
        self._group = config.get("group_size", config.get("q_group_size"))
        bits = config.get("bits", config.get("w_bit", 4))
        if bits != 4:
            raise UnreadableError(f"config.json: AWQ with bits {bits!r}; every AWQ layout holds 4 bits")
        for tensor in self.tensors:
            module, _, leaf = tensor.rpartition(".")
            is_layer = leaf in PARTS and f"{module}.qweight" in self.tensors
            if is_layer and leaf == "qweight":
                if version != "gemm":
                    self.unsupported.append(Unsupported(module, f"AWQ {version}", f"version {version!r} is not read yet"))
                else:
                    self.entries.append(("layer", module))
            elif leaf in {"qzeros", "g_idx"} and not is_layer:
                raise UnreadableError(f"{module}: has {leaf}, but no qweight; the checkpoint is incomplete")
            elif not is_layer:
                self.entries.append(("plain", tensor))

    def layer_tensors(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{part}" for part in PARTS if f"{name}.{part}" in self.tensors)

    def layer(self, name: str) -> QuantizedLinear:
        for part in ("qweight", "qzeros", "scales"):
            info = self.tensors.get(f"{name}.{part}")
            if info is None or len(info.shape) != 2 or (info.dtype != "I32" and part != "scales"):
                found = "is missing" if info is None else f"is {info.dtype} {list(info.shape)}"
                raise UnreadableError(f"{name}: {part} {found}; AWQ's GEMM layout has qweight and qzeros int32 and scales, all 2-D")
        codes = PackedMatrix(GEMM, self.tensors.array(f"{name}.qweight"))
        zeros = PackedMatrix(GEMM, self.tensors.array(f"{name}.qzeros"), "<i2")
        scales = self.tensors.array(f"{name}.scales").T
        out, in_ = codes.shape
        groups = scales.shape[1]
        if scales.shape != zeros.shape or scales.shape[0] != out or not (groups and in_) or in_ % groups:
            raise UnreadableError(
                f"{name}: codes are [out, in] = {[out, in_]}, scales [groups, out] = {list(scales.T.shape)}, "
                f"zero points {list(zeros.shape)[::-1]}; they contradict one another"
            )
        group_size = in_ // groups
        wanted = in_ if self._group == -1 else self._group
        if wanted is not None and wanted != group_size:
            raise UnreadableError(f"{name}: shapes say group_size {group_size}, the config says {self._group}; correct the config")
        weights = QuantArgs(4, "int", False, "group" if groups > 1 else "channel", group_size if groups > 1 else None)
        bias = self.tensors.array(f"{name}.bias") if f"{name}.bias" in self.tensors else None
        layer = QuantizedLinear(name, (out, in_), QuantScheme(weights), codes, scales, zeros, bias=bias)
        layer.check()
        return layer


def outputs(layer: LayerTarget, variant: str) -> tuple[TensorSpec, ...]:
    """The tensors that spell ``layer``: qweight, qzeros, scales, and bias where there is one."""
    name, (out, _), groups = layer.name, layer.shape, layer.groups
    specs = (
        TensorSpec(f"{name}.qweight", "I32", GEMM.stored_shape(layer.shape), "codes", GEMM),
        TensorSpec(f"{name}.qzeros", "I32", GEMM.stored_shape((out, groups)), "zero_points", GEMM),
        TensorSpec(f"{name}.scales", layer.scale_dtype, (groups, out), "scales", transposed=True),
    )
    return specs if layer.bias_dtype is None else (*specs, TensorSpec(f"{name}.bias", layer.bias_dtype, (out,), "bias"))


def quantization_config(model: ModelFacts, variant: str) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """({file: object}, config.json's quantization_config): all six keys that readers look for."""
    sizes = {layer.group_size for layer in model.layers}
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": sizes.pop() if len(sizes) == 1 else None,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": list(model.float_linears) or None,
    }
    old = {
        "w_bit": 4,
        "q_group_size": config["group_size"],
        **{key: config[key] for key in ("version", "zero_point", "modules_to_not_convert")},
    }
    return {OLD_CONFIG: old}, config


SPEC = FormatSpec(
    name="awq",
    tool="AutoAWQ 0.2.9",
    about="4-bit weights for GPUs; read by AutoAWQ, transformers, vLLM, SGLang, LMDeploy",
    variants=(
        Variant(
            "gemm",
            "qweight packed along output channels",
            Capabilities(
                bits=(4,),
                strategies=("group",),
                group_sizes=(128, 64, 32),
                scale_dtypes=("F16", "BF16", "F32"),
                multiple_of=(32, 32),
            ),
            readers="AutoAWQ, transformers, vLLM, SGLang, LMDeploy (group 128), GPTQModel",
        ),
    ),
    detect=detect,
    open=Awq,
    outputs=outputs,
    quantization_config=quantization_config,
    default_variant="gemm",
)
