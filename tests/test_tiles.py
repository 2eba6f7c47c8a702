"""Tiles, the leaves of the fingerprint, and how memory is shared out."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import xxhash
from checkpoints import Array, Model, linear, model, write_msmodelslim
from hypothesis import example, given, settings
from hypothesis import strategies as st
from killing import small_tiles

from convert import tiling
from convert.engine import convert
from convert.matrices import Matrix
from convert.memory import LARGEST_TILE, LIBRARIES, MIB, SMALLEST_TILE, WORKER, share
from convert.proof import LeafGrid
from convert.tiling import Side, tile_shape, tiles
from convert.verification import fingerprint, verify
from formats.errors import UsageError

ROWS, COLS = 64, 1024  # of a leaf
unhurried = settings(deadline=None, max_examples=300)

# --- tiles ------------------------------------------------------------------------------------------------------------

SIDES = st.builds(Side, st.booleans(), st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]), st.sampled_from([0.0, 0.5, 1.0, 12.0]))
GRIDS = st.tuples(st.integers(1, 40_000), st.integers(1, 40_000))


@unhurried
@given(GRIDS, st.lists(SIDES, min_size=1, max_size=2), st.integers(1, 1 << 26), st.sampled_from([0.0, 0.25, 16.0]))
@example((1, 1), [Side(False, 1.0, 0.0)], 1, 0.0)
@example((40_000, 100), [Side(True, 0.5, 0.5), Side(True, 0.5, 0.5)], 1, 16.0)
@example((100, 40_000), [Side(True, 0.25, 12.0), Side(False, 0.25, 12.0)], 1, 16.0)
def test_a_tile_is_whole_leaves_within_the_budget(grid: tuple[int, int], sides: list[Side], budget: int, scales: float) -> None:
    high, wide = tile_shape(grid, sides, budget, scales)
    assert 1 <= high <= grid[0]
    assert 1 <= wide <= grid[1]
    assert high % ROWS == 0 or high == grid[0]
    assert wide % COLS == 0 or wide == grid[1]
    held = sum(side.held for side in sides) + scales
    assert high * wide <= max(ROWS * COLS, tiling.MOST)
    assert high * wide * held <= max(ROWS * COLS * held, budget)


@unhurried
@given(GRIDS, st.lists(SIDES, min_size=1, max_size=2), st.integers(1, 1 << 26))
def test_tiles_cover_a_matrix_exactly_once(grid: tuple[int, int], sides: list[Side], budget: int) -> None:
    cuts = list(tiles(grid, tile_shape(grid, sides, budget)))
    rows, cols = (sorted({(cut[axis].start, cut[axis].stop) for cut in cuts}) for axis in (0, 1))
    for pieces, length in ((rows, grid[0]), (cols, grid[1])):
        assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
        assert pieces[-1][1] == length
    assert [((r.start, r.stop), (c.start, c.stop)) for r, c in cuts] == [(r, c) for r in rows for c in cols]


def test_a_tile_is_as_long_as_files_like_to_be_read() -> None:
    """By output on both sides: whole rows. By input: whole columns. From one to the other: long pieces of both."""
    by_output, by_input = Side(False, 1.0, 1.0), Side(True, 0.5, 0.5)
    grid, budget = (16384, 16384), 1 << 23
    assert tile_shape(grid, [by_output, by_output], budget)[1] >= 4096
    assert tile_shape(grid, [by_input, by_input], budget)[0] == 8192
    high, wide = tile_shape(grid, [by_output, by_input], budget)
    assert high * by_input.per_step >= 1024
    assert wide * by_output.per_step >= 2048


# --- leaves -----------------------------------------------------------------------------------------------------------


def digest(values: Array) -> str:
    """A matrix's digest, as the docstring of ``convert.proof`` has it, and nothing of its code."""
    plain = np.where(values == 0, 0, values).astype("<f4")
    plain = plain.reshape(-1, plain.shape[-1])
    leaves = b""
    for top in range(0, plain.shape[0], 64):
        for left in range(0, plain.shape[1], 1024):
            leaves += xxhash.xxh3_128(plain[top : top + 64, left : left + 1024].tobytes()).digest()
    return xxhash.xxh3_128(leaves).hexdigest()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 3500), st.integers(1, 4), st.integers(1, 3), st.randoms(use_true_random=False))
def test_leaves_may_come_in_tiles_of_any_size_and_order(rows: int, cols: int, high: int, wide: int, chance: random.Random) -> None:
    values = np.random.default_rng([rows, cols]).integers(-3, 4, (rows, cols)).astype(np.float32) * np.float32(-0.5)
    grid = LeafGrid(Matrix("w", (rows, cols), None, values, 0))
    cuts = list(tiles((rows, cols), (ROWS * high, COLS * wide)))
    chance.shuffle(cuts)
    for r, c in cuts:
        part = values[r, c] + np.float32(0)
        leaves = [part[y : y + ROWS, x : x + COLS].tobytes() for y in range(0, part.shape[0], ROWS) for x in range(0, part.shape[1], COLS)]
        grid.put(r, c, b"".join(xxhash.xxh3_128_digest(leaf) for leaf in leaves))
    assert grid.digest() == digest(values)


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
@pytest.mark.parametrize("small", [True, False])
def test_the_fingerprint_is_what_its_definition_says(kernels: str, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the integers of the source, by hand; in every format, with every engine and in tiles of every size."""
    if kernels == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv("WEIGHBRIDGE_KERNELS", kernels)
    made = model(blocks=1, symmetric=False, scale_dtype="F16", dtype="F16")
    made = Model({**made.linears, "model.layers.0.mlp.down_proj": linear(224, 3072, symmetric=False, dtype="F16")}, made.plain)
    source = write_msmodelslim(tmp_path / "source", made)
    wanted = {f"{name}.weight": digest(one.weights()) for name, one in made.linears.items()}
    wanted |= {f"{name}.bias": digest(one.bias.astype(np.float32)) for name, one in made.linears.items() if one.bias is not None}
    wanted |= {name: digest(values.astype(np.float32)) for name, values in made.plain.items()}
    with small_tiles() if small else pytest.MonkeyPatch.context():
        for to in ("awq", "awq:gemv_fast", "gptq:v2", "dense"):
            result = convert(source, tmp_path / to, to, scale_dtype="float32" if to == "dense" else None)
            assert result.source_fingerprint is not None
            assert {name: found for name, (_, found) in result.source_fingerprint.tensors.items()} == wanted
            assert {name: found for name, (_, found) in fingerprint(tmp_path / to).tensors.items()} == wanted
            assert verify(source, tmp_path / to).left.digest == fingerprint(source).digest


# --- memory -----------------------------------------------------------------------------------------------------------


@unhurried
@given(st.integers(0, 4 << 30), st.integers(1, 256), st.integers(0, 1 << 30), st.integers(0, 1 << 28))
@example(LIBRARIES + WORKER + SMALLEST_TILE, 1, 0, 0)
@example(LIBRARIES + WORKER + SMALLEST_TILE - 1, 1, 0, 0)
@example(256 * MIB, 4, 0, 0)
def test_shares_of_memory_stay_within_the_limit(limit: int, jobs: int, headers: int, kept: int) -> None:
    least = LIBRARIES + headers + kept + WORKER + SMALLEST_TILE
    if limit < least:
        with pytest.raises(UsageError, match=f"this checkpoint needs {-(-least // MIB)}MiB at least, {headers // MIB} of them"):
            share(limit, jobs, headers, kept)
        return
    memory = share(limit, jobs, headers, kept)
    assert memory.peak <= limit
    assert 1 <= memory.jobs <= jobs
    assert SMALLEST_TILE <= memory.tile <= LARGEST_TILE
    assert (memory.limit, memory.headers, memory.kept) == (limit, headers, kept)
    more = LIBRARIES + headers + kept + (memory.jobs + 1) * (WORKER + SMALLEST_TILE)
    assert memory.jobs == jobs or more > limit, "no worker is left out that there was room for"
    assert memory.tile == LARGEST_TILE or limit - memory.peak < memory.jobs, "no room is left unused that tiles could take"
