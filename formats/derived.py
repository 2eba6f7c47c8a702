"""What msModelSlim stores beside the law so that an NPU need not compute it: deq_scale, quant_bias, scale_bias.

Static W8A8 computes ``y = (sum_k(W * x_q) + quant_bias) * deq_scale`` with ``x_q = clamp(round(x / input_scale + input_offset))``,
so ``deq_scale`` is ``input_scale * weight_scale``, and ``quant_bias`` is ``round(bias / deq_scale - sum_k(W) * input_offset)``:
it holds the bias already, rounded to whole steps. The tool takes deq_scale's product in the model's dtype (off by up to 0.4 %
in bfloat16, 0.8 % where a float16 product is subnormal); here it is taken in float32.

``deq_scale`` is stored as float32 for models in bfloat16, else as int64 whose low half is the float32's bits.

``scale_bias`` of W4A8 is ``8 * sum_k(w)``: the kernel reads nibbles unsigned and takes it off again. The output and down
projections have it in 16 parts along their inputs, for as many ranks.
"""

from __future__ import annotations

import numpy as np

from .errors import UnreadableError
from .ir import Array, ArrayLike, QuantizedLinear, dequantize, read, scale_grid

DERIVED = ("deq_scale", "quant_bias", "scale_bias")
SPLIT = 16
"""Parts of a scale_bias whose layer's inputs are split over ranks."""

_BAND = 1 << 21


def decode_deq_scale(stored: Array) -> Array:
    """float32 values of a deq_scale stored as float32 or as int64."""
    found: Array = stored.astype(np.int32).view(np.float32) if stored.dtype == np.int64 else stored.astype(np.float32)
    return found


def encode_deq_scale(values: Array, dtype: str) -> Array:
    """The inverse: float32 as it is ("F32") or as int64 ("I64")."""
    return values.view(np.int32).astype(np.int64) if dtype == "I64" else values


def deq_scale(layer: QuantizedLinear) -> Array:
    """[out] float32: the stored one, else the product of the scales."""
    out = layer.shape[0]
    kept = layer.extras.get("deq_scale", layer.extras.get("dequant_scale"))
    if kept is not None:
        return np.ascontiguousarray(np.broadcast_to(decode_deq_scale(read(kept.value)).reshape(-1), (out,)))
    assert layer.input_scale is not None
    return np.ascontiguousarray(np.broadcast_to(scale_grid(layer)[:, 0] * layer.input_scale.astype(np.float32), (out,)))


def comes_back(layer: QuantizedLinear) -> bool:
    """Whether the weights' scale is what its product with the inputs' scale, in float32, gives when it is divided by that again.

    Golden Stick stores the product alone. Of half precision scales it holds every bit; of float32 ones it does where they were such
    quotients.
    """
    assert layer.input_scale is not None
    inputs, scale = layer.input_scale.astype(np.float32), scale_grid(layer)[:, 0]
    return bool((scale * inputs / inputs == scale).all())


def sums(layer: QuantizedLinear, rows: slice = slice(None)) -> Array:
    """[rows] int64: each output's codes added up."""
    return sums_of(layer.codes, rows)


def sums_of(codes: ArrayLike, rows: slice = slice(None)) -> Array:
    """[rows] int64: the rows of ``codes`` [out, in] added up."""
    start, stop, _ = rows.indices(codes.shape[0])
    step = max(64, _BAND // codes.shape[1] // 64 * 64)
    bands = (slice(top, min(top + step, stop)) for top in range(start, stop, step))
    return np.concatenate([np.add.reduce(read(codes, band), axis=1, dtype=np.int64) for band in bands])


def quant_bias(layer: QuantizedLinear) -> Array:
    """[out] int32: the stored one, else from bias, codes and input offset. UnreadableError where it does not fit."""
    kept = layer.extras.get("quant_bias")
    if kept is not None:
        return np.asarray(read(kept.value))
    exact = -_offset(layer) * (sums(layer) if _offset(layer) else np.zeros(layer.shape[0], np.int64)) + _bias_steps(layer)
    whole: Array = np.rint(exact)
    if not (np.abs(whole) < 2**31).all():
        raise UnreadableError(f"{layer.name}: its bias is {np.abs(exact).max():.3g} steps of deq_scale, which int32 cannot hold")
    return whole.astype(np.int32)


def _offset(layer: QuantizedLinear) -> int:
    return 0 if layer.input_zero_point is None else int(layer.input_zero_point.reshape(-1)[0])


def _bias_steps(layer: QuantizedLinear, rows: slice = slice(None)) -> Array:
    """[rows] float64: the bias in steps of deq_scale."""
    deq = deq_scale(layer)[rows].astype(np.float64)
    if layer.bias is None:
        return np.zeros(deq.shape)
    bias = read(layer.bias, rows).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(bias == 0, 0.0, bias / deq))


def bias_error(layer: QuantizedLinear) -> float:
    """The largest relative error that rounding the bias to whole steps makes, against the largest bias; 0 without one."""
    if layer.bias is None:
        return 0.0
    steps = _bias_steps(layer)
    largest = float(np.abs(read(layer.bias).astype(np.float64)).max(initial=0))
    return float((np.abs(np.rint(steps) - steps) * deq_scale(layer)).max(initial=0)) / largest if largest else 0.0


def contradiction(layer: QuantizedLinear, rows: int = 64) -> float:
    """How far the stored deq_scale and quant_bias are from what scales, bias and codes say, relatively; 0 within the tools' roundings.

    Looks at the first outputs only. The tools round the product of scales, or the quotient of bias and deq_scale, to half precision.
    """
    if not {"deq_scale", "quant_bias"} <= set(layer.extras) or layer.input_scale is None:
        return 0.0
    some = slice(0, min(rows, layer.shape[0]))
    stored = deq_scale(layer)[some]
    product = scale_grid(layer, some)[:, 0] * layer.input_scale.astype(np.float32)
    error = float((np.abs(stored - product) / np.maximum(np.abs(stored), np.abs(product)).clip(min=1e-38)).max(initial=0))
    found = error if error > _OF_DEQ else 0.0
    steps = _bias_steps(layer, some)
    said = read(layer.extras["quant_bias"].value)[some] + _offset(layer) * sums(layer, some)
    if (np.abs(said - steps) > 0.51 + np.abs(steps) * 2.0**-7).any():
        size = np.maximum(np.abs(said), np.abs(steps)).max()
        found = max(found, float(np.abs(said - steps).max() / size))
    return found


_OF_DEQ = 0.01


def scale_bias(layer: QuantizedLinear, parts: int) -> Array:
    """[out, parts] float32: the stored one, else 8 times the sum of the weights of as many equal parts of the inputs."""
    kept = layer.extras.get("scale_bias")
    if kept is not None:
        return read(kept.value)
    (out, in_), found = layer.shape, []
    step = max(1, _BAND // in_)
    for top in range(0, out, step):
        weights = dequantize(layer, slice(top, min(top + step, out)))
        found.append(8 * weights.reshape(weights.shape[0], parts, -1).sum(axis=2, dtype=np.float64))
    return np.concatenate(found).astype(np.float32)


def zero_point_bias(layer: QuantizedLinear) -> Array:
    """[out] int32: what the inputs' zero point makes, in steps of deq_scale, for Golden Stick 1.x; the stored one, if there is one."""
    kept = layer.extras.get("zero_point_bias")
    if kept is not None:
        return np.asarray(read(kept.value))
    exact = -_offset(layer) * sums(layer)
    if not (np.abs(exact) < 2**31).all():
        raise UnreadableError(f"{layer.name}: its inputs' zero point makes {np.abs(exact).max()} steps, which int32 cannot hold")
    return exact.astype(np.int32)


def merged_bias(layer: QuantizedLinear, stored_deq_scale: Array) -> Array:
    """[out] float64: the bias with what the inputs' zero point makes, for Golden Stick 0.6.0; the stored one, if there is one."""
    kept = layer.extras.get("merged_bias")
    if kept is not None:
        return read(kept.value).astype(np.float64)
    bias = np.zeros(layer.shape[0]) if layer.bias is None else read(layer.bias).astype(np.float64)
    return np.asarray(bias - _offset(layer) * sums(layer) * stored_deq_scale.astype(np.float64))
