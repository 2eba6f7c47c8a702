"""Decode a GPTQ v1 folder with AutoGPTQ's own code, on the CPU.

    python autogptq_decode.py FOLDER OUT.safetensors [--load]

Run by the interpreter that has AutoGPTQ 0.7.1 (``nox -s autogptq`` builds it). It imports nothing
of Weighbridge, so that a mistake in a Weighbridge packer cannot hide behind the same mistake in
its unpacker. For every quantized linear P of FOLDER it writes:

| tensor | dtype, shape |
| --- | --- |
| P.codes | int16 [out, in], 0..2^bits - 1 |
| P.zeros | int16 [groups, out]: the zero point that the tool subtracts, so the stored lane + 1 |
| P.weight | float32 [out, in]: the tool multiplies in float16; the product upcast |

AutoGPTQ has no function that returns any of these: it unpacks inside QuantLinear.forward, then
computes x @ (scales * (codes - zeros)). All three are therefore read off that one code path:

* weight: the forward of the identity, without bias. Each sum has one term that is not zero.
* zeros: the same with every qweight word 0 and every scale 1, which leaves -zero in each row.
* codes: the same with every qzeros word 0 and every scale 1. A stored zero of 0 is a zero point
  of 1, which leaves code - 1. These integers are at most 256, so float16 holds them.

The class is the one that from_quantized would choose: qlinear_cuda_old without act order or with
one group, else qlinear_cuda, which reads g_idx. The two differ for a stored zero of 2^bits - 1:
the first wraps it to zero point 0, the second takes it as 2^bits. P.zeros shows which.

from_quantized casts every floating tensor to its torch_dtype, float16 unless told otherwise, so
scales or biases that the folder stores as float32 or bfloat16 are rounded to float16 here too. A
bias or g_idx that is missing keeps its initial value (zeros; i // group_size), as in the loader.

AutoGPTQ ignores checkpoint_format and would misread "gptq_v2" without a word: it is refused here.

``forward_max_rel`` in the metadata is the worst layer's max |y - ref| / max |ref|, where y is
QuantLinear's forward of a random float16 input and ref is x @ P.weight.T + bias in float32.

``--load`` also loads the whole folder with AutoGPTQForCausalLM.from_quantized and adds, for the
fixed ids below, ``input_ids`` int64 [1, tokens] and float32 [1, tokens, vocabulary] ``logits``
(of the loaded model, in float16) and ``logits_reference`` (of the plain transformers model, in
float32, with each P.weight in the place of P's float weight).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import auto_gptq
import torch
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.utils.import_utils import dynamically_import_QuantLinear
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

Tensors = dict[str, torch.Tensor]

# Without these, ExLlama's CUDA kernels are chosen for 4 bits wherever they can be imported.
KERNELS = {"use_triton": False, "disable_exllama": True, "disable_exllamav2": True}


def load_tensors(folder: Path, config: BaseQuantizeConfig) -> Tensors:
    """Every tensor of the folder, under the file names that AutoGPTQ tries."""
    index = folder / "model.safetensors.index.json"
    own_name = f"gptq_model-{config.bits}bit-{config.group_size}g.safetensors"
    if index.exists():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    elif (folder / own_name).exists():
        names = [own_name]
    else:
        names = ["model.safetensors"]
    tensors = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return tensors


def build(prefix: str, tensors: Tensors, config: BaseQuantizeConfig) -> torch.nn.Module:
    """The tool's layer, filled; load_state_dict casts to the layer's float16 and checks shapes."""
    state = {
        name: tensors[f"{prefix}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx", "bias") if f"{prefix}.{name}" in tensors
    }
    for name in ("qweight", "qzeros", "g_idx"):
        if name in state and state[name].dtype != torch.int32:  # would be cast silently
            sys.exit(f"{prefix}.{name} is {state[name].dtype}; AutoGPTQ stores torch.int32")
    layer_class = dynamically_import_QuantLinear(desc_act=config.desc_act, group_size=config.group_size, bits=config.bits, **KERNELS)
    layer = layer_class(
        config.bits,
        config.group_size,
        state["qweight"].shape[0] * 32 // config.bits,
        state["qweight"].shape[1],
        bias=True,  # as make_quant does, whatever the folder holds
        weight_dtype=torch.float16,
    )
    missing, unexpected = layer.load_state_dict(state, strict=False)
    if unexpected or not {"bias", "g_idx"}.issuperset(missing):
        sys.exit(f"{prefix}: missing {missing}, unexpected {unexpected}")
    return layer.eval()


def dequantize(layer: torch.nn.Module, **replaced: torch.Tensor) -> torch.Tensor:
    """The float16 weight [in, out] that forward multiplies with, some buffers replaced."""
    kept = {name: getattr(layer, name) for name in (*replaced, "bias")}
    try:
        for name, tensor in replaced.items():
            setattr(layer, name, tensor)
        layer.bias = None
        return layer(torch.eye(layer.infeatures, dtype=torch.float16))
    finally:
        for name, tensor in kept.items():
            setattr(layer, name, tensor)


def decode(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [out, in] and zero points [groups, out], int16, and the float32 weight [out, in]."""
    ones = torch.ones_like(layer.scales)
    codes = dequantize(layer, scales=ones, qzeros=torch.zeros_like(layer.qzeros)) + 1
    zeros = -dequantize(layer, scales=ones, qweight=torch.zeros_like(layer.qweight))
    groups = layer.g_idx.tolist()
    first_rows = [groups.index(group) for group in range(layer.scales.shape[0])]
    return (
        codes.t().to(torch.int16),
        zeros[first_rows].to(torch.int16),
        dequantize(layer).t().float(),
    )


def compute_logits(folder: Path, tensors: Tensors, weights: Tensors) -> Tensors:
    """Logits of the folder as AutoGPTQ loads it, and of the float model with its weights."""
    loaded = AutoGPTQForCausalLM.from_quantized(str(folder), device="cpu", **KERNELS)
    config = AutoConfig.from_pretrained(folder)
    input_ids = torch.arange(1, 33).mul(37).remainder(config.vocab_size)[None]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    reference = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    suffixes = (".qweight", ".qzeros", ".scales", ".g_idx")
    quantized = {f"{name.removesuffix('.weight')}{suffix}" for name in weights for suffix in suffixes}
    # float16 first: the loader casts the plain tensors too
    state = {name: t.half().float() for name, t in tensors.items() if name not in quantized}
    missing, unexpected = reference.load_state_dict(state | weights, strict=False)
    biases = [name for name in unexpected if name.endswith(".bias") and not state[name].any()]
    if set(unexpected) - set(biases) or set(missing) - {"lm_head.weight"}:
        sys.exit(f"the float model is missing {missing} and does not know {unexpected}")
    if missing and not config.tie_word_embeddings:
        sys.exit("the folder has no lm_head.weight, and the config does not tie it")
    return {
        "input_ids": input_ids,
        "logits": loaded.model(input_ids, use_cache=False).logits.float().contiguous(),
        "logits_reference": reference.eval()(input_ids, use_cache=False).logits.contiguous(),
    }


def main(folder: Path, out: Path, load: bool) -> None:
    raw = json.loads((folder / "quantize_config.json").read_text("utf-8"))
    if raw.get("checkpoint_format", "gptq") != "gptq" or raw.get("is_marlin_format"):
        sys.exit(f"{folder} is not in GPTQ v1 format, the only one that this script decodes")
    config = BaseQuantizeConfig.from_pretrained(str(folder))
    tensors = load_tensors(folder, config)
    prefixes = sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
    generator = torch.Generator().manual_seed(0)
    result: Tensors = {}
    weights: Tensors = {}
    layer_types = set()
    worst = 0.0
    for prefix in prefixes:
        layer = build(prefix, tensors, config)
        layer_types.add(layer.QUANT_TYPE)
        codes, zeros, weight = decode(layer)
        x = torch.randn(5, layer.infeatures, generator=generator).half()
        expected = x.float() @ weight.t() + layer.bias.float()
        error = (layer(x).float() - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(error))
        weights[f"{prefix}.weight"] = weight.contiguous()
        result[f"{prefix}.codes"] = codes.contiguous()
        result[f"{prefix}.zeros"] = zeros.contiguous()
    result |= weights
    if load:
        result |= compute_logits(folder, tensors, weights)
    metadata = {
        "tool": f"auto-gptq {auto_gptq.__version__}",
        "layer": ",".join(sorted(layer_types)),
        "forward_max_rel": repr(worst),
    }
    save_file(result, out, metadata=metadata)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    parser.add_argument("--load", action="store_true", help="also load the model: logits")
    arguments = parser.parse_args()
    with torch.no_grad():
        main(arguments.folder, arguments.out, arguments.load)
