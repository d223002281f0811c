"""Which replica is to answer: what it is, how far it is behind, how long it would take."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypg.core.replicas import Candidate, PrimaryLog, Role, Service, Standing, fastest, judge


def primary(lsn: int, timeline: int = 1, system: int = 7) -> Role:
    return Role(False, system, "p", timeline, lsn, None)


def standby(timeline: int = 1, system: int = 7) -> Role:
    return Role(True, system, "s", timeline, 50, 0.1)


def log_of(*samples: tuple[float, int]) -> PrimaryLog:
    log = PrimaryLog()
    for at, lsn in samples:
        log.note(at, primary(lsn))
    return log


def at(replayed: int, asked: float, age: float | None = None) -> Standing:
    return Standing("r", "standby", "0.s.1", 1, replayed, asked, age, "")


def test_an_idle_primary_makes_nobody_late() -> None:
    log = log_of((0.0, 100), (1000.0, 100))
    assert log.lag(at(100, 1000.2, age=1000.0)) == 0.0
    assert log.lag_bytes(at(100, 1000.2)) == 0
    assert log.staleness(100, 1000.2) == pytest.approx(0.2)


def test_a_replica_is_as_old_as_the_last_place_that_it_has_reached() -> None:
    log = log_of((0.0, 100), (10.0, 200), (20.0, 300), (30.0, 400))
    assert log.lag(at(250, 31.0)) == 21.0
    assert log.lag(at(399, 31.0)) == 11.0
    assert log.lag(at(400, 31.0)) == 0.0
    assert log.lag_bytes(at(250, 31.0)) == 150
    assert log.staleness(300, 31.0) == 11.0


def test_what_was_written_after_a_replica_was_asked_makes_it_no_later() -> None:
    log = log_of((0.0, 100), (10.0, 200), (30.0, 200), (40.0, 500))
    assert log.lag(at(200, 39.0)) == 0.0
    assert log.lag_bytes(at(200, 39.0)) == 0
    assert log.lag(at(100, 29.0)) == 29.0  # it lacks what was there at 10
    assert log.lag(at(100, 9.0)) == 0.0


def test_who_was_behind_from_the_start_tells_how_far() -> None:
    log = log_of((50.0, 100), (60.0, 200))
    assert log.staleness(90, 61.0) == math.inf
    assert log.lag(at(90, 61.0, age=3600.0)) == 3600.0
    assert log.lag(at(90, 61.0)) == 11.0


def test_nothing_is_known_before_the_primary_was_asked() -> None:
    log = PrimaryLog()
    assert math.isnan(log.lag(at(100, 1.0)))
    assert log.lag_bytes(at(100, 1.0)) is None
    assert log.staleness(10**9, 1.0) == math.inf


def test_places_of_another_timeline_are_forgotten() -> None:
    log = log_of((0.0, 1000))
    log.note(1.0, primary(500, timeline=2))
    assert log.lsn == 500
    assert log.staleness(600, 2.0) == 1.0


@given(
    st.lists(st.tuples(st.floats(0.001, 0.2), st.integers(0, 50)), min_size=1, max_size=60),
    st.integers(0, 1500),
    st.floats(0, 5),
)
def test_a_replica_is_never_called_younger_than_it_is(
    steps: list[tuple[float, int]], replayed: int, later: float
) -> None:
    """However often the primary is asked, and whatever is kept of it."""
    log, now, lsn = PrimaryLog(), 0.0, 0
    truth: list[tuple[float, int]] = []
    for seconds, written in steps:
        now, lsn = now + seconds, lsn + written
        log.note(now, primary(lsn))
        truth.append((now, lsn))
    now += later
    reached = [then for then, place in truth if place <= replayed]
    exact = now - max(reached) if reached else math.inf
    assert log.staleness(replayed, now) >= exact - 1e-9


def test_the_history_is_bounded() -> None:
    log = PrimaryLog()
    for number in range(100_000):
        log.note(number * 0.001, primary(number))
    assert len(log._samples) <= 2400
    assert log.staleness(99_999, 100.0) == pytest.approx(0.001)


def test_what_a_server_is() -> None:
    log = log_of((0.0, 100))
    assert judge(standby(), log) == ("standby", "")
    assert judge(standby(timeline=0), log) == ("standby", "")
    assert judge(primary(100), log)[0] == "primary"
    assert "promoted" in judge(primary(100), log)[1]
    kind, problem = judge(standby(system=8), log)
    assert kind == "foreign"
    assert "another database cluster" in problem
    assert "timeline" in judge(standby(timeline=2), log)[1]
    assert judge(standby(system=8), PrimaryLog()) == ("standby", "")  # the primary has not said yet what it is


def of(service: float, busy: int = 0, extra: float = 0.0, turn: int = 0) -> Candidate:
    return Candidate(service, busy, 4, extra, turn)


def test_the_one_that_will_have_answered_first_is_chosen() -> None:
    assert fastest([]) is None
    assert fastest([("a", of(0.001)), ("b", of(0.010))]) == "a"
    assert fastest([("a", of(0.001, busy=100)), ("b", of(0.010))]) == "b"
    assert fastest([("a", of(0.001, extra=0.005)), ("b", of(0.003))]) == "b"


def test_equals_take_turns() -> None:
    turns = {"a": 0, "b": 0, "c": 0}
    chosen: Counter[str] = Counter()
    for number in range(1, 301):
        key = fastest([(key, of(0.001 + 0.0001 * (key == "b"), turn=turn)) for key, turn in turns.items()])
        assert key is not None
        turns[key] = number
        chosen[key] += 1
    assert chosen == {"a": 100, "b": 100, "c": 100}


def test_who_was_slow_once_gets_another_chance() -> None:
    service = Service()
    assert service.expected(0.0) == 0.0
    service.note(1.0, 10.0)
    assert service.expected(10.0) == 1.0
    assert service.expected(15.0) == 0.5
    for number in range(100):
        service.note(0.002, 15.0 + number)
    assert service.expected(114.0) == pytest.approx(0.002, rel=0.05)
