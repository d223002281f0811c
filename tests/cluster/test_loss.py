"""Workers, nodes and the Pool actor die or fall silent: the cap holds, readers notice nothing, shares move on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
import ray
from load import load
from nodes import Nodes
from pgserver import main_server
from pools import NO_BREAKER, CapWatch, backends_of, own_pool, worker_pids
from waiting import eventually

from raypg import OutcomeUnknownError, WorkflowConnectionPool, cluster
from raypg.channel import Call
from raypg.embedded import EmbeddedServer
from raypg.messages import STATUS

DETECTED_WITHIN = 10.0
"""Seconds until a silent worker is known to be lost: 5, on a machine that does nothing else."""

PASSED_ON_WITHIN = 20.0
"""Seconds until others have its share: 10, on a machine that does nothing else."""


@pytest.fixture
async def table(schema: str, direct: asyncpg.Connection) -> str:
    """Name of an empty table of numbers."""
    await direct.execute(f"create table {schema}.item (id int)")
    return f"{schema}.item"


async def states(pool: WorkflowConnectionPool) -> dict[int, tuple[str, int]]:
    """Number of a worker → its state and share, as the Pool actor has it."""
    kind, status = await asyncio.wait_for(cluster.find(pool.name).status.remote(), 10)
    assert kind == "ok"
    return {worker["index"]: (worker["state"], worker["budget"]) for worker in status["workers"]}


async def after(condition: Any, since: float, limit: float, what: str) -> None:
    """Wait for *condition*, and say how long after *since* it was met."""
    await eventually(condition, limit + 20, what)
    took = time.monotonic() - since
    print(f"{what} after {took:.1f} s")
    assert took < limit, what


async def all_open(pool: WorkflowConnectionPool, direct: asyncpg.Connection, count: int) -> None:
    """Wait until the workers have opened *count* connections."""

    async def so() -> bool:
        return len(await backends_of(direct, pool.name, control=False)) == count

    await eventually(so, 20)


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


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_node_is_lost_under_load(
    three_nodes: tuple[str, str, str],
    nodes: Nodes,
    pg: EmbeddedServer,
    direct: asyncpg.Connection,
    table: str,
    how: signal.Signals,
) -> None:
    """Its processes end at once; or nothing is heard of them any more, as when its power or its network fails."""
    doomed = await asyncio.to_thread(nodes.add)
    async with own_pool(pg, max_connections=13, workers=4) as pool, CapWatch(pg, pool.name) as watch:
        kind, status = await cluster.find(pool.name).status.remote()
        assert kind == "ok"
        index = next(worker["index"] for worker in status["workers"] if worker["node"] == doomed)
        async with load(pool, 30, 6, table) as running:
            await all_open(pool, direct, 12)
            for process in nodes.processes(doomed):
                with contextlib.suppress(psutil.NoSuchProcess):
                    os.kill(process.pid, how)
            lost_at = time.monotonic()

            async def noticed() -> bool:
                found = await states(pool)
                return index not in found or found[index][0] == "lost"

            async def passed_on() -> bool:
                return sum(share for other, (_, share) in (await states(pool)).items() if other != index) == 12

            await after(noticed, lost_at, DETECTED_WITHIN, "it is known to be lost")
            await after(passed_on, lost_at, PASSED_ON_WITHIN, "others have its share")
            await asyncio.to_thread(nodes.kill, doomed)

            async def replaced() -> bool:
                _, status = await cluster.find(pool.name).status.remote()
                serving = [worker for worker in status["workers"] if worker["state"] == "serving"]
                return len(serving) == 4 and all(worker["node"] != doomed for worker in serving)

            await after(replaced, lost_at, 60, "another worker serves in its place")
            reads = running.reads
            await eventually(lambda: running.reads > reads + 100, 20)
        assert running.failures == []
        await running.check(direct)
    watch.held(13)


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
        watch.held(7)


OTHER = """
import asyncio, sys, ray, raypg

async def main():
    name, dsn = sys.argv[1:3]
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error",
             _temp_dir=sys.argv[3], object_store_memory=80 * 1024 * 1024)
    pool = raypg.WorkflowConnectionPool(name=name, connection_string=dsn, max_connections=5, min_connections=4)
    await pool.process({"operation": "initialize"})
    pids = await asyncio.gather(*(pool.fetchval("select pg_backend_pid() from pg_sleep(0.3)") for _ in range(4)))
    print(*sorted(set(pids)), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    print(await pool.fetchval("select 1"), flush=True)
    await pool.close()

asyncio.run(main())
"""


async def test_two_clusters_with_one_database_and_one_pool_name(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, tmp_path: Path
) -> None:
    """What is ended is proven to be ours: another cluster's pool of the same name loses nothing."""
    async with own_pool(pg, max_connections=5, workers=1) as pool, CapWatch(pg, pool.name) as watch:
        directory = f"/tmp/raypg-ray-{os.getpid()}"
        other = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", OTHER, pool.name, pg.dsn, directory],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert other.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(other.stdout.readline), 90)
        theirs = {int(word) for word in line.split()}
        assert len(theirs) == 4
        # A worker that dies is reaped; a Pool actor that is new sweeps up what it does not know.
        pids = await worker_pids(pool.name)
        await asyncio.gather(*(pool.fetchval("select pg_sleep(0.2)") for _ in range(4)))
        os.kill(pids[0], signal.SIGKILL)
        actor = cluster.find(pool.name)
        ray.kill(actor, no_restart=False)

        async def well() -> bool:
            try:
                return await pool.fetchval("select 1", timeout=5) == 1 and (await states(pool))[0] == ("serving", 4)
            except (ray.exceptions.RayActorError, TimeoutError):
                return False

        await eventually(well, 40)
        alive = "select count(*) from pg_stat_activity where pid = any($1::int[])"
        assert await direct.fetchval(alive, list(theirs)) == 4
        output, _ = await asyncio.to_thread(other.communicate, "go on\n", 60)
        assert output == "1\n"
        assert other.returncode == 0
        assert await pool.fetchval("select 1") == 1
    watch.held(5)
