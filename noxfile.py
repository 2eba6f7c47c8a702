"""The real tools that check what Weighbridge writes, each in an environment of its own.

    nox -s autoawq autogptq gptqmodel msmodelslim compressed_tensors lmdeploy mindspore mindformers vllm vllm_ascend

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
import tempfile
from pathlib import Path

import nox

TORCH = "torch==2.13.0"
ORACLES = Path(__file__).parent / "tests" / "oracles"
VLLM_ASCEND = "vllm_ascend-0.30.0rc2"
VLLM_SETTINGS = {
    "GLOO_SOCKET_IFNAME": "lo",  # its one process meets itself on the loopback
    "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def cache_folder() -> Path:
    if own := os.environ.get("WEIGHBRIDGE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "weighbridge"


nox.options.reuse_existing_virtualenvs = True
nox.options.envdir = str(cache_folder() / "oracles")


def shared_environment(session: nox.Session, name: str) -> Path:
    """The folder of an environment that several sessions use. (nox itself has one for each.)"""
    home = cache_folder() / "oracles" / name
    if not (home / "bin" / "python").exists():
        session.run(sys.executable, "-m", "venv", "--clear", str(home), external=True)
    return home


def install(session: nox.Session, requirements: Path, home: Path, torch: str = TORCH) -> None:
    """Install torch and then the requirements, unless the environment at ``home`` already has exactly them; torch: "" for none."""
    stamp = home / "weighbridge-requirements.sha256"
    digest = hashlib.sha256(torch.encode() + b"\n" + requirements.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text("ascii") == digest:
        session.log(f"{requirements.name} is already installed")
        return
    stamp.unlink(missing_ok=True)
    pip = (str(home / "bin" / "python"), "-m", "pip", "install")
    if torch:
        session.run(*pip, torch, silent=True, external=True)
    # The file is a complete list, and the tools' own metadata asks for packages they do not need.
    session.run(*pip, "--no-deps", "-r", str(requirements), silent=True, external=True)
    stamp.write_text(digest, "ascii")


def run_tests(session: nox.Session, tool: str, home: Path, **variables: str) -> None:
    """Run ``tests/oracles/test_<tool>.py`` against the environment at ``home``, under ``variables``."""
    session.run(
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "oracle",  # pyproject.toml leaves them out of an ordinary run
        str(ORACLES / f"test_{tool}.py"),
        *session.posargs,
        env={f"WEIGHBRIDGE_ORACLE_{tool.upper()}": str(home / "bin" / "python"), **variables},
        external=True,
    )


def run_oracle(session: nox.Session, tool: str, requirements: Path | None = None, **variables: str) -> None:
    """Build the session's environment, of ``tool``, and run ``tests/oracles/test_<tool>.py`` against it, under ``variables``.

    requirements   the tool's, if they are not requirements-<tool>.txt
    """
    home = Path(session.virtualenv.location)
    install(session, requirements or ORACLES / f"requirements-{tool}.txt", home)
    run_tests(session, tool, home, **variables)


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
def compressed_tensors(session: nox.Session) -> None:
    """transformers 5.10.1 and compressed-tensors 0.17.0 load every compressed-tensors folder that Weighbridge writes."""
    run_oracle(session, "compressed_tensors", ORACLES / "compressed_tensors" / "requirements.txt")


@nox.session(venv_backend="venv")
def lmdeploy(session: nox.Session) -> None:
    """LMDeploy 0.18.0 loads what Weighbridge writes, up to its kernels, and its lite gives the statistics and the AWQ folders of ours."""
    run_oracle(session, "lmdeploy", HF_HUB_OFFLINE="1")


@nox.session(venv_backend="venv")
def mindspore(session: nox.Session) -> None:
    """MindSpore 2.7.1 loads every .ckpt and safetensors file that Weighbridge writes in its formats, and writes what Weighbridge reads."""
    if sys.version_info >= (3, 12):
        session.error("MindSpore 2.7.1 has no wheels for Python 3.12 and later: use 3.11")
    home = Path(session.virtualenv.location)
    install(session, ORACLES / "requirements-mindspore.txt", home, torch="")
    run_tests(session, "mindspore", home)


@nox.session(venv_backend="venv")
def mindformers(session: nox.Session) -> None:
    """MindFormers 1.3.2 with Golden Stick 0.6.0 builds the networks of the folders that Weighbridge writes, and loads their weights."""
    if sys.version_info >= (3, 12):
        session.error("MindSpore 2.7.1 has no wheels for Python 3.12 and later: use 3.11")
    home = Path(session.virtualenv.location)
    install(session, ORACLES / "requirements-mindformers.txt", home, torch="")
    run_tests(session, "mindformers", home)


def vllm_environment(session: nox.Session) -> Path:
    home = shared_environment(session, "vllm")
    install(session, ORACLES / "requirements-vllm.txt", home)
    return home


def unpack_vllm_ascend(session: nox.Session, home: Path) -> None:
    """Lay the sources of vllm-ascend into the folder of the environment at ``home``, unless they are there.

    They are not installed: that would build kernels, and as a plugin they would make any vLLM of the environment look for an NPU.
    """
    if (home / VLLM_ASCEND).exists():
        session.log(f"{VLLM_ASCEND} is already there")
        return
    with tempfile.TemporaryDirectory(dir=home) as folder:
        pip = (str(home / "bin" / "python"), "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-binary", "vllm-ascend")
        session.run(
            *pip,
            "--dest",
            folder,
            "-r",
            str(ORACLES / "requirements-vllm_ascend.txt"),
            env={"SOC_VERSION": "ascend910b1"},  # pip asks its setup.py for the version, which asks for a chip
            silent=True,
            external=True,
        )
        session.run("tar", "-xzf", f"{folder}/{VLLM_ASCEND}.tar.gz", "-C", folder, f"{VLLM_ASCEND}/vllm_ascend", external=True)
        (Path(folder) / VLLM_ASCEND).rename(home / VLLM_ASCEND)


@nox.session(venv_backend="none")
def vllm(session: nox.Session) -> None:
    """vLLM 0.32.0 runs what Weighbridge writes as AWQ, GPTQ and compressed-tensors, and says what the float32 model says."""
    run_tests(session, "vllm", vllm_environment(session), **VLLM_SETTINGS)


@nox.session(venv_backend="none")
def vllm_ascend(session: nox.Session) -> None:
    """vLLM 0.32.0 loads msModelSlim folders with the parser and the schemes of vllm-ascend 0.30.0rc2."""
    home = vllm_environment(session)
    unpack_vllm_ascend(session, home)
    run_tests(session, "vllm_ascend", home, **VLLM_SETTINGS)


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


@nox.session(venv_backend="venv")
def quantize(session: nox.Session) -> None:
    """``quantize`` beside the real msModelSlim 26.1.0, AutoAWQ 0.2.9, AutoGPTQ 0.7.1, GPTQModel 7.6.0 and llm-compressor 0.12.0.2.

    After the sessions of these (llm-compressor's is compressed_tensors). msModelSlim's numbers are equal bit for bit; the others' but for
    ties; and whole models that we quantize by GPTQ, AWQ and W8A8 are no worse than the tools' on held-out text: each tool once, more models
    and settings with WEIGHBRIDGE_COMPARE=1. lm-evaluation-harness 0.4.13 is in this session's own environment. Without the others, tests
    of these are skipped, or fail in CI.
    """
    home = Path(session.virtualenv.location)
    stamp, project = home / "weighbridge-requirements.sha256", Path(__file__).parent / "pyproject.toml"
    pins = (TORCH, "transformers==4.57.1", "--editable", ".[test,quantize,eval]")  # msModelSlim's environment has the same of both
    digest = hashlib.sha256(" ".join(pins).encode() + project.read_bytes() + str(project).encode()).hexdigest()
    if not (stamp.exists() and stamp.read_text("ascii") == digest):
        session.install(TORCH)
        session.install(*pins)
        stamp.write_text(digest, "ascii")
    named = ("msmodelslim", "autoawq", "autogptq", "gptqmodel", "compressed_tensors", "mindformers")
    tools = {tool: cache_folder() / "oracles" / tool / "bin" / "python" for tool in named}
    variables = {f"WEIGHBRIDGE_ORACLE_{tool.upper()}": str(python) for tool, python in tools.items() if python.exists()}
    tests = str(Path(__file__).parent / "tests" / "quantization")
    two = ("-n", "2", "--dist", "loadfile")  # files at a time, each with one thread of torch: two fit a small machine's memory
    session.run("python", "-m", "pytest", "-m", "", *two, tests, *session.posargs, env=variables)
