"""vLLM 0.32.0 runs, on the CPU, what Weighbridge writes as AWQ, GPTQ and compressed-tensors, and says what the float32 model says.

``make oracles`` (or ``nox -s vllm``) installs it and runs this; ``vllm_load.py`` says what is asked and how. The reference is the law's
float32 weights, run by transformers in float64, with inputs rounded as the source's are. GPTQ's zero points and g_idx are not judged here:
vLLM reads neither (tests/oracles/test_gptqmodel.py does it).

W4A16 runs in float16, in which the float model itself is up to 0.03 off in a log-probability. W8A8 runs in float32, without the kernels
for AMX, which ignore static input scales. There vLLM and the reference are equal to 1e-5, until sums in another order round some input
to the next of two steps that it lies between; from that token on they differ by as much as one step does. The reference's own
passes in float32 and float64 do so, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from judge import FIXTURES, Tool, read_answer
from laws import read_by_weighbridge, read_plainly
from raw_msmodelslim import read_safetensors
from safetensors.numpy import load_file, save_file

from convert import convert
from formats import open_checkpoint

pytestmark = pytest.mark.oracle

ROOT = FIXTURES.parent
TINYLM = ROOT / "tinylm"
INPUTS = json.loads((TINYLM / "inputs.json").read_text("utf-8"))
QWEN, LLAMA = "compressed_tensors/src_qwen2_bf16", "compressed_tensors/src_llama_fp16"
NEW_TOKENS = 16
BF16 = np.dtype(ml_dtypes.bfloat16)


class Case(NamedTuple):
    """A folder to convert: under fixtures/, or one that is made here of tinylm. to: the target.

    inputs    how its linears round their inputs; "asymmetric": dynamically, as torch's kernel for 4-bit weights does
    kernel    the class of vLLM's linears' kernel, in part
    """

    source: str
    to: str
    base: str | None = None
    inputs: str | None = None
    kernel: str = ""


WEIGHT_ONLY = {
    "awq_asym": Case("msmodelslim/w4a16_g128_asym_fp16", "awq", "msmodelslim/src_fp16"),
    "awq_tinylm": Case("tinylm_w4a16_asym", "awq"),
    "gptq_sym": Case("msmodelslim/w4a16_g128_sym_bf16", "gptq", "msmodelslim/src_bf16"),
    "gptq_channel": Case("msmodelslim/w4a16_gptq_pc_sym_fp16", "gptq", "msmodelslim/src_fp16"),
    "gptq_tinylm": Case("tinylm_w4a16_sym", "gptq"),
    "ct_sym": Case("msmodelslim/w4a16_ascendv1_g128_sym_bf16", "compressed-tensors", "msmodelslim/src_bf16"),
    "ct_asym": Case("msmodelslim/w4a16_g128_asym_fp16", "compressed-tensors", "msmodelslim/src_fp16"),
    "ct_channel": Case("msmodelslim/w4a16_pc_sym_bf16", "compressed-tensors", "msmodelslim/src_bf16"),
    "ct_of_awq": Case("awq_gptq/awq_gemm_g128_zp", "compressed-tensors"),
    "ct_of_gptq": Case("awq_gptq/gptqmodel_v1_4b_g128_sym", "compressed-tensors"),
    "ct_tinylm": Case("tinylm_w4a16_asym", "compressed-tensors"),
}
WITH_INPUTS = {
    "static": Case("msmodelslim_w8/w8a8_static_bf16", "compressed-tensors", QWEN, "static"),
    "static_tensor": Case("msmodelslim_w8/w8a8_static_tensor_fp16", "compressed-tensors", LLAMA, "static"),
    "static_ascendv1": Case("msmodelslim_w8/w8a8_static_ascendv1_fp16", "compressed-tensors", LLAMA, "static"),
    "static_numpy": Case("msmodelslim_w8/w8a8_numpy_nobias_fp16", "compressed-tensors", LLAMA, "static"),
    "static_v1": Case("msmodelslim_w8/v1_w8a8_static", "compressed-tensors", "msmodelslim/src1l_bf16_tok", "static"),
    "static_sparse": Case("msmodelslim_w8/w8a8s_sparse_fp16", "compressed-tensors", LLAMA, "static"),
    "dynamic": Case("msmodelslim_w8/w8a8_dynamic_bf16", "compressed-tensors", LLAMA, "dynamic"),
    "static_tinylm": Case("tinylm_w8a8", "compressed-tensors", None, "static"),
    "dynamic_tinylm": Case("tinylm_w8a8_dynamic", "compressed-tensors", None, "dynamic"),
}
FOUR_BITS = {
    "w4a8_g32": Case("msmodelslim_w8/w4a8_dynamic_g32_bf16", "compressed-tensors", LLAMA, "asymmetric"),
    "w4a8_g128": Case("msmodelslim_w8/w4a8_dynamic_ascendv1_g128_bf16", "compressed-tensors", QWEN, "asymmetric"),
}
SIMULATED = ("static", "static_tensor", "static_ascendv1")
"""Cases whose source msModelSlim's own simulation was recorded of."""
EQUAL = 1e-4
"""Log-probabilities that differ by less differ by the order of sums alone."""


# tinylm as msModelSlim would have quantized it: round to nearest.


def round_weights(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(int8 codes [out, in], float32 scales, float32 offsets [out, groups]); (code - offset) * scale is the weight."""
    top = 2 ** (bits - 1) - 1
    parts = weight.reshape(weight.shape[0], -1, group)
    if symmetric:
        scales = np.abs(parts).max(axis=2) / np.float32(top)
        offsets = np.zeros_like(scales)
    else:
        low, high = np.minimum(parts.min(axis=2), 0), np.maximum(parts.max(axis=2), 0)
        scales = (high - low) / np.float32(2**bits - 1)
        offsets = -(top + 1) - np.rint(low / scales)
    codes = np.clip(np.rint(parts / scales[..., None] + offsets[..., None]), -top - 1, top)
    return codes.reshape(weight.shape).astype(np.int8), scales, offsets


def w4a16(symmetric: bool) -> Callable[[str, np.ndarray, np.ndarray | None], Iterator[tuple[str, str, np.ndarray]]]:
    def tensors(name: str, weight: np.ndarray, bias: np.ndarray | None) -> Iterator[tuple[str, str, np.ndarray]]:
        codes, scales, offsets = round_weights(weight, 4, 128, symmetric)
        # float16 scales, which every target keeps: what is judged is not the rounding of scales
        yield from (("weight", "W4A16", codes), ("weight_scale", "W4A16", scales.astype(np.float16).astype(np.float32)))
        yield "weight_offset", "W4A16", offsets

    return tensors


def w8a8(name: str, weight: np.ndarray, bias: np.ndarray | None) -> Iterator[tuple[str, str, np.ndarray]]:
    codes, scales, offsets = round_weights(weight, 8, weight.shape[1], symmetric=True)
    scales, (low, high) = scales.astype(BF16), INPUTS["ranges"][name]
    input_scale = np.asarray([(high - low) / 255], BF16)
    input_offset = np.asarray([-128 - np.rint(low / float(input_scale[0]))], BF16)
    deq = (scales[:, 0].astype(BF16) * input_scale).astype(BF16).astype(np.float32)
    steps = 0.0 if bias is None else bias.astype(np.float64) / deq
    quant_bias = np.rint(steps - codes.sum(axis=1, dtype=np.int64) * float(input_offset[0]))
    parts = {"weight": codes, "weight_scale": scales, "weight_offset": offsets.astype(BF16), "input_scale": input_scale}
    parts |= {"input_offset": input_offset, "deq_scale": deq, "quant_bias": quant_bias.astype(np.int32)}
    yield from ((leaf, "W8A8", value) for leaf, value in parts.items())


def w8a8_dynamic(name: str, weight: np.ndarray, bias: np.ndarray | None) -> Iterator[tuple[str, str, np.ndarray]]:
    codes, scales, offsets = round_weights(weight, 8, weight.shape[1], symmetric=True)
    parts = {"weight": codes, "weight_scale": scales.astype(BF16), "weight_offset": offsets.astype(BF16)}
    yield from ((leaf, "W8A8_DYNAMIC", value) for leaf, value in parts.items())


TINYLMS = {"w4a16_sym": w4a16(True), "w4a16_asym": w4a16(False), "w8a8": w8a8, "w8a8_dynamic": w8a8_dynamic}


def quantize_tinylm(folder: Path, kind: str) -> Path:
    """tinylm in msModelSlim's safe_tensor files, quantized by ``TINYLMS[kind]``."""
    folder.mkdir()
    source, tensors, types = load_file(TINYLM / "model.safetensors"), {}, {"model_quant_type": kind.upper()}
    for tensor, value in source.items():
        name, _, leaf = tensor.rpartition(".")
        if leaf != "weight" or name not in INPUTS["ranges"]:
            tensors[tensor], types[tensor] = value, "FLOAT"
            continue
        bias = source.get(f"{name}.bias")
        for part, type_, made in TINYLMS[kind](name, value.astype(np.float32), bias):
            tensors[f"{name}.{part}"], types[f"{name}.{part}"] = np.ascontiguousarray(made), type_
    save_file(tensors, folder / f"quant_model_weight_{kind}.safetensors")
    (folder / f"quant_model_description_{kind}.json").write_text(json.dumps(types), "utf-8")
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((TINYLM / name).read_bytes())
    return folder


# The float32 reference of a source.


def write_reference(source: Path, base: Path | None, folder: Path, narrow: bool = False) -> None:
    """The float32 model of the law's weights. narrow: scales of layers with several groups are rounded to bfloat16."""
    folder.mkdir()
    checkpoint = open_checkpoint(source)
    plain = {name: np.asarray(checkpoint.plain(name).data).astype(np.float32) for name in checkpoint.plain_names}
    laws = (read_plainly if is_plain(source) else read_by_weighbridge)(source)
    for name in checkpoint.layer_names:
        law, bias = laws[name], checkpoint.layer(name).bias
        grouped = narrow and bool((law.scales != law.scales[:, :1]).any())
        scales = law.scales.astype(BF16).astype(np.float32) if grouped else law.scales
        plain[f"{name}.weight"] = scales * law.steps
        if bias is not None:
            plain[f"{name}.bias"] = np.asarray(bias).astype(np.float32)
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    config = json.loads(((base or source) / "config.json").read_text("utf-8"))
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def is_plain(source: Path) -> bool:
    """Whether plain code has all factors of the law."""
    files = list(source.glob("quant_model_weight*.safetensors"))
    return bool(files) and any(name.endswith(".weight_scale") for name in read_safetensors(files[0]))


def rounded_inputs(source: Path, how: str | None) -> dict[str, Any] | None:
    """What the reference is told of each linear's inputs."""
    if how is None:
        return None
    checkpoint = open_checkpoint(source)
    if how != "static":
        return dict.fromkeys(checkpoint.layer_names, {"dynamic": "token", "asymmetric": "asymmetric"}[how])
    found = {}
    for name in checkpoint.layer_names:
        layer = checkpoint.layer(name)
        assert layer.input_scale is not None
        zero = 0.0 if layer.input_zero_point is None else float(layer.input_zero_point.reshape(-1)[0])
        found[name] = [float(layer.input_scale.astype(np.float32).reshape(-1)[0]), zero]
    return found


class Answer(NamedTuple):
    """What vLLM and the reference say; see ``vllm_load.py``."""

    tensors: Mapping[str, np.ndarray]
    kernels: list[str]
    refused: str

    def distances(self) -> np.ndarray:
        """The largest difference of log-probabilities at each position of the prompt."""
        return np.abs(self.tensors["logprobs"] - self.tensors["expected"]).max(axis=1)

    def kl(self) -> float:
        """The mean over positions."""
        said, expected = (self.tensors[name].astype(np.float64) for name in ("logprobs", "expected"))
        return float((np.exp(expected) * (expected - said)).sum(axis=1).mean())

    def __str__(self) -> str:
        distances = self.distances()
        equal = int((distances < EQUAL).argmin()) if (distances >= EQUAL).any() else distances.size
        return f"KL {self.kl():.2g}, furthest {distances.max():.2g}, equal in the first {equal} of {distances.size}: {self.kernels}"


def ask(tool: Tool, root: Path, cases: Mapping[str, Case], dtype: str, amx: bool) -> dict[str, Answer]:
    """Convert every case, and run them all in one process."""
    models = {}
    for name, case in cases.items():
        kind = case.source.removeprefix("tinylm_")
        source = root / case.source if kind in TINYLMS else ROOT / case.source
        if kind in TINYLMS and not source.exists():
            quantize_tinylm(source, kind)
        base = None if case.base is None else ROOT / case.base
        # vLLM's kernel for 4 bits with quantized inputs rounds float32 scales to bfloat16 itself.
        convert(source, root / name, to=case.to, base_model=base, scale_dtype="float32" if name in FOUR_BITS else None)
        write_reference(source, base, root / f"{name}_reference", narrow=case.inputs == "asymmetric")
        prompt = INPUTS["prompt"] if kind in TINYLMS else list(map(int, LOGITS["input_ids"]))
        paths = {"folder": str(root / name), "reference": str(root / f"{name}_reference")}
        models[name] = {**paths, "inputs": rounded_inputs(source, case.inputs), "prompt": prompt}
    job, out = root / f"{dtype}.json", root / f"{dtype}_out"
    job.write_text(json.dumps({"dtype": dtype, "amx": amx, "tokens": NEW_TOKENS, "models": models}), "utf-8")
    out.mkdir()
    tool.run("vllm_load.py", job, out)
    found = {}
    for name in cases:
        tensors, metadata = read_answer(out / f"{name}.safetensors")
        found[name] = Answer(tensors, **{key: json.loads(text) for key, text in metadata.items()})
    return found


LOGITS = load_file(ROOT / "msmodelslim_w8_logits.safetensors")


@pytest.fixture(scope="module")
def weight_only(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    return ask(Tool("vllm"), tmp_path_factory.mktemp("weight_only"), WEIGHT_ONLY, "float16", amx=True)


@pytest.fixture(scope="module")
def with_inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    return ask(Tool("vllm"), tmp_path_factory.mktemp("with_inputs"), WITH_INPUTS | FOUR_BITS, "float32", amx=False)


def expect_agreement(name: str, answer: Answer, capsys: pytest.CaptureFixture[str], kl: float) -> None:
    """vLLM runs the model with the reference's greedy tokens and nearly its log-probabilities. What was measured is printed."""
    assert answer.refused == ""
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: {answer}\n")
    assert np.isfinite(answer.tensors["logprobs"]).all()
    assert answer.kl() < kl, str(answer)
    np.testing.assert_array_equal(answer.tensors["tokens"], answer.tensors["chosen"], str(answer))


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_vllm_runs_four_bit_weights(weight_only: dict[str, Answer], capsys: pytest.CaptureFixture[str], name: str) -> None:
    answer = weight_only[name]
    expect_agreement(name, answer, capsys, kl=5e-5)
    assert answer.distances().max() < 0.06


@pytest.mark.parametrize("name", WITH_INPUTS)
def test_vllm_runs_eight_bit_inputs(with_inputs: dict[str, Answer], capsys: pytest.CaptureFixture[str], name: str) -> None:
    answer = with_inputs[name]
    expect_agreement(name, answer, capsys, kl=1e-3)
    assert answer.kernels == ["CompressedTensorsLinearMethod/CompressedTensorsW8A8Int8/CPUInt8ScaledMMLinearKernel"]
    assert (answer.distances()[:10] < EQUAL).all(), str(answer)
    if WITH_INPUTS[name].inputs == "static" and name != "static_tinylm":  # one layer: no input lies so near the middle of two steps
        assert answer.distances().max() < 1e-3


@pytest.mark.parametrize("name", FOUR_BITS)
def test_vllm_runs_four_bit_weights_with_eight_bit_inputs(
    with_inputs: dict[str, Answer], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """torch's kernel for them rounds the inputs asymmetrically and the scales of groups to bfloat16, and so does the reference."""
    answer = with_inputs[name]
    expect_agreement(name, answer, capsys, kl=1e-3)
    assert answer.kernels == ["CompressedTensorsLinearMethod/CompressedTensorsW4A8Int/Dynamic4bitLinearKernel"]
    assert (answer.distances()[:10] < EQUAL).all(), str(answer)


@pytest.mark.parametrize("name", SIMULATED)
def test_vllm_says_what_msmodelslim_simulated(with_inputs: dict[str, Answer], name: str) -> None:
    """Of the converted folder what the tool that quantized it says of its own model."""
    logits = LOGITS[Path(WITH_INPUTS[name].source).name].astype(np.float64)[:-1]
    simulated = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    answer = Answer({**with_inputs[name].tensors, "expected": simulated}, [], "")
    assert answer.distances().max() < EQUAL, str(answer)
