"""Writes with a batch id while workers, the Pipeline actor, whole jobs and PostgreSQL are killed: every row arrives
exactly once.

A schedule is a seed: it says what is killed, when, and in which mode is written. The suite runs six; `make faults` runs
twenty.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import asyncpg
import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
from pgserver import main_server
from pools import backends_of, lasting_pool, own_pool, unique_name, worker_pids
from waiting import eventually

from raypg import DataLostError, OutcomeUnknownError, QueryPipelineNode, RaypgError, WorkflowConnectionPool, naming
from raypg.embedded import EmbeddedServer

SCHEDULES = int(os.environ.get("RAYPG_FAULT_SCHEDULES", "6"))
ROWS = int(os.environ.get("RAYPG_FAULT_ROWS", "2_000_000"))
BATCH = ROWS // 100
WITHIN = 120.0
"""Seconds in which all rows must have arrived."""


@functools.cache
def rows() -> pa.Table:
    ids = np.arange(ROWS)
    return pa.table({"id": ids, "v": ids * 7 % 1_000_003, "t": [f"row {i}" for i in range(ROWS)]})


BAD = 777_777
"""A row that one of the tables has no place for."""

CHECKSUM = "select count(*), count(distinct id), sum(id)::int8, sum(v)::int8, sum(hashtextextended(t, 0)) from {}"


class Job:
    """A process that writes, as a driver would."""

    async def write(
        self, pool: str, table: str, name: str, batch_id: str, batch_rows: int, data: pa.Table, how: dict[str, Any]
    ) -> int:
        """How many batches the ledger knew already."""
        pipeline = QueryPipelineNode(name=name, connection_pool=pool)
        written = await pipeline.write(data, into=table, batch_id=batch_id, batch_rows=batch_rows, **how)
        return written.known_batches

    async def pid(self) -> int:
        return os.getpid()


class Victims:
    """All that is killed: a server, a pool on it, and a job that writes through that.

    Each answer of the server comes over a connection of its own. What kills gives the process that it has killed.
    """

    def __init__(self, server: EmbeddedServer, pool: WorkflowConnectionPool, rng: random.Random) -> None:
        self.server = server
        self.pool = pool
        self.rng = rng
        self.job: Any = None

    async def write(self, table: str, batch_id: str, data: Any, how: dict[str, Any]) -> int:
        """Write until it succeeds, by one job or the next; the number of calls."""
        for calls in itertools.count(1):
            if self.job is None:
                self.job = ray.remote(num_cpus=0)(Job).remote()
            try:
                await self.job.write.remote(self.pool.name, table, "load", batch_id, BATCH, data, how)
                return calls
            except ray.exceptions.RayActorError:
                print(f"call {calls}: the job died")
                self.job = None
            except (RaypgError, asyncpg.PostgresError, OSError) as error:
                print(f"call {calls}: {type(error).__name__}: {str(error).splitlines()[-1]}")
                await asyncio.sleep(0.2)
        raise AssertionError

    async def statements(self) -> None:
        """Statements beside, so large that the Pipeline actor must be asked for leave. They end with the task."""
        pipeline = QueryPipelineNode(name="beside", connection_pool=self.pool.name)
        while True:
            for _ in range(8):
                await pipeline.add_query("select length($1)", ["x" * 500_000])
            with contextlib.suppress(RaypgError, asyncpg.PostgresError):
                for result in await pipeline.flush():
                    assert not result.success or result.result[0]["length"] == 500_000
            await asyncio.sleep(0.1)

    async def has(self, batch_id: str, batches: int) -> bool:
        """Whether so many batches have arrived."""
        try:
            direct = await asyncpg.connect(**self.server.parameters)
        except (OSError, asyncpg.PostgresError):
            return False
        try:
            query = "select count(*) from raypg.batches where starts_with(batch_id, $1)"
            return bool(await direct.fetchval(query, f"{batch_id}/") >= batches)
        except asyncpg.PostgresError:
            return False  # there is no ledger yet
        finally:
            direct.terminate()

    async def kill(self, kind: str) -> None:
        """Kill one, as soon as there is one, and see that it is dead."""
        killed = await eventually(getattr(self, kind), timeout=30, what=f"there is a {kind} to be killed")
        await eventually(lambda: not is_alive(killed), what=f"the {kind}, process {killed}, is dead")
        if kind == "postgresql":
            await asyncio.to_thread(self.server.start)

    async def worker(self) -> int | None:
        with contextlib.suppress(ray.exceptions.RayError):  # it is just being replaced
            return sigkill(self.rng.choice(list((await worker_pids(self.pool.name)).values())))
        return None

    async def backend(self) -> int | None:
        direct = await asyncpg.connect(**self.server.parameters)
        try:
            found = await backends_of(direct, self.pool.name, control=False)
            if not found:
                return None
            pid: int = self.rng.choice(found)["pid"]
            return pid if await direct.fetchval("select pg_terminate_backend($1)", pid) else None
        finally:
            direct.terminate()

    async def pipeline_actor(self) -> int | None:
        with contextlib.suppress(ValueError, ray.exceptions.RayError):  # it has not begun
            actor = ray.get_actor(naming.PIPELINE_ACTOR, namespace=naming.NAMESPACE)
            return sigkill(await actor.__ray_call__.remote(lambda self: os.getpid()))
        return None

    async def writing_job(self) -> int | None:
        with contextlib.suppress(AttributeError, ray.exceptions.RayError):  # it is just being replaced
            return sigkill(await self.job.pid.remote())
        return None

    async def postgresql(self) -> int | None:
        pid = self.server.pid
        await asyncio.to_thread(self.server.kill)
        return pid


def sigkill(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)
    return pid


def is_alive(pid: int) -> bool:
    """Whether *pid* runs; one that only waits to be noticed by its parent does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


KINDS = ("worker", "postgresql", "writing_job", "backend", "pipeline_actor")

APPEND: dict[str, Any] = {}
UPSERT: dict[str, Any] = {"mode": "upsert", "key": "id"}
IGNORE: dict[str, Any] = {"mode": "ignore", "key": "id"}
QUARANTINE: dict[str, Any] = {"on_bad_rows": "quarantine"}
HOW = (APPEND, UPSERT, APPEND, QUARANTINE, IGNORE, APPEND)


@pytest.fixture(scope="module")
def killed_pool(ray_cluster: Any) -> Iterator[tuple[EmbeddedServer, WorkflowConnectionPool]]:
    """A server, and a pool on it, for all schedules: they have to survive. Its circuit breaker opens."""
    with main_server() as server:
        for pool in lasting_pool(server, max_connections=5, circuit_breaker_recovery_timeout=1.0):
            yield server, pool


@pytest.mark.parametrize("schedule", range(SCHEDULES))
@pytest.mark.timeout(480)
async def test_every_row_exactly_once_whatever_dies(
    killed_pool: tuple[EmbeddedServer, WorkflowConnectionPool], schedule: int
) -> None:
    rng = random.Random(f"write {schedule}")
    victims = Victims(*killed_pool, rng)
    # Any two neighbours have most kinds, any three have all.
    kinds = [KINDS[schedule % 5], KINDS[(schedule + 2) % 5], rng.choice(KINDS)]
    how = HOW[schedule % len(HOW)]
    print(f"seed {f'write {schedule}'!r}: {kinds}, {how or 'append'}")
    beside = asyncio.ensure_future(victims.statements())
    try:
        for number in itertools.count():  # one write does, unless it ends sooner than we can look
            await written_and_killed(victims, kinds, how, f"load_{schedule}_{number}")
            if not kinds:
                break
    finally:
        if beside.done():
            beside.result()
        beside.cancel()


async def written_and_killed(victims: Victims, kinds: list[str], how: dict[str, Any], name: str) -> None:
    """One write into the table *name*, which is its batch id too. *kinds* are killed meanwhile, and removed from the
    list; then every row is there once."""
    key = "primary key" if "key" in how else f"check (id <> {BAD})" if how is QUARANTINE else ""
    await execute(victims.server, f"create table {name} (id int8 {key}, v int8, t text)")
    moments = sorted(victims.rng.sample(range(2, 80), len(kinds)))
    work = asyncio.ensure_future(asyncio.wait_for(victims.write(name, name, ray.put(rows()), how), WITHIN))
    for batches in moments:
        await eventually(lambda: work.done() or victims.has(name, batches), timeout=WITHIN)  # noqa: B023
        if work.done():
            break
        print(f"{kinds[0]} killed after {batches} batches")
        await victims.kill(kinds.pop(0))
    print(f"{await work} calls")
    direct = await asyncpg.connect(**victims.server.parameters)
    found = await direct.fetchrow(CHECKSUM.format(name))
    bad = [BAD] if how is QUARANTINE else []
    texts = await direct.fetchval(
        "select sum(hashtextextended('row ' || i, 0)) from generate_series(0, $1::int8 - 1) i where i <> all($2)",
        ROWS,
        bad,
    )
    ids = np.setdiff1d(np.arange(ROWS), bad)
    assert tuple(found) == (len(ids), len(ids), int(ids.sum()), int((ids * 7 % 1_000_003).sum()), texts)
    noted = "select count(*), sum(rows)::int from raypg.batches where starts_with(batch_id, $1)"
    assert tuple(await direct.fetchrow(noted, f"{name}/")) == (100, len(ids))
    quarantined = "select row, sqlstate from raypg.quarantine where starts_with(batch_id, $1)"
    assert [tuple(row) for row in await direct.fetch(quarantined, f"{name}/")] == [(row, "23514") for row in bad]
    await direct.close()
    await execute(victims.server, f"drop table {name}")


async def execute(server: EmbeddedServer, statement: str) -> None:
    direct = await asyncpg.connect(**server.parameters)
    await direct.execute(statement)
    await direct.close()


async def test_a_killed_job_goes_on_where_it_was(ray_cluster: Any, pg: EmbeddedServer) -> None:
    """The process that writes is killed; the same call in another one writes the rest."""
    async with own_pool(pg, max_connections=4) as pool:
        direct = await asyncpg.connect(**pg.parameters)
        table, name = f"job_{os.getpid()}", unique_name("job")
        await direct.execute(f"create table {table} (id int8, v int8, t text)")
        try:
            data = ray.put(rows().slice(0, 200_000))
            job = ray.remote(num_cpus=0)(Job)
            first = job.remote()
            pid = await first.pid.remote()
            gate = int.from_bytes(os.urandom(4))
            # The fourth batch and all after it wait for us.
            await direct.execute(
                f"""create function {table}_gate() returns trigger language plpgsql as $$ begin
                    if (select count(*) from raypg.batches where pipeline = '{name}') > 3 then
                        perform pg_advisory_xact_lock_shared({gate});
                    end if;
                    return null;
                end $$;
                create trigger gate before insert on {table} execute function {table}_gate();
                select pg_advisory_lock({gate})"""
            )
            work = first.write.remote(pool.name, table, name, "x", 5_000, data, {})

            async def some() -> bool:
                there = "select to_regclass('raypg.batches') is not null"
                query = "select count(*) from raypg.batches where pipeline = $1"
                return bool(await direct.fetchval(there)) and await direct.fetchval(query, name) >= 3

            await eventually(some, timeout=60)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(ray.exceptions.RayError):
                await work
            await direct.execute("select pg_advisory_unlock_all()")
            known = await job.remote().write.remote(pool.name, table, name, "x", 5_000, data, {})
            assert known >= 3
            stored = await direct.fetchrow(f"select count(*), count(distinct id) from {table}")
            assert tuple(stored) == (200_000, 200_000)
        finally:
            await direct.execute(f"select pg_advisory_unlock_all(); drop table {table}; drop function {table}_gate()")
            await direct.close()


async def test_data_whose_owner_died_fails_whole(ray_cluster: Any, pg: EmbeddedServer) -> None:
    async with own_pool(pg, max_connections=3) as pool:

        @ray.remote(num_cpus=0)
        class Owner:
            def make(self, data: pa.Table) -> list[Any]:
                return [ray.put(data)]

            def pid(self) -> int:
                return os.getpid()

        owner = Owner.remote()  # type: ignore[attr-defined]
        (reference,) = ray.get(owner.make.remote(rows().slice(0, 300_000)))
        os.kill(ray.get(owner.pid.remote()), signal.SIGKILL)
        direct = await asyncpg.connect(**pg.parameters)
        table = f"owned_{os.getpid()}"
        await direct.execute(f"create table {table} (id int8, v int8, t text)")
        try:
            pipeline = QueryPipelineNode(name=unique_name("load"), connection_pool=pool)

            async def lost() -> bool:
                try:
                    await pipeline.write(reference, into=table, batch_id="x")
                except DataLostError as error:
                    return "owned the data" in str(error)
                await direct.execute(f"truncate {table}; delete from raypg.batches where pipeline = '{pipeline.name}'")
                return False

            assert await eventually(lost, timeout=30)
            assert await direct.fetchval(f"select count(*) from {table}") == 0
            again = await pipeline.write(rows().slice(0, 1_000), into=table, batch_id="x")
            assert (again.rows, again.known_batches) == (1_000, 0)
        finally:
            await direct.execute(f"drop table {table}")
            await direct.close()


async def test_without_a_batch_id_a_lost_worker_is_an_unknown_outcome(ray_cluster: Any, pg: EmbeddedServer) -> None:
    async with own_pool(pg, max_connections=3) as pool:
        direct = await asyncpg.connect(**pg.parameters)
        table = f"unknown_{os.getpid()}"
        await direct.execute(f"create table {table} (id int8, v int8, t text)")
        try:
            blocker = direct.transaction()
            await blocker.start()
            await direct.execute(f"lock table {table}")
            pipeline = QueryPipelineNode(name=unique_name("load"), connection_pool=pool)
            work = asyncio.ensure_future(pipeline.write(rows().slice(0, 100), into=table))
            other = await asyncpg.connect(**pg.parameters)
            waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like $1"
            await eventually(lambda: other.fetchval(waits, f"%{table}%"), timeout=30)
            for pid in (await worker_pids(pool.name)).values():
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(OutcomeUnknownError, match="batch_id="):
                await work
            await blocker.rollback()
            await other.close()
        finally:
            await direct.execute(f"drop table {table}")
            await direct.close()


async def test_a_batch_that_a_frozen_worker_holds_is_written_by_another(
    ray_cluster: Any, pg: EmbeddedServer, schema: str, direct: asyncpg.Connection
) -> None:
    """Its connection stays, and with it the transaction that has noted the batch, until the Pool actor ends it."""
    table = f"{schema}.item"
    await direct.execute(f"create table {table} (id int8, v int8, t text)")
    async with own_pool(pg, max_connections=4, workers=2) as pool:
        pids = await worker_pids(pool.name)
        pipeline = QueryPipelineNode(name=unique_name("load"), connection_pool=pool)
        async with direct.transaction():
            await direct.execute(f"lock table {table} in share mode")
            work = asyncio.ensure_future(pipeline.write(rows().slice(0, 100), into=table, batch_id="x"))
            waiting = (
                "select pid, split_part(application_name, ':', 3)::int as worker from pg_stat_activity "
                "where pid = (select pid from pg_locks where not granted and relation = $1::text::regclass)"
            )
            other = await asyncpg.connect(**pg.parameters)
            holder, worker = await eventually(lambda: other.fetchrow(waiting, table), timeout=30)
            os.kill(pids[worker], signal.SIGSTOP)
        try:
            holds = "select state from pg_stat_activity where pid = $1"
            await eventually(lambda: _is(other.fetchval(holds, holder), "idle in transaction"))
            written = await asyncio.wait_for(work, 40)
            assert (written.rows, list(written.workers)) == (100, [1 - worker])
            assert await other.fetchval(holds, holder) is None
            assert await other.fetchval(f"select count(*) from {table}") == 100
            await other.close()
        finally:
            os.kill(pids[worker], signal.SIGKILL)


async def _is(answer: Any, expected: str) -> bool:
    return bool(await answer == expected)
