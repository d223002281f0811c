"""How asyncpg shows the loss of a connection. raypg decides by it what is known about a statement."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
from pgserver import main_server
from waiting import eventually, wait_until

from raypg.embedded import EmbeddedServer
from raypg.server import _asyncpg

pytestmark = pytest.mark.contract


@pytest.fixture
async def victim(pg: EmbeddedServer) -> AsyncIterator[asyncpg.Connection]:
    """A connection that a test may lose."""
    connection = await asyncpg.connect(**pg.parameters)
    yield connection
    connection.terminate()


def poll(connection: asyncpg.Connection) -> int:
    """What the socket has to tell, without waiting and without running the loop."""
    poller = select.poll()
    poller.register(_asyncpg.file_descriptor(connection), select.POLLIN | select.POLLRDHUP)
    return sum(events for _, events in poller.poll(0))


async def terminate(direct: asyncpg.Connection, connection: asyncpg.Connection) -> None:
    assert await direct.fetchval("select pg_terminate_backend($1, 5000)", connection.get_server_pid())


async def wait_for_activity(direct: asyncpg.Connection, connection: asyncpg.Connection, state: str) -> None:
    async def has_state() -> bool:
        query = "select state from pg_stat_activity where pid = $1"
        return bool(await direct.fetchval(query, connection.get_server_pid()) == state)

    await eventually(has_state)


async def test_the_socket_of_a_healthy_idle_connection_is_silent(victim: asyncpg.Connection) -> None:
    assert await victim.fetchval("select 1") == 1
    assert poll(victim) == 0


def test_only_the_socket_knows_at_once_that_an_idle_connection_was_killed(pg: EmbeddedServer) -> None:
    """Between two runs of the loop is_closed() cannot know. So the socket is polled before a statement is sent."""

    async def connect() -> asyncpg.Connection:
        connection = await asyncpg.connect(**pg.parameters)
        assert await connection.fetchval("select 1") == 1
        return connection

    with asyncio.Runner() as runner:
        victim = runner.run(connect())
        pid = victim.get_server_pid()
        pg.run("psql", "-qAtc", f"select pg_terminate_backend({pid}, 5000)")
        # The loop does not run here.
        wait_until(lambda: poll(victim), 5)
        assert poll(victim) & (select.POLLIN | select.POLLRDHUP)
        assert victim.is_closed() is False

        async def look() -> bool:
            await eventually(victim.is_closed)
            return bool(victim.is_closed())

        assert runner.run(look()) is True


async def test_a_statement_on_a_killed_idle_connection_looks_like_one_that_was_lost_in_the_middle(
    direct: asyncpg.Connection, victim: asyncpg.Connection
) -> None:
    """Nothing ran, but the error is 08003, as after a kill during the statement: class and code do not tell."""
    await victim.execute("select 1")
    await terminate(direct, victim)
    with pytest.raises((asyncpg.ConnectionDoesNotExistError, asyncpg.InterfaceError)):
        await victim.execute("select 1")


async def test_a_terminated_backend_leaves_its_last_words_in_the_cause(
    direct: asyncpg.Connection, victim: asyncpg.Connection
) -> None:
    """FATAL 57P01: the server itself says that it ended the session (asyncpg 0.32)."""
    task = asyncio.ensure_future(victim.execute("select pg_sleep(60)"))
    await wait_for_activity(direct, victim, "active")
    await terminate(direct, victim)
    with pytest.raises(asyncpg.ConnectionDoesNotExistError) as caught:
        await task
    assert caught.value.sqlstate == "08003"
    cause: Any = caught.value.__cause__
    assert isinstance(cause, asyncpg.AdminShutdownError)
    assert (cause.sqlstate, cause.severity_en) == ("57P01", "FATAL")
    await eventually(victim.is_closed)


async def test_an_error_of_sql_leaves_the_connection_alive_and_says_error(victim: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.DivisionByZeroError) as caught:
        await victim.execute("select 1/0")
    assert caught.value.severity_en == "ERROR"
    assert not victim.is_closed()
    assert not victim.is_in_transaction()
    assert await victim.fetchval("select 1") == 1


async def test_a_timeout_cancels_on_the_server_and_the_connection_goes_on(
    direct: asyncpg.Connection, victim: asyncpg.Connection
) -> None:
    with pytest.raises(TimeoutError):
        await victim.fetch("select pg_sleep(60)", timeout=0.2)
    await wait_for_activity(direct, victim, "idle")
    assert await victim.fetchval("select 1") == 1


async def test_a_cancel_request_of_our_own_lets_the_statement_say_what_became_of_it(
    direct: asyncpg.Connection, victim: asyncpg.Connection
) -> None:
    task = asyncio.ensure_future(victim.execute("select pg_sleep(60)"))
    await wait_for_activity(direct, victim, "active")
    await asyncio.wait_for(_asyncpg.send_cancel(victim), 10)
    with pytest.raises(asyncpg.QueryCanceledError) as caught:
        await asyncio.wait_for(task, 10)
    assert caught.value.severity_en == "ERROR"
    assert await victim.fetchval("select 1") == 1


async def test_rows_and_command_tag_come_in_one_trip(victim: asyncpg.Connection) -> None:
    await victim.execute("create temp table t (id int)")
    insert = "insert into t select generate_series(1, $1) returning id"
    records, status = await _asyncpg.fetch_with_status(victim, insert, [3], 0)
    assert ([record["id"] for record in records], status) == ([1, 2, 3], "INSERT 0 3")
    records, status = await _asyncpg.fetch_with_status(victim, "update t set id = id", [], 0)
    assert (list(records), status) == ([], "UPDATE 3")
    records, _ = await _asyncpg.fetch_with_status(victim, "select id from t order by id", [], 1)
    assert [record["id"] for record in records] == [1]


async def test_statements_are_forgotten_when_told_so(victim: asyncpg.Connection) -> None:
    query = "select $1::int"
    assert await victim.fetchval(query, 1) == 1
    await victim.execute("deallocate all")
    with pytest.raises(asyncpg.InvalidSQLStatementNameError):
        await victim.fetchval(query, 1)
    _asyncpg.forget_statements(victim)
    assert await victim.fetchval(query, 1) == 1


async def test_executemany_is_atomic(direct: asyncpg.Connection, schema: str) -> None:
    await direct.execute("create table t (id int primary key)")
    with pytest.raises(asyncpg.UniqueViolationError):
        await direct.executemany("insert into t values ($1)", [(1,), (2,), (1,), (3,)])
    assert await direct.fetchval("select count(*) from t") == 0
    assert not direct.is_in_transaction()
    await direct.executemany("insert into t values ($1)", [(1,), (2,)])
    assert await direct.fetchval("select count(*) from t") == 2


async def test_fetchmany_gives_all_rows_without_boundaries(direct: asyncpg.Connection) -> None:
    rows = await direct.fetchmany("select * from generate_series(1, $1) as n", [(1,), (0,), (2,)])
    assert [row["n"] for row in rows] == [1, 1, 2]


# -- a crash of the whole server -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crashing() -> Iterator[EmbeddedServer]:
    """A server of its own: a backend that is killed takes all others with it."""
    with main_server({"restart_after_crash": "on"}) as server:
        yield server


async def test_after_a_crash_no_error_has_a_cause_and_at_most_a_warning_tells_the_neighbours(
    crashing: EmbeddedServer,
) -> None:
    """All see EOF without a FATAL. The neighbours of the killed backend may be told why, but by a WARNING 57P02, which
    asyncpg gives to log listeners and not to the statement that was lost; and often it does not arrive (seen on idle
    connections, one time in two). So raypg must not depend on it."""
    killed, busy, idle = [await asyncpg.connect(**crashing.parameters) for _ in range(3)]
    told: dict[str, list[Any]] = {"killed": [], "busy": [], "idle": []}
    for name, connection in {"killed": killed, "busy": busy, "idle": idle}.items():
        connection.add_log_listener(lambda _, message, name=name: told[name].append(message))
    running = asyncio.ensure_future(killed.execute("select pg_sleep(60)"))
    neighbour = asyncio.ensure_future(busy.execute("select pg_sleep(60)"))

    async def both_run() -> bool:
        return bool(await idle.fetchval("select count(*) from pg_stat_activity where state = 'active'") == 3)

    await eventually(both_run)
    os.kill(killed.get_server_pid(), signal.SIGKILL)
    with pytest.raises(asyncpg.ConnectionDoesNotExistError) as of_killed:
        await asyncio.wait_for(running, 20)
    assert of_killed.value.__cause__ is None
    with pytest.raises(asyncpg.ConnectionDoesNotExistError) as of_neighbour:
        await asyncio.wait_for(neighbour, 20)
    assert of_neighbour.value.__cause__ is None
    await eventually(idle.is_closed)
    assert told["killed"] == []
    for name in ("busy", "idle"):
        assert {(message.sqlstate, message.severity_en) for message in told[name]} <= {("57P02", "WARNING")}
    await (await connect_after_crash(crashing)).close()


async def connect_after_crash(server: EmbeddedServer) -> asyncpg.Connection:
    """Connect as soon as the server lets us in; check what it says until then."""

    async def try_it() -> asyncpg.Connection | None:
        try:
            return await asyncpg.connect(**server.parameters)
        except asyncpg.CannotConnectNowError as error:
            refusals.add(error.sqlstate)  # it starts up or recovers
        except asyncpg.ConnectionDoesNotExistError as error:
            refusals.add(error.sqlstate)  # it was crashing while it let us in
        except (ConnectionResetError, ConnectionRefusedError):
            pass  # the postmaster had not begun to listen again
        return None

    refusals: set[str | None] = set()
    connection = await eventually(try_it, 30)
    assert refusals <= {"57P03", "08003"}
    return connection


@pytest.mark.parametrize(("mode", "cause"), [("fast", "57P01"), ("immediate", None)])
async def test_a_shutdown_is_a_fatal_if_fast_and_silent_if_immediate(
    crashing: EmbeddedServer, mode: Any, cause: str | None
) -> None:
    connection = await connect_after_crash(crashing)
    running = asyncio.ensure_future(connection.execute("select pg_sleep(60)"))
    await asyncio.to_thread(lambda: wait_until(lambda: is_active(crashing), 10))
    await asyncio.to_thread(crashing.stop, mode)
    with pytest.raises(asyncpg.ConnectionDoesNotExistError) as caught:
        await asyncio.wait_for(running, 20)
    assert getattr(caught.value.__cause__, "sqlstate", None) == cause
    with pytest.raises(ConnectionRefusedError):
        await asyncpg.connect(**crashing.parameters)
    await asyncio.to_thread(crashing.start)


def is_active(server: EmbeddedServer) -> bool:
    query = "select count(*) from pg_stat_activity where state = 'active' and wait_event = 'PgSleep'"
    return server.run("psql", "-qAtc", query).stdout.strip() == "1"


async def test_the_address_tells_servers_apart(pg: EmbeddedServer, direct: asyncpg.Connection) -> None:
    other = await asyncpg.connect(**pg.parameters)
    assert _asyncpg.address(direct) == _asyncpg.address(other)
    assert str(pg.port) in _asyncpg.address(other)
    await other.close()


async def test_fetchmany_is_one_transaction_and_gives_rows_in_order_without_boundaries(
    direct: asyncpg.Connection, schema: str
) -> None:
    sql = "select g, pg_current_xact_id()::text from generate_series(1, $1::int) g"
    rows = await direct.fetchmany(sql, [(2,), (0,), (1,)])
    assert [row[0] for row in rows] == [1, 2, 1]
    assert len({row[1] for row in rows}) == 1
