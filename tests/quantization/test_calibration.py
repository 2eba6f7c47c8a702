"""Calibration data: msModelSlim's list form, files, prompts, and what is wrong with them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from formats.errors import UnreadableError, UsageError
from quantize.calibration import BOOLQ, calibration_data, prompt, read_objects, repeats

QUESTION = {"title": "Moon", "passage": "The moon is made of rock.", "question": "is the moon made of cheese", "answer": False}


class Words:
    """A tokenizer: a token for each word, its length."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def lines(path: Path, *items: object) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_the_prompt_is_seed_000s_to_the_letter() -> None:
    assert prompt(QUESTION, "boolq") == "Moon -- The moon is made of rock.\nQuestion:is the moon made of cheese?\nAnswer:"
    assert prompt(QUESTION) == prompt(QUESTION, "boolq") == prompt(QUESTION, BOOLQ)


def test_a_template_takes_the_keys_and_nothing_else() -> None:
    assert prompt({"a": 1, "b": "{a}"}, "{a} of {b} {not this}") == "1 of {a} {not this}"
    assert prompt({"text": "x"}, "{text.__class__} {text}") == "{text.__class__} x"
    assert prompt({"inputs_pretokenized": "as it is", "id": 0}) == "as it is"
    with pytest.raises(UsageError, match=r"line 4: the template wants the key 'passage', and there are title, question"):
        prompt({"title": "a", "question": "b"}, "boolq", "line 4")
    with pytest.raises(UsageError, match="has the keys id, and no template fits them"):
        prompt({"id": 3})
    with pytest.raises(UsageError, match=r"'bool' is none of boolq, .*, and has no key in braces"):
        prompt({"id": 3}, "bool")


def test_lines_become_ids_and_masks(tmp_path: Path) -> None:
    path = lines(tmp_path / "calib.jsonl", {"text": "a bb ccc"}, "dddd e", QUESTION)
    found = calibration_data(path, Words())
    assert [sample[0].tolist() for sample in found[:2]] == [[[1, 2, 3]], [[4, 1]]]
    assert found[2][0].tolist() == [[len(word) for word in prompt(QUESTION).split()]]
    for ids, mask in found:
        assert ids.dtype == mask.dtype == torch.long
        assert torch.equal(mask, torch.ones_like(ids))
    assert [sample[0].tolist() for sample in calibration_data(path, Words(), samples=1, length=2)] == [[[1, 2]]]
    assert len(calibration_data(path, Words(), samples=99)) == 3


def test_only_so_many_lines_are_read(tmp_path: Path) -> None:
    path = lines(tmp_path / "calib.jsonl", "a", "b")
    path.write_text(path.read_text() + "this is not JSON\n")
    assert len(calibration_data(path, Words(), samples=2)) == 2
    with pytest.raises(UnreadableError, match=r"calib\.jsonl, line 3: is not JSON"):
        calibration_data(path, Words(), samples=3)


def test_a_list_in_json_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "calib.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(["a bb", {"prompt": "ccc"}]).encode())
    assert [sample[0].tolist() for sample in calibration_data(path, Words())] == [[[1, 2]], [[3]]]
    path.write_text('{"text": "a"}')
    with pytest.raises(UnreadableError, match=r"calib\.json: holds a dict, and a list of samples was wanted"):
        calibration_data(path, Words())


def test_plain_text_is_cut_into_windows(tmp_path: Path) -> None:
    path = tmp_path / "calib.txt"
    path.write_text("a bb ccc dddd eeeee\nffffff g")
    found = calibration_data(path, Words(), length=3)
    assert [sample[0].tolist() for sample in found] == [[[1, 2, 3]], [[4, 5, 6]]]
    assert [sample[0].tolist() for sample in calibration_data(path, Words(), length=99)] == [[[1, 2, 3, 4, 5, 6, 1]]]


def test_msmodelslims_own_list() -> None:
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.tensor([[0, 1, 1]])
    found = calibration_data([[ids, mask], [ids + 1], [ids, mask, "what is third is ignored"]], length=2)
    assert [sample[0].tolist() for sample in found] == [[[5, 6]], [[6, 7]], [[5, 6]]]
    assert [sample[1].tolist() for sample in found] == [[[0, 1]], [[1, 1]], [[0, 1]]]
    assert all(len(sample) == 2 for sample in found)
    assert repeats(found) == 1
    for bad in ([ids[0], mask[0]], [ids, mask[:, :2]], [ids[:, :0], mask[:, :0]]):
        with pytest.raises(UsageError, match=r"calibration data\[0\]: input_ids"):
            calibration_data([bad])


def test_seed_000s_fifty_times_the_same_line_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "quantize")
    assert len(calibration_data(lines(tmp_path / "calib.jsonl", "other", *["same"] * 50), Words())) == 51
    assert "calib.jsonl: 49 of 51 samples repeat an earlier one (line 3 is line 2 again)" in caplog.text
    caplog.clear()
    calibration_data(lines(tmp_path / "calib.jsonl", "a", "bb"), Words())
    assert not caplog.records


def test_samples_lie_where_they_are_wanted() -> None:
    (sample,) = calibration_data(["a"], Words(), device=torch.device("meta"))
    assert [tensor.device.type for tensor in sample] == ["meta", "meta"]


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", UsageError, "holds no calibration sample"),
        (b"\n  \n", UsageError, "holds no calibration sample"),
        (b'{"text": ""}', UsageError, "line 1: has no token"),
        (b'"a"\n\n[1]', UsageError, "line 3: a list is no sample"),
        (b'"a"\nnull', UsageError, "line 2: a NoneType is no sample"),
        (b'"a"\n{"text": ', UnreadableError, "line 2: is not JSON"),
        (b'"\xff"', UnreadableError, "is not UTF-8 text"),
        (b"[" * 100_000, UnreadableError, "line 1: is not JSON"),
    ],
)
def test_files_that_are_no_data(tmp_path: Path, content: bytes, error: type[Exception], words: str) -> None:
    path = tmp_path / "calib.jsonl"
    path.write_bytes(content)
    with pytest.raises(error, match=words):
        calibration_data(path, Words())


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    for name in ("samples", "length"):
        for value in (0, True, "3"):
            with pytest.raises(UsageError, match=f"{name}: "):
                calibration_data(["a"], Words(), **{name: value})
    with pytest.raises(UsageError, match="there is no such file of calibration data"):
        calibration_data(tmp_path / "none.jsonl", Words())
    with pytest.raises(UsageError, match="is text, and there is no tokenizer"):
        calibration_data(["a"])
    with pytest.raises(UsageError, match="holds no calibration sample"):
        calibration_data([], Words())


def test_objects_say_where_they_are(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"a": 1})
    path.write_text("\n" + path.read_text())
    assert list(read_objects(path)) == [(", line 2", {"a": 1})]
