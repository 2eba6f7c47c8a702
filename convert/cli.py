"""The command line: parses, calls the library function of the same name, prints. Nothing is decided here."""

from __future__ import annotations

from typing import Any

import typer

from formats import FORMATS
from formats.errors import NotSameError, RefusedError

from .cli_lmdeploy import lmdeploy, memory
from .cli_options import (
    ALLOW,
    BASE_MODEL,
    CONSUMER,
    GPTQ_ZEROS,
    JOBS,
    JSON,
    MEMORY,
    MODEL_NAME,
    QKV_CONCAT,
    SCALE_DTYPE,
    SERVE_DTYPE,
    SHARD,
    STRICT,
    TO,
    TP,
)
from .cli_quantize import analyze, calibration, evaluate, quantize, tune
from .printing import (
    echo_result,
    print_ailments,
    print_check,
    print_formats,
    print_plan,
    print_report,
    print_serving,
    print_verdict,
)
from .terminal import Failing, echo, gigabytes, parse_size, print_json, progress_bar

app = typer.Typer(
    name="weighbridge",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Carry quantized LLM weights between formats, and prove that nothing was lost.\n\n"
    "Exit codes: 0 done; 1 failed; 2 usage; 3 refused (the target cannot hold it, or a loss was not allowed); "
    "4 not the same; 5 unreadable or unsafe input.",
)


@app.command(cls=Failing)
def formats(json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """The formats and variants, and what each can hold."""
    rows = []
    for spec in FORMATS:
        for variant in spec.variants:
            holds = variant.holds
            row = {
                "format": f"{spec.name}:{variant.name}",
                "read": True,
                "write": holds is not None,
                "about": f"{spec.about}; {variant.about}",
            }
            if holds is not None:
                row["holds"] = {
                    "bits": list(holds.bits),
                    "strategies": list(holds.strategies),
                    "group_sizes": list(holds.group_sizes),
                    "smallest_zero_point": holds.smallest_zero,
                    "act_order": list(holds.act_order),
                    "scale_dtypes": list(holds.scale_dtypes),
                    "multiple_of": list(holds.multiple_of),
                }
            rows.append({**row, "readers": variant.readers, "tool": spec.tool})
    if json:
        print_json(rows)
        return
    print_formats(rows)


@app.command(cls=Failing)
def inspect(
    path: str = typer.Argument(..., help="A checkpoint's folder, or one of its files."),
    layers: bool = typer.Option(False, "--layers", help="List every layer."),
    gptq_zeros: str | None = GPTQ_ZEROS,
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Format, schemes by layer, sizes, bits per weight, what looks wrong."""
    from .inspection import inspect as function

    report = function(path, gptq_zeros=gptq_zeros)
    if json:
        print_json(report.to_json())
        return
    print_report(report, layers)


@app.command(cls=Failing)
def plan(
    src: str = typer.Argument(..., help="The checkpoint to convert."),
    to: str = TO,
    base_model: str | None = BASE_MODEL,
    allow: list[str] = ALLOW,
    strict: bool = STRICT,
    scale_dtype: str | None = SCALE_DTYPE,
    serve_dtype: str | None = SERVE_DTYPE,
    qkv_concat: bool = QKV_CONCAT,
    tp: int = TP,
    model_name: str | None = MODEL_NAME,
    consumer: str | None = CONSUMER,
    gptq_zeros: str | None = GPTQ_ZEROS,
    max_shard_size: str = SHARD,
    jobs: int | None = JOBS,
    max_memory: str = MEMORY,
    json: bool = JSON,
) -> None:
    """Steps, losses, refusals, output files, bytes, peak memory; writes nothing."""
    from .checking import consumers_of
    from .planning import plan as function

    decided = function(
        src,
        to,
        base_model=base_model,
        allow=allow,
        strict=strict,
        scale_dtype=scale_dtype,
        max_shard_size=parse_size(max_shard_size),
        serve_dtype=serve_dtype,
        qkv_concat=qkv_concat,
        tp=tp,
        model_name=model_name,
        consumer=consumer,
        gptq_zeros=gptq_zeros,
        jobs=jobs,
        max_memory=parse_size(max_memory),
    )
    consumers = {} if decided.refusals else consumers_of(decided)
    if json:
        print_json({**decided.to_json(), "consumers": consumers})
    else:
        print_plan(decided, consumers)
    if decided.refusals:
        raise SystemExit(RefusedError.exit_code)


@app.command(cls=Failing)
def convert(
    src: str = typer.Argument(..., help="The checkpoint to convert."),
    dst: str = typer.Argument(..., help="The folder to write; it must not exist yet."),
    to: str = TO,
    base_model: str | None = BASE_MODEL,
    allow: list[str] = ALLOW,
    strict: bool = STRICT,
    scale_dtype: str | None = SCALE_DTYPE,
    serve_dtype: str | None = SERVE_DTYPE,
    qkv_concat: bool = QKV_CONCAT,
    tp: int = TP,
    model_name: str | None = MODEL_NAME,
    consumer: str | None = CONSUMER,
    gptq_zeros: str | None = GPTQ_ZEROS,
    max_shard_size: str = SHARD,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing folder once the new one is whole."),
    jobs: int | None = JOBS,
    max_memory: str = MEMORY,
    proof: bool = typer.Option(True, "--proof/--no-proof", help="Read everything back and compare it with the source."),
    json: bool = JSON,
) -> None:
    """Convert a checkpoint, and prove the result against the source."""
    from .engine import run
    from .planning import plan as make_plan

    decided = make_plan(
        src,
        to,
        base_model=base_model,
        allow=allow,
        strict=strict,
        scale_dtype=scale_dtype,
        max_shard_size=parse_size(max_shard_size),
        serve_dtype=serve_dtype,
        qkv_concat=qkv_concat,
        tp=tp,
        model_name=model_name,
        consumer=consumer,
        gptq_zeros=gptq_zeros,
        jobs=jobs,
        max_memory=parse_size(max_memory),
    )
    decided.raise_if_refused()
    with progress_bar("converting", decided.source_bytes, quiet=json) as progress:
        result = run(decided, dst, overwrite=overwrite, proof=proof, progress=progress)
    if json:
        print_json(result.to_json())
    else:
        echo_result(result)


@app.command(cls=Failing)
def verify(
    a: str = typer.Argument(..., help="One checkpoint."),
    b: str = typer.Argument(..., help="The other."),
    gptq_zeros: str | None = GPTQ_ZEROS,
    jobs: int | None = JOBS,
    max_memory: str = MEMORY,
    json: bool = JSON,
) -> None:
    """Are these the same weights? From the two folders alone."""
    from .verification import opened_pair
    from .verification import verify as function

    left, right = opened_pair(a, b, gptq_zeros)
    total = left.tensors.nbytes
    with progress_bar("verifying", total, quiet=json) as progress:
        verdict = function(left, right, jobs=jobs, max_memory=parse_size(max_memory), progress=progress)
    if json:
        print_json(verdict.to_json())
    else:
        print_verdict(verdict, a, b)
    if not verdict.same:
        raise SystemExit(NotSameError.exit_code)


@app.command(cls=Failing)
def fingerprint(
    path: str = typer.Argument(..., help="A checkpoint's folder, or one of its files."),
    tensors: bool = typer.Option(False, "--tensors", help="Also print the digest of every tensor."),
    gptq_zeros: str | None = GPTQ_ZEROS,
    jobs: int | None = JOBS,
    max_memory: str = MEMORY,
    json: bool = JSON,
) -> None:
    """The digest of the weights: the same in every format that holds the same weights."""
    from .verification import fingerprint as function

    found = function(path, jobs=jobs, max_memory=parse_size(max_memory), gptq_zeros=gptq_zeros)
    if json:
        content: dict[str, Any] = {"fingerprint": found.digest, "weights": found.weights, "rest": found.rest}
        print_json({**content, "tensors": {name: digest for name, (_, digest) in sorted(found.tensors.items())}})
        return
    echo(f"{found.digest}  {path}")
    if tensors:
        for name, (shape, digest) in sorted(found.tensors.items()):
            echo(f"{digest}  {name} {list(shape)}")


@app.command(cls=Failing)
def clean(
    folder: str = typer.Argument(".", help="The folder that destinations lie in."),
    list_only: bool = typer.Option(False, "--list", help="Only list them."),
    json: bool = JSON,
) -> None:
    """Remove what interrupted conversions left beside their destinations; running ones are left alone."""
    from dataclasses import asdict

    from .staging import clean as function

    found = function(folder, list_only=list_only)
    if json:
        print_json([asdict(item) for item in found])
        return
    for item in found:
        what = "running, left alone" if item.running else "unfinished" if list_only else "removed"
        echo(f"{item.destination}: {what}, {gigabytes(item.bytes)} in {item.path}")
    if not found:
        echo(f"{folder}: nothing unfinished")


@app.command(cls=Failing)
def check(
    path: str = typer.Argument(..., help="A checkpoint's folder."),
    consumer: str = typer.Option(
        ...,
        "--for",
        metavar="CONSUMER",
        help="transformers, autoawq, autogptq, gptqmodel, vllm, sglang, lmdeploy, vllm-ascend, mindie, mindformers, mindformers-1.6, "
        "mindformers-2.",
    ),
    tp: int = typer.Option(1, "--tp", min=1, help="Ranks of tensor parallelism."),
    json: bool = JSON,
) -> None:
    """Will this consumer load it? What is unmet, and what mends it; exit code 3 if anything is."""
    from .checking import check as function

    report = function(path, consumer, tp=tp)
    if json:
        print_json(report.to_json())
    else:
        print_check(report, tp)
    if not report.ok:
        raise SystemExit(RefusedError.exit_code)


@app.command(cls=Failing)
def doctor(
    path: str = typer.Argument(..., help="A checkpoint's folder, ill or not."),
    fix: str | None = typer.Option(None, "--fix", metavar="OUT", help="Write a folder with what can be mended without loss."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing folder once the new one is whole."),
    json: bool = JSON,
) -> None:
    """What is wrong with an AWQ or GPTQ folder, and a mended copy; exit code 1 if anything is (still) wrong."""
    from .mending import doctor as function

    found = function(path, fix, overwrite=overwrite)
    if json:
        print_json(found.to_json())
    else:
        print_ailments(found, path)
    if not found.healthy:
        raise SystemExit(1)


@app.command("serve-check", cls=Failing)
def serve_check(
    path: str = typer.Argument(..., metavar="DIR", help="The folder to load in an engine."),
    against: str | None = typer.Option(
        None, "--against", metavar="SRC", help="What it must equal once dequantized. Default: the folder itself."
    ),
    engine: str | None = typer.Option(
        None,
        "--engine",
        metavar="ENGINE",
        help="vllm, transformers, gptqmodel, lmdeploy, llama.cpp. Default: the first that reads the format.",
    ),
    python: str | None = typer.Option(
        None, "--python", metavar="ENV", help="The engine's environment, a folder or an interpreter. Default: this one, then python3."
    ),
    reference_python: str | None = typer.Option(
        None, "--reference-python", metavar="ENV", help="Where transformers and torch are. Default: the engine's environment."
    ),
    dtype: str | None = typer.Option(None, "--dtype", metavar="auto|float16|bfloat16|float32", help="Default: one that can be judged."),
    device: str = typer.Option("cpu", "--device", metavar="cpu|cuda", help="For transformers and gptqmodel."),
    prompts: str | None = typer.Option(None, "--prompts", metavar="FILE", help="A text or a JSON list of token ids on every line."),
    tokens: int = typer.Option(16, "--tokens", min=1, help="Tokens to generate after each prompt."),
    length: int = typer.Option(48, "--length", min=2, help="At most so many tokens of a prompt's text."),
    threads: int | None = typer.Option(None, "--threads", min=1, help="Default: the CPUs that may be used."),
    tp: int = typer.Option(1, "--tp", min=1, help="Ranks of tensor parallelism, in vllm and lmdeploy."),
    timeout: float = typer.Option(3600, "--timeout", min=1, help="Seconds for the engine, and again for the reference."),
    log: str | None = typer.Option(None, "--log", metavar="FILE", help="Keep all that the engine says."),
    verbose: bool = typer.Option(False, "--verbose", help="Print all that the engine says on stderr."),
    json: bool = JSON,
) -> None:
    """Load it in a real engine: are its log-probabilities and tokens the dequantized model's? Exit code 4 if not."""
    import signal
    import sys

    from .serving import serve_check as function

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)  # so that the engine is ended and the temporary folder removed
    report = function(
        path,
        against,
        engine=engine,
        python=python,
        reference_python=reference_python,
        dtype=dtype,
        device=device,
        prompts=prompts,
        tokens=tokens,
        length=length,
        threads=threads,
        tp=tp,
        timeout=timeout,
        log=log,
        output=(lambda line: echo(line, err=True)) if verbose else None,
        stage=(lambda line: echo(line, err=True)) if verbose or sys.stderr.isatty() else None,
    )
    if json:
        print_json(report.to_json())
    else:
        print_serving(report)
    if not report.ok:
        raise SystemExit(NotSameError.exit_code)


for command in (quantize, evaluate, analyze, tune, calibration, memory):
    app.command(cls=Failing)(command)
app.add_typer(lmdeploy, name="lmdeploy")


def main() -> None:
    """Entry point of ``weighbridge``."""
    app(prog_name="weighbridge")
