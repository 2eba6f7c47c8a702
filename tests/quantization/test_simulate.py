"""What a folder computes: as the real tools simulate it, and as plain code does, down to the last bits of the logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from checkpoints import change_json
from safetensors.torch import load_file, save_file

import convert
from formats import Location, open_checkpoint
from formats.errors import UnreadableError
from quantize.blocks import advance
from quantize.measure import Served
from quantize.recipe import loads
from quantize.run import quantize_model
from quantize.simulate import Simulation

FIXTURES = Path(__file__).parents[2] / "fixtures"
MSMODELSLIM = load_file(FIXTURES / "msmodelslim_w8_logits.safetensors")
COMPRESSED = load_file(FIXTURES / "compressed_tensors_logits.safetensors")
IDS = torch.arange(3, 43)


def logits(served: Served, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary], one layer at a time, rounded as the folder says."""
    simulation = served.simulation
    assert simulation is not None
    states = served.blocks.begin([[ids[None]]])
    for layer in range(len(served.blocks)):
        with torch.no_grad(), served.blocks.stage(layer) as model, simulation.on(model):
            advance(model, states, [[ids[None]]])
    (found,) = served.blocks.logits(states)
    simulation.check()
    return found


def opened(folder: Path, base: Path | None = None) -> Served:
    return Served.open(open_checkpoint(Location.of(folder, base=None if base is None else Location.of(base))), torch.float32)


# --- the real tools ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(MSMODELSLIM) - {"input_ids"}))
def test_msmodelslims_own_simulation(name: str) -> None:
    base = FIXTURES / "compressed_tensors" / ("src_qwen2_bf16" if name == "w8a8_static_bf16" else "src_llama_fp16")
    served = opened(FIXTURES / "msmodelslim_w8" / name, base)
    found = logits(served, MSMODELSLIM["input_ids"])
    torch.testing.assert_close(found, MSMODELSLIM[name], rtol=1e-4, atol=1e-4)
    served.simulation.inputs.clear()  # type: ignore[union-attr]
    assert (logits(served, MSMODELSLIM["input_ids"]) - MSMODELSLIM[name]).abs().max() > 0.01


@pytest.mark.parametrize("name", sorted(set(COMPRESSED) - {"input_ids"}))
def test_compressed_tensors_own_simulation(name: str) -> None:
    served = opened(FIXTURES / "compressed_tensors" / name)
    simulation = served.simulation
    assert simulation is not None
    for facts in simulation.inputs.values():
        if facts["element"] == "int" and facts["dynamic"]:
            facts["steps"] = 127.5  # of the tool's own; engines have 127
    torch.testing.assert_close(logits(served, COMPRESSED["input_ids"]), COMPRESSED[name], rtol=1e-4, atol=1e-4)
    assert bool(simulation.attention) == ("kv" in name)
    assert bool(simulation.inputs) == ("kv_fp8_head" not in name)
    simulation.attention.clear()
    simulation.inputs.clear()
    assert (logits(served, COMPRESSED["input_ids"]) - COMPRESSED[name]).abs().max() > 0.01


# --- plain code -------------------------------------------------------------------------------------------------------


def stored(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    (weights,) = folder.glob("*.safetensors")
    return load_file(weights), json.loads((folder / "config.json").read_text())


def quantized(source: Path, calib: Path, out: Path, quant: str, to: str, more: str = "") -> Path:
    quantize_model(source, out, loads(f"quant: {{mm_tensor: false, {quant}}}\n{more}"), to, calib=calib)
    return out


def times(tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """x W^T + b of an int8 layer or a float one, as both formats store them."""
    weight = tensors[f"{name}.weight"].float()
    if f"{name}.weight_scale" in tensors:
        offset = tensors.get(f"{name}.weight_offset", torch.zeros(1)).float()
        weight = (weight - offset) * tensors[f"{name}.weight_scale"].float()
    bias = tensors.get(f"{name}.bias")
    return x @ weight.T + (0 if bias is None else bias.float())


def assert_same(found: torch.Tensor, wanted: torch.Tensor, unrounded: torch.Tensor) -> None:
    """Equal but for a code here and there: sums in another order put what lies between two codes on the other side."""
    apart, effect = (found - wanted).norm(), (unrounded - wanted).norm()
    assert effect > 0.5
    assert apart < 0.2 * effect, (float(apart), float(effect))
    assert (found - wanted).abs().median() < 1e-3


def test_static_inputs_of_msmodelslim(source: Path, calib: Path, tmp_path: Path) -> None:
    """Asymmetric: the offset is added to codes."""
    tensors, config = stored(folder := quantized(source, calib, tmp_path / "out", "act_method: 1", "msmodelslim"))

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return times(tensors, name, plain.int8(x, tensors[f"{name}.input_scale"].float(), tensors[f"{name}.input_offset"].float()))

    assert any(tensors[name].any() for name in tensors if name.endswith("input_offset"))
    unrounded = plain.decode(tensors, config, IDS, lambda name, x: times(tensors, name, x))
    assert_same(logits(opened(folder), IDS), plain.decode(tensors, config, IDS, linear), unrounded)


def test_static_inputs_of_compressed_tensors(source: Path, calib: Path, tmp_path: Path) -> None:
    tensors, config = stored(folder := quantized(source, calib, tmp_path / "out", "act_method: 3", "compressed-tensors"))

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        zero = tensors.get(f"{name}.input_zero_point", torch.zeros(1)).float()
        return times(tensors, name, plain.int8(x, tensors[f"{name}.input_scale"].float(), zero))

    unrounded = plain.decode(tensors, config, IDS, lambda name, x: times(tensors, name, x))
    assert_same(logits(opened(folder), IDS), plain.decode(tensors, config, IDS, linear), unrounded)


@pytest.mark.parametrize("to", ["msmodelslim", "compressed-tensors"])
def test_dynamic_inputs(to: str, source: Path, calib: Path, tmp_path: Path) -> None:
    tensors, config = stored(folder := quantized(source, calib, tmp_path / "out", "is_dynamic: true", to))
    wanted = plain.decode(tensors, config, IDS, lambda name, x: times(tensors, name, plain.by_token(x)))
    assert_same(logits(opened(folder), IDS), wanted, plain.decode(tensors, config, IDS, lambda name, x: times(tensors, name, x)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_int8_kv_cache_of_msmodelslim(symmetric: bool, source: Path, calib: Path, tmp_path: Path) -> None:
    """Weights of 8 bits, so that what keys and values are rounded to is not drowned."""
    more = f"kv_quant: {{kv_sym: {str(symmetric).lower()}}}\n"
    folder = quantized(source, calib, tmp_path / "out", "a_bit: 16, w_bit: 8", "msmodelslim", more)
    tensors, config = stored(folder)

    def rounded(attention: str, one: str, states: torch.Tensor) -> torch.Tensor:
        if one == "q":
            return states
        heads, tokens, size = states.shape
        scale, offset = (tensors[f"{attention}.{one}_proj.kv_cache_{part}"].float() for part in ("scale", "offset"))
        flat = states.transpose(0, 1).reshape(tokens, heads * size)
        codes = torch.clamp(torch.round(flat / scale + offset), -128, 127)
        return ((codes - offset) * scale).reshape(tokens, heads, size).transpose(0, 1)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return times(tensors, name, x)

    wanted, unrounded = (plain.decode(tensors, config, IDS, linear, states) for states in (rounded, None))
    assert_same(logits(opened(folder), IDS), wanted, unrounded)
    if symmetric:
        convert.convert(folder, tmp_path / "again", "msmodelslim:ascendv1")
        assert_same(logits(opened(tmp_path / "again"), IDS), wanted, unrounded)


def test_eight_bit_attention_by_head(source: Path, calib: Path, tmp_path: Path) -> None:
    """FA3: queries, keys and values."""
    folder = quantized(source, calib, tmp_path / "out", "a_bit: 16, w_bit: 8", "msmodelslim", "fa_quant: {fa_amp: 0}\n")
    tensors, config = stored(folder)

    def rounded(attention: str, one: str, states: torch.Tensor) -> torch.Tensor:
        return plain.int8(states, tensors[f"{attention}.fa_{one}.scale"].float().reshape(-1, 1, 1))

    wanted, unrounded = (plain.decode(tensors, config, IDS, lambda name, x: times(tensors, name, x), one) for one in (rounded, None))
    assert_same(logits(opened(folder), IDS), wanted, unrounded)


def test_w8a8_mix_by_its_static_scales() -> None:
    folder, base = FIXTURES / "msmodelslim_w8" / "w8a8_pdmix_ascendv1_bf16", FIXTURES / "compressed_tensors" / "src_qwen2_bf16"
    served = opened(folder, base)
    (weights,) = folder.glob("*.safetensors")
    tensors, config = load_file(weights), json.loads((base / "config.json").read_text())
    kinds = json.loads(next(folder.glob("quant_model_description*.json")).read_text())

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        kind = kinds[f"{name}.weight"]
        if kind == "W8A8_MIX":
            x = plain.int8(x, tensors[f"{name}.input_scale"].float(), tensors[f"{name}.input_offset"].float())
        elif kind == "W8A8_DYNAMIC":
            x = plain.by_token(x)
        return times(tensors, name, x)

    mixed = sum(kind == "W8A8_MIX" and name.endswith(".weight") for name, kind in kinds.items())
    assert mixed
    assert f"{mixed} layers are W8A8_MIX: their inputs are rounded by the static scales" in served.simulation.notes  # type: ignore[union-attr]
    unrounded = plain.decode(tensors, config, IDS, lambda name, x: times(tensors, name, x))
    assert_same(logits(served, IDS), plain.decode(tensors, config, IDS, linear), unrounded)


# --- what is not simulated, or wrong ----------------------------------------------------------------------------------


def test_what_is_not_simulated_is_said() -> None:
    found = Simulation(open_checkpoint(FIXTURES / "compressed_tensors" / "nvfp4_bf16"))
    (note,) = found.notes
    assert note.startswith("the inputs of 7 layers are not rounded, as their scheme is not simulated: model.layers.0.")
    assert not found.inputs
    assert Simulation(open_checkpoint(FIXTURES / "compressed_tensors" / "w4a16_g128_sym_bf16")).notes == ()


def test_a_cache_scale_without_a_scheme_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(FIXTURES / "compressed_tensors" / "fp8_dynamic_kv_fp8_fp16", folder)
    change_json(folder / "config.json", lambda config: config["quantization_config"].update(kv_cache_scheme=None))
    found = Simulation(open_checkpoint(folder))
    assert found.notes == ("2 tensors of quantized attention are not simulated: model.layers.0.self_attn.k_scale",)
    assert not found.attention


def test_scales_that_cannot_be(tmp_path: Path) -> None:
    folder, base = tmp_path / "out", FIXTURES / "compressed_tensors" / "src_qwen2_bf16"
    shutil.copytree(FIXTURES / "msmodelslim_w8" / "w8a8_c8_sym_bf16", folder)
    (weights,) = folder.glob("*.safetensors")
    weights.chmod(0o600)
    tensors = load_file(weights)
    name = "model.layers.0.self_attn.k_proj.kv_cache_scale"
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, weights)
    with pytest.raises(UnreadableError, match=r"k_proj\.kv_cache_scale: wanted positive numbers, as many as offsets"):
        opened(folder, base)
    for part in ("scale", "offset"):
        tensors[f"model.layers.0.self_attn.k_proj.kv_cache_{part}"] = torch.ones(3)
    save_file(tensors, weights)
    with pytest.raises(UnreadableError, match=r"kv_cache_scale: has 3 scales for \d heads of \d+; they are of another model"):
        logits(opened(folder, base), IDS)


def test_a_folder_whose_modules_the_model_does_not_call() -> None:
    served = opened(FIXTURES / "compressed_tensors" / "fp8_dynamic_kv_fp8_fp16")
    simulation = served.simulation
    assert simulation is not None
    for what, kind in ((simulation.attention, "keys and values"), (simulation.inputs, "inputs")):
        other = Simulation(served.blocks.weights.checkpoint)  # type: ignore[union-attr]
        mine = other.attention if what is simulation.attention else other.inputs
        name = "model.layers.0.self_attn" if kind != "inputs" else "model.layers.0.mlp.up_proj"
        mine["model.layers.0.other"] = mine.pop(name)  # type: ignore[index, assignment]
        other._waiting = {*other.inputs, *other.attention}
        with pytest.raises(UnreadableError, match=rf"layers\.0\.other: its {kind} are quantized in fp8_dynamic_kv_fp8_fp16, and the model"):
            logits(Served(served.blocks, other), IDS)
