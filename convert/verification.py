"""The verbs ``verify`` and ``fingerprint``: whole checkpoints compared and digested, from the folders alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from formats import Checkpoint, Location, open_checkpoint
from formats.checkpoint import zeros_reading
from formats.layouts import expect_work

from .planning import available_cpus
from .proof import Band, Comparison, Fingerprint, Matrix, bands, compare_band, digest_band, fold, join, matrices

Progress = Callable[[int], None]


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
    progress: Progress | None = None,
    gptq_zeros: str | None = None,
) -> Verdict:
    """Are these the same weights? From the two checkpoints alone, whatever their formats.

    Codes and zero points must be equal, and scales equal or rounded to the other side's dtype; a float side is compared by
    value. progress is called with bytes done. Raises UnreadableError; differences are in the verdict, not raised.
    """
    left, right = (_opened(path, gptq_zeros) for path in (a, b))
    ours, theirs = matrices(left), matrices(right)
    expect_work(sum(matrix.grid[0] * matrix.grid[1] for matrix in ours.values()))
    prints = Fingerprint(), Fingerprint()
    rounded: list[Comparison] = []
    different: list[Comparison] = []
    shared = [name for name in ours if name in theirs]

    def finish(name: str, found: list[Band]) -> None:
        comparison = join(ours[name], theirs[name], found)
        prints[0].add(name, ours[name].shape, comparison.left)
        prints[1].add(name, theirs[name].shape, comparison.right)
        if not comparison.same:
            different.append(comparison)
        elif comparison.scales == "rounded":
            rounded.append(comparison)
        left.release(ours[name].stored)
        right.release(theirs[name].stored)
        if progress is not None:
            progress(ours[name].nbytes)

    with ThreadPoolExecutor(jobs or available_cpus()) as pool:
        window: list[tuple[str, list[Future[Band]]]] = []
        for name in shared:
            if ours[name].shape != theirs[name].shape:
                shapes = f"shape {list(ours[name].shape)} on the left and {list(theirs[name].shape)} on the right"
                different.append(Comparison(name, "different", "different", "different", 1.0, "", "", shapes))
                continue
            window.append((name, [pool.submit(compare_band, ours[name], theirs[name], rows) for rows in bands(ours[name])]))
            if len(window) > 8:
                first, futures = window.pop(0)
                finish(first, [future.result() for future in futures])
        for first, futures in window:
            finish(first, [future.result() for future in futures])
    only = [
        [name for name in mine if name not in other and not _is_zero_bias(mine[name])] for mine, other in ((ours, theirs), (theirs, ours))
    ]
    for side, mine, names in ((0, ours, only[0]), (1, theirs, only[1])):
        for name in names:
            prints[side].add(name, mine[name].shape, fold(mine[name], [digest_band(mine[name], rows) for rows in bands(mine[name])]))
    return Verdict(prints[0], prints[1], len(shared), rounded, different, only[0], only[1])


def _opened(path: str | os.PathLike[str] | Checkpoint, gptq_zeros: str | None) -> Checkpoint:
    return path if isinstance(path, Checkpoint) else open_checkpoint(Location.of(path, zeros=zeros_reading(gptq_zeros)))


def _is_zero_bias(matrix: Matrix) -> bool:
    return matrix.name.endswith(".bias") and matrix.plain is not None and not matrix.plain.any()


def fingerprint(
    path: str | os.PathLike[str] | Checkpoint,
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
    gptq_zeros: str | None = None,
) -> Fingerprint:
    """The fingerprint of a checkpoint's weights: the same in every format that holds the same weights."""
    checkpoint = _opened(path, gptq_zeros)
    found = matrices(checkpoint)
    expect_work(sum(matrix.grid[0] * matrix.grid[1] for matrix in found.values()))
    result = Fingerprint()
    with ThreadPoolExecutor(jobs or available_cpus()) as pool:
        for matrix in found.values():
            leaves = list(pool.map(lambda rows, matrix=matrix: digest_band(matrix, rows), bands(matrix)))
            result.add(matrix.name, matrix.shape, fold(matrix, leaves))
            checkpoint.release(matrix.stored)
            if progress is not None:
                progress(matrix.nbytes)
    return result
