"""A decoder of the Llama and Qwen2 kinds in plain PyTorch, from stored tensors, that shares no code with the project or transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Linear = Callable[[str, Tensor], Tensor]
"""(module's name, input [tokens, in]) -> [tokens, out]."""
States = Callable[[str, str, Tensor], Tensor]
"""(attention's name, "q", "k" or "v", states [heads, tokens, head size] after rotary embedding) -> the same, rounded."""


def decode(tensors: dict[str, Tensor], config: dict[str, Any], ids: Tensor, linear: Linear, states: States | None = None) -> Tensor:
    """[tokens, vocabulary] float32 logits of ``ids`` [tokens]."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    angles = torch.arange(len(ids)).float()[:, None] / theta ** (torch.arange(0, size, 2).float() / size)[None]
    cos, sin = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()

    def norm(name: str, x: Tensor) -> Tensor:
        return tensors[f"{name}.weight"].float() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"])

    def split(x: Tensor, count: int) -> Tensor:
        return x.reshape(len(ids), count, size).transpose(0, 1)

    def turned(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    hidden = tensors["model.embed_tokens.weight"].float()[ids]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        attention, x = f"{layer}.self_attn", norm(f"{layer}.input_layernorm", hidden)
        q, k, v = (linear(f"{attention}.{one}_proj", x) for one in "qkv")
        found = {"q": turned(split(q, heads)), "k": turned(split(k, kv_heads)), "v": split(v, kv_heads)}
        if states is not None:
            found = {one: states(attention, one, value) for one, value in found.items()}
        k, v = (found[one].repeat_interleave(heads // kv_heads, 0) for one in "kv")
        scores = found["q"] @ k.transpose(1, 2) / size**0.5
        scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(ids), -1)
        hidden = hidden + linear(f"{attention}.o_proj", mixed)
        x = norm(f"{layer}.post_attention_layernorm", hidden)
        gate, up = linear(f"{layer}.mlp.gate_proj", x), linear(f"{layer}.mlp.up_proj", x)
        hidden = hidden + linear(f"{layer}.mlp.down_proj", torch.nn.functional.silu(gate) * up)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return norm("model.norm", hidden) @ head.float().T


def int8(x: Tensor, scale: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """Rounded to int8 and back; the offset is added to codes."""
    codes = torch.clamp(torch.round(x / scale) + offset, -128, 127)
    return (codes - offset) * scale


def by_token(x: Tensor) -> Tensor:
    """Symmetric int8 by each token's own largest magnitude."""
    return int8(x, x.abs().amax(-1, keepdim=True) / 127)
