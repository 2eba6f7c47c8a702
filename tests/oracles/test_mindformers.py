"""MindFormers 1.3.2 and Golden Stick 0.6.0 take what Weighbridge writes: every parameter of the network that they build is loaded.

``make oracles`` (or ``nox -s mindformers``) installs them in their own environment and runs this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mindformers_judge import check_loaded
from typer.testing import CliRunner

from convert import convert
from quantize.quant_ckpt import app

pytestmark = pytest.mark.oracle

FIXTURES = Path(__file__).parents[2] / "fixtures"
LLAMA = {
    "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 512, "vocab_size": 320, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "torch_dtype": "float16",
}  # fmt: skip

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "RTN": ("golden_stick/rtn_a16w8_gs060.ckpt", "mindspore:gs0.6", {}),
    "RTN, q, k and v as one": ("golden_stick/rtn_a16w8_gs060.ckpt", "mindspore:gs0.6", {"qkv_concat": True}),
    "PTQ of 1.2 as 0.6": ("golden_stick/ptq_a16w8_gs120.ckpt", "mindspore:gs0.6", {}),
    "static inputs": ("golden_stick/ptq_a8w8_gs120.ckpt", "mindspore:gs0.6", {}),
    "static inputs, smoothed, two linears in float": ("golden_stick/sq_a8w8_gs060.ckpt", "mindspore:gs0.6", {}),
    "float": ("golden_stick/rtn_a16w8_gs060.ckpt", "mindspore:float", {}),
    "float, q, k and v as one": ("golden_stick/rtn_a16w8_gs060.ckpt", "mindspore:float", {"qkv_concat": True}),
    "a float Qwen2": ("awq_gptq/src_qwen2", "mindspore", {}),
    "a float Qwen2, q, k and v as one": ("awq_gptq/src_qwen2", "mindspore", {"qkv_concat": True}),
    "msModelSlim's W8A16 of a Qwen2": ("msmodelslim/w8a16_pc_asym_fp16", "mindspore:gs0.6", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_network_of_the_yaml_takes_every_parameter(case: str, tmp_path: Path) -> None:
    source, target, options = CASES[case]
    if source.endswith(".ckpt"):
        base = tmp_path / "base"
        base.mkdir()
        (base / "config.json").write_text(json.dumps(LLAMA))
        options = {**options, "base_model": base}
    if source.startswith("msmodelslim"):
        options = {"base_model": FIXTURES / "msmodelslim" / "src_fp16"}
    convert(FIXTURES / source, tmp_path / "out", target, **options)
    check_loaded(tmp_path / "out")


@pytest.mark.parametrize("flags", [("-q", "rtn-a16w8"), ("-q", "ptq", "-w", "int8", "-b", "lm_head")], ids=["RTN", "PTQ"])
def test_the_network_takes_what_quant_ckpt_writes(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Of the float model that the real script was given."""
    config = {
        "hidden_size": 256, "num_layers": 2, "num_heads": 8, "n_kv_heads": 4, "vocab_size": 320, "seq_length": 512,
        "compute_dtype": "float16",
    }  # fmt: skip
    content = {
        "load_checkpoint": str(FIXTURES / "golden_stick" / "llama_tiny_fp16_plain.ckpt"),
        "output_dir": str(tmp_path / "output"),
        "trainer": {"model_name": "llama"},
        "model": {"model_config": config, "arch": {"type": "LlamaForCausalLM"}},
    }
    path, data = tmp_path / "predict.yaml", tmp_path / "dev.jsonl"
    path.write_text(yaml.safe_dump(content))
    data.write_text("{}\n")
    done = CliRunner().invoke(app, ["-c", str(path), "-t", "boolq", "-s", str(data), *flags])
    assert done.exit_code == 0, done.output
    (out,) = (tmp_path / "output").iterdir()
    check_loaded(out)
