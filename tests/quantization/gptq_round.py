"""Round a weight with AutoGPTQ's or GPTQModel's own GPTQ, on the CPU.

    python gptq_round.py TENSORS SETTINGS OUT

Run by the interpreter that has one of them; it imports nothing of Weighbridge. TENSORS holds ``weight`` [out, in] and ``inputs``
[samples, tokens, in], float32; SETTINGS is {name: {bits, symmetric, group_size, act_order, act_group_aware, static_groups, mse,
percdamp}}. OUT gets, by name, .fake [out, in], .scale and .zero [out, groups], and .g_idx [in].
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import Any

os.environ |= {"TORCHDYNAMO_DISABLE": "1", "GPTQMODEL_CPU_WORKERS": "2"}  # the default number of workers fails on two cores

import torch
from safetensors.torch import load_file, save_file


def by_autogptq(linear: torch.nn.Linear, inputs: torch.Tensor, about: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    from auto_gptq.quantization.gptq import GPTQ

    torch.cuda.synchronize = lambda *_: None  # which it calls on any device
    gptq = GPTQ(linear)
    gptq.quantizer.configure(about["bits"], perchannel=True, sym=about["symmetric"], mse=bool(about["mse"]), norm=about["mse"])
    for sample in inputs:
        gptq.add_batch(sample, None)
    scale, zero, g_idx = gptq.fasterquant(
        percdamp=about["percdamp"], group_size=about["group_size"], actorder=about["act_order"], static_groups=about["static_groups"]
    )
    return linear.weight.data, scale, zero, g_idx


def by_gptqmodel(linear: torch.nn.Linear, inputs: torch.Tensor, about: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    config = QuantizeConfig(
        bits=about["bits"],
        group_size=about["group_size"],
        sym=about["symmetric"],
        desc_act=about["act_order"],
        act_group_aware=about["act_group_aware"],
        static_groups=about["static_groups"],
        damp_percent=about["percdamp"],
        mse=about["mse"],
        fallback=None,  # or it rounds to nearest where it finds too few tokens
    )
    gptq = GPTQ(linear, config)
    gptq.quantizer.configure(perchannel=True)
    for sample in inputs:
        gptq.add_batch(sample, None)
    fake, scale, zero, g_idx, *_ = gptq.quantize()
    return fake, scale, zero, g_idx


def main(tensors: str, settings: str, out: str) -> None:
    given, answer = load_file(tensors), {}
    round_by = by_gptqmodel if importlib.util.find_spec("gptqmodel") else by_autogptq
    with open(settings, encoding="utf-8") as file:
        cases = json.load(file)
    for name, about in cases.items():
        linear = torch.nn.Linear(given["weight"].shape[1], given["weight"].shape[0], bias=False)
        linear.weight.data = given["weight"].clone()
        parts = round_by(linear, given["inputs"], about)
        answer |= {f"{name}.{part}": tensor.contiguous() for part, tensor in zip(("fake", "scale", "zero", "g_idx"), parts, strict=True)}
    save_file(answer, out)


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:4])
