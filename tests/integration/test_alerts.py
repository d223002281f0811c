"""Alerts of a running pool: what they are told by, and what they survive."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import ray
from pools import own_pool
from receiver import receiver
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


async def test_it_fires_is_resolved_and_remembered(pair: WorkflowConnectionPool) -> None:
    pool = pair
    async with rule(condition="active_connections > 0", pool=pool.name, severity="error") as id:
        assert await state_of(id) is None
        async with pool.acquire():
            await eventually(lambda: is_in_state(id, "firing"), timeout=30)
            known = await alerts(pool.name)
            (alert,) = [alert for alert in known["active"] if alert["rule_id"] == id]
            assert alert["pool"] == pool.name
            assert (alert["severity"], alert["value"]) == ("error", 1)
            assert alert["message"] == "active_connections > 0: active_connections is 1"
            assert known["history"][0] == alert
        await eventually(lambda: is_in_state(id, None), timeout=30)
        newest = (await alerts(pool.name))["history"][0]
        assert newest["state"] == "resolved"
        assert newest["since"] <= newest["fired_at"] < newest["resolved_at"]


async def test_the_guides_rule(pool: WorkflowConnectionPool) -> None:
    defaults = {rule["id"] for rule in (await alerts())["rules"] if rule["default"]}
    assert {"default-utilization", "default-error-rate", "default-exhausted", "default-breaker-open"} <= defaults
    id = await add_alert(GUIDE)
    assert await add_alert(GUIDE) == id  # asked twice, it is there once
    assert await state_of(id) is None
    await asyncio.gather(*(pool.fetch("select pg_sleep(0.15)") for _ in range(2)))
    await eventually(lambda: is_in_state(id, "pending"), timeout=30)
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


def logged() -> str:
    """What the cluster's processes have written to standard error."""
    directory = Path(ray._private.worker.global_worker.node.get_session_dir_path()) / "logs"
    return "".join(file.read_text(errors="replace") for file in directory.glob("worker-*.err"))


async def test_a_webhook_is_told_when_it_answers_again_and_a_log_at_once(pair: WorkflowConnectionPool) -> None:
    given = {"condition": "active_connections", "threshold": 0, "pool": pair.name, "severity": "info"}
    with receiver() as hook:
        hook.status = 500
        async with rule(**given, name="held", webhook_url=hook.url) as id:
            async with pair.acquire():
                await eventually(lambda: len(hook.told) >= 2, timeout=30)
                known = await alerts(pair.name)
                assert known["webhooks"]["waiting"] == 1
                shown = hook.url.partition("/hook")[0] + "/…"
                assert known["webhooks"]["trouble"] == {shown: "it answered 500"}
                assert next(rule for rule in known["rules"] if rule["id"] == id)["webhook_url"] == shown
                assert "not-to-be-shown" not in repr(known)
                hook.status = 200
                await eventually(lambda: hook.heard("firing"), timeout=30)
            await eventually(lambda: hook.heard("resolved"), timeout=30)
        (fired,), (resolved,) = hook.heard("firing"), hook.heard("resolved")
        tries = hook.heard("firing", 500)
        assert len(tries) >= 2
        assert tries == [fired] * len(tries)
        assert hook.told[-1][0] == "/hook?key=not-to-be-shown"
        assert (fired["rule_id"], fired["pool"], fired["condition"]) == (id, pair.name, "active_connections > 0")
        assert (resolved["fired_at"], resolved["id"] != fired["id"]) == (fired["fired_at"], True)
        line = f"firing [info] held, pool {pair.name}: active_connections > 0: active_connections is 1"
        assert fired["text"] == line
        assert f"INFO raypg.alerts: {line}" in logged()
        assert f"INFO raypg.alerts: resolved [info] held, pool {pair.name}: " in logged()
        assert (await alerts())["webhooks"]["trouble"] == {}


async def test_a_webhook_that_refuses_is_not_asked_again(pair: WorkflowConnectionPool) -> None:
    lost = (await alerts())["webhooks"]["lost"]
    with receiver() as hook:
        hook.status = 404
        async with rule(condition="active_connections > 0", pool=pair.name, webhook_url=hook.url) as id:
            async with pair.acquire():
                await eventually(lambda: hook.heard("firing", 404), timeout=30)
                hook.status = 200
            await eventually(lambda: hook.heard("resolved"), timeout=30)
        assert [body["state"] for _, _, body in hook.told] == ["firing", "resolved"]
    assert (await alerts())["webhooks"]["lost"] == lost + 1
    assert f"was not told of '{id}/{pair.name}" in logged()
    assert "not-to-be-shown" not in logged()
