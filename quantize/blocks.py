"""A decoder, one layer at a time: what lets a model be calibrated, measured and quantized in the memory of one of its layers.

A *stage* is the model with only some of its parts: the embeddings, one decoder layer, or the final norm and head. What is left out
is passed by: the list of layers has just one that is run, the embeddings are fed with ``inputs_embeds``, norm and head return their
input. So masks, rotary embeddings and whatever else a layer is given are made by the model's own forward, and modules keep their names
("model.layers.3.self_attn.q_proj"), whatever is to be done with them.

Where the weights are decides what a stage costs: of a model in memory nothing is copied (``Blocks(model)``); of a folder the parts
are read when a stage begins and dropped when it ends (``Blocks.open``). A folder of any format of ours will do: quantized linears are
dequantized by the law.

Between stages the hidden states of every sample are kept in ``States``: in memory, or in a file.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from convert.matrices import LEAF_ROWS
from formats import Checkpoint, Location, open_checkpoint
from formats.errors import RefusedError, UnreadableError, UsageError
from formats.ir import dequantize, read

from .architectures import Architecture, architecture_of
from .devices import HOST
from .models import transformers_config
from .stage import forward

__all__ = ["Blocks", "Inputs", "Sample", "Shell", "States", "Weights", "advance", "shell", "to_torch"]

FLOAT_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""safetensors' names of the dtypes of float weights."""

Sample = Sequence[Tensor]
"""[input_ids] or [input_ids, attention_mask], each [1, tokens]."""

Shell = tuple[nn.Module, torch.dtype]
"""A model whose parameters are on the meta device, and what its config says their dtype is."""

TILE = 1 << 22
"""Weights that are dequantized at a time."""


def to_torch(array: Any) -> Tensor:
    """A NumPy array, of ml_dtypes' bfloat16 too, as a tensor that shares its memory where it may be written to."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    array = array if array.flags.writeable else array.copy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class Weights:
    """A folder's tensors under the names of a float model, in the dtype ``dtype``: quantized linears dequantized."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self._layers = frozenset(checkpoint.layer_names)
        self._plain = frozenset(checkpoint.plain_names)

    @property
    def _home(self) -> str:
        """Where the config is from."""
        own = self.checkpoint.location
        return (own if own.base is None else own.base).folder.name

    def __contains__(self, name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        if module in self._layers:
            return leaf == "weight" or (leaf == "bias" and self.checkpoint.layer(module).bias is not None)
        return name in self._plain

    def tensor(self, name: str) -> Tensor:
        """The tensor called ``name``, in ``dtype`` if it is one of floats."""
        module, _, leaf = name.rpartition(".")
        if module in self._layers:
            layer = self.checkpoint.layer(module)
            if leaf == "weight":
                return self._in_tiles(layer.shape, lambda rows: dequantize(layer, rows))
            assert layer.bias is not None
            return self._floats(to_torch(read(layer.bias)))
        data: Any = self.checkpoint.plain(name).data
        if len(data.shape) == 2 and data.dtype.name in {"float16", "bfloat16", "float32", "float64"}:
            return self._in_tiles(data.shape, lambda rows: read(data, rows))
        return self._floats(to_torch(read(data)))

    def _in_tiles(self, shape: tuple[int, int], rows_of: Callable[[slice], Any]) -> Tensor:
        """A matrix [out, in] in ``dtype``, of which only a tile is read and converted at a time."""
        matrix = torch.empty(shape, dtype=self.dtype)
        step = max(1, TILE // max(shape[1], 1) // LEAF_ROWS) * LEAF_ROWS  # no layout's tiles are split there
        for start in range(0, shape[0], step):
            matrix[start : start + step] = to_torch(rows_of(slice(start, start + step)))
        return matrix

    def _floats(self, tensor: Tensor) -> Tensor:
        # Always a copy, in memory of torch's own alignment, on which the last bits of matrix products depend.
        return tensor.to(self.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

    def fill(self, module: nn.Module, path: str) -> nn.Module:
        """``module``, whose parameters are on the meta device, with those that the folder has below ``path``."""
        state: dict[str, Tensor] = {}
        for name, wanted in module.state_dict().items():
            whole = f"{path}.{name}"
            if whole not in self:
                raise UnreadableError(
                    f"{self.checkpoint.location.folder.name}: has no tensor {whole!r}, which this model's code wants; the folder is "
                    "incomplete, or its tensors are named otherwise than this transformers names them"
                )
            state[name] = found = self.tensor(whole)
            if found.shape != wanted.shape:
                raise UnreadableError(
                    f"{whole}: is {list(found.shape)}, and config.json of {self._home} makes it {list(wanted.shape)}; it is another model's"
                )
        module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(False)


class _OneLayer(nn.ModuleList):
    """A list of ``count`` layers of which only those that are there are run; they keep their names."""

    def __init__(self, count: int, layers: dict[int, nn.Module]) -> None:
        super().__init__()
        self.count = count
        for index, layer in layers.items():
            self.add_module(str(index), layer)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [layer for number, layer in self._modules.items() if int(number) in range(self.count)[index]]
        return self._modules[str(range(self.count)[index])]


class States(Sequence[Tensor]):
    """The hidden states [1, tokens, hidden] of every sample, in memory or, with ``path``, in a file that is mapped."""

    def __init__(self, lengths: Sequence[int], hidden: int, dtype: torch.dtype, path: Path | None = None) -> None:
        self.lengths, self.hidden, self.dtype, self.path = tuple(lengths), hidden, dtype, path
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        size = int(self._starts[-1]) * hidden * dtype.itemsize
        if path is None:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        else:
            if not path.is_file() or path.stat().st_size != size:
                with path.open("wb") as file:
                    file.truncate(size)
            self._bytes = torch.from_numpy(np.memmap(path, np.uint8, "r+", shape=(size,)))

    def __len__(self) -> int:
        return len(self.lengths)

    def _view(self, index: int) -> Tensor:
        width = self.hidden * self.dtype.itemsize
        begin, end = int(self._starts[index]) * width, int(self._starts[index + 1]) * width
        return self._bytes[begin:end].view(self.dtype).reshape(1, self.lengths[index], self.hidden)

    def __getitem__(self, index: Any) -> Any:
        return self._view(range(len(self))[index]).clone()

    def __setitem__(self, index: int, values: Tensor) -> None:
        self._view(range(len(self))[index]).copy_(values)

    def sync(self) -> None:
        """Bring a file's states to the disk."""
        if self.path is not None:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


class Blocks:
    """The decoder layers of ``model``, which is in memory or, with ``weights``, an empty shell on the meta device.

    names        of the decoder layers; linears: {name: module} of all linears, of a shell without weights
    config       the model's; architecture: where its parts are
    """

    def __init__(self, model: nn.Module, architecture: Architecture | None = None, weights: Weights | None = None) -> None:
        self.model, self.weights = model, weights
        self.config: Any = getattr(model, "config", None)
        self.architecture = architecture_of(self.config) if architecture is None else architecture
        layers = self._module(self.architecture.layers)
        if not isinstance(layers, nn.ModuleList):
            raise UsageError(f"{self.architecture.layers}: is no list of layers in this model, as its architecture says it is")
        self._layers = layers
        self.names = tuple(f"{self.architecture.layers}.{index}" for index in range(len(layers)))
        self.linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._parts = {
            path: self._module(path) for path in (self.architecture.embeddings, self.architecture.final_norm, self.architecture.head)
        }
        self._use_cache = getattr(self.config, "use_cache", None)

    @classmethod
    def open(cls, folder: str | os.PathLike[str] | Checkpoint, dtype: torch.dtype | None = None, made: Shell | None = None) -> Blocks:
        """The decoder of a folder of any format of ours; ``dtype``: to compute in, the model's own by default.

        made    the folder's shell, if there is one already

        :raises UnreadableError: transformers has no code for the model, or there is no config.json, not at the checkpoint's base either
        :raises RefusedError: parts of the folder are not read yet, or change what the model computes as no weight can
        """
        checkpoint = folder if isinstance(folder, Checkpoint) else open_checkpoint(Path(folder))
        _check_whole(checkpoint)
        model, own = shell(checkpoint) if made is None else made
        return cls(model, None, Weights(checkpoint, own if dtype is None else dtype))

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        if self.weights is not None:
            return self.weights.dtype
        return next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())

    def __len__(self) -> int:
        return len(self.names)

    @contextlib.contextmanager
    def stage(self, layer: int | None = None, *, embeddings: bool = False, head: bool = False, device: torch.device | None = None) -> Any:
        """The model with only those parts, ready to run. What the caller changes in a model that is in memory stays changed."""
        arch, there = self.architecture, {} if layer is None else {layer: self._filled(self._layers[layer], self.names[layer])}
        swapped: dict[str, nn.Module] = {arch.layers: _OneLayer(len(self._layers), there)}
        for path, wanted in ((arch.embeddings, embeddings), (arch.final_norm, head), (arch.head, head)):
            swapped[path] = self._filled(self._parts[path], path) if wanted else nn.Identity()
        try:
            for path, module in swapped.items():
                _put(self.model, path, module)
            if self._use_cache is not None:
                self.config.use_cache = False
            if device is not None:
                self.model.to(device)
            yield self.model.eval()
        finally:
            for path, module in {arch.layers: self._layers, **self._parts}.items():
                _put(self.model, path, module)
            if self._use_cache is not None:
                self.config.use_cache = self._use_cache
            if self.weights is not None:
                swapped.clear()
                there.clear()
                gc.collect()  # modules and their hooks may hold one another, and the next stage needs their memory

    def load(self) -> nn.Module:
        """The whole model, in memory. Of a folder all weights are read; this object has none to read afterwards."""
        for path, module in [*zip(self.names, self._layers, strict=True), *self._parts.items()]:
            _put(self.model, path, self._filled(module, path))
        self._parts = {path: self._module(path) for path in self._parts}
        if self.weights is not None and f"{self.architecture.head}.weight" not in self.weights:
            cast(Any, self.model).tie_weights()
        self.weights = None
        return self.model.eval()

    def begin(self, samples: Sequence[Sample], path: Path | None = None, device: torch.device | None = None) -> States:
        """The hidden states that the first layer gets."""
        lengths = [int(sample[0].shape[1]) for sample in samples]
        states = States(lengths, int(self.config.hidden_size), self.dtype, path)
        for index, hidden in enumerate(self.embedded(samples, device)):
            states[index] = hidden
        return states

    def embedded(self, samples: Sequence[Sample], device: torch.device | None = None) -> Iterator[Tensor]:
        """[1, tokens, hidden] of every sample: what the first layer gets."""
        with torch.no_grad(), self.stage(embeddings=True, device=device) as model:
            for sample in samples:
                yield forward(model, {"input_ids": sample[0]}).logits

    def logits(self, states: States, device: torch.device | None = None) -> Iterator[Tensor]:
        """[tokens, vocabulary] of every sample, from what the last layer made, in the model's dtype."""
        with torch.no_grad(), self.stage(head=True, device=device) as model:
            place = _device_of(model)
            for hidden in states:
                yield model(inputs_embeds=hidden.to(place)).logits[0]

    def part(self, path: str) -> nn.Module:
        """One module outside of the layers, with its weights."""
        return self._filled(self._module(path), path)

    def _module(self, path: str) -> nn.Module:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            raise UsageError(f"{path}: is not in this model, as its architecture says it is") from None

    def _filled(self, module: nn.Module, path: str) -> nn.Module:
        """``module`` itself, or a copy with the folder's weights. A head that is tied has those of the embeddings."""
        if self.weights is None:
            return module
        if path == self.architecture.head and f"{path}.weight" not in self.weights:
            path = self.architecture.embeddings
        return self.weights.fill(copy.deepcopy(module), path)


class Inputs(Sequence[dict[str, Tensor]]):
    """What a stage's model is called with to run its layer on ``states``, made when it is asked for: they may be more than memory holds."""

    def __init__(self, states: Sequence[Tensor], samples: Sequence[Sample]) -> None:
        self._states, self._samples = states, samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        sample = self._samples[index]
        return {"inputs_embeds": self._states[index]} | ({"attention_mask": sample[1]} if len(sample) == 2 else {})


def advance(model: nn.Module, states: States, samples: Sequence[Sample]) -> None:
    """Replace every sample's hidden states by what a stage's model makes of them."""
    for index, inputs in enumerate(Inputs(states, samples)):
        states[index] = forward(model, inputs).logits


def shell(checkpoint: Checkpoint) -> Shell:
    """The model that a folder's config.json describes, without weights."""
    import transformers
    from accelerate import init_empty_weights

    own: Location = checkpoint.location
    location = own if own.base is None else own.base
    if "config.json" not in location.names:
        raise UnreadableError(f"{location.folder}: has no config.json, so it is no model's folder; name the float model's (base model)")
    library: Any = transformers
    try:
        config = transformers_config(location)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            model = library.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnreadableError(
            f"{location.folder}: transformers {transformers.__version__} cannot load it ({first.strip():.300})"
        ) from error
    said = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    said = getattr(torch, said, None) if isinstance(said, str) else said
    if not isinstance(said, torch.dtype):
        found = (checkpoint.tensors[name].dtype for name in checkpoint.plain_names)
        said = next((dtype for name in found if (dtype := FLOAT_DTYPES.get(name)) is not None), torch.float32)
    return model.eval(), said


def _check_whole(checkpoint: Checkpoint) -> None:
    """RefusedError unless the folder's dequantized weights are all that its linears multiply by."""
    name = checkpoint.location.folder.name
    for part in checkpoint.unsupported:
        raise RefusedError(f"{part.name}: {part.why}, so {name} cannot be run; {len(checkpoint.unsupported)} layers are like that")
    for tensor in checkpoint.functional:
        raise RefusedError(f"{tensor}: is a step of its own at run time, which is not computed here, so {name} cannot be run")
    for item in checkpoint.left_out:
        if not item.holds(checkpoint.tensors):
            raise RefusedError(f"{item.tensor}: {item.why} {item.otherwise}; {name} cannot be run")


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device(HOST))
