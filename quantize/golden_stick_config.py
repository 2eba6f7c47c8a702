"""Golden Stick's settings, as a recipe has them: what its ``PTQConfig`` and MindFormers' ``quantization_config`` say. Imports no torch.

============================  ===========================================  ==============================================================
here                          Golden Stick                                 values
============================  ===========================================  ==============================================================
approach                      the class; ``quant_method``                  rtn, smooth_quant, ptq
w_bit                         ``weight_quant_dtype``                       4 (qint4x2), 8 (int8), 16 (None)
a_bit, is_dynamic             ``act_quant_dtype``, ``_granularity``        8 (int8), 16 (None); true: PER_TOKEN
group_size                    ``weight_quant_granularity``, group_size     -1 (PER_CHANNEL), 64, 128 (PER_GROUP)
kv_bit                        ``kvcache_quant_dtype``                      8 (int8), 16 (None)
w_sym                         ``weight_symmetric``                         quant_ckpt sets False with AWQ
outliers_suppression          the same                                     none, smooth, awq
precision_recovery            the same                                     none, gptq
modules_to_not_convert        ``opname_blacklist``                         parts of names, MindFormers' or Hugging Face's
algorithm_args                ``algo_args``                                of smooth: alpha; of awq: duo_scaling, smooth_alpha,
                                                                           weight_clip_ratio; of gptq: block_size, desc_act,
                                                                           damp_percent, static_groups
layer_policies                ``layer_policies``                           {regular expression: settings that differ, or null: float}
============================  ===========================================  ==============================================================

A policy's expression must match the beginning of a linear's name, MindFormers' or Hugging Face's, and settings it does not say are the
network's. ``modules_to_not_convert`` does not count for a linear that a policy matches, as in the tool.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from formats.errors import UsageError
from formats.mindformers_names import names_for

from .config import check_flags, check_number, check_whole

__all__ = ["GoldenStick", "Policy", "names_of_linear"]

APPROACHES = ("rtn", "smooth_quant", "ptq")
SUPPRESSIONS = ("none", "smooth", "awq")
NOT_DONE = ("outlier-suppression+", "outlier-suppression-lite")
"""Ways to suppress outliers that Golden Stick has, and that are not done here."""
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "smooth": {"alpha": 0.5},
    "awq": {
        "duo_scaling": True,
        "smooth_alpha": [step / 20 for step in range(20)],
        "weight_clip_ratio": [1 - step / 20 for step in range(10)],
    },
    "gptq": {"block_size": 128, "desc_act": False, "damp_percent": 0.01, "static_groups": False},
}
"""Arguments of the algorithms, with Golden Stick's defaults."""


@dataclass(frozen=True)
class Policy:
    """How a linear is quantized; the module has the words."""

    w_bit: int = 8
    a_bit: int = 16
    is_dynamic: bool = False
    group_size: int = -1
    w_sym: bool = True
    outliers_suppression: str = "none"
    precision_recovery: str = "none"
    algorithm_args: dict[str, Any] = field(default_factory=dict)

    def argument(self, name: str) -> Any:
        """One of ``algorithm_args``, or its default."""
        defaults = next(known for known in ARGUMENTS.values() if name in known)
        return self.algorithm_args.get(name, defaults[name])

    @property
    def is_static(self) -> bool:
        return self.a_bit == 8 and not self.is_dynamic

    @property
    def needs_data(self) -> bool:
        return self.is_static or self.outliers_suppression != "none" or self.precision_recovery != "none"

    @property
    def kind(self) -> str:
        """The type, in msModelSlim's words."""
        return f"W{self.w_bit}A{self.a_bit}" + ("_DYNAMIC" if self.is_dynamic else "")

    def check(self) -> None:
        """UsageError, "key: why", where the settings contradict each other or cannot be carried out."""
        check_whole("w_bit", self.w_bit, (4, 8, 16))
        check_whole("a_bit", self.a_bit, (8, 16))
        check_whole("group_size", self.group_size, (-1, 64, 128))
        check_flags(self, "is_dynamic", "w_sym")
        if self.outliers_suppression in NOT_DONE:
            raise UsageError(f"outliers_suppression: {self.outliers_suppression!r} is not done here; choose smooth, awq or none")
        if self.outliers_suppression not in SUPPRESSIONS:
            raise UsageError(f"outliers_suppression: {self.outliers_suppression!r} is not one of {', '.join(SUPPRESSIONS)}")
        if self.precision_recovery not in {"none", "gptq"}:
            raise UsageError(f"precision_recovery: {self.precision_recovery!r} is not one of none, gptq")
        self._check_activations()
        if self.w_bit == 16 and self.needs_data:
            raise UsageError("w_bit: 16 leaves the weights in float, and there is nothing to smooth or recover; leave the rest out")
        if self.w_bit == 16 and self.group_size != -1:
            raise UsageError("group_size: is of quantized weights, and w_bit is 16")
        self._check_arguments()

    def _check_activations(self) -> None:
        if self.is_dynamic and self.a_bit != 8:
            raise UsageError("is_dynamic: is of quantized inputs; set a_bit to 8")
        if self.a_bit == 16:
            return
        if self.w_bit == 16:
            raise UsageError("a_bit: Golden Stick does not quantize inputs alone; set w_bit to 8, or a_bit to 16")
        if self.w_bit == 4:
            raise UsageError("a_bit: 4-bit weights with quantized inputs (A8W4) have no spelling here that networks load; set a_bit to 16")
        if self.outliers_suppression == "awq" or self.precision_recovery == "gptq":
            raise UsageError("a_bit: AWQ and GPTQ of Golden Stick are for weights alone; set a_bit to 16")
        if self.group_size != -1:
            raise UsageError("group_size: with quantized inputs Golden Stick has one scale per channel; set it to -1")
        if not self.w_sym:
            raise UsageError("w_sym: with quantized inputs weights are symmetric; set it to true")

    def _check_arguments(self) -> None:
        used = [name for name in (self.outliers_suppression, self.precision_recovery) if name != "none"]
        known = {key for name in used for key in ARGUMENTS[name]}
        for key in self.algorithm_args:
            if key not in known:
                what = (
                    f"its arguments are {', '.join(sorted(known))}"
                    if known
                    else "neither outliers_suppression nor precision_recovery is set"
                )
                raise UsageError(f"algorithm_args: there is no argument {key!r} here; {what}")
        args = self.algorithm_args
        for key in ("alpha", "damp_percent"):
            if key in args:
                check_number(f"algorithm_args: {key}", args[key], 0, 1)
        for key in ("smooth_alpha", "weight_clip_ratio"):
            for value in numbers(args.get(key, 0.5), key):
                check_number(f"algorithm_args: {key}", value, 0, 1)
        for key in ("duo_scaling", "desc_act", "static_groups"):
            if not isinstance(args.get(key, False), bool):
                raise UsageError(f"algorithm_args: {key}: {args[key]!r} is neither True nor False")
        if "block_size" in args:
            check_whole("algorithm_args: block_size", args["block_size"], low=1)
        if self.precision_recovery == "gptq":
            self._check_gptq()

    def _check_gptq(self) -> None:
        if self.argument("desc_act"):
            raise UsageError(
                "algorithm_args: desc_act leaves Golden Stick's codes in the order of the sorted inputs, which its networks do not undo; "
                "set it to false, or use the recipe w4a16-gptq"
            )
        if self.argument("static_groups") and self.group_size != -1 and self.group_size % self.argument("block_size"):
            raise UsageError(
                "algorithm_args: static_groups with a block_size that spans groups takes the first group's scale for all of a block "
                f"in Golden Stick; set block_size to {self.group_size}"
            )


def numbers(value: Any, key: str) -> list[float]:
    """One number, or a list of them."""
    found = value if isinstance(value, list) else [value]
    if not found or any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in found):
        raise UsageError(f"algorithm_args: {key}: {value!r} is neither a number nor a list of numbers")
    return [float(one) for one in found]


def names_of_linear(name: str, model_type: str | None) -> tuple[str, ...]:
    """Hugging Face's name of a linear and MindFormers', alone and as a part of a fused one."""
    names = names_for(model_type)
    found = [name]
    for fuse in (False, True):
        stored = None if names is None else names.stored(f"{name}.weight", fuse)
        if stored is not None:
            found.append(stored[0].removesuffix(".weight"))
    return tuple(dict.fromkeys(found))


_OF_POLICY = tuple(one.name for one in fields(Policy))


@dataclass(frozen=True)
class GoldenStick:
    """A recipe's ``golden_stick`` section; the module has the words."""

    approach: str = "ptq"
    w_bit: int = 8
    a_bit: int = 16
    is_dynamic: bool = False
    group_size: int = -1
    w_sym: bool = True
    kv_bit: int = 16
    outliers_suppression: str = "none"
    precision_recovery: str = "none"
    modules_to_not_convert: list[str] = field(default_factory=lambda: ["lm_head"])
    algorithm_args: dict[str, Any] = field(default_factory=dict)
    layer_policies: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.approach not in APPROACHES:
            raise UsageError(f"approach: {self.approach!r} is not one of {', '.join(APPROACHES)}")
        check_whole("kv_bit", self.kv_bit, (8, 16))
        self._check_approach()
        self.policy.check()
        for pattern in self.layer_policies:
            self._check_policy(pattern)
        if self.w_bit == 16 and self.kv_bit == 16 and not any(self.layer_policies.values()):
            raise UsageError("w_bit: 16, and kv_bit too: nothing would be quantized")
        if self.kv_bit == 8 and any(policy.w_bit == 4 for policy in self.policies):
            raise UsageError("kv_bit: Golden Stick does not quantize the KV cache beside 4-bit weights; set it to 16")

    @property
    def policy(self) -> Policy:
        """The network's."""
        return Policy(**{name: getattr(self, name) for name in _OF_POLICY})

    @property
    def policies(self) -> list[Policy]:
        """All that there are."""
        return [self.policy, *(replace(self.policy, **said) for said in self.layer_policies.values() if said is not None)]

    @property
    def needs_data(self) -> bool:
        """Whether it cannot do without calibration data."""
        return self.kv_bit == 8 or any(policy.needs_data for policy in self.policies)

    def _check_approach(self) -> None:
        wanted: dict[str, dict[str, Any]] = {
            "rtn": {"a_bit": 16, "outliers_suppression": "none", "precision_recovery": "none", "group_size": -1, "w_sym": True},
            "smooth_quant": {"w_bit": 8, "a_bit": 8, "is_dynamic": False, "kv_bit": 16, "outliers_suppression": "smooth", "group_size": -1},
            "ptq": {},
        }
        for name, value in wanted[self.approach].items():
            if getattr(self, name) != value:
                raise UsageError(
                    f"{name}: {getattr(self, name)!r} is not what {self.approach} does; set it to {value!r}, or approach to ptq"
                )
        if self.approach == "rtn" and self.w_bit not in {8, 16}:
            raise UsageError(f"w_bit: RTN of Golden Stick rounds to 8 bits, not {self.w_bit}; set approach to ptq")
        if self.approach == "rtn" and self.w_bit == 8 and self.kv_bit == 8:
            raise UsageError("kv_bit: RTN quantizes weights or the KV cache, not both; set approach to ptq")
        if self.approach != "ptq" and self.layer_policies:
            raise UsageError(f"layer_policies: are PTQ's, and {self.approach} has none; set approach to ptq")
        if self.w_bit != 16 and self.approach == "rtn" and not any(part in "lm_head" for part in self.modules_to_not_convert):
            raise UsageError("modules_to_not_convert: lm_head stays in float here; name it")

    def _check_policy(self, pattern: str) -> None:
        said = self.layer_policies[pattern]
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"layer_policies: {pattern!r} is no regular expression ({error})") from None
        for key in said or {}:
            if key not in _OF_POLICY:
                raise UsageError(f"layer_policies: {pattern!r} has the key {key!r}; those of a policy are {', '.join(_OF_POLICY)}")
        try:
            replace(self.policy, **(said or {})).check()
        except UsageError as error:
            raise UsageError(f"layer_policies: {pattern!r}: {error}") from None

    def policy_of(self, names: Sequence[str]) -> Policy | None:
        """The policy of the linear that goes by ``names``; None: it stays in float.

        :raises UsageError: two expressions match it
        """
        matching = [pattern for pattern in self.layer_policies if any(re.match(pattern, name) for name in names)]
        if len(matching) > 1:
            raise UsageError(f"layer_policies: {matching[0]!r} and {matching[1]!r} both match {names[0]}; only one may")
        if matching:
            said = self.layer_policies[matching[0]]
            found = None if said is None else replace(self.policy, **said)
        else:
            found = None if any(part in name for part in self.modules_to_not_convert for name in names) else self.policy
        return None if found is None or found.w_bit == 16 else found
