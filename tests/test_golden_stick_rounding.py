"""Golden Stick's rounding without torch: the folders that the recipes make of its float models hold what the tool itself wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import FIXTURES, read_tensors, write_tensors
from typer.testing import CliRunner

from convert.cli import app
from formats import open_checkpoint
from formats.errors import RefusedError, UnreadableError, UsageError
from formats.ir import read
from formats.mindspore_file import MindSporeFile
from quantize.golden_stick_config import GoldenStick, Policy, names_of_linear
from quantize.recipe import load, loads
from quantize.rounded_tiles import Rounding
from quantize.streamed import Rounded, is_streamed, quantize_streamed

GOLDEN = FIXTURES / "golden_stick"
CASES = {
    "gs-rtn-a16w8": ("rtn_a16w8_gs060", "gs0.6"),
    "golden_stick: {approach: ptq}": ("ptq_a16w8_gs120", "gs1.2"),
    "golden_stick: {approach: ptq, w_bit: 4, group_size: 64}": ("ptq_a16w4_pg_gs120", "gs1.2"),
}
"""Recipe -> the tool's file, and the version that it is spelled as."""
FOLDERS = {
    "gs-rtn-a16w8": "a16w8_ascend",
    "golden_stick: {approach: ptq, w_bit: 4, group_size: 64}": "a16w4_pg_ascend",
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(params=["numpy", "numba"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WEIGHBRIDGE_KERNELS", request.param)
    return str(request.param)


def recipe_of(text: str):
    return load(text) if text.startswith("gs-") else loads(text)


def float_folder(folder: Path) -> Path:
    """A folder with the float model that the tool quantized, beside its config."""
    folder.mkdir()
    shutil.copy(GOLDEN / "llama_tiny_fp16_plain.ckpt", folder)
    shutil.copy(GOLDEN / "config.json", folder)
    return folder


def stored(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    file = MindSporeFile(path)
    return {name: (info.dtype, np.asarray(read(file.tensor(name)))) for name, info in file.tensors.items()}


@pytest.mark.parametrize("text", CASES)
def test_the_tool_wrote_the_same_checkpoint(text: str, engine: str, tmp_path: Path) -> None:
    golden, version = CASES[text]
    result = quantize_streamed(float_folder(tmp_path / "float"), tmp_path / "out", recipe_of(text), f"mindspore:{version}")
    assert result.written.exact
    (weights,) = (tmp_path / "out").glob("rank_0/*.ckpt")
    ours, theirs = stored(weights), stored(GOLDEN / f"{golden}.ckpt")
    assert ours.keys() == theirs.keys()
    for name, (dtype, array) in theirs.items():
        assert ours[name][0] == dtype, name
        np.testing.assert_array_equal(ours[name][1].view(np.uint8), array.view(np.uint8), name)


@pytest.mark.parametrize("text", FOLDERS)
def test_version_1_4_wrote_the_same_folder(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "float"
    folder.mkdir()
    shutil.copy(GOLDEN / "toy_fp16.safetensors", folder / "model.safetensors")
    shutil.copy(GOLDEN / FOLDERS[text] / "config.json", folder)
    quantize_streamed(folder, tmp_path / "out", recipe_of(text), "mindspore:hf")
    (ours,) = (tmp_path / "out").glob("*.safetensors")
    (theirs,) = (GOLDEN / FOLDERS[text]).glob("*.safetensors")
    made, wanted = read_tensors(ours), read_tensors(theirs)
    parts = [name for name in wanted if name.split(".")[-2] in LINEARS]
    assert len(parts) == 14 * 3
    for name in parts:
        assert made[name].dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(made[name].view(np.uint8), wanted[name].view(np.uint8), name)


def plainly(weight: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Golden Stick's rule, written down: codes, and scales [out, groups] of the weight's dtype."""
    rows = weight.reshape(weight.shape[0], -1, group)
    largest = np.abs(rows.astype(np.float64)).max(-1)
    scale = ((largest - -largest) / (2**bits - 1)).astype(np.float32).astype(weight.dtype)  # as MindSpore casts
    quotient = (rows.astype(np.float32) / scale.astype(np.float32)[:, :, None]).astype(weight.dtype).astype(np.float32)
    codes = np.clip(np.rint(quotient), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.reshape(weight.shape).astype(np.int8), scale


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16], ids=["float16", "float32", "bfloat16"])
@pytest.mark.parametrize(("bits", "group"), [(8, -1), (4, -1), (4, 64), (8, 128)])
def test_other_dtypes_go_by_the_rule(bits: int, group: int, dtype: type, engine: str, tmp_path: Path) -> None:
    weight = (np.random.default_rng(bits + group).standard_normal((96, 256)) * 0.2).astype(dtype)
    rounded = layer_of(weight, Rounding(bits, group, golden_stick=True), tmp_path)
    codes, scale = plainly(weight, bits, weight.shape[1] if group == -1 else group)
    assert codes.min() == -(2 ** (bits - 1))  # all codes are used
    np.testing.assert_array_equal(read(rounded.codes), codes)
    np.testing.assert_array_equal(read(rounded.scales).view(np.uint8), scale.view(np.uint8))


def test_scales_beside_inputs_measured_at_run_time_are_float32(tmp_path: Path) -> None:
    weight = (np.random.default_rng(3).standard_normal((64, 128)) * 0.2).astype(np.float16)
    rounded = layer_of(weight, Rounding(8, dynamic=True, golden_stick=True), tmp_path)
    codes, _ = plainly(weight, 8, 128)  # by the float16 scale
    np.testing.assert_array_equal(read(rounded.codes), codes)
    wanted = (np.abs(weight.astype(np.float64)).max(1, keepdims=True) * 2 / 255).astype(np.float32)
    np.testing.assert_array_equal(read(rounded.scales), wanted)


def test_a_row_of_zeros_has_codes_of_zero_and_a_scale(tmp_path: Path) -> None:
    weight = np.ones((64, 128), np.float16)
    weight[5], weight[6] = 0, np.float16(6e-8)  # the second is a subnormal number, whose scale float16 cannot hold
    rounded = layer_of(weight, Rounding(8, golden_stick=True), tmp_path)
    assert read(rounded.scales)[5] == 1
    assert not read(rounded.codes)[5].any()
    assert read(rounded.scales)[6] > 0
    weight[7, 3] = np.inf
    with pytest.raises(UnreadableError, match="weight has NaN or infinite values"):
        read(layer_of(weight, Rounding(8, golden_stick=True), tmp_path / "more").codes)


def layer_of(weight: np.ndarray, rounding: Rounding, place: Path):
    folder = place / "one"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    write_tensors(folder / "model.safetensors", {"model.layers.0.mlp.up_proj.weight": weight})
    return Rounded(open_checkpoint(folder), lambda name: rounding).layer("model.layers.0.mlp.up_proj")


# -- settings


def test_what_stays_in_float_goes_by_either_name(tmp_path: Path) -> None:
    names = names_of_linear("model.layers.3.mlp.down_proj", "llama")
    assert names == ("model.layers.3.mlp.down_proj", "model.layers.3.feed_forward.w2")
    assert names_of_linear("model.layers.3.self_attn.q_proj", "qwen2")[1:] == (
        "model.layers.3.attention.wq",
        "model.layers.3.attention.w_qkv",
    )
    for part in ("w2", "down_proj", "feed_forward"):
        assert GoldenStick(modules_to_not_convert=[part]).policy_of(names) is None
    assert GoldenStick(modules_to_not_convert=["w1"]).policy_of(names) == Policy()


def test_a_policy_matches_the_beginning_and_says_what_differs() -> None:
    settings = GoldenStick(
        w_bit=4,
        group_size=128,
        modules_to_not_convert=["w2"],
        layer_policies={r".*feed_forward\.w2": {"w_bit": 8, "group_size": -1}, r".*attention\.wq": None},
    )
    assert settings.policy_of(("model.layers.0.feed_forward.w2",)) == Policy(w_bit=8)  # a policy is before modules_to_not_convert
    assert settings.policy_of(("model.layers.0.attention.wq",)) is None
    assert settings.policy_of(("model.layers.0.attention.wk",)) == Policy(w_bit=4, group_size=128)
    assert GoldenStick(layer_policies={"attention": None}).policy_of(("model.layers.0.attention.wq",)) is not None
    two = GoldenStick(layer_policies={".*wq": None, ".*attention": {"w_bit": 4}})
    with pytest.raises(UsageError, match=r"'\.\*wq' and '\.\*attention' both match model\.layers\.0\.attention\.wq"):
        two.policy_of(("model.layers.0.attention.wq",))


def test_policies_are_rounded_each_by_its_own(tmp_path: Path) -> None:
    text = """
golden_stick:
  w_bit: 8
  layer_policies:
    '.*feed_forward\\.w[13]': {w_bit: 4, group_size: 64}
    '.*attention': null
"""
    quantize_streamed(float_folder(tmp_path / "float"), tmp_path / "out", loads(text), "compressed-tensors")
    out = open_checkpoint(tmp_path / "out")
    found = {name.rpartition(".")[2]: out.layer(name).scheme.weights.bits for name in out.layer_names}
    assert found == {"gate_proj": 4, "up_proj": 4, "down_proj": 8}


REFUSALS = {
    "{approach: rtm}": "approach: 'rtm' is not one of rtn, smooth_quant, ptq",
    "{w_bit: 3}": "w_bit: 3 is not one of 4, 8, 16",
    "{w_bit: 16}": "nothing would be quantized",
    "{a_bit: 8, w_bit: 16}": "does not quantize inputs alone",
    "{a_bit: 8, w_bit: 4}": r"4-bit weights with quantized inputs \(A8W4\)",
    "{is_dynamic: true}": "is_dynamic: is of quantized inputs; set a_bit to 8",
    "{a_bit: 8, group_size: 64}": "one scale per channel",
    "{a_bit: 8, w_sym: false}": "with quantized inputs weights are symmetric",
    "{a_bit: 8, outliers_suppression: awq}": "are for weights alone",
    "{group_size: 32}": "group_size: 32 is not one of -1, 64, 128",
    "{outliers_suppression: outlier-suppression+}": r"'outlier-suppression\+' is not done here",
    "{outliers_suppression: outlier-suppression-lite}": "'outlier-suppression-lite' is not done here",
    "{precision_recovery: gptq, algorithm_args: {desc_act: true}}": "desc_act leaves Golden Stick's codes in the order",
    "{w_bit: 4, group_size: 64, precision_recovery: gptq, algorithm_args: {static_groups: true}}": "set block_size to 64",
    "{algorithm_args: {alpha: 0.5}}": "there is no argument 'alpha' here",
    "{outliers_suppression: smooth, algorithm_args: {alpha: 1.5}}": "alpha: 1.5 is not between 0 and 1",
    "{kv_bit: 8, w_bit: 4}": "does not quantize the KV cache beside 4-bit weights",
    "{approach: rtn, a_bit: 8}": "a_bit: 8 is not what rtn does",
    "{approach: rtn, kv_bit: 8}": "RTN quantizes weights or the KV cache, not both",
    "{approach: rtn, modules_to_not_convert: []}": "lm_head stays in float here",
    "{approach: smooth_quant}": "a_bit: 16 is not what smooth_quant does; set it to 8",
    "{layer_policies: {'(': null}}": "'\\(' is no regular expression",
    "{layer_policies: {x: {kv_bit: 8}}}": "has the key 'kv_bit'; those of a policy are w_bit",
    "{layer_policies: {x: {a_bit: 8, w_bit: 4}}}": "layer_policies: 'x': a_bit: 4-bit weights",
}


@pytest.mark.parametrize("text", REFUSALS)
def test_settings_that_cannot_be_are_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match=REFUSALS[text]):
        loads(f"golden_stick: {text}")


def test_a_recipe_is_of_one_kind() -> None:
    with pytest.raises(UsageError, match=r"line 2: quant: does not go with golden_stick"):
        loads("golden_stick: {}\nquant: {w_bit: 8}\n")
    with pytest.raises(UsageError, match="is Golden Stick's, which `weighbridge quantize` and quant_ckpt alone carry out"):
        load("gs-rtn-a16w8").quant_config()


def test_what_is_streamed() -> None:
    assert [is_streamed(load(name)) for name in ("gs-rtn-a16w8", "gs-ptq-a16w4", "gs-smooth-a8w8")] == [True, True, False]
    assert not is_streamed(loads("golden_stick: {w_sym: false}"))
    assert is_streamed(loads("golden_stick: {a_bit: 8, is_dynamic: true}"))


def test_the_command_says_that_data_are_not_read(tmp_path: Path) -> None:
    folder = float_folder(tmp_path / "float")
    arguments = [
        "quantize",
        str(folder),
        str(tmp_path / "out"),
        "--recipe",
        "gs-rtn-a16w8",
        "--to",
        "gptq",
        "--calib",
        "dev.jsonl",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["quantize_notes"] == ["recipe gs-rtn-a16w8 rounds weights alone: the calibration data were not read"]
    assert len(said["layers"]) == 14
    assert said["float_linears"] == ["lm_head"]


def test_groups_of_8_bit_codes_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        RefusedError, match=r"proj: needs groups of 8-bit codes; mindspore:gs1\.2 has one scale per channel there; .*group-size"
    ):
        quantize_streamed(float_folder(tmp_path / "float"), tmp_path / "out", loads("golden_stick: {group_size: 64}"), "mindspore")
    assert not (tmp_path / "out").exists()
