"""Alerts of a running pool: what they are told by, and what they survive."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pools import own_pool
from waiting import eventually

from raypg import AlertRuleNotFoundError, ConfigError, UnknownFigureError, WorkflowConnectionPool
from raypg.alerts_access import add_alert, alerts, delete_alert
from raypg.embedded import EmbeddedServer

GUIDE = {
    "name": "High Latency Alert",
    "condition": "avg_query_time_ms > 100",
    "threshold": 100,
    "duration_seconds": 60,
    "severity": "warning",
}


@pytest.fixture
async def pool(ray_cluster: Any, pg: EmbeddedServer) -> AsyncIterator[WorkflowConnectionPool]:
    async with own_pool(pg, max_connections=3) as pool:
        yield pool


@contextlib.asynccontextmanager
async def rule(**given: Any) -> AsyncIterator[str]:
    """The id of a rule that is there in the block."""
    id = await add_alert({"name": "a test", "duration_seconds": 0, "cooldown_seconds": 0, **given})
    try:
        yield id
    finally:
        with contextlib.suppress(AlertRuleNotFoundError):
            await delete_alert(id)


async def state_of(id: str) -> str | None:
    """``pending`` or ``firing``; ``None`` while nothing is wrong."""
    return next((alert["state"] for alert in (await alerts())["active"] if alert["rule_id"] == id), None)


async def is_in_state(id: str, state: str | None) -> bool:
    return await state_of(id) == state


async def test_it_fires_is_resolved_and_remembered(pool: WorkflowConnectionPool) -> None:
    async with rule(condition="active_connections > 0", pool=pool.name, severity="error") as id:
        assert await state_of(id) is None
        async with pool.acquire():
            await eventually(lambda: is_in_state(id, "firing"), timeout=4)
            known = await alerts(pool.name)
            (alert,) = [alert for alert in known["active"] if alert["rule_id"] == id]
            assert alert["pool"] == pool.name
            assert (alert["severity"], alert["value"]) == ("error", 1)
            assert alert["message"] == "active_connections > 0: active_connections is 1"
            assert known["history"][0] == alert
        await eventually(lambda: is_in_state(id, None), timeout=4)
        newest = (await alerts(pool.name))["history"][0]
        assert newest["state"] == "resolved"
        assert newest["since"] <= newest["fired_at"] < newest["resolved_at"]


async def test_the_guides_rule(pool: WorkflowConnectionPool) -> None:
    id = await add_alert(GUIDE)
    assert await add_alert(GUIDE) == id  # asked twice, it is there once
    assert await state_of(id) is None
    await asyncio.gather(*(pool.fetch("select pg_sleep(0.15)") for _ in range(2)))
    await eventually(lambda: is_in_state(id, "pending"), timeout=4)
    known = await alerts()
    assert {**GUIDE, "pool": None, "default": False}.items() <= next(r for r in known["rules"] if r["id"] == id).items()
    assert known["names"]["avg_query_time_ms"] == "Mean time of a statement in the last minute, in ms"
    await delete_alert(id)
    assert id not in {rule["id"] for rule in (await alerts())["rules"]}
    assert await state_of(id) is None


async def test_what_is_wrong_is_said_to_who_asked(pool: WorkflowConnectionPool) -> None:
    with pytest.raises(UnknownFigureError, match=r"avg_qery_time_ms.*did you mean 'avg_query_time_ms'") as caught:
        await add_alert({**GUIDE, "condition": "avg_qery_time_ms > 100"})
    assert "queue_depth" in caught.value.known
    with pytest.raises(ConfigError, match="compares with 100, but threshold is 200"):
        await add_alert({**GUIDE, "threshold": 200})
    with pytest.raises(ConfigError, match=f"no pool '{pool.name[:-1]}' runs.*did you mean '{pool.name}'"):
        await add_alert({**GUIDE, "pool": pool.name[:-1]})
    async with rule(condition="queue_depth > 1000") as id:
        with pytest.raises(AlertRuleNotFoundError, match=f"did you mean '{id}'"):
            await delete_alert(id[:-1])
