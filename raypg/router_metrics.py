"""What a router has done, counted where it runs: in its caller's process."""

from __future__ import annotations

from collections import deque
from typing import Any

from raypg.core.classifier import Classification
from raypg.errors import RaypgError
from raypg.reading import Served

__all__ = ["RouterMetrics"]

_HISTORY = 100


class RouterMetrics:
    """Counts since the router was made, and its last decisions.

    Attributes:
        refusals: reads that a replica would not run.
        errors: calls that raised an error of raypg's, instead of giving what the server says.
    """

    def __init__(self) -> None:
        self.refusals = 0
        self.errors = 0
        self._seconds = 0.0
        self._by_type: dict[str, int] = {}
        self._by_target: dict[str, int] = {}
        self._recent: deque[tuple[Classification, Served]] = deque(maxlen=_HISTORY)

    def note(self, verdict: Classification, who: Served, seconds: float) -> None:
        """A statement was sent to where it belongs, which took *seconds* to decide. Called for each, so it is short."""
        kind, target = verdict.query_type, who.target
        self._by_type[kind] = self._by_type.get(kind, 0) + 1
        self._by_target[target] = self._by_target.get(target, 0) + 1
        self._seconds += seconds
        self._recent.append((verdict, who))

    def raised(self, error: Exception) -> None:
        """A call has raised *error*."""
        if isinstance(error, RaypgError | TypeError | ValueError):
            self.errors += 1

    def describe(self, cache: dict[str, Any]) -> dict[str, Any]:
        """``{router_metrics, cache_stats, routing_history}``.

        Args:
            cache: what the router's cache says of itself; empty if there is none.
        """
        routed = sum(self._by_target.values())
        recent = [
            {"query_type": verdict.query_type, "target": who.target, "replica": who.replica, "reason": verdict.reason}
            for verdict, who in self._recent
        ]
        return {
            "router_metrics": {
                "queries_routed": routed,
                "cache_hits": cache.get("hits", 0),
                "cache_misses": cache.get("misses", 0),
                "routing_errors": self.errors,
                "avg_routing_time_ms": self._seconds * 1000 / routed if routed else float("nan"),
                "by_query_type": dict(self._by_type),
                "by_target": dict(self._by_target),
                "replica_refusals": self.refusals,
            },
            "cache_stats": cache or dict(_NO_CACHE),
            "routing_history": {"total_decisions": routed, "recent_decisions": recent},
        }


_NO_CACHE = {
    "total_entries": 0,
    "total_usage": 0,
    "hit_rate": None,
    "avg_usage_per_entry": None,
    "cache_size_bytes": 0,
}
