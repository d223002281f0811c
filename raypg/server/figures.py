"""What one worker counts and times."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ddsketch import DDSketch

if TYPE_CHECKING:
    from raypg.server.engine import Engine

ACCURACY = 0.01
"""Relative error of quantiles (Masson, Rim and Lee, "DDSketch", 2019)."""


class Figures:
    """Counters since the worker started, and sketches of times in milliseconds."""

    __slots__ = ("acquired", "errors", "executed", "exhausted", "query_ms", "retries", "together", "wait_ms")

    def __init__(self) -> None:
        self.executed = 0
        self.errors = 0
        self.retries = 0
        self.together = 0  # reads that shared a write to the server with others
        self.acquired = 0
        self.exhausted = 0
        self.wait_ms = DDSketch(ACCURACY)
        self.query_ms = DDSketch(ACCURACY)

    def waited(self, seconds: float) -> None:
        """A caller waited this long for its connection."""
        self.acquired += 1
        self.wait_ms.add(seconds * 1000)

    def ran(self, seconds: float, failed: bool) -> None:
        """A statement took this long."""
        self.executed += 1
        self.errors += failed
        self.query_ms.add(seconds * 1000)

    def ran_together(self, statements: int, failed: int, seconds: float) -> None:
        """A group of statements took this long together."""
        self.executed += statements
        self.errors += failed
        self.query_ms.add(seconds / statements * 1000, statements)

    def as_dict(self) -> dict[str, Any]:
        """Plain data; a quantile or mean of nothing is NaN."""
        return {
            "acquired": self.acquired,
            "executed": self.executed,
            "errors": self.errors,
            "retries": self.retries,
            "together": self.together,
            "exhausted": self.exhausted,
            "wait_ms": _summary(self.wait_ms),
            "query_ms": _summary(self.query_ms),
        }


def _summary(sketch: DDSketch) -> dict[str, float]:
    count = int(sketch.count)
    if not count:
        return {"count": 0, "mean": math.nan, "p50": math.nan, "p95": math.nan, "p99": math.nan}
    quantiles = {f"p{round(q * 100)}": sketch.get_quantile_value(q) or math.nan for q in (0.5, 0.95, 0.99)}
    return {"count": count, "mean": sketch.avg, **quantiles}


def status(engine: Engine) -> dict[str, Any]:
    """What a worker has and has done. Times in milliseconds; a quantile of nothing is NaN."""
    connections = tuple(engine.connections)
    leased = {lease.connection.identifier: lease for lease in engine.leases}
    now = engine.now()
    return {
        "pooler": engine.pooler,
        "circuit_breaker": engine.guard.as_dict(),
        "budget": engine.connections.budget,
        "total": engine.connections.total,
        "idle": engine.connections.idle,
        "opening": engine.connections.opening,
        "active": engine.connections.total - engine.connections.idle,
        "waiting": len(engine.queue),
        "created": engine.connections.created,
        "recycled": engine.connections.recycled,
        "failed": engine.connections.failed,
        **engine.figures.as_dict(),
        "reclaimed_leases": dict(engine.leases.reclaimed),
        "last_error": str(engine.connections.last_error) if engine.connections.last_error else None,
        "connections": {
            c.identifier: {
                "health_score": c.health,
                "active_queries": int(c.busy),
                "last_used": now - c.last_used,
                "age": now - c.opened_at,
                "statements": c.used,
                "backend_pid": c.pid,
                "lease": None
                if (lease := leased.get(c.identifier)) is None
                else {**lease.owner, "age": now - lease.since},
            }
            for c in connections
        },
    }
