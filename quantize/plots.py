"""A picture of how each layer fared: range_parm of its input above, if it was observed, the error of its weight below. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from formats.errors import DestinationError, UsageError

from .progress import LayerFigures

__all__ = ["SUFFIXES", "check_path", "draw", "save"]

SUFFIXES = (".png", ".svg")


def check_path(path: str | os.PathLike[str]) -> Path:
    """``path``, which can be drawn to. Raises UsageError for another suffix, DestinationError without its folder."""
    found = Path(path)
    if found.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {found.name}: wanted a name that ends in {' or '.join(SUFFIXES)}")
    if not found.parent.is_dir():
        raise DestinationError(f"{found.parent}: there is no such folder to draw into; make it first")
    return found


def draw(layers: Sequence[LayerFigures], title: str = "") -> Figure:
    """One point for each layer, by its place in the model, in a colour for each kind of linear."""
    observed = any(layer.range_parm is not None for layer in layers)
    figure = Figure(figsize=(10, 6) if observed else (10, 3.5), layout="constrained")
    panels: list[Axes] = list(figure.subplots(2, 1, sharex=True)) if observed else [figure.subplots()]
    leaves = list(dict.fromkeys(layer.leaf for layer in layers))
    order = {name: number for number, name in enumerate(dict.fromkeys(layer.block for layer in layers))}
    for leaf in leaves:
        chosen = [layer for layer in layers if layer.leaf == leaf]
        for axes, what in zip(panels[::-1], ("weight_error", "range_parm"), strict=False):
            seen = [(order[layer.block], value) for layer in chosen if (value := getattr(layer, what)) is not None]
            axes.plot(*zip(*seen, strict=True) if seen else ((), ()), "o-", markersize=3, linewidth=0.8)
    panels[0].set_ylabel("range_parm of the input")
    panels[-1].set_ylabel("relative error of the weight")
    panels[-1].set_xlabel("decoder layer")
    figure.legend(panels[-1].get_lines(), leaves, fontsize="small", loc="outside right upper")
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    return figure


def save(layers: Sequence[LayerFigures], path: str | os.PathLike[str], title: str = "") -> Path:
    """Draw ``layers`` to a PNG or SVG file, which is replaced if it is there."""
    place = check_path(path)
    try:
        draw(layers, title).savefig(place, dpi=150)
    except OSError as error:
        raise DestinationError(f"{place}: cannot be written ({error.strerror or error})") from None
    return place
