"""Damaged, contradictory and malicious sources: exit 5, one sentence that names the culprit, and nothing at the destination."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    Linear,
    Tensors,
    change_json,
    change_tensors,
    description_file,
    model,
    pack_nibbles,
    read_raw,
    weight_file,
    write_msmodelslim,
    write_raw,
)
from typer.testing import CliRunner

from convert.cli import app
from convert.engine import convert

LAYER = "model.layers.0.mlp.down_proj"
CODES, SCALES, OFFSETS = (f"{LAYER}.{part}" for part in ("weight", "weight_scale", "weight_offset"))
Attack = Callable[[Path], object]
Header = dict[str, Any]


def refused(source: Path, target: str, words: tuple[str, ...]) -> None:
    """Converting ``source`` must exit 5 with one line that has every word, and leave nothing beside the destination."""
    place = source.parent / "place"
    place.mkdir()
    before = {path: path.read_bytes() for path in source.iterdir() if path.is_file()}
    result = CliRunner().invoke(app, ["convert", str(source), str(place / "out"), "--to", target])
    assert result.exit_code == 5, (result.exit_code, result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("weighbridge convert: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert len(result.stderr) < 600, "a sentence, not the header"
    for word in words:
        assert word in result.stderr
    assert list(place.iterdir()) == []
    assert {path: path.read_bytes() for path in source.iterdir() if path.is_file()} == before


def change_header(change: Callable[[Header], object]) -> Attack:
    def attack(source: Path) -> None:
        header, data = read_raw(weight_file(source))
        change(header)
        write_raw(weight_file(source), header, data)

    return attack


def change_header_text(change: Callable[[str], str]) -> Attack:
    def attack(source: Path) -> None:
        header, data = read_raw(weight_file(source))
        write_raw(weight_file(source), change(json.dumps(header)), data)

    return attack


def change_bytes(change: Callable[[bytes], bytes]) -> Attack:
    def attack(source: Path) -> None:
        weight_file(source).write_bytes(change(weight_file(source).read_bytes()))

    return attack


def tensors(change: Callable[[Tensors], object]) -> Attack:
    return lambda source: change_tensors(weight_file(source), change)


def put(name: str, value: float) -> Attack:
    """Overwrite one element, not the first, of a tensor."""

    def change(stored: Tensors) -> None:
        stored[name][-1, -1] = value

    return tensors(change)


def put_tensor(name: str, make: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Attack:
    return tensors(lambda stored: stored.update({name: make(stored[name])}))


def description(change: Callable[[Header], object]) -> Attack:
    return lambda source: change_json(description_file(source), change)


def description_text(text: str) -> Attack:
    return lambda source: description_file(source).write_text(text, "utf-8")


def overlap(header: Header) -> None:
    """Two tensors of one size on the same bytes."""
    header[SCALES]["data_offsets"] = header[OFFSETS]["data_offsets"]


def shift(by: int) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        begin, end = header[CODES]["data_offsets"]
        header[CODES]["data_offsets"] = [begin + by, end + by]

    return change


def huge(header: Header) -> None:
    header[CODES]["shape"] = [1 << 32, 1 << 32]


WEIGHTS = "quant_model_weight_w4a16.safetensors"
DESCRIPTION = "quant_model_description_w4a16.json"

HEADERS: dict[str, tuple[Attack, tuple[str, ...]]] = {
    "truncated data": (change_bytes(lambda content: content[:-1000]), (WEIGHTS, "truncated")),
    "truncated header": (change_bytes(lambda content: content[:500]), (WEIGHTS, "truncated")),
    "empty": (change_bytes(lambda content: b""), (WEIGHTS,)),
    "seven bytes": (change_bytes(lambda content: content[:7]), (WEIGHTS,)),
    "header length of 2**63": (change_bytes(lambda content: (1 << 63).to_bytes(8, "little") + content[8:]), (WEIGHTS,)),
    "not JSON": (change_bytes(lambda content: content[:8] + b"!" + content[9:]), (WEIGHTS, "JSON")),
    "not UTF-8": (change_bytes(lambda content: content[:8] + b"\xff" + content[9:]), (WEIGHTS, "UTF-8")),
    "trailing bytes": (change_bytes(lambda content: content + b"more"), (WEIGHTS, "4 bytes")),
    "header is a list": (change_header_text(lambda text: f"[{text}]"), (WEIGHTS, "list")),
    "deep nesting": (change_header_text(lambda text: "[" * 100_000 + "]" * 100_000), (WEIGHTS,)),
    "NaN in the header": (change_header_text(lambda text: text.replace('"shape": [', '"shape": [NaN, ', 1)), (WEIGHTS, "NaN")),
    "duplicate keys": (
        change_header_text(lambda text: text[:-1] + f', "{CODES}": {{"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}}}'),
        (WEIGHTS, CODES, "twice"),
    ),
    "duplicate keys inside": (change_header_text(lambda text: text.replace('"dtype"', '"dtype": "I8", "dtype"', 1)), (WEIGHTS, "dtype")),
    "overlapping offsets": (change_header(overlap), (WEIGHTS, "overlaps")),
    "gap": (change_header(shift(8)), (WEIGHTS, "begins at")),
    "offsets beyond the file": (change_header(shift(1 << 40)), (WEIGHTS,)),
    "negative offsets": (change_header(lambda header: header[CODES].update(data_offsets=[-8, 8])), (WEIGHTS, CODES)),
    "offsets the wrong way": (change_header(lambda header: header[CODES]["data_offsets"].reverse()), (WEIGHTS, CODES)),
    "three offsets": (change_header(lambda header: header[CODES]["data_offsets"].append(0)), (WEIGHTS, CODES)),
    "shape and bytes disagree": (change_header(lambda header: header[CODES].update(shape=[128, 191])), (WEIGHTS, CODES, "bytes")),
    "huge shape": (change_header(huge), (WEIGHTS, CODES)),
    "negative shape": (change_header(lambda header: header[CODES].update(shape=[-128, -192])), (WEIGHTS, CODES)),
    "shape of booleans": (change_header(lambda header: header[CODES].update(shape=[True, True])), (WEIGHTS, CODES)),
    "shape of floats": (change_header(lambda header: header[CODES].update(shape=[128.0, 192.0])), (WEIGHTS, CODES)),
    "shape is a string": (change_header(lambda header: header[CODES].update(shape="128")), (WEIGHTS, CODES)),
    "unknown dtype": (change_header(lambda header: header[CODES].update(dtype="I5")), (WEIGHTS, CODES, "I5")),
    "dtype is a number": (change_header(lambda header: header[CODES].update(dtype=8)), (WEIGHTS, CODES)),
    "missing key": (change_header(lambda header: header[CODES].pop("dtype")), (WEIGHTS, CODES)),
    "unknown key": (change_header(lambda header: header[CODES].update(strides=[1, 1])), (WEIGHTS, CODES)),
    "tensor is null": (change_header(lambda header: header.update({CODES: None})), (WEIGHTS, CODES)),
    "metadata of numbers": (change_header(lambda header: header.update(__metadata__={"format": 1})), (WEIGHTS, "__metadata__")),
}

VALUES: dict[str, tuple[Attack, tuple[str, ...]]] = {
    "NaN scale": (put(SCALES, float("nan")), (LAYER, "nan")),
    "infinite scale": (put(SCALES, float("inf")), (LAYER, "inf")),
    "non-integral zero point": (put(OFFSETS, 0.5), (LAYER, "0.5")),
    "zero point above the range": (put(OFFSETS, 8.0), (LAYER, "8")),
    "zero point below the range": (put(OFFSETS, -9.0), (LAYER, "-9")),
    "NaN zero point": (put(OFFSETS, float("nan")), (LAYER, "nan")),
    "infinite zero point": (put(OFFSETS, float("-inf")), (LAYER, "inf")),
    "code above the range": (put(CODES, 8), (LAYER, "8")),
    "code below the range": (put(CODES, -9), (LAYER, "-9")),
    "NaN bias": (tensors(lambda stored: stored["model.layers.0.self_attn.q_proj.bias"].__setitem__(7, np.nan)), ("q_proj", "nan")),
    "packed codes that claim to be unpacked": (
        put_tensor(CODES, lambda codes: pack_nibbles(codes, along_out=True)),
        (LAYER,),
    ),
}

SHAPES: dict[str, tuple[Attack, tuple[str, ...]]] = {
    "scales of other rows": (put_tensor(SCALES, lambda scales: scales[:-1]), (LAYER,)),
    "groups that do not divide the inputs": (put_tensor(SCALES, lambda scales: np.ones((128, 5), np.float32)), (LAYER,)),
    "no groups": (put_tensor(SCALES, lambda scales: scales[:, :0]), (LAYER,)),
    "more groups than inputs": (put_tensor(SCALES, lambda scales: np.ones((128, 400), np.float32)), (LAYER,)),
    "scales in three dimensions": (put_tensor(SCALES, lambda scales: scales[None]), (LAYER,)),
    "a scalar scale": (put_tensor(SCALES, lambda scales: scales[0, 0].reshape(())), (LAYER,)),
    "integer scales": (put_tensor(SCALES, lambda scales: scales.astype(np.int32)), (LAYER, "I32")),
    "offsets of other groups": (put_tensor(OFFSETS, lambda offsets: offsets[:, :1]), (LAYER,)),
    "codes in three dimensions": (put_tensor(CODES, lambda codes: codes[None]), (LAYER,)),
    "float codes": (put_tensor(CODES, lambda codes: codes.astype(np.float16)), (LAYER, "F16")),
    "no codes": (put_tensor(CODES, lambda codes: codes[:0]), (LAYER,)),
    "bias of another length": (
        tensors(lambda stored: stored.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(5, np.float32)})),
        ("model.layers.0.self_attn.q_proj",),
    ),
}

DESCRIPTIONS: dict[str, tuple[Attack, tuple[str, ...]]] = {
    "missing tensor": (tensors(lambda stored: stored.pop("model.norm.weight")), (DESCRIPTION, "model.norm.weight")),
    "missing scales": (tensors(lambda stored: stored.pop(SCALES)), (LAYER,)),
    "scales described and stored nowhere": (
        lambda source: (
            change_tensors(weight_file(source), lambda stored: stored.pop(SCALES)),
            change_json(description_file(source), lambda document: document.pop(SCALES)),
        ),
        (LAYER,),
    ),
    "unknown type": (description(lambda document: document.update({CODES: "W3A16"})), (DESCRIPTION, CODES, "W3A16")),
    "list": (description_text("[]"), (DESCRIPTION, "list")),
    "null": (description_text("null"), (DESCRIPTION,)),
    "empty file": (description_text(""), (DESCRIPTION, "JSON")),
    "half a file": (description_text('{"model_quant_type": "W4A16", '), (DESCRIPTION, "JSON")),
    "duplicate keys": (description_text(f'{{"{CODES}": "W4A16", "{CODES}": "FLOAT"}}'), (DESCRIPTION, "twice")),
    "type is a number": (description(lambda document: document.update({CODES: 4})), (CODES,)),
    "type is null": (description(lambda document: document.update({CODES: None})), (CODES,)),
    "type is a list": (description(lambda document: document.update({CODES: ["W4A16"]})), (CODES,)),
    "codes described as float": (description(lambda document: document.update({CODES: "FLOAT"})), (CODES,)),
    "codes that are not described": (description(lambda document: document.pop(CODES)), (CODES,)),
    "two descriptions": (
        lambda source: (source / "quant_model_description.json").write_bytes(description_file(source).read_bytes()),
        ("quant_model_description.json", DESCRIPTION),
    ),
    "two weight files": (
        lambda source: (source / "quant_model_weight_w8a16.safetensors").write_bytes(weight_file(source).read_bytes()),
        ("2 .safetensors files",),
    ),
    "no weight file": (lambda source: weight_file(source).unlink(), ("no .safetensors file",)),
    "config is a list": (lambda source: (source / "config.json").write_text("[]", "utf-8"), ("config.json", "list")),
    "config is no JSON": (lambda source: (source / "config.json").write_text("{", "utf-8"), ("config.json",)),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_msmodelslim(tmp_path / "source", model(blocks=1))


@pytest.mark.parametrize("attack", HEADERS)
def test_hostile_header(attack: str, source: Path) -> None:
    HEADERS[attack][0](source)
    refused(source, "awq", HEADERS[attack][1])


@pytest.mark.parametrize("target", ["awq", "gptq", "dense"])
@pytest.mark.parametrize("attack", VALUES)
def test_values_that_no_tool_writes(attack: str, target: str, source: Path) -> None:
    VALUES[attack][0](source)
    refused(source, target, VALUES[attack][1])


@pytest.mark.parametrize("attack", SHAPES)
def test_shapes_that_contradict_one_another(attack: str, source: Path) -> None:
    SHAPES[attack][0](source)
    refused(source, "gptq", SHAPES[attack][1])


@pytest.mark.parametrize("attack", DESCRIPTIONS)
def test_description_that_contradicts_the_weights(attack: str, source: Path) -> None:
    DESCRIPTIONS[attack][0](source)
    refused(source, "awq", DESCRIPTIONS[attack][1])


@pytest.mark.parametrize("row", [31, 40, 127])
@pytest.mark.parametrize("proof", ["--proof", "--no-proof"])
def test_code_out_of_range_is_found_wherever_it_is(row: int, proof: str, source: Path) -> None:
    """Beyond the rows that the plan samples, too."""

    def change(stored: Tensors) -> None:
        stored[CODES][row, 100] = 8

    change_tensors(weight_file(source), change)
    result = CliRunner().invoke(app, ["convert", str(source), str(source.parent / "out"), "--to", "gptq", proof])
    assert result.exit_code == 5
    assert LAYER in result.stderr
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_undamaged_source_converts(source: Path, tmp_path: Path) -> None:
    """What the attacks start from; and rewriting a file unchanged is no attack."""
    change_tensors(weight_file(source), lambda stored: None)
    change_json(description_file(source), lambda document: None)
    assert convert(source, tmp_path / "out", "awq").source_fingerprint is not None


# --- shards -----------------------------------------------------------------------------------------------------------

INDEX = "quant_model_weight_w4a16.safetensors.index.json"
SHARD = "quant_model_weight_w4a16-00002-of-00003.safetensors"


def index(change: Callable[[Header], object]) -> Attack:
    return lambda source: change_json(source / INDEX, change)


def moved(name: str) -> Callable[[Header], None]:
    """Say that the tensors of one shard are in the file ``name``."""

    def change(document: Header) -> None:
        weight_map = document["weight_map"]
        weight_map.update({tensor: name for tensor, shard in weight_map.items() if shard == SHARD})

    return change


def swap(document: Header) -> None:
    """Say that two tensors are in one another's shards."""
    weight_map = document["weight_map"]
    first, *_, second = weight_map
    assert weight_map[first] != weight_map[second]
    weight_map[first], weight_map[second] = weight_map[second], weight_map[first]


def duplicate(source: Path) -> None:
    """One tensor in two shards."""
    change_tensors(source / SHARD, lambda stored: stored.update({CODES: np.zeros((128, 192), np.int8)}))
    first = source / SHARD.replace("00002", "00001")
    change_tensors(first, lambda stored: stored.update({CODES: np.zeros((128, 192), np.int8)}))


INDEXES: dict[str, tuple[Attack, tuple[str, ...]]] = {
    "parent folder": (index(moved(f"../secret/{SHARD}")), (INDEX, "leaves the folder")),
    "absolute path": (lambda source: change_json(source / INDEX, moved(str(source / SHARD))), (INDEX, "leaves the folder")),
    "sub-folder": (index(moved(f"shards/{SHARD}")), (INDEX, "leaves the folder")),
    "dots": (index(moved("..")), (INDEX, "leaves the folder")),
    "backslashes": (index(moved(f"..\\{SHARD}")), (INDEX, "leaves the folder")),
    "zero byte": (index(moved(f"{SHARD}\0")), (INDEX, "leaves the folder")),
    "empty name": (index(moved("")), (INDEX,)),
    "missing shard": (lambda source: (source / SHARD).unlink(), (INDEX, SHARD)),
    "shard is a folder": (lambda source: ((source / SHARD).unlink(), (source / SHARD).mkdir()), (INDEX, SHARD)),
    "truncated shard": (lambda source: (source / SHARD).write_bytes((source / SHARD).read_bytes()[:-1]), (SHARD, "truncated")),
    "tensor that no shard has": (index(lambda document: document["weight_map"].update(more=SHARD)), (INDEX, "more")),
    "tensor of another shard": (index(swap), (INDEX,)),
    "tensor that is not listed": (index(lambda document: document["weight_map"].pop(CODES)), (INDEX, CODES)),
    "tensor in two shards": (duplicate, (CODES,)),
    "weight_map is a list": (index(lambda document: document.update(weight_map=[])), (INDEX, "weight_map")),
    "weight_map is missing": (index(lambda document: document.pop("weight_map")), (INDEX, "weight_map")),
    "weight_map is empty": (index(lambda document: document.update(weight_map={})), ("does not list",)),
    "shard is a number": (index(lambda document: document["weight_map"].update({CODES: 2})), (INDEX, "weight_map")),
    "index is no JSON": (lambda source: (source / INDEX).write_text("{", "utf-8"), (INDEX, "JSON")),
    "two indexes": (
        lambda source: (source / INDEX.replace("w4a16", "w8a16")).write_bytes((source / INDEX).read_bytes()),
        ("several indexes",),
    ),
}


@pytest.mark.parametrize("attack", INDEXES)
def test_hostile_index(attack: str, tmp_path: Path) -> None:
    source = write_msmodelslim(tmp_path / "source", model(blocks=1), shards=3)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / SHARD).write_bytes((source / SHARD).read_bytes())
    INDEXES[attack][0](source)
    refused(source, "gptq", INDEXES[attack][1])


# --- AWQ and GPTQ sources ---------------------------------------------------------------------------------------------


def g_idx(value: int) -> Attack:
    return tensors(lambda stored: stored[f"{LAYER}.g_idx"].__setitem__(5, value))


def config(change: Callable[[Header], object]) -> Attack:
    """Change the quantization config in every file that says it."""

    def attack(source: Path) -> None:
        change_json(source / "config.json", lambda document: change(document["quantization_config"]))
        if (source / "quantize_config.json").exists():
            change_json(source / "quantize_config.json", change)

    return attack


BOTH: dict[str, tuple[Attack, tuple[str, ...]]] = {
    "group_size contradicts the shapes": (config(lambda document: document.update(group_size=32)), ("group_size 64", "32")),
    "group_size is a word": (config(lambda document: document.update(group_size="many")), ("many",)),
    "bits contradict the shapes": (config(lambda document: document.update(bits=3)), ("3",)),
    "missing qzeros": (tensors(lambda stored: stored.pop(f"{LAYER}.qzeros")), (LAYER, "qzeros")),
    "missing scales": (tensors(lambda stored: stored.pop(f"{LAYER}.scales")), (LAYER, "scales")),
    "missing qweight": (tensors(lambda stored: stored.pop(f"{LAYER}.qweight")), (LAYER, "qweight")),
    "qzeros of other groups": (put_tensor(f"{LAYER}.qzeros", lambda zeros: zeros[:-1]), (LAYER,)),
    "qzeros too narrow": (put_tensor(f"{LAYER}.qzeros", lambda zeros: zeros[:, :-1]), (LAYER,)),
    "scales of other outputs": (put_tensor(f"{LAYER}.scales", lambda scales: scales[:, :-8]), (LAYER,)),
    "scales of no groups": (put_tensor(f"{LAYER}.scales", lambda scales: scales[:0]), (LAYER,)),
    "scales in one dimension": (put_tensor(f"{LAYER}.scales", lambda scales: scales[0]), (LAYER,)),
    "NaN scale": (put(f"{LAYER}.scales", float("nan")), (LAYER, "nan")),
    "qweight is float": (put_tensor(f"{LAYER}.qweight", lambda words: words.astype(np.float32)), (LAYER, "F32")),
    "quantization_config is a list": (
        lambda source: change_json(source / "config.json", lambda document: document.update(quantization_config=[1])),
        ("quantization_config", "list"),
    ),
}
GPTQ_ONLY: dict[str, tuple[Attack, tuple[str, ...]]] = {
    "g_idx too large": (g_idx(3), (LAYER, "g_idx")),
    "g_idx negative": (g_idx(-1), (LAYER, "g_idx")),
    "g_idx too short": (put_tensor(f"{LAYER}.g_idx", lambda groups: groups[:-1]), (LAYER, "g_idx")),
    "g_idx is int64": (put_tensor(f"{LAYER}.g_idx", lambda groups: groups.astype(np.int64)), (LAYER, "g_idx")),
}
QUANTIZED = [("awq", attack) for attack in BOTH] + [("gptq", attack) for attack in (*BOTH, *GPTQ_ONLY)]


@pytest.mark.parametrize(("format_", "attack"), QUANTIZED)
def test_hostile_awq_and_gptq_sources(format_: str, attack: str, tmp_path: Path) -> None:
    original = write_msmodelslim(tmp_path / "original", model(blocks=1))
    convert(original, tmp_path / "source", format_)
    (tmp_path / "source" / "weighbridge.json").unlink()
    change, words = {**BOTH, **GPTQ_ONLY}[attack]
    change(tmp_path / "source")
    refused(tmp_path / "source", "gptq" if format_ == "awq" else "awq", words)


def test_layer_of_odd_inputs_is_no_crash(tmp_path: Path) -> None:
    """It is read, and refused by its size."""
    made = model(blocks=1, strategy="channel")
    odd = Linear(4, np.zeros((33, 31), np.int8), np.ones((33, 1), np.float32), np.zeros((33, 1), np.float32))
    source = write_msmodelslim(tmp_path / "source", made._replace(linears={**made.linears, LAYER: odd}))
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), "--to", "awq"])
    assert result.exit_code == 3
    assert LAYER in result.stderr
