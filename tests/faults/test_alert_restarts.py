"""A killed Metrics actor fires nothing twice, forgets no rule, and tells webhooks what it could not tell."""

from __future__ import annotations

import os
import signal
from typing import Any

from pools import own_pool
from receiver import Receiver, receiver
from waiting import eventually

from raypg import cluster
from raypg.alerts_access import add_alert, alerts, delete_alert
from raypg.embedded import EmbeddedServer


async def kill_metrics() -> None:
    metrics = cluster.find_metrics()
    assert metrics is not None
    os.kill(await metrics.__ray_call__.remote(lambda self: os.getpid()), signal.SIGKILL)


def told(hook: Receiver, state: str) -> list[str]:
    """The rules of whose alerts *hook* was told that they are in this *state*. A message whose answer nobody has noted
    any more is sent again: by its id it is known for the same."""
    return sorted({body["id"]: body["rule_id"] for body in hook.heard(state)}.values())


async def test_what_fires_goes_on_firing(ray_cluster: Any, pg: EmbeddedServer) -> None:
    with receiver() as hook:
        async with own_pool(pg, workers=2, max_connections=5) as pool:

            async def fired_at(id: str) -> float | None:
                active = (await alerts(pool.name))["active"]
                return next((alert["fired_at"] for alert in active if alert["rule_id"] == id), None)

            given = {"duration_seconds": 0, "cooldown_seconds": 0, "pool": pool.name, "webhook_url": hook.url}
            held = await add_alert({"name": "held", "condition": "active_connections > 0", **given})
            opened = await add_alert({"name": "open", "condition": "circuit_breaker_open == 1", **given})
            await delete_alert("default-replica-lag")
            hook.status = 503  # told of nothing before the end
            async with pool.acquire():
                await pool.circuit_breaker.force_open("a test")
                first = [await eventually(lambda id=id: fired_at(id), timeout=10) for id in (held, opened)]
                await eventually(lambda: hook.heard("firing", 503), timeout=10)
                await kill_metrics()
                hook.status = 200
                await eventually(lambda: len(told(hook, "firing")) == 2, timeout=30)
                assert told(hook, "firing") == sorted((held, opened))
                await kill_metrics()  # that they were told is known, too
                later = await add_alert({"name": "later", "condition": "active_connections >= 1", **given})
                await eventually(lambda: fired_at(later), timeout=30)  # the new life watches, and has rules
                assert [await fired_at(id) for id in (held, opened)] == first
                known = await alerts(pool.name)
                assert "default-replica-lag" not in {rule["id"] for rule in known["rules"]}
                mine = [alert for alert in known["history"] if alert["rule_id"] in (held, opened, later)]
                assert [alert["state"] for alert in mine] == ["firing"] * 3
                await eventually(lambda: len(told(hook, "firing")) >= 3)
            await pool.circuit_breaker.force_close("over")
            await eventually(lambda: len(told(hook, "resolved")) == 3, timeout=10)
            for id in (held, opened, later):
                await delete_alert(id)
        for state in ("firing", "resolved"):
            assert told(hook, state) == sorted((held, opened, later))
