"""Calibration text for LMDeploy's ``lite``: windows of one length, chosen as its loaders choose them, with the seed 0.

==============================  =========================================================================================================
a file, ``wikitext2``, ``ptb``  all texts joined by two line breaks and tokenized at once; windows begin anywhere in them
``c4``                          a random document that is long enough, then a window that begins anywhere in it, for every sample
``pileval``                     documents of at most 512 tokens, shuffled, one after another, cut into windows without overlap
==============================  =========================================================================================================

A file is ``.jsonl`` or ``.json`` (``calibration.prompt`` makes an object's text) or plain text. The others are names of data sets, which
``datasets`` brings from the hub: they need it installed, and a network. A file of such a name is taken first.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.errors import UnreadableError, UsageError

from .calibration import prompt, read_objects

__all__ = ["DATA_SETS", "windows_of"]

DATA_SETS: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "c4": (("allenai/c4", "en"), {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"}, "text"),
    "wikitext2": (("wikitext", "wikitext-2-raw-v1"), {"split": "train"}, "text"),
    "ptb": (("ptb_text_only", "penn_treebank"), {"split": "train"}, "sentence"),
    "pileval": (("mit-han-lab/pile-val-backup",), {"split": "validation"}, "text"),
}
"""By LMDeploy's name: where it is on the hub, which part, and the column with the text."""

SEED = 0
SHORT = 512
"""Tokens of a document of pileval at most."""


def windows_of(source: str | os.PathLike[str], tokenizer: Any, samples: int, length: int) -> tuple[list[Tensor], list[str]]:
    """``samples`` windows, each [1, ``length``] int64, and what a user should know of them.

    :raises UsageError: no such file or data set, or too little text
    :raises UnreadableError: a file that is no JSON or no text, or a data set that cannot be had
    """
    if samples < 1 or length < 1:
        raise UsageError(f"samples {samples}, length {length}: wanted whole numbers from 1")
    path, choose = Path(source), random.Random(SEED)
    if path.is_file():
        return _anywhere(path.name, _texts(path), tokenizer, samples, length, choose)
    if str(source) not in DATA_SETS:
        raise UsageError(f"{source}: there is no such file, nor is it one of {', '.join(DATA_SETS)}")
    documents, column = _downloaded(str(source))
    if source == "c4":
        return _in_documents(documents, column, tokenizer, samples, length, choose), []
    if source == "pileval":
        return _blocks(documents, column, tokenizer, samples, length)
    return _anywhere(str(source), documents[column], tokenizer, samples, length, choose)


def _texts(path: Path) -> list[str]:
    if path.suffix in {".jsonl", ".json"}:
        return [prompt(item, None, f"{path.name}{where}") if isinstance(item, Mapping) else str(item) for where, item in read_objects(path)]
    try:
        return [path.read_text("utf-8-sig")]
    except (OSError, UnicodeDecodeError):
        raise UnreadableError(f"{path.name}: is not UTF-8 text; calibration data is .jsonl, .json or plain text") from None


def _downloaded(name: str) -> tuple[Any, str]:
    (repository, *part), options, column = DATA_SETS[name]
    try:
        from datasets import load_dataset
    except ImportError:
        raise UsageError(f"{name}: is a data set on the hub, which `datasets` brings; pip install datasets, or name a local file") from None
    try:
        return load_dataset(repository, *part, **options), column
    except (OSError, ValueError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnreadableError(f"{name}: the data set cannot be had ({first.strip():.200}); name a local file") from None


def _ids(tokenizer: Any, text: str) -> Tensor:
    """[1, tokens] int64."""
    return torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.long)


def _anywhere(
    name: str, texts: list[str], tokenizer: Any, samples: int, length: int, choose: random.Random
) -> tuple[list[Tensor], list[str]]:
    """Windows that begin anywhere in all texts together."""
    ids = _ids(tokenizer, "\n\n".join(texts))
    tokens = ids.shape[1]
    if tokens < length:
        raise UsageError(f"{name}: has {tokens} tokens, and one sample is {length}; give more text, or a smaller --seqlen")
    starts = [choose.randint(0, tokens - length) for _ in range(samples)]
    notes = [f"{name}: {samples} samples of {length} tokens overlap in its {tokens} tokens"] if samples * length > tokens else []
    return [ids[:, start : start + length] for start in starts], notes


def _in_documents(documents: Any, column: str, tokenizer: Any, samples: int, length: int, choose: random.Random) -> list[Tensor]:
    """Windows in random documents that are long enough."""
    found: list[Tensor] = []
    refused = 0
    while len(found) < samples:
        ids = _ids(tokenizer, documents[choose.randint(0, len(documents) - 1)][column])
        if ids.shape[1] < length:
            refused += 1
            if refused > 1000 * samples:
                raise UsageError(f"c4: has too few documents of {length} tokens; use a smaller --seqlen")
            continue
        start = choose.randint(0, ids.shape[1] - length)
        found.append(ids[:, start : start + length])
    return found


def _blocks(documents: Any, column: str, tokenizer: Any, samples: int, length: int) -> tuple[list[Tensor], list[str]]:
    """Windows without overlap in short documents, one after another."""
    parts: list[Tensor] = []
    held = 0
    for document in documents.shuffle(seed=42):
        ids = _ids(tokenizer, document[column].strip())
        if 0 < ids.shape[1] <= SHORT:
            parts.append(ids)
            held += ids.shape[1]
        if held >= samples * length:
            break
    whole = torch.cat(parts, 1) if parts else torch.zeros(1, 0, dtype=torch.long)
    count = min(samples, whole.shape[1] // length)
    if not count:
        raise UsageError(f"pileval: has less than {length} tokens in documents of at most {SHORT}")
    notes = [f"pileval: has {count} windows of {length} tokens, not {samples}"] if count < samples else []
    return [whole[:, index * length : (index + 1) * length] for index in range(count)], notes
