"""MindSpore's records made by plain code that shares nothing with ours, sound ones and others."""

from __future__ import annotations

import zlib
from collections.abc import Sequence


def number(value: int) -> bytes:
    """A varint."""
    head = b""
    while value >= 128:
        head, value = head + bytes([value % 128 + 128]), value // 128
    return head + bytes([value])


def field(key: int, content: bytes) -> bytes:
    """A field of bytes. key: its number."""
    return number(key * 8 + 2) + number(len(content)) + content


def dims_of(shape: Sequence[int]) -> bytes:
    return b"".join(b"\x08" + number(dim) for dim in shape)


def tensor(type: str, shape: Sequence[int], content: bytes) -> bytes:
    """A TensorProto."""
    return dims_of(shape) + field(2, type.encode()) + field(3, content)


def value(name: str, proto: bytes) -> bytes:
    """A record around a TensorProto."""
    return field(1, field(1, name.encode()) + field(2, proto))


def record(name: str, type: str, shape: Sequence[int], content: bytes) -> bytes:
    return value(name, tensor(type, shape, content))


def with_crc(content: bytes) -> bytes:
    return content + b"crc_num" + zlib.crc32(content).to_bytes(10, "big")
