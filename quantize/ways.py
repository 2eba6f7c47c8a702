"""The two ways to carry out a recipe: one decoder layer at a time, or with the whole model in memory.

The first needs the memory of one layer and of the samples' hidden states, and can be gone on with after it was killed. The second is for
what the first cannot do (``layerwise.whole_model_only``), and for models whose architecture no table knows. Their numbers are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from convert.staging import workshop
from formats.checkpoint import Checkpoint, Location
from formats.errors import DestinationError, UsageError

from .anti_outlier import AntiOutlier
from .architectures import ARCHITECTURES
from .blocks import Blocks, Shell
from .calibration import Sample
from .calibrator import Calibrator
from .layerwise import Job, LayerRun, whole_model_only
from .models import load_model
from .progress import LayerFigures, Report
from .recipe import Recipe
from .saving import checkpoint_of, tensors_of
from .work import Work, digest_of, what_of

__all__ = ["Outcome", "Request", "in_memory", "layer_by_layer", "why_in_memory"]


@dataclass(frozen=True)
class Request:
    """What is asked for: ``source`` is the float model, ``norms_for`` msModelSlim's variant whose norm tensors are wanted."""

    source: Checkpoint
    shell: Shell
    recipe: Recipe
    device: str
    samples: list[Sample]
    norms_for: str = ""
    progress: Report | None = None

    @property
    def base(self) -> Location:
        """The float model's folder."""
        return self.source.location

    @property
    def job(self) -> Job:
        """The recipe, on the device."""
        return Job.of(self.recipe, self.device)

    def tell(self, what: str, done: int, of: int, layer: LayerFigures | None = None) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(what, done, of, layer)


@dataclass(frozen=True)
class Outcome:
    """The quantized model. content: a digest of its tensors, or of the samples it was made by; resumed: layers that were there already."""

    checkpoint: Checkpoint
    layers: tuple[LayerFigures, ...]
    float_names: tuple[str, ...]
    smoothed: int = 0
    content: str = ""
    resumed: int = 0


def why_in_memory(request: Request) -> str | None:
    """Why this cannot be done one layer at a time, or None."""
    model_type = getattr(request.shell[0].config, "model_type", None)
    if model_type not in ARCHITECTURES:
        return f"where the layers of a {model_type!r} lie is not known"
    return whole_model_only(request.job)


def in_memory(request: Request) -> Outcome:
    """Load the whole model, smooth and calibrate it."""
    recipe, samples = request.recipe, request.samples
    if recipe.lmdeploy_awq is not None:
        raise UsageError(f"{recipe.name}: goes one decoder layer at a time, which cannot be done here: {why_in_memory(request)}")
    model = load_model(request.base.folder)
    smoothed = _smooth(model, request)
    calibrator = Calibrator(model, recipe.quant_config(request.device), samples, recipe.disable_level, mix_cfg=dict(recipe.mix_cfg))
    words = {"layers": "rounding", "samples": "calibrating"}

    def tell(what: str, done: int, of: int) -> None:
        name = next(reversed(calibrator.layers)) if what == "layers" else None
        request.tell(words.get(what, what), done, of, None if name is None else figures(calibrator, name))

    calibrator.run(progress=tell)
    checkpoint = checkpoint_of(calibrator, request.norms_for)
    layers = tuple(figures(calibrator, name) for name in calibrator.layers)
    return Outcome(checkpoint, layers, tuple(calibrator.float_names), smoothed, _digest(calibrator))


def figures(made: Any, name: str) -> LayerFigures:
    """How one layer of what was calibrated fared."""
    layer = made.layers[name]
    return LayerFigures(name, layer.kind, layer.weight_error, made.range_parm.get(name), repaired=layer.repaired)


def _smooth(model: Any, request: Request) -> int:
    """Run AntiOutlier if the recipe says so; how many sources it smoothed."""
    config = request.recipe.anti_outlier_config(request.device)
    if config is None:
        return 0
    done: list[str] = []

    def begun(source: str) -> None:
        done.append(source)
        request.tell("smoothing", len(done), total)

    smoother = AntiOutlier(model, request.samples, config, progress=begun)
    total = len(smoother.subgraphs())
    smoother.process()
    return total


def _digest(calibrator: Calibrator) -> str:
    """XXH3-128 of every tensor's bytes."""
    digest = xxhash.xxh3_128()
    for name, array in tensors_of(calibrator)[0].items():
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(memoryview(array.view("u1").reshape(-1)) if array.ndim else array.tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def layer_by_layer(request: Request, out: Path, resume: bool = False) -> Iterator[Outcome]:
    """Quantize layer by layer, beside ``out``; the outcome is good until the block ends.

    resume    there must be something to go on with; without it an interrupted run is gone on with, if there was one
    :raises DestinationError: an interrupted run of another kind left its work there, or none did and ``resume`` is asked for
    """
    source, job = request.source, request.job
    blocks = Blocks.open(source, made=request.shell)
    what = what_of(source, request.recipe, request.device, norms_for=request.norms_for, samples=digest_of(request.samples))
    with workshop(out, "quantize") as stage:
        work = Work(stage, what, request.norms_for)
        if resume and not work.layers:
            raise DestinationError(f"{out}: --resume: no interrupted run left its work beside it; run the command without it")
        found = len(work.layers)
        run = LayerRun(blocks, job, request.samples, work.place)
        floats = work.chosen(lambda: sorted(run.wildest(request.tell)) if job.disable_level else [])
        last = _run(run, work, floats, request)
        yield Outcome(
            work.checkpoint(source, blocks, last),
            tuple(figure for layer in work.layers for figure in layer.figures),
            tuple(name for layer in work.layers for name in layer.floats)
            + tuple(name for name in blocks.linears if name not in run.linears),
            sum(len(layer.smoothed) for layer in work.layers),
            digest_of(request.samples),
            found,
        )


def _run(run: LayerRun, work: Work, floats: frozenset[str], request: Request) -> Any:
    """Make the layers that are missing; what stands for the model outside of its layers."""
    first, done = len(work.layers), sum(len(layer.figures) for layer in work.layers)
    total = len(run.to_quantize(floats))
    if first == 0:
        run.begin()
    for made in run.layers(first, floats, lambda what, done, of: request.tell("calibrating", done, of)):
        found = [figures(made, name) for name in made.layers]
        work.add(made, found, made.smoothed, run.sync)
        for one in found:
            done += 1
            request.tell("quantizing", done, total, one)
    return run.outside()
