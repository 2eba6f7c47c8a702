"""Load msModelSlim folders with vllm-ascend's own parser and schemes in the real vLLM, on the CPU.

    python vllm_ascend_load.py FOLDERS OUT

Run by the interpreter that has vLLM 0.32.0 for the CPU and, in its environment's folder, the sources of vllm-ascend 0.30.0rc2
(``nox -s vllm_ascend`` builds it). It imports nothing of Weighbridge.

Everything under vllm_ascend.quantization is the real thing: the parser, the registry of schemes, and the adapter by which vLLM
makes a layer's parameters. The rest of vllm_ascend and torch_npu need an NPU, so stand-ins take their places. Some of them do
something: AscendUnquantizedLinearMethod is the class of vLLM that it extends, and operators are the formulas that CANN documents:

    npu_weight_quant_batchmatmul   y = x @ ((weight + antiquant_offset) * antiquant_scale) + bias
    npu_quantize                   clamp(round(x * reciprocal + offset)); the reciprocal is vllm-ascend's, in the model's dtype
    npu_dynamic_quant              of each token x / scale, rounded; scale = max|x| / 127
    npu_quant_matmul               (x @ weight + bias) * scale with an int32 bias, x @ weight * scale * pertoken_scale + bias with a float

For each folder under FOLDERS the model of its config.json is built and its weights are loaded. OUT/<name>.safetensors holds, for
every quantized linear P of vLLM's model, where q, k and v are one, P.weight: float32 [out, in], as the scheme computes it, if its
inputs are not quantized; else P.x, some inputs, and P.y, what the scheme computes of them, both float32. Its metadata, each a JSON
text:

detected    what vllm-ascend takes the folder for: "ascend" or null
types       the type of every linear of vLLM's model, as the parser says
shards      the checkpoint's linears of each, in order
parameters  name -> [dtype, shape] of what the schemes want to load, by the checkpoint's names
dtype       in which the model computes
registered  the types of which the registry has schemes for linears
refused     the error on which loading ended, "" if it did not; what follows the error is then missing above
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import json
import sys
import tempfile
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

SOURCES = Path(sys.prefix) / "vllm_ascend-0.30.0rc2" / "vllm_ascend"
REAL = ("vllm_ascend.quantization", "vllm_ascend.weight_switch")
DTYPES = {
    torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
}  # fmt: skip


class StandIn(ModuleType):
    """A module in which every name is there and is a mock."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch_npu, and all of vllm_ascend that is not ``REAL``; the constants of vllm_ascend.utils are its own."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in {"torch_npu", "vllm_ascend"} or name.startswith(REAL):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "vllm_ascend":
            module.__path__ = [str(SOURCES)]
        if module.__name__ == "vllm_ascend.utils":
            module.maybe_trans_nz = lambda weight: weight  # a layout of memory
            module.oproj_tp_enable = module.mlp_tp_enable = lambda: False
            for node in ast.parse((SOURCES / "utils.py").read_text("utf-8")).body:
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                    (name,) = node.targets
                    setattr(module, ast.unparse(name), node.value.value)
        if module.__name__ == "vllm_ascend.ops.linear":
            module.AscendUnquantizedLinearMethod = UnquantizedLinearMethod
        if module.__name__ == "torch_npu":
            module.npu_weight_quant_batchmatmul = weight_quant_batchmatmul
            module.npu_dynamic_quant = dynamic_quant
            module.npu_quant_matmul = quant_matmul


def weight_quant_batchmatmul(
    x: torch.Tensor, weight: torch.Tensor, antiquant_scale: torch.Tensor, antiquant_offset: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    y = x.float() @ ((weight.float() + antiquant_offset.float()) * antiquant_scale.float())
    return y if bias is None else y + bias.float()


def quantize(x: torch.Tensor, scale: torch.Tensor, reciprocal: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return torch.clamp(torch.round(x.float() * reciprocal.float() + offset.float()), -128, 127).to(torch.int8)


def dynamic_quant(x: torch.Tensor, dst_type: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    assert dst_type == torch.int8
    scale = x.float().abs().amax(-1) / 127
    return torch.round(x.float() / scale[:, None]).to(torch.int8), scale


def quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    sums = x.double() @ weight.double()
    scale = scale.to(torch.int32).view(torch.float32) if scale.dtype == torch.int64 else scale.float()
    if bias is not None and bias.dtype == torch.int32:
        sums = sums + bias
    y = sums * scale.reshape(-1)
    y = y if pertoken_scale is None else y * pertoken_scale[:, None]
    return (y if bias is None or bias.dtype == torch.int32 else y + bias.double()).float()


OPERATORS = torch.library.Library("vllm", "FRAGMENT")
OPERATORS.define("quantize(Tensor x, Tensor scale, Tensor reciprocal, Tensor offset) -> Tensor")
OPERATORS.impl("quantize", quantize, "CompositeExplicitAutograd")
sys.meta_path.insert(0, StandIns())
torch.npu = MagicMock()  # vLLM asks it whether there is an NPU

from vllm_ascend.quantization.configs import modelslim_config  # noqa: E402
from vllm_ascend.quantization.methods import registry  # noqa: E402
from vllm_ascend.quantization.utils import detect_quantization_method  # noqa: E402


def linears_of(model: torch.nn.Module) -> dict[str, LinearBase]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LinearBase)}


def build(config: VllmConfig) -> torch.nn.Module:
    config.compilation_config.static_forward_context.clear()  # names of a model that was built before
    with set_default_torch_dtype(config.model_config.dtype):
        return initialize_model(vllm_config=config)


def wanted(layer: LinearBase, shards: list[str]) -> dict[str, tuple[str, list[int]]]:
    """(dtype, shape) of the parameters of a layer, as its part of the checkpoint's linears ``shards`` each has them."""
    rows = getattr(layer, "output_sizes", None) or [layer.output_size]
    found = {}
    for name, parameter in layer.named_parameters():
        whole = parameter.shape[0] == 1  # of all outputs
        assert whole or parameter.shape[0] == sum(rows), (name, parameter.shape)
        for shard, out in zip(shards, rows, strict=True):
            found[f"{shard}.{name}"] = (DTYPES[parameter.dtype], [1 if whole else out, *parameter.shape[1:]])
    return found


def load(folder: Path, says: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """Fill in what the module says of ``folder``."""
    says["detected"] = detect_quantization_method(str(folder))
    config = EngineArgs(
        model=str(folder), quantization="ascend", enforce_eager=True, skip_tokenizer_init=True, max_model_len=64, load_format="safetensors"
    ).create_engine_config()
    quantization = config.quant_config
    assert isinstance(quantization, modelslim_config.AscendModelSlimConfig)
    says["dtype"] = DTYPES[config.model_config.dtype]
    with set_current_vllm_config(config):
        config.quant_config = None
        plain = build(config)  # in float, for the names of its linears
        config.quant_config = quantization
        packed = plain.packed_modules_mapping
        for name in linears_of(plain):
            parent, _, leaf = name.rpartition(".")
            says["shards"][name] = [f"{parent}.{shard}" for shard in packed.get(leaf, [leaf])]
            type_ = modelslim_config.get_quant_type_for_layer(quantization.quant_description, name, packed)
            says["types"][name] = type_ or "FLOAT"
        model = build(config)
        quantized = {name: layer for name, layer in linears_of(model).items() if says["types"][name] != "FLOAT"}
        for name, layer in quantized.items():
            says["parameters"] |= wanted(layer, says["shards"][name])
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        for name, layer in quantized.items():
            if says["types"][name].endswith("A16"):
                weights[f"{name}.weight"] = layer.quant_method.apply(layer, torch.eye(layer.input_size)).T.contiguous()
                continue
            seed = torch.Generator().manual_seed(len(weights))
            x = torch.randn(16, layer.input_size, generator=seed).to(config.model_config.dtype)
            weights[f"{name}.x"] = x.float()
            weights[f"{name}.y"] = layer.quant_method.apply(layer, x, layer.bias).contiguous()


def main(folders: Path, out: Path) -> None:
    registered = sorted(type_ for type_, kind in registry._SCHEME_REGISTRY if kind == "linear")
    with tempfile.TemporaryDirectory() as meeting, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{meeting}/file", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        for folder in sorted(folders.iterdir()):
            says: dict[str, Any] = {"detected": None, "types": {}, "shards": {}, "parameters": {}, "registered": registered}
            says |= {"dtype": "", "refused": ""}
            weights: dict[str, torch.Tensor] = {}
            try:
                load(folder, says, weights)
            except Exception as error:
                says["refused"] = f"{type(error).__name__}: {str(error) or traceback.extract_tb(error.__traceback__)[-1].line}"
            save_file(weights, out / f"{folder.name}.safetensors", {key: json.dumps(value) for key, value in says.items()})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: vllm_ascend_load.py FOLDERS OUT")
    with torch.no_grad():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
