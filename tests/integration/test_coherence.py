"""What a process may keep of what it has read: taken back before a write to it is sent, whoever writes, and how."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import asyncpg
import pyarrow as pa
import pytest
import ray
from pools import own_pool, pipeline_of
from waiting import eventually

from raypg import ConfigError, WorkflowConnectionPool, cache_watch, naming
from raypg.coherence import Coherence, coherence_of
from raypg.embedded import EmbeddedServer

Write: TypeAlias = "Callable[[WorkflowConnectionPool, str], Awaitable[object]]"


def shown(table: str) -> frozenset[str]:
    """The table as verdicts name it."""
    return frozenset((".".join(f'"{part}"' for part in table.split(".")),))


@pytest.fixture
async def coherence(pool: WorkflowConnectionPool) -> AsyncIterator[Coherence]:
    found = coherence_of(await pool._dispatcher())
    await found.start()
    yield found
    await found.close()


async def held(coherence: Coherence, tables: frozenset[str]) -> int:
    """Wait until *tables* are shared; the mark from which on they are."""
    await eventually(lambda: coherence.may_keep(tables))
    return coherence.mark()


async def execute(pool: WorkflowConnectionPool, table: str) -> None:
    await pool.execute(f"insert into {table} values (1)")


async def executemany(pool: WorkflowConnectionPool, table: str) -> None:
    await pool.executemany(f"insert into {table} values ($1)", [(1,), (2,)])


async def fetch(pool: WorkflowConnectionPool, table: str) -> None:
    await pool.fetch(f"with new as (insert into {table} values (1) returning id) select * from new")


async def lease(pool: WorkflowConnectionPool, table: str) -> None:
    async with pool.acquire() as connection:
        await connection.execute(f"insert into {table} values (1)")


async def prepared(pool: WorkflowConnectionPool, table: str) -> None:
    async with pool.acquire() as connection:
        statement = await connection.prepare(f"insert into {table} values ($1)")
        await statement.fetch(1)


async def cursor(pool: WorkflowConnectionPool, table: str) -> None:
    async with pool.transaction() as transaction:
        async for _ in transaction.cursor(f"insert into {table} values (1) returning id"):
            pass


async def transaction(pool: WorkflowConnectionPool, table: str) -> None:
    async with pool.transaction() as tx:
        await tx.execute(f"insert into {table} values (1)")


async def several(pool: WorkflowConnectionPool, table: str) -> None:
    async with pool.acquire() as connection:
        await connection.execute(f"select 1; insert into {table} values (1); select 2")


async def pipeline(pool: WorkflowConnectionPool, table: str, strategy: str = "best_effort") -> None:
    node = pipeline_of(pool, strategy=strategy)
    for number in range(10):
        await node.add_query(f"insert into {table} values ($1)", [number])
    assert all(result.success for result in await node.flush())
    await node.close()


async def transactional(pool: WorkflowConnectionPool, table: str) -> None:
    await pipeline(pool, table, "transactional")


async def sequential(pool: WorkflowConnectionPool, table: str) -> None:
    await pipeline(pool, table, "sequential")


async def ingest(pool: WorkflowConnectionPool, table: str) -> None:
    node = pipeline_of(pool)
    await node.write(pa.table({"id": [1, 2, 3]}), into=table)
    await node.close()


async def ddl(pool: WorkflowConnectionPool, table: str) -> None:
    await pool.execute(f"alter table {table} add column more int")


async def block(pool: WorkflowConnectionPool, table: str) -> None:
    await pool.execute(f"do $$ begin insert into {table} values (1); end $$")


@pytest.mark.parametrize(
    "write",
    [
        execute, executemany, fetch, lease, prepared, cursor, transaction, several, pipeline, transactional,
        sequential, ingest, ddl, block,
    ],
)  # fmt: skip
async def test_each_way_to_write_takes_back_what_is_held(
    pool: WorkflowConnectionPool, coherence: Coherence, table: str, direct: asyncpg.Connection, write: Write
) -> None:
    tables, dropped = shown(table), []

    def drop(which: frozenset[str] | None) -> None:
        dropped.append(which)

    coherence.on_change(drop)
    mark = await held(coherence, tables)
    assert coherence.unchanged(tables, mark)
    await write(pool, table)
    assert not coherence.unchanged(tables, mark)
    assert any(which is None or which >= tables for which in dropped)
    after = await held(coherence, tables)
    assert coherence.unchanged(tables, after)
    coherence.forget(drop)


async def test_what_is_not_written_to_stays(
    pool: WorkflowConnectionPool, coherence: Coherence, schema: str, direct: asyncpg.Connection
) -> None:
    await direct.execute("create table one (id int); create table two (id int); create sequence numbers")
    one, two = shown(f"{schema}.one"), shown(f"{schema}.two")
    await pool.execute(f"create table {schema}.three (id int)")  # whereupon the catalogue is read again
    await held(coherence, one | two)

    async def only_one() -> bool:
        mark = await held(coherence, one | two)
        await pool.execute(f"insert into {schema}.one values (1)")
        assert not coherence.unchanged(one, mark)
        return coherence.unchanged(two, mark)

    await eventually(only_one)

    async def neither() -> bool:
        mark = await held(coherence, one | two)
        await pool.fetch(f"select * from {schema}.one")
        await pool.fetchval(f"select nextval('{schema}.numbers')")
        await pool.execute("select pg_notify('nobody', 'x')")
        async with pool.transaction() as tx:
            await tx.execute(f"declare c cursor for select * from {schema}.one")
            assert len(await tx.fetch("fetch 1 from c")) == 1
        return coherence.unchanged(one | two, mark)

    await eventually(neither, 30)

    async def only_one_by_a_ledger() -> bool:  # that may not exist
        mark = await held(coherence, one | two)
        node = pipeline_of(pool)
        await node.write(pa.table({"id": [1]}), into=f"{schema}.one")
        await node.close()
        assert not coherence.unchanged(one, mark)
        return coherence.unchanged(two, mark)

    await eventually(only_one_by_a_ledger, 30)


async def leased(pool: WorkflowConnectionPool, query: str) -> None:
    async with pool.acquire() as connection:
        await connection.fetch(query)


async def pipelined(pool: WorkflowConnectionPool, query: str) -> None:
    node = pipeline_of(pool)
    await node.add_query(query)
    assert all(result.success for result in await node.flush())
    await node.close()


async def test_a_read_that_writes_by_a_domain_takes_back_what_is_held(
    pool: WorkflowConnectionPool, coherence: Coherence, schema: str, table: str
) -> None:
    tables = shown(table)
    await pool.execute(
        f"create function {schema}.notes(n int) returns bool language sql as"
        f" 'insert into {table} values (n) on conflict do nothing returning true'"
    )
    await pool.execute(f"create domain {schema}.noted as int check ({schema}.notes(value))")
    query = f"select 1::{schema}.noted"
    for way in (WorkflowConnectionPool.fetch, leased, pipelined):

        async def takes_back(way: Write = way) -> bool:
            mark = await held(coherence, tables)
            await way(pool, query)
            return not coherence.unchanged(tables, mark)

        await eventually(takes_back)  # whichever worker it is, as soon as that has read the catalogue again
    assert await pool.fetchval(f"select count(*) from {table}") == 1


async def test_nothing_is_granted_while_a_transaction_that_wrote_is_open(
    pool: WorkflowConnectionPool, coherence: Coherence, table: str
) -> None:
    tables = shown(table)
    await held(coherence, tables)
    async with pool.transaction() as tx:
        await tx.execute(f"insert into {table} values (1)")
        for _ in range(3):
            assert not coherence.may_keep(tables)
            await tx.fetchval("select pg_sleep(0.2)")
        assert not coherence.may_keep(tables)
    await held(coherence, tables)


async def test_what_runs_while_the_catalogue_changes_may_write_to_anything(
    pool: WorkflowConnectionPool, coherence: Coherence, schema: str, table: str, direct: asyncpg.Connection
) -> None:
    await direct.execute("create table other (id int)")
    await pool.execute(f"create table {schema}.first (id int)")
    other = shown(f"{schema}.other")
    await held(coherence, other)
    sleeps = f"insert into {table} select 1 from pg_sleep(1)"
    running = asyncio.ensure_future(pool.execute(sleeps))
    await eventually(lambda: direct.fetchval("select count(*) from pg_stat_activity where query = $1", sleeps))
    await held(coherence, other)  # it writes to something else
    await pool.execute(f"create table {schema}.more (id int)")
    while not running.done():
        assert not coherence.may_keep(other) or running.done()
        await asyncio.sleep(0.02)
    await held(coherence, other)


async def test_who_has_a_connection_after_one_that_was_widened_is_not_taken_for_it(
    ray_cluster: Any, pg18: EmbeddedServer, schema: str, direct: asyncpg.Connection
) -> None:
    await direct.execute("create table one (id int); create table two (id int); create table other (id int)")
    other = shown(f"{schema}.other")
    running = "select count(*) from pg_stat_activity where state = 'active' and query = $1"
    async with own_pool(pg18, max_connections=2, workers=1) as pool:
        coherence = coherence_of(await pool._dispatcher())
        await coherence.start()

        async def begin(sql: str, lock: int) -> tuple[str, asyncio.Future[str]]:
            """Begin a statement that ends when *lock* is given up."""
            await direct.execute("select pg_advisory_lock($1)", lock)
            text = f"{sql} select 1 from pg_advisory_xact_lock({lock})"
            return text, asyncio.ensure_future(pool.execute(text))

        async def waiting() -> bool:
            return bool(await worker.__ray_call__.remote(lambda self: len(self._engine.queue)))

        async def knows_the_catalogue() -> bool:
            mark = await held(coherence, other)
            await pool.execute(f"insert into {schema}.one values (1)")
            return coherence.unchanged(other, mark)

        worker = ray.get_actor(naming.worker_actor(pool.name, 0), namespace=naming.NAMESPACE)
        await eventually(knows_the_catalogue)
        text, first = await begin(f"insert into {schema}.one", 71)
        await eventually(lambda: direct.fetchval(running, text))
        text, change = await begin(f"create table {schema}.more as", 72)
        await eventually(lambda: direct.fetchval(running, text))
        # It gets the connection of the first one, while nobody knows the catalogue.
        text, after = await begin(f"insert into {schema}.two", 73)
        await eventually(waiting)
        await direct.execute("select pg_advisory_unlock(71)")
        await first
        await eventually(lambda: direct.fetchval(running, text))
        await direct.execute("select pg_advisory_unlock(72)")
        await change
        for _ in range(50):
            assert not coherence.may_keep(other)
            await asyncio.sleep(0.02)
        await direct.execute("select pg_advisory_unlock(73)")
        await after
        await held(coherence, other)
        await coherence.close()


async def test_a_lock_that_keeps_the_catalogue_from_being_read_keeps_nobody_from_writing(
    pool: WorkflowConnectionPool, coherence: Coherence, schema: str, direct: asyncpg.Connection
) -> None:
    await direct.execute("create table locked (id int); create view behind as select * from locked")
    await direct.execute("create table other (id int)")
    other = shown(f"{schema}.other")
    await held(coherence, other)
    async with direct.transaction():
        await direct.execute("truncate locked")
        await pool.execute(f"create table {schema}.more (id int)")  # whereupon the catalogue is read again
        await held(coherence, other)
        for number in range(2):
            mark = coherence.mark()
            await asyncio.wait_for(pool.execute(f"insert into {schema}.other values ($1)", number), 8)
            assert not coherence.unchanged(other, mark)
    assert await direct.fetchval("select count(*) from other") == 2


async def test_writing_on_costs_one_question(pool: WorkflowConnectionPool, coherence: Coherence, table: str) -> None:
    await held(coherence, shown(table))
    before = coherence.invalidations + coherence.flushes
    for number in range(50):
        await pool.execute(f"insert into {table} values ($1)", number)
    assert coherence.invalidations + coherence.flushes - before <= 2


async def test_who_writes_past_the_pool_is_heard_of_by_triggers(
    pool: WorkflowConnectionPool, coherence: Coherence, schema: str, table: str, direct: asyncpg.Connection
) -> None:
    await direct.execute("create table other (id int)")
    assert await cache_watch.watch(pool, [table]) == [table.join(('"', '"')).replace(".", '"."')]
    assert await cache_watch.watched(pool) == [table]
    tables, other = shown(table), shown(f"{schema}.other")

    async def listener() -> int | None:
        return await direct.fetchval("select pid from pg_stat_activity where query = 'LISTEN \"raypg_cache\"'")

    async def leaves_the_other(change: str) -> bool:
        mark = await held(coherence, tables | other)
        await direct.execute(change)
        await eventually(lambda: not coherence.unchanged(tables, mark))
        return coherence.unchanged(other, mark)

    await eventually(listener, 20)  # a worker that could not read the catalogue just now waits before it tries again
    # As soon as it listens it tells that it has not heard what was before, which counts as a change of everything.
    await eventually(lambda: leaves_the_other("delete from item"))

    async def each_leaves_the_other() -> bool:
        ways = "insert into item values (1)", "update item set amount = 2", "delete from item", "truncate item"
        return all([await leaves_the_other(change) for change in ways])

    await eventually(each_leaves_the_other, 60)
    # What goes through the pool is not told twice.
    await pool.execute(f"insert into {table} values (2)")
    mark = await held(coherence, tables | other)
    await direct.execute("insert into other values (1); select pg_notify('raypg_cache', e'x\\tnowhere\\tnothing')")
    await eventually(lambda: not coherence.unchanged(other, mark))  # the notifications before have come too, then
    # Whatever was not heard while nobody listened may have been anything.
    mark = await held(coherence, tables | other)
    assert await direct.fetchval("select pg_terminate_backend($1)", await listener())
    await eventually(lambda: not coherence.unchanged(tables, mark) and not coherence.unchanged(other, mark))
    await eventually(listener)
    await cache_watch.unwatch(pool, [table])
    assert await cache_watch.watched(pool) == []

    async def nobody() -> bool:
        return await listener() is None

    await eventually(nobody, 20)
    for name in ("nowhere", f"{schema}.nothing"):
        with pytest.raises(ConfigError, match="no table"):
            await cache_watch.watch(pool, [name])
