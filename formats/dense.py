"""Dense: an ordinary Hugging Face folder with float weights; what a quantized checkpoint dequantizes to.

Defined by transformers: model.safetensors (or shards and model.safetensors.index.json), ``weight`` [out, in] of each linear in
the dtype that config.json's ``torch_dtype`` (``dtype`` since transformers 5) says.

Law: the weight is itself. Written from a quantized layer it is the law's float32 value, rounded to the folder's dtype unless
that is float32.

Llama's weights as Meta publishes them (``meta_file``) are read as the variant ``meta``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .awq import Awq, is_gemm
from .checkpoint import Checkpoint, Location
from .errors import RefusedError
from .meta_file import meta_files, meta_tensors
from .safetensors_file import TensorSet
from .spec import FLOAT_WEIGHTS, FormatSpec, LayerTarget, ModelFacts, TensorSpec, Variant


def detect(location: Location) -> str | None:
    """The variant that the folder says it is, or None."""
    if meta_files(location):
        return "meta"
    config = location.json("config.json")
    if config is None or config.get("quantization_config") is not None:
        return None
    return "hf"


class Dense(Checkpoint):
    """Reader of float folders: every tensor is plain."""

    def __init__(self, location: Location, variant: str, tensors: TensorSet | None = None) -> None:
        super().__init__(location, "dense", variant, location.tensors() if tensors is None else tensors)
        if any(name.endswith((".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")) for name in self.tensors):
            raise RefusedError(
                f"{location.folder.name}: holds quantized tensors, but config.json has no quantization_config that says how; "
                "put back the config that came with the weights"
            )
        self.entries = [("plain", name) for name in self.tensors]
        self.respells = variant == "meta"


def open_folder(location: Location, variant: str) -> Checkpoint:
    """The reader of a folder whose config.json says nothing of quantization: float, or AWQ as LMDeploy up to 0.3 leaves it."""
    if variant == "meta":
        return Dense(location, variant, meta_tensors(location))
    tensors = location.tensors()
    return Awq(location, "gemm") if is_gemm(tensors) else Dense(location, variant, tensors)


def outputs(layer: LayerTarget, variant: str) -> tuple[TensorSpec, ...]:
    """``weight`` in the scale dtype that was chosen, and bias where there is one."""
    specs = (TensorSpec(f"{layer.name}.weight", layer.scale_dtype, layer.shape, "weight"),)
    bias = layer.bias_dtype
    return specs if bias is None else (*specs, TensorSpec(f"{layer.name}.bias", bias, (layer.shape[0],), "bias"))


def quantization_config(model: ModelFacts, variant: str) -> tuple[Mapping[str, Any], None]:
    """A dense folder has none."""
    return {}, None


SPEC = FormatSpec(
    name="dense",
    tool="transformers",
    about="float weights in an ordinary Hugging Face folder",
    variants=(
        Variant(
            "hf",
            "dequantized weights",
            FLOAT_WEIGHTS,
            readers="everything",
        ),
        Variant("meta", "Llama as Meta publishes it: consolidated.00.pth and params.json", None, readers="Meta's llama"),
    ),
    detect=detect,
    open=open_folder,
    outputs=outputs,
    quantization_config=quantization_config,
    default_variant="hf",
)
