"""Pack random integers with AutoAWQ's own code, WQLinear_GEMM.from_linear, on the CPU.

    python autoawq_pack.py OUT.safetensors SEED SHAPES

Run by the interpreter that has AutoAWQ 0.2.9 (``nox -s autoawq`` builds it); it imports nothing of Weighbridge. For each
shape ``i`` it writes ``i.codes`` uint8 [out, in] and ``i.zeros`` uint8 [out, groups], 0..15, and the tool's words, as the tool
stores them: ``i.qweight`` int32 [in, out / 8] and ``i.qzeros`` int32 [groups, out / 8].

from_linear takes float weights. They are scale * (code - zero), with random scales, in float32; the tool's own rounding must
find the codes again, so words that differ are the fault of rounding or of packing on either side.
"""

# ruff: noqa: E402 - Triton must be hidden before AutoAWQ is imported

from __future__ import annotations

import sys

sys.modules["triton"] = None  # type: ignore[assignment]  # see autoawq_decode.py

import torch
from awq.modules.linear import gemm
from safetensors.torch import save_file

GROUP_SIZES = (16, 32, 64, 128)

gemm.get_best_device = lambda: "cpu"  # it would move only the zero points to a GPU where there is one


def main(out: str, seed: int, shapes: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    result = {}
    for i in range(shapes):
        group_size = GROUP_SIZES[integer(0, len(GROUP_SIZES))]
        groups, rows = integer(1, 9), 32 * integer(1, 9)
        columns = groups * group_size
        codes = torch.randint(0, 16, (rows, columns), generator=generator)
        zeros = torch.randint(0, 16, (rows, groups), generator=generator)
        scales = torch.rand(rows, groups, generator=generator).add(0.01).half().float()
        linear = torch.nn.Linear(columns, rows, bias=False)
        wide_zeros, wide_scales = (grid.repeat_interleave(group_size, dim=1) for grid in (zeros, scales))
        linear.weight.data = wide_scales * (codes - wide_zeros)
        packed = gemm.WQLinear_GEMM.from_linear(linear, 4, group_size, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())
        result[f"{i}.codes"] = codes.to(torch.uint8)
        result[f"{i}.zeros"] = zeros.to(torch.uint8)
        result[f"{i}.qweight"] = packed.qweight.contiguous()
        result[f"{i}.qzeros"] = packed.qzeros.contiguous()
    save_file(result, out)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: autoawq_pack.py OUT.safetensors SEED SHAPES")
    with torch.no_grad():
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
