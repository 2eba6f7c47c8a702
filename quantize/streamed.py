"""Data-free rounding of a float folder, streamed: the conversion engine reads float weights and writes codes, without torch.

A model that needs no calibration data (W8A16, W4A16, W8A8_DYNAMIC by MinMax, symmetric; Golden Stick's too) need not be a model: its
linears are read in tiles, rounded as ``quantize.rounding`` or ``quantize.golden_stick`` rounds them, bit for bit, and written like any
conversion: in constant memory, resumable, and with a certificate. What is proved is that the file holds these codes and scales. How far
they are from the float weights, layer by layer, is summed as they are made (``rounded_tiles``); of what an interrupted run had written
already, it is made once more at the end.

Linears are the 2-D ``.weight`` tensors of numbered blocks; routers of experts (``gate``) and what lies outside the blocks (lm_head,
embeddings) stay float, as with msModelSlim's ``disable_last_linear``.
"""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.engine import Progress, Result, entries_in_flight, run
from convert.memory import DEFAULT_MEMORY, LIBRARIES
from convert.options import Settings
from convert.planning import Planner
from convert.records import Plan
from convert.staging import check_unfinished
from convert.targets import Target, find_target
from formats import open_checkpoint
from formats.checkpoint import FLOATS, Checkpoint, Location, float_linears, float_matrices
from formats.errors import RefusedError, UnreadableError, UsageError
from formats.ir import QuantArgs, QuantizedLinear, QuantScheme, read
from formats.safetensors_file import DEFAULT_SHARD_BYTES

from .golden_stick_config import names_of_linear
from .outputs import scales_in
from .progress import LayerFigures, Report
from .result import Quantized, check_plot, draw_plot
from .rounded_tiles import PIECE, Codes, Errors, Rounding, ScaleBands, Scales

if TYPE_CHECKING:
    from .recipe import Recipe

ROUTERS = ("gate", "shared_expert_gate", "router")
"""Leaf names of linears that choose experts."""
_SHARE = 4
"""Scales may take one part in so many of the memory that is left."""


Rule = Callable[[str], "Rounding | None"]
"""How the linear of that name is rounded; None: it stays in float."""


def is_streamed(recipe: Recipe) -> bool:
    """Whether a recipe needs neither data nor a model."""
    settings = recipe.golden_stick_settings()
    if settings is None:
        return rounding_of(recipe) is not None
    return not settings.needs_data and all(policy.w_sym for policy in settings.policies)


def rounding_of(recipe: Recipe) -> Rounding | None:
    """How a recipe in msModelSlim's words rounds, if it needs no data and no model; None if it does."""
    config = recipe.quant_config()
    plain = config.w_method == "MinMax" and config.w_sym and not config.co_sparse and set(recipe.mix_cfg.values()) <= {"float"}
    if recipe.needs_data or not plain or config.model_quant_type not in {"W8A16", "W4A16", "W8A8_DYNAMIC"}:
        return None
    if (not config.is_per_group and (config.is_lowbit or config.mm_tensor)) or not config.disable_last_linear:
        return None
    return Rounding(config.w_bit, config.group_size if config.is_per_group else -1, config.model_quant_type == "W8A8_DYNAMIC")


class Rounded(Checkpoint):
    """A float checkpoint whose linears are seen rounded, by one rule or each by its own."""

    def __init__(
        self, dense: Checkpoint, rounding: Rounding | Rule, disable_names: tuple[str, ...] = (), patterns: tuple[str, ...] = ()
    ) -> None:
        kind = f"w{rounding.bits}a{8 if rounding.dynamic else 16}" if isinstance(rounding, Rounding) else "rounded"
        super().__init__(dense.location, "float", kind, dense.tensors)
        if dense.format not in {"dense", "mindspore"} or dense.layer_names:
            raise UsageError(f"{dense.location.folder.name}: is quantized ({dense.format}) already; give the float model")
        self.errors, self._bands = Errors(), ScaleBands(DEFAULT_MEMORY // _SHARE)
        linears = float_linears(dense)
        for name in disable_names:
            if name not in linears and f"{name}.weight" not in dense.tensors:
                raise UsageError(f"disable_names: {name!r} is no linear of this model; its first is {next(iter(linears), 'none')!r}")
        floats = {name for name in linears for rule in patterns if fnmatch.fnmatchcase(name, rule)} | set(disable_names)
        chosen = (name for name in linears if name not in floats and name.rpartition(".")[2] not in ROUTERS)
        found = {name: rounding if isinstance(rounding, Rounding) else rounding(name) for name in chosen}
        self.roundings = {name: one for name, one in found.items() if one is not None}
        self.linears = frozenset(self.roundings)
        heads = (name for name in float_matrices(dense) if name.rpartition(".")[2] == "lm_head")
        self.float_linears = (*(name for name in linears if name not in self.linears), *heads)
        for name in self.linears:
            self._check(name)
        for _, tensor in dense.entries:
            module, _, leaf = tensor.rpartition(".")
            if module not in self.linears:
                self.entries.append(("plain", tensor))
            elif leaf == "weight":
                self.entries.append(("layer", module))

    def _check(self, name: str) -> None:
        info = self.tensors[f"{name}.weight"]
        if info.dtype not in FLOATS:
            raise UnreadableError(f"{name}: weight is {info.dtype}, wanted F16, BF16 or F32; the model is not a float one")
        group_size = self.roundings[name].group_size
        if group_size != -1 and info.shape[1] % group_size:
            raise UsageError(
                f"{name}: {info.shape[1]} inputs are not whole groups of {group_size}; choose another group size, or "
                "add the layer to disable_names"
            )

    def layer_tensors(self, name: str) -> tuple[str, ...]:
        return tuple(tensor for tensor in (f"{name}.weight", f"{name}.bias") if tensor in self.tensors)

    def layer(self, name: str) -> QuantizedLinear:
        scales, rounding = self._scales(name), self.roundings[name]
        group = None if rounding.group_size == -1 else rounding.group_size
        args = QuantArgs(rounding.bits, "int", True, "channel" if group is None else "group", group)
        inputs = QuantArgs(8, "int", True, "token", dynamic=True) if rounding.dynamic else None
        bias = self.tensors.tensor(f"{name}.bias") if f"{name}.bias" in self.tensors else None
        out, in_ = scales.weight.shape
        layer = QuantizedLinear(name, (out, in_), QuantScheme(args, inputs), Codes(scales, self.errors), scales, bias=bias)
        layer.check()
        return layer

    def _scales(self, name: str) -> Scales:
        weight: Any = self.tensors.tensor(f"{name}.weight")
        return Scales(name, weight, self.roundings[name], self._bands)

    def keep_scales(self, limit: int, layers: int) -> None:
        """Keep the scales of so many layers, the largest there are, in memory; at most ``limit`` bytes. The plan counts them."""
        largest = sorted((self._scales(name).nbytes for name in self.layer_names), reverse=True)[:layers]
        self.kept = min(limit, sum(largest))
        self._bands = ScaleBands(self.kept)

    def figures(self, names: Iterable[str], workers: int) -> Iterator[LayerFigures]:
        """How far each layer is from its float weights, in the order of ``names``; what was not rounded in this process is, for this."""

        def error_of(name: str) -> float:
            if self.errors.of(name) is None:
                self.errors.forget(name)
                codes = self.layer(name).codes
                height = max(1, PIECE // codes.shape[1])
                for top in range(0, codes.shape[0], height):
                    read(codes, slice(top, min(top + height, codes.shape[0])))
            found = self.errors.of(name)
            assert found is not None
            return found

        names = list(names)
        with ThreadPoolExecutor(workers) as pool:
            for name, error in zip(names, pool.map(error_of, names), strict=True):
                yield LayerFigures(name, self.roundings[name].kind, error)


def _rule(recipe: Recipe, model: str | os.PathLike[str] | Location) -> Rounding | Rule:
    """How a recipe that ``is_streamed`` takes rounds the model's linears."""
    settings = recipe.golden_stick_settings()
    if settings is None:
        rounding = rounding_of(recipe)
        assert rounding is not None
        return rounding
    config = open_checkpoint(model if isinstance(model, Location) else Path(model)).config or {}

    def rule(name: str) -> Rounding | None:
        policy = settings.policy_of(names_of_linear(name, config.get("model_type")))
        return None if policy is None else Rounding(policy.w_bit, policy.group_size, policy.is_dynamic, golden_stick=True)

    return rule


def quantize_streamed(
    model: str | os.PathLike[str] | Location,
    out: str | os.PathLike[str],
    recipe: Recipe,
    to: str | Target,
    *,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    scale_dtype: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    plot: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    max_memory: int = DEFAULT_MEMORY,
    progress: Report | None = None,
    calib: str | os.PathLike[str] | None = None,
    qkv_concat: bool = False,
) -> Quantized:
    """Quantize the float model in folder ``model`` by a recipe that ``is_streamed`` takes; see ``round_folder``.

    plot    a PNG or SVG file for the error of each layer's weight; resume: an interrupted run must have left its work
    calib   calibration data, which are not read: a note says so
    to      what ``find_target`` takes, or gives; scale_dtype, qkv_concat: as ``convert`` has them
    """
    if not is_streamed(recipe):
        raise UsageError(f"recipe {recipe.name}: needs the model itself, so it cannot be streamed")
    if plot is not None:
        check_plot(plot)
    if resume:
        check_unfinished(out)
    begun = time.monotonic()
    names = () if recipe.golden_stick is not None else tuple(recipe.quant_config().disable_names or ())
    written = round_folder(
        model, out, _rule(recipe, model), to, disable_names=names, patterns=tuple(recipe.mix_cfg), max_shard_size=max_shard_size,
        scale_dtype=scale_dtype, overwrite=overwrite, jobs=jobs, max_memory=max_memory, progress=progress, recipe=recipe,
        qkv_concat=qkv_concat,
    )  # fmt: skip
    done = time.monotonic()
    checkpoint = written.plan.checkpoint
    assert isinstance(checkpoint, Rounded)
    layers = tuple(checkpoint.figures(checkpoint.layer_names, written.plan.memory.jobs))
    seconds = {"write": done - begun, "figures": time.monotonic() - done}
    if plot is not None:
        draw_plot(layers, plot, f"{checkpoint.location.folder.resolve().name}, {recipe.name}")
    notes = () if calib is None else (f"recipe {recipe.name} rounds weights alone: the calibration data were not read",)
    return Quantized(recipe, written, layers, checkpoint.float_linears, samples=0, notes=notes, seconds=seconds)


def round_folder(
    model: str | os.PathLike[str] | Location,
    out: str | os.PathLike[str],
    rounding: Rounding | Rule,
    to: str | Target,
    *,
    disable_names: tuple[str, ...] = (),
    patterns: tuple[str, ...] = (),
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    scale_dtype: str | None = None,
    overwrite: bool = False,
    proof: bool = True,
    jobs: int | None = None,
    max_memory: int = DEFAULT_MEMORY,
    progress: Report | None = None,
    recipe: Recipe | None = None,
    qkv_concat: bool = False,
) -> Result:
    """Round the linears of a float folder and write it as format ``to``, into folder ``out``.

    disable_names   linears that stay float; patterns: the same, as ``fnmatch`` patterns that need not match any
    max_memory      bytes over the bare interpreter's; with scale_dtype and jobs, as ``convert`` has them
    progress        is told of each linear as it is written, with its error, unless an interrupted run had written (a part of) it
    recipe          what the certificate names, where the rounding is a recipe's

    raises  UsageError, UnreadableError, RefusedError, DestinationError, NotSameError; nothing visible is left at ``out``
    """
    target = find_target(to) if isinstance(to, str) else to
    checkpoint = Rounded(open_checkpoint(model if isinstance(model, Location) else Path(model)), rounding, disable_names, patterns)
    scale_dtype = scale_dtype or scales_in(target.spec, golden_stick=not isinstance(rounding, Rounding))
    settings = Settings(jobs=jobs, max_shard_size=max_shard_size, scale_dtype=scale_dtype, max_memory=max_memory, qkv_concat=qkv_concat)
    checkpoint.keep_scales(max(0, max_memory - LIBRARIES) // _SHARE, entries_in_flight(settings.workers))
    # A probe would read every weight, to find what is so by construction: symmetric, finite, in range.
    plan = Planner(checkpoint, target, settings).plan(probe=False)
    if recipe is not None and recipe.golden_stick is not None:
        _check_words(plan)
        plan.options |= {"recipe": recipe.model_dump(exclude_defaults=True)}
    return run(plan, out, overwrite=overwrite, proof=proof, progress=None if progress is None else _teller(checkpoint, progress))


def _check_words(plan: Plan) -> None:
    """RefusedError for a layer that the target has no words for, which a probe would have asked."""
    for layer in plan.layers:
        found = plan.spec.objection(layer.target, plan.variant.name)
        if found is not None:
            raise RefusedError(f"{layer.target.name}: needs {found.needs}; {plan.target_name} {found.offers}; {found.hint} [{found.code}]")


def _teller(checkpoint: Rounded, progress: Report) -> Progress:
    """The engine's progress, which is called for every entry in order, for ours, which is told of layers."""
    entries, total, done = iter(checkpoint.entries), len(checkpoint.linears), 0

    def tell(count: int) -> None:
        nonlocal done
        kind, name = next(entries)
        if kind == "layer":
            done += 1
            error = checkpoint.errors.of(name)
            progress("rounding", done, total, None if error is None else LayerFigures(name, checkpoint.roundings[name].kind, error))

    return tell
