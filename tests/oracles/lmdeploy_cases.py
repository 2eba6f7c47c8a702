"""Folders that LMDeploy's engines are asked about: what Weighbridge writes, the same with something changed, fixtures as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from judge import FIXTURES
from laws import read_by_weighbridge
from safetensors.numpy import load_file, save_file

ROOT = FIXTURES.parent
LLAMA = "compressed_tensors/src_llama_fp16"


class Case(NamedTuple):
    """A folder under fixtures/ to convert. change: what is done to the result."""

    source: str
    to: str
    base: str | None = None
    change: Callable[[Path], None] | None = None
    options: Mapping[str, Any] = {}


WRITTEN = {
    "awq of msModelSlim": Case("msmodelslim/w4a16_g128_sym_bf16", "awq", "msmodelslim/src_bf16"),
    "awq of msModelSlim, zero points": Case("msmodelslim/w4a16_g128_asym_fp16", "awq", "msmodelslim/src_fp16"),
    "awq of msModelSlim, a scale per channel": Case("msmodelslim/w4a16_pc_sym_bf16", "awq", "msmodelslim/src_bf16"),
    "awq of AutoAWQ": Case("awq_gptq/awq_gemm_g128_zp", "awq"),
    "awq of AutoAWQ's gemv": Case("awq_gptq/awq_gemv_g128_zp", "awq"),
    "awq of AutoGPTQ": Case("awq_gptq/gptq_v1_4b_g128_sym", "awq"),
    "awq of AutoGPTQ, zero points": Case("awq_gptq/gptq_v1_4b_g128_asym", "awq"),
    "awq of GPTQModel": Case("awq_gptq/gptqmodel_v1_4b_g128_sym", "awq"),
    "awq of compressed-tensors": Case("compressed_tensors/w4a16_g128_sym_bf16", "awq"),
    "awq of compressed-tensors, zero points": Case("compressed_tensors/w4a16_g128_asym_bf16", "awq"),
    "awq of LMDeploy 0.1": Case("lmdeploy/awq_v010", "awq"),
    "awq of LMDeploy 0.18": Case("lmdeploy/awq_v018", "awq"),
    "awq of a workspace of 0.1": Case("lmdeploy/w4_v010_tp1", "awq"),
    "awq of a workspace of 0.1 for two ranks": Case("lmdeploy/w4_v010_tp2", "awq"),
    "awq of a workspace of 0.9": Case("lmdeploy/w4_v092_tp1", "awq"),
    "gptq of msModelSlim": Case("msmodelslim/w4a16_g128_sym_bf16", "gptq", "msmodelslim/src_bf16"),
    "gptq of AutoGPTQ": Case("awq_gptq/gptq_v1_4b_g128_sym", "gptq"),
    "gptq of GPTQModel": Case("awq_gptq/gptqmodel_v1_4b_g128_sym", "gptq"),
    "gptq of compressed-tensors": Case("compressed_tensors/w4a16_g128_sym_bf16", "gptq"),
    "ct of msModelSlim": Case("msmodelslim/w4a16_g128_sym_bf16", "compressed-tensors", "msmodelslim/src_bf16"),
    "ct of msModelSlim, zero points": Case("msmodelslim/w4a16_g128_asym_fp16", "compressed-tensors", "msmodelslim/src_fp16"),
    "ct of AutoGPTQ, zero points": Case("awq_gptq/gptq_v1_4b_g128_asym", "compressed-tensors"),
    "ct of llm-compressor, groups of 32": Case("compressed_tensors/w4a16_g32_asym_fp16", "compressed-tensors"),
    "ct of LMDeploy 0.18": Case("lmdeploy/awq_v018", "compressed-tensors"),
    "ct of a workspace of 0.1": Case("lmdeploy/w4_v010_tp2", "compressed-tensors"),
    "dense of msModelSlim": Case("msmodelslim/w4a16_g128_asym_fp16", "dense", "msmodelslim/src_fp16"),
    "smooth_quant of msModelSlim": Case("msmodelslim_w8/w8a8_dynamic_bf16", "smooth_quant", LLAMA),
    "smooth_quant of llm-compressor": Case("compressed_tensors/w8a8_dynamic_fp16", "smooth_quant"),
    "smooth_quant of llm-compressor, FP8": Case("compressed_tensors/fp8_dynamic_fp16", "smooth_quant:fp8"),
    "smooth_quant of LMDeploy": Case("lmdeploy/smooth_quant_int8", "smooth_quant"),
    "smooth_quant of LMDeploy, FP8": Case("lmdeploy/smooth_quant_fp8", "smooth_quant:fp8"),
}
TURBOMIND = [name for name in WRITTEN if not name.startswith("smooth_quant")]
NARROW = "awq of compressed-tensors"
"""Cases whose k_proj has 64 outputs: the PyTorch engine wants them in multiples of the group size."""
PYTORCH = [name for name in WRITTEN if name.startswith(("awq", "smooth_quant", "dense")) and not name.startswith(NARROW)]

AWQ, GPTQ = Case("lmdeploy/awq_v018", "awq"), Case("awq_gptq/gptq_v1_4b_g128_sym", "gptq")
COMPRESSED = Case("lmdeploy/awq_v018", "compressed-tensors")


def say(**entries: Any) -> Callable[[Path], None]:
    """Entries changed in config.json's quantization_config; None: taken out."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        new = {**config["quantization_config"], **entries}
        config["quantization_config"] = {key: value for key, value in new.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config), "utf-8")

    return change


def say_nothing(folder: Path) -> None:
    """No quantization_config in config.json."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def float_linear(name: str, key: str) -> Callable[[Path], None]:
    """One linear dequantized, and named under ``key`` of the quantization_config."""

    def change(folder: Path) -> None:
        path, law = folder / "model.safetensors", read_by_weighbridge(folder)[name]
        tensors = load_file(path)
        for tensor in [one for one in tensors if one.startswith(f"{name}.") and not one.endswith("bias")]:
            del tensors[tensor]
        save_file({**tensors, f"{name}.weight": law.rounded(np.float16)}, path, {"format": "pt"})
        said = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"].get(key) or []
        say(**{key: [*said, name]})(folder)

    return change


GATE, KEY, DOWN = "model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"

CHANGED = {
    "awq, GEMM in capitals": AWQ._replace(change=say(version="GEMM")),
    "awq, no version": AWQ._replace(change=say(version=None)),
    "awq, no group size": AWQ._replace(change=say(group_size=None)),
    "awq, groups of -1 said": AWQ._replace(change=say(group_size=-1)),
    "awq, quant_config.json alone": AWQ._replace(change=say_nothing),
    "awq, a float down": AWQ._replace(change=float_linear(DOWN, "modules_to_not_convert")),
    "awq, a float k": AWQ._replace(change=float_linear(KEY, "modules_to_not_convert")),
    "awq, a float gate": AWQ._replace(change=float_linear(GATE, "modules_to_not_convert")),
    "awq in groups of 64": Case("compressed_tensors/w4a16_sharded_fp16", "awq"),
    "awq in groups of 32": Case("compressed_tensors/w4a16_g32_asym_fp16", "awq"),
    "awq:gemv": Case("awq_gptq/awq_gemm_g128_zp", "awq:gemv"),
    "awq:gemv_fast": Case("awq_gptq/awq_gemm_g128_zp", "awq:gemv_fast"),
    "gptq, zero points": Case("awq_gptq/gptq_v1_4b_g128_asym", "gptq"),
    "gptq:v2": Case("awq_gptq/gptq_v1_4b_g128_sym", "gptq:v2"),
    "gptq in groups of 64": Case("compressed_tensors/w4a16_sharded_fp16", "gptq"),
    "gptq, a scale per channel": Case("awq_gptq/gptq_v1_4b_gm1_sym", "gptq"),
    "gptq, 8 bits": Case("awq_gptq/gptq_v1_8b_g128_sym", "gptq"),
    "gptq, act order said": GPTQ._replace(change=say(desc_act=True)),
    "gptq, sym false said": GPTQ._replace(change=say(sym=False)),
    "gptq, sym not said": GPTQ._replace(change=say(sym=None)),
    "gptq, desc_act not said": GPTQ._replace(change=say(desc_act=None)),
    "gptq, quantize_config.json alone": GPTQ._replace(change=say_nothing),
    "gptq, no group size": GPTQ._replace(change=say(group_size=None)),
    "gptq, a float down": GPTQ._replace(change=float_linear(DOWN, "modules_in_block_to_quantize")),
    "gptq, a float k": GPTQ._replace(change=float_linear(KEY, "modules_in_block_to_quantize")),
    "gptq, a float gate": GPTQ._replace(change=float_linear(GATE, "modules_in_block_to_quantize")),
    "ct, act order": Case("compressed_tensors/w4a16_gptq_g32_actgroup_asym_fp16", "compressed-tensors"),
    "ct, a scale per channel": Case("compressed_tensors/w4a16_pc_asym_fp16", "compressed-tensors"),
    "ct, 8 bits": Case("compressed_tensors/w8a16_pc_sym_fp16", "compressed-tensors"),
    "ct, W8A8": Case("msmodelslim_w8/w8a8_dynamic_bf16", "compressed-tensors", LLAMA),
    "ct, two groups": Case("awq_gptq/gptqmodel_dynamic", "compressed-tensors"),
    "ct, a float down": COMPRESSED._replace(change=float_linear(DOWN, "ignore")),
    "ct, a float k": COMPRESSED._replace(change=float_linear(KEY, "ignore")),
    "ct, a float gate": COMPRESSED._replace(change=float_linear(GATE, "ignore")),
}
FLOAT32_SCALES = "awq, float32 scales"
AS_THEY_ARE = [
    f"{path.parent.parent.name}/{path.parent.name}"
    for place in ("awq_gptq", "compressed_tensors", "lmdeploy")
    for path in sorted((ROOT / place).glob("*/model*.safetensors"))
    if (path.parent / "config.json").exists()
]
