"""Quantize with the real msModelSlim, for the comparison in test_quantize_oracle.py.

    python msmodelslim_settings.py SETTINGS.json OUT

Run by the interpreter that has msModelSlim 26.1.0 (``nox -s msmodelslim`` builds it), in a folder that may be littered; it imports
nothing of Weighbridge. SETTINGS is {name: {"source", "dtype", "anti", "config", "level", "mix_cfg", "kv_sym", "samples"}}, where samples
are lists of ids. Of each it writes OUT/name/safe_tensor, OUT/name/ascendV1 and OUT/name/numpy, what ``Calibrator.save`` wrote, and
OUT/name/logits.safetensors: ``logits`` of the fake-quantized model for the first sample, float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def run(name: str, about: dict, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(about["source"], torch_dtype=getattr(torch, about["dtype"]))
    ids = [torch.tensor([one]) for one in about["samples"]]
    data = [[one, torch.ones_like(one)] for one in ids]
    if about["anti"] is not None:
        AntiOutlier(model, calib_data=data, cfg=AntiOutlierConfig(**about["anti"])).process()
    config = QuantConfig(**about["config"])
    if "kv_sym" in about:
        config = config.kv_quant(kv_sym=about["kv_sym"])
    calibrator = Calibrator(model, config, calib_data=data, disable_level=about["level"], mix_cfg=about["mix_cfg"])
    calibrator.run()
    prompt = torch.tensor([about["prompt"]])
    logits = model(prompt, attention_mask=torch.ones_like(prompt)).logits.float()
    for kind in ("safe_tensor", "ascendV1", *(["numpy"] if config.model_quant_type != "W4A8_DYNAMIC" else [])):
        (out / name / kind).mkdir(parents=True)
        calibrator.save(str(out / name / kind), save_type=[kind])
    save_file({"logits": logits.contiguous()}, out / name / "logits.safetensors")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: msmodelslim_settings.py SETTINGS.json OUT")
    torch.set_num_threads(1)
    with torch.no_grad():
        for name, about in json.loads(Path(sys.argv[1]).read_text()).items():
            run(name, about, Path(sys.argv[2]))
