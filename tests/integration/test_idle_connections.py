"""What becomes of connections that nobody uses: they are pinged, and go on serving."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest
from waiting import eventually

from raypg.actors.worker import PoolWorker
from raypg.config import from_kwargs
from raypg.embedded import EmbeddedServer
from raypg.server import connection_set
from raypg.server.connection import ServerConnection


@pytest.fixture
async def worker(pg: EmbeddedServer) -> AsyncIterator[PoolWorker]:
    """A worker, without Ray around it, with four connections, that pings in every round of maintenance."""
    config = from_kwargs(name="p", environ={}, **pg.parameters, health_check_interval=0.1)
    worker = PoolWorker("p", 0, "cluster", config.to_dict())
    await worker.ping(1, 4, 0, [], 1)  # as the Pool does: any that are to be kept would open beside warm_up's
    assert await worker.warm_up(4) == ("ok", None)
    await worker.ping(1, 4, 2, [], 1)
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
