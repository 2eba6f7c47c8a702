"""What a run shows while it quantizes, and the figures of each layer afterwards. Imports no torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Block", "LayerFigures", "Report", "blocks", "shown"]

Report = Callable[[str, int, int, "LayerFigures | None"], None]
"""Called as (what is being done, how many are done, of how many, the layer's figures if it is a layer that was done)."""


@dataclass(frozen=True)
class LayerFigures:
    """How one quantized linear fared.

    kind           W8A8, W4A16 and so on
    weight_error   ||rounded - weight|| / ||weight||
    range_parm     largest magnitude of its input over its spread: the larger, the worse a per-tensor scale fits; None: not observed
    output_error   ||y_q - y|| / ||y|| of its output, were it alone quantized; None: not measured
    repaired       groups that a tool would have written wrongly, and that are right here
    """

    name: str
    kind: str
    weight_error: float
    range_parm: float | None = None
    output_error: float | None = None
    repaired: int = 0

    @property
    def leaf(self) -> str:
        """The last part of its name: q_proj, down_proj."""
        return self.name.rpartition(".")[2]

    @property
    def block(self) -> str:
        """The name up to the first number: the decoder layer it is in."""
        parts = self.name.split(".")
        cut = next((index + 1 for index, part in enumerate(parts) if part.isdecimal()), len(parts))
        return ".".join(parts[:cut])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Block:
    """The linears of one decoder layer together: how many, the mean and the worst error, the widest input."""

    name: str
    layers: int
    mean_error: float
    worst: LayerFigures
    widest: LayerFigures | None

    def __str__(self) -> str:
        text = f"{self.name}: {self.layers} linears, weight error {self.mean_error:.4f}, at most {self.worst.weight_error:.4f}"
        text += f" ({self.worst.leaf})"
        return text if self.widest is None else f"{text}, range_parm at most {self.widest.range_parm:.2f} ({self.widest.leaf})"


def blocks(layers: Iterable[LayerFigures]) -> list[Block]:
    """Layers by decoder layer, in their order."""
    grouped: dict[str, list[LayerFigures]] = {}
    for layer in layers:
        grouped.setdefault(layer.block, []).append(layer)
    return [_block(name, group) for name, group in grouped.items()]


def _block(name: str, group: list[LayerFigures]) -> Block:
    observed = [layer for layer in group if layer.range_parm is not None]
    return Block(
        name,
        len(group),
        sum(layer.weight_error for layer in group) / len(group),
        max(group, key=lambda layer: layer.weight_error),
        max(observed, key=lambda layer: layer.range_parm or 0.0, default=None),
    )


@contextlib.contextmanager
def shown(quiet: bool = False) -> Iterator[Report | None]:
    """A rich bar for each step on stderr, and a line with figures for each decoder layer; None where stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}
        group: list[LayerFigures] = []

        def report(what: str, done: int, of: int, layer: LayerFigures | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=of)
            bar.update(tasks[what], completed=done, total=of)
            if group and (layer is None or layer.block != group[0].block):
                console.print(str(_block(group[0].block, group)))
                group.clear()
            if layer is not None:
                group.append(layer)
            if group and done == of:
                console.print(str(_block(group[0].block, group)))
                group.clear()

        yield report
