"""The command line in processes of its own: their memory watched, killed when a round says so, and what they leave behind."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .verdict import insist

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 300
"""Seconds after which a command counts as hung."""


class Sandbox:
    """A folder for one round: source, the place of the result, and the child's own HOME and TMPDIR, which must stay empty."""

    def __init__(self, root: Path) -> None:
        self.source, self.place, self.home, self.temporary = (root / name for name in ("source", "place", "home", "tmp"))
        for folder in (self.place, self.home, self.temporary):
            folder.mkdir()
        self.result, self.hidden = self.place / "out", self.place / ".out.weighbridge"
        self.output, self.errors = root / "stdout", root / "stderr"

    def environment(self, kernels: str) -> dict[str, str]:
        """All that a child inherits."""
        fixed = {"HOME": str(self.home), "TMPDIR": str(self.temporary), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        return {**fixed, "PYTHONPATH": str(ROOT), **({"WEIGHBRIDGE_KERNELS": kernels} if kernels else {})}

    def leaked(self, *expected: str) -> list[str]:
        """Whatever lies where nothing should."""
        found = [str(path) for folder in (self.home, self.temporary) for path in folder.iterdir()]
        return found + [path.name for path in self.place.iterdir() if path.name not in expected]

    def progress(self) -> float:
        """The written part of the growing files; above 1 once they have taken their place."""
        try:
            stats = [entry.stat() for entry in os.scandir(self.hidden / "model") if entry.name.endswith(".safetensors")]
        except OSError:
            return 2.0 if self.hidden.exists() and self.result.exists() else 0.0
        return sum(stat.st_blocks * 512 for stat in stats) / max(1, sum(stat.st_size for stat in stats))

    def holds_work(self) -> bool:
        """Whether the journal has a record of a tile or of an entry."""
        try:
            data, at = (self.hidden / "journal").read_bytes(), 0
        except OSError:
            return False
        while at + 12 < len(data):
            if data[at + 12 : at + 13] in {b"T", b"E"}:
                return True
            at += 12 + struct.unpack_from("<IQ", data, at)[0]
        return False


@dataclass(frozen=True)
class Ended:
    """How a child ended. peak: bytes of anonymous memory; compiled: whether Numba compiled a kernel for it, which takes its own."""

    code: int
    report: dict[str, Any]
    stderr: str
    killed: bool
    peak: int
    seconds: float
    compiled: bool


def anonymous(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+)", text)
    return int(found[1]) * 1024 if found else 0


def compiled_kernels() -> set[str]:
    return {path.name for path in (ROOT / "formats" / "__pycache__").glob("*.nbc")}


def run(box: Sandbox, command: list[str], kernels: str = "", kill: Callable[[float], bool] = lambda seconds: False) -> Ended:
    """Run ``weighbridge COMMAND``, watching its memory; SIGKILL once ``kill`` of the seconds since its start says so."""
    before, began, peak, killed = compiled_kernels(), time.monotonic(), 0, False
    with box.output.open("wb") as output, box.errors.open("wb") as errors:
        line = [sys.executable, "-m", "convert", *command]
        child = subprocess.Popen(line, cwd=box.place, env=box.environment(kernels), stdout=output, stderr=errors, stdin=subprocess.DEVNULL)
        while child.poll() is None:
            seconds = time.monotonic() - began
            peak = max(peak, anonymous(child.pid))
            killed = killed or kill(seconds) or seconds > TIME_LIMIT
            if killed:
                child.send_signal(signal.SIGKILL)
                child.wait()
            time.sleep(0.001)
    seconds = time.monotonic() - began
    insist(seconds < TIME_LIMIT, "hung:", *command)
    text = box.output.read_text()
    report = json.loads(text) if not killed and text else {}
    killed = killed and child.returncode == -signal.SIGKILL
    return Ended(child.returncode, report, box.errors.read_text(), killed, peak, seconds, bool(compiled_kernels() - before))


def bare_interpreter() -> int:
    """Bytes of anonymous memory of an interpreter that does nothing."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(.3)"]) as child:
        time.sleep(0.2)
        return anonymous(child.pid)
