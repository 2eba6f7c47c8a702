"""The fake-quantized model: what takes a linear's place while the calibrator runs and afterwards, and the KV cache's rounding.

Weights are rounded once and stored dequantized, in the model's dtype. Activations are rounded on the way in:

static     by an observer's range, in calibration after each call's update, so that later layers see quantized activations
dynamic    in calibration like static; afterwards by each token's own range
digits     16-bit activations beside per-group weights (``observers.split_by_digits``)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from formats.errors import UnreadableError

from .config import QuantConfig
from .observers import Observer, split_by_digits
from .rounding import codes_of, dequantized, linear_parameters

__all__ = ["DigitSplitter", "FakeQuantLinear", "InputQuantizer", "quantize_cache", "rounded_states"]


class InputQuantizer:
    """Rounds one linear's input to 8 bits (or ``a_bit``), and finds the static scale and offset while ``calibrating``.

    name           the linear's, for errors
    observer       None without calibration data
    scale, offset  [1], on the CPU, in the dtype of the observer's range, but bf16 for a bf16 model (unless lowbit); None until
                   something was seen
    """

    def __init__(self, name: str, config: QuantConfig, observer: Observer | None) -> None:
        self.name, self.config, self.observer = name, config, observer
        self.calibrating = observer is not None
        self.scale: Tensor | None = None
        self.offset: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """The input as it is after rounding, same shape and dtype."""
        if values.numel() == 0:
            return values
        if self.calibrating:
            return self._dropped(values, self._rounded(values, *self._learn(values)))
        if self.config.is_dynamic:
            low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
            return self._rounded(values, *linear_parameters(low, high, self.config.a_bit, self.config.a_sym))
        if self.scale is None or self.offset is None:
            raise UnreadableError(f"{self.name}: calibration never reached this layer, so it has no input scale; add samples that do")
        return self._rounded(values, self.scale, self.offset)

    def _learn(self, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self.observer is not None
        if not torch.isfinite(values).all():
            raise UnreadableError(f"{self.name}: its input in calibration has NaN or infinite values; check the model and its samples")
        self.observer.update(values)
        self.scale, self.offset = linear_parameters(*self.observer.range(), self.config.a_bit, self.config.a_sym)
        if values.dtype == torch.bfloat16 and not self.config.is_lowbit:
            self.scale, self.offset = self.scale.bfloat16(), self.offset.bfloat16()
        return self.scale, self.offset

    def _rounded(self, values: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        scale, offset = scale.to(values.device), offset.to(values.device)
        return dequantized(codes_of(values, scale, offset, self.config.a_bit), scale, offset, values)

    def _dropped(self, values: Tensor, rounded: Tensor) -> Tensor:
        """Each element's rounded value with probability ``pr``. Below 0, ``pr`` means one random probability for this call."""
        share = self.config.pr
        if share >= 1:
            return rounded
        if share < 0:
            share = float(np.random.rand())
            share = 0.0 if share < 0.5 else share
        return torch.where(torch.rand_like(values) < share, rounded, values)


class FakeQuantLinear(nn.Module):
    """A linear whose weight [out, in] was rounded and dequantized, and whose input is rounded by ``inputs``, if by anything."""

    def __init__(self, linear: nn.Linear, weight: Tensor, inputs: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias
        self.inputs = inputs
        self.train(linear.training)

    def forward(self, values: Tensor) -> Tensor:
        if self.inputs is not None:
            values = self.inputs(values)
        return functional.linear(values.type_as(self.weight), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class DigitSplitter:
    """``split_by_digits`` of ``bits``, as a linear's ``inputs``."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __call__(self, values: Tensor) -> Tensor:
        return split_by_digits(values, self.bits)


def rounded_states(states: Tensor, scale: Tensor, offset: Tensor, bits: int = 8) -> Tensor:
    """Keys or values [batch, heads, tokens, head size] rounded to integers of ``bits`` and dequantized again, in their dtype.

    scale, offset   [1], [heads, 1, 1], or [heads * head size] by channel; the offset is added to codes
    """
    heads, size = states.shape[1], states.shape[3]
    if scale.numel() == heads * size:
        scale, offset = scale.reshape(heads, 1, size), offset.reshape(heads, 1, size)
    scale, offset = scale.to(states.device), offset.to(states.device)
    return dequantized(codes_of(states, scale, offset, bits), scale, offset, states)


def quantize_cache(attention: nn.Module, scales: dict[str, Tensor]) -> Any:
    """Round what ``attention`` adds to its KV cache, after each call, to int8 by channel. Returns the hook's handle.

    scales   "k_scale", "k_offset", "v_scale", "v_offset": [kv heads * head size] each

    What a call computes itself still sees its own keys and values unrounded, and later calls see them rounded, as the tool has it.
    """

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values", kwargs.get("past_key_value"))
        layer = getattr(module, "layer_idx", None)
        if cache is None or layer is None:
            return
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if hidden is None:
            return
        tensors = cache.layers[layer] if hasattr(cache, "layers") else None
        for kind, field, old in (("k", "keys", "key_cache"), ("v", "values", "value_cache")):
            held = getattr(tensors, field) if tensors is not None else getattr(cache, old)[layer]
            new = held[:, :, -hidden.shape[1] :, :]  # [batch, kv heads, new tokens, head size]
            new.copy_(rounded_states(new, scales[f"{kind}_scale"], scales[f"{kind}_offset"]))

    return attention.register_forward_hook(after, with_kwargs=True)
