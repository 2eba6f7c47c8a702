"""The verbs ``verify`` and ``fingerprint``: whole checkpoints compared and digested, from the folders alone."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from formats import FORMATS, Checkpoint, Location, open_checkpoint
from formats.checkpoint import zeros_reading
from formats.layouts import expect_work
from formats.workspace import Workspace

from .matrices import Matrices, Matrix, counts_as_none
from .memory import DEFAULT_MEMORY, header_bytes, share
from .options import available_cpus
from .proof import Comparison, Fingerprint, Found, LeafGrid, compare_tile, digest_tile, join
from .tiling import tiles_of

Progress = Callable[[int], None]
Finish = Callable[[list[tuple[slice, slice, Found]]], None]


@dataclass
class Verdict:
    """What ``verify`` found: every difference and rounding, and both fingerprints. ``same`` decides the exit code."""

    left: Fingerprint
    right: Fingerprint
    compared: int
    rounded: list[Comparison]
    different: list[Comparison]
    only_left: list[str]
    only_right: list[str]

    @property
    def same(self) -> bool:
        return not (self.different or self.only_left or self.only_right)

    @property
    def bound(self) -> float:
        return max((comparison.bound for comparison in self.rounded), default=0.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "exact": self.same and not self.rounded,
            "compared": self.compared,
            "rounded": len(self.rounded),
            "bound": self.bound,
            "different": [asdict(comparison) for comparison in self.different[:20]],
            "only_left": self.only_left[:20],
            "only_right": self.only_right[:20],
            "fingerprint_left": self.left.digest,
            "fingerprint_right": self.right.digest,
        }


def verify(
    a: str | os.PathLike[str] | Checkpoint,
    b: str | os.PathLike[str] | Checkpoint,
    *,
    jobs: int | None = None,
    max_memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
    gptq_zeros: str | None = None,
) -> Verdict:
    """Are these the same weights? From the two checkpoints alone, whatever their formats.

    Codes and zero points must be equal, and scales equal or rounded to the other side's dtype; a float side is compared by
    value. progress is called with bytes done. Raises UnreadableError; differences are in the verdict, not raised.
    """
    left, right = opened_pair(a, b, gptq_zeros)
    ours, theirs = Matrices(left), Matrices(right)
    verdict = Verdict(Fingerprint(), Fingerprint(), 0, [], [], [], [])
    seen: set[str] = set()

    def finish(first: Matrix, second: Matrix, found: list[tuple[slice, slice, Found]]) -> None:
        comparison = join(first, second, found)
        equal = comparison.left == comparison.right
        verdict.left.add(first.name, first.shape, comparison.left)
        verdict.right.add(first.name, first.shape, comparison.left if equal else comparison.right)
        seen.add(first.name)
        verdict.compared += 1
        if not comparison.same:
            verdict.different.append(comparison)
        elif comparison.scales == "rounded":
            verdict.rounded.append(comparison)
        if progress is not None:
            progress(first.nbytes)

    with _Tiles(jobs, max_memory, (left, right), ours.weights() + theirs.weights()) as work:
        for name, matrix in ours.items():
            other = theirs.get(name)
            if other is None:
                if not counts_as_none(matrix):
                    verdict.only_left.append(name)
                    work.submit([matrix], partial(_digested, verdict.left, matrix))
            elif other.shape != matrix.shape:
                shapes = f"shape {list(matrix.shape)} on the left and {list(other.shape)} on the right"
                verdict.compared += 1
                verdict.different.append(Comparison(name, "different", "different", "different", 1.0, "", "", shapes))
            else:
                work.submit([matrix, other], partial(finish, matrix, other))
        for name in theirs.names(without=seen):
            matrix = theirs[name]
            if name not in ours and not counts_as_none(matrix):
                verdict.only_right.append(name)
                work.submit([matrix], partial(_digested, verdict.right, matrix))
    return verdict


class _Tiles:
    """Goes through matrices tile by tile, a few at a time, and hands each one's tiles over when all are there."""

    def __init__(self, jobs: int | None, max_memory: int, checkpoints: Sequence[Checkpoint], weights: int) -> None:
        expect_work(weights)
        headers = sum(header_bytes(checkpoint.tensors) for checkpoint in checkpoints)
        self._memory = share(max_memory, jobs or available_cpus(), headers)
        self._pool = ThreadPoolExecutor(self._memory.jobs)
        self._local = threading.local()
        self._window: deque[tuple[Finish, list[tuple[slice, slice, Future[Found]]]]] = deque()

    def __enter__(self) -> _Tiles:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            while self._window and kind is None:
                self._finish()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, matrices: list[Matrix], finish: Finish) -> None:
        """Digest one matrix, or compare two of one shape; ``finish`` gets what was found of every tile."""
        cuts = tiles_of(matrices, self._memory.tile)
        self._window.append((finish, [(*cut, self._pool.submit(self._tile, matrices, *cut)) for cut in cuts]))
        while len(self._window) > 8:
            self._finish()

    def _tile(self, matrices: list[Matrix], rows: slice, cols: slice) -> Found:
        if not hasattr(self._local, "works"):
            self._local.works = Workspace(), Workspace()
        if len(matrices) == 1:
            leaves = digest_tile(matrices[0], rows, cols, self._local.works[0])
            return Found(leaves, leaves)
        return compare_tile(matrices[0], matrices[1], rows, cols, self._local.works)

    def _finish(self) -> None:
        finish, tiles = self._window.popleft()
        finish([(rows, cols, tile.result()) for rows, cols, tile in tiles])


def _digested(prints: Fingerprint, matrix: Matrix, found: list[tuple[slice, slice, Found]]) -> None:
    grid = LeafGrid(matrix)
    for rows, cols, tile in found:
        grid.put(rows, cols, tile.left)
    prints.add(matrix.name, matrix.shape, "" if counts_as_none(matrix) else grid.digest())


def opened_pair(
    a: str | os.PathLike[str] | Checkpoint, b: str | os.PathLike[str] | Checkpoint, gptq_zeros: str | None = None
) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints, each under the names that the other's format knows (``FormatSpec.source``)."""
    left, right = _opened(a, gptq_zeros), _opened(b, gptq_zeros)
    return _seen_by(right, left), _seen_by(left, right)


def _seen_by(other: Checkpoint, checkpoint: Checkpoint) -> Checkpoint:
    look = next(spec for spec in FORMATS if spec.name == other.format).source
    if look is None or checkpoint.format == other.format or checkpoint.location.view is not None:
        return checkpoint
    location = look(checkpoint.location)
    return checkpoint if location is checkpoint.location else open_checkpoint(location)


def _opened(path: str | os.PathLike[str] | Checkpoint, gptq_zeros: str | None) -> Checkpoint:
    return path if isinstance(path, Checkpoint) else open_checkpoint(Location.of(path, zeros=zeros_reading(gptq_zeros)))


def fingerprint(
    path: str | os.PathLike[str] | Checkpoint,
    *,
    jobs: int | None = None,
    max_memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
    gptq_zeros: str | None = None,
) -> Fingerprint:
    """The fingerprint of a checkpoint's weights: the same in every format that holds the same weights."""
    checkpoint = _opened(path, gptq_zeros)
    found, result = Matrices(checkpoint), Fingerprint()

    def finish(matrix: Matrix, tiles: list[tuple[slice, slice, Found]]) -> None:
        _digested(result, matrix, tiles)
        if progress is not None:
            progress(matrix.nbytes)

    with _Tiles(jobs, max_memory, [checkpoint], found.weights()) as work:
        for matrix in found.values():
            work.submit([matrix], partial(finish, matrix))
    return result
