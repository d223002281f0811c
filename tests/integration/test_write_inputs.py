"""What `pipeline.write` takes: references that are still being made, and Datasets, which stay as they are."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

import asyncpg
import pyarrow as pa
import pytest
import ray
from pools import unique_name
from waiting import eventually

from raypg import IncompatibleDataError, QueryPipelineNode, WorkflowConnectionPool

pytestmark = pytest.mark.usefixtures("quiet_ray_data")

EACH = 1_000
FOUND = "select count(*), count(distinct id), sum(id) from {}"


def part(number: int) -> pa.Table:
    return pa.table({"id": range(number * EACH, (number + 1) * EACH)})


def expected(parts: int) -> tuple[int, int, int]:
    rows = parts * EACH
    return rows, rows, rows * (rows - 1) // 2


@pytest.fixture
def pipeline(pool: WorkflowConnectionPool) -> QueryPipelineNode:
    return QueryPipelineNode(name=unique_name("write"), connection_pool=pool)


async def test_references_of_a_task_that_still_makes_them(
    pipeline: QueryPipelineNode, direct: asyncpg.Connection, table: str
) -> None:
    """A streaming generator: its batches are written while it makes the next ones."""

    @ray.remote(num_cpus=0, num_returns="streaming")
    def parts() -> Iterator[pa.Table]:
        for number in range(6):
            yield part(number)

    for _ in range(2):
        written = await pipeline.write(parts.remote(), into=table, batch_id="stream")
    assert (written.rows, written.known_batches, written.known_rows) == (0, 6, 6 * EACH)
    assert await direct.fetchrow(FOUND.format(table)) == expected(6)


async def test_a_dataset_whose_write_was_broken_off_is_written_once(
    pipeline: QueryPipelineNode, direct: asyncpg.Connection, table: str, rng: random.Random
) -> None:
    """Its blocks are ready in another order each time; the order of its rows, and so its batches, is the same."""

    def data() -> ray.data.Dataset:
        waits = rng.sample([number * 0.02 for number in range(12)], 12)

        def slowly(block: pa.Table) -> pa.Table:
            time.sleep(waits[block["id"][0].as_py() // EACH])  # what makes the order of the blocks
            return block

        parts = ray.data.from_arrow([part(number) for number in range(12)])
        return parts.map_batches(slowly, batch_size=None, batch_format="pyarrow")

    first = data()
    work = asyncio.ensure_future(pipeline.write(first, into=table, batch_id="data", batch_rows=700))

    async def some() -> bool:
        return bool(await direct.fetchval(f"select count(*) from {table}") >= 2_100)

    await eventually(some, timeout=60)
    work.cancel()
    await asyncio.wait((work,))
    again = await pipeline.write(data(), into=table, batch_id="data", batch_rows=700)
    assert again.known_batches >= 3
    assert await direct.fetchrow(FOUND.format(table)) == expected(12)


async def test_a_reference_to_several_batches_is_one(
    pipeline: QueryPipelineNode, direct: asyncpg.Connection, table: str
) -> None:
    several = ray.put([part(0), part(1).to_batches()[0], part(2)])
    written = await pipeline.write(several, into=table, batch_id="several")
    assert (written.rows, written.batches) == (3 * EACH, 1)
    assert await direct.fetchrow(FOUND.format(table)) == expected(3)
    with pytest.raises(IncompatibleDataError, match="different columns"):
        await pipeline.write(ray.put([part(3), part(4).append_column("n", [[1] * EACH])]), into=table)


async def test_a_dataset_is_as_it_was(pipeline: QueryPipelineNode, table: str) -> None:
    data = ray.data.from_arrow(part(0))
    await pipeline.write(data, into=table, batch_id="x")
    assert data.context.execution_options.preserve_order is False
    data.context.execution_options.preserve_order = True
    await pipeline.write(data, into=table, mode="ignore", key="id")
    assert data.context.execution_options.preserve_order is True
