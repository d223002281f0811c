"""The cache: what it costs those who write."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator

import ray
from measure import Setting, answer, compare, rate, ratio, report

from raypg import QueryPipelineNode, WorkflowConnectionPool, naming
from raypg.coherence import Coherence, coherence_of

WRITES = 4_000
ROWS = 300_000
CLIENTS = 32
PAUSES = 40
LEAST = 0.9
"""Write throughput beside a cache, of that without one."""

INSERT = "INSERT INTO written VALUES ($1, 'x')"
TABLE = frozenset(('"public"."written"',))


@contextlib.asynccontextmanager
async def kept(pool: WorkflowConnectionPool) -> AsyncIterator[Coherence]:
    """A cache that wants to keep results of the table, whenever it may, as one does that is asked for them all the
    time."""
    coherence = coherence_of(await pool._dispatcher())
    await coherence.start()

    async def want() -> None:
        while True:
            coherence.may_keep(TABLE)
            await asyncio.sleep(0.005)

    wanting = asyncio.ensure_future(want())
    try:
        while not coherence.may_keep(TABLE):  # noqa: ASYNC110 - as the benchmark's own condition
            await asyncio.sleep(0.01)
        yield coherence
    finally:
        wanting.cancel()
        await coherence.close()


async def messages(pool: WorkflowConnectionPool) -> int:
    """How often the workers have asked the version authority."""
    actor = ray.get_actor(naming.worker_actor(pool.name, 0), namespace=naming.NAMESPACE)
    return int(await actor.__ray_call__.remote(lambda self: self._engine.writes.messages))


async def writes_beside_a_cache(here: Setting) -> None:
    plain = here.pool
    await plain.execute("CREATE TABLE written (id int, note text)")
    beside = WorkflowConnectionPool(name="bench_kept", max_connections=9, **here.server.parameters)
    await beside.process({"operation": "initialize"})
    pools = {"no cache": plain, "a cache shares the table": beside}

    def singly(pool: WorkflowConnectionPool, clients: int, count: int) -> object:
        async def run() -> float:
            return await rate(lambda number: pool.execute(INSERT, number), count, clients)

        return run

    def pipelined(pool: WorkflowConnectionPool) -> object:
        async def run() -> float:
            node = QueryPipelineNode(name=f"cache_{pool.name}", connection_pool=pool, batch_size=1_000)
            started = time.perf_counter()
            for number in range(ROWS):
                await node.add_query(INSERT, [number])
            assert not (await node.flush()).failures
            seconds = time.perf_counter() - started
            await node.close()
            return ROWS / seconds

        return run

    def seldom(pool: WorkflowConnectionPool) -> object:
        async def run() -> float:
            took = []
            for number in range(PAUSES):
                await asyncio.sleep(0.3)  # the intent of the write before is over, the table is shared again
                began = time.perf_counter()
                await pool.execute(INSERT, number)
                took.append((time.perf_counter() - began) * 1000)
            return statistics.median(took)

        return run

    async with kept(beside) as coherence:
        for title, unit, contenders in (
            (f"{CLIENTS} clients that insert single rows", "writes/s",
             {name: singly(pool, CLIENTS, WRITES) for name, pool in pools.items()}),
            ("one client that inserts single rows", "writes/s",
             {name: singly(pool, 1, WRITES // 8) for name, pool in pools.items()}),
            ("a pipeline of inserts", "rows/s", {name: pipelined(pool) for name, pool in pools.items()}),
        ):  # fmt: skip
            asked, taken = await messages(beside), coherence.invalidations + coherence.flushes
            figures = await compare(contenders)  # type: ignore[arg-type]
            asked = await messages(beside) - asked
            taken = coherence.invalidations + coherence.flushes - taken
            share = ratio(figures, "a cache shares the table", "no cache")
            report(
                f"Writes beside a cache: {title}", unit, figures,
                [
                    f"beside a cache {share:.2f} of the throughput (target: at least {LEAST})",
                    f"messages to the version authority: {asked} in {len(figures['no cache']) + 1} runs; "
                    f"results were taken back {taken} times",
                ],
            )  # fmt: skip
        figures = await compare({name: seldom(pool) for name, pool in pools.items()}, 3)  # type: ignore[misc]
        report(
            "Writes beside a cache: a write now and then, which takes back results each time", "ms", figures,
            [f"{ratio(figures, 'a cache shares the table', 'no cache'):.2f} times as long"],
        )  # fmt: skip
    await beside.close()


if __name__ == "__main__":
    answer({"writes": writes_beside_a_cache})
