"""Llama as Meta publishes it: ``consolidated.00.pth`` to ``.0N.pth`` and ``params.json``, seen as one file with Hugging Face's names.

Defined by Meta (``llama/model.py`` and ``generation.py`` of Llama 2 and 3). Each file is what ``torch.save`` wrote (``torch_zip``), and
holds one rank's part of every tensor. ``params.json`` says ``dim``, ``n_heads``, and ``n_kv_heads`` where that is another number.

=============================  =======================  ==========================================================================
``tok_embeddings.weight``      model.embed_tokens       ranks split it along dim (Llama 1, 2), or the vocabulary (3)
``output.weight``              lm_head                  by the vocabulary
``norm.weight``                model.norm               whole in every rank
``attention.wq``, ``wk``       self_attn.q_proj, k      by outputs, and permuted; modules of a block are ``layers.N...weight``
``attention.wv``               self_attn.v_proj         by outputs
``attention.wo``               self_attn.o_proj         by inputs
``feed_forward.w1``, ``w3``    mlp.gate_proj, up        by outputs
``feed_forward.w2``            mlp.down_proj            by inputs
``attention_norm``             input_layernorm          whole in every rank
``ffn_norm``                   post_attention_layernorm whole in every rank
``rope.freqs``                 none                     follows from params.json: left out
=============================  =======================  ==========================================================================

**Permutation.** Meta turns outputs 2m and 2m + 1 of a head together, Hugging Face outputs m and m + d/2, where d is a head's size. So row
``p * d/2 + m`` of a head of q_proj and k_proj is Meta's row ``2m + p``. Nothing is copied: reading a row reads Meta's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import Location
from .errors import UnreadableError
from .ir import ArrayLike
from .mindspore_ranks import ParameterLayout, RankedData
from .safetensors_file import SourceFile, TensorInfo, TensorSet, TensorTable, stored_tensor
from .torch_zip import TorchZipFile

PARAMS = "params.json"
_FILE = re.compile(r"consolidated\.\d\d\.pth")
_IN_BLOCK = re.compile(r"layers\.(\d+)\.(.+)\.weight")
_LEFT_OUT = "rope.freqs"
_INSIDE: dict[str, tuple[str, int | None]] = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
"""Hugging Face's name, and the axis that ranks split it along, by Meta's."""
_OUTSIDE: dict[str, tuple[str, int | None]] = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", 1),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}


def meta_files(location: Location) -> list[str]:
    """The names of the parts in the location's folder, in order; [] if it is not one of Meta's."""
    if PARAMS not in location.names or any(name.endswith((".safetensors", ".bin")) for name in location.names):
        return []
    return sorted(name for name in location.names if _FILE.fullmatch(name))


def meta_tensors(location: Location) -> TensorSet:
    """The folder's parts as one set of tensors, by Hugging Face's names."""
    names = meta_files(location)
    for number, name in enumerate(names):
        if name != f"consolidated.{number:02d}.pth":
            raise UnreadableError(f"{location.folder.name}: consolidated.{number:02d}.pth is missing, and {name} is there; copy it again")
    paths, params = [location.folder / name for name in names], location.json(PARAMS) or {}
    return TensorSet(paths[:1], opener=lambda path, number: MetaFile(paths, params, number))


class MetaFile:
    """The parts as one file, with what ``SafetensorsFile`` offers.

    params   params.json's content
    raises   UnreadableError for parts that do not fit one another, or params.json
    """

    exempt = 0

    def __init__(self, paths: Sequence[Path], params: Mapping[str, Any], number: int = 0) -> None:
        self.path = paths[0]
        self.metadata: dict[str, str] = {}
        self.files = [TorchZipFile(path) for path in paths]
        self._dim, self._heads = _count(params, "dim"), _count(params, "n_heads")
        self._key_heads = _count(params, "n_kv_heads") if params.get("n_kv_heads") is not None else self._heads
        if self._dim % (2 * self._heads):
            raise UnreadableError(f"{PARAMS}: {self._heads} heads do not divide dim {self._dim} into pairs; it belongs to other weights")
        self.data = RankedData(self.path)
        self.tensors = TensorTable(number)
        for name, info in self.files[0].tensors.items():
            if name != _LEFT_OUT:
                self._add(name, info)
        self.identity = SourceFile.joined([file.identity for file in self.files], f"{self._heads} {self._key_heads}")

    def tensor(self, name: str, info: TensorInfo | None = None) -> ArrayLike:
        """The tensor, unread. info: its own, if it is at hand."""
        return stored_tensor(self.data, name, info or self.tensors[name])

    def unchanged(self) -> bool:
        """Whether every part still is the file that was opened."""
        return all(file.unchanged() for file in self.files)

    def _add(self, name: str, info: TensorInfo) -> None:
        match = _IN_BLOCK.fullmatch(name)
        module = match[2] if match else ""
        found = _INSIDE.get(module) if match else _OUTSIDE.get(name)
        if found is None or len(info.shape) != (1 if found[1] is None else 2):
            raise UnreadableError(f"{self.path.name}: tensor {name[:120]!r} {list(info.shape)} is none of Llama's; it is of another model")
        called = f"model.layers.{match[1]}.{found[0]}.weight" if match else found[0]
        axis, count = found[1], len(self.files)
        if name == "tok_embeddings.weight" and info.shape[1] == self._dim:
            axis = 0
        self._check_alike(name, info)
        shape = tuple(length * count if number == axis else length for number, length in enumerate(info.shape))
        heads = {"attention.wq": self._heads, "attention.wk": self._key_heads}.get(module, 0)
        size = self._dim // self._heads
        if heads and shape != (heads * size, self._dim):
            raise UnreadableError(
                f"{name}: is {list(shape)} in {count} parts, and {PARAMS} says {heads} heads of {size} and dim {self._dim}; "
                "put the params.json of these weights beside them, and every part"
            )
        layout = ParameterLayout((count,), tuple(0 if number == axis else -1 for number in range(len(shape))))
        parts = [(file.data, file.tensors[name]) for file in self.files]
        begin = self.data.add(info, layout, parts, size if heads else 0)
        self.tensors.add(called, info.dtype, shape, begin, begin + info.nbytes * (1 if axis is None else count))

    def _check_alike(self, name: str, info: TensorInfo) -> None:
        for file in self.files:
            other = file.tensors.get(name)
            if other is None or (other.dtype, other.shape) != (info.dtype, info.shape) or not file.lies_in_order(name):
                what = "is not there" if other is None else f"is {other.dtype} {list(other.shape)}"
                raise UnreadableError(
                    f"{name}: {what} in {file.path.name}, wanted {info.dtype} {list(info.shape)} in order, as in {self.path.name}; "
                    "a part is of another model"
                )


def _count(params: Mapping[str, Any], key: str) -> int:
    found = params.get(key)
    if type(found) is not int or not 0 < found < 1 << 30:
        raise UnreadableError(f"{PARAMS}: {key} is {found!r}, wanted a positive whole number, without which the weights cannot be read")
    return found
