"""MindSpore: checkpoints of MindFormers, and what Golden Stick quantizes them to, for Ascend NPUs.

Defined by MindSpore Golden Stick 0.6.0 (``gs0.6``) and 1.0 to 1.4 (``gs1.2``), and MindFormers 1.3.2 to 1.6. Facts here were measured
on files that 0.6.0 and 1.2.0 wrote. 1.4's folders with Hugging Face names are ``golden_stick_folder``'s.

Files: ``rank_0/<name>.ckpt``, or one ``.ckpt`` anywhere (``mindspore_file``), beside it ``predict_<name>.yaml`` (``mindspore_yaml``);
``rank_0`` to ``rank_N`` are parts, which the run's strategy file puts together: ``mindspore_ranks`` reads them, and
``mindspore_ranks_output`` writes them.
Nothing in a file says what wrote it: variants differ by the names of the tensors. Modules go by MindFormers' names, which are Hugging
Face's here (``mindformers_names``), q, k, v and gate, up as the parts that they are of fused ones (``mindformers_file``).

Law: ``w[o, i] = (weight[o, i] + zp[o]) * scale[o] * smooth[i]``: zero points are stored negated, but for 1.4's. L is a module's name,
N its outputs, K its inputs, G its groups; float is the dtype that the network computes in.

gs0.6: a16w8 of RTN (``_handler``) and of PTQ (``_layer``), a8w8 of SmoothQuant and of PTQ

==================================  ===========  =======================================================================================
L._handler.weight                   int8 [N, K]  codes; PTQ: L._layer.weight
L._weight_quantizer.scale, .zp_neg  float [N]    zp_neg is +0.0 where symmetric; PTQ: L._layer.matmul.t_scale, .t_zp_neg, and -0.0
L._handler.bias, L._layer.bias      float [N]    a8w8: ``bias - t_zp * sum(weight) * dequant_scale``, also where the model has no bias
L._input_quantizer.t_scale          float [K]    a8w8: the inputs' scale times the smoothing; PTQ: L.input_scale
L._input_quantizer.t_zp             int8 [K]     added to the inputs' codes; PTQ: L.input_zp
L._output_quantizer.scale           int64 [N]    float32 bits of the inputs' scale times the weights'; PTQ: L._layer.matmul.dequant_scale
==================================  ===========  =======================================================================================

gs1.2: a16w8, a16w4 per channel and per group, AWQ, a8w8, a8w8 with inputs measured at run time

==================================  ===========  =======================================================================================
L._layer.weight                     int8 [N, K]  codes; of 4 bits: Int4 [K, N/2], two outputs a byte, the even one in the low nibble
L._layer.matmul.weight_scale        float [N]    or [G, N]; float32 (bfloat16 in networks of that) where inputs are measured at run time
L._layer.matmul.weight_zp           float        like weight_scale; -0.0 where symmetric; missing where inputs are measured
L._layer.matmul.smooth_scale        float [K]    AWQ: multiplies x; L.dyn_quant_op.smooth_scale where inputs are measured
L.quant_op.input_scale, .input_zp   [1] or [K]   a8w8: float and int8; [K] holds the smoothing too
L._layer.matmul.dequant_scale       int64 [N]    float32 bits, or float32 in networks of bfloat16
L._layer.matmul.quant_bias          int32 [N]    about ``-input_zp * sum(weight)``: rounded by way of float16, so up to 7 off
==================================  ===========  =======================================================================================

Quirks:

1. a8w8 has no scale of its weights: it is ``dequant_scale / input_scale``, in float32. Where input_scale differs by input it is
   ``1 / input_smooth``, and the weights' scale is dequant_scale.
2. The bias of 0.6.0's a8w8 is taken apart; what is left of one that the model has not is rounding, and counts as none.
3. SmoothQuant leaves its observers in the file (``_weight_observer_cell``), two thirds of all tensors; PTQ writes input_scale and
   input_zp of 0.6.0 twice.
4. A quantized KV cache (``paged_attention_mgr``) has its scales three times, negated or not, in names of each version: they are
   carried to files of the same version.
5. 0.6.0 with smoothing and ``qkv_concat`` corrupts models of grouped queries: the keys' rows are smoothed by the output projection's.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import golden_stick_folder
from . import mindspore_target as target
from .checkpoint import FLOATS, Checkpoint, Finding, LeftOut, Location, Unsupported
from .errors import RanksRefusedError, UnreadableError
from .golden_stick_folder import GoldenStickFolder
from .gptq_config import has_bias
from .ir import Array, ArrayLike, Extra, QuantArgs, QuantizedLinear, QuantScheme, read
from .laid_out import LaidOut
from .layouts import PackedMatrix
from .mindformers_file import CACHE, INT4, MindFormersFile
from .mindspore_ranks import RankedFile, read_strategy
from .mindspore_static import DecodedScale, TakenApart, read_inputs, read_weights
from .mindspore_target import NIBBLES, SPELLINGS, Spelling
from .mindspore_yaml import read_quantization
from .msmodelslim_target import CONTAINER
from .safetensors_file import SafetensorsFile, TensorSet
from .spec import FormatSpec, LayerTarget, ModelFacts, TensorSpec

STRATEGY = "ckpt_strategy"
"""Beginning of the names of a parallel run's strategy files."""
OBSERVERS = "_weight_observer_cell."
_KEYS = ("._handler.weight", "._layer.weight")


def checkpoint_files(location: Location) -> list[str]:
    """The ``.ckpt`` files that ``location`` holds, relative to its folder: the named one, those of rank_0, or its own."""
    if location.file is not None:
        return [location.file.name] if location.file.suffix == ".ckpt" else []
    own = [name for name in location.names if name.endswith(".ckpt") and not name.rpartition("/")[2].startswith(STRATEGY)]
    if "rank_0" in location.names and (location.folder / "rank_0").is_dir():
        inner = sorted(path.name for path in (location.folder / "rank_0").iterdir())
        return [f"rank_0/{name}" for name in inner if name.endswith(".ckpt") and not name.startswith(STRATEGY)] or own
    return own


def open_tensors(location: Location) -> TensorSet:
    """The tensors of the location's one ``.ckpt`` file, by Hugging Face's names."""
    files = checkpoint_files(location)
    if len(files) != 1:
        found = "no .ckpt file" if not files else f"{len(files)} .ckpt files ({', '.join(files[:3])})"
        raise UnreadableError(f"{location.folder.name}: {found}; name the one to read")
    opener: Any = MindFormersFile if location.opener is SafetensorsFile else location.opener
    ranks = sorted((name for name in location.names if re.fullmatch(r"rank_\d+", name)), key=lambda name: int(name[5:]))
    if files[0].startswith("rank_0/") and len(ranks) > 1:
        paths, strategy = rank_files(location, ranks), read_strategy(find_strategy(location, len(ranks)))

        def opener(path: Path, number: int) -> MindFormersFile:
            return MindFormersFile(path, number, RankedFile(paths, strategy))

    return TensorSet([location.folder / files[0]], opener=opener)


def rank_files(location: Location, ranks: Sequence[str]) -> list[Path]:
    """The one checkpoint of each rank's folder, which must be numbered from 0 without a gap."""
    found = []
    for number, name in enumerate(ranks):
        folder = location.folder / name
        files = [path for path in sorted(folder.iterdir()) if path.suffix == ".ckpt" and not path.name.startswith(STRATEGY)]
        if name != f"rank_{number}" or len(files) != 1:
            what = f"rank_{number} is missing" if name != f"rank_{number}" else f"{name} holds {len(files)} .ckpt files"
            raise UnreadableError(f"{location.folder.name}: {what}; wanted one in each of rank_0 to rank_{len(ranks) - 1}")
        found.append(files[0])
    return found


def find_strategy(location: Location, ranks: int) -> Path:
    """The strategy file of the run that saved the ranks: beside them, in rank_0, or in a folder ``strategy`` beside or above."""
    folder = location.folder
    for place in (folder, folder / "rank_0", folder / "strategy", folder.parent / "strategy"):
        found = sorted(path for path in place.glob(f"*{STRATEGY}*.ckpt") if path.is_file()) if place.is_dir() else []
        if found:
            return found[0]
    raise UnreadableError(
        f"{folder.name}: holds {ranks} ranks, each a part of the model, and no {STRATEGY}_rank_0.ckpt says which; put the strategy file "
        "of the run that saved them beside them"
    )


class GoldenStick(Checkpoint):
    """Reader of ``.ckpt`` files, quantized or float, or of ``tensors`` so named. The variant is what the names say."""

    respells = True

    def __init__(self, location: Location, variant: str, tensors: TensorSet | None = None) -> None:
        super().__init__(location, "mindspore", "float", open_tensors(location) if tensors is None else tensors)
        self._int4 = {name for file in self.tensors.files for name, type_ in file.metadata.items() if type_ == INT4}
        self._spellings: dict[str, Spelling] = {}
        modules = {name[: -len(key)] for name in self.tensors for key in _KEYS if name.endswith(key)}
        leaves: dict[str, list[str]] = defaultdict(list)
        for name in self.tensors:
            module = _module_of(name, modules)
            if module is not None:
                leaves[module].append(name[len(module) + 1 :])
        for module, found in leaves.items():
            self._spell(module, frozenset(found))
        self._sort(modules)
        kinds = {spelling.variant for spelling in self._spellings.values()}
        if kinds or self.attention:
            old = "gs0.6" in kinds or any(".key_t_scale" in name or ".key_value_t" in name for name in self.attention)
            self.variant = "gs0.6" if old else "gs1.2"
        self._read_yaml()
        if len(kinds) > 1:
            raise UnreadableError(f"{location.folder.name}: layers of {' and '.join(sorted(kinds))} in one file, which no version writes")

    def _spell(self, module: str, leaves: frozenset[str]) -> None:
        """Find how a layer is spelled."""
        weight = next(self.tensors[f"{module}{key}"] for key in _KEYS if f"{module}{key}" in self.tensors)
        if len(weight.shape) != 2:
            why = f"its weight has the shape {list(weight.shape)}; experts that are stored as one are not read yet"
            self.unsupported.append(Unsupported(module, "experts", why))
            return
        spelling = next((spelling for spelling in SPELLINGS if leaves.issuperset(spelling.needs())), None)
        if spelling is None:
            nearest = max(SPELLINGS, key=lambda spelling: len(leaves.intersection(spelling.needs())))
            missing = next(leaf for leaf in nearest.needs() if leaf not in leaves)
            raise UnreadableError(f"{module}: has {', '.join(sorted(leaves)[:4])} but no {missing}; the checkpoint is incomplete")
        self._spellings[module] = spelling

    def _sort(self, modules: set[str]) -> None:
        """Give every stored tensor its place."""
        unread = {part.name for part in self.unsupported}
        for name in self.tensors:
            module = _module_of(name, modules)
            if module is None:
                if CACHE in name:
                    self.attention.append(name)
                elif f".{OBSERVERS}" in name:
                    self.left_out.append(_observer(name))
                else:
                    self.entries.append(("plain", name))
                continue
            if module in unread:
                continue
            spelling, leaf = self._spellings[module], name[len(module) + 1 :]
            if leaf == spelling.weight:
                self.entries.append(("layer", module))
            elif leaf.startswith(OBSERVERS):
                self.left_out.append(_observer(name))
            elif leaf in (spelling.copies or {}):
                twin = f"{module}.{(spelling.copies or {})[leaf]}"
                self.left_out.append(LeftOut(name, "equal", twin, "a second copy of a layer's inputs' scale or zero point", "differs"))
            elif leaf not in spelling.leaves():
                self.functional.append(name)

    def _read_yaml(self) -> None:
        """What MindFormers' YAML beside the weights says of quantization; what is wrong with it, or with both, is a finding."""
        for name in self.location.names:
            if not name.endswith((".yaml", ".yml")) or name in self.location.documents:
                continue
            try:
                said = read_quantization(self.location.folder / name)
            except UnreadableError as error:
                self.findings.append(Finding("yaml", name, str(error)))
                continue
            bits = {"int4": 4, "int8": 8}.get(str((said or {}).get("weight_dtype")))
            found = {4 if f"{module}.{spelling.weight}" in self._int4 else 8 for module, spelling in self._spellings.items()}
            if found and bits not in found:
                words = "nothing" if said is None else f"weight_dtype {said.get('weight_dtype')}"
                what = f"says {words} of quantization, and the weights have {' and '.join(map(str, sorted(found)))} bits"
                self.findings.append(Finding("yaml", name, f"{what}: MindFormers would not load them"))

    @functools.cached_property
    def _model(self) -> dict[str, Any]:
        base = self.location.base
        return (self.config if base is None else base.json("config.json")) or {}

    def is_cache(self, tensor: str) -> bool:
        return CACHE in tensor

    def layer_tensors(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{leaf}" for leaf in self._spellings[name].leaves() if f"{name}.{leaf}" in self.tensors)

    def layer(self, name: str) -> QuantizedLinear:
        spelling = self._spellings[name]
        codes = self._codes(name, spelling)
        out, in_ = codes.shape
        smooth = self._vector(name, spelling.smooth, in_)
        bias = self._float(name, spelling.bias, (out,))
        if spelling.dequant:
            return self._static(name, spelling, codes, bias)
        weights, scales, zeros = read_weights(
            self.tensors, name, spelling.scale, spelling.zero, (out, in_), codes.layout.bits, negated=True
        )
        inputs = QuantArgs(8, strategy="token", dynamic=True) if spelling.dynamic else None
        layer = QuantizedLinear(name, codes.shape, QuantScheme(weights, inputs), codes, scales, zeros, bias=bias, input_smooth=smooth)
        layer.check()
        return layer

    def _codes(self, name: str, spelling: Spelling) -> PackedMatrix:
        tensor = f"{name}.{spelling.weight}"
        info = self.tensors[tensor]
        if info.dtype != "I8":
            raise UnreadableError(f"{tensor}: is {info.dtype}, wanted Int8 or Int4 codes")
        return PackedMatrix(NIBBLES if tensor in self._int4 else CONTAINER, self.tensors.tensor(tensor))

    def _float(self, name: str, leaf: str, shape: tuple[int, ...]) -> ArrayLike | None:
        """A float tensor of a layer, unread; None if it is not there."""
        info = self.tensors.get(f"{name}.{leaf}") if leaf else None
        if info is None:
            return None
        if info.dtype not in FLOATS or info.shape != shape:
            raise UnreadableError(f"{name}: {leaf} is {info.dtype} {list(info.shape)}, wanted floats {list(shape)}")
        return self.tensors.tensor(f"{name}.{leaf}")

    def _vector(self, name: str, leaf: str, length: int) -> Array | None:
        found = self._float(name, leaf, (length,))
        return None if found is None else np.asarray(read(found))

    def _static(self, name: str, spelling: Spelling, codes: PackedMatrix, bias: ArrayLike | None) -> QuantizedLinear:
        """A layer whose inputs have a scale in the file."""
        (out, in_), extras = codes.shape, dict[str, Extra]()
        info = self.tensors[f"{name}.{spelling.dequant}"]
        if info.dtype not in {"I64", "F32"} or info.shape != (out,):
            raise UnreadableError(f"{name}: {spelling.dequant} is {info.dtype} {list(info.shape)}, wanted Int64 or Float32 [{out}]")
        dequant = self.tensors.tensor(f"{name}.{spelling.dequant}")
        scale, zero, smooth = read_inputs(self.tensors, f"{name}.{spelling.input_scale}", f"{name}.{spelling.input_zero}", in_)
        extras["dequant_scale"] = Extra("derived", dequant)
        if smooth is not None:
            extras["smoothed_input_scale"] = Extra("derived", self.tensors.tensor(f"{name}.{spelling.input_scale}"))
        if spelling.merged and (merged := self._float(name, spelling.merged, (out,))) is not None:
            extras["merged_bias"] = Extra("derived", merged)
            bias = TakenApart(merged, codes, dequant, int(zero[0])) if has_bias(self._model, name) else None
        if spelling.correction and f"{name}.{spelling.correction}" in self.tensors:
            stored = self.tensors[f"{name}.{spelling.correction}"]
            if stored.dtype != "I32" or stored.shape != (out,):
                raise UnreadableError(f"{name}: {spelling.correction} is {stored.dtype} {list(stored.shape)}, wanted Int32 [{out}]")
            extras["zero_point_bias"] = Extra("derived", self.tensors.tensor(f"{name}.{spelling.correction}"))
        inputs = QuantArgs(8, symmetric=False, strategy="tensor")
        layer = QuantizedLinear(
            name, codes.shape, QuantScheme(QuantArgs(codes.layout.bits), inputs), codes,
            DecodedScale(dequant, 1.0 if smooth is not None else float(scale[0])), bias=bias, input_scale=scale, input_zero_point=zero,
            input_smooth=smooth, extras=extras,
        )  # fmt: skip
        layer.check()
        return layer


def _observer(name: str) -> LeftOut:
    return LeftOut(name, "always", "", "what Golden Stick's observers measured, which the network does not use", "")


def _module_of(name: str, modules: set[str]) -> str | None:
    """The quantized module that a tensor belongs to."""
    module = name.rpartition(".")[0]
    while module and module not in modules:
        module = module.rpartition(".")[0]
    return module or None


def detect(location: Location) -> str | None:
    """ "ckpt" if there are .ckpt files, whose names say the variant once they are open; "hf" for a folder of 1.4; else None."""
    if golden_stick_folder.DESCRIPTION in location.names:
        return "hf"
    named = location.file is not None and location.file.suffix == ".ckpt"
    weights = any(name.endswith((".safetensors", ".bin")) for name in location.names)
    return "ckpt" if named or (not weights and checkpoint_files(location)) else None


def open_any(location: Location, variant: str) -> Checkpoint:
    """The reader of either kind."""
    return GoldenStickFolder(location, variant) if variant == "hf" else GoldenStick(location, variant)


def outputs(layer: LayerTarget, variant: str) -> tuple[TensorSpec, ...]:
    """The tensors that spell ``layer``."""
    return golden_stick_folder.outputs(layer) if variant == "hf" else target.outputs(layer, variant)


def quantization_config(model: ModelFacts, variant: str) -> tuple[Mapping[str, Any], None]:
    """({file: its content}, None): the folders' description, or MindFormers' YAML; config.json says nothing of it."""
    if variant == "hf":
        return {golden_stick_folder.DESCRIPTION: golden_stick_folder.description(model)}, None
    return target.yaml_of(model, variant), None


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]], model: ModelFacts, variant: str, shard: int) -> list[LaidOut]:
    """Shards of safetensors, or a .ckpt file (for each rank). RefusedError for what MindSpore or MindFormers would not load."""
    if variant == "hf" and model.ranks > 1:
        raise RanksRefusedError("the folder: is read by networks that split it as they load; convert without --tp, or to mindspore:gs1.2")
    return golden_stick_folder.lay_out_folder(tensors, shard) if variant == "hf" else target.lay_out_model(tensors, model, variant)


SPEC = FormatSpec(
    name="mindspore",
    tool="Golden Stick 0.6.0 to 1.4, MindFormers 1.3.2",
    about="checkpoints of MindFormers, float or quantized by Golden Stick, for Ascend NPUs",
    variants=target.VARIANTS,
    detect=detect,
    open=open_any,
    outputs=outputs,
    quantization_config=quantization_config,
    derived=target.derived,
    objection=target.objection,
    lay_out=lay_out,
    missing=target.missing,
    index=lambda variant, files: golden_stick_folder.INDEX if variant == "hf" else None,
    cache_by_variant=True,
    stores_product=True,
    default_variant="gs1.2",
)
