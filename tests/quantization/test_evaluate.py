"""Accuracy of yes and no: as msModelSlim's own code finds it, question by question; that padding changes nothing; where the data is."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from interpreters import interpreter
from safetensors.torch import load_file, save_file
from torch import nn

from formats.errors import UnreadableError, UsageError
from quantize.evaluate import Accuracy, PrecisionTest
from quantize.models import load_model, load_tokenizer


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
    ids = [set(tokenizer(asked(one))["input_ids"]) for one in tiny.QUESTIONS]
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


def asked(question: dict[str, object]) -> str:
    return f"{question['title']} -- {question['passage']}\nQuestion: {question['question']}?\nAnswer:"


def test_the_tokens_are_the_last_of_each_word(tokenizer) -> None:
    """This small vocabulary has " no", and " y" and "es"."""
    test = PrecisionTest(nn.Identity(), tokenizer, data=tiny.TINYLM / "config.json")
    assert [tokenizer.decode([token]) for token in test.choices] == ["es", " no"]


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text, add_special_tokens=True, truncation=False):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(one) for one in ids)


def test_the_last_token_of_an_answer_counts_and_the_prompt_ends_with_the_colon(tmp_path: Path) -> None:
    test = PrecisionTest(nn.Identity(), Letters(), data=tiny.questions(tmp_path / "q.jsonl"))
    assert test.choices == (ord("s"), ord("o"))
    ids, answer = next(test.questions())
    assert "".join(map(chr, ids)) == asked(tiny.QUESTIONS[0])
    assert answer is True


def test_answers_that_no_token_tells_apart() -> None:
    def deaf(text, **_):
        return {"input_ids": [1, 2]}

    with pytest.raises(UsageError, match="no token tells them apart"):
        PrecisionTest(nn.Identity(), deaf, data=tiny.TINYLM / "config.json")


def test_a_trained_model_answers_as_it_does_alone(model, tokenizer, tmp_path: Path) -> None:
    path = tiny.questions(tmp_path / "q.jsonl")
    test = PrecisionTest(model, tokenizer, "boolq", 4, data=path)
    rows = [ids for ids, _ in test.questions()]
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
    whole = tokenizer(asked(tiny.QUESTIONS[0]))["input_ids"]
    assert next(test.questions())[0] == whole[-7:]


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


def undecided(folder: Path, tokenizer, questions: list[dict[str, object]]) -> None:
    """Make the model in ``folder``, which always says no, say yes to some: as a direction of its last hidden state falls."""
    model = load_model(folder).float()
    with torch.no_grad():
        ends = [model.model(torch.tensor([tokenizer(asked(one))["input_ids"]])).last_hidden_state[0, -1] for one in questions]
    mean = torch.stack(ends).mean(0)
    direction = torch.randn(len(mean), generator=torch.Generator().manual_seed(2))
    direction -= mean * (direction @ mean) / (mean @ mean)
    yes, no = (tokenizer(f"How can we learning machine learning: {one}")["input_ids"][-1] for one in ("yes", "no"))
    tensors = load_file(folder / "model.safetensors")
    head = tensors["lm_head.weight"]
    head[yes] = head[no] + direction.to(head.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def many_questions(path: Path) -> list[dict[str, object]]:
    """Questions of several lengths, written to ``path``."""
    found = []
    for number, (topic, other) in enumerate((one, two) for one in tiny.TOPICS for two in tiny.TOPICS if one != two):
        passage = f"The {topic} is a part of the {other}. " * (1 + number % 4) + ("Yes, it is. yes " * (number % 3))
        question = {"title": topic, "passage": passage, "question": f"is the {topic} in the {other}", "answer": number % 5 < 2}
        found.append(question)
    path.write_text("".join(json.dumps(one) + "\n" for one in found))
    return found


@pytest.mark.oracle
def test_the_tools_own_code_says_the_same_of_every_question(tmp_path: Path) -> None:
    folder, path = tiny.model_folder(tmp_path / "model"), tmp_path / "dev.jsonl"
    questions, tokenizer = many_questions(path), load_tokenizer(folder)
    undecided(folder, tokenizer, questions[::5])
    command = [interpreter("msmodelslim"), str(Path(__file__).parent / "msmodelslim_boolq.py")]
    run = subprocess.run([*command, str(folder), str(path), "out.json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    tool = json.loads((tmp_path / "out.json").read_text())
    test = PrecisionTest(load_model(folder), tokenizer, "boolq", 4, data=path)
    assert list(test.choices) == tool["choices"]
    assert [asked(one) for one in questions] == tool["prompts"]
    answers = list(test.answers())
    assert [said == right for said, right in answers] == tool["right"]
    assert 0.2 < sum(bool(said) for said, _ in answers) / len(questions) < 0.8
    assert test.test() == Accuracy(sum(tool["right"]), len(questions))
