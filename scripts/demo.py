"""``make demo``: a checkpoint that the real msModelSlim wrote becomes an AutoAWQ and an AutoGPTQ folder, both proved."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from convert import convert, inspect, verify

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "fixtures" / "msmodelslim" / "w4a16_g128_sym_bf16"
BASE = ROOT / "fixtures" / "msmodelslim" / "src_bf16"
OUT = ROOT / "demo"


def main() -> None:
    console = Console(width=110)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    report = inspect(SOURCE)
    source = report.schemes[0]
    console.print(f"[bold]{SOURCE.relative_to(ROOT)}[/bold], which msModelSlim 26.1.0 wrote:")
    console.print(f"{report.format}, {source.layers} quantized layers ({source.scheme}), {_mb(report.bytes)}\n")
    table = Table(header_style="bold")
    for column in ("folder", "format", "layers", "size", "bits per weight", "proved against the source", "seconds"):
        table.add_column(column)
    for to in ("awq", "gptq"):
        start = time.perf_counter()
        result = convert(SOURCE, OUT / to, to, base_model=BASE)
        took = time.perf_counter() - start
        verdict = verify(SOURCE, OUT / to)  # once more, from the two folders alone
        assert verdict.same, verdict
        written = inspect(OUT / to)
        row = written.schemes[0]
        proved = "codes and zero points equal\n"
        proved += f"scales float32 -> float16, error <= {verdict.bound:.1e}" if verdict.rounded else "scales bit for bit"
        size, bits = _mb(written.bytes), f"{row.bits_per_weight:.2f}"
        table.add_row(f"demo/{to}", result.plan.target_name, str(row.layers), size, bits, proved, f"{took:.2f}")
    verdict = verify(OUT / "awq", OUT / "gptq")
    assert verdict.same
    assert not verdict.rounded
    console.print(table)
    console.print(f"demo/awq and demo/gptq hold the same weights, bit for bit: fingerprint {verdict.left.digest}")
    console.print("Each folder has config, quantization config, model card and certificate, and loads as it is. Try:")
    console.print("    .venv/bin/weighbridge inspect demo/awq")
    console.print("    .venv/bin/weighbridge verify demo/awq demo/gptq")


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


if __name__ == "__main__":
    main()
