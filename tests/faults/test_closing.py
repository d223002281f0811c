"""A pool closed under its callers, in this process and in others, and started again under its name."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import asyncpg
import pytest
import ray
from pools import backends_of, own_pool, running, unique_name
from waiting import eventually

from raypg import (
    PoolClosedError,
    PoolNotFoundError,
    UnavailableError,
    WorkflowConnectionPool,
    get_pool,
)
from raypg.embedded import EmbeddedServer


async def test_a_pool_closed_under_its_callers_tells_them_at_once(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection
) -> None:
    async with own_pool(pg, max_connections=2) as pool:
        calls: list[Any] = [asyncio.create_task(pool.fetch("select pg_sleep(60), 'closed under'")) for _ in range(2)]

        async def both_run() -> bool:
            return await running(direct, "'closed under'") == 2

        await eventually(both_run)
        calls += [asyncio.create_task(pool.fetchval("select 1")) for _ in range(100)]
        calls += [asyncio.create_task(pool.acquire()._acquire()) for _ in range(5)]
        calls += [asyncio.create_task(pool.execute("create table never (a int)")) for _ in range(5)]
        await asyncio.sleep(0.1)
        ended: list[Any] = []
        for call in calls:
            call.add_done_callback(ended.append)
        started = time.monotonic()
        closing = asyncio.create_task(pool.close())
        waiting = await asyncio.wait_for(asyncio.gather(*calls[2:], return_exceptions=True), 10)
        await closing
        assert {type(result) for result in waiting} == {PoolClosedError}
        assert pool.name in str(waiting[0])
        ran = await asyncio.wait_for(asyncio.gather(*calls[:2], return_exceptions=True), 10)
        assert all(isinstance(result, UnavailableError) for result in ran), ran
        assert set(ended[-2:]) == set(calls[:2])  # these have had some time to end: all others knew before
        assert time.monotonic() - started < 8
        with pytest.raises(PoolClosedError):
            await pool.fetchval("select 1")

        async def gone() -> bool:
            return await backends_of(direct, pool.name) == []

        await eventually(gone, timeout=5)


async def test_a_closed_pool_can_be_started_again_under_its_name(ray_cluster: Any, pg: EmbeddedServer) -> None:
    name = unique_name()
    for size in (1, 2):
        pool = WorkflowConnectionPool(name=name, **pg.parameters, max_connections=size)
        answer = await pool.process({"operation": "initialize"})
        assert (answer["status"], answer["max_connections"]) == ("initialized", size)
        assert await pool.fetchval("select 1") == 1
        await pool.close()


class Elsewhere:
    """A user of a pool in another process."""

    async def use(self, name: str, query: str) -> Any:
        return await get_pool(name).fetchval(query)

    async def wait_for_error(self, name: str) -> tuple[str, float, int]:
        started = time.monotonic()
        try:
            await get_pool(name).fetch("select pg_sleep(60), 'elsewhere'")
        except Exception as error:
            return type(error).__name__, time.monotonic() - started, os.getpid()
        return "none", 0.0, os.getpid()

    async def end(self, name: str, settings: dict[str, Any]) -> None:
        pool = WorkflowConnectionPool(name=name, **settings)
        await pool.process({"operation": "initialize"})
        await pool.close()


async def test_callers_in_other_processes_are_told_too(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection
) -> None:
    other: Any = ray.remote(Elsewhere).options(num_cpus=0).remote()
    try:
        async with own_pool(pg, max_connections=2) as pool:
            assert await other.use.remote(pool.name, "select 1") == 1
            call = other.wait_for_error.remote(pool.name)
            await eventually(lambda: running(direct, "'elsewhere'"))
            started = time.monotonic()
            await pool.close()
            kind, _, pid = await asyncio.wait_for(call, 20)
            assert pid != os.getpid()
            assert kind in ("PoolClosedError", "ConnectionLostError")
            assert time.monotonic() - started < 8
            with pytest.raises(Exception, match=pool.name) as caught:
                await other.use.remote(pool.name, "select 1")
            assert isinstance(caught.value.cause, PoolClosedError | PoolNotFoundError)  # type: ignore[attr-defined]
    finally:
        ray.kill(other)


async def test_a_pool_ended_by_another_job_and_started_again_serves_old_and_new_handles(
    ray_cluster: Any, pg: EmbeddedServer
) -> None:
    """This process was not told of the end: it must not go on believing in either the old pool or its end."""
    other: Any = ray.remote(Elsewhere).options(num_cpus=0).remote()
    name = unique_name()
    settings = {**pg.parameters, "max_connections": 2}
    try:
        first = WorkflowConnectionPool(name=name, **settings)
        await first.process({"operation": "initialize"})
        found = get_pool(name)
        assert await found.fetchval("select 1") == 1
        await other.end.remote(name, settings)
        with pytest.raises((PoolClosedError, PoolNotFoundError)):
            await asyncio.wait_for(found.fetchval("select 1"), 15)

        again = WorkflowConnectionPool(name=name, **settings)
        assert (await again.process({"operation": "initialize"}))["status"] == "initialized"
        assert await asyncio.wait_for(again.fetchval("select 2"), 15) == 2
        assert await asyncio.wait_for(get_pool(name).fetchval("select 3"), 15) == 3

        # The same once more, without a word said in between.
        await other.end.remote(name, settings)
        third = WorkflowConnectionPool(name=name, **settings)
        await third.process({"operation": "initialize"})
        assert await asyncio.wait_for(third.fetchval("select 4"), 15) == 4
        await third.close()
    finally:
        ray.kill(other)
