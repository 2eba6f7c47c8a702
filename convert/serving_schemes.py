"""Schemes as ``serve-check`` needs them: what of a folder is quantized, and how the reference quantizes inputs likewise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from formats import Checkpoint
from formats.ir import Array, QuantizedLinear

from .serving_engines import Environment


def kind_of(checkpoint: Checkpoint) -> str:
    """What is quantized, as ``GATES`` has it; else names that no gate has."""
    kinds: Counter[str] = Counter()
    for name in checkpoint.layer_names:
        layer = checkpoint.layer(name)
        inputs, weights = layer.scheme.inputs, layer.scheme.weights
        if inputs is None:
            kinds["weights" if weights.element == "int" else weights.element] += 1
        elif inputs.element == weights.element == "int" and inputs.bits == 8:
            kinds["W4A8" if weights.bits == 4 else "dynamic int8" if inputs.dynamic else "static int8"] += 1
        elif inputs.element == weights.element == "e4m3" and simulated(layer):
            kinds["fp8"] += 1
        else:
            kinds[f"{inputs.element} inputs"] += 1
    if set(kinds) <= {"weights", "static int8", "dynamic int8"}:
        return next((kind for kind in ("dynamic int8", "static int8") if kinds[kind]), "weights")
    return ", ".join(sorted(kinds))


def default_dtype(engine: str, kind: str, environment: Environment) -> str:
    """The dtype in which the engine can be judged: float32 where inputs are quantized on a CPU, else float16."""
    if kind == "weights":
        return "float16"
    if engine == "vllm":
        return "float32" if environment.vllm_for_cpus else "auto"
    return "float16" if engine == "lmdeploy" else "float32"


def activations_of(source: Checkpoint, served: Checkpoint | None, static: bool = False) -> dict[str, dict[str, Any]]:
    """By module, how its inputs are quantized: what ``serve_engine.quantize_inputs`` takes.

    Where the source has static scales beside a mode that measures them (msModelSlim's W8A8_MIX), the served folder decides; without
    one, ``static`` does.
    """
    facts = {}
    theirs = set() if served is None else set(served.layer_names)
    for name in source.layer_names:
        layer = source.layer(name)
        if layer.scheme.inputs is None or not simulated(layer):
            continue
        args = layer.scheme.inputs
        both = args.dynamic and layer.input_scale is not None
        other = served.layer(name).scheme.inputs if served is not None and name in theirs else None
        dynamic = other.dynamic if both and other is not None else args.dynamic and not (both and static)
        fact: dict[str, Any] = {"element": args.element, "bits": args.bits, "dynamic": dynamic, "strategy": args.strategy}
        if dynamic:
            fact["symmetric"] = args.symmetric or both  # the zero point beside a mode that measures is the static one's
        else:
            fact |= {"symmetric": args.symmetric, "scale": _list(layer.input_scale), "zero_point": _list(layer.input_zero_point)}
        if layer.input_smooth is not None:
            fact["smooth"] = _list(layer.input_smooth)
        facts[name] = fact
    return facts


def simulated(layer: QuantizedLinear) -> bool:
    """Whether the reference quantizes the inputs of ``layer`` as its scheme says."""
    inputs = layer.scheme.inputs
    if inputs is None:
        return True
    known = inputs.element == "int" or (inputs.element == "e4m3" and inputs.symmetric)
    return known and (inputs.strategy in {"token", "tensor"} if inputs.dynamic else layer.input_scale is not None)


def _list(array: Array | None) -> list[float] | None:
    return None if array is None else [float(value) for value in np.asarray(array, dtype=np.float32).reshape(-1)]


def notes_about(engine: str, kind: str, opened: Checkpoint | None, original: Checkpoint, given: bool) -> Iterator[str]:
    """What a reader of the figures must know."""
    if opened is None:
        yield "Weighbridge does not read the folder's format, so what is quantized in it was taken from --against"
    if engine == "vllm" and opened is not None and opened.format == "gptq":
        yield "vLLM looks at neither the zero points nor g_idx of GPTQ: wrong ones would go unnoticed; transformers and gptqmodel use them"
    if engine == "vllm" and "W4A8" in kind:
        yield "vLLM's kernel for W4A8 rounds group scales to bfloat16 and finds zero points for the inputs, so there is no verdict"
    if engine == "transformers" and ("dynamic int8" in kind or "W4A8" in kind):
        yield "compressed-tensors measures int8 inputs as absmax / 127.5, where vLLM has absmax / 127; the reference follows the engine"
    if original.attention or (opened is not None and opened.attention):
        yield "the reference does not quantize the KV cache or attention, so there are figures and no verdict"
    if given and original.format == "dense" and opened is not None and opened.format != "dense":
        yield "--against is a float folder: if it is not the dequantized model, the figures are those of the quantization"
    if given and original.format != "dense" and kind_of(original) != kind:
        yield f"--against is quantized otherwise ({kind_of(original)}) than the folder ({kind}), which shows in the figures"
    unknown = [name for name in original.layer_names if not simulated(original.layer(name))]
    if unknown:
        yield f"the reference does not quantize the inputs of {len(unknown)} layers as they are: {unknown[0]}"
