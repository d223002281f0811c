"""What a DBA sees in pg_stat_activity: whose connection it is, and raypg's own name always in front."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import ray
from pgbouncer import PgBouncer
from pools import backends_of, own_pool, unique_name
from waiting import eventually

from raypg import QueryPipelineNode, WorkflowConnectionPool, get_pool, messages
from raypg.config import from_kwargs
from raypg.embedded import EmbeddedServer
from raypg.server.connect import Connector
from raypg.server.connection import ServerConnection
from raypg.server.control import Control

SHOW = "select current_setting('application_name')"
SOURCE = "select source from pg_settings where name = 'application_name'"


def job_id() -> str:
    job: str = ray.get_runtime_context().get_job_id()
    return job


async def seen(direct: asyncpg.Connection, pid: int) -> str:
    """The name under which the server shows a backend."""
    name: str = await direct.fetchval("select application_name from pg_stat_activity where pid = $1", pid)
    return name


# --- leases and transactions -----------------------------------------------------------------------------------------


async def test_a_lease_shows_its_job_while_it_is_held(
    single: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    ours = await single.fetchval(SHOW)
    connection = await single.acquire()
    assert await seen(direct, connection.backend_pid) == f"{ours}:{job_id()}"
    assert await connection.fetchval(SHOW) == f"{ours}:{job_id()}"
    assert [row["application_name"] for row in await backends_of(direct, single.name, control=False)] == [
        f"{ours}:{job_id()}"
    ]
    await connection.release()
    assert await single.fetchval(SHOW) == ours
    acquired = await single.process({"operation": "acquire"})
    query = {"operation": "execute", "query": SHOW, "connection_id": acquired["connection_id"]}
    (row,) = (await single.process(query))["data"]
    assert row["current_setting"] == f"{ours}:{job_id()}"
    await single.process({"operation": "release", "connection_id": acquired["connection_id"]})
    assert await single.fetchval(SHOW) == ours


async def test_a_transaction_shows_it_without_another_trip(
    single: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    ours = await single.fetchval(SHOW)
    async with single.transaction(isolation="serializable") as tx:
        assert await seen(direct, tx.backend_pid) == f"{ours}:{job_id()}"
        last = await direct.fetchval("select query from pg_stat_activity where pid = $1", tx.backend_pid)
        assert last.startswith("BEGIN ISOLATION LEVEL SERIALIZABLE; SET LOCAL application_name")
        async with tx.transaction():
            await tx.execute("set local application_name = 'mine'")
            assert await tx.fetchval(SHOW) == "mine"
    assert await single.fetchval(SHOW) == ours
    with pytest.raises(ZeroDivisionError):
        async with single.transaction():
            raise ZeroDivisionError
    assert await single.fetchval(SHOW) == ours


async def test_the_transactions_own_first_statement_still_comes_first(
    pool: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    """It takes the snapshot, and may set the isolation level."""
    async with pool.transaction(isolation="repeatable_read") as tx:
        await direct.execute(f"insert into {table} (id) values (1)")
        assert await tx.fetchval(f"select count(*) from {table}") == 1
        await direct.execute(f"insert into {table} (id) values (2)")
        assert await tx.fetchval(f"select count(*) from {table}") == 1
    async with pool.transaction() as tx:
        await tx.execute("set transaction isolation level serializable, read only, deferrable")
        assert await tx.fetchval("show transaction_isolation") == "serializable"


async def test_a_pipelines_transaction_shows_it_too(
    single: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    await direct.execute(f"alter table {table} alter label set default current_setting('application_name')")
    async with QueryPipelineNode("named", single, strategy="transactional") as pipeline:
        await pipeline.add_query(f"insert into {table} (id) values ($1)", [1])
        await pipeline.flush()
    ours = await single.fetchval(SHOW)
    assert await direct.fetchval(f"select label from {table}") == f"{ours}:{job_id()}"


@pytest.mark.parametrize("given", [{"application_name": "etl"}, {"server_settings": {"application_name": "etl"}}])
async def test_the_name_that_a_handle_was_constructed_with_comes_before_the_job(
    given: dict[str, Any], ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection
) -> None:
    async with own_pool(pg, max_connections=1, **given) as named:
        ours = await named.fetchval(SHOW)
        assert ours.endswith(":etl")
        async with named.acquire() as connection:
            assert await seen(direct, connection.backend_pid) == ours
            assert await connection.fetchval(SOURCE) == "session"
        async with named.transaction() as tx:
            assert await tx.fetchval(SHOW) == ours
        attached = get_pool(named.name)  # may be of any job
        async with attached.acquire() as connection:
            assert await seen(direct, connection.backend_pid) == f"{ours.removesuffix(':etl')}:{job_id()}"
        async with attached.transaction() as tx:
            assert await tx.fetchval(SHOW) == f"{ours.removesuffix(':etl')}:{job_id()}"
        assert await named.fetchval(SHOW) == ours
        assert await named.fetchval(SOURCE) == "client"


# --- quoting, counting, reaping --------------------------------------------------------------------------------------

BASE = "raypg:00000000:0:beef"


@contextlib.asynccontextmanager
async def opened(parameters: dict[str, Any], base: str = BASE) -> AsyncIterator[ServerConnection]:
    connection = await Connector(from_kwargs(name="p", environ={}, **parameters), base).open()
    try:
        yield connection
    finally:
        connection.raw.terminate()


NAMES = {
    "it's": "it's",
    "back\\slash": "back\\slash",
    "\\'; drop table x; --": "\\'; drop table x; --",
    '"double" $1 %s': '"double" $1 %s',
    "a\nb\0c": "a?b?c",
    "ünï\u2028": "?n??",
    "x" * 100: "x" * (62 - len(BASE)),
    "ü" * 100: "?" * (62 - len(BASE)),
    "\\" * 100: "\\" * (62 - len(BASE)),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conforming", ["on", "off"])
async def test_any_name_is_shown_behind_ours(
    name: str, conforming: str, pg: EmbeddedServer, direct: asyncpg.Connection
) -> None:
    expected = f"{BASE}:{NAMES[name]}"
    async with opened(pg.parameters) as connection:
        await connection.raw.execute(f"set standard_conforming_strings = {conforming}")
        await connection.run(messages.STATUS, connection.opening(None, name) or "", ())
        assert await seen(direct, connection.pid) == await connection.raw.fetchval(SHOW) == expected
        await connection.reset()
        assert await seen(direct, connection.pid) == BASE
        await connection.run(messages.STATUS, connection.opening("BEGIN READ ONLY", name) or "", ())
        assert await seen(direct, connection.pid) == expected
        assert await connection.raw.fetchval("show transaction_read_only") == "on"
        await connection.run(messages.STATUS, "COMMIT", ())
        assert await seen(direct, connection.pid) == BASE
        settings = (("application_name", name.replace("\0", "\n")),)
        rows, _ = await connection.run(messages.FETCH, SHOW, (), None, settings)
        assert rows == [(expected,)]


async def test_control_finds_the_named_ones_of_one_worker_and_no_others(
    pg: EmbeddedServer, direct: asyncpg.Connection
) -> None:
    bases = [BASE, BASE, BASE, f"{BASE}f", BASE[:-1], f"x{BASE}", BASE.replace("beef", "b%f"), BASE.upper()]
    async with contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(opened(pg.parameters, base)) for base in bases]
        for connection in connections[1:]:
            await connection.run(messages.STATUS, connection.opening(None, "01000000") or "", ())
        await connections[2].raw.execute(connections[2].opening("BEGIN", "%") or "")
        ours = {connection.pid for connection in connections[:3]}
        control = Control(Connector(from_kwargs(name="p", environ={}, **pg.parameters), "raypg:00000000:control:1"))
        try:
            assert {pid for pid, _ in await control.backends(BASE)} == ours
            assert await control.backends(BASE.replace("beef", "b__f")) == []
            assert await control.end_backends(BASE, timeout=10.0) == (3, True)
        finally:
            await control.close()
        alive = await direct.fetch("select pid from pg_stat_activity where application_name ~* 'raypg:00000000:0'")
        assert {row["pid"] for row in alive} == {connection.pid for connection in connections[3:]}


# --- behind a pooler -------------------------------------------------------------------------------------------------


async def test_behind_a_pooler_only_transactions_show_it(
    ray_cluster: Any, pg18: EmbeddedServer, direct: asyncpg.Connection
) -> None:
    with PgBouncer(pg18, "transaction", size=1) as bouncer:
        settings = {**bouncer.parameters, "max_connections": 3, "name": unique_name(), "pooler": "transaction"}
        async with own_pool(pg18, **settings) as pool:
            async with pool.transaction() as tx:
                pid, name = await tx.fetchrow("select pg_backend_pid(), current_setting('application_name')") or ()
                assert name.endswith(f":{job_id()}")
                assert await seen(direct, pid) == name
            async with pool.acquire() as connection, connection.transaction():
                # A lease holds no session there, so there is none to name.
                assert not (await connection.fetchval(SHOW)).endswith(f":{job_id()}")

            async def is_ours_alone() -> bool:
                return await seen(direct, pid) == name.removesuffix(f":{job_id()}")

            await eventually(is_ours_alone)
            other = await asyncpg.connect(**bouncer.parameters, statement_cache_size=0)
            try:
                assert job_id() not in await other.fetchval(SHOW)
            finally:
                other.terminate()
