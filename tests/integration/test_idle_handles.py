"""Thousands of handles that nobody uses cost no connection, no actor, and little memory."""

from __future__ import annotations

import asyncio
import gc
import pickle
import tracemalloc
from collections.abc import Callable

import asyncpg
import pytest
import ray
from pools import backends_of

from raypg import WorkflowConnectionPool, get_pool, naming
from raypg.embedded import EmbeddedServer

HANDLES = 2_000

ALL_BACKENDS = "select count(*) from pg_stat_activity where backend_type = 'client backend'"


def actors() -> set[str]:
    """Names of all actors of raypg; it makes none without a name."""
    return {
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == naming.NAMESPACE
    }


@pytest.mark.parametrize(("kind", "most_bytes"), [("constructed", 8_000), ("attached", 600), ("unpickled", 600)])
async def test_idle_handles_cost_next_to_nothing(
    kind: str, most_bytes: int, pool: WorkflowConnectionPool, pg: EmbeddedServer, direct: asyncpg.Connection
) -> None:
    data = pickle.dumps(pool)
    make: Callable[[], WorkflowConnectionPool] = {
        "constructed": lambda: WorkflowConnectionPool(name=pool.name, **pg.parameters, max_connections=10),
        "attached": lambda: get_pool(pool.name),
        "unpickled": lambda: pickle.loads(data),
    }[kind]
    make()
    known, backends, tasks = actors(), await direct.fetchval(ALL_BACKENDS), len(asyncio.all_tasks())
    gc.collect()
    tracemalloc.start()
    try:
        handles = [make() for _ in range(HANDLES)]
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"{kind}: {size / HANDLES:.0f} bytes each")
    assert size / HANDLES < most_bytes
    assert actors() <= known
    few = 5  # what other pools of the session may do meanwhile
    assert await direct.fetchval(ALL_BACKENDS) <= backends + few
    assert len(asyncio.all_tasks()) <= tasks + few
    # And any of them is as good as another.
    chosen = handles[:: HANDLES // 20]
    assert await asyncio.gather(*(handle.fetchval("select 1") for handle in chosen)) == [1] * len(chosen)
    if kind != "constructed":
        await asyncio.gather(*(handle.close() for handle in chosen))
    assert actors() <= known
    assert len(await backends_of(direct, pool.name)) <= 10
