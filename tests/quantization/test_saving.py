"""What ``Calibrator.save`` writes, against whole files that the real msModelSlim wrote: every tensor, and the description key by key.

Input scales and smoothing come out of matrix products, which CPUs round differently: what follows from them is held to a bound here,
and equal bit for bit in test_quantize_oracle.py, where the tool runs beside.
"""

from __future__ import annotations

import json
from pathlib import Path

import goldens
import pytest
import torch

from quantize import AntiOutlier, AntiOutlierConfig, Calibrator, QuantConfig

GOLDENS = sorted(
    folder
    for folder in (*goldens.W8_FAMILY.iterdir(), *goldens.WEIGHT_ONLY.iterdir())
    if (folder / "golden_case.json").exists() and not list(folder.glob("*.npy")) and "gptq" not in folder.name
)
MEASURED = ("input_scale", "input_offset", "deq_scale", "quant_bias", "kv_cache_scale", "kv_cache_offset")
"""Leaf names of what depends on the CPU that calibrated."""
DESCRIPTIONS = goldens.WEIGHT_ONLY / "descriptions"


def samples_of(folder):
    """Those that its golden was calibrated with."""
    return goldens.samples() if folder.parent == goldens.W8_FAMILY else goldens.older_samples()


def calibrated(source, dtype, samples, anti, config, kv_sym=None, mix_cfg=None):
    model = goldens.load_model(source, dtype)
    if anti is not None:
        AntiOutlier(model, samples, AntiOutlierConfig(**anti)).process()
    config = QuantConfig(**config)
    calibrator = Calibrator(model, config if kv_sym is None else config.kv_quant(kv_sym=kv_sym), samples, mix_cfg=mix_cfg)
    calibrator.run()
    return calibrator


def description_of(folder):
    (path,) = (
        path for path in folder.glob("*.json") if "golden" not in path.name and "index" not in path.name and "weigh" not in path.name
    )
    return path.name, json.loads(path.read_text())


def decoded(tensor):
    """deq_scale as float32."""
    return tensor.to(torch.int32).view(torch.float32) if tensor.dtype == torch.int64 else tensor


@pytest.mark.parametrize("folder", GOLDENS, ids=lambda folder: folder.name)
def test_a_golden_is_saved_again(folder, tmp_path):
    case = goldens.case_of(folder)
    options = case["opt"]
    calibrator = calibrated(
        goldens.source_of(folder),
        goldens.dtype_of(folder),
        samples_of(folder),
        case["anti"],
        case["quant_config"],
        options.get("kv_sym"),
        options.get("mix_cfg"),
    )
    names = {name: options[name] for name in ("safetensors_name", "json_name") if name in options}
    calibrator.save(tmp_path, save_type=options.get("save_type", "safe_tensor"), **names)
    assert description_of(tmp_path) == description_of(folder)
    ours, theirs = goldens.stored(tmp_path), goldens.stored(folder)
    assert ours.keys() == theirs.keys()
    smoothed = case["anti"] is not None
    for name, want in theirs.items():
        got, part = ours[name], name.rpartition(".")[2]
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        if part in ("input_offset", "kv_cache_offset"):
            torch.testing.assert_close(got, want, rtol=0, atol=1, msg=name)
        elif part == "quant_bias":
            step = ours[name.replace("quant_bias", "weight")].float().sum(1).abs() + 1  # what one more of input_offset does
            assert bool(((got - want).abs() <= step + 0.02 * want.abs()).all()), name
        elif part in MEASURED:
            torch.testing.assert_close(decoded(got), decoded(want), rtol=0.01, atol=0, msg=name)
        elif smoothed and want.dtype == torch.int8:
            assert float((got != want).float().mean()) < 0.01, name
            assert int((got.int() - want.int()).abs().max()) <= 1, name
        elif smoothed:
            torch.testing.assert_close(got, want, rtol=0.01, atol=1e-6, msg=name)
        else:
            assert torch.equal(got, want), name


@pytest.mark.parametrize("method", ["m1", "m2", "m3", "m4", "m5", "m6"])
def test_each_method_of_smoothing_is_described_as_the_tool_describes_it(method, tmp_path):
    """Of m1 to m6 the repository keeps the tool's description of the same model in float32: which tensors there are, and their types."""
    wanted = json.loads((DESCRIPTIONS / f"w8a8_anti_{method}_fp32.json").read_text())
    calibrator = calibrated(
        goldens.WEIGHT_ONLY / "src_bf16", torch.float32, goldens.older_samples()[:1], {"anti_method": method}, {"mm_tensor": False}
    )
    calibrator.save(tmp_path, save_type="safe_tensor")
    name, found = description_of(tmp_path)
    assert (name, found) == ("quant_model_description_w8a8.json", wanted)
    assert goldens.stored(tmp_path).keys() == {name for name in wanted if "." in name}


def test_the_folder_is_proved_and_certified(tmp_path):
    calibrator = calibrated(goldens.SOURCES / "src_llama_fp16", None, goldens.samples(), None, {"w_bit": 4, "co_sparse": True})
    (result,) = calibrator.save(tmp_path, save_type=["safe_tensor"])
    assert result.exact
    assert {path.name for path in Path(tmp_path).iterdir()} == {
        "quant_model_weight_w8a8s.safetensors",
        "quant_model_description_w8a8s.json",
        "weighbridge.json",
    }
