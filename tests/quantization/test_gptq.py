"""GPTQ against the published formula in float64, which inverts the Hessian of what is left for every input; and what a file then holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from formats.errors import RefusedError, UnreadableError, UsageError
from quantize.gptq import PANEL, Hessian, round_gptq
from quantize.methods import Gptq

OUT, IN = 24, 96


def correlated(inputs=IN, tokens=256, seed=0):
    """Tokens [tokens, in] of a few directions and some noise, channels of different sizes."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(inputs // 6, inputs, generator=random)
    tokens = torch.randn(tokens, inputs // 6, generator=random) @ directions + 0.5 * torch.randn(tokens, inputs, generator=random)
    return tokens * torch.exp(0.7 * torch.randn(inputs, generator=random))


def some_weight(out=OUT, inputs=IN, seed=1):
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def hessian_of(tokens):
    hessian = Hessian(tokens.shape[1])
    hessian.add(tokens)
    return hessian


def error_of(difference, tokens):
    return float((difference.double() @ tokens.double().T).square().sum())


def rows_alike(codes, others):
    """The part of the rows that are equal. A sum in another order may decide a tie, from which on the rest of its row differs; ties are
    not rare, as the largest negative weight of a symmetric group lies halfway between two codes."""
    return float((codes == others).all(1).float().mean())


def plain_grid(values, bits, symmetric, dtype, mse):
    """Scale and zero point [out, 1] of values [out, n], as the tools count: codes 0 to 2^b - 1."""
    top = 2**bits - 1
    best = None
    for shrink in range(80 if mse else 1):
        scales, zeros, errors = [], [], []
        for row in values:
            low, high = min(row.min().item(), 0.0), max(row.max().item(), 0.0)
            if symmetric:
                high = max(-low, high)
                low = -high
            if low == high:
                low, high = -1.0, 1.0
            low, high = low * (1 - shrink / 100), high * (1 - shrink / 100)
            scale = torch.tensor((high - low) / top).to(dtype).double()
            zero = torch.tensor(2.0 ** (bits - 1)) if symmetric else torch.round(-low / scale).clamp(0, top)
            code = (torch.round(row / scale) + zero).clamp(0, top)
            scales.append(scale)
            zeros.append(zero.double())
            errors.append(((code - zero) * scale - row).abs().pow(mse).sum())
        found = [torch.stack(part) for part in (scales, zeros, errors)]
        if best is None:
            best = found
        else:
            better = found[2] < best[2]
            best = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
    return best[0].unsqueeze(1), best[1].unsqueeze(1)


def published(weight, tokens, bits, symmetric, width, settings, dtype):
    """Codes, scales, offsets and g_idx by the formula of optimal brain quantization, one input after the other."""
    weight, inputs = weight.double().clone(), weight.shape[1]
    hessian = 2 * tokens.double().T @ tokens.double() / len(tokens)
    diagonal = hessian.diagonal().clone()
    if settings.act_order:
        order = sorted(range(inputs), key=lambda i: -diagonal[i])
    elif settings.act_group_aware:
        groups = [range(start, start + width) for start in range(0, inputs, width)]
        groups.sort(key=lambda group: -max(diagonal[i] for i in group))
        order = [i for group in groups for i in sorted(group, key=lambda i: -diagonal[i])]
    else:
        order = list(range(inputs))
    dynamic = not settings.static_groups and width < inputs
    group_of = [place // width if dynamic and settings.act_order else i // width for place, i in enumerate(order)]
    grids = {g: plain_grid(weight[:, g * width : (g + 1) * width], bits, symmetric, dtype, settings.mse) for g in range(inputs // width)}

    hessian += settings.percdamp * diagonal.mean() * torch.eye(inputs)
    hessian, left = hessian[order][:, order], weight[:, order]
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    for place in range(inputs):
        inverse = torch.linalg.inv(hessian[place:, place:])
        group = group_of[place]
        if dynamic and place % width == 0:
            grids[group] = plain_grid(left[:, place : place + width], bits, symmetric, dtype, settings.mse)
        scale, zero = grids[group]
        value = left[:, place : place + 1]
        code = (torch.round(value / scale) + zero).clamp(0, 2**bits - 1)
        codes[:, order[place]] = (code - 2 ** (bits - 1)).squeeze(1).to(torch.int8)
        error = (value - (code - zero) * scale) / inverse[0, 0]
        left[:, place:] -= error * inverse[:1]
    scales = torch.cat([grids[group][0] for group in sorted(grids)], 1)
    offsets = torch.cat([grids[group][1] for group in sorted(grids)], 1) - 2 ** (bits - 1)
    g_idx = torch.zeros(inputs, dtype=torch.int32)
    for place, i in enumerate(order):
        g_idx[i] = group_of[place]
    return codes, scales, offsets, g_idx


CASES = {
    "symmetric": (4, True, 32, Gptq()),
    "asymmetric": (4, False, 32, Gptq()),
    "per_channel": (4, True, -1, Gptq()),
    "per_channel_asymmetric": (3, False, -1, Gptq(percdamp=0.1)),
    "eight_bits": (8, True, 32, Gptq()),
    "two_bits_asymmetric": (2, False, 16, Gptq()),
    "act_order": (4, True, 32, Gptq(act_order=True)),
    "act_order_asymmetric": (4, False, 16, Gptq(act_order=True)),
    "act_order_per_channel": (4, True, -1, Gptq(act_order=True)),
    "act_order_static": (4, False, 32, Gptq(act_order=True, static_groups=True)),
    "static": (4, True, 32, Gptq(static_groups=True)),
    "group_aware": (4, True, 32, Gptq(act_group_aware=True)),
    "group_aware_static": (4, False, 16, Gptq(act_group_aware=True, static_groups=True)),
    "group_aware_per_channel": (4, True, -1, Gptq(act_group_aware=True)),
    "groups_of_several_blocks": (4, True, 48, Gptq(block_size=16)),
    "groups_that_no_block_is_made_of": (4, False, 24, Gptq(block_size=40)),
    "mse": (4, True, 32, Gptq(mse=2.4)),
    "mse_asymmetric": (3, False, -1, Gptq(mse=2.0)),
}


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_formula(case, scale_dtype):
    bits, symmetric, group_size, settings = CASES[case]
    weight, tokens = some_weight(), correlated()
    rounded = round_gptq("a", weight, hessian_of(tokens), bits, symmetric, group_size, settings, scale_dtype)
    width = IN if group_size == -1 else group_size
    codes, scales, offsets, g_idx = published(weight, tokens, bits, symmetric, width, settings, scale_dtype)
    assert rows_alike(rounded.codes, codes) > 0.8
    alike = (rounded.codes == codes).all(1)
    assert rounded.scale.dtype == rounded.offset.dtype == scale_dtype
    one_step = max(torch.finfo(scale_dtype).eps, 1e-4)
    torch.testing.assert_close(rounded.scale[alike].double(), scales[alike], rtol=one_step, atol=0)
    assert (rounded.scale[alike].double() != scales[alike]).float().mean() < 0.05 or scale_dtype == torch.float32
    assert torch.equal(rounded.offset[alike].double(), offsets[alike])
    law = (codes - offsets[:, g_idx.long()]) * scales[:, g_idx.long()]
    assert error_of(rounded.fake - weight, tokens) == pytest.approx(error_of(law - weight, tokens), rel=0.03)
    regular = torch.arange(IN, dtype=torch.int32) // width
    assert (rounded.g_idx is None) == torch.equal(g_idx, regular)
    assert rounded.g_idx is None or torch.equal(rounded.g_idx, g_idx)


def test_by_hand():
    # The second input shares a token with the first: what 0.4 loses, rounded to 0, it makes up for: 1.2 + 0.4 * H01 / H11 = 1.6.
    # The scale is 2 * 7.5 / 15 = 1; -7.5 has the code -8, and the third input stands alone.
    tokens = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    hessian = hessian_of(tokens)
    torch.testing.assert_close(hessian.matrix, torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) * 2 / 3)
    rounded = round_gptq("a", torch.tensor([[0.4, 1.2, -7.5]]), hessian, 4, True, -1, Gptq(percdamp=0))
    assert rounded.scale.tolist() == [[1.0]]
    assert rounded.codes.tolist() == [[0, 2, -8]]
    assert rounded.fake.tolist() == [[0.0, 2.0, -8.0]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_what_the_output_loses_is_less_than_by_rounding_to_nearest(group_size, symmetric):
    weight, tokens = some_weight(), correlated()
    hessian = hessian_of(tokens)
    apart = Hessian(IN)
    apart.add(torch.eye(IN))  # inputs that have nothing in common: nothing can be made up for
    nearest = round_gptq("a", weight, apart, 4, symmetric, group_size)
    width = IN if group_size == -1 else group_size
    steps = weight / nearest.scale.float().repeat_interleave(width, 1)
    assert ((nearest.fake / nearest.scale.float().repeat_interleave(width, 1) - steps).abs() < 1.01).all()
    baseline = error_of(nearest.fake - weight, tokens)
    for settings in (Gptq(), Gptq(act_order=True), Gptq(act_group_aware=True), Gptq(act_order=True, static_groups=True)):
        rounded = round_gptq("a", weight, hessian, 4, symmetric, group_size, settings)
        assert error_of(rounded.fake - weight, tokens) < 0.5 * baseline


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["symmetric", "asymmetric", "per_channel", "act_order_asymmetric", "group_aware", "act_order_static"])
def test_the_law_of_what_is_stored_is_the_weight_bit_for_bit(case, dtype):
    bits, symmetric, group_size, settings = CASES[case]
    rounded = round_gptq("a", some_weight().to(dtype), hessian_of(correlated()), bits, symmetric, group_size, settings)
    width = IN if group_size == -1 else group_size
    assert rounded.codes.dtype == torch.int8
    assert rounded.codes.shape == (OUT, IN)
    assert rounded.scale.shape == rounded.offset.shape == (OUT, IN // width)
    assert -(2 ** (bits - 1)) <= int(rounded.codes.min())
    assert int(rounded.codes.max()) < 2 ** (bits - 1)
    groups = torch.arange(IN) // width if rounded.g_idx is None else rounded.g_idx.long()
    law = (rounded.codes - rounded.offset[:, groups].float()) * rounded.scale[:, groups].float()
    assert rounded.fake.dtype == dtype
    assert torch.equal(rounded.fake, law.to(dtype))


def test_codes_made_of_the_original_weight_would_lose_the_gain():
    """Who stores GPTQ's scales and rounds the weight again has rounded to nearest."""
    weight, tokens = some_weight(64), correlated()
    rounded = round_gptq("a", weight, hessian_of(tokens), 4, True, 32)
    scale = rounded.scale.float().repeat_interleave(32, 1)
    again = torch.round(weight / scale).clamp(-8, 7)
    stored = error_of(rounded.codes * scale - weight, tokens)
    assert stored == error_of(rounded.fake - weight, tokens)
    assert (again != rounded.codes).float().mean() > 0.2
    assert stored < 0.5 * error_of(again * scale - weight, tokens)


@pytest.mark.parametrize("settings", [Gptq(), Gptq(act_order=True), Gptq(static_groups=True)], ids=["plain", "act_order", "static"])
@pytest.mark.parametrize("group_size", [8, 32, 96, -1])
def test_blocks_do_not_change_the_result(group_size, settings):
    weight, hessian = some_weight(), hessian_of(correlated())
    whole = round_gptq("a", weight, hessian, 4, False, group_size, settings, torch.float32)
    for block_size in (1, 7, 32, 1000):
        other = round_gptq("a", weight, hessian, 4, False, group_size, dataclasses.replace(settings, block_size=block_size), torch.float32)
        assert rows_alike(other.codes, whole.codes) > 0.8


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_of_scales_leaves_outliers_out(symmetric):
    weight = some_weight()
    weight[::2, 5] = 1.0  # twenty times the others
    rounded = round_gptq("a", weight, hessian_of(correlated()), 2, symmetric, -1, Gptq(mse=1))
    scales, zeros = plain_grid(weight.double(), 2, symmetric, torch.float16, 1)
    assert (rounded.scale.double() == scales).float().mean() > 0.9
    assert (rounded.offset.double() == zeros - 2).float().mean() > 0.9
    unsearched, _ = plain_grid(weight.double(), 2, symmetric, torch.float16, 0)
    assert (scales[::2] < 0.3 * unsearched[::2]).float().mean() > 0.5


def test_act_order_groups_inputs_by_their_size():
    tokens = correlated()
    rounded = round_gptq("a", some_weight(), hessian_of(tokens), 4, True, 32, Gptq(act_order=True))
    largest_first = tokens.square().sum(0).argsort(descending=True)
    assert rounded.g_idx.dtype == torch.int32
    assert rounded.g_idx[largest_first].tolist() == [0] * 32 + [1] * 32 + [2] * 32


@pytest.mark.parametrize("settings", [Gptq(), Gptq(act_order=True)], ids=["plain", "act_order"])
def test_dead_inputs_weigh_nothing_and_change_nothing(settings):
    weight, tokens = some_weight(), correlated() * 0.01  # all diagonals are far below 1
    weight[:, [3, 90]] = 7.0
    tokens[:, [3, 90]] = 0
    live = [i for i in range(IN) if i not in (3, 90)]
    rounded = round_gptq("a", weight, hessian_of(tokens), 4, False, -1, settings)
    without = round_gptq("a", weight[:, live], hessian_of(tokens[:, live]), 4, False, -1, settings)
    assert torch.equal(rounded.scale, without.scale)
    assert rows_alike(rounded.codes[:, live], without.codes) > 0.8
    assert not rounded.fake[:, [3, 90]].any()
    if settings.act_order:
        groups = round_gptq("a", weight, hessian_of(tokens), 4, False, 32, settings).g_idx
        assert groups[[3, 90]].tolist() == [2, 2]


def test_groups_without_weights_or_without_negative_ones():
    weight = torch.cat([torch.zeros(2, 32), some_weight(2, 32).abs(), torch.full((2, 32), 1e-9)], 1)
    apart = Hessian(IN)
    apart.add(torch.eye(IN))
    symmetric = round_gptq("a", weight, apart, 4, True, 32)
    asymmetric = round_gptq("a", weight, apart, 4, False, 32)
    for rounded in (symmetric, asymmetric):
        assert torch.isfinite(rounded.fake).all()
        assert (rounded.scale > 0).all()
        assert not rounded.fake[:, :32].any()
        assert ((rounded.fake - weight).abs() <= rounded.scale.float().repeat_interleave(32, 1) * 0.51).all()
    assert (asymmetric.offset[:, 1] == -8).all()  # of values from 0 up


def test_the_same_again_and_nothing_that_is_given_changes():
    weight, tokens = some_weight(), correlated()
    before, hessian = weight.clone(), hessian_of(tokens)
    matrix = hessian.matrix
    one, two = (round_gptq("a", weight, hessian, 4, False, 32, Gptq(act_order=True, mse=2.4)) for _ in range(2))
    spent = hessian_of(tokens)
    fresh = round_gptq("a", weight, spent, 4, False, 32, Gptq(act_order=True, mse=2.4), last=True)
    for field in ("codes", "scale", "offset", "fake", "g_idx"):
        assert torch.equal(getattr(one, field), getattr(two, field))
        assert torch.equal(getattr(one, field), getattr(fresh, field))
    assert torch.equal(spent.diagonal, hessian.diagonal)
    assert torch.equal(weight, before)
    assert torch.equal(hessian.matrix, matrix)


def test_a_parameter_gives_plain_tensors():
    hessian = Hessian(IN)
    hessian.add(torch.nn.Parameter(correlated()))
    rounded = round_gptq("a", torch.nn.Parameter(some_weight()), hessian, 4, True, 32)
    assert not any(tensor.requires_grad for tensor in (rounded.scale, rounded.fake, hessian.matrix))


# -- the Hessian


@pytest.mark.parametrize("inputs", [IN, PANEL + 40])
def test_the_hessian_is_the_mean_over_tokens_in_any_batches(inputs):
    tokens = correlated(inputs, 120)
    want = (2 * tokens.double().T @ tokens.double() / 120).float()
    hessian = Hessian(inputs)
    assert hessian.saw_no_token
    for batch in (tokens[:1], tokens[1:1], tokens[1:81].reshape(2, 40, inputs), tokens[81:]):
        hessian.add(batch)
    assert hessian.tokens == 120
    assert not hessian.saw_no_token
    for found in (hessian, hessian_of(tokens), hessian_of(tokens.flip(0))):
        torch.testing.assert_close(found.matrix, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
        assert torch.equal(found.matrix, found.matrix.T)
        assert torch.equal(found.diagonal, found.matrix.diagonal())


def test_half_precision_inputs_are_summed_in_float32():
    tokens = correlated(tokens=4096).bfloat16()
    hessian = Hessian(IN)
    for batch in tokens.split(64):
        hessian.add(batch)
    want = (2 * tokens.double().T @ tokens.double() / 4096).float()
    torch.testing.assert_close(hessian.matrix, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_more_tokens_count_after_a_rounding():
    weight, tokens = some_weight(), correlated()
    hessian = hessian_of(tokens[:40])
    few = round_gptq("a", weight, hessian, 4, True, 32)
    hessian.add(tokens[40:])
    more, whole = (round_gptq("a", weight, one, 4, True, 32) for one in (hessian, hessian_of(tokens)))
    assert rows_alike(more.codes, whole.codes) > 0.8
    assert rows_alike(more.codes, few.codes) < 0.2


def test_settings_that_need_another_factor_get_it():
    weight, tokens = some_weight(), correlated()
    hessian = hessian_of(tokens)
    for settings in (Gptq(), Gptq(act_order=True), Gptq(percdamp=0.5), Gptq(act_group_aware=True), Gptq()):
        shared = round_gptq("a", weight, hessian, 4, True, 32, settings)
        assert torch.equal(shared.codes, round_gptq("a", weight, hessian_of(tokens), 4, True, 32, settings).codes)


def indefinite(size):
    """A Hessian of two inputs whose eigenvalues are 1 + size and 1 - size: no tokens make it, but rounding may."""
    hessian = hessian_of(torch.eye(2))
    hessian._upper.copy_(torch.tensor([[1.0, size], [size, 1.0]]))
    return hessian


def test_damping_grows_until_the_hessian_is_positive_definite():
    hessian = indefinite(1.5)
    rounded = round_gptq("a", torch.tensor([[0.4, -7.5]]), hessian, 4, True, -1)
    assert 0.5 < hessian.damping <= 1
    assert rounded.codes.tolist() == [[0, -7]]  # -7.5 + 0.4 * 1.5 / (1 + damping) > -7.5
    hessian = hessian_of(correlated(tokens=8))  # of rank 8
    round_gptq("a", some_weight(), hessian, 4, True, -1)
    assert hessian.damping == 0.01


def test_a_hessian_that_no_damping_mends_is_an_error():
    with pytest.raises(UnreadableError, match=r"mlp\.up: the Hessian of its inputs is not positive definite"):
        round_gptq("mlp.up", torch.ones(1, 2), indefinite(5.0), 4, True, -1)


# -- errors


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(value):
    tokens = correlated()
    tokens[7, 5] = value
    with pytest.raises(UnreadableError, match=r"mlp\.up: 1 of 96 input channels held NaN or an infinity"):
        round_gptq("mlp.up", some_weight(), hessian_of(tokens), 4, True, 32)


def test_a_weight_that_is_not_finite():
    weight = some_weight()
    weight[2, 5] = float("nan")
    with pytest.raises(UnreadableError, match=r"mlp\.up: the weight holds NaN"):
        round_gptq("mlp.up", weight, hessian_of(correlated()), 4, True, 32)


def test_no_token_is_not_rounding_to_nearest():
    with pytest.raises(UsageError, match=r"mlp\.up: saw no token in calibration"):
        round_gptq("mlp.up", some_weight(), Hessian(IN), 4, True, 32)


def test_scales_that_the_dtype_cannot_hold():
    weight = some_weight() * 1e7
    with pytest.raises(RefusedError, match=r"mlp\.up: torch\.float16 cannot hold a scale"):
        round_gptq("mlp.up", weight, hessian_of(correlated()), 4, True, 32)
    assert torch.isfinite(round_gptq("mlp.up", weight, hessian_of(correlated()), 4, True, 32, scale_dtype=torch.bfloat16).fake).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, True, 64), r"mlp\.up: 96 inputs are not whole groups of 64"),
        ((4, True, 0), r"mlp\.up: 96 inputs are not whole groups of 0"),
        ((1, True, 32), r"mlp\.up: 1 bits were asked for"),
        ((16, True, 32), r"mlp\.up: 16 bits were asked for"),
    ],
)
def test_what_cannot_be_rounded(arguments, message):
    with pytest.raises(UsageError, match=message):
        round_gptq("mlp.up", some_weight(), hessian_of(correlated()), *arguments)


def test_the_hessian_of_other_inputs():
    with pytest.raises(UsageError, match=r"mlp\.up: the Hessian is of 48 inputs, and the weight has 96"):
        round_gptq("mlp.up", some_weight(), hessian_of(correlated(48)), 4, True, 32)
    with pytest.raises(UsageError, match=r"\[3, 48\] are not those of a linear with 96 inputs"):
        Hessian(IN).add(torch.zeros(3, 48))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"percdamp": -0.1}, r"percdamp: -0\.1 is not between 0 and 1"),
        ({"percdamp": float("nan")}, "percdamp: nan is not between"),
        ({"percdamp": True}, "percdamp: True is not a number"),
        ({"block_size": 0}, "block_size: 0 is less than 1"),
        ({"block_size": 1.5}, r"block_size: 1\.5 is not a whole number"),
        ({"mse": -1}, "mse: -1 is not between"),
        ({"mse": float("inf")}, "mse: inf is not between"),
        ({"act_order": 1}, "act_order: 1 is neither"),
        ({"static_groups": "no"}, "static_groups: 'no' is neither"),
        ({"act_order": True, "act_group_aware": True}, "act_group_aware: act_order already sorts"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UsageError, match=message):
        Gptq(**settings)
