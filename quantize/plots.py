"""A picture of how each layer fared: range_parm of its input and the error of its output, where they were observed, and the error of its
weight. Needs matplotlib.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from formats.errors import DestinationError, UsageError

from .progress import LayerFigures

__all__ = ["SUFFIXES", "check_path", "draw", "save"]

SUFFIXES = (".png", ".svg")
PANELS = {
    "range_parm": "range_parm of the input",
    "weight_error": "relative error of the weight",
    "output_error": "relative error of the output",
}
"""What is drawn of a layer's figures, from the top down."""


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
    panels = {field: label for field, label in PANELS.items() if any(getattr(layer, field) is not None for layer in layers)}
    figure = Figure(figsize=(10, 0.5 + 3 * len(panels)), layout="constrained")
    leaves = list(dict.fromkeys(layer.leaf for layer in layers))
    order = {name: number for number, name in enumerate(dict.fromkeys(layer.block for layer in layers))}
    for axes, (field, label) in zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels.items(), strict=True):
        for leaf in leaves:
            seen = [layer for layer in layers if layer.leaf == leaf and getattr(layer, field) is not None]
            places, values = [order[layer.block] for layer in seen], [getattr(layer, field) for layer in seen]
            axes.plot(places, values, "o-", markersize=3, linewidth=0.8)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.set_xlabel("decoder layer")
    figure.legend(axes.get_lines(), leaves, fontsize="small", loc="outside right upper")
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
