"""The Ray job of ``raypg demo``, submitted as any job: it knows the pool's name and nothing else of the database.

``python -m raypg.demo_job POOL FLIGHTS``. What the demo's screen shows is read from lines that it prints.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import ray

from raypg import QueryPipelineNode, WorkflowConnectionPool, flights, get_pool

if TYPE_CHECKING:
    import pyarrow

MARK = "raypg-demo:"
"""What a line for the demo's screen begins with."""

ONE_BY_ONE = 2_000
ARROW_ROWS = 32_768
TASKS = 200
ACTORS = 4
COROUTINES = 200
QUERIES = 2_000

ROUTES = "SELECT origin, dest FROM flights GROUP BY origin, dest ORDER BY count(*) DESC, origin, dest LIMIT $1"
ROUTE = """
SELECT carrier, count(*) AS flights, avg(arr_delay)::float8 AS delay
FROM flights WHERE origin = $1 AND dest = $2 GROUP BY carrier ORDER BY flights DESC
"""


def tell(kind: str, **what: Any) -> None:
    """Print one line for the demo's screen."""
    print(MARK, json.dumps({"kind": kind, **what}), flush=True)


@contextlib.asynccontextmanager
async def progress(name: str, total: int, done: Callable[[], int]) -> AsyncIterator[None]:
    """Tell how far something is, ten times a second, until the block ends."""

    async def report() -> None:
        while True:
            tell("bar", name=name, done=min(done(), total), total=total)
            await asyncio.sleep(0.1)

    reporter = asyncio.create_task(report())
    try:
        yield
    finally:
        reporter.cancel()
    tell("bar", name=name, done=total, total=total)


async def load_one_by_one(pool: WorkflowConnectionPool, rows: list[tuple[Any, ...]]) -> None:
    """Insert a sample the plain way: a statement, its answer, the next statement."""
    await pool.execute(flights.create_table("flights_one_by_one"))
    statement, done = flights.insert("flights_one_by_one"), 0
    started = time.perf_counter()
    async with progress("one by one", len(rows), lambda: done):
        for row in rows:
            await pool.execute(statement, *row)
            done += 1
    tell("loaded", name="one by one", rows=done, seconds=time.perf_counter() - started)


async def load_through_pipeline(pool: WorkflowConnectionPool, rows: list[tuple[Any, ...]]) -> None:
    """Insert all of them through a pipeline: the same statement for each row, sent together."""
    await pool.execute(flights.create_table("flights"))
    statement = flights.insert("flights")
    started = time.perf_counter()
    pipeline = QueryPipelineNode(name="flights", connection_pool=pool, batch_size=1_000)

    def finished() -> int:
        return int(pipeline.get_status()["total_batches"]) * pipeline.batch_size

    async with pipeline, progress("pipeline", len(rows), finished):
        for row in rows:
            await pipeline.add_query(statement, row)
        results = await pipeline.flush()
    seconds = time.perf_counter() - started
    failed = [result for result in results if not result.success] if results.failures else []
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(results)} rows were refused, the first because: {failed[0].error}")
    tell("loaded", name="pipeline", rows=len(results), seconds=seconds)


async def load_arrow(pool: WorkflowConnectionPool, table: pyarrow.Table) -> None:
    """Copy all of them as they are: Arrow batches through Ray's object store, COPY from there."""
    await pool.execute(flights.create_table("flights_arrow"))
    started = time.perf_counter()
    done = 0

    async def batches() -> AsyncIterator[pyarrow.RecordBatch]:
        nonlocal done
        for batch in table.to_batches(ARROW_ROWS):
            yield batch
            done += batch.num_rows

    async with (
        QueryPipelineNode(name="flights", connection_pool=pool) as pipeline,
        progress("Arrow", table.num_rows, lambda: done),
    ):
        written = await pipeline.write(batches(), into="flights_arrow", batch_rows=ARROW_ROWS)
    tell("loaded", name="Arrow", rows=written.rows, seconds=time.perf_counter() - started)


def ask_in_task(pool_name: str, origin: str, dest: str) -> tuple[float, int]:
    """A plain task: find the pool by its name, ask about one route. Returns (milliseconds, flights)."""

    async def ask() -> tuple[float, int]:
        started = time.perf_counter()
        rows = await get_pool(pool_name).fetch(ROUTE, origin, dest)
        return (time.perf_counter() - started) * 1000, sum(row["flights"] for row in rows)

    return asyncio.run(ask())


class Asker:
    """An actor with many coroutines, all of which use the pool at the same time."""

    def __init__(self, pool_name: str) -> None:
        self._pool = get_pool(pool_name)
        self._done = 0

    async def done(self) -> int:
        """Queries so far."""
        return self._done

    async def ask(self, routes: list[tuple[str, str]], coroutines: int, queries: int) -> list[tuple[float, int]]:
        """Ask *queries* times from that many coroutines; (milliseconds, flights) of each, in no order."""
        numbers = iter(range(queries))
        answers: list[tuple[float, int]] = []

        async def coroutine() -> None:
            for number in numbers:
                started = time.perf_counter()
                rows = await self._pool.fetch(ROUTE, *routes[number % len(routes)])
                answers.append(((time.perf_counter() - started) * 1000, sum(row["flights"] for row in rows)))
                self._done += 1

        await asyncio.gather(*(coroutine() for _ in range(coroutines)))
        return answers


def asked(name: str, answers: list[tuple[float, int]], seconds: float, expected: int) -> None:
    """Tell how long queries took, after a look at whether they counted what is there."""
    counted = sum(count for _, count in answers)
    if counted != expected:
        raise RuntimeError(f"{name}: the queries counted {counted} flights, {expected} are there")
    times = sorted(milliseconds for milliseconds, _ in answers)
    quantile = {f"p{part}": times[min(len(times) - 1, len(times) * part // 100)] for part in (50, 95)}
    tell("asked", name=name, queries=len(times), seconds=seconds, **quantile)


async def ask_from_tasks(pool: WorkflowConnectionPool, routes: list[tuple[str, str]], flights_of: list[int]) -> None:
    """200 tasks, as many at once as there are CPUs."""
    chosen = [number % len(routes) for number in range(TASKS)]
    started = time.perf_counter()
    task = ray.remote(num_cpus=1)(ask_in_task)
    pending = [task.remote(pool.name, *routes[number]) for number in chosen]
    finished = 0
    answers: list[tuple[float, int]] = []
    async with progress("tasks", TASKS, lambda: finished):
        for answer in asyncio.as_completed(pending):
            answers.append(await answer)
            finished += 1
    asked("tasks", answers, time.perf_counter() - started, sum(flights_of[number] for number in chosen))


async def ask_from_actors(pool: WorkflowConnectionPool, routes: list[tuple[str, str]], flights_of: list[int]) -> None:
    """200 coroutines at once, in 4 actors."""
    actors = [ray.remote(num_cpus=0)(Asker).remote(pool.name) for _ in range(ACTORS)]
    await asyncio.gather(*(actor.done.remote() for actor in actors))  # they are there
    each = QUERIES // ACTORS
    started = time.perf_counter()
    pending = asyncio.gather(*(actor.ask.remote(routes, COROUTINES // ACTORS, each) for actor in actors))
    finished = 0

    async def watch() -> None:
        nonlocal finished
        while not pending.done():
            finished = sum(await asyncio.gather(*(actor.done.remote() for actor in actors)))
            await asyncio.sleep(0.1)

    async with progress("coroutines", QUERIES, lambda: finished):
        watcher = asyncio.create_task(watch())
        parts = await pending
        seconds = time.perf_counter() - started
        await watcher
    expected = sum(flights_of[number % len(routes)] for number in range(each)) * ACTORS
    asked("coroutines", [answer for part in parts for answer in part], seconds, expected)


async def main(pool_name: str, count: int) -> None:
    """Load *count* flights, then ask about them."""
    pool = get_pool(pool_name)
    table = flights.read(count)
    tell("source", sums=flights.sums(table))
    rows = flights.rows(table)
    await load_one_by_one(pool, rows[:ONE_BY_ONE])
    await load_through_pipeline(pool, rows)
    await load_arrow(pool, table)
    await pool.execute("CREATE INDEX ON flights (origin, dest)")
    await pool.execute("ANALYZE flights")
    routes = [(row["origin"], row["dest"]) for row in await pool.fetch(ROUTES, TASKS)]
    counted = await asyncio.gather(
        *(pool.fetchval("SELECT count(*) FROM flights WHERE origin = $1 AND dest = $2", *route) for route in routes)
    )
    await ask_from_tasks(pool, routes, counted)
    await ask_from_actors(pool, routes, counted)


if __name__ == "__main__":
    ray.init(log_to_driver=False)
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
