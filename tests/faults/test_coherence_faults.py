"""Writes while caches, workers and the version authority die or hang: each wait ends, and nobody answers with less than
the database."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
import ray
from pools import NO_BREAKER, lasting_pool, worker_pids
from waiting import eventually

from raypg import WorkflowConnectionPool, cluster, get_pool, naming
from raypg.coherence import Coherence, coherence_of
from raypg.embedded import EmbeddedServer
from raypg.errors import OutcomeUnknownError

SLACK = 4.0
"""Seconds that a machine with much to do may add to any wait."""


@ray.remote(num_cpus=0, max_concurrency=10)
class Holder:
    """A process that keeps the number of rows of a table."""

    async def hold(self, pool: str, table: str) -> int:
        """Begin to; returns when it has."""
        self.pool = get_pool(pool)
        self.table = table
        self.tables = frozenset((".".join(f'"{part}"' for part in table.split(".")),))
        self.coherence = coherence_of(await self.pool._dispatcher())
        self.coherence.on_change(self._drop)
        self.count: int | None = None
        await self.coherence.start()
        await eventually(self._fill, 20)
        return os.getpid()

    def _drop(self, tables: frozenset[str] | None) -> None:
        if tables is None or tables & self.tables:
            self.count = None

    async def _fill(self) -> bool:
        mark = self.coherence.mark()
        if not self.coherence.may_keep(self.tables):
            return False
        count = await self.pool.fetchval(f"select count(*) from {self.table}")
        if self.coherence.unchanged(self.tables, mark):
            self.count = count
        return self.count is not None

    async def answer(self) -> int | None:
        """The number that it keeps, if it may use it."""
        return self.count if self.coherence.is_held() else None

    async def refill(self) -> None:
        """Keep it again."""
        await eventually(self._fill, 30)


@pytest.fixture(scope="module")
def shared(ray_cluster: Any, pg18: EmbeddedServer) -> Iterator[WorkflowConnectionPool]:
    yield from lasting_pool(pg18, max_connections=6, workers=2, **NO_BREAKER)


@pytest.fixture
async def table(schema: str, direct: asyncpg.Connection) -> str:
    """Name of a table of numbers, empty."""
    await direct.execute("create table kept (id int)")
    return f"{schema}.kept"


async def kept(holder: Any) -> int:
    """What *holder* answers. If its lease has run out, as when a process stood still, it asks the database again."""
    while True:
        answer: int | None = await holder.answer.remote()
        if answer is not None:
            return answer
        await holder.refill.remote()


async def seconds(work: Any) -> float:
    began = time.monotonic()
    await work
    return time.monotonic() - began


async def test_a_cache_that_is_killed_or_hangs_holds_up_writes_for_a_lease_at_most(
    shared: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    dies, hangs = Holder.remote(), Holder.remote()
    first, second = await asyncio.gather(dies.hold.remote(shared.name, table), hangs.hold.remote(shared.name, table))
    assert await kept(dies) == await kept(hangs) == 0
    os.kill(first, signal.SIGKILL)
    assert await seconds(shared.execute(f"insert into {table} values (1)")) < 2.1 + SLACK
    await hangs.refill.remote()
    assert await kept(hangs) == 1
    os.kill(second, signal.SIGSTOP)
    try:
        took = await seconds(shared.execute(f"insert into {table} values (2)"))
        assert took < 2.1 + SLACK
        assert await seconds(shared.execute(f"insert into {table} values (3)")) < 0.5 + SLACK  # nobody is waited for
    finally:
        os.kill(second, signal.SIGCONT)
    assert await hangs.answer.remote() in (None, 3)
    await hangs.refill.remote()
    assert await kept(hangs) == 3


async def test_a_worker_that_is_killed_while_it_writes_leaves_nothing_stale(
    shared: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    holder = Holder.remote()
    await holder.hold.remote(shared.name, table)
    pids = await worker_pids(shared.name)
    writing = [
        asyncio.ensure_future(shared.execute(f"insert into {table} select 1 from pg_sleep(5)")) for _ in range(4)
    ]
    asleep = "select count(*) from pg_stat_activity where query like $1 and wait_event = 'PgSleep'"
    await eventually(lambda: direct.fetchval(asleep, f"insert into {table}%"))
    os.kill(pids[0], signal.SIGKILL)
    outcomes = await asyncio.gather(*writing, return_exceptions=True)
    assert any(isinstance(outcome, OutcomeUnknownError) for outcome in outcomes)
    assert await kept(holder) == await direct.fetchval(f"select count(*) from {table}")
    assert await seconds(shared.execute(f"insert into {table} values (2)")) < 4 + SLACK


async def test_without_the_authority_writes_wait_for_old_leases_and_go_on(
    shared: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    holder = Holder.remote()
    await holder.hold.remote(shared.name, table)
    await shared.fetchval("select 1")  # the Pool actor is asked where the workers are
    actor = cluster.find(shared.name)
    pid = await actor.__ray_call__.remote(lambda self: os.getpid())
    os.kill(pid, signal.SIGSTOP)  # it hangs
    try:
        assert await seconds(shared.execute(f"insert into {table} values (1)")) < 4.1 + SLACK
        assert await holder.answer.remote() is None
    finally:
        os.kill(pid, signal.SIGCONT)
    await holder.refill.remote()
    assert await kept(holder) == 1
    ray.kill(actor, no_restart=False)  # it dies, and starts again
    assert await seconds(shared.execute(f"insert into {table} values (2)")) < 4.1 + SLACK
    assert await holder.answer.remote() in (None, 2)
    await holder.refill.remote()
    assert await kept(holder) == 2


async def test_a_worker_that_hangs_takes_the_leases_away_and_no_longer_than_it_is_known(
    shared: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    holder = Holder.remote()
    await holder.hold.remote(shared.name, table)
    pid = (await worker_pids(shared.name))[0]
    os.kill(pid, signal.SIGSTOP)
    try:

        async def lost() -> bool:
            return await holder.answer.remote() is None

        await eventually(lost, 4.1 + SLACK)  # it might write without having asked
        await asyncio.wait_for(holder.refill.remote(), 30)  # when its connections have ended
    finally:
        os.kill(pid, signal.SIGCONT)
    await shared.execute(f"insert into {table} values (1)")
    assert await holder.answer.remote() in (None, 1)


async def test_a_write_costs_nothing_when_the_last_cache_is_gone(
    shared: WorkflowConnectionPool, schema: str, table: str
) -> None:
    coherence: Coherence = coherence_of(await shared._dispatcher())
    await coherence.start()
    await eventually(lambda: coherence.may_keep(frozenset((f'"{schema}"."kept"',))))
    watched = [await watching(shared.name, index) for index in (0, 1)]
    assert watched == [True, True]
    await coherence.close()

    async def none() -> bool:
        return [await watching(shared.name, index) for index in (0, 1)] == [False, False]

    await eventually(none, 6 + SLACK)


async def watching(pool: str, index: int) -> bool:
    """Whether that worker asks before it writes."""
    actor = ray.get_actor(naming.worker_actor(pool, index), namespace=naming.NAMESPACE)
    return bool(await actor.__ray_call__.remote(lambda self: self._engine.writes.watched))
