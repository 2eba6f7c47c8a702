"""Where a conversion may write, that a failed one leaves nothing that can be seen, and that the same command finishes it."""

from __future__ import annotations

import errno
import gc
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
from checkpoints import CONFIG, model, write_msmodelslim
from places import HIDDEN, assert_unfinished, failing, fails, full, journalled, names, snapshot, stops_after

from convert import engine
from convert.engine import convert, run
from convert.journal import Journal
from convert.outputs import FileOutput
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


def convert_fails(source: Path, destination: Path, *options: str) -> str:
    return fails(1, "convert", source, destination, "--to", "awq", *options)


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
    line = convert_fails(source, out)
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
    assert "remove it yourself" in convert_fails(source, out, "--overwrite")
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
    line = convert_fails(source, destination, "--base-model", str(base), *(["--overwrite"] if overwrite else []))
    assert "in the source, which is never written" in line
    assert snapshot(tmp_path) == before


# --- places that cannot be written ------------------------------------------------------------------------------------


def test_missing_parent_is_named(source: Path, place: Path) -> None:
    assert str(place / "nowhere") in convert_fails(source, place / "nowhere" / "out")
    assert snapshot(place) == {}


def test_parent_that_is_a_file_is_named(source: Path, place: Path) -> None:
    (place / "file").write_text("mine", "utf-8")
    assert str(place / "file") in convert_fails(source, place / "file" / "out")
    assert snapshot(place) == {"file": b"mine"}


def test_read_only_parent_is_named(source: Path, place: Path) -> None:
    with failing("mkdir", errno.EROFS, lambda path: path.startswith(str(place))):
        line = convert_fails(source, place / "out")
    assert str(place) in line
    assert "Read-only file system" in line
    assert "choose another destination" in line
    assert snapshot(place) == {}


def test_full_disk_is_found_before_anything_is_written(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = plan(source, "awq").target_bytes
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(os, "mkdir", stops_after(0, AssertionError("a folder was made"), os.mkdir))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    line = convert_fails(source, place / "out")
    assert str(place) in line
    assert "free" in line
    assert snapshot(place) == {}


def test_room_for_exactly_the_plan_is_enough(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(place)._replace(free=plan(source, "awq").target_bytes + 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert convert(source, place / "out", "awq").source_fingerprint is not None


# --- failures on the way ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, 1, 5, 25, 45])
@pytest.mark.parametrize("jobs", [1, 4])
def test_disk_that_fills_on_the_way_leaves_nothing_visible(calls: int, jobs: int, source: Path, place: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "whole", "awq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", stops_after(calls, full(), os.pwrite))
        line = convert_fails(source, place / "out", "--jobs", str(jobs))
    assert f"{place / 'out'}: the disk is full; " in line
    if HIDDEN in names(place):
        assert f"make room and run the same command to finish, or `weighbridge clean {place}` to give up" in line
        assert_unfinished(place)
        assert journalled(place).tiles or journalled(place).entries
    else:
        assert calls < 25
        assert "nothing was left there" in line
        assert names(place) == []
    result = convert(source, place / "out", "awq", jobs=jobs)
    assert result.resumed == ("run the same command" in line)
    assert snapshot(place / "out") == snapshot(tmp_path / "whole")
    assert names(place) == ["out"]


@pytest.mark.parametrize("late", ["write_sidecars", "write_certificate"])
def test_disk_that_fills_at_the_very_end_costs_no_work(late: str, source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small files beside the weights are written last, when hours of work are in the hidden folder."""
    with monkeypatch.context() as patch:
        patch.setattr(engine, late, stops_after(0, full(), getattr(engine, late)))
        assert "the disk is full; make room and run the same command" in convert_fails(source, place / "out")
    assert names(place) == [HIDDEN]
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "tile", stops_after(0, AssertionError("a tile was written again"), Journal.tile))
        assert convert(source, place / "out", "awq").resumed
    assert names(place) == ["out"]
    assert verify(source, place / "out").same


KEPT = {"open": False, "ftruncate": False, "mkdir": False, "fsync": False, "rename": True, "chmod": False}
"""System calls on the way, and whether work is there already that is worth keeping when they fail. After a failed fsync nobody
knows what the disk holds, so that nothing is."""


@pytest.mark.parametrize("name", KEPT)
def test_every_system_call_may_fail(name: str, source: Path, place: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "whole", "awq")
    with pytest.MonkeyPatch.context() as patch, failing(name, errno.EIO, lambda path: HIDDEN in path) as refused:
        if name == "open":  # rmtree opens the folder too, to empty it: let it
            patch.setattr(shutil, "rmtree", lambda *args, **options: None)
        line = convert_fails(source, place / "out")
    assert refused
    assert "Input/output error" in line
    assert ("run the same command to finish" in line) == KEPT[name]
    assert names(place) == ([HIDDEN] if KEPT[name] else [])
    assert convert(source, place / "out", "awq").resumed == KEPT[name]
    assert snapshot(place / "out") == snapshot(tmp_path / "whole")
    assert names(place) == ["out"]


def test_failure_keeps_the_folder_that_was_to_be_replaced(source: Path, place: Path) -> None:
    convert(source, place / "out", "gptq")
    before = snapshot(place / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", stops_after(30, full(), os.pwrite))
        convert_fails(source, place / "out", "--overwrite")
    assert snapshot(place / "out") == before
    assert_unfinished(place, ("out",))
    assert convert(source, place / "out", "awq", overwrite=True).resumed
    assert verify(source, place / "out").same
    assert snapshot(place / "out") != before
    assert names(place) == ["out"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_failed_exchange_puts_the_old_folder_back(moment: str, error: BaseException, source: Path, place: Path) -> None:
    """An interruption too: whenever it comes, the old model or the new one is there, whole."""
    convert(source, place / "out", "gptq")
    before = snapshot(place / "out")
    real, renames = os.rename, []

    def refuse(old: Any, new: Any) -> None:
        renames.append((Path(old).name, Path(new).name))
        step = len(renames)
        if (moment, step) in {("before", 1), ("between", 2)}:
            raise error
        real(old, new)
        if (moment, step) == ("after", 2):
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises((DestinationError, KeyboardInterrupt)):
            convert(source, place / "out", "awq", overwrite=True)
    assert renames[0] == ("out", "replaced")
    assert snapshot(place / "out") == before
    assert names(place) == [HIDDEN, "out"]
    assert convert(source, place / "out", "awq", overwrite=True).resumed
    assert verify(source, place / "out").same
    assert snapshot(place / "out") != before
    assert names(place) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_parent_that_cannot_be_synced_gets_no_folder(overwrite: bool, source: Path, place: Path) -> None:
    if overwrite:
        convert(source, place / "out", "gptq")
    before = snapshot(place)
    with failing("fsync", errno.EIO, lambda path: path == str(place)):
        convert_fails(source, place / "out", *(["--overwrite"] if overwrite else []))
    assert {name: content for name, content in snapshot(place).items() if not name.startswith(HIDDEN)} == before


@pytest.mark.parametrize("jobs", [1, 4])
def test_interrupt_leaves_nothing_visible(jobs: int, source: Path, place: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "whole", "awq")

    def interrupt(done: int) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, place / "out", "awq", progress=interrupt, jobs=jobs)
    assert_unfinished(place)
    assert convert(source, place / "out", "awq", jobs=jobs).resumed
    assert snapshot(place / "out") == snapshot(tmp_path / "whole")
    assert names(place) == ["out"]


def test_interrupt_before_anything_was_done_leaves_nothing(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileOutput, "make", stops_after(0, KeyboardInterrupt(), FileOutput.make))
    with pytest.raises(KeyboardInterrupt):
        convert(source, place / "out", "awq")
    assert names(place) == []


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
    gc.collect()  # files go with the checkpoint that a caught error may still hold
    return len(os.listdir("/proc/self/fd"))


def test_relative_destination_with_a_trailing_slash(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    convert(source, "out/", "awq")
    assert CONFIG["model_type"] in (place / "out" / "config.json").read_text("utf-8")
    assert [path.name for path in place.iterdir()] == ["out"]
