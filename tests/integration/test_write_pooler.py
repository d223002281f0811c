"""`pipeline.write` and Ray Data behind a real PgBouncer that shares transactions: nothing may be left in a session."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import asyncpg
import pyarrow as pa
import pytest
import ray
from pgbouncer import PgBouncer
from pools import lasting_pool, pipeline_of, unique_name

from raypg import (
    BatchConflictError,
    PostgresDatasink,
    PostgresDatasource,
    QueryPipelineNode,
    WorkflowConnectionPool,
    ledger,
)
from raypg.embedded import EmbeddedServer

ROWS = 3_000


@pytest.fixture(scope="module")
def behind(ray_cluster: Any, pg18: EmbeddedServer) -> Iterator[WorkflowConnectionPool]:
    """A pool of 4 connections to a PgBouncer with two to the server."""
    with PgBouncer(pg18, "transaction", size=2) as bouncer:
        yield from lasting_pool(pg18, **bouncer.parameters, max_connections=4, pooler="transaction")


def items(amount: int = 0) -> pa.Table:
    return pa.table({"id": range(ROWS), "label": [f"row {n}" for n in range(ROWS)], "amount": [amount] * ROWS})


async def test_all_modes_and_the_ledger(behind: WorkflowConnectionPool, table: str, direct: asyncpg.Connection) -> None:
    pipeline = QueryPipelineNode(name=unique_name("load"), connection_pool=behind)
    how: dict[str, Any] = {"into": table, "batch_rows": 500}
    assert (await pipeline.write(items(), batch_id="one", **how)).rows == ROWS
    assert (await pipeline.write(items(), batch_id="one", **how)).known_rows == ROWS
    with pytest.raises(BatchConflictError):
        await pipeline.write(items(1), batch_id="one", **how)
    several = [pipeline_of(behind).write(items(n), mode="upsert", **how) for n in (1, 2, 3)]
    assert [each.rows for each in await asyncio.gather(*several)] == [ROWS] * 3
    assert (await pipeline.write(items(), mode="ignore", **how)).duplicates == ROWS
    with pytest.raises(asyncpg.UniqueViolationError, match=r"row \d+ of the data"):
        await pipeline.write(items(), **how)
    bad = items().set_column(2, "amount", pa.array([-1 if n == 7 else 5 for n in range(ROWS)]))
    written = await pipeline.write(bad, mode="upsert", on_bad_rows="quarantine", **how)
    assert (written.rows, written.quarantined) == (ROWS - 1, 1)
    assert await direct.fetchval(f"select count(*) from {table} where amount = 5") == ROWS - 1
    assert await ledger.prune(behind, pipeline=pipeline.name, older_than=ledger.parse_age("0s")) == ROWS // 500
    left = "select count(*) from pg_class, pg_sleep(0.05) where relnamespace = pg_my_temp_schema()"
    assert await asyncio.gather(behind.fetchval(left), behind.fetchval(left)) == [0, 0]


async def test_ray_data_there_and_back(
    behind: WorkflowConnectionPool, table: str, direct: asyncpg.Connection, schema: str, quiet_ray_data: None
) -> None:
    await direct.execute(
        f"create table {schema}.source as select n as id, 'x' as label from generate_series(1, 9000) n"
    )
    source = PostgresDatasource(behind, table=f"{schema}.source", shards=3)
    sink = PostgresDatasink(behind, table, mode="upsert", batch_rows=2_000)
    dataset = ray.data.read_datasource(source, override_num_blocks=3)
    await asyncio.to_thread(lambda: dataset.write_datasink(sink))
    source.close()
    assert await direct.fetchrow(f"select count(*), sum(id) from {table}") == (9000, 9000 * 9001 // 2)
