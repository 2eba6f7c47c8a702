"""Load every folder with transformers on the CPU and say how it went.

    python load_goldens.py FIXTURES [CASE ...]

Twice each, with run_compressed False and True: each weight against dequant_sha256.json, the logits against those of the float model.
"""

from __future__ import annotations

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import hashlib
import json
import sys
import warnings
from pathlib import Path

import compressed_tensors
import torch
import transformers
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.detach().float().contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def judge(folder: Path, run_compressed: bool, reference: torch.Tensor, ids: torch.Tensor) -> str:
    recorded = {}
    if (folder / "dequant_sha256.json").exists():
        recorded = json.loads((folder / "dequant_sha256.json").read_text())["tensors"]
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", quantization_config=CompressedTensorsConfig(run_compressed=run_compressed), output_loading_info=True
    )
    logits = model(input_ids=ids, use_cache=False).logits.float()
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    wrong = [name for name, row in recorded.items() if digest(state[name]) != row["sha256_float32_le"]]
    dtypes = sorted({str(state[name].dtype)[6:] for name in recorded})
    problems = {key: sorted(value)[:3] for key, value in info.items() if value}
    spread = (logits - reference).pow(2).mean().sqrt() / reference.std()
    top = (logits.argmax(-1) == reference.argmax(-1)).float().mean()
    equal = f"{len(recorded) - len(wrong)} of {len(recorded)} weights equal {dtypes} {wrong[:2] or ''}"
    return f"{equal} logits {spread:.4f} of their deviation off, top 1 {top:.2f}, finite {bool(logits.isfinite().all())} {problems or ''}"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@torch.no_grad()
def main(root: Path, names: list[str]) -> None:
    say(f"transformers {transformers.__version__}, compressed-tensors {compressed_tensors.__version__}")
    ids = torch.arange(1, 33).mul(37).remainder(128)[None]
    references = {}
    for folder in sorted(path.parent for path in root.glob("*/golden_case.json")):
        if names and folder.name not in names:
            continue
        source = json.loads((folder / "golden_case.json").read_text())["source"]
        if source not in references:
            references[source] = AutoModelForCausalLM.from_pretrained(root / source, dtype=torch.float32)(input_ids=ids).logits
        for run_compressed in (False, True):
            try:
                said = judge(folder, run_compressed, references[source], ids)
            except Exception as error:
                said = f"{type(error).__name__}: {str(error)[:200]}"
            say(f"{folder.name:38} run_compressed={run_compressed!s:5} {said}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
