"""Weighbridge's calibration and quantization for LMDeploy, by the interpreter that has LMDeploy: of the same torch and transformers.

    python lmdeploy_ours.py MODEL TEXT SAMPLES LENGTH THEIRS PLACE

Writes into PLACE: ``work``, the statistics of ``weighbridge lmdeploy calibrate MODEL --calib TEXT``; ``ours``, the AWQ folder of the
recipe lmdeploy-awq, of the same windows of TEXT; and for NAME in inputs_stats and outputs_stats, ``theirs_NAME`` and ``ours_NAME``, what
torch reads in NAME.pth of the folder THEIRS and of ``work``, as safetensors of tensors STATISTIC/MODULE, with their ``order`` in the
metadata. It needs Weighbridge on the path, and nothing of LMDeploy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantize import quantize_model
from quantize.lmdeploy_calibration import calibrate
from quantize.lmdeploy_text import windows_of
from quantize.models import load_tokenizer


def write_statistics(source: Path, out: Path) -> None:
    found = torch.load(source, weights_only=True)
    tensors = {f"{kind}/{name}": tensor for kind, by_name in found.items() for name, tensor in by_name.items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, out, {"order": json.dumps(list(tensors))})


def main(model: Path, text: Path, samples: int, length: int, theirs: Path, place: Path) -> None:
    calibrate(model, text, samples=samples, seqlen=length, work_dir=place / "work")
    windows, _ = windows_of(text, load_tokenizer(model), samples, length)
    quantize_model(model, place / "ours", "lmdeploy-awq", "awq", calib=[[ids, torch.ones_like(ids)] for ids in windows])
    for name in ("inputs_stats", "outputs_stats"):
        for side, folder in (("theirs", theirs), ("ours", place / "work")):
            write_statistics(folder / f"{name}.pth", place / f"{side}_{name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]), Path(sys.argv[6]))
