"""The router's cache on a real database: what is kept, what is never kept, and that no write goes unseen."""

from __future__ import annotations

import asyncio
import itertools
import pickle
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from decimal import Decimal
from typing import Any

import asyncpg
import pyarrow
import pytest
from pools import own_pool
from waiting import eventually, needs, one_round

from raypg import ConfigError, QueryPipelineNode, QueryRouterNode, WorkflowConnectionPool
from raypg.embedded import EmbeddedServer
from raypg.metrics_access import snapshots


@pytest.fixture
async def router(pool: WorkflowConnectionPool) -> AsyncIterator[QueryRouterNode]:
    async with QueryRouterNode("caching", pool, cache_size=100, cache_ttl=60.0) as router:
        yield router


@pytest.fixture
def shelf(pg18: EmbeddedServer) -> Iterator[str]:
    """Name of a table of one row, made in an event loop that is over."""

    async def execute(*statements: str) -> None:
        connection = await asyncpg.connect(**pg18.parameters)
        for statement in statements:
            await connection.execute(statement)
        await connection.close()

    asyncio.run(execute("create table public.shelf as select 1 as id"))
    yield "public.shelf"
    asyncio.run(execute("drop table public.shelf"))


async def answer(router: QueryRouterNode, query: str, *params: Any, **more: Any) -> dict[str, Any]:
    found = await router.process({"query": query, "params": list(params), **more})
    assert found["success"], found
    return found


async def hit(router: QueryRouterNode, query: str, *params: Any, **more: Any) -> list[dict[str, Any]]:
    """The answer of the cache, as soon as it has one."""

    async def look() -> dict[str, Any] | None:
        found = await answer(router, query, *params, **more)
        return found if found["routing_metadata"]["cache_hit"] else None

    found = await eventually(look, 30, f"a hit of {query}")
    assert found["routing_metadata"]["target"] == "cache"
    return list(found["data"])


async def test_what_was_read_is_read_again_without_a_message(
    pool: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    """As long as nothing is held up for two seconds: after that a cache begins anew."""
    await direct.execute(f"insert into {table} values (1, 'one', 5), (2, 'two', 6)")

    async def attempt() -> None:
        async with QueryRouterNode("caching", pool, cache_size=100, cache_ttl=60.0) as router:
            await read_again(router, pool, f"select label, amount from {table} where id = $1")

    await one_round(attempt)


async def read_again(router: QueryRouterNode, pool: WorkflowConnectionPool, query: str) -> None:
    assert await hit(router, query, 1) == [{"label": "one", "amount": 5}]
    await hit(router, query, 1)
    lines = (await pool._dispatcher()).channels
    before = [line._numbers.__reduce__() for line in lines]
    for _ in range(50):
        needs((await answer(router, query, 1))["routing_metadata"]["cache_hit"], "a hit")
        assert await router.fetch(query, 1) == [("one", 5)]
    needs([line._numbers.__reduce__() for line in lines] == before, "no message")
    assert await hit(router, query, 2) == [{"label": "two", "amount": 6}]
    assert await hit(router, query, 3) == []
    one = await router.process({"query": query, "params": [1], "fetch_mode": "one"})
    assert one["data"] == {"label": "one", "amount": 5}
    stats = (await router.get_metrics())["cache_stats"]
    needs(one["routing_metadata"]["cache_hit"] and stats["total_entries"] == 3, "three entries")
    assert stats["hits"] == stats["total_usage"] >= 104
    assert 0.5 < stats["hit_rate"] < 1
    assert stats["cache_size_bytes"] > 1500
    counted = (await router.get_metrics())["router_metrics"]
    assert (counted["cache_hits"], counted["cache_misses"]) == (stats["hits"], stats["misses"])


async def test_every_way_to_write_is_seen_at_once(
    router: QueryRouterNode, pool: WorkflowConnectionPool, schema: str, table: str, direct: asyncpg.Connection
) -> None:
    await direct.execute(f"create table {schema}.parent (id int primary key)")
    await direct.execute(f"insert into {schema}.parent values (1), (2)")
    await direct.execute(f"alter table {table} add foreign key (id) references {schema}.parent on delete cascade")
    await direct.execute(f"insert into {table} values (1, 'one', 0)")
    await direct.execute(f"create view {schema}.shown as select amount from {table} where id = 1")
    change = f"update {table} set amount = amount + 1 where id = 1"

    async def in_a_pipeline() -> None:
        async with QueryPipelineNode(name="cached", connection_pool=pool, batch_size=10) as pipeline:
            await pipeline.add_query(change)
            await pipeline.flush()

    async def in_a_transaction() -> None:
        async with pool.transaction() as tx:
            await tx.execute(change)

    async def in_a_session() -> None:
        for query in ("begin", change, "commit"):
            await answer(router, query, session_id="writer")

    async def by_ingest() -> None:
        rows = pyarrow.table({"id": [1], "label": ["new"], "amount": pyarrow.array([41], pyarrow.int32())})
        async with QueryPipelineNode(name="ingest", connection_pool=pool) as pipeline:
            await pipeline.write(rows, into=table, mode="upsert", key=["id"])

    ways: list[tuple[Callable[[], Awaitable[Any]], int | None]] = [
        (lambda: answer(router, change), 1),
        (lambda: pool.execute(change), 2),
        (lambda: pool.executemany(f"update {table} set amount = $1 where id = 1", [(5,), (6,)]), 6),
        (in_a_pipeline, 7),
        (in_a_transaction, 8),
        (in_a_session, 9),
        (by_ingest, 41),
        (lambda: pool.execute(f"delete from {schema}.parent where id = 1"), None),
    ]
    for number, (way, amount) in enumerate(ways):
        expected = [] if amount is None else [{"amount": amount}]
        before = await hit(router, f"select amount from {schema}.shown")
        assert before != expected
        await way()
        found = await answer(router, f"select amount from {schema}.shown")
        assert (found["data"], found["routing_metadata"]["cache_hit"]) == (expected, False), number
    # And what is read by another name afterwards.
    assert await hit(router, f"select amount from {schema}.shown") == []
    await pool.execute(f"create or replace view {schema}.shown as select 7 as amount from {schema}.parent")
    assert (await answer(router, f"select amount from {schema}.shown"))["data"] == [{"amount": 7}]
    assert await hit(router, f"select amount from {schema}.shown") == [{"amount": 7}]
    await pool.execute(f"truncate {schema}.parent cascade")
    assert (await answer(router, f"select amount from {schema}.shown"))["data"] == []


async def test_what_may_change_by_itself_or_by_who_asks_is_never_kept(
    router: QueryRouterNode, schema: str, table: str, direct: asyncpg.Connection
) -> None:
    await direct.execute(f"insert into {table} values (1, 'one', 5)")
    await direct.execute(f"create table {schema}.own as select 1 as a")
    await direct.execute(f"alter table {schema}.own enable row level security")
    await hit(router, f"select id from {table}")  # all that is needed for keeping is there
    for query, *params in [
        (f"select now(), id from {table}",),
        (f"select random(), id from {table}",),
        (f"select pg_backend_pid(), id from {table}",),
        (f"select $1::text::timestamptz, id from {table}", "now"),
        (f"select id from {table} limit 1",),
        (f"select a from {schema}.own",),
        ("select 1",),
        ("select relname from pg_catalog.pg_class where relname = 'pg_proc'",),
        (f"select id from {table} for update",),
    ]:
        for _ in range(3):
            assert not (await answer(router, query, *params))["routing_metadata"]["cache_hit"], query
    await answer(router, "begin", session_id="s")
    assert not (await answer(router, f"select id from {table}", session_id="s"))["routing_metadata"]["cache_hit"]
    await answer(router, "rollback", session_id="s")

    async def only_that() -> bool:
        await hit(router, f"select id from {table}")  # again, if the cache had to begin anew
        return bool((await router.get_metrics())["cache_stats"]["total_entries"] == 1)

    await eventually(only_that)


async def test_parameters_and_settings_that_differ_have_results_of_their_own(
    router: QueryRouterNode, schema: str, table: str, direct: asyncpg.Connection
) -> None:
    await direct.execute(f"insert into {table} values (1, 'one', 5)")
    query = f"select $1::numeric::text as number from {table}"
    for value in (Decimal("1.0"), Decimal("1.00"), 1):
        assert await hit(router, query, value) == [{"number": str(value)}]
    await direct.execute(f"create table {schema}.time as select timestamptz '2026-01-01 12:00+00' as at")
    text = f"select at::text as at from {schema}.time"
    for zone, shown in (("UTC", "12:00:00+00"), ("Asia/Tokyo", "21:00:00+09")):
        (row,) = await hit(router, text, settings={"timezone": zone})
        assert row["at"] == f"2026-01-01 {shown}"


async def test_a_caller_may_do_what_it_likes_with_its_rows(
    router: QueryRouterNode, schema: str, direct: asyncpg.Connection
) -> None:
    await direct.execute(f"create table {schema}.lists as select array[1, 2] as items")
    query = f"select items from {schema}.lists"
    for _ in range(3):
        (row,) = await hit(router, query)
        assert row == {"items": [1, 2]}
        row["items"].append(3)
        row["more"] = 4
        ((items,),) = await router.fetch(query)
        assert items == [1, 2]
        items.clear()


async def test_one_call_asks_for_all_and_its_end_is_nobody_elses(
    router: QueryRouterNode, pool: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    await direct.execute(f"insert into {table} select g, 'x', g from generate_series(1, 200) g")
    await hit(router, f"select id from {table} where id = 1")
    slow = f"select count(*) as n from {table} a, {table} b, {table} c where a.amount + b.amount + c.amount > $1"

    async def coalesced() -> int:
        return int((await router.get_metrics())["cache_stats"]["coalesced"])

    fresh = itertools.count(0, -1)

    async def one_asks() -> bool:
        before, least = await coalesced(), next(fresh)
        together = await asyncio.gather(*(answer(router, slow, least) for _ in range(10)))
        assert {tuple(found["data"][0].items()) for found in together} == {(("n", 200**3),)}
        return await coalesced() == before + 9

    await eventually(one_asks, 30)
    # The one that asks is cancelled.
    calls = [asyncio.create_task(answer(router, slow, 1)) for _ in range(3)]
    await asyncio.sleep(0.05)
    calls[0].cancel()
    for call in calls[1:]:
        assert (await call)["data"] == [{"n": 200**3}]
    # It fails, by the time that it has itself.
    calls = [asyncio.create_task(router.process({"query": slow, "params": [2], "timeout": 0.05}))]
    await asyncio.sleep(0)
    calls += [asyncio.create_task(answer(router, slow, 2)) for _ in range(2)]
    first, *others = await asyncio.gather(*calls)
    assert first["error_type"] == "QueryTimeoutError"
    assert [found["data"] for found in others] == [[{"n": 200**3}]] * 2


async def test_who_writes_past_raypg_is_seen_after_the_ttl_or_by_token_or_by_hand(
    pool: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    await direct.execute(f"insert into {table} values (1, 'one', 0)")
    query = f"select amount from {table}"
    numbers = itertools.count()
    async with QueryRouterNode("short", pool, cache_size=10, cache_ttl=1.0) as short:

        async def expires() -> bool:
            amount = next(numbers)
            assert await hit(short, query) == [{"amount": amount}]
            await direct.execute(f"update {table} set amount = amount + 1")

            async def seen() -> bool:
                return bool((await answer(short, query))["data"] == [{"amount": amount + 1}])

            await eventually(seen, 20)
            return bool((await short.get_metrics())["cache_stats"]["expired"] >= 1)

        await eventually(expires, 60)

    async def attempt() -> None:
        await direct.execute(f"update {table} set amount = 1")
        await kept_until_told(pool, table, query, direct)

    await one_round(attempt)


async def kept_until_told(pool: WorkflowConnectionPool, table: str, query: str, direct: asyncpg.Connection) -> None:
    async with (
        QueryRouterNode("long", pool, cache_size=10, cache_ttl=600.0) as long,
        QueryRouterNode("o", pool) as other,
    ):
        assert await hit(long, query) == [{"amount": 1}]
        await direct.execute(f"update {table} set amount = 2")
        needs((await answer(long, query))["data"] == [{"amount": 1}], "the promise, and no more")
        assert (await answer(long, query, max_staleness=0.0))["data"] == [{"amount": 2}]
        await direct.execute(f"update {table} set amount = 3")
        assert (await answer(other, query, session_id="s"))["data"] == [{"amount": 3}]
        told = await answer(long, query, after=other.token("s"), session_id="told")
        assert told["data"] == [{"amount": 3}]
        assert (await answer(long, query, session_id="told"))["data"] == [{"amount": 3}]
        assert await hit(long, query) == [{"amount": 3}]
        await direct.execute(f"update {table} set amount = 4")
        needs(await long.invalidate_cache(table) == 1, "an entry")
        assert (await answer(long, query))["data"] == [{"amount": 4}]
        assert await hit(long, query) == [{"amount": 4}]
        needs(await long.invalidate_cache() == 1, "an entry")
        with pytest.raises(ConfigError, match="no_such_table"):
            await long.invalidate_cache("no_such_table")
        assert await other.invalidate_cache() == 0


async def test_it_is_bounded_and_counted_for_all_to_see(
    pg18: EmbeddedServer, ray_cluster: Any, schema: str, direct: asyncpg.Connection
) -> None:
    await direct.execute(f"create table {schema}.many as select g as id from generate_series(1, 50) g")
    query = f"select id from {schema}.many where id = $1"
    async with own_pool(pg18, max_connections=3) as pool:
        async with QueryRouterNode("small", pool, cache_size=10) as router:

            async def filled_and_emptied() -> None:
                await hit(router, query, 1)
                for number in range(50):
                    await answer(router, query, number)
                before = (await router.get_metrics())["cache_stats"]
                needs(before["total_entries"] == 10, "a full cache")
                needs(before["evictions"] >= 40, "evictions")
                await pool.execute(f"delete from {schema}.many where id = 0")
                after = (await router.get_metrics())["cache_stats"]
                needs(after["invalidations"] - before["invalidations"] >= 10, "invalidations")

            await one_round(filled_and_emptied)

            async def told() -> bool:
                known = (await snapshots([pool.name]))[pool.name]
                mine = (await router.get_metrics())["cache_stats"]
                if not mine["total_entries"]:
                    await hit(router, query, 2)  # once, or again, if the cache had to begin anew
                    return False
                return (
                    known["counters"]["cache_hits"] == mine["hits"] > 0
                    and known["counters"]["cache_misses"] == mine["misses"]
                    and known["counters"]["cache_invalidations"] == mine["invalidations"] >= 10
                    and known["counters"]["cache_evictions"] == mine["evictions"]
                    and known["caches"]["caches"] == 1
                    and known["caches"]["cache_entries"] == mine["total_entries"] > 0
                )

            await eventually(told, 30)
        page = await pool.process({"operation": "export_metrics"})
        assert f'connection_pool_cache_hit_rate{{pool="{pool.name}"}} 0.' in page["prometheus_metrics"]


async def test_settings_are_checked_and_travel(pool: WorkflowConnectionPool) -> None:
    for settings in (
        {"cache_size": -1},
        {"cache_ttl": 0},
        {"cache_ttl": True},
        {"cache_bytes": 0},
        {"cache_bytes": 1.5},
    ):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            QueryRouterNode("r", pool, **settings)  # type: ignore[arg-type]
    router = QueryRouterNode("r", pool, cache_size=7, cache_ttl=2.5, cache_bytes=10_000, pattern_learning=True)
    other = pickle.loads(pickle.dumps(router))
    assert (other.cache_size, other.cache_ttl, other.cache_bytes, other.pattern_learning) == (7, 2.5, 10_000, True)


async def test_what_was_never_read_again_is_not_kept_any_more(
    pool: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    """What was learnt decides what is kept, never what is answered."""
    await direct.execute(f"insert into {table} values (1, 'one', 5)")
    dropped, used = f"select amount from {table} where id = $1", f"select label from {table} where id = $1"
    async with QueryRouterNode("learning", pool, cache_size=100, pattern_learning=True) as router:
        patterns = router._patterns
        assert patterns is not None
        now = time.monotonic()
        for query, uses, by_write in ((dropped, 0, True), (used, 9, False)):
            for _ in range(100):
                patterns.of(query, now).asked("primary", 0.002, 1, now)
                patterns.of(query, now).ended(uses, by_write, now)
        assert await hit(router, used, 1) == [{"label": "one"}]
        found = [await answer(router, dropped, 1) for _ in range(10)]
        assert [one["data"] for one in found] == [[{"amount": 5}]] * 10
        assert not any(one["routing_metadata"]["cache_hit"] for one in found)
        assert await hit(router, dropped, 1) == [{"amount": 5}]  # it is tried again now and then
        insights = (await router.get_metrics())["pattern_insights"]["detected_patterns"]
        gains = {
            entry["query"].split(" ")[1]: entry["cache"]["gain_per_result_ms"] for entry in insights if "cache" in entry
        }
        assert gains["amount"] < 0 < gains["label"]


def test_a_router_goes_on_in_another_event_loop(pool: WorkflowConnectionPool, shelf: str) -> None:
    """What came by one loop is not used in the next; nothing of the first is left that could fail."""
    router = QueryRouterNode("two loops", pool, cache_size=10)
    for _ in range(2):
        assert asyncio.run(hit(router, f"select id from {shelf}")) == [{"id": 1}]
    asyncio.run(router.close())
