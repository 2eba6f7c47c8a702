"""Tiny models for LMDeploy's converters: every weight follows from its name, so a digest of what became of it says where each went.

Shared by ``oracles/make_lmdeploy_workspaces.py``, which runs LMDeploy on them, and by the tests. A value is a multiple of 2**-10 with seven
bits, which float16 and bfloat16 both hold, so that neither converter rounds; codes and zero points are words of random bits, and any
word is eight valid ones.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

Array = np.ndarray[Any, Any]
DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def words(name: str, shape: tuple[int, ...]) -> Array:
    """uint32 of random bits that follow from ``name``."""
    found = np.arange(int(np.prod(shape)), dtype=np.uint32) + np.uint32(zlib.crc32(name.encode()))
    for factor in (0x7FEB352D, 0x846CA68B):
        found = (found ^ found >> np.uint32(16)) * np.uint32(factor)
    return (found ^ found >> np.uint32(16)).reshape(shape)


def floats(name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    return (((words(name, shape) >> np.uint32(7)) & np.uint32(255)).astype(np.float32) / 1024 - 0.125).astype(dtype)


def linear(name: str, out: int, in_: int, dtype: Any, group: int = 0) -> dict[str, Array]:
    """A float linear [out, in], or AWQ's three tensors of it."""
    if not group:
        return {f"{name}.weight": floats(f"{name}.weight", (out, in_), dtype)}
    return {
        f"{name}.qweight": words(f"{name}.qweight", (in_, out // 8)).view(np.int32),
        f"{name}.qzeros": words(f"{name}.qzeros", (in_ // group, out // 8)).view(np.int32),
        f"{name}.scales": floats(f"{name}.scales", (in_ // group, out), np.float16) + np.float16(0.25),
    }


def model(config: dict[str, Any]) -> dict[str, Array]:
    """The tensors of a model by its config.json, named as its architecture names them."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or config.get("kv_channels") or hidden // heads
    keys, vocabulary, kind = config.get("num_key_value_heads", heads), config["vocab_size"], config["model_type"]
    dtype = DTYPES[config["torch_dtype"]]
    group = config.get("quantization_config", {}).get("group_size", 0)
    inter = config["intermediate_size"] // (2 if kind == "qwen" else 1)
    packed = (heads + 2 * keys) * head
    modules: dict[str, tuple[int, int]]
    if kind == "internlm2":
        ends, block, norms = ("model.tok_embeddings", "model.norm", "output"), "model.layers", ("attention_norm", "ffn_norm")
        modules = {"attention.wqkv": (packed, hidden), "attention.wo": (hidden, heads * head)}
        modules |= {"feed_forward.w1": (inter, hidden), "feed_forward.w3": (inter, hidden), "feed_forward.w2": (hidden, inter)}
    elif kind == "qwen":
        ends, block, norms = ("transformer.wte", "transformer.ln_f", "lm_head"), "transformer.h", ("ln_1", "ln_2")
        modules = {"attn.c_attn": (packed, hidden), "attn.c_proj": (hidden, heads * head)}
        modules |= {"mlp.w1": (inter, hidden), "mlp.w2": (inter, hidden), "mlp.c_proj": (hidden, inter)}
    else:
        ends, block = ("model.embed_tokens", "model.norm", "lm_head"), "model.layers"
        norms = ("input_layernorm", "post_attention_layernorm")
        modules = {f"self_attn.{name}_proj": (count * head, hidden) for name, count in (("q", heads), ("k", keys), ("v", keys))}
        if kind == "baichuan":
            modules = {"self_attn.W_pack": (packed, hidden)}
        modules |= {"self_attn.o_proj": (hidden, heads * head)}
        modules |= {"mlp.gate_proj": (inter, hidden), "mlp.up_proj": (inter, hidden), "mlp.down_proj": (hidden, inter)}
    biased = {"qwen": ("c_attn",), "qwen2": ("q_proj", "k_proj", "v_proj")}.get(kind, ())
    floating = np.float16 if group else dtype
    tensors = {
        f"{ends[0]}.weight": floats(ends[0], (vocabulary, hidden), floating),
        f"{ends[1]}.weight": floats(ends[1], (hidden,), floating),
    }
    if not config.get("tie_word_embeddings"):
        tensors[f"{ends[2]}.weight"] = floats(ends[2], (vocabulary, hidden), floating)
    for layer in range(config["num_hidden_layers"]):
        here = f"{block}.{layer}"
        for norm in norms:
            tensors[f"{here}.{norm}.weight"] = floats(f"{here}.{norm}", (hidden,), floating)
        for name, (out, in_) in modules.items():
            tensors |= linear(f"{here}.{name}", out, in_, floating, group)
            if name.rpartition(".")[2] in biased:
                tensors[f"{here}.{name}.bias"] = floats(f"{here}.{name}.bias", (out,), floating)
    return tensors


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A Hugging Face folder of it; the tokenizer is a file that LMDeploy copies and that nobody reads."""
    folder.mkdir(parents=True)
    save_file(model(config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    return folder


LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 1,
    "num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 47, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 20000.0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
"""Of LMDeploy 0.1: heads of 128."""
SMALL = LLAMA | {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
"""Since 0.6: heads of 64."""
AWQ: dict[str, Any] = {
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
}  # fmt: skip
W4 = SMALL | AWQ | {
    "torch_dtype": "float16", "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 1,
}  # fmt: skip
REPEATED = SMALL | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
"""For more ranks than key heads."""
REPEATED_W4: dict[str, Any] = {"torch_dtype": "float16", "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8}
WIDE: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
SCALED: dict[str, dict[str, Any]] = {
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn_said": {"type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0},
}  # fmt: skip
INTERNLM2 = LLAMA | WIDE | {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]}
BAICHUAN = LLAMA | {
    "model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"], "hidden_size": 256, "num_attention_heads": 2,
    "num_key_value_heads": 2, "torch_dtype": "float16",
}  # fmt: skip
QWEN: dict[str, Any] = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "hidden_size": 256, "intermediate_size": 192, "num_attention_heads": 2,
    "num_hidden_layers": 1, "vocab_size": 47, "kv_channels": 128, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "seq_length": 256,
    "max_position_embeddings": 512, "use_dynamic_ntk": True, "use_logn_attn": True, "no_bias": True, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
"""Its rotary embedding and the logarithm of long inputs; biases on q, k and v alone."""

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "bf16_v010": ("0.1.0", LLAMA, 1),
    "bf16_v026": ("0.2.6", LLAMA, 1),
    "bf16_v060": ("0.6.0", LLAMA | {"intermediate_size": 128}, 1),
    "w4_v060": ("0.6.0", W4 | {"num_attention_heads": 2, "num_key_value_heads": 2}, 2),
    "bf16_v065": ("0.6.5", SMALL | {"num_key_value_heads": 2}, 2),
    "w4_v065": ("0.6.5", W4, 2),
    "bf16_v080": ("0.8.0", SMALL | {"num_key_value_heads": 2}, 2),
    "w4_v080": ("0.8.0", W4, 2),
    "bf16_v092": ("0.9.2", SMALL | {"num_key_value_heads": 2}, 2),
    "w4_v092": ("0.9.2", W4, 2),
    **{
        f"{what}_v{version.replace('.', '')}": (version, config, tp)
        for version in ("0.6.5", "0.8.0", "0.9.2")
        for what, config, tp in (
            ("tied", SMALL | {"tie_word_embeddings": True}, 1),
            ("head_dim", SMALL | {"head_dim": 96}, 1),
            ("padded", SMALL | {"num_key_value_heads": 2, "intermediate_size": 97}, 2),
            ("padded_w4", W4 | {"intermediate_size": 384}, 2),
            *((scaling, SMALL | {"rope_scaling": said}, 1) for scaling, said in SCALED.items()),
            ("internlm2", INTERNLM2, 1),
            ("internlm2_scaled", INTERNLM2 | {"rope_scaling": SCALED["dynamic"]}, 1),
            ("internlm2_w4", INTERNLM2 | AWQ | {"intermediate_size": 256, "torch_dtype": "float16"}, 1),
            ("baichuan", BAICHUAN, 2),
            ("qwen", QWEN, 2),
        )
    },
    **{
        f"repeated_v{version.replace('.', '')}": (version, REPEATED | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, 4)
        for version in ("0.6.5", "0.8.0", "0.9.2")
    },
    "repeated_w4_v092": ("0.9.2", REPEATED | AWQ | REPEATED_W4, 4),
    "internlm2_v026": ("0.2.6", INTERNLM2 | {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 512}, 2),
    "baichuan_v010": ("0.1.0", BAICHUAN, 2),
    "qwen_v010": ("0.1.0", QWEN, 2),
    "qwen2_v065": ("0.6.5", SMALL | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, 1),
}  # fmt: skip
"""{case: (LMDeploy's version, config.json, ranks)}."""
