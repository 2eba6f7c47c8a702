"""``ms_to_vllm``: msModelSlim's example script of that name, with its flags and without its defects.

One file out (``--save_path``), as the script wrote it: the source's scale dtypes, ``[1, N]`` scales for per-channel layers,
every group size as it is; with ``g_idx`` for GPTQ and ``format: pt``. What the script got wrong is read right (packed
AscendV1 input, tensors that the description lacks, AntiOutlier's norm tensors) or refused by name. ``--output_dir`` writes a
whole folder instead, as ``weighbridge convert`` does.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import typer

from formats import find_format, open_checkpoint
from formats.errors import DestinationError, RefusedError, UsageError

from .engine import Progress, Result, convert, run
from .options import Settings
from .planning import Planner
from .printing import echo_result
from .records import Plan
from .targets import Target
from .terminal import Failing, progress_bar

TOOLS = ("awq", "gptq", "compressed-tensors")
"""What --target_tool takes; the script knew the first two."""

app = typer.Typer(add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def plan_file(
    model: str | os.PathLike[str],
    description: str | os.PathLike[str],
    target_tool: str,
    w_bit: int | None,
    jobs: int | None = None,
) -> Plan:
    """The plan of a single file as the script writes it.

    w_bit   None: what the description says; more than it: codes in a wider carrier (exact); less: refused
    """
    if target_tool not in TOOLS:
        raise UsageError(f"--target_tool {target_tool}: wanted {', '.join(TOOLS)}")
    spec, variant, _ = find_format(target_tool)
    assert variant.holds is not None
    checkpoint = open_checkpoint(model, Path(description))
    if checkpoint.format != "msmodelslim":
        raise UsageError(f"--json {Path(description).name}: is not an msModelSlim description")
    # The script's file says nothing of groups: each layer keeps its own, and per-channel layers stay per channel.
    holds = replace(variant.holds, mixed_groups=True, fused_alike=False)
    hints = {
        "zero-point": "write a whole folder with --output_dir, which then is GPTQ v2",
        "allow": "use weighbridge convert, which takes --allow {code}",
    }
    settings = Settings(scale_dtype="keep", jobs=jobs, max_shard_size=1 << 62)
    target = Target(spec, replace(variant, holds=holds))
    return Planner(checkpoint, target, settings, bits=w_bit, hints=hints).plan(probe=True)


def ms_to_vllm(
    model: str | os.PathLike[str],
    json: str | os.PathLike[str],
    save_path: str | os.PathLike[str] = "./res.safetensors",
    w_bit: int | None = None,
    target_tool: str = "awq",
    *,
    base_model: str | os.PathLike[str] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Convert one msModelSlim weight file to AutoAWQ's, AutoGPTQ's or compressed-tensors' tensors: a file, or with ``output_dir`` a folder.

    raises  RefusedError (W8A8, 8 bits to AWQ, a zero point that GPTQ v1 cannot say, ...), UnreadableError, DestinationError
    """
    if output_dir is not None:
        _check_bits(model, json, w_bit)
        return convert(
            model, output_dir, target_tool, base_model=base_model, overwrite=overwrite, jobs=jobs, progress=progress, description=json
        )
    if base_model is not None:
        raise UsageError("--base_model: is for a whole folder; pass --output_dir too")
    target = Path(os.path.abspath(save_path))
    try:
        _check_target(target, overwrite, (Path(model), Path(json)))
        plan = plan_file(model, json, target_tool, w_bit, jobs)
        plan.raise_if_refused()
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.weighbridge-", dir=target.parent) as workshop:
            folder = Path(workshop) / "folder"
            result = run(plan, folder, progress=progress)
            os.replace(folder / plan.files[0].name, target)
    except OSError as error:
        raise DestinationError(f"{target}: cannot be written ({error.strerror or error}); nothing was left there") from None
    return replace(result, destination=target)


def _check_target(target: Path, overwrite: bool, sources: tuple[Path, ...]) -> None:
    """DestinationError if ``--save_path`` cannot be a new file."""
    if not target.parent.is_dir():
        raise DestinationError(f"{target.parent}: there is no such folder to write into; make it first")
    if target.is_dir():
        raise DestinationError(f"{target}: is a folder; --save_path names a file (--output_dir a folder)")
    if any(source.exists() and target.exists() and source.samefile(target) for source in sources):
        raise DestinationError(f"{target}: is the source itself, which is never written; choose another --save_path")
    if target.exists() and not overwrite:
        raise DestinationError(f"{target}: exists already; choose another --save_path, or pass --overwrite")


def _check_bits(model: str | os.PathLike[str], description: str | os.PathLike[str], w_bit: int | None) -> None:
    if w_bit is None:
        return
    checkpoint = open_checkpoint(model, Path(description))
    for name in checkpoint.layer_names:
        bits = checkpoint.layer(name).scheme.weights.bits
        if bits != w_bit:
            raise RefusedError(f"{name}: has {bits} bits, but --w_bit says {w_bit}; leave --w_bit out, or pass {bits}")


@app.command(cls=Failing)
def command(
    model: str = typer.Option(..., "--model", help="msModelSlim's weight file (.safetensors)."),
    json: str = typer.Option(..., "--json", help="Its description (.json)."),
    save_path: str = typer.Option("./res.safetensors", "--save_path", help="File to write, in a folder that exists."),
    w_bit: int | None = typer.Option(None, "--w_bit", help="Bits of the weights: 4 or 8. Default: what the description says."),
    target_tool: str = typer.Option("awq", "--target_tool", help="awq, gptq or compressed-tensors."),
    base_model: str | None = typer.Option(None, "--base_model", help="Float model's folder: config and tokenizer, for --output_dir."),
    output_dir: str | None = typer.Option(None, "--output_dir", help="Write a whole folder that loads as it is, instead of a file."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what is there, once the new one is whole."),
) -> None:
    """Convert msModelSlim weights to AutoAWQ, AutoGPTQ or (W8A8 too) compressed-tensors, and prove the result."""
    if w_bit not in {None, 4, 8}:
        raise UsageError(f"--w_bit {w_bit}: wanted 4 or 8")
    with progress_bar("converting", os.path.getsize(model) if os.path.isfile(model) else None) as progress:
        result = ms_to_vllm(
            model, json, save_path, w_bit, target_tool,
            base_model=base_model, output_dir=output_dir, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    echo_result(result)


def main() -> None:
    """Entry point of ``ms_to_vllm``."""
    app()
