"""Figures of each linear: those that ``quantize`` prints, and errors of outputs by a plain loop over a whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

import quantize.measure
from convert.cli import app
from formats.errors import RefusedError, UnreadableError, UsageError
from quantize.analyze import analyze_model
from quantize.calibration import calibration_data
from quantize.models import load_model, load_tokenizer
from quantize.plots import draw
from quantize.recipe import loads
from quantize.run import quantize_model


def inputs_of_linears(model: Any, data: list[list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """Each linear's input for every sample, of the whole float model."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, args, name=name: found.setdefault(name, []).append(args[0][0].float()))
    with torch.no_grad():
        for sample in data:
            model(*sample)
    return found


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic", "w4a16-rtn", "w8a8-sparse"])
def test_ranges_and_weight_errors_are_those_of_quantizing(recipe: str, source: Path, calib: Path, tmp_path: Path) -> None:
    """To the last bit, w8a8's smoothing included."""
    found = {linear.name: linear for linear in analyze_model(source, recipe, calib).linears}
    wanted = quantize_model(source, tmp_path / "out", recipe, "msmodelslim", calib=calib)
    assert len(found) == 43
    for layer in wanted.layers:
        mine = found[layer.name]
        assert (mine.kind, mine.weight_error, mine.range_parm) == (layer.kind, layer.weight_error, layer.range_parm)
        assert mine.output_error is not None
        assert 0.001 < mine.output_error < 0.2
    head = found["lm_head"]
    assert (head.kind, head.weight_error, head.output_error) == ("FLOAT", 0.0, None)
    assert head.range_parm is not None


@pytest.mark.parametrize("method", ["m1", "m2", "m4"])
def test_any_smoothing_is_the_whole_models(method: str, source: Path, calib: Path, tmp_path: Path) -> None:
    recipe = loads(f"quant: {{mm_tensor: false}}\nanti_outlier: {{anti_method: {method}}}\ncalibration: {{samples: 6}}")
    found = {linear.name: linear for linear in analyze_model(source, recipe, calib).linears}
    for layer in quantize_model(source, tmp_path / "out", recipe, "compressed-tensors", calib=calib).layers:
        assert (found[layer.name].weight_error, found[layer.name].range_parm) == (layer.weight_error, layer.range_parm)


def test_smoothing_with_names_and_shifts_of_another_architecture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen3")
    data = [[torch.randint(0, 64, (1, 20))] for _ in range(6)]
    quant = "quant: {mm_tensor: false}\nanti_outlier: {anti_method: m4, disable_anti_names: [model.layers.1.mlp.down_proj]}"
    found = analyze_model(tmp_path / "qwen3", loads(quant), data)
    assert len(found.linears) == 15
    assert all(linear.output_error is not None for linear in found.linears if linear.kind == "W8A8")


def test_output_errors_by_a_plain_loop(source: Path, calib: Path) -> None:
    """In float32: static asymmetric inputs by the mean of the samples' extremes, symmetric weights by channel."""
    data = calibration_data(calib, load_tokenizer(source))
    model = load_model(source).float()
    recipe = loads("quant: {mm_tensor: false, act_method: 1, disable_last_linear: false}")
    found = {linear.name: linear for linear in analyze_model(source, recipe, calib, dtype="float32").linears}
    seen = inputs_of_linears(model, data)
    assert found.keys() == seen.keys()
    for name, inputs in seen.items():
        linear: Any = model.get_submodule(name)
        weight, bias = linear.weight.detach(), 0 if linear.bias is None else linear.bias.detach()
        step = weight.abs().amax(1, keepdim=True) / 127
        rounded = (weight / step).round().clamp(-128, 127) * step
        low = min(torch.stack([one.min() for one in inputs]).mean(), torch.tensor(0.0))
        high = max(torch.stack([one.max() for one in inputs]).mean(), torch.tensor(0.0))
        scale = (high - low) / 255
        offset = (-low / scale).round() - 128
        x = torch.cat(inputs)
        xq = (((x / scale + offset).round().clamp(-128, 127)) - offset) * scale
        assert found[name].output_error == pytest.approx(relative(xq @ rounded.T + bias, x @ weight.T + bias), rel=1e-3)
        assert found[name].weight_error == pytest.approx(relative(rounded, weight), rel=1e-4)


def test_output_errors_of_weights_alone_and_of_dynamic_inputs(source: Path, calib: Path) -> None:
    data = calibration_data(calib, load_tokenizer(source))
    model = load_model(source).float()
    seen = inputs_of_linears(model, data)
    names = ("model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj")
    for recipe in ("w8a16", "w8a8-dynamic"):
        found = {linear.name: linear for linear in analyze_model(source, recipe, calib, dtype="float32").linears}
        for name in names:
            linear: Any = model.get_submodule(name)
            weight, bias = linear.weight.detach(), 0 if linear.bias is None else linear.bias.detach()
            step = weight.abs().amax(1, keepdim=True) / 127
            rounded = (weight / step).round() * step
            x = xq = torch.cat(seen[name])
            if recipe == "w8a8-dynamic":  # as msModelSlim simulates it: asymmetric, by token
                low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
                scale = (high - low) / 255
                offset = (-low / scale).round() - 128
                xq = ((x / scale + offset).round().clamp(-128, 127) - offset) * scale
            assert found[name].output_error == pytest.approx(relative(xq @ rounded.T + bias, x @ weight.T + bias), rel=1e-3)


def test_worst_first(source: Path, calib: Path) -> None:
    for rank, field in (("output", "output_error"), ("range", "range_parm"), ("weight", "weight_error")):
        found = analyze_model(source, "w8a8-dynamic", calib, rank=rank).linears
        values = [getattr(linear, field) for linear in found if linear.kind != "FLOAT"]
        assert values == sorted(values, reverse=True)
        assert found[-1].name == "lm_head"
    assert analyze_model(source, "w8a8", calib).rank == "output"
    assert analyze_model(source, "w8a8").rank == "weight"


def test_without_data_errors_of_weights_alone(source: Path, tmp_path: Path) -> None:
    result = analyze_model(source, "w4a16-rtn")
    wanted = {layer.name: layer.weight_error for layer in quantize_model(source, tmp_path / "out", "w4a16-rtn", "msmodelslim").layers}
    assert {linear.name: linear.weight_error for linear in result.linears if linear.kind != "FLOAT"} == wanted
    assert all((linear.range_parm, linear.output_error) == (None, None) for linear in result.linears)
    assert (result.samples, result.notes) == (0, ())
    (note,) = analyze_model(source, "w8a8").notes
    assert note.startswith("the recipe smooths, which needs calibration data")


@pytest.mark.parametrize(
    ("recipe", "note"),
    [
        ("w4a16-gptq", "not by GPTQ"),
        ("w4a16-awq", "are not searched here, as AWQ does"),
        ("lmdeploy-awq", "not smoothed and rounded as LMDeploy does"),
    ],
)
def test_what_a_recipe_does_beyond_rounding_is_said(recipe: str, note: str, source: Path) -> None:
    (found,) = analyze_model(source, recipe).notes
    assert note in found


def test_what_a_recipe_leaves_in_float_and_experts_that_nothing_reaches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    found = {linear.name: linear for linear in analyze_model(tmp_path / "moe", "w8a8-dynamic", [[torch.tensor([[5, 6]])]]).linears}
    experts = [linear for name, linear in found.items() if ".experts." in name]
    reached = [linear for linear in experts if linear.output_error is not None]
    assert 2 * 3 <= len(reached) <= 4 * 3 < len(experts)
    assert all((linear.range_parm is None) == (linear.output_error is None) for linear in experts)
    assert {name for name, linear in found.items() if linear.kind == "FLOAT"} == {
        "model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head",
    }  # fmt: skip
    assert found["model.layers.0.mlp.gate"].range_parm is not None


def test_states_in_files_change_nothing(source: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = analyze_model(source, "w8a8", calib)
    monkeypatch.setattr(quantize.measure, "IN_MEMORY", 0)
    assert analyze_model(source, "w8a8", calib, work_dir=tmp_path).linears == wanted.linears
    assert list(tmp_path.iterdir()) == []


def test_the_picture(source: Path, calib: Path, tmp_path: Path) -> None:
    result = analyze_model(source, "w8a8", calib, plot=tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    figure = draw([linear for linear in result.linears if linear.kind != "FLOAT"])
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "range_parm of the input", "relative error of the weight", "relative error of the output",
    ]  # fmt: skip
    shown = {value for line in figure.axes[2].get_lines() for value in line.get_ydata()}
    assert shown == {linear.output_error for linear in result.linears} - {None}
    assert [axes.get_ylabel() for axes in draw(analyze_model(source, "w8a8").linears).axes] == ["relative error of the weight"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"rank": "size"}, UsageError, "rank: 'size' is not one of output, range, weight"),
        ({"rank": "output"}, UsageError, "of which only weight needs no calibration data"),
        ({"plot": "p.pdf"}, UsageError, r"p\.pdf: wanted a name that ends in"),
        ({"recipe": "w9a9"}, UsageError, "there is no such file"),
        ({"dtype": "int8"}, UsageError, "--dtype int8"),
        ({"model_dir": "nowhere"}, UnreadableError, "there is no such file or folder"),
        ({"recipe": loads("quant: {disable_names: [model.layers.9.up]}")}, UsageError, "'model.layers.9.up' is no linear of this model"),
        ({"recipe": loads("quant: {w_method: NF, w_bit: 4, a_bit: 16}")}, UsageError, "w_method='NF' .* is not supported"),
        ({"recipe": loads("quant: {w_bit: 4, a_bit: 16, is_lowbit: true, open_outlier: false, group_size: 256}")}, UsageError, "x"),
    ],
)
def test_arguments_that_make_no_sense(change: dict[str, Any], error: type[Exception], words: str, source: Path, tmp_path: Path) -> None:
    if words == "x":  # 96 inputs are no groups of 256
        torch.manual_seed(0)
        small = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
        LlamaForCausalLM(small).save_pretrained(tmp_path / "llama")
        source, words = tmp_path / "llama", "64 inputs are not whole groups of 256"
    with pytest.raises(error, match=words):
        analyze_model(**{"model_dir": source, **change})


def test_folders_that_cannot_be_analyzed(source: Path, tmp_path: Path) -> None:
    quantize_model(source, tmp_path / "out", "w8a16", "gptq")
    with pytest.raises(RefusedError, match="out: is gptq, quantized already; analyze the float model"):
        analyze_model(tmp_path / "out")
    shutil.copytree(source, tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(tensors, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnreadableError, match=r"model\.layers\.3\.mlp\.up_proj: its weight has NaN"):
        analyze_model(tmp_path / "bad")


def test_the_command_line(source: Path, calib: Path, tmp_path: Path) -> None:
    def invoke(*args: object) -> Any:
        return CliRunner().invoke(app, ["analyze", *map(str, (source, *args))])

    wanted = analyze_model(source, "w8a8", calib)
    said = invoke("--calib", calib, "--top", 3, "--plot", tmp_path / "p.svg")
    assert said.exit_code == 0, said.output
    assert (tmp_path / "p.svg").is_file()
    for number, linear in enumerate(wanted.linears[:4]):
        assert (linear.name in said.stdout) == (number < 3)
    assert f"{wanted.linears[0].output_error:.4f}" in said.stdout
    assert "and 40 more" in said.stdout
    found = json.loads(invoke("--calib", calib, "--json").stdout)
    assert found["linears"] == [linear.to_json() for linear in wanted.linears]
    assert (found["rank"], found["samples"], found["recipe"]["name"]) == ("output", 12, "w8a8")
    said = invoke("--rank", "range")
    assert (said.exit_code, said.stdout, said.stderr.count("\n")) == (2, "", 1)
