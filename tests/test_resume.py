"""Interrupted conversions: the same command finishes them, byte for byte, and nothing that was not done is taken for done."""

from __future__ import annotations

import functools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Model, change_json, linear, model, weight_file, write_msmodelslim
from killing import TileKey, counted_pwrites, kill_after, small_tiles, watched
from places import HIDDEN, assert_unfinished, fails, full, journalled, names, path_of, snapshot, stops_after, succeeds

from convert import engine, journal, outputs, staging, tiling
from convert.engine import convert
from convert.journal import Done, Journal
from convert.staging import clean
from formats import open_checkpoint
from formats.errors import DestinationError


@pytest.fixture(scope="module", params=["narrow", "wide"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """narrow: many layers of a few tiles; wide: one of three by four, the last row of them cut."""
    folder = tmp_path_factory.mktemp("sources")
    made = model(blocks=1)
    if request.param == "wide":
        made = Model({"model.layers.0.mlp.down_proj": linear(224, 3072, bias=True)}, made.plain)
    return write_msmodelslim(folder / "source", made)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes | None]:
    """What an uninterrupted conversion to AWQ writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(source, out, "awq")
    return snapshot(out)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@functools.cache
def count_pwrites(source: Path) -> int:
    """How often a conversion to AWQ in small tiles writes something."""
    with small_tiles(), counted_pwrites() as count:
        convert(source, source.parent / "counted", "awq", jobs=1)
    shutil.rmtree(source.parent / "counted")
    return count[0]


def interrupt(source: Path, place: Path, share: float = 0.6, **options: Any) -> Done:
    """Convert to AWQ in small tiles until a ``share`` of the writes is done and the disk is full."""
    pwrites = int(share * count_pwrites(source)) if share else 6
    with small_tiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", stops_after(pwrites, full(), os.pwrite))
        with pytest.raises(DestinationError, match="the disk is full"):
            convert(source, place / "out", "awq", jobs=1, **options)
    return journalled(place)


def tiles_of(source: Path) -> set[TileKey]:
    """All tiles of a conversion in small tiles."""
    with small_tiles(), watched() as begun, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "begin", lambda *args: None)
        patch.setattr(staging, "_make_durable", stops_after(0, full(), staging._make_durable))
        with pytest.raises(DestinationError):
            convert(source, source.parent / "counted", "awq")
    shutil.rmtree(source.parent / ".counted.weighbridge", ignore_errors=True)
    assert len(set(begun)) == len(begun)
    return set(begun)


def finished(source: Path, done: Done) -> Callable[[TileKey], bool]:
    """Whether a journal says that a tile is done."""
    entries = open_checkpoint(source).entries
    numbers = {name if kind == "plain" else f"{name}.weight": number for number, (kind, name) in enumerate(entries)}
    corners = {(key[0], key[1], key[3]) for key in done.tiles}
    return lambda tile: numbers[tile[0]] in done.entries or (numbers[tile[0]], *tile[1:]) in corners


def assert_finishes(source: Path, place: Path, whole: dict[str, bytes | None], done: Done, **options: Any) -> None:
    """The same command writes the tiles that ``done`` does not name, no other ones, and the same bytes as if it had never stopped."""
    tiles, is_done = tiles_of(source), finished(source, done)
    with small_tiles(), watched() as begun:
        result = convert(source, place / "out", "awq", **options)
    assert sorted(begun) == sorted(tile for tile in tiles if not is_done(tile))
    assert result.resumed == bool(done.tiles or done.entries)
    assert snapshot(place / "out") == whole
    assert names(place) == ["out"]


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_killed_conversion_is_finished_by_the_same_command(
    jobs: int, source: Path, place: Path, whole: dict[str, bytes | None], tmp_path: Path
) -> None:
    """Killed in the middle of a write, at random moments: what each worker was at is all that is done again."""
    kept = 0
    for moment in sorted(random.Random(f"{jobs}").sample(range(1, count_pwrites(source)), 4)):
        begun = kill_after(moment, tmp_path, source, place / "out", "awq", jobs=jobs)
        assert names(place) == [HIDDEN]
        done = journalled(place)
        is_done = finished(source, done)
        assert len([tile for tile in begun if not is_done(tile)]) <= jobs
        kept += len(done.tiles) + len(done.entries)
        assert_finishes(source, place, whole, done, jobs=jobs)
        shutil.rmtree(place / "out")
    assert kept


def test_a_conversion_that_is_killed_again_and_again_comes_to_an_end(
    source: Path, place: Path, whole: dict[str, bytes | None], tmp_path: Path
) -> None:
    last = -1
    for _ in range(3):  # by one worker, whose work comes in one order: with two, a run may be killed before it reaches anything new
        kill_after(count_pwrites(source) // 4, tmp_path, source, place / "out", "awq", jobs=1)
        done = journalled(place)
        assert len(done.tiles) + 100 * len(done.entries) > last, "each run gets further than the one before"
        last = len(done.tiles) + 100 * len(done.entries)
    assert_finishes(source, place, whole, journalled(place))


def test_what_a_killed_conversion_left_is_no_model(source: Path, place: Path, tmp_path: Path) -> None:
    kill_after(count_pwrites(source) // 2, tmp_path, source, place / "out", "awq")
    assert_unfinished(place)
    assert "neither a config.json nor" in fails(5, "inspect", place / HIDDEN / "model")
    succeeds("clean", place)
    assert names(place) == []


# --- every record of the journal --------------------------------------------------------------------------------------


def test_a_conversion_that_ends_at_any_record_is_finished(source: Path, place: Path, whole: dict[str, bytes | None]) -> None:
    """The hidden folder as it was when each record was written: journal up to there, and the data of that moment."""
    states: list[tuple[int, dict[str, bytes | None]]] = []
    real = Journal._append

    def keep_state(self: Journal, content: bytes) -> None:
        real(self, content)
        states.append((self.end, snapshot(place / HIDDEN)))

    with small_tiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "_append", keep_state)
        convert(source, place / "out", "awq", jobs=1)
    shutil.rmtree(place / "out")
    kinds = set()
    for _, state in states:
        for name, content in state.items():
            path = place / HIDDEN / name
            path.parent.mkdir(exist_ok=True)
            path.mkdir(exist_ok=True) if content is None else path.write_bytes(content)
        done = journalled(place)
        kinds.add((bool(done.tiles), bool(done.entries)))
        with small_tiles():
            assert convert(source, place / "out", "awq").resumed == bool(done.tiles or done.entries)
        assert snapshot(place / "out") == whole
        assert names(place) == ["out"]
        shutil.rmtree(place / "out")
    assert {(False, False), (True, False), (False, True), (True, True)} == kinds


@pytest.mark.parametrize("damage", ["cut", "bit", "zeros", "garbage"])
def test_a_damaged_journal_never_gives_wrong_weights(damage: str, source: Path, place: Path, whole: dict[str, bytes | None]) -> None:
    intact = interrupt(source, place)
    before = snapshot(place)
    content = before[f"{HIDDEN}/journal"]
    assert content
    chance = random.Random(damage)
    for at in [0, 1, 11, 12, *chance.sample(range(13, len(content)), 8)]:
        damaged = bytearray(content)
        if damage == "cut":
            del damaged[at:]
        elif damage == "bit":
            damaged[at] ^= 1 << chance.randrange(8)
        else:
            damaged[at:] = bytes(len(content) - at) if damage == "zeros" else chance.randbytes(len(content) - at)
        shutil.rmtree(place / "out", ignore_errors=True)
        for name, data in before.items():
            path = place / name
            path.mkdir(exist_ok=True) if data is None else path.write_bytes(data)
        (place / HIDDEN / "journal").write_bytes(damaged)
        done = journalled(place)
        assert done.tiles.items() <= intact.tiles.items() or done.entries.keys() < intact.entries.keys()
        with small_tiles():
            convert(source, place / "out", "awq")
        assert snapshot(place / "out") == whole
        assert names(place) == ["out"]


# --- power cuts -------------------------------------------------------------------------------------------------------


class AtOnce:
    """An executor that does what is submitted at once, so that a test knows when."""

    def __init__(self, workers: int) -> None:
        pass

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, **options: Any) -> None:
        pass


@contextmanager
def synced_often(place: Path, size: int = 50_000) -> Iterator[list[dict[str, bytes | None]]]:
    """Output is synced after every ``size`` bytes; yields the hidden folder as it was at each sync."""
    states: list[dict[str, bytes | None]] = []
    real = Journal.synced

    def keep_state(self: Journal, upto: int) -> None:
        states.append(snapshot(place / HIDDEN / "model"))
        real(self, upto)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "SYNC_BYTES", size)
        patch.setattr(outputs, "ThreadPoolExecutor", AtOnce)
        patch.setattr(Journal, "synced", keep_state)
        yield states


def cut_power(place: Path, synced: dict[str, bytes | None], patch: pytest.MonkeyPatch, boot: str) -> int:
    """All that was written after the last sync becomes garbage, and the machine boots again; returns how much it was."""
    lost = 0
    for name, kept in synced.items():
        assert kept is not None
        path = place / HIDDEN / "model" / name
        now, then = (np.frombuffer(content, np.uint8) for content in (path.read_bytes(), kept))
        lost += int((now != then).sum())
        path.write_bytes(np.where(now == then, then, now ^ 0xA5).tobytes())
    patch.setattr(journal, "boot", lambda: boot)
    return lost


def test_after_a_power_cut_only_what_was_synced_counts(
    source: Path, place: Path, whole: dict[str, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with synced_often(place) as states:
        before = interrupt(source, place, 0.7)
    assert states
    assert cut_power(place, states[-1], monkeypatch, "another boot") > 0
    after = journalled(place)
    assert 0 < len(after.tiles) + 100 * len(after.entries) < len(before.tiles) + 100 * len(before.entries)
    assert_finishes(source, place, whole, after)


def test_without_a_sync_nothing_outlives_a_power_cut(
    source: Path, place: Path, whole: dict[str, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interrupt(source, place).end > 1000
    monkeypatch.setattr(journal, "boot", lambda: "another boot")
    assert_finishes(source, place, whole, Done())


def test_what_was_synced_outlives_every_later_power_cut(
    source: Path, place: Path, whole: dict[str, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the runs between them came to no sync of their own, or were refused."""
    with synced_often(place) as states:
        interrupt(source, place, 0.8)
    cut_power(place, states[-1], monkeypatch, "second boot")
    trusted = journalled(place)
    for _ in range(2):
        with pytest.raises(DestinationError, match="left its work"):
            convert(source, place / "out", "gptq")
    assert journalled(place) == trusted
    interrupt(source, place, 0)
    monkeypatch.setattr(journal, "boot", lambda: "third boot")
    assert journalled(place).tiles.keys() == trusted.tiles.keys()
    assert journalled(place).entries == trusted.entries
    assert_finishes(source, place, whole, journalled(place))


@pytest.mark.parametrize("syncs", [0, 1, 2])
def test_after_a_failed_sync_nobody_knows_what_the_disk_holds(
    syncs: int, source: Path, place: Path, whole: dict[str, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may forget what it could not write: the work since the sync before does not count, on the same boot either."""
    failed = OSError(5, "Input/output error")
    with small_tiles(), synced_often(place, 1) as states, monkeypatch.context() as patch:
        real = outputs.Syncer._sync

        def sync(self: outputs.Syncer, upto: int) -> None:
            if len(states) == syncs:
                patch.setattr(os, "fdatasync", stops_after(0, failed, os.fdatasync))
            real(self, upto)

        patch.setattr(outputs.Syncer, "_sync", sync)
        with pytest.raises(DestinationError, match="Input/output error"):
            convert(source, place / "out", "awq", jobs=1)
    if not syncs:
        assert names(place) == []
        return
    cut_power(place, states[-1], monkeypatch, journal.boot())
    assert journalled(place).tiles or journalled(place).entries
    assert_finishes(source, place, whole, journalled(place))


def test_what_is_written_during_a_sync_is_synced_by_the_next(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync clears ``dirty`` and then syncs; a write that it overtook must leave the file dirty."""
    real, made = outputs.write_all, []

    def overtaken(fd: int, data: Any, offset: int) -> None:
        for output in made:
            output.dirty &= path_of(fd) != str(output.path)
        real(fd, data, offset)

    make, finish, dirty = outputs.FileOutput.make, outputs.FileOutput.finish, []
    monkeypatch.setattr(outputs.FileOutput, "make", lambda self: (made.append(self), make(self)))
    monkeypatch.setattr(outputs.FileOutput, "finish", lambda self: (dirty.append(self.dirty), finish(self)))
    monkeypatch.setattr(outputs, "write_all", overtaken)
    convert(source, place / "out", "awq", jobs=1, max_shard_size=20_000)
    assert len(dirty) > 1
    assert all(dirty)


# --- another command --------------------------------------------------------------------------------------------------


def assert_refused(place: Path, reason: str, *words: str | Path) -> None:
    """The command is refused with one sentence that says ``reason``, and the work is left as it was."""
    before = snapshot(place)
    line = fails(1, "convert", *words)
    assert f"{place / 'out'}: an interrupted run left its work in {HIDDEN}, and {reason}; " in line, line
    assert f"run the command that was interrupted, or `weighbridge clean {place}` first" in line
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--to", "gptq"], "its target was awq:gemm, not gptq:v1"),
        (["--to", "awq:gemv"], "its target was awq:gemm, not awq:gemv"),
        (["--to", "awq", "--no-proof"], "its proof was True, not False"),
        (["--to", "awq", "--scale-dtype", "float16"], "its scale dtype was default, not float16"),
        (["--to", "awq", "--max-shard-size", "1MB"], "its max shard size was 5000000000, not 1000000"),
        (["--to", "awq", "--allow", "scale-subnormal"], "its allow was [], not ['scale-subnormal']"),
    ],
)
def test_another_command_is_refused(options: list[str], reason: str, source: Path, place: Path, whole: dict[str, bytes | None]) -> None:
    done = interrupt(source, place)
    assert_refused(place, reason, source, place / "out", *options)
    assert_finishes(source, place, whole, done)


def test_without_proof_and_then_with_it_is_refused(source: Path, place: Path, whole: dict[str, bytes | None]) -> None:
    """Tiles that were not compared cannot be proved any more without reading them again."""
    interrupt(source, place, proof=False)
    assert_refused(place, "its proof was False, not True", source, place / "out", "--to", "awq")
    with small_tiles():
        assert convert(source, place / "out", "awq", proof=False).resumed
    weights = next(name for name in whole if name.endswith(".safetensors"))
    assert (place / "out" / weights).read_bytes() == whole[weights]


def test_another_version_is_refused(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(source, place)
    was = engine.version()
    monkeypatch.setattr(engine, "version", lambda: "99.0")
    assert_refused(place, f"its version was {was}, not 99.0", source, place / "out", "--to", "awq")


def test_a_changed_source_is_refused(source: Path, place: Path, tmp_path: Path) -> None:
    mine = tmp_path / "source"
    shutil.copytree(source, mine)
    interrupt(mine, place)
    weights = weight_file(mine)
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert_refused(place, f"{weights.name} of the source has changed since", mine, place / "out", "--to", "awq")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    change_json(mine / "config.json", lambda config: config.update(hidden_act="gelu"))
    assert_refused(place, "its plan was another one", mine, place / "out", "--to", "awq")


def test_another_source_is_refused(source: Path, place: Path, tmp_path: Path) -> None:
    interrupt(source, place)
    other = write_msmodelslim(tmp_path / "other", model(blocks=1, bits=8))
    line = fails(1, "convert", other, place / "out", "--to", "gptq")
    assert "an interrupted run left its work" in line


def test_what_holds_no_work_yet_refuses_nobody(source: Path, place: Path, tmp_path: Path, whole: dict[str, bytes | None]) -> None:
    kill_after(1, tmp_path, source, place / "out", "gptq")
    assert names(place) == [HIDDEN]
    convert(source, place / "out", "awq")
    assert snapshot(place / "out") == whole
    assert names(place) == ["out"]


# --- at once ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["awq", "gptq"])
def test_a_second_conversion_into_the_same_folder_is_refused(to: str, source: Path, place: Path, whole: dict[str, bytes | None]) -> None:
    seen = []

    def meanwhile(done: int) -> None:
        if not seen:
            seen.append(fails(1, "convert", source, place / "out", "--to", to))
            (item,) = clean(place)
            assert item.running
            assert "running, left alone" in succeeds("clean", place)
            assert names(place) == [HIDDEN]

    convert(source, place / "out", "awq", progress=meanwhile)
    assert f"{place / HIDDEN}: another conversion is writing there; wait for it, or choose another destination" in seen[0]
    assert snapshot(place / "out") == whole
    assert names(place) == ["out"]


# --- what is left of what was left ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["model", "journal", "both", "weights", "end of the weights", "all but the folder"])
def test_a_hidden_folder_that_lost_something_is_begun_again(gone: str, source: Path, place: Path, whole: dict[str, bytes | None]) -> None:
    interrupt(source, place)
    hidden = place / HIDDEN
    weights = weight_file(hidden / "model")
    if gone in {"model", "both", "all but the folder"}:
        shutil.rmtree(hidden / "model")
    if gone in {"journal", "all but the folder"}:
        (hidden / "journal").unlink()
    if gone == "both":
        (hidden / "journal").write_bytes(b"")
    if gone == "weights":
        weights.unlink()
    if gone == "end of the weights":
        os.truncate(weights, weights.stat().st_size - 5000)
    assert_finishes(source, place, whole, Done())


def test_what_else_lies_in_an_untrusted_model_folder_does_not_stay(source: Path, place: Path, whole: dict[str, bytes | None]) -> None:
    (place / HIDDEN / "model").mkdir(parents=True)
    (place / HIDDEN / "model" / "tokenizer.json").write_text("{}", "utf-8")
    convert(source, place / "out", "awq")
    assert snapshot(place / "out") == whole


@pytest.mark.parametrize("options", [{"jobs": 4}, {"jobs": 1, "max_memory": 100 << 20}, {"max_memory": 1 << 30}])
def test_jobs_and_memory_may_be_others_than_before(
    options: dict[str, Any], source: Path, place: Path, whole: dict[str, bytes | None]
) -> None:
    assert_finishes(source, place, whole, interrupt(source, place), **options)


def test_tiles_may_be_others_than_before(
    source: Path, place: Path, whole: dict[str, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small, then large, then small again: what was done in one cut is done again in another, and the bytes stay the same."""
    first = interrupt(source, place)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", stops_after(12, full(), os.pwrite))
        with pytest.raises(DestinationError, match="the disk is full"):
            convert(source, place / "out", "awq", jobs=1)
    assert tiling.MOST > 1
    again = journalled(place)
    assert again.end > first.end
    assert_finishes(source, place, whole, again)


# --- clean ------------------------------------------------------------------------------------------------------------


def test_clean_removes_what_conversions_left_and_nothing_else(source: Path, place: Path, tmp_path: Path) -> None:
    interrupt(source, place)
    shutil.copytree(place / HIDDEN, place / ".two.weighbridge")
    shutil.copytree(place / HIDDEN, tmp_path / "elsewhere")
    (place / ".link.weighbridge").symlink_to(tmp_path / "elsewhere")
    (place / ".mine").mkdir()
    (place / ".mine.weighbridge").mkdir()
    (place / ".mine.weighbridge" / "notes").write_text("mine", "utf-8")
    (place / ".file.weighbridge").write_text("mine", "utf-8")
    (place / "out.weighbridge").mkdir()
    (place / "deeper").mkdir()
    shutil.copytree(place / HIDDEN, place / "deeper" / HIDDEN)
    before = snapshot(tmp_path)
    listed = clean(place, list_only=True)
    assert [Path(item.path).name for item in listed] == [HIDDEN, ".two.weighbridge"]
    assert snapshot(tmp_path) == before
    done = succeeds("clean", place)
    assert f"{place / 'out'}: removed" in done
    assert f"{place / 'two'}: removed" in done
    gone = {name for name in before if name.startswith((f"place/{HIDDEN}", "place/.two.weighbridge"))}
    assert snapshot(tmp_path) == {name: content for name, content in before.items() if name not in gone}
    assert (place / ".link.weighbridge").is_symlink()
    assert succeeds("clean", place) == f"{place}: nothing unfinished\n"


def test_clean_says_what_it_cannot_do(place: Path) -> None:
    assert str(place / "nowhere") in fails(1, "clean", place / "nowhere")
    (place / "file").write_text("mine", "utf-8")
    assert "cannot be listed" in fails(1, "clean", place / "file")


def test_the_plan_is_the_same_for_both_sources(source: Path) -> None:
    """What these tests count on: several tiles in each, along both axes in one."""
    tiles = tiles_of(source)
    corners = {(row, col) for _, row, col in tiles}
    assert len(tiles) >= 12
    assert corners in ({(0, 0)}, {(row, col) for row in (0, 64, 128, 192) for col in (0, 1024, 2048)})


def test_control_c_on_the_command_line(source: Path, place: Path, whole: dict[str, bytes | None]) -> None:
    """No traceback; what was done stays, and the command that is typed again finishes it."""
    code = f"""
import os, signal
from convert import tiling
from convert.cli import main
tiling.MOST, real, count = 1, os.pwrite, [0]
def pwrite(*args):
    count[0] += 1
    if count[0] == {count_pwrites(source) // 2}:
        os.kill(os.getpid(), signal.SIGINT)
    return real(*args)
os.pwrite = pwrite
main()
"""
    words = ["convert", str(source), str(place / "out"), "--to", "awq", "--jobs", "2"]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode not in {0, 2, 3, 4, 5}
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert_unfinished(place)
    done = subprocess.run([sys.executable, "-m", "convert", *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert snapshot(place / "out") == whole
    assert names(place) == ["out"]
