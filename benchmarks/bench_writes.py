"""10,000 single-row INSERTs: one by one, through the pipeline, and by asyncpg's executemany."""

from __future__ import annotations

import datetime
import time

import asyncpg
import uvloop
from measure import compare, ratio, report, setting

from raypg import QueryPipelineNode

ROWS = 10_000
ONE_BY_ONE = 500
INSERT = "INSERT INTO events (id, at, kind, value, note) VALUES ($1, $2, $3, $4, $5)"


async def main() -> None:
    async with setting() as here:
        pool = here.pool
        await pool.execute("CREATE TABLE events (id int, at timestamptz, kind text, value float8, note text)")
        now = datetime.datetime.now(datetime.UTC)
        rows = [(i, now, "click", i / 7, "x" * 20) for i in range(ROWS)]
        connection = await asyncpg.connect(**here.server.parameters)
        pipeline = QueryPipelineNode(name="bench", connection_pool=pool, batch_size=1_000)

        async def one_by_one() -> float:
            started = time.perf_counter()
            for row in rows[:ONE_BY_ONE]:
                await pool.execute(INSERT, *row)
            return ONE_BY_ONE / (time.perf_counter() - started)

        async def by_pipeline() -> float:
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
            {"pipeline": by_pipeline, "one by one": one_by_one, "asyncpg executemany": by_executemany}
        )
        report(
            "10,000 single-row INSERTs of 5 columns",
            "rows/s",
            figures,
            [f"pipeline ÷ {name}: {ratio(figures, 'pipeline', name):.2f}" for name in list(figures)[1:]],
        )


if __name__ == "__main__":
    uvloop.run(main())
