"""CRC-32 of parts and of files, against zlib's of the whole."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats import crc32
from formats.errors import UnreadableError
from formats.files import ReadableFile


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_parts_are_put_together(first: bytes, second: bytes) -> None:
    assert crc32.combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@given(st.integers(0, 5000))
def test_zeros(length: int) -> None:
    assert crc32.of_zeros(length) == zlib.crc32(bytes(length))


def test_more_zeros_than_memory_holds() -> None:
    """By two ways that have only ``combine`` in common: 2**62 is 2**61 twice, or one less and one."""
    assert crc32.of_zeros(1 << 62) == crc32.combine(crc32.of_zeros((1 << 62) - 1), zlib.crc32(b"\0"), 1)


@pytest.mark.parametrize("jobs", [1, 2, 3, 7])
@pytest.mark.parametrize("begin", [0, 12345])
def test_of_a_file(tmp_path: Path, jobs: int, begin: int) -> None:
    content = np.random.default_rng(3).integers(0, 256, (33 << 20) + 77, dtype=np.uint8).tobytes()
    (tmp_path / "data").write_bytes(content)
    file = ReadableFile(tmp_path / "data")
    end = len(content) - 5
    assert crc32.of_range(file, begin, end, zlib.crc32(b"before"), jobs) == zlib.crc32(content[begin:end], zlib.crc32(b"before"))
    assert crc32.of_range(file, 7, 7, 99, jobs) == 99
    with pytest.raises(UnreadableError, match="too early"):
        crc32.of_range(file, 0, len(content) + 1, 0, jobs)
