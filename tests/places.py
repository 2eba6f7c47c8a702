"""Folders to write into, what failed conversions leave there, and system calls that fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors
from typer.testing import CliRunner

from convert import clean
from convert.cli import app
from convert.journal import Done, Journal

HIDDEN = ".out.weighbridge"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file below ``folder``, hidden ones too, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def names(folder: Path) -> list[str]:
    """What lies in ``folder``, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


def fails(exit_code: int, *words: str | Path) -> str:
    """Run a command; it must fail with ``exit_code`` and one sentence on stderr, which is returned."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == exit_code, (result.exit_code, result.stdout, result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"weighbridge {words[0]}: ")
    return result.stderr


def succeeds(*words: str | Path) -> str:
    """Run a command, which must work; returns its stdout."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result.stdout


def assert_unfinished(place: Path, visible: tuple[str, ...] = ()) -> None:
    """Only the hidden folder of ``out`` is left beside ``visible``; nothing takes it for a model, and ``clean`` knows it."""
    assert names(place) == sorted([HIDDEN, *visible])
    assert names(place / HIDDEN) == ["journal", "model"]
    found = names(place / HIDDEN / "model")
    assert found
    assert {Path(name).suffix for name in found} == {".safetensors"}, "no config and no index: nothing looks further"
    for name in found:
        path = place / HIDDEN / "model" / name
        assert path.read_bytes()[:64] == bytes(64)
        with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(path, "numpy"):
            pass
    (item,) = clean(place, list_only=True)
    assert (item.path, item.destination, item.running) == (str(place / HIDDEN), str(place / "out"), False)
    assert item.bytes > 0
    assert f"{place / 'out'}: unfinished" in succeeds("clean", place, "--list")
    assert names(place) == sorted([HIDDEN, *visible])


def journalled(place: Path) -> Done:
    """What the journal of ``out`` says was done."""
    journal = Journal(place / HIDDEN / "journal")
    journal.close()
    return journal.done


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def stops_after(calls: int, error: BaseException, real: Callable[..., Any]) -> Callable[..., Any]:
    """``real`` for some calls, then ``error`` for ever."""
    left = [calls]

    def stand_in(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return real(*args, **options)

    return stand_in


def path_of(what: Any) -> str:
    """The path of a descriptor or path that a system call was given."""
    return os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fsdecode(what)


@contextmanager
def failing(call: str, number: int, concerns: Callable[[str], bool], after: int = 0) -> Iterator[list[str]]:
    """``os.<call>`` fails with the errno ``number`` on paths that ``concerns`` accepts, after it served ``after`` of them.

    Yields the paths that it was refused for.
    """
    real, refused, served = getattr(os, call), [], [0]

    def stand_in(what: Any, *args: Any, **options: Any) -> Any:
        path = path_of(what)
        if concerns(path):
            served[0] += 1
            if served[0] > after:
                refused.append(path)
                raise OSError(number, os.strerror(number))
        return real(what, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, stand_in)
        yield refused
