"""Float models and tokenizers as transformers loads them, from a folder alone: no code of the folder is run, nothing is fetched."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

from formats.errors import UnreadableError

__all__ = ["load_model", "load_tokenizer"]


def load_model(folder: Path) -> Any:
    """The float model in its own dtype. Raises UnreadableError where transformers cannot load it."""
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    name = "dtype" if version >= (4, 56) else "torch_dtype"
    library: Any = transformers
    try:
        with _without_bars(library.utils.logging):
            model = library.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **{name: "auto"})
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnreadableError(f"{folder}: transformers {transformers.__version__} cannot load it ({first.strip():.300})") from error
    return model.eval()


@contextlib.contextmanager
def _without_bars(logging: Any) -> Iterator[None]:
    """Without transformers' bars on stderr."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; of one whose class this transformers does not know, what tokenizer.json says."""
    library: Any = transformers
    try:
        return library.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not (folder / "tokenizer.json").is_file():
            raise UnreadableError(f"{folder}: its tokenizer cannot be loaded ({str(error).splitlines()[0]:.300})") from error
        return library.PreTrainedTokenizerFast(tokenizer_file=os.fspath(folder / "tokenizer.json"))
