"""Gives a small model the outlier channels that large ones have, without changing what it computes.

    python scripts/outliers.py MODEL OUT [--seed 11]

A few channels of each norm's output and of each MLP's inner activation are made 16 to 512 times larger, and the weights that read them
as much smaller. The factors are powers of two, so the float model computes the same bit for bit, and its 8-bit activations are ruined.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""By norm: the linears that read its output."""
NORM_CHANNELS, INNER_CHANNELS, INNER_FACTOR = 4, 6, 8


def add_outliers(tensors: dict[str, torch.Tensor], seed: int = 11) -> None:
    """Scale the channels of a Llama- or Qwen2-like model's ``tensors`` in place."""
    generator = torch.Generator().manual_seed(seed)

    def chosen(count: int, of: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(channels, factors: 16, 32 or 64 each)."""
        channels = torch.randperm(of, generator=generator)[:count]
        return channels, torch.exp2(torch.randint(4, 7, (count,), generator=generator).float())

    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm, readers in READERS.items():
            weight = tensors[f"{prefix}.{norm}.weight"]
            channels, factors = chosen(NORM_CHANNELS, len(weight))
            weight[channels] *= factors.to(weight.dtype)
            for reader in readers:
                matrix = tensors[f"{prefix}.{reader}.weight"]
                matrix[:, channels] /= factors.to(matrix.dtype)
        up, down = (tensors[f"{prefix}.mlp.{name}_proj.weight"] for name in ("up", "down"))
        channels, factors = chosen(INNER_CHANNELS, len(up))
        factors = (factors * INNER_FACTOR).to(up.dtype)
        up[channels] *= factors[:, None]
        down[:, channels] /= factors


def copy_with_outliers(model: Path, out: Path, seed: int = 11) -> None:
    """A copy of a folder of one safetensors file."""
    shutil.copytree(model, out)
    tensors = load_file(model / "model.safetensors")
    add_outliers(tensors, seed)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()
    copy_with_outliers(arguments.model, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
