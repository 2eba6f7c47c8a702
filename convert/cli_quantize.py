"""The commands that need the quantization core, which they import when they are called."""

from __future__ import annotations

import typer

from formats.errors import UsageError

from .cli_options import JSON, SHARD, TO
from .printing import echo_result, print_quantized
from .terminal import parse_size, print_json, progress_bar


def quantize(
    model: str = typer.Argument(..., help="The float model's folder, as transformers loads it."),
    out: str = typer.Argument(..., help="The folder to write; it must not exist yet."),
    recipe: str = typer.Option(
        ..., "--recipe", metavar="NAME|FILE.yaml", help="w8a8, w8a8-dynamic, w8a8-kv8, w8a8-sparse, w8a16, w4a16-rtn, or a file."
    ),
    to: str = TO,
    device: str = typer.Option("cpu", "--device", metavar="npu:0|cuda|cpu", help="Where the model is calibrated."),
    calib: str | None = typer.Option(None, "--calib", metavar="FILE.jsonl", help="Calibration data: .jsonl, .json or plain text."),
    samples: int | None = typer.Option(None, "--samples", min=1, help="At most so many samples of it. Default: the recipe's."),
    plot: str | None = typer.Option(None, "--plot", metavar="FILE", help="Draw range_parm and weight error by layer: .png or .svg."),
    max_shard_size: str = SHARD,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing folder once the new one is whole."),
    resume: bool = typer.Option(False, "--resume", help="Fail if no interrupted run left its work; one that did is gone on with anyway."),
    json: bool = JSON,
) -> None:
    """Quantize a float model by a recipe, and write it in any format. What needs no data is streamed, without torch."""
    try:
        from quantize.recipe import load
        from quantize.streamed import round_folder, rounding_of

        rounding = rounding_of(load(recipe)) if calib is None and plot is None and device == "cpu" else None
        if rounding is not None:
            with progress_bar("quantizing", None, quiet=json) as bytes_done:
                how, floats, shard = *rounding, parse_size(max_shard_size)
                written = round_folder(model, out, how, to, patterns=floats, max_shard_size=shard, overwrite=overwrite, progress=bytes_done)
            if json:
                print_json(written.to_json())
            else:
                echo_result(written)
            return
        from quantize.progress import blocks, shown
        from quantize.run import quantize_model as function
    except ImportError as error:
        missing = (error.name or str(error)).partition(".")[0]
        raise UsageError(f"{missing} is not installed; pip install 'weighbridge[quantize]'") from error

    with shown(quiet=json) as progress:
        result = function(
            model,
            out,
            recipe,
            to,
            device,
            calib,
            samples,
            overwrite=overwrite,
            resume=resume,
            plot=plot,
            max_shard_size=parse_size(max_shard_size),
            progress=progress,
        )
    if json:
        print_json(result.to_json())
        return
    print_quantized(result, blocks(result.layers))
