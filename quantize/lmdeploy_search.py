"""LMDeploy's ``lite auto_awq --search-scale``: by which exponent the scales of ``lmdeploy_awq`` come of inputs rather than of weights.

Facts, read off LMDeploy 0.4.2 to 0.18.0 (``lite/quantization/calibration.py``; what decides a ratio has not changed in between) and tested
against what 0.18.0 found:

1. The exponent ``r`` of ``s = a^r / w^(1-r)`` is searched among 0, 1/20 .. 19/20, for every subgraph and for every sample by itself. A
   subgraph's ratio is the running mean over the samples, so it need not be one of the twenty.
2. ``a`` [in] is the mean of ``|input|`` over the tokens, in the model's dtype: of the one sample where ratios are searched, and the running
   mean of the samples' means, rounded to float16 after each (of a float16 model, else float32), where the layer is then smoothed.
3. Kept is the first ratio of the least mean square error of a module's output: of the attention or the MLP that holds a norm's targets, of
   the target itself where the source is a linear. Its weights are ``fake(W s) / s``, and outputs are subtracted in the model's dtype.
4. All of this is the float model: neither the layers before nor the other subgraphs of the layer are rounded or smoothed.
5. On a CPU the tool's copy of the weights is the weights themselves, so they stay multiplied by the first ratio's scale, sample after
   sample, and no source is divided by it. Here every ratio is tried on the model's own weights, as on a GPU.
6. ``fake`` is what will be stored: groups of one sign reach to 0 (``round_lmdeploy``), and a linear that stays in float is not rounded.

A search rounds every linear of a layer, and runs its attention and MLP, twenty times for every sample. AutoAWQ's (``awq``) rounds
twenty times for all samples together, on inputs that the quantized layers before made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from formats.errors import UnreadableError

from .architectures import Subgraph
from .lmdeploy_awq import relative_magnitude, round_lmdeploy, smoothing_scale
from .methods import LmdeployAwq
from .stage import MORE_SAMPLES, UNREACHED, Made, Progress, forward, watching

__all__ = ["SearchedRatio", "search_ratios"]

GRID = 20


@dataclass
class SearchedRatio:
    """What is known of a subgraph after ``count`` samples: its ratio, and the mean magnitude [in] of its inputs."""

    count: int = 0
    ratio: float = 0.0
    magnitude: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float16))

    def add(self, ratio: float, magnitude: Tensor) -> None:
        """One sample more."""
        self.ratio = (self.ratio * self.count + ratio) / (self.count + 1)
        self.magnitude = (self.magnitude * self.count + magnitude.cpu()) / (self.count + 1)
        self.count += 1


@dataclass(frozen=True)
class _Call:
    """One call of a module, and what it gave."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    def error(self) -> float:
        """The mean square error of the output with the weights that the module has now."""
        return float((self.output - _tensor_of(self.module(*self.args, **self.kwargs))).float().square().mean())


def search_ratios(
    model: nn.Module,
    subgraphs: Sequence[Subgraph],
    samples: Sequence[Any],
    rounded: Collection[str],
    settings: LmdeployAwq,
    group_size: int,
    made: Made | None = None,
    progress: Progress | None = None,
) -> dict[str, SearchedRatio]:
    """The ratio of each of ``subgraphs`` (``smoothed_subgraphs``) of a layer, by the subgraph's first target. Weights stay as they are.

    rounded   the linears that will be quantized; made: is given what the model makes of each sample

    :raises UnreadableError: a subgraph that no sample reaches, or whose output is not finite, whatever the ratio
    """
    found = {subgraph.targets[0]: SearchedRatio() for subgraph in subgraphs}
    weights = {
        subgraph.targets[0]: relative_magnitude([_linear(model, name).weight for name in subgraph.targets], group_size, settings)
        for subgraph in subgraphs
    }
    for index, sample in enumerate(samples):
        with _recording(model, subgraphs) as (calls, inputs):
            output = forward(model, sample)
        if made is not None:
            made(index, output)
        for subgraph in subgraphs:
            first = subgraph.targets[0]
            if first not in inputs:
                continue
            targets = {name: _linear(model, name) for name in subgraph.targets}
            fakes = [partial(_fake, settings, group_size) if name in rounded else _float for name in targets]
            scale_of = partial(_scale, inputs[first], weights[first], settings)
            found[first].add(_best_ratio(first, list(targets.values()), fakes, scale_of, calls[_block_of(subgraph)]), inputs[first])
        if progress is not None:
            progress("samples", index + 1, len(samples))
    for name, one in found.items():
        if not one.count:
            raise UnreadableError(f"{name}: {UNREACHED}, and the search needs its inputs; {MORE_SAMPLES}")
    return found


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear: Any = model.get_submodule(name)
    return linear


def _block_of(subgraph: Subgraph) -> str:
    """The module whose output counts (rule 3)."""
    return subgraph.targets[0].rpartition(".")[0] if subgraph.kind == "norm" else subgraph.targets[0]


@contextmanager
def _recording(model: nn.Module, subgraphs: Sequence[Subgraph]) -> Iterator[tuple[Mapping[str, _Call], Mapping[str, Tensor]]]:
    """While this lasts: the calls of the modules that count, and the mean magnitudes [in] of the targets' inputs, by first target."""
    calls: dict[str, _Call] = {}
    inputs: dict[str, Tensor] = {}

    def called(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[name] = _Call(module, args, kwargs, _tensor_of(output))

    def see(name: str, values: Tensor) -> None:
        inputs[name] = values.detach().flatten(0, -2).abs().mean(0)

    with ExitStack() as stack:
        for name in map(_block_of, subgraphs):
            stack.enter_context(model.get_submodule(name).register_forward_hook(partial(called, name), with_kwargs=True))
        stack.enter_context(watching({name: _linear(model, name) for name in (one.targets[0] for one in subgraphs)}, see))
        yield calls, inputs


def _tensor_of(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _scale(inputs: Tensor, weights: Tensor, settings: LmdeployAwq, ratio: float) -> Tensor:
    """``s`` [in] of one ratio: normalized in the model's dtype whatever the source is."""
    return smoothing_scale(inputs, weights, settings, True, ratio)


def _fake(settings: LmdeployAwq, group_size: int, weight: Tensor) -> Tensor:
    return round_lmdeploy(weight, group_size, settings)[0].fake


def _float(weight: Tensor) -> Tensor:
    return weight


def _best_ratio(
    name: str, targets: Sequence[nn.Linear], fakes: Sequence[Callable[[Tensor], Tensor]], scale_of: Callable[[float], Tensor], call: _Call
) -> float:
    """The first ratio with which the ``targets``' rounding changes the call's output least."""
    weights = [target.weight.data for target in targets]
    best, least = None, math.inf
    try:
        for ratio in (step / GRID for step in range(GRID)):
            scale = scale_of(ratio)
            for target, weight, fake in zip(targets, weights, fakes, strict=True):
                target.weight.data = fake(weight * scale) / scale
            if (error := call.error()) < least:
                best, least = ratio, error
    finally:
        for target, weight in zip(targets, weights, strict=True):
            target.weight.data = weight
    if best is None:
        raise UnreadableError(
            f"{name}: the output that it is part of is not finite in {weights[0].dtype}, rounded by whatever ratio; check the calibration "
            "data, or run the model in a wider dtype"
        )
    return best
