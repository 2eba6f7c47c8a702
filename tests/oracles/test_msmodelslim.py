"""msModelSlim 26.1.0 validates and reads what Weighbridge writes in its format, and packs as Weighbridge does.

``make oracles`` (or ``nox -s msmodelslim``) installs msModelSlim in its own environment and runs this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from judge import FIXTURES, W4A16, W8A16, Tool, law, parts_of
from raw_msmodelslim import Layer, read_layers, read_safetensors

from convert import convert

pytestmark = pytest.mark.oracle

ALL = W4A16 | W8A16


@pytest.fixture(scope="module")
def tool() -> Tool:
    return Tool("msmodelslim")


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    (path,) = folder.glob("quant_model_weight*.safetensors")
    return read_safetensors(path)


def expect_folders(tool: Tool, source: Path, base: Path, layers: Mapping[str, Layer], tmp_path: Path) -> None:
    """Both generations, made of ``source``, pass the validator; the tool reads ``layers`` and packs them as we did."""
    plain, packed = tmp_path / "safe_tensor", tmp_path / "ascendv1"
    convert(source, plain, to="msmodelslim:safe_tensor", base_model=base)
    convert(source, packed, to="msmodelslim:ascendv1", base_model=base)

    answer, _ = tool.answer("msmodelslim_check.py", plain, tmp_path / "plain.safetensors")
    tensors = tensors_of(plain)
    assert int(answer.pop("checked")) == len(tensors)
    four_bits = {name: layer for name, layer in layers.items() if layer.bits == 4}
    assert set(answer) == parts_of(layers, "weight") | parts_of(four_bits, "packed")
    for name, layer in layers.items():
        # The tool multiplies in the dtype of the scales, once: the integers before it are exact.
        dtype = tensors[f"{name}.weight_scale"].dtype
        np.testing.assert_array_equal(answer[f"{name}.weight"], law(layer).astype(dtype).astype(np.float32), name)

    again, _ = tool.answer("msmodelslim_check.py", packed, tmp_path / "packed.safetensors")
    stored = tensors_of(packed)
    assert int(again.pop("checked")) == len(stored)
    assert not again  # the tool's reader does not unpack
    for name in four_bits:
        np.testing.assert_array_equal(stored[f"{name}.weight"], answer[f"{name}.packed"], name)


@pytest.mark.parametrize("case", ALL)
def test_msmodelslim_reads_its_own_files_that_we_wrote_again(tool: Tool, tmp_path: Path, case: str) -> None:
    source = FIXTURES / case
    expect_folders(tool, source, FIXTURES / ALL[case], read_layers(source), tmp_path)


@pytest.mark.parametrize(
    ("through", "case"),
    [
        ("awq", "w4a16_g128_sym_bf16"),
        ("awq", "w4a16_g128_asym_fp16"),
        ("awq", "w4a16_gptq_pc_sym_fp16"),
        ("gptq", "w4a16_g128_asym_fp16"),
        ("gptq", "w4a16_pc_sym_bf16"),
        ("gptq", "w8a16_pc_asym_fp16"),
    ],
)
def test_msmodelslim_reads_what_came_from_gptq_and_awq(tool: Tool, tmp_path: Path, through: str, case: str) -> None:
    base = FIXTURES / ALL[case]
    convert(FIXTURES / case, tmp_path / through, to=through, base_model=base, scale_dtype="keep")
    layers = read_layers(FIXTURES / case)
    config = json.loads((tmp_path / through / "config.json").read_text("utf-8"))
    assert config["quantization_config"]["quant_method"] == through
    expect_folders(tool, tmp_path / through, base, layers, tmp_path)


def test_the_validator_refuses_a_tensor_without_a_description(tool: Tool, tmp_path: Path) -> None:
    """The judge can say no."""
    folder = tmp_path / "folder"
    convert(FIXTURES / "w4a16_g128_sym_bf16", folder, to="msmodelslim", base_model=FIXTURES / "src_bf16")
    (path,) = folder.glob("quant_model_description*.json")
    description = json.loads(path.read_text("utf-8"))
    del description["model.norm.weight"]
    path.chmod(0o600)
    path.write_text(json.dumps(description), "utf-8")
    with pytest.raises(AssertionError, match="do not match"):
        tool.run("msmodelslim_check.py", folder, tmp_path / "out.safetensors")
