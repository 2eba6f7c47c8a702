"""``inspect``: what a checkpoint is, from its headers: format, schemes by layer, sizes, bits per weight, what looks wrong."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from formats import Checkpoint, Location, open_checkpoint
from formats.checkpoint import Finding, float_linears, zeros_reading

from .fitting import FUSED


@dataclass(frozen=True, slots=True)
class SchemeRow:
    """Layers of one scheme: how many, their weights, bytes of everything they store, and one of their names."""

    scheme: str
    layers: int
    weights: int
    bytes: int
    example: str

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights if self.weights else math.nan


@dataclass(frozen=True)
class Report:
    """What ``inspect`` found. ``layers`` maps every quantized layer to its scheme in words."""

    format: str
    files: list[str]
    bytes: int
    schemes: list[SchemeRow]
    layers: dict[str, str]
    plain_tensors: int
    plain_bytes: int
    float_linears: list[str]
    findings: list[Finding]

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "bits_per_weight": row.bits_per_weight} for row in self.schemes]
        return {**asdict(self), "schemes": rows}


def inspect(path: str | os.PathLike[str] | Checkpoint, *, gptq_zeros: str | None = None) -> Report:
    """Describe a checkpoint from its headers; of the data, only GPTQ v1 zero points are looked at.

    raises  UnreadableError, RefusedError (a format that is not read yet)
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(Location.of(path, zeros=zeros_reading(gptq_zeros)))
    tensors = checkpoint.tensors
    rows: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    layers: dict[str, str] = {}
    for name in checkpoint.layer_names:
        layer = checkpoint.layer(name)
        # Whether zero points are all 0 is in the data; the header only says whether there are any.
        scheme = str(layer.scheme).removesuffix(" asym") + (" with zero points" if layer.zero_points is not None else "")
        size = sum(tensors[tensor].nbytes for tensor in checkpoint.layer_tensors(name))
        rows[scheme].append((name, layer.shape[0] * layer.shape[1], size))
        layers[name] = scheme
    of_module: dict[str, list[str]] = defaultdict(list)
    for tensor in tensors if checkpoint.unsupported else ():
        of_module[tensor.rpartition(".")[0]].append(tensor)
    for part in checkpoint.unsupported:
        stored = [tensors[tensor] for tensor in of_module[part.name]]
        weights = max((math.prod(info.shape) for info in stored), default=0)
        rows[f"{part.type} (not read yet)"].append((part.name, weights, sum(info.nbytes for info in stored)))
        layers[part.name] = part.type
    schemes = [
        SchemeRow(scheme, len(found), sum(weights for _, weights, _ in found), sum(size for *_, size in found), found[0][0])
        for scheme, found in rows.items()
    ]
    plain = checkpoint.plain_names
    return Report(
        f"{checkpoint.format}:{checkpoint.variant}",
        [file.name for file in checkpoint.files],
        sum(file.size for file in checkpoint.files),
        schemes,
        layers,
        len(plain),
        sum(tensors[name].nbytes for name in plain),
        float_linears(checkpoint),
        [*checkpoint.findings, *checkpoint.data_findings(), *_findings(checkpoint, layers)],
    )


def _findings(checkpoint: Checkpoint, layers: dict[str, str]) -> list[Finding]:
    """What a user should know before converting or serving."""
    left_out = [item for item in checkpoint.left_out if item.condition != "always"]
    found = [Finding("left-out", item.tensor, f"is no part of the model: {item.why}") for item in left_out]
    for why, count in Counter(item.why for item in checkpoint.left_out if item.condition == "always").items():
        found.append(Finding("left-out", f"{count} tensors", f"are no part of the model: {why}"))
    found += [Finding("functional", name, "changes what the model computes; no target can hold it yet") for name in checkpoint.functional]
    found += [Finding("kv-cache", name, "belongs to a quantized KV cache") for name in checkpoint.attention]
    if checkpoint.config is None:
        found.append(Finding("no-config", checkpoint.location.folder.name, "has no config.json; conversions will need --base-model"))
    if checkpoint.format == "msmodelslim" and checkpoint.quantization is not None:
        found.append(Finding("stale-config", "config.json", "has a quantization_config that is not msModelSlim's; conversions drop it"))
    plain = set(float_linears(checkpoint))
    for name, scheme in layers.items():
        parent, _, leaf = name.rpartition(".")
        for fused in FUSED:
            others = [f"{parent}.{other}" for other in fused if other != leaf] if leaf in fused else []
            odd = [other for other in others if other in plain or layers.get(other, scheme) != scheme]
            if odd:
                found.append(Finding("fused", name, f"is {scheme}, but {odd[0].rpartition('.')[2]}, with which engines fuse it, is not"))
    return found
