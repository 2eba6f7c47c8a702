"""How Golden Stick rounds: weights, inputs, the KV cache, and the smoothing before it. Pure functions on tensors, for any device.

Defined by MindSpore Golden Stick 0.6.0 (``gs0.6``) and 1.2.0 (``gs1.2``), whose files the tests hold these functions against bit for bit.

Of values between ``low`` and ``high``, in b bits (codes -2^(b-1) to 2^(b-1) - 1), in float64, but SmoothQuant in float32:

symmetric    scale = 2 * max(|low|, |high|) / (2^b - 1): absmax / 127.5, not / 127, so the largest magnitude is cut; zero = 0
asymmetric   scale = (high - low) / (2^b - 1), zero = round(-2^(b-1) - low / scale); the range need not hold 0

codes = clip(round(w / scale + zero)), half to even, where scale and zero were cast to the weight's dtype first and every step is in
that dtype. The law is ``w ~ (code - zero) * scale``. Beyond that:

A float64 becomes a half precision number by way of float32 (as it does in PyTorch), so a symmetric scale is the same in either.

1. Scales are stored in the weight's dtype; those of layers whose inputs are measured at run time in float32 (bfloat16 in networks of
   that), of the float64 scale; those of layers with static inputs not at all, but the product, in float32, with the inputs' scale.
2. Inputs are asymmetric and per tensor. input_scale is float16 even in networks of bfloat16; smoothed, 1.2.0 divides it in float16 by
   the stored 1 / s, 0.6.0 multiplies it by s in float64.
3. Smoothing: ``s = a^alpha / w^(1 - alpha)``, at least 1e-5, and 1 where either is 0; ``a`` and ``w`` [in] are the largest magnitudes
   of the inputs and of the weight's columns. It is each linear's own: its weight is multiplied by s, its inputs by 1 / s at run time,
   and no norm changes. SmoothQuant computes in float32, PTQ in the weight's dtype.
4. Keys (after the rotary embedding) and values are symmetric, one scale for each of kv heads * head size channels.

PTQ is 1.2.0's: 0.6.0's, of which the weights are the same, multiplies the scales of static inputs in float16.

Where the tool divides 0 by 0, for a row or group of zeros, codes and zero are 0 and the scale is 1 here; a scale that a dtype cannot
hold is its smallest number. (The tool also takes scales of 1 where all rows are constant, whatever they hold: a quirk that is not kept.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "RoundedWeight", "cache_tensors", "codes_of", "dequant_scale", "fake", "float_bits", "held", "merged_bias", "parameters", "quant_bias",
    "round_smooth_quant", "round_weight", "smooth_quant_inputs", "smooth_quant_range", "smoothing_scale", "static_inputs",
    "stored_smoothing",
]  # fmt: skip

LEAST_SMOOTHING = 1e-5


@dataclass(frozen=True)
class RoundedWeight:
    """A weight, rounded.

    codes        [out, in] int8
    scale, zero  [out, groups], as ``parameters`` gives them; zero is integral and subtracted from codes
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def parameters(low: Tensor, high: Tensor, bits: int, symmetric: bool, within: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(scale, zero) of values between ``low`` and ``high``, of any shape and dtype, computed in the dtype ``within``."""
    if symmetric:
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    low, high = low.to(within), high.to(within)
    scale = (high - low) / (2**bits - 1)
    none = scale == 0
    scale = torch.where(none, torch.ones_like(scale), scale)
    zero = torch.zeros_like(scale) if symmetric else torch.round(-(2 ** (bits - 1)) - low / scale)
    return scale, torch.where(none, torch.zeros_like(zero), zero)


def round_weight(weight: Tensor, bits: int, symmetric: bool = True, group_size: int = -1) -> RoundedWeight:
    """``weight`` [out, in], one scale for each row, or for each ``group_size`` inputs of it. Finite."""
    groups = weight.reshape(weight.shape[0], -1, weight.shape[1] if group_size == -1 else group_size)
    scale, zero = parameters(groups.amin(-1), groups.amax(-1), bits, symmetric)
    return RoundedWeight(codes_of(groups, scale, zero, bits).reshape(weight.shape), scale, zero)


def round_smooth_quant(weight: Tensor, smooth: Tensor) -> tuple[RoundedWeight, Tensor]:
    """``weight`` [out, in] times ``smooth`` [in] float32, to 8 bits as SmoothQuant of 0.6.0 rounds it; and it in its own dtype.

    The range is of the float32 product, the codes are of what the weight's dtype holds of it.
    """
    wide = weight.float() * smooth
    scale, zero = parameters(wide.amin(1, keepdim=True), wide.amax(1, keepdim=True), 8, True, torch.float32)
    smoothed = wide.to(weight.dtype)
    return RoundedWeight(codes_of(smoothed.unsqueeze(1), scale, zero, 8).reshape(weight.shape), scale, zero), smoothed


def smooth_quant_range(low: Tensor, high: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero) [1] float32 of smoothed inputs, of the float32 extremes [in] of the inputs themselves."""
    factor = smooth.reciprocal()
    return parameters((low * factor).min().reshape(1), (high * factor).max().reshape(1), 8, False, torch.float32)


def codes_of(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """int8 codes of ``groups`` [out, groups, n] by ``scale`` and ``zero`` [out, groups], in the dtype of ``groups``."""
    half = 2 ** (bits - 1)
    divisor, shift = held(scale, groups.dtype).unsqueeze(-1), zero.to(groups.dtype).unsqueeze(-1)
    return (groups / divisor).add_(shift).round_().clamp_(-half, half - 1).to(torch.int8)


def held(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A positive scale as ``dtype`` holds it, never 0."""
    return scale.to(dtype).clamp(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)


def fake(rounded: RoundedWeight, dtype: torch.dtype) -> Tensor:
    """``(codes - zero) * scale`` [out, in], each step in ``dtype``."""
    groups = rounded.codes.reshape(*rounded.scale.shape, -1).to(dtype)
    return groups.sub_(rounded.zero.to(dtype).unsqueeze(-1)).mul_(held(rounded.scale, dtype).unsqueeze(-1)).reshape(rounded.codes.shape)


def smoothing_scale(inputs: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """``s`` [in] of the largest magnitudes of a linear's inputs and of its weight's columns [in], in their dtype (rule 3)."""
    numerator, denominator = inputs.pow(alpha), columns.pow(1 - alpha)
    scale = (numerator / denominator).clamp(min=LEAST_SMOOTHING)
    return torch.where((numerator == 0) | (denominator == 0), torch.ones_like(scale), scale)


def dequant_scale(input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """[out] float32: the scale [1] of inputs times the scales [out, 1] of weights (rule 1)."""
    return input_scale.float() * weight_scale.reshape(-1).float()


def merged_bias(codes: Tensor, input_scale: Tensor, input_zero: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What SmoothQuant of 0.6.0 adds to the bias, [out] of ``dtype``, for what the inputs' zero point makes of ``codes`` [out, in]."""
    return (_correction(codes, input_zero) * dequant_scale(input_scale, weight_scale).double()).to(dtype)


def quant_bias(codes: Tensor, input_scale: Tensor, input_zero: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The same as PTQ of 1.2.0 stores it, apart: int32, rounded by way of ``dtype``."""
    through = (_correction(codes, input_zero) * (input_scale * weight_scale.reshape(-1))).to(dtype)
    return torch.round(through / dequant_scale(input_scale, weight_scale)).to(torch.int32)


def _correction(codes: Tensor, input_zero: Tensor) -> Tensor:
    return -(codes.long().sum(1) * int(input_zero)).double()


def float_bits(scale: Tensor) -> Tensor:
    """float32 as int64 that holds its bits, zero-extended."""
    return scale.float().contiguous().view(torch.int32).long()


def smooth_quant_inputs(scale: Tensor, zero: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    """(input_scale float16, input_zp int8), both [in], as SmoothQuant of 0.6.0 stores them, of [1] and ``s`` [in] (rule 2)."""
    return (scale * smooth.double()).half(), zero.to(torch.int8).expand(smooth.shape).clone()


def static_inputs(scale: Tensor, zero: Tensor, smooth: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(input_scale, input_zp int8) as PTQ stores them, of [1] and the smoothing ``s`` [in]: [1], or [in] with smoothing (rule 2)."""
    if smooth is None:
        return scale.half().to(dtype), zero.to(torch.int8)
    return (scale.half() / stored_smoothing(smooth).half()).to(dtype), zero.to(torch.int8).expand(smooth.shape).clone()


def stored_smoothing(smooth: Tensor) -> Tensor:
    """1 / s, in its dtype: what 1.2.0 stores, and multiplies inputs by."""
    return smooth.reciprocal()


def cache_tensors(keys: Sequence[Tensor], values: Sequence[Tensor], dtype: torch.dtype, version: str) -> dict[str, Tensor]:
    """The tensors of a quantized KV cache, by their names below ``paged_attention_mgr``.

    keys, values   (lowest, highest) of each channel, [kv heads * head size]
    dtype          the network's
    """
    found = {name: parameters(low, high, 8, True) for name, (low, high) in (("key", keys), ("value", values))}
    scales, zeros = {name: scale for name, (scale, _) in found.items()}, {name: zero for name, (_, zero) in found.items()}
    tensors: dict[str, Tensor] = {}
    if version == "gs0.6":
        tensors |= {f"{name}_t_zp": -zeros[name].half() for name in found}
        tensors |= {f"{name}_t_scale": scales[name].half() for name in found}
        tensors["key_value_t_scale"] = float_bits(torch.stack([scale.half() for scale in scales.values()]))
        tensors["key_value_t_zp"] = -torch.stack([zero.to(torch.int32) for zero in zeros.values()])
    else:
        for name in found:
            tensors |= {
                f"quant_pa.{name[0]}_scale_no_fusion": scales[name].to(dtype),
                f"quant_pa.{name[0]}_zp_no_fusion": zeros[name].to(dtype),
            }
        fused, shifts = torch.stack(list(scales.values())), -torch.stack(list(zeros.values()))
        half = dtype == torch.bfloat16
        tensors["quant_pa.k_v_scale_fusion"] = fused.half() if half else float_bits(fused)
        tensors["quant_pa.k_v_zp_fusion"] = shifts.half() if half else shifts.to(torch.int32)
    for name in found:
        tensors |= {f"_{name}_input_quantizer.t_scale": scales[name].half(), f"_{name}_input_quantizer.t_zp": zeros[name].to(torch.int8)}
    return tensors
