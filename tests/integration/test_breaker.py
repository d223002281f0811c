"""The breaker as those use it who hold a handle: status, commands, listeners, errors; and what must not move it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import asyncpg
import pytest
import ray
from breakers import becomes, stands, transitions
from killing import kill_all
from pools import backends_of, own_pool, status_of_all, unique_name
from waiting import eventually

import raypg
from raypg import (
    CircuitBreakerConfig,
    CircuitBreakerError,
    ConfigError,
    PoolClosedError,
    QueryPipelineNode,
    UnavailableError,
    WorkflowConnectionPool,
    get_pool,
)
from raypg.embedded import EmbeddedServer


@pytest.fixture(scope="module")
def shared(ray_cluster: Any, pg18: EmbeddedServer) -> Iterator[WorkflowConnectionPool]:
    handle = WorkflowConnectionPool(
        name=unique_name("breaker"),
        **pg18.parameters,
        max_connections=5,
        workers=2,
        circuit_breaker_recovery_timeout=1.0,
    )
    asyncio.run(handle.process({"operation": "initialize"}))
    yield handle
    asyncio.run(handle.close())


@pytest.fixture
async def pool(shared: WorkflowConnectionPool) -> Any:
    """A pool of two workers, its breaker as new."""
    await shared.circuit_breaker.reset()
    handle = get_pool(shared.name)
    yield handle
    handle.circuit_breaker.stop_listening()
    await shared.circuit_breaker.reset()


# --- status ----------------------------------------------------------------------------------------------------------


async def test_the_status_says_all_that_there_is_to_say(pool: WorkflowConnectionPool) -> None:
    assert await asyncio.gather(*(pool.fetchval("select 1") for _ in range(50))) == [1] * 50

    async def counted() -> bool:
        known = stands(pool)
        return bool(known["metrics"]["successful_calls"] >= 50 and len(known["workers"]) == 2)

    await eventually(counted)
    status = stands(pool)
    json.dumps(status)
    assert set(status) == {
        "state",
        "forced",
        "forced_reason",
        "reason",
        "metrics",
        "config",
        "time_until_recovery",
        "state_transitions",
        "workers",
        "as_of",
    }
    assert (status["state"], status["forced"], status["time_until_recovery"]) == ("closed", False, None)
    assert pool.circuit_breaker.state == "closed"
    metrics = status["metrics"]
    assert metrics["failed_calls"] == metrics["rejected_calls"] == metrics["consecutive_failures"] == 0
    assert 0 < metrics["avg_call_duration"] < 1
    assert status["config"]["failure_threshold"] == 5
    assert sorted(status["workers"]) == [0, 1]
    comprehensive = await pool.process({"operation": "get_comprehensive_status"})
    assert comprehensive["circuit_breaker"]["state"] == "closed"
    assert comprehensive["max_connections"] == 5


def test_it_can_be_asked_from_a_thread_without_a_loop(shared: WorkflowConnectionPool) -> None:
    assert stands(shared)["state"] == "closed"


async def test_and_from_an_async_actor(pool: WorkflowConnectionPool) -> None:
    class Asks:
        async def ask(self, pool: WorkflowConnectionPool) -> str:
            until = time.monotonic() + 20
            while True:
                try:
                    return pool.circuit_breaker.state
                except UnavailableError:  # a handle that was never told anything has nothing to say meanwhile
                    assert time.monotonic() < until

    actor: Any = ray.remote(Asks).options(num_cpus=0).remote()
    assert await actor.ask.remote(pool) == "closed"


async def test_a_pool_that_was_not_started_is_closed(pg: EmbeddedServer) -> None:
    handle = WorkflowConnectionPool(
        name=unique_name(), **pg.parameters, circuit_breaker=CircuitBreakerConfig.tolerant()
    )
    status = handle.circuit_breaker.get_status()
    assert status["state"] == "closed"
    assert status["config"]["failure_threshold"] == 10
    assert status["metrics"]["total_calls"] == 0


async def test_a_closed_handle_says_so(pool: WorkflowConnectionPool) -> None:
    handle = get_pool(pool.name)
    await handle.close()
    with pytest.raises(PoolClosedError):
        handle.circuit_breaker.get_status()
    with pytest.raises(PoolClosedError):
        await handle.circuit_breaker.force_open("late")


GONE = """
import contextlib, sys, time, ray
from raypg import UnavailableError, get_pool
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
pool = get_pool(sys.argv[2])
until, state = time.monotonic() + 20, None
while state is None and time.monotonic() < until:
    with contextlib.suppress(UnavailableError):  # the Breaker has needed more than a second
        state = pool.circuit_breaker.get_status()["state"]
assert state == "closed"
ray.shutdown()
started = time.monotonic()
try:
    pool.circuit_breaker.get_status()
except UnavailableError as error:
    assert "Ray does not run" in str(error)
    assert time.monotonic() - started < 8
    print("told")
"""


def test_the_status_after_ray_was_shut_down(shared: WorkflowConnectionPool) -> None:
    program = [sys.executable, "-c", GONE, ray.get_runtime_context().gcs_address, shared.name]
    done = subprocess.run(program, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("told"), done


# --- by hand ---------------------------------------------------------------------------------------------------------


async def test_forced_open_it_holds_until_lifted_everywhere(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    done = await pool.circuit_breaker.force_open("Database maintenance")
    assert done == {"state": "open", "acknowledged": 2, "unreached": []}
    status = stands(pool)
    assert (status["forced"], status["forced_reason"]) == (True, "Database maintenance")
    assert status["time_until_recovery"] is None
    calls: list[Any] = [
        pool.fetch("select 1"),
        pool.execute("select 1"),
        pool.process({"operation": "execute", "query": "select 1"}),
        pool.process({"operation": "acquire"}),
        pool.acquire()._acquire(),
        pool.transaction().__aenter__(),
    ]
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, CircuitBreakerError), repr(error)
        assert (error.state, error.reason, error.retry_after) == ("open", "Database maintenance", None)
        assert "force_close" in str(error)
    before = {row["pid"] for row in await backends_of(direct, pool.name, control=False)}
    held = time.monotonic()
    await eventually(lambda: time.monotonic() > held + 2.5)  # longer than the recovery timeout
    assert stands(pool)["state"] == "open"
    assert {row["pid"] for row in await backends_of(direct, pool.name, control=False)} <= before

    await pool.circuit_breaker.force_close("Maintenance complete")
    assert await pool.fetchval("select 1") == 1
    [opened, closed] = stands(pool)["state_transitions"][-2:]
    assert (opened["from"], opened["to"], opened["reason"]) == ("closed", "open", "Database maintenance")
    assert (closed["from"], closed["to"], closed["reason"]) == ("open", "closed", "Maintenance complete")
    assert closed["metrics"]["rejected_calls"] >= 0


async def test_forced_open_for_a_time(pool: WorkflowConnectionPool) -> None:
    await pool.circuit_breaker.force_open("an hour", ttl=3600)
    with pytest.raises(CircuitBreakerError) as caught:
        await pool.fetchval("select 1")
    assert caught.value.retry_after is not None
    assert 3500 < caught.value.retry_after <= 3600

    await pool.circuit_breaker.force_open("a moment", ttl=1.5)
    await becomes(pool, "closed")
    *_, opened, closed = stands(pool)["state_transitions"]
    assert (opened["to"], opened["reason"], closed["from"], closed["to"]) == ("open", "a moment", "open", "closed")
    held = datetime.fromisoformat(closed["timestamp"]) - datetime.fromisoformat(opened["timestamp"])
    assert 1.5 <= held.total_seconds() < 6

    async def served() -> bool:  # a worker that has heard of it late holds it as long
        with contextlib.suppress(CircuitBreakerError):
            return bool(await pool.fetchval("select 1") == 1)
        return False

    await eventually(served)


async def test_two_jobs_force_it_at_once(pool: WorkflowConnectionPool) -> None:
    @ray.remote(num_cpus=0)
    def force(pool: WorkflowConnectionPool, reason: str) -> None:
        asyncio.run(pool.circuit_breaker.force_open(reason))

    await asyncio.gather(force.remote(pool, "first"), force.remote(pool, "second"))
    status = stands(pool)
    recorded = [change["reason"] for change in status["state_transitions"] if change["to"] == "open"][-2:]
    assert sorted(recorded) == ["first", "second"]
    assert status["forced_reason"] == recorded[-1]
    with pytest.raises(CircuitBreakerError, match=recorded[-1]):
        await pool.fetchval("select 1")


async def test_what_was_begun_may_be_ended(
    pool: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection
) -> None:
    await direct.execute(f"create table {schema}.kept (id int)")
    async with pool.transaction() as tx:
        await tx.execute(f"insert into {schema}.kept values (1)")
        await pool.circuit_breaker.force_open("maintenance")
        with pytest.raises(CircuitBreakerError):
            await tx.execute(f"insert into {schema}.kept values (2)")
    assert await direct.fetchval(f"select array_agg(id) from {schema}.kept") == [1]


async def test_a_pipeline_tells_it_as_the_error_of_each_result(pool: WorkflowConnectionPool) -> None:
    async with QueryPipelineNode("refused", pool) as pipeline:
        await pool.circuit_breaker.force_open("maintenance")
        for number in range(3):
            await pipeline.add_query("select $1::int", [number])
        results = await pipeline.flush()
        assert [type(result.error) for result in results] == [CircuitBreakerError] * 3
        await pool.circuit_breaker.force_close()
        await pipeline.add_query("select 1", [])
        assert [result.success for result in await pipeline.flush()] == [True]


TROUBLE = "do $$ begin raise exception 'no space left' using errcode = '53100'; end $$"
"""Severity ERROR, the connection lives, and yet it is the server's trouble and not the statement's."""


async def fail(pool: WorkflowConnectionPool, times: int) -> None:
    for _ in range(times):
        with pytest.raises(asyncpg.DiskFullError):
            await pool.execute(TROUBLE)


async def test_force_close_clears_and_goes_on_protecting(ray_cluster: Any, pg: EmbeddedServer) -> None:
    config = CircuitBreakerConfig(failure_threshold=1, recovery_timeout=60)
    async with own_pool(pg, max_connections=2, workers=1, circuit_breaker=config) as pool:
        await _force_close_clears(pool, 1)
        await pool.reconfigure(circuit_breaker_failure_threshold=3)
        await _force_close_clears(pool, 3)


async def _recovers_after(pool: WorkflowConnectionPool, seconds: float) -> None:
    """How long it stays open from now on: for as long as the test looks, or until probes have closed it soon."""
    await pool.reconfigure(circuit_breaker_recovery_timeout=seconds)

    async def known() -> bool:
        return bool((await pool.circuit_breaker.status())["config"]["recovery_timeout"] == seconds)

    await eventually(known, what=f"the breaker of {pool.name} recovers after {seconds:g} s")


async def _force_close_clears(pool: WorkflowConnectionPool, threshold: int) -> None:
    await fail(pool, threshold)
    with pytest.raises(CircuitBreakerError):
        await pool.execute(TROUBLE)
    await pool.circuit_breaker.force_close("checked")
    await fail(pool, threshold)  # exactly as many again
    with pytest.raises(CircuitBreakerError, match="53100"):
        await pool.execute(TROUBLE)
    await pool.circuit_breaker.force_close("checked")

    await _recovers_after(pool, 0.5)
    await fail(pool, threshold)

    async def recovered() -> bool:
        return (await transitions(pool))[-2:] == [("open", "half_open"), ("half_open", "closed")]

    await eventually(recovered, timeout=15)  # by probes, which no caller has to be
    await pool.circuit_breaker.disable("seen enough")
    await _recovers_after(pool, 60)
    await fail(pool, 4 * threshold)
    assert stands(pool)["state"] == "disabled"
    await pool.circuit_breaker.enable()
    await fail(pool, threshold)
    await becomes(pool, "open")  # the Breaker hears of it a moment later than the caller
    await pool.circuit_breaker.reset()
    status = stands(pool)
    assert (status["state"], status["metrics"]["total_calls"]) == ("closed", 0)


async def test_bad_input(pool: WorkflowConnectionPool) -> None:
    for ttl in (0, -1, True, "1", float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="ttl"):
            await pool.circuit_breaker.force_open("x", ttl=ttl)  # type: ignore[arg-type]
    for reason in ("", None, 5):
        with pytest.raises(ConfigError, match="reason"):
            await pool.circuit_breaker.force_open(reason)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="listener"):
        pool.circuit_breaker.add_listener("not a function")  # type: ignore[arg-type]
    assert stands(pool)["state"] == "closed"


# --- what must not move it -------------------------------------------------------------------------------------------


async def test_wrong_sql_never_opens_it(pool: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection) -> None:
    await direct.execute(f"create table {schema}.one (id int primary key); insert into {schema}.one values (1)")
    wrong = [
        ("selec 1", asyncpg.PostgresSyntaxError),
        ("select 1/0", asyncpg.DivisionByZeroError),
        (f"insert into {schema}.one values (1)", asyncpg.UniqueViolationError),
        ("select * from nowhere.nothing", asyncpg.PostgresError),
        ("do $$ begin raise exception 'not really' using errcode = '08006'; end $$", asyncpg.PostgresError),
    ]
    before = stands(pool)["metrics"]["failed_calls"]
    for _ in range(2):
        calls = [pool.execute(wrong[number % len(wrong)][0]) for number in range(1000)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        for number, result in enumerate(results):
            assert isinstance(result, wrong[number % len(wrong)][1]), repr(result)
    status = stands(pool)
    assert status["state"] == "closed"
    assert status["metrics"]["failed_calls"] == before
    assert await pool.fetchval("select 1") == 1


async def test_nor_do_timeouts_cancellations_and_ended_sessions(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    with pytest.raises(raypg.QueryTimeoutError):
        await pool.execute("select pg_sleep(30)", timeout=0.1)
    for _ in range(8):
        with pytest.raises(asyncpg.PostgresError):
            await pool.execute("select pg_sleep(30)", settings={"statement_timeout": "10ms"})
    for _ in range(8):
        await kill_all(direct, pool.name)
        assert await pool.fetchval("select 1") == 1
    status = stands(pool)
    assert status["state"] == "closed"
    assert status["metrics"]["failed_calls"] == 0


# --- listeners -------------------------------------------------------------------------------------------------------


async def test_listeners_hear_every_change_in_order(
    pool: WorkflowConnectionPool, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[tuple[str, str]] = []
    lifted: list[str] = []

    async def asynchronous(old: str, new: str, metrics: dict[str, Any]) -> None:
        assert metrics["total_calls"] >= 0
        heard.append((old, new))
        if new == "open":  # a listener may use the breaker
            lifted.append((await pool.circuit_breaker.force_close("lifted by a listener"))["state"])

    def faulty(old: str, new: str, metrics: dict[str, Any]) -> None:
        raise RuntimeError("a listener of no use")

    await pool.circuit_breaker.add_listener(faulty)
    await pool.circuit_breaker.add_listener(asynchronous)
    with caplog.at_level(logging.ERROR):
        await pool.circuit_breaker.force_open("look")
        await eventually(lambda: len(heard) == 2)
    assert heard == [("closed", "open"), ("open", "closed")]
    assert lifted == ["closed"]
    assert "a listener of no use" in caplog.text
    pool.circuit_breaker.remove_listener(asynchronous)
    pool.circuit_breaker.remove_listener(faulty)
    await pool.circuit_breaker.force_open("unheard", ttl=0.2)
    await becomes(pool, "closed")
    assert len(heard) == 2


# --- health ----------------------------------------------------------------------------------------------------------


async def test_a_connection_of_bad_health_is_replaced_and_nobody_waits_for_it(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection
) -> None:
    config = CircuitBreakerConfig(failure_threshold=100, error_rate=1.0)
    settings = {"max_connections": 2, "workers": 1, "health_threshold": 50, "circuit_breaker": config}
    async with own_pool(pg, **settings) as pool, pool.acquire():  # the other one serves all
        first = await pool.fetchval("select pg_backend_pid()")
        await fail(pool, 4)

        async def score() -> float:
            connections = (await status_of_all(pool))["connections"].values()
            return next((c["health_score"] for c in connections if c["backend_pid"] == first), -1.0)

        assert await score() == 60
        await pool.execute("select 1")
        assert await pool.fetchval("select pg_backend_pid()") == first
        await fail(pool, 2)
        started = time.monotonic()
        assert await pool.fetchval("select pg_backend_pid()") != first
        assert time.monotonic() - started < 8

        async def gone() -> bool:
            return first not in {row["pid"] for row in await backends_of(direct, pool.name)}

        await eventually(gone)


async def test_a_user_s_errors_do_not_move_the_health(pool: WorkflowConnectionPool) -> None:
    for _ in range(30):
        with pytest.raises(asyncpg.DivisionByZeroError):
            await pool.execute("select 1/0")
    connections = (await status_of_all(pool))["connections"].values()
    assert {connection["health_score"] for connection in connections} == {100.0}


async def test_connections_that_were_ended_come_back_without_a_call(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    pids = [row["pid"] for row in await backends_of(direct, pool.name, control=False)]
    await direct.execute("select pg_terminate_backend(pid, 2000) from unnest($1::int[]) pid", pids)

    async def others() -> bool:
        now = {row["pid"] for row in await backends_of(direct, pool.name, control=False)}
        return len(now) >= 2 and not now & set(pids)

    await eventually(others)
