"""What the quantization tests share: the float models, the calibration samples, and files that the real msModelSlim wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).parents[2] / "fixtures"
WEIGHT_ONLY, W8_FAMILY, SOURCES = FIXTURES / "msmodelslim", FIXTURES / "msmodelslim_w8", FIXTURES / "compressed_tensors"
Tensors = dict[str, torch.Tensor]


def case_of(folder: Path) -> dict[str, Any]:
    """The exact arguments of a golden."""
    return json.loads((folder / "golden_case.json").read_text())


def source_of(folder: Path) -> Path:
    """The float model that a golden was made from."""
    return (SOURCES if folder.parent == W8_FAMILY else WEIGHT_ONLY) / case_of(folder)["src"]


def load_model(source: Path, dtype: torch.dtype | None = None) -> Any:
    """A float model, in its own dtype or another, which its config then says too."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto").eval()


def dtype_of(folder: Path) -> torch.dtype:
    """The dtype that a golden's name ends in."""
    return torch.bfloat16 if folder.name.endswith("_bf16") else torch.float16


def samples() -> list[list[torch.Tensor]]:
    """The four samples that every golden of fixtures/msmodelslim_w8 was calibrated with."""
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(0, 128, (1, 32), generator=generator) for _ in range(4)]
    return [[one, torch.ones(1, 32, dtype=torch.long)] for one in ids]


def older_samples() -> list[list[torch.Tensor]]:
    """The four samples that every golden of fixtures/msmodelslim was calibrated with."""
    ids = torch.randint(3, 512, (4, 48), generator=torch.Generator().manual_seed(7))
    return [[one[None], torch.ones(1, 48, dtype=torch.long)] for one in ids]


def stored(folder: Path) -> Tensors:
    """All tensors of a golden, of all its shards."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        if not path.name.startswith("golden_"):
            tensors |= load_file(path)
    return tensors


def types(folder: Path) -> dict[str, str]:
    """{tensor name: type} of a golden's description."""
    (path,) = (path for path in folder.glob("*.json") if path.name not in ("golden_case.json",) and "index" not in path.name)
    return {name: kind for name, kind in json.loads(path.read_text()).items() if "." in name}


def quantized(folder: Path) -> dict[str, str]:
    """{linear: type} of a golden's quantized linears."""
    return {
        name.removesuffix(".weight"): kind
        for name, kind in types(folder).items()
        if name.endswith(".weight") and kind != "FLOAT" and ".module." not in name
    }


def unpacked(codes: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """int4 codes [out, in] of ascendV1's two packings, low nibble first; codes that are not packed as they are."""
    if codes.shape == shape:
        return codes
    low, high = ((codes << 4) >> 4), codes >> 4
    axis = 2 if codes.shape[1] != shape[1] else 1
    return torch.stack([low, high], axis).reshape(shape)
