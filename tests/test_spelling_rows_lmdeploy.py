"""LMDeploy: a hand-made sample per row of its tables: Hugging Face folders, TurboMind workspaces, KV parameters."""

from __future__ import annotations

import numpy as np
import pytest
from spelling import (
    ATTENTION,
    E8M0,
    INT4_CHANNEL,
    INT8_CHANNEL,
    TOKEN_INPUTS,
    AttentionSample,
    LinearSample,
    PlainSample,
    Sample,
    by_name,
    digits,
    group,
    linear,
    unpacked,
    words,
)

from formats.ir import Array, AttentionQuant, Element, PlainTensor, QuantArgs, Region, assemble
from formats.layouts import PackLayout

AWQ = PackLayout(bits=4, word="<i4", axis="out", transposed=True, order=(0, 2, 4, 6, 1, 3, 5, 7), offset=8, low=-8)
NATURAL = PackLayout(bits=4, word="<i4", axis="out", transposed=True, offset=8, low=-8)

Q = digits("01234567 89abcdef 0f1e2d3c 88888888")
Z = digits("88888888 01f8675a")
"""Unsigned codes [4 in, 8 out] and zero points [2 groups, 8 out]."""
SCALES = np.array([[0.5, 0.1, 1, 2, 0.3, 0.25, 4, 8], [1, 0.7, 0.5, 2, 0.2, 0.125, 3, 1]], dtype=np.float32)
GROUPS = [0, 0, 1, 1]


def four_bit(codes: Array, zero_points: Array, scales: Array) -> Sample:
    """Two groups of two inputs; ``scales`` [groups, out] in the file's dtype."""
    layer = linear(group(4, 2, symmetric=False), codes, scales.T, zero_points=zero_points)
    return LinearSample(layer, ((Q - Z[GROUPS]) * scales.astype(np.float32)[GROUPS]).T)


def awq_float32_scales() -> Sample:
    """auto_awq up to 0.4: AutoAWQ's GEMM words, but float32 scales."""
    # lanes hold columns 0, 2, 4, 6, 1, 3, 5, 7
    codes = unpacked(AWQ, words("75316420\nfdb9eca8\ncdef3210\n88888888"), (Q - 8).T)
    return four_bit(codes, unpacked(AWQ, words("88888888\na78156f0"), (Z - 8).T), SCALES)


def workspace_natural_order() -> Sample:
    """0.6 to 0.9: nibble j of a word is channel 8c + j; zeros are fp16 whole numbers."""
    codes = unpacked(NATURAL, words("76543210\nfedcba98\nc3d2e1f0\n88888888"), (Q - 8).T)
    zeros = Z.astype(np.float16)
    return four_bit(codes, zeros.astype(np.int16).T - 8, SCALES.astype(np.float16))


TILE_Q = digits(
    """
    32a974155200adab4cc406e2494d6c3e 546b42c8e1c8c815755b17f601f44d3f
    257d9df3b4fb84af25db9b635d351190 c79af44d940d30f4026775a66d8949a6
    7c481b2e59b634aeecdc53e6aed3fd08 03a6912a3b30040c13a89ca941feab79
    b579d60111d0b2338a99191d1136d136 3181b176cc74db43e42781e7a9ed60ac
    d989207e44f8180ec9ff534a3978ca88 65da51c7c7a329bab2c48029f133b7c7
    e09fb3291389e5359709c98b842164a5 89b654a1a931584b996275cf017a1679
    c611a8e0fdcc252868cfd074966ccb46 709a0631faf71404a893563fc794b80e
    bdfade4c6ae6f2eb0adf159e43cf0fa0 756fcfdab220b36ffc06fc1e441d8425
    6002a8f00812eb8293e4095c6cbb9ac8 a5c20dd68a11856135ebf58a81a6a6a8
    138b3e4df0f765f9618bd66f3066077d 0c02e4ab66647e3d65c8aef39e1e4b3a
    aa1849f3992aa7ca372c9b812c949161 75d8f5d3bce5cd639b259d5aba212c85
    0b6d71c06c7f9ed6dd40c0e9a8fda397 bf34f6e93fc29b9656c4d72936281add
    28667f42c07e7442d655b5bdd4b2439f b635fc5e586df48529d30463d48dccf1
    a57b1d388bc35cddb6c3c0ba8a90a80f 00224096b6bd51b31ff0f4d6e0a4f9c9
    096a29d06a291316a3edb4d22cbc6d4a 6677a8d9ffe4dca0933f84984edad7db
    af0f621244b22c3d8241854a4c374aee de91ab9c7ef6b287a516dcda7aca1260
    """
)
"""The unsigned codes of one tile, [32 in, 32 out], an input of 32 outputs in a group of digits."""

TILE_WORDS = words(
    """
    c6e54d53 fb073c44 5b8ac206 d283dd69 a89c1eb2 09608952 b0608af1 e1968b36
    f730fc57 ca4196ae f6b7609a 49b92a23 b7c36b1b 4fae4018 7d3b4a60 7a3548ad
    75144922 1215999c 86a50880 491546c3 99473045 19d247d5 606cb503 0fe5a601
    a0b3d69c 781368ec f6c5a99a e3abc3c7 25c1ad15 4c943a1a eeff4fcb a566c28d
    adc6f80a 3cf57f4c 631c7610 8daeb5be 3b0989f7 7686203d b260c7f8 af1c9c68
    f93ac1b4 99fa6cdd e7ed2621 d322be92 2678efd7 10e2cd39 f9c3b076 c12c34f4
    3a8b8909 344b8fd4 d512e622 d36b25b4 16da9fbd a297195b d2423b7b 40e8036b
    7a06c168 43e8cf3c 47589aa8 af15cd4c 0f416a09 d6d7ff69 61242ffd a68471d0
    25c412a7 b841c560 ff8077ea c0af4b90 553feb89 17476c19 547e5163 ff4aac0d
    10092a31 b5a9cdf5 dacf12a4 d8296b99 bcdbfdbd 8f6801d1 ba9f2697 1d1d48ac
    918280d4 70d7a3c6 4c5d4fb8 c46535a9 8404534d 6595491b 10e4cd5e 94be8076
    4641584b 86bcb0d3 c8d53979 74cdd41b 3fb12e26 4c01f519 2bb6c2e1 2ca7a530
    bc1c07a1 c23f843e 856d448f f6a89bc5 4af432af 7caaa896 b93ad3f4 cd3f0b76
    03022ea2 037a470e ad6d1dcf d9854d68 6d47e430 21aea931 899e31dc 6dd2e49e
    a758eeb5 79f68ae2 5e162220 138afd8c b14d59f3 9f665b03 36dbd89d 96a3fadf
    41ca80ee ef996486 093360a3 b85aa211 fa36bc31 5ec70e6d 7c69d260 0ad9ea79
    """
).ravel()
"""The words of the tile. Word 0 is c6e54d53: its nibbles, the lowest first, are the codes of input and output (0, 0),
(0, 8), (8, 0), (8, 8), (1, 0), (1, 8), (9, 0), (9, 8), that is 3 5 d 4 5 e 6 c."""


def unpacked_tiles(stored: Array, in_: int, out: int) -> Array:
    """Unsigned codes [in, out] of the words of 32 x 32 tiles, by the closed form of the permutation."""
    inputs, outputs = np.indices((in_, out))
    tile = inputs // 32 * (out // 32) + outputs // 32
    lane = outputs % 8 * 4 + inputs % 8 // 2
    word = 2 * (inputs // 16 % 2) + outputs // 16 % 2
    nibble = 4 * (inputs % 2) + 2 * (inputs // 8 % 2) + outputs // 8 % 2
    lanes = stored.view(np.uint32)[tile * 128 + lane * 4 + word] >> (4 * nibble).astype(np.uint32)
    return np.asarray(lanes & 15)


# scales_zeros: the low half of a word is fp16(64 + zero) = 5400 | zero << 4, the high half the fp16 scale.
SCALES_ZEROS = np.tile(words("38005480 34005400 40005450 2e6654f0", "<u4"), 8)  # 0.5, 8; 0.25, 0; 2, 5; 0.1, 15
TILE_ZEROS = np.tile(np.array([8, 0, 5, 15]), 8)


def tile_weights(q: Array = TILE_Q, scales_zeros: Array = SCALES_ZEROS) -> Array:
    """The kernel's ((64 + q) - (64 + z)) * s, [in, out], in float32."""
    halves = scales_zeros.view(np.float16).astype(np.float32).reshape(32, 2)
    return ((np.float32(64) + q) - halves[:, 0]) * halves[:, 1]


def tile_parts(stored: Array = TILE_WORDS, scales_zeros: Array = SCALES_ZEROS) -> tuple[Array, Array, Array]:
    """Codes [out, in], zero points [out, 1] and scales [out, 1] of one tile."""
    q = unpacked_tiles(stored, 32, 32)
    halves = scales_zeros.view(np.uint16).reshape(32, 2)
    zeros = (halves[:, :1] >> 4 & 15).astype(np.int16)
    return (q.astype(np.int8) - 8).T, zeros - 8, halves[:, 1:].view(np.float16)


def workspace_tile() -> Sample:
    """0.1 to 0.5: qweight in MMA tiles, scales_zeros [groups, out] of 4 bytes; one group here."""
    codes, zero_points, scales = tile_parts()
    np.testing.assert_array_equal(codes, TILE_Q.T - 8)
    np.testing.assert_array_equal(zero_points[:, 0], TILE_ZEROS - 8)
    layer = linear(group(4, 32, symmetric=False), codes, scales, zero_points=zero_points)
    return LinearSample(layer, tile_weights().T)


def w13_interleaved() -> Sample:
    """w13 of those workspaces: output 2m is gate's m, output 2m + 1 is up's; here up."""
    stored, zero_points, scales = tile_parts()
    region = Region("layers.0.feed_forward.w13.0.qweight", rows=(1, 32, 2))
    layer = linear(
        group(4, 32, symmetric=False),
        region.take(stored),
        region.take(scales),
        zero_points=region.take(zero_points),
        regions=(region,),
    )
    return LinearSample(layer, tile_weights()[:, 1::2].T, stored={region.tensor: stored})


def rope_permuted(rows: tuple[int, int, int], values: list[list[int]]) -> Sample:
    """w_qkv of 2 query heads, 1 key head and 2 rows of value; a head of 4 rows is stored as 0, 2, 1, 3."""
    stored = np.array(
        [
            *([0, 1], [20, 21], [10, 11], [30, 31]),  # the first query head
            *([40, 41], [60, 61], [50, 51], [70, 71]),
            *([-1, -2], [-21, -22], [-11, -12], [-31, -32]),  # the key head
            *([100, 101], [110, 111]),  # value, in order
        ],
        dtype=np.int8,
    )
    stored_scales = 2.0 ** -np.arange(14, dtype=np.float32)
    region = Region("layers.0.attention.w_qkv.0.qweight", rows=rows, head_dim=4 if rows[0] < 12 else None)
    layer = linear(INT8_CHANNEL, region.take(stored), region.take(stored_scales), regions=(region,))
    in_order = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 13][slice(*rows)]
    return LinearSample(layer, np.array(values) * stored_scales[in_order, None], stored={region.tensor: stored})


def query_permuted() -> Sample:
    return rope_permuted((0, 8, 1), [[0, 1], [10, 11], [20, 21], [30, 31], [40, 41], [50, 51], [60, 61], [70, 71]])


def key_permuted() -> Sample:
    return rope_permuted((8, 12, 1), [[-1, -2], [-11, -12], [-21, -22], [-31, -32]])


def value_in_order() -> Sample:
    return rope_permuted((12, 14, 1), [[100, 101], [110, 111]])


# Two tensor-parallel ranks. A layer is a tuple of regions, a part a rank; its scales and zeros are assembled as its codes are.

QKV = {
    "q": digits("0123456789abcdef f0e1d2c3b4a59687"),
    "k": digits("13579bdf 02468ace"),
    "v": digits("fedcba98 76543210"),
}
"""Unsigned codes [2 in, out] as in the Hugging Face folder: 4 query and 2 key heads of 4 channels, 8 channels of value."""

QKV_SCALES = {
    "q": np.array([0.5, 1, 2, 4, 0.1, 0.2, 0.3, 0.4, 8, 7, 6, 5, 0.25, 0.75, 1.25, 1.5], dtype=np.float16),
    "k": np.array([1, 3, 5, 7, 0.6, 0.7, 0.8, 0.9], dtype=np.float16),
    "v": np.array([0.5, 0.25, 2, 16, 0.15, 0.35, 0.45, 0.55], dtype=np.float16),
}
QKV_ZEROS = {"q": digits("0123456789abcdef"), "k": digits("80f7168a"), "v": digits("89765432")}
"""[1 group, out]"""

# rank 0 holds q's channels 0..7, k's 0..3 and v's 0..3; a head's channels 0 1 2 3 lie as 0 2 1 3, v's in order
QKV_WORDS = (words("75643120 cdef7351\n32cd10ef 45676240"), words("fdecb9a8 89abfbd9\n768954ab 0123eac8"))
QKV_RANK_SCALES = (
    np.array([[0.5, 2, 1, 4, 0.1, 0.3, 0.2, 0.4, 1, 5, 3, 7, 0.5, 0.25, 2, 16]], dtype=np.float16),
    np.array([[8, 6, 7, 5, 0.25, 1.25, 0.75, 1.5, 0.6, 0.8, 0.7, 0.9, 0.15, 0.35, 0.45, 0.55]], dtype=np.float16),
)
QKV_RANK_ZEROS = (
    np.array([[0, 2, 1, 3, 4, 6, 5, 7, 8, 15, 0, 7, 8, 9, 7, 6]], dtype=np.float16),
    np.array([[8, 10, 9, 11, 12, 14, 13, 15, 1, 8, 6, 10, 5, 4, 3, 2]], dtype=np.float16),
)


def merged_by_rank(parts: dict[str, Array], head_dim: int) -> list[Array]:
    """The tool's permute, tensor-parallel view and merge_qkv of q, k and v [rows, channels], a rank an array."""

    def permuted(part: Array) -> Array:
        heads = part.shape[1] // head_dim
        return part.reshape(-1, heads, 2, head_dim // 2).swapaxes(2, 3).reshape(len(part), -1)

    def split(part: Array) -> Array:
        return part.reshape(len(part), 2, -1)

    merged = np.concatenate([split(permuted(parts["q"])), split(permuted(parts["k"])), split(parts["v"])], axis=2)
    return [merged[:, rank] for rank in range(2)]


def of_ranks(name: str, ranks: tuple[Array, ...] | list[Array]) -> dict[str, Array]:
    """Stored arrays under their names: the rank stands before the last part."""
    front, last = name.rsplit(".", 1)
    return {f"{front}.{rank}.{last}": array for rank, array in enumerate(ranks)}


def split_regions(stored: dict[str, Array], rows: tuple[int, int, int], head_dim: int | None) -> tuple[Region, ...]:
    """Regions of a layer split along out: ``rows`` of every rank, one rank's part below the other's."""
    height = rows[1] - rows[0]
    return tuple(Region(name, rows=rows, at=(height * rank, 0), head_dim=head_dim) for rank, name in enumerate(stored))


def side_by_side(stored: dict[str, Array]) -> tuple[Region, ...]:
    """Regions of a layer split along in: whole tensors, one rank's part right of the other's."""
    return tuple(Region(name, at=(0, array.shape[1] * rank)) for rank, (name, array) in enumerate(stored.items()))


def two_ranks_qkv(which: str, rows: tuple[int, int, int], head_dim: int | None) -> Sample:
    """w_qkv.{r} int32 [in, (q + k + v) / 2 / 8] with .scales and .zeros [groups, (q + k + v) / 2]: one group here."""
    by_rank = merged_by_rank(QKV, 4)
    codes = [unpacked(NATURAL, stored, (q - 8).T) for stored, q in zip(QKV_WORDS, by_rank, strict=True)]
    zeros = merged_by_rank({name: zero.reshape(1, -1) for name, zero in QKV_ZEROS.items()}, 4)
    np.testing.assert_array_equal(QKV_RANK_ZEROS, zeros)
    np.testing.assert_array_equal(QKV_RANK_SCALES, merged_by_rank({name: scale.reshape(1, -1) for name, scale in QKV_SCALES.items()}, 4))
    stored = of_ranks("layers.0.attention.w_qkv.qweight", codes)
    stored_scales = of_ranks("layers.0.attention.w_qkv.scales", [scale.T for scale in QKV_RANK_SCALES])
    stored_zeros = of_ranks("layers.0.attention.w_qkv.zeros", [zero.T.astype(np.int16) - 8 for zero in QKV_RANK_ZEROS])
    out = QKV[which].shape[1]
    regions = split_regions(stored, rows, head_dim)
    layer = linear(
        group(4, 2, symmetric=False),
        assemble(regions, stored, (out, 2)),
        assemble(split_regions(stored_scales, rows, head_dim), stored_scales, (out, 1)),
        zero_points=assemble(split_regions(stored_zeros, rows, head_dim), stored_zeros, (out, 1)),
        regions=regions,
    )
    weights = (QKV[which] - QKV_ZEROS[which]) * QKV_SCALES[which].astype(np.float32)
    return LinearSample(layer, weights.T, stored=stored)


def two_ranks_query() -> Sample:
    return two_ranks_qkv("q", (0, 8, 1), 4)


def two_ranks_key() -> Sample:
    return two_ranks_qkv("k", (8, 12, 1), 4)


def two_ranks_value() -> Sample:
    return two_ranks_qkv("v", (12, 16, 1), None)


def two_ranks_wo() -> Sample:
    """wo.{r} [in / 2, out / 8], 0.6 to 0.9: each rank holds half of the inputs, and so half of the groups."""
    codes = [
        unpacked(NATURAL, words("76543210\nfedcba98"), (Q[:2] - 8).T),
        unpacked(NATURAL, words("c3d2e1f0\n88888888"), (Q[2:] - 8).T),
    ]
    stored = of_ranks("layers.0.attention.wo.qweight", codes)
    stored_scales = of_ranks("layers.0.attention.wo.scales", [SCALES[:1].astype(np.float16).T, SCALES[1:].astype(np.float16).T])
    stored_zeros = of_ranks("layers.0.attention.wo.zeros", [Z[:1].T - 8, Z[1:].T - 8])
    layer = linear(
        group(4, 2, symmetric=False),
        assemble(side_by_side(stored), stored, (8, 4)),
        assemble(side_by_side(stored_scales), stored_scales, (8, 2)),
        zero_points=assemble(side_by_side(stored_zeros), stored_zeros, (8, 2)),
        regions=side_by_side(stored),
    )
    weights = (Q - Z[GROUPS]) * SCALES.astype(np.float16).astype(np.float32)[GROUPS]
    return LinearSample(layer, weights.T, stored=stored)


def two_ranks_w2() -> Sample:
    """w2.{r}, 0.1 to 0.5: the inputs are split first, then tiled; the second rank's tile is the first's complement."""
    other_scales_zeros = np.ascontiguousarray(SCALES_ZEROS[::-1])
    ranks = [tile_parts(), tile_parts(~TILE_WORDS, other_scales_zeros)]
    stored = of_ranks("layers.0.feed_forward.w2.qweight", [codes for codes, _, _ in ranks])
    stored_zeros = of_ranks("layers.0.feed_forward.w2.scales_zeros", [zeros for _, zeros, _ in ranks])
    stored_scales = of_ranks("layers.0.feed_forward.w2.scales_zeros", [scales for _, _, scales in ranks])
    layer = linear(
        group(4, 32, symmetric=False),
        assemble(side_by_side(stored), stored, (32, 64)),
        assemble(side_by_side(stored_scales), stored_scales, (32, 2)),
        zero_points=assemble(side_by_side(stored_zeros), stored_zeros, (32, 2)),
        regions=side_by_side(stored),
    )
    weights = np.concatenate([tile_weights(), tile_weights(15 - TILE_Q, other_scales_zeros)])
    return LinearSample(layer, weights.T, stored=stored)


def float_of_ranks(which: str, stored: dict[str, Array], regions: tuple[Region, ...], data: Array) -> Sample:
    tensor = PlainTensor(f"model.layers.0.self_attn.{which}_proj.weight", "F16", data.shape, data, "transpose", regions)
    return PlainSample(tensor, stored)


FLOAT_QKV = of_ranks(
    "layers.0.attention.w_qkv.weight",
    [
        np.array([[0, 2, 1, 3, 10, 12, 11, 13, 20, 21, 22, 23], [50, 52, 51, 53, 60, 62, 61, 63, 70, 71, 72, 73]], dtype=np.float16),
        np.array([[4, 6, 5, 7, 14, 16, 15, 17, 24, 25, 26, 27], [54, 56, 55, 57, 64, 66, 65, 67, 74, 75, 76, 77]], dtype=np.float16),
    ],
)
"""w_qkv.{r}.weight [in, (q + k + v) / 2], fp16: in each rank a head of q and one of k, permuted, and 4 channels of v."""


def float_qkv(which: str, rows: tuple[int, int, int], head_dim: int | None, first: int) -> Sample:
    """Channel c of the first input is ``first + c``, and of the second 50 more."""
    data = (first + np.arange(8)[:, None] + np.array([0, 50])).astype(np.float16)
    merged = merged_by_rank({name: (at + np.arange(8) + np.array([[0], [50]])) for name, at in zip("qkv", (0, 10, 20), strict=True)}, 4)
    np.testing.assert_array_equal(merged, list(FLOAT_QKV.values()))
    return float_of_ranks(which, FLOAT_QKV, split_regions(FLOAT_QKV, rows, head_dim), data)


def float_query() -> Sample:
    return float_qkv("q", (0, 4, 1), 4, 0)


def float_key() -> Sample:
    return float_qkv("k", (4, 8, 1), 4, 10)


def float_value() -> Sample:
    return float_qkv("v", (8, 12, 1), None, 20)


def float_wo() -> Sample:
    """wo.{r}.weight [in / 2, out]."""
    ranks = [np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float16), np.array([[7, 8, 9], [10, 11, 12]], dtype=np.float16)]
    stored = of_ranks("layers.0.attention.wo.weight", ranks)
    regions = side_by_side({name: rank.T for name, rank in stored.items()})
    data = np.array([[1, 4, 7, 10], [2, 5, 8, 11], [3, 6, 9, 12]], dtype=np.float16)
    return float_of_ranks("o", stored, regions, data)


def workspace_float() -> Sample:
    """Float layers of a workspace: raw bytes of the transposed weight, [in, out]."""
    stored = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float16)
    tensor = PlainTensor("model.layers.0.self_attn.o_proj.weight", "F16", (3, 2), stored.T, "transpose")
    return PlainSample(tensor, {"layers.0.attention.wo.0.weight": stored})


def gptq_without_zeros() -> Sample:
    """TurboMind takes symmetric GPTQ, and a zero point of 8 where qzeros is missing."""
    layout = PackLayout(bits=4, word="<i4", axis="in", transposed=True, offset=8, low=-8)
    codes = unpacked(layout, words("76543210 89abcdef"), digits("01234567 fedcba98", zero=8))
    layer = linear(INT4_CHANNEL, codes, np.array([[0.5], [2]], dtype=np.float16))
    return LinearSample(layer, np.array([np.arange(-4, 0, 0.5), np.arange(14, -2, -2)]))


def smooth_quant_int8() -> Sample:
    """lite smooth_quant: weight int8 and .scale float32 [out, 1]; inputs per token."""
    weight = np.array([[-128, 127], [3, 0]], dtype=np.int8)
    layer = linear(INT8_CHANNEL, weight, np.array([[0.5], [0.1]], dtype=np.float32), TOKEN_INPUTS)
    return LinearSample(layer, np.array([[-64, 63.5], [np.float32(0.1) * np.float32(3), 0]]))


def smooth_quant_float8(element: Element, weight: Array) -> Sample:
    layer = linear(QuantArgs(8, element), weight, np.array([[0.5], [4]], dtype=np.float32), TOKEN_INPUTS)
    return LinearSample(layer, np.array([[0.5, -0.25], [6, 0]]))


def smooth_quant_e4m3() -> Sample:
    """--quant-dtype fp8: 38 is 1, b0 -0.5, 3c 1.5 (4 bits of exponent, bias 7)."""
    return smooth_quant_float8("e4m3", words("38 b0\n3c 00", "|u1"))


def smooth_quant_e5m2() -> Sample:
    """float8_e5m2: 3c is 1, b8 -0.5, 3e 1.5 (5 bits of exponent, bias 15)."""
    return smooth_quant_float8("e5m2", words("3c b8\n3e 80", "|u1"))


def mxfp4_experts() -> Sample:
    """mxfp4: blocks uint8 [experts, 2 * inter, groups, bytes], scales [experts, 2 * inter, groups]; here expert 1's up.

    Rows of gate and up alternate, and the even input is the low nibble.
    """
    blocks = words("21\nf7\n98\n0c\n10\n76\n54\n32", "|u1").reshape(2, 4, 1, 1)
    scales = np.array([127, 127, 127, 127, 128, 126, 130, 125], dtype=np.uint8).reshape(2, 4, 1)
    layout = PackLayout(bits=4, word="|u1", axis="in")
    experts = [layout.unpack(expert.reshape(4, 1), dtype="u1") for expert in blocks]
    region = Region("model.layers.0.mlp.experts.gate_up_proj_blocks", index=(1,), rows=(1, 4, 2))
    stored = np.stack(experts)
    args = QuantArgs(4, "e2m1", strategy="group", group_size=2)
    layer = linear(args, region.take(stored), region.take(scales).view(E8M0), regions=(region,))
    # row 1 is 76: 4 and 6, times 1/2; row 3 is 32: 1 and 1.5, times 1/4
    return LinearSample(layer, np.array([[2, 3], [0.25, 0.375]]), stored={region.tensor: stored})


BYTES = np.array([[0, 128, 255, 130]], dtype=np.uint8)
"""TurboMind's cache holds uint8 = code + 128."""


def past_kv_scale_midpoint() -> Sample:
    """4 float32: k_scale, k_zp, v_scale, v_zp, where zp is the range's midpoint; x = (byte - 128) * scale + zp."""
    k_scale, k_zp, v_scale, v_zp = np.array([0.5, 1.25, 0.25, -3], dtype=np.float32).reshape(4, 1)
    codes = (BYTES.astype(np.int16) - 128).astype(np.int8)
    attention = AttentionQuant(
        ATTENTION,
        "kv_cache",
        dict.fromkeys(("key", "value"), QuantArgs(8, symmetric=False, strategy="tensor")),
        scales={"key": k_scale, "value": v_scale},
        offsets={"key": k_zp, "value": v_zp},
        rope="after",
    )
    values = {"key": np.array([[-62.75, 1.25, 64.75, 2.25]]), "value": np.array([[-35, -3, 28.75, -2.5]])}
    return AttentionSample(attention, {"key": codes, "value": codes}, values)


def past_kv_scale_symmetric() -> Sample:
    """kv_sym: 2 float32, k_scale and v_scale."""
    k_scale, v_scale = np.array([0.5, 0.25], dtype=np.float32).reshape(2, 1)
    codes = np.array([[-127, 0, 127]], dtype=np.int8)
    args = dict.fromkeys(("key", "value"), QuantArgs(8, strategy="tensor"))
    attention = AttentionQuant(ATTENTION, "kv_cache", args, scales={"key": k_scale, "value": v_scale}, rope="after")
    values = {"key": np.array([[-63.5, 0, 63.5]]), "value": np.array([[-31.75, 0, 31.75]])}
    return AttentionSample(attention, {"key": codes, "value": codes}, values)


ROWS = by_name(
    awq_float32_scales,
    workspace_natural_order,
    workspace_tile,
    w13_interleaved,
    query_permuted,
    key_permuted,
    value_in_order,
    two_ranks_query,
    two_ranks_key,
    two_ranks_value,
    two_ranks_wo,
    two_ranks_w2,
    float_query,
    float_key,
    float_value,
    float_wo,
    workspace_float,
    gptq_without_zeros,
    smooth_quant_int8,
    smooth_quant_e4m3,
    smooth_quant_e5m2,
    mxfp4_experts,
    past_kv_scale_midpoint,
    past_kv_scale_symmetric,
)


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    ROWS[name]().prove()
