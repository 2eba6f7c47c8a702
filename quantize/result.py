"""What quantizing a folder gave, whether the model was calibrated or its weights streamed; and the picture of it. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from convert.engine import Result
from formats.errors import UsageError

from .progress import LayerFigures

if TYPE_CHECKING:
    from .recipe import Recipe

__all__ = ["Quantized", "check_plot", "draw_plot"]


@dataclass(frozen=True)
class Quantized:
    """The conversion's ``written`` result, figures of every quantized linear, what stayed float.

    samples    of calibration data; smoothed: sources whose scale AntiOutlier moved into the linears after them
    seconds    by step; resumed_layers: decoder layers that an interrupted run had finished
    """

    recipe: Recipe
    written: Result
    layers: tuple[LayerFigures, ...]
    float_names: tuple[str, ...]
    samples: int
    smoothed: int = 0
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    resumed_layers: int = 0

    def to_json(self) -> dict[str, Any]:
        """What ``weighbridge quantize --json`` prints."""
        return {
            **self.written.to_json(),
            "recipe": {"name": self.recipe.name, **self.recipe.model_dump(exclude_defaults=True)},
            "samples": self.samples,
            "smoothed": self.smoothed,
            "resumed_layers": self.resumed_layers,
            "layers": [layer.to_json() for layer in self.layers],
            "float_linears": list(self.float_names),
            "quantize_notes": list(self.notes),
            "seconds": {step: round(seconds, 3) for step, seconds in self.seconds.items()},
        }


def check_plot(plot: str | os.PathLike[str]) -> None:
    """UsageError or DestinationError if ``draw_plot`` could not draw there: said before hours of work."""
    try:
        from .plots import check_path
    except ImportError as error:
        raise UsageError(f"--plot {plot}: {error.name} is not installed; pip install 'weighbridge[quantize]'") from error
    check_path(plot)


def draw_plot(layers: Sequence[LayerFigures], plot: str | os.PathLike[str], title: str) -> None:
    """Draw the figures of ``layers`` into a PNG or SVG file."""
    from .plots import save

    save(layers, plot, title)
