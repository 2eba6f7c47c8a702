"""msModelSlim folders that we write are the tool's own: tensors byte for byte, description key for key, names and packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    FIXTURES,
    GOLDENS,
    MSMODELSLIM,
    change_tensors,
    description_file,
    model,
    read_folder,
    read_raw,
    roll_back,
    write_msmodelslim,
)

from convert import convert, plan, verify
from formats.errors import RefusedError, UsageError

TWINS = (
    ("w4a16_g128_sym_bf16", "w4a16_ascendv1_g128_sym_bf16", "ascendv1"),
    ("w4a16_pc_sym_bf16", "w4a16_ascendv1_pc_sym_bf16", "ascendv1"),
    ("w4a16_ascendv1_g128_sym_bf16", "w4a16_g128_sym_bf16", "safe_tensor"),
    ("w4a16_ascendv1_pc_sym_bf16", "w4a16_pc_sym_bf16", "safe_tensor"),
)
V0 = [case for case in GOLDENS if not case.startswith("v1") and "ascendv1" not in case]
HUB = ("awq_gemm_g128_zp", "gptq_v1_4b_g128_sym", "gptq_v1_8b_g128_sym", "gptq_v1_4b_gm1_sym", "gptqmodel_v1_4b_g128_sym")


def weights(folder: Path) -> dict[str, Any]:
    """{tensor: (dtype, shape, bytes)} of a golden's or our weight files; the goldens' records beside them left out."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        if not path.name.startswith("golden_"):
            header, data = read_raw(path)
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    tensors[name] = (entry["dtype"], entry["shape"], data[begin:end])
    return tensors


def description(folder: Path) -> dict[str, Any]:
    return json.loads(description_file(folder).read_text("utf-8"))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("source", "twin", "variant"), TWINS)
def test_a_golden_becomes_its_twin_that_the_tool_wrote(source: str, twin: str, variant: str, tmp_path: Path) -> None:
    """The tool wrote the same model in both save types: converting one gives the other, byte for byte."""
    result = convert(MSMODELSLIM / source, tmp_path / "out", f"msmodelslim:{variant}")
    assert result.exact
    assert weights(tmp_path / "out") == weights(MSMODELSLIM / twin)
    assert description(tmp_path / "out") == description(MSMODELSLIM / twin)
    names = {path.name for path in (MSMODELSLIM / twin).iterdir() if not path.name.startswith("golden_")}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("case", V0)
def test_a_golden_is_written_again_as_it_is(case: str, tmp_path: Path) -> None:
    """Dtypes of scales included: float32 per group, the model's own per channel and for GPTQ. AntiOutlier's copies stay behind."""
    result = convert(MSMODELSLIM / case, tmp_path / "out", "msmodelslim", base_model=MSMODELSLIM / GOLDENS[case].base)
    assert result.exact
    left_out = {item.tensor for item in result.plan.checkpoint.left_out}
    assert weights(tmp_path / "out") == {name: tensor for name, tensor in weights(MSMODELSLIM / case).items() if name not in left_out}
    wanted = {name: label for name, label in description(MSMODELSLIM / case).items() if name not in left_out}
    assert description(tmp_path / "out") == wanted
    assert bool(left_out) == ("m3" in case)


@pytest.mark.parametrize("case", HUB)
@pytest.mark.parametrize("variant", ["safe_tensor", "ascendv1"])
def test_a_hub_checkpoint_goes_to_ascend_and_back_without_a_changed_byte(case: str, variant: str, tmp_path: Path) -> None:
    source = FIXTURES / "awq_gptq" / case
    there = convert(source, tmp_path / "ascend", f"msmodelslim:{variant}")
    assert there.exact
    back = convert(tmp_path / "ascend", tmp_path / "back", there.plan.checkpoint.format, base_model=source, scale_dtype="keep")
    assert back.exact
    ours, theirs = weights(tmp_path / "back"), weights(source)
    added = {name for name in theirs if name not in ours}
    assert all(name.endswith(".bias") and not any(theirs[name][2]) for name in added)  # AutoGPTQ's biases of zeros
    assert {name: tensor for name, tensor in theirs.items() if name not in added} == {
        name: ours[name] for name in theirs if name not in added
    }


@pytest.mark.parametrize("variant", ["safe_tensor", "ascendv1"])
def test_three_bits_travel_in_a_carrier_of_four(variant: str, tmp_path: Path) -> None:
    source = FIXTURES / "awq_gptq" / "gptqmodel_v2_3b_g128"
    result = convert(source, tmp_path / "out", f"msmodelslim:{variant}")
    assert result.exact
    assert result.plan.move_counts()["widen-codes"] == len(result.plan.layers)
    assert {layer.target.scheme.weights.bits for layer in result.plan.layers} == {4}
    assert verify(source, tmp_path / "out").same


def test_files_of_many_shards_are_named_as_the_tool_names_them(tmp_path: Path) -> None:
    source = write_msmodelslim(tmp_path / "source", model())
    convert(source, tmp_path / "out", "msmodelslim:ascendv1", max_shard_size=100_000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert shards == [f"quant_model_weight_w4a16-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    index = json.loads((tmp_path / "out" / "quant_model_weight_w4a16.safetensors.index.json").read_text("utf-8"))
    assert set(index["weight_map"].values()) == set(shards)
    assert verify(source, tmp_path / "out").same


def test_layers_left_in_float_are_described_as_float(tmp_path: Path) -> None:
    source = write_msmodelslim(tmp_path / "source", roll_back(model(), ["model.layers.1.mlp.down_proj"]))
    convert(source, tmp_path / "awq", "awq")
    convert(tmp_path / "awq", tmp_path / "out", "msmodelslim")
    found = description(tmp_path / "out")
    assert found["model.layers.1.mlp.down_proj.weight"] == "FLOAT"
    assert found["model.layers.0.mlp.down_proj.weight"] == "W4A16"
    assert set(found) - {"model_quant_type"} == set(read_folder(tmp_path / "out"))


def test_config_json_says_nothing_of_another_quantization(tmp_path: Path) -> None:
    """vLLM-Ascend and Hugging Face would take the folder for AWQ."""
    source = write_msmodelslim(tmp_path / "source", model())
    convert(source, tmp_path / "awq", "awq")
    convert(tmp_path / "awq", tmp_path / "out", "msmodelslim")
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    assert config["model_type"]


def test_act_order_is_refused_by_name(tmp_path: Path) -> None:
    source = write_msmodelslim(tmp_path / "source", model())
    convert(source, tmp_path / "gptq", "gptq")

    def shuffle(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("g_idx"):
                tensors[name] = np.random.default_rng(0).permutation(tensors[name])

    change_tensors(tmp_path / "gptq" / "model.safetensors", shuffle)
    for target in ("msmodelslim", "awq"):
        with pytest.raises(RefusedError, match=r"act order.*\[act-order\]"):
            convert(tmp_path / "gptq", tmp_path / "out", target)
    assert convert(tmp_path / "gptq", tmp_path / "again", "gptq").exact


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_serve_dtype_is_that_of_per_channel_scales_and_of_the_config(dtype: str, stored: str, tmp_path: Path) -> None:
    source = write_msmodelslim(tmp_path / "source", model())
    convert(source, tmp_path / "awq", "gptq")
    decided = plan(tmp_path / "awq", "msmodelslim", serve_dtype=dtype)
    assert decided.model.model_dtype == dtype
    golden = FIXTURES / "awq_gptq" / "gptq_v1_4b_gm1_sym"
    result = convert(golden, tmp_path / "out", "msmodelslim", serve_dtype=dtype)
    scales = {tensor[0] for name, tensor in weights(tmp_path / "out").items() if name.endswith("weight_scale")}
    assert scales == {stored}
    assert result.exact == (dtype == "float16")
    with pytest.raises(UsageError, match="--serve-dtype"):
        plan(golden, "awq", serve_dtype=dtype)
