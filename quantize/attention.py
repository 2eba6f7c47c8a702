"""8-bit attention (FA3): scales by head of queries, keys and values, as attention itself sees them, after rotary embedding.

msModelSlim observes them where a model's code was changed to call its FAQuantizer, and refuses models without. Here the attention
function that transformers calls is watched, so any model that goes through transformers' attention interface will do. Nothing is
rounded: like the tool's, this pass only finds the scales.

By head, over all tokens of a sample: the narrowest window of the sorted values that holds 99.99 % of them (queries, keys) or all
(values); over samples the least minimum and the largest maximum; then symmetric int8.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from formats.errors import UnreadableError, UsageError

from .rounding import linear_parameters

__all__ = ["AttentionObserver", "HeadRange", "attention_modules", "wrapped_attention"]

RECALL = {"q": 0.9999, "k": 0.9999, "v": 1.0}

Attention = Callable[..., Any]
"""Called by transformers as (module, queries, keys, values, ...), the states [batch, heads, tokens, head size]."""


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` that call an attention function of transformers, by name."""
    return {
        name: module for name, module in model.named_modules() if type(module).__name__.endswith("Attention") and hasattr(module, "config")
    }


@contextmanager
def wrapped_attention(modules: Iterable[nn.Module], wrap: Callable[[Attention], Attention]) -> Iterator[None]:
    """While this lasts, what transformers calls is ``wrap`` of each attention function, also of those in the modules' own files."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    registry: Any = ALL_ATTENTION_FUNCTIONS
    before = {kind: registry[kind] for kind in list(registry.keys())}
    homes = {importlib.import_module(type(module).__module__) for module in modules}
    eager = {home: vars(home)["eager_attention_forward"] for home in homes if "eager_attention_forward" in vars(home)}
    try:
        for kind, function in before.items():
            registry[kind] = wrap(function)
        for home, function in eager.items():
            vars(home)["eager_attention_forward"] = wrap(function)
        yield
    finally:
        for kind, function in before.items():
            registry[kind] = function
        for home, function in eager.items():
            vars(home)["eager_attention_forward"] = function


class HeadRange:
    """Extremes by head, [heads, 1] in the states' dtype, of the narrowest window that holds ``recall`` of each sample's values."""

    def __init__(self, recall: float) -> None:
        self.recall = recall
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, states: Tensor) -> None:
        """One call's states [batch, heads, tokens, head size]."""
        rows = states.detach().transpose(0, 1).flatten(1).sort(1).values
        held = max(int(rows.shape[1] * self.recall), 1)
        lows, highs = rows[:, : rows.shape[1] - held + 1], rows[:, held - 1 :]
        narrowest = (highs.double() - lows.double()).argmin(1, keepdim=True)
        low, high = lows.gather(1, narrowest), highs.gather(1, narrowest)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


class AttentionObserver:
    """Watches every attention module of a model but those named in ``skip``."""

    def __init__(self, model: nn.Module, skip: list[str]) -> None:
        self._names = {module: name for name, module in attention_modules(model).items() if name not in skip}
        if not self._names:
            raise UsageError("fa_quant: this model has no attention module of transformers' kind (a class *Attention with a config)")
        self._ranges: dict[str, HeadRange] = {}

    def _see(self, module: Any, states: tuple[Tensor, Tensor, Tensor]) -> None:
        name = self._names.get(module)
        if name is None:
            return
        for kind, tensor in zip("qkv", states, strict=True):
            self._ranges.setdefault(f"{name}.fa_{kind}", HeadRange(RECALL[kind])).update(tensor)

    def _watched(self, function: Attention) -> Attention:
        def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._see(module, (query, key, value))
            return function(module, query, key, value, *args, **kwargs)

        return attention

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts, every call of an attention function is seen."""
        with wrapped_attention(self._names, self._watched):
            yield

    def finish(self) -> dict[str, Tensor]:
        """``<attention>.fa_q.scale`` [heads, 1] in the states' dtype and ``.offset`` [heads, 1] int8, and the same for k and v."""
        tensors: dict[str, Tensor] = {}
        for name in self._names.values():
            for kind in RECALL:
                seen = self._ranges.get(f"{name}.fa_{kind}")
                if seen is None or seen.low is None or seen.high is None:
                    raise UnreadableError(f"{name}: calibration saw no call of its attention function; it does not use transformers' own")
                if not (seen.low.isfinite().all() and seen.high.isfinite().all()):
                    raise UnreadableError(f"{name}: its queries, keys or values in calibration have NaN or infinite values")
                scale, offset = linear_parameters(seen.low, seen.high, 8, symmetric=True)
                tensors[f"{name}.fa_{kind}.scale"] = scale.cpu()
                tensors[f"{name}.fa_{kind}.offset"] = offset.to(torch.int8).cpu()
        return tensors
