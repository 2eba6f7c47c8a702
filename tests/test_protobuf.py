"""Protocol Buffers' wire format: numbers and fields by the examples of its specification, and as any bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore_records import field as plain_field
from mindspore_records import number as plain_number

from formats.errors import UnreadableError
from formats.files import ReadableFile
from formats.protobuf import FIXED32, FIXED64, LENGTH, VARINT, Field, WireReader, bytes_field, length_key, varint, varint_field


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wire") / "message"


def reader(path: Path, content: bytes) -> WireReader:
    path.write_bytes(content)
    return WireReader(ReadableFile(path))


def test_the_examples_of_the_specification(path: Path) -> None:
    """``Test1 { a: 150 }``, ``Test2 { b: "testing" }`` and a packed ``f: [3, 270, 86942]``, as protobuf.dev spells them."""
    content = bytes.fromhex("089601 120774657374696e67 3206038e029ea705")
    wire = reader(path, content)
    first, second, third = wire.fields(0, len(content))
    assert first == Field(1, VARINT, 150, 3)
    assert second == Field(2, LENGTH, 5, 12)
    assert wire.bytes_at(second.value, second.end) == b"testing"
    position, packed = third.value, []
    while position < third.end:
        value, position = wire.varint(position, third.end)
        packed.append(value)
    assert packed == [3, 270, 86942]
    assert varint_field(1, 150) + bytes_field(2, b"testing") + length_key(6, 6) == content[:-6]


def test_fixed_fields_are_skipped(path: Path) -> None:
    content = b"\x09" + bytes(8) + b"\x15" + bytes(4) + b"\x18\x01"
    assert list(reader(path, content).fields(0, len(content))) == [
        Field(1, FIXED64, 1, 9),
        Field(2, FIXED32, 10, 14),
        Field(3, VARINT, 1, 16),
    ]


@given(st.integers(0, (1 << 64) - 1))
def test_numbers_of_64_bits(path: Path, value: int) -> None:
    assert varint(value) == plain_number(value)
    assert reader(path, b"\0" + varint(value)).varint(1, 1 + len(varint(value))) == (value, 1 + len(varint(value)))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 6000), max_size=12))
def test_fields_larger_than_a_window(path: Path, lengths: list[int]) -> None:
    contents = [bytes([n + 1]) * length for n, length in enumerate(lengths)]
    message = b"".join(plain_field(n + 1, content) for n, content in enumerate(contents))
    wire = reader(path, message)
    found = list(wire.fields(0, len(message)))
    assert [field.number for field in found] == list(range(1, len(lengths) + 1))
    assert [wire.bytes_at(field.value, field.end) for field in reversed(found)] == contents[::-1]


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=40))
def test_any_bytes_are_fields_or_one_error(path: Path, content: bytes) -> None:
    """Fields that are found cover the bytes, and lie in them."""
    wire, position = reader(path, content), 0
    try:
        for field in wire.fields(0, len(content)):
            assert position < field.end <= len(content)
            assert field.wire == VARINT or position < field.value <= field.end
            position = field.end
    except UnreadableError:
        return
    assert position == len(content)
