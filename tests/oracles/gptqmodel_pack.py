"""Pack random integers with GPTQModel's and compressed-tensors' own code, on the CPU.

    python gptqmodel_pack.py OUT.safetensors SEED SHAPES

Run by the interpreter that has GPTQModel 7.6.0 and compressed-tensors 0.20.0 (``nox -s gptqmodel`` builds it); it imports nothing
of Weighbridge. For shape ``i``, of 2, 3, 4 or 8 bits in turn, it writes, under the name ``i.<bits>``:

| tensor | dtype, shape | by |
| --- | --- | --- |
| .codes, .zeros | uint8 [out, in], [out, groups] | random |
| .block.qweight, .block.qzeros | int32, as stored (v2) | TorchLinear.pack_block, its Python half |
| .cpp.qweight, .cpp.qzeros | the same | pack_block's C++ extension; not for 3 bits |
| .original.qweight, .original.qzeros | the same | TorchLinear.pack_original |
| .v1.qzeros | the same in v1 | convert_gptq_v2_to_v1_format_module of .block.qzeros; where no zero point is 0 |
| .awq.qweight, .awq.qzeros | int32, as stored | AwqTorchLinear.pack; 4 bits |
| .ct.weight_packed | int32 [out, in * bits / 32] | compressed_tensors pack_to_int32, dim 1, of code - 2^(bits-1) |
| .ct.weight_zero_point | int32 [out * bits / 32, groups] | compressed_tensors pack_to_int32, dim 0, of zero - 2^(bits-1) |

GPTQModel's packers take float weights. They are scale * (code - zero), with random scales, in float32; the tool's own rounding
must find the codes again. Half of the shapes have a shuffled g_idx (act order), which must leave the words as they are.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)


def pack_block(layer: TorchLinear, *weights: torch.Tensor, extension: bool) -> None:
    """pack_block by one of its two halves; it falls back to Python without a word unless the extension is demanded."""
    chosen, other = ("GPTQMODEL_FORCE_PACK_EXT", "GPTQMODEL_DISABLE_PACK_EXT")[:: 1 if extension else -1]
    os.environ.pop(other, None)
    os.environ[chosen] = "1"
    layer.pack_block(*weights)


def main(out: str, seed: int, shapes: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    result = {}
    for i in range(shapes):
        bits = BITS[i % len(BITS)]
        top, half = 2**bits, 2 ** (bits - 1)
        group_size = GROUP_SIZES[integer(0, len(GROUP_SIZES))]
        groups, rows = integer(1, 7), 32 * integer(1, 7)
        columns = groups * group_size
        codes = torch.randint(0, top, (rows, columns), generator=generator)
        zeros = torch.randint(integer(0, 2), top, (rows, groups), generator=generator)
        scales = torch.rand(rows, groups, generator=generator).add(0.01).half().float()
        g_idx = torch.arange(columns, dtype=torch.int32) // group_size
        natural = g_idx.long()
        if integer(0, 2):
            g_idx = g_idx[torch.randperm(columns, generator=generator)]
        name = f"{i}.{bits}"
        result[f"{name}.codes"], result[f"{name}.zeros"] = codes.to(torch.uint8), zeros.to(torch.uint8)

        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = scales[:, g_idx.long()] * (codes - zeros[:, g_idx.long()])

        def keep(packer: str, layer: torch.nn.Module, name: str = name) -> None:
            for part in ("qweight", "qzeros"):
                result[f"{name}.{packer}.{part}"] = getattr(layer, part).clone().contiguous()

        def new_layer(bits: int = bits, group_size: int = group_size, columns: int = columns, rows: int = rows) -> TorchLinear:
            return TorchLinear(bits, group_size, sym=False, desc_act=True, in_features=columns, out_features=rows, register_buffers=False)

        original, block = new_layer(), new_layer()
        original.pack_original(linear, scales, zeros.float(), g_idx)
        keep("original", original)
        # int32: the Python half of pack_block casts zero points to int64 itself, from what it is given
        pack_block(block, linear, scales, zeros.to(torch.int32), g_idx, extension=False)
        keep("block", block)
        if bits != 3:
            native = new_layer()
            pack_block(native, linear, scales, zeros.to(torch.int32), g_idx, extension=True)
            keep("cpp", native)
        if zeros.min() > 0:
            convert_gptq_v2_to_v1_format_module(block, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
            result[f"{name}.v1.qzeros"] = block.qzeros.clone().contiguous()
        if bits == 4:
            linear.weight.data = scales[:, natural] * (codes - zeros[:, natural])
            awq = AwqTorchLinear(bits, group_size, sym=False, desc_act=False, in_features=columns, out_features=rows)
            awq.pack(linear, scales.half().float(), zeros.float())
            keep("awq", awq)
        result[f"{name}.ct.weight_packed"] = pack_to_int32((codes - half).to(torch.int8), bits).contiguous()
        result[f"{name}.ct.weight_zero_point"] = pack_to_int32((zeros - half).to(torch.int8), bits, packed_dim=0).contiguous()
    save_file(result, out)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: gptqmodel_pack.py OUT.safetensors SEED SHAPES")
    with torch.no_grad():
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
