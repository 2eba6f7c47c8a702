"""What lies where in the ``weights`` folder of a TurboMind workspace, under Hugging Face's names: for reading and for writing.

Everything follows from a ``Geometry``. Files are raw little-endian numbers without headers; ``R`` is a rank of tensor parallelism.
K is a matrix's inputs, N its outputs, of one rank where the name has an R; G its groups.

==============================  =============================================  =====================================================
file                            stored                                         what it holds
==============================  =============================================  =====================================================
tok_embeddings.weight           float [vocabulary, hidden]                     rows of 0 fill up the vocabulary to a multiple of tp
output.weight                   float [vocabulary, hidden]                     lm_head, filled up alike
norm.weight                     float [hidden]                                 also layers.I.attention_norm and .ffn_norm
layers.I.attention.w_qkv.R      .weight float [K, N]                           ``[q | k | v]`` of the rank, q and k by head (below)
layers.I.attention.wo.R         .weight float [K, N]                           the rank's inputs
layers.I.feed_forward.w1.R      .weight float [K, N]                           gate; w3: up; w2: down, the rank's inputs
w_qkv.R.bias, wo.R.bias         float [N]                                      wo's is whole in every rank, 0 where the model has none
==============================  =============================================  =====================================================

q, k   Hugging Face's rotary embedding pairs output j of a head with j + 64, TurboMind's 2j with 2j + 1: so 2j + s is j + 64 s.

Of 4 bits, until 0.5: ``w13`` instead of w1 and w3, whose output 2j is gate's and 2j + 1 up's; each matrix is two files.

==============================  =============================================  =====================================================
.qweight                        int32 [K/32, N/32, 128]                        tiles in the order of an MMA fragment (``MMA``)
.scales_zeros                   [G, N, 2] float16                              64 + zero point, scale
==============================  =============================================  =====================================================

Of 4 bits, since 0.6: w1 and w3 by themselves; each matrix is three files.

==============================  =============================================  =====================================================
.qweight                        int32 [K, N/8]                                 lane i of word c is output 8c + i
.zeros, .scales                 float16 [G, N]                                 zero points as numbers from 0 to 15
tok_embeddings.R.weight         float [vocabulary, N]                          the rank's columns
output.R.weight                 float [N, hidden]                              the rank's rows; since 0.8 turned: [hidden, N]
==============================  =============================================  =====================================================

A tile of ``MMA`` is the A operand of mma.m16n8k16, four times: of input k and output m within the tile word ``4 * lane + w`` has
``lane = m % 8 * 4 + k % 8 // 2``, ``w = k // 16 * 2 + m // 16``, and its nibble is ``4 * (k % 2) + 2 * (k // 8 % 2) + m // 8 % 2``. All
codes of a word have the same m % 8, so those of gate and up, or of the two halves of a head, lie in words of their own: 16 by 16.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from .layouts import PackLayout, TileLayout
from .placement import Place, Split
from .safetensors_file import DTYPES, TensorTable

HEAD = 128
"""Size of a head, in every version until 0.5."""


def _mma(inputs: int, outputs: int, of: int) -> tuple[int, ...]:
    """The code, counted along in, then out, of each nibble of a tile; of: outputs apart that lie in neighbouring words (1, or 2 of two)."""
    order = [0] * (inputs * outputs)
    for m in range(outputs):
        for k in range(inputs):
            high = m * of
            lane, w = (high % 8) // of * 4 + k % 8 // 2, k // 16 * 2 + high // 16
            order[(lane * 4 + w) * 8 + 4 * (k % 2) + 2 * (k // 8 % 2) + high // 8 % 2] = m * inputs + k
    return tuple(order)


MMA = TileLayout(4, "<i4", (32, 32), _mma(32, 32, 1), transposed=True, offset=8, low=-8)
"""v, wo, w2."""
HALF_MMA = TileLayout(4, "<i4", (16, 32), _mma(32, 16, 2), transposed=True, offset=8, low=-8)
"""What shares tiles with another: gate and up, the halves of q's and k's heads. Every second 16 words of the tiles are its own."""
ROWS = PackLayout(4, "<i4", axis="out", transposed=True, offset=8, low=-8)
"""Since 0.6; heads are put in order in ``Place``."""

RUN = 64
"""Bytes of a tile that belong to one of the two that share it."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of a workspace.

    tiles         codes are in MMA order with w13 (until 0.5); turned_output: since 0.8
    dtype         of floats: "F16" or "BF16"; group: inputs of a group, 0: float weights
    heads, kv     query and key heads of ``head`` outputs; repeat: ranks that each have a copy of the same key head
    intermediate  feed-forward size of each layer; filled: with what is filled up with 0, of each layer; (): nothing is
    vocabulary    rows of the embedding; output: of lm_head
    qkv_bias      whether q, k, v have biases; o_bias: "model": wo's is the model's, "zero": it is filled up with 0
    """

    tiles: bool
    dtype: str
    tp: int
    hidden: int
    heads: int
    kv: int
    intermediate: tuple[int, ...]
    vocabulary: int
    output: int
    group: int = 0
    head: int = HEAD
    qkv_bias: bool = False
    o_bias: str = "model"
    turned_output: bool = True
    caches: dict[str, int] = field(default_factory=dict)
    filled: tuple[int, ...] = ()
    repeat: int = 1

    @property
    def layers(self) -> int:
        return len(self.intermediate)

    @property
    def padded(self) -> tuple[int, ...]:
        """Feed-forward size of each layer as it is stored."""
        return self.filled or self.intermediate

    @property
    def stored_kv(self) -> int:
        """Key heads as they are stored."""
        return self.kv * self.repeat

    def fill_up(self) -> Geometry:
        """With whole groups of the feed-forward and a key head for each rank, as LMDeploy since 0.6.4 fills them up and repeats them."""
        by = max(1, self.group) * self.tp
        filled = tuple(-(-inter // by) * by for inter in self.intermediate)
        repeat = self.tp // self.kv if self.tp > self.kv and self.tp % self.kv == 0 else 1
        return replace(self, filled=() if filled == self.intermediate else filled, repeat=repeat)


@dataclass(frozen=True, slots=True)
class Tree:
    """The tensors of a workspace in a space of addresses, where each lies, and the size of every file."""

    tensors: TensorTable
    places: dict[str, Place]
    sizes: dict[str, int]


def layout_of(name: str, tiles: bool) -> PackLayout | TileLayout:
    """How the codes of linear ``name`` are packed."""
    if not tiles:
        return ROWS
    return HALF_MMA if name.rpartition(".")[2] in {"q_proj", "k_proj", "gate_proj", "up_proj"} else MMA


def tree_of(shape: Geometry, number: int = 0) -> Tree:
    """Where everything lies. number: of the file in a set (``TensorTable``)."""
    tree = _Builder(shape, Tree(TensorTable(number), {}, {}))
    tree.ends()
    for layer in range(shape.layers):
        tree.layer(layer)
    tree.caches()
    return tree.tree


class _Builder:
    def __init__(self, shape: Geometry, tree: Tree) -> None:
        self.shape, self.tree, self.address = shape, tree, 0

    def add(self, name: str, dtype: str, shape: tuple[int, ...], place: Place) -> None:
        """One more tensor."""
        count = DTYPES[dtype].itemsize
        for length in shape:
            count *= length
        self.tree.tensors.add(name, dtype, shape, self.address, self.address + count)
        self.tree.places[name] = place
        self.address += count

    def file(self, name: str, size: int, copies: bool = True) -> tuple[str, ...]:
        """The files ``name`` of each rank (%d), which have a size; copies: False for one that is no rank's."""
        names = tuple(name % rank for rank in range(self.shape.tp)) if copies else (name,)
        self.tree.sizes.update(dict.fromkeys(names, size))
        return names

    def ends(self) -> None:
        """Embeddings, the last norm, lm_head."""
        s, tp = self.shape, self.shape.tp
        item = DTYPES[s.dtype].itemsize
        for name, stem, rows in (("model.embed_tokens", "tok_embeddings", s.vocabulary), ("lm_head", "output", s.output)):
            padded = -(-rows // tp) * tp
            if s.tiles:
                files = self.file(f"{stem}.weight", padded * s.hidden * item, False)
                place = Place(files, rows, s.hidden, item, 0, s.hidden * item, item)
            else:
                files = self.file(f"{stem}.%d.weight", padded * s.hidden * item // tp)
                if stem == "tok_embeddings":
                    place = Place(files, rows, s.hidden, item, 0, s.hidden // tp * item, item, "slots")
                elif s.turned_output:
                    place = Place(files, s.hidden, padded, item, 0, padded // tp * item, item, "slots", turned=True)
                else:
                    place = Place(files, padded, s.hidden, item, 0, s.hidden * item, item, "lines")
            self.add(f"{name}.weight", s.dtype, (rows, s.hidden), place)
            if stem == "tok_embeddings":
                self.vector("model.norm.weight", "norm.weight", s.hidden)

    def vector(self, name: str, file: str, length: int) -> None:
        """A norm's weight."""
        item = DTYPES[self.shape.dtype].itemsize
        self.add(name, self.shape.dtype, (length,), Place(self.file(file, length * item, False), 1, length, item, 0, length * item, item))

    def layer(self, number: int) -> None:
        """One decoder layer, in the order of a Hugging Face checkpoint."""
        s, model, here = self.shape, f"model.layers.{number}", f"layers.{number}"
        q, kv, inter, padded = s.heads * s.head, s.kv * s.head, s.intermediate[number], s.padded[number]
        attention, ffn = f"{here}.attention", f"{here}.feed_forward"
        self.vector(f"{model}.input_layernorm.weight", f"{attention}_norm.weight", s.hidden)
        before, total = 0, q + 2 * kv * s.repeat
        for leaf, outputs, copies in (("q_proj", q, 1), ("k_proj", kv, s.repeat), ("v_proj", kv, s.repeat)):
            head = 0 if leaf == "v_proj" else s.head
            self.linear(f"{model}.self_attn.{leaf}", f"{attention}.w_qkv", s.hidden, outputs, before, total, head, copies=copies)
            if s.qkv_bias:
                self.bias(f"{model}.self_attn.{leaf}", f"{attention}.w_qkv", outputs, before, total, head, copies)
            before += outputs * copies
        self.linear(f"{model}.self_attn.o_proj", f"{attention}.wo", q, s.hidden, 0, s.hidden, 0, "lines")
        if s.qkv_bias:
            item = DTYPES[s.dtype].itemsize
            files = self.file(f"{attention}.wo.%d.bias", s.hidden * item)
            if s.o_bias == "model":
                place = Place(files, 1, s.hidden, item, 0, s.hidden * item, item, copies=s.tp)
                self.add(f"{model}.self_attn.o_proj.bias", s.dtype, (s.hidden,), place)
        self.vector(f"{model}.post_attention_layernorm.weight", f"{here}.ffn_norm.weight", s.hidden)
        if s.tiles and s.group:
            for number_, leaf in enumerate(("gate_proj", "up_proj")):
                self.linear(f"{model}.mlp.{leaf}", f"{ffn}.w13", s.hidden, inter, number_, 2 * inter, twin=True)
        else:
            self.linear(f"{model}.mlp.gate_proj", f"{ffn}.w1", s.hidden, inter, 0, padded, padded=padded)
            self.linear(f"{model}.mlp.up_proj", f"{ffn}.w3", s.hidden, inter, 0, padded, padded=padded)
        self.linear(f"{model}.mlp.down_proj", f"{ffn}.w2", inter, s.hidden, 0, s.hidden, split="lines", padded=padded)

    def linear(
        self,
        name: str,
        file: str,
        inputs: int,
        outputs: int,
        before: int,
        total: int,
        head: int = 0,
        split: Split = "slots",
        twin: bool = False,
        padded: int = 0,
        copies: int = 1,
    ) -> None:
        """A linear that has ``outputs`` of a matrix's ``total``, from ``before``.

        twin     every second one, from ``before``
        padded   what is split, outputs or inputs, filled up with 0; 0: as they are
        copies   ranks that have the same outputs
        """
        s = self.shape
        ranks = s.tp if split == "slots" else 1
        high, wide = (padded or inputs, outputs) if split == "lines" else (inputs, padded or outputs)
        lines = high // (s.tp if split == "lines" else 1)
        before, total = before if twin else before // ranks, total // ranks
        if not s.group:
            item = DTYPES[s.dtype].itemsize
            files = self.file(f"{file}.%d.weight", lines * total * item)
            place = Place(files, high, wide, item, before * item, total * item, item, head=head, turned=True, split=split, copies=copies)
            self.add(f"{name}.weight", s.dtype, (outputs, inputs), place)
            return
        files = self.file(f"{file}.%d.qweight", lines * total // 2)
        if s.tiles:
            tile = 32 * 32 // 2
            if head or twin:  # 4 runs of every 16 outputs
                unit, slots = RUN, outputs // 16 * 4
                offset = before * RUN if twin else before // 32 * tile
                step, units = (2 * RUN, 0) if twin else (RUN, head // 16 * 4)
            else:
                unit, slots, offset, step, units = tile, outputs // 32, before // 32 * tile, tile, 0
            place = Place(files, inputs // 32, slots, unit, offset, total // 32 * tile, step, head=units, split=split)
            self.add(f"{name}.qweight", "I32", (inputs // 32, outputs * 4), place)
        else:
            unit, slots, step = (0, wide, 0) if head else (4, wide // 8, 4)
            place = Place(files, high, slots, unit, before // 2, total // 2, step, head=head, split=split, copies=copies)
            self.add(f"{name}.qweight", "I32", (inputs, outputs // 8), place)
        groups, stored, item = inputs // s.group, high // s.group, 4 if s.tiles else 2
        for leaf in ("scales", "zeros"):
            files = self.file(f"{file}.%d.{'scales_zeros' if s.tiles else leaf}", lines // s.group * total * item)
            start = before * item + (2 if s.tiles and leaf == "scales" else 0)
            place = Place(files, stored, wide, 2, start, total * item, item * (2 if twin else 1), split, head, copies=copies)
            self.add(f"{name}.{leaf}", "F16", (groups, outputs), place)

    def bias(self, name: str, file: str, outputs: int, before: int, total: int, head: int, copies: int) -> None:
        """The bias of a part of w_qkv."""
        s, item = self.shape, DTYPES[self.shape.dtype].itemsize
        files = self.file(f"{file}.%d.bias", total // s.tp * item)
        place = Place(files, 1, outputs, item, before // s.tp * item, total // s.tp * item, item, "slots", head, copies=copies)
        self.add(f"{name}.bias", s.dtype, (outputs,), place)

    def caches(self) -> None:
        """Scales of a quantized KV cache, by file name, with as many float32 as each has."""
        for name, count in self.shape.caches.items():
            place = Place(self.file(name, 4 * count, False), 1, count, 4, 0, 4 * count, 4)
            self.add(name, "F32", (count,), place)


CACHE = re.compile(r"layers\.(\d{1,5})\.past_kv_scale\.(\d{1,4})\.weight")
"""Scales of a quantized KV cache: 4 of float32 in a file (key scale and midpoint, value scale and midpoint), 2 if symmetric."""
