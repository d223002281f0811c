"""How long it takes until all is well again, after a process was killed or the server restarted."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from typing import Any

import ray
import uvloop
from measure import report, setting

from raypg import UnavailableError, WorkflowConnectionPool, naming
from raypg.embedded import EmbeddedServer

ROUNDS = 5
CAPACITY = 5
RECOVERY = 0.5
CALLERS = 20

HOLDER = """
import asyncio, sys, ray, raypg
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")

async def main():
    async with raypg.get_pool(sys.argv[2]).transaction() as tx:
        await tx.execute("INSERT INTO held VALUES (1)")
        print("held", flush=True)
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


async def kill_worker(pool: WorkflowConnectionPool) -> float:
    """Seconds from the death of a pool's only worker until all its connections can be leased again."""
    worker = ray.get_actor(naming.worker_actor(pool.name, 0), namespace=naming.NAMESPACE)
    os.kill(await worker.__ray_call__.remote(lambda self: os.getpid()), signal.SIGKILL)
    started = time.monotonic()
    leases = await asyncio.gather(*(pool.acquire(timeout=60)._acquire() for _ in range(CAPACITY)))
    seconds = time.monotonic() - started
    assert len({lease.backend_pid for lease in leases}) == CAPACITY
    await asyncio.gather(*(lease.release() for lease in leases))
    return seconds


async def kill_holder(pool: WorkflowConnectionPool) -> float:
    """Seconds from the death of a driver in a transaction until the pool's only connection serves others."""
    program = [sys.executable, "-c", HOLDER, ray.get_runtime_context().gcs_address, pool.name]
    holder = await asyncio.create_subprocess_exec(*program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert (await holder.stdout.readline()).strip() == b"held"
    holder.kill()
    started = time.monotonic()
    assert await pool.fetchval("SELECT count(*) FROM held", timeout=60) == 0
    seconds = time.monotonic() - started
    await holder.communicate()
    return seconds


async def restart(server: EmbeddedServer, pool: WorkflowConnectionPool, how: Any) -> float:
    """Seconds from the return of the server, under load, until the first caller is served."""
    served = asyncio.Event()
    is_back = False

    async def call() -> None:
        while not served.is_set():
            try:
                await pool.fetchval("SELECT 1")
                if is_back:
                    served.set()
            except UnavailableError:
                await asyncio.sleep(0.02)

    callers = [asyncio.create_task(call()) for _ in range(CALLERS)]
    await asyncio.sleep(1.0)
    await asyncio.to_thread(server.kill if how == "SIGKILL" else lambda: server.stop(how))
    await asyncio.to_thread(server.start)
    started, is_back = time.monotonic(), True
    await served.wait()
    seconds = time.monotonic() - started
    await asyncio.gather(*callers)
    await asyncio.sleep(2 * RECOVERY)  # or the next one finds it in its ramp
    return seconds


async def main() -> None:
    figures: dict[str, list[float]] = {
        "a worker killed: all its connections serve again": [],
        "a driver killed in a transaction: its connection serves others": [],
        **{f"the server restarted ({how}): a caller is served": [] for how in ("fast", "immediate", "SIGKILL")},
    }
    of_worker, of_driver, *of_server = figures.values()
    async with setting() as here:
        parameters = here.server.parameters
        await here.pool.execute("CREATE TABLE held (a int)")
        pool = WorkflowConnectionPool(name="killed", **parameters, max_connections=CAPACITY + 1, workers=1)
        single = WorkflowConnectionPool(name="single", **parameters, max_connections=1, workers=1)
        restarted = WorkflowConnectionPool(
            name="restarted",
            **parameters,
            max_connections=CAPACITY,
            workers=1,
            circuit_breaker_recovery_timeout=RECOVERY,
            circuit_breaker_ramp=RECOVERY,
        )
        for each in (pool, single, restarted):
            await each.process({"operation": "initialize"})
        for _ in range(ROUNDS):
            of_worker.append(await kill_worker(pool))
            of_driver.append(await kill_holder(single))
        for each in (pool, single):
            await each.close()
        for _ in range(ROUNDS):
            for how, seconds in zip(("fast", "immediate", "SIGKILL"), of_server, strict=True):
                seconds.append(await restart(here.server, restarted, how))
        await restarted.close()
    report(
        "Bad days: until all is well again",
        "s",
        figures,
        [
            "limits: 5 s for a worker and for a driver, 2 s for the server",
            f"the server: under {CALLERS} callers, from when it takes connections; recovery_timeout {RECOVERY:g} s",
        ],
    )


if __name__ == "__main__":
    uvloop.run(main())
