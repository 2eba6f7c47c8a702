"""``doctor``: every ailment is found where it was made, and none on files of the real tools; what is mended is what it should be.

Sick folders are healthy ones edited by hand: goldens of AutoAWQ, AutoGPTQ and GPTQModel, and folders that a conversion wrote.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    FIXTURES,
    change_tensors,
    decode_gptq,
    model,
    read_folder,
    read_raw,
    read_tensors,
    weight_file,
    write_msmodelslim,
    write_raw,
)

from convert import mending
from convert.ailments import Smears, find_smears
from convert.config_ailments import DynamicRules
from convert.engine import convert
from convert.mending import Diagnosis, doctor
from convert.stored import weight_files
from formats import Location, open_checkpoint
from formats.errors import DestinationError, RefusedError, UnreadableError, WeighbridgeError

GOLDENS = FIXTURES / "awq_gptq"
SYM, ASYM, V2 = "gptq_v1_4b_g128_sym", "gptq_v1_4b_g128_asym", "gptqmodel_v2_3b_g128"
SAYS: dict[str, tuple[list[str], int]] = {
    "awq_gemm_g128_zp": ([], 14),
    "awq_gemv_g128_zp": ([], 0),
    "awq_gemvfast_g128_zp": ([], 0),
    "awq_marlin_g128_nozp": ([], 0),
    "gptq_v1_2b_g64_asym": (["wrapped-zeros", "smeared-zeros"], 14),
    "gptq_v1_3b_g128_asym": (["wrapped-zeros", "smeared-zeros"], 14),
    "gptq_v1_4b_g128_asym": (["wrapped-zeros", "smeared-zeros"], 14),
    "gptq_v1_4b_g128_sym": ([], 14),
    "gptq_v1_4b_gm1_sym": ([], 14),
    "gptq_v1_8b_g128_sym": ([], 14),
    "gptqmodel_dynamic": ([], 12),
    "gptqmodel_v1_4b_g128_sym": ([], 14),
    "gptqmodel_v2_3b_g128": ([], 14),
}
"""What is said of each golden of AutoAWQ, AutoGPTQ and GPTQModel, and how many layers were looked at (GEMM's and GPTQ's)."""
LAYER = "model.layers.0.self_attn.q_proj"


def sick(tmp_path: Path, case: str) -> Path:
    """A copy of a golden that may be changed."""
    folder = tmp_path / "sick"
    shutil.copytree(GOLDENS / case, folder)
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def edit_both(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the quantization config in both files."""
    edit(folder / "config.json", lambda config: change(config["quantization_config"]))
    edit(folder / "quantize_config.json", change)


def codes(diagnosis: Diagnosis) -> list[str]:
    return [ailment.code for ailment in diagnosis.ailments]


def drop(*endings: str) -> Callable[[dict[str, Any]], object]:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith(endings)]:
            del tensors[name]

    return change


def quantization(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    return found


def assert_same_tensors(a: Path, b: Path) -> None:
    left, right = read_folder(a), read_folder(b)
    assert set(left) == set(right)
    for name, array in left.items():
        assert (array.dtype, array.shape, array.tobytes()) == (right[name].dtype, right[name].shape, right[name].tobytes()), name


def assert_readable(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.layer_names
    for name in checkpoint.layer_names:
        checkpoint.layer(name)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A healthy GPTQ folder of several shards that a conversion wrote."""
    source = write_msmodelslim(tmp_path / "source", model())
    convert(source, tmp_path / "sharded", to="gptq", max_shard_size=60_000)
    return tmp_path / "sharded"


# --- healthy folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SAYS)
def test_goldens_of_the_real_tools(case: str) -> None:
    """Three of AutoGPTQ's hold zero points that its packer destroyed; nothing else is wrong with any."""
    found = doctor(GOLDENS / case)
    assert (codes(found), found.examined) == SAYS[case]
    assert found.healthy is not bool(found.ailments)


def test_every_golden_is_listed() -> None:
    assert {path.parent.name for path in GOLDENS.glob("*/config.json")} <= {*SAYS, "src_qwen2"}


@pytest.mark.parametrize(
    "path", sorted((FIXTURES / "msmodelslim").glob("*/quant_model_weight*.safetensors")), ids=lambda path: path.parent.name
)
def test_msmodelslim_goldens_are_healthy(path: Path) -> None:
    """They lack ``format: pt``, which their readers do not ask for."""
    assert read_raw(path)[0].get("__metadata__", {}).get("format") is None
    assert doctor(path.parent).healthy


@pytest.mark.parametrize("target", ["awq", "gptq", "gptq:v2", "dense"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_a_conversion_wrote_is_healthy(tmp_path: Path, target: str, symmetric: bool) -> None:
    source = write_msmodelslim(tmp_path / "source", model(symmetric=symmetric))
    convert(source, tmp_path / "out", to=target)
    assert doctor(tmp_path / "out").ailments == []


def test_shards_are_healthy(sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert doctor(sharded).ailments == []


def test_a_healthy_folder_is_not_mended(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="nothing is wrong"):
        doctor(GOLDENS / SYM, fix=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- (a) one version's zero points under the other's name ---------------------------------------------------------------


@pytest.mark.parametrize("case", [SYM, "gptq_v1_8b_g128_sym", "gptq_v1_4b_gm1_sym"])
def test_v2_zeros_that_say_v1_are_certain_and_mended(tmp_path: Path, case: str) -> None:
    """Symmetric 4-bit v2 zeros are 0x88888888: read as v1 every zero point would be 9."""
    folder = sick(tmp_path, case)
    bits = quantization(folder)["bits"]
    word = np.array([0x88888888 if bits == 4 else 0x80808080], "<u4").view("<i4")[0]

    def to_v2(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("qzeros"):
                tensors[name][...] = word

    change_tensors(weight_file(folder), to_v2)
    found = doctor(folder, fix=tmp_path / "out")
    (ailment,) = (item for item in found.ailments if item.code == "wrong-version")
    assert (ailment.certainty, ailment.mendable) == ("certain", True)
    assert found.healthy
    assert_same_tensors(folder, tmp_path / "out")
    for config in (quantization(tmp_path / "out"), json.loads((tmp_path / "out" / "quantize_config.json").read_text("utf-8"))):
        assert config["checkpoint_format"] == "gptq_v2"
    healthy = decode_gptq(read_folder(GOLDENS / case), LAYER, bits).weights()
    mended = decode_gptq(read_folder(tmp_path / "out"), LAYER, bits, "v2").weights()
    assert np.array_equal(healthy, mended)


def test_v1_zeros_that_say_v2_are_certain_and_mended(tmp_path: Path) -> None:
    folder = sick(tmp_path, "gptqmodel_v1_4b_g128_sym")
    edit_both(folder, lambda config: config.update(checkpoint_format="gptq_v2", format="gptq_v2"))
    found = doctor(folder, fix=tmp_path / "out")
    assert codes(found) == ["wrong-version"]
    assert found.healthy
    config = quantization(tmp_path / "out")
    assert (config["checkpoint_format"], config["format"]) == ("gptq", "gptq")


def test_three_bits_that_say_v1_are_certain(tmp_path: Path) -> None:
    folder = sick(tmp_path, V2)
    edit_both(folder, lambda config: config.update(checkpoint_format="gptq", format="gptq"))
    assert [(item.code, item.certainty) for item in doctor(folder).ailments] == [("wrong-version", "certain")]


def test_asymmetric_v1_zeros_that_say_v2_are_likely_and_never_mended(tmp_path: Path) -> None:
    folder = sick(tmp_path, ASYM)
    edit_both(folder, lambda config: config.update(checkpoint_format="gptq_v2"))
    found = doctor(folder)
    assert [(item.code, item.certainty, item.mendable) for item in found.ailments] == [("wrong-version", "likely", False)]
    with pytest.raises(RefusedError, match="without loss"):
        doctor(folder, fix=tmp_path / "out")


def test_asymmetric_v2_zeros_that_say_v1_are_likely(tmp_path: Path) -> None:
    """The golden's zero points, stored as v2 would store them: one more in each lane (the smeared word apart, which is set to 8)."""
    folder = sick(tmp_path, ASYM)

    def to_v2(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("qzeros"):
                lanes = np.stack([tensors[name].view("<u4") >> np.uint32(4 * lane) & np.uint32(15) for lane in range(8)])
                lanes = np.where(lanes == 15, np.uint32(7), lanes) + np.uint32(1)
                tensors[name][...] = sum(lanes[lane] << np.uint32(4 * lane) for lane in range(8)).astype("<u4").view("<i4")

    change_tensors(weight_file(folder), to_v2)
    found = [item for item in doctor(folder).ailments if item.code == "wrong-version"]
    assert [(item.certainty, item.mendable) for item in found] == [("likely", False)]


# --- (b) zero points of 0 that v1 cannot say ----------------------------------------------------------------------------


def test_autogptq_smeared_zero_points_are_found() -> None:
    """AutoGPTQ wrote 0xffff5495 in the golden: row 212's zero point of 0, stored as -1, ran over rows 213 to 215."""
    zeros = read_tensors(weight_file(GOLDENS / ASYM))["model.layers.1.mlp.gate_proj.qzeros"]
    assert int(zeros[1, 26]) & 0xFFFFFFFF == 0xFFFF5495
    found = doctor(GOLDENS / ASYM)
    assert [(item.code, item.where, item.certainty, item.mendable) for item in found.ailments] == [
        ("wrapped-zeros", "model.layers.1.mlp.gate_proj", "certain", False),
        ("smeared-zeros", "model.layers.1.mlp.gate_proj", "certain", False),
    ]
    assert "4 zero points" in found.ailments[0].found
    assert "group 1, rows 213 to 215, by row 212" in found.ailments[1].found


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0xF7777777, ["wrapped-zeros"]),  # the top lane of the word: there is nothing above it to run over
        (0x7F777777, ["wrapped-zeros"]),  # the lane above is a zero point of its own: no smear
        (0xFF777777, ["wrapped-zeros", "smeared-zeros"]),
    ],
)
def test_a_top_lane_is_a_smear_only_with_all_lanes_above_it(tmp_path: Path, word: int, expected: list[str]) -> None:
    folder = sick(tmp_path, SYM)

    def wrap(tensors: dict[str, Any]) -> None:
        tensors[f"{LAYER}.qzeros"].view("<u4")[0, 3] = word

    change_tensors(weight_file(folder), wrap)
    edit_both(folder, lambda config: config.update(sym=False))
    found = [item for item in doctor(folder).ailments if item.code.endswith("-zeros")]
    assert [item.code for item in found] == expected
    assert [item.certainty for item in found][1:] in ([], ["likely"])  # one lane may be chance


def test_three_bit_smears_are_looked_for_within_each_word(tmp_path: Path) -> None:
    """Bits 15 to 31 of the first word set: 3-bit lanes 5 to 9 are top ones, four of them overwritten; lane 10 straddles."""
    folder = sick(tmp_path, V2)
    edit_both(folder, lambda config: config.update(checkpoint_format="gptq", format="gptq", sym=False, meta={}))

    def smear(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("qzeros"):  # lanes of 4 (100) become 3 (011), as v1 stores them
                bits = np.unpackbits(tensors[name].view("u1"), axis=1, bitorder="little").reshape(-1, 3)
                stored = np.packbits(1 - bits, bitorder="little").reshape(tensors[name].shape[0], -1)
                tensors[name][...] = stored.view("<i4")
        tensors[f"{LAYER}.qzeros"].view("<u4")[1, 0] |= np.uint32(0xFFFF8000)

    change_tensors(weight_file(folder), smear)
    wrapped, smeared = (item for item in doctor(folder).ailments if item.code.endswith("-zeros"))
    assert "5 zero points" in wrapped.found
    assert (smeared.where, smeared.certainty) == (LAYER, "certain")
    assert "4 other zero points" in smeared.found
    assert "group 1, rows 6 to 9, by row 5" in smeared.found


def test_a_word_that_a_smear_would_not_leave_makes_smears_likely_only(tmp_path: Path) -> None:
    folder = sick(tmp_path, SYM)

    def wrap(tensors: dict[str, Any]) -> None:
        tensors[f"{LAYER}.qzeros"].view("<u4")[0, 3:5] = 0xFFFF7777, 0x7F777777

    change_tensors(weight_file(folder), wrap)
    edit_both(folder, lambda config: config.update(sym=False))
    found = {item.code: item for item in doctor(folder).ailments}
    assert found["smeared-zeros"].certainty == "likely"
    assert "rows 29 to 31, by row 28" in found["smeared-zeros"].found


@pytest.mark.parametrize(
    ("bits", "rows", "expected"),
    [
        (3, range(11, 21), Smears(9, (0, 11, 20), 0)),  # the second word of three
        (3, range(20, 23), Smears(0, None, 1)),  # its last lane, a straddling one, and the first of the third word, not followed
        (3, range(30, 32), Smears(1, (0, 30, 31), 0)),
        (3, range(10, 11), Smears(0, None, 0)),
        (2, range(40, 48), Smears(7, (0, 40, 47), 0)),
        (8, range(4, 8), Smears(3, (0, 4, 7), 0)),
    ],
)
def test_smears_by_lane(bits: int, rows: range, expected: Smears) -> None:
    top = np.zeros((96, 1), dtype=bool)
    top[list(rows)] = True
    assert find_smears(top, bits) == expected


# --- (c) an index that lies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda index: index["metadata"].update(total_size=1), "index-size"),
        (lambda index: index.pop("metadata"), "index-size"),
        (lambda index: index["weight_map"].pop(f"{LAYER}.qweight"), "index-lies"),
        (lambda index: index["weight_map"].update({f"{LAYER}.weight": index["weight_map"][f"{LAYER}.qweight"]}), "index-lies"),
        (lambda index: index["weight_map"].update({f"{LAYER}.qweight": index["weight_map"]["model.norm.weight"]}), "index-lies"),
        (lambda index: index.pop("weight_map"), "index-lies"),
    ],
    ids=["size", "no-size", "left-out", "not-there", "wrong-file", "no-map"],
)
def test_an_index_that_lies_is_made_anew(tmp_path: Path, sharded: Path, change: Callable[[dict[str, Any]], object], code: str) -> None:
    index = sharded / "model.safetensors.index.json"
    was = json.loads(index.read_text("utf-8"))
    edit(index, change)
    found = doctor(sharded, fix=tmp_path / "out")
    assert codes(found) == [code]
    assert found.healthy
    assert json.loads((tmp_path / "out" / index.name).read_text("utf-8")) == was
    assert_same_tensors(sharded, tmp_path / "out")
    assert_readable(tmp_path / "out")


def test_shards_without_an_index_get_one(tmp_path: Path, sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    was = json.loads(index.read_text("utf-8"))
    index.unlink()
    assert codes(doctor(sharded, fix=tmp_path / "out")) == ["index-missing"]
    assert json.loads((tmp_path / "out" / index.name).read_text("utf-8")) == was


def test_an_index_copied_from_the_float_model_is_left_out(tmp_path: Path) -> None:
    folder = sick(tmp_path, "awq_gemm_g128_zp")
    weight_map = {"model.norm.weight": "model-00001-of-00002.safetensors", f"{LAYER}.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 5}, "weight_map": weight_map}), "utf-8")
    found = doctor(folder, fix=tmp_path / "out")
    assert set(codes(found)) == {"index-lies", "index-size"}
    assert found.healthy
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert_readable(tmp_path / "out")


def test_other_weight_files_beside_the_models_are_not_mixed_in(sharded: Path) -> None:
    """The shards that an index names are the model, whatever else lies there."""
    shutil.copyfile(weight_file(GOLDENS / "awq_gemm_g128_zp"), sharded / "model.safetensors")
    other = sorted(sharded.glob("model-*.safetensors"))[0]
    shutil.copyfile(other, sharded / "model.old-00001-of-00002.safetensors")
    names = weight_files(Location.of(sharded))
    assert names == sorted(path.name for path in sharded.glob("model-*.safetensors"))
    assert doctor(sharded).ailments == []


def test_a_missing_shard_is_said_and_not_mended(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    found = [item for item in doctor(sharded).ailments if item.code == "shard-missing"]
    assert [(item.where, item.mendable) for item in found] == [(gone.name, False)]


# --- (d) config keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["quant_method", "bits", "group_size", "desc_act", "sym"])
def test_a_missing_gptq_key_is_derived(tmp_path: Path, key: str) -> None:
    folder = sick(tmp_path, SYM)
    wanted = quantization(folder)[key]
    edit_both(folder, lambda config: config.pop(key))
    found = doctor(folder, fix=tmp_path / "out")
    assert codes(found) == ["key-missing"]
    assert found.healthy
    assert quantization(tmp_path / "out") == quantization(GOLDENS / SYM)
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text("utf-8"))[key] == wanted
    assert_same_tensors(folder, tmp_path / "out")


@pytest.mark.parametrize("key", ["quant_method", "bits", "group_size", "zero_point", "version"])
def test_a_missing_awq_key_is_derived(tmp_path: Path, key: str) -> None:
    folder = sick(tmp_path, "awq_gemm_g128_zp")
    edit(folder / "config.json", lambda config: config["quantization_config"].pop(key))
    found = doctor(folder, fix=tmp_path / "out")
    assert codes(found) == ["key-missing"]
    assert found.healthy
    assert quantization(tmp_path / "out") == quantization(GOLDENS / "awq_gemm_g128_zp")
    assert_readable(tmp_path / "out")


@pytest.mark.parametrize(
    ("case", "key", "lie"),
    [
        (SYM, "bits", 8),
        (SYM, "group_size", 64),
        (SYM, "group_size", -1),
        (SYM, "sym", False),
        (SYM, "quant_method", "awq"),
        (ASYM, "sym", True),
        ("gptq_v1_4b_gm1_sym", "group_size", 128),
        (V2, "bits", 4),
    ],
)
def test_a_key_that_contradicts_the_tensors_is_corrected(tmp_path: Path, case: str, key: str, lie: object) -> None:
    folder = sick(tmp_path, case)
    edit_both(folder, lambda config: config.update({key: lie}))
    found = doctor(folder, fix=tmp_path / "out")
    (ailment,) = (item for item in found.ailments if item.code == "key-contradicts")
    assert repr(lie) in ailment.found
    assert quantization(tmp_path / "out") == quantization(GOLDENS / case)
    assert [item.mendable for item in found.remaining] == [False] * len(found.remaining)
    assert_readable(tmp_path / "out")


def test_desc_act_that_g_idx_contradicts_is_corrected(tmp_path: Path) -> None:
    folder = sick(tmp_path, SYM)
    change_tensors(weight_file(folder), lambda tensors: tensors[f"{LAYER}.g_idx"].sort() or tensors[f"{LAYER}.g_idx"][:2].__setitem__(0, 1))
    found = doctor(folder, fix=tmp_path / "out")
    assert codes(found) == ["key-contradicts"]
    assert quantization(tmp_path / "out")["desc_act"] is True


def test_a_config_of_one_file_is_written_into_the_other(tmp_path: Path) -> None:
    for name, code in (("quantize_config.json", "quantize-config-missing"), ("config.json", "config-missing")):
        folder = sick(tmp_path / name, SYM)
        if name == "config.json":
            edit(folder / name, lambda config: config.pop("quantization_config"))
        else:
            (folder / name).unlink()
        found = doctor(folder, fix=tmp_path / name / "out")
        assert codes(found) == [code]
        assert found.healthy
        golden = quantization(GOLDENS / SYM)
        assert quantization(tmp_path / name / "out") == golden
        assert json.loads((tmp_path / name / "out" / "quantize_config.json").read_text("utf-8")) == golden


def test_configs_that_differ_are_settled_by_the_tensors(tmp_path: Path) -> None:
    folder = sick(tmp_path, SYM)
    edit(folder / "quantize_config.json", lambda config: config.update(group_size=32))
    found = doctor(folder, fix=tmp_path / "out")
    assert codes(found) == ["configs-differ"]
    assert found.healthy
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text("utf-8"))["group_size"] == 128


@pytest.mark.parametrize(
    ("case", "entries", "mendable"),
    [
        (SYM, {"checkpoint_format": "gptq"}, None),  # what its absence says
        (SYM, {"lm_head": False, "dynamic": {}}, None),
        (SYM, {"checkpoint_format": "gptq_v2"}, True),  # the zero points are all v1's middle code
        (SYM, {"dynamic": {"-:.*o_proj": {}}}, False),
        (ASYM, {"checkpoint_format": "gptq_v2"}, False),
        ("gptqmodel_v1_4b_g128_sym", {"checkpoint_format": "gptq_v2"}, True),
    ],
)
def test_configs_that_differ_are_not_settled_by_a_guess(tmp_path: Path, case: str, entries: dict[str, Any], mendable: bool | None) -> None:
    folder = sick(tmp_path, case)
    edit(folder / "quantize_config.json", lambda config: config.update(entries))
    found = [item.mendable for item in doctor(folder).ailments if item.code == "configs-differ"]
    assert found == ([] if mendable is None else [mendable])


def test_what_cannot_be_derived_is_left_as_it_is_when_the_rest_is_mended(tmp_path: Path) -> None:
    folder = sick(tmp_path, SYM)
    edit(folder / "quantize_config.json", lambda config: config.update(bits=8, dynamic={"-:.*o_proj": {}}))
    found = doctor(folder, fix=tmp_path / "out")
    assert [(item.code, item.mendable) for item in found.ailments] == [("configs-differ", True), ("configs-differ", False)]
    mended = json.loads((tmp_path / "out" / "quantize_config.json").read_text("utf-8"))
    assert (mended["bits"], mended["dynamic"]) == (4, {"-:.*o_proj": {}})
    assert [item.mendable for item in found.remaining] == [False]


def test_an_old_awq_config_becomes_todays(tmp_path: Path) -> None:
    folder = sick(tmp_path, "awq_gemm_g128_zp")
    edit(folder / "config.json", lambda config: config.pop("quantization_config"))
    old = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(old), "utf-8")
    found = doctor(folder, fix=tmp_path / "out")
    assert "config-missing" in codes(found)
    assert found.healthy
    wanted = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "GEMM"}
    assert quantization(tmp_path / "out") == wanted
    assert_readable(tmp_path / "out")


# --- (e) and (f): metadata, missing tensors -----------------------------------------------------------------------------


def test_metadata_without_a_format_is_written_anew(tmp_path: Path) -> None:
    folder = sick(tmp_path, SYM)
    header, data = read_raw(weight_file(folder))
    header["__metadata__"].pop("format")
    write_raw(weight_file(folder), header, data)
    found = doctor(folder, fix=tmp_path / "out")
    assert codes(found) == ["metadata-format"]
    assert found.healthy
    mended, same = read_raw(weight_file(tmp_path / "out"))
    assert mended["__metadata__"] == read_raw(weight_file(GOLDENS / SYM))[0]["__metadata__"]
    assert same == data


@pytest.mark.parametrize("part", ["g_idx", "qzeros"])
def test_missing_tensors_that_the_config_implies_are_written(tmp_path: Path, part: str) -> None:
    folder = sick(tmp_path, SYM)
    change_tensors(weight_file(folder), drop(part))
    found = doctor(folder, fix=tmp_path / "out")
    assert f"no-{part}" in codes(found)
    assert found.healthy
    assert_same_tensors(GOLDENS / SYM, tmp_path / "out")


def test_missing_zero_points_of_v2_are_written_as_v2_has_them(tmp_path: Path) -> None:
    folder = sick(tmp_path, V2)
    change_tensors(weight_file(folder), drop("qzeros"))
    assert doctor(folder, fix=tmp_path / "out").healthy
    assert_same_tensors(GOLDENS / V2, tmp_path / "out")


def test_missing_tensors_that_cannot_be_known_are_not_invented(tmp_path: Path) -> None:
    folder = sick(tmp_path, ASYM)
    edit_both(folder, lambda config: config.update(desc_act=True))
    change_tensors(weight_file(folder), drop("g_idx", "qzeros"))
    found = [item for item in doctor(folder).ailments if item.code.startswith("no-")]
    assert [(item.code, item.mendable) for item in found] == [("no-g_idx", False), ("no-qzeros", False)]


def test_shapes_that_contradict_one_another_are_said(tmp_path: Path) -> None:
    folder = sick(tmp_path, SYM)

    def cut(tensors: dict[str, Any]) -> None:
        tensors[f"{LAYER}.qzeros"] = tensors[f"{LAYER}.qzeros"][:1].copy()

    change_tensors(weight_file(folder), cut)
    found = doctor(folder)
    assert [(item.code, item.where, item.mendable) for item in found.ailments] == [("shapes-contradict", LAYER, False)]


# --- the new folder -----------------------------------------------------------------------------------------------------


def test_several_ailments_are_mended_at_once_and_the_rest_of_the_folder_comes_along(tmp_path: Path) -> None:
    folder = sick(tmp_path, "gptqmodel_v1_4b_g128_sym")
    header, data = read_raw(weight_file(folder))
    header.pop("__metadata__")
    write_raw(weight_file(folder), header, data)
    edit_both(folder, lambda config: config.update(bits=8))
    (folder / "weighbridge.json").write_text("{}", "utf-8")
    found = doctor(folder, fix=tmp_path / "out")
    assert sorted(codes(found)) == ["key-contradicts", "metadata-format"]
    assert found.healthy
    kept = {path.name for path in folder.iterdir() if path.suffix == ".json"} - {"weighbridge.json", "dequant_sha256.json"}
    assert kept <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out" / "weighbridge.json").exists()
    assert_same_tensors(folder, tmp_path / "out")


def test_the_source_is_never_written_and_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    folder = sick(tmp_path, SYM)
    (folder / "quantize_config.json").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DestinationError, match="source"):
        doctor(folder, fix=folder, overwrite=True)
    doctor(folder, fix=tmp_path / "out")
    with pytest.raises(DestinationError, match="exists"):
        doctor(folder, fix=tmp_path / "out")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_headers_that_cannot_be_read_are_an_error_not_an_ailment(tmp_path: Path) -> None:
    folder = sick(tmp_path, SYM)
    weight_file(folder).write_bytes(b"\x00" * 4)
    with pytest.raises(UnreadableError):
        doctor(folder)


# --- what a folder may say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["bits", "group_size", "sym", "desc_act", "quant_method", "checkpoint_format"])
@pytest.mark.parametrize("value", [None, "128", [4], {"a": 1}, 1e9, -7, True], ids=repr)
def test_config_values_of_any_type_never_crash(tmp_path: Path, key: str, value: object) -> None:
    folder = sick(tmp_path, SYM)
    edit_both(folder, lambda config: config.update({key: value}))
    found = doctor(folder)
    true = quantization(GOLDENS / SYM).get(key)
    assert bool(found.ailments) or key == "checkpoint_format" or value == true or (key == "desc_act" and value is True)


def test_a_group_index_out_of_range_is_said_and_not_taken_for_act_order(tmp_path: Path) -> None:
    folder = sick(tmp_path, SYM)
    change_tensors(weight_file(folder), lambda tensors: tensors[f"{LAYER}.g_idx"].__setitem__(0, 7))
    assert [(item.code, item.where, item.mendable) for item in doctor(folder).ailments] == [("g_idx-range", LAYER, False)]


def test_gptqmodels_rules_for_single_modules(tmp_path: Path) -> None:
    """Layers under a rule may differ from the config's bits; a rule that its layer contradicts is said."""
    folder = sick(tmp_path, SYM)
    edit_both(folder, lambda config: config.update(dynamic={r"+:.*layers\.1\..*": {"bits": 8}}))
    found = doctor(folder).ailments
    assert {item.code for item in found} == {"key-contradicts"}
    assert len(found) == 7
    edit_both(folder, lambda config: config.update(dynamic={r"-:.*lm_head.*": {}}))
    assert doctor(folder).ailments == []


def test_dynamic_rules_match_in_gptqmodels_order() -> None:
    config = {"dynamic": {r"+:.*\.down_proj": {"bits": 8}, r".*\.o_proj": {"bits": 3}, r"-:.*layers\.0\..*": {}, "(": {}}}
    rules = DynamicRules(config)
    assert rules.find("model.layers.0.mlp.down_proj") == {}
    assert rules.find("model.layers.1.mlp.down_proj") == {"bits": 8}
    assert rules.find("model.layers.1.self_attn.o_proj") == {"bits": 3}
    assert rules.find("model.layers.1.self_attn.q_proj") is None
    assert DynamicRules({}).find("model.layers.1.self_attn.q_proj") is None


def test_what_is_written_is_checked_before_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that went wrong leaves no folder."""
    folder = sick(tmp_path, SYM)
    (folder / "quantize_config.json").unlink()
    whole = mending._copy
    monkeypatch.setattr(mending, "_copy", lambda fd, array, offset: whole(fd, np.zeros_like(array), offset))
    with pytest.raises(WeighbridgeError, match="not what it was"):
        doctor(folder, fix=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sick"]


def test_a_folder_that_is_still_ill_or_whose_source_changed_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sick(tmp_path, SYM)
    (folder / "quantize_config.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(mending, "_write_configs", lambda *parts: None)
        with pytest.raises(WeighbridgeError, match="still ill"):
            doctor(folder, fix=tmp_path / "out")
    whole = mending._write_configs

    def meanwhile(config: Any, cure: Any, out: Path) -> None:
        os.utime(weight_file(folder), (1, 1))
        whole(config, cure, out)

    monkeypatch.setattr(mending, "_write_configs", meanwhile)
    with pytest.raises(UnreadableError, match="changed while it was copied"):
        doctor(folder, fix=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sick"]
