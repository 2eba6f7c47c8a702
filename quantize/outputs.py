"""What a run will write: what can be said of it before hours of work, and the dtype of its scales."""

from __future__ import annotations

from pathlib import Path

from formats.errors import DestinationError
from formats.spec import FormatSpec

__all__ = ["check_new", "scales_in"]


def check_new(path: Path, overwrite: bool) -> None:
    """DestinationError if ``path`` has no folder, or is there and may not be overwritten."""
    if not path.parent.is_dir():
        raise DestinationError(f"{path.parent}: there is no such folder to write into; make it first")
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise DestinationError(f"{path}: exists already; choose another destination, or pass --overwrite to replace it")


def scales_in(spec: FormatSpec, golden_stick: bool = False) -> str | None:
    """The dtype of scales, as ``convert`` has it: msModelSlim and Golden Stick leave each as it is, others take what their loaders want."""
    return "keep" if spec.name == "msmodelslim" or (golden_stick and spec.name == "mindspore") else None
