"""``evaluate_model``: what quantization did to a model, measured from its folder on data, beside the float model's folder if there is one.

Folders are of any format; what their numbers make the model compute is simulated (``simulate``), one decoder layer at a time
(``measure``). A text, or texts, give perplexity and top-1 accuracy of the next token; questions give accuracy (``samples``).
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from formats import Checkpoint, Location, open_checkpoint
from formats.errors import UsageError

from .config import QuantConfig
from .devices import HOST, resolve
from .evaluate import Accuracy
from .measure import Measured, Prediction, Served, measure
from .progress import Report
from .samples import Data, length_of, read_data, tokenizer_of

__all__ = ["Evaluation", "ModelFigures", "dtype_of", "evaluate_model", "figures_of", "open_model"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelFigures:
    """One model's: perplexity and top-1 accuracy over all positions of texts, or accuracy of answers."""

    perplexity: float | None = None
    top1: float | None = None
    accuracy: Accuracy | None = None

    def to_json(self) -> dict[str, Any]:
        if self.accuracy is None:
            return {"perplexity": self.perplexity, "top1": self.top1}
        return {"accuracy": float(self.accuracy), "right": self.accuracy.right, "questions": self.accuracy.total}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> ModelFigures:
        """What ``to_json`` gave."""
        if "accuracy" in content:
            return cls(accuracy=Accuracy(content["right"], content["questions"]))
        return cls(content["perplexity"], content["top1"])

    def __str__(self) -> str:
        if self.accuracy is not None:
            return f"accuracy {self.accuracy}"
        return f"perplexity {self.perplexity:.3f}, top-1 {self.top1:.4f}"


def figures_of(data: Data, found: Sequence[Prediction], positions: int) -> ModelFigures:
    """Figures of what a model said of ``data``, over so many positions."""
    if data.answers:
        right = sum(one.answer == wanted for one, wanted in zip(found, data.answers, strict=True))
        return ModelFigures(accuracy=Accuracy(right, len(found)))
    nll = sum(one.nll for one in found) / positions
    return ModelFigures(math.exp(nll) if nll < 700 else math.inf, sum(one.right for one in found) / positions)


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate_model`` found.

    schemes      {scheme: how many linears of the folder}; positions: predictions that were looked at (of a question: one)
    model        figures; reference: those of ``against``, or None
    kl           mean over positions of KL(reference || model), nats; agreement: share of positions with the same likeliest token
    same_answers of questions: share answered alike
    drift        by decoder layer, how far its hidden states are from the reference's, relative
    notes        what a reader must know
    """

    folder: str
    format: str
    schemes: dict[str, int]
    against: str | None
    data: Data
    length: int
    device: str
    dtype: str
    measured: Measured
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(one.tokens for one in self.measured.samples)

    @property
    def positions(self) -> int:
        return len(self.data.answers) or sum(one.positions for one in self.measured.samples)

    @property
    def model(self) -> ModelFigures:
        return figures_of(self.data, [one.model for one in self.measured.samples], self.positions)

    @property
    def reference(self) -> ModelFigures | None:
        found = [one.reference for one in self.measured.samples if one.reference is not None]
        return figures_of(self.data, found, self.positions) if found else None

    @property
    def kl(self) -> float | None:
        return self._mean(sum(one.last_kl if self.data.answers else one.kl for one in self.measured.samples))

    @property
    def agreement(self) -> float | None:
        return self._mean(sum(one.last_agreed if self.data.answers else one.agreed for one in self.measured.samples))

    @property
    def same_answers(self) -> float | None:
        pairs = [(one.model.answer, one.reference and one.reference.answer) for one in self.measured.samples]
        return self._mean(sum(mine == theirs for mine, theirs in pairs)) if self.data.answers else None

    @property
    def perplexity_change(self) -> float | None:
        """Relative to the reference's."""
        mine, theirs = self.model.perplexity, self.reference and self.reference.perplexity
        return None if mine is None or not theirs else mine / theirs - 1

    def _mean(self, total: float) -> float | None:
        return None if self.against is None else total / self.positions

    def to_json(self) -> dict[str, Any]:
        """What ``weighbridge evaluate --json`` prints."""
        reference = self.reference
        compared: dict[str, Any] = {}
        if reference is not None:
            compared = {"kl": self.kl, "agreement": self.agreement, "drift": list(self.measured.drift)}
            compared |= {"same_answers": self.same_answers} if self.data.answers else {"perplexity_change": self.perplexity_change}
        return {
            "folder": self.folder,
            "format": self.format,
            "schemes": self.schemes,
            "against": self.against,
            "data": self.data.name,
            "kind": self.data.kind,
            "samples": len(self.data.samples),
            "tokens": self.tokens,
            "positions": self.positions,
            "length": self.length,
            "device": self.device,
            "dtype": self.dtype,
            "model": self.model.to_json(),
            "reference": None if reference is None else reference.to_json(),
            **compared,
            "by_sample": [self._sample(index) for index in range(len(self.data.samples))],
            "notes": list(self.notes),
            "seconds": {step: round(seconds, 3) for step, seconds in self.seconds.items()},
        }

    def _sample(self, index: int) -> dict[str, Any]:
        one = self.measured.samples[index]
        found: dict[str, Any] = {"where": f"{self.data.name}{self.data.places[index]}", "tokens": one.tokens}
        for name, said in (("model", one.model), ("reference", one.reference)):
            if said is not None:
                found[name] = {"answer": said.answer} if self.data.answers else {"nll": said.nll, "right": said.right}
        if one.reference is not None:
            found["kl"] = one.last_kl if self.data.answers else one.kl / one.positions
        return found | ({"answer": self.data.answers[index]} if self.data.answers else {})


def evaluate_model(
    folder: str | os.PathLike[str],
    data: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    base_model: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    length: int | None = None,
    template: str | None = None,
    device: str = QuantConfig.dev_type,
    dtype: str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    progress: Report | None = None,
) -> Evaluation:
    """Measure the model in ``folder`` on a file of ``data``, and how far it is from the one in ``against``.

    base_model   the float model's folder: config and tokenizer of a folder that has none
    samples      at most so many windows, texts or questions; length: tokens of each at most (2048, or the model's positions if fewer)
    template     how objects become texts, as ``calibration.prompt`` has it; questions are texts then
    device       "cpu", "npu:0", "cuda:0"; dtype: float32, float16, bfloat16, or auto, the model's own. None: float32 on a CPU, else auto
    work_dir     where hidden states beyond a GiB are kept meanwhile; None: the system's folder for temporary files

    :raises UsageError: arguments or data that make no sense, or folders of two models
    :raises UnreadableError: a folder is incomplete, or no model's
    :raises RefusedError: a folder of a format, or with parts, that cannot be computed
    """
    begin = time.monotonic()
    for name, value in (("samples", samples), ("length", length)):
        if value is not None and value < (2 if name == "length" else 1):
            raise UsageError(f"{name}: {value} is too few; a sample has two tokens or more")
    place, wanted = resolve(device), dtype_of(dtype, device)
    checkpoint = open_model(folder, base_model)
    other = None if against is None else open_model(against, None)
    served = Served.open(checkpoint, wanted)
    reference = None if other is None else Served.open(other, wanted or served.blocks.dtype)
    tokenizer = tokenizer_of(checkpoint.location.base, checkpoint.location, None if other is None else other.location)
    length = length_of(served.blocks.config, length)
    found = read_data(data, tokenizer, samples=samples, length=length, template=template)
    _check_lengths(found)
    opened = time.monotonic()
    measured = measure(
        served,
        found.samples,
        reference,
        choices=found.choices,
        only_last=bool(found.answers),
        device=place,
        work_dir=None if work_dir is None else Path(work_dir),
        progress=None if progress is None else lambda done, of: progress("evaluating", done, of, None),
    )
    simulations = [one.simulation for one in (served, reference) if one is not None and one.simulation is not None]
    notes = tuple(dict.fromkeys(note for simulation in simulations for note in simulation.notes))
    seconds = {"open": opened - begin, "measure": time.monotonic() - opened}
    other_name = None if against is None else os.fspath(against)
    computed = str(served.blocks.dtype).removeprefix("torch.")
    return Evaluation(
        os.fspath(folder), f"{checkpoint.format}:{checkpoint.variant}", schemes_of(checkpoint), other_name, found, length, str(place),
        computed, measured, notes, seconds,
    )  # fmt: skip


def open_model(folder: str | os.PathLike[str], base_model: str | os.PathLike[str] | None) -> Checkpoint:
    """The checkpoint in ``folder``; config and tokenizer are ``base_model``'s if one is named."""
    return open_checkpoint(Location.of(folder, base=None if base_model is None else Location.of(base_model)))


def dtype_of(name: str | None, device: str) -> torch.dtype | None:
    """What to compute in; None: the model's own."""
    if name is None:
        return torch.float32 if device == HOST else None
    if name != "auto" and name not in DTYPES:
        raise UsageError(f"--dtype {name}: wanted auto, {', '.join(DTYPES)}")
    return DTYPES.get(name)


def schemes_of(checkpoint: Checkpoint) -> dict[str, int]:
    """{scheme: how many linears have it}."""
    return dict(Counter(str(checkpoint.layer(name).scheme) for name in checkpoint.layer_names).most_common())


def _check_lengths(data: Data) -> None:
    if data.answers:
        return
    for place, sample in zip(data.places, data.samples, strict=True):
        if sample[0].shape[1] < 2:
            raise UsageError(f"{data.name}{place}: has one token, and nothing to predict; wanted two or more")
