"""Writes with a batch id while workers, the Pipeline actor, whole jobs and PostgreSQL are killed: every row arrives
exactly once.

A schedule is a seed: it says what is killed and when. The suite runs a few; `make faults` runs twenty on more rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import numpy as np
import pyarrow as pa
import pytest
import ray
from pgserver import main_server
from pools import NO_BREAKER, backends_of, own_pool, unique_name, worker_pids
from waiting import eventually

from raypg import DataLostError, OutcomeUnknownError, QueryPipelineNode, RaypgError, WorkflowConnectionPool, naming
from raypg.embedded import EmbeddedServer

SCHEDULES = int(os.environ.get("RAYPG_FAULT_SCHEDULES", "2"))
ROWS = int(os.environ.get("RAYPG_FAULT_ROWS", "400_000"))
BATCH = ROWS // 100
WITHIN = 90.0
"""Seconds in which all rows must have arrived."""


def rows() -> pa.Table:
    ids = np.arange(ROWS)
    return pa.table({"id": ids, "v": ids * 7 % 1_000_003, "t": [f"row {i}" for i in range(ROWS)]})


CHECKSUM = "select count(*), count(distinct id), sum(id)::int8, sum(v)::int8, sum(hashtextextended(t, 0)) from load"


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[EmbeddedServer]:
    with main_server() as started:
        direct = await asyncpg.connect(**started.parameters)
        await direct.execute("create table load (id int8, v int8, t text)")
        await direct.close()
        yield started


async def at_least(server: EmbeddedServer, batches: int) -> bool:
    """Whether so many batches have arrived. Each answer comes over a connection of its own: servers are killed."""
    try:
        direct = await asyncpg.connect(**server.parameters)
    except (OSError, asyncpg.PostgresError):
        return False
    try:
        return bool(await direct.fetchval("select count(*) from raypg.batches") >= batches)
    except asyncpg.PostgresError:
        return False  # there is no ledger yet
    finally:
        direct.terminate()


async def kill_a_worker(pool: WorkflowConnectionPool, server: EmbeddedServer, rng: random.Random) -> None:
    with contextlib.suppress(ray.exceptions.RayError):
        pids = await worker_pids(pool.name)
        os.kill(rng.choice(list(pids.values())), signal.SIGKILL)


async def kill_a_backend(pool: WorkflowConnectionPool, server: EmbeddedServer, rng: random.Random) -> None:
    direct = await asyncpg.connect(**server.parameters)
    try:
        victims = await backends_of(direct, pool.name, control=False)
        if victims:
            await direct.execute("select pg_terminate_backend($1)", rng.choice(victims)["pid"])
    finally:
        direct.terminate()


async def kill_the_pipeline_actor(pool: WorkflowConnectionPool, server: EmbeddedServer, rng: random.Random) -> None:
    with contextlib.suppress(ValueError, ray.exceptions.RayError):
        actor = ray.get_actor(naming.PIPELINE_ACTOR, namespace=naming.NAMESPACE)
        os.kill(await actor.__ray_call__.remote(lambda self: os.getpid()), signal.SIGKILL)


async def kill_postgresql(pool: WorkflowConnectionPool, server: EmbeddedServer, rng: random.Random) -> None:
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.start)


KILLS = (kill_a_worker, kill_a_backend, kill_the_pipeline_actor, kill_postgresql)


@pytest.mark.parametrize("schedule", range(SCHEDULES))
@pytest.mark.timeout(240)
async def test_every_row_exactly_once_whatever_dies(ray_cluster: Any, schedule: int) -> None:
    rng = random.Random(f"write {schedule}")
    # The first schedules together have every kind.
    kinds = [*KILLS[schedule % 2 :: 2], *(rng.choice(KILLS[:3]) for _ in range(1))]
    rng.shuffle(kinds)
    data = rows()
    async with server() as started, own_pool(started, max_connections=5, **NO_BREAKER) as pool:
        pipeline = QueryPipelineNode(name="load", connection_pool=pool)

        async def until_done() -> int:
            calls = 0
            while True:
                calls += 1
                try:
                    await pipeline.write(data, into="load", batch_id="x", batch_rows=BATCH)
                except (RaypgError, asyncpg.PostgresError, OSError) as error:
                    print(f"call {calls}: {type(error).__name__}: {error}")
                    await asyncio.sleep(0.2)
                    continue
                return calls

        work = asyncio.ensure_future(asyncio.wait_for(until_done(), WITHIN))
        killed = 0
        for kill, batches in zip(kinds, sorted(rng.sample(range(2, 80), len(kinds))), strict=True):
            await eventually(lambda: work.done() or at_least(started, batches), timeout=WITHIN)  # noqa: B023
            if work.done():
                break
            print(f"{kill.__name__} after {batches} batches")
            await kill(pool, started, rng)
            killed += 1
        assert killed
        print(f"{await work} calls")
        direct = await asyncpg.connect(**started.parameters)
        found = await direct.fetchrow(CHECKSUM)
        texts = await direct.fetchval(
            "select sum(hashtextextended('row ' || i, 0)) from generate_series(0, $1::int8 - 1) i", ROWS
        )
        ids = np.arange(ROWS)
        assert tuple(found) == (ROWS, ROWS, int(ids.sum()), int((ids * 7 % 1_000_003).sum()), texts)
        assert await direct.fetchval("select sum(rows) from raypg.batches") == ROWS
        await direct.close()


async def test_a_killed_job_goes_on_where_it_was(ray_cluster: Any, pg: EmbeddedServer) -> None:
    """The process that writes is killed; the same call in another one writes the rest."""
    async with own_pool(pg, max_connections=4) as pool:
        direct = await asyncpg.connect(**pg.parameters)
        table, name = f"job_{os.getpid()}", unique_name("job")
        await direct.execute(f"create table {table} (id int8, v int8, t text)")
        try:

            @ray.remote(num_cpus=0)
            class Job:
                async def write(self, pool: str, table: str, name: str, data: pa.Table) -> int:
                    pipeline = QueryPipelineNode(name=name, connection_pool=pool)
                    return (await pipeline.write(data, into=table, batch_id="x", batch_rows=5_000)).known_batches

                async def pid(self) -> int:
                    return os.getpid()

            data = ray.put(rows().slice(0, 200_000))
            first = Job.remote()  # type: ignore[attr-defined]
            pid = await first.pid.remote()
            work = first.write.remote(pool.name, table, name, data)

            async def some() -> bool:
                there = "select to_regclass('raypg.batches') is not null"
                query = "select count(*) from raypg.batches where pipeline = $1"
                return bool(await direct.fetchval(there)) and await direct.fetchval(query, name) >= 3

            await eventually(some, timeout=60)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(ray.exceptions.RayError):
                await work
            known = await Job.remote().write.remote(pool.name, table, name, data)  # type: ignore[attr-defined]
            assert known >= 3
            stored = await direct.fetchrow(f"select count(*), count(distinct id) from {table}")
            assert tuple(stored) == (200_000, 200_000)
        finally:
            await direct.execute(f"drop table {table}")
            await direct.close()


async def test_data_whose_owner_died_fails_whole(ray_cluster: Any, pg: EmbeddedServer) -> None:
    async with own_pool(pg, max_connections=3) as pool:

        @ray.remote(num_cpus=0)
        class Owner:
            def make(self) -> list[Any]:
                return [ray.put(rows().slice(0, 300_000))]

            def pid(self) -> int:
                return os.getpid()

        owner = Owner.remote()  # type: ignore[attr-defined]
        (reference,) = ray.get(owner.make.remote())
        os.kill(ray.get(owner.pid.remote()), signal.SIGKILL)
        direct = await asyncpg.connect(**pg.parameters)
        table = f"owned_{os.getpid()}"
        await direct.execute(f"create table {table} (id int8, v int8, t text)")
        try:
            pipeline = QueryPipelineNode(name=unique_name("load"), connection_pool=pool)

            async def lost() -> bool:
                try:
                    await pipeline.write(reference, into=table, batch_id="x")
                except DataLostError as error:
                    return "owned the data" in str(error)
                await direct.execute(f"truncate {table}; delete from raypg.batches where pipeline = '{pipeline.name}'")
                return False

            assert await eventually(lost, timeout=30)
            assert await direct.fetchval(f"select count(*) from {table}") == 0
            again = await pipeline.write(rows().slice(0, 1_000), into=table, batch_id="x")
            assert (again.rows, again.known_batches) == (1_000, 0)
        finally:
            await direct.execute(f"drop table {table}")
            await direct.close()


async def test_without_a_batch_id_a_lost_worker_is_an_unknown_outcome(ray_cluster: Any, pg: EmbeddedServer) -> None:
    async with own_pool(pg, max_connections=3) as pool:
        direct = await asyncpg.connect(**pg.parameters)
        table = f"unknown_{os.getpid()}"
        await direct.execute(f"create table {table} (id int8, v int8, t text)")
        try:
            blocker = direct.transaction()
            await blocker.start()
            await direct.execute(f"lock table {table}")
            pipeline = QueryPipelineNode(name=unique_name("load"), connection_pool=pool)
            work = asyncio.ensure_future(pipeline.write(rows().slice(0, 100), into=table))
            other = await asyncpg.connect(**pg.parameters)
            waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like $1"
            await eventually(lambda: other.fetchval(waits, f"%{table}%"), timeout=30)
            for pid in (await worker_pids(pool.name)).values():
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(OutcomeUnknownError, match="batch_id="):
                await work
            await blocker.rollback()
            await other.close()
        finally:
            await direct.execute(f"drop table {table}")
            await direct.close()
