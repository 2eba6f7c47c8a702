"""Conversions of goldens and of synthetic folders, decoded again by code that shares nothing with the project."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    CONFIG,
    DTYPES,
    GOLDENS,
    HIDDEN,
    MSMODELSLIM,
    NAMES,
    SHAPES,
    Array,
    Decoded,
    Linear,
    Tensors,
    change_json,
    decode_awq,
    decode_gptq,
    linear,
    model,
    read_folder,
    read_raw,
    replaced,
    roll_back,
    weight_file,
    write_msmodelslim,
)
from oracles.raw_msmodelslim import Layer, read_layers

from convert.engine import Result, convert
from convert.planning import plan
from convert.verification import fingerprint, verify
from formats.errors import RefusedError, UsageError

FOUR_BITS = [case for case, golden in GOLDENS.items() if golden.bits == 4]
EIGHT_BITS = [case for case, golden in GOLDENS.items() if golden.bits == 8]
WRITABLE = [(case, target) for case in GOLDENS for target in ("awq", "gptq") if not (target == "awq" and GOLDENS[case].bits == 8)]

AWQ_KEYS = {"quant_method", "bits", "group_size", "version", "zero_point", "modules_to_not_convert"}
GPTQ_KEYS = {
    "quant_method", "bits", "group_size", "desc_act", "sym", "static_groups", "true_sequential", "damp_percent", "checkpoint_format",
}  # fmt: skip


def base_of(case: str) -> Path:
    return MSMODELSLIM / GOLDENS[case].base


def converted(case: str, target: str, folder: Path, **options: Any) -> Result:
    return convert(MSMODELSLIM / case, folder, target, base_model=base_of(case), **options)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    assert all(path.is_file() for path in folder.iterdir())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    content = json.loads((folder / name).read_text("utf-8"))
    assert isinstance(content, dict)
    return content


def in_float16(array: Array) -> Array:
    """Rounded to nearest, ties to even, by way of float32, which holds every source dtype."""
    return array.astype(np.float32).astype(np.float16)


def assert_layer(found: Decoded, wanted: Layer, scales: Array, name: str) -> None:
    """Equal codes, and zero points and ``scales`` [groups, out] as often as the target's groups need."""
    repeats, rest = divmod(found.zeros.shape[1], wanted.zeros.shape[0])
    assert rest == 0, name
    np.testing.assert_array_equal(found.codes, wanted.codes, name)
    np.testing.assert_array_equal(found.zeros, wanted.zeros.T.repeat(repeats, axis=1), name)
    np.testing.assert_array_equal(found.scales, scales.T.repeat(repeats, axis=1), name, strict=True)


def is_subset(plain: Tensors, tensors: Tensors) -> bool:
    return all(name in tensors and same_tensor(tensors[name], array) for name, array in plain.items())


def same_tensor(a: Array, b: Array) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


# --- goldens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "target"), WRITABLE)
def test_golden_converts_to_the_same_integers(case: str, target: str, tmp_path: Path) -> None:
    golden, source, out = GOLDENS[case], MSMODELSLIM / case, tmp_path / "out"
    converted(case, target, out)
    stored, tensors, layers = read_folder(source), read_folder(out), read_layers(source)
    decode = decode_awq if target == "awq" else lambda tensors, name: decode_gptq(tensors, name, golden.bits)
    for name, wanted in layers.items():
        found = decode(tensors, name)
        assert_layer(found, wanted, in_float16(wanted.scales), name)
        inputs = wanted.codes.shape[1]
        size = golden.group or (128 if target == "awq" else inputs)
        np.testing.assert_array_equal(found.g_idx, np.arange(inputs) // size, name)
        assert (f"{name}.bias" in tensors) == (f"{name}.bias" in stored)
        if f"{name}.bias" in stored:
            np.testing.assert_array_equal(tensors[f"{name}.bias"], in_float16(stored[f"{name}.bias"]), name, strict=True)

    # Everything else is the float model's other tensors, byte for byte as the source has them.
    base = read_folder(base_of(case))
    plain = {name: stored[name] for name in base if name.rpartition(".")[0] not in layers}
    assert is_subset(plain, tensors)
    parts = ("qweight", "qzeros", "scales") + (("g_idx",) if target == "gptq" else ())
    own = {f"{name}.{part}" for name in layers for part in parts} | {f"{name}.bias" for name in layers if f"{name}.bias" in stored}
    assert set(tensors) == own | set(plain)


@pytest.mark.parametrize(("case", "target"), WRITABLE)
def test_converted_golden_verifies_from_the_folders_alone(case: str, target: str, tmp_path: Path) -> None:
    result = converted(case, target, tmp_path / "out")
    (tmp_path / "out" / "weighbridge.json").unlink()
    verdict = verify(MSMODELSLIM / case, tmp_path / "out")
    assert verdict.same
    rounds = any(not np.array_equal(in_float16(layer.scales), layer.scales) for layer in read_layers(MSMODELSLIM / case).values())
    assert any(one.name.endswith(".weight") for one in verdict.rounded) == rounds
    assert verdict.bound <= 2**-11  # half a unit in the last place of float16
    assert result.source_fingerprint is not None
    assert result.target_fingerprint is not None
    assert (verdict.left.digest, verdict.right.digest) == (result.source_fingerprint.digest, result.target_fingerprint.digest)
    assert (verdict.left.digest == verdict.right.digest) == (not verdict.rounded) == result.exact


@pytest.mark.parametrize("case", FOUR_BITS)
def test_awq_and_gptq_of_one_golden_are_the_same_weights_exactly(case: str, tmp_path: Path) -> None:
    for target in ("awq", "gptq"):
        converted(case, target, tmp_path / target)
    verdict = verify(tmp_path / "awq", tmp_path / "gptq")
    assert verdict.same
    assert not verdict.rounded
    assert verdict.left.digest == verdict.right.digest == fingerprint(tmp_path / "gptq").digest


@pytest.mark.parametrize("case", FOUR_BITS)
def test_converted_golden_converts_back_and_forth_without_change(case: str, tmp_path: Path) -> None:
    converted(case, "awq", tmp_path / "awq")
    there = convert(tmp_path / "awq", tmp_path / "gptq", "gptq")
    back = convert(tmp_path / "gptq", tmp_path / "back", "awq")
    assert there.exact
    assert back.exact
    names = (f"{name}.{part}" for name in read_layers(MSMODELSLIM / case) for part in ("qweight", "qzeros", "scales"))
    before, after = read_folder(tmp_path / "awq"), read_folder(tmp_path / "back")
    assert all(same_tensor(before[name], after[name]) for name in names)
    assert set(before) == set(after)


@pytest.mark.parametrize("case", EIGHT_BITS)
def test_eight_bits_to_awq_are_refused(case: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"^model\.layers\.0\..*8 bits") as caught:
        converted(case, "awq", tmp_path / "out")
    assert len(caught.value.refusals) == len(read_layers(MSMODELSLIM / case))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["awq", "gptq", "dense"])
def test_what_quantizes_inputs_is_not_dropped_unasked(target: str, tmp_path: Path) -> None:
    source = MSMODELSLIM / "w8a8_mix_cfg_fp16"
    with pytest.raises(RefusedError) as caught:
        convert(source, tmp_path / "out", target)
    (dropped,) = [refusal for refusal in caught.value.refusals if getattr(refusal, "code", "") == "activations-dropped"]
    assert "will be computed in float (in 10 places)" in str(dropped)
    assert "--allow activations-dropped" in str(dropped)
    assert list(tmp_path.iterdir()) == []
    allowed = plan(source, target, allow=["activations-dropped"])
    assert "activations-dropped" not in {refusal.code for refusal in allowed.refusals}
    assert next(loss for loss in allowed.losses if loss.code == "activations-dropped").layers == 10


def test_what_quantizes_inputs_is_dropped_when_asked(tmp_path: Path) -> None:
    """The weights stay whole, and the certificate names what was lost."""
    source = MSMODELSLIM / "w8a8_mix_cfg_fp16"
    result = convert(source, tmp_path / "out", "dense", allow=["activations-dropped"], scale_dtype="float32")
    assert result.exact
    certificate = json.loads((tmp_path / "out" / "weighbridge.json").read_text("utf-8"))
    assert {loss["code"]: loss["layers"] for loss in certificate["losses"]} == {"activations-dropped": 10}
    tensors, stored = read_folder(tmp_path / "out"), read_folder(source)
    layers = [name.removesuffix(".weight") for name, array in stored.items() if array.dtype == np.int8]
    assert len(layers) == 12
    for name in layers:
        codes, scales, offsets = (stored[f"{name}.{part}"].astype(np.float32) for part in ("weight", "weight_scale", "weight_offset"))
        np.testing.assert_array_equal(tensors[f"{name}.weight"], (codes - offsets) * scales, name, strict=True)
    assert not [name for name in tensors if name.endswith(("input_scale", "input_offset", "deq_scale", "quant_bias"))]


@pytest.mark.parametrize("case", GOLDENS)
def test_dense_in_float32_is_the_law_bit_for_bit(case: str, tmp_path: Path) -> None:
    source = MSMODELSLIM / case
    result = converted(case, "dense", tmp_path / "out", scale_dtype="float32")
    tensors = read_folder(tmp_path / "out")
    for name, layer in read_layers(source).items():
        size = layer.codes.shape[1] // layer.zeros.shape[0]
        steps = (layer.codes - layer.zeros.T.repeat(size, axis=1)).astype(np.float32)
        wanted = steps * layer.scales.T.repeat(size, axis=1)
        np.testing.assert_array_equal(tensors[f"{name}.weight"], wanted, name, strict=True)
    assert result.exact
    assert fingerprint(source).digest == fingerprint(tmp_path / "out").digest
    assert set(tensors) == set(read_folder(base_of(case)))


@pytest.mark.parametrize("case", GOLDENS)
def test_dense_by_default_has_the_models_dtype(case: str, tmp_path: Path) -> None:
    converted(case, "dense", tmp_path / "out")
    base, tensors = read_folder(base_of(case)), read_folder(tmp_path / "out")
    for name, layer in read_layers(MSMODELSLIM / case).items():
        size = layer.codes.shape[1] // layer.zeros.shape[0]
        law = (layer.codes - layer.zeros.T.repeat(size, axis=1)).astype(np.float32) * layer.scales.T.repeat(size, axis=1)
        np.testing.assert_array_equal(tensors[f"{name}.weight"], law.astype(base[f"{name}.weight"].dtype), name, strict=True)
    verdict = verify(MSMODELSLIM / case, tmp_path / "out")
    assert verdict.same
    config = read_config(tmp_path / "out")
    assert "quantization_config" not in config
    assert config.get("torch_dtype", config.get("dtype")) == {"F16": "float16", "BF16": "bfloat16"}[NAMES[base["lm_head.weight"].dtype]]


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FOUR_BITS)
def test_awq_config_has_what_its_readers_demand(case: str, tmp_path: Path) -> None:
    converted(case, "awq", tmp_path / "out")
    config = read_config(tmp_path / "out")
    quantization = config["quantization_config"]
    assert set(quantization) >= AWQ_KEYS
    assert {key: quantization[key] for key in AWQ_KEYS} == {
        "quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True, "modules_to_not_convert": None,
    }  # fmt: skip
    assert config.get("torch_dtype", config.get("dtype")) == "float16"
    for key, value in read_config(base_of(case)).items():
        assert key in {"dtype", "torch_dtype"} or config[key] == value


@pytest.mark.parametrize("case", GOLDENS)
def test_gptq_config_has_what_its_readers_demand(case: str, tmp_path: Path) -> None:
    golden = GOLDENS[case]
    converted(case, "gptq", tmp_path / "out")
    config = read_config(tmp_path / "out")
    quantization = config["quantization_config"]
    assert quantization == read_config(tmp_path / "out", "quantize_config.json")
    wanted = {
        "quant_method": "gptq", "bits": golden.bits, "group_size": golden.group or -1, "desc_act": False, "sym": golden.symmetric,
        "static_groups": False, "checkpoint_format": "gptq",
    }  # fmt: skip
    assert set(quantization) >= GPTQ_KEYS
    assert {key: quantization[key] for key in wanted} == wanted
    # GPTQModel refuses the first; the others would say that a layer was left in float.
    assert not {"is_marlin_format", "dynamic", "modules_in_block_to_quantize"} & set(quantization)
    assert config.get("torch_dtype", config.get("dtype")) == "float16"
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("target", ["awq", "gptq", "dense"])
def test_folder_holds_what_a_loader_needs_and_nothing_else(target: str, tmp_path: Path) -> None:
    case = "v1_w8a16_pc" if target != "awq" else "w4a16_pc_sym_bf16"
    base = MSMODELSLIM / "src1l_bf16_tok"
    result = convert(MSMODELSLIM / case, tmp_path / "out", target, base_model=base)
    assert result.missing == []
    written = {path.name for path in (tmp_path / "out").iterdir()}
    carried = {path.name for path in base.iterdir()} - {"model.safetensors", "config.json"}
    own = {"config.json", "model.safetensors", "weighbridge.json", "README.md"}
    assert written == own | carried | ({"quantize_config.json"} if target == "gptq" else set())
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_config_beside_the_source_serves_without_a_base_model(golden_copy: Any, tmp_path: Path) -> None:
    source = golden_copy("w4a16_g128_sym_bf16")
    convert(source, tmp_path / "out", "awq")
    config = read_config(tmp_path / "out")
    assert config["model_type"] == "qwen2"
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


@pytest.mark.parametrize(("target", "method"), [("awq", "awq"), ("gptq", "gptq"), ("dense", None)])
def test_stale_quantization_config_of_the_base_is_dropped(target: str, method: str | None, tmp_path: Path) -> None:
    stale = {**CONFIG, "quantize": "w8a8", "quantization_config": {"quant_method": "fp8", "group_size": 7, "stale": True}}
    source = write_msmodelslim(tmp_path / "source", model(), config=None)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(stale), "utf-8")
    convert(source, tmp_path / "out", target, base_model=tmp_path / "base")
    config = read_config(tmp_path / "out")
    assert "quantize" not in config
    assert config.get("quantization_config", {}).get("quant_method") == method
    assert "stale" not in json.dumps(config)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_config_says_the_dtype_of_the_scales(key: str, tmp_path: Path) -> None:
    config = {name: value for name, value in CONFIG.items() if name != "torch_dtype"} | {key: "bfloat16"}
    source = write_msmodelslim(tmp_path / "source", model(), config=config)
    convert(source, tmp_path / "out", "awq")
    assert {name: value for name, value in read_config(tmp_path / "out").items() if name in {"torch_dtype", "dtype"}} == {
        "torch_dtype": "float16",  # what transformers 4, AutoAWQ and AutoGPTQ read
        key: "float16",
    }


def test_one_shard_has_no_index_and_metadata_says_pt(tmp_path: Path) -> None:
    converted("w4a16_g128_sym_bf16", "gptq", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.index.json"))
    header, _ = read_raw(tmp_path / "out" / "model.safetensors")
    assert header["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("target", ["awq", "gptq", "dense"])
def test_small_shards_have_a_true_index(target: str, tmp_path: Path) -> None:
    limit = 300_000
    one = converted("w4a16_g128_sym_bf16", target, tmp_path / "one")
    several = converted("w4a16_g128_sym_bf16", target, tmp_path / "several", max_shard_size=limit)
    shards = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(shards) > 3
    assert [path.name for path in shards] == [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    index = read_config(tmp_path / "several", "model.safetensors.index.json")
    total, weight_map = 0, {}
    for path in shards:
        header, data = read_raw(path)
        assert header.pop("__metadata__") == {"format": "pt"}
        assert len(data) <= limit or len(header) == 1
        total += len(data)
        weight_map.update(dict.fromkeys(header, path.name))
    assert index == {"metadata": {"total_size": total}, "weight_map": weight_map}
    tensors = read_folder(tmp_path / "one")
    assert is_subset(tensors, read_folder(tmp_path / "several"))
    assert len(tensors) == len(weight_map)
    assert fingerprint(tmp_path / "several").digest == fingerprint(tmp_path / "one").digest
    assert one.target_fingerprint is not None
    assert several.target_fingerprint is not None
    assert one.target_fingerprint.digest == several.target_fingerprint.digest


def test_sharded_source_converts_like_a_single_file(tmp_path: Path) -> None:
    made = model()
    write_msmodelslim(tmp_path / "one", made)
    write_msmodelslim(tmp_path / "several", made, shards=3)
    for name in ("one", "several"):
        convert(tmp_path / name, tmp_path / f"{name}-out", "gptq")
    one, several = read_folder(tmp_path / "one-out"), read_folder(tmp_path / "several-out")
    assert set(one) == set(several)
    assert is_subset(one, several)


def test_model_card_has_the_hubs_front_matter(tmp_path: Path) -> None:
    converted("w4a16_g128_sym_bf16", "awq", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match is not None
    lines = match[1].splitlines()
    assert "base_model: src_bf16" in lines
    assert "base_model_relation: quantized" in lines
    assert {"- awq", "- weighbridge"} <= set(lines)


def test_certificate_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    """Another place, another time, other workers: the same bytes."""
    documents = []
    for number, name in enumerate(("here", "a much longer way/there")):
        folder = tmp_path / name
        source = write_msmodelslim(folder / "source", model())
        os.utime(weight_file(source), (1_600_000_000 + number, 1_600_000_000 + number))
        convert(source, folder / "out", "gptq", jobs=number + 1)
        documents.append((folder / "out" / "weighbridge.json").read_text("utf-8"))
    assert documents[0] == documents[1]
    assert str(tmp_path) not in documents[0]
    assert not re.search(r"\d{4}-\d\d-\d\d|160000000", documents[0])
    document = json.loads(documents[0])
    assert document["proved"] is True
    assert document["target"]["format"] == "gptq:v1"


def test_certificate_holds_the_digests_that_verify_finds(tmp_path: Path) -> None:
    converted("w4a16_g128_sym_bf16", "awq", tmp_path / "out")
    document = read_config(tmp_path / "out", "weighbridge.json")
    source, target = fingerprint(MSMODELSLIM / "w4a16_g128_sym_bf16"), fingerprint(tmp_path / "out")
    assert document["fingerprint"]["source"]["total"] == source.digest
    assert document["fingerprint"]["target"]["total"] == target.digest
    assert {name: one["digest"] for name, one in document["tensors"].items()} == {name: one for name, (_, one) in target.tensors.items()}
    rounded = {name for name, one in document["tensors"].items() if "rounded" in one}
    assert rounded == {f"{name}.weight" for name in read_layers(MSMODELSLIM / "w4a16_g128_sym_bf16")}
    assert document["exact"] is False


def test_without_proof_the_certificate_claims_none(tmp_path: Path) -> None:
    proved = converted("w4a16_pc_sym_bf16", "awq", tmp_path / "proved")
    trusted = converted("w4a16_pc_sym_bf16", "awq", tmp_path / "trusted", proof=False)
    document = read_config(tmp_path / "trusted", "weighbridge.json")
    assert document["proved"] is False
    assert "fingerprint" not in document
    assert proved.to_json()["proved"] is True
    assert trusted.to_json()["proved"] is trusted.exact is False
    assert (tmp_path / "trusted" / "model.safetensors").read_bytes() == (tmp_path / "proved" / "model.safetensors").read_bytes()


# --- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["awq", "gptq", "dense"])
@pytest.mark.parametrize("case", ["w4a16_g128_asym_fp16", "w4a16_ascendv1_g128_sym_bf16", "w8a16_pc_asym_fp16"])
def test_bytes_do_not_depend_on_workers_or_engine(case: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if target == "awq" and GOLDENS[case].bits == 8:
        target = "gptq:v2"
    found = []
    for engine in ("numpy", "numba"):
        monkeypatch.setenv("WEIGHBRIDGE_KERNELS", engine)
        for jobs in (1, 2, 4):
            out = tmp_path / f"{engine}-{jobs}"
            converted(case, target, out, jobs=jobs)
            found.append(folder_bytes(out))
    assert all(one == found[0] for one in found[1:])


def test_source_is_never_written(golden_copy: Any, tmp_path: Path) -> None:
    source = golden_copy("w4a16_g128_sym_bf16")
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size, path.read_bytes()) for path in source.iterdir()}
    for target in ("awq", "gptq", "dense"):
        convert(source, tmp_path / target, target)
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size, path.read_bytes()) for path in source.iterdir()} == before


def test_read_only_sources_give_writable_results(golden_copy: Any, tmp_path: Path) -> None:
    """The tool writes weights with mode 0400, which a copy of the source's mode would keep."""
    source = golden_copy("w4a16_g128_sym_bf16")
    for path in source.iterdir():
        path.chmod(0o400)
    source.chmod(0o500)
    try:
        convert(source, tmp_path / "out", "awq")
    finally:
        source.chmod(0o700)
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


# --- every scheme -----------------------------------------------------------------------------------------------------

SCHEMES = [
    (bits, strategy, symmetric, dtype, packed)
    for bits in (4, 8)
    for strategy in ("tensor", "channel", "group")
    for symmetric in (True, False)
    for dtype in ("F32", "BF16", "F16")
    for packed in (False, True)
    if not (packed and (bits == 8 or strategy == "tensor"))
]


def assert_decoded(found: Decoded, wanted: Linear, scale_dtype: str, name: str) -> None:
    half = 1 << (wanted.bits - 1)
    np.testing.assert_array_equal(found.codes, wanted.codes.astype(np.int16) + half, name)
    np.testing.assert_array_equal(found.zeros[:, found.g_idx], wanted.spread(wanted.offsets) + half, name)
    assert found.scales.dtype == DTYPES[scale_dtype]
    scales = wanted.scales.astype(np.float32).astype(DTYPES[scale_dtype])
    np.testing.assert_array_equal(found.scales[:, found.g_idx].astype(np.float32), wanted.spread(scales), name)
    np.testing.assert_array_equal(found.weights(), wanted.weights(scale_dtype), name)


@pytest.mark.parametrize(("bits", "strategy", "symmetric", "dtype", "packed"), SCHEMES)
def test_every_scheme_keeps_its_integers(bits: int, strategy: str, symmetric: bool, dtype: str, packed: bool, tmp_path: Path) -> None:
    made = model(blocks=1, bits=bits, strategy=strategy, symmetric=symmetric, scale_dtype=dtype)
    source = write_msmodelslim(tmp_path / "source", made, ascendv1=packed)
    targets = ("gptq", "dense") if bits == 8 else ("awq", "gptq", "dense")
    for target in targets:
        convert(source, tmp_path / target, target, scale_dtype="float32" if target == "dense" else None)
        tensors = read_folder(tmp_path / target)
        for name, wanted in made.linears.items():
            if target == "dense":
                np.testing.assert_array_equal(tensors[f"{name}.weight"], wanted.weights(), name, strict=True)
            else:
                found = decode_awq(tensors, name) if target == "awq" else decode_gptq(tensors, name, bits)
                assert_decoded(found, wanted, "F16", name)
        assert is_subset(made.plain, tensors)
        verdict = verify(source, tmp_path / target)
        assert verdict.same
        exact = target == "dense" or dtype != "F32"
        assert any(one.name.endswith(".weight") for one in verdict.rounded) != exact
    assert fingerprint(source).digest == fingerprint(tmp_path / "dense").digest


@pytest.mark.parametrize(
    ("option", "stored", "wanted"),
    [
        ("keep", "F32", "F32"),
        ("keep", "BF16", "BF16"),
        ("keep", "F16", "F16"),
        ("float16", "BF16", "F16"),
        ("bfloat16", "F32", "BF16"),
        ("bfloat16", "F16", "BF16"),
        ("float32", "BF16", "F32"),
        (None, "F32", "F16"),
    ],
)
@pytest.mark.parametrize("target", ["awq", "gptq"])
def test_scale_dtype_option(target: str, option: str | None, stored: str, wanted: str, tmp_path: Path) -> None:
    made = model(blocks=1, scale_dtype=stored, strategy="channel" if stored != "F32" else "group")
    source = write_msmodelslim(tmp_path / "source", made)
    result = convert(source, tmp_path / "out", target, scale_dtype=option)
    tensors = read_folder(tmp_path / "out")
    for name, one in made.linears.items():
        assert_decoded(decode_awq(tensors, name) if target == "awq" else decode_gptq(tensors, name, 4), one, wanted, name)
    widened = stored == wanted or wanted == "F32" or (stored, wanted) == ("BF16", "F16")
    assert any(one.name.endswith(".weight") for one in result.rounded) != widened
    torch_dtype = {"F16": "float16", "BF16": "bfloat16", "F32": CONFIG["torch_dtype"]}[wanted]
    assert read_config(tmp_path / "out")["torch_dtype"] == torch_dtype


def test_rounding_of_scales_is_to_nearest_even(tmp_path: Path) -> None:
    """float32 values halfway between two float16 ones, and just beside halfway."""
    half_step = np.float32(2**-11)
    scales = np.ones((128, 1), np.float32)
    scales[:4, 0] = [1 + half_step, 1 + 3 * half_step, 1 + half_step + np.float32(2**-23), 1 + 3 * half_step - np.float32(2**-22)]
    name = "model.layers.0.self_attn.o_proj"
    made = replaced(model(blocks=1, strategy="channel"), name, scales=scales)
    convert(write_msmodelslim(tmp_path / "source", made), tmp_path / "out", "gptq")
    found = read_folder(tmp_path / "out")[f"{name}.scales"][0, :4].astype(np.float64)
    np.testing.assert_array_equal(found, [1, 1 + 4 * 2**-11, 1 + 2 * 2**-11, 1 + 2 * 2**-11])


# --- zero points, losses, refusals ------------------------------------------------------------------------------------

DOWN = "model.layers.1.mlp.down_proj"


def with_lowest_offset(bits: int, strategy: str = "group") -> tuple[Any, Array]:
    """A model with one zero point of 0 among all others, and its offsets."""
    made = model(bits=bits, strategy=strategy, symmetric=False)
    offsets = made.linears[DOWN].offsets.copy()
    offsets[3, 0] = -(1 << (bits - 1))
    return replaced(made, DOWN, offsets=offsets), offsets


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_point_of_zero_is_written_as_v2(bits: int, tmp_path: Path) -> None:
    made, _ = with_lowest_offset(bits)
    source = write_msmodelslim(tmp_path / "source", made)
    result = convert(source, tmp_path / "out", "gptq")
    assert result.plan.target_name == "gptq:v2"
    assert any("gptq:v2" in note and DOWN in note for note in result.plan.notes)
    quantization = read_config(tmp_path / "out")["quantization_config"]
    assert quantization["checkpoint_format"] == "gptq_v2"
    assert quantization["sym"] is False
    tensors = read_folder(tmp_path / "out")
    for name, one in made.linears.items():
        assert_decoded(decode_gptq(tensors, name, bits, "v2"), one, "F16", name)
    assert verify(source, tmp_path / "out").same


def test_zero_point_of_zero_is_refused_by_v1_and_held_by_awq(tmp_path: Path) -> None:
    made, _ = with_lowest_offset(4)
    source = write_msmodelslim(tmp_path / "source", made)
    with pytest.raises(RefusedError, match=re.escape(DOWN)):
        convert(source, tmp_path / "v1", "gptq:v1")
    convert(source, tmp_path / "awq", "awq")
    assert_decoded(decode_awq(read_folder(tmp_path / "awq"), DOWN), made.linears[DOWN], "F16", DOWN)
    assert not (tmp_path / "v1").exists()


def test_v2_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    made = model()
    source = write_msmodelslim(tmp_path / "source", made)
    convert(source, tmp_path / "out", "gptq:v2")
    tensors = read_folder(tmp_path / "out")
    assert set(tensors[f"{DOWN}.qzeros"].view(np.uint32).flat) == {0x88888888}
    for name, one in made.linears.items():
        assert_decoded(decode_gptq(tensors, name, 4, "v2"), one, "F16", name)


def test_symmetric_words_are_the_tools_own(tmp_path: Path) -> None:
    """AutoGPTQ's symmetric zero word is 0x77777777 (7f7f7f7f for 8 bits), AutoAWQ's layout says 8 in every lane."""
    words = {}
    for bits, target in ((4, "gptq"), (8, "gptq"), (4, "awq")):
        source = write_msmodelslim(tmp_path / f"{target}-{bits}", model(blocks=1, bits=bits))
        convert(source, tmp_path / f"{target}-{bits}-out", target)
        zeros = read_folder(tmp_path / f"{target}-{bits}-out")["model.layers.0.mlp.down_proj.qzeros"]
        words[target, bits] = set(zeros.view(np.uint32).flat)
    assert words == {("gptq", 4): {0x77777777}, ("gptq", 8): {0x7F7F7F7F}, ("awq", 4): {0x88888888}}


def refused(source: Path, target: str, **options: Any) -> dict[str, str]:
    """{layer: code} of a plan's refusals."""
    return {refusal.layer: refusal.code for refusal in plan(source, target, **options).refusals}


def test_subnormal_scales_need_to_be_allowed(tmp_path: Path) -> None:
    made = model()
    scales = made.linears[DOWN].scales.copy()
    scales[5, 1] = 3e-7  # between two of float16's subnormals, which are 6e-8 apart
    source = write_msmodelslim(tmp_path / "source", replaced(made, DOWN, scales=scales))
    for target in ("awq", "gptq"):
        assert refused(source, target) == {DOWN: "scale-subnormal"}
        with pytest.raises(RefusedError, match="--allow scale-subnormal"):
            convert(source, tmp_path / target, target)
        convert(source, tmp_path / target, target, allow=["scale-subnormal"])
        decoded = decode_awq if target == "awq" else lambda tensors, name: decode_gptq(tensors, name, 4)
        assert_decoded(decoded(read_folder(tmp_path / target), DOWN), replaced(made, DOWN, scales=scales).linears[DOWN], "F16", DOWN)
    assert refused(source, "awq", scale_dtype="bfloat16") == {}


def test_scale_of_a_group_of_zeros_is_exact(tmp_path: Path) -> None:
    """The tool stores float32's epsilon for it, 2**-23, which float16 holds as a subnormal."""
    made = model()
    scales = made.linears[DOWN].scales.copy()
    scales[5, 1] = np.finfo(np.float32).eps
    source = write_msmodelslim(tmp_path / "source", replaced(made, DOWN, scales=scales))
    convert(source, tmp_path / "out", "awq")
    assert read_folder(tmp_path / "out")[f"{DOWN}.scales"][1, 5] == np.float32(2**-23)


def test_scales_that_overflow_are_refused_whatever_is_allowed(tmp_path: Path) -> None:
    made = model()
    scales = made.linears[DOWN].scales.copy()
    scales[0, 0] = 65536.0
    source = write_msmodelslim(tmp_path / "source", replaced(made, DOWN, scales=scales))
    assert refused(source, "awq", allow=["scale-subnormal", "scale-rounded"]) == {DOWN: "scale-overflow"}
    assert refused(source, "awq", scale_dtype="float32") == {}


def test_strict_refuses_rounding_and_names_it(tmp_path: Path) -> None:
    source = write_msmodelslim(tmp_path / "source", model())
    assert {refusal.code for refusal in plan(source, "gptq", strict=True).refusals} == {"scale-rounded", "bias-rounded"}
    assert refused(source, "gptq", strict=True, scale_dtype="keep") == {}
    assert convert(source, tmp_path / "out", "gptq", strict=True, scale_dtype="keep").exact


@pytest.mark.parametrize(("target", "bits"), [("awq", 4), ("gptq", 4), ("gptq", 8)])
def test_sizes_that_kernels_cannot_take_are_refused(target: str, bits: int, tmp_path: Path) -> None:
    made = model(blocks=1, bits=bits, strategy="channel")
    for name, (out, in_) in {"narrow": (HIDDEN - 8, HIDDEN), "short": (HIDDEN, HIDDEN - 8)}.items():
        layer = f"model.layers.0.{name}"
        odd = made._replace(linears={**made.linears, layer: linear(out, in_, bits, "channel")})
        source = write_msmodelslim(tmp_path / f"{name}", odd)
        assert layer in refused(source, target)
        assert list(refused(source, "dense")) == []


def test_fused_linears_that_disagree_are_refused(tmp_path: Path) -> None:
    for name, fellow in (("self_attn.k_proj", "self_attn.q_proj"), ("mlp.up_proj", "mlp.gate_proj")):
        source = write_msmodelslim(tmp_path / name, roll_back(model(blocks=1), [f"model.layers.0.{name}"]))
        for target in ("awq", "gptq"):
            assert refused(source, target)[f"model.layers.0.{fellow}"] == "fused"
        assert refused(source, "dense") == {}


@pytest.mark.parametrize(("target", "wanted"), [("awq", {128: 64, 64: 64, 32: 32}), ("gptq", {128: 128, 64: 64, 32: 32})])
def test_group_sizes_are_kept_or_split(target: str, wanted: dict[int, int], tmp_path: Path) -> None:
    """Inner inputs of 192 hold no group of 128, so per-channel layers and groups of 128 meet at what divides both."""
    for group in wanted:
        made = model(blocks=1, group=group) if group != 128 else model(blocks=1, strategy="channel")
        source = write_msmodelslim(tmp_path / f"{group}", made)
        convert(source, tmp_path / f"{group}-out", target)
        said = read_config(tmp_path / f"{group}-out")["quantization_config"]["group_size"]
        assert said == (wanted[group] if group != 128 or target == "awq" else -1)


def test_unknown_words_are_usage_errors(tmp_path: Path) -> None:
    source = write_msmodelslim(tmp_path / "source", model(blocks=1))
    for options in ({"to": "gguf"}, {"to": "gptq:v3"}, {"to": "awq", "allow": ["everything"]}, {"to": "awq", "scale_dtype": "fp8"}):
        with pytest.raises(UsageError):
            convert(source, tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        convert(source, tmp_path / "out", "awq", max_shard_size=0)


# --- layers left in float ---------------------------------------------------------------------------------------------

FLOAT_ONE = ["model.layers.0.self_attn.o_proj"]
FLOAT_ALIKE = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("names", [FLOAT_ONE, FLOAT_ALIKE])
def test_layers_left_in_float_are_named_to_awq(names: list[str], tmp_path: Path) -> None:
    made = roll_back(model(), names)
    convert(write_msmodelslim(tmp_path / "source", made), tmp_path / "out", "awq")
    quantization = read_config(tmp_path / "out")["quantization_config"]
    assert sorted(quantization["modules_to_not_convert"]) == names
    tensors = read_folder(tmp_path / "out")
    assert is_subset(made.plain, tensors)
    for name, one in made.linears.items():
        assert_decoded(decode_awq(tensors, name), one, "F16", name)
        assert not any(float_name in name for float_name in names), "a substring match would leave out a quantized layer"


@pytest.mark.parametrize("names", [FLOAT_ONE, FLOAT_ALIKE])
def test_layers_left_in_float_are_named_to_gptq(names: list[str], tmp_path: Path) -> None:
    made = roll_back(model(), names)
    convert(write_msmodelslim(tmp_path / "source", made), tmp_path / "out", "gptq")
    quantization = read_config(tmp_path / "out")["quantization_config"]
    assert quantization == read_config(tmp_path / "out", "quantize_config.json")
    rules = quantization["dynamic"]
    assert len(rules) == len(names)
    assert all(rule.startswith("-:") and content == {} for rule, content in rules.items())

    def left_out(name: str) -> bool:
        return any(re.match(rule.removeprefix("-:"), name) for rule in rules)

    assert all(left_out(name) for name in names)
    assert not any(left_out(name) for name in made.linears)
    assert not left_out(f"{names[0]}_norm")

    # One list for every block can only be said where all blocks are alike.
    if names == FLOAT_ONE:
        assert "modules_in_block_to_quantize" not in quantization
    else:
        modules = [name for group in quantization["modules_in_block_to_quantize"] for name in group]
        assert sorted(modules) == sorted(set(SHAPES) - {"mlp.down_proj"})
    assert is_subset(made.plain, read_folder(tmp_path / "out"))


def test_layers_left_in_float_are_still_there_on_the_way_back(tmp_path: Path) -> None:
    made = roll_back(model(), FLOAT_ONE)
    source = write_msmodelslim(tmp_path / "source", made)
    convert(source, tmp_path / "awq", "awq")
    convert(tmp_path / "awq", tmp_path / "gptq", "gptq")
    assert verify(source, tmp_path / "gptq").same
    assert list(read_config(tmp_path / "gptq")["quantization_config"]["dynamic"]) == [r"-:^model\.layers\.0\.self_attn\.o_proj$"]


# --- AntiOutlier's norms ----------------------------------------------------------------------------------------------

NORM = "model.layers.0.input_layernorm"


def smoothed(bias: float = 0.0, copy: float = 0.0, wrapped: bool = True) -> Any:
    """A model whose first norm AntiOutlier wrapped: a bias that should be 0, and copies that should be equal."""
    made = model(blocks=1)
    weight = made.plain[f"{NORM}.weight"]
    extra = {f"{NORM}.bias": np.full(HIDDEN, bias, np.float32)}
    if wrapped:
        extra[f"{NORM}.module.weight"] = (weight.astype(np.float32) + np.float32(copy)).astype(weight.dtype)
        extra[f"{NORM}.module.bias"] = extra[f"{NORM}.bias"]
    return made._replace(plain={**made.plain, **extra})


@pytest.mark.parametrize("wrapped", [True, False])
def test_norm_copies_and_zero_biases_are_left_behind(wrapped: bool, tmp_path: Path) -> None:
    source = write_msmodelslim(tmp_path / "source", smoothed(wrapped=wrapped))
    result = convert(source, tmp_path / "out", "awq")
    assert not [name for name in read_folder(tmp_path / "out") if name.startswith(f"{NORM}.") and name != f"{NORM}.weight"]
    assert result.plan.notes
    assert verify(source, tmp_path / "out").same


def test_zero_norm_biases_are_left_behind_where_only_the_base_model_says_what_the_norms_are(tmp_path: Path) -> None:
    """ascendV1 writes no ``.module.`` copies and no config.json: --base-model alone tells that the norms are RMSNorms."""
    source = write_msmodelslim(tmp_path / "source", smoothed(wrapped=False), ascendv1=True, config=None)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    convert(source, tmp_path / "out", "awq", base_model=tmp_path / "base")
    assert f"{NORM}.bias" not in read_folder(tmp_path / "out")


@pytest.mark.parametrize(("parts", "tensor"), [({"bias": 0.5}, f"{NORM}.bias"), ({"copy": 0.5}, f"{NORM}.module.weight")])
def test_norms_that_were_shifted_are_refused(parts: dict[str, float], tensor: str, tmp_path: Path) -> None:
    source = write_msmodelslim(tmp_path / "source", smoothed(**parts))
    assert refused(source, "gptq")[tensor] == "norm"


def test_metadata_of_the_description_may_be_anything(tmp_path: Path) -> None:
    """Example scripts merge numbers, lists and nulls into the description."""
    source = write_msmodelslim(tmp_path / "source", model(blocks=1))
    (path,) = source.glob("quant_model_description*.json")
    change_json(path, lambda document: document.update(w_bit=4, is_lowbit=True, kv_quant_type=None, tags=["a"], optional={"x": 1}))
    assert convert(source, tmp_path / "out", "awq").plan.refusals == []
