"""Ranks of MindSpore checkpoints: read as one model by their strategy file, and written, each with its part of every tensor."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoints import FIXTURES
from killing import small_tiles
from places import fails, path_of, succeeds

from convert import convert, fingerprint, plan, verify
from formats import open_checkpoint
from formats.errors import RefusedError, UnreadableError, UsageError
from formats.ir import Array, read
from formats.mindformers_file import split_axis
from formats.mindformers_names import LLAMA
from formats.mindspore_file import MindSporeFile
from formats.mindspore_output import lay_out_checkpoint
from formats.mindspore_ranks import ParameterLayout, read_strategy
from formats.protobuf import bytes_field, varint_field
from formats.safetensors_file import stored_tensor

GOLDENS = FIXTURES / "golden_stick"

RANKS = FIXTURES / "golden_stick_ranks"


def copy_of_ranks(folder: Path) -> Path:
    shutil.copytree(RANKS, folder)
    return folder


def test_ranks_are_read_as_the_model_that_mindspore_split(tmp_path: Path) -> None:
    """Four ranks, two copies of two parts: codes split along inputs and outputs, scales by output and by group."""
    whole, ranks = MindSporeFile(GOLDENS / "ptq_a16w4_pg_gs120.ckpt"), open_checkpoint(RANKS)
    stored = ranks.tensors.files[0].stored  # type: ignore[attr-defined]
    names = [name for name in whole.tensors if ".layers.1." not in name]
    assert set(stored.tensors) == set(names)
    for name in names:
        found = stored_tensor(stored.data, name, stored.tensors[name])
        np.testing.assert_array_equal(found.read(), whole.array(name))
    # A part of the rows and columns, across the ranks' borders.
    name = "model.layers.0.feed_forward.w2._layer.weight"
    found = stored_tensor(stored.data, name, stored.tensors[name])
    np.testing.assert_array_equal(found.read(slice(200, 300), slice(30, 100)), whole.array(name)[200:300, 30:100])
    source, prints = fingerprint(GOLDENS / "ptq_a16w4_pg_gs120.ckpt"), fingerprint(RANKS)
    assert {name: source.tensors[name] for name in prints.tensors} == prints.tensors
    convert(RANKS, tmp_path / "out", "awq", base_model=GOLDENS)
    assert fingerprint(tmp_path / "out").digest == prints.digest


def test_a_strategy_file_may_lie_beside_or_above(tmp_path: Path) -> None:
    ranks = copy_of_ranks(tmp_path / "ranks")
    (tmp_path / "strategy").mkdir()
    shutil.move(ranks / "ckpt_strategy_rank_0.ckpt", tmp_path / "strategy" / "ckpt_strategy_rank_0.ckpt")
    assert fingerprint(ranks).digest == fingerprint(RANKS).digest
    shutil.rmtree(tmp_path / "strategy")
    assert "holds 4 ranks, each a part of the model, and no ckpt_strategy_rank_0.ckpt says which" in fails(5, "inspect", ranks)


def test_ranks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    strategy = "ckpt_strategy_rank_0.ckpt"
    missing = copy_of_ranks(tmp_path / "missing")
    shutil.rmtree(missing / "rank_2")
    assert "missing: rank_2 is missing; wanted one in each of rank_0 to rank_2" in fails(5, "inspect", missing)
    fewer = copy_of_ranks(tmp_path / "fewer")
    shutil.rmtree(fewer / "rank_3")
    assert "over 4 devices; it is of another run" in fails(5, "inspect", fewer)
    other = copy_of_ranks(tmp_path / "other")
    shutil.copy(GOLDENS / "ptq_a16w4_pg_gs120.ckpt", other / "rank_1" / "checkpoint_1.ckpt")
    assert "in rank 1, and" in fails(5, "inspect", other)
    two = copy_of_ranks(tmp_path / "two")
    shutil.copy(two / "rank_1" / "checkpoint_1.ckpt", two / "rank_1" / "again.ckpt")
    assert "rank_1 holds 2 .ckpt files" in fails(5, "inspect", two)
    empty = copy_of_ranks(tmp_path / "empty")
    (empty / strategy).write_bytes(b"\x08\x00")
    assert "says how no parameter is split" in fails(5, "inspect", empty)
    broken = copy_of_ranks(tmp_path / "broken")
    (broken / strategy).write_bytes((RANKS / strategy).read_bytes()[:-5])
    assert strategy in fails(5, "inspect", broken)


@pytest.mark.parametrize("position", range(0, 1900, 97))
def test_a_strategy_with_a_wrong_byte_is_read_or_refused(position: int, tmp_path: Path) -> None:
    data = bytearray((RANKS / "ckpt_strategy_rank_0.ckpt").read_bytes())
    data[position] ^= 0xFF
    (tmp_path / "ckpt_strategy_rank_0.ckpt").write_bytes(bytes(data))
    with contextlib.suppress(UnreadableError, RefusedError):
        read_strategy(tmp_path / "ckpt_strategy_rank_0.ckpt")


PLACES = {
    (1, 0): [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    (2,): [0] * 12 + [1] * 12,
    (0, 2): [0, 2, 4, 0, 2, 4, 0, 2, 4, 0, 2, 4, 1, 3, 5, 1, 3, 5, 1, 3, 5, 1, 3, 5],
    (-1, 1): [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
}
"""By tensor_map, what MindSpore's ``_get_tensor_slice_index`` (2.7.1) says of 24 ranks whose dev_matrix is [2, 4, 3]."""


@pytest.mark.parametrize("split", PLACES)
def test_layouts_place_ranks_as_mindspore_does(split: tuple[int, ...]) -> None:
    layout = ParameterLayout((2, 4, 3), split)
    assert [int(np.ravel_multi_index(layout.place(rank), layout.counts())) for rank in range(24)] == PLACES[split]


WRITTEN = {
    "rtn_a16w8_gs060": "gs0.6",
    "ptq_a16w8_gs060": "gs0.6",
    "ptq_a8w8_gs120": "gs1.2",
    "ptq_a16w4_pg_gs120": "gs1.2",
    "ptq_a16w8_gs120": "gs1.2",
    "sq_a8w8_gs060": "gs0.6",
}


def part(name: str, whole: Array, rank: int, ranks: int, int4: bool) -> Array:
    """What a rank holds, by the table in Golden Stick's hal.py, told again: of a column-parallel cell its outputs, of a row-parallel
    one its inputs."""
    if "norm" in name:
        return whole
    axis: int | None
    if re.search(r"input_scale$|input_zp$|smooth_scale$", name):
        axis = 0 if re.search("attention.wo|feed_forward.w2", name) and len(whole) > 1 else None
    elif re.search("attention.wo|feed_forward.w2", name):
        axis = None if whole.ndim == 1 else 0 if int4 or not name.endswith("weight") else 1
    else:
        axis = 1 if whole.ndim == 2 and (int4 or not name.endswith("weight")) else 0
    return whole if axis is None else np.split(whole, ranks, axis)[rank]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("golden", WRITTEN)
def test_each_rank_holds_its_part_and_together_they_are_the_model(golden: str, ranks: int, tmp_path: Path) -> None:
    source, variant = GOLDENS / f"{golden}.ckpt", f"mindspore:{WRITTEN[golden]}"
    if "sq_a8w8" in golden:
        source = GOLDENS / "sq_a8w8_gs060.ckpt"
    one = convert(source, tmp_path / "one", variant, base_model=GOLDENS)
    several = convert(source, tmp_path / "several", variant, base_model=GOLDENS, tp=ranks)
    assert one.exact
    assert several.exact
    assert several.target_fingerprint == one.target_fingerprint
    assert fingerprint(tmp_path / "several").digest == fingerprint(source).digest
    (path,) = (tmp_path / "one" / "rank_0").iterdir()
    whole = MindSporeFile(path)
    split = 0
    for rank in range(ranks):
        found = MindSporeFile(tmp_path / "several" / f"rank_{rank}" / path.name)
        assert list(found.tensors) == list(whole.tensors)
        assert found.metadata == whole.metadata
        for name in whole.tensors:
            wanted = part(name, whole.array(name), rank, ranks, name in whole.metadata)
            assert found.array(name).shape == wanted.shape, name
            assert found.array(name).tobytes() == wanted.tobytes(), name
            split += wanted.shape != whole.tensors[name].shape
    assert split > 14 * ranks
    document = yaml.safe_load((tmp_path / "several" / "predict_golden_stick_a8w8.yaml").read_text()) if "a8w8" in golden else None
    if document is not None:
        assert (document["use_parallel"], document["parallel_config"]["model_parallel"]) == (True, ranks)
    assert not list((tmp_path / "several").glob("*.ckpt"))  # MindFormers would take one for the whole model


def test_ranks_of_a_float_model_and_tiles_that_cross_their_borders(tmp_path: Path) -> None:
    """Tiles of one leaf, 64 x 1024, which are cut within ranks and across them."""
    source = GOLDENS / "ptq_a16w8_gs060.ckpt"
    convert(source, tmp_path / "one", "mindspore:float", base_model=GOLDENS, scale_dtype="float32")
    with small_tiles():
        convert(tmp_path / "one", tmp_path / "ranks", "mindspore", tp=4, jobs=2)
    assert verify(tmp_path / "one", tmp_path / "ranks").same
    again = convert(tmp_path / "ranks", tmp_path / "again", "mindspore:float", scale_dtype="float32")
    assert again.exact
    (first,), (second,) = ((tmp_path / place / "rank_0").iterdir() for place in ("one", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_a_vocabulary_that_does_not_divide_stays_whole_and_other_tensors_are_refused_by_name(tmp_path: Path) -> None:
    assert split_axis(LLAMA, "model.tok_embeddings.embedding_weight", "F16", (321, 256), 2) is None
    assert split_axis(LLAMA, "model.tok_embeddings.embedding_weight", "F16", (320, 256), 2) == 0
    assert split_axis(LLAMA, "lm_head.weight", "F16", (321, 256), 2) is None
    cache = "model.layers.0.attention.infer_attention.paged_attention_mgr.key_value_t_scale"
    assert split_axis(LLAMA, cache, "I64", (2, 128), 2) == 1
    source = GOLDENS / "ptq_a16w4_pg_gs120.ckpt"
    said = fails(3, "convert", source, tmp_path / "out", "--to", "mindspore", "--base-model", GOLDENS, "--tp", "3")
    assert "config.json: needs a part for each of 3 ranks; mindspore:gs1.2 cannot split it: 4 heads of keys do not divide" in said
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(source, bare)
    said = fails(3, "convert", bare, tmp_path / "out", "--to", "mindspore", "--tp", "8")
    assert "self_attn.o_proj._layer.matmul.weight_scale: needs a part for each of 8 ranks" in said
    assert "its 4 rows as it is stored [4, 256] do not divide over 8 ranks; give --tp a number that divides them" in said
    said = fails(3, "convert", bare, tmp_path / "out", "--to", "mindspore", "--tp", "2", "--qkv-concat")
    assert "attention.w_qkv" in said
    assert "convert without --qkv-concat" in said
    said = fails(3, "convert", bare, tmp_path / "out", "--to", "mindspore:hf", "--tp", "2")
    assert "convert without --tp, or to mindspore:gs1.2" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"--tp 2: says something to --to mindspore and --to turbomind only"):
        plan(source, "awq", tp=2)
    with pytest.raises(UsageError, match=r"--tp 0: wanted 1 or more"):
        plan(source, "mindspore", tp=0)


def test_an_interrupted_run_to_ranks_is_finished_and_a_finished_one_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convert import engine

    source, args = GOLDENS / "ptq_a16w4_pg_gs120.ckpt", ("--to", "mindspore", "--base-model", str(GOLDENS), "--tp", "2")
    whole = convert(source, tmp_path / "whole", "mindspore", base_model=GOLDENS, tp=2)
    taken = []

    def stop(self: Any, *rest: Any) -> None:
        taken.append(rest)
        if len(taken) > 5:
            raise KeyboardInterrupt
        real(self, *rest)

    real = engine._Engine._take
    with monkeypatch.context() as patch:
        patch.setattr(engine._Engine, "_take", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", "mindspore", base_model=GOLDENS, tp=2)
    assert not (tmp_path / "out").exists()
    result = convert(source, tmp_path / "out", "mindspore", base_model=GOLDENS, tp=2)
    assert result.resumed
    assert result.target_fingerprint == whole.target_fingerprint
    for path in (tmp_path / "whole").rglob("*.ckpt"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    succeeds("convert", source, tmp_path / "out", *args, "--overwrite")
    assert "over 2 devices" not in succeeds("inspect", tmp_path / "out")


def test_a_rank_that_does_not_hold_what_was_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convert import outputs
    from formats.errors import NotSameError

    real, turned = outputs.write_all, []

    def turns(fd: int, data: Any, offset: int) -> None:
        content = bytearray(data)
        if "rank_1" in path_of(fd) and len(content) > 1000 and not turned:
            turned.append(offset)
            content[7] ^= 1
        real(fd, bytes(content), offset)

    monkeypatch.setattr(outputs, "write_all", turns)
    with pytest.raises(NotSameError, match="the file does not hold what was written to it"):
        convert(GOLDENS / "ptq_a16w4_pg_gs120.ckpt", tmp_path / "out", "mindspore", tp=2, jobs=1)
    assert not (tmp_path / "out").exists()


LLAMA2_70B = {"wq": (8192, 8192), "wk": (1024, 8192), "wv": (1024, 8192), "wo": (8192, 8192)}
FEED_FORWARD = {"w1": (28672, 8192), "w2": (8192, 28672), "w3": (28672, 8192)}


def sparse(path: Path, ranks: int) -> dict[str, int]:
    """A rank of Llama2-70B in 8 bits, whose data are holes; the axis that each tensor is split along."""
    entries: list[Any] = [("model.tok_embeddings.embedding_weight", "F16", (32000 // ranks, 8192))]
    split = {entries[0][0]: 0}
    for block in range(80):
        for place, cells in (("attention", LLAMA2_70B), ("feed_forward", FEED_FORWARD)):
            for cell, (out, in_) in cells.items():
                name, by_row = f"model.layers.{block}.{place}.{cell}._layer", cell in {"wo", "w2"}
                shape = (out, in_ // ranks) if by_row else (out // ranks, in_)
                entries += [(f"{name}.weight", "I8", shape)]
                entries += [(f"{name}.matmul.{leaf}", "F16", (shape[0],)) for leaf in ("weight_scale", "weight_zp")]
                split |= {f"{name}.weight": int(by_row)}
                split |= {} if by_row else {f"{name}.matmul.{leaf}": 0 for leaf in ("weight_scale", "weight_zp")}
    file = lay_out_checkpoint(entries, path.name)
    path.parent.mkdir(parents=True)
    with path.open("wb") as handle:
        handle.truncate(file.size)
        for at, head in file.heads():
            handle.seek(at)
            handle.write(head)
    return split


def test_llama2_70b_is_planned_from_one_file_or_eight(tmp_path: Path) -> None:
    """69 GB that take no room: shapes, names and every output byte come from headers alone."""
    split = sparse(tmp_path / "whole" / "llama2_70b.ckpt", 1)
    for rank in range(8):
        sparse(tmp_path / "ranks" / f"rank_{rank}" / "llama2_70b.ckpt", 8)
    items = []
    for name, axis in split.items():
        devices = bytes_field(1, varint_field(1, 8))
        axes = b"".join(varint_field(1, 0 if number == axis else (1 << 64) - 1) for number in range(1 if "matmul" in name else 2))
        items.append(bytes_field(3, bytes_field(1, name.encode()) + bytes_field(2, devices + bytes_field(2, axes))))
    (tmp_path / "ranks" / "ckpt_strategy_rank_0.ckpt").write_bytes(varint_field(1, 0) + b"".join(items))
    plans = [plan(tmp_path / place, "gptq", probe=False, base_model=GOLDENS) for place in ("whole", "ranks")]
    for decided in plans:
        assert decided.refusals == []
        assert len(decided.layers) == 560
        assert decided.checkpoint.layer("model.layers.79.mlp.down_proj").shape == (8192, 28672)
        assert decided.target_bytes > 68e9
    assert [layer.target for layer in plans[0].layers] == [layer.target for layer in plans[1].layers]
    layer = plans[1].checkpoint.layer("model.layers.79.mlp.down_proj")
    assert not read(layer.codes, slice(8000, 8064), slice(3000, 9000)).any()


def test_llama2_70b_is_planned_into_eight(tmp_path: Path) -> None:
    """Every rank's file is laid out from headers, as the ranks that were written for the test above are."""
    sparse(tmp_path / "whole" / "llama2_70b.ckpt", 1)
    sparse(tmp_path / "rank" / "llama2_70b.ckpt", 8)
    decided = plan(tmp_path / "whole", "mindspore", probe=False, tp=8)
    assert decided.refusals == []
    names = [f"rank_{rank}/whole_a16w8.ckpt" for rank in range(8)]
    assert [file.name for file in decided.parts] == [*names, "strategy/ckpt_strategy_rank_0.ckpt"]
    wanted = MindSporeFile(tmp_path / "rank" / "llama2_70b.ckpt").tensors
    for file in decided.parts[:8]:
        assert {name: info.shape for name, info in file.tensors.items()} == {name: info.shape for name, info in wanted.items()}
