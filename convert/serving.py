"""``serve-check``: a folder in a real engine against its dequantized model: log-probabilities, greedy tokens, a verdict.

The engine lives in an environment of its own, whose interpreter runs ``serve_engine.py`` on a job. First the engine answers; then
the source is dequantized to float32 into a temporary folder, and transformers answers for that, with the inputs of layers quantized
as the source says. What engines need for it, and the gates, were measured on vLLM 0.32 for CPUs (``serving_figures.GATES``).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from formats import Checkpoint, Location, open_checkpoint
from formats.errors import RefusedError, UnreadableError, UsageError
from formats.safetensors_file import read_json

from .records import LOSSES
from .serving_children import Output, Runner, log_file
from .serving_engines import ENGINES, choose, found_llama_cpp, gguf_only, interpreters, look, reference_environment
from .serving_figures import GATES, Gate, compare, greedy, judge
from .serving_prompts import TEXTS, random_prompts, read_prompts
from .serving_schemes import activations_of, default_dtype, kind_of, notes_about

DTYPES = ("auto", "float16", "bfloat16", "float32")


@dataclass(frozen=True)
class ServeReport:
    """What ``serve_check`` found.

    kind             what is quantized, as ``GATES`` has it
    positions        positions of the prompts, with a full row of log-probabilities each
    max_difference   the largest difference of a log-probability; typical_difference: the median over positions of the largest in each
    kl, top1         mean divergence in nats; positions with the same likeliest token
    logit_std        standard deviation of the reference's log-probabilities
    greedy_equal     of ``greedy_tokens`` those before the first difference in each prompt; ties: prompts whose first difference is between
                     tokens that lie closer together in the reference than twice the largest difference
    failed           which parts of the gate it did not pass; seconds: by step
    """

    folder: str
    format: str
    reference: str
    engine: str
    version: str
    python: str
    device: str
    kernels: list[str]
    dtype: str
    kind: str
    prompts: int
    tokenized: bool
    positions: int
    max_difference: float
    typical_difference: float
    kl: float
    top1: int
    logit_std: float
    greedy_equal: int
    greedy_tokens: int
    ties: int
    gate: Gate | None
    failed: list[str]
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing failed; also true without a gate, if all figures are finite."""
        return not self.failed

    @property
    def verdict(self) -> str:
        return "not the same" if self.failed else "figures only" if self.gate is None else "the same"

    def to_json(self) -> dict[str, Any]:
        content = {**asdict(self), "ok": self.ok, "verdict": self.verdict}
        return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in content.items()}


def serve_check(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    engine: str | None = None,
    python: str | os.PathLike[str] | None = None,
    reference_python: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    prompts: str | os.PathLike[str] | Sequence[str | list[int]] | None = None,
    tokens: int = 16,
    length: int = 48,
    threads: int | None = None,
    tp: int = 1,
    timeout: float = 3600,
    log: str | os.PathLike[str] | None = None,
    output: Output | None = None,
    stage: Output | None = None,
) -> ServeReport:
    """Load folder ``path`` in a real engine and compare what it says with the dequantized ``against`` (None: the folder itself).

    against            a quantized checkpoint, which is dequantized for it (float32, in a temporary folder), or a float folder
    engine             a key of ``ENGINES``; None: the first that is installed and reads the format
    python             the environment to look in, a folder or an interpreter; None: this one, then python3 of the PATH
    reference_python   the environment with transformers and torch for the reference; None: the engine's
    dtype              in which the engine computes; None: in which it can be judged
    device             "cpu" or "cuda", for transformers and GPTQModel
    prompts            a file with a text or a JSON list of token ids on every line, or such a list; None: a few of ours
    tokens, length     greedy tokens after each prompt; at most so many ids of a text
    tp                 ranks of tensor parallelism (vLLM, LMDeploy)
    timeout            seconds for the engine, and again for the reference
    log, output        a file for all that the engine says; what is called with each line of it
    stage              what is called with a line about each step that begins
    raises             UsageError (no engine), RefusedError (none that reads the format), UnreadableError, EngineFailedError
    """
    folder = Path(os.path.abspath(path))
    if not folder.is_dir():
        raise UsageError(f"{path}: is no folder; an engine loads whole folders")
    _check_options(engine, dtype, device, tokens, length)
    if engine == "llama.cpp":
        raise RefusedError(gguf_only(folder, found_llama_cpp([])))
    source = None if against is None else Path(os.path.abspath(against))
    opened = _open(folder, needed=source is None)
    original = opened if source is None else _open(source, needed=True)
    assert original is not None
    environments = [look(one, named=python is not None) for one in interpreters(python)]
    chosen, environment = choose(engine, environments, folder, opened)
    referring = reference_environment(reference_python, [environment, *environments])
    kind = kind_of(original if opened is None else opened)
    notes = list(notes_about(chosen, kind, opened, original, given=source is not None))
    computed = dtype or default_dtype(chosen, kind, environment)
    vocabulary = _vocabulary(folder, original)
    asked = read_prompts(prompts)
    job: dict[str, Any] = {
        "engine": chosen, "model": str(folder), "dtype": computed, "device": device, "prompts": list(TEXTS if asked is None else asked),
        "fallback": random_prompts(vocabulary, length) if asked is None else None, "length": length, "tokens": tokens,
        "vocabulary": vocabulary, "cpu": environment.vllm_for_cpus, "mask_amx": "int8" in kind,
        "threads": threads or len(os.sched_getaffinity(0)), "tp": tp,
    }  # fmt: skip
    with _temporary_folder() as place, log_file(log) as file:
        runner = Runner(place, file, output, stage or (lambda line: None), timeout)
        said, theirs = runner.run(environment.python, f"{chosen} {environment.version(chosen)}", job)
        if said["tokenized"] is False and asked is None:
            notes.append("the folder has no tokenizer that can be loaded, so the prompts are random tokens")
        begin = time.monotonic()
        if original.format == "dense":
            reference = original.location.folder
        else:
            runner.stage(f"dequantizing {original.location.folder.name}")
            reference = _dequantize(original, folder if source is None else source, folder, place / "reference")
        dequantized = time.monotonic() - begin
        facts = activations_of(original if original.format != "dense" or opened is None else opened, opened)
        if chosen == "transformers" and opened is not None and opened.format == "compressed-tensors":
            for fact in facts.values():
                if fact["dynamic"] and fact["element"] == "int":
                    fact["steps"] = 2 ** (fact["bits"] - 1) - 0.5
        answer, ours = runner.run(
            referring.python,
            f"transformers {referring.version('transformers')} (the reference)",
            {
                **job, "engine": "reference", "model": str(reference), "dtype": "float32", "prompts": said["prompts"], "fallback": None,
                "activations": facts, "chosen": said["tokens"],
            },
        )  # fmt: skip
        figures = compare(theirs, ours)
    equal, total, margins = greedy(said["tokens"], answer["tokens"], answer["margins"])
    ties = sum(margin is not None and margin <= 2 * figures["max_difference"] for margin in margins)
    quantized_attention = bool(original.attention or (opened is not None and opened.attention))
    gate = None if quantized_attention or (chosen == "vllm" and "W4A8" in kind) else GATES.get((kind, computed))
    apart = sum(margin is not None for margin in margins) - ties
    return ServeReport(
        folder=str(path),
        format="" if opened is None else f"{opened.format}:{opened.variant}",
        reference=str(path if against is None else against),
        engine=chosen,
        version=str(environment.version(chosen)),
        python=environment.python,
        device=said["device"],
        kernels=said["kernels"],
        dtype=computed,
        kind=kind,
        prompts=len(said["prompts"]),
        tokenized=said["tokenized"],
        greedy_equal=equal,
        greedy_tokens=total,
        ties=ties,
        gate=gate,
        failed=judge(gate, figures["max_difference"], figures["typical_difference"], figures["kl"], apart),
        notes=notes,
        seconds={
            "engine load": said["load_seconds"],
            "engine run": said["run_seconds"],
            "dequantize": dequantized,
            "reference": answer["load_seconds"] + answer["run_seconds"],
        },
        **figures,
    )


def _check_options(engine: str | None, dtype: str | None, device: str, tokens: int, length: int) -> None:
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"--engine {engine}: there is no such engine; there are {', '.join(ENGINES)}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: wanted {', '.join(DTYPES)}")
    if device not in {"cpu", "cuda"}:
        raise UsageError(f"--device {device}: wanted cpu or cuda")
    if tokens < 1 or length < 2:
        raise UsageError("--tokens and --length: wanted 1 and 2 or more")


def _open(path: Path, needed: bool) -> Checkpoint | None:
    """The checkpoint at ``path``; None if its format is not read and it is not ``needed``."""
    try:
        return open_checkpoint(Location.of(path))
    except RefusedError:
        if needed:
            raise
        return None


def _vocabulary(folder: Path, original: Checkpoint) -> int:
    """The vocabulary's size, from config.json."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else original.config or {}
    inner = config.get("text_config")
    found = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    if type(found) is not int or found < 2:
        raise UnreadableError(f"{folder.name}: config.json has the vocab_size {found!r}, wanted an integer; an engine needs a whole folder")
    return found


def _dequantize(original: Checkpoint, source: Path, folder: Path, place: Path) -> Path:
    """A float32 folder of ``source``, opened as ``original``. A config.json that it lacks comes from the served ``folder``."""
    from .engine import convert

    if not original.layer_names:  # only its KV cache is quantized: the same weights without that
        place.mkdir()
        for name in original.location.names:
            (place / name).symlink_to(original.location.folder / name)
        (place / "config.json").unlink(missing_ok=True)
        (place / "config.json").write_text(json.dumps(original.config), "utf-8")
        return place
    allow = [code for code in ("activations-dropped", "kv-cache-dropped", "attention-dropped") if code in LOSSES]
    base = None if "config.json" in original.location.names else folder
    convert(source, place, "dense", base_model=base, allow=allow, scale_dtype="float32", proof=False)
    return place


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder that is gone afterwards, whatever an engine did to its permissions."""
    place = Path(tempfile.mkdtemp(prefix="weighbridge-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
