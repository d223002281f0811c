"""The router in a caller's process, of a pool with a replica: which server answers, and what it shows."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import httpx
import pytest
import ray
from routers import answer, goes_to
from standby import ask, caught_up, pause, resume, standby_of
from starlette.applications import Starlette
from starlette.routing import Route
from waiting import eventually, needs, one_round

from raypg import QueryRouterNode, WorkflowConnectionPool
from raypg.deployments.query_door import Door, RouterArgs
from raypg.embedded import EmbeddedServer


@pytest.fixture(scope="module")
def replica(pg18: EmbeddedServer) -> Iterator[EmbeddedServer]:
    """A standby that tests may hold up."""
    with standby_of(pg18) as server:
        yield server


@pytest.fixture(scope="module")
def split(ray_cluster: Any, pg18: EmbeddedServer, replica: EmbeddedServer) -> Iterator[WorkflowConnectionPool]:
    handle = WorkflowConnectionPool(
        name=f"split-{secrets.token_hex(4)}", **pg18.parameters, replicas=[replica.dsn], max_connections=6
    )
    asyncio.run(handle.process({"operation": "initialize"}))
    yield handle
    asyncio.run(handle.close())


@pytest.fixture
async def splitting(
    split: WorkflowConnectionPool, pg18: EmbeddedServer, replica: EmbeddedServer, table: str
) -> AsyncIterator[QueryRouterNode]:
    """A router whose replica answers, and has the table."""
    await caught_up(pg18, replica)
    async with QueryRouterNode("splitting", split) as router:
        await eventually(lambda: goes_to(router, "replica", "select 1 as one"), 30)
        yield router


async def test_reads_go_to_the_replica_and_all_else_to_the_primary(
    splitting: QueryRouterNode, replica: EmbeddedServer, table: str, schema: str, direct: asyncpg.Connection
) -> None:
    await direct.execute(
        f"create sequence {schema}.n; create function {schema}.f() returns bigint language sql as "
        f"'select nextval(''{schema}.n'')'"
    )
    await answer(splitting, f"create view {schema}.v as select {schema}.f() as n")  # DDL: the catalogue is read anew
    for query in (f"insert into {table} (id) values (1)", f"select {schema}.f()", f"select * from {schema}.v",
                  f"select * from {table} for update", "select pg_is_in_recovery()", "show port"):  # fmt: skip
        assert await goes_to(splitting, "primary", query), query
    await splitting.process({"query": f"select count(*) from {table}", "session_id": "other"})
    found = await answer(splitting, f"select count(*) as n from {table}", session_id="reader")

    async def by_the_replica() -> dict[str, Any] | None:
        found = await answer(splitting, f"select count(*) as n from {table}")
        return found if found["routing_metadata"]["target"] == "replica" else None

    found = await eventually(by_the_replica)
    assert found["data"] == [{"n": 1}]
    assert found["routing_metadata"]["replica"] == f"127.0.0.1:{replica.port}"
    assert (await splitting.get_metrics())["router_metrics"]["by_target"]["replica"] >= 1


async def test_a_transaction_stays_on_the_primary(splitting: QueryRouterNode) -> None:
    await answer(splitting, "begin", session_id="t")
    assert await goes_to(splitting, "primary", "select 1", session_id="t")
    await answer(splitting, "commit", session_id="t")


async def test_a_session_reads_what_it_wrote_while_the_replica_is_held_up(
    splitting: QueryRouterNode, pg18: EmbeddedServer, replica: EmbeddedServer, table: str, split: WorkflowConnectionPool
) -> None:
    await caught_up(pg18, replica)
    count = f"select count(*) as n from {table}"
    await pause(replica)
    try:
        for number in range(1, 6):
            await answer(splitting, f"insert into {table} (id) values ($1)", number, session_id="writer")
            assert (await answer(splitting, count, session_id="writer"))["data"] == [{"n": number}]

        async def by_the_replica() -> QueryRouterNode | None:
            other = QueryRouterNode("other process", split)
            found = await answer(other, count)
            if found["routing_metadata"]["target"] != "replica":
                return None  # it has seen what the primary has
            assert found["data"] == [{"n": 0}]  # of one that is behind
            return other

        other = await eventually(by_the_replica)
        found = await answer(other, count, after=splitting.token("writer"))
        assert (found["data"], found["routing_metadata"]["target"]) == ([{"n": 5}], "primary")
        # It has seen that now, and never sees less again.
        assert (await answer(other, count))["data"] == [{"n": 5}]
        assert (await answer(QueryRouterNode("third", split), count, max_staleness=0.0))["data"] == [{"n": 5}]
    finally:
        await resume(replica)
    await caught_up(pg18, replica)
    await eventually(lambda: goes_to(splitting, "replica", count, session_id="writer"))


async def test_a_chain_of_writes_is_asked_for_once_and_a_chain_of_reads_never(
    splitting: QueryRouterNode, table: str
) -> None:
    """Tokens tell: a place in the log is only in them when somebody has asked for it."""
    for number in range(1, 6):
        await splitting.execute(f"insert into {table} (id) values ($1)", number, session_id="chain")
        assert splitting.token("chain") == "0/0/primary"
    count = f"select count(*) as n from {table}"

    async def asked_for_no_more() -> bool:
        if not await goes_to(splitting, "replica", count, session_id="chain"):
            return False
        place, _, seen = splitting.token("chain").rpartition("/")
        assert place != "0/0"
        assert seen != "primary"
        for _ in range(5):
            assert await splitting.fetchval(count, session_id="chain") == 5
        return splitting.token("chain") == f"{place}/{seen}"

    await eventually(asked_for_no_more, 30)


async def test_a_token_is_good_in_another_process(
    splitting: QueryRouterNode, replica: EmbeddedServer, table: str
) -> None:
    @ray.remote(num_cpus=0)
    def read(router: QueryRouterNode, query: str, after: str | None) -> tuple[int, str, bool]:
        found = asyncio.run(router.process({"query": query, "after": after}))
        return found["data"][0]["n"], found["routing_metadata"]["target"], os.getpid() != there

    there = os.getpid()
    query = f"select count(*) as n from {table}"
    await pause(replica)
    try:
        await splitting.execute(f"insert into {table} (id) values (1)", session_id="writer")

        async def by_the_replica() -> bool:
            return bool(await read.remote(splitting, query, None) == (0, "replica", True))

        await eventually(by_the_replica, 30)
        assert await read.remote(splitting, query, splitting.token("writer")) == (1, "primary", True)
    finally:
        await resume(replica)


async def test_a_session_over_http_that_goes_to_several_doors(
    splitting: QueryRouterNode, split: WorkflowConnectionPool, replica: EmbeddedServer, table: str
) -> None:
    """Each of Serve's replicas has a router of its own, and does not know what another one has written."""

    async def post(door: Door, query: str, **more: Any) -> Any:
        app = Starlette(routes=[Route("/query", door.answer, methods=["POST"])])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return (await client.post("/query", json={"query": query, **more})).json()

    doors: list[Door] = []

    def new_door() -> Door:
        doors.append(Door(RouterArgs(pool=split.name, num_replicas=2), True, "no token is needed"))
        return doors[-1]

    async def behind() -> Door | None:  # what was answered by the primary is not forgotten again
        door = new_door()
        return door if (await post(door, count))["data"] == [{"n": 0}] else None

    count = f"select count(*) as n from {table}"
    await pause(replica)
    try:
        await post(new_door(), f"insert into {table} (id) values (1)", session_id="s")
        other = await eventually(behind)
        found = await post(other, count, session_id="s")
        assert (found["data"], found["routing_metadata"]["target"]) == ([{"n": 1}], "primary")
    finally:
        await resume(replica)
        for door in doors:
            await door.close()


async def test_the_age_that_a_router_allows_is_for_queries_that_do_not_say(
    splitting: QueryRouterNode, split: WorkflowConnectionPool
) -> None:
    async with QueryRouterNode("fresh", split, max_staleness=0.0) as fresh:
        assert await goes_to(fresh, "primary", "select 1")
        for allowed, more in (
            ({}, {}),
            ({"max_staleness": 0.0}, {"max_staleness": 60}),
            (
                {"max_staleness": 0.0},
                {"max_staleness": None},
            ),
        ):

            async def by_the_replica(allowed: dict[str, Any] = allowed, more: dict[str, Any] = more) -> bool:
                return await goes_to(QueryRouterNode("any", split, **allowed), "replica", "select 1", **more)

            await eventually(by_the_replica)


async def test_what_a_replica_does_not_have_yet_is_asked_of_the_primary(
    splitting: QueryRouterNode, pg18: EmbeddedServer, replica: EmbeddedServer, schema: str, direct: asyncpg.Connection
) -> None:
    await pause(replica)
    try:
        await direct.execute(f"create table {schema}.new (a int); insert into {schema}.new values (7)")
        splitting._catalogue.changed()
        found = await answer(splitting, f"select a from {schema}.new", session_id="somebody")
        assert (found["data"], found["routing_metadata"]["target"]) == ([{"a": 7}], "primary")
    finally:
        await resume(replica)


async def test_what_a_replica_refuses_is_learnt(
    splitting: QueryRouterNode, pg18: EmbeddedServer, replica: EmbeddedServer, schema: str, direct: asyncpg.Connection
) -> None:
    """A function becomes one that writes behind the router's back: the verdict on it is old for a moment."""
    rounds = itertools.count()

    async def refusals() -> int:
        return int((await splitting.get_metrics())["router_metrics"]["replica_refusals"])

    async def attempt() -> None:
        round_ = next(rounds)
        g, n, session = f"{schema}.g{round_}", f"{schema}.n{round_}", f"fresh {round_}"
        function = f"create or replace function {g}() returns bigint language sql as"
        await direct.execute(f"create sequence {n}; {function} 'select 1::bigint'")
        splitting._catalogue.changed()
        await caught_up(pg18, replica)
        query, before = f"select {g}() as n", await refusals()
        assert (await splitting.classify(query)).kind == "READ"
        await direct.execute(f"{function} 'select nextval(''{n}'')'")
        await caught_up(pg18, replica)
        assert (await answer(splitting, query, session_id=session))["data"] == [{"n": 1}]
        needs(await refusals() == before + 1, "the replica was asked")
        assert (await splitting.classify(query)).kind == "UNKNOWN"
        assert (await answer(splitting, query, session_id=session))["data"] == [{"n": 2}]
        splitting._catalogue.changed()
        verdict = await splitting.classify(query)
        assert (verdict.kind, verdict.reason) == ("WRITE", "function nextval is not harmless")

    await one_round(attempt)


async def test_who_has_failed_a_read_is_told_too(
    splitting: QueryRouterNode, schema: str, pg18: EmbeddedServer, replica: EmbeddedServer, direct: asyncpg.Connection
) -> None:

    async def fails_on_the_replica() -> bool:
        found = await answer(splitting, "select 1 / $1::int", 0)
        assert found["sqlstate"] == "22012"
        return bool(found["routing_metadata"]["target"] == "replica")

    await eventually(fails_on_the_replica)
    found = await answer(splitting, "select * from nowhere")
    assert (found["sqlstate"], found["routing_metadata"]["target"]) == ("42P01", "primary")
    # What a replica refuses, and fails on the primary, is learnt as well.
    function = f"create or replace function {schema}.h() returns bigint language sql as"
    await direct.execute(f"create sequence {schema}.n minvalue 0 maxvalue 1 start 1; {function} 'select 1::bigint'")
    splitting._catalogue.changed()
    assert (await splitting.classify(f"select {schema}.h()")).kind == "READ"
    await direct.execute(f"{function} 'select nextval(''{schema}.n'')'; select nextval('{schema}.n')")
    await caught_up(pg18, replica)

    async def learnt() -> bool:  # as soon as the replica was asked
        found = await answer(splitting, f"select {schema}.h()", session_id=secrets.token_hex(4))
        assert (found["sqlstate"], found["routing_metadata"]["target"]) == ("2200H", "primary")
        return (await splitting.classify(f"select {schema}.h()")).kind == "UNKNOWN"

    await eventually(learnt)


async def test_without_the_split_all_goes_to_the_primary(
    split: WorkflowConnectionPool, replica: EmbeddedServer
) -> None:
    async with QueryRouterNode("r", split, enable_read_write_split=False) as router:
        assert await goes_to(router, "primary", "select 1")
        assert await ask(replica, "select pg_is_in_recovery()")
