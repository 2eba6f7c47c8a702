"""The commands that stand for LMDeploy's ``lite``, and the memory that a model takes to serve."""

from __future__ import annotations

import typer

from formats.errors import UsageError

from .cli_options import DEVICE, JSON
from .cli_quantize import core
from .terminal import Failing, echo, parse_size, print_json, print_table

lmdeploy = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="What LMDeploy's `lite` did for TurboMind's KV cache, as files that its engines read.",
)


@lmdeploy.command("calibrate", cls=Failing)
def calibrate(
    model: str = typer.Argument(..., help="The model's folder."),
    calib: str = typer.Option(
        ..., "--calib", metavar="FILE|NAME", help="Text: a .jsonl, .json or plain file; or c4, wikitext2, ptb, pileval from the hub."
    ),
    samples: int = typer.Option(128, "--samples", min=1, help="Windows of the text."),
    seqlen: int = typer.Option(2048, "--seqlen", min=1, help="Tokens of a window."),
    work_dir: str = typer.Option("./quant_output", "--work-dir", metavar="DIR", help="Where to write; made if it is not there."),
    device: str = DEVICE,
    json: bool = JSON,
) -> None:
    """Statistics of keys, values, and every linear's input and output, in float16, one decoder layer at a time."""
    with core():
        from quantize.lmdeploy_calibration import calibrate as function
        from quantize.progress import shown

    with shown(quiet=json) as progress:
        result = function(
            model,
            calib,
            samples=samples,
            seqlen=seqlen,
            work_dir=work_dir,
            device=device,
            progress=None if progress is None else lambda what, done, of: progress(what, done, of, None),
        )
    if json:
        print_json(result.to_json())
        return
    echo(f"{result.folder}: {result.layers} layers, {result.samples} samples of {result.length} tokens: {', '.join(result.files)}")
    for note in result.notes:
        echo(f"note: {note}")


@lmdeploy.command("kv-qparams", cls=Failing)
def kv_qparams(
    work_dir: str = typer.Option("./quant_output", "--work-dir", metavar="DIR", help="Where `lmdeploy calibrate` wrote."),
    turbomind_dir: str = typer.Option(..., "--turbomind-dir", metavar="DIR", help="The workspace's triton_models/weights."),
    kv_sym: bool = typer.Option(False, "--kv-sym", help="Scales without middles: two numbers a file, which no engine up to 0.3 can read."),
    num_tp: int = typer.Option(1, "--num-tp", min=1, help="Ranks of tensor parallelism, as the workspace has them."),
    json: bool = JSON,
) -> None:
    """Scales of an int8 KV cache, from the statistics of `lmdeploy calibrate`."""
    from .lmdeploy_kv import kv_qparams as function

    result = function(work_dir, turbomind_dir, kv_sym=kv_sym, num_tp=num_tp)
    if json:
        print_json(result.to_json())
        return
    for line in result.parameters:
        typer.echo(str(line))  # to the letter, tabs too
    for note in result.notes:
        echo(f"note: {note}", err=True)


@lmdeploy.command("quant-policy", cls=Failing)
def quant_policy(
    workspace: str = typer.Argument(..., help="A TurboMind workspace with a config.ini (LMDeploy up to 0.5)."),
    kv: str = typer.Option(..., "--kv", metavar="int8|int4|off", help="The KV cache's dtype."),
    engine: str = typer.Option("0.1", "--engine", metavar="VERSION", help="LMDeploy's version; 0.4 changed what the number means."),
    context_fmha: bool | None = typer.Option(
        None, "--context-fmha/--no-context-fmha", help="Flash attention; off for TurboMind 1 with an int8 cache. Default: as it is."
    ),
    json: bool = JSON,
) -> None:
    """Set quant_policy in a workspace's config.ini, for the engine that is to read it."""
    from .lmdeploy_config import quant_policy as function

    result = function(workspace, kv, engine=engine, use_context_fmha=context_fmha)
    if json:
        print_json(result.to_json())
        return
    for key, value in result.after.items():
        before = "not there" if result.before[key] is None else result.before[key]
        echo(f"{result.config}: {key} = {value} (was {before})")
    for note in result.notes:
        echo(f"note: {note}")


def memory(
    model_dir: str = typer.Argument(..., help="A model's folder, of any format, or one with config.json alone."),
    batch: str = typer.Option("1", "--batch", metavar="N,N,..", help="Sequences at a time."),
    context: int = typer.Option(2048, "--context", min=1, help="Tokens of a sequence."),
    kv: str = typer.Option("fp16", "--kv", metavar="fp16|int8|int4", help="The KV cache's dtype; several with commas."),
    weights: str | None = typer.Option(
        None, "--weights", metavar="fp16|w4", help="Of a float folder: as it is in 16 bits (default), or with 4-bit linears."
    ),
    engine: str | None = typer.Option(None, "--engine", metavar="VERSION", help="LMDeploy's. Default: 0.4 for int4, else 0.1."),
    overhead: str = typer.Option("147.5MiB", "--overhead", help="What the engine takes beside them; 1.7GiB: its whole process."),
    plot: str | None = typer.Option(None, "--plot", metavar="FILE", help="Draw it: .png or .svg."),
    json: bool = JSON,
) -> None:
    """The memory to serve a model: weights, KV cache and total, by batch and context."""
    from .footprint import inference_memory

    kvs, each = [one.strip() for one in kv.split(",")], parse_size(overhead)
    try:
        batches = [int(one) for one in batch.split(",")]
    except ValueError:
        raise UsageError(f"--batch {batch}: wanted whole numbers with commas, as 8,16,32") from None
    found = inference_memory(model_dir, batches, context, kv=kvs, weights=weights, engine=engine, overhead=each)
    if plot is not None:
        with core():
            from quantize.memory_plot import save
        save(found, plot)
    if json:
        print_json(found.to_json())
        return
    published, saved = any(use.published for use in found.uses), "fp16" in found.kvs and len(found.kvs) > 1
    columns = ["batch", "KV", "weights", "KV cache", "engine", "total"]
    columns += [*(["less than fp16"] if saved else []), *(["published"] if published else [])]
    rows = []
    for use in found.uses:
        row = [str(use.batch), use.kv, *(f"{part / (1 << 20):.0f}" for part in (use.weights, use.cache, use.rest, use.total))]
        if saved:
            row.append(f"{(found.of('fp16', use.batch).total - use.total) / (1 << 20):.0f}")
        rows.append([*row, *([f"{use.published:.0f}" if use.published else ""] if published else [])])
    print_table(f"{found.model.name}, {found.weights} weights, {context} tokens: MiB", columns, rows, right=(0, *range(2, len(columns))))
    for note in found.notes:
        echo(f"note: {note}")
