"""Calibration data: from a file, texts or token ids to the list that ``AntiOutlier`` and ``Calibrator`` take.

That list is msModelSlim's: a sample is ``[input_ids, attention_mask]``, each ``[1, tokens]`` int64. Files:

=========  =========================================================================================================
``.jsonl``   one JSON object (or text) a line; ``template`` makes its text
``.json``    one list of them
others       plain text, cut into windows of ``length`` tokens; a shorter rest counts only if there is no whole window
=========  =========================================================================================================

A ``template`` is "boolq" (``TEMPLATES``), "text" (the object's ``text``), or a text with the object's keys in braces. Without one, the
first template counts whose keys the object has. Of msModelSlim's own files, ``inputs_pretokenized`` holds the text.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.errors import UnreadableError, UsageError

__all__ = ["BOOLQ", "TEMPLATES", "calibration_data", "key_of", "prompt", "read_objects", "repeats"]

BOOLQ = "{title} -- {passage}\nQuestion:{question}?\nAnswer:"
"""The prompt of msModelSlim's tuning guide, to the letter."""
TEMPLATES = {"boolq": BOOLQ, "pretokenized": "{inputs_pretokenized}", "text": "{text}", "prompt": "{prompt}", "content": "{content}"}
"""Templates by name, in the order in which they are tried."""

_SLOT = re.compile(r"\{(\w+)\}")

logger = logging.getLogger(__name__)

Sample = list[Tensor]


def calibration_data(
    source: str | os.PathLike[str] | Sequence[Any],
    tokenizer: Any = None,
    *,
    samples: int | None = None,
    length: int = 2048,
    template: str | None = None,
    device: torch.device | None = None,
) -> list[Sample]:
    """The first ``samples`` (None: all) samples of ``source``: a file, or a list of texts, objects or ``[input_ids, attention_mask]``.

    tokenizer   called as transformers' are; samples that are tensors need none
    length      tokens of a sample at most; what is longer loses its end
    device      where the samples are to lie; None: the CPU, or where they are

    Samples that repeat an earlier one are kept, and a warning is logged: they add nothing.

    :raises UsageError: nothing in it, a template that does not fit, no tokenizer
    :raises UnreadableError: a file that is no JSON or no text
    """
    for name, value in (("samples", samples), ("length", length)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{name}: {value!r} is not a whole number from 1")
    if isinstance(source, (str, os.PathLike)):
        where, items = Path(source).name, _of_file(Path(source), tokenizer, length)
    else:
        where, items = "calibration data", (((f"[{index}]"), item) for index, item in enumerate(source))
    found: list[Sample] = []
    seen: dict[tuple[int, ...], str] = {}
    repeated: list[tuple[str, str]] = []
    for place, item in itertools.islice(items, samples):
        sample = _sample(item, f"{where}{place}", tokenizer, length, template)
        first = seen.setdefault(key_of(sample[0]), place)
        if first != place:
            repeated.append((place, first))
        found.append(sample if device is None else [tensor.to(device) for tensor in sample])
    if not found:
        raise UsageError(f"{where}: holds no calibration sample; one text a line is wanted, or a list of texts")
    if repeated:
        place, first = (one.strip(" ,") for one in repeated[0])
        logger.warning("%s: %d of %d samples repeat an earlier one (%s is %s again)", where, len(repeated), len(found), place, first)
    return found


def repeats(samples: Iterable[Sequence[Tensor]]) -> int:
    """How many samples repeat an earlier one."""
    keys = [key_of(sample[0]) for sample in samples]
    return len(keys) - len(set(keys))


def key_of(ids: Tensor) -> tuple[int, ...]:
    """What two samples of the same tokens have in common; ``ids`` is [1, tokens]."""
    return tuple(ids.flatten().tolist())


def prompt(item: Mapping[str, Any], template: str | None = None, where: str = "sample") -> str:
    """The text of one object. Raises UsageError where the template, or every one, asks for a key that is not there."""
    if template is None:
        names = [name for name, text in TEMPLATES.items() if all(key in item for key in _SLOT.findall(text))]
        if not names:
            raise UsageError(
                f"{where}: has the keys {', '.join(map(str, item)) or 'of nothing'}, and no template fits them; give template, a text with "
                f"keys in braces, or keys of {', '.join(TEMPLATES)}"
            )
        template = names[0]
    text = TEMPLATES.get(template, template)
    if not _SLOT.search(text):
        raise UsageError(f"template: {template!r} is none of {', '.join(TEMPLATES)}, and has no key in braces")

    def fill(slot: re.Match[str]) -> str:
        if slot[1] not in item:
            raise UsageError(f"{where}: the template wants the key {slot[1]!r}, and there are {', '.join(map(str, item)) or 'none'}")
        return str(item[slot[1]])

    return _SLOT.sub(fill, text)


def read_objects(path: Path) -> Iterator[tuple[str, Any]]:
    """(", line N", value) of every line of a ``.jsonl`` file, or ("[N]", value) of the list in a ``.json`` file."""
    with _opened(path) as file:
        if path.suffix == ".json":
            content = _json(file.read(), path.name)
            if not isinstance(content, list):
                raise UnreadableError(f"{path.name}: holds a {type(content).__name__}, and a list of samples was wanted; or name it .jsonl")
            yield from ((f"[{index}]", item) for index, item in enumerate(content))
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f", line {number}", _json(line, f"{path.name}, line {number}")


def _of_file(path: Path, tokenizer: Any, length: int) -> Iterator[tuple[str, Any]]:
    if path.suffix in {".jsonl", ".json"}:
        yield from read_objects(path)
        return
    with _opened(path) as file:
        text = file.read()
    (ids,) = _tokens(tokenizer, text, path.name)
    whole = len(ids) // length * length or len(ids)
    for start in range(0, whole, length):
        yield f", tokens from {start}", [ids[start : start + length].unsqueeze(0)]


class _opened:  # noqa: N801 - it reads as a function
    """``path`` as UTF-8 text, whose errors say which file it was."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        if not self.path.is_file():
            raise UsageError(f"{self.path}: there is no such file of calibration data")
        try:
            self.file = self.path.open(encoding="utf-8-sig")
        except OSError as error:
            raise UnreadableError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        return self.file

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.file.close()
        if isinstance(error, UnicodeDecodeError):
            raise UnreadableError(f"{self.path.name}: is not UTF-8 text; calibration data is .jsonl, .json or plain text") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{where}: is not JSON ({error})") from None


def _sample(item: Any, where: str, tokenizer: Any, length: int, template: str | None) -> Sample:
    if isinstance(item, (list, tuple)) and item and all(isinstance(one, Tensor) for one in item[:2]):
        ids, mask = item[0], item[1] if len(item) > 1 else torch.ones_like(item[0])
        if ids.dim() != 2 or ids.shape != mask.shape or not ids.numel():
            raise UsageError(f"{where}: input_ids {list(ids.shape)} and mask {list(mask.shape)}, and two of [1, tokens] were wanted")
        return [ids[:, :length], mask[:, :length]]
    if isinstance(item, Mapping):
        item = prompt(item, template, where)
    if not isinstance(item, str):
        raise UsageError(f"{where}: a {type(item).__name__} is no sample; a text, an object or [input_ids, attention_mask] was wanted")
    ids = _tokens(tokenizer, item, where)[:, :length]
    return [ids, torch.ones_like(ids)]


def _tokens(tokenizer: Any, text: str, where: str) -> Tensor:
    """``[1, tokens]`` int64."""
    if tokenizer is None:
        raise UsageError(f"{where}: is text, and there is no tokenizer; give one, or samples of [input_ids, attention_mask]")
    ids = torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.long)
    if not ids.numel():
        raise UsageError(f"{where}: has no token")
    return ids
