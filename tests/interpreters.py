"""Real tools: where the interpreter of each is, in an environment of its own, and those that are libraries beside ours."""

from __future__ import annotations

import importlib
import os
from typing import Any, NoReturn

import pytest


def interpreter(tool: str) -> str:
    """The path of ``tool``'s interpreter. Without one the test is skipped, or fails where CI is set."""
    variable = f"WEIGHBRIDGE_ORACLE_{tool.upper()}"
    return os.environ.get(variable) or _missing(f"{variable} is not set: `make oracles` installs {tool} and runs this test")


def library(name: str) -> Any:
    """The module ``name``, of a tool that runs in our own interpreter; where it is missing, as ``interpreter``."""
    try:
        return importlib.import_module(name)
    except ImportError:
        _missing(f"{name} is not installed: `make oracles` installs it and runs this test")


def _missing(message: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
