"""Regular expressions that come out of a file, matched in bounded time.

Python's ``re`` tries one way after another, and an expression can be written for which there are more ways than anyone can wait
for. Only what visibly has few ways is left to it. For everything else all ways are walked at once: the places in the name that
can be reached are bits of one integer, and each part of the expression maps such a set to the next. Every step is counted, and
work beyond ``BUDGET`` is an error.

The language is that of ``re.match``, without back references, conditions, look-behind and atomic parts. It is ``re`` that
parses, so that what an expression means, and which are none, is said in one place.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from .errors import UnreadableError

try:
    from re import _constants as codes  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as codes
    import sre_parse as parser

BUDGET = 50_000_000
"""Steps that the patterns of one folder may take: some ten seconds, and many times what real folders need."""
LONGEST = 10_000
"""Characters of one pattern."""
LONGEST_NAME = 300
"""Characters of a name that ``re`` is asked about."""
_CASE = 2
"""re.IGNORECASE."""


class Budget:
    """Steps that are left; what: the config's key that has the patterns. UnreadableError when they are used up."""

    def __init__(self, steps: int = BUDGET, what: str = "dynamic") -> None:
        self.what, self._left = what, steps

    def spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise UnreadableError(f"config.json: {self.what}'s patterns take longer to match than any real ones; correct the config")


class _Name:
    """A module's name, and for each class of characters the places where one stands, as bits."""

    def __init__(self, text: str, budget: Budget) -> None:
        self.text, self.length, self.budget = text, len(text), budget
        self.cost = 1 + len(text) // 1024
        self._places: dict[Any, int] = {}

    def literal(self, point: int) -> int:
        """The places of one character."""
        if point not in self._places:
            character, found, place = chr(point), 0, -1
            while (place := self.text.find(character, place + 1)) >= 0:
                self.budget.spend(1)
                found |= 1 << place
            self._places[point] = found
        return self._places[point]

    def places(self, key: Any, holds: Callable[[str], bool]) -> int:
        if key not in self._places:
            self.budget.spend(self.length)
            self._places[key] = sum(1 << place for place, character in enumerate(self.text) if holds(character))
        return self._places[key]


class Pattern:
    """One expression; what: the config's key that has it. ``matches`` says what ``bool(re.match(pattern, name))`` does."""

    def __init__(self, pattern: str, what: str = "dynamic") -> None:
        self._what = what
        if len(pattern) > LONGEST:
            raise UnreadableError(f"config.json: {what} has a pattern of {len(pattern)} characters; {LONGEST} are more than one can need")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._parts: Any = parser.parse(pattern)
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            raise _no_expression(what, pattern, error) from None
        self._ignore_case = bool(self._parts.state.flags & _CASE)
        if self._parts.state.flags & ~(_CASE | 32):  # 32 is re.UNICODE, which every text has
            raise UnreadableError(f"config.json: {what}'s pattern {pattern[:80]!r} sets flags, which are not read; write it without")
        self._pattern = pattern
        self._ways = _ways(self._parts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._quick = None if self._ways is None else re.compile(pattern)

    def matches(self, text: str, budget: Budget) -> bool:
        """Whether ``text`` begins with what the pattern says; UnreadableError when the budget is used up."""
        if self._quick is not None and self._ways is not None and len(text) <= LONGEST_NAME:
            repeats, ways = self._ways
            budget.spend(8 + ways * len(text) ** repeats // 64)
            return self._quick.match(text) is not None
        name = _Name(text, budget)
        try:
            return bool(self._walk(name, self._parts, 1, self._ignore_case))
        except RecursionError as error:
            raise _no_expression(self._what, self._pattern, error) from None

    def _walk(self, name: _Name, parts: Iterable[tuple[Any, Any]], here: int, ignore_case: bool) -> int:
        """The places reached from ``here`` by all parts, one after the other."""
        for kind, said in parts:
            if not here:
                return 0
            name.budget.spend(name.cost)
            here = self._step(name, kind, said, here, ignore_case)
        return here

    def _step(self, name: _Name, kind: Any, said: Any, here: int, ignore_case: bool) -> int:
        if kind in _ONE:
            return (here & self._one(name, kind, said, ignore_case)) << 1
        if kind is codes.SUBPATTERN:
            _, added, dropped, parts = said
            if (added | dropped) & ~_CASE:
                raise UnreadableError(f"config.json: {self._what}'s pattern {self._pattern[:80]!r} sets flags, which are not read")
            return self._walk(name, parts, here, (ignore_case or bool(added & _CASE)) and not dropped & _CASE)
        if kind is codes.BRANCH:
            return functools.reduce(lambda places, parts: places | self._walk(name, parts, here, ignore_case), said[1], 0)
        if kind in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, body = said
            return self._repeat(name, least, most, body, here, ignore_case)
        if kind is codes.AT:
            return here & self._at(name, said)
        if kind in (codes.ASSERT, codes.ASSERT_NOT) and said[0] == 1:
            return sum(bit for bit in _bits(here) if bool(self._walk(name, said[1], bit, ignore_case)) is (kind is codes.ASSERT))
        raise UnreadableError(f"config.json: {self._what}'s pattern {self._pattern[:80]!r} refers back or looks behind, which is not read")

    def _repeat(self, name: _Name, least: int, most: int, parts: Any, here: int, ignore_case: bool) -> int:
        if len(parts) == 1 and parts[0][0] in _ONE and least <= 1 and most >= name.length:
            fits = self._one(name, parts[0][0], parts[0][1], ignore_case)
            here = here if not least else (here & fits) << 1
            return _run(here, fits)  # what one character repeats is what a carry runs through
        reached = here
        for _ in range(least):
            before, reached = reached, self._walk(name, parts, reached, ignore_case)
            if reached == before:  # it may be repeated without moving, or has nowhere to go
                break
        found, new = reached, reached
        for _ in range(most - least):
            new = self._walk(name, parts, new, ignore_case) & ~found
            if not new:
                break
            found |= new
        return found

    def _at(self, name: _Name, said: Any) -> int:
        end = 1 << name.length
        if said in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
            return 1
        if said is codes.AT_END:
            return end | (end >> 1 if name.text.endswith("\n") else 0)
        if said is codes.AT_END_STRING:
            return end
        words = name.places("word", _is_word)
        edges = words ^ (words << 1)
        return edges if said is codes.AT_BOUNDARY else ((end << 1) - 1) & ~edges

    def _one(self, name: _Name, kind: Any, said: Any, ignore_case: bool) -> int:
        """The places of characters that one part of the pattern takes."""
        if kind is codes.LITERAL and not ignore_case:
            return name.literal(said)
        key = (kind, said if kind is not codes.IN else tuple(said), ignore_case)
        return name.places(key, lambda character: _takes(kind, said, character, ignore_case))


_ONE = frozenset({codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN})
"""Parts that take one character."""


def _ways(parts: Any, last: bool = True) -> tuple[int, int] | None:
    """(repeats, ways besides): ``re`` tries at most ``ways * length ** repeats``; None if it may be more than few."""
    repeats, ways = 0, 1
    for number, (kind, said) in enumerate(parts):
        ends = last and number == len(parts) - 1
        inner: list[tuple[int, int] | None] = []
        if kind in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, body = said
            if len(body) != 1 or body[0][0] not in _ONE:
                return None
            repeats += least != most and not ends  # a repeat at the end has nothing after it that could fail
        elif kind is codes.SUBPATTERN:
            inner = [_ways(said[3], ends)]
        elif kind is codes.BRANCH:
            inner = [_ways(branch, ends) for branch in said[1]]
            ways *= len(inner)
        elif kind not in _ONE and kind is not codes.AT:
            return None
        for found in inner:
            if found is None:
                return None
            repeats, ways = repeats + found[0], ways * found[1]
    return (repeats, ways) if repeats <= 2 and ways <= 64 else None


def _takes(kind: Any, said: Any, character: str, ignore_case: bool) -> bool:
    if kind is codes.ANY:
        return character != "\n"
    cases = {character, character.lower(), character.upper()} if ignore_case else {character}
    points = {ord(case) for case in cases if len(case) == 1}
    if kind is codes.LITERAL:
        return said in points
    if kind is codes.NOT_LITERAL:
        return said not in points
    negated = bool(said) and said[0][0] is codes.NEGATE
    return negated is not any(_in_class(kind, what, point) for kind, what in said[negated:] for point in points)


def _in_class(kind: Any, what: Any, point: int) -> bool:
    if kind is codes.LITERAL:
        return bool(point == what)
    if kind is codes.RANGE:
        return bool(what[0] <= point <= what[1])
    character = chr(point)
    name = str(what)  # CATEGORY_DIGIT, CATEGORY_NOT_SPACE, ...
    found = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _is_word}[name.rpartition("_")[2]](character)
    return found is not ("_NOT_" in name)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _run(here: int, fits: int) -> int:
    """Every place that is reached from ``here`` through places of ``fits`` that lie side by side."""
    return (((here & fits) + fits) ^ fits) | here | (here & fits) << 1 if fits else here


def _bits(places: int) -> Iterable[int]:
    while places:
        bit = places & -places
        yield bit
        places ^= bit


def _no_expression(what: str, pattern: str, error: Exception) -> UnreadableError:
    return UnreadableError(f"config.json: {what}'s pattern {pattern[:80]!r} is no regular expression ({error})")
