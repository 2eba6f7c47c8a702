"""Calibrating one decoder layer at a time, beside the whole model in memory: seconds and peak memory, by the model's depth. One table.

    python scripts/bench_layers.py [--layers 4 8] [--samples 8] [--folder DIR]

Both make W8A8 with m4 smoothing of the same samples, and the same bytes. ``weighbridge quantize`` goes layer by layer; ``AntiOutlier``
and ``Calibrator`` work on the caller's model, as msModelSlim's do. The source is ``bench_quantize``'s: Qwen2-7B's shapes in bfloat16.
A row is a whole process in the environment ``quantize`` of ``make oracles``, and ends with msModelSlim's folder; "over" is what it takes
over a process that imports what it imports.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from bench import machine, run, show
from bench_quantize import VOCABULARY, write_float
from bench_searched import own
from safetensors.numpy import save_file

WINDOW = 128
COLUMNS = ["", "seconds", "CPU seconds", "peak anonymous MiB", "over"]
SAMPLES = "import sys\nfrom safetensors.torch import load_file\nsamples = [[one[None]] for one in load_file(sys.argv[3])['all']]\n"
LAYERED = f"""
{SAMPLES}
from quantize.recipe import loads
from quantize.run import quantize_model
recipe = loads("{{quant: {{mm_tensor: false}}, anti_outlier: {{anti_method: m4}}}}")
quantize_model(sys.argv[1], sys.argv[2], recipe, "msmodelslim", calib=samples)
"""
WHOLE = f"""
{SAMPLES}
from pathlib import Path
from quantize import AntiOutlier, AntiOutlierConfig, Calibrator, QuantConfig
from quantize.models import load_model
model = load_model(Path(sys.argv[1]))
AntiOutlier(model, samples, AntiOutlierConfig(anti_method="m4")).process()
calibrator = Calibrator(model, QuantConfig(mm_tensor=False), samples)
calibrator.run()
calibrator.save(sys.argv[2], save_type="safe_tensor")
"""
IMPORTS = "import numba, transformers, accelerate, safetensors.torch\nimport quantize.run, quantize.calibrator, convert.engine"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8], help="depths of Qwen2-7B's shapes (0.47 GB a layer)")
    parser.add_argument("--samples", type=int, default=8, help=f"of {WINDOW} tokens")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: a folder beside the current one")
    options = parser.parse_args()
    print(machine())
    *_, idle = run([*own(), IMPORTS])
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder or Path.cwd()) as name:
        source, target, samples = Path(name) / "float", Path(name) / "out", Path(name) / "samples.safetensors"
        save_file({"all": np.random.default_rng(0).integers(0, VOCABULARY, (options.samples, WINDOW))}, samples)
        for layers in options.layers:
            size = write_float(source, layers)
            for how, code in (("one layer at a time", LAYERED), ("the whole model", WHOLE)):
                wall, cpu, peak = run([*own(), code, str(source), str(target), str(samples)])
                rows.append(
                    [f"{layers} layers ({size / 1e9:.1f} GB), {how}", f"{wall:.0f}", f"{cpu:.0f}", f"{peak:,.0f}", f"{peak - idle:,.0f}"]
                )
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
                shutil.rmtree(target)
            shutil.rmtree(source)
    show(f"W8A8 with m4 of Qwen2-7B's shapes, {options.samples} samples of {WINDOW} tokens", COLUMNS, rows)


if __name__ == "__main__":
    main()
