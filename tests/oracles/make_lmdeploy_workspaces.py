"""Write what LMDeploy's converters make of the models of ``lmdeploy_models``: fixtures/lmdeploy/workspaces.json, and some workspaces.

    PYTHONPATH=LMDEPLOY python make_lmdeploy_workspaces.py VERSION OUT

Run by an interpreter that has torch and the transformers of that version's days, with the wheel of LMDeploy ``VERSION`` unpacked in the
folder LMDEPLOY; no test runs it. LMDeploy's Python code is as it is, but for what needs a GPU or a network: ``_turbomind`` is a stand-in
that is never called, ``.cuda()`` stays on the CPU, bfloat16 is said to be supported, as on an A100, the tokenizer is its ids, and the
config.json of models whose classes lie on the hub is read by transformers' base class.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.modules["_turbomind"] = mock.MagicMock()

import torch  # noqa: E402

torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
torch.cuda.is_bf16_supported = lambda *_, **__: True  # type: ignore[assignment]
torch.cuda.empty_cache = lambda: None

import lmdeploy.turbomind.deploy.converter as converter  # noqa: E402
from lmdeploy.turbomind.deploy.source_model import llama  # noqa: E402
from lmdeploy_models import CASES, write_model  # noqa: E402
from transformers import AutoConfig, PretrainedConfig  # noqa: E402

for kind in ("internlm2", "baichuan", "qwen"):
    AutoConfig.register(kind, type(kind, (PretrainedConfig,), {"model_type": kind, "keys_to_ignore_at_inference": []}), exist_ok=True)


class Ids:
    """A model's tokenizer, as far as a converter asks."""

    def __init__(self, folder: str, *_: Any, **__: Any) -> None:
        config = json.loads((Path(folder) / "config.json").read_text())
        self.vocab_size, self.bos_token_id, self.eos_token_id = (config[key] for key in ("vocab_size", "bos_token_id", "eos_token_id"))

    def __len__(self) -> int:
        return int(self.vocab_size)


def digests(folder: Path) -> dict[str, str]:
    """{file: its SHA-256}, of a configuration its text."""
    found = {}
    for path in sorted(folder.iterdir()):
        said = path.name.startswith("config.")
        found[path.name] = path.read_text() if said else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def convert(version: str, model: Path, out: Path, config: dict[str, Any], tp: int) -> None:
    kind, quantized = config["model_type"], "quantization_config" in config
    if version < "0.6":
        named = {"qwen": "qwen-7b", "baichuan": "baichuan-7b", "internlm2": "internlm2-chat-7b"}.get(kind, "internlm-chat-7b")
        converter.main(named, str(model), "awq" if quantized else None, dst_path=str(out), tp=tp, group_size=128 if quantized else 0)
        return
    converter.main(
        "ours", str(model), "awq" if quantized else "hf", chat_template="llama2", dst_path=str(out), tp=tp,
        group_size=128 if quantized else 0,
    )  # fmt: skip


def main(version: str, target: Path) -> None:
    llama.Tokenizer = Ids
    if hasattr(converter, "is_bf16_supported"):
        converter.is_bf16_supported = torch.cuda.is_bf16_supported
    if version >= "0.6":
        import transformers

        transformers.AutoTokenizer = SimpleNamespace(from_pretrained=Ids)
        from lmdeploy.turbomind.deploy.target_model import base

        if hasattr(base, "AutoTokenizer"):
            base.AutoTokenizer = transformers.AutoTokenizer
    kept = target / "workspaces.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for case, (wanted, config, tp) in CASES.items():
        if wanted != version:
            continue
        work = target / "work" / case
        shutil.rmtree(work, ignore_errors=True)
        model = write_model(work / "model", config)
        convert(version, model, work / "workspace", config, tp)
        found[case] = digests(work / "workspace/triton_models/weights")
        if config.get("rope_scaling"):  # only the configuration differs from another case
            found[case] = {name: said for name, said in found[case].items() if name.startswith("config.")}
    kept.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
