"""Calibration data as Golden Stick takes them: BoolQ's questions with their answers, in the words of its version."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from formats.checkpoint import Location
from formats.errors import UsageError

from .blocks import Sample
from .calibration import calibration_data, read_objects
from .recipe import Recipe
from .samples import tokenizer_of
from .steps import is_text

__all__ = ["calibration_samples", "question_texts"]

PUT = {
    "boolq-gs0.6": (
        "Read the passage below and answer the question with yes or no.\n### "
        "Passage:\n{title} -- {passage}\n### Question:\n{question}\n### Answer:"
    ),
    "boolq-gs1.2": (
        "Please read the following passage and answer the question directly with either 'yes' or 'no' without analysis process.\n\n ### "
        "Passage:\n{title} -- {passage}\n### Question:\n{question}\n### Answer:"
    ),
}
"""How BoolQ's questions are put, to the letter; the answer follows, and the end of the text where the tokenizer has such a token."""


def calibration_samples(calib: Any, base: Location, recipe: Recipe, samples: int | None, tokenizer: Any) -> list[Sample]:
    """At most ``samples`` (None: the recipe's) of ``calib``; tokenizer: None: that of the model's folder."""
    if calib is None:
        return []
    wanted = recipe.calibration
    count, template = wanted.samples if samples is None else samples, wanted.template
    tokenizer = tokenizer_of(base) if is_text(calib) and tokenizer is None else tokenizer
    if is_text(calib) and template in PUT:
        found = question_texts(calib, template, count)
        with _ended(tokenizer):
            return list(calibration_data(found, tokenizer, samples=count, length=wanted.length))
    return list(calibration_data(calib, tokenizer, samples=count, length=wanted.length, template=template))


def question_texts(calib: str | os.PathLike[str] | list[Any], template: str, count: int) -> list[Any]:
    """The first ``count`` of BoolQ's questions with their answers; what are no questions, as they are."""
    path = None if isinstance(calib, list) else Path(calib)
    if path is not None and path.suffix not in {".jsonl", ".json"}:
        raise UsageError(f"{path.name}: template {template} puts questions, which are .jsonl or .json; give the recipe another template")
    items = calib if isinstance(calib, list) else (value for _, value in read_objects(Path(calib)))
    return [_put(item, template) for item in itertools.islice(items, count)]


def _put(item: Any, template: str) -> Any:
    """A question as a text, anything else as it is."""
    keys = ("title", "passage", "question")
    if not isinstance(item, dict) or not all(key in item for key in keys) or not isinstance(item.get("answer"), bool):
        return item
    return PUT[template].format(**{key: item[key] for key in keys}) + ("yes" if item["answer"] else "no")


@contextlib.contextmanager
def _ended(tokenizer: Any) -> Iterator[None]:
    """Texts end with the tokenizer's token for that, if it can add one."""
    before = getattr(tokenizer, "add_eos_token", None)
    able = before is not None and getattr(tokenizer, "eos_token", None) is not None
    if able:
        tokenizer.add_eos_token = True
    try:
        yield
    finally:
        if able:
            tokenizer.add_eos_token = before
