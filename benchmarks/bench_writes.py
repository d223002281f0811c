"""10,000 single-row INSERTs: one by one, through the pipeline, and by asyncpg's executemany."""

from __future__ import annotations

import datetime
import functools
import time

import asyncpg
import uvloop
from measure import compare, ratio, report, setting

from raypg import QueryPipelineNode

ROWS = 10_000
ONE_BY_ONE = 500
BATCH_SIZES = (1_000, 5_000)
LEAST = {"one by one": 60, "asyncpg executemany": 0.5}
INSERT = "INSERT INTO events (id, at, kind, value, note) VALUES ($1, $2, $3, $4, $5)"


async def main() -> None:
    async with setting() as here:
        pool = here.pool
        await pool.execute("CREATE TABLE events (id int, at timestamptz, kind text, value float8, note text)")
        now = datetime.datetime.now(datetime.UTC)
        rows = [(i, now, "click", i / 7, "x" * 20) for i in range(ROWS)]
        connection = await asyncpg.connect(**here.server.parameters)
        # What fails together is what commits together: executemany is one transaction, a pipeline one for each batch.
        pipelines = {
            f"pipeline, batch_size {size:,}": QueryPipelineNode(
                name=f"bench_{size}", connection_pool=pool, batch_size=size
            )
            for size in BATCH_SIZES
        }

        async def one_by_one() -> float:
            started = time.perf_counter()
            for row in rows[:ONE_BY_ONE]:
                await pool.execute(INSERT, *row)
            return ONE_BY_ONE / (time.perf_counter() - started)

        async def by_pipeline(pipeline: QueryPipelineNode) -> float:
            started = time.perf_counter()
            for row in rows:
                await pipeline.add_query(INSERT, row)
            results = await pipeline.flush()
            seconds = time.perf_counter() - started
            assert len(results) == ROWS, results
            assert not results.failures, results
            return ROWS / seconds

        async def by_executemany() -> float:
            started = time.perf_counter()
            await connection.executemany(INSERT, rows)
            return ROWS / (time.perf_counter() - started)

        figures = await compare(
            {
                **{name: functools.partial(by_pipeline, pipeline) for name, pipeline in pipelines.items()},
                "one by one": one_by_one,
                "asyncpg executemany": by_executemany,
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


if __name__ == "__main__":
    uvloop.run(main())
