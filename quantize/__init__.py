"""Quantize a model in PyTorch as msModelSlim does: the same classes, arguments and defaults, and the same numbers.

::

    from quantize import AntiOutlier, AntiOutlierConfig, Calibrator, QuantConfig

torch and transformers come with the extra ``[quantize]``. They are imported when a class that needs them is first used; the two
configs need neither.

===================  ==========================================================================================
``config``           ``QuantConfig``, ``AntiOutlierConfig``: every argument, its default, what may go together; ``methods``: GPTQ, AWQ
``devices``          the only module that names a device
``rounding``         weights -> codes, scales, offsets; ``gptq`` and ``awq``: by what their inputs are
``observers``        what calibration remembers of activations, and the scales that follow
``layers``           one linear, quantized: the numbers that a file needs
``fake``             the linear that takes a quantized layer's place in the caller's model
``kv_cache``         scales of an int8 KV cache (C8); ``attention``: of 8-bit attention (FA3)
``stage``            the linears of a model, or of one decoder layer: observed, rounded, calibrated
``calibrator``       ``Calibrator``: which layers, in which order, results; ``saving``: them as files
``anti_outlier``     ``AntiOutlier``: smoothing before quantization
-------------------  ------------------------------------------------------------------------------------------
``blocks``           a decoder, one layer at a time; ``layerwise``: quantized so; ``compensated``: by GPTQ or AWQ
``recipe``           what to do, as YAML; ``run``: ``quantize_model``, a folder into a folder by a recipe
``ways``             layer by layer with ``work`` that outlives a kill, or with the whole model in memory
``streamed``         what needs no data, without torch, at the conversion engine's speed
``lmdeploy_awq``     LMDeploy's ``auto_awq``, with ``lmdeploy_search``; ``lmdeploy_calibration``: ``calibrate``, on ``lmdeploy_text``
``simulate``         what a quantized folder computes
``evaluation``       ``evaluate_model``: perplexity, accuracy, KL divergence of a folder; ``measure`` is its core
``analyze``          ``analyze_model``: which linears suffer from quantization
``tune``             ``tune_model``: which smoothing, and which linears left in float, are enough
``scoring``          ``score_samples``: which samples suffer, and calibration data chosen by it
===================  ==========================================================================================

The numbers follow msModelSlim 26.1.0, whose kernels are compiled: each formula was read off the tensor operations that the real
tool runs, and is tested against files that it wrote.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analyze import analyze_model
    from .anti_outlier import AntiOutlier
    from .calibrator import Calibrator
    from .config import AntiOutlierConfig, QuantConfig
    from .evaluation import evaluate_model
    from .run import quantize_model
    from .scoring import score_samples
    from .tune import tune_model

__all__ = [
    "AntiOutlier", "AntiOutlierConfig", "Calibrator", "QuantConfig", "analyze_model", "evaluate_model", "quantize_model",
    "score_samples", "tune_model",
]  # fmt: skip

_HOMES = {
    "AntiOutlier": "anti_outlier",
    "AntiOutlierConfig": "config",
    "Calibrator": "calibrator",
    "QuantConfig": "config",
    "analyze_model": "analyze",
    "evaluate_model": "evaluation",
    "quantize_model": "run",
    "score_samples": "scoring",
    "tune_model": "tune",
}


def __getattr__(name: str) -> Any:
    """Import a name's module when it is first used, so that the configs need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'quantize' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
