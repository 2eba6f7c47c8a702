"""Files, disks and folders that fail while they are used: one sentence, nothing visible left, and no crash."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import change_json, change_tensors, model, write_msmodelslim
from places import HIDDEN, assert_unfinished, failing, fails, names, path_of, snapshot, succeeds

from convert import outputs
from convert.engine import convert
from convert.planning import plan
from convert.verification import verify
from formats import files, open_checkpoint
from formats.errors import DestinationError, UnreadableError

SHARD = "quant_model_weight_w4a16-00002-of-00003.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three shards."""
    return write_msmodelslim(tmp_path / "source", model(blocks=1), shards=3)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


# --- a source that changes or fails while it is read ------------------------------------------------------------------


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def replaced(path: Path) -> None:
    shutil.copyfile(path, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def rewritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    os.utime(path, ns=(0, 0))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES = {
    truncated: "ends at byte|was replaced|changed while",
    emptied: "ends at byte|was replaced|changed while",
    replaced: "was replaced while it was being read|changed while",
    rewritten: "was replaced while it was being read|changed while",
    Path.unlink: r"has vanished since it was opened \(No such file or directory\)|changed while",
    a_folder: "is not a regular file|changed while",
    a_pipe: "is not a regular file|changed while",
}


@pytest.mark.parametrize("most", [1, 256], ids=["opened again", "held open"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_shard_that_changes_while_it_is_converted(
    change: Callable[[Path], None], most: int, source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the plan was made, and before a weight was read. most: files that are held open."""
    monkeypatch.setattr(files, "MAX_OPEN", most)
    make = outputs.FileOutput.make
    monkeypatch.setattr(outputs.FileOutput, "make", lambda self: (make(self), change(source / SHARD)))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UnreadableError, match=f"^{SHARD}: ({CHANGES[change]})"):
        convert(source, place / "out", "awq")
    assert names(place) == []
    assert len(os.listdir("/proc/self/fd")) <= before + 4


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("verb", ["verify", "fingerprint"])
def test_a_shard_that_changes_while_it_is_verified(
    verb: str, change: Callable[[Path], None], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_OPEN", 1)
    from convert import verification

    share = verification.share

    def change_then_share(*args: Any) -> Any:
        change(source / SHARD)
        return share(*args)

    monkeypatch.setattr(verification, "share", change_then_share)
    others = [source] if verb == "verify" else []
    line = fails(5, verb, source, *others)
    assert SHARD in line


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("verb", ["convert", "verify", "fingerprint", "inspect", "plan"])
def test_a_shard_that_cannot_be_read_is_named(verb: str, number: int, source: Path, place: Path) -> None:
    words: dict[str, list[str | Path]] = {
        "convert": [source, place / "out", "--to", "awq"],
        "verify": [source, source],
        "plan": [source, "--to", "awq"],
    }
    with failing("preadv", number, lambda path: path.endswith(SHARD)) as refused:
        line = fails(5, verb, *words.get(verb, [source]))
    assert refused
    assert f"{SHARD}: cannot be read at byte 0 ({os.strerror(number)})" in line
    assert names(place) == []


@pytest.mark.parametrize("after", [3, 10, 30])
@pytest.mark.parametrize("verb", ["convert", "verify", "fingerprint"])
def test_a_disk_that_fails_between_two_reads(verb: str, after: int, source: Path, place: Path) -> None:
    words: dict[str, list[str | Path]] = {"convert": [source, place / "out", "--to", "awq"], "verify": [source, source]}
    with failing("preadv", errno.EIO, lambda path: path.startswith(str(source)), after=after) as refused:
        line = fails(5, verb, *words.get(verb, [source]))
    assert refused
    assert "cannot be read at byte" in line
    assert names(place) == []


def test_permission_that_is_lost_while_a_shard_is_not_open(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_OPEN", 1)
    decided = plan(source, "awq")
    with failing("open", errno.EACCES, lambda path: path.endswith(SHARD)), pytest.raises(UnreadableError) as caught:
        staging_run(decided, place / "out")
    assert str(caught.value) == f"{SHARD}: has vanished since it was opened (Permission denied)"
    assert names(place) == []


def staging_run(decided: Any, out: Path) -> None:
    from convert.engine import run

    run(decided, out, proof=True)


@pytest.mark.parametrize("what", ["folder", "pipe", "nothing", "loop", "socket"])
@pytest.mark.parametrize("verb", ["inspect", "fingerprint", "convert", "verify"])
def test_a_shard_that_is_no_file(verb: str, what: str, source: Path, place: Path) -> None:
    shard = source / SHARD
    shard.unlink()
    if what == "folder":
        shard.mkdir()
    elif what == "pipe":
        os.mkfifo(shard)
    elif what == "loop":
        shard.symlink_to(shard.name)
    elif what == "socket":
        os.mknod(shard, 0o140600)
    words: dict[str, list[str | Path]] = {"convert": [source, place / "out", "--to", "awq"], "verify": [source, source]}
    assert SHARD in fails(5, verb, *words.get(verb, [source]))
    assert names(place) == []


@pytest.mark.parametrize("what", ["folder", "pipe"])
def test_a_single_weight_file_that_is_no_file(what: str, tmp_path: Path) -> None:
    folder = write_msmodelslim(tmp_path / "single", model(blocks=1))
    (weights,) = folder.glob("*.safetensors")
    weights.unlink()
    weights.mkdir() if what == "folder" else os.mkfifo(weights)
    assert weights.name in fails(5, "inspect", folder)


def test_shards_that_are_links_are_followed(source: Path, place: Path, tmp_path: Path) -> None:
    """A hub's cache is made of links out of the folder: reading through them is meant, and harmless."""
    blobs, revision = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "revision"
    blobs.mkdir(parents=True)
    revision.mkdir(parents=True)
    for number, path in enumerate(source.iterdir()):
        path.rename(blobs / str(number))
        (revision / path.name).symlink_to(blobs / str(number))
    before = snapshot(blobs)
    convert(revision, place / "out", "awq")
    assert verify(revision, place / "out").same
    assert snapshot(blobs) == before


@pytest.mark.parametrize("link", ["journal", "model", "weights", "folder"])
def test_links_in_the_hidden_folder_are_never_written_through(link: str, source: Path, place: Path, tmp_path: Path) -> None:
    """Who may write beside the destination could lay links there before the conversion begins."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "model.safetensors").write_text("mine", "utf-8")
    hidden = place / HIDDEN
    if link == "folder":
        hidden.symlink_to(victim)
    else:
        hidden.mkdir()
        if link == "journal":
            (hidden / "journal").symlink_to(victim / "model.safetensors")
        elif link == "model":
            (hidden / "model").symlink_to(victim)
        else:
            (hidden / "model").mkdir()
            (hidden / "model" / "model.safetensors").symlink_to(victim / "model.safetensors")
    with pytest.MonkeyPatch.context():
        try:
            convert(source, place / "out", "awq")
        except DestinationError:
            assert not (place / "out").exists()
        else:
            assert verify(source, place / "out").same
            assert not (place / "out").is_symlink()
    assert snapshot(victim) == {"model.safetensors": b"mine"}


# --- calls that do less than they were asked for ----------------------------------------------------------------------


def test_short_reads_and_short_writes_are_gone_on_with(source: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, tmp_path / "whole", "awq")
    chance = random.Random(1)
    preadv, pwrite, calls = os.preadv, os.pwrite, [0, 0]

    def read_less(fd: int, views: list[memoryview], offset: int) -> int:
        calls[0] += 1
        (view,) = views
        return preadv(fd, [view[: chance.randrange(1, len(view) + 1)]], offset)

    def write_less(fd: int, data: memoryview, offset: int) -> int:
        calls[1] += 1
        return pwrite(fd, data[: chance.randrange(1, len(data) + 1)], offset)

    monkeypatch.setattr(os, "preadv", read_less)
    monkeypatch.setattr(os, "pwrite", write_less)
    convert(source, place / "out", "awq")
    assert snapshot(place / "out") == snapshot(tmp_path / "whole")
    assert verify(source, place / "out").same
    assert min(calls) > 100


def test_signals_do_not_disturb(source: Path, tmp_path: Path) -> None:
    """A timer that fires all the time: every system call may be interrupted (EINTR), and none may fail for it."""
    code = f"""
import signal
from convert import convert, verify
fired = [0]
def fire(*args): fired[0] += 1
signal.signal(signal.SIGALRM, fire)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
convert({str(source)!r}, {str(tmp_path / "signals")!r}, "awq")
assert verify({str(source)!r}, {str(tmp_path / "signals")!r}).same
signal.setitimer(signal.ITIMER_REAL, 0)
assert fired[0] > 10
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    convert(source, tmp_path / "whole", "awq")
    assert snapshot(tmp_path / "signals") == snapshot(tmp_path / "whole")


# --- a destination that fails -----------------------------------------------------------------------------------------


def convert_fails(source: Path, place: Path, *options: str) -> str:
    return fails(1, "convert", source, place / "out", "--to", "awq", *options)


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT, errno.EROFS, errno.EFBIG], ids=errno.errorcode.get)
@pytest.mark.parametrize("after", [0, 15])
def test_weights_that_cannot_be_written(after: int, number: int, source: Path, place: Path) -> None:
    with failing("pwrite", number, lambda path: path.endswith(".safetensors"), after=after) as refused:
        line = convert_fails(source, place)
    assert refused
    assert ("the disk quota is used up" if number == errno.EDQUOT else os.strerror(number)) in line
    assert str(place / "out") in line
    if after:
        assert_unfinished(place)
    else:
        assert names(place) == []
    convert(source, place / "out", "awq")
    assert verify(source, place / "out").same
    assert names(place) == ["out"]


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_journal_that_cannot_be_written(after: int, source: Path, place: Path) -> None:
    with failing("pwrite", errno.ENOSPC, lambda path: path.endswith("journal"), after=after) as refused:
        line = convert_fails(source, place)
    assert refused
    assert "the disk is full" in line
    assert names(place) == ([HIDDEN] if "run the same command" in line else [])
    convert(source, place / "out", "awq")
    assert verify(source, place / "out").same
    assert names(place) == ["out"]


def test_what_was_written_and_cannot_be_read_back(source: Path, place: Path) -> None:
    with failing("preadv", errno.EIO, lambda path: HIDDEN in path) as refused:
        line = convert_fails(source, place)
    assert refused
    assert "Input/output error" in line
    assert not (place / "out").exists()
    convert(source, place / "out", "awq")
    assert names(place) == ["out"]


def test_a_disk_that_holds_something_else_than_was_written(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = os.pwrite, [0]

    def lie(fd: int, data: Any, offset: int) -> int:
        if path_of(fd).endswith(".safetensors"):
            count[0] += 1
            if count[0] == 20:
                return real(fd, bytes(b ^ 1 for b in memoryview(data).cast("B")), offset)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", lie)
    line = fails(4, "convert", source, place / "out", "--to", "awq", "--jobs", "1")
    assert "the file does not hold what was written to it; check the disk" in line or "on the left and" in line
    assert names(place) == []


@pytest.mark.parametrize("gone", ["parent", "hidden folder"])
def test_a_destination_that_vanishes(gone: str, source: Path, place: Path, tmp_path: Path) -> None:
    real, count = os.pwrite, [0]

    def pwrite(*args: Any) -> int:
        count[0] += 1
        if count[0] == 30:
            (place if gone == "parent" else place / HIDDEN).rename(tmp_path / "moved")
            shutil.rmtree(tmp_path / "moved")
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        line = convert_fails(source, place)
    assert f"{place if gone == 'parent' else place / HIDDEN}: vanished while it was being written to" in line
    assert not place.exists() if gone == "parent" else names(place) == []


def test_too_many_open_files(source: Path, place: Path) -> None:
    with failing("open", errno.EMFILE, lambda path: HIDDEN in path, after=8) as refused:
        line = convert_fails(source, place)
    assert refused
    assert "Too many open files" in line
    assert not (place / "out").exists()
    with failing("open", errno.EMFILE, lambda path: path.endswith(SHARD)):
        assert f"{SHARD}: cannot be read (Too many open files)" in fails(5, "inspect", source)
    convert(source, place / "out", "awq")
    assert names(place) == ["out"]


def test_a_failed_attempt_to_go_on_keeps_the_work(source: Path, place: Path) -> None:
    """What was done before must not go because the next attempt cannot even begin."""
    with failing("pwrite", errno.ENOSPC, lambda path: path.endswith(".safetensors"), after=15):
        convert_fails(source, place)
    for call in ("open", "ftruncate", "chmod", "pwrite"):
        with failing(call, errno.EIO, lambda path: HIDDEN in path) as refused:
            convert_fails(source, place)
        assert refused
        assert names(place) == [HIDDEN]
    assert convert(source, place / "out", "awq").resumed
    assert verify(source, place / "out").same
    assert names(place) == ["out"]


@pytest.mark.parametrize("call", ["stat", "listdir"])
def test_a_destination_that_cannot_be_looked_at(call: str, source: Path, place: Path) -> None:
    convert(source, place / "out", "gptq")
    before = snapshot(place)
    with failing(call, errno.EACCES, lambda path: path.startswith(str(place))) as refused:
        line = convert_fails(source, place, "--overwrite")
    if refused:
        assert "Permission denied" in line
    assert snapshot(place) == before


# --- more files than may be open --------------------------------------------------------------------------------------


def test_more_shards_than_may_be_open(tmp_path: Path) -> None:
    """The process may have 40 files open: 90 shards are read, over 50 written, verified and read again."""
    source = write_msmodelslim(tmp_path / "source", model(blocks=4), shards=90)
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
from pathlib import Path
from convert import convert, fingerprint, inspect, verify
source, out, back = {str(source)!r}, {str(tmp_path / "out")!r}, {str(tmp_path / "back")!r}
convert(source, out, "awq", max_shard_size=3000, jobs=4)
assert len(list(Path(out).glob("*.safetensors"))) > 50
assert verify(source, out, jobs=4).same
assert inspect(out).schemes
assert len(convert(out, back, "gptq", jobs=4).plan.files) == 1
assert fingerprint(out).digest == fingerprint(back).digest
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_files_that_nobody_reads_are_closed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_OPEN", 2)

    def held() -> int:
        return sum(1 for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}") and SHARD[:18] in path_of(int(fd)))

    checkpoint = open_checkpoint(source)
    before = {name: checkpoint.tensors.array(name) for name in checkpoint.tensors}
    assert held() == 2
    for name, array in reversed(before.items()):
        assert (checkpoint.tensors.array(name) == array).all()
    assert held() == 2
    del checkpoint
    assert held() == 0


# --- doctor -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ill(tmp_path: Path, source: Path) -> Path:
    """A GPTQ folder whose config says other bits than its tensors: doctor mends it."""
    folder = tmp_path / "ill"
    convert(source, folder, "gptq", max_shard_size=60_000)
    change_json(folder / "config.json", lambda config: config["quantization_config"].update(group_size=32))
    assert "mended" in succeeds("doctor", folder, "--fix", tmp_path / "mended") or (tmp_path / "mended").is_dir()
    return folder


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("after", [0, 2])
def test_doctor_that_cannot_write(after: int, number: int, ill: Path, place: Path) -> None:
    with failing("pwrite", number, lambda path: path.endswith(".safetensors"), after=after) as refused:
        line = fails(1, "doctor", ill, "--fix", place / "out")
    assert refused
    assert "; nothing was left there" in line
    assert names(place) == []


@pytest.mark.parametrize("after", [0, 4, 12])
def test_doctor_that_cannot_read(after: int, ill: Path, place: Path) -> None:
    with failing("preadv", errno.EIO, lambda path: path.startswith(str(ill)), after=after) as refused:
        line = fails(5, "doctor", ill, "--fix", place / "out")
    assert refused
    assert "cannot be read at byte" in line
    assert names(place) == []


def test_a_shard_that_is_truncated_while_doctor_copies_it(ill: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convert import mending

    real = mending._write
    shard = sorted(ill.glob("*.safetensors"))[-1]
    monkeypatch.setattr(mending, "_write", lambda *args: (truncated(shard), real(*args)))
    assert f"{shard.name}: ends at byte" in fails(5, "doctor", ill, "--fix", place / "out")
    assert names(place) == []


def test_a_killed_doctor_begins_again(ill: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps no journal of what it copied: what a killed one left is no reason to fail, and does not stay."""
    (place / HIDDEN / "model").mkdir(parents=True)
    for path in ill.glob("*.safetensors"):
        (place / HIDDEN / "model" / path.name).write_bytes(b"half")
    (place / HIDDEN / "model" / "stray.json").write_bytes(b"{}")
    (place / HIDDEN / "journal").touch()
    succeeds("doctor", ill, "--fix", place / "out")
    assert names(place) == ["out"]
    assert snapshot(place / "out") == snapshot(tmp_path / "mended")


def test_weights_that_the_plan_did_not_see_leave_nothing(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that do not fit, deep in a layer, are found on the way: work that was done by then is of no use."""
    source = write_msmodelslim(tmp_path / "bad", model(blocks=1))
    (weights,) = source.glob("*.safetensors")

    def spoil(tensors: Any) -> None:
        tensors["model.layers.0.self_attn.v_proj.weight"].setflags(write=True)
        tensors["model.layers.0.mlp.up_proj.weight"][-1, -1] = 100

    change_tensors(weights, spoil)
    assert "up_proj" in fails(5, "convert", source, place / "out", "--to", "awq")
    assert names(place) == []
