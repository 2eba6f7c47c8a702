"""Where a decoder can be smoothed, as tables: one row per ``model_type``, names as the model's own modules have them.

A row lists, in the order in which msModelSlim 26.1.0 smooths them, the subgraphs of one decoder layer: a norm and the linears that
read its output, the value projection and the output projection, the up projection and the down projection. A scale moves from the
target's columns to the source: a norm's weight, or the source linear's rows (and bias). ``rows`` says which rows of a fused source
those are. Subgraphs of the kinds ``value`` and ``up`` are smoothed by m4 and m6 only.

Measured on the tool, and kept here as data:

1. Qwen3 and Qwen3-MoE have an adapter of their own (``llm_ptq/model/qwen3``): value -> output comes before norm -> qkv, m4 runs with
   alpha 0.5 instead of 0.9 and shifts the norms' outputs, and Qwen3-MoE's MLPs, dense ones too, are left alone.
2. The tool knows three layouts of a fused source, by its shape alone: as wide as the target is (all rows), ``2 *`` as wide (per head
   one half untouched, one half scaled), anything else (the last rows). But twice as wide is what ChatGLM2's gate and up are, too, and
   InternLM2's wqkv is grouped by key head: there the tool's m4 and m6 change what the model computes (measured on stand-ins: logits
   of about 1 by up to 1.3). Ours scale the rows that the model's own forward reads, so they preserve the function, and differ from
   the tool's in those two places: ``mlp.dense_h_to_4h`` -> ``dense_4h_to_h`` of ChatGLM2, ``attention.wqkv`` -> ``wo`` of InternLM2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from formats.errors import UsageError

__all__ = ["ARCHITECTURES", "Architecture", "Kind", "Rows", "Subgraph", "architecture_of"]

Kind = Literal["norm", "value", "up"]
Rows = Literal["all", "last", "second_half", "last_of_group"]


@dataclass(frozen=True)
class Subgraph:
    """One source and the linears whose columns its scale multiplies; names are relative to the layer, or whole once placed.

    ``rows`` of a fused source, out of its ``[out]``, when the target reads ``C = heads * head_dim`` channels:

    ==============  ==============================================================================================
    all             every row: ``v_proj``, ``up_proj``
    last            ``[q | k | v]``, the last ``(out - C) / 2`` rows: ChatGLM2's ``query_key_value``
    second_half     ``[gate | up]``, rows ``out / 2 ..``: ChatGLM2's ``dense_h_to_4h``
    last_of_group   ``[kv heads, queries of that head + k + v, head_dim]``, the last of each: InternLM2's ``wqkv``
    ==============  ==============================================================================================
    """

    kind: Kind
    source: str
    targets: tuple[str, ...]
    rows: Rows = "all"

    def placed(self, layer: str) -> Subgraph:
        """This subgraph with whole names, inside the module called ``layer``."""
        return Subgraph(self.kind, f"{layer}.{self.source}", tuple(f"{layer}.{name}" for name in self.targets), self.rows)


@dataclass(frozen=True)
class Architecture:
    """One kind of decoder. ``layers`` is the module list; ``inner_norms`` are norms inside a layer that nothing smooths.

    ``requires`` are config values without which a norm's output would go elsewhere too, so that scaling it would change the model.
    """

    layers: str
    subgraphs: tuple[Subgraph, ...]
    embeddings: str
    final_norm: str
    head: str
    inner_norms: tuple[str, ...] = ()
    m4_alpha: float = 0.9
    m4_shift: bool = False
    requires: tuple[tuple[str, object], ...] = ()

    def placed(self, layers: int) -> Iterator[Subgraph]:
        """Every subgraph of a model of so many layers, with whole names, in the order in which they are smoothed."""
        for index in range(layers):
            for subgraph in self.subgraphs:
                yield subgraph.placed(f"{self.layers}.{index}")


ATTENTION = Subgraph("norm", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
MLP = Subgraph("norm", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
VALUE = Subgraph("value", "self_attn.v_proj", ("self_attn.o_proj",))
UP = Subgraph("up", "mlp.up_proj", ("mlp.down_proj",))

LLAMA = Architecture("model.layers", (ATTENTION, MLP, VALUE, UP), "model.embed_tokens", "model.norm", "lm_head")
QWEN3_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "internlm": LLAMA,
    "qwen3": Architecture(
        "model.layers",
        (VALUE, ATTENTION, UP, MLP),
        "model.embed_tokens",
        "model.norm",
        "lm_head",
        inner_norms=QWEN3_NORMS,
        m4_alpha=0.5,
        m4_shift=True,
    ),
    "qwen3_moe": Architecture(
        "model.layers",
        (VALUE, ATTENTION),
        "model.embed_tokens",
        "model.norm",
        "lm_head",
        inner_norms=(*QWEN3_NORMS, "post_attention_layernorm"),
        m4_alpha=0.5,
        m4_shift=True,
    ),
    "chatglm": Architecture(
        "transformer.encoder.layers",
        (
            Subgraph("norm", "input_layernorm", ("self_attention.query_key_value",)),
            Subgraph("norm", "post_attention_layernorm", ("mlp.dense_h_to_4h",)),
            Subgraph("value", "self_attention.query_key_value", ("self_attention.dense",), rows="last"),
            Subgraph("up", "mlp.dense_h_to_4h", ("mlp.dense_4h_to_h",), rows="second_half"),
        ),
        "transformer.embedding.word_embeddings",
        "transformer.encoder.final_layernorm",
        "transformer.output_layer",
        requires=(("apply_residual_connection_post_layernorm", False),),
    ),
    "internlm2": Architecture(
        "model.layers",
        (
            Subgraph("norm", "attention_norm", ("attention.wqkv",)),
            Subgraph("norm", "ffn_norm", ("feed_forward.w1", "feed_forward.w3")),
            Subgraph("value", "attention.wqkv", ("attention.wo",), rows="last_of_group"),
            Subgraph("up", "feed_forward.w3", ("feed_forward.w2",)),
        ),
        "model.tok_embeddings",
        "model.norm",
        "output",
    ),
}


def architecture_of(config: object) -> Architecture:
    """The row for a model's config, by its ``model_type``. Raises UsageError where there is none, or where the config rules it out."""
    model_type = getattr(config, "model_type", None)
    if model_type not in ARCHITECTURES:
        raise UsageError(
            f"config: model_type is {model_type!r}, and only {', '.join(ARCHITECTURES)} are known: pass architecture=Architecture(...)"
        )
    row = ARCHITECTURES[model_type]
    for key, wanted in row.requires:
        found = getattr(config, key, wanted)
        if found != wanted:
            raise UsageError(f"config: {key} is {found!r}, and {model_type} can be smoothed only where it is {wanted!r}: skip AntiOutlier")
    return row
