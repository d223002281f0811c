"""A board for Grafana over the metrics that raypg exports, as Grafana imports it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

__all__ = ["board", "expressions"]


class _Panel(NamedTuple):
    title: str
    unit: str  # as Grafana names it
    queries: tuple[tuple[str, str], ...]  # (expression, legend)
    kind: str = "timeseries"
    width: int = 8


_POOLS = '{pool=~"$pool"}'


def _rate(counter: str, over: str = "1m", by: str = "") -> str:
    rate = f"rate({counter}{_POOLS}[{over}])"
    return f"sum by ({by}) ({rate})" if by else rate


def _quantiles(summary: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f'{summary}{{pool=~"$pool", quantile="0.{digits}"}}', f"{{{{pool}}}} p{digits}")
        for digits in ("5", "95", "99")
    )


def _p95(histogram: str) -> str:
    return f"histogram_quantile(0.95, sum by (le) (rate({histogram}_bucket[5m])))"


_PANELS = (
    _Panel(
        "Circuit breaker",
        "none",
        ((f"connection_pool_circuit_breaker_state{_POOLS} == 1", "{{pool}}: {{state}}"),),
        "stat",
        6,
    ),
    _Panel("Failed calls", "percentunit", ((f"connection_pool_error_rate{_POOLS}", "{{pool}}"),), "stat", 6),
    _Panel("Connections in use", "percentunit", ((f"connection_pool_utilization{_POOLS}", "{{pool}}"),), "stat", 6),
    _Panel(
        "Workers that are heard of",
        "none",
        ((f"sum by (pool) (connection_pool_worker_up{_POOLS})", "{{pool}}"),),
        "stat",
        6,
    ),
    _Panel(
        "Statements per second",
        "ops",
        ((_rate("connection_pool_queries_total", by="pool, type"), "{{pool}} {{type}}"),),
    ),
    _Panel("Time of statements", "ms", _quantiles("connection_pool_query_execution_ms")),
    _Panel("Time that callers wait", "ms", _quantiles("connection_pool_connection_acquisition_ms")),
    _Panel(
        "Connections",
        "none",
        (
            (f"connection_pool_connections{_POOLS}", "{{pool}} {{state}}"),
            (f"connection_pool_max_connections{_POOLS}", "{{pool}} at most"),
        ),
    ),
    _Panel("Callers that wait", "none", ((f"connection_pool_queue_depth{_POOLS}", "{{pool}}"),)),
    _Panel(
        "Errors per second",
        "ops",
        (
            (
                _rate("connection_pool_query_errors_total", by="pool, category, sqlstate") + " > 0",
                "{{pool}} {{category}} {{sqlstate}}",
            ),
        ),
    ),
    _Panel(
        "Calls that never ran, per second",
        "ops",
        (
            (_rate("connection_pool_exhaustion_events_total"), "{{pool}} no connection became free"),
            (_rate("connection_pool_calls_rejected_total"), "{{pool}} circuit breaker"),
        ),
    ),
    _Panel(
        "Statements that take most time (busy connections)",
        "none",
        (
            (
                f"topk(10, {_rate('connection_pool_statement_seconds_total', '5m')})",
                "{{pool}} {{type}} {{fingerprint}}",
            ),
        ),
    ),
    _Panel(
        "Connections opened, closed, refused, per second",
        "ops",
        (
            (_rate("connection_pool_connections_created_total", "5m"), "{{pool}} opened"),
            (_rate("connection_pool_connections_recycled_total", "5m"), "{{pool}} closed"),
            (_rate("connection_pool_connect_failures_total", "5m"), "{{pool}} refused"),
        ),
    ),
    _Panel("Lag of replicas", "s", ((f"connection_pool_replica_lag_seconds{_POOLS}", "{{pool}} {{replica}}"),)),
    _Panel(
        "Reads that replicas answer, per second",
        "ops",
        ((_rate("connection_pool_replica_reads_total"), "{{pool}}"),),
    ),
    _Panel(
        "Caches of routers, per second",
        "ops",
        (
            (_rate("connection_pool_cache_hits_total"), "{{pool}} hits"),
            (_rate("connection_pool_cache_misses_total"), "{{pool}} asked"),
            (_rate("connection_pool_cache_invalidations_total"), "{{pool}} ended by writes"),
        ),
    ),
    _Panel(
        "Alerts that fire",
        "none",
        ((f"raypg_alert_firing{_POOLS} == 1", "{{pool}} {{alertname}} ({{severity}})"),),
    ),
    _Panel(
        "Distribution of times, over all pools",
        "s",
        (
            (_p95("db_client_operation_duration_seconds"), "95 % of statements took less"),
            (_p95("db_client_connection_wait_time_seconds"), "95 % of callers waited less"),
        ),
    ),
)


def expressions() -> list[str]:
    """All expressions of the board."""
    return [expression for panel in _PANELS for expression, _ in panel.queries]


def board() -> str:
    """The board as JSON."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels: list[dict[str, Any]] = []
    x = y = 0
    for number, panel in enumerate(_PANELS, 1):
        height = 4 if panel.kind == "stat" else 8
        if x + panel.width > 24:
            x, y = 0, y + (4 if panels[-1]["type"] == "stat" else 8)
        panels.append(
            {
                "id": number,
                "type": panel.kind,
                "title": panel.title,
                "datasource": source,
                "gridPos": {"x": x, "y": y, "w": panel.width, "h": height},
                "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
                "options": {"textMode": "value_and_name"} if panel.kind == "stat" else {},
                "targets": [
                    {"refId": chr(ord("A") + index), "datasource": source, "expr": expression, "legendFormat": legend}
                    for index, (expression, legend) in enumerate(panel.queries)
                ],
            }
        )
        x += panel.width
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        {
            "name": "pool",
            "type": "query",
            "label": "Pool",
            "datasource": source,
            "query": {"query": "label_values(connection_pool_info, pool)", "refId": "pools"},
            "includeAll": True,
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
            "refresh": 2,
        },
    ]
    whole = {
        "title": "raypg",
        "uid": "raypg",
        "tags": ["postgresql", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": panels,
    }
    return json.dumps(whole, indent=2) + "\n"
