"""Figures by time: in the right slots, in fixed memory, and with gaps where nobody has looked."""

from __future__ import annotations

import math
import pickle

import pytest

from raypg.core.history import SERIES, History, bytes_needed
from raypg.core.sketch import Sketch

START = 1_000_000.0
LEVELS = {"active": 2.0, "idle": 1.0, "total": 3.0, "waiting": 0.0}


def tell(history: History, now: float, queries: int, seconds: float = 1.0, took: float = 0.01) -> bool:
    sketch = Sketch()
    sketch.add(took, max(queries, 1))
    times = {"execution": [sketch.take()]} if queries else {}
    return history.add(now, seconds, {"queries": queries, "execution_seconds": queries * took}, LEVELS, times)


def values(history: History, series: str, seconds: float, now: float) -> list[float]:
    return [value for _, value in history.values(series, seconds, now)[1]]


def test_each_ring_adds_up_the_same() -> None:
    history = History(60)
    for second in range(1200):
        assert tell(history, START + second, queries=second % 7)
    now = START + 1199
    assert sum(values(history, "queries", 120, now)) == sum(second % 7 for second in range(1080, 1200))
    step, points = history.values("queries", 1200, now)
    assert step == 10
    assert sum(value for _, value in points) == pytest.approx(sum(second % 7 for second in range(1200)), abs=70)
    step, points = history.values("queries", 3600, now)
    assert step == 60
    known = [value for _, value in points if not math.isnan(value)]
    assert sum(known) == sum(second % 7 for second in range(1200))
    assert len(points) == 60


def test_a_time_in_which_nobody_looked_is_a_gap_and_nothing_is_a_zero() -> None:
    history = History(10)
    for second in (0, 1, 2):
        tell(history, START + second, queries=5)
    tell(history, START + 3, queries=0)
    assert not tell(history, START + 20, queries=100, seconds=17.0)  # only the sum is known
    tell(history, START + 21, queries=5)
    found = values(history, "queries", 22, START + 21)
    assert found[:4] == [5, 5, 5, 0]
    assert all(math.isnan(value) for value in found[4:20])
    assert found[20:] == [0, 5]


def test_quantiles_of_a_slot() -> None:
    history = History(10)
    tell(history, START, queries=95, took=0.010)
    tell(history, START + 0.5, queries=5, took=0.500)
    assert values(history, "p50_ms", 1, START) == [pytest.approx(10, rel=0.01)]
    assert values(history, "p99_ms", 1, START) == [pytest.approx(500, rel=0.01)]
    tell(history, START + 1, queries=0)
    assert math.isnan(values(history, "p95_ms", 1, START + 1)[0])


def test_what_comes_late_is_put_where_it_belongs() -> None:
    history = History(10)
    tell(history, START, queries=1)
    tell(history, START + 5, queries=1)
    tell(history, START + 2, queries=3)
    found = values(history, "queries", 6, START + 5)
    assert found[0] == 1
    assert found[2] == 3
    assert found[5] == 1
    tell(history, START + 5 - 300, queries=9)  # of a time that the ring of seconds has left behind
    assert sum(value for value in values(history, "queries", 6, START + 5) if not math.isnan(value)) == 5


def test_rates_are_of_the_time_that_was_looked_at() -> None:
    history = History(10)
    assert history.rate("queries", START, 10) == 0.0
    tell(history, START, queries=7)
    assert history.rate("queries", START, 10) == 7
    for second in range(1, 10):
        tell(history, START + second, queries=20)
    assert history.rate("queries", START + 10, 5) == 20
    assert history.rate("queries", START + 9.9, 5) == pytest.approx(20, abs=1)
    assert history.rate("queries", START + 60, 10) == 0.0


def test_memory_is_fixed() -> None:
    history = History(60)

    def size() -> int:
        return len(pickle.dumps(history))

    tell(history, START, queries=1)
    before = size()
    for second in range(5000):
        tell(history, START + second, queries=3)
    assert size() <= before + 2000
    assert bytes_needed(60) == 300 * 8 * (len(SERIES) + 1) < 75_000
    assert bytes_needed(7 * 24 * 60) < 2_400_000


def test_resizing_keeps_what_fits() -> None:
    history = History(10)
    for minute in range(10):
        tell(history, START + 60 * minute, queries=minute)
    history.resize(120)
    now = START + 540
    assert sum(v for v in values(history, "queries", 7200, now) if not math.isnan(v)) == sum(range(10))
    history.resize(3)
    assert [v for v in values(history, "queries", 180, now) if v > 0] == [7, 8, 9]


def test_an_unknown_series() -> None:
    with pytest.raises(KeyError):
        History(1).values("nothing", 10, START)


def test_waiting_has_quantiles_of_its_own() -> None:
    history = History(10)
    waited = Sketch()
    waited.add(0.2, 3)
    history.add(START, 1.0, {"acquired": 3}, LEVELS, {"wait": [waited.take()]})
    assert values(history, "wait_p95_ms", 1, START) == [pytest.approx(200, rel=0.01)]
    assert math.isnan(values(history, "p95_ms", 1, START)[0])


def test_all_series_at_once_are_the_same_as_one_by_one() -> None:
    history = History(10)
    for second in (0, 1, 5):
        tell(history, START + second, queries=second)
    now = START + 7
    step, start, found = history.all_values(30, now)
    assert set(found) == set(SERIES)
    for series in SERIES:
        own_step, points = history.values(series, 30, now)
        assert (own_step, points[0][0]) == (step, start)
        assert str([value for _, value in points]) == str(found[series])  # NaN is not equal to itself


def test_the_newest_second_is_one_that_is_over() -> None:
    history = History(10)
    tell(history, START, queries=5)
    tell(history, START + 1, queries=7)
    at, found = history.newest(START + 1.2)
    assert (at, found["queries"], found["active"]) == (START, 5, 2)
    assert math.isnan(history.newest(START + 3)[1]["queries"])


def test_a_history_of_another_layout_is_not_taken_over() -> None:
    history = History(10)
    assert pickle.loads(pickle.dumps(history)).series == SERIES
    history.series = SERIES[1:]
    with pytest.raises(ValueError, match="other series"):
        pickle.loads(pickle.dumps(history))
