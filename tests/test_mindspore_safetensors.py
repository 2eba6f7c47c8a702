"""MindSpore's safetensors: 4-bit tensors and the CRC in the metadata, as the real one wrote them, and written."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import FIXTURES
from safetensors.numpy import save_file

from convert.outputs import FileOutput
from formats.errors import RefusedError, UnreadableError
from formats.mindspore_safetensors import MindSporeSafetensors, lay_out_mindspore_safetensors
from formats.safetensors_file import DTYPES, SafetensorsFile

GOLDENS = FIXTURES / "mindspore"


def test_every_dtype_is_what_was_saved() -> None:
    file = MindSporeSafetensors(GOLDENS / "st_all.safetensors")
    with np.load(GOLDENS / "dtypes.expected.npz") as saved:
        wanted = {key: saved[key] for key in saved if not key.endswith((".as_f32", ".nibbles"))}
    assert file.tensors.keys() == wanted.keys()
    for key, array in wanted.items():
        assert (file.array(key).shape, file.array(key).tobytes()) == (array.shape, array.tobytes()), key
    assert file.metadata == {"format": "ms", "t.qint4x2": "Int4"}
    assert file.crc is None
    with pytest.raises(UnreadableError, match="holds no CRC to check"):
        file.check_crc()


def test_the_crc_is_that_of_the_golden(tmp_path: Path) -> None:
    file = MindSporeSafetensors(GOLDENS / "st_crc.safetensors")
    file.check_crc()
    file.check_crc(jobs=2)
    content = bytearray((GOLDENS / "st_crc.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UnreadableError, match=r"w.safetensors: its CRC is \d+, and 3814134307 is what it was saved with"):
        MindSporeSafetensors(tmp_path / "w.safetensors").check_crc()


def written(path: Path, arrays: dict[str, np.ndarray[Any, Any]], metadata: dict[str, str] | None) -> MindSporeSafetensors:
    save_file(arrays, path, metadata)
    return MindSporeSafetensors(path)


@pytest.mark.parametrize(
    ("value", "counted"),
    [
        (np.array(5, np.int64), bytes(5)),
        (np.array(7, np.uint8), bytes(7)),
        (np.array(True), b"\1"),
        (np.array(1.5, np.float32), b"\0\0\xc0\x3f"),
    ],
)
def test_a_scalar_of_whole_numbers_counts_as_zeros(tmp_path: Path, value: np.ndarray[Any, Any], counted: bytes) -> None:
    """Python's ``bytes`` of it, of which MindSpore takes the CRC."""
    assert bytes(value) == counted
    crc = zlib.crc32(b"vec" + b"\1\2", zlib.crc32(b"s" + counted))
    file = written(tmp_path / "w.safetensors", {"s": value, "vec": np.array([1, 2], np.int8)}, {"format": "ms", "crc_num": str(crc)})
    file.check_crc()


def test_a_negative_scalar_has_no_crc(tmp_path: Path) -> None:
    file = written(tmp_path / "w.safetensors", {"s": np.array(-1, np.int32)}, {"format": "ms", "crc_num": "0"})
    with pytest.raises(UnreadableError, match=r"w.safetensors: the scalar 's' is -1, of which MindSpore makes no CRC"):
        file.check_crc()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"q": "Int4"}, "its metadata say that tensor 'q' is 'Int4', and it is not there; wanted Int4 in I8"),
        ({"f": "Int4"}, "its metadata say that tensor 'f' is 'Int4', and it is F32; wanted Int4 in I8"),
        ({"i": "Int8"}, "its metadata say that tensor 'i' is 'Int8', and it is I8; wanted Int4 in I8"),
        ({"format": "ms", "crc_num": "ff"}, "its crc_num is 'ff', wanted a number of 32 bits"),
        ({"format": "ms", "crc_num": ""}, "its crc_num is '', wanted a number of 32 bits"),
        ({"format": "ms", "crc_num": "-1"}, "its crc_num is '-1', wanted a number of 32 bits"),
        ({"format": "ms", "crc_num": "²"}, "its crc_num is '²', wanted a number of 32 bits"),
        ({"format": "ms", "crc_num": "4294967296"}, "its crc_num is '4294967296', wanted a number of 32 bits"),
    ],
)
def test_metadata_that_contradict_the_tensors(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    arrays = {"f": np.zeros(2, np.float32), "i": np.zeros(2, np.int8)}
    with pytest.raises(UnreadableError) as raised:
        written(tmp_path / "w.safetensors", arrays, metadata)
    assert str(raised.value) == f"w.safetensors: {message}"


def test_a_tensor_with_the_name_of_a_key(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="a tensor is called 'format', as a key of the metadata is; MindSpore cannot load it"):
        written(tmp_path / "w.safetensors", {"format": np.zeros(2, np.float32)}, {"format": "ms"})
    assert written(tmp_path / "v.safetensors", {"format": np.zeros(2, np.float32)}, None).crc is None


@pytest.mark.parametrize("name", ["st_all", "st_crc"])
def test_a_golden_is_written_again(tmp_path: Path, name: str) -> None:
    """Metadata and data of the real one; the order of tensors and of metadata is another, which MindSpore itself does not keep."""
    golden = MindSporeSafetensors(GOLDENS / f"{name}.safetensors")
    triples = [(key, golden.metadata.get(key, info.dtype), info.shape) for key, info in golden.tensors.items()]
    laid_out = lay_out_mindspore_safetensors(triples, "w.safetensors", crc=golden.crc is not None)
    output = FileOutput(tmp_path, laid_out)
    output.make()
    for key, info in laid_out.tensors.items():
        output.write(info, golden.array(key).reshape(-1, (info.shape or (1,))[-1]), 0, 0)
    output.finish()
    file = MindSporeSafetensors(output.path)
    assert file.metadata == golden.metadata
    assert output.path.stat().st_size == laid_out.size
    assert {key: file.array(key).tobytes() for key in file.tensors} == {key: golden.array(key).tobytes() for key in golden.tensors}
    header = output.path.read_bytes()[8:]
    assert json.loads(header[: int.from_bytes(output.path.read_bytes()[:8], "little")])["__metadata__"] == golden.metadata


def test_a_small_crc_leaves_the_offsets_as_they_were(tmp_path: Path) -> None:
    """Ten digits have room; this one has six."""
    value = next(n for n in range(1 << 20) if zlib.crc32(b"w" + n.to_bytes(4, "little")) < 1_000_000)
    laid_out = lay_out_mindspore_safetensors([("w", "U32", (1,))], "w.safetensors", crc=True)
    output = FileOutput(tmp_path, laid_out)
    output.make()
    output.write(laid_out.tensors["w"], np.array([[value]], np.uint32), 0, 0)
    output.finish()
    file = MindSporeSafetensors(output.path)
    assert len(file.metadata["crc_num"]) < 10
    assert file.array("w").tolist() == [value]
    file.check_crc()
    assert SafetensorsFile(output.path).tensors["w"] == laid_out.tensors["w"]


@pytest.mark.parametrize(
    ("triples", "crc", "message"),
    [
        ([], False, "w.safetensors: would hold no tensor, which MindSpore does not load"),
        ([("w", "F8_E4M3", (2,))], False, "w: is F8_E4M3, which MindSpore cannot load; it takes BOOL, "),
        ([("w", "C64", (2,))], False, "w: is C64, which MindSpore cannot load; it takes BOOL, "),
        (
            [("crc_num", "F16", (2,))],
            False,
            "crc_num: a tensor with the name of a key of the metadata, which MindSpore cannot load; rename it",
        ),
        (
            [("s", "I64", ())],
            True,
            "s: is a scalar of whole numbers, of which MindSpore makes no CRC or a wrong one; write the file without",
        ),
        (
            [("s", "Int4", ())],
            True,
            "s: is a scalar of whole numbers, of which MindSpore makes no CRC or a wrong one; write the file without",
        ),
        ([("w", "BF16", (2,))], True, "w: is BF16, of which MindSpore makes no CRC or a wrong one; write the file without"),
    ],
)
def test_what_it_would_not_load_is_refused(triples: list[tuple[str, str, tuple[int, ...]]], crc: bool, message: str) -> None:
    with pytest.raises(RefusedError) as raised:
        lay_out_mindspore_safetensors(triples, "w.safetensors", crc=crc)
    assert message in str(raised.value)


def test_every_dtype_that_it_loads_has_a_name() -> None:
    for dtype in ("BOOL", "BF16", "F64", "U16"):
        assert dtype in DTYPES
        assert lay_out_mindspore_safetensors([("w", dtype, (2,))], "w.safetensors").tensors["w"].dtype == dtype
