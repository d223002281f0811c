"""A real PgBouncer in front of PostgreSQL: noticed, and used for no more than it can do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
from pgbouncer import PgBouncer
from pools import own_pool, unique_name, worker_pids
from waiting import eventually

from raypg import WorkflowConnectionPool, messages
from raypg.config import from_kwargs
from raypg.embedded import EmbeddedServer
from raypg.errors import ConnectError, ConnectionLostError, QueryTimeoutError, StatementNotAllowedError
from raypg.server import pooler
from raypg.server.connect import Connector
from raypg.server.connection import ServerConnection
from raypg.server.control import Control
from raypg.server.outcomes import ConnectionLost

NAME = "raypg:0a1b2c3d:0:89abcdef"


@pytest.fixture(scope="module")
def bouncer(pg18: EmbeddedServer) -> Iterator[PgBouncer]:
    """Shares transactions; two connections to the server."""
    with PgBouncer(pg18, "transaction", size=2) as running:
        yield running


@pytest.fixture(scope="module")
def behind(ray_cluster: Any, bouncer: PgBouncer) -> Iterator[WorkflowConnectionPool]:
    """A pool of 6 connections to that PgBouncer, told nothing about it."""
    handle = WorkflowConnectionPool(name=unique_name(), **bouncer.parameters, max_connections=6)
    asyncio.run(handle.process({"operation": "initialize"}))
    yield handle
    asyncio.run(handle.close())


def connector(parameters: dict[str, Any], **settings: Any) -> Connector:
    return Connector(from_kwargs(name="p", environ={}, **parameters, **settings), NAME)


@contextlib.asynccontextmanager
async def opened(connector: Connector) -> AsyncIterator[ServerConnection]:
    connection = await connector.open()
    try:
        yield connection
    finally:
        connection.raw.terminate()


async def on_every_backend(bouncer: PgBouncer, sql: str, size: int = 2) -> list[Any]:
    """One value from each of PgBouncer's connections to the server, each held by a transaction."""
    found: list[tuple[int, Any]] = []
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(size):
            raw = await asyncpg.connect(**bouncer.parameters, statement_cache_size=0)
            stack.callback(raw.terminate)
            await stack.enter_async_context(raw.transaction())
            found.append((await raw.fetchval("select pg_backend_pid()"), await raw.fetchval(sql)))
    assert len({pid for pid, _ in found}) == size
    return [value for _, value in found]


# --- finding out ---


async def test_it_is_noticed_once_and_one_warning_says_what_follows(
    bouncer: PgBouncer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "raypg")
    unaware = connector(bouncer.parameters)
    before = unaware.pooler
    connections = await asyncio.gather(*(unaware.open() for _ in range(4)))
    assert (before, unaware.pooler) == (None, "transaction")
    assert all(connection.pooled for connection in connections)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pool.transaction()" in caplog.text
    for connection in connections:
        connection.raw.terminate()


async def test_the_server_itself_is_not_mistaken_for_one(
    pg18: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    direct = connector(pg18.parameters)
    async with opened(direct) as connection:
        assert direct.pooler == "off"
        assert not connection.pooled
        await connection.run(messages.FETCH, "select 1", ())
        assert await connection.raw.fetchval("select count(*) from pg_prepared_statements") == 2
        assert await connection.raw.fetchval("show client_connection_check_interval") == "500ms"
    assert not caplog.records


async def test_hosts_that_are_asked_what_they_are_leave_no_statement_behind(bouncer: PgBouncer) -> None:
    for _ in range(2):
        async with opened(connector(bouncer.parameters, target_session_attrs="read-write")) as connection:
            assert connection.pooled
    assert await on_every_backend(bouncer, "select count(*) from pg_prepared_statements where name <> ''") == [0, 0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pooler": "off"}, ["client_connection_check_interval", "pooler='auto'"]),
        ({"server_settings": {"search_path": "x"}}, ["search_path", "ALTER ROLE", "ignore_startup_parameters"]),
    ],
)
async def test_what_it_refuses_at_connect_is_explained(
    settings: dict[str, Any], words: list[str], bouncer: PgBouncer
) -> None:
    with pytest.raises(ConnectError) as caught:
        await connector(bouncer.parameters, **settings).open()
    assert caught.value.sqlstate == "08P01"
    assert all(word in str(caught.value) for word in words)


async def test_who_says_what_it_is_is_spared_the_warning(bouncer: PgBouncer, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(connector(bouncer.parameters, pooler="transaction")) as connection:
        assert connection.pooled
        assert await connection.run(messages.FETCH, "select 1 as a", ()) == ([(1,)], ("a",))
    assert not caplog.records


# --- what cannot be had of one ---

REFUSED = {
    "set search_path = x": "SET LOCAL",
    "set session characteristics as transaction read only": "SET LOCAL",
    "reset all": "SET LOCAL",
    "select 1; set role x": "SET LOCAL",
    "select set_config('work_mem', '1MB', false)": "third argument",
    "select pg_catalog.set_config('work_mem', '1MB', $1)": "third argument",
    "listen news": "the server's own address",
    "unlisten *": "the server's own address",
    "prepare mine as select 1": "parameters",
    "execute mine": "parameters",
    "deallocate all": "parameters",
    "discard all": "DISCARD",
    "load 'auto_explain'": "session_preload_libraries",
    "create temp table t (a int)": "ON COMMIT DROP",
    "create temp table t (a int) on commit delete rows": "ON COMMIT DROP",
    "create table pg_temp.t (a int)": "ON COMMIT DROP",
    "create temp table t as select 1 as a": "ON COMMIT DROP",
    "select 1 as a into temp t": "ON COMMIT DROP",
    "create temp view v as select 1": "ON COMMIT DROP",
    "create temp sequence s": "ON COMMIT DROP",
    "declare c cursor with hold for select 1": "WITH HOLD",
    "select pg_advisory_lock(1)": "pg_advisory_xact_lock",
    "select 1 where pg_catalog.pg_try_advisory_lock_shared(1)": "pg_advisory_xact_lock",
    "with x as (select pg_advisory_unlock_all()) select * from x": "pg_advisory_xact_lock",
    "set search_path = x -- " + "x" * 20_000: "own address",
}
ALLOWED_IN_A_TRANSACTION = [
    "select 1",
    "set local search_path = x",
    "set transaction isolation level serializable",
    "set constraints all deferred",
    "select set_config('work_mem', '1MB', true)",
    "create temp table t (a int) on commit drop",
    "create temp table t on commit drop as select 1 as a",
    "create table t (a int)",
    "declare c cursor for select 1",
    "select pg_advisory_xact_lock(1)",
    "select currval('s')",
    "commit",
    "savepoint a",
    "not sql at all",
    "notify news",
]


@pytest.mark.parametrize("sql", REFUSED)
@pytest.mark.parametrize("in_transaction", [False, True])
def test_what_would_stay_in_a_session_is_refused_and_the_error_says_what_to_do(sql: str, in_transaction: bool) -> None:
    error = pooler.refusal(sql, in_transaction=in_transaction, leased=in_transaction)
    assert error is not None
    assert REFUSED[sql] in str(error)


@pytest.mark.parametrize("sql", ALLOWED_IN_A_TRANSACTION)
def test_what_ends_with_its_transaction_is_not(sql: str) -> None:
    assert pooler.refusal(sql, in_transaction=True, leased=True) is None


@pytest.mark.parametrize("sql", ["select currval('s')", "select lastval()"])
def test_the_last_value_of_a_sequence_would_be_somebody_elses(sql: str) -> None:
    assert "RETURNING" in str(pooler.refusal(sql, in_transaction=False, leased=False))


async def test_nothing_refused_reaches_the_server(behind: WorkflowConnectionPool, bouncer: PgBouncer) -> None:
    with pytest.raises(StatementNotAllowedError, match="SET LOCAL"):
        await behind.execute("set work_mem = '3MB'")
    with pytest.raises(StatementNotAllowedError, match="SET LOCAL"):
        async with behind.transaction() as tx:
            await tx.execute("set work_mem = '3MB'")
    with pytest.raises(StatementNotAllowedError, match="listen"):
        await behind.execute("listen news")
    assert await on_every_backend(bouncer, "show work_mem") == ["4MB", "4MB"]
    assert await behind.fetchval("select 1") == 1


async def test_a_lease_is_one_transaction(behind: WorkflowConnectionPool, table: str) -> None:
    async with behind.acquire() as connection:
        with pytest.raises(StatementNotAllowedError, match=r"pool\.transaction\(\)"):
            await connection.fetchval("select 1")
        async with connection.transaction():
            pids = {await connection.fetchval("select pg_backend_pid()") for _ in range(5)}
            await connection.execute("create temp table own (a int) on commit drop")
            await connection.executemany("insert into own values ($1)", [(1,), (2,)])
            await connection.execute(f"insert into {table} select a, 'x' from own")
            async with connection.transaction():
                await connection.execute(f"insert into {table} values (3, 'x')")
        with pytest.raises(StatementNotAllowedError, match="transaction"):
            await connection.fetchval("select 1")
        await connection.execute("begin")
        await connection.execute(f"insert into {table} values (9, 'left open')")
    assert len(pids) == 1
    assert await behind.fetchval(f"select array_agg(id order by id) from {table}") == [1, 2, 3]


# --- what can ---


async def test_statements_of_many_callers_over_two_backends(
    behind: WorkflowConnectionPool, bouncer: PgBouncer, schema: str, table: str, direct: asyncpg.Connection
) -> None:
    await direct.execute(f"create type {schema}.mood as enum ('sad', 'happy')")

    async def one(number: int) -> bool:
        if number % 3 == 0:
            await behind.execute(f"insert into {table} values ($1, $2)", number, f"label {number}")
            return bool(await behind.fetchval(f"select label from {table} where id = $1", number) == f"label {number}")
        if number % 3 == 1:
            # A type unknown so far: asyncpg looks it up in the middle of this.
            row = await behind.fetchrow(f"select $1::{schema}.mood as a, $2::int[] as b", "happy", [number])
            return bool(row is not None and row["a"] == "happy" and row["b"] == [number])
        async with behind.transaction() as tx:
            first = await tx.fetchval("select pg_backend_pid()")
            return bool(await tx.fetchval("select pg_backend_pid()") == first)

    assert all(await asyncio.gather(*map(one, range(240))))
    assert await direct.fetchval(f"select count(*) from {table}") == 80
    assert await on_every_backend(bouncer, "select count(*) from pg_prepared_statements where name <> ''") == [0, 0]
    jit = await direct.fetchval("show jit")
    assert await on_every_backend(bouncer, "show jit") == [jit, jit]
    status = await behind.process({"operation": "get_status"})
    assert status["max_connections"] == 6


async def test_looking_up_a_type_changes_no_setting(
    bouncer: PgBouncer, schema: str, direct: asyncpg.Connection
) -> None:
    await direct.execute(f"create type {schema}.mood as enum ('sad', 'happy')")
    seen: list[str] = []
    async with opened(connector(bouncer.parameters)) as connection:
        connection.raw.add_query_logger(lambda query: seen.append(query.query))
        assert await connection.run(messages.FETCH, f"select 'sad'::{schema}.mood as a", ()) == ([("sad",)], ("a",))
    assert any("pg_type" in query for query in seen)
    assert not any("set_config" in query for query in seen)


async def test_the_status_tells(behind: WorkflowConnectionPool) -> None:
    import ray

    from raypg import naming

    worker = ray.get_actor(naming.worker_actor(behind.name, 0), namespace=naming.NAMESPACE)
    assert (await worker.status.remote())["pooler"] == "transaction"


async def test_settings_of_a_call_end_with_it(behind: WorkflowConnectionPool, schema: str, bouncer: PgBouncer) -> None:
    settings = {"search_path": schema, "work_mem": "9MB"}
    assert await behind.fetchval("select current_schema()", settings=settings) == schema
    assert await behind.fetchval("show work_mem", settings=settings) == "9MB"
    assert await on_every_backend(bouncer, "show work_mem") == ["4MB", "4MB"]


async def test_a_pipeline(behind: WorkflowConnectionPool, table: str, direct: asyncpg.Connection) -> None:
    await behind.executemany(f"insert into {table} values ($1, $2)", [(n, "x") for n in range(100)])
    async with behind.transaction() as tx:
        await tx.executemany(f"insert into {table} values ($1, $2)", [(n, "y") for n in range(100, 200)])
    assert await direct.fetchval(f"select count(*) from {table}") == 200


async def test_timeouts_and_cancellations_reach_the_server(
    behind: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    running = "select count(*) from pg_stat_activity where state = 'active' and query like '%pg_sleep(47%'"
    with pytest.raises(QueryTimeoutError):
        await behind.fetchval("select pg_sleep(47)", timeout=0.3)
    assert await direct.fetchval(running + " and pid <> pg_backend_pid()") == 0

    async def seen() -> bool:
        return bool(await direct.fetchval(running + " and pid <> pg_backend_pid()"))

    call = asyncio.create_task(behind.fetchval("select pg_sleep(47.5)"))
    await eventually(seen)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    async def gone() -> bool:
        return not await seen()

    await eventually(gone, timeout=5)
    # Nobody else was hit, and nobody will be.
    assert await asyncio.gather(*(behind.fetchval("select $1::int", n) for n in range(50))) == list(range(50))


# --- bad days ---


async def test_a_backend_that_ends_under_a_read_is_not_tried_again(
    behind: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    """PgBouncer says the same of a backend that crashed and of one that was ended: the read may be what kills."""

    async def victims() -> list[asyncpg.Record]:
        rows: list[asyncpg.Record] = await direct.fetch(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where state = 'active' and query like '%pg_sleep(48)%' and pid <> pg_backend_pid()"
        )
        return rows

    call = asyncio.create_task(behind.fetchval("select pg_sleep(48)"))
    await eventually(victims)
    with pytest.raises(ConnectionLostError):
        await call
    assert await victims() == []
    assert await behind.fetchval("select 1") == 1


async def test_its_last_words_count_as_a_crash(bouncer: PgBouncer, direct: asyncpg.Connection) -> None:
    async with opened(connector(bouncer.parameters)) as connection:
        await connection.run(messages.STATUS, "begin", ())
        (pid,) = (await connection.run(messages.FETCH, "select pg_backend_pid()", ()))[0][0]
        call = asyncio.create_task(connection.run(messages.STATUS, "select pg_sleep(49)", ()))

        async def active() -> bool:
            return bool(
                await direct.fetchval("select query like '%pg_sleep(49)%' from pg_stat_activity where pid = $1", pid)
            )

        await eventually(active)
        await direct.execute("select pg_terminate_backend($1)", pid)
        with pytest.raises(ConnectionLost) as caught:
            await call
        assert caught.value.by_crash


async def test_nobody_notices_a_backend_that_ended_idle(
    behind: WorkflowConnectionPool, bouncer: PgBouncer, direct: asyncpg.Connection
) -> None:
    for pid in await on_every_backend(bouncer, "select pg_backend_pid()"):
        await direct.execute("select pg_terminate_backend($1, 5000)", pid)
    assert await asyncio.gather(*(behind.fetchval("select $1::int", n) for n in range(20))) == list(range(20))


async def test_a_restart_of_the_pooler_is_noticed_before_anything_is_sent(
    ray_cluster: Any, pg18: EmbeddedServer
) -> None:
    with PgBouncer(pg18, "transaction", size=2) as own:
        async with own_pool(pg18, **{**own.parameters, "max_connections": 3}) as pool:
            calls = [pool.execute("do $$ begin perform 1; end $$") for _ in range(20)]
            assert set(await asyncio.gather(*calls)) == {"DO"}
            own.stop()
            own.start()
            calls = [pool.execute("do $$ begin perform 1; end $$") for _ in range(20)]
            assert set(await asyncio.gather(*calls)) == {"DO"}


async def test_a_killed_worker_is_replaced_and_the_backends_stay(ray_cluster: Any, pg18: EmbeddedServer) -> None:
    with PgBouncer(pg18, "transaction", size=2) as own:
        async with own_pool(pg18, **{**own.parameters, "max_connections": 5}) as pool:
            before = await on_every_backend(own, "select pg_backend_pid()")
            await asyncio.gather(*(pool.fetchval("select pg_sleep(0.05)") for _ in range(4)))  # both show our name
            (pid,) = (await worker_pids(pool.name)).values()
            os.kill(pid, signal.SIGKILL)
            assert await asyncio.wait_for(pool.fetchval("select 1"), 15) == 1
            assert set(await on_every_backend(own, "select pg_backend_pid()")) == set(before)


async def test_resetting_sessions_is_left_to_it(pg18: EmbeddedServer) -> None:
    with PgBouncer(pg18, "transaction", size=1) as own:
        other = await asyncpg.connect(**own.parameters, statement_cache_size=0)
        await other.execute("set work_mem = '5MB'")  # what another client of the pooler has done is not ours to undo
        async with opened(connector(own.parameters)) as connection:
            await connection.run(messages.STATUS, "begin", ())
            await connection.run(messages.FETCH, "select 1", ())
            await connection.reset()
            assert not connection.raw.is_in_transaction()
            assert await connection.run(messages.FETCH, "show work_mem", ()) == ([("5MB",)], ("work_mem",))
        other.terminate()


async def test_its_backends_are_never_ended_or_counted(bouncer: PgBouncer, direct: asyncpg.Connection) -> None:
    ours = connector(bouncer.parameters)
    control = Control(connector(bouncer.parameters))
    seen = "select count(*) from pg_stat_activity where application_name = $1"
    async with opened(ours) as connection:
        await connection.run(messages.STATUS, "begin", ())
        await connection.run(messages.FETCH, "select 1", ())
        # The server does show it under our name …
        assert await direct.fetchval(seen, NAME) >= 1
        assert await control.end_backends(NAME, timeout=0.0) == (0, True)
        assert await control.gone([1, 2]) == [1, 2]
        # … but it is the pooler's.
        assert await connection.run(messages.STATUS, "commit", ()) == ("COMMIT", None)
    await control.close()


# --- whole sessions ---


async def test_a_pooler_of_sessions_takes_away_only_the_settings_at_connect(
    ray_cluster: Any, pg18: EmbeddedServer
) -> None:
    with PgBouncer(pg18, "session", size=4) as own:
        async with own_pool(pg18, **{**own.parameters, "max_connections": 3, "pooler": "session"}) as pool:
            async with pool.acquire() as connection:
                pid = await connection.fetchval("select pg_backend_pid()")
                await connection.execute("set work_mem = '3MB'")
                await connection.execute("create temp table mine (a int)")
                assert await connection.fetchval("show work_mem") == "3MB"
                assert await connection.fetchval("select pg_backend_pid()") == pid
                assert await connection.fetchval("select count(*) from pg_prepared_statements") > 0
            states = await asyncio.gather(*(pool.fetchrow("select current_setting('work_mem'), to_regclass('mine')")
                                            for _ in range(9)))  # fmt: skip
            assert {tuple(row) for row in states if row is not None} == {("4MB", None)}
            with pytest.raises(QueryTimeoutError):
                await pool.fetchval("select pg_sleep(46)", timeout=0.3)
