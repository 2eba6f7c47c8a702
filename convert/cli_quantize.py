"""The commands that need the quantization core, which they import when they are called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import typer

from formats.errors import UsageError

from .cli_options import BASE_MODEL, DATA_TEMPLATE, DEVICE, DTYPE, JOBS, JSON, MEMORY, SCALE_DTYPE, SHARD, TO, WORK_DIR
from .memory import give_back_at_once
from .printing import TrialRows, print_analysis, print_evaluation, print_quantized, print_scores, print_tasks, print_tuned
from .terminal import parse_size, print_json


@contextlib.contextmanager
def core() -> Iterator[None]:
    """Around imports of the quantization core: what is not installed is a UsageError."""
    give_back_at_once()
    try:
        yield
    except ImportError as error:
        missing = (error.name or str(error)).partition(".")[0]
        raise UsageError(f"{missing} is not installed; pip install 'weighbridge[quantize]'") from error


def quantize(
    model: str = typer.Argument(..., help="The float model's folder, as transformers loads it."),
    out: str = typer.Argument(..., help="The folder to write; it must not exist yet."),
    recipe: str = typer.Option(
        ...,
        "--recipe",
        metavar="NAME|FILE.yaml",
        help="w8a8, w8a8-dynamic, w8a8-kv8, w8a8-sparse, w8a16, w4a16-rtn, -gptq, -awq, gs-rtn-a16w8, gs-smooth-a8w8, gs-ptq, "
        "lmdeploy-awq, -awq-search, -awq-0.1, lmdeploy-rtn, or a file.",
    ),
    to: str = TO,
    device: str = DEVICE,
    calib: str | None = typer.Option(None, "--calib", metavar="FILE.jsonl", help="Calibration data: .jsonl, .json or plain text."),
    samples: int | None = typer.Option(None, "--samples", min=1, help="At most so many samples of it. Default: the recipe's."),
    plot: str | None = typer.Option(None, "--plot", metavar="FILE", help="Draw range_parm and weight error by layer: .png or .svg."),
    max_shard_size: str = SHARD,
    scale_dtype: str | None = SCALE_DTYPE,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing folder once the new one is whole."),
    resume: bool = typer.Option(False, "--resume", help="Fail if no interrupted run left its work; one that did is gone on with anyway."),
    jobs: int | None = JOBS,
    max_memory: str = MEMORY,
    json: bool = JSON,
) -> None:
    """Quantize a float model by a recipe, and write it in any format. What needs no data is streamed, without torch."""
    with core():
        from quantize.progress import blocks, shown
        from quantize.recipe import load
        from quantize.streamed import is_streamed, quantize_streamed

        found = load(recipe)
        streamed = device == "cpu" and is_streamed(found) and (calib is None or found.golden_stick is not None)
        if not streamed:
            from quantize.run import quantize_model

    options: dict[str, Any] = {
        "overwrite": overwrite,
        "resume": resume,
        "plot": plot,
        "max_shard_size": parse_size(max_shard_size),
        "scale_dtype": scale_dtype,
        "jobs": jobs,
        "max_memory": parse_size(max_memory),
    }
    with shown(quiet=json) as progress:
        if streamed:
            result = quantize_streamed(model, out, found, to, progress=progress, calib=calib, **options)
        else:
            result = quantize_model(model, out, found, to, device, calib, samples, progress=progress, **options)
    if json:
        print_json(result.to_json())
        return
    print_quantized(result, blocks(result.layers))


def evaluate(
    folder: str = typer.Argument(..., metavar="DIR", help="The model's folder, of any format, quantized or float."),
    data: str | None = typer.Option(
        None, "--data", metavar="FILE", help="A text (perplexity by windows), .jsonl or .json of texts, or of BoolQ's questions (accuracy)."
    ),
    against: str | None = typer.Option(None, "--against", metavar="DIR", help="The float model: its figures, KL divergence, agreement."),
    base_model: str | None = BASE_MODEL,
    samples: int | None = typer.Option(None, "--samples", min=1, help="At most so many windows, texts or questions. Default: all."),
    length: int | None = typer.Option(None, "--length", min=2, help="Tokens of a window; of a text or question at most. Default: 2048."),
    template: str | None = DATA_TEMPLATE,
    device: str = DEVICE,
    dtype: str | None = DTYPE,
    work_dir: str | None = WORK_DIR,
    tasks: str | None = typer.Option(None, "--tasks", metavar="A,B", help="Tasks of lm-evaluation-harness instead of --data."),
    include_path: str | None = typer.Option(None, "--include-path", metavar="DIR", help="A folder with more tasks, as YAML files."),
    batch_size: int = typer.Option(1, "--batch-size", min=1, help="For --tasks."),
    json: bool = JSON,
) -> None:
    """How good is it, and how far from the float model? In the memory of one decoder layer, but with --tasks."""
    if (data is None) == (tasks is None):
        raise UsageError("name --data FILE or --tasks A,B, and not both")
    if tasks is not None:
        with core():
            from quantize.harness import evaluate_tasks

        names = [name for name in tasks.split(",") if name]
        found = evaluate_tasks(
            folder,
            names,
            against,
            base_model=base_model,
            include_path=include_path,
            samples=samples,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )
        if json:
            print_json(found.to_json())
        else:
            print_tasks(found)
        return
    with core():
        from quantize.evaluation import evaluate_model
        from quantize.progress import shown

    assert data is not None
    with shown(quiet=json) as progress:
        result = evaluate_model(
            folder,
            data,
            against,
            base_model=base_model,
            samples=samples,
            length=length,
            template=template,
            device=device,
            dtype=dtype,
            work_dir=work_dir,
            progress=progress,
        )
    if json:
        print_json(result.to_json())
    else:
        print_evaluation(result)


def analyze(
    model: str = typer.Argument(..., help="The float model's folder."),
    calib: str | None = typer.Option(None, "--calib", metavar="FILE", help="Calibration data. Without: errors of the weights alone."),
    recipe: str = typer.Option("w8a8", "--recipe", metavar="NAME|FILE.yaml", help="How it would be quantized."),
    samples: int | None = typer.Option(None, "--samples", min=1, help="At most so many samples. Default: the recipe's."),
    rank: str | None = typer.Option(None, "--rank", metavar="output|range|weight", help="What is worst. Default: output, if measured."),
    top: int = typer.Option(20, "--top", min=1, help="How many linears to list."),
    plot: str | None = typer.Option(None, "--plot", metavar="FILE", help="Draw the figures by decoder layer: .png or .svg."),
    device: str = DEVICE,
    dtype: str = typer.Option(
        "auto", "--dtype", metavar="auto|float32|float16|bfloat16", help="What to compute in. Default: the model's own."
    ),
    work_dir: str | None = WORK_DIR,
    json: bool = JSON,
) -> None:
    """Which linears would suffer from quantization, worst first: range_parm, errors of weights and outputs."""
    with core():
        from quantize.analyze import analyze_model
        from quantize.progress import shown

    with shown(quiet=json) as progress:
        result = analyze_model(
            model, recipe, calib, samples, rank=rank, device=device, dtype=dtype, plot=plot, work_dir=work_dir, progress=progress
        )
    if json:
        print_json(result.to_json())
    else:
        print_analysis(result, top)


def calibration(
    model: str = typer.Argument(..., help="The float model's folder."),
    data: list[str] = typer.Argument(..., help="The samples: .jsonl, .json or plain text; several files are scored together."),
    recipe: str = typer.Option("w8a8", "--recipe", metavar="NAME|FILE.yaml", help="How the model is quantized for it."),
    quantized: str | None = typer.Option(None, "--quantized", metavar="DIR", help="The quantized model, instead of --recipe."),
    calib: str | None = typer.Option(None, "--calib", metavar="FILE", help="The data to quantize by. Default: the samples themselves."),
    position: str = typer.Option(
        "all", "--position", metavar="all|last", help="Score all positions, or what is said after the last token."
    ),
    keep: int | None = typer.Option(None, "--keep", min=1, help="Choose so many samples that quantization moves least."),
    drop: int | None = typer.Option(None, "--drop", min=1, help="Choose all but so many that quantization moves most."),
    worst: int | None = typer.Option(None, "--worst", min=1, help="Choose so many that quantization moves most, the bad cases."),
    each: bool = typer.Option(False, "--each", help="So many of each file, for several domains."),
    out: str | None = typer.Option(None, "--out", metavar="FILE.jsonl", help="Write the chosen samples, as the sources' own lines."),
    extend: bool = typer.Option(False, "--extend", help="Write the lines of --calib before them."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace FILE.jsonl if it is there."),
    samples: int | None = typer.Option(None, "--samples", min=1, help="At most so many samples of each file."),
    template: str | None = DATA_TEMPLATE,
    top: int = typer.Option(5, "--top", min=1, help="How many to list from either end."),
    device: str = DEVICE,
    dtype: str | None = DTYPE,
    work_dir: str | None = WORK_DIR,
    json: bool = JSON,
) -> None:
    """Score samples by how much quantization moves the model's output, and choose calibration data by it."""
    with core():
        from quantize.progress import shown
        from quantize.scoring import Choice, score_samples

    choices = [Choice(how, count, each) for how, count in (("keep", keep), ("drop", drop), ("worst", worst)) if count is not None]
    if len(choices) > 1:
        raise UsageError("--keep, --drop and --worst exclude each other; name one")
    with shown(quiet=json) as progress:
        result = score_samples(
            model,
            data,
            recipe,
            quantized=quantized,
            calib=calib,
            position=position,
            choice=choices[0] if choices else None,
            out=out,
            extend=extend,
            overwrite=overwrite,
            samples=samples,
            template=template,
            device=device,
            dtype=dtype,
            work_dir=work_dir,
            progress=progress,
        )
    if json:
        print_json(result.to_json())
    else:
        print_scores(result, top)


def tune(
    model: str = typer.Argument(..., help="The float model's folder."),
    out: str = typer.Option("tuned.yaml", "--out", metavar="FILE.yaml", help="The recipe to write, for `weighbridge quantize --recipe`."),
    target: float = typer.Option(0.99, "--target", help="What to reach: a share of the float model's figure."),
    calib: str = typer.Option(..., "--calib", metavar="FILE", help="Calibration data: .jsonl, .json or plain text."),
    data: str = typer.Option(..., "--data", metavar="FILE", help="What to measure by: a text, texts, or BoolQ's questions."),
    recipe: str = typer.Option("w8a8", "--recipe", metavar="NAME|FILE.yaml", help="What to begin with."),
    budget: int = typer.Option(40, "--budget", min=1, help="Trials at most."),
    methods: str = typer.Option("none,m1,m2,m3,m4,m5,m6", "--methods", help="AntiOutlier methods to try."),
    samples: int | None = typer.Option(None, "--samples", min=1, help="Of the data to measure by. Default: all."),
    length: int | None = typer.Option(None, "--length", min=2, help="Tokens of a window, text or question at most. Default: 2048."),
    device: str = DEVICE,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the recipe's file if it is there."),
    json: bool = JSON,
) -> None:
    """Which smoothing, and which linears left in float, reach the target? Exit code 1 if nothing does; the best is written anyway."""
    with core():
        from quantize.tune import tune_model

    rows = TrialRows(quiet=json)
    names = [None if name in {"none", ""} else name for name in methods.split(",")]
    found = tune_model(
        model,
        out,
        target,
        calib=calib,
        data=data,
        recipe=recipe,
        budget=budget,
        methods=names,
        samples=samples,
        length=length,
        device=device,
        overwrite=overwrite,
        told=rows.told,
    )
    if json:
        print_json(found.to_json())
    else:
        print_tuned(found, out)
    if not found.reached:
        raise SystemExit(1)
