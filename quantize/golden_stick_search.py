"""AWQ as Golden Stick searches it: a linear's scale by the output of its decoder layer, and clips by the linear's own output.

Scales: ``s = x^r / (w^(1 - r) + 1e-4)``, at least 1e-4, divided by the root of its extremes' product, and 1 where x or w is 0; ``x``
[in] is the inputs' mean magnitude, ``w`` [in] the mean over rows of each weight's share of its group's largest; without duo_scaling
``x^r`` alone. Of the ratios, the first of the least mean square error of the layer's output, with this linear's weight scaled, rounded
and scaled back. Everything is in the weight's dtype but the sums of the errors.

Clips: each group of a row keeps its largest magnitude times a ratio, the first that errs least over every n-th token, so many that at
least 512 are left of those that there were. Products are added up in float32 here. A number in the place of the list is taken as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from formats.errors import UnreadableError

from .golden_stick import fake, round_weight
from .golden_stick_config import Policy

__all__ = ["Sampled", "awq_scale", "best_scale", "clip_limits", "clipped", "weight_share"]

TOKENS = 512
"""By which clips are judged, at least."""
_ROWS = 64
"""Of a weight whose clips are tried at a time."""


def weight_share(weight: Tensor, group_size: int) -> Tensor:
    """``w`` [in] of a weight [out, in]."""
    size = weight.abs().reshape(weight.shape[0], -1, weight.shape[1] if group_size == -1 else group_size)
    share = size / (size.amax(-1, keepdim=True) + 1e-6)
    return share.reshape(weight.shape).mean(0)


def awq_scale(inputs: Tensor, share: Tensor, ratio: float, duo_scaling: bool) -> Tensor:
    """``s`` [in] for one ratio."""
    scale = inputs.pow(ratio)
    if duo_scaling:
        scale = scale / (share.pow(1 - ratio) + 1e-4)
    scale = scale.clamp(min=1e-4)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return torch.where((inputs == 0) | (share == 0), torch.ones_like(scale), scale)


def best_scale(
    linear: Any, policy: Policy, inputs: Tensor, ratios: Sequence[float], run: Callable[[], list[Tensor]], search: bool = True
) -> Tensor:
    """``s`` [in] of the best ratio, or of the one there is.

    run   what the decoder layer makes of every sample with the weight that ``linear`` has
    """
    weight = linear.weight.detach().clone()
    share = weight_share(weight, policy.group_size)
    scale_of = functools.partial(awq_scale, inputs.to(weight.dtype), share, duo_scaling=policy.argument("duo_scaling"))
    if not search:
        return scale_of(ratios[0])
    wanted, least, best = run(), float("inf"), None
    try:
        for ratio in ratios:
            scale = scale_of(ratio)
            rounded = round_weight((weight * scale).to(weight.dtype), policy.w_bit, policy.w_sym, policy.group_size)
            linear.weight.copy_(fake(rounded, weight.dtype) / scale)
            error = _mean_square(wanted, run())
            if error < least:
                least, best = error, scale
    finally:
        linear.weight.copy_(weight)
    if best is None:
        raise UnreadableError("AWQ's search: no ratio gives a finite error; the inputs hold NaN or infinite values")
    return best


def _mean_square(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    total = sum(float((one.float() - other.float()).square().sum(dtype=torch.float64)) for one, other in zip(wanted, found, strict=True))
    return total / sum(one.numel() for one in wanted)


class Sampled:
    """Every n-th of ``tokens`` inputs of a linear."""

    def __init__(self, tokens: int) -> None:
        self._step, self._seen, self._rows = max(1, tokens // TOKENS), 0, list[Tensor]()

    def add(self, values: Tensor) -> None:
        """Take inputs [..., in]."""
        rows = values.detach().reshape(-1, values.shape[-1])
        self._rows.append(rows[-self._seen % self._step :: self._step].clone())
        self._seen += rows.shape[0]

    def rows(self) -> Tensor:
        """[tokens, in] of those that were kept."""
        return torch.cat(self._rows)


def clip_limits(weight: Tensor, rows: Tensor, policy: Policy, ratios: Sequence[float], search: bool = True) -> Tensor:
    """The largest magnitudes [out, groups] that are kept of ``weight`` [out, in], for inputs ``rows`` [tokens, in]."""
    size = weight.shape[1] if policy.group_size == -1 else policy.group_size
    groups = weight.reshape(weight.shape[0], -1, size)
    largest = groups.abs().amax(-1)
    if not search:
        return largest * ratios[0]
    inputs = rows.reshape(rows.shape[0], -1, size).float()
    found = []
    for part, limit in zip(groups.split(_ROWS), largest.split(_ROWS), strict=True):
        wanted = torch.einsum("tgn,ogn->otg", inputs, part.float())
        best, least = limit.clone(), torch.full_like(limit, float("inf"))
        for ratio in ratios:
            kept = limit * ratio
            cut = part.clamp(-kept.unsqueeze(-1), kept.unsqueeze(-1))
            rounded = fake(round_weight(cut.reshape(part.shape[0], -1), policy.w_bit, policy.w_sym, policy.group_size), weight.dtype)
            got = torch.einsum("tgn,ogn->otg", inputs, rounded.reshape(part.shape).float())
            error = (got - wanted).square().mean(1).to(weight.dtype)
            better = error < least
            best, least = torch.where(better, kept, best), torch.where(better, error, least)
        found.append(best)
    return torch.cat(found)


def clipped(weight: Tensor, limits: Tensor) -> Tensor:
    """``weight`` [out, in] within ``limits`` [out, groups]."""
    kept = limits.unsqueeze(-1)
    return weight.reshape(*limits.shape, -1).clamp(-kept, kept).reshape(weight.shape)
