"""MindSpore's .ckpt files as we write them: byte for byte what the real one wrote, in order or in tiles."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore_records import record, with_crc
from places import failing, full

from convert.outputs import FileOutput
from formats.errors import DestinationError, RefusedError
from formats.mindspore_file import TYPES, MindSporeFile
from formats.mindspore_output import Entry, MindSporeOutput, Text, append_dict, entries_of, lay_out_checkpoint, save, stream
from formats.safetensors_file import DTYPES
from formats.workspace import Workspace

GOLDENS = FIXTURES / "mindspore"
MIB = 1 << 20

GOLDEN_LAYOUTS: dict[str, dict[str, Any]] = {
    "dtypes": {},
    "dtypes_async": {"by_rows": True},
    "chunk_bytes_4k": {"chunk_bytes": 4096, "crc": True},
    "chunk_np_4k": {"chunk_bytes": 4096, "by_rows": True},
    "empty_2d_async": {"by_rows": True},
    "names": {},
    "texts_crc": {"crc": True},
}

unhurried = settings(deadline=None, max_examples=100)


def streamed(file: MindSporeOutput, data: Callable[[str], Any]) -> bytes:
    return b"".join(map(bytes, stream(file, data)))


# As the real MindSpore writes.


@pytest.mark.parametrize("name", GOLDEN_LAYOUTS)
def test_a_golden_is_written_byte_for_byte(name: str) -> None:
    golden = GOLDENS / f"{name}.ckpt"
    file = MindSporeFile(golden)
    laid_out = lay_out_checkpoint(entries_of(file), "w.ckpt", **GOLDEN_LAYOUTS[name])
    assert laid_out.size == golden.stat().st_size
    assert streamed(laid_out, file.tensor) == golden.read_bytes()
    assert {key: (info.begin, info.end) for key, info in laid_out.tensors.items()} == {
        key: (info.begin, info.end) for key, info in file.tensors.items()
    }


def test_append_dict_is_spelled_as_it_does() -> None:
    saved = json.loads((GOLDENS / "texts_crc.expected.json").read_text("utf-8"))
    values = {"epoch": 7, "step": -(2**62), "lr": 0.1, "done": True, "note": saved["note"][2], "empty": "", "after": 3}
    more, numbers = append_dict(values)
    arrays = {"first": np.arange(6, dtype=np.float32).reshape(2, 3), "last": np.arange(4, dtype=np.int8), **numbers}
    before: list[Entry] = [("first", "F32", (2, 3)), Text("between", saved["between"][2]), ("last", "I8", (4,))]
    laid_out = lay_out_checkpoint([*before, *more], "w.ckpt", crc=True)
    assert streamed(laid_out, arrays.__getitem__) == (GOLDENS / "texts_crc.ckpt").read_bytes()
    with pytest.raises(RefusedError, match="large: 9223372036854775808 does not fit 64 bits"):
        append_dict({"large": 1 << 63})


@pytest.mark.parametrize("name", GOLDEN_LAYOUTS)
def test_tiles_in_any_order_make_the_same_file(tmp_path: Path, name: str) -> None:
    """Through the conversion engine's own output; the file is nothing until it is finished."""
    golden = MindSporeFile(GOLDENS / f"{name}.ckpt")
    output = FileOutput(tmp_path, lay_out_checkpoint(entries_of(golden), "w.ckpt", **GOLDEN_LAYOUTS[name]))
    output.make()
    tiles = []
    for key, info in golden.tensors.items():
        matrix = golden.array(key).reshape(-1, (info.shape or (1,))[-1])
        tiles += [
            (key, matrix[top : top + 7, left : left + 31], top, left)
            for top in range(0, len(matrix), 7)
            for left in range(0, matrix.shape[1], 31)
        ]
    for number in np.random.default_rng(4).permutation(len(tiles)):
        key, block, top, left = tiles[number]
        info = output.file.tensors[key]
        output.write(info, block, top, left)
        assert output.holds(info, block, top, left, Workspace())
        other = (np.ascontiguousarray(block).view(np.uint8) ^ 1).view(block.dtype)
        assert not output.holds(info, other, top, left, Workspace())
    assert output.path.read_bytes()[:1] == b"\0"
    growing = output.file.growing(output.path)
    assert all(growing.read(info.begin, info.nbytes) == golden.array(key).tobytes() for key, info in output.file.tensors.items())
    output.finish()
    assert output.path.read_bytes() == (GOLDENS / f"{name}.ckpt").read_bytes()


def test_the_crc_must_be_known_before_the_heads() -> None:
    laid_out = lay_out_checkpoint([("w", "I8", (3,))], "w.ckpt", crc=True)
    with pytest.raises(ValueError, match="its CRC is not known"):
        list(laid_out.heads())


# Against plain code, and read again.


@unhurried
@given(
    st.lists(
        st.tuples(st.sampled_from([type for type in sorted(TYPES) if type != "Complex64"]), st.lists(st.integers(1, 5), max_size=3)),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 60),
    st.booleans(),
)
def test_any_tensors_in_chunks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[str, list[int]]], chunk: int, crc: bool
) -> None:
    arrays, entries, plain = {}, [], b""
    for n, (type, shape) in enumerate(shapes):
        dtype = DTYPES[TYPES[type]]
        content = (np.arange(int(np.prod(shape)) * dtype.itemsize) * 29 % 253).astype(np.uint8)
        content = content & 1 if type == "Bool" else content
        arrays[f"t{n}"] = content.view(dtype).reshape(shape)
        entries.append((f"t{n}", "Int4" if type == "Int4" else TYPES[type], tuple(shape)))
        plain += b"".join(record(f"t{n}", type, shape, content[at : at + chunk].tobytes()) for at in range(0, content.size, chunk))
    laid_out = lay_out_checkpoint(entries, "w.ckpt", crc=crc, chunk_bytes=chunk)
    assert streamed(laid_out, arrays.__getitem__) == (with_crc(plain) if crc else plain)
    path = tmp_path_factory.getbasetemp() / "any.ckpt"
    path.write_bytes(plain)
    file = MindSporeFile(path)
    assert entries_of(file) == entries
    for name, array in arrays.items():
        parts = [plain[begin : begin + length] for begin, length in laid_out.chunks(name)]
        assert b"".join(parts) == file.array(name).tobytes() == array.tobytes()
        assert [len(part) for part in parts[:-1]] == [chunk] * (len(parts) - 1)


@pytest.mark.parametrize("shape", [(1, 5000), (3, 5000), (4, 1000), (10001,)])
def test_rows_are_cut_as_numpy_cuts_them(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """``numpy.array_split``; of fewer rows than chunks some chunks are empty."""
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    parts = np.array_split(array, -(-array.nbytes // 4096))
    plain = b"".join(record("w", "Float32", shape, part.tobytes()) for part in parts) + record("v", "Int8", (1,), b"v")
    data = {"w": array, "v": np.frombuffer(b"v", np.int8)}
    laid_out = lay_out_checkpoint([("w", "F32", shape), ("v", "I8", (1,))], "w.ckpt", by_rows=True, chunk_bytes=4096)
    assert streamed(laid_out, data.__getitem__) == plain
    (tmp_path / "w.ckpt").write_bytes(plain)
    file = MindSporeFile(tmp_path / "w.ckpt")
    np.testing.assert_array_equal(file.array("w"), array)
    assert file.tensors["v"] == laid_out.tensors["v"]


# What is refused.


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "w.ckpt: would hold no tensor, which MindSpore does not load"),
        (
            [("w", "F8_E4M3", (2,))],
            "w: is F8_E4M3, which MindSpore cannot load; it takes BOOL, I8, U8, I16, U16, I32, U32, I64, U64, F16, BF16, F32, F64, Int4",
        ),
        ([("w", "C64", (2,))], "w: is C64, which MindSpore cannot load; it takes "),
        ([("w", "F4", (2,))], "w: is F4, which MindSpore cannot load; it takes "),
        ([("w", "I8", (0,))], "w: is a vector of no elements, which MindSpore loads as a scalar; leave it out"),
        ([("w", "I8", (2,)), ("w", "I8", (2,))], "'w': is there twice; MindSpore cannot hold it"),
        ([("w", "I8", (2,)), Text("w", "")], "'w': is there twice; MindSpore cannot hold it"),
        ([("", "I8", (2,))], "'': is no name of 1 to 4096 bytes; MindSpore cannot hold it"),
        ([("日" * 1366, "I8", (2,))], "is no name of 1 to 4096 bytes; MindSpore cannot hold it"),
        ([("\ud800", "I8", (2,))], "'\\ud800': holds half of a character; MindSpore cannot hold it"),
        ([Text("t", "\ud800")], "'t': holds half of a character; MindSpore cannot hold it"),
        ([Text("t", "a\0b")], "t: a text with a character 0, at which MindSpore ends it; leave it out"),
    ],
)
def test_what_it_would_not_load_is_refused(entries: list[Entry], message: str) -> None:
    with pytest.raises(RefusedError) as raised:
        lay_out_checkpoint(entries, "w.ckpt")
    assert message in str(raised.value)


def test_an_encrypted_file_with_a_crc_is_refused(tmp_path: Path) -> None:
    laid_out = lay_out_checkpoint([("w", "I8", (3,))], "w.ckpt", crc=True)
    with pytest.raises(RefusedError, match="encrypted and with a CRC, which MindSpore writes and cannot load"):
        save(tmp_path / "w.ckpt", laid_out, lambda name: np.zeros(3, np.int8), ("AES-GCM", bytes(16)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("array", [np.zeros(4, np.int8), np.zeros(3, np.uint8), np.zeros((1, 3), np.int8)])
def test_data_that_were_not_laid_out(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    laid_out = lay_out_checkpoint([("w", "I8", (3,))], "w.ckpt")
    with pytest.raises(ValueError, match=r"w: is u?int8 \[.*\], and I8 \[3\] was laid out"):
        save(tmp_path / "w.ckpt", laid_out, lambda name: array)
    assert list(tmp_path.iterdir()) == []


# On the disk.


def test_what_is_there_stays(tmp_path: Path) -> None:
    laid_out = lay_out_checkpoint([("w", "I8", (3,))], "w.ckpt")
    (tmp_path / "w.ckpt").write_text("something else")
    with pytest.raises(DestinationError, match="exists already"):
        save(tmp_path / "w.ckpt", laid_out, lambda name: np.zeros(3, np.int8))
    assert (tmp_path / "w.ckpt").read_text() == "something else"
    with pytest.raises(DestinationError, match="cannot be written"):
        save(tmp_path / "nowhere" / "w.ckpt", laid_out, lambda name: np.zeros(3, np.int8))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_nothing(tmp_path: Path, call: str) -> None:
    laid_out = lay_out_checkpoint([("w", "I8", (3,))], "w.ckpt")
    with failing(call, full().errno or 28, lambda path: True), pytest.raises(DestinationError, match="No space left"):
        save(tmp_path / "w.ckpt", laid_out, lambda name: np.zeros(3, np.int8))
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_rewritten_in_constant_memory(tmp_path: Path) -> None:
    """128 MiB, in which a tensor of 100 MiB lies in chunks of 7 MiB."""
    arrays = {"large": np.zeros((100, MIB), np.int8), "small": np.ones(28 * MIB, np.int8)}
    entries: list[Entry] = [(name, "I8", array.shape) for name, array in arrays.items()]
    save(tmp_path / "a.ckpt", lay_out_checkpoint(entries, "a.ckpt", chunk_bytes=7 * MIB), arrays.__getitem__)
    file = MindSporeFile(tmp_path / "a.ckpt")
    tracemalloc.start()
    save(tmp_path / "b.ckpt", lay_out_checkpoint(entries_of(file), "b.ckpt", crc=True), file.tensor)
    again = MindSporeFile(tmp_path / "b.ckpt")
    again.check_crc()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * MIB
    assert (tmp_path / "b.ckpt").stat().st_size > 128 * MIB
