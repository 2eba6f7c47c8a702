"""msModelSlim's tuning guide as a table: what each of its steps gains on one model, measured.

    python scripts/tuning_table.py MODEL --calib calibration.txt --data eval.txt [--outliers 11] [--json]

W8A8 with static activations per tensor and weights per channel throughout: no help; each AntiOutlier method; more calibration data;
down_proj in float; automatic fallback, alone and after smoothing; an int8 KV cache; and 4-bit weights by rounding, GPTQ and AWQ. With
``--outliers SEED`` of a copy of the model that computes the same and has strong outlier channels (``outliers.py``).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from outliers import copy_with_outliers

from formats import open_checkpoint
from quantize.blocks import Blocks
from quantize.calibration import calibration_data
from quantize.evaluation import ModelFigures, evaluate_model
from quantize.recipe import Recipe, loads
from quantize.run import quantize_model
from quantize.samples import read_data, tokenizer_of
from quantize.tune import Tuner

W8A8 = "quant: {w_bit: 8, a_bit: 8, mm_tensor: false}\n"
DOWN = W8A8 + 'mix_cfg: {"*.down_proj": float}\n'
FOUR = "w_bit: 4, a_bit: 16, is_lowbit: true, open_outlier: false, group_size: 128"
GPTQ = "gptq: {act_order: true, static_groups: true}\n"
METHODS = ("m1", "m2", "m3", "m4", "m5", "m6")


class Table:
    """Rows of (what, figures, seconds), told as they come."""

    def __init__(self, arguments: argparse.Namespace, model: Path) -> None:
        self.model, self.arguments = model, arguments
        source = open_checkpoint(model)
        self.blocks = Blocks.open(source)
        self.tokenizer = tokenizer_of(source.location)
        self.data = read_data(arguments.data, self.tokenizer, samples=arguments.windows, length=arguments.length)
        self.rows: list[dict[str, Any]] = []

    def samples(self, count: int) -> Any:
        """Windows of the calibration text."""
        return calibration_data(self.arguments.calib, self.tokenizer, samples=count, length=self.arguments.length)

    def tuner(self, recipe: Recipe, count: int) -> Tuner:
        """What makes trials of a recipe, calibrated on so many windows."""
        return Tuner(self.blocks, recipe, self.samples(count), self.data)

    def add(self, what: str, figures: ModelFigures, reference: ModelFigures, begun: float) -> None:
        """One more row."""
        assert figures.perplexity is not None
        assert reference.perplexity is not None
        row = {"what": what, **figures.to_json(), "share": reference.perplexity / figures.perplexity, "seconds": time.monotonic() - begun}
        self.rows.append(row)
        print(f"| {what} | {figures.perplexity:.2f} | {figures.top1:.4f} | {100 * row['share']:.1f} % |", file=sys.stderr, flush=True)


def fill(table: Table, few: int, many: int) -> None:
    """Every row."""
    plain = table.tuner(loads(W8A8), few)
    reference = plain.reference
    table.add("float", reference, reference, time.monotonic())

    def tried(what: str, tuner: Tuner, method: str | None = None, floats: Any = ()) -> None:
        begun = time.monotonic()
        table.add(what, tuner.trial(method, floats).figures, reference, begun)

    tried(f"W8A8, {few} samples, no help", plain)
    for method in METHODS:
        tried(f"+ AntiOutlier {method}", plain, method)
    more = table.tuner(loads(W8A8), many)
    tried(f"W8A8, {many} samples", more)
    for act in (2, 3):
        recipe = loads(W8A8.replace("mm_tensor", f"act_method: {act}, mm_tensor"))
        tried(f"+ act_method {act}", table.tuner(recipe, many))
    down = table.tuner(loads(DOWN), few)
    tried("W8A8, down_proj in float", down)
    layers = len(table.blocks)
    for count in (layers, 2 * layers):
        tried(f"W8A8, automatic fallback L{count}", plain, None, plain.linears(None)[:count])
    for method in ("m4", "m6"):
        tried(f"+ AntiOutlier {method}, automatic fallback L{layers}", plain, method, plain.linears(method)[:layers])
    folders(table, reference, few, many)


def folders(table: Table, reference: ModelFigures, few: int, many: int) -> None:
    """Rows that are measured on written folders."""
    kinds = {
        f"W8A8 + m4 with an int8 KV cache, {few} samples": (few, W8A8 + "anti_outlier: {anti_method: m4}\nkv_quant: {kv_sym: true}\n"),
        "W4A16 groups of 128, rounded to nearest": (few, f"quant: {{{FOUR}}}\n"),
        f"W4A16 groups of 128, GPTQ, {many} samples": (
            many,
            f"quant: {{{FOUR}, w_method: GPTQ}}\ngptq: {{act_order: true, static_groups: true}}\n",
        ),
        "W4A16 groups of 128 with zero points, rounded to nearest": (few, f"quant: {{{FOUR}, w_sym: false}}\n"),
        f"W4A16 groups of 128 with zero points, AWQ, {many} samples": (many, f"quant: {{{FOUR}, w_sym: false}}\nawq: {{}}\n"),
    }
    for number, (what, (count, text)) in enumerate(kinds.items()):
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / str(number)
            quantize_model(table.model, out, loads(text), "msmodelslim", calib=table.samples(count))
            found = evaluate_model(
                out, table.arguments.data, base_model=table.model, samples=table.arguments.windows, length=table.arguments.length,
                dtype="auto",
            )  # fmt: skip
        table.add(what, found.model, reference, begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True, help="Text to calibrate by.")
    parser.add_argument("--data", type=Path, required=True, help="Text to measure by, which was not trained on.")
    parser.add_argument("--outliers", type=int, metavar="SEED")
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--few", type=int, default=8)
    parser.add_argument("--many", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as place:
        model = arguments.model
        if arguments.outliers is not None:
            model = Path(place) / model.name
            copy_with_outliers(arguments.model, model, arguments.outliers)
        table = Table(arguments, model)
        fill(table, arguments.few, arguments.many)
    if arguments.json:
        print(json.dumps(table.rows, indent=2))
        return
    print("|  | perplexity | top-1 | of float |\n| --- | --- | --- | --- |")
    for row in table.rows:
        print(f"| {row['what']} | {row['perplexity']:.2f} | {row['top1']:.4f} | {100 * row['share']:.1f} % |")


if __name__ == "__main__":
    main()
