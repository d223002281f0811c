"""The figures of all pools as metrics for Prometheus.

Two sets of names. Those of the guide begin with ``connection_pool_``; some are not as Prometheus would have them (times
in milliseconds). Those of OpenTelemetry's conventions for database clients begin with ``db_client_``: base units, and
histograms that can be added up. Texts of statements are no labels, and fingerprints only those that take most time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from raypg.core.figures_by_name import FIGURES
from raypg.core.pool_metrics import BOUNDS, utilization
from raypg.core.sqlstate import CATEGORIES

__all__ = ["ALERT_FIRING", "BREAKER_STATES", "CONTENT_TYPE", "Snapshots", "families", "render", "text"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ALERT_FIRING = "raypg_alert_firing"
BREAKER_STATES = ("closed", "open", "half_open", "disabled")

Snapshots = Mapping[str, Mapping[str, Any]]
"""Name of a pool → what :meth:`raypg.core.pool_metrics.PoolMetrics.snapshot` says, its ``circuit_breaker``, and
``alerts``: (name, severity, whether it fires) of each rule for it."""

_COUNTERS = {
    "connection_pool_exhaustion_events": ("exhausted", "Calls for which no connection became free in time."),
    "connection_pool_calls_refused": ("refused", "Calls that never ran, for whatever reason."),
    "connection_pool_calls_rejected": ("rejected", "Calls that the circuit breaker refused."),
    "connection_pool_query_retries": ("retries", "Reads that were sent again after their connection was lost."),
    "connection_pool_queries_together": ("together", "Reads that shared a write to the server with others."),
    "connection_pool_replica_reads": ("replica_reads", "Statements that a replica answered."),
    "connection_pool_cache_hits": ("cache_hits", "Reads that the cache of a router answered."),
    "connection_pool_cache_misses": ("cache_misses", "Reads that it might have answered, and that were asked."),
    "connection_pool_cache_invalidations": ("cache_invalidations", "Results that were dropped because of a write."),
    "connection_pool_cache_evictions": ("cache_evictions", "Results that made room for others."),
    "connection_pool_rows_fetched": ("rows", "Rows that statements returned."),
    "connection_pool_rows_written": ("written", "Rows that statements inserted, updated, deleted or copied."),
    "connection_pool_connections_acquired": ("acquired", "Times that a connection was handed to a caller."),
    "connection_pool_connections_reused": ("reused", "Of these, times that it had been used before."),
    "connection_pool_connections_released": ("released", "Times that a connection was given back."),
    "connection_pool_connections_created": ("created", "Connections opened."),
    "connection_pool_connections_recycled": ("recycled", "Connections closed or lost."),
    "connection_pool_connect_failures": ("connect_failures", "Attempts to open a connection that failed."),
}
_SUMMARIES = {
    "connection_pool_query_execution_ms": ("execution", "Time that statements took, of the last minute."),
    "connection_pool_connection_acquisition_ms": ("wait", "Time that callers waited, of the last minute."),
    "connection_pool_connection_creation_ms": ("connect", "Time to open a connection, of the last minute."),
    "connection_pool_health_check_duration_ms": ("health_check", "Time that pings took, of the last minute."),
    "connection_pool_fetch_ms": ("fetch", "Time to read large results and portions of cursors, of the last minute."),
}
_QUANTILES = {"0.5": "p50", "0.75": "p75", "0.9": "p90", "0.95": "p95", "0.99": "p99"}
_HISTOGRAMS = {
    "db_client_connection_wait_time_seconds": ("wait", "Time to obtain a connection from the pool."),
    "db_client_connection_create_time_seconds": ("connect", "Time to create a connection."),
    "db_client_connection_use_time_seconds": ("use", "Time between borrowing a connection and giving it back."),
}
_LIMITS = [str(bound) for bound in BOUNDS]
_POOL = ("pool",)
_OTEL = ("db_client_connection_pool_name",)


def families(snapshots: Snapshots) -> list[Metric]:
    """All metrics of all pools, each family once."""
    return [*_guide(snapshots), *_opentelemetry(snapshots), _alerts(snapshots)]


def render(snapshots: Snapshots) -> str:
    """The same as text, as Prometheus scrapes it."""
    return text(families(snapshots))


def text(metrics: Iterable[Metric]) -> str:
    """Metrics in Prometheus' format: what prometheus_client's ``generate_latest`` writes, in a fifth of the time."""
    lines: list[str] = []
    for metric in metrics:
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        lines.append(f"# HELP {name} {metric.documentation}\n# TYPE {name} {metric.type}\n")
        for sample in metric.samples:
            labels = ",".join([f'{key}="{_escaped(value)}"' for key, value in sample.labels.items()])
            lines.append(
                f"{sample.name}{{{labels}}} {_number(sample.value)}\n"
                if labels
                else f"{sample.name} {_number(sample.value)}\n"
            )
    return "".join(lines)


def _escaped(value: str) -> str:
    if '"' in value or "\\" in value or "\n" in value:
        return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return value


def _number(value: float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return repr(float(value))


def _guide(snapshots: Snapshots) -> Iterator[Metric]:
    info = GaugeMetricFamily("connection_pool_info", "Pools that run; always 1.", labels=_POOL)
    queries = CounterMetricFamily("connection_pool_queries", "Statements that ran.", labels=("pool", "type"))
    errors = CounterMetricFamily(
        "connection_pool_query_errors",
        "Calls that failed, but for those that the circuit breaker refused.",
        labels=("pool", "category", "sqlstate"),
    )
    rate = GaugeMetricFamily(
        "connection_pool_error_rate", "Share of failed calls in the last minute, refused ones included.", labels=_POOL
    )
    throughput = GaugeMetricFamily("connection_pool_queries_per_second", "Statements per second.", labels=_POOL)
    used = GaugeMetricFamily(
        "connection_pool_utilization", "Connections in use, as a share of the most there may be.", labels=_POOL
    )
    connections = GaugeMetricFamily("connection_pool_connections", "Connections.", labels=("pool", "state"))
    most = GaugeMetricFamily("connection_pool_max_connections", "Most connections there may be.", labels=_POOL)
    waiting = GaugeMetricFamily("connection_pool_queue_depth", "Callers that wait for a connection.", labels=_POOL)
    checks = CounterMetricFamily(
        "connection_pool_health_checks", "Pings of idle connections.", labels=("pool", "result")
    )
    breaker = GaugeMetricFamily(
        "connection_pool_circuit_breaker_state", "1 for the state the breaker is in.", labels=("pool", "state")
    )
    up = GaugeMetricFamily(
        "connection_pool_worker_up", "Whether a worker was heard of in the last seconds.", labels=("pool", "worker")
    )
    lag = GaugeMetricFamily(
        "connection_pool_replica_lag_seconds",
        "Seconds that a replica is behind; 0 if it has all that the primary had when it was asked.",
        labels=("pool", "replica"),
    )
    hits = GaugeMetricFamily(
        "connection_pool_cache_hit_rate",
        "Share of the reads of the last minute that routers might have had in their cache, and had.",
        labels=_POOL,
    )
    caches = {
        "caches": GaugeMetricFamily("connection_pool_caches", "Routers with a cache.", labels=_POOL),
        "cache_entries": GaugeMetricFamily("connection_pool_cache_entries", "Results they hold.", labels=_POOL),
        "cache_bytes": GaugeMetricFamily("connection_pool_cache_bytes", "Bytes that these take.", labels=_POOL),
    }
    labels = ("pool", "fingerprint", "type")
    calls = CounterMetricFamily(
        "connection_pool_statement_calls", "Calls of the statements that take most time.", labels=labels
    )
    seconds = CounterMetricFamily("connection_pool_statement_seconds", "Time that they took.", labels=labels)
    failures = CounterMetricFamily("connection_pool_statement_errors", "How many of them failed.", labels=labels)
    for pool, known in snapshots.items():
        gauges, window = known["gauges"], known["window"]
        info.add_metric((pool,), 1)
        for command, times in known["commands"].items():
            queries.add_metric((pool, command), times["count"])
        told = {error[:2] for error in known["errors"]}
        for category in CATEGORIES:
            if (category, "") not in told:
                errors.add_metric((pool, category, ""), 0)  # else the first error of a kind would be no increase
        for category, sqlstate, count in known["errors"]:
            errors.add_metric((pool, category, sqlstate), count)
        rate.add_metric((pool,), window["error_rate"])
        throughput.add_metric((pool,), window["queries_per_second"])
        used.add_metric((pool,), utilization(gauges))
        for state in ("active", "idle"):
            connections.add_metric((pool, state), gauges[state])
        most.add_metric((pool,), gauges["max_connections"])
        waiting.add_metric((pool,), gauges["waiting"])
        failed = known["counters"]["health_check_failures"]
        checks.add_metric((pool, "failed"), failed)
        checks.add_metric((pool, "passed"), known["counters"]["health_checks"] - failed)
        for state in BREAKER_STATES:
            breaker.add_metric((pool, state), known["circuit_breaker"]["state"] == state)
        for worker, levels in known["workers"].items():
            up.add_metric((pool, str(worker)), levels["up"])
        for address, seconds_behind in known["replicas"].items():
            lag.add_metric((pool, address), seconds_behind)
        hits.add_metric((pool,), FIGURES["cache_hit_rate"].of(known))
        for key, level in caches.items():
            level.add_metric((pool,), known["caches"][key])
        for statement in known["statements"]:
            values = (pool, statement["fingerprint"], statement["command"])
            calls.add_metric(values, statement["count"])
            seconds.add_metric(values, statement["seconds"])
            failures.add_metric(values, statement["errors"])
    yield from (info, queries, errors, rate, throughput, used, connections, most, waiting, checks, breaker, up)
    yield from (lag, hits, *caches.values(), calls, seconds, failures)
    for name, (key, text) in _COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=_POOL)
        for pool, known in snapshots.items():
            counter.add_metric((pool,), known["counters"][key])
        yield counter
    for name, (key, text) in _SUMMARIES.items():
        yield _summary(name, text, key, snapshots)


def _summary(name: str, text: str, key: str, snapshots: Snapshots) -> Metric:
    """Quantiles are of the last minute; count and sum since the pool began, so that rates can be taken of them."""
    summary = Metric(name, text, "summary")
    for pool, known in snapshots.items():
        recent, lifetime = known["recent"][key], known["lifetime"][key]
        for quantile, position in _QUANTILES.items():
            summary.add_sample(name, {"pool": pool, "quantile": quantile}, recent[position] * 1000)
        summary.add_sample(f"{name}_sum", {"pool": pool}, lifetime["sum"] * 1000)
        summary.add_sample(f"{name}_count", {"pool": pool}, lifetime["count"])
    return summary


def _opentelemetry(snapshots: Snapshots) -> Iterator[Metric]:
    operations = HistogramMetricFamily(
        "db_client_operation_duration_seconds",
        "Time that statements took.",
        labels=(*_OTEL, "db_system_name", "db_operation_name"),
    )
    count = GaugeMetricFamily(
        "db_client_connection_count", "Connections by state.", labels=(*_OTEL, "db_client_connection_state")
    )
    levels = {
        "max_connections": GaugeMetricFamily("db_client_connection_max", "Most connections.", labels=_OTEL),
        "min_connections": GaugeMetricFamily("db_client_connection_idle_min", "Least kept open.", labels=_OTEL),
        "waiting": GaugeMetricFamily("db_client_connection_pending_requests", "Callers that wait.", labels=_OTEL),
    }
    timeouts = CounterMetricFamily("db_client_connection_timeouts", "Waits that ended without one.", labels=_OTEL)
    for pool, known in snapshots.items():
        for command, times in known["commands"].items():
            operations.add_metric((pool, "postgresql", command), _buckets(times), times["sum"])
        count.add_metric((pool, "used"), known["gauges"]["active"])
        count.add_metric((pool, "idle"), known["gauges"]["idle"])
        for key, level in levels.items():
            level.add_metric((pool,), known["gauges"][key])
        timeouts.add_metric((pool,), known["counters"]["exhausted"])
    yield from (operations, count, *levels.values(), timeouts)
    for name, (key, text) in _HISTOGRAMS.items():
        histogram = HistogramMetricFamily(name, text, labels=_OTEL)
        for pool, known in snapshots.items():
            times = known["lifetime"][key]
            histogram.add_metric((pool,), _buckets(times), times["sum"])
        yield histogram


def _alerts(snapshots: Snapshots) -> Metric:
    firing = GaugeMetricFamily(
        ALERT_FIRING, "1 for each alert that fires, 0 for the others.", labels=("alertname", "severity", "pool")
    )
    for pool, known in snapshots.items():
        states: dict[tuple[str, str], bool] = {}
        for name, severity, fires in known["alerts"]:
            states[name, severity] = fires or states.get((name, severity), False)  # two rules may have one name
        for (name, severity), fires in states.items():
            firing.add_metric((name, severity, pool), fires)
    return firing


def _buckets(times: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [*zip(_LIMITS, times["at_most"], strict=True), ("+Inf", times["count"])]
