"""Pools for tests: made with a name of their own, looked at from outside, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import secrets
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

import asyncpg
import ray
from waiting import eventually

from raypg import QueryPipelineNode, WorkflowConnectionPool, cluster, naming
from raypg._compat import cluster_id
from raypg.actors.worker import PoolWorker, application_prefix
from raypg.embedded import EmbeddedServer

NO_BREAKER = {"circuit_breaker_failure_threshold": 1_000_000, "circuit_breaker_error_rate": 1.0}
"""Settings of a pool whose breaker never opens by itself: for tests of what happens before it does."""

DETECTED_WITHIN = 10.0
"""Seconds until a silent worker is known to be lost: 5, on a machine that does nothing else."""

PASSED_ON_WITHIN = 20.0
"""Seconds until others have its share: 10, on a machine that does nothing else."""


def unique_name(prefix: str = "t") -> str:
    """A pool name that no other test uses."""
    return f"{prefix}-{secrets.token_hex(5)}"


@contextlib.asynccontextmanager
async def own_pool(server: EmbeddedServer, **settings: Any) -> AsyncIterator[WorkflowConnectionPool]:
    """A pool on *server* for one test alone, initialized; ended after the block."""
    handle = WorkflowConnectionPool(**{"name": unique_name(), **server.parameters, **settings})
    try:
        await handle.process({"operation": "initialize"})
        yield handle
    finally:
        await handle.close()


def lasting_pool(server: EmbeddedServer, **settings: Any) -> Iterator[WorkflowConnectionPool]:
    """The same for a fixture that outlives the event loops of its tests."""
    handle = WorkflowConnectionPool(**{"name": unique_name(), **server.parameters, **settings})
    asyncio.run(handle.process({"operation": "initialize"}))
    yield handle
    asyncio.run(handle.close())


async def grant(worker: PoolWorker, budget: int, least: int = 0) -> None:
    """Give a worker that is not in Ray a budget for ever, of which it keeps *least* connections open."""
    await worker.ping(worker._newest + 1, worker._incarnation, budget, math.inf, least, [], 1, 1)


async def worker_pids(name: str) -> dict[int, int]:
    """Worker index → process id, of the workers of pool *name*."""
    found = {}
    for index in range(100):
        try:
            actor = ray.get_actor(naming.worker_actor(name, index), namespace=naming.NAMESPACE)
        except ValueError:
            break
        found[index] = await actor.__ray_call__.remote(lambda self: os.getpid())
    return found


async def states(pool: WorkflowConnectionPool) -> dict[int, tuple[str, int]]:
    """Number of a worker → its state and share, as the Pool actor has it."""
    kind, status = await asyncio.wait_for(cluster.find(pool.name).status.remote(), 10)
    assert kind == "ok"
    return {worker["index"]: (worker["state"], worker["budget"]) for worker in status["workers"]}


async def status_of_all(pool: WorkflowConnectionPool) -> dict[str, Any]:
    """``get_status``, when every worker has its part in it: of one that did not answer in time it tells nothing, which
    looks like a worker with nothing to do."""
    told: dict[str, Any] = {}

    async def complete() -> bool:
        told.update(await pool.process({"operation": "get_status"}))
        return all(worker["reachable"] for worker in told["workers"])

    await eventually(complete, timeout=60)
    return told


TOLD_LATELY = 0.4
"""Age in seconds of a worker's part in an answer that was not waited for in vain, which takes Metrics half a second."""


async def figures(pool: WorkflowConnectionPool, workers: int = 1) -> dict[str, Any]:
    """``get_comprehensive_status``, when each of at least *workers* has just told its part: of one that did not answer
    in time it has what that told a second ago. What was counted until then is in every later answer, too."""
    told: dict[str, Any] = {}

    def age(of: Any) -> float:
        return (datetime.fromisoformat(told["as_of"]) - datetime.fromisoformat(of["as_of"])).total_seconds()

    async def complete() -> bool:
        told.update(await pool.process({"operation": "get_comprehensive_status"}))
        return len(told["workers"]) >= workers and all(age(one) < TOLD_LATELY for one in told["workers"].values())

    await eventually(complete, timeout=60)
    return told


async def nothing_leased(pool: WorkflowConnectionPool) -> bool:
    """Whether nobody holds a lease."""
    return not any(connection["lease"] for connection in (await status_of_all(pool))["connections"].values())


_OURS = """
SELECT pid, state, application_name FROM pg_stat_activity
WHERE backend_type = 'client backend' AND starts_with(application_name, $1)
"""


async def backends_of(direct: asyncpg.Connection, name: str, *, control: bool = True) -> list[asyncpg.Record]:
    """The server's own list of the client backends of pool *name*: pid, state, application_name."""
    rows = await direct.fetch(_OURS, application_prefix(cluster_id(), name))
    return [row for row in rows if control or ":control:" not in row["application_name"]]


RUNNING = "select count(*) from pg_stat_activity where state = 'active' and query like $1 and pid <> pg_backend_pid()"


async def running(direct: asyncpg.Connection, mark: str) -> int:
    """How many statements with *mark* in their text the server runs now, but for those of *direct*."""
    return int(await direct.fetchval(RUNNING, f"%{mark}%"))


async def all_open(pool: WorkflowConnectionPool, direct: asyncpg.Connection, count: int) -> None:
    """Wait until the workers have opened *count* connections."""

    async def so() -> bool:
        return len(await backends_of(direct, pool.name, control=False)) == count

    await eventually(so, 20)


class CapWatch:
    """Counts the client backends of a pool, over a connection of its own, as often as it can."""

    def __init__(self, server: EmbeddedServer, name: str, every: float = 0.01) -> None:
        self._server = server
        self._name = name
        self._every = every
        self._task: asyncio.Task[None] | None = None
        self.counts: list[int] = []
        self.looks: list[float] = []  # when each of them was
        self.seconds = 0.0
        self._away = 0.0  # seconds in which there was no server to ask

    @property
    def most(self) -> int:
        """Most backends seen at once."""
        return max(self.counts)

    @property
    def rate(self) -> float:
        """Looks per second."""
        return len(self.counts) / self.seconds

    def seen_enough(self) -> bool:
        """Whether so many looks were made as :meth:`held` asks for: in a block that is soon over, to be waited for."""
        return len(self.looks) >= 20

    def looked_well(self) -> None:
        """Asserts that there were 20 looks at least, and no more than 0.05 s from one to the next but now and then."""
        assert self.seen_enough()
        assert statistics.median(later - look for look, later in itertools.pairwise(self.looks)) < 0.05

    def held(self, cap: int) -> None:
        """Asserts that never more than *cap* were seen, and that it was looked well."""
        self.looked_well()
        assert self.most <= cap

    async def _watch(self) -> None:
        while True:
            try:
                self.counts.append(len(await backends_of(self._connection, self._name)))
                self.looks.append(time.monotonic())
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
                self._connection.terminate()
                since = asyncio.get_running_loop().time()
                await self._connect_again()
                self._away += asyncio.get_running_loop().time() - since
            await asyncio.sleep(self._every)

    async def _connect_again(self) -> None:
        """The server was restarted; meanwhile there is nothing to count."""
        while self._connection.is_closed():
            try:
                self._connection = await asyncpg.connect(**self._server.parameters)
            except (OSError, asyncpg.PostgresError):
                await asyncio.sleep(self._every)

    async def __aenter__(self) -> CapWatch:
        self._connection = await asyncpg.connect(**self._server.parameters)
        self._started = asyncio.get_running_loop().time()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        failed = self._task.done()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self.seconds = asyncio.get_running_loop().time() - self._started - self._away
        self._connection.terminate()
        assert not failed


def pipeline_of(pool: WorkflowConnectionPool, **more: Any) -> QueryPipelineNode:
    """A pipeline over *pool*."""
    return QueryPipelineNode(name="test", connection_pool=pool, **more)


async def add_all(pipeline: QueryPipelineNode, sql: str, rows: Sequence[Sequence[Any]]) -> list[str]:
    """Add *sql* once for each row; the ids of the queries."""
    return [await pipeline.add_query(sql, row) for row in rows]


def outcomes(results: Iterable[Any]) -> Counter[str]:
    """How often each kind of error is among *results* of ``gather(…, return_exceptions=True)``; ``ok`` for none."""
    return Counter(type(result).__name__ if isinstance(result, BaseException) else "ok" for result in results)


async def after(condition: Any, since: float, limit: float, what: str) -> None:
    """Wait for *condition*, and say how long after *since* it was met."""
    await eventually(condition, limit + 20, what)
    took = time.monotonic() - since
    print(f"{what} after {took:.1f} s")
    assert took < limit, what
