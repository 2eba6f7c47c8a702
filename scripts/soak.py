"""Soak: random plans on random checkpoints, killed now and then, each result read by plain code that shares nothing with ours.

    python scripts/soak.py --rounds 200          seeds from a random base, which is printed
    python scripts/soak.py --seed 7 --rounds 1   one of them again

A round makes a checkpoint in one of eleven source formats, draws a target and options, and runs the command line in a process of
its own; in some rounds it is killed on the way, up to three times, and the same command finishes. Then the folder is read by the
decoders of this file, which follow the tools' own packing code, and compared: codes, zero points, scales as NumPy rounds them, the
law's float32 values, what quantizes inputs and what an NPU derives from it, every other tensor byte for byte, what the configs say,
the certificate, and the fingerprints. A refusal must be one that the expectations of this file name as well. No round may leave a
file behind, or use more anonymous memory than --max-memory over that of a bare interpreter. 143 seeds in a row have all pairs of
formats.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from checkpoints import DTYPES, NAMES, Array, Tensors, read_tensors, write_tensors  # noqa: E402

MIB = 1 << 20
TIME_LIMIT = 300
"""Seconds after which a command counts as hung."""

# --- bits, by the tools' own recipes ----------------------------------------------------------------------------------


def pack(lanes: Array, bits: int) -> Array:
    """int32 words of a little-endian bit stream along the last axis of unsigned ``lanes`` [rows, n]."""
    span = 32 if 32 % bits else 32 // bits
    spans = lanes.reshape(lanes.shape[0], -1, span)
    words = np.zeros((*spans.shape[:2], span * bits // 32), np.uint32)
    for lane in range(span):
        word, shift = divmod(lane * bits, 32)
        value = spans[:, :, lane].astype(np.uint32)
        words[:, :, word] |= value << np.uint32(shift)
        if shift + bits > 32:
            words[:, :, word + 1] |= value >> np.uint32(32 - shift)
    return words.reshape(lanes.shape[0], -1).view(np.int32)


def unpack(words: Array, bits: int) -> Array:
    """The unsigned lanes [rows, n] of ``pack``."""
    span = 32 if 32 % bits else 32 // bits
    spans = np.ascontiguousarray(words).view(np.uint32).reshape(words.shape[0], -1, span * bits // 32)
    lanes = np.empty((*spans.shape[:2], span), np.uint8)
    for lane in range(span):
        word, shift = divmod(lane * bits, 32)
        value = spans[:, :, word] >> np.uint32(shift)
        if shift + bits > 32:
            value |= spans[:, :, word + 1] << np.uint32(32 - shift)
        lanes[:, :, lane] = value & np.uint32((1 << bits) - 1)
    return lanes.reshape(words.shape[0], -1)


def unsigned(codes: Array, bits: int) -> Array:
    return (codes.astype(np.int16) + (1 << bits - 1)).astype(np.uint8)


def signed(lanes: Array, bits: int) -> Array:
    return lanes.astype(np.int16) - (1 << bits - 1)


def pack_padded(lanes: Array, bits: int) -> Array:
    """compressed-tensors' words of whole lanes along the last axis; idle lanes of the last word are 0."""
    return pack(pad(lanes, -(-lanes.shape[1] // (32 // bits)) * (32 // bits)), bits)


def unpack_padded(words: Array, bits: int, count: int) -> Array:
    """The first ``count`` lanes of each row; what lies behind them must be 0."""
    insist(words.shape[1] == -(-count // (32 // bits)), "words are", list(words.shape), "for", count, "codes of", bits, "bits")
    lanes = unpack(words, bits)
    insist(not lanes[:, count:].any(), "idle lanes are not 0")
    return lanes[:, :count]


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def in_eights(matrix: Array, order: Any) -> Array:
    """Each eight columns in ``order``."""
    return matrix.reshape(matrix.shape[0], -1, 8)[:, :, order].reshape(matrix.shape)


def _fast_order() -> Array:
    """Of 4 x 64 codes, those that AutoAWQ's ``pack_intweight`` puts into the lanes of 64 int16 words."""
    pairs = np.arange(256).reshape(4, 2, 4, 4, 2).transpose(0, 1, 3, 2, 4)
    return pairs.reshape(4, 2, 4, 4, 2).transpose(0, 1, 2, 4, 3).reshape(-1)


def _marlin_order() -> Array:
    """Of four blocks of 16 inputs by 16 outputs, the codes in the lanes of 128 words, as in AutoAWQ's ``_get_perms``."""
    order = []
    for thread in range(32):
        rows = [2 * (thread % 4), 2 * (thread % 4) + 1, 2 * (thread % 4 + 4), 2 * (thread % 4 + 4) + 1]
        one = [16 * row + thread // 4 + 8 * block for block in (0, 1) for row in rows]
        order += [code + 256 * block for block in range(4) for code in one]
    return in_eights(np.array(order).reshape(-1, 8), AWQ_ORDER).reshape(-1)


FAST_ORDER, MARLIN_ORDER = _fast_order(), _marlin_order()
MARLIN_SCALES = [i + 8 * j for i in range(8) for j in range(8)]
MARLIN_SINGLE = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def pack_fast(codes: Array) -> Array:
    out, in_ = codes.shape
    tiles = codes.reshape(out // 4, 4, in_ // 64, 64).transpose(0, 2, 1, 3).reshape(-1, 256)[:, FAST_ORDER]
    return pack(tiles, 4).view(np.int16).reshape(out // 4, in_)


def unpack_fast(stored: Array) -> Array:
    out, in_ = stored.shape[0] * 4, stored.shape[1]
    tiles = unpack(np.ascontiguousarray(stored).reshape(-1, 64).view(np.int32), 4)[:, np.argsort(FAST_ORDER)]
    return tiles.reshape(out // 4, in_ // 64, 4, 64).transpose(0, 2, 1, 3).reshape(out, in_)


def pack_marlin(codes: Array) -> Array:
    out, in_ = codes.shape
    blocks = codes.T.reshape(in_ // 16, 16, out // 16, 16).transpose(0, 2, 1, 3).reshape(-1, 1024)[:, MARLIN_ORDER]
    return pack(blocks, 4).reshape(in_ // 16, out * 2)


def unpack_marlin(stored: Array) -> Array:
    in_, out = stored.shape[0] * 16, stored.shape[1] // 2
    blocks = unpack(np.ascontiguousarray(stored).reshape(-1, 128), 4)[:, np.argsort(MARLIN_ORDER)]
    return blocks.reshape(in_ // 16, out // 16, 16, 16).transpose(0, 2, 1, 3).reshape(in_, out).T


def marlin_scales(scales: Array) -> Array:
    """[groups, out] in Marlin's order."""
    order = MARLIN_SCALES if scales.shape[0] > 1 else MARLIN_SINGLE
    return scales.reshape(-1, len(order))[:, order].reshape(scales.shape)


def padded_groups(groups: int, group: int) -> int:
    """Columns of AutoAWQ's GEMV scales: ``8 * calculate_zeros_width``."""
    at_once = {64: 2, 32: 4}.get(group, 1)
    return 8 * math.ceil(math.ceil(groups / 8) / at_once) * at_once


def pad(grid: Array, columns: int) -> Array:
    return np.pad(grid, ((0, 0), (0, columns - grid.shape[1])))


def nibbles(codes: Array, axis: int) -> Array:
    """ascendv1: two signed codes a byte along ``axis``, the first in the low nibble."""
    lanes = codes.astype(np.uint8) & 15
    even, odd = (lanes[::2], lanes[1::2]) if axis == 0 else (lanes[:, ::2], lanes[:, 1::2])
    return (even | odd << 4).astype(np.uint8).view(np.int8)


def codes_of_nibbles(stored: Array, axis: int) -> Array:
    lanes = stored.view(np.uint8)
    both = np.stack([lanes & 15, lanes >> 4], axis + 1)
    codes = both.reshape((-1, stored.shape[1]) if axis == 0 else (stored.shape[0], -1)).astype(np.int8)
    return ((codes ^ 8) - 8).astype(np.int8)


# --- random checkpoints -----------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """A quantized linear ``w = (code - zero) * scale``, integers signed. scales and zeros: [out, groups].

    inputs         "": in float; "static", "dynamic": quantized too; "both": msModelSlim's W8A8_MIX, which has static scales
    input_scale    [1], of static inputs; input_zero: what is added
    spelled        of static inputs in msModelSlim: how the tool made deq_scale and quant_bias (``DERIVATIONS``)
    """

    name: str
    bits: int
    shape: tuple[int, int]
    scales: Array
    zeros: Array
    seed: int
    per_tensor: bool = False
    order: Array | None = None
    bias: Array | None = None
    inputs: str = ""
    input_scale: Array | None = None
    input_zero: int = 0
    spelled: str = ""

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    @property
    def group(self) -> int:
        """Inputs of a group."""
        return self.shape[1] // self.groups

    @property
    def g_idx(self) -> Array:
        return np.arange(self.shape[1], dtype=np.int32) // self.group if self.order is None else self.order

    @cached_property
    def codes(self) -> Array:
        half = 1 << self.bits - 1
        return np.random.default_rng(self.seed).integers(-half, half, self.shape, np.int8)

    @cached_property
    def deq_scale(self) -> Array:
        """[out] float32: as msModelSlim stores it, by way of the model's dtype where that holds it as a normal number."""
        assert self.input_scale is not None
        exact = products(self.input_scale, self.scales)
        dtype = NAMES[self.input_scale.dtype]
        rounded = cast(exact, dtype).astype(np.float32)
        normal = np.isfinite(rounded) & (rounded >= SMALLEST_NORMAL[dtype])
        found = np.where(normal, rounded, exact) if self.spelled in {"V0", "V1"} else exact
        return found * np.float32(1.3) if self.spelled == "contradicting" else found

    @cached_property
    def quant_bias(self) -> Array:
        """[out] int32: as msModelSlim stores it; its V1 has the bias' share in bfloat16."""
        return steps_of(self, self.deq_scale, self.spelled == "V1")


DERIVATIONS = ("V0", "V1", "exact", "sparse", "contradicting")
"""sparse: W8A8S, which has no weight_scale; contradicting: deq_scale is 30 % more than the product of the scales."""


def products(input_scale: Array, scales: Array) -> Array:
    """[out] float32: what one step of a sum of products is worth."""
    return np.asarray(input_scale.astype(np.float32) * scales[:, 0].astype(np.float32))


def steps_of(layer: Layer, deq_scale: Array, coarse: bool = False) -> Array:
    """[out] int32: quant_bias, the bias and the share of the input's zero point in steps of ``deq_scale``."""
    bias = np.zeros(layer.shape[0]) if layer.bias is None else layer.bias.astype(np.float64)
    steps = np.where(bias == 0, 0.0, bias / deq_scale.astype(np.float64))
    steps = cast(steps, "BF16").astype(np.float64) if coarse else steps
    return np.rint(steps - layer.codes.sum(axis=1, dtype=np.int64) * layer.input_zero).astype(np.int32)


@dataclass
class Model:
    """A checkpoint in the making. source: a key of ``SOURCES``; carry: GPTQ v1 as GPTQModel writes it, zeros less a whole word of ones.

    dtype    what config.json says that the model is; packed: msModelSlim's ascendv1
    """

    source: str
    layers: list[Layer]
    plain: Tensors
    carry: bool = False
    dtype: str = "float16"
    packed: bool = False

    @property
    def codes(self) -> int:
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def format(self) -> str:
        return self.source.partition(":")[0]


class Writes(NamedTuple):
    """What a source format can be drawn with. unit: (out, in) are multiples of it; inputs: how they may be quantized."""

    bits: tuple[int, ...]
    unit: tuple[int, int]
    groups: tuple[int, ...]
    scales: tuple[str, ...] = ("F16", "BF16", "F32")
    zeros: bool = True
    inputs: tuple[str, ...] = ("",)


SOURCES = {
    "msmodelslim:safe_tensor": Writes((4, 8), (1, 1), (128, 64, 32, 256, 48, 0, -1)),
    "msmodelslim:ascendv1": Writes((4, 8), (2, 2), (128, 64, 32, 256, 48, 0, -1)),
    "awq:gemm": Writes((4,), (8, 1), (128, 64, 32, 256, 48, 0)),
    "awq:gemv": Writes((4,), (1, 8), (128, 64, 32, 256)),
    "awq:gemv_fast": Writes((4,), (4, 64), (128, 64, 32, 256), ("F16",)),
    "awq:marlin": Writes((4,), (64, 128), (128, 0), ("F16",), zeros=False),
    "gptq:v1": Writes((2, 3, 4, 8), (32, 32), (128, 64, 32, 256, 96, 0)),
    "gptq:v2": Writes((2, 3, 4, 8), (32, 32), (128, 64, 32, 256, 96, 0)),
    "compressed-tensors:pack": Writes((4, 8), (1, 1), (128, 64, 32, 256, 48, 0, -1)),
    "compressed-tensors:int": Writes((8,), (1, 1), (0, -1, 0, 128), inputs=("static", "static", "dynamic")),
    "msmodelslim:w8a8": Writes((8,), (1, 1), (0, -1), inputs=("static", "static", "both", "dynamic")),
}
"""group 0: per channel, -1: per tensor. The last is in either variant of msModelSlim, which differ in what they say alone."""


def draw_shape(rng: np.random.Generator, size: str, unit: tuple[int, int], group: int) -> tuple[int, int]:
    """[out, in]: sometimes odd, sometimes long and thin, always what the source's words and groups allow."""
    low, high = {"small": (32, 320), "medium": (128, 1024), "large": (1024, 8192)}[size]
    out, in_ = rng.integers(low, high, 2)
    if size != "small" and rng.random() < 0.3:
        out, in_ = (64, 1 << int(rng.integers(13, 17))) if rng.random() < 0.5 else (1 << int(rng.integers(13, 17)), 256)
    out = min(out, max(64, (1 << 24) // in_)) if size == "large" else out
    odd = rng.random() < 0.2  # else what every target's words and tiles hold
    step = (unit[0] if odd else math.lcm(unit[0], 64), math.lcm(unit[1] if odd else math.lcm(unit[1], 128), max(group, 1)))
    return max(1, int(out) // step[0]) * step[0], max(1, int(in_) // step[1]) * step[1]


@dataclass(frozen=True)
class Traits:
    """How layers are drawn. zeros: none, inner or extreme; span: of scales, powers of two; plain: 1 where 3-bit lanes of 7 are 8.

    inputs    how they are quantized; spelled: one of ``DERIVATIONS``
    """

    bits: int
    zeros: str
    dtype: str
    span: tuple[int, int]
    act_order: bool
    plain: int
    inputs: str = ""
    spelled: str = ""


def draw_layer(rng: np.random.Generator, name: str, shape: tuple[int, int], group: int, traits: Traits) -> Layer:
    out, in_ = shape
    bits, dtype = traits.bits, DTYPES[traits.dtype]
    groups = in_ // group if group > 0 else 1
    grid = (1, 1) if group == -1 else (out, groups)
    half = 1 << bits - 1
    if traits.zeros == "extreme":
        points = rng.choice([traits.plain - half, traits.plain + half - 1, 0], grid)
    else:
        points = rng.integers(1 - half, half, grid) if traits.zeros == "inner" else np.zeros(grid, np.int64)
    scales = 2 ** rng.uniform(*traits.span, grid)
    with np.errstate(over="ignore"):
        scales = scales.astype(dtype)
    order = rng.permutation(np.arange(in_) // group).astype(np.int32) if traits.act_order and groups > 1 else None
    bias = None
    if rng.random() < (0.6 if traits.inputs else 0.3):
        bias = (rng.normal(0, 0.5, out) * (rng.random() > 0.15)).astype(dtype)
    wide = (out, groups)
    layer = Layer(
        name, bits, shape, np.broadcast_to(scales, wide).copy(), np.broadcast_to(points, wide).astype(np.int16), int(rng.integers(1 << 40)),
        group == -1, order, bias,
    )  # fmt: skip
    if traits.inputs:
        layer.inputs = traits.inputs
        if traits.inputs != "dynamic":
            input_scale = layer.input_scale = (2 ** rng.uniform(-6, -1, 1)).astype(dtype)
            layer.input_zero = int(rng.integers(-128, 128)) if rng.random() < 0.8 else 0
            layer.spelled = traits.spelled
        if layer.spelled == "sparse":  # the law's scale is the quotient of what is stored
            stored = products(input_scale, layer.scales)
            layer.scales = (stored / input_scale.astype(np.float32)).reshape(-1, 1)
            layer.per_tensor, layer.zeros = False, np.zeros_like(layer.zeros)
            layer.__dict__["deq_scale"] = stored
    return layer


LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def draw_model(rng: np.random.Generator, source: str, size: str) -> Model:
    """A random checkpoint of ``source``; what engines fuse (q, k, v; gate, up) is quantized alike."""
    writes = SOURCES[source]
    carry = source == "gptq:v1" and rng.random() < 0.3
    bits = 4 if 4 in writes.bits and rng.random() < 0.6 else int(rng.choice(writes.bits))
    group = int(rng.choice(writes.groups[:3] if len(writes.groups) > 2 and rng.random() < 0.7 else writes.groups))
    kind = rng.random() * (0.5 if "" not in writes.inputs else 1)  # of W8A8 few have zero points, and no tool writes such in msModelSlim
    dtype, span = str(rng.choice(writes.scales)), (-11, -4)
    if rng.random() < 0.1:  # normal and finite in float16, or what only the other dtypes hold
        span = (-14, 10) if dtype == "F16" else (-22, 4) if rng.random() < 0.7 else (8, 18)
    traits = Traits(
        bits,
        "none" if not writes.zeros or kind < 0.4 else "inner" if kind < 0.8 else "extreme",
        dtype,
        span,
        source.startswith(("gptq", "compressed-tensors:pack")) and group > 0 and rng.random() < 0.25,
        int(source == "gptq:v1" and bits == 3 and not carry),
        str(rng.choice(writes.inputs)),
        "" if source != "msmodelslim:w8a8" else str(rng.choice(DERIVATIONS, p=[0.4, 0.25, 0.1, 0.15, 0.1])),
    )
    if traits.spelled == "sparse" and traits.inputs == "both":
        traits = replace(traits, spelled="V0")
    mixed = not source.startswith("awq") and rng.random() < 0.15
    blocks = {"small": int(rng.integers(1, 5)), "medium": int(rng.integers(1, 3)), "large": 1}[size]
    chosen = [name for name in LINEARS if size == "small" or rng.random() < 0.5] or ["mlp.down_proj"]
    if size == "large":
        chosen = list(rng.permutation(chosen)[: int(rng.integers(1, 4))])
    layers: list[Layer] = []
    plain: Tensors = {}
    in_float = str(rng.choice(chosen)) if len(chosen) > 1 and rng.random() < 0.1 else ""
    for block in range(blocks):
        for leaf in chosen:
            name = f"model.layers.{block}.{leaf}"
            own, size_of = traits, group
            if mixed and leaf in {"self_attn.o_proj", "mlp.down_proj"}:
                if own.inputs and rng.random() < 0.6:  # weights alone, as in a mix of types
                    own = replace(traits, inputs="", spelled="")
                    size_of = int(rng.choice(SOURCES["msmodelslim:safe_tensor"].groups))
                elif source.startswith(("msmodelslim", "compressed-tensors")) and rng.random() < 0.5:
                    size_of = int(rng.choice(writes.groups))
                else:
                    bits = int(rng.choice(writes.bits))
                    own = replace(traits, bits=bits, plain=int(source == "gptq:v1" and bits == 3 and not carry))
            shape = draw_shape(rng, size, writes.unit, size_of)
            if leaf == in_float and leaf in {"self_attn.o_proj", "mlp.down_proj"}:
                plain[f"{name}.weight"] = rng.normal(0, 0.02, (64, 128)).astype(DTYPES[str(rng.choice(["F16", "BF16", "F32"]))])
            else:
                layers.append(draw_layer(rng, name, shape, size_of, own))
        plain[f"model.layers.{block}.input_layernorm.weight"] = draw_floats(rng, (int(rng.integers(1, 600)),))
    if not layers or (rng.random() < 0.1 and not source.startswith("awq")):
        layers.append(draw_layer(rng, "lm_head", draw_shape(rng, "small", writes.unit, group), group, traits))
    else:
        plain["lm_head.weight"] = draw_floats(rng, (int(rng.integers(1, 300)), 128))
    wide = int(rng.integers(1, 8)) if rng.random() < 0.2 else 1
    plain["model.embed_tokens.weight"] = draw_floats(rng, (int(rng.integers(1, 6000 if size == "medium" else 300)) * wide, 300 * wide))
    plain["model.norm.weight"] = draw_floats(rng, (128,))
    if rng.random() < 0.2:
        plain["model.position_ids"] = rng.integers(0, 1 << 40, (1, 77))
        plain["model.temperature"] = np.asarray(rng.normal(), np.float32).reshape(())
    dtype = str(rng.choice(["float16", "bfloat16"]))
    return Model(source, layers, plain, carry, dtype, source == "msmodelslim:ascendv1" or rng.random() < 0.5)


def draw_floats(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """A float tensor; now and then with values that only a copy of bytes keeps."""
    array = rng.normal(0, 1, shape).astype(DTYPES[str(rng.choice(["F16", "BF16", "F32"]))])
    if rng.random() < 0.2:
        array.reshape(-1)[:4] = np.array([np.nan, np.inf, -0.0, -np.inf])[: array.size]
    return array


# --- sources, written -------------------------------------------------------------------------------------------------


def spell(model: Model, layer: Layer) -> Tensors:
    """The tensors that the source's tool would store for a layer."""
    variant, name, bits, scales = model.source, layer.name, layer.bits, layer.scales
    codes, zeros, turned = unsigned(layer.codes, bits), unsigned(layer.zeros, bits), np.ascontiguousarray(scales.T)
    if model.format == "msmodelslim":
        stored = layer.codes
        if model.packed and variant != "msmodelslim:safe_tensor" and bits == 4:
            stored = nibbles(stored, 1 if layer.groups == 1 else 0)
        grids = [scales, layer.zeros.astype(scales.dtype)]
        grids = [grid[0] for grid in (grids[0][:1], grids[1][:1])] if layer.per_tensor else grids
        parts = {"weight": stored, "weight_scale": grids[0], "weight_offset": grids[1]}
        if not layer.zeros.any() and layer.seed % 4 == 0:
            del parts["weight_offset"]
        if layer.spelled == "sparse":
            parts = {"weight": stored}
        if layer.input_scale is not None:
            deq_scale = layer.deq_scale if layer.input_scale.dtype == DTYPES["BF16"] else layer.deq_scale.view(np.int32).astype(np.int64)
            parts |= {"input_scale": layer.input_scale, "input_offset": np.array([layer.input_zero], layer.input_scale.dtype)}
            parts |= {"deq_scale": deq_scale, "quant_bias": layer.quant_bias}
    elif model.format == "compressed-tensors":
        grid = (1,) if layer.per_tensor else scales.shape
        parts = {"weight_scale": scales[:1].reshape(grid) if layer.per_tensor else scales}
        if layer.inputs:
            parts["weight"] = layer.codes
        else:
            parts |= {"weight_packed": pack_padded(codes, bits), "weight_shape": np.array(layer.shape, np.int64)}
        if is_asymmetric(layer) and (layer.inputs or layer.per_tensor):
            parts["weight_zero_point"] = layer.zeros[: grid[0]].reshape(grid).astype(np.int8)
        elif is_asymmetric(layer):
            parts["weight_zero_point"] = np.ascontiguousarray(pack_padded(np.ascontiguousarray(zeros.T), bits).T)
        if layer.order is not None:
            parts["weight_g_idx"] = layer.order
        if layer.input_scale is not None:
            parts["input_scale"] = layer.input_scale
            parts |= {"input_zero_point": np.array([layer.input_zero], np.int8)} if layer.input_zero else {}
    elif model.format == "gptq":
        qzeros = pack(np.ascontiguousarray(zeros.T), bits)
        if variant == "gptq:v1" and model.carry and bits != 3:
            ones = sum(1 << lane for lane in range(0, 32, bits))
            qzeros = (qzeros.view(np.uint32) - np.uint32(ones)).view(np.int32)
        elif variant == "gptq:v1":
            qzeros = pack(np.ascontiguousarray(zeros.T) - np.uint8(1) & np.uint8((1 << bits) - 1), bits)
        qweight = np.ascontiguousarray(pack(codes, bits).T)
        parts = {"qweight": qweight, "qzeros": qzeros, "scales": turned, "g_idx": layer.g_idx}
    elif variant == "awq:gemm":
        parts = {"qweight": pack(in_eights(np.ascontiguousarray(codes.T), AWQ_ORDER), 4), "scales": turned}
        parts["qzeros"] = pack(in_eights(np.ascontiguousarray(zeros.T), AWQ_ORDER), 4)
    elif variant == "awq:marlin":
        parts = {"qweight": pack_marlin(codes), "scales": marlin_scales(turned)}
    else:
        columns = padded_groups(layer.groups, layer.group)
        if variant == "awq:gemv":
            parts = {"qweight": pack(codes, 4), "qzeros": pack(pad(zeros, columns), 4), "scales": pad(scales, columns)}
        else:
            scaled = -(scales.astype(np.float32) * zeros).astype(scales.dtype)
            grids = [np.ascontiguousarray(pad(grid, columns).T) for grid in (scaled, scales)]
            parts = {"qweight": pack_fast(codes), "qzeros": grids[0], "scales": grids[1]}
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return {f"{name}.{part}": array for part, array in parts.items()}


def is_asymmetric(layer: Layer) -> bool:
    """Whether a source in compressed-tensors says its zero points: sometimes also where all are 0."""
    return bool(layer.zeros.any()) or layer.seed % 5 == 0


def type_of(layer: Layer) -> str:
    """msModelSlim's."""
    if layer.spelled == "sparse":
        return "W8A8S"
    return f"W{layer.bits}A" + {"": "16", "static": "8", "both": "8_MIX", "dynamic": "8_DYNAMIC"}[layer.inputs]


def write_model(model: Model, folder: Path, rng: np.random.Generator) -> int:
    """Write the checkpoint with its configs, in one file or several; returns its bytes."""
    folder.mkdir()
    tensors: Tensors = dict(model.plain)
    quantized: dict[str, str] = {}
    for layer in model.layers:
        spelled = spell(model, layer)
        tensors |= spelled
        quantized |= {name: type_of(layer) for name in spelled if not name.endswith(".bias")}
    if rng.random() < 0.5:
        tensors = {name: tensors[name] for name in sorted(tensors)}
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": model.dtype}
    stem, kind = "model", type_of(model.layers[0]).lower()
    if model.format == "msmodelslim":
        stem, packed = f"quant_model_weight_{kind}", model.packed and model.source != "msmodelslim:safe_tensor"
        description = {"model_quant_type": kind.upper(), **({"version": "1.0.0"} if packed else {})}
        description |= {name: quantized.get(name, "FLOAT") for name in tensors}
        (folder / f"quant_model_description{'' if packed else '_' + kind}.json").write_text(json.dumps(description))
    else:
        config["quantization_config"] = quantization_config(model)
    (folder / "config.json").write_text(json.dumps(config))
    count = int(rng.integers(2, 6)) if rng.random() < 0.4 else 1
    shards = [[name for number, name in enumerate(tensors) if number * count // len(tensors) == shard] for shard in range(count)]
    names = [f"{stem}.safetensors"] if count == 1 else [f"{stem}-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    for name, held in zip(names, shards, strict=True):
        write_tensors(folder / name, {one: tensors[one] for one in held})
    if count > 1:
        weight_map = {one: name for name, held in zip(names, shards, strict=True) for one in held}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(array.nbytes for array in tensors.values())


def quantization_config(model: Model) -> dict[str, Any]:
    variant, first = model.source.partition(":")[2], model.layers[0]
    if model.format == "compressed-tensors":
        return compressed_config(model)
    group = -1 if all(layer.groups == 1 for layer in model.layers) else next(layer.group for layer in model.layers if layer.groups > 1)
    if model.format == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "version": variant, "zero_point": variant != "marlin"}
    config: dict[str, Any] = {"quant_method": "gptq", "bits": first.bits, "group_size": group, "sym": False, "lm_head": True}
    config["desc_act"] = any(layer.order is not None for layer in model.layers)
    config["checkpoint_format"] = "gptq" if variant == "v1" else "gptq_v2"
    if model.carry:
        config["meta"] = {"quantizer": ["gptqmodel:7.6.0"]}
    odd = {layer.name: {"bits": layer.bits} for layer in model.layers if layer.bits != first.bits}
    return {**config, **({"dynamic": {f"+:^{re.escape(name)}$": rule for name, rule in odd.items()}} if odd else {})}


def compressed_config(model: Model) -> dict[str, Any]:
    """As compressed-tensors 0.17 writes it: the first scheme for all Linear, the others for their layers by name."""
    schemes: dict[str, list[str]] = {}
    for layer in model.layers:
        strategy, size = ("tensor", None) if layer.per_tensor else ("channel", None) if layer.groups == 1 else ("group", layer.group)
        weights = {"num_bits": layer.bits, "type": "int", "symmetric": not is_asymmetric(layer), "strategy": strategy, "group_size": size}
        weights |= {"dynamic": False, "actorder": None if layer.order is None else "group", "observer": "minmax", "observer_kwargs": {}}
        inputs: dict[str, Any] | None = None
        if layer.inputs:
            inputs = {"num_bits": 8, "type": "int", "dynamic": layer.inputs == "dynamic", "symmetric": not layer.input_zero}
            inputs |= {"strategy": "token" if layer.inputs == "dynamic" else "tensor", "group_size": None, "actorder": None}
        group = {"format": f"{'int' if layer.inputs else 'pack'}-quantized", "weights": weights, "input_activations": inputs}
        schemes.setdefault(json.dumps(group), []).append(layer.name)
    groups = {
        f"group_{number}": {**json.loads(scheme), "output_activations": None, "targets": names if number else ["Linear"]}
        for number, (scheme, names) in enumerate(schemes.items())
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups, "format": formats.pop() if len(formats) == 1 else "mixed-precision", "global_compression_ratio": None,
        "ignore": float_linears(model), "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "sparsity_config": {}, "transform_config": {}, "version": "0.17.0",
    }  # fmt: skip


def float_linears(model: Model) -> list[str]:
    found = [name.removesuffix(".weight") for name, array in model.plain.items() if name.endswith(".weight") and array.ndim == 2]
    return sorted(name for name in found if "embed" not in name)


# --- what is expected -------------------------------------------------------------------------------------------------


class Holds(NamedTuple):
    """What a target holds. smallest: zero point, unsigned.

    scales    their dtype; None: the source's; "model": that, but the model's instead of float32; "half": the same, but not in 8-bit
              layers whose inputs are quantized
    inputs    whether they may be quantized; own: layers keep their own groups
    """

    bits: tuple[int, ...]
    groups: tuple[int, ...]
    unit: tuple[int, int]
    scales: str | None = "F16"
    channel: bool = False
    act_order: bool = False
    smallest: int = 0
    zeros: bool = True
    lm_head: bool = True
    inputs: bool = False
    own: bool = False


GROUPS = (128, 64, 32)
TARGETS = {
    "awq:gemm": Holds((4,), GROUPS, (32, 32), lm_head=False),
    "awq:gemv": Holds((4,), GROUPS, (8, 32), lm_head=False),
    "awq:gemv_fast": Holds((4,), GROUPS, (8, 64), lm_head=False),
    "awq:marlin": Holds((4,), (128,), (64, 128), zeros=False, lm_head=False),
    "gptq:v1": Holds((2, 3, 4, 8), GROUPS, (32, 32), channel=True, act_order=True, smallest=1),
    "gptq:v2": Holds((2, 3, 4, 8), GROUPS, (32, 32), channel=True, act_order=True),
    "msmodelslim:safe_tensor": Holds((4, 8), (256, *GROUPS), (1, 1), None, channel=True, inputs=True),
    "msmodelslim:ascendv1": Holds((4, 8), (256, *GROUPS), (2, 2), None, channel=True, inputs=True),
    "msmodelslim:vllm-ascend": Holds((8,), (), (1, 1), "model", channel=True, zeros=False, inputs=True),
    "msmodelslim:mindie": Holds((4, 8), (256, 128, 64), (1, 1), None, channel=True, inputs=True),
    "compressed-tensors": Holds((4, 8), (), (8, 8), "half", channel=True, act_order=True, inputs=True, own=True),
    "dense:hf": Holds((2, 3, 4, 8), (), (1, 1), "dense", channel=True, act_order=True),
}
PAIRS = [(source, target) for source in SOURCES for target in (*TARGETS, "gptq")]
PAIR_STEP = 12
"""From a seed's pair to that of the next: thirteen in a row have every source and every target, 143 every pair."""
TORCH = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
SMALLEST_NORMAL = {"F16": 2.0**-14, "BF16": 2.0**-126, "F32": 2.0**-126}


def cast(values: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(np.float32).astype(DTYPES[dtype])


def fused(name: str) -> str:
    """What engines call the matrix that a linear becomes a part of."""
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.{'qkv' if leaf in {'q_proj', 'k_proj', 'v_proj'} else 'gate_up' if leaf in {'gate_proj', 'up_proj'} else leaf}"


@dataclass(frozen=True)
class Task:
    """A conversion as this file understands it: what the target must hold, or why it cannot."""

    model: Model
    target: str
    scale_dtype: str | None = None
    serve_dtype: str | None = None
    allow: tuple[str, ...] = ()

    @property
    def holds(self) -> Holds:
        return TARGETS[self.variant]

    @cached_property
    def variant(self) -> str:
        """The target; for plain "gptq" the version that can say every zero point."""
        if self.target != "gptq":
            return self.target
        return "gptq:v2" if any(self._lowest(layer) < 1 for layer in self.model.layers) else "gptq:v1"

    @property
    def dense(self) -> bool:
        return self.variant == "dense:hf"

    def bits(self, layer: Layer) -> int:
        """Of the codes as stored there; 0 if nothing there holds them."""
        return min((bits for bits in TARGETS[self.target if self.target != "gptq" else "gptq:v2"].bits if bits >= layer.bits), default=0)

    def _lowest(self, layer: Layer) -> int:
        return int(layer.zeros.min()) + (1 << max(self.bits(layer), layer.bits) - 1)

    def inputs(self, layer: Layer) -> str:
        """How its inputs are quantized there: compressed-tensors has no word for both ways."""
        if not self.holds.inputs:
            return ""
        return "static" if layer.inputs == "both" and self.variant == "compressed-tensors" else layer.inputs

    def keeps_tensor(self, layer: Layer) -> bool:
        """Whether one scale of the whole tensor stays one."""
        if self.variant in {"msmodelslim:safe_tensor", "msmodelslim:ascendv1"}:
            return layer.per_tensor and (self.model.format == "msmodelslim" or bool(self.inputs(layer)))
        return layer.per_tensor and bool(layer.inputs) and self.variant == "compressed-tensors"

    def group_of(self, layer: Layer) -> int | None:
        """Inputs of a group of ``layer`` there; 0: one group, None: there is no size that suits."""
        if self.holds.own or self.inputs(layer):
            return 0 if layer.groups == 1 else layer.group
        return self.group

    def says_zeros(self, layer: Layer) -> bool:
        """compressed-tensors: whether zero points are stored: where there are any, in what engines fuse with it too."""
        return any(other.zeros.any() for other in self.model.layers if fused(other.name) == fused(layer.name))

    @cached_property
    def group(self) -> int | None:
        """Inputs of a group for all layers whose inputs are in float; 0: one group each, None: there is no size that suits."""
        layers = [layer for layer in self.model.layers if not self.inputs(layer)]
        if self.holds.channel and all(layer.groups == 1 for layer in layers):
            return 0
        return next((size for size in self.holds.groups if all(layer.group % size == 0 for layer in layers)), None)

    def scales_in(self, layer: Layer) -> str:
        """The dtype of a layer's scales there; of its weights, where they are dequantized."""
        stored = NAMES[layer.scales.dtype]
        if self.serve_dtype and self.group_of(layer) == 0:
            return TORCH[self.serve_dtype]
        if self.dense and self.scale_dtype is None:
            counts = Counter(NAMES[array.dtype] for array in self.model.plain.values() if array.ndim == 2)
            return next((dtype for dtype, _ in counts.most_common() if dtype in SMALLEST_NORMAL), "F16")
        if self.dense and self.scale_dtype == "keep":
            return "F32"
        return self._stored_in(stored, bool(layer.inputs) and self.bits(layer) == 8)

    def _stored_in(self, stored: str, with_inputs: bool) -> str:
        if self.scale_dtype is not None:
            return TORCH.get(self.scale_dtype, stored)
        if self.holds.scales in {"half", "model"}:
            kept = stored != "F32" or (with_inputs and self.holds.scales == "half")
            return stored if kept else {"float16": "F16", "bfloat16": "BF16"}[self.model.dtype]
        return self.holds.scales or stored

    def input_scale_in(self, layer: Layer) -> str:
        assert layer.input_scale is not None
        return TORCH[self.serve_dtype] if self.serve_dtype else self._stored_in(NAMES[layer.input_scale.dtype], True)

    def deq_scale_in(self, layer: Layer) -> str:
        """int64 where the model is in float16 (or nobody knows), unless the source says otherwise and nothing was asked for."""
        if self.model.format == "msmodelslim" and not self.serve_dtype:
            return "F32" if layer.input_scale is not None and layer.input_scale.dtype == DTYPES["BF16"] else "I64"
        return "F32" if (self.serve_dtype or self.model.dtype) == "bfloat16" else "I64"

    def derives_anew(self, layer: Layer) -> bool:
        """Whether deq_scale and quant_bias follow from what is stored there, and are not the source's own."""
        assert layer.input_scale is not None
        kept = self.scales_in(layer) == NAMES[layer.scales.dtype] and self.input_scale_in(layer) == NAMES[layer.input_scale.dtype]
        return not kept or self.model.format != "msmodelslim"

    def bias_in(self, layer: Layer) -> str:
        assert layer.bias is not None
        stored = NAMES[layer.bias.dtype]
        if self.dense or self.scale_dtype == "float32":
            return stored
        return self._stored_in(stored, bool(layer.inputs))

    def bias(self, layer: Layer) -> Array | None:
        """As it must be stored there. Zeros in a GPTQ folder of a model without biases are AutoGPTQ's own."""
        made_up = self.model.format == "gptq" and layer.name != "lm_head"
        if layer.bias is None or (made_up and not layer.bias.astype(np.float32).any()):
            return None
        return cast(layer.bias, self.bias_in(layer))

    def refusals(self) -> set[str]:
        """The codes of everything that the target cannot hold."""
        found = {code for layer in self.model.layers for code in self._refusals(layer)}
        if self.holds.own and self.model.format != "compressed-tensors":  # layers that engines fuse must have groups alike
            sizes = {(fused(layer.name), self.group_of(layer)) for layer in self.model.layers}
            found |= {"fused"} if len({name for name, _ in sizes}) < len(sizes) else set()
        return found

    def _refusals(self, layer: Layer) -> Iterator[str]:
        holds, scales = self.holds, layer.scales.astype(np.float32)
        if layer.inputs and not holds.inputs and "activations-dropped" not in self.allow:
            yield "activations-dropped"
        if layer.spelled == "contradicting" and not self.variant.startswith("msmodelslim") and "deq-scale-differs" not in self.allow:
            yield "deq-scale-differs"
        if self.dense:
            with np.errstate(over="ignore"):
                reach = np.maximum(np.abs(layer.zeros + (1 << layer.bits - 1)), np.abs((1 << layer.bits - 1) - 1 - layer.zeros))
                if np.isinf(cast((reach * scales).max(), self.scales_in(layer)).astype(np.float32)):
                    yield "overflow?"  # if a code reaches it
            return
        bits = self.bits(layer)
        if not bits:
            yield "bits"
        if layer.shape[0] % holds.unit[0] or layer.shape[1] % holds.unit[1]:
            yield "shape-multiple"
        if layer.name == "lm_head" and not holds.lm_head:
            yield "lm-head"
        if layer.order is not None and not holds.act_order:
            yield "act-order"
        group = self.group_of(layer)
        if group is None or (layer.order is not None and group not in {0, layer.group}):
            yield "group-size"
        if self.inputs(layer) and self.variant.startswith("msmodelslim"):
            if layer.groups > 1:
                yield "group-size"
            if layer.zeros.any():
                yield "zero-point"
        half = 1 << max(bits, layer.bits) - 1
        if not holds.zeros and layer.zeros.any():
            yield "zero-point"
        if layer.zeros.min() + half < holds.smallest or layer.zeros.max() + half >= 2 * half:
            yield "zero-point"
        dtype = self.scales_in(layer)
        if self.target in {"awq:gemv", "awq:gemv_fast", "awq:marlin"} and dtype != "F16":  # what their kernels read
            yield "scale-dtype"
        if self.target == "msmodelslim:vllm-ascend" and dtype == "F32":
            yield "scale-dtype"
        stored = cast(scales, dtype).astype(np.float32)
        if np.isinf(stored).any():
            yield "scale-overflow"
        elif "scale-subnormal" not in self.allow and ((stored != scales) & (np.abs(stored) < SMALLEST_NORMAL[dtype])).any():
            yield "scale-subnormal"
        if self.variant == "awq:gemv_fast":
            with np.errstate(over="ignore"):
                if np.isinf(cast(stored * (layer.zeros + half), dtype).astype(np.float32)).any():
                    yield "overflow?"


# --- results, read ----------------------------------------------------------------------------------------------------


class WrongError(Exception):
    """A round found what must not be."""


def insist(holds: Any, *what: object) -> None:
    if not holds:
        raise WrongError(" ".join(map(str, what)))


@dataclass(frozen=True)
class Decoded:
    """A layer as stored: signed codes and zero points, scales as they are; whole: of which there is one for the tensor."""

    codes: Array
    zeros: Array
    scales: Array
    g_idx: Array
    whole: bool = False


def decode(variant: str, tensors: Tensors, name: str, bits: int, groups: int) -> Decoded:
    """Read a layer out of ``tensors``, from which its tensors are removed."""

    def take(part: str) -> Array:
        insist(f"{name}.{part}" in tensors, name, "has no", part)
        return tensors.pop(f"{name}.{part}")

    if variant.startswith("msmodelslim"):
        codes, scales, zeros = take("weight"), take("weight_scale"), take("weight_offset").astype(np.float32)
        if variant.endswith("ascendv1") and bits == 4:
            codes = codes_of_nibbles(codes, 1 if groups == 1 else 0)
        insist((zeros == np.rint(zeros)).all(), name, "has fractions of zero points")
        zeros = zeros.astype(np.int16)
        if scales.shape == (1,):
            insist(zeros.shape == (1,), name, "has one scale and zero points", zeros.shape)
            grid = (len(codes), 1)
            return Decoded(codes, np.broadcast_to(zeros, grid), np.broadcast_to(scales, grid), np.zeros(codes.shape[1], np.int64), True)
    elif variant.startswith("gptq"):
        codes = signed(unpack(take("qweight").T, bits), bits)
        stored = unpack(take("qzeros"), bits).T.astype(np.int16)
        zeros, scales = stored + (variant == "gptq:v1") - (1 << bits - 1), take("scales").T
        return Decoded(codes, zeros, scales, take("g_idx"))
    elif variant == "compressed-tensors":
        return decode_compressed(tensors, name, bits, take)
    elif variant == "awq:gemm":
        back = np.argsort(AWQ_ORDER)
        codes, zeros = (signed(in_eights(unpack(take(part), 4), back), 4).T for part in ("qweight", "qzeros"))
        scales = take("scales").T
    elif variant == "awq:marlin":
        codes, stored = signed(unpack_marlin(take("qweight")), 4), take("scales")
        place = np.argsort(marlin_scales(np.arange(stored.size).reshape(stored.shape)).reshape(-1))
        scales = stored.reshape(-1)[place].reshape(stored.shape).T
        zeros = np.zeros(scales.shape, np.int16)
    else:
        if variant == "awq:gemv":
            codes, lanes, scales = signed(unpack(take("qweight"), 4), 4), unpack(take("qzeros"), 4), take("scales")
        else:
            codes, scaled, scales = signed(unpack_fast(take("qweight")), 4), take("qzeros").T, take("scales").T
            with np.errstate(all="ignore"):  # where a scale is 0 its zero point is lost, with all that it could mean
                lanes = np.rint(np.nan_to_num(-scaled.astype(np.float32) / scales.astype(np.float32)))
            again = -(scales.astype(np.float32) * lanes).astype(scales.dtype)
            insist(same(scaled[:, :groups], again[:, :groups]), name, "has scaled zeros that no zero point makes")
        columns = padded_groups(groups, codes.shape[1] // groups)
        insist(lanes.shape[1] == scales.shape[1] == columns, name, "is padded to", lanes.shape[1], scales.shape[1], "groups, not", columns)
        insist(not lanes[:, groups:].any() and not scales[:, groups:].any(), name, "has padding that is not 0")
        zeros, scales = signed(lanes[:, :groups], 4), scales[:, :groups]
    return Decoded(codes, zeros, scales, np.arange(codes.shape[1]) // (codes.shape[1] // groups))


def decode_compressed(tensors: Tensors, name: str, bits: int, take: Callable[[str], Array]) -> Decoded:
    if f"{name}.weight_packed" in tensors:
        shape = take("weight_shape")
        insist(shape.dtype == np.int64 and shape.shape == (2,), name, "has a weight_shape of", shape.dtype, shape.shape)
        out, in_ = map(int, shape)
        codes = signed(unpack_padded(take("weight_packed"), bits, in_), bits)
    else:
        codes = take("weight")
        insist(codes.dtype == np.int8, name, "has codes in", codes.dtype)
        out, in_ = codes.shape
    scales = take("weight_scale")
    whole = scales.shape == (1,)
    grid = (out, 1) if whole else scales.shape
    zeros = np.zeros(grid, np.int16)
    if f"{name}.weight_zero_point" in tensors:
        stored = take("weight_zero_point")
        if stored.dtype == np.int32:
            zeros = signed(unpack_padded(np.ascontiguousarray(stored.T), bits, out).T, bits)
        else:
            insist(stored.dtype == np.int8 and stored.shape == scales.shape, name, "has zero points", stored.dtype, stored.shape)
            zeros = np.broadcast_to(stored.astype(np.int16), grid)
    g_idx = take("weight_g_idx") if f"{name}.weight_g_idx" in tensors else np.arange(in_) // (in_ // grid[1])
    return Decoded(codes, zeros, np.broadcast_to(scales, grid), g_idx, whole)


def law(codes: Array, zeros: Array, scales: Array, g_idx: Array, rows: slice) -> Array:
    steps = codes[rows].astype(np.float32) - zeros[rows].astype(np.float32)[:, g_idx]
    return np.asarray(steps * scales[rows].astype(np.float32)[:, g_idx])


def same(found: Array, wanted: Array) -> bool:
    """Equal bytes, shape and dtype."""
    return found.dtype == wanted.dtype and found.shape == wanted.shape and np.ascontiguousarray(found).tobytes() == wanted.tobytes()


def check_layer(task: Task, layer: Layer, tensors: Tensors) -> bool:
    """Compare a layer with what ``tensors`` hold; whether its values are exactly the source's."""
    name, dtype = layer.name, task.scales_in(layer)
    bands = [slice(row, row + 512) for row in range(0, layer.shape[0], 512)]
    ours = (layer.codes, layer.zeros, layer.scales, layer.g_idx)
    exact = True
    bias = task.bias(layer)
    if bias is not None:
        insist(same(tensors.pop(f"{name}.bias"), bias), name, "has another bias")
        exact = bool((bias.astype(np.float32) == layer.bias.astype(np.float32)).all())  # type: ignore[union-attr]
    if task.dense:
        stored = tensors.pop(f"{name}.weight")
        insist(stored.dtype == DTYPES[dtype], name, "is", stored.dtype, "not", dtype)
        for rows in bands:
            values = law(*ours, rows)
            insist(same(stored[rows], values.astype(stored.dtype)), name, "has other weights in rows", rows)
            exact &= bool((stored[rows].astype(np.float32) == values).all())
        return exact
    group = task.group_of(layer)
    repeat = layer.group // group if group else 1
    if task.variant == "compressed-tensors":
        insist((f"{name}.weight_packed" in tensors) == (not layer.inputs), name, "is in the other format of integers")
        insist((f"{name}.weight_zero_point" in tensors) == task.says_zeros(layer), name, "has zero points where it needs none, or none")
        insist((f"{name}.weight_g_idx" in tensors) == (layer.order is not None), name, "has a g_idx that says nothing, or none")
    exact &= check_inputs(task, layer, tensors)
    found = decode(task.variant, tensors, name, task.bits(layer), layer.groups * repeat)
    scales = cast(layer.scales, dtype)
    insist(found.whole == task.keeps_tensor(layer), name, "has one scale for the tensor:", found.whole)
    insist(found.codes.shape == layer.shape, name, "is", found.codes.shape, "not", layer.shape)
    insist((found.codes == layer.codes).all(), name, "has other codes")
    insist(same(found.scales, np.repeat(scales, repeat, 1)), name, "has other scales, or not in", dtype)
    insist(found.zeros.shape == found.scales.shape, name, "has zero points", found.zeros.shape)
    lost = (found.scales == 0) & (task.variant == "awq:gemv_fast")
    insist(((found.zeros == np.repeat(layer.zeros, repeat, 1)) | lost).all(), name, "has other zero points")
    if layer.order is not None:
        insist((found.g_idx == layer.order).all(), name, "has another g_idx")
    for rows in bands:
        theirs = law(found.codes, found.zeros, found.scales, found.g_idx, rows)
        insist((theirs == law(layer.codes, layer.zeros, scales, layer.g_idx, rows)).all(), name, "has other values in rows", rows)
    return exact and bool((scales.astype(np.float32) == layer.scales.astype(np.float32)).all())


def check_inputs(task: Task, layer: Layer, tensors: Tensors) -> bool:
    """Compare what quantizes a layer's inputs, and what an NPU derives from it; whether the scale is exactly the source's."""
    name = layer.name
    if task.inputs(layer) not in {"static", "both"}:
        return True
    assert layer.input_scale is not None
    scale = cast(layer.input_scale, task.input_scale_in(layer))
    insist(same(tensors.pop(f"{name}.input_scale"), scale), name, "has another input_scale, or not in", task.input_scale_in(layer))
    if task.variant == "compressed-tensors":
        zero = tensors.pop(f"{name}.input_zero_point", None)
        insist((zero is not None) == (layer.input_zero != 0), name, "has an input_zero_point of", zero, "not", layer.input_zero)
        insist(zero is None or same(zero, np.array([layer.input_zero], np.int8)), name, "has the input_zero_point", zero)
    else:
        insist(same(tensors.pop(f"{name}.input_offset"), np.array([layer.input_zero], scale.dtype)), name, "has another input_offset")
        deq_scale, steps = layer.deq_scale, layer.quant_bias
        if task.derives_anew(layer):
            deq_scale = products(scale, cast(layer.scales, task.scales_in(layer)))
            steps = steps_of(layer, deq_scale)
        wide = deq_scale.view(np.int32).astype(np.int64) if task.deq_scale_in(layer) == "I64" else deq_scale
        wide = wide[:1] if task.keeps_tensor(layer) else wide
        insist(same(tensors.pop(f"{name}.deq_scale"), wide), name, "has another deq_scale, or not in", wide.dtype)
        insist(same(tensors.pop(f"{name}.quant_bias"), steps), name, "has another quant_bias")
    return bool(scale.astype(np.float32) == layer.input_scale.astype(np.float32))


def check_result(task: Task, folder: Path, shard_bytes: int | None) -> bool:
    """Compare the whole folder with the model; whether every value is exactly the source's."""
    files = sorted(folder.glob("*.safetensors"))
    tensors: Tensors = {}
    for path in files:
        held = read_tensors(path)
        size = sum(array.nbytes for array in held.values())
        insist(shard_bytes is None or size <= shard_bytes or len(held) == 1, path.name, "holds", size, "bytes, not", shard_bytes)
        insist(not set(held) & set(tensors), path.name, "holds tensors of another shard")
        tensors |= held
    indexes = list(folder.glob("*.index.json"))
    insist(len(indexes) == (len(files) > 1), len(files), "files and", len(indexes), "indexes")
    if indexes:
        insist(set(json.loads(indexes[0].read_text())["weight_map"]) == set(tensors), "the index lists other tensors")
    check_config(task, folder)
    for name, array in task.model.plain.items():
        insist(name in tensors and same(tensors.pop(name), array), name, "is not what it was")
    exact = [check_layer(task, layer, tensors) for layer in task.model.layers]
    insist(not tensors, "nobody asked for", *list(tensors)[:3])
    return all(exact)


def check_config(task: Task, folder: Path) -> None:
    """What the folder says of itself: bits and group size of every layer, and the variant."""
    said = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    if task.variant.startswith("msmodelslim"):
        (path,) = folder.glob("quant_model_description*.json")
        types = json.loads(path.read_text())
        insist(("version" in types) == task.variant.endswith(("ascendv1", "vllm-ascend")), "the description is of another variant")
        for layer in task.model.layers:
            kind = {"": "A16", "static": "A8", "dynamic": "A8_DYNAMIC", "both": "A8_MIX" if "version" in types else "A8"}[layer.inputs]
            wanted = f"W{task.bits(layer)}{kind}"
            insist(types[f"{layer.name}.weight"] == wanted, layer.name, "is described as", types[f"{layer.name}.weight"], "not", wanted)
    elif task.variant == "compressed-tensors":
        check_compressed_config(task, said)
    elif not task.dense:
        version = said.get("version") if task.variant.startswith("awq") else {"gptq": "v1", "gptq_v2": "v2"}.get(said["checkpoint_format"])
        insist(task.variant.endswith(f":{version}"), "the config says", version, "not", task.variant)
        insist(said["group_size"] == (task.group or -1), "the config says group_size", said["group_size"], "not", task.group)
        for layer in task.model.layers:
            bits = said.get("dynamic", {}).get(f"+:^{re.escape(layer.name)}$", {}).get("bits", said["bits"])
            insist(bits == task.bits(layer), layer.name, "has", bits, "bits by the config")


def check_compressed_config(task: Task, said: dict[str, Any]) -> None:
    """Each layer's group, found by its name or as a Linear, and what is left in float."""
    insist((said["quant_method"], said["quantization_status"]) == ("compressed-tensors", "compressed"), "the config is of", said)
    missing = set(float_linears(task.model)) - set(said["ignore"])
    insist(not missing, "the config does not ignore", *missing)
    for layer in task.model.layers:
        insist(layer.name not in said["ignore"], "the config ignores", layer.name)
        found = [group for group in said["config_groups"].values() if layer.name in group["targets"]]
        found = found or [group for group in said["config_groups"].values() if "Linear" in group["targets"]]
        insist(len(found) == 1, layer.name, "is in", len(found), "groups of the config")
        weights, inputs, kind = found[0]["weights"], found[0]["input_activations"], task.inputs(layer)
        strategy = "tensor" if task.keeps_tensor(layer) else "channel" if layer.groups == 1 else "group"
        wanted = {
            "num_bits": task.bits(layer), "type": "int", "symmetric": not task.says_zeros(layer), "strategy": strategy,
            "group_size": layer.group if strategy == "group" else None, "dynamic": False,
            "actorder": None if layer.order is None else "group",
        }  # fmt: skip
        insist(wanted.items() <= weights.items(), layer.name, "has by the config the weights", weights, "not", wanted)
        insist(found[0]["format"] == ("int-quantized" if kind else "pack-quantized"), layer.name, "has the format", found[0]["format"])
        insist((inputs is None) == (kind == ""), layer.name, "has by the config the inputs", inputs)
        if inputs is not None:
            dynamic = kind == "dynamic"
            expected = {"num_bits": 8, "type": "int", "dynamic": dynamic, "strategy": "token" if dynamic else "tensor"}
            expected["symmetric"] = dynamic or not layer.input_zero
            insist(expected.items() <= inputs.items(), layer.name, "has by the config the inputs", inputs, "not", expected)


# --- processes --------------------------------------------------------------------------------------------------------


class Sandbox:
    """A folder for one round: source, the place of the result, and the child's own HOME and TMPDIR, which must stay empty."""

    def __init__(self, root: Path) -> None:
        self.source, self.place, self.home, self.temporary = (root / name for name in ("source", "place", "home", "tmp"))
        for folder in (self.place, self.home, self.temporary):
            folder.mkdir()
        self.result, self.hidden = self.place / "out", self.place / ".out.weighbridge"
        self.output, self.errors = root / "stdout", root / "stderr"

    def environment(self, kernels: str) -> dict[str, str]:
        """All that a child inherits."""
        fixed = {"HOME": str(self.home), "TMPDIR": str(self.temporary), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        return {**fixed, "PYTHONPATH": str(ROOT), **({"WEIGHBRIDGE_KERNELS": kernels} if kernels else {})}

    def leaked(self, *expected: str) -> list[str]:
        """Whatever lies where nothing should."""
        found = [str(path) for folder in (self.home, self.temporary) for path in folder.iterdir()]
        return found + [path.name for path in self.place.iterdir() if path.name not in expected]

    def progress(self) -> float:
        """The written part of the growing files; above 1 once they have taken their place."""
        try:
            stats = [entry.stat() for entry in os.scandir(self.hidden / "model") if entry.name.endswith(".safetensors")]
        except OSError:
            return 2.0 if self.hidden.exists() and self.result.exists() else 0.0
        return sum(stat.st_blocks * 512 for stat in stats) / max(1, sum(stat.st_size for stat in stats))

    def holds_work(self) -> bool:
        """Whether the journal has a record of a tile or of an entry."""
        try:
            data, at = (self.hidden / "journal").read_bytes(), 0
        except OSError:
            return False
        while at + 12 < len(data):
            if data[at + 12 : at + 13] in {b"T", b"E"}:
                return True
            at += 12 + struct.unpack_from("<IQ", data, at)[0]
        return False


@dataclass(frozen=True)
class Ended:
    """How a child ended. peak: bytes of anonymous memory; compiled: whether Numba compiled a kernel for it, which takes its own."""

    code: int
    report: dict[str, Any]
    stderr: str
    killed: bool
    peak: int
    seconds: float
    compiled: bool


def anonymous(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+)", text)
    return int(found[1]) * 1024 if found else 0


def compiled_kernels() -> set[str]:
    return {path.name for path in (ROOT / "formats" / "__pycache__").glob("*.nbc")}


def run(box: Sandbox, command: list[str], kernels: str = "", kill: Callable[[float], bool] = lambda seconds: False) -> Ended:
    """Run ``weighbridge COMMAND``, watching its memory; SIGKILL once ``kill`` of the seconds since its start says so."""
    before, began, peak, killed = compiled_kernels(), time.monotonic(), 0, False
    with box.output.open("wb") as output, box.errors.open("wb") as errors:
        line = [sys.executable, "-m", "convert", *command]
        child = subprocess.Popen(line, cwd=box.place, env=box.environment(kernels), stdout=output, stderr=errors, stdin=subprocess.DEVNULL)
        while child.poll() is None:
            seconds = time.monotonic() - began
            peak = max(peak, anonymous(child.pid))
            killed = killed or kill(seconds) or seconds > TIME_LIMIT
            if killed:
                child.send_signal(signal.SIGKILL)
                child.wait()
            time.sleep(0.001)
    seconds = time.monotonic() - began
    insist(seconds < TIME_LIMIT, "hung:", *command)
    text = box.output.read_text()
    report = json.loads(text) if not killed and text else {}
    killed = killed and child.returncode == -signal.SIGKILL
    return Ended(child.returncode, report, box.errors.read_text(), killed, peak, seconds, bool(compiled_kernels() - before))


def bare_interpreter() -> int:
    """Bytes of anonymous memory of an interpreter that does nothing."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(.3)"]) as child:
        time.sleep(0.2)
        return anonymous(child.pid)


# --- rounds -----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What the rounds of a run came to."""

    results: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    compiled: int = 0
    share: float = 0.0
    pairs: set[tuple[str, str]] = field(default_factory=set)
    failed: list[int] = field(default_factory=list)


@dataclass
class Round:
    """One round; ``rng`` decides everything but when exactly a kill hits."""

    seed: int
    box: Sandbox
    bare: int
    tally: Tally
    share: float = 0.0
    note: str = ""

    def run(self) -> str:
        rng = np.random.default_rng(self.seed)
        source, target = PAIRS[self.seed * PAIR_STEP % len(PAIRS)]
        wanted_kills = int(rng.integers(1, 4)) if rng.random() < 0.45 else 0
        size = str(rng.choice(["small", "medium", "large"], p=[0.05, 0.15, 0.8] if wanted_kills else [0.45, 0.3, 0.25]))
        task = self._draw(rng, source, target, size)
        size_of = write_model(task.model, self.box.source, rng)
        proof, kernels = rng.random() > 0.15, str(rng.choice(["numba", "numba", "numpy", ""]))
        shard = int(size_of / rng.uniform(0.8, 12)) + 1 if rng.random() < 0.4 else None
        options = ["--json", *([] if proof else ["--no-proof"]), *([] if shard is None else ["--max-shard-size", str(shard)])]
        options += [] if rng.random() < 0.15 else ["--jobs", str(rng.integers(1, 5))]
        for flag, value in (("--scale-dtype", task.scale_dtype), ("--serve-dtype", task.serve_dtype)):
            options += [] if value is None else [flag, value]
        for code in task.allow:
            options += ["--allow", code]
        command = ["convert", str(self.box.source), str(self.box.result), "--to", target, *options]
        limit = int(rng.integers(96, 513)) if rng.random() < 0.5 else self._least(command) + int(rng.integers(0, 3))
        over = rng.random() < 0.15 and self._older(rng)
        command += ["--max-memory", f"{limit}MiB", *(["--overwrite"] if over else [])]
        scheme = task.model.layers[0]
        shown = [word for word in command[3:] if word not in {"--json", "--to"}]
        self.note = (
            f"{source} -> {' '.join(shown)} {kernels or 'auto'}; {len(task.model.layers)} layers, {task.model.codes / 1e6:.1f} M of "
            f"{scheme.bits} bits, groups of {scheme.group}"
        )
        self.tally.pairs.add((source, target))
        refusals = task.refusals()
        older = (self.box.result / "weighbridge.json").read_bytes() if over else b""
        ended, had_work = self._until_done(rng, command, kernels, 0 if refusals else wanted_kills, limit, over)
        self.note += f"; {ended.seconds:.1f} s"
        if ended.code == 3:
            self._check_refused(ended, refusals, older)
            insist(self.share <= 1, "used more memory than it may")
            return "refused"
        insist(ended.code == 0, "exit", ended.code, ended.report.get("error", ""), ended.stderr[-2000:])
        insist(refusals <= {"overflow?"}, "done, though it cannot be held:", *refusals)
        insist(ended.report["resumed"] == had_work, "resumed is", ended.report["resumed"], "but the journal held work:", had_work)
        exact = check_result(task, self.box.result, shard)
        dropped = any(layer.input_scale is not None and not task.inputs(layer) for layer in task.model.layers)
        self._check_certificate(proof, exact, kernels, dropped)
        insist(not self.box.leaked("out"), "left behind:", *self.box.leaked("out"))
        insist(self.share <= 1, "used more memory than it may, and is right otherwise")
        return "exact" if exact else "rounded"

    def _draw(self, rng: np.random.Generator, source: str, target: str, size: str) -> Task:
        """A model and options for the pair; most of the time such that the target holds them."""
        any_will_do = rng.random() < 0.2
        for _ in range(40):
            scale = str(rng.choice(["keep", *TORCH])) if rng.random() < 0.45 else None
            serve = str(rng.choice(["float16", "bfloat16"])) if target.startswith("msmodelslim") and rng.random() < 0.3 else None
            allow = ("scale-subnormal",) * (rng.random() < 0.3)
            if source == "msmodelslim:w8a8" or source == "compressed-tensors:int":
                allow += ("activations-dropped",) * (rng.random() < 0.7) + ("deq-scale-differs",) * (rng.random() < 0.4)
            task = Task(draw_model(rng, source, size), target, scale, serve, allow)
            if any_will_do or not task.refusals():
                break
        return task

    def _least(self, command: list[str]) -> int:
        """The least --max-memory that is accepted, in MiB: the refusal of less says it."""
        ended = run(self.box, [*command, "--max-memory", "1MiB"])
        found = re.search(r"needs (\d+)MiB", ended.report.get("error", ""))
        insist(ended.code == 2 and found, "1 MiB is not refused as it should be:", ended.code, ended.report, ended.stderr)
        insist(not self.box.leaked(), "left behind after a usage error:", *self.box.leaked())
        assert found is not None
        return int(found[1])

    def _older(self, rng: np.random.Generator) -> bool:
        """Try to put an older result where the new one will go."""
        target = str(rng.choice(list(TARGETS)))
        folders = [str(self.box.source), str(self.box.result)]
        allow = [word for code in ("scale-subnormal", "activations-dropped") for word in ("--allow", code)]
        ended = run(self.box, ["convert", *folders, "--to", target, "--json", *allow])
        insist(ended.code in {0, 3}, "older result: exit", ended.code, ended.report, ended.stderr)
        return ended.code == 0

    def _until_done(
        self, rng: np.random.Generator, command: list[str], kernels: str, kills: int, limit: int, over: bool
    ) -> tuple[Ended, bool]:
        """Run, kill and run again; how the last run ended, and whether it had something to go on with."""
        had_work = False
        for left in range(kills, -1, -1):
            ended = run(self.box, command, kernels, self._killer(rng, left) if left else lambda seconds: False)
            self._check_memory(ended, limit)
            if not ended.killed:
                return ended, had_work
            place = self.box.progress()
            had_work = self.box.holds_work() and (self.box.hidden / "model").is_dir()
            insist(not over or self.box.result.is_dir() or place >= 1, "killed, and the older result is gone")
            if self.box.result.exists() and not over:
                self.tally.kills["after the end"] += 1
                cleaned = run(self.box, ["clean", str(self.box.place), "--json"])
                insist(cleaned.code == 0 and not self.box.leaked("out"), "clean left", *self.box.leaked("out"))
                shutil.rmtree(self.box.result)
                had_work = False
            else:
                self.tally.kills["before any work" if not had_work else "between tiles" if place < 0.99 else "after the last tile"] += 1
            self.note += f"; killed at {min(place, 1):.0%}"
        raise AssertionError("the last run is never killed")

    def _killer(self, rng: np.random.Generator, left: int) -> Callable[[float], bool]:
        """Kills early at a random time, at the very end, or once a part of what is to be written is; ``left`` kills share that."""
        kind, part = rng.random(), rng.random()
        if kind < 0.1:
            return lambda seconds: seconds > part * 0.8
        if kind < 0.2:
            return lambda seconds: self.box.progress() > 1.5 or (self.box.hidden / "model" / "config.json").exists()
        begun = self.box.progress()
        threshold = begun + (1 - begun) * part / left if begun <= 1 else part
        return lambda seconds: self.box.holds_work() and self.box.progress() >= threshold

    def _check_memory(self, ended: Ended, limit: int) -> None:
        if ended.compiled:
            self.tally.compiled += 1
            return
        self.share = max(self.share, (ended.peak - self.bare) / (limit * MIB))

    def _check_refused(self, ended: Ended, expected: set[str], older: bytes) -> None:
        insist(expected, "refused, though it can be held:", ended.report.get("error"))
        found = re.findall(r"\[([a-z-]+)\]", ended.report["error"])
        insist(found[:1] == [] or found[0] in expected, "refused for", *found, "not for", *expected)
        insist(found or "overflow?" in expected, "refused without a code:", ended.report["error"])
        insist(not self.box.leaked("out" if older else ""), "a refusal left", *self.box.leaked("out" if older else ""))
        insist(not older or (self.box.result / "weighbridge.json").read_bytes() == older, "a refusal changed the older result")
        self.note += f"; {ended.report['error'][:90]}"

    def _check_certificate(self, proof: bool, exact: bool, kernels: str, dropped: bool) -> None:
        """The certificate says what was found here, and its digests are those that the commands find.

        dropped: static scales of inputs were left out, which are in the source's fingerprint, and in neither of the certificate's
        """
        said = json.loads((self.box.result / "weighbridge.json").read_text())
        insist(said["proved"] == proof, "proved is", said["proved"])
        digests = []
        for path in (self.box.source, self.box.result):
            ended = run(self.box, ["fingerprint", str(path), "--json"], kernels)
            insist(ended.code == 0, "fingerprint: exit", ended.code, ended.report, ended.stderr)
            digests.append(ended.report["fingerprint"])
        insist((digests[0] == digests[1]) == (exact and not dropped), "exact is", exact, "and the fingerprints", *digests)
        if proof:
            certified = [said["fingerprint"][side]["total"] for side in ("source", "target")]
            insist(certified[dropped:] == digests[dropped:], "the certificate says", *certified, "and the folders", *digests)
            insist(not dropped or (certified[0] == certified[1]) == exact, "exact is", exact, "and the certificate says", *certified)
            insist(said["exact"] == exact, "the certificate says exact:", said["exact"])


@contextmanager
def sandbox(keep: Path | None, seed: int) -> Iterator[Sandbox]:
    if keep is not None:
        (keep / str(seed)).mkdir(parents=True)
        yield Sandbox(keep / str(seed))
        return
    with tempfile.TemporaryDirectory(prefix="weighbridge-soak-") as folder:
        yield Sandbox(Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, help="seed of the first round; the others follow. Default: random, and printed")
    parser.add_argument("--keep", type=Path, help="keep every round's folder in there")
    options = parser.parse_args()
    base = int.from_bytes(os.urandom(3), "little") if options.seed is None else options.seed
    bare, tally, began = bare_interpreter(), Tally(), time.monotonic()
    print(f"seeds {base} to {base + options.rounds - 1}; a bare interpreter has {bare / MIB:.1f} MiB of anonymous memory", flush=True)
    for seed in range(base, base + options.rounds):
        start = time.monotonic()
        with sandbox(options.keep, seed) as box:
            one = Round(seed, box, bare, tally)
            try:
                result = one.run()
            except Exception as error:
                kind = "" if isinstance(error, WrongError) else f"{type(error).__name__}: "
                result = f"FAILED: {kind}{error}\n    python scripts/soak.py --seed {seed} --rounds 1"
                tally.failed.append(seed)
        tally.results[result.partition(":")[0]] += 1
        tally.share = max(tally.share, one.share)
        print(f"{seed}: {one.note}; peak {one.share:.0%} of the limit, {time.monotonic() - start:.1f} s: {result}", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(
        f"{options.rounds} rounds in {minutes:.1f} min: {dict(tally.results)}; {len(tally.pairs)} of {len(PAIRS)} pairs of formats; "
        f"kills: {dict(tally.kills)}; highest peak {tally.share:.0%} of its limit, not counting {tally.compiled} runs that compiled kernels"
    )
    print(f"failed seeds: {tally.failed}" if tally.failed else f"nothing failed, nothing leaked; seeds from {base}")
    return 1 if tally.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
