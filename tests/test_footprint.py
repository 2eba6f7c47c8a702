"""The memory to serve a model, against what LMDeploy published, parameters that are counted in files, and sums done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from convert import inference_memory
from convert.cli import app
from convert.footprint import MIB, PROCESS, model_of
from formats import open_checkpoint
from formats.errors import RefusedError, UnreadableError, UsageError

FIXTURES = Path(__file__).parent.parent / "fixtures"
INTERNLM: dict[str, Any] = {
    "model_type": "internlm", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "vocab_size": 103168,
    "num_attention_heads": 32, "bias": True,
}  # fmt: skip
LLAMA_7B: dict[str, Any] = {**INTERNLM, "model_type": "llama", "vocab_size": 32000, "bias": False}
LLAMA_13B: dict[str, Any] = {
    **LLAMA_7B, "hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 13824, "num_attention_heads": 40
}  # fmt: skip


def folder(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_internlm_takes_what_was_published(tmp_path: Path) -> None:
    """MiB, exact but for the one that is not in line."""
    found = inference_memory(folder(tmp_path, INTERNLM), (8, 16, 32, 48), 2048, kv=("fp16", "int8"))
    totals = {(use.kv, use.batch): round(use.total / MIB) for use in found.uses}
    assert totals == {
        ("fp16", 8): 22353, ("fp16", 16): 30593, ("fp16", 32): 47073, ("fp16", 48): 63553,
        ("int8", 8): 18241, ("int8", 16): 22369, ("int8", 32): 30625, ("int8", 48): 38881,
    }  # fmt: skip
    (note,) = found.notes
    assert note.startswith("LMDeploy published 22337 MiB for batch 8 with an fp16 cache, 16 MiB less than this")


@pytest.mark.parametrize(
    ("config", "weights", "context", "gib"),
    [
        (LLAMA_7B, "fp16", 2048, 15.1), (LLAMA_7B, "w4", 2048, 6.3), (LLAMA_7B, "fp16", 4096, 16.2), (LLAMA_7B, "w4", 4096, 7.5),
        (LLAMA_13B, "w4", 2048, 10.3), (LLAMA_13B, "w4", 4096, 12.0),
    ],
)  # fmt: skip
def test_llama_in_4_bits_takes_what_was_published(tmp_path: Path, config: dict[str, Any], weights: str, context: int, gib: float) -> None:
    found = inference_memory(folder(tmp_path, config), (1,), context, weights=weights, overhead=PROCESS)
    assert found.uses[0].total / 2**30 == pytest.approx(gib, rel=0.05)
    assert found.uses[0].published == pytest.approx(1024 * gib)
    bare = inference_memory(tmp_path, (1,), context, weights=weights)
    assert "--overhead 1.7GiB" in bare.notes[0]


def test_parameters_by_config_are_those_of_the_file(tmp_path: Path) -> None:
    """Qwen2 with biases on q, k and v and grouped heads: what the config makes of it, and what the headers say."""
    source = FIXTURES / "awq_gptq" / "src_qwen2"
    by_file, by_config = model_of(source), model_of(folder(tmp_path, json.loads((source / "config.json").read_text())))
    assert by_file.parameters == open_checkpoint(source).tensors.nbytes // 2
    sizes = ("layers", "kv_heads", "head_dim", "parameters", "linear", "groups")
    assert [getattr(by_config, one) for one in sizes] == [getattr(by_file, one) for one in sizes]


def test_4_bit_weights_by_hand(tmp_path: Path) -> None:
    """One layer of hidden 256, inter 512, 2 heads, 1 KV head of 128."""
    config = {
        "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 512, "vocab_size": 10,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    linear = 256 * 256 + 2 * 128 * 256 + 256 * 256 + 3 * 512 * 256
    rest = 2 * 10 * 256 + 3 * 256
    model = model_of(folder(tmp_path, config))
    assert model.weights("fp16") == 2 * (linear + rest)
    assert model.weights("w4") == linear // 2 + linear // 128 * 4 + 2 * rest
    assert model.kv_bytes("fp16", online=False) == 2 * 128 * 2
    assert model.kv_bytes("int8", online=False) == 2 * 128
    assert model.kv_bytes("int8", online=True) == 2 * (128 + 4)
    assert model.kv_bytes("int4", online=True) == 2 * (64 + 4)


def test_a_quantized_folder_counts_as_it_is_stored() -> None:
    source = FIXTURES / "awq_gptq" / "awq_gemm_g128_zp"
    found = inference_memory(source, (1,))
    assert (found.weights, found.uses[0].weights) == ("stored", open_checkpoint(source).tensors.nbytes)
    with pytest.raises(UsageError, match="quantized already"):
        inference_memory(source, weights="w4")


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown model": ({**INTERNLM, "model_type": "gpt2"}, {}, "how many parameters a 'gpt2' has is known for llama"),
    "no layers": ({"model_type": "llama"}, {}, "has no num_hidden_layers"),
    "no number": ({**INTERNLM, "num_attention_heads": "32"}, {}, "num_attention_heads '32'"),
    "latent cache": ({**INTERNLM, "kv_lora_rank": 512}, {}, "is a latent"),
    "other layers": ({**INTERNLM, "layer_types": ["linear_attention"]}, {}, "has layers of 'linear_attention'"),
    "unknown cache": (INTERNLM, {"kv": ("fp4",)}, "--kv fp4: wanted fp16, int8, int4"),
    "no batch": (INTERNLM, {"batch": (0,)}, "--batch: wanted"),
    "an engine without int4": (INTERNLM, {"kv": ("int4",), "engine": "0.1"}, "have an int8 cache alone"),
    "unknown weights": (INTERNLM, {"weights": "w8"}, "--weights w8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_error(tmp_path: Path, fault: str) -> None:
    config, options, message = FAULTS[fault]
    with pytest.raises((RefusedError, UnreadableError, UsageError), match=message):
        inference_memory(folder(tmp_path, config), **options)


def test_no_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match=r"has no config\.json"):
        inference_memory(tmp_path)


def test_the_command_prints_the_table(tmp_path: Path) -> None:
    arguments = ["memory", str(folder(tmp_path, INTERNLM)), "--batch", "8,16", "--kv", "fp16,int8"]
    result = CliRunner().invoke(app, arguments)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if line.startswith("│")]
    assert rows[3] == ["16", "int8", "13966", "8224", "180", "22369", "8224", "22369"]
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["uses"][1]["total"] // MIB == 30593
    assert CliRunner().invoke(app, ["memory", str(tmp_path), "--batch", "many"]).exit_code == UsageError.exit_code
