"""AutoAWQ 0.2.9 decodes what Weighbridge writes to the integers of the msModelSlim source.

``make oracles`` (or ``nox -s autoawq``) installs AutoAWQ in its own environment and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from raw_msmodelslim import read_layers
from safetensors import safe_open

from convert import convert

pytestmark = pytest.mark.oracle

VARIABLE = "WEIGHBRIDGE_ORACLE_AUTOAWQ"
DECODE = Path(__file__).with_name("autoawq_decode.py")
FIXTURES = Path(__file__).parents[2] / "fixtures" / "msmodelslim"

CASES = {  # every 4-bit fixture (AutoAWQ holds no other width) -> its base model
    "w4a16_g128_sym_bf16": "src_bf16",
    "w4a16_g128_asym_fp16": "src_fp16",
    "w4a16_awq_m3_g128_sym_bf16": "src_bf16",
    "w4a16_ascendv1_g128_sym_bf16": "src_bf16",
    "w4a16_ascendv1_pc_sym_bf16": "src_bf16",
    "w4a16_pc_sym_bf16": "src_bf16",
    "w4a16_gptq_pc_sym_fp16": "src_fp16",
}


@pytest.fixture(scope="module")
def tool_python() -> str:
    """The interpreter that has AutoAWQ."""
    if python := os.environ.get(VARIABLE):
        return python
    message = f"{VARIABLE} is not set: `make oracles` installs AutoAWQ and runs this test"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.mark.parametrize("case", CASES)
def test_autoawq_decodes_the_source_integers(tool_python: str, tmp_path: Path, case: str) -> None:
    source = FIXTURES / case
    folder, decoded = tmp_path / "awq", tmp_path / "decoded.safetensors"
    convert(source, folder, to="awq", base_model=FIXTURES / CASES[case])

    config = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    assert (config["quant_method"], config["version"]) == ("awq", "gemm")
    assert config["bits"] == 4
    assert config["zero_point"] is True

    run = subprocess.run([tool_python, str(DECODE), str(folder), str(decoded)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    expected = read_layers(source)
    with safe_open(decoded, framework="np") as file:
        assert set(file.keys()) == {f"{name}.{part}" for name in expected for part in ("codes", "zeros", "weight")}
        for name, layer in expected.items():
            zeros = file.get_tensor(f"{name}.zeros")
            repeats, rest = divmod(zeros.shape[0], layer.zeros.shape[0])
            assert rest == 0, name  # one scale per channel may be spelled out for each group
            np.testing.assert_array_equal(file.get_tensor(f"{name}.codes"), layer.codes, name)
            np.testing.assert_array_equal(zeros, layer.zeros.repeat(repeats, axis=0), name)

            # AutoAWQ multiplies in float16, by the scale as float16: so is the expected product.
            group_size = layer.codes.shape[1] // layer.zeros.shape[0]
            steps = layer.codes - layer.zeros.T.repeat(group_size, axis=1)
            scales = layer.scales.astype(np.float16).T.repeat(group_size, axis=1)
            weight = scales * steps.astype(np.float16)
            np.testing.assert_array_equal(file.get_tensor(f"{name}.weight"), weight.astype(np.float32), name)
        assert float(file.metadata()["forward_max_rel"]) < 0.005  # float16 sums
