"""``tune`` finds what it says: trials are what folders measure, no smaller set would do, and it goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from outliers import copy_with_outliers
from typer.testing import CliRunner

from convert.cli import app
from formats.errors import DestinationError, UsageError
from quantize.evaluation import ModelFigures, evaluate_model
from quantize.models import load_model
from quantize.recipe import Recipe, load, loads
from quantize.run import quantize_model
from quantize.tune import Trial, Tuned, Tuner, tune_model

W8A8 = "quant: {mm_tensor: false}\ncalibration: {samples: 4, length: 64}\n"
TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model with outlier channels."""
    place = tmp_path_factory.mktemp("source")
    copy_with_outliers(tiny.model_folder(place / "plain"), place / "outliers")
    return place / "outliers"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(to calibrate by, to measure by): the two halves of a text."""
    place = tmp_path_factory.mktemp("texts")
    for name, part in (("calib.txt", TEXT[: len(TEXT) // 2]), ("data.txt", TEXT[len(TEXT) // 2 :])):
        (place / name).write_text(part)
    return place / "calib.txt", place / "data.txt"


def tuned(source: Path, texts: tuple[Path, Path], out: Path, target: float, **more: Any) -> Tuned:
    recipe = more.pop("recipe", loads(W8A8, "mine"))
    return tune_model(source, out, target, calib=texts[0], data=texts[1], recipe=recipe, samples=4, length=64, **more)


def test_outliers_change_nothing_but_the_quantized_model(source: Path) -> None:
    plain, changed = load_model(source.with_name("plain")), load_model(source)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, changed(ids).logits)
    assert changed.model.layers[0].input_layernorm.weight.max() > 10 * plain.model.layers[0].input_layernorm.weight.max()


def test_smoothing_is_enough_and_the_recipe_measures_what_the_trial_did(source: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    told: list[Trial] = []
    found = tuned(source, texts, tmp_path / "tuned.yaml", 0.9, methods=(None, "m1", "m4"), told=told.append)
    assert found.reached
    assert (found.best.method, found.best.floats) == ("m4", ())
    assert [trial.method for trial in found.trials] == [None, "m1", "m4"]
    assert list(found.trials) == told
    assert found.trials[0].share < 0.5 < 0.9 <= found.best.share
    recipe = load(tmp_path / "tuned.yaml")
    assert recipe.anti_outlier is not None
    assert "0.9 was wanted" in recipe.about
    quantize_model(source, tmp_path / "out", recipe, "msmodelslim", calib=texts[0])
    measured = evaluate_model(tmp_path / "out", texts[1], base_model=source, samples=4, length=64, dtype="auto").model
    assert measured.perplexity == pytest.approx(found.best.figures.perplexity, rel=0.02)
    floats = evaluate_model(source, texts[1], samples=4, length=64, dtype="auto").model
    assert floats.perplexity == pytest.approx(found.reference.perplexity, rel=1e-6)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_set_of_float_layers_cannot_do_without_one(source: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    found = tuned(source, texts, tmp_path / "tuned.yaml", 0.6, methods=(None,), budget=60)
    assert found.reached
    assert 1 <= len(found.best.floats) < 20
    assert all(name.startswith("model.layers.") for name in found.best.floats)
    assert load(tmp_path / "tuned.yaml").quant_config().disable_names == sorted(found.best.floats)
    shares = {trial.floats: trial.share for trial in found.trials}
    for name in found.best.floats:
        without = tuple(other for other in found.best.floats if other != name)
        assert shares.get(without, 0.0) < 0.6
    again = tuned(source, texts, tmp_path / "again.yaml", 0.6, methods=(None,), budget=60)
    assert again == found


def test_the_budget_ends_it_and_the_best_is_written(source: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    found = tuned(source, texts, tmp_path / "tuned.yaml", 1.0, methods=(None, "m1"), budget=4)
    assert len(found.trials) == 4
    assert found.best == max(found.trials, key=lambda trial: trial.share)
    assert not found.reached
    assert "the target of 1 was not reached" in found.notes[0]
    assert "4 trials, the budget" in found.notes[0]
    assert load(tmp_path / "tuned.yaml").about


def test_a_stopped_search_goes_on(source: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Trial] = []

    def stop(trial: Trial) -> None:
        told.append(trial)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(source, texts, tmp_path / "tuned.yaml", 0.6, methods=(None,), told=stop)
    kept = tmp_path / ".tuned.yaml.trials"
    with kept.open("a") as file:
        file.write('["cut')  # a line that a kill cut off
    with pytest.raises(DestinationError, match="holds the trials of another model, recipe or data"):
        tuned(source, texts, tmp_path / "tuned.yaml", 0.6, methods=(None,), recipe=loads(W8A8.replace("4", "5"), "mine"))
    whole = kept.read_bytes()
    kept.write_bytes(whole.replace(b'"ranges"', b'"rages"', 1))
    with pytest.raises(DestinationError, match="line 2: is damaged, so its trials cannot be gone on with"):
        tuned(source, texts, tmp_path / "tuned.yaml", 0.6, methods=(None,))
    kept.write_bytes(whole)
    ran: list[Sequence[str]] = []
    run = Tuner._run
    monkeypatch.setattr(Tuner, "_run", lambda self, method, floats: ran.append(sorted(floats)) or run(self, method, floats))
    found = tuned(source, texts, tmp_path / "tuned.yaml", 0.6, methods=(None,))
    assert len(ran) == len(found.trials) - 3
    assert list(found.trials[:3]) == told
    assert not kept.exists()


def test_questions_are_measured_by_their_answers(source: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    data = tiny.questions(tmp_path / "boolq.jsonl")
    found = tune_model(source, tmp_path / "tuned.yaml", 0.5, calib=texts[0], data=data, recipe=loads(W8A8, "mine"), methods=("m4",))
    assert found.reference.accuracy is not None
    assert found.best.figures.accuracy is not None
    assert found.best.share == float(found.best.figures.accuracy) / float(found.reference.accuracy)


def test_data_that_calibrated_is_noted(source: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    found = tune_model(
        source, tmp_path / "t.yaml", 0.1, calib=texts[0], data=texts[0], recipe=loads(W8A8, "mine"), methods=("m4",), samples=2, length=64
    )
    assert any("the figures flatter" in note for note in found.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": 0}, "target: 0 is no share"),
        ({"target": 1.5}, "target: 1.5 is no share"),
        ({"budget": 0}, "budget: 0 is not a whole number"),
        ({"methods": ("m7",)}, "methods: 'm7' is not one of"),
        ({"methods": ()}, "there is none to try"),
        ({"recipe": loads(W8A8 + "disable_level: L2\n", "mine")}, "disable_level is what is searched"),
        ({"recipe": loads("quant: {mm_tensor: false, disable_last_linear: false}", "mine")}, "trials go one layer at a time"),
        ({"recipe": loads("quant: {disable_names: [model.layers.9.up]}", "mine")}, r"disable_names: 'model\.layers\.9\.up' is no linear"),
    ],
)
def test_requests_that_make_no_sense(change: dict[str, Any], words: str, source: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = {"target": 0.9, "calib": texts[0], "data": texts[1], "recipe": "w8a8", **change}
    with pytest.raises(UsageError, match=words):
        tune_model(source, tmp_path / "tuned.yaml", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_is_there_is_kept(source: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_text("mine")
    with pytest.raises(DestinationError, match="exists already"):
        tuned(source, texts, tmp_path / "tuned.yaml", 0.9)
    assert (tmp_path / "tuned.yaml").read_text() == "mine"


def test_the_command_prints_its_table_and_fails_where_nothing_reaches(source: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(W8A8)
    arguments = ["tune", str(source), "--calib", str(texts[0]), "--data", str(texts[1]), "--recipe", str(tmp_path / "mine.yaml")]
    arguments += ["--samples", "4", "--length", "64", "--methods", "none,m4"]
    done = CliRunner().invoke(app, [*arguments, "--target", "0.9", "--out", str(tmp_path / "a.yaml")])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].split()[0] == "1"
    assert lines[0].endswith("no smoothing")
    assert lines[1].endswith("m4")
    assert any(line.startswith("chosen: m4, ") for line in lines)
    done = CliRunner().invoke(app, [*arguments, "--target", "1", "--budget", "2", "--out", str(tmp_path / "b.yaml"), "--json"])
    assert done.exit_code == 1
    found = json.loads(done.output)
    assert found["reached"] is False
    assert len(found["trials"]) == 2
    assert ModelFigures.of(found["reference"]).perplexity == found["reference"]["perplexity"]
    assert isinstance(load(tmp_path / "b.yaml"), Recipe)
