"""Quantizing a model one decoder layer at a time, each on what the layers before it make once they are quantized.

Numbers are those of ``Calibrator`` on the whole model, bit for bit, because a layer sees the samples in the same order. Up to three
streams of hidden states go from layer to layer:

float       the model as it was: AntiOutlier's statistics
smoothed    after AntiOutlier, in float: range_parm (the first samples only) and the KV cache's scales (all of them)
quantized   weights and static activations rounded: input scales, GPTQ, AWQ

``disable_level`` compares the layers of the whole model, so it costs a pass of its own, with the first samples. What it cannot do layer
by layer is in ``whole_model_only``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from formats.errors import UsageError

from .anti_outlier import WRAPPED_NORMS, AntiOutlier, check_anti_names, norms_of
from .attention import AttentionObserver
from .blocks import Blocks, Sample
from .choice import config_of, linears_of, named_float, wild_names
from .compensated import awq_rounded, awq_scaled, gptq_rounded, group_size_of
from .config import AntiOutlierConfig, QuantConfig
from .devices import resolve
from .layers import STATIC_TYPES, QuantizedLayer, check_linear
from .lmdeploy_awq import largest_inputs, lmdeploy_rounded, smooth_layer, smoothed_subgraphs
from .lmdeploy_search import search_ratios
from .methods import Awq, Gptq, LmdeployAwq
from .recipe import Recipe
from .stage import FEATURE_SAMPLES, Progress, Stage, rounded_to_nearest
from .streams import Stream, embed

__all__ = ["Job", "LayerRun", "MadeLayer", "whole_model_only"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What is to be done with every decoder layer.

    config          how linears are quantized; mix_cfg: other types, by name or pattern, as ``Calibrator`` has it
    anti_outlier    how their inputs are smoothed first, or None
    disable_level   so many linears of largest range_parm stay float
    gptq            settings, where the config's w_method is GPTQ; awq: the search for scales and clips, or None
    lmdeploy_awq    LMDeploy's smoothing and rounding, or None
    """

    config: QuantConfig
    mix_cfg: Mapping[str, str] = field(default_factory=dict)
    anti_outlier: AntiOutlierConfig | None = None
    disable_level: int = 0
    gptq: Gptq | None = None
    awq: Awq | None = None
    lmdeploy_awq: LmdeployAwq | None = None

    @classmethod
    def of(cls, recipe: Recipe, device: str) -> Job:
        """What a recipe says, on ``device``."""
        level = int(recipe.disable_level.removeprefix("L"))
        config, smooth = recipe.quant_config(device), recipe.anti_outlier_config(device)
        methods = recipe.gptq_settings(), recipe.awq_settings(), recipe.lmdeploy_awq_settings()
        return cls(config, recipe.mix_cfg, smooth, level, *methods)

    @property
    def is_searched(self) -> bool:
        """Whether weights are rounded by what their inputs are."""
        return self.config.w_method == "GPTQ" or self.awq is not None

    def config_of(self, name: str) -> QuantConfig | None:
        """The config of linear ``name``; None for a float one."""
        return config_of(name, self.config, self.mix_cfg)


def whole_model_only(job: Job) -> str | None:
    """Why this needs the whole model in memory, or None."""
    if job.config.is_lowbit and job.disable_level:
        return "is_lowbit with disable_level chooses float layers while the whole model runs on the first sample"
    if job.config.pr < 1:
        return "pr below 1 draws random numbers in the order of the whole model"
    if not job.config.disable_last_linear:
        return "disable_last_linear=False quantizes a linear outside the decoder layers"
    return None


@dataclass(frozen=True)
class MadeLayer:
    """One decoder layer, quantized; its modules are in ``model``, which is good until the next one is begun.

    The fields are what ``saving.tensors_of`` asks of a calibrator: ``layers``, ``kv_cache``, ``attention`` by name.
    """

    index: int
    model: nn.Module
    cfg: QuantConfig
    layers: dict[str, QuantizedLayer]
    float_names: list[str]
    range_parm: dict[str, float]
    kv_cache: dict[str, Tensor]
    attention: dict[str, Tensor]
    torch_dtype: torch.dtype | None
    smoothed: tuple[str, ...] = ()


class LayerRun:
    """Quantizes ``blocks`` layer by layer: ``for made in LayerRun(...).layers(): ...``.

    samples       calibration data, [input_ids] or [input_ids, attention_mask] each; none: data-free
    place         a folder for hidden states, or None to keep them in memory
    ranges_only   nothing is to be quantized: only what range_parm needs goes from layer to layer

    :raises UsageError: a job that needs the whole model, a name of it that is no linear
    """

    def __init__(self, blocks: Blocks, job: Job, samples: Sequence[Sample], place: Path | None = None, ranges_only: bool = False) -> None:
        if why := whole_model_only(job):
            raise UsageError(f"one layer at a time: {why}")
        if job.lmdeploy_awq is not None and job.anti_outlier is not None:
            raise UsageError("lmdeploy_awq: smooths by itself, and AntiOutlier would smooth first; choose one of them")
        self.blocks, self.job, self.samples, self.place = blocks, job, list(samples), place
        self.disabled = frozenset(named_float(blocks.model, job.config))
        if job.anti_outlier is not None:
            check_anti_names(job.anti_outlier, blocks.model)
        self.device = resolve(job.config.dev_type, job.config.dev_id)
        wanted = {"smoothed": self.samples if job.config.use_kvcache_quant and not ranges_only else self.samples[:FEATURE_SAMPLES]}
        if job.anti_outlier is not None or (job.lmdeploy_awq is not None and job.lmdeploy_awq.smooth):
            wanted["float"] = self.samples
        if not ranges_only and (self._has_static() or job.config.use_fa_quant or job.is_searched):
            wanted["quantized"] = self.samples
        file = "ranges-{}" if ranges_only else "{}"
        self._streams = {name: Stream(file.format(name), there, blocks, place) for name, there in wanted.items()}

    def _has_static(self) -> bool:
        return any((config := self.job.config_of(name)) is not None and config.model_quant_type in STATIC_TYPES for name in self.linears)

    @property
    def linears(self) -> list[str]:
        """Names of all linears in decoder layers."""
        return [name for name in self.blocks.linears if name.startswith(f"{self.blocks.architecture.layers}.")]

    def to_quantize(self, floats: frozenset[str] = frozenset()) -> list[str]:
        """Names of the linears that will be quantized."""
        left = self.disabled | floats
        return [name for name in self.linears if name not in left and self.job.config_of(name) is not None]

    def outside(self) -> Any:
        """What stands for the model outside of its layers (``saving.extra_tensors``): norms there that AntiOutlier would have wrapped."""
        wraps = self.job.anti_outlier is not None and self.job.anti_outlier.anti_method != "m6"
        names = (
            [name for name in norms_of(self.blocks.model) if not name.startswith(f"{self.blocks.architecture.layers}.")] if wraps else []
        )
        parts = {name: self.blocks.part(name) for name in names}
        model = SimpleNamespace(config=self.blocks.config, get_submodule=parts.__getitem__, **{WRAPPED_NORMS: tuple(names)})
        return SimpleNamespace(model=model, cfg=self.job.config, layers={})

    def begin(self) -> None:
        """Embed the samples; to be left out where an earlier run's states are there."""
        embed(self.blocks, self.samples, self._streams.values(), self.device)

    def wildest(self, progress: Progress) -> set[str]:
        """The ``disable_level`` linears of largest range_parm, found in a pass of its own. Nothing of the model is changed."""
        run = LayerRun(self.blocks, self.job, self.samples, self.place, ranges_only=True)
        run.begin()
        ranges: dict[str, float] = {}
        with torch.no_grad():
            for index in range(len(self.blocks)):
                with self.blocks.stage(index, device=self.device) as model:
                    run._at(index)
                    run._smooth(model, index)
                    ranges |= run._observed(model, advance=True).range_parm
                run._advance(index)
                progress("ranges", index + 1, len(self.blocks))
        for stream in run._streams.values():
            stream.remove()
        return wild_names(ranges, self.disabled, self.job.disable_level)

    def layers(self, first: int = 0, floats: frozenset[str] = frozenset(), progress: Progress | None = None) -> Iterator[MadeLayer]:
        """Layers from ``first`` on, quantized but for ``floats``. To be kept, each is used before the next is asked for."""
        tell = progress or (lambda what, done, of: None)
        for index in range(first, len(self.blocks)):
            with torch.no_grad(), self.blocks.stage(index, device=self.device) as model:
                self._at(index)
                yield self._made(model, index, floats, tell)
            self._advance(index)

    def sync(self) -> None:
        """Bring what the layer at hand made to the disk."""
        for stream in self._streams.values():
            stream.sync()

    def _at(self, index: int) -> None:
        for stream in self._streams.values():
            stream.at(index)

    def _advance(self, index: int) -> None:
        for stream in self._streams.values():
            stream.advance(index)

    def _smooth(
        self, model: nn.Module, index: int, floats: frozenset[str] = frozenset(), progress: Progress | None = None
    ) -> tuple[str, ...]:
        """Smooth the layer's subgraphs; their sources. floats: linears that stay so."""
        config, settings = self.job.anti_outlier, self.job.lmdeploy_awq
        if settings is not None and settings.smooth:
            return self._smooth_as_lmdeploy(model, index, settings, floats, progress)
        if config is None:
            return ()
        stream = self._streams["float"]
        smoother = AntiOutlier(model, stream.inputs, config, architecture=self.blocks.architecture, layer=index, made=stream.made)
        smoother.process()
        return tuple(subgraph.source for subgraph in smoother.subgraphs())

    def _smooth_as_lmdeploy(
        self, model: nn.Module, index: int, settings: LmdeployAwq, floats: frozenset[str], progress: Progress | None
    ) -> tuple[str, ...]:
        stream, size = self._streams["float"], group_size_of(self.job.config)
        architecture, layer = self.blocks.architecture, self.blocks.names[index]
        if not settings.search_scale:
            largest = largest_inputs(model, list(linears_of(model)), stream.inputs, stream.made)
            return smooth_layer(model, architecture, layer, largest, settings, size)
        subgraphs, rounded = smoothed_subgraphs(model, architecture, layer), frozenset(self.to_quantize(floats))
        found = search_ratios(model, subgraphs, stream.inputs, rounded, settings, size, stream.made, progress)
        means, ratios = {name: one.magnitude for name, one in found.items()}, {name: one.ratio for name, one in found.items()}
        return smooth_layer(model, architecture, layer, means, settings, size, ratios)

    def _observed(self, model: nn.Module, advance: bool) -> Stage:
        """The layer's linears with their range_parm; advance: this is the last pass of its stream."""
        stage, stream = Stage(model, linears_of(model), self.job.config), self._streams["smoothed"]
        stage.observe_ranges(stream.inputs, stream.made if advance else None)
        return stage

    def _rounded(
        self, model: nn.Module, index: int, linears: Mapping[str, nn.Linear], configs: Mapping[str, QuantConfig]
    ) -> Iterator[tuple[QuantizedLayer, Tensor]]:
        """The layer's linears, rounded as the job says."""
        if self.job.lmdeploy_awq is not None:
            return lmdeploy_rounded(linears, configs, self.job.lmdeploy_awq)
        if not self.job.is_searched or not configs:
            return rounded_to_nearest(linears, configs)
        inputs = self._streams["quantized"].inputs
        if (awq := self.job.awq) is None:
            return gptq_rounded(model, linears, configs, inputs, self.job.gptq or Gptq(percdamp=self.job.config.percdamp))
        if awq.scale:
            smoother = AntiOutlier(model, inputs, AntiOutlierConfig(anti_method="m4"), architecture=self.blocks.architecture, layer=index)
            awq_scaled(model, smoother, smoother.subgraphs(), configs, inputs, awq)
        return awq_rounded(model, linears, configs, inputs, awq)

    def _made(self, model: nn.Module, index: int, floats: frozenset[str], progress: Progress) -> MadeLayer:
        config, samples = self.job.config, self.samples
        smoothed = self._smooth(model, index, floats, progress)
        stage, cache = self._observed(model, advance=not config.use_kvcache_quant), None
        if config.use_kvcache_quant:
            stream = self._streams["smoothed"]
            cache = stage.observe_cache(stream.inputs, config.kv_sym, stream.made)
        left = self.disabled | floats
        configs = {name: found for name in stage.linears if name not in left and (found := self.job.config_of(name)) is not None}
        for name, found in configs.items():
            check_linear(name, stage.linears[name], found)
        rounded = self._rounded(model, index, stage.linears, configs)
        stage.round(rounded, configs, bool(samples), lambda what, done, of: None, split_digits=not self.job.is_searched)
        attention = AttentionObserver(model, config.disable_names or []) if config.use_fa_quant else None
        with attention.watching() if attention is not None else nullcontext():
            if (quantized := self._streams.get("quantized")) is not None:
                stage.calibrate(quantized.inputs, progress, made=quantized.made)
        stage.finish()
        return MadeLayer(
            index,
            model,
            config,
            stage.layers,
            [name for name in stage.linears if name not in stage.layers],
            stage.range_parm,
            {} if cache is None else cache.finish(),
            {} if attention is None else attention.finish(),
            self.blocks.dtype,
            smoothed,
        )
