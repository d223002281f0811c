"""``ray.cancel`` of a task that uses a pool: it ends what that task runs, and nothing of anybody else."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Coroutine
from typing import Any

import asyncpg
import pytest
import ray
from pools import running
from waiting import eventually

import raypg
from raypg import WorkflowConnectionPool

HELD = "select count(*) from pg_stat_activity where state = 'idle in transaction' and query like $1"


class Asking:
    """An async actor whose tasks share one line to each worker."""

    async def ask(self, pool: str, query: str) -> Any:
        return await raypg.get_pool(pool).fetchval(query, timeout=30)

    async def hold(self, pool: str, query: str) -> None:
        async with raypg.get_pool(pool).acquire() as connection, connection.transaction():
            await connection.fetchval(query)
            await asyncio.sleep(60)


def hear_cancellations() -> None:
    """``ray.cancel`` interrupts a plain task by what SIGINT does, which is nothing in what was started in the
    background of a shell, and in all that inherits it from there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@ray.remote(num_cpus=0)
def ask_in_task(method: str, pool: str, query: str) -> Any:
    """Runs an event loop in the task's own thread."""
    hear_cancellations()
    work: Coroutine[Any, Any, Any] = getattr(Asking(), method)(pool, query)
    return asyncio.run(work)


@ray.remote(num_cpus=0)
def ask_sync(pool: str, query: str) -> Any:
    hear_cancellations()
    return raypg.get_pool(pool).sync.fetchval(query, timeout=30)


def mark() -> str:
    return f"raypg_{time.monotonic_ns()}"


async def is_held(direct: asyncpg.Connection, name: str, expected: bool) -> bool:
    return await direct.fetchval(HELD, f"%{name}%") == expected


async def runs(direct: asyncpg.Connection, name: str, expected: bool) -> bool:
    return await running(direct, name) == expected


@pytest.fixture(scope="module")
def asking(pool: WorkflowConnectionPool) -> Any:
    actor = ray.remote(Asking).options(num_cpus=0, max_concurrency=100).remote()
    yield actor
    ray.kill(actor)


async def test_in_an_async_actor_one_task_is_cancelled_and_no_other(
    asking: Any, pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    for _ in range(5):
        name, other = mark(), mark()
        # The first one's task is the one in which all that follows it in the same message is sent.
        cancelled = asking.ask.remote(pool.name, f"select pg_sleep(25) as {name}")
        others = [asking.ask.remote(pool.name, f"select {n} from pg_sleep(0.5) as {other}") for n in range(20)]
        await eventually(lambda name=name: runs(direct, name, True))
        ray.cancel(cancelled)
        assert await asyncio.to_thread(ray.get, others, timeout=30) == list(range(20))
        await eventually(lambda name=name: runs(direct, name, False))


async def test_a_lease_held_by_a_cancelled_task_comes_back(
    asking: Any, pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    for hold in (asking.hold.remote, lambda *args: ask_in_task.remote("hold", *args)):
        name = mark()
        reference = hold(pool.name, f"select 1 as {name}")
        await eventually(lambda name=name: is_held(direct, name, True), timeout=30)
        ray.cancel(reference)
        await eventually(lambda name=name: is_held(direct, name, False))


async def test_the_statement_of_a_cancelled_plain_task_is_cancelled(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    for ask in (lambda *args: ask_in_task.remote("ask", *args), ask_sync.remote):
        name = mark()
        reference = ask(pool.name, f"select pg_sleep(25) as {name}")
        await eventually(lambda name=name: runs(direct, name, True), timeout=30)
        ray.cancel(reference)
        await eventually(lambda name=name: runs(direct, name, False))
        with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.RayTaskError)):
            await asyncio.to_thread(ray.get, reference, timeout=20)
