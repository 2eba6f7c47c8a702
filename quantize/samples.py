"""What a model is measured with: a text, texts or questions, as samples of token ids.

=========  ===================================================================================================================
text       a file of any other name: windows of ``length`` tokens, one after another; a shorter rest counts only if it is all
texts      ``.jsonl`` or ``.json``: a sample each (``calibration.prompt`` makes an object's text), of which the end is cut off
questions  objects with an ``answer`` that is true or false, beside title, passage and question: the prompt of ``PrecisionTest``,
           of which the beginning is cut off, and yes and no as that class compares them
=========  ===================================================================================================================
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from formats.checkpoint import Location
from formats.errors import UnreadableError

from .calibration import BOOLQ, calibration_data, read_objects
from .devices import HOST
from .evaluate import PROMPT, PrecisionTest
from .models import load_tokenizer

__all__ = ["Data", "length_of", "read_data", "tokenizer_of"]

LENGTH = 2048
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class Data:
    """Samples, each ``[input_ids]`` or ``[input_ids, attention_mask]``, [1, tokens] int64.

    places    where each is from: ", line 3", "[2]", ", tokens from 512"
    answers   of questions; choices: the tokens that say yes and no
    """

    name: str
    kind: Literal["text", "texts", "questions"]
    samples: list[list[Tensor]]
    places: list[str]
    answers: tuple[bool, ...] = ()
    choices: tuple[int, int] | None = None


def read_data(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    samples: int | None = None,
    length: int = LENGTH,
    template: str | None = None,
    calibrating: bool = False,
) -> Data:
    """The first ``samples`` (None: all) samples of a file. ``template`` makes texts of objects, questions too.

    calibrating   questions are put as calibration data have them, not as ``PrecisionTest`` asks them: the two differ by a space

    :raises UsageError: no such file, nothing in it, or a template that does not fit
    :raises UnreadableError: a file that is no JSON or no text, or a line among questions that is none
    """
    place = Path(path)
    if place.suffix not in {".jsonl", ".json"}:
        found = calibration_data(place, tokenizer, samples=samples, length=length)
        return Data(place.name, "text", found, [f", tokens from {index * length}" for index in range(len(found))])
    places = [where for where, _ in read_objects(place)][:samples]
    if template is None and _is_question(next((item for _, item in read_objects(place)), None)):
        return _questions(place, places, tokenizer, samples, length, calibrating)
    return Data(place.name, "texts", calibration_data(place, tokenizer, samples=samples, length=length, template=template), places)


def _is_question(item: Any) -> bool:
    return isinstance(item, Mapping) and all(key in item for key in ("title", "passage", "question", "answer"))


def _questions(path: Path, places: list[str], tokenizer: Any, samples: int | None, length: int, calibrating: bool) -> Data:
    template = BOOLQ if calibrating else PROMPT
    test = PrecisionTest(nn.Identity(), tokenizer, data=path, device=HOST, samples=samples, length=length, template=template)
    asked = list(test.questions())
    return Data(
        path.name, "questions", [[torch.tensor([ids])] for ids, _ in asked], places, tuple(answer for _, answer in asked), test.choices
    )


def length_of(config: Any, wanted: int | None) -> int:
    """``wanted`` tokens, else ``LENGTH``, or what the model has positions for if that is less."""
    if wanted is not None:
        return wanted
    positions = getattr(config, "max_position_embeddings", None)
    return min(LENGTH, positions) if isinstance(positions, int) and positions > 1 else LENGTH


def tokenizer_of(*locations: Location | None) -> Any:
    """The tokenizer of the first of the folders that has one."""
    folders = [location for location in locations if location is not None]
    found = next((location.folder for location in folders if any(name in location.names for name in TOKENIZERS)), None)
    if found is None:
        raise UnreadableError(f"{folders[0].folder}: has no tokenizer; name the float model's folder (base model)")
    tokenizer = load_tokenizer(found)
    tokenizer.model_max_length = int(1e30)  # samples are cut here; a whole text is tokenized at once, which it would warn of
    return tokenizer
