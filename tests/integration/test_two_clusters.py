"""Two Ray clusters that use one database, with pools of the same name."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import Any

import asyncpg
import ray
from pools import CapWatch, own_pool, states, unique_name, worker_pids
from waiting import eventually

from raypg import UnavailableError, cluster
from raypg.demo_cluster import LocalCluster
from raypg.embedded import EmbeddedServer

OTHER = """
import asyncio, sys, ray, raypg

async def main():
    name, dsn = sys.argv[1:3]
    ray.init(log_to_driver=False, logging_level="error")
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
    ray_cluster: Any, command_cluster: LocalCluster, pg: EmbeddedServer, direct: asyncpg.Connection
) -> None:
    """What is ended is proven to be ours: another cluster's pool of the same name loses nothing."""
    name = unique_name()
    other = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", OTHER, name, pg.dsn],
        cwd="/",
        env=command_cluster.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    async with own_pool(pg, name=name, max_connections=5, workers=1) as pool, CapWatch(pg, name) as watch:
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
            except (ray.exceptions.RayActorError, UnavailableError, TimeoutError):
                return False

        await eventually(well, 60)
        alive = "select count(*) from pg_stat_activity where pid = any($1::int[])"
        assert await direct.fetchval(alive, list(theirs)) == 4
        output, _ = await asyncio.to_thread(other.communicate, "go on\n", 60)
        assert output == "1\n"
        assert other.returncode == 0
        assert await pool.fetchval("select 1") == 1
    watch.held(5)
