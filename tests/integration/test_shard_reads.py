"""One read task over two connections: rows in their order, whatever connections there are; and what ends early."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import asyncpg
import pyarrow as pa
import pytest
from pools import nothing_leased, own_pool, running, unique_name
from shared_memory import memory_of
from waiting import eventually

from raypg import PostgresDatasource, WorkflowConnectionPool
from raypg.embedded import EmbeddedServer
from raypg.shard import OrderedReader

WAITS = "select 0 as n, 0 as pid from pg_advisory_xact_lock({})"
"""A query whose rows come when nobody else has the lock."""


def ranges(count: int, rows: int = 20_000) -> list[str]:
    """Queries for the numbers from 0 on, with who reads them; some MB of text."""
    what = "select n, pg_backend_pid() as pid, repeat('x', 500) as t"
    return [f"{what} from generate_series({k * rows}, {(k + 1) * rows - 1}) n" for k in range(count)]


def reader(
    pool: WorkflowConnectionPool, queries: Sequence[str], connections: int = 2, held: int = 1 << 26, **how: Any
) -> OrderedReader:
    return OrderedReader(
        lambda: pool.transaction(**how),
        lambda connection, query: connection.stream(query, batch_bytes=1 << 20),
        queries,
        connections,
        held,
    )


async def all_of(reader: OrderedReader) -> pa.Table:
    """What it reads; not in this thread, whose event loop it would block."""
    return await asyncio.to_thread(lambda: pa.Table.from_batches(reader.batches()))


def numbers(table: pa.Table) -> list[int]:
    return table.column("n").to_pylist()  # type: ignore[no-any-return]


async def refusals(pool: WorkflowConnectionPool) -> int:
    """How often no connection became free in time."""
    status = await pool.process({"operation": "get_comprehensive_status"})
    return int(status["detailed_metrics"]["counters"]["pool_exhaustion_events"])


@contextlib.asynccontextmanager
async def locked(direct: asyncpg.Connection) -> AsyncIterator[tuple[int, Callable[[], Any]]]:
    """(a lock that is held until the end of the block, or until the function is called)."""
    key = int.from_bytes(os.urandom(4))
    await direct.execute("select pg_advisory_lock($1)", key)
    try:
        yield key, lambda: direct.execute("select pg_advisory_unlock_all()")
    finally:
        await direct.execute("select pg_advisory_unlock_all()")


async def test_the_rows_come_in_order_from_two_connections(pool: WorkflowConnectionPool) -> None:
    for held in (1 << 26, 1 << 20):  # with room for all, and for one batch
        found = await all_of(reader(pool, ranges(6), held=held))
        assert numbers(found) == list(range(120_000))
        assert len(set(found.column("pid").to_pylist())) == 2
    alone = await all_of(reader(pool, ranges(2), connections=1))
    assert numbers(alone) == list(range(40_000))
    assert len(set(alone.column("pid").to_pylist())) == 1
    await eventually(lambda: nothing_leased(pool))


async def test_one_connection_does_where_there_is_no_other(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection
) -> None:
    async with own_pool(pg, max_connections=2) as own:
        async with own.acquire():
            found = await all_of(reader(own, ranges(5)))
            assert numbers(found) == list(range(100_000))
            assert len(set(found.column("pid").to_pylist())) == 1
            # The other lane waited, and left when there was nothing more to do.
            assert await refusals(own) == 0
            async with locked(direct) as (key, unlock):
                # And if it was told that there is none, while the first one waits for its rows.
                reading = asyncio.create_task(all_of(reader(own, [WAITS.format(key)] * 2, timeout=0.2)))

                async def refused() -> bool:
                    return await refusals(own) == 1

                await eventually(refused)
                await unlock()
                assert numbers(await reading) == [0, 0]
        await eventually(lambda: nothing_leased(own))


async def test_only_so_much_is_read_ahead(pool: WorkflowConnectionPool, direct: asyncpg.Connection) -> None:
    """The second query has 200 MB; the first waits for a lock."""
    mark = unique_name("ahead")
    large = f"select n, pg_backend_pid() as pid, repeat('x', 2000) as t /* {mark} */ from generate_series(1, 100000) n"
    async with locked(direct) as (key, unlock):
        first = f"select 0 as n, 0 as pid, 'x' as t from pg_advisory_xact_lock({key})"
        reading = asyncio.create_task(all_of(reader(pool, [first, large], held=8 << 20)))
        stuck = "select count(*) from pg_stat_activity where query like $1 and wait_event = 'ClientWrite'"
        before = memory_of(os.getpid())

        async def held_up() -> bool:
            return bool(await direct.fetchval(stuck, f"%{mark}%") == 1)

        await eventually(held_up)
        assert memory_of(os.getpid()) - before < 60 << 20
        await unlock()
        assert numbers(await reading) == list(range(100_001))


async def test_an_error_ends_all_of_it(pool: WorkflowConnectionPool, direct: asyncpg.Connection) -> None:
    mark = unique_name("other")
    broken = "select n / (n - 1000) as n, 0 as pid, 'x' as t from generate_series(1, 100000) n"
    long = f"select 1 as n, 0 as pid, 'x' as t from pg_sleep(60) /* {mark} */"
    with pytest.raises(asyncpg.DivisionByZeroError):
        await all_of(reader(pool, [long, broken]))
    await eventually(lambda: nothing_leased(pool))
    assert await running(direct, mark) == 0


async def test_whoever_stops_early_leaves_nothing(pool: WorkflowConnectionPool, direct: asyncpg.Connection) -> None:
    def first_of(read: OrderedReader) -> int:
        batches = read.batches()
        number = next(batches).column("n")[0].as_py()
        batches.close()
        return int(number)

    assert await asyncio.to_thread(first_of, reader(pool, ranges(4, 100_000), held=1 << 20)) == 0
    await eventually(lambda: nothing_leased(pool))
    assert await direct.fetchval("select count(*) from pg_stat_activity where wait_event = 'ClientWrite'") == 0


async def test_a_shard_of_a_table_is_read_in_ranges(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    await direct.execute(
        f"create table {schema}.wide as select n, pg_backend_pid() as pid, repeat('x', 1000) as t "
        "from generate_series(0, 19999) n"
    )
    source = PostgresDatasource(pool, table=f"{schema}.wide")
    for shards, each in ((1, 2), (2, 1)):
        source = PostgresDatasource(pool, table=f"{schema}.wide", shards=shards)
        tasks = source.get_read_tasks(shards)
        assert [len(task.read_fn.queries) for task in tasks] == [each] * shards
        blocks = await asyncio.to_thread(lambda tasks=tasks: [block for task in tasks for block in task()])
        assert numbers(pa.concat_tables(blocks)) == list(range(20_000))
        source.close()
    (limited,) = source.get_read_tasks(1, per_task_row_limit=3)
    assert numbers(pa.concat_tables(await asyncio.to_thread(lambda: list(limited())))) == [0, 1, 2]
    source.close()


async def test_what_lies_beside_a_table_counts(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    """Values of 100 kB are not in the table's own pages: of these there is one."""
    table = f"{schema}.large"
    await direct.execute(f"create table {table} (n int, t text); alter table {table} alter t set storage external")
    await direct.execute(f"insert into {table} select n, repeat('x', 100000) from generate_series(1, 200) n")
    await direct.execute(f"analyze {table}")
    source = PostgresDatasource(pool, table=table, consistent=False)
    assert await asyncio.to_thread(source.estimate_inmemory_data_size) == pytest.approx(20_000_000, rel=0.1)
