"""AutoGPTQ and GPTQModel: a hand-made sample per row of their tensor table.

Their law, in the stored orientation: w[k, n] = s[g_idx[k], n] * (q[k, n] - z[g_idx[k], n]), q and z unsigned; v1 stores
z - 1, v2 stores z. The IR holds q and z less 2 ** (bits - 1). Marlin is in ``test_spelling_rows_marlin``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from spelling import INT4_CHANNEL, LinearSample, Row, Sample, by_name, digits, group, linear, unpacked, words

from formats.ir import Array, QuantArgs
from formats.layouts import PackLayout


def qweight_layout(bits: int) -> PackLayout:
    """int32 [in * bits / 32, out]: a bit stream along in; a code of 3 bits may straddle two words."""
    return PackLayout(bits=bits, word="<i4", axis="in", transposed=True, offset=1 << bits - 1, low=-(1 << bits - 1))


def qzeros_layout(bits: int, version: int) -> PackLayout:
    """int32 [groups, out * bits / 32]: the same along out, of z - 1 (v1, read modulo 2 ** bits) or of z (v2)."""
    offset = (1 << bits - 1) - (1 if version == 1 else 0)
    return PackLayout(bits=bits, word="<i4", axis="out", transposed=True, offset=offset, low=-(1 << bits - 1))


# Two columns of qweight: one word (3 bits: three) of ascending codes, one of descending codes, the first code lowest.
COLUMNS = {
    2: (["e4e4e4e4"], ["1b1b1b1b"], [0, 1, 2, 3] * 4, [3, 2, 1, 0] * 4),
    3: (
        ["88fac688", "c688fac6", "fac688fa"],  # v10 is 2 = 010: its low bits 10 end word 0, its top bit 0 begins word 1
        ["77053977", "39770539", "05397705"],
        [0, 1, 2, 3, 4, 5, 6, 7] * 4,
        [7, 6, 5, 4, 3, 2, 1, 0] * 4,
    ),
    4: (["76543210"], ["89abcdef"], [0, 1, 2, 3, 4, 5, 6, 7], [15, 14, 13, 12, 11, 10, 9, 8]),
    8: (["ff800100"], ["00017fff"], [0, 1, 128, 255], [255, 127, 1, 0]),
}
# The zero point of symmetric layers, z = 2 ** (bits - 1), as v1 and v2 store a row of them.
SYMMETRIC_ZEROS = {
    (2, 1): "55555555",
    (2, 2): "aaaaaaaa",
    (3, 1): "db6db6db b6db6db6 6db6db6d",  # 011 again and again
    (3, 2): "24924924 49249249 92492492",  # 100 again and again
    (4, 1): "77777777",
    (4, 2): "88888888",
    (8, 1): "7f7f7f7f",
    (8, 2): "80808080",
}


def symmetric(bits: int, version: int) -> Sample:
    """As many inputs and outputs as fill whole words, in one group; even columns ascend, odd columns descend."""
    even_words, odd_words, even_codes, odd_codes = COLUMNS[bits]
    pairs, half = len(even_codes) // 2, 1 << bits - 1
    columns = [words("\n".join(column))[:, 0] for column in (even_words, odd_words)]
    q = np.array([even_codes, odd_codes] * pairs).T  # [in, out]
    codes = unpacked(qweight_layout(bits), np.array(columns * pairs).T, (q - half).astype(np.int8).T)
    zero_points = np.zeros((2 * pairs, 1), dtype=np.int8)
    unpacked(qzeros_layout(bits, version), words(SYMMETRIC_ZEROS[bits, version]), zero_points)
    scales = np.array([[0.3, 0.5] * pairs], dtype=np.float16)
    layer = linear(QuantArgs(bits), codes, scales.T, g_idx=np.zeros(2 * pairs, dtype=np.int32))
    return LinearSample(layer, ((q - half) * scales.astype(np.float32)).T)


QWEIGHT = words("76543210 89abcdef 88888888 0f0f0f0f 00000000 ffffffff 12345678 80808080")
Q = np.array(
    [
        [0, 15, 8, 15, 0, 15, 8, 0],
        [1, 14, 8, 0, 0, 15, 7, 8],
        [2, 13, 8, 15, 0, 15, 6, 0],
        [3, 12, 8, 0, 0, 15, 5, 8],
        [4, 11, 8, 15, 0, 15, 4, 0],
        [5, 10, 8, 0, 0, 15, 3, 8],
        [6, 9, 8, 15, 0, 15, 2, 0],
        [7, 8, 8, 0, 0, 15, 1, 8],
    ]
)
"""A word of QWEIGHT is a column of Q, its lowest nibble on top: [8 in, 8 out]."""
ZEROS = digits("15888f78 8a1f4888")
"""z of two groups, [groups, out]; the lowest nibble of a word is output 0."""
QZEROS = {1: words("76e77740\n7773e097"), 2: words("87f88851\n8884f1a8")}
SCALES = np.array([[0.1, 0.5, 1, 2, 0.3, 0.25, 4, 8], [1, 0.7, 0.5, 2, 0.2, 0.125, 3, 1]], dtype=np.float16)


def grouped(version: int, g_idx: Array, weights: QuantArgs, bias: Array | None = None) -> Sample:
    """Two groups with zero points of their own."""
    codes = unpacked(qweight_layout(4), QWEIGHT, (Q - 8).astype(np.int8).T)
    zero_points = unpacked(qzeros_layout(4, version), QZEROS[version], (ZEROS - 8).T)
    layer = linear(weights, codes, SCALES.T, zero_points=zero_points, g_idx=g_idx, bias=bias)
    return LinearSample(layer, (SCALES.astype(np.float32)[g_idx] * (Q - ZEROS[g_idx]).astype(np.float32)).T)


IN_ORDER = np.array([0, 0, 0, 0, 1, 1, 1, 1], dtype=np.int32)
ASYMMETRIC = group(4, 4, symmetric=False)


def v1_asymmetric() -> Sample:
    return grouped(1, IN_ORDER, ASYMMETRIC)


def v2_asymmetric() -> Sample:
    return grouped(2, IN_ORDER, ASYMMETRIC)


def act_order() -> Sample:
    """desc_act: rows of qweight stay in the inputs' order, and g_idx says whose group each is of."""
    return grouped(1, np.array([0, 1, 1, 0, 0, 1, 0, 1], dtype=np.int32), replace(ASYMMETRIC, actorder="group"))


def static_groups() -> Sample:
    """desc_act with static_groups: g_idx is in order again."""
    return grouped(1, IN_ORDER, replace(ASYMMETRIC, actorder="static"))


def zero_bias() -> Sample:
    """AutoGPTQ writes a bias of zeros where the model has none."""
    return grouped(1, IN_ORDER, ASYMMETRIC, bias=np.zeros(8, dtype=np.float16))


def v1_zero_point_of_zero() -> Sample:
    """z = 0 is stored as -1 modulo 16 (here in its own lane only), and read modulo 16: (15 + 1) & 15."""
    codes = unpacked(qweight_layout(4), QWEIGHT, (Q - 8).astype(np.int8).T)
    zero_points = unpacked(qzeros_layout(4, 1), words("7777777f"), digits("08888888", zero=8).T)
    layer = linear(replace(INT4_CHANNEL, symmetric=False), codes, SCALES[:1].T, zero_points=zero_points)
    zeros = np.array([0, 8, 8, 8, 8, 8, 8, 8])
    return LinearSample(layer, ((Q - zeros) * SCALES[:1].astype(np.float32)).T)


def planar_3_bits() -> Sample:
    """GPTQModel's gptq_p: of 32 codes first two words of the low two bits, then a word of the top bits; zeros as v2."""
    # codes 0..7 four times: the low bits are 0 1 2 3 again and again, the top bits 0 0 0 0 1 1 1 1
    low_bits = PackLayout(bits=2, word="<i4", axis="in").unpack(words("e4e4e4e4 e4e4e4e4"))
    top_bits = PackLayout(bits=1, word="<i4", axis="in").unpack(words("f0f0f0f0"))
    q = low_bits | top_bits << 2
    layer = linear(QuantArgs(3), (q - 4).astype(np.int8), np.array([[0.5]], dtype=np.float16))
    return LinearSample(layer, np.array([[-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5] * 4]))


SYMMETRIC: dict[str, Row] = {f"v{version}_{bits}_bits": partial(symmetric, bits, version) for bits, version in SYMMETRIC_ZEROS}
ROWS = SYMMETRIC | by_name(v1_asymmetric, v2_asymmetric, act_order, static_groups, zero_bias, v1_zero_point_of_zero, planar_3_bits)


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    ROWS[name]().prove()
