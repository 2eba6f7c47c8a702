"""vllm-ascend 0.30.0rc2's own parser and schemes load, in the real vLLM 0.32.0, what Weighbridge writes for them, and refuse the rest.

``make oracles`` (or ``nox -s vllm_ascend``) installs vLLM and the sources of vllm-ascend and runs this. ``vllm_ascend_load.py`` says
what is real there and what stands in for an NPU.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG, change_json, model, read_raw, roll_back, write_msmodelslim
from judge import FIXTURES, Tool, law, read_answer
from raw_msmodelslim import Layer, read_layers

from convert import convert
from convert.checking import check
from convert.consumers import CONSUMERS
from convert.verification import fingerprint
from formats.errors import UnreadableError

pytestmark = pytest.mark.oracle

ROOT = FIXTURES.parent
AWQ_GPTQ, COMPRESSED = ROOT / "awq_gptq", ROOT / "compressed_tensors"
QWEN2 = CONFIG | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BLOCK = "model.layers.0"
ROLLED_BACK = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")

UNREADABLE = "unreadable"
"""In place of the codes of requirements: ``check`` cannot read the folder."""

NO_W4A16 = r"NotImplementedError: .* doesn't support quant_type=W4A16 for layer_type=linear"
PER_CHANNEL = r"AssertionError: assert param_data\.shape == loaded_weight\.shape"


class Case(NamedTuple):
    """refused: how vllm-ascend refuses the folder, "" if it loads it; unmet: what ``check`` finds."""

    refused: str = ""
    unmet: tuple[str, ...] = ()


LOADED = {
    "w8a16": Case(),
    "w8a16_float32_scales": Case(),
    "w8a16_of_gptq": Case(),
    "w8a16_floats": Case(),
    "w8a16_safe_tensor_renamed": Case(),
}
REFUSED = {
    "w8a16_g128": Case(PER_CHANNEL, ("group-size",)),
    "w8a16_g128_of_gptq": Case(PER_CHANNEL, ("group-size",)),
    "w4a16_g128": Case(NO_W4A16, ("type",)),
    "w4a16_channel": Case(NO_W4A16, ("type",)),
    "w4a16_of_awq": Case(NO_W4A16, ("type",)),
    "w4a16_of_gptq": Case(NO_W4A16, ("type",)),
    "w4a16_and_w8a16": Case(NO_W4A16, ("type", "group-size")),
}
SPOILED = {
    "w8a16_safe_tensor": Case(r"(?s:.*)ModelSlim Quantization Config Not Found", ("file-names",)),
    "config_for_mindie": Case(r"KeyError: 'model\.layers\.0\.self_attn\.q_proj\.weight'", ("quantization-config",)),
    "no_k_proj": Case(r"KeyError: 'model\.layers\.0\.self_attn\.k_proj\.weight'", (UNREADABLE,)),
    "no_down_proj": Case(r"ValueError: There is no module or parameter named .*down_proj\.weight_", (UNREADABLE,)),
    "no_float_gate_proj": Case(r"KeyError: 'model\.layers\.0\.mlp\.gate_proj\.weight'", ("described",)),
    "unlike_qkv": Case(r"ValueError: Not all shards of .*qkv_proj are quantized with same quant type", (UNREADABLE,)),
}
W8A8 = {  # -> its source, the float model, and how the inputs are quantized
    "w8a8": ("msmodelslim_w8/w8a8_static_bf16", "src_qwen2_bf16", "static"),
    "w8a8_fp16": ("msmodelslim_w8/w8a8_static_ascendv1_fp16", "src_llama_fp16", "static"),
    "w8a8_mix": ("msmodelslim_w8/w8a8_pdmix_ascendv1_bf16", "src_qwen2_bf16", "dynamic"),  # as where it fills the cache
    "w8a8_dynamic": ("msmodelslim_w8/w8a8_dynamic_bf16", "src_llama_fp16", "dynamic"),
    "w8a8s": ("msmodelslim_w8/w8a8s_lowbit_bf16", "src_qwen2_bf16", "static"),
    "w8a8_of_compressed_tensors": ("compressed_tensors/w8a8_static_asym_fp16", "", "static"),
    "w8a8_sym_of_compressed_tensors": ("compressed_tensors/w8a8_static_sym_bf16", "", "static"),
    "w8a8_dynamic_of_compressed_tensors": ("compressed_tensors/w8a8_dynamic_fp16", "", "dynamic"),
}
"""Folders that are written with ``--for vllm-ascend``."""
WIDENED = {"w8a16_of_4_bits": "compressed_tensors/w4a16_pc_sym_fp16"}
ASYMMETRIC = "w8a16_asymmetric"
FOREIGN = {
    "w8a16_per_tensor": Case(PER_CHANNEL),  # as msModelSlim writes it by default; we spell the scale out for each channel
    "no_float_o_proj": Case(),  # taken for float, as it is not fused
}

SOURCES = {
    "w8a16": "v1_w8a16_pc",
    "w8a16_float32_scales": "v1_w8a16_pc",
    "w8a16_of_gptq": "v1_w8a16_pc",
    "w8a16_safe_tensor_renamed": "v1_w8a16_pc",
    ASYMMETRIC: "w8a16_pc_asym_fp16",
}
FLOAT32 = {
    "w8a16": {"bias"},
    "w8a16_float32_scales": {"bias", "weight_scale", "weight_offset"},
    "w8a16_of_gptq": {"bias"},
    "w8a16_safe_tensor_renamed": {"bias"},
}
"""Parts of layers that stay in float32 in a bfloat16 model, as msModelSlim's command line writes them; these biases are bfloat16 values."""


class Answer(NamedTuple):
    """What the tool says of a folder; see ``vllm_ascend_load.py``."""

    folder: Path
    weights: Mapping[str, np.ndarray]
    detected: str | None
    types: Mapping[str, str]
    shards: Mapping[str, list[str]]
    parameters: Mapping[str, list[Any]]
    registered: list[str]
    dtype: str
    refused: str


def write_folders(root: Path) -> Path:
    """Every case as a folder of its name; the folder that holds them, and nothing else."""
    folders, ascendv1 = root / "folders", "msmodelslim:ascendv1"
    folders.mkdir()
    v1, base = FIXTURES / "v1_w8a16_pc", FIXTURES / "src1l_bf16_tok"
    convert(v1, folders / "w8a16", to=ascendv1, base_model=base, serve_dtype="bfloat16")
    convert(v1, folders / "w8a16_float32_scales", to=ascendv1, base_model=base)
    convert(v1, root / "gptq", to="gptq", base_model=base, scale_dtype="keep")
    convert(root / "gptq", folders / "w8a16_of_gptq", to=ascendv1, serve_dtype="bfloat16")
    made = roll_back(model(bits=8, strategy="channel", scale_dtype="BF16"), [f"{BLOCK}.{name}" for name in ROLLED_BACK])
    convert(write_msmodelslim(root / "floats", made, config=QWEN2), folders / "w8a16_floats", to=ascendv1)
    convert(v1, folders / "w8a16_safe_tensor", to="msmodelslim:safe_tensor", base_model=base, serve_dtype="bfloat16")
    for case, source, its_base in (
        (ASYMMETRIC, "w8a16_pc_asym_fp16", "src_fp16"),
        ("w8a16_g128", "w8a16_g128_sym_bf16", "src_bf16"),
        ("w4a16_g128", "w4a16_g128_asym_fp16", "src_fp16"),
        ("w4a16_channel", "w4a16_ascendv1_pc_sym_bf16", "src_bf16"),
    ):
        convert(FIXTURES / source, folders / case, to=ascendv1, base_model=FIXTURES / its_base)
    for case, source in (
        ("w8a16_g128_of_gptq", "gptq_v1_8b_g128_sym"),
        ("w4a16_of_awq", "awq_gemm_g128_zp"),
        ("w4a16_of_gptq", "gptq_v1_4b_g128_sym"),
        ("w4a16_and_w8a16", "gptqmodel_dynamic"),
    ):
        convert(AWQ_GPTQ / source, folders / case, to=ascendv1)

    for case, (source, its_base, _) in W8A8.items():
        base = None if not its_base else COMPRESSED / its_base
        dtype = "bfloat16" if source.endswith("bf16") else "float16"
        convert(ROOT / source, folders / case, "msmodelslim", consumer="vllm-ascend", base_model=base, serve_dtype=dtype)
    for case, source in WIDENED.items():
        convert(ROOT / source, folders / case, "msmodelslim", consumer="vllm-ascend")
    write_msmodelslim(folders / "w8a16_per_tensor", model(bits=8, strategy="tensor", scale_dtype="BF16"), ascendv1=True, config=QWEN2)

    def spoil(case: str, source: str, change: Callable[[dict[str, Any]], object], name: str = "quant_model_description.json") -> None:
        shutil.copytree(folders / source, folders / case)
        (folders / case / name).chmod(0o600)
        change_json(folders / case / name, change)

    renamed = folders / "w8a16_safe_tensor_renamed"
    shutil.copytree(folders / "w8a16_safe_tensor", renamed)
    (renamed / "quant_model_description_w8a16.json").rename(renamed / "quant_model_description.json")
    spoil("config_for_mindie", "w8a16", lambda config: config.update(quantization_config={"group_size": 0}), "config.json")
    spoil("no_k_proj", "w8a16", lambda types: types.pop(f"{BLOCK}.self_attn.k_proj.weight"))
    spoil("no_down_proj", "w8a16", lambda types: types.pop(f"{BLOCK}.mlp.down_proj.weight"))
    spoil("unlike_qkv", "w8a16", lambda types: types.update({f"{BLOCK}.self_attn.q_proj.weight": "W8A8"}))
    spoil("no_float_gate_proj", "w8a16_floats", lambda types: types.pop(f"{BLOCK}.mlp.gate_proj.weight"))
    spoil("no_float_o_proj", "w8a16_floats", lambda types: types.pop(f"{BLOCK}.self_attn.o_proj.weight"))
    return folders


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """What the tool says of every case, by name."""
    tool, root = Tool("vllm_ascend"), tmp_path_factory.mktemp("vllm_ascend")
    folders, out = write_folders(root), root / "out"
    out.mkdir()
    tool.run("vllm_ascend_load.py", folders, out)
    found = {}
    for folder in folders.iterdir():
        weights, metadata = read_answer(out / f"{folder.name}.safetensors")
        found[folder.name] = Answer(folder, weights, **{key: json.loads(text) for key, text in metadata.items()})
    return found


def unmet(folder: Path) -> tuple[str, ...]:
    """What ``check`` finds."""
    try:
        return tuple(one.code for one in check(folder, "vllm-ascend").unmet)
    except UnreadableError:
        return (UNREADABLE,)


def description_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("quant_model_description*.json")
    return json.loads(path.read_text("utf-8"))


def as_served(layer: Layer) -> Layer:
    """``layer`` with its scales as a bfloat16 model holds them."""
    return layer._replace(scales=layer.scales.astype(ml_dtypes.bfloat16).astype(np.float32))


def source_layers(answer: Answer) -> dict[str, Layer]:
    case = answer.folder.name
    source = FIXTURES / SOURCES[case] if case in SOURCES else answer.folder.parents[1] / "floats"
    return read_layers(source)


def expect_weights(answer: Answer, layers: Mapping[str, Layer]) -> None:
    """The scheme computes with the law's weights of ``layers``, q, k and v and gate and up one below the other."""
    quantized = {name for name, type_ in answer.types.items() if type_ != "FLOAT"}
    assert {name.removesuffix(".weight") for name in answer.weights} == quantized
    assert {shard for name in quantized for shard in answer.shards[name]} == set(layers)
    for name in quantized:
        expected = np.concatenate([law(layers[shard]) for shard in answer.shards[name]])
        np.testing.assert_array_equal(answer.weights[f"{name}.weight"], expected, name)


@pytest.mark.parametrize(("name", "case"), [*(LOADED | REFUSED | SPOILED).items()], ids=[*(LOADED | REFUSED | SPOILED)])
def test_check_and_vllm_ascend_agree(answers: dict[str, Answer], name: str, case: Case) -> None:
    answer = answers[name]
    assert re.match(case.refused or r"\Z", answer.refused), answer.refused
    assert unmet(answer.folder) == case.unmet
    assert bool(case.refused) == bool(case.unmet)


@pytest.mark.parametrize("name", [ASYMMETRIC, *LOADED, *REFUSED])
def test_the_parser_reads_the_types_that_we_wrote(answers: dict[str, Answer], name: str) -> None:
    """Of every linear of vLLM's model; FLOAT ones are left alone, and those that are fused agree."""
    answer = answers[name]
    assert answer.detected == "ascend"
    read = {f"{shard}.weight": type_ for module, type_ in answer.types.items() for shard in answer.shards[module]}
    assert read == {key: type_ for key, type_ in description_of(answer.folder).items() if key.endswith("_proj.weight")}
    assert set(read.values()) > {"FLOAT"} if name in {"w8a16_floats", "w4a16_and_w8a16"} else "FLOAT" not in read.values()


@pytest.mark.parametrize("name", [ASYMMETRIC, *LOADED])
def test_the_schemes_want_the_tensors_that_we_wrote(answers: dict[str, Answer], name: str) -> None:
    """By name, dtype and shape, no fewer and no more; but vLLM rounds what stays in float32, with a warning."""
    answer = answers[name]
    (path,) = answer.folder.glob("*.safetensors")
    header, _ = read_raw(path)
    quantized = {shard for module, type_ in answer.types.items() if type_ != "FLOAT" for shard in answer.shards[module]}
    stored = {key: [entry["dtype"], entry["shape"]] for key, entry in header.items() if key.rpartition(".")[0] in quantized}
    wide = {key.rpartition(".")[2] for key, (dtype, _) in stored.items() if dtype == "F32"}
    assert wide == FLOAT32.get(name, set())
    for key, entry in stored.items():
        entry[0] = answer.parameters[key][0] if key.endswith(tuple(wide)) else entry[0]
    assert stored == answer.parameters


@pytest.mark.parametrize("name", LOADED)
def test_the_schemes_compute_with_the_weights_of_the_source(answers: dict[str, Answer], name: str) -> None:
    answer = answers[name]
    expect_weights(answer, {key: as_served(layer) for key, layer in source_layers(answer).items()})


def test_offsets_are_added_so_asymmetric_weights_are_wrong(answers: dict[str, Answer]) -> None:
    """msModelSlim subtracts its offset; vllm-ascend hands it on as it is to an operator that adds it. It refuses nothing."""
    answer = answers[ASYMMETRIC]
    assert answer.refused == ""
    layers = source_layers(answer)
    middle = {name: 2 ** (layer.bits - 1) for name, layer in layers.items()}
    assert all((layer.zeros != middle[name]).any() for name, layer in layers.items())
    expect_weights(answer, {name: layer._replace(zeros=2 * middle[name] - layer.zeros) for name, layer in layers.items()})


@pytest.mark.parametrize("name", FOREIGN)
def test_what_vllm_ascend_does_with_folders_of_other_tools(answers: dict[str, Answer], name: str) -> None:
    assert re.match(FOREIGN[name].refused or r"\Z", answers[name].refused), answers[name].refused


@pytest.mark.parametrize("name", [ASYMMETRIC, *FOREIGN])
def test_check_says_what_vllm_ascend_does(answers: dict[str, Answer], name: str) -> None:
    fits = name != ASYMMETRIC and not FOREIGN[name].refused
    assert (unmet(answers[name].folder) == ()) is fits


def test_check_knows_the_types_that_are_registered_for_linears(answers: dict[str, Answer]) -> None:
    (row,) = (row for row in CONSUMERS["vllm-ascend"].formats["msmodelslim"] if row.code == "type")
    registered = set(answers["w8a16"].registered) - {"fp8"}  # not msModelSlim's: of DeepSeek's checkpoints
    assert set(row.wanted.removeprefix("a type of ").split(", ")) == registered


# --- quantized inputs -------------------------------------------------------------------------------------------------


class Static(NamedTuple):
    """A linear with quantized inputs, read from the source's bytes. scale, offset: of the inputs, None where found at run time."""

    codes: np.ndarray  # int64 [out, in]
    scales: np.ndarray  # float64 [out]
    bias: np.ndarray  # float64 [out]
    scale: float | None
    offset: float


def read_static(folder: Path) -> dict[str, Static]:
    """Every quantized linear of an msModelSlim or compressed-tensors folder of W8A8."""
    (path,) = (path for path in folder.glob("*.safetensors") if "golden" not in path.name)
    header, data = read_raw(path)
    kinds = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "I8": np.int8, "I32": np.int32, "I64": np.int64}

    def tensor(name: str) -> np.ndarray | None:
        if name not in header:
            return None
        entry = header[name]
        begin, end = entry["data_offsets"]
        found = np.frombuffer(data[begin:end], kinds[entry["dtype"]])
        if name.endswith("deq_scale") and found.dtype == np.int64:
            found = found.astype(np.int32).view(np.float32)
        return found.reshape(entry["shape"]).astype(np.float64)

    found = {}
    for key, entry in header.items():
        name = key.removesuffix(".weight")
        if name == key or entry["dtype"] != "I8":
            continue
        codes, scale, scales, bias = (tensor(f"{name}.{part}") for part in ("weight", "input_scale", "weight_scale", "bias"))
        assert codes is not None
        offset = next((one for one in (tensor(f"{name}.input_offset"), tensor(f"{name}.input_zero_point")) if one is not None), np.zeros(1))
        if scales is None:
            deq = tensor(f"{name}.deq_scale")
            assert deq is not None
            assert scale is not None
            scales = deq / scale
        bias = np.zeros(codes.shape[0]) if bias is None else bias
        one = None if scale is None else float(scale.reshape(-1)[0])
        found[name] = Static(codes.astype(np.int64), scales.reshape(-1), bias, one, float(offset.reshape(-1)[0]))
    assert found, folder
    return found


def reciprocal(scale: float, dtype: Any) -> float:
    """1 / scale as vllm-ascend takes it: in the model's dtype."""
    return float((1.0 / np.float32(np.array(scale).astype(dtype))).astype(dtype))


@pytest.mark.parametrize("name", W8A8)
def test_w8a8_folders_are_loaded_and_check_agrees(answers: dict[str, Answer], name: str) -> None:
    answer = answers[name]
    assert answer.refused == ""
    assert unmet(answer.folder) == ()
    assert answer.detected == "ascend"
    read = {f"{shard}.weight": type_ for module, type_ in answer.types.items() for shard in answer.shards[module]}
    assert read == {key: type_ for key, type_ in description_of(answer.folder).items() if key.endswith("_proj.weight")}


@pytest.mark.parametrize("name", W8A8)
def test_w8a8_schemes_want_the_tensors_that_we_wrote(answers: dict[str, Answer], name: str) -> None:
    """By name and shape, and by dtype but for what is loaded by a cast that changes nothing: input_offset, integers in int8."""
    answer = answers[name]
    (path,) = answer.folder.glob("*.safetensors")
    header, _ = read_raw(path)
    quantized = {shard for module, type_ in answer.types.items() if type_ != "FLOAT" for shard in answer.shards[module]}
    stored = {key: [entry["dtype"], entry["shape"]] for key, entry in header.items() if key.rpartition(".")[0] in quantized}
    assert {key: shape for key, (_, shape) in stored.items()} == {key: shape for key, (_, shape) in answer.parameters.items()}
    same = {key: dtype for key, (dtype, _) in stored.items() if not key.endswith(("input_offset", "bias", "weight_scale", "weight_offset"))}
    # static schemes compute with deq_scale: a weight_scale in float32 (W8A8S) is rounded by the loader and not used
    assert same == {key: answer.parameters[key][0] for key in same}


@pytest.mark.parametrize("name", W8A8)
def test_w8a8_schemes_compute_what_the_source_says(answers: dict[str, Answer], name: str) -> None:
    """Of some inputs, within half a step of quant_bias, and what the tool rounded deq_scale by where the source has one."""
    answer, (source, _, kind) = answers[name], W8A8[name]
    layers, kept = read_static(ROOT / source), source.startswith("msmodelslim")
    dtype, rounded = np.float16 if answer.dtype == "F16" else ml_dtypes.bfloat16, 0.0085 if kept else 1e-6
    for module in (module for module, type_ in answer.types.items() if type_ != "FLOAT"):
        x, y = (answer.weights[f"{module}.{part}"].astype(np.float64) for part in ("x", "y"))
        expected, room = [], []
        for shard in answer.shards[module]:
            layer = layers[shard]
            if kind == "static":
                assert layer.scale is not None
                steps = x.astype(np.float32) * np.float32(reciprocal(layer.scale, dtype))
                codes = np.clip(np.rint(steps + np.float32(layer.offset)), -128, 127)
                step = np.float64(np.array(layer.scale).astype(dtype)) * layer.scales
                values = (codes - layer.offset) @ layer.codes.T * step
                room.append(0.5001 * step + rounded * np.abs(values))
            else:
                token = (np.abs(x).max(1, keepdims=True) / 127).astype(np.float32)
                codes = np.rint(x.astype(np.float32) / token)
                values = codes @ layer.codes.T * (token.astype(np.float64) * layer.scales)
                room.append((rounded if name == "w8a8_mix" else 1e-6) * np.abs(values) + 1e-6)  # whose scale is deq_scale / input_scale
            expected.append(values + layer.bias)
        allowed = np.concatenate([np.broadcast_to(one, values.shape) for one, values in zip(room, expected, strict=True)], 1)
        np.testing.assert_array_less(np.abs(y - np.concatenate(expected, 1)), allowed + 1e-9, module)


@pytest.mark.parametrize("name", WIDENED)
def test_four_bits_are_served_in_eight(answers: dict[str, Answer], name: str) -> None:
    answer = answers[name]
    assert answer.refused == ""
    assert unmet(answer.folder) == ()
    assert set(answer.types.values()) <= {"W8A16", "FLOAT"}
    dense = fingerprint(ROOT / WIDENED[name])
    assert fingerprint(answer.folder).digest == dense.digest
