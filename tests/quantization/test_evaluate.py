"""Accuracy of yes and no: which tokens are compared, that padding changes nothing, where the data is looked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from formats.errors import UnreadableError, UsageError
from quantize.calibration import prompt
from quantize.evaluate import Accuracy, PrecisionTest
from quantize.run import load_model, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny.TINYLM)


@pytest.fixture(scope="module")
def model():
    return load_model(tiny.TINYLM).float()


class Oracle(nn.Module):
    """Says yes where a prompt has the token ``sign``."""

    def __init__(self, sign: int, yes: int, no: int) -> None:
        super().__init__()
        self.sign, self.yes, self.no, self.widths = sign, yes, no, []

    def forward(self, input_ids, attention_mask):
        self.widths.append(tuple(input_ids.shape))
        logits = torch.zeros(*input_ids.shape, 2048)
        says = ((input_ids == self.sign) & (attention_mask == 1)).any(1)
        logits[:, -1, self.yes], logits[:, -1, self.no] = says.float(), (~says).float()
        return SimpleNamespace(logits=logits)


def test_right_answers_are_counted(tokenizer, tmp_path: Path) -> None:
    path = tiny.questions(tmp_path / "q.jsonl")
    test = PrecisionTest(nn.Identity(), tokenizer, "boolq", 5, data=path)
    ids = [set(tokenizer(prompt(one, "boolq"))["input_ids"]) for one in tiny.QUESTIONS]
    sign = next(token for token in ids[0] if any(token not in one for one in ids))
    wanted = sum((sign in one) == question["answer"] for one, question in zip(ids, tiny.QUESTIONS, strict=True))
    test.model = Oracle(sign, *test.choices)
    found = test.test()
    assert found == Accuracy(wanted, 12)
    assert 0 < wanted < 12
    assert [rows for rows, _ in test.model.widths] == [5, 5, 2]
    assert float(found) == wanted / 12
    assert str(found) == f"{wanted / 12:.4f} ({wanted} of 12)"
    test.model = Oracle(sign, *reversed(test.choices))
    assert test.test().right == 12 - wanted


def test_the_tokens_are_the_first_in_which_the_answers_differ(tokenizer) -> None:
    test = PrecisionTest(nn.Identity(), tokenizer, data=tiny.TINYLM / "config.json")
    for token, word in zip(test.choices, ("yes", "no"), strict=True):
        whole = tokenizer(f"Answer: {word}")["input_ids"]
        start = [*tokenizer("Answer:")["input_ids"], *test.shared]
        assert whole[: len(start) + 1] == [*start, token]


class Letters:
    """A tokenizer of letters: both answers begin with the same one, a space."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(one) for one in ids)


def test_what_both_answers_begin_with_goes_to_the_prompt(tmp_path: Path) -> None:
    test = PrecisionTest(nn.Identity(), Letters(), data=tiny.questions(tmp_path / "q.jsonl"))
    assert (test.shared, test.choices) == ([32], (ord("y"), ord("n")))
    ids, answer = next(test._questions())
    assert "".join(map(chr, ids)) == prompt(tiny.QUESTIONS[0]) + " "
    assert answer is True


def test_answers_that_no_token_tells_apart() -> None:
    def deaf(text, **_):
        return {"input_ids": [1, 2]}

    with pytest.raises(UsageError, match="no token tells them apart"):
        PrecisionTest(nn.Identity(), deaf, data=tiny.TINYLM / "config.json")


def test_a_trained_model_answers_as_it_does_alone(model, tokenizer, tmp_path: Path) -> None:
    path = tiny.questions(tmp_path / "q.jsonl")
    test = PrecisionTest(model, tokenizer, "boolq", 4, data=path)
    rows = [ids for ids, _ in test._questions()]
    assert len({len(row) for row in rows}) > 1
    with torch.no_grad():
        alone = [model(torch.tensor([row])).logits[0, -1, list(test.choices)] for row in rows]
        ids, mask = test._padded(rows)
        together = model(input_ids=ids, attention_mask=mask).logits[:, -1, list(test.choices)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-3, atol=1e-3)
    says = [bool(pair[0] > pair[1]) for pair in alone]
    right = sum(one == question["answer"] for one, question in zip(says, tiny.QUESTIONS, strict=True))
    assert {PrecisionTest(model, tokenizer, "boolq", size, data=path).test().right for size in (1, 5, 12)} == {right}


def test_long_prompts_keep_their_end(tokenizer, tmp_path: Path) -> None:
    test = PrecisionTest(nn.Identity(), tokenizer, data=tiny.questions(tmp_path / "q.jsonl"), length=7)
    whole = tokenizer(prompt(tiny.QUESTIONS[0]))["input_ids"]
    assert next(test._questions())[0] == [*whole, *test.shared][-7:]


class Speaker(nn.Module):
    """Generates the words it was given, one row each."""

    def __init__(self, words: list[str]) -> None:
        super().__init__()
        self.words = list(words)

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample):
        assert not do_sample
        said = [self.words.pop(0).ljust(max_new_tokens)[:max_new_tokens] for _ in input_ids]
        return torch.cat([input_ids, torch.tensor([[ord(letter) for letter in word] for word in said])], 1)


def test_generated_answers(tmp_path: Path) -> None:
    path = tiny.questions(tmp_path / "q.jsonl")
    words = ["Yes", "no", " yes", "yes", "maybe", "nope"]  # wanted: yes, no, yes, no, yes, no
    test = PrecisionTest(Speaker(words), Letters(), "boolq", 3, data=path, samples=6, score="generate")
    assert test.test() == Accuracy(4, 6)


def test_the_data_is_found_and_asked_for(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEIGHBRIDGE_DATA", raising=False)
    with pytest.raises(UsageError, match=r"boolq: has no place: \$WEIGHBRIDGE_DATA is not set; get dev\.jsonl as github\.com/"):
        PrecisionTest(nn.Identity(), tokenizer, "boolq", 1, "cpu")
    monkeypatch.setenv("WEIGHBRIDGE_DATA", str(tmp_path))
    with pytest.raises(UsageError, match=r"boolq: is not under \$WEIGHBRIDGE_DATA"):
        PrecisionTest(nn.Identity(), tokenizer)
    last = tiny.questions(tmp_path / "boolq.jsonl")
    assert PrecisionTest(nn.Identity(), tokenizer).path == last
    first = tiny.questions(tmp_path / "boolq" / "dev.jsonl")
    assert PrecisionTest(nn.Identity(), tokenizer).path == first
    assert PrecisionTest(nn.Identity(), tokenizer, str(last)).path == last
    for dataset in ("ceval", str(tmp_path / "none.jsonl")):
        with pytest.raises(UsageError, match=r"boolq, nor a|no such file"):
            PrecisionTest(nn.Identity(), tokenizer, dataset)


@pytest.mark.parametrize("line", [{"title": "a", "passage": "b", "question": "c"}, {**tiny.QUESTIONS[0], "answer": "yes"}, 3])
def test_lines_that_are_no_questions(tokenizer, tmp_path: Path, line: object) -> None:
    path = tiny.questions(tmp_path / "q.jsonl")
    path.write_text(path.read_text() + json.dumps(line))
    with pytest.raises(UnreadableError, match=r"q\.jsonl, line 13: is no question"):
        PrecisionTest(Oracle(0, 1, 2), tokenizer, data=path).test()
    path.write_text("")
    with pytest.raises(UsageError, match="holds no question"):
        PrecisionTest(Oracle(0, 1, 2), tokenizer, data=path).test()


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("samples", -1), ("length", True), ("score", "guess")])
def test_arguments_that_make_no_sense(tokenizer, name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{name}: "):
        PrecisionTest(nn.Identity(), tokenizer, data=tiny.TINYLM / "config.json", **{name: value})
