"""transformers 5.10.1 with compressed-tensors 0.17.0 loads every compressed-tensors folder that Weighbridge writes, bit for bit.

``make oracles`` (or ``nox -s compressed_tensors``) installs both and runs this; ``compressed_tensors_load.py`` says what they are asked.

The expected side is ``laws``, wherever it can by plain code (``raw``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from judge import FIXTURES, W4A16, W8A16, Tool, read_answer
from laws import Law, read_by_weighbridge, read_plainly

from convert import convert
from formats import open_checkpoint

pytestmark = pytest.mark.oracle

ROOT = FIXTURES.parent
QWEN, LLAMA, LLAMA2 = (f"compressed_tensors/{name}" for name in ("src_qwen2_bf16", "src_llama_fp16", "src_llama2l_fp16"))
ONE_LAYER = "msmodelslim/src1l_bf16_tok"


class Source(NamedTuple):
    """A folder under fixtures/ to convert. inputs: how the inputs of its layers are quantized."""

    folder: str
    base: str | None = None
    inputs: str | None = None
    raw: bool = False  # the expected side is read by plain code


SOURCES = {
    **{f"ms_{case}": Source(f"msmodelslim/{case}", f"msmodelslim/{base}", raw=True) for case, base in (W4A16 | W8A16).items()},
    "ms_w8a8_static": Source("msmodelslim_w8/w8a8_static_bf16", QWEN, "static", raw=True),
    "ms_w8a8_tensor": Source("msmodelslim_w8/w8a8_static_tensor_fp16", LLAMA, "static", raw=True),
    "ms_w8a8_ascendv1": Source("msmodelslim_w8/w8a8_static_ascendv1_fp16", LLAMA, "static", raw=True),
    "ms_w8a8_anti_m4": Source("msmodelslim_w8/w8a8_static_anti_m4_bf16", LLAMA, "static", raw=True),
    "ms_w8a8_sharded": Source("msmodelslim_w8/w8a8_sharded_fp16", LLAMA2, "static"),
    "ms_w8a8_numpy": Source("msmodelslim_w8/w8a8_numpy_nobias_fp16", LLAMA, "static"),
    "ms_w8a8_dynamic": Source("msmodelslim_w8/w8a8_dynamic_bf16", LLAMA, "dynamic", raw=True),
    "ms_w8a8s_sparse": Source("msmodelslim_w8/w8a8s_sparse_fp16", LLAMA, "static"),
    "ms_w8a8s_lowbit": Source("msmodelslim_w8/w8a8s_lowbit_bf16", QWEN, "static"),
    "ms_w4a8_g32": Source("msmodelslim_w8/w4a8_dynamic_g32_bf16", LLAMA, "dynamic", raw=True),
    "ms_w4a8_ascendv1_g128": Source("msmodelslim_w8/w4a8_dynamic_ascendv1_g128_bf16", QWEN, "dynamic", raw=True),
    "ms_v1_w8a8_static": Source("msmodelslim_w8/v1_w8a8_static", ONE_LAYER, "static"),
    "ms_v1_w8a8_dynamic": Source("msmodelslim_w8/v1_w8a8_dynamic", ONE_LAYER, "dynamic", raw=True),
    "ms_v1_w4a8_dynamic": Source("msmodelslim_w8/v1_w4a8_dynamic", ONE_LAYER, "dynamic"),
    "awq_gemm": Source("awq_gptq/awq_gemm_g128_zp"),
    "awq_marlin": Source("awq_gptq/awq_marlin_g128_nozp"),
    "gptq_4b_sym": Source("awq_gptq/gptq_v1_4b_g128_sym"),
    "gptq_4b_channel": Source("awq_gptq/gptq_v1_4b_gm1_sym"),
    "gptq_8b_sym": Source("awq_gptq/gptq_v1_8b_g128_sym"),
    "gptq_mixed": Source("awq_gptq/gptqmodel_dynamic"),
    **{
        f"ct_{case}": Source(f"compressed_tensors/{case}", None, inputs)
        for inputs, cases in {
            None: "w4a16_g128_sym_bf16 w4a16_g32_asym_fp16 w4a16_pc_asym_fp16 w4a16_sharded_fp16 w4a16_gptq_g32_actgroup_asym_fp16 "
            "w4a16_gptq_g64_actgroup_sym_bf16 w4a16_gptq_g32_actweight_sym_fp16 w8a16_g64_asym_fp16 w8a16_pc_sym_fp16",
            "static": "w8a8_static_asym_fp16 w8a8_static_sym_bf16 w8a8_tensor_static_asym_fp16 fp8_static_fp16",
            "dynamic": "w8a8_dynamic_fp16 w8a8_dynamic_wasym_fp16 w4a8_g32_dynamic_fp16 fp8_dynamic_fp16",
        }.items()
        for case in cases.split()
    },
}

GOLDENS = sorted(path.parent.name for path in (ROOT / "compressed_tensors").glob("*/golden_case.json"))
NOT_READ = {"kv_fp8_head_fp16"}
"""Goldens without a quantized linear."""


class Answer(NamedTuple):
    """What the tools say of a folder; see ``compressed_tensors_load.py``."""

    folder: Path
    tensors: Mapping[str, np.ndarray]
    formats: Mapping[str, str]
    inputs: Mapping[str, str | None]
    problems: Mapping[str, list[str]]
    refused: str


def ask(folders: Path, out: Path) -> dict[str, Answer]:
    out.mkdir()
    Tool("compressed_tensors").run("compressed_tensors_load.py", folders, out)
    found = {}
    for folder in folders.iterdir():
        tensors, metadata = read_answer(out / f"{folder.name}.safetensors")
        found[folder.name] = Answer(folder, tensors, **{key: json.loads(text) for key, text in metadata.items()})
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """What the tools say of what we write, by case."""
    root = tmp_path_factory.mktemp("compressed_tensors")
    Tool("compressed_tensors")  # skips here, before anything is converted
    (root / "folders").mkdir()
    for case, source in SOURCES.items():
        base = None if source.base is None else ROOT / source.base
        convert(ROOT / source.folder, root / "folders" / case, to="compressed-tensors", base_model=base)
    return ask(root / "folders", root / "out")


@pytest.fixture(scope="module")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """What the tools say of what llm-compressor wrote."""
    root = tmp_path_factory.mktemp("goldens")
    (root / "folders").mkdir()
    for case in GOLDENS:
        (root / "folders" / case).symlink_to(ROOT / "compressed_tensors" / case)
    return ask(root / "folders", root / "out")


def model_dtype(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    name = config.get("dtype") or config["torch_dtype"]
    return np.dtype({"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[name])


def expect_weights(answer: Answer, laws: Mapping[str, Law]) -> None:
    """What is loaded and what is decompressed are the law's weights, of all layers and of no other."""
    assert set(answer.formats) == set(laws)
    for name, law in laws.items():
        stored, loaded = answer.tensors[f"{name}.decompressed"], answer.tensors[f"{name}.weight"]
        np.testing.assert_array_equal(stored.astype(np.float32), law.rounded(stored.dtype).astype(np.float32), name)
        assert loaded.dtype == model_dtype(answer.folder)
        np.testing.assert_array_equal(loaded.astype(np.float32), law.rounded(loaded.dtype).astype(np.float32), name)


@pytest.mark.parametrize("case", SOURCES)
def test_the_tools_load_what_we_write(answers: dict[str, Answer], case: str) -> None:
    answer, source = answers[case], SOURCES[case]
    assert answer.refused == ""
    assert answer.problems == {}, "keys that are missing or not expected"
    expect_weights(answer, (read_plainly if source.raw else read_by_weighbridge)(ROOT / source.folder))
    assert set(answer.inputs.values()) == {source.inputs}
    assert np.isfinite(answer.tensors["logits"]).all()


@pytest.mark.parametrize("case", [case for case, source in SOURCES.items() if source.inputs == "static"])
def test_static_input_scales_arrive(answers: dict[str, Answer], case: str) -> None:
    answer, dtype = answers[case], model_dtype(answers[case].folder)
    checkpoint = open_checkpoint(ROOT / SOURCES[case].folder)
    for name in checkpoint.layer_names:
        layer = checkpoint.layer(name)
        assert layer.input_scale is not None
        found = answer.tensors[f"{name}.input_scale"].astype(np.float32).reshape(-1)
        np.testing.assert_array_equal(found, layer.input_scale.astype(dtype).astype(np.float32).reshape(-1), name)
        zeros = 0 if layer.input_zero_point is None else layer.input_zero_point.reshape(-1).astype(np.int16)
        np.testing.assert_array_equal(answer.tensors.get(f"{name}.input_zero_point", np.zeros(1)), zeros, name)


@pytest.mark.parametrize("case", [case for case in GOLDENS if case not in NOT_READ])
def test_our_reader_and_the_decompressor_agree_on_the_goldens(goldens: dict[str, Answer], case: str) -> None:
    answer = goldens[case]
    assert answer.refused == ""
    expect_weights(answer, read_by_weighbridge(answer.folder))
