"""Point reads from four driver processes at once: one raypg pool for all, against an asyncpg.Pool in each."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import asyncpg
import ray
import uvloop
from measure import compare, rate, ratio, report, setting

DRIVERS = 4
CLIENTS = 250
READS = 5_000
ROWS = 10_000
QUERY = "SELECT id, balance FROM accounts WHERE id = $1"


class Driver:
    """One driver process: it does what a line on its standard input says, and answers with a line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, plan: dict[str, Any]) -> Driver:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__)),
            json.dumps(plan),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        driver = cls(process)
        await driver.answer()
        return driver

    def ask(self, what: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n".encode())

    async def answer(self) -> str:
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()

    async def end(self) -> None:
        self.ask("end")
        await self._process.wait()


async def driver(plan: dict[str, Any]) -> None:
    """What a driver process does."""
    from raypg import get_pool

    ray.init(address=plan["address"], logging_level=logging.ERROR, log_to_driver=False)
    pools = {
        "raypg": get_pool("bench"),
        "asyncpg": await asyncpg.create_pool(
            **plan["server"], min_size=plan["connections"], max_size=plan["connections"]
        ),
    }
    loop = asyncio.get_running_loop()
    print("ready", flush=True)
    while (what := (await loop.run_in_executor(None, sys.stdin.readline)).strip()) in pools:
        pool = pools[what]

        async def read(number: int, pool: Any = pool) -> None:
            await pool.fetchrow(QUERY, number % ROWS + 1)

        await rate(read, READS, CLIENTS)
        print("done", flush=True)


async def main() -> None:
    async with setting() as here:
        pool = here.pool
        await pool.execute("CREATE TABLE accounts (id int PRIMARY KEY, balance int)")
        await pool.execute("INSERT INTO accounts SELECT g, g FROM generate_series(1, $1::int) g", ROWS)
        plan = {
            "address": ray.get_runtime_context().gcs_address,
            "server": here.server.parameters,
            "connections": here.connections // DRIVERS,
        }
        drivers = [await Driver.start(plan) for _ in range(DRIVERS)]

        async def together(what: str) -> float:
            started = time.perf_counter()
            for each in drivers:
                each.ask(what)
            for each in drivers:
                assert await each.answer() == "done"
            return DRIVERS * READS / (time.perf_counter() - started)

        one = f"one raypg pool of {here.connections} connections"
        each = f"an asyncpg.Pool of {here.connections // DRIVERS} in each"
        figures = await compare({one: lambda: together("raypg"), each: lambda: together("asyncpg")})
        report(
            f"{DRIVERS} driver processes of {CLIENTS} coroutines, point reads",
            "reads/s",
            figures,
            [f"raypg ÷ asyncpg.Pool: {ratio(figures, one, each):.2f}"],
        )
        for one_driver in drivers:
            await one_driver.end()


if __name__ == "__main__":
    uvloop.run(driver(json.loads(sys.argv[1])) if len(sys.argv) > 1 else main())
