"""MindSpore Golden Stick: a hand-made sample per row of its tensor tables, 0.6.0 to 1.4.1.

The sign of the zero point is the trap: 0.6.0 and 1.x checkpoints store it negated, w = (q + zp) * scale; the folders of
1.4.1 store it as it is. int64 scales are float32 bit patterns.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from spelling import (
    ATTENTION,
    INT4_CHANNEL,
    INT8_CHANNEL,
    STATIC_INPUTS,
    TOKEN_INPUTS,
    AttentionSample,
    LinearSample,
    Sample,
    by_name,
    decode_float_bits,
    derived,
    float_bits,
    group,
    integer_outputs,
    linear,
    unpacked,
    words,
)

from formats.ir import Array, AttentionQuant, QuantArgs, Region, dequantize
from formats.layouts import PackLayout

WEIGHT_8 = np.array([[-128, -1, 0, 64], [5, 100, -127, 127]], dtype=np.int8)
SCALES = np.array([0.5, 0.25], dtype=np.float16)
WEIGHTS_8 = np.array([[-64, -0.5, 0, 32], [1.25, 25, -31.75, 31.75]])

INT4 = PackLayout(bits=4, word="|i1", axis="out", transposed=True, low=-8)
"""qint4x2 [ic, oc / 2]: two outputs in a byte, the even one in the low nibble, in two's complement."""
WEIGHT_4 = np.array([[-8, -1, 0, 7], [1, 2, 3, -4]], dtype=np.int8)
WEIGHT_4_BYTES = words("18\n2f\n30\nc7", "|i1")  # a byte per input: (row 1, row 0) = (1, -8), (2, -1), (3, 0), (-4, 7)

DEQUANT_SCALE = float_bits("3d800000 3d000000")  # 0.0625, 0.03125
INPUTS = np.array([[1.0, -0.3, 4.0, 0.125], [100.0, -100.0, 0.0, 2.5]], dtype=np.float32)


def negated(zp: Array) -> Array | None:
    """The zero points of a stored negated zp, [groups, oc] turned round; None for +0.0 and -0.0 throughout."""
    return (-zp).astype(np.int16).T if zp.any() else None


def rtn_a16w8() -> Sample:
    """RTN a16w8 (0.6.0): _handler.weight, _weight_quantizer.scale and .zp_neg [oc]; zp_neg is +0.0."""
    zp_neg = np.array([0.0, 0.0], dtype=np.float16)
    return LinearSample(linear(INT8_CHANNEL, WEIGHT_8, SCALES, zero_points=negated(zp_neg)), WEIGHTS_8)


def ptq_a16w8_t_scale() -> Sample:
    """PTQ a16w8 (0.6.0): matmul.t_scale and .t_zp_neg; w = (q + t_zp_neg) * t_scale."""
    t_zp_neg = np.array([0.0, -3.0], dtype=np.float16)
    layer = linear(replace(INT8_CHANNEL, symmetric=False), WEIGHT_8, SCALES, zero_points=negated(t_zp_neg))
    return LinearSample(layer, np.array([[-64, -0.5, 0, 32], [0.5, 24.25, -32.5, 31]]))


def ptq_a16w8_weight_zp() -> Sample:
    """PTQ a16w8 (1.x): weight_scale and weight_zp, the negated zero point, which is -0.0 where it is symmetric."""
    weight_zp = np.array([-0.0, -0.0], dtype=np.float16)
    assert np.signbit(weight_zp).all()
    return LinearSample(linear(INT8_CHANNEL, WEIGHT_8, SCALES, zero_points=negated(weight_zp)), WEIGHTS_8)


def static_a8w8(input_scale: Array, input_zp: Array, bias: Array | None = None) -> Sample:
    """a8w8: no weight_scale; w = Wq * dequant_scale / input_scale, and a vector input_scale holds the smoothing."""
    deq = decode_float_bits(DEQUANT_SCALE)
    smoothed = len(set(input_scale.tolist())) > 1
    layer = linear(
        INT8_CHANNEL,
        WEIGHT_8,
        deq if smoothed else deq / np.float32(input_scale[0]),
        STATIC_INPUTS,
        bias=bias,
        input_scale=np.ones(1, dtype=np.float32) if smoothed else input_scale,
        input_zero_point=input_zp,
        input_smooth=1 / input_scale.astype(np.float32) if smoothed else None,
        extras=derived(dequant_scale=DEQUANT_SCALE),
    )
    return LinearSample(layer, WEIGHT_8 * deq[:, None] / input_scale.astype(np.float32))


INPUT_ZP = np.array([3], dtype=np.int8)
SMOOTHED_INPUT_SCALE = np.array([0.5, 0.125, 2, 1], dtype=np.float16)


def with_float_bias(input_scale: Array) -> Sample:
    """0.6.0: the zero point's part is merged into a float bias, stored = bias - t_zp * sum(Wq) * dequant_scale."""
    deq, sums = decode_float_bits(DEQUANT_SCALE), WEIGHT_8.sum(axis=1, dtype=np.int64)  # -65 and 105
    stored_bias = np.array([1 + 3 * 65 / 16, -0.5 - 3 * 105 / 32], dtype=np.float32)
    bias = stored_bias + INPUT_ZP * sums * deq
    assert bias.tolist() == [1.0, -0.5]
    sample = static_a8w8(input_scale, np.repeat(INPUT_ZP, 4), bias)
    assert isinstance(sample, LinearSample)
    codes = np.clip(np.rint(INPUTS / input_scale) + INPUT_ZP, -128, 127)
    return replace(sample, call=(INPUTS, (codes @ WEIGHT_8.T.astype(np.float32)) * deq + stored_bias))


def smooth_quant_a8w8() -> Sample:
    """SmoothQuant a8w8 (0.6.0): _input_quantizer.t_scale [ic] = x_scale * smooth; _output_quantizer.scale int64."""
    return with_float_bias(SMOOTHED_INPUT_SCALE)


def ptq_a8w8() -> Sample:
    """PTQ a8w8 (0.6.0): input_scale is one value, repeated to [ic]."""
    return with_float_bias(np.full(4, 0.125, dtype=np.float16))


def with_quant_bias(input_scale: Array) -> Sample:
    """1.2.0: the zero point's part is an int32 quant_bias, about -zp * sum(Wq); the layer has no bias."""
    quant_bias = np.array([195, -315], dtype=np.int32)
    sample = static_a8w8(input_scale, np.repeat(INPUT_ZP, len(input_scale)))
    assert isinstance(sample, LinearSample)
    extras = {**sample.layer.extras, **derived(quant_bias=quant_bias)}
    deq = decode_float_bits(DEQUANT_SCALE)
    outputs = integer_outputs(INPUTS, input_scale, INPUT_ZP, WEIGHT_8, quant_bias, deq)
    return replace(sample, layer=replace(sample.layer, extras=extras), call=(INPUTS, outputs))


def ptq_a8w8_quant_bias() -> Sample:
    """PTQ a8w8 (1.2.0): quant_op.input_scale and .input_zp [1]."""
    return with_quant_bias(np.array([0.125], dtype=np.float16))


def ptq_smooth_a8w8() -> Sample:
    """PTQ smooth a8w8 (1.2.0): input_scale [ic] = x_scale * s."""
    return with_quant_bias(SMOOTHED_INPUT_SCALE)


def ptq_a8_dynamic() -> Sample:
    """PTQ a8 dynamic (1.2.0): weight_scale float32, no zero point."""
    return LinearSample(linear(INT8_CHANNEL, WEIGHT_8, SCALES.astype(np.float32), TOKEN_INPUTS), WEIGHTS_8)


def ptq_smooth_a8_dynamic() -> Sample:
    """With smoothing: dyn_quant_op.smooth_scale [ic] is 1 / s, and multiplies x."""
    smooth_scale = np.array([0.5, 1, 2, 0.25], dtype=np.float16)
    layer = linear(INT8_CHANNEL, WEIGHT_8, SCALES.astype(np.float32), TOKEN_INPUTS, input_smooth=smooth_scale)
    return LinearSample(layer, np.array([[-32, -0.5, 0, 8], [0.625, 25, -63.5, 7.9375]]))


def ptq_a16w4_per_channel() -> Sample:
    """PTQ a16w4 (1.2.0): weight Int4 [ic, oc / 2], turned round; weight_scale and weight_zp [oc]."""
    codes = unpacked(INT4, WEIGHT_4_BYTES, WEIGHT_4)
    weight_zp = np.array([-0.0, 2.0], dtype=np.float16)
    layer = linear(replace(INT4_CHANNEL, symmetric=False), codes, SCALES, zero_points=negated(weight_zp))
    return LinearSample(layer, np.array([[-4, -0.5, 0, 3.5], [0.75, 1, 1.25, -0.5]]))


GROUP_SCALES = np.array([[0.5, 0.25], [1.0, 0.1]], dtype=np.float16)  # [ic / g, oc]
GROUP_ZP = np.array([[-6.0, 7.0], [-0.0, 1.0]], dtype=np.float16)


def int4_per_group() -> tuple[Array, Array]:
    """Codes, and the weights by the formula w[o, i] = (q[i, o] + weight_zp[i // g, o]) * weight_scale[i // g, o]."""
    codes = unpacked(INT4, WEIGHT_4_BYTES, WEIGHT_4)
    groups = [0, 0, 1, 1]
    return codes, ((WEIGHT_4.T + GROUP_ZP[groups]).astype(np.float32) * GROUP_SCALES[groups].astype(np.float32)).T


def ptq_a16w4_per_group() -> Sample:
    """The same with weight_scale and weight_zp [ic / g, oc]; so do GPTQ's files."""
    codes, weights = int4_per_group()
    layer = linear(group(4, 2, symmetric=False), codes, GROUP_SCALES.T, zero_points=negated(GROUP_ZP))
    return LinearSample(layer, weights)


def awq_a16w4() -> Sample:
    """AWQ (1.2.0): with matmul.smooth_scale [ic], w = (q + weight_zp) * weight_scale * smooth_scale."""
    codes, weights = int4_per_group()
    smooth_scale = np.array([0.5, 1, 2, 0.25], dtype=np.float16)
    layer = linear(
        group(4, 2, symmetric=False),
        codes,
        GROUP_SCALES.T,
        zero_points=negated(GROUP_ZP),
        input_smooth=smooth_scale,
    )
    return LinearSample(layer, weights * smooth_scale)


def gptq_a8w4_grouped_matmul() -> Sample:
    """A8W4 GPTQ (1.2.0): weight_scale uint64 float32 bits, and gmm_bias = 8 * sum(q * scale)."""
    codes = unpacked(INT4, WEIGHT_4_BYTES, WEIGHT_4)
    scales = decode_float_bits(float_bits("3f000000 3e800000", "<u8"))
    gmm_bias = np.array([-8.0, 4.0], dtype=np.float32)
    layer = linear(INT4_CHANNEL, codes, scales, TOKEN_INPUTS, extras=derived(gmm_bias=gmm_bias))
    np.testing.assert_array_equal(8 * dequantize(layer).sum(axis=1), gmm_bias)
    return LinearSample(layer, np.array([[-4, -0.5, 0, 3.5], [0.25, 0.5, 0.75, -1]]))


KV_SCALES = {"key": np.array([0.5, 0.25], dtype=np.float16), "value": np.array([2.0, 0.125], dtype=np.float16)}
KV_ZERO_POINTS = {"key": np.array([3, -128]), "value": np.array([0, 7])}
KV_CODES = np.array([[-128, 127], [3, 8]], dtype=np.int8)
KV_VALUES = {"key": np.array([[-65.5, 63.75], [0, 34]]), "value": np.array([[-256, 15], [6, 0.125]])}


def kv_int8(zero_points: dict[str, Array], fused_scale: Array, fused_zp: Array) -> Sample:
    """Per channel [n_kv * d]; fused tensors [2, n_kv * d], keys first, repeat both, with the zero point negated."""
    np.testing.assert_array_equal(decode_float_bits(fused_scale), np.stack(list(KV_SCALES.values())))
    np.testing.assert_array_equal(-fused_zp, np.stack(list(zero_points.values())))
    attention = AttentionQuant(
        ATTENTION, "kv_cache", dict.fromkeys(KV_SCALES, QuantArgs(8, symmetric=False)), scales=KV_SCALES, zero_points=zero_points
    )
    return AttentionSample(attention, dict.fromkeys(KV_SCALES, KV_CODES), KV_VALUES)


FUSED_SCALE = np.stack([float_bits("3f000000 3e800000"), float_bits("40000000 3e000000")])
FUSED_ZP = np.array([[-3, 128], [0, -7]], dtype=np.int32)


def kv_int8_negated() -> Sample:
    """0.6.0: key_t_zp and value_t_zp are fp16 and negated; kv = (q + t_zp) * t_scale."""
    t_zp = {"key": np.array([-3.0, 128.0], dtype=np.float16), "value": np.array([-0.0, -7.0], dtype=np.float16)}
    return kv_int8({operand: (-zp).astype(np.int16) for operand, zp in t_zp.items()}, FUSED_SCALE, FUSED_ZP)


def kv_int8_no_fusion() -> Sample:
    """1.2.0: k_zp_no_fusion and v_zp_no_fusion are not negated, k_v_zp_fusion is."""
    return kv_int8({operand: zp.astype(np.int16) for operand, zp in KV_ZERO_POINTS.items()}, FUSED_SCALE, FUSED_ZP)


def kv_int8_per_token() -> Sample:
    """Run-time buffers only: the checkpoint holds no scales."""
    args = dict.fromkeys(("key", "value"), QuantArgs(8, strategy="token", dynamic=True))
    return AttentionSample(AttentionQuant(ATTENTION, "kv_cache", args, scales={}))


WEIGHT_OFFSET = np.array([3, -1], dtype=np.int32)
ASYMMETRIC_8 = replace(INT8_CHANNEL, symmetric=False)
OFFSET_WEIGHTS_8 = np.array([[-65.5, -2, -1.5, 30.5], [1.5, 25.25, -31.5, 32]])


def folder_w8a16() -> Sample:
    """W8A16 (1.4.1): weight_scale [oc], weight_offset int32 [oc]; w = (q - offset) * scale."""
    return LinearSample(linear(ASYMMETRIC_8, WEIGHT_8, SCALES, zero_points=WEIGHT_OFFSET), OFFSET_WEIGHTS_8)


def folder_w8a8_dynamic() -> Sample:
    return LinearSample(linear(ASYMMETRIC_8, WEIGHT_8, SCALES, TOKEN_INPUTS, zero_points=WEIGHT_OFFSET), OFFSET_WEIGHTS_8)


def folder_w4a16_ascend() -> Sample:
    """W4A16 for Ascend (1.4.1): int8 [ic, oc / 2], which the metadata calls Int4; scales and offsets [ic / g, oc]."""
    codes, weights = int4_per_group()
    offset = (-GROUP_ZP).astype(np.int32)
    layer = linear(group(4, 2, symmetric=False), codes, GROUP_SCALES.T, zero_points=offset.T)
    return LinearSample(layer, weights)


def folder_w4a16_unpacked() -> Sample:
    """W4A16 for no backend (1.4.1): one code of -8..7 in each byte, [oc, ic]."""
    layer = linear(replace(INT4_CHANNEL, symmetric=False), WEIGHT_4, SCALES, zero_points=WEIGHT_OFFSET)
    return LinearSample(layer, np.array([[-5.5, -2, -1.5, 2], [0.5, 0.75, 1, -0.75]]))


def folder_w8a8(input_scale: Array, input_offset: Array) -> Sample:
    quant_bias = np.array([195, -315], dtype=np.int32)
    layer = linear(
        INT8_CHANNEL,
        WEIGHT_8,
        SCALES,
        STATIC_INPUTS,
        input_scale=input_scale,
        input_zero_point=input_offset,
        extras=derived(quant_bias=quant_bias),
    )
    deq = decode_float_bits(DEQUANT_SCALE)
    outputs = integer_outputs(INPUTS, input_scale, input_offset, WEIGHT_8, quant_bias, deq)
    return LinearSample(layer, WEIGHTS_8, call=(INPUTS, outputs))


def folder_w8a8_ascend() -> Sample:
    """W8A8 for Ascend (1.4.1): input_scale and input_offset (int8) are repeated to [ic]."""
    return folder_w8a8(np.full(4, 0.125, dtype=np.float16), np.full(4, 3, dtype=np.int8))


def folder_w8a8_unexpanded() -> Sample:
    """W8A8 for no backend (1.4.1): input_scale and input_offset (int32) are [1]; no deq_scale, no quant_bias."""
    return folder_w8a8(np.array([0.125], dtype=np.float16), np.array([3], dtype=np.int32))


def region_of(stored: Array, tensor: str, rows: tuple[int, int, int]) -> Sample:
    """The layer that lies in ``rows`` of a fused int8 tensor whose scale of row o is 2 ** -o."""
    region, scales = Region(tensor, rows=rows), 2.0 ** -np.arange(len(stored), dtype=np.float32)
    layer = linear(INT8_CHANNEL, region.take(stored), region.take(scales), regions=(region,))
    return LinearSample(layer, (stored * scales[:, None])[slice(*rows)], stored={tensor: stored})


FUSED = np.array([[1, 2], [3, 4], [5, 6], [7, 8], [-9, -10], [-128, 127]], dtype=np.int8)


def qkv_concat() -> Sample:
    """attention.w_qkv: q, k and v one after the other along out; here k of 3 + 1 + 2 rows."""
    return region_of(FUSED, "model.layers.0.attention.w_qkv._handler.weight", (3, 4, 1))


def gate_hidden_concat() -> Sample:
    """feed_forward.w_gate_hidden: w1 (gate), then w3 (up), not interleaved; here w3."""
    return region_of(FUSED, "model.layers.0.feed_forward.w_gate_hidden._handler.weight", (3, 6, 1))


ROWS = by_name(
    rtn_a16w8,
    ptq_a16w8_t_scale,
    ptq_a16w8_weight_zp,
    smooth_quant_a8w8,
    ptq_a8w8,
    ptq_a8w8_quant_bias,
    ptq_smooth_a8w8,
    ptq_a8_dynamic,
    ptq_smooth_a8_dynamic,
    ptq_a16w4_per_channel,
    ptq_a16w4_per_group,
    awq_a16w4,
    gptq_a8w4_grouped_matmul,
    kv_int8_negated,
    kv_int8_no_fusion,
    kv_int8_per_token,
    folder_w8a16,
    folder_w8a8_dynamic,
    folder_w4a16_ascend,
    folder_w4a16_unpacked,
    folder_w8a8_ascend,
    folder_w8a8_unexpanded,
    qkv_concat,
    gate_hidden_concat,
)


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    ROWS[name]().prove()
