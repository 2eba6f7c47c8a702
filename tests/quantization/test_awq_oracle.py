"""AWQ beside the real AutoAWQ 0.2.9: the same scales and clips found, the same weights rounded."""

from __future__ import annotations

import pytest
import torch
from real_tools import ask
from torch import nn

from quantize.awq import round_awq, search_clip, search_scale

pytestmark = pytest.mark.oracle

OUT, IN = 64, 128
SETTINGS = {
    "asymmetric": {"symmetric": False, "group_size": 32, "duo_scaling": True},
    "without_duo_scaling": {"symmetric": False, "group_size": 64, "duo_scaling": False},
    "symmetric": {"symmetric": True, "group_size": 32, "duo_scaling": True},
    "one_group": {"symmetric": False, "group_size": IN, "duo_scaling": True},
    "half": {"symmetric": False, "group_size": 32, "duo_scaling": True},
}


def given_of(name):
    """Weights of a gate and an up [out, in], heavy at the tails, and inputs [samples, tokens, in]; float16 in "half"."""
    random = torch.Generator().manual_seed(list(SETTINGS).index(name))
    gate, up = ((torch.randn(OUT, IN, generator=random) * 0.4) ** 3 + torch.randn(OUT, IN, generator=random) * 0.05 for _ in range(2))
    inputs = torch.randn(4, 300, IN, generator=random) * torch.exp(torch.randn(IN, generator=random))
    dtype = torch.float16 if name == "half" else torch.float32
    return {"gate": gate.to(dtype), "up": up.to(dtype), "inputs": inputs.to(dtype)}


@pytest.fixture(scope="module")
def of_the_tool(tmp_path_factory):
    tensors = {f"{name}.{part}": tensor for name in SETTINGS for part, tensor in given_of(name).items()}
    return ask("autoawq", "awq_search.py", tmp_path_factory.mktemp("autoawq"), tensors, SETTINGS)


def fake(weight, about, dtype=torch.float32):
    return round_awq("a", weight, 4, about["symmetric"], about["group_size"], dtype).fake


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_scale(name, of_the_tool):
    about, given = SETTINGS[name], given_of(name)
    gate, up = (nn.Linear(IN, OUT, bias=False) for _ in range(2))
    gate.weight.data, up.weight.data = given["gate"], given["up"]
    found = search_scale(
        "mlp",
        [gate, up],
        given["inputs"].float().abs().mean((0, 1)),
        lambda: (nn.functional.silu(gate(sample)) * up(sample) for sample in given["inputs"]),
        lambda weight: fake(weight, about),
        about["group_size"],
        duo_scaling=about["duo_scaling"],
    )
    errors, scale = of_the_tool[f"{name}.errors"], of_the_tool[f"{name}.scale"]
    assert len(errors) == 20
    assert found.ratio == int(errors.argmin()) / 20
    tolerance = {"rtol": 5e-3, "atol": 0} if name == "half" else {"rtol": 1e-5, "atol": 0}  # its scales are float16 there
    torch.testing.assert_close(found.scale, scale.float(), **tolerance)
    assert found.error == pytest.approx(float(errors.min()), rel=2e-2 if name == "half" else 1e-3)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_clip(name, of_the_tool):
    about, given = SETTINGS[name], given_of(name)
    largest = search_clip("up", given["up"], given["inputs"], 4, about["symmetric"], about["group_size"], scale_dtype=given["up"].dtype)
    theirs = of_the_tool[f"{name}.largest"]
    assert largest.dtype == theirs.dtype
    if name == "half":  # it rounds quotients and outputs to float16
        assert (largest == theirs).float().mean() > 0.5
        assert ((largest - theirs).abs() <= 0.11 * given["up"].abs().reshape(*theirs.shape, -1).amax(-1)).float().mean() > 0.9
    else:
        assert (largest == theirs).float().mean() > 0.99
    assert (theirs < given["up"].abs().reshape(*theirs.shape, -1).amax(-1)).float().mean() > 0.3


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_weight(name, of_the_tool):
    about, weight = SETTINGS[name], given_of(name)["up"]
    ours = round_awq("up", weight, 4, about["symmetric"], about["group_size"], weight.dtype)
    theirs = {part: of_the_tool[f"{name}.{part}"] for part in ("fake", "scales", "zeros")}
    if name == "half":  # it rounds ranges and quotients to float16
        scale, zero = (theirs[part].float().repeat_interleave(about["group_size"], 1) for part in ("scales", "zeros"))
        assert (ours.codes + 8 == torch.round(theirs["fake"].float() / scale) + zero).float().mean() > 0.98
        assert (ours.fake.float() - weight.float()).norm() <= 1.001 * (theirs["fake"].float() - weight.float()).norm()
    else:
        assert torch.equal(ours.fake, theirs["fake"])
        assert torch.equal(ours.scale, theirs["scales"])
        assert torch.equal(ours.offset, theirs["zeros"] - (0 if about["symmetric"] else 8))


def test_a_group_of_equal_weights_is_where_the_tool_is_not_followed(of_the_tool):
    """Its range does not hold 0, so it loses the group."""
    assert of_the_tool["asymmetric.flat"].abs().max() < 1e-4
    flat = torch.full((OUT, IN), 0.25)
    torch.testing.assert_close(fake(flat, SETTINGS["asymmetric"]), flat)
