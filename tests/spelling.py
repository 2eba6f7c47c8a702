"""What the tests of a format's tensor table have in common: a sample of a row, and the proof that the IR says the same.

A row's sample is a pair: the stored tensors spelled into the IR, and the values that the tool's own formula gives,
computed in the stored orientation or written out as literals. Block and group sizes are smaller than in real files,
so that a sample can be read; a format whose tile cannot be cut smaller keeps its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from formats.errors import UnreadableError
from formats.ir import (
    Array,
    AttentionQuant,
    Extra,
    PlainTensor,
    QuantArgs,
    QuantizedLinear,
    QuantScheme,
    Region,
    assemble,
    dequantize,
    read,
    scale_grid,
)
from formats.layouts import PackLayout

LAYER = "model.layers.0.mlp.down_proj"
ATTENTION = "model.layers.0.self_attn"

BFLOAT16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
E8M0 = ml_dtypes.float8_e8m0fnu

INT8_CHANNEL = QuantArgs(8)
INT4_CHANNEL = QuantArgs(4)
INT8_TENSOR = QuantArgs(8, strategy="tensor")
STATIC_INPUTS = QuantArgs(8, symmetric=False, strategy="tensor")
TOKEN_INPUTS = QuantArgs(8, strategy="token", dynamic=True)


@dataclass(frozen=True)
class LinearSample:
    """A linear layer in the IR, and the float32 weights [out, in] that the tool computes from its own tensors.

    stored    where the layer lies in regions: by tensor, the canonical array [..., out, in] of all its codes
    call      where the tool quantizes inputs statically: some inputs [rows, in] and the tool's outputs [rows, out]
    """

    layer: QuantizedLinear
    weights: Array
    stored: Mapping[str, Array] | None = None
    call: tuple[Array, Array] | None = None

    def prove(self) -> None:
        self.layer.check()
        assert_same_values(dequantize(self.layer), self.weights)
        assert_same_values(dequantize(self.layer, slice(1, None)), self.weights[1:])
        assert_same_values(dequantize(self.layer, cols=slice(1, None, 2)), self.weights[:, 1::2])
        assert_same_values(scale_grid(self.layer, slice(1, None)), scale_grid(self.layer)[1:])
        assert (self.stored is None) == (self.layer.regions == ())
        if self.stored is not None:
            prove_regions(self.layer.regions, self.stored, read(self.layer.codes))
        if self.call is not None:
            inputs, outputs = self.call
            assert_same_values(static_outputs(self.layer, inputs), outputs)


@dataclass(frozen=True)
class AttentionSample:
    """Attention quantization in the IR; per operand with a stored scale some codes, and the float32 values they stand for."""

    attention: AttentionQuant
    codes: Mapping[str, Array] = field(default_factory=dict)
    values: Mapping[str, Array] = field(default_factory=dict)

    def prove(self) -> None:
        self.attention.check()
        assert set(self.codes) == set(self.values) == set(self.attention.scales) <= set(self.attention.args)
        for operand, codes in self.codes.items():
            assert_same_values(self.attention.dequantize(operand, codes), self.values[operand])


@dataclass(frozen=True)
class PlainSample:
    """A tensor that is carried, and the arrays that the file holds: its own, or those in which its regions lie."""

    tensor: PlainTensor
    stored: Mapping[str, Array]

    def prove(self) -> None:
        assert self.tensor.data.shape == self.tensor.shape
        turned = self.tensor.transform == "transpose"
        if self.tensor.regions:
            canonical = {name: array.T if turned else array for name, array in self.stored.items()}
            prove_regions(self.tensor.regions, canonical, self.tensor.data)
        else:
            (array,) = self.stored.values()
            assert (self.tensor.data.T if turned else self.tensor.data).tobytes() == array.tobytes()


Sample = LinearSample | AttentionSample | PlainSample
Row = Callable[[], Sample]


def by_name(*rows: Row) -> dict[str, Row]:
    """The rows under the names of their functions."""
    return {getattr(row, "__name__", repr(row)): row for row in rows}


def linear(weights: QuantArgs, codes: Array, scales: Array, inputs: QuantArgs | None = None, **parts: Any) -> QuantizedLinear:
    """A ``QuantizedLinear`` named ``LAYER`` whose shape is that of ``codes``."""
    shape = (codes.shape[0], codes.shape[1])
    return QuantizedLinear(LAYER, shape, QuantScheme(weights, inputs), codes, scales, **parts)


def group(bits: int, size: int, symmetric: bool = True) -> QuantArgs:
    """Integer weights in groups of ``size`` inputs."""
    return QuantArgs(bits, symmetric=symmetric, strategy="group", group_size=size)


def derived(**tensors: Array) -> dict[str, Extra]:
    return {name: Extra("derived", value) for name, value in tensors.items()}


def prove_regions(regions: Sequence[Region], stored: Mapping[str, Array], whole: Array) -> None:
    """``whole`` [out, in] is assembled of its regions, and written back to just those places of the stored tensors."""
    found = assemble(regions, stored, (whole.shape[0], whole.shape[1]))
    assert found.dtype == whole.dtype
    np.testing.assert_array_equal(found, whole)
    rewritten = {name: np.full_like(array, 99) for name, array in stored.items()}
    touched = {name: np.zeros(array.shape, dtype=bool) for name, array in stored.items()}
    for region in regions:
        rows, cols = region.take(stored[region.tensor]).shape
        region.put(rewritten[region.tensor], whole[region.at[0] :, region.at[1] :][:rows, :cols])
        region.put(touched[region.tensor], np.ones((rows, cols), dtype=bool))
    for name, array in stored.items():
        np.testing.assert_array_equal(rewritten[name], np.where(touched[name], array, np.full_like(array, 99)))
    assert sum(int(places.sum()) for places in touched.values()) == whole.size
    with pytest.raises(UnreadableError):
        assemble(regions[1:], stored, (whole.shape[0], whole.shape[1]))


def functional(**tensors: Array) -> dict[str, Extra]:
    return {name: Extra("functional", value) for name, value in tensors.items()}


def words(text: str, dtype: str = "<i4") -> Array:
    """Stored words from hexadecimal, a row a line: ``76543210`` holds 0 in its lowest nibble."""
    bits = np.dtype(dtype).itemsize * 8
    rows = [[int(word, 16) for word in line.split()] for line in text.strip().splitlines()]
    unsigned = np.array(rows, dtype=np.uint64).astype(f"<u{bits // 8}")
    return unsigned.view(dtype)


def digits(text: str, zero: int = 0) -> Array:
    """4-bit codes from hexadecimal digits in canonical or stored order, one row a line; ``zero`` is subtracted."""
    rows = [[int(digit, 16) for digit in line] for line in text.split()]
    return (np.array(rows) - zero).astype(np.int8)


def unpacked(layout: PackLayout, stored: Array, codes: Array) -> Array:
    """``codes``, after the layout has read exactly them out of ``stored``, and written ``stored`` out of them."""
    np.testing.assert_array_equal(layout.unpack(stored, dtype=codes.dtype.str[1:]), codes)
    np.testing.assert_array_equal(layout.pack(codes), stored)
    return codes


def float_bits(text: str, dtype: str = "<i8") -> Array:
    """float32 bit patterns in hexadecimal, zero-extended to ``dtype``, as int64 scales are stored."""
    return np.array([int(pattern, 16) for pattern in text.split()], dtype=dtype)


def decode_float_bits(stored: Array) -> Array:
    """The float32 values of ``float_bits``: the low 32 bits of every element, reinterpreted."""
    return np.asarray(stored.astype(np.int32).view(np.float32))


def static_outputs(layer: QuantizedLinear, inputs: Array) -> Array:
    """What the layer computes with statically quantized inputs [rows, in] of float32, by the IR's fields alone.

    ``input_smooth`` multiplies x before ``input_scale`` quantizes it.
    """
    assert layer.input_scale is not None
    scale = layer.input_scale.astype(np.float32)
    zero = np.float32(0) if layer.input_zero_point is None else layer.input_zero_point.astype(np.float32)
    smoothed = inputs if layer.input_smooth is None else inputs * layer.input_smooth
    codes = np.clip(np.rint(smoothed / scale) + zero, -128, 127)
    outputs = ((codes - zero) * scale) @ dequantize(replace(layer, input_smooth=None)).T
    return np.asarray(outputs if layer.bias is None else outputs + layer.bias, dtype=np.float32)


def integer_outputs(inputs: Array, scale: Array, zero: Array, weight: Array, correction: Array, deq: Array) -> Array:
    """The NPU's W8A8 arithmetic: ``y = (W x_q + correction) * deq``, in integers until the last product."""
    codes = np.clip(np.rint(inputs / scale) + zero, -128, 127).astype(np.int64)
    return np.asarray((codes @ weight.astype(np.int64).T + correction) * deq, dtype=np.float32)


def refused_message(refusal: BaseException, parts: Iterable[str]) -> bool:
    """Whether the refusal names the layer and every one of ``parts``."""
    return all(part in str(refusal) for part in (LAYER, *parts))


def assert_same_values(found: Array, wanted: Array) -> None:
    """Equal float32 arrays, bit for bit but for the sign of zero."""
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.asarray(wanted, dtype=np.float32))
