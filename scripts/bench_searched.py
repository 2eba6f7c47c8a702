"""GPTQ and AWQ of ours and of the tools, on the same layers and samples, on the CPU: seconds, peak memory, error. One table, one run.

    python scripts/bench_searched.py [--layers 2] [--tokens 1024] [--only gptq|awq] [--folder DIR]

``bench_quantize.py`` prints it too, below its own. Every row runs in an environment that ``make oracles`` left: ours in ``quantize``, the
tools each in its own, by ``tests/quantization/quantize_by_tool.py``. A row is a whole process, from imports to the written folder.

The source is a Llama in bfloat16 of Llama-2-7B's shapes with few layers: random weights, norm weights that spread as those of trained
models, and embeddings of low rank, so that inputs are correlated, without which GPTQ has nothing to gain. The error is that of the last
layer's hidden states, relative to the float model's, in float32, on random tokens that were not calibrated with. It is measured from the
folder that the row wrote.

AutoAWQ computes in bfloat16, as ours does: its default, float16, is many times slower on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from bench import machine, run, show
from safetensors.numpy import save_file

from formats.safetensors_file import lay_out

ROOT = Path(__file__).parent.parent
THREADS = f"OMP_NUM_THREADS={len(os.sched_getaffinity(0))}"
COLUMNS = ["", "seconds", "CPU seconds", "peak anonymous MiB", "relative error"]
HIDDEN, INNER, HEADS, VOCABULARY, RANK = 4096, 11008, 32, 4096, 256
WINDOW = 128
OURS = """
import sys, torch
from safetensors.torch import load_file
from quantize.recipe import loads
from quantize.run import quantize_model
samples = load_file(sys.argv[4])["all"]
quantize_model(sys.argv[1], sys.argv[2], loads(sys.argv[3]), sys.argv[5], calib=[[one[None]] for one in samples])
"""
ERROR = """
import sys, torch
from formats import open_checkpoint
from formats.checkpoint import Location
from quantize.measure import Served, measure
folder, source, vocabulary, window = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
random = torch.Generator().manual_seed(1)
samples = [[torch.randint(0, vocabulary, (1, window), generator=random)] for _ in range(2)]
made = open_checkpoint(Location.of(folder, base=Location.of(source)))
one, other = (Served.open(checkpoint, torch.float32) for checkpoint in (made, open_checkpoint(source)))
print(measure(one, samples, other).drift[-1])
"""
GROUPS = "w_bit: 4, a_bit: 16, is_lowbit: true, open_outlier: false, group_size: 128"
GPTQ = f"{{quant: {{{GROUPS}, w_method: GPTQ, percdamp: 0.05}}, gptq: {{act_group_aware: true}}}}"
SORTED = f"{{quant: {{{GROUPS}, w_method: GPTQ, percdamp: 0.05}}, gptq: {{act_order: true}}}}"
AWQ = f"{{quant: {{{GROUPS}, w_sym: false}}, awq: {{}}}}"
ROUNDED = f"{{quant: {{{GROUPS}}}}}"
TOOLS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "gptq": {
        "GPTQModel 7.6.0": (  # groups by their largest input, as our first row
            "gptqmodel",
            {"bits": 4, "group_size": 128, "sym": True, "act_group_aware": True, "damp_percent": 0.05},
        ),
        "llm-compressor 0.12.0.2": (  # groups of sorted inputs, as our second
            "compressed_tensors",
            {"method": "gptq", "targets": "Linear", "scheme": "W4A16", "dampening_frac": 0.05, "actorder": "group"},
        ),
    },
    "awq": {
        "AutoAWQ 0.2.9": ("autoawq", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM", "dtype": "bfloat16"}),
    },
}


def values(name: str, shape: tuple[int, ...], noise: Any) -> Any:
    """The tensor's, bfloat16. Weights repeat one piece of noise."""
    random = np.random.default_rng(len(name))
    if name.endswith("norm.weight"):
        return np.exp(0.5 * random.standard_normal(shape)).astype(ml_dtypes.bfloat16)
    if name.endswith("embed_tokens.weight"):
        parts = random.standard_normal((shape[0], RANK), np.float32), random.standard_normal((RANK, shape[1]), np.float32)
        rest = random.standard_normal(shape, np.float32)
        return (parts[0] @ parts[1] / RANK**0.5 + 0.3 * rest).astype(ml_dtypes.bfloat16)
    return np.resize(noise, shape)


def write_float(folder: Path, layers: int) -> int:
    """The float Llama; returns its bytes."""
    folder.mkdir(parents=True)
    tensors: list[tuple[str, str, tuple[int, ...]]] = [("model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN))]
    for layer in range(layers):
        block = f"model.layers.{layer}"
        tensors += [(f"{block}.self_attn.{leaf}_proj.weight", "BF16", (HIDDEN, HIDDEN)) for leaf in "qkvo"]
        tensors += [(f"{block}.mlp.{leaf}_proj.weight", "BF16", (INNER, HIDDEN)) for leaf in ("gate", "up")]
        tensors += [(f"{block}.mlp.down_proj.weight", "BF16", (HIDDEN, INNER))]
        tensors += [(f"{block}.{norm}.weight", "BF16", (HIDDEN,)) for norm in ("input_layernorm", "post_attention_layernorm")]
    tensors += [("model.norm.weight", "BF16", (HIDDEN,)), ("lm_head.weight", "BF16", (VOCABULARY, HIDDEN))]
    (file,) = lay_out(tensors, 1 << 62)
    noise = np.random.default_rng(0).normal(0, 0.02, (1 << 22) + 3).astype(ml_dtypes.bfloat16)
    with (folder / file.name).open("wb") as handle:
        handle.write(file.header)
        for name, info in file.tensors.items():
            handle.write(values(name, info.shape, noise).view(np.uint8).data)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):  # which GPTQModel wants; no text is read
        shutil.copy(ROOT / "fixtures" / "tinylm" / name, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))
    return file.size


def python_of(tool: str) -> str | None:
    """The interpreter of the environment ``tool``, if it was made."""
    from noxfile import cache_folder

    python = cache_folder() / "oracles" / tool / "bin" / "python"
    return str(python) if python.exists() else None


def error_of(folder: Path, source: Path) -> float:
    """Of the last layer's hidden states, for tokens of another seed."""
    arguments = [str(folder), str(source), str(VOCABULARY), str(WINDOW)]
    done = subprocess.run([*own(), ERROR, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def own() -> list[str]:
    """What runs code of ours that needs torch."""
    return ["env", THREADS, f"PYTHONPATH={ROOT}", python_of("quantize") or sys.executable, "-c"]


def rows(method: str, source: Path, target: Path, samples: Path) -> dict[str, list[str]]:
    """The commands, ours and the tools' that are installed."""
    ours = [*own(), OURS, str(source), str(target)]
    recipe, to = {"gptq": (GPTQ, "gptq"), "awq": (AWQ, "awq")}[method]
    found = {f"Weighbridge, {method}": [*ours, recipe, str(samples), to]}
    if method == "gptq":
        found["Weighbridge, gptq, act order"] = [*ours, SORTED, str(samples), "compressed-tensors"]
    for name, (tool, about) in TOOLS[method].items():
        if (python := python_of(tool)) is not None:
            settings = samples.with_name(f"{tool}.json")
            settings.write_text(json.dumps({"all": {"source": str(source), "target": str(target), **about}}))
            script = str(ROOT / "tests" / "quantization" / "quantize_by_tool.py")
            found[f"{name}, {method}"] = ["env", THREADS, python, script, str(samples), str(settings), f"{samples}.out"]
    found["Weighbridge, to nearest"] = [*ours, ROUNDED, str(samples), "gptq"]
    return found


def table_of(method: str, layers: int, tokens: int, folder: Path) -> None:
    """Make the rows of a method, and print them."""
    source, target, samples = folder / "float", folder / "out", folder / "samples.safetensors"
    if not source.exists():
        write_float(source, layers)
    save_file({"all": np.random.default_rng(0).integers(0, VOCABULARY, (tokens // WINDOW, WINDOW))}, samples)
    table = []
    for name, command in rows(method, source, target, samples).items():
        shutil.rmtree(target, ignore_errors=True)
        wall, cpu, peak = run(command)
        table.append([name, f"{wall:.0f}", f"{cpu:.0f}", f"{peak:,.0f}", f"{error_of(target, source):.4f}"])
        print(" | ".join(table[-1]), file=sys.stderr, flush=True)
    shutil.rmtree(target, ignore_errors=True)
    about = f"{layers} layers of Llama-2-7B's shapes in bfloat16, {tokens} calibration tokens"
    show(f"{method.upper()}, 4 bits in groups of 128: {about}", COLUMNS, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of Llama-2-7B's shapes (0.40 GB each)")
    parser.add_argument("--tokens", type=int, default=1024, help="calibration tokens")
    parser.add_argument("--only", choices=tuple(TOOLS), default=None)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: a folder beside the current one")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder or Path.cwd()) as name:
        for method in [options.only] if options.only else TOOLS:
            table_of(method, options.layers, options.tokens, Path(name))


if __name__ == "__main__":
    main()
