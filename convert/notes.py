"""What a user should know of a plan beside its steps, losses and refusals."""

from __future__ import annotations

from formats import Checkpoint
from formats.checkpoint import Location, modules_in_every_block
from formats.spec import FormatSpec, ModelFacts, Variant

from .fitting import Ledger
from .records import model_config


def notes_of(
    checkpoint: Checkpoint, spec: FormatSpec, variant: Variant, base: Location | None, model: ModelFacts, ledger: Ledger
) -> list[str]:
    """Sentences about files, configs and readers."""
    found: list[str] = []
    if exempt := sum(file.exempt for file in checkpoint.tensors.files):
        found.append(
            f"--max-memory does not bind what torch does with .bin files from before 1.6: up to {exempt / 1e9:.2f} GB more may be held; "
            "save them as safetensors first if that is too much"
        )
    if ledger.odd:
        found.append(
            f"{len(ledger.odd)} linears differ from those with which engines fuse them, in the source too (first: {ledger.odd[0]}): "
            f"`weighbridge check` says which engines take that"
        )
    if ledger.both:
        found.append(
            f"{len(ledger.both)} layers quantize inputs by a scale in one phase and at run time in another (first: {ledger.both[0]}): "
            f"{spec.name} has one way for both, and gets the scale"
        )
    config = model_config(checkpoint, base)
    if config is None:
        found.append("no config.json beside the source: the weights will be written without one; pass --base-model for a folder that loads")
    elif (
        spec.sidecars is None
        and model.model_dtype is not None
        and config.get("torch_dtype", config.get("dtype")) not in (None, model.model_dtype)
    ):
        was = config.get("torch_dtype", config.get("dtype"))
        found.append(
            f"config.json will say torch_dtype {model.model_dtype} instead of {was}: the dtype of the scales, in which kernels compute"
        )
    if spec.name == "gptq" and model.float_linears and not ledger.refusals:
        alike = modules_in_every_block([layer.name for layer in model.layers], model.float_linears)
        readers = "AutoGPTQ does not" if alike else "transformers and AutoGPTQ do not, since blocks differ"
        found.append(f"{len(model.float_linears)} linears stay in float: GPTQModel and vLLM read this; {readers}")
    if spec.name == "gptq" and model.layers and not all(layer.scheme.weights.symmetric for layer in model.layers) and not ledger.refusals:
        readers = "GPTQModel and transformers" if variant.name == "v2" else "AutoGPTQ and transformers (GPTQModel: with --to gptq:v2)"
        found.append(f"some layers have zero points: vLLM and SGLang read only symmetric GPTQ; {readers} read this")
    if spec.name == "compressed-tensors" and any(layer.scheme.weights.actorder == "group" for layer in model.layers):
        found.append("act order by groups (g_idx): compressed-tensors up to 0.18 reads this; vLLM and newer versions do not")
    return found
