"""Marlin: AutoAWQ's ``marlin`` (qweight, scales) and AutoGPTQ's (B, s), which store one and the same tile.

Of 16 inputs by 64 outputs, the 128 words of a tile hold the unsigned codes as the tensor cores want them; scales are
permuted as well; the zero point is 8 and is not stored.
"""

from __future__ import annotations

import numpy as np
import pytest
from spelling import INT4_CHANNEL, LinearSample, Sample, by_name, digits, group, linear, words

from formats.ir import Array

Q = digits(
    """
    22c799b0726e8182cff9d5287af4d25c3a78fdd8ff2348d7f5e9b39cedf2c7a4
    01fe4632da139ef3902375b75eabb5e0420f17dbd0703d1904e541c2700d0762
    abf3e029deb06c83a1b054fba74df335746f5f85e6c5fbe01186f32d4b481aeb
    ec9e728a22a77cae2c8015a28f22f3d5c0ad5a320781395300a1d84a257a2512
    35e61e9111e8af6e6bd1bcfa72c7c05c9b9cdca41c530206479489a903c945eb
    542ca6b88ac8644f219518b0729ccc4aaebc145ad57b3632be2bbbb81c37f941
    48dd3bac776e818ed5e1b907664dd2c926482712d84d52e0f1c72f60bf28e1c6
    03dbe824441d1cb6a68b7fd1e235d8c1b033d6cbb9d0a0a7fd0e258e5e46eba5
    0259d10a3c9e77c13e2dbf490a0552841b255bb817bff237423eb78582098672
    d076c9389e8e5efcd7f89696901cd300c74b8615ca72a0f9b85d06bc30f0c903
    21925505998e35a249b06655d690c859cbdfc5ca57032eeb4f3dceb200f3d6db
    17a82cb13a10535b3a96145d04b093703cf1efa3a45924f6a1b690232e84343a
    8ed456db7c99b2a21c0b3e0ce6f2de3bb90a1645f957bbceed96657ea6cc2177
    089c9e72b97a325dd84ff2a8d57aa948e53875fe17a7f4e4ef451d295fa2cf9c
    b9cb2b879a13c01a37ced45dcfbe6f528203650112c05e55ba377b6c66587164
    73e4859965b57d0070803d8a3b2f13ee33f8ba9c23270044df4ed98c1e35df17
    """
)
"""The unsigned codes, [16 in, 64 out]."""

B = words(
    """
    9dd03702 95d9073c cdc41f13 37b08e4f 321e9d2a 0832da4a a03c5ec7 22a00441
    b8057183 d7d2e716 1deaf1b9 51eba0e4 647097b4 3e7ac63d 2b3b1d82 15df6bbf
    ea01c222 0e70aaef a0727fba 00842d25 a27c9e1b 4fac6791 47c076b4 e5100bf1
    9a84c1e5 528162cb 755e9c9b fcfe63d7 5433a798 b206f675 39302826 eefd6fa1
    817f965c 1af20f2f 7740b227 f05e0f3e 1aa98b9f b29894bb 58fa0cd6 87baf438
    7c929ede 7949fc0d a73b5509 a342cc99 b1ed16cd 2388b4ce 2df3c404 3440523c
    e36eee97 cb8354d9 20bff358 0dd592e9 078ee023 02600d00 911d35ff 4a6138d6
    a8cc9846 acf527b1 7b8c73ac 275bc964 5d4b3ebd f50bede1 70830d38 56ee8877
    59c478d9 db975dbd a381f45f c0048cbb 5727365e 9f11cf65 23e52fc5 329dd1cf
    369aba51 acf1dc3b f371b01d cf1b2468 718ec823 1d376ddb 0abd5562 ded27e72
    ee967119 356522f5 0d6728bd 97616773 3cc25c50 33458364 49faeb5f 45086ae3
    24e62f6e 9c28e0ec 4654b26c f9db1559 dc5801bb 38dff249 00a6e257 fb9511bf
    ff33c80b 0e9b8542 f11d3dbd 06bc7a89 5ab8a802 7d5a535f f5a3eec8 3124deb2
    547ba6d9 44ab350f e3f5c04a 942b7e7a 0b92188a ec8d5c50 4a9c5e01 1a886c66
    c38212a0 00674c98 995b7788 32c2245c be1a2359 05d2955b 6332b0a5 a23abb2d
    df282eb1 8a80bcca 42eae654 c1987be9 0694ae7c e1a129d7 47cb5012 75ce46c0
    """
).reshape(1, 128)
"""The stored words, [in / 16, 2 * out]. Word 0 is 9dd03702: its nibbles, the lowest first, are the codes of input and
output (0, 0), (8, 0), (0, 8), (8, 8), (1, 0), (9, 0), (1, 8), (9, 8), that is 2 0 7 3 0 d d 9."""


def unpacked_tile(stored: Array) -> Array:
    """Unsigned codes [in, out] of the words [in / 16, 2 * out], by the closed form of the permutation."""
    inputs, outputs = np.indices((16 * stored.shape[0], stored.shape[1] // 2))
    thread = outputs % 8 * 4 + inputs % 8 // 2
    word = outputs // 64 * 128 + thread * 4 + outputs // 16 % 4
    nibble = 4 * (inputs % 2) + 2 * (outputs // 8 % 2) + inputs // 8 % 2
    lanes = stored.view(np.uint32)[inputs // 16, word] >> (4 * nibble).astype(np.uint32)
    return np.asarray(lanes & 15)


def tile(scales: Array, stored_scales: Array, scale_order: list[int]) -> Sample:
    """``scales`` [groups, out] in order; stored scale j is that of output ``scale_order[j]``."""
    q = unpacked_tile(B)
    np.testing.assert_array_equal(q, Q)
    in_order = np.empty_like(stored_scales)
    in_order[:, scale_order] = stored_scales
    np.testing.assert_array_equal(in_order, scales)
    in_, groups = q.shape[0], len(scales)
    weights = INT4_CHANNEL if groups == 1 else group(4, in_ // groups)
    layer = linear(weights, (q.astype(np.int8) - 8).T, in_order.T)
    return LinearSample(layer, ((Q - np.float32(8)) * np.repeat(scales, in_ // groups, axis=0)).T)


def grouped() -> Sample:
    """Groups: of 64 scales the first eight stored are those of the outputs 0, 8, ... 56, then 1, 9, ... 57."""
    scales = np.arange(1, 129, dtype=np.float16).reshape(2, 64) / 8
    stored = scales.reshape(2, 8, 8).transpose(0, 2, 1).reshape(2, 64)
    assert (stored[0, :3] * 8).tolist() == [1, 9, 17]
    return tile(scales, stored, [output + 8 * block for output in range(8) for block in range(8)])


def per_channel() -> Sample:
    """Channels: of 32 scales the first stored are those of the outputs 0, 1, 8, 9, 16, 17, 24, 25, then 2, 3, 10."""
    scales = np.arange(1, 65, dtype=np.float16).reshape(1, 64) / 8
    stored = scales.reshape(2, 4, 4, 2).transpose(0, 2, 1, 3).reshape(1, 64)
    assert (stored[0, :4] * 8).tolist() == [1, 2, 9, 10]
    pairs = [2 * pair + 8 * block + one for pair in range(4) for block in range(4) for one in range(2)]
    return tile(scales, stored, [32 * half + output for half in range(2) for output in pairs])


def awq_marlin() -> Sample:
    return grouped()


def awq_marlin_per_channel() -> Sample:
    return per_channel()


def gptq_marlin() -> Sample:
    return grouped()


def gptq_marlin_per_channel() -> Sample:
    return per_channel()


ROWS = by_name(awq_marlin, awq_marlin_per_channel, gptq_marlin, gptq_marlin_per_channel)


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    ROWS[name]().prove()
