"""Small files put into a folder that is there: all of them, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from formats.errors import DestinationError

__all__ = ["replace_files", "replace_made"]


def replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files``, by name, into ``folder``; files of those names are replaced. Raises as ``replace_made`` does."""
    replace_made(folder, {name: partial(_write, content) for name, content in files.items()})


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def replace_made(folder: Path, makers: Mapping[str, Callable[[Path], object]]) -> None:
    """Have each file made under another name first, by a function of its path; only when all are there they get their own names.

    :raises DestinationError: the folder cannot be written into
    """
    new = {name: folder / f".{name}.weighbridge" for name in makers}
    try:
        for name, make in makers.items():
            make(new[name])
        for name, path in new.items():
            path.replace(folder / name)
    except OSError as error:
        raise DestinationError(f"{folder}: cannot be written into ({error.strerror or error})") from None
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)
