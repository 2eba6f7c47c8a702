"""What is finished of a quantization: each decoder layer in a file of its own, and a journal that says which.

The folder ``.OUT.quantize.weighbridge`` lies beside the destination until that is whole, so a run that was killed goes on with the layer
at which it was, and ends with the same bytes. The finished layers and what the model has beside them (embeddings, final norm and head,
where they lie in the model's own folder) are then one checkpoint, spelled as msModelSlim's safe_tensor folder is, which the conversion
engine writes in any format.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file

from convert.certificate import version
from convert.staging import Staging, sync
from formats.checkpoint import Checkpoint, Location
from formats.ir import Array, ArrayLike
from formats.safetensors_file import SafetensorsFile, StoredFile, TensorInfo, TensorSet, TensorTable

from .blocks import FLOAT_DTYPES, Blocks, Weights, to_torch
from .progress import LayerFigures
from .recipe import Recipe
from .saving import DESCRIPTION, Made, Spelled, config_of, description_of, extra_tensors, tensors_of

__all__ = ["Finished", "Work", "digest_of", "in_model_order", "what_of"]


@dataclass(frozen=True)
class Finished:
    """A finished decoder layer, as the journal has it.

    types     msModelSlim's type of every tensor of its file; bytes: how many that has
    figures   of its quantized linears; floats: linears that stayed float
    smoothed  sources that were smoothed; said: "kv" and "attention" where such scales are among the tensors
    """

    types: dict[str, str]
    bytes: int
    figures: list[LayerFigures]
    floats: list[str]
    smoothed: list[str]
    said: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, content: dict[str, Any]) -> Finished:
        """What ``to_json`` gave."""
        return cls(**{**content, "figures": [LayerFigures(**figures) for figures in content["figures"]]})


class Work:
    """The finished layers of one run, in ``stage``. norms_for: msModelSlim's variant whose norm tensors are wanted, or ""."""

    def __init__(self, stage: Staging, what: dict[str, Any], norms_for: str) -> None:
        self.stage, self.norms_for = stage, norms_for
        self.resumed = stage.begin(what)
        self.layers: list[Finished] = []
        while self.resumed and (found := stage.journal.verdicts(len(self.layers) + 1)) is not None:
            layer = Finished.of(found[0])
            if not _has_size(self._path(len(self.layers)), layer.bytes):
                break
            self.layers.append(layer)

    @property
    def place(self) -> Path:
        """The folder for files."""
        return self.stage.model

    def _path(self, index: int) -> Path:
        return self.place / f"layer-{index:05d}.safetensors"

    def chosen(self, choose: Callable[[], list[str]]) -> frozenset[str]:
        """What was chosen once for the whole run, before its first layer."""
        found = self.stage.journal.verdicts(0) if self.resumed else None
        if found is None:
            found = choose()
            self.stage.journal.entry(0, found)
        return frozenset(found)

    def add(self, made: Made, figures: list[LayerFigures], smoothed: Iterable[str], sync_inputs: Callable[[], None]) -> Finished:
        """Write a layer's file, bring it and what the next layer gets to the disk, and say so in the journal."""
        tensors, types = tensors_of(made)
        norms, norm_types = extra_tensors(made, self.norms_for)
        own = {name: to_torch(array) for name, array in tensors.items()}
        own |= {name: to_torch(array).clone() for name, array in norms.items()}  # copies, where the library wants no shared memory
        said = [word for word, found in (("kv", made.kv_cache), ("attention", made.attention)) if found]
        return self.finish(own, {**types, **norm_types}, figures, made.float_names, smoothed, said, sync_inputs)

    def finish(
        self,
        tensors: Mapping[str, Any],
        types: Mapping[str, str],
        figures: list[LayerFigures],
        floats: Iterable[str],
        smoothed: Iterable[str],
        said: list[str],
        sync_inputs: Callable[[], None],
        metadata: dict[str, str] | None = None,
    ) -> Finished:
        """Write these torch ``tensors`` as the next layer's file, sync, and say so in the journal; metadata: the file's own."""
        path = self._path(len(self.layers))
        save_file(dict(tensors), os.fspath(path), metadata)
        sync(path)
        sync_inputs()
        sync(self.place)
        finished = Finished(dict(types), path.stat().st_size, figures, list(floats), list(smoothed), said)
        self.layers.append(finished)
        journal = self.stage.journal
        journal.entry(len(self.layers), [finished.to_json()])
        journal.synced(journal.end)
        return finished

    def checkpoint(self, source: Checkpoint, blocks: Blocks, outside: Any) -> Checkpoint:
        """All finished layers and what ``source`` has outside of the layers of ``blocks``, as one checkpoint.

        outside    as ``LayerRun.outside`` gives it
        """
        norms, norm_types = extra_tensors(outside, self.norms_for)
        openers, types = self.gather(source, blocks, norms)
        types |= norm_types
        said = {word for layer in self.layers for word in layer.said}
        documents = {
            DESCRIPTION: description_of(outside.cfg, types, "kv" in said, "attention" in said),
            "config.json": config_of(outside.model),
        }
        found = Spelled(self.location(openers, documents), bool(self.norms_for))
        in_model_order(found, blocks, types)
        return found

    def gather(
        self, source: Checkpoint, blocks: Blocks, more: Mapping[str, Array]
    ) -> tuple[dict[str, Callable[[Path, int], StoredFile]], dict[str, str]]:
        """(what opens the files of all layers, of what ``source`` has outside of them, and of ``more`` tensors; the tensors' types)."""
        weights = blocks.weights
        assert weights is not None
        rest = [name for name in source.tensors if not name.startswith(f"{blocks.architecture.layers}.")]
        types = dict.fromkeys(rest, "FLOAT")
        cast = {name: weights.tensor(name) for name in rest if _is_cast(source.tensors[name], weights)}
        own = {**cast, **{name: to_torch(array).clone() for name, array in more.items()}}
        openers: dict[str, Callable[[Path, int], StoredFile]] = {}
        for number, file in enumerate(source.tensors.files):
            if names := [name for name in file.tensors if name in types and name not in own]:
                openers[f"source-{number:05d}.safetensors"] = _opener_of(file, names)
        for index, layer in enumerate(self.layers):
            openers[self._path(index).name] = SafetensorsFile
            types |= layer.types
        if own:
            save_file({name: tensor.contiguous() for name, tensor in own.items()}, os.fspath(self.place / "rest.safetensors"))
            openers["rest.safetensors"] = SafetensorsFile
        return openers, types

    def location(self, openers: Mapping[str, Callable[[Path, int], StoredFile]], documents: Mapping[str, Any]) -> Location:
        """The files as one folder, with ``documents``."""

        def opener(path: Path, number: int = 0) -> StoredFile:
            return openers[path.name](path, number)

        return _Gathered(self.place, (*openers, *documents), documents=documents, opener=opener)


def in_model_order(checkpoint: Checkpoint, blocks: Blocks, more: Iterable[str]) -> None:
    """Sort a checkpoint's tensors as the model has them, others as ``more`` has them."""
    order = {name: number for number, name in enumerate(dict.fromkeys([*blocks.model.state_dict(), *more]))}
    checkpoint.entries.sort(key=lambda entry: order[entry[1] if entry[0] == "plain" else f"{entry[1]}.weight"])


class _Gathered(Location):
    """All its weight files together, without an index."""

    def tensors(self, prefix: str = "") -> TensorSet:
        """Every file's tensors, in the order of ``names``."""
        return TensorSet([self.folder / name for name in self.names if name.endswith(".safetensors")], opener=self.opener)


class _Some:
    """Some tensors of a file (``StoredFile``)."""

    def __init__(self, file: StoredFile, names: Iterable[str], number: int) -> None:
        self._file, self.path, self.identity, self.metadata, self.exempt = file, file.path, file.identity, file.metadata, file.exempt
        self.tensors = TensorTable(number)
        for name in names:
            info = file.tensors[name]
            self.tensors.add(name, info.dtype, info.shape, info.begin, info.end)

    def tensor(self, name: str, info: TensorInfo | None = None) -> ArrayLike:
        """The tensor, unread. info: its own, if it is at hand."""
        return self._file.tensor(name)

    def unchanged(self) -> bool:
        """Whether the file on disk is still what was opened."""
        return self._file.unchanged()


def _opener_of(file: StoredFile, names: list[str]) -> Callable[[Path, int], StoredFile]:
    return lambda path, number: _Some(file, names, number)


def _is_cast(info: TensorInfo, weights: Weights) -> bool:
    """Whether transformers would have loaded it in another dtype."""
    return FLOAT_DTYPES.get(info.dtype, weights.dtype) != weights.dtype


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def what_of(source: Checkpoint, recipe: Recipe, device: str, **options: Any) -> dict[str, Any]:
    """All that what is made of the model in ``source`` depends on: a run goes on only with the work of one that had the same."""
    said = {"recipe": recipe.model_dump(exclude_defaults=True), "device": device, "torch": torch.__version__, **options}
    return {"version": version(), "options": said, "files": [asdict(file.identity) for file in source.tensors.files]}


def digest_of(samples: Iterable[Any]) -> str:
    """XXH3-128 of calibration samples."""
    digest = xxhash.xxh3_128()
    for sample in samples:
        for tensor in sample:
            array: Array = tensor.numpy()
            digest.update(f"{array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
