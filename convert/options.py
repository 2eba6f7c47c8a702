"""The options of a conversion, in one place: ``plan``, ``convert`` and the command line take the same."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from formats.errors import UsageError
from formats.safetensors_file import DEFAULT_SHARD_BYTES
from formats.turbomind_config import check_model_name

from .memory import DEFAULT_MEMORY
from .records import LOSSES

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack

SCALE_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""safetensors names by torch's."""
TORCH_NAMES = {name: torch for torch, name in SCALE_DTYPES.items()}


class Options(TypedDict, total=False):
    """What ``plan`` and ``convert`` take by keyword.

    base_model     folder with config.json and tokenizer; None: beside the source
    allow          loss codes (``LOSSES``) that may happen beyond those done by default
    strict         refuse every loss, rounding too
    scale_dtype    "keep", "float16", "bfloat16", "float32"; None: what the target's loaders want
    serve_dtype    msmodelslim only: "float16" or "bfloat16", in which the NPU will compute: the dtype of per-channel scales, and
                   how deq_scale is stored
    gptq_zeros     "mask", "plain" or "carry": how the top lane of GPTQ v1 zero points is read; None: as the file's writer meant it
    consumer       what will load the folder ("vllm", "vllm-ascend", "mindie", ...): its dialect of the format is written, and what
                   it requires and would not find is refused
    description    msModelSlim: the description JSON, if it is not beside the weights
    qkv_concat     mindspore only: store q, k and v as one, and gate and up
    tp             mindspore and turbomind only: ranks of tensor parallelism, each of which has files with its part of every tensor
    model_name     turbomind only: the chat template that LMDeploy will use, by its name; None: one for the model's type
    max_shard_size bytes of tensor data per output file; jobs: worker threads (None: the CPUs that may be used)
    max_memory     bytes of anonymous memory that the conversion may use over the bare interpreter; fewer workers run if it is little
    """

    base_model: str | os.PathLike[str] | None
    allow: Iterable[str]
    strict: bool
    scale_dtype: str | None
    serve_dtype: str | None
    gptq_zeros: str | None
    consumer: str | None
    description: str | os.PathLike[str] | None
    qkv_concat: bool
    tp: int
    model_name: str | None
    max_shard_size: int
    jobs: int | None
    max_memory: int


@dataclass(frozen=True, slots=True)
class Settings:
    """``Options`` with their defaults, checked."""

    base_model: str | os.PathLike[str] | None = None
    allow: Iterable[str] = ()
    strict: bool = False
    scale_dtype: str | None = None
    serve_dtype: str | None = None
    gptq_zeros: str | None = None
    consumer: str | None = None
    description: str | os.PathLike[str] | None = None
    qkv_concat: bool = False
    tp: int = 1
    model_name: str | None = None
    max_shard_size: int = DEFAULT_SHARD_BYTES
    jobs: int | None = None
    max_memory: int = DEFAULT_MEMORY

    def __post_init__(self) -> None:
        object.__setattr__(self, "allow", tuple(self.allow))
        unknown = [code for code in self.allow if code not in LOSSES]
        if unknown:
            raise UsageError(f"--allow {unknown[0]}: there is no such loss; codes are {', '.join(LOSSES)}")
        if self.scale_dtype not in {None, "keep", *SCALE_DTYPES}:
            raise UsageError(f"--scale-dtype {self.scale_dtype}: wanted keep, {', '.join(SCALE_DTYPES)}")
        if self.serve_dtype not in {None, "float16", "bfloat16"}:
            raise UsageError(f"--serve-dtype {self.serve_dtype}: wanted float16 or bfloat16")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"--jobs {self.jobs}: wanted 1 or more")
        if self.tp < 1:
            raise UsageError(f"--tp {self.tp}: wanted 1 or more")
        if self.max_shard_size < 1:
            raise UsageError(f"--max-shard-size {self.max_shard_size}: wanted a positive number of bytes")

    def check_for(self, format: str) -> None:
        """UsageError for an option that says nothing to the target."""
        if self.serve_dtype is not None and format != "msmodelslim":
            raise UsageError(f"--serve-dtype {self.serve_dtype}: wanted float16 or bfloat16, with --to msmodelslim")
        if self.qkv_concat and format != "mindspore":
            raise UsageError("--qkv-concat: says something to --to mindspore only")
        if self.tp > 1 and format not in {"mindspore", "turbomind"}:
            other = "other engines split one folder as they load it"
            raise UsageError(f"--tp {self.tp}: says something to --to mindspore and --to turbomind only; {other}")
        if self.model_name is not None and format != "turbomind":
            raise UsageError("--model-name: says something to --to turbomind only")
        if self.model_name is not None:
            check_model_name(self.model_name)

    @property
    def workers(self) -> int:
        return self.jobs or available_cpus()


def available_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
