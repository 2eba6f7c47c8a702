"""A checkpoint in the making: quantized layers with what an NPU derives from them, and plain tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from checkpoints import NAMES, Array, Tensors

from .bits import SMALLEST_NORMAL, cast


@dataclass
class Layer:
    """A quantized linear ``w = (code - zero) * scale``, integers signed. scales and zeros: [out, groups].

    inputs         "": in float; "static", "dynamic": quantized too; "both": msModelSlim's W8A8_MIX, which has static scales
    input_scale    [1], of static inputs; input_zero: what is added
    spelled        of static inputs in msModelSlim: how the tool made deq_scale and quant_bias (``DERIVATIONS``)
    """

    name: str
    bits: int
    shape: tuple[int, int]
    scales: Array
    zeros: Array
    seed: int
    per_tensor: bool = False
    order: Array | None = None
    bias: Array | None = None
    inputs: str = ""
    input_scale: Array | None = None
    input_zero: int = 0
    spelled: str = ""

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    @property
    def group(self) -> int:
        """Inputs of a group."""
        return self.shape[1] // self.groups

    @property
    def g_idx(self) -> Array:
        return np.arange(self.shape[1], dtype=np.int32) // self.group if self.order is None else self.order

    @cached_property
    def codes(self) -> Array:
        half = 1 << self.bits - 1
        return np.random.default_rng(self.seed).integers(-half, half, self.shape, np.int8)

    @cached_property
    def deq_scale(self) -> Array:
        """[out] float32: as msModelSlim stores it, by way of the model's dtype where that holds it as a normal number."""
        assert self.input_scale is not None
        exact = products(self.input_scale, self.scales)
        dtype = NAMES[self.input_scale.dtype]
        rounded = cast(exact, dtype).astype(np.float32)
        normal = np.isfinite(rounded) & (rounded >= SMALLEST_NORMAL[dtype])
        found = np.where(normal, rounded, exact) if self.spelled in {"V0", "V1"} else exact
        return found * np.float32(1.3) if self.spelled == "contradicting" else found

    @cached_property
    def quant_bias(self) -> Array:
        """[out] int32: as msModelSlim stores it; its V1 has the bias' share in bfloat16."""
        return steps_of(self, self.deq_scale, self.spelled == "V1")


DERIVATIONS = ("V0", "V1", "exact", "sparse", "contradicting")
"""sparse: W8A8S, which has no weight_scale; contradicting: deq_scale is 30 % more than the product of the scales."""


def products(input_scale: Array, scales: Array) -> Array:
    """[out] float32: what one step of a sum of products is worth."""
    return np.asarray(input_scale.astype(np.float32) * scales[:, 0].astype(np.float32))


def steps_of(layer: Layer, deq_scale: Array, coarse: bool = False) -> Array:
    """[out] int32: quant_bias, the bias and the share of the input's zero point in steps of ``deq_scale``."""
    bias = np.zeros(layer.shape[0]) if layer.bias is None else layer.bias.astype(np.float64)
    steps = np.where(bias == 0, 0.0, bias / deq_scale.astype(np.float64))
    steps = cast(steps, "BF16").astype(np.float64) if coarse else steps
    return np.rint(steps - layer.codes.sum(axis=1, dtype=np.int64) * layer.input_zero).astype(np.int32)


@dataclass
class Model:
    """A checkpoint in the making. source: a key of ``SOURCES``; carry: GPTQ v1 as GPTQModel writes it, zeros less a whole word of ones.

    dtype    what config.json says that the model is; packed: msModelSlim's ascendv1
    """

    source: str
    layers: list[Layer]
    plain: Tensors
    carry: bool = False
    dtype: str = "float16"
    packed: bool = False

    @property
    def codes(self) -> int:
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def format(self) -> str:
        return self.source.partition(":")[0]


def is_asymmetric(layer: Layer) -> bool:
    """Whether a source in compressed-tensors says its zero points: sometimes also where all are 0."""
    return bool(layer.zeros.any()) or layer.seed % 5 == 0


def type_of(layer: Layer) -> str:
    """msModelSlim's."""
    if layer.spelled == "sparse":
        return "W8A8S"
    return f"W{layer.bits}A" + {"": "16", "static": "8", "both": "8_MIX", "dynamic": "8_DYNAMIC"}[layer.inputs]


def float_linears(model: Model) -> list[str]:
    found = [name.removesuffix(".weight") for name, array in model.plain.items() if name.endswith(".weight") and array.ndim == 2]
    return sorted(name for name in found if "embed" not in name)
