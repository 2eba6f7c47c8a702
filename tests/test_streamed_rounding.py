"""Data-free rounding of float folders: what the real msModelSlim wrote for the same model, byte for byte, without torch."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import FIXTURES, change_tensors, description_file, read_folder, read_tensors, weight_file, write_tensors
from killing import small_tiles, watched

from convert.engine import Result, convert
from convert.verification import fingerprint
from formats import open_checkpoint
from formats.errors import RefusedError, UnreadableError, UsageError
from quantize import rounded_tiles
from quantize.progress import LayerFigures
from quantize.rounded_tiles import Rounding, ScaleBands, absmax, codes_of
from quantize.streamed import Rounded, round_folder

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
    found, sums = {}, {}
    for name in ENGINES:
        monkeypatch.setenv("WEIGHBRIDGE_KERNELS", name)
        scales, sums[name] = absmax(values, 64) / np.float32(7), np.ones(2)
        found[name] = scales, codes_of(values, scales, 64, 0, 7, sums[name])
    for left, right in zip(*found.values(), strict=True):
        np.testing.assert_array_equal(left, right, strict=True)
    wide, (scales, codes) = values.astype(np.float64), found["numpy"]
    exact = [float(np.square(codes * scales.astype(np.float64).repeat(64, axis=1) - wide).sum()), float(np.square(wide).sum())]
    for added in sums.values():
        np.testing.assert_allclose(added - 1, exact, rtol=1e-5)


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


# --- figures ----------------------------------------------------------------------------------------------------------

WIDE = {"model.layers.0.mlp.up_proj": (224, 2560), "model.layers.0.mlp.down_proj": (96, 1280), "model.layers.1.mlp.up_proj": (160, 4096)}
ROUNDINGS = {"groups": Rounding(4, 128), "channels": Rounding(8), "dynamic": Rounding(8, dynamic=True)}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of layers of several tiles, one with a row of zeros."""
    folder, rng = tmp_path_factory.mktemp("wide"), np.random.default_rng(8)
    tensors = {f"{name}.weight": rng.normal(0, 0.03, shape).astype(ml_dtypes.bfloat16) for name, shape in WIDE.items()}
    tensors["model.layers.0.mlp.up_proj.weight"][7] = 0
    tensors |= {"model.embed_tokens.weight": np.ones((8, 64), ml_dtypes.bfloat16), "lm_head.weight": np.ones((8, 64), ml_dtypes.bfloat16)}
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": 64}))
    return folder


def figures(result: Result, jobs: int = 2) -> dict[str, float]:
    checkpoint = result.plan.checkpoint
    assert isinstance(checkpoint, Rounded)
    return {layer.name: layer.weight_error for layer in checkpoint.figures(checkpoint.layer_names, jobs)}


def errors(source: Path, saved: Path) -> dict[str, float]:
    """||saved - source|| / ||source|| of each layer that msModelSlim's safe_tensor folder holds, in float64 by plain NumPy."""
    floats, ours, found = read_folder(source), read_tensors(weight_file(saved)), {}
    for name in (key.removesuffix(".weight_scale") for key in ours if key.endswith(".weight_scale")):
        weight, codes = (tensors[f"{name}.weight"].astype(np.float64) for tensors in (floats, ours))
        scales = ours[f"{name}.weight_scale"].astype(np.float64)
        apart = codes * scales.repeat(codes.shape[1] // scales.shape[1], axis=1) - weight
        found[name] = float(np.linalg.norm(apart) / np.linalg.norm(weight))
    return found


@pytest.mark.parametrize("small", [False, True], ids=["whole", "tiles"])
@pytest.mark.parametrize("how", ROUNDINGS)
def test_the_errors_are_those_of_what_was_written(how: str, small: bool, engine: str, wide: Path, tmp_path: Path) -> None:
    """Whatever the tiles: gptq's are narrow, and read a row of weights in pieces."""
    wanted, to = {}, "gptq" if how != "dynamic" else "compressed-tensors"
    round_folder(wide, tmp_path / "slim", ROUNDINGS[how], "msmodelslim")
    wanted = errors(wide, tmp_path / "slim")
    assert wanted.keys() == WIDE.keys()
    assert all(0.003 < error < 0.2 for error in wanted.values())
    for proof in (True, False):
        with small_tiles() if small else contextlib.nullcontext(), watched() as begun:
            result = round_folder(wide, tmp_path / "out", ROUNDINGS[how], to, overwrite=True, proof=proof, jobs=3)
        assert (len(begun) > 20) == small
        found = figures(result)
        assert found == pytest.approx(wanted, rel=1e-5)
        assert list(found) == result.plan.checkpoint.layer_names


def test_an_interrupted_run_has_the_errors_of_a_whole_one(wide: Path, tmp_path: Path) -> None:
    """Progress is told of every layer in order; the errors of what an earlier run wrote are found in the end."""
    told: list[tuple[str, int, int, LayerFigures | None]] = []

    def stop(what: str, done: int, of: int, layer: LayerFigures | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with small_tiles():
        with pytest.raises(KeyboardInterrupt):
            round_folder(wide, tmp_path / "out", Rounding(4, 128), "gptq", progress=stop)
        result = round_folder(wide, tmp_path / "out", Rounding(4, 128), "gptq", progress=lambda *one: told.append(one))
    assert result.resumed
    whole = round_folder(wide, tmp_path / "whole", Rounding(4, 128), "gptq", progress=lambda *one: told.append(one))
    assert figures(result) == pytest.approx(figures(whole), rel=1e-6)
    assert [one[:3] for one in told] == [("rounding", done, 3) for done in (1, 2, 3)] * 2
    assert None in [layer for *_, layer in told[:3]]
    assert {layer.name: layer.weight_error for *_, layer in told[3:] if layer is not None} == figures(whole)
    assert {layer.kind for *_, layer in told[3:] if layer is not None} == {"W4A16"}


def test_scales_that_do_not_fit_are_made_again(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = rounded_tiles.absmax
    monkeypatch.setattr(rounded_tiles, "absmax", lambda values, size: made.append(len(values)) or real(values, size))
    whole = round_folder(wide, tmp_path / "whole", Rounding(4, 32), "gptq", jobs=1)
    once = sum(made)
    assert once == sum(out for out, _ in WIDE.values())  # every row's once
    monkeypatch.setattr(Rounded, "keep_scales", lambda self, limit, layers: setattr(self, "_bands", ScaleBands(0)))
    again = round_folder(wide, tmp_path / "again", Rounding(4, 32), "gptq", jobs=1)
    assert sum(made) > 2 * once
    assert fingerprint(tmp_path / "again").digest == fingerprint(tmp_path / "whole").digest
    assert figures(again) == figures(whole)


def test_kept_scales_are_counted_and_stay_within_their_limit(wide: Path) -> None:
    checkpoint = Rounded(open_checkpoint(wide), Rounding(4, 32))
    sizes = sorted((4 * out * in_ // 32 for out, in_ in WIDE.values()), reverse=True)
    for limit, layers, kept in ((1 << 30, 2, sum(sizes[:2])), (1 << 30, 9, sum(sizes)), (1000, 9, 1000)):
        checkpoint.keep_scales(limit, layers)
        assert checkpoint.kept == kept
    bands = ScaleBands(100)
    arrays = {band: np.full(10, band, np.float32) for band in range(5)}
    for band in (0, 1, 0, 2, 3, 0, 4):
        np.testing.assert_array_equal(bands.take("a", band, lambda band=band: arrays[band]), arrays[band])  # type: ignore[misc]
    held = [band for band in arrays if bands.take("a", band, lambda: np.empty(0)).size]
    assert held == [0, 4]  # those used last


def test_memory_and_workers_are_as_asked(wide: Path, tmp_path: Path) -> None:
    result = round_folder(wide, tmp_path / "out", Rounding(4, 128), "gptq", jobs=1, max_memory=100 << 20)
    memory = result.plan.memory
    assert (memory.jobs, memory.limit, memory.kept) == (1, 100 << 20, result.plan.checkpoint.kept)
    assert memory.kept > 0
    with pytest.raises(UsageError, match=r"--max-memory 50MiB: this checkpoint needs \d+MiB at least"):
        round_folder(wide, tmp_path / "out", Rounding(4, 128), "gptq", max_memory=50 << 20, overwrite=True)
