"""Children of ``serve-check``: an engine's interpreter on a job, what it may see, what it says, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from formats.errors import UsageError, WeighbridgeError
from formats.ir import Array

Output = Callable[[str], None]

SCRIPT = Path(__file__).with_name("serve_engine.py")

KEPT = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "CC", "CXX",
    "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "ROCM_PATH", "ROCM_HOME",
    "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE",
)  # fmt: skip
"""Variables of our environment that an engine may see: none that holds a secret."""


class EngineFailedError(WeighbridgeError):
    """The engine could not load or run the folder. ``log``: the end of what it said."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


def variables(place: Path) -> dict[str, str]:
    """The environment variables of a child: little of ours, nothing fetched, and what it leaves behind under ``place``."""
    own = {name: os.environ[name] for name in KEPT if name in os.environ}
    caches = ("HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "TRITON_CACHE_DIR",
              "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR", "MPLCONFIGDIR")  # fmt: skip
    return {
        **own,
        **{name: str(place / "cache" / name.lower()) for name in caches},
        "TMPDIR": str(place), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8:backslashreplace",
    }  # fmt: skip


def engine_settings(job: Mapping[str, Any]) -> dict[str, str]:
    """Settings that the engine needs to be judged by; those of vLLM for CPUs were found by measuring.

    VLLM_CPU_INT4_W4A8=0: else 4-bit weights in bfloat16 are run with int8 inputs where the CPU has AMX. In-process, without binding
    of threads, and on the loopback interface only.
    """
    if job["engine"] != "vllm":
        return {}
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if job["tp"] == 1 else {}
    own |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_LOGGING_LEVEL": "WARNING", "GLOO_SOCKET_IFNAME": "lo"}
    if job["cpu"]:
        own |= {"VLLM_CPU_INT4_W4A8": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        own |= {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
    return own


class Runner:
    """Runs jobs one after another, each in an interpreter of its own and a process group of its own."""

    def __init__(self, place: Path, log: BinaryIO | None, output: Output | None, stage: Output, timeout: float) -> None:
        self.place, self.log, self.output, self.stage, self.timeout = place, log, output, stage, timeout

    def run(self, python: str, name: str, job: Mapping[str, Any]) -> tuple[dict[str, Any], Array]:
        """(answer, [positions, vocabulary] log-probabilities) of interpreter ``python``, called ``name``; EngineFailedError if none."""
        self.stage(f"{name}: loading {Path(job['model']).name} in {job['dtype']}")
        place = self.place / str(job["engine"])
        (place / "tmp").mkdir(parents=True)
        answer, scores, order = place / "answer.json", place / "scores.npy", place / "job.json"
        order.write_text(json.dumps({**job, "answer": str(answer), "scores": str(scores)}), "utf-8")
        own = {**variables(place / "tmp"), **engine_settings(job), "OMP_NUM_THREADS": str(job["threads"])}
        status, lines = self._wait([python, str(SCRIPT), str(order)], own, place)
        said: dict[str, Any] = {}
        if answer.is_file():
            with contextlib.suppress(ValueError):
                said = json.loads(answer.read_text("utf-8"))
        log = "\n".join(lines)
        if status is None:
            raise EngineFailedError(f"{name}: not done after {self.timeout:g} s; --timeout gives it longer", log)
        if status != 0 or "tokens" not in said:
            raise EngineFailedError(_why(name, status, said.get("error"), lines), log)
        return said, _load(scores, name)

    def _wait(self, command: list[str], own: dict[str, str], place: Path) -> tuple[int | None, deque[str]]:
        """(exit status or None if time ran out, the last lines of its output). The whole process group is gone afterwards."""
        lines: deque[str] = deque(maxlen=400)
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=place, env=own, start_new_session=True
            )
        except OSError as error:
            raise EngineFailedError(f"{command[0]}: cannot be run ({error.strerror or error})") from None
        reader = threading.Thread(target=self._read, args=(process.stdout, lines), daemon=True)
        reader.start()
        end, status = time.monotonic() + self.timeout, None
        try:
            while time.monotonic() < end:
                if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):  # not yet reaped: its group's number is its own
                    status = 0
                    break
                time.sleep(0.05)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            found = process.wait()
            reader.join(10)
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        return (None if status is None else found), lines

    def _read(self, pipe: BinaryIO, lines: deque[str]) -> None:
        for raw in iter(lambda: pipe.readline(1 << 16), b""):
            if self.log is not None:
                self.log.write(raw)
            line = raw.decode("utf-8", "replace").rstrip()
            lines.append(line)
            if self.output is not None:
                self.output(line)
        pipe.close()


def _why(name: str, status: int, error: Any, lines: Sequence[str]) -> str:
    """Why an engine has no answer, in one sentence."""
    said = " ".join(str(error).split()) if error else next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    if status < 0:
        said = f"killed by {_signal(-status)}{'' if error else f'; its last words: {said}'}"
    cut = said if len(said) <= 600 else f"{said[:400]} ... {said[-200:]}"
    return f"{name} cannot load or run it: {cut}; --verbose shows all that it said, --log FILE keeps it"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _load(path: Path, name: str) -> Array:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise EngineFailedError(f"{name}: its log-probabilities cannot be read ({error})") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype != np.float32 or not found.size:
        raise EngineFailedError(f"{name}: its log-probabilities are no float32 [positions, vocabulary]")
    return found


@contextlib.contextmanager
def log_file(path: str | os.PathLike[str] | None) -> Iterator[BinaryIO | None]:
    """The file for the engine's output, if there is to be one."""
    if path is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(Path(path).open("wb"))
        except OSError as error:
            raise UsageError(f"--log {path}: cannot be written ({error.strerror or error})") from None
        yield file
