"""Tensors that lie in a file in pieces, as if they lay in one: what is between the pieces is cut out of the file's addresses."""

from __future__ import annotations

import bisect
import contextlib
from array import array
from collections.abc import Iterator

from .files import Read, Readable


class Seams:
    """Runs of bytes of a file that are passed over, in order. An *address* counts the others; without seams it is the byte itself."""

    def __init__(self) -> None:
        self._addresses, self._totals = array("q"), array("q")
        self.total = 0
        """Bytes passed over."""

    def __len__(self) -> int:
        return len(self._addresses)

    def add(self, begin: int, end: int) -> None:
        """Pass over bytes ``begin`` to ``end``, which come after all others that are."""
        self._addresses.append(begin - self.total)
        self.total += end - begin
        self._totals.append(self.total)

    def pieces(self, address: int, length: int) -> Iterator[tuple[int, int]]:
        """Where ``length`` bytes from ``address`` lie: (byte, length) of each piece that lies in one."""
        if not self._addresses:
            yield address, length
            return
        number, stop = bisect.bisect_right(self._addresses, address), address + length
        while address < stop:
            end = stop if number == len(self._addresses) else min(stop, self._addresses[number])
            if end > address:
                yield address + (self._totals[number - 1] if number else 0), end - address
            address, number = end, number + 1


class SeamlessFile(Readable):
    """A file by addresses."""

    def __init__(self, file: Readable, seams: Seams) -> None:
        self._file, self._seams = file, seams
        self.path, self.size = file.path, file.size - seams.total

    @contextlib.contextmanager
    def reading(self) -> Iterator[Read]:
        """Reads every piece with the file's own reader."""
        with self._file.reading() as read:

            def read_pieces(view: memoryview, address: int) -> None:
                done = 0
                for begin, length in self._seams.pieces(address, len(view)):
                    read(view[done : done + length], begin)
                    done += length

            yield read_pieces
