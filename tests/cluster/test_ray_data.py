"""Ray Data over three nodes: reads and writes by all workers of a pool, and a node that dies with both."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
from nodes import Nodes
from pools import CapWatch, own_pool
from waiting import eventually

from raypg import PostgresDatasink, PostgresDatasource
from raypg.embedded import EmbeddedServer

SUM = "select count(*), sum(id), sum(twice) from {}"


@pytest.fixture
async def tables(schema: str, direct: asyncpg.Connection, quiet_ray_data: None) -> tuple[str, str]:
    """A table with 60,000 rows, and an empty one like it."""
    await direct.execute("create table source as select n as id, 2 * n as twice from generate_series(1, 60000) n")
    await direct.execute("create table target (id int primary key, twice int)")
    return f"{schema}.source", f"{schema}.target"


async def test_all_workers_take_part(
    three_nodes: tuple[str, str, str], pg: EmbeddedServer, direct: asyncpg.Connection, tables: tuple[str, str]
) -> None:
    source, target = tables
    async with own_pool(pg, max_connections=7) as pool, CapWatch(pg, pool.name) as watch:
        sink = PostgresDatasink(pool, target, batch_rows=2_000)

        def copy() -> None:
            rows = PostgresDatasource(pool, table=source, shards=6)
            ray.data.read_datasource(rows, override_num_blocks=6).write_datasink(sink)
            rows.close()

        await asyncio.to_thread(copy)
        assert sink.result is not None
        assert len(sink.result.workers) == 3
        assert sum(sink.result.workers.values()) == sink.result.rows == 60_000
    watch.held(7)
    assert await direct.fetchrow(SUM.format(target)) == await direct.fetchrow(SUM.format(source))


async def test_a_node_that_dies_doubles_no_row_and_loses_none(
    three_nodes: tuple[str, str, str],
    nodes: Nodes,
    pg: EmbeddedServer,
    direct: asyncpg.Connection,
    tables: tuple[str, str],
) -> None:
    _, target = tables
    fourth = await asyncio.to_thread(lambda: nodes.add(cpus=2))

    def rows(block: pa.Table) -> pa.Table:
        return pa.table({"id": block["id"], "twice": pc.multiply(block["id"], 2)})

    async with own_pool(pg, max_connections=9) as pool:
        data = ray.data.range(200_000, override_num_blocks=20).map_batches(rows, batch_format="pyarrow")
        sink = PostgresDatasink(pool, target, batch_rows=1_000)
        writing = asyncio.create_task(asyncio.to_thread(lambda: data.write_datasink(sink)))

        async def begun() -> Any:
            return await direct.fetchval(f"select count(*) from {target}")

        await eventually(begun, timeout=60)
        await asyncio.to_thread(nodes.kill, fourth)
        await asyncio.wait_for(writing, 120)
    found = await direct.fetchrow(SUM.format(target))
    assert found == (200_000, 200_000 * 199_999 // 2, 200_000 * 199_999)
