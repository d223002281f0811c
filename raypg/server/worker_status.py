"""How a worker stands: for the Pool actor, and as levels for the metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raypg.server.engine import Engine


def gauges(engine: Engine) -> dict[str, float]:
    """What it has now; see :data:`raypg.core.pool_metrics.GAUGES`."""
    servers = engine.servers
    total, idle = sum(each.connections.total for each in servers), sum(each.connections.idle for each in servers)
    return {
        "total": total,
        "idle": idle,
        "active": total - idle,
        "waiting": sum(len(each.queue) for each in servers),
        "opening": sum(each.connections.opening for each in servers),
        "health": sum(connection.health for each in servers for connection in each.connections),
        "max_connections": engine.config.max_connections,
        "min_connections": engine.config.min_connections,
    }


def status(engine: Engine) -> dict[str, Any]:
    """What a worker has and has done. Times in milliseconds; a mean of nothing is NaN."""
    leased = {lease.connection.identifier: lease for lease in engine.leases}
    now = engine.now()
    last_error = engine.connections.last_error
    levels = gauges(engine)
    return {
        "pooler": engine.pooler,
        "circuit_breaker": engine.guard.as_dict(),
        "budget": engine.budget,
        "replicas": [] if engine.replicas is None else engine.replicas.describe(),
        **{name: levels[name] for name in ("total", "idle", "opening", "active", "waiting")},
        **engine.figures.as_dict(),
        "reclaimed_leases": dict(engine.leases.reclaimed),
        "last_error": str(last_error) if last_error else None,
        "connections": {
            c.identifier: {
                "server": "primary" if each is engine else each.target,
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
            for each in engine.servers
            for c in each.connections
        },
    }
