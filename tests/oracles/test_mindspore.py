"""MindSpore 2.7.1 loads what Weighbridge writes as .ckpt and safetensors, and Weighbridge reads what MindSpore has just written.

``make oracles`` (or ``nox -s mindspore``) installs MindSpore in its own environment and runs this.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge import Tool

from convert import convert
from convert.outputs import FileOutput
from formats.errors import UnreadableError
from formats.mindspore_file import TYPES, MindSporeFile
from formats.mindspore_output import Entry, append_dict, entries_of, lay_out_checkpoint, save
from formats.mindspore_safetensors import MindSporeSafetensors, lay_out_mindspore_safetensors
from formats.safetensors_file import DTYPES

pytestmark = pytest.mark.oracle

FIXTURES = Path(__file__).parents[2] / "fixtures"
MIB = 1 << 20
SHAPES = ((), (1,), (7,), (3, 5), (64, 96), (2, 3, 4, 5), (1, 1, 9, 1), (0, 4), (5, 0))
APPENDED = {"epoch": 7, "lr": 0.1, "done": True, "note": "量化 ✓ 𝄞", "empty": "", "step": -(2**62)}
KEYS = [("AES-GCM", 16), ("AES-GCM", 24), ("AES-GCM", 32), ("AES-CBC", 16), ("AES-CBC", 24), ("AES-CBC", 32), ("SM4-CBC", 16)]


@dataclass(frozen=True)
class Tensor:
    """type: of MindSpore; content repeated so many times."""

    type: str
    shape: tuple[int, ...]
    content: bytes
    times: int = 1

    @property
    def seen(self) -> tuple[str, list[int], str]:
        """As the script and ``read`` below give what is in a file."""
        return self.type, list(self.shape), hashlib.sha256(self.content * self.times).hexdigest()

    @property
    def entry(self) -> tuple[str, tuple[int, ...]]:
        return ("Int4" if self.type == "Int4" else TYPES[self.type]), self.shape

    @property
    def array(self) -> np.ndarray[Any, Any]:
        return np.frombuffer(self.content * self.times, DTYPES[TYPES[self.type]]).reshape(self.shape)


def tensor(type: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bits; of bool, random values."""
    size = int(np.prod(shape)) * DTYPES[TYPES[type]].itemsize
    content = np.random.default_rng(seed).integers(0, 2 if type == "Bool" else 256, size, dtype=np.uint8)
    return Tensor(type, shape, content.tobytes())


def tensors_of(shapes: tuple[tuple[int, ...], ...] = SHAPES, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """One of every type that MindSpore loads in every shape."""
    types = [type for type in TYPES if type not in {"Complex64", *without}]
    return {f"{type}.{n}": tensor(type, shape, n) for type in types for n, shape in enumerate(shapes)}


class MindSpore(Tool):
    """The real one."""

    def __init__(self, folder: Path) -> None:
        super().__init__("mindspore")
        self.folder = folder

    def answers(self, *jobs: dict[str, Any]) -> list[Any]:
        path = self.folder / "jobs.json"
        path.write_text(json.dumps(jobs), "utf-8")
        found: list[Any] = json.loads(self.run("mindspore_files.py", path))
        return found

    def save(self, name: str, tensors: Mapping[str, Tensor], slice_kib: int | None = None, **options: Any) -> Path:
        """A file that it writes."""
        attributes = {"Bool": "bool_", "Int4": "qint4x2"}
        listed = [
            [key, attributes.get(one.type, one.type.lower()), one.shape, one.content.hex(), one.times] for key, one in tensors.items()
        ]
        job = {"do": "save", "file": str(self.folder / name), "tensors": listed, "options": options}
        assert self.answers({**job, "slice_kib": slice_kib} if slice_kib else job) == [None]
        return self.folder / name

    def load(self, path: Path, **options: Any) -> Any:
        """What it finds in a file, by name: (type, shape, digest); or what it says is wrong."""
        (found,) = self.answers({"do": "load", "file": str(path), "options": options})
        return found if isinstance(found, str) else {name: (type, shape, what) for name, type, shape, what in found}


@pytest.fixture
def mindspore(tmp_path: Path) -> MindSpore:
    return MindSpore(tmp_path)


def seen(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: one.seen for name, one in tensors.items()}


def read(file: MindSporeFile | MindSporeSafetensors) -> dict[str, Any]:
    """What our reader finds, as MindSpore says it."""
    back = {dtype: type for type, dtype in TYPES.items() if type != "Int4"}
    found: dict[str, Any] = {}
    for name in file.names if isinstance(file, MindSporeFile) else file.tensors:
        if isinstance(file, MindSporeFile) and name in file.texts:
            found[name] = ("text", [], file.texts[name])
            continue
        info = file.tensors[name]
        digest = hashlib.sha256(file.array(name).tobytes()).hexdigest()
        found[name] = (file.metadata.get(name, back[info.dtype]), list(info.shape), digest)
    return found


def entries(tensors: Mapping[str, Tensor]) -> list[Entry]:
    return [(name, *one.entry) for name, one in tensors.items()]


def arrays(tensors: Mapping[str, Tensor]) -> Callable[[str], np.ndarray[Any, Any]]:
    return lambda name: tensors[name].array


def has_elements(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: one for name, one in tensors.items() if 0 not in one.shape}


@pytest.mark.parametrize("crc", [False, True])
@pytest.mark.parametrize("chunk", [None, 4096, 1024])
def test_every_dtype_is_written_byte_for_byte_as_it_does(mindspore: MindSpore, chunk: int | None, crc: bool) -> None:
    tensors = tensors_of()
    kept = has_elements(tensors)
    theirs = mindspore.save("theirs.ckpt", tensors, chunk and chunk // 1024, crc_check=crc, append_dict=APPENDED)
    file = MindSporeFile(theirs)
    more, numbers = append_dict(APPENDED)
    assert read(file) == seen(kept) | {
        name: ("text", [], value)
        if isinstance(value, str)
        else (
            ("Bool" if isinstance(value, bool) else "Int64" if isinstance(value, int) else "Float32"),
            [],
            hashlib.sha256(numbers[name].tobytes()).hexdigest(),
        )
        for name, value in APPENDED.items()
    }
    if crc:
        file.check_crc()
    else:
        assert file.crc is None

    ours = mindspore.folder / "ours.ckpt"
    layout = lay_out_checkpoint([*entries(kept), *more], "ours.ckpt", crc=crc, chunk_bytes=chunk or 512 * MIB)
    save(ours, layout, lambda name: numbers[name] if name in numbers else kept[name].array)
    assert ours.read_bytes() == theirs.read_bytes()
    again = lay_out_checkpoint(entries_of(file), "again.ckpt", crc=crc, chunk_bytes=chunk or 512 * MIB)
    save(mindspore.folder / "again.ckpt", again, file.tensor)
    assert (mindspore.folder / "again.ckpt").read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("crc", [False, True])
@pytest.mark.parametrize("chunk", [None, 4096])
def test_what_its_thread_saves_is_cut_into_rows(mindspore: MindSpore, chunk: int | None, crc: bool) -> None:
    tensors = tensors_of((*SHAPES, (1, 3000), (3, 5000)), without=("Int4",))
    theirs = mindspore.save("theirs.ckpt", tensors, chunk and chunk // 1024, crc_check=crc, async_save="thread")
    assert read(MindSporeFile(theirs)) == seen(tensors)
    layout = lay_out_checkpoint(entries(tensors), "ours.ckpt", crc=crc, by_rows=True, chunk_bytes=chunk or 512 * MIB)
    save(mindspore.folder / "ours.ckpt", layout, arrays(tensors))
    assert (mindspore.folder / "ours.ckpt").read_bytes() == theirs.read_bytes()
    assert mindspore.load(mindspore.folder / "ours.ckpt", crc_check=True) == seen(tensors)


@pytest.mark.parametrize("chunk", [7, 1000, 512 * MIB])
def test_it_loads_what_tiles_wrote_in_any_order(mindspore: MindSpore, chunk: int) -> None:
    tensors = tensors_of()
    output = FileOutput(mindspore.folder, lay_out_checkpoint(entries(tensors), "ours.ckpt", crc=True, chunk_bytes=chunk))
    output.make()
    tiles = [(name, row, col) for name, one in tensors.items() for row, col in corners(one)]
    for number in np.random.default_rng(5).permutation(len(tiles)):
        name, row, col = tiles[number]
        values = tensors[name].array.reshape(-1, width(tensors[name]))
        output.write(output.file.tensors[name], values[row : row + 24, col : col + 40], row, col)
    output.finish()
    assert mindspore.load(output.path, crc_check=True) == seen(tensors)
    file = MindSporeFile(output.path)
    file.check_crc(jobs=2)

    damaged = mindspore.folder / "damaged.ckpt"
    content = bytearray(output.path.read_bytes())
    content[lay_out_checkpoint(entries(tensors), "ours.ckpt", chunk_bytes=chunk).chunks("Float32.4")[-1][0]] ^= 1
    damaged.write_bytes(content)
    assert isinstance(mindspore.load(damaged, crc_check=True), str)
    with pytest.raises(UnreadableError, match="its CRC is"):
        MindSporeFile(damaged).check_crc()


def corners(one: Tensor) -> list[tuple[int, int]]:
    """Of tiles of 24 by 40."""
    return [(row, col) for row in range(0, one.array.size // width(one), 24) for col in range(0, width(one), 40)]


def width(one: Tensor) -> int:
    return max(1, (one.shape or (1,))[-1])


@pytest.mark.parametrize("by_rows", [False, True])
def test_a_tensor_of_more_than_512_mib(mindspore: MindSpore, by_rows: bool) -> None:
    """The real size of a chunk: 513 MiB and a little, in rows that no chunk of it holds whole."""
    large = Tensor("Int8", (1026, 524293), np.random.default_rng(1).integers(0, 256, 524293, dtype=np.uint8).tobytes(), 1026)
    tensors = {"before": tensor("Float16", (3, 3)), "large": large, "after": tensor("Float32", (5,))}
    theirs = mindspore.save("theirs.ckpt", tensors, async_save="thread" if by_rows else False, crc_check=True)
    file = MindSporeFile(theirs)
    file.check_crc(jobs=2)
    assert read(file) == seen(tensors)
    rows, cols = slice(1020, 1026), slice(1000, 1100)
    np.testing.assert_array_equal(file.tensor("large").read(rows, cols), np.tile(large.array[0, cols], (6, 1)))
    layout = lay_out_checkpoint(entries_of(file), "ours.ckpt", crc=True, by_rows=by_rows)
    assert len(layout.chunks("large")) == 2
    save(mindspore.folder / "ours.ckpt", layout, file.tensor)
    assert filecmp.cmp(mindspore.folder / "ours.ckpt", theirs, shallow=False)


@pytest.mark.parametrize(("mode", "length"), KEYS)
def test_encrypted_both_ways(mindspore: MindSpore, mode: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    key = bytes(range(100, 100 + length))
    tensors = tensors_of(((3, 5), ()))
    theirs = mindspore.save("theirs.ckpt", tensors, enc_key=key.hex(), enc_mode=mode)
    monkeypatch.setenv("WEIGHBRIDGE_MINDSPORE_KEY", key.hex())
    file = MindSporeFile(theirs)
    assert (file.encryption, read(file)) == (mode, seen(tensors))
    ours = mindspore.folder / "ours.ckpt"
    save(ours, lay_out_checkpoint(entries(tensors), "ours.ckpt"), arrays(tensors), (mode, key))
    assert mindspore.load(ours, dec_key=key.hex(), dec_mode=mode) == seen(tensors)
    assert isinstance(mindspore.load(ours, dec_key=bytes(length).hex(), dec_mode=mode), str)


@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC"])
def test_encrypted_in_several_blocks(mindspore: MindSpore, mode: str) -> None:
    key = bytes(16)
    large = Tensor("Float16", (130, 524288), np.random.default_rng(2).integers(0, 256, MIB, dtype=np.uint8).tobytes(), 130)
    tensors = {"before": tensor("Float32", (3,)), "large": large, "after": tensor("Float32", (5,))}
    theirs = mindspore.save("theirs.ckpt", tensors, enc_key=key.hex(), enc_mode=mode)
    file = MindSporeFile(theirs, key=key)
    assert read(file) == seen(tensors)
    ours = mindspore.folder / "ours.ckpt"
    save(ours, lay_out_checkpoint(entries_of(file), "ours.ckpt"), file.tensor, (mode, key))
    assert ours.stat().st_size == theirs.stat().st_size
    assert mindspore.load(ours, dec_key=key.hex(), dec_mode=mode) == seen(tensors)


def test_an_encrypted_file_with_a_crc_which_it_cannot_load_itself(mindspore: MindSpore) -> None:
    tensors = {"w": tensor("Float32", (3,))}
    theirs = mindspore.save("theirs.ckpt", tensors, enc_key=bytes(16).hex(), crc_check=True)
    assert isinstance(mindspore.load(theirs, dec_key=bytes(16).hex()), str)
    assert read(MindSporeFile(theirs, key=bytes(16))) == seen(tensors)


def test_a_strategy_is_no_checkpoint(mindspore: MindSpore) -> None:
    path = mindspore.folder / "ckpt_strategy_rank_0.ckpt"
    assert mindspore.answers({"do": "strategy", "file": str(path)}) == [None]
    with pytest.raises(UnreadableError, match="is the strategy of a parallel run"):
        MindSporeFile(path)


RANKED = {
    "ptq_a16w4_pg_gs120": "mindspore:gs1.2",
    "ptq_a8w8_gs120": "mindspore:gs1.2",
    "rtn_a16w8_gs060": "mindspore:gs0.6",
    "sq_a8w8_gs060": "mindspore:gs0.6",
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("golden", RANKED)
def test_it_merges_the_ranks_that_we_write_to_the_model_that_was_split(mindspore: MindSpore, golden: str, ranks: int) -> None:
    """Its transform_checkpoints, which says Int8 of Int4, and where it can, its merge_sliced_parameter."""
    source, base = FIXTURES / "golden_stick" / f"{golden}.ckpt", FIXTURES / "golden_stick"
    convert(source, mindspore.folder / "one", RANKED[golden], base_model=base)
    convert(source, mindspore.folder / "ranks", RANKED[golden], base_model=base, tp=ranks)
    (whole,) = (mindspore.folder / "one" / "rank_0").iterdir()
    job = {"do": "merge", "folder": str(mindspore.folder / "ranks"), "out": str(mindspore.folder / "merged"), "file": str(whole)}
    (merged,) = mindspore.answers(job)
    assert isinstance(merged, list), merged
    wanted = {name: (type.replace("Int4", "Int8"), shape, digest) for name, (type, shape, digest) in mindspore.load(whole).items()}
    assert {name: (type, shape, digest) for name, type, shape, digest in merged} == wanted
    assert len(wanted) > 21


@pytest.mark.parametrize(("cut", "wanted"), [(4, "takes 12 bytes, and 8 are there"), (0, None)], ids=["short", "whole"])
def test_it_pads_what_is_short_and_we_do_not(mindspore: MindSpore, cut: int, wanted: str | None) -> None:
    length = 12 - cut
    content = bytes(range(1, 1 + length))
    tensor_field = b"\x08\x03\x12\x07Float32\x1a" + bytes([length]) + content
    value = b"\x0a\x01w\x12" + bytes([len(tensor_field)]) + tensor_field
    path = mindspore.folder / "w.ckpt"
    path.write_bytes(b"\x0a" + bytes([len(value)]) + value)
    assert mindspore.load(path) == {"w": ("Float32", [3], hashlib.sha256(content + bytes(cut)).hexdigest())}
    if wanted is None:
        assert read(MindSporeFile(path)) == mindspore.load(path)
    else:
        with pytest.raises(UnreadableError, match=wanted):
            MindSporeFile(path)


@pytest.mark.parametrize("crc", [False, True])
def test_safetensors_both_ways(mindspore: MindSpore, crc: bool) -> None:
    without = ("BFloat16",) if crc else ()  # of which it makes no CRC
    shapes = tuple(shape for shape in (*SHAPES, (0,)) if shape != () or not crc)
    tensors = tensors_of(shapes, without)
    theirs = mindspore.save("theirs.safetensors", tensors, crc_check=crc, format="safetensors")
    file = MindSporeSafetensors(theirs)
    assert read(file) == seen(tensors)
    assert {name: type for name, (type, _, _) in read(file).items() if type == "Int4"} == {
        name: said for name, said in file.metadata.items() if said == "Int4"
    }
    assert (file.crc is None) is not crc
    if crc:
        file.check_crc()

    layout = lay_out_mindspore_safetensors([(name, *one.entry) for name, one in tensors.items()], "ours.safetensors", crc=crc)
    output = FileOutput(mindspore.folder, layout)
    output.make()
    for name, one in has_elements(tensors).items():
        output.write(layout.tensors[name], one.array.reshape(-1, width(one)), 0, 0)
    output.finish()
    assert mindspore.load(output.path, format="safetensors", crc_check=crc) == seen(tensors)
    assert MindSporeSafetensors(output.path).crc == file.crc


@pytest.mark.parametrize("type", ["Int64", "UInt8", "Int32", "Bool", "Float32", "Float64"])
def test_the_crc_of_a_scalar(mindspore: MindSpore, type: str) -> None:
    """Whole numbers count as so many zero bytes (``bytes(array)``); the others as what they are."""
    one = Tensor(type, (), b"\x01" if type == "Bool" else np.array(5, DTYPES[TYPES[type]]).tobytes())
    theirs = mindspore.save("theirs.safetensors", {"s": one, "w": tensor("Float32", (3,))}, crc_check=True, format="safetensors")
    MindSporeSafetensors(theirs).check_crc()


def test_what_is_refused_in_a_crc_of_safetensors_it_cannot_do(mindspore: MindSpore) -> None:
    for one in (tensor("BFloat16", (3,)), Tensor("Int64", (), (-1).to_bytes(8, "little", signed=True))):
        job = {"do": "save", "file": str(mindspore.folder / "w.safetensors"), "options": {"crc_check": True, "format": "safetensors"}}
        listed = [["w", one.type.lower(), one.shape, one.content.hex(), 1]]
        (answer,) = mindspore.answers({**job, "tensors": listed})
        assert isinstance(answer, str), one
