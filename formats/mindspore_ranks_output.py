"""A model written for ranks of tensor parallelism: a ``.ckpt`` file for each, and the strategy file that says what of each tensor it holds.

Defined by MindFormers 1.3.2 (``models/llama``) and Golden Stick 1.x (``param_shard_state`` in ``ptq/ptq/hal.py``). N ranks split

===================================  ==========================================================================================
q, k, v, gate, up                    by outputs: codes, scales, zero points and biases; whole is what belongs to the inputs
output projection, down              by inputs: codes, scales and zero points of groups, what the inputs have one of each for;
                                     whole are scales of outputs, biases and corrections, which are added once
embedding, lm_head                   by the vocabulary, or not at all if it does not divide
quantized KV cache                   by heads
norms                                not at all
===================================  ==========================================================================================

Files are ``rank_R/NAME.ckpt`` and ``strategy/ckpt_strategy_rank_0.ckpt``. The latter must not lie beside the ranks: MindFormers takes any
``.ckpt`` file there for the whole model. What is stored as one of q, k and v is refused: a rank holds a run of each, and a strategy file
can only say one run of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import RanksRefusedError
from .files import Readable, ReadableFile
from .laid_out import LaidOutFile
from .mindspore_output import CHUNK_BYTES, lay_out_checkpoint
from .mindspore_ranks import ParameterLayout, RankedData, strategy_bytes
from .safetensors_file import DTYPES, TensorInfo, TensorTable

STRATEGY_FILE = "strategy/ckpt_strategy_rank_0.ckpt"


@dataclass(frozen=True, slots=True)
class StrategyLaidOut:
    """The strategy file, which holds no tensors (``laid_out.LaidOutFile``)."""

    name: str
    content: bytes
    tensors: TensorTable = field(default_factory=TensorTable)
    metadata: Mapping[str, str] = field(default_factory=dict)
    shared: Sequence[tuple[str, ...]] = ()

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def parts(self) -> tuple[StrategyLaidOut]:
        return (self,)

    def pieces(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return ((offset, length),)

    def heads(self) -> Iterator[tuple[int, bytes]]:
        yield 0, self.content

    def growing(self, path: Path) -> Readable:
        return ReadableFile(path, growing=True)

    def sealed(self, data: Readable) -> StrategyLaidOut:
        return self


@dataclass(frozen=True, slots=True)
class Cut:
    """What of a rectangle lies in a rank: [rows, cols] of it, at [row, col] of the rank's own tensor ``info``."""

    rank: int
    info: TensorInfo
    rows: slice
    cols: slice
    row: int
    col: int


@dataclass(frozen=True, slots=True)
class RanksLaidOut:
    """The files of all ranks, fully laid out, as one (``laid_out.LaidOut``): tensors are whole, and lie one after another.

    files    of the ranks; layouts: how each tensor is split, in the order of ``tensors``, of which every rank has one too
    """

    name: str
    files: tuple[LaidOutFile, ...]
    strategy: StrategyLaidOut
    layouts: tuple[ParameterLayout, ...]
    tensors: TensorTable
    metadata: Mapping[str, str]
    own: TensorTable
    shared: Sequence[tuple[str, ...]] = ()
    numbers: dict[int, int] = field(default_factory=dict)
    """Of tensors that have elements, by the byte where they begin."""

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def parts(self) -> tuple[LaidOutFile, ...]:
        return (*self.files, self.strategy)

    def growing(self, path: Path) -> Readable:
        root, data = path.parent.parent, RankedData(path)
        files = [file.growing(root / file.name) for file in self.files]
        for number, layout in enumerate(self.layouts):
            info = self.own.row(number)
            data.add(info, layout, [(file, info) for file in files])
        return data

    def cuts(self, info: TensorInfo, row: int, col: int, shape: tuple[int, ...]) -> Iterator[Cut]:
        """Where a rectangle of ``shape`` (rows, columns) at [row, col] of the whole tensor ``info`` goes."""
        if not math.prod(shape):
            return
        number = self.numbers[info.begin]
        own, layout = self.own.row(number), self.layouts[number]
        wide = own.shape[-1] if own.shape else 1
        high = math.prod(own.shape) // wide
        for rank in range(len(self.files)):
            down, right = layout.cell(rank)
            top, left = down * high, right * wide
            first, last = max(row, top), min(row + shape[0], top + high)
            begin, end = max(col, left), min(col + shape[1], left + wide)
            if first < last and begin < end:
                yield Cut(rank, own, slice(first - row, last - row), slice(begin - col, end - col), first - top, begin - left)


def lay_out_ranks(
    entries: Sequence[tuple[str, str, tuple[int, ...]]],
    name: str,
    axes: Mapping[str, int | None],
    called: Mapping[str, str],
    ranks: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> RanksLaidOut:
    """Decide every byte but the data of ``rank_R/NAME``.

    entries   (name, dtype, shape) of whole tensors, as they are stored; axes: that each is split along, None for none
    called    names to find them by in ``tensors``
    raises    RanksRefusedError for a tensor that does not divide
    """
    layouts, cut = {}, []
    for stored, dtype, shape in entries:
        axis = axes[stored]
        if axis is not None and shape[axis] % ranks:
            raise RanksRefusedError(
                f"{called[stored]}: its {shape[axis]} {'rows' if axis == 0 and len(shape) > 1 else 'columns'} as it is stored "
                f"{list(shape)} do not divide over {ranks} ranks; give --tp a number that divides them"
            )
        layouts[stored] = ParameterLayout((ranks,), tuple(0 if number == axis else -1 for number in range(len(shape))))
        cut.append((stored, dtype, tuple(length // ranks if number == axis else length for number, length in enumerate(shape))))
    file = lay_out_checkpoint(cut, f"rank_0/{name}", chunk_bytes=chunk_bytes)
    whole, own, metadata, numbers, begin = TensorTable(), TensorTable(), dict[str, str](), dict[int, int](), 0
    for number, (stored, _, shape) in enumerate(entries):
        info, tensor = file.tensors[stored], called[stored]
        end = begin + math.prod(shape) * DTYPES[info.dtype].itemsize
        whole.add(tensor, info.dtype, shape, begin, end)
        own.add(stored, info.dtype, info.shape, info.begin, info.end)
        if stored in file.metadata:
            metadata[tensor] = file.metadata[stored]
        if end > begin:
            numbers[begin] = number
        begin = end
    files = tuple(replace(file, name=f"rank_{rank}/{name}") for rank in range(ranks))
    strategy = StrategyLaidOut(STRATEGY_FILE, strategy_bytes(layouts))
    return RanksLaidOut(files[0].name, files, strategy, tuple(layouts.values()), whole, metadata, own, (), numbers)
