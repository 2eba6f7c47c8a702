"""Load compressed-tensors folders with transformers and compressed-tensors, and say what they make of them.

    python compressed_tensors_load.py FOLDERS OUT

Run by the interpreter that has transformers 5.10.1 and compressed-tensors 0.17.0 (``nox -s compressed_tensors`` builds it). It
imports nothing of Weighbridge.

For each folder under FOLDERS, OUT/<name>.safetensors holds of every linear P that a group of the config targets

P.weight         what transformers has after loading with ``run_compressed=False``, in its dtype
P.decompressed   what compressed-tensors' decompressor makes of the tensors as they are stored, in its dtype
P.input_scale, P.input_zero_point   what transformers has, if inputs have a static scale
logits           float32 of 32 ids: activations are quantized as the config says

and as metadata, each a JSON text:

formats    P -> the format whose decompressor was asked
inputs     P -> "static", "dynamic" or null
problems   what transformers says of keys: {"missing_keys": [...], ...}, those that are not empty
refused    the error on which loading ended, "" if it did not; what follows the error is then missing above
"""

from __future__ import annotations

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import json
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()


def stored_tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of every module, by module and by their own names."""
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            module, _, leaf = name.rpartition(".")
            modules[module][leaf] = tensor
    return modules


def load(folder: Path, says: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Fill in what the module says of ``folder``."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", quantization_config=CompressedTensorsConfig(run_compressed=False), output_loading_info=True
    )
    says["problems"] = {key: sorted(map(str, value)) for key, value in info.items() if value}
    config = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    whole, stored = QuantizationConfig.model_validate(config), stored_tensors(folder)
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or not isinstance(module, torch.nn.Linear):
            continue
        tensors[f"{name}.weight"] = module.weight.detach()
        inputs = scheme.input_activations
        says["inputs"][name] = None if inputs is None else "dynamic" if inputs.dynamic else "static"
        if says["inputs"][name] == "static":
            for leaf in ("input_scale", "input_zero_point"):
                if (found := getattr(module, leaf, None)) is not None:
                    tensors[f"{name}.{leaf}"] = found.detach()
        says["formats"][name] = str(getattr(scheme.format, "value", None) or scheme.format or whole.format)
        compressor = BaseCompressor.get_value_from_registry(says["formats"][name])
        parts = {leaf: tensor for leaf, tensor in stored[name].items() if leaf != "bias"}
        tensors[f"{name}.decompressed"] = compressor.decompress(parts, scheme)["weight"]
    ids = torch.arange(1, 33).mul(37).remainder(model.config.vocab_size)[None]
    tensors["logits"] = model(input_ids=ids, use_cache=False).logits.float()


def main(folders: Path, out: Path) -> None:
    for folder in sorted(folders.iterdir()):
        says: dict[str, Any] = {"formats": {}, "inputs": {}, "problems": {}, "refused": ""}
        tensors: dict[str, torch.Tensor] = {}
        try:
            load(folder, says, tensors)
        except Exception as error:
            says["refused"] = f"{type(error).__name__}: {error}"
        contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(contiguous, out / f"{folder.name}.safetensors", {key: json.dumps(value) for key, value in says.items()})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: compressed_tensors_load.py FOLDERS OUT")
    with torch.no_grad():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
