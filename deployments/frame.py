"""What the page shows of a pool: made from what the actors have answered. Pure; ``None`` is what nobody knows.

Times are in seconds since the epoch, durations in milliseconds where the name says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from raypg.core.pool_metrics import utilization
from raypg.core.sqlstate import CATEGORIES
from raypg.core.verdict import lights, verdict
from raypg.plain import without_nan
from raypg.replica_status import replicas_of

__all__ = ["Answers", "describe", "summary"]

MOST_LEASES = 100

_NUMBERS = ("health_score", "active", "idle", "total", "opening", "waiting", "max_connections")
_QUANTILES = ("mean", "p50", "p95", "p99")


@dataclass(frozen=True)
class Answers:
    """What is known of one pool; ``None`` of whom nothing was heard lately.

    Attributes:
        database: ``user@host:port/db``.
        snapshot, newest: of the Metrics actor.
        status, activity: of the Pool actor.
        breaker: of the Breaker actor.
        alerts: those that fire or are about to.
    """

    database: str | None
    snapshot: Mapping[str, Any] | None
    newest: tuple[int, Mapping[str, float]] | None
    status: Mapping[str, Any] | None
    activity: Mapping[str, Any] | None
    breaker: Mapping[str, Any] | None
    alerts: Sequence[Mapping[str, Any]]


def describe(known: Answers, now: float) -> dict[str, Any]:
    """The frame of one pool."""
    replicas = _replicas(known.status)
    found = lights(known.snapshot, known.status, known.breaker, known.activity, known.alerts, replicas)
    frame = {
        "database": known.database,
        "as_of": now,
        "lights": found,
        "verdict": verdict(found),
        **_connections(known),
        **_rates(known),
        "cache": _cache(known.snapshot),
        "errors": _errors(known.snapshot),
        "now": None if known.newest is None else {"t": known.newest[0], **known.newest[1]},
        "breaker": _breaker(known.breaker),
        "statements": [_statement(statement) for statement in (known.snapshot or {}).get("statements", ())],
        "workers": _workers(known),
        "replicas": replicas,
        "leases": _leases(known.status),
        "activity": _activity(known.activity),
    }
    return without_nan(frame)  # type: ignore[no-any-return]


def _replicas(status: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return replicas_of(worker["figures"] for worker in (status or {}).get("workers", ()) if worker["figures"])


def summary(frame: Mapping[str, Any]) -> dict[str, Any]:
    """A pool in a line."""
    return {
        "health_score": frame["health_score"],
        "active_connections": frame["active"],
        "idle_connections": frame["idle"],
        "total_connections": frame["total"],
        "max_connections": frame["max_connections"],
        "waiting": frame["waiting"],
        "utilization": frame["utilization"],
        "queries_per_second": frame["queries_per_second"],
        "avg_query_time_ms": frame["execution_ms"]["mean"],
        "error_rate": frame["error_rate"],
        "breaker": frame["breaker"]["state"],
        "verdict": frame["verdict"],
    }


def _connections(known: Answers) -> dict[str, Any]:
    """How many connections there are, as the workers say now, or as they have told last."""
    numbers: dict[str, float | None] = dict.fromkeys(_NUMBERS)
    if known.snapshot is not None:
        gauges = known.snapshot["gauges"]
        numbers |= {name: gauges[name] for name in _NUMBERS[1:]}
        numbers["health_score"] = gauges["health"] / gauges["total"] if gauges["total"] else None
    if known.status is not None:
        told = [worker["figures"] for worker in known.status["workers"] if worker["figures"]]
        if told:
            numbers |= {name: sum(figures[name] for figures in told) for name in _NUMBERS[1:6]}
        numbers["max_connections"] = known.status["max_connections"]
    whole = {name: value if value is None else round(value) for name, value in numbers.items()}
    active, cap = whole["active"], whole["max_connections"]
    used = None if active is None else utilization({"active": active, "max_connections": cap or 0})
    return {**whole, "utilization": used}


def _rates(known: Answers) -> dict[str, Any]:
    recent = known.snapshot["recent"] if known.snapshot is not None else {}
    window = known.snapshot["window"] if known.snapshot is not None else {}
    return {
        "queries_per_second": window.get("queries_per_second"),
        "error_rate": window.get("error_rate"),
        "rows_per_second": None if known.newest is None else known.newest[1]["rows"],
        "execution_ms": _times(recent.get("execution")),
        "wait_ms": _times(recent.get("wait")),
    }


def _cache(snapshot: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the caches of routers do, if there are any or were in the last minute."""
    if snapshot is None:
        return None
    window, caches = snapshot["window"], snapshot["caches"]
    asked = window["cache_hits"] + window["cache_misses"]
    if not asked and not caches["caches"]:
        return None
    return {
        "hit_rate": window["cache_hits"] / asked if asked else None,
        "invalidations": window["cache_invalidations"],
        "entries": caches["cache_entries"],
        "bytes": caches["cache_bytes"],
        "caches": caches["caches"],
    }


def _times(summary: Mapping[str, float] | None) -> dict[str, float | None]:
    return {name: None if summary is None else summary[name] * 1000 for name in _QUANTILES}


def _errors(snapshot: Mapping[str, Any] | None) -> dict[str, Any]:
    by_category: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
    recent: list[dict[str, Any]] = []
    if snapshot is not None:
        for category, _, count in snapshot["errors"]:
            by_category[category] = by_category.get(category, 0) + count
        names = ("at", "category", "sqlstate", "message", "command", "fingerprint")
        recent = [{name: error[name] for name in names} for error in reversed(snapshot["recent_errors"])]
    return {"by_category": by_category, "recent": recent}


def _breaker(status: Mapping[str, Any] | None) -> dict[str, Any]:
    if status is None:
        return {"state": None, "transitions": [], "workers": {}}
    return {
        **{name: status[name] for name in ("state", "forced", "forced_reason", "reason", "time_until_recovery")},
        "transitions": [
            {**{name: change[name] for name in ("from", "to", "reason")}, "timestamp": _epoch(change["timestamp"])}
            for change in status["state_transitions"]
        ],
        "workers": {
            index: {name: worker[name] for name in ("state", "isolated", "consecutive_failures")}
            for index, worker in status["workers"].items()
        },
    }


def _epoch(timestamp: str) -> float:
    """Seconds since the epoch, in tenths: read from two clocks, it differs by a little each time, and what differs is
    sent anew."""
    return round(datetime.fromisoformat(timestamp).timestamp(), 1)


def _statement(known: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{name: known[name] for name in ("fingerprint", "command", "text", "count", "errors")},
        "total_ms": known["seconds"] * 1000,
        **{f"{name}_ms": known[name] * 1000 for name in _QUANTILES},
    }


def _workers(known: Answers) -> list[dict[str, Any]]:
    isolated = {} if known.breaker is None else known.breaker["workers"]
    return [_worker(worker, isolated) for worker in (known.status or {}).get("workers", ())]


def _worker(known: Mapping[str, Any], isolated: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    figures = known["figures"] or {}
    return {
        **{name: known[name] for name in ("index", "node", "state", "budget")},
        **{name: figures.get(name) for name in ("total", "active", "waiting", "last_error")},
        "isolated": bool(isolated.get(known["index"], {}).get("isolated")),
        "silent": None if known["reachable"] else known["silent"],
    }


def _leases(status: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Who holds connections, the oldest leases first."""
    found = [
        {
            "connection": f"{worker['index']}/{name}",
            "backend_pid": connection["backend_pid"],
            **{key: lease[key] for key in ("held_by", "job", "node", "process", "age")},
        }
        for worker in (status or {}).get("workers", ())
        for name, connection in (worker["figures"] or {}).get("connections", {}).items()
        if (lease := connection["lease"]) is not None
    ]
    return sorted(found, key=lambda lease: -float(lease["age"]))[:MOST_LEASES]


def _activity(known: Mapping[str, Any] | None) -> dict[str, Any]:
    if known is None:
        return {"error": "the Pool actor does not answer", "sessions": []}
    return {"error": known["error"] or known.get("unseen"), **_rounded(known)}


def _rounded(known: Mapping[str, Any]) -> dict[str, Any]:
    sessions = [
        {
            name: round(value, 1) if isinstance(value, float) and math.isfinite(value) else value
            for name, value in session.items()
        }
        for session in known.get("sessions", ())
    ]
    names = ("backends", "server_max_connections")
    return {"sessions": sessions, **{name: known.get(name) for name in names}}
