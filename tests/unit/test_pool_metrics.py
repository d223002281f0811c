"""Deltas of workers, added up once each, whatever comes twice, late, or from a life that is over."""

from __future__ import annotations

import math
import pickle
import random
from typing import Any

import pytest

from raypg.core.pool_metrics import COUNTERS, GAUGES, MOST_CODES, OTHER, Delta, PoolMetrics
from raypg.core.sketch import Sketch

START = 1_000_000.0


def delta(seq: int, queries: int = 0, *, took: float = 0.01, command: str = "SELECT", **more: Any) -> Delta:
    sketch = Sketch()
    if queries:
        sketch.add(took, queries)
    buckets, seconds = sketch.take()
    whole: dict[str, Any] = {
        "seq": seq,
        "age": 0.0,
        "seconds": 1.0,
        "counts": {"queries": queries, **more.pop("counts", {})},
        "times": {},
        "groups": [(f"fp-{command}", command, command.lower(), buckets, seconds, more.pop("failed", 0))],
        "floor": 0.0,
        "errors": {},
        "recent": [],
        "gauges": {**dict.fromkeys(GAUGES, 1.0), "max_connections": 10.0},
        **more,
    }
    return whole  # type: ignore[return-value]


def joined(*workers: int) -> PoolMetrics:
    metrics = PoolMetrics(60, START)
    for worker in workers or (0,):
        assert metrics.join(worker, "life", START) == 0
    return metrics


def total(metrics: PoolMetrics, now: float = START, name: str = "queries") -> int:
    return int(metrics.snapshot(now)["counters"][name])


def test_a_delta_that_comes_twice_counts_once() -> None:
    metrics = joined()
    first, second = delta(1, 5), delta(2, 7)
    assert metrics.apply(0, "life", [first], START) == 1
    assert metrics.apply(0, "life", [first, second], START) == 2
    assert metrics.apply(0, "life", [first, second], START) == 2
    assert metrics.apply(0, "life", [], START) == 2
    assert total(metrics) == 12


def test_any_order_of_repeats_and_deaths_counts_each_delta_once(rng: random.Random) -> None:
    for _ in range(50):
        metrics, expected = PoolMetrics(60, START), 0
        for life in range(3):
            metrics.join(1, f"life{life}", START)
            kept: list[Delta] = []
            known = 0
            for seq in range(1, 11):
                queries = rng.randrange(5)
                expected += queries
                kept.append(delta(seq, queries))
                sent = [part for part in kept if part["seq"] > known]
                answer = metrics.apply(1, f"life{life}", sent, START)
                if rng.random() < 0.5:  # else the answer is lost, and all comes again
                    known = answer or 0
                if rng.random() < 0.2:
                    metrics.join(1, f"life{life}", START)
            metrics.apply(1, f"life{life}", kept, START)
        assert total(metrics) == expected


def test_who_has_not_joined_is_told_so() -> None:
    metrics = joined()
    assert metrics.apply(1, "life", [delta(1, 1)], START) is None
    assert metrics.join(0, "next", START) == 0
    assert metrics.apply(0, "life", [delta(1, 1)], START) is None
    assert total(metrics) == 0


def test_counts_of_a_dead_worker_stay_and_its_levels_go() -> None:
    metrics = joined(0, 1)
    metrics.apply(0, "life", [delta(1, 5)], START)
    metrics.apply(1, "life", [delta(1, 7)], START)
    assert metrics.snapshot(START)["gauges"]["active"] == 2
    later = START + 5
    metrics.apply(1, "life", [delta(2, 1)], later)
    known = metrics.snapshot(later)
    assert known["counters"]["queries"] == 13
    assert known["gauges"]["active"] == 1
    assert [worker["up"] for worker in known["workers"].values()] == [False, True]
    metrics.join(0, "next", later)
    assert metrics.snapshot(later)["workers"][0]["up"]


def test_a_worker_that_has_left_is_missed_by_nobody() -> None:
    metrics = joined(0, 1)
    metrics.apply(0, "life", [delta(1, 5)], START)
    metrics.apply(1, "life", [delta(1, 7)], START)
    metrics.leave(0)
    known = metrics.snapshot(START)
    assert known["counters"]["queries"] == 12
    assert list(known["workers"]) == [1]
    assert known["gauges"]["total"] == 1
    assert metrics.apply(0, "life", [delta(2, 5)], START) is None
    assert metrics.join(0, "life", START) == 1
    metrics.leave_silent(START + 100, 60)
    assert metrics.snapshot(START)["workers"] == {}


def test_a_worker_that_has_lived_before_is_not_counted_again() -> None:
    metrics = joined()
    metrics.apply(0, "life", [delta(1, 5)], START)
    metrics.join(0, "next", START)
    assert metrics.join(0, "life", START) == 1


def test_what_was_kept_goes_on_where_it_was() -> None:
    metrics = joined()
    metrics.apply(0, "life", [delta(1, 5)], START)
    kept = pickle.dumps(metrics)
    metrics.apply(0, "life", [delta(2, 7)], START + 1)
    again: PoolMetrics = pickle.loads(kept)
    assert again.present(START + 2) == {0}
    assert again.join(0, "life", START + 2) == 1
    # The worker repeats what was not durable, and what has happened since.
    again.apply(0, "life", [delta(2, 7, age=1.0), delta(3, 1)], START + 2)
    assert total(again) == 13
    assert again.known() == {(0, "life"): 3}


def test_rates_and_times_are_of_the_last_minute() -> None:
    metrics = joined()
    metrics.apply(0, "life", [delta(1, 100, took=2.0, failed=50, counts={"errors": 50})], START)
    known = metrics.snapshot(START)
    assert known["window"]["error_rate"] == 0.5
    assert known["recent"]["execution"]["p95"] == pytest.approx(2.0, rel=0.01)
    later = START + 75
    metrics.apply(0, "life", [delta(2, 100, took=0.01)], later)
    known = metrics.snapshot(later)
    assert known["window"]["error_rate"] == 0.0
    assert known["recent"]["execution"]["p95"] == pytest.approx(0.01, rel=0.01)
    assert known["counters"]["errors"] == 50
    assert known["lifetime"]["execution"]["count"] == 200
    quiet = metrics.snapshot(later + 100)
    assert quiet["window"]["error_rate"] == 0.0
    assert math.isnan(quiet["recent"]["execution"]["p95"])


def test_calls_that_never_ran_are_failed_calls() -> None:
    metrics = joined()
    counts = {"refused": 30, "exhausted": 10, "rejected": 20}
    metrics.apply(0, "life", [delta(1, 10, counts=counts, errors={("pool_exhausted", ""): 10})], START)
    known = metrics.snapshot(START)
    assert known["window"]["error_rate"] == 0.75
    assert known["errors"] == [("pool_exhausted", "", 10)]


def test_a_pool_that_has_done_nothing() -> None:
    known = PoolMetrics(60, START).snapshot(START)
    assert known["counters"] == dict.fromkeys(COUNTERS, 0)
    assert known["window"]["error_rate"] == known["window"]["queries_per_second"] == 0.0
    assert math.isnan(known["recent"]["execution"]["p95"])
    assert known["lifetime"]["wait"]["at_most"] == [0] * 9


def test_made_up_codes_and_commands_take_no_memory_without_end() -> None:
    metrics = joined()
    for number in range(1, 1000):
        errors = {("query_error", f"X{number:04}"): 1}
        metrics.apply(0, "life", [delta(number, 1, command=f"WORD{number}", errors=errors)], START)
    known = metrics.snapshot(START, statements=1000)
    assert len(known["errors"]) <= MOST_CODES + 1
    assert sum(count for _, _, count in known["errors"]) == 999
    assert ("query_error", OTHER) in {(category, code) for category, code, _ in known["errors"]}
    assert len(known["commands"]) <= 101
    assert sum(command["count"] for command in known["commands"].values()) == 999
    assert len(known["statements"]) == 200


def test_a_changed_cap_is_the_last_adjustment() -> None:
    metrics = joined()
    metrics.apply(0, "life", [delta(1)], START)
    assert metrics.snapshot(START)["last_adjustment"] is None
    gauges = {**dict.fromkeys(GAUGES, 1.0), "max_connections": 20.0}
    metrics.apply(0, "life", [delta(2, gauges=gauges)], START + 1)
    assert metrics.snapshot(START + 1)["last_adjustment"] == {"at": START + 1, "from": 10.0, "to": 20.0}


def test_histograms_count_all_values() -> None:
    metrics = joined()
    for number, took in enumerate((0.0005, 0.02, 3.0), 1):
        metrics.apply(0, "life", [delta(number, 10, took=took)], START)
    times = metrics.snapshot(START)["commands"]["SELECT"]
    assert times["at_most"] == [10, 10, 10, 20, 20, 20, 20, 30, 30]
    assert times["sum"] == pytest.approx(30.205)


def test_the_lag_of_a_replica_is_what_the_worker_sees_that_sees_most() -> None:
    metrics = joined(0, 1)
    metrics.apply(0, "life", [delta(1, replicas={"a": 1.0, "b": math.nan, "c": math.nan})], START)
    metrics.apply(1, "life", [delta(1, replicas={"a": 2.0, "b": 0.5, "c": math.nan})], START)
    lags = metrics.snapshot(START)["replicas"]
    assert (lags["a"], lags["b"], math.isnan(lags["c"])) == (2.0, 0.5, True)
    metrics.leave(1)
    assert metrics.snapshot(START)["replicas"]["a"] == 1.0
