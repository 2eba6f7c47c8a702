"""Which linears of a model are quantized, and by which config: the names that stay float, ``mix_cfg``'s patterns, ``disable_level``.

Shells will do: no weight is read. What msModelSlim has and this package does not is refused here, by name.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from torch import nn

from formats.errors import UsageError

from .config import QuantConfig
from .layers import check_groups

__all__ = ["check_supported", "chosen_linears", "config_of", "linears_of", "named_float", "wild_names"]

logger = logging.getLogger(__name__)


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def chosen_linears(model: nn.Module, config: QuantConfig, mix_cfg: Mapping[str, str]) -> dict[str, QuantConfig]:
    """The linears of a model that will be quantized, unless ``disable_level`` chooses them; with their configs.

    :raises UsageError: as ``check_supported`` and ``named_float`` do; groups that do not divide a layer's inputs
    """
    check_supported(config)
    left = named_float(model, config)
    linears = linears_of(model)
    chosen = {name: found for name in linears if name not in left and (found := config_of(name, config, mix_cfg)) is not None}
    for name, found in chosen.items():
        check_groups(name, linears[name].in_features, found)
    return chosen


def config_of(name: str, config: QuantConfig, mix_cfg: Mapping[str, str]) -> QuantConfig | None:
    """The config of linear ``name``; None for a float one."""
    found = config.of_linear(name, mix_cfg)
    return None if found.model_quant_type == "FLOAT" else found


def named_float(model: nn.Module, config: QuantConfig) -> set[str]:
    """``disable_names``, and the last linear if the config says so.

    :raises UsageError: a name that is no linear (with ``fa_quant`` nor attention), a model without linears
    """
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if not linears:
        raise UsageError("model: it has no nn.Linear to quantize")
    for name in config.disable_names or []:
        attention = config.use_fa_quant and type(modules.get(name)).__name__.endswith("Attention")
        if name not in modules or not (isinstance(modules[name], (nn.Linear, nn.Conv2d)) or attention):
            raise UsageError(f"disable_names: {name!r} is no linear of this model; its first is {linears[0]!r}")
    return {*(config.disable_names or ()), *(linears[-1:] if config.disable_last_linear else ())}


def wild_names(range_parm: Mapping[str, float], disabled: Collection[str], level: int) -> set[str]:
    """The ``level`` linears of largest range_parm that are not float already."""
    ranked = sorted(range_parm, key=range_parm.__getitem__, reverse=True)
    wild = [name for name in ranked if name not in disabled][:level]
    if level:
        logger.info("Automatically disabled layer names are: %s", ", ".join(sorted(wild)))
    return set(wild)


def check_supported(config: QuantConfig) -> None:
    """Refuse what msModelSlim has and this package does not, or not yet."""
    missing = {
        "w_method='NF' (its files cannot be dequantized)": config.w_method == "NF",
        "W4A4 (FlatQuant trains)": config.model_quant_type == "W4A4_FLATQUANT_DYNAMIC",
        "timestep_quant": config.use_timestep_quant,
        "simulate_tp": config.tp_size is not None,
        "fa_amp": config.fa_amp > 0,
        "nonuniform": config.nonuniform,
        "do_smooth": config.do_smooth,
    }
    if asked := [name for name, wanted in missing.items() if wanted]:
        raise UsageError(f"cfg: {asked[0]} is not supported")
