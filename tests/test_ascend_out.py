"""Hub checkpoints made ready for Ascend: ``--to msmodelslim --for vllm-ascend`` and ``--for mindie``.

Codes, scales and zero points of both sides are read here with plain NumPy: AWQ's and GPTQ's by ``checkpoints``, those of
compressed-tensors and msModelSlim below.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BFLOAT16, FIXTURES, Array, decode_awq, decode_gptq, read_folder
from typer.testing import CliRunner

from convert import convert, plan, verify
from convert.cli import app
from formats.errors import RefusedError, UsageError

AWQ_GPTQ, COMPRESSED = FIXTURES / "awq_gptq", FIXTURES / "compressed_tensors"

SERVED = {
    AWQ_GPTQ / "gptq_v1_4b_gm1_sym": "W8A16",
    COMPRESSED / "w4a16_pc_sym_fp16": "W8A16",
    COMPRESSED / "w8a16_pc_sym_fp16": "W8A16",
    COMPRESSED / "w8a8_dynamic_fp16": "W8A8_DYNAMIC",
    COMPRESSED / "w8a8_static_asym_fp16": "W8A8",
    COMPRESSED / "w8a8_static_sym_bf16": "W8A8",
    COMPRESSED / "w8a8_tensor_static_asym_fp16": "W8A8",
}
"""What vllm-ascend can serve exactly, and as which type."""
STATIC = [source for source, type_ in SERVED.items() if type_ == "W8A8"]
WIDENED = [source for source in SERVED if "4b" in source.name or "w4a16" in source.name]
MINDIE = {
    AWQ_GPTQ / "awq_gemm_g128_zp": ("W4A16", 128),
    AWQ_GPTQ / "gptq_v1_4b_g128_sym": ("W4A16", 128),
    AWQ_GPTQ / "gptq_v1_8b_g128_sym": ("W8A16", 128),
    AWQ_GPTQ / "gptq_v1_4b_gm1_sym": ("W4A16", 0),
    COMPRESSED / "w4a16_sharded_fp16": ("W4A16", 64),
    COMPRESSED / "w8a16_g64_asym_fp16": ("W8A16", 64),
    COMPRESSED / "w8a16_pc_sym_fp16": ("W8A16", 0),
    COMPRESSED / "w8a8_dynamic_fp16": ("W8A8_DYNAMIC", 0),
    COMPRESSED / "w8a8_static_asym_fp16": ("W8A8", 0),
}


def name_of(source: Any) -> str:
    return source.name if isinstance(source, Path) else str(source)


def description(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("quant_model_description*.json")
    return json.loads(path.read_text("utf-8"))  # type: ignore[no-any-return]


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))  # type: ignore[no-any-return]


def source_layers(source: Path) -> dict[str, tuple[Array, Array, Array]]:
    """{layer: (signed codes [out, in], zero points and float32 scales [out, groups])} of a hub checkpoint."""
    tensors, layers = read_folder(source), {}
    for key in tensors:
        name, _, leaf = key.rpartition(".")
        if leaf == "qweight":
            bits = 4 if "4b" in source.name or "awq" in source.name else 8
            found = decode_awq(tensors, name) if "awq" in source.name else decode_gptq(tensors, name, bits)
            half = 1 << bits - 1
            layers[name] = (found.codes - half, found.zeros - half, found.scales.astype(np.float32))
        elif leaf in {"weight_packed", "weight"} and f"{name}.weight_scale" in tensors:
            codes = tensors[key]
            bits = 8
            if leaf == "weight_packed":
                out, in_ = (int(side) for side in tensors[f"{name}.weight_shape"])
                bits = 4 if codes.shape[1] * 8 == in_ else 8
                lanes = codes.view(np.uint32)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)
                codes = (lanes & np.uint32((1 << bits) - 1)).reshape(out, in_).astype(np.int16) - (1 << bits - 1)
            scales = tensors[f"{name}.weight_scale"].astype(np.float32)
            scales = np.broadcast_to(scales.reshape(-1, 1), (len(codes), 1)) if scales.ndim < 2 or scales.size == 1 else scales
            zeros = np.zeros(scales.shape, np.int16)
            if f"{name}.weight_zero_point" in tensors:  # packed along the outputs
                lanes = tensors[f"{name}.weight_zero_point"].T.view(np.uint32)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)
                unsigned = (lanes & np.uint32((1 << bits) - 1)).reshape(scales.shape[1], -1)[:, : len(codes)].T
                zeros = unsigned.astype(np.int16) - (1 << bits - 1)
            layers[name] = (codes, zeros, scales)
    return layers


def assert_described(folder: Path, types: set[str]) -> None:
    """Every tensor has an entry and every entry a tensor; biases of layers and what is no layer are FLOAT."""
    tensors = read_folder(folder)
    entries = {name: label for name, label in description(folder).items() if "." in name}
    assert set(entries) == set(tensors)
    layers = {name.removesuffix(".weight") for name, array in tensors.items() if array.dtype == np.int8}
    for name, label in entries.items():
        parent, _, leaf = name.rpartition(".")
        assert (label in types) if parent in layers and leaf != "bias" else (label == "FLOAT"), name


# --- vllm-ascend ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SERVED, ids=name_of)
def test_vllm_ascend_gets_the_names_and_types_that_it_looks_for(source: Path, tmp_path: Path) -> None:
    """8 bits per channel under the exact names; codes of 4 bits are the same numbers in bytes."""
    result = convert(source, tmp_path / "out", "msmodelslim", consumer="vllm-ascend")
    assert result.exact
    assert result.plan.target_name == "msmodelslim:vllm-ascend"
    assert {loss.code for loss in result.plan.losses} <= {"quant-bias-rounded"}
    type_ = SERVED[source]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"quant_model_description.json", f"quant_model_weight_{type_.lower()}.safetensors", "config.json"} <= files
    found = description(tmp_path / "out")
    assert (found["version"], found["model_quant_type"]) == ("1.0.0", type_)
    assert "group_size" not in found
    assert_described(tmp_path / "out", {type_})
    assert not {"quantization_config", "quantize"} & set(config(tmp_path / "out"))
    tensors, layers = read_folder(tmp_path / "out"), source_layers(source)
    assert len(layers) == (14 if "gptq" in source.name else 7)
    half = np.dtype(np.float16) if "bf16" not in source.name else BFLOAT16
    for name, (codes, zeros, scales) in layers.items():
        out = codes.shape[0]
        np.testing.assert_array_equal(tensors[f"{name}.weight"], codes.astype(np.int8), name, strict=True)
        assert not zeros.any()
        wanted = {"weight_scale": scales.astype(half), "weight_offset": np.zeros((out, 1), half)}
        for part, array in wanted.items():
            np.testing.assert_array_equal(tensors[f"{name}.{part}"], array, f"{name}.{part}", strict=True)
    assert ("widen-codes" in result.plan.move_counts()) == (source in WIDENED)
    assert verify(source, tmp_path / "out").same


@pytest.mark.parametrize("serve", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("source", STATIC, ids=name_of)
def test_static_inputs_come_with_what_the_npu_computes_with(source: Path, serve: str | None, tmp_path: Path) -> None:
    """deq_scale of the scales as they are written, as int64 for float16 and float32 for bfloat16, and the bias in its steps."""
    allow = ["scale-subnormal"]
    convert(source, tmp_path / "out", "msmodelslim", consumer="vllm-ascend", serve_dtype=serve, allow=allow)
    ours, theirs = read_folder(tmp_path / "out"), read_folder(source)
    half = BFLOAT16 if (serve or ("bfloat16" if "bf16" in source.name else "float16")) == "bfloat16" else np.dtype(np.float16)
    biases = 0
    for name, (codes, _, scales) in source_layers(source).items():
        out = codes.shape[0]
        input_scale = theirs[f"{name}.input_scale"].reshape(1).astype(half)
        np.testing.assert_array_equal(ours[f"{name}.input_scale"], input_scale, name, strict=True)
        zero = int(theirs[f"{name}.input_zero_point"].reshape(-1)[0]) if f"{name}.input_zero_point" in theirs else 0
        np.testing.assert_array_equal(ours[f"{name}.input_offset"], np.array([zero], half), name, strict=True)
        weight_scale = scales.astype(half)
        np.testing.assert_array_equal(ours[f"{name}.weight_scale"], weight_scale, name, strict=True)
        deq = weight_scale.astype(np.float32)[:, 0] * input_scale.astype(np.float32)
        stored = ours[f"{name}.deq_scale"]
        assert stored.dtype == (np.int64 if half == np.float16 else np.float32)
        assert stored.shape == (out,)
        wanted = [int(value) for value in deq.view(np.uint32)] if half == np.float16 else deq.tolist()
        assert stored.tolist() == wanted, name
        bias = np.zeros(out)
        if f"{name}.bias" in theirs:
            biases += 1
            bias = theirs[f"{name}.bias"].astype(half).astype(np.float64)
        steps = np.rint(bias / deq.astype(np.float64) - zero * codes.astype(np.int64).sum(axis=1))
        np.testing.assert_array_equal(ours[f"{name}.quant_bias"], steps.astype(np.int32), name, strict=True)
    assert biases == (3 if "bf16" in source.name else 0)


GROUPED = [
    AWQ_GPTQ / "awq_gemm_g128_zp",
    AWQ_GPTQ / "gptq_v1_4b_g128_sym",
    AWQ_GPTQ / "gptq_v1_8b_g128_sym",
    COMPRESSED / "w4a16_g32_asym_fp16",
    COMPRESSED / "naive_w8a16_g64_sym_fp16",
    COMPRESSED / "w3a16_g32_sym_fp16",
]


@pytest.mark.parametrize("source", GROUPED, ids=name_of)
def test_groups_are_refused_by_vllm_ascend_and_the_ways_out_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        convert(source, tmp_path / "out", "msmodelslim", consumer="vllm-ascend")
    assert list(tmp_path.iterdir()) == []
    refusals = plan(source, "msmodelslim", consumer="vllm-ascend").refusals
    grouped = [refusal for refusal in refusals if refusal.code == "group-size"]
    assert {refusal.layer for refusal in grouped} == set(source_layers(source)) if "w3" not in source.name else len(grouped) == 7
    for refusal in grouped:
        for word in ("gptq", "awq", "compressed-tensors", "--allow requantize"):
            assert word in refusal.hint
    assert str(caught.value).startswith(str(refusals[0]))


def test_a_single_group_is_a_channel() -> None:
    """[64 and more, 128] in groups of 128: no group at all, so nothing is refused but what has several."""
    source = COMPRESSED / "w4a16_g128_sym_bf16"
    refused = {refusal.layer.rpartition(".")[2] for refusal in plan(source, "msmodelslim", consumer="vllm-ascend").refusals}
    single = {name.rpartition(".")[2] for name, (_, _, scales) in source_layers(source).items() if scales.shape[1] == 1}
    assert single == {"down_proj"}
    assert refused == {name.rpartition(".")[2] for name in source_layers(source)} - single


@pytest.mark.parametrize("variant", ["msmodelslim", "msmodelslim:vllm-ascend"])
def test_zero_points_in_w8a16_are_refused_by_vllm_ascend(variant: str, tmp_path: Path) -> None:
    source = COMPRESSED / "w4a16_pc_asym_fp16"
    decided = plan(source, variant, consumer="vllm-ascend")
    assert {refusal.layer for refusal in decided.refusals if refusal.code == "zero-point"} == set(source_layers(source))
    assert {refusal.code for refusal in decided.refusals} == {"zero-point"}
    assert "wrong weights" in decided.refusals[0].offers
    assert "--allow requantize" in decided.refusals[0].hint
    other = convert(source, tmp_path / "out", "msmodelslim")
    assert other.exact, "the tool's own dialect holds them"


def test_zero_points_beside_quantized_inputs_are_refused_everywhere_in_the_format() -> None:
    source = COMPRESSED / "w8a8_dynamic_wasym_fp16"
    for variant in ("safe_tensor", "ascendv1", "vllm-ascend", "mindie"):
        decided = plan(source, f"msmodelslim:{variant}")
        assert {refusal.code for refusal in decided.refusals} == {"zero-point"}
        assert len(decided.refusals) == 7


def test_groups_beside_quantized_inputs_have_no_type() -> None:
    source = COMPRESSED / "w4a8_g32_dynamic_fp16"
    for variant, code in (("safe_tensor", "type"), ("ascendv1", "type"), ("mindie", "type"), ("vllm-ascend", "group-size")):
        decided = plan(source, f"msmodelslim:{variant}")
        assert [refusal.code for refusal in decided.refusals] == [code] * 7
        assert "compressed-tensors" in decided.refusals[0].hint


# --- mindie -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", MINDIE, ids=name_of)
def test_mindie_gets_its_names_and_its_keys_in_the_config(source: Path, tmp_path: Path) -> None:
    type_, group = MINDIE[source]
    result = convert(source, tmp_path / "out", "msmodelslim", consumer="mindie")
    assert result.exact
    assert result.plan.target_name == "msmodelslim:mindie"
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert "quant_model_description.json" in files
    assert f"quant_model_weight_{type_.lower()}.safetensors" in files
    said = config(tmp_path / "out")
    assert said["quantize"] == type_.lower()
    assert said["quantization_config"] == {"group_size": group, "kv_quant_type": None, "fa_quant_type": None}
    assert description(tmp_path / "out")["model_quant_type"] == type_
    assert "version" not in description(tmp_path / "out")
    assert_described(tmp_path / "out", {type_})
    tensors, layers = read_folder(tmp_path / "out"), source_layers(source)
    assert layers
    for name, (codes, zeros, scales) in layers.items():
        np.testing.assert_array_equal(tensors[f"{name}.weight"], codes.astype(np.int8), name, strict=True)
        np.testing.assert_array_equal(tensors[f"{name}.weight_scale"].astype(np.float32), scales, name)
        np.testing.assert_array_equal(tensors[f"{name}.weight_offset"].astype(np.float32), zeros.astype(np.float32), name)
    assert verify(source, tmp_path / "out").same


def test_mindie_is_told_of_a_c8_cache(tmp_path: Path) -> None:
    source, base = FIXTURES / "msmodelslim_w8" / "w8a8_c8_sym_bf16", COMPRESSED / "src_qwen2_bf16"
    convert(source, tmp_path / "out", "msmodelslim", consumer="mindie", base_model=base)
    assert config(tmp_path / "out")["quantization_config"] == {"group_size": 0, "kv_quant_type": "C8", "fa_quant_type": None}
    assert len([name for name in read_folder(tmp_path / "out") if ".kv_cache_" in name]) == 4


def test_groups_of_32_are_refused_by_mindie(tmp_path: Path) -> None:
    source = COMPRESSED / "w3a16_g32_sym_fp16"
    with pytest.raises(RefusedError, match=r"needs groups of 32 inputs; msmodelslim:mindie has groups of 256, 128, 64,.*\[group-size\]"):
        convert(source, tmp_path / "out", "msmodelslim", consumer="mindie")
    assert list(tmp_path.iterdir()) == []
    assert plan(source, "msmodelslim:safe_tensor").refusals == []
    unmet = plan(source, "msmodelslim:safe_tensor", consumer="mindie").refusals
    assert {refusal.code for refusal in unmet} == {"config-keys", "group-size"}


# --- a consumer ---------------------------------------------------------------------------------------------------------


UNMET: dict[str, tuple[Path, str, str, dict[str, Any], set[str]]] = {
    "autogptq reads no AWQ": (AWQ_GPTQ / "awq_gemm_g128_zp", "awq", "autogptq", {}, {"version"}),
    "nor in shards": (AWQ_GPTQ / "awq_gemm_g128_zp", "awq", "autogptq", {"max_shard_size": 200_000}, {"version", "one-file"}),
    "autogptq reads v1 only": (AWQ_GPTQ / "awq_gemm_g128_zp", "gptq", "autogptq", {}, {"variant"}),
    "vllm reads symmetric gptq": (AWQ_GPTQ / "gptq_v1_4b_g128_asym", "gptq", "vllm", {}, {"symmetric"}),
    "vllm reads no msmodelslim": (AWQ_GPTQ / "awq_gemm_g128_zp", "msmodelslim", "vllm", {}, {"format"}),
    "a named variant is kept": (AWQ_GPTQ / "awq_gemm_g128_zp", "msmodelslim:safe_tensor", "vllm-ascend", {}, {"file-names", "type"}),
    "vllm wants symmetric W8A8": (COMPRESSED / "w8a8_dynamic_wasym_fp16", "compressed-tensors", "vllm", {}, {"symmetric"}),
}  # fmt: skip


@pytest.mark.parametrize("why", UNMET)
def test_what_the_consumer_would_not_find_is_refused_before_a_byte_is_written(why: str, tmp_path: Path) -> None:
    source, to, consumer, options, codes = UNMET[why]
    decided = plan(source, to, consumer=consumer, **options)
    assert {refusal.code for refusal in decided.refusals} == codes
    assert all(refusal.hint and consumer in refusal.offers for refusal in decided.refusals)
    with pytest.raises(RefusedError):
        convert(source, tmp_path / "out", to, consumer=consumer, **options)
    assert list(tmp_path.iterdir()) == []
    assert plan(source, to, **options).refusals == []


def test_what_the_consumer_finds_is_not_refused() -> None:
    symmetric = AWQ_GPTQ / "gptq_v1_4b_g128_sym"
    for consumer in ("vllm", "sglang", "transformers", "gptqmodel"):
        assert plan(symmetric, "gptq", consumer=consumer).refusals == []
    assert plan(COMPRESSED / "w8a8_static_asym_fp16", "compressed-tensors", consumer="vllm").refusals == []


def test_an_unknown_consumer_is_a_usage_error_that_lists_them() -> None:
    with pytest.raises(UsageError, match=r"there is no such consumer; there are .*vllm-ascend, mindie, mindformers"):
        plan(AWQ_GPTQ / "awq_gemm_g128_zp", "msmodelslim", consumer="ollama")


def test_the_command_line_takes_for(tmp_path: Path) -> None:
    source = COMPRESSED / "w8a16_pc_sym_fp16"
    words = ["convert", str(source), str(tmp_path / "out"), "--to", "msmodelslim", "--for", "vllm-ascend"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "quant_model_description.json").exists()
    assert CliRunner().invoke(app, ["check", str(tmp_path / "out"), "--for", "vllm-ascend"]).exit_code == 0
    grouped = ["plan", str(AWQ_GPTQ / "awq_gemm_g128_zp"), "--to", "msmodelslim", "--for", "vllm-ascend"]
    result = CliRunner().invoke(app, grouped)
    assert result.exit_code == 3
    assert "--allow requantize" in result.stdout + result.stderr
