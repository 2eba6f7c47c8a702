"""How good a model is, and how far from another: perplexity, top-1 accuracy, KL divergence, answers; one decoder layer at a time.

Two models go through their layers side by side: each layer is read, run on every sample, and dropped. Between layers there are only
the hidden states of all samples, [tokens, hidden] for each model: in memory up to ``IN_MEMORY`` bytes, else in temporary files. At the
end the heads of both are in memory, and logits [positions, vocabulary] of a few positions at a time. So memory is that of one decoder
layer, or of the embeddings and heads where they are larger.

Of a sample of n tokens the model is asked for n - 1 predictions, each after all tokens before; log-probabilities and their sums are
float64, in nats. The KL divergence is that of the model's distribution from the reference's, ``sum p_ref (log p_ref - log p)``.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats import Checkpoint
from formats.errors import DestinationError, UnreadableError, UsageError

from .blocks import Blocks, Sample, States, advance
from .devices import COMPLETE
from .simulate import Simulation

__all__ = ["Measured", "SampleFigures", "Served", "measure", "predictions", "state_files"]

IN_MEMORY = 1 << 30
"""Bytes of hidden states, of both models, that stay in memory."""
LOGITS = 1 << 23
"""Logits of one model that are made at a time."""
SCORES = 1 << 20
"""Log-probabilities in float64 that are looked at at a time."""


@dataclass(frozen=True)
class Served:
    """A model as an engine computes it: its layers, and how it rounds what flows through them (None: not at all)."""

    blocks: Blocks
    simulation: Simulation | None = None

    @classmethod
    def open(cls, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Served:
        """The model of a folder of any format; raises as ``Blocks.open`` does."""
        return cls(Blocks.open(checkpoint, dtype), Simulation(checkpoint))


@dataclass(frozen=True)
class Prediction:
    """What one model says of a sample. nll: summed over its positions, nats; right: how many next tokens are its likeliest.

    answer   yes or no, by which of two tokens is likelier after the last one; None: not asked
    """

    nll: float
    right: int
    answer: bool | None = None


@dataclass(frozen=True)
class SampleFigures:
    """One sample. positions: those whose next token is known, n - 1.

    kl, agreed             from the reference, summed over positions: nats; likeliest tokens that are the same
    last_kl, last_agreed   the same after the last token
    """

    tokens: int
    positions: int
    model: Prediction
    reference: Prediction | None = None
    kl: float = 0.0
    agreed: int = 0
    last_kl: float = 0.0
    last_agreed: bool = True


@dataclass(frozen=True)
class Measured:
    """Figures of every sample; drift: by decoder layer, ||h - h_ref|| / ||h_ref|| of the hidden states that it makes, over all samples."""

    samples: tuple[SampleFigures, ...]
    drift: tuple[float, ...] = ()


def measure(
    model: Served,
    samples: Sequence[Sample],
    reference: Served | None = None,
    *,
    choices: tuple[int, int] | None = None,
    only_last: bool = False,
    device: torch.device | None = None,
    work_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Run ``model``, and beside it ``reference``, on ``samples``.

    choices     tokens that say yes and no, to compare after each sample
    only_last   look at what is said after the last token alone: no perplexity
    device      where layers are run; None: where they are, else the CPU
    work_dir    the folder for temporary files; None: the system's
    progress    called as (stages done, of how many)

    :raises UsageError: the two models do not fit together, or a token is none of theirs
    :raises UnreadableError: a folder's parts are missing, or logits are not finite
    """
    models = [model] if reference is None else [model, reference]
    _check(models, samples)
    lengths = [int(sample[0].shape[1]) for sample in samples]
    count, drift = len(model.blocks), []
    tell = progress or (lambda done, of: None)
    sizes = [sum(lengths) * int(one.blocks.config.hidden_size) * one.blocks.dtype.itemsize for one in models]
    with torch.no_grad(), state_files(sizes, work_dir) as paths:
        states = [one.blocks.begin(samples, path, device) for one, path in zip(models, paths, strict=True)]
        for layer in range(count):
            for one, held in zip(models, states, strict=True):
                with _stage(one, layer, device) as stage:
                    advance(stage, held, samples)
            if reference is not None:
                drift.append(_distance(*states))
            tell(layer + 1, count + 1)
        found = tuple(predictions(models, states, samples, choices, only_last, device))
        tell(count + 1, count + 1)
    for one in models:
        if one.simulation is not None:
            one.simulation.check()
    return Measured(found, tuple(drift))


def _check(models: Sequence[Served], samples: Sequence[Sample]) -> None:
    if not samples:
        raise UsageError("samples: there is none to measure with")
    for field in ("vocab_size", "hidden_size", "num_hidden_layers"):
        sizes = [int(getattr(one.blocks.config, field)) for one in models]
        if len(set(sizes)) > 1:
            raise UsageError(f"{field} of the model is {sizes[0]}, and of the reference {sizes[1]}; they are not of the same model")
    if any(len(sample) == 2 and not bool(sample[1].all()) for sample in samples):
        raise UsageError("samples: one has padding, whose tokens would count; give each sample alone, without")
    largest, size = max(int(sample[0].max()) for sample in samples), int(models[0].blocks.config.vocab_size)
    if largest >= size:
        raise UsageError(f"the tokenizer has the token {largest}, and the model {size}; give the model's own tokenizer (base model)")


@contextlib.contextmanager
def state_files(sizes: Sequence[int], work_dir: Path | None) -> Iterator[list[Path | None]]:
    """Paths for hidden states of so many bytes, in a folder that is removed afterwards; None each where memory will do."""
    if sum(sizes) <= IN_MEMORY:
        yield [None for _ in sizes]
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix="weighbridge-states-", dir=work_dir)
    except OSError as error:
        raise DestinationError(f"{work_dir or tempfile.gettempdir()}: hidden states cannot be kept there ({error.strerror})") from None
    with folder as place:
        yield [Path(place, str(number)) for number in range(len(sizes))]


@contextlib.contextmanager
def _stage(one: Served, layer: int | None, device: torch.device | None) -> Iterator[Any]:
    """One decoder layer, or (None) the head, rounding as the folder says."""
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(one.blocks.stage(layer, head=layer is None, device=device))
        if one.simulation is not None:
            stack.enter_context(one.simulation.on(model))
        yield model


def _distance(states: States, wanted: States) -> float:
    """Relative, over all samples."""
    apart = norm = 0.0
    for one, other in zip(states, wanted, strict=True):
        apart += float((one.double() - other.double()).square().sum())
        norm += float(other.double().square().sum())
    return math.sqrt(apart / norm) if norm else 0.0


def predictions(
    models: Sequence[Served],
    states: Sequence[States],
    samples: Sequence[Sample],
    choices: tuple[int, int] | None = None,
    only_last: bool = False,
    device: torch.device | None = None,
) -> Iterator[SampleFigures]:
    """What each of the models says, whose last layers made ``states`` of the same samples; the rest as in ``measure``."""
    step = max(1, LOGITS // int(models[0].blocks.config.vocab_size))
    with contextlib.ExitStack() as stack:
        heads = [stack.enter_context(_stage(one, None, device)) for one in models]
        for index, sample in enumerate(samples):
            hidden = [held[index] for held in states]
            ids = sample[0][0]
            sums = _Sums(len(models))
            for start in range(len(ids) - 1 if only_last else 0, len(ids), step):
                part = slice(start, start + step)
                logits = [_logits(head, held[:, part]) for head, held in zip(heads, hidden, strict=True)]
                if not all(bool(one.isfinite().all()) for one in logits):
                    raise UnreadableError(f"sample {index + 1}: the model's logits are NaN or infinite; compute in a wider dtype")
                sums.add(logits, ids[start + 1 : start + 1 + step].to(logits[0].device))
            yield sums.figures(len(ids), 0 if only_last else len(ids) - 1, choices)


def _logits(head: Any, hidden: Tensor) -> Tensor:
    """[positions, vocabulary], where float64 can be had."""
    place = next(parameter.device for parameter in head.parameters())
    found: Tensor = head(inputs_embeds=hidden.to(place)).logits[0]
    return found if place.type in COMPLETE else found.cpu()


class _Sums:
    """Adds up a sample's figures."""

    def __init__(self, models: int) -> None:
        self.nll, self.right = [0.0] * models, [0] * models
        self.kl, self.agreed, self.last_kl, self.last_agreed = 0.0, 0, 0.0, True
        self.last: list[Tensor] = []

    def add(self, logits: Sequence[Tensor], following: Tensor) -> None:
        """Logits of each model after some tokens, and the tokens that follow; after the sample's last one none does."""
        step = max(1, SCORES // logits[0].shape[1])
        for start in range(0, len(logits[0]), step):
            self._add([one[start : start + step] for one in logits], following[start : start + step])
        self.last = [one[-1] for one in logits]

    def _add(self, logits: Sequence[Tensor], following: Tensor) -> None:
        scores = [torch.log_softmax(one.double(), -1) for one in logits]
        count = len(following)
        for number, one in enumerate(scores):
            self.nll[number] -= float(one[:count].gather(1, following[:, None]).sum())
            self.right[number] += int((logits[number][:count].argmax(1) == following).sum())
        if len(scores) == 2:
            model, reference = scores
            kl = (reference.exp() * (reference - model)).sum(1)
            agreed = logits[0].argmax(1) == logits[1].argmax(1)
            self.kl += float(kl[:count].sum())
            self.agreed += int(agreed[:count].sum())
            self.last_kl, self.last_agreed = float(kl[-1]), bool(agreed[-1])

    def figures(self, tokens: int, positions: int, choices: tuple[int, int] | None) -> SampleFigures:
        """The sample's, once its last logits were added."""
        said = [None if choices is None else bool(one[choices[0]] > one[choices[1]]) for one in self.last]
        model, *others = (Prediction(*one) for one in zip(self.nll, self.right, said, strict=True))
        reference = others[0] if others else None
        return SampleFigures(tokens, positions, model, reference, self.kl, self.agreed, self.last_kl, self.last_agreed)
