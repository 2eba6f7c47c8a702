"""Quantizing to 4 bits against other tools: rounding without data, streamed, beside ``cp`` of the float model; then GPTQ and AWQ.

    python scripts/bench_quantize.py [--layers 4] [--runs 3] [--tokens 1024] [--folder DIR]

The source is a Qwen2 in bfloat16 of Qwen2-7B's shapes with few layers, random weights and a small vocabulary. Every row is a whole
process (imports, fsync). Other tools run where ``make oracles`` installed them: llm-compressor's QuantizationModifier (W4A16, group
128, no data) and GPTQModel's RTN, both on the CPU, each saving a folder. ``bench_searched`` makes the rows of GPTQ and AWQ.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import bench_searched
import numpy as np
import synthetic
from bench import against_copy, machine, show

sys.path.append(str(Path(__file__).parent.parent))

from formats.safetensors_file import lay_out

VOCABULARY = 4096
OURS = """
import sys
from quantize.rounded_tiles import Rounding
from quantize.streamed import round_folder
round_folder(sys.argv[1], sys.argv[2], Rounding(4, 128), sys.argv[3], proof=sys.argv[4] == "proved")
"""
LLM_COMPRESSOR = """
import sys, torch
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]))
model.save_pretrained(sys.argv[2], save_compressed=True)
"""
GPTQMODEL = """
import sys
from gptqmodel import GPTQModel
from gptqmodel.quantization import RTNConfig
model = GPTQModel.load(sys.argv[1], RTNConfig(bits=4, group_size=128), device="cpu")
model.quantize(calibration=None, backend="torch")
model.save(sys.argv[2])
"""


def write_float(folder: Path, layers: int) -> int:
    """A Qwen2 in bfloat16 with random weights; returns its bytes."""
    folder.mkdir(parents=True)
    tensors: list[tuple[str, str, tuple[int, ...]]] = [("model.embed_tokens.weight", "BF16", (VOCABULARY, synthetic.HIDDEN))]
    for layer in range(layers):
        for name, (out, in_) in synthetic.linears(layer).items():
            tensors.append((f"{name}.weight", "BF16", (out, in_)))
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                tensors.append((f"{name}.bias", "BF16", (out,)))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors.append((f"model.layers.{layer}.{norm}.weight", "BF16", (synthetic.HIDDEN,)))
    tensors += [("model.norm.weight", "BF16", (synthetic.HIDDEN,)), ("lm_head.weight", "BF16", (VOCABULARY, synthetic.HIDDEN))]
    (file,) = lay_out(tensors, 1 << 62)
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.float32).view(np.uint32) >> np.uint32(16)
    data = memoryview(noise.astype(np.uint16).view(np.uint8)).cast("B")
    with (folder / file.name).open("wb") as handle:
        handle.write(file.header)
        for info in file.tensors.values():
            left = info.nbytes
            while left:
                left -= handle.write(data[: min(left, len(data))])
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16", "hidden_size": synthetic.HIDDEN,
        "intermediate_size": synthetic.INNER, "num_hidden_layers": layers, "num_attention_heads": synthetic.HIDDEN // synthetic.HEAD_DIM,
        "num_key_value_heads": synthetic.KV_HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": 512, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return file.size


def others(source: Path, target: Path) -> dict[str, list[str]]:
    """The same by other tools, where they are installed."""
    from noxfile import cache_folder

    found = {}
    for name, tool, code in (("llm-compressor", "compressed_tensors", LLM_COMPRESSOR), ("GPTQModel's RTN", "gptqmodel", GPTQMODEL)):
        python = cache_folder() / "oracles" / tool / "bin" / "python"
        if python.exists():
            command = [str(python), "-c", code, str(source), str(target)]
            found[f"{name}, on the CPU"] = ["env", "HF_HUB_OFFLINE=1", "GPTQMODEL_CPU_WORKERS=2", *command]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of Qwen2-7B's shapes (0.47 GB each)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024, help="calibration tokens of GPTQ and AWQ; 0: without these, which take long")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: a folder beside the current one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder or Path.cwd()) as name:
        source, target = Path(name) / "float", Path(name) / "out"
        size = write_float(source, options.layers)
        print(machine())
        rows = {}
        for to in ("msmodelslim:ascendv1", "gptq", "compressed-tensors"):
            for how in ("proved", "unproved"):
                rows[f"round to {to}, {how}"] = [sys.executable, "-c", OURS, str(source), str(target), to, how]
        columns = ["", "seconds, median (min to max)", "x cp + fsync", "CPU seconds", "GB/s of source", "peak anonymous MiB"]
        title = f"W4A16 group 128 of {options.layers} layers of Qwen2-7B's shapes in bfloat16, {size / 1e9:.2f} GB; {options.runs} runs"
        show(title, columns, against_copy(target, source, [], options.runs, {**rows, **others(source, target)}))
        shutil.rmtree(source)
        for method in bench_searched.TOOLS if options.tokens else ():
            bench_searched.table_of(method, min(options.layers, 2), options.tokens, Path(name))


if __name__ == "__main__":
    main()
