"""Whose pool it is: the same settings join, others conflict; other jobs and processes find it, versions are told."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import textwrap
import weakref
from typing import Any

import asyncpg
import pytest
import ray
from pools import backends_of, own_pool, unique_name

from raypg import (
    ConfigError,
    PoolConflictError,
    PoolNotInitializedError,
    PoolVersionError,
    QueryPipelineNode,
    WorkflowConnectionPool,
    get_pool,
    messages,
    naming,
)
from raypg.embedded import EmbeddedServer
from raypg.portable import unpack_error

# --- the same or another ----------------------------------------------------------------------------------------------


async def test_the_same_settings_join(pool: WorkflowConnectionPool, pg: EmbeddedServer) -> None:
    same: list[dict[str, Any]] = [
        dict(pg.parameters),
        {**pg.parameters, "max_connections": 10},
        {**pg.parameters, "port": [pg.port]},
        {"connection_string": pg.dsn},
        {"connection_string": pg.dsn, "acquire_timeout": 30.0},
        {"connection_string": pg.dsn.replace("postgresql://", "postgres://")},
    ]
    for settings in same:
        joined = WorkflowConnectionPool(name=pool.name, **settings)
        answer = await joined.process({"operation": "initialize"})
        assert (answer["status"], answer["max_connections"]) == ("already_initialized", 10)
        assert await joined.fetchval("select 1") == 1


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"host": "localhost"}, "hosts"),
        ({"port": 1}, "hosts"),
        ({"database": "template1"}, "database"),
        ({"user": "someone"}, "user"),
        ({"sslmode": "disable"}, "sslmode"),
    ],
)
async def test_another_database_conflicts(
    pool: WorkflowConnectionPool, pg: EmbeddedServer, change: dict[str, Any], key: str
) -> None:
    other = WorkflowConnectionPool(name=pool.name, **{**pg.parameters, **change})
    with pytest.raises(PoolConflictError, match=f"raypg down {pool.name}") as caught:
        await other.process({"operation": "initialize"})
    assert caught.value.identity is True
    assert key in caught.value.differences
    assert pg.password not in str(caught.value) + repr(caught.value)
    assert await pool.fetchval("select 1") == 1


@pytest.mark.parametrize(
    ("change", "running"),
    [({"max_connections": 11}, 10), ({"acquire_timeout": 5.0}, 30.0), ({"min_connections": 1}, 2)],
)
async def test_other_tunables_conflict_if_they_are_given(
    pool: WorkflowConnectionPool, pg: EmbeddedServer, change: dict[str, Any], running: Any
) -> None:
    other = WorkflowConnectionPool(name=pool.name, **pg.parameters, **change)
    with pytest.raises(PoolConflictError, match="reconfigure") as caught:
        await other.fetchval("select 1")
    assert caught.value.identity is False
    ((key, value),) = change.items()
    assert caught.value.differences == {key: (running, value)}


async def test_the_password_is_no_part_of_it(pool: WorkflowConnectionPool, pg: EmbeddedServer) -> None:
    """It may be rotated; a wrong one is not noticed by a pool that has its connections."""
    rotated = WorkflowConnectionPool(name=pool.name, **{**pg.parameters, "password": "another"})
    assert (await rotated.process({"operation": "initialize"}))["status"] == "already_initialized"
    assert await rotated.fetchval("select 1") == 1
    back = WorkflowConnectionPool(name=pool.name, **pg.parameters)
    await back.process({"operation": "initialize"})


async def test_two_who_start_it_with_other_settings_at_once(ray_cluster: Any, pg: EmbeddedServer) -> None:
    name = unique_name()
    pools = [WorkflowConnectionPool(name=name, **pg.parameters, max_connections=size) for size in (2, 3)]
    results = await asyncio.gather(
        *(pool.process({"operation": "initialize"}) for pool in pools), return_exceptions=True
    )
    kinds = sorted(type(result).__name__ for result in results)
    assert kinds == ["PoolConflictError", "dict"]
    for pool, result in zip(pools, results, strict=True):
        if isinstance(result, dict):
            await pool.close()


# --- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"protocol": 999}, "protocol"),
        ({"raypg": "0.0.1"}, "raypg"),
        ({"ray": "1.0"}, "ray"),
        ({"python": "3.9"}, "3.9"),
    ],
)
async def test_another_version_is_told(pool: WorkflowConnectionPool, change: dict[str, Any], word: str) -> None:
    actor = ray.get_actor(naming.pool_actor(pool.name), namespace=naming.NAMESPACE)
    kind, packed = await actor.hello.remote({**messages.hello(), **change}, None)
    error = unpack_error(packed)
    assert kind == "error"
    assert isinstance(error, PoolVersionError)
    assert word in str(error)
    assert pool.name in str(error)
    kind, packed = await actor.hello.remote({}, None)
    assert isinstance(unpack_error(packed), PoolVersionError)
    kind, _ = await actor.hello.remote(messages.hello(), None)
    assert kind == "ok"


async def test_a_handle_of_another_version_gets_it_raised(
    pool: WorkflowConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    doctored = {**messages.hello(), "raypg": "99.0"}
    monkeypatch.setattr(messages, "hello", lambda: doctored)
    with pytest.raises(PoolVersionError, match=r"99\.0"):
        await get_pool(pool.name).fetchval("select 1")


# --- handles in other processes ---------------------------------------------------------------------------------------


def test_a_handle_without_a_pool_cannot_be_sent(ray_cluster: Any, pg: EmbeddedServer) -> None:
    handle = WorkflowConnectionPool(name=unique_name(), **pg.parameters)
    for send in (pickle.dumps, copy.copy, copy.deepcopy, ray.cloudpickle.dumps, ray.put):
        with pytest.raises(PoolNotInitializedError, match="initialize"):
            send(handle)


async def test_a_pickled_handle_is_a_name_and_no_password(pool: WorkflowConnectionPool, pg: EmbeddedServer) -> None:
    data = pickle.dumps(pool)
    assert len(data) < 200
    assert pg.password.encode() not in data
    back = pickle.loads(data)
    assert back.name == pool.name
    assert await back.fetchval("select 1") == 1
    await back.close()  # only detaches
    assert await pool.fetchval("select 1") == 1


def in_a_task(pool: WorkflowConnectionPool, number: int) -> tuple[int, int]:
    return os.getpid(), asyncio.run(pool.fetchval("select $1::int", number))


class InAnActor:
    def __init__(self, pool: WorkflowConnectionPool) -> None:
        self.pool = pool

    async def read(self, number: int) -> int:
        value = await self.pool.fetchval("select $1::int", number)
        return int(value)

    async def fail(self) -> str:
        try:
            await self.pool.execute("select 1/0")
        except asyncpg.DivisionByZeroError as error:
            return str(error.sqlstate)
        return "no error"

    async def write(self, table: str, count: int) -> int:
        pipeline = QueryPipelineNode(name="actor", connection_pool=self.pool)
        for number in range(count):
            await pipeline.add_query(f"insert into {table} values ($1, 'x')", [number])
        results = await pipeline.flush()
        await pipeline.close()
        return sum(result.success for result in results)

    async def transact(self, table: str) -> None:
        async with self.pool.transaction() as tx:
            await tx.execute(f"insert into {table} values (-1, 'x')")


async def test_handles_work_in_tasks_and_actors(pool: WorkflowConnectionPool, table: str) -> None:
    task = ray.remote(num_cpus=2)(in_a_task)
    references = [task.remote(pool, number) for number in range(30)]
    results = await asyncio.gather(*references)
    assert [number for _, number in results] == list(range(30))
    assert os.getpid() not in {pid for pid, _ in results}
    actor: Any = ray.remote(InAnActor).options(num_cpus=0).remote(pool)
    try:
        assert await asyncio.gather(*(actor.read.remote(number) for number in range(200))) == list(range(200))
        assert await actor.fail.remote() == "22012"
        assert await actor.write.remote(table, 500) == 500
        await actor.transact.remote(table)
        assert await pool.fetchval(f"select count(*) from {table}") == 501
    finally:
        ray.kill(actor)


async def test_an_event_loop_that_is_over_is_forgotten(pool: WorkflowConnectionPool) -> None:
    """Plain tasks call ``asyncio.run`` again and again in one process."""
    loops: list[weakref.ref[Any]] = []

    def work() -> None:
        async def call() -> None:
            loops.append(weakref.ref(asyncio.get_running_loop()))
            assert await pool.fetchval("select 1") == 1

        for _ in range(5):
            asyncio.run(call())

    await asyncio.to_thread(work)
    await asyncio.to_thread(asyncio.run, pool.fetchval("select 1"))
    gc.collect()
    assert sum(loop() is not None for loop in loops) <= 1


ANOTHER_JOB = """
    import asyncio, json, os, sys
    import ray
    ray.init(address=sys.argv[1], log_to_driver=False)
    import raypg

    async def main():
        pool = raypg.get_pool(sys.argv[2])
        numbers = await asyncio.gather(*(pool.fetchval("select $1::int", n) for n in range(100)))
        async with pool.transaction() as tx:
            await tx.execute(f"insert into {sys.argv[3]} values (1, 'by another job')")
            shown = await tx.fetchval("select current_setting('application_name')")
        async with raypg.QueryPipelineNode(name="job", connection_pool=sys.argv[2]) as pipeline:
            for n in range(2, 300):
                await pipeline.add_query(f"insert into {sys.argv[3]} values ($1, 'x')", [n])
        lost = await pool.acquire()
        await lost.execute("begin")
        await lost.execute(f"insert into {sys.argv[3]} values (-1, 'never committed')")
        if sys.argv[4] == "close":
            await pool.close()
        print(json.dumps([numbers == list(range(100)), os.getpid(), ray.get_runtime_context().get_job_id(), shown]))

    asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["close", "exit"])
async def test_another_job_finds_it_uses_it_and_goes(
    ray_cluster: Any, pool: WorkflowConnectionPool, direct: asyncpg.Connection, table: str, end: str
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(ANOTHER_JOB)]
    done = await asyncio.to_thread(
        subprocess.run,
        [*command, ray_cluster.address_info["gcs_address"], pool.name, table, end],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    right, pid, job, shown = json.loads(done.stdout.splitlines()[-1])
    assert right is True
    assert shown.endswith(f":{job}")
    assert "WARNING" not in done.stderr  # the log of a driver is its owner's
    assert pid != os.getpid()
    assert job != ray.get_runtime_context().get_job_id()
    assert await pool.fetchval(f"select count(*) from {table}") == 299
    assert await pool.fetchval(f"select label from {table} where id = 1") == "by another job"
    assert len(await backends_of(direct, pool.name)) <= 10


async def test_a_pool_made_in_a_task_outlives_it(ray_cluster: Any, pg: EmbeddedServer) -> None:
    name = unique_name()

    def make(settings: dict[str, Any]) -> int:
        pool = WorkflowConnectionPool(**settings)
        asyncio.run(pool.process({"operation": "initialize"}))
        return os.getpid()

    pid = await ray.remote(num_cpus=0, max_calls=1)(make).remote({"name": name, **pg.parameters, "max_connections": 1})
    assert pid != os.getpid()
    pool = WorkflowConnectionPool(name=name, **pg.parameters)
    assert (await pool.process({"operation": "initialize"}))["status"] == "already_initialized"
    assert await pool.fetchval("select 1") == 1
    await pool.close()


async def test_two_pools_of_one_cluster_do_not_mix(
    ray_cluster: Any, pool: WorkflowConnectionPool, pg: EmbeddedServer
) -> None:
    async with own_pool(pg, database="template1", max_connections=1) as other:
        names = await asyncio.gather(*(p.fetchval("select current_database()") for p in (pool, other) * 20))
        assert names == ["postgres", "template1"] * 20


@pytest.mark.parametrize("name", ["", "two words", "x" * 33, "a/b", None, 5])
def test_names_that_are_no_names(name: Any) -> None:
    with pytest.raises(ConfigError, match="name"):
        WorkflowConnectionPool(name=name)
    with pytest.raises(ConfigError, match="name"):
        get_pool(name)
