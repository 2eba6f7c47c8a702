"""Options that several commands have, said once."""

from __future__ import annotations

import typer

GPTQ_ZEROS = typer.Option(
    None,
    "--gptq-zeros",
    metavar="mask|plain|carry",
    help="How the top lane of GPTQ v1 zero points is read. Default: as its writer meant it.",
)
BASE_MODEL = typer.Option(None, "--base-model", help="Float model's folder: config.json, tokenizer. Default: beside the source.")
ALLOW = typer.Option([], "--allow", metavar="CODE", help="A loss that may happen (the plan names it); may be repeated.")
STRICT = typer.Option(False, "--strict", help="Refuse every loss, rounding of scales too.")
SCALE_DTYPE = typer.Option(None, "--scale-dtype", metavar="keep|float16|bfloat16|float32", help="Default: what the target's loaders want.")
SERVE_DTYPE = typer.Option(None, "--serve-dtype", metavar="float16|bfloat16", help="msmodelslim only: the dtype in which the NPU computes.")
CONSUMER = typer.Option(
    None,
    "--for",
    metavar="CONSUMER",
    help="What will load the folder (vllm, vllm-ascend, mindie, ...): its dialect; refuse what it would not load.",
)
SHARD = typer.Option("5GB", "--max-shard-size", help="Largest output file.")
JOBS = typer.Option(None, "--jobs", min=1, help="Worker threads. Default: the CPUs that may be used.")
MEMORY = typer.Option("256MiB", "--max-memory", help="Memory that may be used over the bare interpreter's; fewer threads run if little.")
JSON = typer.Option(False, "--json", help="Print JSON on stdout.")
TO = typer.Option(
    ...,
    "--to",
    metavar="FORMAT[:VARIANT]|CONSUMER",
    help="awq, gptq, gptq:v2, compressed-tensors, msmodelslim, turbomind, dense (`weighbridge formats` lists them); or what will load it: "
    "lmdeploy, vllm, vllm-ascend, ..., whose best format is written for it.",
)
DEVICE = typer.Option("cpu", "--device", metavar="npu:0|cuda|cpu", help="Where the model is run.")
DTYPE = typer.Option(
    None, "--dtype", metavar="auto|float32|float16|bfloat16", help="What to compute in. Default: float32 on a CPU, else the model's own."
)
WORK_DIR = typer.Option(
    None, "--work-dir", help="Where what does not fit in memory lies meanwhile. Default: the system's temporary folder."
)
DATA_TEMPLATE = typer.Option(
    None, "--template", help="How an object becomes a text: boolq, text, prompt, ... or keys in braces. Default: the one that fits."
)
TP = typer.Option(1, "--tp", min=1, help="turbomind only: ranks of tensor parallelism that the weights are split for.")
MODEL_NAME = typer.Option(
    None,
    "--model-name",
    metavar="TEMPLATE",
    help="turbomind only: LMDeploy's chat template. Default: one of the model's family, else base.",
)
QKV_CONCAT = typer.Option(False, "--qkv-concat", help="mindspore only: store q, k and v as one, and gate and up.")
TP = typer.Option(1, "--tp", min=1, help="mindspore only: ranks of tensor parallelism, a file for each.")
