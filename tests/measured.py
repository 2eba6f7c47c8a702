"""Commands of Weighbridge, each run by the real command line in a process of its own, with its time and memory measured.

``Measured`` starts one interpreter that has everything imported; for each command it forks a child, so that neither a hang, a
crash nor memory touches the tests. Run as a program, this module is that interpreter.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """What a command did. code: exit code, None if it was still running at the limit or was killed.

    growth   bytes by which the peak of resident memory lay above what the process began with
    """

    code: int | None
    stdout: str
    stderr: str
    seconds: float
    growth: int


class Measured:
    """Runs commands; a context manager."""

    def __enter__(self) -> Measured:
        paths = (str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1", "TERM": "dumb"}
        command = [sys.executable, "-W", "error", "-m", "measured"]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.communicate()

    def run(self, arguments: Sequence[str], folder: Path, seconds: int, memory: int) -> Run:
        """Run ``weighbridge ARGUMENTS`` in ``folder`` for at most so many seconds, with so many bytes more than it began with."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([list(arguments), str(folder), seconds, memory]) + "\n")
        self._server.stdin.flush()
        return Run(**json.loads(self._server.stdout.readline()))


def _status(key: str) -> int:
    """Bytes that /proc says of this process."""
    lines = Path("/proc/self/status").read_text("ascii", "replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _child(arguments: list[str], folder: str, seconds: int, memory: int) -> int:
    from convert.cli import app

    signal.alarm(seconds)  # its default action ends the process, whatever it is waiting for
    resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + memory, resource.RLIM_INFINITY))
    os.chdir(folder)
    try:
        app(arguments, prog_name="weighbridge", standalone_mode=True)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1 if error.code else 0
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def _measure(arguments: list[str], folder: str, seconds: int, memory: int) -> dict[str, Any]:
    outputs = [os.memfd_create(name) for name in ("stdout", "stderr")]
    told, tell = os.pipe()
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.close(told)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for number, fd in enumerate((nothing, *outputs)):
                os.dup2(fd, number)
            before = _status("VmRSS")
            code = _child(arguments, folder, seconds, memory)
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(tell, str(_status("VmHWM") - before).encode())
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(tell)
    _, status, usage = os.wait4(child, 0)
    taken = time.monotonic() - begin
    with os.fdopen(told, "rb") as pipe:
        growth = int(pipe.read() or usage.ru_maxrss * 1024)
    texts = []
    for fd in outputs:
        with os.fdopen(fd, "rb") as file:
            file.seek(0)
            texts.append(file.read().decode("utf-8", "surrogateescape"))
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    return {"code": code, "stdout": texts[0], "stderr": texts[1], "seconds": taken, "growth": growth}


def _serve() -> None:
    import importlib

    needed = "cli planning engine verification inspection mending checking certificate folder proof".split()
    for name in ("rich.table", "rich.console", "rich.progress", "typer.rich_utils", "xxhash", *(f"convert.{name}" for name in needed)):
        importlib.import_module(name)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_measure(*json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
