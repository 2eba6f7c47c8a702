"""LMDeploy's ``lite calibrate``: statistics of keys, values, and every linear's input and output, one decoder layer at a time.

The statistics are those of ``formats.lmdeploy_statistics``. As in the tool (0.1.0 to 0.18.0), the model computes in float16, each sample
goes through a layer by itself, and everything is float16:

1. A maximum, minimum or largest magnitude is of all tokens. Keys and values are watched as attention gets them: keys after rotary
   embedding, grouped heads not repeated.
2. A mean is the running mean of the samples' means, rounded after every sample: ``(mean * n + new) / (n + 1)``.
3. The last norm is observed once, with all samples together, so its mean is one.
4. Samples are of one length, since the tool makes one batch of them.

The tool holds the whole model and the whole batch's states; here there are the weights of one layer, and the states. What a model computes
in float16 depends on transformers, torch and the processor, in the last bits: with these alike, the numbers are the tool's bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from convert.replacing import replace_made
from formats import open_checkpoint
from formats.errors import DestinationError, UnreadableError, UsageError
from formats.lmdeploy_statistics import FILES, MOMENTS, RANGES, twin_tensors

from .attention import Attention, attention_modules, wrapped_attention
from .blocks import Blocks, States, advance
from .devices import HOST, resolve
from .lmdeploy_text import windows_of
from .samples import tokenizer_of
from .stage import Progress

__all__ = ["Calibrated", "Moments", "Observations", "Range", "calibrate", "observe"]

COLUMNS = 512
"""Channels of the last norm's output that are looked at together."""


@dataclass
class Range:
    """The extremes of keys or values by head and dimension, each [kv heads, head size] float16."""

    most: Tensor | None = None
    least: Tensor | None = None
    largest: Tensor | None = None

    def update(self, states: Tensor) -> None:
        """One call's states [batch, kv heads, tokens, head size]."""
        tokens = states.detach().transpose(1, 2).flatten(0, 1).half()
        most, least, largest = tokens.amax(0), tokens.amin(0), tokens.abs().amax(0)
        if self.most is not None and self.least is not None and self.largest is not None:
            most, least = torch.maximum(self.most, most), torch.minimum(self.least, least)
            largest = torch.maximum(self.largest, largest)
        self.most, self.least, self.largest = most, least, largest

    def tensors(self) -> dict[str, Tensor]:
        """By the names of the statistics."""
        found = {"max": self.most, "min": self.least, "absmax": self.largest}
        return {kind: tensor.cpu() for kind, tensor in found.items() if tensor is not None}


@dataclass
class Moments:
    """The statistics of one input or output, each [channels] float16, over ``count`` calls."""

    range: Range = field(default_factory=Range)
    mean: Tensor | None = None
    absmean: Tensor | None = None
    count: int = 0

    def update(self, values: Tensor) -> None:
        """One call's values [batch, tokens, channels]."""
        tokens = values.detach().flatten(0, 1).half()
        self.range.update(tokens[None, None])
        mean, absmean = tokens.mean(0), tokens.abs().mean(0)
        if self.mean is None or self.absmean is None:
            self.mean, self.absmean = mean, absmean
        else:
            self.mean = (self.mean * self.count + mean) / (self.count + 1)
            self.absmean = (self.absmean * self.count + absmean) / (self.count + 1)
        self.count += 1

    def tensors(self) -> dict[str, Tensor]:
        """By the names of the statistics."""
        assert self.mean is not None
        assert self.absmean is not None
        return {**{kind: one[0] for kind, one in self.range.tensors().items()}, "mean": self.mean.cpu(), "absmean": self.absmean.cpu()}


@dataclass
class Observations:
    """All that is watched, by name in the model's order. keys, values: by decoder layer."""

    keys: dict[str, Range] = field(default_factory=dict)
    values: dict[str, Range] = field(default_factory=dict)
    inputs: dict[str, Moments] = field(default_factory=dict)
    norms: dict[str, Moments] = field(default_factory=dict)
    outputs: dict[str, Moments] = field(default_factory=dict)

    def files(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """{file: {statistic: {name: tensor}}}, as LMDeploy's files have them."""
        watched: tuple[Mapping[str, Range | Moments], ...] = (self.inputs, {**self.norms, **self.outputs}, self.keys, self.values)
        found: dict[str, dict[str, dict[str, Tensor]]] = {}
        for file, by_name in zip(FILES, watched, strict=True):
            tensors = {name: one.tensors() for name, one in by_name.items()}
            kinds = MOMENTS if file in {"inputs_stats", "outputs_stats"} else RANGES
            found[file] = {kind: {name: one[kind] for name, one in tensors.items()} for kind in kinds}
        return found

    @contextmanager
    def watching(self, model: nn.Module, layer: str) -> Iterator[None]:
        """While this lasts, every call inside the decoder layer called ``layer`` of a stage is watched."""
        own = {name: module for name, module in model.named_modules() if name.startswith(f"{layer}.")}
        attention = [module for name, module in attention_modules(model).items() if name in own]
        if not attention:
            raise UsageError(f"{layer}: has no attention module of transformers' kind, so its keys and values cannot be watched")

        def see_input(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.inputs.setdefault(name, Moments()).update(args[0])

        def see_output(name: str, into: dict[str, Moments], module: nn.Module, args: Any, output: Tensor) -> None:
            into.setdefault(name, Moments()).update(output)

        def watched(function: Attention) -> Attention:
            def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
                self.keys.setdefault(layer, Range()).update(key)
                self.values.setdefault(layer, Range()).update(value)
                return function(module, query, key, value, *args, **kwargs)

            return attend

        with ExitStack() as stack:
            for name, module in own.items():
                if isinstance(module, nn.Linear):
                    stack.enter_context(module.register_forward_pre_hook(partial(see_input, name)))
                    stack.enter_context(module.register_forward_hook(partial(see_output, name, self.outputs)))
                elif _is_norm(module) and name.count(".") == layer.count(".") + 1:
                    stack.enter_context(module.register_forward_hook(partial(see_output, name, self.norms)))
            stack.enter_context(wrapped_attention(attention, watched))
            yield


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm"))


@dataclass(frozen=True)
class Calibrated:
    """What was written: the files in ``folder``, of ``samples`` windows of ``length`` tokens."""

    folder: Path
    files: tuple[str, ...]
    layers: int
    samples: int
    length: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "folder": os.fspath(self.folder), "files": list(self.files), "notes": list(self.notes)}


def calibrate(
    model: str | os.PathLike[str],
    calib: str | os.PathLike[str] | Sequence[Tensor],
    *,
    samples: int = 128,
    seqlen: int = 2048,
    work_dir: str | os.PathLike[str] = "./quant_output",
    device: str = HOST,
    progress: Progress | None = None,
) -> Calibrated:
    """Write a model's statistics into ``work_dir``, which is made if it is not there: ``.pth`` for LMDeploy, and their safetensors twins.

    model    a folder of any format; what is quantized is dequantized
    calib    a file (``lmdeploy_text``), the name of a data set, or token ids, [1, tokens] int64 each, all of one length

    :raises UsageError: samples of several lengths, no text, a device that is not there
    :raises UnreadableError: a statistic that float16 cannot hold, a model that cannot be run
    """
    checkpoint = open_checkpoint(Path(model))
    blocks, place = Blocks.open(checkpoint, torch.float16), Path(work_dir)
    if isinstance(calib, (str, os.PathLike)):
        tokenizer = tokenizer_of(checkpoint.location, checkpoint.location.base)
        windows, notes = windows_of(calib, tokenizer, samples, seqlen)
    else:
        windows, notes = list(calib), []
    found = observe(blocks, windows, device=device, progress=progress)
    files = found.files()
    _check_finite(files)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DestinationError(f"{place}: cannot be made ({error.strerror or error})") from None
    makers: dict[str, Any] = {}
    for name, statistics in files.items():
        tensors, metadata = twin_tensors(statistics)
        makers[f"{name}.pth"] = partial(torch.save, statistics)
        makers[f"{name}.safetensors"] = partial(save_file, {key: tensor.clone() for key, tensor in tensors.items()}, metadata=metadata)
    replace_made(place, makers)
    return Calibrated(place, tuple(makers), len(blocks), len(windows), int(windows[0].shape[1]), tuple(notes))


def observe(blocks: Blocks, samples: Sequence[Tensor], *, device: str = HOST, progress: Progress | None = None) -> Observations:
    """Run a decoder on ``samples``, [1, tokens] int64 each, one layer after the other, and watch it."""
    lengths = {tuple(sample.shape) for sample in samples}
    if len(lengths) != 1 or len(next(iter(lengths))) != 2 or next(iter(lengths))[0] != 1:
        raise UsageError(f"samples: are of shapes {sorted(lengths)[:3]}, and [1, tokens] of one length was wanted")
    where = resolve(device)
    found, batch = Observations(), [[sample] for sample in samples]
    states = blocks.begin(batch, device=where)
    for index, name in enumerate(blocks.names):
        with torch.no_grad(), blocks.stage(index, device=where) as model, found.watching(model, name):
            advance(model, states, batch)
        if progress is not None:
            progress("layers", index + 1, len(blocks))
    norm = blocks.part(blocks.architecture.final_norm)
    with torch.no_grad():
        found.norms[blocks.architecture.final_norm] = _of_all(norm, states)
    return found


def _of_all(norm: nn.Module, states: States) -> Moments:
    """What a norm makes of all samples together, watched once; ``states`` are replaced by it."""
    for index in range(len(states)):
        states[index] = norm(states[index])
    parts = []
    for start in range(0, states.hidden, COLUMNS):
        part = Moments()
        part.update(torch.cat([sample[..., start : start + COLUMNS] for sample in states]))
        parts.append(part.tensors())
    whole = {kind: torch.cat([part[kind] for part in parts]) for kind in MOMENTS}
    extremes = Range(*(whole[kind][None] for kind in RANGES))
    return Moments(extremes, whole["mean"], whole["absmean"], 1)


def _check_finite(files: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> None:
    """UnreadableError where a statistic is NaN or an infinity: LMDeploy writes those, and what is made of them is worthless."""
    for file, statistics in files.items():
        for kind, by_name in statistics.items():
            for name, tensor in by_name.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise UnreadableError(
                        f"{name}: {kind} in {file} is NaN or infinite, as values beyond 65504 are in float16, in which LMDeploy "
                        "computes; this model cannot be calibrated for it"
                    )
