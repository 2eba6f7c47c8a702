"""The growing folder as the target's own reader sees it, before it has headers and configs of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formats import Checkpoint
from formats.checkpoint import Location
from formats.ir import ArrayLike
from formats.laid_out import LaidOut
from formats.placement import PlacedFiles
from formats.safetensors_file import SourceFile, TensorInfo, index_of, stored_tensor

from .folder import configs
from .records import Plan


class StagedFile:
    """A laid-out file that is still being written, with what a finished one offers (``StoredFile``)."""

    exempt = 0

    def __init__(self, path: Path, file: LaidOut, number: int) -> None:
        self.path = path
        self.metadata = dict(file.metadata)
        self.tensors = file.tensors.copy_for(number)
        self.identity = SourceFile(path.name, file.size, 0, "")
        self._file = file.growing(path)

    def tensor(self, name: str, info: TensorInfo | None = None) -> ArrayLike:
        """The tensor, unread. info: its own, if it is at hand."""
        if isinstance(self._file, PlacedFiles):
            return self._file.tensor(name, info or self.tensors[name])
        return stored_tensor(self._file, name, info or self.tensors[name])

    def unchanged(self) -> bool:
        """It changes all the time."""
        return True


def open_staged(plan: Plan, folder: Path) -> Checkpoint:
    """What the plan writes into ``folder``, through the target's reader: headers and configs come from the plan."""
    files = {file.name: file for file in plan.files}
    documents: dict[str, Any] = dict(configs(plan))
    if plan.index is not None:
        documents[plan.index] = index_of(plan.files)

    def opener(path: Path, number: int = 0) -> StagedFile:
        return StagedFile(path, files[path.relative_to(folder).as_posix()], number)

    names = tuple(sorted([*files, *documents]))
    return plan.spec.open(Location(folder, names, documents=documents, opener=opener), plan.variant.name)
