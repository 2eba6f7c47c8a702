"""What the bytes mean: the IR, the bit layouts, and one module per checkpoint format.

``FORMATS`` is the registry. To add a format: its module (the docstring is its spec), its row here, its fixtures.
"""

from __future__ import annotations

import os
from pathlib import Path

from . import awq, compressed_tensors, dense, gptq, mindspore, msmodelslim, smooth_quant, turbomind
from .checkpoint import Checkpoint, Location
from .errors import RefusedError, UnreadableError, UsageError
from .spec import FormatSpec, Variant

__all__ = ["FORMATS", "Checkpoint", "Location", "check_writable", "detect", "find_format", "open_checkpoint"]

FORMATS: tuple[FormatSpec, ...] = (
    turbomind.SPEC,
    msmodelslim.SPEC,
    awq.SPEC,
    gptq.SPEC,
    compressed_tensors.SPEC,
    mindspore.SPEC,
    smooth_quant.SPEC,
    dense.SPEC,
)


def find_format(target: str) -> tuple[FormatSpec, Variant, bool]:
    """(format, variant, whether the variant was named) for ``"gptq"`` or ``"gptq:v2"``; ``UsageError`` for an unknown one."""
    name, _, variant = target.partition(":")
    spec = next((spec for spec in FORMATS if spec.name == name), None)
    if spec is None:
        raise UsageError(f"there is no format {name!r}; there are {', '.join(spec.name for spec in FORMATS)}")
    found = spec.variant(variant)
    if found is None:
        raise UsageError(f"{name} has no variant {variant!r}; it has {', '.join(v.name for v in spec.variants)}")
    return spec, found, bool(variant)


def check_writable(spec: FormatSpec, variant: Variant) -> None:
    """RefusedError if the format's variant can only be read."""
    if spec.outputs is None or variant.holds is None:
        raise RefusedError(f"{spec.name}:{variant.name} can be read, but not written yet; `weighbridge formats` says what can")


def detect(location: Location) -> tuple[FormatSpec, str]:
    """The format and variant that ``location`` holds, from names and configs; RefusedError if none of ours does."""
    for spec in FORMATS:
        variant = spec.detect(location)
        if variant is not None:
            return spec, variant
    config = location.json("config.json") or {}
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        method = quantization.get("quant_method", "without a quant_method")
        known = ", ".join(spec.name for spec in FORMATS)
        raise RefusedError(f"{location.folder.name}: quantized by {method!r}, which is not read yet; formats that are: {known}")
    raise UnreadableError(
        f"{location.folder.name or location.folder}: neither a config.json nor a quant_model_description*.json says what this is; "
        "point at a checkpoint's folder, or at the weight file beside its description"
    )


def open_checkpoint(path: str | os.PathLike[str] | Location, description: str | Path | None = None) -> Checkpoint:
    """Open a checkpoint by folder or file: headers and configs only.

    raises  UnreadableError (damaged or unsafe input), RefusedError (a format that is not read yet)
    """
    location = path if isinstance(path, Location) else Location.of(path, description)
    spec, variant = detect(location)
    return spec.open(location, variant)
