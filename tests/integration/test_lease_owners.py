"""Who holds a lease, as `get_status` and `raypg status` tell it: driver, task, actor. More: test_serve_replica.py."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import ray
from owners import in_async, owner, shown
from pools import unique_name

from raypg import WorkflowConnectionPool


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
        leases = [one["lease"] for one in status["connections"].values() if one["lease"]]
        return [lease["held_by"] for lease in leases if lease["process"] == os.getpid()]

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
    for kind, methods in ((Holder, ["plain"]), (AsyncHolder, ["hold", "hold_in_task"])):
        name = unique_name("boss")
        actor_class: Any = ray.remote(num_cpus=0)(kind)
        nameless, named = actor_class.remote(pool), actor_class.options(name=name).remote(pool)
        for method in methods:
            told = await getattr(nameless, method).remote()
            lease = check(told, f"actor {nameless._actor_id.hex()[:12]}, {kind.__name__}.{method}")
            assert (lease["actor"], lease["actor_name"]) == (nameless._actor_id.hex(), None)
            lease = check(await getattr(named, method).remote(), f"actor {name}, {kind.__name__}.{method}")
            assert (lease["actor"], lease["actor_name"]) == (named._actor_id.hex(), name)
