"""What a recipe would make of a model, without its weights: enough to ask the target format before hours of work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from formats.checkpoint import Checkpoint

from .compensated import scale_dtype_of
from .config import QuantConfig
from .layers import STATIC_TYPES, QuantizedLayer, quantize_linear, with_inputs
from .layerwise import Job
from .saving import checkpoint_of

__all__ = ["trial"]


def trial(model: nn.Module, dtype: torch.dtype, chosen: Mapping[str, QuantConfig], job: Job) -> Checkpoint:
    """One linear of each shape and kind of ``chosen``, quantized, in memory. model: a shell will do."""
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in chosen}
    kinds: dict[tuple[object, ...], str] = {}
    for name, found in chosen.items():
        kinds.setdefault((found.model_quant_type, *linears[name].weight.shape), name)
    layers = {name: _stand_in(name, linears[name], chosen[name], dtype, job) for name in kinds.values()}
    state = {f"{name}.weight": linears[name].weight for name in layers}
    cache = {}
    if job.config.use_kvcache_quant and layers:
        name = next(iter(layers))
        cache = {f"{name}.kv_cache_{part}": torch.zeros(1, dtype=dtype) for part in ("scale", "offset")}
    made: Any = SimpleNamespace(
        model=SimpleNamespace(state_dict=lambda: state, config=getattr(model, "config", None)),
        layers=layers,
        cfg=job.config,
        kv_cache=cache,
        attention={},
        torch_dtype=dtype,
    )
    return checkpoint_of(made)


def _stand_in(name: str, linear: nn.Linear, config: QuantConfig, dtype: torch.dtype, job: Job) -> QuantizedLayer:
    """One row, quantized, in the place of all rows of ``linear``."""
    row = nn.Linear(linear.in_features, 1, linear.bias is not None, dtype=dtype)
    with torch.no_grad():
        row.weight.fill_(1)
        layer, _ = quantize_linear(name, row, config)
        if layer.kind in STATIC_TYPES:
            one = layer.weight_scale.new_ones(1)
            layer = with_inputs(layer, one, one - 1)
    by_row = ["codes", "bias", "weight_scale_second", "weight_offset_second", "deq_scale", "quant_bias"]
    if layer.weight_scale.ndim > 1:  # else it is one for the whole tensor
        by_row += ["weight_scale", "weight_offset"]
    rows = {part: values for part in by_row if (values := getattr(layer, part)) is not None}
    layer = replace(layer, **{part: values.expand(linear.out_features, *values.shape[1:]) for part, values in rows.items()})
    if (lmdeploy := job.lmdeploy_awq) is not None and not lmdeploy.is_old:
        return _stored_in(dtype, layer)
    return _searched(layer, row, job) if job.is_searched else layer


def _stored_in(dtype: torch.dtype, layer: QuantizedLayer) -> QuantizedLayer:
    return replace(layer, weight_scale=layer.weight_scale.to(dtype), weight_offset=layer.weight_offset.to(dtype))


def _searched(layer: QuantizedLayer, row: nn.Linear, job: Job) -> QuantizedLayer:
    """``layer`` as GPTQ and AWQ leave it: scales in half precision, and the groups of inputs that act order sorted."""
    layer = _stored_in(scale_dtype_of(row.weight), layer)
    sorts = job.gptq is not None and job.gptq.act_order and not job.gptq.static_groups
    if not sorts or layer.group_size == -1:
        return layer
    return replace(layer, g_idx=(torch.arange(row.in_features) // layer.group_size).to(torch.int32))
