"""How a pool's figures are shown to its users: with the keys and units of the guide (milliseconds, rates from 0 to 1).

All of it comes from one snapshot of the Metrics actor. A rate of nothing is 0.0, a time that was never measured NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from raypg.core.figures_by_name import COUNTED, FIGURES, TIMED, mean, mean_health
from raypg.core.pool_metrics import utilization
from raypg.core.sqlstate import CATEGORIES

__all__ = ["comprehensive", "counters", "statistics"]

Snapshot = Mapping[str, Any]

HEADROOM = 0.7
"""Share of its connections that a pool of the recommended size would use."""

_LEVELS = (
    "pool_connections_active",
    "pool_connections_idle",
    "pool_connections_total",
    "pool_utilization",
    "queue_depth",
    "health_score",
    "health_check_success_rate",
    "reuse_rate",
    "workers_up",
)


def statistics(pool: str, known: Snapshot) -> dict[str, Any]:
    """How the pool stands, and how the last minute was."""
    gauges, window, recent = known["gauges"], known["window"], known["recent"]
    return {
        "pool_name": pool,
        "total_connections": int(gauges["total"]),
        "active_connections": int(gauges["active"]),
        "idle_connections": int(gauges["idle"]),
        "max_connections": int(gauges["max_connections"]),
        "queue_depth": int(gauges["waiting"]),
        "utilization_rate": utilization(gauges),
        "avg_health_score": mean_health(gauges),
        "avg_acquisition_time_ms": recent["wait"]["mean"] * 1000,
        "avg_query_time_ms": recent["execution"]["mean"] * 1000,
        "query_time_samples": recent["execution"]["count"],
        "queries_per_second": window["queries_per_second"],
        "error_rate": window["error_rate"],
        "window_seconds": known["window_seconds"],
        "as_of": _time(known["as_of"]),
    }


def counters(pool: str, known: Snapshot) -> dict[str, Any]:
    """What was counted since the pool began."""
    counts, gauges = known["counters"], known["gauges"]
    execution, wait = known["lifetime"]["execution"], known["lifetime"]["wait"]
    calls = counts["queries"] + counts["refused"]
    return {
        "pool_name": pool,
        "since": _time(known["since"]),
        "connections": {
            "created": counts["created"],
            "recycled": counts["recycled"],
            "failed": counts["connect_failures"],
        },
        "queries": {
            "executed": counts["queries"],
            "errors": counts["errors"],
            "refused": counts["refused"],
            "retries": counts["retries"],
            "error_rate": (counts["errors"] + counts["refused"]) / calls if calls else 0.0,
        },
        "performance": {
            "avg_acquisition_time_ms": mean(wait) * 1000,
            "avg_query_time_ms": mean(execution) * 1000,
            "query_samples": execution["count"],
        },
        "current_state": {
            "total_connections": int(gauges["total"]),
            "active_connections": int(gauges["active"]),
            "available_connections": int(gauges["idle"]),
            "waiting": int(gauges["waiting"]),
        },
        "exhausted": counts["exhausted"],
    }


def comprehensive(
    pool: str, known: Snapshot, breaker: Mapping[str, Any], dashboard_url: str | None = None
) -> dict[str, Any]:
    """Everything: :func:`statistics`, the circuit breaker, and the details.

    Args:
        breaker: what :meth:`raypg.circuit_breaker.PoolCircuitBreaker.get_status` says.
        dashboard_url: where it can be watched, if it can.
    """
    return {
        **statistics(pool, known),
        "circuit_breaker": breaker,
        "detailed_metrics": {
            "counters": _counts(known["counters"]),
            "gauges": {name: FIGURES[name].of(known) for name in _LEVELS},
            "histograms": {name: _milliseconds(known["recent"][key]) for name, (_, key) in TIMED.items()},
            "errors": _errors(known),
            "query_summary": {command: _of_command(times) for command, times in known["commands"].items()},
        },
        "workers": {
            index: {"up": worker["up"], "incarnation": worker["incarnation"], "as_of": _time(worker["as_of"])}
            for index, worker in known["workers"].items()
        },
        "pattern_insights": {
            "detected_patterns": [_pattern(statement) for statement in known["statements"]],
            "unlisted_at_most_ms": known["statements_floor"] * 1000,
            # The next minute as the last: the only forecast that claims nothing.
            "workload_forecast": {"queries_per_second": known["window"]["queries_per_second"]},
        },
        "adaptive_control": _sizing(known),
        "monitoring": {"dashboard_enabled": dashboard_url is not None, "dashboard_url": dashboard_url},
    }


def _counts(counts: Mapping[str, int]) -> dict[str, int]:
    return {
        **{name: counts[key] for name, (_, key) in COUNTED.items()},
        "health_checks_success": counts["health_checks"] - counts["health_check_failures"],
    }


def _errors(known: Snapshot) -> dict[str, Any]:
    by_category: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
    by_sqlstate: dict[str, int] = {}
    for category, sqlstate, count in known["errors"]:
        by_category[category] = by_category.get(category, 0) + count
        if sqlstate:
            by_sqlstate[sqlstate] = by_sqlstate.get(sqlstate, 0) + count
    names = {"error_type", "sqlstate", "category", "fingerprint"}
    return {
        "total_errors": sum(by_category.values()),
        "errors_by_category": by_category,
        "errors_by_sqlstate": by_sqlstate,
        "error_rate": known["window"]["error_rate"],
        "recent_errors": [
            {
                "timestamp": _time(error["at"]),
                "query_type": error["command"],
                "error_message": error["message"],
                **{name: error[name] for name in sorted(names)},
            }
            for error in known["recent_errors"]
        ],
    }


def _of_command(times: Mapping[str, Any]) -> dict[str, float]:
    count = times["count"]
    return {
        "count": count,
        "avg_time_ms": mean(times) * 1000,
        "total_time_ms": times["sum"] * 1000,
        "p95_ms": times["p95"] * 1000,
        "errors": times["errors"],
        "error_rate": times["errors"] / count if count else 0.0,
    }


def _pattern(statement: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "fingerprint": statement["fingerprint"],
        "query_type": statement["command"],
        "query": statement["text"],
        "count": statement["count"],
        "errors": statement["errors"],
        "total_time_ms": statement["seconds"] * 1000,
        "missed_time_at_most_ms": statement["missed_seconds"] * 1000,
        "avg_time_ms": statement["mean"] * 1000,
        **{f"{name}_ms": statement[name] * 1000 for name in ("p50", "p95", "p99")},
    }


def _sizing(known: Snapshot) -> dict[str, Any]:
    """What would do for the last minute: as many connections as statements ran at once (Little's law), and more."""
    gauges, adjusted = known["gauges"], known["last_adjustment"]
    wanted = math.ceil(known["window"]["busy"] / HEADROOM)
    least, most = int(gauges["min_connections"]), int(gauges["max_connections"])
    return {
        "current_size": int(gauges["total"]),
        "recommended_size": min(max(wanted, least, 1), max(most, 1)),
        "last_adjustment": None
        if adjusted is None
        else {"timestamp": _time(adjusted["at"]), "from": int(adjusted["from"]), "to": int(adjusted["to"])},
    }


def _milliseconds(summary: Mapping[str, float]) -> dict[str, float]:
    return {name: value if name == "count" else value * 1000 for name, value in summary.items()}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
