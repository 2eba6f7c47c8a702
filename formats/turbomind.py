"""TurboMind workspaces: what ``lmdeploy convert`` wrote for LMDeploy's own engine, until 0.9.

Defined by LMDeploy 0.1.0 (``turbomind/deploy``, ``csrc/turbomind/kernels/gemm_s_f16``) and 0.9.2. A workspace is a folder of raw files, one
for each fused matrix and rank of tensor parallelism (``turbomind_tree``), with a configuration of sizes (``turbomind_config``).

====================================  =========================================================================================
``triton_models/weights``             the weights, and config.ini (until 0.5) or config.yaml
``triton_models/tokenizer``           until 0.7.0: tokenizer.model, JSON and Python files of the model's folder; then at the root
``triton_models/interactive/1``       until 0.5.1: ``placeholder``, the link ``weights``
``triton_models/preprocessing/1``     until 0.5.1: the link ``tokenizer``; postprocessing alike
``model_repository``                  until 0.5.1: the links turbomind, preprocessing, postprocessing to those three
====================================  =========================================================================================

Triton's own files there (config.pbtxt, model.py) and service_docker_up.sh belong to LMDeploy and are not written: its engine does not
read them, only a Triton server does.

Law: float weights as they are, or ``w[o, i] = (q - z) * scale`` with q and z from 0 to 15, in groups of 128 inputs.

Quirks:

1. The three encodings of 4-bit codes (AWQ's, tiles until 0.5, rows since 0.6) have one size: the configuration tells them apart.
2. Until 0.5 q and k of other groups than 128 are shuffled wrongly, since a kernel is given the group size for the head size.
3. 4-bit workspaces are float16 wherever they are float.
4. Where q, k and v have biases the output projection must: it is 0 where the model has none (Qwen2).
5. Since 0.6.2 feed-forward sizes are filled up with 0 where ranks do not share out whole groups, and since 0.6.3 a key head is repeated
   where there are more ranks; ``0.7`` and ``0.9`` are written alike. config.json says what is the model's; without it all is read.
6. LMDeploy deletes the destination before it writes, and puts tokenizer.json into the source's folder; neither is done here.
7. ``tokenizer_size`` of config.yaml is written as the vocabulary's rows, where LMDeploy counts the tokenizer's tokens.
8. Of tied embeddings LMDeploy up to 0.4.2 wrote no output.weight, which the engine needs; later ones and we write the embedding again.
9. InternLM2, QWen and Baichuan are unfused (``llama_names``). Read back they have Llama's names, and their config.json says so.
10. ``quant_policy = 4`` in the configuration is an int8 KV cache until 0.3, int4 since 0.4. Scales of the first lie beside the weights.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, IntegralZeros, LeftOut, Location
from .errors import RefusedError, UnreadableError
from .gptq_config import has_bias
from .ir import ArrayLike, QuantArgs, QuantizedLinear, QuantScheme
from .laid_out import LaidOut
from .layouts import PackedMatrix
from .llama_names import as_llama, llama_config
from .safetensors_file import SafetensorsFile, TensorSet
from .spec import Capabilities, FormatSpec, LayerTarget, ModelFacts, TensorSpec, Variant
from .turbomind_config import (
    INI,
    YAML,
    as_in_model,
    check_divides,
    check_model_name,
    geometry_of_ini,
    geometry_of_yaml,
    read_config,
    text_of,
)
from .turbomind_files import WEIGHTS, Filling, WorkspaceFile, WorkspaceOutput, caches_of, sizes_in
from .turbomind_settings import settings_of, template_for
from .turbomind_tree import CACHE, HEAD, Geometry, layout_of, tree_of

TILES = "0.1"
"""The variant with tiles and a config.ini; the others have rows and a config.yaml, which "0.6" and "0.7" say otherwise than "0.9"."""
_LINEAR = re.compile(r"model\.layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.(\w+)")
MODELS = ("llama", "internlm", "qwen2", "mistral", "internlm2", "qwen", "baichuan")
"""config.json's model_type of models whose tensors have these names, or are given them by ``llama_names``."""


def weights_folder(location: Location) -> Path | None:
    """The ``weights`` folder of a workspace that was named by its root, ``triton_models``, that folder itself, or a file in it."""
    folder = location.folder
    for place in (folder / WEIGHTS, folder / "weights", folder):
        if any((place / name).is_file() for name in (INI, YAML)) and (place != folder or "norm.weight" in location.names):
            return place
    return None


def detect(location: Location) -> str | None:
    """The variant, as the configuration beside the weights says; None where there is none."""
    folder = weights_folder(location)
    if folder is None:
        return None
    if (folder / INI).is_file():
        return TILES
    model = read_config(folder / YAML).get("model_config")
    if isinstance(model, dict) and "attn_tp_size" in model:
        return "0.9"
    return "0.7" if isinstance(model, dict) and isinstance(model.get("inter_size"), list) else "0.6"


def _base(tiles: bool) -> int:
    """What is added to a signed zero point."""
    return 64 + 8 if tiles else 8


def _config_beside(location: Location, folder: Path) -> tuple[dict[str, Any] | None, Location | None]:
    """(config.json, where it and the tokenizer lie if not in the location): they do not lie beside the weights."""
    if location.base is not None:
        return location.base.json("config.json"), None
    if "config.json" in location.names:
        return location.json("config.json"), None
    folder = folder.resolve()  # it may be the link in triton_models/interactive/1
    for place in (folder.parent / "tokenizer", folder.parent.parent):
        if (place / "config.json").is_file():
            beside = Location.of(place)
            config = beside.json("config.json")
            assert config is not None
            config.pop("quantization_config", None)
            return config, beside
    return None, None


class Turbomind(Checkpoint):
    """Reader of workspaces of any number of ranks."""

    respells = True

    def __init__(self, location: Location, variant: str) -> None:
        tiles = variant == TILES
        name = INI if tiles else YAML
        folder = weights_folder(location) or location.folder / WEIGHTS
        said = location.documents.get(f"{WEIGHTS}/{name}")
        sections = read_config(folder / name) if said is None else said
        config, sidecars = _config_beside(location, folder)
        shape = geometry_of_ini(sections) if tiles else as_in_model(geometry_of_yaml(sections), config)
        opener: Any = location.opener
        if opener is SafetensorsFile:
            sizes = sizes_in(folder)
            if shape.layers * shape.tp > len(sizes):
                counts = f"{shape.layers} layers and {shape.tp} ranks"
                raise UnreadableError(f"{folder.name}: holds {len(sizes)} weight files, and {name} says {counts}; the rest is not there")
            shape = replace(shape, caches=caches_of(sizes, shape))

            def opener(path: Path, number: int) -> WorkspaceFile:
                return WorkspaceFile(path, number, shape, sizes)

        super().__init__(location, "turbomind", variant, TensorSet([folder], opener=opener))
        self.shape = shape
        self.sidecars = sidecars
        self.config = config
        self.entries = [("plain", tensor) for tensor in self.tensors if not CACHE.fullmatch(tensor)]
        self.attention = [tensor for tensor in self.tensors if CACHE.fullmatch(tensor)]
        if shape.group:
            parts = {tensor for tensor in self.tensors if _LINEAR.fullmatch(tensor)}
            self.entries = [
                ("layer", tensor.removesuffix(".qweight")) if tensor.endswith(".qweight") else (kind, tensor)
                for kind, tensor in self.entries
                if tensor.endswith(".qweight") or tensor not in parts
            ]
        self._leave_out()

    def beside(self, base: Location | None, target: str) -> Location | None:
        """As ``Checkpoint.beside``; in other formats InternLM2, QWen or Baichuan is the Llama that its tensors are named as."""
        place = base or self.sidecars or self.location
        config = place.json("config.json")
        said = None if config is None or target == self.format else llama_config(config)
        return base or self.sidecars if said in (None, config) else replace(place, documents={"config.json": said})

    def _leave_out(self) -> None:
        """Biases of the output projection that LMDeploy made up."""
        config = llama_config(self.config or {})
        for name in [tensor for tensor in self.tensors if tensor.endswith(".o_proj.bias")]:
            module = name.removesuffix(".bias")
            if not has_bias(config, module):
                why = "a bias of the output projection, which the model has not"
                self.left_out.append(LeftOut(name, "zero", "", why, "is not 0"))
                self.entries = [entry for entry in self.entries if entry != ("plain", name)]
        self._not_biases = {item.tensor for item in self.left_out}
        if self.shape.filled and self.location.opener is SafetensorsFile:
            self.left_out.append(Filling.of(self.tensors.files[0].path, self.shape, self.tensors))

    def layer_tensors(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{part}" for part in ("qweight", "scales", "zeros", "bias") if f"{name}.{part}" in self.tensors)

    def is_cache(self, tensor: str) -> bool:
        return CACHE.fullmatch(tensor) is not None

    def bias(self, name: str) -> ArrayLike | None:
        return None if f"{name}.bias" in self._not_biases else super().bias(name)

    def layer(self, name: str) -> QuantizedLinear:
        tiles, stored = self.variant == TILES, {part: self._part(name, part) for part in ("qweight", "scales", "zeros")}
        codes = PackedMatrix(layout_of(name, tiles), stored["qweight"])
        zeros = IntegralZeros(f"{name}.zeros", stored["zeros"].T, -8, 7, base=_base(tiles))
        scheme = QuantScheme(QuantArgs(4, "int", False, "group", self.shape.group))
        layer = QuantizedLinear(name, codes.shape, scheme, codes, stored["scales"].T, zeros, bias=self.bias(name))
        layer.check()
        return layer

    def _part(self, name: str, part: str) -> Any:
        return self.tensors.tensor(f"{name}.{part}")


def outputs(layer: LayerTarget, variant: str) -> tuple[TensorSpec, ...]:
    """The tensors that spell ``layer``, as ``turbomind_tree`` calls them."""
    name, (out, _), groups, tiles = layer.name, layer.shape, layer.groups, variant == TILES
    layout = layout_of(name, tiles)
    specs = (
        TensorSpec(f"{name}.qweight", "I32", layout.stored_shape(layer.shape), "codes", layout),
        TensorSpec(f"{name}.scales", "F16", (groups, out), "scales", transposed=True),
        TensorSpec(f"{name}.zeros", "F16", (groups, out), "zero_points", transposed=True, added=_base(tiles)),
    )
    return specs if layer.bias_dtype is None else (*specs, TensorSpec(f"{name}.bias", layer.bias_dtype, (out,), "bias"))


def tensors_of(model: ModelFacts, variant: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape)} of everything that a model becomes."""
    found = {spec.name: (spec.dtype, spec.shape) for layer in model.layers for spec in outputs(layer, variant)}
    for name in [*(name for kind, name in model.entries if kind == "plain"), *model.attention]:
        found[name] = model.stored[name].dtype, model.stored[name].shape
    return found


def geometry_for(tensors: Mapping[str, tuple[str, tuple[int, ...]]], model: ModelFacts, variant: str) -> Geometry:
    """The sizes of the workspace that these tensors make. RefusedError where they make none."""
    config, tiles = model.config, variant == TILES
    if config is None:
        raise RefusedError("config.json: is not there, and says how many heads there are; pass --base-model with the model's folder")
    kind = config.get("model_type")
    if kind not in MODELS:
        raise RefusedError(f"{kind}: TurboMind's names of this model are not known here; those of {', '.join(MODELS)} are")
    heads, shapes = config.get("num_attention_heads"), {name: shape for name, (_, shape) in tensors.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if len(shapes.get(name, ())) != 2:
            why = "a workspace needs it, also where the model says that it is the embedding again"
            raise RefusedError(f"{name}: is not there, and {why}; save the model with tie_word_embeddings false")
    vocabulary, hidden = shapes["model.embed_tokens.weight"]
    outs: dict[tuple[int, str], int] = {}
    for name, shape in shapes.items():
        match = _LINEAR.fullmatch(name)
        if match is not None and match[3] in {"weight", "scales"} and len(shape) == 2:
            outs[int(match[1]), match[2]] = shape[0 if match[3] == "weight" else 1]
    layers = 1 + max((number for number, _ in outs), default=-1)
    missing = next((number for number in range(layers) if (number, "mlp.gate_proj") not in outs), None)
    if not layers or missing is not None or (0, "self_attn.q_proj") not in outs or (0, "self_attn.k_proj") not in outs:
        raise RefusedError(
            f"model.layers.{missing or 0}: its linears are not there or have other names; wanted q_proj to down_proj of every layer"
        )
    if not isinstance(heads, int) or heads < 1 or outs[0, "self_attn.q_proj"] % heads:
        raise RefusedError(
            f"config.json: num_attention_heads is {heads!r}, and q_proj has {outs[0, 'self_attn.q_proj']} outputs; correct it"
        )
    head = outs[0, "self_attn.q_proj"] // heads
    if (tiles and hidden != heads * HEAD) or (variant in {TILES, "0.6"} and head != HEAD):
        why = f"has heads of {head}, and LMDeploy up to 0.6.3 knows heads of {HEAD} only"
        raise RefusedError(f"model.layers.0.self_attn.q_proj: {why}; choose turbomind:0.7 or turbomind:0.9")
    group = model.layers[0].group_size if model.layers else 0
    biases = [name.removesuffix(".bias") for name in tensors if name.endswith("_proj.bias")]
    o_bias = "model" if any(name.endswith(".o_proj") for name in biases) else "zero"
    cached = {name: shape[0] for name, shape in shapes.items() if CACHE.fullmatch(name)}
    inter = tuple(outs[number, "mlp.gate_proj"] for number in range(layers))
    if variant in {TILES, "0.6"} and len(set(inter)) > 1:
        raise RefusedError("config: has one feed-forward size for all layers, and theirs differ; choose turbomind:0.9")
    shape_ = Geometry(
        tiles, tensors["model.norm.weight"][0] if "model.norm.weight" in tensors else "F16", model.ranks, hidden, heads,
        outs[0, "self_attn.k_proj"] // head, inter, vocabulary, shapes["lm_head.weight"][0], group, head,
        any(name.endswith(".q_proj") for name in biases), o_bias, variant == "0.9", cached,
    )  # fmt: skip
    if variant in {"0.7", "0.9"}:
        shape_ = shape_.fill_up()
    check_divides(shape_, "--tp", RefusedError)
    return shape_


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]], model: ModelFacts, variant: str, shard: int) -> list[LaidOut]:
    """The weight files. RefusedError for a tensor that a workspace has no place for, or that it needs and that is not there."""
    found = {name: (dtype, shape) for name, dtype, shape in tensors}
    shape = geometry_for(found, model, variant)
    if shape.dtype not in {"F16", "BF16"} or (shape.group and shape.dtype != "F16"):
        raise RefusedError(
            f"model.norm.weight: is {shape.dtype}, and workspaces {'of 4 bits ' if shape.group else ''}are float16; save the model so"
        )
    config_of(model, variant, shape)  # refuses what the configuration could not say, before any work
    wanted = tree_of(shape).tensors
    for name, (dtype, size) in found.items():
        if name not in wanted:
            raise RefusedError(f"{name}: has no place in a workspace; leave it out of the model's folder")
        if (dtype, size) != (wanted[name].dtype, wanted[name].shape):
            there = f"{wanted[name].dtype} {list(wanted[name].shape)}"
            raise RefusedError(f"{name}: is {dtype} {list(size)}, and beside the others it must be {there}; all layers must be alike")
    lost = next((name for name in wanted if name not in found), None)
    if lost is not None:
        raise RefusedError(f"{lost}: is not there, and all layers must be alike, of 4 bits or of float; quantize it like the others")
    return [WorkspaceOutput.of(WEIGHTS, shape)]


def write_tree(model: ModelFacts, variant: str, base: Location, folder: Path) -> list[str]:
    """Write everything but the weights into ``folder``, from the model's; what is missing for a folder that loads, in words."""
    for name, sections in quantization_config(model, variant)[0].items():
        (folder / name).write_text(text_of(name, sections), encoding="utf-8")
    carried = [name for name in base.names if is_carried(name) and (base.folder / name).is_file()]
    for place in TOKENIZERS[variant]:
        tokenizer = folder / place
        tokenizer.mkdir(exist_ok=True)
        for name in carried:
            shutil.copyfile(base.folder / name, tokenizer / name)
    if variant == TILES:
        (folder / TOKENIZERS[TILES][0] / "placeholder").touch()
        for link, to in LINKS.items():
            (folder / link).parent.mkdir(parents=True, exist_ok=True)
            (folder / link).symlink_to(to)
        (folder / "triton_models/interactive/1/placeholder").touch()
    models = (
        ("tokenizer.model", "qwen.tiktoken") if variant == TILES else ("tokenizer.model", "qwen.tiktoken", "tokenizer.json", "merges.txt")
    )
    missing = [] if any(name in carried for name in models) else [f"{models[0]}: is not beside config.json; copy it to {tokenizer.name}"]
    return missing


def is_carried(name: str) -> bool:
    """Whether ``lmdeploy convert`` copies a file of the model's folder beside the tokenizer; indexes of weights and our own are not."""
    if name.endswith(".index.json") or name == "weighbridge.json":
        return False
    return name.endswith((".json", ".py")) or name in {"tokenizer.model", "qwen.tiktoken", "merges.txt"}


TOKENIZERS = {
    TILES: ("triton_models/tokenizer",),
    "0.6": ("triton_models/tokenizer",),
    "0.7": ("triton_models/tokenizer", ""),
    "0.9": ("",),
}
"""Where each variant's engines look for the tokenizer and config.json."""

LINKS = {
    "triton_models/interactive/1/weights": "../../weights",
    "triton_models/preprocessing/1/tokenizer": "../../tokenizer",
    "triton_models/postprocessing/1/tokenizer": "../../tokenizer",
    "model_repository/turbomind": "../triton_models/interactive",
    "model_repository/preprocessing": "../triton_models/preprocessing",
    "model_repository/postprocessing": "../triton_models/postprocessing",
}
"""The links of a workspace until 0.5.1."""


def config_of(model: ModelFacts, variant: str, shape: Geometry) -> dict[str, Any]:
    """The sections of config.ini or config.yaml."""
    assert model.config is not None
    return settings_of(shape, model.config, check_model_name(model.model_name or template_for(model.config)), variant)


def quantization_config(model: ModelFacts, variant: str) -> tuple[Mapping[str, Any], None]:
    """({weights' configuration: its sections}, None)."""
    sections = config_of(model, variant, geometry_for(tensors_of(model, variant), model, variant))
    return {f"{WEIGHTS}/{INI if variant == TILES else YAML}": sections}, None


_HOLDS: dict[str, Any] = {
    "bits": (4,), "strategies": ("group",), "group_sizes": (HEAD,), "scale_dtypes": ("F16",), "multiple_of": (32, 32), "respells": True,
}  # fmt: skip

SPEC = FormatSpec(
    name="turbomind",
    tool="LMDeploy 0.1.0, 0.6.0, 0.6.5, 0.9.2",
    about="workspaces of LMDeploy's own engine, float or 4-bit weights in groups of 128",
    variants=(
        Variant(TILES, "LMDeploy 0.1 to 0.5: config.ini, tiles", Capabilities(**_HOLDS), "LMDeploy 0.1 to 0.5"),
        Variant("0.6", "LMDeploy 0.6.0 to 0.6.2: config.yaml, rows", Capabilities(**_HOLDS), "LMDeploy 0.6.0 to 0.6.2"),
        Variant("0.7", "LMDeploy 0.6.4 to 0.7: config.yaml, rows", Capabilities(**_HOLDS), "LMDeploy 0.6.4 to 0.7"),
        Variant("0.9", "LMDeploy 0.8 and 0.9: config.yaml, rows", Capabilities(**_HOLDS), "LMDeploy 0.8 and 0.9"),
    ),
    detect=detect,
    open=Turbomind,
    outputs=outputs,
    quantization_config=quantization_config,
    lay_out=lay_out,
    index=lambda variant, files: None,
    ignores=lambda name: name.endswith(".rotary_emb.inv_freq"),
    sidecars=write_tree,
    source=as_llama,
    default_variant=TILES,
)
