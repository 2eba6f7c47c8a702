"""AutoAWQ and llm-awq: a hand-made sample per row of their tensor table. Their law: w = (q - z) * s, q and z unsigned.

The IR holds q - 8 and z - 8. The Marlin tile is in ``test_spelling_rows_marlin``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from spelling import LinearSample, Sample, by_name, digits, group, linear, unpacked, words

from formats.ir import Array, QuantizedLinear
from formats.layouts import PackLayout

GEMM = PackLayout(bits=4, word="<i4", axis="out", transposed=True, order=(0, 2, 4, 6, 1, 3, 5, 7), offset=8, low=-8)
GEMV = PackLayout(bits=4, word="<i4", axis="in", offset=8, low=-8)
GEMV_FAST = PackLayout(bits=4, word="<i2", axis="in", order=tuple(8 * (lane % 4) + lane // 4 for lane in range(32)), offset=8, low=-8)
"""Of 32 inputs, the lanes hold 0, 8, 16, 24, then 1, 9, 17, 25, and so on."""


def gemm_weights(**parts: Any) -> tuple[QuantizedLinear, Array]:
    """A GEMM layer of 4 inputs in 2 groups and 8 outputs, and its weights before any smoothing."""
    # lane i (bits 4i) holds column 0, 2, 4, 6, 1, 3, 5, 7 of its eight: 75316420 holds 0 1 2 3 4 5 6 7 in order
    qweight = words("75316420\nfdb9eca8\ncdef3210\n88888888")
    qzeros = words("88888888\na78156f0")
    q, z = digits("01234567 89abcdef 0f1e2d3c 88888888"), digits("88888888 01f8675a")  # as stored: [in, out]
    codes = unpacked(GEMM, qweight, (q - 8).T)
    zero_points = unpacked(GEMM, qzeros, (z - 8).T)
    scales = np.array([[0.5, 0.1, 1, 2, 0.3, 0.25, 4, 8], [1, 0.7, 0.5, 2, 0.2, 0.125, 3, 1]], dtype=np.float16)
    layer = linear(group(4, 2, symmetric=False), codes, scales.T, zero_points=zero_points, **parts)
    groups = [0, 0, 1, 1]
    return layer, ((q - z[groups]).astype(np.float32) * scales[groups].astype(np.float32)).T


def gemm() -> Sample:
    """qweight int32 [in, out / 8] and qzeros [groups, out / 8], interleaved along out; scales [groups, out]."""
    return LinearSample(*gemm_weights())


def scaled_activation() -> Sample:
    """Bloom and the like divide the activation by act.scales [in] before the next layer."""
    act_scales = np.array([0.5, 1, 2, 4], dtype=np.float16)
    layer, weights = gemm_weights(input_smooth=1 / act_scales.astype(np.float32))
    return LinearSample(layer, weights / act_scales)


def gemv() -> Sample:
    """qweight [out, in / 8] in plain order; qzeros [out, ZW] and scales [out, 8 ZW] are padded with zeros."""
    # plain order: the lowest nibble is input 0; of 8 zero points only the two of the two groups mean anything
    codes = unpacked(GEMV, words("76543210\n0f1e8888"), digits("01234567 8888e1f0", zero=8))
    qzeros, padded = words("00000038\n000000f0"), digits("83000000 0f000000", zero=8)
    scales = np.array([[0.5, 2, 0, 0, 0, 0, 0, 0], [1, 0.25, 0, 0, 0, 0, 0, 0]], dtype=np.float16)
    layer = linear(group(4, 4, symmetric=False), codes, scales[:, :2], zero_points=unpacked(GEMV, qzeros, padded)[:, :2])
    return LinearSample(layer, np.array([[-4, -3.5, -3, -2.5, 2, 4, 6, 8], [8, 8, 8, 8, -0.25, -3.5, 0, -3.75]]))


FAST_Q = digits(
    """
    e278097bdae0dafe9a9f28dc625e462e75197dfb29df5131987f2af48157b7c7
    3924eed4a1c52e72a4ae552d506e13f21b1fdfbc1eef98229db6a508f0406429
    dbefdd1f1afbb941a08c23ecb7f048078124f4a54bd22779afe131f3a332f1d3
    03579a95526174a2977d6b1390f1a6c5fa1144dac928ae614359a90f4f09bcdb
    """
)
FAST_QWEIGHT = words(
    "69de 2aa2 59e7 ef08 42d0 68a9 2df7 eceb 8927 1895 57d1 7ff9 b257 7a1d cf3f 741b "
    "5aa3 0419 6ac2 ee54 152e 35ee f27d 2d24 f911 0deb 4be1 06ff 6a9d 458f 202b 982c "
    "ba1d 70ab f8fe 0cbf 42bd 839d 0e41 7c1f aa48 3fb1 3ed2 2124 f32f 1174 df7a 3395 "
    "9950 0723 f765 1d17 a679 6b4a c1a9 5325 44cf f39a 0521 9981 baa4 c9e4 d06d bf1a",
    "<i2",
)
"""Word 0 (69de) holds row 0's inputs 0, 8, 16, 24, which are e, d, 9, 6; word 16 begins row 1."""


def premultiplied_zeros() -> Sample:
    """qweight int16 [out / 4, in], 4 rows by 64 inputs in a tile; scales and -(s * z) are fp16 [groups, out]."""
    out, in_ = 4, 64
    rows = FAST_QWEIGHT.reshape(out // 4, in_ // 64, 4, 16).transpose(0, 2, 1, 3).reshape(out, in_ // 4)
    codes = unpacked(GEMV_FAST, rows, FAST_Q - 8)
    scales = np.array([[0.5, 1, 0.25, 2], [0.125, 4, 1, 0.5]] + 6 * [[0, 0, 0, 0]], dtype=np.float16)
    qzeros = np.array([[-4, -15, 0, -6], [-1, -32, -7, -0.5]] + 6 * [[0, 0, 0, 0]], dtype=np.float16)
    zeros = np.rint(-qzeros[:2] / scales[:2]).astype(np.int16).T  # 8 15 0 3, 8 8 7 1
    layer = linear(group(4, 32, symmetric=False), codes, scales[:2].T, zero_points=zeros - 8)
    return LinearSample(layer, FAST_Q * np.repeat(scales[:2].T, 32, axis=1) + np.repeat(qzeros[:2].T, 32, axis=1))


def gemv_fast() -> Sample:
    return premultiplied_zeros()


def llm_awq() -> Sample:
    """As gemv_fast, but that the zeros are called scaled_zeros."""
    return premultiplied_zeros()


ROWS = by_name(gemm, scaled_activation, gemv, gemv_fast, llm_awq)


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    ROWS[name]().prove()


def test_zero_points_come_back_from_premultiplied_zeros() -> None:
    """fp16(s * z) / s rounds to z for every normal fp16 scale and every z."""
    every = np.arange(0x0400, 0x7C00, dtype=np.uint16).view(np.float16)
    zeros = np.arange(16, dtype=np.float32)
    scales = every[every.astype(np.float32) * 15 <= np.finfo(np.float16).max][:, None].astype(np.float32)
    premultiplied = -(scales * zeros).astype(np.float16)
    np.testing.assert_array_equal(np.rint(-premultiplied.astype(np.float32) / scales), np.tile(zeros, (len(scales), 1)))


def test_divisors_in_half_precision_come_back_from_their_reciprocals() -> None:
    """act.scales, t_scale and their like are fp16 divisors: input_smooth is 1 / s, and 1 / input_smooth is s again."""
    every = np.arange(0x0001, 0x7C00, dtype=np.uint16).view(np.float16)
    smooth = 1 / every.astype(np.float32)
    np.testing.assert_array_equal((1 / smooth).astype(np.float16), every)
