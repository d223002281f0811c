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
from pools import CapWatch, figures, nothing_leased, own_pool, running, unique_name
from shared_memory import memory_of
from waiting import eventually

from raypg import PostgresDatasource, WorkflowConnectionPool, shard
from raypg.embedded import EmbeddedServer
from raypg.shard import OrderedReader

WAITS = "select 0 as n, pg_backend_pid() as pid, 'x' as t from pg_advisory_xact_lock({})"
"""A query whose row comes when nobody else has the lock."""


def ranges(count: int, rows: int = 20_000) -> list[str]:
    """Queries for the numbers from 0 on, with who reads them; some MB of text."""
    what = "select n, pg_backend_pid() as pid, repeat('x', 500) as t"
    return [f"{what} from generate_series({k * rows}, {(k + 1) * rows - 1}) n" for k in range(count)]


def reader(pool: WorkflowConnectionPool, queries: Sequence[str], patience: float = 30.0, **how: Any) -> OrderedReader:
    """One that waits for its second connection for longer than usual."""
    return OrderedReader(
        pool.transaction,
        lambda connection, query: connection.stream(query, batch_bytes=1 << 20),
        queries,
        patience=patience,
        **how,
    )


async def all_of(reader: OrderedReader) -> pa.Table:
    """What it reads; not in this thread, whose event loop it would block."""
    return await asyncio.to_thread(lambda: pa.Table.from_batches([batch for _, batch in reader.batches()]))


def numbers(table: pa.Table) -> list[int]:
    return table.column("n").to_pylist()  # type: ignore[no-any-return]


def readers(table: pa.Table) -> int:
    """How many connections have read it."""
    return len(set(table.column("pid").to_pylist()))


def assert_same(some: list[pa.Table], others: list[pa.Table]) -> None:
    """The same tables, also for Ray Data, which counts their bytes."""
    assert [table.num_rows for table in some] == [table.num_rows for table in others]
    assert all(one.equals(other) for one, other in zip(some, others, strict=True))
    assert [table.nbytes for table in some] == [table.nbytes for table in others]


@contextlib.asynccontextmanager
async def locked(direct: asyncpg.Connection) -> AsyncIterator[tuple[int, Callable[[], Any]]]:
    """(a lock that is held until the end of the block, or until the function is called)."""
    key = int.from_bytes(os.urandom(4))
    await direct.execute("select pg_advisory_lock($1)", key)
    try:
        yield key, lambda: direct.execute("select pg_advisory_unlock_all()")
    finally:
        await direct.execute("select pg_advisory_unlock_all()")


async def test_the_rows_come_in_order_from_two_connections(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    async with locked(direct) as (key, unlock):
        read = reader(pool, [WAITS.format(key), *ranges(6)])
        reading = asyncio.create_task(all_of(read))
        await eventually(lambda: read._read == {1})  # before the first one
        await unlock()
        found = await reading
    assert numbers(found) == [0, *range(120_000)]
    assert readers(found) >= 2
    assert not read.alone
    alone = await all_of(reader(pool, ranges(2), reads_ahead=False))
    assert numbers(alone) == list(range(40_000))
    assert readers(alone) == 1
    await eventually(lambda: nothing_leased(pool))


async def test_one_connection_does_where_there_is_no_other(ray_cluster: Any, pg: EmbeddedServer) -> None:
    async with own_pool(pg, max_connections=2) as own:
        async with own.acquire():
            read = reader(own, ranges(8, 100_000), patience=0.1)
            found = await all_of(read)
            assert numbers(found) == list(range(800_000))
            assert readers(found) == 1
            assert read.alone, "it has waited, and has left the queue"
            assert (await figures(own))["detailed_metrics"]["counters"]["pool_exhaustion_events"] == 0
        await eventually(lambda: nothing_leased(own))


async def test_others_are_not_kept_waiting(ray_cluster: Any, pg: EmbeddedServer) -> None:
    """Three readers that nobody takes anything from, in a pool in which each has one connection."""
    async with own_pool(pg, max_connections=5) as own, CapWatch(pg, own.name) as watch:
        # Each query has more than may be read ahead, and the server is held up with the first one.
        reads = [reader(own, ranges(3, 40_000), ahead_bytes=4 << 20) for _ in range(3)]
        batches = [read.batches() for read in reads]
        firsts = await asyncio.gather(*(asyncio.to_thread(next, one) for one in batches))
        assert [number for number, _ in firsts] == [0, 0, 0]
        await eventually(lambda: all(read.alone for read in reads))
        assert await own.fetchval("select 1", timeout=10) == 1
        for one, (_, first) in zip(batches, firsts, strict=True):
            rest = await asyncio.to_thread(lambda one=one: [batch for _, batch in one])
            assert numbers(pa.Table.from_batches([first, *rest])) == list(range(120_000))
    watch.held(5)


async def test_what_is_too_much_to_be_held_is_read_later(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    """The second query has 200 MB; the first waits for a lock."""
    large = "select n, pg_backend_pid() as pid, repeat('x', 2000) as t from generate_series(1, 100000) n"
    before = memory_of(os.getpid())
    async with locked(direct) as (key, unlock):
        read = reader(pool, [WAITS.format(key), large], ahead_bytes=8 << 20)
        reading = asyncio.create_task(all_of(read))
        await eventually(lambda: read.alone)
        assert memory_of(os.getpid()) - before < 60 << 20
        await unlock()
        found = await reading
    assert numbers(found) == list(range(100_001))
    assert readers(found) == 1


async def test_an_error_is_that_of_the_first_connection(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    broken = "select n / (n - 1000) as n, 0 as pid, 'x' as t from generate_series(1, 100000) n"
    async with locked(direct) as (key, unlock):
        read = reader(pool, [WAITS.format(key), broken, *ranges(1)])
        batches = read.batches()
        first = asyncio.create_task(asyncio.to_thread(next, batches))
        await eventually(lambda: read.alone)  # it has met the error, which is not the turn of yet
        await unlock()
        assert (await first)[0] == 0
        with pytest.raises(asyncpg.DivisionByZeroError):
            await asyncio.to_thread(lambda: list(batches))
    # And whatever is read ahead then ends too.
    mark = unique_name("other")
    long = f"select 1 as n, 0 as pid, '{mark}' as t from pg_sleep(60)"
    async with locked(direct) as (key, unlock):
        failing = f"select 1 / (pid - pg_backend_pid()) as n, pid, t from ({WAITS.format(key)}) q"
        reading = asyncio.create_task(all_of(reader(pool, [failing, long])))

        async def is_running() -> bool:
            return await running(direct, mark) == 1

        await eventually(is_running)
        await unlock()
        with pytest.raises(asyncpg.DivisionByZeroError):
            await reading
    await eventually(lambda: nothing_leased(pool))
    assert await running(direct, mark) == 0


async def test_whoever_stops_early_leaves_nothing(pool: WorkflowConnectionPool) -> None:
    def first_of(read: OrderedReader) -> int:
        batches = read.batches()
        _, first = next(batches)
        batches.close()
        return int(first.column("n")[0].as_py())

    assert await asyncio.to_thread(first_of, reader(pool, ranges(4, 100_000))) == 0
    # Or where it may not wait: a generator ends in the thread that drops it last.
    dropped = reader(pool, ranges(4, 100_000)).batches()
    assert (await asyncio.to_thread(next, dropped))[0] == 0
    del dropped
    await eventually(lambda: nothing_leased(pool))


async def test_a_shard_of_a_table_is_read_in_ranges(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    await direct.execute(
        f"create table {schema}.wide as select n, pg_backend_pid() as pid, repeat('x', 1000) as t "
        "from generate_series(0, 19999) n"
    )
    for shards, each in ((1, 2), (2, 1)):
        source = PostgresDatasource(pool, table=f"{schema}.wide", shards=shards)
        tasks = source.get_read_tasks(shards)
        assert [len(task.read_fn.queries) for task in tasks] == [each] * shards
        blocks = await asyncio.to_thread(lambda tasks=tasks: [block for task in tasks for block in task()])
        assert numbers(pa.concat_tables(blocks)) == list(range(20_000))
        assert len(blocks) == shards * each, "how much comes at a time does not divide blocks"
        if shards == 1:
            whole = blocks
        source.close()
    loose = PostgresDatasource(pool, table=f"{schema}.wide", consistent=False)
    (task,) = loose.get_read_tasks(1)
    assert len(task.read_fn.queries) == 2
    assert_same(await asyncio.to_thread(lambda: list(task())), whole)  # over one connection and over two
    (limited,) = source.get_read_tasks(1, per_task_row_limit=3)
    assert numbers(pa.concat_tables(await asyncio.to_thread(lambda: list(limited())))) == [0, 1, 2]
    source.close()


async def test_a_task_that_runs_again_makes_the_same_blocks(
    pool: WorkflowConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray runs it again for a block that it has lost. How the rows come is another each time."""
    monkeypatch.setattr(shard, "TABLE_BYTES", 500_000)
    query = (
        "select n, nullif(repeat('x', n % 700), '') as t, current_setting('synchronize_seqscans') as joins_scans, "
        "current_setting('max_parallel_workers_per_gather') as helpers from generate_series(0, 9999) n"
    )
    found = []
    for batch_bytes in (20_000, 300_000, 4_000_000):
        source = PostgresDatasource(pool, query=query, batch_bytes=batch_bytes, consistent=False)
        (task,) = source.get_read_tasks(1)
        found.append(await asyncio.to_thread(lambda task=task: list(task())))
    first = found[0]
    assert numbers(pa.concat_tables(first)) == list(range(10_000))
    assert len(first) > 6
    for again in found[1:]:
        assert_same(again, first)
    assert first[0].slice(0, 1).select(["joins_scans", "helpers"]).to_pylist() == [
        {"joins_scans": "off", "helpers": "0"}
    ]


async def test_rows_keep_the_order_of_their_pages(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    """Whatever the plan would be: an index that serves the filter has another order."""
    table = f"{schema}.mixed"
    await direct.execute(
        f"create table {table} as select n * 7919 % 50000 as n, repeat('x', 500) as t from generate_series(0, 49999) n"
    )
    await direct.execute(f"create index on {table} (n); analyze {table}")
    no_index = " and ".join(f"current_setting('enable_{scan}') = 'off'" for scan in ("indexscan", "indexonlyscan"))
    source = PostgresDatasource(pool, table=table, filter=f"n < 200 and {no_index}", shards=1)
    (task,) = source.get_read_tasks(1)
    found = numbers(pa.concat_tables(await asyncio.to_thread(lambda: list(task()))))
    source.close()
    assert found == [row["n"] for row in await direct.fetch(f"select n from {table} where n < 200 order by ctid")]
    assert sorted(found) == list(range(200))


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
