"""The int8 KV cache (C8): its scales, observed where msModelSlim observes them.

That is the output of the linears that make keys and values, before rotary embedding, over all samples of the float model: one scale
and offset for each of kv heads * head size channels, in the model's dtype. The tool finds these linears in a traced graph; here they
are known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from formats.errors import UnreadableError, UsageError

from .fake import quantize_cache
from .observers import ChannelRange

__all__ = ["CacheObserver"]

KEY_LINEARS = ("k_proj",)
VALUE_LINEARS = ("v_proj",)
FUSED_LINEARS = ("query_key_value", "qkv_proj", "W_pack", "wqkv")
"""Queries, then keys, then values - but wqkv (InternLM2) has, by kv head, its queries, its key and its value."""


class CacheObserver:
    """Watches a model's keys and values. Made before calibration; ``finish`` gives the scales and patches the model."""

    def __init__(self, model: nn.Module, symmetric: bool) -> None:
        self.symmetric = symmetric
        self._model = model
        self._ranges: dict[str, ChannelRange] = {}
        self._hooks: list[RemovableHandle] = []
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            if isinstance(module, nn.Linear) and last in (*KEY_LINEARS, *VALUE_LINEARS, *FUSED_LINEARS):
                self._hooks.append(module.register_forward_hook(self._watcher(name, last)))
        if not self._hooks:
            known = ", ".join((*KEY_LINEARS, *VALUE_LINEARS, *FUSED_LINEARS))
            raise UsageError(f"kv_quant: no linear of this model is named as keys or values are ({known})")

    def _watcher(self, name: str, last: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if last not in FUSED_LINEARS:
                self._range(name).update(output)
                return
            keys, values = self._split(last, args[0].shape[-1], output)
            self._range(f"{name}.k_proj").update(keys)
            self._range(f"{name}.v_proj").update(values)

        return watch

    def _range(self, name: str) -> ChannelRange:
        return self._ranges.setdefault(name, ChannelRange())

    def _split(self, last: str, hidden: int, output: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a fused projection's output [..., channels]."""
        if last == "wqkv":
            config: Any = self._model.config
            head_size = config.hidden_size // config.num_attention_heads
            by_head = output.reshape(*output.shape[:-1], config.num_key_value_heads, -1, head_size)
            return by_head[..., -2, :].flatten(-2), by_head[..., -1, :].flatten(-2)
        keys, values = output[..., hidden:].chunk(2, -1)
        return keys, values

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def finish(self) -> dict[str, Tensor]:
        """``<linear>.kv_cache_scale`` and ``.kv_cache_offset`` [kv heads * head size] for keys and values of every layer.

        The model's attention modules round what they add to a cache from now on.
        """
        self.remove()
        tensors: dict[str, Tensor] = {}
        by_attention: dict[str, dict[str, Tensor]] = {}
        for name, seen in self._ranges.items():
            parameters = seen.parameters(self.symmetric)
            if parameters is None or not (parameters[0].isfinite().all() and parameters[1].isfinite().all()):
                raise UnreadableError(f"{name}: its keys or values in calibration are missing, NaN or infinite")
            tensors[f"{name}.kv_cache_scale"], tensors[f"{name}.kv_cache_offset"] = parameters
            path, _, last = name.rpartition(".")
            if path.rpartition(".")[2] in FUSED_LINEARS:
                path = path.rpartition(".")[0]
            scales = by_attention.setdefault(path, {})
            scales[f"{last[0]}_scale"], scales[f"{last[0]}_offset"] = parameters
        for path, scales in self._complete(by_attention):
            quantize_cache(self._model.get_submodule(path), scales)
        return tensors

    @staticmethod
    def _complete(by_attention: dict[str, dict[str, Tensor]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for path, scales in by_attention.items():
            if len(scales) != 4:
                raise UnreadableError(f"{path}: calibration saw its keys or its values, but not both")
            yield path, scales
