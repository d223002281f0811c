"""Workers and Pool actors that die at the wrong moment: what one life was told, granted or asked is not another's."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from typing import Any

import asyncpg
import pytest
import ray
from load import load
from pools import CapWatch, backends_of, own_pool, states, worker_pids
from waiting import eventually

from raypg import OutcomeUnknownError, QueryTimeoutError, WorkflowConnectionPool, cluster, naming
from raypg.actors.worker import PoolWorker
from raypg.channel import Call
from raypg.config import from_kwargs
from raypg.embedded import EmbeddedServer
from raypg.messages import FETCH


async def states_now(pool: WorkflowConnectionPool) -> dict[int, tuple[str, int]]:
    """The same, or nothing while the Pool actor is away."""
    try:
        return await states(pool)
    except (ray.exceptions.RayActorError, TimeoutError):
        return {}


async def test_the_share_of_an_earlier_life_is_not_taken(pg: EmbeddedServer) -> None:
    worker = PoolWorker("p", 0, "cluster", from_kwargs(name="p", environ={}, **pg.parameters).to_dict())
    answer = await worker.ping(1, "another life", 3, math.inf, 0, [], 1, 1)
    assert answer["budget"] == 0
    assert (await worker.ping(2, answer["incarnation"], 3, math.inf, 0, [], 1, 1))["budget"] == 3
    await worker.close("the test is over")


async def test_no_connection_is_opened_by_a_share_that_is_out_of_date(pg: EmbeddedServer) -> None:
    worker = PoolWorker("p", 0, "cluster", from_kwargs(name="p", environ={}, **pg.parameters).to_dict())
    answer = await worker.ping(1, None, None, None, 0, [], 1, 1)
    await worker.ping(2, answer["incarnation"], 3, answer["clock"] - 60, 0, [], 1, 1)
    assert await worker.warm_up(2) == ("ok", None)
    assert worker._engine.connections.slots == 0
    await worker.close("the test is over")


async def test_what_a_lost_line_asked_is_not_told_on_the_next(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, schema: str
) -> None:
    """The worker lives, and works on: the first message of the new line is not the first one of the old."""
    await direct.execute(f"create table {schema}.item (id int)")
    async with own_pool(pg, max_connections=3, workers=1) as pool:
        dispatcher = await pool._dispatcher()
        (line,) = dispatcher._channels.values()
        sql = f"insert into {schema}.item select 1 from pg_sleep(1) returning 'old'"
        old = Call(FETCH, sql, (), None, None, asyncio.get_running_loop())
        line.send(old)
        await eventually(lambda: line._batches)
        line.lose()
        with pytest.raises(OutcomeUnknownError):
            await old.future
        assert await pool.fetchval("select 1", timeout=20) == 1
        new = Call(FETCH, "select 'new'", (), None, None, asyncio.get_running_loop())
        (successor,) = dispatcher._channels.values()
        successor.send(new)
        assert (await asyncio.wait_for(new.future, 20))[0] == [("new",)]
        assert successor._identity != line._identity, "or the old outcome might be told to the new caller"


async def test_a_worker_of_the_same_number_is_found(ray_cluster: Any, pg: EmbeddedServer) -> None:
    """Somebody ended the worker for good. The Pool actor has started another one before this handle asks."""
    async with own_pool(pg, max_connections=3, workers=1, acquire_timeout=5.0) as pool:
        assert await pool.fetchval("select 1") == 1
        name = naming.worker_actor(pool.name, 0)
        worker = ray.get_actor(name, namespace=naming.NAMESPACE)
        before = (await pool._dispatcher())._channels[0].incarnation
        ray.kill(worker)

        async def another() -> bool:
            membership = await cluster.find(pool.name).membership.remote()
            return [place[4] not in (None, before) for place in membership["workers"]] == [True]

        await eventually(another, 40)
        assert await pool.fetchval("select 1") == 1


async def test_a_restarted_worker_has_the_configuration_of_now(ray_cluster: Any, pg: EmbeddedServer) -> None:
    async with own_pool(pg, max_connections=3, workers=1) as pool:
        await pool.reconfigure(command_timeout=0.5)
        pids = await worker_pids(pool.name)
        os.kill(pids[0], signal.SIGKILL)
        assert await pool.fetchval("select 1", timeout=30) == 1

        async def restarted() -> bool:
            return (await worker_pids(pool.name))[0] != pids[0] and await states_now(pool) == {0: ("serving", 3)}

        await eventually(restarted, 30)
        with pytest.raises(QueryTimeoutError):
            await pool.fetchval("select 1 from pg_sleep(5)")


async def test_pool_actor_dies_while_a_worker_drains(ray_cluster: Any, pg: EmbeddedServer) -> None:
    """The next one ends what the last one began: none stays that takes no work, and no call goes round and round."""
    async with own_pool(pg, max_connections=5, workers=1, drain_timeout=300.0) as pool:
        held = await pool.acquire()
        actor = cluster.find(pool.name)
        replacing = asyncio.wrap_future(actor.replace_workers.remote().future())

        async def draining() -> bool:
            found = await states_now(pool)
            return {index: state for index, (state, _) in found.items()} == {0: "draining", 1: "serving"}

        await eventually(draining, 40)
        os.kill(await actor.__ray_call__.remote(lambda self: os.getpid()), signal.SIGKILL)
        with pytest.raises(ray.exceptions.RayActorError):
            await replacing
        await eventually(draining, 40, "the next Pool actor knows")
        assert await held.fetchval("select 1") == 1
        async with load(pool, 8) as running:
            await eventually(lambda: running.reads > 50, 20)
            await held.release()

            async def ended() -> bool:
                return await states_now(pool) == {1: ("serving", 4)}

            await eventually(ended, 30)
        assert running.failures == []


async def test_a_handle_that_slept_through_a_restart_writes(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, schema: str
) -> None:
    """All workers that it knows of are dead: its write goes to one that lives, and is not of unknown outcome."""
    await direct.execute(f"create table {schema}.item (id int)")
    async with own_pool(pg, max_connections=5, workers=1) as pool:
        assert await pool.execute(f"insert into {schema}.item values (1)") == "INSERT 0 1"
        assert (await asyncio.wait_for(cluster.find(pool.name).replace_workers.remote(), 60)) == ("ok", 1)
        assert await pool.execute(f"insert into {schema}.item values (2)") == "INSERT 0 1"
        assert await direct.fetchval(f"select count(*) from {schema}.item") == 2


async def test_a_small_cap_holds_while_the_pool_actor_is_replaced(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection
) -> None:
    """All of it is leased: nothing can be lent for control, and nothing is taken."""
    async with own_pool(pg, max_connections=2, workers=1) as pool, CapWatch(pg, pool.name) as watch:
        held = [await pool.acquire() for _ in range(2)]
        actor = cluster.find(pool.name)
        ray.kill(actor, no_restart=False)

        async def back() -> bool:
            return (await states_now(pool)).get(0, ("", 0))[0] == "serving"

        await eventually(back, 30)
        await asyncio.sleep(4)  # nothing must happen, for longer than control waits for a connection
        assert len(await backends_of(direct, pool.name)) == 2
        assert watch.most == 2
        assert [await lease.fetchval("select 1") for lease in held] == [1, 1]
        for lease in held:
            await lease.release()

        async def shared() -> bool:
            return (await states_now(pool)) == {0: ("serving", 2)}

        await eventually(shared, 20)
        async with load(pool, 8) as running:
            await eventually(lambda: running.reads > 100, 20)
        assert running.failures == []
    assert watch.most <= 2
