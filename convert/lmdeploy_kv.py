"""Scales of TurboMind's int8 KV cache from calibration statistics, as LMDeploy's ``lite kv_qparams`` makes them, byte for byte.

A layer's cache has one scale and one middle for all keys of a rank, and one of each for its values:

==========  =====================================================  ============================================================
            numbers                                                ``layers.<i>.past_kv_scale.<rank>.weight``, float32
==========  =====================================================  ============================================================
asymmetric  ``scale = (max - min) / 255``, ``zp = (max + min) / 2``  keys' scale and zp, values' scale and zp
symmetric   ``scale = absmax / 127``                               keys' scale, values' scale
==========  =====================================================  ============================================================

1. The arithmetic is float16's, each step rounded, and the result widened: float32 arithmetic gives other bytes.
2. ``zp`` is a real middle of the range, not a code. The engine stores ``round((x - zp) / scale) + 128`` as a byte.
3. A rank has the heads of its part, in order; the heads must divide.
4. The engines up to 0.3 read four numbers, whatever the file: they cannot use a symmetric one. From 0.4 on they find the scales of every
   token while they run, and read no file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from formats.errors import RefusedError, UnreadableError, UsageError
from formats.ir import Array
from formats.lmdeploy_statistics import RANGES, Statistics, find_statistics, read_statistics

from .lmdeploy_config import CONFIG, Engine, file_name
from .replacing import replace_files

__all__ = ["KvParameters", "KvScales", "kv_parameters", "kv_qparams"]

_LEVELS = 255
_LARGEST_CODE = 127


@dataclass(frozen=True)
class KvParameters:
    """The numbers of one layer's cache on one rank; a middle is None where the scales are symmetric."""

    layer: int
    rank: int
    key_scale: float
    key_middle: float | None
    value_scale: float
    value_middle: float | None

    @property
    def numbers(self) -> tuple[float, ...]:
        """In the file's order."""
        return tuple(one for one in (self.key_scale, self.key_middle, self.value_scale, self.value_middle) if one is not None)

    def __str__(self) -> str:
        """The line that LMDeploy prints."""
        start = f"Layer {self.layer} MP {self.rank} qparam: " + ("" if self.key_middle is None else "\t")
        return start + " \t".join(map(str, self.numbers))

    @property
    def file(self) -> tuple[str, bytes]:
        """Its name and content."""
        return file_name(self.layer, self.rank), np.array(self.numbers, "<f4").tobytes()


@dataclass(frozen=True)
class KvScales:
    """What was written, and what a user should know of it."""

    folder: Path
    parameters: tuple[KvParameters, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"folder": os.fspath(self.folder), "parameters": [asdict(one) for one in self.parameters], "notes": list(self.notes)}


def kv_qparams(
    work_dir: str | os.PathLike[str], turbomind_dir: str | os.PathLike[str], *, kv_sym: bool = False, num_tp: int = 1
) -> KvScales:
    """Write the scales of every layer and rank beside a workspace's weights, from ``key_stats`` and ``value_stats`` in ``work_dir``.

    Files of that name are replaced, all or none.

    :raises UsageError: no such folder, or ``num_tp`` does not divide the heads or contradicts the workspace
    :raises UnreadableError: statistics are missing, damaged, not finite, or their layers out of order
    :raises RefusedError: a scale would be 0
    """
    folder = Path(turbomind_dir)
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder; name the workspace's weights, as workspace/triton_models/weights")
    if num_tp < 1:
        raise UsageError(f"--num-tp {num_tp}: wanted a whole number from 1")
    keys, values = (_ranges(Path(work_dir), name) for name in ("key_stats", "value_stats"))
    parameters = tuple(kv_parameters(keys, values, kv_sym=kv_sym, num_tp=num_tp))
    layers = parameters[-1].layer + 1
    _check_workspace(folder, layers, num_tp)
    replace_files(folder, dict(one.file for one in parameters))
    notes = []
    if kv_sym:
        notes.append(
            "symmetric scales are 2 numbers a file, and TurboMind up to 0.3 reads 4: it cannot start with them; leave out --kv-sym"
        )
    notes += [
        f"{path.name}: is of a rank or layer that this model has not, and was left there"
        for path in sorted(folder.glob("layers.*.past_kv_scale.*.weight"))
        if path.name not in {one.file[0] for one in parameters}
    ]
    return KvScales(folder, parameters, tuple(notes))


def _ranges(work_dir: Path, name: str) -> Statistics:
    """The statistics of every layer's keys or values, [kv heads, head size], layers in order."""
    if not work_dir.is_dir():
        raise UsageError(f"{work_dir}: there is no such folder; name the one that `weighbridge lmdeploy calibrate` wrote")
    path = find_statistics(work_dir, name)
    found = read_statistics(path, RANGES)
    for place, layer in enumerate(found["max"]):
        number = re.search(r"\.(\d{1,6})$", layer)
        if number is None or int(number[1]) != place:
            raise UnreadableError(
                f"{path.name}: has {layer[:80]!r} as its layer {place}, and layers were wanted in order, from 0; LMDeploy would write "
                f"it as layer {place}: calibrate again"
            )
        for kind in RANGES:
            array = found[kind][layer]
            if array.ndim != 2 or array.shape != found["max"][layer].shape or not array.size:
                raise UnreadableError(f"{path.name}: {kind} of {layer} is {list(array.shape)}, and [kv heads, head size] was wanted")
            if not np.isfinite(array).all():
                raise UnreadableError(
                    f"{path.name}: {kind} of {layer} has NaN or an infinity, as where float16 overflowed; look at the data"
                )
    return found


def kv_parameters(keys: Statistics, values: Statistics, *, kv_sym: bool = False, num_tp: int = 1) -> list[KvParameters]:
    """The numbers of every layer and rank: layers in the order of ``keys``, for each its ranks.

    keys, values    {statistic: {layer: [kv heads, head size] float16}}
    """
    if len(keys["max"]) != len(values["max"]):
        raise UnreadableError(f"key_stats has {len(keys['max'])} layers and value_stats {len(values['max'])}; calibrate again")
    found = []
    for number, layers in enumerate(zip(keys["max"], values["max"], strict=True)):
        parts = [_by_rank(tensors, layer, num_tp) for tensors, layer in zip((keys, values), layers, strict=True)]
        for rank, (key, value) in enumerate(zip(*parts, strict=True)):
            where = f"layer {number}, rank {rank}"
            key_scale, key_middle = _scale(key, kv_sym, f"{where}: keys")
            value_scale, value_middle = _scale(value, kv_sym, f"{where}: values")
            found.append(KvParameters(number, rank, key_scale, key_middle, value_scale, value_middle))
    return found


def _by_rank(tensors: Statistics, layer: str, num_tp: int) -> list[dict[str, Array]]:
    """The statistics of a layer's heads on each rank."""
    heads = tensors["max"][layer].shape[0]
    if heads % num_tp:
        raise UsageError(f"--num-tp {num_tp}: {layer} has {heads} KV heads, which {num_tp} ranks cannot share equally; choose a divisor")
    width = heads // num_tp
    return [{kind: tensors[kind][layer][rank * width : (rank + 1) * width] for kind in RANGES} for rank in range(num_tp)]


def _scale(part: Mapping[str, Array], symmetric: bool, where: str) -> tuple[float, float | None]:
    """Scale and middle of one rank's [heads, head size], every step in float16."""
    half = np.float16
    with np.errstate(over="ignore", invalid="ignore"):
        if symmetric:
            scale, middle = half(part["absmax"].max() / half(_LARGEST_CODE)), None
        else:
            most, least = part["max"].max(), part["min"].min()
            scale, middle = half(half(most - least) / half(_LEVELS)), half(half(most + least) / half(2))
    if not np.isfinite(scale) or (middle is not None and not np.isfinite(middle)):
        raise UnreadableError(f"{where} span more than float16 holds, so there is no scale; look at the calibration data and model")
    if scale <= 0:
        raise RefusedError(f"{where} have a scale of {scale}, by which the engine divides: did calibration see more than one constant?")
    return float(scale), None if middle is None else float(middle)


def _check_workspace(folder: Path, layers: int, num_tp: int) -> None:
    """UsageError where a workspace's config.ini, if there is one, is of another model or another number of ranks."""
    if not (folder / CONFIG).is_file():
        return
    said = Engine.read(folder / CONFIG)
    for key, found, option in (("tensor_para_size", num_tp, "--num-tp"), ("num_layer", layers, "layers calibrated")):
        if (wanted := said.whole(key)) is not None and wanted != found:
            raise UsageError(f"{folder / CONFIG}: {key} is {wanted}, and {option} is {found}; they must be the same")
