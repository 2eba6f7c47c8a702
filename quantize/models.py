"""Float models and tokenizers as transformers loads them, from a folder alone: no code of the folder is run, nothing is fetched.

InternLM's own code lies in its folders. But the first InternLM (``model_type`` internlm) is Llama with biases in attention
(``formats.llama_names.internlm_config``), and so transformers' Llama is built for it. Its tokenizer is Llama's too, over
``tokenizer.model``.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

from formats.checkpoint import Location
from formats.errors import UnreadableError
from formats.llama_names import internlm_config

__all__ = ["load_model", "load_tokenizer", "transformers_config"]


def transformers_config(location: Location) -> Any:
    """transformers' config of the model in a folder.

    :raises UnreadableError: an InternLM whose rotary embeddings are of an unknown type. What transformers raises is not caught
    """
    library: Any = transformers
    document = location.json("config.json") or {}
    if document.get("model_type") == "internlm":
        return library.AutoConfig.for_model(**internlm_config(document, str(location.folder)))
    if "config.json" in location.documents:
        return library.AutoConfig.for_model(**document)
    return library.AutoConfig.from_pretrained(location.folder, trust_remote_code=False, local_files_only=True)


def load_model(folder: Path) -> Any:
    """The float model in its own dtype. Raises UnreadableError where transformers cannot load it."""
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    name = "dtype" if version >= (4, 56) else "torch_dtype"
    library: Any = transformers
    try:
        with _without_bars(library.utils.logging):
            said = {"config": transformers_config(Location.of(folder)), name: "auto"}
            model = library.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **said)
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
            if (Location.of(folder).json("config.json") or {}).get("model_type") == "internlm":
                return _internlm_tokenizer(folder)
            raise UnreadableError(f"{folder}: its tokenizer cannot be loaded ({str(error).splitlines()[0]:.300})") from error
        return library.PreTrainedTokenizerFast(tokenizer_file=os.fspath(folder / "tokenizer.json"))


def _internlm_tokenizer(folder: Path) -> Any:
    """Llama's, from ``tokenizer.model``."""
    library: Any = transformers
    try:
        return library.LlamaTokenizer(vocab_file=os.fspath(folder / "tokenizer.model"), legacy=True)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        why = str(error).strip().splitlines()[0]
        raise UnreadableError(
            f"{folder}: its tokenizer.model cannot be loaded ({why:.300}); InternLM's needs sentencepiece: pip install sentencepiece"
        ) from error
