"""Observers: by hand, and as the real msModelSlim 26.1.0 answered the same calls."""

from __future__ import annotations

import pytest
import torch

from quantize.observers import CalmRange, ChannelRange, Histogram, MeanMinMax, observer_for, split_by_digits
from quantize.rounding import linear_parameters


def wave(count, step, height, dtype):
    """Values that any machine makes alike, [1, count / 8, 8], most of them small."""
    values = torch.sin(torch.arange(count, dtype=torch.float64) * step) ** 41 * height
    return values.to(torch.float32).to(dtype).reshape(1, -1, 8)


CALLS = {
    "one": [(4000, 1.7, 6.3)],
    "grows": [(4000, 1.7, 2.4), (4000, 0.37, 6.9), (4000, 2.3, 4.1)],
    "small": [(4000, 1.7, 0.8), (4000, 0.9, 0.93)],  # both ends truncate to 0
    "shrinks": [(800, 1.7, 9.5), (800, 0.9, 0.3)],
}

RECORDED = {  # quant_funcs.HistogramObserver(qscheme=torch.per_tensor_affine) of the real tool, after these calls
    ("one", "float32"): (-6.2876386642456055, 6.299992084503174),
    ("grows", "float32"): (-6.899994373321533, 6.869868755340576),
    ("small", "float32"): (-0.9299188852310181, 0.9316620826721191),
    ("shrinks", "float32"): (-9.329427719116211, 9.49462604522705),
    ("one", "bfloat16"): (-6.3125, 6.2755126953125),
    ("grows", "bfloat16"): (-6.90625, 6.855373382568359),
    ("small", "bfloat16"): (-0.9296875, 0.9337210655212402),
    ("shrinks", "bfloat16"): (-9.5, 9.2958984375),
}


@pytest.mark.parametrize(("calls", "dtype"), RECORDED)
def test_histogram_ends_are_the_tools(calls, dtype):
    observer = Histogram()
    for arguments in CALLS[calls]:
        observer.update(wave(*arguments, getattr(torch, dtype)))
    assert tuple(float(end) for end in observer.range()) == pytest.approx(RECORDED[calls, dtype], rel=1e-6)


def test_a_histogram_cuts_lonely_outliers():
    values = torch.cat([torch.linspace(-1.5, 1.5, 1_000_000), torch.tensor([12.0])])
    observer = Histogram()
    observer.update(values)
    low, high = observer.range()
    assert float(low) == pytest.approx(-1.5, abs=0.1)
    assert float(high) < 3


def test_a_histogram_of_one_value_does_not_divide_by_zero():
    observer = Histogram()
    observer.update(torch.full((4, 8), 2.0))
    observer.update(torch.full((4, 8), 3.0))
    low, high = observer.range()
    assert torch.isfinite(low)
    assert torch.isfinite(high)


def test_min_max_is_the_mean_over_calls():
    observer = MeanMinMax()
    observer.update(torch.tensor([[-1.0, 2.0]]))
    observer.update(torch.tensor([[-4.0, 3.0]]))
    assert [float(end) for end in observer.range()] == [-2.5, 2.5]


def test_method_three_goes_by_range_parm():
    assert isinstance(observer_for(1, 1.0), MeanMinMax)
    assert isinstance(observer_for(2, 99.0), Histogram)
    assert isinstance(observer_for(3, 50.0), Histogram)
    assert isinstance(observer_for(3, 50.1), MeanMinMax)


def test_range_parm_by_hand():
    ratio = CalmRange()
    assert ratio.range_parm() == 0
    # channel max + min: 4 and 2; centred: -4, 0, 0 and -2, 0, -1; mean -7/6; sum of squares 21 - 6 * (7/6)^2; over 5
    ratio.update(torch.tensor([[[0.0, 0.0], [4.0, 2.0], [4.0, 1.0]]]))
    assert ratio.range_parm() == pytest.approx(4 / ((21 - 6 * (7 / 6) ** 2) / 5) ** 0.5)
    ratio.update(torch.tensor([[-9.0, 0.0], [0.0, 0.0]]))  # a larger magnitude and a larger std
    assert ratio.range_parm() == pytest.approx(9 / float(torch.tensor([0.0, 0.0, 9.0, 0.0]).std()))


def test_cache_channels_see_all_samples():
    channels = ChannelRange()
    assert channels.parameters(symmetric=True) is None
    channels.update(torch.tensor([[[1.27, -0.5], [-0.3, 0.5]]]))
    channels.update(torch.tensor([[[0.0, -2.54]]]))
    scale, offset = channels.parameters(symmetric=True)
    assert scale.tolist() == pytest.approx([0.01, 0.02])
    assert offset.tolist() == [0, 0]
    scale, offset = channels.parameters(symmetric=False)
    assert scale.tolist() == pytest.approx([1.57 / 255, 3.04 / 255])
    assert offset.tolist() == [round(0.3 / (1.57 / 255)) - 128, round(2.54 / (3.04 / 255)) - 128]


def test_parameters_of_nothing_but_zeros():
    scale, offset = linear_parameters(torch.tensor(0.0), torch.tensor(0.0), 8, symmetric=False)
    assert (scale.item(), offset.item()) == (2.0**-23, -128.0)


@pytest.mark.parametrize(("bits", "error"), [(4, 1 / 7 / 15), (8, 1 / 127 / 255)])
def test_digits_lose_little_and_keep_zeros(bits, error):
    values = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    values[0, 3] = 0
    split = split_by_digits(values, bits)
    assert split.shape == values.shape
    assert not split[0, 3].any()
    assert float(((split - values).abs() / values.abs().amax(-1, keepdim=True).clamp(min=1)).max()) <= error
    assert not torch.equal(split, values)


def test_digits_by_hand():
    # 1.001 * 2 is one; 2 / 2.002 = .999: 6/7, then floor(.142 * 7 * 15 = 14.9) = 14, then floor(.0086 * 15 * 7 * 15 = 13.4)
    unit = 2.0 / (2.0 * 1.001)
    total = 6 / 7 + 14 / 15 / 7
    total += int((unit - total) * 15 * 7 * 15) / 225 / 7
    assert split_by_digits(torch.tensor([[2.0, 0.0]]), 4)[0].tolist() == pytest.approx([total * 2.002, 0.0], rel=1e-5)
