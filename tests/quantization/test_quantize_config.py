"""Configs and devices: msModelSlim's defaults, what they imply, and what is refused. Needs no torch but for one device."""

from __future__ import annotations

import sys
import types

import pytest

from formats.errors import UsageError
from quantize.config import AntiOutlierConfig, QuantConfig
from quantize.devices import device_name, resolve

DEFAULTS = {
    "w_bit": 8, "a_bit": 8, "act_method": 1, "w_method": "MinMax", "disable_names": [], "pr": 1.0, "mm_tensor": True, "dev_type": "cpu",
    "dev_id": None, "fraction": 0.01, "nonuniform": False, "co_sparse": False, "w_sym": True, "is_lowbit": False, "do_smooth": False,
    "use_sigma": False, "sigma_factor": 3.0, "disable_last_linear": True, "use_kvcache_quant": False, "open_outlier": True,
    "is_dynamic": False, "percdamp": 0.01, "pdmix": False,
}  # fmt: skip
GROUPS = {"is_lowbit": True, "open_outlier": False}


def test_every_default():
    config = QuantConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.group_size == -1  # 64 was asked by default, but nothing here is per group
    assert QuantConfig(w_bit=4, a_bit=16, **GROUPS).group_size == 64
    anti = AntiOutlierConfig()
    assert (anti.w_bit, anti.a_bit, anti.anti_method, anti.dev_type, anti.dev_id, anti.w_sym) == (8, 8, "m2", "cpu", None, True)
    assert (anti.disable_anti_names, anti.flex_config) == ([], {"alpha": None, "beta": None})


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "W8A8"),
        ({"a_bit": 16}, "W8A16"),
        ({"w_bit": 4, "a_bit": 16}, "W4A16"),
        ({"w_bit": 4, "a_bit": 16, "w_method": "NF"}, "NF4"),
        ({"is_dynamic": True}, "W8A8_DYNAMIC"),
        ({"w_bit": 4, "is_dynamic": True, **GROUPS}, "W4A8_DYNAMIC"),
        ({"w_bit": 4, "co_sparse": True}, "W8A8S"),
        ({"w_bit": 4, "is_lowbit": True}, "W8A8S"),
        ({"w_bit": 4, "a_bit": 4, "is_dynamic": True}, "W4A4_FLATQUANT_DYNAMIC"),
        ({"w_bit": 16, "a_bit": 16}, "FLOAT"),
    ],
)
def test_what_a_config_makes(fields, kind):
    assert QuantConfig(**fields).model_quant_type == kind


def test_chains():
    assert QuantConfig().kv_quant().use_kvcache_quant
    assert QuantConfig().kv_quant(kv_sym=False).kv_sym is False
    weights = QuantConfig(w_bit=4, a_bit=16, mm_tensor=False).weight_quant(w_sym=False)
    assert (weights.mm_tensor, weights.w_sym) == (True, False)  # its own defaults replace what was set
    assert QuantConfig().weight_activation_quant(act_method=3, is_dynamic=True).model_quant_type == "W8A8_DYNAMIC"
    sparse = QuantConfig(w_bit=4, co_sparse=True).sparse_quant(act_method=2, fraction=0.02)
    assert (sparse.model_quant_type, sparse.fraction) == ("W8A8S", 0.02)
    assert QuantConfig().fa_quant(fa_amp=2).fa_amp == 2
    assert QuantConfig().timestep_quant(4).model_quant_type == "W8A8_TIMESTEP"
    assert QuantConfig().simulate_tp(4).tp_size == 4


def test_lowbit_wins_over_co_sparse_and_co_sparse_sets_bits(caplog):
    assert QuantConfig(w_bit=4, co_sparse=True, is_lowbit=True).co_sparse is False
    assert (QuantConfig(co_sparse=True).w_bit, "co_sparse" in caplog.text) == (4, True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"w_sym": False}, "w_sym"),
        ({"w_bit": 4}, "W4A8"),
        ({"w_bit": "4"}, "w_bit"),
        ({"act_method": 4}, "act_method"),
        ({"act_method": 3, "w_bit": 4, "is_lowbit": True}, "act_method"),
        ({"w_method": "AWQ"}, "w_method"),
        ({"w_method": "HQQ", "w_bit": 8, "is_lowbit": True}, "per group"),
        ({"w_method": "NF"}, "NF"),
        ({"disable_names": "lm_head"}, "disable_names"),
        ({"mm_tensor": 1}, "mm_tensor"),
        ({"fraction": 0.5}, "fraction"),
        ({"sigma_factor": 5.0}, "sigma_factor"),
        ({"percdamp": 2.0}, "percdamp"),
        ({"pr": 2.0, "w_bit": 4, "is_lowbit": True}, "pr"),
        ({"is_dynamic": True, "a_bit": 16}, "is_dynamic"),
        ({"w_bit": 4, "a_bit": 16, "group_size": 48, **GROUPS}, "group_size"),
        ({"w_bit": 4, "a_bit": 4}, "W4A4"),
        ({"w_bit": 3, "a_bit": 16}, "w_bit 3"),
        ({"pdmix": True, "a_bit": 16}, "pdmix"),
        ({"dev_type": "tpu"}, "dev_type"),
        ({"dev_type": "npu", "dev_id": -1}, "dev_id"),
    ],
)
def test_nonsense_is_refused_by_name(fields, words):
    with pytest.raises(UsageError, match=words):
        QuantConfig(**fields)


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        (lambda config: config.kv_quant(kv_sym=1), "kv_sym"),
        (lambda config: config.kv_quant().fa_quant(), "both"),
        (lambda config: config.fa_quant(-1), "fa_amp"),
        (lambda config: config.simulate_tp(3), "tp_size"),
        (lambda config: config.simulate_tp(2, enable_per_device_quant=1), "enable_per_device_quant"),
        (lambda config: config.weight_quant(block_size=7), "block_size"),
        (lambda config: config.weight_activation_quant(act_method=0), "act_method"),
        (lambda config: config.for_layer("w2a8"), "w2a8"),
        (lambda config: config.for_layer("w4a8_dynamic"), "w4a8_dynamic"),
    ],
)
def test_chained_nonsense_changes_nothing(chain, words):
    config = QuantConfig()
    before = vars(config).copy()
    with pytest.raises(UsageError, match=words):
        chain(config)
    if words != "both":
        assert vars(config) == before


def test_a_layer_of_another_type():
    config = QuantConfig(mm_tensor=False, pdmix=True)
    assert config.for_layer("w8a8") is config
    assert config.for_layer("w8a16").model_quant_type == "W8A16"
    assert config.for_layer("w8a8_dynamic").is_dynamic
    assert config.for_layer("float").model_quant_type == "FLOAT"
    with pytest.raises(UsageError, match="W4A16"):
        QuantConfig(w_bit=4, a_bit=16).for_layer("w8a8")
    with pytest.raises(UsageError, match="w_sym"):
        QuantConfig(a_bit=16, w_sym=False).for_layer("w8a8")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"anti_method": "m7"}, "m7"),
        ({"w_bit": 3}, "w_bit"),
        ({"a_bit": 16}, "a_bit"),
        ({"w_sym": False}, "w_sym"),
        ({"disable_anti_names": "x"}, "disable_anti_names"),
        ({"flex_config": {"gamma": 1.0}}, "gamma"),
        ({"flex_config": {"alpha": "half"}}, "alpha"),
    ],
)
def test_smoothing_nonsense_is_refused_by_name(fields, words):
    with pytest.raises(UsageError, match=words):
        AntiOutlierConfig(**fields)


def test_awq_smoothing_may_have_offsets():
    assert AntiOutlierConfig(anti_method="m3", a_bit=16, w_bit=4, w_sym=False).device == "cpu"


@pytest.mark.parametrize(
    ("asked", "name"),
    [(("cpu", None), "cpu"), (("npu", None), "npu:0"), (("npu", 3), "npu:3"), (("npu:2", None), "npu:2"), (("gpu", 1), "cuda:1")],
)
def test_device_names(asked, name):
    assert device_name(*asked) == name


def test_an_npu_without_torch_npu_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(UsageError, match="torch_npu is not installed"):
        resolve("npu", 0)


def test_an_npu_gets_the_options_that_msmodelslims_scripts_set(monkeypatch):
    import torch

    told = []
    npu = types.SimpleNamespace(set_compile_mode=lambda **options: told.append(options), set_option=told.append)
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    monkeypatch.setattr(torch, "device", str)
    assert resolve("npu", 1) == "npu:1"
    assert told == [{"jit_compile": False}, {"NPU_FUZZY_COMPILE_BLACKLIST": "ReduceProd"}]


def test_a_cuda_device_that_is_not_there_is_one_clear_error():
    with pytest.raises(UsageError, match="cuda:99"):
        resolve("gpu", 99)
