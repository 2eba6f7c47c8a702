"""MindSpore's .ckpt files: what the real one wrote, tensors in rectangles, and what is wrong with a file, in one sentence each."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore_records import dims_of, field, number, record, tensor, value, with_crc

from formats import files
from formats.errors import UnreadableError
from formats.mindspore_file import TYPES, MindSporeFile
from formats.safetensors_file import DTYPES, TensorSet

GOLDENS = FIXTURES / "mindspore"
FLOAT6 = np.arange(6, dtype="<f4").tobytes()
GOOD = record("w", "Float32", (2, 3), FLOAT6)

unhurried = settings(deadline=None, max_examples=150)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mindspore") / "w.ckpt"


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], MindSporeFile]:
    def opener(content: bytes) -> MindSporeFile:
        (tmp_path / "w.ckpt").write_bytes(content)
        return MindSporeFile(tmp_path / "w.ckpt")

    return opener


# What the real MindSpore wrote.


@pytest.mark.parametrize("name", ["dtypes", "dtypes_async"])
def test_every_dtype_is_what_was_saved(name: str) -> None:
    file = MindSporeFile(GOLDENS / f"{name}.ckpt")
    with np.load(GOLDENS / "dtypes.expected.npz") as saved:
        wanted = {key: saved[key] for key in saved if not key.endswith((".as_f32", ".nibbles"))}
        as_float32, nibbles = saved["t.bfloat16.as_f32"], saved["t.qint4x2.nibbles"]
    if name == "dtypes_async":  # its arrays cannot be of 4 bits
        del wanted["t.qint4x2"]
    assert file.tensors.keys() == wanted.keys() == set(file.names)
    for key, array in wanted.items():
        found = file.array(key)
        assert (found.shape, found.tobytes()) == (array.shape, array.tobytes()), key
        assert key == "t.bfloat16" or found.dtype == array.dtype
    np.testing.assert_array_equal(file.array("t.bfloat16").astype(np.float32), as_float32)
    if name == "dtypes":
        assert file.metadata == {"t.qint4x2": "Int4"}
        packed = file.array("t.qint4x2").view(np.uint8)
        low_first = np.stack([packed & 15, packed >> 4], axis=-1).reshape(nibbles.shape)
        np.testing.assert_array_equal(low_first, nibbles.astype(np.uint8) & 15)


@pytest.mark.parametrize("name", ["chunk_bytes_4k", "chunk_np_4k"])
def test_tensors_in_chunks_are_read_in_rectangles(name: str) -> None:
    file = MindSporeFile(GOLDENS / f"{name}.ckpt")
    with np.load(GOLDENS / "chunk.expected.npz") as saved:
        assert list(file.tensors) == list(saved)
        for key in saved:
            wanted, tensor = saved[key], file.tensor(key)
            assert (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype)
            np.testing.assert_array_equal(tensor.read(), wanted)
            if wanted.ndim == 2:
                np.testing.assert_array_equal(tensor.read(slice(20, 45), slice(3, 70)), wanted[20:45, 3:70])
                np.testing.assert_array_equal(tensor.T.read(slice(3, 70), slice(40, 41)), wanted.T[3:70, 40:41])


def test_texts_scalars_and_the_crc() -> None:
    file = MindSporeFile(GOLDENS / "texts_crc.ckpt")
    wanted = json.loads((GOLDENS / "texts_crc.expected.json").read_text("utf-8"))
    assert file.names == list(wanted)
    for name, (type, shape, saved) in wanted.items():
        if type == "text":
            assert file.texts[name] == saved
        else:
            assert (file.tensors[name].dtype, list(file.tensors[name].shape)) == (TYPES[type], shape)
            assert file.array(name).tolist() == saved
    file.check_crc()
    file.check_crc(jobs=2)
    MindSporeFile(GOLDENS / "chunk_bytes_4k.ckpt").check_crc()


def test_names_empty_tensors_and_complex_numbers() -> None:
    names = MindSporeFile(GOLDENS / "names.ckpt")
    assert list(names.tensors) == ["日本.w", "a b/c:0"]
    assert names.array("日本.w").tolist() == [0, 1, 2, 3]
    empty = MindSporeFile(GOLDENS / "empty_2d_async.ckpt")
    assert (empty.tensors["e"].shape, empty.array("e").shape, empty.array("a").tolist()) == ((0, 4), (0, 4), [1, 1])
    assert MindSporeFile(GOLDENS / "odd_complex64.ckpt").array("x").tolist() == [1 + 2j, 3 - 4j]


def test_it_is_a_file_of_a_set_of_tensors() -> None:
    """What a checkpoint's reader asks of a container (``StoredFile``)."""
    paths = [GOLDENS / "chunk_np_4k.ckpt", GOLDENS / "names.ckpt"]
    tensors = TensorSet(paths, opener=MindSporeFile)
    assert len(tensors) == 8
    assert tensors["a b/c:0"].file == 1
    assert np.asarray(tensors.tensor("a b/c:0")).tolist() == [0, 1, 2]
    assert [file.identity.name for file in tensors.files] == [path.name for path in paths]
    assert all(file.unchanged() for file in tensors.files)
    assert tensors.nbytes == sum(info.nbytes for info in tensors.values())


# Tensors in pieces, against NumPy.


@unhurried
@given(
    st.sampled_from(sorted(TYPES)),
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.integers(0, 40), max_size=6),
    st.data(),
)
def test_rectangles_of_chunks_of_any_size(path: Path, type: str, rows: int, cols: int, cuts: list[int], data: st.DataObject) -> None:
    dtype = DTYPES[TYPES[type]]
    size = rows * cols * dtype.itemsize
    content = (np.arange(size) * 37 % 251).astype(np.uint8)
    content = content & 1 if dtype == np.bool_ else content
    wanted = content.view(dtype).reshape(rows, cols)
    bounds = sorted({0, size, *(cut for cut in cuts if cut < size)})
    chunks = [record("w", type, (rows, cols), content[begin:end].tobytes()) for begin, end in itertools.pairwise(bounds)]
    other = np.arange(5, dtype="<i2")
    path.write_bytes(record("a", "Int16", (5,), other.tobytes()) + b"".join(chunks) + record("z", "Int16", (5,), other.tobytes()))
    file = MindSporeFile(path)
    assert list(file.tensors) == ["a", "w", "z"]
    top, left = data.draw(st.integers(0, rows)), data.draw(st.integers(0, cols))
    bottom, right = data.draw(st.integers(top, rows)), data.draw(st.integers(left, cols))
    found = file.tensor("w").read(slice(top, bottom), slice(left, right))
    assert found.tobytes() == wanted[top:bottom, left:right].tobytes()
    assert file.array("w").tobytes() == wanted.tobytes()
    assert file.array("a").tolist() == file.array("z").tolist() == other.tolist()


def test_opening_reads_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty gigabytes, sparse on the disk, in chunks of 512 MiB as MindSpore cuts them."""
    size, count = 512 << 20, 80
    head = record("w", "Int8", (count, size), b"")
    path = tmp_path / "w.ckpt"
    with path.open("wb") as file:
        position = 0
        for _ in range(count):
            proto = dims_of((count, size)) + field(2, b"Int8") + b"\x1a" + number(size)
            inner = field(1, b"w") + b"\x12" + number(len(proto) + size) + proto
            head = b"\x0a" + number(len(inner) + size) + inner
            file.seek(position)
            file.write(head)
            position += len(head) + size
        file.truncate(position)
    read: list[int] = []
    real = files.read_at

    def watched(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
        read.append(len(view))
        real(descriptor, view, offset, path)

    monkeypatch.setattr(files, "read_at", watched)
    begin = time.process_time()
    opened = MindSporeFile(path)
    assert time.process_time() - begin < 1
    assert opened.tensors["w"].nbytes == count * size
    assert sum(read) < 2 * count * 4096
    read.clear()
    assert not opened.tensor("w").read(slice(41, 43), slice(100, 200)).any()
    assert read == [100, 100]


# What is read though MindSpore no longer writes it so.


def test_a_scalar_with_the_dims_0(opened: Callable[[bytes], MindSporeFile]) -> None:
    file = opened(record("s", "Float32", (0,), b"\0\0\x80\x3f") + record("e", "Float32", (0,), b""))
    assert (file.array("s").shape, float(file.array("s"))) == ((), 1.0)
    assert file.array("e").shape == (0,)


@pytest.mark.parametrize(
    "content",
    [
        value("w", field(1, b"\x02\x03") + field(2, b"Float32") + field(3, FLOAT6)),
        value("w", field(3, FLOAT6) + field(2, b"Float32") + dims_of((2, 3))),
        value("w", b"\x08\x02" + field(3, FLOAT6) + b"\x08\x03" + field(2, b"Float32")),
        field(1, field(2, tensor("Float32", (2, 3), FLOAT6)) + field(1, b"w")),
        value("w", b"\x08\x82\x80\x80\x00\x08\x03" + field(2, b"Float32") + field(3, FLOAT6)),
        with_crc(GOOD),
        GOOD + record("w", "Float32", (2, 3), b""),  # numpy.array_split of fewer rows than chunks
        record("w", "Float32", (2, 3), b"") + GOOD,
    ],
    ids="packed-dims content-first dims-apart tag-last long-varint crc empty-chunk empty-first-chunk".split(),
)
def test_the_same_tensor_in_other_words(opened: Callable[[bytes], MindSporeFile], content: bytes) -> None:
    file = opened(content)
    assert file.array("w").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert file.names == ["w"]


def test_data_that_end_like_a_crc_are_data(opened: Callable[[bytes], MindSporeFile]) -> None:
    content = b"crc_num" + bytes(10)
    file = opened(record("w", "Int8", (17,), content))
    assert file.array("w").tobytes() == content
    assert file.crc is None


# What is wrong with a file.


def text(content: bytes, dims: tuple[int, ...] = (0,)) -> bytes:
    return record("t", "str", dims, content)


def wire_type(wire: int) -> str:
    return f"it has a field of the wire type {wire}, wanted 0, 1, 2 or 5"


LONG = b"\x80" * 10 + b"\x01"
CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "w.ckpt: is empty; a checkpoint holds at least one tensor"),
    "only-a-crc": (with_crc(b""), "w.ckpt: begins with the byte 0x63, wanted 0x0a: it is no checkpoint of MindSpore"),
    "zip": (b"PK\x03\x04" + bytes(40), "w.ckpt: is a zip file, as torch.save writes, not a checkpoint of MindSpore"),
    "pickle": (b"\x80\x02}q\x00.", "w.ckpt: is a pickle, as torch.save writes, not a checkpoint of MindSpore"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "w.ckpt: is an HDF5 file, not a checkpoint of MindSpore"),
    "zeros": (bytes(64), "w.ckpt: begins with the byte 0x00, wanted 0x0a: it is no checkpoint of MindSpore"),
    "safetensors": (b"\x02\0\0\0\0\0\0\0{}", "w.ckpt: begins with the byte 0x02, wanted 0x0a: it is no checkpoint of MindSpore"),
    "strategy": (
        (GOLDENS / "ckpt_strategy_rank_0.ckpt").read_bytes(),
        "w.ckpt: is the strategy of a parallel run (ckpt_strategy), which holds no tensors; name the checkpoint itself",
    ),
    "truncated-data": (
        GOOD[:-5],
        "w.ckpt: at byte 0 it has a field of 44 bytes where 39 are left; it is truncated: copy it again",
    ),
    "truncated-key": (GOOD + b"\x8a", "w.ckpt: at byte 46 it ends within a number; it is truncated: copy it again"),
    "truncated-length": (GOOD + b"\x0a\xff", "w.ckpt: at byte 47 it ends within a number; it is truncated: copy it again"),
    "garbage": (
        GOOD + b"\x12\x01x",
        "w.ckpt: at byte 46 no tensor begins; what follows belongs to nothing, or the file is damaged",
    ),
    "zeros-behind": (GOOD + bytes(17), "w.ckpt: at byte 46 it has a field of the number 0, which is none"),
    "crc-cut": (with_crc(GOOD)[:-1], "w.ckpt: ends with 16 bytes that begin as a CRC does, which has 17: copy it again"),
    "crc-twice": (with_crc(with_crc(GOOD)), "w.ckpt: ends with 34 bytes that begin as a CRC does, which has 17: copy it again"),
    "crc-cut-short": (with_crc(GOOD)[:-13], "w.ckpt: at byte 46 it has a field of the wire type 3, wanted 0, 1, 2 or 5"),
    "length-beyond": (
        field(1, b"\x0a\x05w"),
        "w.ckpt: at byte 2 it has a field of 5 bytes where 1 are left; it is truncated: copy it again",
    ),
    "length-beyond-inside": (
        field(1, b"\x0a\x05w") + GOOD,
        "w.ckpt: at byte 2 it has a field of 5 bytes where 1 are left; it contradicts itself",
    ),
    "number-inside": (field(1, b"\x8a") + GOOD, "w.ckpt: at byte 2 it ends within a number; it is damaged"),
    "long-number": (b"\x0a" + LONG + GOOD, "w.ckpt: at byte 1 it has a number of more than 64 bits"),
    "large-number": (b"\x0a" + b"\xff" * 9 + b"\x02" + GOOD, "w.ckpt: at byte 1 it has a number of more than 64 bits"),
    "huge-length": (
        b"\x0a" + number((1 << 64) - 1) + GOOD,
        "w.ckpt: at byte 0 it has a field of 18446744073709551615 bytes where 46 are left; it is truncated: copy it again",
    ),
    "huge-field": (
        field(1, number(1 << 33) + b"\x00"),
        "w.ckpt: at byte 2 it has a field of the number 1073741824, which is none",
    ),
    **{
        f"wire-type-{wire}": (
            field(1, bytes([8 + wire]) + b"w"),
            f"w.ckpt: at byte 2 it has a field of the wire type {wire}, wanted 0, 1, 2 or 5",
        )
        for wire in (3, 4, 6, 7)
    },
    "value-a-number": (b"\x0a\x00" + b"\x08\x05", "w.ckpt: the record at byte 0 has no tag; its tensor has no name"),
    "tag-a-number": (
        field(1, b"\x08\x01" + field(2, tensor("Float32", (2, 3), FLOAT6))),
        "w.ckpt: the record at byte 0: its tag has the wire type 0, wanted 2",
    ),
    "tensor-fixed": (
        field(1, field(1, b"w") + b"\x11" + bytes(8)),
        "w.ckpt: the record at byte 0: its tensor has the wire type 1, wanted 2",
    ),
    "type-fixed": (value("w", b"\x15" + bytes(4)), "w.ckpt: tensor 'w': its tensor_type has the wire type 5, wanted 2"),
    "dims-fixed": (value("w", b"\x0d" + bytes(4)), "w.ckpt: tensor 'w': its dims have the wire type 5, wanted 0"),
    "no-tag": (field(1, field(2, tensor("Float32", (2, 3), FLOAT6))), "w.ckpt: the record at byte 0 has no tag; its tensor has no name"),
    "empty-tag": (record("", "Float32", (2, 3), FLOAT6), "w.ckpt: the record at byte 0 has an empty tag; its tensor has no name"),
    "no-tensor": (field(1, field(1, b"w")), "w.ckpt: 'w' has no tensor"),
    "no-type": (value("w", dims_of((2, 3)) + field(3, FLOAT6)), "w.ckpt: tensor 'w' has no tensor_type"),
    "no-content": (value("w", dims_of((2, 3)) + field(2, b"Float32")), "w.ckpt: tensor 'w' has no tensor_content"),
    "two-tags": (
        field(1, field(1, b"w") + field(1, b"v") + field(2, tensor("Float32", (2, 3), FLOAT6))),
        "w.ckpt: the record at byte 0 has two fields 'tag'; which one counts cannot be known",
    ),
    "two-tensors": (
        field(1, field(1, b"w") + 2 * field(2, tensor("Float32", (2, 3), FLOAT6))),
        "w.ckpt: the record at byte 0 has two fields 'tensor'; which one counts cannot be known",
    ),
    "two-types": (
        value("w", field(2, b"Int8") + tensor("Float32", (2, 3), FLOAT6)),
        "w.ckpt: tensor 'w' has two fields 'tensor_type'; which one counts cannot be known",
    ),
    "two-contents": (
        value("w", tensor("Float32", (2, 3), FLOAT6) + field(3, FLOAT6)),
        "w.ckpt: tensor 'w' has two fields 'tensor_content'; which one counts cannot be known",
    ),
    "map": (
        field(1, field(1, b"w") + field(3, field(1, tensor("int32", (1,), bytes(4))))),
        "w.ckpt: 'w' is a MapParameter, a hash table, which is no tensor; save the model without it",
    ),
    "field-4": (
        field(1, field(1, b"w") + field(4, b"")),
        "w.ckpt: the record at byte 0 has a field 4, which no checkpoint of MindSpore has",
    ),
    "tensor-field-9": (
        value("w", tensor("Float32", (2, 3), FLOAT6) + b"\x48\x01"),
        "w.ckpt: tensor 'w' has a field 9, which no checkpoint of MindSpore has",
    ),
    "tag-no-utf8": (
        field(1, field(1, b"\xff") + field(2, tensor("Float32", (2, 3), FLOAT6))),
        "w.ckpt: the name in the record at byte 0 is not UTF-8; the file is damaged",
    ),
    "long-tag": (
        record("n" * 4097, "Float32", (2, 3), FLOAT6),
        "w.ckpt: the name in the record at byte 0 has 4097 bytes, wanted at most 4096",
    ),
    "long-type": (record("w", "F" * 65, (2, 3), FLOAT6), "w.ckpt: the type of tensor 'w' has 65 bytes, wanted at most 64"),
    "unknown-type": (
        record("w", "Float8E4M3FN", (2, 3), bytes(6)),
        "w.ckpt: tensor 'w' has the type 'Float8E4M3FN', wanted one of those that MindSpore 2.7 saves (" + ", ".join(TYPES) + ")",
    ),
    "negative-dim": (record("w", "Float32", ((1 << 64) - 2, 3), FLOAT6), "w.ckpt: tensor 'w' has a negative dim"),
    "negative-packed-dim": (value("w", field(1, number((1 << 64) - 2))), "w.ckpt: tensor 'w' has a negative dim"),
    "many-dims": (record("w", "Float32", (1,) * 33, bytes(4)), "w.ckpt: tensor 'w' has more than 32 dims, larger than any tensor can be"),
    "many-packed-dims": (value("w", field(1, b"\x01" * 99)), "w.ckpt: tensor 'w' has more than 32 dims, larger than any tensor can be"),
    "huge-dims": (
        record("w", "Float32", (1 << 40, 1 << 40, 0), b""),
        "w.ckpt: tensor 'w' has 3 dims [1099511627776, 1099511627776, 0], larger than any tensor can be",
    ),
    "short": (
        record("w", "Float32", (2, 3), FLOAT6[:-4]),
        "w.ckpt: tensor 'w' Float32 [2, 3] takes 24 bytes, and 20 are there; a chunk of it is missing or cut: save it again",
    ),
    "long": (
        record("w", "Float32", (2, 3), FLOAT6 + b"\0"),
        "w.ckpt: tensor 'w' Float32 [2, 3] takes 24 bytes, and 25 are there; it was saved wrongly, or is damaged",
    ),
    "scalar-of-two": (
        record("w", "Float32", (), bytes(8)),
        "w.ckpt: tensor 'w' Float32 [] takes 4 bytes, and 8 are there; it was saved wrongly, or is damaged",
    ),
    "dims-0-with-two": (
        record("w", "Float32", (0,), bytes(8)),
        "w.ckpt: tensor 'w' Float32 [0] takes 0 bytes, and 8 are there; it was saved wrongly, or is damaged",
    ),
    "chunk-missing": (
        record("w", "Float32", (2, 3), FLOAT6[:8]) + record("v", "Int8", (1,), b"v"),
        "w.ckpt: tensor 'w' Float32 [2, 3] takes 24 bytes, and 8 are there; a chunk of it is missing or cut: save it again",
    ),
    "chunk-too-much": (
        record("w", "Float32", (2, 3), FLOAT6[:20]) + record("w", "Float32", (2, 3), FLOAT6[16:]),
        "w.ckpt: tensor 'w' Float32 [2, 3] takes 24 bytes, and 28 are there; it was saved wrongly, or is damaged",
    ),
    "chunk-of-other-dims": (
        record("w", "Float32", (2, 3), FLOAT6[:8]) + record("w", "Float32", (3, 2), FLOAT6[8:]),
        "w.ckpt: tensor 'w' is Float32 [2, 3] in one chunk and Float32 [3, 2] in another; wanted the same in all",
    ),
    "chunk-of-other-type": (
        record("w", "Float32", (2, 3), FLOAT6[:8]) + record("w", "Int32", (2, 3), FLOAT6[8:]),
        "w.ckpt: tensor 'w' is Float32 [2, 3] in one chunk and Int32 [2, 3] in another; wanted the same in all",
    ),
    "twice": (2 * GOOD, "w.ckpt: tensor 'w' is there twice; which one counts cannot be known"),
    "twice-apart": (
        GOOD + record("v", "Int8", (1,), b"v") + GOOD,
        "w.ckpt: tensor 'w' is there twice; which one counts cannot be known",
    ),
    "empty-twice": (2 * record("w", "Int8", (0, 4), b""), "w.ckpt: tensor 'w' is there twice; which one counts cannot be known"),
    "text-twice": (2 * text(b"a\0\0\0"), "w.ckpt: tensor 't' is there twice; which one counts cannot be known"),
    "text-in-a-tensor": (
        record("w", "Int8", (4,), b"ab") + record("w", "str", (0,), b"a\0\0\0"),
        "w.ckpt: tensor 'w' Int8 [4] takes 4 bytes, and 2 are there; a chunk of it is missing or cut: save it again",
    ),
    "text-of-5-bytes": (text(b"a\0\0\0b"), "w.ckpt: text 't' has the dims [0] and 5 bytes, wanted [0] and 4 for each character"),
    "text-of-0-bytes": (text(b""), "w.ckpt: text 't' has the dims [0] and 0 bytes, wanted [0] and 4 for each character"),
    "text-with-dims": (text(b"a\0\0\0", (1,)), "w.ckpt: text 't' has the dims [1] and 4 bytes, wanted [0] and 4 for each character"),
    "text-beyond-unicode": (text(b"\0\0\x11\0"), "w.ckpt: text 't' is not UTF-32; the file is damaged"),
    "text-of-half-a-character": (text(b"\0\xd8\0\0"), "w.ckpt: text 't' is not UTF-32; the file is damaged"),
    "text-with-a-zero": (text(b"a\0\0\0\0\0\0\0b\0\0\0"), "w.ckpt: text 't' holds a character 0, at which it would end"),
}


@pytest.mark.parametrize(("content", "message"), CASES.values(), ids=CASES)
def test_one_sentence_says_what_is_wrong(opened: Callable[[bytes], MindSporeFile], content: bytes, message: str) -> None:
    with pytest.raises(UnreadableError) as raised:
        opened(content)
    assert str(raised.value) == message


@pytest.mark.parametrize(("limit", "allowed"), [("MAX_RECORDS", 2), ("MAX_TEXT", 47)])
def test_there_are_limits(opened: Callable[[bytes], MindSporeFile], monkeypatch: pytest.MonkeyPatch, limit: str, allowed: int) -> None:
    texts = [record(name, "str", (0,), "four".encode("utf-32-le")) for name in "abc"]
    assert opened(b"".join(texts)).texts == dict.fromkeys("abc", "four")
    monkeypatch.setattr(f"formats.mindspore_file.{limit}", allowed)
    with pytest.raises(UnreadableError, match=f"more than {allowed} "):
        opened(b"".join(texts))


def test_a_crc_that_is_not_that_of_the_file(opened: Callable[[bytes], MindSporeFile]) -> None:
    content = bytearray(with_crc(GOOD))
    content[30] ^= 0x40
    file = opened(bytes(content))
    with pytest.raises(
        UnreadableError, match=r"w.ckpt: its CRC is 0x[0-9a-f]{8}, and 0x[0-9a-f]{8} is what it was saved with; it is damaged"
    ):
        file.check_crc()
    larger = opened(GOOD + b"crc_num" + (1 << 32).to_bytes(10, "big"))
    with pytest.raises(UnreadableError, match="and 0x100000000 is what it was saved with"):
        larger.check_crc()
    with pytest.raises(UnreadableError, match="holds no CRC to check"):
        opened(GOOD).check_crc()


@unhurried
@given(st.sampled_from(["dtypes", "texts_crc", "names", "empty_2d_async"]), st.data())
def test_a_changed_byte_changes_what_is_read_or_is_one_sentence(path: Path, name: str, data: st.DataObject) -> None:
    """Nothing but ``UnreadableError`` comes out, and every byte counts: no field is ignored."""
    content = bytearray((GOLDENS / f"{name}.ckpt").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        file = MindSporeFile(path)
    except UnreadableError:
        return
    assert everything(file) != everything(MindSporeFile(GOLDENS / f"{name}.ckpt"))


def everything(file: MindSporeFile) -> list[Any]:
    tensors = [(name, info.dtype, info.shape, file.array(name).tobytes()) for name, info in file.tensors.items()]
    return [tensors, file.metadata, file.texts, file.names, file.crc]


@unhurried
@given(st.sampled_from(["dtypes", "chunk_bytes_4k", "chunk_np_4k", "texts_crc"]), st.data())
def test_a_file_that_was_cut_is_refused(path: Path, name: str, data: st.DataObject) -> None:
    """Unless it was cut behind a whole tensor, which nothing can tell."""
    content = (GOLDENS / f"{name}.ckpt").read_bytes()
    length = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(content[:length])
    try:
        file = MindSporeFile(path)
    except UnreadableError:
        return
    whole = MindSporeFile(GOLDENS / f"{name}.ckpt")
    assert file.names == whole.names[: len(file.names)]
    assert file.crc is None
    for key in file.tensors:
        assert file.array(key).tobytes() == whole.array(key).tobytes()


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w.ckpt"
    path.write_bytes(GOOD)
    file = MindSporeFile(path)
    assert file.unchanged()
    path.write_bytes(GOOD + record("v", "Int8", (1,), b"v"))
    assert not file.unchanged()
    assert MindSporeFile(path).identity != file.identity
