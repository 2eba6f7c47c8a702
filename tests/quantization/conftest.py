"""What these tests share: a trained model's folder and questions to calibrate by, made once.

One thread: the numbers are compared with ones that were made so.
"""

from pathlib import Path

import pytest
import tiny
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the trained model in fixtures, with a tokenizer."""
    return tiny.model_folder(tmp_path_factory.mktemp("model") / "tinylm")


@pytest.fixture(scope="session")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions as BoolQ has them."""
    return tiny.questions(tmp_path_factory.mktemp("calib") / "calib.jsonl")
