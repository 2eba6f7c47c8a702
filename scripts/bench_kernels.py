"""The kernels alone, in GB/s against memcpy, and what one and two threads make of them.

    python scripts/bench_kernels.py [--runs 7]

Each works on a strip of [128, 3584] codes that stays in a core's second-level cache, as in a conversion. Bandwidth counts bytes
read and bytes written; so does memcpy's, which copies as many bytes within the same cache. Threads work on strips of their own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

os.environ["WEIGHBRIDGE_KERNELS"] = "numba"

import numpy as np
import xxhash
from bench import machine, show

from formats import kernels, tile_kernels
from formats.awq import GEMM, GEMV, GEMV_FAST
from formats.gptq import codes_layout
from formats.ir import Array
from formats.layouts import PackLayout, TileLayout
from formats.marlin import MARLIN
from formats.msmodelslim import PACKED_COLUMNS, PACKED_ROWS
from formats.turbomind_tree import HALF_MMA, MMA
from formats.turbomind_tree import ROWS as NATURAL

ROWS, COLS = 128, 3584
LAYOUTS: dict[str, PackLayout | TileLayout] = {
    "awq:gemm": GEMM,
    "awq:gemv, compressed-tensors": GEMV,
    "awq:gemv_fast": GEMV_FAST,
    "marlin": MARLIN,
    "turbomind:0.1": MMA,
    "turbomind:0.1, q, k, gate, up": HALF_MMA,
    "turbomind:0.6": NATURAL,
    "gptq, 4 bits": codes_layout(4),
    "gptq, 8 bits": codes_layout(8),
    "gptq, 3 bits": codes_layout(3),
    "msmodelslim:ascendv1, groups": PACKED_ROWS,
    "msmodelslim:ascendv1, channels": PACKED_COLUMNS,
}

Job = tuple[str, int, Callable[[], object]]
"""(name, bytes read and written, what to run)"""


def jobs() -> list[Job]:
    """Every kernel on arrays of its own."""
    rng = np.random.default_rng(0)
    found: list[Job] = []
    for name, layout in LAYOUTS.items():
        half = 1 << (layout.bits - 1)
        codes = rng.integers(-half, half, (ROWS, COLS)).astype(np.int8)
        words = layout.pack(codes)
        size = codes.nbytes + words.nbytes
        found.append((f"pack {name}", size, lambda layout=layout, codes=codes, words=words: layout.pack(codes, words)))
        found.append((f"unpack {name}", size, _unpack(layout, words, codes)))
    codes = rng.integers(-8, 8, (64, COLS)).astype(np.int8)
    scales, zeros = rng.random((64, COLS // 128), np.float32), rng.integers(0, 3, (64, COLS // 128)).astype(np.float32)
    group = np.arange(COLS) // 128
    starts = np.flatnonzero((np.diff(group, prepend=-1) != 0) | (np.arange(COLS) % 1024 == 0))
    runs = kernels.Runs(starts, np.append(starts[1:], COLS), group[starts])
    values = np.empty(codes.size, np.float32)
    law = codes.nbytes + values.nbytes
    found.append(("the law, float32", law, lambda: kernels.dequantize_leaves(codes, scales, zeros, runs, 1024, values)))
    found.append(("XXH3-128 (xxhash)", values.nbytes, lambda: xxhash.xxh3_128_digest(values)))
    other = codes.copy()
    found.append(("compare codes", 2 * codes.nbytes, lambda: kernels.equal(codes, other)))
    found.append(("range of codes", codes.nbytes, lambda: kernels.code_range(codes)))
    return found


def _unpack(layout: PackLayout | TileLayout, words: Array, codes: Array) -> Callable[[], object]:
    into = np.empty_like(codes)
    if isinstance(layout, TileLayout):
        return lambda: tile_kernels.unpack_tiles(layout, words, into)
    return lambda: kernels.unpack(layout, words, into)


def copy_of(size: int) -> Callable[[], object]:
    """memcpy that reads and writes ``size`` bytes together."""
    source = np.zeros(size // 2, np.uint8)
    target = np.empty_like(source)
    return lambda: np.copyto(target, source)


def seconds(run: Callable[[], object], times: int) -> float:
    """Of one call, on average over ``times``."""
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    print(machine())
    threads = min(2, len(os.sched_getaffinity(0)))
    mine, others = jobs(), jobs()
    rows = []
    with ThreadPoolExecutor(threads) as pool:
        for (name, size, run), (_, _, again) in zip(mine, others, strict=True):
            copy, figures = copy_of(size), []
            for work in (run, again, copy):
                work()
            times = max(1, int(0.02 / seconds(run, 5)))
            for _ in range(options.runs):
                alone, plain = seconds(run, times), seconds(copy, times)
                start = time.perf_counter()
                list(pool.map(seconds, (run, again)[:threads], [times] * threads))
                together = (time.perf_counter() - start) / times
                figures.append((size / alone / 1e9, plain / alone, threads * alone / together))
            rate, share, scaling = (statistics.median(column) for column in zip(*figures, strict=True))
            rows.append([name, f"{rate:.1f}", f"{share:.2f}", f"{scaling:.2f}"])
    show(f"Kernels on [{ROWS}, {COLS}] codes in cache; {options.runs} runs", ["", "GB/s", "x memcpy", f"{threads} threads, x one"], rows)


if __name__ == "__main__":
    main()
