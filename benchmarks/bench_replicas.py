"""Reads on replicas: do sessions see their own writes, how many reads run there, and how fast.

One primary and two standbys. For the sessions one standby replays each commit 20 ms late, and the other one is paused
for 0.1 s now and then.
"""

from __future__ import annotations

import asyncio
import os
import time

import uvloop
from measure import compare, rate, ratio, report, with_replicas
from standby import disturbed

from raypg import QueryRouterNode, Session, WorkflowConnectionPool

PAIRS = int(os.environ.get("RAYPG_BENCH_PAIRS", "100000"))
SESSIONS = 200
ROWS = 10_000
CLIENTS = 500
QUERY = "SELECT id, balance FROM accounts WHERE id = $1"
UPDATE = "UPDATE accounts SET balance = $2 WHERE id = $1"


async def pairs(pool: WorkflowConnectionPool) -> tuple[float, int, dict[str, int]]:
    """Write, then read, in sessions of one router: (pairs/s, stale reads, statements by who answered)."""
    router = QueryRouterNode("pairs", pool)
    stale = 0

    async def session(number: int) -> None:
        nonlocal stale
        name = str(number)
        for value in range(PAIRS // SESSIONS):
            await router.execute(UPDATE, number, value, session_id=name)
            row = await router.fetchrow(QUERY, number, session_id=name)
            stale += row is None or row["balance"] != value

    started = time.perf_counter()
    await asyncio.gather(*(session(number) for number in range(1, SESSIONS + 1)))
    seconds = time.perf_counter() - started
    return PAIRS / seconds, stale, (await router.get_metrics())["router_metrics"]["by_target"]


async def main() -> None:
    async with with_replicas() as (pool, _, one, other):
        await pool.execute("CREATE TABLE accounts (id int PRIMARY KEY, balance int)")
        await pool.execute("INSERT INTO accounts SELECT g, g FROM generate_series(1, $1::int) g", ROWS)
        await asyncio.sleep(1)

        async def plain(number: int) -> None:
            await pool.fetchrow(QUERY, number % ROWS + 1)

        async def replica(number: int) -> None:
            await pool.fetchrow(QUERY, number % ROWS + 1, read_from="replica")

        mine = Session()

        async def session(number: int) -> None:
            await pool.fetchrow(QUERY, number % ROWS + 1, read_from="replica", after=mine)

        router = QueryRouterNode("reads", pool)

        async def routed(number: int) -> None:
            await router.fetchrow(QUERY, number % ROWS + 1)

        reads = await compare(
            {
                "primary": lambda: rate(plain, 10_000, CLIENTS),
                "replicas": lambda: rate(replica, 10_000, CLIENTS),
                "replicas, one session": lambda: rate(session, 10_000, CLIENTS),
                "a router": lambda: rate(routed, 10_000, CLIENTS),
            }
        )
        report(
            f"{CLIENTS} coroutines, point reads with two replicas on the same machine",
            "reads/s",
            reads,
            [
                *(f"{name} ÷ primary: {ratio(reads, name, 'primary'):.2f}" for name in list(reads)[1:]),
                f"a router ÷ replicas, one session: {ratio(reads, 'a router', 'replicas, one session'):.2f}",
            ],
        )
        async with disturbed(one, other):
            speed, stale, targets = await pairs(pool)
        report(
            f"{PAIRS:,} pairs of a write and a read of {SESSIONS} sessions, a late and a paused replica",
            "pairs/s",
            {"pairs": [speed]},
            [f"stale reads: {stale}", f"reads on replicas: {targets.get('replica', 0) / PAIRS:.1%}"],
        )


if __name__ == "__main__":
    uvloop.run(main())
