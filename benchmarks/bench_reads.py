"""Point reads: many at once against an in-process pool, a call each and pgbench; and one at a time."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import asyncpg
import ray
import uvloop
from measure import Setting, compare, rate, ratio, report, setting

ROWS = 10_000
CLIENTS = 1_000
QUERY = "SELECT id, balance FROM accounts WHERE id = $1"
OTHER = "SELECT note FROM accounts WHERE id = $1"


class CallEach:
    """The plain way: an actor with a pool, and one call for each query."""

    async def start(self, parameters: dict[str, Any], connections: int) -> None:
        self.pool = await asyncpg.create_pool(**parameters, min_size=connections, max_size=connections)

    async def fetchrow(self, query: str, *args: Any) -> tuple[Any, ...]:
        return tuple(await self.pool.fetchrow(query, *args))

    async def ping(self) -> None:
        pass


def pgbench(setting: Setting) -> float:
    """Transactions per second of pgbench with the same query, prepared."""
    script = Path(tempfile.mkdtemp()) / "read.sql"
    script.write_text(f"\\set id random(1, {ROWS})\n{QUERY.replace('$1', ':id')};\n")
    server = setting.server
    command = [
        str(server.bin("pgbench")),
        "-n", "-M", "prepared", "-T", "2", "-j", "2", "-c", str(setting.connections), "-f", str(script),
        server.dsn,
    ]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return next(float(line.split()[2]) for line in output.splitlines() if line.startswith("tps"))


async def main() -> None:
    async with setting() as here:
        pool = here.pool
        await pool.execute("CREATE TABLE accounts (id int PRIMARY KEY, balance int, note text)")
        await pool.execute("INSERT INTO accounts SELECT g, g, 'note ' || g FROM generate_series(1, $1::int) g", ROWS)
        direct = await here.direct_pool()
        actor: Any = ray.remote(CallEach).options(num_cpus=0).remote()
        await actor.start.remote(here.server.parameters, here.connections)

        def query(number: int) -> str:
            return OTHER if number % 4 == 0 else QUERY

        async def by_raypg(number: int) -> None:
            await pool.fetchrow(query(number), number % ROWS + 1)

        async def by_asyncpg(number: int) -> None:
            await direct.fetchrow(query(number), number % ROWS + 1)

        async def by_call(number: int) -> None:
            await actor.fetchrow.remote(query(number), number % ROWS + 1)

        many = await compare(
            {
                "raypg": lambda: rate(by_raypg, 20_000, CLIENTS),
                "asyncpg.Pool in process": lambda: rate(by_asyncpg, 10_000, CLIENTS),
                "one actor call each": lambda: rate(by_call, 2_000, CLIENTS),
                "pgbench -M prepared": lambda: asyncio.to_thread(pgbench, here),
            }
        )
        report(
            "1,000 coroutines of one driver, mixed point reads",
            "reads/s",
            many,
            [f"raypg ÷ {name}: {ratio(many, 'raypg', name):.2f}" for name in list(many)[1:]],
        )

        async def alone(work: Any, count: int = 300) -> float:
            started = time.perf_counter()
            for number in range(count):
                await work(number)
            return (time.perf_counter() - started) / count * 1000

        async def ping(_: int) -> None:
            await actor.ping.remote()

        connection = await asyncpg.connect(**here.server.parameters)

        async def query_only(number: int) -> None:
            await connection.fetchrow(query(number), number % ROWS + 1)

        single = await compare(
            {
                "raypg": lambda: alone(by_raypg),
                "bare actor call": lambda: alone(ping),
                "direct query": lambda: alone(query_only),
                "a plain actor that runs it": lambda: alone(by_call),
            }
        )
        sums = [a + b for a, b in zip(single["bare actor call"], single["direct query"], strict=True)]
        single["call + query"] = sums
        report(
            "One point read at a time",
            "ms",
            single,
            [
                f"raypg ÷ (bare actor call + direct query): {ratio(single, 'raypg', 'call + query'):.2f} (limit 1.2)",
                f"raypg ÷ a plain actor that runs it: {ratio(single, 'raypg', 'a plain actor that runs it'):.2f}",
            ],
        )


if __name__ == "__main__":
    uvloop.run(main())
