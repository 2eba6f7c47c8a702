"""The real tools that check what Weighbridge writes, each in an environment of its own.

    nox -s autoawq autogptq gptqmodel msmodelslim

A session builds the tool's environment, then runs the project's own tests with the interpreter
that runs nox, and tells them where the tool's interpreter is; the tests call it as a subprocess.
So nox must be installed where Weighbridge and its test dependencies are.

The environments stay between runs, under ``$WEIGHBRIDGE_CACHE/oracles`` (else
``$XDG_CACHE_HOME/weighbridge/oracles``, else ``~/.cache/weighbridge/oracles``), and are installed
again only when their requirements change. A CPU build of torch is enough, and much smaller: let
pip's own configuration say where to find one. The pins need Python 3.11 or later.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import nox

TORCH = "torch==2.13.0"
ORACLES = Path(__file__).parent / "tests" / "oracles"


def cache_folder() -> Path:
    if own := os.environ.get("WEIGHBRIDGE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "weighbridge"


nox.options.reuse_existing_virtualenvs = True
nox.options.envdir = str(cache_folder() / "oracles")


def install(session: nox.Session, requirements: Path) -> None:
    """Install torch and then the requirements, unless this environment already has exactly them."""
    stamp = Path(session.virtualenv.location) / "weighbridge-requirements.sha256"
    digest = hashlib.sha256(TORCH.encode() + b"\n" + requirements.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text("ascii") == digest:
        session.log(f"{requirements.name} is already installed")
        return
    stamp.unlink(missing_ok=True)
    session.install(TORCH)
    # The file is a complete list, and the tools' own metadata asks for packages they do not need.
    session.install("--no-deps", "-r", str(requirements))
    stamp.write_text(digest, "ascii")


def run_oracle(session: nox.Session, tool: str, **variables: str) -> None:
    """Build the environment of ``tool`` and run ``tests/oracles/test_<tool>.py`` against it, under ``variables``."""
    install(session, ORACLES / f"requirements-{tool}.txt")
    session.run(
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "oracle",  # pyproject.toml leaves them out of an ordinary run
        str(ORACLES / f"test_{tool}.py"),
        *session.posargs,
        env={f"WEIGHBRIDGE_ORACLE_{tool.upper()}": str(Path(session.bin) / "python"), **variables},
        external=True,
    )


@nox.session(venv_backend="venv")
def autoawq(session: nox.Session) -> None:
    """AutoAWQ 0.2.9 decodes every AWQ folder that Weighbridge writes."""
    run_oracle(session, "autoawq")


@nox.session(venv_backend="venv")
def autogptq(session: nox.Session) -> None:
    """AutoGPTQ 0.7.1 decodes and loads every GPTQ folder that Weighbridge writes."""
    if sys.version_info >= (3, 12):
        session.error("AutoGPTQ 0.7.1 has no wheels for Python 3.12 and later: use 3.11")
    run_oracle(session, "autogptq")


@nox.session(venv_backend="venv")
def gptqmodel(session: nox.Session) -> None:
    """GPTQModel 7.6.0 and transformers 5.23.0 load every AWQ, GPTQ and dense folder that Weighbridge writes."""
    run_oracle(
        session,
        "gptqmodel",
        TORCHDYNAMO_DISABLE="1",  # its layers ask torch.compile for kernels, which takes longer than the tests
        GPTQMODEL_CPU_WORKERS="2",  # the default fails on two cores
        GPTQMODEL_TORCH_EXTENSIONS_DIR=str(Path(session.virtualenv.location) / "extensions"),  # of the packer that it compiles
    )


@nox.session(venv_backend="venv")
def msmodelslim(session: nox.Session) -> None:
    """msModelSlim 26.1.0 validates and reads every folder that Weighbridge writes in its format."""
    run_oracle(session, "msmodelslim")


@nox.session(venv_backend="venv")
def torch(session: nox.Session) -> None:
    """The real torch writes .bin folders; Weighbridge, beside it in one interpreter, reads them."""
    stamp = Path(session.virtualenv.location) / "weighbridge-requirements.sha256"
    project = Path(__file__).parent / "pyproject.toml"
    digest = hashlib.sha256(TORCH.encode() + project.read_bytes() + str(project).encode()).hexdigest()
    if not (stamp.exists() and stamp.read_text("ascii") == digest):
        session.install(TORCH)
        session.install("--editable", ".[test]")
        stamp.write_text(digest, "ascii")
    session.run("python", "-m", "pytest", "-m", "oracle", str(ORACLES / "test_torch_bin.py"), *session.posargs)
