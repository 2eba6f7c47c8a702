"""The errors that Weighbridge raises, as one tree.

::

    WeighbridgeError               exit 1   something failed
    ├── UsageError                 exit 2   the request itself makes no sense
    ├── RefusedError               exit 3   the target cannot hold it, or a loss was not allowed
    │   └── RanksRefusedError      exit 3   it cannot be split over so many ranks
    ├── NotSameError               exit 4   two checkpoints do not hold the same weights
    ├── UnreadableError            exit 5   the input is damaged, contradictory or unsafe
    │   ├── HeaderError            exit 5   a safetensors header or an index breaks its rules
    │   └── ReadFailedError        exit 5   the system could not read a file: trying again may help
    └── DestinationError           exit 1   the output cannot be written where it was asked for

Every message is one sentence that says where (layer or file), what was found, what was wanted,
and what to do. The exit code belongs to the class, so that the command line only looks it up.
"""

from __future__ import annotations

__all__ = [
    "DestinationError",
    "HeaderError",
    "NotSameError",
    "RanksRefusedError",
    "ReadFailedError",
    "RefusedError",
    "UnreadableError",
    "UsageError",
    "WeighbridgeError",
]


class WeighbridgeError(Exception):
    """Base of every error that Weighbridge raises on purpose."""

    exit_code = 1


class UsageError(WeighbridgeError):
    """The request cannot be understood: an unknown format, code or combination of options."""

    exit_code = 2


class RefusedError(WeighbridgeError):
    """A conversion that would need something the target lacks, or a loss that nobody allowed.

    ``refusals`` holds the plan's records (``convert.plan.Refusal``) when a plan raised it.
    """

    exit_code = 3

    def __init__(self, message: str, refusals: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.refusals = refusals


class RanksRefusedError(RefusedError):
    """A model that cannot be split over as many ranks as it was asked for."""


class NotSameError(WeighbridgeError):
    """Weights that should be equal are not."""

    exit_code = 4


class UnreadableError(WeighbridgeError):
    """The input is damaged, contradicts itself, or would be unsafe to follow."""

    exit_code = 5


class ReadFailedError(UnreadableError):
    """The system could not read a file that is there: a failing disk or network. Trying again may help."""


class HeaderError(UnreadableError):
    """A safetensors header or index file that breaks the format's rules."""


class DestinationError(WeighbridgeError):
    """The destination exists, is full, or cannot be written."""
