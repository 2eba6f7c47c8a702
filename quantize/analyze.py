"""``analyze_model``: which linears suffer from quantization, each by itself, and how much; for who decides what stays in float.

Of every linear, one decoder layer at a time (``blocks``):

============  ======================================================================================================================
range_parm    of its input over the first five samples of the float model, as ``Calibrator`` finds it: how wild its activations are
weight error  ||rounded - weight|| / ||weight||, rounded as the recipe says
output error  ||y_q - y|| / ||y|| over all samples: y_q with its own weight and input quantized, and what comes before it in float.
              Static input scales are those that the recipe's observer finds in the float model. Multiplied in float32
============  ======================================================================================================================

The model is smoothed first if the recipe smooths and there are data. Where ``quantize`` differs: there each linear is calibrated behind
quantized ones. ``disable_level`` is not applied: what it would choose is what range_parm shows.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from formats import Location, open_checkpoint
from formats.errors import RefusedError, UsageError

from .anti_outlier import AntiOutlier, check_anti_names
from .blocks import Blocks, Inputs, States, advance
from .choice import chosen_linears, linears_of
from .config import QuantConfig
from .devices import resolve
from .evaluation import dtype_of
from .fake import DigitSplitter, InputQuantizer
from .layers import STATIC_TYPES, check_linear, quantize_linear
from .measure import state_files
from .observers import CalmRange, observer_for
from .progress import LayerFigures, Report
from .recipe import Recipe, load
from .result import check_plot, draw_plot
from .stage import FEATURE_SAMPLES, forward, watching
from .steps import calibrating

__all__ = ["RANKS", "Analysis", "analyze_model"]

RANKS = ("output", "range", "weight")
"""What linears can be ranked by."""


@dataclass(frozen=True)
class Analysis:
    """What ``analyze_model`` found. linears: worst first; those that the recipe leaves in float have kind FLOAT and no errors."""

    model: str
    recipe: Recipe
    linears: tuple[LayerFigures, ...]
    samples: int
    rank: str
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """What ``weighbridge analyze --json`` prints."""
        return {
            "model": self.model,
            "recipe": {"name": self.recipe.name, **self.recipe.model_dump(exclude_defaults=True)},
            "samples": self.samples,
            "rank": self.rank,
            "linears": [linear.to_json() for linear in self.linears],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }


def analyze_model(
    model_dir: str | os.PathLike[str],
    recipe: str | os.PathLike[str] | Recipe = "w8a8",
    calib: str | os.PathLike[str] | list[Any] | None = None,
    samples: int | None = None,
    *,
    rank: str | None = None,
    device: str = QuantConfig.dev_type,
    dtype: str = "auto",
    plot: str | os.PathLike[str] | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    progress: Report | None = None,
) -> Analysis:
    """Figures of every linear of the float model in ``model_dir``, worst first.

    calib     as ``calibration_data`` has it; None: errors of weights alone
    samples   of them; None: as many as the recipe says
    rank      "output", "range" or "weight": what is worst; None: output with data, weight without
    dtype     auto: the model's own, in which ``quantize`` computes; else float32, float16, bfloat16
    plot      a PNG or SVG file for the figures by decoder layer

    :raises UsageError: a recipe, device or data that make no sense
    :raises UnreadableError: no model's folder, or values that are not finite
    :raises RefusedError: the folder is quantized
    """
    begin = time.monotonic()
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    rank = ("weight" if calib is None else "output") if rank is None else rank
    if rank not in RANKS or (calib is None and rank != "weight"):
        raise UsageError(f"rank: {rank!r} is not one of {', '.join(RANKS)}, of which only weight needs no calibration data")
    if plot is not None:
        check_plot(plot)
    checkpoint = open_checkpoint(Location.of(model_dir))
    if checkpoint.format != "dense":
        raise RefusedError(f"{model_dir}: is {checkpoint.format}, quantized already; analyze the float model")
    blocks = Blocks.open(checkpoint, dtype_of(dtype, device))
    data: list[list[Tensor]] = []
    if calib is not None:
        data = calibrating(calib, checkpoint.location, recipe.calibration, samples)
    run = _Run(blocks, recipe, data, device, None if work_dir is None else Path(work_dir), progress)
    with torch.no_grad():
        found = tuple(run.figures())
    ranked = tuple(sorted(found, key=lambda linear: _badness(linear, rank), reverse=True))
    if plot is not None:
        draw_plot(
            [linear for linear in found if linear.kind != "FLOAT"], plot, f"{checkpoint.location.folder.resolve().name}, {recipe.name}"
        )
    return Analysis(os.fspath(model_dir), recipe, ranked, len(data), rank, tuple(run.notes), time.monotonic() - begin)


def _badness(linear: LayerFigures, rank: str) -> float:
    value = {"output": linear.output_error, "range": linear.range_parm, "weight": linear.weight_error}[rank]
    return -1.0 if value is None or linear.kind == "FLOAT" else value


class _Run:
    """One analysis. ``notes``: what a reader must know."""

    def __init__(
        self, blocks: Blocks, recipe: Recipe, data: list[list[Tensor]], device: str, work_dir: Path | None, progress: Report | None
    ) -> None:
        self.blocks, self.data, self.work_dir, self.progress = blocks, data, work_dir, progress
        self.device = resolve(device)
        self.configs = chosen_linears(blocks.model, recipe.quant_config(device), recipe.mix_cfg)
        self.smoothing = recipe.anti_outlier_config(device) if data else None
        if self.smoothing is not None:
            check_anti_names(self.smoothing, blocks.model)
        self.notes = list(_notes(recipe, bool(data)))

    def figures(self) -> Iterator[LayerFigures]:
        """Every linear, in the model's order."""
        of = len(self.blocks) + 1
        with self._states() as (states, before):
            for index in range(len(self.blocks)):
                with self.blocks.stage(index, device=self.device) as model:
                    if self.smoothing is not None:
                        self._smooth(model, index, before)
                    yield from self._layer(model, states)
                self._tell(index + 1, of)
            yield from self._head(states)
            self._tell(of, of)

    @contextlib.contextmanager
    def _states(self) -> Iterator[tuple[Any, Any]]:
        """Hidden states of the smoothed model and of the model as it was, which are the same if nothing is smoothed."""
        if not self.data:
            yield (), ()
            return
        count = 1 if self.smoothing is None else 2
        size = sum(sample[0].shape[1] for sample in self.data) * int(self.blocks.config.hidden_size) * self.blocks.dtype.itemsize
        with state_files([size] * count, self.work_dir) as paths:
            made = [self.blocks.begin(self.data, path, self.device) for path in paths]
            yield made[0], made[-1]

    def _smooth(self, model: nn.Module, index: int, states: States) -> None:
        """Smooth decoder layer ``index``, the only one in ``model``, by what the float model gives it; its states are advanced."""

        def made(number: int, output: Any) -> None:
            states[number] = output.logits

        AntiOutlier(
            model, Inputs(states, self.data), self.smoothing, architecture=self.blocks.architecture, layer=index, made=made
        ).process()

    def _layer(self, model: nn.Module, states: States) -> Iterator[LayerFigures]:
        """The linears of one decoder layer; the states are advanced."""
        linears = linears_of(model)
        probes = {name: Probe(name, module, self.configs.get(name)) for name, module in linears.items()}
        if self.data:
            inputs = Inputs(states, self.data)
            with watching(linears, lambda name, values: probes[name].see_range(values)):
                for one in inputs[:FEATURE_SAMPLES]:
                    forward(model, one)
            observed = [probe.starts_observing() for probe in probes.values()]
            if any(observed):
                with watching(linears, lambda name, values: probes[name].observe(values)):
                    for one in inputs:
                        forward(model, one)
            with watching(linears, lambda name, values: probes[name].compare(values)):
                advance(model, states, self.data)
        yield from (probe.figures() for probe in probes.values())

    def _head(self, states: States) -> Iterator[LayerFigures]:
        """The head, whose input is the last norm's output."""
        names = self.blocks.architecture
        with self.blocks.stage(head=True, device=self.device) as model:
            norm, head = model.get_submodule(names.final_norm), model.get_submodule(names.head)
            probe = Probe(names.head, head, self.configs.get(names.head))
            if self.data:
                for hidden in itertools.islice(states, FEATURE_SAMPLES):
                    probe.see_range(norm(hidden.to(self.device)))
                for see in (probe.observe,) * probe.starts_observing() + (probe.compare,):
                    for hidden in states:
                        for start in range(0, hidden.shape[1], _ROWS):
                            see(norm(hidden[:, start : start + _ROWS].to(self.device)))
            yield probe.figures()

    def _tell(self, done: int, of: int) -> None:
        if self.progress is not None:
            self.progress("analyzing", done, of, None)


_ROWS = 256
"""Positions whose logits are compared at a time."""


class Probe:
    """One linear: what calibration sees of it, then what quantizing it does. ``config``: how; None: not at all."""

    def __init__(self, name: str, linear: nn.Linear, config: QuantConfig | None) -> None:
        self.name, self.linear, self.config = name, linear, config
        self.range = CalmRange()
        self.seen, self.error, self.norm = False, 0.0, 0.0
        self.inputs: Callable[[Tensor], Tensor] | None = None
        self.weight_error, self.weight = 0.0, linear.weight
        if config is not None:
            check_linear(name, linear, config)
            made, self.weight = quantize_linear(name, linear, config)
            self.weight_error = made.weight_error

    def see_range(self, values: Tensor) -> None:
        self.range.update(values)

    def starts_observing(self) -> bool:
        """Make ready to round inputs; whether they must be observed first."""
        config = self.config
        if config is None:
            return False
        if config.a_bit > 8:
            self.inputs = DigitSplitter(config.w_bit) if config.do_msd else None
            return False
        static = config.model_quant_type in STATIC_TYPES
        self.inputs = InputQuantizer(self.name, config, observer_for(config.act_method, self.range.range_parm()) if static else None)
        return static

    def observe(self, values: Tensor) -> None:
        if isinstance(self.inputs, InputQuantizer) and self.inputs.observer is not None:
            self.inputs(values)

    def compare(self, values: Tensor) -> None:
        if self.config is None:
            return
        if isinstance(self.inputs, InputQuantizer):
            self.inputs.calibrating = False
        rounded = values if self.inputs is None else self.inputs(values)
        bias = None if self.linear.bias is None else self.linear.bias.float()
        wanted = functional.linear(values.float(), self.linear.weight.float(), bias)
        self.error += float((functional.linear(rounded.float(), self.weight.float(), bias) - wanted).square().sum())
        self.norm += float(wanted.square().sum())
        self.seen = True

    def figures(self) -> LayerFigures:
        kind = "FLOAT" if self.config is None else self.config.model_quant_type
        output = (math.sqrt(self.error / self.norm) if self.norm else 0.0) if self.seen else None
        return LayerFigures(self.name, kind, self.weight_error, None if self.range.high is None else self.range.range_parm(), output)


def _notes(recipe: Recipe, data: bool) -> Iterator[str]:
    config = recipe.quant_config()
    if recipe.anti_outlier is not None and not data:
        yield "the recipe smooths, which needs calibration data: these are the errors of the weights as they are"
    if config.w_method == "GPTQ":
        yield "weights are rounded to nearest here, not by GPTQ"
    if recipe.awq is not None:
        yield "scales and clips are not searched here, as AWQ does: weights are rounded to nearest as they are"
    if recipe.lmdeploy_awq is not None:
        yield "weights are rounded to nearest here as they are, not smoothed and rounded as LMDeploy does"
