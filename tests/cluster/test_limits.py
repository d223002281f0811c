"""What the server has room for, workers without a way to it, and what dead processes and finished tasks had."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import ray
from load import load
from pgserver import main_server
from pools import CapWatch, own_pool
from proxy import Proxy
from waiting import eventually

import raypg
from raypg import ConfigError
from raypg.embedded import EmbeddedServer


@pytest.fixture
async def limited_role(direct: asyncpg.Connection) -> AsyncIterator[str]:
    """A role that may have 6 connections."""
    name = f"limited_{secrets.token_hex(4)}"
    await direct.execute(f"create role {name} login password 'sesame' connection limit 6")
    yield name
    await direct.execute(f"drop role {name}")


async def size(pool: raypg.WorkflowConnectionPool) -> int:
    return (await pool.process({"operation": "get_status"}))["max_connections"]  # type: ignore[no-any-return]


async def test_a_cap_above_the_limit_of_the_role_is_lowered(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, limited_role: str
) -> None:
    account = {"user": limited_role, "password": "sesame"}
    other = await asyncpg.connect(**{**pg.parameters, **account})
    async with own_pool(pg, **account, max_connections=20) as pool, CapWatch(pg, pool.name) as watch:
        assert await size(pool) == 5
        async with load(pool, 40) as running:
            await eventually(lambda: running.reads > 300 and watch.seen_enough())
        assert running.failures == []
        assert watch.most == 5
        # When it is to grow it asks again.
        await other.close()
        assert (await pool.scale(max_connections=19))["new_size"] == 6
        await direct.execute(f"alter role {limited_role} connection limit 9")
        assert (await pool.scale(max_connections=20))["new_size"] == 9
        assert (await pool.scale(max_connections=4))["new_size"] == 4
    watch.held(9)


async def test_a_cap_above_the_limit_of_the_server_is_lowered(ray_cluster: Any) -> None:
    with main_server({"max_connections": "14", "superuser_reserved_connections": "3"}) as server:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                other = await asyncpg.connect(**server.parameters)
                stack.push_async_callback(other.close)
            settings = {"max_connections": 50, "workers": 2}
            async with own_pool(server, **settings) as pool, CapWatch(server, pool.name) as watch:
                assert await size(pool) == 14 - 3 - 4
                async with load(pool, 40) as running:
                    await eventually(lambda: running.reads > 300 and watch.seen_enough())
                assert running.failures == []
            watch.held(14 - 3 - 4)


async def test_more_workers_than_connections(ray_cluster: Any, pg: EmbeddedServer) -> None:
    with pytest.raises(ConfigError, match="5 workers cannot share 5 connections, one of them for control"):
        async with own_pool(pg, max_connections=5, workers=5):
            pass


async def test_a_worker_without_a_way_to_the_database(ray_cluster: Any, pg: EmbeddedServer) -> None:
    """From the start: it is isolated and named, and the others serve."""
    async with Proxy(pg.port) as proxy:
        proxy.cut(lambda first: b":1:" in first and b":control:" not in first)
        settings = {
            "port": proxy.port,
            "sslmode": "disable",
            "connect_timeout": 2.0,
            "circuit_breaker_recovery_timeout": 1.0,
        }
        async with own_pool(pg, **settings, max_connections=7, workers=3) as pool:

            async def isolated() -> list[bool]:
                return [w["isolated"] for w in (await pool.process({"operation": "get_status"}))["workers"]]

            async def named() -> bool:
                return await isolated() == [False, True, False]

            async with load(pool, 20) as running:
                await eventually(named, 20)
                failed, reads = len(running.failures), running.reads
                await eventually(lambda: running.reads > reads + 200, 20)
                assert len(running.failures) == failed, "once it is isolated nobody is sent there"
                proxy.mend()

                async def well() -> bool:
                    return not any(await isolated())

                await eventually(well, 80)


async def reclaimed(pool: raypg.WorkflowConnectionPool) -> dict[str, int]:
    return (await pool.process({"operation": "get_status"}))["reclaimed_leases"]  # type: ignore[no-any-return]


async def test_what_finished_tasks_and_dead_processes_had_comes_back(ray_cluster: Any, pg: EmbeddedServer) -> None:
    @ray.remote(num_cpus=0, max_retries=0)
    def forgetful(name: str) -> None:
        pool = raypg.get_pool(name)
        lease = pool.sync.process({"operation": "acquire"})
        query = "begin; create temp table forgotten (id int)"
        pool.sync.process({"operation": "execute", "query": query, "connection_id": lease["connection_id"]})

    @ray.remote(num_cpus=0, max_retries=0)
    def doomed(name: str) -> None:
        import os
        import signal

        pool = raypg.get_pool(name)
        lease = pool.sync.process({"operation": "acquire"})
        pool.sync.process({"operation": "execute", "query": "begin", "connection_id": lease["connection_id"]})
        os.kill(os.getpid(), signal.SIGKILL)

    async with own_pool(pg, max_connections=3) as pool:
        await forgetful.remote(pool.name)

        async def one() -> bool:
            return (await reclaimed(pool))["forgotten"] == 1

        await eventually(one, 10)
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            await doomed.remote(pool.name)

        async def two() -> bool:
            return (await reclaimed(pool))["process died"] == 1

        await eventually(two, 10)
        async with pool.acquire(lease_timeout=0.2) as late:

            async def three() -> bool:
                return await reclaimed(pool) == {"process died": 1, "forgotten": 1, "deadline": 1}

            await eventually(three, 10)
            with contextlib.suppress(raypg.LeaseLostError):
                await late.fetchval("select 1")
        held = await asyncio.gather(*(pool.acquire(timeout=5)._acquire() for _ in range(3)))
        await asyncio.gather(*(lease.release() for lease in held))
