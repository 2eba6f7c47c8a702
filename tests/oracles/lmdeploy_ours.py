"""Weighbridge's calibration and quantization for LMDeploy, by the interpreter that has LMDeploy: of the same torch and transformers.

    python lmdeploy_ours.py MODEL TEXT WORK OUT SAMPLES LENGTH

Writes the statistics of ``weighbridge lmdeploy calibrate MODEL --calib TEXT`` into WORK, and the AWQ folder of the recipe lmdeploy-awq,
of the same windows of TEXT, into OUT. It needs Weighbridge on the path, and nothing of LMDeploy.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from quantize import quantize_model
from quantize.lmdeploy_calibration import calibrate
from quantize.lmdeploy_text import windows_of
from quantize.models import load_tokenizer


def main(model: Path, text: Path, work: Path, out: Path, samples: int, length: int) -> None:
    calibrate(model, text, samples=samples, seqlen=length, work_dir=work)
    windows, _ = windows_of(text, load_tokenizer(model), samples, length)
    quantize_model(model, out, "lmdeploy-awq", "awq", calib=[[ids, torch.ones_like(ids)] for ids in windows])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]), *map(int, sys.argv[5:7]))
