"""Answer BoolQ's questions with the real msModelSlim's own code, for the comparison in test_evaluate.py.

    python msmodelslim_boolq.py MODEL QUESTIONS.jsonl OUT.json

Run by the interpreter that has msModelSlim 26.1.0 (``nox -s msmodelslim`` builds it); it imports nothing of Weighbridge. The precision tool
itself is not in the package, but what selects calibration data by the same score is. OUT.json: {"choices": the two tokens, "prompts",
"right": whether each question was answered rightly}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.modules.setdefault("pandas", ModuleType("pandas"))  # which the module asks for, for other data sets
from msmodelslim.pytorch.llm_ptq.mix_calibration.calib_select import BoolqProcessor  # noqa: E402 - after what it imports was put there

BATCH = 4


def main(model: str, questions: str, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", local_files_only=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    loaded = AutoModelForCausalLM.from_pretrained(model, torch_dtype="auto", local_files_only=True).eval()
    processor = BoolqProcessor(questions, tokenizer, loaded)
    asked = processor.process_data(range(len(processor.ori_prompts)))
    right: list[bool] = []
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        with torch.no_grad():
            found = processor.verify_positive_prompt([one["prompt"] for one in batch], [one["ans"] for one in batch])
        passed = [one["prompt"] for one in found]
        right += [one["prompt"] in passed for one in batch]
    content = {"choices": processor.choice_tokens, "prompts": [one["prompt"] for one in asked], "right": right}
    out.write_text(json.dumps(content))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: msmodelslim_boolq.py MODEL QUESTIONS.jsonl OUT.json")
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
