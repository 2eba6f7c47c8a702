"""Hostile sources by number: how each one is made. ``fixtures/attacks/README.md`` says what each is and what must happen.

Small ones are kept as folders in ``fixtures/attacks``; ``python tests/attacks.py`` writes them again. What is large, or no plain
file (pipes, devices, links), is made when a test runs: the functions under ``MADE``.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import DTYPES, FIXTURES, NAMES, Tensors

FOLDER = FIXTURES / "attacks"
Files = dict[str, bytes]
Json = dict[str, Any]
Change = Callable[[Files], object]

MODEL, CONFIG, QUANTIZE, INDEX = "model.safetensors", "config.json", "quantize_config.json", "model.safetensors.index.json"
WEIGHTS, DESCRIPTION = "quant_model_weight_w4a16.safetensors", "quant_model_description_w4a16.json"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
LAYER, NORM = "model.layers.0.self_attn.o_proj", "model.norm.weight"
OUT, IN, GROUP = 32, 64, 32


# --- the sound checkpoints that attacks start from: one linear and one norm ---------------------------------------------


def _stored(header: Json | str, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def _file(tensors: Tensors) -> bytes:
    header: Json = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        part = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    return _stored(header, data)


def _taken_apart(content: bytes) -> tuple[Json, bytes]:
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def _tensors(content: bytes) -> Tensors:
    header, data = _taken_apart(content)
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(entry["shape"]).copy()
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _scales(shape: tuple[int, int], dtype: str) -> Any:
    return np.full(shape, 0.0078125, DTYPES[dtype])


def _words(shape: tuple[int, int]) -> Any:
    return np.full(shape, 0x76543210, "<i4")


def _zeros(shape: tuple[int, int], lane: int) -> Any:
    return np.full(shape, 0x11111111 * lane, "<u4").view("<i4")


_GROUPS = IN // GROUP
_NORM = {NORM: np.ones(OUT, "<f2")}
_MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16"}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}


def _json(document: Any) -> bytes:
    return json.dumps(document).encode()


def awq() -> Files:
    layer = {"qweight": _words((IN, OUT // 8)), "qzeros": _zeros((_GROUPS, OUT // 8), 8), "scales": _scales((_GROUPS, OUT), "F16")}
    tensors = {f"{LAYER}.{part}": array for part, array in layer.items()}
    return {MODEL: _file({**tensors, **_NORM}), CONFIG: _json({**_MODEL, "quantization_config": _AWQ})}


def gptq() -> Files:
    layer = {
        "qweight": _words((IN // 8, OUT)),
        "qzeros": _zeros((_GROUPS, OUT // 8), 7),
        "scales": _scales((_GROUPS, OUT), "F16"),
        "g_idx": (np.arange(IN) // GROUP).astype("<i4"),
    }
    tensors = {f"{LAYER}.{part}": array for part, array in layer.items()}
    config = {**_MODEL, "quantization_config": _GPTQ}
    return {MODEL: _file({**tensors, **_NORM}), CONFIG: _json(config), QUANTIZE: _json(_GPTQ)}


def gemv() -> Files:
    layer = {"qweight": _words((OUT, IN // 8)), "qzeros": _zeros((OUT, 4), 8), "scales": _scales((OUT, 32), "F16")}
    tensors = {f"{LAYER}.{part}": array for part, array in layer.items()}
    return {MODEL: _file({**tensors, **_NORM}), CONFIG: _json({**_MODEL, "quantization_config": {**_AWQ, "version": "gemv"}})}


def slim() -> Files:
    """msModelSlim."""
    codes = (np.arange(OUT * IN) % 16 - 8).astype("i1").reshape(OUT, IN)
    scales = _scales((OUT, _GROUPS), "F32")
    layer = {"weight": codes, "weight_scale": scales, "weight_offset": np.zeros_like(scales)}
    tensors = {f"{LAYER}.{part}": array for part, array in layer.items()}
    types = {"model_quant_type": "W4A16", **dict.fromkeys(tensors, "W4A16"), NORM: "FLOAT"}
    return {WEIGHTS: _file({**tensors, **_NORM}), DESCRIPTION: _json(types), CONFIG: _json(_MODEL)}


def shards() -> Files:
    """awq in two files with their index."""
    files = awq()
    tensors = _tensors(files.pop(MODEL))
    norm = {NORM: tensors.pop(NORM)}
    weight_map = {**dict.fromkeys(tensors, FIRST), NORM: SECOND}
    size = sum(array.nbytes for array in (*tensors.values(), *norm.values()))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    return {**files, FIRST: _file(tensors), SECOND: _file(norm), INDEX: _json(index)}


# --- ways to bend them --------------------------------------------------------------------------------------------------


def _weights(files: Files) -> str:
    return next(name for name in files if name.endswith(".safetensors"))


def content(change: Callable[[bytes], bytes]) -> Change:
    """The weight file's bytes."""
    return lambda files: files.update({(name := _weights(files)): change(files[name])})


def text(change: Callable[[str], str]) -> Change:
    """The header's text."""

    def apply(files: Files) -> None:
        header, data = _taken_apart(files[name := _weights(files)])
        files[name] = _stored(change(json.dumps(header)), data)

    return apply


def header(change: Callable[[Json], object]) -> Change:
    def apply(files: Files) -> None:
        document, data = _taken_apart(files[name := _weights(files)])
        change(document)
        files[name] = _stored(document, data)

    return apply


def entry(tensor: str, **keys: Any) -> Change:
    """Keys of one tensor's entry in the header."""
    return header(lambda document: document[tensor].update(keys))


def more(tensor: str, dtype: str, shape: list[int], data: bytes = b"") -> Change:
    """One tensor more, after the others."""

    def apply(files: Files) -> None:
        document, stored = _taken_apart(files[name := _weights(files)])
        document[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [len(stored), len(stored) + len(data)]}
        files[name] = _stored(document, stored + data)

    return apply


def renamed(change: Callable[[str], str]) -> Change:
    """The layer under another name."""

    def apply(files: Files) -> None:
        document, data = _taken_apart(files[name := _weights(files)])
        new = {change(key) if key.startswith(LAYER) else key: value for key, value in document.items()}
        files[name] = _stored(new, data)

    return apply


def tensors(change: Callable[[Tensors], object]) -> Change:
    def apply(files: Files) -> None:
        stored = _tensors(files[name := _weights(files)])
        change(stored)
        files[name] = _file(stored)

    return apply


def part(leaf: str, make: Callable[[Any], Any]) -> Change:
    """One tensor of the layer."""
    return tensors(lambda stored: stored.update({f"{LAYER}.{leaf}": make(stored[f"{LAYER}.{leaf}"])}))


def one(leaf: str, value: float) -> Change:
    """One element, not the first, of a tensor of the layer."""
    return tensors(lambda stored: stored[f"{LAYER}.{leaf}"].__setitem__((-1,) * stored[f"{LAYER}.{leaf}"].ndim, value))


def gone(leaf: str) -> Change:
    return tensors(lambda stored: stored.pop(f"{LAYER}.{leaf}"))


def bias(array: Any) -> Change:
    return tensors(lambda stored: stored.update({f"{LAYER}.bias": array}))


def put(name: str, said: bytes | str | Any) -> Change:
    """A file of these bytes, this text, or this JSON."""
    raw = said if isinstance(said, bytes) else said.encode() if isinstance(said, str) else _json(said)
    return lambda files: files.update({name: raw})


def said(name: str, change: Callable[[Json], object]) -> Change:
    """A JSON object."""

    def apply(files: Files) -> None:
        document = json.loads(files[name])
        change(document)
        files[name] = _json(document)

    return apply


def config(**keys: Any) -> Change:
    return said(CONFIG, lambda document: document.update(keys))


def quantized(**keys: Any) -> Change:
    """The quantization config, wherever it stands."""

    def apply(files: Files) -> None:
        document = json.loads(files[CONFIG])
        document["quantization_config"].update(keys)
        files[CONFIG] = _json(document)
        if QUANTIZE in files:
            files[QUANTIZE] = _json({**json.loads(files[QUANTIZE]), **keys})

    return apply


def raw(name: str, old: str, new: str) -> Change:
    """JSON that Python would not write."""

    def apply(files: Files) -> None:
        assert old.encode() in files[name]
        files[name] = files[name].replace(old.encode(), new.encode(), 1)

    return apply


def described(**types: Any) -> Change:
    return said(DESCRIPTION, lambda document: document.update(types))


def moved(shard: Any) -> Change:
    """The index says that the norm is in ``shard``."""
    return said(INDEX, lambda document: document["weight_map"].update({NORM: shard}))


def also(*changes: Change) -> Change:
    return lambda files: [change(files) for change in changes]


def _deep(levels: int) -> str:
    return "[" * levels + "]" * levels


ESCAPES = "\x1b[2J\x1b]0;title\x07"
LONG = "x" * 50_000
WEIGHT, SCALES = f"{LAYER}.qweight", f"{LAYER}.scales"
SIZE = 1024 + 32 + 128 + 64
"""Bytes of data of ``awq``."""
RUNS = {f"-:^(a+)+{tail}$": {} for tail in "bcd"}
PAYLOAD = b"cos\nmkdir\n(S'payload-ran'\ntR."
"""A pickle that makes a folder when it is loaded."""

SMALL: dict[str, tuple[Callable[[], Files], Change]] = {
    # 0xx: the weight file's header
    "001-empty-file": (awq, content(lambda was: b"")),
    "002-seven-bytes": (awq, content(lambda was: was[:7])),
    "003-length-of-2-63": (awq, content(lambda was: struct.pack("<Q", 1 << 63) + was[8:])),
    "004-length-beyond-the-file": (awq, content(lambda was: struct.pack("<Q", len(was) - 7) + was[8:])),
    "008-not-json": (awq, text(lambda was: "!" + was[1:])),
    "009-not-utf-8": (awq, content(lambda was: was[:9] + b"\xff" + was[10:])),
    "010-byte-order-mark": (awq, text(lambda was: "\ufeff" + was)),
    "011-nesting": (awq, text(lambda was: was[:-1] + f', "x": {_deep(100_000)}}}')),
    "012-tensor-twice": (awq, text(lambda was: was[:-1] + f', "{NORM}": {{"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}}}')),
    "013-key-twice-inside": (awq, text(lambda was: was.replace('"dtype"', '"dtype": "I8", "dtype"', 1))),
    "014-header-is-a-list": (awq, text(lambda was: f"[{was}]")),
    "015-nan-in-a-shape": (awq, text(lambda was: was.replace('"shape": [', '"shape": [NaN, ', 1))),
    "016-number-of-400-digits": (awq, entry(NORM, shape=[10**400])),
    "017-number-of-5000-digits": (awq, text(lambda was: was.replace('"shape": [', f'"shape": [{"9" * 5000}, ', 1))),
    "018-shape-of-floats": (awq, entry(NORM, shape=[32.0])),
    "019-shape-of-booleans": (awq, entry(NORM, shape=[True, 32])),
    "020-negative-shape": (awq, entry(WEIGHT, shape=[-64, -4])),
    "021-shape-is-text": (awq, entry(NORM, shape="32")),
    "022-2-60-elements": (awq, entry(NORM, shape=[1 << 30, 1 << 30])),
    "023-elements-overflow-2-64": (awq, entry(NORM, shape=[1 << 32, 1 << 32, 32])),
    "024-rank-33": (awq, entry(NORM, shape=[1] * 32 + [32])),
    "025-no-elements-in-2-50-rows": (awq, more("model.extra.weight", "F16", [1 << 50, 0])),
    "026-no-elements-in-2-50-columns": (awq, more("model.extra.weight", "F16", [0, 1 << 50])),
    "027-odd-f4": (awq, more("model.extra.weight", "F4", [3], b"xx")),
    "028-overlap": (awq, header(lambda was: was[NORM].update(data_offsets=[SIZE - 72, SIZE - 8]))),
    "029-gap": (awq, header(lambda was: was[NORM].update(data_offsets=[SIZE - 56, SIZE + 8]))),
    "030-bytes-after-the-last-tensor": (awq, content(lambda was: was + b"more")),
    "031-offsets-the-wrong-way": (awq, header(lambda was: was[NORM]["data_offsets"].reverse())),
    "032-offsets-beyond-the-file": (awq, entry(NORM, data_offsets=[1 << 40, (1 << 40) + 64])),
    "033-negative-offsets": (awq, entry(NORM, data_offsets=[-64, 0])),
    "034-three-offsets": (awq, entry(NORM, data_offsets=[SIZE - 64, SIZE, SIZE])),
    "035-offsets-beyond-2-64": (awq, entry(NORM, data_offsets=[(1 << 64) + SIZE - 64, (1 << 64) + SIZE])),
    "036-unknown-dtype": (awq, entry(NORM, dtype="I5")),
    "037-dtype-is-a-number": (awq, entry(NORM, dtype=16)),
    "038-dtype-is-a-list": (awq, entry(NORM, dtype=["F16"])),
    "039-unknown-key": (awq, entry(NORM, strides=[1])),
    "040-missing-key": (awq, header(lambda was: was[NORM].pop("dtype"))),
    "041-tensor-is-null": (awq, header(lambda was: was.update({NORM: None}))),
    "042-metadata-is-nested": (awq, header(lambda was: was.update(__metadata__={"format": {"pt": 1}}))),
    "043-half-a-surrogate-in-a-name": (awq, renamed(lambda name: name.replace("o_proj", "\ud800"))),
    "044-zero-byte-in-a-name": (awq, renamed(lambda name: name.replace("o_proj", "o\0proj"))),
    "045-terminal-escapes-in-a-name": (awq, also(renamed(lambda name: name.replace("o_proj", ESCAPES)), quantized(group_size=64))),
    "046-line-breaks-in-a-name": (awq, also(renamed(lambda name: name.replace("o_proj", "\r\nok\u2028\x85")), quantized(group_size=64))),
    "047-name-of-50000-letters": (awq, also(renamed(lambda name: name.replace("o_proj", LONG)), quantized(group_size=64))),
    "048-markup-in-a-name": (awq, renamed(lambda name: name.replace("o_proj", "[/bold][link=file:///etc/passwd]:boom:"))),
    "049-empty-name": (awq, more("", "F16", [0])),
    "050-layer-without-a-name": (awq, renamed(lambda name: name.replace(f"{LAYER}.", ""))),
    "051-path-as-a-name": (awq, renamed(lambda name: name.replace(LAYER, "../../../etc/passwd"))),
    "052-infinite-number": (awq, text(lambda was: was.replace('"shape": [', '"shape": [1e999, ', 1))),
    "053-shape-of-lists": (awq, entry(NORM, shape=[[32]])),
    "054-offsets-of-text": (awq, entry(NORM, data_offsets=["0", "64"])),
    "055-text-direction-in-a-name": (awq, also(renamed(lambda name: name.replace("o_proj", "\u202egnp.exe")), quantized(group_size=64))),
    "058-header-is-a-number": (awq, text(lambda was: "9" * 4000)),
    "059-no-tensors": (awq, lambda files: files.update({MODEL: _stored("{}", b"")})),
    "060-layer-of-2-50-rows-and-no-columns": (awq, header(lambda was: _empty(was, [1 << 50, 0]))),
    # 1xx: tensors that contradict one another, or hold what no tool writes
    "101-scale-is-nan": (awq, one("scales", float("nan"))),
    "102-scale-is-infinite": (gptq, one("scales", float("inf"))),
    "103-scale-is-nan-in-msmodelslim": (slim, one("weight_scale", float("nan"))),
    "104-negative-scale": (gptq, one("scales", -0.5)),
    "105-scale-of-zero": (slim, one("weight_scale", 0.0)),
    "106-bias-of-another-length": (awq, bias(np.zeros(31, "<f2"))),
    "107-bias-of-integers": (gptq, bias(np.ones(32, "<i4"))),
    "108-bias-is-nan": (awq, bias(np.full(32, np.nan, "<f2"))),
    "109-bias-in-two-dimensions": (gptq, bias(np.ones((1, 32), "<f2"))),
    "110-qzeros-of-other-groups": (awq, part("qzeros", lambda zeros: zeros[:1])),
    "111-qzeros-too-wide": (gptq, part("qzeros", lambda zeros: np.tile(zeros, (1, 3)))),
    "112-qzeros-missing": (awq, gone("qzeros")),
    "113-scales-missing": (gptq, gone("scales")),
    "114-qweight-missing": (awq, gone("qweight")),
    "115-qweight-is-float": (awq, part("qweight", lambda words: words.view("<f4"))),
    "116-qweight-in-three-dimensions": (gptq, part("qweight", lambda words: words[None])),
    "117-g-idx-negative": (gptq, one("g_idx", -1)),
    "118-g-idx-too-large": (gptq, one("g_idx", 2)),
    "119-g-idx-smallest-int": (gptq, one("g_idx", -(1 << 31))),
    "120-g-idx-is-int64": (gptq, part("g_idx", lambda groups: groups.astype("<i8"))),
    "121-g-idx-too-short": (gptq, part("g_idx", lambda groups: groups[:-1])),
    "122-g-idx-of-one-group": (gptq, part("g_idx", np.zeros_like)),
    "123-zero-point-beyond-its-bits": (slim, one("weight_offset", 8)),
    "124-zero-point-is-nan": (slim, one("weight_offset", float("nan"))),
    "125-zero-point-between-integers": (slim, one("weight_offset", 0.5)),
    "126-code-beyond-its-bits": (slim, one("weight", -9)),
    "127-scales-are-one-number": (slim, part("weight_scale", lambda scales: scales[0, 0].reshape(()))),
    "128-scales-in-three-dimensions": (slim, part("weight_scale", lambda scales: scales[None])),
    "129-no-groups": (awq, part("scales", lambda scales: scales[:0])),
    "130-groups-that-do-not-divide": (slim, part("weight_scale", lambda scales: np.ones((OUT, 5), "<f4"))),
    "131-no-outputs": (gptq, tensors(lambda was: was.update({name: array[..., :0] for name, array in was.items() if array.ndim == 2}))),
    "132-zero-point-of-0-in-v1": (gptq, part("qzeros", lambda zeros: np.full_like(zeros, -1))),
    "133-codes-in-one-dimension": (slim, part("weight", lambda codes: codes.reshape(-1))),
    "134-qweight-is-one-number": (awq, part("qweight", lambda words: words[0, 0].reshape(()))),
    "135-more-groups-than-inputs": (awq, part("scales", lambda scales: np.tile(scales, (64, 1)))),
    # 2xx: configs
    "201-config-is-a-list": (awq, put(CONFIG, [])),
    "202-config-is-a-number-of-5000-digits": (awq, put(CONFIG, "9" * 5000)),
    "203-config-is-text": (awq, put(CONFIG, '"awq"')),
    "204-config-is-null": (gptq, put(CONFIG, "null")),
    "205-config-is-empty": (awq, put(CONFIG, "")),
    "206-config-is-half": (awq, put(CONFIG, '{"quantization_config": {')),
    "207-config-with-a-byte-order-mark": (awq, lambda files: files.update({CONFIG: b"\xef\xbb\xbf" + files[CONFIG]})),
    "208-config-in-utf-16": (awq, lambda files: files.update({CONFIG: files[CONFIG].decode().encode("utf-16")})),
    "209-config-nested": (awq, put(CONFIG, _deep(20_000))),
    "210-config-with-a-key-twice-inside": (awq, raw(CONFIG, '"bits": 4', '"bits": 4, "bits": 8')),
    "211-config-with-nan": (awq, raw(CONFIG, '"bits": 4', '"bits": NaN')),
    "212-quantization-config-is-a-list": (gptq, config(quantization_config=[1])),
    "213-quantization-config-is-text": (awq, config(quantization_config="awq")),
    "214-quantization-config-is-empty": (awq, config(quantization_config={})),
    "215-quantization-config-is-false": (awq, config(quantization_config=False)),
    "216-bits-are-a-word": (awq, quantized(bits="four")),
    "217-bits-are-true": (gptq, quantized(bits=True)),
    "218-bits-are-a-list": (gptq, quantized(bits=[4])),
    "219-bits-are-an-object": (gptq, quantized(bits={"4": 4})),
    "220-bits-are-a-list-in-awq": (awq, quantized(bits=[4])),
    "221-bits-are-infinite": (gptq, raw(CONFIG, '"bits": 4', '"bits": 1e999')),
    "222-bits-of-4000-digits": (gptq, quantized(bits=10**4000)),
    "223-group-size-0": (awq, quantized(group_size=0)),
    "224-group-size-negative": (gptq, quantized(group_size=-7)),
    "225-group-size-of-a-billion": (gptq, quantized(group_size=10**9)),
    "226-group-size-is-text": (awq, quantized(group_size="32")),
    "227-group-size-is-a-list": (gptq, quantized(group_size=[32])),
    "228-group-size-is-an-object": (awq, quantized(group_size={})),
    "229-group-size-is-a-fraction": (gptq, quantized(group_size=32.5)),
    "230-gemv-group-size-0": (gemv, quantized(group_size=0)),
    "231-gemv-group-size-1": (gemv, quantized(group_size=True)),
    "232-gemv-group-size-negative": (gemv, quantized(group_size=-32)),
    "233-gemv-group-size-is-a-list": (gemv, quantized(group_size=[32])),
    "234-gemv-without-group-size": (gemv, quantized(group_size=None)),
    "235-quant-method-is-a-list": (awq, quantized(quant_method=["awq"])),
    "236-version-is-an-object": (awq, quantized(version={"gemm": 1})),
    "237-format-is-a-list": (gptq, quantized(checkpoint_format=["gptq"])),
    "238-pack-dtype-is-a-list": (gptq, quantized(pack_dtype=["int32"])),
    "239-meta-is-a-list": (gptq, quantized(meta=[{"quantizer": 4}])),
    "240-desc-act-is-a-list": (gptq, quantized(desc_act=[0])),
    "241-lm-head-is-text": (gptq, quantized(lm_head="no")),
    "242-modules-to-not-convert-is-a-number": (awq, quantized(modules_to_not_convert=7)),
    "243-modules-to-not-convert-of-numbers": (awq, quantized(modules_to_not_convert=[1, None, {}])),
    "244-quantizer-is-an-object": (gptq, quantized(meta={"quantizer": {"gptqmodel": []}})),
    "245-dynamic-is-a-list": (gptq, quantized(dynamic=["-:.*"])),
    "246-dynamic-rule-is-a-list": (gptq, quantized(dynamic={".*": [8]})),
    "247-dynamic-bits-are-a-list": (gptq, quantized(dynamic={".*": {"bits": [4]}})),
    "248-dynamic-pattern-is-no-expression": (gptq, quantized(dynamic={"+:model.(": {"bits": 4}})),
    "249-dynamic-backtracks-without-end": (gptq, also(renamed(lambda name: "a" * 40 + name[len(LAYER) :]), quantized(dynamic=RUNS))),
    "250-dynamic-backtracks-in-powers": (
        gptq,
        also(renamed(lambda name: "a" * 4000 + name[len(LAYER) :]), quantized(dynamic={"-:" + ".*a" * 12 + "b": {}})),
    ),
    "251-dynamic-of-20000-parentheses": (gptq, quantized(dynamic={"-:" + "(" * 20_000 + ")" * 20_000: {}})),
    "252-dynamic-repeats-too-often": (gptq, quantized(dynamic={"-:a{99999999999999999999}": {}})),
    "253-dynamic-repeats-repeats": (gptq, quantized(dynamic={"-:(?:(?:(?:.{0,9999}){0,9999}){0,9999}){0,9999}b": {}})),
    "254-dynamic-refers-back": (gptq, quantized(dynamic={r"-:(m*)(o*)\1\2*x": {}})),
    "256-dynamic-with-an-obsolete-set": (gptq, quantized(dynamic={"-:[[a]--b]": {}})),
    "257-model-type-is-a-list": (gptq, config(model_type=["llama"])),
    "258-torch-dtype-is-a-list": (slim, config(torch_dtype=["float16"])),
    "259-torch-dtype-is-an-object": (gptq, config(torch_dtype={"": "float16"})),
    "260-name-is-a-number": (awq, config(_name_or_path=7)),
    "261-name-with-line-breaks": (awq, config(_name_or_path="org/name\n---\nlicense: mit")),
    "262-heads-are-text": (awq, config(num_key_value_heads="8", num_attention_heads=[], hidden_size={})),
    "263-attention-bias-is-a-list": (gptq, also(config(attention_bias=[0]), bias(np.zeros(32, "<f2")))),
    "264-quantize-config-is-a-list": (gptq, also(put(QUANTIZE, "[]"), config(quantization_config=None))),
    "265-quantize-config-contradicts": (gptq, put(QUANTIZE, {**_GPTQ, "bits": [8], "dynamic": 7, "group_size": "x"})),
    "266-old-config-of-lists": (
        awq,
        also(said(CONFIG, lambda was: was.pop("quantization_config")), put("quant_config.json", {"w_bit": [4], "q_group_size": {}})),
    ),
    "267-architectures-is-a-number": (slim, config(architectures=7, model_type=True)),
    "268-bits-of-50000-letters": (awq, quantized(bits=LONG)),
    "269-terminal-escapes-in-a-method": (awq, quantized(quant_method=ESCAPES)),
    "270-half-a-surrogate-in-a-config": (awq, raw(CONFIG, '"llama"', '"\\udfff"')),
    # 28x, 29x: msModelSlim's description
    "280-description-is-a-list": (slim, put(DESCRIPTION, "[]")),
    "281-description-is-null": (slim, put(DESCRIPTION, "null")),
    "282-description-is-half": (slim, put(DESCRIPTION, '{"model_quant_type": "W4A16", ')),
    "283-description-nested": (slim, put(DESCRIPTION, _deep(20_000))),
    "284-type-is-a-number": (slim, described(**{f"{LAYER}.weight": 4})),
    "285-type-is-a-list": (slim, described(**{f"{LAYER}.weight": ["W4A16"]})),
    "286-type-is-unknown": (slim, described(**{f"{LAYER}.weight": "W3A16"})),
    "287-type-with-terminal-escapes": (slim, described(**{f"{LAYER}.weight": ESCAPES})),
    "288-type-of-50000-letters": (slim, described(**{f"{LAYER}.weight": LONG})),
    "289-codes-described-as-float": (slim, described(**{f"{LAYER}.weight": "FLOAT"})),
    "290-tensor-that-no-file-holds": (slim, described(**{"../../etc/passwd.weight": "W4A16"})),
    "291-version-is-a-list": (slim, described(version=[1])),
    "292-keys-of-wrong-types": (slim, described(model_quant_type=[1], metadata=7, optional="x", group_size="many", kv_cache_type={})),
    "293-description-with-a-key-twice": (slim, raw(DESCRIPTION, '"model_quant_type"', f'"{NORM}": "W4A16", "model_quant_type"')),
    "294-two-descriptions": (slim, lambda files: files.update({"quant_model_description.json": files[DESCRIPTION]})),
    "295-everything-is-attention": (slim, described(**{f"{LAYER}.weight": "C8", NORM: "FAQuant"})),
    # 3xx: indexes
    "301-weight-map-is-a-list": (shards, said(INDEX, lambda was: was.update(weight_map=[]))),
    "302-weight-map-is-missing": (shards, said(INDEX, lambda was: was.pop("weight_map"))),
    "303-shard-is-a-number": (shards, moved(2)),
    "304-shard-is-null": (shards, moved(None)),
    "305-shard-in-the-parent-folder": (shards, moved(f"../{SECOND}")),
    "306-shard-by-absolute-path": (shards, moved("/etc/passwd")),
    "307-shard-is-the-parent-folder": (shards, moved("..")),
    "308-shard-with-backslashes": (shards, moved(f"..\\{SECOND}")),
    "309-shard-with-a-zero-byte": (shards, moved(f"{SECOND}\0")),
    "310-shard-with-terminal-escapes": (shards, moved(ESCAPES)),
    "311-shard-with-line-breaks": (shards, moved("a\nb")),
    "312-shard-of-300-letters": (shards, moved("x" * 300)),
    "313-shard-of-50000-letters": (shards, moved(LONG)),
    "314-shard-is-the-index-itself": (shards, moved(INDEX)),
    "315-shard-is-the-config": (shards, moved(CONFIG)),
    "316-shard-is-empty-text": (shards, moved("")),
    "317-shard-of-half-a-surrogate": (shards, raw(INDEX, SECOND, "\\udc80")),
    "318-tensor-that-no-shard-has": (shards, said(INDEX, lambda was: was["weight_map"].update(more=SECOND))),
    "319-tensor-in-another-shard": (shards, moved(FIRST)),
    "320-tensor-not-listed": (shards, said(INDEX, lambda was: was["weight_map"].pop(SCALES))),
    "321-tensor-in-two-shards": (shards, lambda files: files.update({SECOND: _file({**_tensors(files[FIRST]), **_NORM})})),
    "322-index-nested": (shards, put(INDEX, _deep(20_000))),
    "323-index-with-a-tensor-twice": (shards, raw(INDEX, f'"{NORM}"', f'"{NORM}": "{FIRST}", "{NORM}"')),
    "324-total-size-is-text": (shards, said(INDEX, lambda was: was.update(metadata={"total_size": "9" * 99}))),
    "325-metadata-is-a-list": (shards, said(INDEX, lambda was: was.update(metadata=[]))),
    "326-two-indexes": (shards, lambda files: files.update({"other.safetensors.index.json": files[INDEX]})),
    "327-shard-missing": (shards, lambda files: files.pop(SECOND)),
    "328-shard-cut-off": (shards, lambda files: files.update({SECOND: files[SECOND][:-1]})),
    "329-index-is-a-list": (shards, put(INDEX, "[]")),
    "330-tensor-name-with-terminal-escapes": (shards, said(INDEX, lambda was: was["weight_map"].update({ESCAPES: SECOND}))),
    # 5xx: pickles
    "501-pickle-with-a-payload": (awq, also(lambda files: files.pop(MODEL), put("pytorch_model.bin", PAYLOAD))),
    "502-pickle-named-safetensors": (awq, put(MODEL, PAYLOAD)),
    "503-pickles-of-an-index": (
        awq,
        also(
            lambda files: files.pop(MODEL),
            put("pytorch_model-00001-of-00001.bin", PAYLOAD),
            put("pytorch_model.bin.index.json", {"weight_map": {SCALES: "pytorch_model-00001-of-00001.bin"}}),
        ),
    ),
    "504-pickle-outside-the-folder": (
        awq,
        also(lambda files: files.pop(MODEL), put("pytorch_model.bin.index.json", {"weight_map": {SCALES: "../pytorch_model.bin"}})),
    ),
    "505-pickle-as-a-tokenizer": (awq, put("tokenizer.model", PAYLOAD)),
}


def _empty(was: Json, shape: list[int]) -> None:
    """The layer's qweight without elements, and the others moved down."""
    was[WEIGHT].update(shape=shape, data_offsets=[0, 0])
    was[f"{LAYER}.qzeros"].update(shape=[SIZE // 16, 4], data_offsets=[0, SIZE])
    was[SCALES].update(shape=[2, 0], data_offsets=[SIZE, SIZE])
    was[NORM].update(shape=[0], data_offsets=[SIZE, SIZE])


# --- what cannot be kept in the repository ------------------------------------------------------------------------------

Make = Callable[[Path], object]


def write(files: Files, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw_bytes in files.items():
        (folder / name).write_bytes(raw_bytes)
    return folder


def _header_over_the_limit(folder: Path) -> None:
    with (folder / MODEL).open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(8 + 100_000_001)


def _header_of_lists(folder: Path) -> None:
    """As many objects as a header of 100 MB can have."""
    room = 100_000_000 - len('{"x":[[]]}')
    _write_header(folder, '{"x":[' + "[]," * (room // 3) + "[]]}")


def _header_of_tensors(folder: Path) -> None:
    """Tensors without elements, 10 MB of them: every rule is kept."""
    entries = (f'"{number:07}":{{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}' for number in range(160_000))
    _write_header(folder, "{" + ",".join(entries) + "}")


def _write_header(folder: Path, said: str) -> None:
    (folder / MODEL).write_bytes(_stored(said, b""))


def _sparse(name: str, size: int) -> Make:
    """A file that says it has ``size`` bytes and takes no room."""
    return lambda folder: os.truncate(folder / name, size) if (folder / name).exists() else _hole(folder / name, size)


def _hole(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _terabyte_tensor(folder: Path) -> None:
    """Every rule is kept; the data is a hole."""
    document, _ = _taken_apart((folder / MODEL).read_bytes())
    document["model.extra.weight"] = {"dtype": "U8", "shape": [1 << 40], "data_offsets": [SIZE, SIZE + (1 << 40)]}
    content = _stored(document, b"")
    (folder / MODEL).write_bytes(content)
    os.truncate(folder / MODEL, len(content) + SIZE + (1 << 40))


def _instead(name: str, make: Callable[[Path], object]) -> Make:
    """Something else where the file was."""

    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return apply


def _link(name: str, target: str) -> Make:
    return _instead(name, lambda path: path.symlink_to(target))


def _secret(name: str, secret: bytes) -> Make:
    """A link to a file outside the folder."""

    def apply(folder: Path) -> None:
        (folder.parent / "secret").write_bytes(secret)
        _link(name, "../secret")(folder)

    return apply


def _outside(name: str) -> Make:
    """The file itself, outside the folder, and a link to it."""

    def apply(folder: Path) -> None:
        (folder / name).rename(folder.parent / "blob")
        (folder / name).symlink_to("../blob")

    return apply


def _socket(path: Path) -> None:
    """A socket; its path may be longer than a socket's address."""
    where = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{where}/{path.name}")
    os.close(where)


def _neighbours(folder: Path) -> None:
    """Files beside the weights whose names are no text, or speak to the terminal."""
    for name in (b"\xff\xfe.json", b"tokenizer\x1b[2J.model", b"line\nbreak.txt", b"tokenizer.\xff.model"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"{}")


def _many_modules(folder: Path) -> None:
    """A description of 20,000 layers of a type that is not read: work in the square of that would take minutes."""
    names = [f"model.layers.{number}.mlp.down_proj" for number in range(20_000)]
    entries = {f"{name}.weight": {"dtype": "I8", "shape": [0, 1], "data_offsets": [0, 0]} for name in names}
    (folder / WEIGHTS).write_bytes(_stored(entries, b""))
    (folder / DESCRIPTION).write_bytes(_json(dict.fromkeys(entries, "W4A4_DYNAMIC")))


def _many_patterns(folder: Path) -> None:
    """5,000 patterns for 2,000 layers: minutes of work in their product, were there no bound."""
    layer = {"qweight": _words((1, 8)), "qzeros": _zeros((1, 1), 7), "scales": _scales((1, 8), "F16")}
    every = {f"model.layers.{number}.mlp.down_proj.{part}": array for number in range(2000) for part, array in layer.items()}
    files = {MODEL: _file(every), **{name: (folder / name).read_bytes() for name in (CONFIG, QUANTIZE)}}
    quantized(group_size=-1, dynamic={f"-:.*x{number}.*y": {} for number in range(5000)})(files)
    write(files, folder)


def _bomb(folder: Path) -> None:
    """A zip whose pickle unpacks to 200 MB."""
    import zipfile

    (folder / MODEL).unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 100_000_000)


MADE: dict[str, tuple[Callable[[], Files], Make]] = {
    "005-header-over-100-mb": (awq, _header_over_the_limit),
    "006-header-of-100-mb-of-lists": (awq, _header_of_lists),
    "007-header-of-160000-tensors": (awq, _header_of_tensors),
    "056-terabyte-after-the-last-tensor": (awq, _sparse(MODEL, 1 << 40)),
    "057-terabyte-of-a-tensor": (awq, _terabyte_tensor),
    "255-dynamic-of-5000-patterns": (gptq, _many_patterns),
    "296-20000-layers-that-are-not-read": (slim, _many_modules),
    "401-weights-are-a-folder": (awq, _instead(MODEL, Path.mkdir)),
    "402-config-is-a-folder": (awq, _instead(CONFIG, Path.mkdir)),
    "403-weights-are-a-pipe": (awq, _instead(MODEL, os.mkfifo)),
    "404-config-is-a-pipe": (awq, _instead(CONFIG, os.mkfifo)),
    "405-description-is-a-pipe": (slim, _instead(DESCRIPTION, os.mkfifo)),
    "406-index-is-a-pipe": (shards, _instead(INDEX, os.mkfifo)),
    "407-shard-is-a-pipe": (shards, _instead(SECOND, os.mkfifo)),
    "408-weights-are-dev-zero": (awq, _link(MODEL, "/dev/zero")),
    "409-config-is-dev-zero": (awq, _link(CONFIG, "/dev/zero")),
    "410-shard-is-dev-zero": (shards, _link(SECOND, "/dev/zero")),
    "411-description-is-dev-zero": (slim, _link(DESCRIPTION, "/dev/zero")),
    "412-weights-link-to-themselves": (awq, _link(MODEL, MODEL)),
    "413-config-links-to-itself": (awq, _link(CONFIG, CONFIG)),
    "414-weights-link-to-nothing": (awq, _link(MODEL, "nothing")),
    "415-tokenizer-links-to-a-secret": (awq, _secret("tokenizer.json", b"secret")),
    "416-config-links-to-a-secret": (slim, _secret(CONFIG, b'{"token": "secret"}')),
    "417-tokenizer-is-a-pipe": (awq, _instead("tokenizer.json", os.mkfifo)),
    "418-tokenizer-is-dev-zero": (awq, _link("tokenizer.json", "/dev/zero")),
    "419-tokenizer-of-a-terabyte": (awq, _sparse("tokenizer.json", 1 << 40)),
    "420-config-of-a-terabyte": (awq, _sparse(CONFIG, 1 << 40)),
    "421-config-is-a-socket": (awq, _instead(CONFIG, _socket)),
    "422-tokenizer-is-a-folder": (awq, _instead("tokenizer.json", Path.mkdir)),
    "423-weights-link-outside": (awq, _outside(MODEL)),
    "424-shard-links-outside": (shards, _outside(SECOND)),
    "425-names-that-are-no-text": (awq, _neighbours),
    "426-tokenizer-links-to-nothing": (awq, _link("tokenizer.json", "nothing")),
    "506-pickle-that-unpacks-to-200-mb": (awq, _bomb),
}


def make(attack: str, folder: Path) -> Path:
    """The source of ``attack`` in ``folder``, which does not exist yet."""
    if attack in SMALL:
        return Path(shutil.copytree(FOLDER / attack, folder))
    base, change = MADE[attack]
    write(base(), folder)
    change(folder)
    return folder


def small(attack: str) -> Files:
    """The files of a small attack, made anew."""
    base, change = SMALL[attack]
    files = base()
    change(files)
    return files


def main() -> None:
    for attack in SMALL:
        shutil.rmtree(FOLDER / attack, ignore_errors=True)
        write(small(attack), FOLDER / attack)
    sys.stdout.write(f"{len(SMALL)} attacks in {FOLDER}\n")


if __name__ == "__main__":
    main()
