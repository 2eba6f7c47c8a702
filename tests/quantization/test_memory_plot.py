"""The picture of the memory to serve a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from convert import inference_memory
from formats.errors import DestinationError, UsageError
from quantize.memory_plot import draw, save

CONFIG = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "vocab_size": 32000,
    "num_attention_heads": 32,
}  # fmt: skip


def test_bars_add_up_to_the_totals(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = inference_memory(tmp_path, (1, 8), 2048, kv=("fp16", "int8"))
    (axes,) = draw(found).axes
    tops = sorted(bar.get_y() + bar.get_height() for bar in axes.patches)[-1]
    assert tops == pytest.approx(found.of("fp16", 8).total / 2**30)
    assert len(axes.patches) == 2 * 2 * 3
    assert save(found, tmp_path / "memory.svg").read_text().lstrip().startswith("<?xml")
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        save(found, tmp_path / "memory.txt")
    with pytest.raises(DestinationError, match="no such folder"):
        save(found, tmp_path / "none" / "memory.png")
