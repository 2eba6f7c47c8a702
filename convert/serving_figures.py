"""Figures of ``serve-check``: how far an engine's log-probabilities and tokens are from the reference's, and what passes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from formats.ir import Array

from .serving_children import EngineFailedError


@dataclass(frozen=True, slots=True)
class Gate:
    """What passes. None: not asked.

    kl           the mean Kullback-Leibler divergence per position, in nats, is less
    difference   the largest difference of a log-probability is less; typical: the median over positions of the largest in each
    greedy       every greedy token is the reference's, or no likelier there than within the measured difference
    """

    kl: float | None
    difference: float | None
    greedy: bool = True
    typical: float | None = None


GATES: dict[tuple[str, str], Gate] = {
    ("weights", "float16"): Gate(5e-5, 0.06),
    ("weights", "float32"): Gate(5e-5, 0.06),
    ("weights", "bfloat16"): Gate(3e-3, 0.6, greedy=False),
    ("static int8", "float32"): Gate(1e-4, None, typical=1e-2),
    ("dynamic int8", "float32"): Gate(1e-4, None, typical=1e-2),
    ("W4A8", "float32"): Gate(1e-4, None, typical=1e-2),
    ("fp8", "float32"): Gate(1e-4, None, typical=1e-2),
}
"""By what is quantized and the engine's dtype; else there are figures and no verdict.

"weights": integers, and no inputs, or nothing at all; "static int8", "dynamic int8": the inputs of some layers too; "W4A8": to int8,
beside 4-bit weights; "fp8": inputs and weights in e4m3.

Measured on small models with logits of standard deviation 1 to 3, in vLLM 0.32 for CPUs: 4 bits in float16 1e-5 and 0.03, of which a
float model has most; in bfloat16 1e-3 and 0.29, and greedy tokens that part after a few. Of quantized inputs in float32, positions are
equal within 2e-6, but for those after an activation that lies between two codes and went the other way: 0.2 at most, 4e-5 in the mean.
So the median position is judged, and in float32 only: float16 and bfloat16 turn activations everywhere. Weights in float32 have
float16's gate: kernels may multiply in float16 still.
"""


def judge(gate: Gate | None, difference: float, typical: float, kl: float, apart: int) -> list[str]:
    """What did not pass. apart: prompts whose greedy tokens part where the reference sees more than a tie."""
    if not (math.isfinite(difference) and math.isfinite(kl)):
        return ["log-probabilities that are not finite"]
    failed: list[str] = []
    if gate is None:
        return failed
    if gate.kl is not None and not abs(kl) < gate.kl:  # below 0 by rounding only, or if the scores are no log-probabilities
        failed.append(f"mean KL {kl:.2g}, wanted less than {gate.kl:g}")
    if gate.difference is not None and not difference < gate.difference:
        failed.append(f"a log-probability {difference:.2g} off, wanted less than {gate.difference:g}")
    if gate.typical is not None and not typical < gate.typical:
        failed.append(f"a log-probability of the median position {typical:.2g} off, wanted less than {gate.typical:g}")
    if gate.greedy and apart:
        failed.append(f"greedy tokens of {apart} prompt(s) part where the reference is not undecided")
    return failed


def compare(theirs: Array, ours: Array) -> dict[str, Any]:
    """Positions and figures of two [positions, vocabulary] arrays of log-probabilities, the engine's and the reference's."""
    if theirs.shape != ours.shape:
        raise EngineFailedError(f"the engine answered for {list(theirs.shape)} positions and tokens, the reference for {list(ours.shape)}")
    divergence, squares, total = 0.0, 0.0, 0.0
    differences: list[float] = []
    finite, top1 = True, 0
    for row in range(theirs.shape[0]):
        left, right = theirs[row].astype(np.float64), ours[row].astype(np.float64)
        if not (np.isfinite(left).all() and np.isfinite(right).all()):
            finite = False
            break
        differences.append(float(np.abs(left - right).max()))
        divergence += float((np.exp(right) * (right - left)).sum())
        top1 += int(left.argmax() == right.argmax())
        squares, total = squares + float((right**2).sum()), total + float(right.sum())
    mean = total / theirs.size
    return {
        "positions": theirs.shape[0],
        "max_difference": max(differences) if finite else math.nan,
        "typical_difference": float(np.median(differences)) if finite else math.nan,
        "kl": divergence / theirs.shape[0] if finite else math.nan,
        "top1": top1,
        "logit_std": math.sqrt(max(0.0, squares / theirs.size - mean**2)) if finite else math.nan,
    }


def greedy(theirs: list[list[int]], ours: list[list[int]], margins: list[float | None]) -> tuple[int, int, list[float | None]]:
    """(tokens equal before the first difference of each prompt, tokens, margins)."""
    equal = 0
    for left, right in zip(theirs, ours, strict=True):
        equal += next(
            (place for place, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), min(len(left), len(right))
        )
    return equal, sum(map(len, ours)), margins
