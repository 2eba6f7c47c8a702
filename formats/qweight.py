"""What the readers of AWQ and GPTQ share: layers that are a handful of tensors named after a module, beside plain tensors.

A layer is there if its key tensor (``qweight``; ``B`` in AutoGPTQ's Marlin) is; its other parts lie beside it under the same
module, in any shard. Parts without a key tensor are what is left of a layer, so the checkpoint is incomplete.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .checkpoint import Checkpoint, Entry, Location
from .errors import UnreadableError
from .safetensors_file import TensorSet

ORPHANS = frozenset({"qzeros", "g_idx", "scaled_zeros"})
"""Leaf names that nothing but a quantized layer has."""


def entries_of(tensors: Iterable[str], parts: Sequence[str], stored: TensorSet) -> list[Entry]:
    """Layers, by module, where their key tensor ``parts[0]`` stands, and plain tensors, in order of ``tensors``.

    raises  UnreadableError for a part of a layer whose key tensor is missing
    """
    key, entries = parts[0], list[Entry]()
    for tensor in tensors:
        module, _, leaf = map(sys.intern, tensor.rpartition("."))
        is_layer = leaf in parts and f"{module}.{key}" in stored
        if is_layer and leaf == key:
            entries.append(("layer", module))
        elif leaf in ORPHANS and not is_layer:
            raise UnreadableError(f"{module}: has {leaf}, but no {key}; the checkpoint is incomplete")
        elif not is_layer:
            entries.append(("plain", tensor))
    return entries


class QweightCheckpoint(Checkpoint):
    """A checkpoint whose layers have the tensors ``parts``, the key tensor first."""

    parts: tuple[str, ...] = ()

    def __init__(self, location: Location, format: str, variant: str, tensors: TensorSet, parts: tuple[str, ...]) -> None:
        super().__init__(location, format, variant, tensors)
        self.parts = parts
        self.entries = entries_of(self.tensors, parts, self.tensors)

    def layer_tensors(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{part}" for part in self.parts if f"{name}.{part}" in self.tensors)

    def require(self, name: str, wanted: Mapping[str, tuple[str, ...]], layout: str) -> None:
        """Check that every part in ``wanted`` is there, 2-D and of one of its dtypes; ``layout`` says what the format has."""
        for part, dtypes in wanted.items():
            info = self.tensors.get(f"{name}.{part}")
            if info is None or len(info.shape) != 2 or info.dtype not in dtypes:
                found = "is missing" if info is None else f"is {info.dtype} {list(info.shape)}"
                raise UnreadableError(f"{name}: {part} {found}; {layout}")

    def part(self, name: str, part: str) -> Any:
        """The stored tensor, unread."""
        return self.tensors.tensor(f"{name}.{part}")

    def check_group_size(self, name: str, in_: int, group_size: int, said: Any) -> None:
        """UnreadableError if the config says another group size than the shapes do."""
        wanted = in_ if said == -1 else said
        if wanted is not None and wanted != group_size:
            raise UnreadableError(f"{name}: shapes say group_size {group_size}, the config says {said!r}; correct the config")
