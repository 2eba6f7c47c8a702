"""Every hostile source of ``fixtures/attacks``, through every command that a user can point at it.

What must happen is in the table of ``fixtures/attacks/README.md``: the exit codes of ``convert``, and words of its sentence. For
every command: a typed exit code, one clear line where it refuses, nothing that a terminal would obey, nothing written, no code of
the source run, and time and memory in proportion to the source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from attacks import FOLDER, MADE, SMALL, make, small
from measured import Measured, Run

COMMANDS = {
    "convert to awq": ("convert", "source", "place/out", "--to", "awq"),
    "convert to gptq": ("convert", "source", "place/out", "--to", "gptq"),
    "plan": ("plan", "source", "--to", "awq"),
    "inspect": ("inspect", "source", "--layers"),
    "inspect as JSON": ("inspect", "source", "--json"),
    "verify": ("verify", "source", "source"),
    "fingerprint": ("fingerprint", "source", "--tensors"),
    "doctor": ("doctor", "source"),
    "doctor --fix": ("doctor", "source", "--fix", "place/out"),
    "check": ("check", "source", "--for", "vllm"),
}
NOT_ALL = {
    "006-header-of-100-mb-of-lists": {"convert to awq", "convert to gptq", "doctor"},
    "007-header-of-160000-tensors": {"convert to awq", "convert to gptq", "doctor", "fingerprint"},
    "057-terabyte-of-a-tensor": set(COMMANDS) - {"verify", "fingerprint"},
}
"""Attacks that take seconds a command, or for which reading everything means a terabyte: the commands that they are given."""

MEMORY, SECONDS = 96 << 20, 10
MEMORY_PER_BYTE, SECONDS_PER_MEGABYTE = 32, 0.3
"""What a command may use beyond a bare interpreter and its libraries, and for each byte (megabyte) that is stored of the source.

The 32 is Python's: ``[],`` becomes a list of 56 bytes and a reference of 8. Seconds allow for a slow machine.
"""


class Row(NamedTuple):
    """One row of the table. exits: of convert to awq and to gptq; says: words of the sentence, of each that is not 0."""

    exits: tuple[int, int]
    says: str


def table() -> dict[str, Row]:
    rows = re.findall(r"^\| `(\d{3}[\w-]*)` \|.*\| (\d) \| (\d) \| (.*) \|$", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)
    return {name: Row((int(awq), int(gptq)), says.strip("`")) for name, awq, gptq, says in rows}


ROWS = table()


@pytest.fixture(scope="module")
def measured() -> Iterator[Measured]:
    with Measured() as server:
        yield server


def stored_bytes(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def test_every_attack_has_a_number_a_row_and_a_folder() -> None:
    names = sorted([*SMALL, *MADE])
    assert sorted(ROWS) == names
    assert len({name[:3] for name in names}) == len(names)
    assert sorted(path.name for path in FOLDER.iterdir() if path.is_dir()) == sorted(SMALL)


@pytest.mark.parametrize("attack", SMALL)
def test_a_kept_attack_is_what_its_recipe_makes(attack: str) -> None:
    assert {path.name: path.read_bytes() for path in (FOLDER / attack).iterdir()} == small(attack)


@pytest.mark.parametrize("attack", sorted(ROWS))
def test_attack(attack: str, measured: Measured, tmp_path: Path) -> None:
    source, place = make(attack, tmp_path / "source"), tmp_path / "place"
    place.mkdir()
    size = stored_bytes(source)
    memory, seconds = MEMORY + MEMORY_PER_BYTE * size, SECONDS + SECONDS_PER_MEGABYTE * size / 1e6
    beside = sorted(tmp_path.iterdir())
    row = ROWS[attack]
    for name, command in COMMANDS.items():
        if name not in NOT_ALL.get(attack, COMMANDS):
            continue
        run = measured.run(command, tmp_path, seconds=int(seconds), memory=2 * memory)
        where = f"{attack}, {name}: {run}"[:4000]
        assert run.code is not None, f"{attack}, {name}: was still running after {seconds:.0f} s, or was killed"
        assert run.growth <= memory, where
        check_output(run, where, as_json="--json" in command)
        allowed = {"verify": {0, 3, 4, 5}, "doctor": {0, 1, 5}, "doctor --fix": {0, 1, 3, 5}}.get(name, {0, 3, 5})
        if name.startswith("convert"):
            wanted = row.exits[name.endswith("gptq")]
            allowed = {wanted}
            assert wanted == 0 or row.says in run.stderr, where
        assert run.code in allowed, where
        written = sorted(place.iterdir())
        assert written == ([place / "out"] if name.startswith(("convert", "doctor --fix")) and run.code in {0, 1} and written else []), (
            where
        )
        assert run.code == 0 or not name.startswith("convert") or not written, where
        assert sorted(tmp_path.iterdir()) == beside, where
        for path in written:
            assert not any(b"secret" in part.read_bytes() for part in path.iterdir()), where
            for part in path.iterdir():
                part.unlink()
            path.rmdir()


def check_output(run: Run, where: str, as_json: bool) -> None:
    """One line if it refuses, or those of a plan; nothing unprintable, nothing endless outside JSON, and no traceback."""
    assert "Traceback" not in run.stderr, where
    for text in (run.stdout, run.stderr):
        assert all(line.isprintable() for line in text.split("\n")), where
        assert as_json or all(len(line) <= 2500 for line in text.split("\n")), where
    lines = run.stderr.splitlines()
    assert len(lines) <= 1 or all(line.startswith("refused: ") for line in lines), where
    if run.code in {3, 5} and not run.stdout:
        assert len(lines) >= 1, where
