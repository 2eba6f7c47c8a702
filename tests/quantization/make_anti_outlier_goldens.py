"""Write anti_outlier_goldens.safetensors: what msModelSlim 26.1.0's AntiOutlier did to two tiny float models, on the CPU.

    python make_anti_outlier_goldens.py OUT

Run by the interpreter that has msModelSlim 26.1.0 (``nox -s msmodelslim`` builds it); it imports nothing of Weighbridge, and no test runs
it. Tensors: ``ids`` (samples, tokens); ``MODEL:weight:NAME``, the model before; ``MODEL:SETTING:NAME``, the scale by which the tool
multiplied the columns of the linear NAME; ``MODEL:SETTING:NAME.bias``, what it left in the bias of the norm NAME. Metadata: the configs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"num_key_value_heads": 2, "attention_bias": True},
    "qwen3": SIZES | {"num_key_value_heads": 2, "head_dim": 8},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "m1": {"anti_method": "m1"},
    "m2": {"anti_method": "m2"},
    "m3": {"anti_method": "m3"},
    "m3_w4_asym": {"anti_method": "m3", "w_bit": 4, "a_bit": 16, "w_sym": False},
    "m4": {"anti_method": "m4"},
    "m5": {"anti_method": "m5"},
    "m6": {"anti_method": "m6"},
    "m6_given": {"anti_method": "m6", "flex_config": {"alpha": 0.6, "beta": 0.3}},
}
QWEN3_SETTINGS = ("m4", "m6")  # the others crash there


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(23)
    model = LlamaForCausalLM(LlamaConfig(**CONFIGS[name])) if name == "llama" else Qwen3ForCausalLM(Qwen3Config(**CONFIGS[name]))
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("layernorm.weight"):
                weight.mul_(torch.rand_like(weight) + 0.5)
                weight[torch.randperm(32)[:6]] *= torch.tensor([3.0, 4.0, 5.0, 7.0, 9.0, 15.0])
            elif key.endswith("bias"):
                weight.normal_(0, 0.1)
            elif "layers" in key and weight.dim() == 2:
                weight.mul_(3 + 2 * torch.rand(weight.shape[0], 1))
    return model.eval()


def record(name: str, setting: str, samples: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    model, found = build(name), {}
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    AntiOutlier(model, samples, AntiOutlierConfig(**SETTINGS[setting])).process()
    for key, weight in model.state_dict().items():
        layer = key.removesuffix(".weight")
        if key in before and weight.dim() == 2 and ".layers." in key and layer.endswith(("q_proj", "o_proj", "up_proj", "down_proj")):
            if layer.endswith("up_proj") and setting in ("m4", "m6", "m6_given"):
                layer, key = layer.replace("up_proj", "gate_proj"), key.replace("up_proj", "gate_proj")
            old, new = before[key].double(), model.state_dict()[key].double()
            row = old.abs().argmax(0, keepdim=True)
            found[f"{name}:{setting}:{layer}"] = (new.gather(0, row) / old.gather(0, row)).squeeze(0).float()
        if key.endswith("layernorm.bias") and bool(weight.any()):
            found[f"{name}:{setting}:{key}"] = weight
    return found


def main(out: Path) -> None:
    torch.set_num_threads(1)
    ids = torch.randint(0, 32, (3, 24), generator=torch.Generator().manual_seed(7))
    samples = [[row[None], torch.ones(1, 24, dtype=torch.long)] for row in ids]
    tensors = {"ids": ids.to(torch.uint8)}
    for name in CONFIGS:
        tensors |= {f"{name}:weight:{key}": weight.clone() for key, weight in build(name).state_dict().items()}
        for setting in SETTINGS if name == "llama" else QWEN3_SETTINGS:
            tensors |= record(name, setting, samples)
    about = {"msmodelslim": "26.1.0 (PyPI)", "torch": torch.__version__, "configs": json.dumps(CONFIGS), "settings": json.dumps(SETTINGS)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, out, metadata=about)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
