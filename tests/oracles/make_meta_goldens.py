"""Write fixtures/meta: a tiny Llama as Meta publishes one, by the real torch, and what Meta's own forward makes of it.

    python make_meta_goldens.py OUT

Run by an interpreter that has torch; it imports nothing of Weighbridge, and no test runs it. The forward is Meta's ``llama/model.py``
(Llama 2) in float32, without a cache: rotary embeddings as complex numbers of neighbouring outputs.

* ``two``: consolidated.00.pth and 01, split as fairscale's layers of two ranks hold it, params.json; ``one``: the same weights whole;
* ``vocabulary``: two parts whose embedding is split by the vocabulary, as Llama 3's are;
* ``expected.npz``: tokens [8], logits [8, vocabulary] float32 of the bfloat16 weights, and ``wq`` of block 0 as its float32 values.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

DIM, HEADS, KEY_HEADS, INNER, VOCABULARY, LAYERS, EPS = 64, 4, 2, 96, 80, 2, 1e-5
SIZE = DIM // HEADS


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    shapes = {"tok_embeddings.weight": (VOCABULARY, DIM), "output.weight": (VOCABULARY, DIM)}
    for layer in range(LAYERS):
        block = f"layers.{layer}."
        for name, heads in (("wq", HEADS), ("wk", KEY_HEADS), ("wv", KEY_HEADS)):
            shapes[f"{block}attention.{name}.weight"] = (SIZE * heads, DIM)
        shapes |= {f"{block}attention.wo.weight": (DIM, SIZE * HEADS)}
        shapes |= {f"{block}feed_forward.w1.weight": (INNER, DIM), f"{block}feed_forward.w3.weight": (INNER, DIM)}
        shapes |= {f"{block}feed_forward.w2.weight": (DIM, INNER)}
    found = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    norms = ["norm", *(f"layers.{layer}.{norm}" for layer in range(LAYERS) for norm in ("attention_norm", "ffn_norm"))]
    found |= {f"{name}.weight": 1 + 0.1 * torch.randn(DIM) for name in norms}
    return {name: value.to(torch.bfloat16) for name, value in found.items()}


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rotary(x: torch.Tensor) -> torch.Tensor:
    """[length, heads, size]: neighbours are the parts of complex numbers, which are turned."""
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, SIZE, 2).float() / SIZE))
    turns = torch.outer(torch.arange(x.shape[0]).float(), frequencies)
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(turns), turns)[:, None]
    return torch.view_as_real(turned).flatten(2)


def forward(model: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    model = {name: value.float() for name, value in model.items()}
    h, length = model["tok_embeddings.weight"][tokens], len(tokens)
    mask = torch.full((length, length), float("-inf")).triu(1)
    for layer in range(LAYERS):
        part = {name.removeprefix(f"layers.{layer}."): value for name, value in model.items() if name.startswith(f"layers.{layer}.")}
        x = norm(h, part["attention_norm.weight"])
        q, k, v = (x @ part[f"attention.{name}.weight"].T for name in ("wq", "wk", "wv"))
        q, k = rotary(q.view(length, HEADS, SIZE)), rotary(k.view(length, KEY_HEADS, SIZE))
        k, v = (one.view(length, KEY_HEADS, SIZE).repeat_interleave(HEADS // KEY_HEADS, 1) for one in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / SIZE**0.5 + mask
        h = h + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(length, -1) @ part["attention.wo.weight"].T
        x = norm(h, part["ffn_norm.weight"])
        inner = torch.nn.functional.silu(x @ part["feed_forward.w1.weight"].T) * (x @ part["feed_forward.w3.weight"].T)
        h = h + inner @ part["feed_forward.w2.weight"].T
    return norm(h, model["norm.weight"]) @ model["output.weight"].T


def part(name: str, value: torch.Tensor, rank: int, ranks: int, embedding: int) -> torch.Tensor:
    """What a rank of fairscale's ColumnParallelLinear, RowParallelLinear and ParallelEmbedding holds."""
    if value.dim() == 1:
        return value.clone()
    axis = embedding if name.startswith("tok_") else 1 if ".wo." in name or ".w2." in name else 0
    return value.chunk(ranks, axis)[rank].clone()


def write(folder: Path, model: dict[str, torch.Tensor], ranks: int, embedding: int = 1) -> None:
    folder.mkdir(parents=True)
    params = {"dim": DIM, "multiple_of": 32, "n_heads": HEADS, "n_kv_heads": KEY_HEADS, "n_layers": LAYERS, "norm_eps": EPS}
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(ranks):
        held = OrderedDict((name, part(name, value, rank, ranks, embedding)) for name, value in model.items())
        held["rope.freqs"] = 1.0 / (10000.0 ** (torch.arange(0, SIZE, 2).float() / SIZE))
        torch.save(held, folder / f"consolidated.{rank:02d}.pth")


def main(out: Path) -> None:
    model, tokens = weights(), torch.tensor([1, 17, 42, 3, 79, 17, 0, 5])
    write(out / "two", model, 2)
    write(out / "one", model, 1)
    write(out / "vocabulary", {name: value for name, value in model.items() if ".1." not in name}, 2, embedding=0)
    logits = forward(model, tokens).numpy()
    np.savez(out / "expected.npz", tokens=tokens.numpy(), logits=logits, wq=model["layers.0.attention.wq.weight"].float().numpy())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_meta_goldens.py OUT")
    main(Path(sys.argv[1]))
