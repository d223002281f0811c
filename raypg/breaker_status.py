"""How a pool's breaker is shown to people: plain data, times as ISO 8601 in UTC.

The wall clock is passed in beside the monotonic one that the breaker runs by.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from raypg.core.breaker import Transition
from raypg.core.quorum import Quorum

__all__ = ["SHOWN", "describe", "describe_transitions"]

SHOWN = 5
"""Transitions in a status, if no other number is asked for."""


def describe(quorum: Quorum, now: float, wall: float, shown: int = SHOWN) -> dict[str, Any]:
    """The breaker as a whole.

    Args:
        now: the time on the breaker's clock.
        wall: the same moment in seconds since the epoch.
        shown: how many of the last transitions are in it.
    """
    machine = quorum.machine
    metrics = machine.metrics()
    del metrics["consecutive_successes"]  # is not known over several workers
    return {
        "state": machine.state,
        "forced": machine.forced,
        "forced_reason": machine.forced_reason,
        "reason": machine.reason,
        "metrics": metrics,
        "config": asdict(machine.config),
        "time_until_recovery": machine.time_until_recovery(now),
        "state_transitions": describe_transitions(list(machine.transitions)[-shown:], now, wall),
        "workers": quorum.workers(now),
        "as_of": _timestamp(now, now, wall),
    }


def describe_transitions(transitions: Iterable[Transition], now: float, wall: float) -> list[dict[str, Any]]:
    """Changes of state, each with its cause and the metrics as they were."""
    return [
        {
            "from": transition.source,
            "to": transition.target,
            "timestamp": _timestamp(transition.at, now, wall),
            "reason": transition.reason,
            "metrics": transition.snapshot,
        }
        for transition in transitions
    ]


def _timestamp(at: float, now: float, wall: float) -> str:
    return datetime.fromtimestamp(wall - (now - at), UTC).isoformat()
