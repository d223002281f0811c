"""`pipeline.write` over three nodes: batches that lie on several nodes, Datasets, and a node that dies with some."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import numpy as np
import pyarrow as pa
import ray
from nodes import Nodes
from pools import NO_BREAKER, own_pool, pipeline_of
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from waiting import eventually

from raypg import WorkflowConnectionPool
from raypg.embedded import EmbeddedServer

EACH = 20_000
FOUND = "select count(*), count(distinct id), sum(twice) from {}"


@ray.remote(num_cpus=0)
def part(number: int) -> pa.Table:
    """Rows of one batch: 320 kB, more than Ray passes on in a message."""
    ids = np.arange(number * EACH, (number + 1) * EACH)
    return pa.table({"id": ids, "twice": ids * 2})


def expected(parts: int) -> tuple[int, int, int]:
    rows = parts * EACH
    return rows, rows, rows * (rows - 1)


async def test_batches_of_all_nodes_go_over_the_workers_of_all(
    three_nodes: tuple[str, str, str], pg: EmbeddedServer, direct: asyncpg.Connection, schema: str
) -> None:
    await direct.execute("create table target (id int8 primary key, twice int8)")
    async with own_pool(pg, max_connections=7, workers=3) as pool:
        made = [
            part.options(scheduling_strategy=NodeAffinitySchedulingStrategy(three_nodes[n % 3], soft=False)).remote(n)
            for n in range(12)
        ]
        written = await pipeline_of(pool).write(made, into=f"{schema}.target")
        assert (written.rows, written.batches) == (12 * EACH, 12)
        assert len(written.workers) == 3
        assert await direct.fetchrow(FOUND.format("target")) == expected(12)
        again = await pipeline_of(pool).write(ray.data.from_arrow_refs(made), into=f"{schema}.target", mode="upsert")
        assert again.rows == 12 * EACH
        assert await direct.fetchrow(FOUND.format("target")) == expected(12)


async def test_a_node_dies_with_batches_in_flight(
    three_nodes: tuple[str, str, str], nodes: Nodes, pg: EmbeddedServer, direct: asyncpg.Connection, schema: str
) -> None:
    """Its worker has begun batches, and its object store holds others; Ray makes those anew, and the ledger sees to it
    that none is written twice."""
    fourth = await asyncio.to_thread(nodes.add)
    await direct.execute("create table target (id int8, twice int8)")
    async with own_pool(pg, max_connections=9, workers=4, **NO_BREAKER) as pool:
        made = [
            part.options(scheduling_strategy=NodeAffinitySchedulingStrategy(fourth, soft=True)).remote(n)
            for n in range(16)
        ]
        await asyncio.to_thread(lambda: ray.wait(made, num_returns=len(made), fetch_local=False))
        blocker = direct.transaction()
        await blocker.start()
        await direct.execute("lock table target in exclusive mode")
        work = asyncio.ensure_future(pipeline_of(pool).write(made, into=f"{schema}.target", batch_id=schema))
        other = await asyncpg.connect(**pg.parameters)
        index = await worker_on(pool, fourth)
        await eventually(lambda: waits(other, index), 30, "the worker of that node has begun a batch")
        await asyncio.to_thread(nodes.kill, fourth)
        await blocker.rollback()
        await other.close()
        written = await asyncio.wait_for(work, 90)
    assert written.rows + written.known_rows == 16 * EACH
    assert await direct.fetchrow(FOUND.format("target")) == expected(16)


async def worker_on(pool: WorkflowConnectionPool, node: str) -> int:
    """Number of the worker on *node*."""
    dispatcher = await pool._dispatcher()
    return next(each.index for each in dispatcher.channels if each.node == node)


async def waits(direct: asyncpg.Connection, index: int) -> Any:
    """Whether a connection of worker *index* waits for a lock. Which pool's: nobody else waits for `target`."""
    query = "select application_name from pg_stat_activity where wait_event_type = 'Lock' and query like '%target%'"
    names = [row[0] for row in await direct.fetch(query)]
    return any(name.split(":")[2] == str(index) for name in names)
