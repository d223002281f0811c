"""Backends, workers and servers die under load: reads never notice, writes are told the truth, capacity comes back."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
import ray
from killing import kill_all, killing
from pgserver import main_server
from pools import NO_BREAKER, CapWatch, lasting_pool, outcomes, own_pool, unique_name, worker_pids
from waiting import eventually

from raypg import (
    LeaseLostError,
    OutcomeUnknownError,
    QueryPipelineNode,
    UnavailableError,
    WorkflowConnectionPool,
    get_pool,
    naming,
)
from raypg.embedded import EmbeddedServer

CAP = 8


@pytest.fixture(scope="module")
def pool(ray_cluster: Any, pg18: EmbeddedServer) -> Iterator[WorkflowConnectionPool]:
    """A pool whose backends the tests of this module kill."""
    yield from lasting_pool(pg18, name=unique_name("faults"), max_connections=CAP, **NO_BREAKER)


@pytest.fixture
async def ledger(schema: str, direct: asyncpg.Connection) -> str:
    """A table that takes every number, as often as it is sent."""
    await direct.execute(f"create table {schema}.ledger (id int)")
    return f"{schema}.ledger"


async def check_ledger(
    direct: asyncpg.Connection, ledger: str, results: list[Any], allowed: type[Exception] | tuple[type[Exception], ...]
) -> None:
    """Every success is there once, every unknown at most once, everything else not at all."""
    counts = {row["id"]: row["n"] for row in await direct.fetch(f"select id, count(*) n from {ledger} group by id")}
    print(outcomes(results))
    for number, result in enumerate(results):
        count = counts.pop(number, 0)
        if isinstance(result, OutcomeUnknownError):
            assert count <= 1, f"{number}: unknown, and there {count} times"
        elif isinstance(result, BaseException):
            assert isinstance(result, allowed), repr(result)
            assert count == 0, f"{number}: {result!r}, and there {count} times"
        else:
            assert count == 1, f"{number}: success, and there {count} times"
    assert counts == {}


async def settled(direct: asyncpg.Connection, ledger: str) -> None:
    """Wait until no backend works on *ledger* any more: a dead client's write may still commit."""

    async def quiet() -> bool:
        query = "select count(*) from pg_stat_activity where state <> 'idle' and query like $1"
        return bool(await direct.fetchval(query + " and pid <> pg_backend_pid()", f"%{ledger}%") == 0)

    await eventually(quiet)


# --- backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempt", range(5))
async def test_no_reader_notices_that_backends_are_killed(
    pool: WorkflowConnectionPool, pg: EmbeddedServer, rng: random.Random, attempt: int
) -> None:
    async def read(number: int) -> bool:
        if number % 3 == 0:
            row = await pool.fetchrow("select $1::int as n, pg_sleep(0.005)", number)
            return row is not None and row["n"] == number
        if number % 3 == 1:
            return bool(await pool.fetchval("select count(*) from generate_series(1, $1)", number) == number)
        return [row[0] for row in await pool.fetch("select generate_series(1, 3) + $1", number)] == [
            number + 1,
            number + 2,
            number + 3,
        ]

    # A read is sent once more, and no more: its second backend must have time to answer.
    async with killing(pg, pool.name, rng, pause=(0.05, 0.1)) as killed:
        results = await asyncio.wait_for(
            asyncio.gather(*(read(number) for number in range(1000)), return_exceptions=True), 60
        )
    print(f"{len(killed)} backends killed")
    failed = [result for result in results if result is not True]
    assert failed == []
    assert killed


async def test_no_reader_notices_that_all_idle_backends_are_killed(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    for round_ in range(5):
        await kill_all(direct, pool.name)
        numbers = await asyncio.gather(*(pool.fetchval("select $1::int", number) for number in range(100)))
        assert numbers == list(range(100)), round_


async def test_nor_does_a_writer_when_the_killed_backends_were_idle(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, ledger: str
) -> None:
    """Nothing was sent over a connection that was seen to be dead: there is nothing that could be unknown."""
    results: list[Any] = []
    for round_ in range(10):
        await kill_all(direct, pool.name)
        calls = [pool.execute(f"insert into {ledger} values ($1)", round_ * 20 + number) for number in range(20)]
        results += await asyncio.gather(*calls, return_exceptions=True)
    assert outcomes(results) == {"ok": 200}
    await check_ledger(direct, ledger, results, ())


async def test_writers_are_told_the_truth_when_backends_are_killed(
    pool: WorkflowConnectionPool, pg: EmbeddedServer, direct: asyncpg.Connection, ledger: str, rng: random.Random
) -> None:
    sql = f"insert into {ledger} select $1::int from (select pg_sleep(random() * 0.02)) s"
    async with killing(pg, pool.name, rng) as killed, CapWatch(pg, pool.name) as watch:
        calls = [pool.execute(sql, number) for number in range(1000)]
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 90)
    await settled(direct, ledger)
    await check_ledger(direct, ledger, results, ())
    count = outcomes(results)
    assert killed
    assert 0 < count["OutcomeUnknownError"] <= len(killed)
    assert watch.most <= CAP


async def test_transactions_are_all_or_nothing_when_backends_are_killed(
    pool: WorkflowConnectionPool, pg: EmbeddedServer, direct: asyncpg.Connection, ledger: str, rng: random.Random
) -> None:
    async def pair(number: int) -> None:
        async with pool.transaction() as tx:
            await tx.execute(f"insert into {ledger} values ($1)", number)
            await tx.execute("select pg_sleep(0.005)")
            await tx.execute(f"insert into {ledger} values ($1)", number + 1000)

    async with killing(pg, pool.name, rng) as killed:
        results = await asyncio.wait_for(
            asyncio.gather(*(pair(number) for number in range(300)), return_exceptions=True), 90
        )
    await settled(direct, ledger)
    print(outcomes(results), len(killed))
    ids = [row["id"] for row in await direct.fetch(f"select id from {ledger}")]
    assert len(ids) == len(set(ids))
    stored = set(ids)
    for number, result in enumerate(results):
        assert (number in stored) == (number + 1000 in stored)
        if result is None:
            assert number in stored
        elif not isinstance(result, OutcomeUnknownError):
            assert isinstance(result, LeaseLostError), repr(result)
            assert number not in stored
    assert outcomes(results)["ok"] > 20  # some hundred backends were killed meanwhile
    assert outcomes(results)["LeaseLostError"] > 0


@pytest.mark.parametrize("strategy", ["best_effort", "transactional"])
async def test_a_pipeline_tells_the_truth_when_backends_are_killed(
    pool: WorkflowConnectionPool,
    pg: EmbeddedServer,
    direct: asyncpg.Connection,
    ledger: str,
    rng: random.Random,
    strategy: str,
) -> None:
    pipeline = QueryPipelineNode(name="p", connection_pool=pool, batch_size=20, flush_interval=0.002, strategy=strategy)
    results: list[Any] = []
    added = 0
    async with killing(pg, pool.name, rng) as killed:
        for _ in range(5):
            for step in range(400):
                # One that goes in groups, and one that goes alone.
                sql = f"insert into {ledger} values ($1)" if step % 100 < 70 else f"insert into {ledger} select $1::int"
                await pipeline.add_query(sql, [added])
                added += 1
                if step % 50 == 0:
                    await asyncio.sleep(0.005)
            part = await asyncio.wait_for(pipeline.flush(), 60)
            assert len(part) == 400
            if strategy == "transactional":
                assert len({result.success for result in part}) == 1
                # Only a COMMIT can be in doubt, and then all of it is.
                assert len({isinstance(result.error, OutcomeUnknownError) for result in part}) == 1
            results += [result.error or result.result for result in part]
    await settled(direct, ledger)
    print(f"{len(killed)} killed")
    await check_ledger(direct, ledger, results, Exception if strategy == "transactional" else UnavailableError)
    await pipeline.close()


# --- workers ---------------------------------------------------------------------------------------------------------


async def kill_worker(name: str, index: int = 0) -> int:
    pid = (await worker_pids(name))[index]
    os.kill(pid, signal.SIGKILL)
    return pid


async def capacity_back(pool: WorkflowConnectionPool, connections: int) -> None:
    """Wait until *connections* statements run at once again."""

    async def back() -> bool:
        query = "select pg_backend_pid() from (select pg_sleep(0.1)) s"
        pids = await asyncio.gather(*(pool.fetchval(query) for _ in range(connections * 2)), return_exceptions=True)
        return len({pid for pid in pids if isinstance(pid, int)}) == connections

    await eventually(back, timeout=10)


WAITING = "select application_name from pg_stat_activity where wait_event_type = 'Lock' and query like $1"


async def all_write(watcher: asyncpg.Connection, ledger: str, workers: int) -> bool:
    """Whether each of the pool's workers has a write under way that waits for *ledger*."""
    rows = await watcher.fetch(WAITING, f"insert into {ledger}%")
    return {int(row["application_name"].split(":")[2]) for row in rows} == set(range(workers))


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_worker_killed_under_readers_and_writers(
    ray_cluster: Any,
    pg: EmbeddedServer,
    direct: asyncpg.Connection,
    watcher: asyncpg.Connection,
    ledger: str,
    workers: int,
) -> None:
    async with (
        own_pool(pg, max_connections=6, workers=workers, min_connections=6) as pool,
        CapWatch(pg, pool.name) as watch,
    ):
        await capacity_back(pool, 5)
        victim = (await worker_pids(pool.name))[workers - 1]
        read_one = "select $1::int from (select pg_sleep(0.02)) s"
        write_one = f"insert into {ledger} {read_one}"
        # The server lets the first writes of each worker wait, so that it dies with some under way.
        async with direct.transaction():
            await direct.execute(f"lock table {ledger} in share mode")
            reads = [asyncio.create_task(pool.fetchval(read_one, n)) for n in range(300)]
            writes = [asyncio.create_task(pool.execute(write_one, n)) for n in range(300)]
            await eventually(lambda: all_write(watcher, ledger, workers), timeout=30)
            lines = (await pool._dispatcher())._channels.items()
            others = [line for index, line in lines if index != workers - 1]
            sent = [call.future for line in others for batch in line._batches.values() for call in batch]
            elsewhere = [future for future in sent if not future.done()]
            assert bool(elsewhere) == (workers > 1)
            started = time.monotonic()
            os.kill(victim, signal.SIGKILL)
        read = await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), 40)
        written = await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), 40)
        print(f"all answered {time.monotonic() - started:.1f} s after the worker was killed")
        await capacity_back(pool, 5)
        took = time.monotonic() - started
        print(f"capacity back after {took:.1f} s")
        assert read == list(range(300))
        assert [future.exception() for future in elsewhere if future.exception() is not None] == []
        await settled(direct, ledger)
        await check_ledger(direct, ledger, written, ())
        assert outcomes(written)["OutcomeUnknownError"] > 0
        assert took < 10
    print(f"{watch.rate:.0f} looks per second, at most {watch.most}")
    assert watch.most <= 6


async def test_leases_and_pipelines_after_a_worker_was_killed(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, ledger: str
) -> None:
    """What was held is lost, and says so; what is asked for meanwhile waits for the new worker and succeeds."""
    async with own_pool(pg, max_connections=3) as pool:
        pipeline = QueryPipelineNode(name="p", connection_pool=pool, flush_interval=0)
        lease = await pool.acquire()
        await lease.transaction().start()
        await lease.execute(f"insert into {ledger} values (-1)")
        await kill_worker(pool.name)
        with pytest.raises(LeaseLostError):
            await lease.execute(f"insert into {ledger} values (-2)")
        await lease.release()

        async def transact() -> int:
            async with pool.transaction(timeout=15) as tx:
                await tx.execute(f"insert into {ledger} values (0)")
                return 1

        await pipeline.add_query(f"insert into {ledger} values (1)")
        # The worker is known to be dead: nothing of this was sent to it, so nothing of it can be unknown.
        done, flushed, value = await asyncio.wait_for(
            asyncio.gather(transact(), pipeline.flush(), pool.execute(f"insert into {ledger} values (2)")), 30
        )
        assert (done, value) == (1, "INSERT 0 1")
        assert [result.success for result in flushed] == [True], flushed[0].error
        rows = await direct.fetch(f"select id from {ledger} order by id")
        assert [row["id"] for row in rows] == [0, 1, 2]
        await pipeline.close()


async def test_the_pool_actor_killed(ray_cluster: Any, pg: EmbeddedServer) -> None:
    """It carries no statement: nothing stops, and it finds its workers again."""
    async with own_pool(pg, max_connections=4) as pool:
        pids = await worker_pids(pool.name)
        actor = ray.get_actor(naming.pool_actor(pool.name), namespace=naming.NAMESPACE)
        pid = await actor.__ray_call__.remote(lambda self: os.getpid())
        os.kill(pid, signal.SIGKILL)
        numbers = await asyncio.wait_for(
            asyncio.gather(*(pool.fetchval("select $1::int", number) for number in range(500))), 10
        )
        assert numbers == list(range(500))

        async def answers() -> bool:
            try:
                status = await pool.process({"operation": "get_status"})
            except UnavailableError:
                return False
            return bool(status["max_connections"] == 4 and len(status["connections"]) >= 1)

        await eventually(answers, timeout=15)
        assert await worker_pids(pool.name) == pids
        assert await get_pool(pool.name).fetchval("select 1") == 1

        # A fault of ours in one of its rounds is not the last of them.
        def stumble(actor: Any) -> None:
            async def fault() -> None:
                del actor._reaper.rest
                raise RuntimeError("wanted by the test")

            actor._reaper.rest = fault

        await actor.__ray_call__.remote(stumble)

        async def stumbled() -> bool:
            return bool(await actor.__ray_call__.remote(lambda self: "rest" not in vars(self._reaper)))

        await eventually(stumbled)
        assert not await actor.__ray_call__.remote(lambda self: any(keeper.done() for keeper in self._keepers))


async def test_a_process_that_dies_with_a_transaction_leaves_nothing(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, ledger: str
) -> None:
    class Holder:
        async def hold(self, name: str) -> int:
            self.lease = await get_pool(name).acquire(lease_timeout=300)
            await self.lease.execute("begin")
            await self.lease.execute(f"insert into {ledger} values (1)")
            return os.getpid()

    async with own_pool(pg, max_connections=1) as pool:
        holder: Any = ray.remote(Holder).options(num_cpus=0).remote()
        os.kill(await holder.hold.remote(pool.name), signal.SIGKILL)
        started = time.monotonic()
        assert await pool.fetchval(f"select count(*) from {ledger}", timeout=20) == 0
        print(f"lease reclaimed after {time.monotonic() - started:.1f} s")
        assert time.monotonic() - started < 8


# --- the server ------------------------------------------------------------------------------------------------------


async def test_the_server_restarted_under_load(ray_cluster: Any) -> None:
    with main_server() as server:
        # The breaker opens, and must not keep out longer than it was told to.
        settings = {"connect_timeout": 3.0, "circuit_breaker_recovery_timeout": 0.5, "circuit_breaker_ramp": 0.5}
        async with own_pool(server, max_connections=4, **settings) as pool:
            for how in ("fast", "immediate", "kill"):
                await _restarted_under_load(pool, server, how)
                await pool.circuit_breaker.reset()


async def _restarted_under_load(pool: WorkflowConnectionPool, server: EmbeddedServer, how: str) -> None:
    direct = await asyncpg.connect(**server.parameters)
    await direct.execute("drop table if exists ledger; create table ledger (id int)")
    await direct.close()
    running = True
    results: dict[int, Any] = {}
    numbers = iter(range(10**9))

    async def write() -> None:
        while running:
            number = next(numbers)
            try:
                results[number] = await pool.execute(
                    "insert into ledger select $1::int from (select pg_sleep(0.005)) s", number
                )
            except Exception as error:
                results[number] = error
                await asyncio.sleep(0.02)

    async def read() -> None:
        while running:
            try:
                assert await pool.fetchval("select 5") == 5
            except UnavailableError:
                await asyncio.sleep(0.02)

    tasks = [asyncio.create_task(write()) for _ in range(20)] + [asyncio.create_task(read()) for _ in range(20)]
    await asyncio.sleep(0.5)
    if how == "kill":
        await asyncio.to_thread(server.kill)
    else:
        await asyncio.to_thread(server.stop, how)  # type: ignore[arg-type]
    await asyncio.to_thread(server.start)
    up = time.monotonic()

    async def writes_again() -> bool:
        before = max(results)
        await asyncio.sleep(0.02)
        return any(isinstance(result, str) for number, result in results.items() if number > before)

    await eventually(writes_again, timeout=15)
    back = time.monotonic() - up
    running = False
    await asyncio.wait_for(asyncio.gather(*tasks), 20)
    print(f"{how}: service back {back:.1f} s after the server")
    assert back < 8
    listed = [results[number] for number in range(len(results))]
    direct = await asyncpg.connect(**server.parameters)
    await check_ledger(direct, "ledger", listed, UnavailableError)
    await direct.close()
    assert outcomes(listed)["OutcomeUnknownError"] <= 4 * 3


async def test_a_new_line_to_a_worker_that_was_thought_lost(ray_cluster: Any, pg: EmbeddedServer) -> None:
    """It lives, and still has what came over the old line: those answers are nobody's."""
    async with own_pool(pg, max_connections=5, workers=1) as pool:
        dispatcher = await pool._dispatcher()
        for _ in range(2):
            (line,) = dispatcher._channels.values()
            slow = [asyncio.create_task(pool.fetchval("select 'slow' from pg_sleep($1)", 0.2)) for _ in range(3)]
            await eventually(lambda line=line: line.open == 3)
            line.lose()
            numbers = await asyncio.gather(*(pool.fetchval("select $1::int", number) for number in range(300)))
            assert numbers == list(range(300))
            assert await asyncio.gather(*slow) == ["slow"] * 3
