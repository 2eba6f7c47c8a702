"""Protocol Buffers' wire format, read by position and written: fields, whatever message they belong to.

Defined by "Encoding" (protobuf.dev). A message is a run of fields. A field is a key, ``number << 3 | wire type``, and a value: a varint
(type 0), 8 bytes (1), a length and so many bytes (2: text, bytes, messages, packed numbers), or 4 bytes (5). Types 3 and 4 were groups,
which nothing writes any more. A varint has 7 bits a byte, the lowest first, the top bit set in all bytes but the last; of 64 bits it
has ten at most. Nothing says where a message ends but the length around it, or the end of the file.

The reader holds one window of a few KB. What has a length is told as its place and skipped, so that gigabytes cost a seek.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .errors import UnreadableError
from .files import Readable

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}
_MAX_VARINT = 10
_WINDOW = 4096


class Field(NamedTuple):
    """One field of a message. value: the number of a varint, else the byte where its content begins; end: the byte after the field."""

    number: int
    wire: int
    value: int
    end: int


class WireReader:
    """The fields of messages in a file.

    raises   UnreadableError for a field that is cut off or leaves its message, a number of more than 64 bits, and a wire type that
             nothing has; each with the byte
    """

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._window, self._start = b"", 0

    def fields(self, begin: int, end: int) -> Iterator[Field]:
        """The fields of the message that fills bytes ``begin`` to ``end``."""
        while begin < end:
            field = self.field(begin, end)
            yield field
            begin = field.end

    def field(self, position: int, end: int) -> Field:
        """The field at ``position`` in a message that ends at ``end``."""
        key, value = self.varint(position, end)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise self._bad(position, f"has a field of the number {number}, which is none")
        if wire == VARINT:
            return Field(number, wire, *self.varint(value, end))
        if wire == LENGTH:
            length, value = self.varint(value, end)
        elif wire in _FIXED:
            length = _FIXED[wire]
        else:
            raise self._bad(position, f"has a field of the wire type {wire}, wanted 0, 1, 2 or 5")
        if length > end - value:
            cut = "it is truncated: copy it again" if end == self._file.size else "it contradicts itself"
            raise self._bad(position, f"has a field of {length} bytes where {end - value} are left; {cut}")
        return Field(number, wire, value, value + length)

    def varint(self, position: int, end: int) -> tuple[int, int]:
        """The number at ``position``, which must end before ``end``, and the byte after it."""
        at = position - self._start
        if position < end and 0 <= at < len(self._window) and self._window[at] < 0x80:  # most are short
            return self._window[at], position + 1
        value = shift = 0
        for at in range(position, min(position + _MAX_VARINT, end)):
            byte = self._byte(at)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64:
                    break
                return value, at + 1
            shift += 7
        else:
            if end - position < _MAX_VARINT:
                cut = "truncated: copy it again" if end == self._file.size else "damaged"
                raise self._bad(position, f"ends within a number; it is {cut}")
        raise self._bad(position, "has a number of more than 64 bits")

    def bytes_at(self, begin: int, end: int) -> bytes:
        """Bytes ``begin`` to ``end``: few of them."""
        at = begin - self._start
        if at < 0 or end - self._start > len(self._window):
            if end - begin > _WINDOW:
                return bytes(self._file.read(begin, end - begin))
            self._load(begin)
            at = 0
        return self._window[at : at + end - begin]

    def _byte(self, position: int) -> int:
        at = position - self._start
        if not 0 <= at < len(self._window):
            self._load(position)
            at = 0
        return self._window[at]

    def _load(self, position: int) -> None:
        self._window = bytes(self._file.read(position, min(_WINDOW, self._file.size - position)))
        self._start = position

    def _bad(self, position: int, what: str) -> UnreadableError:
        return UnreadableError(f"{self._file.path.name}: at byte {position} it {what}")


def varint(number: int) -> bytes:
    """A number that is not negative."""
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def length_key(number: int, length: int) -> bytes:
    """What stands before ``length`` bytes of content of the field ``number``."""
    return varint(number << 3 | LENGTH) + varint(length)


def bytes_field(number: int, content: bytes) -> bytes:
    """A field of bytes, text or a message."""
    return length_key(number, len(content)) + content


def varint_field(number: int, value: int) -> bytes:
    """A field of one number."""
    return varint(number << 3 | VARINT) + varint(value)
