"""Checkpoints written as each source format's tool writes them: tensors, shards, configs and descriptions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import DTYPES, Tensors, write_tensors

from .bits import AWQ_ORDER, in_eights, marlin_scales, nibbles, pack, pack_fast, pack_marlin, pack_padded, pad, padded_groups, unsigned
from .models import Layer, Model, float_linears, is_asymmetric, type_of


def spell(model: Model, layer: Layer) -> Tensors:
    """The tensors that the source's tool would store for a layer."""
    variant, name, bits, scales = model.source, layer.name, layer.bits, layer.scales
    codes, zeros, turned = unsigned(layer.codes, bits), unsigned(layer.zeros, bits), np.ascontiguousarray(scales.T)
    if model.format == "msmodelslim":
        stored = layer.codes
        if model.packed and variant != "msmodelslim:safe_tensor" and bits == 4:
            stored = nibbles(stored, 1 if layer.groups == 1 else 0)
        grids = [scales, layer.zeros.astype(scales.dtype)]
        grids = [grid[0] for grid in (grids[0][:1], grids[1][:1])] if layer.per_tensor else grids
        parts = {"weight": stored, "weight_scale": grids[0], "weight_offset": grids[1]}
        if not layer.zeros.any() and layer.seed % 4 == 0:
            del parts["weight_offset"]
        if layer.spelled == "sparse":
            parts = {"weight": stored}
        if layer.input_scale is not None:
            deq_scale = layer.deq_scale if layer.input_scale.dtype == DTYPES["BF16"] else layer.deq_scale.view(np.int32).astype(np.int64)
            parts |= {"input_scale": layer.input_scale, "input_offset": np.array([layer.input_zero], layer.input_scale.dtype)}
            parts |= {"deq_scale": deq_scale, "quant_bias": layer.quant_bias}
    elif model.format == "compressed-tensors":
        grid = (1,) if layer.per_tensor else scales.shape
        parts = {"weight_scale": scales[:1].reshape(grid) if layer.per_tensor else scales}
        if layer.inputs:
            parts["weight"] = layer.codes
        else:
            parts |= {"weight_packed": pack_padded(codes, bits), "weight_shape": np.array(layer.shape, np.int64)}
        if is_asymmetric(layer) and (layer.inputs or layer.per_tensor):
            parts["weight_zero_point"] = layer.zeros[: grid[0]].reshape(grid).astype(np.int8)
        elif is_asymmetric(layer):
            parts["weight_zero_point"] = np.ascontiguousarray(pack_padded(np.ascontiguousarray(zeros.T), bits).T)
        if layer.order is not None:
            parts["weight_g_idx"] = layer.order
        if layer.input_scale is not None:
            parts["input_scale"] = layer.input_scale
            parts |= {"input_zero_point": np.array([layer.input_zero], np.int8)} if layer.input_zero else {}
    elif model.format == "gptq":
        qzeros = pack(np.ascontiguousarray(zeros.T), bits)
        if variant == "gptq:v1" and model.carry and bits != 3:
            ones = sum(1 << lane for lane in range(0, 32, bits))
            qzeros = (qzeros.view(np.uint32) - np.uint32(ones)).view(np.int32)
        elif variant == "gptq:v1":
            qzeros = pack(np.ascontiguousarray(zeros.T) - np.uint8(1) & np.uint8((1 << bits) - 1), bits)
        qweight = np.ascontiguousarray(pack(codes, bits).T)
        parts = {"qweight": qweight, "qzeros": qzeros, "scales": turned, "g_idx": layer.g_idx}
    elif variant == "awq:gemm":
        parts = {"qweight": pack(in_eights(np.ascontiguousarray(codes.T), AWQ_ORDER), 4), "scales": turned}
        parts["qzeros"] = pack(in_eights(np.ascontiguousarray(zeros.T), AWQ_ORDER), 4)
    elif variant == "awq:marlin":
        parts = {"qweight": pack_marlin(codes), "scales": marlin_scales(turned)}
    else:
        columns = padded_groups(layer.groups, layer.group)
        if variant == "awq:gemv":
            parts = {"qweight": pack(codes, 4), "qzeros": pack(pad(zeros, columns), 4), "scales": pad(scales, columns)}
        else:
            scaled = -(scales.astype(np.float32) * zeros).astype(scales.dtype)
            grids = [np.ascontiguousarray(pad(grid, columns).T) for grid in (scaled, scales)]
            parts = {"qweight": pack_fast(codes), "qzeros": grids[0], "scales": grids[1]}
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return {f"{name}.{part}": array for part, array in parts.items()}


def write_model(model: Model, folder: Path, rng: np.random.Generator) -> int:
    """Write the checkpoint with its configs, in one file or several; returns its bytes."""
    folder.mkdir()
    tensors: Tensors = dict(model.plain)
    quantized: dict[str, str] = {}
    for layer in model.layers:
        spelled = spell(model, layer)
        tensors |= spelled
        quantized |= {name: type_of(layer) for name in spelled if not name.endswith(".bias")}
    if rng.random() < 0.5:
        tensors = {name: tensors[name] for name in sorted(tensors)}
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": model.dtype}
    stem, kind = "model", type_of(model.layers[0]).lower()
    if model.format == "msmodelslim":
        stem, packed = f"quant_model_weight_{kind}", model.packed and model.source != "msmodelslim:safe_tensor"
        description = {"model_quant_type": kind.upper(), **({"version": "1.0.0"} if packed else {})}
        description |= {name: quantized.get(name, "FLOAT") for name in tensors}
        (folder / f"quant_model_description{'' if packed else '_' + kind}.json").write_text(json.dumps(description))
    else:
        config["quantization_config"] = quantization_config(model)
    (folder / "config.json").write_text(json.dumps(config))
    count = int(rng.integers(2, 6)) if rng.random() < 0.4 else 1
    shards = [[name for number, name in enumerate(tensors) if number * count // len(tensors) == shard] for shard in range(count)]
    names = [f"{stem}.safetensors"] if count == 1 else [f"{stem}-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    for name, held in zip(names, shards, strict=True):
        write_tensors(folder / name, {one: tensors[one] for one in held})
    if count > 1:
        weight_map = {one: name for name, held in zip(names, shards, strict=True) for one in held}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(array.nbytes for array in tensors.values())


def quantization_config(model: Model) -> dict[str, Any]:
    variant, first = model.source.partition(":")[2], model.layers[0]
    if model.format == "compressed-tensors":
        return compressed_config(model)
    group = -1 if all(layer.groups == 1 for layer in model.layers) else next(layer.group for layer in model.layers if layer.groups > 1)
    if model.format == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "version": variant, "zero_point": variant != "marlin"}
    config: dict[str, Any] = {"quant_method": "gptq", "bits": first.bits, "group_size": group, "sym": False, "lm_head": True}
    config["desc_act"] = any(layer.order is not None for layer in model.layers)
    config["checkpoint_format"] = "gptq" if variant == "v1" else "gptq_v2"
    if model.carry:
        config["meta"] = {"quantizer": ["gptqmodel:7.6.0"]}
    odd = {layer.name: {"bits": layer.bits} for layer in model.layers if layer.bits != first.bits}
    return {**config, **({"dynamic": {f"+:^{re.escape(name)}$": rule for name, rule in odd.items()}} if odd else {})}


def compressed_config(model: Model) -> dict[str, Any]:
    """As compressed-tensors 0.17 writes it: the first scheme for all Linear, the others for their layers by name."""
    schemes: dict[str, list[str]] = {}
    for layer in model.layers:
        strategy, size = ("tensor", None) if layer.per_tensor else ("channel", None) if layer.groups == 1 else ("group", layer.group)
        weights = {"num_bits": layer.bits, "type": "int", "symmetric": not is_asymmetric(layer), "strategy": strategy, "group_size": size}
        weights |= {"dynamic": False, "actorder": None if layer.order is None else "group", "observer": "minmax", "observer_kwargs": {}}
        inputs: dict[str, Any] | None = None
        if layer.inputs:
            inputs = {"num_bits": 8, "type": "int", "dynamic": layer.inputs == "dynamic", "symmetric": not layer.input_zero}
            inputs |= {"strategy": "token" if layer.inputs == "dynamic" else "tensor", "group_size": None, "actorder": None}
        group = {"format": f"{'int' if layer.inputs else 'pack'}-quantized", "weights": weights, "input_activations": inputs}
        schemes.setdefault(json.dumps(group), []).append(layer.name)
    groups = {
        f"group_{number}": {**json.loads(scheme), "output_activations": None, "targets": names if number else ["Linear"]}
        for number, (scheme, names) in enumerate(schemes.items())
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups, "format": formats.pop() if len(formats) == 1 else "mixed-precision", "global_compression_ratio": None,
        "ignore": float_linears(model), "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "sparsity_config": {}, "transform_config": {}, "version": "0.17.0",
    }  # fmt: skip
