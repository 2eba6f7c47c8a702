"""A picture of the memory that a model takes to serve: weights, KV cache and the engine's own, for each batch and dtype of the cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from convert.footprint import MIB, Footprint
from formats.errors import DestinationError

from .plots import check_path

__all__ = ["draw", "save"]


def draw(found: Footprint) -> Figure:
    """A stacked bar for each batch, side by side for every dtype of the cache, in GiB."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    batches = sorted({use.batch for use in found.uses})
    width = 0.8 / len(found.kvs)
    shown = {"weights": 0, "rest": len(found.kvs) - 1}  # in the legend: weights, each cache, engine
    for number, kv in enumerate(found.kvs):
        places = [index + (number - (len(found.kvs) - 1) / 2) * width for index in range(len(batches))]
        uses, below = [found.of(kv, batch) for batch in batches], [0.0] * len(batches)
        for part, label, colour in (("weights", "weights", "C0"), ("cache", f"{kv} cache", f"C{number + 1}"), ("rest", "engine", "0.7")):
            heights = [getattr(use, part) / MIB / 1024 for use in uses]
            axes.bar(places, heights, 0.9 * width, bottom=below, label=label if shown.get(part, number) == number else None, color=colour)
            below = [low + high for low, high in zip(below, heights, strict=True)]
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel("sequences at a time")
    axes.set_ylabel("GiB")
    axes.grid(axis="y", alpha=0.3)
    axes.set_title(f"{found.model.name}, {found.weights} weights, {found.context} tokens")
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def save(found: Footprint, path: str | os.PathLike[str]) -> Path:
    """Draw to a PNG or SVG file, which is replaced if it is there."""
    place = check_path(path)
    try:
        draw(found).savefig(place, dpi=150)
    except OSError as error:
        raise DestinationError(f"{place}: cannot be written ({error.strerror or error})") from None
    return place
