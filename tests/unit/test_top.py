"""The statements that take most time: what is shown is true, and what may be missing is bounded."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from raypg.core.sketch import Sketch
from raypg.core.top import Group, TopStatements


def group(name: str, seconds: float, count: int = 1, errors: int = 0) -> Group:
    sketch = Sketch()
    sketch.add(seconds / count, count)
    return Group(name, "SELECT", f"text of {name}", *sketch.take(), errors)


def check(top: TopStatements, truth: Counter[str]) -> None:
    listed = {entry.fingerprint: entry for entry in top.top(1000)}
    for name, seconds in truth.items():
        if name in listed:
            entry = listed[name]
            assert entry.times.total <= seconds + 1e-6
            assert seconds <= entry.at_most + 1e-6
        else:
            assert seconds <= top.floor + 1e-6


@given(st.lists(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 50)), max_size=20), max_size=20))
def test_the_truth_is_within_the_bounds(batches: list[list[tuple[int, int]]]) -> None:
    top, truth = TopStatements(8), Counter[str]()
    for batch in batches:
        seconds = Counter[str]()
        for number, took in batch:
            seconds[str(number)] += took
        truth.update(seconds)
        top.add(group(name, took) for name, took in seconds.items())
        assert len(top) <= 8
    check(top, truth)
    assert top.floor <= 2 * sum(truth.values()) / 8 + 1e-6


def test_a_floor_of_the_senders_widens_the_bounds() -> None:
    top = TopStatements(4)
    top.add([group("a", 5.0)], floor=2.0)
    (entry,) = top.top(10)
    assert (entry.times.total, entry.at_most) == (5.0, 7.0)
    top.add([group("b", 1.0)])
    assert {entry.fingerprint: entry.at_most for entry in top.top(10)} == {"a": 7.0, "b": 3.0}


def test_what_takes_most_time_is_found_among_thousands() -> None:
    rng = random.Random(3)
    top, truth = TopStatements(50), Counter[str]()
    for _ in range(300):
        seconds = Counter({f"rare{rng.randrange(10_000)}": 0.01 for _ in range(40)})
        seconds["nightly"] += 3.0
        seconds["frequent"] += 5.0
        truth.update(seconds)
        top.add(group(name, took) for name, took in seconds.items())
    check(top, truth)
    first, second = top.top(2)
    assert (first.fingerprint, second.fingerprint) == ("frequent", "nightly")
    assert first.missed == second.missed == 0.0


def test_the_slowest_and_the_most_frequent_are_notable_too() -> None:
    top = TopStatements(50)
    for _ in range(30):
        top.add([group("heavy", 10.0), group("heavier", 11.0)])
    top.add([group("slow", 40.0)])
    for _ in range(900):
        top.add([group("cheap", 0.001)])
    assert [entry.fingerprint for entry in top.top(2)] == ["heavier", "heavy"]
    assert [entry.fingerprint for entry in top.notable(1)] == ["heavier", "slow", "cheap"]
    assert [entry.fingerprint for entry in top.notable(9)] == ["heavier", "heavy", "slow", "cheap"]


def test_errors_and_counts_are_added() -> None:
    top = TopStatements(4)
    top.add([group("a", 4.0, count=4, errors=1)])
    top.add([group("a", 2.0, count=2, errors=2)])
    (entry,) = top.top(1)
    assert (entry.times.count, entry.errors, entry.times.total) == (6, 3, 6.0)
