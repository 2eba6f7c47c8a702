"""A folder under examination by ``doctor``: what was looked at, what is wrong, and what a mended folder would hold instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from formats.checkpoint import Location
from formats.errors import UnreadableError
from formats.ir import Array
from formats.safetensors_file import TensorSet

from .stored import open_weights, stored_layers

QUANTIZE, INSIDE = "quantize_config.json", "config.json"


@dataclass(frozen=True, slots=True)
class Ailment:
    """One thing that is wrong: where, what was found, how sure that is, and whether and how it can be mended without loss."""

    code: str
    where: str
    found: str
    certainty: Literal["certain", "likely"]
    mendable: bool
    how: str

    def __str__(self) -> str:
        return f"{self.where}: {self.found}; {self.how} [{self.code}, {self.certainty}]"


@dataclass
class Cure:
    """What a mended folder holds instead: keys of both configs, tensors to add, whether headers and index are written anew."""

    inside: dict[str, Any] | None = None
    beside: dict[str, Any] | None = None
    tensors: dict[str, Array] = field(default_factory=dict)
    headers: bool = False
    index: bool = False


class Patient:
    """A folder under examination: its tensors whatever an index says, its configs, and its layers as far as shapes tell.

    raises   UnreadableError where not even headers or JSON can be read
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self.tensors: TensorSet = open_weights(location)
        self.config = location.json(INSIDE)
        inside = None if self.config is None else self.config.get("quantization_config")
        if inside is not None and not isinstance(inside, dict):
            raise UnreadableError(f"{INSIDE}: quantization_config is a {type(inside).__name__}, wanted an object")
        self.inside: dict[str, Any] | None = inside
        self.beside = location.json(QUANTIZE)
        self.old = location.json("quant_config.json")
        self.claims: Mapping[str, Any] = inside or self.beside or self.old or {}
        claimed = self.claims.get("bits", self.claims.get("w_bit"))
        layers = list(stored_layers(self.tensors, claimed if isinstance(claimed, int) else None))
        spellings = Counter(layer.spelling for layer in layers)
        self.spelling = spellings.most_common(1)[0][0] if spellings else ""
        version = str(self.claims.get("version", "gemm")).lower()
        if self.spelling == "gptq" and self.claims.get("quant_method") == "awq" and version != "gemm":
            self.spelling = ""  # GEMV's shapes may look like GPTQ's
        self.layers = [layer for layer in layers if layer.spelling == self.spelling]
        self.sound = [layer for layer in self.layers if not layer.trouble and layer.bits is not None]
        self.ailments: list[Ailment] = []
        self.cure = Cure()
        self.says = "v2" if str(self.claims.get("checkpoint_format", self.claims.get("format", ""))).lower() == "gptq_v2" else "v1"
        self.version = self.says
        self.version_is_certain = False

    def add(self, code: str, where: str, found: str, how: str, *, mendable: bool = False, likely: bool = False) -> None:
        self.ailments.append(Ailment(code, where, found, "likely" if likely else "certain", mendable, how))

    def add_layers(self, code: str, layers: list[str], found: str, how: str, *, mendable: bool = False, likely: bool = False) -> None:
        """One ailment for all ``layers`` that have it; none if there are none."""
        if layers:
            where = layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more"
            self.add(code, where, found, how, mendable=mendable, likely=likely)
