"""Quantize a model's folder into another folder that loads as it is: the whole way, by a recipe.

The model is taken one decoder layer at a time where that can be done (``ways``), without running code of the folder: smoothed,
calibrated, rounded, and written by the conversion engine: planned, proved and certified like any conversion, with config and tokenizer
of the float model beside the weights. What can be said without the weights is said before they are read. A run that was interrupted is
finished by the same call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.engine import run as write
from convert.memory import DEFAULT_MEMORY
from convert.options import Settings
from convert.planning import Planner
from convert.records import Plan
from convert.targets import Target
from formats import open_checkpoint
from formats.checkpoint import Checkpoint, Location
from formats.errors import RefusedError, UnreadableError, UsageError
from formats.safetensors_file import DEFAULT_SHARD_BYTES

from .blocks import Shell, shell
from .choice import chosen_linears
from .config import QuantConfig
from .layerwise import Job
from .outputs import scales_in
from .progress import Report
from .recipe import Recipe, load
from .result import Quantized, draw_plot
from .saving import norms_of
from .steps import Clock, asked, calibrating, notes_of, told_of_bytes
from .trial import trial
from .ways import Outcome, Request, in_memory, layer_by_layer, why_in_memory

__all__ = ["Quantized", "quantize_model"]


def quantize_model(
    model_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: str | os.PathLike[str] | Recipe,
    to: str,
    device: str = QuantConfig.dev_type,
    calib: str | os.PathLike[str] | list[Any] | None = None,
    samples: int | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    plot: str | os.PathLike[str] | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    scale_dtype: str | None = None,
    jobs: int | None = None,
    max_memory: int = DEFAULT_MEMORY,
    progress: Report | None = None,
) -> Quantized:
    """Quantize the float model in ``model_dir`` by ``recipe`` and write it to ``out`` in format ``to``.

    recipe     a name of ``RECIPES``, a YAML file, or a ``Recipe``
    to         as ``convert`` has it: "awq", "gptq:v2", "compressed-tensors", "msmodelslim", "lmdeploy"
    device     "cpu", "npu:0", "cuda:0": where the model is calibrated
    calib      as ``calibration_data`` has it; None where the recipe needs none
    samples    of them; None: as many as the recipe says
    resume     an interrupted run must have left its work; without it that is gone on with if it is there
    plot       a PNG or SVG file for range_parm and weight error by layer
    scale_dtype, jobs   as ``convert`` has them; max_memory: what writing may use beside the model

    :raises UsageError: a recipe, format, device or data that makes no sense
    :raises RefusedError: the format cannot hold what the recipe makes
    :raises UnreadableError: the model cannot be read, or holds values that are not finite
    :raises DestinationError: ``out`` cannot be written. Whatever is raised, ``out`` is whole or as it was
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    if recipe.golden_stick is not None:
        from .golden_stick_run import quantize_golden_stick

        return quantize_golden_stick(
            model_dir, out, recipe, to, device, calib, samples, overwrite=overwrite, resume=resume, plot=plot,
            max_shard_size=max_shard_size, scale_dtype=scale_dtype, jobs=jobs, max_memory=max_memory, progress=progress,
        )  # fmt: skip
    target = asked(recipe, to, out, calib, device, overwrite, plot)
    source = open_checkpoint(_base(model_dir))
    base = source.location

    clock = Clock()
    model = shell(source)
    settings = Settings(max_shard_size=max_shard_size, scale_dtype=scale_dtype or scales_in(target.spec), jobs=jobs, max_memory=max_memory)
    _ask_target(source, model, recipe, device, target, settings)
    data = calibrating(calib, base, recipe.calibration, samples)
    clock.done("load")
    norms_for = norms_of(target)
    request = Request(source, model, recipe, device, data, norms_for, progress)
    with _way(request, Path(out), resume) as outcome:
        clock.done("quantize")
        plan = _plan(outcome, request, target, settings)
        plan.raise_if_refused()
        written = write(plan, out, overwrite=overwrite, progress=told_of_bytes(progress, plan.checkpoint.tensors.nbytes))
    clock.done("write")
    if plot is not None:
        draw_plot(outcome.layers, plot, f"{base.folder.resolve().name}, {recipe.name}")
    notes = tuple(_notes(outcome, request))
    return Quantized(
        recipe, written, outcome.layers, outcome.float_names, len(data), outcome.smoothed, notes, clock.seconds, outcome.resumed
    )


def _ask_target(source: Checkpoint, made: Shell, recipe: Recipe, device: str, target: Target, settings: Settings) -> None:
    """Refuse what the target cannot hold, from shapes alone."""
    (model, dtype), job = made, Job.of(recipe, device)
    tried = trial(model, dtype, chosen_linears(model, job.config, job.mix_cfg), job)
    Planner(tried, target, settings, source.location).plan(probe=False).raise_if_refused()


@contextlib.contextmanager
def _way(request: Request, out: Path, resume: bool) -> Iterator[Outcome]:
    """Carry it out one decoder layer at a time, if that can be done."""
    why = why_in_memory(request)
    if why is None:
        with layer_by_layer(request, out, resume) as outcome:
            yield outcome
        return
    if resume:
        raise UsageError(f"--resume: this recipe needs the whole model in memory, so there is nothing to go on with: {why}")
    yield in_memory(request)


def _base(model_dir: str | os.PathLike[str]) -> Location:
    """The float model's folder, which must be one."""
    base = Location.of(model_dir)
    if base.file is not None:
        raise UsageError(f"{model_dir}: is a file, and the folder of a model was wanted")
    config = base.json("config.json")
    if config is None:
        raise UnreadableError(f"{model_dir}: has no config.json, so it is no model's folder")
    if config.get("quantization_config") or config.get("quantize"):
        raise RefusedError(f"{model_dir}: is quantized already; quantize the float model, or use `weighbridge convert`")
    return base


def _plan(outcome: Outcome, request: Request, target: Target, settings: Settings) -> Plan:
    checkpoint = outcome.checkpoint
    checkpoint.location = replace(checkpoint.location, folder=request.base.folder)  # the source that must not be written into
    plan = Planner(checkpoint, target, settings, request.base).plan(probe=True)
    # Says in the certificate what was done, and keeps a run that goes on with an interrupted one's work from mixing two calibrations.
    plan.options |= {"recipe": request.recipe.model_dump(exclude_defaults=True), "content": outcome.content}
    return plan


def _notes(outcome: Outcome, request: Request) -> list[str]:
    data = request.samples
    notes = notes_of(data, outcome.resumed)
    if not outcome.layers:
        notes.append("no linear was quantized")
    if request.recipe.quant_config().model_quant_type in {"W8A8", "W8A8S"} and len(data) < 10:
        notes.append(f"{len(data)} calibration samples are few for static activations; msModelSlim's guide takes 10 to 50")
    if repaired := sum(layer.repaired for layer in outcome.layers):
        first = next(layer.name for layer in outcome.layers if layer.repaired)
        notes.append(
            f"{repaired} groups of weights of one sign (first in {first}) have a zero point outside of their codes in LMDeploy, which "
            "writes it over its neighbours or clamps it; here their range reaches to 0"
        )
    return notes
