"""What a quantized folder computes, simulated in floats: what its numbers do to the model, without the engine's kernels.

=============  =====================================================================================================================
weights        dequantized by the law (``blocks.Weights``)
inputs         of a linear: quantized and dequantized as its scheme says, by the arithmetic with which ``serve-check`` judges engines
               (``serve_engine.quantize_inputs``): static by the stored scale and zero point, dynamic by each token's or tensor's own
               range, symmetric where the scheme is. W8A8_MIX, which can do both, by its static scale
keys, values   where attention gets them, after rotary embedding and before heads are repeated: rounded by the stored scales of C8 (by
               channel), of compressed-tensors' ``kv_cache_scheme`` (int8 or FP8, by tensor or head) or of FA3 (by head; queries too)
=============  =====================================================================================================================

Where engines differ:

1. They multiply codes and scale the sum, in int32 or in float16; here everything is multiplied in the dtype that was asked for. On an
   NPU a static layer's bias is rounded to whole steps (``quant_bias``); here it is the stored bias.
2. Every position attends to rounded keys and values, its own too. An engine that fills its cache computes with what it has not rounded
   yet, so that only later tokens see rounded ones; what is measured here is what a token generated after the prompt would see.
3. The scales of C8 were observed before rotary embedding, and engines apply them after it: both are kept.
4. Probabilities of 8-bit attention (FA3) stay in float.

What cannot be simulated is in ``notes``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from convert.serve_engine import quantize_inputs
from convert.serving_schemes import activations_of, simulated
from formats import Checkpoint
from formats.compressed_config import read_args
from formats.errors import UnreadableError
from formats.ir import Element, read

from .attention import Attention, attention_modules, wrapped_attention
from .blocks import to_torch
from .fake import rounded_states
from .kv_cache import FUSED_LINEARS

__all__ = ["Simulation", "StatesRounding"]

Operand = Literal["q", "k", "v"]

_FUSED = "|".join(FUSED_LINEARS)
_INT8 = (
    re.compile(rf"(.+?)(?:\.(?:{_FUSED}))?\.([kv])_proj\.kv_cache_(scale|offset)"),
    re.compile(r"(.+)\.fa_([qkv])\.(scale|offset)"),
)
"""msModelSlim's: attention module, operand, part."""
_BY_SCHEME = (re.compile(r"(.+)\.([qkv])_(scale|zero_point)"), re.compile(r"(.+)\.([kv])_proj\.output_(scale|zero_point)"))
"""compressed-tensors': what ``kv_cache_scheme`` is about."""


@dataclass(frozen=True)
class StatesRounding:
    """How queries, keys or values are rounded. scale, offset: [1], one for each head, or [heads * head size]; offset is added to codes."""

    name: str
    scale: Tensor
    offset: Tensor
    bits: int = 8
    element: Element = "int"

    def __call__(self, states: Tensor) -> Tensor:
        """``states`` [batch, heads, tokens, head size], rounded, in their dtype."""
        heads, size = states.shape[1], states.shape[3]
        scale, offset = self.scale, self.offset
        if scale.numel() not in {1, heads, heads * size}:
            raise UnreadableError(f"{self.name}: has {scale.numel()} scales for {heads} heads of {size}; they are of another model")
        if scale.numel() == heads:
            scale, offset = scale.reshape(heads, 1, 1), offset.reshape(heads, 1, 1)
        if self.element == "int":
            return rounded_states(states, scale, offset, self.bits)
        scale = scale.to(states.device, torch.float32)
        return ((states.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(states.dtype)


class Simulation:
    """How the model of ``checkpoint`` rounds what flows through it.

    inputs      {linear: what ``quantize_inputs`` takes}
    attention   {attention module: {"q", "k" or "v": how it is rounded}}
    notes       what of the folder is not simulated, as sentences
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.inputs = activations_of(checkpoint, None, static=True)
        self.attention: dict[str, dict[Operand, StatesRounding]] = {}
        left = self._read_attention(checkpoint)
        self.notes = tuple(_notes(checkpoint, left))
        self._folder = checkpoint.location.folder.name
        self._waiting = {*self.inputs, *self.attention}

    def _read_attention(self, checkpoint: Checkpoint) -> list[str]:
        """Fill ``attention``; names of tensors of it that are not understood."""
        scheme = checkpoint.said.get("kv_cache_scheme")
        args = None if scheme is None else read_args(scheme, "kv_cache_scheme")
        found: dict[tuple[str, Operand], dict[str, str]] = {}
        left = []
        for tensor in checkpoint.attention:
            known = _INT8 if checkpoint.format == "msmodelslim" else () if args is None or args.dynamic else _BY_SCHEME
            match = next((match for pattern in known if (match := pattern.fullmatch(tensor))), None)
            if match is None:
                left.append(tensor)
            else:
                found.setdefault((match[1], cast(Operand, match[2])), {})["scale" if match[3] == "scale" else "offset"] = tensor
        for (module, operand), parts in found.items():
            if "scale" not in parts:
                raise UnreadableError(f"{parts['offset']}: has no scale beside it; the checkpoint is incomplete")
            scale = _values(checkpoint, parts["scale"])
            offset = _values(checkpoint, parts["offset"]) if "offset" in parts else torch.zeros_like(scale)
            if not bool((scale.float().isfinite() & (scale > 0)).all()) or scale.numel() != offset.numel():
                raise UnreadableError(f"{parts['scale']}: wanted positive numbers, as many as offsets; the checkpoint is damaged")
            rounding = StatesRounding(parts["scale"], scale, offset)
            if args is not None:
                rounding = StatesRounding(parts["scale"], scale, offset, args.bits, args.element)
            self.attention.setdefault(module, {})[operand] = rounding
        return left

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """While this lasts, the modules that ``model`` has (it may be one layer of it) round as the folder says."""
        linears = {name: module for name, module in model.named_modules() if name in self.inputs}
        attention = {module: name for name, module in attention_modules(model).items() if name in self.attention}
        self._waiting -= set(linears)
        hooks = [module.register_forward_pre_hook(_rounder(self.inputs[name])) for name, module in linears.items()]
        try:
            with wrapped_attention(attention, lambda function: self._rounded(function, attention)) if attention else nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def check(self) -> None:
        """After the whole model ran: UnreadableError if something that the folder quantizes was never met."""
        if self._waiting:
            name = min(self._waiting)
            kind = "keys and values" if name in self.attention else "inputs"
            raise UnreadableError(
                f"{name}: its {kind} are quantized in {self._folder}, and the model's code calls no such module"
                f" ({len(self._waiting)} in all); transformers names or computes it otherwise"
            )

    def _rounded(self, function: Attention, names: dict[nn.Module, str]) -> Attention:
        def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            if (name := names.get(module)) is not None:
                self._waiting.discard(name)
                operands = self.attention[name]
                states: dict[Operand, Tensor] = {"q": query, "k": key, "v": value}
                query, key, value = (operands[one](states[one]) if one in operands else states[one] for one in states)
            return function(module, query, key, value, *args, **kwargs)

        return attention


def _rounder(facts: dict[str, Any]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A hook that rounds a linear's input."""
    tensors = {key: torch.tensor(value) if isinstance(value, list) else value for key, value in facts.items()}

    def before(linear: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        there = {key: value.to(inputs[0].device) if isinstance(value, Tensor) else value for key, value in tensors.items()}
        return (quantize_inputs(torch, inputs[0], there), *inputs[1:])

    return before


def _values(checkpoint: Checkpoint, tensor: str) -> Tensor:
    return to_torch(read(checkpoint.tensors.array(tensor))).flatten()


def _notes(checkpoint: Checkpoint, left: list[str]) -> Iterator[str]:
    layers = {name: checkpoint.layer(name) for name in checkpoint.layer_names}
    unknown = [name for name, layer in layers.items() if not simulated(layer)]
    if unknown:
        yield f"the inputs of {len(unknown)} layers are not rounded, as their scheme is not simulated: {unknown[0]}"
    both = [name for name, layer in layers.items() if layer.scheme.inputs and layer.scheme.inputs.dynamic and layer.input_scale is not None]
    if both:
        yield f"{len(both)} layers are W8A8_MIX: their inputs are rounded by the static scales"
    if left:
        yield f"{len(left)} tensors of quantized attention are not simulated: {left[0]}"
