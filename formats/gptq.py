"""GPTQ as AutoGPTQ and GPTQModel store it: 2, 3, 4 and 8 bits, packed along inputs, with a group index.

Defined by AutoGPTQ 0.7.1 (``qlinear_cuda*.py``, checkpoint format "gptq": v1) and GPTQModel 7.6 (v1, and "gptq_v2"); read by
transformers (optimum, GPTQModel), vLLM, SGLang, LMDeploy, ExLlama. Facts here were checked on files that both tools wrote.

========  =======  ============  ===================================================================================
qweight   int32    [K*b/32, N]   bit stream along K: input ``j`` is at bits ``[j*b, (j+1)*b)`` (3-bit codes straddle words)
qzeros    int32    [G, N*b/32]   the same along N; v1 stores ``z - 1``, v2 stores ``z``
scales    float16  [G, N]        AutoGPTQ writes the model's dtype, so bfloat16 and float32 occur
g_idx     int32    [K]           group of each input; ``k // g`` without act order
bias      float16  [N]           AutoGPTQ writes zeros even where the model has no bias
========  =======  ============  ===================================================================================

Law: ``w[n, k] = scales[g, n] * (q[k, n] - z[g, n])`` with ``g = g_idx[k]``; q and z unsigned here. group_size -1: one group.

Quirks:

1. v1 cannot say a zero point of 0: ``z - 1 = -1`` wraps to the top lane, which readers decode in three different ways, and
   AutoGPTQ's own packer smears it over the higher lanes of the word. A writer must use v2 for it. This reader decodes the top
   lane of v1 as AutoGPTQ's older kernel does, ``(lane + 1) mod 2**b``.
2. AutoGPTQ reads quantize_config.json only, transformers and vLLM config.json: both are written, with the same content.
   ``desc_act`` missing means True to AutoGPTQ; vLLM refuses a config without ``desc_act`` or ``sym``.
3. transformers leaves ``g_idx`` and ``qzeros`` uninitialised if they are missing: always write both.
4. transformers and vLLM look for model.safetensors (or its index), AutoGPTQ accepts that name: never ``gptq_model-*``.
5. The key ``is_marlin_format`` makes GPTQModel refuse a folder: not written.
6. Layers left in float: GPTQModel and vLLM read ``dynamic`` ("-:" patterns), transformers and vLLM
   ``modules_in_block_to_quantize``, which holds only if every block is alike.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .checkpoint import Checkpoint, Location, Unsupported, modules_in_every_block
from .errors import UnreadableError
from .ir import Array, QuantArgs, QuantizedLinear, QuantScheme
from .layouts import PackedMatrix, PackLayout
from .spec import Capabilities, FormatSpec, LayerTarget, ModelFacts, TensorSpec, Variant

CONFIG = "quantize_config.json"
PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
BITS = (2, 3, 4, 8)


@functools.cache
def codes_layout(bits: int) -> PackLayout:
    """qweight: unsigned codes, a bit stream along inputs, stored [in, out]."""
    return PackLayout(bits, "<i4", "in", transposed=True, offset=1 << (bits - 1), low=-(1 << (bits - 1)))


@functools.cache
def zeros_layout(bits: int, variant: str) -> PackLayout:
    """qzeros of v1 (one less than the zero point) or v2, stored [groups, out]."""
    return PackLayout(bits, "<i4", "out", transposed=True, offset=(1 << (bits - 1)) - (variant == "v1"), low=-(1 << (bits - 1)))


def detect(location: Location) -> str | None:
    """The variant that the folder says it is, or None."""
    config = quantization_of(location)
    if config is None or str(config.get("quant_method", "gptq")).lower() not in {"gptq", "marlin"}:
        return None
    return "v2" if _checkpoint_format(config) == "gptq_v2" else "v1"


def quantization_of(location: Location) -> dict[str, Any] | None:
    """The GPTQ quantization config: config.json's, else quantize_config.json's."""
    config = location.json("config.json")
    found = None if config is None else config.get("quantization_config")
    if found is None:
        found = location.json(CONFIG)
    if found is not None and not isinstance(found, dict):
        raise UnreadableError(f"config.json: quantization_config is a {type(found).__name__}, wanted an object")
    return found


def _checkpoint_format(config: Mapping[str, Any]) -> str:
    marlin = config.get("is_marlin_format") or str(config.get("quant_method", "")).lower() == "marlin"
    return "marlin" if marlin else str(config.get("checkpoint_format", "gptq")).lower()


class Gptq(Checkpoint):
    """Reader of v1 and v2 folders. Bits and group size come from shapes; the config must not contradict them."""

    def __init__(self, location: Location, variant: str) -> None:
        config = quantization_of(location) or {}
        super().__init__(location, "gptq", variant, location.tensors("gptq_model" if "model.safetensors" not in location.names else ""))
        kind = _checkpoint_format(config)
        self._act_order = bool(config.get("desc_act", False))
        self._dynamic = bool(config.get("dynamic"))
        self._bits, self._group = config.get("bits"), config.get("group_size")
        for tensor in self.tensors:
            module, _, leaf = tensor.rpartition(".")
            is_layer = leaf in PARTS and f"{module}.qweight" in self.tensors
            if is_layer and leaf == "qweight":
                if kind not in {"gptq", "gptq_v2"}:
                    self.unsupported.append(Unsupported(module, f"GPTQ {kind}", f"checkpoint format {kind!r} is not read yet"))
                else:
                    self.entries.append(("layer", module))
            elif leaf in {"qzeros", "g_idx"} and not is_layer:
                raise UnreadableError(f"{module}: has {leaf}, but no qweight; the checkpoint is incomplete")
            elif not is_layer:
                self.entries.append(("plain", tensor))
        if kind == "marlin" and not self.unsupported:
            self.unsupported.append(Unsupported("every layer", "GPTQ marlin", "checkpoint format 'marlin' is not read yet"))

    def layer_tensors(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{part}" for part in PARTS if f"{name}.{part}" in self.tensors)

    def layer(self, name: str) -> QuantizedLinear:
        for part in ("qweight", "qzeros", "scales"):
            info = self.tensors.get(f"{name}.{part}")
            if info is None or len(info.shape) != 2 or (info.dtype != "I32" and part != "scales"):
                found = "is missing" if info is None else f"is {info.dtype} {list(info.shape)}"
                raise UnreadableError(f"{name}: {part} {found}; GPTQ has qweight and qzeros int32 and scales, all 2-D")
        scales = self.tensors.array(f"{name}.scales").T
        out, groups = scales.shape
        bits, in_ = self._sizes(name, out, groups)
        codes = PackedMatrix(codes_layout(bits), self.tensors.array(f"{name}.qweight"))
        zeros = PackedMatrix(zeros_layout(bits, self.variant), self.tensors.array(f"{name}.qzeros"), "<i2")
        if codes.shape != (out, in_) or zeros.shape != (out, groups):
            raise UnreadableError(
                f"{name}: codes are [out, in] = {list(codes.shape)}, zero points [out, groups] = {list(zeros.shape)}, "
                f"scales {[out, groups]}, g_idx [{in_}]; they contradict one another"
            )
        group_size = in_ // groups
        g_idx = self._g_idx(name, in_, groups, group_size)
        order = None if g_idx is None else "group"
        if order is None and self._act_order and groups > 1:
            order = "static"
        weights = QuantArgs(bits, "int", False, "group" if groups > 1 else "channel", group_size if groups > 1 else None, None, order)  # type: ignore[arg-type]
        bias = self.tensors.array(f"{name}.bias") if f"{name}.bias" in self.tensors else None
        layer = QuantizedLinear(name, (out, in_), QuantScheme(weights), codes, scales, zeros, g_idx=g_idx, bias=bias)
        layer.check()
        return layer

    def _sizes(self, name: str, out: int, groups: int) -> tuple[int, int]:
        """(bits, in): from g_idx where there is one, else from qzeros' width; checked against the config."""
        rows = self.tensors[f"{name}.qweight"].shape[0]
        g_idx = self.tensors.get(f"{name}.g_idx")
        width = self.tensors[f"{name}.qzeros"].shape[1]
        bits = 32 * width // out if out else 0
        if bits not in BITS or 32 * rows % bits:
            raise UnreadableError(f"{name}: qzeros of {width} words for {out} outputs mean {bits} bits; GPTQ has 2, 3, 4 and 8")
        in_ = 32 * rows // bits
        if g_idx is not None and (g_idx.dtype != "I32" or g_idx.shape != (in_,)):
            raise UnreadableError(f"{name}: g_idx is {g_idx.dtype} {list(g_idx.shape)}, wanted int32 [{in_}]")
        if not groups or in_ % groups:
            raise UnreadableError(f"{name}: {groups} groups do not divide {in_} inputs")
        wanted = in_ if self._group == -1 else self._group
        if not self._dynamic and (self._bits not in {None, bits} or wanted not in {None, in_ // groups}):
            raise UnreadableError(
                f"{name}: shapes say {bits} bits and group_size {in_ // groups}, the config says {self._bits} and {self._group}; "
                "correct the config"
            )
        return bits, in_

    def _g_idx(self, name: str, in_: int, groups: int, group_size: int) -> Array | None:
        """The group index if it is irregular, else None."""
        if f"{name}.g_idx" not in self.tensors:
            return None
        g_idx = self.tensors.array(f"{name}.g_idx")
        if g_idx.size and not (int(g_idx.min()) >= 0 and int(g_idx.max()) < groups):
            raise UnreadableError(f"{name}: g_idx names groups {int(g_idx.min())} to {int(g_idx.max())}, but there are {groups}")
        return None if np.array_equal(g_idx, np.arange(in_) // group_size) else g_idx


def outputs(layer: LayerTarget, variant: str) -> tuple[TensorSpec, ...]:
    """The tensors that spell ``layer``: qweight, qzeros, scales, g_idx, and bias where there is one."""
    name, (out, in_), groups, bits = layer.name, layer.shape, layer.groups, layer.scheme.weights.bits
    codes, zeros = codes_layout(bits), zeros_layout(bits, variant)
    specs = (
        TensorSpec(f"{name}.qweight", "I32", codes.stored_shape(layer.shape), "codes", codes),
        TensorSpec(f"{name}.qzeros", "I32", zeros.stored_shape((out, groups)), "zero_points", zeros),
        TensorSpec(f"{name}.scales", layer.scale_dtype, (groups, out), "scales", transposed=True),
        TensorSpec(f"{name}.g_idx", "I32", (in_,), "g_idx"),
    )
    return specs if layer.bias_dtype is None else (*specs, TensorSpec(f"{name}.bias", layer.bias_dtype, (out,), "bias"))


def quantization_config(model: ModelFacts, variant: str) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """({file: object}, config.json's quantization_config): every key that AutoGPTQ, GPTQModel, transformers and vLLM demand."""
    schemes = [layer.scheme.weights for layer in model.layers]
    bits = min(scheme.bits for scheme in schemes)
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": model.layers[0].group_size,
        "desc_act": any(scheme.actorder for scheme in schemes),
        "sym": all(scheme.symmetric for scheme in schemes),
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "lm_head": any(layer.name.split(".")[-1] == "lm_head" for layer in model.layers),
        "checkpoint_format": "gptq" if variant == "v1" else "gptq_v2",
        "model_name_or_path": None,
        "model_file_base_name": None,
    }
    dynamic: dict[str, dict[str, int]] = {f"-:{_exactly(name)}": {} for name in model.float_linears}
    for layer in model.layers:
        own = {"bits": layer.scheme.weights.bits, "group_size": layer.group_size}
        if odd := {key: value for key, value in own.items() if value != config[key]}:
            dynamic[f"+:{_exactly(layer.name)}"] = odd
    if dynamic:
        config["dynamic"] = dynamic
    if model.float_linears and (alike := modules_in_every_block([layer.name for layer in model.layers], model.float_linears)):
        config["modules_in_block_to_quantize"] = [[name] for name in alike]
    return {CONFIG: config}, config


def _exactly(name: str) -> str:
    return rf"^{re.escape(name)}$"


_HOLDS = {
    "bits": BITS,
    "strategies": ("channel", "group"),
    "group_sizes": (128, 64, 32),
    "act_order": ("group", "static"),
    "scale_dtypes": ("F16", "BF16", "F32"),
    "multiple_of": (32, 32),
    "lm_head": True,
}

SPEC = FormatSpec(
    name="gptq",
    tool="AutoGPTQ 0.7.1, GPTQModel 7.6",
    about="2 to 8-bit weights for GPUs; read by AutoGPTQ, GPTQModel, transformers, vLLM, SGLang",
    variants=(
        Variant("v1", "zero points stored minus one: 0 cannot be said", Capabilities(**_HOLDS, smallest_zero=1), readers="all"),  # type: ignore[arg-type]
        Variant("v2", "zero points stored as they are", Capabilities(**_HOLDS), readers="GPTQModel, transformers"),  # type: ignore[arg-type]
    ),
    detect=detect,
    open=Gptq,
    outputs=outputs,
    quantization_config=quantization_config,
    default_variant="v1",
)
