"""``score_samples``: by how much quantization moves what the model says to each sample; and calibration data chosen by it.

For the advice of msModelSlim's tuning guide on calibration data, when smoothing and static scales alone do not help:

1. More data, up to some 50 samples (of long ones fewer are sometimes better): several files are scored together, repeated samples count
   once, and ``extend`` adds what is chosen to the present calibration data.
2. Data of the deployment's domain: with ``calib``, the model is quantized by the present data and other data are scored. ``by_file`` shows
   which domain it fits badly, and ``each`` takes as many of every file.
3. Samples whose answers quantization changes much ("bad cases") are left out (``drop``, ``keep``), or are what to calibrate by
   (``worst``). The guide's sentence can be read either way; which helps is to be measured (``evaluate``).
4. The format: what is written are the sources' own lines, which ``quantize --calib`` reads.

A sample's score is the KL divergence of the float model's distribution from the quantized one's, in nats: its mean over all positions,
or what is said after the last token. The quantized model is simulated from a folder (``measure``): one that is named, or one that is
made by a recipe, in a temporary folder that is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.replacing import replace_files
from formats.errors import DestinationError, RefusedError, UsageError

from .calibration import key_of, read_objects
from .config import QuantConfig
from .devices import resolve
from .evaluation import dtype_of, open_model
from .measure import SampleFigures, Served, measure
from .outputs import check_new
from .progress import Report
from .recipe import Recipe, load
from .run import quantize_model
from .samples import Data, length_of, read_data, tokenizer_of

__all__ = ["Choice", "SampleScore", "Scores", "score_samples"]


@dataclass(frozen=True)
class Choice:
    """Which samples to take: ``count`` of them, by how much quantization moves them.

    how    "keep": those it moves least; "drop": all but those it moves most; "worst": those it moves most
    each   ``count`` of every file, not of all together
    """

    how: str
    count: int
    each: bool = False

    def of(self, scores: Sequence[SampleScore]) -> list[SampleScore]:
        """The chosen ones, in their order; repeats of an earlier sample never are. UsageError if none is left."""
        if self.how not in {"keep", "drop", "worst"} or self.count < 1:
            raise UsageError(f"{self.how} {self.count}: wanted keep, drop or worst, and a whole number from 1")
        files = dict.fromkeys(one.file for one in scores)
        groups = [[one for one in scores if one.file == file] for file in files] if self.each else [list(scores)]
        chosen: set[int] = set()
        for group in groups:
            ranked = sorted((one for one in group if not one.repeats), key=lambda one: (-one.score, one.number))
            part = {"worst": ranked[: self.count], "drop": ranked[self.count :], "keep": ranked[max(len(ranked) - self.count, 0) :]}
            chosen |= {one.number for one in part[self.how]}
        if not chosen:
            raise UsageError(f"{self.how} {self.count}: leaves none of {len(scores)} samples")
        return [one for one in scores if one.number in chosen]


@dataclass(frozen=True)
class SampleScore:
    """One sample. number: its place among all, from 0; where: its place in the file; line: what can be written, None for plain text.

    score         the figure that counts: kl or last_kl; mean over all positions, and after the last token, nats
    same_token    whether both models find the same token likeliest after the last one
    answer        of a question: the right one; float_answer, quantized_answer: the models'
    repeats       an earlier sample, or with ``extend`` one of the calibration data, has the same tokens
    """

    number: int
    file: str
    where: str
    line: str | None
    tokens: int
    score: float
    kl: float
    last_kl: float
    same_token: bool
    answer: bool | None = None
    float_answer: bool | None = None
    quantized_answer: bool | None = None
    repeats: bool = False
    chosen: bool = False

    @property
    def flips(self) -> bool | None:
        """Whether quantization changes the answer; None: no question."""
        return None if self.answer is None else self.float_answer != self.quantized_answer

    def to_json(self) -> dict[str, Any]:
        said = {"answer": self.answer, "float_answer": self.float_answer, "quantized_answer": self.quantized_answer}
        return {
            "where": f"{self.file}{self.where}",
            "tokens": self.tokens,
            "score": self.score,
            "kl": self.kl,
            "last_kl": self.last_kl,
            "same_token": self.same_token,
            **({} if self.answer is None else said),
            "repeats": self.repeats,
            "chosen": self.chosen,
        }


@dataclass(frozen=True)
class Scores:
    """What ``score_samples`` found, in the sources' order. quantized: the folder or the recipe; out: the file that was written, or None."""

    model: str
    quantized: str
    position: str
    samples: tuple[SampleScore, ...]
    out: str | None = None
    extended: int = 0
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ranked(self) -> list[SampleScore]:
        """Most moved first."""
        return sorted(self.samples, key=lambda one: (-one.score, one.number))

    @property
    def by_file(self) -> dict[str, float]:
        """Mean score of each file's samples."""
        groups: dict[str, list[float]] = {}
        for one in self.samples:
            groups.setdefault(one.file, []).append(one.score)
        return {file: sum(scores) / len(scores) for file, scores in groups.items()}

    def to_json(self) -> dict[str, Any]:
        """What ``weighbridge calibration --json`` prints."""
        return {
            "model": self.model,
            "quantized": self.quantized,
            "position": self.position,
            "by_file": self.by_file,
            "samples": [one.to_json() for one in self.samples],
            "out": self.out,
            "extended": self.extended,
            "notes": list(self.notes),
            "seconds": {step: round(seconds, 3) for step, seconds in self.seconds.items()},
        }


def score_samples(
    model_dir: str | os.PathLike[str],
    data: Sequence[str | os.PathLike[str]],
    recipe: str | os.PathLike[str] | Recipe = "w8a8",
    *,
    quantized: str | os.PathLike[str] | None = None,
    calib: str | os.PathLike[str] | None = None,
    position: str = "all",
    choice: Choice | None = None,
    out: str | os.PathLike[str] | None = None,
    extend: bool = False,
    overwrite: bool = False,
    samples: int | None = None,
    template: str | None = None,
    device: str = QuantConfig.dev_type,
    dtype: str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    progress: Report | None = None,
) -> Scores:
    """Score the samples of the files ``data``, and write those of ``choice`` to ``out``.

    quantized   the folder of the quantized model, in any format; None: ``model_dir`` is quantized by ``recipe`` meanwhile
    calib       the data to quantize by; None: the samples themselves, as many as the recipe says
    position    "all": the mean over all positions; "last": what is said after the last token, an answer
    out         a ``.jsonl`` file; extend: the lines of ``calib`` come first
    samples     at most so many of each file; each as long as the recipe says
    template    how objects become texts; questions are texts then, and no answers are compared
    work_dir    where the quantized model, and hidden states beyond a GiB, lie meanwhile; None: the system's folder for temporary files

    :raises UsageError: arguments or data that make no sense
    :raises RefusedError: the recipe makes what no folder can hold
    :raises UnreadableError: a folder is incomplete, or no model's
    :raises DestinationError: ``out`` cannot be written
    """
    clock = {"begin": time.monotonic()}
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    place, wanted = resolve(device), dtype_of(dtype, device)
    _check(data, position, choice, out, extend, calib, quantized, overwrite)
    checkpoint = open_model(model_dir, None)
    reference = Served.open(checkpoint, wanted)
    tokenizer = tokenizer_of(checkpoint.location)
    length = length_of(reference.blocks.config, recipe.calibration.length)
    template = recipe.calibration.template if template is None and recipe.calibration.template not in {None, "boolq"} else template
    sources = [read_data(path, tokenizer, samples=samples, length=length, template=template, calibrating=True) for path in data]
    tensors = [sample for source in sources for sample in source.samples]
    before = [] if calib is None or not extend else read_data(calib, tokenizer, length=length, template=template, calibrating=True).samples
    seen = {key_of(sample[0]) for sample in before}
    with contextlib.ExitStack() as stack:
        if quantized is None:
            folder = stack.enter_context(_temporary(work_dir))
            present: Any = (calib or tensors[: recipe.calibration.samples]) if recipe.needs_data else None
            quantize_model(model_dir, folder / "quantized", recipe, "msmodelslim", device, present, progress=progress)
            quantized_path: str | os.PathLike[str] = folder / "quantized"
        else:
            quantized_path = quantized
        clock["quantize"] = time.monotonic()
        model = Served.open(open_model(quantized_path, model_dir), wanted or reference.blocks.dtype)
        measured = measure(
            model,
            tensors,
            reference,
            choices=next((source.choices for source in sources if source.choices), None),
            device=place,
            work_dir=None if work_dir is None else Path(work_dir),
            progress=None if progress is None else lambda done, of: progress("scoring", done, of, None),
        )
    found = _scores(data, sources, measured.samples, position, seen)
    clock["score"] = time.monotonic()
    added = 0
    if choice is not None and out is not None:
        chosen = {one.number for one in choice.of(found)}
        found = [replace(one, chosen=one.number in chosen) for one in found]
        lines = _lines(Path(calib)) if extend and calib is not None else []
        added = len(lines)
        text = "".join(f"{line}\n" for line in (*lines, *(one.line or "" for one in found if one.chosen)))
        replace_files(Path(out).parent, {Path(out).name: text.encode()})
    times = list(clock.values())
    seconds = {name: after - before for name, before, after in zip(list(clock)[1:], times, times[1:], strict=False)}
    notes = () if model.simulation is None else model.simulation.notes
    name = f"recipe {recipe.name}" if quantized is None else os.fspath(quantized)
    notes += tuple(_repeats(found))
    return Scores(os.fspath(model_dir), name, position, tuple(found), None if out is None else os.fspath(out), added, notes, seconds)


def _check(
    data: Sequence[str | os.PathLike[str]],
    position: str,
    choice: Choice | None,
    out: str | os.PathLike[str] | None,
    extend: bool,
    calib: str | os.PathLike[str] | None,
    quantized: str | os.PathLike[str] | None,
    overwrite: bool,
) -> None:
    """What can be said before hours of work."""
    if not data:
        raise UsageError("data: no file was named")
    if position not in {"all", "last"}:
        raise UsageError(f"position: {position!r} is neither all nor last")
    if (choice is None) != (out is None):
        raise UsageError("to write samples, name the file (--out) and which (--keep, --drop or --worst)")
    if extend and (out is None or calib is None):
        raise UsageError("extend: adds to calibration data, so it needs --calib and --out")
    if quantized is not None and calib is not None and not extend:
        raise UsageError("calib: the model in --quantized is quantized already; leave one of the two out")
    if out is None:
        return
    place = Path(out)
    if place.suffix != ".jsonl":
        raise UsageError(f"--out {place.name}: wanted a name that ends in .jsonl")
    check_new(place, overwrite)
    for path in (*data, *([calib] if extend and calib is not None else [])):
        if Path(path).suffix not in {".jsonl", ".json"}:
            raise RefusedError(f"{path}: is plain text, which has no lines to choose; give its samples as .jsonl, an object or text a line")


@contextlib.contextmanager
def _temporary(work_dir: str | os.PathLike[str] | None) -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="weighbridge-quantized-", dir=work_dir)
    except OSError as error:
        raise DestinationError(f"{work_dir}: the quantized model cannot be kept there ({error.strerror})") from None
    with folder as place:
        yield Path(place)


def _scores(
    paths: Sequence[str | os.PathLike[str]],
    sources: Sequence[Data],
    figures: Sequence[SampleFigures],
    position: str,
    seen: set[tuple[int, ...]],
) -> list[SampleScore]:
    """``seen``: the tokens of samples that are there already."""
    found: list[SampleScore] = []
    for path, source in zip(paths, sources, strict=True):
        lines: list[str | None] = [*_lines(Path(path))] if source.kind != "text" else [None] * len(source.samples)
        answers = source.answers or (None,) * len(source.samples)
        for where, sample, answer, line in zip(source.places, source.samples, answers, lines, strict=False):
            one = figures[len(found)]
            key, kl = key_of(sample[0]), (one.kl + one.last_kl) / one.tokens
            score = SampleScore(len(found), source.name, where, line, one.tokens, kl, kl, one.last_kl, one.last_agreed, repeats=key in seen)
            if position == "last":
                score = replace(score, score=one.last_kl)
            if answer is not None and one.reference is not None:
                score = replace(score, answer=answer, float_answer=one.reference.answer, quantized_answer=one.model.answer)
            found.append(score)
            seen.add(key)
    return found


def _lines(path: Path) -> list[str]:
    """A line of JSON for each sample of a file: the file's own if it has lines."""
    if path.suffix == ".json":
        return [json.dumps(item, ensure_ascii=False) for _, item in read_objects(path)]
    with path.open(encoding="utf-8-sig") as file:
        return [line.rstrip("\r\n") for line in file if line.strip()]


def _repeats(found: Sequence[SampleScore]) -> Iterator[str]:
    count = sum(one.repeats for one in found)
    if count:
        yield f"{count} of {len(found)} samples repeat an earlier one, or the calibration data, and are not chosen"
