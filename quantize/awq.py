"""AWQ: scale up the inputs that matter before a weight is rounded, and clip what is better clipped.

Published by Lin et al. (arXiv 2306.00978), as llm-awq and AutoAWQ 0.2.9 run it. A norm or a linear divides its output by ``s``, the
linears that read it multiply their columns by ``s``, and rounding then loses less of the columns with the large inputs. What is searched:

1. **Scale**, per group of linears that share an input: ``s = x^r / (w^(1-r) + 1e-4)`` (with ``duo_scaling``, else ``x^r``), at least 1e-4,
   then divided by ``sqrt(max(s) min(s))``; ``x[in]`` the mean of ``|input|``; ``w[in]`` the mean over all outputs of ``|W|`` relative to
   its group's largest. ``r`` of 0, 1/20 .. 19/20: kept is the first of the least mean square error of the parent module's output, its
   weights being ``fake(W s) / s``. Ratio 0 with duo_scaling is a scaling too (``1 / w``), so the tool can end up worse than without
   any; here no scaling is one more candidate, taken where it is better than all.
2. **Clip**, after scaling: per output and group the largest magnitude, of ``1 - i/20`` times the largest there is, ``i`` of 0 .. 9, by the
   mean square error of that group's part of the output for at most some hundred tokens, every n-th. Queries and keys are not clipped,
   because their errors multiply (``is_clipped``).

The error of a group's part of an output is ``d G d^T``, with ``d`` what clipping and rounding change of the weight and ``G`` the group's
mean of ``x x^T``; the tool sums the same over tokens, and so needs as many times more memory and time as there are tokens.

``s`` is float32, whatever the model's dtype; ``W s`` and what comes of it have the weight's, as it will when it is scaled for good.

The grid is AutoAWQ's, with its scale rounded to the dtype in which it is stored before codes are made of it:

3. Asymmetric: scale = (max - min) / (2^b - 1), offset = -round(min / scale) - 2^(b-1), within b bits. Symmetric: scale =
   absmax / (2^(b-1) - 1). max - min and absmax are taken to be at least 1e-5. Codes are from -2^(b-1) to 2^(b-1) - 1.
4. A group that is all above 0, or all below, has its range widened to hold 0. The tool's is not, its zero point is cut, and the codes of
   such a group then stop at max - min: a row of equal weights becomes 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from formats.errors import RefusedError, UnreadableError, UsageError

from .gptq import checked_width
from .rounding import EPSILON, RoundedWeight

__all__ = ["ScaleSearch", "clipped", "is_clipped", "round_awq", "search_clip", "search_scale"]

LEAST_RANGE = 1e-5
LEAST_SCALE = 1e-4
BATCH = 2**24
"""Numbers of the largest tensor of ``search_clip`` beside the weight and the inputs."""
ATTENDING = ("query", "key", "qkv")


@dataclass(frozen=True)
class ScaleSearch:
    """What the search for a scale found.

    scale            [in] float32, by which columns are to be multiplied
    ratio            that made it, or None for no scaling, where ``scale`` is all ones
    error            mean square error of the parent's output with that scale; ``unscaled_error``: without
    """

    scale: Tensor
    ratio: float | None
    error: float
    unscaled_error: float


def search_scale(
    name: str,
    targets: Sequence[nn.Linear],
    x_mean: Tensor,
    forward: Callable[[], Iterable[Tensor]],
    fake: Callable[[Tensor], Tensor],
    group_size: int,
    grid: int = 20,
    duo_scaling: bool = True,
) -> ScaleSearch:
    """The scale for the shared input of ``targets``, which are named ``name`` in errors. The module's docstring says how it is found.

    x_mean    [in], the mean of ``|x|`` of their input over all tokens, of any float dtype
    forward   runs the module whose output counts, one sample after the other, and gives its outputs; run at most ``grid`` + 2 times.
              The first run's outputs are kept, so their size, and that of one more sample, is the memory that this takes
    fake      [out, in] to [out, in]: the weight as the rounding will leave it

    The targets' weights are other tensors while ``forward`` runs, and their own again afterwards, whatever happens.

    :raises UsageError: no target, no output, targets of other inputs, groups that do not divide in, or a grid below 1
    :raises UnreadableError: inputs, weights or the float outputs hold NaN or an infinity, or every rounded output does
    """
    _check_targets(name, targets, x_mean, group_size, grid)
    weights = [target.weight.data for target in targets]
    x_mean = x_mean.detach().to(weights[0].device, torch.float32)
    w_mean = _mean_magnitude(weights, group_size) if duo_scaling else None
    with torch.no_grad():
        wanted = list(forward())
        if not sum(output.numel() for output in wanted):
            raise UsageError(f"{name}: saw no token in calibration, and AWQ needs its inputs: give data that reaches it")
        if not all(bool(torch.isfinite(output).all()) for output in wanted):
            raise UnreadableError(
                f"{name}: the float model's output holds NaN or an infinity, and finite values were wanted: check the calibration data,"
                " or run the model in bfloat16 or float32"
            )

        def error_of(scale: Tensor) -> float:
            for target, weight in zip(targets, weights, strict=True):
                scaled = (weight * scale).to(weight.dtype)
                if not bool(torch.isfinite(scaled).all()):
                    return math.inf
                target.weight.data = (fake(scaled) / scale).to(weight.dtype)
            return _mean_square_error(forward(), wanted)

        best = None
        try:
            unscaled = error_of(torch.ones_like(x_mean))
            for step in range(grid):
                scale = _scale(x_mean, w_mean, step / grid)
                error = error_of(scale)
                if math.isfinite(error) and (best is None or error < best.error):
                    best = ScaleSearch(scale, step / grid, error, unscaled)
        finally:
            for target, weight in zip(targets, weights, strict=True):
                target.weight.data = weight
    if best is None or best.error > unscaled:
        best = ScaleSearch(torch.ones_like(x_mean), None, unscaled, unscaled)
    if not math.isfinite(best.error):
        raise UnreadableError(f"{name}: its output with a rounded weight is not finite, whatever the scale; run the model in a wider dtype")
    return best


def _check_targets(name: str, targets: Sequence[nn.Linear], x_mean: Tensor, group_size: int, grid: int) -> None:
    if not targets:
        raise UsageError(f"{name}: a scale is of the input of linears, and none was given")
    for target in targets:
        if target.weight.shape[1:] != x_mean.shape:
            raise UsageError(f"{name}: the mean input is of shape {list(x_mean.shape)}, and a linear has {target.weight.shape[1]} inputs")
        checked_width(name, target.weight, 8, group_size)
    if grid < 1:
        raise UsageError(f"{name}: {grid} ratios were asked for, and a whole number from 1 was wanted; 20 is usual")
    bad = int((~torch.isfinite(x_mean)).sum())
    if bad:
        raise UnreadableError(
            f"{name}: {bad} of {x_mean.numel()} input channels held NaN or an infinity in calibration, and finite values were wanted:"
            " check the calibration data, or run the model in bfloat16 or float32"
        )


def _mean_magnitude(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """``w`` [in] float32: the mean over the rows of all weights [out, in] of their magnitude, relative to their group's largest."""
    total, rows = torch.zeros(weights[0].shape[1], device=weights[0].device), 0
    for weight in weights:
        groups = weight.float().abs().reshape(-1, weight.shape[1] if group_size == -1 else group_size)
        total += (groups / (groups.amax(1, keepdim=True) + 1e-6)).reshape(weight.shape).sum(0)
        rows += weight.shape[0]
    return total / rows


def _scale(x_mean: Tensor, w_mean: Tensor | None, ratio: float) -> Tensor:
    """``s`` [in] of one ratio."""
    scale = x_mean.pow(ratio)
    if w_mean is not None:
        scale = scale / (w_mean.pow(1 - ratio) + 1e-4)
    scale = scale.clamp(min=LEAST_SCALE)
    return scale / (scale.max() * scale.min()).sqrt()


def _mean_square_error(outputs: Iterable[Tensor], wanted: Sequence[Tensor]) -> float:
    total = sum(float((output.float() - want.float()).square().sum()) for output, want in zip(outputs, wanted, strict=True))
    return total / sum(want.numel() for want in wanted)


def is_clipped(name: str) -> bool:
    """Whether the weight of the linear ``name`` may be clipped: not where queries or keys come out of it, alone or fused."""
    own = name.rpartition(".")[2].lower()
    return not own.startswith(("q_", "k_")) and not any(part in own for part in ATTENDING)


def search_clip(
    name: str,
    weight: Tensor,
    inputs: Tensor,
    bits: int,
    symmetric: bool,
    group_size: int,
    grid: int = 20,
    max_shrink: float = 0.5,
    tokens: int = 512,
    scale_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """[out, groups], in the weight's dtype: the magnitudes at which ``clipped`` should clip ``weight`` [out, in] of the layer ``name``.

    inputs       [..., in], of any float dtype, already divided by the scale. Of n tokens every (n // ``tokens``)-th is taken
    max_shrink   the largest part by which a magnitude is made smaller, in steps of 1 / ``grid``
    scale_dtype  in which scales will be stored

    :raises UsageError: no token, another number of inputs, bits beyond 2 to 8, or groups that do not divide in
    :raises UnreadableError: the weight or the inputs hold NaN or an infinity
    """
    width = checked_width(name, weight, bits, group_size)
    if inputs.shape[-1:] != weight.shape[1:]:
        raise UsageError(f"{name}: inputs of shape {list(inputs.shape)} are not those of a linear with {weight.shape[1]} inputs")
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    if not rows.shape[0]:
        raise UsageError(f"{name}: saw no token in calibration, and a clip needs its inputs: give data that reaches it")
    rows = rows[:: max(1, rows.shape[0] // tokens)].to(weight.device, torch.float32)
    if not bool(torch.isfinite(rows).all()):
        raise UnreadableError(f"{name}: its inputs held NaN or an infinity in calibration; check the calibration data")
    rows = rows.reshape(rows.shape[0], -1, width)
    error_of = _group_errors(rows)
    batch = max(1, BATCH // max(weight.shape[1], rows.shape[0] * rows.shape[1]))
    found = []
    for part in weight.detach().split(batch):
        groups = part.reshape(part.shape[0], -1, width)
        largest = groups.abs().amax(-1, keepdim=True)
        best, least = largest, torch.full_like(largest, float("inf"), dtype=torch.float32)
        for step in range(max(1, int(max_shrink * grid))):
            limit = (largest.float() * (1 - step / grid)).to(part.dtype)
            codes, scale, offset = _rounded(groups.clamp(-limit, limit).float(), bits, symmetric, scale_dtype)
            error = error_of(codes.sub_(offset).mul_(scale).sub_(groups))
            better = error < least
            best, least = torch.where(better, limit, best), torch.where(better, error, least)
        found.append(best.squeeze(-1))
    return torch.cat(found)


def _group_errors(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """What a change of weights [out, groups, n] does to outputs, mean square [out, groups, 1], for inputs ``rows`` [tokens, groups, n]."""
    tokens, _, width = rows.shape
    if tokens < width:
        return lambda change: torch.einsum("ogn,tgn->ogt", change, rows).square().mean(-1, keepdim=True)
    gram = torch.einsum("tgn,tgm->gnm", rows, rows) / tokens
    return lambda change: torch.einsum("ogn,gnm->ogm", change, gram).mul_(change).sum(-1, keepdim=True)


def clipped(weight: Tensor, largest: Tensor) -> Tensor:
    """A copy of ``weight`` [out, in], whose magnitudes are at most ``largest`` [out, groups] in each group."""
    limit = largest.to(weight.device, weight.dtype).unsqueeze(-1)
    return weight.detach().reshape(*largest.shape, -1).clamp(-limit, limit).reshape(weight.shape)


def round_awq(
    name: str, weight: Tensor, bits: int, symmetric: bool, group_size: int, scale_dtype: torch.dtype = torch.float16
) -> RoundedWeight:
    """``weight`` [out, in] of the layer ``name``, scaled and clipped, to nearest, in float32 (rules 3 and 4).

    codes [out, in] int8; scale and offset [out, groups] (``group_size`` -1: [out, 1]) of ``scale_dtype``; ``fake``, the law
    ``(codes - offset) * scale`` in float32, as the weight's dtype holds it.

    :raises UsageError: bits beyond 2 to 8, or groups that do not divide in
    :raises UnreadableError: the weight holds NaN or an infinity
    :raises RefusedError: ``scale_dtype`` cannot hold a scale
    """
    width = checked_width(name, weight, bits, group_size)
    codes, scale, offset = _rounded(weight.detach().float().reshape(weight.shape[0], -1, width), bits, symmetric, scale_dtype)
    if not bool(torch.isfinite(scale).all()):
        raise RefusedError(f"{name}: {scale_dtype} cannot hold a scale of this weight; store scales in a wider dtype")
    fake = (codes - offset) * scale
    return RoundedWeight(
        codes.reshape(weight.shape).to(torch.int8),
        scale.squeeze(-1).to(scale_dtype),
        offset.squeeze(-1).to(scale_dtype),
        fake.reshape(weight.shape).to(weight.dtype),
    )


def _rounded(groups: Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, as floats, of float32 ``groups`` [out, groups, n]; scale, rounded to its dtype, and offset, float32 [out, groups, 1]."""
    half, levels = 2 ** (bits - 1), 2**bits - 1
    if symmetric:
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=LEAST_RANGE) / (half - 1)
    else:
        least, most = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = (most - least).clamp(min=LEAST_RANGE) / levels
    scale = scale.to(scale_dtype).float().clamp(min=EPSILON)
    offset = torch.zeros_like(scale) if symmetric else (-torch.round(least / scale)).clamp(0, levels) - half
    return (groups / scale).round_().add_(offset).clamp_(-half, half - 1), scale, offset
