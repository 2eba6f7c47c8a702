"""AutoGPTQ 0.7.1 decodes what Weighbridge writes to the integers of the msModelSlim source.

``make oracles`` (or ``nox -s autogptq``) installs AutoGPTQ in its own environment and runs this.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judge import FIXTURES, W4A16, W8A16, Tool, expect_integers, expect_logits, expect_weights, parts_of
from raw_msmodelslim import Layer, read_layers

from convert import convert

pytestmark = pytest.mark.oracle

CASES = W4A16 | W8A16


@pytest.fixture(scope="module")
def tool() -> Tool:
    return Tool("autogptq")


def fits_gptq_v1(layers: dict[str, Layer]) -> bool:
    """Whether every zero point is one that v1, which stores it minus one, can hold."""
    return all(layer.zeros.min() >= 1 for layer in layers.values())


@pytest.mark.parametrize("case", CASES)
def test_autogptq_decodes_the_source_integers(tool: Tool, tmp_path: Path, case: str) -> None:
    source, folder = FIXTURES / case, tmp_path / "gptq"
    convert(source, folder, to="gptq", base_model=FIXTURES / CASES[case])

    expected = read_layers(source)
    # AutoGPTQ 0.7.1 cannot read v2. No fixture needs it; test_gptqmodel.py makes one that does.
    assert fits_gptq_v1(expected)
    for path in ("config.json", "quantize_config.json"):
        config = json.loads((folder / path).read_text("utf-8"))
        config = config.get("quantization_config", config)
        assert config["quant_method"] == "gptq", path
        assert config.get("checkpoint_format", "gptq") == "gptq", path

    # --load as well: from_quantized loads the folder and computes logits.
    answer, metadata = tool.answer("autogptq_decode.py", folder, tmp_path / "decoded.safetensors", "--load")
    assert set(answer) == {"input_ids", "logits", "logits_reference"} | parts_of(expected, "codes", "zeros", "weight")
    expect_integers(answer, expected)
    expect_weights(answer, expected)
    assert float(metadata["forward_max_rel"]) < 0.005  # float16 sums
    expect_logits(answer)
