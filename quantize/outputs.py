"""Files that a run will write: what can be said of them before hours of work."""

from __future__ import annotations

from pathlib import Path

from formats.errors import DestinationError

__all__ = ["check_new"]


def check_new(path: Path, overwrite: bool) -> None:
    """DestinationError if ``path`` has no folder, or is there and may not be overwritten."""
    if not path.parent.is_dir():
        raise DestinationError(f"{path.parent}: there is no such folder to write into; make it first")
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise DestinationError(f"{path}: exists already; choose another destination, or pass --overwrite to replace it")
