"""What each target holds, and what a conversion must come to: the spelling of every layer, or the codes of its refusal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from checkpoints import DTYPES, NAMES, Array

from .bits import SMALLEST_NORMAL, cast
from .drawing import SOURCES
from .models import Layer, Model


class Holds(NamedTuple):
    """What a target holds. smallest: zero point, unsigned.

    scales    their dtype; None: the source's; "model": that, but the model's instead of float32; "half": the same, but not in 8-bit
              layers whose inputs are quantized
    inputs    whether they may be quantized; own: layers keep their own groups
    """

    bits: tuple[int, ...]
    groups: tuple[int, ...]
    unit: tuple[int, int]
    scales: str | None = "F16"
    channel: bool = False
    act_order: bool = False
    smallest: int = 0
    zeros: bool = True
    lm_head: bool = True
    inputs: bool = False
    own: bool = False


GROUPS = (128, 64, 32)
TARGETS = {
    "awq:gemm": Holds((4,), GROUPS, (32, 32), lm_head=False),
    "awq:gemv": Holds((4,), GROUPS, (8, 32), lm_head=False),
    "awq:gemv_fast": Holds((4,), GROUPS, (8, 64), lm_head=False),
    "awq:marlin": Holds((4,), (128,), (64, 128), zeros=False, lm_head=False),
    "gptq:v1": Holds((2, 3, 4, 8), GROUPS, (32, 32), channel=True, act_order=True, smallest=1),
    "gptq:v2": Holds((2, 3, 4, 8), GROUPS, (32, 32), channel=True, act_order=True),
    "msmodelslim:safe_tensor": Holds((4, 8), (256, *GROUPS), (1, 1), None, channel=True, inputs=True),
    "msmodelslim:ascendv1": Holds((4, 8), (256, *GROUPS), (2, 2), None, channel=True, inputs=True),
    "msmodelslim:vllm-ascend": Holds((8,), (), (1, 1), "model", channel=True, zeros=False, inputs=True),
    "msmodelslim:mindie": Holds((4, 8), (256, 128, 64), (1, 1), None, channel=True, inputs=True),
    "compressed-tensors": Holds((4, 8), (), (8, 8), "half", channel=True, act_order=True, inputs=True, own=True),
    "dense:hf": Holds((2, 3, 4, 8), (), (1, 1), "dense", channel=True, act_order=True),
}
PAIRS = [(source, target) for source in SOURCES for target in (*TARGETS, "gptq")]
PAIR_STEP = 12
"""From a seed's pair to that of the next: thirteen in a row have every source and every target, 143 every pair."""
TORCH = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def fused(name: str) -> str:
    """What engines call the matrix that a linear becomes a part of."""
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.{'qkv' if leaf in {'q_proj', 'k_proj', 'v_proj'} else 'gate_up' if leaf in {'gate_proj', 'up_proj'} else leaf}"


@dataclass(frozen=True)
class Task:
    """A conversion as it is understood here: what the target must hold, or why it cannot."""

    model: Model
    target: str
    scale_dtype: str | None = None
    serve_dtype: str | None = None
    allow: tuple[str, ...] = ()

    @property
    def holds(self) -> Holds:
        return TARGETS[self.variant]

    @cached_property
    def variant(self) -> str:
        """The target; for plain "gptq" the version that can say every zero point."""
        if self.target != "gptq":
            return self.target
        return "gptq:v2" if any(self._lowest(layer) < 1 for layer in self.model.layers) else "gptq:v1"

    @property
    def dense(self) -> bool:
        return self.variant == "dense:hf"

    def bits(self, layer: Layer) -> int:
        """Of the codes as stored there; 0 if nothing there holds them."""
        return min((bits for bits in TARGETS[self.target if self.target != "gptq" else "gptq:v2"].bits if bits >= layer.bits), default=0)

    def _lowest(self, layer: Layer) -> int:
        return int(layer.zeros.min()) + (1 << max(self.bits(layer), layer.bits) - 1)

    def inputs(self, layer: Layer) -> str:
        """How its inputs are quantized there: compressed-tensors has no word for both ways."""
        if not self.holds.inputs:
            return ""
        return "static" if layer.inputs == "both" and self.variant == "compressed-tensors" else layer.inputs

    def sparse(self, layer: Layer) -> bool:
        """Whether the target has W8A8S for it: then deq_scale and input_scale, which say its scale, stay what they are."""
        return layer.spelled == "sparse" and self.variant.startswith("msmodelslim") and self.variant != "msmodelslim:vllm-ascend"

    def keeps_tensor(self, layer: Layer) -> bool:
        """Whether one scale of the whole tensor stays one."""
        if self.variant in {"msmodelslim:safe_tensor", "msmodelslim:ascendv1"}:
            return layer.per_tensor and (self.model.format == "msmodelslim" or bool(self.inputs(layer)))
        return layer.per_tensor and bool(layer.inputs) and self.variant == "compressed-tensors"

    def group_of(self, layer: Layer) -> int | None:
        """Inputs of a group of ``layer`` there; 0: one group, None: there is no size that suits."""
        if self.holds.own or self.inputs(layer):
            return 0 if layer.groups == 1 else layer.group
        return self.group

    def says_zeros(self, layer: Layer) -> bool:
        """compressed-tensors: whether zero points are stored: where there are any, in what engines fuse with it too."""
        return any(other.zeros.any() for other in self.model.layers if fused(other.name) == fused(layer.name))

    @cached_property
    def group(self) -> int | None:
        """Inputs of a group for all layers whose inputs are in float; 0: one group each, None: there is no size that suits."""
        layers = [layer for layer in self.model.layers if not self.inputs(layer)]
        if self.holds.channel and all(layer.groups == 1 for layer in layers):
            return 0
        return next((size for size in self.holds.groups if all(layer.group % size == 0 for layer in layers)), None)

    def scales_in(self, layer: Layer) -> str:
        """The dtype of a layer's scales there; of its weights, where they are dequantized."""
        stored = NAMES[layer.scales.dtype]
        if self.sparse(layer):
            return stored
        if self.serve_dtype and self.group_of(layer) == 0:
            return TORCH[self.serve_dtype]
        if self.dense and self.scale_dtype is None:
            counts = Counter(NAMES[array.dtype] for array in self.model.plain.values() if array.ndim == 2)
            return next((dtype for dtype, _ in counts.most_common() if dtype in SMALLEST_NORMAL), "F16")
        if self.dense and self.scale_dtype == "keep":
            return "F32"
        return self._stored_in(stored, bool(layer.inputs) and self.bits(layer) == 8)

    def _stored_in(self, stored: str, with_inputs: bool) -> str:
        if self.scale_dtype is not None:
            return TORCH.get(self.scale_dtype, stored)
        if self.holds.scales in {"half", "model"}:
            kept = stored != "F32" or (with_inputs and self.holds.scales == "half")
            return stored if kept else {"float16": "F16", "bfloat16": "BF16"}[self.model.dtype]
        return self.holds.scales or stored

    def input_scale_in(self, layer: Layer) -> str:
        assert layer.input_scale is not None
        if self.sparse(layer):
            return NAMES[layer.input_scale.dtype]
        return TORCH[self.serve_dtype] if self.serve_dtype else self._stored_in(NAMES[layer.input_scale.dtype], True)

    def deq_scale_in(self, layer: Layer) -> str:
        """int64 where the model is in float16 (or nobody knows), unless the source says otherwise and nothing was asked for."""
        if self.model.format == "msmodelslim" and not self.serve_dtype:
            return "F32" if layer.input_scale is not None and layer.input_scale.dtype == DTYPES["BF16"] else "I64"
        return "F32" if (self.serve_dtype or self.model.dtype) == "bfloat16" else "I64"

    def derives_anew(self, layer: Layer) -> bool:
        """Whether deq_scale and quant_bias follow from what is stored there, and are not the source's own."""
        assert layer.input_scale is not None
        kept = self.scales_in(layer) == NAMES[layer.scales.dtype] and self.input_scale_in(layer) == NAMES[layer.input_scale.dtype]
        return not kept or self.model.format != "msmodelslim"

    def bias_in(self, layer: Layer) -> str:
        assert layer.bias is not None
        stored = NAMES[layer.bias.dtype]
        if self.dense or self.scale_dtype == "float32":
            return stored
        return self._stored_in(stored, bool(layer.inputs))

    def bias(self, layer: Layer) -> Array | None:
        """As it must be stored there. Zeros in a GPTQ folder of a model without biases are AutoGPTQ's own."""
        made_up = self.model.format == "gptq" and layer.name != "lm_head"
        if layer.bias is None or (made_up and not layer.bias.astype(np.float32).any()):
            return None
        return cast(layer.bias, self.bias_in(layer))

    def refusals(self) -> set[str]:
        """The codes of everything that the target cannot hold."""
        found = {code for layer in self.model.layers for code in self._refusals(layer)}
        if self.holds.own and self.model.format != "compressed-tensors":  # layers that engines fuse must have groups alike
            sizes = {(fused(layer.name), self.group_of(layer)) for layer in self.model.layers}
            found |= {"fused"} if len({name for name, _ in sizes}) < len(sizes) else set()
        return found

    def _refusals(self, layer: Layer) -> Iterator[str]:
        holds, scales = self.holds, layer.scales.astype(np.float32)
        if layer.inputs and not holds.inputs and "activations-dropped" not in self.allow:
            yield "activations-dropped"
        if layer.spelled == "contradicting" and not self.variant.startswith("msmodelslim") and "deq-scale-differs" not in self.allow:
            yield "deq-scale-differs"
        if self.dense:
            with np.errstate(over="ignore"):
                reach = np.maximum(np.abs(layer.zeros + (1 << layer.bits - 1)), np.abs((1 << layer.bits - 1) - 1 - layer.zeros))
                if np.isinf(cast((reach * scales).max(), self.scales_in(layer)).astype(np.float32)):
                    yield "overflow?"  # if a code reaches it
            return
        bits = self.bits(layer)
        if not bits:
            yield "bits"
        if layer.shape[0] % holds.unit[0] or layer.shape[1] % holds.unit[1]:
            yield "shape-multiple"
        if layer.name == "lm_head" and not holds.lm_head:
            yield "lm-head"
        if layer.order is not None and not holds.act_order:
            yield "act-order"
        group = self.group_of(layer)
        if group is None or (layer.order is not None and group not in {0, layer.group}):
            yield "group-size"
        if self.inputs(layer) and self.variant.startswith("msmodelslim"):
            if layer.groups > 1:
                yield "group-size"
            if layer.zeros.any():
                yield "zero-point"
        half = 1 << max(bits, layer.bits) - 1
        if not holds.zeros and layer.zeros.any():
            yield "zero-point"
        if layer.zeros.min() + half < holds.smallest or layer.zeros.max() + half >= 2 * half:
            yield "zero-point"
        dtype = self.scales_in(layer)
        if self.target in {"awq:gemv", "awq:gemv_fast", "awq:marlin"} and dtype != "F16":  # what their kernels read
            yield "scale-dtype"
        if self.target == "msmodelslim:vllm-ascend" and dtype == "F32":
            yield "scale-dtype"
        stored = cast(scales, dtype).astype(np.float32)
        if np.isinf(stored).any():
            yield "scale-overflow"
        elif "scale-subnormal" not in self.allow and ((stored != scales) & (np.abs(stored) < SMALLEST_NORMAL[dtype])).any():
            yield "scale-subnormal"
        if self.variant == "awq:gemv_fast":
            with np.errstate(over="ignore"):
                if np.isinf(cast(stored * (layer.zeros + half), dtype).astype(np.float32)).any():
                    yield "overflow?"
