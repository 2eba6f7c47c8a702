"""Load a GPTQ (v1 or v2), AWQ GEMM or dense folder with GPTQModel and with transformers, on the CPU.

    python gptqmodel_decode.py FOLDER OUT.safetensors [--transformers]

Run by the interpreter that has GPTQModel 7.6.0 and transformers 5.23.0 (``nox -s gptqmodel`` builds it). It imports nothing of
Weighbridge, so that a mistake in a Weighbridge packer cannot hide behind the same mistake in its unpacker. It loads the folder
twice, as float16 and with the plain PyTorch kernels (the ones chosen otherwise round to bfloat16 on the way):

* GPTQModel.load, which reads quantize_config.json, with the backend gptq_torch or awq_torch;
* transformers' AutoModelForCausalLM.from_pretrained, which reads config.json, with the backend torch or torch_awq; it uses
  GPTQModel's layers too, but builds and fills them itself.

| tensor | dtype, shape | |
| --- | --- | --- |
| P.weight | float32 [out, in] | P's weight in the model that GPTQModel loaded, a float16 product; upcast |
| P.weight_transformers | float32 [out, in] | the same in the model that transformers loaded |
| input_ids | int64 [1, tokens] | fixed |
| logits_gptqmodel, logits | float32 [1, tokens, vocabulary] | of the two models, in float16 |
| logits_reference | the same | of the plain transformers model in float32, with each P.weight for P |
| generated | int64 [1, tokens + new] | greedily, by the model that transformers loaded |
| generated_reference | float32 [1, tokens + new, vocabulary] | logits of the reference model for ``generated`` |

The weight of a GPTQ layer is TorchLinear.dequantize_weight(), that of an AWQ layer the dequantize_gemm call of
AwqTorchLinear.forward. ``layers`` in the metadata names the classes of the layers.

``--transformers`` leaves out what GPTQModel.load gives, P.weight and logits_gptqmodel: it refuses GPTQ v1 without symmetry unless
the config's meta.quantizer names GPTQModel 0.9 or later. The reference model then has P.weight_transformers.

A dense folder is loaded by transformers alone, in its own dtype: it gives P.weight for every linear, ``generated``, and the dtype
as ``dtype`` in the metadata.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AwqConfig, GPTQConfig

Tensors = dict[str, torch.Tensor]

PROMPT = 8
NEW_TOKENS = 12
SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")


def load_tensors(folder: Path) -> Tensors:
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


def dequantize(model: torch.nn.Module) -> tuple[Tensors, set[str]]:
    """({P: float32 [out, in]}, class names) of the quantized linears of a loaded model."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    weights, classes = {}, set()
    for name, layer in model.named_modules():
        if isinstance(layer, TorchLinear):
            weight = layer.dequantize_weight()
        elif isinstance(layer, AwqTorchLinear):
            weight = dequantize_gemm(
                qweight=layer.qweight, qzeros=layer.qzeros, scales=layer.scales, bits=layer.bits, group_size=layer.group_size
            )
        elif hasattr(layer, "qweight"):
            sys.exit(f"{name} is a {type(layer).__name__}, not a plain PyTorch kernel")
        else:
            continue
        if weight.dtype != torch.float16:
            sys.exit(f"{name}: the kernel multiplies in {weight.dtype}, not in float16")
        weights[name] = weight.t().float().contiguous()
        classes.add(type(layer).__name__)
    return weights, classes


def load_reference(folder: Path, weights: Tensors) -> torch.nn.Module:
    """The float32 model with ``weights`` in the place of the quantized ones."""
    tensors = load_tensors(folder)
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    quantized = {f"{name}{suffix}" for name in weights for suffix in SUFFIXES}
    # float16 first: the loaders cast the plain tensors too
    state = {name: tensor.half().float() for name, tensor in tensors.items() if name not in quantized}
    missing, unexpected = reference.load_state_dict(state | {f"{name}.weight": weight for name, weight in weights.items()}, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        sys.exit(f"the float model is missing {missing} and does not know {unexpected}")
    if missing and not config.tie_word_embeddings:
        sys.exit("the folder has no lm_head.weight, and the config does not tie it")
    return reference.eval()


def compute_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.float().contiguous()


def generate(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    ids = input_ids[:, :PROMPT]
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, pad_token_id=0
    )


def judge_quantized(folder: Path, quantization: dict, input_ids: torch.Tensor, load: bool) -> tuple[Tensors, dict[str, str]]:
    import gptqmodel

    backend, own = {
        "gptq": (gptqmodel.BACKEND.GPTQ_TORCH, lambda: GPTQConfig(bits=quantization["bits"], backend="torch")),
        "awq": (gptqmodel.BACKEND.AWQ_TORCH, lambda: AwqConfig(backend="torch_awq")),
    }[quantization["quant_method"]]
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=own(), dtype=torch.float16)
    weights, classes = dequantize(model)
    result = {f"{name}.weight_transformers": weight for name, weight in weights.items()}
    if load:
        theirs = gptqmodel.GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16)
        weights, more_classes = dequantize(theirs.model)
        classes |= more_classes
        result |= {f"{name}.weight": weight for name, weight in weights.items()}
        result["logits_gptqmodel"] = compute_logits(theirs.model, input_ids)

    reference = load_reference(folder, weights)
    generated = generate(model, input_ids)
    result |= {
        "input_ids": input_ids,
        "logits": compute_logits(model, input_ids),
        "logits_reference": compute_logits(reference, input_ids),
        "generated": generated,
        "generated_reference": compute_logits(reference, generated),
    }
    return result, {
        "tool": f"gptqmodel {gptqmodel.__version__}, transformers {transformers.__version__}",
        "layers": ",".join(sorted(classes)),
    }


def judge_dense(folder: Path, input_ids: torch.Tensor) -> tuple[Tensors, dict[str, str]]:
    model, about = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    if problems := {kind: names for kind, names in about.items() if names}:
        sys.exit(f"transformers loaded the folder with {problems}")
    result = {f"{name}.weight": layer.weight.float() for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    return result | {"generated": generate(model, input_ids)}, {
        "tool": f"transformers {transformers.__version__}",
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def main(folder: Path, out: Path, load: bool) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    input_ids = torch.arange(1, 33).mul(37).remainder(config["vocab_size"])[None]
    quantization = config.get("quantization_config")
    result, metadata = judge_quantized(folder, quantization, input_ids, load) if quantization else judge_dense(folder, input_ids)
    save_file(result, out, metadata=metadata)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    parser.add_argument("--transformers", action="store_true", help="without GPTQModel.load")
    arguments = parser.parse_args()
    with torch.no_grad():
        main(arguments.folder, arguments.out, not arguments.transformers)
