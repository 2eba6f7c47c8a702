"""The journal: what goes in comes out, and nothing else does."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import journal
from convert.journal import Done, Journal, Key, TileRecord
from formats.errors import DestinationError

unhurried = settings(deadline=None, max_examples=150)

NUMBERS = st.integers(0, 2**32 - 1)
KEYS = st.tuples(st.integers(0, 3), NUMBERS, NUMBERS, NUMBERS, NUMBERS)
LEAVES = st.binary(max_size=40).map(lambda content: content * 16)
RECORDS = st.one_of(
    st.builds(TileRecord),
    st.builds(TileRecord, LEAVES, LEAVES, st.booleans(), st.floats(0, 1)),
    st.builds(lambda leaves, bound: TileRecord(leaves, leaves, bound > 0, bound), LEAVES, st.floats(0, 1)),
)
VERDICTS = st.lists(st.lists(st.text(max_size=9) | st.floats(allow_nan=False, allow_infinity=False), max_size=8), max_size=3)
EVENTS = st.lists(st.tuples(KEYS, RECORDS) | st.tuples(st.integers(0, 3), VERDICTS), max_size=12)
WHAT = {"source": "here", "options": {"é": [1, None]}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal") / "journal"


def play(book: Journal | None, events: list[Any]) -> tuple[dict[Key, TileRecord], dict[int, list[Any]]]:
    """Write the events, if there is a journal; returns the tiles and entries that they leave.

    A right side that is empty is not told from one that is the left; there is none where the left is not empty too.
    """
    tiles: dict[Key, TileRecord] = {}
    entries: dict[int, list[Any]] = {}
    for what, content in events:
        if isinstance(what, tuple):
            if book is not None:
                book.tile(what, content)
            tiles[what] = replace(content, right=content.right or content.left)
        else:
            if book is not None:
                book.entry(what, content)
            entries[what] = content
            tiles = {key: record for key, record in tiles.items() if key[0] != what}
    return tiles, entries


def fresh(path: Path) -> Journal:
    path.unlink(missing_ok=True)
    book = Journal(path)
    book.begin(WHAT)
    return book


def verdicts(book: Journal) -> dict[int, list[Any] | None]:
    return {number: book.verdicts(number) for number in book.done.entries}


def read(path: Path) -> Done:
    book = Journal(path)
    book.close()
    return book.done


@unhurried
@given(EVENTS, EVENTS)
def test_what_is_written_is_read_by_the_next(path: Path, events: list[Any], more: list[Any]) -> None:
    book = fresh(path)
    assert not book.holds_work
    tiles, entries = play(book, events)
    book.close()
    book = Journal(path)
    assert book.done.began == {**WHAT, "boot": journal.boot()}
    assert (book.done.tiles, verdicts(book)) == (tiles, entries)
    assert book.holds_work == bool(tiles or entries)
    assert book.end == path.stat().st_size
    book.begin(WHAT)
    play(book, more)
    book.close()
    book = Journal(path)
    assert (book.done.tiles, verdicts(book)) == play(None, events + more)
    assert book.verdicts(9) is None
    book.close()


@unhurried
@given(EVENTS, st.data())
def test_a_journal_that_is_cut_or_damaged_forgets_only_what_follows(path: Path, events: list[Any], data: st.DataObject) -> None:
    book = fresh(path)
    ends = [book.end]
    for event in events:
        play(book, [event])
        ends.append(book.end)
    book.close()
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    damaged = content[:at] + data.draw(st.sampled_from([b"", bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]]))
    path.write_bytes(damaged)
    done = read(path)
    assert path.read_bytes() == damaged, "looking changes nothing"
    whole = max((end for end in ends if end <= at), default=0)
    assert done.end == whole
    path.write_bytes(content[:whole])
    assert read(path) == done


def test_only_what_was_synced_outlives_another_boot(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = fresh(path)
    book.tile((0, 0, 64, 0, 1024), TileRecord(b"0" * 16))
    book.synced(book.end)
    vouched = book.done.vouched
    book.tile((1, 0, 64, 0, 1024), TileRecord(b"1" * 16))
    book.close()
    assert {key[0] for key in read(path).tiles} == {0, 1}
    for boot in ("second", "third", "fourth"):
        monkeypatch.setattr(journal, "boot", lambda boot=boot: boot)
        done = read(path)
        assert ({key[0] for key in done.tiles}, done.end, done.vouched) == ({0}, vouched, vouched)
        book = Journal(path)
        book.begin(WHAT)
        book.tile((2, 0, 64, 0, 1024), TileRecord(b"2" * 16))
        book.close()
        assert {key[0] for key in read(path).tiles} == {0, 2}


def test_a_sync_vouches_for_what_was_there_when_it_began(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = fresh(path)
    book.tile((0, 0, 64, 0, 1024), TileRecord())
    upto = book.end
    book.tile((1, 0, 64, 0, 1024), TileRecord())
    book.synced(upto)
    book.close()
    monkeypatch.setattr(journal, "boot", lambda: "another")
    assert {key[0] for key in read(path).tiles} == {0}


def test_doubt_takes_back_what_was_not_synced(path: Path) -> None:
    book = fresh(path)
    book.tile((0, 0, 64, 0, 1024), TileRecord())
    book.doubt()
    assert not book.holds_work
    book.close()
    book = fresh(path)
    book.tile((0, 0, 64, 0, 1024), TileRecord())
    book.synced(book.end)
    book.tile((1, 0, 64, 0, 1024), TileRecord())
    book.doubt()
    book.tile((2, 0, 64, 0, 1024), TileRecord())
    assert book.holds_work
    book.close()
    assert {key[0] for key in read(path).tiles} == {0}


def test_one_at_a_time(path: Path) -> None:
    book = fresh(path)
    with pytest.raises(DestinationError, match="another conversion is writing there"):
        Journal(path)
    book.close()
    book.close()
    read(path)


def test_short_writes_are_gone_on_with(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))
    book = fresh(path)
    record = TileRecord(b"l" * 160, b"r" * 160, True, math.pi)
    book.tile((7, 0, 64, 0, 1024), record)
    book.close()
    assert read(path).tiles == {(7, 0, 64, 0, 1024): record}
