"""Small msModelSlim checkpoints with chosen numbers, and decoders of AWQ and GPTQ that share nothing with the project.

A ``Source`` collects tensors and their types and writes them as the tool does (weights, description, mode 0400). The decoders
are plain NumPy over the words of a file: no layout, reader or kernel of the project is used, so agreement with the source's
law, ``(weight - weight_offset) * weight_scale``, is agreement of two independent readings.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

DTYPES = {
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "F32": np.dtype("<f4"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

BLOCK = "model.layers.0"
O_PROJ = f"{BLOCK}.self_attn.o_proj"
DOWN = f"{BLOCK}.mlp.down_proj"
QKV = tuple(f"{BLOCK}.self_attn.{leaf}_proj" for leaf in "qkv")
GATE_UP = (f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj")
NORM = f"{BLOCK}.input_layernorm"

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Lane i of an AWQ word holds column AWQ_COLUMNS[i] of its eight."""

Tensors = dict[str, np.ndarray]


def write_safetensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Raw: an 8-byte length, the header, the data in the given order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values()))


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def read_safetensors(path: Path) -> Tensors:
    header, data = read_header(path)
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def exact_scales(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Scales of six significant bits, all different in a row of up to 32: exact in every float dtype."""
    count = int(np.prod(shape))
    return ((32 + np.arange(count) % 32) * 2.0**-12).astype(dtype).reshape(shape)


@dataclass
class Source:
    """An msModelSlim checkpoint in the making; ``write`` puts it into a folder.

    top   further top-level keys of the description; config: config.json beside it; version makes it ascendV1
    """

    tensors: Tensors = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    laws: dict[str, np.ndarray] = field(default_factory=dict)
    codes: dict[str, np.ndarray] = field(default_factory=dict)
    offsets: dict[str, np.ndarray] = field(default_factory=dict)

    def linear(
        self,
        name: str,
        shape: tuple[int, int] = (32, 128),
        group: int | str = "channel",
        *,
        bits: int = 4,
        scales: Any = None,
        offsets: Any = 0,
        dtype: Any = np.float32,
        bias: np.ndarray | None = None,
    ) -> Source:
        """Add a W4A16 or W8A16 layer [out, in].

        group    "tensor", "channel", or inputs per group; scales, offsets: broadcast to what that stores
        """
        out, in_ = shape
        stored = (1,) if group == "tensor" else (out, 1) if group == "channel" else (out, in_ // int(group))
        scale = exact_scales(stored, dtype) if scales is None else np.broadcast_to(np.asarray(scales, dtype), stored).copy()
        offset = np.broadcast_to(np.asarray(offsets, np.float64), stored).astype(dtype)
        random = np.random.default_rng(zlib.crc32(name.encode()))
        codes = random.integers(-(1 << bits - 1), 1 << bits - 1, size=shape, dtype=np.int8)
        kind = f"W{bits}A16"
        self.tensor(f"{name}.weight", codes, kind)
        self.tensor(f"{name}.weight_scale", scale, kind)
        self.tensor(f"{name}.weight_offset", offset, kind)
        if bias is not None:
            self.tensor(f"{name}.bias", bias)
        grid = (out, 1 if group in {"tensor", "channel"} else in_ // int(group))
        repeat = in_ // grid[1]
        wide = [np.repeat(np.broadcast_to(part.astype(np.float32), grid), repeat, axis=1) for part in (scale, offset)]
        with np.errstate(invalid="ignore"):  # hostile samples hold infinities and NaN
            self.laws[name] = wide[0] * (codes.astype(np.float32) - wide[1])
            self.codes[name], self.offsets[name] = codes, wide[1].astype(int)
        return self

    def tensor(self, name: str, array: np.ndarray, type_: str | None = "FLOAT") -> Source:
        """Add any tensor; type_ None leaves it out of the description."""
        self.tensors[name] = array
        if type_ is not None:
            self.types[name] = type_
        return self

    def floats(self, *names: str, shape: tuple[int, ...] = (32, 128), dtype: Any = np.float16) -> Source:
        """Add float tensors, ``.weight`` of linears by default."""
        for number, name in enumerate(names):
            values = (np.arange(int(np.prod(shape))) % 61 - 30 + number) / 64
            self.tensor(name, values.astype(dtype).reshape(shape))
        return self

    def write(self, folder: Path) -> Path:
        """The folder, with the weights read-only as the tool leaves them."""
        folder.mkdir(parents=True)
        weights = folder / "quant_model_weight_w4a16.safetensors"
        write_safetensors(weights, self.tensors)
        weights.chmod(0o400)
        description = {"model_quant_type": "W4A16", **self.types, **self.top}
        (folder / "quant_model_description_w4a16.json").write_text(json.dumps(description))
        if self.config is not None:
            (folder / "config.json").write_text(json.dumps(self.config))
        return folder


def one(group: int | str = "channel", **parts: Any) -> Source:
    """A checkpoint of one layer, ``O_PROJ``."""
    return Source().linear(O_PROJ, group=group, **parts)


def lanes(words: np.ndarray, bits: int) -> np.ndarray:
    """The unsigned fields of the words' last axis, lowest bits first."""
    fields = words.view("<u4")[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)
    return (fields & np.uint32((1 << bits) - 1)).reshape(*words.shape[:-1], -1).astype(np.int64)


def awq_lanes(words: np.ndarray) -> np.ndarray:
    """[rows, out] of an AWQ matrix [rows, out / 8]."""
    stored = lanes(words, 4).reshape(*words.shape, 8)
    columns = np.empty_like(stored)
    columns[..., list(AWQ_COLUMNS)] = stored
    return columns.reshape(words.shape[0], -1)


@dataclass(frozen=True)
class Decoded:
    """A layer read from a converted file: signed codes [out, in], zero points and float32 weights, all per weight."""

    codes: np.ndarray
    zeros: np.ndarray
    weights: np.ndarray


def decode_gptq(tensors: Tensors, name: str, bits: int = 4, version: int = 1) -> Decoded:
    """v1 zero points are lane + 1, without a mask: a lane that wrapped is seen as wrong."""
    codes = lanes(np.ascontiguousarray(tensors[f"{name}.qweight"].T), bits)
    zeros = lanes(tensors[f"{name}.qzeros"], bits) + (version == 1)
    group = tensors[f"{name}.g_idx"]
    return _decoded(codes, zeros.T[:, group], tensors[f"{name}.scales"].T[:, group], bits)


def decode_awq(tensors: Tensors, name: str) -> Decoded:
    codes = awq_lanes(tensors[f"{name}.qweight"]).T
    zeros, scales = awq_lanes(tensors[f"{name}.qzeros"]), tensors[f"{name}.scales"]
    group = np.arange(codes.shape[1]) // (codes.shape[1] // len(scales))
    return _decoded(codes, zeros.T[:, group], scales.T[:, group], 4)


def _decoded(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int) -> Decoded:
    half = 1 << bits - 1
    weights = scales.astype(np.float32) * (codes - zeros).astype(np.float32)
    return Decoded(codes - half, zeros - half, weights)


def assert_holds(tensors: Tensors, source: Source, name: str, target: str, bits: int = 4, version: int = 1) -> None:
    """The converted layer has the source's codes, zero points and, bit for bit, weights."""
    found = decode_awq(tensors, name) if target == "awq" else decode_gptq(tensors, name, bits, version)
    np.testing.assert_array_equal(found.codes, source.codes[name])
    np.testing.assert_array_equal(found.zeros, source.offsets[name])
    np.testing.assert_array_equal(found.weights, source.laws[name])
