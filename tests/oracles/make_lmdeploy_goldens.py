"""Write fixtures/lmdeploy/statistics_search_v018 and auto_awq_v018_sha256.json: what LMDeploy 0.18.0's own ``auto_awq`` makes on a CPU.

    python make_lmdeploy_goldens.py FIXTURES OUT

Run by an interpreter that has LMDeploy 0.18.0, transformers 4.57.1 and torch 2.13.0+cpu; it imports nothing of Weighbridge, and no test
runs it. The models are FIXTURES' ``llama_mha`` and ``qwen2_gqa``, the samples ``statistics_v010/calib_ids.pt``. Replaced are:

* the loader of data sets, by those samples, and the tokenizer, which these models have none of;
* in the search, ``v.cpu()``, which on a CPU is the weight itself and no copy of it, by a copy, which it is on a GPU;
* what asks a GPU: how much memory was used, which is only printed, and whether it has bfloat16.

``search``: ``--search-scale``; ``free``: ``--calib-samples 0``. Of each folder the JSON has the SHA-256 of every tensor's bytes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdeploy.lite.quantization.calibration as calibration
import torch
from lmdeploy.lite.apis import auto_awq, calibrate
from safetensors.torch import load_file

RUNS = {"search llama_mha": "float16", "search qwen2_gqa": "float16", "search qwen2_gqa bfloat16": "bfloat16", "free qwen2_gqa": "float16"}


def stand_ins(ids: torch.Tensor) -> None:
    tools: Any = calibrate
    tools.get_calib_loaders = lambda *args, **kwargs: list(ids.split(1))
    tools.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *args, **kwargs: SimpleNamespace(save_pretrained=lambda folder: None))
    torch.cuda.max_memory_allocated = lambda device=None: 0
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    source = inspect.getsource(calibration.auto_scale_block)
    assert source.count("v.cpu()") == 1
    source = source.replace("v.cpu()", "v.cpu().clone()").replace("from .awq", "from lmdeploy.lite.quantization.awq")
    exec(compile(source, "auto_scale_block", "exec"), vars(calibration))


def main() -> None:
    fixtures, out = Path(sys.argv[1]), Path(sys.argv[2])
    ids = torch.load(fixtures / "statistics_v010" / "calib_ids.pt", weights_only=True)
    stand_ins(ids)
    digests: dict[str, dict[str, str]] = {}
    for run, dtype in RUNS.items():
        kind, model, *_ = run.split()
        with tempfile.TemporaryDirectory() as folder:
            auto_awq.auto_awq(
                str(fixtures / model), work_dir=folder, calib_samples=len(ids) if kind == "search" else 0, calib_seqlen=ids.shape[1],
                search_scale=kind == "search", device="cpu", dtype=dtype,
            )  # fmt: skip
            tensors = load_file(Path(folder) / "model.safetensors")
            digests[run] = {name: hashlib.sha256(one.view(torch.uint8).numpy()).hexdigest() for name, one in sorted(tensors.items())}
            if kind == "search":
                place = out / "statistics_search_v018" / f"{run.removeprefix('search ').replace(' ', '_')}.pth"
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(folder) / "inputs_stats.pth", place)
        calibration.ActivationObserver.instances().clear()
    (out / "auto_awq_v018_sha256.json").write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
