"""LMDeploy's auto_awq in its two arithmetics, against the folders that 0.1.0 and 0.18.0 wrote, from the statistics that they wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from formats.errors import UnreadableError, UsageError
from quantize import quantize_model
from quantize.architectures import ARCHITECTURES
from quantize.blocks import Blocks
from quantize.config import AntiOutlierConfig
from quantize.layerwise import Job, LayerRun
from quantize.lmdeploy_awq import relative_magnitude, round_lmdeploy, smooth_layer, smoothing_scale
from quantize.lmdeploy_calibration import observe
from quantize.methods import LmdeployAwq
from quantize.recipe import load, loads

FIXTURES = Path(__file__).parents[2] / "fixtures" / "lmdeploy"
OLD, NEW = LmdeployAwq("0.1"), LmdeployAwq("0.4.2")
GOLDENS = {"0.1.0": ("llama_mha", "statistics_v010", "awq_v010", OLD), "0.18.0": ("qwen2_gqa", "statistics_v018", "awq_v018", NEW)}
CHANNELS = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which channel of eight the nibbles of a word hold, the lowest first."""


def unpacked(words: Tensor) -> Tensor:
    """[rows, out] of the nibbles of words [rows, out / 8]."""
    nibbles = torch.stack([(words >> (4 * place)) & 15 for place in range(8)], -1)
    natural = torch.empty_like(nibbles)
    natural[..., CHANNELS] = nibbles
    return natural.flatten(1)


def smoothed(folder: Path, inputs: dict[str, Tensor], settings: LmdeployAwq) -> nn.Module:
    """The model in memory, all its layers smoothed."""
    blocks = Blocks.open(folder)
    model = blocks.load()
    with torch.no_grad():
        for name in blocks.names:
            smooth_layer(model, blocks.architecture, name, inputs, settings, 128)
    return model


@pytest.mark.parametrize("version", GOLDENS)
def test_folders_are_the_tools(version: str) -> None:
    """From the tool's own statistics: codes, zero points and scales of every linear, every norm, bias and embedding, bit for bit."""
    folder, statistics, made, settings = GOLDENS[version]
    told = load_file(FIXTURES / made / "model.safetensors")
    largest = torch.load(FIXTURES / statistics / "inputs_stats.pth", weights_only=True)["absmax"]
    model, seen = smoothed(FIXTURES / folder, largest, settings), set()
    for name, linear in model.named_modules():
        if f"{name}.qweight" not in told:
            continue
        rounded, repaired = round_lmdeploy(linear.weight, 128, settings)
        assert torch.equal(rounded.codes.int() + 8, unpacked(told[f"{name}.qweight"]).T), name
        assert torch.equal(rounded.offset.int() + 8, unpacked(told[f"{name}.qzeros"]).T), name
        scales = told[f"{name}.scales"].T
        assert torch.equal(rounded.scale, scales), name
        assert rounded.scale.dtype == scales.dtype
        assert repaired == 0
        seen |= {f"{name}.{part}" for part in ("qweight", "qzeros", "scales")}
    parameters = dict(model.named_parameters())
    for name in told.keys() - seen:
        assert torch.equal(parameters[name], told[name]), name
    assert len(seen) == 14 * 3


@pytest.mark.parametrize(
    ("recipe", "settings", "scales"),
    [("lmdeploy-awq-0.1", OLD, "float16"), ("lmdeploy-awq-0.1", OLD, "float32"), ("lmdeploy-awq", NEW, "float16")],
)
def test_recipes_write_what_the_whole_model_gives(recipe: str, settings: LmdeployAwq, scales: str, tmp_path: Path) -> None:
    """A folder, layer by layer, beside the model smoothed in memory by the statistics of ``lmdeploy calibrate``.

    Scales in float32 are the very ones that LMDeploy 0.1 computes and stores.
    """
    ids = list(torch.load(FIXTURES / "statistics_v010" / "calib_ids.pt", weights_only=True).split(1))
    source = FIXTURES / "llama_mha"
    data = [[one, torch.ones_like(one)] for one in ids]
    result = quantize_model(source, tmp_path / "out", recipe, "awq", calib=data, scale_dtype=None if scales == "float16" else scales)
    assert (result.smoothed, result.notes) == (8, ())
    assert result.written.exact == (settings is NEW or scales == "float32")
    largest = observe(Blocks.open(source), ids).files()["inputs_stats"]["absmax"]
    model, made = smoothed(source, largest, settings), load_file(tmp_path / "out" / "model.safetensors")
    for name, linear in model.named_modules():
        if f"{name}.qweight" in made:
            rounded, _ = round_lmdeploy(linear.weight, 128, settings)
            assert torch.equal(unpacked(made[f"{name}.qweight"]).T, rounded.codes.int() + 8), name
            assert torch.equal(unpacked(made[f"{name}.qzeros"]).T, rounded.offset.int() + 8), name
            assert torch.equal(made[f"{name}.scales"].T, rounded.scale.to(getattr(torch, scales))), name
        elif "norm" in name:
            assert torch.equal(made[f"{name}.weight"], linear.weight), name


@pytest.mark.parametrize("settings", [OLD, NEW], ids=["0.1", "0.4.2"])
def test_groups_of_one_sign_are_repaired_and_counted(settings: LmdeployAwq) -> None:
    """Rows of 10 to 11, -11 to -10, constant 3 and -1 to 1: the tool's zero points of the first are -150 and 165, of the third -inf."""
    line = torch.linspace(0, 1, 128)
    weight = torch.stack([10 + line, line - 11, torch.full((128,), 3.0), 2 * line - 1]).half()
    rounded, repaired = round_lmdeploy(weight, 128, settings)
    assert repaired == 3
    zero = rounded.offset.flatten() + 8
    assert zero[:3].tolist() == [0, 15, 0]
    assert bool(((zero >= 0) & (zero <= 15)).all())
    assert bool(((rounded.codes >= -8) & (rounded.codes <= 7)).all())
    law = (rounded.codes.float() - rounded.offset.float()) * rounded.scale.float()
    assert bool(((law - weight.float()).abs()[:3] <= 0.51 * rounded.scale.float()[:3]).all())
    assert (rounded.fake.float() - law).abs().max() < 0.01


def test_zeros_alone_are_zeros() -> None:
    for settings, count in ((OLD, 1), (NEW, 0)):
        rounded, repaired = round_lmdeploy(torch.zeros(1, 128).half(), 128, settings)
        assert (repaired, float(rounded.fake.abs().max())) == (count, 0)


def test_repairs_are_told(tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / "qwen2_gqa", dtype=torch.float16)
    gate, output = model.model.layers[1].mlp.gate_proj.weight.data, model.model.layers[1].self_attn.o_proj.weight.data
    gate[5, :128] = gate[5, :128].abs() + 0.1
    output[7, 128:] = 0.25  # which no smoothing changes: its heads are grouped
    model.save_pretrained(tmp_path / "model")
    ids = torch.load(FIXTURES / "statistics_v010" / "calib_ids.pt", weights_only=True).split(1)
    result = quantize_model(
        tmp_path / "model", tmp_path / "out", "lmdeploy-awq-0.1", "awq", calib=[[one, torch.ones_like(one)] for one in ids]
    )
    assert "2 groups of weights of one sign (first in model.layers.1.self_attn.o_proj)" in result.notes[0]
    counts = {layer.name: layer.repaired for layer in result.layers if layer.repaired}
    assert counts == {"model.layers.1.self_attn.o_proj": 1, "model.layers.1.mlp.gate_proj": 1}
    made = load_file(tmp_path / "out" / "model.safetensors")
    zeros = {name: unpacked(made[f"model.layers.1.{name}.qzeros"]) for name in ("mlp.gate_proj", "self_attn.o_proj")}
    assert (zeros["mlp.gate_proj"][0, 5], zeros["self_attn.o_proj"][1, 7]) == (0, 0)
    assert unpacked(made["model.layers.1.self_attn.o_proj.qweight"])[128:, 7].eq(15).all()
    assert float(made["model.layers.1.self_attn.o_proj.scales"][1, 7]) == pytest.approx(0.25 / 15, rel=1e-3)


def test_rounding_is_away_from_zero_until_0_4_1_and_to_even_since() -> None:
    """A group from 0 to 15, of scale 1: 0.5 and 2.5 become 1 and 3, or 0 and 2."""
    weight = torch.zeros(1, 128)
    weight[0, :3] = torch.tensor([0.5, 2.5, 15.0])
    assert (round_lmdeploy(weight, 128, OLD)[0].codes[0, :3] + 8).tolist() == [1, 3, 15]
    assert (round_lmdeploy(weight, 128, NEW)[0].codes[0, :3] + 8).tolist() == [0, 2, 15]


def test_scale_by_hand() -> None:
    """Two inputs in one group, two rows: w = mean of [1, 1/2] and [1, 1] over rows = [1, 3/4]; a = [4, 1]."""
    magnitude = relative_magnitude([torch.tensor([[2.0, 1.0]]), torch.tensor([[-3.0, 3.0]])], 2, OLD)
    found = smoothing_scale(torch.tensor([4.0, 1.0]), magnitude, OLD, True)
    bare = torch.tensor([2.0, 1 / 0.75**0.5])
    torch.testing.assert_close(found, bare / (bare.max() * bare.min()).sqrt())


def test_an_input_of_zeros_is_an_error_until_0_4_1() -> None:
    """There it divides by 0; since then the scale is at least 1e-4."""
    magnitude = torch.ones(2)
    assert smoothing_scale(torch.tensor([1.0, 0.0]), magnitude, OLD, True).isfinite().all().logical_not()
    assert smoothing_scale(torch.tensor([1.0, 0.0]), magnitude, NEW, True).isfinite().all()
    largest = torch.load(FIXTURES / "statistics_v010" / "inputs_stats.pth", weights_only=True)["absmax"]
    largest["model.layers.0.self_attn.k_proj"][3] = 0
    with pytest.raises(UnreadableError, match=r"model\.layers\.0\.input_layernorm: .* use lmdeploy-awq"):
        smoothed(FIXTURES / "llama_mha", largest, OLD)


def test_inputs_that_are_not_finite_are_an_error() -> None:
    largest = torch.load(FIXTURES / "statistics_v018" / "inputs_stats.pth", weights_only=True)["absmax"]
    largest["model.layers.0.mlp.gate_proj"][3] = torch.inf
    with pytest.raises(UnreadableError, match=r"model\.layers\.0\.post_attention_layernorm: 256 of 256 .* beyond torch\.float16, .* wider"):
        smoothed(FIXTURES / "qwen2_gqa", largest, NEW)


def test_models_that_no_table_knows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its layers' names there is no smoothing, and rounding alone would be another recipe."""
    monkeypatch.delitem(ARCHITECTURES, "llama")
    ids = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(UsageError, match="where the layers of a 'llama' lie is not known"):
        quantize_model(FIXTURES / "llama_mha", tmp_path / "out", "lmdeploy-awq", "awq", calib=[[ids, torch.ones_like(ids)]])
    assert not (tmp_path / "out").exists()


def test_a_job_smooths_once() -> None:
    job = replace(Job.of(load("lmdeploy-awq"), "cpu"), anti_outlier=AntiOutlierConfig(anti_method="m4"))
    with pytest.raises(UsageError, match="choose one of them"):
        LayerRun(Blocks.open(FIXTURES / "llama_mha"), job, [])


QUANT = "quant: {w_bit: 4, a_bit: 16, w_sym: false, is_lowbit: true, open_outlier: false, group_size: 128}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('quant: {w_bit: 8, a_bit: 8, mm_tensor: false}\nlmdeploy_awq: {version: "0.1"}\n', "lmdeploy_awq: is for weights alone"),
        (QUANT + 'lmdeploy_awq: {version: "0.5"}\n', "version: '0.5' is not 0.1"),
        (QUANT + "awq: {}\nlmdeploy_awq: {}\n", "smooths by itself"),
        (QUANT + 'lmdeploy_awq: {version: "0.1", search_scale: true}\n', "search_scale: LMDeploy searches since 0.4.2"),
        (QUANT + "lmdeploy_awq: {smooth: false, search_scale: true}\n", "search_scale: is of the scales"),
    ],
)
def test_recipes_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loads(text)
