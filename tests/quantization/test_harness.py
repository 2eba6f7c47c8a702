"""lm-evaluation-harness: what is handed to it computes as the folder says; where it is installed, one task of its own making."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from interpreters import library
from typer.testing import CliRunner

from convert.cli import app
from formats import open_checkpoint
from formats.errors import UnreadableError, UsageError
from quantize.blocks import advance
from quantize.calibration import prompt
from quantize.evaluation import evaluate_model
from quantize.harness import evaluate_tasks
from quantize.measure import Served
from quantize.models import load_tokenizer
from quantize.run import quantize_model

IDS = torch.arange(3, 43)[None]


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary], one decoder layer at a time, rounded as the folder says."""
    served = Served.open(open_checkpoint(folder), torch.float32)
    assert served.simulation is not None
    states = served.blocks.begin([[ids]])
    for layer in range(6):
        with torch.no_grad(), served.blocks.stage(layer) as stage, served.simulation.on(stage):
            advance(stage, states, [[ids]])
    (found,) = served.blocks.logits(states)
    return found


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Static inputs, and an int8 cache."""
    place = tmp_path_factory.mktemp("quantized")
    quantize_model(source, place / "kv8", "w8a8-kv8", "msmodelslim", calib=tiny.questions(place / "q.jsonl"))
    return place / "kv8"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In the harness's place: notes what it is asked, and runs the model."""
    calls: list[Any] = []

    def simple_evaluate(model: Any, tasks: list[str], limit: int | None, task_manager: Any, log_samples: bool) -> Any:
        with torch.no_grad():
            prompt = model.pretrained(IDS, use_cache=True)
            after = model.pretrained(IDS[:, :1], past_key_values=prompt.past_key_values, use_cache=True)
        calls.append({"model": model, "tasks": tasks, "limit": limit, "logits": prompt.logits[0], "after": after.logits[0, -1]})
        if "broken" in tasks:
            raise ValueError("no such data set\nand a long story")
        return {"results": {task: {"alias": task, "acc,none": 0.5, "acc_stderr,none": 0.1} for task in tasks}}

    harness, models, tasks = (ModuleType(name) for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks"))
    harness.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    models.HFLM = SimpleNamespace  # type: ignore[attr-defined]

    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            self.include_path = include_path

        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name != "unknown"]

    tasks.TaskManager = TaskManager  # type: ignore[attr-defined]
    for module in (harness, models, tasks, ModuleType("lm_eval.models")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_what_the_harness_gets_computes_as_the_folder_says(source: Path, quantized: Path, stand_in: list[Any]) -> None:
    """Cached keys and values are rounded as new ones are: a token after the prompt sees what it would see in one go."""
    result = evaluate_tasks(quantized, ["one", "two"], source, samples=7, batch_size=3)
    assert [(call["tasks"], call["limit"], call["model"].batch_size) for call in stand_in] == [(["one", "two"], 7, 3)] * 2
    assert result.tasks == result.reference == {task: {"acc,none": 0.5, "acc_stderr,none": 0.1} for task in ("one", "two")}
    for call, folder in zip(stand_in, (quantized, source), strict=True):
        torch.testing.assert_close(call["logits"], logits(folder, IDS), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(call["after"], logits(folder, torch.cat([IDS, IDS[:, :1]], 1))[-1], rtol=1e-3, atol=1e-3)
    assert (stand_in[0]["logits"] - stand_in[1]["logits"]).abs().max() > 0.1
    before = stand_in[0]["logits"]
    with torch.no_grad():
        assert (stand_in[0]["model"].pretrained(IDS).logits[0] - before).abs().max() > 0.01  # no hook is left


def test_what_goes_wrong(source: Path, stand_in: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--tasks unknown: the harness has no such task; `lm_eval ls tasks`"):
        evaluate_tasks(source, ["one", "unknown"])
    with pytest.raises(UsageError, match="there is no such folder of tasks"):
        evaluate_tasks(source, ["one"], include_path=tmp_path / "none")
    assert stand_in == []
    with pytest.raises(UnreadableError, match=r"--tasks broken: the harness failed \(no such data set\)"):
        evaluate_tasks(source, ["broken"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"lm_eval is not installed; pip install 'weighbridge\[quantize,eval\]'"):
        evaluate_tasks(source, ["one"])


def test_the_command_line(source: Path, stand_in: list[Any]) -> None:
    args = ["evaluate", str(source), "--tasks", "one,two", "--against", str(source)]
    said = CliRunner().invoke(app, args)
    assert said.exit_code == 0, said.output
    assert said.stdout.count("0.5000 +- 0.1000") == 4
    assert json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout)["reference"]["two"]["acc,none"] == 0.5


def test_the_real_harness_says_what_evaluate_says(source: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks of its own kinds on the same prompts and answers: accuracy, and how likely the right answers are. Nothing is fetched."""
    library("lm_eval")
    data = tiny.questions(tmp_path / "data" / "q.jsonl")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "validation_split": "validation",
        "doc_to_text": "{{title}} -- {{passage}}\nQuestion:{{question}}?\nAnswer:",
    }
    choosing = {"output_type": "multiple_choice", "doc_to_target": "{{answer | int}}", "doc_to_choice": ["no", "yes"]}
    saying = {"output_type": "loglikelihood", "doc_to_target": "{{' yes' if answer else ' no'}}"}
    (tmp_path / "tasks").mkdir()
    for name, kind, metric in (("choosing", choosing, "acc"), ("saying", saying, "perplexity")):
        metrics = {"metric": metric, "aggregation": "mean" if metric == "acc" else metric, "higher_is_better": metric == "acc"}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **kind, "metric_list": [metrics]}))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = evaluate_tasks(quantized, ["choosing", "saying"], source, include_path=tmp_path / "tasks")
    evaluated, tokenizer = evaluate_model(quantized, data, source), load_tokenizer(source)
    for folder, said, wanted in ((quantized, found.tasks, evaluated.model), (source, found.reference, evaluated.reference)):
        assert said is not None
        assert wanted is not None
        assert wanted.accuracy is not None
        assert said["choosing"]["acc,none"] == float(wanted.accuracy)
        likely = 0.0
        for question in tiny.QUESTIONS:
            start = tokenizer(prompt(question, "boolq"))["input_ids"]
            ids = tokenizer(prompt(question, "boolq") + (" yes" if question["answer"] else " no"))["input_ids"]
            scores = torch.log_softmax(logits(folder, torch.tensor([ids])).double(), -1)
            likely += sum(float(scores[place - 1, ids[place]]) for place in range(len(start), len(ids)))
        assert said["saying"]["perplexity,none"] == pytest.approx(math.exp(-likely / 12), rel=1e-3)
