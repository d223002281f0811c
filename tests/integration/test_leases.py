"""Leases: one connection for one caller, with everything that a session can do, until it ends; then never again."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import asyncpg
import pytest
from pools import nothing_leased, own_pool, status_of_all
from waiting import eventually

from raypg import (
    ConfigError,
    LeaseLostError,
    OutcomeUnknownError,
    PoolClosedError,
    PoolExhaustedError,
    QueryTimeoutError,
    WorkflowConnectionPool,
)
from raypg.embedded import EmbeddedServer

# --- what is real inside ---------------------------------------------------------------------------------------------


async def test_a_lease_pins_one_backend(pool: WorkflowConnectionPool) -> None:
    async with pool.acquire() as one, pool.acquire() as two:
        pids = [await one.fetchval("select pg_backend_pid()") for _ in range(5)]
        assert set(pids) == {one.backend_pid}
        assert await two.fetchval("select pg_backend_pid()") == two.backend_pid != one.backend_pid
        others = await asyncio.gather(*(pool.fetchval("select pg_backend_pid()") for _ in range(100)))
        assert not {one.backend_pid, two.backend_pid} & set(others)


async def test_it_can_be_awaited_and_released(pool: WorkflowConnectionPool) -> None:
    connection = await pool.acquire()
    assert await connection.fetchval("select 1") == 1
    await pool.release(connection)
    await pool.release(connection)
    await connection.release()
    with pytest.raises(LeaseLostError, match="released"):
        await connection.fetchval("select 1")
    assert "released" in repr(connection)


async def test_session_state_is_real_inside(pool: WorkflowConnectionPool) -> None:
    async with pool.acquire() as connection:
        await connection.execute("create temp table mine (a int); insert into mine values (1), (2)")
        await connection.executemany("insert into mine values ($1)", [(3,), (4,)])
        assert [row["a"] for row in await connection.fetch("select a from mine order by a")] == [1, 2, 3, 4]
        await connection.execute("set my.word = 'kept'")
        assert await connection.fetchval("select current_setting('my.word')") == "kept"
        assert await connection.fetchval("select pg_try_advisory_lock(4711)")
        assert not await pool.fetchval("select pg_try_advisory_lock(4711)")
        assert await connection.execute("prepare p as select 5") == "PREPARE"
        assert await connection.fetchval("execute p") == 5
        await connection.execute("begin; declare c cursor for select g from generate_series(1, 10) g")
        assert len(await connection.fetch("fetch 4 from c")) == 4
        assert await connection.fetchrow("fetch 1 from c") == (5,)
        await connection.execute("commit")
    assert await pool.fetchval("select pg_try_advisory_lock(4711)")


async def test_statements_of_one_lease_run_one_after_the_other(pool: WorkflowConnectionPool) -> None:
    async with pool.acquire() as connection:
        await connection.execute("create temp table sequence_ (position serial, sent int)")
        insert = "insert into sequence_ (sent) select $1::int from (select pg_sleep(0.01 * ($1::int % 3))) s"
        await asyncio.gather(*(connection.execute(insert, number) for number in range(30)))
        rows = await connection.fetch("select sent from sequence_ order by position")
        assert [row["sent"] for row in rows] == list(range(30))


# --- errors and timeouts inside --------------------------------------------------------------------------------------


async def test_errors_inside_are_asyncpgs_and_the_lease_goes_on(pool: WorkflowConnectionPool) -> None:
    async with pool.acquire() as connection:
        for sql, kind in [
            ("selekt", asyncpg.PostgresSyntaxError),
            ("select 1/0", asyncpg.DivisionByZeroError),
            ("select * from nowhere", asyncpg.UndefinedTableError),
        ]:
            with pytest.raises(kind):
                await connection.fetch(sql)
        with pytest.raises(QueryTimeoutError):
            await connection.fetch("select pg_sleep(10)", timeout=0.1)
        with pytest.raises(ValueError, match="soon"):
            await connection.fetch("select 1", timeout="soon")  # type: ignore[arg-type]
        assert await connection.fetchval("select 1") == 1


async def test_a_value_that_cannot_travel_does_not_end_the_lease(pool: WorkflowConnectionPool) -> None:
    async with pool.acquire() as connection:
        with pytest.raises((TypeError, asyncpg.DataError), match="cannot be sent"):
            await connection.fetch("select $1::int", asyncio.get_running_loop())
        assert await connection.fetchval("select 1") == 1


async def test_a_cancelled_statement_is_cancelled_on_the_server(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    async with pool.acquire() as connection:
        activity = "select state from pg_stat_activity where pid = $1"
        call = asyncio.create_task(connection.fetch("select pg_sleep(60)"))

        async def runs() -> bool:
            return bool(await direct.fetchval(activity, connection.backend_pid) == "active")

        await eventually(runs)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await asyncio.wait_for(connection.fetchval("select 1"), 5) == 1


# --- ends ------------------------------------------------------------------------------------------------------------


async def test_after_its_deadline_a_lease_is_gone_and_its_connection_serves_others(
    pair: WorkflowConnectionPool, table: str
) -> None:
    one = await pair.acquire(lease_timeout=5.0)
    two = await pair.acquire(lease_timeout=5.0)
    for connection in (one, two):
        await connection.execute("begin")
        await connection.execute("create temp table shadow (a int)")
        await connection.execute(f"insert into {table} values ({connection.backend_pid}, 'x')")
    started = time.monotonic()
    assert await pair.fetchval(f"select count(*) from {table}", timeout=10) == 0
    assert time.monotonic() - started < 10
    await eventually(lambda: nothing_leased(pair))  # the count needed but one of the two connections
    for connection in (one, two):
        with pytest.raises(LeaseLostError, match=r"deadline of 5 s"):
            await connection.execute(f"insert into {table} values (5, 'x')")
        with pytest.raises(LeaseLostError):
            await connection.execute("commit")
        await connection.release()
    assert await pair.fetchval(f"select count(*) from {table}") == 0


async def test_a_deadline_under_a_running_statement(pair: WorkflowConnectionPool, table: str) -> None:
    connection = await pair.acquire(lease_timeout=0.4)
    started = time.monotonic()
    with pytest.raises(LeaseLostError, match="deadline"):
        await connection.fetch("select pg_sleep(60)")
    assert time.monotonic() - started < 5
    assert await asyncio.gather(*(pair.fetchval("select $1::int", n) for n in range(20))) == list(range(20))


async def test_a_deadline_inside_a_transaction_block_is_told(pair: WorkflowConnectionPool, table: str) -> None:
    with pytest.raises(LeaseLostError, match="deadline"):  # noqa: PT012
        async with pair.transaction(lease_timeout=3.0) as tx:
            await tx.execute(f"insert into {table} values (1, 'x')")
            await eventually(lambda: nothing_leased(pair))
    assert await pair.fetchval(f"select count(*) from {table}") == 0


async def test_the_error_on_its_way_is_not_hidden_by_a_lost_lease(pair: WorkflowConnectionPool) -> None:
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with pair.transaction(lease_timeout=3.0):
            await eventually(lambda: nothing_leased(pair))
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with pair.acquire(lease_timeout=3.0) as connection, connection.transaction():
            await eventually(lambda: nothing_leased(pair))
            raise ZeroDivisionError


@pytest.mark.parametrize("key", ["timeout", "lease_timeout"])
@pytest.mark.parametrize("value", [0, -1, "soon", True, float("nan")])
async def test_bad_times_are_refused(pool: WorkflowConnectionPool, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        await pool.acquire(**{key: value})


async def test_a_killed_backend_ends_its_lease(pair: WorkflowConnectionPool, direct: asyncpg.Connection) -> None:
    connection = await pair.acquire()
    await direct.fetchval("select pg_terminate_backend($1, 5000)", connection.backend_pid)
    with pytest.raises(LeaseLostError, match="nothing was sent"):
        await connection.execute("select 1")
    with pytest.raises(LeaseLostError):
        await connection.execute("select 1")
    await connection.release()
    assert await asyncio.gather(*(pair.fetchval("select $1::int", n) for n in range(20))) == list(range(20))


@pytest.mark.parametrize(
    ("sql", "begun", "kind"),
    [
        ("select pg_sleep(60)", True, LeaseLostError),
        ("insert into {table} select 1 from (select pg_sleep(60)) s", True, LeaseLostError),
        ("insert into {table} select 1 from (select pg_sleep(60)) s", False, OutcomeUnknownError),
    ],
)
async def test_a_backend_killed_under_a_statement(
    pair: WorkflowConnectionPool, direct: asyncpg.Connection, table: str, sql: str, begun: bool, kind: type[Exception]
) -> None:
    connection = await pair.acquire()
    if begun:
        await connection.execute("begin")
    call = asyncio.create_task(connection.execute(sql.format(table=table)))

    async def runs() -> bool:
        event = "select wait_event from pg_stat_activity where pid = $1"
        return bool(await direct.fetchval(event, connection.backend_pid) == "PgSleep")

    await eventually(runs)
    await direct.fetchval("select pg_terminate_backend($1, 5000)", connection.backend_pid)
    with pytest.raises(kind):
        await call
    with pytest.raises(LeaseLostError):
        await connection.execute("select 1")
    await connection.release()
    assert await pair.fetchval(f"select count(*) from {table}") == 0


async def test_a_lease_ends_with_its_pool(ray_cluster: Any, pg: EmbeddedServer) -> None:
    async with own_pool(pg, max_connections=2) as pool:
        idle = await pool.acquire()
        busy = await pool.acquire()
        call = asyncio.create_task(busy.fetch("select pg_sleep(60)"))
        waiting = asyncio.create_task(pool.acquire()._acquire())
        await asyncio.sleep(0.2)
        started = time.monotonic()
        await pool.close()
        with pytest.raises((PoolClosedError, LeaseLostError), match="closed"):
            await call
        with pytest.raises(PoolClosedError):
            await waiting
        assert time.monotonic() - started < 5
        with pytest.raises((PoolClosedError, LeaseLostError)):
            await idle.fetch("select 1")
        await idle.release()
        await busy.release()


# --- none to be had --------------------------------------------------------------------------------------------------


async def test_when_leases_hold_all_connections_waiting_ends_in_time(pair: WorkflowConnectionPool) -> None:
    async with pair.acquire(), pair.acquire():
        for call in (pair.fetchval("select 1", timeout=0.4), pair.acquire(timeout=0.4)._acquire()):
            started = time.monotonic()
            with pytest.raises(PoolExhaustedError) as caught:
                await call
            took = time.monotonic() - started
            error = caught.value
            assert 0.3 < took < 10
            assert isinstance(error, TimeoutError)
            assert error.name == pair.name
            assert 0.3 < error.waited < 8
            assert error.depth == 1
            assert error.limit == 10_000
            assert error.connections == 2
            assert error.reason == "timeout"
            assert "max_connections" in str(error)
    assert await pair.fetchval("select 1", timeout=5) == 1


async def test_who_waits_gets_the_next_one(pair: WorkflowConnectionPool) -> None:
    one, two = await pair.acquire(), await pair.acquire()
    waiting = [asyncio.create_task(pair.fetchval("select $1::int", n)) for n in range(10)]
    lease = asyncio.create_task(pair.acquire(timeout=10)._acquire())
    await asyncio.sleep(0.2)
    assert not lease.done()
    assert not any(task.done() for task in waiting)
    await one.release()
    three = await lease  # before or behind the others
    assert three.backend_pid == one.backend_pid
    await two.release()
    assert await asyncio.gather(*waiting) == list(range(10))
    await three.release()


async def test_too_many_waiting_are_refused_at_once(ray_cluster: Any, pg: EmbeddedServer) -> None:
    """One job may fill nine tenths of a queue; the rest is kept for other jobs."""
    async with own_pool(pg, max_connections=1, max_waiting=20) as pool:
        connection = await pool.acquire()
        waiting = [asyncio.create_task(pool.fetchval("select $1::int", n)) for n in range(18)]

        async def all_wait() -> bool:
            return bool((await status_of_all(pool))["waiting_count"] == 18)

        await eventually(all_wait)
        started = time.monotonic()
        with pytest.raises(PoolExhaustedError, match="queue is full") as caught:
            await pool.fetchval("select 1")
        assert time.monotonic() - started < 3
        assert (caught.value.reason, caught.value.depth, caught.value.limit) == ("full", 18, 20)
        with pytest.raises(PoolExhaustedError, match="queue is full"):
            await pool.acquire()
        await connection.release()
        assert await asyncio.gather(*waiting) == list(range(18))


async def test_an_abandoned_wait_takes_no_connection(pair: WorkflowConnectionPool) -> None:
    """A caller that stops waiting for a lease leaves nothing behind, even if it was granted meanwhile."""
    for _ in range(10):
        one, two = await pair.acquire(), await pair.acquire()
        waiting = [asyncio.create_task(pair.acquire(timeout=20)._acquire()) for _ in range(5)]
        await asyncio.sleep(0.02)
        await asyncio.gather(one.release(), two.release(), *(_cancel(task) for task in waiting))
    async with pair.acquire(timeout=5), pair.acquire(timeout=5):
        pass


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    try:
        connection = await task
    except asyncio.CancelledError:
        return
    await connection.release()


async def test_a_hundred_callers_share_two_connections(pair: WorkflowConnectionPool, table: str) -> None:
    async def transfer(number: int) -> None:
        async with pair.transaction() as tx:
            await tx.execute(f"insert into {table} values ($1, 'x')", number)
            assert await tx.fetchval(f"select count(*) from {table} where id = $1", number) == 1

    await asyncio.gather(*(transfer(number) for number in range(100)))
    assert await pair.fetchval(f"select count(*) from {table}") == 100
