"""AutoAWQ 0.2.9 decodes what Weighbridge writes to the integers of the msModelSlim source, and packs as Weighbridge does.

``make oracles`` (or ``nox -s autoawq``) installs AutoAWQ in its own environment and runs this.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from judge import FIXTURES, W4A16, Tool, draw_seed, expect_integers, expect_weights, parts_of, read_answer
from raw_msmodelslim import read_layers

from convert import convert
from formats import awq

pytestmark = pytest.mark.oracle

SHAPES = 200


@pytest.fixture(scope="module")
def tool() -> Tool:
    return Tool("autoawq")


@pytest.mark.parametrize("case", W4A16)  # AutoAWQ holds no other width
def test_autoawq_decodes_the_source_integers(tool: Tool, tmp_path: Path, case: str) -> None:
    source, folder = FIXTURES / case, tmp_path / "awq"
    convert(source, folder, to="awq", base_model=FIXTURES / W4A16[case])

    config = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    assert (config["quant_method"], config["version"]) == ("awq", "gemm")
    assert config["bits"] == 4
    assert config["zero_point"] is True

    answer, metadata = tool.answer("autoawq_decode.py", folder, tmp_path / "decoded.safetensors")
    expected = read_layers(source)
    assert set(answer) == parts_of(expected, "codes", "zeros", "weight")
    expect_integers(answer, expected)
    expect_weights(answer, expected)
    assert float(metadata["forward_max_rel"]) < 0.005  # float16 sums


def test_autoawq_packs_the_same_words(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = draw_seed(capsys, f"AutoAWQ's packer, {SHAPES} shapes")
    tool.run("autoawq_pack.py", tmp_path / "words.safetensors", str(seed), str(SHAPES))
    answer, _ = read_answer(tmp_path / "words.safetensors")
    assert len(answer) == 4 * SHAPES
    for i in range(SHAPES):
        about = f"shape {i} of WEIGHBRIDGE_SEED={seed}"
        for values, words in (("codes", "qweight"), ("zeros", "qzeros")):
            theirs = answer[f"{i}.{words}"]
            canonical = (answer[f"{i}.{values}"].astype(np.int16) - 8).astype(np.int8)
            np.testing.assert_array_equal(awq.GEMM.pack(canonical), theirs, about)
            np.testing.assert_array_equal(awq.GEMM.unpack(theirs), canonical, about)
