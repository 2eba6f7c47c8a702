"""Prompts of ``serve-check``: a few texts of ours, those of a file, and random tokens where there is no tokenizer."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from formats.errors import UsageError

TEXTS = (
    "A weighbridge weighs a truck with its load and then the empty truck; the difference is what was carried. Nobody unpacks a crate "
    "for it, and nobody needs to know what is inside, as long as the scales are honest and the numbers are written down in time.",
    "In the morning the harbour was quiet. Two boats came back from the night with little in their nets, and the men who had waited on "
    "the quay went home again. By noon the wind had turned to the west, and it began to rain over the hills behind the town.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / len(values)\n\n\n"
    "def variance(values):\n    center = mean(values)\n    return mean([(value - center) ** 2 for value in values])\n",
    "Question: a train leaves at 9:40 and arrives at 13:05, after two stops of ten minutes each. For how long was it moving? Answer: "
    "from 9:40 to 13:05 are three hours and twenty-five minutes; less twenty minutes for the stops, it was moving for three hours and",
)
"""Prompts, where the folder has a tokenizer."""


def read_prompts(prompts: str | os.PathLike[str] | Sequence[str | list[int]] | None) -> list[str | list[int]] | None:
    """Texts and lists of token ids; of a file, one on every line that is not empty. UsageError if there is none."""
    if prompts is None:
        return None
    found: list[str | list[int]] = []
    if isinstance(prompts, (str, os.PathLike)):
        try:
            lines = Path(prompts).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompts {prompts}: cannot be read ({error})") from None
        found = [_prompt(line) for line in lines if line.strip()]
    else:
        found = list(prompts)
    if not found:
        raise UsageError("--prompts: there are none; wanted a text or a JSON list of token ids on every line")
    short = next((one for one in found if not isinstance(one, str) and len(one) < 2), None)
    if short is not None:
        raise UsageError(f"--prompts: {short} has {len(short)} tokens; wanted two or more")
    return found


def _prompt(line: str) -> str | list[int]:
    with contextlib.suppress(ValueError, RecursionError):
        ids = json.loads(line)
        if isinstance(ids, list) and all(type(one) is int and one >= 0 for one in ids):
            return ids
    return line


def random_prompts(vocabulary: int, length: int, count: int = 4) -> list[list[int]]:
    """The same pseudo-random tokens for every model of the vocabulary, but for the first few, which are often special."""
    low = min(4, vocabulary - 1)
    return [[int(one) for one in row] for row in np.random.default_rng(0).integers(low, vocabulary, (count, length))]
