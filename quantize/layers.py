"""One linear, quantized: its weight rounded by its config, and the numbers that a static W8A8 layer stores beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from formats.errors import UnreadableError, UsageError

from .config import QuantConfig
from .rounding import RoundedWeight, round_groups, round_lowbit, round_outliers, round_plain, round_sparse, round_two_stages

__all__ = ["STATIC_TYPES", "QuantizedLayer", "check_groups", "check_linear", "quantize_linear", "rounded_layer", "with_inputs"]

STATIC_TYPES = ("W8A8", "W8A8S")
"""Types whose activations have stored scales."""


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized linear's numbers, on the CPU, in the dtypes that msModelSlim stores.

    name                   the module's path
    kind                   W8A16, W4A16, W8A8, W8A8S, W8A8_DYNAMIC, W4A8_DYNAMIC
    bits                   of the weights' codes: 8 for W8A8S, whose files say so
    symmetric              the weight has no offsets
    group_size             inputs per group, or -1
    codes                  [out, in] int8, one code a byte
    weight_scale           [1] or [], [out, 1] or [out, groups]; weight_offset the same, subtracted from codes. W8A8S files leave both out
    weight_scale_second    [out, groups] float32 (W4A8: the group's, times the row's weight_scale), weight_offset_second int64 zeros
    bias                   [out] as it was, or None
    input_scale            [1] static; input_offset the same, added to codes
    deq_scale              [out] (or [1]) float32: the product input_scale * weight_scale, rounded as the model's dtype rounds it
    quant_bias             [out] int32: round(bias / deq_scale - sum over in of codes * input_offset)
    g_idx                  [in] int32, the group of each input where those are not in order (GPTQ's act order), else None
    weight_error           relative error of the weight: ||fake - weight|| / ||weight||
    repaired               groups that a tool would have written wrongly, and that are right here
    """

    name: str
    kind: str
    bits: int
    symmetric: bool
    group_size: int
    codes: Tensor
    weight_scale: Tensor
    weight_offset: Tensor
    weight_scale_second: Tensor | None = None
    weight_offset_second: Tensor | None = None
    bias: Tensor | None = None
    input_scale: Tensor | None = None
    input_offset: Tensor | None = None
    deq_scale: Tensor | None = None
    quant_bias: Tensor | None = None
    g_idx: Tensor | None = None
    weight_error: float = 0.0
    repaired: int = 0


def check_linear(name: str, linear: nn.Linear, config: QuantConfig) -> None:
    """Whether ``linear`` can be quantized by ``config``.

    :raises UnreadableError: its weight is not finite, or not in memory
    :raises UsageError: groups do not divide its inputs
    """
    if linear.weight.is_meta:
        raise UnreadableError(f"{name}: its weight is not in memory (device meta); load the model without offloading")
    if not torch.isfinite(linear.weight).all():
        raise UnreadableError(f"{name}: its weight has NaN or infinite values")
    check_groups(name, linear.in_features, config)


def check_groups(name: str, inputs: int, config: QuantConfig) -> None:
    """UsageError if groups do not divide a linear's ``inputs``."""
    if config.is_per_group and inputs % config.group_size:
        raise UsageError(
            f"{name}: {inputs} inputs are not whole groups of {config.group_size}; choose another group_size, or "
            "add the layer to disable_names"
        )


def quantize_linear(name: str, linear: nn.Linear, config: QuantConfig) -> tuple[QuantizedLayer, Tensor]:
    """The layer's numbers without its input scales, and the fake weight [out, in] in the weight's dtype and place."""
    return rounded_layer(name, linear, config, linear.weight.detach(), _rounded(linear.weight.detach(), config))


def rounded_layer(
    name: str, linear: nn.Linear, config: QuantConfig, weight: Tensor, rounded: RoundedWeight
) -> tuple[QuantizedLayer, Tensor]:
    """``rounded`` as a layer's numbers, and its fake weight; its error is measured against ``weight`` [out, in]."""
    norm = torch.linalg.vector_norm(weight.float())
    error = torch.linalg.vector_norm(rounded.fake.float() - weight.float()) / norm if norm > 0 else norm

    def stored(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().cpu().clone()

    layer = QuantizedLayer(
        name=name,
        kind=config.model_quant_type,
        bits=8 if config.model_quant_type == "W8A8S" else config.w_bit,
        symmetric=config.w_sym,
        group_size=config.group_size,
        codes=rounded.codes.cpu(),
        weight_scale=rounded.scale.cpu(),
        weight_offset=rounded.offset.cpu(),
        weight_scale_second=stored(rounded.scale_second),
        weight_offset_second=stored(rounded.offset_second),
        bias=stored(linear.bias),
        g_idx=stored(rounded.g_idx),
        weight_error=float(error),
    )
    return layer, rounded.fake


def _rounded(weight: Tensor, config: QuantConfig) -> RoundedWeight:
    """``weight`` by the arithmetic that ``config`` implies (the table in ``rounding``)."""
    bits, hqq = config.w_bit, config.w_method == "HQQ"
    if config.is_stage_quant:
        return round_two_stages(weight, config.group_size)
    if config.is_per_group:
        return round_groups(weight, bits, config.w_sym, config.group_size, hqq)
    if config.is_lowbit and bits == 4 and config.open_outlier:
        sigma_factor = config.sigma_factor if config.use_sigma else None
        stored_bits = 8 if config.model_quant_type == "W8A8S" else bits
        return round_outliers(weight, bits, config.mm_tensor, config.fraction, sigma_factor, stored_bits)
    if config.is_lowbit:
        return round_lowbit(weight, bits, config.w_sym, config.mm_tensor)
    if config.co_sparse:
        return round_sparse(weight, bits, config.mm_tensor, config.fraction)
    return round_plain(weight, bits, config.w_sym, config.mm_tensor, hqq)


def with_inputs(layer: QuantizedLayer, input_scale: Tensor, input_offset: Tensor) -> QuantizedLayer:
    """``layer`` with its static input scale and offset [1], and the two tensors that follow from them."""
    product = input_scale * layer.weight_scale  # in the dtype of both, so bf16 and fp16 models round it
    deq_scale = (product.squeeze(1) if product.ndim > 1 else product).float()
    correction = layer.codes.float().sum(1) * input_offset.float()
    bias = torch.zeros(layer.codes.shape[0]) if layer.bias is None else layer.bias
    quant_bias = torch.round(bias / deq_scale - correction).to(torch.int32)
    return replace(layer, input_scale=input_scale, input_offset=input_offset, deq_scale=deq_scale, quant_bias=quant_bias)
