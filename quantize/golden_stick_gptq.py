"""GPTQ as Golden Stick 1.2.0 runs it: the published loop, on a weight that stays in its own dtype.

What differs from ``gptq``, whose arithmetic is float32 throughout: each update is rounded to the weight's dtype; the Hessian is the
mean over samples, not tokens, of ``2 x x^T``, of inputs scaled in their dtype; a group's scale is found from the weight as it was at
the beginning of its block, before the block's own errors are made up for; and scales are float32 while codes are made. All linears of
a decoder layer see inputs that the float layer makes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formats.errors import UnreadableError

from .golden_stick import RoundedWeight, parameters
from .golden_stick_config import Policy
from .stage import MORE_SAMPLES, UNREACHED

__all__ = ["MeanHessian", "compensated", "inverse_factor", "round_gptq"]


class MeanHessian:
    """The mean over samples of ``2 x x^T``, [in, in] float32."""

    def __init__(self, in_features: int) -> None:
        self.samples = 0
        self.sum = torch.zeros(in_features, in_features)

    def add(self, values: Tensor) -> None:
        """Take one sample's inputs [..., in]."""
        self.sum = self.sum.to(values.device).mul_(self.samples / (self.samples + 1))
        self.samples += 1
        root = torch.tensor(math.sqrt(2 / self.samples), dtype=values.dtype, device=values.device)
        rows = (values.detach().reshape(-1, values.shape[-1]) * root).float()
        self.sum.addmm_(rows.T, rows)


def inverse_factor(name: str, hessian: Tensor, damp_percent: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the dampened Hessian."""
    damped = hessian.clone()
    damped.diagonal().add_(damp_percent * hessian.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or not bool(torch.isfinite(upper).all()):
        raise UnreadableError(f"{name}: its inputs' Hessian cannot be inverted; raise damp_percent, or {MORE_SAMPLES}")
    return upper


def round_gptq(name: str, weight: Tensor, hessian: MeanHessian, policy: Policy) -> RoundedWeight:
    """``weight`` [out, in] of the linear ``name``, compensated input by input.

    :raises UnreadableError: no sample reached it, or its Hessian has no inverse
    """
    if not hessian.samples:
        raise UnreadableError(f"{name}: {UNREACHED}, and GPTQ needs its inputs; {MORE_SAMPLES}")
    dead = hessian.sum.diagonal() == 0
    hessian.sum.diagonal()[dead] = 1
    return compensated(weight, dead, inverse_factor(name, hessian.sum, policy.argument("damp_percent")), policy)


def compensated(weight: Tensor, dead: Tensor, upper: Tensor, policy: Policy) -> RoundedWeight:
    """The loop itself. dead: [in], inputs that were 0 in every token; upper: what ``inverse_factor`` gives."""
    rest = weight.clone()
    # Scales of whole rows are of the weight as it was, dead inputs too.
    scale, zero = parameters(rest.amin(1, keepdim=True), rest.amax(1, keepdim=True), policy.w_bit, policy.w_sym)
    rest[:, dead] = 0
    size, static = policy.group_size, policy.argument("static_groups")
    grouped = None if size == -1 else rest.reshape(rest.shape[0], -1, size)
    scales, zeros = [], []
    if grouped is not None and static:
        scale, zero = parameters(grouped.amin(-1), grouped.amax(-1), policy.w_bit, policy.w_sym)
        scales, zeros = [one.unsqueeze(1) for one in scale.unbind(1)], [one.unsqueeze(1) for one in zero.unbind(1)]
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    half, step = 2 ** (policy.w_bit - 1), policy.argument("block_size")
    for begin in range(0, rest.shape[1], step):
        end = min(begin + step, rest.shape[1])
        block, errors = rest[:, begin:end].clone(), torch.zeros(rest.shape[0], end - begin, device=rest.device)
        for column in range(begin, end):
            here = column - begin
            if size != -1 and static:
                scale, zero = scales[column // size], zeros[column // size]
            elif size != -1 and column % size == 0:
                group = rest[:, column : column + size]
                scale, zero = parameters(group.amin(1, keepdim=True), group.amax(1, keepdim=True), policy.w_bit, policy.w_sym)
                scales.append(scale)
                zeros.append(zero)
            divisor, shift, value = scale.float()[:, 0], zero.float()[:, 0], block[:, here]
            code = (torch.round(value.float() / divisor) + shift).clamp_(-half, half - 1)
            codes[:, column] = code.to(torch.int8)
            error = (value.float() - divisor * (code - shift)) / upper[column, column]
            block[:, here:] = (block[:, here:].float() - torch.outer(error, upper[column, column:end])).to(block.dtype)
            errors[:, here] = error
        rest[:, end:] = (rest[:, end:].float() - errors @ upper[begin:end, end:]).to(rest.dtype)
    if size == -1:
        return RoundedWeight(codes, scale.float().double(), zero)
    return RoundedWeight(codes, torch.cat(scales, 1).float().double(), torch.cat(zeros, 1))
