"""torch's tensors in the tree of a pickle (``pickle_tree``): what each is, and where its elements lie.

Defined by torch (``torch/_utils.py``, ``torch/serialization.py``). A tensor is
``_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)``, offset and strides in elements, a parameter
``_rebuild_parameter(tensor, requires_grad, hooks)`` around one. How a storage is told, and where it lies, is the file's own
(``npy_file``, ``torch_zip``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import UnreadableError
from .files import Readable
from .ir import Array, ArrayLike
from .pickle_tree import Call, Name
from .safetensors_file import DTYPES, MAX_DIMENSIONS, TensorInfo, stored_tensor

MAX_SPREAD_BYTES = 16 << 20
"""Of a tensor whose elements do not lie in order; others are not held."""

_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
ORDERED = "collections.OrderedDict"
ELEMENTS = {
    "torch.HalfStorage": "F16", "torch.BFloat16Storage": "BF16", "torch.FloatStorage": "F32", "torch.DoubleStorage": "F64",
    "torch.CharStorage": "I8", "torch.ByteStorage": "U8", "torch.ShortStorage": "I16", "torch.IntStorage": "I32",
    "torch.LongStorage": "I64", "torch.BoolStorage": "BOOL",
}  # fmt: skip
NAMES = frozenset({*ELEMENTS, _TENSOR, _PARAMETER, ORDERED})
"""What a pickle of tensors names."""

Storage = tuple[str, int, int]
"""(dtype, byte of the first element, count) of a storage."""


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """Where a tensor lies: ``stride`` in elements, None if they lie in order from ``begin``."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    stride: tuple[int, ...] | None

    @property
    def end(self) -> int:
        """``begin`` and the bytes of its elements."""
        return self.begin + math.prod(self.shape) * DTYPES[self.dtype].itemsize


def pickled_tensor(file: str, name: str, value: Any, storage: Callable[[str, Any], Storage]) -> PickledTensor:
    """What the tree's ``value`` says of the tensor ``name``.

    storage   reads what the tree holds in a storage's place
    raises    UnreadableError for what is no tensor, or reaches beyond its storage
    """
    where = f"{file}: tensor {name[:120]!r}"
    if isinstance(value, Call) and value.name == _PARAMETER and len(value.arguments) == 3 and value.state is None:
        value = value.arguments[0]
    known = isinstance(value, Call) and value.name == _TENSOR and len(value.arguments) in {6, 7} and value.state is None
    if not known:
        raise UnreadableError(f"{file}: {name[:120]!r} is a {kind_of(value)}, wanted a torch tensor")
    stored, offset, shape, stride = value.arguments[:4]
    dtype, begin, count = storage(name, stored)
    if not are_sizes(shape) or not are_sizes(stride) or not are_sizes((offset,)) or len(shape) != len(stride):
        raise UnreadableError(f"{where} has a shape or strides that no tensor has")
    elements = math.prod(shape)
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) if elements else offset - 1
    if last >= count or offset > count:
        raise UnreadableError(f"{where} reaches to element {last} of the {count} that are stored; the file is damaged")
    item = DTYPES[dtype].itemsize
    ordered = elements == 0 or _ordered(shape, stride)
    if not ordered and elements * item > MAX_SPREAD_BYTES:
        raise UnreadableError(f"{where} {list(shape)} does not lie in order; wanted one that was made contiguous")
    return PickledTensor(dtype, shape, begin + offset * item, None if ordered else stride)


def read_tensor(file: Readable, name: str, info: TensorInfo, stride: tuple[int, ...] | None) -> ArrayLike:
    """The tensor: unread, unless its elements do not lie in order."""
    if stride is None:
        return stored_tensor(file, name, info)
    item = DTYPES[info.dtype].itemsize
    last = sum((count - 1) * step for count, step in zip(info.shape, stride, strict=True))
    data = np.frombuffer(bytes(file.read(info.begin, (last + 1) * item)), dtype=DTYPES[info.dtype])
    view: Array = np.lib.stride_tricks.as_strided(data, info.shape, [step * item for step in stride], writeable=False).copy()
    view.flags.writeable = False
    return view


def kind_of(value: Any) -> str:
    """What a value of the tree is, in a word."""
    return value.name if isinstance(value, Call) else value.path if isinstance(value, Name) else type(value).__name__


def are_sizes(numbers: Any) -> bool:
    """Whether these are sizes, strides or counts that a tensor may have."""
    if type(numbers) is not tuple or len(numbers) > MAX_DIMENSIONS or not all(type(number) is int and number >= 0 for number in numbers):
        return False
    return math.prod(number or 1 for number in numbers) < 1 << 60


def _ordered(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements lie in row-major order, without gaps."""
    step = 1
    for length, found in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and found != step:
            return False
        step *= length
    return True
