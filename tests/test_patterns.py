"""Regular expressions out of a file: the same answers as ``re``, in bounded time."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import formats.patterns
from convert.terminal import LONGEST, plain
from formats.errors import UnreadableError
from formats.patterns import Budget, Pattern

ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"[\w.-]", r"\.", r"\d", r"\W", r"\S", r"\b", r"\B", "1", "^", "$", r"\Z"])
REPEATS = st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{0,3}?", "{2,}"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, REPEATS).map(lambda parts: f"(?:{parts[0]}){parts[1]}"),
        st.tuples(inner, inner).map(lambda parts: f"({parts[0]}|{parts[1]})"),
        inner.map(lambda one: f"(?={one})"),
        inner.map(lambda one: f"(?!{one})"),
        inner.map(lambda one: f"(?i:{one})"),
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("asks_re", [True, False])
@given(pattern=EXPRESSIONS, name=st.text("ab1.\nA_-", min_size=1, max_size=8))
@settings(max_examples=1500, deadline=None)
def test_a_pattern_matches_what_re_matches(asks_re: bool, pattern: str, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(formats.patterns, "LONGEST_NAME", 300 if asks_re else -1)
        assert Pattern(pattern).matches(name, Budget()) is bool(re.match(pattern, name))


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("(a+)+b", "a" * 5000),
        ("(?:a|a)*b", "a" * 5000),
        (".*a" * 12 + "b", "a" * 2000),
        ("a?" * 60 + "a" * 60, "a" * 59),
        ("(?:(?:(?:.{0,9999}){0,9999}){0,9999}){0,9999}b", "a" * 200),
        ("(?=(a+)+b)", "a" * 300),
    ],
)
def test_no_pattern_takes_long(pattern: str, name: str) -> None:
    begin = time.monotonic()
    assert not Pattern(pattern).matches(name, Budget())
    assert time.monotonic() - begin < 5


def test_work_beyond_the_budget_is_an_error() -> None:
    with pytest.raises(UnreadableError, match="longer to match"):
        Pattern("(?:(?:a*b*)*c*)*d").matches("abc" * 2000, Budget(10_000))


@pytest.mark.parametrize(
    "pattern", ["(", "*", "a{99999999999999999999}", "(" * 3000 + ")" * 3000, r"(a)\1", "(?<=a)b", "(?s).", "a" * 20_000]
)
def test_what_is_not_read_is_an_error(pattern: str) -> None:
    with pytest.raises(UnreadableError, match="dynamic"):
        Pattern(pattern).matches("a", Budget())


def test_real_rules_cost_next_to_nothing() -> None:
    budget = Budget()
    rules = [Pattern(rule) for rule in (r".*\.18\..*gate.*", r"model\.layers\.(1|2|3)\.mlp\..*", r".*(?:gate|up)_proj")]
    for number in range(10_000):
        assert rules[2].matches(f"model.layers.{number % 60}.mlp.experts.{number}.gate_proj", budget)
        assert rules[0].matches(f"model.layers.{number % 60}.mlp.experts.{number}.gate_proj", budget) is (number % 60 == 18 or number == 18)
    assert budget._left > 0.95 * formats.patterns.BUDGET


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("é 模型 ok", "é 模型 ok"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\r\nb\x07", r"a\r\nb\x07"),
        ("\u202ea\u2028", r"\u202ea\u2028"),
        ("\udc80", r"\udc80"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_a_long_line_is_cut_in_the_middle() -> None:
    line = plain("a" * 50_000 + "end")
    assert len(line) < LONGEST + 60
    assert line.endswith("end")
