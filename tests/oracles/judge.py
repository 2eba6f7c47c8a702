"""What the oracle tests share: finding a tool's interpreter, running a script with it, comparing what it says.

A tool's script imports nothing of the project and its interpreter has nothing of the project; the expected side is
``raw_msmodelslim``, which shares no code with the project either.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from interpreters import interpreter
from raw_msmodelslim import Layer
from safetensors import safe_open

HERE = Path(__file__).parent
FIXTURES = HERE.parents[1] / "fixtures" / "msmodelslim"

W4A16 = {  # every fixture of the type -> its base model
    "w4a16_g128_sym_bf16": "src_bf16",
    "w4a16_g128_asym_fp16": "src_fp16",
    "w4a16_awq_m3_g128_sym_bf16": "src_bf16",
    "w4a16_ascendv1_g128_sym_bf16": "src_bf16",
    "w4a16_ascendv1_pc_sym_bf16": "src_bf16",
    "w4a16_pc_sym_bf16": "src_bf16",
    "w4a16_gptq_pc_sym_fp16": "src_fp16",
}
W8A16 = {
    "w8a16_g128_sym_bf16": "src_bf16",
    "w8a16_pc_asym_fp16": "src_fp16",
    "v1_w8a16_pc": "src1l_bf16_tok",
}

FLOAT16_NOISE = 0.01
"""The share of the largest value by which float16 sums may move logits; a wrong layer moves them by far more."""


class Tool:
    """A real tool in an environment of its own. Without one, the tests that need it are skipped, or fail where CI is set."""

    def __init__(self, name: str) -> None:
        self.python = interpreter(name)

    def run(self, script: str, *arguments: str | Path) -> str:
        """The standard output of ``script``, which must succeed."""
        command = [self.python, str(HERE / script), *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, f"{script}: exit status {run.returncode}\n{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
        return run.stdout

    def answer(self, script: str, folder: Path, out: Path, *options: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """(tensors, metadata) of the safetensors file ``out`` that ``script`` writes about ``folder``."""
        self.run(script, folder, out, *options)
        return read_answer(out)


def read_answer(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def parts_of(layers: Mapping[str, Layer], *parts: str) -> set[str]:
    return {f"{name}.{part}" for name in layers for part in parts}


def steps(layer: Layer) -> np.ndarray:
    """int16 [out, in]: codes minus zero points."""
    return layer.codes - layer.zeros.T.repeat(group_size(layer), axis=1)


def group_size(layer: Layer) -> int:
    return layer.codes.shape[1] // layer.zeros.shape[0]


def law(layer: Layer) -> np.ndarray:
    """float32 [out, in]: the law's product of the scales as they are stored."""
    return layer.scales.T.repeat(group_size(layer), axis=1) * steps(layer).astype(np.float32)


def half_product(layer: Layer) -> np.ndarray:
    """float32 [out, in]: the law as the tools compute it, a float16 product by the scale as float16."""
    scales = layer.scales.astype(np.float16).T.repeat(group_size(layer), axis=1)
    return (scales * steps(layer).astype(np.float16)).astype(np.float32)


def expect_integers(answer: Mapping[str, np.ndarray], layers: Mapping[str, Layer]) -> None:
    """The codes and zero points that the tool sees are those of the source."""
    for name, layer in layers.items():
        zeros = answer[f"{name}.zeros"]
        repeats, rest = divmod(zeros.shape[0], layer.zeros.shape[0])
        assert rest == 0, name  # one scale per channel may be spelled out for each group
        np.testing.assert_array_equal(answer[f"{name}.codes"], layer.codes, name)
        np.testing.assert_array_equal(zeros, layer.zeros.repeat(repeats, axis=0), name)


def expect_weights(answer: Mapping[str, np.ndarray], layers: Mapping[str, Layer], part: str = "weight") -> None:
    """The weights that the tool computes are the law's float16 products."""
    for name, layer in layers.items():
        np.testing.assert_array_equal(answer[f"{name}.{part}"], half_product(layer), name)


def expect_logits(answer: Mapping[str, np.ndarray], logits: str = "logits", reference: str = "logits_reference") -> None:
    """``logits``, computed in float16, are those of the float32 model with the tool's own weights."""
    assert np.isfinite(answer[logits]).all(), f"{logits}: not finite"
    difference, largest = (float(np.abs(values).max()) for values in (answer[logits] - answer[reference], answer[reference]))
    assert difference < FLOAT16_NOISE * largest, f"{logits}: {difference} from {reference}, whose largest is {largest}"


def draw_seed(capsys: pytest.CaptureFixture[str], what: str) -> int:
    """$WEIGHBRIDGE_SEED, to repeat a run; else a new one. It is printed, whatever pytest captures."""
    own = os.environ.get("WEIGHBRIDGE_SEED")
    seed = int(own) if own else secrets.randbits(32)
    with capsys.disabled():
        sys.stdout.write(f"\n{what}: WEIGHBRIDGE_SEED={seed}\n")
    return seed
