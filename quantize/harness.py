"""A quantized folder under EleutherAI's lm-evaluation-harness: any of its tasks, by the harness's own code.

The whole model is put in memory, its weights dequantized, rounding its inputs and its KV cache as the folder says (``simulate``), and
handed to the harness's ``HFLM``. The harness comes with the extra ``[eval]``, in the one version that this was run with; tasks may
download their data.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from formats.errors import UnreadableError, UsageError

from .config import QuantConfig
from .devices import resolve
from .evaluation import dtype_of, open_model
from .measure import Served
from .samples import tokenizer_of

__all__ = ["TaskResults", "evaluate_tasks"]


@dataclass(frozen=True)
class TaskResults:
    """What the harness says: {task: {"acc,none": 0.7, "acc_stderr,none": 0.01, ...}} for the folder and, or None, for the reference."""

    folder: str
    against: str | None
    tasks: dict[str, dict[str, Any]]
    reference: dict[str, dict[str, Any]] | None
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What ``weighbridge evaluate --tasks ... --json`` prints."""
        return {
            "folder": self.folder,
            "against": self.against,
            "tasks": self.tasks,
            "reference": self.reference,
            "notes": list(self.notes),
            "seconds": {step: round(seconds, 3) for step, seconds in self.seconds.items()},
        }


def evaluate_tasks(
    folder: str | os.PathLike[str],
    tasks: Sequence[str],
    against: str | os.PathLike[str] | None = None,
    *,
    base_model: str | os.PathLike[str] | None = None,
    include_path: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    device: str = QuantConfig.dev_type,
    dtype: str | None = None,
    batch_size: int = 1,
) -> TaskResults:
    """Run ``tasks`` on the model in ``folder``, and on the one in ``against``.

    tasks          the harness's names; include_path: a folder with more, as its YAML files
    samples        at most so many documents of each task
    others         as ``evaluate_model`` has them

    :raises UsageError: the harness is not installed, or cannot make ready such tasks; otherwise as ``evaluate_model``
    """
    harness = _Harness(tasks, include_path, samples, batch_size)
    place, wanted = resolve(device), dtype_of(dtype, device)
    found: list[dict[str, dict[str, Any]]] = []
    notes: list[str] = []
    seconds: dict[str, float] = {}
    for path, base in ((folder, base_model), (against, None)):
        if path is None:
            continue
        begin = time.monotonic()
        checkpoint = open_model(path, base)
        served = Served.open(checkpoint, wanted)
        tokenizer = tokenizer_of(checkpoint.location.base, checkpoint.location)
        model: Any = served.blocks.load().to(place)
        with contextlib.nullcontext() if served.simulation is None else served.simulation.on(model):
            found.append(harness.run(model, tokenizer))
        if served.simulation is not None:
            served.simulation.check()
            notes += served.simulation.notes
        seconds["model" if path is folder else "reference"] = time.monotonic() - begin
        del served, model
    name = None if against is None else os.fspath(against)
    return TaskResults(os.fspath(folder), name, found[0], found[1] if len(found) > 1 else None, tuple(dict.fromkeys(notes)), seconds)


class _Harness:
    """lm_eval, with the tasks chosen: what is wrong with them is said before a model is loaded."""

    def __init__(self, tasks: Sequence[str], include_path: str | os.PathLike[str] | None, samples: int | None, batch_size: int) -> None:
        try:
            self.lm_eval, models, self.tasks = (importlib.import_module(f"lm_eval{name}") for name in ("", ".models.huggingface", ".tasks"))
        except ImportError as error:
            raise UsageError(f"--tasks: {error.name or error} is not installed; pip install 'weighbridge[quantize,eval]'") from error
        if include_path is not None and not os.path.isdir(include_path):
            raise UsageError(f"--include-path {include_path}: there is no such folder of tasks")
        self.adapter = models.HFLM
        self.manager = self.tasks.TaskManager(include_path=None if include_path is None else os.fspath(include_path))
        self.names, self.samples, self.batch_size = list(tasks), samples, batch_size
        unknown = [name for name in self.names if not self.manager.match_tasks([name])]
        if unknown or not self.names:
            raise UsageError(f"--tasks {','.join(unknown)}: the harness has no such task; `lm_eval ls tasks` lists them")

    def run(self, model: Any, tokenizer: Any) -> dict[str, dict[str, Any]]:
        """{task: its figures} of a model in memory."""
        adapter = self.adapter(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)
        try:
            found = self.lm_eval.simple_evaluate(
                model=adapter, tasks=self.names, limit=self.samples, task_manager=self.manager, log_samples=False
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UnreadableError(f"--tasks {','.join(self.names)}: the harness failed ({first.strip():.300})") from error
        return {task: {key: value for key, value in said.items() if key != "alias"} for task, said in found["results"].items()}
