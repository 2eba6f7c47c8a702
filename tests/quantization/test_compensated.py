"""GPTQ and AWQ through a whole model: what each step sees, and that a folder holds what was compensated for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import convert
from formats import open_checkpoint
from formats.errors import RefusedError, UnreadableError, UsageError
from formats.ir import dequantize
from quantize.calibration import calibration_data
from quantize.calibrator import Calibrator
from quantize.compensated import groups_by_input
from quantize.config import QuantConfig
from quantize.gptq import Hessian, round_gptq
from quantize.methods import Gptq
from quantize.models import load_model, load_tokenizer
from quantize.recipe import loads
from quantize.run import quantize_model

GROUPS = "w_bit: 4, a_bit: 16, is_lowbit: true, open_outlier: false, group_size: 64"
GPTQ = f"quant: {{{GROUPS}, w_method: GPTQ}}\n"
AWQ = f"quant: {{{GROUPS}, w_sym: false}}\nawq: {{}}\n"
RTN = f"quant: {{{GROUPS}}}\n"
SEQUENCE = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def samples(source: Path, calib: Path) -> list[Any]:
    return calibration_data(calib, load_tokenizer(source))


def small_llama(folder: Path, **more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=64, **more,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float()
    model.save_pretrained(folder)
    return model.eval()


def random_samples(vocabulary: int = 128, count: int = 8) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(0, vocabulary, (1, 40), generator=generator)] for _ in range(count)]


@pytest.mark.parametrize("sequential", [True, False])
def test_gptq_sees_what_the_rounded_layers_before_make(sequential: bool, tmp_path: Path) -> None:
    """Against a plain loop over the whole model, whose weights are replaced one group after the other."""
    model, data = small_llama(tmp_path / "llama"), random_samples()
    result = quantize_model(
        tmp_path / "llama",
        tmp_path / "out",
        loads(f"{GPTQ}gptq: {{true_sequential: {str(sequential).lower()}}}"),
        "compressed-tensors",
        calib=data,
    )
    found = open_checkpoint(tmp_path / "out")
    groups = SEQUENCE if sequential else (tuple(name for names in SEQUENCE for name in names),)
    for index in range(2):
        for names in groups:
            linears: dict[str, nn.Linear] = {name: model.get_submodule(f"model.layers.{index}.{name}") for name in names}
            hessians = {name: Hessian(linear.in_features) for name, linear in linears.items()}
            hooks = [
                linear.register_forward_pre_hook(lambda module, args, hessian=hessians[name]: hessian.add(args[0]))
                for name, linear in linears.items()
            ]
            with torch.no_grad():
                for sample in data:
                    model(*sample)
            for hook in hooks:
                hook.remove()
            for name, linear in linears.items():
                rounded = round_gptq(name, linear.weight.detach(), hessians[name], 4, True, 64, Gptq(), torch.float16)
                layer = found.layer(f"model.layers.{index}.{name}")
                torch.testing.assert_close(torch.from_numpy(dequantize(layer)), rounded.fake.float(), rtol=0, atol=0)
                linear.weight.data = rounded.fake
    assert len(result.layers) == 14


@pytest.mark.parametrize("text", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_they_beat_rounding_to_nearest(text: str, source: Path, calib: Path, tmp_path: Path) -> None:
    """On the calibration data, where they must: mean square error of the last hidden states."""
    floats, data = load_model(source).float(), samples(source, calib)
    errors = []
    for number, recipe in enumerate((RTN, text)):
        quantize_model(source, tmp_path / f"out{number}", loads(recipe), "compressed-tensors", calib=calib)
        convert.convert(tmp_path / f"out{number}", tmp_path / f"dense{number}", "dense", scale_dtype="keep")
        made = load_model(tmp_path / f"dense{number}").float()
        with torch.no_grad():
            pairs = [(floats.model(*sample).last_hidden_state, made.model(*sample).last_hidden_state) for sample in data]
        errors.append(sum(float((wanted - found).square().sum()) for wanted, found in pairs))
    assert errors[1] < 0.8 * errors[0]


def test_the_calibrator_compensates_in_place(source: Path, calib: Path, tmp_path: Path) -> None:
    config = QuantConfig(w_bit=4, a_bit=16, w_method="GPTQ", is_lowbit=True, open_outlier=False, group_size=64)
    model, data = load_model(source), samples(source, calib)
    calibrator = Calibrator(model, config, data)
    calibrator.run()
    calibrator.save(tmp_path / "saved", save_type="safe_tensor")
    quantize_model(source, tmp_path / "out", loads(GPTQ), "msmodelslim", calib=calib)
    name = "quant_model_weight_w4a16.safetensors"
    saved, written = load_file(tmp_path / "saved" / name), load_file(tmp_path / "out" / name)
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[tensor], written[tensor]) for tensor in saved)
    convert.convert(tmp_path / "out", tmp_path / "dense", "dense")
    dense = load_model(tmp_path / "dense")
    with torch.no_grad():
        wanted, found = (one(*data[0]).logits.float() for one in (dense, model))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.1)
    assert calibrator.float_names == ["lm_head"]


def test_files_hold_what_was_compensated_for(source: Path, calib: Path, tmp_path: Path) -> None:
    """msModelSlim's own per-group GPTQ rounds the float weights again when it saves: most of its codes are rounding to nearest's."""
    part = "model.layers.3.mlp.down_proj.weight"
    weight = load_file(source / "model.safetensors")[part].float()

    def share_of_nearest(name: str, text: str) -> float:
        """How many codes are what rounding the float weight by the file's own scales gives."""
        quantize_model(source, tmp_path / name, loads(text), "msmodelslim", calib=calib)
        found = load_file(tmp_path / name / "quant_model_weight_w4a16.safetensors")
        scale = found[part.replace("weight", "weight_scale")].float().unsqueeze(-1)
        nearest = torch.round(weight.reshape(len(weight), -1, 64) / scale).clamp(-8, 7).reshape(weight.shape)
        return float((found[part] == nearest).float().mean())

    assert share_of_nearest("rtn", RTN) > 0.99
    assert share_of_nearest("gptq", GPTQ) < 0.9


@pytest.mark.parametrize("text", [GPTQ, AWQ, GPTQ + "gptq: {act_order: true, static_groups: true}\n"], ids=["gptq", "awq", "static groups"])
@pytest.mark.parametrize("to", ["gptq:v2", "awq", "compressed-tensors"])
def test_straight_or_through_msmodelslim_is_the_same(text: str, to: str, source: Path, calib: Path, tmp_path: Path) -> None:
    straight = quantize_model(source, tmp_path / "straight", loads(text), to, calib=calib)
    quantize_model(source, tmp_path / "ms", loads(text), "msmodelslim", calib=calib)
    convert.convert(tmp_path / "ms", tmp_path / "converted", to, base_model=source)
    found = convert.fingerprint(tmp_path / "converted").digest
    assert found == convert.fingerprint(tmp_path / "straight").digest
    assert straight.written.target_fingerprint is not None
    assert found == straight.written.target_fingerprint.digest


def test_act_order_over_moving_groups_needs_a_format_with_an_index(source: Path, calib: Path, tmp_path: Path) -> None:
    text = GPTQ + "gptq: {act_order: true}\n"
    quantize_model(source, tmp_path / "out", loads(text), "gptq", calib=calib)
    layer = open_checkpoint(tmp_path / "out").layer("model.layers.0.self_attn.q_proj")
    assert layer.g_idx is not None
    assert sorted(layer.g_idx.tolist()) == [index // 64 for index in range(256)]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    with pytest.raises(RefusedError, match="act"):
        quantize_model(source, tmp_path / "ms", loads(text), "msmodelslim", calib=calib)
    assert not (tmp_path / "ms").exists()


def test_awq_scales_preserve_the_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose value heads are not shared: all four subgraphs are scaled, and the folder's norms show it."""
    model, data = small_llama(tmp_path / "llama"), random_samples()
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[5] *= 30
        layer.self_attn.q_proj.weight.data[:, 5] /= 30
        layer.self_attn.k_proj.weight.data[:, 5] /= 30
        layer.self_attn.v_proj.weight.data[:, 5] /= 30
    model.save_pretrained(tmp_path / "llama")
    eight = loads("quant: {w_bit: 8, a_bit: 16, is_lowbit: true, open_outlier: false, group_size: 64, w_sym: false}\nawq: {clip: false}\n")
    quantize_model(tmp_path / "llama", tmp_path / "out", eight, "compressed-tensors", calib=data)
    convert.convert(tmp_path / "out", tmp_path / "dense", "dense", scale_dtype="keep")
    made = load_model(tmp_path / "dense").float()
    assert not torch.allclose(made.model.layers[0].input_layernorm.weight, model.model.layers[0].input_layernorm.weight)
    with torch.no_grad():
        wanted, found = model(*data[0]).logits, made(*data[0]).logits
    assert (wanted - found).norm() / wanted.norm() < 0.02


def test_linears_of_one_input_belong_together() -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        moe_intermediate_size=128, head_dim=32, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    linears = {name: module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    with torch.no_grad():
        groups = groups_by_input(model.model, linears, {"input_ids": torch.tensor([[5]])})  # one token: two experts see nothing
    names = [sorted({name.rpartition(".")[2] for name in group}) for group in groups]
    assert names == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [len(group) for group in groups] == [3, 1, 1, 8, 4]


@pytest.mark.parametrize("text", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_an_expert_without_tokens_is_said(text: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        moe_intermediate_size=128, head_dim=32, num_experts=16, num_experts_per_tok=1, max_position_embeddings=64,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "moe")
    recipe = loads(text + 'mix_cfg: {"*.gate": float}\n')
    with pytest.raises(UnreadableError, match=r"experts\.\d+\..*no calibration sample reached this layer"):
        quantize_model(tmp_path / "moe", tmp_path / "out", recipe, "compressed-tensors", calib=[[torch.tensor([[1, 2]])]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe"]
    quantize_model(tmp_path / "moe", tmp_path / "out", recipe, "compressed-tensors", calib=random_samples(count=20))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"quant: {{{GROUPS}}}\ngptq: {{}}\n", r"line 2: gptq: w_method is 'MinMax'; write GPTQ there"),
        (GPTQ + "gptq: {act_order: true, act_group_aware: true}\n", r"line 2: gptq\.act_group_aware: act_order already sorts"),
        (GPTQ + "gptq: {block_size: 0}\n", r"line 2: gptq\.block_size: 0 is less than 1"),
        (GPTQ + "gptq: {actorder: true}\n", r"gptq\.actorder: there is no such key; did you mean act_order"),
        ("quant: {mm_tensor: false}\nawq: {}\n", r"line 2: awq: is for weights alone"),
        (AWQ.replace("{}", "{max_shrink: 2}"), r"awq\.max_shrink: 2\.0 is not between"),
    ],
)
def test_settings_that_make_no_sense(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        loads(text)


def test_they_need_data(source: Path, tmp_path: Path) -> None:
    for name in ("w4a16-gptq", "w4a16-awq"):
        with pytest.raises(UsageError, match="needs calibration data"):
            quantize_model(source, tmp_path / "out", name, "gptq")
