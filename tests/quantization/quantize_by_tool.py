"""Quantize a model's folder with GPTQModel, AutoAWQ or llm-compressor, whichever is installed, on the CPU.

    python quantize_by_tool.py TENSORS SETTINGS OUT

Run by the interpreter that has one of them; it imports nothing of Weighbridge. SETTINGS is {name: {source, target, ...}}, folders and
the tool's own arguments; TENSORS holds for each name the samples [windows, tokens] int64. OUT gets, by name, .count: how many there were.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import Any

os.environ |= {"TORCHDYNAMO_DISABLE": "1", "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}

import torch
from safetensors.torch import load_file, save_file
from torch import nn

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def by_gptqmodel(source: str, target: str, samples: torch.Tensor, about: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel
    from gptqmodel.quantization import QuantizeConfig

    model = GPTQModel.load(source, QuantizeConfig(**about, fallback=None), device="cpu")
    model.quantize([{"input_ids": one, "attention_mask": [1] * len(one)} for one in samples.tolist()], backend="torch")
    model.save(target)


def by_autoawq(source: str, target: str, samples: torch.Tensor, about: dict[str, Any]) -> None:
    from awq import AutoAWQForCausalLM

    dtype = getattr(torch, about.pop("dtype", "float16"))
    model = AutoAWQForCausalLM.from_pretrained(source, torch_dtype=dtype, device_map="cpu", safetensors=True)
    # Its search keeps ``.cpu()`` of a module's tensors to restore the weights that it changes in place: copies only if it runs on a GPU.
    plain = nn.Module.state_dict

    def copied(self: nn.Module, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        state = plain(self, *arguments, **options)
        return state if options else {name: tensor.clone() for name, tensor in state.items()}

    nn.Module.state_dict = copied  # type: ignore[method-assign,assignment]
    options = {"max_calib_samples": len(samples), "max_calib_seq_len": samples.shape[1]}
    model.quantize(None, quant_config=about, calib_data=samples.tolist(), **options)
    nn.Module.state_dict = plain  # type: ignore[method-assign]
    model.save_quantized(target)


def by_llm_compressor(source: str, target: str, samples: torch.Tensor, about: dict[str, Any]) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    data = Dataset.from_dict({"input_ids": samples.tolist(), "attention_mask": torch.ones_like(samples).tolist()})
    method = {"round": QuantizationModifier, "gptq": GPTQModifier}[about.pop("method")]
    recipe = method(ignore=["lm_head"], **about)
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=samples.shape[1], num_calibration_samples=len(samples))
    model.save_pretrained(target, save_compressed=True)


TOOLS = {"gptqmodel": by_gptqmodel, "awq": by_autoawq, "llmcompressor": by_llm_compressor}


def main(tensors: str, settings: str, out: str) -> None:
    given = load_file(tensors)
    (quantize,) = [tool for module, tool in TOOLS.items() if importlib.util.find_spec(module)]
    with open(settings, encoding="utf-8") as file:
        cases = json.load(file)
    for name, about in cases.items():
        quantize(about.pop("source"), about.pop("target"), given[name], about)
    save_file({f"{name}.count": torch.tensor(len(given[name])) for name in cases}, out)


if __name__ == "__main__":
    main(*sys.argv[1:4])
