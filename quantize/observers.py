"""What calibration remembers of activations, and the ranges and scales that follow, as msModelSlim computes them.

act_method 1   ``MeanMinMax``: the **mean** over calls of each call's minimum and maximum, in the model's dtype, not the extremes
act_method 2   ``Histogram``: PyTorch's HistogramObserver of torch 1.x (2048 bins, L2 search), with one change: a call's values are
               counted between ``int(min)`` and ``int(max)``, truncated towards 0, though the bins are taken to span min to max.
               Values outside are not counted; where both are 0, torch.histc takes the values' own range
act_method 3   Histogram where the layer's range_parm is at most 50, else MeanMinMax

``range_parm`` of a linear is max(|x|) / std over the first five samples of the float model, where std is the largest over samples of
``(x - (channel max + channel min)).std()`` - the sum, where a centre would be half of it - of all elements of one sample.

All was read off the tensor operations that msModelSlim 26.1.0 runs.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .rounding import linear_parameters

__all__ = ["CalmRange", "ChannelRange", "Histogram", "MeanMinMax", "Observer", "observer_for", "split_by_digits"]

CALM_RANGE = 50.0
"""act_method 3 trusts a histogram up to this range_parm."""


class Observer(Protocol):
    """Sees each call's activations, and says between which values they lie."""

    def update(self, values: Tensor) -> None: ...

    def range(self) -> tuple[Tensor, Tensor]:
        """Minimum and maximum, scalars."""
        ...


def observer_for(act_method: int, range_parm: float) -> Observer:
    """The observer of a linear's input: by ``act_method``, and for 3 by the layer's ``range_parm``."""
    histogram = act_method == 2 or (act_method == 3 and range_parm <= CALM_RANGE)
    return Histogram() if histogram else MeanMinMax()


class MeanMinMax:
    """The mean of the calls' minima, and of their maxima, in the activations' dtype (act_method 1)."""

    def __init__(self) -> None:
        self._lows: list[Tensor] = []
        self._highs: list[Tensor] = []

    def update(self, values: Tensor) -> None:
        self._lows.append(values.min().cpu())
        self._highs.append(values.max().cpu())

    def range(self) -> tuple[Tensor, Tensor]:
        return torch.stack(self._lows).mean(), torch.stack(self._highs).mean()


class Histogram:
    """A histogram whose ends are cut where the L2 error of 256 levels is least (act_method 2). float32, on the CPU."""

    upsampling = 128
    levels = 256
    step = 1e-5

    def __init__(self, bins: int = 2048) -> None:
        self.bins = bins
        self._counts = torch.zeros(bins)
        self._low = torch.tensor(float("inf"))
        self._high = torch.tensor(float("-inf"))

    def update(self, values: Tensor) -> None:
        if values.numel() == 0:
            return
        seen = values.detach().float().cpu()
        low, high = seen.min(), seen.max()
        if torch.isinf(self._low):
            self._counts, self._low, self._high = self._count(seen, low, high), low, high
            return
        low, high = torch.minimum(low, self._low), torch.maximum(high, self._high)
        width = (self._high - self._low) / (self.bins * self.upsampling)
        if width == 0:  # one value so far: the tool divides by zero here
            self._counts = self._count(seen, low, high) + torch.histc(self._low, self.bins, float(low), float(high)) * self._counts.sum()
            self._low, self._high = low, high
            return
        downsampling = int(torch.ceil((high - low) / (width * self.bins)).item())
        high = high + (width * self.bins * downsampling - (high - low))  # only the maximum moves, so that 0 stays a minimum
        start = int(torch.round((self._low - low) / width).item())
        counts = self._count(seen, low, high)
        if low == self._low and high == self._high:
            counts += self._counts
        else:
            counts = counts + self._rebinned(downsampling, start)
        self._counts, self._low, self._high = counts, low, high

    def _count(self, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Counts by bin, between the *truncated* ends (see the module's docstring)."""
        return torch.histc(values, self.bins, min=int(low), max=int(high))

    def _rebinned(self, downsampling: int, start: int) -> Tensor:
        """The counts so far, in bins of the new range: each is split into ``upsampling`` parts, and ``downsampling`` make a bin."""
        fine = torch.zeros(self.bins * downsampling)
        fine[start : start + self.bins * self.upsampling] = self._counts.repeat_interleave(self.upsampling)
        total = torch.cumsum(fine, 0, dtype=torch.float64)[downsampling - 1 :: downsampling]
        before = torch.zeros(self.bins)
        before[1:] = total[:-1].float()
        return ((total - before) / self.upsampling).float()

    def range(self) -> tuple[Tensor, Tensor]:
        start, end = self._search()
        width = (self._high - self._low) / self.bins
        return self._low + width * start, self._low + width * (end + 1)

    def _search(self) -> tuple[int, int]:
        """First and last bin to keep: ends are moved inwards by ``step`` of the mass while the error falls."""
        total = float(self._counts.sum())
        cumulative = torch.cumsum(self._counts, 0).tolist()  # not decreasing, so that bisection finds the next bin
        start, end, alpha, beta, least = 0, self.bins - 1, 0.0, 1.0, float("inf")
        while alpha < beta:
            next_alpha, next_beta = alpha + self.step, beta - self.step
            left = bisect.bisect_left(cumulative, float(np.float32(next_alpha * total)), start, end)
            right = max(bisect.bisect_right(cumulative, float(np.float32(next_beta * total)), start, end + 1) - 1, start)
            next_start, next_end = start, end
            if left - start > end - right:
                next_start, alpha = left, next_alpha
            else:
                next_end, beta = right, next_beta
            if (next_start, next_end) == (start, end):
                continue
            error = self._error(next_start, next_end)
            if error > least:
                break
            least, start, end = error, next_start, next_end
        return start, end

    def _error(self, start: int, end: int) -> float:
        """The L2 error of quantizing the histogram with levels that span bins ``start`` to ``end``."""
        width = (self._high.item() - self._low.item()) / self.bins
        level = width * (end - start + 1) / self.levels
        if level == 0.0:
            return 0.0
        begin = (torch.arange(self.bins) - start) * width
        finish = begin + width
        first = torch.div(begin, level, rounding_mode="floor").clamp(0, self.levels - 1)
        last = torch.div(finish, level, rounding_mode="floor").clamp(0, self.levels - 1)
        density = self._counts / width
        half = torch.tensor(level / 2)

        def squares(low: Tensor, high: Tensor) -> Tensor:
            return density * ((high * high * high - low * low * low) / 3)

        norm = torch.zeros(self.bins)
        norm += squares(begin - (first + 0.5) * level, torch.ones(self.bins) * (level / 2))
        norm += (last - first - 1) * squares(-half, half)
        norm += squares(-half, finish - (last * level + level / 2))
        return float(norm.sum())


@dataclass
class CalmRange:
    """What ``range_parm`` needs of one linear's input over samples; scalars in the activations' dtype."""

    high: Tensor | None = None
    low: Tensor | None = None
    std: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """One sample's input [..., in]."""
        rows = values.detach().reshape(-1, values.shape[-1])
        high, low = rows.max(), rows.min()
        std = (rows - (rows.amax(0) + rows.amin(0))).std()
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.std = std if self.std is None else torch.maximum(self.std, std)

    def range_parm(self) -> float:
        """The ratio, rounded to the activations' dtype. 0 where nothing was seen."""
        if self.high is None or self.low is None or self.std is None:
            return 0.0
        return float(torch.maximum(self.high.abs(), self.low.abs()) / self.std)


@dataclass
class ChannelRange:
    """Extremes by channel over all samples, [channels] in the activations' dtype: the KV cache's (C8)."""

    high: Tensor | None = None
    low: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """One call's values [..., channels]."""
        rows = values.detach().reshape(-1, values.shape[-1])
        high, low = rows.amax(0), rows.amin(0)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.low = low if self.low is None else torch.minimum(self.low, low)

    def parameters(self, symmetric: bool) -> tuple[Tensor, Tensor] | None:
        """Scale and offset in 8 bits, [channels] on the CPU; None if nothing was seen."""
        if self.high is None or self.low is None:
            return None
        scale, offset = linear_parameters(self.low, self.high, 8, symmetric)
        return scale.cpu(), offset.cpu()


def split_by_digits(values: Tensor, bits: int) -> Tensor:
    """16-bit activations [..., in] as per-group weights' calibration and fake model pass them on: in three ``bits``-bit digits.

    Each token is divided by 1.001 times its largest magnitude; the first digit has 2^(b-1) - 1 steps, the other two 2^b - 1 each,
    rounded down. In the activations' dtype. A token of zeros stays zero (the tool divides by zero).
    """
    first, digit = 2 ** (bits - 1) - 1, 2**bits - 1
    rows = values.reshape(-1, values.shape[-1])
    absmax = rows.abs().amax(-1, keepdim=True) * 1.001
    unit = torch.where(absmax == 0, torch.zeros_like(rows), rows / absmax)
    total: Tensor = torch.floor(unit * first) / first
    second = torch.floor((unit - total) * 1 * first * digit).clamp(max=digit)
    total = total + second / digit / first
    third = torch.floor((unit - total) * digit * first * digit).clamp(max=digit)
    total = total + third / digit**2 / first
    return (total * absmax).reshape(values.shape)
