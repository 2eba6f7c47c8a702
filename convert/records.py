"""What a plan is made of: layers with their exact moves, losses with codes and bounds, refusals, output files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import xxhash

from formats import Checkpoint
from formats.checkpoint import Entry, Location
from formats.errors import RefusedError
from formats.ir import QuantizedLinear, QuantScheme
from formats.laid_out import LaidOut, Part
from formats.safetensors_file import NAMES
from formats.spec import Capabilities, FormatSpec, LayerTarget, ModelFacts, TensorSpec, Variant

from .memory import Memory

LOSSES: dict[str, tuple[bool, str]] = {
    "scale-rounded": (True, "scales rounded to the dtype that the target's loaders want; results are normal numbers"),
    "scale-subnormal": (False, "scales so small that the target's dtype holds them with few bits, or as 0"),
    "bias-rounded": (True, "biases rounded to the dtype that the target's loaders want"),
    "weight-rounded": (True, "dequantized weights rounded to the folder's dtype"),
    "kv-cache-dropped": (False, "scales of a quantized KV cache left out: it will be kept in float"),
    "activations-dropped": (False, "quantization of the inputs left out: they will be computed in float"),
    "quant-bias-rounded": (True, "biases rounded to whole steps of deq_scale in quant_bias, as the NPU takes them (bias itself is kept)"),
    "deq-scale-differs": (
        False,
        "deq_scale or quant_bias, with which the NPU computes, contradict scales or bias; the latter are kept",
    ),
    "requantize": (False, "weights rounded anew to 8 bits per channel; the bound is half a step of the largest weight"),
    "attention-dropped": (False, "scales of quantized attention (FAQuant) left out: it will be computed in float"),
}
"""Loss codes: (done without asking, what is lost). Codes that are not done without asking need ``--allow CODE``."""


HALF_STEP = 1 / 254
"""What rounding anew to symmetric 8 bits can do to a weight, against the largest of its layer."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a layer cannot be written: what it needs, what the target offers, what to do."""

    code: str
    layer: str
    needs: str
    offers: str
    hint: str

    def __str__(self) -> str:
        return f"{self.layer}: needs {self.needs}; {self.offers}; {self.hint} [{self.code}]"


@dataclass(frozen=True, slots=True)
class Loss:
    """A named loss: how many layers, and the largest relative error it makes (worst: where)."""

    code: str
    layers: int
    bound: float
    worst: str


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer's way: its target spelling, the exact moves, and how often each stored group's scale is repeated.

    merged: the outer level of its scales is multiplied into the inner one; requantized: its weights are rounded anew
    """

    target: LayerTarget
    source: QuantScheme
    moves: tuple[str, ...]
    repeat: int = 1
    requantized: bool = False

    def derives_anew(self, layer: QuantizedLinear) -> bool:
        """Whether deq_scale and quant_bias are made, rather than carried: the source has none, or for other scales."""
        target = self.target
        if target.input_dtype is None or layer.input_scale is None:
            return False
        if "dequant_scale" in dict(target.derived):  # Golden Stick's is the exact product, msModelSlim's a rounded one
            return "dequant_scale" not in layer.extras or self.requantized
        if target.scheme.weights.sparse:  # where deq_scale is all that says the weight's scale
            return "quant_bias" not in layer.extras
        same = NAMES[layer.input_scale.dtype] == target.input_dtype and NAMES[np.dtype(layer.scales.dtype)] == target.scale_dtype
        return not (same and {"deq_scale", "quant_bias"} <= set(layer.extras)) or self.requantized

    @property
    def merged(self) -> bool:
        return "merge-scales" in self.moves


@dataclass
class Plan:
    """A whole conversion, decided before a weight is read. ``refusals`` empty means that it can run.

    layers, plain    in output order; files: every weight file with its header and offsets
    probed           whether what headers cannot say was settled
    """

    checkpoint: Checkpoint
    spec: FormatSpec
    variant: Variant
    layers: list[LayerPlan]
    plain: list[str]
    files: list[LaidOut]
    losses: list[Loss]
    refusals: list[Refusal]
    notes: list[str]
    model: ModelFacts
    base: Location | None
    allowed: tuple[str, ...]
    probed: bool
    memory: Memory
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> Capabilities:
        """What the target variant holds; plans are made only for variants that can be written."""
        assert self.variant.holds is not None
        return self.variant.holds

    @property
    def entries(self) -> list[Entry]:
        """("layer" | "plain", name) of everything that is written, in order: the source's entries, then what else is carried."""
        return self.checkpoint.entries_with(self.model.attention)

    @property
    def target_name(self) -> str:
        return f"{self.spec.name}:{self.variant.name}"

    @property
    def source_name(self) -> str:
        return f"{self.checkpoint.format}:{self.checkpoint.variant}"

    @property
    def source_bytes(self) -> int:
        return sum(file.size for file in self.checkpoint.files)

    @property
    def target_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def parts(self) -> list[Part]:
        """Every file of ``files``, those of ranks and of workspaces one by one."""
        return [part for file in self.files for part in file.parts]

    @property
    def codes(self) -> int:
        """Weights in quantized layers: what the kernels will move."""
        return sum(layer.target.shape[0] * layer.target.shape[1] for layer in self.layers)

    @property
    def peak_memory(self) -> int:
        """Peak of anonymous memory in bytes at most, over the bare interpreter's."""
        return self.memory.peak

    @property
    def stem(self) -> str:
        """Name of the weight files without shard number and suffix."""
        return self.spec.stem(self.model, self.variant.name)

    @property
    def index(self) -> str | None:
        """Name of the index of the weight files, if there is one."""
        if self.spec.index is not None:
            return self.spec.index(self.variant.name, len(self.files))
        return f"{self.stem}.safetensors.index.json" if len(self.files) > 1 else None

    def outputs(self, layer: LayerTarget) -> tuple[TensorSpec, ...]:
        """The tensors that spell ``layer`` in the target."""
        assert self.spec.outputs is not None
        return self.spec.outputs(layer, self.variant.name)

    def move_counts(self) -> dict[str, int]:
        """How many layers each exact move touches."""
        return dict(Counter(move for layer in self.layers for move in layer.moves))

    @property
    def id(self) -> str:
        """XXH3-128 over source identity, target, options and every layer's target: equal plans do equal work."""
        digest = xxhash.xxh3_128()
        config = model_config(self.checkpoint, self.base)
        head = {
            "config": config,
            "source": [asdict(file) | {"mtime_ns": 0} for file in self.checkpoint.files],
            "target": self.target_name,
            "options": self.options,
        }
        digest.update(json.dumps(head, sort_keys=True).encode())
        for layer in self.layers:
            target, way = layer.target, f"{layer.repeat} {layer.requantized}"
            digest.update(f"{target.name} {target.scheme.to_json()} {target.scale_dtype} {target.derived} {way}\n".encode())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-ready data: what ``weighbridge plan --json`` prints."""
        return {
            "id": self.id,
            "source": {"format": self.source_name, "files": [file.name for file in self.checkpoint.files], "bytes": self.source_bytes},
            "target": {
                "format": self.target_name,
                "files": [{"name": file.name, "bytes": file.size, "tensors": len(file.tensors)} for file in self.parts],
                "bytes": self.target_bytes,
                "quantized_layers": len(self.layers),
                "plain_tensors": len(self.plain),
            },
            "moves": self.move_counts(),
            "losses": [asdict(loss) for loss in self.losses],
            "refusals": [asdict(refusal) for refusal in self.refusals],
            "notes": self.notes,
            "probed": self.probed,
            "peak_memory": self.peak_memory,
        }

    def raise_if_refused(self) -> None:
        """RefusedError that names the first refusal and counts the rest."""
        if self.refusals:
            more = f" (and {len(self.refusals) - 1} more refusals: weighbridge plan lists them)" if len(self.refusals) > 1 else ""
            raise RefusedError(f"{self.refusals[0]}{more}", tuple(self.refusals))


def model_config(checkpoint: Checkpoint, base: Location | None) -> dict[str, Any] | None:
    """config.json of the base model, or the one beside the source; None if there is neither."""
    config = checkpoint.config if base is None else base.json("config.json")
    return None if config is None else {key: value for key, value in config.items() if key != "quantization_config"}
