"""``verify`` finds every kind of difference and forgives only rounding; ``fingerprint`` names the weights, however they are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    MSMODELSLIM,
    Model,
    Tensors,
    change_tensors,
    description_file,
    model,
    read_folder,
    replaced,
    weight_file,
    write_msmodelslim,
)
from typer.testing import CliRunner

from convert.cli import app
from convert.engine import convert
from convert.verification import Verdict, fingerprint, verify
from formats.errors import UnreadableError

LAYER = "model.layers.1.self_attn.q_proj"
NORM = "model.layers.0.input_layernorm.weight"
TARGETS = ("awq", "gptq", "gptq:v2", "dense")
Change = Callable[[Tensors], object]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_msmodelslim(tmp_path / "source", model(symmetric=False))


def cli(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout


def flip_bit(name: str, bit: int) -> Change:
    """Flip one bit of the second word (byte) of a packed tensor."""

    def change(tensors: Tensors) -> None:
        stored = tensors[name]
        flat = stored.reshape(-1).view(np.dtype(f"u{stored.itemsize}"))
        flat[1] ^= flat.dtype.type(1 << bit)

    return change


def multiply(name: str, factor: float) -> Change:
    """Multiply the first element of a float tensor."""

    def change(tensors: Tensors) -> None:
        flat = tensors[name].reshape(-1)
        flat[0] = (flat[:1].astype(np.float32) * np.float32(factor)).astype(flat.dtype)[0]

    return change


def changed(source: Path, target: str, tmp_path: Path, change: Change) -> Verdict:
    """Verify ``source`` against its conversion after ``change``; the command line must agree."""
    out = tmp_path / "out"
    convert(source, out, target)
    assert verify(source, out).same
    change_tensors(weight_file(out), change)
    verdict = verify(source, out)
    code, printed = cli("verify", source, out)
    assert code == (0 if verdict.same else 4)
    assert ("not the same" in printed) != verdict.same
    assert verify(out, source).same == verdict.same
    return verdict


@pytest.mark.parametrize("target", ["awq", "gptq", "gptq:v2"])
@pytest.mark.parametrize("bit", [0, 13, 31])
def test_one_flipped_bit_of_the_codes_is_found(source: Path, target: str, bit: int, tmp_path: Path) -> None:
    verdict = changed(source, target, tmp_path, flip_bit(f"{LAYER}.qweight", bit))
    assert not verdict.same
    (found,) = verdict.different
    assert (found.name, found.codes, found.zero_points) == (f"{LAYER}.weight", "different", "equal")
    assert found.scales != "different"
    assert found.left != found.right
    assert found.detail.startswith("code [")


def test_place_and_values_of_a_changed_code_are_told(tmp_path: Path) -> None:
    made = model()
    codes = made.linears[LAYER].codes.copy()
    codes[70, 33] = 3
    write_msmodelslim(tmp_path / "a", replaced(made, LAYER, codes=codes))
    other = codes.copy()
    other[70, 33] = -5
    write_msmodelslim(tmp_path / "b", replaced(made, LAYER, codes=other))
    (found,) = verify(tmp_path / "a", tmp_path / "b").different
    assert found.detail == "code [70, 33] is 3 on the left and -5 on the right"


@pytest.mark.parametrize("target", ["awq", "gptq", "gptq:v2"])
def test_one_changed_zero_point_is_found(source: Path, target: str, tmp_path: Path) -> None:
    verdict = changed(source, target, tmp_path, flip_bit(f"{LAYER}.qzeros", 4))
    (found,) = verdict.different
    assert not verdict.same
    assert (found.name, found.codes, found.zero_points) == (f"{LAYER}.weight", "equal", "different")
    assert "zero point of output" in found.detail


@pytest.mark.parametrize("target", ["awq", "gptq"])
@pytest.mark.parametrize("factor", [1 + 2**-10, 1.01, 2.0, -1.0])
def test_scale_that_is_off_by_more_than_rounding_is_found(source: Path, target: str, factor: float, tmp_path: Path) -> None:
    """2**-10 is one or two units in float16's last place."""
    verdict = changed(source, target, tmp_path, multiply(f"{LAYER}.scales", factor))
    (found,) = verdict.different
    assert not verdict.same
    assert (found.name, found.codes, found.zero_points, found.scales) == (f"{LAYER}.weight", "equal", "equal", "different")
    assert "scale of output 0, group 0" in found.detail
    assert "more than rounding" in found.detail


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [f"{LAYER}.bias", NORM, "model.embed_tokens.weight", "lm_head.weight"])
def test_changed_plain_tensor_is_found(source: Path, target: str, name: str, tmp_path: Path) -> None:
    verdict = changed(source, target, tmp_path, multiply(name, 1.05))
    (found,) = verdict.different
    assert not verdict.same
    assert found.name == name
    assert "[0, 0]" in found.detail


def test_changed_dense_weight_is_found(source: Path, tmp_path: Path) -> None:
    verdict = changed(source, "dense", tmp_path, multiply(f"{LAYER}.weight", 1.05))
    (found,) = verdict.different
    assert found.name == f"{LAYER}.weight"
    assert "weight [0, 0]" in found.detail


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [NORM, f"{LAYER}.bias", "lm_head.weight"])
def test_missing_tensor_is_found(source: Path, target: str, name: str, tmp_path: Path) -> None:
    verdict = changed(source, target, tmp_path, lambda tensors: tensors.pop(name))
    assert not verdict.same
    assert (verdict.only_left, verdict.only_right, verdict.different) == ([name], [], [])
    assert name in cli("verify", source, tmp_path / "out")[1]


def test_missing_layer_is_found(source: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            del tensors[f"{LAYER}.{part}"]

    verdict = changed(source, "gptq", tmp_path, change)
    assert verdict.only_left == [f"{LAYER}.weight", f"{LAYER}.bias"]


def test_additional_tensor_is_found(source: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.extra.weight"] = np.ones(4, np.float32)

    verdict = changed(source, "awq", tmp_path, change)
    assert not verdict.same
    assert (verdict.only_left, verdict.only_right) == ([], ["model.extra.weight"])


def test_tensor_of_another_shape_is_found(source: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[NORM] = tensors[NORM].reshape(2, -1)

    verdict = changed(source, "awq", tmp_path, change)
    assert not verdict.same
    assert "shape [128] on the left and [2, 64] on the right" in verdict.different[0].detail


@pytest.mark.parametrize("target", TARGETS)
def test_biases_of_zeros_count_as_none(source: Path, target: str, tmp_path: Path) -> None:
    """AutoGPTQ writes one for every layer, whether the model has biases or not."""
    before: list[str] = []

    def change(tensors: Tensors) -> None:
        before.append(fingerprint(tmp_path / "out").digest)
        tensors["model.layers.0.mlp.down_proj.bias"] = np.zeros(128, np.float16)
        tensors["model.layers.0.self_attn.o_proj.bias"] = np.full(128, -0.0, np.float16)

    verdict = changed(source, target, tmp_path, change)
    assert verdict.same
    assert fingerprint(tmp_path / "out").digest == before[0]


def test_bias_that_is_not_quite_zero_counts(source: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        bias = np.zeros(128, np.float16)
        bias[77] = 6e-8
        tensors["model.layers.0.mlp.down_proj.bias"] = bias

    verdict = changed(source, "gptq", tmp_path, change)
    assert verdict.only_right == ["model.layers.0.mlp.down_proj.bias"]


@pytest.mark.parametrize("target", ["awq", "gptq"])
def test_rounding_alone_is_called_rounding(source: Path, target: str, tmp_path: Path) -> None:
    verdict = changed(source, target, tmp_path, lambda tensors: None)
    assert verdict.same
    layers = {name for name in read_folder(tmp_path / "out") if name.endswith(".qweight")}
    assert len([one for one in verdict.rounded if one.name.endswith(".weight")]) == len(layers) == 14
    assert 0 < verdict.bound <= 2**-11
    assert verdict.left.digest != verdict.right.digest
    assert "same but for rounding" in cli("verify", source, tmp_path / "out")[1]


def test_exact_conversion_is_called_the_same(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", "gptq", scale_dtype="keep")
    verdict = verify(source, tmp_path / "out")
    assert verdict.same
    assert not verdict.rounded
    assert verdict.bound == 0
    code, printed = cli("verify", source, tmp_path / "out")
    assert code == 0
    assert printed.startswith("the same: ")
    assert verdict.left.digest in printed


def test_verify_has_the_same_answer_for_every_number_of_workers(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", "awq")
    change_tensors(weight_file(tmp_path / "out"), flip_bit(f"{LAYER}.qweight", 5))
    verdicts = [verify(source, tmp_path / "out", jobs=jobs).to_json() for jobs in (1, 2, 4)]
    assert verdicts[0] == verdicts[1] == verdicts[2]
    assert verdicts[0]["same"] is False


def test_verify_does_not_guess_about_damaged_layers(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", "awq")
    change_tensors(weight_file(tmp_path / "out"), lambda tensors: tensors.pop(f"{LAYER}.qzeros"))
    with pytest.raises(UnreadableError, match=LAYER):
        verify(source, tmp_path / "out")
    assert cli("verify", source, tmp_path / "out")[0] == 5


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_fingerprint_is_first_on_its_line(source: Path) -> None:
    digest = fingerprint(source).digest
    assert len(digest) == 32
    assert set(digest) <= set("0123456789abcdef")
    assert cli("fingerprint", source) == (0, f"{digest}  {source}\n")


@pytest.mark.parametrize("engine", ["numpy", "numba"])
@pytest.mark.parametrize("case", ["w4a16_g128_asym_fp16", "w8a16_pc_asym_fp16", "w4a16_ascendv1_g128_sym_bf16"])
def test_fingerprint_does_not_depend_on_workers_or_engine(case: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHBRIDGE_KERNELS", "numpy")
    wanted = fingerprint(MSMODELSLIM / case, jobs=1)
    monkeypatch.setenv("WEIGHBRIDGE_KERNELS", engine)
    for jobs in (1, 2, 4):
        found = fingerprint(MSMODELSLIM / case, jobs=jobs)
        assert (found.digest, found.tensors) == (wanted.digest, wanted.tensors)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fingerprint_is_the_same_in_every_format_that_is_exact(strategy: str, symmetric: bool, tmp_path: Path) -> None:
    """float16 scales go anywhere unchanged, and dense float32 holds the law."""
    made = model(strategy=strategy, symmetric=symmetric, scale_dtype="F16")
    digests = {"source": fingerprint(write_msmodelslim(tmp_path / "source", made)).digest}
    if strategy != "tensor":
        digests["packed"] = fingerprint(write_msmodelslim(tmp_path / "packed", made, ascendv1=True)).digest
    for target in ("awq", "gptq", "gptq:v2", "dense"):
        convert(tmp_path / "source", tmp_path / target, target, scale_dtype="float32" if target == "dense" else None)
        digests[target] = fingerprint(tmp_path / target).digest
    assert len(set(digests.values())) == 1, digests


def one_ulp(made: Model) -> Model:
    scales = made.linears[LAYER].scales.copy()
    scales[-1, -1] = np.nextafter(scales[-1, -1], np.float32(1))
    return replaced(made, LAYER, scales=scales)


def test_fingerprint_changes_with_the_last_bit_of_one_scale(tmp_path: Path) -> None:
    made = model()
    a, b = (fingerprint(write_msmodelslim(tmp_path / name, one)) for name, one in (("a", made), ("b", one_ulp(made))))
    assert a.digest != b.digest
    assert a.weights != b.weights
    assert a.rest == b.rest
    assert {name for name in a.tensors if a.tensors[name] != b.tensors[name]} == {f"{LAYER}.weight"}


def test_fingerprint_knows_biases_from_weights(tmp_path: Path) -> None:
    write_msmodelslim(tmp_path / "a", model())
    write_msmodelslim(tmp_path / "b", model())
    change_tensors(weight_file(tmp_path / "b"), multiply(f"{LAYER}.bias", 1.5))
    a, b = fingerprint(tmp_path / "a"), fingerprint(tmp_path / "b")
    assert a.weights == b.weights
    assert a.rest != b.rest


def test_fingerprint_takes_a_file_of_the_checkpoint(source: Path) -> None:
    digest = fingerprint(source).digest
    assert fingerprint(weight_file(source)).digest == digest
    assert fingerprint(description_file(source)).digest == digest
