"""Bisection: the good rows and only they are applied, in order, in few trips."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypg.core.bisection import Bisection, Failure


def run(rows: int, outcome: Callable[[int, int], Failure | None]) -> tuple[Bisection, list[int], Counter[int]]:
    """Plays the server. Returns the plan, the rows in the order they were applied, and final errors per row."""
    plan = Bisection(rows)
    applied: list[int] = []
    errors: Counter[int] = Counter()
    while (trip := plan.next()) is not None:
        start, end = trip
        assert 0 <= start < end <= rows
        failure = outcome(start, end)
        if failure is None:
            assert plan.passed() == trip
            applied.extend(range(start, end))
        elif plan.failed(failure):
            errors.update(range(start, end))
    return plan, applied, errors


def with_bad(rows: int, bad: set[int]) -> tuple[Bisection, list[int], Counter[int]]:
    return run(rows, lambda start, end: "row" if any(start <= row < end for row in bad) else None)


@st.composite
def groups(draw: st.DrawFn) -> tuple[int, set[int]]:
    rows = draw(st.integers(1, 2000))
    most = draw(st.sampled_from([0, 1, 2, 5, 20, rows]))
    return rows, draw(st.sets(st.integers(0, rows - 1), max_size=min(most, rows)))


@settings(max_examples=400, deadline=None, print_blob=True)
@given(groups())
def test_exactly_the_good_rows_are_applied_in_order(group: tuple[int, set[int]]) -> None:
    rows, bad = group
    plan, applied, errors = with_bad(rows, bad)
    assert applied == [row for row in range(rows) if row not in bad]
    assert errors == Counter(bad)  # each bad row has one error of its own
    assert plan.statuses == tuple("bad" if row in bad else "good" for row in range(rows))
    depth = math.ceil(math.log2(rows)) if rows > 1 else 0
    # Halving costs at most two trips per level and bad row; one by one at most one trip per row on top.
    bound = 1 + len(bad) * (2 * depth + 1)
    if plan.one_by_one:
        halved = math.floor(max(1, 0.05 * rows)) + 1
        bound = min(bound, 1 + halved * (2 * depth + 1)) + rows
    assert plan.trips <= bound


@pytest.mark.parametrize(("bad", "most"), [(0, 1), (1, 21), (2, 40), (10, 160), (50, 600)])
def test_a_thousand_rows_take_few_trips(bad: int, most: int) -> None:
    trips = [with_bad(1000, set(random.Random(seed).sample(range(1000), bad)))[0].trips for seed in range(100)]
    assert max(trips) <= most
    assert bad < 2 or sum(trips) / len(trips) <= 0.9 * most


def test_one_bad_row_among_n_takes_logarithmically_many_trips() -> None:
    for exponent in range(1, 15):
        rows = 2**exponent
        worst = max(with_bad(rows, {row})[0].trips for row in {0, 1, rows // 2, rows - 2, rows - 1} if row >= 0)
        assert worst <= 2 * exponent + 1


@pytest.mark.parametrize("rows", [100, 1000])
def test_many_bad_rows_end_in_one_by_one(rows: int) -> None:
    plan, applied, _ = with_bad(rows, set(range(rows)))
    assert plan.one_by_one
    assert plan.trips <= rows + 2 * math.log2(rows) + 1
    assert applied == []
    every_fifth = set(range(0, rows, 5))
    plan, applied, _ = with_bad(rows, every_fifth)
    assert plan.one_by_one
    assert plan.trips <= 1.25 * rows
    assert len(applied) == rows - len(every_fifth)


def test_few_bad_rows_never_do() -> None:
    for seed in range(200):
        plan, _, _ = with_bad(1000, set(random.Random(seed).sample(range(1000), 50)))
        assert not plan.one_by_one


def test_a_range_known_to_be_bad_is_not_tried_as_a_whole() -> None:
    tried: list[tuple[int, int]] = []

    def outcome(start: int, end: int) -> Failure | None:
        tried.append((start, end))
        return "row" if start <= 7 < end else None

    run(8, outcome)
    assert tried == [(0, 8), (0, 4), (4, 6), (6, 7), (7, 8)]


def test_a_deduction_that_turns_out_wrong_costs_trips_and_no_rows() -> None:
    """The bad row became good meanwhile, e.g. somebody inserted what its foreign key refers to."""
    calls = 0

    def outcome(start: int, end: int) -> Failure | None:
        nonlocal calls
        calls += 1
        return "row" if calls == 1 else None

    plan, applied, errors = run(100, outcome)
    assert applied == list(range(100))
    assert not errors
    assert plan.statuses == ("good",) * 100


@settings(max_examples=300, deadline=None, print_blob=True)
@given(st.integers(1, 300), st.randoms(use_true_random=False))
def test_whatever_the_server_answers_every_row_is_decided_once(rows: int, rng: random.Random) -> None:
    """Outcomes that have nothing to do with the rows: it ends, in order, each row good or bad exactly once."""
    answers: list[Failure | None] = [None, None, "row", "again"]
    plan, applied, errors = run(rows, lambda *_: rng.choice(answers))
    assert applied == sorted(set(applied))
    assert Counter(applied) + errors == Counter(range(rows))
    assert plan.trips <= 3 * (3 * rows + 3)


def test_serialization_failures_repeat_the_group_then_go_one_by_one() -> None:
    tried: list[tuple[int, int]] = []

    def outcome(start: int, end: int) -> Failure | None:
        tried.append((start, end))
        return "again" if end - start > 1 else None

    plan, applied, errors = run(4, outcome)
    assert tried == [(0, 4)] * 3 + [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert applied == [0, 1, 2, 3]
    assert not errors
    assert not plan.one_by_one


def test_a_deadlock_that_passes_on_the_second_try_costs_one_trip() -> None:
    answers: list[Failure | None] = ["again", None]
    plan, applied, _ = run(1000, lambda *_: answers.pop(0))
    assert plan.trips == 2
    assert len(applied) == 1000


def test_a_row_that_deadlocks_three_times_by_itself_is_bad() -> None:
    plan, applied, errors = run(3, lambda start, end: "again" if start <= 1 < end else None)
    assert applied == [0, 2]
    assert errors == Counter([1])
    assert plan.trips == 3 + 1 + 3 + 1


def test_one_range_that_deadlocks_does_not_make_the_others_go_one_by_one() -> None:
    def outcome(start: int, end: int) -> Failure | None:
        if (start, end) == (0, 1000):
            return "row"
        if end <= 500 and end - start > 1:
            return "again"
        return None

    plan, applied, _ = run(1000, outcome)
    assert applied == list(range(1000))
    assert plan.trips <= 1 + 3 + 500 + 10


@pytest.mark.parametrize("at", [1, 2, 3, 7])
def test_stop_leaves_the_rest_untried(at: int) -> None:
    trips = 0

    def outcome(start: int, end: int) -> Failure | None:
        nonlocal trips
        trips += 1
        if trips == at:
            return "stop"
        return "row" if start <= 50 < end else None

    plan, applied, errors = run(100, outcome)
    assert plan.trips == at
    counts = Counter(plan.statuses)
    assert counts["good"] == len(applied)
    assert counts["stopped"] == len(errors)
    assert counts["stopped"] >= 1
    assert counts.total() == 100
    stopped = plan.statuses.index("stopped")
    assert applied == list(range(stopped))
    assert set(plan.statuses[stopped + counts["stopped"] :]) <= {"untried"}


def test_misuse_is_noticed() -> None:
    with pytest.raises(ValueError, match="at least 1 row"):
        Bisection(0)
    plan = Bisection(2)
    with pytest.raises(RuntimeError, match="ask for a range"):
        plan.passed()
    plan.next()
    with pytest.raises(RuntimeError, match="not told"):
        plan.next()
    plan.failed("row")
    with pytest.raises(RuntimeError, match="ask for a range"):
        plan.failed("row")
    assert repr(plan) == "<Bisection of 2 rows: 0 good, 0 bad, 2 untried, 1 trips>"
