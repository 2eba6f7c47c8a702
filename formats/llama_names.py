"""InternLM2, QWen and Baichuan seen as Llama: they compute what Llama or Qwen2 does, and call and fuse their tensors otherwise.

Defined by their authors' ``modeling_*.py`` on the Hugging Face hub, and by LMDeploy 0.9.2 (``turbomind/deploy/source_model``), which
unfuses them alike. By Llama's names:

==================================  =====================  =====================  ==============================
Llama                               InternLM2              QWen                   Baichuan
==================================  =====================  =====================  ==============================
model.embed_tokens, norm, lm_head   model.tok_embeddings,  transformer.wte, ln_f,  Llama's
                                    model.norm, output     lm_head
model.layers.N                      model.layers.N         transformer.h.N        model.layers.N
self_attn.q_proj, k_proj, v_proj    attention.wqkv         attn.c_attn            self_attn.W_pack
self_attn.o_proj                    attention.wo           attn.c_proj            Llama's
mlp.gate_proj, up_proj, down_proj   feed_forward.w1, w3,   mlp.w2, w1, c_proj     Llama's
                                    w2
input_layernorm                     attention_norm         ln_1                   Llama's
post_attention_layernorm            ffn_norm               ln_2                   Llama's
==================================  =====================  =====================  ==============================

``c_attn`` and ``W_pack`` hold the outputs of q, k and v one after another. ``wqkv`` has them by key head: for each, those of the query
heads that share it, then its key's, then its value's. QWen's gate is w2, and its ``intermediate_size`` counts gate and up together.

Either way an unfused tensor is every P bytes S of the fused one's (``Runs``), whether outputs lie along rows or, as in AWQ and GPTQ, along
columns. Nothing is copied.

Where tie_word_embeddings is true and there is no lm_head, it is the embedding again: a workspace has both.

Of Baichuan's, Baichuan-7B alone is meant: Baichuan2 normalizes lm_head in its forward (LMDeploy did when it converted, so that its
workspaces hold Llamas), and those of 13B have other positions (ALiBi).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .checkpoint import Location
from .errors import RefusedError, UnreadableError
from .files import Read, Readable
from .ir import ArrayLike
from .safetensors_file import DTYPES, StoredFile, TensorInfo, TensorSet, TensorTable
from .stored_tensor import StoredTensor


@dataclass(frozen=True)
class Family:
    """How a family calls things. fused: the module of q, k and v; by_key: it has them by key head; names: other modules, to Llama's."""

    block: str
    fused: str
    by_key: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)


_ENDS = ("model.embed_tokens", "model.norm", "lm_head")
_FAMILIES = {
    "internlm2": Family(
        "model.layers",
        "attention.wqkv",
        True,
        {
            "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
            "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        },
        dict(zip(("model.tok_embeddings", "model.norm", "output"), _ENDS, strict=True)),
    ),
    "qwen": Family(
        "transformer.h",
        "attn.c_attn",
        False,
        {
            "attn.c_proj": "self_attn.o_proj", "mlp.w2": "mlp.gate_proj", "mlp.w1": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
            "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
        },
        dict(zip(("transformer.wte", "transformer.ln_f", "lm_head"), _ENDS, strict=True)),
    ),
    "baichuan": Family("model.layers", "self_attn.W_pack"),
}  # fmt: skip
_PARTS = ("q_proj", "k_proj", "v_proj")
_OF_REMOTE_CODE = ("auto_map", "attn_implementation", "onnx_safe", "pretraining_tp")
"""Keys that say something to a folder's own code alone."""


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a config.json, None for models that have Llama's names. RefusedError for Baichuans that are no Llamas."""
    kind = config.get("model_type")
    if kind == "baichuan" and config.get("architectures") != ["BaiChuanForCausalLM"]:
        raise RefusedError(
            f"config.json: architectures is {config.get('architectures')}: of Baichuan's models the first, of 7B (BaiChuanForCausalLM), "
            "is a Llama; convert one that is saved with Llama's names"
        )
    return _FAMILIES.get(kind) if isinstance(kind, str) else None


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says, for transformers' Llama, or Qwen2 for QWen; of other models as it is, in the words of transformers 4."""
    found = dict(config)
    rope = found.get("rope_parameters")
    if isinstance(rope, dict):
        found.setdefault("rope_theta", rope.get("rope_theta"))
        found.setdefault("rope_scaling", None if rope.get("rope_type", "default") == "default" else rope)
    if config.get("model_type") not in _FAMILIES:
        return found
    for key in _OF_REMOTE_CODE:
        found.pop(key, None)
    if config["model_type"] != "qwen":
        return found | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": bool(found.pop("bias", False))}
    heads = config.get("num_attention_heads")
    kept = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "torch_dtype", "initializer_range", "use_cache")
    found = {key: config[key] for key in (*kept, "tie_word_embeddings") if key in config}
    inter = config.get("intermediate_size")
    return found | {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "num_key_value_heads": heads,
        "intermediate_size": inter // 2 if isinstance(inter, int) else inter, "rms_norm_eps": config.get("layer_norm_epsilon", 1e-6),
        "rope_theta": float(config.get("rotary_emb_base", 10000.0)), "max_position_embeddings": config.get("seq_length", 8192),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)), "use_sliding_window": False,
    }  # fmt: skip


def internlm_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The first InternLM's config.json for transformers' Llama, which it is, under Llama's names: q, k, v and o have biases where ``bias``
    says so, and of ``rotary`` the type "dynamic" is Llama's dynamic NTK scaling (its modeling_internlm.py as published).

    :raises UnreadableError: a rotary embedding of another type; ``where`` is the folder
    """
    rotary = config.get("rotary") or {}
    kind = rotary.get("type", "origin")
    if kind not in {"origin", "dynamic"}:
        raise UnreadableError(f"{where}: rotary type {kind!r} in config.json, wanted origin or dynamic; correct the config")
    found = {key: value for key, value in config.items() if key not in {*_OF_REMOTE_CODE, "bias", "rotary"}}
    found |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": bool(config.get("bias", True))}
    found |= {"rope_theta": float(rotary.get("base", 10000))}
    scaling = {"rope_type": "dynamic", "factor": float(rotary.get("scaling_factor", 1.0))}
    return found | {"rope_scaling": scaling} if kind == "dynamic" else found


def as_llama(location: Location) -> Location:
    """The location with its tensors under Llama's names, unfused; with lm_head where config.json says that it is the embedding."""
    base = location.base
    config = location.json("config.json") if base is None else base.json("config.json")
    if config is None:
        return location
    family, tied = family_of(config), bool(config.get("tie_word_embeddings", False))
    if family is None and not tied:
        return location
    return replace(location, view=_view(family, config, tied))


def _view(family: Family | None, config: Mapping[str, Any], tied: bool) -> Callable[[TensorSet], TensorSet]:
    def view(tensors: TensorSet) -> TensorSet:
        heads = (
            "lm_head.weight",
            *(f"{name}.weight" for name, called in (family.outside if family else {}).items() if called == "lm_head"),
        )
        missing = tied and not any(name in tensors for name in heads)
        if family is None and not missing:
            return tensors
        paths = [file.path for file in tensors.files]
        return TensorSet(paths, opener=lambda path, number: LlamaFile(tensors.files[number], number, family, config, missing))

    return view


class LlamaFile:
    """One file of such a model (``StoredFile``)."""

    def __init__(self, file: StoredFile, number: int, family: Family | None, config: Mapping[str, Any], tied: bool) -> None:
        self.path, self.metadata, self.exempt, self.identity = file.path, file.metadata, file.exempt, file.identity
        self._file, self._family, self._config = file, family, config
        self.tensors = TensorTable(number)
        self._made: dict[str, tuple[str, StoredTensor | None]] = {}
        self._block = re.compile(rf"{re.escape(family.block if family else '')}\.(\d+)\.(.+)\.(\w+)")
        for name, info in file.tensors.items():
            self._add(name, info)
        if tied and "model.embed_tokens.weight" in self._made:
            info = self.tensors["model.embed_tokens.weight"]
            self._put("lm_head.weight", info, info.shape, self._made["model.embed_tokens.weight"][0])

    def tensor(self, name: str, info: TensorInfo | None = None) -> ArrayLike:
        """The tensor, unread where the container allows it."""
        stored, part = self._made[name]
        return self._file.tensor(stored) if part is None else part

    def unchanged(self) -> bool:
        """Whether the file still is the one that was opened."""
        return self._file.unchanged()

    def _put(self, name: str, info: TensorInfo, shape: tuple[int, ...], stored: str, part: StoredTensor | None = None) -> None:
        size = info.nbytes if part is None else part.nbytes
        self.tensors.add(name, info.dtype, shape, info.begin, info.begin + size, info.stride if part is None else 0)
        self._made[name] = stored, part

    def _add(self, name: str, info: TensorInfo) -> None:
        family = self._family
        match = self._block.fullmatch(name) if family else None
        module, _, leaf = name.rpartition(".")
        if family is None or (match is None and module not in family.outside):
            self._put(name, info, info.shape, name)
        elif match is None:
            self._put(f"{family.outside[module]}.{leaf}", info, info.shape, name)
        elif match[2] != family.fused:
            self._put(f"model.layers.{match[1]}.{family.names.get(match[2], match[2])}.{leaf}", info, info.shape, name)
        else:
            for part, called in enumerate(_PARTS):
                self._unfuse(name, info, part, f"model.layers.{match[1]}.self_attn.{called}.{leaf}")

    def _unfuse(self, name: str, info: TensorInfo, part: int, called: str) -> None:
        """One of q, k and v."""
        if name.endswith(".g_idx"):
            self._put(called, info, info.shape, name)
            return
        heads, keys, head = self._heads()
        along = 0 if name.endswith((".weight", ".bias")) else len(info.shape) - 1
        whole, outputs = self._file.tensor(name), (heads + 2 * keys) * head
        share = 8 if info.dtype == "I32" and info.shape and info.shape[along] * 8 == outputs else 1  # outputs in a word
        if not info.shape or info.shape[along] * share != outputs or head % share:
            raise UnreadableError(
                f"{name}: is {info.dtype} {list(info.shape)}, and config.json says {heads} query and {keys} key heads of {head}; "
                "one of them is of another model"
            )
        if not isinstance(whole, StoredTensor) or whole.turned or info.stride:
            raise RefusedError(f"{name}: does not lie in order in {self.path.name}; save the model as safetensors")
        runs = keys if self._family and self._family.by_key else 1
        sizes = [heads * head // runs, keys * head // runs, keys * head // runs]  # outputs of a run, of q, k and v
        before = (0, sizes[0], sizes[0] + sizes[1])[part]
        width = DTYPES[info.dtype].itemsize
        for length in info.shape[along + 1 :]:
            width *= length  # bytes of one output, or of 8 packed ones
        size, period = sizes[part] * width // share, sum(sizes) * width // share
        file = Runs(whole.file, whole.begin + before * width // share, size, period)
        shape = tuple(length * sizes[part] // sum(sizes) if axis == along else length for axis, length in enumerate(info.shape))
        stride = shape[-1] if len(shape) else 1
        self._put(called, info, shape, name, StoredTensor(file, called, whole.dtype, shape, 0, stride))

    def _heads(self) -> tuple[int, int, int]:
        """(query heads, key heads, outputs of a head)."""
        said = llama_config(self._config)
        heads, hidden = said.get("num_attention_heads"), said.get("hidden_size")
        keys = said.get("num_key_value_heads") or heads
        numbers = [number for number in (heads, keys, hidden) if type(number) is int and 0 < number < 1 << 20]
        if len(numbers) != 3 or numbers[0] % numbers[1] or numbers[2] % numbers[0]:
            raise UnreadableError(
                f"config.json: {heads!r} heads, {keys!r} key heads and a hidden_size of {hidden!r} do not divide one another; correct it"
            )
        return numbers[0], numbers[1], numbers[2] // numbers[0]


class Runs(Readable):
    """Of each ``period`` bytes of a file from ``begin``, the first ``size``, one run after another."""

    def __init__(self, file: Readable, begin: int, size: int, period: int) -> None:
        self.path, self.size = file.path, file.size
        self._file, self._begin, self._run, self._period = file, begin, size, period

    @contextlib.contextmanager
    def reading(self) -> Iterator[Read]:
        """Reads each run's piece."""
        with self._file.reading() as inner:

            def read(view: memoryview, address: int) -> None:
                while view:
                    run, at = divmod(address, self._run)
                    length = min(len(view), self._run - at)
                    inner(view[:length], self._begin + run * self._period + at)
                    view, address = view[length:], address + length

            yield read
