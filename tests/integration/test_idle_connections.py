"""What a worker does with connections beside using them: it opens them, pings those that are idle, replaces them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import asyncpg
import pytest
from pools import NO_BREAKER, grant, unique_name
from proxy import Proxy
from waiting import eventually

from raypg import ConnectError, PoolExhaustedError
from raypg.actors.worker import PoolWorker
from raypg.config import from_kwargs
from raypg.embedded import EmbeddedServer
from raypg.packing import pack, unpack
from raypg.server import codecs, connection_set
from raypg.server.connect import Connector
from raypg.server.connection import ServerConnection


@pytest.fixture
async def worker(pg: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PoolWorker]:
    """A worker, without Ray around it, with four connections, that pings in every round of maintenance; a server that
    is held up has time to answer."""
    monkeypatch.setattr(connection_set, "PING_TIMEOUT", 30.0)
    config = from_kwargs(name="p", environ={}, **pg.parameters, health_check_interval=0.1)
    worker = PoolWorker("p", 0, "cluster", config.to_dict())
    await grant(worker, 4)  # as the Pool does: any that are to be kept would open beside warm_up's
    assert await worker.warm_up(4) == ("ok", None)
    await grant(worker, 4, least=2)
    assert worker._engine.connections.total == worker._engine.connections.idle == 4
    yield worker
    await worker.close("the test is over")


async def test_they_are_pinged_and_stay(worker: PoolWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[bool] = []
    ping = ServerConnection.ping

    async def noted(self: ServerConnection, timeout: float) -> bool:
        answers.append(await ping(self, timeout))
        return answers[-1]

    monkeypatch.setattr(ServerConnection, "ping", noted)
    before = set((await worker.status())["connections"])
    await eventually(lambda: len(answers) >= 8)
    assert all(answers)
    status = await worker.status()
    assert set(status["connections"]) == before
    await eventually(lambda: worker._engine.connections.idle == 4)


async def test_one_that_does_not_answer_is_replaced(worker: PoolWorker, direct: asyncpg.Connection) -> None:
    pids = [connection.pid for connection in worker._engine.connections]
    await direct.fetchval("select pg_terminate_backend($1, 5000)", pids[0])
    await eventually(lambda: pids[0] not in [connection.pid for connection in worker._engine.connections])
    await eventually(lambda: worker._engine.connections.idle == worker._engine.connections.total == 3)


async def test_a_fault_in_a_ping_leaves_no_connection_in_nobodys_hands(
    worker: PoolWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def faulty(self: ServerConnection, timeout: float) -> bool:
        raise AttributeError("a fault of ours")

    monkeypatch.setattr(ServerConnection, "ping", faulty)
    connections: connection_set.ConnectionSet = worker._engine.connections
    await eventually(lambda: connections.total < 4)
    assert connections.total == connections.idle


async def test_who_waits_is_told_in_time_while_a_ping_gets_no_answer(
    pg: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_set, "PING_TIMEOUT", 30.0)
    async with Proxy(pg.port) as proxy:
        settings = {**pg.parameters, "port": proxy.port, "sslmode": "disable", "health_check_interval": 0.1}
        worker = PoolWorker("p", 0, "cluster", from_kwargs(name="p", environ={}, **settings).to_dict())
        await grant(worker, 2)
        assert await worker.warm_up(2) == ("ok", None)
        kind, _ = unpack(await worker.acquire(pack((("client", 1), "job", {"client": "client"}, 5.0, 60.0, None))))
        assert kind == "ok"
        proxy.frozen = True
        connections = worker._engine.connections
        await eventually(lambda: connections.idle == 0, what="the other one is being pinged")
        started = time.monotonic()
        asked = worker.acquire(pack((("client", 2), "job", {"client": "client"}, 0.2, 60.0, None)))
        kind, error = unpack(await asyncio.wait_for(asked, 20))
        assert (kind, error[1]) == ("error", PoolExhaustedError.__name__)
        assert time.monotonic() - started < 8
        proxy.mend()
        await worker.close("the test is over")


@pytest.mark.parametrize("how", ["connect_timeout", "cancelled"])
async def test_a_connection_that_gets_stuck_while_it_is_opened_is_closed(
    pg: EmbeddedServer, direct: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    config = from_kwargs(name="p", environ={}, **pg.parameters, connect_timeout=5.0 if how == "connect_timeout" else 60)
    connector = Connector(config, unique_name("stuck"))
    stuck = asyncio.Event()

    async def no_answer(raw: asyncpg.Connection, _: object) -> None:
        stuck.set()
        await raw.execute("select pg_sleep(60)")

    async def backends() -> int:
        count = "select count(*) from pg_stat_activity where application_name = $1"
        return int(await direct.fetchval(count, connector.application_name))

    monkeypatch.setattr(codecs, "install", no_answer)
    opening = asyncio.create_task(connector.open())
    reached = asyncio.create_task(stuck.wait())
    await asyncio.wait({opening, reached}, return_when=asyncio.FIRST_COMPLETED)
    assert reached.done()
    assert await backends() == 1
    if how == "cancelled":
        opening.cancel()
    with pytest.raises(ConnectError if how == "connect_timeout" else asyncio.CancelledError):
        await asyncio.wait_for(opening, 20)

    async def gone() -> bool:
        return await backends() == 0

    await eventually(gone)


async def test_it_connects_again_ever_more_seldom(pg: EmbeddedServer) -> None:
    """Though no breaker stands before it, and nobody waits."""
    async with Proxy(pg.port) as proxy:
        settings = {**pg.parameters, "port": proxy.port, "sslmode": "disable", **NO_BREAKER}
        worker = PoolWorker("p", 0, "cluster", from_kwargs(name="p", environ={}, **settings).to_dict())
        await grant(worker, 2, least=2)
        await eventually(lambda: worker._engine.connections.idle == 2)
        proxy.cut()
        before, began = proxy.accepted, time.monotonic()
        await eventually(lambda: proxy.accepted >= before + 3 and time.monotonic() > began + 2.0, 30)
        tries, seconds = proxy.accepted - before, time.monotonic() - began
        print(f"{tries} tries in {seconds:.1f} s")
        assert tries <= 6 * seconds  # after up to 0.05 s, 0.1 s, 0.2 s …; at every look it would be 20 a second
        proxy.mend()
        await eventually(lambda: worker._engine.connections.idle == 2)
        await worker.close("the test is over")
