"""Where tensors live: the one module that names a device.

msModelSlim says ``dev_type`` ("cpu", "npu", "gpu") and ``dev_id``; PyTorch says "cpu", "npu:0", "cuda:0". Both are understood. An
NPU is driven by torch_npu, which is imported when an NPU is asked for and not before.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from formats.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["COMPLETE", "DEVICE_TYPES", "HOST", "device_name", "resolve"]

DEVICE_TYPES = ("cpu", "npu", "gpu", "cuda")
HOST = "cpu"
"""Where everything is that nobody asked to be elsewhere."""
COMPLETE = ("cpu", "cuda")
"""PyTorch's types of devices that have float64 and LAPACK; an NPU has neither."""

NPU_OPTIONS = {"NPU_FUZZY_COMPILE_BLACKLIST": "ReduceProd"}
"""What msModelSlim's own scripts set, beside no just-in-time compilation of operators."""


def device_name(dev_type: str, dev_id: int | None = None) -> str:
    """PyTorch's name of a device: "cpu", "npu:1", "cuda:0". ``dev_type`` may carry the index itself ("npu:1").

    :raises UsageError: for a type that is not one of ``DEVICE_TYPES``, or an index that is no whole number
    """
    kind, _, index = dev_type.partition(":") if isinstance(dev_type, str) else ("", "", "")
    if kind not in DEVICE_TYPES:
        raise UsageError(f"dev_type: {dev_type!r} is not one of {', '.join(DEVICE_TYPES)}")
    if index:
        if not index.isdecimal() or (dev_id is not None and dev_id != int(index)):
            raise UsageError(f"dev_type: {dev_type!r} with dev_id {dev_id!r}: give one index, a whole number from 0")
        dev_id = int(index)
    if dev_id is not None and (isinstance(dev_id, bool) or not isinstance(dev_id, int) or dev_id < 0):
        raise UsageError(f"dev_id: {dev_id!r} is not a whole number from 0")
    if kind == "cpu":
        return "cpu"
    return f"{'cuda' if kind == 'gpu' else kind}:{dev_id or 0}"


def resolve(dev_type: str, dev_id: int | None = None) -> torch.device:
    """The device, ready for use. For an NPU torch_npu is imported, and told what msModelSlim's scripts tell it.

    :raises UsageError: the device is not there, or what drives it is not installed
    """
    import torch

    name = device_name(dev_type, dev_id)
    if name.startswith("npu"):
        try:
            importlib.import_module("torch_npu")
        except ImportError as error:
            raise UsageError(f"device {name}: torch_npu is not installed ({error}); install it, or ask for cpu") from error
        npu: Any = vars(torch)["npu"]  # torch_npu put it there
        npu.set_compile_mode(jit_compile=False)
        npu.set_option(dict(NPU_OPTIONS))
    elif name.startswith("cuda") and int(name.partition(":")[2]) >= torch.cuda.device_count():
        raise UsageError(f"device {name}: this PyTorch sees {torch.cuda.device_count()} CUDA devices; ask for one of them, or for cpu")
    return torch.device(name)
