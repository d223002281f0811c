"""Writes through the pipeline: single-row INSERTs against other ways, bad rows, the cost of adding, memory."""

from __future__ import annotations

import asyncio
import datetime
import functools
import os
import resource
import time
from collections.abc import Sequence
from typing import Any

import asyncpg
import psycopg
from measure import Setting, answer, compare, ratio, report

from raypg import QueryPipelineNode

ROWS = 10_000
ONE_BY_ONE = 500
BATCH_SIZES = (1_000, 2_500, 5_000)
LEAST = {"one by one": 60, "asyncpg executemany": 1.2, "psycopg, pipeline mode": 2}
BAD_LEAST = {"one by one": 10, "one by one, direct": 3}
INSERT = "INSERT INTO events (id, at, kind, value, note) VALUES ($1, $2, $3, $4, $5)"


INSERT_PSYCOPG = INSERT.replace("$1, $2, $3, $4, $5", "%s, %s, %s, %s, %s")
FLUSHES = int(os.environ.get("RAYPG_BENCH_FLUSHES", "50"))
FLUSH_ROWS = 100_000


async def add_and_flush(pipeline: QueryPipelineNode, sql: str, rows: Sequence[Any]) -> Any:
    for row in rows:
        await pipeline.add_query(sql, row)
    results = await pipeline.flush()
    assert len(results) == len(rows), results
    return results


async def single_rows(here: Setting) -> None:
    pool = here.pool
    await pool.execute("CREATE TABLE events (id int, at timestamptz, kind text, value float8, note text)")
    now = datetime.datetime.now(datetime.UTC)
    rows = [(i, now, "click", i / 7, "x" * 20) for i in range(ROWS)]
    connection = await asyncpg.connect(**here.server.parameters)
    peer = await psycopg.AsyncConnection.connect(here.server.dsn, autocommit=False)
    # What fails together is what commits together: executemany is one transaction, a pipeline one for each batch.
    pipelines = {
        f"pipeline, batch_size {size:,}": QueryPipelineNode(name=f"bench_{size}", connection_pool=pool, batch_size=size)
        for size in BATCH_SIZES
    }

    async def one_by_one() -> float:
        started = time.perf_counter()
        for row in rows[:ONE_BY_ONE]:
            await pool.execute(INSERT, *row)
        return ONE_BY_ONE / (time.perf_counter() - started)

    async def by_pipeline(pipeline: QueryPipelineNode) -> float:
        started = time.perf_counter()
        results = await add_and_flush(pipeline, INSERT, rows)
        seconds = time.perf_counter() - started
        assert not results.failures, results
        return ROWS / seconds

    async def by_executemany() -> float:
        started = time.perf_counter()
        await connection.executemany(INSERT, rows)
        return ROWS / (time.perf_counter() - started)

    async def by_psycopg() -> float:
        started = time.perf_counter()
        async with peer.pipeline(), peer.cursor() as cursor:
            for row in rows:
                await cursor.execute(INSERT_PSYCOPG, row, prepare=True)
        await peer.commit()
        return ROWS / (time.perf_counter() - started)

    figures = await compare(
        {
            **{name: functools.partial(by_pipeline, pipeline) for name, pipeline in pipelines.items()},
            "one by one": one_by_one,
            "asyncpg executemany": by_executemany,
            "psycopg, pipeline mode": by_psycopg,
        }
    )
    report(
        "10,000 single-row INSERTs of 5 columns",
        "rows/s",
        figures,
        [
            f"{name} ÷ {other}: {ratio(figures, name, other):.2f} (at least {least:g})"
            for name in pipelines
            for other, least in LEAST.items()
        ],
    )
    for pipeline in pipelines.values():
        await pipeline.close()
    await peer.close()
    await connection.close()


async def bad_rows(here: Setting) -> None:
    """1,000 rows of which 10, spread evenly, are refused."""
    pool = here.pool
    await pool.execute("CREATE TABLE checked (id int, value int CHECK (value >= 0))")
    insert = "INSERT INTO checked (id, value) VALUES ($1, $2)"
    rows = [(i, -1 if i % 100 == 50 else i) for i in range(1_000)]
    connection = await asyncpg.connect(**here.server.parameters)
    pipeline = QueryPipelineNode(name="bad", connection_pool=pool, batch_size=1_000, flush_interval=0)

    async def each(execute: Any) -> float:
        started = time.perf_counter()
        refused = 0
        for row in rows:
            try:
                await execute(insert, *row)
            except asyncpg.CheckViolationError:
                refused += 1
        assert refused == 10
        return len(rows) / (time.perf_counter() - started)

    async def by_pipeline() -> float:
        started = time.perf_counter()
        results = await add_and_flush(pipeline, insert, rows)
        assert results.failures == 10
        return len(rows) / (time.perf_counter() - started)

    figures = await compare(
        {
            "pipeline, best_effort": by_pipeline,
            "one by one": functools.partial(each, pool.execute),
            "one by one, direct": functools.partial(each, connection.execute),
        }
    )
    lines = [
        f"pipeline ÷ {other}: {ratio(figures, 'pipeline, best_effort', other):.2f} (at least {least:g})"
        for other, least in BAD_LEAST.items()
    ]
    status = pipeline.get_status()
    lines.append(f"{status['total_trips'] / (status['total_queries'] / 1000):.0f} trips to the server for 1,000 rows")
    report("1,000 INSERTs, 10 of them refused", "rows/s", figures, lines)
    await pipeline.close()
    await connection.close()


async def adding(here: Setting) -> None:
    """What ``add_query`` takes of the caller's time, and what a result takes of its memory."""
    row = (1, "click", 0.5, None, "x" * 20)
    pipeline = QueryPipelineNode(name="adding", connection_pool=here.pool, batch_size=1_000_000, flush_interval=0)

    async def microseconds() -> float:
        started = time.perf_counter()
        for _ in range(20_000):
            await pipeline.add_query(INSERT, row)
        seconds = time.perf_counter() - started
        await pipeline.flush()
        return seconds / 20_000 * 1e6

    figures = await compare({"add_query": microseconds})
    report("Adding a query of 5 parameters", "µs", figures, ["at most 3"])
    await pipeline.close()


async def memory(here: Setting) -> None:
    """The size of this process while millions of queries pass through it."""
    pool = here.pool
    await pool.execute("CREATE UNLOGGED TABLE passing (id int, value int)")
    insert = "INSERT INTO passing VALUES ($1, $2)"
    pipeline = QueryPipelineNode(name="memory", connection_pool=pool, batch_size=5_000)
    sizes = []
    for number in range(FLUSHES):
        results = await add_and_flush(pipeline, insert, [(i, number) for i in range(FLUSH_ROWS)])
        assert not results.failures, results
        sizes.append(resident())
        if number % 10 == 9:
            await pool.execute("TRUNCATE passing")
    settled = sizes[2:]
    figures = {"resident size after each flush": settled}
    spread = max(abs(size / settled[0] - 1) for size in settled)
    lines = [
        f"{FLUSHES * FLUSH_ROWS:,} queries, flushed every {FLUSH_ROWS:,}; at most {spread:.1%} from the start (10 %)"
    ]
    before = resident()
    for number in range(500_000):
        await pipeline.add_query(insert, (number, 0))
    await eventually_sent(pipeline)
    lines.append(f"without flush: {(resident() - before) * 1e6 / 500_000:.0f} bytes for each success (at most 32)")
    await pipeline.close()
    report("Memory of the caller", "MB", figures, lines)


async def eventually_sent(pipeline: QueryPipelineNode) -> None:
    """Wait until all that was added has its outcome, without a flush."""
    while True:
        status = pipeline.get_status()
        if not status["queued_queries"] and not status["queries_under_way"]:
            return
        await asyncio.sleep(0.05)


def resident() -> float:
    """Megabytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


QUESTIONS = {"single_rows": single_rows, "bad_rows": bad_rows, "adding": adding, "memory": memory}


if __name__ == "__main__":
    answer(QUESTIONS)
