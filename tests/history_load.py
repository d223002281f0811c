"""Random reads and writes from several processes, each with a router and its cache, written down for the checker."""

from __future__ import annotations

import asyncio
import math
import random
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from histories import Operation

from raypg import QueryRouterNode, WorkflowConnectionPool

__all__ = ["ROWS", "make_tables", "run", "summary"]

ROWS = 12
"""Of each of the two tables: few, so that the same are read and written again and again."""

PERIOD = 2.0
"""Seconds from one time of writing to a table to the next."""

WRITING = 0.2
"""Share of the period in which it is written to."""

THINKS = 0.02
"""Seconds, at most, that a caller waits after what a cache has answered: or nearly all calls would be such."""

ONE = "SELECT id, n FROM {schema}.a WHERE id = $1"
SEVERAL = "SELECT id, n FROM {schema}.a WHERE id <= $1 ORDER BY id"
OTHER = "SELECT id, n FROM {schema}.b_view WHERE id = $1"
CHANGE = "UPDATE {schema}.{table} SET n = n + 1 WHERE id = $1 RETURNING n"


async def make_tables(execute: Any, schema: str) -> None:
    """Two tables ``(id, n)`` with all versions 0, and a view of the second."""
    for table in ("a", "b"):
        await execute(f"CREATE TABLE {schema}.{table} (id int PRIMARY KEY, n int NOT NULL)")
        await execute(f"INSERT INTO {schema}.{table} SELECT g, 0 FROM generate_series(1, {ROWS}) g")
    await execute(f"CREATE VIEW {schema}.b_view AS SELECT id, n FROM {schema}.b")


def _is_time_to_write(table: str) -> bool:
    """Each table is written to for a while, and then for a while not: both must happen, keeping and dropping."""
    return (time.monotonic() / PERIOD + "ab".index(table) / 2) % 1.0 < WRITING


class _Session:
    """One caller: one call after another."""

    def __init__(self, router: QueryRouterNode, schema: str, name: str, rng: random.Random) -> None:
        self._router = router
        self._schema = schema
        self._name = name
        self._rng = rng
        self._named = rng.random() < 0.5
        self.calls: list[Operation] = []

    async def call(self) -> None:
        choice, row = self._rng.random(), min(self._rng.randint(1, ROWS), self._rng.randint(1, ROWS))
        table = self._rng.choice("ab")
        if choice < 0.36 and _is_time_to_write(table):
            await self._change(table, row)
        elif choice < 0.40 and _is_time_to_write(table):
            await self._change_two(row)
        elif choice < 0.50:
            await self._read(SEVERAL, row, "a")
        elif choice < 0.75:
            await self._read(ONE, row, "a")
        else:
            await self._read(OTHER, row, "b")
        if self.calls[-1].how == "cache":
            await asyncio.sleep(self._rng.random() * THINKS)

    async def _ask(self, query: str, *params: Any, **more: Any) -> tuple[list[dict[str, Any]], str]:
        answer = await self._router.process({"query": query, "params": params, **more})
        assert answer["success"], answer
        return answer["data"], answer["routing_metadata"]["target"]

    def _note(self, writes: bool, begun: float, seen: dict[str, int], how: str) -> None:
        self.calls.append(Operation(self._name, writes, begun, time.monotonic(), seen, how))

    def _of_session(self) -> dict[str, str]:
        """Half of them say who they are."""
        return {"session_id": self._name} if self._named else {}

    async def _read(self, query: str, row: int, table: str) -> None:
        begun = time.monotonic()
        rows, how = await self._ask(query.format(schema=self._schema), row, **self._of_session())
        self._note(False, begun, {f"{table}{found['id']}": found["n"] for found in rows}, how)

    async def _change(self, table: str, row: int) -> None:
        begun = time.monotonic()
        query = CHANGE.format(schema=self._schema, table=table)
        rows, how = await self._ask(query, row, **self._of_session())
        self._note(True, begun, {f"{table}{row}": rows[0]["n"]}, how)

    async def _change_two(self, row: int) -> None:
        """In a transaction, in an order that makes no deadlock."""
        name = {"session_id": f"{self._name} writing"}
        begun = time.monotonic()
        await self._ask("BEGIN", **name)
        seen = {}
        for table in "ab":
            rows, _ = await self._ask(CHANGE.format(schema=self._schema, table=table), row, **name)
            seen[f"{table}{row}"] = rows[0]["n"]
        await self._ask("COMMIT", **name)
        self._note(True, begun, seen, "transaction")


@ray.remote(num_cpus=0)
class _Process:
    """One process with a router of its own."""

    def __init__(self, pool: str, number: int, seed: str, deaf: bool) -> None:
        self._router = QueryRouterNode(f"of process {number}", pool, cache_size=1000, pattern_learning=number % 2 == 1)
        self._number = number
        self._rng = random.Random(f"{seed}:{number}")
        self._deaf = deaf

    async def run(self, schema: str, sessions: int, calls: int, within: float) -> list[tuple[Any, ...]]:
        await self._router.fetch(ONE.format(schema=schema), 1)
        if self._deaf:
            cache: Any = self._router._cache
            cache._coherence.forget(cache._reporter._listener)
        callers = [
            _Session(self._router, schema, f"{self._number}.{index}", random.Random(self._rng.random()))
            for index in range(sessions)
        ]

        until = time.monotonic() + within

        async def work(caller: _Session) -> None:
            for _ in range(calls // sessions):
                if time.monotonic() > until:
                    break
                await caller.call()

        await asyncio.gather(*(work(caller) for caller in callers))
        return [tuple(call) for caller in callers for call in caller.calls]

    async def statistics(self) -> dict[str, Any]:
        found = (await self._router.get_metrics())["cache_stats"]
        await self._router.close()
        return dict(found)


async def run(
    pool: WorkflowConnectionPool,
    schema: str,
    calls: int,
    *,
    seed: str,
    processes: int = 4,
    sessions: int = 8,
    within: float = math.inf,
    deaf: bool = False,
) -> tuple[list[Operation], list[dict[str, Any]]]:
    """Make about *calls* calls from that many processes, all at the same time.

    Args:
        sessions: callers in each process.
        within: seconds after which they end, however many calls there were.
        deaf: the caches do not do what they are told of writes: for tests of the checker.

    Returns:
        All that happened, and the ``cache_stats`` of each process.
    """
    actors = [_Process.remote(pool.name, number, seed, deaf) for number in range(processes)]
    try:
        histories = await asyncio.gather(
            *(actor.run.remote(schema, sessions, calls // processes, within) for actor in actors)
        )
        statistics = await asyncio.gather(*(actor.statistics.remote() for actor in actors))
    finally:
        for actor in actors:
            ray.kill(actor)
    return [Operation(*call) for history in histories for call in history], list(statistics)


def summary(history: Sequence[Operation], statistics: Iterable[dict[str, Any]]) -> dict[str, float]:
    """What the load was like."""
    reads = [call for call in history if not call.writes]
    seconds = max(call.ended for call in history) - min(call.begun for call in history)
    return {
        "calls": len(history),
        "writes": len(history) - len(reads),
        "from caches": sum(call.how == "cache" for call in reads) / len(reads),
        "from replicas": sum(call.how == "replica" for call in reads) / len(reads),
        "invalidations": sum(one["invalidations"] for one in statistics),
        "calls/s": len(history) / seconds,
    }


def by_value() -> None:
    """Let Ray's workers have this module and those it uses: they cannot import them."""
    from ray import cloudpickle

    for module in (sys.modules[__name__], sys.modules[Operation.__module__]):
        cloudpickle.register_pickle_by_value(module)
