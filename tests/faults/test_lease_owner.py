"""Ends of a lease that its holder does not choose: the process killed, the handle forgotten, the Pool actor gone."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
import ray
from pools import backends_of, lasting_pool, own_pool, status_of_all, worker_pids
from waiting import eventually

from raypg import WorkflowConnectionPool, cluster
from raypg.embedded import EmbeddedServer

HOLDER = """
import asyncio, sys, ray, raypg
ray.init(address=sys.argv[1], namespace="holder", log_to_driver=False, logging_level="error")

async def main():
    pool = raypg.get_pool(sys.argv[2])
    async with pool.transaction() as tx, pool.acquire() as other:
        await tx.execute(f"insert into {sys.argv[3]} values (1, 'x')")
        await other.fetchval("select pg_advisory_lock(815)")
        sleeping = asyncio.ensure_future(pool.fetch("select pg_sleep(600), 'orphan'"))
        await asyncio.sleep(0.2)
        print(tx.backend_pid, other.backend_pid, flush=True)
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def pool(ray_cluster: Any, pg18: EmbeddedServer) -> Iterator[WorkflowConnectionPool]:
    """A pool of three connections, and one for control."""
    yield from lasting_pool(pg18, max_connections=4)


@pytest.fixture
async def table(schema: str, direct: asyncpg.Connection) -> str:
    """Qualified name of an empty table."""
    await direct.execute(f"create table {schema}.item (id int, label text)")
    return f"{schema}.item"


async def leased(pool: WorkflowConnectionPool) -> dict[int, dict[str, Any]]:
    """Backend's process id → owner, of the leases of *pool*."""
    status = await status_of_all(pool)
    return {c["backend_pid"]: c["lease"] for c in status["connections"].values() if c["lease"] is not None}


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM])
async def test_a_driver_killed_in_a_transaction_leaves_nothing(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, table: str, way: signal.Signals
) -> None:
    holder = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", HOLDER, ray.get_runtime_context().gcs_address, pool.name, table],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    line = await asyncio.wait_for(asyncio.to_thread(holder.stdout.readline), 60)
    pids = {int(word) for word in line.split()}
    held = await leased(pool)
    assert held.keys() == pids
    assert {owner["process"] for owner in held.values()} == {holder.pid}
    assert {owner["job"] for owner in held.values()} != {ray.get_runtime_context().get_job_id()}

    holder.send_signal(way)
    holder.communicate()
    died = time.monotonic()

    async def free() -> bool:
        return not await leased(pool)

    await eventually(free, timeout=20)
    freed = time.monotonic() - died
    print(f"reclaimed after {freed:.2f} s")
    assert freed < 10
    assert await pool.fetchval(f"select count(*) from {table}", timeout=5) == 0

    async def quiet() -> bool:
        running = "select count(*) from pg_stat_activity where state <> 'idle' and query like '%orphan%'"
        return bool(await direct.fetchval(f"{running} and pid <> pg_backend_pid()") == 0)

    await eventually(quiet, timeout=5, what="the statement that the dead driver waited for was cancelled")
    assert await direct.fetchval("select pg_try_advisory_lock(815)")
    # The very same connections serve on, and all of them.
    held_again = await asyncio.gather(*(pool.acquire(timeout=5)._acquire() for _ in range(3)))
    assert pids <= {connection.backend_pid for connection in held_again}
    await asyncio.gather(*(connection.release() for connection in held_again))


async def test_a_forgotten_lease_comes_back(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, table: str
) -> None:
    async with own_pool(pg, max_connections=2) as pool:
        for _ in range(5):
            one, two = await pool.acquire(), await pool.acquire()
            await one.execute("begin")
            await one.execute(f"insert into {table} values (1, 'x')")
            await two.execute("set my.word = 'left'")
            del one, two
            gc.collect()
            assert await pool.fetchval(f"select count(*) from {table}", timeout=5) == 0
            assert not await pool.fetchval("select current_setting('my.word', true)")

        async def free() -> bool:
            return not await leased(pool)

        await eventually(free, timeout=5)
        dispatcher = await pool._dispatcher()

        def idle() -> bool:
            return all(bool(channel.open == 0) for channel in dispatcher._channels.values())

        await eventually(idle, what="forgotten leases no longer count as load")


async def test_a_lease_in_use_is_not_taken_for_forgotten(pool: WorkflowConnectionPool) -> None:
    async def only_a_call() -> Any:
        return (await pool.acquire()).fetchval("select 7 from (select pg_sleep(0.5)) s")

    call = await only_a_call()
    gc.collect()
    assert await call == 7


async def test_nothing_stops_when_the_pool_actor_is_killed(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, table: str
) -> None:
    async with own_pool(pg, max_connections=6, workers=2) as pool:
        workers = await worker_pids(pool.name)
        actor = cluster.find(pool.name)
        before = await actor.__ray_call__.remote(lambda self: __import__("os").getpid())
        failures: list[Exception] = []
        over = asyncio.Event()
        answered = 0

        async def caller(number: int) -> None:
            nonlocal answered
            while not over.is_set():
                try:
                    assert await asyncio.wait_for(pool.fetchval("select $1::int", number), 5) == number
                    async with pool.transaction() as tx:
                        await tx.execute(f"insert into {table} values ($1, 'x')", answered)
                    answered += 1
                except Exception as error:
                    failures.append(error)

        async with pool.acquire() as lease:
            await lease.execute("create temp table kept (a int)")
            calling = [asyncio.create_task(caller(0))]
            ray.kill(actor, no_restart=False)
            killed = answered

            async def restarted() -> bool:
                try:
                    here = await actor.__ray_call__.remote(lambda self: __import__("os").getpid())
                except ray.exceptions.RayActorError:
                    return False
                return bool(here != before)

            await eventually(restarted, timeout=20)
            await eventually(lambda: answered > killed + 20)
            assert await lease.fetchval("select count(*) from kept") == 0

            async def still_leased() -> bool:  # as soon as the new one knows its workers
                return lease.backend_pid in await leased(pool)

            await eventually(still_leased)

            async def knows_its_workers() -> bool:
                status = await pool.process({"operation": "get_status"})
                return bool(sum(worker["budget"] for worker in status["workers"] if worker["reachable"]) == 5)

            await eventually(knows_its_workers, timeout=10)
            over.set()
            await asyncio.gather(*calling)
        assert failures == []
        assert await worker_pids(pool.name) == workers
        assert await direct.fetchval(f"select count(*) from {table}") == answered
        assert len(await backends_of(direct, pool.name)) <= 6
        await pool.reconfigure(max_connections=5)
        assert await pool.fetchval("select 1") == 1
