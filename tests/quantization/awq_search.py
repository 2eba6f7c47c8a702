"""Search scales and clips, and round, with AutoAWQ's own AwqQuantizer, on the CPU.

    python awq_search.py TENSORS SETTINGS OUT

Run by the interpreter that has AutoAWQ 0.2.9; it imports nothing of Weighbridge. SETTINGS is {name: {symmetric, group_size, duo_scaling}}.
TENSORS holds, by name, .gate and .up, the weights [out, in] of an MLP that computes silu(gate x) * up x, and .inputs [samples, tokens, in].
OUT gets, by name, .scale [in] of the MLP's input, .errors, one of each ratio, .largest [out, groups] of the clip of .up for the same
inputs, .fake [out, in], .scales and .zeros [out, groups] of its rounding, and .flat [out, in], of the rounding of a weight that is 0.25
everywhere.
"""

# ruff: noqa: E402 - Triton must be hidden before AutoAWQ is imported

from __future__ import annotations

import json
import sys
from typing import Any

sys.modules["triton"] = None  # type: ignore[assignment]

import torch
from awq.quantize.quantizer import AwqQuantizer
from safetensors.torch import load_file, save_file


class Mlp(torch.nn.Module):
    def __init__(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(gate.shape[1], gate.shape[0], bias=False, dtype=gate.dtype) for _ in range(2))
        self.gate.weight.data, self.up.weight.data = gate.clone(), up.clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(self.gate(x)) * self.up(x)

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        """Copies. The search keeps ``.cpu()`` of this to restore the weights that it changes in place: copies only if it runs on a GPU."""
        return {name: tensor.clone() for name, tensor in super().state_dict(*arguments, **options).items()}


class Block(torch.nn.Module):
    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.norm, self.mlp = torch.nn.LayerNorm(mlp.up.in_features), mlp


class Quantizer(AwqQuantizer):
    """Without a model and its calibration data."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.w_bit, self.group_size, self.zero_point = 4, about["group_size"], not about["symmetric"]
        self.duo_scaling, self.n_parallel_calib_samples, self.max_chunk_memory = about["duo_scaling"], None, 2**30
        self.errors: list[float] = []

    def _compute_loss(self, *arguments: object) -> float:
        self.errors.append(super()._compute_loss(*arguments))
        return self.errors[-1]


def main(tensors: str, settings: str, out: str) -> None:
    given, answer = load_file(tensors), {}
    with open(settings, encoding="utf-8") as file:
        cases = json.load(file)
    for name, about in cases.items():
        weight, inputs = given[f"{name}.up"], given[f"{name}.inputs"]
        block, quantizer = Block(Mlp(given[f"{name}.gate"], weight)), Quantizer(about)
        _, _, scale = quantizer._search_best_scale(block, block.norm, [block.mlp.gate, block.mlp.up], inputs, block.mlp)
        fake, scales, zeros = quantizer.pseudo_quantize_tensor(weight.clone())
        found = {
            "scale": scale,
            "errors": torch.tensor(quantizer.errors, dtype=torch.float64),
            "largest": quantizer._compute_best_clip(weight, inputs).squeeze(-1),
            "fake": fake,
            "scales": scales,
            "flat": quantizer.pseudo_quantize_tensor(torch.full_like(weight, 0.25))[0],
            "zeros": torch.zeros_like(scales) if zeros is None else zeros,
        }
        answer |= {f"{name}.{part}": tensor.contiguous() for part, tensor in found.items()}
    save_file(answer, out)


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:4])
