"""compressed-tensors: a hand-made sample per format: pack-quantized, int-quantized, float-quantized, NVFP4, MXFP4.

Its law: w = (q - zero_point) * scale. pack-quantized words hold q + 8 in plain order.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from spelling import (
    E4M3,
    E8M0,
    INT4_CHANNEL,
    INT8_CHANNEL,
    STATIC_INPUTS,
    TOKEN_INPUTS,
    LinearSample,
    Sample,
    by_name,
    digits,
    group,
    linear,
    unpacked,
    words,
)

from formats.ir import Array, QuantArgs, Region, dequantize
from formats.layouts import PackLayout

PACKED = PackLayout(bits=4, word="<i4", axis="in", offset=8, low=-8)
ZEROS_PACKED = PackLayout(bits=4, word="<i4", axis="out", offset=8, low=-8)
PACKED_8 = PackLayout(bits=8, word="<i4", axis="in", offset=128, low=-128)
FLOATS_PACKED = PackLayout(bits=4, word="|u1", axis="in")

WEIGHT_PACKED = words("76543210\nfedcba98\n88888888\n0f1e2d3c\n0\nffffffff\n12345678\n80808080")
CODES = digits("01234567 89abcdef 88888888 c3d2e1f0 00000000 ffffffff 87654321 08080808", zero=8)
SCALES = np.array([[0.5, 0.1], [1, 2], [0.3, 0.25], [4, 8], [1, 0.7], [0.5, 2], [0.2, 0.125], [3, 1]], dtype=np.float16)
"""[8 out, 2 groups of 4 inputs]"""


def grouped_weights(codes: Array) -> Array:
    """q * scale with the inputs of a group on an axis of their own."""
    return (codes.reshape(8, 2, 4) * SCALES.astype(np.float32)[:, :, None]).reshape(8, 8)


def pack_quantized() -> Sample:
    """weight_packed int32 [out, in / 8]; weight_scale [out, groups]."""
    codes = unpacked(PACKED, WEIGHT_PACKED, CODES)
    return LinearSample(linear(group(4, 4), codes, SCALES), grouped_weights(CODES))


def pack_quantized_8_bits() -> Sample:
    """The same with four codes of 8 bits in a word."""
    # q + 128, the lowest byte first: 00, 80, ff, 7f
    codes = unpacked(PACKED_8, words("7fff8000\n81848082"), np.array([[-128, 0, 127, -1], [2, 0, 4, 1]], dtype=np.int8))
    layer = linear(INT8_CHANNEL, codes, np.array([[0.5], [0.25]], dtype=np.float16))
    return LinearSample(layer, np.array([[-64, 0, 63.5, -0.5], [0.5, 0, 1, 0.25]]))


def pack_quantized_asymmetric() -> Sample:
    """weight_zero_point int32 [out / 8, groups], packed along out, output 0 in the lowest nibble."""
    codes = unpacked(PACKED, WEIGHT_PACKED, CODES)
    packed = digits("0f888175 8a1f4880", zero=8).T  # a group's eight outputs in a column
    zero_points = unpacked(ZEROS_PACKED, words("571888f0 0884f1a8"), packed)
    layer = linear(group(4, 4, symmetric=False), codes, SCALES, zero_points=zero_points)
    return LinearSample(layer, grouped_weights((CODES.reshape(8, 2, 4) - packed[:, :, None]).reshape(8, 8)))


def pack_quantized_act_order() -> Sample:
    """weight_g_idx [in]: columns keep the inputs' order, and their groups are irregular."""
    codes = unpacked(PACKED, WEIGHT_PACKED, CODES)
    g_idx = np.array([1, 0, 0, 1, 1, 0, 1, 0], dtype=np.int32)
    layer = linear(replace(group(4, 4), actorder="group"), codes, SCALES, g_idx=g_idx)
    weights = np.stack([CODES[:, k] * SCALES[:, g_idx[k]].astype(np.float32) for k in range(8)], axis=1)
    return LinearSample(layer, weights)


def int_quantized_static_asymmetric() -> Sample:
    """W8A8: weight_scale [out, 1]; input_scale and input_zero_point [1], of inputs x = (q - zero_point) * scale."""
    weight = np.array([[-128, 1, 0, 64], [5, 100, -127, 127]], dtype=np.int8)
    weight_scale = np.array([[0.5], [0.25]], dtype=np.float32)
    input_scale, input_zero_point = np.array([0.125], dtype=np.float32), np.array([-3], dtype=np.int8)
    bias = np.array([1.0, -0.5], dtype=np.float32)
    layer = linear(
        INT8_CHANNEL,
        weight,
        weight_scale,
        STATIC_INPUTS,
        bias=bias,
        input_scale=input_scale,
        input_zero_point=input_zero_point,
    )
    inputs = np.array([[1.0, -0.3, 4.0, 0.125], [100.0, -100.0, 0.0, 2.5]], dtype=np.float32)
    fake_quantized = np.array([[1, -0.25, 4, 0.125], [16.25, -15.625, 0, 2.5]])  # 130 and -125 steps: -128..127 less -3
    weights = np.array([[-64, 0.5, 0, 32], [1.25, 25, -31.75, 31.75]])
    return LinearSample(layer, weights, call=(inputs, fake_quantized @ weights.T + bias))


def int_quantized_dynamic() -> Sample:
    """W8A8 whose inputs are quantized per token."""
    weight = np.array([[-128, 127], [3, 0]], dtype=np.int8)
    layer = linear(INT8_CHANNEL, weight, np.array([[0.5], [0.25]], dtype=np.float32), TOKEN_INPUTS)
    return LinearSample(layer, np.array([[-64, 63.5], [0.75, 0]]))


# E4M3 has 4 bits of exponent (bias 7) and 3 of mantissa: 38 is 1, 3c 1.5, b0 -0.5, 40 2, 7e 448, c0 -2
FLOAT8 = words("38 3c b0 40\n7e c0 00 38\n40 40 40 80", "|u1")
FLOAT8_VALUES = np.array([[1, 1.5, -0.5, 2], [448, -2, 0, 1], [2, 2, 2, 0]])


def float_quantized_tensor() -> Sample:
    """weight float8_e4m3fn; one weight_scale and one input_scale."""
    layer = linear(
        QuantArgs(8, "e4m3", strategy="tensor"),
        FLOAT8,
        np.array([0.25], dtype=np.float32),
        QuantArgs(8, "e4m3", strategy="tensor"),
        input_scale=np.array([0.5], dtype=np.float32),
    )
    return LinearSample(layer, np.array([[0.25, 0.375, -0.125, 0.5], [112, -0.5, 0, 0.25], [0.5, 0.5, 0.5, 0]]))


def float_quantized_channel() -> Sample:
    """weight_scale [out, 1]."""
    scales = np.array([[0.5], [0.25], [3]], dtype=np.float32)
    layer = linear(QuantArgs(8, "e4m3"), FLOAT8, scales, replace(TOKEN_INPUTS, element="e4m3"))
    return LinearSample(layer, np.array([[0.5, 0.75, -0.25, 1], [112, -0.5, 0, 0.25], [6, 6, 6, 0]]))


def float_quantized_block() -> Sample:
    """weight_scale, or weight_scale_inv (also a factor), per block of 128 x 128; here of 2 x 2, the last one short."""
    scale_inv = np.array([[0.5, 2], [0.25, 8]], dtype=np.float32)
    args = QuantArgs(8, "e4m3", strategy="block", block=(2, 2))
    layer = linear(args, FLOAT8, scale_inv, replace(TOKEN_INPUTS, element="e4m3"))
    return LinearSample(layer, np.array([[0.5, 0.75, -1, 4], [224, -1, 0, 2], [0.5, 0.5, 16, 0]]))


# E2M1 magnitudes 0 .5 1 1.5 2 3 4 6 by the low three bits, sign in bit 3; the even input is the low nibble
FLOAT4_BYTES = words("21 f7\n98 0c", "|u1")
FLOAT4_CODES = np.array([[1, 2, 7, 15], [8, 9, 12, 0]], dtype=np.uint8)
FLOAT4_VALUES = np.array([[0.5, 1, 6, -6], [0, -0.5, -2, 0]], dtype=np.float32)


def nvfp4() -> Sample:
    """weight_packed uint8, weight_scale E4M3 [out, groups], weight_global_scale [1] that divides: value * (s / global)."""
    codes = unpacked(FLOATS_PACKED, FLOAT4_BYTES, FLOAT4_CODES)
    weight_scale = words("38 3c\n40 7e", "|u1").view(E4M3)  # 1, 1.5; 2, 448
    weight_global_scale = np.array([512], dtype=np.float32)
    args = QuantArgs(4, "e2m1", strategy="group", group_size=2)
    layer = linear(args, codes, weight_scale, outer=weight_global_scale, outer_divides=True)
    return LinearSample(layer, np.array([[1, 2, 18, -18], [0, -2, -1792, 0]]) / 1024)


def nvfp4_any_global_scale() -> Sample:
    """The same with a global scale that is no power of two: the quotient is rounded, then the product.

    In float64 neither is, to speak of: rounded to float32 each is what float32 itself gives.
    """
    codes = unpacked(FLOATS_PACKED, FLOAT4_BYTES, FLOAT4_CODES)
    weight_scale = words("39 3d\n43 7e", "|u1").view(E4M3)  # 1.125, 1.625; 2.75, 448
    weight_global_scale = np.array([2688 / 0.37], dtype=np.float32)  # 448 * 6 / absmax
    args = QuantArgs(4, "e2m1", strategy="group", group_size=2)
    layer = linear(args, codes, weight_scale, outer=weight_global_scale, outer_divides=True)
    quotients = np.array([[1.125, 1.625], [2.75, 448]]) / weight_global_scale.astype(np.float64)
    quotients = np.repeat(quotients.astype(np.float32), 2, axis=1).astype(np.float64)
    weights = (FLOAT4_VALUES.astype(np.float64) * quotients).astype(np.float32)
    by_reciprocal = replace(layer, outer=1 / weight_global_scale, outer_divides=False)
    assert (dequantize(by_reciprocal) != weights).any()
    return LinearSample(layer, weights)


def mxfp4() -> Sample:
    """weight_packed uint8; weight_scale uint8 [out, groups], the exponent of two plus 127."""
    codes = unpacked(FLOATS_PACKED, FLOAT4_BYTES, FLOAT4_CODES)
    weight_scale = np.array([[128, 125], [127, 130]], dtype=np.uint8)  # 2, 1/4; 1, 8
    layer = linear(QuantArgs(4, "e2m1", strategy="group", group_size=2), codes, weight_scale.view(E8M0))
    return LinearSample(layer, np.array([[1, 2, 1.5, -1.5], [0, -0.5, -16, 0]]))


def fused_qkv() -> Sample:
    """qkv_proj: q of 4 rows, then k and v of 2 rows; here k."""
    region = Region("model.layers.0.self_attn.qkv_proj.weight_packed", rows=(4, 6, 1))
    layer = linear(INT4_CHANNEL, region.take(CODES), region.take(SCALES[:, :1]), regions=(region,))
    return LinearSample(layer, np.array([[-8.0] * 8, [3.5] * 8]), stored={region.tensor: CODES})


def expert() -> Sample:
    """experts.down_proj [experts, out, in]; here expert 1 of 2."""
    stored = np.array([[[1, 2], [3, 4]], [[-5, 6], [7, -128]]], dtype=np.int8)
    scales = np.array([[[1], [1]], [[0.5], [0.25]]], dtype=np.float32)
    region = Region("model.layers.0.mlp.experts.down_proj.weight", index=(1,))
    layer = linear(INT8_CHANNEL, region.take(stored), region.take(scales), regions=(region,))
    return LinearSample(layer, np.array([[-2.5, 3], [1.75, -32]]), stored={region.tensor: stored})


ROWS = by_name(
    pack_quantized,
    pack_quantized_8_bits,
    pack_quantized_asymmetric,
    pack_quantized_act_order,
    int_quantized_static_asymmetric,
    int_quantized_dynamic,
    float_quantized_tensor,
    float_quantized_channel,
    float_quantized_block,
    nvfp4,
    nvfp4_any_global_scale,
    mxfp4,
    fused_qkv,
    expert,
)


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    ROWS[name]().prove()
