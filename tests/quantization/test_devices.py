"""The one seam: what names a device, and the whole way from a folder to a folder on an NPU that a stand-in plays."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_quantize_npu_stand_in import StandIn, npu  # noqa: F401 - a fixture
from typer.testing import CliRunner

import convert
import quantize
from convert.cli import app
from formats.errors import UsageError
from quantize.calibration import calibration_data
from quantize.devices import device_name, resolve
from quantize.evaluate import PrecisionTest
from quantize.models import load_model, load_tokenizer
from quantize.recipe import RECIPES, load
from quantize.run import quantize_model

MODULES = sorted(Path(quantize.__file__).parent.glob("*.py"))
DEVICE = re.compile(r"(cpu|npu|cuda|gpu|mps|xpu)(:\d+)?")
MAY_NAME = {"devices.py", "config.py"}  # config.py: msModelSlim's default of dev_type


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    return tiny.questions(tmp_path / "data" / "calib.jsonl")


@pytest.mark.parametrize("path", [path for path in MODULES if path.name not in MAY_NAME], ids=lambda path: path.name)
def test_nothing_else_names_a_device(path: Path) -> None:
    strings = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert [(node.lineno, node.value) for node in strings if DEVICE.fullmatch(node.value)] == []
    attributes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    assert [node.lineno for node in attributes if node.attr in {"cuda", "npu", "mps", "xpu"}] == []


def test_names() -> None:
    assert [device_name(*one) for one in (("cpu",), ("npu",), ("npu", 2), ("npu:3",), ("gpu", 1), ("cuda:0",), ("cpu", 4))] == [
        "cpu", "npu:0", "npu:2", "npu:3", "cuda:1", "cuda:0", "cpu",
    ]  # fmt: skip
    for bad in (("tpu",), ("npu:x",), ("npu:-1",), ("npu:1", 2), ("npu", -1), ("npu", True), (7,)):
        with pytest.raises(UsageError, match="dev_"):
            device_name(*bad)


def test_a_device_that_is_not_there_is_one_clear_error() -> None:
    with pytest.raises(UsageError, match=r"device npu:0: torch_npu is not installed \(.*\); install it, or ask for cpu"):
        resolve("npu:0")
    with pytest.raises(UsageError, match=rf"device cuda:9: this PyTorch sees {torch.cuda.device_count()} CUDA devices"):
        resolve("cuda:9")


@pytest.mark.parametrize("name", tiny.IN_MSMODELSLIMS_WORDS)
def test_every_recipe_on_an_npu(name: str, npu: list[Any], calib: Path, tmp_path: Path) -> None:  # noqa: F811
    """No other device is named, and the bytes are those of the CPU. A tensor that was left behind would not be seen: all are on the CPU."""
    with StandIn() as mode:
        result = quantize_model(tiny.TINYLM, tmp_path / "npu", name, "msmodelslim", "npu:0", calib=calib, samples=10)
    assert {"npu:0"} <= mode.named <= {"npu:0", "cpu", "meta"}
    assert npu[:2] == [{"jit_compile": False}, {"NPU_FUZZY_COMPILE_BLACKLIST": "ReduceProd"}]
    plain = quantize_model(tiny.TINYLM, tmp_path / "cpu", name, "msmodelslim", calib=calib, samples=10)
    assert result.layers == plain.layers
    assert convert.fingerprint(tmp_path / "npu").digest == convert.fingerprint(tmp_path / "cpu").digest
    (found,), (wanted,) = ([*(tmp_path / side).glob("*.safetensors")] for side in ("npu", "cpu"))
    assert found.read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("gs-")])
def test_every_recipe_of_golden_sticks_on_an_npu(name: str, npu: list[Any], calib: Path, tmp_path: Path) -> None:  # noqa: F811
    count = 1 if "awq" in name else 4  # a search runs every layer again and again
    with StandIn() as mode:
        result = quantize_model(tiny.TINYLM, tmp_path / "npu", name, "mindspore", "npu:0", calib=calib, samples=count)
    assert {"npu:0"} <= mode.named <= {"npu:0", "cpu", "meta"}
    plain = quantize_model(tiny.TINYLM, tmp_path / "cpu", name, "mindspore", calib=calib, samples=count)
    assert result.layers == plain.layers
    (found,), (wanted,) = ([*(tmp_path / side / "rank_0").iterdir()] for side in ("npu", "cpu"))
    assert found.read_bytes() == wanted.read_bytes()


def test_another_npu_than_the_first(npu: list[Any], calib: Path, tmp_path: Path) -> None:  # noqa: F811
    with StandIn() as mode:
        quantize_model(tiny.TINYLM, tmp_path / "out", "w8a8", "compressed-tensors", "npu:2", calib=calib, samples=10)
    assert "npu:2" in mode.named
    assert "npu:0" not in mode.named


def test_questions_on_an_npu(npu: list[Any], calib: Path) -> None:  # noqa: F811
    model, tokenizer = load_model(tiny.TINYLM), load_tokenizer(tiny.TINYLM)
    with StandIn() as mode:
        found = PrecisionTest(model, tokenizer, "boolq", 5, "npu", data=calib).test()
    assert {"npu:0"} <= mode.named <= {"npu:0", "cpu"}
    assert found == PrecisionTest(model, tokenizer, "boolq", 5, data=calib).test()


def test_samples_on_an_npu(npu: list[Any], calib: Path) -> None:  # noqa: F811
    with StandIn() as mode:
        calibration_data(calib, load_tokenizer(tiny.TINYLM), device=resolve("npu", 1))
    assert {"npu:1"} <= mode.named <= {"npu:1", "cpu"}


def test_the_command_line_on_an_npu(npu: list[Any], tmp_path: Path) -> None:  # noqa: F811
    arguments = [str(tiny.TINYLM), str(tmp_path / "out"), "--recipe", "w4a16-rtn", "--to", "awq", "--device", "npu:0", "--json"]
    with StandIn() as mode:
        done = CliRunner().invoke(app, ["quantize", *arguments])
    assert done.exit_code == 0, done.output
    assert "npu:0" in mode.named
    assert json.loads(done.stdout)["proved"]
    assert load("w4a16-rtn").quant_config("npu", 0).device == "npu:0"
