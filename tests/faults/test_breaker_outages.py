"""The server goes away in every way that there is: the breaker opens, callers fail fast, and all is well again soon."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
from breakers import becomes, callers, closes
from pgserver import main_server
from pools import backends_of, lasting_pool, own_pool, worker_pids
from proxy import Proxy
from waiting import eventually

from raypg import CircuitBreakerError, ConnectError, UnavailableError, WorkflowConnectionPool
from raypg.embedded import EmbeddedServer

RECOVERY = 1.0
SOON = 5.0
"""Seconds: what is at once, on a machine that stands still for some of them now and then. What is not refused would
wait for 30. benchmarks/bench_breaker.py measures it."""

THRESHOLD = 5
CAP = 6
SLOTS = 20
UNPROBED = 60.0
"""Seconds from open to the first probe where there is to be none within the test."""

SETTINGS: dict[str, Any] = {
    "max_connections": CAP,
    "workers": 1,
    "connect_timeout": 2.0,
    "circuit_breaker_failure_threshold": THRESHOLD,
    "circuit_breaker_ramp": 1.0,
}


@pytest.fixture(scope="module")
def victim() -> Iterator[EmbeddedServer]:
    """A server for these tests alone, with few slots, that they stop and start."""
    with main_server({"max_connections": str(SLOTS), "superuser_reserved_connections": "0"}) as server:
        yield server


@pytest.fixture(scope="module")
def shared(ray_cluster: Any, victim: EmbeddedServer) -> Iterator[WorkflowConnectionPool]:
    yield from lasting_pool(victim, **SETTINGS, circuit_breaker_recovery_timeout=RECOVERY)


@pytest.fixture
async def pool(shared: WorkflowConnectionPool, victim: EmbeddedServer) -> AsyncIterator[WorkflowConnectionPool]:
    """A pool of one worker on a server that may be harmed."""
    await shared.circuit_breaker.reset()
    yield shared
    if not victim.running:
        await asyncio.to_thread(victim.start)
    await becomes(shared, "closed")


async def stop(server: EmbeddedServer, how: str) -> None:
    if how == "kill":
        await asyncio.to_thread(server.kill)
    else:
        await asyncio.to_thread(server.stop, how)  # type: ignore[arg-type]


# --- the whole server ------------------------------------------------------------------------------------------------


@pytest.fixture
async def unprobed(ray_cluster: Any, victim: EmbeddedServer) -> AsyncIterator[WorkflowConnectionPool]:
    """A pool of one worker whose breaker stays open, with the figures of its opening: a failed probe changes them."""
    settings = {**SETTINGS, "circuit_breaker_recovery_timeout": UNPROBED}
    async with own_pool(victim, **settings) as pool:
        yield pool
        await asyncio.to_thread(victim.start)


async def test_it_opens_after_exactly_the_configured_count_and_says_why(
    unprobed: WorkflowConnectionPool, victim: EmbeddedServer
) -> None:
    """One caller after the other: each failure is one, and the next caller is refused."""
    pool = unprobed
    assert await pool.fetchval("select 1") == 1
    await stop(victim, "kill")
    errors: list[Exception] = []
    while not errors or not isinstance(errors[-1], CircuitBreakerError):
        try:
            await pool.fetchval("select 1")
        except Exception as error:
            errors.append(error)
    assert all(isinstance(error, UnavailableError) for error in errors)
    assert len(errors) - 1 <= THRESHOLD  # some connects fail while nobody calls
    await becomes(pool, "open")  # the Breaker hears of it a moment later than the caller
    status = pool.circuit_breaker.get_status()
    assert status["metrics"]["consecutive_failures"] == THRESHOLD
    [change] = [change for change in status["state_transitions"] if change["to"] == "open"][-1:]
    assert change["metrics"]["consecutive_failures"] == THRESHOLD
    assert f"{THRESHOLD} failures in a row" in change["reason"]
    assert "refused" in change["reason"]

    refused = errors[-1]
    assert isinstance(refused, CircuitBreakerError)
    assert (refused.pool, refused.state, refused.isolated) == (pool.name, "open", False)
    assert refused.reason == change["reason"]
    assert refused.retry_after is not None
    assert 0 < refused.retry_after <= 1.1 * UNPROBED + 2  # a tenth by chance; the worker waits for the Breaker's word


@pytest.mark.parametrize("how", ["kill", "immediate", "fast"])
async def test_the_server_dies_under_load_and_comes_back(
    pool: WorkflowConnectionPool, victim: EmbeddedServer, how: str
) -> None:
    async with callers(pool, 100) as calls:
        await eventually(lambda: len(calls) > 300)
        await stop(victim, how)
        await becomes(pool, "open")
        opened = time.monotonic()
        await eventually(lambda: len([1 for begun, _, _ in calls if begun > opened]) > 300)
    back = await closes(pool, victim)
    assert await asyncio.gather(*(pool.fetchval("select 1") for _ in range(100))) == [1] * 100
    refused = sorted(end - begun for begun, end, error in calls if isinstance(error, CircuitBreakerError))
    print(f"{how}: refused p99 {refused[len(refused) * 99 // 100] * 1000:.1f} ms; closed {back:.2f} s after the server")
    assert refused[len(refused) * 99 // 100] < SOON
    allowed = UnavailableError  # reads only: nothing is unknown
    assert all(error is None or isinstance(error, allowed) for _, _, error in calls)


async def test_connections_are_its_business_though_nobody_calls(
    pool: WorkflowConnectionPool, victim: EmbeddedServer
) -> None:
    heard: list[tuple[str, str]] = []

    def listener(old: str, new: str, _: Any) -> None:
        heard.append((old, new))

    await pool.circuit_breaker.add_listener(listener)
    await stop(victim, "fast")
    await becomes(pool, "open")
    await eventually(lambda: heard)
    assert heard[0] == ("closed", "open")
    pool.circuit_breaker.remove_listener(listener)
    await closes(pool, victim)
    direct = await asyncpg.connect(**victim.parameters)

    async def warm() -> bool:
        return len(await backends_of(direct, pool.name, control=False)) >= 2

    await eventually(warm)  # min_connections, without a call
    await direct.close()


async def opened_for(pool: WorkflowConnectionPool, reason: str) -> bool:
    """Whether the breaker of *pool* says *reason*: while it probes it has another one."""
    return reason in (await pool.circuit_breaker.status())["reason"]


async def _take(server: EmbeddedServer, taken: list[asyncpg.Connection]) -> bool:
    """Take one more slot of *server*; False if none is left."""
    try:
        taken.append(await asyncpg.connect(**server.parameters))
    except asyncpg.TooManyConnectionsError:
        return False
    return True


async def test_the_server_has_no_slot_left(pool: WorkflowConnectionPool, victim: EmbeddedServer) -> None:
    """Others have taken all of them: a pool that has connections goes on, one that must connect opens its breaker."""
    taken: list[asyncpg.Connection] = []
    try:
        while await _take(victim, taken):
            pass
        assert [await pool.fetchval("select 1") for _ in range(20)] == [1] * 20
        pids = [row["pid"] for row in await backends_of(taken[0], pool.name, control=False)]
        (worker,) = (await worker_pids(pool.name)).values()
        os.kill(worker, signal.SIGSTOP)  # so that others are the first to take what is free then
        try:
            await taken[0].execute("select pg_terminate_backend(pid, 5000) from unnest($1::int[]) pid", pids)
            while await _take(victim, taken):
                pass
        finally:
            os.kill(worker, signal.SIGCONT)
        await becomes(pool, "open", timeout=20)
        await eventually(lambda: opened_for(pool, "53300"))
        with pytest.raises(CircuitBreakerError):
            await pool.fetchval("select 1")
    finally:
        for connection in taken:
            await connection.close()
    await becomes(pool, "closed")
    assert await pool.fetchval("select 1") == 1


async def test_the_password_is_changed(ray_cluster: Any, victim: EmbeddedServer) -> None:
    direct = await asyncpg.connect(**victim.parameters)
    await direct.execute("create role app login password 'old'")
    settings = {"user": "app", "password": "old", "circuit_breaker_recovery_timeout": RECOVERY, "workers": 1}
    async with own_pool(victim, max_connections=2, **settings) as pool:
        await direct.execute("alter role app password 'new'")
        await direct.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = 'app'")
        await becomes(pool, "open")
        await eventually(lambda: opened_for(pool, "28P01"))

        async def refused() -> bool:
            with pytest.raises(CircuitBreakerError) as caught:
                await pool.execute("select 1")
            return "28P01" in str(caught.value)

        await eventually(refused)
        await direct.execute("alter role app password 'old'")
        await becomes(pool, "closed")
        assert await pool.fetchval("select 1") == 1
    await direct.execute("drop role app")
    await direct.close()


# --- the way to it ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def proxied(ray_cluster: Any, pg: EmbeddedServer) -> AsyncIterator[tuple[WorkflowConnectionPool, Proxy]]:
    """A pool whose way to the server may be cut."""
    async with Proxy(pg.port) as proxy:
        settings = {
            "port": proxy.port,
            "sslmode": "disable",
            "max_connections": CAP,
            "workers": 1,
            "connect_timeout": 3.0,
            "health_check_interval": 0.5,
            "circuit_breaker_failure_threshold": 3,
            "circuit_breaker_recovery_timeout": RECOVERY,
            "circuit_breaker_ramp": 1.0,
        }
        async with own_pool(pg, **settings) as pool:
            yield pool, proxy


async def test_while_open_nobody_connects_but_to_probe(proxied: tuple[WorkflowConnectionPool, Proxy]) -> None:
    pool, proxy = proxied
    async with callers(pool, 50) as calls:
        await eventually(lambda: len(calls) > 100)
        proxy.cut()
        await becomes(pool, "open")
        until = time.monotonic() + 3 * RECOVERY
        before = proxy.accepted

        async def probed() -> bool:
            return time.monotonic() > until

        await eventually(probed)
        probes = (await pool.circuit_breaker.status())["state_transitions"]
        print(f"{proxy.accepted - before} connects in {3 * RECOVERY:g} s")
        # One for each time that it was half open, and control's own look at the server.
        assert 1 <= proxy.accepted - before <= 8
        assert {"half_open"} <= {change["to"] for change in probes}
        proxy.mend()
        before = proxy.accepted
        await becomes(pool, "closed")
        closed = time.monotonic()
        await eventually(lambda: time.monotonic() > closed + 1.0)
        print(f"{proxy.accepted - before} connects within 1 s of closing")
        assert proxy.accepted - before <= 1.2 * CAP
    assert any(error is None for begun, _, error in calls if begun > closed)


async def test_a_black_hole(proxied: tuple[WorkflowConnectionPool, Proxy]) -> None:
    """Nothing comes back, not even a refusal: found out by time limits, of callers and of pings."""
    pool, proxy = proxied
    assert await pool.fetchval("select 1") == 1
    proxy.frozen = True
    await becomes(pool, "open", timeout=30)
    started = time.monotonic()
    with pytest.raises(CircuitBreakerError):
        await pool.fetchval("select 1")
    assert time.monotonic() - started < SOON
    proxy.mend()
    await becomes(pool, "closed")
    assert await pool.fetchval("select 1") == 1


async def test_a_connect_error_is_told_as_such_until_it_opens(proxied: tuple[WorkflowConnectionPool, Proxy]) -> None:
    pool, proxy = proxied
    proxy.cut()
    kinds = []
    for _ in range(20):
        try:
            await pool.fetchval("select 1")
        except UnavailableError as error:
            kinds.append(type(error))
    assert kinds[-1] is CircuitBreakerError
    assert ConnectError in kinds or CircuitBreakerError is kinds[0]
    proxy.mend()
    await becomes(pool, "closed")
