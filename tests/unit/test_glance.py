"""What a new life of the Metrics actor lets the rules of alerts see: not before it knows what the last one knew."""

from __future__ import annotations

from typing import Any

import pytest

from raypg.actors.metrics import SETTLED_WITHIN, MetricsActor, _Pool
from raypg.core.figures_by_name import figures
from raypg.core.pool_metrics import PoolMetrics

BORN = 1_000_000.0
NAMES = ["circuit_breaker_open", "active_connections", "seconds_since_report"]


def seen(age: float, missing: set[int], states: dict[str, Any]) -> dict[str, float] | None:
    """The figures of a pool whose only worker was heard of 20 s before the actor began."""
    metrics = PoolMetrics(60, BORN - 60)
    metrics.join(0, "life", BORN - 20)
    actor = MetricsActor.__new__(MetricsActor)  # no cluster, no clock
    actor._born, actor._states = BORN, states
    glance = actor._glance("p", _Pool(metrics, missing), BORN + age)
    return None if glance is None else figures(glance, NAMES)


OPEN = {"p": {"state": "open", "forced": True}}


@pytest.mark.parametrize(("missing", "states"), [({0}, OPEN), (set(), {}), (set(), {"another": OPEN["p"]})])
def test_nothing_while_a_worker_or_the_breaker_was_not_heard_of(missing: set[int], states: dict[str, Any]) -> None:
    assert seen(1.0, missing, states) is None
    late = seen(SETTLED_WITHIN + 0.1, missing, states)
    assert late is not None  # it is not waited for for ever
    assert late["active_connections"] == 0


def test_figures_as_soon_as_all_is_known() -> None:
    assert seen(1.0, set(), OPEN) == {
        "circuit_breaker_open": 1.0,
        "active_connections": 0.0,
        "seconds_since_report": 1.0,  # before that nobody listened
    }
