"""Where the interpreters of real tools are, each in an environment of its own."""

from __future__ import annotations

import os

import pytest


def interpreter(tool: str) -> str:
    """The path of ``tool``'s interpreter. Without one the test is skipped, or fails where CI is set."""
    variable = f"WEIGHBRIDGE_ORACLE_{tool.upper()}"
    python = os.environ.get(variable)
    if python:
        return python
    message = f"{variable} is not set: `make oracles` installs {tool} and runs this test"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
