"""The calibrator: files of the real msModelSlim, layers that stay float, the model it leaves behind, bad input."""

from __future__ import annotations

import logging

import goldens
import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from formats.errors import UnreadableError, UsageError
from quantize import Calibrator, QuantConfig
from quantize.fake import FakeQuantLinear

CASES = sorted(
    folder
    for folder in goldens.W8_FAMILY.iterdir()
    if (folder / "golden_case.json").exists() and not goldens.case_of(folder)["anti"] and not list(folder.glob("*.npy"))
)
LLAMA, QWEN = goldens.SOURCES / "src_llama_fp16", goldens.SOURCES / "src_qwen2_bf16"


def calibrated(source=LLAMA, config=None, dtype=None, **options):
    model = goldens.load_model(source, dtype)
    options.setdefault("calib_data", goldens.samples())
    calibrator = Calibrator(model, config or QuantConfig(mm_tensor=False), **options)
    calibrator.run()
    return calibrator


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_calibration_agrees_with_the_tools_files(folder):
    """Input scales come out of matrix products, which CPUs round differently: within 1 % here, equal in the live comparison."""
    case = goldens.case_of(folder)
    config = QuantConfig(**case["quant_config"])
    if "kv_sym" in case["opt"]:
        config = config.kv_quant(kv_sym=case["opt"]["kv_sym"])
    model = goldens.load_model(goldens.source_of(folder), goldens.dtype_of(folder))
    calibrator = Calibrator(model, config, calib_data=goldens.samples(), mix_cfg=case["opt"].get("mix_cfg"))
    calibrator.run()
    want, kinds = goldens.stored(folder), goldens.quantized(folder)
    assert {name: layer.kind for name, layer in calibrator.layers.items()} == {
        name: kind.replace("W8A8_MIX", "W8A8") for name, kind in kinds.items()
    }
    for name, layer in calibrator.layers.items():
        assert torch.equal(layer.codes, goldens.unpacked(want[f"{name}.weight"], layer.codes.shape)), name
        if layer.input_scale is not None:
            for field, bound in (("input_scale", {"rtol": 0.01, "atol": 0}), ("input_offset", {"rtol": 0, "atol": 1})):
                torch.testing.assert_close(getattr(layer, field), want[f"{name}.{field}"], **bound)
    assert set(calibrator.kv_cache) == {name for name in want if ".kv_cache_" in name}
    for name, tensor in calibrator.kv_cache.items():
        bound = {"rtol": 0.01, "atol": 0} if name.endswith("scale") else {"rtol": 0, "atol": 1}
        torch.testing.assert_close(tensor, want[name], **bound)


def test_the_model_left_behind_computes_with_what_was_stored():
    calibrator = calibrated()
    name = "model.layers.0.self_attn.q_proj"
    linear, layer = calibrator.model.get_submodule(name), calibrator.layers[name]
    assert isinstance(linear, FakeQuantLinear)
    weight = ((layer.codes - layer.weight_offset) * layer.weight_scale).half()
    assert torch.equal(linear.weight, weight)
    values = torch.randn(1, 3, linear.in_features, generator=torch.Generator().manual_seed(0)).half()
    codes = torch.round(values / layer.input_scale + layer.input_offset).clamp(-128, 127)
    rounded = (codes - layer.input_offset) * layer.input_scale
    assert torch.equal(linear(values), torch.nn.functional.linear(rounded, weight, linear.bias))
    integers = codes.float() @ layer.codes.float().T  # and as an NPU computes it
    npu = (integers + layer.quant_bias) * layer.deq_scale
    torch.testing.assert_close(npu.half(), linear(values), rtol=0.02, atol=0.02)


def test_generation_after_run():
    calibrator = calibrated(QWEN, QuantConfig(mm_tensor=False).kv_quant())
    ids = goldens.samples()[0][0][:, :8]
    out = calibrator.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 12)


def test_the_cache_holds_rounded_keys_and_values():
    calibrator = calibrated(QWEN, QuantConfig(mm_tensor=False).kv_quant())
    plain = calibrated(QWEN)
    ids = goldens.samples()[0][0][:, :8]
    with torch.no_grad():
        caches = [one.model(ids, use_cache=True).past_key_values for one in (calibrator, plain)]
    name = "model.layers.0.self_attn.k_proj"
    scale = calibrator.kv_cache[f"{name}.kv_cache_scale"]
    held, float_keys = (cache.layers[0].keys.transpose(1, 2).flatten(2) for cache in caches)
    assert torch.equal(held, (torch.round(float_keys / scale).clamp(-128, 127) * scale).to(held.dtype))
    assert not torch.equal(held, float_keys)
    with torch.no_grad():  # later calls see the rounded ones, once rounded
        again = calibrator.model(ids[:, :1], past_key_values=caches[0], use_cache=True).past_key_values
    assert torch.equal(again.layers[0].keys[:, :, :8].transpose(1, 2).flatten(2), held)


def test_disable_level_takes_the_wildest():
    plain = calibrated()
    levelled = calibrated(disable_level="L3")
    assert levelled.range_parm == plain.range_parm
    wild = sorted((name for name in plain.layers), key=lambda name: -plain.range_parm[name])[:3]
    assert sorted(set(plain.layers) - set(levelled.layers)) == sorted(wild)
    assert levelled.float_names == [name for name in plain.range_parm if name in {*wild, "lm_head"}]
    assert not calibrated(disable_level="L99").layers


def test_lowbit_disable_level_takes_the_largest_inputs_and_leaves_them_float():
    config = QuantConfig(w_bit=4, is_lowbit=True, fraction=0.05)
    source = goldens.load_model(LLAMA)
    calibrator = calibrated(config=config, disable_level="L2")
    assert len(calibrator.float_names) == 3
    for name in calibrator.float_names:
        assert type(calibrator.model.get_submodule(name)) is nn.Linear
        assert torch.equal(calibrator.model.get_submodule(name).weight, source.get_submodule(name).weight)


def test_the_log_says_each_layers_range_parm(caplog):
    caplog.set_level(logging.INFO, "quantize")
    calibrator = calibrated(config=QuantConfig(mm_tensor=False, act_method=3))
    name = "model.layers.0.mlp.down_proj"
    assert f"use histogram observer:{name}.quant_input, range_parm:{calibrator.range_parm[name]}" in caplog.text


def test_progress_counts_layers_and_samples():
    calibrator = Calibrator(goldens.load_model(LLAMA), QuantConfig(mm_tensor=False), calib_data=goldens.samples())
    calls = []
    calibrator.run(progress=lambda *call: calls.append(call))
    assert calls == [("layers", done, 7) for done in range(1, 8)] + [("samples", done, 4) for done in range(1, 5)]
    assert all(0 < layer.weight_error < 0.02 for layer in calibrator.layers.values())


def test_names_and_patterns():
    name = "model.layers.0.self_attn.o_proj"
    calibrator = calibrated(config=QuantConfig(mm_tensor=False, disable_names=[name], disable_last_linear=False))
    assert calibrator.float_names == [name]
    mix = {"*.mlp.*": "w8a8_dynamic", "*": "w8a16", name: "float"}
    kinds = {name: layer.kind for name, layer in calibrated(mix_cfg=mix).layers.items()}
    assert set(kinds.values()) == {"W8A8_DYNAMIC", "W8A16"}
    assert name not in kinds
    assert kinds["model.layers.0.mlp.up_proj"] == "W8A8_DYNAMIC"


def test_without_data():
    for config in (QuantConfig(is_dynamic=True, mm_tensor=False), QuantConfig(a_bit=16), QuantConfig(w_bit=4, a_bit=16, w_method="HQQ")):
        calibrator = calibrated(config=config, calib_data=None)
        with torch.no_grad():
            assert torch.isfinite(calibrator.model(goldens.samples()[0][0]).logits).all()
    for config in (QuantConfig(), QuantConfig(a_bit=16).kv_quant()):
        with pytest.raises(UsageError, match="calib_data"):
            calibrated(config=config, calib_data=[])
    with pytest.raises(UsageError, match="needs samples"):
        calibrated(config=QuantConfig(a_bit=16), calib_data=[], mix_cfg={"*": "w8a8"})


def test_repeated_samples_are_warned_about(caplog):
    one = goldens.samples()[0]
    calibrated(calib_data=[one, one, goldens.samples()[1]])
    assert "1 of 3 samples repeat" in caplog.text


def test_dict_samples_are_keywords():
    data = [{"input_ids": ids, "attention_mask": mask} for ids, mask in goldens.samples()]
    scales = [calibrated(calib_data=one).layers["model.layers.0.mlp.up_proj"].input_scale for one in (data, goldens.samples())]
    assert torch.equal(*scales)


def moe():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=1, max_position_embeddings=64,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def test_an_expert_that_saw_no_token_is_named():
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(UnreadableError, match=r"mlp\.experts\.\d\.\w+_proj: no calibration sample reached"):
        Calibrator(moe(), QuantConfig(mm_tensor=False), calib_data=[[ids, torch.ones_like(ids)]]).run()
    dynamic = Calibrator(moe(), QuantConfig(mm_tensor=False, is_dynamic=True), calib_data=[[ids, torch.ones_like(ids)]])
    dynamic.run()  # needs no input scales
    assert len(dynamic.layers) == 4 + 1 + 4 * 3


def test_weights_that_are_not_finite_are_named_before_anything_changes():
    model = goldens.load_model(LLAMA)
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight[3, 3] = float("nan")
    with pytest.raises(UnreadableError, match=r"model\.layers\.0\.mlp\.up_proj"):
        Calibrator(model, QuantConfig(), calib_data=goldens.samples())
    assert not any(isinstance(module, FakeQuantLinear) for module in model.modules())


def test_activations_that_are_not_finite_are_named():
    model = goldens.load_model(LLAMA)
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[0] = float("inf")
    with pytest.raises(UnreadableError, match=r"model\.layers\.0\.mlp\.(gate|up)_proj: its input"):
        Calibrator(model, QuantConfig(), calib_data=goldens.samples()).run()


def test_groups_that_do_not_divide_are_named():
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 8))
    with pytest.raises(UsageError, match="0: 96 inputs are not whole groups of 64"):
        Calibrator(model, QuantConfig(w_bit=4, a_bit=16, is_lowbit=True, open_outlier=False))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"disable_level": "L01"}, "disable_level"),
        ({"disable_level": 3}, "disable_level"),
        ({"config": QuantConfig(disable_names=["model.layers.9.mlp.up_proj"])}, r"model\.layers\.9"),
        ({"mix_cfg": {"*": "w2a2"}}, "w2a2"),
        ({"mix_cfg": ["*"]}, "mix_cfg"),
        ({"calib_data": "text"}, "calib_data"),
        ({"calib_data": [torch.zeros(1)]}, r"calib_data\[0\]"),
        ({"config": QuantConfig(w_bit=4, a_bit=16, w_method="GPTQ"), "calib_data": []}, "GPTQ needs samples"),
        (
            {"config": QuantConfig(w_bit=4, a_bit=16, w_method="GPTQ", is_lowbit=True, open_outlier=False), "disable_level": "L1"},
            "one layer at a time: is_lowbit with disable_level",
        ),
        ({"config": QuantConfig().fa_quant(fa_amp=1)}, "fa_amp"),
        ({"config": QuantConfig(a_bit=16).fa_quant(), "calib_data": []}, "attention needs samples"),
        ({"config": QuantConfig().simulate_tp(2)}, "simulate_tp"),
    ],
)
def test_nonsense_is_refused_by_name(options, words):
    with pytest.raises(UsageError, match=words):
        calibrated(**options)


def test_what_is_not_a_model_or_a_config():
    with pytest.raises(UsageError, match="torch module"):
        Calibrator("model", QuantConfig())
    with pytest.raises(UsageError, match="QuantConfig"):
        Calibrator(nn.Linear(2, 2), {})
    with pytest.raises(UsageError, match=r"no nn\.Linear"):
        Calibrator(nn.ReLU(), QuantConfig(a_bit=16))
