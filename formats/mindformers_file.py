"""A MindFormers ``.ckpt`` file under Hugging Face's names, for reading and for writing: what is stored as one is seen in its parts.

A part is a run of rows of the stored tensor, or of columns where outputs run along the last axis, so nothing is copied. What belongs
to a layer's inputs (``SHARED``) is stored once for all parts, and each has it whole. Names that MindFormers does not have stay as
they are. ``mindformers_names`` says which module is called what.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import RanksRefusedError, RefusedError, UnreadableError
from .files import Readable
from .ir import ArrayLike
from .laid_out import LaidOut, LaidOutFile
from .mindformers_names import Names, names_of
from .mindspore_file import MindSporeFile
from .mindspore_output import CHUNK_BYTES, lay_out_checkpoint
from .mindspore_ranks import RankedFile
from .mindspore_ranks_output import lay_out_ranks
from .safetensors_file import DTYPES, SourceFile, TensorInfo, TensorTable, stored_tensor

INT4 = "Int4"
SHARED = re.compile(r"(^|\.)(input_scale|input_zp|smooth_scale)$|^_input_quantizer\.|^_weight_observer_cell\.")
"""What fused layers have once, by what follows the module's name."""
CACHE = ".paged_attention_mgr."
"""In the names of a quantized KV cache's tensors, which keep MindFormers' names."""
_OUTPUT = ("attention.wo", "self_attention.linear_proj")
"""The projection whose inputs are q's outputs."""
_WEIGHTS = ("weight", "_layer.weight", "_handler.weight")

Triple = tuple[str, str, tuple[int, ...]]
"""(name, dtype, shape); dtype is a name of ``safetensors_file.DTYPES``, or "Int4" for two 4-bit codes a byte."""


def out_axis(leaf: str, dtype: str, dimensions: int) -> int | None:
    """The axis that runs along a layer's outputs; None: the tensor belongs to its inputs."""
    if SHARED.search(leaf):
        return None
    return 1 if dimensions == 2 and (dtype == INT4 or leaf not in _WEIGHTS) else 0


class MindFormersFile:
    """A ``.ckpt`` file whose tensors have Hugging Face's names (``StoredFile``).

    names      what its modules are called; is_fused: whether one holds the parts of several
    metadata   {name: "Int4"} of tensors that hold two 4-bit codes a byte
    stored     the file as it is, or the ranks that make one
    raises     UnreadableError
    """

    def __init__(self, path: Path, number: int = 0, stored: MindSporeFile | RankedFile | None = None) -> None:
        self.path, self.stored = path, stored or MindSporeFile(path)
        self.identity: SourceFile = self.stored.identity
        self.exempt = self.stored.exempt
        self.names = names_of(self.stored.tensors)
        self.tensors, self.metadata, self.is_fused = TensorTable(number), dict[str, str](), False
        self._int4 = {name for name, info in self.stored.tensors.items() if name in self.stored.metadata or self._lost_type(name, info)}
        for name, info in self.stored.tensors.items():
            int4 = name in self._int4
            for part, view in self._parts(name, info, int4):
                self.tensors.add(part, view.dtype, view.shape, view.begin, view.end, view.stride)
                if int4:
                    self.metadata[part] = INT4

    def tensor(self, name: str, info: TensorInfo | None = None) -> ArrayLike:
        """The tensor (Int4 as its bytes, int8), unread. info: its own, if it is at hand."""
        return stored_tensor(self.stored.data, name, info or self.tensors[name])

    def unchanged(self) -> bool:
        """Whether the file on disk still is the one that was opened."""
        return self.stored.unchanged()

    def _lost_type(self, name: str, info: TensorInfo) -> bool:
        """Whether these are 4-bit codes as Int8, which is what MindSpore's transform_checkpoints leaves of Int4: by their scales' shape.

        8-bit codes have one scale for each row.
        """
        scale = self.stored.tensors.get(f"{name.removesuffix('_layer.weight')}_layer.matmul.weight_scale")
        if not name.endswith("._layer.weight") or scale is None or info.dtype != "I8" or len(info.shape) != 2:
            return False
        outputs = scale.shape[-1] if scale.shape else 0
        return len(scale.shape) == 2 or (info.shape[0] != outputs and 2 * info.shape[1] == outputs)

    def _parts(self, name: str, info: TensorInfo, int4: bool) -> Iterator[tuple[str, TensorInfo]]:
        parts = self.names.canonical(name)
        self.is_fused |= len(parts) > 1
        axis = out_axis(self.names.leaf(name), INT4 if int4 else info.dtype, len(info.shape)) if len(parts) > 1 else None
        if axis is None:
            yield from ((part, info) for part in parts)
            return
        if axis >= len(info.shape):
            raise UnreadableError(f"{self.path.name}: tensor {name!r} is a scalar, and {len(parts)} layers are stored as one in it")
        scale = 2 if int4 else 1
        start = 0
        for part, count in zip(parts, self._counts(name, scale * info.shape[axis], len(parts)), strict=True):
            if count % scale:
                raise UnreadableError(f"{self.path.name}: tensor {name!r} holds {count} outputs of {part}, which do not fill whole bytes")
            yield part, cut(info, axis, start // scale, count // scale)
            start += count

    def _counts(self, name: str, total: int, parts: int) -> tuple[int, ...]:
        """Outputs of each part of a fused tensor: gate and up alike; q as many as the output projection has inputs, k and v the rest."""
        if parts == 2:
            counts: tuple[int, ...] = (total // 2, total // 2)
        else:
            q = self._inputs_of_output(name)
            counts = (q, (total - q) // 2, (total - q) // 2)
        if sum(counts) != total or min(counts) < 1:
            raise UnreadableError(
                f"{self.path.name}: tensor {name!r} has {total} outputs, which are not those of {parts} layers; it is damaged"
            )
        return counts

    def _inputs_of_output(self, name: str) -> int:
        block = re.match(r".*?\d+\.", name)
        assert block is not None
        for module in _OUTPUT:
            for leaf in _WEIGHTS:
                stored = f"{block[0]}{module}.{leaf}"
                info = self.stored.tensors.get(stored)
                if info is not None and len(info.shape) == 2:
                    return info.shape[0 if stored in self._int4 else 1]
        raise UnreadableError(
            f"{self.path.name}: tensor {name!r} holds q, k and v, and {block[0]}{_OUTPUT[0]}, whose inputs say how much of it is q's, "
            "is not there; the checkpoint is incomplete"
        )


def cut(info: TensorInfo, axis: int, start: int, count: int) -> TensorInfo:
    """``count`` rows (axis 0) or columns (axis 1) of a stored tensor, from ``start``."""
    shape = tuple(count if number == axis else length for number, length in enumerate(info.shape))
    item = DTYPES[info.dtype].itemsize
    size = item
    for length in shape:
        size *= length
    step = info.nbytes // info.shape[0] if axis == 0 else item
    begin = info.begin + start * step
    return TensorInfo(info.dtype, shape, begin, begin + size, info.file, info.shape[1] if axis == 1 else info.stride)


@dataclass(frozen=True, slots=True)
class MindFormersOutput:
    """A ``.ckpt`` file that is fully laid out, whose tensors have Hugging Face's names (``laid_out.LaidOut``)."""

    name: str
    stored: LaidOutFile
    tensors: TensorTable
    metadata: Mapping[str, str] = field(default_factory=dict)
    shared: Sequence[tuple[str, ...]] = ()

    @property
    def size(self) -> int:
        return self.stored.size

    @property
    def parts(self) -> tuple[MindFormersOutput]:
        return (self,)

    def pieces(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return self.stored.pieces(offset, length)

    def heads(self) -> Iterator[tuple[int, bytes]]:
        return self.stored.heads()

    def growing(self, path: Path) -> Readable:
        return self.stored.growing(path)

    def sealed(self, data: Readable) -> MindFormersOutput:
        return replace(self, stored=self.stored.sealed(data))


@dataclass
class _Whole:
    """A tensor to be stored, and the parts that it is put together from: (number among the parts, name, dtype, shape)."""

    parts: list[tuple[int, str, str, tuple[int, ...]]]
    fused: int


def split_axis(names: Names, stored: str, dtype: str, shape: tuple[int, ...], ranks: int) -> int | None:
    """The axis that ``ranks`` ranks split a stored tensor along; None: each has it whole (``mindspore_ranks_output``)."""
    module, leaf = names.place(stored)
    if CACHE in stored:
        return len(shape) - 1
    if not module or "norm" in module or not shape:
        return None
    if not stored.startswith(names.block[1]):  # the vocabulary
        return 0 if len(shape) == 2 and shape[0] % ranks == 0 else None
    by_input = module in names.by_input
    outputs = out_axis(leaf, dtype, len(shape))
    if outputs is None:  # of the inputs
        return 0 if by_input and shape != (1,) else None
    if by_input:
        return 1 - outputs if len(shape) == 2 else None
    return outputs


def lay_out_mindformers(
    tensors: Iterable[Triple], name: str, names: Names, fuse: bool = False, chunk_bytes: int = CHUNK_BYTES, ranks: int = 1
) -> LaidOut:
    """Decide every byte but the data of the file ``rank_0/name``, from Hugging Face tensors; or of so many ranks.

    fuse     store q, k and v as one, and gate and up
    raises   RefusedError for a tensor that MindFormers has no name for, parts that do not fit one another, or what ranks cannot split
    """
    wholes: dict[str, _Whole] = {}
    counts = {f"{whole}": len(parts) for whole, parts in names.fused.items()}
    for tensor, dtype, shape in tensors:
        found = (tensor, 0) if CACHE in tensor else names.stored(tensor, fuse)
        if found is None:
            raise RefusedError(f"{tensor}: has no name in MindFormers' {names.name} models, which would not load it; leave it out")
        stored, part = found
        count = next((count for whole, count in counts.items() if f".{whole}." in stored), 1)
        wholes.setdefault(stored, _Whole([], count)).parts.append((part, tensor, dtype, shape))
    entries = [(stored, *_joined(stored, whole, names)) for stored, whole in wholes.items()]
    if ranks > 1:
        fused = next((stored for stored, whole in wholes.items() if whole.fused > 1), None)
        if fused is not None:
            raise RanksRefusedError(
                f"{fused}: holds several layers as one, of which a rank has a share each, and no strategy file can say that; "
                f"convert without {'--tp' if names.always else '--qkv-concat'}"
            )
        axes = {stored: split_axis(names, stored, dtype, shape, ranks) for stored, dtype, shape in entries}
        return lay_out_ranks(entries, name, axes, {stored: whole.parts[0][1] for stored, whole in wholes.items()}, ranks, chunk_bytes)
    file = lay_out_checkpoint(entries, f"rank_0/{name}", chunk_bytes=chunk_bytes)
    table, metadata = TensorTable(), dict[str, str]()
    for stored, whole in wholes.items():
        info, start = file.tensors[stored], 0
        for _, tensor, dtype, shape in sorted(whole.parts):
            axis = out_axis(names.leaf(stored), dtype, len(shape)) if whole.fused > 1 else None
            view = info if axis is None else cut(info, axis, start, shape[axis])
            start += 0 if axis is None else shape[axis]
            table.add(tensor, view.dtype, view.shape, view.begin, view.end, view.stride)
            if dtype == INT4:
                metadata[tensor] = INT4
    outputs = ((out_axis(names.leaf(stored), *whole.parts[0][2:3], len(whole.parts[0][3])), whole) for stored, whole in wholes.items())
    shared = [tuple(part[1] for part in whole.parts) for axis, whole in outputs if axis is None and whole.fused > 1]
    return MindFormersOutput(file.name, file, table, metadata, shared)


def _joined(stored: str, whole: _Whole, names: Names) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape) of a tensor that is put together from its parts."""
    whole.parts.sort()
    _, tensor, dtype, shape = whole.parts[0]
    if [number for number, *_ in whole.parts] != list(range(whole.fused)):
        raise RefusedError(
            f"{tensor}: would be stored in {stored} with {whole.fused - 1} others, of which only {len(whole.parts) - 1} are there; "
            "convert without --qkv-concat"
        )
    if whole.fused == 1:
        return dtype, shape
    axis = out_axis(names.leaf(stored), dtype, len(shape))
    for _, other, another, size in whole.parts[1:]:
        alike = len(size) == len(shape) and all(a == b for number, (a, b) in enumerate(zip(size, shape, strict=True)) if number != axis)
        if another != dtype or not alike:
            raise RefusedError(
                f"{other}: is {another} {list(size)}, and {tensor}, with which it would be stored as one, {dtype} {list(shape)}; "
                "convert without --qkv-concat"
            )
    if axis is None:
        return dtype, shape
    total = sum(size[axis] for *_, size in whole.parts)
    return dtype, tuple(total if number == axis else length for number, length in enumerate(shape))
