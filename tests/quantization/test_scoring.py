"""Samples by how much quantization moves them: KL divergences by the whole models, and what is written of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from typer.testing import CliRunner

import convert
from convert.cli import app
from formats.errors import DestinationError, RefusedError, UsageError
from quantize.calibration import calibration_data, prompt
from quantize.models import load_model, load_tokenizer
from quantize.recipe import loads
from quantize.run import quantize_model
from quantize.scoring import Choice, SampleScore, Scores, score_samples
from quantize.streamed import Rounding, round_folder

TEXTS = [
    "A kernel schedules threads.",
    "The index of a database is a tree.",
    "Sockets carry bytes between hosts.",
    "def f(x): return x",
]


@pytest.fixture(scope="module")
def four(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of four bits, dequantized: what is computed is beyond doubt."""
    place = tmp_path_factory.mktemp("four")
    round_folder(source, place / "four", Rounding(4, 32), "gptq")
    convert.convert(place / "four", place / "dense", "dense", scale_dtype="float32")
    return place


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return tiny.questions(tmp_path / "q.jsonl")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": one}, indent=None) + "\n" for one in TEXTS) + "\n")
    return path


def scores_of(logits: torch.Tensor) -> np.ndarray:
    wide = logits.numpy().astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def divergences(source: Path, quantized: Path, prompts: list[str]) -> list[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """(KL by position, last logits of the float and of the quantized model) of each prompt, whole models at once."""
    tokenizer = load_tokenizer(source)
    models = [load_model(folder).float() for folder in (source, quantized)]
    found = []
    for text in prompts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            floats, other = (model(ids).logits[0] for model in models)
        p, q = scores_of(floats), scores_of(other)
        found.append(((np.exp(p) * (p - q)).sum(-1), floats[-1], other[-1]))
    return found


def test_scores_of_questions(source: Path, four: Path, questions: Path) -> None:
    result = score_samples(source, [questions], quantized=four / "four")
    wanted = divergences(source, four / "dense", [prompt(one, "boolq") for one in tiny.QUESTIONS])
    yes, no = (load_tokenizer(source)(f"Answer: {word}")["input_ids"] for word in ("yes", "no"))
    part = next(index for index, pair in enumerate(zip(yes, no, strict=False)) if pair[0] != pair[1])
    for one, (kl, floats, other), question in zip(result.samples, wanted, tiny.QUESTIONS, strict=True):
        assert one.kl == pytest.approx(kl.mean(), rel=1e-3)
        assert one.last_kl == pytest.approx(kl[-1], rel=1e-3)
        assert one.tokens == len(kl)
        assert one.score == one.kl
        assert one.same_token == bool(floats.argmax() == other.argmax())
        assert one.answer == question["answer"]
        assert one.float_answer == bool(floats[yes[part]] > floats[no[part]])
        assert one.quantized_answer == bool(other[yes[part]] > other[no[part]])
        assert one.flips == (one.float_answer != one.quantized_answer)
        assert json.loads(one.line or "") == question
    last = score_samples(source, [questions], quantized=four / "four", position="last")
    assert [one.score for one in last.samples] == [one.last_kl for one in result.samples]
    assert [one.number for one in last.ranked] == sorted(range(12), key=lambda index: -result.samples[index].last_kl)


def test_a_recipe_is_the_folder_it_makes(source: Path, questions: Path, texts: Path, tmp_path: Path) -> None:
    """Quantized by the samples themselves, or by other data."""
    (tmp_path / "work").mkdir()
    recipe = loads("quant: {mm_tensor: false, act_method: 1}", "plain")
    quantize_model(source, tmp_path / "own", recipe, "msmodelslim", calib=questions)
    quantize_model(source, tmp_path / "other", recipe, "msmodelslim", calib=texts)
    for calib, folder in ((None, "own"), (texts, "other")):
        made = score_samples(source, [questions], recipe, calib=calib, work_dir=tmp_path / "work")
        named = score_samples(source, [questions], quantized=tmp_path / folder)
        assert [one.kl for one in made.samples] == [one.kl for one in named.samples]
        assert (made.quantized, named.quantized) == ("recipe plain", str(tmp_path / folder))
    assert list((tmp_path / "work").iterdir()) == []


def test_texts_and_windows_are_scored_too(source: Path, four: Path, texts: Path, tmp_path: Path) -> None:
    wanted = divergences(source, four / "dense", TEXTS)
    result = score_samples(source, [texts], quantized=four / "four")
    assert [one.kl for one in result.samples] == pytest.approx([kl.mean() for kl, _, _ in wanted], rel=1e-3)
    assert all((one.answer, one.flips) == (None, None) for one in result.samples)
    (tmp_path / "plain.txt").write_text(TEXTS[1])
    (plain,) = score_samples(source, [tmp_path / "plain.txt"], quantized=four / "four").samples
    assert (plain.kl, plain.line) == (pytest.approx(wanted[1][0].mean(), rel=1e-3), None)


# --- choosing ---------------------------------------------------------------------------------------------------------


def scored(*values: float, file: str = "a", start: int = 0, repeats: tuple[int, ...] = ()) -> list[SampleScore]:
    return [
        SampleScore(start + index, file, f", line {index + 1}", f"{file}{index}", 9, value, value, value, True, repeats=index in repeats)
        for index, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("how", "count", "chosen"),
    [
        ("worst", 2, [1, 3]),
        ("worst", 9, [0, 1, 2, 3, 4]),
        ("keep", 2, [2, 4]),
        ("keep", 9, [0, 1, 2, 3, 4]),
        ("drop", 2, [0, 2, 4]),
        ("drop", 1, [0, 2, 3, 4]),
    ],
)
def test_choices_are_in_the_sources_order(how: str, count: int, chosen: list[int]) -> None:
    assert [one.number for one in Choice(how, count).of(scored(0.3, 0.9, 0.1, 0.5, 0.2))] == chosen


def test_choices_of_each_file_ties_and_repeats() -> None:
    both = [*scored(0.3, 0.9, 0.1), *scored(0.01, 0.02, 0.03, file="b", start=3)]
    assert [one.number for one in Choice("worst", 1, each=True).of(both)] == [1, 5]
    assert [one.number for one in Choice("worst", 2).of(both)] == [0, 1]
    assert [one.number for one in Choice("worst", 2).of(scored(0.5, 0.5, 0.5))] == [0, 1]
    assert [one.number for one in Choice("worst", 2).of(scored(0.3, 0.9, 0.9, 0.5, repeats=(2,)))] == [1, 3]
    assert [one.number for one in Choice("drop", 1).of(scored(0.3, 0.9, 0.9, 0.5, repeats=(2,)))] == [0, 3]
    with pytest.raises(UsageError, match="drop 3: leaves none of 3 samples"):
        Choice("drop", 3).of(scored(0.1, 0.2, 0.3))
    for how, count in (("best", 1), ("keep", 0)):
        with pytest.raises(UsageError, match=f"{how} {count}: wanted keep, drop or worst"):
            Choice(how, count).of(scored(0.1))


def test_what_is_written_are_the_sources_own_lines(source: Path, four: Path, questions: Path, tmp_path: Path) -> None:
    lines = questions.read_text().splitlines()
    lines[4] = lines[4].replace('": "', '" :  "', 1)  # written as no one writes JSON
    questions.write_text("\ufeff" + "\r\n\r\n".join(lines), "utf-8")
    result = score_samples(source, [questions], quantized=four / "four", choice=Choice("keep", 11), out=tmp_path / "out.jsonl")
    left = result.ranked[0].number
    assert (tmp_path / "out.jsonl").read_text() == "".join(f"{line}\n" for index, line in enumerate(lines) if index != left)
    assert [one.number for one in result.samples if not one.chosen] == [left]
    tokenizer = load_tokenizer(source)
    assert len(calibration_data(tmp_path / "out.jsonl", tokenizer)) == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "q.jsonl"]


def test_several_files_and_a_set_that_grows(source: Path, four: Path, questions: Path, texts: Path, tmp_path: Path) -> None:
    """Candidates of two domains beside the present data, of which one is a candidate again; another is in both files."""
    already = {"text": prompt(tiny.QUESTIONS[2], "boolq")}
    (tmp_path / "more.json").write_text(json.dumps([{"text": "Ein Kern plant Fäden."}, {"text": TEXTS[0]}, "a plain text", already]))
    result = score_samples(
        source, [texts, tmp_path / "more.json"], "w4a16-rtn", calib=questions, choice=Choice("worst", 2, each=True),
        out=tmp_path / "o.jsonl", extend=True,
    )  # fmt: skip
    assert result.extended == 12
    assert [one.repeats for one in result.samples] == [False] * 4 + [False, True, False, True]
    assert "2 of 8 samples repeat an earlier one, or the calibration data, and are not chosen" in result.notes
    written = (tmp_path / "o.jsonl").read_text().splitlines()
    assert written[:12] == questions.read_text().splitlines()
    assert len(written) == 12 + 2 + 2
    assert json.loads(written[-2]) == {"text": "Ein Kern plant Fäden."}
    assert (json.loads(written[-1]), "Fäden" in written[-2]) == ("a plain text", True)
    assert result.by_file == {
        file: pytest.approx(np.mean([one.score for one in result.samples if one.file == file])) for file in ("t.jsonl", "more.json")
    }
    assert len(calibration_data(tmp_path / "o.jsonl", load_tokenizer(source))) == 16


def test_the_same_every_time(source: Path, questions: Path) -> None:
    recipe = loads("quant: {mm_tensor: false}")
    first, second = (score_samples(source, [questions], recipe) for _ in range(2))
    assert first.samples == second.samples


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"data": []}, UsageError, "no file was named"),
        ({"position": "first"}, UsageError, "position: 'first' is neither all nor last"),
        ({"choice": Choice("keep", 1)}, UsageError, r"to write samples, name the file \(--out\) and which"),
        ({"out": "o.jsonl"}, UsageError, "to write samples"),
        ({"extend": True}, UsageError, "extend: adds to calibration data, so it needs --calib and --out"),
        ({"choice": Choice("keep", 1), "out": "o.txt"}, UsageError, r"--out o\.txt: wanted a name that ends in \.jsonl"),
        ({"choice": Choice("keep", 1), "out": "no/o.jsonl"}, DestinationError, "no: there is no such folder"),
        ({"choice": Choice("keep", 1), "out": "there.jsonl"}, DestinationError, "exists already"),
        ({"choice": Choice("keep", 1), "out": "o.jsonl", "data": ["plain.txt"]}, RefusedError, r"plain\.txt: is plain text, which has no"),
        ({"calib": "there.jsonl", "quantized": "x"}, UsageError, "is quantized already; leave one of the two out"),
    ],
)
def test_what_is_said_before_anything_is_run(
    change: dict[str, Any],
    error: type[Exception],
    words: str,
    source: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quantize.scoring.quantize_model", lambda *_, **__: pytest.fail("was quantized"))
    monkeypatch.chdir(tmp_path)
    for name in ("there.jsonl", "plain.txt"):
        Path(name).write_text("{}\n")
    with pytest.raises(error, match=words):
        score_samples(**{"model_dir": source, "data": [questions], **change})
    assert Path("there.jsonl").read_text() == "{}\n"


def test_the_command_line(source: Path, four: Path, questions: Path, tmp_path: Path) -> None:
    def invoke(*args: object) -> Any:
        return CliRunner().invoke(app, ["calibration", *map(str, (source, questions, *args))])

    wanted: Scores = score_samples(source, [questions], quantized=four / "four")
    said = invoke("--quantized", four / "four", "--worst", 3, "--out", tmp_path / "bad.jsonl", "--top", 2)
    assert said.exit_code == 0, said.output
    for place, one in enumerate(wanted.ranked):
        assert (f"line {one.number + 1} " in said.stdout) == (place < 2 or place >= 10)
    assert "3 samples written" in said.stdout
    chosen = sorted(one.number for one in wanted.ranked[:3])
    lines = questions.read_text().splitlines()
    assert (tmp_path / "bad.jsonl").read_text().splitlines() == [lines[index] for index in chosen]
    found = json.loads(invoke("--quantized", four / "four", "--json").stdout)
    assert [one["kl"] for one in found["samples"]] == [one.kl for one in wanted.samples]
    said = invoke("--worst", 3, "--keep", 1, "--out", tmp_path / "o.jsonl")
    assert (said.exit_code, said.stdout) == (2, "")
    assert "exclude each other" in said.stderr
    assert invoke("--quantized", four / "four", "--worst", 3, "--out", tmp_path / "bad.jsonl").exit_code == 1
    assert invoke("--quantized", four / "four", "--worst", 3, "--out", tmp_path / "bad.jsonl", "--overwrite").exit_code == 0
