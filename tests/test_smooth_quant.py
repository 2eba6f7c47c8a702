"""LMDeploy's smooth_quant folders: its own, read by plain code, carried to compressed-tensors and back, and written anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from places import fails
from safetensors.numpy import load_file, save_file

from convert import convert, inspect, verify
from formats import open_checkpoint
from formats.ir import dequantize
from formats.safetensors_file import SafetensorsFile

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lmdeploy"
KINDS = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_codes_times_scales(kind: str) -> None:
    folder = FIXTURES / f"smooth_quant_{kind}"
    file, checkpoint = SafetensorsFile(folder / "model.safetensors"), open_checkpoint(folder)
    assert (checkpoint.format, checkpoint.variant, len(checkpoint.layer_names)) == ("smooth_quant", kind, 14)
    assert str(inspect(folder).schemes[0].scheme).startswith("W8A8")
    for name in checkpoint.layer_names:
        codes = np.asarray(file.tensor(f"{name}.weight")).view(KINDS[kind]).astype(np.float32)
        scale = np.asarray(file.tensor(f"{name}.scale"))
        assert np.array_equal(dequantize(checkpoint.layer(name)), codes * scale), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["", "compressed-tensors"])
def test_a_folder_comes_back_byte_for_byte(tmp_path: Path, kind: str, by: str) -> None:
    source = golden = FIXTURES / f"smooth_quant_{kind}"
    if by:
        convert(golden, tmp_path / "by", by, scale_dtype="keep")
        source = tmp_path / "by"
    result = convert(source, tmp_path / "out", f"smooth_quant:{kind}")
    assert result.exact
    ours, theirs = (SafetensorsFile(folder / "model.safetensors") for folder in (tmp_path / "out", golden))
    assert sorted(ours.tensors) == sorted(theirs.tensors)
    for name, info in theirs.tensors.items():
        assert (ours.tensors[name].dtype, ours.tensors[name].shape) == (info.dtype, info.shape)
        assert np.asarray(ours.tensor(name)).tobytes() == np.asarray(theirs.tensor(name)).tobytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", golden)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert verify(golden, tmp_path / "out").same


def test_inputs_in_float_have_no_spelling(tmp_path: Path) -> None:
    source = FIXTURES.parent / "msmodelslim" / "w8a16_pc_asym_fp16"
    assert "type" in fails(3, "convert", source, tmp_path / "out", "--to", "smooth_quant")


def copy(tmp_path: Path, kind: str = "int8") -> Path:
    shutil.copytree(FIXTURES / f"smooth_quant_{kind}", tmp_path / "source")
    return tmp_path / "source"


def say(folder: Path, **said: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= said
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("said", "word"),
    [("float8_e4m3fn", "correct quant_dtype"), ("int4", "quant_dtype is 'int4'"), (["int8"], "quant_dtype is ['int8']")],
)
def test_a_config_that_lies(tmp_path: Path, said: Any, word: str) -> None:
    assert word in fails(5, "inspect", say(copy(tmp_path), quant_dtype=said))


def test_int8_is_meant_where_nothing_is_said(tmp_path: Path) -> None:
    assert inspect(say(copy(tmp_path), quant_dtype=None)).format == "smooth_quant:int8"


@pytest.mark.parametrize(
    ("name", "array", "word"),
    [
        ("model.layers.0.mlp.up_proj.scale", None, "has I8 weights and no scale"),
        ("model.layers.0.mlp.up_proj.scale", np.ones((3, 1), np.float32), "scale is F32 [3, 1], wanted F32 [512, 1]"),
        ("model.layers.0.mlp.up_proj.weight", np.ones((512, 256), np.float16), "weight is F16 [512, 256]"),
        ("model.layers.0.mlp.up_proj.weight", np.ones(512, np.int8), "weight is I8 [512]"),
    ],
)
def test_parts_that_contradict(tmp_path: Path, name: str, array: np.ndarray[Any, Any] | None, word: str) -> None:
    folder = copy(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors if array is None else {**tensors, name: array}, folder / "model.safetensors", metadata={"format": "pt"})
    assert word in fails(5, "inspect", folder)
