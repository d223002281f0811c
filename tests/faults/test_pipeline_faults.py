"""Pipelines on bad days: killed workers and backends, deadlocks, lost answers to COMMIT, a dead Pipeline actor."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
import ray
from pools import add_all, all_open, backends_of, lasting_pool, own_pool, pipeline_of, states, worker_pids
from proxy import Proxy
from waiting import eventually

from raypg import (
    OutcomeUnknownError,
    QueryPipelineNode,
    StatementNotRunError,
    TransactionRolledBackError,
    WorkflowConnectionPool,
    cluster,
    naming,
)
from raypg.embedded import EmbeddedServer


@pytest.fixture(scope="module")
def shared(ray_cluster: Any, pg18: EmbeddedServer) -> Iterator[WorkflowConnectionPool]:
    yield from lasting_pool(pg18, max_connections=7, workers=2)


@pytest.fixture
async def pair(shared: WorkflowConnectionPool) -> WorkflowConnectionPool:
    """A pool of two workers with six connections, which is well again after the last test."""

    async def well() -> bool:
        try:
            await worker_pids(shared.name)
        except ray.exceptions.RayActorError:
            return False
        found = (await states(shared)).values()
        return {state for state, _ in found} == {"serving"} and sum(share for _, share in found) == 6

    await eventually(well, 30)
    await shared.circuit_breaker.reset()
    return shared


@pytest.fixture
async def ledger(schema: str, direct: asyncpg.Connection) -> str:
    """A table that takes every number, as often as it is sent."""
    await direct.execute(f"create table {schema}.ledger (id int)")
    return f"{schema}.ledger"


async def stored(direct: asyncpg.Connection, ledger: str) -> Counter[int]:
    return Counter(row["id"] for row in await direct.fetch(f"select id from {ledger}"))


def check(results: Any, there: Counter[int]) -> int:
    """Successes are there once, known failures are not there; nothing is there twice. The number of unknown ones."""
    assert not [number for number, count in there.items() if count > 1]
    unknown = 0
    for number, result in enumerate(results):
        if result.success:
            assert there[number] == 1, number
        elif isinstance(result.error, OutcomeUnknownError):
            unknown += 1
        else:
            assert there[number] == 0, (number, result)
    return unknown


async def test_a_large_load_is_shared_by_all_workers(
    pair: WorkflowConnectionPool, direct: asyncpg.Connection, watcher: asyncpg.Connection, ledger: str
) -> None:
    """The server lets the first of it wait until both have some: one alone is not done before the other begins."""
    workers = [ray.get_actor(naming.worker_actor(pair.name, n), namespace=naming.NAMESPACE) for n in range(2)]
    before = [(await worker.status.remote())["executed"] for worker in workers]
    async with pipeline_of(pair, batch_size=1000, flush_interval=0) as pipeline:
        async with direct.transaction():
            await direct.execute(f"lock table {ledger} in share mode")
            await add_all(pipeline, f"insert into {ledger} values ($1)", [(n,) for n in range(40_000)])
            flush = asyncio.create_task(pipeline.flush())

            async def both_write() -> bool:
                rows = await backends_of(watcher, pair.name, control=False)
                return {row["application_name"].split(":")[2] for row in rows if row["state"] == "active"} == {"0", "1"}

            await eventually(both_write)
        results = await flush
    assert check(results, await stored(direct, ledger)) == 0
    assert results.failures == 0
    after = [(await worker.status.remote())["executed"] for worker in workers]
    assert min(there - here for here, there in zip(before, after, strict=True)) >= 1_000  # a batch


@pytest.mark.parametrize("strategy", ["best_effort", "sequential"])
async def test_a_worker_killed_in_the_middle(
    pair: WorkflowConnectionPool, direct: asyncpg.Connection, watcher: asyncpg.Connection, ledger: str, strategy: str
) -> None:
    """What was not sent goes elsewhere, what was under way is told as unknown, nothing runs twice."""
    pids = await worker_pids(pair.name)
    # The server lets the first of them wait, so that the worker dies with statements under way.
    async with pipeline_of(pair, strategy=strategy, batch_size=200) as pipeline:
        async with direct.transaction():
            await direct.execute(f"lock table {ledger} in share mode")
            await add_all(pipeline, f"insert into {ledger} values ($1)", [(n,) for n in range(12_000)])

            async def under_way() -> list[asyncpg.Record]:
                rows = await backends_of(watcher, pair.name, control=False)
                return [row for row in rows if row["state"] == "active"]

            await eventually(under_way)
            victims = {int(row["application_name"].split(":")[2]) for row in await under_way()}
            os.kill(pids[victims.pop()], signal.SIGKILL)
        results = await asyncio.wait_for(pipeline.flush(), 60)
    assert len(results) == 12_000

    async def over() -> bool:
        return not [row for row in await backends_of(direct, pair.name, control=False) if row["state"] == "active"]

    await eventually(over)
    unknown = check(results, await stored(direct, ledger))
    assert unknown > 0
    if strategy == "sequential":
        last = results[-1].error
        assert isinstance(last, StatementNotRunError)
        assert not any(result.success for result in list(results)[200:])
    else:
        assert sum(result.success for result in results) > 0


async def test_reads_of_a_killed_worker_are_asked_elsewhere(
    pair: WorkflowConnectionPool, direct: asyncpg.Connection, watcher: asyncpg.Connection, ledger: str
) -> None:
    pids = await worker_pids(pair.name)
    async with pipeline_of(pair, strategy="parallel", flush_interval=0) as pipeline:
        await add_all(pipeline, f"select $1::int as n, count(*) from {ledger}", [(n,) for n in range(50)])
        async with direct.transaction():
            await direct.execute(f"lock table {ledger} in access exclusive mode")
            flush = asyncio.create_task(pipeline.flush())

            async def under_way() -> bool:
                rows = await backends_of(watcher, pair.name, control=False)
                return len([row for row in rows if row["state"] == "active"]) >= 4

            await eventually(under_way)
            os.kill(pids[0], signal.SIGKILL)
        results = await asyncio.wait_for(flush, 60)
        assert [result.result[0]["n"] for result in results if result.success] == list(range(50))
        assert sum(result.retry_count for result in results) > 0


@pytest.mark.parametrize("strategy", ["best_effort", "sequential", "transactional"])
async def test_backends_killed_under_a_load(
    pair: WorkflowConnectionPool, direct: asyncpg.Connection, ledger: str, strategy: str, rng: random.Random
) -> None:
    async def kill() -> None:
        while True:
            victims = await backends_of(direct, pair.name, control=False)
            if victims:
                await direct.execute("select pg_terminate_backend($1)", rng.choice(victims)["pid"])
            await asyncio.sleep(rng.uniform(0.01, 0.05))

    async with pipeline_of(pair, strategy=strategy, batch_size=500, flush_interval=0.001) as pipeline:
        killer = asyncio.create_task(kill())
        try:
            for number in range(30_000):
                await pipeline.add_query(f"insert into {ledger} values ($1)", (number,))
                if number % 100 == 0:
                    await asyncio.sleep(0)
            results = await asyncio.wait_for(pipeline.flush(), 60)
        finally:
            killer.cancel()
    assert len(results) == 30_000
    await asyncio.wait([killer])
    check(results, await stored(direct, ledger))
    if strategy == "transactional":
        assert len({result.success for result in results}) == 1


async def test_groups_that_lock_in_opposite_order_all_succeed(
    pair: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    """Grouped UPDATEs deadlock where single ones do not: the group runs again, and at last one by one."""
    await direct.execute(f"create table {schema}.t (a int primary key, n int); "
                         f"insert into {schema}.t select g, 0 from generate_series(0, 99) g")  # fmt: skip
    await direct.execute("set deadlock_timeout = '20ms'")
    there, back = (pipeline_of(pair, flush_interval=0, batch_size=100) for _ in range(2))
    rounds = 5
    for _ in range(rounds):
        await add_all(there, f"update {schema}.t set n = n + 1 where a = $1", [(n,) for n in range(100)])
        await add_all(back, f"update {schema}.t set n = n + 1 where a = $1", [(99 - n,) for n in range(100)])
        parts = await asyncio.gather(there.flush(), back.flush())
        assert [result.error for part in parts for result in part if result.error is not None] == []
    assert await direct.fetchval(f"select min(n) + max(n) from {schema}.t") == 4 * rounds
    await asyncio.gather(there.close(), back.close())


async def test_serialization_failures_run_again(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, schema: str
) -> None:
    await direct.execute(f"create table {schema}.t (a int primary key, n int); insert into {schema}.t values (1, 0)")
    settings = {"default_transaction_isolation": "repeatable read"}
    async with own_pool(pg, max_connections=5, server_settings=settings) as pool:
        pipelines = [pipeline_of(pool, flush_interval=0, strategy=s) for s in ("best_effort", "sequential")]
        for pipeline in pipelines:
            await add_all(pipeline, f"update {schema}.t set n = n + $1", [(1,)] * 100)
        transaction = direct.transaction()
        await transaction.start()
        await direct.execute(f"update {schema}.t set n = n")  # who waits for it may not go on when it is over
        flushing = asyncio.gather(*(pipeline.flush() for pipeline in pipelines))
        waits = "select exists (select from pg_locks where not granted and $1 = any(pg_blocking_pids(pid)))"
        await eventually(lambda: direct.fetchval(waits, direct.get_server_pid()))
        await transaction.commit()
        parts = await flushing
        failed = [result.error for part in parts for result in part if not result.success]
        # Three tries are not always enough; what failed did nothing.
        assert all(isinstance(e, asyncpg.SerializationError | StatementNotRunError) for e in failed)
        assert await direct.fetchval(f"select n from {schema}.t") == 200 - len(failed)
        assert sum(pipeline.get_status()["total_retries"] for pipeline in pipelines) > 0
        await asyncio.gather(*(pipeline.close() for pipeline in pipelines))


# --- COMMIT without an answer ----------------------------------------------------------------------------------------


class LosesCommit(Proxy):
    """Cuts the connection over which a COMMIT goes, before or after it has reached the server."""

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.before = False
        self.lost = 0
        self.armed = False

    async def _copy(self, source: Any, sink: Any, spoken: Any, *, answers: bool = False) -> None:
        try:
            while data := await source.read(65536):
                if self.armed and answers and self.lost and b"COMMIT" in data:
                    break  # the answer
                commit = self.armed and not answers and b"COMMIT" in data
                self.lost += commit
                if commit and self.before:
                    break
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.transport.abort()


@pytest.mark.parametrize("ledger_exists", [False, True])
async def test_a_commit_without_an_answer(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, ledger: str, ledger_exists: bool
) -> None:
    """Another connection, older than the COMMIT, knows what became of it; or a row that the transaction has written."""
    if ledger_exists:
        await direct.execute(
            "drop schema if exists raypg cascade; create schema raypg;"
            "create table raypg.batches (pipeline text, batch_id text)"
        )
    try:
        async with LosesCommit(pg.port) as proxy, _pool_through(pg, proxy) as pool:
            for before in (False, True):
                await all_open(pool, direct, 3)
                proxy.before, proxy.lost = before, 0
                async with pipeline_of(pool, strategy="transactional") as pipeline:
                    await add_all(pipeline, f"insert into {ledger} values ($1)", [(n,) for n in range(50)])
                    proxy.armed = True
                    results = await asyncio.wait_for(pipeline.flush(), 60)
                    proxy.armed = False
                assert proxy.lost == 1
                if before:
                    assert {type(result.error) for result in results} == {TransactionRolledBackError}
                else:
                    assert all(result.success for result in results)
                # Of the two transactions the first one.
                assert await direct.fetchval(f"select count(*) from {ledger}") == 50
                if ledger_exists:
                    assert await direct.fetchval("select count(*) from raypg.batches") == 1
    finally:
        if ledger_exists:
            await direct.execute("drop schema raypg cascade")


async def test_a_commit_of_which_nobody_knows(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, ledger: str
) -> None:
    """With one connection alone there is none that is older than the COMMIT and lives."""
    async with LosesCommit(pg.port) as proxy, _pool_through(pg, proxy, max_connections=1) as pool:
        async with pipeline_of(pool, strategy="transactional") as pipeline:
            await pipeline.add_query(f"insert into {ledger} values (1)")
            proxy.armed = True
            (result,) = await asyncio.wait_for(pipeline.flush(), 60)
            proxy.armed = False
        assert isinstance(result.error, OutcomeUnknownError), (proxy.lost, result)


def _pool_through(pg: EmbeddedServer, proxy: Proxy, **more: Any) -> Any:
    settings = {"port": proxy.port, "sslmode": "disable", "max_connections": 4, "min_connections": 3, **more}
    settings["min_connections"] = min(settings["min_connections"], settings["max_connections"])
    return own_pool(pg, **settings)


async def test_a_transaction_that_idles_is_rolled_back(
    pair: WorkflowConnectionPool, direct: asyncpg.Connection, ledger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raypg.pipeline.BUFFER_ROWS", 100)
    pipeline = QueryPipelineNode("idle", pair, strategy="transactional", transaction_idle_timeout=0.3)
    await add_all(pipeline, f"insert into {ledger} values ($1)", [(n,) for n in range(150)])

    async def rolled_back() -> bool:
        rows = await backends_of(direct, pair.name, control=False)
        return pipeline.get_status()["queued_queries"] == 50 and not [r for r in rows if "transaction" in r["state"]]

    await eventually(rolled_back)
    results = await pipeline.flush()
    assert len(results) == 150
    assert {type(result.error) for result in results} == {StatementNotRunError}
    assert "transaction_idle_timeout" in str(results[0].error)
    assert await direct.fetchval(f"select count(*) from {ledger}") == 0
    await pipeline.add_query(f"insert into {ledger} values (1)")
    (result,) = await pipeline.flush()
    assert result.success
    await pipeline.close()


# --- the Pipeline actor ----------------------------------------------------------------------------------------------


def credit_actor() -> Any:
    try:
        return ray.get_actor(naming.PIPELINE_ACTOR, namespace=naming.NAMESPACE)
    except ValueError:
        return None


async def test_the_pipeline_actor_is_asked_by_large_loads_and_its_death_stops_nobody(
    pair: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    await direct.execute(f"create unlogged table {schema}.big (id int, text text)")
    sql = f"insert into {schema}.big values ($1, $2)"
    text = "x" * 1000

    async def load(first: int, count: int) -> None:
        async with pipeline_of(pair, batch_size=2000) as pipeline:
            await add_all(pipeline, sql, [(first + n, text) for n in range(count)])
            assert (await pipeline.flush()).failures == 0

    await load(0, 20_000)
    actor = await eventually(credit_actor)
    assert repr(await actor.__ray_call__.remote(lambda self: repr(self))) == "'Pipeline'"
    task = asyncio.create_task(load(20_000, 40_000))
    while not task.done():
        ray.kill(cluster.find_or_start_pipeline(), no_restart=False)
        await asyncio.wait((task,), timeout=0.3)
    await task
    assert await direct.fetchval(f"select count(distinct id) from {schema}.big") == 60_000
