"""What a format is to the rest of Weighbridge: one frozen row of data and three functions.

``FormatSpec`` is that row. ``Capabilities`` says what a variant can hold; only ``convert.plan`` compares it with layers.
A format's writer is data too: ``outputs`` lists the tensors that spell one layer (``TensorSpec``: name, dtype, shape,
which part of the law it holds, in which layout), and the engine in ``convert.run`` fills them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .ir import ActOrder, Element, QuantizedLinear, QuantScheme, Strategy
from .layouts import Layout
from .safetensors_file import TensorInfo

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, Location
    from .laid_out import LaidOut

Part = Literal[
    "codes", "scales", "zero_points", "scaled_zeros", "outer", "g_idx", "bias", "weight", "shape", "input_scale", "input_zero_point",
    "deq_scale", "quant_bias", "scale_bias", "outer_zeros", "input_smooth", "smoothed_input_scale", "merged_bias", "zero_point_bias",
]  # fmt: skip
InputKind = Literal["static", "dynamic", "both"]
"""How a layer's inputs are quantized: by scales that the file holds, by scales found at run time, or in each of two modes."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that a format stores for a layer.

    part        what it holds of the law; layout: how codes or zero points sit in its words
                ("scaled_zeros": minus the product of scale and unsigned zero point, in the scales' dtype;
                "shape": (out, in) as two integers; "deq_scale", "quant_bias", "scale_bias": msModelSlim's derived tensors;
                "outer_zeros": zeros beside the outer scales; "smoothed_input_scale", "merged_bias", "zero_point_bias": Golden Stick's)
    transposed  scales and zero points are stored [groups, out] instead of [out, groups]
    negated     zero points that are added: negated once they are floats, so that 0 is -0.0, or while they are integers
    added       to signed zero points that are stored as numbers
    columns     groups stored, where they are padded with zero bits; 0: the layer's own
    order       of so many outputs place i holds the scale of output ``order[i]``; (): as they come
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    part: Part
    layout: Layout | None = None
    transposed: bool = False
    columns: int = 0
    order: tuple[int, ...] = ()
    negated: Literal["", "float", "integer"] = ""
    added: int = 0


@dataclass(frozen=True, slots=True)
class LayerTarget:
    """A layer as the target will spell it: what ``outputs`` and ``quantization_config`` need, without any data.

    group_size is inputs per scale (-1: one per channel); the dtypes are safetensors names.

    input_dtype   of a static input scale, None without one; outer_dtype: of the outer level of scales, None without one
    derived       tensors that follow from the law and are written beside it, by leaf name, with their dtypes
    scalars       parts ("scales", "zero_points") whose one number for the whole tensor has no dimensions, as in the source
    smooth_dtype  of a scale that multiplies the inputs, None without one
    product_divides  the weights' scale comes back from its product with the inputs', if that is all that is stored
    """

    name: str
    shape: tuple[int, int]
    scheme: QuantScheme
    scale_dtype: str
    bias_dtype: str | None
    input_dtype: str | None = None
    outer_dtype: str | None = None
    derived: tuple[tuple[str, str], ...] = ()
    scalars: tuple[Part, ...] = ()
    smooth_dtype: str | None = None
    product_divides: bool = False

    @property
    def group_size(self) -> int:
        return self.scheme.weights.group_size or -1

    @property
    def inputs(self) -> InputKind | None:
        """How its inputs are quantized; None: they are not."""
        return input_kind(self.scheme, self.input_dtype is not None)

    @property
    def groups(self) -> int:
        return 1 if self.group_size == -1 else self.shape[1] // self.group_size


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a folder's quantization config must say about the whole model.

    layers        every quantized layer as it will be spelled; float_linears: linears left in float, full dotted names
    others        modules outside the blocks with a float matrix: lm_head, embeddings, projectors
    entries       ("layer" | "plain", name) of everything in the folder, in order
    model_dtype   torch dtype name that the engine should compute in ("float16", "bfloat16"), or None to leave it
    attention     stored tensors of a quantized KV cache or attention that are carried; said: what the source says of them
    config        the model's config.json, None without one; folder: the name of the model's folder
    fused         linears that engines fuse are to be stored as one, where the format can
    ranks         of tensor parallelism that it is to be written for, where the format has parts for each
    stored        the source's tensors by name
    model_name    what the user calls the model, "" for what the format would
    """

    layers: tuple[LayerTarget, ...]
    float_linears: tuple[str, ...]
    model_dtype: str | None
    entries: Sequence[tuple[str, str]] = ()
    others: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    said: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    folder: str = ""
    fused: bool = False
    ranks: int = 1
    stored: Mapping[str, TensorInfo] = field(default_factory=dict)
    model_name: str = ""


def input_kind(scheme: QuantScheme, has_scale: bool) -> InputKind | None:
    """How a layer of ``scheme`` quantizes its inputs; has_scale: whether there is a static scale."""
    if scheme.inputs is None:
        return None
    if not scheme.inputs.dynamic:
        return "static"
    return "both" if has_scale else "dynamic"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one variant of a format can hold.

    elements, bits, strategies   of the weights
    group_sizes                  inputs per group that its readers take; the first is preferred for per-channel sources
    smallest_zero                smallest zero point, in steps above the smallest code (GPTQ v1 stores z - 1: 1)
    zero_points                  says zero points; where not, it is the middle code (symmetric layers only)
    omits                        parts that are left out where they say nothing: "zero_points" that are all 0, a regular "g_idx"
    act_order                    kinds of irregular g_idx
    scale_dtypes                 safetensors names; the first is what its loaders want; "keep": as they are; "model": as they are, but
                                 float32 in the model's half precision; "half": the same, but 8-bit layers whose inputs are quantized
                                 keep them
    inputs                       kinds of input quantization that it holds; outer: holds two-level scales of integer codes
    sparse                       says of layers with static inputs that they are sparse, and keeps their scale in derived tensors only
    smooth                       holds scales that multiply the inputs
    multiple_of                  (out, in) must be multiples of these
    mixed_groups                 whether layers may have different group sizes within one folder
    lm_head                      whether lm_head may be quantized
    dequantized                  holds float weights: layers are dequantized into it
    respells                     holds models without a quantized layer, float weights under names or in files of its own
    for_engine                   a dialect for one engine: what that would not load is refused
    fused_alike                  whether its consumers fuse q/k/v and gate/up, which must then agree
    """

    elements: tuple[Element, ...] = ("int",)
    bits: tuple[int, ...] = ()
    strategies: tuple[Strategy, ...] = ()
    group_sizes: tuple[int, ...] = ()
    smallest_zero: int = 0
    zero_points: bool = True
    omits: tuple[Part, ...] = ()
    act_order: tuple[ActOrder, ...] = ()
    scale_dtypes: tuple[str, ...] = ()
    inputs: tuple[InputKind, ...] = ()
    outer: bool = False
    sparse: bool = False
    smooth: bool = False
    multiple_of: tuple[int, int] = (1, 1)
    mixed_groups: bool = False
    lm_head: bool = False
    dequantized: bool = False
    respells: bool = False
    fused_alike: bool = True
    for_engine: bool = False


FLOAT_WEIGHTS = Capabilities(
    elements=("int", "e4m3", "e5m2", "e2m1", "nf4"),
    bits=(2, 3, 4, 5, 6, 7, 8),
    strategies=("tensor", "channel", "group", "block"),
    act_order=("group", "static"),
    scale_dtypes=("F16", "BF16", "F32"),
    mixed_groups=True,
    lm_head=True,
    dequantized=True,
    fused_alike=False,
)
"""What a format of float weights holds: whatever can be dequantized."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A dialect of a format, written ``format:variant``; ``holds`` is None where it can be read but not written yet."""

    name: str
    about: str
    holds: Capabilities | None
    readers: str = ""


@dataclass(frozen=True, slots=True)
class Objection:
    """Why a format cannot spell a layer that fits its capabilities one by one: a refusal's code, and what it says."""

    code: str
    needs: str
    offers: str
    hint: str


def _no_derived(layer: QuantizedLinear, kind: InputKind | None, model_dtype: str | None) -> tuple[tuple[str, str], ...]:
    return ()


@dataclass(frozen=True, slots=True)
class FormatSpec:
    """A format: its row in the registry.

    detect               the variant if the location holds this format, else None; looks at names and configs only
    open                 headers only; the returned checkpoint reads layers lazily
    outputs              the tensors that spell one layer in a variant, or None if the format cannot be written yet
    quantization_config  ({file name: JSON object}, quantization_config for config.json) of a folder
    stem                 name of the weight files without shard number and suffix
    lay_out              every output file from (name, dtype, shape), the model, the variant and the most bytes of a shard;
                         RefusedError for a tensor that it cannot hold. None: safetensors, called ``stem``
    missing              what a folder that loads needs and that cannot be made, in words
    index                name of the index of so many weight files of a variant, if there is one. None: of several, ``stem``'s
    config_keys          what config.json says beside quantization_config
    derived              (leaf name, dtype) of tensors that follow from the law and are written beside it, of a layer whose inputs
                         are quantized in a way, for a model of a dtype ("BF16", "F16", "F32"; None: unknown)
    objection            why a layer as it would be spelled cannot be, or None
    owner_writes_only    its tool refuses files that others may write
    cache_by_variant     a quantized KV cache is spelled otherwise in each variant
    stores_product       of static inputs' and weights' scales the product alone is stored, in some variant
    ignores              whether a plain tensor is left out, since the engine computes it itself
    sidecars             writes everything but the weights into a folder, from the model's and for a variant; what is missing, in words.
                         None: as a Hugging Face folder has it
    source               how a checkpoint that becomes this format, or is compared with it, is looked at; None: as it is
    """

    name: str
    tool: str
    about: str
    variants: tuple[Variant, ...]
    detect: Callable[[Location], str | None]
    open: Callable[[Location, str], Checkpoint]
    outputs: Callable[[LayerTarget, str], tuple[TensorSpec, ...]] | None = None
    quantization_config: Callable[[ModelFacts, str], tuple[Mapping[str, Any], dict[str, Any] | None]] | None = None
    stem: Callable[[ModelFacts, str], str] = lambda model, variant: "model"
    lay_out: Callable[[Iterable[tuple[str, str, tuple[int, ...]]], ModelFacts, str, int], list[LaidOut]] | None = None
    index: Callable[[str, int], str | None] | None = None
    missing: Callable[[ModelFacts, str], list[str]] = lambda model, variant: []
    config_keys: Callable[[ModelFacts, str], Mapping[str, Any]] = lambda model, variant: {}
    derived: Callable[[QuantizedLinear, InputKind | None, str | None], tuple[tuple[str, str], ...]] = _no_derived
    objection: Callable[[LayerTarget, str], Objection | None] = lambda layer, variant: None
    owner_writes_only: bool = False
    cache_by_variant: bool = False
    stores_product: bool = False
    ignores: Callable[[str], bool] = lambda name: False
    sidecars: Callable[[ModelFacts, str, Location, Path], list[str]] | None = None
    source: Callable[[Location], Location] | None = None
    default_variant: str = field(default="")

    def variant(self, name: str) -> Variant | None:
        """The variant called ``name`` ("" means the default), or None."""
        wanted = name or self.default_variant
        return next((variant for variant in self.variants if variant.name == wanted), None)
