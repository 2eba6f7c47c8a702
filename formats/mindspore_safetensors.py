"""MindSpore's safetensors: the ordinary container, whose metadata say which tensors hold 4-bit codes, and a CRC of all.

Defined by MindSpore 2.7.1 and 2.10.0 (``save_checkpoint(format="safetensors")``, ``train/serialization.py``). Metadata:

=====================  =====================================================================================================
``format``             ``ms``
``<tensor>``           ``Int4``: the tensor, I8, holds two 4-bit codes a byte (``qint4x2``); its shape counts bytes
``crc_num``            decimal: zlib's CRC-32 of each name in UTF-8 and the tensor's bytes, in the order of the names (``crc_check``)
``remove_redundancy``  ``True`` or ``False``: whether copies of parameters are left out that another rank has
=====================  =====================================================================================================

1. MindSpore takes metadata of a tensor's name for its dtype, so that a tensor called ``format`` or ``crc_num`` cannot be loaded.
2. In the CRC a scalar of whole numbers counts as so many zero bytes (``bytes(array)``). A file with one below 0, or with bfloat16, can
   neither be saved with a CRC nor loaded with ``crc_check``.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from . import crc32
from .errors import RefusedError, UnreadableError
from .files import Readable
from .safetensors_file import DTYPES, OutputFile, SafetensorsFile, TensorInfo, lay_out

INT4 = "Int4"
KEYS = ("format", "crc_num", "remove_redundancy")
LOADED = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64")
"""Dtypes that MindSpore loads."""
_UNKNOWN = "9" * 10
"""Takes the place of a CRC, which has at most ten digits, until it is known."""


class MindSporeSafetensors(SafetensorsFile):
    """A safetensors file that MindSpore wrote; ``metadata`` say ``{name: "Int4"}`` of packed tensors.

    crc      what the file says its CRC is, or None
    raises   HeaderError; UnreadableError for metadata that contradict the tensors
    """

    def __init__(self, path: Path, number: int = 0) -> None:
        super().__init__(path, number)
        if self.metadata:
            self._check_metadata()
        text = self.metadata.get("crc_num")
        if text is not None and (not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) >> 32):
            raise UnreadableError(f"{path.name}: its crc_num is {text[:20]!r}, wanted a number of 32 bits")
        self.crc = None if text is None else int(text)

    def _check_metadata(self) -> None:
        for name, said in self.metadata.items():
            info = self.tensors.get(name)
            if info is not None and name in KEYS:
                raise UnreadableError(
                    f"{self.path.name}: a tensor is called {name!r}, as a key of the metadata is; MindSpore cannot load it"
                )
            if info is None and said != INT4:
                continue
            found = "is not there" if info is None else f"is {info.dtype}"
            if info is None or said != INT4 or info.dtype != "I8":
                raise UnreadableError(
                    f"{self.path.name}: its metadata say that tensor {name!r} is {said[:40]!r}, and it {found}; wanted Int4 in I8"
                )

    def check_crc(self, jobs: int = 1) -> None:
        """Read the whole file and compare its CRC with the one it holds; UnreadableError if they differ, or it holds none."""
        if self.crc is None:
            raise UnreadableError(f"{self.path.name}: holds no CRC to check; it was saved without crc_check")
        found = _crc(self.tensors, self._file, jobs)
        if found != self.crc:
            raise UnreadableError(
                f"{self.path.name}: its CRC is {found}, and {self.crc} is what it was saved with; it is damaged: copy it again"
            )


def _crc(tensors: Mapping[str, TensorInfo], data: Readable, jobs: int = 1) -> int:
    """MindSpore's CRC of names and data."""
    found = 0
    for name in sorted(tensors):
        info = tensors[name]
        found = zlib.crc32(name.encode(), found)
        if info.shape == () and DTYPES[info.dtype].kind in "iu":
            count = int.from_bytes(data.read(info.begin, info.nbytes), "little", signed=DTYPES[info.dtype].kind == "i")
            if count < 0:
                raise UnreadableError(
                    f"{data.path.name}: the scalar {name!r} is {count}, of which MindSpore makes no CRC; check it another way"
                )
            found = crc32.combine(found, crc32.of_zeros(count), count)
        else:
            found = crc32.of_range(data, info.begin, info.end, found, jobs)
    return found


@dataclass(frozen=True, slots=True)
class MindSporeSafetensorsOutput(OutputFile):
    """One that is laid out; its CRC comes when it is sealed."""

    def sealed(self, data: Readable) -> OutputFile:
        if "crc_num" not in self.metadata:
            return self
        return replace(self, metadata={**self.metadata, "crc_num": str(_crc(self.tensors, data))})


def lay_out_mindspore_safetensors(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], name: str, *, crc: bool = False
) -> MindSporeSafetensorsOutput:
    """Decide every byte but the data and the CRC of the file ``name``, from (name, dtype, shape); dtype may be "Int4".

    raises   RefusedError for what MindSpore would not load as it was
    """
    taken = list(tensors)
    for tensor, dtype, shape in taken:
        if tensor in KEYS:
            raise RefusedError(f"{tensor}: a tensor with the name of a key of the metadata, which MindSpore cannot load; rename it")
        if dtype not in LOADED and dtype != INT4:
            raise RefusedError(f"{tensor}: is {dtype}, which MindSpore cannot load; it takes {', '.join(LOADED)} and Int4")
        if crc and (dtype == "BF16" or (shape == () and DTYPES.get(dtype, DTYPES["I8"]).kind in "iu")):
            what = dtype if dtype == "BF16" else "a scalar of whole numbers"
            raise RefusedError(f"{tensor}: is {what}, of which MindSpore makes no CRC or a wrong one; write the file without")
    if not taken:
        raise RefusedError(f"{name}: would hold no tensor, which MindSpore does not load")
    metadata = {"format": "ms", **{tensor: INT4 for tensor, dtype, _ in taken if dtype == INT4}, **({"crc_num": _UNKNOWN} if crc else {})}
    stored = ((tensor, "I8" if dtype == INT4 else dtype, shape) for tensor, dtype, shape in taken)
    (file,) = lay_out(stored, 1 << 62, single_name=name, metadata=metadata)
    return MindSporeSafetensorsOutput(file.name, file.tensors, file.size, file.metadata)
