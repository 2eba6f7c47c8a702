"""What ``--to`` and ``--for`` name: a format in one of its variants, and the consumer that it is written for."""

from __future__ import annotations

from typing import NamedTuple

from formats import FORMATS, check_writable, find_format
from formats.errors import UsageError
from formats.spec import FormatSpec, Variant

__all__ = ["Target", "find_target"]


class Target(NamedTuple):
    """A format to write.

    named      whether the user chose the variant; where not, the planner may take another that holds more
    consumer   a key of ``CONSUMERS``: what it requires and would not find in the folder is refused
    """

    spec: FormatSpec
    variant: Variant
    named: bool = True
    consumer: str | None = None


def find_target(to: str, consumer: str | None = None) -> Target:
    """The target that ``to`` means: ``"gptq"``, ``"gptq:v2"``, or a consumer.

    A consumer's name means the format that it takes best, for it: ``"lmdeploy"`` is ``"awq"`` for lmdeploy. For a consumer, its dialect
    of the format is taken where there is one and no other is named.

    :raises UsageError: no such format, variant or consumer, or two consumers
    :raises RefusedError: the format can only be read
    """
    if consumer is None and to.partition(":")[0] in {spec.name for spec in FORMATS}:
        return _writable(Target(*find_format(to)))
    from .consumers import CONSUMERS

    if consumer is None and to not in CONSUMERS:
        formats = ", ".join(spec.name for spec in FORMATS)
        raise UsageError(f"there is no format {to!r}; there are {formats}; and what loads them: {', '.join(CONSUMERS)}")
    if consumer not in {None, *CONSUMERS}:
        raise UsageError(f"--for {consumer}: there is no such consumer; there are {', '.join(CONSUMERS)}")
    if to in CONSUMERS:
        if consumer not in {None, to}:
            raise UsageError(f"--to {to} --for {consumer}: are two consumers; name a format with --to, or only one of them")
        to, consumer = CONSUMERS[to].instead, to
    assert consumer is not None
    spec, variant, named = find_format(to)
    if not named:
        dialect, prefers = spec.variant(consumer), CONSUMERS[consumer].prefers
        preferred = spec.variant(prefers) if prefers else None
        variant, named = (dialect, True) if dialect is not None else (preferred or variant, False)
    return _writable(Target(spec, variant, named, consumer))


def _writable(target: Target) -> Target:
    check_writable(target.spec, target.variant)
    return target
