"""``tune``: which AntiOutlier method, and which linears left in float, bring a quantized model back to a share of the float one.

What a tuning guide does by hand, in its order:

1. The recipe with each AntiOutlier method, and with none; every linear quantized.
2. From the best of them down: linears of the largest range_parm become float, as ``disable_level`` has it: 1, 2, 4, ... of them until the
   target is reached, then half way back and forth for the fewest. A method after the first has to do with fewer.
3. Of the fewest, each is quantized again, the calmest first, and stays so where the target holds.

A *trial* is one such setting. Nothing is written for it: the layers are quantized one after the other in memory, and the data to measure
by goes through each as it is then. So a trial costs about what quantizing does. It depends on its setting alone, so trials can be kept,
and a run that was interrupted does not repeat them.

The share is float perplexity over perplexity (texts), or accuracy over float accuracy (questions).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from convert.replacing import replace_files
from formats import open_checkpoint
from formats.errors import DestinationError, UsageError

from .blocks import Blocks, Sample, advance
from .calibration import calibration_data, key_of
from .choice import chosen_linears
from .config import ANTI_METHODS, AntiOutlierConfig
from .devices import HOST, resolve
from .evaluation import ModelFigures, figures_of
from .layerwise import Job, LayerRun, whole_model_only
from .measure import Served, measure, predictions
from .outputs import check_new
from .recipe import Recipe, load, loads
from .samples import Data, length_of, read_data, tokenizer_of
from .work import digest_of, what_of

__all__ = ["Trial", "Tuned", "Tuner", "tune_model"]

METHODS = (None, *ANTI_METHODS)
BUDGET = 40


@dataclass(frozen=True)
class Trial:
    """One setting and what came of it. floats: linears left in float beyond the recipe's own; share: of the float model's figure."""

    method: str | None
    floats: tuple[str, ...]
    figures: ModelFigures
    share: float

    @property
    def name(self) -> str:
        """What was tried, for people."""
        return f"{self.method or 'no smoothing'}, {len(self.floats)} more in float" if self.floats else self.method or "no smoothing"

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, "floats": list(self.floats), "share": self.share, **self.figures.to_json()}


@dataclass(frozen=True)
class Tuned:
    """What ``tune_model`` found: the float model's figures, all trials in their order, the one that was chosen, and the recipe of it."""

    reference: ModelFigures
    trials: tuple[Trial, ...]
    best: Trial
    target: float
    recipe: str
    notes: tuple[str, ...] = ()

    @property
    def reached(self) -> bool:
        return self.best.share >= self.target

    def to_json(self) -> dict[str, Any]:
        """What ``weighbridge tune --json`` prints."""
        return {
            "reference": self.reference.to_json(),
            "target": self.target,
            "reached": self.reached,
            "best": self.best.to_json(),
            "trials": [trial.to_json() for trial in self.trials],
            "recipe": self.recipe,
            "notes": list(self.notes),
        }


def tune_model(
    model_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    target: float = 0.99,
    *,
    calib: str | os.PathLike[str],
    data: str | os.PathLike[str],
    recipe: str | os.PathLike[str] | Recipe = "w8a8",
    budget: int = BUDGET,
    methods: Sequence[str | None] = METHODS,
    samples: int | None = None,
    length: int | None = None,
    device: str = HOST,
    overwrite: bool = False,
    told: Callable[[Trial], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Tuned:
    """Find how to quantize the float model in ``model_dir``, and write it as a recipe to ``out``.

    target      share of the float model's figure that is to be reached, above 0 up to 1
    calib       calibration data; data: what is measured by, as ``evaluate`` has it: a text, texts or questions that calib has not
    recipe      what to begin with; its own AntiOutlier method is tried with its settings, the others with their defaults
    budget      how many trials at most
    methods     AntiOutlier methods to try; None: no smoothing
    samples     of ``data`` at most; length: tokens of a window, text or question at most
    told        is given each trial as it ends; progress: (what, done, of) within one
    overwrite   replaces a file that is there

    The trials are kept beside ``out`` until it is written, so the same call goes on with them.

    :raises UsageError: arguments that make no sense, a recipe that does not go layer by layer
    :raises DestinationError: ``out`` is there, or the trials beside it are of another run
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    place = Path(out)
    _check(target, budget, methods, place, overwrite, recipe)
    source = open_checkpoint(Path(model_dir))
    tokenizer, blocks = tokenizer_of(source.location), Blocks.open(source)
    wanted = recipe.calibration
    calibrating = calibration_data(calib, tokenizer, samples=wanted.samples, length=wanted.length, template=wanted.template)
    judged = read_data(data, tokenizer, samples=samples, length=length_of(blocks.config, length))
    chosen_linears(blocks.model, recipe.quant_config(device), recipe.mix_cfg)  # refuses what cannot be
    what = what_of(source, recipe, device, calibration=digest_of(calibrating), data=digest_of(judged.samples))
    with _Kept(place.with_name(f".{place.name}.trials"), what) as kept:
        tuner = Tuner(blocks, recipe, calibrating, judged, device, kept, told, progress)
        best = _search(tuner, target, budget, methods)
        text = _recipe_text(recipe, best, tuner.reference, target)
        loads(text, place.name)
        replace_files(place.parent, {place.name: text.encode()})
        kept.done = True
    notes = []
    if best.share < target:
        more = f"{len(tuner.trials)} trials, the budget, were made" if len(tuner.trials) >= budget else "nothing more was left to try"
        notes.append(f"the target of {target:g} was not reached ({best.share:.4f} is the best); {more}")
    if {key_of(sample[0]) for sample in calibrating} & {key_of(sample[0]) for sample in judged.samples}:
        notes.append("the data to measure by has samples of the calibration data, so the figures flatter")
    return Tuned(tuner.reference, tuple(tuner.trials), best, target, text, tuple(notes))


def _check(target: float, budget: int, methods: Sequence[str | None], out: Path, overwrite: bool, recipe: Recipe) -> None:
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target <= 1:
        raise UsageError(f"target: {target!r} is no share of the float model's figure, above 0 up to 1")
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise UsageError(f"budget: {budget!r} is not a whole number of trials from 1")
    for method in methods:
        if method not in METHODS:
            raise UsageError(f"methods: {method!r} is not one of {', '.join(ANTI_METHODS)}, or None")
    if not methods:
        raise UsageError("methods: there is none to try")
    check_new(out, overwrite)
    if recipe.disable_level != "L0":
        raise UsageError(f"recipe {recipe.name}: disable_level is what is searched; leave it out")
    if why := whole_model_only(Job.of(recipe, HOST)):
        raise UsageError(f"recipe {recipe.name}: {why}, and trials go one layer at a time")


class Tuner:
    """Makes trials, and keeps them.

    reference   the float model's figures; trials: those made so far, or found, in order
    """

    def __init__(
        self,
        blocks: Blocks,
        recipe: Recipe,
        calibrating: Sequence[Sample],
        data: Data,
        device: str = HOST,
        kept: Any = None,
        told: Callable[[Trial], None] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.blocks, self.recipe, self.data, self.device = blocks, recipe, data, device
        self.calibrating = calibrating
        self.trials: list[Trial] = []
        self.ranges: dict[str | None, dict[str, float]] = {}
        self._kept, self._told, self._progress = kept, told, progress or (lambda what, done, of: None)
        found = measure(Served(blocks), data.samples, choices=data.choices, device=resolve(device)).samples
        self.reference = figures_of(data, [one.model for one in found], sum(one.positions for one in found))

    def smoothing(self, method: str | None) -> AntiOutlierConfig | None:
        """The recipe's own settings of its method, the defaults of another."""
        if method is None:
            return None
        own = self.recipe.anti_outlier_config(self.device)
        return own if own is not None and own.anti_method == method else AntiOutlierConfig(anti_method=method, dev_type=self.device)

    def linears(self, method: str | None) -> list[str]:
        """Linears that the recipe quantizes, those of the largest range_parm first, once that method was tried."""
        ranges = self.ranges[method]
        return sorted(ranges, key=ranges.__getitem__, reverse=True)

    def trial(self, method: str | None, floats: Sequence[str] = ()) -> Trial:
        """Quantize and measure, unless that trial was made."""
        made = next((one for one in self.trials if one.method == method and set(one.floats) == set(floats)), None)
        if made is not None:
            return made
        key = {"method": method, "floats": sorted(floats)}
        kept = None if self._kept is None else self._kept.get(key)
        if kept is None:
            content, ranges = self._run(method, frozenset(floats))
            kept = {"figures": content, "ranges": ranges}
            if self._kept is not None:
                self._kept.add(key, kept)
        if not floats:
            self.ranges[method] = kept["ranges"]
        figures = ModelFigures.of(kept["figures"])
        trial = Trial(method, tuple(floats), figures, _share(figures, self.reference))
        self.trials.append(trial)
        if self._told is not None:
            self._told(trial)
        return trial

    def _run(self, method: str | None, floats: frozenset[str]) -> tuple[dict[str, Any], dict[str, float]]:
        run = LayerRun(self.blocks, replace(Job.of(self.recipe, self.device), anti_outlier=self.smoothing(method)), self.calibrating)
        samples, device = self.data.samples, resolve(self.device)
        states = self.blocks.begin(samples, device=device)
        run.begin()
        ranges: dict[str, float] = {}
        chosen = set(run.to_quantize())
        for made in run.layers(floats=floats):
            ranges |= {name: ratio for name, ratio in made.range_parm.items() if name in chosen}
            advance(made.model, states, samples)
            self._progress("layers", made.index + 1, len(self.blocks))
        found = list(predictions([Served(self.blocks)], [states], samples, self.data.choices, device=device))
        figures = figures_of(self.data, [one.model for one in found], sum(one.positions for one in found))
        return figures.to_json(), ranges


def _share(figures: ModelFigures, reference: ModelFigures) -> float:
    if figures.accuracy is not None and reference.accuracy is not None:
        return float(figures.accuracy) / float(reference.accuracy) if reference.accuracy.right else 1.0
    assert figures.perplexity is not None
    assert reference.perplexity is not None
    return reference.perplexity / figures.perplexity


def _search(tuner: Tuner, target: float, budget: int, methods: Sequence[str | None]) -> Trial:
    """The trial with the fewest float linears that reaches the target, else the best one."""
    for method in methods[:budget]:
        tuner.trial(method)
    order = sorted(tuner.trials, key=lambda trial: -trial.share)
    if order[0].share >= target:
        return order[0]
    fewest: Trial | None = None
    for first in order:
        ranked = tuner.linears(first.method)
        found = _fewest(tuner, first.method, ranked, target, budget, len(ranked) + 1 if fewest is None else len(fewest.floats))
        fewest = found or fewest
    if fewest is None:
        return max(tuner.trials, key=lambda trial: trial.share)
    for name in reversed(fewest.floats):
        if len(tuner.trials) < budget:
            trial = tuner.trial(fewest.method, [other for other in fewest.floats if other != name])
            fewest = trial if trial.share >= target else fewest
    return fewest


def _fewest(tuner: Tuner, method: str | None, ranked: Sequence[str], target: float, budget: int, below: int) -> Trial | None:
    """Fewer than ``below`` of the first of ``ranked`` in float that reach the target, by doubling and halving; None if none do."""
    best, low, count = None, 0, 1 if below > len(ranked) else below - 1
    while 0 < count < below and len(tuner.trials) < budget:
        trial = tuner.trial(method, ranked[:count])
        if trial.share >= target:
            best, below = trial, count
        else:
            low = count
        if best is None:
            if below <= len(ranked):
                break  # one fewer than another method needs is not enough here
            count = min(2 * count, len(ranked)) if count < len(ranked) else 0
        else:
            count = (low + below) // 2 if below - low > 1 else 0
    return best


def _recipe_text(recipe: Recipe, best: Trial, reference: ModelFigures, target: float) -> str:
    """The recipe of the chosen trial, as YAML."""
    content: dict[str, Any] = recipe.model_dump(exclude_defaults=True)
    own = content.pop("anti_outlier", None)
    if best.method is not None:
        content["anti_outlier"] = own if own is not None and own.get("anti_method") == best.method else {"anti_method": best.method}
    if best.floats:
        content["quant"]["disable_names"] = sorted({*(content["quant"].get("disable_names") or ()), *best.floats})
    content["about"] = f"{recipe.name}, tuned: {best.share:.4f} of the float model ({best.figures} for {reference}); {target:g} was wanted"
    order = ("about", "anti_outlier", "quant")
    return yaml.safe_dump({**{key: content[key] for key in order if key in content}, **content}, sort_keys=False, width=120)


class _Kept:
    """Trials in a file of JSON lines, the first of which says what they are trials of; removed once ``done``."""

    def __init__(self, path: Path, what: Mapping[str, Any]) -> None:
        self.path, self.done = path, False
        self._what = json.dumps(what, sort_keys=True)
        self._found: dict[str, Any] = {}

    def __enter__(self) -> _Kept:
        if self.path.exists():
            self._read()
        else:
            self.path.write_text(self._what + "\n", "utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        if self.done or not self._found:
            self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        lines = self.path.read_bytes().split(b"\n")
        if lines[0].decode("utf-8", "replace") != self._what:
            raise DestinationError(f"{self.path}: holds the trials of another model, recipe or data; remove it, or choose another name")
        for number, line in enumerate(lines[1:-1], 2):  # the last one is empty, or was cut
            try:
                key, value = json.loads(line)
                self._found[key] = {"figures": value["figures"], "ranges": value["ranges"]}
            except (ValueError, KeyError, TypeError):
                raise DestinationError(f"{self.path}, line {number}: is damaged, so its trials cannot be gone on with; remove it") from None
        self.path.write_bytes(b"\n".join(lines[:-1]) + b"\n")

    def get(self, key: Mapping[str, Any]) -> Any:
        """What was kept of a trial, or None."""
        return self._found.get(json.dumps(key, sort_keys=True))

    def add(self, key: Mapping[str, Any], value: Any) -> None:
        """Keep a trial."""
        text = json.dumps(key, sort_keys=True)
        self._found[text] = value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([text, value]) + "\n")
            file.flush()
            os.fsync(file.fileno())
