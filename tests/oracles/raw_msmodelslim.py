"""The integers of an msModelSlim W4A16 or W8A16 file, read from its bytes with plain NumPy.

The expected side of the oracle tests. It shares no code with the project, on purpose: what the
real tool decodes from our output is compared with what is read here from the source itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {"I8": np.int8, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}


class Layer(NamedTuple):
    bits: int
    codes: np.ndarray  # int16 [out, in], unsigned: 0..2^bits - 1
    zeros: np.ndarray  # int16 [groups, out], in the same unsigned domain
    scales: np.ndarray  # float32 [groups, out], as stored


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one file whose dtype is in DTYPES."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] in DTYPES:
            begin, end = entry["data_offsets"]
            values = np.frombuffer(data[start + begin : start + end], DTYPES[entry["dtype"]])
            tensors[name] = values.reshape(entry["shape"])
    return tensors


def unpack_nibbles(packed: np.ndarray, per_group: bool) -> np.ndarray:
    """int8 [out, in] from the V0 ascendV1 packing: two signed nibbles a byte, low one first.

    Two consecutive output rows share a byte if the scales have several groups, else two
    consecutive input columns do.
    """
    low = (packed << 4) >> 4  # int8: the right shift extends the sign
    high = packed >> 4
    if per_group:
        return np.stack([low, high], axis=1).reshape(-1, packed.shape[1])
    return np.stack([low, high], axis=2).reshape(packed.shape[0], -1)


def read_layers(folder: Path) -> dict[str, Layer]:
    """The quantized linears of one fixture, by the name that stands before ``.weight``."""
    (weights_path,) = folder.glob("quant_model_weight*.safetensors")
    (description_path,) = folder.glob("quant_model_description*.json")
    tensors = read_safetensors(weights_path)
    description = json.loads(description_path.read_text("utf-8"))
    layers = {}
    for name, label in description.items():
        prefix = name.removesuffix(".weight")
        if label not in ("W4A16", "W8A16") or f"{prefix}.weight_scale" not in tensors:
            continue  # also skips <norm>.module.weight, which has the label and no scale
        bits = 4 if label == "W4A16" else 8
        scales = tensors[f"{prefix}.weight_scale"].astype(np.float32)
        offsets = tensors[f"{prefix}.weight_offset"].astype(np.float32)
        signed = tensors[name]
        if bits == 4 and "version" in description:
            signed = unpack_nibbles(signed, per_group=scales.shape[1] != 1)
        assert signed.shape[0] == scales.shape[0] == offsets.shape[0], (name, signed.shape)
        assert np.array_equal(offsets, np.rint(offsets)), f"{name}: a fractional offset"
        half = 2 ** (bits - 1)
        layers[prefix] = Layer(
            bits=bits,
            codes=signed.astype(np.int16) + half,
            zeros=(offsets.T + half).astype(np.int16),
            scales=scales.T,
        )
    assert layers, f"{folder} has no quantized linear"
    return layers
