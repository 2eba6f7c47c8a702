"""What runs that quantize a folder have in common, beside quantizing: their data, their clock, their progress, their notes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from convert.targets import Target, find_target
from formats.checkpoint import Location
from formats.errors import UsageError

from .calibration import Sample, calibration_data, repeats
from .devices import resolve
from .outputs import check_new
from .progress import Report
from .recipe import Calibration, Recipe
from .result import check_plot
from .samples import tokenizer_of

__all__ = ["Clock", "asked", "calibrating", "is_text", "notes_of", "told_of_bytes"]


class Clock:
    """Seconds since the step before, by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def done(self, step: str) -> None:
        """The step ends now."""
        now = time.monotonic()
        self.seconds[step], self._last = now - self._last, now


def asked(
    recipe: Recipe,
    to: str | Target,
    out: str | os.PathLike[str],
    calib: Any,
    device: str,
    overwrite: bool,
    plot: str | os.PathLike[str] | None,
) -> Target:
    """The target; refuses what can be seen before anything is read.

    :raises UsageError: a format that holds no quantized weights, no data where the recipe needs them, a device that is not there
    :raises DestinationError: ``out`` has no folder, or is there and may not be overwritten
    """
    target = find_target(to) if isinstance(to, str) else to
    assert target.variant.holds is not None
    if target.variant.holds.dequantized:
        what = f"--to {target.spec.name}:{target.variant.name}: holds no quantized weights"
        raise UsageError(f"{what}, so there is nothing to quantize for; name another format")
    check_new(Path(out), overwrite)
    if plot is not None:
        check_plot(plot)
    if calib is None and recipe.needs_data:
        raise UsageError(f"recipe {recipe.name}: needs calibration data; pass --calib FILE.jsonl, a text a line")
    resolve(device)
    return target


def is_text(calib: Any) -> bool:
    """Whether calibration data need a tokenizer: a file, texts, objects."""
    return isinstance(calib, (str, os.PathLike)) or any(isinstance(one, (str, dict)) for one in calib)


def calibrating(calib: Any, base: Location, wanted: Calibration, samples: int | None) -> list[Sample]:
    """As many samples of ``calib`` as are asked for, or ``wanted``, by the tokenizer of the folder ``base``; none of None."""
    if calib is None:
        return []
    tokenizer = tokenizer_of(base) if is_text(calib) else None
    count = wanted.samples if samples is None else samples
    return calibration_data(calib, tokenizer, samples=count, length=wanted.length, template=wanted.template)


def told_of_bytes(progress: Report | None, total: int) -> Callable[[int], None] | None:
    """The engine's progress, which says how many bytes more, for ours, which says how many of ``total`` so far."""
    if progress is None:
        return None
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress("writing", min(done, total), total, None)

    return tell


def notes_of(data: Sequence[Sequence[Tensor]], resumed: int) -> list[str]:
    """What is to be said of the samples, and of an interrupted run."""
    notes = []
    if count := repeats(data):
        notes.append(f"{count} of {len(data)} calibration samples repeat an earlier one, and add nothing")
    if resumed:
        notes.append(f"{resumed} decoder layers were there from a run that was interrupted")
    return notes
