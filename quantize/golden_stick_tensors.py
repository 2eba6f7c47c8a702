"""A quantized linear as Golden Stick stores it: its tensors by name, in the dtypes that ``formats.mindspore``'s docstring lists."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from formats.mindspore_target import DYNAMIC, OLD_PTQ, OLD_STATIC, PTQ, RTN, SMOOTH_QUANT, STATIC, Spelling

from . import golden_stick as arithmetic
from .golden_stick_layer import MadeLinear

__all__ = ["cache_of", "laid_out"]

CACHE = "model.layers.{}.attention.infer_attention.paged_attention_mgr."
"""Where MindFormers has a layer's KV cache."""


def spelling_of(made: MadeLinear, approach: str, version: str) -> Spelling:
    """How ``version`` spells a linear that ``approach`` made. What 0.6 has no words for is 1.2's."""
    if made.policy.is_static:
        return SMOOTH_QUANT if approach == "smooth_quant" else OLD_STATIC if version == "gs0.6" else STATIC
    if made.policy.is_dynamic:
        return DYNAMIC
    old = version == "gs0.6" and made.smooth is None and made.policy.w_bit == 8
    return PTQ if not old else RTN if approach == "rtn" else OLD_PTQ


def laid_out(name: str, made: MadeLinear, approach: str, version: str) -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors of the linear ``name``; which of them hold two 4-bit codes a byte)."""
    spelling, policy, rounded = spelling_of(made, approach, version), made.policy, made.rounded
    tensors = {spelling.weight: packed(rounded.codes) if policy.w_bit == 4 else rounded.codes}
    if policy.is_static:
        tensors |= _static(made, spelling)
    else:
        wide = torch.float32 if policy.is_dynamic and made.dtype != torch.bfloat16 else made.dtype
        scale, zero = arithmetic.held(rounded.scale, wide), -rounded.zero.to(wide)
        tensors[spelling.scale] = scale[:, 0] if policy.group_size == -1 else scale.T
        if spelling.zero:
            tensors[spelling.zero] = zero[:, 0] if policy.group_size == -1 else zero.T
        if made.smooth is not None:
            tensors[spelling.smooth] = arithmetic.stored_smoothing(made.smooth)
        if made.bias is not None:
            tensors[spelling.bias] = made.bias
    int4 = [f"{name}.{spelling.weight}"] if policy.w_bit == 4 else []
    return {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in tensors.items()}, int4


def _static(made: MadeLinear, spelling: Spelling) -> dict[str, Tensor]:
    """What a linear with static inputs has beside its codes."""
    codes, weights, scale, zero = made.rounded.codes, made.rounded.scale, made.input_scale, made.input_zero
    assert scale is not None
    assert zero is not None
    product = arithmetic.dequant_scale(scale, weights)
    half = made.dtype == torch.bfloat16 and spelling is STATIC
    tensors = {spelling.dequant: product if half else arithmetic.float_bits(product)}
    if spelling is STATIC:
        found = arithmetic.static_inputs(scale, zero, made.smooth, made.dtype)
        tensors[spelling.correction] = arithmetic.quant_bias(codes, scale, zero, weights, made.dtype)
        if made.bias is not None:
            tensors[spelling.bias] = made.bias
    else:
        smooth = torch.ones(codes.shape[1]) if made.smooth is None else made.smooth
        found = arithmetic.smooth_quant_inputs(scale, zero, smooth)
        merged = arithmetic.merged_bias(codes, scale, zero, weights, made.dtype)
        tensors[spelling.merged] = merged if made.bias is None else (merged + made.bias).to(made.dtype)
    tensors[spelling.input_scale], tensors[spelling.input_zero] = found
    return tensors


def packed(codes: Tensor) -> Tensor:
    """int8 [in, out / 2] of 4-bit ``codes`` [out, in]: the even output in the low nibble."""
    nibbles = codes.T.contiguous() & 0x0F
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def cache_of(index: int, extremes: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype, version: str) -> dict[str, Tensor]:
    """The tensors of the KV cache of decoder layer ``index``; extremes: the lowest and highest "key" and "value" of each channel."""
    found = arithmetic.cache_tensors(extremes["key"], extremes["value"], dtype, version)
    return {CACHE.format(index) + name: tensor.contiguous() for name, tensor in found.items()}
