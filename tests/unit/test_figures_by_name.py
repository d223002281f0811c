"""Whatever a status or the exposition shows as one number may be named in a condition, and is that number."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from raypg.core.figures_by_name import DESCRIPTIONS, FIGURES, figures
from raypg.core.pool_metrics import COUNTERS, GAUGES, TIMES, PoolMetrics
from raypg.core.sketch import Sketch
from raypg.core.sqlstate import CATEGORIES
from raypg.exposition import families
from raypg.metrics_status import comprehensive, counters, statistics

NOW = 1_000_000.0


def known() -> dict[str, Any]:
    """A pool of two workers, no two of whose figures are the same; one worker is silent."""
    metrics = PoolMetrics(60, NOW - 20)
    metrics.join(0, "life", NOW - 10)
    metrics.join(1, "life", NOW - 2)

    def delta(first: int) -> dict[str, Any]:
        sketches = {name: Sketch() for name in TIMES}
        for number, sketch in enumerate(sketches.values(), 1):
            for position in range(first + number):
                sketch.add(number * 0.003 + position * 0.001)
        execution = sketches.pop("execution")
        return {
            "seq": 1,
            "age": 0.5,
            "seconds": 1.0,
            "counts": {name: first + 10 * number for number, name in enumerate(COUNTERS)},
            "times": {name: sketch.take() for name, sketch in sketches.items()},
            "groups": [("aabb", "SELECT", "select $1", *execution.take(), 5)],
            "floor": 0.0,
            "errors": {(name, ""): first + number for number, name in enumerate(CATEGORIES)},
            "recent": [],
            "gauges": {name: float(first + 3 * number) for number, name in enumerate(GAUGES)},
        }

    metrics.apply(0, "life", [delta(1000)], NOW - 10)  # type: ignore[list-item]
    metrics.apply(1, "life", [delta(2000)], NOW - 2)  # type: ignore[list-item]
    return {**metrics.snapshot(NOW), "circuit_breaker": {"state": "half_open", "forced": False}, "alerts": []}


KNOWN = known()
ALL = figures(KNOWN, FIGURES)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """(Path, number) of all numbers inside."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def differing(shown: dict[str, float]) -> set[str]:
    assert shown
    return {name for name, value in shown.items() if repr(ALL.get(name)) != repr(float(value))}


def test_the_statuses() -> None:
    assert differing(dict(leaves(statistics("p", KNOWN)))) == set()
    assert differing(dict(leaves(counters("p", KNOWN)))) == set()
    details = comprehensive("p", KNOWN, {})["detailed_metrics"]
    assert differing(dict(leaves(details["counters"]))) == set()
    assert differing(dict(leaves(details["gauges"]))) == set()
    assert differing({path.replace(".", "_"): value for path, value in leaves(details["histograms"])}) == set()
    del details["errors"]["errors_by_sqlstate"]
    assert differing(dict(leaves(details["errors"]))) == set()


def test_the_status_has_what_was_told() -> None:
    details = comprehensive("p", KNOWN, {})["detailed_metrics"]
    assert details["gauges"] == {
        "pool_connections_active": 2006,
        "pool_connections_idle": 2003,
        "pool_connections_total": 2000,
        "pool_utilization": 2006 / 2018,
        "queue_depth": 2009,
        "health_score": 2015 / 2000,
        "health_check_success_rate": (3260 - 3280) / 3260,
        "reuse_rate": 3160 / 3140,
        "workers_up": 1,
    }
    assert details["counters"] == {
        "queries_total": 3000,
        "query_errors": 3020,
        "calls_refused": 3040,
        "pool_exhaustion_events": 3060,
        "calls_rejected": 3080,
        "query_retries": 3100,
        "queries_together": 3120,
        "connections_acquired": 3140,
        "connections_reused": 3160,
        "connections_released": 3180,
        "connections_created": 3200,
        "connections_recycled": 3220,
        "connect_failures": 3240,
        "health_checks_total": 3260,
        "health_checks_success": -20,
        "health_checks_failed": 3280,
        "rows_fetched": 3300,
        "rows_written": 3320,
        "replica_reads": 3340,
        "cache_hits_total": 3360,
        "cache_misses_total": 3380,
        "cache_invalidations_total": 3400,
        "cache_evictions_total": 3420,
    }
    assert list(details["histograms"]) == [
        "query_execution_ms",
        "connection_acquisition_ms",
        "connection_creation_ms",
        "connection_use_ms",
        "fetch_ms",
        "health_check_duration_ms",
    ]


def test_the_exposition() -> None:
    pool = {"pool", "db_client_connection_pool_name"}
    shown = {
        sample.name: sample.value
        for family in families({"p": KNOWN})
        for sample in family.samples
        if set(sample.labels) <= pool
    }
    del shown["connection_pool_info"]  # always 1
    assert len(shown) > 30
    assert differing(shown) == set()


def test_what_is_of_alerts_alone() -> None:
    expected = {
        "circuit_breaker_open": 0.0,
        "circuit_breaker_half_open": 1.0,
        "circuit_breaker_forced": 0.0,
        "seconds_since_report": 2.0,
        "workers_up": 1.0,
        "workers_down": 1.0,
        "calls_last_minute": float(KNOWN["window"]["calls"]),
        "pool_exhaustion_events_last_minute": 3060.0,
        "queries_last_minute": 3000.0,
        "connection_refused_last_minute": 3002.0,
    }
    assert {name: ALL[name] for name in expected} == expected
    assert math.isnan(ALL["replica_lag_seconds"])
    behind = {**KNOWN, "replicas": {"b:5432": 2.0, "c:5432": 31.0, "d:5432": math.nan}}
    assert figures(behind, ["replica_lag_seconds"]) == {"replica_lag_seconds": 31.0}


def test_a_breaker_of_which_nothing_is_known() -> None:
    unknown = {**KNOWN, "circuit_breaker": {"state": None, "forced": False}}
    assert math.isnan(figures(unknown, ["circuit_breaker_open"])["circuit_breaker_open"])


def test_a_pool_that_has_done_nothing() -> None:
    nothing = PoolMetrics(60, NOW).snapshot(NOW)
    found = figures({**nothing, "circuit_breaker": {"state": "closed", "forced": False}}, FIGURES)
    assert found["error_rate"] == found["utilization_rate"] == found["seconds_since_report"] == 0.0
    assert math.isnan(found["avg_query_time_ms"])


def test_each_has_a_line_that_says_what_it_is() -> None:
    assert DESCRIPTIONS.keys() == FIGURES.keys()
    for name, text in DESCRIPTIONS.items():
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", name)
        assert 10 < len(text) < 110, name
        assert "\n" not in text


def test_no_such_figure() -> None:
    with pytest.raises(KeyError):
        figures(KNOWN, ["nothing"])
