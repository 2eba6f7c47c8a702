"""The smoothing scales of msModelSlim's AntiOutlier, m1 to m6, as functions of activation statistics and weights.

Whose formulas: msModelSlim 26.1.0 (PyPI), ``llm_ptq/anti_outlier``; m5 is its cbq.py, the others are compiled, and were read off a
trace of every tensor operation that they make (``torch.utils._python_dispatch``) and compared with their results.

Notation, per subgraph: ``C`` channels; ``a[C]`` the largest ``|x|`` of a channel over all samples; ``w[C]`` the largest ``|W|`` of a
column over the rows of all target linears, at least 1e-5. A target's columns are multiplied by ``s[C]``, the source is divided by it.
All arithmetic is in the model's own dtype, as the tool's is, except the two clamps of 1e-5, which are in float32.

=====  ==============================================================================================================================
m1     ``s = a^0.5 / w^0.5``
m2     thresholds ``T_i = (t - d) i / 99 + d``, ``i`` of 0..99, between the std ``d`` and the maximum ``t`` of ``x - shift``; ``s`` of a
       channel whose maximum of ``x - shift`` is ``c``: ``sqrt(c / w)`` where ``c > T``, else 1. Kept is the first ``T`` of the least
       mean square error for the FIRST sample, with ``(x - shift) / s`` rounded to 8 bits (one asymmetric scale) and the weights NOT
       rounded (the tool's weight quantizer forgets to). The error is that of the first target's output or, where there are three
       targets, of an attention over their outputs without mask, positions or heads (all of k's width is one head). Where
       ``3 d >= t`` there is no search: m1's formula, for all channels.
m3     ``s = p / sqrt(max(p) min(p))``, ``p = max(m^r, 1e-4)``, ``m[C]`` the mean of ``|x|`` of the FIRST sample, ``r = i / 20`` for ``i``
       of 0..19. Kept is the first ``r`` of the least sum over the targets of the mean square error of the output for the first sample,
       weights rounded per row (``w_bit``, ``w_sym``), activations not.
m4     ``s = a^0.9 / w^0.1``
m5     only outlier channels, ``s = (outlier / largest normal)^0.7``: see ``m5_scale``
m6     ``s = a^alpha / w^beta``, searched over steps of 1/20: first alpha (beta = 1 - alpha), then beta; ties go to the last. The error is
       that of all targets' outputs for all samples, weights rounded per row to 8 bits, activations to 8 bits by one asymmetric scale.
=====  ==============================================================================================================================

In m4, m5's clamp is absent; m1, m2, m4 and m6 clamp ``s`` to at least 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from formats.errors import UnreadableError

__all__ = [
    "ActivationStatistics",
    "largest_weight",
    "m1_scale",
    "m2_scale",
    "m3_ratio",
    "m3_scale",
    "m4_scale",
    "m5_scale",
    "m6_exponents",
    "power_scale",
    "widest_of_group",
]

LEAST = 1e-5  # of w, and of s
EPSILON = torch.finfo(torch.float32).eps  # the least scale of a quantizer
STEPS_M2 = 100
GRID = 20  # steps of m3 and m6


@dataclass(frozen=True)
class ActivationStatistics:
    """What one linear's input was, over the samples so far. Channels ``C``; all tensors in the activations' dtype, on their device.

    ``shift`` is the middle of the extremes so far, so the ``centred`` values depend on the samples' order, as the tool's do.
    ``first`` is the first sample as it came, ``[..., C]``; ``samples`` are all of them as ``[tokens, C]``, where they are kept. Both on
    the CPU.
    """

    maximum: Tensor  # [C]
    minimum: Tensor  # [C]
    shift: Tensor  # [C] (maximum + minimum) / 2
    largest: Tensor  # [C] of |x|
    centred_maximum: Tensor  # [C] of x - shift
    centred_peak: Tensor  # [] of x - shift
    centred_std: Tensor  # [] the largest std of a sample of x - shift
    first: Tensor
    samples: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, sample: Tensor, before: ActivationStatistics | None = None, *, keep: bool = False) -> ActivationStatistics:
        """The statistics after one more sample, ``[..., C]``; ``keep`` keeps every sample, for m6's search."""
        tokens = sample.detach().reshape(-1, sample.shape[-1])
        maximum, minimum, largest = tokens.amax(0), tokens.amin(0), tokens.abs().amax(0)
        if before is not None:
            maximum, minimum = torch.maximum(before.maximum, maximum), torch.minimum(before.minimum, minimum)
            largest = torch.maximum(before.largest, largest)
        shift = (maximum + minimum) / 2
        centred = tokens - shift
        centred_maximum, centred_peak, centred_std = centred.amax(0), centred.max(), centred.std()
        if before is not None:
            centred_maximum = torch.maximum(before.centred_maximum, centred_maximum)
            centred_peak = torch.maximum(before.centred_peak, centred_peak)
            centred_std = torch.maximum(before.centred_std, centred_std)
        first = sample.detach().cpu() if before is None else before.first
        samples = (*(before.samples if before else ()), tokens.cpu()) if keep else ()
        return cls(maximum, minimum, shift, largest, centred_maximum, centred_peak, centred_std, first, samples)

    def checked(self, name: str) -> ActivationStatistics:
        """These statistics, to be used. Raises UnreadableError where the input of the layer ``name`` held NaN or an infinity."""
        if not bool(torch.isfinite(self.largest).all()):
            bad = int((~torch.isfinite(self.largest)).sum())
            raise UnreadableError(
                f"{name}: {bad} of {self.largest.numel()} input channels held NaN or an infinity in calibration, and finite values"
                " were wanted: check the calibration data, or run the model in bfloat16 or float32"
            )
        return self


def largest_weight(weights: Sequence[Tensor]) -> Tensor:
    """``w[C]``: the largest magnitude of each column of weights ``[out, C]``, over all of them, at least 1e-5."""
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    return _at_least(largest)


def _at_least(values: Tensor) -> Tensor:
    return values.float().clamp(LEAST).to(values.dtype)


def power_scale(activation: Tensor, weight: Tensor, alpha: float, beta: float) -> Tensor:
    """``s = a^alpha / w^beta``, at least 1e-5, of any shape: m1, m4 and m6, and m2 without a search."""
    return _at_least(activation.pow(alpha) / weight.pow(beta))


def m1_scale(statistics: ActivationStatistics, weights: Sequence[Tensor]) -> Tensor:
    """SmoothQuant with its alpha of 0.5: ``s[C]`` for weights ``[out, C]``."""
    return power_scale(statistics.largest, largest_weight(weights), 0.5, 0.5)


def m4_scale(statistics: ActivationStatistics, weights: Sequence[Tensor], alpha: float = 0.9) -> Tensor:
    """SmoothQuant with an alpha of 0.9: ``s[C]`` for weights ``[out, C]``, before grouped query heads are averaged."""
    return power_scale(statistics.largest, largest_weight(weights), alpha, 1 - alpha)


def widest_of_group(values: Tensor, heads: int, head_dim: int) -> Tensor:
    """The maximum over the query heads of each of ``heads`` key heads: ``[heads * group * head_dim]`` to ``[heads * head_dim]``."""
    return values.reshape(heads, -1, head_dim).amax(1).reshape(-1)


# -- m2


def m2_scale(
    statistics: ActivationStatistics, weights: Sequence[Tensor], biases: Sequence[Tensor | None], bits: int = 8
) -> tuple[Tensor, float | None]:
    """Outlier Suppression+ without the shift: ``s[C]`` for weights ``[out, C]`` and their biases, and the threshold that was kept.

    The threshold is None where nothing was searched. No ``s`` of a channel below the threshold differs from 1.
    """
    widest, peak, deviation = largest_weight(weights), statistics.centred_peak, statistics.centred_std
    if bool(deviation * 3 >= peak):
        return power_scale(statistics.largest, widest, 0.5, 0.5), None
    judged = list(zip(weights, biases, strict=True)) if len(weights) == 3 else [(weights[0], biases[0])]
    sample = statistics.first.to(weights[0].device)
    wanted = _attention([torch.nn.functional.linear(sample, weight, bias) for weight, bias in judged])
    centred = sample - statistics.shift
    moved = [_moved(statistics.shift, weight, bias) for weight, bias in judged]
    ones, best, kept = torch.ones_like(widest), None, (torch.ones_like(widest), 0.0)
    for index in range(STEPS_M2):
        threshold = (peak - deviation) * index / (STEPS_M2 - 1) + deviation
        excess = torch.maximum(ones, statistics.centred_maximum / threshold)
        scale = torch.where(excess <= 1, excess, power_scale(excess * threshold, widest, 0.5, 0.5))
        rounded = _rounded_input(centred / scale)
        outputs = [
            torch.nn.functional.linear(rounded, _unrounded_weight(weight * scale, bits), bias)
            for (weight, _), bias in zip(judged, moved, strict=True)
        ]
        error = torch.nn.functional.mse_loss(wanted, _attention(outputs))
        if best is None or bool(error < best):
            best, kept = error, (scale, float(threshold))
    return kept


def _moved(shift: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The bias ``[out]`` of a linear whose input lost ``shift[C]``."""
    moved = (shift.unsqueeze(0) @ weight.T).squeeze(0)
    return moved if bias is None else moved + bias


def _attention(outputs: Sequence[Tensor]) -> Tensor:
    """Of q, k and v ``[..., tokens, width]``: attention in which all of k's width is one head, float32. Of one output: that output."""
    if len(outputs) == 1:
        return outputs[0]
    queries, keys, values = outputs
    width = keys.shape[-1]
    root = queries.new_tensor(width).sqrt()  # in the model's dtype
    heads = []
    for start in range(0, queries.shape[-1], width):
        weights = torch.softmax(queries[..., start : start + width] @ keys.transpose(-2, -1) / root, -1)
        heads.append((weights @ values).float())
    return torch.cat(heads, -1)


def _rounded_input(values: Tensor) -> Tensor:
    """Quantized to 8 bits by one asymmetric scale over a range that holds 0, and back."""
    zero = torch.zeros_like(values.min())
    least, most = torch.minimum(values.min(), zero), torch.maximum(values.max(), zero)
    scale = ((most - least) / 255).clamp(EPSILON)
    zero_point = (least * -1 / scale).round() - 128
    return ((values / scale + zero_point).round().clamp(-128, 127) - zero_point) * scale


def _unrounded_weight(weight: Tensor, bits: int) -> Tensor:
    """As the tool's weight quantizer in m2 leaves it: divided by one symmetric scale, clamped, NOT rounded, multiplied again."""
    limit = 1 << (bits - 1)
    scale = (weight.abs().max() / (limit - 1)).clamp(EPSILON)
    return (weight / scale).clamp(-limit, limit - 1) * scale


# -- m3


def m3_scale(statistics: ActivationStatistics, ratio: float) -> Tensor:
    """AWQ's scale for one ratio: ``s[C]``, centred so that its extremes are each other's inverse."""
    mean = statistics.first.to(statistics.largest.device).abs().reshape(-1, statistics.first.shape[-1]).mean(0)
    power = mean.pow(ratio).clamp(1e-4)
    return power / (power.max() * power.min()).sqrt()


def m3_ratio(
    statistics: ActivationStatistics, weights: Sequence[Tensor], biases: Sequence[Tensor | None], bits: int = 8, symmetric: bool = True
) -> float:
    """The ratio that AWQ's search keeps for weights ``[out, C]`` and their biases ``[out]``: one of 0, 0.05 .. 0.95."""
    sample = statistics.first.to(weights[0].device)
    wanted = [torch.nn.functional.linear(sample, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    best, kept = float("inf"), 0.0
    for index in range(GRID):
        scale, error = m3_scale(statistics, index / GRID), 0.0
        for weight, bias, want in zip(weights, biases, wanted, strict=True):
            rounded = _rounded_rows(weight * scale, bits, symmetric) / scale
            found = torch.nn.functional.linear(sample, rounded, bias)
            error += float((want - found).float().pow(2).mean())
        if error < best:
            best, kept = error, index / GRID
    return kept


def _rounded_rows(weight: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Each row quantized over a range that holds 0, and back."""
    limit = 1 << (bits - 1)
    least, most = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        scale = (torch.maximum(-least, most) / (limit - 1)).clamp(EPSILON)
        return (weight / scale).round().clamp(-limit, limit - 1) * scale
    scale = ((most - least) / (2 * limit - 1)).clamp(EPSILON)
    zero_point = (least * -1 / scale).round() - limit
    return ((weight / scale + zero_point).round().clamp(-limit, limit - 1) - zero_point) * scale


# -- m5


def m5_scale(statistics: ActivationStatistics, fence: float = 1.5, rate: float = 0.7) -> Tensor:
    """CBQ's outlier channels: ``s[C]``, 1 but where a channel's maximum or minimum stands out from the other channels'.

    A maximum is suspect above ``q + fence * (q - p)``, the 80 % and 20 % quantiles of the channels' maxima; of more than one suspect, the
    outliers are those above the widest gap, less the variance of what is below. The minima are treated alike, downwards, except that
    there the variance is that of the suspects above the gap (both as the tool's cbq.py has it). Does not look at the weights.
    """
    up, normal = _outliers(statistics.maximum, fence, upwards=True)
    scale = _excess(statistics.maximum, up, normal, rate)
    down, normal = _outliers(statistics.minimum, fence, upwards=False)
    if bool(normal != 0):
        scale = torch.maximum(scale, _excess(statistics.minimum, down, normal, rate))
    return torch.where(scale == 0, 1.0, scale).to(statistics.maximum.dtype)


def _excess(values: Tensor, outliers: Tensor, normal: Tensor, rate: float) -> Tensor:
    """``(value / normal)^rate`` of ``[C]`` values that are outliers, else 1; float32."""
    excess = torch.ones_like(values, dtype=torch.float32)
    excess[outliers] = (values.float()[outliers] / normal) ** rate
    return excess


def _outliers(values: Tensor, fence: float, *, upwards: bool) -> tuple[Tensor, Tensor]:
    """Which of ``[C]`` values are outliers, and the most extreme value that is none."""
    low, high = torch.quantile(values.float(), 0.20), torch.quantile(values.float(), 0.80)
    threshold = high + fence * (high - low) if upwards else low - fence * (high - low)
    suspects = values[values > threshold] if upwards else values[values < threshold]
    if suspects.numel() > 1:
        threshold = _widest_gap(suspects.sort(descending=True).values, upwards=upwards)
    outliers = values > threshold if upwards else values < threshold
    return outliers, values[~outliers].max() if upwards else values[~outliers].min()


def _widest_gap(suspects: Tensor, *, upwards: bool) -> Tensor:
    """The last normal value beside the gap that is widest, less the variance of the values on the gap's normal side. Descending, > 1."""
    best, kept = None, suspects[0]
    for cut in range(1, suspects.numel()):
        above, below = suspects[:cut], suspects[cut:]
        normal = below if upwards else above
        merit = above[-1] - below[0] - (normal.var() if normal.numel() > 1 else 0)
        if best is None or bool(merit > best):
            best, kept = merit, below[0] if upwards else above[-1]
    return kept


# -- m6


def m6_exponents(statistics: ActivationStatistics, weights: Sequence[Tensor]) -> tuple[float, float]:
    """The alpha and beta that m6's search keeps for weights ``[out, C]``; needs statistics that kept every sample.

    The search does not group query heads, though the scale it is for does.
    """
    weight = torch.cat(list(weights))
    inputs = torch.cat(statistics.samples).to(weight.device)
    activation, widest = inputs.abs().amax(0, keepdim=True), weight.abs().amax(0, keepdim=True)
    wanted = inputs @ weight.T
    size = wanted.pow(2).mean().pow(0.5)

    def error(alpha: float, beta: float) -> Tensor:
        scale = activation.pow(alpha) * widest.pow(-beta)
        found = _rounded_tokens(inputs / scale) @ _rounded_weight(weight * scale).T
        return (found - wanted).pow(2).mean().pow(0.5) / size

    alpha, best = 0.0, error(0.0, 1.0)
    for index in range(1, GRID + 1):
        now = error(index / GRID, 1 - index / GRID)
        if bool(now <= best):
            alpha, best = index / GRID, now
    beta = 1 - alpha
    for index in range(GRID + 1):
        now = error(alpha, index / GRID)
        if bool(now <= best):
            beta, best = index / GRID, now
    return alpha, beta


def _rounded_weight(weight: Tensor) -> Tensor:
    """Each row quantized to 8 bits, symmetric, and back."""
    scale = weight.abs().amax(-1, keepdim=True) / 127
    return (weight / scale).round().clamp(-127, 127) * scale


def _rounded_tokens(values: Tensor) -> Tensor:
    """Quantized to 8 bits by one asymmetric scale between the extremes, and back."""
    least = values.min()
    scale = ((values.max() - least) / 255).clamp(EPSILON)
    zero_point = (least * -1 / scale).round() - 128
    return ((values / scale + zero_point).round() - zero_point) * scale
