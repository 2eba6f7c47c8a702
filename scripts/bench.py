"""Conversions against ``cp`` plus fsync: one table, every row from the same run, medians.

    python scripts/bench.py [--layers 4] [--runs 5] [--folder DIR] [--hub] [--mindspore] [--lmdeploy] [--plan]

Each row is a whole process (interpreter, imports, kernels, fsync), run in turn with the others, so that a slow minute of the
machine falls on all of them. The source is read once before, so it is in the page cache if it fits. Peak memory is anonymous
memory (RssAnon), sampled; "over" is what it is over a bare interpreter. ``--plan`` adds the planning of a checkpoint of 160
shards and 190,000 tensors, headers only.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

import synthetic

sys.path.append(str(Path(__file__).parent.parent))

FIXTURE = Path(__file__).parent.parent / "fixtures" / "msmodelslim" / "w4a16_g128_sym_bf16"


def run(command: list[str]) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak anonymous MiB) of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
            time.sleep(0.003)

    sampler = threading.Thread(target=sample)
    sampler.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    done.set()
    sampler.join()
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()}")
    return wall, usage.ru_utime + usage.ru_stime, peak / 1024


def copy(source: Path, target: Path) -> list[str]:
    """``cp`` of a folder, every file made durable."""
    return ["sh", "-c", f"cp -r '{source}' '{target}' && find '{target}' -print0 | xargs -0 sync"]


TOOL = [sys.executable, "-m", "convert"]


def bench(folder: Path, layers: int, runs: int) -> list[list[str]]:
    """msModelSlim to awq and gptq, against a copy of the source."""
    source = folder / "source"
    synthetic.write(source, layers)
    routes = [(source, to) for to in ("awq", "gptq")]
    return against_copy(folder / "out", source, routes, runs)


def bench_hub(folder: Path, layers: int, runs: int) -> list[list[str]]:
    """awq and gptq to one another, to compressed-tensors and back to msModelSlim, each against a copy of its own source."""
    source = folder / "source"
    if not source.exists():
        synthetic.write(source, layers)
    table = []
    for origin, targets in (
        ("awq", ("compressed-tensors", "gptq", "msmodelslim:ascendv1")),
        ("gptq", ("compressed-tensors", "awq", "msmodelslim:ascendv1")),
    ):
        place = folder / origin
        subprocess.run([*TOOL, "convert", str(source), str(place), "--to", origin, "--no-proof"], check=True, stdout=subprocess.DEVNULL)
        rows = against_copy(folder / "out", place, [(place, to) for to in targets], runs, _others(origin, place, folder / "out"))
        table += [[f"{origin}: {row[0]}", *row[1:]] for row in rows]
        shutil.rmtree(place)
    return table


def bench_w8a8(folder: Path, layers: int, runs: int) -> list[list[str]]:
    """Static W8A8 from Ascend to compressed-tensors, against a copy of it."""
    source = folder / "w8a8"
    synthetic.write(source, layers, static=True)
    table = against_copy(folder / "out", source, [(source, "compressed-tensors")], runs)
    shutil.rmtree(source)
    return table


def bench_mindspore(folder: Path, layers: int, runs: int) -> list[list[str]]:
    """A .ckpt file written again, against a copy of it and against MindSpore's own load, where ``make oracles`` installed that."""
    from noxfile import cache_folder

    place = _converted(folder, layers, "mindspore")
    python = cache_folder() / "oracles" / "mindspore" / "bin" / "python"
    (file,) = (place / "rank_0").iterdir()
    code = "import os, sys; import mindspore; mindspore.load_checkpoint(sys.argv[1]); os.mkdir(sys.argv[2])"
    load = {"mindspore.load_checkpoint": [str(python), "-c", code, str(file), str(folder / "out")]} if python.exists() else {}
    table = against_copy(folder / "out", place / "rank_0", [(place / "rank_0", "mindspore")], runs, load)
    shutil.rmtree(place)
    return table


def bench_to_mindspore(folder: Path, layers: int, runs: int) -> list[list[str]]:
    """AWQ to MindSpore's .ckpt, whole and in two ranks, against a copy of it."""
    place, out = _converted(folder, layers, "awq"), folder / "out"
    ranks = {"convert to mindspore --tp 2, proved": [*TOOL, "convert", str(place), str(out), "--to", "mindspore", "--tp", "2"]}
    table = against_copy(out, place, [(place, "mindspore")], runs, ranks)
    shutil.rmtree(place)
    return table


def bench_lmdeploy(folder: Path, layers: int, runs: int) -> list[list[str]]:
    """Llama-2-7B's shapes to TurboMind's workspaces and back, of 4 bits and of float16, each against a copy of its own source."""
    awq, out = _converted(folder, layers, "awq", synthetic.LLAMA2_7B), folder / "out"
    ranks = {"convert to turbomind:0.1 --tp 2, proved": [*TOOL, "convert", str(awq), str(out), "--to", "turbomind:0.1", "--tp", "2"]}
    tables = {"awq": against_copy(out, awq, [(awq, to) for to in ("turbomind:0.1", "turbomind:0.6", "gptq")], runs, ranks)}
    for origin, to in (("turbomind:0.1", "awq"), ("turbomind:0.6", "awq"), ("dense", "turbomind:0.1"), ("turbomind:0.1", "dense")):
        source = awq if to == "awq" else _again(awq, "dense")
        place = source if origin == "dense" else _again(source, origin)
        tables[f"{origin}{', float16' if to == 'dense' else ''}"] = against_copy(out, place, [(place, to)], runs)
        for other in {source, place} - {awq}:
            shutil.rmtree(other)
    shutil.rmtree(awq)
    return [[f"{origin}: {row[0]}", *row[1:]] for origin, rows in tables.items() for row in rows]


def _converted(folder: Path, layers: int, to: str, shapes: synthetic.Shapes | None = None) -> Path:
    """The synthetic weights in another format. shapes: of a whole model, with embeddings; None: layers of Qwen2-7B alone."""
    source = folder / "source"
    synthetic.write(source, layers, embeddings=shapes is not None, shapes=shapes or synthetic.QWEN2_7B)
    place = _again(source, to)
    shutil.rmtree(source)
    return place


def _again(source: Path, to: str) -> Path:
    """A folder beside ``source`` with its weights in another format."""
    place = source.with_name(to.replace(":", "-"))
    subprocess.run([*TOOL, "convert", str(source), str(place), "--to", to, "--no-proof"], check=True, stdout=subprocess.DEVNULL)
    return place


def _others(origin: str, source: Path, target: Path) -> dict[str, list[str]]:
    """What another tool makes of the same folder: compressed-tensors' converter of AutoAWQ, where ``make oracles`` installed it."""
    from noxfile import cache_folder

    python = cache_folder() / "oracles" / "gptqmodel" / "bin" / "python"
    if origin != "awq" or not python.exists():
        return {}
    code = (
        "import sys; from compressed_tensors.entrypoints.convert import AutoAWQConverter, convert_checkpoint;"
        "convert_checkpoint(sys.argv[1], sys.argv[2], AutoAWQConverter.from_pretrained(sys.argv[1]), max_workers=2)"
    )
    return {"compressed-tensors' convert_checkpoint, to compressed-tensors": [str(python), "-c", code, str(source), str(target)]}


def against_copy(
    target: Path, source: Path, routes: list[tuple[Path, str]], runs: int, others: dict[str, list[str]] | None = None
) -> list[list[str]]:
    """A row for the copy of ``source``, two for every route, proved and not, and one for each of ``others``."""
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file() and not path.is_symlink())
    rows: dict[str, list[str]] = {"cp + fsync": copy(source, target)}
    for origin, to in routes:
        rows[f"convert to {to}, proved"] = [*TOOL, "convert", str(origin), str(target), "--to", to]
        rows[f"convert to {to}, --no-proof"] = [*TOOL, "convert", str(origin), str(target), "--to", to, "--no-proof"]
    rows |= others or {}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in rows}
    subprocess.run(["sh", "-c", f"find '{source}' -type f -exec cat {{}} + > /dev/null"], check=True)
    for number in range(runs + 1):
        for name, command in rows.items():
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            figures = run(command)
            if number:  # the first round warms caches of pages and of compiled kernels
                found[name].append(figures)
    shutil.rmtree(target, ignore_errors=True)
    bare = statistics.median(run([sys.executable, "-c", "import numpy"])[2] for _ in range(3))
    table = []
    for name, figures in found.items():
        walls = [wall for wall, *_ in figures]
        ratios = [wall / other[0] for wall, other in zip(walls, found["cp + fsync"], strict=True)]
        memory = max(peak for *_, peak in figures)
        table.append(
            [
                name,
                f"{statistics.median(walls):.2f} ({min(walls):.2f} to {max(walls):.2f})",
                f"{statistics.median(ratios):.2f}",
                f"{statistics.median(cpu for _, cpu, _ in figures):.2f}",
                f"{size / 1e9 / statistics.median(walls):.2f}",
                "" if name.startswith("cp") else f"{memory:.0f} ({memory - bare:.0f} over)",
            ]
        )
    return table


def tiny(folder: Path, runs: int) -> list[list[str]]:
    """Start-up: converting a fixture of 1.8 MB, whole process; and the bare interpreter beside it."""
    table = []
    target = folder / "tiny"
    command = [sys.executable, "-m", "convert", "convert", str(FIXTURE), str(target), "--to", "awq"]
    for name, argv in (("tiny conversion, 1.8 MB, proved", command), ("python -c 'import numpy'", [sys.executable, "-c", "import numpy"])):
        figures = []
        for _ in range(runs + 1):
            shutil.rmtree(target, ignore_errors=True)
            figures.append(run(argv))
        walls, cpus = [f[0] for f in figures[1:]], [f[1] for f in figures[1:]]
        table.append([name, f"{statistics.median(walls):.3f}", f"{statistics.median(cpus):.3f}", f"{max(f[2] for f in figures):.0f}"])
    return table


def plan(folder: Path) -> list[list[str]]:
    """Plan 160 shards and 190,000 tensors (sparse files): headers only, whole process."""
    source = folder / "many"
    code = (
        "import sys, time, resource; from convert import plan; start = time.perf_counter();"
        "p = plan(sys.argv[1], 'gptq', probe=False); took = time.perf_counter() - start;"
        "print(took, len(p.layers), len(p.checkpoint.tensors), len(p.files), p.target_bytes)"
    )
    synthetic_many(source)
    wall, cpu, memory = run([sys.executable, "-c", code, str(source)])
    inner = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True).stdout.split()
    return [
        [
            f"plan {inner[2]} tensors of 160 shards to gptq: {inner[1]} layers, {inner[3]} files",
            f"{wall:.2f}",
            f"{cpu:.2f}",
            f"{memory:.0f}",
        ]
    ]


def synthetic_many(folder: Path) -> None:
    """63,334 expert linears over 160 sparse shards: DeepSeek-like shapes, 190,002 tensors."""
    import json

    from formats.safetensors_file import index_json, lay_out

    if folder.exists():
        return
    folder.mkdir(parents=True)
    tensors, description = [], {"model_quant_type": "W8A16"}
    for number in range(63_334):
        layer, expert, part = number // 768, number // 3 % 256, ("gate_proj", "up_proj", "down_proj")[number % 3]
        name = f"model.layers.{layer}.mlp.experts.{expert}.{part}"
        shape = (7168, 2048) if part == "down_proj" else (2048, 7168)
        tensors += [
            (f"{name}.weight", "I8", shape),
            (f"{name}.weight_scale", "F32", (shape[0], 1)),
            (f"{name}.weight_offset", "F32", (shape[0], 1)),
        ]
        description |= {f"{name}.{leaf}": "W8A16" for leaf in ("weight", "weight_scale", "weight_offset")}
    total = sum(shape[0] * shape[1] for _, _, shape in tensors)
    files = lay_out(tensors, total // 158, stem="quant_model_weight_w8a16")
    for file in files:
        with (folder / file.name).open("wb") as handle:
            handle.write(file.header)
            handle.truncate(file.size)
    (folder / "quant_model_weight_w8a16.safetensors.index.json").write_text(index_json(files))
    (folder / "quant_model_description_w8a16.json").write_text(json.dumps(description))


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), platform.machine()
    )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("numpy", "numba", "xxhash"))
    cores = len(os.sched_getaffinity(0))
    date = datetime.datetime.now(datetime.timezone.utc).date()
    return f"{model}, {cores} cores, Linux {platform.release()}, Python {platform.python_version()}, {versions}; {date}"


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of Qwen2-7B's shapes (0.25 GB each)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: a folder beside the current one")
    parser.add_argument("--hub", action="store_true", help="also convert between awq, gptq and back to msModelSlim")
    parser.add_argument(
        "--mindspore",
        action="store_true",
        help="only MindSpore: as many layers (0.12 GB each) rewritten, and from AWQ",
    )
    parser.add_argument(
        "--lmdeploy",
        action="store_true",
        help="only TurboMind's workspaces: as many layers of Llama-2-7B's shapes (0.11 GB each) with embeddings, from AWQ and back",
    )
    parser.add_argument("--plan", action="store_true", help="also plan 190,000 tensors")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder or Path.cwd()) as name:
        folder = Path(name)
        print(machine())
        size = f"{options.layers} layers of Qwen2-7B's shapes, msModelSlim W4A16 group 128 (a byte a code, float32 scales)"
        columns = ["", "seconds, median (min to max)", "x cp + fsync", "CPU seconds", "GB/s of source", "peak anonymous MiB"]
        if options.mindspore:
            title = f"A .ckpt file of {options.layers} layers of Qwen2-7B's shapes, 4 bits per group of 128, written again"
            show(f"{title}; {options.runs} runs", columns, bench_mindspore(folder, options.layers, options.runs))
            title = f"The same weights as AutoAWQ's gemm, to MindSpore; {options.runs} runs"
            show(title, columns, bench_to_mindspore(folder, options.layers, options.runs))
            return
        if options.lmdeploy:
            title = f"{options.layers} layers of Llama-2-7B's shapes with embeddings, groups of 128, and LMDeploy's workspaces"
            show(f"{title}; {options.runs} runs", columns, bench_lmdeploy(folder, options.layers, options.runs))
            return
        show(f"{size}; {options.runs} runs", columns, bench(folder, options.layers, options.runs))
        if options.hub:
            show(f"The same weights from awq and gptq; {options.runs} runs", columns, bench_hub(folder, options.layers, options.runs))
        title = f"Static W8A8 of the same shapes to compressed-tensors; {options.runs} runs"
        show(title, columns, bench_w8a8(folder, options.layers, options.runs))
        small = ["", "seconds", "CPU seconds", "peak anonymous MiB"]
        show("Start-up", small, tiny(folder, options.runs))
        if options.plan:
            show("Planning", small, plan(folder))


if __name__ == "__main__":
    main()
