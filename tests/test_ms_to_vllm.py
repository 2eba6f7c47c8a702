"""ms_to_vllm against what msModelSlim's own script wrote for the same files, and without its defects.

``fixtures/ms_to_vllm/reference.json`` says of every run of the script what came out and whether it was right. Where it was
right, ours has the same tensors, bit for bit. Where it was not, ours is right by the law, or refused.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from plan_cases import (
    DOWN,
    FIXTURES,
    NORM,
    O_PROJ,
    QKV,
    Source,
    assert_holds,
    decode_awq,
    decode_gptq,
    one,
    read_header,
    read_json,
    read_safetensors,
    write_safetensors,
)
from typer.testing import CliRunner

from convert.ms_to_vllm import app, ms_to_vllm
from formats.errors import DestinationError, RefusedError, UnreadableError, UsageError

CASES = FIXTURES / "msmodelslim"
RUNS = read_json(FIXTURES / "ms_to_vllm" / "reference.json")["runs"]
RIGHT = [run for run in RUNS if run["verdict"] == "right"]
OTHERS = [run for run in RUNS if run["verdict"] != "right"]
PACKED = [run for run in OTHERS if "packed" in run["verdict"]]
REFUSED = [run for run in OTHERS if "packed" not in run["verdict"]]

SMOOTHED = "w4a16_awq_m3_g128_sym_bf16"
SCRIPT_FLAGS = ("--model", "--json", "--save_path", "--w_bit", "--target_tool")
NORMS = [f"model.layers.{block}.{norm}" for block in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")]
LEFTOVERS = {
    *(f"{norm}.{bias}" for norm in NORMS for bias in ("bias", "module.bias")),
    "model.norm.bias",
}
"""What the script copies of AntiOutlier's wrapped norms and no model has."""

TORCH = {np.dtype("<f2"): "F16", np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype("<f4"): "F32", np.dtype("<i4"): "I32"}


def title(run: dict[str, Any]) -> str:
    return f"{run['case']}-{run['target']}-{run['w_bit']}"


def runs(which: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("reference", which, ids=title)


def files_of(folder: Path) -> tuple[Path, Path]:
    """(weights, description) of an msModelSlim folder."""
    return next(folder.glob("quant_model_weight*.safetensors")), next(folder.glob("quant_model_description*.json"))


def converted(folder: Path, save_path: Path, *options: Any, **named: Any) -> dict[str, np.ndarray]:
    """The tensors of the file that comes of ``folder``."""
    weights, description = files_of(folder)
    ms_to_vllm(weights, description, save_path, *options, **named)
    return read_safetensors(save_path)


def made(source: Source, tmp_path: Path) -> tuple[Path, Path]:
    return files_of(source.write(tmp_path / "source"))


def stored(array: np.ndarray) -> list[Any]:
    """A tensor as the reference records it."""
    return [TORCH[array.dtype], list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]


def law(case: str, layer: str) -> np.ndarray:
    """float32 weights [out, in] of a fixture's layer: ``(weight - weight_offset) * weight_scale``, packed or not."""
    weights, description = files_of(CASES / case)
    tensors = read_safetensors(weights)
    codes = tensors[f"{layer}.weight"]
    scale, offset = (tensors[f"{layer}.weight_{part}"].astype(np.float32) for part in ("scale", "offset"))
    if read_json(description)[f"{layer}.weight"] == "W4A16" and "version" in read_json(description):
        low, high = (codes << 4).astype(np.int8) >> 4, codes >> 4
        # two output rows a byte with groups, two inputs a byte with one scale a row; the low nibble comes first
        axis = 2 if scale.shape[1] == 1 else 1
        codes = np.stack([low, high], axis=axis).reshape((-1, codes.shape[1]) if axis == 1 else (codes.shape[0], 2 * codes.shape[1]))
    group = codes.shape[1] // scale.shape[1]
    scale, offset = np.repeat(scale, group, axis=1), np.repeat(offset, group, axis=1)
    return np.asarray(scale * (codes.astype(np.float32) - offset))


def layers_of(case: str) -> list[str]:
    tensors = read_safetensors(files_of(CASES / case)[0])
    return [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]


def test_the_reference_is_whole() -> None:
    assert len(RUNS) == 28
    assert len(RIGHT) == 15
    assert len(PACKED) == 4
    assert {run["case"] for run in RIGHT + PACKED} == {
        path.name for path in CASES.iterdir() if path.name.startswith(("w4a16", "w8a16", "v1"))
    }


class TestTheScript:
    @runs(RIGHT)
    def test_where_it_is_right_ours_is_the_same_bit_for_bit(self, tmp_path: Path, reference: dict[str, Any]) -> None:
        ours = converted(CASES / reference["case"], tmp_path / "res.safetensors", reference["w_bit"], reference["target"])
        found = {name: stored(array) for name, array in ours.items()}
        expected = dict(reference["tensors"])
        if reference["case"] == SMOOTHED:
            assert set(reference["extra"]) == LEFTOVERS
            for name in LEFTOVERS:
                del expected[name]
        g_idx = {name for name in found if name.endswith(".g_idx")}
        layers = {name.removesuffix(".qweight") for name in found if name.endswith(".qweight")}
        assert g_idx == ({f"{layer}.g_idx" for layer in layers} if reference["target"] == "gptq" else set())
        assert {name: entry for name, entry in found.items() if name not in g_idx} == expected
        assert len(layers) == reference["layers"]

    @runs(RIGHT)
    def test_metadata_says_pt_and_the_folder_holds_nothing_else(self, tmp_path: Path, reference: dict[str, Any]) -> None:
        converted(CASES / reference["case"], tmp_path / "res.safetensors", reference["w_bit"], reference["target"])
        assert read_header(tmp_path / "res.safetensors")[0]["__metadata__"] == {"format": "pt"}
        assert [path.name for path in tmp_path.iterdir()] == ["res.safetensors"]

    @runs([run for run in RIGHT if run["target"] == "gptq"])
    def test_g_idx_is_right(self, tmp_path: Path, reference: dict[str, Any]) -> None:
        ours = converted(CASES / reference["case"], tmp_path / "res.safetensors", reference["w_bit"], "gptq")
        for layer in layers_of(reference["case"]):
            wanted = law(reference["case"], layer)
            group = wanted.shape[1] // len(ours[f"{layer}.scales"])
            g_idx = ours[f"{layer}.g_idx"]
            assert g_idx.dtype == np.int32
            assert g_idx.tolist() == [column // group for column in range(wanted.shape[1])]

    @runs(RIGHT + PACKED)
    def test_every_run_decodes_to_the_law(self, tmp_path: Path, reference: dict[str, Any]) -> None:
        case, target = reference["case"], reference["target"]
        ours = converted(CASES / case, tmp_path / "res.safetensors", reference["w_bit"], target)
        layers = layers_of(case)
        assert len(layers) == reference["layers"]
        for layer in layers:
            found = decode_awq(ours, layer) if target == "awq" else decode_gptq(ours, layer, reference["w_bit"])
            np.testing.assert_array_equal(found.weights, law(case, layer), err_msg=layer)

    @runs(REFUSED)
    def test_what_the_target_cannot_hold_is_refused(self, tmp_path: Path, reference: dict[str, Any]) -> None:
        save_path = tmp_path / "res.safetensors"
        with pytest.raises(RefusedError) as caught:
            converted(CASES / reference["case"], save_path, reference["w_bit"], reference["target"])
        assert caught.value.refusals
        assert all(refusal.layer in layers_of(reference["case"]) for refusal in caught.value.refusals)  # type: ignore[attr-defined]
        assert str(caught.value).startswith(f"{caught.value.refusals[0].layer}: ")  # type: ignore[attr-defined]
        assert list(tmp_path.iterdir()) == []


def codes_of(error: pytest.ExceptionInfo[RefusedError]) -> set[str]:
    return {refusal.code for refusal in error.value.refusals}  # type: ignore[attr-defined]


class TestItsDefects:
    """One test for each defect that the script is known to have."""

    @pytest.mark.parametrize("mode", ["save_path", "output_dir"])
    def test_4_bits_for_8_bit_data(self, tmp_path: Path, mode: str) -> None:
        weights, description = files_of(CASES / "w8a16_pc_asym_fp16")
        with pytest.raises(RefusedError, match="8") as caught:
            ms_to_vllm(weights, description, w_bit=4, target_tool="gptq", **{mode: tmp_path / "out"})
        assert str(caught.value).startswith("model.layers.0.")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("case", ["w8a16_g128_sym_bf16", "w8a16_pc_asym_fp16", "v1_w8a16_pc"])
    def test_no_bits_for_8_bit_data(self, tmp_path: Path, case: str) -> None:
        """The script's default is 4; ours is what the description says."""
        ours = converted(CASES / case, tmp_path / "res.safetensors", target_tool="gptq")
        for layer in layers_of(case):
            np.testing.assert_array_equal(decode_gptq(ours, layer, 8).weights, law(case, layer))

    def test_8_bits_for_4_bit_data_is_exact(self, tmp_path: Path) -> None:
        """Wider than needed, as the script allows: a zero point of 0 in 4 bits is 120 in 8."""
        weights, description = made(one(64, offsets=-8), tmp_path)
        ms_to_vllm(weights, description, tmp_path / "out", 8, "gptq")
        found = decode_gptq(read_safetensors(tmp_path / "out"), O_PROJ, 8)
        np.testing.assert_array_equal(found.weights, one(64, offsets=-8).laws[O_PROJ])
        assert (found.zeros == -8).all()

    @pytest.mark.parametrize("target", ["awq", "gptq"])
    @pytest.mark.parametrize("case", ["w4a16_ascendv1_g128_sym_bf16", "w4a16_ascendv1_pc_sym_bf16"])
    def test_two_codes_a_byte(self, tmp_path: Path, case: str, target: str) -> None:
        """The same model as without packing, so the same file."""
        ours = converted(CASES / case, tmp_path / "packed", target_tool=target)
        twin = converted(CASES / case.replace("ascendv1_", ""), tmp_path / "unpacked", target_tool=target)
        assert {name: stored(array) for name, array in ours.items()} == {name: stored(array) for name, array in twin.items()}

    @pytest.mark.parametrize("case", ["w4a16_ascendv1_g128_sym_bf16", "w4a16_ascendv1_pc_sym_bf16"])
    def test_two_codes_a_byte_and_a_description_that_does_not_say_so(self, tmp_path: Path, case: str) -> None:
        weights, description = files_of(CASES / case)
        silent = tmp_path / "description.json"
        silent.write_text(description.read_text().replace('"version": "1.0.0"', '"versions": "1.0.0"'))
        assert "version" not in read_json(silent)
        with pytest.raises(UnreadableError, match=r"^model\.layers\.0\."):
            ms_to_vllm(weights, silent, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_zero_point_of_0_for_gptq(self, tmp_path: Path, bits: int) -> None:
        """A file cannot say that it is v2, so it is refused there; a folder can, and is right, neighbours included."""
        low = -(1 << bits - 1)
        offsets = np.arange(64).reshape(32, 2) % 13 - 6
        offsets[3, 0] = low
        source = one(128, shape=(32, 256), bits=bits, offsets=offsets)
        weights, description = made(source, tmp_path)
        with pytest.raises(RefusedError) as caught:
            ms_to_vllm(weights, description, tmp_path / "res.safetensors", bits, "gptq")
        assert codes_of(caught) == {"zero-point"}
        assert O_PROJ in str(caught.value)
        assert not (tmp_path / "res.safetensors").exists()
        ms_to_vllm(weights, description, w_bit=bits, target_tool="gptq", output_dir=tmp_path / "folder")
        assert read_json(tmp_path / "folder" / "quantize_config.json")["checkpoint_format"] == "gptq_v2"
        tensors = read_safetensors(tmp_path / "folder" / "model.safetensors")
        assert_holds(tensors, source, O_PROJ, "gptq", bits, version=2)

    def test_the_refusal_of_a_zero_point_says_how_to_go_on_with_this_command(self, tmp_path: Path) -> None:
        weights, description = made(one(offsets=-8), tmp_path)
        with pytest.raises(RefusedError, match="--output_dir"):
            ms_to_vllm(weights, description, tmp_path / "res.safetensors", target_tool="gptq")

    def test_a_zero_point_of_0_for_awq(self, tmp_path: Path) -> None:
        source = one(64, offsets=np.arange(64).reshape(32, 2) % 16 - 8)
        weights, description = made(source, tmp_path)
        ms_to_vllm(weights, description, tmp_path / "out")
        assert_holds(read_safetensors(tmp_path / "out"), source, O_PROJ, "awq")

    @pytest.mark.parametrize("target", ["awq", "gptq"])
    @pytest.mark.parametrize("shape", [(12, 128), (16, 128), (40, 128), (32, 252), (32, 16)])
    @pytest.mark.parametrize("mode", ["save_path", "output_dir"])
    def test_sizes_that_are_no_multiple_of_32(self, tmp_path: Path, shape: tuple[int, int], target: str, mode: str) -> None:
        weights, description = made(one(shape=shape), tmp_path)
        with pytest.raises(RefusedError) as caught:
            ms_to_vllm(weights, description, target_tool=target, **{mode: tmp_path / "out"})
        assert "shape-multiple" in codes_of(caught)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("target", ["awq", "gptq"])
    @pytest.mark.parametrize("mode", ["save_path", "output_dir"])
    def test_w8a8_is_not_passed_through(self, tmp_path: Path, target: str, mode: str) -> None:
        """What quantizes the inputs of 10 layers has no place in either format, and is not left out unasked."""
        weights, description = files_of(CASES / "w8a8_mix_cfg_fp16")
        where: dict[str, Any] = {mode: tmp_path / "out"}
        with pytest.raises(RefusedError) as caught:
            ms_to_vllm(weights, description, target_tool=target, **where)
        assert {"activations-dropped"} <= codes_of(caught) <= {"activations-dropped", "bits", "fused"}
        (dropped,) = [refusal for refusal in caught.value.refusals if getattr(refusal, "code", "") == "activations-dropped"]
        assert "will be computed in float (in 10 places)" in str(dropped)
        eight = {getattr(refusal, "layer", "") for refusal in caught.value.refusals if getattr(refusal, "code", "") == "bits"}
        assert eight == (set(layers_of("w8a8_mix_cfg_fp16")) if target == "awq" else set())
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("mode", ["save_path", "output_dir"])
    def test_w8a8_goes_to_compressed_tensors_with_its_inputs(self, tmp_path: Path, mode: str) -> None:
        folder = FIXTURES / "msmodelslim_w8" / "w8a8_static_bf16"
        weights, description = files_of(folder)
        where: dict[str, Any] = {mode: tmp_path / "out"}
        ms_to_vllm(weights, description, target_tool="compressed-tensors", **where)
        ours = read_safetensors(tmp_path / "out" / "model.safetensors" if mode == "output_dir" else tmp_path / "out")
        theirs = read_safetensors(weights)
        layers = [name.removesuffix(".weight") for name, array in theirs.items() if array.dtype == np.int8]
        assert len(layers) == 7
        for layer in layers:
            np.testing.assert_array_equal(ours[f"{layer}.weight"], theirs[f"{layer}.weight"], layer, strict=True)
            for part in ("weight_scale", "input_scale"):
                found, wanted = (tensors[f"{layer}.{part}"].astype(np.float32) for tensors in (ours, theirs))
                np.testing.assert_array_equal(found, wanted, f"{layer}.{part}")
            offset = theirs[f"{layer}.input_offset"].astype(np.int8)
            np.testing.assert_array_equal(ours[f"{layer}.input_zero_point"], offset, layer, strict=True)
            assert not {f"{layer}.{part}" for part in ("deq_scale", "quant_bias", "input_offset", "weight_offset")} & set(ours)

    def test_tensors_that_the_description_lacks_are_carried(self, tmp_path: Path) -> None:
        extra = np.arange(6, dtype=np.float16).reshape(2, 3)
        weights, description = made(one().tensor("model.extra.weight", extra, None), tmp_path)
        assert "model.extra.weight" not in read_json(description)
        ms_to_vllm(weights, description, tmp_path / "out")
        assert stored(read_safetensors(tmp_path / "out")["model.extra.weight"]) == stored(extra)

    def test_a_quantized_layer_that_the_description_lacks_is_not_carried_as_it_is(self, tmp_path: Path) -> None:
        source = one().linear(DOWN)
        for name in [name for name in source.types if name.startswith(DOWN)]:
            del source.types[name]
        weights, description = made(source, tmp_path)
        with pytest.raises((RefusedError, UnreadableError), match=r"down_proj"):
            ms_to_vllm(weights, description, tmp_path / "out")

    def test_tensors_that_only_the_description_has_are_missed(self, tmp_path: Path) -> None:
        source = one()
        source.types["model.norm.weight"] = "FLOAT"
        weights, description = made(source, tmp_path)
        with pytest.raises(UnreadableError, match=r"model\.norm\.weight"):
            ms_to_vllm(weights, description, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("target", ["awq", "gptq"])
    def test_stray_norm_biases_are_left_out(self, tmp_path: Path, target: str) -> None:
        ours = converted(CASES / SMOOTHED, tmp_path / "out", target_tool=target)
        assert not LEFTOVERS & ours.keys()
        assert not [name for name in ours if ".module." in name]
        source = read_safetensors(files_of(CASES / SMOOTHED)[0])
        for norm in (*NORMS, "model.norm"):
            assert stored(ours[f"{norm}.weight"]) == stored(source[f"{norm}.weight"])

    def test_a_norm_that_was_shifted_is_refused(self, tmp_path: Path) -> None:
        source = one().floats(f"{NORM}.weight", shape=(128,))
        source.tensor(f"{NORM}.bias", np.full(128, 0.25, np.float32))
        source.tensor(f"{NORM}.module.weight", source.tensors[f"{NORM}.weight"], "W4A16")
        weights, description = made(source, tmp_path)
        with pytest.raises(RefusedError) as caught:
            ms_to_vllm(weights, description, tmp_path / "out")
        assert codes_of(caught) == {"norm"}

    @pytest.mark.parametrize("target", ["awq", "gptq"])
    @pytest.mark.parametrize("case", ["w4a16_g128_sym_bf16", "w4a16_pc_sym_bf16"])
    def test_there_is_a_config_with_output_dir(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, target: str) -> None:
        monkeypatch.chdir(tmp_path)
        weights, description = files_of(CASES / case)
        folder = tmp_path / "folder"
        ms_to_vllm(weights, description, target_tool=target, base_model=CASES / "src_bf16", output_dir=folder)
        config = read_json(folder / "config.json")
        base = read_json(CASES / "src_bf16" / "config.json")
        assert {key: config[key] for key in ("model_type", "hidden_size", "num_hidden_layers")} == {
            key: base[key] for key in ("model_type", "hidden_size", "num_hidden_layers")
        }
        quantization = config["quantization_config"]
        assert quantization["quant_method"] == target
        assert quantization["bits"] == 4
        assert quantization["group_size"] == (-1 if (case, target) == ("w4a16_pc_sym_bf16", "gptq") else 128)
        if target == "gptq":
            assert read_json(folder / "quantize_config.json") == quantization
            assert (quantization["desc_act"], quantization["sym"]) == (False, True)
        else:
            assert (quantization["version"], quantization["zero_point"]) == ("gemm", True)
        tensors = read_safetensors(folder / "model.safetensors")
        for layer in layers_of(case):
            found = decode_awq(tensors, layer) if target == "awq" else decode_gptq(tensors, layer)
            wanted = law(case, layer)
            np.testing.assert_allclose(found.weights, wanted, rtol=2.0**-10)
            np.testing.assert_array_equal(np.sign(found.weights), np.sign(wanted))
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]

    def test_one_scale_for_the_tensor_no_longer_crashes(self, tmp_path: Path) -> None:
        for target in ("awq", "gptq"):
            source = one("tensor", scales=0.3, offsets=2)
            weights, description = made(source, tmp_path / target)
            ms_to_vllm(weights, description, tmp_path / target / "out", target_tool=target)
            assert_holds(read_safetensors(tmp_path / target / "out"), source, O_PROJ, target)

    @pytest.mark.parametrize("target", ["awq", "gptq"])
    def test_every_layer_keeps_its_own_groups_in_a_file(self, tmp_path: Path, target: str) -> None:
        source = Source().linear(O_PROJ, (32, 256), 64).linear(DOWN, (32, 256), 128).linear(QKV[0], (32, 256))
        weights, description = made(source, tmp_path)
        ms_to_vllm(weights, description, tmp_path / "out", target_tool=target)
        tensors = read_safetensors(tmp_path / "out")
        for name, groups in ((O_PROJ, 4), (DOWN, 2), (QKV[0], 1)):
            assert tensors[f"{name}.scales"].shape == (groups, 32)
            assert tensors[f"{name}.scales"].dtype == np.float32
            assert_holds(tensors, source, name, target)

    def test_a_file_may_hold_siblings_that_only_a_folder_must_keep_alike(self, tmp_path: Path) -> None:
        """The script writes them, and a file says nothing of what will be fused."""
        source = Source().linear(QKV[0]).floats(f"{QKV[1]}.weight").linear(QKV[2])
        weights, description = made(source, tmp_path)
        ms_to_vllm(weights, description, tmp_path / "out")
        tensors = read_safetensors(tmp_path / "out")
        assert_holds(tensors, source, QKV[0], "awq")
        assert stored(tensors[f"{QKV[1]}.weight"]) == stored(source.tensors[f"{QKV[1]}.weight"])
        with pytest.raises(RefusedError) as caught:
            ms_to_vllm(weights, description, output_dir=tmp_path / "folder")
        assert codes_of(caught) == {"fused"}


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="ms_to_vllm")


def flags(folder: Path) -> list[Any]:
    weights, description = files_of(folder)
    return ["--model", weights, "--json", description]


class TestTheCommand:
    def test_its_flags_are_the_script_s_and_two_more(self) -> None:
        result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0
        for flag in (*SCRIPT_FLAGS, "--base_model", "--output_dir"):
            assert flag in result.stdout.replace(",", " ").split(), flag

    @pytest.mark.parametrize(("target", "bits"), [("awq", 4), ("gptq", 4), ("gptq", 8)])
    def test_every_flag_of_the_script_is_obeyed(self, tmp_path: Path, target: str, bits: int) -> None:
        case = f"w{bits}a16_g128_sym_bf16"
        save_path = tmp_path / "named.safetensors"
        options = ["--save_path", save_path, "--w_bit", bits, "--target_tool", target]
        result = invoke(*flags(CASES / case), *options)
        assert result.exit_code == 0, result.output
        reference = next(run for run in RIGHT if (run["case"], run["target"], run["w_bit"]) == (case, target, bits))
        found = {name: stored(array) for name, array in read_safetensors(save_path).items()}
        assert {name: entry for name, entry in found.items() if not name.endswith(".g_idx")} == reference["tensors"]
        assert "proved exact" in result.stdout

    def test_the_defaults_are_the_script_s(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """awq, into res.safetensors of the working folder."""
        monkeypatch.chdir(tmp_path)
        result = invoke(*flags(CASES / "w4a16_g128_asym_fp16"))
        assert result.exit_code == 0, result.output
        assert [path.name for path in tmp_path.iterdir()] == ["res.safetensors"]
        layer = layers_of("w4a16_g128_asym_fp16")[0]
        found = decode_awq(read_safetensors(tmp_path / "res.safetensors"), layer)
        np.testing.assert_array_equal(found.weights, law("w4a16_g128_asym_fp16", layer))

    def test_the_entry_point(self, tmp_path: Path) -> None:
        program = shutil.which("ms_to_vllm", path=str(Path(sys.executable).parent))
        assert program is not None
        arguments = [str(argument) for argument in flags(CASES / "w4a16_pc_sym_bf16")]
        command = [program, *arguments, "--save_path", "res.safetensors", "--w_bit", "4", "--target_tool", "gptq"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        reference = next(run for run in RIGHT if title(run) == "w4a16_pc_sym_bf16-gptq-4")
        ours = read_safetensors(tmp_path / "res.safetensors")
        assert {name: stored(ours[name]) for name in reference["tensors"]} == reference["tensors"]
        again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert again.returncode == 1
        assert again.stderr.startswith("ms_to_vllm: ")
        assert again.stderr.count("\n") == 1

    @pytest.mark.parametrize("missing", ["--model", "--json"])
    def test_the_files_must_be_named(self, missing: str) -> None:
        arguments = flags(CASES / "w4a16_pc_sym_bf16")
        at = arguments.index(missing)
        assert invoke(*arguments[:at], *arguments[at + 2 :]).exit_code == 2

    @pytest.mark.parametrize("options", [("--w_bit", "3"), ("--w_bit", "x"), ("--target_tool", "dense"), ("--target_tool", "vllm")])
    def test_what_makes_no_sense_is_a_usage_error(self, tmp_path: Path, options: tuple[str, str]) -> None:
        save_path = tmp_path / "out"
        result = invoke(*flags(CASES / "w4a16_pc_sym_bf16"), "--save_path", save_path, *options)
        assert result.exit_code == 2
        assert options[0] in result.stderr or options[1] in result.stderr
        assert not save_path.exists()

    def test_refusals_exit_with_3_and_damage_with_5(self, tmp_path: Path) -> None:
        save_path = tmp_path / "out"
        result = invoke(*flags(CASES / "w8a16_g128_sym_bf16"), "--save_path", save_path)
        assert result.exit_code == 3
        assert "[bits]" in result.stderr
        weights, description = files_of(CASES / "w4a16_pc_sym_bf16")
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(weights.read_bytes()[:-1])
        result = invoke("--model", cut, "--json", description, "--save_path", save_path)
        assert result.exit_code == 5
        assert "truncated" in result.stderr
        result = invoke("--model", weights, "--json", tmp_path / "no.json", "--save_path", save_path)
        assert result.exit_code == 5
        assert not save_path.exists()


def one_sentence(result: Any) -> str:
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("ms_to_vllm: ")
    return str(result.stderr)


class TestWhereItWrites:
    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        arguments = flags(CASES / "w4a16_pc_sym_bf16")
        sentence = one_sentence(invoke(*arguments, "--save_path", tmp_path / "no" / "res.safetensors"))
        assert "no such folder" in sentence
        assert list(tmp_path.iterdir()) == []

    def test_a_file_that_is_there(self, tmp_path: Path) -> None:
        target = tmp_path / "res.safetensors"
        target.write_bytes(b"precious")
        assert "exists" in one_sentence(invoke(*flags(CASES / "w4a16_pc_sym_bf16"), "--save_path", target))
        assert target.read_bytes() == b"precious"
        assert [path.name for path in tmp_path.iterdir()] == ["res.safetensors"]

    def test_overwrite_replaces_a_file_and_no_folder(self, tmp_path: Path) -> None:
        target, folder = tmp_path / "res.safetensors", tmp_path / "folder"
        target.write_bytes(b"old")
        folder.mkdir()
        arguments = [*flags(CASES / "w4a16_pc_sym_bf16"), "--overwrite", "--save_path"]
        assert invoke(*arguments, target).exit_code == 0
        assert "lm_head.weight" in read_safetensors(target)
        assert "is a folder" in one_sentence(invoke(*arguments, folder))
        assert list(folder.iterdir()) == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "res.safetensors"]

    def test_a_folder(self, tmp_path: Path) -> None:
        one_sentence(invoke(*flags(CASES / "w4a16_pc_sym_bf16"), "--save_path", tmp_path))
        assert list(tmp_path.iterdir()) == []

    def test_a_refusal_leaves_an_old_file_alone(self, tmp_path: Path) -> None:
        target = tmp_path / "res.safetensors"
        target.write_bytes(b"precious")
        weights, description = files_of(CASES / "w8a16_g128_sym_bf16")
        with pytest.raises(RefusedError):
            ms_to_vllm(weights, description, target, overwrite=True)
        assert target.read_bytes() == b"precious"

    def test_an_output_dir_that_is_there(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        arguments = flags(CASES / "w4a16_pc_sym_bf16")
        assert "exists" in one_sentence(invoke(*arguments, "--output_dir", tmp_path / "folder"))
        assert list((tmp_path / "folder").iterdir()) == []

    @pytest.mark.parametrize("mode", ["save_path", "output_dir"])
    def test_sources_are_read_only_and_stay_as_they_are(self, tmp_path: Path, mode: str) -> None:
        weights, description = made(one(), tmp_path)
        description.chmod(0o400)
        assert stat.S_IMODE(weights.stat().st_mode) == 0o400
        before = [(path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns) for path in (weights, description)]
        ms_to_vllm(weights, description, **{mode: tmp_path / "out"})
        after = [(path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns) for path in (weights, description)]
        assert after == before
        written = tmp_path / "out" if mode == "save_path" else tmp_path / "out" / "model.safetensors"
        assert stat.S_IMODE(written.stat().st_mode) & 0o600 == 0o600

    @pytest.mark.parametrize("which", ["weights", "description"])
    def test_the_source_is_never_overwritten(self, tmp_path: Path, which: str) -> None:
        weights, description = made(one(), tmp_path)
        target = weights if which == "weights" else description
        before = target.read_bytes()
        with pytest.raises((DestinationError, UsageError)):
            ms_to_vllm(weights, description, target, overwrite=True)
        assert target.read_bytes() == before

    def test_a_name_that_no_file_can_have(self, tmp_path: Path) -> None:
        sentence = one_sentence(invoke(*flags(CASES / "w4a16_pc_sym_bf16"), "--save_path", tmp_path / ("n" * 300)))
        assert "nnn" in sentence
        assert list(tmp_path.iterdir()) == []

    def test_one_shard_is_not_taken_for_the_whole(self, tmp_path: Path) -> None:
        weights, description = made(one().linear(DOWN), tmp_path)
        part = weights.with_name("quant_model_weight_w4a16-00001-of-00002.safetensors")
        whole = read_safetensors(weights)
        write_safetensors(part, {name: array for name, array in whole.items() if name.startswith(O_PROJ)})
        with pytest.raises(UnreadableError, match="down_proj"):
            ms_to_vllm(part, description, tmp_path / "out")
        assert not (tmp_path / "out").exists()
