"""Transactions by hand, and what is said to those who use them wrongly: asyncpg's InterfaceError, in clear words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from raypg import WorkflowConnectionPool
from raypg.lease import LeasedConnection


@pytest.fixture
async def connection(pool: WorkflowConnectionPool) -> AsyncIterator[LeasedConnection]:
    """A lease."""
    async with pool.acquire() as leased:
        yield leased


async def count(pool: WorkflowConnectionPool, table: str) -> int:
    return int(await pool.fetchval(f"select count(*) from {table}"))


async def test_commit_and_rollback_before_the_start(connection: LeasedConnection) -> None:
    transaction = connection.transaction()
    with pytest.raises(asyncpg.InterfaceError, match="cannot commit: the transaction was not started yet"):
        await transaction.commit()
    with pytest.raises(asyncpg.InterfaceError, match="cannot roll back: the transaction was not started yet"):
        await transaction.rollback()
    await transaction.start()  # neither did any harm
    await transaction.commit()


async def test_started_twice(pool: WorkflowConnectionPool, connection: LeasedConnection, table: str) -> None:
    transaction = connection.transaction()
    await transaction.start()
    with pytest.raises(asyncpg.InterfaceError, match="cannot start: the transaction was started already"):
        await transaction.start()
    with pytest.raises(asyncpg.InterfaceError, match="started already"):
        async with transaction:
            raise AssertionError
    await connection.execute(f"insert into {table} values (1, 'x')")
    await transaction.commit()
    assert await count(pool, table) == 1


@pytest.mark.parametrize(("end", "word"), [("commit", "committed"), ("rollback", "rolled back")])
async def test_used_again_after_its_end(connection: LeasedConnection, end: str, word: str) -> None:
    transaction = connection.transaction()
    await transaction.start()
    await getattr(transaction, end)()
    for again in (transaction.start, transaction.commit, transaction.rollback, transaction.__aenter__):
        with pytest.raises(asyncpg.InterfaceError, match=f"over: it was {word}; make another"):
            await again()
    assert word in repr(transaction)
    assert await connection.fetchval("select txid_current_if_assigned()") is None


@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_ended_by_hand_inside_its_block(
    pool: WorkflowConnectionPool, connection: LeasedConnection, table: str, end: str
) -> None:
    async with connection.transaction() as transaction:
        await connection.execute(f"insert into {table} values (1, 'x')")
        with pytest.raises(asyncpg.InterfaceError, match="by hand inside `async with`"):
            await getattr(transaction, end)()
        with pytest.raises(asyncpg.InterfaceError, match="`async with` block already"):
            await transaction.__aenter__()
    assert await count(pool, table) == 1


async def test_begun_by_sql(pool: WorkflowConnectionPool, connection: LeasedConnection, table: str) -> None:
    """BEGIN in a transaction is but a warning, and its COMMIT would end what somebody else began."""
    await connection.execute("begin")
    await connection.execute(f"insert into {table} values (1, 'x')")
    with pytest.raises(asyncpg.InterfaceError, match="begun by hand"):
        async with connection.transaction():
            raise AssertionError
    assert await count(pool, table) == 0
    await connection.execute("commit")
    assert await count(pool, table) == 1
    async with connection.transaction():
        await connection.execute(f"insert into {table} values (2, 'x')")
    assert await count(pool, table) == 2


async def test_savepoints_by_hand(pool: WorkflowConnectionPool, connection: LeasedConnection, table: str) -> None:
    insert = f"insert into {table} values ($1, 'x')"
    outer, kept, undone = (connection.transaction() for _ in range(3))
    await outer.start()
    await connection.execute(insert, 1)
    await kept.start()
    await connection.execute(insert, 2)
    await kept.commit()
    await undone.start()
    await connection.execute(insert, 3)
    await undone.rollback()
    await outer.commit()
    assert [row["id"] for row in await pool.fetch(f"select id from {table} order by id")] == [1, 2]


@pytest.mark.parametrize(("end", "rows"), [("commit", 2), ("rollback", 0)])
async def test_the_end_of_the_outer_ends_the_inner(
    pool: WorkflowConnectionPool, connection: LeasedConnection, table: str, end: str, rows: int
) -> None:
    outer, inner, innermost = (connection.transaction() for _ in range(3))
    await outer.start()
    await connection.execute(f"insert into {table} values (1, 'x')")
    await inner.start()
    await innermost.start()
    await connection.execute(f"insert into {table} values (2, 'x')")
    await getattr(outer, end)()
    for left in (inner, innermost):
        for late in (left.commit, left.rollback):
            with pytest.raises(asyncpg.InterfaceError, match="the transaction around it has ended"):
                await late()
    assert await count(pool, table) == rows
    async with connection.transaction(), connection.transaction():
        await connection.execute(f"insert into {table} values (3, 'x')")
    assert await count(pool, table) == rows + 1


async def test_the_error_on_its_way_is_not_hidden_by_misuse(connection: LeasedConnection) -> None:
    outer = connection.transaction()
    await outer.start()
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with connection.transaction():
            await outer.rollback()
            raise ZeroDivisionError
    assert await connection.fetchval("select 1") == 1


async def test_two_tasks_in_each_others_way(connection: LeasedConnection) -> None:
    """One connection has one transaction: who shares it between tasks is told."""
    both = asyncio.Barrier(2)

    async def first() -> None:
        async with connection.transaction():
            await both.wait()
            await both.wait()

    async def second() -> None:
        await both.wait()
        transaction = connection.transaction()
        await transaction.start()
        await both.wait()
        await task
        await transaction.commit()

    task = asyncio.create_task(first())
    with pytest.raises(asyncpg.InterfaceError, match="the transaction around it has ended"):
        await second()


async def test_a_savepoint_has_the_properties_of_what_is_around_it(
    pool: WorkflowConnectionPool, connection: LeasedConnection
) -> None:
    async with connection.transaction(isolation="serializable", readonly=True):
        async with connection.transaction(isolation="serializable"), connection.transaction(readonly=True):
            assert await connection.fetchval("select current_setting('transaction_isolation')") == "serializable"
        wrong: list[dict[str, Any]] = [{"isolation": "repeatable_read"}, {"deferrable": True}]
        for properties in wrong:
            with pytest.raises(asyncpg.InterfaceError, match="savepoint, and cannot be"):
                await connection.transaction(**properties).start()
    async with pool.transaction() as tx:
        with pytest.raises(asyncpg.InterfaceError, match="cannot be read only"):
            await tx.transaction(readonly=True).start()
        async with tx.transaction():
            pass
    async with pool.transaction(readonly=True) as tx, tx.transaction(readonly=True):
        pass


async def test_a_start_that_fails_leaves_nothing_behind(
    pool: WorkflowConnectionPool, connection: LeasedConnection, table: str
) -> None:
    async with connection.transaction():
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.execute("select 1/0")
        nested = connection.transaction()
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await nested.start()
        with pytest.raises(asyncpg.InterfaceError, match="over: it failed"):
            await nested.commit()
        await connection.execute("rollback; begin")
    await connection.execute(f"insert into {table} values (1, 'x')")
    assert await count(pool, table) == 1


async def test_a_cancelled_start_has_not_begun(
    pool: WorkflowConnectionPool, connection: LeasedConnection, table: str
) -> None:
    """Or what comes after it, and is thought to stand alone, would be rolled back at the release."""
    for number in range(40):
        start = asyncio.create_task(connection.transaction().start())
        for _ in range(number % 8):
            await asyncio.sleep(0.0005)
        start.cancel()
        ended = (await asyncio.gather(start, return_exceptions=True))[0]
        if ended is None:
            await connection.execute("rollback")
            connection._transactions.clear()
        await connection.execute(f"insert into {table} values ({number}, 'x')")
        assert await count(pool, table) == number + 1


async def test_a_pools_contexts_cannot_be_entered_twice(pool: WorkflowConnectionPool) -> None:
    acquiring, transaction = pool.acquire(), pool.transaction()
    async with acquiring, transaction:
        for context in (acquiring, transaction):
            with pytest.raises(asyncpg.InterfaceError, match="already"):
                await context.__aenter__()
