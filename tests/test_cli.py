"""The command line: what it prints, where, and its exit codes. Smoke tests run the installed entry points."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CONFIG, MSMODELSLIM, change_tensors, description_file, model, read_folder, replaced, weight_file, write_msmodelslim
from typer.main import get_command
from typer.testing import CliRunner, Result

from convert.cli import app
from convert.ms_to_vllm import app as ms_to_vllm_app
from convert.options import Options

VERBS = (
    "formats", "inspect", "plan", "convert", "verify", "fingerprint", "check", "doctor", "clean", "serve-check", "quantize", "evaluate",
    "analyze", "tune", "calibration", "memory", "lmdeploy",
)  # fmt: skip
HOMES = {"inspect": "inspection", "plan": "plan", "convert": "run", "verify": "proof", "fingerprint": "proof"}
BIN = Path(sys.executable).parent


def invoke(*args: object, of: Any = app) -> Result:
    result = CliRunner().invoke(of, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def run(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / str(args[0])), *map(str, args[1:])]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def assert_one_line(result: Result | subprocess.CompletedProcess[str]) -> str:
    """One line on stderr, nothing on stdout, no traceback; the line."""
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.endswith("\n")
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_msmodelslim(tmp_path / "source", model(blocks=1))


@pytest.fixture
def eight_bits(tmp_path: Path) -> Path:
    return write_msmodelslim(tmp_path / "eight", model(blocks=1, bits=8))


# --- the installed entry points ---------------------------------------------------------------------------------------


def test_entry_points_carry_a_golden_from_end_to_end(tmp_path: Path) -> None:
    source, base = MSMODELSLIM / "w4a16_g128_sym_bf16", MSMODELSLIM / "src_bf16"
    assert run("weighbridge", "formats").returncode == 0
    assert run("weighbridge", "inspect", source).stdout.startswith("msmodelslim:safe_tensor")
    assert "awq:gemm" in run("weighbridge", "plan", source, "--to", "awq").stdout
    for target in ("awq", "gptq"):
        done = run("weighbridge", "convert", source, tmp_path / target, "--to", target, "--base-model", base)
        assert (done.returncode, done.stderr) == (0, "")
    assert run("weighbridge", "verify", tmp_path / "awq", tmp_path / "gptq").returncode == 0
    prints = [run("weighbridge", "fingerprint", tmp_path / target).stdout.split()[0] for target in ("awq", "gptq")]
    assert prints[0] == prints[1]


def test_entry_point_fails_with_one_line_and_its_code(tmp_path: Path) -> None:
    done = run("weighbridge", "convert", MSMODELSLIM / "w8a16_g128_sym_bf16", tmp_path / "out", "--to", "awq")
    assert done.returncode == 3
    assert "8 bits" in assert_one_line(done)
    assert run("weighbridge", "inspect", tmp_path / "nowhere").returncode == 5


def test_ms_to_vllm_entry_point_takes_the_scripts_flags(tmp_path: Path) -> None:
    source = MSMODELSLIM / "w4a16_g128_sym_bf16"
    flags = ("--model", weight_file(source), "--json", description_file(source), "--save_path", tmp_path / "res.safetensors")
    done = run("ms_to_vllm", *flags, "--w_bit", 4, "--target_tool", "gptq")
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["res.safetensors"]
    assert sum(name.endswith(".qweight") for name in read_folder(tmp_path)) == 14


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_printed(shell: str) -> None:
    done = run("weighbridge", "--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0
    assert "_WEIGHBRIDGE_COMPLETE" in done.stdout


def test_completion_offers_verbs_and_options() -> None:
    verbs = run("weighbridge", _WEIGHBRIDGE_COMPLETE="complete_bash", COMP_WORDS="weighbridge ", COMP_CWORD="1")
    assert set(verbs.stdout.split()) == set(VERBS)
    words = {"COMP_WORDS": "weighbridge convert --ba", "COMP_CWORD": "2"}
    options = run("weighbridge", _WEIGHBRIDGE_COMPLETE="complete_bash", **words)
    assert options.stdout.split() == ["--base-model"]


def test_light_verbs_import_neither_torch_nor_transformers_nor_numba(tmp_path: Path) -> None:
    source = write_msmodelslim(tmp_path / "source", model(blocks=1))
    place, out = str(source), str(tmp_path / "out")
    lines = [["inspect", place], ["plan", place, "--to", "awq"], ["convert", place, out, "--to", "awq"], ["verify", place, out]]
    code = (
        f"import sys\nfrom convert.cli import app\nfor line in {lines!r}:\n    app(line, standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'numba') if name in sys.modules], file=sys.stderr)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "WEIGHBRIDGE_KERNELS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_formats_lists_every_variant() -> None:
    printed = invoke("formats").stdout
    rows = json.loads(invoke("formats", "--json").stdout)
    names = [row["format"] for row in rows]
    for name in ("msmodelslim:safe_tensor", "msmodelslim:ascendv1", "msmodelslim:v1", "awq:gemm", "gptq:v1", "gptq:v2", "dense:hf"):
        assert name in names
        assert name in printed
    written = {row["format"] for row in rows if row["write"]}
    assert {"awq:gemm", "gptq:v1", "gptq:v2", "dense:hf", "msmodelslim:safe_tensor", "msmodelslim:ascendv1"} <= written
    assert "msmodelslim:v1" not in written
    assert next(row for row in rows if row["format"] == "awq:gemm")["holds"]["bits"] == [4]


def test_inspect_tells_schemes_sizes_and_findings(source: Path) -> None:
    printed = invoke("inspect", source, "--layers").stdout
    assert "W4A16 g64" in printed
    assert "model.layers.0.mlp.down_proj" in printed
    report = json.loads(invoke("inspect", source, "--json").stdout)
    assert report["format"] == "msmodelslim:safe_tensor"
    assert set(report["layers"]) == set(model(blocks=1).linears)
    (scheme,) = report["schemes"]
    assert scheme["layers"] == 7
    assert scheme["weights"] == sum(one.codes.size for one in model(blocks=1).linears.values())
    assert scheme["bits_per_weight"] > 8  # a byte a code, and scales
    assert report["bytes"] == weight_file(source).stat().st_size


def test_inspect_says_what_looks_wrong(tmp_path: Path) -> None:
    stale = {**CONFIG, "quantization_config": {"quant_method": "fp8"}}
    write_msmodelslim(tmp_path / "stale", model(blocks=1), config=stale)
    write_msmodelslim(tmp_path / "bare", model(blocks=1), config=None)
    codes = {}
    for name in ("stale", "bare"):
        findings = json.loads(invoke("inspect", tmp_path / name, "--json").stdout)["findings"]
        codes[name] = {finding["code"] for finding in findings}
    assert "stale-config" in codes["stale"]
    assert "no-config" in codes["bare"]


def test_plan_tells_steps_files_and_losses_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    printed = invoke("plan", source, "--to", "gptq").stdout
    for word in ("msmodelslim:safe_tensor -> gptq:v1", "repack", "scale-rounded", "model.safetensors", "peak memory"):
        assert word in printed
    decided = json.loads(invoke("plan", source, "--to", "gptq", "--json").stdout)
    assert decided["moves"]["repack"] == 7
    assert decided["refusals"] == []
    assert decided["target"]["quantized_layers"] == 7
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_foretells_the_files_to_the_byte(source: Path, tmp_path: Path) -> None:
    for target in ("awq", "gptq", "dense"):
        decided = json.loads(invoke("plan", source, "--to", target, "--max-shard-size", "40kB", "--json").stdout)
        assert invoke("convert", source, tmp_path / target, "--to", target, "--max-shard-size", "40kB").exit_code == 0
        written = {path.name: path.stat().st_size for path in (tmp_path / target).glob("*.safetensors")}
        assert {file["name"]: file["bytes"] for file in decided["target"]["files"]} == written
        assert len(written) > 1


def test_convert_and_verify_in_json(source: Path, tmp_path: Path) -> None:
    done = invoke("convert", source, tmp_path / "out", "--to", "awq", "--json")
    content = json.loads(done.stdout)
    assert done.stderr == ""
    assert content["proved"] is True
    assert content["destination"] == str(tmp_path / "out")
    verdict = json.loads(invoke("verify", source, tmp_path / "out", "--json").stdout)
    assert verdict["same"] is True
    assert (verdict["fingerprint_left"], verdict["fingerprint_right"]) == (content["fingerprint_source"], content["fingerprint_target"])
    digest = json.loads(invoke("fingerprint", tmp_path / "out", "--json").stdout)["fingerprint"]
    assert digest == content["fingerprint_target"]


def test_json_of_a_failed_verify_is_valid_too(source: Path, tmp_path: Path) -> None:
    invoke("convert", source, tmp_path / "out", "--to", "awq")
    change_tensors(weight_file(tmp_path / "out"), lambda tensors: tensors.pop("model.norm.weight"))
    done = invoke("verify", source, tmp_path / "out", "--json")
    assert done.exit_code == 4
    assert json.loads(done.stdout)["only_left"] == ["model.norm.weight"]
    assert done.stderr == ""


def test_fingerprint_of_every_tensor(source: Path) -> None:
    lines = invoke("fingerprint", source, "--tensors").stdout.splitlines()
    content = json.loads(invoke("fingerprint", source, "--json").stdout)
    assert lines[0].split()[0] == content["fingerprint"]
    assert {line.split()[1]: line.split()[0] for line in lines[1:]} == content["tensors"]


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("convert", "{eight}", "{tmp}/out", "--to", "awq", "--json"), 3),
        (("plan", "{source}", "--to", "gguf", "--json"), 2),
        (("inspect", "{tmp}/nowhere", "--json"), 5),
        (("fingerprint", "{tmp}/nowhere", "--json"), 5),
        (("convert", "{source}", "{source}", "--to", "awq", "--json"), 1),
    ],
)
def test_errors_in_json_are_json_too(args: tuple[str, ...], code: int, source: Path, eight_bits: Path, tmp_path: Path) -> None:
    done = invoke(*(arg.format(source=source, eight=eight_bits, tmp=tmp_path) for arg in args))
    assert done.exit_code == code
    content = json.loads(done.stdout)
    assert content["exit_code"] == code
    assert content["error"]
    assert done.stderr == ""


def test_refused_plan_in_json_lists_every_refusal(eight_bits: Path) -> None:
    done = invoke("plan", eight_bits, "--to", "awq", "--json")
    assert done.exit_code == 3
    refusals = json.loads(done.stdout)["refusals"]
    assert {refusal["layer"] for refusal in refusals} == set(model(blocks=1, bits=8).linears)
    assert {refusal["code"] for refusal in refusals} == {"bits"}


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--to", "gguf"), "gguf"),
        (("--to", "gptq:v9"), "v9"),
        (("--to", "awq", "--allow", "everything"), "everything"),
        (("--to", "awq", "--scale-dtype", "fp8"), "fp8"),
        (("--to", "awq", "--max-shard-size", "large"), "large"),
        (("--to", "awq", "--max-shard-size", "0"), "0"),
        (("--to", "awq", "--max-shard-size", "-5GB"), "-5GB"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "convert"])
def test_requests_that_make_no_sense_are_usage_errors(verb: str, options: tuple[str, ...], word: str, source: Path, tmp_path: Path) -> None:
    places = (source,) if verb == "plan" else (source, tmp_path / "out")
    done = invoke(verb, *places, *options)
    assert done.exit_code == 2
    line = assert_one_line(done)
    assert line.startswith(f"weighbridge {verb}: ")
    assert word in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args",
    [
        ("convert", "{source}", "{tmp}/out"),
        ("convert", "{source}", "--to", "awq"),
        ("plan", "{source}", "--to", "awq", "--jobs", "0"),
        ("plan", "{source}", "--to", "awq", "--jobs", "many"),
        ("plan", "{source}", "--to", "awq", "--no-such-option"),
        ("verify", "{source}"),
        ("weigh", "{source}"),
    ],
)
def test_missing_and_malformed_options_are_usage_errors(args: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    done = invoke(*(arg.format(source=source, tmp=tmp_path) for arg in args))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Usage" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("size", ["5GB", "5 gb", "512MiB", "1.5G", "40000", "7KiB", "300 kB"])
def test_sizes_may_be_written_as_people_write_them(size: str, source: Path) -> None:
    assert invoke("plan", source, "--to", "awq", "--max-shard-size", size).exit_code == 0


def test_refusals_exit_with_3_and_say_what_to_do(eight_bits: Path, source: Path, tmp_path: Path) -> None:
    done = invoke("convert", eight_bits, tmp_path / "out", "--to", "awq")
    assert done.exit_code == 3
    line = assert_one_line(done)
    assert "model.layers.0." in line
    assert "weighbridge plan" in line
    assert invoke("convert", source, tmp_path / "out", "--to", "gptq", "--strict").exit_code == 3
    assert invoke("plan", eight_bits, "--to", "awq").exit_code == 3
    assert invoke("convert", source, tmp_path / "out", "--to", "msmodelslim:v1").exit_code == 3


def test_allowed_loss_is_done(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    made = model(blocks=1)
    scales = made.linears[name].scales.copy()
    scales[0, 0] = 3e-7
    source = write_msmodelslim(tmp_path / "source", replaced(made, name, scales=scales))
    refused = invoke("convert", source, tmp_path / "out", "--to", "awq")
    assert refused.exit_code == 3
    assert "--allow scale-subnormal" in refused.stderr
    assert invoke("convert", source, tmp_path / "out", "--to", "awq", "--allow", "scale-subnormal").exit_code == 0
    assert invoke("verify", source, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("verb", ["inspect", "plan", "convert", "fingerprint", "verify"])
def test_unreadable_input_exits_with_5(verb: str, source: Path, tmp_path: Path) -> None:
    content = weight_file(source).read_bytes()
    weight_file(source).write_bytes(content[:-10])
    args = {"plan": ("--to", "awq"), "convert": (tmp_path / "out", "--to", "awq"), "verify": (source,)}.get(verb, ())
    done = invoke(verb, source, *args)
    assert done.exit_code == 5
    assert weight_file(source).name in assert_one_line(done)


@pytest.mark.parametrize("kind", ["nowhere", "empty", "notes"])
def test_what_is_no_checkpoint_exits_with_5(kind: str, tmp_path: Path) -> None:
    if kind != "nowhere":
        (tmp_path / kind).mkdir()
    if kind == "notes":
        (tmp_path / kind / "notes.txt").write_text("hello", "utf-8")
    done = invoke("inspect", tmp_path / kind)
    assert done.exit_code == 5
    assert kind in assert_one_line(done)


def test_unreadable_comes_before_refused(eight_bits: Path, tmp_path: Path) -> None:
    """8 bits to AWQ would be refused; a scale that is not a number is found first."""
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    change_tensors(weight_file(eight_bits), lambda tensors: tensors[name].__setitem__((0, 0), float("nan")))
    done = invoke("convert", eight_bits, tmp_path / "out", "--to", "awq")
    assert done.exit_code == 5
    assert "q_proj" in done.stderr


def test_base_model_without_a_config_exits_with_5(source: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    done = invoke("convert", source, tmp_path / "out", "--to", "awq", "--base-model", tmp_path / "base")
    assert done.exit_code == 5
    assert "config.json" in assert_one_line(done)


# --- help, and the library beside it ----------------------------------------------------------------------------------


def test_help_tells_verbs_and_exit_codes() -> None:
    done = invoke("--help")
    assert done.exit_code == 0
    for word in (*VERBS, "0 done", "1 failed", "2 usage", "3 refused", "4 not the same", "5 unreadable"):
        assert word in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_tells_every_option(verb: str) -> None:
    done = invoke(verb, "--help")
    assert done.exit_code == 0
    command = get_command(app).commands[verb]  # type: ignore[attr-defined]
    for parameter in command.params:
        names = [name for name in parameter.opts if name.startswith("--")]
        names = names or [str(getattr(parameter, "metavar", None) or parameter.name).lower()]
        assert all(name in done.stdout.lower() for name in names), names
        assert getattr(parameter, "help", None) or parameter.name == "help", f"{verb} {parameter.name} has no help"


def library(verb: str) -> Callable[..., Any]:
    function = getattr(importlib.import_module("convert"), verb)
    assert callable(function)
    return function  # type: ignore[no-any-return]


@pytest.mark.parametrize("verb", HOMES)
def test_library_functions_have_the_verbs_options(verb: str) -> None:
    """Only what concerns printing is the command line's alone, and only what a caller passes in is the library's."""
    ours = set(inspect.signature(library(verb)).parameters)
    if "options" in ours:
        ours = ours - {"options"} | set(Options.__annotations__)
    command = get_command(app).commands[verb]  # type: ignore[attr-defined]
    theirs = {parameter.name for parameter in command.params} - {"help"}
    assert theirs - ours <= {"json", "layers", "tensors"}
    assert ours - theirs <= {"progress", "description", "probe"}


@pytest.mark.parametrize("first", HOMES)
def test_public_names_are_functions_whatever_was_used_first(first: str) -> None:
    """No verb has the name of a module: importing one would set the package attribute to the module."""
    code = f"import convert\nconvert.{first}\nprint([name for name in convert.__all__ if not callable(getattr(convert, name))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_ms_to_vllm_refuses_in_one_line(tmp_path: Path) -> None:
    source = MSMODELSLIM / "w8a16_g128_sym_bf16"
    files = ("--model", weight_file(source), "--json", description_file(source), "--save_path", tmp_path / "res.safetensors")
    for options, code in (((), 3), (("--w_bit", 4, "--target_tool", "gptq"), 3), (("--w_bit", 5), 2), (("--target_tool", "dense"), 2)):
        done = invoke(*files, *options, of=ms_to_vllm_app)
        assert done.exit_code == code, done.stderr
        assert_one_line(done)
        assert list(tmp_path.iterdir()) == []


def test_ms_to_vllm_output_dir_is_a_whole_folder(tmp_path: Path) -> None:
    source = MSMODELSLIM / "w4a16_g128_sym_bf16"
    files = ("--model", weight_file(source), "--json", description_file(source))
    done = invoke(*files, "--base_model", MSMODELSLIM / "src_bf16", "--output_dir", tmp_path / "out", of=ms_to_vllm_app)
    assert done.exit_code == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert invoke("verify", source, tmp_path / "out").exit_code == 0
