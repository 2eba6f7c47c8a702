"""What MindFormers calls the modules of a model, and which of them it stores as one: data, for reading and writing alike.

Defined by MindFormers: ``models/llama/convert_weight.py`` of 1.3.2 for Llama and Qwen2 (``LLAMA``), and ``models/qwen3/utils.py`` and
``parallel_core/inference/model_utils.py`` of 1.6.0 for Qwen3 (``MCORE``). Nothing is transposed or permuted on the way from Hugging
Face's names.

Fused modules hold the rows of others one after another, [out_q + out_k + out_v, in] or [out_gate + out_up, in]: not interleaved by
head. Networks of the first kind have them with ``qkv_concat``, those of the second always.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_IN_BLOCK = re.compile(r"(.*?)(\d+)\.(.+)")


@dataclass(frozen=True, eq=False)
class Names:
    """One way to call a model's modules.

    block     what stands before a block's number: Hugging Face's, and MindFormers'
    inside    modules of a block, and outside: of no block, from Hugging Face's name to MindFormers'; a tensor's whole name where its
              last part changes too
    fused     a module that holds the rows of others, from MindFormers' name to Hugging Face's in order
    by_input  linears that ranks split by their inputs, by MindFormers' name; others are split by their outputs
    always    whether MindFormers has those modules only fused
    models    config.json's ``model_type``
    """

    name: str
    block: tuple[str, str]
    inside: Mapping[str, str]
    outside: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]]
    by_input: frozenset[str]
    models: frozenset[str]
    always: bool = False

    def stored(self, tensor: str, fuse: bool = False) -> tuple[str, int] | None:
        """MindFormers' name of a Hugging Face tensor, and which part of that it is; None if MindFormers has none."""
        match = _IN_BLOCK.fullmatch(tensor)
        if match is None or match[1] != self.block[0]:
            found = _longest(tensor, self.outside)
            return None if found is None else (found[1] + found[2], 0)
        where = f"{self.block[1]}{match[2]}."
        if fuse or self.always:
            for whole, parts in self.fused.items():
                part = _longest(match[3], {part: part for part in parts})
                if part is not None:
                    return where + whole + part[2], parts.index(part[0])
        found = _longest(match[3], self.inside)
        return None if found is None else (where + found[1] + found[2], 0)

    def canonical(self, tensor: str) -> tuple[str, ...]:
        """Hugging Face's name of a stored tensor, or its parts' names if it is fused; its own if it is none of MindFormers'."""
        match = _IN_BLOCK.fullmatch(tensor)
        if match is None or match[1] != self.block[1]:
            found = _longest(tensor, self._turned_outside)
            return (tensor,) if found is None else (found[1] + found[2],)
        where = f"{self.block[0]}{match[2]}."
        whole = _longest(match[3], {name: name for name in self.fused})
        if whole is not None:
            return tuple(where + part + whole[2] for part in self.fused[whole[0]])
        found = _longest(match[3], self._turned_inside)
        return (tensor,) if found is None else (where + found[1] + found[2],)

    def leaf(self, tensor: str) -> str:
        """What follows the module in a stored tensor's name; "" if the module is none of MindFormers'."""
        return self.place(tensor)[1]

    def place(self, tensor: str) -> tuple[str, str]:
        """(module, what follows it) of a stored tensor, without its block; ("", "") if the module is none of MindFormers'."""
        match = _IN_BLOCK.fullmatch(tensor)
        if match is None or match[1] != self.block[1]:
            found = _longest(tensor, self._turned_outside)
        else:
            found = _longest(match[3], {**self._turned_inside, **{name: name for name in self.fused}})
        return ("", "") if found is None else (found[0], found[2].removeprefix("."))

    @functools.cached_property
    def _turned_inside(self) -> dict[str, str]:
        return {theirs: ours for ours, theirs in self.inside.items()}

    @functools.cached_property
    def _turned_outside(self) -> dict[str, str]:
        return {theirs: ours for ours, theirs in self.outside.items()}


def _longest(name: str, modules: Mapping[str, str]) -> tuple[str, str, str] | None:
    """(module, its other name, what follows) of the module that ``name`` lies in."""
    module = name
    while module not in modules:
        module, dot, _ = module.rpartition(".")
        if not dot:
            return None
    return module, modules[module], name[len(module) :]


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

LLAMA = Names(
    "llama",
    ("model.layers.", "model.layers."),
    {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    },
    {"model.embed_tokens.weight": "model.tok_embeddings.embedding_weight", "model.norm": "model.norm_out", "lm_head": "lm_head"},
    {"attention.w_qkv": QKV, "feed_forward.w_gate_hidden": GATE_UP},
    frozenset({"attention.wo", "feed_forward.w2"}),
    frozenset({"llama", "qwen2"}),
)

MCORE = Names(
    "mcore",
    ("model.layers.", "decoder.layers."),
    {
        "self_attn.o_proj": "self_attention.linear_proj",
        "self_attn.q_norm": "self_attention.q_layernorm",
        "self_attn.k_norm": "self_attention.k_layernorm",
        "mlp.down_proj": "mlp.linear_fc2",
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "pre_mlp_layernorm",
    },
    {"model.embed_tokens": "embedding.word_embeddings", "model.norm": "decoder.final_layernorm", "lm_head": "output_layer"},
    {"self_attention.linear_qkv": QKV, "mlp.linear_fc1": GATE_UP},
    frozenset({"self_attention.linear_proj", "mlp.linear_fc2"}),
    frozenset({"qwen3"}),
    always=True,
)

FAMILIES = (LLAMA, MCORE)


def names_for(model_type: str | None) -> Names | None:
    """The names of a ``model_type``, Llama's where it is not known; None for a model that has none here."""
    return LLAMA if model_type is None else next((names for names in FAMILIES if model_type in names.models), None)


def names_of(tensors: Iterable[str]) -> Names:
    """The names that stored tensors go by."""
    return next((MCORE for tensor in tensors if tensor.startswith(MCORE.block[1])), LLAMA)
