"""GPTQModel 7.6.0 and transformers 5.23.0 load what Weighbridge writes: weights, logits, tokens; and GPTQModel packs alike.

``make oracles`` (or ``nox -s gptqmodel``) installs both in their own environment and runs this.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from judge import (
    FIXTURES,
    FLOAT16_NOISE,
    W4A16,
    W8A16,
    Tool,
    draw_seed,
    expect_logits,
    expect_weights,
    law,
    parts_of,
    read_answer,
)
from raw_msmodelslim import Layer, read_layers

from convert import convert
from formats import awq, gptq
from formats.layouts import PackLayout

pytestmark = pytest.mark.oracle

ALL = W4A16 | W8A16
SHAPES = 240
NEW_TOKENS = 12
ZEROED = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def tool() -> Tool:
    return Tool("gptqmodel")


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]


def is_symmetric(layers: Mapping[str, Layer]) -> bool:
    return all((layer.zeros == 2 ** (layer.bits - 1)).all() for layer in layers.values())


def expect_model(tool: Tool, folder: Path, layers: Mapping[str, Layer], kernel: str) -> None:
    """Both tools load ``folder``: its weights are the law's, its logits and its greedy tokens those of the float32 model."""
    out = folder.with_name("answer.safetensors")
    parts = ["weight", "weight_transformers"]
    if config_of(folder).get("checkpoint_format") == "gptq" and not is_symmetric(layers):
        # GPTQModel.load refuses such a folder unless its config says that GPTQModel wrote it; transformers does not ask.
        with pytest.raises(AssertionError, match=r"Loading of a sym=False model with format=FORMAT\.GPTQ is only supported"):
            tool.answer("gptqmodel_decode.py", folder, out)
        answer, metadata = tool.answer("gptqmodel_decode.py", folder, out, "--transformers")
        parts.remove("weight")
    else:
        answer, metadata = tool.answer("gptqmodel_decode.py", folder, out)
        expect_logits(answer, "logits_gptqmodel")
    assert metadata["layers"] == kernel
    assert {name for name in answer if ".weight" in name} == parts_of(layers, *parts)
    for part in parts:
        expect_weights(answer, layers, part)
    expect_logits(answer)

    tokens, scores = answer["generated"][0], answer["generated_reference"][0]
    prompt = len(tokens) - NEW_TOKENS
    np.testing.assert_array_equal(tokens[:prompt], answer["input_ids"][0, :prompt])
    # Greedy: the float32 model finds each new token as likely as its own choice, but for float16 noise in both values.
    said = scores[prompt - 1 : -1]
    chosen = np.take_along_axis(said, tokens[prompt:, None], axis=1)[:, 0]
    assert (said.max(axis=1) - chosen <= 2 * FLOAT16_NOISE * np.abs(said).max()).all()


@pytest.mark.parametrize("case", W4A16)
def test_gptqmodel_and_transformers_load_awq(tool: Tool, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "awq"
    convert(FIXTURES / case, folder, to="awq", base_model=FIXTURES / W4A16[case])
    expect_model(tool, folder, read_layers(FIXTURES / case), "AwqTorchLinear")


@pytest.mark.parametrize("case", ALL)
def test_gptqmodel_and_transformers_load_gptq(tool: Tool, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "gptq"
    convert(FIXTURES / case, folder, to="gptq", base_model=FIXTURES / ALL[case])
    assert config_of(folder)["checkpoint_format"] == "gptq"
    expect_model(tool, folder, read_layers(FIXTURES / case), "TorchLinear")


@pytest.mark.parametrize("case", ["w4a16_g128_sym_bf16", "w4a16_g128_asym_fp16", "w8a16_pc_asym_fp16"])
def test_gptqmodel_and_transformers_load_gptq_v2(tool: Tool, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "gptq"
    convert(FIXTURES / case, folder, to="gptq:v2", base_model=FIXTURES / ALL[case])
    assert config_of(folder)["checkpoint_format"] == "gptq_v2"
    expect_model(tool, folder, read_layers(FIXTURES / case), "TorchLinear")


def zero_some_offsets(source: Path) -> None:
    """Make the unsigned zero point of three outputs of ZEROED 0 in the first group: weight_offset -8, codes and scales kept."""
    (path,) = source.glob("*.safetensors")
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])[f"{ZEROED}.weight_offset"]
    assert entry["dtype"] == "F32"
    offsets = np.frombuffer(data, "<f4", int(np.prod(entry["shape"])), start + entry["data_offsets"][0]).reshape(entry["shape"])
    offsets[[0, 7, 12], 0] = -8
    path.write_bytes(data)


@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_a_zero_point_of_0_arrives(tool: Tool, tmp_path: Path, target: str) -> None:
    """GPTQ v1 cannot say it: ``--to gptq`` must choose v2 by itself. AWQ stores it as it is."""
    source, folder = tmp_path / "source", tmp_path / "out"
    shutil.copytree(FIXTURES / "w4a16_g128_asym_fp16", source)
    zero_some_offsets(source)
    layers = read_layers(source)
    assert (layers[ZEROED].zeros == 0).sum() == 3
    convert(source, folder, to=target, base_model=FIXTURES / "src_fp16")
    if target == "gptq":
        assert config_of(folder)["checkpoint_format"] == "gptq_v2"
    kernel = {"gptq": "TorchLinear", "awq": "AwqTorchLinear"}[target]
    expect_model(tool, folder, layers, kernel)


@pytest.mark.parametrize("case", ALL)
def test_transformers_loads_dense(tool: Tool, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "dense"
    convert(FIXTURES / case, folder, to="dense", base_model=FIXTURES / ALL[case])
    answer, metadata = tool.answer("gptqmodel_decode.py", folder, tmp_path / "answer.safetensors")
    dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[metadata["dtype"]]
    assert metadata["dtype"] == json.loads((folder / "config.json").read_text("utf-8"))["dtype"]
    expected = read_layers(FIXTURES / case)
    assert set(answer) == parts_of(expected, "weight") | {"lm_head.weight", "generated"}
    for name, layer in expected.items():
        np.testing.assert_array_equal(answer[f"{name}.weight"], law(layer).astype(dtype).astype(np.float32), name)
    assert answer["generated"].shape[1] > NEW_TOKENS


def test_gptqmodel_and_compressed_tensors_pack_the_same_words(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = draw_seed(capsys, f"GPTQModel's and compressed-tensors' packers, {SHAPES} shapes")
    tool.run("gptqmodel_pack.py", tmp_path / "words.safetensors", str(seed), str(SHAPES))
    answer, _ = read_answer(tmp_path / "words.safetensors")
    compared = dict.fromkeys(("block", "cpp", "original", "v1", "awq", "ct"), 0)
    for name in sorted({name.rpartition(".codes")[0] for name in answer if name.endswith(".codes")}):
        bits = int(name.partition(".")[2])
        half = 2 ** (bits - 1)
        codes, zeros = ((answer[f"{name}.{part}"].astype(np.int16) - half).astype(np.int8) for part in ("codes", "zeros"))
        words = {
            **{f"{packer}.qweight": (gptq.codes_layout(bits), codes) for packer in ("block", "cpp", "original")},
            **{f"{packer}.qzeros": (gptq.zeros_layout(bits, "v2"), zeros) for packer in ("block", "cpp", "original")},
            "v1.qzeros": (gptq.zeros_layout(bits, "v1"), zeros),
            "awq.qweight": (awq.GEMM, codes),
            "awq.qzeros": (awq.GEMM, zeros),
            "ct.weight_packed": (PackLayout(bits, "<i4", "in", offset=half, low=-half), codes),
            "ct.weight_zero_point": (PackLayout(bits, "<i4", "out", offset=half, low=-half), zeros),
        }
        for tensor, (layout, canonical) in words.items():
            theirs = answer.get(f"{name}.{tensor}")
            if theirs is None:
                continue
            about = f"{tensor} of shape {name}, WEIGHBRIDGE_SEED={seed}"
            np.testing.assert_array_equal(layout.pack(canonical), theirs, about)
            np.testing.assert_array_equal(layout.unpack(theirs), canonical, about)
            compared[tensor.partition(".")[0]] += 1
    quarter = SHAPES // 4
    assert compared.pop("v1") > quarter  # about half of the shapes have no zero point of 0
    assert compared == {"block": 2 * SHAPES, "cpp": 6 * quarter, "original": 2 * SHAPES, "awq": 2 * quarter, "ct": 2 * SHAPES}
