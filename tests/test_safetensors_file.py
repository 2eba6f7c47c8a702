"""safetensors files: hostile headers and indexes, the real library in both directions, sharding, and which files are read."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from formats import safetensors_file
from formats.checkpoint import Location
from formats.errors import HeaderError, UnreadableError
from formats.ir import Array
from formats.safetensors_file import DTYPES, NAMES, OutputFile, SafetensorsFile, TensorSet, index_json, lay_out, open_index, parse_header

unhurried = settings(deadline=None)


def file_bytes(header: Any, data: bytes = b"") -> bytes:
    """A file with ``header``: an object, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changed: Any) -> dict[str, Any]:
    """The header entry of two float32 values, with ``changed`` keys; a key that is None is left out."""
    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changed}
    return {key: value for key, value in whole.items() if value is not None}


def one(**changed: Any) -> bytes:
    """A file with the tensor w and 8 bytes of data; ``changed`` is what is wrong with it."""
    return file_bytes({"w": entry(**changed)}, bytes(8))


def two(first: list[int], second: list[int], size: int) -> bytes:
    """A file with the tensors v and w of bytes at these offsets."""
    entries = {
        name: {"dtype": "U8", "shape": [offsets[1] - offsets[0]], "data_offsets": offsets}
        for name, offsets in (("v", first), ("w", second))
    }
    return file_bytes(entries, bytes(size))


def opened(data: bytes, name: str = "m.safetensors") -> SafetensorsFile:
    """The file of these bytes, which stays readable after its folder is gone."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        return SafetensorsFile(Path(folder) / name)


def refusal(data: bytes) -> str:
    with pytest.raises(HeaderError) as caught:
        opened(data)
    return str(caught.value)


# Hostile files


def test_the_file_that_the_hostile_ones_differ_from_is_valid() -> None:
    assert opened(one()).array("w").tolist() == [0, 0]
    assert opened(two([0, 2], [2, 8], 8)).array("w").nbytes == 6


HOSTILE_FILES = {
    "empty file": (b"", "0 bytes long"),
    "7 bytes": (b"\x02\0\0\0\0\0\0", "7 bytes long"),
    "length alone": ((2).to_bytes(8, "little"), "claims 2 bytes, but the file has 8"),
    "header one byte beyond the file": ((3).to_bytes(8, "little") + b"{}", "claims 3 bytes"),
    "largest length": (b"\xff" * 8 + b"{}", f"claims {2**64 - 1} bytes"),
    "header of no bytes": (file_bytes(b""), "not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "not UTF-8 at byte 2"),
    "not JSON": (file_bytes(b"{'w': 1}"), "not valid JSON"),
    "two documents": (file_bytes(b"{}{}"), "not valid JSON"),
    "array": (file_bytes(b"[]"), "a JSON list, wanted an object"),
    "string": (file_bytes(b'"w"'), "a JSON str, wanted an object"),
    "null": (file_bytes(b"null"), "wanted an object"),
    "nested arrays": (file_bytes(b"[" * 100_000), "nested too deeply"),
    "nested objects": (file_bytes(b'{"w":' * 100_000), "nested too deeply"),
    "number of 5000 digits": (file_bytes(b'{"w": ' + b"1" * 5000 + b"}"), "not valid JSON"),
    "NaN": (one(shape=[float("nan")]), "NaN is not JSON"),
    "Infinity": (one(shape=[float("inf")]), "Infinity is not JSON"),
    "minus Infinity": (one(shape=[-float("inf")]), "-Infinity is not JSON"),
    "tensor twice": (file_bytes(b'{"w": {}, "w": {}}'), "the key 'w' is there twice"),
    "key twice in an entry": (file_bytes(b'{"w": {"dtype": "U8", "dtype": "I8"}}'), "the key 'dtype' is there twice"),
    "key twice in metadata": (file_bytes(b'{"__metadata__": {"a": "", "a": ""}}'), "the key 'a' is there twice"),
    "metadata twice": (file_bytes(b'{"__metadata__": {}, "__metadata__": {}}'), "the key '__metadata__' is there twice"),
    "metadata a list": (file_bytes({"__metadata__": []}), "__metadata__ must map strings to strings"),
    "metadata null": (file_bytes({"__metadata__": None}), "__metadata__ must map strings to strings"),
    "number in metadata": (file_bytes({"__metadata__": {"a": "b", "c": 1}}), "__metadata__ must map strings to strings"),
    "one trailing byte": (one() + b"\0", "1 bytes follow the last tensor"),
    "data without a tensor": (file_bytes({}, b"123"), "3 bytes follow the last tensor"),
}


@pytest.mark.parametrize(("data", "found"), HOSTILE_FILES.values(), ids=list(HOSTILE_FILES))
def test_a_hostile_file_is_refused_by_name(data: bytes, found: str) -> None:
    message = refusal(data)
    assert message.startswith("m.safetensors: ")
    assert found in message


TYPES = "must be a list of integers that are not negative"
NOT_EXACTLY = "must have exactly dtype, shape and data_offsets"


HOSTILE_TENSORS = {
    "entry a list": (file_bytes({"w": []}), NOT_EXACTLY),
    "entry null": (file_bytes({"w": None}), NOT_EXACTLY),
    "no dtype": (one(dtype=None), NOT_EXACTLY),
    "no shape": (one(shape=None), NOT_EXACTLY),
    "no offsets": (one(data_offsets=None), NOT_EXACTLY),
    "a fourth key": (one(strides=[1]), NOT_EXACTLY),
    "unknown dtype": (one(dtype="F33"), "unknown dtype 'F33'"),
    "dtype in lower case": (one(dtype="f32"), "unknown dtype 'f32'"),
    "dtype a number": (one(dtype=32), "unknown dtype 32"),
    "dtype a list": (one(dtype=["F32"]), "unknown dtype ['F32']"),
    "shape a number": (one(shape=2), f"shape {TYPES}"),
    "shape an object": (one(shape={"0": 2}), f"shape {TYPES}"),
    "bool in shape": (one(shape=[2, True]), f"shape {TYPES}"),
    "float in shape": (one(shape=[2.0]), f"shape {TYPES}"),
    "negative in shape": (one(shape=[-1, -2]), f"shape {TYPES}"),
    "string in shape": (one(shape=["2"]), f"shape {TYPES}"),
    "offsets an object": (one(data_offsets={"begin": 0, "end": 8}), f"data_offsets {TYPES}"),
    "bool in offsets": (one(data_offsets=[False, 8]), f"data_offsets {TYPES}"),
    "float in offsets": (one(data_offsets=[0, 8.0]), f"data_offsets {TYPES}"),
    "negative in offsets": (one(data_offsets=[-8, 0]), f"data_offsets {TYPES}"),
    "one offset": (one(data_offsets=[8]), "must be [begin, end]"),
    "three offsets": (one(data_offsets=[0, 8, 8]), "must be [begin, end]"),
    "offsets reversed": (one(data_offsets=[8, 0]), "must be [begin, end] with begin <= end"),
    "span too short": (one(data_offsets=[0, 7]), "F32 [2] takes 8 bytes, but its data_offsets span 7"),
    "span too long": (one(shape=[1]), "F32 [1] takes 4 bytes, but its data_offsets span 8"),
    "scalar of two": (one(shape=[]), "F32 [] takes 4 bytes"),
    "shape overflows 64 bits to nothing": (one(shape=[1 << 32, 1 << 32], data_offsets=[0, 0]), "larger than any tensor can be"),
    "bytes overflow 64 bits to nothing": (one(shape=[1 << 62], data_offsets=[0, 0]), "larger than any tensor can be"),
    "65 dimensions": (one(shape=[2] + [1] * 64), "larger than any tensor can be"),
    "past the end": (one(shape=[3], data_offsets=[0, 12]), "but the file has"),
    "truncated": (one()[:-1], "it is truncated: copy it again"),
    "far past the end": (one(shape=[1 << 58], data_offsets=[0, 1 << 60]), "it is truncated"),
    "overlap": (two([0, 4], [3, 8], 8), "it overlaps the tensor before it"),
    "the same bytes twice": (two([0, 8], [0, 8], 8), "it overlaps the tensor before it"),
    "gap": (two([0, 3], [4, 8], 8), "it leaves a gap before it"),
    "gap before the first": (one(shape=[1], data_offsets=[4, 8]), "it leaves a gap before it"),
    "empty tensor inside another": (two([0, 8], [4, 4], 8), "it overlaps the tensor before it"),
}


@pytest.mark.parametrize(("data", "found"), HOSTILE_TENSORS.values(), ids=list(HOSTILE_TENSORS))
def test_a_hostile_tensor_is_refused_by_file_and_name(data: bytes, found: str) -> None:
    message = refusal(data)
    assert message.startswith("m.safetensors: tensor 'w'")
    assert found in message


def test_a_header_of_more_than_100_mb_is_not_read(tmp_path: Path) -> None:
    """The file is as long as it says, so that only the limit can refuse it; it is sparse."""
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(8 + 100_000_001)
    with pytest.raises(HeaderError, match=r"m\.safetensors: the header claims 100000001 bytes.*100000000 is the most"):
        SafetensorsFile(path)


def test_a_header_of_exactly_the_limit_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    length = int.from_bytes(one()[:8], "little")
    monkeypatch.setattr(safetensors_file, "MAX_HEADER_BYTES", length)
    assert list(opened(one()).tensors) == ["w"]
    monkeypatch.setattr(safetensors_file, "MAX_HEADER_BYTES", length - 1)
    assert f"{length - 1} is the most" in refusal(one())


def test_every_truncation_and_every_byte_too_many_is_refused() -> None:
    whole = file_bytes({"v": entry(), "w": entry(data_offsets=[8, 16])}, bytes(range(16)))
    assert len(opened(whole).tensors) == 2
    for length in range(len(whole)):
        assert refusal(whole[:length]).startswith("m.safetensors: ")
    assert "follow the last tensor" in refusal(whole + bytes(1))


VALID_HEADER = json.dumps({"__metadata__": {"format": "pt"}, "v": entry(), "w": entry(data_offsets=[8, 16])}).encode()


@given(st.integers(0, len(VALID_HEADER) - 1), st.binary(max_size=3), st.integers(0, 3))
def test_a_damaged_header_is_refused_or_means_tensors_that_fill_the_file(at: int, new: bytes, dropped: int) -> None:
    damaged = VALID_HEADER[:at] + new + VALID_HEADER[at + dropped :]
    try:
        tensors, _ = parse_header(damaged, "m.safetensors", 100, 116)
    except HeaderError as error:
        assert str(error).startswith("m.safetensors: ")  # noqa: PT017
    else:
        assert sum(info.nbytes for info in tensors.values()) == 16
        assert {info.begin for info in tensors.values()} <= {100, 108, 116}


def test_a_file_that_cannot_be_opened_is_unreadable(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, why in (("missing", "cannot be read"), (".", "is not a regular file"), ("pipe", "is not a regular file")):
        with pytest.raises(UnreadableError, match=f"{(tmp_path / path).name}: {why}"):
            SafetensorsFile(tmp_path / path)


def test_half_a_byte_is_no_tensor() -> None:
    refusal(file_bytes({"w": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"\0"))


def test_a_shape_that_overflows_before_its_zero_is_refused() -> None:
    with pytest.raises(HeaderError, match=r"'w'.*larger than any tensor"):
        opened(one(shape=[1 << 40, 1 << 40, 0], data_offsets=[0, 0])[:-8])


def test_a_name_that_is_no_unicode_text_is_refused() -> None:
    with pytest.raises(HeaderError, match="half of a character"):
        opened(file_bytes(b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'))


# Valid files


def test_what_was_read_is_ours_whatever_becomes_of_the_file(tmp_path: Path) -> None:
    """No view of a mapped file: a process that truncates it would kill the one that looks."""
    values = np.arange(100_000, dtype=np.int32)
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors.numpy.save({"w": values}))
    file = SafetensorsFile(path)
    found = file.array("w")
    assert not np.shares_memory(found, file.array("w"))
    assert str(path) not in Path("/proc/self/maps").read_text()
    os.truncate(path, 1000)
    np.testing.assert_array_equal(found, values)
    with pytest.raises(UnreadableError, match=r"w\.safetensors: ends at byte 1000, 399\d\d\d bytes too early; it was truncated"):
        file.array("w")


def test_a_file_of_mode_0400_is_readable_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(one())
    path.chmod(0o400)
    assert TensorSet([path]).array("w").tolist() == [0, 0]
    assert path.stat().st_mode & 0o777 == 0o400
    assert path.read_bytes() == one()


def test_a_file_that_changed_on_disk_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(one())
    file = SafetensorsFile(path)
    assert file.unchanged()
    os.utime(path, ns=(0, file.identity.mtime_ns + 1))
    assert not file.unchanged()
    path.write_bytes(one() + b"\0")
    os.utime(path, ns=(0, file.identity.mtime_ns))
    assert not file.unchanged()
    path.unlink()
    assert not file.unchanged()


def test_the_identity_tells_headers_apart() -> None:
    same, other = opened(one()).identity, opened(one(shape=[1, 2])).identity
    assert same.digest == opened(one()).identity.digest != other.digest
    assert (same.name, same.size) == ("m.safetensors", len(one()))


def test_four_bit_floats_are_read_as_their_bytes() -> None:
    file = opened(file_bytes({"w": {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}}, b"\x21\x43"))
    assert file.tensors["w"].shape == (2, 2)
    assert file.array("w").tolist() == [0x21, 0x43]


# The real library

LIBRARY_DTYPES = sorted(set(DTYPES) - {"BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0"})
"""What ``safetensors.numpy`` writes; NumPy has no name of its own for the others."""

ARRAYS = hnp.arrays(
    st.sampled_from([DTYPES[name] for name in LIBRARY_DTYPES]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
NAMED_ARRAYS = st.dictionaries(st.text(max_size=8).filter(lambda name: name != "__metadata__"), ARRAYS, max_size=6)


def triples(arrays: Mapping[str, Array]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, NAMES[array.dtype], array.shape) for name, array in arrays.items()]


def written(file: OutputFile, arrays: Mapping[str, Array]) -> bytes:
    """The bytes of a laid-out file with its data in place."""
    whole = bytearray(file.size)
    whole[: len(file.header)] = file.header
    for name, info in file.tensors.items():
        whole[info.begin : info.end] = arrays[name].tobytes()
    return bytes(whole)


def assert_same_tensors(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape, found[name].tobytes()) == (array.dtype, array.shape, array.tobytes()), name


@unhurried
@given(NAMED_ARRAYS, st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=3))
def test_what_the_library_wrote_is_read(arrays: dict[str, Array], metadata: dict[str, str] | None) -> None:
    """Without tensors and with an empty metadata object, the library (0.8.0) writes a header that it cannot read itself."""
    file = opened(safetensors.numpy.save(arrays, metadata))
    assert_same_tensors({name: file.array(name) for name in file.tensors}, arrays)
    assert file.metadata == (metadata or {})


@unhurried
@given(NAMED_ARRAYS)
def test_what_is_laid_out_is_read_by_the_library(arrays: dict[str, Array]) -> None:
    (file,) = lay_out(triples(arrays))
    whole = written(file, arrays)
    assert_same_tensors(safetensors.numpy.load(whole), arrays)
    ours = opened(whole)
    assert_same_tensors({name: ours.array(name) for name in ours.tensors}, arrays)
    assert ours.tensors == file.tensors
    assert len(file.header) % 8 == 0
    assert all(info.begin % DTYPES[info.dtype].itemsize == 0 for info in file.tensors.values())


@unhurried
@given(NAMED_ARRAYS)
def test_tensors_in_the_librarys_order_are_laid_out_byte_for_byte_as_it_writes_them(arrays: dict[str, Array]) -> None:
    theirs = safetensors.numpy.save(arrays, {"format": "pt"})
    header = json.loads(theirs[8 : 8 + int.from_bytes(theirs[:8], "little")])
    order = [name for name in header if name != "__metadata__"]
    (file,) = lay_out(triples({name: arrays[name] for name in order}))
    assert written(file, arrays) == theirs


@pytest.mark.parametrize("dtype", sorted([*DTYPES, "F4"]))
def test_every_dtype_is_one_that_the_library_knows(dtype: str) -> None:
    (file,) = lay_out([("w", dtype, (3, 2))])
    size = file.tensors["w"].nbytes
    ((name, tensor),) = safetensors.deserialize(file.header + bytes(range(size)))
    assert (name, tensor["dtype"], tensor["shape"]) == ("w", dtype, [3, 2])
    assert bytes(tensor["data"]) == bytes(range(size))
    ours = opened(file.header + bytes(range(size)))
    assert ours.tensors["w"].dtype == dtype
    assert ours.array("w").tobytes() == bytes(range(size))


def test_the_metadata_says_what_transformers_asks_for(tmp_path: Path) -> None:
    (file,) = lay_out([("w", "U8", (0,))])
    (tmp_path / file.name).write_bytes(file.header)
    with safetensors.safe_open(tmp_path / file.name, "np") as theirs:
        assert theirs.metadata() == {"format": "pt"}


# Shards


def bytes_named(sizes: Mapping[str, int]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, "U8", (size,)) for name, size in sizes.items()]


def test_a_shard_is_closed_before_the_tensor_that_would_overfill_it() -> None:
    """4 + 4 fill a shard of 8; 9 is too large for any and has its own; 8 fills one, 1 begins the last."""
    files = lay_out(bytes_named({"a": 4, "b": 4, "c": 9, "d": 8, "e": 1}), max_shard_bytes=8)
    assert [list(file.tensors) for file in files] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [file.name for file in files] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 20))
def test_shards_are_greedy_and_keep_the_order(sizes: list[int], most: int) -> None:
    tensors = {f"t{i}": size for i, size in enumerate(sizes)}
    files = lay_out(bytes_named(tensors), most)
    shards = [[tensors[name] for name in file.tensors] for file in files]
    assert [name for file in files for name in file.tensors] == list(tensors)
    assert all(sum(shard) <= most or len(shard) == 1 for shard in shards)
    assert all(sum(shard) + following[0] > most for shard, following in pairwise(shards))


def test_one_shard_has_a_name_without_numbers() -> None:
    assert [file.name for file in lay_out(bytes_named({"a": 1}))] == ["model.safetensors"]
    assert [file.name for file in lay_out(bytes_named({"a": 1}), stem="w")] == ["w.safetensors"]
    assert [file.name for file in lay_out(bytes_named({"a": 1}), single_name="own.safetensors")] == ["own.safetensors"]
    several = lay_out(bytes_named({"a": 1, "b": 1}), 1, stem="w", single_name="own.safetensors")
    assert [file.name for file in several] == ["w-00001-of-00002.safetensors", "w-00002-of-00002.safetensors"]


def test_larger_elements_come_first_and_the_given_order_holds_among_equals() -> None:
    (file,) = lay_out([("bytes", "I8", (3,)), ("z", "F16", (1,)), ("fours", "F4", (2,)), ("a", "BF16", (1,)), ("words", "I64", (1,))])
    assert list(file.tensors) == ["words", "z", "a", "bytes", "fours"]


def test_a_header_written_out() -> None:
    (file,) = lay_out([("b", "I8", (3,)), ("é", "F16", (1, 2))])
    text = '{"__metadata__":{"format":"pt"},"é":{"dtype":"F16","shape":[1,2],"data_offsets":[0,4]},'
    text += '"b":{"dtype":"I8","shape":[3],"data_offsets":[4,7]}}'
    padded = text.encode() + b" " * (-len(text.encode()) % 8)
    assert file.header == len(padded).to_bytes(8, "little") + padded
    assert file.size == len(file.header) + 7


def test_a_header_that_would_be_too_long_asks_for_smaller_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "MAX_HEADER_BYTES", 64)
    with pytest.raises(HeaderError, match=r"^a: the header of its file would need \d+ bytes; use a smaller --max-shard-size"):
        lay_out(bytes_named({"a": 1}))


def test_an_index_written_out() -> None:
    files = lay_out([("b", "F32", (2,)), ("a", "U8", (3,))], max_shard_bytes=8)
    assert index_json(files) == (
        '{\n  "metadata": {\n    "total_size": 11\n  },\n  "weight_map": {\n'
        '    "a": "model-00002-of-00002.safetensors",\n    "b": "model-00001-of-00002.safetensors"\n  }\n}\n'
    )


@unhurried
@given(NAMED_ARRAYS, st.integers(1, 300))
def test_shards_and_their_index_are_read_as_one(arrays: dict[str, Array], most: int) -> None:
    files = lay_out(triples(arrays), most)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in files:
            (folder / file.name).write_bytes(written(file, arrays))
        index = folder / "model.safetensors.index.json"
        index.write_text(index_json(files), "utf-8")
        assert json.loads(index_json(files))["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
        tensors = open_index(folder, index) if arrays else TensorSet([folder / files[0].name])
        assert_same_tensors({name: tensors.array(name) for name in tensors}, arrays)
        assert tensors.nbytes == sum(array.nbytes for array in arrays.values())
        assert {name: tensors.files[info.file].path.name for name, info in tensors.items()} == {
            name: file.name for file in files for name in file.tensors
        }


# Hostile indexes

INDEX = "model.safetensors.index.json"


def put(folder: Path, file: str, *names: str) -> None:
    """A weight file that holds a byte under each name: the name's first letter."""
    arrays = {name: np.frombuffer(name[:1].encode(), np.uint8) for name in names}
    (laid_out,) = lay_out(triples(arrays))
    (folder / file).write_bytes(written(laid_out, arrays))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """x in a.safetensors, y and z in b.safetensors, and no index yet."""
    put(tmp_path, "a.safetensors", "x")
    put(tmp_path, "b.safetensors", "y", "z")
    return tmp_path


SHARD_OF = {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}


def index_refusal(folder: Path, document: Any) -> str:
    (folder / INDEX).write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    with pytest.raises(HeaderError) as caught:
        open_index(folder, folder / INDEX)
    return str(caught.value)


def test_the_index_that_the_hostile_ones_differ_from_is_valid(shards: Path) -> None:
    (shards / INDEX).write_text(json.dumps({"weight_map": SHARD_OF}), "utf-8")
    tensors = open_index(shards, shards / INDEX)
    assert {name: tensors.array(name).tobytes() for name in tensors} == {"x": b"x", "y": b"y", "z": b"z"}
    assert len(tensors) == 3


@pytest.mark.parametrize(
    "document",
    [
        [],
        None,
        "weight_map",
        {},
        {"weight_map": None},
        {"weight_map": []},
        {"weight_map": {"x": 1}},
        {"weight_map": {"x": ["a.safetensors"]}},
    ],
    ids=str,
)
def test_an_index_of_the_wrong_types_is_refused(shards: Path, document: Any) -> None:
    assert index_refusal(shards, document) == f"{INDEX}: weight_map must map tensor names to file names"


@pytest.mark.parametrize(
    ("document", "found"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', "the key 'x' is there twice"),
        (b'{"weight_map": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
    ids=["cut off", "not UTF-8", "twice", "NaN", "deep"],
)
def test_an_index_that_is_not_strict_json_is_refused(shards: Path, document: bytes, found: str) -> None:
    message = index_refusal(shards, document)
    assert message.startswith(f"{INDEX}: ")
    assert found in message


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "..", ".", "", "./a.safetensors", "a.safetensors/", "..\\x", "a\0b"]
)
def test_a_shard_outside_the_folder_is_not_followed(tmp_path: Path, shard: str) -> None:
    """The file is there, so that only its name is wrong."""
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    for file in ("../x.safetensors", "a/b.safetensors", "a.safetensors"):
        put(folder, file, "x")
    message = index_refusal(folder, {"weight_map": {"x": shard}})
    assert message == f"{INDEX}: the shard name {shard!r} leaves the folder; only plain file names are followed"


def test_an_absolute_shard_inside_the_folder_is_not_followed(shards: Path) -> None:
    assert "leaves the folder" in index_refusal(shards, {"weight_map": {"x": str(shards / "a.safetensors")}})


def test_a_missing_shard_is_named(shards: Path) -> None:
    message = index_refusal(shards, {"weight_map": {**SHARD_OF, "w": "c.safetensors"}})
    assert message == f"{INDEX}: lists c.safetensors, which is not in the folder: copy it there"


def test_a_folder_is_no_shard(shards: Path) -> None:
    (shards / "c.safetensors").mkdir()
    assert "lists c.safetensors" in index_refusal(shards, {"weight_map": {**SHARD_OF, "w": "c.safetensors"}})


@pytest.mark.parametrize(
    ("weight_map", "found"),
    [
        ({**SHARD_OF, "y": "a.safetensors"}, "says that tensor 'y' is in a.safetensors, but it is in b.safetensors"),
        ({**SHARD_OF, "w": "a.safetensors"}, "says that tensor 'w' is in a.safetensors, but no shard has it"),
        ({"x": "a.safetensors", "y": "b.safetensors"}, "does not list tensor 'z', which b.safetensors holds"),
    ],
    ids=["another shard", "no shard", "unlisted"],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(shards: Path, weight_map: dict[str, str], found: str) -> None:
    assert index_refusal(shards, {"weight_map": weight_map}) == f"{INDEX}: {found}"


def test_a_tensor_in_two_shards_is_refused(shards: Path) -> None:
    put(shards, "a.safetensors", "x", "y")
    message = index_refusal(shards, {"weight_map": SHARD_OF})
    assert message == "tensor 'y' is in a.safetensors and again in b.safetensors; which one counts cannot be known"


def test_a_hostile_shard_is_refused_by_its_own_name(shards: Path) -> None:
    (shards / "b.safetensors").write_bytes(one(dtype="F33"))
    assert index_refusal(shards, {"weight_map": SHARD_OF}).startswith("b.safetensors: tensor 'w' has the unknown dtype")


def test_a_shard_name_that_no_file_can_have_is_refused(shards: Path) -> None:
    index_refusal(shards, {"weight_map": {"x": "a" * 300}})


def test_an_index_of_more_than_100_mb_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(HeaderError, match=f"{re.escape(INDEX)}: 100000001 bytes is more than such a file can need"):
        open_index(tmp_path, tmp_path / INDEX)


# Which files are read


def chosen(path: Path, prefix: str = "") -> list[str]:
    """The names of the files that ``Location`` opens."""
    return [file.path.name for file in Location.of(path).tensors(prefix).files]


def index(folder: Path, name: str, weight_map: Mapping[str, str]) -> None:
    (folder / name).write_text(json.dumps({"weight_map": weight_map}), "utf-8")


def refused(path: Path, found: Sequence[str]) -> None:
    with pytest.raises(UnreadableError) as caught:
        chosen(path)
    assert all(part in str(caught.value) for part in found)


def test_the_only_weight_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    put(tmp_path, "weights-of-mine.safetensors", "x")
    assert chosen(tmp_path) == ["weights-of-mine.safetensors"]


def test_an_index_is_read_and_files_that_it_does_not_list_are_not(shards: Path) -> None:
    index(shards, INDEX, SHARD_OF)
    put(shards, "adapter.safetensors", "x")
    assert chosen(shards) == ["a.safetensors", "b.safetensors"]


def test_several_weight_files_without_an_index_are_refused(shards: Path) -> None:
    refused(shards, [shards.name, "2 .safetensors files and no index", "name the weight file"])


def test_model_safetensors_is_preferred_among_several_without_an_index(shards: Path) -> None:
    put(shards, "model.safetensors", "m")
    assert chosen(shards) == ["model.safetensors"]


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    refused(tmp_path, [tmp_path.name, "no .safetensors file"])


def test_several_indexes_are_refused_by_name(shards: Path) -> None:
    index(shards, INDEX, SHARD_OF)
    index(shards, "other.safetensors.index.json", SHARD_OF)
    refused(shards, ["several indexes", INDEX, "other.safetensors.index.json"])


def test_an_index_copied_from_the_base_model_does_not_win_over_the_prefix(tmp_path: Path) -> None:
    """It lists shards that are not there, so that reading it would fail."""
    put(tmp_path, "quant_model_weights.safetensors", "q")
    index(tmp_path, INDEX, {"x": "model-00001-of-00002.safetensors"})
    assert chosen(tmp_path, "quant_model_weight") == ["quant_model_weights.safetensors"]
    refused(tmp_path, ["lists model-00001-of-00002.safetensors"])


def test_an_index_of_the_prefix_wins_over_another_index(shards: Path) -> None:
    index(shards, "quant_model_weights.safetensors.index.json", SHARD_OF)
    index(shards, INDEX, {"x": "model-00001-of-00002.safetensors"})
    assert chosen(shards, "quant_model_weights") == ["a.safetensors", "b.safetensors"]


def test_a_prefix_that_no_file_has_changes_nothing(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors", "m")
    assert chosen(tmp_path, "quant_model_weight") == ["model.safetensors"]


def test_a_named_file_is_read_whatever_lies_beside_it(shards: Path) -> None:
    index(shards, INDEX, SHARD_OF)
    assert chosen(shards / "b.safetensors") == ["b.safetensors"]
    assert chosen(shards / "b.safetensors", "a") == ["b.safetensors"]


def test_a_named_index_is_read_among_several(shards: Path) -> None:
    index(shards, INDEX, SHARD_OF)
    index(shards, "other.safetensors.index.json", {"x": "a.safetensors"})
    assert chosen(shards / "other.safetensors.index.json") == ["a.safetensors"]


def test_a_location_knows_the_names_beside_the_file(shards: Path) -> None:
    (shards / "config.json").write_text('{"bits": 4}', "utf-8")
    for path in (shards, shards / "a.safetensors", str(shards)):
        location = Location.of(path)
        assert location.folder == shards
        assert location.names == ("a.safetensors", "b.safetensors", "config.json")
        assert location.json("config.json") == {"bits": 4}
        assert location.json("other.json") is None


def test_nothing_at_the_path_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="nowhere: there is no such file or folder"):
        Location.of(tmp_path / "nowhere")
    with pytest.raises(UnreadableError, match=r"nowhere\.json: there is no such file$"):
        Location.of(tmp_path, description=tmp_path / "nowhere.json")


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"a": 1, "a": 2}', '{"a": Infinity}'])
def test_a_json_beside_the_weights_is_a_strict_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, "utf-8")
    with pytest.raises(UnreadableError, match=r"config\.json: "):
        Location.of(tmp_path).json("config.json")
