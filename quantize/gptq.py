"""GPTQ: round a weight input by input, and let the inputs that are still to come make up for each error.

Published by Frantar et al. (arXiv 2210.17323), as AutoGPTQ 0.7.1 and GPTQModel 7.6.0 run it. With ``H`` the mean of ``2 x x^T`` over the
calibration tokens, a row ``w`` of a weight that is rounded to ``v`` changes its output by ``(w - v) H (w - v)^T / 2``, mean square.
Functions on tensors, for any device; everything is in float32.

One Cholesky factor is enough, and no inverse is made. With ``H + damping = R R^T``, ``R`` upper triangular, the published factor of the
inverse is ``U = R^-1``, and its blocks on the diagonal are the inverses of R's. The weights of a block B, once every input before it is
rounded, are therefore

    W_B + E R[before B, B] U_BB        E = weight - rounded, of the inputs before B

which is the same number that the published loop reaches by subtracting from all of the weight after each block (QuIP, arXiv 2307.13304,
proves it). Within a block the loop is as published: ``e_i = (w_i - v_i) / U_ii``, then ``w_j -= e_i U_ij`` for each later ``j``.

The grid:

1. Symmetric: scale = 2 absmax / (2^b - 1), codes -2^(b-1) to 2^(b-1) - 1, offset 0. So the tools of the field do, whose files hold
   unsigned codes around a zero point of 2^(b-1): all 2^b codes are used, and the largest weight loses half a step. (They halve the scale
   of a group that has no negative weight, though its codes stay signed, and so cut its larger half off. Here it keeps its scale.)
2. Asymmetric: the range holds 0; scale = (max - min) / (2^b - 1), offset = round(-min / scale) - 2^(b-1), within b bits.
3. A group of zeros has the range -1 to 1, as theirs.
4. **The scale is rounded to the dtype in which it is stored before an offset or a code is made**, so what is compensated for is what a
   file holds. It is at least 2^-23, and never 0 in float16.
5. ``mse``: of ranges shrunk by 0 to 79 hundredths, each row takes the one of the least sum of ``|error|^mse``, of the weight alone.

A group gets its scales when its first input is reached, from the weights as compensated by then (the tools' are not yet compensated for
errors of their current block, which mostly costs accuracy where groups are much smaller than ``block_size``); static groups, and rows of
one group, get theirs from the weight as it was. Dead inputs, which were 0 in every token, have weight 0, as published. Their diagonal is
taken to be the mean of the others, so that they change no damping, and they come last in any order; the tools take 1, which may be more
or less than all the others.

Orders, from the input of the largest diagonal down, all of them as stable sorts:

``act_order``          over all inputs. Groups are of the sorted inputs, and ``g_idx`` says which; with static groups they stay in place.
``act_group_aware``    groups by their largest, then inputs within each group (Gafni et al., arXiv 2505.14638): no ``g_idx`` is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from formats.errors import RefusedError, UnreadableError, UsageError

from .devices import COMPLETE, HOST
from .methods import Gptq
from .rounding import EPSILON, RoundedWeight

__all__ = ["Hessian", "checked_width", "round_gptq"]

BITS = range(2, 9)
PANEL = 1024
"""Columns of the Hessian that one product adds to: below the diagonal it computes at most this many of them for nothing."""
TURN = 1 << 20
"""Numbers that are turned around at once."""
SHRINKS, STEPS = 80, 100
"""The search of ``mse``: ranges of (STEPS - i) / STEPS, for i below SHRINKS."""


class Hessian:
    """The mean of ``2 x x^T`` over the tokens that one input of a model got, [in, in] float32. Linears that share the input share it.

    tokens      how many were added
    damping     the part of the diagonal's mean that the last rounding added to it: more than ``percdamp`` where that was too little

    A factor of it, of the same size, is kept until tokens are added or another order is asked for, so that linears that share their
    input and settings, rounded one after another, share that work too. No third matrix of that size is ever there.
    """

    def __init__(self, in_features: int, device: torch.device | str = HOST) -> None:
        self.in_features = in_features
        self.tokens = 0
        self.damping = 0.0
        self._diagonal: Tensor | None = None  # once nothing else is needed
        self._upper = torch.zeros(in_features, in_features, device=device)  # and, below the diagonal, whatever is in a panel
        self._kept: tuple[float, Tensor | None, Tensor] | None = None

    @property
    def saw_no_token(self) -> bool:
        """Whether there is nothing to compensate by, as for an expert that no token was routed to."""
        return self.tokens == 0

    @property
    def diagonal(self) -> Tensor:
        """[in]: the mean of ``2 x^2``; 0 for a dead input."""
        return self._upper.diagonal() if self._diagonal is None else self._diagonal

    @property
    def matrix(self) -> Tensor:
        """[in, in], symmetric, a copy."""
        upper = self._upper.triu()
        return upper + upper.triu(1).T

    def _taken(self, order: Tensor) -> Tensor:
        """``matrix``, its inputs in ``order``, without another copy: what is below the diagonal is filled in first."""
        upper, taken = self._upper, torch.empty_like(self._upper)
        for start in range(0, self.in_features, PANEL):
            stop = start + PANEL
            block = upper[start:stop, start:stop]
            block.copy_(block.triu() + block.triu(1).T)
            upper[stop:, start:stop] = upper[start:stop, stop:].T
        for start in range(0, self.in_features, PANEL):
            taken[start : start + PANEL] = upper[order[start : start + PANEL]][:, order]
        return taken

    def add(self, inputs: Tensor) -> None:
        """Count the tokens of ``inputs`` [..., in], of any float dtype: every token weighs the same, whatever batch it came in.

        :raises UsageError: for another number of inputs
        """
        if inputs.shape[-1:] != (self.in_features,):
            raise UsageError(f"inputs of shape {list(inputs.shape)} are not those of a linear with {self.in_features} inputs")
        rows = inputs.detach().reshape(-1, self.in_features).to(self._upper.device, torch.float32)
        if not rows.shape[0]:
            return
        tokens = self.tokens + rows.shape[0]
        for start in range(0, self.in_features, PANEL):
            left, right = rows[:, start : start + PANEL], rows[:, start:]
            part = self._upper[start : start + PANEL, start:]
            part.addmm_(left.T, right, beta=self.tokens / tokens, alpha=2 / tokens)
        self.tokens = tokens
        self._kept = None

    def checked(self, name: str) -> Hessian:
        """This Hessian, to be used for the layer ``name``.

        :raises UsageError: it saw no token
        :raises UnreadableError: an input held NaN or an infinity, or squares that float32 cannot sum
        """
        if self.saw_no_token:
            raise UsageError(f"{name}: saw no token in calibration, and GPTQ needs its inputs: give data that reaches it")
        bad = int((~torch.isfinite(self.diagonal)).sum())
        if bad:
            raise UnreadableError(
                f"{name}: {bad} of {self.in_features} input channels held NaN or an infinity in calibration, and finite values"
                " were wanted: check the calibration data, or run the model in bfloat16 or float32"
            )
        return self

    def factor(self, name: str, percdamp: float, order: Tensor | None = None, last: bool = False) -> Tensor:
        """``R`` [in, in], upper triangular, with ``R R^T`` the damped Hessian, its inputs in ``order``. Kept, so not to be changed.

        A Hessian that is not positive definite gets twice the damping, and again, up to all of the diagonal's mean. ``last``: nothing is
        asked of this object afterwards but its ``diagonal``.

        :raises UsageError, UnreadableError: as ``checked``
        :raises UnreadableError: no damping made it positive definite
        """
        if self._kept is not None and self._kept[0] == percdamp and _same(self._kept[1], order):
            return self._kept[2]
        self._kept = None  # frees it before the next is made
        backwards = torch.arange(self.in_features - 1, -1, -1, device=self._upper.device) if order is None else order.flip(0)
        # The lower factor of the inputs taken backwards is R, turned around.
        matrix = _solvable(self.checked(name)._taken(backwards))
        diagonal = matrix.diagonal().clone()
        factored = torch.empty((), dtype=torch.int32, device=matrix.device)
        dead = diagonal == 0
        mean = diagonal.sum() / (~dead).sum().clamp(min=1)
        mean = torch.where(mean > 0, mean, torch.ones_like(mean))
        diagonal[dead] = mean
        damping = percdamp
        while True:
            matrix.diagonal().copy_(diagonal + damping * mean)
            torch.linalg.cholesky_ex(matrix.T, upper=True, out=(matrix.T, factored))  # LAPACK counts by columns: in place, the lower one
            if not int(factored) and bool(torch.isfinite(matrix.diagonal()).all()):
                break
            if damping >= 1:
                raise UnreadableError(
                    f"{name}: the Hessian of its inputs is not positive definite, even with all of its diagonal's mean added to it;"
                    " check the calibration data, or leave the layer out"
                )
            damping = min(max(2 * damping, 0.01), 1.0)
            del matrix
            matrix = _solvable(self._taken(backwards))
        self.damping = damping
        _turn(matrix)
        factor = matrix.to(self._upper.device)
        self._kept = (percdamp, order, factor)
        if last:
            self._diagonal, self._upper = self._upper.diagonal().clone(), self._upper.new_empty(0)
        return factor


def _solvable(matrix: Tensor) -> Tensor:
    """``matrix`` where it can be factored: on the CPU, for devices whose PyTorch has none of LAPACK, such as an NPU."""
    return matrix if matrix.device.type in COMPLETE else matrix.cpu()


def _turn(matrix: Tensor) -> None:
    """Reverse the rows and the columns of ``matrix``, in place."""
    values = matrix.view(-1)
    size, half = values.numel(), values.numel() // 2
    for start in range(0, half, TURN):
        stop = min(start + TURN, half)
        front = values[start:stop].flip(0)
        values[start:stop] = values[size - stop : size - start].flip(0)
        values[size - stop : size - start] = front


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


@dataclass(frozen=True)
class _Grid:
    """What codes of ``bits`` can say: from ``low`` to ``high``, with a scale of ``dtype`` for some inputs of each output."""

    bits: int
    symmetric: bool
    dtype: torch.dtype
    mse: float

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def parameters(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset, float32 [..., out], of ``weights`` [..., inputs, out]; rules 1 to 5."""
        least, most = weights.amin(-2).clamp(max=0), weights.amax(-2).clamp(min=0)
        if self.symmetric:
            most = torch.maximum(-least, most)
            least = -most
        empty = least == most
        least, most = torch.where(empty, -torch.ones_like(least), least), torch.where(empty, torch.ones_like(most), most)
        scale, offset = self._of_range(least, most)
        if not self.mse:
            return scale, offset
        best = self._errors(weights, scale, offset)
        for step in range(1, SHRINKS):
            part = (STEPS - step) / STEPS
            other_scale, other_offset = self._of_range(least * part, most * part)
            errors = self._errors(weights, other_scale, other_offset)
            better = errors < best
            scale, offset = torch.where(better, other_scale, scale), torch.where(better, other_offset, offset)
            best = torch.minimum(errors, best)
        return scale, offset

    def _of_range(self, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        levels = 2**self.bits - 1
        scale = ((most - least) / levels).to(self.dtype).float().clamp(min=EPSILON)
        if self.symmetric:
            return scale, torch.zeros_like(scale)
        return scale, torch.round(-least / scale).clamp_(0, levels).add_(self.low)

    def codes(self, weights: Tensor, scale: Tensor, offset: Tensor, out: Tensor | None = None) -> Tensor:
        """Codes, as floats, in the tools' order: the offset is added to what is already rounded."""
        return torch.div(weights, scale, out=out).round_().add_(offset).clamp_(self.low, self.high)

    def _errors(self, weights: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        scale, offset = scale.unsqueeze(-2), offset.unsqueeze(-2)
        return self.codes(weights, scale, offset).sub_(offset).mul_(scale).sub_(weights).abs_().pow_(self.mse).sum(-2)


def round_gptq(
    name: str,
    weight: Tensor,
    hessian: Hessian,
    bits: int,
    symmetric: bool,
    group_size: int,
    settings: Gptq | None = None,
    scale_dtype: torch.dtype = torch.float16,
    last: bool = False,
) -> RoundedWeight:
    """``weight`` [out, in] of the layer ``name``, rounded to minimize the error of its output for the inputs that ``hessian`` saw.

    Nothing given changes, but the Hessian keeps a factor, and nothing else if this is the ``last`` linear that needs it. The result is on
    the weight's device: codes [out, in] int8; scale and offset [out, groups] (``group_size`` -1: [out, 1]) of ``scale_dtype``; ``fake``,
    the law ``(codes - offset) * scale`` in float32, as the weight's dtype holds it; ``g_idx`` [in] int32 for act order over groups that
    are not static, else None.

    :raises UsageError: bits beyond 2 to 8, groups that do not divide in, a Hessian of other inputs or of no token
    :raises UnreadableError: the weight or the inputs hold NaN or an infinity, or the Hessian cannot be factored
    :raises RefusedError: ``scale_dtype`` cannot hold a scale
    """
    settings = settings or Gptq()
    width = checked_width(name, weight, bits, group_size)
    if hessian.in_features != weight.shape[1]:
        raise UsageError(
            f"{name}: the Hessian is of {hessian.in_features} inputs, and the weight has {weight.shape[1]}; give the layer its own"
        )
    order = _order(hessian.checked(name).diagonal, width, settings)
    factor = hessian.factor(name, settings.percdamp, order, last).to(weight.device)
    grid = _Grid(bits, symmetric, scale_dtype, settings.mse)

    values = weight.detach().float() * (hessian.diagonal != 0).to(weight.device)
    outputs, inputs = values.shape
    fixed = settings.static_groups or width == inputs
    if fixed:
        scale, offset = grid.parameters(values.T.reshape(-1, width, outputs))
    else:
        scale, offset = values.new_empty(inputs // width, outputs), values.new_empty(inputs // width, outputs)
    place = torch.arange(inputs, device=weight.device)
    order = place if order is None else order.to(weight.device)
    irregular = settings.act_order and not fixed
    groups = (place if irregular else order) // width  # in the order of rounding
    values = values[:, order]
    codes = _compensated(values, factor, grid, scale, offset, groups.tolist(), 0 if fixed else width, settings.block_size)
    if not bool(torch.isfinite(scale).all()):
        raise RefusedError(f"{name}: {scale_dtype} cannot hold a scale of this weight; store scales in a wider dtype")
    if not bool(torch.isfinite(values).all()):
        raise UnreadableError(f"{name}: its weight cannot be compensated in float32; use more damping, or more calibration data")

    back = torch.argsort(order)
    codes, groups = codes[back], groups[back]
    fake = (codes - offset[groups]) * scale[groups]
    return RoundedWeight(
        codes.T.contiguous(),
        scale.T.to(scale_dtype).contiguous(),
        offset.T.to(scale_dtype).contiguous(),
        fake.T.to(weight.dtype).contiguous(),
        g_idx=groups.to(torch.int32) if irregular else None,
    )


def checked_width(name: str, weight: Tensor, bits: int, group_size: int) -> int:
    """The inputs of a group of ``weight`` [out, in].

    :raises UsageError: bits beyond 2 to 8, or groups that do not divide in
    :raises UnreadableError: the weight holds NaN or an infinity
    """
    inputs = weight.shape[1]
    if bits not in BITS:
        raise UsageError(f"{name}: {bits} bits were asked for; weights are rounded to {BITS[0]} to {BITS[-1]}")
    if group_size != -1 and (group_size < 1 or inputs % group_size):
        raise UsageError(f"{name}: {inputs} inputs are not whole groups of {group_size}; choose another group_size, or -1 for one group")
    if not bool(torch.isfinite(weight).all()):
        raise UnreadableError(f"{name}: the weight holds NaN or an infinity, and finite values were wanted; get a sound checkpoint")
    return inputs if group_size == -1 else group_size


def _order(diagonal: Tensor, width: int, settings: Gptq) -> Tensor | None:
    """[in]: which input is rounded first, second, ...; None for the order in which they are."""
    if settings.act_order:
        return torch.argsort(diagonal, descending=True, stable=True)
    if not settings.act_group_aware:
        return None
    sizes, within = torch.sort(diagonal.reshape(-1, width), descending=True, stable=True)
    groups = torch.argsort(sizes[:, 0], descending=True, stable=True)
    return (within[groups] + groups.unsqueeze(1) * width).reshape(-1)


def _compensated(
    values: Tensor, factor: Tensor, grid: _Grid, scale: Tensor, offset: Tensor, groups: list[int], renewed: int, block_size: int
) -> Tensor:
    """Codes [in, out] int8 of weights ``values`` [out, in], which become what rounding lost of them: the loop of the module's docstring.

    factor, groups   ``R`` [in, in] and the group of each input, in the order of the values
    scale, offset    [groups, out]; where ``renewed`` is not 0, a group's are set when its first input is reached, every ``renewed`` inputs
    """
    inputs, outputs = factor.shape[0], values.shape[0]
    block = max(renewed, block_size // renewed * renewed) if renewed else block_size  # of whole groups
    codes = torch.empty(inputs, outputs, dtype=torch.int8, device=values.device)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        inverse = _inverse(factor[start:stop, start:stop])
        owed = values[:, :start] @ factor[:start, start:stop]
        weights = torch.addmm(values[:, start:stop], owed, inverse).T.contiguous()  # [block, out]: an input is a row
        found, rounded, errors = (torch.empty_like(weights) for _ in range(3))
        steps = inverse.diagonal().unbind()
        for first in range(0, stop - start, block_size):
            last = min(first + block_size, stop - start)
            for i in range(first, last):
                weight, group = weights[i], groups[start + i]
                if renewed and i % renewed == 0:
                    scale[group], offset[group] = grid.parameters(weights[i : i + renewed])
                now_scale, now_offset = scale[group], offset[group]
                grid.codes(weight, now_scale, now_offset, out=found[i])
                torch.sub(found[i], now_offset, out=rounded[i]).mul_(now_scale)
                torch.sub(weight, rounded[i], out=errors[i]).div_(steps[i])
                weights[i + 1 : last].addr_(inverse[i, i + 1 : last], errors[i], alpha=-1)
            weights[last:].addmm_(inverse[first:last, last:].T, errors[first:last], alpha=-1)
        codes[start:stop] = found
        values[:, start:stop] -= rounded.T
    return codes


def _inverse(upper: Tensor) -> Tensor:
    matrix = _solvable(upper)
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(matrix, identity, upper=True).to(upper.device)
