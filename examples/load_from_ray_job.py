"""Many Ray tasks load rows into PostgreSQL over one pool, of at most ten connections.

    ray job submit -- python examples/load_from_ray_job.py

Where the database is, PGHOST, PGPORT, PGDATABASE and PGUSER say, and PGPASSWORD or ~/.pgpass has the password: set
them on the cluster's nodes, not with --runtime-env, which Ray shows to everybody.
"""

from __future__ import annotations

import asyncio

import ray

from raypg import QueryPipelineNode, WorkflowConnectionPool

PARTS = 8
ROWS_IN_A_PART = 2_500
INSERT = "INSERT INTO readings (sensor, number, value) VALUES ($1, $2, $3)"


async def load_part(sensor: int) -> int:
    """Load the rows of one sensor; returns how many were refused."""
    # The pool is found by its name. Rows are only collected here; they travel together, and are inserted together.
    async with QueryPipelineNode(name=f"sensor-{sensor}", connection_pool="readings", batch_size=500) as pipeline:
        for number in range(ROWS_IN_A_PART):
            await pipeline.add_query(INSERT, [sensor, number, number * 0.5])
        results = await pipeline.flush()
    return sum(not result.success for result in results)


@ray.remote
def load(sensor: int) -> int:
    """A plain Ray task."""
    return asyncio.run(load_part(sensor))


async def main() -> None:
    """Start the pool, let the tasks load, look at what is there."""
    pool = WorkflowConnectionPool(name="readings", max_connections=10)
    await pool.process({"operation": "initialize"})
    await pool.execute("DROP TABLE IF EXISTS readings")
    await pool.execute("CREATE TABLE readings (sensor int, number int, value float8, PRIMARY KEY (sensor, number))")

    refused = await asyncio.gather(*(load.remote(sensor) for sensor in range(PARTS)))

    rows = await pool.fetchval("SELECT count(*) FROM readings")
    print(f"{rows} rows of {PARTS} sensors are there, {sum(refused)} were refused")
    await pool.close()  # without this it would stay, for the next job to find


if __name__ == "__main__":
    ray.init()
    asyncio.run(main())
