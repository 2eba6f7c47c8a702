"""Quantize a float model by a recipe of Golden Stick's, one decoder layer at a time, into any format.

What a layer becomes is laid out as Golden Stick itself would have it in a checkpoint (``laid_out``), read by that format's reader, and
written by the conversion engine: so a MindSpore file has the tool's own tensors, and every other format what converting that file
gives. The version is the target's: 0.6 for ``mindspore:gs0.6``, else 1.2. A run that was interrupted is gone on with.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convert.certificate import version as own_version
from convert.engine import run as write
from convert.memory import DEFAULT_MEMORY
from convert.options import Settings
from convert.planning import Planner
from convert.staging import workshop
from formats import find_target, open_checkpoint
from formats.arrays_file import ArraysFile
from formats.checkpoint import Checkpoint, Location
from formats.errors import DestinationError, RefusedError, UnreadableError, UsageError
from formats.mindformers_file import INT4
from formats.mindspore import GoldenStick as Reader
from formats.safetensors_file import DEFAULT_SHARD_BYTES

from .blocks import Blocks, Sample, States, inputs_of, shell
from .calibration import repeats
from .config import QuantConfig
from .devices import resolve
from .golden_stick import RoundedWeight
from .golden_stick_config import GoldenStick, Policy, names_of_linear
from .golden_stick_data import calibration_samples
from .golden_stick_layer import MadeLayer, MadeLinear, quantize_layer, siblings
from .golden_stick_tensors import cache_of, laid_out
from .progress import LayerFigures, Report
from .recipe import Recipe
from .result import Quantized, check_plot, draw_plot
from .saving import NOWHERE, config_of, to_numpy
from .streamed import Target
from .work import Work, digest_of, in_model_order

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
    jobs: int | None = None,
    max_memory: int = DEFAULT_MEMORY,
    progress: Report | None = None,
) -> Quantized:
    """Quantize the float ``model``, a folder or a location with a ``config.json``; arguments and errors are ``quantize_model``'s.

    tokenizer   of texts; None: the folder's own
    to          a format's name, or what ``find_target`` gives; qkv_concat: as ``convert`` has it
    """
    settings = recipe.golden_stick_settings()
    if settings is None:
        raise UsageError(f"recipe {recipe.name}: is none of Golden Stick's")
    spec, variant, named = find_target(to) if isinstance(to, str) else to
    assert variant.holds is not None
    if variant.holds.dequantized:
        raise UsageError(
            f"--to {spec.name}:{variant.name}: holds no quantized weights, so there is nothing to quantize for; name another format"
        )
    named = named or spec.name == "mindspore"  # a model without quantized linears would be taken for a float one
    _check_out(Path(out), overwrite)
    if plot is not None:
        check_plot(plot)
    if calib is None and settings.needs_data:
        raise UsageError(f"recipe {recipe.name}: needs calibration data; pass --calib FILE.jsonl, a text a line")
    if qkv_concat and any(policy.outliers_suppression == "awq" for policy in settings.policies):
        raise RefusedError("qkv_concat: AWQ searches a scale for q, k and v each here, which a fused linear cannot hold; leave them apart")
    place = resolve(device)
    base = model if isinstance(model, Location) else Location.of(model)
    source = _source(base)
    blocks, policies = Blocks.open(source), policies_of(source, settings)
    wanted = Settings(
        max_shard_size=max_shard_size,
        scale_dtype="keep" if spec.name in {"msmodelslim", "mindspore"} else None,
        jobs=jobs,
        max_memory=max_memory,
        qkv_concat=qkv_concat,
    )
    spelled = "gs0.6" if variant.name == "gs0.6" else "gs1.2"
    Planner(_trial(blocks, policies, settings, spelled), spec, variant, named, wanted, base).plan(probe=True).raise_if_refused()

    begun = time.monotonic()
    data = calibration_samples(calib, base, recipe, samples, tokenizer)
    run = _Run(blocks, policies, settings, data, spelled, place, qkv_concat, progress)
    with workshop(Path(out), "quantize") as stage:
        work = Work(stage, _what(recipe, device, data, spelled, qkv_concat, source), "")
        if resume and not work.layers:
            raise DestinationError(f"{out}: --resume: no interrupted run left its work beside it; run the command without it")
        resumed = len(work.layers)
        run.layers(work)
        checkpoint = _checkpoint(work, source, blocks)
        done = time.monotonic()
        checkpoint.location = replace(checkpoint.location, folder=base.folder)  # the source that must not be written into
        plan = Planner(checkpoint, spec, variant, named, wanted, base).plan(probe=True)
        plan.options |= {"recipe": recipe.model_dump(exclude_defaults=True), "content": digest_of(data)}
        plan.raise_if_refused()
        written = write(plan, out, overwrite=overwrite, progress=_bytes(progress, plan))
        figures = tuple(figure for layer in work.layers for figure in layer.figures)
        smoothed = sum(len(layer.smoothed) for layer in work.layers)
    if plot is not None:
        draw_plot(figures, plot, f"{base.folder.resolve().name}, {recipe.name}")
    floats = tuple(name for name in blocks.linears if name not in policies)
    seconds = {"quantize": done - begun, "write": time.monotonic() - done}
    return Quantized(recipe, written, figures, floats, len(data), smoothed, tuple(_notes(data, resumed)), seconds, resumed)


def policies_of(source: Checkpoint, settings: GoldenStick) -> dict[str, Policy]:
    """The policy of each linear of the decoder layers that will be quantized.

    :raises UsageError: groups that do not divide a layer's inputs, or are all of them
    """
    model, _ = shell(source)
    model_type = getattr(model.config, "model_type", None)
    found: dict[str, Policy] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not any(part.isdigit() for part in name.split(".")):
            continue
        policy = settings.policy_of(names_of_linear(name, model_type))
        if policy is None:
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
        here = self._states(work, first)
        if first == 0 and self.samples:
            begun = self.blocks.begin(self.samples, device=self.device)
            for index in range(len(self.samples)):
                here[index] = begun[index]
            here.sync()
        for index in range(first, len(self.blocks)):
            there = self._states(work, index + 1, new=True)
            with torch.no_grad(), self.blocks.stage(index, device=self.device) as model:
                made = self._layer(model, index, here, there)
            figures = [LayerFigures(name, one.policy.kind, one.weight_error) for name, one in made.linears.items()]
            self._keep(work, index, made, figures, there)
            if self.samples:
                self._path(work, index).unlink(missing_ok=True)
            here = there
            for figure in figures:
                done += 1
                if self.progress is not None:
                    self.progress("quantizing", done, len(self.policies), figure)

    def _path(self, work: Work, index: int) -> Path:
        return work.place / f"float-{index:05d}.states"

    def _states(self, work: Work, index: int, new: bool = False) -> States:
        """What layer ``index`` gets."""
        path = self._path(work, index) if self.samples else None
        if path is not None and index and not new and not path.is_file():
            raise UnreadableError(f"{path}: the hidden states of an interrupted run have gone; remove its work with `weighbridge clean`")
        lengths = [int(sample[0].shape[1]) for sample in self.samples]
        return States(lengths, int(self.blocks.config.hidden_size), self.blocks.dtype, path)

    def _layer(self, model: nn.Module, index: int, here: States, there: States) -> MadeLayer:
        prefix = f"{self.blocks.names[index]}."
        policies = {name: policy for name, policy in self.policies.items() if name.startswith(prefix)}
        inputs = [inputs_of(here[number], sample) for number, sample in enumerate(self.samples)]

        def made(number: int, output: Tensor) -> None:
            there[number] = output

        return quantize_layer(model, policies, inputs, made, self.settings.approach, self.settings.kv_bit == 8, self.qkv_concat)

    def _keep(self, work: Work, index: int, made: MadeLayer, figures: list[LayerFigures], there: States) -> None:
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
        work.finish(kept, types, figures, floats, smoothed, ["kv"] if made.cache else [], there.sync, dict.fromkeys(packed, INT4))

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


def _check_out(out: Path, overwrite: bool) -> None:
    """What the engine will check again after hours of work."""
    if not out.parent.is_dir():
        raise DestinationError(f"{out.parent}: there is no such folder to write into; make it first")
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise DestinationError(f"{out}: exists already; choose another destination, or pass --overwrite to replace it")


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


def _what(recipe: Recipe, device: str, data: list[Sample], spelled: str, qkv_concat: bool, source: Checkpoint) -> dict[str, Any]:
    return {
        "version": own_version(),
        "options": {
            "recipe": recipe.model_dump(exclude_defaults=True),
            "device": device,
            "norms_for": "",
            "spelled": spelled,
            "qkv_concat": qkv_concat,
            "samples": digest_of(data),
            "torch": torch.__version__,
        },
        "files": [asdict(file.identity) for file in source.tensors.files],
    }


def _bytes(progress: Report | None, plan: Any) -> Any:
    if progress is None:
        return None
    done, total = 0, plan.checkpoint.tensors.nbytes

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress("writing", min(done, total), total, None)

    return tell


def _notes(data: list[Sample], resumed: int) -> list[str]:
    notes = []
    if count := repeats(data):
        notes.append(f"{count} of {len(data)} calibration samples repeat an earlier one, and add nothing")
    if resumed:
        notes.append(f"{resumed} decoder layers were there from a run that was interrupted")
    return notes
