"""Layers read out of what was written, by the packing code of the tools that will read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from checkpoints import Array, Tensors

from .bits import (
    AWQ_ORDER,
    codes_of_nibbles,
    in_eights,
    marlin_scales,
    padded_groups,
    signed,
    unpack,
    unpack_fast,
    unpack_marlin,
    unpack_padded,
)
from .verdict import insist


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


def decode_sparse(tensors: Tensors, name: str) -> Decoded:
    """W8A8S: the codes are removed; deq_scale and input_scale, whose quotient is the scale, are left to be compared."""
    codes, product, step = (tensors[f"{name}.{part}"] for part in ("weight", "deq_scale", "input_scale"))
    del tensors[f"{name}.weight"]
    product = product.astype(np.int32).view(np.float32) if product.dtype == np.int64 else product
    scales = (product / step.astype(np.float32)).reshape(-1, 1)
    return Decoded(codes, np.zeros(scales.shape, np.int16), scales, np.zeros(codes.shape[1], np.int64))


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
