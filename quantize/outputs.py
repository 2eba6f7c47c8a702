"""Files that a run writes: what can be said of them before hours of work, and written so that nobody sees a part of one."""

from __future__ import annotations

import os
from pathlib import Path

from formats.errors import DestinationError

__all__ = ["check_new", "write_text"]


def check_new(path: Path, overwrite: bool) -> None:
    """DestinationError if ``path`` has no folder, or is there and may not be overwritten."""
    if not path.parent.is_dir():
        raise DestinationError(f"{path.parent}: there is no such folder to write into; make it first")
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise DestinationError(f"{path}: exists already; choose another destination, or pass --overwrite to replace it")


def write_text(path: Path, text: str) -> None:
    """Write a file: whole, or as it was."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, "utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DestinationError(f"{path}: cannot be written ({error.strerror or error})") from None
