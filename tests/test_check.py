"""``check``: every row of the table of consumers with facts that meet it and facts that do not, and real folders of the real tools.

The table's sentences are the tools' own; that a row says what its source says is for a reader to judge. Here each row is shown to
pass on the safest export and to fail on the one change that it is about.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FIXTURES, change_tensors, model, roll_back, weight_file, write_msmodelslim

from convert.checking import check
from convert.consumers import CONSUMERS
from convert.engine import convert
from convert.planning import plan
from convert.requirements import FolderFacts, LayerFacts
from formats import FORMATS
from formats.errors import RefusedError, UsageError
from formats.ir import QuantArgs, QuantScheme

GOLDENS = FIXTURES / "awq_gptq"
ALL = tuple(CONSUMERS)

# --- the safest export, as facts ----------------------------------------------------------------------------------------

LINEARS = {
    "self_attn.q_proj": (512, 512),
    "self_attn.k_proj": (256, 512),
    "self_attn.v_proj": (256, 512),
    "self_attn.o_proj": (512, 512),
    "mlp.gate_proj": (1024, 512),
    "mlp.up_proj": (1024, 512),
    "mlp.down_proj": (512, 1024),
}
PARTS = {
    "awq": frozenset({"qweight", "qzeros", "scales"}),
    "gptq": frozenset({"qweight", "qzeros", "scales", "g_idx"}),
    "msmodelslim": frozenset({"weight", "weight_scale", "weight_offset"}),
    "compressed-tensors": frozenset({"weight_packed", "weight_scale", "weight_shape"}),
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True, "modules_to_not_convert": None}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "actorder": None}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "version": "0.17.0",
    "config_groups": {"group_0": {"format": "pack-quantized", "targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
    "ignore": ["lm_head"], "kv_cache_scheme": None,
}  # fmt: skip
W4A16 = QuantScheme(QuantArgs(4, strategy="group", group_size=128))
W8A8 = QuantScheme(QuantArgs(8), QuantArgs(8, strategy="token", dynamic=True))
STATIC = QuantScheme(QuantArgs(8), QuantArgs(8, strategy="tensor"))
MODEL = {"num_key_value_heads": 4, "torch_dtype": "float16"}


def layers(format: str) -> tuple[LayerFacts, ...]:
    """Two blocks of a Llama; msModelSlim's have 8 bits per channel."""
    scheme = ("F16", PARTS[format])
    if format == "msmodelslim":
        return tuple(
            LayerFacts(f"model.layers.{b}.{n}", *s, 8, -1, True, False, *scheme, "W8A16") for b in range(2) for n, s in LINEARS.items()
        )
    said = W4A16 if format == "compressed-tensors" else None
    return tuple(
        LayerFacts(f"model.layers.{b}.{n}", *s, 4, 128, True, False, *scheme, scheme=said) for b in range(2) for n, s in LINEARS.items()
    )


SAFE = {
    "awq": FolderFacts(
        "awq", "gemm", {"config.json": MODEL, "quantization_config": AWQ, "quant_config.json": {"version": "GEMM"}},
        ("model.safetensors",), ("config.json", "model.safetensors"), layers("awq"),
    ),
    "gptq": FolderFacts(
        "gptq", "v1", {"config.json": MODEL, "quantization_config": GPTQ, "quantize_config.json": GPTQ},
        ("model.safetensors",), ("config.json", "model.safetensors", "quantize_config.json"), layers("gptq"),
    ),
    "msmodelslim": FolderFacts(
        "msmodelslim", "v1", {"config.json": {**MODEL, "quantize": "w8a16"}},
        ("quant_model_weights.safetensors",), ("config.json", "quant_model_description.json"), layers("msmodelslim"),
    ),
    "compressed-tensors": FolderFacts(
        "compressed-tensors", "compressed", {"config.json": MODEL, "quantization_config": COMPRESSED},
        ("model.safetensors",), ("config.json", "model.safetensors"), layers("compressed-tensors"),
        others=("model.embed_tokens", "lm_head"),
    ),
    "mindspore": FolderFacts(
        "mindspore", "gs0.6", {"config.json": {**MODEL, "model_type": "llama"}}, ("m.ckpt",),
        ("config.json", "predict_m.yaml", "rank_0"), layers("msmodelslim"),
    ),
    "smooth_quant": FolderFacts(
        "smooth_quant", "int8", {"config.json": MODEL, "quantization_config": {"quant_method": "smooth_quant", "quant_dtype": "int8"}},
        ("model.safetensors",), ("config.json", "model.safetensors"), layers("msmodelslim"),
    ),
    "dense": FolderFacts("dense", "hf", {"config.json": MODEL}, ("model.safetensors",), ("config.json", "model.safetensors")),
}  # fmt: skip
MINDIE = {"config.json": {**MODEL, "quantize": "w8a16"}, "quantization_config": {"group_size": 0}}


def safe(consumer: str, format: str) -> FolderFacts:
    """MindIE wants a quantization_config that vllm-ascend must not find, and vllm-ascend W8A8 of compressed-tensors."""
    if (consumer, format) == ("mindie", "msmodelslim"):
        return replace(SAFE[format], configs=MINDIE, names=("config.json", "quant_model_description_w8a16.json"))
    if (consumer, format) == ("mindformers-1.6", "mindspore"):
        return replace(SAFE[format], variant="gs1.2")
    if (consumer, format) == ("mindformers-2", "mindspore"):
        return quantized_inputs(replace(SAFE[format], variant="hf"))
    if (consumer, format) == ("vllm-ascend", "compressed-tensors"):
        return quantized_inputs(SAFE[format])
    return SAFE[format]


def quantized_inputs(facts: FolderFacts, scheme: QuantScheme = W8A8) -> FolderFacts:
    """The same layers as int-quantized W8A8."""
    static = scheme.inputs is not None and not scheme.inputs.dynamic
    parts = {"inputs": "static" if static else "dynamic", "input_scale": (0.25, 3.0) if static else ()}
    return every(bits=8, group_size=-1, scheme=scheme, parts=frozenset({"weight", "weight_scale"}), **parts)(facts)


Change = Callable[[FolderFacts], FolderFacts]


def layer(number: int = 2, **parts: Any) -> Change:
    """One layer changed (2: a v_proj)."""
    return lambda facts: replace(
        facts, layers=(*facts.layers[:number], replace(facts.layers[number], **parts), *facts.layers[number + 1 :])
    )


def every(**parts: Any) -> Change:
    return lambda facts: replace(facts, layers=tuple(replace(one, **parts) for one in facts.layers))


def config(where: str, **entries: Any) -> Change:
    """Entries changed in a config; None: taken out."""

    def change(facts: FolderFacts) -> FolderFacts:
        new = {**facts.configs.get(where, {}), **entries}
        return replace(facts, configs={**facts.configs, where: {key: value for key, value in new.items() if value is not None}})

    return change


def folder(**parts: Any) -> Change:
    return lambda facts: replace(facts, **parts)


def head(facts: FolderFacts) -> FolderFacts:
    return replace(facts, layers=(*facts.layers, replace(facts.layers[0], name="lm_head")))


INSIDE = "quantization_config"
NAMES = folder(files=("gptq_model-4bit-128g.safetensors",), names=("config.json",))
NO_QZEROS, NO_G_IDX = layer(parts=frozenset({"qweight", "scales", "g_idx"})), layer(parts=frozenset({"qweight", "scales", "qzeros"}))
EIGHT, ODD_GROUPS, ASYM = every(bits=8), every(group_size=48), layer(symmetric=False)
ODD_SHAPE, ODD_FUSED, ODD_GATE = layer(out=264), layer(group_size=64), layer(4, group_size=64)
FLOAT_DOWN = folder(floats=("model.layers.9.mlp.down_proj",))

PACKED_ZEROS = every(symmetric=False, scheme=replace(W4A16, weights=replace(W4A16.weights, symmetric=False)))
BLOCKS = every(bits=8, group_size=-1, scheme=QuantScheme(QuantArgs(8, "e4m3", strategy="block", block=(128, 128)), W8A8.inputs))


def scheme(weights: QuantArgs | None = None, activations: QuantArgs | None = None, **parts: Any) -> Change:
    """Every layer with another scheme, which LayerFacts' own fields follow."""
    args = weights or W4A16.weights
    return every(bits=args.bits, group_size=args.group_size or -1, scheme=QuantScheme(args, activations), **parts)


def group(**entries: Any) -> Change:
    """group_0 of config_groups changed; its weights by ``weights``."""
    found: dict[str, Any] = {**COMPRESSED["config_groups"]["group_0"], **entries}  # type: ignore[index]
    return config(INSIDE, config_groups={"group_0": found})


def both(*changes: Change) -> Change:
    def change(facts: FolderFacts) -> FolderFacts:
        for one in changes:
            facts = one(facts)
        return facts

    return change


KV_INT8 = config(INSIDE, kv_cache_scheme={"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"})
ACT_ORDER = group(weights={**WEIGHTS, "actorder": "group"})
ASYM_INPUTS = scheme(QuantArgs(8, symmetric=False), W8A8.inputs, inputs="dynamic", symmetric=False)
NO_FORMAT = both(group(format=None), config(INSIDE, format=None))

FAILS: list[tuple[str, str, str, Change]] = [
    ("transformers", "awq", "config-keys", config(INSIDE, quant_method=None)),
    ("transformers", "awq", "version", config(INSIDE, version="marlin")),
    ("transformers", "awq", "bits", EIGHT),
    ("transformers", "awq", "no-qzeros", NO_QZEROS),
    ("transformers", "awq", "lm-head", head),
    ("transformers", "awq", "modules-to-not-convert", FLOAT_DOWN),
    ("transformers", "awq", "file-names", NAMES),
    ("transformers", "gptq", "config-keys", config(INSIDE, bits=None)),
    ("transformers", "gptq", "bits", every(bits=5)),
    ("transformers", "gptq", "zero-point-version", every(wrong_version=True)),
    ("transformers", "gptq", "no-g_idx", NO_G_IDX),
    ("transformers", "gptq", "no-qzeros", NO_QZEROS),
    ("transformers", "gptq", "dynamic", config(INSIDE, dynamic={"-:o_proj": {}})),
    ("transformers", "gptq", "file-names", NAMES),
    ("transformers", "dense", "file-names", NAMES),
    ("autoawq", "awq", "config-keys", config(INSIDE, group_size=None)),
    ("autoawq", "awq", "version", config(INSIDE, version="llm-awq")),
    ("autoawq", "awq", "zero-point", config(INSIDE, zero_point=False)),
    ("autoawq", "awq", "bits", EIGHT),
    ("autoawq", "awq", "shape-multiple", layer(out=260)),
    ("autoawq", "awq", "no-qzeros", NO_QZEROS),
    ("autoawq", "awq", "modules-to-not-convert", FLOAT_DOWN),
    ("autoawq", "awq", "file-names", NAMES),
    ("autogptq", "gptq", "config-keys", config("quantize_config.json", desc_act=None)),
    ("autogptq", "gptq", "variant", folder(variant="v2")),
    ("autogptq", "gptq", "bits", every(bits=5)),
    ("autogptq", "gptq", "shape-multiple", layer(out=264)),
    ("autogptq", "gptq", "zero-point-version", every(wrong_version=True)),
    ("autogptq", "gptq", "no-g_idx", NO_G_IDX),
    ("autogptq", "gptq", "no-qzeros", NO_QZEROS),
    ("autogptq", "gptq", "dynamic", config(INSIDE, dynamic={"-:o_proj": {}})),
    ("autogptq", "awq", "version", config("quant_config.json", version="gemm")),
    ("autogptq", "awq", "bits", EIGHT),
    ("autogptq", "awq", "one-file", folder(files=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"))),
    ("gptqmodel", "gptq", "config-keys", config(INSIDE, bits=None)),
    ("gptqmodel", "gptq", "bits", every(bits=9)),
    ("gptqmodel", "gptq", "zero-point-version", every(wrong_version=True)),
    ("gptqmodel", "gptq", "group-size", ODD_GROUPS),
    ("gptqmodel", "gptq", "lm-head", head),
    ("gptqmodel", "gptq", "asymmetric-v1", ASYM),
    ("gptqmodel", "gptq", "is-marlin-format", config("quantize_config.json", is_marlin_format=False)),
    ("gptqmodel", "awq", "version", config(INSIDE, version="gemv")),
    ("gptqmodel", "awq", "bits", EIGHT),
    ("vllm", "awq", "config-keys", config(INSIDE, zero_point=None)),
    ("vllm", "awq", "version", config(INSIDE, version="gemv")),
    ("vllm", "awq", "bits", EIGHT),
    ("vllm", "awq", "scale-dtype", layer(scale_dtype="F32")),
    ("vllm", "awq", "shape-multiple", ODD_SHAPE),
    ("vllm", "awq", "tensor-parallel", folder(tp=16)),
    ("vllm", "awq", "fused", ODD_FUSED),
    ("vllm", "awq", "no-qzeros", NO_QZEROS),
    ("vllm", "awq", "modules-to-not-convert", FLOAT_DOWN),
    ("vllm", "awq", "model-dtype", config("config.json", torch_dtype="float32")),
    ("vllm", "awq", "file-names", NAMES),
    ("vllm", "gptq", "config-keys", config(INSIDE, sym=None)),
    ("vllm", "gptq", "bits", every(bits=3)),
    ("vllm", "gptq", "symmetric", ASYM),
    ("vllm", "gptq", "sym", config(INSIDE, sym=False)),
    ("vllm", "gptq", "group-size", ODD_GROUPS),
    ("vllm", "gptq", "act-order", config(INSIDE, desc_act=True)),
    ("vllm", "gptq", "shape-multiple", ODD_SHAPE),
    ("vllm", "gptq", "tensor-parallel", folder(tp=3)),
    ("vllm", "gptq", "fused", layer(bits=8)),
    ("vllm", "gptq", "lm-head", head),
    ("vllm", "gptq", "file-names", NAMES),
    ("vllm", "compressed-tensors", "format-said", NO_FORMAT),
    ("vllm", "compressed-tensors", "bits", every(bits=3)),
    ("vllm", "compressed-tensors", "scheme", scheme(QuantArgs(4, strategy="tensor"))),
    ("vllm", "compressed-tensors", "scheme", every(parts=frozenset({"weight", "weight_scale"}))),
    ("vllm", "compressed-tensors", "symmetric", ASYM_INPUTS),
    ("vllm", "compressed-tensors", "group-size", ODD_GROUPS),
    ("vllm", "compressed-tensors", "group-size", every(bits=8, group_size=256)),
    ("vllm", "compressed-tensors", "act-order", ACT_ORDER),
    ("vllm", "compressed-tensors", "shape-multiple", ODD_SHAPE),
    ("vllm", "compressed-tensors", "tensor-parallel", folder(tp=16)),
    ("vllm", "compressed-tensors", "blocks", both(BLOCKS, layer(number=1, out=64))),
    ("vllm", "compressed-tensors", "blocks", both(BLOCKS, folder(tp=16))),
    ("vllm", "compressed-tensors", "fused", layer(scheme=QuantScheme(replace(W4A16.weights, symmetric=False)))),
    ("vllm", "compressed-tensors", "input-scale", both(lambda facts: quantized_inputs(facts, STATIC), layer(input_scale=(0.5, 3.0)))),
    ("vllm", "compressed-tensors", "scale-dtype", layer(scale_dtype="F32")),
    ("vllm", "compressed-tensors", "ignore", FLOAT_DOWN),
    ("vllm", "compressed-tensors", "kv-cache", KV_INT8),
    ("vllm", "compressed-tensors", "model-dtype", config("config.json", torch_dtype="float32")),
    ("vllm", "compressed-tensors", "file-names", NAMES),
    ("sglang", "compressed-tensors", "format-said", NO_FORMAT),
    ("sglang", "compressed-tensors", "bits", every(bits=3)),
    ("sglang", "compressed-tensors", "scheme", lambda facts: quantized_inputs(facts, STATIC)),
    ("sglang", "compressed-tensors", "symmetric", ASYM_INPUTS),
    ("sglang", "compressed-tensors", "group-size", every(group_size=256)),
    ("sglang", "compressed-tensors", "blocks", both(BLOCKS, layer(number=1, out=64))),
    ("sglang", "compressed-tensors", "fused", ODD_FUSED),
    ("sglang", "compressed-tensors", "input-scale", both(lambda facts: quantized_inputs(facts, STATIC), layer(input_scale=(0.5, 3.0)))),
    ("sglang", "compressed-tensors", "scale-dtype", layer(scale_dtype="F32")),
    ("sglang", "compressed-tensors", "ignore", FLOAT_DOWN),
    ("sglang", "compressed-tensors", "file-names", NAMES),
    ("transformers", "compressed-tensors", "config-keys", config(INSIDE, quant_method=None)),
    ("transformers", "compressed-tensors", "quantization-status", config(INSIDE, quantization_status="frozen")),
    ("transformers", "compressed-tensors", "quantization-status", config(INSIDE, quantization_status=None)),
    ("transformers", "compressed-tensors", "act-order", ACT_ORDER),
    ("transformers", "compressed-tensors", "zero-point", PACKED_ZEROS),
    ("transformers", "compressed-tensors", "packing", every(bits=3)),
    (
        "transformers",
        "compressed-tensors",
        "packing",
        both(config(INSIDE, version="0.9.3"), every(parts=PARTS["compressed-tensors"] | {"weight_zero_point"})),
    ),
    ("transformers", "compressed-tensors", "ignore", FLOAT_DOWN),
    ("transformers", "compressed-tensors", "ignore", config(INSIDE, ignore=[])),
    ("transformers", "compressed-tensors", "scale-dtype", layer(scale_dtype="F32")),
    ("transformers", "compressed-tensors", "model-dtype", scheme(QuantArgs(4, "e2m1", strategy="group", group_size=32))),
    ("transformers", "compressed-tensors", "file-names", NAMES),
    ("lmdeploy", "compressed-tensors", "config-groups", group(format="int-quantized")),
    ("lmdeploy", "compressed-tensors", "config-groups", config(INSIDE, config_groups={})),
    ("lmdeploy", "compressed-tensors", "bits", EIGHT),
    ("lmdeploy", "compressed-tensors", "group-size", every(group_size=64)),
    ("lmdeploy", "compressed-tensors", "act-order", ACT_ORDER),
    (
        "lmdeploy",
        "compressed-tensors",
        "packing",
        both(config(INSIDE, version="0.9.3"), every(parts=PARTS["compressed-tensors"] | {"weight_zero_point"})),
    ),
    ("lmdeploy", "compressed-tensors", "fused", ODD_GATE),
    ("vllm-ascend", "compressed-tensors", "scheme", scheme()),
    ("vllm-ascend", "compressed-tensors", "scheme", lambda facts: quantized_inputs(facts, STATIC)),
    ("vllm-ascend", "compressed-tensors", "symmetric", ASYM_INPUTS),
    ("vllm-ascend", "compressed-tensors", "fused", layer(scheme=STATIC)),
    ("vllm-ascend", "compressed-tensors", "ignore", FLOAT_DOWN),
    ("vllm-ascend", "compressed-tensors", "file-names", NAMES),
    ("vllm", "dense", "file-names", NAMES),
    ("sglang", "awq", "config-keys", config(INSIDE, bits=None)),
    ("sglang", "awq", "version", config(INSIDE, version="gemv")),
    ("sglang", "awq", "bits", EIGHT),
    ("sglang", "awq", "scale-dtype", layer(scale_dtype="F32")),
    ("sglang", "awq", "fused", folder(floats=("model.layers.0.mlp.up_proj",), layers=layers("awq")[:5])),
    ("sglang", "awq", "no-qzeros", NO_QZEROS),
    ("sglang", "gptq", "config-keys", config(INSIDE, desc_act=None)),
    ("sglang", "gptq", "bits", every(bits=3)),
    ("sglang", "gptq", "symmetric", ASYM),
    ("sglang", "gptq", "group-size", ODD_GROUPS),
    ("sglang", "gptq", "fused", ODD_FUSED),
    ("sglang", "msmodelslim", "file-names", folder(names=("quant_model_description_w8a16.json",))),
    ("sglang", "dense", "file-names", NAMES),
    ("lmdeploy", "awq", "quant-method", config(INSIDE, quant_method=None)),
    ("lmdeploy", "awq", "version", config(INSIDE, version="gemv")),
    ("lmdeploy", "awq", "version", config(INSIDE, version="GEMM")),
    ("lmdeploy", "awq", "group-size", every(group_size=64)),
    ("lmdeploy", "awq", "group-size", config(INSIDE, group_size=-1)),
    ("lmdeploy", "awq", "bits", EIGHT),
    ("lmdeploy", "awq", "scale-dtype", layer(scale_dtype="F32")),
    ("lmdeploy", "awq", "no-qzeros", NO_QZEROS),
    ("lmdeploy", "awq", "fused", ODD_GATE),
    ("lmdeploy", "gptq", "quant-method", config(INSIDE, quant_method=None)),
    ("lmdeploy", "gptq", "bits", EIGHT),
    ("lmdeploy", "gptq", "group-size", every(group_size=64)),
    ("lmdeploy", "gptq", "group-size", config(INSIDE, group_size=-1)),
    ("lmdeploy", "gptq", "symmetric", ASYM),
    ("lmdeploy", "gptq", "sym", config(INSIDE, sym=False)),
    ("lmdeploy", "gptq", "act-order", layer(act_order=True)),
    ("lmdeploy", "gptq", "variant", folder(variant="v2")),
    ("lmdeploy", "gptq", "fused", ODD_FUSED),
    ("lmdeploy", "smooth_quant", "quant-method", config(INSIDE, quant_method="smoothquant")),
    ("lmdeploy", "dense", "file-names", NAMES),
    ("vllm-ascend", "msmodelslim", "file-names", folder(names=("quant_model_description_w8a16.json",))),
    ("vllm-ascend", "msmodelslim", "type", every(type="W4A16")),
    ("vllm-ascend", "msmodelslim", "group-size", every(group_size=128)),
    ("vllm-ascend", "msmodelslim", "fused", layer(type="W8A8")),
    ("vllm-ascend", "msmodelslim", "described", folder(undescribed=("model.layers.0.mlp.gate_proj",))),
    ("vllm-ascend", "msmodelslim", "symmetric", every(symmetric=False)),
    ("vllm-ascend", "msmodelslim", "group-size", every(one_scale=True)),
    ("vllm-ascend", "msmodelslim", "group-size", every(one_scale=True, type="W8A8")),
    ("vllm-ascend", "msmodelslim", "type", every(type="W4A8_DYNAMIC")),
    ("vllm-ascend", "msmodelslim", "deq-scale", every(type="W8A8", deq_dtype="F32")),
    ("vllm-ascend", "msmodelslim", "deq-scale", both(config("config.json", torch_dtype="bfloat16"), every(type="W8A8", deq_dtype="I64"))),
    ("vllm-ascend", "msmodelslim", "quantization-config", config("config.json", quantization_config={"group_size": 0})),
    ("vllm-ascend", "dense", "file-names", NAMES),
    ("mindie", "msmodelslim", "config-keys", config("config.json", quantize=None)),
    ("mindie", "msmodelslim", "config-keys", folder(names=("config.json", "quant_model_description_w8a8.json"))),
    ("mindie", "msmodelslim", "quantize", config("config.json", quantize="w4a4")),
    ("mindie", "msmodelslim", "group-size", config(INSIDE, group_size=32)),
    ("mindie", "msmodelslim", "group-size", both(config(INSIDE, group_size=None), every(group_size=128, type="W4A16"))),
    ("mindie", "msmodelslim", "group-size", every(group_size=128, type="W4A16")),
    ("mindie", "msmodelslim", "group-size", both(config(INSIDE, group_size=32), every(group_size=32, type="W4A16"))),
    ("mindie", "msmodelslim", "type", every(type="W4A4_DYNAMIC")),
    ("mindie", "msmodelslim", "described", folder(undescribed=("model.layers.0.mlp.gate_proj",))),
    ("mindie", "dense", "file-names", NAMES),
    ("mindformers", "mindspore", "variant", folder(variant="gs1.2")),
    ("mindformers", "mindspore", "model-type", config("config.json", model_type="qwen3")),
    ("mindformers", "mindspore", "file-names", folder(names=("config.json", "rank_0"))),
    ("mindformers", "mindspore", "ranks", folder(names=("predict_m.yaml", "rank_0", "rank_1"))),
    ("mindformers-1.6", "mindspore", "variant", folder(variant="hf")),
    ("mindformers-1.6", "mindspore", "file-names", folder(names=("config.json", "rank_0"))),
    ("mindformers-1.6", "mindspore", "ranks", folder(names=("predict_m.yaml", "rank_0", "rank_1", "rank_2"), tp=2)),
    ("mindformers-2", "mindspore", "variant", folder(variant="gs1.2")),
    ("mindformers-2", "mindspore", "type", layer(inputs="")),
    ("mindformers-2", "mindspore", "type", layer(bits=4)),
    ("mindformers-2", "dense", "file-names", NAMES),
]


def unmet(consumer: str, facts: FolderFacts) -> list[str]:
    return [requirement.code for requirement in CONSUMERS[consumer].formats[facts.format] if requirement.unmet(facts)]


ROWS = [(consumer, format) for consumer in ALL for format in CONSUMERS[consumer].formats]


@pytest.mark.parametrize(("consumer", "format"), ROWS)
def test_the_safest_export_meets_every_row(consumer: str, format: str) -> None:
    assert unmet(consumer, safe(consumer, format)) == []


@pytest.mark.parametrize(
    ("consumer", "format", "code", "change"), FAILS, ids=[f"{c}-{f}-{code}-{n}" for n, (c, f, code, _) in enumerate(FAILS)]
)
def test_a_row_fails_on_what_it_is_about(consumer: str, format: str, code: str, change: Change) -> None:
    assert code in unmet(consumer, change(safe(consumer, format)))


def test_every_row_has_a_failing_case() -> None:
    rows = [(consumer, format, row.code) for consumer, format in ROWS for row in CONSUMERS[consumer].formats[format]]
    assert set(rows) == {(consumer, format, code) for consumer, format, code, _ in FAILS}


@pytest.mark.parametrize(("consumer", "format"), ROWS)
def test_every_row_says_what_is_wanted_what_to_do_and_how_it_is_known(consumer: str, format: str) -> None:
    assert format in {spec.name for spec in FORMATS}
    for row in CONSUMERS[consumer].formats[format]:
        assert row.wanted
        assert row.mend
        assert re.search(r"\d+\.\d+|182b75ea|formats/|not run", row.source), row.source


# --- tensor parallelism, shapes, act order in detail --------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "met"), [(1, True), (2, True), (4, True), (8, False)])
def test_groups_must_be_whole_on_each_rank(tp: int, met: bool) -> None:
    """o_proj has 512 inputs in groups of 128: 4 ranks have one each, 8 would have half a group."""
    assert ("tensor-parallel" not in unmet("vllm", replace(SAFE["gptq"], tp=tp))) is met


def test_few_key_heads_are_copied_to_ranks() -> None:
    """2 heads of k on 4 ranks: each rank holds one head of 128, not half of one."""
    facts = replace(SAFE["gptq"], tp=4, configs={**SAFE["gptq"].configs, "config.json": {"num_key_value_heads": 2}})
    odd = replace(facts, layers=tuple(replace(one, out=64) if one.leaf in {"k_proj", "v_proj"} else one for one in facts.layers))
    assert "shape-multiple" not in unmet("vllm", odd)
    assert "shape-multiple" in unmet("vllm", replace(odd, configs={**facts.configs, "config.json": {"num_key_value_heads": 4}}))


def test_act_order_without_groups_is_no_act_order_to_vllm() -> None:
    facts = config(INSIDE, desc_act=True)(every(group_size=-1)(SAFE["gptq"]))
    assert unmet("vllm", facts) == []
    assert "act-order" in unmet("lmdeploy", facts)


def test_a_group_as_long_as_the_input_is_per_channel() -> None:
    assert "group-size" not in unmet("vllm", every(group_size=512, in_=512)(SAFE["gptq"]))
    assert "group-size" not in unmet("lmdeploy", every(group_size=-1, in_=128)(SAFE["gptq"]))


def test_named_floats_are_no_floats_too_many() -> None:
    facts = config(INSIDE, modules_to_not_convert=["model.layers.9.mlp.down_proj"])(FLOAT_DOWN(SAFE["awq"]))
    assert unmet("vllm", facts) == []


def test_a_marlin_layout_of_awq_has_no_qzeros() -> None:
    facts = config(INSIDE, version="marlin", zero_point=False)(replace(NO_QZEROS(SAFE["awq"]), variant="marlin"))
    assert unmet("autoawq", facts) == []


# --- real folders -------------------------------------------------------------------------------------------------------

EXPECTED = {
    "awq_gemm_g128_zp": {"autogptq": ["version"]},
    "gptq_v1_4b_g128_sym": {
        "transformers": ["file-names"], "autoawq": ["format"], "gptqmodel": ["is-marlin-format"], "vllm": ["file-names"],
       
    },
    "gptq_v1_4b_g128_asym": {
        "transformers": ["file-names"], "autoawq": ["format"], "gptqmodel": ["asymmetric-v1", "is-marlin-format"],
        "vllm": ["symmetric", "file-names"], "sglang": ["symmetric"], "lmdeploy": ["symmetric"],
       
    },
    "gptq_v1_4b_gm1_sym": {
        "transformers": ["file-names"], "autoawq": ["format"], "gptqmodel": ["is-marlin-format"], "vllm": ["file-names"],
        "lmdeploy": ["group-size"],
    },
    "gptqmodel_v1_4b_g128_sym": {"autoawq": ["format"]},
    "gptqmodel_v2_3b_g128": {
        "autoawq": ["format"], "autogptq": ["variant"], "vllm": ["bits"], "sglang": ["bits"], "lmdeploy": ["bits", "variant"],
       
    },
}  # fmt: skip
NO_HUB_FORMATS = ("vllm-ascend", "mindie", "mindformers", "mindformers-1.6", "mindformers-2")
"""Consumers that read neither AWQ nor GPTQ."""
EXPECTED = {case: {**found, **{consumer: ["format"] for consumer in NO_HUB_FORMATS}} for case, found in EXPECTED.items()}


@pytest.mark.parametrize("case", EXPECTED)
@pytest.mark.parametrize("consumer", ALL)
def test_goldens_against_each_consumer(case: str, consumer: str) -> None:
    report = check(GOLDENS / case, consumer)
    assert [one.code for one in report.unmet] == EXPECTED[case].get(consumer, [])
    assert report.ok is (consumer not in EXPECTED[case])


def test_an_unmet_requirement_counts_layers_and_says_where_and_what_to_do() -> None:
    (symmetric, *_) = check(GOLDENS / "gptq_v1_4b_g128_asym", "vllm").unmet
    assert (symmetric.count, symmetric.first, symmetric.found) == (14, "model.layers.0.mlp.down_proj", "zero points")
    assert symmetric.mend == f"weighbridge convert {GOLDENS / 'gptq_v1_4b_g128_asym'} OUT --to compressed-tensors"
    assert "vllm 0.33.0" in symmetric.source
    assert "and 13 more" in str(symmetric)


@pytest.mark.parametrize(
    ("case", "codes"),
    [
        ("v1_w8a16_pc", []),
        ("w8a16_g128_sym_bf16", ["file-names", "group-size"]),
        ("w4a16_g128_sym_bf16", ["file-names", "type"]),
        ("w8a8_mix_cfg_fp16", ["file-names", "fused"]),
    ],
)
def test_msmodelslim_goldens_for_vllm_ascend(case: str, codes: list[str]) -> None:
    assert [one.code for one in check(FIXTURES / "msmodelslim" / case, "vllm-ascend").unmet] == codes


COMPRESSED_GOLDENS: dict[str, dict[str, list[str]]] = {
    "fp8_block_bf16": {"vllm": ["blocks"], "sglang": ["blocks"], "vllm-ascend": ["scheme"]},
    "fp8_dynamic_fp16": {},
    "fp8_dynamic_kv_fp8_fp16": {},
    "fp8_static_fp16": {"vllm-ascend": ["scheme"]},
    "kv_fp8_head_fp16": {},
    "mixed_fp16": {"vllm-ascend": ["scheme"]},
    "mxfp4_bf16": {"sglang": ["scheme"]},
    "mxfp8_bf16": {"sglang": ["scheme"]},
    "naive_w8a16_g64_sym_fp16": {"vllm": ["scheme"], "sglang": ["scheme"], "vllm-ascend": ["scheme"]},
    "nvfp4_bf16": {"vllm-ascend": ["scheme"]},
    "nvfp4a16_bf16": {"vllm-ascend": ["scheme"]},
    "w3a16_g32_sym_fp16": {"transformers": ["packing"], "vllm": ["bits"], "sglang": ["bits"], "vllm-ascend": ["scheme"]},
    "w4a16_g128_asym_bf16": {"transformers": ["zero-point"], "vllm-ascend": ["scheme"]},
    "w4a16_g128_sym_bf16": {"vllm-ascend": ["scheme"]},
    "w4a16_g32_asym_fp16": {"transformers": ["zero-point"], "vllm-ascend": ["scheme"]},
    "w4a16_gptq_g32_actgroup_asym_fp16": {
        "transformers": ["act-order", "zero-point"], "vllm": ["act-order"], "vllm-ascend": ["scheme"],
    },
    "w4a16_gptq_g32_actweight_sym_fp16": {"vllm-ascend": ["scheme"]},
    "w4a16_gptq_g64_actgroup_sym_bf16": {"transformers": ["act-order"], "vllm": ["act-order"], "vllm-ascend": ["scheme"]},
    "w4a16_pc_asym_fp16": {"transformers": ["zero-point"], "vllm-ascend": ["scheme"]},
    "w4a16_pc_sym_fp16": {"vllm-ascend": ["scheme"]},
    "w4a16_sharded_fp16": {"vllm-ascend": ["scheme"]},
    "w4a8_g32_dynamic_fp16": {"sglang": ["scheme"], "vllm-ascend": ["scheme"]},
    "w8a16_g64_asym_fp16": {"transformers": ["zero-point"], "vllm-ascend": ["scheme"]},
    "w8a16_pc_sym_fp16": {"vllm-ascend": ["scheme"]},
    "w8a8_dynamic_fp16": {},
    "w8a8_dynamic_kv_int8_fp16": {"vllm": ["kv-cache"]},
    "w8a8_dynamic_wasym_fp16": {"vllm": ["symmetric"], "sglang": ["symmetric"], "vllm-ascend": ["symmetric"]},
    "w8a8_static_asym_fp16": {"sglang": ["scheme"], "vllm-ascend": ["scheme"]},
    "w8a8_static_sym_bf16": {"sglang": ["scheme"], "vllm-ascend": ["scheme"]},
    "w8a8_tensor_static_asym_fp16": {"sglang": ["scheme"], "vllm-ascend": ["scheme"]},
}  # fmt: skip
"""What was measured: transformers 5.23.0 with compressed-tensors 0.20.0 as it loads by default, and vLLM 0.32 on a CPU, but for what
only a GPU has a kernel for (w8a16, static FP8, FP4, MXFP8). SGLang and vllm-ascend: their source."""


@pytest.mark.parametrize("case", COMPRESSED_GOLDENS)
def test_goldens_of_compressed_tensors(case: str) -> None:
    for consumer in ("transformers", "vllm", "sglang", "vllm-ascend"):
        found = [one.code for one in check(FIXTURES / "compressed_tensors" / case, consumer).unmet]
        assert found == COMPRESSED_GOLDENS[case].get(consumer, []), consumer


def test_every_golden_of_compressed_tensors_is_there() -> None:
    names = {path.name for path in (FIXTURES / "compressed_tensors").iterdir()}
    assert set(COMPRESSED_GOLDENS) == {name for name in names if not name.startswith(("src_", "edge_"))}


def changed_config(case: str, path: Path, **entries: Any) -> Path:
    """A copy of a golden of compressed-tensors with entries of its quantization_config changed, or (None) gone."""
    shutil.copytree(FIXTURES / "compressed_tensors" / case, path)
    content = json.loads((path / "config.json").read_text("utf-8"))
    new = {**content["quantization_config"], **entries}
    content["quantization_config"] = {key: value for key, value in new.items() if value is not None}
    (path / "config.json").write_text(json.dumps(content), "utf-8")
    return path


def test_a_status_of_which_transformers_says_nothing(tmp_path: Path) -> None:
    """Measured: it loads, and all weights are random; vLLM does not look."""
    path = changed_config("w4a16_g128_sym_bf16", tmp_path / "frozen", quantization_status="frozen")
    (one,) = check(path, "transformers").unmet
    assert (one.code, one.found) == ("quantization-status", "quantization_status 'frozen'")
    assert check(path, "vllm").ok
    convert(path, tmp_path / "out", "compressed-tensors")
    assert check(tmp_path / "out", "transformers").ok


def test_a_float_lm_head_must_be_ignored_for_transformers(tmp_path: Path) -> None:
    """Measured: it is taken for quantized. vLLM's class of it is not called Linear."""
    path = changed_config("w4a16_g128_sym_bf16", tmp_path / "head", ignore=[])
    assert [(one.code, one.first) for one in check(path, "transformers").unmet] == [("ignore", "lm_head")]
    assert check(path, "vllm").ok


def test_a_float_linear_in_a_block_must_be_ignored(tmp_path: Path) -> None:
    path = changed_config("fp8_block_bf16", tmp_path / "down", ignore=["lm_head"])
    for consumer in ("transformers", "vllm", "sglang"):
        assert ("ignore", "model.layers.0.mlp.down_proj") in {(one.code, one.first) for one in check(path, consumer).unmet}


def test_shards_of_a_fused_linear_share_their_input_scale(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    shutil.copytree(FIXTURES / "compressed_tensors" / "w8a8_static_sym_bf16", path)
    name = "model.layers.0.self_attn.k_proj.input_scale"

    def double(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name] * 2

    change_tensors(weight_file(path), double)
    (one,) = check(path, "vllm").unmet
    assert (one.code, one.count, one.first) == ("input-scale", 3, "model.layers.0.self_attn.k_proj")


WRITTEN = {
    "w8a8_static_bf16": ("compressed-tensors", ("vllm", "transformers")),
    "w8a8_dynamic_bf16": ("compressed-tensors", ("vllm", "transformers", "sglang", "vllm-ascend")),
    "w8a8_pdmix_ascendv1_bf16": ("compressed-tensors", ("vllm", "transformers")),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_quantized_inputs_written_for_a_gpu_load_there(case: str, tmp_path: Path) -> None:
    target, readers = WRITTEN[case]
    convert(FIXTURES / "msmodelslim_w8" / case, tmp_path / "out", target, base_model=FIXTURES / "compressed_tensors" / "src_qwen2_bf16")
    assert [name for name in readers if not check(tmp_path / "out", name).ok] == []


FOR_ENGINES = [
    ("msmodelslim/w4a16_pc_sym_bf16", "src_bf16", ["file-names", "type"]),
    ("msmodelslim/w8a16_g128_sym_bf16", "src_bf16", ["file-names", "group-size"]),
    ("msmodelslim/w8a16_pc_asym_fp16", "src_fp16", ["file-names", "symmetric"]),
    ("msmodelslim_w8/w8a8_static_bf16", "src_bf16", ["file-names"]),
    ("msmodelslim_w8/w8a8_static_tensor_fp16", "src_fp16", ["file-names", "group-size"]),
    ("msmodelslim_w8/w8a8s_lowbit_bf16", "src_bf16", ["file-names", "type"]),
    ("msmodelslim_w8/v1_w8a8_static", "", []),
]


@pytest.mark.parametrize(("case", "base", "codes"), FOR_ENGINES, ids=[case for case, *_ in FOR_ENGINES])
def test_what_is_written_for_an_engine_it_loads(case: str, base: str, codes: list[str], tmp_path: Path) -> None:
    """As the tool wrote it vllm-ascend misses something; written with --for it misses nothing, and so with MindIE."""
    source = FIXTURES / case
    model_folder = FIXTURES / "msmodelslim" / base if base else None
    assert [one.code for one in check(source, "vllm-ascend").unmet] == codes
    for consumer in ("vllm-ascend", "mindie"):
        out = tmp_path / consumer
        convert(source, out, "msmodelslim", consumer=consumer, base_model=model_folder, allow=("requantize",))
        assert check(out, consumer).unmet == []


def test_static_scales_in_the_other_dtype_of_the_model(tmp_path: Path) -> None:
    """vllm-ascend has int64 for float16 and float32 for bfloat16, and copies what it finds into that."""
    path = convert(
        FIXTURES / "msmodelslim_w8" / "w8a8_static_ascendv1_fp16", tmp_path / "out", "msmodelslim:ascendv1",
        base_model=FIXTURES / "msmodelslim" / "src_bf16",
    )  # fmt: skip
    assert path.plan is not None
    (one,) = check(tmp_path / "out", "vllm-ascend").unmet
    assert (one.code, one.found) == ("deq-scale", "I64 in a model of bfloat16")


RANKED_GOLDEN = FIXTURES / "golden_stick" / "ptq_a8w8_gs120.ckpt"


def test_what_is_written_for_mindformers_it_loads(tmp_path: Path) -> None:
    """Without a variant, the one that the consumer's version knows is written; a folder of ranks is for so many cards."""
    source, base = RANKED_GOLDEN, FIXTURES / "golden_stick"
    for consumer, target in (
        ("mindformers", "mindspore:gs0.6"),
        ("mindformers-1.6", "mindspore:gs1.2"),
        ("mindformers-2", "mindspore:hf"),
    ):
        result = convert(source, tmp_path / consumer, "mindspore", consumer=consumer, base_model=base)
        assert result.plan.target_name == target
        assert check(tmp_path / consumer, consumer).unmet == []
        others = {name for name in CONSUMERS if name.startswith("mindformers") and not check(tmp_path / consumer, name).unmet}
        assert others == {consumer}
    convert(source, tmp_path / "ranks", "mindspore", consumer="mindformers", base_model=base, tp=2)
    assert check(tmp_path / "ranks", "mindformers", tp=2).ok
    (one,) = check(tmp_path / "ranks", "mindformers").unmet
    assert (one.code, one.found) == ("ranks", "parts for 2 ranks, on 1")
    refused = plan(source, "mindspore:gs1.2", consumer="mindformers", base_model=base).refusals
    assert [refusal.code for refusal in refused] == ["variant"]
    (tmp_path / "alone").mkdir()
    shutil.copy(source, tmp_path / "alone")
    convert(tmp_path / "alone", tmp_path / "bare", "mindspore")
    assert [one.code for one in check(tmp_path / "bare", "mindformers-1.6").unmet] == ["file-names"]  # no config.json, so no YAML


def test_what_to_do_names_the_new_routes() -> None:
    """W8A8 for vLLM goes to compressed-tensors; what vllm-ascend has no type for goes into its dialect."""
    static = FIXTURES / "msmodelslim_w8" / "w8a8_static_bf16"
    assert check(static, "vllm").unmet[0].mend == f"weighbridge convert {static} OUT --to compressed-tensors"
    assert check(static, "transformers").unmet[0].mend == f"weighbridge convert {static} OUT --to compressed-tensors"
    assert check(static, "autoawq").unmet[0].mend == f"weighbridge convert {static} OUT --to autoawq"
    four = FIXTURES / "msmodelslim" / "w4a16_pc_sym_bf16"
    kind = next(one for one in check(four, "vllm-ascend").unmet if one.code == "type")
    assert kind.mend.startswith(f"weighbridge convert {four} OUT --to msmodelslim --for vllm-ascend")
    compressed = FIXTURES / "compressed_tensors" / "w4a16_g128_sym_bf16"
    assert check(compressed, "mindie").unmet[0].mend == f"weighbridge convert {compressed} OUT --to mindie"


def test_a_float_folder() -> None:
    source = FIXTURES / "msmodelslim" / "src_bf16"
    assert check(source, "transformers").ok
    (one,) = check(source, "autogptq").unmet
    assert one.mend == "quantize it first: its weights are float"


@pytest.mark.parametrize("target", ["awq", "gptq"])
def test_what_a_conversion_wrote_loads_where_it_should(tmp_path: Path, target: str) -> None:
    source = write_msmodelslim(tmp_path / "source", model(group=64))
    convert(source, tmp_path / "out", to=target)
    assert [name for name in ("transformers", "vllm", "sglang", "gptqmodel") if not check(tmp_path / "out", name).ok] == []


def test_float_linears_of_a_real_folder_are_seen(tmp_path: Path) -> None:
    down = "model.layers.1.mlp.down_proj"
    convert(write_msmodelslim(tmp_path / "source", roll_back(model(), [down])), tmp_path / "out", to="awq")
    assert check(tmp_path / "out", "vllm").ok
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text("utf-8"))
    content["quantization_config"]["modules_to_not_convert"] = None
    path.write_text(json.dumps(content), "utf-8")
    assert [(one.code, one.first) for one in check(tmp_path / "out", "vllm").unmet] == [("modules-to-not-convert", down)]


def test_missing_tensors_and_keys_are_unmet_requirements_not_errors(tmp_path: Path) -> None:
    """The readers refuse such folders; ``check`` says what is missing."""
    path = tmp_path / "ill"
    shutil.copytree(GOLDENS / "gptqmodel_v1_4b_g128_sym", path)
    gone = [f"model.layers.0.self_attn.q_proj.{part}" for part in ("g_idx", "qzeros")]
    change_tensors(weight_file(path), lambda tensors: [tensors.pop(name) for name in gone])
    content = json.loads((path / "config.json").read_text("utf-8"))
    del content["quantization_config"]["quant_method"], content["quantization_config"]["bits"]
    (path / "config.json").write_text(json.dumps(content), "utf-8")
    found = {one.code: one for one in check(path, "transformers").unmet}
    assert set(found) == {"config-keys", "no-g_idx", "no-qzeros", "bits"}
    assert found["config-keys"].found == "no quant_method, bits"
    assert found["no-g_idx"].count == 1
    assert found["no-g_idx"].mend == f"weighbridge doctor {path} --fix OUT"


def test_zero_points_of_the_other_version_are_not_taken_for_asymmetric_ones(tmp_path: Path) -> None:
    """Converting would carry the error along: the folder is to be mended first. vLLM does not read the zero points."""
    path = tmp_path / "ill"
    shutil.copytree(GOLDENS / "gptqmodel_v1_4b_g128_sym", path)
    content = json.loads((path / "config.json").read_text("utf-8"))
    content["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (path / "config.json").write_text(json.dumps(content), "utf-8")
    (one,) = check(path, "transformers").unmet
    assert (one.code, one.count, one.mend) == ("zero-point-version", 14, f"weighbridge doctor {path} --fix OUT")
    assert check(path, "vllm").ok


@pytest.mark.parametrize("consumer", ALL)
@pytest.mark.parametrize("value", ["128", [4], {"a": 1}, 1e9, -7, True], ids=repr)
def test_config_values_of_any_type_never_crash(tmp_path: Path, consumer: str, value: object) -> None:
    path = tmp_path / "odd"
    shutil.copytree(GOLDENS / "gptqmodel_v1_4b_g128_sym", path)
    content = json.loads((path / "config.json").read_text("utf-8"))
    keys = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic", "lm_head", "modules_to_not_convert", "version")
    content["quantization_config"].update(dict.fromkeys(keys, value))
    content |= {"num_key_value_heads": value, "torch_dtype": value, "dtype": value}
    (path / "config.json").write_text(json.dumps(content), "utf-8")
    assert isinstance(check(path, consumer, tp=2).unmet, list)


def test_usage() -> None:
    with pytest.raises(UsageError, match="transformers"):
        check(GOLDENS / "awq_gemm_g128_zp", "llama.cpp")
    with pytest.raises(UsageError, match="--tp"):
        check(GOLDENS / "awq_gemm_g128_zp", "vllm", tp=0)


def test_what_is_not_read_is_refused_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "other"
    shutil.copytree(GOLDENS / "awq_gemm_g128_zp", path)
    content = json.loads((path / "config.json").read_text("utf-8"))
    content["quantization_config"] = {"quant_method": "bitsandbytes"}
    (path / "config.json").write_text(json.dumps(content), "utf-8")
    change_tensors(weight_file(path), lambda tensors: [tensors.pop(name) for name in [*tensors] if name.endswith("scales")])
    with pytest.raises(RefusedError, match="bitsandbytes"):
        check(path, "vllm")
