"""Transactions and savepoints on leased connections."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from waiting import eventually

from raypg import (
    ConfigError,
    LeaseLostError,
    TransactionRolledBackError,
    WorkflowConnectionPool,
)


async def test_a_transaction_commits_at_its_end_and_not_before(pool: WorkflowConnectionPool, table: str) -> None:
    async with pool.transaction() as tx:
        await tx.execute(f"insert into {table} values (1, 'x')")
        assert await pool.fetchval(f"select count(*) from {table}") == 0
        assert await tx.fetchval(f"select count(*) from {table}") == 1
    assert await pool.fetchval(f"select count(*) from {table}") == 1
    with pytest.raises(LeaseLostError):
        await tx.execute("select 1")


async def test_an_exception_rolls_back(pool: WorkflowConnectionPool, table: str) -> None:
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with pool.transaction() as tx:
            await tx.execute(f"insert into {table} values (1, 'x')")
            raise ZeroDivisionError
    with pytest.raises(asyncpg.CheckViolationError):  # noqa: PT012
        async with pool.transaction() as tx:
            await tx.execute(f"insert into {table} values (2, 'x')")
            await tx.execute(f"insert into {table} values (3, 'x', -1)")
    assert await pool.fetchval(f"select count(*) from {table}") == 0


async def test_a_cancelled_transaction_rolls_back_and_frees_its_connection(
    pair: WorkflowConnectionPool, table: str
) -> None:
    begun = asyncio.Event()

    async def work() -> None:
        async with pair.transaction() as tx:
            await tx.execute(f"insert into {table} values (1, 'x')")
            begun.set()
            await tx.execute("select pg_sleep(60)")

    for _ in range(3):
        tasks = [asyncio.create_task(work()), asyncio.create_task(work())]
        begun.clear()
        await asyncio.wait_for(begun.wait(), 10)
        for task in tasks:
            task.cancel()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        assert await pair.fetchval(f"select count(*) from {table}", timeout=5) == 0


async def test_who_is_cancelled_twice_has_rolled_back_too(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    """The second time while it rolls back: the connection goes on outside of any transaction."""
    async with pool.acquire() as connection:

        async def work() -> None:
            async with connection.transaction():
                await connection.execute("select pg_sleep(60), 'twice'")

        async def sleeps() -> bool:
            state = "select wait_event from pg_stat_activity where pid = $1"
            return bool(await direct.fetchval(state, connection.backend_pid) == "PgSleep")

        for steps in range(6):
            working = asyncio.create_task(work())
            await eventually(sleeps)
            working.cancel()
            for _ in range(steps):
                await asyncio.sleep(0)
            working.cancel()
            with pytest.raises(asyncio.CancelledError):
                await working
            assert await connection.fetchval("select pg_current_xact_id_if_assigned()") is None
            assert await connection.execute("create temp table if not exists kept (a int)")
            async with connection.transaction():  # raises inside a transaction that was begun before
                await connection.execute("insert into kept values (1)")
        assert await connection.fetchval("select count(*) from kept") == 6


async def test_nested_transactions_are_savepoints(pool: WorkflowConnectionPool, table: str) -> None:
    insert = f"insert into {table} values ($1, 'x')"
    async with pool.acquire() as connection:
        async with connection.transaction():
            await connection.execute(insert, 1)
            with pytest.raises(asyncpg.UniqueViolationError):  # noqa: PT012
                async with connection.transaction():
                    await connection.execute(insert, 2)
                    async with connection.transaction():
                        await connection.execute(insert, 3)
                    await connection.execute(insert, 1)
            async with connection.transaction():
                await connection.execute(insert, 4)
                with pytest.raises(KeyError):  # noqa: PT012
                    async with connection.transaction():
                        await connection.execute(insert, 5)
                        raise KeyError
                async with connection.transaction():
                    await connection.execute(insert, 6)
        assert await connection.fetchval("select txid_current_if_assigned()") is None
    rows = await pool.fetch(f"select id from {table} order by id")
    assert [row["id"] for row in rows] == [1, 4, 6]


async def test_savepoints_inside_pool_transaction(pool: WorkflowConnectionPool, table: str) -> None:
    async with pool.transaction() as tx:
        await tx.execute(f"insert into {table} values (1, 'x')")
        with pytest.raises(asyncpg.UniqueViolationError):
            async with tx.transaction():
                await tx.execute(f"insert into {table} values (1, 'x')")
        await tx.execute(f"insert into {table} values (2, 'x')")
    assert await pool.fetchval(f"select count(*) from {table}") == 2


async def test_start_commit_and_rollback_by_hand(pool: WorkflowConnectionPool, table: str) -> None:
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(f"insert into {table} values (1, 'x')")
        await transaction.rollback()
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(f"insert into {table} values (2, 'x')")
        await transaction.commit()
    assert [row["id"] for row in await pool.fetch(f"select id from {table}")] == [2]


@pytest.mark.parametrize("level", ["read_uncommitted", "read_committed", "repeatable_read", "serializable"])
async def test_properties_of_a_transaction(pool: WorkflowConnectionPool, table: str, level: Any) -> None:
    show = "select current_setting('transaction_isolation'), current_setting('transaction_read_only')"
    async with pool.transaction(isolation=level) as tx:
        assert await tx.fetchrow(show) == (level.replace("_", " "), "off")
    async with pool.acquire() as connection, connection.transaction(isolation=level, readonly=True):
        assert await connection.fetchrow(show) == (level.replace("_", " "), "on")
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        async with pool.transaction(isolation=level, readonly=True, deferrable=True) as tx:
            await tx.execute(f"insert into {table} values (1, 'x')")


async def test_an_unknown_isolation_level_names_the_known(pool: WorkflowConnectionPool) -> None:
    with pytest.raises(ConfigError, match="serializable"):
        pool.transaction(isolation="serialisable")  # type: ignore[arg-type]


async def test_commit_of_a_failed_transaction_is_no_success(pool: WorkflowConnectionPool, table: str) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK there, and no error."""
    with pytest.raises(TransactionRolledBackError):  # noqa: PT012
        async with pool.transaction() as tx:
            await tx.execute(f"insert into {table} values (1, 'x')")
            with pytest.raises(asyncpg.DivisionByZeroError):
                await tx.fetch("select 1/0")
    async with pool.acquire() as connection:
        with pytest.raises(TransactionRolledBackError):  # noqa: PT012
            async with connection.transaction():
                await connection.execute(f"insert into {table} values (1, 'x')")
                with pytest.raises(asyncpg.DivisionByZeroError):
                    await connection.fetch("select 1/0")
        assert await connection.fetchval("select 1") == 1
    assert await pool.fetchval(f"select count(*) from {table}") == 0


async def test_a_failure_at_commit_is_raised(pool: WorkflowConnectionPool, schema: str, direct: Any) -> None:
    await direct.execute(
        f"create table {schema}.late "
        f"(id int primary key, next int references {schema}.late deferrable initially deferred)"
    )
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        async with pool.transaction() as tx:
            await tx.execute(f"insert into {schema}.late values (1, 2)")
    assert await pool.fetchval(f"select count(*) from {schema}.late") == 0
