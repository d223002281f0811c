"""The strategy ``transactional``: all or nothing, and the culprit is named."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from pools import add_all, pipeline_of

from raypg import (
    StatementNotAllowedError,
    StatementNotRunError,
    WorkflowConnectionPool,
)


async def test_transactional_commits_all_in_flush_and_nothing_before(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, strategy="transactional", batch_size=10, flush_interval=0.001)
    ids = await add_all(pipeline, f"insert into {table} values ($1, $2)", [(i, "x") for i in range(200)])
    await pipeline.add_query(f"select count(*) as n from {table}")
    await asyncio.sleep(0.1)
    assert await pool.fetchval(f"select count(*) from {table}") == 0
    results = await pipeline.flush()
    assert [result.query_id for result in results][:200] == ids
    assert all(result.success for result in results)
    assert results[200].result[0]["n"] == 200
    assert await pool.fetchval(f"select count(*) from {table}") == 200
    await pipeline.close()


@pytest.mark.parametrize("position", [0, 77, 149])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((1000, "double"), asyncpg.UniqueViolationError),
        ((5000, None), asyncpg.NotNullViolationError),
        (("5000", "x"), asyncpg.DataError),
    ],
)
async def test_transactional_is_all_or_nothing_and_names_the_culprit(
    pool: WorkflowConnectionPool, table: str, position: int, row: Any, expected: type[Exception]
) -> None:
    await pool.execute(f"insert into {table} values (1000, 'there')")
    pipeline = pipeline_of(pool, strategy="transactional")
    rows: list[Any] = [(i, "x") for i in range(150)]
    rows[position] = row
    ids = await add_all(pipeline, f"insert into {table} values ($1, $2)", rows)
    await pipeline.add_query(f"update {table} set label = 'changed'")
    results = await pipeline.flush()
    assert len(results) == 151
    assert not any(result.success for result in results)
    assert type(results[position].error) is expected
    rest = [result.error for i, result in enumerate(results) if i != position]
    assert all(isinstance(error, StatementNotRunError) and error.culprit == ids[position] for error in rest)
    assert await pool.fetch(f"select id, label from {table}") == [(1000, "there")]
    # The next flush is a transaction of its own.
    await pipeline.add_query(f"insert into {table} values (1, 'x')")
    assert [result.success for result in await pipeline.flush()] == [True]
    assert await pool.fetchval(f"select count(*) from {table}") == 2
    await pipeline.close()


async def test_transactional_failure_at_commit_fails_all(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    await direct.execute(
        f"create table {schema}.late (id int primary key, "
        f"next int references {schema}.late deferrable initially deferred)"
    )
    pipeline = pipeline_of(pool, strategy="transactional")
    await add_all(pipeline, f"insert into {schema}.late values ($1, $2)", [(i, i + 1) for i in range(50)])
    results = await pipeline.flush()
    assert len(results) == 50
    assert not any(result.success for result in results)
    assert all(isinstance(result.error, asyncpg.ForeignKeyViolationError) for result in results)
    assert await direct.fetchval(f"select count(*) from {schema}.late") == 0
    await pipeline.close()


async def test_transactional_refuses_to_end_its_own_transaction(pool: WorkflowConnectionPool, table: str) -> None:
    for sql in ("commit", "rollback", "begin", "select 1; commit"):
        pipeline = pipeline_of(pool, strategy="transactional")
        await pipeline.add_query(f"insert into {table} values (1, 'x')")
        await pipeline.add_query(sql)
        results = await pipeline.flush()
        assert [type(result.error) for result in results] == [StatementNotRunError, StatementNotAllowedError]
        assert await pool.fetchval(f"select count(*) from {table}") == 0
        await pipeline.close()


async def test_a_transaction_of_many_messages(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, strategy="transactional")
    await add_all(pipeline, f"insert into {table} values ($1, $2)", [(i, "x") for i in range(12_000)])
    await pipeline.add_query(f"insert into {table} values (5, 'x')")
    results = await pipeline.flush()
    assert len(results) == 12_001
    assert not any(result.success for result in results)
    assert isinstance(results[12_000].error, asyncpg.UniqueViolationError)
    assert await pool.fetchval(f"select count(*) from {table}") == 0
    await pipeline.close()
