"""Legacy ``pytorch_model.bin`` folders: a dictionary from tensor name to tensor, saved by torch.

Since torch 1.6 a ``.bin`` file is a zip, which ``torch_zip`` reads without torch. Before, it was bare pickles: those are opened with
``torch.load(weights_only=True)``, whose unpickler knows tensors and containers and nothing else, and only if every value is a plain
dense tensor; the file is held whole. torch is an extra (``pip install 'weighbridge[quantize]'``). Sharded files are listed by
``pytorch_model.bin.index.json``, like safetensors shards.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .errors import UnreadableError
from .ir import Array
from .safetensors_file import DTYPES, SourceFile, TensorInfo, TensorTable
from .torch_zip import TorchZipFile, is_zip

_NAMES = {
    "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float32": "F32", "torch.float64": "F64", "torch.int8": "I8",
    "torch.uint8": "U8", "torch.int16": "I16", "torch.int32": "I32", "torch.int64": "I64", "torch.bool": "BOOL",
}  # fmt: skip


def open_torch(path: Path, number: int = 0) -> TorchZipFile | TorchFile:
    """A ``.bin`` file of either kind."""
    return TorchZipFile(path, number) if is_zip(path) else TorchFile(path, number)


class TorchFile:
    """One ``.bin`` file of the old kind, with what ``SafetensorsFile`` offers: tensors by name as NumPy views, identity, unchanged."""

    def __init__(self, path: Path, number: int = 0) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        loaded = _load(path)
        self._tensors = {name: _dense(path, name, value) for name, value in loaded.items()}
        self.tensors = TensorTable(number)
        self.exempt = path.stat().st_size
        for name, tensor in self._tensors.items():
            size = tensor.numel() * tensor.element_size()
            self.tensors.add(name, _NAMES[str(tensor.dtype)], tuple(tensor.shape), 0, size)
        status = path.stat()
        listing = "".join(f"{name} {info.dtype} {info.shape}\n" for name, info in self.tensors.items())
        self.identity = SourceFile(path.name, status.st_size, status.st_mtime_ns, xxhash.xxh3_128_hexdigest(listing.encode()))

    def tensor(self, name: str, info: TensorInfo | None = None) -> Array:
        """The tensor as a read-only NumPy view, bfloat16 as ml_dtypes' type."""
        tensor = self._tensors[name]
        info = self.tensors[name]
        if info.dtype == "BF16":
            import torch

            array = tensor.view(torch.int16).numpy().view(DTYPES["BF16"])
        else:
            array = tensor.numpy()
        view: Array = np.ascontiguousarray(array).view()
        view.flags.writeable = False
        return view

    def unchanged(self) -> bool:
        """Whether the file on disk still has the size and time it had when it was opened."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.identity.size, self.identity.mtime_ns)


def _load(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError:
        raise UnreadableError(
            f"{path.name}: saved as torch before 1.6 did, which only torch can read; pip install 'weighbridge[quantize]', or save it again"
        ) from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UnreadableError(f"{path.name}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # weights_only raises UnpicklingError, RuntimeError, EOFError, ... by what is wrong
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UnreadableError(f"{path.name}: is damaged, or holds more than tensors, which is not run ({reason})") from None
    if not isinstance(loaded, Mapping) or not all(isinstance(name, str) for name in loaded):
        raise UnreadableError(f"{path.name}: holds a {type(loaded).__name__}, wanted a dictionary of tensors")
    return loaded


def _dense(path: Path, name: str, value: Any) -> Any:
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or str(value.dtype) not in _NAMES:
        raise UnreadableError(f"{path.name}: {name!r} is no plain dense tensor ({type(value).__name__})")
    return value.detach().contiguous()
