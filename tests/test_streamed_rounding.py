"""Data-free rounding of float folders: what the real msModelSlim wrote for the same model, byte for byte, without torch."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import FIXTURES, change_tensors, description_file, read_tensors, weight_file

from convert.engine import convert
from convert.verification import fingerprint
from formats.errors import RefusedError, UnreadableError, UsageError
from quantize.streamed import Rounding, absmax, codes_of, round_folder

SLIM = FIXTURES / "msmodelslim"
GOLDENS = {
    "w4a16_g128_sym_bf16": (Rounding(4, 128), "msmodelslim"),
    "w4a16_pc_sym_bf16": (Rounding(4), "msmodelslim"),
    "w8a16_g128_sym_bf16": (Rounding(8, 128), "msmodelslim"),
    "w4a16_ascendv1_g128_sym_bf16": (Rounding(4, 128), "msmodelslim:ascendv1"),
    "w4a16_ascendv1_pc_sym_bf16": (Rounding(4), "msmodelslim:ascendv1"),
}
ENGINES = ("numpy", "numba")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WEIGHBRIDGE_KERNELS", request.param)
    return str(request.param)


@pytest.mark.parametrize("case", GOLDENS)
def test_the_tool_wrote_the_same(case: str, engine: str, tmp_path: Path) -> None:
    rounding, to = GOLDENS[case]
    result = round_folder(SLIM / "src_bf16", tmp_path / "out", rounding, to)
    assert result.exact
    ours, theirs = read_tensors(weight_file(tmp_path / "out")), read_tensors(weight_file(SLIM / case))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype, name
        np.testing.assert_array_equal(ours[name].view(np.uint8), array.view(np.uint8), name)
    assert json.loads(description_file(tmp_path / "out").read_text()) == json.loads(description_file(SLIM / case).read_text())


@pytest.mark.parametrize("to", ["awq", "gptq", "compressed-tensors"])
def test_straight_to_a_format_is_by_way_of_msmodelslim(to: str, tmp_path: Path) -> None:
    round_folder(SLIM / "src_bf16", tmp_path / "slim", Rounding(4, 128), "msmodelslim")
    convert(tmp_path / "slim", tmp_path / "converted", to)
    round_folder(SLIM / "src_bf16", tmp_path / "straight", Rounding(4, 128), to)
    assert fingerprint(tmp_path / "straight").digest == fingerprint(tmp_path / "converted").digest


@pytest.mark.parametrize(("dtype", "lost"), [(ml_dtypes.bfloat16, 16), (np.float16, 13), (np.float32, 0)])
def test_quotients_are_rounded_as_the_dtype_rounds_them(dtype: type, lost: int, engine: str) -> None:
    """Every code that plain arithmetic of the dtype gives, ties and subnormal quotients among them."""
    rng = np.random.default_rng(lost)
    values = rng.normal(0, 0.02, (96, 256)).astype(dtype)
    values[0, :4] = np.array([0.0, -0.0, 1e-30, -1e-7]).astype(dtype)
    rows = values.astype(np.float32)
    scales = (np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)).astype(dtype)
    wanted = np.clip(np.rint((rows / scales.astype(np.float32)).astype(dtype).astype(np.float32)), -127, 127)
    np.testing.assert_array_equal(codes_of(rows, scales.astype(np.float32), 256, lost, 127), wanted)


def test_both_engines_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0, 1, (130, 1024)).astype(np.float32)
    found = {}
    for name in ENGINES:
        monkeypatch.setenv("WEIGHBRIDGE_KERNELS", name)
        scales = absmax(values, 64) / np.float32(7)
        found[name] = scales, codes_of(values, scales, 64, 0, 7)
    for left, right in zip(*found.values(), strict=True):
        np.testing.assert_array_equal(left, right, strict=True)


def copied(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (SLIM / "src_bf16").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value: float, engine: str, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    name = "model.layers.1.mlp.up_proj"
    change_tensors(folder / "model.safetensors", lambda tensors: tensors[f"{name}.weight"].__setitem__((3, 200), value))
    with pytest.raises(UnreadableError, match=rf"^{name}: .* NaN or infinite"):
        round_folder(folder, tmp_path / "out", Rounding(4, 128), "awq")
    assert not (tmp_path / "out").exists()


def test_rows_of_zeros_have_the_smallest_scale(engine: str, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    change_tensors(folder / "model.safetensors", lambda tensors: tensors[f"{name}.weight"].__setitem__(5, 0))
    round_folder(folder, tmp_path / "out", Rounding(8), "msmodelslim")
    tensors = read_tensors(weight_file(tmp_path / "out"))
    assert not tensors[f"{name}.weight"][5].any()
    assert float(tensors[f"{name}.weight_scale"][5, 0]) == 2.0**-23


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="wanted 4 or 8 bits"):
        Rounding(3)
    with pytest.raises(UsageError, match=r"model\.layers\.0\..*: 1\d\d inputs are not whole groups of 256"):
        round_folder(FIXTURES / "compressed_tensors" / "src_llama_fp16", tmp_path / "out", Rounding(4, 256), "awq")
    with pytest.raises(UsageError, match="'nobody' is no linear"):
        round_folder(SLIM / "src_bf16", tmp_path / "out", Rounding(4, 128), "awq", disable_names=("nobody",))
    with pytest.raises(UsageError, match="is quantized"):
        round_folder(FIXTURES / "awq_gptq" / "awq_gemm_g128_zp", tmp_path / "out", Rounding(4, 128), "awq")
    with pytest.raises(RefusedError, match="8-bit"):
        round_folder(SLIM / "src_bf16", tmp_path / "out", Rounding(8), "awq")


def test_named_linears_stay_float(tmp_path: Path) -> None:
    left = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj")
    round_folder(SLIM / "src_bf16", tmp_path / "out", Rounding(4, 128), "gptq", disable_names=left)
    ours, source = read_tensors(weight_file(tmp_path / "out")), read_tensors(SLIM / "src_bf16" / "model.safetensors")
    for name in left:
        np.testing.assert_array_equal(ours[f"{name}.weight"].view(np.uint8), source[f"{name}.weight"].view(np.uint8))
    assert sum(name.endswith(".qweight") for name in ours) == 12
