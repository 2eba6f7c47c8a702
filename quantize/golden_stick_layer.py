"""One decoder layer by Golden Stick: smoothed, searched, clipped, rounded, in the order and on the inputs of its PTQ.

Every step but the first sees the layer's inputs as the float model makes them, and the layer as the steps before left it: its function
is the float one's, but for clips and the dtype's rounding. What the layer made in the last run before anything was rounded goes to the
next layer, except by GPTQ, which passes on what the rounded layer makes. So neither the order of linears nor rounded inputs count, but in
AWQ's search, which takes the linears one after the other, each judged by the output of the whole layer.

SmoothQuant observes what the float model gives each linear, once, and finds the range of smoothed inputs from the channels' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from formats.errors import UnreadableError, UsageError

from . import golden_stick as arithmetic
from .golden_stick import RoundedWeight, fake, parameters, round_weight, smoothing_scale, stored_smoothing
from .golden_stick_config import Policy, numbers
from .golden_stick_gptq import MeanHessian, round_gptq
from .golden_stick_search import Sampled, best_scale, clip_limits, clipped
from .stage import MORE_SAMPLES, UNREACHED, forward, set_module, watching

__all__ = ["MadeLayer", "MadeLinear", "quantize_layer", "siblings"]

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that networks with qkv_concat have as one."""
SKIPPED_BY_CLIPS = ("q_proj", "k_proj")
"""Linears whose weights are not clipped: rotary embeddings would multiply the error."""

Made = Callable[[int, Any], None]


def siblings(name: str) -> list[str]:
    """Whole names of the linears that networks with qkv_concat have as one with ``name``, itself among them."""
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{part}" for part in next((parts for parts in TOGETHER if leaf in parts), (leaf,))]


@dataclass(frozen=True)
class MadeLinear:
    """A quantized linear, on the CPU.

    dtype          the weight's; smooth: ``s`` [in], or None
    input_scale    [1] float64 (SmoothQuant: float32), input_zero the same; None where inputs are float or measured
    weight_error   relative error of the smoothed weight
    """

    policy: Policy
    rounded: RoundedWeight
    dtype: torch.dtype
    bias: Tensor | None
    smooth: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None
    weight_error: float = 0.0


@dataclass
class MadeLayer:
    """The quantized linears of a layer by name; the lowest and highest key and value of each channel, if they were asked for."""

    linears: dict[str, MadeLinear] = field(default_factory=dict)
    cache: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Smoothed(nn.Module):
    """A linear whose inputs are multiplied by ``factor`` [in]."""

    def __init__(self, linear: nn.Linear, factor: Tensor) -> None:
        super().__init__()
        self.linear, self.factor = linear, factor

    def forward(self, values: Tensor) -> Tensor:
        """The smoothed linear's output."""
        return self.linear((values * self.factor).to(values.dtype))


@dataclass
class Extremes:
    """The lowest and highest input of each channel [in] so far."""

    low: Tensor | None = None
    high: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Take inputs [..., in]."""
        rows = values.detach().reshape(-1, values.shape[-1])
        low, high = rows.amin(0), rows.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def checked(self, name: str) -> tuple[Tensor, Tensor]:
        """Both; UnreadableError for a linear that no sample reached, or values that are not finite."""
        if self.low is None or self.high is None:
            raise UnreadableError(f"{name}: {UNREACHED}, and its inputs' range is needed; {MORE_SAMPLES}")
        if not bool(self.low.isfinite().all() and self.high.isfinite().all()):
            raise UnreadableError(f"{name}: its inputs in calibration hold NaN or infinite values; check the model and its samples")
        return self.low, self.high


def quantize_layer(
    model: nn.Module,
    policies: Mapping[str, Policy],
    samples: Sequence[dict[str, Tensor]],
    made: Made,
    approach: str = "ptq",
    cache: bool = False,
    qkv_concat: bool = False,
) -> MadeLayer:
    """Quantize the linears of ``model``, which is a stage with one decoder layer, in place; by name of those in ``policies``.

    samples   what the stage is called with; made: is given (a sample's number, what the stage made of it)
    cache     keys and values are observed too
    qkv_concat   q, k and v are one linear to Golden Stick, and gate and up, and are smoothed together

    :raises UnreadableError: values that are not finite, a linear that no sample reaches
    """
    layer = _Layer(model, policies, samples, made, qkv_concat)
    for name in policies:
        if not bool(torch.isfinite(layer.linear(name).weight).all()):
            raise UnreadableError(f"{name}: its weight has NaN or infinite values")
    if approach == "smooth_quant":
        return layer.smooth_quant()
    layer.smooth()
    layer.search()
    layer.clip()
    return layer.round(cache)


class _Layer:
    def __init__(
        self, model: nn.Module, policies: Mapping[str, Policy], samples: Sequence[dict[str, Tensor]], made: Made, fused: bool
    ) -> None:
        self.model, self.policies, self.samples, self.made, self.fused = model, policies, samples, made, fused
        self.smooths: dict[str, Tensor] = {}

    def linear(self, name: str) -> Any:
        """The linear itself."""
        module = self.model.get_submodule(name)
        return module.linear if isinstance(module, Smoothed) else module

    def chosen(self, of: str) -> list[str]:
        """Linears with that suppression or recovery."""
        return [name for name, policy in self.policies.items() if of in {policy.outliers_suppression, policy.precision_recovery}]

    def columns(self, name: str) -> Tensor:
        """The largest magnitude of each column of a linear's weight, and of those that are one with it: [in]."""
        names = [one for one in siblings(name) if one in self.policies] if self.fused else [name]
        return torch.stack([self.linear(one).weight.detach().abs().amax(0) for one in names]).amax(0)

    def run(self, *seen: Mapping[str, Any], recorder: Any = None) -> None:
        """Run the layer on every sample; what is in ``seen`` by a linear's name is given that linear's inputs, by ``add``."""
        more = {} if recorder is None else {"past_key_values": recorder, "use_cache": True}

        def see(name: str, values: Tensor) -> None:
            for some in seen:
                if name in some:
                    some[name].add(values)

        with watching({name: self.linear(name) for some in seen for name in some}, see):
            for index, sample in enumerate(self.samples):
                self.made(index, forward(self.model, {**sample, **more}))

    def put(self, name: str, smooth: Tensor, factor: Tensor) -> None:
        """Multiply a linear's weight by ``smooth`` [in], and its inputs by ``factor``."""
        linear = self.linear(name)
        linear.weight.copy_((linear.weight * smooth).to(linear.weight.dtype))
        if not bool(torch.isfinite(linear.weight).all()):
            raise UnreadableError(f"{name}: smoothing takes its weight out of {linear.weight.dtype}'s range; leave it out of smoothing")
        self.smooths[name] = smooth
        set_module(self.model, name, Smoothed(linear, factor))

    # -- SmoothQuant of 0.6.0

    def smooth_quant(self) -> MadeLayer:
        """Everything in float32, from one run of the float layer."""
        seen = {name: Extremes() for name in self.policies}
        self.run(seen)
        found = MadeLayer()
        for name, policy in self.policies.items():
            linear = self.linear(name)
            low, high = (ends.float() for ends in seen[name].checked(name))
            weight, columns = linear.weight.detach(), self.columns(name).float()
            smooth = smoothing_scale(torch.maximum(low.abs(), high.abs()), columns, policy.argument("alpha"))
            rounded, smoothed = arithmetic.round_smooth_quant(weight, smooth)
            scale, zero = arithmetic.smooth_quant_range(low, high, smooth)
            found.linears[name] = _made(policy, linear, smoothed, rounded, smooth, scale, zero)
        return found

    # -- PTQ

    def smooth(self) -> None:
        """Smooth what is to be, each linear by itself."""
        seen = {name: Extremes() for name in self.chosen("smooth")}
        if not seen:
            return
        self.run(seen)
        scales: dict[str, Tensor] = {}
        for name, one in seen.items():
            low, high = one.checked(name)
            columns = self.columns(name)
            largest = torch.maximum(low.abs(), high.abs()).to(columns.dtype)
            scales[name] = smoothing_scale(largest, columns, self.policies[name].argument("alpha"))
        for name, scale in scales.items():
            self.put(name, scale, stored_smoothing(scale))

    def search(self) -> None:
        """AWQ's scales, one linear after the other."""
        names = self.chosen("awq")
        if not names:
            return
        means = {name: _Mean() for name in names}
        self.run(means)
        for name in names:
            policy = self.policies[name]
            alphas = policy.argument("smooth_alpha")
            scale = best_scale(
                self.linear(name), policy, means[name].value(name), numbers(alphas, "smooth_alpha"), self._outputs, isinstance(alphas, list)
            )
            self.put(name, scale, stored_smoothing(scale))

    def _outputs(self) -> list[Tensor]:
        return [forward(self.model, sample).logits.detach() for sample in self.samples]

    def clip(self) -> None:
        """Clip the weights that AWQ scaled."""
        names = [name for name in self.chosen("awq") if name.rpartition(".")[2] not in SKIPPED_BY_CLIPS]
        if not names:
            return
        tokens = sum(math.prod(sample["inputs_embeds"].shape[:-1]) for sample in self.samples)
        seen = {name: Sampled(tokens) for name in names}
        self.run(seen)
        for name, one in seen.items():
            policy, weight = self.policies[name], self.linear(name).weight
            ratios = policy.argument("weight_clip_ratio")
            limits = clip_limits(weight.detach(), one.rows(), policy, numbers(ratios, "weight_clip_ratio"), isinstance(ratios, list))
            weight.copy_(clipped(weight.detach(), limits))

    def round(self, cache: bool) -> MadeLayer:
        """Round every linear, by what the layer's last run in float was."""
        ranges = {name: Extremes() for name, policy in self.policies.items() if policy.is_static}
        hessians = {name: MeanHessian(self.linear(name).in_features) for name in self.chosen("gptq")}
        recorder = _recorder() if cache else None
        self.run(ranges, hessians, recorder=recorder)
        found = MadeLayer(cache={} if recorder is None else recorder.found())
        for name, policy in self.policies.items():
            linear = self.linear(name)
            weight = linear.weight.detach()
            if name in hessians:
                rounded = round_gptq(name, weight, hessians.pop(name), policy)
            else:
                rounded = round_weight(weight, policy.w_bit, policy.w_sym, policy.group_size)
            scale = zero = None
            if name in ranges:
                low, high = ranges[name].checked(name)
                scale, zero = parameters(low.min().reshape(1), high.max().reshape(1), 8, False)
            found.linears[name] = _made(policy, linear, weight, rounded, self.smooths.get(name), scale, zero)
        if self.chosen("gptq"):
            for name in found.linears:
                self.linear(name).weight.copy_(fake(found.linears[name].rounded, found.linears[name].dtype))
            self.run()
        return found


def _made(
    policy: Policy, linear: Any, weight: Tensor, rounded: RoundedWeight, smooth: Tensor | None, scale: Tensor | None, zero: Tensor | None
) -> MadeLinear:
    norm = torch.linalg.vector_norm(weight.float())
    error = torch.linalg.vector_norm(fake(rounded, weight.dtype).float() - weight.float()) / norm if norm > 0 else norm
    bias = None if linear.bias is None else linear.bias.detach().cpu().clone()
    there = RoundedWeight(rounded.codes.cpu(), rounded.scale.cpu(), rounded.zero.cpu())

    def on_cpu(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().cpu()

    return MadeLinear(policy, there, weight.dtype, bias, on_cpu(smooth), on_cpu(scale), on_cpu(zero), float(error))


class _Mean:
    """The mean magnitude of each channel's inputs [in]."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count, self.dtype = 0, torch.float32

    def add(self, values: Tensor) -> None:
        rows = values.detach().reshape(-1, values.shape[-1])
        total = rows.abs().double().sum(0)
        self.total = total if self.total is None else self.total + total
        self.count, self.dtype = self.count + rows.shape[0], values.dtype

    def value(self, name: str) -> Tensor:
        """In the inputs' dtype."""
        if self.total is None:
            raise UnreadableError(f"{name}: {UNREACHED}, and AWQ needs its inputs; {MORE_SAMPLES}")
        return (self.total / self.count).to(self.dtype)


def _recorder() -> Any:
    """A KV cache that keeps nothing but the extremes of what it is given, after the rotary embedding."""
    from transformers import DynamicCache

    class Recorder(DynamicCache):
        def __init__(self) -> None:
            super().__init__()
            self.seen = {"key": Extremes(), "value": Extremes()}

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            for name, states in (("key", key_states), ("value", value_states)):  # [batch, kv heads, tokens, head size]
                self.seen[name].add(states.transpose(1, 2).flatten(-2))
            return key_states, value_states

        def found(self) -> dict[str, tuple[Tensor, Tensor]]:
            if self.seen["key"].low is None:
                raise UsageError("kv_bit: this model's attention does not use the KV cache that transformers gives it")
            return {name: (one.checked(f"the KV cache's {name}s")) for name, one in self.seen.items()}

    return Recorder()
