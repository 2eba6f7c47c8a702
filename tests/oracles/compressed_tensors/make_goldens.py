"""Write fixtures/compressed_tensors: small checkpoints by llm-compressor 0.12.0.2 and compressed-tensors 0.17.0, on the CPU.

    python make_goldens.py OUT [CASE ...]

Run by the interpreter that has requirements.txt, after torch 2.13.0; it imports nothing of Weighbridge, and no test runs it. Each
folder is as ``save_pretrained`` left it, plus two records:

* ``golden_case.json``: the exact recipe;
* ``dequant_sha256.json``: SHA-256 of the float32 little-endian bytes [out, in] of every quantized weight that compressed-tensors'
  own decompressor gives, from the saved bytes alone; ``dtype`` is the dtype of what it returns (which the bytes are widened from),
  ``format`` the decompressor, ``multiplied_in`` the dtype in which it multiplied.

The float models have random weights, from a fixed seed: ``src_qwen2_bf16`` (biases on q, k and v; hidden 256, intermediate 128, one
layer, four heads and one key/value head of 64), ``src_llama_fp16`` (no biases; hidden 128, intermediate 192, one layer, four heads and
two key/value heads of 32) and ``src_llama2l_fp16`` (the same with two layers). Channel 5 of the norms is boosted, so that activations
have an outlier. Calibration: 8 samples of 32 ids. GPTQ's sums depend on the number of threads: it is one here.

The decompressor of NVFP4 multiplies in float32 and rounds to bfloat16, and those of MX multiply in bfloat16, whatever the model's
dtype, so transformers cannot run such a float16 model; the others multiply in the dtype of the scales.

``edge_linear`` holds single weights through the compressors: widths and heights that do not fill words, zero rows, codes at both ends.
"""

from __future__ import annotations

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its FP4 cast asks torch.compile for a kernel
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import compressed_tensors
import llmcompressor
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import dequantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 128
Case = dict[str, Any]
QWEN, LLAMA, LLAMA2 = "src_qwen2_bf16", "src_llama_fp16", "src_llama2l_fp16"


def weights(**changes: Any) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128} | changes


def channel(**changes: Any) -> dict[str, Any]:
    return weights(num_bits=8, strategy="channel", group_size=None) | changes


def token(**changes: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True} | changes


def static(**changes: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False} | changes


def group(w: dict[str, Any], a: dict[str, Any] | None = None, targets: tuple[str, ...] = ("Linear",), **more: Any) -> dict[str, Any]:
    return {"targets": list(targets), "weights": w} | ({"input_activations": a} if a else {}) | more


def one(source: str, w: dict[str, Any], a: dict[str, Any] | None = None, **more: Any) -> Case:
    return {"source": source, "config_groups": {"group_0": group(w, a)}, "ignore": ["lm_head"]} | more


def preset(source: str, scheme: str, **more: Any) -> Case:
    return {"source": source, "scheme": scheme, "targets": ["Linear"], "ignore": ["lm_head"]} | more


FP8 = {"type": "float"}
FP8_KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
INT8_KV = FP8_KV | {"type": "int"}

CASES: dict[str, Case] = {
    # pack-quantized
    "w4a16_g128_sym_bf16": preset(QWEN, "W4A16"),
    "w4a16_g128_asym_bf16": preset(QWEN, "W4A16_ASYM"),
    "w4a16_g32_asym_fp16": one(LLAMA, weights(group_size=32, symmetric=False)),
    "w4a16_pc_sym_fp16": one(LLAMA, channel(num_bits=4)),
    "w4a16_pc_asym_fp16": one(LLAMA, channel(num_bits=4, symmetric=False)),
    "w4a16_gptq_g64_actgroup_sym_bf16": one(QWEN, weights(group_size=64, actorder="group"), modifier="GPTQModifier"),
    "w4a16_gptq_g32_actgroup_asym_fp16": one(LLAMA, weights(group_size=32, symmetric=False, actorder="group"), modifier="GPTQModifier"),
    "w4a16_gptq_g32_actweight_sym_fp16": one(LLAMA, weights(group_size=32, actorder="weight"), modifier="GPTQModifier"),
    "w8a16_pc_sym_fp16": one(LLAMA, channel()),
    "w8a16_g64_asym_fp16": one(LLAMA, weights(num_bits=8, group_size=64, symmetric=False)),
    "w3a16_g32_sym_fp16": one(LLAMA, weights(num_bits=3, group_size=32)),
    "w4a16_sharded_fp16": one(LLAMA2, weights(group_size=64), max_shard_size="100KB"),
    # int-quantized
    "w8a8_static_sym_bf16": one(QWEN, channel(), static()),
    "w8a8_static_asym_fp16": one(LLAMA, channel(), static(symmetric=False)),
    "w8a8_dynamic_fp16": preset(LLAMA, "W8A8"),
    "w8a8_dynamic_wasym_fp16": one(LLAMA, channel(symmetric=False), token()),
    "w8a8_tensor_static_asym_fp16": one(LLAMA, channel(strategy="tensor"), static(symmetric=False)),
    "w4a8_g32_dynamic_fp16": one(LLAMA, weights(group_size=32), token()),
    # float-quantized
    "fp8_static_fp16": preset(LLAMA, "FP8"),
    "fp8_dynamic_fp16": preset(LLAMA, "FP8_DYNAMIC"),
    "fp8_block_bf16": preset(QWEN, "FP8_BLOCK") | {"ignore": ["lm_head", "re:.*down_proj"]},  # one block wide: its decompressor fails
    # FP4 and MX
    "nvfp4_bf16": preset(LLAMA, "NVFP4", dtype="bfloat16"),
    "nvfp4a16_bf16": preset(LLAMA, "NVFP4A16", dtype="bfloat16"),
    "mxfp4_bf16": preset(LLAMA, "MXFP4", dtype="bfloat16"),
    "mxfp8_bf16": preset(LLAMA, "MXFP8", dtype="bfloat16"),
    # KV cache
    "fp8_dynamic_kv_fp8_fp16": preset(LLAMA, "FP8_DYNAMIC", kv_cache_scheme=FP8_KV),
    "w8a8_dynamic_kv_int8_fp16": preset(LLAMA, "W8A8", kv_cache_scheme=INT8_KV),
    "kv_fp8_head_fp16": {"source": LLAMA, "kv_cache_scheme": FP8_KV | {"strategy": "attn_head"}},
    # more than one scheme
    "mixed_fp16": {
        "source": LLAMA2,
        "config_groups": {
            "attention": group(channel(), token(), ("re:.*self_attn\\.(q|k|v|o)_proj$",)),
            "mlp": group(weights(group_size=32), None, ("re:.*gate_proj$", "re:.*up_proj$", "model.layers.0.mlp.down_proj")),
            "rest": group(channel(**FP8), token(**FP8), ("Linear",)),
        },
        "ignore": ["re:.*lm_head", "model.layers.1.self_attn.o_proj"],
    },
    # old formats that it still writes
    "naive_w8a16_g64_sym_fp16": one(LLAMA, weights(num_bits=8, group_size=64), quantization_format="naive-quantized"),
}


def make_sources() -> None:
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "tie_word_embeddings": False}
    shapes = {
        QWEN: (Qwen2ForCausalLM, Qwen2Config, torch.bfloat16, 256, 128, 1, 4),
        LLAMA: (LlamaForCausalLM, LlamaConfig, torch.float16, 128, 192, 1, 4),
        LLAMA2: (LlamaForCausalLM, LlamaConfig, torch.float16, 128, 192, 2, 4),
    }
    for name, (model_class, config_class, dtype, hidden, intermediate, layers, heads) in shapes.items():
        config = config_class(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=1 if name == QWEN else 2,
            initializer_range=0.08,
            **common,
        )
        torch.manual_seed(1234)
        model = model_class(config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("norm.weight"):
                    parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
                    parameter[5] *= 8
                elif key.endswith(".bias"):
                    parameter.copy_(0.3 * torch.randn_like(parameter))
        model.to(dtype).eval().save_pretrained(name)


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.detach().float().contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return tensors


def decompress(folder: Path) -> dict[str, Any]:
    """What compressed-tensors' own decompressors make of a saved folder: its config says which layer has which scheme."""
    config = AutoConfig.from_pretrained(folder)
    quantization = QuantizationConfig(**json.loads((folder / "config.json").read_text())["quantization_config"])
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    apply_quantization_config(model, quantization)
    tensors, result = load_tensors(folder), {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if not isinstance(scheme, QuantizationScheme) or scheme.weights is None:
            continue
        compression = CompressionFormat(scheme.format or infer_module_format(type(module), scheme)).value
        state = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
        result[f"{name}.weight"] = judge(state, scheme, compression)
    return result


def judge(state: dict[str, torch.Tensor], scheme: QuantizationScheme, compression: str) -> dict[str, Any]:
    """The row of one compressed weight.

    The decompressor guesses the strategy from the shape of the scales, and guesses wrong for some FP8 blocks. There the row is that of
    the tool's ``dequantize`` with the scheme's own arguments, and ``decompressor`` says what the decompressor did instead.
    """
    row: dict[str, Any] = {}
    compressor = BaseCompressor.get_value_from_registry(compression)
    if scheme.weights.strategy == "block":
        weight = dequantize(state["weight"], state["weight_scale"], args=scheme.weights)
        try:
            same = torch.equal(compressor.decompress(state, scheme)["weight"], weight)
            row = {} if same else {"decompressor": "wrong: it guessed other blocks"}
        except RuntimeError as error:
            row = {"decompressor": f"fails: {error}"}
    else:
        weight = compressor.decompress(state, scheme)["weight"]
    multiplied = torch.float32 if "weight_global_scale" in state else weight.dtype
    return {
        "shape": list(weight.shape),
        "format": compression,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "multiplied_in": str(multiplied).removeprefix("torch."),
        "sha256_float32_le": digest(weight),
    } | row


def record(folder: Path, case: Case) -> None:
    versions = f"llm-compressor {llmcompressor.__version__}, compressed-tensors {compressed_tensors.__version__}"
    versions += f", transformers {transformers.__version__}, torch {torch.__version__}"
    (folder / "golden_case.json").write_text(json.dumps({"tool": versions} | case, indent=1) + "\n")
    how = "BaseCompressor.decompress of the scheme's format, from the saved tensors; float32 bytes of what it returns in `dtype`"
    if tensors := decompress(folder):
        (folder / "dequant_sha256.json").write_text(json.dumps({"how": how, "tensors": tensors}, indent=1) + "\n")


def make_case(name: str, case: Case) -> None:
    reset_session()
    torch.manual_seed(0)
    # main has changed to OUT, so that no path of this machine is recorded
    model = AutoModelForCausalLM.from_pretrained(case["source"], dtype=case.get("dtype", "auto"))
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, VOCABULARY, (8, 32), generator=generator).tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 32] * 8})
    modifier = GPTQModifier if case.get("modifier") == "GPTQModifier" else QuantizationModifier
    keys = ("config_groups", "scheme", "targets", "ignore", "kv_cache_scheme")
    arguments = {key: case[key] for key in keys if key in case}
    if "kv_cache_scheme" in arguments:
        arguments["kv_cache_scheme"] = QuantizationArgs(**arguments["kv_cache_scheme"])
    if "config_groups" in arguments:
        arguments["config_groups"] = {key: QuantizationScheme(**value) for key, value in arguments["config_groups"].items()}
    oneshot(model=model, processor=Plain(), dataset=data, recipe=modifier(**arguments), max_seq_length=32, num_calibration_samples=8)
    folder = Path(name)
    shutil.rmtree(folder, ignore_errors=True)
    saving = {key: case[key] for key in ("max_shard_size", "quantization_format") if key in case}
    model.save_pretrained(folder, save_compressed=True, **saving)
    record(folder, case)


class Plain(transformers.PreTrainedTokenizerBase):
    """The data have ids already; oneshot wants some tokenizer all the same."""

    def __init__(self) -> None:
        pass

    def __repr__(self) -> str:
        return "Plain()"


EDGES: dict[str, tuple[int, int, dict[str, Any], str]] = {
    "pack4_sym_n36_k100": (36, 100, channel(num_bits=4), "pack-quantized"),
    "pack4_asym_n36_k96": (36, 96, weights(group_size=32, symmetric=False), "pack-quantized"),
    "pack4_asym_n35_k100": (35, 100, channel(num_bits=4, symmetric=False), "pack-quantized"),
    "pack8_asym_n35_k66": (35, 66, channel(symmetric=False), "pack-quantized"),
    "pack3_asym_n35_k96": (35, 96, weights(num_bits=3, group_size=32, symmetric=False), "pack-quantized"),
    "pack2_sym_n36_k100": (36, 100, channel(num_bits=2), "pack-quantized"),
    "pack4_tensor_asym_n36_k100": (36, 100, channel(num_bits=4, strategy="tensor", symmetric=False), "pack-quantized"),
    "int8_asym_n35_k66": (35, 66, channel(symmetric=False), "int-quantized"),
    "int8_group_asym_n35_k96": (35, 96, weights(num_bits=8, group_size=32, symmetric=False), "int-quantized"),
    "fp8_block_n130_k200": (130, 200, channel(strategy="block", block_structure=[128, 128], **FP8), "float-quantized"),
    "fp8_block_n256_k128": (256, 128, channel(strategy="block", block_structure=[128, 128], **FP8), "float-quantized"),
    "fp8_channel_n35_k66": (35, 66, channel(**FP8), "float-quantized"),
}


def make_edges(folder: Path) -> None:
    """One weight through each compressor: rows all positive (0), all negative (9), zero (18), with an outlier (27)."""
    from compressed_tensors.quantization.utils import calculate_qparams

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors, about = {}, {}
    for index, (name, (rows, columns, arguments, compression)) in enumerate(EDGES.items()):
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
        generator = torch.Generator().manual_seed(100 + index)
        weight = torch.randn((rows, columns), generator=generator) * 0.1
        weight[0], weight[9], weight[18] = weight[0].abs(), -weight[9].abs(), 0
        weight[27, 3] = 5.0
        weight = weight.half()
        low, high = extremes(weight, scheme.weights)
        scale, zero = calculate_qparams(low, high, scheme.weights)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(compression)
        packed = compressor.compress(state, scheme)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in packed.items()}
        tensors[f"{name}.reference"] = weight
        about[name] = {"weights": json.loads(scheme.weights.model_dump_json())} | judge(packed, scheme, compression)
    save_file(tensors, folder / "edges.safetensors", metadata={"format": "pt"})
    how = "BaseCompressor.compress of NAME.reference, then decompress; NAME.* are the tensors it wrote"
    (folder / "dequant_sha256.json").write_text(json.dumps({"how": how, "tensors": about}, indent=1) + "\n")


def extremes(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, groups] least and greatest values, as the tool's min-max observer finds them."""
    if args.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if args.strategy == "block":
        height, width = args.block_structure
        rows, columns = -(-weight.shape[0] // height), -(-weight.shape[1] // width)
        padded = torch.nn.functional.pad(weight, (0, columns * width - weight.shape[1], 0, rows * height - weight.shape[0]))
        blocks = padded.reshape(rows, height, columns, width).transpose(1, 2).flatten(2)
    else:
        blocks = weight.reshape(weight.shape[0], -1, args.group_size if args.strategy == "group" else weight.shape[1])
    return blocks.amin(-1), blocks.amax(-1)


def main(out: Path, names: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    torch.set_num_threads(1)
    if not all(Path(name).exists() for name in (QWEN, LLAMA, LLAMA2)):
        make_sources()
    for name in names or [*CASES, "edge_linear"]:
        if name == "edge_linear":
            make_edges(Path(name))
        else:
            make_case(name, CASES[name])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("cases", nargs="*", metavar="CASE")
    arguments = parser.parse_args()
    main(arguments.out, arguments.cases)
