"""Figures while workers and the Metrics actor are killed: nothing is lost, counted twice, or made up."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import ray
from pools import own_pool, worker_pids
from waiting import eventually

from raypg import WorkflowConnectionPool, cluster, naming
from raypg._compat import kv_get
from raypg.embedded import EmbeddedServer
from raypg.metrics_access import history, snapshots


@pytest.fixture
async def pool(ray_cluster: Any, pg: EmbeddedServer) -> AsyncIterator[WorkflowConnectionPool]:
    async with own_pool(pg, workers=2, max_connections=4, metrics_retention_minutes=5) as pool:
        yield pool


async def known_of(pool: WorkflowConnectionPool) -> dict[str, Any]:
    return (await snapshots([pool.name]))[pool.name]


async def queries(pool: WorkflowConnectionPool) -> int:
    return int((await known_of(pool))["counters"]["queries"])


async def counted(pool: WorkflowConnectionPool, count: int) -> None:
    """Wait until *count* statements are known, and assert that no more are: of a worker that does not answer at once
    what it told last is taken, and one that has not joined yet is not among them."""

    async def told() -> int:
        known = await queries(pool)
        return known if known >= count else 0

    assert await eventually(told, timeout=30, what=f"{count} statements are known") == count


async def both_known(pool: WorkflowConnectionPool) -> bool:
    """Whether both workers have joined."""
    return sorted((await known_of(pool))["workers"]) == [0, 1]


async def run(pool: WorkflowConnectionPool, count: int) -> None:
    await asyncio.gather(*(pool.fetch("select 1") for _ in range(count)))


async def test_counts_of_a_killed_worker_stay(pool: WorkflowConnectionPool) -> None:
    await run(pool, 200)
    await counted(pool, 200)
    await eventually(lambda: both_known(pool), timeout=30)
    incarnation = (await known_of(pool))["workers"][0]["incarnation"]
    os.kill((await worker_pids(pool.name))[0], signal.SIGKILL)
    seen = []

    async def lives_again() -> bool:
        known = await known_of(pool)
        text = (await pool.process({"operation": "export_metrics"}))["prometheus_metrics"]
        assert f'connection_pool_worker_up{{pool="{pool.name}",worker="1"}} 1.0' in text
        seen.append(known["counters"]["queries"])
        return bool(known["workers"][0]["incarnation"] != incarnation and known["workers"][0]["up"])

    await eventually(lives_again, timeout=60)
    assert set(seen) == {200}
    await run(pool, 100)
    await counted(pool, 300)


async def test_a_killed_metrics_actor_comes_back_with_all_it_knew_and_a_gap(pool: WorkflowConnectionPool) -> None:
    await run(pool, 100)
    await counted(pool, 100)

    async def durable() -> bool:
        return kv_get(naming.metrics_key(pool.name)) is not None

    await eventually(durable, timeout=15)
    await run(pool, 50)  # told, but perhaps not durable yet
    await counted(pool, 150)
    metrics = cluster.find_metrics()
    assert metrics is not None
    pid = await metrics.__ray_call__.remote(lambda self: os.getpid())
    os.kill(pid, signal.SIGSTOP)
    await run(pool, 25)  # while nobody adds up
    await eventually(lambda: untold(pool, 4.0), timeout=20)
    os.kill(pid, signal.SIGKILL)

    async def all_told() -> bool:
        return await queries(pool) == 175

    await eventually(all_told, timeout=30)
    points: list[tuple[int, float]] = []

    async def looked_again() -> bool:
        nonlocal points
        _, points = await history(pool.name, "queries", 100)
        return not math.isnan(points[-1][1]) or not math.isnan(points[-2][1])

    await eventually(looked_again)
    there = [not math.isnan(value) for _, value in points]
    first = there.index(True)
    gap = there[first:].index(False)  # nobody has looked after the first figures …
    assert any(there[first + gap :])  # … and somebody has again
    await run(pool, 5)
    await counted(pool, 180)


async def test_a_worker_that_is_taken_away_leaves_its_counts_and_is_not_missed(pool: WorkflowConnectionPool) -> None:
    await run(pool, 200)
    await eventually(lambda: both_known(pool), timeout=30)
    await pool.scale(workers=1)

    async def left() -> bool:
        return len((await known_of(pool))["workers"]) == 1

    await eventually(left, timeout=30)
    await run(pool, 10)
    await counted(pool, 210)
    text = (await pool.process({"operation": "export_metrics"}))["prometheus_metrics"]
    assert text.count("connection_pool_worker_up{") == 1
    assert "connection_pool_worker_up{" + f'pool="{pool.name}",worker="' in text


async def untold(pool: WorkflowConnectionPool, seconds: float) -> bool:
    """Whether every worker has told nobody of anything for so long."""
    handles = [ray.get_actor(naming.worker_actor(pool.name, index), namespace=naming.NAMESPACE) for index in range(2)]
    since = [
        await handle.__ray_call__.remote(lambda self: time.monotonic() - self._engine.figures._taken_at)
        for handle in handles
    ]
    return min(since) > seconds


async def test_without_a_metrics_actor_statements_run(pool: WorkflowConnectionPool) -> None:
    metrics = cluster.find_metrics()
    assert metrics is not None
    ray.kill(metrics, no_restart=True)
    await run(pool, 50)

    async def found_again() -> bool:
        return cluster.find_metrics() is not None and await queries(pool) == 50

    await eventually(found_again, timeout=30)
