"""What the weights of a checkpoint are, for oracle tests to hold a tool's answer against: by plain code, or by Weighbridge's reader.

``read_plainly`` shares no code with the project and knows msModelSlim's types whose files have every factor of the law. For other
checkpoints there is Weighbridge's reader of the source, which tests/test_goldens.py holds against the tools that wrote them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from judge import group_size, steps
from raw_msmodelslim import read_layers, read_safetensors, unpack_nibbles

from formats import open_checkpoint
from formats.ir import QuantizedLinear, element_values, read, scale_grid


class Law(NamedTuple):
    """A layer's float32 scales and its whole numbers (or float elements), both [out, in]."""

    scales: np.ndarray
    steps: np.ndarray
    quotients: bool = False  # scales are quotients, taken in float32 whatever the weights' dtype is (NVFP4)

    def rounded(self, dtype: Any) -> np.ndarray:
        """The weights as compressed-tensors computes them: scales in ``dtype``, the product rounded once to it."""
        scales = self.scales if self.quotients else self.scales.astype(dtype).astype(np.float32)
        return (scales * self.steps).astype(dtype)


def read_by_weighbridge(folder: Path) -> dict[str, Law]:
    checkpoint = open_checkpoint(folder)
    return {name: law_of(checkpoint.layer(name)) for name in checkpoint.layer_names}


def law_of(layer: QuantizedLinear) -> Law:
    block, group = layer.scheme.weights.block, layer.group_of()
    row = np.arange(layer.shape[0]) // (block[0] if block else 1)
    values = element_values(np.ascontiguousarray(read(layer.codes)), layer.scheme.weights.element)
    if layer.zero_points is not None:
        values = values - layer.grid("zero_points").astype(np.float32)[np.ix_(row, group)]
    return Law(scale_grid(layer)[np.ix_(row, group)], values, layer.outer_divides)


def read_plainly(folder: Path) -> dict[str, Law]:
    """msModelSlim's types whose files have every factor of the law."""
    (description_path,) = folder.glob("quant_model_description*.json")
    description = json.loads(description_path.read_text("utf-8"))
    if {"W4A16", "W8A16"} & {kind for kind in description.values() if isinstance(kind, str)}:
        layers = read_layers(folder)
        return {name: Law(layer.scales.T.repeat(group_size(layer), 1), steps(layer).astype(np.float32)) for name, layer in layers.items()}
    (weights_path,) = folder.glob("*.safetensors")
    tensors, found = read_safetensors(weights_path), {}
    for name, codes in tensors.items():
        layer = name.removesuffix(".weight")
        if layer == name or codes.dtype != np.int8:
            continue
        if f"{layer}.weight_scale_second" in tensors and "version" in description:
            codes = unpack_nibbles(codes, per_group=True)
        scales = tensors[f"{layer}.weight_scale"].astype(np.float32).reshape(-1, 1)
        assert not tensors[f"{layer}.weight_offset"].astype(np.float32).any(), layer
        if f"{layer}.weight_scale_second" in tensors:
            scales = scales * tensors[f"{layer}.weight_scale_second"]
        full = np.broadcast_to(scales, (codes.shape[0], scales.shape[1])).repeat(codes.shape[1] // scales.shape[1], 1)
        found[layer] = Law(full, codes.astype(np.float32))
    assert found, folder
    return found
