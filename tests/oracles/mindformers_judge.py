"""What MindFormers 1.3.2 and Golden Stick 0.6.0 say of a folder that Weighbridge wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

from judge import Tool

CACHES = re.compile(r"model\.layers\.\d+\.attention\.infer_attention\.paged_attention_mgr\.((layer|_handler)\.)?(key|value)_cache")
"""What the network fills itself; a quantized cache lies in a cell of Golden Stick's."""


def check_loaded(folder: Path) -> None:
    """The network has every parameter of the folder's checkpoint, and it of the network's."""
    said = Tool("mindformers").run("mindformers_load.py", folder)
    found = json.loads(next(line for line in said.splitlines() if line.startswith("found ")).removeprefix("found "))
    assert [name for name in found["missing"] if not CACHES.fullmatch(name)] == []
    assert found["unknown"] == []
    assert found["shapes"] == []
    assert found["parameters"] > 15
    assert [name for name in found["dtypes"] if "norm" not in name] == []  # norms are computed in float32, and cast to it
