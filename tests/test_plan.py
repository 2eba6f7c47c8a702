"""What a plan decides on checkpoints with chosen numbers, and that the conversion it describes is what comes out."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_cases import (
    BFLOAT16,
    BLOCK,
    DOWN,
    FIXTURES,
    GATE_UP,
    NORM,
    O_PROJ,
    QKV,
    Source,
    assert_holds,
    decode_awq,
    decode_gptq,
    one,
    read_json,
    read_safetensors,
)
from typer.testing import CliRunner

from convert.cli import app
from convert.engine import convert, run
from convert.moves import MOVES
from convert.planning import plan
from convert.records import LOSSES, Plan
from formats import files
from formats.errors import RefusedError, UnreadableError, UsageError

MODEL = "model.safetensors"


def planned(source: Source, tmp_path: Path, to: str, **options: Any) -> Plan:
    folder = tmp_path / "source"
    return plan(folder if folder.exists() else source.write(folder), to, **options)


def converted(source: Source, tmp_path: Path, to: str, **options: Any) -> tuple[Plan, Path]:
    """The plan and the folder that it made."""
    decided = planned(source, tmp_path, to, **options)
    destination = tmp_path / to.replace(":", "-")
    run(decided, destination)
    return decided, destination


def codes_of(decided: Plan) -> list[str]:
    return [refusal.code for refusal in decided.refusals]


def refused(decided: Plan, code: str, *layers: str) -> None:
    """Exactly these layers are refused with this code, each with all that a user needs; nothing would be written."""
    assert [(refusal.code, refusal.layer) for refusal in decided.refusals] == [(code, layer) for layer in layers]
    assert decided.files == []
    for refusal in decided.refusals:
        assert all(getattr(refusal, part.name) for part in fields(refusal))
        assert refusal.offers.startswith(f"{decided.target_name} ")
    with pytest.raises(RefusedError) as caught:
        decided.raise_if_refused()
    assert caught.value.exit_code == 3
    assert f"[{code}]" in str(caught.value)
    assert layers[0] in str(caught.value)
    assert caught.value.refusals == tuple(decided.refusals)


def losses_of(decided: Plan) -> dict[str, tuple[int, float]]:
    return {loss.code: (loss.layers, loss.bound) for loss in decided.losses}


def target_args(decided: Plan) -> dict[str, tuple[int, int]]:
    """{layer: (bits, group size)} in the target."""
    return {layer.target.name: (layer.target.scheme.weights.bits, layer.target.group_size) for layer in decided.layers}


class TestGroups:
    @pytest.mark.parametrize(("in_", "group"), [(256, 128), (384, 128), (192, 64), (96, 32), (32, 32)])
    def test_awq_repeats_a_channel_s_scale_in_the_largest_groups_that_fit(self, tmp_path: Path, in_: int, group: int) -> None:
        source = one(shape=(64, in_), offsets=np.arange(64)[:, None] % 16 - 8)
        decided, folder = converted(source, tmp_path, "awq")
        assert target_args(decided) == {O_PROJ: (4, group)}
        if in_ > group:
            assert "repeat-scales" in decided.layers[0].moves
        assert decided.layers[0].repeat == in_ // group
        tensors = read_safetensors(folder / MODEL)
        assert tensors[f"{O_PROJ}.scales"].shape == (in_ // group, 64)
        assert_holds(tensors, source, O_PROJ, "awq")

    def test_gptq_keeps_one_scale_a_channel(self, tmp_path: Path) -> None:
        source = one(shape=(64, 256))
        decided, folder = converted(source, tmp_path, "gptq")
        assert target_args(decided) == {O_PROJ: (4, -1)}
        assert "repeat-scales" not in decided.layers[0].moves
        assert read_json(folder / "quantize_config.json")["group_size"] == -1
        assert_holds(read_safetensors(folder / MODEL), source, O_PROJ, "gptq")

    @pytest.mark.parametrize(("target", "groups"), [("gptq", 1), ("awq", 2)])
    def test_one_scale_for_the_tensor_is_repeated(self, tmp_path: Path, target: str, groups: int) -> None:
        source = one("tensor", shape=(64, 256), scales=0.0625, offsets=3)
        decided, folder = converted(source, tmp_path, target)
        assert "repeat-scales" in decided.layers[0].moves
        tensors = read_safetensors(folder / MODEL)
        assert tensors[f"{O_PROJ}.scales"].shape == (groups, 64)
        assert_holds(tensors, source, O_PROJ, target)

    @pytest.mark.parametrize("target", ["awq", "gptq"])
    @pytest.mark.parametrize(("stored", "written"), [(256, 128), (512, 128), (192, 64), (128, 128), (64, 64), (32, 32)])
    def test_a_group_is_kept_or_split(self, tmp_path: Path, target: str, stored: int, written: int) -> None:
        offsets = np.arange(2)[None, :] - np.arange(32)[:, None] % 7
        source = one(stored, shape=(32, 2 * stored), offsets=offsets)
        decided, folder = converted(source, tmp_path, target)
        assert target_args(decided) == {O_PROJ: (4, written)}
        assert ("split-groups" in decided.layers[0].moves) == (stored != written)
        tensors = read_safetensors(folder / MODEL)
        assert len(tensors[f"{O_PROJ}.scales"]) == 2 * stored // written
        assert_holds(tensors, source, O_PROJ, target)

    @pytest.mark.parametrize("target", ["awq", "gptq"])
    @pytest.mark.parametrize(
        ("first", "second", "written", "moves"),
        [
            (64, 128, 64, ("split-groups",)),
            (256, 64, 64, ("split-groups",)),
            ("channel", 128, 128, ("repeat-scales",)),
            ("channel", 32, 32, ("repeat-scales",)),
            ("tensor", 64, 64, ("repeat-scales",)),
        ],
    )
    def test_layers_that_differ_get_one_size(
        self, tmp_path: Path, target: str, first: Any, second: Any, written: int, moves: tuple[str, ...]
    ) -> None:
        source = Source().linear(O_PROJ, (32, 512), first).linear(DOWN, (32, 256), second)
        decided, folder = converted(source, tmp_path, target)
        assert target_args(decided) == {O_PROJ: (4, written), DOWN: (4, written)}
        assert set(moves) <= set(decided.move_counts())
        tensors = read_safetensors(folder / MODEL)
        for name in (O_PROJ, DOWN):
            assert_holds(tensors, source, name, target)

    @pytest.mark.parametrize("target", ["awq", "gptq"])
    def test_groups_that_no_size_divides_are_refused(self, tmp_path: Path, target: str) -> None:
        refused(planned(one(48, shape=(32, 96)), tmp_path, target), "group-size", O_PROJ)

    def test_gptq_spells_the_group_of_every_input(self, tmp_path: Path) -> None:
        _, folder = converted(one(64, shape=(32, 256)), tmp_path, "gptq")
        g_idx = read_safetensors(folder / MODEL)[f"{O_PROJ}.g_idx"]
        assert g_idx.dtype == np.int32
        np.testing.assert_array_equal(g_idx, [0] * 64 + [1] * 64 + [2] * 64 + [3] * 64)


class TestZeroPoints:
    def test_gptq_writes_v1_when_every_zero_point_fits(self, tmp_path: Path) -> None:
        source = one(128, shape=(32, 256), offsets=np.arange(32)[:, None] % 15 - 7)  # 1 to 15 unsigned
        decided, folder = converted(source, tmp_path, "gptq")
        assert decided.target_name == "gptq:v1"
        assert read_json(folder / "quantize_config.json")["checkpoint_format"] == "gptq"
        assert_holds(read_safetensors(folder / MODEL), source, O_PROJ, "gptq", version=1)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_gptq_writes_v2_when_one_does_not_and_says_so(self, tmp_path: Path, bits: int) -> None:
        low = -(1 << bits - 1)
        offsets = np.arange(64).reshape(32, 2) % 15 - 7
        offsets[11, 1] = low  # lane 3 of its word: what v1 would smear over lanes 4 to 7
        source = one(128, shape=(32, 256), bits=bits, offsets=offsets)
        decided, folder = converted(source, tmp_path, "gptq")
        assert decided.target_name == "gptq:v2"
        note = next(note for note in decided.notes if "gptq:v2" in note)
        assert O_PROJ in note
        assert "1 layers" in note
        assert read_json(folder / "quantize_config.json")["checkpoint_format"] == "gptq_v2"
        tensors = read_safetensors(folder / MODEL)
        assert_holds(tensors, source, O_PROJ, "gptq", bits, version=2)
        zeros = decode_gptq(tensors, O_PROJ, bits, version=2).zeros[:, ::128]
        np.testing.assert_array_equal(zeros, offsets)  # the neighbours in the word too
        assert zeros[11, 1] == low

    @pytest.mark.parametrize("bits", [4, 8])
    def test_v1_by_name_refuses_it(self, tmp_path: Path, bits: int) -> None:
        offsets = np.zeros((32, 1))
        offsets[3] = -(1 << bits - 1)
        source = one(shape=(32, 128), bits=bits, offsets=offsets).linear(DOWN, bits=bits)
        decided = planned(source, tmp_path, "gptq:v1")
        refused(decided, "zero-point", O_PROJ)
        assert "--to gptq" in decided.refusals[0].hint

    def test_v2_by_name_is_written_where_v1_would_do(self, tmp_path: Path) -> None:
        source = one(offsets=-7)
        decided, folder = converted(source, tmp_path, "gptq:v2")
        assert decided.target_name == "gptq:v2"
        assert_holds(read_safetensors(folder / MODEL), source, O_PROJ, "gptq", version=2)

    def test_awq_holds_a_zero_point_of_0(self, tmp_path: Path) -> None:
        source = one(offsets=np.where(np.arange(32) % 8 == 3, -8, 7)[:, None])
        _, folder = converted(source, tmp_path, "awq")
        assert_holds(read_safetensors(folder / MODEL), source, O_PROJ, "awq")

    def test_symmetry_is_found_in_the_data(self, tmp_path: Path) -> None:
        decided, folder = converted(one(), tmp_path, "gptq")
        assert "spell-zero-point" in decided.layers[0].moves
        assert read_json(folder / "quantize_config.json")["sym"] is True
        other = tmp_path / "other"
        convert(one(offsets=np.arange(32)[:, None] // 31).write(tmp_path / "second"), other, "gptq")
        assert read_json(other / "quantize_config.json")["sym"] is False

    @pytest.mark.parametrize("value", [0.5, 8, -9, np.nan])
    def test_an_offset_that_is_no_zero_point_is_unreadable(self, tmp_path: Path, value: float) -> None:
        offsets = np.zeros((32, 1))
        offsets[5] = value
        with pytest.raises(UnreadableError, match=r"o_proj\.weight_offset"):
            planned(one(offsets=offsets), tmp_path, "awq")


class TestBitsAndShapes:
    def test_awq_refuses_8_bits(self, tmp_path: Path) -> None:
        decided = planned(one(bits=8).linear(DOWN), tmp_path, "awq")
        refused(decided, "bits", O_PROJ)
        assert "gptq" in decided.refusals[0].hint

    def test_gptq_lists_the_layers_with_more_bits(self, tmp_path: Path) -> None:
        source = one(bits=4).linear(DOWN, bits=8, offsets=-100)
        decided, folder = converted(source, tmp_path, "gptq")
        assert target_args(decided) == {O_PROJ: (4, -1), DOWN: (8, -1)}
        config = read_json(folder / "quantize_config.json")
        assert config["bits"] == 4
        assert config["dynamic"] == {rf"+:^{DOWN.replace('.', chr(92) + '.')}$": {"bits": 8}}
        tensors = read_safetensors(folder / MODEL)
        assert_holds(tensors, source, O_PROJ, "gptq", 4)
        assert_holds(tensors, source, DOWN, "gptq", 8)

    @pytest.mark.parametrize("target", ["awq", "gptq"])
    @pytest.mark.parametrize("shape", [(40, 128), (16, 128), (32, 80), (32, 252)])
    def test_shapes_that_are_no_multiple_of_32_are_refused(self, tmp_path: Path, target: str, shape: tuple[int, int]) -> None:
        decided = planned(one(shape=shape), tmp_path, target)
        assert ("shape-multiple", O_PROJ) in [(refusal.code, refusal.layer) for refusal in decided.refusals]
        assert str(list(shape)) in str(decided.refusals)
        with pytest.raises(RefusedError):
            run(decided, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("shape", [(0, 128), (32, 0)])
    @pytest.mark.parametrize("target", ["awq", "gptq"])
    def test_a_layer_without_weights_is_no_layer(self, tmp_path: Path, target: str, shape: tuple[int, int]) -> None:
        folder = one(shape=shape).write(tmp_path / "source")
        with pytest.raises((RefusedError, UnreadableError), match="o_proj"):
            convert(folder, tmp_path / "out", target)

    def test_a_quantized_lm_head(self, tmp_path: Path) -> None:
        source = one().linear("lm_head", (64, 128))
        refused(planned(source, tmp_path, "awq"), "lm-head", "lm_head")
        _, folder = converted(source, tmp_path, "gptq")
        assert read_json(folder / "quantize_config.json")["lm_head"] is True
        assert_holds(read_safetensors(folder / MODEL), source, "lm_head", "gptq")

    def test_lm_head_in_float_is_the_usual(self, tmp_path: Path) -> None:
        _, folder = converted(one().floats("lm_head.weight"), tmp_path, "gptq")
        assert read_json(folder / "quantize_config.json")["lm_head"] is False

    @pytest.mark.parametrize("target", ["awq", "gptq", "dense"])
    def test_nothing_quantized_is_refused(self, tmp_path: Path, target: str) -> None:
        source = Source().floats("model.embed_tokens.weight")
        refused(planned(source, tmp_path, target), "nothing", "source")


class TestFused:
    @pytest.mark.parametrize("target", ["awq", "gptq"])
    @pytest.mark.parametrize("together", [QKV, GATE_UP])
    def test_one_float_sibling_is_refused_for_the_others(self, tmp_path: Path, target: str, together: tuple[str, ...]) -> None:
        source = Source()
        for name in together[1:]:
            source.linear(name)
        source.floats(f"{together[0]}.weight")
        decided = planned(source, tmp_path, target)
        refused(decided, "fused", *together[1:])
        assert together[0].rpartition(".")[2] in decided.refusals[0].needs

    @pytest.mark.parametrize("together", [QKV, GATE_UP])
    def test_siblings_of_different_bits_are_refused(self, tmp_path: Path, together: tuple[str, ...]) -> None:
        source = Source()
        for name in together:
            source.linear(name, bits=8 if name == together[-1] else 4)
        decided = planned(source, tmp_path, "gptq")
        refused(decided, "fused", *together)
        assert decided.refusals[0].needs.startswith(f"its own scheme while {together[-1].rpartition('.')[2]} is W8A16 per channel")
        assert decided.refusals[-1].needs.startswith(f"its own scheme while {together[0].rpartition('.')[2]} is W4A16 per channel")

    @pytest.mark.parametrize("target", ["awq", "gptq"])
    def test_all_rolled_back_is_fine(self, tmp_path: Path, target: str) -> None:
        source = one().floats(*(f"{name}.weight" for name in QKV))
        source.config = {"model_type": "qwen2"}
        _, folder = converted(source, tmp_path, target)
        quantization = read_json(folder / "config.json")["quantization_config"]
        if target == "awq":
            assert sorted(quantization["modules_to_not_convert"]) == sorted(QKV)
        else:
            assert set(quantization["dynamic"]) == {rf"-:^{name.replace('.', chr(92) + '.')}$" for name in QKV}
        tensors = read_safetensors(folder / MODEL)
        for name in QKV:
            assert tensors[f"{name}.weight"].tobytes() == source.tensors[f"{name}.weight"].tobytes()

    @pytest.mark.parametrize("target", ["awq", "gptq"])
    def test_siblings_with_different_groups_are_made_alike(self, tmp_path: Path, target: str) -> None:
        source = Source().linear(GATE_UP[0], group=64).linear(GATE_UP[1], group=128)
        _, folder = converted(source, tmp_path, target)
        for name in GATE_UP:
            assert_holds(read_safetensors(folder / MODEL), source, name, target)

    def test_dense_needs_no_agreement(self, tmp_path: Path) -> None:
        source = Source().linear(GATE_UP[0], bits=8).floats(f"{GATE_UP[1]}.weight")
        assert planned(source, tmp_path, "dense").refusals == []


class TestWhatElseIsStored:
    @pytest.mark.parametrize("target", ["awq", "gptq", "dense"])
    @pytest.mark.parametrize(
        "tensor",
        [
            f"{BLOCK}.self_attn.heads_rotation",
            f"{BLOCK}.mlp.kronecker_rotation_m",
            f"{BLOCK}.mlp.down_proj.div.mul_scale",
            f"{BLOCK}.mlp.down_proj.svd_lowrank_l1",
            f"{BLOCK}.mlp.down_proj.left_trans",
        ],
    )
    @pytest.mark.parametrize("type_", ["FLOAT", None])
    def test_tensors_that_change_what_is_computed_are_refused(self, tmp_path: Path, target: str, tensor: str, type_: str | None) -> None:
        source = one().tensor(tensor, np.ones(4, np.float32), type_)
        refused(planned(source, tmp_path, target), "functional", tensor)

    def test_scales_of_a_kv_cache_are_dropped_only_when_asked(self, tmp_path: Path) -> None:
        source = one()
        for leaf in "kv":
            source.tensor(f"{BLOCK}.self_attn.{leaf}_proj.kv_cache_scale", np.ones(32, np.float16), "C8")
            source.tensor(f"{BLOCK}.self_attn.{leaf}_proj.kv_cache_offset", np.zeros(32, np.float16), "C8")
        decided = planned(source, tmp_path, "awq")
        assert codes_of(decided) == ["kv-cache-dropped"]
        assert "--allow kv-cache-dropped" in decided.refusals[0].hint
        decided, folder = converted(source, tmp_path, "awq", allow=["kv-cache-dropped"])
        assert losses_of(decided).keys() == {"kv-cache-dropped"}
        assert not [name for name in read_safetensors(folder / MODEL) if "kv_cache" in name]
        assert "kv-cache-dropped" in codes_of(planned(source, tmp_path, "awq", allow=["kv-cache-dropped"], strict=True))

    def test_other_tensors_go_through_bit_for_bit(self, tmp_path: Path) -> None:
        source = one().floats("model.embed_tokens.weight", shape=(7, 5), dtype=BFLOAT16)
        source.floats("model.norm.weight", shape=(3,)).tensor("position", np.arange(4, dtype=np.int64))
        _, folder = converted(source, tmp_path, "gptq")
        tensors = read_safetensors(folder / MODEL)
        for name in ("model.embed_tokens.weight", "model.norm.weight", "position"):
            assert tensors[name].dtype == source.tensors[name].dtype
            assert tensors[name].shape == source.tensors[name].shape
            assert tensors[name].tobytes() == source.tensors[name].tobytes()


def smoothed(bias: float = 0, twins: bool = True, model_type: str | None = None) -> Source:
    """A layer and a norm as AntiOutlier leaves it."""
    source = one().floats(f"{NORM}.weight", shape=(128,))
    source.tensor(f"{NORM}.bias", np.full(128, bias, np.float32))
    if twins:
        source.tensor(f"{NORM}.module.weight", source.tensors[f"{NORM}.weight"].copy(), "W4A16")
        source.tensor(f"{NORM}.module.bias", source.tensors[f"{NORM}.bias"].copy(), "W4A16")
    source.config = None if model_type is None else {"model_type": model_type}
    return source


class TestNorms:
    @pytest.mark.parametrize(("twins", "model_type"), [(True, None), (True, "qwen2"), (False, "qwen2"), (False, "llama")])
    def test_zeros_are_left_out(self, tmp_path: Path, twins: bool, model_type: str | None) -> None:
        decided, folder = converted(smoothed(0, twins, model_type), tmp_path, "awq")
        assert f"{NORM}.weight" in decided.plain
        norms = [name for name in read_safetensors(folder / MODEL) if name.startswith(NORM)]
        assert norms == [f"{NORM}.weight"]
        assert any("zeros that AntiOutlier added" in note for note in decided.notes)

    def test_zeros_are_left_out_by_the_base_model_s_config(self, tmp_path: Path) -> None:
        base = tmp_path / "base"
        base.mkdir()
        (base / "config.json").write_text('{"model_type": "qwen2"}')
        _, folder = converted(smoothed(0, twins=False), tmp_path, "awq", base_model=base)
        assert f"{NORM}.bias" not in read_safetensors(folder / MODEL)

    @pytest.mark.parametrize("target", ["awq", "gptq", "dense"])
    @pytest.mark.parametrize(("twins", "model_type"), [(True, None), (False, "qwen2")])
    def test_a_shift_is_refused(self, tmp_path: Path, target: str, twins: bool, model_type: str | None) -> None:
        refused(planned(smoothed(2**-20, twins, model_type), tmp_path, target), "norm", f"{NORM}.bias")

    def test_a_copy_that_differs_is_refused(self, tmp_path: Path) -> None:
        source = smoothed()
        source.tensors[f"{NORM}.module.weight"][127] += 1
        refused(planned(source, tmp_path, "gptq"), "norm", f"{NORM}.module.weight")

    @pytest.mark.parametrize("twins", [True, False])
    def test_a_layer_norm_keeps_its_bias(self, tmp_path: Path, twins: bool) -> None:
        source = smoothed(0.5, twins, "gpt_neox")
        _, folder = converted(source, tmp_path, "gptq")
        tensors = {name: array for name, array in read_safetensors(folder / MODEL).items() if name.startswith(NORM)}
        assert sorted(tensors) == [f"{NORM}.bias", f"{NORM}.weight"]
        assert tensors[f"{NORM}.bias"].tobytes() == source.tensors[f"{NORM}.bias"].tobytes()

    def test_a_bias_of_a_layer_is_no_norm_s(self, tmp_path: Path) -> None:
        source = one(bias=np.zeros(32, np.float16))
        source.config = {"model_type": "qwen2"}
        _, folder = converted(source, tmp_path, "awq")
        assert f"{O_PROJ}.bias" in read_safetensors(folder / MODEL)


OTHER_TYPES = (
    "W8A8SC",
    "W8A8_TIMESTEP",
    "W4A4_DYNAMIC",
    "W4A4_FLATQUANT",
    "W8A8_FLATQUANT",
    "W4A4_FLATQUANT_DYNAMIC",
    "W8A8_FLATQUANT_DYNAMIC",
    "WFP8AFP8_DYNAMIC",
    "W8A8FP8_DYNAMIC",
    "W8A8_MXFP8",
    "W4A4_MXFP4",
    "W4A8_MXFP",
    "W4A4_MXFP4_DUALSCALE",
    "W4A4_MXFP4_SVD",
    "W8A8_MXFP8_SVD",
    "NF4",
    "W16A16S",
    "W16A16SC",
)
DESCRIPTIONS = sorted((FIXTURES / "msmodelslim" / "descriptions").glob("*.json"))
UNREAD = [path for path in DESCRIPTIONS if "mxfp" in path.stem]
QUANTIZED_INPUTS = [path for path in DESCRIPTIONS if path not in UNREAD]


def described(description: Path, folder: Path) -> Path:
    """A checkpoint with that description, and under its names tensors of zeros and ones in the shapes of layers [32, 128]."""
    folder.mkdir()
    content = read_json(description)
    types = {key: type_ for key, type_ in content.items() if "." in key}
    source = Source(types=types, top={key: value for key, value in content.items() if "." not in key}, config={"model_type": "qwen2"})
    rows = 16 if "version" in content and "W4A8_DYNAMIC" in types.values() else 32
    parts: dict[str, np.ndarray] = {
        "weight_scale": np.ones((32, 1), np.float32),
        "weight_offset": np.zeros((32, 1), np.float32),
        "weight_scale_second": np.ones((32, 4), np.float32),
        "weight_offset_second": np.zeros((32, 4), np.int64),
        "input_scale": np.ones(1, np.float32),
        "input_offset": np.zeros(1, np.float32),
        "deq_scale": np.ones(32, np.float32),
        "quant_bias": np.zeros(32, np.int32),
        "scale_bias": np.zeros((32, 1), np.float32),
        "kv_cache_scale": np.ones(32, np.float32),
        "kv_cache_offset": np.zeros(32, np.float32),
    }
    for name, type_ in types.items():
        leaf = name.rpartition(".")[2]
        quantized = type_ != "FLOAT" and leaf == "weight" and ".module." not in name
        source.tensors[name] = np.zeros((rows, 128), np.int8) if quantized else parts.get(leaf, np.zeros(32, np.float32))
    return source.write(folder / "checkpoint")


def quantized_in(description: Path) -> dict[str, str]:
    """{layer: type} of a description."""
    labels = read_json(description).items()
    return {key.removesuffix(".weight"): type_ for key, type_ in labels if key.endswith("proj.weight") and type_ != "FLOAT"}


class TestOtherTypes:
    def test_there_are_descriptions(self) -> None:
        assert len(DESCRIPTIONS) == 19
        assert len(UNREAD) == 2

    @pytest.mark.parametrize("description", UNREAD, ids=lambda path: path.stem)
    @pytest.mark.parametrize("target", ["awq", "gptq", "dense"])
    def test_what_is_not_read_is_refused_by_name(self, tmp_path: Path, description: Path, target: str) -> None:
        (type_,) = set(quantized_in(description).values())
        decided = plan(described(description, tmp_path / "made"), target)
        with pytest.raises(RefusedError, match=rf"the type {type_};"):
            decided.raise_if_refused()
        assert codes_of(decided) == ["type"] * len(quantized_in(description))

    @pytest.mark.parametrize("description", QUANTIZED_INPUTS, ids=lambda path: path.stem)
    @pytest.mark.parametrize("target", ["awq", "gptq", "dense"])
    def test_quantized_inputs_are_read_and_lost_only_by_name(self, tmp_path: Path, description: Path, target: str) -> None:
        """AWQ has no 8 bits, asked or not; the others hold the weights, once the user gave up what quantizes inputs and caches."""
        layers = quantized_in(description)
        (type_,) = set(layers.values())
        lost = {"activations-dropped": len(layers)}
        caches = [name for name in read_json(description) if ".kv_cache_" in name]
        lost |= {"kv-cache-dropped": len(caches)} if caches else {}
        refusals = [("bits", name) for name in layers] if target == "awq" and type_.startswith("W8") else []
        folder = described(description, tmp_path / "made")
        decided = plan(folder, target)
        found = [(refusal.code, refusal.layer) for refusal in decided.refusals]
        assert sorted(pair for pair in found if pair[0] not in lost) == sorted(refusals)
        for code, count in lost.items():
            (refusal,) = [refusal for refusal in decided.refusals if refusal.code == code]
            assert f"(in {count} places)" in refusal.needs
            assert f"--allow {code}" in refusal.hint
        allowed = plan(folder, target, allow=list(lost))
        assert sorted((refusal.code, refusal.layer) for refusal in allowed.refusals) == sorted(refusals)
        assert {code: layers for code, (layers, _) in losses_of(allowed).items() if code != "weight-rounded"} == lost
        assert {layer.target.inputs for layer in allowed.layers} == {None}
        assert {layer.target.name for layer in allowed.layers} == set(layers)

    @pytest.mark.parametrize("description", QUANTIZED_INPUTS, ids=lambda path: path.stem)
    def test_their_own_format_loses_nothing_of_them(self, tmp_path: Path, description: Path) -> None:
        decided = plan(described(description, tmp_path / "made"), "msmodelslim")
        assert (decided.refusals, decided.losses) == ([], [])
        kinds = {"W8A8": "static", "W8A8_MIX": "static", "W8A8_DYNAMIC": "dynamic", "W4A8_DYNAMIC": "dynamic"}
        # Of both kinds the default variant has the static one: its files are the same.
        wanted = {name: kinds[type_] for name, type_ in quantized_in(description).items()}
        assert {layer.target.name: layer.target.inputs for layer in decided.layers} == wanted

    @pytest.mark.parametrize("type_", OTHER_TYPES)
    def test_every_type_is_known_by_name(self, tmp_path: Path, type_: str) -> None:
        source = one().tensor(f"{DOWN}.weight", np.zeros((32, 32), np.int8), type_)
        source.tensor(f"{DOWN}.weight_scale", np.ones((32, 1), np.float32), type_)
        decided = planned(source, tmp_path, "gptq")
        refused(decided, "type", DOWN)
        assert f"the type {type_};" in str(decided.refusals[0])

    def test_a_mixed_checkpoint_keeps_the_kind_of_every_layer(self) -> None:
        """W8A8, W8A8_DYNAMIC and W8A16 layers; k_proj is float, which engines that fuse it with q and v cannot serve."""
        source = FIXTURES / "msmodelslim" / "w8a8_mix_cfg_fp16"
        kinds: dict[str, str | None] = {}
        for block in ("model.layers.0", "model.layers.1"):
            kinds |= {f"{block}.self_attn.{leaf}_proj": "static" for leaf in "qv"} | {f"{block}.self_attn.o_proj": None}
            kinds |= {f"{block}.mlp.{leaf}_proj": "dynamic" for leaf in ("gate", "up", "down")}
        own = plan(source, "msmodelslim")
        assert (own.refusals, own.losses) == ([], [])
        assert {layer.target.name: layer.target.inputs for layer in own.layers} == kinds
        decided = plan(source, "gptq")
        found = [(refusal.code, refusal.layer) for refusal in decided.refusals if refusal.code != "activations-dropped"]
        assert sorted(found) == [("fused", f"model.layers.{block}.self_attn.{leaf}_proj") for block in (0, 1) for leaf in "qv"]
        assert losses_of(decided) == {"activations-dropped": (sum(kind is not None for kind in kinds.values()), 1.0)}

    def test_the_command_line_exits_with_3(self, tmp_path: Path) -> None:
        source = FIXTURES / "msmodelslim" / "w8a8_mix_cfg_fp16"
        result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), "--to", "gptq"])
        assert result.exit_code == 3
        assert "needs its own scheme while k_proj is float" in result.stderr
        assert list(tmp_path.iterdir()) == []
        result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), "--to", "dense"])
        assert result.exit_code == 3
        assert "--allow activations-dropped" in result.stderr
        assert list(tmp_path.iterdir()) == []

    def test_a_type_that_nobody_writes_is_unreadable(self, tmp_path: Path) -> None:
        source = one().tensor(f"{DOWN}.weight", np.zeros((32, 32), np.int8), "W3A16")
        with pytest.raises(UnreadableError, match="unknown type 'W3A16'") as caught:
            planned(source, tmp_path, "gptq")
        assert caught.value.exit_code == 5


def rounding(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Relative errors of storing ``values`` in ``dtype``, in double precision."""
    wide = values.astype(np.float64)
    return np.abs(values.astype(dtype).astype(np.float64) - wide) / np.abs(wide)


class TestScales:
    @pytest.mark.parametrize("target", ["awq", "gptq"])
    def test_rounding_to_float16_is_measured(self, tmp_path: Path, target: str) -> None:
        scales = np.random.default_rng(1).uniform(0.001, 0.1, size=(64, 2)).astype(np.float32)
        source = one(128, shape=(64, 256), scales=scales).linear(DOWN, group=128)
        decided, folder = converted(source, tmp_path, target)
        assert losses_of(decided) == {"scale-rounded": (1, pytest.approx(rounding(scales, np.float16).max(), rel=1e-5))}
        assert decided.losses[0].worst == O_PROJ
        assert 2.0**-13 < decided.losses[0].bound <= 2.0**-11
        tensors = read_safetensors(folder / MODEL)
        np.testing.assert_array_equal(tensors[f"{O_PROJ}.scales"], scales.T.astype(np.float16))
        found = decode_awq(tensors, O_PROJ) if target == "awq" else decode_gptq(tensors, O_PROJ)
        np.testing.assert_array_equal(found.codes, source.codes[O_PROJ])
        np.testing.assert_array_equal(found.zeros, source.offsets[O_PROJ])

    @pytest.mark.parametrize("strict", [False, True])
    def test_bfloat16_to_float16_loses_nothing_in_the_normal_range(self, tmp_path: Path, strict: bool) -> None:
        scales = np.geomspace(2.0**-14, 60000, 64).astype(BFLOAT16).reshape(64, 1)
        source = one(shape=(64, 128), scales=scales, dtype=BFLOAT16)
        decided, folder = converted(source, tmp_path, "gptq", strict=strict)
        assert decided.losses == []
        tensors = read_safetensors(folder / MODEL)
        assert tensors[f"{O_PROJ}.scales"].dtype == np.float16
        assert_holds(tensors, source, O_PROJ, "gptq")

    @pytest.mark.parametrize("target", ["awq", "gptq"])
    def test_a_scale_that_overflows_is_refused(self, tmp_path: Path, target: str) -> None:
        decided = planned(one(scales=np.where(np.arange(32) == 9, 1e5, 1)[:, None]), tmp_path, target)
        refused(decided, "scale-overflow", O_PROJ)
        assert "1e+05" in decided.refusals[0].needs
        assert "--scale-dtype" in decided.refusals[0].hint

    @pytest.mark.parametrize(("name", "dtype"), [("bfloat16", BFLOAT16), ("float32", np.float32), ("keep", np.float32)])
    def test_it_passes_in_a_dtype_that_holds_it(self, tmp_path: Path, name: str, dtype: Any) -> None:
        scales = np.where(np.arange(32) == 9, 1e5, 1.0)[:, None]
        decided, folder = converted(one(scales=scales), tmp_path, "gptq", scale_dtype=name)
        error = rounding(scales.astype(np.float32), dtype).max()
        assert losses_of(decided) == ({"scale-rounded": (1, pytest.approx(error, rel=1e-5))} if error else {})
        written = read_safetensors(folder / MODEL)[f"{O_PROJ}.scales"]
        assert written.dtype == dtype
        np.testing.assert_array_equal(written, scales.astype(np.float32).astype(dtype).T)

    def test_just_below_the_overflow_is_rounded_and_just_above_refused(self, tmp_path: Path) -> None:
        below, above = np.float32(65519), np.float32(65520)  # the midpoint of 65504 and 65536 rounds to infinity
        assert planned(one(scales=below), tmp_path / "below", "awq").refusals == []
        refused(planned(one(scales=above), tmp_path / "above", "awq"), "scale-overflow", O_PROJ)

    def test_the_smallest_normal_number_is_normal(self, tmp_path: Path) -> None:
        scale = np.float32(2.0**-14 * (1 + 2.0**-13))  # rounds to 2**-14, which float16 holds with all its bits
        decided = planned(one(scales=scale), tmp_path, "awq")
        assert decided.refusals == []
        assert losses_of(decided) == {"scale-rounded": (1, pytest.approx(2.0**-13, rel=1e-3))}

    @pytest.mark.parametrize("scale", [1e-6, 1e-9])  # few bits left, and none
    def test_a_subnormal_result_must_be_allowed_and_is_measured(self, tmp_path: Path, scale: float) -> None:
        scales = np.where(np.arange(32) == 9, scale, 1.0).astype(np.float32)[:, None]
        source = one(scales=scales)
        decided = planned(source, tmp_path, "awq")
        assert codes_of(decided) == ["scale-subnormal"]
        assert "--allow scale-subnormal" in decided.refusals[0].hint
        decided, folder = converted(source, tmp_path, "awq", allow=["scale-subnormal"])
        wanted = pytest.approx(rounding(scales, np.float16).max(), rel=1e-5)
        assert losses_of(decided) == {"scale-subnormal": (1, wanted)}
        written = read_safetensors(folder / MODEL)[f"{O_PROJ}.scales"]
        np.testing.assert_array_equal(written, scales.T.astype(np.float16))

    @pytest.mark.parametrize("target", ["awq", "gptq"])
    @pytest.mark.parametrize("strict", [False, True])
    def test_the_group_of_zeros_that_the_tool_writes_is_exact(self, tmp_path: Path, target: str, strict: bool) -> None:
        scales = np.where(np.arange(32) == 9, 2.0**-23, 1)[:, None]  # subnormal in float16, and exactly there
        source = one(scales=scales, offsets=np.where(np.arange(32) == 9, -8, 0)[:, None])
        decided, folder = converted(source, tmp_path, target, strict=strict)
        assert decided.losses == []
        version = 2 if target == "gptq" else 1
        assert_holds(read_safetensors(folder / MODEL), source, O_PROJ, target, version=version)

    def test_strict_refuses_rounding(self, tmp_path: Path) -> None:
        decided = planned(one(scales=0.1), tmp_path, "awq", strict=True)
        refused(decided, "scale-rounded", O_PROJ)
        assert "keep" in decided.refusals[0].hint
        assert planned(one(scales=0.1), tmp_path, "awq", strict=True, scale_dtype="keep").refusals == []

    def test_strict_does_not_advise_what_was_done(self, tmp_path: Path) -> None:
        decided = planned(one(scales=1e-6), tmp_path, "awq", strict=True, allow=["scale-subnormal"])
        refused(decided, "scale-subnormal", O_PROJ)
        assert "--strict" in decided.refusals[0].hint
        assert "--allow" not in decided.refusals[0].hint

    @pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32])
    def test_keep_writes_what_was_stored(self, tmp_path: Path, dtype: Any) -> None:
        scales = (np.arange(1, 33) / 30).astype(dtype)[:, None]
        source = one(scales=scales, dtype=dtype)
        decided, folder = converted(source, tmp_path, "gptq", scale_dtype="keep", strict=True)
        assert decided.losses == []
        written = read_safetensors(folder / MODEL)[f"{O_PROJ}.scales"]
        assert written.dtype == dtype
        assert written.tobytes() == scales.T.tobytes()

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32])
    def test_a_scale_that_is_no_number_is_unreadable(self, tmp_path: Path, value: float, dtype: Any) -> None:
        scales = np.where(np.arange(32) == 9, value, 1)[:, None]
        with pytest.raises(UnreadableError, match=O_PROJ.replace(".", r"\.")):
            planned(one(scales=scales, dtype=dtype), tmp_path, "awq", scale_dtype="keep")

    @pytest.mark.parametrize(("values", "dtype"), [([1.0, 1e-6], BFLOAT16), ([0.1, 3.0], np.float32)], ids=["bfloat16", "float32"])
    def test_a_bias_that_is_rounded_is_measured(self, tmp_path: Path, values: list[float], dtype: Any) -> None:
        bias = np.resize(values, 32).astype(dtype)
        error = rounding(bias, np.float16).max()
        assert error > 0
        source = one(bias=bias)
        decided, folder = converted(source, tmp_path, "awq")
        assert losses_of(decided) == {"bias-rounded": (1, pytest.approx(error, rel=1e-5))}
        written = read_safetensors(folder / MODEL)[f"{O_PROJ}.bias"]
        assert written.dtype == np.float16
        np.testing.assert_array_equal(written, bias.astype(np.float16))
        assert codes_of(planned(source, tmp_path, "awq", strict=True)) == ["bias-rounded"]

    def test_a_bias_that_float16_holds_loses_nothing(self, tmp_path: Path) -> None:
        bias = (np.arange(32) / 16 - 1).astype(BFLOAT16)
        decided, folder = converted(one(bias=bias), tmp_path, "gptq", strict=True)
        assert decided.losses == []
        np.testing.assert_array_equal(read_safetensors(folder / MODEL)[f"{O_PROJ}.bias"], bias.astype(np.float16))

    def test_a_bias_that_overflows_is_refused(self, tmp_path: Path) -> None:
        bias = np.full(32, 1e5, BFLOAT16)
        refused(planned(one(bias=bias), tmp_path, "awq"), "bias-overflow", O_PROJ)
        assert planned(one(bias=bias), tmp_path, "awq", scale_dtype="keep").refusals == []

    def test_torch_dtype_follows_the_scales(self, tmp_path: Path) -> None:
        source = one(dtype=BFLOAT16)
        source.config = {"model_type": "qwen2", "torch_dtype": "bfloat16"}
        decided, folder = converted(source, tmp_path, "awq")
        assert read_json(folder / "config.json")["torch_dtype"] == "float16"
        assert any("torch_dtype float16 instead of bfloat16" in note for note in decided.notes)
        kept = tmp_path / "kept"
        convert(tmp_path / "source", kept, "awq", scale_dtype="keep")
        assert read_json(kept / "config.json")["torch_dtype"] == "bfloat16"


class TestThePlanItself:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"allow": ["scale-rounding"]}, "--allow scale-rounding"),
            ({"scale_dtype": "float64"}, "--scale-dtype float64"),
            ({"max_shard_size": 0}, "--max-shard-size 0"),
        ],
    )
    def test_options_that_make_no_sense_are_usage_errors(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            planned(one(), tmp_path, "awq", **options)
        assert caught.value.exit_code == 2

    @pytest.mark.parametrize("to", ["ggml", "awq:v9", "gptq:"])
    def test_targets(self, tmp_path: Path, to: str) -> None:
        if to == "gptq:":
            assert planned(one(), tmp_path, to).target_name == "gptq:v1"
            return
        with pytest.raises(UsageError):
            planned(one(), tmp_path, to)

    def test_a_format_that_is_only_read_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RefusedError, match="not written yet"):
            planned(one(), tmp_path, "msmodelslim:v1")

    @pytest.mark.parametrize("to", ["awq", "gptq", "dense"])
    def test_it_writes_nothing(self, tmp_path: Path, to: str) -> None:
        folder = one().floats("model.norm.weight", shape=(4,)).write(tmp_path / "source")

        def state() -> list[tuple[str, int, int]]:
            return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))

        before = state()
        assert plan(folder, to).files
        assert state() == before

    @pytest.mark.parametrize("to", ["awq", "gptq", "dense"])
    def test_files_are_as_large_as_it_says(self, tmp_path: Path, to: str) -> None:
        source = one(128, shape=(64, 256), bias=np.ones(64, np.float16)).linear(DOWN, (64, 512))
        source.floats("model.norm.weight", shape=(5,)).floats("lm_head.weight", shape=(3, 7), dtype=np.float32)
        source.config = {"model_type": "qwen2"}
        decided, folder = converted(source, tmp_path, to, max_shard_size=9000)
        assert len(decided.files) > 1
        assert {file.name: file.size for file in decided.files} == {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
        assert decided.target_bytes == sum(file.size for file in decided.files)
        assert decided.source_bytes == sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors"))
        planned_tensors = {name: info.shape for file in decided.files for name, info in file.tensors.items()}
        written = {name: array for file in decided.files for name, array in read_safetensors(folder / file.name).items()}
        assert planned_tensors == {name: array.shape for name, array in written.items()}

    def test_peak_memory_grows_with_workers_and_not_with_layers(self, tmp_path: Path) -> None:
        source = one()
        one_worker = planned(source, tmp_path, "awq", jobs=1).peak_memory
        assert 0 < one_worker < planned(source, tmp_path, "awq", jobs=4).peak_memory
        more = Source()
        for layer in range(8):
            more.linear(f"model.layers.{layer}.self_attn.o_proj")
        eightfold = planned(more, tmp_path / "more", "awq", jobs=1).peak_memory
        assert eightfold < one_worker * 2

    @pytest.mark.parametrize("to", ["awq", "gptq", "dense"])
    def test_json_is_json_and_the_same_every_time(self, tmp_path: Path, to: str) -> None:
        source = one(scales=0.1).linear(DOWN).floats("model.norm.weight", shape=(4,))
        first, second = (planned(source, tmp_path, to, jobs=jobs) for jobs in (1, 1))
        text = json.dumps(first.to_json(), sort_keys=True, allow_nan=False)
        assert text == json.dumps(second.to_json(), sort_keys=True, allow_nan=False)
        content = json.loads(text)
        assert content["target"]["quantized_layers"] == 2
        assert content["target"]["plain_tensors"] == 1
        assert content["moves"].keys() <= MOVES.keys()
        assert {loss["code"] for loss in content["losses"]} <= LOSSES.keys()

    def test_refusals_are_in_the_json(self, tmp_path: Path) -> None:
        content = json.loads(json.dumps(planned(one(bits=8), tmp_path, "awq").to_json(), allow_nan=False))
        assert [refusal["layer"] for refusal in content["refusals"]] == [O_PROJ]
        assert content["target"]["files"] == []

    def test_id_is_of_what_is_done(self, tmp_path: Path) -> None:
        source = one(dtype=np.float16).linear(DOWN, dtype=np.float16)
        plain = planned(source, tmp_path, "gptq").id
        assert planned(source, tmp_path, "gptq").id == plain
        assert planned(source, tmp_path, "gptq", jobs=7).id == plain
        assert planned(source, tmp_path, "gptq:v1").id == plain
        others = [
            planned(source, tmp_path, "gptq:v2").id,
            planned(source, tmp_path, "awq").id,
            planned(source, tmp_path, "gptq", strict=True).id,
            planned(source, tmp_path, "gptq", allow=["scale-subnormal"]).id,
            planned(source, tmp_path, "gptq", scale_dtype="keep").id,
            planned(source, tmp_path, "gptq", scale_dtype="float32").id,
            planned(source, tmp_path, "gptq", max_shard_size=9000).id,
            planned(one(dtype=np.float16), tmp_path / "other", "gptq").id,
        ]
        assert len({plain, *others}) == len(others) + 1

    @pytest.mark.parametrize("to", ["awq", "gptq", "dense"])
    def test_without_a_probe_only_headers_are_read(self, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
        source = one(128, bias=np.ones(32, np.float16)).linear(DOWN).floats("model.norm.weight", shape=(4,))
        folder = source.write(tmp_path / "source")
        data = 8 + int.from_bytes(next(folder.glob("*.safetensors")).read_bytes()[:8], "little")
        reads: list[tuple[int, int]] = []

        def watched(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
            if path.suffix == ".safetensors":
                reads.append((offset, offset + len(view)))
            real(descriptor, view, offset, path)

        real = files.read_at
        monkeypatch.setattr(files, "read_at", watched)
        decided = plan(folder, to, probe=False)
        assert sorted(reads) == [(0, 8), (8, data)]
        assert not decided.probed
        assert decided.files
        probed = plan(folder, to)
        assert max(end for _, end in reads) > data
        assert probed.probed
        assert [file.tensors.keys() for file in decided.files] == [file.tensors.keys() for file in probed.files]
        assert decided.target_bytes == probed.target_bytes

    def test_without_a_probe_damage_in_the_data_is_not_seen_and_with_it_it_is(self, tmp_path: Path) -> None:
        folder = one(scales=np.nan).write(tmp_path / "source")
        assert plan(folder, "awq", probe=False).refusals == []
        with pytest.raises(UnreadableError):
            plan(folder, "awq")


def test_dense_without_a_config_is_written_or_refused_before_it_begins(tmp_path: Path) -> None:
    source = one()
    decided = planned(source, tmp_path, "dense")
    if decided.refusals:
        assert "config.json" in str(decided.refusals[0])
        return
    run(decided, tmp_path / "out")
    np.testing.assert_array_equal(read_safetensors(tmp_path / "out" / MODEL)[f"{O_PROJ}.weight"], source.laws[O_PROJ].astype(np.float16))


@pytest.mark.parametrize("names", ["convert, plan, verify", "plan, run", "run, inspect, fingerprint", "verify, plan"])
def test_the_verbs_come_from_the_package_in_any_order(names: str) -> None:
    """Each verb shares its name with a module or the package itself: the function must win."""
    code = f"from convert import {names}\nassert [] == [verb for verb in ({names}) if not callable(verb)]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
