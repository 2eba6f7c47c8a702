"""From a calibrated model to files: msModelSlim's own, or any format that ``convert`` writes.

The model is laid out in memory as msModelSlim's safe_tensor folder is (one code a byte), read by the reader of that format, and
written by the conversion engine: so what is saved is planned, streamed, proved and certified like any conversion, and equals what
converting a saved folder gives.

msModelSlim's own save types have its tensors bit for bit and its description. What differs, on purpose: a certificate lies beside
them (``weighbridge.json``); scale_bias of W4A8 is summed for linears of any name, where the tool knows q, k, v, o, gate, up and down
only and writes [out, in] for others; and what ``calibrator`` says differs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from convert.engine import Result, run
from convert.options import Settings
from convert.planning import Planner
from convert.targets import Target, find_target
from formats.arrays_file import ArraysFile
from formats.checkpoint import Checkpoint, Location
from formats.errors import RefusedError, UsageError
from formats.ir import Array, QuantizedLinear
from formats.msmodelslim import MsModelSlim
from formats.msmodelslim_target import scale_bias_columns
from formats.safetensors_file import DTYPES
from formats.spec import FormatSpec

from .anti_outlier import WRAPPED_NORMS
from .config import QuantConfig
from .layers import STATIC_TYPES, QuantizedLayer
from .outputs import scales_in

if TYPE_CHECKING:
    from .calibrator import Calibrator

SAVE_TYPES = {"safe_tensor": "msmodelslim:safe_tensor", "ascendV1": "msmodelslim:ascendv1"}
"""msModelSlim's names of what we call variants."""
WHOLE = 1 << 62
"""Bytes of a file that is not divided."""

NOWHERE = Path(os.devnull) / "model"
"""The folder of what lies in memory: none that anybody could mean."""

_ROWS = 1024
"""Of a weight that is summed at once."""
_WEIGHTS, DESCRIPTION = "quant_model_weight.safetensors", "quant_model_description.json"


def to_numpy(tensor: Tensor) -> Array:
    """A tensor's values as a NumPy array of its own dtype, bfloat16 as ml_dtypes' type."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        found: Array = tensor.view(torch.int16).numpy().view(DTYPES["BF16"])
        return found
    return np.asarray(tensor.numpy())


class Made(Protocol):
    """What a calibrator that has run offers, or one quantized decoder layer: ``model`` holds what is not in ``layers``."""

    @property
    def model(self) -> Any: ...
    @property
    def cfg(self) -> QuantConfig: ...
    @property
    def layers(self) -> dict[str, QuantizedLayer]: ...
    @property
    def float_names(self) -> list[str]: ...
    @property
    def kv_cache(self) -> dict[str, Tensor]: ...
    @property
    def attention(self) -> dict[str, Tensor]: ...
    @property
    def torch_dtype(self) -> torch.dtype | None: ...


def tensors_of(made: Made) -> tuple[dict[str, Array], dict[str, str]]:
    """(tensors, types) of the quantized model, as msModelSlim's safe_tensor folder names them."""
    wide = made.torch_dtype != torch.bfloat16
    tensors: dict[str, Array] = {}
    types: dict[str, str] = {}
    for name, tensor in made.model.state_dict().items():
        module = name.rpartition(".")[0]
        if module in made.layers:
            if name.endswith(".weight"):
                for part, array in _parts(made.layers[module], wide).items():
                    tensors[f"{module}.{part}"] = array
                    types[f"{module}.{part}"] = "FLOAT" if part == "bias" else _type(made, module)
        else:
            tensors[name], types[name] = to_numpy(tensor), "FLOAT"
    for found, type_ in ((made.kv_cache, "C8"), (made.attention, "FAQuant")):
        for name, tensor in found.items():
            tensors[name], types[name] = to_numpy(tensor), type_
    return tensors, types


def _type(made: Made, module: str) -> str:
    """A layer's type; static layers of a model that is for both phases of generation have a type of their own."""
    kind = made.layers[module].kind
    return "W8A8_MIX" if kind == "W8A8" and made.cfg.pdmix else kind


def _parts(layer: QuantizedLayer, wide: bool) -> dict[str, Array]:
    """A layer's tensors by leaf name. wide: deq_scale as int64, which holds the bits of a float32."""
    parts: dict[str, Array] = {"weight": to_numpy(layer.codes)}
    if layer.bias is not None:
        parts["bias"] = to_numpy(layer.bias)
    if layer.kind != "W8A8S":
        for part in ("weight_scale", "weight_offset"):
            parts[part] = to_numpy(getattr(layer, part))
    for part in ("weight_scale_second", "weight_offset_second", "g_idx"):
        if (found := getattr(layer, part)) is not None:
            parts[part] = to_numpy(found)
    if layer.kind in STATIC_TYPES:
        assert layer.input_scale is not None
        assert layer.input_offset is not None
        assert layer.deq_scale is not None
        assert layer.quant_bias is not None
        deq_scale = to_numpy(layer.deq_scale).reshape(-1)
        parts |= {
            "input_scale": to_numpy(layer.input_scale).reshape(1),
            "input_offset": to_numpy(layer.input_offset).reshape(1),
            "deq_scale": deq_scale.view(np.int32).astype(np.int64) if wide else deq_scale,
            "quant_bias": to_numpy(layer.quant_bias),
        }
    return parts


def _scale_biases(made: Made) -> tuple[dict[str, Array], dict[str, str]]:
    """(tensors, types) of W4A8's scale_bias, [out, 1] or [out, 16] float32: the tool sums with the row's scale rounded to bfloat16."""
    found = {}
    for name, layer in made.layers.items():
        if layer.kind == "W4A8_DYNAMIC" and layer.weight_scale_second is not None:
            (out, in_), columns = layer.codes.shape, scale_bias_columns(name, layer.codes.shape[1])
            sums = torch.empty(out, columns)
            for top in range(0, out, _ROWS):
                rows = slice(top, top + _ROWS)
                steps = layer.codes[rows].float().reshape(-1, layer.group_size) * layer.weight_scale_second[rows].reshape(-1, 1)
                weights = steps.reshape(-1, in_) * layer.weight_scale[rows].bfloat16()
                sums[rows] = 8 * weights.reshape(-1, in_ // columns).sum(1).reshape(-1, columns)
            found[f"{name}.scale_bias"] = to_numpy(sums)
    return found, dict.fromkeys(found, "W4A8_DYNAMIC")


class Spelled(MsModelSlim):
    """What was quantized here, as msModelSlim spells it, and what it has no words for: ``g_idx`` [in] int32 of GPTQ's act order.

    with_norms   AntiOutlier's norm tensors are carried, as msModelSlim's own files have them
    """

    def __init__(self, location: Location, with_norms: bool) -> None:
        self._with_norms = with_norms
        super().__init__(location, "safe_tensor")
        if with_norms:
            self.said["labels"] |= {name: type_ for name, type_ in self._types.items() if ".module." in name and type_ != "FLOAT"}

    def _leave_out(self, tensor: str, module: str, leaf: str) -> bool:
        if leaf == "g_idx" and module in self._kinds:
            return True
        return False if self._with_norms else super()._leave_out(tensor, module, leaf)

    def layer_tensors(self, name: str) -> tuple[str, ...]:
        own = f"{name}.g_idx"
        return (*super().layer_tensors(name), *([own] if own in self.tensors else []))

    def layer(self, name: str) -> QuantizedLinear:
        layer, own = super().layer(name), f"{name}.g_idx"
        if own not in self.tensors:
            return layer
        weights = replace(layer.scheme.weights, actorder="group")
        return replace(layer, g_idx=self.tensors.array(own), scheme=replace(layer.scheme, weights=weights))


def _norm_tensors(made: Made, variant: str) -> tuple[dict[str, Array], dict[str, str]]:
    """(tensors, types) that msModelSlim writes because AntiOutlier wraps norms: a bias in float32, and in safe_tensor copies."""
    tensors: dict[str, Array] = {}
    types: dict[str, str] = {}
    for name in getattr(made.model, WRAPPED_NORMS, ()):
        norm = made.model.get_submodule(name)
        weight, bias = norm.weight, getattr(norm, "bias", None)
        shift = torch.zeros(weight.shape, dtype=torch.float32) if bias is None else bias.float()
        tensors[f"{name}.bias"], types[f"{name}.bias"] = to_numpy(shift), "FLOAT"
        if variant == "safe_tensor":
            for part, value in (("weight", weight), ("bias", shift)):
                tensors[f"{name}.module.{part}"] = to_numpy(value)
                types[f"{name}.module.{part}"] = made.cfg.model_quant_type
    return tensors, types


def extra_tensors(made: Made, variant: str) -> tuple[dict[str, Array], dict[str, str]]:
    """(tensors, types) that only files of msModelSlim's ``variant`` have; none for ""."""
    tensors, types = _norm_tensors(made, variant) if variant else ({}, {})
    more = _scale_biases(made) if variant == "ascendv1" else ({}, {})
    return {**tensors, **more[0]}, {**types, **more[1]}


def checkpoint_of(made: Made, norms_for: str = "") -> Checkpoint:
    """A quantized model as a checkpoint that lies in memory; norms_for: msModelSlim's variant whose own tensors it has too."""
    tensors, types = tensors_of(made)
    extra = extra_tensors(made, norms_for)
    tensors, types = {**tensors, **extra[0]}, {**types, **extra[1]}
    documents: dict[str, Any] = {DESCRIPTION: description_of(made.cfg, types, bool(made.kv_cache), bool(made.attention))}
    if config := config_of(made.model):
        documents["config.json"] = config

    def opener(path: Path, number: int = 0) -> ArraysFile:
        return ArraysFile(path, tensors, number)

    location = Location(NOWHERE, (_WEIGHTS, *documents), documents=documents, opener=opener)
    return Spelled(location, bool(norms_for))


def description_of(cfg: QuantConfig, types: Mapping[str, str], kv_cache: bool, attention: bool) -> dict[str, Any]:
    """msModelSlim's description of tensors of these types."""
    description: dict[str, Any] = {"model_quant_type": cfg.model_quant_type, **types}
    if kv_cache:
        description |= {"kv_cache_type": "C8", "kv_quant_type": "C8"}
    if attention:
        description["fa_quant_type"] = "FAQuant"
    return description


def config_of(model: Any) -> dict[str, Any]:
    """A model's config as config.json has it; empty if it has none."""
    config = getattr(model, "config", None)
    return _plain(config.to_dict()) if config is not None and hasattr(config, "to_dict") else {}


def _plain(value: Any) -> Any:
    """JSON-ready data out of a config, dtypes by their names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value).removeprefix("torch.")


def save(
    calibrator: Calibrator,
    output_path: str | os.PathLike[str],
    safetensors_name: str | None = None,
    json_name: str | None = None,
    save_type: str | list[str] | None = None,
    part_file_size: int | None = None,
) -> list[Result]:
    """What ``Calibrator.save`` does; a result for each save type but "numpy"."""
    kinds = ["numpy"] if save_type is None else [save_type] if isinstance(save_type, str) else list(save_type)
    if "numpy" in kinds and calibrator.cfg.model_quant_type == "W4A8_DYNAMIC":
        raise RefusedError("save_type numpy: has no file for the second scales of W4A8_DYNAMIC; use safe_tensor or ascendV1")
    for kind in kinds:
        if kind != "numpy":
            find_target(SAVE_TYPES.get(kind, kind))
    if part_file_size is not None and (isinstance(part_file_size, bool) or not isinstance(part_file_size, int) or part_file_size < 1):
        raise UsageError(f"part_file_size: {part_file_size!r}, wanted a whole number of GiB, or None for one file")
    folder = Path(output_path)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for kind in kinds:
        if kind == "numpy":
            _save_numpy(calibrator, folder)
            continue
        shard = WHOLE if part_file_size is None else part_file_size << 30
        results.append(_save_format(calibrator, folder, SAVE_TYPES.get(kind, kind), safetensors_name, json_name, shard))
    return results


def _save_format(calibrator: Calibrator, folder: Path, to: str, safetensors_name: str | None, json_name: str | None, shard: int) -> Result:
    target = find_target(to)
    spec = target.spec
    settings = Settings(max_shard_size=shard, scale_dtype=scales_in(spec))
    renamed = target._replace(spec=_renamed(spec, safetensors_name, json_name))
    plan = Planner(checkpoint_of(calibrator, norms_of(target)), renamed, settings).plan(probe=True)
    plan.raise_if_refused()
    with tempfile.TemporaryDirectory(prefix=".weighbridge-", dir=folder) as workshop:
        made = Path(workshop) / "folder"
        result = run(plan, made)
        for path in sorted(made.iterdir()):
            if spec.name != "msmodelslim" or path.name not in {"config.json", "README.md"}:  # the caller copies those, as in msModelSlim
                shutil.move(os.fspath(path), folder / path.name)
    return replace(result, destination=folder)


def norms_of(target: Target) -> str:
    """The variant whose names AntiOutlier's norm tensors get, or "": a format that has none."""
    return target.variant.name if target.spec.name == "msmodelslim" and target.variant.name in {"safe_tensor", "ascendv1"} else ""


def _renamed(spec: FormatSpec, safetensors_name: str | None, json_name: str | None) -> FormatSpec:
    """``spec`` with the names that the caller chose for the weight file and the description."""
    if safetensors_name is not None:
        stem = safetensors_name.removesuffix(".safetensors")
        spec = replace(spec, stem=lambda model, variant: stem)
    if json_name is not None and spec.name == "msmodelslim":
        spec = replace(spec, quantization_config=partial(_described_as, spec, json_name))
    return spec


def _described_as(spec: FormatSpec, name: str, model: Any, variant: str) -> tuple[Mapping[str, Any], dict[str, Any] | None]:
    assert spec.quantization_config is not None
    documents, config = spec.quantization_config(model, variant)
    return {name: next(iter(documents.values()))}, config


NUMPY_FILES = ("weight_scale", "weight_offset", "input_scale", "input_offset", "deq_scale", "quant_bias")


def _save_numpy(calibrator: Calibrator, folder: Path) -> None:
    """msModelSlim's .npy files: a pickled dictionary of tensors each. Weights and biases have one name there, as in the tool."""
    tensors, types = tensors_of(calibrator)
    norms = extra_tensors(calibrator, "safe_tensor")
    tensors, types = {**tensors, **norms[0]}, {**types, **norms[1]}
    files: dict[str, dict[str, Tensor]] = {}
    for name, array in tensors.items():
        module, _, part = name.rpartition(".")
        half = array.dtype == DTYPES["BF16"]
        value = torch.from_numpy((array.view(np.int16) if half else array).copy())
        value = value.view(torch.bfloat16) if half else value
        if types[name] in {"C8", "FAQuant"}:
            kind = part if types[name] == "C8" else f"fa_quant_{part}"
            files.setdefault(kind, {})[name] = value
        elif part in NUMPY_FILES:
            files.setdefault(part, {})[module] = value
        elif name.endswith(("norm.weight", "norm.bias")):
            files.setdefault("anti_fp_norm", {})[name] = value
        else:
            files.setdefault("quant_weight", {})[module] = value
    for name, found in files.items():
        np.save(folder / f"{name}.npy", np.array(found, dtype=object), allow_pickle=True)
