"""``doctor``: what is wrong with a folder, and a new folder in which what can be mended without loss is mended.

Weights are never changed: tensors go over byte for byte, and are compared when the new folder is whole. What is only likely, and
what was lost when the folder was written, is reported and left.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from formats.checkpoint import Location
from formats.errors import RefusedError, UnreadableError, WeighbridgeError
from formats.ir import Array, ArrayLike
from formats.safetensors_file import DTYPES, NAMES, TensorInfo, nbytes
from formats.stored_tensor import raw_chunks

from .ailments import examine
from .folder import check_carried
from .outputs import write_all
from .patient import INSIDE, QUANTIZE, Ailment, Cure, Patient
from .staging import MODEL_FILES, staging
from .stored import safe_name

if TYPE_CHECKING:
    from formats.safetensors_file import StoredFile

_CHUNK = 1 << 24
_STALE = frozenset({"weighbridge.json"})
"""The certificate of a conversion says nothing of a folder that was mended since."""


@dataclass(frozen=True)
class Diagnosis:
    """What ``doctor`` found, and with ``fix`` what it mended.

    ailments    everything that is wrong with the folder; examined: layers whose zero points and shapes were looked at
    mended      those that the new folder no longer has; remaining: those that it still has (they were lost, or are a guess)
    """

    ailments: list[Ailment]
    examined: int
    mended: list[Ailment]
    remaining: list[Ailment]
    destination: str | None = None

    @property
    def healthy(self) -> bool:
        """Nothing is wrong (any more)."""
        return not self.remaining

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "healthy": self.healthy}


def doctor(path: str | os.PathLike[str], fix: str | os.PathLike[str] | None = None, *, overwrite: bool = False) -> Diagnosis:
    """What is wrong with an AWQ or GPTQ folder; with ``fix``, a new folder there without what can be mended without loss.

    fix      the folder to write, never the source; tensors are copied byte for byte, missing ones that the config implies are added
    raises   UnreadableError (not even headers can be read), RefusedError (fix: there is nothing to mend), DestinationError
    """
    location = Location.of(path)
    patient = examine(location)
    found = patient.ailments
    if fix is None:
        return Diagnosis(found, len(patient.layers), [], found)
    if not any(ailment.mendable for ailment in found):
        what = "nothing is wrong with it" if not found else "nothing that is wrong with it can be mended without loss"
        raise RefusedError(f"{location.folder.name}: {what}; no folder was written")
    added = sum(array.nbytes for array in patient.cure.tensors.values())
    size = sum(file.identity.size for file in patient.tensors.files) + added
    with staging(Path(fix), size, [location.folder], overwrite) as stage:
        stage.begin({"doctor": str(location.folder)})
        _write(patient, stage.model)
        after = examine(Location.of(stage.model))
        _confirm(patient, after)
    return Diagnosis(found, len(patient.layers), [item for item in found if item.mendable], after.ailments, str(fix))


def _write(patient: Patient, folder: Path) -> None:
    """The mended folder: weights, index, configs, and everything else of a model as it is."""
    cure, source = patient.cure, patient.location
    files = patient.tensors.files
    weights = {file.path.name for file in files}
    check_carried(source, [pattern for pattern in MODEL_FILES if pattern != "*.safetensors"])
    for name in source.names:
        carried = any(fnmatch.fnmatchcase(name, pattern) for pattern in MODEL_FILES) and not name.endswith(".safetensors")
        stale = name in _STALE or name.endswith((".safetensors.index.json", ".bin.index.json"))
        if carried and not stale and name not in weights and (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    homes = _homes(patient)
    for number, file in enumerate(files):
        _write_weights(file, folder, {name: cure.tensors[name] for name, home in homes.items() if home == number})
    _write_index(patient, folder)
    _write_configs(patient.config, cure, folder)


def _homes(patient: Patient) -> dict[str, int]:
    """The file that each added tensor goes into: its layer's."""
    return {name: patient.tensors[f"{name.rpartition('.')[0]}.qweight"].file for name in patient.cure.tensors}


def _write_configs(config: Mapping[str, Any] | None, cure: Cure, folder: Path) -> None:
    if config is not None and cure.inside is not None:
        _dump(folder / INSIDE, {**config, "quantization_config": cure.inside})
    if cure.beside is not None:
        _dump(folder / QUANTIZE, cure.beside)


def _dump(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(file: StoredFile, folder: Path, added: Mapping[str, Array]) -> None:
    """One weight file: a new header, the old tensors' bytes, the added tensors among those of their element size."""
    order = [*file.tensors, *added]
    if added:  # every tensor stays aligned to its element
        size = {**{name: info.dtype for name, info in file.tensors.items()}, **{name: NAMES[array.dtype] for name, array in added.items()}}
        order.sort(key=lambda name: -DTYPES[size[name]].itemsize if size[name] in DTYPES else -1)
    entries: dict[str, Any] = {"__metadata__": {**file.metadata, "format": "pt"}}
    position, begins = 0, {}
    for name in order:
        info = file.tensors.get(name)
        dtype, shape = (info.dtype, info.shape) if info is not None else (NAMES[added[name].dtype], added[name].shape)
        begins[name] = position
        position += nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begins[name], position]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with (folder / safe_name(file.path.name)).open("xb") as out:
        write_all(out.fileno(), len(text).to_bytes(8, "little") + text, 0)
        for name in order:
            _copy(out.fileno(), added[name] if name in added else file.tensor(name), 8 + len(text) + begins[name])


def _copy(fd: int, array: ArrayLike, offset: int) -> None:
    for start, data in raw_chunks(array, _CHUNK):
        write_all(fd, data, offset + start)


def _write_index(patient: Patient, folder: Path) -> None:
    """A true index of several shards; one file needs none."""
    files = patient.tensors.files
    if len(files) == 1:
        return
    homes = _homes(patient)
    places = {**{name: patient.tensors[name].file for name in patient.tensors}, **homes}
    total = patient.tensors.nbytes + sum(array.nbytes for array in patient.cure.tensors.values())
    weight_map = {name: safe_name(files[place].path.name) for name, place in sorted(places.items())}
    stem = safe_name(files[0].path.name).rsplit("-", 3)[0]
    _dump(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _confirm(before: Patient, after: Patient) -> None:
    """The new folder has every old tensor byte for byte, the added ones, and none of the ailments that were mended."""
    wanted: dict[str, ArrayLike] = {**{name: before.tensors.tensor(name) for name in before.tensors}, **before.cure.tensors}
    if set(wanted) != set(after.tensors):
        raise WeighbridgeError(f"{before.location.folder.name}: the mended folder lists other tensors; nothing was written")
    for name, array in wanted.items():
        if not _same(before.tensors.get(name), array, after.tensors[name], after.tensors.tensor(name)):
            raise WeighbridgeError(f"{name}: is not what it was in the mended folder; nothing was written")
    left = [ailment for ailment in after.ailments if ailment.mendable]
    if left:
        raise WeighbridgeError(f"{before.location.folder.name}: is still ill when mended ({left[0]}); nothing was written")
    if changed := next((file.path.name for file in before.tensors.files if not file.unchanged()), None):
        raise UnreadableError(f"{changed}: changed while it was copied; run it again when nothing writes to it")


def _same(was: TensorInfo | None, wanted: ArrayLike, info: TensorInfo, found: ArrayLike) -> bool:
    if info.dtype != (NAMES[wanted.dtype] if was is None else was.dtype) or info.shape != (wanted.shape if was is None else was.shape):
        return False
    pairs = zip(raw_chunks(wanted, _CHUNK), raw_chunks(found, _CHUNK), strict=True)
    return all(np.array_equal(left, right) for (_, left), (_, right) in pairs)
