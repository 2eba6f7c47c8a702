"""Is the model still any good? BoolQ's accuracy, asked and scored as msModelSlim's precision tool does: one token, yes or no.

``PrecisionTest(model, tokenizer, "boolq", batch_size, device).test()`` gives an ``Accuracy``. The data is BoolQ's own ``dev.jsonl``
(``title``, ``passage``, ``question``, ``answer``), or any file with these keys.

Defined by msModelSlim 26.1.0: ``precision_tool/precision_tool.py`` of its repository; ``pytorch/llm_ptq/mix_calibration`` of its package
scores alike. The prompt is ``PROMPT``, tokenized with the tokenizer's own special tokens and cut where it cuts (``model_max_length``). The
two answers are the last tokens of ``SENTENCE`` with "yes" and with "no"; the model says yes where the first has the larger
log-probability after the prompt, so a tie is a no. Of a word that takes several tokens only the last counts.

Where this differs from the tool: prompts of a batch are filled up on the left whatever the tokenizer's ``padding_side`` is (the tool reads
the last place of each row, which on the right is padding); the device need not be an NPU; the result is returned, and logged in its words.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formats.errors import UnreadableError, UsageError

from .calibration import prompt, read_objects
from .config import QuantConfig
from .devices import resolve

__all__ = ["Accuracy", "PrecisionTest"]

DATA = "WEIGHBRIDGE_DATA"
PLACES = {"boolq": ("boolq/dev.jsonl", "boolq.jsonl", "dev.jsonl")}
"""Where a data set's file may lie under ``$WEIGHBRIDGE_DATA``."""
PROMPT = "{title} -- {passage}\nQuestion: {question}?\nAnswer:"
"""What is asked. (The prompt of the tool's calibration guide has no space after "Question:".)"""
SENTENCE = "How can we learning machine learning: "
"""What an answer is appended to, to find its token."""
ANSWERS = ("yes", "no")
SCORES = ("token", "generate")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accuracy:
    """How many of how many questions were answered rightly. ``float()`` is the share."""

    right: int
    total: int

    def __float__(self) -> float:
        return self.right / self.total

    def __str__(self) -> str:
        return f"{float(self):.4f} ({self.right} of {self.total})"


class PrecisionTest:
    """Asks ``model`` the questions of a data set.

    model, tokenizer   as transformers has them, or called alike
    dataset            "boolq", or the path of a ``.jsonl`` file with the same keys
    batch_size         questions at a time; the answers do not depend on it
    device             "cpu", "npu", "npu:1", "gpu", "cuda:0": where the model is moved, unless it is spread over several
    data               the data set's file; None: under ``$WEIGHBRIDGE_DATA``
    samples            only the first so many questions
    length             of a longer prompt, only the last so many tokens; None: what the tokenizer leaves of it
    score              "token": the likelier of two tokens. "generate": what a few generated tokens begin with; else is wrong
    template           what is asked, with keys of the data's objects in braces

    :raises UsageError: no such data set, or its file is not there; the message says where to get it
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        dataset: str = "boolq",
        batch_size: int = 1,
        device: str = QuantConfig.dev_type,
        *,
        data: str | os.PathLike[str] | None = None,
        samples: int | None = None,
        length: int | None = None,
        score: str = "token",
        template: str = PROMPT,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("length", length), ("samples", samples)):
            if value is None and name != "batch_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name}: {value!r} is not a whole number from 1")
        if score not in SCORES:
            raise UsageError(f"score: {score!r} is not one of {', '.join(SCORES)}")
        self.path = _find(dataset, data)
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.samples, self.length, self.score = samples, length, score
        self.device = resolve(device)
        self.choices = _choices(tokenizer)
        self.template = template

    def test(self) -> Accuracy:
        """Ask everything. Raises UnreadableError for a line that is no question, UsageError if there is none."""
        found = [said == right for said, right in self.answers()]
        if not found:
            raise UsageError(f"{self.path.name}: holds no question")
        accuracy = Accuracy(sum(found), len(found))
        logger.info("correct rate:%s, correct total:%s, sum_total:%s", float(accuracy), accuracy.right, accuracy.total)
        return accuracy

    def answers(self) -> Iterator[tuple[bool | None, bool]]:
        """(what the model says, what is right) of each question; None: neither yes nor no. Raises UnreadableError as ``test`` does."""
        if not getattr(self.model, "hf_device_map", None):
            self.model.to(self.device)
        self.model.eval()
        for batch in _batches(self.questions(), self.batch_size):
            ids, mask = self._padded([ids for ids, _ in batch])
            with torch.no_grad():
                said = self._likelier(ids, mask) if self.score == "token" else self._generated(ids, mask)
            yield from ((found, wanted) for found, (_, wanted) in zip(said, batch, strict=True))

    def questions(self) -> Iterator[tuple[list[int], bool]]:
        """(prompt's ids, answer) of each line. Raises UnreadableError as ``test`` does."""
        for place, item in itertools.islice(read_objects(self.path), self.samples):
            where = f"{self.path.name}{place}"
            if not isinstance(item, dict) or not isinstance(item.get("answer"), bool):
                raise UnreadableError(f"{where}: is no question: wanted an object with title, passage, question and answer (true or false)")
            ids = list(self.tokenizer(prompt(item, self.template, where), truncation=True)["input_ids"])
            yield ids if self.length is None else ids[-self.length :], item["answer"]

    def _padded(self, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """(ids, mask), both ``[batch, tokens]``, filled up on the left."""
        width = max(map(len, prompts))
        pad = next((one for name in ("pad_token_id", "eos_token_id") if isinstance(one := getattr(self.tokenizer, name, None), int)), 0)
        ids = torch.tensor([[pad] * (width - len(one)) + one for one in prompts])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
        return ids.to(self.device), mask.to(self.device)

    def _likelier(self, ids: Tensor, mask: Tensor) -> list[bool]:
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, -1, :]
        yes, no = torch.log_softmax(logits.float(), dim=-1)[:, list(self.choices)].unbind(1)
        found: list[bool] = (yes > no).tolist()
        return found

    def _generated(self, ids: Tensor, mask: Tensor) -> list[bool | None]:
        generate: Any = self.model.generate
        made = generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)[:, ids.shape[1] :]
        words = [self.tokenizer.decode(row.tolist(), skip_special_tokens=True).strip().lower() for row in made]
        return [True if word.startswith("yes") else False if word.startswith("no") else None for word in words]


def _find(dataset: str, data: str | os.PathLike[str] | None) -> Path:
    if data is None and dataset not in PLACES and Path(dataset).suffix == ".jsonl":
        data = dataset
    if data is not None:
        if not Path(data).is_file():
            raise UsageError(f"{data}: there is no such file of questions")
        return Path(data)
    if dataset not in PLACES:
        raise UsageError(f"dataset: {dataset!r} is not one of {', '.join(PLACES)}, nor a .jsonl file")
    root = os.environ.get(DATA)
    found = [Path(root) / place for place in PLACES[dataset] if (Path(root) / place).is_file()] if root else []
    if not found:
        where = f"is not under ${DATA} ({root})" if root else f"has no place: ${DATA} is not set"
        raise UsageError(
            f"{dataset}: {where}; get dev.jsonl as github.com/google-research-datasets/boolean-questions says, put it there as "
            f"{PLACES[dataset][0]}, or pass data="
        )
    return found[0]


def _choices(tokenizer: Any) -> tuple[int, int]:
    """The tokens of yes and no. Raises UsageError if they are one."""
    yes, no = (tokenizer(f"{SENTENCE}{answer}", add_special_tokens=False)["input_ids"][-1] for answer in ANSWERS)
    if yes == no:
        raise UsageError(f"tokenizer: {' and '.join(ANSWERS)} end in the same token, {yes}, so that no token tells them apart")
    return yes, no


def _batches(questions: Iterator[tuple[list[int], bool]], size: int) -> Iterator[list[tuple[list[int], bool]]]:
    while batch := list(itertools.islice(questions, size)):
        yield batch
