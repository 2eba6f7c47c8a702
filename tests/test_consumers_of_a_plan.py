"""What a plan says of its consumers is what ``check`` finds in the folder; docs/consumers.md is the table."""

from __future__ import annotations

from pathlib import Path

import consumer_table
import pytest
from checkpoints import FIXTURES, model, roll_back, write_msmodelslim

from convert import check, convert, plan
from convert.checking import consumers_of
from convert.consumers import CONSUMERS
from formats.errors import UsageError

TARGETS = ["awq", "awq:gemv", "awq:gemv_fast", "gptq:v1", "gptq:v2", "msmodelslim:ascendv1", "compressed-tensors", "dense"]


def compare(source: Path, out: Path, target: str) -> dict[str, list[str]]:
    """What a plan says of its consumers, which must be what ``check`` finds in the folder that it wrote."""
    said = consumers_of(plan(source, target))
    convert(source, out, target)
    assert said == {name: [unmet.code for unmet in check(out, name).unmet] for name in CONSUMERS}
    assert any(not codes for codes in said.values())
    return said


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_plan_says_what_check_finds(target: str, symmetric: bool, tmp_path: Path) -> None:
    compare(write_msmodelslim(tmp_path / "source", model(symmetric=symmetric)), tmp_path / "out", target)


@pytest.mark.parametrize("target", ["msmodelslim:vllm-ascend", "msmodelslim:mindie", "compressed-tensors", "gptq"])
def test_a_plan_of_one_scale_per_channel(target: str, tmp_path: Path) -> None:
    source = write_msmodelslim(tmp_path / "source", model(bits=8, strategy="channel", scale_dtype="BF16"))
    said = compare(source, tmp_path / "out", target)
    assert said[{"gptq": "vllm", "compressed-tensors": "vllm"}.get(target, target.partition(":")[2])] == []


GOLDENS = [
    ("msmodelslim_w8/w8a8_static_bf16", "vllm"),
    ("msmodelslim_w8/w8a8_dynamic_bf16", "sglang"),
    ("msmodelslim_w8/v1_w8a8_static", "vllm"),
    ("msmodelslim_w8/v1_w4a8_dynamic", ""),
    ("compressed_tensors/fp8_block_bf16", "transformers"),
    ("compressed_tensors/fp8_static_fp16", "vllm"),
    ("compressed_tensors/mixed_fp16", "vllm"),
    ("compressed_tensors/w4a16_gptq_g32_actgroup_asym_fp16", "sglang"),
    ("compressed_tensors/w3a16_g32_sym_fp16", "vllm"),
    ("compressed_tensors/w8a8_dynamic_kv_int8_fp16", "vllm-ascend"),
]


@pytest.mark.parametrize(("case", "reader"), GOLDENS, ids=[case for case, _ in GOLDENS])
def test_a_plan_of_quantized_inputs_and_small_floats(case: str, reader: str, tmp_path: Path) -> None:
    source = FIXTURES / case
    said = consumers_of(plan(source, "compressed-tensors"))
    convert(source, tmp_path / "out", "compressed-tensors")
    assert said == {name: [unmet.code for unmet in check(tmp_path / "out", name).unmet] for name in CONSUMERS}
    assert not reader or said[reader] == []


@pytest.mark.parametrize("target", ["compressed-tensors", "msmodelslim:mindie"])
def test_a_plan_with_linears_in_float(target: str, tmp_path: Path) -> None:
    made = roll_back(model(), ["model.layers.1.mlp.down_proj"])
    compare(write_msmodelslim(tmp_path / "source", made), tmp_path / "out", target)


def test_the_consumer_asked_for_refuses_what_it_would_not_load(tmp_path: Path) -> None:
    """Packed zero points: transformers' default way stops there; vLLM loads them. MindIE knows no groups of 32."""
    source = write_msmodelslim(tmp_path / "source", model(symmetric=False, group=32))
    (refusal,) = plan(source, "compressed-tensors", consumer="transformers").refusals
    assert (refusal.code, refusal.needs) == ("zero-point", "packed zero points")
    assert "transformers 5.23.0" in refusal.offers
    assert plan(source, "compressed-tensors", consumer="vllm").refusals == []
    refusals = plan(source, "msmodelslim", consumer="mindie").refusals
    assert {(refusal.code, refusal.needs) for refusal in refusals} == {("group-size", "groups of 32 inputs")}


def test_a_target_that_is_a_consumer(tmp_path: Path) -> None:
    """Its best format and dialect, and its requirements: LMDeploy's kernels know groups of 128 only."""
    source = FIXTURES / "compressed_tensors" / "w4a16_g128_sym_bf16"
    found = plan(source, "lmdeploy")
    assert (found.target_name, found.refusals) == ("awq:gemm", [])
    convert(source, tmp_path / "out", "lmdeploy")
    assert check(tmp_path / "out", "lmdeploy").ok
    small = write_msmodelslim(tmp_path / "small", model(group=32))
    (refusal,) = plan(small, "lmdeploy").refusals
    assert plan(small, "vllm-ascend").target_name == "msmodelslim:vllm-ascend"
    assert (refusal.code, refusal.needs) == ("group-size", "group size 32")
    with pytest.raises(UsageError, match="--to lmdeploy --for vllm: are two consumers"):
        plan(source, "lmdeploy", consumer="vllm")
    with pytest.raises(UsageError, match=r"there is no format 'lmdeplo'; there are .*awq.*; and what loads them: .*lmdeploy"):
        plan(source, "lmdeplo")


def test_the_page_is_the_table() -> None:
    assert consumer_table.PAGE.read_text("utf-8") == consumer_table.render()
