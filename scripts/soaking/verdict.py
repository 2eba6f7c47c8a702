"""How a round says that something is wrong."""

from __future__ import annotations

from typing import Any


class WrongError(Exception):
    """A round found what must not be."""


def insist(holds: Any, *what: object) -> None:
    if not holds:
        raise WrongError(" ".join(map(str, what)))
