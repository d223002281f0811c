"""Conditions of alerts: read as Python and C would, three-valued as SQL, and nothing else gets through."""

from __future__ import annotations

import contextlib
import math
import random
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from raypg.core.condition import LONGEST, MOST_NESTED, parse, shown
from raypg.core.figures_by_name import FIGURES
from raypg.errors import ConfigError, UnknownFigureError

NAMES = ("error_rate", "queue_depth", "max_connections", "query_execution_ms_p95", "queries.executed")

# --- conditions as trees, which are written down and read again -------------------------------------------------------

Tree = tuple[Any, ...]

numbers = st.recursive(
    st.one_of(
        st.tuples(st.just("number"), st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 100.0, 1e6])),
        st.tuples(st.just("name"), st.sampled_from(NAMES)),
    ),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from("+-*/"), inner, inner),
        st.tuples(st.just("negative"), inner),
    ),
    max_leaves=6,
)
comparisons = st.tuples(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), numbers, numbers)
truths = st.recursive(
    comparisons,
    lambda inner: st.one_of(st.tuples(st.sampled_from(["and", "or"]), inner, inner), st.tuples(st.just("not"), inner)),
    max_leaves=6,
)
values = st.dictionaries(
    st.sampled_from(NAMES),
    st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 100.0, 1e6, math.nan, math.inf]),
    min_size=len(NAMES),
)

STRENGTH = {"or": 1, "and": 2, "not": 3, "<": 4, "<=": 4, ">": 4, ">=": 4, "==": 4, "!=": 4}
STRENGTH |= {"+": 5, "-": 5, "*": 6, "/": 6, "negative": 7, "name": 8, "number": 8}
SPELLINGS = {"and": ["and", "AND", "&&"], "or": ["or", "Or", "||"], "not": ["not ", "NOT ", "!"], "*": ["*", "×"]}
SPELLINGS |= {"/": ["/", "÷"], "-": ["-", "−"], "<=": ["<=", "≤"], ">=": [">=", "≥"], "!=": ["!=", "≠"]}


def written(tree: Tree, rng: random.Random) -> str:
    """With the parentheses that are needed, and some that are not."""
    kind, *parts = tree
    if kind == "name":
        return str(parts[0])
    if kind == "number":
        return rng.choice([repr(parts[0]), f"{parts[0]:g}", f"{parts[0]:e}"])
    word = rng.choice(SPELLINGS.get(kind, [kind]))

    def operand(part: Tree, strictly: bool) -> str:
        weak = STRENGTH[part[0]] < STRENGTH[kind] + strictly
        text = written(part, rng)
        return f"({text})" if weak or rng.random() < 0.1 else text

    if kind == "negative":
        return f"{rng.choice('-−')}{operand(parts[0], False)}"
    if kind == "not":
        return f"{word}{operand(parts[0], False)}"
    left, right = operand(parts[0], STRENGTH[kind] == 4), operand(parts[1], True)
    space = " " if word[0].isalpha() else rng.choice(["", " ", "  "])
    return f"{left}{space}{word}{space}{right}"


def number_of(tree: Tree, figures: dict[str, float]) -> float:
    kind, *parts = tree
    if kind == "number":
        return float(parts[0])
    if kind == "name":
        return figures[parts[0]]
    a, *rest = [number_of(part, figures) for part in parts]
    if kind == "negative":
        return -a
    (b,) = rest
    if kind == "/":
        return a / b if b else math.nan
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b}[kind]()


def truth_of(tree: Tree, figures: dict[str, float]) -> bool | None:
    """By what every value of the unknown would make of it."""
    kind, *parts = tree
    if kind in ("and", "or", "not"):
        told = [truth_of(part, figures) for part in parts]
        outcomes = set()
        for guess in (True, False):
            a, *rest = [guess if each is None else each for each in told]
            b = rest[0] if rest else None
            outcomes.add({"and": a and b, "or": a or b, "not": not a}[kind])
        return outcomes.pop() if len(outcomes) == 1 else None
    a, b = (number_of(part, figures) for part in parts)
    if math.isnan(a) or math.isnan(b):
        return None
    return {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "==": a == b, "!=": a != b}[kind]


def names_in(tree: Tree) -> set[str]:
    kind, *parts = tree
    return {parts[0]} if kind == "name" else set().union(*(names_in(p) for p in parts if isinstance(p, tuple)))


def every_comparison_names_a_figure(tree: Tree) -> bool:
    if STRENGTH[tree[0]] == 4:
        return bool(names_in(tree))
    return all(every_comparison_names_a_figure(part) for part in tree[1:])


@given(truths, values, st.randoms(use_true_random=False))
def test_what_was_written_is_read(tree: Tree, figures: dict[str, float], rng: random.Random) -> None:
    assume(every_comparison_names_a_figure(tree))
    text = written(tree, rng)
    assume(len(text) <= LONGEST)
    condition = parse(text, NAMES)
    assert condition.verdict(figures) is truth_of(tree, figures)
    assert set(condition.names) == names_in(tree)


@given(numbers, values, st.randoms(use_true_random=False), st.sampled_from([-1.0, 0.0, 0.5, 100.0]))
def test_a_bare_figure_is_to_exceed_the_threshold(
    tree: Tree, figures: dict[str, float], rng: random.Random, threshold: float
) -> None:
    assume(names_in(tree))
    condition = parse(written(tree, rng), NAMES, threshold)
    assert condition.is_bare
    value = number_of(tree, figures)
    assert condition.verdict(figures) is (None if math.isnan(value) else value > threshold)
    assert condition.value(figures) == pytest.approx(value, nan_ok=True)


PIECES = [*NAMES, "and", "or", "not", "(", ")", "1", "0.5", "1e400", "+", "-", "*", "/", ">", "<=", "==", "=", "&", " "]


@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=200).map("".join)), values)
def test_whatever_is_written_is_read_or_refused(text: str, figures: dict[str, float]) -> None:
    with contextlib.suppress(ConfigError):
        assert parse(text, NAMES).verdict(figures) in (True, False, None)


def test_deep_and_long() -> None:
    with pytest.raises(ConfigError, match=f"nested more than {MOST_NESTED}"):
        parse("(" * 200 + "error_rate" + ")" * 200 + "> 1", NAMES)
    with pytest.raises(ConfigError, match=f"nested more than {MOST_NESTED}"):
        parse("-" * 200 + "error_rate > 1", NAMES)
    with pytest.raises(ConfigError, match="501 characters are too many"):
        parse("1" * (LONGEST + 1), NAMES)
    chain = "1+" * ((LONGEST - 12) // 2) + "error_rate>0"
    assert len(chain) == LONGEST
    assert parse(chain, NAMES).verdict({"error_rate": 0.0}) is True


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "expected a figure, a number or '(', found its end"),
        ("error_rate >", "expected a figure, a number or '(', found its end"),
        ("error_rate > 5%", "'%' has no meaning (character 15)"),
        ("queue_depth > 100ms", "expected an operator or the end, found 'ms' (character 18)"),
        ("error_rate = 1", "write == to compare (character 12)"),
        ("(error_rate > 1", "expected ')', found its end"),
        ("1 < error_rate < 2", "comparisons cannot be chained; write a < b and b < c"),
        ("1 > 0 or error_rate > 1", "it compares two numbers"),
        ("1", "it names no figure"),
        ("error_rate", "it compares nothing; give a threshold, or write e.g. error_rate > 100"),
        ("error_rate and queue_depth > 1", "and, or, not stand between comparisons"),
        ("not error_rate", "and, or, not stand between comparisons"),
        ("(error_rate > 1) + 1 > 2", "a comparison is no number"),
        ("-(error_rate > 1)", "a comparison is no number"),
        ("(error_rate > 1) == 1", "a comparison is no number"),
        ("error_rate > 1e999", "1e999 is too large"),
        ("__import__('os') > 1", '"\'" has no meaning (character 12)'),
        ("__import__(error_rate) > 1", "there is no figure '__import__'"),
        ("error_rate.__class__ > 1", "there is no figure 'error_rate.__class__' (did you mean 'error_rate'?)"),
    ],
)
def test_what_is_wrong_is_said(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, NAMES)
    assert complaint in str(caught.value)


def test_an_unknown_figure_comes_with_those_that_there_are() -> None:
    with pytest.raises(UnknownFigureError) as caught:
        parse("avg_query_time > 100", FIGURES)
    assert caught.value.nearest == "avg_query_time_ms"
    assert caught.value.known == tuple(sorted(FIGURES))


@pytest.mark.parametrize(
    ("text", "threshold"),
    [
        ("queue_depth > 100", 100),
        ("queue_depth > 50 * 2", 100),
        ("100 < queue_depth", 100),
        ("error_rate > 0.05 and queue_depth > 100", 100),
        ("queue_depth > 0.1 + 0.2", 0.3),
        ("queue_depth >= -100", -100),
    ],
)
def test_a_threshold_that_the_condition_says_too(text: str, threshold: float) -> None:
    assert not parse(text, NAMES, threshold).is_bare


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("queue_depth > 99", "it compares with 99, but threshold is 100"),
        ("error_rate > 0.05 and queue_depth > 99", "it compares with 0.05, 99, but threshold is 100"),
        ("queue_depth > max_connections", "it compares with no number, but threshold is 100"),
    ],
)
def test_a_threshold_that_contradicts(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, NAMES, 100)
    assert complaint in str(caught.value)


def test_what_is_shown_of_it() -> None:
    figures = {"error_rate": 0.25, "queue_depth": 7.0}
    assert parse("error_rate * 100 > 5 and queue_depth > 1", NAMES).value(figures) == 25
    assert parse("5 < queue_depth", NAMES).value(figures) == 7
    shown_as = {0.25: "0.25", 7.0: "7", 12345.678: "12346", 153.2199: "153.2", math.nan: "unknown", math.inf: "inf"}
    assert {value: shown(value) for value in shown_as} == shown_as
    assert shown(1e20) == "1e+20"
