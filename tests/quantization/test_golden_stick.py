"""Golden Stick's arithmetic: from its float model to what it wrote, bit for bit; and by plain NumPy where no file of it is at hand."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from formats.errors import UnreadableError
from formats.ir import read
from formats.mindformers_file import MindFormersFile
from quantize import golden_stick as arithmetic
from quantize.blocks import to_torch
from quantize.golden_stick_config import Policy
from quantize.golden_stick_gptq import MeanHessian, compensated, inverse_factor, round_gptq
from quantize.golden_stick_layer import Extremes, MadeLinear, Smoothed
from quantize.golden_stick_search import Sampled, awq_scale, best_scale, clip_limits, clipped, weight_share
from quantize.golden_stick_tensors import laid_out

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden_stick"
LINEARS = [
    f"model.layers.{layer}.{name}_proj"
    for layer in (0, 1)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]


@cache
def tensors(name: str) -> dict[str, Tensor]:
    """A file's, under Hugging Face's names."""
    file = MindFormersFile(GOLDEN / f"{name}.ckpt")
    return {tensor: to_torch(np.array(read(file.tensor(tensor)))) for tensor in file.tensors}


def weight_of(name: str) -> Tensor:
    return tensors("llama_tiny_fp16_plain")[f"{name}.weight"]


def same(found: Tensor, wanted: Tensor) -> bool:
    return found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(found, wanted)


# -- against the tool's files


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("golden", ["rtn_a16w8_gs060", "ptq_a16w8_gs060", "ptq_a16w8_gs120", "ptq_a16w4_pg_gs120"])
def test_weights_alone(golden: str, name: str) -> None:
    approach, version = golden.split("_")[0], "gs1.2" if "gs120" in golden else "gs0.6"
    policy = Policy(w_bit=4, group_size=64) if "w4" in golden else Policy()
    rounded = arithmetic.round_weight(weight_of(name), policy.w_bit, True, policy.group_size)
    found, int4 = laid_out(name, MadeLinear(policy, rounded, torch.float16, None), approach, version)
    wanted = {tensor: value for tensor, value in tensors(golden).items() if tensor.startswith(f"{name}.")}
    assert found.keys() == wanted.keys()
    assert len(wanted) == 3
    assert all(same(found[tensor], value) for tensor, value in wanted.items())
    assert int4 == ([f"{name}._layer.weight"] if "w4" in golden else [])


def float_of(stored: Tensor) -> Tensor:
    return stored.to(torch.int32).view(torch.float32)


def scale_within(products: Tensor, weights: Tensor) -> Tensor:
    """The one float32 whose products with ``weights`` are ``products``, all of them exactly."""
    about = np.float32((products.double() / weights.double()).median())
    for steps in range(-64, 65):
        scale = (about.view(np.int32) + np.int32(steps)).view(np.float32)
        if np.array_equal(weights.numpy() * scale, products.numpy()):
            return torch.tensor([float(scale)], dtype=torch.float64)
    raise AssertionError("no scale of the inputs explains what the tool wrote")


@pytest.mark.parametrize("name", LINEARS)
def test_static_inputs(name: str) -> None:
    """The tool stores the products of its scales: one scale of the inputs must explain all of them, and itself as it is stored."""
    golden = tensors("ptq_a8w8_gs120")
    rounded = arithmetic.round_weight(weight_of(name), 8)
    products = float_of(golden[f"{name}._layer.matmul.dequant_scale"])
    scale = scale_within(products, rounded.scale[:, 0].float())
    zero = golden[f"{name}.quant_op.input_zp"].double()
    made = MadeLinear(Policy(a_bit=8), rounded, torch.float16, None, None, scale, zero)
    found, _ = laid_out(name, made, "ptq", "gs1.2")
    wanted = {tensor: value for tensor, value in golden.items() if tensor.startswith(f"{name}.")}
    assert found.keys() == wanted.keys()
    assert all(same(found[tensor], value) for tensor, value in wanted.items())


@pytest.mark.parametrize("name", [name for name in LINEARS if "down" not in name])
def test_smooth_quant_from_its_own_observers(name: str) -> None:
    """Its file keeps what it observed of each channel: scales, codes, zero points and biases follow."""
    golden, seen = tensors("sq_a8w8_gs060"), f"{name}._weight_observer_cell."
    low, high = golden[f"{seen}act_observer.float_min"], golden[f"{seen}act_observer.float_max"]
    weight, smooth = weight_of(name), golden[f"{seen}scale_store"]
    found = arithmetic.smoothing_scale(torch.maximum(low.abs(), high.abs()), weight.float().abs().amax(0), 0.5)
    assert float(((found - smooth) / smooth).abs().max()) <= 2**-22  # MindSpore's pow and torch's differ in the last two bits
    rounded, _ = arithmetic.round_smooth_quant(weight, smooth)
    scale, zero = arithmetic.smooth_quant_range(low, high, smooth)
    made = MadeLinear(Policy(a_bit=8), rounded, torch.float16, None, smooth, scale, zero)
    laid, _ = laid_out(name, made, "smooth_quant", "gs0.6")
    wanted = {tensor: value for tensor, value in golden.items() if tensor.startswith(f"{name}.") and not tensor.startswith(seen)}
    assert laid.keys() == wanted.keys()
    assert len(wanted) == 5
    assert all(same(laid[tensor], value) for tensor, value in wanted.items())


@pytest.mark.parametrize(("golden", "version"), [("ptq_c8_gs060", "gs0.6"), ("ptq_c8_gs120_f16", "gs1.2")])
def test_the_cache(golden: str, version: str) -> None:
    inputs, wanted = np.load(GOLDEN / "c8_inputs.npz"), tensors(golden)
    extremes = []
    for part in ("k", "v"):
        seen = Extremes()
        for row in torch.from_numpy(inputs[part]).split(7):
            seen.add(row)
        extremes.append(seen.checked(part))
    found = arithmetic.cache_tensors(*extremes, torch.float16, version)
    place = "model.layers.0.attention.infer_attention.paged_attention_mgr."
    assert [place + name for name in found] == list(wanted)
    assert all(same(value, wanted[place + name]) for name, value in found.items())


def test_the_cache_of_a_network_of_bfloat16() -> None:
    keys, values = (torch.tensor([-1.0]), torch.tensor([3.0])), (torch.tensor([-2.0]), torch.tensor([1.0]))
    found = arithmetic.cache_tensors(keys, values, torch.bfloat16, "gs1.2")
    assert same(found["quant_pa.k_v_scale_fusion"], torch.tensor([[3 * 2 / 255], [2 * 2 / 255]], dtype=torch.float64).half())
    assert found["quant_pa.k_v_zp_fusion"].dtype == torch.float16
    assert same(found["quant_pa.k_scale_no_fusion"], torch.tensor([6 / 255], dtype=torch.float64).bfloat16())


# -- by the rule, written down


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_zero_points(bits: int, dtype: torch.dtype) -> None:
    weight = (torch.rand(32, 128, generator=torch.Generator().manual_seed(bits)) * 0.9 - 0.3).to(dtype)
    rounded = arithmetic.round_weight(weight, bits, False, 64)
    groups = weight.double().numpy().reshape(32, 2, 64)
    low, high = groups.min(-1), groups.max(-1)
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-(2 ** (bits - 1)) - low / scale)
    np.testing.assert_array_equal(rounded.scale, scale)
    np.testing.assert_array_equal(rounded.zero, zero)
    held = torch.from_numpy(scale).to(dtype).unsqueeze(-1)
    steps = [torch.from_numpy(groups).to(dtype) / held]  # one operation at a time, each in the dtype
    steps.append(steps[-1] + torch.from_numpy(zero).to(dtype).unsqueeze(-1))
    codes = np.clip(np.rint(steps[-1].double().numpy()), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    np.testing.assert_array_equal(rounded.codes.numpy().reshape(groups.shape), codes)
    back = arithmetic.fake(rounded, torch.float32).reshape(groups.shape)
    assert float((back - torch.from_numpy(groups)).abs().max() / scale.max()) < (0.6 if dtype != torch.bfloat16 else 2)


def test_smoothing_is_one_where_there_is_nothing_to_smooth() -> None:
    scale = arithmetic.smoothing_scale(torch.tensor([4.0, 0.0, 4.0, 1e-12]), torch.tensor([1.0, 1.0, 0.0, 1.0]), 0.5)
    assert scale.tolist() == [2.0, 1.0, 1.0, pytest.approx(1e-5)]
    eighth = arithmetic.smoothing_scale(torch.tensor([16.0]), torch.tensor([2.0]), 0.75)
    assert float(eighth) == pytest.approx(8 / 2**0.25)


def test_smoothed_static_inputs_are_divided_in_float16() -> None:
    smooth = torch.tensor([3.0, 0.7], dtype=torch.float16)
    scale, zero = torch.tensor([0.0123], dtype=torch.float64), torch.tensor([-7.0], dtype=torch.float64)
    found, shift = arithmetic.static_inputs(scale, zero, smooth, torch.float16)
    inverse = np.float16(1) / smooth.numpy()
    np.testing.assert_array_equal(found.numpy(), np.float16(0.0123) / inverse)
    assert shift.tolist() == [-7, -7]
    assert shift.dtype == torch.int8


def test_a_smoothed_linear_computes_what_it_did() -> None:
    linear = nn.Linear(16, 8, bias=True)
    values, smooth = torch.randn(3, 16), torch.rand(16) + 0.5
    wanted = linear(values)
    with torch.no_grad():
        linear.weight.mul_(smooth)
    torch.testing.assert_close(Smoothed(linear, arithmetic.stored_smoothing(smooth))(values), wanted)


def inputs_and_weight(dtype: torch.dtype, in_: int = 256) -> tuple[list[Tensor], Tensor]:
    random = torch.Generator().manual_seed(5)
    mix = torch.randn(in_, in_, generator=random) / math.sqrt(in_)
    mix += torch.eye(in_)
    samples = [(torch.randn(1, 250 + 9 * index, in_, generator=random) @ mix).to(dtype) for index in range(3)]
    return samples, (torch.randn(24, in_, generator=random) * 0.1).to(dtype)


def factor_plainly(samples: list[np.ndarray], damp: float) -> np.ndarray:
    """The tool's Hessian and the factor of its inverse, in NumPy: [in, in] float32, upper."""
    in_, dtype = samples[0].shape[-1], samples[0].dtype
    hessian = np.zeros((in_, in_), np.float32)
    for count, sample in enumerate(samples):
        rows = (sample.reshape(-1, in_) * dtype.type(math.sqrt(2 / (count + 1)))).astype(dtype).astype(np.float32)
        hessian = hessian * np.float32(count / (count + 1)) + rows.T @ rows
    hessian[np.arange(in_), np.arange(in_)] += np.float32(damp) * np.diag(hessian).mean()
    lower = np.linalg.cholesky(hessian)
    inverse = np.linalg.inv(lower.T) @ np.linalg.inv(lower)
    return np.linalg.cholesky(inverse).T


def gptq_plainly(weight: np.ndarray, upper: np.ndarray, bits: int, group: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The tool's loop, in NumPy: codes [out, in], float32 scales [out, groups]."""
    dtype, (out, in_) = weight.dtype, weight.shape
    rest, low, high = weight.copy(), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes, scales = np.zeros((out, in_), np.int8), []

    def scale_of(part: np.ndarray) -> np.ndarray:
        return (np.abs(part.astype(np.float64)).max(1) * 2 / (2**bits - 1)).astype(np.float32)

    scale = scale_of(weight)
    for begin in range(0, in_, block):
        end = min(begin + block, in_)
        now, errors = rest[:, begin:end].copy(), np.zeros((out, end - begin), np.float32)
        for column in range(begin, end):
            if group != -1 and column % group == 0:
                scale = scale_of(rest[:, column : column + group])
                scales.append(scale)
            value = now[:, column - begin].astype(np.float32)
            code = np.clip(np.rint(value / scale), low, high)
            codes[:, column] = code
            error = (value - scale * code) / upper[column, column]
            now[:, column - begin :] = (now[:, column - begin :].astype(np.float32) - np.outer(error, upper[column, column:end])).astype(
                dtype
            )
            errors[:, column - begin] = error
        rest[:, end:] = (rest[:, end:].astype(np.float32) - errors @ upper[begin:end, end:]).astype(dtype)
    return codes, np.stack(scales, 1) if scales else scale[:, None]


@pytest.mark.parametrize(("bits", "group", "block"), [(4, 64, 128), (4, 128, 128), (8, -1, 128), (4, -1, 96), (4, 64, 48)])
def test_gptq_is_the_tools_loop(bits: int, group: int, block: int) -> None:
    samples, weight = inputs_and_weight(torch.float16)
    hessian = MeanHessian(256)
    for sample in samples:
        hessian.add(sample)
    arguments = {"block_size": block, "damp_percent": 0.02}
    policy = Policy(w_bit=bits, group_size=group, precision_recovery="gptq", algorithm_args=arguments)
    factor = factor_plainly([sample.numpy() for sample in samples], 0.02)
    upper = inverse_factor("here", hessian.sum, 0.02)
    np.testing.assert_allclose(upper.numpy(), factor, atol=1e-4 * np.abs(factor).max())
    # The last bits of two factors would move codes next to ties, and what follows from them, so both loops get one.
    found = compensated(weight, torch.zeros(256, dtype=torch.bool), torch.from_numpy(factor.copy()), policy)
    codes, scales = gptq_plainly(weight.numpy(), factor, bits, group, block)
    assert (found.codes.numpy() == codes).mean() > 0.999  # sums of products in another order
    assert (np.abs(found.scale.numpy() - scales) <= 0.001 * scales).all()
    if group == -1:
        np.testing.assert_array_equal(found.scale.numpy(), scales)
    found = round_gptq("here", weight, hessian, policy)
    plain = arithmetic.round_weight(weight, bits, True, group)
    rows = torch.cat([sample[0] for sample in samples]).float()
    errors = [float((rows @ (arithmetic.fake(one, torch.float32) - weight.float()).T).square().mean()) for one in (found, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_gptq_of_a_linear_that_nothing_reached() -> None:
    with pytest.raises(UnreadableError, match="expert: no calibration sample reached this layer"):
        round_gptq("expert", torch.ones(4, 64), MeanHessian(64), Policy(w_bit=4, precision_recovery="gptq"))


def test_dead_inputs_change_nothing() -> None:
    samples, weight = inputs_and_weight(torch.float32)
    for sample in samples:
        sample[..., 7] = 0
    hessian = MeanHessian(256)
    for sample in samples:
        hessian.add(sample)
    found = round_gptq("here", weight, hessian, Policy(precision_recovery="gptq"))
    assert not found.codes[:, 7].any()


def test_awq_scales() -> None:
    inputs, weight = torch.rand(128).half() + 0.01, (torch.randn(16, 128) * 0.3).half()
    inputs[3], weight[:, 9] = 0, 0
    share = weight_share(weight, 64).double().numpy()
    groups = np.abs(weight.double().numpy()).reshape(16, 2, 64)
    np.testing.assert_allclose(share, (groups / (groups.max(-1, keepdims=True) + 1e-6)).reshape(16, 128).mean(0), atol=1e-3)
    for ratio, duo in ((0.0, True), (0.4, True), (0.4, False)):
        x = inputs.double().numpy()
        plain = np.maximum(x**ratio / (share ** (1 - ratio) + 1e-4) if duo else x**ratio, 1e-4)
        plain = plain / np.sqrt(plain.max() * plain.min())
        plain[[3, 9]] = 1
        np.testing.assert_allclose(awq_scale(inputs, weight_share(weight, 64), ratio, duo).double().numpy(), plain, rtol=0.02)


def test_awq_takes_the_first_best_ratio_and_gives_the_weight_back() -> None:
    linear = nn.Linear(128, 16, bias=False).requires_grad_(False)
    rows = torch.randn(64, 128) * torch.linspace(0.1, 8, 128)
    policy = Policy(w_bit=4, group_size=64, w_sym=False, outliers_suppression="awq")
    before, inputs = linear.weight.clone(), rows.abs().mean(0)
    ratios = [step / 20 for step in range(20)]

    def error(ratio: float) -> float:
        scale = awq_scale(inputs, weight_share(before, 64), ratio, True)
        rounded = arithmetic.round_weight(before * scale, 4, False, 64)
        return float((rows @ (arithmetic.fake(rounded, torch.float32) / scale - before).T).double().square().mean())

    found = best_scale(linear, policy, inputs, ratios, lambda: [linear(rows)])
    assert torch.equal(linear.weight, before)
    best = min(ratios, key=error)
    assert torch.equal(found, awq_scale(inputs, weight_share(before, 64), best, True))
    assert best > 0
    one = best_scale(linear, policy, inputs, [0.5], lambda: [], search=False)
    assert torch.equal(one, awq_scale(inputs, weight_share(before, 64), 0.5, True))


def test_clips() -> None:
    random = torch.Generator().manual_seed(2)
    weight, rows = torch.randn(70, 128, generator=random), torch.randn(90, 128, generator=random)
    weight[3, 5] = 12
    policy, ratios = Policy(w_bit=4, group_size=64, w_sym=False, outliers_suppression="awq"), [1 - step / 20 for step in range(10)]
    limits = clip_limits(weight, rows, policy, ratios)
    wanted = np.zeros((70, 2))
    for row in range(70):
        for group in range(2):
            here = slice(64 * group, 64 * group + 64)
            part, given = weight[row : row + 1, here], rows[:, here]
            largest = float(part.abs().max())
            errors = []
            for ratio in ratios:
                cut = part.clamp(-largest * ratio, largest * ratio)
                back = arithmetic.fake(arithmetic.round_weight(cut, 4, False, 64), torch.float32)
                errors.append(float((given @ (back - part).T).square().mean()))
            wanted[row, group] = largest * ratios[int(np.argmin(errors))]
    assert (np.abs(limits.numpy() - wanted) <= 1e-5 * wanted).mean() > 0.98  # ties of the sums' last bits
    assert (limits.numpy() < 0.99 * weight.abs().reshape(70, 2, 64).amax(-1).numpy()).any()
    kept = clipped(weight, limits)
    assert torch.equal(kept.reshape(70, 2, 64).abs().amax(-1) <= limits, torch.ones(70, 2, dtype=torch.bool))
    assert torch.equal(clip_limits(weight, rows, policy, [0.5], search=False), weight.reshape(70, 2, 64).abs().amax(-1) * 0.5)


def test_every_nth_token_counts() -> None:
    seen = Sampled(1100)  # every second
    rows = torch.arange(1100.0).reshape(1, 1100, 1)
    for part in rows.split(137, 1):
        seen.add(part)
    assert torch.equal(seen.rows().flatten(), torch.arange(0, 1100, 2).float())
