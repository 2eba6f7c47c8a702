"""Where a conversion may write, and that a failed one leaves nothing behind."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from checkpoints import CONFIG, model, write_msmodelslim
from typer.testing import CliRunner

from convert.cli import app
from convert.engine import convert, run
from convert.planning import plan
from convert.verification import verify
from formats.errors import DestinationError, UnreadableError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_msmodelslim(tmp_path / "source", model(blocks=1))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder to write into."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file below ``folder``, hidden ones too, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def fails(source: Path, destination: Path, *options: str) -> str:
    """Convert on the command line; it must fail with exit 1 and one line, which is returned."""
    result = CliRunner().invoke(app, ["convert", str(source), str(destination), "--to", "awq", *options])
    assert result.exit_code == 1, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("weighbridge convert: ")
    return result.stderr


def stops_after(calls: int, error: BaseException, real: Callable[..., Any]) -> Callable[..., Any]:
    """``real`` for some calls, then ``error`` for ever."""
    left = [calls]

    def stand_in(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return real(*args, **options)

    return stand_in


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


# --- existing destinations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "empty", "file", "link", "dangling"])
def test_existing_destination_is_not_touched(kind: str, source: Path, place: Path) -> None:
    out = place / "out"
    if kind == "model":
        convert(source, out, "gptq")
    elif kind == "empty":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine", "utf-8")
    else:
        out.symlink_to(source if kind == "link" else place / "nothing")
    before = snapshot(place)
    line = fails(source, out)
    assert str(out) in line
    assert "--overwrite" in line or kind == "link"
    assert snapshot(place) == before
    assert out.is_symlink() == (kind in {"link", "dangling"})


def test_overwrite_replaces_a_model_folder_whole(source: Path, place: Path) -> None:
    convert(source, place / "out", "gptq")
    (place / "out" / "stale-tokenizer.json").write_text("{}", "utf-8")
    convert(source, place / "fresh", "awq")
    convert(source, place / "out", "awq", overwrite=True)
    assert snapshot(place / "out") == snapshot(place / "fresh")
    assert sorted(path.name for path in place.iterdir()) == ["fresh", "out"]


def test_overwrite_fills_an_empty_folder(source: Path, place: Path) -> None:
    (place / "out").mkdir()
    convert(source, place / "out", "awq", overwrite=True)
    assert verify(source, place / "out").same


@pytest.mark.parametrize("kind", ["notes", "nested", "file", "link"])
def test_overwrite_refuses_what_is_no_model_folder(kind: str, source: Path, place: Path) -> None:
    out = place / "out"
    if kind == "file":
        out.write_text("mine", "utf-8")
    elif kind == "link":
        convert(source, place / "real", "awq")
        out.symlink_to(place / "real")
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine", "utf-8")
        if kind == "nested":
            (out / "config.json").write_text("{}", "utf-8")
            (out / "src").mkdir()
    before = snapshot(place)
    assert "remove it yourself" in fails(source, out, "--overwrite")
    assert snapshot(place) == before


@pytest.mark.parametrize("where", ["itself", "parent", "grandparent", "inside", "through a link", "base", "dots"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_source_and_base_are_never_the_destination(where: str, overwrite: bool, tmp_path: Path) -> None:
    source = write_msmodelslim(tmp_path / "parent" / "middle" / "source", model(blocks=1))
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((source / "config.json").read_text("utf-8"), "utf-8")
    (tmp_path / "link").symlink_to(source)
    destination = {
        "itself": source,
        "inside": source / "out",
        "parent": source.parent,
        "grandparent": source.parent.parent,
        "through a link": tmp_path / "link",
        "base": base,
        "dots": source / ".." / "source",
    }[where]
    before = snapshot(tmp_path)
    line = fails(source, destination, "--base-model", str(base), *(["--overwrite"] if overwrite else []))
    assert "in the source, which is never written" in line
    assert snapshot(tmp_path) == before


# --- places that cannot be written ------------------------------------------------------------------------------------


def test_missing_parent_is_named(source: Path, place: Path) -> None:
    assert str(place / "nowhere") in fails(source, place / "nowhere" / "out")
    assert snapshot(place) == {}


def test_parent_that_is_a_file_is_named(source: Path, place: Path) -> None:
    (place / "file").write_text("mine", "utf-8")
    assert str(place / "file") in fails(source, place / "file" / "out")
    assert snapshot(place) == {"file": b"mine"}


def test_read_only_parent_is_named(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    line = fails(source, place / "out")
    assert str(place) in line
    assert "Permission denied" in line
    assert snapshot(place) == {}


def test_full_disk_is_found_before_anything_is_written(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = plan(source, "awq").target_bytes
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(tempfile, "mkdtemp", stops_after(0, AssertionError("a folder was made"), tempfile.mkdtemp))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    line = fails(source, place / "out")
    assert str(place) in line
    assert "free" in line
    assert snapshot(place) == {}


def test_room_for_exactly_the_plan_is_enough(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(place)._replace(free=plan(source, "awq").target_bytes + 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert convert(source, place / "out", "awq").source_fingerprint is not None


# --- failures on the way ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, 1, 5, 25])
@pytest.mark.parametrize("jobs", ["1", "4"])
def test_disk_that_fills_on_the_way_leaves_nothing(
    calls: int, jobs: str, source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", stops_after(calls, full(), os.pwrite))
    line = fails(source, place / "out", "--jobs", jobs)
    assert "No space left on device" in line
    assert str(place / "out") in line
    assert snapshot(place) == {}


@pytest.mark.parametrize("name", ["open", "ftruncate", "fsync", "rename", "chmod"])
def test_every_system_call_may_fail(name: str, source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(os, name)

    def refuse_ours(*args: Any, **options: Any) -> Any:
        """Refuse what concerns the destination; other callers are served."""
        what = args[0]
        path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)
        if str(place / ".out.weighbridge-") in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return real(*args, **options)

    monkeypatch.setattr(os, name, refuse_ours)
    if name == "open":  # rmtree opens the folder too, to empty it: let it
        monkeypatch.setattr(shutil, "rmtree", clean_with(shutil.rmtree, monkeypatch, real))
    assert "Input/output error" in fails(source, place / "out")
    assert snapshot(place) == {}


def clean_with(rmtree: Callable[..., None], monkeypatch: pytest.MonkeyPatch, real_open: Callable[..., int]) -> Callable[..., None]:
    def clean(*args: Any, **options: Any) -> None:
        monkeypatch.setattr(os, "open", real_open)
        rmtree(*args, **options)

    return clean


def test_failure_keeps_the_folder_that_was_to_be_replaced(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, place / "out", "gptq")
    before = snapshot(place)
    monkeypatch.setattr(os, "pwrite", stops_after(9, full(), os.pwrite))
    fails(source, place / "out", "--overwrite")
    assert snapshot(place) == before


def test_failed_exchange_puts_the_old_folder_back(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, place / "out", "gptq")
    before = snapshot(place)
    real = os.rename

    def refuse_the_new(old: Any, new: Any) -> None:
        if Path(old).name.startswith(".out.weighbridge-") and Path(new).name == "out":
            raise OSError(errno.EIO, "Input/output error")
        real(old, new)

    monkeypatch.setattr(os, "rename", refuse_the_new)
    fails(source, place / "out", "--overwrite")
    assert snapshot(place) == before


def test_interrupt_leaves_nothing(source: Path, place: Path) -> None:
    def interrupt(done: int) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, place / "out", "awq", progress=interrupt)
    assert snapshot(place) == {}


def test_source_that_changes_on_the_way_is_noticed(source: Path, place: Path) -> None:
    (weights,) = source.glob("*.safetensors")

    def touch(done: int) -> None:
        os.utime(weights, ns=(0, 0))

    with pytest.raises(UnreadableError, match="changed while it was being converted"):
        convert(source, place / "out", "awq", progress=touch)
    assert snapshot(place) == {}


def test_source_that_changed_since_the_plan_is_noticed(source: Path, place: Path) -> None:
    decided = plan(source, "awq")
    (weights,) = source.glob("*.safetensors")
    os.utime(weights, ns=(0, 0))
    with pytest.raises(UnreadableError, match=weights.name):
        run(decided, place / "out")
    assert snapshot(place) == {}


@pytest.mark.parametrize(("call", "count"), [("pwrite", 9), ("ftruncate", 2)])
def test_file_descriptors_are_given_back(call: str, count: int, source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of failures too: a caller may try many conversions."""
    convert(source, place / "first", "awq")
    before = descriptors()
    for number in range(5):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, stops_after(count, full(), getattr(os, call)))
            with pytest.raises(DestinationError):
                convert(source, place / f"out{number}", "awq", max_shard_size=20_000)
    assert descriptors() <= before


def descriptors() -> int:
    gc.collect()  # mapped files go with the checkpoint that a caught error may still hold
    return len(os.listdir("/proc/self/fd"))


def test_relative_destination_with_a_trailing_slash(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    convert(source, "out/", "awq")
    assert CONFIG["model_type"] in (place / "out" / "config.json").read_text("utf-8")
    assert [path.name for path in place.iterdir()] == ["out"]
