"""What the conversion engine asks of output files, whatever their container: where data go before there are any, and what is not data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from .files import Readable
from .safetensors_file import TensorTable


class Part(Protocol):
    """A file on the disk: its name, relative to the folder, its bytes, and the tensors of which it has (a part of) the data."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def tensors(self) -> Collection[str]: ...


class LaidOut(Protocol):
    """An output file of any container, or several that hold parts of each tensor, whose every byte but the data is known beforehand.

    name     of the (first) file, relative to the folder; size: of all of them, in bytes
    tensors  where each lies, in bytes of the file, or in whatever ``parts`` make of them together
    """

    @property
    def name(self) -> str: ...

    @property
    def tensors(self) -> TensorTable: ...

    @property
    def size(self) -> int: ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """What a reader of the finished file will find as its metadata."""
        ...

    @property
    def shared(self) -> Sequence[tuple[str, ...]]:
        """Tensors that lie in one place, so that their data must be equal."""
        ...

    @property
    def parts(self) -> Sequence[Part]:
        """The files; itself, if it is one."""
        ...

    def growing(self, path: Path) -> Readable:
        """What is written of it, by the offsets of ``tensors``; path: of the (first) file."""
        ...


class LaidOutFile(LaidOut, Protocol):
    """One output file."""

    def pieces(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """Where ``length`` bytes from an offset of ``tensors`` lie in the file: (byte, length) of each piece."""
        ...

    def heads(self) -> Iterator[tuple[int, bytes]]:
        """What is not data: (byte, content), written when all data are."""
        ...

    def sealed(self, data: Readable) -> LaidOutFile:
        """The same with what only the data say, such as a CRC. data: ``growing``'s, when all of them are written."""
        ...
