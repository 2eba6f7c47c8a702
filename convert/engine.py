"""Run a plan: lay the files out in a staging folder, fill them in tiles, prove every tensor, make it durable, rename.

Tiles are rectangles [out, in] of one layer that do not depend on one another, so the bytes are the same for any number of workers.
A tile is gone through once, in strips that stay in cache: read, unpacked, packed, and for the proof unpacked again from the words,
compared, and both sides digested. Then its words are written, and read back to see that the file holds them. That the target's own
reader finds those words where they were written, and takes them for what they were packed as, is checked of every layer.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from formats import Checkpoint
from formats.errors import NotSameError, UnreadableError
from formats.layouts import expect_work
from formats.workspace import Workspace

from .certificate import version, write_certificate
from .folder import check_carried, write_sidecars
from .journal import Key, TileRecord
from .matrices import Matrix, counts_as_none
from .options import Options
from .planning import plan
from .proof import Comparison, Fingerprint, Found, compare_tile, join
from .records import Loss, Plan
from .requantize import RequantizingWriter
from .staged import open_staged
from .staging import Places, Staging, Syncer, staging
from .tiling import tiles_of
from .workspace_output import output_of, sizes_of
from .writing import LayerWriter, PlainWriter, Writer

Kind = Literal["layer", "plain"]
if TYPE_CHECKING:
    from .options import Unpack

Progress = Callable[[int], None]


def entries_in_flight(jobs: int) -> int:
    """Layers and tensors at most that are begun and not done while ``jobs`` workers run."""
    return 2 * _depth(jobs) + 2


def _depth(jobs: int) -> int:
    """Entries in each of the two stages before the last."""
    return 2 * jobs


@dataclass
class Result:
    """What a conversion did. Fingerprints are None where proof was turned off; ``rounded`` lists proved roundings."""

    plan: Plan
    destination: Path
    resumed: bool
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
        """The plan's losses; bounds that only a run can measure, of dequantized and requantized weights, as the proof found them."""
        anew = {f"{layer.target.name}.weight" for layer in self.plan.layers if layer.requantized}
        found = {
            "weight-rounded": [comparison for comparison in self.rounded if comparison.name not in anew],
            "requantize": [comparison for comparison in self.rounded if comparison.name in anew],
        }
        losses = []
        for loss in self.plan.losses:
            worst = max(found.get(loss.code, ()), key=lambda comparison: comparison.bound, default=None)
            losses.append(loss if worst is None else replace(loss, bound=worst.bound, worst=worst.name))
        return losses

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
            "resumed": self.resumed,
            "missing": self.missing,
        }


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    *,
    overwrite: bool = False,
    proof: bool = True,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Result:
    """Convert checkpoint ``src`` into folder ``dst`` of format ``to``, and prove it.

    options     ``Options``, as ``plan`` takes them
    overwrite   replaces an existing folder once the new one is whole
    proof       reads everything back and compares it
    progress    is called with bytes of source done, once for every layer and plain tensor, in order

    A conversion that was interrupted is finished by the same call.
    raises  RefusedError, UnreadableError, UsageError, DestinationError, NotSameError; nothing visible is left at ``dst``
    """
    decided = plan(src, to, **options)
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
    check_carried(plan.base or plan.checkpoint.location)  # before hours of work, and again when it is done
    expect_work(plan.codes)
    sources = [plan.checkpoint.location.folder] + ([] if plan.base is None else [plan.base.folder])
    with staging(Path(dst), plan.target_bytes, sources, overwrite) as stage:
        sizes = {name: size for file in plan.files for name, size in sizes_of(file).items()}
        resumed = stage.begin(_what(plan, proof), sizes)
        with ThreadPoolExecutor(plan.memory.jobs) as pool:
            engine = _Engine(plan, stage, pool, proof, progress or (lambda done: None))
            try:
                engine.write_and_prove()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        changed = plan.checkpoint.changed_file()
        if changed is not None:
            raise UnreadableError(f"{changed}: changed while it was being converted; run the conversion again")
        left, right = (engine.left, engine.right) if proof else (None, None)
        result = Result(plan, Path(dst), resumed, left, right, engine.rounded, [])
        for output in engine.outputs:
            output.finish()
        result.missing.extend(write_sidecars(plan, stage.model))
        write_certificate(result, stage.model)
        if plan.spec.owner_writes_only:
            for path in stage.model.iterdir():
                path.chmod(path.stat().st_mode & ~0o022)
    return result


def _what(plan: Plan, proof: bool) -> dict[str, Any]:
    """What a run does, for the journal: a run that does the same can go on with it."""
    return {
        "version": version(),
        "plan": plan.id,
        "source": plan.source_name,
        "target": plan.target_name,
        "options": {**plan.options, "proof": proof},
        "files": [asdict(file) for file in plan.checkpoint.files],
    }


@dataclass
class _Entry:
    """One layer or plain tensor on its way: what was asked of the workers, and what they answered."""

    number: int
    kind: Kind
    name: str
    writer: Writer
    small: list[Future[None]]
    tiles: list[tuple[Key, slice, slice, Future[TileRecord] | TileRecord]] = field(default_factory=list)


class _Engine:
    """Writes and proves every tensor of a plan, a few entries in flight at a time."""

    def __init__(self, plan: Plan, stage: Staging, pool: ThreadPoolExecutor, proof: bool, progress: Progress) -> None:
        self.plan, self.stage, self.pool, self.progress = plan, stage, pool, progress
        self.left, self.right = Fingerprint(), Fingerprint()
        self.rounded: list[Comparison] = []
        self.outputs = [output_of(stage.model, file) for file in plan.files]
        for output in self.outputs:
            output.make()
        self.layers = {layer.target.name: layer for layer in plan.layers}
        self.target: Checkpoint | None = open_staged(plan, stage.model) if proof else None
        self.places = Places(self.outputs, None if self.target is None else self.target.tensors)
        self.syncer = Syncer(self.outputs, stage.journal)
        self._local = threading.local()

    def works(self) -> tuple[Workspace, Workspace]:
        """This worker's memory for either side."""
        if not hasattr(self._local, "works"):
            self._local.works = Workspace(), Workspace()
        works: tuple[Workspace, Workspace] = self._local.works
        return works

    def write_and_prove(self) -> None:
        """Three stages, each a few entries behind the one before: small tensors, tiles, verdicts."""
        depth = _depth(self.plan.memory.jobs)
        begun: deque[_Entry] = deque()
        tiled: deque[_Entry] = deque()

        def advance() -> None:
            entry = begun.popleft()
            for task in entry.small:
                task.result()
            entry.tiles = list(self._tiles(entry))
            tiled.append(entry)
            if len(tiled) > depth:
                self._finish(tiled.popleft())

        try:
            for number, (kind, name) in enumerate(self.plan.entries):
                verdicts = self.stage.journal.verdicts(number)
                if verdicts is not None:
                    self._take(kind, name, [Comparison(*verdict) for verdict in verdicts])
                    continue
                writer = self._writer(kind, name)
                small = [self.pool.submit(task) for task in writer.small()]
                begun.append(_Entry(number, kind, name, writer, small))
                if len(begun) > depth:
                    advance()
            while begun:
                advance()
            while tiled:
                self._finish(tiled.popleft())
        finally:
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.syncer.close()

    def _writer(self, kind: Kind, name: str) -> Writer:
        if kind == "plain":
            return PlainWriter(self.plan, self.target, name, self.places[name])
        layer = self.layers[name]
        make = RequantizingWriter if layer.requantized else LayerWriter
        return make(self.plan, self.target, layer, self.places)

    def _tiles(self, entry: _Entry) -> Iterator[tuple[Key, slice, slice, Future[TileRecord] | TileRecord]]:
        """The entry's tiles: those that are done already, and tasks for the others."""
        entry.writer.look_again()
        for rows, cols in entry.writer.tiles(self.plan.memory.tile):
            key = (entry.number, rows.start, rows.stop, cols.start, cols.stop)
            done = self.stage.journal.done.tiles.get(key)
            yield key, rows, cols, done or self.pool.submit(self._tile, entry, key, rows, cols)

    def _tile(self, entry: _Entry, key: Key, rows: slice, cols: slice) -> TileRecord:
        found, written = entry.writer.write(rows, cols, self.works())
        if found is not None:
            _insist(entry.writer.matrices[0].name, found)
        record = TileRecord() if found is None else TileRecord(found.left, found.right, found.scales == "rounded", found.bound)
        self.stage.journal.tile(key, record)
        self.syncer.wrote(written)
        return record

    def _finish(self, entry: _Entry) -> None:
        """Wait for an entry's tiles, and give its verdicts."""
        records = [(rows, cols, tile if isinstance(tile, TileRecord) else tile.result()) for _, rows, cols, tile in entry.tiles]
        verdicts = []
        if self.target is not None:
            found = [
                (rows, cols, Found(r.left, r.right, scales="rounded" if r.rounded else "equal", bound=r.bound)) for rows, cols, r in records
            ]
            ours, theirs = entry.writer.matrices[0], entry.writer.read_back()[0]
            verdicts.append(join(ours, theirs, found))
            verdicts += [self._compare(a, b) for a, b in self._others(entry)]
        self.stage.journal.entry(entry.number, [list(asdict(verdict).values()) for verdict in verdicts])
        self._take(entry.kind, entry.name, verdicts)

    def _others(self, entry: _Entry) -> list[tuple[Matrix, Matrix]]:
        """The entry's tensors beyond the first, beside what was written; a bias of zeros counts as none."""
        ours, theirs = entry.writer.matrices[1:], entry.writer.read_back()[1:]
        if len(ours) != len(theirs):
            ours, theirs = ([matrix for matrix in side if not counts_as_none(matrix)] for side in (ours, theirs))
        if len(ours) != len(theirs):
            fault = "this is a fault in Weighbridge: please report it"
            raise NotSameError(f"{entry.name}: {len(ours)} tensors were read and {len(theirs)} written; {fault}")
        return list(zip(ours, theirs, strict=True))

    def _compare(self, ours: Matrix, theirs: Matrix) -> Comparison:
        """Compare a small tensor whole."""
        if ours.shape != theirs.shape:
            _insist(ours.name, Found(b"", b"", "different", detail="the shapes differ"))
        works = Workspace(), Workspace()
        cuts = tiles_of((ours, theirs), self.plan.memory.tile)
        return join(ours, theirs, [(rows, cols, compare_tile(ours, theirs, rows, cols, works)) for rows, cols in cuts])

    def _take(self, kind: Kind, name: str, verdicts: list[Comparison]) -> None:
        """Take an entry's verdicts into the result."""
        checkpoint = self.plan.checkpoint
        for verdict in verdicts:
            _insist(verdict.name, Found(b"", b"", verdict.codes, verdict.zero_points, verdict.scales, verdict.bound, verdict.detail))
            if verdict.scales == "rounded":
                self.rounded.append(verdict)
            shape = self._shape(kind, name, verdict.name)
            self.left.add(verdict.name, shape, verdict.left)
            self.right.add(verdict.name, shape, verdict.left if verdict.left == verdict.right else verdict.right)
        names = checkpoint.layer_tensors(name) if kind == "layer" else (name,)
        self.progress(sum(checkpoint.tensors[tensor].nbytes for tensor in names))

    def _shape(self, kind: Kind, name: str, tensor: str) -> tuple[int, ...]:
        if kind == "plain":
            return self.plan.checkpoint.tensors[name].shape
        out, in_ = self.layers[name].target.shape
        if tensor.endswith((".input_scale", ".input_zero_point")):
            return (1,)
        return (out,) if tensor.endswith(".bias") else (out, in_)


def _insist(name: str, found: Found) -> None:
    """NotSameError if what was written is not what was read."""
    if "different" in (found.codes, found.zero_points, found.scales):
        raise NotSameError(
            f"{name}: what was written is not what was read ({found.detail or 'the bytes differ'}); this is a fault in Weighbridge or in "
            "this machine: nothing was kept, please report it"
        )
