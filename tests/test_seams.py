"""Files whose tensors lie in pieces, by addresses that leave out what lies between them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.errors import UnreadableError
from formats.files import ReadableFile
from formats.seams import SeamlessFile, Seams


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seams") / "data"


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=8), st.integers(0, 9), st.data())
def test_what_is_between_pieces_is_left_out(path: Path, parts: list[tuple[int, int]], rest: int, data: st.DataObject) -> None:
    content, kept, seams = bytearray(), bytearray(), Seams()
    for keep, skip in parts:
        piece = bytes(range(len(kept) + 1, len(kept) + 1 + keep))
        content += piece
        kept += piece
        seams.add(len(content), len(content) + skip)
        content += b"\xff" * skip
    tail = bytes(range(len(kept) + 1, len(kept) + 1 + rest))
    content, kept = content + tail, kept + tail
    path.write_bytes(content)
    file = SeamlessFile(ReadableFile(path), seams)
    assert file.size == len(kept)
    begin = data.draw(st.integers(0, len(kept)))
    end = data.draw(st.integers(begin, len(kept)))
    assert file.read(begin, end - begin) == kept[begin:end]
    assert b"".join(content[at : at + length] for at, length in seams.pieces(begin, end - begin)) == kept[begin:end]
    with pytest.raises(UnreadableError, match="too early"):
        file.read(begin, len(kept) - begin + 1)
