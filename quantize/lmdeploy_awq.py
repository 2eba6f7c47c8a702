"""LMDeploy's ``lite auto_awq``: weights in 4 bits, smoothed by one formula, in the two arithmetics that it has had.

Facts, read off LMDeploy 0.1.0 and 0.18.0 (PyPI, ``lite/quantization/awq.py`` and ``weight/quantizer.py``) and tested against their folders:

1. In every decoder layer the norms are smoothed first, then the value projection into the output projection and the up into the down
   projection. All use the inputs' largest magnitudes ``a`` [in] of the float model, before anything is smoothed.
2. ``s = a^r / w^(1-r)``, then ``s / sqrt(max(s) min(s))``; ``w`` [in] is the mean over all rows of the linears that read the input, stacked
   by name, of ``|W|`` over its group's largest. The source is divided by ``s``, the targets' columns multiplied. All in the weights' dtype.
   ``r`` is 0.5, or what ``--search-scale`` found (``lmdeploy_search``), which takes mean magnitudes for ``a``. ``--calib-samples 0``,
   since 0.14, leaves smoothing out.
3. Grouped heads: the value projection is left alone where it is narrower than what the output projection reads. So are fused sources.
4. Numbers of a group of ``W``, whose extremes are ``least`` and ``most``:

   =======  =======================================  ==========================================================================
            0.1 (until 0.4.1), in float32            0.4.2 (and today), in the weight's dtype
   =======  =======================================  ==========================================================================
   scale    ``(most - least) / 15``                  ``max(most - least, 1e-5) / 15``
   zero     ``away(-least / scale)``                 ``clamp(-round(least / scale), 0, 15)``
   codes    ``away((W - least) / scale)``            ``clamp(round(W / scale) + zero, 0, 15)``
   s        as it is                                 ``w^(1-r)`` at least 1e-4 where one is 0, ``s`` at least 1e-4; 1 where a norm is 0
   =======  =======================================  ==========================================================================

   ``round`` is to even, ``away`` halves away from zero. From linear to linear ``s`` is divided in float32, as by
   the tool since 0.13. 0.1 stores the float32 scales as they are, and its engine rounds them to float16. Here they are float32 until a
   format stores them: ``--to awq`` in float16, which all loaders take, with ``--scale-dtype float32`` as 0.1.
5. Repaired: in a group of one sign the zero point lies outside of 0 to 15. 0.1 wrote it so, over its neighbours' bits, and a constant group
   has a scale of 0; 0.4.2 clamps it, and the weights with it. Here such a group's range reaches to 0, and it is counted (``repaired``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from formats.errors import UnreadableError, UsageError

from .architectures import Architecture, Subgraph
from .config import QuantConfig
from .layers import QuantizedLayer, rounded_layer
from .methods import LmdeployAwq
from .rounding import RoundedWeight
from .stage import MORE_SAMPLES, UNREACHED, Made, forward, watching

__all__ = [
    "largest_inputs", "lmdeploy_rounded", "relative_magnitude", "round_lmdeploy", "smooth_layer", "smoothed_subgraphs", "smoothing_scale",
]  # fmt: skip

ALPHA = 0.5
LEVELS = 15
HALF = 8
LEAST = 1e-4
LEAST_RANGE = 1e-5


def largest_inputs(model: nn.Module, names: Sequence[str], samples: Sequence[Any], made: Made | None = None) -> dict[str, Tensor]:
    """The largest magnitude [in] of every channel of the inputs of the linears called ``names``, over all samples."""
    found: dict[str, Tensor] = {}

    def see(name: str, values: Tensor) -> None:
        largest = values.detach().reshape(-1, values.shape[-1]).abs().amax(0)
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    with watching({name: model.get_submodule(name) for name in names}, see):
        for index, sample in enumerate(samples):
            output = forward(model, sample)
            if made is not None:
                made(index, output)
    return found


def smoothed_subgraphs(model: nn.Module, architecture: Architecture, layer: str) -> list[Subgraph]:
    """What is smoothed of the decoder layer called ``layer``, in the order of rule 1, each with its targets in that of rule 2."""
    there = dict(model.named_modules())
    placed = [subgraph.placed(layer) for subgraph in architecture.subgraphs if subgraph.rows == "all"]
    found = [replace(subgraph, targets=tuple(sorted(subgraph.targets))) for subgraph in placed if _is_smoothed(there, subgraph)]
    return sorted(found, key=lambda subgraph: subgraph.kind != "norm")


def _is_smoothed(there: Mapping[str, Any], subgraph: Subgraph) -> bool:
    """Whether all its modules are ``there``, and each row of the source feeds one column (rule 3)."""
    if not {subgraph.source, *subgraph.targets} <= there.keys():
        return False
    return bool(subgraph.kind == "norm" or there[subgraph.source].weight.shape[0] == there[subgraph.targets[0]].weight.shape[1])


def smooth_layer(
    model: nn.Module,
    architecture: Architecture,
    layer: str,
    inputs: Mapping[str, Tensor],
    settings: LmdeployAwq,
    group_size: int,
    ratios: Mapping[str, float] | None = None,
) -> tuple[str, ...]:
    """Smooth the decoder layer called ``layer`` in place; the sources that were smoothed.

    inputs   ``a`` [in] of every subgraph, by its first target; ratios: ``r`` likewise, None: 0.5

    :raises UnreadableError: no inputs of a target, or a scale that no number is
    """
    subgraphs = smoothed_subgraphs(model, architecture, layer)
    for subgraph in subgraphs:
        first = subgraph.targets[0]
        if first not in inputs:
            raise UnreadableError(f"{first}: {UNREACHED}, and smoothing needs its inputs; {MORE_SAMPLES}")
        _smooth(model, subgraph, inputs[first], settings, group_size, ALPHA if ratios is None else ratios[first])
    return tuple(subgraph.source for subgraph in subgraphs)


def _smooth(model: nn.Module, subgraph: Subgraph, activation: Tensor, settings: LmdeployAwq, group_size: int, ratio: float) -> None:
    """Smooth one subgraph."""
    source: Any = model.get_submodule(subgraph.source)
    targets: list[Any] = [model.get_submodule(name) for name in subgraph.targets]
    is_norm = subgraph.kind == "norm"
    off = source.weight == 0 if is_norm and not settings.is_old else None
    magnitude = relative_magnitude([target.weight for target in targets], group_size, settings)
    scale = smoothing_scale(activation, magnitude, settings, is_norm, ratio, off)
    if not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
        why = (
            "as where an input was 0 in all of calibration, or a group of weights is; LMDeploy until 0.4.1 cannot smooth it: "
            "use lmdeploy-awq"
            if settings.is_old
            else f"as where inputs or their mean are beyond {magnitude.dtype}, in which LMDeploy computes; run the model in a wider dtype"
        )
        bad = int((~((scale > 0) & torch.isfinite(scale))).sum())
        raise UnreadableError(f"{subgraph.source}: {bad} of {scale.numel()} smoothing scales are 0 or no numbers, {why}")
    source.weight.div_(scale.view(-1, *([1] * (source.weight.dim() - 1))))
    if getattr(source, "bias", None) is not None:
        source.bias.div_(scale)
    for target in targets:
        target.weight.mul_(scale.view(1, -1))


def relative_magnitude(weights: Sequence[Tensor], group_size: int, settings: LmdeployAwq) -> Tensor:
    """``w`` [in] of stacked ``weights`` [out, in] (rule 2), in their dtype."""
    stacked = torch.cat(list(weights))
    width = stacked.shape[1] if group_size == -1 else group_size
    if stacked.shape[1] % width:
        raise UsageError(f"{stacked.shape[1]} inputs are not whole groups of {width}; choose another group_size")
    magnitude = stacked.reshape(-1, width).abs()
    top = magnitude.amax(1, keepdim=True)
    if not settings.is_old and float(top.min()) == 0:
        top = top.clamp(min=LEAST)
    return (magnitude / top).view(stacked.shape).mean(0)


def smoothing_scale(
    activation: Tensor, magnitude: Tensor, settings: LmdeployAwq, norm: bool, ratio: float = ALPHA, off: Tensor | None = None
) -> Tensor:
    """``s`` [in] for inputs of magnitudes ``activation`` [in] and weights of ``relative_magnitude`` [in], in the latter's dtype.

    norm    the source is a norm; off: channels whose norm is 0, which keep their scale
    """
    dtype, spread = magnitude.dtype, magnitude.pow(1 - ratio)
    activation = activation.to(magnitude.device, dtype)
    if settings.is_old:
        scale = (activation.pow(ratio) / spread).to(dtype)
        return scale / (scale.max() * scale.min()).sqrt()
    if float(spread.min()) == 0:
        spread = spread.clamp(min=LEAST)
    scale = (activation.pow(ratio) / spread).clamp(min=LEAST).to(dtype)
    if not norm:
        return (scale.float() / (scale.max().float() * scale.min().float()).sqrt()).to(dtype)
    on = scale if off is None else scale[~off]
    scale = scale / (on.max() * on.min()).sqrt() if on.numel() else scale
    return scale if off is None else torch.where(off, torch.ones_like(scale), scale)


def round_lmdeploy(weight: Tensor, group_size: int, settings: LmdeployAwq) -> tuple[RoundedWeight, int]:
    """``weight`` [out, in], smoothed, in 4 bits with zero points, and how many groups were repaired (rule 5).

    codes [out, in] int8, -8 to 7; scale and offset [out, groups], float32 (0.1) or the weight's dtype; offsets are zero points less 8
    """
    width = weight.shape[1] if group_size == -1 else group_size
    groups = weight.detach().reshape(weight.shape[0], -1, width)
    groups = groups.float() if settings.is_old else groups
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    broken = (least > 0) | (most < 0)
    if settings.is_old:
        broken |= most == least
        scale = (most - least) / LEVELS
        zero = _away(-least / scale)
        codes = _away((groups - least) / scale)
    else:
        scale = (most - least).clamp(min=LEAST_RANGE) / LEVELS
        zero = (-torch.round(least / scale)).clamp(0, LEVELS)
        codes = (torch.round(groups / scale) + zero).clamp(0, LEVELS)
    if bool(broken.any()):
        low, high = least.clamp(max=0), most.clamp(min=0)
        mended = (high - low).clamp(min=LEAST_RANGE) / LEVELS
        middle = torch.round(-low / mended).clamp(0, LEVELS)
        scale, zero = torch.where(broken, mended, scale), torch.where(broken, middle, zero)
        codes = torch.where(broken, (torch.round(groups / mended) + middle).clamp(0, LEVELS), codes)
    fake = ((codes - zero) * scale).reshape(weight.shape).to(weight.dtype)
    rounded = RoundedWeight((codes - HALF).reshape(weight.shape).to(torch.int8), scale.squeeze(-1), (zero - HALF).squeeze(-1), fake)
    return rounded, int(broken.sum())


def _away(values: Tensor) -> Tensor:
    """Rounded, halves away from zero."""
    return values.sign() * (values.abs() + 0.5).floor()


def lmdeploy_rounded(
    linears: Mapping[str, nn.Linear], configs: Mapping[str, QuantConfig], settings: LmdeployAwq
) -> Iterator[tuple[QuantizedLayer, Tensor]]:
    """Every linear of ``configs``, with its dequantized weight [out, in]."""
    for name, config in configs.items():
        weight = linears[name].weight.detach()
        rounded, repaired = round_lmdeploy(weight, config.group_size if config.is_per_group else -1, settings)
        if not bool(torch.isfinite(rounded.scale).all()):
            raise UnreadableError(f"{name}: its smoothed weight is no longer finite in {weight.dtype}; LMDeploy computes in float16")
        layer, fake = rounded_layer(name, linears[name], config, weight, rounded)
        yield replace(layer, repaired=repaired), fake
