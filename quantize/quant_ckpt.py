"""``quant_ckpt``: Golden Stick's example script of that name (``example/ptq/quant_ckpt.py``), with its flags, without MindSpore.

It takes a ``predict_*.yaml`` of MindFormers whose ``load_checkpoint`` names the float model, and writes what the script writes, where it
writes it: ``<output_dir>/<trainer.model_name>_<approach>_ckpt/rank_0/<approach>.ckpt``, of ``ptq`` with a name that says what was
quantized. The flags are those of the script of 0.6.0, and of 1.2.0's where that has more: one of those makes the file 1.2.0's, named as
that version names it. Beside the checkpoint lie a YAML that loads it and a certificate.

What the script got wrong is not kept: flags that contradict each other are refused, and so is a folder that is there already.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import typer

from convert.cli_quantize import core
from convert.printing import print_quantized
from convert.targets import find_target
from convert.terminal import Failing
from formats.errors import RefusedError, UsageError
from formats.mindspore_target import lay_out_model, yaml_of

APPROACHES = ("rtn-a16w8", "rtn-c8", "smooth_quant", "ptq")
DTYPES = {"int8": 8, "int4": 4, "none": 16}

app = typer.Typer(add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def settings_of(
    approach: str,
    weight: str,
    act: str,
    kvcache: str,
    suppression: str,
    recovery: str,
    granularities: tuple[str, str, str],
    group_size: int,
    blacklist: Sequence[str],
) -> dict[str, Any]:
    """The recipe's ``golden_stick`` section that the flags say. granularities: of inputs, weights and KV cache."""
    if approach not in APPROACHES:
        raise UsageError(f"-q {approach}: wanted {', '.join(APPROACHES)}")
    if approach == "rtn-a16w8":
        return {"approach": "rtn", "w_bit": 8, "modules_to_not_convert": ["lm_head"]}
    if approach == "rtn-c8":
        return {"approach": "rtn", "w_bit": 16, "kv_bit": 8, "modules_to_not_convert": []}
    if approach == "smooth_quant":
        return {
            "approach": "smooth_quant",
            "a_bit": 8,
            "outliers_suppression": "smooth",
            "modules_to_not_convert": ["lm_head", "w2"],
        }
    for flag, word, words in (
        ("-w", weight, ("int8", "int4", "none")),
        ("-a", act, ("int8", "none")),
        ("-k", kvcache, ("int8", "none")),
        ("-ag", granularities[0], ("per_tensor", "per_token")),
        ("-wg", granularities[1], ("per_channel", "per_group")),
        ("-kvg", granularities[2], ("per_channel", "per_token")),
    ):
        if word not in words:
            raise UsageError(f"{flag} {word}: wanted {', '.join(words)}")
    if granularities[2] == "per_token":
        raise RefusedError(
            "-kvg per_token: such a KV cache has no tensors in a checkpoint; its network measures it, with nothing to quantize"
        )
    if (granularities[1] == "per_group") != (group_size != 0):
        raise UsageError(f"-g {group_size}: goes with -wg per_group, which needs 64 or 128, and with nothing else")
    return {
        "approach": "ptq",
        "w_bit": DTYPES[weight],
        "a_bit": DTYPES[act],
        "kv_bit": DTYPES[kvcache],
        "is_dynamic": granularities[0] == "per_token",
        "group_size": group_size or -1,
        "w_sym": suppression != "awq",
        "outliers_suppression": suppression,
        "precision_recovery": recovery,
        "modules_to_not_convert": list(blacklist),
    }


def folder_name(model: str, approach: str, settings: dict[str, Any], version: str, dtype: str) -> str:
    """What the script of ``version`` calls the folder of its results."""
    start = f"{model}_" if model else ""
    if approach != "ptq":
        return f"{start}{approach}_ckpt" if version == "gs0.6" else f"{start}{approach}_{dtype}_ckpt"
    weight, act, cache = (settings[key] for key in ("w_bit", "a_bit", "kv_bit"))
    smooth = settings["outliers_suppression"]
    if version == "gs0.6":
        name = f"{start}ptq_{'smooth' if smooth == 'smooth' else 'no_smooth'}_a{act}w{weight}"
        return f"{name}{'c8' if cache == 8 else ''}_ckpt"
    parts = [f"{start}ptq_{dtype}", "no_smooth" if smooth == "none" else smooth]
    parts += ["gptq"] if settings["precision_recovery"] == "gptq" else []
    parts.append("a16" if act == 16 else "a8dyn_per_token" if settings["is_dynamic"] else "a8_per_tensor")
    parts.append("w16" if weight == 16 else f"w{weight}_{'per_channel' if settings['group_size'] == -1 else 'per_group'}")
    parts += ["c8_per_channel"] if cache == 8 else []
    return "_".join(parts) + "_ckpt"


@app.command(cls=Failing)
def command(
    config_path: str = typer.Option(
        ..., "--config_path", "-c", help="MindFormers' predict_*.yaml; its load_checkpoint names the float model."
    ),
    approach: str = typer.Option(..., "--approach", "-q", help="rtn-a16w8, rtn-c8, smooth_quant or ptq."),
    dataset_type: str | None = typer.Option(None, "--dataset_type", "-t", help="boolq. rtn-a16w8 needs no data."),
    dataset_path: str | None = typer.Option(None, "--dataset_path", "-s", help="BoolQ's dev.jsonl."),
    weight_quant_dtype: str = typer.Option("none", "--weight_quant_dtype", "-w", help="int8, int4 or none; of ptq, as all that follow."),
    act_quant_dtype: str = typer.Option("none", "--act_quant_dtype", "-a", help="int8 or none."),
    kvcache_quant_dtype: str = typer.Option("none", "--kvcache_quant_dtype", "-k", help="int8 or none."),
    outliers_suppression: str = typer.Option("none", "--outliers_suppression", "-o", help="smooth, awq or none."),
    precision_recovery: str = typer.Option("none", "--precision_recovery", "-p", help="gptq or none."),
    act_quant_granularity: str = typer.Option("per_tensor", "--act_quant_granularity", "-ag", help="per_tensor or per_token."),
    weight_quant_granularity: str = typer.Option("per_channel", "--weight_quant_granularity", "-wg", help="per_channel or per_group."),
    kvcache_quant_granularity: str = typer.Option("per_channel", "--kvcache_quant_granularity", "-kvg", help="per_channel."),
    group_size: int = typer.Option(0, "--group_size", "-g", help="64 or 128, with -wg per_group."),
    opname_blacklist: list[str] | None = typer.Option(None, "--opname_blacklist", "-b", help="Layers that stay in float: -b w2 lm_head."),
    debug_mode: str = typer.Option("False", "--debug_mode", "-e", hidden=True),
    dump_path: str = typer.Option("", "--dump_path", "-d", hidden=True),
    golden_stick: str | None = typer.Option(
        None, "--golden_stick", metavar="0.6|1.2", help="Whose file is written. Default: 0.6, and 1.2 for what only that can."
    ),
    samples: int | None = typer.Option(None, "--samples", min=1, help="At most so many questions. Default: the script's, 200 or 100."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what is there, once the new one is whole."),
) -> None:
    """Quantize the checkpoint of a MindFormers YAML by Golden Stick's algorithms, and prove the result."""
    if dump_path:
        raise RefusedError(f"-d {dump_path}: the tool's dumps of its steps are not written here; leave it out")
    granularities = (act_quant_granularity, weight_quant_granularity, kvcache_quant_granularity)
    settings = settings_of(
        approach, weight_quant_dtype, act_quant_dtype, kvcache_quant_dtype, outliers_suppression, precision_recovery,
        granularities, group_size, opname_blacklist or (),
    )  # fmt: skip
    newer = settings.get("w_bit") == 4 or settings.get("is_dynamic") or not settings.get("w_sym", True)
    newer = newer or settings.get("precision_recovery", "none") != "none" or settings.get("group_size", -1) != -1
    if golden_stick not in {None, "0.6", "1.2"} or (golden_stick == "0.6" and newer):
        what = "has no words for these flags" if golden_stick == "0.6" else "is not read here"
        raise UsageError(f"--golden_stick {golden_stick}: {what}; wanted {'1.2' if newer else '0.6 or 1.2'}")
    version = f"gs{golden_stick or ('1.2' if newer else '0.6')}"
    _run(config_path, approach, settings, version, dataset_type, dataset_path, samples, overwrite)


def _run(
    config_path: str,
    approach: str,
    settings: dict[str, Any],
    version: str,
    dataset_type: str | None,
    dataset_path: str | None,
    samples: int | None,
    overwrite: bool,
) -> None:
    with core():
        from .mindformers_model import open_model
        from .progress import blocks, shown
        from .recipe import recipe_of
        from .streamed import is_streamed, quantize_streamed

    recipe = recipe_of(f"quant_ckpt -q {approach}", settings, version)
    if recipe.needs_data:
        if dataset_path is None or dataset_type is None:
            raise UsageError(f"-q {approach}: needs calibration data; pass -t boolq -s dev.jsonl")
        if dataset_type != "boolq":
            raise RefusedError(f"-t {dataset_type}: is not read here; boolq is")
    model = open_model(config_path)
    out = model.output_dir / folder_name(model.name, approach, settings, version, model.compute_dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    asked = find_target(f"mindspore:{version}")
    spec = replace(asked.spec, lay_out=partial(_laid_out, approach), quantization_config=partial(_described, out.name))
    target = asked._replace(spec=spec)
    with shown(quiet=False) as progress:
        common: dict[str, Any] = {"overwrite": overwrite, "qkv_concat": model.qkv_concat, "progress": progress}
        if is_streamed(recipe):
            result = quantize_streamed(model.location, out, recipe, target, calib=dataset_path, **common)
        else:
            with core():
                from .golden_stick_run import quantize_golden_stick

            tokenizer = model.tokenizer() if dataset_path is not None else None
            result = quantize_golden_stick(
                model.location, out, recipe, target, calib=dataset_path, samples=samples, tokenizer=tokenizer, **common
            )
    print_quantized(result, blocks(result.layers))


def _laid_out(name: str, tensors: Any, model: Any, variant: str, shard: int) -> Any:
    return lay_out_model(tensors, model, variant, name)


def _described(folder: str, model: Any, variant: str) -> tuple[dict[str, Any], None]:
    """The YAML, named after the folder."""
    name = folder.removesuffix("_ckpt")
    content = next(iter(yaml_of(model, variant).values()), None)
    if content is None:
        return {}, None
    return {f"predict_{name}.yaml": {**content, "trainer": {**content["trainer"], "model_name": name}}}, None


def split_lists(arguments: Sequence[str]) -> list[str]:
    """``-b w2 lm_head``, as the script takes it, as ``-b w2 -b lm_head``."""
    found: list[str] = []
    flag = None
    for argument in arguments:
        if argument in {"-b", "--opname_blacklist"}:
            flag = argument
        elif argument.startswith("-") or flag is None:
            flag = None
            found.append(argument)
        else:
            found += [flag, argument]
    return found


def main() -> None:
    """Entry point of ``quant_ckpt``."""
    app(split_lists(sys.argv[1:]), prog_name="quant_ckpt")
