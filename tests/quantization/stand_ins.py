"""Small decoders with the module names, fused layouts and forwards of ChatGLM2, InternLM and InternLM2, whose own code is remote.

Each follows the repository that publishes it (modeling_chatglm.py, modeling_internlm.py, modeling_internlm2.py), as far as smoothing can
see: norms, residuals, how a fused projection is split into heads, which half of a fused MLP is the gate. Rotary positions are the same
plain ones in all of them, since they touch queries and keys only.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 64


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden: Tensor) -> Tensor:
        scaled = hidden.float() * torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight * scaled).to(hidden.dtype)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of ``[batch, tokens, heads, head_dim]``, of fewer key heads than heads; ``[batch, tokens, width]``."""
    positions = torch.arange(queries.shape[1], dtype=torch.float32)[:, None] / 10.0 ** torch.arange(queries.shape[-1] // 2)
    turn = torch.cat([positions, positions], -1)[None, :, None]

    def rotated(values: Tensor) -> Tensor:
        first, second = values.chunk(2, -1)
        return values * turn.cos() + torch.cat([-second, first], -1) * turn.sin()

    group = queries.shape[2] // keys.shape[2]
    keys, values = (part.repeat_interleave(group, 2) for part in (rotated(keys), values))
    out = functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (rotated(queries), keys, values)), is_causal=True)
    return out.transpose(1, 2).flatten(2)


class Config(SimpleNamespace):
    """A config as transformers' are, for attribute access."""

    hidden_size = 32
    num_attention_heads = 4
    key_heads = 2
    intermediate = 48
    layers = 2
    head_dim = 8


# -- ChatGLM2: [q | k | v] in one projection, [gate | up] in another


class ChatGLMAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.num_attention_heads * config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, width + 2 * config.key_heads * config.head_dim, bias=True)
        self.dense = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        key_width = self.config.key_heads * self.config.head_dim
        mixed = self.query_key_value(hidden)
        parts = mixed.split([mixed.shape[-1] - 2 * key_width, key_width, key_width], -1)
        return self.dense(attend(*(part.unflatten(-1, (-1, self.config.head_dim)) for part in parts)))


class ChatGLMMLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.intermediate, bias=False)
        self.dense_4h_to_h = nn.Linear(config.intermediate, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(hidden).chunk(2, -1)
        return self.dense_4h_to_h(functional.silu(gate) * up)


class ChatGLMBlock(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.self_attention = ChatGLMAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.mlp = ChatGLMMLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attention(self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class ChatGLM(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.Module()
        self.transformer.embedding = nn.Module()
        self.transformer.embedding.word_embeddings = nn.Embedding(VOCABULARY, config.hidden_size)
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(ChatGLMBlock(config) for _ in range(config.layers))
        self.transformer.encoder.final_layernorm = RMSNorm(config.hidden_size)
        self.transformer.output_layer = nn.Linear(config.hidden_size, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        hidden = self.transformer.embedding.word_embeddings(input_ids)
        for layer in self.transformer.encoder.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=self.transformer.output_layer(self.transformer.encoder.final_layernorm(hidden)))


# -- InternLM: Llama's names, with biases in attention


class InternLMAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return self.o_proj(attend(*(projection(hidden).unflatten(-1, (-1, self.config.head_dim)) for projection in projections)))


class InternLMMLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class InternLMBlock(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn = InternLMAttention(config)
        self.mlp = InternLMMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


# -- InternLM2: per key head its queries, its key and its value in one projection; w1 the gate, w3 the up, w2 the down


class InternLM2Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.wqkv = nn.Linear(config.hidden_size, (config.num_attention_heads + 2 * config.key_heads) * config.head_dim, bias=True)
        self.wo = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        group = self.config.num_attention_heads // self.config.key_heads
        mixed = self.wqkv(hidden).unflatten(-1, (self.config.key_heads, group + 2, self.config.head_dim))
        return self.wo(attend(mixed[..., :group, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :]))


class InternLM2MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate, bias=False)
        self.w2 = nn.Linear(config.intermediate, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(hidden)) * self.w3(hidden))


class InternLM2Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = RMSNorm(config.hidden_size)
        self.ffn_norm = RMSNorm(config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.feed_forward(self.ffn_norm(hidden))


class Decoder(nn.Module):
    """InternLM and InternLM2: the same outside of their blocks, but for the names of embeddings and head."""

    def __init__(self, config: Config, block: type[nn.Module], embeddings: str, head: str) -> None:
        super().__init__()
        self.config, self.embeddings, self.head = config, embeddings, head
        self.model = nn.Module()
        self.model.add_module(embeddings, nn.Embedding(VOCABULARY, config.hidden_size))
        self.model.layers = nn.ModuleList(block(config) for _ in range(config.layers))
        self.model.norm = RMSNorm(config.hidden_size)
        self.add_module(head, nn.Linear(config.hidden_size, VOCABULARY, bias=False))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        hidden = getattr(self.model, self.embeddings)(input_ids)
        for layer in self.model.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=getattr(self, self.head)(self.model.norm(hidden)))


def chatglm2(**config: object) -> nn.Module:
    return ChatGLM(Config(model_type="chatglm", apply_residual_connection_post_layernorm=False, **config))


def internlm(**config: object) -> nn.Module:
    return Decoder(Config(model_type="internlm", key_heads=4, **config), InternLMBlock, "embed_tokens", "lm_head")


def internlm2(**config: object) -> nn.Module:
    return Decoder(Config(model_type="internlm2", **config), InternLM2Block, "tok_embeddings", "output")
