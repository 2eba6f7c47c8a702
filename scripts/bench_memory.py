"""Peak anonymous memory of whole conversions against ``--max-memory``: large, wide and many.

    python scripts/bench_memory.py [--gigabytes 30] [--folder DIR] [--limit 256MiB]

Sources are sparse files: every byte is 0, and what is read and written is as much as of any other. "over" is over a bare
interpreter; that is what the limit bounds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import TOOL, machine, run, show

from formats.safetensors_file import OutputFile, index_json, lay_out

Shape = tuple[int, int]


def write(folder: Path, linears: dict[str, Shape], bits: int, group: int | None, shard: int) -> int:
    """A sparse msModelSlim checkpoint of these linears; its bytes."""
    kind = f"W{bits}A16"
    folder.mkdir()
    tensors, description = [], {"model_quant_type": kind}
    for name, (out, in_) in linears.items():
        groups = 1 if group is None else in_ // group
        tensors += [(f"{name}.weight", "I8", (out, in_))]
        tensors += [(f"{name}.{part}", "F32", (out, groups)) for part in ("weight_scale", "weight_offset")]
        description |= {f"{name}.{part}": kind for part in ("weight", "weight_scale", "weight_offset")}
    files: list[OutputFile] = lay_out(tensors, shard, stem=f"quant_model_weight_{kind.lower()}")
    for file in files:
        with (folder / file.name).open("wb") as handle:
            handle.write(file.header)
            handle.truncate(file.size)
    if len(files) > 1:
        (folder / f"quant_model_weight_{kind.lower()}.safetensors.index.json").write_text(index_json(files))
    (folder / f"quant_model_description_{kind.lower()}.json").write_text(json.dumps(description))
    (folder / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    return sum(file.size for file in files)


def many(count: int) -> dict[str, Shape]:
    """Linears of experts, tiny ones."""
    parts = ("gate_proj", "up_proj", "down_proj")
    return {f"model.layers.{n // 768}.mlp.experts.{n // 3 % 256}.{parts[n % 3]}": (32, 32) for n in range(count)}


def large(size: int) -> dict[str, Shape]:
    """Linears of a dense model, about so many bytes of codes."""
    parts = ("gate_proj", "up_proj")
    return {f"model.layers.{n // 2}.mlp.{parts[n % 2]}": (18944, 3584) for n in range(size // (18944 * 3584 * 17 // 16))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=30)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--limit", default="256MiB")
    options = parser.parse_args()
    bare = run([sys.executable, "-c", "import time; time.sleep(0.2)"])[2]
    sources = {
        f"{options.gigabytes:.0f} GB in shards of 5 GB": (large(int(options.gigabytes * 1e9)), 4, 128, 5_000_000_000, "awq"),
        "one layer of 2 GB, [65536, 32768]": ({"model.layers.0.mlp.up_proj": (65536, 32768)}, 4, 128, 1 << 62, "awq"),
        "the same, to gptq": ({"model.layers.0.mlp.up_proj": (65536, 32768)}, 4, 128, 1 << 62, "gptq"),
        "190,002 tensors, 160 shards": (many(63_334), 8, None, 63_334 * 1280 // 159, "gptq"),
    }
    rows = []
    print(machine())
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder or Path.cwd()) as name:
        for title, (linears, bits, group, shard, to) in sources.items():
            source, target = Path(name) / "source", Path(name) / "out"
            size = write(source, linears, bits, group, shard)
            found = [title]
            for command in (
                [*TOOL, "convert", str(source), str(target), "--to", to, "--max-memory", options.limit],
                [*TOOL, "verify", str(source), str(target), "--max-memory", options.limit],
            ):
                wall, _, peak = run(command)
                found += [f"{wall:.1f}", f"{peak - bare:.0f}"]
            rows.append([found[0], f"{size / 1e9:.2f}", *found[1:]])
            shutil.rmtree(source)
            shutil.rmtree(target)
            subprocess.run(["sync"], check=True)
    columns = ["", "GB", "convert, seconds", "peak MiB over", "verify, seconds", "peak MiB over"]
    show(f"Anonymous memory under --max-memory {options.limit}", columns, rows)


if __name__ == "__main__":
    main()
