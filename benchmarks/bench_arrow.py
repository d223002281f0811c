"""Whole tables: Ray Data through a pool against ``ray.data.read_sql``, and Arrow against rows."""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import asyncpg
import psycopg
import ray
from measure import ROUNDS, Setting, answer, compare, idle, ratio, report
from shared_memory import memory_of

from raypg import PostgresDatasource, naming

ROWS = int(os.environ.get("RAYPG_BENCH_ROWS", "5000000"))
"""Of the table. What Ray Data does for a dataset before the first row and after the last one is most of a small one:
``results.md`` has 1 and 10 million too."""
RESULT = min(ROWS, 500_000)
QUERY = "SELECT * FROM events"
BLOCKS = 16
"""``override_num_blocks`` where it is given. Without, Ray Data makes 200 blocks of this table, however it is read; the
most that it takes for ``read_sql`` on PostgreSQL is 1."""
MEGABYTE = 1024 * 1024


async def timed(read: Callable[[], int]) -> float:
    """Rows per second, when Ray has freed what the read before has left behind."""
    await idle()
    started = time.perf_counter()
    assert await asyncio.to_thread(read) == ROWS
    return ROWS / (time.perf_counter() - started)


def by_datasource(pool: str, consistent: bool = True, blocks: int | None = None, itself: bool = False) -> int:
    """Rows that Ray Data reads through the pool; *itself*: the source chooses how many blocks to make."""
    source = PostgresDatasource(pool, table="events", consistent=consistent)
    dataset = source.dataset() if itself else ray.data.read_datasource(source, override_num_blocks=blocks)
    count = dataset.materialize().count()
    source.close()
    return int(count)


def by_read_sql(parameters: dict[str, Any], blocks: int | None = None) -> int:
    """Rows that Ray Data reads with what it brings."""
    names = {"database": "dbname"}
    connect = functools.partial(psycopg.connect, **{names.get(key, key): value for key, value in parameters.items()})
    return int(ray.data.read_sql(QUERY, connect, override_num_blocks=blocks).materialize().count())


async def stream_memory(here: Setting, worker: int, rows: int) -> tuple[float, float]:
    """Most megabytes that the worker and this process grew by while *rows* rows of 1 kB were streamed."""
    before, own = memory_of(worker), memory_of(os.getpid())
    most = mine = 0
    seen = 0
    async for batch in here.pool.stream(f"SELECT n, repeat('x', 1000) AS t FROM generate_series(1, {rows}) n"):
        seen += batch.num_rows
        most, mine = max(most, memory_of(worker) - before), max(mine, memory_of(os.getpid()) - own)
    assert seen == rows
    return most / MEGABYTE, mine / MEGABYTE


async def make_events(here: Setting) -> None:
    await here.pool.execute("CREATE TABLE IF NOT EXISTS events (id bigint, at timestamp, label text, score float8)")
    if await here.pool.fetchval("SELECT count(*) FROM events") == ROWS:
        return
    await here.pool.execute(
        "INSERT INTO events SELECT n, timestamp '2020-01-01' + n * interval '1 s', 'event number ' || n, n / 3.0 "
        "FROM generate_series(1, $1::int) n",
        ROWS,
        timeout=120,
    )
    await here.pool.execute("VACUUM ANALYZE events")


async def ray_data_reads(here: Setting) -> None:
    ray.data.DataContext.get_current().enable_progress_bars = False
    await make_events(here)
    name, parameters = here.pool.name, here.server.parameters
    contenders: dict[str, Callable[[], int]] = {
        "PostgresDatasource": lambda: by_datasource(name),
        "PostgresDatasource, consistent=False": lambda: by_datasource(name, False),
        "PostgresDatasource.dataset()": lambda: by_datasource(name, itself=True),
        "ray.data.read_sql": lambda: by_read_sql(parameters),
        f"PostgresDatasource, {BLOCKS} blocks": lambda: by_datasource(name, blocks=BLOCKS),
        "ray.data.read_sql, 1 block": lambda: by_read_sql(parameters, 1),
    }
    figures = await compare(
        {what: functools.partial(timed, read) for what, read in contenders.items()},
        rounds=min(ROUNDS, 5),
    )
    few = (f"PostgresDatasource, {BLOCKS} blocks", "ray.data.read_sql, 1 block")
    own = "PostgresDatasource.dataset()"
    report(
        f"Ray Data reads a table of {ROWS:,} rows",
        "rows/s",
        figures,
        [
            f"dataset() ÷ read_sql, each as it is called: {ratio(figures, own, 'ray.data.read_sql'):.2f} (at least 4)",
            f"dataset() ÷ read_sql, 1 block: {ratio(figures, own, few[1]):.2f} (at least 4)",
            f"read_datasource ÷ read_sql: {ratio(figures, 'PostgresDatasource', 'ray.data.read_sql'):.2f} (at least 4)",
            f"with override_num_blocks={BLOCKS} and 1, the most that it takes: {ratio(figures, *few):.2f} (at least 4)",
            "without it Ray Data divides what was read into 200 blocks, which costs it the same whoever has read",
        ],
    )


async def one_result(here: Setting) -> None:
    await make_events(here)
    direct = await asyncpg.connect(**here.server.parameters)
    query = f"{QUERY} LIMIT {RESULT}"

    async def awaited(read: Any) -> float:
        started = time.perf_counter()
        result = await read()
        assert (result.num_rows if hasattr(result, "num_rows") else len(result)) == RESULT
        return RESULT / (time.perf_counter() - started)

    single = await compare(
        {
            "pool.fetch_arrow": lambda: awaited(lambda: here.pool.fetch_arrow(query)),
            "asyncpg fetch": lambda: awaited(lambda: direct.fetch(query)),
        },
        rounds=min(ROUNDS, 5),
    )
    report(
        f"{RESULT:,} rows as one result",
        "rows/s",
        single,
        [f"fetch_arrow ÷ asyncpg fetch: {ratio(single, 'pool.fetch_arrow', 'asyncpg fetch'):.2f}"],
    )
    await direct.close()


async def memory(here: Setting) -> None:
    actor = ray.get_actor(naming.worker_actor(here.pool.name, 0), namespace=naming.NAMESPACE)
    worker = await actor.__ray_call__.remote(lambda self: os.getpid())
    grown = {}
    for megabytes in (200, 1000):
        theirs, ours = await stream_memory(here, worker, megabytes * 1000)
        grown[f"worker, {megabytes} MB streamed"] = [theirs]
        grown[f"reader, {megabytes} MB streamed"] = [ours]
    report("Memory that a stream takes", "MB", grown, ["most at any time, beyond what was there before"])


QUESTIONS = {"ray_data": ray_data_reads, "one_result": one_result, "memory": memory}


if __name__ == "__main__":
    answer(QUESTIONS)
