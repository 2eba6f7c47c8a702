"""Without torch, a .bin folder is one clear sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from formats import open_checkpoint
from formats.errors import UnreadableError


def test_a_bin_folder_says_that_it_needs_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UnreadableError, match=r"pytorch_model\.bin: .*only torch can read; pip install 'weighbridge\[quantize\]'"):
        open_checkpoint(tmp_path)
