"""Hidden states on their way from one decoder layer to the next, in memory or on the disk, where a killed run finds them again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.errors import UnreadableError

from .blocks import Blocks, Inputs, Sample, States

__all__ = ["Stream", "embed"]


class Stream:
    """Hidden states on their way through the layers: ``inputs`` of the layer at hand, and what is made of them.

    place   a folder for files, one for each boundary between layers, so that a killed run finds those it needs; None: in memory
    """

    def __init__(self, name: str, samples: Sequence[Sample], blocks: Blocks, place: Path | None) -> None:
        self.name, self.samples, self._blocks, self._place = name, samples, blocks, place
        self._now: States | None = None
        self._next: States | None = None

    def _path(self, index: int) -> Path | None:
        return None if self._place is None else self._place / f"{self.name}-{index:05d}.states"

    def _open(self, index: int, new: bool = True) -> States:
        path = self._path(index)
        if path is not None and not new and not path.is_file():
            raise UnreadableError(f"{path}: the hidden states of an interrupted run have gone; remove its work with `weighbridge clean`")
        lengths = [int(sample[0].shape[1]) for sample in self.samples]
        return States(lengths, int(self._blocks.config.hidden_size), self._blocks.dtype, path)

    def begin(self) -> None:
        """Stand before the first layer, with what ``embed`` is given."""
        self._now = self._open(0)

    def embed(self, index: int, hidden: Tensor) -> None:
        """The embeddings made ``hidden`` of sample ``index``."""
        assert self._now is not None
        if index < len(self.samples):
            self._now[index] = hidden

    def at(self, index: int) -> None:
        """Stand before layer ``index``."""
        if self._now is None:
            self._now = self._open(index, new=False)
        self._next = self._now if self._place is None else self._open(index + 1)

    @property
    def inputs(self) -> Sequence[dict[str, Tensor]]:
        """What the stage's model is called with, sample by sample."""
        assert self._now is not None
        return Inputs(self._now, self.samples)

    def made(self, index: int, output: Any) -> None:
        """The layer made this of sample ``index``."""
        assert self._next is not None
        self._next[index] = output.logits.detach()

    def sync(self) -> None:
        for states in (self._now, self._next):
            if states is not None:
                states.sync()

    def advance(self, index: int) -> None:
        """Leave layer ``index``, whose work is safe: its inputs are not needed any more."""
        path, self._now = self._path(index), self._next
        if path is not None:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Nothing is needed any more."""
        if self._now is not None and self._now.path is not None:
            self._now.path.unlink(missing_ok=True)


def embed(blocks: Blocks, samples: Sequence[Sample], streams: Collection[Stream], device: torch.device | None = None) -> None:
    """Begin all ``streams``, each with as many of ``samples`` as it takes, and bring them to the disk."""
    for stream in streams:
        stream.begin()
    for index, hidden in enumerate(blocks.embedded(samples, device) if samples else ()):
        for stream in streams:
            stream.embed(index, hidden)
    for stream in streams:
        stream.sync()
