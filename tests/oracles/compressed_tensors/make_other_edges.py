"""Write one folder of single weights as another version of compressed-tensors packs them, where that differs from 0.17.0.

    pip install --no-deps --target DIR compressed-tensors==0.9.3
    PYTHONPATH=DIR python make_other_edges.py OUT

Run by the interpreter that has requirements.txt, with 0.9.3 or 0.20.0 before its own compressed-tensors; it writes
OUT/edge_linear_VERSION. No test runs it, and it imports nothing of Weighbridge. Scales and zero points are drawn, and the weights
are float16, exactly scale * (code - zero), so that the tool finds the codes again; ``NAME.codes`` and ``NAME.zeros`` are int8.

* up to 0.9.3, weight_zero_point is int8 [out, groups] and not packed;
* from 0.18.0 on, codes of 3, 5, 6 and 7 bits lie densely, 32 in as many words as they have bits, across word boundaries.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

OLD = {"pack4_asym_n36_k96": (4, 36, 96), "pack8_asym_n35_k96": (8, 35, 96)}
DENSE = {f"pack{bits}_asym_n35_k96": (bits, 35, 96) for bits in range(2, 9)} | {"pack3_asym_n40_k160": (3, 40, 160)}
GROUP = 32


def compress(state: dict[str, torch.Tensor], args: QuantizationArgs) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(The tensors that the tool writes, the weight that it makes of them)."""
    if inspect.ismethod(BaseCompressor.compress):
        compressor, scheme = BaseCompressor.get_value_from_registry("pack-quantized"), QuantizationScheme(targets=["Linear"], weights=args)
        packed = compressor.compress(state, scheme)
        return packed, compressor.decompress(packed, scheme)["weight"]
    old = BaseCompressor.load_from_registry("pack-quantized")
    written = old.compress({f"P.{name}": value for name, value in state.items()}, {"P": args})
    packed = {name.removeprefix("P."): value for name, value in written.items()}
    return packed, old.decompress_weight(packed, args)


def main(out: Path) -> None:
    version = compressed_tensors.__version__
    folder = out / f"edge_linear_{version}"
    folder.mkdir(parents=True, exist_ok=True)
    tensors, about = {}, {}
    for index, (name, (bits, rows, columns)) in enumerate((OLD if version == "0.9.3" else DENSE).items()):
        generator = torch.Generator().manual_seed(200 + index)
        low, high = -(1 << (bits - 1)), 1 << (bits - 1)
        codes = torch.randint(low, high, (rows, columns), generator=generator)
        zeros = torch.randint(low, high, (rows, columns // GROUP), generator=generator)
        scale = 2.0 ** torch.randint(-8, 0, (rows, columns // GROUP), generator=generator)
        weight = scale.repeat_interleave(GROUP, 1) * (codes - zeros.repeat_interleave(GROUP, 1))
        args = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=GROUP)
        state = {"weight": weight.half(), "weight_scale": scale.half(), "weight_zero_point": zeros.to(torch.int8)}
        packed, back = compress(state, args)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in packed.items()}
        tensors |= {f"{name}.codes": codes.to(torch.int8), f"{name}.zeros": zeros.to(torch.int8)}
        about[name] = {
            "bits": bits,
            "group_size": GROUP,
            "shape": list(back.shape),
            "dtype": str(back.dtype).removeprefix("torch."),
            "sha256_float32_le": hashlib.sha256(back.float().contiguous().numpy().astype("<f4").tobytes()).hexdigest(),
        }
    save_file(tensors, folder / "edges.safetensors", metadata={"format": "pt"})
    how = f"compressed-tensors {version}: its pack-quantized compressor, then its decompressor; NAME.* are the tensors it wrote"
    (folder / "dequant_sha256.json").write_text(json.dumps({"how": how, "tensors": about}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
