"""Layers as they lie in the files, for eyes that forgive: ``check`` and ``doctor`` look at folders that the readers refuse.

Nothing here decodes weights. Shapes say bits, groups and sizes; zero points are looked at as the unsigned lanes that are stored.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from formats.awq import GEMM
from formats.checkpoint import Location
from formats.errors import UnreadableError
from formats.ir import Array
from formats.layouts import PackLayout
from formats.safetensors_file import TensorSet

PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
GPTQ_BITS = (2, 3, 4, 8)
SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One layer in GPTQ's or AWQ's GEMM spelling, as far as its shapes can tell.

    spelling        "gptq" or "awq"; bits: None where neither g_idx nor qzeros is there to say it
    out, in_        0 where shapes contradict one another
    parts           which of its tensors are there; trouble: what the shapes contradict, in words
    """

    name: str
    spelling: str
    out: int
    in_: int
    groups: int
    bits: int | None
    scale_dtype: str
    parts: frozenset[str]
    trouble: str = ""

    @property
    def group_size(self) -> int:
        """Inputs per group; -1: one group."""
        return -1 if self.groups == 1 or not self.groups else self.in_ // self.groups


PICKLED = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin")
"""Weight files of the days before safetensors."""


def weight_files(location: Location) -> list[str]:
    """The names of the model's weight files, whatever an index says: the named one, shards of one stem, or a single file."""
    if location.file is not None and location.file.suffix == ".safetensors":
        return [location.file.name]
    names = [name for name in location.names if name.endswith(".safetensors")]
    pickled = [name for name in location.names if PICKLED.fullmatch(name)]
    if not names and pickled:
        return ["pytorch_model.bin"] if "pytorch_model.bin" in pickled else pickled
    stems = {match[1]: None for name in names if (match := SHARD.fullmatch(name))}
    whole = [name for name in names if not SHARD.fullmatch(name)]
    if indexed := [stem for stem in stems if f"{stem}.safetensors.index.json" in location.names]:
        whole, stems = [], dict.fromkeys(indexed)  # as the readers do: an index of shards that are there wins
    for stem in ("model", "gptq_model", "quant_model_weight"):
        if fits := [name for name in whole if name == f"{stem}.safetensors" or (stem != "model" and name.startswith(stem))]:
            return fits
        if shards := [found for found in stems if found.startswith(stem)]:
            return [name for name in names if (match := SHARD.fullmatch(name)) and match[1] == shards[0]]
    if stems:
        return [name for name in names if (match := SHARD.fullmatch(name)) and match[1] == next(iter(stems))]
    if len(whole) != 1:
        found = "no .safetensors file" if not whole else f"{len(whole)} .safetensors files ({', '.join(whole[:3])})"
        raise UnreadableError(f"{location.folder.name}: {found}; point at the weight file itself")
    return whole


def open_weights(location: Location) -> TensorSet:
    """The tensors of ``weight_files``, without asking an index."""
    names = weight_files(location)
    if names[0].endswith(".bin"):
        from formats.torch_file import open_torch

        return TensorSet([location.folder / name for name in names], opener=open_torch)
    return TensorSet([location.folder / name for name in names])


def safe_name(name: str) -> str:
    """What a weight file is called as safetensors."""
    match = PICKLED.fullmatch(name)
    return name if match is None else f"model{match[1] or ''}.safetensors"


def stored_layers(tensors: Mapping[str, Any], bits: int | None = None) -> Iterator[StoredLayer]:
    """Every layer with a ``qweight`` and ``scales`` in GPTQ's or AWQ GEMM's shapes; others are passed over.

    bits   of GPTQ layers whose own tensors do not say
    """
    for tensor in tensors:
        name, _, leaf = tensor.rpartition(".")
        if name and leaf == "qweight":
            layer = _stored_layer(tensors, name, bits)
            if layer is not None:
                yield layer


def _stored_layer(tensors: Mapping[str, Any], name: str, bits: int | None) -> StoredLayer | None:
    words, scales = tensors[f"{name}.qweight"], tensors.get(f"{name}.scales")
    if scales is None or len(words.shape) != 2 or len(scales.shape) != 2 or words.dtype != "I32":
        return None
    parts = frozenset(part for part in PARTS if f"{name}.{part}" in tensors)
    groups, out = scales.shape
    zeros = tensors.get(f"{name}.qzeros")
    if words.shape[1] * 8 == out:
        trouble = f"{groups} groups do not divide {words.shape[0]} inputs" if groups == 0 or words.shape[0] % groups else ""
        if zeros is not None and (zeros.dtype, zeros.shape) != ("I32", (groups, out // 8)):
            trouble = f"qzeros are {zeros.dtype} {list(zeros.shape)}, wanted I32 {[groups, out // 8]}"
        return StoredLayer(name, "awq", out, words.shape[0], groups, 4, scales.dtype, parts, trouble)
    if words.shape[1] != out:
        return None
    g_idx, rows = tensors.get(f"{name}.g_idx"), words.shape[0]
    if g_idx is not None and g_idx.dtype == "I32" and len(g_idx.shape) == 1 and g_idx.shape[0]:
        bits = 32 * rows // g_idx.shape[0] if 32 * rows % g_idx.shape[0] == 0 else None
    elif zeros is not None and len(zeros.shape) == 2 and out:
        bits = 32 * zeros.shape[1] // out
    if bits not in GPTQ_BITS:
        return StoredLayer(
            name, "gptq", out, 0, groups, None, scales.dtype, parts, "shapes do not say the bits" if bits is None else f"{bits} bits"
        )
    assert bits is not None
    in_ = 32 * rows // bits
    trouble = ""
    if not groups or in_ % groups or 32 * rows % bits:
        trouble = f"{groups} groups do not divide {in_} inputs"
    elif zeros is not None and (zeros.dtype, zeros.shape) != ("I32", (groups, out * bits // 32)):
        trouble = f"qzeros are {zeros.dtype} {list(zeros.shape)}, wanted I32 {[groups, out * bits // 32]}"
    elif g_idx is not None and (g_idx.dtype, g_idx.shape) != ("I32", (in_,)):
        trouble = f"g_idx is {g_idx.dtype} {list(g_idx.shape)}, wanted I32 {[in_]}"
    return StoredLayer(name, "gptq", out, in_, groups, bits, scales.dtype, parts, trouble)


@functools.cache
def lanes_layout(bits: int, axis: Any) -> PackLayout:
    """GPTQ's words as unsigned lanes, with no offset taken off."""
    return PackLayout(bits, "<i4", axis, transposed=True)


@functools.cache
def constant_words(bits: int, lane: int) -> Array:
    """The shortest run of GPTQ words whose lanes are all ``lane``."""
    layout = lanes_layout(bits, "out")
    return layout.pack(np.full((layout.span, 1), lane, dtype=np.int16)).reshape(-1)


def all_lanes_are(words: Array, bits: int, lane: int) -> bool:
    """Whether every lane of a qzeros tensor [groups, words] is ``lane``: a comparison of words, nothing is unpacked."""
    pattern = constant_words(bits, lane)
    width = words.shape[1]
    if width % len(pattern):
        return False
    return bool((np.asarray(words).reshape(-1, len(pattern)) == pattern).all())


def zero_lanes(tensors: TensorSet, layer: StoredLayer) -> Array:
    """Zero points as stored, int16 [out, groups]: unsigned, of GPTQ v1 one less than they mean."""
    words = tensors.array(f"{layer.name}.qzeros")
    if layer.spelling == "awq":
        return GEMM.unpack(words, dtype="<i2") + np.int16(8)
    assert layer.bits is not None
    return lanes_layout(layer.bits, "out").unpack(words, dtype="<i2")


def is_symmetric(tensors: TensorSet, layer: StoredLayer, version: str) -> bool:
    """Whether every zero point is the middle code; without qzeros it is."""
    if "qzeros" not in layer.parts or layer.bits is None or layer.trouble:
        return True
    half = 1 << (layer.bits - 1)
    if layer.spelling == "awq":
        return bool((np.asarray(tensors.array(f"{layer.name}.qzeros")).view(np.uint32) == 0x88888888).all())
    return all_lanes_are(tensors.array(f"{layer.name}.qzeros"), layer.bits, half - (version == "v1"))


def group_index(tensors: TensorSet, layer: StoredLayer) -> Array | None:
    """g_idx as stored, or None."""
    return tensors.array(f"{layer.name}.g_idx") if "g_idx" in layer.parts else None


def is_irregular(tensors: TensorSet, layer: StoredLayer) -> bool:
    """Whether g_idx is there and is not ``k // group_size``."""
    index = group_index(tensors, layer)
    if index is None or not layer.groups or not layer.in_:
        return False
    return not np.array_equal(index, np.arange(layer.in_) // (layer.in_ // layer.groups))


def residual(tensors: TensorSet, layer: StoredLayer, lanes: Array, inputs: int = 512) -> float:
    """Mean of (code - stored zero lane) over the first ``inputs`` inputs of a GPTQ layer, in steps.

    The weights of a linear average to nothing, so the mean lies near 0 where lanes are zero points, and near 1 where they are
    one less.
    """
    assert layer.bits is not None
    layout = lanes_layout(layer.bits, "in")
    count = min(layer.in_, math.ceil(inputs / layout.span) * layout.span)
    codes = layout.unpack(tensors.tensor(f"{layer.name}.qweight"), slice(None), slice(0, count), "<i2")
    index = group_index(tensors, layer)
    groups = np.arange(count) // (layer.in_ // layer.groups) if index is None else np.asarray(index[:count])
    return float(codes.mean(dtype=np.float64)) - float(lanes[:, np.clip(groups, 0, layer.groups - 1)].mean(dtype=np.float64))
