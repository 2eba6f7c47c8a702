"""GPTQ's dialects: the three readings of v1's largest zero point, Marlin, ``dynamic``, pack_dtype, made-up biases."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BFLOAT16, FIXTURES, Array, Tensors, change_json, change_tensors, read_folder, read_tensors, weight_file

from convert import convert
from convert.options import Settings
from convert.planning import Planner, plan
from convert.targets import find_target
from convert.verification import fingerprint, verify
from formats import open_checkpoint
from formats.checkpoint import Location, ZerosReading
from formats.errors import RefusedError, UnreadableError, UsageError
from formats.gptq import CarriedZeros, Gptq, has_full_lanes, zeros_layout
from formats.gptq_config import ModuleRules, has_bias, usual_reading
from formats.ir import dequantize, read
from formats.layouts import PackedMatrix

GPTQ = FIXTURES / "awq_gptq"
ASYMMETRIC, SYMMETRIC, DYNAMIC = GPTQ / "gptq_v1_4b_g128_asym", GPTQ / "gptq_v1_4b_g128_sym", GPTQ / "gptqmodel_dynamic"
POISONED = "model.layers.1.mlp.gate_proj"
LAYER = "model.layers.0.self_attn.q_proj"


def copy(case: Path, folder: Path) -> Path:
    shutil.copytree(case, folder)
    return folder


def change_config(folder: Path, **keys: Any) -> Path:
    """The keys changed in both configs; None removes one."""

    def edit(config: dict[str, Any]) -> None:
        config.update(keys)
        for key in [key for key, value in keys.items() if value is None]:
            del config[key]

    change_json(folder / "quantize_config.json", edit)
    change_json(folder / "config.json", lambda config: edit(config["quantization_config"]))
    return folder


def opened(folder: Path, zeros: ZerosReading | None = None) -> Gptq:
    checkpoint = open_checkpoint(Location.of(folder, zeros=zeros))
    assert isinstance(checkpoint, Gptq)
    return checkpoint


def unsigned_zeros(checkpoint: Gptq, name: str) -> Array:
    """[out, groups], 0 to 2**bits."""
    layer = checkpoint.layer(name)
    assert layer.zero_points is not None
    return read(layer.zero_points).astype(int) + (1 << (layer.scheme.weights.bits - 1))


# --- the largest zero point of v1 -------------------------------------------------------------------------------------


def test_poisoned_golden_is_read_in_three_ways() -> None:
    """AutoGPTQ smeared a zero point of 0 in output 212 over its word, ffff5495 becoming ffffffff from there on."""
    masked, plain, carried = (unsigned_zeros(opened(ASYMMETRIC, reading), POISONED) for reading in ("mask", "plain", "carry"))
    top = masked == 0
    assert [tuple(place) for place in np.argwhere(top)] == [(row, 1) for row in (212, 213, 214, 215)]
    np.testing.assert_array_equal(plain, np.where(top, 16, masked))
    # The word is ffff5495, its lowest lane output 208: f + 1 is 0 and carries, so every f after it becomes f + 1 + 1 = 1.
    assert masked[208:216, 1].tolist() == [6, 10, 5, 6, 0, 0, 0, 0]
    assert carried[208:216, 1].tolist() == [6, 10, 5, 6, 0, 1, 1, 1]
    np.testing.assert_array_equal(carried[:212], masked[:212])


def test_words_carry() -> None:
    """Lanes f 0 5: with a mask 0 1 6; the carry out of f makes 0 2 6. A carry out of the highest lane is lost."""
    stored = np.array([[0x7777750F]], dtype=np.int32)
    masked = PackedMatrix(zeros_layout(4, "v1"), stored, "<i2").read()[:, 0] + 8
    carried = CarriedZeros(4, stored).read()[:, 0] + 8
    assert masked.tolist() == [0, 1, 6, 8, 8, 8, 8, 8]
    assert carried.tolist() == [0, 2, 6, 8, 8, 8, 8, 8]
    assert CarriedZeros(4, np.full((1, 1), -1, dtype=np.int32)).read()[:, 0].tolist() == [-8, -7, -7, -7, -7, -7, -7, -7]


@pytest.mark.parametrize("packer", ["gptqmodel_pack_block", "gptqmodel_pack_original"])
def test_gptqmodels_own_v1_is_its_v2_when_read_with_carry(packer: str) -> None:
    """Where a zero point is 0, its subtraction borrowed from the next lane; only a carry gives that back."""
    stored = read_tensors(GPTQ / "edge_linear_256x64_g128" / f"{packer}.safetensors")
    wanted = read_tensors(GPTQ / "edge_linear_256x64_g128" / "reference.safetensors")["zeros"]
    assert (wanted == 0).any()
    np.testing.assert_array_equal(CarriedZeros(4, stored["qzeros_v1"]).read() + 8, wanted)
    masked = PackedMatrix(zeros_layout(4, "v1"), stored["qzeros_v1"], "<i2").read() + 8
    assert (masked != wanted).any()


@pytest.mark.parametrize(("bits", "ones"), [(2, 0x55555555), (4, 0x11111111), (8, 0x01010101)])
def test_carried_zeros_undo_a_whole_words_subtraction(bits: int, ones: int) -> None:
    """What GPTQModel does to write v1, for any zero points, in rectangles too."""
    rng = np.random.default_rng(bits)
    zeros = rng.integers(-(1 << bits - 1), 1 << bits - 1, (64, 6)).astype(np.int16)
    v2 = zeros_layout(bits, "v2").pack(zeros)
    v1 = (v2.view(np.uint32) - np.uint32(ones)).view(np.int32)
    carried = CarriedZeros(bits, v1)
    assert (carried.shape, carried.dtype) == ((64, 6), np.int16)
    np.testing.assert_array_equal(carried.read(), zeros)
    np.testing.assert_array_equal(carried.read(slice(32, 64), slice(1, 3)), zeros[32:64, 1:3])


@pytest.mark.parametrize(
    ("config", "bits", "reading"),
    [
        ({}, 4, "mask"),
        ({}, 2, "mask"),
        ({}, 3, "plain"),
        ({"meta": {"quantizer": ["gptqmodel:7.6.0"]}}, 4, "carry"),
        ({"meta": {"quantizer": "gptqmodel:1.4.0"}}, 8, "carry"),
        ({"meta": {"quantizer": ["gptqmodel:7.6.0"]}}, 3, "mask"),
        ({"meta": {"quantizer": ["optimum:1.24"]}}, 4, "mask"),
        ({"meta": None}, 4, "mask"),
    ],
)
def test_the_default_is_that_of_the_tool_that_wrote_the_file(config: dict[str, Any], bits: int, reading: str) -> None:
    assert usual_reading(config, bits) == reading


def test_a_file_that_gptqmodel_wrote_is_read_with_carry(tmp_path: Path) -> None:
    folder = change_config(copy(ASYMMETRIC, tmp_path / "model"), meta={"quantizer": ["gptqmodel:7.6.0"]})
    np.testing.assert_array_equal(unsigned_zeros(opened(folder), POISONED), unsigned_zeros(opened(ASYMMETRIC, "carry"), POISONED))
    np.testing.assert_array_equal(unsigned_zeros(opened(folder, "mask"), POISONED), unsigned_zeros(opened(ASYMMETRIC), POISONED))


def test_largest_zero_points_are_found_and_said() -> None:
    (finding,) = opened(ASYMMETRIC).data_findings()
    assert (finding.code, finding.where) == ("top-lane", POISONED)
    assert finding.what.startswith("4 zero points are stored as 15")
    assert finding.what.endswith("they are read as: mask")
    assert opened(ASYMMETRIC, "plain").data_findings()[0].what.endswith("they are read as: plain")


def test_a_plan_says_how_they_are_read() -> None:
    assert any("4 zero points are stored as 15" in note and "read as: mask" in note for note in plan(ASYMMETRIC, "awq").notes)
    assert not any("stored as" in note for note in plan(SYMMETRIC, "awq").notes)


def test_another_reading_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="wanted mask, plain, carry"):
        opened(ASYMMETRIC, "wrap")  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_full_lanes_are_found_wherever_they_are(bits: int) -> None:
    for lane in range(0, 32, bits):
        top = np.array([[((1 << bits) - 1) << lane & 0xFFFFFFFF]], dtype=np.uint32).view(np.int32)
        assert has_full_lanes(top, bits)
    across = np.array([[0x6DB6DB6D if bits == 3 else int("01" * 16, 2)]], dtype=np.uint32).view(np.int32)
    assert has_full_lanes(across << 1, bits) == (bits == 3)


@pytest.mark.parametrize("case", [SYMMETRIC, DYNAMIC, GPTQ / "gptqmodel_v2_3b_g128"], ids=lambda path: path.name)
def test_symmetric_files_hold_none_and_read_alike_in_every_way(case: Path) -> None:
    assert opened(case).data_findings() == []
    assert len({fingerprint_of(opened(case, reading)) for reading in (None, "mask", "plain", "carry")}) == 1


def fingerprint_of(checkpoint: Gptq) -> str:
    digest = hashlib.sha256()
    for name in checkpoint.layer_names:
        digest.update(dequantize(checkpoint.layer(name)).tobytes())
    return digest.hexdigest()


def test_a_zero_point_beyond_the_largest_code_is_refused_by_name() -> None:
    """Read plainly, 15 + 1 = 16: no 4-bit format can say it, dense can."""
    for target, refused in (("awq", True), ("gptq:v2", True), ("dense", False)):
        found = Planner(opened(ASYMMETRIC, "plain"), find_target(target), Settings(jobs=1)).plan(True)
        texts = [str(refusal) for refusal in found.refusals]
        assert bool(texts) == refused
        assert not refused or (POISONED in texts[0] and "a zero point of 16" in texts[0] and "ends at 15" in texts[0])


def test_masked_golden_goes_to_awq_and_back(tmp_path: Path) -> None:
    there = convert(ASYMMETRIC, tmp_path / "awq", "awq")
    back = convert(tmp_path / "awq", tmp_path / "gptq", "gptq")
    assert there.exact
    assert back.exact
    assert back.plan.target_name == "gptq:v2"
    assert back.target_fingerprint is not None
    assert back.target_fingerprint.digest == fingerprint(ASYMMETRIC).digest


# --- Marlin -----------------------------------------------------------------------------------------------------------


def test_autogptqs_marlin_is_read(tmp_path: Path) -> None:
    """The same tile as AutoAWQ's (both tools' permutations are in test_spelling_rows_marlin), under other names."""
    folder = copy(GPTQ / "awq_marlin_g128_nozp", tmp_path / "marlin")

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            for old, new in ((".qweight", ".B"), (".scales", ".s")):
                if name.endswith(old):
                    tensors[name.removesuffix(old) + new] = tensors.pop(name)

    change_tensors(folder / "model.safetensors", rename)
    said = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "is_marlin_format": True}
    change_json(folder / "config.json", lambda config: config.update(quantization_config=said))
    checkpoint = opened(folder)
    assert checkpoint.variant == "marlin"
    assert len(checkpoint.layer_names) == 14
    assert verify(GPTQ / "awq_marlin_g128_nozp", folder).same
    assert convert(folder, tmp_path / "out", "gptq").exact
    with pytest.raises(RefusedError, match="gptq:marlin can be read, but not written yet"):
        plan(folder, "gptq:marlin")
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(f"{LAYER}.s"))
    with pytest.raises(UnreadableError, match=f"{LAYER}: s is missing; GPTQ's Marlin layout has"):
        opened(folder).layer(LAYER)


# --- dynamic ----------------------------------------------------------------------------------------------------------


def test_dynamic_golden_has_the_bits_that_its_rules_say() -> None:
    checkpoint = opened(DYNAMIC)
    schemes = {name.rpartition(".")[2]: checkpoint.layer(name).scheme.weights for name in checkpoint.layer_names}
    assert "o_proj" not in schemes
    assert (schemes["down_proj"].bits, schemes["down_proj"].group_size) == (8, 64)
    assert {(args.bits, args.group_size) for leaf, args in schemes.items() if leaf != "down_proj"} == {(4, 128)}


def test_dynamic_that_contradicts_the_shapes_is_found(tmp_path: Path) -> None:
    folder = change_config(copy(DYNAMIC, tmp_path / "a"), dynamic={"-:.*\\.o_proj.*": {}, "+:.*\\.down_proj.*": {"bits": 4}})
    with pytest.raises(UnreadableError, match=r"down_proj: shapes say 8 bits and group_size 64, the config says 4 and 128"):
        opened(folder).layer("model.layers.0.mlp.down_proj")
    folder = change_config(copy(DYNAMIC, tmp_path / "b"), dynamic={"-:.*\\.up_proj": {}})
    with pytest.raises(UnreadableError, match=r"up_proj: is quantized, and dynamic in the config says that it is left in float"):
        opened(folder).layer("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("dynamic", [["x"], {"+:(": {"bits": 8}}, {"+:a": 8}])
def test_dynamic_that_is_no_rules_is_unreadable(dynamic: Any, tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="dynamic"):
        opened(change_config(copy(DYNAMIC, tmp_path / "model"), dynamic=dynamic))


def test_rules_match_in_gptqmodels_order() -> None:
    """Negative rules first, then the first that matches, from the beginning of the name; a rule for one whole name among them."""
    rules = ModuleRules(
        {
            r"^a\.b\.2$": {"bits": 2},
            r".*\.b\..*": {"bits": 3},
            r"+:^a\.b\.1$": {"bits": 8},
            r"a\.c": {"bits": 4},
            r"-:^a\.c\.9$": {},
            r"-:.*\.d$": {},
            r"^a.c$": {"bits": 5},
        }
    )
    assert rules.find("a.b.2") == {"bits": 2}
    assert rules.find("a.b.1") == {"bits": 3}
    assert rules.find("x.a.c") == {}
    assert rules.find("a.c.1") == {"bits": 4}
    assert rules.find("a.c.9") is None
    assert rules.find("a.b.d") is None
    assert rules.find("axc") == {"bits": 5}
    assert ModuleRules(None).find("a") == {}


# --- words, biases, scales --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack_dtype", ["int16", "int64"])
def test_other_words_are_refused_by_name(pack_dtype: str, tmp_path: Path) -> None:
    folder = change_config(copy(SYMMETRIC, tmp_path / "model"), pack_dtype=pack_dtype)
    found = plan(folder, "awq")
    assert len(found.refusals) == 14
    assert f"GPTQ pack_dtype {pack_dtype}" in str(found.refusals[0])


def test_int32_words_may_be_named(tmp_path: Path) -> None:
    assert verify(SYMMETRIC, change_config(copy(SYMMETRIC, tmp_path / "model"), pack_dtype="int32")).same


def test_biases_that_autogptq_made_up_are_left_out(tmp_path: Path) -> None:
    """Qwen2 has biases in q, k and v alone; the golden has 14 of them, in o, gate, up and down all zero."""
    stored = read_folder(SYMMETRIC)
    checkpoint = opened(SYMMETRIC)
    made_up = {f"{name}.bias" for name in checkpoint.layer_names if name.endswith(("o_proj", "gate_proj", "up_proj", "down_proj"))}
    assert made_up <= set(stored)
    assert {item.tensor for item in checkpoint.left_out} == made_up
    assert all("AutoGPTQ" in item.why and "qwen2" in item.why for item in checkpoint.left_out)
    assert {name for name in checkpoint.layer_names if checkpoint.layer(name).bias is not None} == {
        name for name in checkpoint.layer_names if name.endswith(("q_proj", "k_proj", "v_proj"))
    }
    convert(SYMMETRIC, tmp_path / "out", "dense")
    source = set(read_tensors(GPTQ / "src_qwen2" / "model.safetensors"))
    assert set(read_folder(tmp_path / "out")) == source


def test_a_bias_that_is_not_zero_is_the_models(tmp_path: Path) -> None:
    folder = copy(SYMMETRIC, tmp_path / "model")
    name = "model.layers.1.mlp.down_proj"

    def put(tensors: Tensors) -> None:
        tensors[f"{name}.bias"][3] = 0.5

    change_tensors(weight_file(folder), put)
    checkpoint = opened(folder)
    assert f"{name}.bias" not in {item.tensor for item in checkpoint.left_out}
    result = convert(folder, tmp_path / "out", "gptq")
    assert result.exact
    assert read_folder(tmp_path / "out")[f"{name}.bias"][3] == np.float16(0.5)
    again = opened(tmp_path / "out").layer(name).bias
    assert again is not None


@pytest.mark.parametrize(
    ("config", "name", "has"),
    [
        ({"model_type": "llama"}, "model.layers.0.self_attn.q_proj", False),
        ({"model_type": "llama", "attention_bias": True}, "model.layers.0.self_attn.o_proj", True),
        ({"model_type": "llama", "attention_bias": True}, "model.layers.0.mlp.up_proj", False),
        ({"model_type": "llama", "mlp_bias": True}, "model.layers.0.mlp.up_proj", True),
        ({"model_type": "qwen2"}, "model.layers.0.self_attn.k_proj", True),
        ({"model_type": "qwen2"}, "model.layers.0.self_attn.o_proj", False),
        ({"model_type": "mistral"}, "model.layers.0.mlp.gate_proj", False),
        ({"model_type": "some_model"}, "model.layers.0.mlp.gate_proj", True),
        ({}, "model.layers.0.mlp.gate_proj", True),
        ({"model_type": "llama"}, "lm_head", True),
    ],
)
def test_which_linears_have_biases(config: dict[str, Any], name: str, has: bool) -> None:
    assert has_bias(config, name) == has


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype("<f4")], ids=str)
def test_scales_of_every_float_dtype_are_read_as_they_are(dtype: np.dtype[Any], tmp_path: Path) -> None:
    folder = copy(SYMMETRIC, tmp_path / "model")

    def widen(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".scales")]:
            tensors[name] = tensors[name].astype(dtype)

    change_tensors(weight_file(folder), widen)
    layer = opened(folder).layer(LAYER)
    assert layer.scales.dtype == dtype
    wanted = read_folder(SYMMETRIC)[f"{LAYER}.scales"].astype(dtype).T
    np.testing.assert_array_equal(read(layer.scales), wanted)


def test_scales_of_integers_are_not(tmp_path: Path) -> None:
    folder = copy(SYMMETRIC, tmp_path / "model")
    change_tensors(weight_file(folder), lambda tensors: tensors.update({f"{LAYER}.scales": tensors[f"{LAYER}.scales"].astype(np.int32)}))
    with pytest.raises(UnreadableError, match=f"{LAYER}: scales is I32"):
        opened(folder).layer(LAYER)


def test_quantized_lm_head_is_a_layer(tmp_path: Path) -> None:
    """The golden's down_proj [256, 512] under the name of the head: GPTQ carries it, AWQ refuses it by name."""
    folder = change_config(copy(DYNAMIC, tmp_path / "model"), lm_head=True, dynamic=None)
    change_json(folder / "config.json", lambda config: config["quantization_config"].update(bits=8, group_size=64))

    def keep_one(tensors: Tensors) -> None:
        for name in list(tensors):
            if not name.startswith("model.layers.0.mlp.down_proj."):
                del tensors[name]
            else:
                tensors[name.replace("model.layers.0.mlp.down_proj", "lm_head")] = tensors.pop(name)

    change_tensors(weight_file(folder), keep_one)
    assert opened(folder).layer_names == ["lm_head"]
    assert convert(folder, tmp_path / "out", "gptq").exact
    written = json.loads((tmp_path / "out" / "quantize_config.json").read_text("utf-8"))
    assert written["lm_head"] is True
    assert any("lm_head" in str(refusal) for refusal in plan(folder, "awq").refusals if refusal.code == "lm-head")
