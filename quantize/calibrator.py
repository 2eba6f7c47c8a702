"""``Calibrator``: quantize the linears of a model in place, with calibration data where activations need it.

The order of things is msModelSlim's, because numbers depend on it:

1. The float model runs on the first five samples: ``range_parm`` of every linear's input.
2. Linears that stay float: ``disable_names``, the last linear, and the ``disable_level`` linears of largest range_parm. With
   ``is_lowbit`` those are found after the first calibration sample instead, by the largest magnitude of their inputs.
3. With ``kv_quant``, the float model runs on all samples.
4. Every other linear is replaced: its weight is rounded, its input observed.
5. The model runs on all samples, **with rounded weights and activations**, so a layer's scales come from what the layers before it
   make after quantization.

After ``run()`` the caller's model is the fake-quantized one, and ``layers`` holds what a file needs.

Where this differs from the tool, on purpose: linears that ``is_lowbit`` with ``disable_level`` makes float are float in the model and
in files; the tool goes on rounding them (W4A8) or their inputs (per group), and leaves their weights out of its files. Attention
(FA3) is observed in any model of transformers; a KV cache is rounded by channel, not in the order in which its elements lie.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from formats.errors import UsageError

from .attention import AttentionObserver
from .blocks import Blocks
from .calibration import key_of
from .choice import check_supported, config_of, linears_of, named_float, wild_names
from .config import MIX_TYPES, QuantConfig
from .devices import resolve
from .layers import STATIC_TYPES, QuantizedLayer, check_linear
from .stage import Progress, Stage, rounded_to_nearest

if TYPE_CHECKING:
    from convert.engine import Result

__all__ = ["Calibrator"]

DATA_FREE_TYPES = ("W8A16", "W4A16", "W8A8_DYNAMIC", "NF4", "W4A8_DYNAMIC")
logger = logging.getLogger(__name__)


class Calibrator:
    """Quantizes ``model`` in place.

    model           a torch module; its linears are found by class
    cfg             how
    calib_data      samples, each a list (model(*sample)) or a dict (model(**sample)); None or empty: data-free
    disable_level   "L" and how many linears stay float because their activations are wild; more than there are means all
    all_tensors     accepted and not used, as in msModelSlim
    mix_cfg         {name or fnmatch pattern: "w8a8" | "w8a16" | "w8a8_dynamic" | "float"}; the first pattern that matches counts

    After ``run()``: ``layers`` {name: QuantizedLayer}; ``float_names``, the linears that stayed float; ``kv_cache`` {tensor name:
    tensor} and ``attention`` (FA3) the same; ``range_parm`` {linear: ratio}; ``torch_dtype``, what the model's config calls its dtype.

    :raises UsageError: arguments that make no sense, or a setting that is not there yet
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: QuantConfig,
        calib_data: list[Any] | None = None,
        disable_level: str = "L0",
        all_tensors: dict[str, Tensor] | None = None,
        mix_cfg: dict[str, str] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"model: {type(model).__name__} is not a torch module")
        if not isinstance(cfg, QuantConfig):
            raise UsageError(f"cfg: {type(cfg).__name__} is not a QuantConfig")
        if not isinstance(disable_level, str) or not re.fullmatch(r"L(0|[1-9]\d*)", disable_level):
            raise UsageError(f"disable_level: {disable_level!r} is not L0, L1, L2 and so on")
        check_supported(cfg)
        self.model, self.cfg = model, cfg
        self.calib_data = _checked_samples([] if calib_data is None else calib_data)
        self.level = int(disable_level[1:])
        self.mix_cfg = _checked_mix(mix_cfg or {})
        self.torch_dtype = _declared_dtype(model)
        self.layers: dict[str, QuantizedLayer] = {}
        self.float_names: list[str] = []
        self.kv_cache: dict[str, Tensor] = {}
        self.attention: dict[str, Tensor] = {}
        self.range_parm: dict[str, float] = {}
        self._linears = linears_of(model)
        self._disabled = named_float(model, cfg)
        if not self.calib_data:
            self._check_data_free()
        for name, linear in self._linears.items():
            if name not in self._disabled and (config := config_of(name, self.cfg, self.mix_cfg)) is not None:
                check_linear(name, linear, config)

    def run(self, int_infer: bool = False, progress: Progress | None = None) -> None:
        """Calibrate, quantize, and leave the fake-quantized model in the caller's.

        int_infer   accepted for scripts' sake; the fake-quantized model always computes in floats
        progress    called as (what, done, of): "layers" after each linear, "samples" after each calibration sample

        :raises UnreadableError: NaN or infinite activations, or a static layer that no sample reached; the error names the layer
        """
        if int_infer:
            logger.warning("int_infer: this fake-quantized model computes in floats; the stored numbers are the same")
        with torch.no_grad():
            self._run(progress or (lambda what, done, of: None))

    def _run(self, progress: Progress) -> None:
        device = resolve(self.cfg.dev_type, self.cfg.dev_id)
        if not getattr(self.model, "hf_device_map", None):
            self.model.to(device)
        self.model.eval()
        if self.cfg.w_method == "GPTQ":
            self._run_by_layer(progress)
            return
        stage = Stage(self.model, self._linears, self.cfg)
        self.layers = stage.layers
        stage.observe_ranges(self.calib_data)
        self.range_parm = stage.range_parm
        floats = self._disabled | (set() if self.cfg.is_lowbit else wild_names(self.range_parm, self._disabled, self.level))
        cache = stage.observe_cache(self.calib_data, self.cfg.kv_sym) if self.cfg.use_kvcache_quant else None
        wanted = (name for name in self._linears if name not in floats)
        configs = {name: config for name in wanted if (config := config_of(name, self.cfg, self.mix_cfg)) is not None}
        level = self.level if self.cfg.is_lowbit else 0
        stage.round(rounded_to_nearest(self._linears, configs), configs, bool(self.calib_data), progress, keep_floats=bool(level))
        attention = AttentionObserver(self.model, self.cfg.disable_names or []) if self.cfg.use_fa_quant else None
        with attention.watching() if attention is not None else nullcontext():
            stage.calibrate(self.calib_data, progress, level)
        stage.finish()
        if attention is not None:
            self.attention = attention.finish()
        if cache is not None:
            self.kv_cache = cache.finish()
        self.float_names = [name for name in self._linears if name not in self.layers]
        logger.info("linears that stay float: %s", ", ".join(self.float_names) or "none")
        self._linears.clear()  # the float weights are no longer needed

    def _run_by_layer(self, progress: Progress) -> None:
        """GPTQ: every decoder layer on what the rounded ones before it make."""
        from .layerwise import Job, LayerRun

        run = LayerRun(Blocks(self.model), Job(self.cfg, self.mix_cfg, None, self.level), _listed(self.calib_data))
        floats = frozenset(run.wildest(progress)) if self.level else frozenset()
        run.begin()
        total = len(run.to_quantize(floats))
        for made in run.layers(floats=floats, progress=progress):
            self.range_parm |= made.range_parm
            self.kv_cache |= made.kv_cache
            self.attention |= made.attention
            for name, layer in made.layers.items():
                self.layers[name] = layer
                progress("layers", len(self.layers), total)
        self.float_names = [name for name in self._linears if name not in self.layers]
        logger.info("linears that stay float: %s", ", ".join(self.float_names) or "none")
        self._linears.clear()

    def save(
        self,
        output_path: str | os.PathLike[str],
        safetensors_name: str | None = None,
        json_name: str | None = None,
        save_type: str | list[str] | None = None,
        part_file_size: int | None = None,
    ) -> list[Result]:
        """Write what ``run()`` found into folder ``output_path``.

        safetensors_name, json_name   of the weight file and of the description; None: msModelSlim's own
        save_type         "numpy" (the default, as in msModelSlim), "safe_tensor", "ascendV1", any format that ``convert`` writes
                          ("awq", "gptq:v2", "compressed-tensors", ...), or a list of them
        part_file_size    GiB of a weight file; None: one file

        :returns: a conversion's result, with its proof, for each save type but "numpy"
        :raises UsageError: no linear was quantized (msModelSlim would write a float model); RefusedError: the format cannot hold it
        """
        if not self.layers:
            raise UsageError("save: no linear is quantized; call run() first, and leave fewer linears float than there are")
        from .saving import save

        return save(self, output_path, safetensors_name, json_name, save_type, part_file_size)

    def _check_data_free(self) -> None:
        kind, method = self.cfg.model_quant_type, self.cfg.w_method
        if kind not in DATA_FREE_TYPES or self.cfg.use_kvcache_quant or self.cfg.use_fa_quant:
            what = ("the KV cache" if self.cfg.use_kvcache_quant else "attention") if kind in DATA_FREE_TYPES else kind
            raise UsageError(f"calib_data: it is empty, and {what} needs samples; without them only {', '.join(DATA_FREE_TYPES)} work")
        if method == "GPTQ":
            raise UsageError("calib_data: it is empty, and GPTQ needs samples")
        for name in self._linears:
            config = None if name in self._disabled else config_of(name, self.cfg, self.mix_cfg)
            if config is not None and config.model_quant_type in STATIC_TYPES:
                raise UsageError(f"{name}: {config.model_quant_type} needs samples, and calib_data is empty")


def _checked_samples(samples: list[Any]) -> list[Any]:
    if not isinstance(samples, list):
        raise UsageError(f"calib_data: {type(samples).__name__} is not a list of samples")
    seen: set[tuple[Any, ...]] = set()
    repeated = 0
    for index, sample in enumerate(samples):
        if not isinstance(sample, (list, tuple, dict)) or not sample:
            raise UsageError(f"calib_data[{index}]: a sample is a list or a dict of the model's inputs, not {sample!r:.80}")
        first = next(iter(sample.values())) if isinstance(sample, dict) else sample[0]
        if isinstance(first, Tensor):
            key = (tuple(first.shape), *key_of(first))
            repeated += key in seen
            seen.add(key)
    if repeated:
        logger.warning("calib_data: %d of %d samples repeat an earlier one, and add nothing", repeated, len(samples))
    return samples


def _listed(samples: list[Any]) -> list[list[Tensor]]:
    """Samples as [input_ids] or [input_ids, attention_mask]."""
    found = []
    for index, sample in enumerate(samples):
        parts = [sample.get("input_ids"), sample.get("attention_mask")] if isinstance(sample, dict) else list(sample[:2])
        if not isinstance(parts[0], Tensor) or parts[0].dim() != 2 or len(parts[0]) != 1:
            raise UsageError(f"calib_data[{index}]: layer by layer a sample is [input_ids, attention_mask], each [1, tokens]")
        found.append([part for part in parts if isinstance(part, Tensor)])
    return found


def _checked_mix(mix_cfg: dict[str, str]) -> dict[str, str]:
    if not isinstance(mix_cfg, dict):
        raise UsageError(f"mix_cfg: {type(mix_cfg).__name__} is not a dict of layer patterns")
    for rule, kind in mix_cfg.items():
        if kind not in MIX_TYPES:
            raise UsageError(f"mix_cfg: {rule!r} asks for {kind!r}, which is not one of {', '.join(MIX_TYPES)}")
    return mix_cfg


def _declared_dtype(model: nn.Module) -> torch.dtype | None:
    """What the model's config says, which decides how deq_scale is stored; else the dtype of its first parameter."""
    config = getattr(model, "config", None)
    declared = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(declared, str):
        declared = getattr(torch, declared, None)
    if isinstance(declared, torch.dtype):
        return declared
    return next((parameter.dtype for parameter in model.parameters()), None)
