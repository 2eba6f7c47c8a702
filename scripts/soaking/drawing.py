"""Random checkpoints: what each source format can be drawn with, and the draws."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from checkpoints import DTYPES, Array, Tensors

from .models import DERIVATIONS, Layer, Model, products


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
