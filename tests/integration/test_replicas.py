"""Reads on real streaming standbys: where they run, what they show, and the one cap over all servers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
from pools import backends_of, figures, status_of_all, unique_name
from standby import ask, caught_up, delay, disturbed, pause, resume, standby_of
from waiting import eventually, needs, one_round

from raypg import QueryRouterNode, Session, WorkflowConnectionPool, messages
from raypg.core.seen import NOTHING, PRIMARY, Token
from raypg.embedded import EmbeddedServer
from raypg.errors import ConfigError
from raypg.reading import Served, where_of

CAP = 10


@pytest.fixture(scope="module")
def other18(pg18: EmbeddedServer) -> Iterator[EmbeddedServer]:
    """A second standby."""
    with standby_of(pg18) as server:
        yield server


@pytest.fixture(scope="module")
def replicated(
    ray_cluster: Any, pg18: EmbeddedServer, standby18: EmbeddedServer, other18: EmbeddedServer
) -> Iterator[WorkflowConnectionPool]:
    """A pool with two replicas, when both are used."""
    handle = WorkflowConnectionPool(
        name=unique_name("replicated"),
        max_connections=CAP,
        replicas=[standby18.dsn, other18.dsn],
        **pg18.parameters,
    )
    asyncio.run(all_healthy(handle))
    yield handle
    asyncio.run(handle.close())


@pytest.fixture
async def counter(schema: str, direct: asyncpg.Connection, pg18: EmbeddedServer, standby18: EmbeddedServer) -> str:
    """Name of a table of 64 rows ``(id, n)``, which a standby has too."""
    await direct.execute(f"create table {schema}.counter as select g as id, 0 as n from generate_series(1, 64) g")
    await caught_up(pg18, standby18)
    return f"{schema}.counter"


async def replicas_of(pool: WorkflowConnectionPool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await status_of_all(pool))["replicas"]
    return found


async def all_healthy(pool: WorkflowConnectionPool) -> None:
    async def look() -> bool:
        found = await replicas_of(pool)
        return len(found) == 2 and all(replica["healthy"] for replica in found)

    await eventually(look, 30)


async def read(
    pool: WorkflowConnectionPool, sql: str, *args: Any, within: float | None = None, token: Token | None = None
) -> tuple[list[Any], Served]:
    dispatcher = await pool._dispatcher()
    where = where_of("replica", within, token)
    assert where is not None
    rows, _, served = await dispatcher.read(messages.FETCH, sql, args, None, None, where)
    return rows, served


async def commits(*servers: EmbeddedServer) -> list[int]:
    """Transactions that each server has counted, when its counts have come to rest."""
    query = "select xact_commit from pg_stat_database where datname = current_database()"
    return [await ask(server, query) for server in servers]


@pytest.mark.parametrize("way", ["pool", "router"])
async def test_reads_run_on_the_replicas(
    way: str,
    replicated: WorkflowConnectionPool,
    counter: str,
    pg18: EmbeddedServer,
    standby18: EmbeddedServer,
    other18: EmbeddedServer,
) -> None:
    """Told to be reads, or found to be by a router: all of them, unless nothing was heard of a replica for a moment."""
    await caught_up(pg18, other18)
    query = f"select n from {counter} where id = $1"
    await one_round(lambda: all_on_replicas(way, replicated, query, (pg18, standby18, other18)), 3)


async def all_on_replicas(
    way: str, replicated: WorkflowConnectionPool, query: str, servers: tuple[EmbeddedServer, ...]
) -> None:
    router = QueryRouterNode("reader", replicated)
    fetchval = router.fetchval if way == "router" else functools.partial(replicated.fetchval, read_from="replica")
    await fetchval(query, 1)  # a router reads the catalogue, on the primary
    before = await commits(*servers)
    number = 4000
    for _ in range(8):
        reads = (fetchval(query, i % 64 + 1) for i in range(number // 8))
        assert set(await asyncio.gather(*reads)) == {0}
    added: list[int] = []

    async def counted() -> bool:
        # A backend tells its counts when it has something to do, once a second.
        rest = (replicated.fetchval("select pg_sleep(0.01)", read_from="replica") for _ in range(2 * CAP))
        await asyncio.gather(*rest)
        added[:] = [after - earlier for after, earlier in zip(await commits(*servers[1:]), before[1:], strict=True)]
        return sum(added) >= number

    with contextlib.suppress(AssertionError):
        await eventually(counted, 20)
    needs(sum(added) >= number, f"{added} of {number} on replicas")
    needs((await commits(servers[0]))[0] - before[0] < 0.05 * number, "next to none on the primary")
    if way == "router":  # one session, which stays where it has read before, until that is busy
        targets = (await router.get_metrics())["router_metrics"]["by_target"]
        needs(targets == {"replica": number + 1}, f"{targets}")
    else:
        needs(min(added) > 0.2 * number, f"{added}: both have their part")


async def test_without_the_keyword_everything_runs_on_the_primary(
    replicated: WorkflowConnectionPool, counter: str
) -> None:
    query = "select pg_is_in_recovery()"
    assert await replicated.fetchval(query) is False

    async def by_each_way() -> bool:
        value = await replicated.fetchval(query, read_from="replica")
        row = await replicated.fetchrow(query, read_from="replica")
        ((also,),) = await replicated.fetch(query, read_from="replica")
        return bool(value and row[0] and also)

    await eventually(by_each_way)


@pytest.mark.parametrize(
    "wrong",
    [
        {"read_from": "replicas"},
        {"read_from": "replica", "max_staleness": -1},
        {"read_from": "replica", "max_staleness": math.nan},
        {"read_from": "replica", "max_staleness": True},
        {"read_from": "replica", "after": "nonsense"},
    ],
)
async def test_what_makes_no_sense_is_refused(replicated: WorkflowConnectionPool, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        await replicated.fetch("select 1", **wrong)


async def test_a_session_sees_what_it_wrote_and_what_it_saw(
    replicated: WorkflowConnectionPool,
    counter: str,
    pg18: EmbeddedServer,
    standby18: EmbeddedServer,
    other18: EmbeddedServer,
    rng: random.Random,
) -> None:
    """One replica is late, the other one is held up now and then."""
    await caught_up(pg18, other18)
    targets: Counter[str | None] = Counter()
    stale: list[tuple[int, int]] = []

    async def session(number: int, pairs: int) -> None:
        mine, seen = Session(), 0
        for value in range(1, pairs + 1):
            await replicated.execute(f"update {counter} set n = $2 where id = $1", number, value)
            mine.wrote()
            for _ in range(rng.randint(1, 3)):
                begun = mine.reads()
                rows, served = await read(replicated, f"select n from {counter} where id = $1", number, token=begun[0])
                mine.saw(begun, served.token)
                targets[served.replica] += 1
                if rows[0][0] != value:
                    stale.append((rows[0][0], value))
                seen = max(seen, rows[0][0])

    async with disturbed(standby18, other18, 30, between=0.3):
        await asyncio.gather(*(session(number, 60) for number in range(1, 49)))
    assert stale == []
    assert sum(targets.values()) > 4000
    assert targets[None] < sum(targets.values())  # not all of them ran on the primary
    await caught_up(pg18, standby18)


async def test_what_is_seen_on_one_replica_is_seen_on_the_next(
    replicated: WorkflowConnectionPool, counter: str, pg18: EmbeddedServer, other18: EmbeddedServer
) -> None:
    """Reads alone, while others write and one replica is late: a session never goes back."""
    await caught_up(pg18, other18)
    await delay(other18, 20)
    try:
        going = True

        async def write() -> None:
            while going:
                await replicated.execute(f"update {counter} set n = n + 1 where id = 1")

        async def watch() -> set[str | None]:
            mine, last, whom = Session(), -1, set()
            for _ in range(150):
                begun = mine.reads()
                rows, served = await read(replicated, f"select n from {counter} where id = 1", token=begun[0])
                mine.saw(begun, served.token)
                assert rows[0][0] >= last
                last = rows[0][0]
                whom.add(served.replica)
            return whom

        writing = asyncio.create_task(write())
        whom = set().union(*await asyncio.gather(*(watch() for _ in range(16))))
        going = False
        await writing
    finally:
        await delay(other18, 0)
    assert len(whom - {None}) > 0


async def test_a_token_tells_another_process_what_to_wait_for(
    replicated: WorkflowConnectionPool, counter: str, standby18: EmbeddedServer, other18: EmbeddedServer
) -> None:
    for standby in (standby18, other18):
        await pause(standby)
    try:
        await replicated.execute(f"update {counter} set n = 5 where id = 7")
        token = await replicated.token()
        assert Token.parse(token).lsn > 0
        query = f"select n from {counter} where id = 7"
        assert await replicated.fetchval(query, read_from="replica", after=token) == 5
        rows, served = await read(replicated, query, token=Token.parse(token))
        assert (rows[0][0], served.target) == (5, "primary")
        assert PRIMARY in served.token.seen
        # Without a token nobody is promised anything.
        await eventually(lambda: replicated.fetchval("select pg_is_in_recovery()", read_from="replica"))
    finally:
        for standby in (standby18, other18):
            await resume(standby)


async def test_data_may_be_as_old_as_is_allowed(
    replicated: WorkflowConnectionPool,
    counter: str,
    pg18: EmbeddedServer,
    standby18: EmbeddedServer,
    other18: EmbeddedServer,
) -> None:
    query = f"select n from {counter} where id = 9"
    await caught_up(pg18, other18)
    _, served = await read(replicated, query, within=0)
    assert served.target == "primary"  # by the time that a replica has answered, it may be older

    async def by_a_replica(within: float) -> Any:
        rows, served = await read(replicated, query, within=within)
        return rows if served.target == "replica" else None

    await eventually(lambda: by_a_replica(1))  # nothing is written: it is not late
    for standby in (standby18, other18):
        await pause(standby)
    try:
        await replicated.execute(f"update {counter} set n = 1 where id = 9")

        async def late() -> bool:
            found = await replicas_of(replicated)
            return len(found) == 2 and all(replica["lag_seconds"] > 0.6 for replica in found)

        await eventually(late)
        rows, served = await read(replicated, query, within=0.5)
        assert (rows[0][0], served.target) == (1, "primary")
        rows = await eventually(lambda: by_a_replica(60))
        assert rows[0][0] == 0
        assert all(replica["lag_bytes"] > 0 for replica in await replicas_of(replicated))
        await figures(replicated)
        text = (await replicated.process({"operation": "export_metrics"}))["prometheus_metrics"]
        lines = [line for line in text.splitlines() if line.startswith("connection_pool_replica_lag_seconds{")]
        assert len(lines) == 2
        assert all(float(line.split()[-1]) > 0.5 for line in lines)
    finally:
        for standby in (standby18, other18):
            await resume(standby)

    async def back() -> bool:
        found = await replicas_of(replicated)
        return len(found) == 2 and all(replica["lag_seconds"] == 0 for replica in found)

    await eventually(back)


async def test_what_a_replica_refuses_runs_on_the_primary_and_is_learnt(
    replicated: WorkflowConnectionPool, schema: str, direct: asyncpg.Connection
) -> None:
    numbers = itertools.count()

    async def attempt() -> None:
        name = f"{schema}.numbers_{next(numbers)}"
        await direct.execute(f"create sequence {name}")
        await eventually(lambda: sequence_is_there(replicated, name))
        before = await errors_of(replicated)
        for expected in (1, 2, 3):
            rows, served = await read(replicated, f"select nextval('{name}')")
            assert rows[0][0] == expected
            assert served.target == "primary"
            needs(served.refused, "a replica was asked")
            assert served == Served("primary", None, True, NOTHING.having_seen(PRIMARY))
        assert await errors_of(replicated) == before + 1

    await one_round(attempt)
    with pytest.raises(asyncpg.UndefinedTableError):
        await read(replicated, "select * from nowhere")


async def errors_of(pool: WorkflowConnectionPool) -> int:
    return int((await figures(pool))["detailed_metrics"]["counters"]["query_errors"])


async def sequence_is_there(pool: WorkflowConnectionPool, name: str) -> bool:
    rows, served = await read(pool, "select count(*) from pg_class where oid = to_regclass($1)", name)
    return bool(rows[0][0]) and served.target == "replica"


async def test_all_servers_share_one_cap(
    replicated: WorkflowConnectionPool,
    counter: str,
    pg18: EmbeddedServer,
    standby18: EmbeddedServer,
    other18: EmbeddedServer,
) -> None:
    """Demand moves between primary and replicas; all connections together are counted meanwhile."""
    eyes = [await asyncpg.connect(**server.parameters) for server in (pg18, standby18, other18)]
    most, looks, going = [0, 0, 0, 0], 0, True

    async def count() -> None:
        nonlocal looks
        while going:
            # There and back: what moves from one server to another meanwhile is not counted twice.
            there = [len(await backends_of(eye, replicated.name)) for eye in eyes]
            back = [len(await backends_of(eye, replicated.name)) for eye in reversed(eyes)][::-1]
            seen = [min(pair) for pair in zip(there, back, strict=True)]
            for place, number in enumerate([*seen, sum(seen)]):
                most[place] = max(most[place], number)
            looks += 1

    counting = asyncio.create_task(count())
    for _ in range(3):
        slow = "select n, pg_sleep(0.01) from " + counter + " where id = $1"
        writes = (
            replicated.execute(f"update {counter} set n = n + length(pg_sleep(0.01)::text) where id = $1", i % 64 + 1)
            for i in range(150)
        )
        await asyncio.gather(*writes)
        await asyncio.gather(*(replicated.fetch(slow, i % 64 + 1, read_from="replica") for i in range(300)))
    going = False
    await counting
    for eye in eyes:
        await eye.close()
    assert looks > 50
    assert most[3] <= CAP
    assert most[0] >= 5  # nearly all of them where the work is
    assert most[1] + most[2] >= 6


async def test_what_cannot_be_a_replica_is_named_and_not_used(ray_cluster: Any, pg18: EmbeddedServer) -> None:
    """Another cluster, a primary, and a server that is not there: warnings, and service without them."""
    nobody = "postgresql://postgres@127.0.0.1:1/postgres"
    with EmbeddedServer() as foreign:
        handle = WorkflowConnectionPool(
            name=unique_name(), max_connections=8, replicas=[foreign.dsn, pg18.dsn, nobody], **pg18.parameters
        )
        try:
            assert await handle.fetchval("select 1", read_from="replica") == 1

            async def told() -> bool:
                told = await replicas_of(handle)
                words = ("another database cluster", "no standby", "refused")
                return all(word in replica["problem"] for replica, word in zip(told, words, strict=True))

            await eventually(told, 20)
            assert [replica["role"] for replica in await replicas_of(handle)] == ["foreign", "primary", "unknown"]
            for _ in range(20):
                rows, served = await read(handle, "select pg_is_in_recovery()")
                assert (rows[0][0], served.target) == (False, "primary")
            assert await QueryRouterNode("r", handle).fetchval("select 1") == 1
        finally:
            await handle.close()


async def test_a_cap_that_is_too_small_for_all_servers_is_an_error(ray_cluster: Any, pg18: EmbeddedServer) -> None:
    handle = WorkflowConnectionPool(
        name=unique_name(), max_connections=2, replicas=[pg18.dsn, pg18.dsn], **pg18.parameters
    )
    with pytest.raises(ConfigError, match="each of 3 servers"):
        await handle.process({"operation": "initialize"})


async def test_a_replica_that_was_found_slow_at_a_statement_is_asked_last(
    replicated: WorkflowConnectionPool,
    standby18: EmbeddedServer,
    other18: EmbeddedServer,
    counter: str,
    pg18: EmbeddedServer,
) -> None:
    """What was learnt decides where, never what."""
    await caught_up(pg18, other18)
    await all_healthy(replicated)
    slow, quick = (replica["replica"] for replica in await replicas_of(replicated))
    dispatcher = await replicated._dispatcher()
    query = f"select n from {counter} where id = $1"
    for avoided, expected in (((slow,), {quick}), ((quick,), {slow}), ((slow, quick), {slow, quick})):
        where: messages.Where = (None, NOTHING.plain, avoided)

        async def as_told(where: messages.Where = where, expected: set[Any] = expected) -> bool:
            served = [await dispatcher.read(messages.FETCH, query, (1,), None, None, where) for _ in range(20)]
            assert {rows[0][0] for rows, _, _ in served} == {0}
            return {who.replica for _, _, who in served} <= expected

        await eventually(as_told, 30)
    await one_round(lambda: learnt_by_a_router(replicated, query, slow, quick))


async def learnt_by_a_router(replicated: WorkflowConnectionPool, query: str, slow: str, quick: str) -> None:
    async with QueryRouterNode("learning", replicated, pattern_learning=True) as router:
        assert router._patterns is not None
        now = time.monotonic()
        for _ in range(40):
            router._patterns.of(query, now).asked(slow, 0.5, 1, now)
            router._patterns.of(query, now).asked(quick, 0.001, 1, now)
        found = [await router.process({"query": query, "params": [1]}) for _ in range(48)]
        assert all(answer["data"] == [{"n": 0}] for answer in found)
        asked = Counter(answer["routing_metadata"]["replica"] for answer in found)
        needs(asked[quick] >= 40, f"{asked}")
        needs(asked.total() - asked[quick] - asked[slow] == 0, f"{asked}")
        insights = (await router.get_metrics())["pattern_insights"]["detected_patterns"]
        assert insights[0]["by_target"][quick]["recent_calls"] > 40
