"""A finished folder against the model that it was made from: every tensor, what its configs say, its shards and index."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import DTYPES, Tensors, read_tensors

from .bits import cast
from .decoding import decode, decode_sparse, law, same
from .expected import Task
from .models import Layer, float_linears, products, steps_of
from .verdict import insist


def check_layer(task: Task, layer: Layer, tensors: Tensors) -> bool:
    """Compare a layer with what ``tensors`` hold; whether its values are exactly the source's."""
    name, dtype = layer.name, task.scales_in(layer)
    bands = [slice(row, row + 512) for row in range(0, layer.shape[0], 512)]
    ours = (layer.codes, layer.zeros, layer.scales, layer.g_idx)
    exact = True
    bias = task.bias(layer)
    if bias is not None:
        insist(same(tensors.pop(f"{name}.bias"), bias), name, "has another bias")
        exact = bool((bias.astype(np.float32) == layer.bias.astype(np.float32)).all())  # type: ignore[union-attr]
    if task.dense:
        stored = tensors.pop(f"{name}.weight")
        insist(stored.dtype == DTYPES[dtype], name, "is", stored.dtype, "not", dtype)
        for rows in bands:
            values = law(*ours, rows)
            insist(same(stored[rows], values.astype(stored.dtype)), name, "has other weights in rows", rows)
            exact &= bool((stored[rows].astype(np.float32) == values).all())
        return exact
    group = task.group_of(layer)
    repeat = layer.group // group if group else 1
    if task.variant == "compressed-tensors":
        insist((f"{name}.weight_packed" in tensors) == (not layer.inputs), name, "is in the other format of integers")
        insist((f"{name}.weight_zero_point" in tensors) == task.says_zeros(layer), name, "has zero points where it needs none, or none")
        insist((f"{name}.weight_g_idx" in tensors) == (layer.order is not None), name, "has a g_idx that says nothing, or none")
    sparse = decode_sparse(tensors, name) if task.sparse(layer) else None
    exact &= check_inputs(task, layer, tensors)
    found = sparse or decode(task.variant, tensors, name, task.bits(layer), layer.groups * repeat)
    scales = cast(layer.scales, dtype)
    insist(found.whole == task.keeps_tensor(layer), name, "has one scale for the tensor:", found.whole)
    insist(found.codes.shape == layer.shape, name, "is", found.codes.shape, "not", layer.shape)
    insist((found.codes == layer.codes).all(), name, "has other codes")
    insist(same(found.scales, np.repeat(scales, repeat, 1)), name, "has other scales, or not in", dtype)
    insist(found.zeros.shape == found.scales.shape, name, "has zero points", found.zeros.shape)
    lost = (found.scales == 0) & (task.variant == "awq:gemv_fast")
    insist(((found.zeros == np.repeat(layer.zeros, repeat, 1)) | lost).all(), name, "has other zero points")
    if layer.order is not None:
        insist((found.g_idx == layer.order).all(), name, "has another g_idx")
    for rows in bands:
        theirs = law(found.codes, found.zeros, found.scales, found.g_idx, rows)
        insist((theirs == law(layer.codes, layer.zeros, scales, layer.g_idx, rows)).all(), name, "has other values in rows", rows)
    return exact and bool((scales.astype(np.float32) == layer.scales.astype(np.float32)).all())


def check_inputs(task: Task, layer: Layer, tensors: Tensors) -> bool:
    """Compare what quantizes a layer's inputs, and what an NPU derives from it; whether the scale is exactly the source's."""
    name = layer.name
    if task.inputs(layer) not in {"static", "both"}:
        return True
    assert layer.input_scale is not None
    scale = cast(layer.input_scale, task.input_scale_in(layer))
    insist(same(tensors.pop(f"{name}.input_scale"), scale), name, "has another input_scale, or not in", task.input_scale_in(layer))
    if task.variant == "compressed-tensors":
        zero = tensors.pop(f"{name}.input_zero_point", None)
        insist((zero is not None) == (layer.input_zero != 0), name, "has an input_zero_point of", zero, "not", layer.input_zero)
        insist(zero is None or same(zero, np.array([layer.input_zero], np.int8)), name, "has the input_zero_point", zero)
    else:
        insist(same(tensors.pop(f"{name}.input_offset"), np.array([layer.input_zero], scale.dtype)), name, "has another input_offset")
        deq_scale, steps = layer.deq_scale, layer.quant_bias
        if task.derives_anew(layer):
            deq_scale = products(scale, cast(layer.scales, task.scales_in(layer)))
            steps = steps_of(layer, deq_scale)
        wide = deq_scale.view(np.int32).astype(np.int64) if task.deq_scale_in(layer) == "I64" else deq_scale
        wide = wide[:1] if task.keeps_tensor(layer) else wide
        insist(same(tensors.pop(f"{name}.deq_scale"), wide), name, "has another deq_scale, or not in", wide.dtype)
        insist(same(tensors.pop(f"{name}.quant_bias"), steps), name, "has another quant_bias")
    return bool(scale.astype(np.float32) == layer.input_scale.astype(np.float32))


def check_result(task: Task, folder: Path, shard_bytes: int | None) -> bool:
    """Compare the whole folder with the model; whether every value is exactly the source's."""
    files = sorted(folder.glob("*.safetensors"))
    tensors: Tensors = {}
    for path in files:
        held = read_tensors(path)
        size = sum(array.nbytes for array in held.values())
        insist(shard_bytes is None or size <= shard_bytes or len(held) == 1, path.name, "holds", size, "bytes, not", shard_bytes)
        insist(not set(held) & set(tensors), path.name, "holds tensors of another shard")
        tensors |= held
    indexes = list(folder.glob("*.index.json"))
    insist(len(indexes) == (len(files) > 1), len(files), "files and", len(indexes), "indexes")
    if indexes:
        insist(set(json.loads(indexes[0].read_text())["weight_map"]) == set(tensors), "the index lists other tensors")
    check_config(task, folder)
    for name, array in task.model.plain.items():
        insist(name in tensors and same(tensors.pop(name), array), name, "is not what it was")
    exact = [check_layer(task, layer, tensors) for layer in task.model.layers]
    insist(not tensors, "nobody asked for", *list(tensors)[:3])
    return all(exact)


def check_config(task: Task, folder: Path) -> None:
    """What the folder says of itself: bits and group size of every layer, and the variant."""
    said = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    if task.variant.startswith("msmodelslim"):
        (path,) = folder.glob("quant_model_description*.json")
        types = json.loads(path.read_text())
        insist(("version" in types) == task.variant.endswith(("ascendv1", "vllm-ascend")), "the description is of another variant")
        for layer in task.model.layers:
            kind = {"": "A16", "static": "A8", "dynamic": "A8_DYNAMIC", "both": "A8_MIX" if "version" in types else "A8"}[layer.inputs]
            wanted = "W8A8S" if task.sparse(layer) else f"W{task.bits(layer)}{kind}"
            insist(types[f"{layer.name}.weight"] == wanted, layer.name, "is described as", types[f"{layer.name}.weight"], "not", wanted)
    elif task.variant == "compressed-tensors":
        check_compressed_config(task, said)
    elif not task.dense:
        version = said.get("version") if task.variant.startswith("awq") else {"gptq": "v1", "gptq_v2": "v2"}.get(said["checkpoint_format"])
        insist(task.variant.endswith(f":{version}"), "the config says", version, "not", task.variant)
        insist(said["group_size"] == (task.group or -1), "the config says group_size", said["group_size"], "not", task.group)
        for layer in task.model.layers:
            bits = said.get("dynamic", {}).get(f"+:^{re.escape(layer.name)}$", {}).get("bits", said["bits"])
            insist(bits == task.bits(layer), layer.name, "has", bits, "bits by the config")


def check_compressed_config(task: Task, said: dict[str, Any]) -> None:
    """Each layer's group, found by its name or as a Linear, and what is left in float."""
    insist((said["quant_method"], said["quantization_status"]) == ("compressed-tensors", "compressed"), "the config is of", said)
    missing = set(float_linears(task.model)) - set(said["ignore"])
    insist(not missing, "the config does not ignore", *missing)
    for layer in task.model.layers:
        insist(layer.name not in said["ignore"], "the config ignores", layer.name)
        found = [group for group in said["config_groups"].values() if layer.name in group["targets"]]
        found = found or [group for group in said["config_groups"].values() if "Linear" in group["targets"]]
        insist(len(found) == 1, layer.name, "is in", len(found), "groups of the config")
        weights, inputs, kind = found[0]["weights"], found[0]["input_activations"], task.inputs(layer)
        strategy = "tensor" if task.keeps_tensor(layer) else "channel" if layer.groups == 1 else "group"
        wanted = {
            "num_bits": task.bits(layer), "type": "int", "symmetric": not task.says_zeros(layer), "strategy": strategy,
            "group_size": layer.group if strategy == "group" else None, "dynamic": False,
            "actorder": None if layer.order is None else "group",
        }  # fmt: skip
        insist(wanted.items() <= weights.items(), layer.name, "has by the config the weights", weights, "not", wanted)
        insist(found[0]["format"] == ("int-quantized" if kind else "pack-quantized"), layer.name, "has the format", found[0]["format"])
        insist((inputs is None) == (kind == ""), layer.name, "has by the config the inputs", inputs)
        if inputs is not None:
            dynamic = kind == "dynamic"
            expected = {"num_bits": 8, "type": "int", "dynamic": dynamic, "strategy": "token" if dynamic else "tensor"}
            expected["symmetric"] = dynamic or not layer.input_zero
            insist(expected.items() <= inputs.items(), layer.name, "has by the config the inputs", inputs, "not", expected)
