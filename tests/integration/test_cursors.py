"""Cursors on a lease: rows in portions, inside a transaction, closed when nobody wants more."""

from __future__ import annotations

import asyncio
import gc
import resource
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from pools import own_pool, worker_pids
from waiting import eventually

from raypg import LeaseLostError, QueryTimeoutError, WorkflowConnectionPool
from raypg.channel import Channel
from raypg.embedded import EmbeddedServer
from raypg.lease import LeasedConnection

SERIES = "select generate_series(1, $1::int) as n"
PORTALS = "select count(*)::int from pg_cursors where name like '\\_\\_asyncpg%'"


@pytest.fixture
async def tx(pool: WorkflowConnectionPool) -> AsyncIterator[LeasedConnection]:
    """A lease in a transaction."""
    async with pool.transaction() as connection:
        yield connection


async def none_open(connection: LeasedConnection) -> bool:
    return bool(await connection.fetchval(PORTALS) == 0)


# --- iterating -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [1, 7, 50, 100, 1000])
async def test_all_rows_come_once_and_in_order(tx: LeasedConnection, prefetch: int) -> None:
    numbers = [row["n"] async for row in tx.cursor(SERIES, 100, prefetch=prefetch)]
    assert numbers == list(range(1, 101))
    assert await none_open(tx)


async def test_rows_come_in_portions_of_prefetch(tx: LeasedConnection, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    ask = Channel.ask

    async def counted(self: Channel, method: str, *arguments: Any) -> Any:
        nonlocal asked
        asked += method == "lease_cursor"
        return await ask(self, method, *arguments)

    monkeypatch.setattr(Channel, "ask", counted)
    counts = [asked async for _ in tx.cursor(SERIES, 100, prefetch=30)]
    assert counts == [1] * 30 + [2] * 30 + [3] * 30 + [4] * 10
    assert asked == 4  # the last portion was short, so it was the end


async def test_an_empty_result_and_a_statement_without_rows(tx: LeasedConnection) -> None:
    assert [row async for row in tx.cursor(SERIES, 0)] == []
    assert [row async for row in tx.cursor("create temp table made (a int) on commit drop")] == []
    inserted = [row["a"] async for row in tx.cursor("insert into made values (1), (2), (3) returning a", prefetch=2)]
    assert inserted == [1, 2, 3]
    assert await tx.fetchval("select count(*) from made") == 3
    assert [row["n"] async for row in tx.cursor("with n as (values (5), (6)) select column1 as n from n")] == [5, 6]


async def test_values_are_those_of_fetch(pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str) -> None:
    await direct.execute("create type pair as (one int, two text)")
    sql = f"select n::numeric / 4 as a, array[n, null] as b, (n, 'x')::{schema}.pair as c from generate_series(1, 5) n"
    async with pool.transaction() as tx:
        assert [row async for row in tx.cursor(sql, prefetch=2)] == await tx.fetch(sql)


async def test_a_broken_loop_closes_its_cursor(tx: LeasedConnection) -> None:
    async for row in tx.cursor(SERIES, 1000):
        assert row["n"] == 1
        break
    await eventually(lambda: none_open(tx), what="closed after a break")
    with pytest.raises(KeyError):  # noqa: PT012
        async for _ in tx.cursor(SERIES, 1000):
            raise KeyError
    gc.collect()
    await eventually(lambda: none_open(tx), what="closed after an exception")


async def test_a_break_does_no_harm_to_the_next_transaction(pool: WorkflowConnectionPool) -> None:
    """The close travels by itself, and may come when its transaction is long over."""
    async with pool.acquire() as connection:
        for _ in range(20):
            async with connection.transaction():
                async for _ in connection.cursor(SERIES, 1000):
                    break
            async with connection.transaction():
                assert await connection.fetchval("select 1") == 1
                assert await connection.fetchval("select 2") == 2
            assert await connection.execute("select 1") == "SELECT 1"


async def test_other_statements_may_run_within_the_loop(tx: LeasedConnection) -> None:
    async for row in tx.cursor(SERIES, 20, prefetch=3):
        assert await tx.fetchval("select $1::int", row["n"]) == row["n"]
        async for inner in tx.cursor(SERIES, 5, prefetch=2):
            if inner["n"] == 3:
                break


# --- by hand ---------------------------------------------------------------------------------------------------------


async def test_fetch_fetchrow_forward(tx: LeasedConnection) -> None:
    cursor = await tx.cursor(SERIES, 100)
    assert [row["n"] for row in await cursor.fetch(3)] == [1, 2, 3]
    assert await cursor.fetchrow() == (4,)
    assert await cursor.forward(10) == 10
    assert await cursor.fetchrow() == (15,)
    assert await cursor.forward(80) == 80
    assert [row["n"] for row in await cursor.fetch(50)] == [96, 97, 98, 99, 100]
    assert await cursor.fetch(5) == []
    assert await cursor.fetchrow() is None
    assert await cursor.forward(5) == 0
    assert await none_open(tx)
    cursor = await tx.cursor(SERIES, 10)
    assert await cursor.forward(50) == 10
    assert await cursor.fetchrow() is None
    assert await none_open(tx)


async def test_it_can_be_closed(tx: LeasedConnection) -> None:
    cursor = await tx.cursor(SERIES, 100)
    assert await tx.fetchval(PORTALS) == 1
    await cursor.close()
    await cursor.close()
    assert await none_open(tx)
    assert await cursor.fetch(1) == []


async def test_a_forgotten_one_is_closed(tx: LeasedConnection) -> None:
    cursor = await tx.cursor(SERIES, 100)
    assert await cursor.fetchrow() == (1,)
    del cursor
    gc.collect()
    await eventually(lambda: none_open(tx))


# --- what is refused -------------------------------------------------------------------------------------------------


async def test_only_inside_a_transaction(pool: WorkflowConnectionPool) -> None:
    async with pool.acquire() as connection:
        with pytest.raises(asyncpg.NoActiveSQLTransactionError, match=r"connection\.transaction"):
            await connection.cursor("select 1")
        with pytest.raises(asyncpg.NoActiveSQLTransactionError):
            [row async for row in connection.cursor("select 1")]
        async with connection.transaction():
            cursor = await connection.cursor(SERIES, 100)
            assert await cursor.fetchrow() == (1,)
        with pytest.raises(asyncpg.InvalidCursorNameError, match="transaction is over"):
            await cursor.fetchrow()
        await cursor.close()
        async with connection.transaction():
            cursor = await connection.cursor(SERIES, 100)
        async with connection.transaction():
            await cursor.close()
            assert await connection.fetchval("select 1") == 1
    with pytest.raises(LeaseLostError):
        await connection.cursor("select 1")


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "many", None])
async def test_bad_numbers_are_refused(tx: LeasedConnection, number: Any) -> None:
    with pytest.raises(asyncpg.InterfaceError, match="prefetch"):
        tx.cursor("select 1", prefetch=number)
    cursor = await tx.cursor("select 1")
    with pytest.raises(asyncpg.InterfaceError, match="greater than zero"):
        await cursor.fetch(number)
    with pytest.raises(asyncpg.InterfaceError, match="greater than zero"):
        await cursor.forward(number)
    assert await cursor.fetchrow() == (1,)


async def test_what_is_wrong_with_the_statement_is_asyncpgs_error(pool: WorkflowConnectionPool) -> None:
    async with pool.acquire() as connection:
        for sql, args, kind in [
            ("selekt", (), asyncpg.PostgresSyntaxError),
            ("select 1; select 2", (), asyncpg.PostgresSyntaxError),
            ("select * from nowhere", (), asyncpg.UndefinedTableError),
            ("select $1::int", (), asyncpg.InterfaceError),
            ("select $1::int", ("x",), asyncpg.DataError),
        ]:
            with pytest.raises(kind):
                async with connection.transaction():
                    [row async for row in connection.cursor(sql, *args)]
            with pytest.raises(kind):
                async with connection.transaction():
                    await connection.cursor(sql, *args)
        assert await connection.fetchval("select 1") == 1


async def test_after_an_error_on_the_way_nobody_pretends_to_know_where_it_stands(pool: WorkflowConnectionPool) -> None:
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        seen = []
        rows = aiter(connection.cursor("select 10 / (25 - n) as q from generate_series(1, 100) n", prefetch=10))
        with pytest.raises(asyncpg.DivisionByZeroError):  # noqa: PT012
            while True:
                seen.append((await anext(rows))["q"])
        assert len(seen) == 20
        with pytest.raises(asyncpg.InterfaceError, match="where it stands is unknown"):
            await anext(rows)
        await transaction.rollback()


async def test_a_portion_that_takes_too_long(pool: WorkflowConnectionPool) -> None:
    async with pool.acquire() as connection:
        sql = "select n, pg_sleep(n / 10 * 30) from generate_series(1, 20) n"
        with pytest.raises(QueryTimeoutError):
            async with connection.transaction():
                [row async for row in connection.cursor(sql, prefetch=5, timeout=0.5)]
        async with connection.transaction():
            cursor = await connection.cursor(sql)
            assert len(await cursor.fetch(9)) == 9
            with pytest.raises(QueryTimeoutError):
                await cursor.fetch(1, timeout=0.2)
            await connection.execute("rollback; begin")
        assert await connection.fetchval("select 1") == 1


async def test_a_cancelled_portion_is_cancelled_on_the_server(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    async with pool.acquire() as connection:
        with pytest.raises(asyncio.CancelledError):  # noqa: PT012
            async with connection.transaction():
                cursor = await connection.cursor("select pg_sleep(60)")
                call = asyncio.create_task(cursor.fetchrow())

                async def sleeps() -> bool:
                    event = "select wait_event from pg_stat_activity where pid = $1"
                    return bool(await direct.fetchval(event, connection.backend_pid) == "PgSleep")

                await eventually(sleeps)
                call.cancel()
                await call
        assert await asyncio.wait_for(connection.fetchval("select 1"), 5) == 1


async def test_a_backend_killed_under_it(pool: WorkflowConnectionPool, direct: asyncpg.Connection) -> None:
    connection = await pool.acquire()
    await connection.transaction().start()
    cursor = await connection.cursor(SERIES, 1000)
    await cursor.fetch(5)
    await direct.fetchval("select pg_terminate_backend($1, 5000)", connection.backend_pid)
    with pytest.raises(LeaseLostError):
        await cursor.fetch(5)
    await cursor.close()
    await connection.release()


# --- its cost --------------------------------------------------------------------------------------------------------


async def test_a_large_result_is_never_in_memory_as_a_whole(ray_cluster: Any, pg: EmbeddedServer) -> None:
    """96 MB of rows through a worker of their own. Portions are too short for Ray's object store, whose memory would
    count for every process that looks into it."""

    def peak_of(pid: int) -> int:
        with open(f"/proc/{pid}/status") as status:
            return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) // 1024

    async with own_pool(pg, max_connections=2) as pool:
        (worker,) = (await worker_pids(pool.name)).values()
        assert await pool.fetchval("select 1") == 1
        before, here = peak_of(worker), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        size = 0
        async with pool.transaction() as tx:
            async for row in tx.cursor("select repeat('x', 2000) as t from generate_series(1, 48000)", prefetch=40):
                size += len(row["t"])
        assert size == 96_000_000
        grown = peak_of(worker) - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 - here
        print(f"worker and caller grew by {grown} MB")
        assert max(grown) < 48
