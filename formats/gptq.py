"""GPTQ as AutoGPTQ and GPTQModel store it: 2, 3, 4 and 8 bits, packed along inputs, with a group index.

Defined by AutoGPTQ 0.7.1 (``qlinear_cuda*.py``, checkpoint format "gptq": v1) and GPTQModel 7.6 (v1, and "gptq_v2"); read by
transformers (optimum, GPTQModel), vLLM, SGLang, LMDeploy, ExLlama. Facts here were checked on files that both tools wrote.

========  =======  ============  ===================================================================================
qweight   int32    [K*b/32, N]   bit stream along K: input ``j`` is at bits ``[j*b, (j+1)*b)`` (3-bit codes straddle words)
qzeros    int32    [G, N*b/32]   the same along N; v1 stores ``z - 1``, v2 stores ``z``
scales    float16  [G, N]        AutoGPTQ writes the model's dtype, so bfloat16 and float32 occur
g_idx     int32    [K]           group of each input; ``k // g`` without act order
bias      float16  [N]           AutoGPTQ writes zeros even where the model has no bias (quirk 7)
========  =======  ============  ===================================================================================

Law: ``w[n, k] = scales[g, n] * (q[k, n] - z[g, n])`` with ``g = g_idx[k]``; q and z unsigned here. group_size -1: one group.

Marlin (AutoGPTQ 0.7.1, ``is_marlin_format``; 4 bits, symmetric, read only) has instead ``B`` int32 [K/16, 2N] and ``s`` float16
[G, N], no zero points and no g_idx: ``formats.marlin`` has the tile.

Quirks:

1. v1 cannot say a zero point of 0: ``z - 1 = -1`` wraps to the top lane, and AutoGPTQ's own packer smears it over the higher
   lanes of the word. A writer must use v2 for it. Readers decode the top lane in three ways: ``mask``, ``(lane + 1) mod 2**b``,
   so 0 (AutoGPTQ's qlinear_cuda_old for 2, 4, 8 bits); ``plain``, ``lane + 1``, so ``2**b`` (its qlinear_cuda, ExLlama, and
   qlinear_cuda_old for 3 bits); ``carry``, a word of ones added to the whole word, so 0 and one more in the next lane
   (GPTQModel, transformers; for 3 bits lane by lane). The default is that of the tool that wrote the file: ``meta.quantizer``
   names GPTQModel, everything else is read as AutoGPTQ reads it.
2. AutoGPTQ reads quantize_config.json only, transformers and vLLM config.json: both are written, with the same content.
   ``desc_act`` missing means True to AutoGPTQ; vLLM refuses a config without ``desc_act`` or ``sym``.
3. transformers leaves ``g_idx`` and ``qzeros`` uninitialised if they are missing: always write both.
4. transformers and vLLM look for model.safetensors (or its index), AutoGPTQ accepts that name: never ``gptq_model-*``.
5. The key ``is_marlin_format`` makes GPTQModel refuse a folder: not written.
6. Layers left in float: GPTQModel and vLLM read ``dynamic`` ("-:" patterns), transformers and vLLM
   ``modules_in_block_to_quantize``, which holds only if every block is alike.
7. A bias of zeros in a linear that has none in the model (Llama; Qwen2 but for q, k, v) is AutoGPTQ's own: it is left out.
8. ``pack_dtype`` other than int32 is GPTQModel's alone; no other loader reads it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from .checkpoint import FLOATS, Finding, LeftOut, Location, Unsupported, ZerosReading, modules_in_every_block
from .errors import UnreadableError, UsageError
from .gptq_config import ModuleRules, has_bias, usual_reading
from .ir import Array, ArrayLike, QuantArgs, QuantizedLinear, QuantScheme
from .layouts import PackedMatrix, PackLayout
from .marlin import MARLIN, PermutedScales
from .qweight import QweightCheckpoint
from .spec import Capabilities, FormatSpec, LayerTarget, ModelFacts, TensorSpec, Variant
from .workspace import Workspace

CONFIG = "quantize_config.json"
PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
MARLIN_PARTS = ("B", "s", "bias")
BITS = (2, 3, 4, 8)


@functools.cache
def codes_layout(bits: int) -> PackLayout:
    """qweight: unsigned codes, a bit stream along inputs, stored [in, out]."""
    return PackLayout(bits, "<i4", "in", transposed=True, offset=1 << (bits - 1), low=-(1 << (bits - 1)))


@functools.cache
def zeros_layout(bits: int, variant: str, reading: ZerosReading = "mask") -> PackLayout:
    """qzeros of v1 (one less than the zero point) or v2, stored [groups, out]; reading "plain": v1's top lane is one more than fits."""
    half, v1 = 1 << (bits - 1), variant == "v1"
    return PackLayout(bits, "<i4", "out", transposed=True, offset=half - v1, low=-half + (v1 and reading == "plain"))


@dataclass(frozen=True, slots=True)
class CarriedZeros:
    """v1's qzeros, to which a word of ones is added with carry from lane to lane, [out, groups] (``LazyArray``)."""

    bits: int
    stored: ArrayLike

    @property
    def shape(self) -> tuple[int, int]:
        return zeros_layout(self.bits, "v2").canonical_shape((self.stored.shape[0], self.stored.shape[1]))

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int16)

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        words = (np.ascontiguousarray(np.asarray(self.stored)).view(np.uint32) + np.uint32(_ones(self.bits))).view(np.int32)
        return zeros_layout(self.bits, "v2").unpack(words, rows, cols, "<i2")


def detect(location: Location) -> str | None:
    """The variant that the folder says it is, or None."""
    config = quantization_of(location)
    if config is None or str(config.get("quant_method", "gptq")).lower() not in {"gptq", "marlin"}:
        return None
    return {"gptq_v2": "v2", "marlin": "marlin"}.get(_checkpoint_format(config), "v1")


def quantization_of(location: Location) -> dict[str, Any] | None:
    """The GPTQ quantization config: config.json's, else quantize_config.json's."""
    config = location.json("config.json")
    found = None if config is None else config.get("quantization_config")
    if found is None:
        found = location.json(CONFIG)
    if found is not None and not isinstance(found, dict):
        raise UnreadableError(f"config.json: quantization_config is a {type(found).__name__}, wanted an object")
    return found


def _checkpoint_format(config: Mapping[str, Any]) -> str:
    marlin = config.get("is_marlin_format") or str(config.get("quant_method", "")).lower() == "marlin"
    return "marlin" if marlin else str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()


def has_full_lanes(stored: Array, bits: int) -> bool:
    """Whether a lane of int32 words has all its bits set; True where lanes straddle words and only unpacking can say it."""
    if 32 % bits:
        return True
    words = np.ascontiguousarray(stored).view(np.uint32)
    full = words
    for bit in range(1, bits):
        full = full & (words >> np.uint32(bit))
    return bool((full & np.uint32(_ones(bits))).any())


def _ones(bits: int) -> int:
    """A word of lanes of 1."""
    return sum(1 << lane for lane in range(0, 32, bits))


class Gptq(QweightCheckpoint):
    """Reader of v1, v2 and Marlin folders. Bits and group size come from shapes; the config must not contradict them.

    reading   how v1's zero points stored as the largest value are read; None: as the tool reads them that wrote the file
    """

    def __init__(self, location: Location, variant: str) -> None:
        self._said = config = quantization_of(location) or {}
        tensors = location.tensors("gptq_model" if "model.safetensors" not in location.names else "")
        super().__init__(location, "gptq", variant, tensors, MARLIN_PARTS if variant == "marlin" else PARTS)
        self.reading: ZerosReading | None = location.zeros
        if self.reading not in {None, *get_args(ZerosReading)}:
            raise UsageError(f"zero points read as {self.reading!r}: wanted {', '.join(get_args(ZerosReading))}")
        self._rules = ModuleRules(config.get("dynamic"))
        kind, pack_dtype = _checkpoint_format(config), str(config.get("pack_dtype") or "int32").lower()
        if kind not in {"gptq", "gptq_v2", "marlin"}:
            self._refuse_all(f"GPTQ {kind}", f"checkpoint format {kind!r} is not read yet")
        elif pack_dtype != "int32":
            self._refuse_all(
                f"GPTQ pack_dtype {pack_dtype}", f"only int32 words are read; pack it again with pack_dtype int32 ({pack_dtype!r})"
            )
        self._leave_out_biases()

    def _refuse_all(self, type: str, why: str) -> None:
        self.unsupported = [Unsupported(module, type, why) for module in self.layer_names]
        self.entries = [entry for entry in self.entries if entry[0] == "plain"]

    def _leave_out_biases(self) -> None:
        """Biases of zeros in linears of which the model has none: AutoGPTQ writes them. Any other bias is the model's."""
        base = self.location.base
        config = (self.config if base is None else base.json("config.json")) or {}
        why = f"zeros that AutoGPTQ adds as a bias, which {config.get('model_type')} does not have"
        self._no_bias = {name for name in self.layer_names if f"{name}.bias" in self.tensors and not has_bias(config, name)}
        for name in self.layer_names:
            if name in self._no_bias and self.bias(name) is None:
                self.left_out.append(LeftOut(f"{name}.bias", "zero", "", why, "and no longer is zero"))

    def bias(self, name: str) -> ArrayLike | None:
        bias = super().bias(name)
        return None if bias is not None and name in self._no_bias and not np.asarray(bias).any() else bias

    def reading_of(self, bits: int) -> ZerosReading:
        """How v1's zero points of so many bits are read where they are stored as the largest value."""
        return self.reading or usual_reading(self._said, bits)

    def data_findings(self) -> list[Finding]:
        """That v1 stores the largest value, which tools read differently; reads qzeros alone."""
        if self.variant != "v1":
            return []
        found: dict[int, list[tuple[str, int]]] = {}
        for name in self.layer_names:
            bits, stored = self.layer(name).scheme.weights.bits, self.part(name, "qzeros")
            words = np.asarray(stored)
            if has_full_lanes(words, bits):
                lanes = zeros_layout(bits, "v1").unpack(words, dtype="<i2")
                if count := int((lanes == -(1 << (bits - 1))).sum()):
                    found.setdefault(bits, []).append((name, count))
        return [
            Finding(
                "top-lane",
                layers[0][0] if len(layers) == 1 else f"{layers[0][0]} and {len(layers) - 1} more layers",
                f"{sum(count for _, count in layers)} zero points are stored as {(1 << bits) - 1}, the largest value, which tools read as "
                f"0 (mask), as {1 << bits} (plain) or with a carry into the next output (carry); they are read as: {self.reading_of(bits)}",
            )
            for bits, layers in found.items()
        ]

    def layer(self, name: str) -> QuantizedLinear:
        if self.variant == "marlin":
            return self._marlin(name)
        wanted = {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS}
        self.require(name, wanted, "GPTQ has qweight and qzeros int32 and scales, all 2-D")
        scales = self.part(name, "scales").T
        out, groups = scales.shape
        bits, in_ = self._sizes(name, out, groups)
        codes = PackedMatrix(codes_layout(bits), self.part(name, "qweight"))
        zeros = self._zeros(name, bits)
        if codes.shape != (out, in_) or tuple(zeros.shape) != (out, groups):
            raise UnreadableError(
                f"{name}: codes are [out, in] = {list(codes.shape)}, zero points [out, groups] = {list(zeros.shape)}, "
                f"scales {[out, groups]}, g_idx [{in_}]; they contradict one another"
            )
        group_size = in_ // groups
        g_idx = self._g_idx(name, in_, groups, group_size)
        order = None if g_idx is None else "group"
        said = {**self._said, **(self._rules.find(name) or {})}
        if order is None and said.get("desc_act") and groups > 1:
            order = "static"
        weights = QuantArgs(bits, "int", False, "group" if groups > 1 else "channel", group_size if groups > 1 else None, None, order)  # type: ignore[arg-type]
        layer = QuantizedLinear(name, (out, in_), QuantScheme(weights), codes, scales, zeros, g_idx=g_idx, bias=self.bias(name))
        layer.check()
        return layer

    def _zeros(self, name: str, bits: int) -> ArrayLike:
        stored, reading = self.part(name, "qzeros"), self.reading_of(bits)
        if self.variant == "v1" and reading == "carry" and bits != 3:
            return CarriedZeros(bits, stored)
        return PackedMatrix(zeros_layout(bits, self.variant, "mask" if reading == "carry" else reading), stored, "<i2")

    def _marlin(self, name: str) -> QuantizedLinear:
        self.require(name, {"B": ("I32",), "s": FLOATS}, "GPTQ's Marlin layout has B int32 and s, both 2-D")
        codes, scales = PackedMatrix(MARLIN, self.part(name, "B")), PermutedScales(self.part(name, "s"))
        (out, in_), groups = codes.shape, scales.shape[1]
        if scales.shape[0] != out or not (groups and in_) or in_ % groups:
            raise UnreadableError(
                f"{name}: codes are [out, in] = {[out, in_]}, scales [groups, out] = {[groups, scales.shape[0]]}; "
                "they contradict one another"
            )
        self._check_config(name, 4, in_, in_ // groups)
        weights = QuantArgs(4, "int", True, "group" if groups > 1 else "channel", in_ // groups if groups > 1 else None)
        layer = QuantizedLinear(name, (out, in_), QuantScheme(weights), codes, scales, bias=self.bias(name))
        layer.check()
        return layer

    def _sizes(self, name: str, out: int, groups: int) -> tuple[int, int]:
        """(bits, in): from g_idx where there is one, else from qzeros' width; checked against the config."""
        rows = self.tensors[f"{name}.qweight"].shape[0]
        g_idx = self.tensors.get(f"{name}.g_idx")
        width = self.tensors[f"{name}.qzeros"].shape[1]
        bits = 32 * width // out if out else 0
        if bits not in BITS or 32 * rows % bits:
            raise UnreadableError(f"{name}: qzeros of {width} words for {out} outputs mean {bits} bits; GPTQ has 2, 3, 4 and 8")
        in_ = 32 * rows // bits
        if g_idx is not None and (g_idx.dtype != "I32" or g_idx.shape != (in_,)):
            raise UnreadableError(f"{name}: g_idx is {g_idx.dtype} {list(g_idx.shape)}, wanted int32 [{in_}]")
        if not groups or in_ % groups:
            raise UnreadableError(f"{name}: {groups} groups do not divide {in_} inputs")
        self._check_config(name, bits, in_, in_ // groups)
        return bits, in_

    def _check_config(self, name: str, bits: int, in_: int, group_size: int) -> None:
        """UnreadableError if the config, or ``dynamic``'s rule for this module, says otherwise than the shapes."""
        rule = self._rules.find(name)
        if rule is None:
            raise UnreadableError(f"{name}: is quantized, and dynamic in the config says that it is left in float; correct the config")
        said = {key: rule.get(key, self._said.get(key)) for key in ("bits", "group_size")}
        wanted = in_ if said["group_size"] == -1 else said["group_size"]
        if said["bits"] not in (None, bits) or wanted not in (None, group_size):  # tuples: what a file says may not be hashable
            raise UnreadableError(
                f"{name}: shapes say {bits} bits and group_size {group_size}, the config says {said['bits']} and {said['group_size']}; "
                "correct the config"
            )

    def _g_idx(self, name: str, in_: int, groups: int, group_size: int) -> Array | None:
        """The group index if it is irregular, else None."""
        if f"{name}.g_idx" not in self.tensors:
            return None
        g_idx = self.tensors.array(f"{name}.g_idx")
        if g_idx.size and not (int(g_idx.min()) >= 0 and int(g_idx.max()) < groups):
            raise UnreadableError(f"{name}: g_idx names groups {int(g_idx.min())} to {int(g_idx.max())}, but there are {groups}")
        return None if np.array_equal(g_idx, np.arange(in_) // group_size) else g_idx


def outputs(layer: LayerTarget, variant: str) -> tuple[TensorSpec, ...]:
    """The tensors that spell ``layer``: qweight, qzeros, scales, g_idx, and bias where there is one."""
    name, (out, in_), groups, bits = layer.name, layer.shape, layer.groups, layer.scheme.weights.bits
    codes, zeros = codes_layout(bits), zeros_layout(bits, variant)
    specs = (
        TensorSpec(f"{name}.qweight", "I32", codes.stored_shape(layer.shape), "codes", codes),
        TensorSpec(f"{name}.qzeros", "I32", zeros.stored_shape((out, groups)), "zero_points", zeros),
        TensorSpec(f"{name}.scales", layer.scale_dtype, (groups, out), "scales", transposed=True),
        TensorSpec(f"{name}.g_idx", "I32", (in_,), "g_idx"),
    )
    return specs if layer.bias_dtype is None else (*specs, TensorSpec(f"{name}.bias", layer.bias_dtype, (out,), "bias"))


def quantization_config(model: ModelFacts, variant: str) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """({file: object}, config.json's quantization_config): every key that AutoGPTQ, GPTQModel, transformers and vLLM demand."""
    schemes = [layer.scheme.weights for layer in model.layers]
    bits = min(scheme.bits for scheme in schemes)
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": model.layers[0].group_size,
        "desc_act": any(scheme.actorder for scheme in schemes),
        "sym": all(scheme.symmetric for scheme in schemes),
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "lm_head": any(layer.name.split(".")[-1] == "lm_head" for layer in model.layers),
        "checkpoint_format": "gptq" if variant == "v1" else "gptq_v2",
        "model_name_or_path": None,
        "model_file_base_name": None,
    }
    dynamic: dict[str, dict[str, int]] = {f"-:{_exactly(name)}": {} for name in model.float_linears}
    for layer in model.layers:
        own = {"bits": layer.scheme.weights.bits, "group_size": layer.group_size}
        if odd := {key: value for key, value in own.items() if value != config[key]}:
            dynamic[f"+:{_exactly(layer.name)}"] = odd
    if dynamic:
        config["dynamic"] = dynamic
    if model.float_linears and (alike := modules_in_every_block([layer.name for layer in model.layers], model.float_linears)):
        config["modules_in_block_to_quantize"] = [[name] for name in alike]
    return {CONFIG: config}, config


def _exactly(name: str) -> str:
    return rf"^{re.escape(name)}$"


_HOLDS: dict[str, Any] = {
    "bits": BITS,
    "strategies": ("channel", "group"),
    "group_sizes": (128, 64, 32),
    "act_order": ("group", "static"),
    "scale_dtypes": ("F16", "BF16", "F32"),
    "multiple_of": (32, 32),
    "lm_head": True,
}

SPEC = FormatSpec(
    name="gptq",
    tool="AutoGPTQ 0.7.1, GPTQModel 7.6",
    about="2 to 8-bit weights for GPUs; read by AutoGPTQ, GPTQModel, transformers, vLLM, SGLang",
    variants=(
        Variant(
            "v1",
            "zero points stored minus one: 0 cannot be said",
            Capabilities(**_HOLDS, smallest_zero=1),
            readers="all (GPTQModel: symmetric layers only)",
        ),
        Variant("v2", "zero points stored as they are", Capabilities(**_HOLDS), readers="GPTQModel, transformers"),
        Variant("marlin", "4-bit tiles of 64 outputs by 16 inputs, symmetric", None, readers="AutoGPTQ 0.7.1, on GPUs"),
    ),
    detect=detect,
    open=Gptq,
    outputs=outputs,
    quantization_config=quantization_config,
    default_variant="v1",
)
