"""Workers are where the nodes are, which come and die; the pool grows and shrinks under load, and nobody notices."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from typing import Any

import asyncpg
import pytest
import ray
from load import load
from nodes import Nodes
from pools import (
    DETECTED_WITHIN,
    PASSED_ON_WITHIN,
    CapWatch,
    after,
    all_open,
    own_pool,
    states,
    worker_pids,
)
from waiting import eventually

from raypg import ConfigError, LeaseLostError, PoolConflictError, QueryPipelineNode, WorkflowConnectionPool
from raypg.embedded import EmbeddedServer
from raypg.pool_life import restart


async def workers(pool: WorkflowConnectionPool) -> list[dict[str, Any]]:
    return (await pool.process({"operation": "get_status"}))["workers"]  # type: ignore[no-any-return]


async def serving_on(pool: WorkflowConnectionPool) -> Counter[str]:
    """Node → its workers that serve."""
    return Counter(worker["node"] for worker in await workers(pool) if worker["state"] == "serving")


async def settles(pool: WorkflowConnectionPool, wanted: dict[str, int] | list[int], timeout: float = 30) -> None:
    """Wait until exactly *wanted* workers serve on each node (or on some nodes), each with a share, and no other is
    left."""

    async def so() -> bool:
        found = await workers(pool)
        if any(worker["state"] != "serving" or not worker["budget"] for worker in found):
            return False
        on = Counter(worker["node"] for worker in found)
        return on == wanted if isinstance(wanted, dict) else sorted(on.values()) == wanted

    await eventually(so, timeout, f"workers serve as {wanted}")


async def lost(nodes: Nodes, node: str, how: signal.Signals, pool: WorkflowConnectionPool, shares: int) -> None:
    """Let all processes of *node* end at once, or fall silent, as when its power or its network fails: its worker is
    known to be lost, and others have the *shares* of the pool, in time. Then take the node away."""
    index = next(worker["index"] for worker in await workers(pool) if worker["node"] == node)
    for process in nodes.processes(node):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, how)
    lost_at = time.monotonic()

    async def noticed() -> bool:
        found = await states(pool)
        return index not in found or found[index][0] == "lost"

    async def passed_on() -> bool:
        return sum(share for other, (_, share) in (await states(pool)).items() if other != index) == shares

    await after(noticed, lost_at, DETECTED_WITHIN, "it is known to be lost")
    await after(passed_on, lost_at, PASSED_ON_WITHIN, "others have its share")
    await asyncio.to_thread(nodes.kill, node)


async def test_a_worker_on_each_node_as_nodes_come_and_die(
    three_nodes: tuple[str, str, str], nodes: Nodes, pg: EmbeddedServer, direct: asyncpg.Connection, table: str
) -> None:
    async with own_pool(pg, max_connections=9) as pool, CapWatch(pg, pool.name) as watch:
        await settles(pool, dict.fromkeys(three_nodes, 1))
        async with load(pool, 30, 6, table) as running:
            fourth = await asyncio.to_thread(nodes.add)
            await settles(pool, dict.fromkeys([*three_nodes, fourth], 1))
            dispatcher = await pool._dispatcher()
            await eventually(lambda: any(line.node == fourth for line in dispatcher._channels.values()))
            await all_open(pool, direct, 8)
            await lost(nodes, fourth, signal.SIGKILL, pool, 8)
            await settles(pool, dict.fromkeys(three_nodes, 1))
            before = running.reads
            await eventually(lambda: running.reads > before + 200, 20)
        assert running.failures == []
        assert all(line.node != fourth for line in dispatcher._channels.values())
        await running.check(direct)
    watch.held(9)


async def test_a_node_falls_silent_under_load(
    three_nodes: tuple[str, str, str], nodes: Nodes, pg: EmbeddedServer, direct: asyncpg.Connection, table: str
) -> None:
    """With a number of workers: another one serves in the place of that which is lost."""
    doomed = await asyncio.to_thread(nodes.add)
    async with own_pool(pg, max_connections=13, workers=4) as pool, CapWatch(pg, pool.name) as watch:
        async with load(pool, 30, 6, table) as running:
            await all_open(pool, direct, 12)
            await lost(nodes, doomed, signal.SIGSTOP, pool, 12)

            async def replaced() -> bool:
                serving = await serving_on(pool)
                return serving.total() == 4 and doomed not in serving

            await eventually(replaced, 40)
            before = running.reads
            await eventually(lambda: running.reads > before + 100, 20)
        assert running.failures == []
        await running.check(direct)
    watch.held(13)


async def test_scaled_under_load(three_nodes: tuple[str, str, str], pg: EmbeddedServer) -> None:
    async with own_pool(pg, max_connections=8, workers=1) as pool, CapWatch(pg, pool.name) as watch:
        async with load(pool) as running:
            assert (await pool.scale(workers=4))["workers"] == 4
            await settles(pool, [1, 1, 2])
            answer = await pool.scale(workers=2, max_connections=5)
            assert (answer["new_size"], answer["workers"]) == (5, 2)
            await settles(pool, [1, 1])
            at = len(watch.counts)
            assert (await asyncio.to_thread(pool.sync.scale, max_connections=12))["new_size"] == 12
            await eventually(lambda: max(watch.counts[at:], default=0) > 8, what="the pool grows")
        assert running.failures == []
        assert running.reads > 500
        assert max(watch.counts[:at]) <= 8
        with pytest.raises(ConfigError, match="12 workers cannot share 12 connections, one of them for control"):
            await pool.scale(workers=12)
        with pytest.raises(ConfigError, match="workers"):
            await pool.scale(workers=-1)
        with pytest.raises(ConfigError, match="give workers, max_connections or both"):
            await pool.scale()
    watch.held(12)


async def test_workers_on_labelled_nodes_only(three_nodes: tuple[str, str, str], pg: EmbeddedServer) -> None:
    settings = {"max_connections": 4, "node_labels": {"role": "db"}}
    async with own_pool(pg, **settings) as pool, CapWatch(pg, pool.name) as watch:
        await settles(pool, {three_nodes[1]: 1})
        await pool.reconfigure(node_labels={})
        await settles(pool, dict.fromkeys(three_nodes, 1))
        other = WorkflowConnectionPool(name=pool.name, **pg.parameters, max_connections=4, node_labels={"role": "web"})
        with pytest.raises(PoolConflictError, match="node_labels"):
            await other.process({"operation": "initialize"})
    watch.held(4)


async def test_a_drained_worker_ends_what_it_has_begun(
    three_nodes: tuple[str, str, str], pg: EmbeddedServer, direct: asyncpg.Connection, schema: str
) -> None:
    await direct.execute(f"create table {schema}.item (id int)")
    settings = {"max_connections": 13, "drain_timeout": 10.0}
    async with own_pool(pg, **settings) as pool, CapWatch(pg, pool.name) as watch:
        await settles(pool, dict.fromkeys(three_nodes, 1))
        async with pool.transaction() as tx:
            await tx.execute(f"insert into {schema}.item values (1)")
            dispatcher = await pool._dispatcher()
            local = next(line for line in dispatcher._channels.values() if line.node == three_nodes[0])
            assert tx._channel is local, "a worker on our own node is preferred"
            stay = await pool.acquire()
            assert stay._channel is local
            slow = asyncio.create_task(pool.fetchval("select 7 from pg_sleep(2)"))
            await eventually(lambda: local.open == 3)
            # Without workers here: the one on this node drains.
            await pool.reconfigure(node_labels={"ray.io/node-id": three_nodes[1]})
            await settles_without(pool, local.index)
            assert await pool.fetchval("select 1") == 1
            assert local.draining
            await tx.execute(f"insert into {schema}.item values (2)")
            assert await slow == 7
        assert await direct.fetchval(f"select count(*) from {schema}.item") == 2
        # It has 10 s. Then what it still holds is taken, and says so.
        await settles(pool, {three_nodes[1]: 1})
        with pytest.raises(LeaseLostError, match=r"taken away|worker died"):
            await stay.fetchval("select 1")
    watch.held(13)


async def settles_without(pool: WorkflowConnectionPool, index: int) -> None:
    async def draining() -> bool:
        return any(worker["index"] == index and worker["state"] == "draining" for worker in await workers(pool))

    await eventually(draining)


@pytest.mark.parametrize("cap", [1, 8])
async def test_restarted_under_load(
    three_nodes: tuple[str, str, str], pg: EmbeddedServer, direct: asyncpg.Connection, schema: str, cap: int
) -> None:
    """Every process is a new one, and no query has failed; even where old and new must share one connection."""
    await direct.execute(f"create table {schema}.item (id int); create table {schema}.filled (id int, at bigserial)")
    count = 1 if cap == 1 else 2
    settings = {"max_connections": cap, "workers": count}
    async with own_pool(pg, **settings) as pool, CapWatch(pg, pool.name) as watch:
        before = await worker_pids(pool.name)
        async with load(pool, 8, 4, f"{schema}.item") as running:
            await eventually(lambda: running.reads > 20)
            filling = asyncio.create_task(fill(pool, f"{schema}.filled", over := asyncio.Event()))
            assert await restart(pool.name) == count
            over.set()
            filled = await filling
            at = running.reads
            await eventually(lambda: running.reads > at + 50, 20)
        assert running.failures == []
        assert running.unknown == []
        await running.check(direct)
        assert [row[0] for row in await direct.fetch(f"select id from {schema}.filled order by at")] == list(
            range(filled)
        )

        async def new() -> bool:
            try:
                return len(after := await all_pids(pool)) == count and not after & set(before.values())
            except ray.exceptions.RayActorError:
                return False  # it was told of the new ones, and is not done with the old ones yet

        await eventually(new, 20)
        assert await pool.fetchval("select 1") == 1
    watch.held(cap)


async def fill(pool: WorkflowConnectionPool, table: str, over: asyncio.Event) -> int:
    """Insert numbers through a pipeline, in order, until *over*; how many."""
    count = 0
    async with QueryPipelineNode("fill", pool, batch_size=10, flush_interval=0.01) as pipeline:
        while not over.is_set():
            # Two texts in turn, so that order matters and they do not fan out.
            for sql in (f"insert into {table} values ($1)", f"insert into {table} (id) values ($1)"):
                await pipeline.add_query(sql, [count])
                count += 1
            await asyncio.sleep(0.001)
        results = await pipeline.flush()
    assert [result.error for result in results if not result.success] == []
    assert len(results) == count
    return count


async def all_pids(pool: WorkflowConnectionPool) -> set[int]:
    found = set()
    dispatcher = await pool._dispatcher()
    await dispatcher.refresh()  # a handle that asks for nothing hears nothing
    for line in dispatcher._channels.values():
        found.add(await line.handle.__ray_call__.remote(lambda self: __import__("os").getpid()))
    return found


async def test_shares_follow_load(three_nodes: tuple[str, str, str], pg: EmbeddedServer) -> None:
    async with own_pool(pg, max_connections=13) as pool, CapWatch(pg, pool.name) as watch:
        await settles(pool, dict.fromkeys(three_nodes, 1))
        assert [worker["budget"] for worker in await workers(pool)] == [4, 4, 4]
        dispatcher = await pool._dispatcher()
        lines = list(dispatcher._channels.values())
        for line in (lines[0], lines[2]):
            dispatcher.choose = lambda any_will_do=False, line=line: line  # type: ignore[method-assign]
            started = asyncio.get_running_loop().time()
            async with load(pool, 40):

                async def followed(index: int = line.index) -> bool:
                    return {w["index"]: w["budget"] for w in await workers(pool)}[index] == 10

                await eventually(followed, 10)
                took = asyncio.get_running_loop().time() - started
            print(f"10 of 12 connections after {took:.1f} s")
            assert took < 10  # benchmarks/bench_cluster.py has the figure of a machine that does nothing else
    watch.held(13)
