"""Quantize a float model by a recipe of Golden Stick's, one decoder layer at a time, into any format.

What a layer becomes is laid out as Golden Stick itself would have it in a checkpoint (``laid_out``), read by that format's reader, and
written by the conversion engine: so a MindSpore file has the tool's own tensors, and every other format what converting that file
gives. The version is the target's: 0.6 for ``mindspore:gs0.6``, else 1.2. A run that was interrupted is gone on with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convert.engine import run as write
from convert.memory import DEFAULT_MEMORY
from convert.options import Settings
from convert.planning import Planner
from convert.staging import workshop
from convert.targets import Target
from formats import open_checkpoint
from formats.arrays_file import ArraysFile
from formats.checkpoint import Checkpoint, Location
from formats.errors import DestinationError, RefusedError, UnreadableError, UsageError
from formats.mindformers_file import INT4
from formats.mindspore import GoldenStick as Reader
from formats.safetensors_file import DEFAULT_SHARD_BYTES

from .blocks import Blocks, Sample
from .config import QuantConfig
from .devices import resolve
from .golden_stick import RoundedWeight
from .golden_stick_config import GoldenStick, Policy, names_of_linear
from .golden_stick_data import calibration_samples
from .golden_stick_layer import MadeLayer, MadeLinear, quantize_layer, siblings
from .golden_stick_tensors import cache_of, laid_out
from .outputs import scales_in
from .progress import LayerFigures, Report
from .recipe import Recipe
from .result import Quantized, draw_plot
from .saving import NOWHERE, config_of, to_numpy
from .steps import Clock, asked, notes_of, told_of_bytes
from .streams import Stream, embed
from .work import Work, digest_of, in_model_order, what_of

__all__ = ["policies_of", "quantize_golden_stick"]


def quantize_golden_stick(
    model: str | os.PathLike[str] | Location,
    out: str | os.PathLike[str],
    recipe: Recipe,
    to: str | Target,
    device: str = QuantConfig.dev_type,
    calib: str | os.PathLike[str] | list[Any] | None = None,
    samples: int | None = None,
    *,
    tokenizer: Any = None,
    qkv_concat: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    plot: str | os.PathLike[str] | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    scale_dtype: str | None = None,
    jobs: int | None = None,
    max_memory: int = DEFAULT_MEMORY,
    progress: Report | None = None,
) -> Quantized:
    """Quantize the float ``model``, a folder or a location with a ``config.json``; arguments and errors are ``quantize_model``'s.

    tokenizer   of texts; None: the folder's own
    to          what ``find_target`` takes, or gives; qkv_concat: as ``convert`` has it
    """
    settings = recipe.golden_stick_settings()
    if settings is None:
        raise UsageError(f"recipe {recipe.name}: is none of Golden Stick's")
    target = asked(recipe, to, out, calib, device, overwrite, plot)
    if target.spec.name == "mindspore":
        target = target._replace(named=True)  # a model without quantized linears would be taken for a float one
    if qkv_concat and any(policy.outliers_suppression == "awq" for policy in settings.policies):
        raise RefusedError("qkv_concat: AWQ searches a scale for q, k and v each here, which a fused linear cannot hold; leave them apart")
    place = resolve(device)
    base = model if isinstance(model, Location) else Location.of(model)
    source = _source(base)
    blocks = Blocks.open(source)
    policies = policies_of(blocks, settings)
    wanted = Settings(
        max_shard_size=max_shard_size,
        scale_dtype=scale_dtype or scales_in(target.spec, golden_stick=True),
        jobs=jobs,
        max_memory=max_memory,
        qkv_concat=qkv_concat,
    )
    spelled = "gs0.6" if target.variant.name == "gs0.6" else "gs1.2"
    Planner(_trial(blocks, policies, settings, spelled), target, wanted, base).plan(probe=True).raise_if_refused()

    clock = Clock()
    data = calibration_samples(calib, base, recipe, samples, tokenizer)
    run = _Run(blocks, policies, settings, data, spelled, place, qkv_concat, progress)
    with workshop(Path(out), "quantize") as stage:
        said = {"spelled": spelled, "qkv_concat": qkv_concat, "samples": digest_of(data)}
        work = Work(stage, what_of(source, recipe, device, **said), "")
        if resume and not work.layers:
            raise DestinationError(f"{out}: --resume: no interrupted run left its work beside it; run the command without it")
        resumed = len(work.layers)
        run.layers(work)
        checkpoint = _checkpoint(work, source, blocks)
        clock.done("quantize")
        checkpoint.location = replace(checkpoint.location, folder=base.folder)  # the source that must not be written into
        plan = Planner(checkpoint, target, wanted, base).plan(probe=True)
        plan.options |= {"recipe": recipe.model_dump(exclude_defaults=True), "content": digest_of(data)}
        plan.raise_if_refused()
        written = write(plan, out, overwrite=overwrite, progress=told_of_bytes(progress, checkpoint.tensors.nbytes))
        figures = tuple(figure for layer in work.layers for figure in layer.figures)
        smoothed = sum(len(layer.smoothed) for layer in work.layers)
    clock.done("write")
    if plot is not None:
        draw_plot(figures, plot, f"{base.folder.resolve().name}, {recipe.name}")
    floats = tuple(name for name in blocks.linears if name not in policies)
    return Quantized(recipe, written, figures, floats, len(data), smoothed, tuple(notes_of(data, resumed)), clock.seconds, resumed)


def policies_of(blocks: Blocks, settings: GoldenStick) -> dict[str, Policy]:
    """The policy of each linear of the decoder layers that will be quantized.

    :raises UsageError: groups that do not divide a layer's inputs, or are all of them
    """
    model_type = getattr(blocks.config, "model_type", None)
    found: dict[str, Policy] = {}
    for name, module in blocks.linears.items():
        policy = settings.policy_of(names_of_linear(name, model_type))
        if policy is None or not name.startswith(f"{blocks.architecture.layers}."):
            continue
        if policy.group_size != -1 and (module.in_features % policy.group_size or module.in_features == policy.group_size):
            raise UsageError(
                f"{name}: {module.in_features} inputs are not several whole groups of {policy.group_size}; choose another group_size, or "
                "name the layer in modules_to_not_convert"
            )
        found[name] = policy
    return found


class _Run:
    """The decoder layers, one after the other. ``spelled``: the version of Golden Stick whose names are used."""

    def __init__(
        self,
        blocks: Blocks,
        policies: Mapping[str, Policy],
        settings: GoldenStick,
        samples: Sequence[Sample],
        spelled: str,
        device: torch.device,
        qkv_concat: bool,
        progress: Report | None,
    ) -> None:
        self.blocks, self.policies, self.settings, self.samples = blocks, policies, settings, samples
        self.spelled, self.device, self.qkv_concat, self.progress = spelled, device, qkv_concat, progress

    def layers(self, work: Work) -> None:
        """Make those that are missing."""
        first, done = len(work.layers), sum(len(layer.figures) for layer in work.layers)
        if first == len(self.blocks):
            return
        stream = Stream("float", self.samples, self.blocks, work.place)
        if first == 0:
            embed(self.blocks, self.samples, [stream], self.device)
        for index in range(first, len(self.blocks)):
            stream.at(index)
            with torch.no_grad(), self.blocks.stage(index, device=self.device) as model:
                made = self._layer(model, index, stream)
            figures = [LayerFigures(name, one.policy.kind, one.weight_error) for name, one in made.linears.items()]
            self._keep(work, index, made, figures, stream)
            stream.advance(index)
            for figure in figures:
                done += 1
                if self.progress is not None:
                    self.progress("quantizing", done, len(self.policies), figure)

    def _layer(self, model: nn.Module, index: int, stream: Stream) -> MadeLayer:
        prefix = f"{self.blocks.names[index]}."
        policies = {name: policy for name, policy in self.policies.items() if name.startswith(prefix)}
        cache = self.settings.kv_bit == 8
        return quantize_layer(model, policies, stream.inputs, stream.made, self.settings.approach, cache, self.qkv_concat)

    def _keep(self, work: Work, index: int, made: MadeLayer, figures: list[LayerFigures], stream: Stream) -> None:
        tensors, packed = self.tensors(index, made)
        prefix = f"{self.blocks.names[index]}."
        weights = self.blocks.weights
        assert weights is not None
        linears = {f"{name}.{leaf}" for name in made.linears for leaf in ("weight", "bias")}
        for name in weights.checkpoint.tensors:
            if name.startswith(prefix) and name not in linears:
                tensors[name] = weights.tensor(name)
        types = {name: INT4 if name in packed else "FLOAT" for name in tensors}
        floats = [name for name in self.blocks.linears if name.startswith(prefix) and name not in made.linears]
        smoothed = [name for name, one in made.linears.items() if one.smooth is not None]
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
        work.finish(kept, types, figures, floats, smoothed, ["kv"] if made.cache else [], stream.sync, dict.fromkeys(packed, INT4))

    def tensors(self, index: int, made: MadeLayer) -> tuple[dict[str, Tensor], list[str]]:
        """(the layer's own tensors; names of those that hold two 4-bit codes a byte)."""
        tensors: dict[str, Tensor] = {}
        packed: list[str] = []
        for name, one in made.linears.items():
            own, int4 = laid_out(name, one, self.settings.approach, self.spelled)
            tensors |= own
            packed += int4
        if made.cache:
            tensors |= cache_of(index, made.cache, self.blocks.dtype, self.spelled)
        return tensors, packed


def _source(base: Location) -> Checkpoint:
    """The float model, which must be one."""
    if base.json("config.json") is None and "config.json" not in base.documents:
        raise UnreadableError(f"{base.folder}: has no config.json, so it is no model's folder")
    config = base.read_json(base.folder / "config.json")
    source = open_checkpoint(base)
    if config.get("quantization_config") or config.get("quantize") or source.layer_names:
        raise RefusedError(f"{base.folder}: is quantized already; quantize the float model, or use `weighbridge convert`")
    return source


def _trial(blocks: Blocks, policies: Mapping[str, Policy], settings: GoldenStick, spelled: str) -> Checkpoint:
    """One linear of each shape and policy, and what may be fused with it, quantized, in memory: to ask the target before hours of work."""
    kinds: dict[str, str] = {}
    for name, policy in policies.items():
        kinds.setdefault(f"{policy} {tuple(blocks.linears[name].weight.shape)}", name)
    tensors: dict[str, Tensor] = {}
    packed: list[str] = []
    for name in dict.fromkeys(one for chosen in kinds.values() for one in siblings(chosen) if one in policies):
        own, int4 = laid_out(name, _stand_in(blocks.linears[name], policies[name], settings, blocks.dtype), settings.approach, spelled)
        tensors |= own
        packed += int4
    if settings.kv_bit == 8:
        one = torch.ones(1, dtype=blocks.dtype)
        tensors |= cache_of(0, {"key": (-one, one), "value": (-one, one)}, blocks.dtype, spelled)
    arrays = {name: to_numpy(tensor.contiguous()) for name, tensor in tensors.items()}

    def opener(path: Path, number: int = 0) -> ArraysFile:
        file = ArraysFile(path, arrays, number)
        file.metadata |= dict.fromkeys(packed, INT4)
        return file

    documents = {"config.json": config_of(blocks.model)}
    location = Location(NOWHERE, ("trial.safetensors", "config.json"), documents=documents, opener=opener)
    return Reader(location, "float", location.tensors())


def _stand_in(linear: nn.Linear, policy: Policy, settings: GoldenStick, dtype: torch.dtype) -> MadeLinear:
    """``linear`` quantized, as far as shapes go."""
    out, in_ = linear.weight.shape
    grid = (out, 1 if policy.group_size == -1 else in_ // policy.group_size)
    within = torch.float32 if settings.approach == "smooth_quant" else torch.float64
    scale = torch.ones(grid, dtype=within)
    rounded = RoundedWeight(torch.zeros(out, in_, dtype=torch.int8), scale, torch.zeros_like(scale))
    smooth = None
    if policy.outliers_suppression != "none":
        smooth = torch.linspace(1, 2, in_).to(torch.float32 if settings.approach == "smooth_quant" else dtype)
    bias = None if linear.bias is None else torch.zeros(out, dtype=dtype)
    one = torch.ones(1, dtype=within) if policy.is_static else None
    return MadeLinear(policy, rounded, dtype, bias, smooth, one, one)


def _checkpoint(work: Work, source: Checkpoint, blocks: Blocks) -> Checkpoint:
    """All finished layers and what ``source`` has outside of them."""
    openers, types = work.gather(source, blocks, {})
    location = work.location(openers, {"config.json": config_of(blocks.model)})
    found = Reader(location, "float", location.tensors())
    in_model_order(found, blocks, types)
    return found
