"""Settings of the methods that msModelSlim's ``QuantConfig`` has no words for: GPTQ's beyond ``percdamp``, and AWQ's. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from formats.errors import UsageError

from .config import check_flags, check_number, check_whole

__all__ = ["Awq", "Gptq", "LmdeployAwq"]


@dataclass(frozen=True)
class Gptq:
    """Settings, with the published defaults.

    act_order         round the inputs of the largest diagonal first (``desc_act``)
    act_group_aware   the same for groups, and for the inputs within each; not with act_order, which already has them in order
    static_groups     find the groups' scales before anything is rounded, so that act order leaves groups in place
    percdamp          what is added to the diagonal, as a part of its mean, 0 to 1 (``damp_percent``)
    block_size        inputs between two updates of the weight. It decides the speed, not the result
    true_sequential   what reads a rounded linear's output is rounded after it, with that output as its input
    mse               the power of the errors by which scales are searched, 2.4 where tools search; 0: from the largest weights
    """

    act_order: bool = False
    act_group_aware: bool = False
    static_groups: bool = False
    percdamp: float = 0.01
    block_size: int = 128
    mse: float = 0.0
    true_sequential: bool = True

    def __post_init__(self) -> None:
        check_flags(self, "act_order", "act_group_aware", "static_groups", "true_sequential")
        if self.act_order and self.act_group_aware:
            raise UsageError("act_group_aware: act_order already sorts all inputs; choose one of them")
        check_number("percdamp", self.percdamp, 0, 1)
        check_whole("block_size", self.block_size, low=1)
        check_number("mse", self.mse, 0, 10)


@dataclass(frozen=True)
class Awq:
    """Settings of the search for scales and clips, with AutoAWQ's defaults.

    scale, clip   what is searched; grid: candidates of each
    duo_scaling   scales weigh the weights' magnitudes too
    max_shrink    the largest part by which a clip makes a magnitude smaller, 0 to 1
    clip_tokens   tokens by which clips are judged
    """

    scale: bool = True
    clip: bool = True
    grid: int = 20
    duo_scaling: bool = True
    max_shrink: float = 0.5
    clip_tokens: int = 512

    def __post_init__(self) -> None:
        check_flags(self, "scale", "clip", "duo_scaling")
        check_whole("grid", self.grid, low=1)
        check_whole("clip_tokens", self.clip_tokens, low=1)
        check_number("max_shrink", self.max_shrink, 0, 1)


@dataclass(frozen=True)
class LmdeployAwq:
    """Settings of LMDeploy's ``auto_awq`` (``lmdeploy_awq``).

    version        whose arithmetic: "0.1", until 0.4.1, or "0.4.2", since then
    search_scale   search the exponent of every scale, instead of 0.5
    smooth         False: weights are rounded as they are, without data (``--calib-samples 0``)
    """

    version: str = "0.4.2"
    search_scale: bool = False
    smooth: bool = True

    def __post_init__(self) -> None:
        if self.version not in {"0.1", "0.4.2"}:
            raise UsageError(f"version: {self.version!r} is not 0.1 (until 0.4.1) or 0.4.2 (and today)")
        check_flags(self, "search_scale", "smooth")
        if self.search_scale and self.is_old:
            raise UsageError('search_scale: LMDeploy searches since 0.4.2; leave it out, or write version: "0.4.2"')
        if self.search_scale and not self.smooth:
            raise UsageError("search_scale: is of the scales by which inputs are smoothed; leave it out, or smooth: false")

    @property
    def is_old(self) -> bool:
        """Whether it is the first arithmetic."""
        return self.version == "0.1"
