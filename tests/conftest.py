"""What every test can ask for: where the fixtures are, and sources that a test may change."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import FIXTURES, GOLDENS

CopyGolden = Callable[[str], Path]

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send it, and a shell ignores it for what runs in its background


@pytest.fixture
def golden_copy(tmp_path: Path) -> CopyGolden:
    """Copies a msModelSlim golden beside its base model's config, generation config and tokenizer; the copy may be changed."""

    def copy(case: str) -> Path:
        source = tmp_path / "source"
        shutil.copytree(FIXTURES / "msmodelslim" / case, source)
        base = FIXTURES / "msmodelslim" / GOLDENS[case].base
        for path in base.iterdir():
            if path.suffix != ".safetensors" and not (source / path.name).exists():
                shutil.copyfile(path, source / path.name)
        return source

    return copy
