"""GPTQ beside the real GPTQModel 7.6.0 and AutoGPTQ 0.7.1: the same weight, inputs and settings give the same codes, but for ties."""

from __future__ import annotations

import pytest
import torch
from real_tools import ask

from quantize.gptq import Hessian, round_gptq
from quantize.methods import Gptq

pytestmark = pytest.mark.oracle

OUT, IN = 48, 384
DEFAULTS = {"bits": 4, "symmetric": True, "group_size": 128, "percdamp": 0.01, "mse": 0.0}
SETTINGS = {
    "symmetric": {},
    "asymmetric": {"symmetric": False},
    "three_bits": {"bits": 3, "percdamp": 0.05},
    "eight_bits": {"bits": 8, "symmetric": False},
    "per_channel": {"group_size": -1},
    "per_channel_asymmetric": {"group_size": -1, "symmetric": False},
    "act_order": {"act_order": True},
    "act_order_static": {"act_order": True, "static_groups": True, "symmetric": False},
    "static": {"static_groups": True, "group_size": 32},
    "mse": {"mse": 2.4},
    "group_aware": {"act_group_aware": True},
    "group_aware_asymmetric": {"act_group_aware": True, "symmetric": False},
    "small_groups": {"group_size": 16},
}
SMALL = ("small_groups",)  # smaller than a block of 128, so that the tools' scales are not those of fully compensated weights
CASES = [(tool, name) for tool in ("gptqmodel", "autogptq") for name in SETTINGS if tool == "gptqmodel" or "aware" not in name]


def weight_and_inputs():
    random = torch.Generator().manual_seed(3)
    directions = torch.randn(60, IN, generator=random)
    inputs = torch.randn(8, 128, 60, generator=random) @ directions / 8 + 0.3 * torch.randn(8, 128, IN, generator=random)
    inputs *= torch.exp(0.7 * torch.randn(IN, generator=random))
    return torch.randn(OUT, IN, generator=random) * 0.02, inputs


def settings_of(name):
    switches = dict.fromkeys(("act_order", "act_group_aware", "static_groups"), False)
    return DEFAULTS | switches | SETTINGS[name]


@pytest.fixture(scope="module")
def answer_of(tmp_path_factory):
    answers = {}

    def answer(tool):
        if tool not in answers:
            weight, inputs = weight_and_inputs()
            cases = {name: settings_of(name) for name in SETTINGS if (tool, name) in CASES}
            answers[tool] = ask(tool, "gptq_round.py", tmp_path_factory.mktemp(tool), {"weight": weight, "inputs": inputs}, cases)
        return answers[tool]

    return answer


@pytest.mark.parametrize(("tool", "name"), CASES)
def test_equal_to_the_tool(tool, name, answer_of):
    answer, about = answer_of(tool), settings_of(name)
    weight, inputs = weight_and_inputs()
    hessian = Hessian(IN)
    for sample in inputs:
        hessian.add(sample)
    settings = Gptq(**{field: about[field] for field in ("act_order", "act_group_aware", "static_groups", "percdamp", "mse")})
    arguments = ("a", weight, hessian, about["bits"], about["symmetric"], about["group_size"], settings)
    ours = round_gptq(*arguments, torch.float32)
    theirs = {part: answer[f"{name}.{part}"] for part in ("fake", "scale", "zero", "g_idx")}

    def error_of(fake):
        return float(((fake - weight).double() @ inputs.reshape(-1, IN).double().T).square().sum())

    groups = theirs["g_idx"].long()
    codes = torch.round(theirs["fake"] / theirs["scale"][:, groups]) + theirs["zero"][:, groups] - 2 ** (about["bits"] - 1)
    if name in SMALL:
        assert error_of(ours.fake) < 1.01 * error_of(theirs["fake"])
    else:
        assert (ours.codes == codes).float().mean() > 0.98
        alike = (ours.codes == codes).all(1)
        assert alike.float().mean() > 0.8
        torch.testing.assert_close(ours.scale[alike], theirs["scale"][alike], rtol=1e-4, atol=0)
        offset = theirs["zero"] - 2 ** (about["bits"] - 1)
        assert torch.equal(ours.offset[alike], offset[alike])
        assert error_of(ours.fake) < 1.01 * error_of(theirs["fake"])
    regular = torch.arange(IN) // (IN if about["group_size"] == -1 else about["group_size"])
    assert torch.equal(groups, regular if ours.g_idx is None else ours.g_idx.long())

    # The tools round their scales to float16 when they save them, after the codes are made; here the codes are made for what is saved.
    saved = (codes + 2 ** (about["bits"] - 1) - theirs["zero"][:, groups]) * theirs["scale"].half().float()[:, groups]
    assert error_of(round_gptq(*arguments, torch.float16).fake) < 1.02 * error_of(saved)
