"""The linears of a model, quantized in place: observed, rounded, and calibrated on what the model computes once they are rounded.

A ``Stage`` is a whole model, or one with a single decoder layer (``blocks``); what to do in which order is ``calibrator``'s and
``layerwise``'s to say. Rounding is a stream of rounded linears: each takes its linear's place before the next is made, so that a method
may run the model between them (GPTQ, one group of linears after the other).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from formats.errors import UnreadableError

from .config import QuantConfig
from .fake import DigitSplitter, FakeQuantLinear, InputQuantizer
from .kv_cache import CacheObserver
from .layers import STATIC_TYPES, QuantizedLayer, quantize_linear, with_inputs
from .observers import CALM_RANGE, CalmRange, observer_for

__all__ = ["FEATURE_SAMPLES", "Progress", "Rounded", "Stage", "forward", "rounded_to_nearest", "watching"]

FEATURE_SAMPLES = 5
"""Samples of which range_parm is taken."""

Progress = Callable[[str, int, int], None]
"""Called as (what, done, of)."""

Made = Callable[[int, Any], None]
"""Given (a sample's number, what the model made of it)."""

Rounded = Iterable[tuple[QuantizedLayer, Tensor]]
"""Quantized linears, one after the other, each with its dequantized weight [out, in]."""

logger = logging.getLogger(__name__)


class Stage:
    """The linears of ``model``. ``config``: what the model's quantization is called; each linear may have a config of its own.

    layers       {linear: its numbers}, after ``round``; range_parm: {linear: ratio}, after ``observe_ranges``
    """

    def __init__(self, model: nn.Module, linears: Mapping[str, nn.Linear], config: QuantConfig) -> None:
        self.model, self.config = model, config
        self.linears = dict(linears)
        self.layers: dict[str, QuantizedLayer] = {}
        self.range_parm: dict[str, float] = {}
        self._replaced: dict[str, FakeQuantLinear] = {}

    def observe_ranges(self, samples: Sequence[Any], made: Made | None = None) -> None:
        """range_parm of every linear that the first samples reach, in the order in which the model calls them."""
        seen: dict[str, CalmRange] = {}
        with watching(self.linears, lambda name, values: seen.setdefault(name, CalmRange()).update(values)):
            _run(self.model, samples[:FEATURE_SAMPLES], made)
        self.range_parm = {name: ratio.range_parm() for name, ratio in seen.items()}

    def observe_cache(self, samples: Sequence[Any], symmetric: bool, made: Made | None = None) -> CacheObserver:
        """Keys and values of the model as it is now."""
        observer = CacheObserver(self.model, symmetric)
        try:
            _run(self.model, samples, made)
        finally:
            observer.remove()
        return observer

    def round(
        self,
        rounded: Rounded,
        configs: Mapping[str, QuantConfig],
        calibrated: bool,
        progress: Progress,
        keep_floats: bool = False,
        split_digits: bool = True,
    ) -> None:
        """Put a fake-quantized linear in the place of every linear of ``configs`` as ``rounded`` gives it.

        calibrated    there are samples to find the scales of inputs by; keep_floats: the float weights are still needed
        split_digits  float inputs of per-group weights go through msModelSlim's integer split
        """
        for layer, weight in rounded:
            name, linear = layer.name, self.linears[layer.name]
            logger.info("%s: %s, weight error %.3g", name, layer.kind, layer.weight_error)
            self.layers[name] = layer
            self._replaced[name] = FakeQuantLinear(linear, weight, None)
            set_module(self.model, name, self._replaced[name])
            if not keep_floats:
                linear.weight = nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)
            progress("layers", len(self.layers), len(configs))
        for name, config in configs.items():
            self._replaced[name].inputs = self._inputs(name, config, calibrated, split_digits)

    def _inputs(self, name: str, config: QuantConfig, calibrated: bool, split_digits: bool) -> Callable[[Tensor], Tensor] | None:
        if config.a_bit > 8:
            return DigitSplitter(config.w_bit) if config.do_msd and split_digits else None
        if not calibrated:
            return InputQuantizer(name, config, None)
        ratio = self.range_parm.get(name, 0.0)
        histogram = config.act_method == 2 or (config.act_method == 3 and ratio <= CALM_RANGE)
        logger.info("use %s observer:%s.quant_input, range_parm:%s", "histogram" if histogram else "min-max", name, ratio)
        return InputQuantizer(name, config, observer_for(config.act_method, ratio))

    def calibrate(self, samples: Sequence[Any], progress: Progress, level: int = 0, made: Made | None = None) -> None:
        """Run the model, quantized so far, on every sample.

        level   so many linears become float again after the first sample, those of the largest inputs; made: is given every output
        """
        for index, sample in enumerate(samples):
            largest = dict.fromkeys(self._replaced, 0.0) if index == 0 and level else {}
            with watching({name: self._replaced[name] for name in largest}, _keep_largest(largest)):
                output = forward(self.model, sample)
            if largest:
                self._restore_wildest(largest, level)
            if made is not None:
                made(index, output)
            progress("samples", index + 1, len(samples))

    def _restore_wildest(self, largest: dict[str, float], level: int) -> None:
        wild = sorted(largest, key=largest.__getitem__, reverse=True)[:level]
        for name in wild:
            set_module(self.model, name, self.linears[name])
            del self.layers[name]
        logger.info("Automatically disabled layer names are: %s", ", ".join(sorted(wild)))

    def finish(self) -> None:
        """End calibration: fix input scales. Raises UnreadableError for a static layer that no sample reached."""
        for name, layer in list(self.layers.items()):
            inputs = self._replaced[name].inputs
            if not isinstance(inputs, InputQuantizer):
                continue
            inputs.calibrating = False
            inputs.observer = None
            if layer.kind not in STATIC_TYPES:
                continue
            if inputs.scale is None or inputs.offset is None:
                raise UnreadableError(f"{name}: {UNREACHED}, so it has no input scale; {MORE_SAMPLES}")
            self.layers[name] = with_inputs(layer, inputs.scale.cpu(), inputs.offset.cpu())


UNREACHED = "no calibration sample reached this layer (an expert without tokens?)"
MORE_SAMPLES = "add samples, or add the layer to disable_names"


def rounded_to_nearest(linears: Mapping[str, nn.Linear], configs: Mapping[str, QuantConfig]) -> Iterator[tuple[QuantizedLayer, Tensor]]:
    """Every linear of ``configs`` by its config's own arithmetic, from its weight alone."""
    for name, config in configs.items():
        yield quantize_linear(name, linears[name], config)


def _run(model: nn.Module, samples: Sequence[Any], made: Made | None) -> None:
    for index, sample in enumerate(samples):
        output = forward(model, sample)
        if made is not None:
            made(index, output)


def forward(model: nn.Module, sample: Any) -> Any:
    """What ``model`` makes of one sample, wherever the sample's tensors are."""
    device = next(model.parameters()).device

    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(sample, dict):
        return model(**{key: there(value) for key, value in sample.items()})
    return model(*[there(value) for value in sample])


@contextlib.contextmanager
def watching(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While this lasts, ``see`` is given the name and the first input of each of ``modules`` that is about to be run."""

    def watcher(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(name, args[0])

        return watch

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(module.register_forward_pre_hook(watcher(name)))
        yield


def _keep_largest(largest: dict[str, float]) -> Callable[[str, Tensor], None]:
    """What keeps, by name, the largest magnitude of what it is given."""

    def see(name: str, values: Tensor) -> None:
        largest[name] = max(largest[name], float(values.abs().max()))

    return see


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` says."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
