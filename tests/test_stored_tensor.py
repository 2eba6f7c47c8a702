"""Tensors that lie in files, against NumPy; the memory that workers use again; and files that are read by position."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from formats.errors import UnreadableError
from formats.files import ReadableFile
from formats.ir import Array
from formats.safetensors_file import DTYPES
from formats.stored_tensor import StoredTensor, raw_chunks
from formats.workspace import Workspace, empty

unhurried = settings(deadline=None, max_examples=200)
KINDS = st.sampled_from(list(DTYPES.values()))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensors") / "weights"


def stored(path: Path, values: Array, before: int = 0) -> StoredTensor:
    """``values`` in a file, ``before`` bytes from its begin, with something else behind it."""
    path.write_bytes(b"\xa5" * before + values.tobytes() + b"\x5a" * 7)
    return StoredTensor(ReadableFile(path), "w", values.dtype, values.shape, before, values.shape[-1] if values.shape else 1)


def values_of(shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
    """Bytes that count up, as a tensor; every element is another."""
    size = int(np.prod(shape)) * kind.itemsize
    content = (np.arange(size) * 37 % 251).astype(np.uint8)
    return (content & 1 if kind == np.bool_ else content).view(kind).reshape(shape)


def same(found: Array, wanted: Array) -> bool:
    return (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


@unhurried
@given(KINDS, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5), st.integers(0, 20))
@example(np.dtype("<f4"), (), 3)
@example(np.dtype("<f4"), (0, 3), 0)
def test_a_tensor_of_any_rank_is_what_numpy_says(path: Path, kind: np.dtype[Any], shape: tuple[int, ...], before: int) -> None:
    values = values_of(shape, kind)
    tensor = stored(path, values, before)
    assert (tensor.shape, tensor.ndim, tensor.size, tensor.nbytes) == (values.shape, values.ndim, values.size, values.nbytes)
    for found in (np.asarray(tensor), tensor.read(), tensor.read(work=Workspace())):
        assert same(found, values)
    if kind == np.float16:
        assert same(np.asarray(tensor, dtype=np.float64), values.astype(np.float64))
    if values.size:
        matrix = values.reshape(-1, shape[-1] if shape else 1)
        assert same(tensor.as_matrix().read(), matrix)
        assert tensor.as_matrix().shape == matrix.shape


SLICES = st.builds(slice, st.none() | st.integers(0, 12), st.none() | st.integers(-12, 12))


@unhurried
@given(
    KINDS,
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.lists(st.just("T") | st.tuples(st.integers(1, 10), st.integers(1, 10)), max_size=3),
    SLICES,
    SLICES,
    st.booleans(),
)
def test_a_rectangle_of_a_matrix_is_what_numpy_says(
    path: Path, kind: np.dtype[Any], shape: tuple[int, int], views: list[Any], rows: slice, cols: slice, reuse: bool
) -> None:
    """Turned, cut to a corner, turned again: what is seen is what is read, whatever rectangle of it."""
    values = values_of(shape, kind)
    tensor = stored(path, values, 8)
    for view in views:
        tensor = tensor.T if view == "T" else tensor.corner(*view)
        values = values.T if view == "T" else values[: view[0], : view[1]]
        assert tensor.shape == values.shape
    assert same(tensor.read(rows, cols, Workspace() if reuse else None), values[rows, cols])
    assert same(np.asarray(tensor), values)
    assert same(tensor.T.read(cols, rows), values.T[cols, rows])


@unhurried
@given(KINDS, st.integers(0, 30), SLICES)
def test_a_piece_of_a_vector_is_what_numpy_says(path: Path, kind: np.dtype[Any], length: int, rows: slice) -> None:
    values = values_of((length,), kind)
    assert same(stored(path, values, 5).read(rows), values[rows])


@pytest.mark.parametrize("cut", [(slice(None, None, 2), slice(None)), (slice(None), slice(None, None, -1))])
def test_steps_are_refused(path: Path, cut: tuple[slice, slice]) -> None:
    with pytest.raises(ValueError, match="in rectangles, not in steps"):
        stored(path, values_of((4, 4), np.dtype("i1"))).read(*cut)


@unhurried
@given(KINDS, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6), st.integers(1, 40))
def test_raw_chunks_are_the_bytes_in_order(path: Path, kind: np.dtype[Any], shape: tuple[int, ...], size: int) -> None:
    values = values_of(shape, kind)
    for tensor in (values, np.asfortranarray(values), stored(path, values, 3)):
        content, at = b"", 0
        for start, chunk in raw_chunks(tensor, size):
            assert start == at
            assert 0 < chunk.nbytes <= size
            content, at = content + chunk.tobytes(), at + chunk.nbytes
        assert content == values.tobytes()


# --- files ------------------------------------------------------------------------------------------------------------


@unhurried
@given(st.binary(max_size=50), st.integers(0, 60), st.integers(0, 60))
def test_a_file_is_read_whole_or_not_at_all(path: Path, content: bytes, offset: int, length: int) -> None:
    path.write_bytes(content)
    file = ReadableFile(path)
    assert file.size == len(content)
    assume(length)
    if offset + length <= len(content):
        assert file.read(offset, length) == content[offset : offset + length]
    else:
        with pytest.raises(UnreadableError, match=f"weights: ends at byte {max(offset, len(content))}, "):
            file.read(offset, length)


def test_a_file_knows_whether_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    file = ReadableFile(path)
    assert file.unchanged()
    os.utime(path, ns=(1, 1))
    assert not file.unchanged()
    path.unlink()
    assert not file.unchanged()
    assert file.read(0, 7) == b"content"


def test_a_growing_file_may_change_but_not_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    file = ReadableFile(path, growing=True)
    file._close()
    path.write_bytes(b"longer content")
    assert file.read(0, 14) == b"longer content"
    file._close()
    (tmp_path / "other").write_bytes(b"longer content")
    (tmp_path / "other").rename(path)
    with pytest.raises(UnreadableError, match="file: was replaced while it was being read"):
        file.read(0, 1)


# --- memory that is used again ----------------------------------------------------------------------------------------


@unhurried
@given(st.lists(st.tuples(st.sampled_from("abc"), hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=20), KINDS), max_size=12))
def test_a_workspace_gives_each_name_one_array_at_a_time(taken: list[tuple[str, tuple[int, ...], np.dtype[Any]]]) -> None:
    work, latest, most = Workspace(), dict[str, Array](), dict[str, int]()
    for number, (name, shape, kind) in enumerate(taken):
        array = latest[name] = work.take(name, shape, kind)
        assert (array.shape, array.dtype, array.flags.c_contiguous, array.flags.writeable) == (shape, kind, True, True)
        array.view(np.uint8)[...] = number
        most[name] = max(most.get(name, 0), array.nbytes)
        for other, kept in latest.items():
            assert other == name or not np.shares_memory(array, kept)
        assert sum(most.values()) <= work.nbytes <= sum(most.values()) + 4096 * len(most)
    for name, array in latest.items():
        last = max(number for number, (other, *_) in enumerate(taken) if other == name)
        assert (array.view(np.uint8) == last).all()


def test_a_workspace_uses_memory_again() -> None:
    work = Workspace()
    first = work.take("a", (100, 100), np.float32)
    assert np.shares_memory(first, work.take("a", (5, 7), np.int8))
    assert work.nbytes == 40_960
    assert not np.shares_memory(first, work.take("b", (100, 100), np.float32))
    assert not np.shares_memory(empty(None, "a", (3,), np.int8), empty(None, "a", (3,), np.int8))
    assert np.shares_memory(first, empty(work, "a", (3,), np.int8))
