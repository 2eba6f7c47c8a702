"""Exact moves, by name: changes of spelling that keep every weight. Pure functions, each with its inverse.

A move of scales or zero points takes and returns ``[out, groups]`` arrays. Codes are moved by the layouts alone
("repack", and "rebase-zero-point" for the signed, unsigned and minus-one spellings of one integer).
"""

from __future__ import annotations

import numpy as np

from formats.errors import WeighbridgeError
from formats.ir import Array

MOVES: dict[str, str] = {
    "repack": "the same codes in the target's words",
    "rebase-zero-point": "zero points and codes shifted together (signed, unsigned, minus one)",
    "repeat-scales": "one scale per channel or tensor said again for every group",
    "split-groups": "a group's scale said again for its parts",
    "spell-zero-point": "the zero point of symmetric layers written out",
    "drop-zero-point": "zero points that are all 0 left unsaid",
    "widen-codes": "codes kept, in a carrier of more bits",
    "merge-scales": "two levels of scales multiplied into one, in float32",
    "spell-g_idx": "the group of every input written out",
    "dequantize": "the law's float32 weights",
}
"""Every move that a plan can name, with its meaning."""


def repeat_groups(grid: Array, times: int) -> Array:
    """``[out, groups]`` -> ``[out, groups * times]``: each group's value repeated ("repeat-scales", "split-groups")."""
    return grid if times == 1 else np.repeat(grid, times, axis=1)


def merge_groups(grid: Array, times: int) -> Array:
    """The inverse of ``repeat_groups``; raises WeighbridgeError if the values that would merge differ."""
    if times == 1:
        return grid
    if grid.shape[1] % times:
        raise WeighbridgeError(f"{grid.shape[1]} groups cannot be merged {times} to one")
    parts = grid.reshape(grid.shape[0], -1, times)
    if parts.tobytes() != np.repeat(parts[:, :, :1], times, axis=2).tobytes():
        raise WeighbridgeError(f"groups that differ cannot be merged {times} to one")
    return np.ascontiguousarray(parts[:, :, 0])


def spell_zero_point(shape: tuple[int, int]) -> Array:
    """The zero points of a symmetric layer, int16 ``[out, groups]`` of 0 in the signed domain."""
    return np.zeros(shape, dtype=np.int16)


def drop_zero_point(zero_points: Array) -> None:
    """The inverse of ``spell_zero_point``: None; raises WeighbridgeError if a zero point is not 0."""
    if zero_points.any():
        raise WeighbridgeError(f"a zero point of {zero_points[zero_points != 0].flat[0]} cannot be left unsaid")


def spell_g_idx(in_features: int, group_size: int) -> Array:
    """``[in]`` int32 group of each input, ``i // group_size`` (0 for group_size -1); ``drop_g_idx`` is its inverse."""
    if group_size == -1:
        return np.zeros(in_features, dtype=np.int32)
    return (np.arange(in_features) // group_size).astype(np.int32)


def drop_g_idx(g_idx: Array, group_size: int) -> None:
    """None for a g_idx that says nothing new; raises WeighbridgeError for an irregular one."""
    if not np.array_equal(g_idx, spell_g_idx(len(g_idx), group_size)):
        raise WeighbridgeError("an irregular g_idx cannot be left unsaid")
