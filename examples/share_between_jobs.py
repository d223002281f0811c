"""Two Ray jobs share one pool: run it twice, and the second job finds the pool of the first.

    ray job submit -- python examples/share_between_jobs.py
    ray job submit -- python examples/share_between_jobs.py
    raypg down shared

Where the database is, PGHOST, PGPORT, PGDATABASE and PGUSER say, as in load_from_ray_job.py.
"""

from __future__ import annotations

import asyncio

import ray

from raypg import PoolNotFoundError, WorkflowConnectionPool, get_pool


async def main() -> None:
    """Join the pool or start it, and leave a note in the database."""
    try:
        pool = get_pool("shared")
        print("found the pool that another job started")
    except PoolNotFoundError:
        pool = WorkflowConnectionPool(name="shared", max_connections=1)
        await pool.process({"operation": "initialize"})
        await pool.execute("CREATE TABLE IF NOT EXISTS visits (job text, backend int)")
        print("started the pool; it stays when this job ends")

    job = ray.get_runtime_context().get_job_id()
    await pool.execute("INSERT INTO visits VALUES ($1, pg_backend_pid())", job)
    for visit in await pool.fetch("SELECT job, backend FROM visits"):
        print(f"job {visit['job']} used the connection of backend {visit['backend']}")


if __name__ == "__main__":
    ray.init()
    asyncio.run(main())
