"""The rules of the house that a machine can check: imports point one way, the core is light, fixtures are what their README says."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from formats import FORMATS, errors

ROOT = Path(__file__).parent.parent
MODULES = sorted((*ROOT.glob("formats/*.py"), *ROOT.glob("convert/*.py"), *ROOT.glob("quantize/*.py")))
MAY_IMPORT = {"formats": {"formats"}, "convert": {"formats", "convert"}, "quantize": {"formats", "convert", "quantize"}}
HEAVY = {"torch", "transformers", "numba", "rich", "typer", "pydantic", "nox"}


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of every absolute import."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_point_one_way(path: Path) -> None:
    ours = imported(ast.parse(path.read_text())) & {"formats", "convert", "quantize", "tests", "scripts"}
    on_top = {"quantize"} if path.name in {"cli_quantize.py", "cli_lmdeploy.py"} else set()  # within its verbs
    assert ours <= MAY_IMPORT[path.parent.name] | on_top


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_library_never_prints_exits_warns_or_unpickles(path: Path) -> None:
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not calls & {"print", "sys.exit", "exit", "warnings.warn", "pickle.load", "pickle.loads", "eval", "exec"}


def test_planning_and_running_import_neither_frameworks_nor_what_the_terminal_needs() -> None:
    code = "import sys, formats, convert; convert.plan, convert.convert, convert.verify, convert.inspect; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in done.stdout.split()} & HEAVY


@pytest.mark.parametrize("spec", FORMATS, ids=lambda spec: spec.name)
def test_a_format_module_is_its_spec(spec: object) -> None:
    """The docstring says who defines the format, its law and its tensors; the variants' capabilities have a default dtype."""
    module = sys.modules[spec.open.__module__]  # type: ignore[attr-defined]
    assert module.__doc__
    assert "Defined by" in module.__doc__
    assert "Law:" in module.__doc__
    for variant in spec.variants:  # type: ignore[attr-defined]
        if variant.holds is not None:
            assert variant.holds.scale_dtypes
            assert variant.readers


def test_the_error_tree_is_the_one_that_its_docstring_draws() -> None:
    drawn = dict(re.findall(r"(\w+Error)\s+exit (\d)", errors.__doc__ or ""))
    real = {name: str(getattr(errors, name).exit_code) for name in errors.__all__}
    assert drawn == real


FIXTURE_ROWS = re.findall(r"\|\s*`?([\w./-]+)`?\s*\|.*?`?([0-9a-f]{64})`?", (ROOT / "fixtures" / "README.md").read_text())


def test_every_fixture_folder_has_a_row() -> None:
    folders = {
        str(path.relative_to(ROOT / "fixtures")) for group in ("msmodelslim", "awq_gptq") for path in (ROOT / "fixtures" / group).iterdir()
    }
    described = (ROOT / "fixtures" / "README.md").read_text()
    assert [folder for folder in sorted(folders) if Path(folder).name not in described] == []


@pytest.mark.parametrize(("folder", "digest"), FIXTURE_ROWS)
def test_a_fixture_is_what_its_row_says(folder: str, digest: str) -> None:
    place = ROOT / "fixtures" / folder.rstrip("/")
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    assert digest in {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_there_are_rows() -> None:
    assert len(FIXTURE_ROWS) >= 17


def test_no_machine_paths_in_fixtures() -> None:
    """Records that tools wrote may hold the path of the machine they ran on: none may be shipped."""
    for path in (ROOT / "fixtures").rglob("*.json"):
        text = path.read_text(errors="replace").replace("\\/", "/")
        assert not re.search(r'"/(work|root|home|tmp|farm)/', text), path
