"""The small trained model, in a folder that this transformers can load whole, and questions like BoolQ's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from quantize.recipe import RECIPES

TINYLM = Path(__file__).parents[2] / "fixtures" / "tinylm"
TOPICS = ("kernel", "database", "file system", "compiler", "network", "scheduler", "socket", "thread", "index", "buffer", "lock", "page")
IN_MSMODELSLIMS_WORDS = tuple(name for name in RECIPES if not name.startswith("gs-"))
"""Recipes; the others are Golden Stick's."""
QUESTIONS = [
    {
        "title": topic.capitalize(),
        "passage": f"The {topic} is a part of the operating system. " * (1 + number % 3),
        "question": f"is the {topic} a part of the system",
        "answer": number % 2 == 0,
    }
    for number, topic in enumerate(TOPICS)
]


def model_folder(folder: Path) -> Path:
    """A copy of tinylm, whose tokenizer is called as transformers 4 calls it."""
    shutil.copytree(TINYLM, folder)
    (folder / "inputs.json").unlink()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048}))
    return folder


def questions(path: Path) -> Path:
    """A ``.jsonl`` file of questions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    return path
