"""Weights -> codes, scales and offsets, as msModelSlim rounds them, bit for bit.

The law on disk: ``w ~ (code - offset) * scale``. Every function is pure: it takes float tensors and returns new ones.

Which arithmetic, for a weight [out, in] of the model's dtype (read off the tensor operations of msModelSlim 26.1.0):

==============  ============================================================  =================================================
plain           MinMax, per tensor or channel; HQQ                            all in the **model's own dtype**: bf16 quotients
                                                                              near 100 have steps of 0.5, and so do the codes
lowbit          ``is_lowbit``: per group, plain, outliers, two stages         float32; then codes from weight / float32 scale
sparse          ``co_sparse``                                                 float32; the scale then rounded to the model's dtype
==============  ============================================================  =================================================

1. Symmetric: scale = absmax / (2^(b-1) - 1), offset 0. The scale is at least 2^-23 (plain).
2. Asymmetric plain: the range is widened to hold 0, then scale = (max - min) / (2^b - 1), offset = round(-min / scale) - 2^(b-1).
3. Asymmetric lowbit: **not widened**, so a group of positive weights has an offset below -2^(b-1). Where the tool divides by zero
   (a group of equal weights), rule 2's widened range is taken here instead.
4. A symmetric group that is all zero has scale 0 in the tool, which then stores undefined codes. Here: scale 2^-23, codes 0.
5. The tool's symmetric codes are clamped to +-(2^(b-1) - 1) when saved, but to -2^(b-1) in the fake-quantized model (bf16 only can
   tell them apart).
6. Outliers (W8A8S): a row's weights beyond its ``fraction``-th largest, or beyond sigma_factor standard deviations of |w|, keep
   the scale of the others and get codes up to +-127.
7. W4A8: stage one rounds rows to +-119 (absmax / 119); stage two divides groups by round(max(absmax_of_codes / 7, 1)).
8. HQQ: the scale is refined by at most 20 half-quadratic steps (per group 10; lp norm 0.7, beta 10, kappa 1.01), stored in float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "EPSILON", "RoundedWeight", "codes_of", "dequantized", "linear_parameters", "round_groups", "round_lowbit", "round_outliers",
    "round_plain", "round_sparse", "round_two_stages",
]  # fmt: skip

EPSILON = 2.0**-23
"""The smallest scale: float32's epsilon."""

FIRST_STAGE_MAX = 119
"""W4A8's first stage rounds to +-119 = 7 * 17, so that the second stage's scale is at most 17."""


@dataclass(frozen=True)
class RoundedWeight:
    """A weight, rounded. Scales and offsets keep the dtypes that msModelSlim stores.

    codes           [out, in] int8, as they are saved
    scale, offset   [1], [] (lowbit or HQQ, per tensor), [out, 1] or [out, groups]
    scale_second    [out, groups] float32, integral (W4A8's second stage), or None; offset_second: zeros, int64
    fake            [out, in] in the weight's dtype: what the fake-quantized model multiplies by
    g_idx           [in] int32, the group of each input, where it is not i // group_size (GPTQ's act order), or None
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    fake: Tensor
    scale_second: Tensor | None = None
    offset_second: Tensor | None = None
    g_idx: Tensor | None = None


def linear_parameters(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and offset of values between ``low`` and ``high``, in their dtype. A scalar gives [1].

    Used for weights, static and dynamic activations, and the KV cache alike.
    """
    low = torch.minimum(low, torch.zeros_like(low))
    high = torch.maximum(high, torch.zeros_like(high))
    epsilon = torch.tensor([EPSILON], device=low.device).type_as(low)
    if symmetric:
        scale = torch.maximum(torch.maximum(-low, high) / float(2 ** (bits - 1) - 1), epsilon)
        return scale, torch.zeros_like(scale)
    scale = torch.maximum((high - low) / (2**bits - 1), epsilon)
    return scale, torch.round(low * -1 / scale) - 2 ** (bits - 1)


def codes_of(values: Tensor, scale: Tensor, offset: Tensor, bits: int, narrow: bool = False) -> Tensor:
    """``round(values / scale + offset)``, clamped to b bits, still as floats; ``narrow`` leaves out -2^(b-1)."""
    top = 2 ** (bits - 1) - 1
    return torch.round(values / scale + offset).clamp(-top if narrow else -top - 1, top)


def dequantized(codes: Tensor, scale: Tensor, offset: Tensor, like: Tensor) -> Tensor:
    """``(codes - offset) * scale``, in the dtype of ``like``."""
    return ((codes - offset) * scale).type_as(like)


def _row_wise(weight: Tensor, scale: Tensor) -> Tensor:
    """A scale or offset of [1], [out, 1] or [out, groups], one row for each row of weights (or of groups)."""
    return scale.reshape(-1, 1).to(weight.device)


def round_plain(weight: Tensor, bits: int, symmetric: bool, per_tensor: bool, hqq: bool = False) -> RoundedWeight:
    """MinMax, or HQQ, in the weight's own dtype: scale and offset [1] or [out, 1]. A scale that HQQ moved per tensor is []."""
    low, high = (weight.min(), weight.max()) if per_tensor else (weight.amin(1, keepdim=True), weight.amax(1, keepdim=True))
    scale, offset = linear_parameters(low, high, bits, symmetric)
    if hqq:
        scale = _refined(weight, scale.float(), offset.float(), bits, steps=20).half()
        offset = offset.half()
    rows_scale, rows_offset = _row_wise(weight, scale), _row_wise(weight, offset)
    fake = dequantized(codes_of(weight, rows_scale, rows_offset, bits), rows_scale, rows_offset, weight)
    codes = codes_of(weight, rows_scale, rows_offset, bits, narrow=symmetric)
    return RoundedWeight(codes.to(torch.int8), scale, offset, fake)


def _lowbit_parameters(rows: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and offset, float32 [rows, 1], of float32 ``rows`` (rules 3 and 4)."""
    if symmetric:
        scale = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        scale = torch.where(scale == 0, torch.full_like(scale, EPSILON), scale)
        return scale, torch.zeros_like(scale)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    offset = -torch.round(low / scale) - 2 ** (bits - 1)
    wide_scale, wide_offset = linear_parameters(low, high, bits, symmetric=False)
    equal = scale == 0
    return torch.where(equal, wide_scale, scale), torch.where(equal, wide_offset, offset)


def round_groups(weight: Tensor, bits: int, symmetric: bool, group_size: int, hqq: bool = False) -> RoundedWeight:
    """One scale for each ``group_size`` inputs of a row: [out, groups], float32 (HQQ: float16). ``group_size`` divides in."""
    rows = weight.float().reshape(-1, group_size)
    scale, offset = _lowbit_parameters(rows, bits, symmetric)
    if hqq:
        refined = [
            _refined(rows[group::groups], scale[group::groups], offset[group::groups], bits, steps=10)
            for groups in (weight.shape[1] // group_size,)
            for group in range(groups)
        ]
        scale, offset = torch.stack(refined, 1).reshape(-1, 1).half(), offset.half()
    fake = dequantized(codes_of(rows, scale, offset, bits, narrow=symmetric and not hqq), scale, offset, rows)
    codes = codes_of(weight.reshape(-1, group_size), scale, offset, bits)
    shape = (weight.shape[0], -1)
    return RoundedWeight(
        codes.reshape(weight.shape).to(torch.int8), scale.reshape(shape), offset.reshape(shape), fake.reshape(weight.shape).type_as(weight)
    )


def round_lowbit(weight: Tensor, bits: int, symmetric: bool, per_tensor: bool) -> RoundedWeight:
    """MinMax of the lowbit kind: float32 scales, [out, 1] or [], without groups or outliers."""
    values = weight.float()
    scale, offset = _lowbit_parameters(values.reshape(1, -1) if per_tensor else values, bits, symmetric)
    fake = dequantized(codes_of(values, scale, offset, bits, narrow=symmetric), scale, offset, weight)
    codes = codes_of(weight, scale, offset, bits)
    if per_tensor:
        scale, offset = scale.reshape(()), offset.reshape(())
    return RoundedWeight(codes.to(torch.int8), scale, offset, fake)


def _with_outliers(values: Tensor, outliers: Tensor, absmax: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (float), scale and dequantized values: ordinary weights in ``bits``, outliers on the same scale in 8 (rule 6)."""
    top = 2 ** (bits - 1) - 1
    absmax = torch.where(absmax == 0, torch.full_like(absmax, EPSILON * top), absmax)
    scale, wide_scale = absmax / top, absmax * 127 / top / 127
    ordinary = torch.round(values.masked_fill(outliers, 0) / scale).clamp(-top, top)
    wide = torch.round(values.masked_fill(~outliers, 0) / wide_scale).clamp(-127, 127)
    return ordinary + wide, scale, scale * ordinary + wide_scale * wide


def round_outliers(
    weight: Tensor, bits: int, per_tensor: bool, fraction: float, sigma_factor: float | None, stored_bits: int = 8
) -> RoundedWeight:
    """Outliers by row, by ``sigma_factor`` where given, else by ``fraction``. Scales are float32, [out, 1] or [].

    ``stored_bits`` is 8 for W8A8S; the tool stores W4A16 made this way in 4, and so cuts the outliers off its files.
    """
    values = weight.float()
    size = values.abs()
    if sigma_factor is not None:
        outliers = size / size.var(-1, keepdim=True).sqrt() > sigma_factor
    elif count := int(size.shape[1] * fraction):
        outliers = size > size.topk(count, -1).values[:, -1:]
    else:
        outliers = torch.zeros_like(size, dtype=torch.bool)
    ordinary = size.masked_fill(outliers, 0)
    _, scale, fake = _with_outliers(values, outliers, ordinary.max() if per_tensor else ordinary.amax(1, keepdim=True), bits)
    offset = torch.zeros_like(scale)
    codes = codes_of(weight, scale.reshape(-1, 1), offset.reshape(-1, 1), stored_bits)
    return RoundedWeight(codes.to(torch.int8), scale, offset, fake.type_as(weight))


def round_sparse(weight: Tensor, bits: int, per_tensor: bool, fraction: float) -> RoundedWeight:
    """W8A8S of ``co_sparse``: outliers of the whole weight. Codes come from float32 scales, stored in the weight's dtype."""
    values = weight.float()
    size = values.abs()
    count = int(size.numel() * fraction)
    threshold = size.flatten().topk(count).values[-1] if count else size.max()
    outliers = size > threshold
    absmax = threshold.reshape(1) if per_tensor else size.masked_fill(outliers, 0).amax(1, keepdim=True)
    codes, scale, fake = _with_outliers(values, outliers, absmax, bits)
    scale = scale.type_as(weight)
    return RoundedWeight(codes.to(torch.int8), scale, torch.zeros_like(scale), fake.type_as(weight))


def round_two_stages(weight: Tensor, group_size: int) -> RoundedWeight:
    """W4A8: int8 rows, then int4 groups of those integers (rule 7). scale [out, 1] and scale_second [out, groups], float32."""
    absmax = weight.float().abs().amax(1, keepdim=True)
    scale = absmax / FIRST_STAGE_MAX
    scale = torch.where(scale == 0, torch.full_like(scale, EPSILON), scale)
    eight = torch.round(weight.float() / scale).clamp(-FIRST_STAGE_MAX, FIRST_STAGE_MAX).reshape(-1, group_size)
    second = torch.round((eight.abs().amax(1, keepdim=True) / 7).clamp(min=1))
    four = torch.round(eight / second).clamp(-8, 7)
    fake = (four * second).reshape(weight.shape) * scale
    shape = (weight.shape[0], -1)
    return RoundedWeight(
        four.reshape(weight.shape).to(torch.int8),
        scale,
        torch.zeros_like(scale),
        fake.type_as(weight),
        second.reshape(shape),
        torch.zeros_like(second, dtype=torch.int64).reshape(shape),
    )


def _refined(weight: Tensor, scale: Tensor, offset: Tensor, bits: int, steps: int) -> Tensor:
    """HQQ's scale for ``weight`` [rows, n], float32 like ``scale``: [rows, 1], or [1] for one scale (rule 8).

    The steps end when the mean absolute error of all rows grows, so the result is never worse than the scale given. The tool solves
    for the scale as if the offset were 0, so with offsets it rarely moves. It sums products in the order of a matrix product; the
    order here differs, so one scale in some hundreds is a float16 step away from the tool's.
    """
    values, best, best_error, beta = weight.float(), scale, float("inf"), 10.0
    for _ in range(steps + 1):
        codes = codes_of(values, scale, offset, bits)
        fake = dequantized(codes, scale, offset, values)
        error = float((values - fake).abs().mean())
        if not error < best_error:
            break
        best, best_error = scale, error
        residual = values - fake
        shrunk = torch.sign(residual) * torch.relu(residual.abs() - residual.abs().pow(0.7 - 1) * (1 / beta))
        power, product = codes * codes, codes * (values - shrunk)
        if scale.numel() > 1 or scale.ndim == 2:
            power, product = power.sum(1, keepdim=True), product.sum(1, keepdim=True)
        else:
            power, product = power.sum(), product.sum()
        solved = product / power
        scale = torch.where((power > 0) & torch.isfinite(solved) & (solved > 0), solved, best.reshape(solved.shape))
        beta *= 1.01
    return best
