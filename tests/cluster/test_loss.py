"""Workers, nodes and the Pool actor die or fall silent: the cap holds, readers notice nothing, shares move on."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import asyncpg
import pytest
import ray
from load import load
from pgserver import main_server
from pools import (
    DETECTED_WITHIN,
    NO_BREAKER,
    PASSED_ON_WITHIN,
    CapWatch,
    after,
    all_open,
    own_pool,
    states,
    worker_pids,
)
from waiting import eventually

from raypg import OutcomeUnknownError, cluster
from raypg.channel import Call
from raypg.embedded import EmbeddedServer
from raypg.messages import STATUS


async def test_a_zombie_that_wakes_up(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, table: str
) -> None:
    async with own_pool(pg, max_connections=10, workers=3) as pool, CapWatch(pg, pool.name) as watch:
        pids = await worker_pids(pool.name)
        async with load(pool, 30, 6, table) as running:
            await all_open(pool, direct, 9)
            os.kill(pids[1], signal.SIGSTOP)
            stopped = time.monotonic()
            try:

                async def lost() -> bool:
                    return (await states(pool))[1][0] == "lost"

                async def passed_on() -> bool:
                    found = await states(pool)
                    return sum(share for index, (_, share) in found.items() if index != 1) == 9

                await after(lost, stopped, DETECTED_WITHIN, "it is lost")
                await after(passed_on, stopped, PASSED_ON_WITHIN, "others have its share")
                reads = running.reads
                await eventually(lambda: running.reads > reads + 100)
                await all_open(pool, direct, 9)
            finally:
                os.kill(pids[1], signal.SIGCONT)

            async def back() -> bool:
                state, share = (await states(pool))[1]
                return state == "serving" and share > 0  # how much is a matter of load

            await eventually(back, 20, "it serves again")
            reads = running.reads
            await eventually(lambda: running.reads > reads + 200)
        assert running.failures == []
        await running.check(direct)
    watch.held(10)


async def test_a_worker_killed_with_a_long_query(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, table: str
) -> None:
    async with own_pool(pg, max_connections=7, workers=2) as pool, CapWatch(pg, pool.name) as watch:
        pids = await worker_pids(pool.name)
        long = f"insert into {table} select 0 from pg_sleep(60)"
        async with load(pool, 20, 4, table) as running:
            line = next(line for line in (await pool._dispatcher())._channels.values() if line.index == 0)
            writers = [Call(STATUS, long, (), None, None, asyncio.get_running_loop()) for _ in range(2)]
            for writer in writers:
                line.send(writer)
            await all_open(pool, direct, 6)
            os.kill(pids[0], signal.SIGKILL)
            killed = time.monotonic()

            async def well() -> bool:
                found = await states(pool)
                try:
                    new = (await worker_pids(pool.name)).get(0) not in (None, pids[0])
                except ray.exceptions.RayActorError:
                    return False  # it is just being started
                return new and sum(share for _, share in found.values()) == 6 and all(s for _, s in found.values())

            await after(well, killed, PASSED_ON_WITHIN, "all shares are granted")
            for writer in writers:
                with pytest.raises(OutcomeUnknownError):
                    await asyncio.wait_for(writer.future, 5)
            reads = running.reads
            await eventually(lambda: running.reads > reads + 100, 20)
        assert running.failures == []
        await running.check(direct)
    watch.held(7)


async def test_pool_actor_and_worker_die_together(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, table: str
) -> None:
    """Nobody remembers what the dead worker had: its connections are found by their names, and ended."""
    async with own_pool(pg, max_connections=6, workers=2) as pool, CapWatch(pg, pool.name) as watch:
        pids = await worker_pids(pool.name)
        async with load(pool, 20, 4, table) as running:
            sleeper = asyncio.create_task(pool.execute(f"insert into {table} select 0 from pg_sleep(60)"))
            await all_open(pool, direct, 5)
            actor = cluster.find(pool.name)
            mine = await actor.__ray_call__.remote(lambda self: os.getpid())
            os.kill(mine, signal.SIGKILL)
            os.kill(pids[0], signal.SIGKILL)

            async def well() -> bool:
                try:
                    found = await states(pool)
                except (ray.exceptions.RayActorError, TimeoutError):
                    return False
                return sum(share for _, share in found.values()) == 5 and all(share for _, share in found.values())

            await eventually(well, 40)
            reads = running.reads
            await eventually(lambda: running.reads > reads + 100, 20)
            sleeper.cancel()
        assert running.failures == []
        await asyncio.gather(sleeper, return_exceptions=True)
        await running.check(direct)
    watch.held(6)


async def test_the_server_restarts_under_several_workers(ray_cluster: Any) -> None:
    with main_server() as server:
        settings = {"max_connections": 7, "workers": 2, **NO_BREAKER}
        async with own_pool(server, **settings) as pool, CapWatch(server, pool.name) as watch:
            for restart in (server.restart, lambda: (server.kill(), server.start())):
                async with load(pool, 20) as running:
                    await eventually(lambda: running.reads > 100)
                    await asyncio.to_thread(restart)
                    reads = running.reads
                    await eventually(lambda running=running, reads=reads: running.reads > reads + 200, 20)
                    await eventually(watch.seen_enough)
        watch.held(7)
