"""``AntiOutlier``: move activation outliers into the weights, as msModelSlim 26.1.0's class of that name does, m1 to m6.

Like it, this works on the caller's model in place, preserves what the model computes, and leaves the model in evaluation mode. Which
subgraphs there are: ``architectures``; the formulas: ``smoothing``. Quirks of msModelSlim that are kept, because results depend on them:

1. Statistics are of the model as it was; weights are read when their subgraph's turn comes, so the order of subgraphs counts.
2. A calibration sample ``[input_ids, attention_mask]`` is run with its mask, one of any other length without.
3. A subgraph with "expert" in a target's name is skipped. ``disable_anti_names`` counts in m3, m4 and m6 only; any one name skips its
   whole subgraph.
4. Qwen3's m4 also shifts: ``norm.bias = -shift / s``, and the targets' biases take ``W @ shift``. Norm and linears that have no
   bias get one. A transformers norm does not look for a bias, so a hook adds it; the parameter is the norm's own ``bias``.

Not kept: msModelSlim wraps every norm of the smoothed class in a ``NormBias`` (m1 to m5), with a bias of zeros in float32, and its files
show it (``norm.bias``, ``norm.module.weight``). Ours are not wrapped; ``wrapped_norms`` lists them for who writes such files. On Qwen3
msModelSlim crashes in m1, m2, m3 and m5 ('Linear' object has no attribute 'module'); ours smooths the norms, as elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from formats.errors import RefusedError, UnreadableError, UsageError

from .architectures import Architecture, Rows, Subgraph, architecture_of
from .config import AntiOutlierConfig
from .devices import resolve
from .smoothing import (
    ActivationStatistics,
    largest_weight,
    m1_scale,
    m2_scale,
    m3_ratio,
    m3_scale,
    m4_scale,
    m5_scale,
    m6_exponents,
    power_scale,
    widest_of_group,
)
from .stage import forward, watching

__all__ = ["AntiOutlier", "check_anti_names"]

Sample = Sequence[Tensor] | Mapping[str, Tensor]

LINEAR_METHODS = ("m4", "m6")  # that smooth linear -> linear as well as norm -> linears
SKIPPING_METHODS = ("m3", "m4", "m6")  # that honour disable_anti_names
HEAD_KEYS = ("num_attention_heads", "n_head", "num_heads", "heads_num")


WRAPPED_NORMS = "weighbridge_wrapped_norms"
"""Attribute of a smoothed model that names ``AntiOutlier.wrapped_norms``, for who saves it."""


class AntiOutlier:
    """Smooths ``model`` in place. After ``process()``:

    ``scales``          by norm: what its weight was divided by; by linear: what its columns were multiplied by. ``[C]``, the weight's dtype
    ``shifts``          by norm: what was taken off its output before that. ``[C]``; Qwen3's m4 only
    ``choices``         by source: what a search kept: ``threshold`` (m2), ``ratio`` (m3), ``alpha`` and ``beta`` (m6)
    ``wrapped_norms``   norms that msModelSlim would have wrapped
    """

    def __init__(
        self,
        model: nn.Module,
        calib_data: Sequence[Sample] | None = None,
        cfg: AntiOutlierConfig | None = None,
        norm_class_name: str | None = None,
        *,
        architecture: Architecture | None = None,
        progress: Callable[[str], None] | None = None,
        layer: int | None = None,
        made: Callable[[int, Any], None] | None = None,
    ) -> None:
        """``calib_data``: samples, each ``[input_ids]`` or ``[input_ids, attention_mask]`` (``[1, tokens]``), or keyword arguments.

        ``norm_class_name``, as msModelSlim has it, is the class of the norms (any case). ``architecture`` is for models that no table
        knows; ``progress`` is told each source's name as its turn comes; ``layer``: only this decoder layer is in the model (``blocks``),
        and names in ``disable_anti_names`` are the whole model's (``check_anti_names``); ``made`` is given what the float model makes of
        each sample.

        :raises UsageError: no calibration data, an unknown architecture, norm class or name in ``disable_anti_names``
        """
        self.cfg = AntiOutlierConfig() if cfg is None else cfg
        self.calib_data = _checked_data(calib_data)
        self.architecture = architecture_of(getattr(model, "config", None)) if architecture is None else architecture
        self._modules = dict(model.named_modules())
        self._progress, self._layer, self._made = progress, layer, made
        if layer is None:
            check_anti_names(self.cfg, model)
        self._check_norm_class(norm_class_name)
        self.wrapped_norms = () if self.cfg.anti_method == "m6" else norms_of(model, norm_class_name)
        self.model = model.to(resolve(self.cfg.dev_type, self.cfg.dev_id))
        self.scales: dict[str, Tensor] = {}
        self.shifts: dict[str, Tensor] = {}
        self.choices: dict[str, dict[str, float]] = {}

    def process(self) -> None:
        """Collect statistics, then smooth every subgraph.

        :raises UnreadableError: activations or weights that hold NaN or an infinity
        :raises RefusedError: a scale that the model's dtype cannot hold; what was smoothed before is kept, the function preserved
        """
        setattr(self.model, WRAPPED_NORMS, self.wrapped_norms)
        with torch.no_grad():
            subgraphs = self.subgraphs()
            statistics = self._statistics({subgraph.targets[0] for subgraph in subgraphs})
            for subgraph in subgraphs:
                if self._progress is not None:
                    self._progress(subgraph.source)
                self.scale(subgraph, *self._wanted(subgraph, statistics[subgraph.targets[0]]))

    def subgraphs(self) -> tuple[Subgraph, ...]:
        """The subgraphs that will be smoothed, in order, with whole names."""
        kinds = ("norm", "value", "up") if self.cfg.anti_method in LINEAR_METHODS else ("norm",)
        disabled = set(self.cfg.disable_anti_names or ()) if self.cfg.anti_method in SKIPPING_METHODS else set()
        return tuple(
            subgraph
            for subgraph in self.architecture.placed(self._layers())
            if subgraph.kind in kinds
            and (self._layer is None or subgraph.targets[0].startswith(f"{self.architecture.layers}.{self._layer}."))
            and not any("expert" in name.lower() for name in subgraph.targets)
            and disabled.isdisjoint(subgraph.targets)
        )

    # -- checks

    def _layers(self) -> int:
        layers = self._modules.get(self.architecture.layers)
        if not isinstance(layers, nn.ModuleList):
            raise UsageError(f"{self.architecture.layers}: is no list of layers in this model, as its architecture says it is")
        return len(layers)

    def _check_norm_class(self, wanted: str | None) -> None:
        if wanted is not None and not isinstance(wanted, str):
            raise UsageError(f"norm_class_name: {wanted!r} is not the name of a class")
        if wanted is not None and not any(_class_name(module) == wanted.lower() for module in self._modules.values()):
            raise UsageError(f"norm_class_name: no module of this model is a {wanted}; leave it out to use the model's own")

    # -- statistics

    def _statistics(self, names: set[str]) -> dict[str, ActivationStatistics]:
        """What each linear named gets as input, over all calibration samples."""
        flex = self.cfg.flex_config or {}
        keep = self.cfg.anti_method == "m6" and (flex.get("alpha") is None or flex.get("beta") is None)
        found: dict[str, ActivationStatistics] = {}

        def see(name: str, values: Tensor) -> None:
            found[name] = ActivationStatistics.of(values, found.get(name), keep=keep)

        self.model.eval()
        with watching({name: self._linear(name) for name in names}, see):
            for index, sample in enumerate(self.calib_data):
                output = self._run(sample)
                if self._made is not None:
                    self._made(index, output)
        for name in sorted(names):
            if name not in found:
                raise UsageError(f"{name}: saw no token in calibration, and its input's range is needed: give data that reaches it")
        return {name: found[name].checked(name) for name in sorted(names)}

    def _run(self, sample: Sample) -> Any:
        if isinstance(sample, Mapping):
            return forward(self.model, dict(sample))
        return forward(self.model, {"input_ids": sample[0]} | ({"attention_mask": sample[1]} if len(sample) == 2 else {}))

    # -- smoothing

    def _linear(self, name: str) -> nn.Linear:
        module = self._modules.get(name)
        if not isinstance(module, nn.Linear):
            raise UsageError(f"{name}: is no linear in this model, as its architecture says it is; pass architecture=Architecture(...)")
        return module

    def _wanted(self, subgraph: Subgraph, statistics: ActivationStatistics) -> tuple[Tensor, Tensor | None]:
        """(the scale of the source's rows, the shift of a norm's output or None) by the method."""
        targets = self._finite_targets(subgraph)
        if subgraph.kind == "norm":
            self._norm(subgraph)
            shift = statistics.shift if self.cfg.anti_method == "m4" and self.architecture.m4_shift else None
            return self._scale(subgraph, statistics, targets), shift
        head_dim = self._head_dim(subgraph, targets[0])
        return self._linear_scale(subgraph, statistics, targets, self._value_rows(subgraph, head_dim).numel() // head_dim, head_dim), None

    def _finite_targets(self, subgraph: Subgraph) -> list[nn.Linear]:
        targets = [self._linear(name) for name in subgraph.targets]
        for name, target in zip(subgraph.targets, targets, strict=True):
            if not bool(torch.isfinite(target.weight).all()):
                raise UnreadableError(f"{name}: the weight holds NaN or an infinity, and finite values were wanted; get a sound checkpoint")
        return targets

    def _value_rows(self, subgraph: Subgraph, head_dim: int) -> Tensor:
        """The rows of a source linear that the target reads."""
        return value_rows(
            subgraph.rows, self._linear(subgraph.source).out_features, self._linear(subgraph.targets[0]).in_features, head_dim
        )

    def scale(self, subgraph: Subgraph, scale: Tensor, shift: Tensor | None = None) -> None:
        """Divide the source's rows by ``scale`` ([C], or one for each row that the targets read) and multiply the targets' columns.

        To be called without gradients. Everything is worked out and checked before the first parameter changes.

        :raises RefusedError: the model's dtype cannot hold the scale, or a weight after scaling
        """
        targets = self._finite_targets(subgraph)
        if subgraph.kind == "norm":
            source, columns = self._norm(subgraph), scale
            rows = torch.arange(source.weight.numel())
        else:
            source, head_dim = self._linear(subgraph.source), self._head_dim(subgraph, targets[0])
            rows = self._value_rows(subgraph, head_dim)
            group = targets[0].in_features // rows.numel()
            columns = scale.reshape(-1, 1, head_dim).expand(-1, group, -1).reshape(-1)
        _check_scale(subgraph, scale)
        divided = source.weight.clone()
        chosen = rows.to(divided.device)
        divided[chosen] /= scale.reshape(-1, *[1] * (divided.dim() - 1))
        _check_held(subgraph.source, divided)
        multiplied = [(target.weight * columns.reshape(1, -1)).type_as(target.weight) for target in targets]
        for name, weight in zip(subgraph.targets, multiplied, strict=True):
            _check_held(name, weight)

        _shift(source, targets, shift)
        source.weight.copy_(divided)
        bias = getattr(source, "bias", None)
        if bias is not None:
            bias[chosen] /= scale
        for name, target, weight in zip(subgraph.targets, targets, multiplied, strict=True):
            target.weight.copy_(weight)
            self.scales[name] = columns.clone()
        if subgraph.kind == "norm":
            self.scales[subgraph.source] = scale.clone()
        if shift is not None:
            self.shifts[subgraph.source] = shift.clone()

    def _norm(self, subgraph: Subgraph) -> Any:
        """The norm of a subgraph: a module with a weight ``[C]``."""
        norm = self._modules.get(subgraph.source)
        weight, channels = getattr(norm, "weight", None), self._linear(subgraph.targets[0]).in_features
        if norm is None or not isinstance(weight, Tensor) or weight.shape != (channels,):
            raise UsageError(f"{subgraph.source}: is no norm of {channels} channels in this model; pass architecture=Architecture(...)")
        return norm

    def _scale(self, subgraph: Subgraph, statistics: ActivationStatistics, targets: list[nn.Linear]) -> Tensor:
        """``s[C]`` of a norm's subgraph."""
        weights, biases, cfg = [target.weight for target in targets], [target.bias for target in targets], self.cfg
        if cfg.anti_method == "m1":
            return m1_scale(statistics, weights)
        if cfg.anti_method == "m2":
            scale, threshold = m2_scale(statistics, weights, biases, cfg.w_bit)
            self.choices[subgraph.source] = {} if threshold is None else {"threshold": threshold}
            return scale
        if cfg.anti_method == "m3":
            ratio = m3_ratio(statistics, weights, biases, cfg.w_bit, cfg.w_sym)
            self.choices[subgraph.source] = {"ratio": ratio}
            return m3_scale(statistics, ratio)
        if cfg.anti_method == "m4":
            return m4_scale(statistics, weights, self.architecture.m4_alpha)
        if cfg.anti_method == "m5":
            return m5_scale(statistics)
        alpha, beta = self._exponents(subgraph, statistics, weights)
        return power_scale(statistics.largest, largest_weight(weights), alpha, beta)

    def _linear_scale(
        self, subgraph: Subgraph, statistics: ActivationStatistics, targets: list[nn.Linear], heads: int, head_dim: int
    ) -> Tensor:
        """``s`` of the source's rows, ``[heads * head_dim]`` of key heads: m4 averages the query heads' scales, m6 takes their maxima."""
        weights = [target.weight for target in targets]
        if self.cfg.anti_method == "m4":
            scale = m4_scale(statistics, weights, self.architecture.m4_alpha)
            return scale if scale.numel() == heads * head_dim else scale.reshape(heads, -1, head_dim).mean(1).reshape(-1)
        alpha, beta = self._exponents(subgraph, statistics, weights)
        activation, weight = (widest_of_group(values, heads, head_dim) for values in (statistics.largest, largest_weight(weights)))
        return power_scale(activation, weight, alpha, beta)

    def _exponents(self, subgraph: Subgraph, statistics: ActivationStatistics, weights: list[Tensor]) -> tuple[float, float]:
        flex = self.cfg.flex_config or {}
        alpha, beta = flex.get("alpha"), flex.get("beta")
        if alpha is None or beta is None:
            alpha, beta = m6_exponents(statistics, weights)
        self.choices[subgraph.source] = {"alpha": alpha, "beta": beta}
        return alpha, beta

    def _head_dim(self, subgraph: Subgraph, target: nn.Linear) -> int:
        """How many of the target's channels are one head's; an MLP's are all one head's."""
        if subgraph.kind == "up":
            return target.in_features
        config = getattr(self.model, "config", None)
        counts = [getattr(config, key) for key in HEAD_KEYS if hasattr(config, key)]
        if not counts or target.in_features % counts[-1]:
            raise UsageError(
                f"{subgraph.targets[0]}: {target.in_features} channels in {counts[-1] if counts else 'an unknown number of'} heads;"
                f" the config must say how many in one of {', '.join(HEAD_KEYS)}"
            )
        head_dim: int = target.in_features // counts[-1]
        return head_dim


def check_anti_names(config: AntiOutlierConfig, model: nn.Module) -> None:
    """UsageError for a name in ``disable_anti_names`` that is no linear of the whole ``model``, which may be a shell."""
    modules = dict(model.named_modules())
    for name in config.disable_anti_names or ():
        if not isinstance(modules.get(name), (nn.Linear, nn.Conv2d)):
            raise UsageError(f"disable_anti_names: {name!r} is no linear of this model; give whole names, as in named_modules()")


def value_rows(rows: Rows, out_features: int, in_features: int, head_dim: int) -> Tensor:
    """Which rows of a fused source ``[out]`` a target of ``in_features`` channels reads: int64, ascending.

    :raises UsageError: shapes that the layout called ``rows`` cannot have
    """
    every = torch.arange(out_features)
    if rows == "all":
        chosen = every
    elif rows == "second_half":
        chosen = every[out_features // 2 :]
    else:
        width = (out_features - in_features) // 2
        if width <= 0 or width % head_dim or out_features != in_features + 2 * width:
            raise UsageError(f"a fused source of {out_features} rows cannot hold queries of {in_features}, keys and values")
        grouped = every.reshape(-1, head_dim) if rows == "last" else every.reshape(width // head_dim, -1, head_dim)[:, -1]
        chosen = grouped.reshape(-1)[-width:]
    if chosen.numel() == 0 or in_features % chosen.numel() or chosen.numel() % head_dim:
        raise UsageError(f"a source with {chosen.numel()} rows of values cannot feed a linear of {in_features} channels")
    return chosen


def norms_of(model: nn.Module, norm_class: str | None = None) -> tuple[str, ...]:
    """Names of the model's norms: modules of that class, by default of the first class that is called a norm."""
    classes = {name: _class_name(module) for name, module in model.named_modules()}
    wanted = next((name for name in classes.values() if "norm" in name), "") if norm_class is None else norm_class.lower()
    return tuple(name for name, found in classes.items() if found == wanted)


def _class_name(module: nn.Module) -> str:
    return type(module).__name__.lower()


def _checked_data(data: Sequence[Sample] | None) -> Sequence[Sample]:
    if not isinstance(data, Sequence) or isinstance(data, str) or not data:
        raise UsageError("calib_data: is empty, and a list of samples was wanted, each [input_ids, attention_mask]")
    for index, sample in enumerate(data):
        if not isinstance(sample, (list, tuple, dict)) or not sample:
            raise UsageError(f"calib_data[{index}]: is {sample!r}, and [input_ids, attention_mask] was wanted")
    return data


def _check_scale(subgraph: Subgraph, scale: Tensor) -> None:
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise RefusedError(
            f"{subgraph.source} -> {subgraph.targets[0]}: a scale is not a positive number in {scale.dtype};"
            " smooth the model in a wider dtype, or name the linear in disable_anti_names"
        )


def _check_held(name: str, weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise RefusedError(f"{name}: {weight.dtype} cannot hold its weight after scaling; smooth the model in a wider dtype")


def _shift(norm: Any, linears: Sequence[nn.Linear], shift: Tensor | None) -> None:
    """Take ``shift[C]`` off a norm's output, and add ``W @ shift`` to the biases of the linears that read it."""
    if shift is None:
        return
    if getattr(norm, "bias", None) is None:
        norm.bias = nn.Parameter(torch.zeros_like(norm.weight, dtype=torch.promote_types(norm.weight.dtype, torch.float32)))
        norm.register_forward_hook(_add_bias)
    norm.bias -= shift
    for linear in linears:
        weight = linear.weight.clone()  # the product's last bits depend on how memory is aligned, and a file's tensors lie anywhere
        moved = (shift.unsqueeze(0) @ weight.T).squeeze(0)
        if linear.bias is None:
            linear.bias = nn.Parameter(moved)
        else:
            linear.bias.add_(moved)


def _add_bias(norm: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A forward hook: the output of a norm whose class knows no bias, plus its ``bias``, in the output's dtype."""
    return torch.add(output, norm.get_parameter("bias")).to(output.dtype)
