"""Models whose own code lies in their folders, and is not run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from formats.checkpoint import Location
from formats.errors import UnreadableError
from quantize.lmdeploy_calibration import calibrate
from quantize.models import load_model, load_tokenizer, transformers_config

WIDTH, HEADS, INNER, LAYERS, WORDS = 64, 4, 96, 2, 80
INTERNLM: dict[str, Any] = {
    "architectures": ["InternLMForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_internlm.InternLMConfig", "AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"},
    "model_type": "internlm", "bias": True, "hidden_act": "silu", "hidden_size": WIDTH, "intermediate_size": INNER,
    "max_position_embeddings": 2048, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "rms_norm_eps": 1e-6,
    "rotary": {"base": 10000, "type": "dynamic"}, "tie_word_embeddings": False, "torch_dtype": "float32", "vocab_size": WORDS,
}  # fmt: skip


def internlm(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """A folder as it is published, without its code, with rotary_emb.inv_freq among the weights; the weights."""
    random = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH), "lm_head.weight": (WORDS, WIDTH)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for leaf in "qkvo":
            shapes |= {f"{block}.self_attn.{leaf}_proj.weight": (WIDTH, WIDTH), f"{block}.self_attn.{leaf}_proj.bias": (WIDTH,)}
        shapes |= {f"{block}.mlp.gate_proj.weight": (INNER, WIDTH), f"{block}.mlp.up_proj.weight": (INNER, WIDTH)}
        shapes |= {f"{block}.mlp.down_proj.weight": (WIDTH, INNER), f"{block}.self_attn.rotary_emb.inv_freq": (WIDTH // HEADS // 2,)}
        shapes |= {f"{block}.input_layernorm.weight": (WIDTH,), f"{block}.post_attention_layernorm.weight": (WIDTH,)}
    weights = {name: 0.2 * torch.randn(shape, generator=random) for name, shape in {**shapes, "model.norm.weight": (WIDTH,)}.items()}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**INTERNLM, **changes}))
    return weights


def logits_by_hand(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """What modeling_internlm.py computes, [tokens, words]: half-split rotary embeddings, biases in attention alone."""
    head, count = WIDTH // HEADS, len(ids)
    angles = torch.outer(torch.arange(count).float(), 10000 ** -(torch.arange(0, head, 2) / head)).repeat(1, 2)

    def norm(states: Tensor, name: str) -> Tensor:
        return weights[f"{name}.weight"] * states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def linear(states: Tensor, name: str) -> Tensor:
        return states @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def turned(states: Tensor) -> Tensor:
        first, second = states.chunk(2, -1)
        return states * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    states = weights["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        inputs = norm(states, f"{block}.input_layernorm")
        q, k, v = (linear(inputs, f"{block}.self_attn.{leaf}_proj").view(count, HEADS, head).transpose(0, 1) for leaf in "qkv")
        scores = turned(q) @ turned(k).transpose(1, 2) / head**0.5 + torch.full((count, count), -torch.inf).triu(1)
        states = states + linear((scores.softmax(-1) @ v).transpose(0, 1).reshape(count, WIDTH), f"{block}.self_attn.o_proj")
        inputs = norm(states, f"{block}.post_attention_layernorm")
        states = states + linear(
            functional.silu(linear(inputs, f"{block}.mlp.gate_proj")) * linear(inputs, f"{block}.mlp.up_proj"), f"{block}.mlp.down_proj"
        )
    return linear(norm(states, "model.norm"), "lm_head")


def test_internlm_is_llama_with_biases(tmp_path: Path) -> None:
    weights = internlm(tmp_path / "model")
    ids = torch.arange(24) * 7 % WORDS
    with torch.no_grad():
        found = load_model(tmp_path / "model")(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(found, logits_by_hand(weights, ids), rtol=1e-4, atol=1e-4)


def test_internlm_is_calibrated_layer_by_layer(tmp_path: Path) -> None:
    """The keys' largest by LMDeploy's statistics are the model's own."""
    internlm(tmp_path / "model")
    ids = torch.arange(24)[None] * 7 % WORDS
    calibrate(tmp_path / "model", [ids], work_dir=tmp_path / "out", samples=1, seqlen=24)
    found = torch.load(tmp_path / "out" / "value_stats.pth", weights_only=True)["absmax"]["model.layers.0"]
    with torch.no_grad():
        cache = load_model(tmp_path / "model").half()(input_ids=ids, use_cache=True).past_key_values
    torch.testing.assert_close(found, cache.layers[0].values[0].abs().amax(1), rtol=2e-3, atol=2e-3)


def test_rotary_embeddings_of_internlm(tmp_path: Path) -> None:
    internlm(tmp_path / "far", rotary={"base": 500000, "type": "dynamic", "scaling_factor": 2.0}, bias=False)
    config = transformers_config(Location.of(tmp_path / "far"))
    rope = getattr(config, "rope_parameters", None) or {**config.rope_scaling, "rope_theta": config.rope_theta}
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (500000, "dynamic", 2.0)
    assert config.attention_bias is False
    internlm(tmp_path / "odd", rotary={"base": 10000, "type": "yarn"})
    with pytest.raises(UnreadableError, match=r"odd: rotary type 'yarn' in config\.json, wanted origin or dynamic"):
        load_model(tmp_path / "odd")


def test_a_tokenizer_without_sentencepiece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    internlm(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UnreadableError, match=r"tokenizer\.model cannot be loaded \(.*\); InternLM's needs sentencepiece"):
        load_tokenizer(tmp_path / "model")
