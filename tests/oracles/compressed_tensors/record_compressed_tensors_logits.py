"""Record what compressed-tensors' own simulation says of its models, in fixtures/compressed_tensors_logits.safetensors.

    python record_compressed_tensors_logits.py FIXTURES

Run by the interpreter that has compressed-tensors 0.17.0 and transformers 5.10.1 (``nox -s compressed_tensors`` builds it); it imports
nothing of Weighbridge, and no test runs it. Each model is loaded in float32 and decompressed; its linears round their inputs, its
cache rounds keys and values as it takes them, and attention gets them from the cache. Of dynamic int8 inputs the tool makes the
largest 127.5 steps, which no engine does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

RECORDED = (
    "fp8_static_fp16", "fp8_dynamic_fp16", "w8a8_static_sym_bf16", "w8a8_static_asym_fp16", "w8a8_dynamic_fp16", "kv_fp8_head_fp16",
    "fp8_dynamic_kv_fp8_fp16", "w8a8_dynamic_kv_int8_fp16",
)  # fmt: skip
IDS = torch.arange(32).mul(37).add(5).remainder(128)


def main(fixtures: Path) -> None:
    torch.set_num_threads(1)
    found, settings = {"input_ids": IDS}, CompressedTensorsConfig(run_compressed=False)
    for name in RECORDED:
        model = AutoModelForCausalLM.from_pretrained(
            fixtures / "compressed_tensors" / name, dtype=torch.float32, quantization_config=settings
        )
        with torch.no_grad():
            found[name] = model.eval()(IDS[None], use_cache=True).logits[0].float()
    save_file(found, fixtures / "compressed_tensors_logits.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
