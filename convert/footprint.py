"""The memory that a model takes to serve: weights, KV cache and the engine's own, by batch and context.

::

    total = weights + overhead + batch * (per_sequence + tokens * kv bytes of a token)

weights     2 bytes a parameter (``fp16``); linears of decoder layers in 4 bits with a scale and a zero point of 4 bytes together for each
            group of 128, all else in 2 bytes (``w4``, as TurboMind holds it: 4.25 bits); or what a quantized folder stores
kv bytes    ``2 * layers * kv heads * head size`` elements of 2, 1 or 1/2 byte. LMDeploy since 0.4 has a scale and a zero point of 2 bytes
            each beside every head's key and value where the cache is quantized; before, they were the layer's
tokens      the context and 8 more: LMDeploy's sessions are that much longer than the model's
overhead    what does not depend on the batch, and ``per_sequence`` what does beside the cache

Where the constants are from: LMDeploy's published measurements of InternLM-7B (``PUBLISHED``, docs/en/kv_int8.md of 0.1) are 14113 MiB
and 516 or 1030 MiB for each sequence, so ``OVERHEAD`` is what its weights leave of the first, and ``PER_SEQUENCE`` what the cache leaves
of the second. All figures but one are then exact to the MiB. The one of float16 at batch 8 is 16 MiB less, as of 2048 tokens.
The 4-bit measurements of Llama 2 (docs/en/w4a16.md) are of whole processes on an RTX 4090, which take ``PROCESS`` more than weights and
cache: then they are met within 3 %.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from formats import open_checkpoint
from formats.checkpoint import Location
from formats.errors import RefusedError, UnreadableError, UsageError

__all__ = ["KV_BITS", "OVERHEAD", "PER_SEQUENCE", "PROCESS", "PUBLISHED", "Footprint", "Model", "Use", "inference_memory", "model_of"]

MIB = 1 << 20
OVERHEAD = int(147.5 * MIB)
PER_SEQUENCE = 2 * MIB
PROCESS = int(1.7 * (1 << 30))
EXTRA_TOKENS = 8
KV_BITS = {"fp16": 16, "int8": 8, "int4": 4}
HEAD_PARAMETERS = 4
"""Bytes beside a head's key, or value, of a token: scale and zero point of a cache that is quantized while the engine runs."""
GROUP, GROUP_PARAMETERS = 128, 4
"""Inputs of a group of 4-bit weights, and the bytes of its scale and zero point."""

INTERNLM_7B, LLAMA_2_7B, LLAMA_2_13B = 7_321_948_160, 6_738_415_616, 13_015_864_320
_GIB = 1024.0
PUBLISHED: dict[tuple[int, str, str, int, int], float] = {
    **{(INTERNLM_7B, "fp16", "fp16", 2048, batch): found for batch, found in {8: 22337, 16: 30593, 32: 47073, 48: 63553}.items()},
    **{(INTERNLM_7B, "fp16", "int8", 2048, batch): found for batch, found in {8: 18241, 16: 22369, 32: 30625, 48: 38881}.items()},
    (LLAMA_2_7B, "fp16", "fp16", 2048, 1): 15.1 * _GIB,
    (LLAMA_2_7B, "w4", "fp16", 2048, 1): 6.3 * _GIB,
    (LLAMA_2_7B, "fp16", "fp16", 4096, 1): 16.2 * _GIB,
    (LLAMA_2_7B, "w4", "fp16", 4096, 1): 7.5 * _GIB,
    (LLAMA_2_13B, "w4", "fp16", 2048, 1): 10.3 * _GIB,
    (LLAMA_2_13B, "w4", "fp16", 4096, 1): 12.0 * _GIB,
}
"""MiB that LMDeploy published, by (parameters, weights, KV cache, context, batch); those of Llama 2 to 0.1 GiB."""


@dataclass(frozen=True)
class Model:
    """What of a model its memory depends on.

    parameters    all of them, 0 where the folder is quantized and they were not counted; linear: of decoder layers' linears;
    groups        of 128 inputs in those linears; stored: bytes of a quantized folder, or None
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    parameters: int
    linear: int
    groups: int
    stored: int | None = None

    def weights(self, kind: str) -> int:
        """Bytes of the weights: "fp16", "w4" or, of a quantized folder, "stored"."""
        if kind == "stored" and self.stored is not None:
            return self.stored
        if self.stored is not None or kind not in {"fp16", "w4"}:
            raise UsageError(
                f"--weights {kind}: {self.name} is {'quantized already: leave it out' if self.stored is not None else 'float'}"
            )
        if kind == "fp16":
            return 2 * self.parameters
        return 2 * (self.parameters - self.linear) + self.linear // 2 + self.groups * GROUP_PARAMETERS

    def kv_bytes(self, kv: str, online: bool) -> int:
        """Bytes of one token's keys and values in all layers."""
        heads = 2 * self.layers * self.kv_heads
        return heads * self.head_dim * KV_BITS[kv] // 8 + (heads * HEAD_PARAMETERS if online and kv != "fp16" else 0)


@dataclass(frozen=True)
class Use:
    """The memory for one batch, in bytes. published: what LMDeploy measured, in MiB, or None."""

    batch: int
    kv: str
    weights: int
    cache: int
    rest: int
    published: float | None

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.rest

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Footprint:
    """The memory of a model by batch and by the KV cache's dtype: ``uses``, for each dtype of ``kvs`` every batch."""

    model: Model
    weights: str
    context: int
    kvs: tuple[str, ...]
    uses: tuple[Use, ...]
    notes: tuple[str, ...]

    def of(self, kv: str, batch: int) -> Use:
        """The figures of one batch."""
        return next(use for use in self.uses if (use.kv, use.batch) == (kv, batch))

    def to_json(self) -> dict[str, Any]:
        uses = [use.to_json() for use in self.uses]
        return {"model": asdict(self.model), "weights": self.weights, "context": self.context, "uses": uses, "notes": list(self.notes)}


def inference_memory(
    model_dir: str | os.PathLike[str],
    batch: Sequence[int] = (1,),
    context: int = 2048,
    *,
    kv: Sequence[str] = ("fp16",),
    weights: str | None = None,
    engine: str | None = None,
    overhead: int = OVERHEAD,
    per_sequence: int = PER_SEQUENCE,
) -> Footprint:
    """What a model takes to serve ``batch`` sequences of ``context`` tokens, for every batch and KV cache asked for.

    model_dir   a folder of any format, or one with config.json alone
    weights     "fp16", "w4"; None: float weights as fp16, quantized ones as they are stored
    engine      LMDeploy's version: since 0.4 a quantized cache has its scales beside it; None: 0.4 for int4, else 0.1
    overhead, per_sequence    bytes

    :raises UsageError: counts below 1, an unknown dtype
    :raises UnreadableError: no config.json, or one without the sizes
    :raises RefusedError: a model whose cache is not keys and values by head, or an engine without such a cache
    """
    from .lmdeploy_config import is_online, policy_of

    for name, counts in (("--batch", batch), ("--context", (context,))):
        if not counts or min(counts) < 1:
            raise UsageError(f"{name}: wanted whole numbers from 1")
    if unknown := [one for one in kv if one not in KV_BITS]:
        raise UsageError(f"--kv {unknown[0]}: wanted {', '.join(KV_BITS)}")
    model = model_of(model_dir)
    kind = weights or ("fp16" if model.stored is None else "stored")
    held, uses = model.weights(kind), []
    for one in kv:
        version = engine or ("0.4" if one == "int4" else "0.1")
        policy_of("off" if one == "fp16" else one, version)
        token = model.kv_bytes(one, is_online(version))
        for count in batch:
            cache, rest = count * (context + EXTRA_TOKENS) * token, overhead + count * per_sequence
            uses.append(Use(count, one, held, cache, rest, PUBLISHED.get((model.parameters, kind, one, context, count))))
    return Footprint(model, kind, context, tuple(kv), tuple(uses), tuple(_notes(uses, overhead, model.parameters != INTERNLM_7B)))


def _notes(uses: Sequence[Use], overhead: int, processes: bool) -> list[str]:
    """Where what was published differs; processes: whole ones were measured."""
    notes = []
    for use in uses:
        found = use.total / MIB
        if use.published is None or abs(found - use.published) < 1:
            continue
        differs = f"{abs(found - use.published):.0f} MiB {'less' if use.published < found else 'more'} than this"
        text = f"LMDeploy published {use.published:.0f} MiB for batch {use.batch} with an {use.kv} cache, {differs}"
        if processes:
            why = "; it is the whole process's, to 0.1 GiB" + ("" if overhead == PROCESS else ": --overhead 1.7GiB is for that")
        else:
            why = "; that figure alone is not in line with the others, as if its sequences were of 2048 tokens"
        notes.append(text + why)
    return notes


def model_of(model_dir: str | os.PathLike[str]) -> Model:
    """What the memory of the model in a folder depends on, from its weights' headers, or from config.json alone."""
    location = Location.of(model_dir)
    config = location.json("config.json")
    if config is None:
        raise UnreadableError(f"{model_dir}: has no config.json, so it is no model's folder")
    text = config.get("text_config")
    sizes = _Sizes(Path(model_dir), text if isinstance(text, dict) else config)
    name = Path(model_dir).resolve().name
    shape = sizes.layers, sizes.kv_heads, sizes.head_dim
    if any(name.endswith((".safetensors", ".bin")) for name in location.names):
        checkpoint = open_checkpoint(location)
        if checkpoint.layer_names:
            return Model(name, *shape, 0, 0, 0, checkpoint.tensors.nbytes)
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        linears = [shape for name, shape in shapes.items() if len(shape) >= 2 and re.search(r"\.\d+\.", name)]
        total = sum(math.prod(shape) for shape in shapes.values())
    else:
        linears, total = sizes.linears(), sizes.parameters()
    groups = sum(math.prod(shape[:-1]) * -(-shape[-1] // GROUP) for shape in linears)
    return Model(name, *shape, total, sum(math.prod(shape) for shape in linears), groups)


_COUNTED = ("llama", "mistral", "internlm", "qwen2", "qwen3")
"""Model types whose parameters can be counted by config.json."""


class _Sizes:
    """The sizes that a config.json says."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, config
        if config.get("kv_lora_rank"):
            raise RefusedError(f"{folder}: its cache is a latent (kv_lora_rank), not keys and values by head, and is not counted here")
        kinds = config.get("layer_types")
        if isinstance(kinds, list) and (other := [kind for kind in kinds if kind not in {"full_attention", "sliding_attention"}]):
            raise RefusedError(
                f"{folder}: has layers of {other[0]!r}, which keep no keys and values of every token, and is not counted here"
            )
        self.layers = self._whole("num_hidden_layers", "num_layers", "n_layer")
        self.heads = self._whole("num_attention_heads", "n_head")
        self.hidden = self._whole("hidden_size", "n_embd")
        grouped = config.get("multi_query_attention", True)  # ChatGLM's switch
        kv = self._find("num_key_value_heads", "multi_query_group_num") if grouped else None
        self.kv_heads = self.heads if kv is None else kv
        own = self._find("head_dim", "kv_channels")
        self.head_dim = self.hidden // self.heads if own is None else own

    def _find(self, *keys: str) -> int | None:
        for key in keys:
            value = self.config.get(key)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 32:
                    raise UnreadableError(f"{self.folder}: config.json says {key} {value!r:.40}, and a whole number from 1 was wanted")
                return value
        return None

    def _whole(self, *keys: str) -> int:
        found = self._find(*keys)
        if found is None:
            raise UnreadableError(f"{self.folder}: config.json has no {' or '.join(keys)}, on which the memory depends")
        return found

    def linears(self) -> list[tuple[int, ...]]:
        """[out, in] of every linear of the decoder layers. UnreadableError for a model type that is not known."""
        kind = self.config.get("model_type")
        if kind not in _COUNTED:
            raise UnreadableError(
                f"{self.folder}: has no weights, and how many parameters a {kind!r} has is known for {', '.join(_COUNTED)} only; "
                "name a folder with weights"
            )
        inter, wide, narrow = self._whole("intermediate_size"), self.heads * self.head_dim, self.kv_heads * self.head_dim
        one: list[tuple[int, ...]] = [(wide, self.hidden), (narrow, self.hidden), (narrow, self.hidden), (self.hidden, wide)]
        return self.layers * [*one, (inter, self.hidden), (inter, self.hidden), (self.hidden, inter)]

    def parameters(self) -> int:
        """All parameters."""
        config, vocabulary = self.config, self._whole("vocab_size")
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        inner = 2 * self.head_dim if config.get("model_type") == "qwen3" else 0  # norms of queries and keys
        biases = wide + 2 * narrow if config.get("model_type") == "qwen2" else 0
        if config.get("bias") or config.get("attention_bias"):
            biases = wide + 2 * narrow + self.hidden
        if config.get("mlp_bias"):
            biases += 2 * self._whole("intermediate_size") + self.hidden
        ends = (1 if config.get("tie_word_embeddings") else 2) * vocabulary * self.hidden + self.hidden
        return sum(rows * columns for rows, columns in self.linears()) + self.layers * (2 * self.hidden + inner + biases) + ends
