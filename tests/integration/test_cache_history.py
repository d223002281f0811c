"""No process ever answers with less than what was acknowledged before: random histories of four, held to that.

With replicas that are late, so that a wrong turn anywhere shows. `benchmarks/bench_cache.py` does 200,000 calls.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from histories import check
from history_load import make_tables, run, summary
from pools import own_pool
from standby import caught_up, delay

from raypg import WorkflowConnectionPool
from raypg.embedded import EmbeddedServer


@pytest.fixture
async def late(
    ray_cluster: Any, pg18: EmbeddedServer, standby18: EmbeddedServer
) -> AsyncIterator[WorkflowConnectionPool]:
    """A pool with a replica that shows each commit 20 ms late."""
    await caught_up(pg18, standby18)
    await delay(standby18, 20)
    try:
        async with own_pool(pg18, max_connections=10, replicas=[standby18.dsn]) as pool:
            yield pool
    finally:
        await delay(standby18, 0)


async def test_histories_of_four_processes_are_those_of_one_database(
    late: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection, rng: random.Random
) -> None:
    await make_tables(direct.execute, schema)
    history, statistics = await run(late, schema, 8_000, seed=str(rng.random()), within=6.0)
    shown = summary(history, statistics)
    print(shown)
    assert check(history) == []
    # It was put to the test: all ways of answering were gone, and writes came in between.
    assert shown["writes"] > 20
    assert shown["from caches"] > 0.02
    assert shown["from replicas"] > 0.02
    assert shown["invalidations"] > 10


async def test_caches_that_are_told_nothing_of_writes_are_found_out(
    late: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection, rng: random.Random
) -> None:
    await make_tables(direct.execute, schema)
    history, _ = await run(late, schema, 4_000, seed=str(rng.random()), within=4.0, deaf=True)
    problems = check(history)
    assert problems
    assert any("(cache)" in problem and "was acknowledged before it began" in problem for problem in problems)
