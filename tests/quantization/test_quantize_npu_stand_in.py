"""The whole path with ``dev_type="npu"``, where there is no NPU: every tensor operation that names an NPU gets the CPU instead."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import goldens
import pytest
import torch
from torch.overrides import TorchFunctionMode

from quantize import Calibrator, QuantConfig


class StandIn(TorchFunctionMode):
    """Sends what is for an NPU to the CPU, and remembers every device that was named."""

    def __init__(self):
        super().__init__()
        self.named = set()

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        def here(value):
            if isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda", "npu")):
                self.named.add(str(value))
                return torch.device("cpu")
            return value

        return function(*map(here, args), **{key: here(value) for key, value in (kwargs or {}).items()})


@pytest.fixture
def npu(monkeypatch):
    told = []
    stub = types.SimpleNamespace(
        set_compile_mode=lambda **options: told.append(options),
        set_option=told.append,
        current_device=lambda: 0,
        is_available=lambda: False,
    )
    if torch._C._get_privateuse1_backend_name() != "npu":
        torch.utils.rename_privateuse1_backend("npu")  # for good, in this process: so that torch.device("npu:0") exists
    monkeypatch.setattr(torch, "npu", stub, raising=False)
    package = types.ModuleType("torch_npu")
    package.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)  # transformers asks for it
    monkeypatch.setitem(sys.modules, "torch_npu", package)
    return told


@pytest.mark.parametrize(
    "fields",
    [
        {"act_method": 3},
        {"is_dynamic": True},
        {"w_bit": 4, "a_bit": 16, "is_lowbit": True, "open_outlier": False, "group_size": 32},
        {"w_bit": 4, "co_sparse": True, "fraction": 0.02},
    ],
)
def test_calibration_and_generation(npu, fields):
    source = goldens.SOURCES / "src_qwen2_bf16"
    config = QuantConfig(mm_tensor=False, dev_type="npu", dev_id=0, **fields).kv_quant()
    model = goldens.load_model(source)
    ids = goldens.samples()[0][0][:, :8]
    with StandIn() as mode:
        calibrator = Calibrator(model, config, calib_data=goldens.samples())
        calibrator.run()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 10)
    assert "npu:0" in mode.named
    assert not any(name.startswith("cuda") for name in mode.named)
    assert npu == [{"jit_compile": False}, {"NPU_FUZZY_COMPILE_BLACKLIST": "ReduceProd"}]

    plain = Calibrator(goldens.load_model(source), QuantConfig(mm_tensor=False, **fields).kv_quant(), calib_data=goldens.samples())
    plain.run()
    for name, layer in plain.layers.items():
        assert torch.equal(layer.codes, calibrator.layers[name].codes)
        assert torch.equal(layer.weight_scale, calibrator.layers[name].weight_scale)
        if layer.input_scale is not None:
            assert torch.equal(layer.input_scale, calibrator.layers[name].input_scale)
