"""Load folders with LMDeploy 0.18.0's two engines, as far as their Python code goes, on the CPU.

    python lmdeploy_load.py JOB.json OUT/

Run by the interpreter that has LMDeploy (``nox -s lmdeploy`` builds it). It imports nothing of Weighbridge. The job is {name: folder};
OUT/NAME.safetensors has what the engines hold of it:

| tensor | |
| --- | --- |
| turbomind/text_model.M.P | what TurboMind copies to the GPU for parameter P of its module M: 4-bit weights are int32 [in, out / 8] |
| pytorch/M.P | parameter P of module M of the PyTorch engine's model, float8 as float32; of AWQ the weight that its backend computes |

and the metadata, JSON each: ``turbomind`` and ``pytorch``, why the engine refuses the folder ("": it does not), ``dtype``, in which
TurboMind computes, and ``unfilled``, parameters of the PyTorch engine's model that no tensor of the folder filled.

TurboMind runs from ``TurboMind(folder)`` on: its choice of engine, its reading of config.json, its reader of the weight files, its
unpacking, transposing, reordering and fusing, up to each copy to the GPU; only its C++ extension is replaced, by
``lmdeploy_turbomind``. What the kernels then do with the copies is not run.

The PyTorch engine runs its reading of config.json, its own models, their loaders and the hooks after loading, over LMDeploy's own
backend "default", which is plain torch. Attention and the linears and norms of W8A8, which that backend has not, are not run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lmdeploy_turbomind import import_turbomind, tensors_of
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

turbomind = import_turbomind()

# Only now, since all of LMDeploy imports the extension that stands replaced.
import lmdeploy.pytorch.config as pytorch_config  # noqa: E402
from lmdeploy.messages import TurbomindEngineConfig  # noqa: E402
from lmdeploy.pytorch.backends import selector  # noqa: E402
from lmdeploy.pytorch.backends.attention import PagedAttentionBuildSpec  # noqa: E402
from lmdeploy.pytorch.backends.default.awq_modules import dequantize_gemm  # noqa: E402
from lmdeploy.pytorch.backends.default.op_backend import DefaultOpsBackend  # noqa: E402
from lmdeploy.pytorch.backends.qmodules import LinearW8A8BuildSpec, LinearW8A8Impl, RMSNormW8A8BuildSpec, RMSNormW8A8Impl  # noqa: E402
from lmdeploy.pytorch.model_inputs import BuildModelContext  # noqa: E402
from lmdeploy.pytorch.models.patch import build_patched_model  # noqa: E402
from lmdeploy.pytorch.nn.linear.awq import AwqLinear  # noqa: E402
from lmdeploy.pytorch.weight_loader.model_weight_loader import load_model_weights  # noqa: E402

turbomind.Tokenizer = lambda *args, **kwargs: None  # most fixtures have none
pytorch_config.is_bf16_supported = lambda device: True  # it asks CUDA


def load_turbomind(folder: Path) -> tuple[Tensors, str]:
    """(what is copied to the GPU, the dtype in which it would be computed)."""
    config = TurbomindEngineConfig(max_batch_size=1, devices=[0], session_len=128)
    engine = turbomind.TurboMind(str(folder), engine_config=config)
    return {f"turbomind/{name}": tensor for name, tensor in tensors_of(engine.model_comm.module)}, engine.engine_config.dtype


class NotRun:
    """An operator that only a GPU has."""


class LinearW8A8(LinearW8A8Impl):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class RMSNormW8A8(RMSNormW8A8Impl):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class Backend(DefaultOpsBackend):
    """LMDeploy's backend in plain torch, and the holders of what that has not."""

    @classmethod
    def build_op(cls, spec: Any, *, enable_deterministic: bool = False) -> Any:
        for kind, made in ((LinearW8A8BuildSpec, LinearW8A8), (RMSNormW8A8BuildSpec, RMSNormW8A8), (PagedAttentionBuildSpec, NotRun)):
            if isinstance(spec, kind):
                return made()
        return super().build_op(spec, enable_deterministic=enable_deterministic)


selector._get_backend = lambda: Backend


def load_pytorch(folder: Path) -> tuple[Tensors, list[str]]:
    """(the parameters of the loaded model, the names of those that were not filled)."""
    config = pytorch_config.ModelConfig.from_pretrained(str(folder), device_type="cuda")
    context = BuildModelContext(quant_config=config.quant_config, tie_word_embeddings=config.tie_word_embeddings)
    model = build_patched_model(config, device=torch.device("cpu"), build_model_ctx=context)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan if parameter.is_floating_point() else 77)
    untouched = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    load_model_weights(model, str(folder))
    tensors = dict(model.named_parameters())
    unfilled = [name for name, tensor in tensors.items() if torch.equal(*(_bytes(one) for one in (tensor, untouched[name])))]
    for name, module in model.named_modules():
        if isinstance(module, AwqLinear):
            parts = [tensors.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")]
            tensors[f"{name}.weight"] = dequantize_gemm(*parts, module.w_bit, module.group_size).t()
    return {f"pytorch/{name}": readable(tensor.detach()) for name, tensor in tensors.items()}, unfilled


def readable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def load(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """What both engines hold of ``folder``, and say of it."""
    tensors: Tensors = {}
    says: dict[str, Any] = {"turbomind": "", "pytorch": "", "dtype": "", "unfilled": []}
    try:
        made, says["dtype"] = load_turbomind(folder)
        tensors |= made
    except Exception as error:
        says["turbomind"] = why(error)
    try:
        made, says["unfilled"] = load_pytorch(folder)
        tensors |= made
    except Exception as error:
        says["pytorch"] = why(error)
    return tensors, says


def main(job: Path, out: Path) -> None:
    for name, folder in json.loads(job.read_text("utf-8")).items():
        tensors, says = load(Path(folder))
        plain = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
        save_file(plain, out / f"{name}.safetensors", {key: json.dumps(value) for key, value in says.items()})


if __name__ == "__main__":
    with torch.no_grad():
        main(*map(Path, sys.argv[1:3]))
