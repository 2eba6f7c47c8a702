"""AWQ's searches and its grid against plain re-implementations in float64, one weight after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from formats.errors import RefusedError, UnreadableError, UsageError
from quantize.awq import clipped, is_clipped, round_awq, search_clip, search_scale

IN, OUT, GROUP = 64, 24, 16


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(inputs=IN, seed=0):
    """[in]: how large each channel is. Some are a hundred times others."""
    return torch.exp(1.5 * random(inputs, seed=seed))


class Mlp(nn.Module):
    """Two linears that share an input, and a product of them."""

    def __init__(self, seed=1):
        super().__init__()
        self.gate, self.up = nn.Linear(IN, OUT, bias=False), nn.Linear(IN, OUT, bias=False)
        self.gate.weight.data = random(OUT, IN, seed=seed) * 0.2
        self.up.weight.data = random(OUT, IN, seed=seed + 1) * 0.2

    def forward(self, x):
        return nn.functional.silu(self.gate(x)) * self.up(x)


def setting(seed=0, dtype=torch.float32):
    """A module, some samples [tokens, in] and the mean of their magnitudes."""
    module, samples = Mlp(seed + 10).to(dtype), [(random(20, IN, seed=seed * 10 + i) * uneven(seed=seed)).to(dtype) for i in range(3)]
    return module, samples, torch.cat(samples).float().abs().mean(0)


def fake(weight):
    return round_awq("a", weight, 4, False, GROUP, torch.float32).fake


def search(module, samples, x_mean, **options):
    options = {"fake": fake, "group_size": GROUP, "forward": lambda: (module(sample) for sample in samples)} | options
    return search_scale("mlp", [module.gate, module.up], x_mean, **options)


def plain_fake(weight, bits=4, symmetric=False, width=GROUP):
    """As a loop over groups, in the weight's dtype."""
    found, zero = weight.clone(), weight.new_zeros(())
    for row in found:
        for start in range(0, len(row), width):
            group = row[start : start + width]
            if symmetric:
                scale = group.abs().max().clamp(min=1e-5) / (2 ** (bits - 1) - 1)
                group.copy_((group / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale)
                continue
            low, high = torch.minimum(group.min(), zero), torch.maximum(group.max(), zero)
            scale = (high - low).clamp(min=1e-5) / (2**bits - 1)
            zero_point = -torch.round(low / scale)
            group.copy_((((group / scale).round() + zero_point).clamp(0, 2**bits - 1) - zero_point) * scale)
    return found


@pytest.mark.parametrize("duo_scaling", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_scale_is_the_one_of_a_plain_search(seed, duo_scaling):
    module, samples, x_mean = setting(seed)
    if seed == 2:  # an input that is never there, and one that nothing reads
        for sample in samples:
            sample[:, 5] = 0
        x_mean[5] = module.gate.weight.data[:, 6] = module.up.weight.data[:, 6] = 0
    found = search(module, samples, x_mean, duo_scaling=duo_scaling)

    weights = [linear.weight.data.double() for linear in (module.gate, module.up)]
    x = torch.cat(samples).double()

    def output(gate, up):
        return nn.functional.silu(x @ gate.T) * (x @ up.T)

    groups = torch.cat(weights).abs().reshape(-1, GROUP)
    w_mean = (groups / (groups.amax(1, keepdim=True) + 1e-6)).reshape(-1, IN).mean(0)
    errors, scales = [], []
    for step in range(20):
        ratio = step / 20
        scale = x.abs().mean(0) ** ratio
        if duo_scaling:
            scale = scale / (w_mean ** (1 - ratio) + 1e-4)
        scale = scale.clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()) ** 0.5
        changed = [plain_fake(weight * scale) / scale for weight in weights]
        errors.append(float((output(*changed) - output(*weights)).square().mean()))
        scales.append(scale)
    unscaled = float((output(*map(plain_fake, weights)) - output(*weights)).square().mean())
    best = errors.index(min(errors))
    assert found.ratio == best / 20
    torch.testing.assert_close(found.scale, scales[best].float(), rtol=1e-4, atol=0)
    assert found.error == pytest.approx(errors[best], rel=1e-3)
    assert found.unscaled_error == pytest.approx(unscaled, rel=1e-3)
    assert found.error < 0.7 * unscaled


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models(dtype):
    module, samples, x_mean = setting(dtype=dtype)
    found = search(module, samples, x_mean)
    assert found.scale.dtype == torch.float32
    assert found.error < 0.8 * found.unscaled_error
    assert module.gate.weight.dtype == dtype


def test_no_scaling_is_taken_where_it_is_best():
    module, samples, x_mean = setting()
    for linear in (module.gate, module.up):  # codes times a power of two, each group with its whole range: rounding loses nothing
        codes = (random(OUT, IN // GROUP, GROUP, seed=5) * 3).round().clamp(-8, 7)
        codes[..., 0], codes[..., 1] = -8, 7
        linear.weight.data = codes.reshape(OUT, IN) / 64
    found = search(module, samples, x_mean)
    assert (found.ratio, found.error, found.unscaled_error) == (None, 0.0, 0.0)
    assert torch.equal(found.scale, torch.ones(IN))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("grid", [1, 4])
def test_the_search_is_never_worse_than_no_scaling(seed, grid):
    module, samples, x_mean = setting(seed)
    found = search(module, samples, x_mean, grid=grid)
    for linear in (module.gate, module.up):
        linear.weight.data = fake(linear.weight.data * found.scale) / found.scale
    fresh, _, _ = setting(seed)
    with torch.no_grad():
        error = float(torch.cat([(module(sample) - fresh(sample)).square() for sample in samples]).mean())
    assert error == pytest.approx(found.error, rel=1e-5)
    assert found.error <= found.unscaled_error


def test_the_weights_are_what_they_were():
    module, samples, x_mean = setting()
    before = [(linear.weight, linear.weight.data_ptr(), linear.weight.data.clone()) for linear in (module.gate, module.up)]

    def check():
        for linear, (parameter, place, values) in zip((module.gate, module.up), before, strict=True):
            assert linear.weight is parameter
            assert linear.weight.data_ptr() == place
            assert torch.equal(linear.weight, values)

    search(module, samples, x_mean)
    check()
    runs = []

    def breaks():
        runs.append(None)
        if len(runs) == 4:
            assert not torch.equal(module.gate.weight, before[0][2])
            raise KeyboardInterrupt
        yield from (module(sample) for sample in samples)

    with pytest.raises(KeyboardInterrupt):
        search(module, samples, x_mean, forward=breaks)
    check()
    with pytest.raises(ZeroDivisionError):
        search(module, samples, x_mean, fake=lambda weight: weight / (1 // (weight is None)))
    check()


def test_samples_are_run_one_after_the_other():
    module, samples, x_mean = setting()
    alive, most = [0], [0]

    class Counted(torch.Tensor):
        def __del__(self):
            alive[0] -= 1

    def outputs():
        for sample in samples * 3:
            output = module(sample).as_subclass(Counted)
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            yield output
            del output

    search(module, samples, x_mean, forward=outputs, grid=3)
    assert most[0] <= len(samples * 3) + 3  # the float outputs, and one or two


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error_that_names_the_layer(value):
    module, samples, x_mean = setting()
    x_mean[3] = value
    with pytest.raises(UnreadableError, match="mlp: 1 of 64 input channels held NaN"):
        search(module, samples, x_mean)
    module, samples, x_mean = setting()
    samples[1][2, 3] = value
    with pytest.raises(UnreadableError, match="mlp: the float model's output holds NaN"):
        search(module, samples, x_mean)
    module, samples, x_mean = setting()
    module.up.weight.data[0, 0] = value
    with pytest.raises(UnreadableError, match="mlp: the weight holds NaN"):
        search(module, samples, x_mean)
    module, samples, x_mean = setting()
    with pytest.raises(UnreadableError, match="mlp: its output with a rounded weight is not finite"):
        search(module, samples, x_mean, fake=lambda weight: weight * value)


def test_a_ratio_whose_output_is_not_finite_is_passed_over():
    module, samples, x_mean = setting()
    want, runs = search(module, samples, x_mean), []

    def broken_at_first(weight):
        runs.append(None)
        return fake(weight) * (float("nan") if len(runs) in (3, 4) else 1)  # two weights each: without a scale, ratio 0, ratio 0.05, ...

    found = search(module, samples, x_mean, fake=broken_at_first)
    assert want.ratio != 0
    assert (found.ratio, found.error) == (want.ratio, want.error)


def test_a_ratio_whose_weights_overflow_is_passed_over():
    module, samples, x_mean = setting(dtype=torch.float16)
    module.gate.weight.data[:, x_mean.argmax()] = 30000.0
    samples = [sample * 1e-4 for sample in samples]
    found = search(module, samples, x_mean * 1e-4)
    assert float((module.gate.weight.data.float() * found.scale).abs().max()) < 65504


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forward": lambda: iter(())}, "mlp: saw no token in calibration"),
        ({"group_size": 48}, "mlp: 64 inputs are not whole groups of 48"),
        ({"grid": 0}, "mlp: 0 ratios were asked for"),
        ({"x_mean": torch.ones(8)}, r"mlp: the mean input is of shape \[8\], and a linear has 64 inputs"),
    ],
)
def test_what_cannot_be_searched(options, message):
    module, samples, x_mean = setting()
    with pytest.raises(UsageError, match=message):
        search(module, samples, **({"x_mean": x_mean} | options))
    with pytest.raises(UsageError, match="mlp: a scale is of the input of linears"):
        search_scale("mlp", [], x_mean, list, fake, GROUP)


# -- clip


def plain_clip(weight, inputs, bits, symmetric, width):
    """The best magnitude of each output and group, by the outputs of each candidate; and how far the second best is."""
    found, margins = torch.zeros(len(weight), weight.shape[1] // width), torch.zeros(len(weight), weight.shape[1] // width)
    for row in range(len(weight)):
        for group in range(weight.shape[1] // width):
            part = slice(group * width, (group + 1) * width)
            values, x = weight[row : row + 1, part], inputs[:, part].double()
            errors = []
            for step in range(10):
                limit = float(values.abs().max() * (1 - step / 20))
                # In float32, as both clipped ends lie halfway between two zero points.
                changed = plain_fake(values.clamp(-limit, limit), bits, symmetric, width)
                errors.append(float((x @ (changed - values).double().T).square().mean()))
            best = errors.index(min(errors))
            found[row, group] = float(values.abs().max()) * (1 - best / 20)
            margins[row, group] = sorted(errors)[1] / errors[best] - 1
    return found, margins


@pytest.mark.parametrize(
    ("bits", "symmetric", "group_size", "tokens"), [(4, False, 16, 100), (4, True, 16, 100), (3, False, -1, 40), (4, False, 16, 9)]
)
def test_the_clip_is_the_one_of_a_plain_search(bits, symmetric, group_size, tokens):
    weight = random(10, IN, seed=2) ** 3 * 0.1
    inputs = random(tokens, IN, seed=3) * uneven()
    width = IN if group_size == -1 else group_size
    want, margins = plain_clip(weight, inputs, bits, symmetric, width)
    largest = search_clip("a", weight, inputs.reshape(1, tokens, IN), bits, symmetric, group_size, scale_dtype=torch.float32)
    clear = margins > 1e-4
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(largest[clear], want[clear])
    assert (want < weight.abs().reshape(10, -1, width).amax(-1)).float().mean() > 0.3  # there is something to clip

    limit = largest.repeat_interleave(width, 1)
    assert torch.equal(clipped(weight, largest), torch.maximum(torch.minimum(weight, limit), -limit))


def test_parameters_give_plain_tensors():
    weight = nn.Parameter(random(4, IN, seed=2))
    largest = search_clip("a", weight, random(90, IN, seed=3), 4, False, 16)
    rounded = round_awq("a", weight, 4, False, 16)
    assert not any(tensor.requires_grad for tensor in (largest, clipped(weight, largest), rounded.scale, rounded.fake))


def test_every_nth_token_is_taken():
    weight, inputs = random(4, IN, seed=2) ** 3, random(1100, IN, seed=3)
    every = search_clip("a", weight, inputs[::2], 3, False, 16, tokens=1000)
    inputs[1::2] = 1e6
    assert torch.equal(search_clip("a", weight, inputs, 3, False, 16, tokens=512), every)
    assert not torch.equal(search_clip("a", weight, inputs, 3, False, 16, tokens=1100), every)


def test_batches_of_outputs_do_not_change_the_clip(monkeypatch):
    weight, inputs = random(50, IN, seed=2) ** 3, random(90, IN, seed=3)
    whole = search_clip("a", weight, inputs, 4, False, 16)
    monkeypatch.setattr("quantize.awq.BATCH", 64 * 90)
    assert (search_clip("a", weight, inputs, 4, False, 16) == whole).float().mean() > 0.99


def test_a_half_precision_weight_is_clipped_in_its_own_dtype():
    weight = (random(8, IN, seed=2) ** 3).half()
    before = weight.clone()
    largest = search_clip("a", weight, random(90, IN, seed=3).half(), 3, False, 16)
    assert largest.dtype == torch.float16
    assert clipped(weight, largest).dtype == torch.float16
    assert torch.equal(weight, before)


def test_queries_and_keys_are_not_clipped():
    for name in ("q_proj", "k_proj", "Wqkv", "qkv_proj", "query_key_value", "key", "attention.query"):
        assert not is_clipped(f"model.layers.0.self_attn.{name}")
    for name in ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "block_sparse_moe.experts.0.w1", "value"):
        assert is_clipped(f"model.layers.0.{name}")


def test_what_cannot_be_clipped():
    weight = random(8, IN)
    with pytest.raises(UsageError, match="mlp: saw no token"):
        search_clip("mlp", weight, torch.zeros(0, IN), 4, False, 16)
    with pytest.raises(UsageError, match=r"mlp: inputs of shape \[3, 8\]"):
        search_clip("mlp", weight, torch.zeros(3, 8), 4, False, 16)
    with pytest.raises(UnreadableError, match="mlp: its inputs held NaN"):
        search_clip("mlp", weight, torch.full((3, IN), float("nan")), 4, False, 16)


# -- the grid


def test_an_asymmetric_group_by_hand():
    # (12 - -3) / 15 = 1, and -(-3) - 8 = -5 is the code of 0
    rounded = round_awq("a", torch.tensor([[-3.0, 12.0, 0.4, 5.6]]), 4, False, -1)
    assert (rounded.scale.tolist(), rounded.offset.tolist()) == ([[1.0]], [[-5.0]])
    assert rounded.codes.tolist() == [[-8, 7, -5, 1]]
    assert rounded.fake.tolist() == [[-3.0, 12.0, 0.0, 6.0]]


def test_a_symmetric_group_by_hand():
    rounded = round_awq("a", torch.tensor([[-7.0, 3.4, 0.6, 7.0]]), 4, True, -1)
    assert (rounded.scale.tolist(), rounded.offset.tolist()) == ([[1.0]], [[0.0]])
    assert rounded.codes.tolist() == [[-7, 3, 1, 7]]


def test_a_group_away_from_zero_keeps_its_values():
    weight = torch.tensor([[0.25, 0.25, 0.25, 0.25, 3.0, 18.0, 7.0, 10.0, -2.0, -2.5, -2.25, -2.0, 0.0, 0.0, 0.0, 0.0]])
    rounded = round_awq("a", weight, 4, False, 4)
    assert ((rounded.fake - weight).abs() <= rounded.scale.float().repeat_interleave(4, 1) * 0.51).all()
    assert rounded.offset.tolist() == [[-8.0, -8.0, 7.0, -8.0]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_law_of_what_is_stored_is_the_weight_bit_for_bit(dtype, scale_dtype, bits, symmetric):
    weight = (random(8, IN) * uneven()).to(dtype)
    rounded = round_awq("a", weight, bits, symmetric, GROUP, scale_dtype)
    assert rounded.scale.dtype == rounded.offset.dtype == scale_dtype
    assert rounded.scale.shape == rounded.offset.shape == (8, IN // GROUP)
    assert -(2 ** (bits - 1)) <= int(rounded.codes.min())
    assert int(rounded.codes.max()) < 2 ** (bits - 1)
    scale, offset = (part.float().repeat_interleave(GROUP, 1) for part in (rounded.scale, rounded.offset))
    assert torch.equal(rounded.fake, ((rounded.codes - offset) * scale).to(dtype))
    nearest = torch.round(weight.float() / scale + offset).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)  # of the scale as stored
    assert (rounded.codes == nearest).float().mean() > 0.99
    torch.testing.assert_close(rounded.fake.double(), plain_fake(weight.double(), bits, symmetric), rtol=0, atol=float(scale.max()) * 1.01)


def test_scales_that_the_dtype_cannot_hold():
    with pytest.raises(RefusedError, match=r"mlp: torch\.float16 cannot hold a scale"):
        round_awq("mlp", torch.full((2, 4), 1e7), 4, False, -1)
    assert (round_awq("mlp", torch.full((2, 4), 1e-9), 4, False, -1).scale > 0).all()
