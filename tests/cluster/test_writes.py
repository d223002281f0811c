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


def on(node: str, numbers: range, soft: bool) -> list[Any]:
    """Batches that are made on *node*."""
    made = part.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=soft))
    return [made.remote(number) for number in numbers]


async def test_batches_of_all_nodes_by_all_workers_though_one_node_dies(
    three_nodes: tuple[str, str, str], nodes: Nodes, pg: EmbeddedServer, direct: asyncpg.Connection, schema: str
) -> None:
    """The worker of the node that dies has begun batches, and its object store holds others: Ray makes those anew, and
    the ledger sees to it that none is written twice."""
    fourth = await asyncio.to_thread(nodes.add)
    await direct.execute("create table target (id int8, twice int8)")
    async with own_pool(pg, max_connections=9, workers=4, **NO_BREAKER) as pool:
        pipeline = pipeline_of(pool)
        made = [each for n, node in enumerate(three_nodes) for each in on(node, range(2 * n, 2 * n + 2), soft=False)]
        made += on(fourth, range(6, 16), soft=True)
        await asyncio.to_thread(lambda: ray.wait(made, num_returns=len(made), fetch_local=False))
        written = await pipeline.write(made[:8], into=f"{schema}.target")
        assert (written.rows, written.batches, len(written.workers)) == (8 * EACH, 8, 4)
        assert await direct.fetchrow(FOUND.format("target")) == expected(8)
        blocker = direct.transaction()
        await blocker.start()
        await direct.execute("truncate target")  # nobody can write before this commits
        work = asyncio.ensure_future(pipeline.write(made, into=f"{schema}.target", batch_id=schema))
        other = await asyncpg.connect(**pg.parameters)
        index = await worker_on(pool, fourth)
        await eventually(lambda: waits(other, index), 30, "the worker of that node has begun a batch")
        await asyncio.to_thread(nodes.kill, fourth)
        await blocker.commit()
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
