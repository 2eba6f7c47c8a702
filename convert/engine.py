"""Run a plan: lay the files out in a staging folder, fill them in tiles, prove every tensor, make it durable, rename.

Tiles are rectangles [out, in] of one layer; each is unpacked from the source, moved and packed into a buffer of its own, and
written to its place with ``pwrite``. Tiles do not depend on one another, so the bytes are the same for any number of workers.
A tensor is proved as soon as its tiles are there: it is read back through the *target's own reader* from the staged file,
compared with the source code by code, and digested.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from formats import Checkpoint, Location
from formats.errors import NotSameError, RefusedError, UnreadableError
from formats.ir import Array, QuantizedLinear
from formats.layouts import PackLayout, expect_work
from formats.safetensors_file import DEFAULT_SHARD_BYTES, DTYPES, TensorInfo
from formats.scaled_zeros import scale_zeros
from formats.spec import TensorSpec

from . import moves
from .certificate import write_certificate
from .folder import write_sidecars
from .planning import plan
from .probe import to_float32
from .proof import (
    BAND_ROWS,
    LEAF_COLS,
    Band,
    Comparison,
    Fingerprint,
    Matrix,
    bands,
    compare_band,
    is_zero_bias,
    join,
    layer_matrices,
    plain_matrix,
    read_codes,
)
from .records import LayerPlan, Loss, Plan
from .staging import Output, staging, write_all

TILE_ROWS = 16384
TILE_COLS = 512
COPY_BYTES = 8 << 20

Kind = Literal["layer", "plain"]
Progress = Callable[[int], None]


@dataclass
class Result:
    """What a conversion did. Fingerprints are None where proof was turned off; ``rounded`` lists proved roundings."""

    plan: Plan
    destination: Path
    source_fingerprint: Fingerprint | None
    target_fingerprint: Fingerprint | None
    rounded: list[Comparison]
    missing: list[str]

    @property
    def exact(self) -> bool:
        """Whether every weight is bit for bit what it was (only meaningful with proof)."""
        return self.source_fingerprint is not None and not self.rounded

    @property
    def losses(self) -> list[Loss]:
        """The plan's losses; the bound of dequantized weights, which only a run can measure, as the proof found it."""
        worst = max(self.rounded, key=lambda comparison: comparison.bound, default=None)
        if worst is None:
            return self.plan.losses
        return [replace(loss, bound=worst.bound, worst=worst.name) if loss.code == "weight-rounded" else loss for loss in self.plan.losses]

    def to_json(self) -> dict[str, Any]:
        """What ``weighbridge convert --json`` prints."""
        source, target = self.source_fingerprint, self.target_fingerprint
        return {
            **self.plan.to_json(),
            "losses": [asdict(loss) for loss in self.losses],
            "destination": str(self.destination),
            "proved": source is not None,
            "exact": self.exact,
            "bound": max((comparison.bound for comparison in self.rounded), default=0.0),
            "fingerprint_source": None if source is None else source.digest,
            "fingerprint_target": None if target is None else target.digest,
            "missing": self.missing,
        }


def peak_memory(plan: Plan) -> int:
    """Bound of anonymous memory in bytes over the interpreter's: tiles in flight, small tensors of a layer, headers."""
    widest = max((min(layer.target.shape[0], TILE_ROWS) for layer in plan.layers), default=0)
    small = max((min(layer.target.shape[0], TILE_ROWS) * layer.target.groups for layer in plan.layers), default=0)
    headers = sum(len(file.header) for file in plan.files)
    return plan.jobs * (max(widest * TILE_COLS * 2, 10 * BAND_ROWS * LEAF_COLS) + small * 16) + 12 * headers


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    *,
    base_model: str | os.PathLike[str] | None = None,
    allow: Iterable[str] = (),
    strict: bool = False,
    scale_dtype: str | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    jobs: int | None = None,
    proof: bool = True,
    progress: Progress | None = None,
    description: str | os.PathLike[str] | None = None,
    serve_dtype: str | None = None,
    gptq_zeros: str | None = None,
) -> Result:
    """Convert checkpoint ``src`` into folder ``dst`` of format ``to``, and prove it.

    Options are those of ``plan``; beyond them: overwrite replaces an existing folder once the new one is whole; proof reads
    everything back and compares it; progress is called with bytes of source done.
    raises  RefusedError, UnreadableError, UsageError, DestinationError, NotSameError; nothing visible is left at ``dst``
    """
    decided = plan(
        src, to, base_model=base_model, allow=allow, strict=strict, scale_dtype=scale_dtype,
        max_shard_size=max_shard_size, jobs=jobs, description=description, serve_dtype=serve_dtype, gptq_zeros=gptq_zeros,
    )  # fmt: skip
    decided.raise_if_refused()
    return run(decided, dst, overwrite=overwrite, proof=proof, progress=progress)


def run(
    plan: Plan,
    dst: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    proof: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Carry out a plan without refusals; see ``convert``."""
    plan.raise_if_refused()
    expect_work(plan.codes)
    sources = [plan.checkpoint.location.folder] + ([] if plan.base is None else [plan.base.folder])
    with staging(Path(dst), plan.target_bytes, sources, overwrite) as folder, ThreadPoolExecutor(plan.jobs) as pool:
        missing = write_sidecars(plan, folder)
        with contextlib.ExitStack() as outputs:
            engine = _Engine(plan, folder, pool, outputs, progress or (lambda done: None))
            try:
                engine.write_and_prove(proof)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        changed = plan.checkpoint.changed_file()
        if changed is not None:
            raise UnreadableError(f"{changed}: changed while it was being converted; run the conversion again")
        left, right = (engine.left, engine.right) if proof else (None, None)
        result = Result(plan, Path(dst), left, right, engine.rounded, missing)
        write_certificate(result, folder)
        if plan.spec.owner_writes_only:
            for path in folder.iterdir():
                path.chmod(path.stat().st_mode & ~0o022)
    return result


class _Engine:
    """Writes and proves every tensor of a plan, a few layers in flight at a time."""

    def __init__(self, plan: Plan, folder: Path, pool: ThreadPoolExecutor, outputs: contextlib.ExitStack, progress: Progress) -> None:
        self.plan, self.folder, self.pool, self.progress = plan, folder, pool, progress
        self.left, self.right = Fingerprint(), Fingerprint()
        self.rounded: list[Comparison] = []
        opened = [(outputs.enter_context(Output(folder, file)), file) for file in plan.files]
        self.places = {name: (output, info) for output, file in opened for name, info in file.tensors.items()}
        self.layers = {layer.target.name: layer for layer in plan.layers}

    def write_and_prove(self, proof: bool) -> None:
        """Three stages in order, each a few entries behind the one before: write tiles, compare bands, fold and give back."""
        target = self.plan.spec.open(Location.of(self.folder), self.plan.variant.name) if proof else None
        depth = 2 * self.plan.jobs
        writing: deque[tuple[Kind, str, list[Future[None]]]] = deque()
        proving: deque[tuple[Kind, str, list[tuple[Matrix, Matrix, list[Future[Band]]]]]] = deque()

        def written() -> None:
            kind, name, tasks = writing.popleft()
            for task in tasks:
                task.result()
            pairs = [] if target is None else self._pairs(target, kind, name)
            proving.append((kind, name, [(a, b, [self.pool.submit(compare_band, a, b, rows) for rows in bands(a)]) for a, b in pairs]))
            if len(proving) > depth:
                proved()

        def proved() -> None:
            kind, name, pairs = proving.popleft()
            for a, b, found in pairs:
                self._accept(a, b, join(a, b, [band.result() for band in found]))
            self._give_back(target, kind, name, [b for _, b, _ in pairs])

        for kind, name in self.plan.checkpoint.entries:
            tasks = self._layer_tasks(name) if kind == "layer" else self._plain_tasks(name)
            writing.append((kind, name, [self.pool.submit(task) for task in tasks]))
            if len(writing) > depth:
                written()
        while writing:
            written()
        while proving:
            proved()

    def _pairs(self, target: Checkpoint, kind: Kind, name: str) -> list[tuple[Matrix, Matrix]]:
        """The tensors of one entry beside what the target's reader makes of the staged file."""
        if kind == "plain":
            return [(plain_matrix(self.plan.checkpoint, name), plain_matrix(target, name))]
        ours = layer_matrices(self.plan.checkpoint, name)
        quantized = not self.plan.holds.dequantized
        theirs = layer_matrices(target, name) if quantized else [plain_matrix(target, matrix.name) for matrix in ours]
        if len(ours) != len(theirs):  # a bias of zeros counts as none
            ours, theirs = ([matrix for matrix in side if not is_zero_bias(matrix)] for side in (ours, theirs))
        if len(ours) != len(theirs):
            raise NotSameError(
                f"{name}: {len(ours)} tensors were read and {len(theirs)} written; this is a fault in Weighbridge: please report it"
            )
        return list(zip(ours, theirs, strict=True))

    def _accept(self, ours: Matrix, theirs: Matrix, comparison: Comparison) -> None:
        if not comparison.same or ours.shape != theirs.shape:
            found = comparison.detail or "the shapes differ"
            raise NotSameError(
                f"{comparison.name}: what was written is not what was read ({found}); this is a fault in Weighbridge or in this machine: "
                "nothing was kept, please report it"
            )
        if comparison.scales == "rounded":
            self.rounded.append(comparison)
        self.left.add(ours.name, ours.shape, comparison.left)
        self.right.add(theirs.name, theirs.shape, comparison.right)

    def _give_back(self, target: Checkpoint | None, kind: Kind, name: str, theirs: list[Matrix]) -> None:
        checkpoint = self.plan.checkpoint
        names = checkpoint.layer_tensors(name) if kind == "layer" else (name,)
        checkpoint.release(names)
        if target is not None:
            for matrix in theirs:
                target.release(matrix.stored)
        self.progress(sum(checkpoint.tensors[tensor].nbytes for tensor in names))

    def _plain_tasks(self, name: str) -> Iterator[Callable[[], None]]:
        """Copy a tensor's bytes, verbatim."""
        output, info = self.places[name]
        data = self.plan.checkpoint.plain(name).data.reshape(-1).view(np.uint8)
        for start in range(0, info.nbytes, COPY_BYTES):
            chunk = data[start : start + COPY_BYTES]
            yield partial(write_all, output.fd, chunk, info.begin + start)

    def _layer_tasks(self, name: str) -> Iterator[Callable[[], None]]:
        """Tiles of codes (or of weights), and the small tensors, of one layer."""
        plan, layer = self.layers[name], self.plan.checkpoint.layer(name)
        out, in_ = layer.shape
        for spec in self.plan.outputs(plan.target):
            output, info = self.places[spec.name]
            row_bands = [slice(start, min(start + TILE_ROWS, out)) for start in range(0, out, TILE_ROWS)]
            if spec.part in {"codes", "weight"}:
                # Whole rows of what is stored by row, so that a tile is one write; else columns, which are its rows.
                by_row = spec.layout is None or (isinstance(spec.layout, PackLayout) and not spec.layout.transposed)
                height = max(64, TILE_ROWS * TILE_COLS // in_ // 64 * 64) if by_row else TILE_ROWS
                width = in_ if by_row else TILE_COLS
                for top in range(0, out, height):
                    for start in range(0, in_, width):
                        tile = slice(top, min(top + height, out)), slice(start, min(start + width, in_))
                        yield partial(_write_tile, layer, spec, output, info, *tile)
            elif spec.part in {"scales", "zero_points", "scaled_zeros"}:
                for rows in row_bands:
                    yield partial(_write_grid, layer, plan.repeat, self._smallest_zero(plan), spec, output, info, rows)
            else:
                yield partial(_write_vector, layer, plan, spec, output, info)

    def _smallest_zero(self, layer: LayerPlan) -> int:
        """In the signed domain."""
        assert self.plan.variant.holds is not None
        return self.plan.variant.holds.smallest_zero - (1 << (layer.target.scheme.weights.bits - 1))


def _write_tile(layer: QuantizedLinear, spec: TensorSpec, output: Output, info: TensorInfo, rows: slice, cols: slice) -> None:
    """One rectangle of a layer's codes, repacked, or of its dequantized weights."""
    if spec.part == "weight":
        with np.errstate(over="ignore"):
            weights = Matrix(layer.name, layer.shape, layer, None, ()).band(rows).read(cols).astype(DTYPES[spec.dtype])
        if not np.isfinite(weights.astype(np.float32)).all():
            raise RefusedError(f"{layer.name}: a weight does not fit {spec.dtype}; use --scale-dtype bfloat16 or float32")
        output.write(info, weights, rows.start, cols.start)
        return
    assert spec.layout is not None
    packed = spec.layout.pack(read_codes(layer, rows, cols))
    output.write(info, packed, *spec.layout.corner(rows.start, cols.start))


def _write_grid(
    layer: QuantizedLinear, repeat: int, smallest_zero: int, spec: TensorSpec, output: Output, info: TensorInfo, rows: slice
) -> None:
    """Scales or zero points of some output rows, repeated, cast and packed as the target stores them."""
    zeros: Array | None = None
    if spec.part != "scales":
        grid = moves.spell_zero_point(layer.groups)[rows] if layer.zero_points is None else layer.grid("zero_points", rows)
        if grid.size and int(grid.min()) < smallest_zero:
            raise UnreadableError(
                f"{layer.name}: a zero point is {int(grid.min())}, which the plan did not find; the source changed: run again"
            )
        zeros = moves.repeat_groups(grid, repeat)
    if zeros is not None and spec.part == "zero_points":
        if spec.layout is None:
            output.write(info, zeros.astype(DTYPES[spec.dtype]), rows.start, 0)
            return
        packed = spec.layout.pack(_padded(zeros, spec.columns, -spec.layout.offset))
        output.write(info, packed, *spec.layout.corner(rows.start, 0))
        return
    scales = cast(moves.repeat_groups(layer.grid("scales", rows), repeat), DTYPES[spec.dtype])
    if not np.isfinite(scales.astype(np.float32)).all():
        raise UnreadableError(
            f"{layer.name}: a scale does not fit {spec.dtype}, which the plan did not find; the source changed: run again"
        )
    if zeros is not None:
        scales = scale_zeros(layer.name, scales, zeros, layer.scheme.weights.bits)
    if spec.order:
        scales = scales.reshape(-1, len(spec.order), scales.shape[1])[:, list(spec.order)].reshape(scales.shape)
    scales = _padded(scales, spec.columns, 0)
    output.write(info, scales.T if spec.transposed else scales, *((0, rows.start) if spec.transposed else (rows.start, 0)))


def _padded(grid: Array, columns: int, value: int) -> Array:
    """``grid`` [rows, groups] with columns of ``value`` after its own, up to ``columns`` of them."""
    if columns <= grid.shape[1]:
        return grid
    padded = np.full((grid.shape[0], columns), value, dtype=grid.dtype)
    padded[:, : grid.shape[1]] = grid
    return padded


def _write_vector(layer: QuantizedLinear, plan: LayerPlan, spec: TensorSpec, output: Output, info: TensorInfo) -> None:
    """g_idx or bias."""
    if spec.part == "g_idx":
        data = moves.spell_g_idx(layer.shape[1], plan.target.group_size) if layer.g_idx is None else layer.g_idx
    else:
        assert layer.bias is not None
        data = cast(layer.bias, DTYPES[spec.dtype])
    output.write(info, data.reshape(1, -1), 0, 0)


def cast(values: Array, dtype: np.dtype[Any]) -> Array:
    """``values`` in ``dtype``, by way of float32 (exact for half precision), so rounded once; unchanged if it is theirs already."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        return to_float32(values).astype(dtype)
