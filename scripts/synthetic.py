"""Write a synthetic msModelSlim checkpoint of a real model's shapes: what the benchmarks convert.

    python scripts/synthetic.py FOLDER --layers 4 --bits 4

Shapes are Qwen2-7B's (hidden 3584, inner 18944, 28 query and 4 key/value heads of 128, vocabulary 152064), or Llama-2-7B's. Codes
are random over the bits' whole range, scales are float32 per group of 128 (MinMax's dtype), offsets 0. ``--embeddings`` adds the
embedding, the last norm and lm_head, which are copied verbatim and so flatter no one: they are left out by default.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from formats.safetensors_file import lay_out


@dataclass(frozen=True)
class Shapes:
    """A model's sizes; heads of 128. dtype: of its floats, "BF16" or "F16"."""

    model_type: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    dtype: str

    def config(self) -> dict[str, object]:
        """config.json, without the number of layers."""
        architecture = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[self.model_type]
        return {
            "architectures": [architecture], "model_type": self.model_type, "hidden_size": self.hidden, "intermediate_size": self.inner,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.vocabulary, "rms_norm_eps": 1e-6,
            "rope_theta": 1e6 if self.model_type == "qwen2" else 1e4, "max_position_embeddings": 4096,
            "tie_word_embeddings": False, "torch_dtype": {"BF16": "bfloat16", "F16": "float16"}[self.dtype],
        }  # fmt: skip


QWEN2_7B = Shapes("qwen2", 3584, 18944, 28, 4, 152064, "BF16")
LLAMA2_7B = Shapes("llama", 4096, 11008, 32, 32, 32000, "F16")
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = QWEN2_7B.hidden, QWEN2_7B.inner, 28, 4, 128, QWEN2_7B.vocabulary


def linears(layer: int, shapes: Shapes = QWEN2_7B) -> dict[str, tuple[int, int]]:
    """[out, in] of every linear of a decoder layer."""
    block = f"model.layers.{layer}"
    heads, kv = shapes.heads * HEAD_DIM, shapes.kv_heads * HEAD_DIM
    return {
        f"{block}.self_attn.q_proj": (heads, shapes.hidden),
        f"{block}.self_attn.k_proj": (kv, shapes.hidden),
        f"{block}.self_attn.v_proj": (kv, shapes.hidden),
        f"{block}.self_attn.o_proj": (shapes.hidden, heads),
        f"{block}.mlp.gate_proj": (shapes.inner, shapes.hidden),
        f"{block}.mlp.up_proj": (shapes.inner, shapes.hidden),
        f"{block}.mlp.down_proj": (shapes.hidden, shapes.inner),
    }


STATIC = (("input_scale", "BF16", 1), ("input_offset", "BF16", 1), ("deq_scale", "F32", 0), ("quant_bias", "I32", 0))
"""What static W8A8 has beside per-channel weights: (part, dtype, its length; 0: as many as outputs)."""


def write(
    folder: Path,
    layers: int,
    bits: int = 4,
    group: int = 128,
    embeddings: bool = False,
    static: bool = False,
    shapes: Shapes = QWEN2_7B,
) -> int:
    """Write the checkpoint; returns its bytes. static: W8A8 as msModelSlim writes it for a model in bfloat16, without biases."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "W8A8" if static else f"W{bits}A16"
    bits = 8 if static else bits
    description: dict[str, str] = {"model_quant_type": kind}
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for layer in range(layers):
        for name, (out, in_) in linears(layer, shapes).items():
            tensors += [(f"{name}.weight", "I8", (out, in_))]
            scales, dtype = ((out, 1), "BF16") if static else ((out, in_ // group), "F32")
            tensors += [(f"{name}.weight_scale", dtype, scales), (f"{name}.weight_offset", dtype, scales)]
            tensors += [(f"{name}.{part}", dtype, (length or out,)) for part, dtype, length in STATIC if static]
            description |= {tensor: kind for tensor, *_ in tensors if tensor.startswith(name)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors.append((f"model.layers.{layer}.{norm}.weight", shapes.dtype, (shapes.hidden,)))
    if embeddings:
        tensors.append(("model.norm.weight", shapes.dtype, (shapes.hidden,)))
    for name in ("model.embed_tokens", "lm_head") if embeddings else ():
        tensors.append((f"{name}.weight", shapes.dtype, (shapes.vocabulary, shapes.hidden)))
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
            source = {"I8": noise, "BF16": ones, "F16": ones}.get(info.dtype, scales if name.endswith("weight_scale") else zeros)
            source = zeros if name.endswith("_offset") else deq if name.endswith("deq_scale") else source
            data = memoryview(source.view(np.uint8)).cast("B")
            left = info.nbytes
            while left:
                left -= handle.write(data[: min(left, len(data))])
    (folder / f"quant_model_description_{kind.lower()}.json").write_text(json.dumps(description, indent=1))
    (folder / "config.json").write_text(json.dumps(shapes.config(), indent=1))
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
