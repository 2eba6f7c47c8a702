"""Weights to codes: by hand, and bit for bit as the real msModelSlim's files say."""

from __future__ import annotations

import goldens
import pytest
import torch

from quantize.config import QuantConfig
from quantize.layers import quantize_linear, with_inputs
from quantize.rounding import EPSILON, round_groups, round_lowbit, round_outliers, round_plain, round_sparse, round_two_stages

CASES = sorted(
    folder
    for family in (goldens.WEIGHT_ONLY, goldens.W8_FAMILY)
    for folder in family.iterdir()
    if (folder / "golden_case.json").exists()
    and not goldens.case_of(folder)["anti"]  # smoothing changes weights first
    and goldens.case_of(folder)["quant_config"].get("w_method") != "GPTQ"
    and not list(folder.glob("*.npy"))
)


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_every_code_scale_and_offset_equals_the_tools(folder):
    case = goldens.case_of(folder)
    config = QuantConfig(**case["quant_config"])
    mix = case["opt"].get("mix_cfg", {})
    model = goldens.load_model(goldens.source_of(folder), goldens.dtype_of(folder))
    want = goldens.stored(folder)
    linears = dict(model.named_modules())
    seen = 0
    for name, kind in goldens.quantized(folder).items():
        layer_config = config.for_layer(kind.lower()) if mix else config
        layer, _ = quantize_linear(name, linears[name], layer_config)
        assert torch.equal(layer.codes, goldens.unpacked(want[f"{name}.weight"], layer.codes.shape)), name
        for field in ("weight_scale", "weight_offset", "weight_scale_second", "weight_offset_second"):
            if f"{name}.{field}" in want:
                got, stored = getattr(layer, field), want[f"{name}.{field}"]
                assert got.dtype == stored.dtype, (name, field)
                assert torch.equal(got, stored), (name, field)
                seen += 1
        if f"{name}.quant_bias" in want:
            whole = with_inputs(layer, want[f"{name}.input_scale"], want[f"{name}.input_offset"])
            deq_scale = want[f"{name}.deq_scale"]
            if deq_scale.dtype == torch.int64:
                deq_scale = deq_scale.to(torch.int32).view(torch.float32)
            assert torch.equal(whole.deq_scale, deq_scale), name
            assert torch.equal(whole.quant_bias, want[f"{name}.quant_bias"]), name
            seen += 1
    assert seen >= 7


def test_a_symmetric_row_by_hand():
    rounded = round_plain(torch.tensor([[-12.7, 6.3, 0.04, 0.06]]), 8, symmetric=True, per_tensor=False)
    assert rounded.scale.tolist() == [[pytest.approx(0.1)]]
    assert rounded.codes.tolist() == [[-127, 63, 0, 1]]
    assert rounded.offset.tolist() == [[0]]
    assert rounded.fake[0].tolist() == pytest.approx([-12.7, 6.3, 0.0, 0.1])


def test_an_asymmetric_row_is_widened_to_hold_zero():
    # 3..15 becomes 0..15: one step a level, and code -8 is zero
    rounded = round_plain(torch.tensor([[3.0, 15.0, 7.4]]), 4, symmetric=False, per_tensor=False)
    assert (rounded.scale.item(), rounded.offset.item()) == (1.0, -8.0)
    assert rounded.codes.tolist() == [[-5, 7, -1]]


def test_an_asymmetric_group_is_not_widened():
    # levels 3..18; -round(3 / 1) - 8 = -11, below what 4 bits hold
    weight = torch.tensor([[3.0, 18.0, 7.0, 10.0]]).repeat(1, 8)
    rounded = round_groups(weight, 4, symmetric=False, group_size=32)
    assert (rounded.scale.item(), rounded.offset.item()) == (1.0, -11.0)
    assert rounded.codes[0, :4].tolist() == [-8, 7, -4, -1]
    assert torch.equal(rounded.fake, weight)


def test_groups_that_the_tool_divides_by_zero_are_finite():
    weight = torch.cat([torch.zeros(1, 32), torch.full((1, 32), 2.0)], 1)
    symmetric = round_groups(weight, 4, symmetric=True, group_size=32)
    assert symmetric.scale.tolist() == [[EPSILON, pytest.approx(2 / 7)]]
    asymmetric = round_groups(weight, 4, symmetric=False, group_size=32)
    for rounded in (symmetric, asymmetric):
        scale, offset = rounded.scale.repeat_interleave(32, 1), rounded.offset.repeat_interleave(32, 1)
        torch.testing.assert_close((rounded.codes - offset) * scale, weight)
    zero = torch.zeros(2, 32)
    assert not round_two_stages(zero, 32).codes.any()
    assert not round_outliers(zero, 4, False, 0.05, 3.0).codes.any()
    assert not round_sparse(zero, 4, False, 0.05).codes.any()
    assert not round_lowbit(zero, 8, True, True).codes.any()
    assert not round_plain(zero, 4, True, False, hqq=True).codes.any()


def test_per_tensor_scales_are_one_number():
    weight = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    assert round_plain(weight, 8, True, per_tensor=True).scale.shape == (1,)
    assert round_lowbit(weight, 8, True, per_tensor=True).scale.shape == ()


def test_bfloat16_arithmetic_is_not_float32_arithmetic():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded = round_plain(weight, 8, True, False)
    plain = torch.round(weight.float() / rounded.scale.float()).to(torch.int8)
    assert 0.85 < (rounded.codes == plain).float().mean() < 0.95  # as spec section 1 measured: 91 %


def test_two_stages_by_hand():
    # absmax 119 makes the first stage the identity; groups: 119 / 7 = 17, and 3 / 7 -> 1
    weight = torch.zeros(1, 64)
    weight[0, :3], weight[0, 32:34] = torch.tensor([119.0, -34.0, 8.0]), torch.tensor([3.0, -3.0])
    rounded = round_two_stages(weight, 32)
    assert rounded.scale.tolist() == [[1.0]]
    assert rounded.scale_second.tolist() == [[17.0, 1.0]]
    assert rounded.codes[0, :3].tolist() == [7, -2, 0]
    assert rounded.codes[0, 32:34].tolist() == [3, -3]


def test_outliers_share_the_scale_of_the_others():
    weight = torch.full((1, 100), 7.0)
    weight[0, 0], weight[0, 1] = 100.0, 90.0
    rounded = round_outliers(weight, 4, False, fraction=0.02, sigma_factor=None)  # the second largest is the threshold, not beyond it
    assert rounded.scale.item() == pytest.approx(90 / 7)
    assert rounded.codes[0, :3].tolist() == [8, 7, 1]
    sparse = round_sparse(weight, 4, False, fraction=0.03)
    assert sparse.scale.item() == pytest.approx(1.0)
    assert sparse.codes[0, :3].tolist() == [100, 90, 7]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 64])
def test_hqq_is_never_worse_than_rounding_to_nearest(symmetric, group_size):
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(1)) ** 3

    def error(hqq):
        if group_size:
            fake = round_groups(weight, 4, symmetric, group_size, hqq).fake
        else:
            fake = round_plain(weight, 4, symmetric, False, hqq).fake
        return (fake - weight).abs().mean()

    assert error(True) <= error(False) * 1.001  # its scales are float16
    if symmetric:
        assert error(True) < error(False) * 0.995


def test_nothing_that_is_given_changes():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    before = weight.clone()
    round_plain(weight, 4, False, False, hqq=True)
    round_groups(weight, 4, True, 32, hqq=True)
    round_lowbit(weight, 8, False, True)
    round_outliers(weight, 4, False, 0.05, 3.0)
    round_sparse(weight, 4, True, 0.05)
    round_two_stages(weight, 32)
    assert torch.equal(weight, before)
