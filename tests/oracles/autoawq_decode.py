"""Decode an AutoAWQ GEMM folder with AutoAWQ's own code, on the CPU.

    python autoawq_decode.py FOLDER OUT.safetensors

Run by the interpreter that has AutoAWQ 0.2.9 (``nox -s autoawq`` builds it). It imports nothing
of Weighbridge, so that a mistake in a Weighbridge packer cannot hide behind the same mistake in
its unpacker. For every quantized linear P of FOLDER it writes:

| tensor | dtype, shape | by |
| --- | --- | --- |
| P.codes | int16 [out, in], 0..15 | unpack_awq, reverse_awq_order |
| P.zeros | int16 [groups, out], 0..15 | unpack_awq, reverse_awq_order |
| P.weight | float32 [out, in] | dequantize_gemm, which multiplies in float16; the product upcast |

The tensors go through a WQLinear_GEMM that is filled as the loader fills it. from_quantized casts
every floating tensor to its torch_dtype, float16 unless told otherwise, so scales or biases that
the folder stores as float32 or bfloat16 are rounded to float16 here too. (from_quantized itself
needs a GPU, or Intel's extension for the CPU, which repacks the weights first.)

``forward_max_rel`` in the metadata is the worst layer's max |y - ref| / max |ref|, where y is
WQLinear_GEMM's forward of a random float16 input and ref is x @ P.weight.T + bias in float32.
"""

# ruff: noqa: E402 - Triton must be hidden before AutoAWQ is imported

from __future__ import annotations

import json
import sys
from pathlib import Path

# A CUDA build of torch brings Triton, and AutoAWQ prefers its Triton kernel to its plain PyTorch
# one even on the CPU, where it cannot run. Both imports in AutoAWQ are guarded.
sys.modules["triton"] = None  # type: ignore[assignment]

import awq
import torch
from awq.models._config import AwqConfig
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm, reverse_awq_order, unpack_awq
from safetensors import safe_open
from safetensors.torch import save_file


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder, by the index if there is one."""
    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    tensors = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return tensors


def build(prefix: str, tensors: dict[str, torch.Tensor], config: AwqConfig) -> WQLinear_GEMM:
    """The tool's layer, filled; load_state_dict casts to the layer's float16 and checks shapes."""
    state = {name: tensors[f"{prefix}.{name}"] for name in ("qweight", "qzeros", "scales", "bias") if f"{prefix}.{name}" in tensors}
    for name in ("qweight", "qzeros"):
        if state[name].dtype != torch.int32:  # load_state_dict would cast this silently
            sys.exit(f"{prefix}.{name} is {state[name].dtype}; AutoAWQ stores torch.int32")
    layer = WQLinear_GEMM(
        config.w_bit,
        config.q_group_size,
        in_features=state["qweight"].shape[0],
        out_features=state["qweight"].shape[1] * (32 // config.w_bit),
        bias="bias" in state,
        dev="cpu",
    )
    layer.load_state_dict(state, strict=True)
    return layer.eval()


def decode(layer: WQLinear_GEMM) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [out, in] and zero points [groups, out], int16, and the float32 weight [out, in]."""
    codes, zeros = unpack_awq(layer.qweight, layer.qzeros, layer.w_bit)
    codes, zeros = reverse_awq_order(codes, zeros, layer.w_bit)
    mask = 2**layer.w_bit - 1  # the "overflow checks" that every caller in AutoAWQ adds
    weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.w_bit, layer.group_size)
    return (codes & mask).t().to(torch.int16), (zeros & mask).to(torch.int16), weight.t().float()


def main(folder: Path, out: Path) -> None:
    config = AwqConfig.from_pretrained(str(folder))
    if config.version != "gemm":
        sys.exit(f"{folder} has version {config.version!r}; this script decodes 'gemm'")
    tensors = load_tensors(folder)
    prefixes = sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
    generator = torch.Generator().manual_seed(0)
    result = {}
    worst = 0.0
    for prefix in prefixes:
        layer = build(prefix, tensors, config)
        codes, zeros, weight = decode(layer)
        x = torch.randn(1, 5, layer.in_features, generator=generator).half()
        expected = x.float() @ weight.t()
        if layer.bias is not None:
            expected += layer.bias.float()
        error = (layer(x).float() - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(error))
        result[f"{prefix}.codes"] = codes.contiguous()
        result[f"{prefix}.zeros"] = zeros.contiguous()
        result[f"{prefix}.weight"] = weight.contiguous()
    metadata = {
        "tool": f"autoawq {awq.__version__}",
        "layer": WQLinear_GEMM.__name__,
        "forward_max_rel": repr(worst),
    }
    save_file(result, out, metadata=metadata)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: autoawq_decode.py FOLDER OUT.safetensors")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
