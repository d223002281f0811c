"""`pipeline.write` on its way: how many batches are under way, what holds them, who is tried again; one bad row in a
million."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import numpy as np
import pyarrow as pa
import pytest
import ray
from pools import grant, own_pool, pipeline_of, unique_name
from shared_memory import are_shared
from waiting import eventually

from raypg import QueryPipelineNode, WorkflowConnectionPool, naming
from raypg.actors.worker import PoolWorker
from raypg.config import from_kwargs
from raypg.embedded import EmbeddedServer
from raypg.ingest import inputs
from raypg.server.writing import Intake, Spec

WAITING = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%' || $1 || '%'"


@pytest.fixture
async def locked(table: str, direct: asyncpg.Connection) -> asyncpg.transaction.Transaction:
    """`table` can be read, but not written to, until this transaction ends."""
    transaction = direct.transaction()
    await transaction.start()
    await direct.execute(f"lock table {table} in exclusive mode")
    return transaction


async def test_few_batches_are_under_way(
    single: WorkflowConnectionPool, table: str, locked: asyncpg.transaction.Transaction, pg: EmbeddedServer
) -> None:
    """One worker: two batches are sent to it, and no more is asked for."""
    drawn = 0

    async def batches() -> AsyncIterator[pa.RecordBatch]:
        nonlocal drawn
        for number in range(20):
            drawn += 1
            yield pa.record_batch({"id": [number]})

    work = asyncio.ensure_future(pipeline_of(single).write(batches(), into=table, batch_rows=1))
    other = await asyncpg.connect(**pg.parameters)
    await eventually(lambda: other.fetchval(WAITING, table.partition(".")[2]))
    await eventually(lambda: drawn == 2)
    await asyncio.sleep(0.3)  # time for more, if there were no bound
    assert drawn == 2
    await locked.rollback()
    await other.close()
    assert (await work).rows == 20


async def test_a_worker_holds_two_batches_and_drops_them_at_once(
    pg: EmbeddedServer, table: str, locked: asyncpg.transaction.Transaction
) -> None:
    """In this process, where it can be seen what is alive."""
    worker = PoolWorker("p", 0, "cluster", from_kwargs(name="p", environ={}, **pg.parameters).to_dict())
    await grant(worker, 5)
    alive: list[weakref.ref[pa.RecordBatch]] = []
    intake = Intake(worker._engine)

    async def fetch() -> pa.RecordBatch:
        batch = pa.record_batch({"id": [len(alive)]})
        alive.append(weakref.ref(batch))
        return batch

    schema, name = table.split(".")
    spec = Spec((schema, name), "append", None, "p", None, "fail", False, 0)
    writes = [asyncio.ensure_future(intake.write("job", spec, fetch)) for _ in range(6)]
    await eventually(lambda: len(alive) == 2)
    await asyncio.sleep(0.3)  # time for more, if there were no bound
    assert len(alive) == 2
    await locked.rollback()
    assert [rows for rows, *_ in await asyncio.gather(*writes)] == [1] * 6
    del writes

    def dropped() -> bool:
        gc.collect()
        return [each() for each in alive] == [None] * 6

    await eventually(dropped)  # the thread that looked at it has it for a moment
    await worker.close("the test is over")


async def test_a_worker_encodes_from_rays_memory(single: WorkflowConnectionPool) -> None:
    """What it gets by a reference lies in the object store still."""
    data = pa.table({"id": range(50_000), "note": [f"note {n}" for n in range(50_000)]})
    assert not are_shared(data)
    worker = ray.get_actor(naming.worker_actor(single.name, 0), namespace=naming.NAMESPACE)
    assert await worker.__ray_call__.remote(lambda _, given: are_shared(given), inputs.put(data))


async def test_a_deadlock_is_tried_again(
    ray_cluster: Any, schema: str, direct: asyncpg.Connection, pg: EmbeddedServer
) -> None:
    """Two unique indexes: the order of the key does not help against somebody who goes by the other one."""
    # Who waits looks for a deadlock once, after that time: both must wait by then.
    async with own_pool(pg, max_connections=3, server_settings={"deadlock_timeout": "4s"}) as pool:
        await deadlocked(pool, schema, direct, pg)


async def deadlocked(pool: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection, pg: EmbeddedServer) -> None:
    await direct.execute(f"create table {schema}.two (a int primary key, b int unique); set deadlock_timeout = '30s'")
    transaction = direct.transaction()
    await transaction.start()
    await direct.execute("insert into two values (100, 20)")
    data = pa.table({"a": [1, 2], "b": [10, 20]})
    work = asyncio.ensure_future(pipeline_of(pool).write(data, into=f"{schema}.two", mode="upsert"))
    other = await asyncpg.connect(**pg.parameters)
    await eventually(lambda: other.fetchval(WAITING, "two"))
    # Ours has (1, 10), and this waits for it; it can only go on when ours is rolled back.
    await direct.execute("insert into two values (200, 10)")
    assert not work.done()
    await transaction.rollback()
    await other.close()
    assert (await work).rows == 2
    assert await direct.fetch("select a, b from two order by a") == [(1, 10), (2, 20)]


async def test_a_bar_shows_how_far_it_is(
    pool: WorkflowConnectionPool, table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data: dict[str, Any] = {"id": range(3_000)}
    assert (await pipeline_of(pool).write(pa.table(data), into=table, progress=True, batch_rows=500)).rows == 3_000
    shown = capsys.readouterr().out
    assert table in shown
    assert "3000/3000" in shown


async def test_one_bad_row_in_a_million(pool: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection) -> None:
    pipeline = QueryPipelineNode(name=unique_name("load"), connection_pool=pool)
    await direct.execute(
        f"create unlogged table {schema}.many (id int8, at timestamp, amount int8 check (amount >= 0))"
    )
    ids = np.arange(1_000_000)
    amounts = ids % 1000
    amounts[654_321] = -1
    data = pa.table({"id": ids, "at": pa.array(ids * 10**6, pa.timestamp("us")), "amount": amounts})
    with pytest.raises(asyncpg.CheckViolationError, match="row 654321 of the data") as caught:
        await pipeline.write(data, into=f"{schema}.many", batch_id="million")
    error: Any = caught.value
    assert error.row == 654_321
    first = 654_321 // 65_536 * 65_536
    assert not await direct.fetchval(
        f"select count(*) from {schema}.many where id >= $1 and id < $2", first, first + 65_536
    )
    assert await direct.fetchval("select count(*) from many") == error.written.rows
    written = await pipeline.write(data, into=f"{schema}.many", batch_id="million", on_bad_rows="quarantine")
    assert (written.rows + written.known_rows, written.known_rows, written.quarantined) == (
        999_999,
        error.written.rows,
        1,
    )
    found = await direct.fetchrow(f"select count(*), count(distinct id), sum(id)::int8 from {schema}.many")
    assert tuple(found) == (999_999, 999_999, int(ids.sum()) - 654_321)
    query = "select row, sqlstate, data::json->>'id' from raypg.quarantine where pipeline = $1"
    assert [tuple(row) for row in await direct.fetch(query, pipeline.name)] == [(654_321, "23514", "654321")]
