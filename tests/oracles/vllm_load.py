"""Run models in the real vLLM on the CPU, and their references, in float64, in transformers.

    python vllm_load.py JOB OUT

Run by the interpreter that has vLLM 0.32.0 for the CPU (``nox -s vllm`` builds it). It imports nothing of Weighbridge. One process
runs all models of a job, in one dtype: {"dtype", "amx", "tokens", "models": {name: {"folder", "reference", "inputs", "prompt"}}}

amx         whether vLLM may use the kernels for AMX. Those for int8 ignore static input scales, so they are masked for them
tokens      how many to generate after the prompt, which is a list of ids
reference   a folder of float32 weights, run in float64
inputs      {linear: how the reference rounds its inputs to int8}, or null: "token" (a scale for each token), "asymmetric" (a scale and
            an offset for each, as torch's _dyn_quant_matmul_4bit finds them), or [scale, offset]

For each model OUT/<name>.safetensors holds

logprobs, expected     [prompt - 1, vocabulary]: vLLM's and the reference's log-probabilities of the prompt's next tokens
tokens, chosen         what vLLM generates greedily, and what the reference does

and as metadata, each a JSON text: ``kernels``, the classes of vLLM's quantized linears; ``refused``, the error on which vLLM ended or "".
"""

from __future__ import annotations

import os

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_INT4_W4A8": "0",  # else 4-bit weights silently get int8 inputs where there is AMX
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

JOB, OUT = json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2])
torch.set_num_threads(1)
if JOB["amx"]:
    torch.cpu._init_amx()  # without it the kernels for AMX are illegal instructions
else:
    torch.cpu._is_amx_tile_supported = lambda: False
    torch.cpu._is_amx_fp16_supported = lambda: False

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.model_executor.layers.linear import LinearBase  # noqa: E402


def kernels_of(model: torch.nn.Module) -> list[str]:
    """What computes the linears, of those of the blocks."""
    found = set()
    for name, layer in model.named_modules():
        if isinstance(layer, LinearBase) and ".layers." in name:
            method = layer.quant_method
            scheme = getattr(layer, "scheme", None) or method
            kernel = getattr(scheme, "kernel", None)
            found.add("/".join(type(part).__name__ for part in (method, scheme, kernel) if part is not None))
    return sorted(found)


def run(about: dict[str, Any], says: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What vLLM makes of a folder."""
    vocabulary = json.loads((Path(about["folder"]) / "config.json").read_text("utf-8"))["vocab_size"]
    llm = LLM(
        model=about["folder"],
        dtype=JOB["dtype"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=1,
        max_num_batched_tokens=128,
        max_logprobs=vocabulary,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
    )
    says["kernels"] = llm.apply_model(kernels_of)[0]
    how = SamplingParams(temperature=0, max_tokens=JOB["tokens"], prompt_logprobs=vocabulary, ignore_eos=True, detokenize=False)
    said = llm.generate([{"prompt_token_ids": about["prompt"]}], how, use_tqdm=False)[0]
    found = torch.full((len(about["prompt"]) - 1, vocabulary), float("nan"))
    for row, entries in zip(found, said.prompt_logprobs[1:], strict=True):
        for token, entry in entries.items():
            row[token] = entry.logprob
    return {"logprobs": found, "tokens": torch.tensor(said.outputs[0].token_ids)}


def rounding(how: str | list[float]) -> Any:
    """A hook that rounds a linear's inputs as int8 would."""

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        (x,) = inputs
        if how == "token":
            scale, offset = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127, 0.0
        elif how == "asymmetric":
            low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
            scale = (high - low) / 255
            nearer = (high + low) / scale > 1  # the end of the range whose rounding is the smaller
            offset = torch.where(nearer, -128 - low / scale, 127 - high / scale).clamp(-128, 127).round()
        else:
            scale, offset = how
        return (((x / scale).round().add(offset).clamp(-128, 127) - offset) * scale,)

    return hook


def refer(about: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the reference says."""
    model = AutoModelForCausalLM.from_pretrained(about["reference"], dtype=torch.float64)
    for name, how in (about["inputs"] or {}).items():
        model.get_submodule(name).register_forward_pre_hook(rounding(how))
    ids = list(about["prompt"])
    expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
    for _ in range(JOB["tokens"]):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return {"expected": expected, "chosen": torch.tensor(ids[len(about["prompt"]) :])}


def main() -> None:
    for name, about in JOB["models"].items():
        says: dict[str, Any] = {"kernels": [], "refused": ""}
        found = refer(about)
        try:
            found |= run(about, says)
        except Exception as error:
            says["refused"] = f"{type(error).__name__}: {error}"
        cleanup_dist_env_and_memory()
        save_file(
            {key: value.contiguous() for key, value in found.items()},
            OUT / f"{name}.safetensors",
            {k: json.dumps(v) for k, v in says.items()},
        )


if __name__ == "__main__":
    with torch.no_grad():
        main()
