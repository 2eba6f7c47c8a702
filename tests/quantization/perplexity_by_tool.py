"""The perplexity of quantized folders, as plain transformers computes it with what a real tool makes of them, in float32.

    python perplexity_by_tool.py TENSORS SETTINGS OUT

Run by the interpreter that has GPTQModel (for GPTQ and AWQ folders: its layers dequantize, a float32 model multiplies) or llm-compressor
(for compressed-tensors folders: its linears round their inputs). It imports nothing of Weighbridge. TENSORS holds ``windows``
[windows, tokens] int64; SETTINGS is {name: folder}. OUT gets by name the perplexity, float64.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
sys.path.append(str(Path(__file__).parents[1] / "oracles"))


def dequantized(folder: Path) -> torch.nn.Module:
    from gptqmodel_decode import dequantize, load_reference

    about = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    own = GPTQConfig(bits=4, backend="torch") if about["quant_method"] == "gptq" else AwqConfig(backend="torch_awq")
    weights, _ = dequantize(AutoModelForCausalLM.from_pretrained(folder, quantization_config=own, dtype=torch.float16))
    return load_reference(folder, weights)


def simulated(folder: Path) -> torch.nn.Module:
    from transformers.utils.quantization_config import CompressedTensorsConfig

    own = CompressedTensorsConfig(run_compressed=False)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=own)


def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    total = 0.0
    for ids in windows:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.double(), ids[1:], reduction="sum"))
    return torch.tensor(total / (windows.numel() - len(windows))).double().exp().item()


def main(tensors: str, settings: str, out: str) -> None:
    windows = load_file(tensors)["windows"]
    load = dequantized if importlib.util.find_spec("gptqmodel") else simulated
    with open(settings, encoding="utf-8") as file:
        folders = json.load(file)
    found = {name: perplexity(load(Path(folder)).eval(), windows) for name, folder in folders.items()}
    save_file({name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}, out)


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:4])
