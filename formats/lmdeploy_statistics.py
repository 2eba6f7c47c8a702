"""What LMDeploy's ``lite calibrate`` leaves in its work folder: statistics of a model's activations, one file for each kind.

Defined by LMDeploy (PyPI ``lmdeploy`` 0.1.0 to 0.18.0, ``lmdeploy/lite/apis/calibrate.py``). Each file is what ``torch.save`` makes of
``{statistic: {name: float16 tensor}}``:

======================  ================================  ==============================================================
file                    statistics                        names, and a tensor's axes
======================  ================================  ==============================================================
``key_stats.pth``,      ``max``, ``min``, ``absmax``      ``model.layers.<i>``: [kv heads, head size], over all tokens;
``value_stats.pth``                                       keys as the cache has them, after rotary embedding
``inputs_stats.pth``    and ``mean``, ``absmean``         every linear of the decoder layers: [in]
``outputs_stats.pth``   as for inputs                     every norm, the last one too, then those linears: [out]
======================  ================================  ==============================================================

Facts:

1. The order of names means something: LMDeploy numbers layers by it, not by what they are called.
2. The two files of the cache are written until 0.6.2. Files of other statistics (``ratios`` of 0.4.2 and later) hold no tensors there.
3. A twin of each file with the ending ``.safetensors`` is ours: tensors ``<statistic>.<name>``, the order of names in its metadata as JSON.

A ``.pth`` is a zip without compression whose ``data.pkl`` names the other members. The pickle is read as a tree (``pickle_tree``): nothing
that it says is run, and torch is not needed.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UnreadableError
from .files import ReadableFile
from .ir import Array
from .pickle_tree import Call, Name, PickleFile, Reference
from .safetensors_file import SafetensorsFile

__all__ = ["FILES", "MOMENTS", "RANGES", "Statistics", "find_statistics", "read_statistics", "twin_tensors"]

FILES = ("inputs_stats", "outputs_stats", "key_stats", "value_stats")
"""Names of the files, without ending."""
RANGES = ("max", "min", "absmax")
"""Statistics of keys and values."""
MOMENTS = ("max", "min", "mean", "absmax", "absmean")
"""Statistics of the inputs and outputs of linears."""

Statistics = dict[str, dict[str, Array]]
"""{statistic: {name: float16}}, names in the file's order."""

ORDER = "order"
"""The key of a twin's metadata: names in their order, as JSON."""
LARGEST = 1 << 30
"""Bytes of a file: statistics of the largest models take some hundred MB."""
_LOCAL_HEADER = 30

_REBUILD, _HALF, _ORDERED = "torch._utils._rebuild_tensor_v2", "torch.HalfStorage", "collections.OrderedDict"
_NAMES = frozenset({_REBUILD, _ORDERED, _HALF})


def find_statistics(folder: Path, name: str) -> Path:
    """The file called ``name`` in a work folder: LMDeploy's own, else our twin.

    :raises UnreadableError: there is neither
    """
    for ending in (".pth", ".safetensors"):
        if (path := folder / f"{name}{ending}").is_file():
            return path
    raise UnreadableError(
        f"{folder}: has no {name}.pth (nor .safetensors); run `weighbridge lmdeploy calibrate` with this --work-dir first"
    )


def read_statistics(path: Path, statistics: tuple[str, ...]) -> Statistics:
    """Those ``statistics`` of a ``.pth`` file or a twin, every tensor finite or not, as float16 copies.

    :raises UnreadableError: the file is damaged, holds other than float16 tensors, or lacks one of the statistics
    """
    found = _of_twin(path) if path.suffix == ".safetensors" else _of_zip(path)
    if missing := [kind for kind in statistics if not found.get(kind)]:
        raise UnreadableError(f"{path.name}: has no statistic {missing[0]!r}; wanted {', '.join(statistics)}: calibrate again")
    names = list(found[statistics[0]])
    for kind in statistics:
        if list(found[kind]) != names:
            raise UnreadableError(f"{path.name}: {kind!r} and {statistics[0]!r} are of other layers, or in another order; calibrate again")
    return {kind: found[kind] for kind in statistics}


def twin_tensors(statistics: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """(tensors, metadata) of the twin of a file that holds ``statistics``, of any library's tensors."""
    tensors = {f"{kind}.{name}": tensor for kind, by_name in statistics.items() for name, tensor in by_name.items()}
    return tensors, {"format": "pt", ORDER: json.dumps(list(next(iter(statistics.values()), {})))}


def _of_twin(path: Path) -> Statistics:
    file = SafetensorsFile(path, 0)
    try:
        order = json.loads(file.metadata.get(ORDER, ""))
    except ValueError:
        order = None
    if not isinstance(order, list) or not all(isinstance(name, str) for name in order) or len(set(order)) != len(order):
        raise UnreadableError(f"{path.name}: its metadata have no list {ORDER!r} of layers, so it is no file of statistics")
    found: Statistics = {kind: {} for kind in MOMENTS}
    for kind, by_name in found.items():
        for name in order:
            if (tensor := f"{kind}.{name}") in file.tensors:
                if file.tensors[tensor].dtype != "F16":
                    raise UnreadableError(f"{path.name}: {tensor} is {file.tensors[tensor].dtype}, and F16 was wanted")
                by_name[name] = np.array(file.tensor(tensor))
    return found


@dataclass(frozen=True)
class _Member:
    """Bytes of a file inside the zip: where they begin, and how many there are."""

    begin: int
    length: int


def _of_zip(path: Path) -> Statistics:
    file = ReadableFile(path)
    if file.size > LARGEST:
        raise UnreadableError(f"{path.name}: is of {file.size} bytes, more than statistics need")
    members = _members(file)
    if "data.pkl" not in members:
        raise UnreadableError(f"{path.name}: has no data.pkl, so torch.save did not write it")
    begin, length = members["data.pkl"].begin, members["data.pkl"].length
    tree, _ = PickleFile(file, _NAMES).read(begin, begin + length)
    if not isinstance(tree, dict):
        raise UnreadableError(f"{path.name}: holds a {type(tree).__name__}, and a dictionary of statistics was wanted")
    found: Statistics = {}
    for kind in MOMENTS:
        by_name = tree.get(kind, {})
        if not isinstance(by_name, dict):
            raise UnreadableError(f"{path.name}: {kind!r} holds a {type(by_name).__name__}, and tensors by layer were wanted")
        found[kind] = {name: _tensor(file, members, f"{path.name}: {kind} of {name}", value) for name, value in by_name.items()}
    return found


def _members(file: ReadableFile) -> dict[str, _Member]:
    """What the zip holds, by the name inside its one folder."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise UnreadableError(f"{file.path.name}: is no zip as torch.save writes since 1.6 ({error})") from None
    found: dict[str, _Member] = {}
    for entry in listed:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise UnreadableError(f"{file.path.name}: {entry.filename[:80]!r} is compressed or encrypted, as torch.save never writes")
        if not 0 <= entry.header_offset <= file.size - _LOCAL_HEADER:
            raise UnreadableError(f"{file.path.name}: {entry.filename[:80]!r} begins outside of the file; it is damaged")
        header = file.read(entry.header_offset, _LOCAL_HEADER)
        begin = entry.header_offset + _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if begin + entry.file_size > file.size:
            raise UnreadableError(f"{file.path.name}: {entry.filename[:80]!r} ends outside of the file; it is truncated: copy it again")
        name = entry.filename.partition("/")[2]
        if name in found:
            raise UnreadableError(f"{file.path.name}: has {name[:80]!r} twice")
        found[name] = _Member(begin, entry.file_size)
    return found


def _tensor(file: ReadableFile, members: Mapping[str, _Member], where: str, value: Any) -> Array:
    """What ``_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`` would make, if it is plain and contiguous."""
    if not isinstance(value, Call) or value.name != _REBUILD or len(value.arguments) not in {6, 7}:
        raise UnreadableError(f"{where} is no tensor")
    storage, offset, shape, stride = value.arguments[:4]
    what = storage.what if isinstance(storage, Reference) else None
    if not isinstance(what, tuple) or len(what) != 5 or what[0] != "storage" or not isinstance(what[1], Name):
        raise UnreadableError(f"{where} has no storage as torch.save writes it")
    if what[1].path != _HALF:
        raise UnreadableError(f"{where} is of {what[1].path}, and float16 was wanted: LMDeploy's statistics are float16")
    whole = all(type(one) is tuple and all(type(item) is int and 0 <= item <= LARGEST for item in one) for one in (shape, stride))
    if not whole or type(offset) is not int or not 1 <= len(shape) <= 2 or len(stride) != len(shape):
        raise UnreadableError(f"{where} is of a shape that no statistic has")
    steps = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if tuple(stride) != steps and math.prod(shape) > 1:
        raise UnreadableError(f"{where} is not contiguous, as LMDeploy's are")
    member, size = members.get(f"data/{what[2]}"), 2 * math.prod(shape)
    if member is None or offset < 0 or 2 * offset + size > member.length:
        raise UnreadableError(f"{where} wants {size} bytes that the file does not have; it is damaged")
    return np.frombuffer(file.read(member.begin + 2 * offset, size), "<f2").reshape(shape)
