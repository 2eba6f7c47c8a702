"""CRC-32 as zlib has it (polynomial 0xEDB88320, reflected), of files, and of parts put together.

The CRC of two runs of bytes follows from theirs: the first, multiplied by x to the power of the bits of the second, plus the second
(zlib's ``crc32_combine``; polynomials over GF(2), whose lowest power is the highest bit here).
"""

from __future__ import annotations

import functools
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .files import Readable

POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_PIECE = 1 << 20
"""Bytes that are read and summed while they are in the cache."""


def _product(a: int, b: int) -> int:
    """``a * b`` modulo the polynomial."""
    found = 0
    while a:
        if a & _ONE:
            found ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return found


@functools.lru_cache(maxsize=256)
def _shift(length: int) -> int:
    """x to the power of the bits of ``length`` bytes."""
    power, found = _ONE >> 8, _ONE
    while length:
        if length & 1:
            found = _product(power, found)
        power, length = _product(power, power), length >> 1
    return found


def combine(first: int, second: int, length: int) -> int:
    """The CRC of bytes whose CRC is ``first``, followed by ``length`` bytes whose CRC is ``second``."""
    return _product(_shift(length), first) ^ second


def of_zeros(length: int) -> int:
    """The CRC of so many zero bytes, however many."""
    found = bits = 0
    for digit in f"{length:b}":
        found, bits = combine(found, found, bits), 2 * bits
        if digit == "1":
            found, bits = combine(found, zlib.crc32(b"\0"), 1), bits + 1
    return found


def of_range(file: Readable, begin: int, end: int, start: int = 0, jobs: int = 1) -> int:
    """The CRC of bytes ``begin`` to ``end``, going on from ``start``; by so many threads, of which each holds 1 MiB."""
    jobs = max(1, min(jobs, (end - begin) // (8 * _PIECE)))
    if jobs == 1:
        return _sum(file, begin, end, start)
    bounds = [begin + (end - begin) * number // jobs for number in range(jobs + 1)]
    with ThreadPoolExecutor(jobs) as pool:
        for low, high, found in zip(bounds, bounds[1:], pool.map(_sum, [file] * jobs, bounds, bounds[1:]), strict=False):
            start = combine(start, found, high - low)
    return start


def _sum(file: Readable, begin: int, end: int, start: int = 0) -> int:
    buffer = memoryview(np.empty(min(_PIECE, end - begin), dtype=np.uint8))
    with file.reading() as read:
        for position in range(begin, end, _PIECE):
            part = buffer[: end - position]
            read(part, position)
            start = zlib.crc32(part, start)
    return start
