"""A stand-in for ``lmdeploy.turbomind._turbomind``, LMDeploy's C++ and CUDA extension, which does not load without a GPU.

It computes nothing. It has the enumerations and records that LMDeploy's Python code fills, and keeps what that code copies to the
GPU: ``import_turbomind`` puts it in the extension's place, ``tensors_of`` gives what was copied.

What the extension would have decided, and the stand-in decides for it: that float16 and bfloat16 can be computed in, that any shape
will do, that scales stay in groups as they are, and that gate and up lie one after the other, not interleaved.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

TYPES = "INVALID FP16 BF16 FP32 INT8 INT32 INT64 UINT8 UINT32 UINT4 FP8_E4M3 FP4_E2M1 GENERIC_FLOAT"
DataType = enum.Enum("DataType", [f"TYPE_{name}" for name in TYPES.split()])
ActivationType = enum.Enum("ActivationType", ["kSilu", "kSiluGptOss"])

BITS = {"FP16": 16, "BF16": 16, "FP32": 32, "INT8": 8, "INT32": 32, "INT64": 64, "UINT8": 8, "UINT32": 32, "UINT4": 4, "FP8_E4M3": 8}


class Record(SimpleNamespace):
    """Fields as they are set."""

    data_type: Any = None  # LMDeploy asks whether a record has it, before it sets it
    is_expert = False

    def clone(self) -> Any:
        return type(self)(**vars(self))


class AttentionConfig(Record):
    def __init__(self, **fields: Any) -> None:
        super().__init__(**{"rope": Record(), **fields})


class DataFormat(Record):
    def __init__(self, *fields: Any) -> None:
        super().__init__(fields=fields)


class Slot:
    """A parameter of a module on the GPU."""

    def __init__(self) -> None:
        self.type: Any = None
        self.byte_size = 0
        self.value: torch.Tensor | None = None

    def alloc(self, shape: list[int], dtype: Any) -> Slot:
        self.type = dtype
        bits = BITS[dtype.name.removeprefix("TYPE_")]
        for size in shape:
            bits *= size
        self.byte_size = bits // 8
        return self

    def copy_from(self, tensor: torch.Tensor) -> None:
        self.value = tensor.clone()


class Module:
    """A module on the GPU: parameters and children by name."""

    def __init__(self, config: Any = None) -> None:
        self.config = config
        self.slots: dict[str, Slot] = {}
        self.children: dict[str, Module] = {}

    def param(self, name: str) -> Slot:
        return self.slots.setdefault(name, Slot())

    def add_child_raw(self, name: str, child: Module) -> None:
        self.children[name] = child

    def set_plan(self, plan: Any) -> None:
        """The choice of a kernel."""


class Plan:
    """How a kernel wants its weight: as it is."""

    family = "none"
    shape_constraints = ((1, 1), (1, 1))
    bridge = (1, 1, DataType.TYPE_INVALID, DataType.TYPE_INVALID)

    def gate_up(self, activation: Any, size: int) -> int:
        return 0


class Gemm:
    def data_types(self, data_format: Any) -> list[Any]:
        return [DataType.TYPE_FP16, DataType.TYPE_BF16]

    def get_weight_plan(self, query: Any) -> Plan:
        return Plan()


class Engine:
    """The model on one GPU, without an engine that would run it."""

    def __init__(self) -> None:
        self.module = Module()

    @classmethod
    def create(cls, model_dir: str, engine_config: Any) -> Engine:
        return cls()

    def context(self, device: int) -> Any:
        return contextlib.nullcontext()

    def gemm(self, device: int) -> Gemm:
        return Gemm()

    def root(self, device: int) -> Module:
        return self.module

    def is_dummy_node(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args: 0  # create_context, process_weight, ..., and the ranks, which are 0


class Extension(ModuleType):
    """The module; what it does not have above is a record."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (Record,), {})
        setattr(self, name, made)
        return made


def import_turbomind() -> Any:
    """``lmdeploy.turbomind.turbomind`` and all that it imports, over the stand-in; a tensor's ``cuda()`` is the tensor."""
    extension = Extension("lmdeploy.turbomind._turbomind")
    vars(extension).update({one.__name__: one for one in (DataType, ActivationType, AttentionConfig, DataFormat, Gemm)})
    vars(extension).update(TurboMind=Engine, create_module=Module)
    sys.modules[extension.__name__] = extension
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.device_count = lambda: 1
    import lmdeploy.turbomind.turbomind as turbomind

    return turbomind


def tensors_of(module: Module, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that was copied into ``module`` and the modules in it; and of linears ``block``, inputs and outputs of one scale."""
    if hasattr(module.config, "format"):
        yield f"{name}block", torch.tensor(module.config.format.fields[1])
    for leaf, slot in module.slots.items():
        if slot.value is not None:
            yield f"{name}{leaf}", slot.value
    for leaf, child in module.children.items():
        yield from tensors_of(child, f"{name}{leaf}.")
