"""Work that lost its connection waits for another one, but no longer than any other work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from pools import NO_BREAKER, own_pool
from waiting import eventually

from raypg import PoolExhaustedError, QueryPipelineNode, WorkflowConnectionPool
from raypg.embedded import EmbeddedServer

LONG = "select count(*) from (select generate_series(1, 100000000000)) long_read"  # kept nowhere: a row at a time
RUNNING = "select pid from pg_stat_activity where state = 'active' and query like $1 and pid <> pg_backend_pid()"


@pytest.fixture
async def closable(
    ray_cluster: Any, pg: EmbeddedServer, schema: str, direct: asyncpg.Connection
) -> AsyncIterator[WorkflowConnectionPool]:
    """A pool of two connections on a database of its own, whose name is the schema's."""
    await direct.execute(f"create database {schema}")
    try:
        settings = {"database": schema, "max_connections": 2, "acquire_timeout": 2.0, **NO_BREAKER}
        async with own_pool(pg, **settings) as pool:
            yield pool
    finally:
        await direct.execute(f"drop database {schema} with (force)")


async def ends(direct: asyncpg.Connection, text: str, table: str) -> float:
    """End the backend that runs *text*, and let nobody in any more; when that was."""

    async def runs() -> int | None:
        pid: int | None = await direct.fetchval(RUNNING, f"%{text}%")
        return pid

    pid = await eventually(runs)
    await direct.execute(f"alter database {table} allow_connections false")
    ended = time.monotonic()
    assert await direct.fetchval("select pg_terminate_backend($1, 5000)", pid)
    return ended


async def test_a_read_that_is_to_be_repeated_fails_in_time(
    closable: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection
) -> None:
    async with closable.acquire():  # with no connection at all it would be told at once why there is none
        read = asyncio.create_task(closable.fetchval(LONG))
        ended = await ends(direct, "long_read", schema)
        with pytest.raises(PoolExhaustedError):
            await asyncio.wait_for(read, 20)
        assert 1.5 < time.monotonic() - ended < 6


async def test_so_does_the_rest_of_a_chunk(
    closable: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection
) -> None:
    async with closable.acquire():
        async with QueryPipelineNode("put back", closable) as pipeline:
            await pipeline.add_query("select 1", [])
            await pipeline.add_query(LONG, [])
            await pipeline.add_query("select 2", [])
            flush = asyncio.create_task(pipeline.flush())
            ended = await ends(direct, "long_read", schema)
            first, *rest = await asyncio.wait_for(flush, 20)
        assert 1.5 < time.monotonic() - ended < 6
        assert first.success
        assert [type(result.error) for result in rest] == [PoolExhaustedError] * 2


async def test_time_that_it_ran_was_no_waiting(
    closable: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection
) -> None:
    """A read that ran for longer than acquire_timeout before its backend was ended gets another connection."""
    await closable.execute("create table turn (n int)")
    # Long the first time, when the table is empty.
    read = LONG.replace("100000000000", "(select 100000000000 - 100000000000 * count(*) from turn)")
    running = asyncio.create_task(closable.fetchval(read))

    async def runs_for_long() -> int | None:
        pid: int | None = await direct.fetchval(f"{RUNNING} and now() - query_start > '2.5 s'", "%long_read%")
        return pid

    pid = await eventually(runs_for_long)
    await closable.execute("insert into turn values (1)")
    assert await direct.fetchval("select pg_terminate_backend($1, 5000)", pid)
    assert await asyncio.wait_for(running, 20) == 0
