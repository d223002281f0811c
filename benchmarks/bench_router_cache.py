"""The router's cache: what a hit costs, and whether 200,000 random calls of four processes ever see too little.

For the calls one standby replays each commit 20 ms late, and the other one is paused for 0.1 s now and then.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from pathlib import Path

import uvloop
from measure import Contender, compare, ratio, report, with_replicas

from raypg import QueryRouterNode, WorkflowConnectionPool, messages
from raypg.config import from_kwargs
from raypg.embedded import EmbeddedServer
from raypg.server.connect import Connector
from raypg.server.reads import Pace

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import history_load
from histories import check
from standby import caught_up, disturbed
from waiting import eventually

CALLS = int(os.environ.get("RAYPG_BENCH_CALLS", "200000"))
AT_A_TIME = 20_480
"""Calls in a history: each must pass for itself, and is over before the next begins."""

QUERY = "SELECT id, n FROM public.a WHERE id = $1"
JOIN = "SELECT a.id, sum(b.n) FROM public.a JOIN public.b USING (id) WHERE a.id = $1 GROUP BY a.id ORDER BY 2"
REPEATED = 20_000


async def hits(pool: WorkflowConnectionPool) -> None:
    """Microseconds of one hit, answer included."""
    async with QueryRouterNode("hits", pool, cache_size=100, cache_ttl=3600.0) as router:
        request = {"query": QUERY, "params": [1]}

        async def is_hit() -> bool:
            return bool((await router.process(request))["routing_metadata"]["cache_hit"])

        await eventually(is_hit, 30)

        async def process() -> float:
            started = time.perf_counter()
            for _ in range(REPEATED):
                await router.process(request)
            return (time.perf_counter() - started) / REPEATED * 1e6

        async def fetchrow() -> float:
            await router.fetchrow(QUERY, 1)
            started = time.perf_counter()
            for _ in range(REPEATED):
                await router.fetchrow(QUERY, 1)
            return (time.perf_counter() - started) / REPEATED * 1e6

        async def asked() -> float:
            started = time.perf_counter()
            for _ in range(500):
                await pool.fetchrow(QUERY, 1)
            return (time.perf_counter() - started) / 500 * 1e6

        figures = await compare({"router.process": process, "router.fetchrow": fetchrow, "pool.fetchrow": asked})
    report("One caller: a hit of the router's cache, and the same read asked", "µs", figures, [])


async def first_statements(server: EmbeddedServer) -> None:
    """Milliseconds of the first statement on a new connection, and of opening it."""
    config = from_kwargs(name="first", environ={}, **server.parameters)

    def contender(prepared: bool, opening: bool) -> Contender:
        connector = Connector(config, "first")
        connector.learnt = Pace()
        for _ in range(2 * prepared):
            connector.learnt.frequent.note(JOIN)

        async def measured() -> float:
            times = []
            for _ in range(20):
                began = time.perf_counter()
                connection = await connector.open()
                opened = time.perf_counter()
                await connection.run(messages.FETCH, JOIN, (1,))
                times.append(opened - began if opening else time.perf_counter() - opened)
                await connection.close()
            return statistics.median(times) * 1000

        return measured

    figures = await compare(
        {
            "first statement, not prepared": contender(False, False),
            "first statement, prepared": contender(True, False),
            "opening, nothing prepared": contender(False, True),
            "opening, statement prepared": contender(True, True),
        }
    )
    gain = ratio(figures, "first statement, not prepared", "first statement, prepared")
    report(
        "A new connection that has the most frequent statement prepared", "ms", figures, [f"first ÷ first: {gain:.2f}"]
    )


async def histories(pool: WorkflowConnectionPool) -> None:
    """Random calls, all written down and checked."""
    calls = writes = problems = dropped = 0
    cached = replicas = 0.0
    speeds = []
    for number in range(math.ceil(CALLS / AT_A_TIME)):
        schema = f"history_{number}"
        await pool.execute(f"CREATE SCHEMA {schema}")
        await history_load.make_tables(pool.execute, schema)
        history, of_caches = await history_load.run(pool, schema, AT_A_TIME, seed=f"bench {number}", sessions=16)
        shown = history_load.summary(history, of_caches)
        found = check(history)
        for problem in found[:5]:
            print(problem, flush=True)
        calls += len(history)
        writes += int(shown["writes"])
        problems += len(found)
        dropped += int(shown["invalidations"])
        cached += shown["from caches"] * (len(history) - shown["writes"])
        replicas += shown["from replicas"] * (len(history) - shown["writes"])
        speeds.append(shown["calls/s"])
        print(f"{calls:,} calls: {problems} wrong; {shown}", flush=True)
    reads = calls - writes
    report(
        f"{calls:,} random calls of 4 processes with caches, a late and a paused replica",
        "calls/s",
        {"calls": speeds},
        [
            f"answers older than an acknowledged write, or than what somebody had seen before: {problems}",
            f"writes: {writes:,}; results dropped because of them: {dropped:,}",
            f"reads answered by caches: {cached / reads:.1%}, by replicas: {replicas / reads:.1%}",
        ],
    )


async def main() -> None:
    history_load.by_value()
    async with with_replicas() as (pool, primary, one, other):
        await history_load.make_tables(pool.execute, "public")
        await hits(pool)
        await caught_up(primary, one)
        await first_statements(one)
        async with disturbed(one, other):
            await histories(pool)


if __name__ == "__main__":
    uvloop.run(main())
