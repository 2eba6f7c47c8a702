"""Write a synthetic msModelSlim checkpoint of a real model's shapes: what the benchmarks convert.

    python scripts/synthetic.py FOLDER --layers 4 --bits 4

Shapes are Qwen2-7B's (hidden 3584, inner 18944, 28 query and 4 key/value heads of 128, vocabulary 152064). Codes are random
over the bits' whole range, scales are float32 per group of 128 (MinMax's dtype), offsets 0. ``--embeddings`` adds the
embedding and lm_head, which are copied verbatim and so flatter no one: they are left out by default.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from formats.safetensors_file import lay_out

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 3584, 18944, 28, 4, 128, 152064
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def linears(layer: int) -> dict[str, tuple[int, int]]:
    """[out, in] of every linear of a decoder layer."""
    block = f"model.layers.{layer}"
    kv = KV_HEADS * HEAD_DIM
    return {
        f"{block}.self_attn.q_proj": (HIDDEN, HIDDEN),
        f"{block}.self_attn.k_proj": (kv, HIDDEN),
        f"{block}.self_attn.v_proj": (kv, HIDDEN),
        f"{block}.self_attn.o_proj": (HIDDEN, HIDDEN),
        f"{block}.mlp.gate_proj": (INNER, HIDDEN),
        f"{block}.mlp.up_proj": (INNER, HIDDEN),
        f"{block}.mlp.down_proj": (HIDDEN, INNER),
    }


STATIC = (("input_scale", "BF16", 1), ("input_offset", "BF16", 1), ("deq_scale", "F32", 0), ("quant_bias", "I32", 0))
"""What static W8A8 has beside per-channel weights: (part, dtype, its length; 0: as many as outputs)."""


def write(folder: Path, layers: int, bits: int = 4, group: int = 128, embeddings: bool = False, static: bool = False) -> int:
    """Write the checkpoint; returns its bytes. static: W8A8 as msModelSlim writes it for a model in bfloat16, without biases."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "W8A8" if static else f"W{bits}A16"
    bits = 8 if static else bits
    description: dict[str, str] = {"model_quant_type": kind}
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for layer in range(layers):
        for name, (out, in_) in linears(layer).items():
            tensors += [(f"{name}.weight", "I8", (out, in_))]
            scales, dtype = ((out, 1), "BF16") if static else ((out, in_ // group), "F32")
            tensors += [(f"{name}.weight_scale", dtype, scales), (f"{name}.weight_offset", dtype, scales)]
            tensors += [(f"{name}.{part}", dtype, (length or out,)) for part, dtype, length in STATIC if static]
            description |= {tensor: kind for tensor, *_ in tensors if tensor.startswith(name)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors.append((f"model.layers.{layer}.{norm}.weight", "BF16", (HIDDEN,)))
    for name in ("model.embed_tokens", "lm_head") if embeddings else ():
        tensors.append((f"{name}.weight", "BF16", (VOCABULARY, HIDDEN)))
    description |= {name: "FLOAT" for name, *_ in tensors if name not in description}
    (file,) = lay_out(tensors, 1 << 62, single_name=f"quant_model_weight_{kind.lower()}.safetensors")
    rng = np.random.default_rng(0)
    half = 1 << (bits - 1)
    noise = rng.integers(-half, half, 1 << 24, dtype=np.int8)
    scales = rng.uniform(1e-3, 2e-2, 1 << 20).astype(np.float32)
    ones, deq, zeros = np.full(1 << 20, 0x3F80, dtype=np.uint16), np.ones(1 << 18, np.float32), np.zeros(1 << 18, np.float32)
    with (folder / file.name).open("wb") as handle:
        handle.write(file.header)
        for name, info in file.tensors.items():
            source = {"I8": noise, "BF16": ones}.get(info.dtype, scales if name.endswith("weight_scale") else zeros)
            source = zeros if name.endswith("_offset") else deq if name.endswith("deq_scale") else source
            data = memoryview(source.view(np.uint8)).cast("B")
            left = info.nbytes
            while left:
                left -= handle.write(data[: min(left, len(data))])
    (folder / f"quant_model_description_{kind.lower()}.json").write_text(json.dumps(description, indent=1))
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    return file.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--embeddings", action="store_true")
    parser.add_argument("--static", action="store_true", help="W8A8 instead")
    options = parser.parse_args()
    size = write(options.folder, options.layers, options.bits, embeddings=options.embeddings, static=options.static)
    print(f"{size / 1e9:.2f} GB in {options.folder}")


if __name__ == "__main__":
    main()
