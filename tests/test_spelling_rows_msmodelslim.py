"""msModelSlim: a hand-made sample per row of its tensor table. Its law: w = (weight - weight_offset) * weight_scale."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from spelling import (
    ATTENTION,
    BFLOAT16,
    E8M0,
    INT4_CHANNEL,
    INT8_CHANNEL,
    INT8_TENSOR,
    LAYER,
    STATIC_INPUTS,
    TOKEN_INPUTS,
    AttentionSample,
    LinearSample,
    PlainSample,
    Row,
    Sample,
    by_name,
    decode_float_bits,
    derived,
    float_bits,
    functional,
    group,
    integer_outputs,
    linear,
    refused_message,
    unpacked,
    words,
)

from formats.errors import RefusedError
from formats.ir import Array, AttentionQuant, Element, PlainTensor, QuantArgs, dequantize, unknowable
from formats.layouts import PackLayout

WEIGHT_8 = np.array([[-127, -1, 0, 64], [5, 100, -128, 127]], dtype=np.int8)
WEIGHT_4 = np.array([[-8, -1, 0, 7], [1, 2, 3, -4]], dtype=np.int8)

PACKED_ALONG_OUT = PackLayout(bits=4, word="|i1", axis="out", low=-8)
PACKED_ALONG_IN = PackLayout(bits=4, word="|i1", axis="in", low=-8)
PACKED_FLOATS = PackLayout(bits=4, word="|u1", axis="in")
NF4_FLAT = PackLayout(bits=4, word="|u1", axis="in", order=(1, 0))


def float_tensor() -> Sample:
    """FLOAT: name, dtype and bytes unchanged."""
    stored = np.array([1.0, -0.0, 12.0], dtype=BFLOAT16)
    return PlainSample(PlainTensor("model.norm.weight", "BF16", (3,), stored), {"model.norm.weight": stored})


def w16a16s() -> Sample:
    """W16A16S: pruned weights that are still floats."""
    stored = np.array([[0.0, 0.5], [-1.5, 0.0]], dtype=np.float16)
    return PlainSample(PlainTensor(f"{LAYER}.weight", "F16", (2, 2), stored), {f"{LAYER}.weight": stored})


def w8a16_per_channel() -> Sample:
    """weight int8 [out, in]; scale and offset in the model's dtype, [out, 1]."""
    weight_scale = np.array([[0.5], [0.25]], dtype=BFLOAT16)
    weight_offset = np.array([[3.0], [-128.0]], dtype=BFLOAT16)
    layer = linear(replace(INT8_CHANNEL, symmetric=False), WEIGHT_8, weight_scale, zero_points=weight_offset.astype(np.int16))
    return LinearSample(layer, np.array([[-65.0, -2.0, -1.5, 30.5], [33.25, 57.0, 0.0, 63.75]]))


def w4a16_per_channel() -> Sample:
    """The same with one 4-bit value in each byte; a symmetric layer stores offsets of 0."""
    weight_scale = np.array([[0.5], [0.01]], dtype=BFLOAT16)  # bf16(0.01) is 0.010009765625
    layer = linear(INT4_CHANNEL, WEIGHT_4, weight_scale)
    return LinearSample(layer, np.array([[-4.0, -0.5, 0.0, 3.5], [0.010009765625, 0.02001953125, 0.030029296875, -0.0400390625]]))


def w8a16_per_tensor() -> Sample:
    """mm_tensor, the default: one scale and one offset, [1]."""
    weight_scale, weight_offset = np.array([0.125], dtype=np.float16), np.array([-28.0], dtype=np.float16)
    layer = linear(replace(INT8_TENSOR, symmetric=False), WEIGHT_8, weight_scale, zero_points=weight_offset.astype(np.int16))
    return LinearSample(layer, np.array([[-12.375, 3.375, 3.5, 11.5], [4.125, 16.0, -12.5, 19.375]]))


def w4a16_per_group() -> Sample:
    """MinMax: scale and offset float32 [out, in / group]."""
    weight_scale = np.array([[0.5, 0.25], [0.1, 2.0]], dtype=np.float32)
    weight_offset = np.array([[-8.0, 7.0], [0.0, -1.0]], dtype=np.float32)
    layer = linear(group(4, 2, symmetric=False), WEIGHT_4, weight_scale, zero_points=weight_offset.astype(np.int16))
    tenth = float(np.float32(0.1))
    return LinearSample(layer, np.array([[0.0, 3.5, -1.75, 0.0], [tenth, 2 * tenth, 8.0, -6.0]]))


def w4a16_ascend_v1_per_group() -> Sample:
    """Two consecutive output rows in a byte, the even row in the low nibble."""
    # row 0 is 8 f 0 7 in two's complement, row 1 is 1 2 3 c: the bytes are (row 1, row 0) per input
    codes = unpacked(PACKED_ALONG_OUT, words("18 2f 30 c7", "|i1"), WEIGHT_4)
    weight_scale = np.array([[0.5, 0.25], [1.0, 2.0]], dtype=np.float32)
    return LinearSample(linear(group(4, 2), codes, weight_scale), np.array([[-4, -0.5, 0, 1.75], [1, 2, 6, -8]]))


def w4a16_ascend_v1_per_channel() -> Sample:
    """Where there is one scale per row: two consecutive inputs in a byte, the even input in the low nibble."""
    # row 0: (-1, -8) is f8, (7, 0) is 70; row 1: (2, 1) is 21, (-4, 3) is c3
    codes = unpacked(PACKED_ALONG_IN, words("f8 70\n21 c3", "|i1"), WEIGHT_4)
    weight_scale = np.array([[0.5], [2.0]], dtype=BFLOAT16)
    return LinearSample(linear(INT4_CHANNEL, codes, weight_scale), np.array([[-4, -0.5, 0, 3.5], [2, 4, 6, -8]]))


# deq_scale is input_scale * weight_scale: 0.125 * (0.5, 0.25) = (0.0625, 0.03125).
# quant_bias is bias / deq_scale - sum(W) * input_offset: 1 / 0.0625 - -64 * -3 and -0.5 / 0.03125 - 104 * -3.
WEIGHT_SCALE = np.array([[0.5], [0.25]], dtype=np.float16)
INPUT_SCALE = np.array([0.125], dtype=np.float16)
INPUT_OFFSET = np.array([-3], dtype=np.int8)
DEQ_SCALE = np.array([0.0625, 0.03125], dtype=np.float32)
DEQ_SCALE_BITS = float_bits("3d800000 3d000000")
QUANT_BIAS = np.array([-176, 296], dtype=np.int32)
BIAS = np.array([1.0, -0.5], dtype=np.float16)
INPUTS = np.array([[1.0, -0.3, 4.0, 0.125], [100.0, -100.0, 0.0, 2.5]], dtype=np.float32)


def static_w8a8(deq_scale: Array, weight_scale: Array | None) -> Sample:
    """W8A8 as stored; without weight_scale it is what deq_scale and input_scale leave of it."""
    decoded = deq_scale if deq_scale.dtype == np.float32 else decode_float_bits(deq_scale)
    scales = decoded / INPUT_SCALE.astype(np.float32) if weight_scale is None else weight_scale
    extras = derived(deq_scale=deq_scale, quant_bias=QUANT_BIAS)
    layer = linear(
        INT8_CHANNEL,
        WEIGHT_8,
        scales,
        STATIC_INPUTS,
        bias=BIAS,
        input_scale=INPUT_SCALE,
        input_zero_point=INPUT_OFFSET,
        extras=extras,
    )
    outputs = integer_outputs(INPUTS, INPUT_SCALE, INPUT_OFFSET, WEIGHT_8, QUANT_BIAS, DEQ_SCALE)
    return LinearSample(layer, np.array([[-63.5, -0.5, 0.0, 32.0], [1.25, 25.0, -32.0, 31.75]]), call=(INPUTS, outputs))


def w8a8_deq_scale_int64() -> Sample:
    """fp16 and fp32 models: deq_scale int64 with the float32 bit pattern in its low half."""
    return static_w8a8(DEQ_SCALE_BITS, WEIGHT_SCALE)


def w8a8_deq_scale_float32() -> Sample:
    """bf16 models: deq_scale float32."""
    return static_w8a8(DEQ_SCALE, WEIGHT_SCALE)


def w8a8s() -> Sample:
    """Sparse, and V1's W8A8: no weight_scale, so it is deq_scale / input_scale."""
    return static_w8a8(DEQ_SCALE_BITS, None)


def w8a8_timestep() -> Sample:
    """W8A8 whose activation tensors are stacked along the diffusion's time step: the weights are one and the same."""
    steps = functional(
        input_scale=np.array([[0.125], [0.5], [0.25]], dtype=np.float32),
        input_offset=np.array([[-3], [0], [7]], dtype=np.float32),
    )
    layer = linear(INT8_CHANNEL, WEIGHT_8, WEIGHT_SCALE, STATIC_INPUTS, extras=steps)
    return LinearSample(layer, WEIGHT_8 * np.array([[0.5], [0.25]]))


def w8a8_dynamic() -> Sample:
    """weight_scale [out, 1]; inputs are quantized per token at run time."""
    layer = linear(INT8_CHANNEL, WEIGHT_8, np.array([[2.0], [0.5]], dtype=np.float32), TOKEN_INPUTS)
    return LinearSample(layer, np.array([[-254, -2, 0, 128], [2.5, 50, -64, 63.5]]))


def w8a8_mix() -> Sample:
    """W8A8_MIX (pdmix): the tensors of W8A8_DYNAMIC, and beside them those of W8A8 for the decode phase."""
    static = static_w8a8(DEQ_SCALE, WEIGHT_SCALE)
    assert isinstance(static, LinearSample)
    scheme = replace(static.layer.scheme, inputs=TOKEN_INPUTS)
    return replace(static, layer=replace(static.layer, scheme=scheme))


WEIGHT_SCALE_SECOND = np.array([[8.0, 17.0], [9.0, 16.0]], dtype=np.float32)
TWO_LEVEL_SCALE = np.array([[0.5], [0.25]], dtype=np.float32)
TWO_LEVEL_WEIGHTS = np.array([[-32, -4, 0, 59.5], [2.25, 4.5, 12, -16]])
"""q4 * weight_scale_second[group] * weight_scale[row]"""


def w4a8_dynamic_safe_tensor() -> Sample:
    """V0 safe_tensor: unpacked; integral second scales [out, groups] below a float32 scale [out, 1]."""
    layer = linear(group(4, 2), WEIGHT_4, WEIGHT_SCALE_SECOND, TOKEN_INPUTS, outer=TWO_LEVEL_SCALE)
    return LinearSample(layer, TWO_LEVEL_WEIGHTS)


def w4a8_dynamic_ascend_v1() -> Sample:
    """V0 ascendV1: packed along out, with scale_bias = 8 * sum over the inputs of w."""
    codes = unpacked(PACKED_ALONG_OUT, words("18 2f 30 c7", "|i1"), WEIGHT_4)
    scale_bias = np.array([[188.0], [22.0]], dtype=np.float32)
    layer = linear(
        group(4, 2),
        codes,
        WEIGHT_SCALE_SECOND,
        TOKEN_INPUTS,
        outer=TWO_LEVEL_SCALE,
        extras=derived(scale_bias=scale_bias),
    )
    np.testing.assert_array_equal(8 * dequantize(layer).sum(axis=1, keepdims=True), scale_bias)
    return LinearSample(layer, TWO_LEVEL_WEIGHTS)


def w4a8_dynamic_v1() -> Sample:
    """V1: packed along out, one level: scale_bias = 8 * sum(q * s)."""
    codes = unpacked(PACKED_ALONG_OUT, words("18 2f 30 c7", "|i1"), WEIGHT_4)
    scale_bias = np.array([[-8.0], [4.0]], dtype=np.float32)
    layer = linear(INT4_CHANNEL, codes, TWO_LEVEL_SCALE, TOKEN_INPUTS, extras=derived(scale_bias=scale_bias))
    np.testing.assert_array_equal(8 * dequantize(layer).sum(axis=1, keepdims=True), scale_bias)
    return LinearSample(layer, np.array([[-4, -0.5, 0, 3.5], [0.25, 0.5, 0.75, -1]]))


TOKEN_INPUTS_4 = replace(TOKEN_INPUTS, bits=4)


def w4a4_dynamic() -> Sample:
    """V1: one 4-bit value in each byte (the documents say packed); float32 scales per channel."""
    layer = linear(INT4_CHANNEL, WEIGHT_4, TWO_LEVEL_SCALE, TOKEN_INPUTS_4)
    return LinearSample(layer, np.array([[-4, -0.5, 0, 3.5], [0.25, 0.5, 0.75, -1]]))


def w4a4_dynamic_per_group() -> Sample:
    """The same with scales [out, in / group]."""
    layer = linear(group(4, 2), WEIGHT_4, WEIGHT_SCALE_SECOND, TOKEN_INPUTS_4)
    return LinearSample(layer, np.array([[-64, -8, 0, 119], [9, 18, 48, -64]]))


def w4a4_flatquant_dynamic() -> Sample:
    """The law gives the weights in the transformed space; the transforms of the inputs are functional."""
    transforms = functional(
        left_trans=np.array([[0.0, 1.0], [1.0, 0.0]], dtype=np.float32),
        right_trans=np.array([[0.5, 0.0], [0.0, 2.0]], dtype=np.float32),
        clip_ratio=np.array([0.9], dtype=np.float32),
    )
    layer = linear(INT4_CHANNEL, WEIGHT_4, TWO_LEVEL_SCALE, TOKEN_INPUTS_4, extras=transforms)
    return LinearSample(layer, WEIGHT_4 * np.array([[0.5], [0.25]]))


def wfp8afp8_dynamic() -> Sample:
    """weight float8_e4m3fn; scale float32 [out, 1]."""
    # sign, 4 bits of exponent (bias 7), 3 of mantissa: 38 is 1, 3c is 1.5, b0 is -0.5, 7e is 448, 01 is 2**-9
    codes = words("38 3c b0 7e\n00 80 01 40", "|u1")
    inputs = replace(TOKEN_INPUTS, element="e4m3")
    layer = linear(QuantArgs(8, "e4m3"), codes, np.array([[2.0], [0.5]], dtype=np.float32), inputs)
    return LinearSample(layer, np.array([[2, 3, -1, 896], [0, 0, 2**-10, 1]]))


def microscaling(bits: int, element: Element, size: int) -> QuantArgs:
    return QuantArgs(bits, element, strategy="group", group_size=size)


def w8a8_mxfp8() -> Sample:
    """weight float8_e4m3fn; weight_scale uint8 [out, groups] = exponent + 127 (E8M0); no offset."""
    codes = words("38 3c b0 7e\n38 38 38 40", "|u1")
    weight_scale = np.array([[127, 126], [130, 0]], dtype=np.uint8)  # 1, 1/2; 8, 2**-127
    inputs = replace(microscaling(8, "e4m3", 2), dynamic=True)
    layer = linear(microscaling(8, "e4m3", 2), codes, weight_scale.view(E8M0), inputs)
    return LinearSample(layer, np.array([[1, 1.5, -0.25, 224], [8, 8, 2.0**-127, 2.0**-126]]))


# E2M1 magnitudes 0 .5 1 1.5 2 3 4 6 by the low three bits, sign in bit 3; the even input is the low nibble
FP4_BYTES = words("21 f7\n98 0c", "|u1")
FP4_CODES = np.array([[1, 2, 7, 15], [8, 9, 12, 0]], dtype=np.uint8)
FP4_VALUES = np.array([[0.5, 1, 6, -6], [-0.0, -0.5, -2, 0]], dtype=np.float32)


def w4a4_mxfp4() -> Sample:
    """W4A4_MXFP4 and W4A8_MXFP: weight uint8 [out, in / 2] of E2M1 codes; weight_scale as in MXFP8."""
    codes = unpacked(PACKED_FLOATS, FP4_BYTES, FP4_CODES)
    weight_scale = np.array([[128, 125], [127, 137]], dtype=np.uint8)  # 2, 1/4; 1, 1024
    inputs = replace(microscaling(4, "e2m1", 2), dynamic=True)
    layer = linear(microscaling(4, "e2m1", 2), codes, weight_scale.view(E8M0), inputs)
    return LinearSample(layer, np.array([[1, 2, 1.5, -1.5], [0, -0.5, -2048, 0]]))


def w4a4_mxfp4_dualscale() -> Sample:
    """A float32 weight_dual_scale on top, here of rows that are one dual block (512 inputs) wide."""
    codes = unpacked(PACKED_FLOATS, FP4_BYTES, FP4_CODES)
    weight_scale = np.array([[128, 125], [127, 137]], dtype=np.uint8)
    weight_dual_scale = np.array([[[0.75]], [[3.0]]], dtype=np.float32)  # [out, dual blocks, 1]
    inputs = replace(microscaling(4, "e2m1", 2), dynamic=True)
    layer = linear(microscaling(4, "e2m1", 2), codes, weight_scale.view(E8M0), inputs, outer=weight_dual_scale.reshape(2, 1))
    powers = 2.0 ** (weight_scale.astype(np.float32) - 127)
    return LinearSample(layer, (FP4_VALUES.reshape(2, 2, 2) * powers[:, :, None] * weight_dual_scale).reshape(2, 4))


def w4a4_mxfp4_two_dual_blocks() -> Sample:
    """The same of rows that are two dual blocks wide: the tool multiplies the inner values of each by its dual scale."""
    stored = words("21 f7 98 0c\n10 76 54 32", "|u1")
    codes = unpacked(PACKED_FLOATS, stored, np.array([[1, 2, 7, 15, 8, 9, 12, 0], [0, 1, 6, 7, 4, 5, 2, 3]], dtype=np.uint8))
    weight_scale = np.array([[128, 125, 127, 137], [126, 127, 129, 130]], dtype=np.uint8)
    weight_dual_scale = np.array([[[0.1], [0.75]], [[3.0], [0.7]]], dtype=np.float32)  # [out, dual blocks, 1]
    inputs = replace(microscaling(4, "e2m1", 2), dynamic=True)
    outer = weight_dual_scale.reshape(2, 2)
    layer = linear(microscaling(4, "e2m1", 2), codes, weight_scale.view(E8M0), inputs, outer=outer, outer_size=4)
    # values 0.5 1, 6 -6, -0 -0.5, -2 0 times 2, 1/4, 1, 1024; values 0 0.5, 4 6, 2 3, 1 1.5 times 1/2, 1, 4, 8
    inner = np.array([[1, 2, 1.5, -1.5, 0, -0.5, -2048, 0], [0, 0.25, 4, 6, 8, 12, 8, 12]], dtype=np.float32)
    return LinearSample(layer, (inner.reshape(2, 2, 4) * weight_dual_scale).reshape(2, 8))


def w8a8_dynamic_svd() -> Sample:
    """The law gives the residual; the low-rank part svd_lowrank_l2 @ svd_lowrank_l1 is functional."""
    low_rank = functional(
        svd_lowrank_l1=np.array([[1.0, 0.0, 2.0, 0.0]], dtype=np.float32),
        svd_lowrank_l2=np.array([[0.5], [0.25]], dtype=np.float32),
    )
    layer = linear(INT8_CHANNEL, WEIGHT_8, WEIGHT_SCALE, TOKEN_INPUTS, extras=low_rank)
    return LinearSample(layer, WEIGHT_8 * np.array([[0.5], [0.25]]))


def smoothed_without_fusion() -> Sample:
    """P.div.mul_scale multiplies x, and the quantized layer is called P.linear."""
    mul_scale = np.array([2.0, 1.0, 0.5, 0.25], dtype=np.float32)
    layer = linear(INT8_CHANNEL, WEIGHT_8, WEIGHT_SCALE, TOKEN_INPUTS, input_smooth=mul_scale)
    return LinearSample(layer, np.array([[-127, -0.5, 0, 8], [2.5, 25, -16, 7.9375]]))


def quarot_rotation() -> Sample:
    """heads_rotation stands in the file without a description entry, and rotates the layer's inputs at run time."""
    rotation = functional(heads_rotation=np.array([[0.0, 1.0], [1.0, 0.0]], dtype=np.float32))
    layer = linear(INT8_CHANNEL, WEIGHT_8, WEIGHT_SCALE, TOKEN_INPUTS, extras=rotation)
    return LinearSample(layer, WEIGHT_8 * np.array([[0.5], [0.25]]))


def simulated_tensor_parallel() -> Sample:
    """P.weight is the ranks' weights side by side along in; each rank of P.tp_list has scales of its own."""
    rank_scales = [np.array([[0.5], [0.25]], dtype=np.float32), np.array([[2.0], [4.0]], dtype=np.float32)]
    rank_inputs = [np.array([0.125], dtype=np.float32), np.array([0.25], dtype=np.float32)]
    layer = linear(
        group(8, 2),
        WEIGHT_8,
        np.concatenate(rank_scales, axis=1),
        STATIC_INPUTS,
        input_scale=np.repeat(np.concatenate(rank_inputs), 2),
    )
    ranks = [WEIGHT_8[:, :2] * rank_scales[0], WEIGHT_8[:, 2:] * rank_scales[1]]
    codes = [np.rint(INPUTS[:1, :2] / rank_inputs[0]), np.rint(INPUTS[:1, 2:] / rank_inputs[1])]
    outputs = sum(code * scale @ rank.T for code, scale, rank in zip(codes, rank_inputs, ranks, strict=True))
    return LinearSample(layer, np.concatenate(ranks, axis=1), call=(INPUTS[:1], outputs))


def kv_cache(symmetric: bool, offset: Array, values: Array) -> Sample:
    """C8: kv_cache_scale and kv_cache_offset [kv_heads * head_dim] of k_proj and v_proj, taken before RoPE."""
    scales = np.array([0.5, 0.25], dtype=np.float16)
    codes = np.array([[-127, 127], [0, 4]], dtype=np.int8)
    operands = ("key", "value")
    attention = AttentionQuant(
        ATTENTION,
        "kv_cache",
        dict.fromkeys(operands, QuantArgs(8, symmetric=symmetric)),
        scales=dict.fromkeys(operands, scales),
        zero_points={} if symmetric else dict.fromkeys(operands, offset.astype(np.int16)),
        rope="before",
    )
    return AttentionSample(attention, dict.fromkeys(operands, codes), dict.fromkeys(operands, values))


def c8_symmetric() -> Sample:
    return kv_cache(True, np.zeros(2, dtype=np.float16), np.array([[-63.5, 31.75], [0, 1]]))


def c8_asymmetric() -> Sample:
    """cache = (int - offset) * scale."""
    return kv_cache(False, np.array([-128.0, 3.0], dtype=np.float16), np.array([[0.5, 31], [64, 0.25]]))


def fa_quant() -> Sample:
    """fa_q, fa_k and fa_v: a scale per head, [heads, 1]; the codes here are [heads, head_dim]."""
    scales = {
        "query": np.array([[0.5], [2.0]], dtype=np.float32),
        "key": np.array([[0.25], [1.0]], dtype=np.float32),
        "value": np.array([[4.0], [0.125]], dtype=np.float32),
    }
    codes = np.array([[-128, 2], [8, 127]], dtype=np.int8)
    values = {
        "query": np.array([[-64, 1], [16, 254]]),
        "key": np.array([[-32, 0.5], [8, 127]]),
        "value": np.array([[-512, 8], [1, 15.875]]),
    }
    attention = AttentionQuant(ATTENTION, "fa", dict.fromkeys(scales, QuantArgs(8)), scales=scales)
    return AttentionSample(attention, dict.fromkeys(scales, codes), values)


FLOAT8 = QuantArgs(8, "e4m3")
# 38 is 1, b0 -0.5; 7e 448, 01 2**-9
FLOAT8_CODES = words("38 b0\n7e 01", "|u1")
FA_SCALES = {
    "query": np.array([[0.5], [2.0]], dtype=np.float32),
    "key": np.array([[0.1], [1.0]], dtype=np.float32),
    "value": np.array([[4.0], [0.125]], dtype=np.float32),
}
FLOAT8_FA_VALUES = {
    "query": np.array([[0.5, -0.25], [896, 2**-8]]),
    "key": np.array([[0.1, -0.05], [448, 2**-9]]),
    "value": np.array([[4, -2], [56, 2**-12]]),
}


def fa_quant_fp8() -> Sample:
    """V1, quant_type FP8: the same scales, and offsets that are float32 zeros; codes are float8_e4m3fn."""
    attention = AttentionQuant(ATTENTION, "fa", dict.fromkeys(FA_SCALES, FLOAT8), scales=FA_SCALES)
    return AttentionSample(attention, dict.fromkeys(FA_SCALES, FLOAT8_CODES), FLOAT8_FA_VALUES)


def fa_quant_fp8_offsets_of_zero() -> Sample:
    """Their zeros spelled out as zero points say the same."""
    zeros = {operand: np.zeros((2, 1), dtype=np.float32) for operand in FA_SCALES}
    attention = AttentionQuant(ATTENTION, "fa", dict.fromkeys(FA_SCALES, FLOAT8), scales=FA_SCALES, zero_points=zeros)
    return AttentionSample(attention, dict.fromkeys(FA_SCALES, FLOAT8_CODES), FLOAT8_FA_VALUES)


def fa_quant_fp8_dynamic() -> Sample:
    """V1, quant_type FP8_DYNAMIC: a description entry, and no tensors."""
    args = dict.fromkeys(FA_SCALES, replace(FLOAT8, strategy="token", dynamic=True))
    return AttentionSample(AttentionQuant(ATTENTION, "fa", args, scales={}))


def fa_quant_int8_and_fp8() -> Sample:
    """V1, quant_type QK_INT8_V_FP8: int8 query and key, whose offsets are int8 zeros, and float8_e4m3fn value."""
    codes = np.array([[-128, 2], [8, 127]], dtype=np.int8)
    tenth = float(np.float32(0.1))
    attention = AttentionQuant(ATTENTION, "fa", {"query": QuantArgs(8), "key": QuantArgs(8), "value": FLOAT8}, scales=FA_SCALES)
    values = {
        "query": np.array([[-64, 1], [16, 254]]),
        "key": np.array([[-128 * tenth, 2 * tenth], [8, 127]]),
        "value": FLOAT8_FA_VALUES["value"],
    }
    return AttentionSample(attention, {"query": codes, "key": codes, "value": FLOAT8_CODES}, values)


def fa_quant_dynamic_query() -> Sample:
    """V1, quant_type Q_FP8_DYNAMIC_KV_FP8: query has no tensors, key and value have theirs."""
    static = ("key", "value")
    args = {"query": replace(FLOAT8, strategy="token", dynamic=True), **dict.fromkeys(static, FLOAT8)}
    attention = AttentionQuant(ATTENTION, "fa", args, scales={operand: FA_SCALES[operand] for operand in static})
    return AttentionSample(attention, dict.fromkeys(static, FLOAT8_CODES), {operand: FLOAT8_FA_VALUES[operand] for operand in static})


ROWS = by_name(
    float_tensor,
    w16a16s,
    w8a16_per_channel,
    w4a16_per_channel,
    w8a16_per_tensor,
    w4a16_per_group,
    w4a16_ascend_v1_per_group,
    w4a16_ascend_v1_per_channel,
    w8a8_deq_scale_int64,
    w8a8_deq_scale_float32,
    w8a8s,
    w8a8_timestep,
    w8a8_dynamic,
    w8a8_mix,
    w4a8_dynamic_safe_tensor,
    w4a8_dynamic_ascend_v1,
    w4a8_dynamic_v1,
    w4a4_dynamic,
    w4a4_dynamic_per_group,
    w4a4_flatquant_dynamic,
    wfp8afp8_dynamic,
    w8a8_mxfp8,
    w4a4_mxfp4,
    w4a4_mxfp4_dualscale,
    w4a4_mxfp4_two_dual_blocks,
    w8a8_dynamic_svd,
    smoothed_without_fusion,
    quarot_rotation,
    simulated_tensor_parallel,
    c8_symmetric,
    c8_asymmetric,
    fa_quant,
    fa_quant_fp8,
    fa_quant_fp8_offsets_of_zero,
    fa_quant_fp8_dynamic,
    fa_quant_int8_and_fp8,
    fa_quant_dynamic_query,
)


def nf4() -> Sample:
    """NF4: the codes are there (flat, the first element in the high nibble), their absmax is not."""
    unpacked(NF4_FLAT, words("0f 78", "|u1"), np.array([[0, 15, 7, 8]], dtype=np.uint8))
    raise unknowable(LAYER, "NF4", "the file has no absmax of its blocks")


def w8a8sc() -> Sample:
    """W8A8SC, W16A16SC: rewritten by the separate weight compressor."""
    raise unknowable(LAYER, "W8A8SC", "its bytes are the weight compressor's, and their format is not published")


def numpy_with_bias() -> Sample:
    """numpy: ".weight" and ".bias" are stripped to one key, so that the bias overwrites the int8 weight."""
    quant_weight = {LAYER: np.array([1.0, -0.5], dtype=np.float32)}
    assert quant_weight[LAYER].ndim == 1
    raise unknowable(LAYER, "its entry in quant_weight.npy", "the float bias has overwritten the int8 weight")


REFUSED = by_name(nf4, w8a8sc, numpy_with_bias)


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    ROWS[name]().prove()


@pytest.mark.parametrize(("name", "found"), list(zip(REFUSED, ("NF4", "W8A8SC", "quant_weight.npy"), strict=True)))
def test_refused_row(name: str, found: str) -> None:
    row: Row = REFUSED[name]
    with pytest.raises(RefusedError) as caught:
        row()
    assert refused_message(caught.value, [found, "quantize it again"])
