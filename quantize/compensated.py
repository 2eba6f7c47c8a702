"""GPTQ and AWQ in a decoder layer: which linears belong together, and what the layer computes between one step and the next.

Both see the layer's inputs as the quantized layers before it make them. ``gptq_rounded`` rounds linears group by group, in the order in
which the layer runs them, so that each group's inputs are those that the rounded groups before it make (true sequential); a group is
all linears that share an input, and experts' linears of the same names. ``awq_scaled`` moves scales between the layer's linears and
norms first, in place, and ``awq_rounded`` then clips and rounds.

Scales are stored, and so rounded, in the model's own half precision (float16 for a float32 model), which every target holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from formats.errors import UnreadableError

from .anti_outlier import AntiOutlier
from .architectures import Subgraph
from .awq import clipped, is_clipped, round_awq, search_clip, search_scale
from .config import QuantConfig
from .gptq import Hessian, round_gptq
from .layers import QuantizedLayer, rounded_layer
from .methods import Awq, Gptq
from .stage import MORE_SAMPLES, UNREACHED, forward, watching

__all__ = ["awq_rounded", "awq_scaled", "gptq_rounded", "groups_by_input"]


def scale_dtype_of(weight: Tensor) -> torch.dtype:
    """In which scales of ``weight`` are stored."""
    return torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16


def group_size_of(config: QuantConfig) -> int:
    """Inputs of a group, or -1."""
    return config.group_size if config.is_per_group else -1


def groups_by_input(model: nn.Module, linears: Mapping[str, nn.Linear], sample: Any) -> list[list[str]]:
    """Names of linears in the order in which ``model`` runs them, those together that get the very same tensor, or whose last names are
    those of such (experts): as a list of such lists. Linears that the sample does not reach join those of their last name, or come last.
    """
    seen: list[tuple[Tensor, list[str]]] = []

    def see(name: str, values: Tensor) -> None:
        names = next((names for other, names in seen if other is values), None)
        if names is None:
            seen.append((values, names := []))
        names.append(name)

    _watch(model, linears, [sample], see)
    groups: dict[frozenset[str], list[str]] = {}
    for _, names in seen:
        groups.setdefault(frozenset(map(_leaf, names)), []).extend(names)
    reached = {name for names in groups.values() for name in names}
    for name in linears:
        if name not in reached:
            leaves = next((leaves for leaves in groups if _leaf(name) in leaves), frozenset([_leaf(name)]))
            groups.setdefault(leaves, []).append(name)
    return list(groups.values())


def gptq_rounded(
    model: nn.Module, linears: Mapping[str, nn.Linear], configs: Mapping[str, QuantConfig], samples: Sequence[Any], settings: Gptq
) -> Iterator[tuple[QuantizedLayer, Tensor]]:
    """Every linear of ``configs``, rounded by GPTQ; whoever takes one puts it in its place before asking for the next.

    :raises UnreadableError: a linear that no sample reaches, values that are not finite
    """
    groups = groups_by_input(model, {name: linears[name] for name in configs}, samples[0])
    for names in groups if settings.true_sequential else [[name for group in groups for name in group]]:
        hessians = _hessians(model, {name: linears[name] for name in names}, samples)
        for name in names:
            config, weight, hessian = configs[name], linears[name].weight.detach(), hessians.pop(name)
            if hessian.saw_no_token:
                raise UnreadableError(f"{name}: {UNREACHED}, and GPTQ needs its inputs; {MORE_SAMPLES}")
            last = all(other is not hessian for other in hessians.values())
            rounded = round_gptq(
                name, weight, hessian, config.w_bit, config.w_sym, group_size_of(config), settings, scale_dtype_of(weight), last
            )
            yield rounded_layer(name, linears[name], config, weight, rounded)


def _hessians(model: nn.Module, linears: Mapping[str, nn.Linear], samples: Sequence[Any]) -> dict[str, Hessian]:
    """Of the inputs of each linear, over all samples; linears that always get the same tensor share one."""
    hessians: dict[str, Hessian] = {}
    last: list[tuple[Tensor, Hessian]] = []

    def see(name: str, values: Tensor) -> None:
        if last and last[0][0] is values and hessians.get(name, last[0][1]) is last[0][1]:
            hessians[name] = last[0][1]  # was told already
            return
        hessian = hessians.setdefault(name, Hessian(values.shape[-1], values.device))
        hessian.add(values)
        last[:] = [(values, hessian)]

    _watch(model, linears, samples, see)
    return {name: hessians.get(name) or Hessian(linear.in_features) for name, linear in linears.items()}


def awq_scaled(
    model: nn.Module,
    smoother: AntiOutlier,
    subgraphs: Iterable[Subgraph],
    configs: Mapping[str, QuantConfig],
    samples: Sequence[Any],
    settings: Awq,
) -> dict[str, float | None]:
    """Scale the layer's subgraphs in place, each by its best scale. By source: the ratio that made it, or None where none is better.

    All scales are searched before the first is applied. A value projection is left alone where its heads are shared, as in AutoAWQ.
    """
    found, ratios = [], {}
    for subgraph in subgraphs:
        targets = [model.get_submodule(name) for name in subgraph.targets]
        if not all(name in configs for name in subgraph.targets) or not _is_alone(model, subgraph):
            continue
        config, name = configs[subgraph.targets[0]], subgraph.targets[0]
        x_mean = _mean_magnitude(model, name, samples)
        run = _replayed(model, _parent(subgraph), samples)
        search = search_scale(
            name,
            targets,
            x_mean,
            run,
            _fake(name, config, targets[0].weight),
            group_size_of(config),
            settings.grid,
            settings.duo_scaling,
        )
        found.append((subgraph, search))
        ratios[subgraph.source] = search.ratio
    for subgraph, search in found:
        if search.ratio is not None:
            smoother.scale(subgraph, search.scale)
    return ratios


def awq_rounded(
    model: nn.Module, linears: Mapping[str, nn.Linear], configs: Mapping[str, QuantConfig], samples: Sequence[Any], settings: Awq
) -> Iterator[tuple[QuantizedLayer, Tensor]]:
    """Every linear of ``configs``, clipped where that is better, and rounded. Nothing is run once the first is given."""
    limits: dict[str, Tensor] = {}
    if settings.clip:
        for names in groups_by_input(model, {name: linears[name] for name in configs}, samples[0]):
            wanted = [name for name in names if is_clipped(name)]
            inputs = _inputs_of(model, {name: linears[name] for name in wanted}, samples) if wanted else {}
            for name in wanted:
                if not inputs[name]:
                    raise UnreadableError(f"{name}: {UNREACHED}, and a clip needs its inputs; {MORE_SAMPLES}")
                config, weight = configs[name], linears[name].weight.detach()
                rows = torch.cat([values.flatten(0, -2) for values in inputs.pop(name)])
                limits[name] = search_clip(
                    name, weight, rows, config.w_bit, config.w_sym, group_size_of(config), settings.grid, settings.max_shrink,
                    settings.clip_tokens, scale_dtype_of(weight),
                )  # fmt: skip
    for name, config in configs.items():
        weight = linears[name].weight.detach()
        kept = clipped(weight, limits[name]) if name in limits else weight
        rounded = round_awq(name, kept, config.w_bit, config.w_sym, group_size_of(config), scale_dtype_of(weight))
        yield rounded_layer(name, linears[name], config, weight, rounded)


def _fake(name: str, config: QuantConfig, weight: Tensor) -> Callable[[Tensor], Tensor]:
    dtype = scale_dtype_of(weight)
    return lambda values: round_awq(name, values, config.w_bit, config.w_sym, group_size_of(config), dtype).fake


def _mean_magnitude(model: nn.Module, name: str, samples: Sequence[Any]) -> Tensor:
    """[in] float32: the mean of what module ``name`` gets, without signs, over all tokens of all samples.

    :raises UnreadableError: no sample reaches it
    """
    total: Any = 0
    tokens = 0

    def see(name: str, values: Tensor) -> None:
        nonlocal total, tokens
        rows = values.flatten(0, -2)
        total, tokens = total + rows.abs().float().sum(0), tokens + rows.shape[0]

    _watch(model, {name: model.get_submodule(name)}, samples, see)
    if not tokens:
        raise UnreadableError(f"{name}: {UNREACHED}, and AWQ needs its inputs; {MORE_SAMPLES}")
    mean: Tensor = total / tokens
    return mean


def _is_alone(model: nn.Module, subgraph: Subgraph) -> bool:
    """Whether each row of the source feeds one column of the targets."""
    if subgraph.kind == "norm":
        return True
    source: Any = model.get_submodule(subgraph.source)
    target: Any = model.get_submodule(subgraph.targets[0])
    return subgraph.rows != "all" or source.out_features == target.in_features


def _parent(subgraph: Subgraph) -> str:
    """The module whose output counts: what holds all targets of a norm, or the one target itself."""
    return subgraph.targets[0].rpartition(".")[0] if subgraph.kind == "norm" and len(subgraph.targets) > 1 else subgraph.targets[0]


def _replayed(model: nn.Module, name: str, samples: Sequence[Any]) -> Callable[[], Iterator[Tensor]]:
    """What runs module ``name`` again and again on what it got in a run over all samples."""
    module, calls = model.get_submodule(name), []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _Enough

    with module.register_forward_pre_hook(keep, with_kwargs=True):
        for sample in samples:
            with contextlib.suppress(_Enough):
                forward(model, sample)

    def run() -> Iterator[Tensor]:
        for args, kwargs in calls:
            output = module(*args, **kwargs)
            yield output[0] if isinstance(output, tuple) else output

    return run


def _inputs_of(model: nn.Module, modules: Mapping[str, nn.Module], samples: Sequence[Any]) -> dict[str, list[Tensor]]:
    """What each module gets, sample by sample."""
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    _watch(model, modules, samples, lambda name, values: found[name].append(values.detach()))
    return found


class _Enough(Exception):  # noqa: N818 - it is no error
    """Everything that was to be seen was seen."""


def _watch(model: nn.Module, modules: Mapping[str, nn.Module], samples: Iterable[Any], see: Callable[[str, Tensor], None]) -> None:
    """Run the model on every sample, as far as ``modules`` go; ``see`` is given the name and the input of each."""
    waited: set[str] = set()

    def seen(name: str, values: Tensor) -> None:
        see(name, values)
        waited.discard(name)
        if not waited:
            raise _Enough

    with watching(modules, seen):
        for sample in samples:
            waited.update(modules)
            with contextlib.suppress(_Enough):
                forward(model, sample)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
