"""Packing and unpacking one layer: Weighbridge against the real tools, on one core, in one process for each tool.

    python scripts/bench_pack.py [--runs 5] [TOOL ...]

The tools' environments are those of ``make oracles``, which must have run before. Each is joined by this project and its
dependencies, at the end of its path. In every round each packer of the tool runs and then Weighbridge's of the same layout;
before, both run once (which compiles kernels) and must give equal words, or equal codes. Threads: one, pinned to one core.

Weighbridge goes from one code a byte [out, in] to words and back, range check and new arrays included. What a tool starts from
and ends with is in the table; those that take float weights also round, because that is the only packing that they offer.
Both sides also pack or unpack the zero points, where the tool's function does.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from formats.layouts import PackLayout

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ((4096, 4096), (11008, 4096))
GROUP = 128
VERSIONS = ("autoawq", "auto-gptq", "gptqmodel", "compressed-tensors", "torch", "numpy", "numba")

Array = np.ndarray[Any, Any]


class Case(NamedTuple):
    """A function of a tool, and Weighbridge's that must give the same arrays once ``turn`` has turned the tool's."""

    name: str
    route: str
    theirs: Callable[[], Any]
    ours: Callable[[], tuple[Array, ...]]
    turn: Callable[[Array], Array] = np.asarray


class Layer:
    """Random 4-bit codes with a zero point of 1 to 15 and a scale for every group, as Weighbridge and as tools want them."""

    def __init__(self, out: int, in_: int) -> None:
        import torch

        random = np.random.default_rng(0)
        groups = in_ // GROUP
        self.codes = random.integers(-8, 8, (out, in_), dtype=np.int8)
        self.zeros = random.integers(-7, 8, (out, groups), dtype=np.int8)
        unsigned, zeros = (torch.from_numpy(part + np.int8(8)) for part in (self.codes, self.zeros))
        self.codes_t = unsigned.t().contiguous()  # int8 [in, out], 0..15
        self.zeros_t = zeros.t().contiguous()  # int8 [groups, out]
        self.wide_zeros = zeros.to(torch.int32)  # [out, groups]
        self.scales = torch.from_numpy((random.random((out, groups)) + 0.01).astype(np.float16)).float()
        self.linear = torch.nn.Linear(in_, out, bias=False)
        steps = (unsigned.view(out, groups, GROUP) - zeros[:, :, None]).float()
        self.linear.weight.data = (steps * self.scales[:, :, None]).view(out, in_)

    def pack(self, codes: PackLayout, zeros: PackLayout | None = None) -> Callable[[], tuple[Array, ...]]:
        return lambda: (codes.pack(self.codes), *((zeros.pack(self.zeros),) if zeros else ()))

    def unpack(self, codes: PackLayout, zeros: PackLayout | None = None) -> tuple[list[Any], Callable[[], tuple[Array, ...]]]:
        """(the packed words as tensors, Weighbridge's unpacking of them)."""
        import torch

        layouts = [codes, *([zeros] if zeros else [])]
        words = self.pack(codes, zeros)()
        return [torch.from_numpy(part) for part in words], lambda: tuple(
            layout.unpack(part) for layout, part in zip(layouts, words, strict=True)
        )


def turned(codes: Array) -> Array:
    """A tool's [in, out], 0 to 15, as Weighbridge's [out, in], -8 to 7."""
    return codes.T.astype(np.int8) - np.int8(8)


def autoawq(layer: Layer) -> Iterator[Case]:
    sys.modules["triton"] = None  # type: ignore[assignment]  # AutoAWQ prefers it even on the CPU, where it cannot run
    import torch
    from awq.modules.linear import gemm
    from awq.utils.packing_utils import pack_exllama, reverse_awq_order, unpack_awq

    from formats import awq, gptq

    gemm.get_best_device = lambda: "cpu"
    scales, zeros = layer.scales.t().contiguous(), layer.wide_zeros.t().contiguous()

    def from_linear() -> Any:
        packed = gemm.WQLinear_GEMM.from_linear(layer.linear, 4, GROUP, scales=scales, zeros=zeros)
        return packed.qweight, packed.qzeros

    yield Case("WQLinear_GEMM.from_linear", "float32 -> AWQ words", from_linear, layer.pack(awq.GEMM, awq.GEMM))
    exllama = functools.partial(pack_exllama, layer.codes_t, layer.zeros_t, 4)
    yield Case("pack_exllama", "int8 codes -> GPTQ words", exllama, layer.pack(gptq.codes_layout(4), gptq.zeros_layout(4, "v2")))
    words, ours = layer.unpack(awq.GEMM, awq.GEMM)

    def unpack() -> Any:
        return [torch.bitwise_and(part, 15) for part in reverse_awq_order(*unpack_awq(*words, 4), 4)]

    yield Case("unpack_awq, reverse_awq_order, & 15", "AWQ words -> int8 codes", unpack, ours, turned)


def autogptq(layer: Layer) -> Iterator[Case]:
    import torch
    from auto_gptq.nn_modules.qlinear import qlinear_cuda, qlinear_cuda_old
    from auto_gptq.nn_modules.qlinear.qlinear_marlin import unpack_4bit_to_32bit_signed

    from formats import gptq

    out, in_ = layer.codes.shape
    layouts = gptq.codes_layout(4), gptq.zeros_layout(4, "v1")
    g_idx = torch.arange(in_, dtype=torch.int32) // GROUP
    for module in (qlinear_cuda_old, qlinear_cuda):
        packer = module.QuantLinear(4, GROUP, in_, out, bias=False, weight_dtype=torch.float32)

        def pack(packer: Any = packer) -> Any:
            packer.pack(layer.linear, layer.scales, layer.wide_zeros.float(), g_idx)
            return packer.qweight, packer.qzeros

        yield Case(f"{module.__name__.rpartition('.')[2]}.QuantLinear.pack", "float32 -> GPTQ words", pack, layer.pack(*layouts))
    words, ours = layer.unpack(*layouts)
    unpack = functools.partial(unpack_4bit_to_32bit_signed, *words)
    yield Case("unpack_4bit_to_32bit_signed", "GPTQ words -> int8 codes", unpack, ours, turned)


def gptqmodel(layer: Layer) -> Iterator[Case]:
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.nn_modules.qlinear.utils import unpack_4bit_to_32bit_signed
    from gptqmodel.quantization.awq.utils.packing_utils import pack_awq, pack_exllama, reverse_awq_order, unpack_awq
    from gptqmodel.utils.model_dequant import unpack_cols, unpack_rows

    from formats import awq, gptq

    out, in_ = layer.codes.shape
    layouts = gptq.codes_layout(4), gptq.zeros_layout(4, "v2")
    g_idx = torch.arange(in_, dtype=torch.int32) // GROUP
    shape: dict[str, Any] = {"sym": False, "in_features": in_, "out_features": out}

    def by(method: str, *switches: str) -> Callable[[], Any]:
        packer = TorchLinear(4, GROUP, desc_act=True, register_buffers=False, **shape)
        zeros = layer.wide_zeros if method == "pack_block" else layer.wide_zeros.float()

        def pack() -> Any:
            for name in ("GPTQMODEL_FORCE_PACK_EXT", "GPTQMODEL_DISABLE_PACK_EXT"):
                os.environ[name] = str(int(name in switches))
            getattr(packer, method)(layer.linear, layer.scales, zeros, g_idx)
            return packer.qweight, packer.qzeros

        return pack

    route = "float32 -> GPTQ words"
    yield Case("pack_block, C++ extension", route, by("pack_block", "GPTQMODEL_FORCE_PACK_EXT"), layer.pack(*layouts))
    yield Case("pack_block, torch", route, by("pack_block", "GPTQMODEL_DISABLE_PACK_EXT"), layer.pack(*layouts))
    yield Case("pack_original, NumPy", route, by("pack_original"), layer.pack(*layouts))
    exllama = functools.partial(pack_exllama, layer.codes_t, layer.zeros_t, 4)
    yield Case("pack_exllama", "int8 codes -> GPTQ words", exllama, layer.pack(*layouts))
    awq_layer = AwqTorchLinear(4, GROUP, desc_act=False, **shape)

    def pack_from_float() -> Any:
        awq_layer.pack(layer.linear, layer.scales, layer.wide_zeros.float())
        return awq_layer.qweight, awq_layer.qzeros

    yield Case("AwqTorchLinear.pack", "float32 -> AWQ words", pack_from_float, layer.pack(awq.GEMM, awq.GEMM))
    from_codes = functools.partial(pack_awq, layer.codes_t, layer.zeros_t, 4)
    yield Case("pack_awq", "int8 codes -> AWQ words", from_codes, layer.pack(awq.GEMM, awq.GEMM))

    words, ours = layer.unpack(*layouts)
    rows = functools.partial(lambda codes, zeros: (unpack_rows(codes, 4), unpack_cols(zeros, 4)), *words)
    yield Case("unpack_rows, unpack_cols", "GPTQ words -> int32 codes", rows, ours, turned)
    signed = functools.partial(unpack_4bit_to_32bit_signed, *words)
    yield Case("unpack_4bit_to_32bit_signed", "GPTQ words -> int8 codes", signed, ours, turned)
    awq_words, awq_ours = layer.unpack(awq.GEMM, awq.GEMM)
    reverse = functools.partial(lambda *words: reverse_awq_order(*unpack_awq(*words, 4), 4), *awq_words)
    yield Case("unpack_awq, reverse_awq_order", "AWQ words -> int32 codes", reverse, awq_ours, turned)


def compressed_tensors(layer: Layer) -> Iterator[Case]:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    from formats.layouts import PackLayout

    layout = PackLayout(4, "<i4", "in", offset=8, low=-8)
    signed = torch.from_numpy(layer.codes)
    yield Case("pack_to_int32", "int8 codes -> pack-quantized words", lambda: [pack_to_int32(signed, 4)], layer.pack(layout))
    words, ours = layer.unpack(layout)
    unpack = functools.partial(unpack_from_int32, words[0], 4, signed.shape)
    yield Case("unpack_from_int32", "pack-quantized words -> int8 codes", lambda: [unpack()], ours)


TOOLS: dict[str, tuple[str, Callable[[Layer], Iterator[Case]]]] = {  # title -> (environment, cases)
    "AutoAWQ": ("autoawq", autoawq),
    "AutoGPTQ": ("autogptq", autogptq),
    "GPTQModel": ("gptqmodel", gptqmodel),
    "compressed-tensors": ("gptqmodel", compressed_tensors),
}


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(cases: list[Case], weights: int, runs: int) -> list[list[str]]:
    """For every case, the tool's and Weighbridge's million weights a second and their ratio."""
    for case in cases:
        theirs, ours = case.theirs(), case.ours()
        for their_part, our_part in zip(theirs, ours, strict=True):
            np.testing.assert_array_equal(case.turn(np.asarray(their_part)), our_part, case.name)
    rounds = [[(seconds(case.theirs), seconds(case.ours)) for case in cases] for _ in range(runs)]
    rows = []
    for times in zip(*rounds, strict=True):
        theirs, ours = zip(*times, strict=True)
        ratios = [their / our for their, our in times]
        rates = [f"{weights / statistics.median(side) / 1e6:,.0f}" for side in (theirs, ours)]
        rows.append([*rates, f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"])
    return rows


def copied(out: int, in_: int, runs: int) -> float:
    """The yardstick: codes a second, a byte each, that NumPy copies into an array that has its memory already."""
    codes, copy = (np.ones((out, in_), dtype=np.int8) for _ in range(2))
    return codes.size / statistics.median(seconds(lambda: np.copyto(copy, codes)) for _ in range(runs))


def versions() -> list[str]:
    """Of the packages that this process imports: the environment's own come first in its path."""
    found = []
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return found


def work(tool: str, runs: int, answer: Path) -> None:
    """In a tool's environment: measure all its cases and write the rows of the table."""
    import torch

    torch.set_num_threads(1)
    rows: list[list[str]] = []
    with torch.no_grad():
        for shape in SHAPES:
            cases = list(TOOLS[tool][1](Layer(*shape)))
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # after the imports: some start threads by the number of cores
            measured = measure(cases, shape[0] * shape[1], runs)
            rows = rows or [[tool, case.name, case.route] for case in cases]
            rows = [[*row, *more] for row, more in zip(rows, measured, strict=True)]
    answer.write_text(json.dumps({"rows": rows, "versions": versions(), "copied": copied(*SHAPES[-1], runs)}), "utf-8")


def drive(tools: list[str], runs: int) -> None:
    """Measure each tool with the interpreter of its environment; print one table."""
    from bench import machine, show

    from noxfile import cache_folder

    rows, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for tool in tools:
            environment = cache_folder() / "oracles" / TOOLS[tool][0]
            answer = Path(folder) / "answer.json"
            variables = {
                "WEIGHBRIDGE_KERNELS": "numba",
                "TORCHDYNAMO_DISABLE": "1",
                "GPTQMODEL_CPU_WORKERS": "2",
                "GPTQMODEL_TORCH_EXTENSIONS_DIR": str(environment / "extensions"),
            }
            python = environment / "bin" / "python"
            if not python.exists():
                raise SystemExit(f"{tool} is not in {environment}: make oracles installs it")
            command = [str(python), __file__, tool, "--runs", str(runs)]
            command += ["--answer", str(answer), "--beside", sysconfig.get_path("purelib")]
            subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, **variables})
            said = json.loads(answer.read_text("utf-8"))
            rows += said["rows"]
            notes.append(
                f"{tool}'s process: {', '.join(said['versions'])}; NumPy copies {said['copied'] / 1e6:,.0f} million codes a second"
            )
    print(machine())
    print("\n".join(notes))
    columns = ["", "function", "from -> to"]
    for out, in_ in SHAPES:
        columns += [f"[{out}, {in_}] tool", "Weighbridge", "ratio"]
    show(f"4 bits, group {GROUP}, million weights a second on one core; {runs} runs", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"default: all of {', '.join(TOOLS)}")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--beside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.append(str(ROOT))
    if options.answer:
        sys.path.append(options.beside)
        work(options.tools[0], options.runs, options.answer)
    else:
        drive(options.tools or list(TOOLS), options.runs)


if __name__ == "__main__":
    main()
