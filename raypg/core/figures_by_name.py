"""The figures of a pool that a condition may name: each with a line that says what it is.

The names are those of the statuses (:mod:`raypg.metrics_status`) and of the metrics (:mod:`raypg.exposition`); a point
is for one inside another, as ``queries.executed`` of ``stats``. A figure that is not known is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from raypg.core.cache_figures import CACHE_COUNTERS
from raypg.core.pool_metrics import utilization
from raypg.core.sqlstate import CATEGORIES

__all__ = ["COUNTED", "DESCRIPTIONS", "FIGURES", "TIMED", "Figure", "Snapshot", "figures", "mean", "mean_health"]

Snapshot = Mapping[str, Any]
"""What :meth:`raypg.core.pool_metrics.PoolMetrics.snapshot` says, and under ``circuit_breaker`` the breaker's state."""


class Figure(NamedTuple):
    """What a name means, and where it is found in a snapshot."""

    description: str
    of: Callable[[Snapshot], float]


def figures(known: Snapshot, names: Iterable[str]) -> dict[str, float]:
    """The figures of one pool that are asked for.

    Raises:
        KeyError: there is no such figure.
    """
    return {name: float(FIGURES[name].of(known)) for name in names}


def mean(times: Mapping[str, Any]) -> float:
    """Mean of what is given as its ``sum`` and ``count``."""
    return float(times["sum"] / times["count"]) if times["count"] else math.nan


def mean_health(gauges: Mapping[str, float]) -> float:
    """Mean health score of the connections."""
    return gauges["health"] / gauges["total"] if gauges["total"] else math.nan


# --- where they are --------------------------------------------------------------------------------------------------


def _gauge(name: str) -> Callable[[Snapshot], float]:
    return lambda known: known["gauges"][name]


def _counter(name: str) -> Callable[[Snapshot], float]:
    return lambda known: known["counters"][name]


def _window(name: str) -> Callable[[Snapshot], float]:
    return lambda known: known["window"][name]


def _recent(times: str, which: str) -> Callable[[Snapshot], float]:
    unit = 1.0 if which == "count" else 1000.0
    return lambda known: known["recent"][times][which] * unit


def _lifetime(times: str, which: str, unit: float = 1.0) -> Callable[[Snapshot], float]:
    return lambda known: known["lifetime"][times][which] * unit


def _breaker(state: str) -> Callable[[Snapshot], float]:
    def of(known: Snapshot) -> float:
        now = known["circuit_breaker"]["state"]
        return math.nan if now is None else float(now == state)

    return of


def _share(part: float, whole: float, otherwise: float) -> float:
    return part / whole if whole else otherwise


def _failed_calls(known: Snapshot) -> float:
    counts = known["counters"]
    return _share(counts["errors"] + counts["refused"], counts["queries"] + counts["refused"], 0.0)


def _passed_checks(known: Snapshot) -> float:
    counts = known["counters"]
    return _share(counts["health_checks"] - counts["health_check_failures"], counts["health_checks"], math.nan)


def _errors(category: str | None) -> Callable[[Snapshot], float]:
    return lambda known: sum(error[2] for error in known["errors"] if category in (None, error[0]))


def _failed(category: str) -> Callable[[Snapshot], float]:
    return lambda known: known["window"]["errors_by_category"][category]


def _workers(up: bool) -> Callable[[Snapshot], float]:
    return lambda known: sum(worker["up"] == up for worker in known["workers"].values())


def _slowest_replica(known: Snapshot) -> float:
    lags = [lag for lag in known["replicas"].values() if not math.isnan(lag)]
    return max(lags, default=math.nan)


def _cache_hits(known: Snapshot) -> float:
    counts = known["window"]
    return _share(counts["cache_hits"], counts["cache_hits"] + counts["cache_misses"], math.nan)


def _caches(name: str) -> Callable[[Snapshot], float]:
    return lambda known: known["caches"][name]


# --- what they are ---------------------------------------------------------------------------------------------------

_NOW = {
    "active_connections": ("Connections in use", _gauge("active")),
    "idle_connections": ("Connections that are open and free", _gauge("idle")),
    "total_connections": ("Connections that are open", _gauge("total")),
    "opening_connections": ("Connections that are being opened", _gauge("opening")),
    "max_connections": ("Most connections there may be, one for control included", _gauge("max_connections")),
    "min_connections": ("Connections that are kept open", _gauge("min_connections")),
    "queue_depth": ("Callers that wait for a connection", _gauge("waiting")),
    "utilization_rate": (
        "Connections in use, as a share of max_connections (0 to 1)",
        lambda known: utilization(known["gauges"]),
    ),
    "avg_health_score": ("Mean health score of the connections (0 to 100)", lambda known: mean_health(known["gauges"])),
    "circuit_breaker_open": ("1 while the circuit breaker is open, else 0", _breaker("open")),
    "circuit_breaker_half_open": ("1 while the circuit breaker is half open, else 0", _breaker("half_open")),
    "circuit_breaker_closed": ("1 while the circuit breaker is closed, else 0", _breaker("closed")),
    "circuit_breaker_disabled": ("1 while the circuit breaker is disabled, else 0", _breaker("disabled")),
    "circuit_breaker_forced": (
        "1 while the circuit breaker is forced open by hand, else 0",
        lambda known: known["circuit_breaker"]["forced"],
    ),
    "workers_up": ("Workers that were heard of in the last seconds", _workers(True)),
    "workers_down": ("Workers that were not heard of in the last seconds", _workers(False)),
    "seconds_since_report": (
        "Seconds since any worker of the pool was heard of",
        lambda known: known["as_of"] - known["heard_at"],
    ),
    "replica_lag_seconds": ("Seconds that the slowest replica is behind", _slowest_replica),
    "caches": ("Routers with a cache that were heard of in the last seconds", _caches("caches")),
    "cache_entries": ("Results that they hold", _caches("cache_entries")),
    "cache_bytes": ("Bytes that these take", _caches("cache_bytes")),
}
_LAST_MINUTE = {
    "queries_per_second": ("Statements per second, over ten seconds", _window("queries_per_second")),
    "error_rate": (
        "Share of calls that failed in the last minute, refused ones included (0 to 1)",
        _window("error_rate"),
    ),
    "calls_last_minute": ("Calls in the last minute, refused ones included", _window("calls")),
    "avg_query_time_ms": ("Mean time of a statement in the last minute, in ms", _recent("execution", "mean")),
    "avg_acquisition_time_ms": ("Mean wait for a connection in the last minute, in ms", _recent("wait", "mean")),
    "query_time_samples": ("Statements in the last minute whose time is known", _recent("execution", "count")),
    "queries_at_once": ("Statements that ran at the same time in the last minute, on average", _window("busy")),
    "cache_hit_rate": (
        "Share of the reads of the last minute that routers might have had in their cache, and had (0 to 1)",
        _cache_hits,
    ),
    "window_seconds": ("Seconds of the last minute: 60", lambda known: known["window_seconds"]),
}
_LAST_MINUTE |= {
    f"{name}_last_minute": (f"Calls that failed in the last minute with an error of category {name}", _failed(name))
    for name in CATEGORIES
}
COUNTED: Final = {
    "queries_total": ("statements that ran", "queries"),
    "query_errors": ("statements that failed", "errors"),
    "query_retries": ("reads that were sent again after their connection was lost", "retries"),
    "queries_together": ("reads that shared a write to the server with others", "together"),
    "rows_fetched": ("rows that statements returned", "rows"),
    "replica_reads": ("statements that a replica answered", "replica_reads"),
    "rows_written": ("rows that statements inserted, updated, deleted or copied", "written"),
    "cache_hits_total": ("reads that the cache of a router answered", "cache_hits"),
    "cache_misses_total": ("reads that it might have answered, and that were asked", "cache_misses"),
    "cache_invalidations_total": ("results that were dropped because of a write", "cache_invalidations"),
    "cache_evictions_total": ("results that made room for others", "cache_evictions"),
    "calls_refused": ("calls that never ran", "refused"),
    "calls_rejected": ("calls that the circuit breaker refused", "rejected"),
    "pool_exhaustion_events": ("calls for which no connection became free in time", "exhausted"),
    "connections_acquired": ("times that a connection was handed to a caller", "acquired"),
    "connections_reused": ("times that one was handed out that had been used before", "reused"),
    "connections_released": ("times that a connection was given back", "released"),
    "connections_created": ("connections opened", "created"),
    "connections_recycled": ("connections closed or lost", "recycled"),
    "connect_failures": ("attempts to open a connection that failed", "connect_failures"),
    "health_checks_total": ("pings of idle connections", "health_checks"),
    "health_checks_failed": ("pings that failed", "health_check_failures"),
}
"""What is counted since the pool began: name → what it is, and its name in a snapshot."""

TIMED: Final = {
    "query_execution_ms": ("time that statements took", "execution"),
    "connection_acquisition_ms": ("time that callers waited for a connection", "wait"),
    "connection_creation_ms": ("time to open a connection", "connect"),
    "connection_use_ms": ("time between borrowing a connection and giving it back", "use"),
    "fetch_ms": ("time to read large results and portions of cursors", "fetch"),
    "health_check_duration_ms": ("time that pings took", "health_check"),
}
"""What is timed, in the same way."""

_SUMMARY = {
    "mean": "Mean",
    **{f"p{rank}": f"{rank}th percentile of the" for rank in (50, 75, 90, 95, 99)},
    "min": "Shortest",
    "max": "Longest",
    "sum": "Sum of the",
}
_SINCE_IT_BEGAN = {
    "health_checks_success": (
        "pings that were answered",
        lambda known: known["counters"]["health_checks"] - known["counters"]["health_check_failures"],
    ),
    "health_check_success_rate": ("share of pings that were answered (0 to 1)", _passed_checks),
    "reuse_rate": (
        "share of acquired connections that had been used before (0 to 1)",
        lambda known: _share(known["counters"]["reused"], known["counters"]["acquired"], 0.0),
    ),
    "total_errors": ("calls that failed, but for those that the circuit breaker refused", _errors(None)),
    **{f"errors_by_category.{name}": (f"of these, those of category {name}", _errors(name)) for name in CATEGORIES},
    "queries.error_rate": ("share of calls that failed (0 to 1)", _failed_calls),
    "performance.avg_query_time_ms": (
        "mean time of a statement, in ms",
        lambda known: mean(known["lifetime"]["execution"]) * 1000,
    ),
    "performance.avg_acquisition_time_ms": (
        "mean wait for a connection, in ms",
        lambda known: mean(known["lifetime"]["wait"]) * 1000,
    ),
    "performance.query_samples": ("statements whose time is known", _lifetime("execution", "count")),
}

_ALSO = {
    # The names of `stats`, of `detailed_metrics` and of the exposition for the same figures.
    "connections.created": "connections_created",
    "connections.recycled": "connections_recycled",
    "connections.failed": "connect_failures",
    "queries.executed": "queries_total",
    "queries.errors": "query_errors",
    "queries.refused": "calls_refused",
    "queries.retries": "query_retries",
    "current_state.total_connections": "total_connections",
    "current_state.active_connections": "active_connections",
    "current_state.available_connections": "idle_connections",
    "current_state.waiting": "queue_depth",
    "exhausted": "pool_exhaustion_events",
    "pool_connections_active": "active_connections",
    "pool_connections_idle": "idle_connections",
    "pool_connections_total": "total_connections",
    "pool_utilization": "utilization_rate",
    "health_score": "avg_health_score",
    "connection_pool_error_rate": "error_rate",
    "connection_pool_queries_per_second": "queries_per_second",
    "connection_pool_utilization": "utilization_rate",
    "connection_pool_max_connections": "max_connections",
    "connection_pool_queue_depth": "queue_depth",
    "connection_pool_exhaustion_events_total": "pool_exhaustion_events",
    "connection_pool_calls_refused_total": "calls_refused",
    "connection_pool_calls_rejected_total": "calls_rejected",
    "connection_pool_query_retries_total": "query_retries",
    "connection_pool_queries_together_total": "queries_together",
    "connection_pool_replica_reads_total": "replica_reads",
    "connection_pool_caches": "caches",
    "connection_pool_cache_entries": "cache_entries",
    "connection_pool_cache_bytes": "cache_bytes",
    "connection_pool_cache_hit_rate": "cache_hit_rate",
    **{f"connection_pool_{name}_total": f"{name}_total" for name in CACHE_COUNTERS},
    "connection_pool_rows_fetched_total": "rows_fetched",
    "connection_pool_rows_written_total": "rows_written",
    "connection_pool_connections_acquired_total": "connections_acquired",
    "connection_pool_connections_reused_total": "connections_reused",
    "connection_pool_connections_released_total": "connections_released",
    "connection_pool_connections_created_total": "connections_created",
    "connection_pool_connections_recycled_total": "connections_recycled",
    "connection_pool_connect_failures_total": "connect_failures",
    "db_client_connection_max": "max_connections",
    "db_client_connection_idle_min": "min_connections",
    "db_client_connection_pending_requests": "queue_depth",
    "db_client_connection_timeouts_total": "pool_exhaustion_events",
}
_EXPOSED_TIMES = {
    **{
        f"connection_pool_{name}": (text, key, 1000.0)
        for name, (text, key) in TIMED.items()
        if name != "connection_use_ms"
    },
    "db_client_connection_wait_time_seconds": (TIMED["connection_acquisition_ms"][0], "wait", 1.0),
    "db_client_connection_create_time_seconds": (TIMED["connection_creation_ms"][0], "connect", 1.0),
    "db_client_connection_use_time_seconds": (TIMED["connection_use_ms"][0], "use", 1.0),
}


def _table() -> dict[str, Figure]:
    table = {name: Figure(*figure) for name, figure in {**_NOW, **_LAST_MINUTE}.items()}
    for name, (text, key) in COUNTED.items():
        table[name] = Figure(f"Since the pool began: {text}", _counter(key))
        table[f"{name.removesuffix('_total')}_last_minute"] = Figure(f"In the last minute: {text}", _window(key))
    for name, (text, key) in TIMED.items():
        for which, word in _SUMMARY.items():
            table[f"{name}_{which}"] = Figure(f"{word} {text} in the last minute, in ms", _recent(key, which))
        table[f"{name}_count"] = Figure(f"How often was taken in the last minute: {text}", _recent(key, "count"))
    for name, (text, of) in _SINCE_IT_BEGAN.items():
        table[name] = Figure(f"Since the pool began: {text}", of)
    for name, (text, key, unit) in _EXPOSED_TIMES.items():
        word = "ms" if unit > 1 else "seconds"
        table[f"{name}_sum"] = Figure(
            f"Since the pool began: {text}, all added up, in {word}", _lifetime(key, "sum", unit)
        )
        table[f"{name}_count"] = Figure(f"Since the pool began, how often was taken: {text}", _lifetime(key, "count"))
    for name, same in _ALSO.items():
        table[name] = Figure(f"Another name of {same}", table[same].of)
    return table


FIGURES: Final[Mapping[str, Figure]] = _table()
"""All of them."""

DESCRIPTIONS: Final[Mapping[str, str]] = {name: figure.description for name, figure in FIGURES.items()}
"""What each name means."""
