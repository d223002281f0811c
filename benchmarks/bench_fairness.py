"""One job with a hundred times the load of another: how long the light one waits, alone and beside it.

The light job is this driver, one statement at a time. The heavy one is another driver process, thus another Ray job,
with a hundred callers that ask again as soon as they have their answer. All share one pool.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

import ray
import uvloop
from measure import compare, ratio, report, setting

from raypg import WorkflowConnectionPool, get_pool

HEAVY_CALLERS = 100
SAMPLES = 300
LIMIT = 3.0
"""How many times as long the light job may wait beside the heavy one, at its 99th percentile."""

STATEMENTS = {
    "statements of 5 ms": "SELECT pg_sleep(0.005)",
    "point reads": "SELECT note FROM accounts WHERE id = 7",
}


class Heavy:
    """The other driver, from this side: does nothing until it is told to."""

    async def start(self) -> None:
        address = ray.get_runtime_context().gcs_address
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, address, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        await self._hear("ready")

    async def begin(self, sql: str) -> None:
        await self._say(sql)
        await self._hear("begun")

    async def end(self) -> float:
        """Let it stop; statements per second that it got answered."""
        await self._say("")
        return float((await self._hear("ended"))[0])

    async def leave(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        await self._process.stdin.drain()

    async def _hear(self, word: str) -> list[str]:
        assert self._process.stdout is not None
        while line := (await self._process.stdout.readline()).decode():
            if line.split()[:1] == [word]:
                return line.split()[1:]
        raise RuntimeError("the heavy driver has ended")


async def heavy_driver(address: str) -> None:
    """What the other driver does: reads statements, and empty lines that end them, from its standard input."""
    ray.init(address=address, log_to_driver=False)
    pool = get_pool("bench")

    async def line() -> str:
        return (await asyncio.to_thread(sys.stdin.readline)).rstrip("\n")

    await pool.fetchval("SELECT 1")
    print("ready", flush=True)
    while sql := await line():
        over = asyncio.Event()
        count = 0
        warm = asyncio.Event()

        async def caller(sql: str = sql, over: asyncio.Event = over, warm: asyncio.Event = warm) -> None:
            nonlocal count
            while not over.is_set():
                await pool.fetchval(sql)
                count += 1
                warm.set()

        started = time.perf_counter()
        callers = [asyncio.create_task(caller()) for _ in range(HEAVY_CALLERS)]
        await warm.wait()
        print("begun", flush=True)
        assert not await line()
        over.set()
        await asyncio.gather(*callers)
        print("ended", count / (time.perf_counter() - started), flush=True)


async def light(pool: WorkflowConnectionPool, sql: str) -> float:
    """The 99th percentile of milliseconds from asking to having the answer."""
    samples = []
    for _ in range(SAMPLES):
        started = time.perf_counter()
        await pool.fetchval(sql)
        samples.append((time.perf_counter() - started) * 1000)
    return statistics.quantiles(samples, n=100)[98]


async def main() -> None:
    async with setting() as here:
        pool = here.pool
        await pool.execute("CREATE TABLE accounts (id int PRIMARY KEY, note text)")
        await pool.execute("INSERT INTO accounts SELECT g, 'note ' || g FROM generate_series(1, 1000) g")
        heavy = Heavy()
        await heavy.start()
        for what, sql in STATEMENTS.items():
            speeds: list[float] = []

            def alone(sql: str = sql) -> Awaitable[float]:
                return light(pool, sql)

            async def beside(sql: str = sql, speeds: list[float] = speeds) -> float:
                await heavy.begin(sql)
                try:
                    return await light(pool, sql)
                finally:
                    speeds.append(await heavy.end())

            contenders: dict[str, Callable[[], Awaitable[float]]] = {"alone": alone, "beside the heavy job": beside}
            figures = await compare(contenders)
            times = ratio(figures, "beside the heavy job", "alone")
            served = statistics.median(speeds[1:])
            report(
                f"A light job beside one with {HEAVY_CALLERS} times its load: {what}",
                "ms (p99)",
                figures,
                [
                    f"beside ÷ alone: {times:.2f} (limit {LIMIT:g})",
                    f"the heavy job meanwhile: {served:,.0f} statements/s, so that served in order of arrival each "
                    f"would have waited {HEAVY_CALLERS / served * 1000:.3g} ms",
                ],
            )
        await heavy.leave()


if __name__ == "__main__":
    uvloop.run(heavy_driver(sys.argv[1]) if len(sys.argv) > 1 else main())
