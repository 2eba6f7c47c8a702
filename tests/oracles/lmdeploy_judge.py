"""What LMDeploy 0.18.0's engines hold of a folder, as linears and plain tensors by the folder's own names; plain code, without torch.

Undone is what the engines do to a model so that their kernels like it: q, k and v lie side by side in one linear, and gate and up; and
TurboMind has the two halves of each head of q and k, which rotary embedding turns together, in turns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from judge import Tool, read_answer

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
TURBOMIND = {
    "attention.w_qkv": ("self_attn", QKV),
    "attention.wo": ("self_attn", ("o_proj",)),
    "feed_forward.w1w3": ("mlp", GATE_UP),
    "feed_forward.w2": ("mlp", ("down_proj",)),
}
PYTORCH = {
    "self_attn.qkv_proj": ("self_attn", QKV),
    "self_attn.o_proj": ("self_attn", ("o_proj",)),
    "mlp.gate_up_proj": ("mlp", GATE_UP),
    "mlp.down_proj": ("mlp", ("down_proj",)),
}
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


class Held(NamedTuple):
    """A linear of TurboMind's: codes less zero points [out, in], whole numbers, and scales [out, in], in their own dtype."""

    steps: np.ndarray
    scales: np.ndarray


class Answer(NamedTuple):
    """What the engines say of a folder; see ``lmdeploy_load.py``."""

    folder: Path
    tensors: Mapping[str, np.ndarray]
    turbomind: str
    pytorch: str
    dtype: str
    unfilled: list[str]

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text("utf-8"))

    def parts(self, fused: tuple[str, ...]) -> list[int]:
        """How wide each of the linears is that are fused; [1]: nothing is."""
        config = self.config
        if fused == QKV:
            heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
            size = config.get("head_dim") or config["hidden_size"] // heads
            return [heads * size, keys * size, keys * size]
        return [config["intermediate_size"]] * 2 if fused == GATE_UP else [1]

    def split(self, tensor: np.ndarray, fused: tuple[str, ...], axis: int = -1) -> list[np.ndarray]:
        """One tensor for each of the linears that are fused along ``axis``."""
        ends = np.cumsum(self.parts(fused))
        assert len(fused) == 1 or tensor.shape[axis] == ends[-1]
        return np.split(tensor, ends[:-1], axis) if len(fused) > 1 else [tensor]

    def unturned(self, tensor: np.ndarray) -> np.ndarray:
        """q or k [..., out] with the halves of its heads one after the other."""
        size = self.parts(QKV)[0] // self.config["num_attention_heads"]
        turns = tensor.reshape(*tensor.shape[:-1], -1, size // 2, 2)
        return turns.swapaxes(-1, -2).reshape(tensor.shape)

    def turbomind_parts(self, module: str, leaf: str) -> Iterator[tuple[str, np.ndarray]]:
        """Of every layer, tensor ``leaf`` [..., out] of TurboMind's ``module``, by the names of the linears in it."""
        block, fused = TURBOMIND[module]
        for layer in range(self.config["num_hidden_layers"]):
            tensor = self.tensors.get(f"turbomind/text_model.layers.{layer}.{module}.{leaf}")
            if tensor is None:
                continue
            if tensor.dtype == np.int32:
                tensor = np.stack([tensor >> (4 * place) & 15 for place in range(8)], -1).reshape(len(tensor), -1)
            for name, part in zip(fused, self.split(tensor, fused), strict=True):
                yield f"model.layers.{layer}.{block}.{name}", self.unturned(part) if name in {"q_proj", "k_proj"} else part

    def turbomind_linears(self) -> dict[str, Held]:
        """TurboMind's 4-bit linears."""
        found = {}
        for module in TURBOMIND:
            codes, scales, zeros = (dict(self.turbomind_parts(module, leaf)) for leaf in ("weight", "scales", "zeros"))
            for name, scale in scales.items():
                group, outputs = self.tensors[f"turbomind/text_model.layers.{name.split('.')[2]}.{module}.block"]
                assert (len(scale) * group, outputs) == (len(codes[name]), 1), f"{name}: the kernel is told groups of {group}"
                spelled = zeros[name].astype(np.float32).repeat(group, 0)
                found[name] = Held((codes[name].astype(np.float32) - spelled).T, scale.repeat(group, 0).T)
        return found

    def turbomind_plain(self) -> dict[str, np.ndarray]:
        """TurboMind's other tensors."""
        root, found = "turbomind/text_model", {}
        for module in TURBOMIND:
            quantized = dict(self.turbomind_parts(module, "scales"))
            found |= {f"{name}.bias": part for name, part in self.turbomind_parts(module, "bias")}
            found |= {f"{name}.weight": part.T for name, part in self.turbomind_parts(module, "weight") if name not in quantized}
        for layer in range(self.config["num_hidden_layers"]):
            for theirs, ours in NORMS.items():
                found[f"model.layers.{layer}.{ours}.weight"] = self.tensors[f"{root}.layers.{layer}.{theirs}.weight"]
        found["model.norm.weight"] = self.tensors[f"{root}.norm.weight"]
        found["model.embed_tokens.weight"] = self.tensors[f"{root}.tok_embeddings"]
        found["lm_head.weight"] = self.tensors[f"{root}.output.weight"].T
        return found

    def pytorch_tensors(self) -> dict[str, np.ndarray]:
        """The tensors of the PyTorch engine's model; what is fused lies along the first axis."""
        found = {}
        for name, tensor in self.tensors.items():
            if not name.startswith("pytorch/"):
                continue
            module, _, leaf = name.removeprefix("pytorch/").rpartition(".")
            place = next((place for place in PYTORCH if module.endswith(f".{place}")), None)
            if place is None:
                found[f"{module}.{leaf}"] = tensor
                continue
            block, fused = PYTORCH[place]
            parent = f"{module.removesuffix(place)}{block}"
            found |= {f"{parent}.{part}.{leaf}": one for part, one in zip(fused, self.split(tensor, fused, axis=0), strict=True)}
        return found


def ask(folders: Mapping[str, Path], place: Path) -> dict[str, Answer]:
    """Both engines about every folder, in one process; ``place`` is made."""
    (place / "out").mkdir(parents=True)
    job = place / "job.json"
    job.write_text(json.dumps({name: str(folder) for name, folder in folders.items()}), "utf-8")
    Tool("lmdeploy").run("lmdeploy_load.py", job, place / "out")
    found = {}
    for name, folder in folders.items():
        tensors, metadata = read_answer(place / "out" / f"{name}.safetensors")
        found[name] = Answer(folder, tensors, **{key: json.loads(text) for key, text in metadata.items()})
    return found
