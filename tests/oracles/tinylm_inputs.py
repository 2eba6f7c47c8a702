"""Record, in fixtures/tinylm/inputs.json, the range of each linear's inputs in the float model, and the ids of a prompt.

    python tinylm_inputs.py FOLDER CALIBRATION PROMPT

Run by an interpreter that has transformers; it imports nothing of Weighbridge, and no test runs it. FOLDER is fixtures/tinylm,
CALIBRATION a text of which eight windows of 256 tokens are passed, PROMPT one that the model was not trained on, of which 48 tokens
are kept, from character 20000 on. The ranges are widened to hold 0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOWS, LENGTH, PROMPT = 8, 256, 48


def main(folder: Path, calibration: Path, prompt: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ranges: dict[str, list[float]] = {}

    def watch(name: str) -> object:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            low, high = ranges.get(name, [0.0, 0.0])
            ranges[name] = [min(low, float(inputs[0].min())), max(high, float(inputs[0].max()))]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(watch(name))
    ids = tokenizer(calibration.read_text("utf-8"))["input_ids"][: WINDOWS * LENGTH]
    model(torch.tensor(ids).reshape(WINDOWS, LENGTH))
    record = {"ranges": ranges, "prompt": tokenizer(prompt.read_text("utf-8")[20_000:22_000])["input_ids"][:PROMPT]}
    (folder / "inputs.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main(*map(Path, sys.argv[1:4]))
