"""LISTEN on a lease: callbacks in the caller's process, in order, none lost in silence."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
import ray
from pgbouncer import PgBouncer
from pools import own_pool, status_of_all, unique_name, worker_pids
from waiting import eventually

from raypg import LeaseLostError, StatementNotAllowedError, WorkflowConnectionPool
from raypg.channel import Channel
from raypg.embedded import EmbeddedServer
from raypg.lease import LeasedConnection
from raypg.server import notifications


class Ear:
    """Notes what it is called with."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, int, str, str]] = []

    def __call__(self, connection: Any, pid: int, channel: str, payload: str) -> None:
        self.told.append((connection, pid, channel, payload))

    @property
    def payloads(self) -> list[str]:
        return [payload for *_, payload in self.told]

    async def heard(self, count: int, timeout: float = 10.0) -> list[str]:
        """The payloads, when there are *count* of them."""
        await eventually(lambda: len(self.told) >= count, timeout, f"{count} notifications, not {len(self.told)}")
        return self.payloads


@pytest.fixture
def channel() -> str:
    """Name of a channel of one's own, which must be quoted."""
    return f'{unique_name()} "Mixed" case'


async def notify(direct: asyncpg.Connection, channel: str, *payloads: str) -> None:
    for payload in payloads:
        await direct.execute("select pg_notify($1, $2)", channel, payload)


# --- what is heard ---------------------------------------------------------------------------------------------------


async def test_plain_and_async_callbacks_are_called_in_the_callers_loop(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, channel: str
) -> None:
    ear, heard = Ear(), []

    async def callback(connection: LeasedConnection, pid: int, channel: str, payload: str) -> None:
        heard.append((asyncio.get_running_loop(), os.getpid(), payload, await connection.fetchval("select 7")))

    async with pool.acquire() as connection:
        await connection.add_listener(channel, ear)
        await connection.add_listener(channel, callback)
        await connection.add_listener(channel, callback)  # once is enough
        await notify(direct, channel, "one", "two")
        await ear.heard(2)
        assert ear.told == [(connection, direct.get_server_pid(), channel, payload) for payload in ("one", "two")]
        await eventually(lambda: len(heard) == 2)
        assert heard == [(asyncio.get_running_loop(), os.getpid(), payload, 7) for payload in ("one", "two")]


async def test_thousands_arrive_in_order_beside_statements(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, channel: str
) -> None:
    ear = Ear()
    async with pool.acquire() as connection:
        await connection.add_listener(channel, ear)
        await direct.execute(f"select pg_notify($1, g::text) from generate_series(1, {5_000}) g", channel)
        for number in range(50):
            assert await connection.fetchval("select $1::int", number) == number
            await notify(direct, channel, str(5_001 + number))
        assert await ear.heard(5_050) == [str(number) for number in range(1, 5_051)]


async def test_it_is_heard_quickly(pool: WorkflowConnectionPool, direct: asyncpg.Connection, channel: str) -> None:
    ear = Ear()
    took = []
    async with pool.acquire() as connection:
        await connection.add_listener(channel, ear)
        for number in range(20):
            started = time.perf_counter()
            await notify(direct, channel, str(number))
            while len(ear.told) <= number:  # noqa: ASYNC110 - `eventually` looks every 20 ms only
                await asyncio.sleep(0)
            took.append(time.perf_counter() - started)
    print(f"median {sorted(took)[10] * 1000:.1f} ms")
    assert sorted(took)[10] < 0.25


async def test_channels_are_told_apart(pool: WorkflowConnectionPool, direct: asyncpg.Connection, channel: str) -> None:
    one, two = Ear(), Ear()
    async with pool.acquire() as first, pool.acquire() as second:
        await first.add_listener(channel, one)
        await first.add_listener(f"{channel}2", two)
        await second.add_listener(channel, two)
        await notify(direct, channel, "a")
        await notify(direct, f"{channel}2", "b")
        assert await one.heard(1) == ["a"]
        assert sorted(await two.heard(2)) == ["a", "b"]
        assert {told[0] for told in two.told} == {first, second}


async def test_who_notifies_himself_hears_it(pool: WorkflowConnectionPool, channel: str) -> None:
    ear = Ear()
    async with pool.acquire() as connection:
        await connection.add_listener(channel, ear)
        await connection.execute("select pg_notify($1, 'me')", channel)
        await ear.heard(1)
        assert ear.told == [(connection, connection.backend_pid, channel, "me")]


async def test_listen_by_sql_goes_well_with_it(pool: WorkflowConnectionPool, direct: asyncpg.Connection) -> None:
    ear = Ear()
    name = unique_name().replace("-", "_")
    async with pool.acquire() as connection:
        await connection.execute(f"listen {name}")
        await notify(direct, name, "nobody is there to hear it")
        await connection.execute("select 1")
        await connection.add_listener(name, ear)
        await notify(direct, name, "x")
        assert await ear.heard(1) == ["x"]
        await connection.remove_listener(name, ear)
        assert await connection.fetch("select pg_listening_channels()") == []


async def test_inside_a_transaction_it_begins_with_the_commit(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, channel: str
) -> None:
    ear = Ear()
    async with pool.acquire() as connection:
        with pytest.raises(KeyError):  # noqa: PT012
            async with connection.transaction():
                await connection.add_listener(channel, ear)
                raise KeyError
        assert await connection.fetch("select pg_listening_channels()") == []
        async with connection.transaction():
            await connection.add_listener(channel, ear)  # sends LISTEN again, though the callback is known
            await notify(direct, channel, "too early")
        await notify(direct, channel, "x")
        assert await ear.heard(1) == ["x"]


# --- how it ends -----------------------------------------------------------------------------------------------------


async def test_a_removed_listener_hears_nothing(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, channel: str
) -> None:
    one, two = Ear(), Ear()
    async with pool.acquire() as connection:
        await connection.add_listener(channel, one)
        await connection.add_listener(channel, two)
        await connection.remove_listener(channel, print)
        await connection.remove_listener("another", one)
        await connection.remove_listener(channel, one)
        await notify(direct, channel, "x")
        assert await two.heard(1) == ["x"]
        await connection.remove_listener(channel, two)
        assert await connection.fetch("select pg_listening_channels()") == []
        await connection.add_listener(channel, one)  # while the last look for news may still be under way
        await notify(direct, channel, "y")
        assert await one.heard(1) == ["y"]
        assert two.payloads == ["x"]


async def test_after_the_release_nobody_listens(
    single: WorkflowConnectionPool, direct: asyncpg.Connection, channel: str, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = Ear(), Ear()
    async with single.acquire() as connection:
        await connection.add_listener(channel, one)
        backend = connection.backend_pid
    async with single.acquire() as connection:
        assert connection.backend_pid == backend
        assert await connection.fetch("select pg_listening_channels()") == []
        await notify(direct, channel, "x")
        await connection.execute("select 1")
        await connection.add_listener(channel, two)
        await notify(direct, channel, "y")
        assert await two.heard(1) == ["y"]
    assert one.told == []
    await connection.remove_listener(channel, two)
    with pytest.raises(LeaseLostError):
        await connection.add_listener(channel, two)
    assert not [record for record in caplog.records if record.name == "raypg.listening"]


async def test_a_forgotten_lease_is_not_kept_by_its_listener(single: WorkflowConnectionPool, channel: str) -> None:
    connection = await single.acquire()

    def callback(*_: object, itself: Any = connection) -> None:
        """Holds what it listens on."""

    await connection.add_listener(channel, callback)
    del connection, callback
    gc.collect()
    async with single.acquire(timeout=5):
        pass


@pytest.mark.parametrize("end", ["deadline", "backend"])
async def test_a_lost_lease_is_loud(
    pair: WorkflowConnectionPool,
    direct: asyncpg.Connection,
    channel: str,
    caplog: pytest.LogCaptureFixture,
    end: str,
) -> None:
    connection = await pair.acquire(lease_timeout=3.0 if end == "deadline" else None)
    await connection.add_listener(channel, Ear())
    if end == "backend":
        await direct.fetchval("select pg_terminate_backend($1, 5000)", connection.backend_pid)
    await missed(connection, channel, caplog, "deadline of 3 s" if end == "deadline" else "terminated")


async def test_so_is_one_whose_worker_died(
    ray_cluster: Any, pg: EmbeddedServer, channel: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with own_pool(pg, max_connections=2) as pool:
        connection = await pool.acquire()
        await connection.add_listener(channel, Ear())
        ray.kill((await pool._dispatcher())._channels[0].handle, no_restart=False)
        await missed(connection, channel, caplog, "worker died")


async def missed(connection: LeasedConnection, channel: str, caplog: pytest.LogCaptureFixture, why: str) -> None:
    """Wait until it is said that *connection* is lost, and why."""
    await eventually(lambda: "notifications are missed" in caplog.text, 20)
    assert repr(channel) in caplog.text
    assert why in caplog.text
    with pytest.raises(LeaseLostError):
        await connection.execute("select 1")
    await connection.release()


async def test_a_callback_that_raises_is_logged_and_does_no_harm(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, channel: str, caplog: pytest.LogCaptureFixture
) -> None:
    ear = Ear()

    def bad(*_: object) -> None:
        raise KeyError("plain")

    async def worse(*_: object) -> None:
        raise KeyError("async")

    async with pool.acquire() as connection:
        for callback in (bad, worse, ear):
            await connection.add_listener(channel, callback)
        await notify(direct, channel, "one", "two")
        assert await ear.heard(2) == ["one", "two"]
        await eventually(lambda: caplog.text.count("KeyError: 'async'") == 2)
        assert caplog.text.count("KeyError: 'plain'") == 2
        assert await connection.fetchval("select 1") == 1


async def test_what_nobody_takes_ends_the_lease_and_not_the_worker(
    ray_cluster: Any,
    pg: EmbeddedServer,
    direct: asyncpg.Connection,
    channel: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = asyncio.Event()
    ask = Channel.ask

    async def late(self: Channel, method: str, *arguments: Any) -> Any:
        if method == "lease_heard":
            await taken.wait()
        return await ask(self, method, *arguments)

    monkeypatch.setattr(Channel, "ask", late)
    async with own_pool(pg, max_connections=2) as pool:
        (worker,) = (await worker_pids(pool.name)).values()
        connection = await pool.acquire()
        await connection.add_listener(channel, Ear())

        async def ended() -> bool:
            status = await status_of_all(pool)
            return all(one["lease"] is None for one in status["connections"].values())

        # The server takes the same payload twice in a transaction for one notification.
        burst = "select pg_notify($1, g || repeat('x', 7500)) from generate_series(1, 1000) g"
        for _ in range(notifications.MOST_BYTES // 7_500_000):
            await direct.execute(burst, channel)
        assert not await ended()
        await direct.execute(burst, channel)
        await eventually(ended, timeout=60)
        taken.set()
        await eventually(lambda: "notifications are missed" in caplog.text)
        with pytest.raises(LeaseLostError, match="waited for its holder"):
            await connection.fetchval("select 1")
        assert await pool.fetchval("select 1") == 1
        assert list((await worker_pids(pool.name)).values()) == [worker]
        async with pool.acquire(timeout=5), pool.acquire(timeout=5):
            pass


# --- what is refused -------------------------------------------------------------------------------------------------


async def test_what_is_no_channel_and_no_callback(pool: WorkflowConnectionPool) -> None:
    async with pool.acquire() as connection:
        for channel in ("", None, 5, "a\0b"):
            with pytest.raises(asyncpg.InterfaceError, match="channel"):
                await connection.add_listener(channel, print)  # type: ignore[arg-type]
        with pytest.raises(asyncpg.InterfaceError, match="callable"):
            await connection.add_listener("a", "b")  # type: ignore[arg-type]
        with pytest.raises(asyncpg.InvalidParameterValueError):
            await connection.fetch("select pg_notify('', 'x')")
        assert await connection.fetch("select pg_listening_channels()") == []


@pytest.fixture(scope="module")
def bouncer(pg18: EmbeddedServer) -> Iterator[PgBouncer]:
    with PgBouncer(pg18, "transaction", size=2) as running:
        yield running


async def test_behind_a_transaction_pooler(ray_cluster: Any, bouncer: PgBouncer, channel: str) -> None:
    handle = WorkflowConnectionPool(name=unique_name(), **bouncer.parameters, max_connections=2)
    async with handle as pool, pool.transaction() as tx:
        with pytest.raises(StatementNotAllowedError, match="LISTEN cannot be used behind a transaction pooler"):
            await tx.add_listener(channel, print)
        numbers = [row["n"] async for row in tx.cursor("select generate_series(1, 9) as n", prefetch=4)]
        assert numbers == list(range(1, 10))
        statement = await tx.prepare("select $1::int")
        assert await statement.fetchval(5) == 5
