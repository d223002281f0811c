"""How the replicas of a pool stand, put together from what its workers say of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["replicas_of"]

_STATES = ("closed", "half_open", "open")
"""Of a circuit breaker, the worst one last."""


def replicas_of(workers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each replica, in the pool's order.

    Args:
        workers: the figures of each worker that answers.

    Returns:
        ``replica`` is its address; ``role`` one of standby, primary, foreign, unknown; ``healthy`` whether any worker
        sends reads there, ``used_by`` how many of the ``workers`` do, and ``problem`` why one does not.
        ``circuit_breaker`` is the state of the breakers for it, of which each worker has its own, where that is worst:
        open, half_open or closed. ``lag_seconds`` is NaN and ``lag_bytes`` None if not known; the rest is counted over
        all workers.
    """
    by_address: dict[str, list[Mapping[str, Any]]] = {}
    for figures in workers:
        for replica in figures["replicas"]:
            by_address.setdefault(replica["replica"], []).append(replica)
    return [_of_one(address, seen) for address, seen in by_address.items()]


def _of_one(address: str, seen: list[Mapping[str, Any]]) -> dict[str, Any]:
    healthy = [replica for replica in seen if replica["healthy"]]
    first = (healthy or [replica for replica in seen if replica["role"] != "unknown"] or seen)[0]
    lags = [r["lag_seconds"] for r in healthy or seen if not math.isnan(r["lag_seconds"])]
    behind = [r["lag_bytes"] for r in healthy or seen if r["lag_bytes"] is not None]
    return {
        "replica": address,
        "role": first["role"],
        "healthy": bool(healthy),
        "used_by": len(healthy),
        "workers": len(seen),
        "problem": next((replica["problem"] for replica in seen if replica["problem"]), ""),
        "circuit_breaker": max((replica["circuit_breaker"] for replica in seen), key=_STATES.index),
        "lag_seconds": max(lags, default=math.nan),
        "lag_bytes": max(behind, default=None),
        **{key: sum(replica[key] for replica in seen) for key in ("budget", "total", "active", "waiting")},
    }
