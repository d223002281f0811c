"""Who holds a lease, as `get_status` and `raypg status` tell it: driver, task, actor, Serve replica."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import ray
from pools import own_pool, status_of_all, unique_name
from ray import serve
from rich.console import Console
from waiting import eventually

from raypg import WorkflowConnectionPool, cli_pools
from raypg.embedded import EmbeddedServer


@pytest.fixture
async def pool(ray_cluster: Any, pg: EmbeddedServer) -> AsyncIterator[WorkflowConnectionPool]:
    """A pool in which nobody else holds anything."""
    async with own_pool(pg, max_connections=3) as own:
        yield own


async def owner(pool: WorkflowConnectionPool, backend: int) -> dict[str, Any]:
    """The one who holds the connection with that backend."""
    status = await status_of_all(pool)
    (lease,) = [one["lease"] for one in status["connections"].values() if one["backend_pid"] == backend]
    assert lease["node"] == ray.get_runtime_context().get_node_id()
    assert lease["job"] == ray.get_runtime_context().get_job_id()
    assert 0 <= lease["age"] < 60
    return dict(lease)


async def shown(pool: WorkflowConnectionPool, backend: int) -> str:
    """The line of `raypg status` about it."""
    text = io.StringIO()
    cli_pools._show(Console(width=200, file=text), await cli_pools._figures(pool.name))
    (line,) = [line for line in text.getvalue().splitlines() if f" {backend} " in line]
    return line


async def in_async(pool: WorkflowConnectionPool) -> tuple[dict[str, Any], str, int]:
    """What is told of a lease of the caller's own."""
    async with pool.acquire() as connection:
        return await owner(pool, connection.backend_pid), await shown(pool, connection.backend_pid), os.getpid()


def in_sync(pool: WorkflowConnectionPool, way: str = "acquire") -> tuple[dict[str, Any], str, int]:
    with getattr(pool.sync, way)() as connection:
        backend = connection.fetchval("select pg_backend_pid()")
        return asyncio.run(owner(pool, backend)), asyncio.run(shown(pool, backend)), os.getpid()


def check(told: tuple[dict[str, Any], str, int], held_by: str) -> dict[str, Any]:
    lease, line, process = told
    assert lease["held_by"] == held_by
    assert lease["process"] == process
    assert held_by in line
    assert f" {process} " in line
    assert lease["job"] in line
    assert lease["node"][:12] in line
    return lease


async def test_a_driver(pool: WorkflowConnectionPool) -> None:
    lease = check(await in_async(pool), "driver")
    assert (lease["task"], lease["actor"], lease["actor_name"]) == ("driver", None, None)
    for way in ("acquire", "transaction"):
        check(await asyncio.to_thread(in_sync, pool, way), "driver")


async def test_a_task(pool: WorkflowConnectionPool) -> None:
    task: Any = ray.remote(num_cpus=0)(in_sync)
    for way in ("acquire", "transaction"):
        lease = check(await task.remote(pool, way), "task in_sync")
        assert (lease["task"], lease["actor"]) == ("in_sync", None)
        check(await task.options(name="load 7").remote(pool, way), "task load 7")

    def run(handle: WorkflowConnectionPool) -> Any:
        return asyncio.run(in_async(handle))

    check(await ray.remote(num_cpus=0)(run).options(name="in a loop").remote(pool), "task in a loop")

    def in_thread(handle: WorkflowConnectionPool) -> Any:
        told: list[Any] = []
        thread = threading.Thread(target=lambda: told.append(in_sync(handle)))
        thread.start()
        thread.join()
        return told[0]

    check(await ray.remote(num_cpus=0)(in_thread).remote(pool), "a thread of a task")


async def test_an_operation_of_a_workflow_engine(pool: WorkflowConnectionPool) -> None:
    def work(handle: WorkflowConnectionPool) -> Any:
        handle.sync.process({"operation": "acquire"})
        status = handle.sync.process({"operation": "get_status"})
        handle.sync.close()
        return [one["lease"]["held_by"] for one in status["connections"].values() if one["lease"]]

    assert await ray.remote(num_cpus=0)(work).remote(pool) == ["task work"]


class Holder:
    def __init__(self, pool: WorkflowConnectionPool) -> None:
        self.pool = pool

    def plain(self) -> Any:
        return in_sync(self.pool)


class AsyncHolder:
    def __init__(self, pool: WorkflowConnectionPool) -> None:
        self.pool = pool

    async def hold(self) -> Any:
        return await in_async(self.pool)

    async def hold_in_task(self) -> Any:
        return await asyncio.create_task(in_async(self.pool))


async def test_an_actor_with_and_without_a_name(pool: WorkflowConnectionPool) -> None:
    name = unique_name("boss")
    for kind, method in ((Holder, "plain"), (AsyncHolder, "hold"), (AsyncHolder, "hold_in_task")):
        actor_class: Any = ray.remote(num_cpus=0)(kind)
        nameless = actor_class.remote(pool)
        told = await getattr(nameless, method).remote()
        lease = check(told, f"actor {nameless._actor_id.hex()[:12]}, {kind.__name__}.{method}")
        assert (lease["actor"], lease["actor_name"]) == (nameless._actor_id.hex(), None)
        named = actor_class.options(name=name).remote(pool)
        lease = check(await getattr(named, method).remote(), f"actor {name}, {kind.__name__}.{method}")
        assert (lease["actor"], lease["actor_name"]) == (named._actor_id.hex(), name)
        ray.kill(named)
        await gone(name)


async def gone(name: str) -> None:
    def is_gone() -> bool:
        try:
            ray.get_actor(name)
        except ValueError:
            return True
        return False

    await eventually(is_gone)


async def test_a_serve_replica(pool: WorkflowConnectionPool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        deployment: Any = serve.deployment(ray_actor_options={"num_cpus": 0})(AsyncHolder)
        handle: Any = await asyncio.to_thread(lambda: serve.run(deployment.bind(pool), route_prefix=None, name="shop"))
        lease, line, process = await handle.hold.remote()
        assert lease["held_by"].startswith("Serve replica shop#AsyncHolder#")
        assert lease["held_by"] in line
        assert lease["actor_name"].endswith(lease["held_by"].removeprefix("Serve replica "))
        assert f" {process} " in line
    finally:
        await asyncio.to_thread(serve.shutdown)
