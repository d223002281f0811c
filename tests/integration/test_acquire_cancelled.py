"""Callers that stop waiting for a lease: they leave the queue at once, and nothing that they were granted is lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from pools import grant, lasting_pool, status_of_all
from waiting import eventually

from raypg import LeaseLostError, PoolExhaustedError, WorkflowConnectionPool
from raypg.actors.worker import PoolWorker
from raypg.config import from_kwargs
from raypg.embedded import EmbeddedServer
from raypg.packing import pack, unpack


@pytest.fixture(scope="module")
def three(ray_cluster: Any, pg18: EmbeddedServer) -> Iterator[WorkflowConnectionPool]:
    """A pool of three connections, for which callers wait longer than any of these tests may take. Each test gives back
    what it has."""
    yield from lasting_pool(pg18, max_connections=3, acquire_timeout=600.0)


async def status(pool: WorkflowConnectionPool) -> tuple[int, int]:
    """(callers that wait, leases)."""
    told = await status_of_all(pool)
    return told["waiting_count"], sum(one["lease"] is not None for one in told["connections"].values())


async def cancelled(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*tasks, return_exceptions=True))


async def test_who_stops_waiting_leaves_the_queue_at_once(three: WorkflowConnectionPool) -> None:
    held = [await three.acquire() for _ in range(3)]

    async def use() -> None:
        async with three.acquire():
            raise AssertionError("it was to wait")

    async def transact() -> None:
        async with three.transaction():
            raise AssertionError("it was to wait")

    leaving = [asyncio.create_task(transact() if number % 2 else use()) for number in range(200)]

    async def all_wait() -> bool:
        return await status(three) == (200, 3)

    await eventually(all_wait, timeout=60)
    living = asyncio.create_task(three.acquire()._acquire())

    async def it_waits() -> bool:
        return await status(three) == (201, 3)

    await eventually(it_waits, timeout=60)
    await cancelled(leaving)

    async def only_the_living_waits() -> bool:
        return await status(three) == (1, 3)

    # As soon as the messages are there, all leases still being held. Left alone, they would wait for ten minutes.
    await eventually(only_the_living_waits, timeout=60)
    backend = held[0].backend_pid
    await held[0].release()
    served = await asyncio.wait_for(living, 30)
    assert served.backend_pid == backend
    for connection in (*held, served):
        await connection.release()

    async def quiet() -> bool:
        return await status(three) == (0, 0)

    await eventually(quiet, timeout=60)


async def test_a_timeout_around_it_is_such_a_leaving(three: WorkflowConnectionPool) -> None:
    held = [await three.acquire() for _ in range(3)]
    for _ in range(5):
        with pytest.raises(TimeoutError) as caught:
            await asyncio.wait_for(three.acquire()._acquire(), 0.02)
        assert not isinstance(caught.value, PoolExhaustedError)

    async def nobody_waits() -> bool:
        return await status(three) == (0, 3)

    await eventually(nobody_waits, timeout=60)
    for connection in held:
        await connection.release()


async def test_at_any_moment(three: WorkflowConnectionPool, rng: random.Random) -> None:
    """Cancelled before it is sent, on its way, in the queue, when granted: afterwards all is there."""
    counts = {"left": 0, "served": 0}

    async def caller(patience: float | None) -> None:
        try:
            async with asyncio.timeout(patience):
                async with three.acquire() as connection:
                    assert await connection.fetchval("select pg_backend_pid()") == connection.backend_pid
            counts["served"] += 1
        except TimeoutError:
            counts["left"] += 1

    for _ in range(10):
        await asyncio.gather(*(caller(rng.choice([None, rng.uniform(0, 0.1)])) for _ in range(60)))
    print(counts)
    assert min(counts.values()) > 20

    async def quiet() -> bool:
        return await status(three) == (0, 0)

    await eventually(quiet, timeout=60)
    held = [await three.acquire(timeout=30) for _ in range(3)]
    assert len({connection.backend_pid for connection in held}) == 3
    for connection in held:
        await connection.release()


def test_the_loop_of_the_caller_may_end_with_it(three: WorkflowConnectionPool) -> None:
    """asyncio.run cancels what is left and is gone: nobody is there any more to send a lease back."""

    async def leave() -> None:
        held = [await three.acquire() for _ in range(3)]
        waiting = [asyncio.create_task(three.acquire()._acquire()) for _ in range(10)]
        await asyncio.sleep(0.05)
        for connection in held:
            await connection.release()
        for task in waiting:
            task.cancel()

    for _ in range(5):
        asyncio.run(leave())

    async def look() -> None:
        async def quiet() -> bool:
            return await status(three) == (0, 0)

        await eventually(quiet, timeout=60)

    asyncio.run(look())


# --- in whatever order the messages come: the worker itself, without Ray between ---


@pytest.fixture
async def worker(pg: EmbeddedServer) -> AsyncIterator[PoolWorker]:
    """A worker of two connections."""
    config = from_kwargs(name="p", environ={}, **pg.parameters, acquire_timeout=5.0)
    worker = PoolWorker("p", 0, "cluster", config.to_dict())
    await grant(worker, 2)
    yield worker
    await worker.close("the test is over")


def acquire(worker: PoolWorker, number: int, begin: str | None = None) -> asyncio.Task[Any]:
    message = pack((("client", number), "job", {"client": "client"}, 5.0, 60.0, begin))
    return asyncio.ensure_future(worker.acquire(message))


async def leases(worker: PoolWorker) -> tuple[int, int]:
    told = await worker.status()
    return told["waiting"], sum(one["lease"] is not None for one in told["connections"].values())


@pytest.mark.parametrize("begin", [None, "BEGIN"])
async def test_the_leaving_may_come_before_the_request(worker: PoolWorker, begin: str | None) -> None:
    await worker.cancel_acquire(("client", 1))
    kind, error = unpack(await acquire(worker, 1, begin))
    assert kind == "error"
    assert error[1] == "TimeoutError"
    assert await leases(worker) == (0, 0)
    kind, granted = unpack(await acquire(worker, 2, begin))
    assert kind == "ok"
    await worker.release(pack((granted["token"], None)))


@pytest.mark.parametrize("begin", [None, "BEGIN"])
async def test_it_may_come_after_the_grant(worker: PoolWorker, begin: str | None) -> None:
    kind, granted = unpack(await acquire(worker, 1, begin))
    assert kind == "ok"
    assert await leases(worker) == (0, 1)
    await worker.cancel_acquire(("client", 1))
    assert await leases(worker) == (0, 0)
    answer = unpack(await worker.lease_run(pack((granted["token"], 1, 0, "select 1", (), None))))
    assert (answer[0], answer[1][1]) == ("error", LeaseLostError.__name__)


@pytest.mark.parametrize("begin", [None, "BEGIN"])
@pytest.mark.parametrize("steps", range(12))
async def test_it_may_come_at_any_step_of_the_worker(worker: PoolWorker, begin: str | None, steps: int) -> None:
    request = acquire(worker, 1, begin)
    for _ in range(steps):
        await asyncio.sleep(0)
    await worker.cancel_acquire(("client", 1))
    await request
    await eventually(lambda: not worker._engine.queue and not len(worker._engine.leases))
    connections = [unpack(await acquire(worker, number))[1] for number in (2, 3)]
    assert len({granted["backend_pid"] for granted in connections}) == 2


async def test_a_dead_client_waits_no_more(worker: PoolWorker) -> None:
    held = [await acquire(worker, number) for number in (1, 2)]
    waiting = acquire(worker, 3)
    await asyncio.sleep(0)
    assert await leases(worker) == (1, 2)
    await worker.leave("client")
    kind, _ = unpack(await asyncio.wait_for(waiting, 1))
    assert kind == "error"
    assert len(held) == 2
    assert await leases(worker) == (0, 0)
