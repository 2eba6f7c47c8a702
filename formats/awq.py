"""AWQ as AutoAWQ and llm-awq store it: 4-bit weights for GPUs, groups of inputs, explicit zero points.

Defined by AutoAWQ 0.2.9 (``awq/modules/linear/*.py``, ``awq/utils/packing_utils.py``), llm-awq (``qmodule.py``); read by
transformers, vLLM, SGLang, LMDeploy, GPTQModel. Facts here were checked on checkpoints that AutoAWQ wrote.

gemm, the one that everything reads:

========  ======  ==========  ====================================================================================
qweight   int32   [K, N/8]    lane i (bits 4i..4i+3) of word c holds column ``8c + ORDER[i]``; unsigned code 0..15
qzeros    int32   [G, N/8]    the same packing; the zero point as it is, no minus one
scales    float16 [G, N]      AutoAWQ writes float16; float32 and bfloat16 occur (LMDeploy, other exporters)
bias      float16 [N]         only where the layer has one
========  ======  ==========  ====================================================================================

gemv, for one token at a time; W is G in words of 8, rounded up for groups of 64 (to 2 words) and 32 (to 4):

========  ======  ==========  ====================================================================================
qweight   int32   [N, K/8]    lane i of word c holds input ``8c + i``
qzeros    int32   [N, W]      the same packing, of groups; lanes beyond G are 0
scales    float16 [N, 8*W]    columns beyond G are 0
========  ======  ==========  ====================================================================================

gemv_fast, and llm-awq, where ``qzeros`` is called ``scaled_zeros``:

========  ======  ==========  ====================================================================================
qweight   int16   [N/4, K]    tiles of 4 outputs by 64 inputs: per output 16 words, in which of 32 inputs the lanes hold
                              0, 8, 16, 24, then 1, 9, 17, 25, and so on
scales    float16 [8*W, N]    rows beyond G are 0
qzeros    float16 [8*W, N]    ``-(scale * z)``, rounded to float16; rows beyond G are 0
========  ======  ==========  ====================================================================================

marlin, symmetric only (``zero_point: false``): ``formats.marlin`` has the tile.

========  ======  ==========  ====================================================================================
qweight   int32   [K/16, 2N]  tiles of 16 inputs by 64 outputs; the zero point is 8 and is not stored
scales    float16 [G, N]      permuted within 64 outputs (one group: within 32)
========  ======  ==========  ====================================================================================

Law: ``w[n, k] = (q[k, n] - z[k // g, n]) * scales[k // g, n]``; G = K / g.

Quirks:

1. ORDER and its inverse (0, 4, 1, 5, 2, 6, 3, 7) are different permutations: mixed up, shapes fit and weights are wrong.
2. A symmetric gemm layer has zeros of 8. ``zero_point: true`` is the only value that readers of the gemm layout honour (AutoAWQ
   cannot even write ``false``).
3. AutoAWQ asserts N % 8 == 0 and K % g == 0; kernels want multiples of 32 in both.
4. Engines match ``modules_to_not_convert`` in three ways (substring, prefix, suffix): full dotted names satisfy all of them.
5. config.json holds the only ``quantization_config`` that AutoAWQ reads. Old releases wrote ``quant_config.json`` with
   ``w_bit`` and ``q_group_size``; vLLM and SGLang still take it.
6. A missing ``quant_method`` key makes transformers and vLLM refuse the folder.
7. How many groups a padded layer (gemv, gemv_fast) has only the config's group size says.
8. LMDeploy's auto_awq wrote ``pytorch_model.bin``, float32 scales and no quantization_config until 0.3: such a folder is known by its
   shapes. 0.4 has the config, 0.9 safetensors, 0.18 float16. Until 0.3 zero points are not clamped, so one of a group of one sign spilled
   over its neighbours' lanes; nothing in the file says so.
9. The gemv_fast kernel adds the rounded ``-(scale * z)``, so it computes weights that differ from the law in float16's last
   places; the zero point itself comes back exactly, and with it the weights that were quantized.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .checkpoint import FLOATS, Location, Unsupported
from .errors import UnreadableError
from .ir import ArrayLike, QuantArgs, QuantizedLinear, QuantScheme
from .layouts import PackedMatrix, PackLayout, TileLayout
from .marlin import MARLIN, PermutedScales, scale_order
from .qweight import QweightCheckpoint
from .safetensors_file import TensorSet
from .scaled_zeros import ScaledZeros
from .spec import Capabilities, FormatSpec, LayerTarget, ModelFacts, TensorSpec, Variant

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GEMM = PackLayout(bits=4, word="<i4", axis="out", transposed=True, order=ORDER, offset=8, low=-8)
"""qweight, and with [out, groups] for [out, in] also qzeros."""

GEMV = PackLayout(bits=4, word="<i4", axis="in", offset=8, low=-8)
"""qweight, and with [out, 8 * W] for [out, in] also qzeros."""

_FAST_LANES = tuple(64 * row + 32 * half + 8 * (lane % 4) + lane // 4 for row in range(4) for half in range(2) for lane in range(32))
GEMV_FAST = TileLayout(4, "<i2", (4, 64), _FAST_LANES, offset=8, low=-8)

OLD_CONFIG = "quant_config.json"
PARTS = ("qweight", "qzeros", "scaled_zeros", "scales", "bias")
_WANTED: dict[str, tuple[dict[str, tuple[str, ...]], str]] = {
    "gemm": (
        {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS},
        "AWQ's GEMM layout has qweight and qzeros int32 and scales, all 2-D",
    ),
    "gemv": (
        {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS},
        "AWQ's GEMV layout has qweight and qzeros int32 and scales, all 2-D",
    ),
    "gemv_fast": (
        {"qweight": ("I16",), "qzeros": FLOATS, "scales": FLOATS},
        "AWQ's GEMVFast layout has qweight int16, qzeros and scales in float, all 2-D",
    ),
    "llm-awq": (
        {"qweight": ("I16",), "scaled_zeros": FLOATS, "scales": FLOATS},
        "llm-awq has qweight int16, scaled_zeros and scales in float, all 2-D",
    ),
    "marlin": ({"qweight": ("I32",), "scales": FLOATS}, "AWQ's Marlin layout has qweight int32 and scales, both 2-D"),
}
"""Per variant the parts of every layer with their dtypes, and what to say where they are not there."""


def detect(location: Location) -> str | None:
    """The variant that the folder says it is, or None."""
    config = quantization_of(location)
    if config is None or str(config.get("quant_method", "")).lower() != "awq":
        return None
    version = _version(config)
    return version if version in _WANTED else "gemm"


def quantization_of(location: Location) -> dict[str, Any] | None:
    """The AWQ quantization config: config.json's, or the old quant_config.json."""
    config = location.json("config.json")
    found = None if config is None else config.get("quantization_config")
    if found is None and OLD_CONFIG in location.names:
        found = {"quant_method": "awq", **(location.json(OLD_CONFIG) or {})}
    if found is not None and not isinstance(found, dict):
        raise UnreadableError(f"config.json: quantization_config is a {type(found).__name__}, wanted an object")
    return found


def is_gemm(tensors: TensorSet) -> bool:
    """Whether the shapes of what nobody said anything of are the gemm layout's and no other's: words along the outputs, no g_idx."""
    found = False
    for name, words in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "g_idx":
            return False
        if leaf != "qweight":
            continue
        zeros, scales = tensors.get(f"{module}.qzeros"), tensors.get(f"{module}.scales")
        if zeros is None or scales is None or not len(words.shape) == len(zeros.shape) == len(scales.shape) == 2:
            return False
        if (words.dtype, zeros.dtype, zeros.shape) != ("I32", "I32", (scales.shape[0], words.shape[1])) or scales.shape[
            1
        ] != 8 * words.shape[1]:
            return False
        found = True
    return found


def _version(config: Mapping[str, Any]) -> str:
    """What the config calls its layout: GPTQModel says ``format``; ``backend`` is transformers' word for llm-awq."""
    backend = str(config.get("backend", "")).lower()
    said = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
    return backend if backend == "llm-awq" else str(said).lower()


def words_of_groups(groups: int, group_size: int) -> int:
    """W of the padded layouts: words of 8 groups, rounded up to what the kernel loads at once."""
    if group_size < 128 and group_size not in {64, 32}:
        raise UnreadableError(f"groups of {group_size} inputs; AWQ's GEMV layouts have 32, 64, or 128 and more")
    at_once = {64: 2, 32: 4}.get(group_size, 1)
    return math.ceil(math.ceil(groups / 8) / at_once) * at_once


class Awq(QweightCheckpoint):
    """Reader of all variants. Bits and group size come from shapes, where those say it, and must agree with the config."""

    def __init__(self, location: Location, variant: str) -> None:
        config = quantization_of(location) or {}
        version = _version(config)
        super().__init__(location, "awq", variant, location.tensors(), PARTS)
        self._group = config.get("group_size", config.get("q_group_size"))
        bits = config.get("bits", config.get("w_bit", 4))
        if bits != 4:
            raise UnreadableError(f"config.json: AWQ with bits {bits!r}; every AWQ layout holds 4 bits")
        if version not in _WANTED:
            why = f"version {version!r} is not read yet"
            self.unsupported = [Unsupported(module, f"AWQ {version}", why) for module in self.layer_names]
            self.entries = [entry for entry in self.entries if entry[0] == "plain"]

    def layer(self, name: str) -> QuantizedLinear:
        self.require(name, *_WANTED[self.variant])
        zeros: ArrayLike | None
        if self.variant == "gemm":
            codes, scales, zeros = self._gemm(name)
        elif self.variant == "marlin":
            codes, scales, zeros = self._marlin(name)
        else:
            codes, scales, zeros = self._padded(name)
        (out, in_), groups = codes.shape, scales.shape[1]
        found = None if zeros is None else tuple(zeros.shape)
        if found not in {None, tuple(scales.shape)} or scales.shape[0] != out or not (groups and in_) or in_ % groups:
            raise UnreadableError(
                f"{name}: codes are [out, in] = {[out, in_]}, scales [groups, out] = {list(scales.shape)[::-1]}, "
                f"zero points {'none' if found is None else list(found)[::-1]}; they contradict one another"
            )
        group_size = in_ // groups
        self.check_group_size(name, in_, group_size, self._group)
        weights = QuantArgs(4, "int", zeros is None, "group" if groups > 1 else "channel", group_size if groups > 1 else None)
        layer = QuantizedLinear(name, (out, in_), QuantScheme(weights), codes, scales, zeros, bias=self.bias(name))
        layer.check()
        return layer

    def _gemm(self, name: str) -> tuple[PackedMatrix, ArrayLike, ArrayLike]:
        codes = PackedMatrix(GEMM, self.part(name, "qweight"))
        return codes, self.part(name, "scales").T, PackedMatrix(GEMM, self.part(name, "qzeros"), "<i2")

    def _marlin(self, name: str) -> tuple[PackedMatrix, ArrayLike, None]:
        return PackedMatrix(MARLIN, self.part(name, "qweight")), PermutedScales(self.part(name, "scales")), None

    def _padded(self, name: str) -> tuple[PackedMatrix, ArrayLike, ArrayLike]:
        """gemv, gemv_fast and llm-awq: as many groups as the config's group size makes, in tensors that are padded."""
        gemv = self.variant == "gemv"
        codes = PackedMatrix(GEMV if gemv else GEMV_FAST, self.part(name, "qweight"))
        out, in_ = codes.shape
        size = in_ if self._group == -1 else self._group
        if not isinstance(size, int) or size < 1 or in_ % size:
            raise UnreadableError(f"{name}: group_size {self._group!r} in the config, wanted a divisor of {in_} inputs; correct the config")
        groups = in_ // size
        zeros_name = next(part for part in _WANTED[self.variant][0] if part.endswith("zeros"))
        scales, zeros = self.part(name, "scales"), self.part(name, zeros_name)
        words = words_of_groups(groups, size)
        wanted = {"scales": (out, 8 * words), zeros_name: (out, words)} if gemv else dict.fromkeys(("scales", zeros_name), (8 * words, out))
        for part, array in (("scales", scales), (zeros_name, zeros)):
            if array.shape != wanted[part]:
                raise UnreadableError(
                    f"{name}: {part} is {list(array.shape)}, wanted {list(wanted[part])} for [out, in] = {[out, in_]} in groups of {size}; "
                    "they contradict one another"
                )
        if gemv:
            return codes, _corner(scales, out, groups), PackedMatrix(GEMV, zeros, "<i2", groups)
        scales, zeros = _corner(scales, groups, out).T, _corner(zeros, groups, out).T
        return codes, scales, ScaledZeros(name, zeros, scales, 4)


def _corner(stored: Any, rows: int, cols: int) -> Any:
    """The first rows and columns of a stored matrix, unread where it can be."""
    return stored[:rows, :cols] if isinstance(stored, np.ndarray) else stored.corner(rows, cols)


def outputs(layer: LayerTarget, variant: str) -> tuple[TensorSpec, ...]:
    """The tensors that spell ``layer``: qweight, qzeros (but for Marlin), scales, and bias where there is one."""
    name, (out, _), groups, dtype = layer.name, layer.shape, layer.groups, layer.scale_dtype
    qweight, qzeros, scales = f"{name}.qweight", f"{name}.qzeros", f"{name}.scales"
    specs: tuple[TensorSpec, ...]
    if variant == "gemm":
        specs = (
            TensorSpec(qweight, "I32", GEMM.stored_shape(layer.shape), "codes", GEMM),
            TensorSpec(qzeros, "I32", GEMM.stored_shape((out, groups)), "zero_points", GEMM),
            TensorSpec(scales, dtype, (groups, out), "scales", transposed=True),
        )
    elif variant == "marlin":
        specs = (
            TensorSpec(qweight, "I32", MARLIN.stored_shape(layer.shape), "codes", MARLIN),
            TensorSpec(scales, dtype, (groups, out), "scales", transposed=True, order=scale_order(groups)),
        )
    else:
        columns = 8 * words_of_groups(groups, layer.shape[1] // groups)
        if variant == "gemv":
            specs = (
                TensorSpec(qweight, "I32", GEMV.stored_shape(layer.shape), "codes", GEMV),
                TensorSpec(qzeros, "I32", GEMV.stored_shape((out, columns)), "zero_points", GEMV, columns=columns),
                TensorSpec(scales, dtype, (out, columns), "scales", columns=columns),
            )
        else:
            specs = (
                TensorSpec(qweight, "I16", GEMV_FAST.stored_shape(layer.shape), "codes", GEMV_FAST),
                TensorSpec(qzeros, dtype, (columns, out), "scaled_zeros", transposed=True, columns=columns),
                TensorSpec(scales, dtype, (columns, out), "scales", transposed=True, columns=columns),
            )
    return specs if layer.bias_dtype is None else (*specs, TensorSpec(f"{name}.bias", layer.bias_dtype, (out,), "bias"))


def quantization_config(model: ModelFacts, variant: str) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """({file: object}, config.json's quantization_config): all six keys that readers look for."""
    sizes = {layer.group_size for layer in model.layers}
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": sizes.pop() if len(sizes) == 1 else None,
        "version": variant,
        "zero_point": variant != "marlin",
        "modules_to_not_convert": list(model.float_linears) or None,
    }
    old = {
        "w_bit": 4,
        "q_group_size": config["group_size"],
        **{key: config[key] for key in ("version", "zero_point", "modules_to_not_convert")},
    }
    return {OLD_CONFIG: old}, config


_HOLDS: dict[str, Any] = {"bits": (4,), "strategies": ("group",), "group_sizes": (128, 64, 32)}

SPEC = FormatSpec(
    name="awq",
    tool="AutoAWQ 0.2.9",
    about="4-bit weights for GPUs; read by AutoAWQ, transformers, vLLM, SGLang, LMDeploy",
    variants=(
        Variant(
            "gemm",
            "qweight packed along output channels",
            Capabilities(**_HOLDS, scale_dtypes=("F16", "BF16", "F32"), multiple_of=(32, 32)),
            readers="AutoAWQ, transformers, vLLM, SGLang, LMDeploy (group 128), GPTQModel",
        ),
        Variant(
            "gemv",
            "qweight packed along inputs, for one token at a time",
            Capabilities(**_HOLDS, scale_dtypes=("F16",), multiple_of=(8, 32)),
            readers="AutoAWQ, transformers and GPTQModel, on GPUs",
        ),
        Variant(
            "gemv_fast",
            "tiles of 4 outputs by 64 inputs, zero points multiplied by their scales",
            Capabilities(**_HOLDS, scale_dtypes=("F16",), multiple_of=(8, 64)),
            readers="AutoAWQ, transformers and GPTQModel, on GPUs",
        ),
        Variant(
            "marlin",
            "tiles of 64 outputs by 16 inputs, symmetric: no zero points",
            Capabilities(**{**_HOLDS, "group_sizes": (128,)}, scale_dtypes=("F16",), multiple_of=(64, 128), zero_points=False),
            readers="AutoAWQ and GPTQModel, on GPUs",
        ),
        Variant("llm-awq", "gemv_fast with its zeros called scaled_zeros", None, readers="llm-awq, transformers and GPTQModel, on GPUs"),
    ),
    detect=detect,
    open=Awq,
    outputs=outputs,
    quantization_config=quantization_config,
    default_variant="gemm",
)
