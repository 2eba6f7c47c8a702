"""LMDeploy 0.18.0 loads what Weighbridge writes, on the CPU, as far as its Python code goes, and its ``lite`` gives our numbers.

``make oracles`` (or ``nox -s lmdeploy``) installs it and runs this; ``lmdeploy_load.py`` says how the engines are run.

How far that goes. TurboMind's C++ extension needs CUDA's libraries, so it is replaced by a stand-in that only keeps what it is given.
All before it is LMDeploy's own: the choice of engine, config.json, the reader of the files, unpacking, zero points, transposing,
the reordering for rotary embedding, fusing, and packing for the GPU. So what is compared is what TurboMind copies to a GPU; that its
kernels then multiply ``(code - zero) * scale`` is not seen here, nor which shapes they take, nor that they round float32 scales. Of the
PyTorch engine its config, models, loaders and the plain torch backend's dequantization of AWQ are run; attention and W8A8's products
are not. No engine says a word here: both want a GPU for that.

``lite`` runs whole on a CPU: calibrate, auto_awq and smooth_quant, with a local text for its data set.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  so that safetensors can give bfloat16
import numpy as np
import pytest
from judge import HERE, Tool, read_answer
from laws import Law, read_by_weighbridge, read_plainly
from lmdeploy_cases import AS_THEY_ARE, CHANGED, FLOAT32_SCALES, PYTORCH, ROOT, TURBOMIND, WRITTEN, Case
from lmdeploy_judge import Answer, ask
from safetensors.numpy import load_file, save_file

from convert import check, convert, serve_check
from convert.serving_children import EngineFailedError
from formats import open_checkpoint
from formats.ir import read

pytestmark = pytest.mark.oracle

EMBEDDINGS = "model.embed_tokens.weight"


def for_transformers_4(folder: Path, copy: Path) -> Path:
    """``folder``, or a ``copy`` whose config.json says rotary embedding as transformers 4 does, which LMDeploy is run with here."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if "rope_parameters" not in config:
        return folder
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"]}
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    return copy


class Asked(NamedTuple):
    """A folder, and what the engines say of it. source: where its weights are from."""

    folder: Path
    source: Path
    answer: Answer


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Asked]:
    """All folders, written here or fixtures, and what the engines say of them."""
    root = tmp_path_factory.mktemp("lmdeploy")
    Tool("lmdeploy")  # skips here, before anything is converted
    folders, sources = {}, {}
    float32 = Case("lmdeploy/awq_v010", "awq", options={"scale_dtype": "float32"})
    for name, case in (WRITTEN | CHANGED | {FLOAT32_SCALES: float32}).items():
        folders[name], sources[name] = root / "folders" / re.sub(r"\W+", "_", name), ROOT / case.source
        folders[name].parent.mkdir(exist_ok=True)
        base = None if case.base is None else ROOT / case.base
        convert(sources[name], folders[name], to=case.to, base_model=base, **case.options)
        if case.change is not None:
            case.change(folders[name])
    for name in AS_THEY_ARE:
        folders[name] = sources[name] = ROOT / name
    (root / "copies").mkdir()
    served = {name: for_transformers_4(folder, root / "copies" / re.sub(r"\W+", "_", name)) for name, folder in folders.items()}
    numbers = {str(number): name for number, name in enumerate(served)}
    said = ask({number: served[name] for number, name in numbers.items()}, root / "asked")
    return {name: Asked(folders[name], sources[name], said[number]) for number, name in numbers.items()}


def laws_of(one: Asked) -> dict[str, Law]:
    """What the weights are; of a dense folder their products were rounded once, whatever the scales are."""
    laws = (read_plainly if one.source.parent.name == "msmodelslim" else read_by_weighbridge)(one.source)
    dense = not open_checkpoint(one.folder).layer_names
    return {name: law._replace(quotients=True) for name, law in laws.items()} if dense else laws


def expect_plain(found: Mapping[str, np.ndarray], source: Path, quantized: set[str], padding: int | None = None) -> None:
    """Every tensor is the source's, in the engine's dtype: norms, embeddings, biases, and linears that are not ``quantized`` there.

    padding   the token whose embedding the engine sets to 0
    """
    checkpoint = open_checkpoint(source)
    wanted = {name: np.asarray(checkpoint.plain(name).data) for name in checkpoint.plain_names}
    biases = {f"{name}.bias": checkpoint.layer(name).bias for name in checkpoint.layer_names}
    wanted |= {name: np.asarray(read(bias)) for name, bias in biases.items() if bias is not None}
    if padding is not None:
        wanted[EMBEDDINGS] = wanted[EMBEDDINGS].copy()
        wanted[EMBEDDINGS][padding] = 0
    names = {name for name in found if name.removesuffix(".weight") not in quantized}
    assert {name for name in wanted if not name.endswith("inv_freq")} - names <= {"lm_head.weight"}, "lm_head may be tied"
    for name in names & set(wanted):
        np.testing.assert_array_equal(found[name], wanted[name].astype(found[name].dtype), name)
    assert names - set(wanted) <= {"lm_head.weight"} | {name for name in names if name.endswith(".bias") and not found[name].any()}


def expect_turbomind(one: Asked) -> None:
    """TurboMind copies the source's weights to the GPU: whole numbers, scales, and all that is not quantized."""
    laws, linears, plain = laws_of(one), one.answer.turbomind_linears(), one.answer.turbomind_plain()
    assert set(linears) <= set(laws)
    for name, law in laws.items():
        if name in linears:
            np.testing.assert_array_equal(linears[name].steps, law.steps, name)
            np.testing.assert_array_equal(linears[name].scales, law.scales.astype(linears[name].scales.dtype), name)
        else:
            np.testing.assert_array_equal(plain[f"{name}.weight"], law.rounded(plain[f"{name}.weight"].dtype), name)
    expect_plain(plain, one.source, set(laws) - set(linears))


def expect_pytorch(one: Asked) -> None:
    """The PyTorch engine's model has the source's weights: of AWQ the float16 products, of W8A8 codes and scales."""
    laws, found = laws_of(one), one.answer.pytorch_tensors()
    assert one.answer.unfilled == []
    for name, law in laws.items():
        weight, scale = found[f"{name}.weight"], found.pop(f"{name}.scale", None)
        if scale is None:
            np.testing.assert_array_equal(weight, law.rounded(weight.dtype), name)
        else:
            np.testing.assert_array_equal(weight.astype(np.float32), law.steps, name)
            np.testing.assert_array_equal(np.broadcast_to(scale, law.scales.shape), law.scales, name)
    config = one.answer.config
    expect_plain(found, one.source, set(laws), padding=config.get("pad_token_id") if config["model_type"] == "qwen2" else None)


@pytest.mark.parametrize("name", TURBOMIND)
def test_turbomind_holds_what_we_write(asked: dict[str, Asked], name: str) -> None:
    one = asked[name]
    assert one.answer.turbomind == ""
    assert one.answer.dtype == (one.answer.config.get("dtype") or one.answer.config["torch_dtype"])
    assert (one.answer.turbomind_linears() != {}) == (not name.startswith("dense"))
    expect_turbomind(one)


@pytest.mark.parametrize("name", PYTORCH)
def test_the_pytorch_engine_holds_what_we_write(asked: dict[str, Asked], name: str) -> None:
    assert asked[name].answer.pytorch == ""
    expect_pytorch(asked[name])


def loads(one: Asked) -> bool:
    """Whether the engine that LMDeploy chooses, TurboMind unless it says that it does not know the model, holds the right weights."""
    other = "Plz try pytorch engine instead" in one.answer.turbomind
    refused, expect = (one.answer.pytorch, expect_pytorch) if other else (one.answer.turbomind, expect_turbomind)
    try:
        expect(one)
    except (AssertionError, ValueError, KeyError):
        return False
    return refused == ""


@pytest.mark.parametrize("name", [*WRITTEN, *CHANGED, *AS_THEY_ARE])
def test_check_says_what_the_engines_do(asked: dict[str, Asked], name: str) -> None:
    report = check(asked[name].folder, "lmdeploy")
    assert report.ok == loads(asked[name]), f"{report.unmet}\n{asked[name].answer.turbomind}\n{asked[name].answer.pytorch}"


REFUSED = {
    "awq, GEMM in capitals": "AssertionError: unsupported quant config",
    "awq, no version": "AssertionError: unsupported quant config",
    "awq, a float gate": r"RuntimeError: shape '\[\d+, -1, 256\]' is invalid",
    "awq in groups of 64": 'ValueError: Unsupported group_size=64 for model_format="awq"',
    "awq, groups of -1 said": 'ValueError: Unsupported group_size=-1 for model_format="awq"',
    "awq, quant_config.json alone": "ValueError: no weight format accepts tensors",
    "gptq, quantize_config.json alone": "ValueError: no weight format accepts tensors",
    "awq:gemv": "AssertionError: unsupported quant config",
    "gptq, zero points": "AssertionError: unsupported quant config",
    "gptq in groups of 64": 'ValueError: Unsupported group_size=64 for model_format="gptq"',
    "gptq, a scale per channel": 'ValueError: Unsupported group_size=-1 for model_format="gptq"',
    "gptq, sym false said": "AssertionError: unsupported quant config",
    "gptq, act order said": "AssertionError: unsupported quant config",
    "gptq, a float k": r"NotImplementedError: GPTQFormat\.dequant not implemented",
    "gptq, a float gate": r"RuntimeError: shape '\[\d+, -1, 256\]' is invalid",
    "ct, 8 bits": "AssertionError: pack-quantized requires 4-bit int, but got 8-bit int",
    "ct, W8A8": "AssertionError: compressed-tensors only supports pack-quantized format",
    "ct, a float gate": r"RuntimeError: shape '\[\d+, -1, 256\]' is invalid",
    "smooth_quant of LMDeploy": "AssertionError: turbomind does not support .* Plz try pytorch engine instead",
}


@pytest.mark.parametrize("name", REFUSED)
def test_turbomind_refuses_in_the_words_of_the_table(asked: dict[str, Asked], name: str) -> None:
    assert re.match(REFUSED[name], asked[name].answer.turbomind)


def test_turbomind_takes_the_zero_points_of_v2_for_one_more(asked: dict[str, Asked]) -> None:
    one = asked["gptq:v2"]
    assert one.answer.turbomind == ""
    for name, law in laws_of(one).items():
        np.testing.assert_array_equal(one.answer.turbomind_linears()[name].steps, law.steps - 1, name)


def test_turbomind_takes_8_bits_for_twice_as_many_inputs(asked: dict[str, Asked]) -> None:
    answer = asked["gptq, 8 bits"].answer
    assert answer.turbomind == ""
    assert answer.tensors["turbomind/text_model.layers.0.attention.wo.weight"].shape[0] == 2 * answer.config["hidden_size"]


def test_turbomind_does_not_see_act_order(asked: dict[str, Asked]) -> None:
    """It takes the folder without a word: the codes are right, and lie in other groups than their scales'."""
    one = asked["ct, act order"]
    assert one.answer.turbomind == ""
    held, laws = one.answer.turbomind_linears(), laws_of(one)
    assert any((held[name].scales.astype(np.float32) != laws[name].scales).any() for name in laws)


def test_float32_scales_are_copied_by_one_engine_and_rounded_by_the_other(asked: dict[str, Asked]) -> None:
    one = asked[FLOAT32_SCALES]
    assert {held.scales.dtype for held in one.answer.turbomind_linears().values()} == {np.dtype(np.float32)}
    expect_turbomind(one)
    expect_pytorch(one)
    assert any((law.scales.astype(np.float16) != law.scales).any() for law in laws_of(one).values())
    assert [unmet.code for unmet in check(one.folder, "lmdeploy").unmet] == ["scale-dtype"]


def test_serve_check_says_that_lmdeploy_needs_a_gpu(tmp_path: Path) -> None:
    python = Tool("lmdeploy").python
    with pytest.raises(EngineFailedError, match=r"lmdeploy 0\.18\.0.*LMDeploy runs on a GPU alone, and torch finds none"):
        serve_check(ROOT / "lmdeploy" / "awq_v018", engine="lmdeploy", python=python)


# lite.

SAMPLES, LENGTH = 8, 64
TEXT = ROOT / "manuals" / "calibration.txt"


def half_tinylm(folder: Path) -> None:
    """tinylm in float16, which ``lite`` wants where there is no GPU, and described as transformers 4 does it."""
    shutil.copytree(
        ROOT / "tinylm", folder, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("model.safetensors", "inputs.json")
    )
    tensors = load_file(ROOT / "tinylm" / "model.safetensors")
    save_file({name: tensor.astype(np.float16) for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config, tokenizer = (json.loads((folder / name).read_text("utf-8")) for name in ("config.json", "tokenizer_config.json"))
    config |= {"dtype": "float16", "rope_theta": config.pop("rope_parameters")["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"}), "utf-8")


MODELS = {
    "tinylm": half_tinylm,  # grouped heads: v is not smoothed
    "llama_mha": lambda folder: shutil.copytree(ROOT / "lmdeploy" / "llama_mha", folder, copy_function=shutil.copyfile),
}


def run_lite(root: Path, model: str, *runs: tuple[str, str, dict[str, Any]]) -> Path:
    """The folder ``model`` in ``root``, of which LMDeploy has done ``runs``, each a function, a folder in ``root`` and arguments."""
    folder = root / "model"
    MODELS[model](folder)
    common = {"model": str(folder), "calib_samples": SAMPLES, "calib_seqlen": LENGTH, "device": "cpu"}
    job = {
        "text": TEXT.read_text("utf-8"),
        "bytes": None if (folder / "tokenizer.json").exists() else str(folder),
        "runs": [(function, {**common, "work_dir": str(root / out), **arguments}) for function, out, arguments in runs],
    }
    (root / "job.json").write_text(json.dumps(job), "utf-8")
    Tool("lmdeploy").run("lmdeploy_lite.py", root / "job.json")
    return folder


@pytest.fixture(scope="module", params=MODELS)
def lite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tool makes of a model, calibrate and auto_awq, and Weighbridge of the same: see ``lmdeploy_ours.py``."""
    tool, root = Tool("lmdeploy"), tmp_path_factory.mktemp(request.param)
    model = run_lite(root, request.param, ("calibrate", "calibrate", {}), ("auto_awq", "auto_awq", {}))
    arguments = [model, TEXT, SAMPLES, LENGTH, root / "calibrate", root]
    command = [tool.python, str(HERE / "lmdeploy_ours.py"), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT.parent)})
    assert run.returncode == 0, run.stderr[-6000:]
    return root


@pytest.mark.parametrize("name", ["inputs_stats", "outputs_stats"])
def test_statistics_are_the_tools_bit_for_bit(lite: Path, name: str) -> None:
    """Every statistic of every linear and norm, in the tool's order, as torch reads both files."""
    (theirs, about), (ours, about_ours) = (read_answer(lite / f"{side}_{name}") for side in ("theirs", "ours"))
    assert about == about_ours
    assert len(theirs) > 50
    for tensor, values in theirs.items():
        assert (ours[tensor].dtype, ours[tensor].tobytes()) == (values.dtype, values.tobytes()), tensor


def test_the_awq_folder_is_the_tools_bit_for_bit(lite: Path) -> None:
    """Codes, zero points, scales and norms: the same tensors, byte for byte, and the same said of them."""
    theirs, ours = (load_file(lite / folder / "model.safetensors") for folder in ("auto_awq", "ours"))
    assert set(theirs) == set(ours)
    for name, values in theirs.items():
        assert (ours[name].dtype, ours[name].tobytes()) == (values.dtype, values.tobytes()), name
    said = [json.loads((lite / folder / "config.json").read_text("utf-8"))["quantization_config"] for folder in ("auto_awq", "ours")]
    assert said[0].items() <= said[1].items()


KINDS = ("int8", "fp8")


@pytest.fixture(scope="module")
def smoothed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Asked]:
    """Folders of smooth_quant, by kind, and what Weighbridge writes of them, by "ours " and kind."""
    root = tmp_path_factory.mktemp("smooth_quant")
    run_lite(root, "llama_mha", *(("smooth_quant", kind, {"quant_dtype": kind}) for kind in KINDS))
    for kind in KINDS:
        convert(root / kind, root / f"ours_{kind}", to=f"smooth_quant:{kind}")
    answers = ask({name: root / name for kind in KINDS for name in (kind, f"ours_{kind}")}, root / "asked")
    return {name: Asked(one.folder, root / name.removeprefix("ours_"), one) for name, one in answers.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_smooth_quant_writes_is_read_and_written_again(smoothed: dict[str, Asked], kind: str) -> None:
    """LMDeploy's PyTorch engine holds of its own folder and of ours what Weighbridge reads in the former."""
    for one in (smoothed[kind], smoothed[f"ours_{kind}"]):
        assert one.answer.pytorch == ""
        expect_pytorch(one)
        assert check(one.folder, "lmdeploy").ok
