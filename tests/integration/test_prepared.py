"""`connection.prepare`: the server's word on a statement before it is run."""

from __future__ import annotations

import asyncpg
import pytest

from raypg import LeaseLostError, StatementNotAllowedError, WorkflowConnectionPool


async def test_it_runs_as_calls_on_the_connection_do(pool: WorkflowConnectionPool, table: str) -> None:
    async with pool.acquire() as connection:
        insert = await connection.prepare(f"insert into {table} values ($1, $2)")
        assert insert.get_query() == f"insert into {table} values ($1, $2)"
        assert await insert.execute(1, "x") == "INSERT 0 1"
        await insert.executemany([(2, "y"), (3, "z")])
        with pytest.raises(asyncpg.UniqueViolationError):
            await insert.fetch(1, "again")
        select = await connection.prepare(f"select id, label from {table} where id >= $1 order by id")
        assert [row["label"] for row in await select.fetch(2)] == ["y", "z"]
        assert await select.fetchrow(3) == (3, "z")
        assert await select.fetchrow(4) is None
        assert await select.fetchval(1, column=1) == "x"
        async with connection.transaction():
            assert [row["id"] async for row in select.cursor(1, prefetch=2)] == [1, 2, 3]


async def test_what_it_takes_and_gives_is_told_as_asyncpg_tells_it(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    await direct.execute("create type colour as enum ('red')")
    for sql in (
        f"select $1::int as a, $2::{schema}.colour as b, array[$3::numeric] as c",
        "select 1",
        f"create table {schema}.never (a int)",
    ):
        async with pool.acquire() as connection:
            ours = await connection.prepare(sql)
        theirs = await direct.prepare(sql)
        assert ours.get_parameters() == theirs.get_parameters()
        assert ours.get_attributes() == tuple(theirs.get_attributes())
    assert await direct.fetchval(f"select to_regclass('{schema}.never')") is None


async def test_wrong_sql_fails_when_it_is_prepared(pool: WorkflowConnectionPool) -> None:
    async with pool.acquire() as connection:
        for sql, kind in [
            ("selekt", asyncpg.PostgresSyntaxError),
            ("select * from nowhere", asyncpg.UndefinedTableError),
            ("select nothing", asyncpg.UndefinedColumnError),
            ("select 1; select 2", asyncpg.PostgresSyntaxError),
            ("select '\0'", StatementNotAllowedError),
            (5, TypeError),
        ]:
            with pytest.raises(kind):
                await connection.prepare(sql)  # type: ignore[arg-type]
        assert await connection.fetchval("select 1") == 1
    with pytest.raises(LeaseLostError):
        await connection.prepare("select 1")


async def test_it_outlives_a_change_of_its_table(pool: WorkflowConnectionPool, table: str) -> None:
    """A statement that asyncpg itself holds fails for ever after this."""
    async with pool.acquire() as connection:
        statement = await connection.prepare(f"select * from {table}")
        await connection.execute(f"insert into {table} values (1, 'x')")
        assert await statement.fetchrow() == (1, "x", None)
        await pool.execute(f"alter table {table} drop column amount, alter column id type text")
        assert await statement.fetchrow() == ("1", "x")


async def test_nothing_of_it_stays_in_the_session(pool: WorkflowConnectionPool) -> None:
    async with pool.acquire() as connection:
        count = "select count(*) from pg_prepared_statements"
        before = await connection.fetchval(count)
        for number in range(30):
            await connection.prepare(f"select {number}")
        assert await connection.fetchval(count) <= before + 1
