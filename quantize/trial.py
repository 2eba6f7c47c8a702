"""What a recipe would make of a model, without its weights: enough to ask the target format before hours of work."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from formats.checkpoint import Checkpoint
from formats.errors import UsageError

from .config import QuantConfig
from .layers import STATIC_TYPES, QuantizedLayer, check_groups, quantize_linear, with_inputs
from .saving import checkpoint_of

__all__ = ["chosen_linears", "trial"]


def chosen_linears(linears: Mapping[str, nn.Linear], config: QuantConfig, mix_cfg: Mapping[str, str]) -> dict[str, QuantConfig]:
    """The linears of a model that will be quantized, unless ``disable_level`` chooses them; with their configs.

    :raises UsageError: a name in ``disable_names`` that is no linear, groups that do not divide a layer's inputs
    """
    for name in config.disable_names or []:
        if name not in linears and not config.use_fa_quant:
            raise UsageError(f"disable_names: {name!r} is no linear of this model; its first is {next(iter(linears), 'none')!r}")
    left = {*(config.disable_names or ()), *(list(linears)[-1:] if config.disable_last_linear else ())}
    chosen = {
        name: found for name in linears if name not in left and (found := config.of_linear(name, mix_cfg)).model_quant_type != "FLOAT"
    }
    for name, found in chosen.items():
        check_groups(name, linears[name].in_features, found)
    return chosen


def trial(
    config: Any, dtype: torch.dtype, linears: Mapping[str, nn.Linear], chosen: Mapping[str, QuantConfig], main: QuantConfig
) -> Checkpoint:
    """One linear of each shape and kind, quantized, in memory. config: the model's."""
    kinds: dict[tuple[object, ...], str] = {}
    for name, found in chosen.items():
        kinds.setdefault((found.model_quant_type, *linears[name].weight.shape), name)
    layers = {name: _stand_in(name, linears[name], chosen[name], dtype) for name in kinds.values()}
    state = {f"{name}.weight": linears[name].weight for name in layers}
    cache = {}
    if main.use_kvcache_quant and layers:
        name = next(iter(layers))
        cache = {f"{name}.kv_cache_{part}": torch.zeros(1, dtype=dtype) for part in ("scale", "offset")}
    made: Any = SimpleNamespace(
        model=SimpleNamespace(state_dict=lambda: state, config=config),
        layers=layers,
        cfg=main,
        kv_cache=cache,
        attention={},
        torch_dtype=dtype,
    )
    return checkpoint_of(made)


def _stand_in(name: str, linear: nn.Linear, config: QuantConfig, dtype: torch.dtype) -> QuantizedLayer:
    """One row, quantized, in the place of all rows of ``linear``."""
    row = nn.Linear(linear.in_features, 1, linear.bias is not None, dtype=dtype)
    with torch.no_grad():
        row.weight.fill_(1)
        layer, _ = quantize_linear(name, row, config)
        if layer.kind in STATIC_TYPES:
            one = layer.weight_scale.new_ones(1)
            layer = with_inputs(layer, one, one - 1)
    per_tensor = layer.weight_scale.ndim < 2
    for field, value in vars(layer).items():
        whole = field in {"weight_scale", "weight_offset"} and per_tensor
        if isinstance(value, Tensor) and field not in {"input_scale", "input_offset"} and not whole:
            object.__setattr__(layer, field, value.expand(linear.out_features, *value.shape[1:]))
    return layer
