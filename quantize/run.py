"""Quantize a model's folder into another folder that loads as it is: the whole way, by a recipe.

The model is loaded by transformers without running code of the folder, smoothed and calibrated in memory, and written by the
conversion engine: planned, proved and certified like any conversion, with config and tokenizer of the float model beside the weights.
What can be said without the model is said before it is loaded.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import xxhash
from torch import nn

from convert.engine import run as write
from convert.memory import DEFAULT_MEMORY
from convert.options import Settings
from convert.planning import Planner
from convert.records import Plan
from formats import find_target
from formats.checkpoint import Checkpoint, Location
from formats.errors import DestinationError, RefusedError, UnreadableError, UsageError
from formats.safetensors_file import DEFAULT_SHARD_BYTES
from formats.spec import FormatSpec, Variant

from .anti_outlier import AntiOutlier
from .calibration import Sample, calibration_data, repeats
from .calibrator import Calibrator
from .config import QuantConfig
from .devices import resolve
from .layers import STATIC_TYPES, check_linear, quantize_linear, with_inputs
from .progress import LayerFigures, Report
from .recipe import Recipe, load
from .result import Quantized, check_plot, draw_plot
from .saving import checkpoint_of, tensors_of

__all__ = ["Quantized", "load_model", "load_tokenizer", "quantize_model"]


class _Clock:
    """Seconds since the step before, by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def done(self, step: str) -> None:
        now = time.monotonic()
        self.seconds[step], self._last = now - self._last, now


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
    plot: str | os.PathLike[str] | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    jobs: int | None = None,
    max_memory: int = DEFAULT_MEMORY,
    progress: Report | None = None,
) -> Quantized:
    """Quantize the float model in ``model_dir`` by ``recipe`` and write it to ``out`` in format ``to``.

    recipe     a name of ``RECIPES``, a YAML file, or a ``Recipe``
    to         as ``convert`` has it: "awq", "gptq:v2", "compressed-tensors", "msmodelslim"
    device     "cpu", "npu:0", "cuda:0": where the model is calibrated
    calib      as ``calibration_data`` has it; None where the recipe needs none
    samples    of them; None: as many as the recipe says
    plot       a PNG or SVG file for range_parm and weight error by layer
    jobs       threads that write, as ``convert`` has them; max_memory: what they may use beside the model

    :raises UsageError: a recipe, format, device or data that makes no sense
    :raises RefusedError: the format cannot hold what the recipe makes
    :raises UnreadableError: the model cannot be read, or holds values that are not finite
    :raises DestinationError: ``out`` cannot be written. Whatever is raised, ``out`` is whole or as it was
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    spec, variant, named = _target(to)
    _check_out(Path(out), overwrite)
    if plot is not None:
        check_plot(plot)
    if calib is None and recipe.needs_data:
        raise UsageError(f"recipe {recipe.name}: needs calibration data; pass --calib FILE.jsonl, a text a line")
    resolve(device)
    base = _base(model_dir)

    clock = _Clock()
    model = load_model(base.folder)
    settings = Settings(max_shard_size=max_shard_size, scale_dtype=_scales(spec), jobs=jobs, max_memory=max_memory)
    trial = _trial(model, recipe, device)
    Planner(trial, spec, variant, named, settings, base).plan(probe=False).raise_if_refused()
    clock.done("load")
    data = _data(calib, base, recipe, samples)
    smoothed = _smooth(model, data, recipe, device, progress)
    clock.done("smooth")
    calibrator = Calibrator(model, recipe.quant_config(device), data, recipe.disable_level, mix_cfg=dict(recipe.mix_cfg))
    _calibrate(calibrator, progress)
    clock.done("calibrate")
    plan = _plan(calibrator, recipe, spec, variant, named, settings, base)
    plan.raise_if_refused()
    written = write(plan, out, overwrite=overwrite, progress=_bytes(progress, plan))
    clock.done("write")

    layers = figures(calibrator)
    if plot is not None:
        draw_plot(layers, plot, f"{base.folder.resolve().name}, {recipe.name}")
    return Quantized(
        recipe, written, layers, tuple(calibrator.float_names), len(data), smoothed, tuple(_notes(calibrator, data)), clock.seconds
    )


def figures(calibrator: Calibrator) -> tuple[LayerFigures, ...]:
    """How each layer of a calibrator that has run fared."""
    ranges = calibrator.range_parm
    return tuple(LayerFigures(name, layer.kind, layer.weight_error, ranges.get(name)) for name, layer in calibrator.layers.items())


def load_model(folder: Path) -> Any:
    """The float model in its own dtype. Raises UnreadableError where transformers cannot load it."""
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    name = "dtype" if version >= (4, 56) else "torch_dtype"
    library: Any = transformers
    try:
        with _without_bars(library.utils.logging):
            model = library.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **{name: "auto"})
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnreadableError(f"{folder}: transformers {transformers.__version__} cannot load it ({first.strip():.300})") from error
    return model.eval()


@contextlib.contextmanager
def _without_bars(logging: Any) -> Iterator[None]:
    """Without transformers' bars on stderr."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; of one whose class this transformers does not know, what tokenizer.json says."""
    library: Any = transformers
    try:
        return library.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not (folder / "tokenizer.json").is_file():
            raise UnreadableError(f"{folder}: its tokenizer cannot be loaded ({str(error).splitlines()[0]:.300})") from error
        return library.PreTrainedTokenizerFast(tokenizer_file=os.fspath(folder / "tokenizer.json"))


def _target(to: str) -> tuple[FormatSpec, Variant, bool]:
    spec, variant, named = find_target(to)
    assert variant.holds is not None
    if variant.holds.dequantized:
        raise UsageError(f"--to {to}: holds no quantized weights, so there is nothing to quantize for; name another format")
    return spec, variant, named


def _scales(spec: FormatSpec) -> str | None:
    """msModelSlim's files keep the dtype of every scale, as the tool leaves it; others take what their loaders want."""
    return "keep" if spec.name == "msmodelslim" else None


def _check_out(out: Path, overwrite: bool) -> None:
    """What the engine will check again after hours of work."""
    if not out.parent.is_dir():
        raise DestinationError(f"{out.parent}: there is no such folder to write into; make it first")
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise DestinationError(f"{out}: exists already; choose another destination, or pass --overwrite to replace it")


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


def _kind(name: str, config: QuantConfig, mix_cfg: Mapping[str, str]) -> QuantConfig:
    """How ``Calibrator`` quantizes the linear ``name``: as ``mix_cfg`` says by name, else by its first pattern that matches."""
    found = mix_cfg.get(name) or next((kind for rule, kind in mix_cfg.items() if fnmatch.fnmatchcase(name, rule)), None)
    return config if found is None else config.for_layer(found)


def _trial(model: Any, recipe: Recipe, device: str) -> Checkpoint:
    """What calibration would make of one linear of each shape and kind, in memory: enough to ask the target before hours of work."""
    main = recipe.quant_config(device)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = {*(main.disable_names or ()), *(list(linears)[-1:] if main.disable_last_linear else ())}
    chosen: dict[tuple[object, ...], tuple[str, QuantConfig]] = {}
    for name, linear in linears.items():
        config = _kind(name, main, recipe.mix_cfg)
        if name not in left and config.model_quant_type != "FLOAT":
            chosen.setdefault((config.model_quant_type, *linear.weight.shape), (name, config))
    layers, state = {}, {}
    for name, config in chosen.values():
        linear = linears[name]
        check_linear(name, linear, config)
        layer, _ = quantize_linear(name, linear, config)
        one = layer.weight_scale.new_ones(1)
        layers[name] = with_inputs(layer, one, one - 1) if layer.kind in STATIC_TYPES else layer
        state[f"{name}.weight"] = linear.weight
    cache = {}
    if main.use_kvcache_quant and layers:
        name = next(iter(layers))
        cache = {f"{name}.kv_cache_{part}": torch.zeros(1, dtype=model.dtype) for part in ("scale", "offset")}
    made: Any = SimpleNamespace(
        model=SimpleNamespace(state_dict=lambda: state, config=model.config),
        layers=layers,
        cfg=main,
        kv_cache=cache,
        attention={},
        torch_dtype=model.dtype,
    )
    return checkpoint_of(made)


def _data(calib: Any, base: Location, recipe: Recipe, samples: int | None) -> list[Sample]:
    if calib is None:
        return []
    wanted = recipe.calibration
    count = wanted.samples if samples is None else samples
    texts = isinstance(calib, (str, os.PathLike)) or any(isinstance(one, (str, dict)) for one in calib)
    tokenizer = load_tokenizer(base.folder) if texts else None
    return calibration_data(calib, tokenizer, samples=count, length=wanted.length, template=wanted.template)


def _smooth(model: Any, data: list[Sample], recipe: Recipe, device: str, progress: Report | None) -> int:
    """Run AntiOutlier if the recipe says so; how many sources it smoothed."""
    config = recipe.anti_outlier_config(device)
    if config is None:
        return 0
    done: list[str] = []

    def begun(source: str) -> None:
        done.append(source)
        if progress is not None:
            progress("smoothing", len(done), total, None)

    smoother = AntiOutlier(model, data, config, progress=begun)
    total = len(smoother.subgraphs())
    smoother.process()
    return total


def _calibrate(calibrator: Calibrator, progress: Report | None) -> None:
    words = {"layers": "rounding", "samples": "calibrating"}

    def tell(what: str, done: int, of: int) -> None:
        if progress is None:
            return
        layer = None
        if what == "layers":
            name = next(reversed(calibrator.layers))
            made = calibrator.layers[name]
            layer = LayerFigures(name, made.kind, made.weight_error, calibrator.range_parm.get(name))
        progress(words.get(what, what), done, of, layer)

    calibrator.run(progress=tell)


def _plan(
    calibrator: Calibrator, recipe: Recipe, spec: FormatSpec, variant: Variant, named: bool, settings: Settings, base: Location
) -> Plan:
    norms_for = variant.name if spec.name == "msmodelslim" and variant.name in {"safe_tensor", "ascendv1"} else ""
    checkpoint = checkpoint_of(calibrator, norms_for)
    checkpoint.location = replace(checkpoint.location, folder=base.folder)  # the source that must not be written into
    plan = Planner(checkpoint, spec, variant, named, settings, base).plan(probe=True)
    # Says in the certificate what was done, and keeps a run that goes on with an interrupted one's work from mixing two calibrations.
    plan.options |= {"recipe": recipe.model_dump(exclude_defaults=True), "content": _digest(calibrator)}
    return plan


def _digest(calibrator: Calibrator) -> str:
    """XXH3-128 of every tensor's bytes."""
    digest = xxhash.xxh3_128()
    for name, array in tensors_of(calibrator)[0].items():
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(memoryview(array.view("u1").reshape(-1)) if array.ndim else array.tobytes())
    return digest.hexdigest()


def _bytes(progress: Report | None, plan: Plan) -> Any:
    """The engine's progress, which says how many bytes more, for ours, which says how many so far."""
    if progress is None:
        return None
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress("writing", min(done, plan.source_bytes), plan.source_bytes, None)

    return tell


def _notes(calibrator: Calibrator, data: list[Sample]) -> list[str]:
    notes = []
    if count := repeats(data):
        notes.append(f"{count} of {len(data)} calibration samples repeat an earlier one, and add nothing")
    if not calibrator.layers:
        notes.append("no linear was quantized")
    if calibrator.cfg.model_quant_type in {"W8A8", "W8A8S"} and len(data) < 10:
        notes.append(f"{len(data)} calibration samples are few for static activations; msModelSlim's guide takes 10 to 50")
    return notes
