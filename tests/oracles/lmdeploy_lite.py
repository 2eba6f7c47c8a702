"""LMDeploy 0.18.0's own ``lite`` on the CPU, with a local text in the place of the data set that it would download.

    python lmdeploy_lite.py JOB.json

Run by the interpreter that has LMDeploy; it imports nothing of Weighbridge. The job is a JSON object:

| key | |
| --- | --- |
| text | the text that is the whole data set, from which ``wikitext2`` of LMDeploy takes its windows |
| bytes | a folder to which a tokenizer is written first whose tokens are bytes, or null |
| runs | a list of [function, arguments]: of ``lmdeploy.lite.apis``, what the command of that name calls |
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def write_byte_tokenizer(folder: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def main(job: dict[str, Any]) -> None:
    if job["bytes"] is not None:
        write_byte_tokenizer(Path(job["bytes"]))
    datasets.load_dataset = lambda *args, **kwargs: datasets.Dataset.from_dict({"text": [job["text"]]})
    for function, arguments in job["runs"]:
        getattr(importlib.import_module(f"lmdeploy.lite.apis.{function}"), function)(**arguments)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")))
