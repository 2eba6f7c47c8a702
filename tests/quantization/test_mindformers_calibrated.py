"""MindFormers 1.3.2 and Golden Stick 0.6.0 take what Weighbridge calibrates: every parameter of the network that they build is loaded.

Needs torch beside us, so the session ``quantize`` runs it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from mindformers_judge import check_loaded

from quantize import quantize_model
from quantize.recipe import load, loads

pytestmark = pytest.mark.oracle

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.mark.parametrize("text", ["gs-smooth-a8w8", "gs-ptq", "golden_stick: {approach: rtn, w_bit: 16, kv_bit: 8}"])
def test_the_network_takes_what_was_calibrated(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "float"
    folder.mkdir()
    shutil.copy(FIXTURES / "golden_stick" / "config.json", folder)
    shutil.copy(FIXTURES / "golden_stick" / "llama_tiny_fp16_plain.ckpt", folder)
    ids = torch.arange(3, 60).reshape(1, -1)
    recipe = load(text) if text.startswith("gs-") else loads(text)
    quantize_model(folder, tmp_path / "out", recipe, "mindspore:gs0.6", calib=[[ids, torch.ones_like(ids)]])
    check_loaded(tmp_path / "out")
