"""Figures of a folder: those of transformers' own forward on the dequantized model, and of plain code where inputs are rounded."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import plain
import pytest
import tiny
import torch
from checkpoints import change_json
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import convert
import quantize
import quantize.measure
from convert.cli import app
from formats.errors import DestinationError, UnreadableError, UsageError
from quantize.blocks import Blocks
from quantize.evaluate import PrecisionTest
from quantize.evaluation import Evaluation, evaluate_model
from quantize.measure import Served, measure
from quantize.models import load_model, load_tokenizer
from quantize.recipe import loads
from quantize.run import quantize_model
from quantize.samples import read_data
from quantize.streamed import Rounding, round_folder

TEXT = Path(__file__).parents[2] / "docs" / "design.md"
LENGTH, WINDOWS = 48, 6


@pytest.fixture(scope="module")
def windows(source: Path) -> torch.Tensor:
    """[windows, tokens] of the text."""
    ids = load_tokenizer(source)(TEXT.read_text())["input_ids"]
    return torch.tensor(ids[: LENGTH * WINDOWS]).reshape(WINDOWS, LENGTH)


@pytest.fixture(scope="module")
def floats(source: Path, windows: torch.Tensor) -> np.ndarray:
    return by_transformers(source, windows)


def by_transformers(folder: Path, windows: torch.Tensor) -> np.ndarray:
    """[windows, tokens, vocabulary] float64 log-probabilities of a float folder, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return scores(torch.stack([model(one[None]).logits[0] for one in windows]))


def scores(logits: torch.Tensor) -> np.ndarray:
    wide = logits.numpy().astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def perplexity(found: np.ndarray, windows: torch.Tensor) -> float:
    picked = np.take_along_axis(found[:, :-1], windows.numpy()[:, 1:, None], 2)
    return math.exp(-picked.mean())


def assert_figures(result: Evaluation, found: np.ndarray, floats: np.ndarray, windows: torch.Tensor, tolerance: float = 1e-5) -> None:
    """What was measured is what these log-probabilities say."""
    reference = result.reference
    assert reference is not None
    assert result.positions == WINDOWS * (LENGTH - 1)
    assert result.tokens == WINDOWS * LENGTH
    assert result.model.perplexity == pytest.approx(perplexity(found, windows), rel=tolerance)
    assert reference.perplexity == pytest.approx(perplexity(floats, windows), rel=1e-5)
    assert result.perplexity_change == pytest.approx(perplexity(found, windows) / perplexity(floats, windows) - 1, abs=2 * tolerance)
    right = (found[:, :-1].argmax(-1) == windows.numpy()[:, 1:]).mean()
    assert result.model.top1 == pytest.approx(right, abs=0.005 if tolerance > 1e-4 else 1e-9)
    kl = (np.exp(floats) * (floats - found)).sum(-1)[:, :-1].mean()
    assert result.kl == pytest.approx(kl, rel=0.1 if tolerance > 1e-4 else 1e-3)
    agreed = (found.argmax(-1) == floats.argmax(-1))[:, :-1].mean()
    assert result.agreement == pytest.approx(agreed, abs=0.005 if tolerance > 1e-4 else 1e-9)


def evaluated(folder: Path, source: Path | None, **more: Any) -> Evaluation:
    return evaluate_model(folder, TEXT, source, **{"length": LENGTH, "samples": WINDOWS, **more})


# --- the figures ------------------------------------------------------------------------------------------------------


def test_a_float_model_alone(source: Path, windows: torch.Tensor, floats: np.ndarray) -> None:
    result = evaluated(source, None)
    assert result.model.perplexity == pytest.approx(perplexity(floats, windows), rel=1e-6)
    assert (result.reference, result.kl, result.agreement, result.perplexity_change) == (None, None, None, None)
    assert result.measured.drift == ()
    assert (result.format, result.schemes, result.dtype, result.device) == ("dense:hf", {}, "float32", "cpu")
    each = [np.take_along_axis(one[:-1], ids[1:, None].numpy(), 1).sum() for one, ids in zip(floats, windows, strict=True)]
    assert [one.model.nll for one in result.measured.samples] == pytest.approx([-one for one in each], rel=1e-6)


@pytest.mark.parametrize("to", ["msmodelslim", "awq", "gptq", "gptq:v2", "compressed-tensors", "dense"])
def test_weights_of_four_bits_in_every_format(to: str, source: Path, windows: torch.Tensor, floats: np.ndarray, tmp_path: Path) -> None:
    round_folder(source, tmp_path / "four", Rounding(4, 128), "gptq" if to == "dense" else to)
    convert.convert(tmp_path / "four", tmp_path / "dense", "dense", scale_dtype="float32")
    result = evaluated(tmp_path / ("dense" if to == "dense" else "four"), source)
    assert_figures(result, by_transformers(tmp_path / "dense", windows), floats, windows)
    assert result.kl is not None
    assert 0.005 < result.kl < 0.2
    assert len(result.measured.drift) == 6
    assert sum(result.schemes.values()) == (0 if to == "dense" else 42)
    assert result.notes == ()


@pytest.mark.parametrize(("dynamic", "to"), [(False, "msmodelslim"), (True, "compressed-tensors")])
def test_inputs_of_eight_bits(
    dynamic: bool, to: str, source: Path, calib: Path, windows: torch.Tensor, floats: np.ndarray, tmp_path: Path
) -> None:
    quant = f"quant: {{mm_tensor: false, act_method: 1, is_dynamic: {str(dynamic).lower()}}}"
    quantize_model(source, tmp_path / "out", loads(quant), to, calib=calib)
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    tensors, config = load_file(weights), json.loads((source / "config.json").read_text())

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"].float()
        bias = tensors[f"{name}.bias"].float() if f"{name}.bias" in tensors else 0
        static = None if dynamic else (tensors[f"{name}.input_scale"].float(), tensors[f"{name}.input_offset"].float())
        return (plain.by_token(x) if static is None else plain.int8(x, *static)) @ weight.T + bias

    found = scores(torch.stack([plain.decode(tensors, config, one, linear) for one in windows]))
    assert_figures(evaluated(tmp_path / "out", source), found, floats, windows, 2e-3)


def test_a_model_is_at_no_distance_from_itself(source: Path) -> None:
    result = evaluated(source, source)
    assert (result.kl, result.agreement, result.perplexity_change, set(result.measured.drift)) == (0, 1, 0, {0.0})


def test_drift_is_of_hidden_states(source: Path, windows: torch.Tensor, tmp_path: Path) -> None:
    round_folder(source, tmp_path / "four", Rounding(4, 128), "awq")
    convert.convert(tmp_path / "four", tmp_path / "dense", "dense", scale_dtype="float32")
    states = []
    for folder in (tmp_path / "dense", source):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
        found: list[list[torch.Tensor]] = [[] for _ in model.layers]
        for layer, into in zip(model.layers, found, strict=True):
            layer.register_forward_hook(
                lambda module, args, output, into=into: into.append(output[0] if isinstance(output, tuple) else output)
            )
        with torch.no_grad():
            for one in windows:
                model(one[None])
        states.append([torch.cat(one) for one in found])
    wanted = [float((one - other).norm() / other.norm()) for one, other in zip(*states, strict=True)]
    assert evaluated(tmp_path / "four", source).measured.drift == pytest.approx(wanted, rel=1e-3)


def test_chunks_of_logits_and_states_in_files_change_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    round_folder(source, tmp_path / "four", Rounding(4, 128), "awq")
    wanted = evaluated(tmp_path / "four", source)
    begun: list[Path | None] = []
    begin = Blocks.begin
    monkeypatch.setattr(
        Blocks, "begin", lambda self, samples, path=None, device=None: begun.append(path) or begin(self, samples, path, device)
    )
    monkeypatch.setattr(quantize.measure, "LOGITS", 2048 * 7)
    monkeypatch.setattr(quantize.measure, "SCORES", 2048 * 3)
    monkeypatch.setattr(quantize.measure, "IN_MEMORY", 1000)
    (tmp_path / "work").mkdir()
    found = evaluated(tmp_path / "four", source, work_dir=tmp_path / "work")
    assert [path and path.parent.parent for path in begun] == [tmp_path / "work"] * 2
    assert list((tmp_path / "work").iterdir()) == []
    assert found.measured.drift == wanted.measured.drift
    for one, other in zip(found.measured.samples, wanted.measured.samples, strict=True):
        assert (one.model.right, one.agreed, one.last_agreed) == (other.model.right, other.agreed, other.last_agreed)
        assert (one.model.nll, one.kl, one.last_kl) == pytest.approx((other.model.nll, other.kl, other.last_kl), rel=1e-4)
    with pytest.raises(DestinationError, match="nowhere: hidden states cannot be kept there"):
        evaluated(tmp_path / "four", source, work_dir=tmp_path / "nowhere")


def test_models_in_memory(source: Path, windows: torch.Tensor, floats: np.ndarray) -> None:
    found = measure(Served(Blocks(load_model(source).float())), [[one[None]] for one in windows])
    nll = sum(one.model.nll for one in found.samples) / sum(one.positions for one in found.samples)
    assert math.exp(nll) == pytest.approx(perplexity(floats, windows), rel=1e-6)


# --- data -------------------------------------------------------------------------------------------------------------


def test_questions_are_answered_as_the_precision_test_answers(source: Path, calib: Path, tmp_path: Path) -> None:
    """Of the dequantized model in memory, token by token."""
    round_folder(source, tmp_path / "four", Rounding(4, 32), "compressed-tensors")
    convert.convert(tmp_path / "four", tmp_path / "dense", "dense", scale_dtype="float32")
    tokenizer = load_tokenizer(source)
    result = evaluate_model(tmp_path / "four", calib, source)
    said, kl = [], []
    for folder in (tmp_path / "dense", source):
        model = load_model(folder).float()
        test = PrecisionTest(model, tokenizer, data=calib)
        with torch.no_grad():
            logits = [model(torch.tensor([ids])).logits[0, -1] for ids, _ in test.questions()]
        said.append([bool(one[test.choices[0]] > one[test.choices[1]]) for one in logits])
        kl.append(scores(torch.stack(logits)))
    wanted = [question["answer"] for question in tiny.QUESTIONS]
    assert result.model.accuracy is not None
    assert result.reference is not None
    assert result.reference.accuracy is not None
    assert result.model.accuracy.right == sum(one == answer for one, answer in zip(said[0], wanted, strict=True))
    assert result.reference.accuracy.right == sum(one == answer for one, answer in zip(said[1], wanted, strict=True))
    assert result.same_answers == np.mean([one == other for one, other in zip(*said, strict=True)])
    assert result.kl == pytest.approx((np.exp(kl[1]) * (kl[1] - kl[0])).sum(-1).mean(), rel=1e-3)
    assert result.agreement == (kl[0].argmax(-1) == kl[1].argmax(-1)).mean()
    assert (result.positions, result.model.perplexity, result.perplexity_change) == (12, None, None)
    assert {one["answer"] for one in result.to_json()["by_sample"]} == {True, False}


def test_texts_are_measured_each_by_itself(source: Path, tmp_path: Path) -> None:
    texts = ["The kernel schedules threads.", "An index is a table that finds rows quickly. " * 20, "A lock."]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    (tmp_path / "t.json").write_text(json.dumps([{"body": one} for one in texts]))
    result = evaluate_model(source, tmp_path / "t.jsonl", length=40)
    model, tokenizer = load_model(source).float(), load_tokenizer(source)
    nll, count = [], 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:40]])
        with torch.no_grad():
            nll.append(float(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="sum")))
        count += ids.shape[1] - 1
    assert [one.model.nll for one in result.measured.samples] == pytest.approx(nll, rel=1e-6)
    assert result.model.perplexity == pytest.approx(math.exp(sum(nll) / count), rel=1e-6)
    assert result.positions == count
    again = evaluate_model(source, tmp_path / "t.json", length=40, template="{body}")
    assert again.measured == result.measured
    assert [one["where"] for one in again.to_json()["by_sample"]] == ["t.json[0]", "t.json[1]", "t.json[2]"]
    assert evaluate_model(source, tmp_path / "t.jsonl", length=40, samples=1).measured.samples == result.measured.samples[:1]


def test_questions_with_a_template_are_texts(source: Path, calib: Path) -> None:
    result = evaluate_model(source, calib, template="{passage}")
    assert result.data.kind == "texts"
    assert result.model.perplexity is not None


def test_long_questions_keep_their_end_and_texts_their_beginning(source: Path, calib: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(source)
    data = read_data(calib, tokenizer, length=9, samples=5)
    whole = read_data(calib, tokenizer, samples=5)
    assert all(torch.equal(one[0], other[0][:, -9:]) for one, other in zip(data.samples, whole.samples, strict=True))
    assert (len(data.samples), data.places[4]) == (5, ", line 5")
    texts = read_data(calib, tokenizer, length=9, samples=5, template="boolq")
    assert all(torch.equal(one[0], other[0][:, :9]) for one, other in zip(texts.samples, whole.samples, strict=True))


def test_the_default_length_is_the_models(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(source, folder)
    change_json(folder / "config.json", lambda config: config.update(max_position_embeddings=64))
    result = evaluate_model(folder, TEXT, samples=2)
    assert (result.length, result.tokens) == (64, 128)
    assert evaluate_model(source, TEXT, samples=1).length == 2048


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_models_that_do_not_fit_together(source: Path, tmp_path: Path) -> None:
    other = Path(__file__).parents[2] / "fixtures" / "compressed_tensors" / "src_llama_fp16"
    with pytest.raises(UsageError, match="vocab_size of the model is 2048, and of the reference 128; they are not of the same model"):
        evaluated(source, other)
    shutil.copytree(other, tmp_path / "other")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, tmp_path / "other")
    with pytest.raises(UsageError, match=r"the tokenizer has the token \d+, and the model 128"):
        evaluated(tmp_path / "other", None)
    with pytest.raises(UnreadableError, match=r"src_llama_fp16: has no tokenizer; name the float model's folder"):
        evaluated(other, None)


def test_samples_that_cannot_be_measured(source: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "two words"}\n{"text": "A"}\n')
    with pytest.raises(UsageError, match=r"t\.jsonl, line 2: has one token, and nothing to predict"):
        evaluate_model(source, tmp_path / "t.jsonl")
    ids = torch.arange(3, 9)[None]
    served = Served(Blocks(load_model(source)))
    with pytest.raises(UsageError, match="one has padding, whose tokens would count"):
        measure(served, [[ids, torch.tensor([[0, 1, 1, 1, 1, 1]])]])
    with pytest.raises(UsageError, match="there is none to measure with"):
        measure(served, [])


def test_logits_that_are_not_finite(source: Path, tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnreadableError, match="sample 1: the model's logits are NaN or infinite"):
        evaluated(folder, None)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"length": 1}, UsageError, "length: 1 is too few"),
        ({"samples": 0}, UsageError, "samples: 0 is too few"),
        ({"dtype": "int8"}, UsageError, "--dtype int8: wanted auto, float32, float16, bfloat16"),
        ({"device": "gpu:77"}, UsageError, "device cuda:77: this PyTorch sees"),
        ({"data": "nowhere.txt"}, UsageError, "nowhere.txt: there is no such file"),
        ({"folder": "nowhere"}, UnreadableError, "nowhere: there is no such file or folder"),
    ],
)
def test_arguments_that_make_no_sense(change: dict[str, Any], error: type[Exception], words: str, source: Path) -> None:
    with pytest.raises(error, match=words):
        evaluate_model(**{"folder": source, "data": TEXT, **change})


# --- the command line -------------------------------------------------------------------------------------------------


def invoke(*args: object) -> Any:
    return CliRunner().invoke(app, ["evaluate", *map(str, args)])


def test_the_command_line(source: Path, calib: Path, tmp_path: Path) -> None:
    round_folder(source, tmp_path / "eight", Rounding(8, dynamic=True), "msmodelslim")
    wanted = evaluated(tmp_path / "eight", source).to_json()
    for path in (tmp_path / "eight").iterdir():
        if not path.name.startswith("quant_"):
            path.unlink()
    options = ("--data", TEXT, "--against", source, "--base-model", source, "--length", LENGTH, "--samples", WINDOWS)
    said = invoke(tmp_path / "eight", *options)
    assert said.exit_code == 0, said.output
    assert "msmodelslim:safe_tensor, 42 x W8A8 per channel" in said.stdout
    assert f"{wanted['model']['perplexity']:.4f}" in said.stdout
    assert f"{wanted['kl']:.4g}" in said.stdout
    found = json.loads(invoke(tmp_path / "eight", *options, "--json", "--device", "cpu", "--dtype", "float32").stdout)
    assert {key: value for key, value in found.items() if key != "seconds"} == {key: wanted[key] for key in wanted if key != "seconds"}
    said = invoke(source, "--data", calib)
    assert (said.exit_code, "accuracy" in said.stdout, "reference" in said.stdout) == (0, True, False)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([], 2, "name --data FILE or --tasks A,B, and not both"),
        (["--data", "x.txt", "--tasks", "boolq"], 2, "and not both"),
        (["--data", "x.txt"], 2, "there is no such file"),
        (["--data", str(TEXT), "--against", "nowhere"], 5, "nowhere"),
    ],
)
def test_the_command_line_fails_with_one_line(args: list[str], code: int, words: str, source: Path) -> None:
    said = invoke(source, *args)
    assert (said.exit_code, said.stdout, said.stderr.count("\n")) == (code, "", 1)
    assert words in said.stderr


@pytest.mark.parametrize("verb", [["evaluate", "x", "--data", "y"], ["analyze", "x"], ["calibration", "x", "y"]])
def test_without_torch_it_is_named_with_the_extra(verb: list[str]) -> None:
    code = f"import sys; sys.modules['torch'] = None; sys.argv = ['weighbridge', *{verb!r}]; from convert.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"weighbridge {verb[0]}: torch is not installed; pip install 'weighbridge[quantize]'\n"


def test_the_functions_are_the_packages() -> None:
    assert quantize.evaluate_model is evaluate_model
    assert callable(quantize.analyze_model)
    assert callable(quantize.score_samples)
