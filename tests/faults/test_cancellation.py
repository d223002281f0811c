"""Callers leave at any moment, thousands of them: nothing is lost, shared, or cancelled that was somebody else's."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from pools import backends_of, own_pool, running, status_of_all, unique_name
from waiting import eventually

from raypg import QueryPipelineNode, QueryTimeoutError, WorkflowConnectionPool
from raypg.embedded import EmbeddedServer

CAP = 8
WANDERERS = 2_000
AT_ONCE = 24

Wanderer = Callable[[WorkflowConnectionPool, str, random.Random], Awaitable[Any]]


async def fetches(pool: WorkflowConnectionPool, table: str, rng: random.Random) -> None:
    filler = "x" * rng.choice([1, 200_000])
    await pool.fetch("select pg_sleep($1), $2::text", rng.choice([0.0, 0.005, 0.005, 30.0]), filler)


async def reads_quickly(pool: WorkflowConnectionPool, table: str, rng: random.Random) -> None:
    await asyncio.gather(*(pool.fetchval("select $1::int", number) for number in range(5)))


async def executes(pool: WorkflowConnectionPool, table: str, rng: random.Random) -> None:
    await pool.execute(f"insert into {table} select $1, 'x' from (select pg_sleep($2)) s", rng.getrandbits(31), 0.005)
    await pool.executemany(f"insert into {table} values ($1, 'x')", [(rng.getrandbits(31),) for _ in range(20)])


async def with_settings(pool: WorkflowConnectionPool, table: str, rng: random.Random) -> None:
    await pool.fetch("select pg_sleep($1)", rng.choice([0.0, 30.0]), settings={"work_mem": "1MB"})


async def leases(pool: WorkflowConnectionPool, table: str, rng: random.Random) -> None:
    async with pool.acquire() as connection:
        pid = await connection.fetchval("select pg_backend_pid()")
        await connection.execute("create temp table mine (a int)")
        await connection.fetch("select pg_sleep($1)", rng.choice([0.0, 0.005, 0.005, 30.0]))
        assert await connection.fetchval("select pg_backend_pid()") == pid


async def two_at_once_on_a_lease(pool: WorkflowConnectionPool, table: str, rng: random.Random) -> None:
    async with pool.acquire() as connection:
        sleep = rng.choice([0.005, 30.0])
        await asyncio.gather(*(connection.fetch("select pg_sleep($1)", sleep) for _ in range(2)))


async def transactions(pool: WorkflowConnectionPool, table: str, rng: random.Random) -> None:
    async with pool.transaction() as tx:
        await tx.execute(f"insert into {table} values ($1, 'x')", rng.getrandbits(31))
        async with tx.transaction():
            await tx.fetch("select pg_sleep($1)", rng.choice([0.0, 0.005, 0.005, 30.0]))


async def pipelines(pool: WorkflowConnectionPool, table: str, rng: random.Random) -> None:
    strategy = rng.choice(["best_effort", "transactional"])
    async with QueryPipelineNode("leaver", pool, batch_size=10, strategy=strategy) as pipeline:
        for _ in range(30):
            await pipeline.add_query(f"insert into {table} values ($1, 'x')", [rng.getrandbits(31)])
        await pipeline.flush()


KINDS: list[Wanderer] = [
    fetches,
    reads_quickly,
    executes,
    with_settings,
    leases,
    two_at_once_on_a_lease,
    transactions,
    pipelines,
]


async def leave(work: Awaitable[Any], rng: random.Random, patience: float) -> str:
    """Begin *work* and leave it at a random moment, within 0.6 s with a *patience* of 1; says how it ended."""
    task = asyncio.ensure_future(work)
    if rng.random() < 0.3:
        for _ in range(rng.randrange(12)):
            await asyncio.sleep(0)
    else:
        await asyncio.wait((task,), timeout=patience * rng.choice([0.02, 0.1, 0.6]) * rng.random())
    task.cancel()
    try:
        await asyncio.wait_for(task, 25)
    except asyncio.CancelledError:
        return "cancelled"
    except asyncpg.UniqueViolationError:
        return "failed"
    return "finished"


async def lonely_timeout(pool: WorkflowConnectionPool, rng: random.Random) -> str:
    """The other way to leave: by a limit of one's own."""
    try:
        await pool.fetch("select pg_sleep(30)", timeout=rng.uniform(0.001, 0.1))
    except (QueryTimeoutError, TimeoutError):
        return "timed out"
    raise AssertionError("it ran for 30 s")


async def bystander(pool: WorkflowConnectionPool, number: int, over: asyncio.Event) -> int:
    """Statements of somebody who stays: each must succeed, with its own answer."""
    rounds = 0
    while not over.is_set():
        value = number * 1_000_000 + rounds
        kind = rounds % 3
        if kind == 0:
            assert await pool.fetchval("select $1::int from (select pg_sleep(0.002)) s", value) == value
        elif kind == 1:
            async with pool.transaction() as tx:
                first = await tx.fetchval("select pg_backend_pid()")
                assert await tx.fetchval("select pg_backend_pid() from (select pg_sleep(0.002)) s") == first
        else:
            assert await asyncio.gather(*(pool.fetchval("select $1::int", n) for n in range(5))) == [0, 1, 2, 3, 4]
        rounds += 1
    return rounds


@pytest.mark.parametrize("workers", [1, 2])
async def test_thousands_of_callers_leave_at_any_moment(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, schema: str, rng: random.Random, workers: int
) -> None:
    table = f"{schema}.item"
    await direct.execute(f"create table {table} (id int, label text)")
    async with own_pool(pg, name=unique_name(), max_connections=CAP, workers=workers) as pool:
        gate = asyncio.Semaphore(AT_ONCE)
        seen: Counter[str] = Counter()

        async def wander(number: int, patience: float = 1.0) -> None:
            async with gate:
                own = random.Random(rng.getrandbits(64))
                if number % 20 == 0:
                    seen[f"lonely {await lonely_timeout(pool, own)}"] += 1
                    return
                kind = KINDS[number % len(KINDS)]
                ended = await leave(kind(pool, table, own), own, patience)
                seen[f"{kind.__name__} {ended}"] += 1

        over = asyncio.Event()
        staying = [asyncio.create_task(bystander(pool, number, over)) for number in range(3)]
        await asyncio.gather(*(wander(number) for number in range(WANDERERS // 2)))
        wandered, patience = WANDERERS // 2, 1.0
        while ended_in(seen, "finished") <= WANDERERS // 50 and patience < 16:  # on a slow machine
            patience *= 2
            await asyncio.gather(*(wander(number, patience) for number in range(WANDERERS // 20)))
            wandered += WANDERERS // 20
        over.set()
        rounds = await asyncio.wait_for(asyncio.gather(*staying), 20)
        print(dict(sorted(seen.items())), "bystanders:", rounds)
        assert all(rounds)
        assert sum(seen.values()) == wandered
        for ending in ("cancelled", "finished"):
            assert ended_in(seen, ending) > WANDERERS // 50

        await nothing_is_left(pool, direct)
        await every_connection_answers(pool, direct)


def ended_in(seen: Counter[str], ending: str) -> int:
    """How many ended so."""
    return sum(count for what, count in seen.items() if what.endswith(ending))


async def nothing_is_left(pool: WorkflowConnectionPool, direct: asyncpg.Connection) -> None:
    """All leases are back, and no statement runs for a caller who has left."""

    async def at_rest() -> bool:
        status = await status_of_all(pool)
        leased = [c for c in status["connections"].values() if c["lease"] is not None]
        active = [b for b in await backends_of(direct, pool.name, control=False) if b["state"] != "idle"]
        return not leased and not active and status["active_count"] == 0

    await eventually(at_rest, timeout=6, what="all connections are idle, none leased")
    channels = (await pool._dispatcher())._channels
    await eventually(
        lambda: {channel.open for channel in channels.values()} == {0},
        what="callers who left are no longer counted as load",
    )


async def every_connection_answers(pool: WorkflowConnectionPool, direct: asyncpg.Connection) -> None:
    """The whole budget can be leased at once, each lease is a backend of its own, and the server knows no others."""
    status = await status_of_all(pool)
    budget = sum(worker["budget"] for worker in status["workers"])
    assert budget == CAP - 1  # one is for control
    held = await asyncio.gather(*(pool.acquire(timeout=10)._acquire() for _ in range(budget)))
    pids = await asyncio.gather(*(connection.fetchval("select pg_backend_pid()") for connection in held))
    assert pids == [connection.backend_pid for connection in held]
    assert len(set(pids)) == budget
    assert set(pids) == {backend["pid"] for backend in await backends_of(direct, pool.name, control=False)}
    await asyncio.gather(*(connection.release() for connection in held))


async def test_a_statement_that_waits_behind_another_of_its_lease_is_cancelled_too(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, schema: str
) -> None:
    """It has not begun when its caller leaves, and never begins."""
    await direct.execute(f"create table {schema}.item (a int)")
    async with own_pool(pg, max_connections=1) as pool, pool.acquire() as connection:
        first = asyncio.create_task(connection.fetch("select pg_sleep(5), 'ahead'"))
        await eventually(lambda: running(direct, "'ahead'"))
        second = asyncio.create_task(connection.execute(f"insert into {schema}.item values (1)"))
        await asyncio.sleep(0.1)
        second.cancel()
        await first
        assert await connection.fetchval(f"select count(*) from {schema}.item") == 0


async def test_a_flush_that_was_left_in_the_middle_of_a_commit_tells_it_next_time(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, schema: str
) -> None:
    await direct.execute(f"""
        create table {schema}.late (a int);
        create function {schema}.slow() returns trigger language plpgsql as
            $$ begin perform pg_advisory_xact_lock(hashtext('{schema}')); raise exception 'no'; end $$;
        create constraint trigger late after insert on {schema}.late deferrable initially deferred
            for each row execute function {schema}.slow();
    """)
    await direct.execute(f"select pg_advisory_lock(hashtext('{schema}'))")  # the COMMIT waits for it
    async with own_pool(pg, max_connections=1) as pool:
        pipeline = QueryPipelineNode("left", pool, strategy="transactional")
        await pipeline.add_query(f"insert into {schema}.late values (1)")
        flushing = asyncio.create_task(pipeline.flush())

        async def commits() -> bool:
            rows = await direct.fetch("select query from pg_stat_activity where wait_event = 'advisory'")
            return any(row["query"] == "COMMIT" for row in rows)

        await eventually(commits)
        flushing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flushing
        await direct.execute("select pg_advisory_unlock_all()")
        results = await pipeline.flush()
        assert [result.success for result in results] == [False]
        assert await direct.fetchval(f"select count(*) from {schema}.late") == 0
        await pipeline.close()
