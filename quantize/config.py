"""What to do: ``QuantConfig`` and ``AntiOutlierConfig``, with every argument and default of msModelSlim 26.1.0.

Both are plain values and import no torch. A setting that makes no sense is a ``UsageError`` when the config is made, as it is in
msModelSlim; what a config means for the calibrator (its *derived* fields) is worked out at the same time.

Quirks of msModelSlim that are kept, because scripts depend on them:

1. ``mm_tensor`` is True by default: one scale for the whole weight. ``weight_quant()`` sets it again, to its own default.
2. ``group_size`` counts only with ``is_lowbit=True, open_outlier=False`` and activations in 16 bits (or W4A8); else it becomes -1.
3. ``co_sparse=True`` makes w_bit 4 and a_bit 8, whatever was asked.
4. Weights of a model with 8-bit activations are symmetric; the activations are not, except for W4A8_DYNAMIC.
"""

from __future__ import annotations

import copy
import fnmatch
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from formats.errors import UsageError

from .devices import device_name

__all__ = ["ANTI_METHODS", "GROUP_SIZES", "MIX_TYPES", "AntiOutlierConfig", "QuantConfig"]

GROUP_SIZES = (32, 64, 128, 256)
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
TENSOR_PARALLEL_SIZES = (2, 4, 8, 16)
WEIGHT_METHODS = ("MinMax", "GPTQ", "HQQ", "NF")
ANTI_METHODS = ("m1", "m2", "m3", "m4", "m5", "m6")
MIX_TYPES = ("w8a8", "w8a16", "w8a8_dynamic", "float", "w4a8_dynamic")
"""What ``Calibrator``'s ``mix_cfg`` may ask for."""

logger = logging.getLogger(__name__)


def check_whole(name: str, value: object, choices: tuple[int, ...] | None = None, low: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name}: {value!r} is not a whole number")
    if choices is not None and value not in choices:
        raise UsageError(f"{name}: {value} is not one of {', '.join(map(str, choices))}")
    if low is not None and value < low:
        raise UsageError(f"{name}: {value} is less than {low}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"{name}: {value!r} is not a number")
    if not low <= value <= high:
        raise UsageError(f"{name}: {value} is not between {low} and {high}")


def check_flags(config: object, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise UsageError(f"{name}: {getattr(config, name)!r} is neither True nor False")


def _strings(name: str, value: object) -> None:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{name}: {value!r} is not a list of layer names")


@dataclass
class QuantConfig:
    """How ``Calibrator`` quantizes.

    w_bit, a_bit          bits of weights (4, 8; 16: float) and of activations (4, 8, 16)
    act_method            static activations: 1 min-max, 2 histogram, 3 histogram for calm layers, min-max for wild ones
    w_method              MinMax, GPTQ, HQQ, NF
    disable_names         linears that stay float
    pr                    probability that calibration passes on an activation's quantized value; below 1 it is random
    mm_tensor             one scale for the whole weight; False: one for each output channel
    dev_type, dev_id      cpu, npu or gpu, and which
    fraction              share of weights that count as outliers, 0.01 to 0.1 (sparse)
    nonuniform            non-uniform sparse quantization
    co_sparse             W8A8S by msModelSlim's first method
    w_sym                 weights without offset
    is_lowbit             its second method: W8A8S, per-group W4A16 and W8A16, W4A8
    do_smooth             smooth activations within it (W8A8S)
    use_sigma, sigma_factor   outliers are beyond this many (3 to 4) standard deviations, instead of a fraction
    disable_last_linear   leave the last linear, which is usually the head, float
    use_kvcache_quant     int8 KV cache; see ``kv_quant``
    open_outlier          tell outliers from other weights (False with is_lowbit: per group)
    is_dynamic            activation scales by token at run time
    group_size            32, 64, 128 or 256 (quirk 2)
    percdamp              GPTQ's dampening, 0 to 1
    pdmix                 W8A8 for prefill by token and for decoding by tensor, in one file (ascendV1)

    Derived: ``model_quant_type`` (what the description calls the model), ``is_per_group``, ``a_sym``, ``is_stage_quant`` (W4A8's
    two stages), ``do_msd`` (calibration passes 16-bit activations through a three-fold integer split), ``device`` (PyTorch's name).
    """

    w_bit: int = 8
    a_bit: int = 8
    act_method: int = 1
    w_method: str = "MinMax"
    disable_names: list[str] | None = None
    pr: float = 1.0
    mm_tensor: bool = True
    dev_type: str = "cpu"
    dev_id: int | None = None
    fraction: float = 0.01
    nonuniform: bool = False
    co_sparse: bool = False
    w_sym: bool = True
    is_lowbit: bool = False
    do_smooth: bool = False
    use_sigma: bool = False
    sigma_factor: float = 3.0
    disable_last_linear: bool = True
    use_kvcache_quant: bool = False
    open_outlier: bool = True
    is_dynamic: bool = False
    group_size: int = 64
    percdamp: float = 0.01
    pdmix: bool = False

    kv_sym: bool = field(default=True, init=False)
    use_fa_quant: bool = field(default=False, init=False)
    fa_amp: int = field(default=0, init=False)
    use_timestep_quant: bool = field(default=False, init=False)
    max_dynamic_step: int | None = field(default=None, init=False)
    tp_size: int | None = field(default=None, init=False)
    enable_communication_quant: bool = field(default=False, init=False)
    enable_per_device_quant: bool = field(default=False, init=False)
    block_size: int | None = field(default=None, init=False)

    model_quant_type: str = field(default="UNKNOWN", init=False)
    is_per_group: bool = field(default=False, init=False)
    a_sym: bool = field(default=False, init=False)
    is_stage_quant: bool = field(default=False, init=False)
    do_msd: bool = field(default=False, init=False)
    device: str = field(default="cpu", init=False)

    def __post_init__(self) -> None:
        self._settle()

    def weight_quant(
        self, w_method: str = "MinMax", mm_tensor: bool = True, w_sym: bool = True, group_size: int = 64, block_size: int = 64
    ) -> QuantConfig:
        """Weights only (W8A16, W4A16, NF4). Its defaults replace what was set before (quirk 1). Returns this config."""
        check_whole("block_size", block_size, BLOCK_SIZES)
        return self._changed(w_method=w_method, mm_tensor=mm_tensor, w_sym=w_sym, group_size=group_size, block_size=block_size)

    def weight_activation_quant(self, act_method: int = 1, pr: float = 1.0, is_dynamic: bool = False) -> QuantConfig:
        """Weights and activations (W8A8). Returns this config."""
        return self._changed(act_method=act_method, pr=pr, is_dynamic=is_dynamic)

    def sparse_quant(
        self,
        act_method: int = 1,
        fraction: float = 0.01,
        nonuniform: bool = False,
        is_lowbit: bool = False,
        do_smooth: bool = False,
        use_sigma: bool = False,
        sigma_factor: float = 3.0,
    ) -> QuantConfig:
        """Sparse weights (W8A8S). Returns this config."""
        return self._changed(
            act_method=act_method,
            fraction=fraction,
            nonuniform=nonuniform,
            is_lowbit=is_lowbit,
            do_smooth=do_smooth,
            use_sigma=use_sigma,
            sigma_factor=sigma_factor,
            co_sparse=True,
        )

    def kv_quant(self, kv_sym: bool = True) -> QuantConfig:
        """An int8 KV cache as well (C8), with or without offsets. Returns this config."""
        if not isinstance(kv_sym, bool):
            raise UsageError(f"kv_sym: {kv_sym!r} is neither True nor False")
        return self._changed(use_kvcache_quant=True, kv_sym=kv_sym)

    def fa_quant(self, fa_amp: int = 0) -> QuantConfig:
        """Attention in 8 bits as well (FA3); ``fa_amp`` of its layers stay float. Returns this config."""
        check_whole("fa_amp", fa_amp, low=0)
        return self._changed(use_fa_quant=True, fa_amp=fa_amp)

    def timestep_quant(self, max_dynamic_step: int | None = None) -> QuantConfig:
        """Activation scales by time step, for diffusion models. Returns this config."""
        check_whole("max_dynamic_step", max_dynamic_step, low=0)
        return self._changed(use_timestep_quant=True, max_dynamic_step=max_dynamic_step)

    def simulate_tp(self, tp_size: int, enable_communication_quant: bool = True, enable_per_device_quant: bool = True) -> QuantConfig:
        """Quantize as ``tp_size`` devices would, each its part. Returns this config."""
        check_whole("tp_size", tp_size, TENSOR_PARALLEL_SIZES)
        for name, value in (
            ("enable_communication_quant", enable_communication_quant),
            ("enable_per_device_quant", enable_per_device_quant),
        ):
            if not isinstance(value, bool):
                raise UsageError(f"{name}: {value!r} is neither True nor False")
        return self._changed(
            tp_size=tp_size,
            enable_communication_quant=enable_communication_quant,
            enable_per_device_quant=enable_per_device_quant,
        )

    def for_layer(self, mix_type: str) -> QuantConfig:
        """The config of a layer that ``mix_cfg`` calls ``mix_type``: this one with that type's bits.

        :raises UsageError: this config cannot become it (msModelSlim derives the W8 types from a W8 config only)
        """
        if mix_type not in MIX_TYPES:
            raise UsageError(f"mix_cfg: {mix_type!r} is not one of {', '.join(MIX_TYPES)}")
        if mix_type == "float":
            return QuantConfig(w_bit=16, a_bit=16)
        if mix_type == self.model_quant_type.lower():
            return self
        if self.w_bit != 8 or mix_type == "w4a8_dynamic":
            raise UsageError(f"mix_cfg: a {self.model_quant_type} config cannot have {mix_type} layers; only W8 types mix, and float")
        try:
            return copy.copy(self)._changed(
                w_bit=8, a_bit=16 if mix_type == "w8a16" else 8, is_dynamic=mix_type == "w8a8_dynamic", pdmix=False
            )
        except UsageError as error:
            raise UsageError(f"mix_cfg: this config cannot have {mix_type} layers: {error}") from error

    def of_linear(self, name: str, mix_cfg: Mapping[str, str]) -> QuantConfig:
        """The config of linear ``name``: what ``mix_cfg`` says of it by name, else by the first of its patterns that matches."""
        kind = mix_cfg.get(name) or next((kind for rule, kind in mix_cfg.items() if fnmatch.fnmatchcase(name, rule)), None)
        return self if kind is None else self.for_layer(kind)

    def _changed(self, **fields: Any) -> QuantConfig:
        """Set fields and settle them; on an error nothing is changed."""
        before = dict(vars(self))
        vars(self).update(fields)
        try:
            self._settle()
        except UsageError:
            vars(self).update(before)
            raise
        return self

    def _settle(self) -> None:
        """Check every field against the others, and derive what follows."""
        self.disable_names = [] if self.disable_names is None else self.disable_names
        self._check_types()
        self._settle_sparse()
        if self.act_method == 3 and self.is_lowbit:
            raise UsageError("act_method: 3 does not go with is_lowbit; use 1 or 2")
        if self.is_dynamic and (self.w_bit not in (4, 8) or self.a_bit == 16):
            raise UsageError(f"is_dynamic: w_bit must be 4 or 8 and a_bit 4 or 8, not {self.w_bit} and {self.a_bit}")
        self._settle_groups()
        self._check_nf()
        self._settle_type()
        if self.pdmix and self.model_quant_type != "W8A8":
            raise UsageError(f"pdmix: is for static W8A8, and this config makes {self.model_quant_type}")

    def _check_types(self) -> None:
        check_whole("w_bit", self.w_bit)
        check_whole("a_bit", self.a_bit)
        check_whole("act_method", self.act_method, (1, 2, 3))
        if self.w_method not in WEIGHT_METHODS:
            raise UsageError(f"w_method: {self.w_method!r} is not one of {', '.join(WEIGHT_METHODS)}")
        _strings("disable_names", self.disable_names)
        check_flags(self, "mm_tensor", "nonuniform", "co_sparse", "w_sym", "is_lowbit", "do_smooth", "use_sigma", "disable_last_linear")
        check_flags(self, "use_kvcache_quant", "open_outlier", "is_dynamic", "pdmix")
        check_whole("group_size", self.group_size)
        check_number("pr", self.pr, float("-inf"), float("inf"))
        check_number("percdamp", self.percdamp, 0, 1)
        check_number("fraction", self.fraction, 0.01, 0.1)
        check_number("sigma_factor", self.sigma_factor, 3.0, 4.0)
        self.device = device_name(self.dev_type, self.dev_id)
        if self.a_bit == 8 and not self.w_sym:
            raise UsageError("w_sym: must be True when a_bit is 8; weights with offsets need a_bit 16")
        if self.use_kvcache_quant and self.use_fa_quant:
            raise UsageError("the KV cache and attention (fa_quant) cannot both be quantized; choose one")

    def _settle_sparse(self) -> None:
        if self.co_sparse and self.is_lowbit:
            self.co_sparse = False  # is_lowbit is the other way to W8A8S, and wins
        if self.co_sparse:
            self.pr = 1.0
            if (self.w_bit, self.a_bit) != (4, 8):
                logger.warning("co_sparse: w_bit and a_bit become 4 and 8 (they were %d and %d)", self.w_bit, self.a_bit)
                self.w_bit, self.a_bit = 4, 8
        elif self.is_lowbit and self.w_bit == 4:
            check_number("pr", self.pr, 0, 1)
            check_whole("a_bit", self.a_bit, (8, 16))

    def _settle_groups(self) -> None:
        weights_only_or_w4a8 = self.a_bit == 16 or (self.w_bit, self.a_bit) == (4, 8)
        self.is_per_group = weights_only_or_w4a8 and self.is_lowbit and not self.open_outlier
        if self.is_per_group:
            check_whole("group_size", self.group_size, GROUP_SIZES)
            self.do_smooth = False
            self.mm_tensor = False
        else:
            self.group_size = -1
            if self.is_lowbit and self.w_method in ("HQQ", "GPTQ"):
                raise UsageError(f"w_method: {self.w_method} with is_lowbit is only per group; set open_outlier=False and a_bit=16")
        self.do_msd = self.is_per_group
        self.a_sym = self.is_stage_quant = False
        sparse = self.co_sparse or (self.is_lowbit and not self.is_dynamic)
        if (self.w_bit, self.a_bit) == (4, 8) and not sparse:
            if not (self.is_dynamic and self.is_per_group):
                raise UsageError("W4A8: needs is_dynamic=True, is_lowbit=True and open_outlier=False, with a group_size")
            self.a_sym = self.is_stage_quant = True
            self.do_msd = False
        if (self.w_bit, self.a_bit) == (4, 4) and not (
            self.is_dynamic and self.w_method == "MinMax" and self.w_sym and self.disable_last_linear
        ):
            raise UsageError("W4A4: needs is_dynamic=True, w_method='MinMax', w_sym=True and disable_last_linear=True")

    def _check_nf(self) -> None:
        if self.w_method != "NF":
            return
        if (self.w_bit, self.a_bit) != (4, 16):
            raise UsageError(f"w_method: NF needs w_bit 4 and a_bit 16, not {self.w_bit} and {self.a_bit}")
        if self.is_lowbit or self.use_fa_quant or self.use_kvcache_quant or self.tp_size is not None:
            raise UsageError("w_method: NF goes neither with is_lowbit, nor with kv_quant, fa_quant or simulate_tp")

    def _settle_type(self) -> None:
        bits = (self.w_bit, self.a_bit)
        if bits == (8, 8) and self.use_timestep_quant:
            kind = "W8A8_TIMESTEP"
        elif self.is_dynamic:
            kind = {(8, 8): "W8A8_DYNAMIC", (4, 8): "W4A8_DYNAMIC", (4, 4): "W4A4_FLATQUANT_DYNAMIC"}.get(bits, "UNKNOWN")
        elif self.co_sparse or (bits == (4, 8) and self.is_lowbit):
            kind = "W8A8S"
        else:
            kind = {(8, 8): "W8A8", (8, 16): "W8A16", (4, 16): "W4A16", (16, 16): "FLOAT"}.get(bits, "UNKNOWN")
        if kind == "W4A16" and self.w_method == "NF":
            kind = "NF4"
        if kind == "UNKNOWN":
            raise UsageError(f"w_bit {self.w_bit} with a_bit {self.a_bit}: no such quantization; there is W8A8, W8A16, W4A16, W4A8, W4A4")
        self.model_quant_type = kind


_FLEX_KEYS: dict[str, Callable[[Any], bool]] = {
    name: lambda value: value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for name in ("alpha", "beta")
}


@dataclass
class AntiOutlierConfig:
    """How ``AntiOutlier`` smooths activations before quantization.

    w_bit, a_bit          bits of the quantization to come: 4 or 8; 8, or 16 with m3
    anti_method           m1 SmoothQuant, m2 its msModelSlim variant, m3 AWQ, m4 iterative smoothing, m5 CBQ, m6 flexible smoothing
    dev_type, dev_id      cpu, npu or gpu, and which
    w_sym                 weights without offset; False only with m3
    disable_anti_names    modules whose group is left alone (m3, m4, m6)
    flex_config           m6: {"alpha": .., "beta": ..}, both or (to search) neither

    Derived: ``device`` (PyTorch's name).
    """

    w_bit: int = 8
    a_bit: int = 8
    anti_method: str = "m2"
    dev_type: str = "cpu"
    dev_id: int | None = None
    w_sym: bool = True
    disable_anti_names: list[str] | None = None
    flex_config: dict[str, float | None] | None = None

    device: str = field(default="cpu", init=False)

    def __post_init__(self) -> None:
        self.disable_anti_names = [] if self.disable_anti_names is None else self.disable_anti_names
        flex: dict[str, float | None] = {"alpha": None, "beta": None}
        self.flex_config = flex if self.flex_config is None else flex | self.flex_config
        self.device = device_name(self.dev_type, self.dev_id)
        if self.anti_method not in ANTI_METHODS:
            raise UsageError(f"anti_method: {self.anti_method!r} is not one of {', '.join(ANTI_METHODS)}")
        check_whole("w_bit", self.w_bit, (4, 8))
        check_whole("a_bit", self.a_bit, (8, 16) if self.anti_method == "m3" else (8,))
        check_flags(self, "w_sym")
        _strings("disable_anti_names", self.disable_anti_names)
        if not self.w_sym and self.anti_method != "m3":
            raise UsageError("w_sym: False goes with anti_method m3 only")
        for key, value in self.flex_config.items():
            if key not in _FLEX_KEYS:
                raise UsageError(f"flex_config: {key!r} is not one of alpha, beta")
            if not _FLEX_KEYS[key](value):
                raise UsageError(f"flex_config: {key} is {value!r}, not a number")
