"""The lazy view of a checkpoint: headers are read at once, weights only in the rectangles that are asked for."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from .errors import UnreadableError, UsageError
from .ir import Array, ArrayLike, PlainTensor, QuantizedLinear, read
from .safetensors_file import SafetensorsFile, SourceFile, StoredFile, TensorSet, open_index, read_json
from .workspace import Workspace

FLOATS = ("F16", "BF16", "F32")
"""Dtypes of biases and, in most formats, of scales."""

Entry = tuple[Literal["layer", "plain"], str]

ZerosReading = Literal["mask", "plain", "carry"]


def zeros_reading(name: str | None) -> ZerosReading | None:
    """``name`` as a way of reading GPTQ v1 zero points; UsageError for another word."""
    if name not in {None, *get_args(ZerosReading)}:
        raise UsageError(f"--gptq-zeros {name}: wanted {', '.join(get_args(ZerosReading))}")
    return name  # type: ignore[return-value]


"""How to read a zero point stored less one as the largest value: as 0, as one more than fits, or carried into the next lane."""


@dataclass(frozen=True)
class Location:
    """What the user pointed at: a folder, or one file in it.

    file          the file if one was named, else None
    description   a description JSON named apart (``ms_to_vllm --json``)
    base          the float model's folder, if one was named
    zeros         how to read zero points that tools read differently (GPTQ v1), if the user says it; None: as the file's writer
    documents     JSON objects by file name that count instead of what lies in the folder, which is still being written
    opener        what opens its weight files
    view          how its tensors are seen, if not as they are stored
    """

    folder: Path
    names: tuple[str, ...]
    file: Path | None = None
    description: Path | None = None
    base: Location | None = None
    zeros: ZerosReading | None = None
    documents: Mapping[str, Any] = field(default_factory=dict)
    opener: Callable[[Path, int], StoredFile] = SafetensorsFile
    view: Callable[[TensorSet], TensorSet] | None = None

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        description: str | os.PathLike[str] | None = None,
        base: Location | None = None,
        zeros: ZerosReading | None = None,
    ) -> Location:
        """Look at ``path``; ``UnreadableError`` if there is nothing to read."""
        where = Path(path)
        described = None if description is None else Path(description)
        if described is not None and not described.is_file():
            raise UnreadableError(f"{described}: there is no such file")
        try:
            if where.is_dir():
                return cls(where, tuple(sorted(os.listdir(where))), None, described, base, zeros)
            if where.is_file():
                return cls(where.parent, tuple(sorted(os.listdir(where.parent))), where, described, base, zeros)
        except OSError as error:
            raise UnreadableError(f"{where}: cannot be read ({error.strerror or error})") from None
        raise UnreadableError(f"{where}: there is no such file or folder")

    @property
    def model_name(self) -> str:
        """What to call the model: as its .ckpt file, if that was named, else as its folder."""
        if self.file is not None and self.file.suffix == ".ckpt":
            return self.file.stem
        return self.folder.resolve().name

    def json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in ``name`` beside the weights, or None if there is no such file."""
        return self.read_json(self.folder / name) if name in self.names else None

    def read_json(self, path: Path) -> dict[str, Any]:
        """The JSON object at ``path``."""
        return dict(self.documents[path.name]) if path.name in self.documents else read_json(path)

    def _index(self, path: Path) -> TensorSet:
        return open_index(self.folder, path, self.opener, self.documents.get(path.name))

    def _torch_tensors(self) -> TensorSet:
        """The tensors of a folder of the days before safetensors: pytorch_model.bin, or shards with their index."""
        from .torch_file import open_torch

        if "pytorch_model.bin.index.json" in self.names:
            return open_index(self.folder, self.folder / "pytorch_model.bin.index.json", open_torch)
        files = [name for name in self.names if name.endswith(".bin") and "training" not in name and "optimizer" not in name]
        if "pytorch_model.bin" in files:
            files = ["pytorch_model.bin"]
        if len(files) != 1:
            raise UnreadableError(f"{self.folder.name}: {len(files)} .bin files and no index; put pytorch_model.bin.index.json beside them")
        return TensorSet([self.folder / files[0]], opener=open_torch)

    def tensors(self, prefix: str = "") -> TensorSet:
        """Open the weights: the named file, else an index, else the single safetensors file of the folder.

        prefix   names that begin with it are preferred (an index copied from the base model must not win)
        """
        found = self._tensors(prefix)
        return found if self.view is None else self.view(found)

    def _tensors(self, prefix: str) -> TensorSet:
        if self.file is not None and self.file.name.endswith(".safetensors"):
            return TensorSet([self.file], opener=self.opener)
        if self.file is not None and self.file.name.endswith(".safetensors.index.json"):
            return self._index(self.file)
        weights = [name for name in self.names if name.endswith(".safetensors")]
        if not weights and any(name.endswith(".bin") for name in self.names):
            return self._torch_tensors()
        indexes = [name for name in self.names if name.endswith(".safetensors.index.json")]
        if prefix and any(name.startswith(prefix) for name in weights + indexes):
            weights = [name for name in weights if name.startswith(prefix)]
            indexes = [name for name in indexes if name.startswith(prefix)]
        if len(indexes) == 1:
            return self._index(self.folder / indexes[0])
        if len(indexes) > 1:
            raise UnreadableError(f"{self.folder.name}: several indexes ({', '.join(indexes)}); name the one to read")
        if "model.safetensors" in weights:
            weights = ["model.safetensors"]
        if len(weights) != 1:
            found = "no .safetensors file" if not weights else f"{len(weights)} .safetensors files and no index"
            raise UnreadableError(f"{self.folder.name}: {found}; name the weight file, or put its index beside it")
        return TensorSet([self.folder / weights[0]], opener=self.opener)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A stored tensor that is no part of the model, under a condition that the probe checks.

    condition   "zero": all its values are 0; "equal": its bytes equal tensor ``other``'s; "always": whatever it holds
    why         what it is, for people; otherwise: what follows if the condition does not hold
    """

    tensor: str
    condition: Literal["zero", "equal", "always"]
    other: str
    why: str
    otherwise: str

    def holds(self, tensors: TensorSet) -> bool:
        """Whether the condition holds; reads the tensor, if that matters."""
        if self.condition == "always":
            return True
        data = tensors.array(self.tensor)
        return not data.any() if self.condition == "zero" else data.tobytes() == tensors.array(self.other).tobytes()


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A layer that the reader recognises by name and does not read yet."""

    name: str
    type: str
    why: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that looks wrong, or that a user would want to know; ``inspect`` prints it."""

    code: str
    where: str
    what: str


class Checkpoint:
    """Quantized layers and plain tensors of one checkpoint, in file order. A format's reader subclasses it.

    entries       ("layer" | "plain", name) in the order of the stored tensors; names are canonical
    functional    stored tensors that change what the model computes and that no field of the IR holds here
    attention     KV-cache scales and the like, by stored name; said: what the checkpoint's configs say of them
    config        config.json without its quantization_config, or None
    kept          bytes that the reader keeps in memory of what it made
    sidecars      where config.json and the tokenizer lie, if not beside the weights
    respells      its float weights have names, or lie in files, of the format's own
    """

    kept = 0
    sidecars: Location | None = None
    respells = False

    def __init__(self, location: Location, format: str, variant: str, tensors: TensorSet) -> None:
        self.location = location
        self.format = format
        self.variant = variant
        self.tensors = tensors
        self.entries: list[Entry] = []
        self.left_out: list[LeftOut] = []
        self.unsupported: list[Unsupported] = []
        self.functional: list[str] = []
        self.attention: list[str] = []
        self.said: dict[str, Any] = {}
        self.findings: list[Finding] = []
        config = location.json("config.json")
        self.quantization = None if config is None else config.pop("quantization_config", None)
        self.config = config

    @property
    def model_type(self) -> str | None:
        """config.json's model_type, of the base model if one was named, else of the checkpoint's own folder."""
        base = self.location.base
        found = (self.config if base is None else base.json("config.json")) or {}
        return found["model_type"] if isinstance(found.get("model_type"), str) else None

    def beside(self, base: Location | None, target: str) -> Location | None:
        """Where config.json and the tokenizer lie, of the weights in format ``target``. base: the float model, if one was named."""
        return base or self.sidecars

    def layer(self, name: str) -> QuantizedLinear:
        """The quantized layer ``name``; its codes and scales are read when asked for."""
        raise UnreadableError(f"{self.format} has no quantized layer {name}")

    def layer_tensors(self, name: str) -> tuple[str, ...]:
        """Stored tensors that layer ``name`` is made of."""
        return ()

    def is_cache(self, tensor: str) -> bool:
        """Whether a tensor of ``attention`` is of the KV cache."""
        return ".kv_cache_" in tensor or tensor.endswith(("k_scale", "v_scale"))

    def bias(self, name: str) -> ArrayLike | None:
        """The layer's bias, if one is stored; UnreadableError if it is not one of floats in one dimension."""
        info = self.tensors.get(f"{name}.bias")
        if info is None:
            return None
        if info.dtype not in FLOATS or len(info.shape) != 1:
            raise UnreadableError(f"{name}: bias is {info.dtype} {list(info.shape)}, wanted one float for each output")
        return self.tensors.tensor(f"{name}.bias")

    def plain(self, name: str) -> PlainTensor:
        """The plain tensor ``name``, as a view."""
        info = self.tensors[name]
        return PlainTensor(name, info.dtype, info.shape, self.tensors.tensor(name))

    def leave_out(self, ignored: Callable[[str], bool], why: str) -> None:
        """Take plain tensors that a target has no use for out of the entries."""
        names = {name for name in self.plain_names if ignored(name)}
        self.left_out += [LeftOut(name, "always", "", why, "") for name in names]
        self.entries = [(kind, name) for kind, name in self.entries if name not in names]

    def data_findings(self) -> list[Finding]:
        """Findings that only the data can make; reads small tensors. None by default."""
        return []

    def entries_with(self, attention: Iterable[str]) -> list[Entry]:
        """``entries``, and after them tensors of ``attention``, which are carried as plain ones."""
        return [*self.entries, *(("plain", name) for name in attention)]

    @property
    def layer_names(self) -> list[str]:
        return [name for kind, name in self.entries if kind == "layer"]

    @property
    def plain_names(self) -> list[str]:
        return [name for kind, name in self.entries if kind == "plain"]

    @property
    def files(self) -> tuple[SourceFile, ...]:
        return tuple(file.identity for file in self.tensors.files)

    def changed_file(self) -> str | None:
        """The first source file that is no longer what it was when the checkpoint was opened, or None."""
        return next((file.path.name for file in self.tensors.files if not file.unchanged()), None)


@dataclass(frozen=True, slots=True)
class IntegralZeros:
    """Zero points stored in any dtype, as int16 in the signed domain (``LazyArray``).

    stored    array broadcastable to [out, groups]; low, high: the range that bits allow
    negated   what is stored is added to codes, rather than taken off
    base      so much more is stored than is meant
    raises    UnreadableError where a value is not an integer in the range
    """

    name: str
    stored: ArrayLike
    low: int
    high: int
    negated: bool = False
    base: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int16)

    def read(self, rows: slice = slice(None), cols: slice = slice(None), work: Workspace | None = None) -> Array:
        part = read(self.stored, rows, cols, work)
        if not self.base and not part.any():
            return np.zeros(part.shape, dtype=np.int16)
        values = -part.astype(np.float32) if self.negated else part.astype(np.float32) - np.float32(self.base)
        whole = np.rint(values)
        if not np.array_equal(whole, values) or (whole.size and not (self.low <= whole.min() and whole.max() <= self.high)):
            bad = values[~((whole == values) & (whole >= self.low) & (whole <= self.high))]
            raise UnreadableError(
                f"{self.name}: holds the zero point {bad.flat[0] + self.base}, wanted integers from {self.low + self.base} to "
                f"{self.high + self.base}; "
                "the file is damaged or was written for another bit width"
            )
        return whole.astype(np.int16)


_IN_BLOCK = re.compile(r"(?:^|\.)\d+\.")


def float_linears(checkpoint: Checkpoint) -> list[str]:
    """Full dotted names of linears that are plain 2-D ``.weight`` tensors inside numbered blocks: left in float."""
    return [
        name[: -len(".weight")]
        for name in checkpoint.plain_names
        if name.endswith(".weight") and len(checkpoint.tensors[name].shape) == 2 and _IN_BLOCK.search(name)
    ]


def float_matrices(checkpoint: Checkpoint) -> list[str]:
    """Full dotted names of modules outside the blocks that have a plain 2-D ``.weight``: lm_head, embeddings, projectors."""
    return [
        name[: -len(".weight")]
        for name in checkpoint.plain_names
        if name.endswith(".weight") and not _IN_BLOCK.search(name) and len(checkpoint.tensors[name].shape) == 2
    ]


def modules_in_every_block(quantized: Sequence[str], left_in_float: Sequence[str]) -> list[str] | None:
    """Relative names of quantized modules if all numbered blocks, wholly float ones too, have the same, else None."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in quantized:
        if match := _IN_BLOCK.search(name):
            blocks[name[: match.end()]].append(name[match.end() :])
    for name in left_in_float:
        if match := _IN_BLOCK.search(name):
            blocks.setdefault(name[: match.end()], [])
    first = next(iter(blocks.values()), None)
    return first if first and all(set(block) == set(first) for block in blocks.values()) else None
