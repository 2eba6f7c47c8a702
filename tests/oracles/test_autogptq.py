"""AutoGPTQ 0.7.1 decodes what Weighbridge writes to the integers of the msModelSlim source.

``make oracles`` (or ``nox -s autogptq``) installs AutoGPTQ in its own environment and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from raw_msmodelslim import Layer, read_layers
from safetensors import safe_open

from convert import convert

pytestmark = pytest.mark.oracle

VARIABLE = "WEIGHBRIDGE_ORACLE_AUTOGPTQ"
DECODE = Path(__file__).with_name("autogptq_decode.py")
FIXTURES = Path(__file__).parents[2] / "fixtures" / "msmodelslim"

CASES = {  # fixture -> its base model
    "w4a16_g128_sym_bf16": "src_bf16",
    "w4a16_g128_asym_fp16": "src_fp16",
    "w4a16_awq_m3_g128_sym_bf16": "src_bf16",
    "w4a16_ascendv1_g128_sym_bf16": "src_bf16",
    "w4a16_ascendv1_pc_sym_bf16": "src_bf16",
    "w4a16_pc_sym_bf16": "src_bf16",
    "w4a16_gptq_pc_sym_fp16": "src_fp16",
    "w8a16_g128_sym_bf16": "src_bf16",
    "w8a16_pc_asym_fp16": "src_fp16",
    "v1_w8a16_pc": "src1l_bf16_tok",
}


@pytest.fixture(scope="module")
def tool_python() -> str:
    """The interpreter that has AutoGPTQ."""
    if python := os.environ.get(VARIABLE):
        return python
    message = f"{VARIABLE} is not set: `make oracles` installs AutoGPTQ and runs this test"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def fits_gptq_v1(layers: dict[str, Layer]) -> bool:
    """Whether every zero point is one that v1, which stores it minus one, can hold."""
    return all(layer.zeros.min() >= 1 for layer in layers.values())


@pytest.mark.parametrize("case", CASES)
def test_autogptq_decodes_the_source_integers(tool_python: str, tmp_path: Path, case: str) -> None:
    source = FIXTURES / case
    folder, decoded = tmp_path / "gptq", tmp_path / "decoded.safetensors"
    convert(source, folder, to="gptq", base_model=FIXTURES / CASES[case])

    expected = read_layers(source)
    # AutoGPTQ 0.7.1 cannot read v2. No fixture needs it; one that did would have to be listed
    # apart, and tested by a tool that reads v2.
    assert fits_gptq_v1(expected)
    for path in ("config.json", "quantize_config.json"):
        config = json.loads((folder / path).read_text("utf-8"))
        config = config.get("quantization_config", config)
        assert config["quant_method"] == "gptq", path
        assert config.get("checkpoint_format", "gptq") == "gptq", path

    # --load as well: from_quantized loads the folder and computes logits.
    run = subprocess.run(
        [tool_python, str(DECODE), str(folder), str(decoded), "--load"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    with safe_open(decoded, framework="np") as file:
        assert set(file.keys()) == {
            "input_ids",
            "logits",
            "logits_reference",
            *(f"{name}.{part}" for name in expected for part in ("codes", "zeros", "weight")),
        }
        for name, layer in expected.items():
            zeros = file.get_tensor(f"{name}.zeros")
            repeats, rest = divmod(zeros.shape[0], layer.zeros.shape[0])
            assert rest == 0, name  # one scale per channel may be spelled out for each group
            np.testing.assert_array_equal(file.get_tensor(f"{name}.codes"), layer.codes, name)
            np.testing.assert_array_equal(zeros, layer.zeros.repeat(repeats, axis=0), name)

            # AutoGPTQ multiplies in float16, by the scale as float16: so is the expected product.
            group_size = layer.codes.shape[1] // layer.zeros.shape[0]
            steps = layer.codes - layer.zeros.T.repeat(group_size, axis=1)
            scales = layer.scales.astype(np.float16).T.repeat(group_size, axis=1)
            weight = scales * steps.astype(np.float16)
            np.testing.assert_array_equal(file.get_tensor(f"{name}.weight"), weight.astype(np.float32), name)
        assert float(file.metadata()["forward_max_rel"]) < 0.005  # float16 sums
        logits, reference = file.get_tensor("logits"), file.get_tensor("logits_reference")
    assert np.isfinite(logits).all()
    # float16 throughout against float32; a wrong layer moves the logits by far more.
    assert np.abs(logits - reference).max() < 0.01 * np.abs(reference).max()
