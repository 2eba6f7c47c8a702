"""Plan, run, prove and report conversions. Each verb of the command line is one function here, with the same options."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checking import CheckReport, check
    from .engine import Result, convert, run
    from .footprint import Footprint, inference_memory
    from .inspection import Report, inspect
    from .lmdeploy_config import Policy, quant_policy
    from .lmdeploy_kv import KvScales, kv_qparams
    from .mending import Diagnosis, doctor
    from .planning import plan
    from .proof import Fingerprint
    from .records import Plan
    from .serving import ServeReport, serve_check
    from .staging import Unfinished, clean
    from .verification import Verdict, fingerprint, verify

__all__ = [
    "CheckReport", "Diagnosis", "Fingerprint", "Footprint", "KvScales", "Plan", "Policy", "Report", "Result", "ServeReport", "Unfinished",
    "Verdict", "check", "clean", "convert", "doctor", "fingerprint", "inference_memory", "inspect", "kv_qparams", "plan", "quant_policy",
    "run", "serve_check", "verify",
]  # fmt: skip

_HOMES = {
    "plan": "planning", "Plan": "records", "convert": "engine", "run": "engine", "Result": "engine",
    "verify": "verification", "Verdict": "verification", "fingerprint": "verification", "Fingerprint": "proof",
    "inspect": "inspection", "Report": "inspection", "check": "checking", "CheckReport": "checking",
    "doctor": "mending", "Diagnosis": "mending", "clean": "staging", "Unfinished": "staging",
    "serve_check": "serving", "ServeReport": "serving", "inference_memory": "footprint", "Footprint": "footprint",
    "kv_qparams": "lmdeploy_kv", "KvScales": "lmdeploy_kv", "quant_policy": "lmdeploy_config", "Policy": "lmdeploy_config",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a verb's module when the verb is first used, so that none pays for the others.

    No module here may have a verb's name: importing it would set the package's attribute to the module.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'convert' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
