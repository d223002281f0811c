"""The router in a caller's process: shapes, transactions, sessions, misuse, and which server answers."""

from __future__ import annotations

import asyncio
import math
import pickle
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
from pools import NO_BREAKER, own_pool, status_of_all
from standby import ask, caught_up, pause, resume, standby_of
from waiting import eventually

from raypg import (
    ConfigError,
    LeaseLostError,
    PoolExhaustedError,
    PoolNotFoundError,
    QueryRouterNode,
    StatementNotAllowedError,
    WorkflowConnectionPool,
)
from raypg.embedded import EmbeddedServer


@pytest.fixture
async def router(pool: WorkflowConnectionPool) -> AsyncIterator[QueryRouterNode]:
    async with QueryRouterNode("test", pool) as router:
        yield router


async def answer(router: QueryRouterNode, query: str, *params: Any, **more: Any) -> dict[str, Any]:
    return await router.process({"query": query, "params": list(params), **more})


async def test_the_answer_is_that_of_the_pool_and_where_it_came_from(router: QueryRouterNode, table: str) -> None:
    found = await answer(router, f"insert into {table} values ($1, 'one', 5) returning id", 1)
    assert found["success"]
    assert found["data"] == [{"id": 1}]
    found = await router.process(
        {"query": f"select label, amount from {table} where id = $1", "parameters": (1,), "operation": "execute"}
    )
    assert (found["success"], found["error"], found["data"]) == (True, None, [{"label": "one", "amount": 5}])
    assert found["execution_time_ms"] > 0
    metadata = found["routing_metadata"]
    assert metadata.items() >= {
        "target": "primary", "replica": None, "query_type": "read_simple", "routing_confidence": 1.0, "reason": "",
        "cache_hit": False, "session_id": None, "connection_id": None,
    }.items()  # fmt: skip
    assert 0 < metadata["complexity_score"] < 1
    assert 0 < metadata["routing_time_ms"] < 1000
    assert (await answer(router, f"update {table} set amount = 6"))["data"] == [{"rows_affected": 1}]
    one = await router.process({"query": f"select amount from {table}", "fetch_mode": "one"})
    assert one["data"] == {"amount": 6}


async def test_what_the_server_has_against_a_statement_is_an_answer(router: QueryRouterNode, table: str) -> None:
    found = await answer(router, f"insert into {table} values (1, 'x', -1)")
    assert (found["success"], found["sqlstate"], found["error_type"]) == (False, "23514", "CheckViolationError")
    assert found["routing_metadata"]["query_type"] == "write_simple"
    found = await answer(router, "selec 1")
    assert (found["sqlstate"], found["routing_metadata"]["routing_confidence"]) == ("42601", 0.5)
    found = await answer(router, "select 1; select 2")
    assert (found["success"], found["error_type"]) == (False, "StatementNotAllowedError")
    found = await answer(router, "select pg_sleep(30)", timeout=0.2)
    assert (found["success"], found["error_type"]) == (False, "QueryTimeoutError")


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        ("select 1", ConfigError, "takes a dict"),
        ({}, ConfigError, "the key 'query'"),
        ({"query": 5}, ConfigError, "the key 'query'"),
        ({"query": "select 1", "parms": [1]}, ConfigError, "did you mean 'params'"),
        ({"query": "select 1", "params": [], "parameters": []}, ConfigError, "not both"),
        ({"query": "select $1", "params": {"a": 1}}, ConfigError, "list or tuple"),
        ({"query": "select 1", "operation": "initialize"}, ConfigError, "only 'execute'"),
        ({"query": "select 1", "session_id": 5}, ConfigError, "session_id"),
        ({"query": "select 1", "session_id": ""}, ConfigError, "session_id"),
        ({"query": "select 1", "session_id": "x" * 300}, ConfigError, "session_id"),
        ({"query": "select 1", "max_staleness": -1}, ConfigError, "max_staleness"),
        ({"query": "select 1", "max_staleness": "1"}, ConfigError, "max_staleness"),
        ({"query": "select 1", "after": "yesterday"}, ConfigError, "token"),
        ({"query": "select 1", "timeout": "1"}, ValueError, "timeout"),
        ({"query": "select 1", "fetch_mode": "some"}, ConfigError, "fetch_mode"),
        ({"query": "select 1", "settings": {"a b": "c"}}, ConfigError, "setting"),
        ({"query": "select '\0'"}, StatementNotAllowedError, "NUL"),
        ({"query": "select '\ud800'"}, StatementNotAllowedError, "Unicode"),
    ],
)
async def test_bad_requests_fail_and_harm_nobody(
    router: QueryRouterNode, request_: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        await router.process(request_)
    assert (await answer(router, "select 1 as one"))["data"] == [{"one": 1}]
    assert (await router.get_metrics())["router_metrics"]["routing_errors"] == 1


async def test_texts_made_to_hurt_harm_only_themselves(router: QueryRouterNode) -> None:
    nested = f"select {'(' * 500_000}1{')' * 500_000}"
    hurt = asyncio.gather(*(answer(router, text) for text in (nested, "select '" + "x" * 10_000, "/*" * 5_000)))
    good = await asyncio.gather(*(answer(router, "select $1::int as n", number) for number in range(100)))
    assert [found["data"] for found in good] == [[{"n": number}] for number in range(100)]
    for found in await hurt:
        assert not found["success"]
        assert found["routing_metadata"]["query_type"] == "unknown"
        assert found["sqlstate"] in ("54001", "42601")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": ""}, "name"),
        ({"connection_pool": ""}, "connection_pool"),
        ({"connection_pool": "no such name!"}, "name"),
        ({"connection_pool": 5}, "connection_pool"),
        ({"cache_size": -1}, "cache_size"),
        ({"enable_read_write_split": "yes"}, "enable_read_write_split"),
        ({"max_staleness": -1.0}, "max_staleness"),
        ({"session_timeout": 0}, "session_timeout"),
        ({"max_sessions": 0}, "max_sessions"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        QueryRouterNode(**{"connection_pool": "main", **settings})


async def test_an_unknown_pool_is_named_with_those_that_run(pool: WorkflowConnectionPool) -> None:
    with pytest.raises(PoolNotFoundError, match=pool.name):
        await QueryRouterNode(connection_pool="nowhere").process({"query": "select 1"})


async def test_a_router_by_name_and_in_another_process(pool: WorkflowConnectionPool, table: str) -> None:
    router = QueryRouterNode("by name", pool.name, max_staleness=5.0, cache_size=10, pattern_learning=True)
    await answer(router, f"insert into {table} values (1, 'x', 1)")
    other = pickle.loads(pickle.dumps(router))
    assert (other.name, other.max_staleness, other.cache_size) == ("by name", 5.0, 10)
    found = await answer(other, f"select count(*) as n from {table}", after=router.token())
    assert found["data"] == [{"n": 1}]
    assert "primary" in other.token()


async def test_a_transaction_is_one_session_on_one_connection(
    router: QueryRouterNode, table: str, direct: asyncpg.Connection
) -> None:
    begun = await answer(router, "BEGIN ISOLATION LEVEL REPEATABLE READ", session_id="a")
    assert begun["success"]
    assert begun["routing_metadata"]["query_type"] == "transaction"
    connection = begun["routing_metadata"]["connection_id"]
    inserted = await answer(router, f"insert into {table} values ($1, 'x', 1)", 1, session_id="a")
    assert inserted["data"] == [{"rows_affected": 1}]
    assert inserted["routing_metadata"]["connection_id"] == connection
    shown = await answer(router, f"select count(*) as n, current_setting('transaction_isolation') as i from {table}",
                         session_id="a")  # fmt: skip
    assert shown["data"] == [{"n": 1, "i": "repeatable read"}]
    assert (await answer(router, f"select count(*) as n from {table}"))["data"] == [{"n": 0}]
    assert (await answer(router, f"select count(*) as n from {table}", session_id="b"))["data"] == [{"n": 0}]
    assert (await router.get_metrics())["active_transactions"] == 1
    ended = await answer(router, "commit", session_id="a")
    assert ended["success"]
    assert ended["routing_metadata"]["connection_id"] is None
    assert await direct.fetchval(f"select count(*) from {table}") == 1
    assert (await router.get_metrics())["active_transactions"] == 0
    assert (await answer(router, f"select count(*) as n from {table}", session_id="b"))["data"] == [{"n": 1}]


async def test_rollback_savepoints_and_chains(router: QueryRouterNode, table: str, direct: asyncpg.Connection) -> None:
    async def run(*texts: str) -> None:
        for text in texts:
            found = await answer(router, text.replace("INSERT", f"insert into {table} (id) values"), session_id="s")
            assert found["success"], (text, found)

    await run("begin", "INSERT (1)", "savepoint x", "INSERT (2)", "rollback to x", "INSERT (3)", "release savepoint x")
    await run("commit and chain", "INSERT (4)", "rollback work and chain", "INSERT (5)", "end and no chain")
    await run("start transaction", "INSERT (6)", "abort", "begin read only", "select 1", "rollback /* and chain */")
    assert [row[0] for row in await direct.fetch(f"select id from {table} order by id")] == [1, 3, 5]
    assert (await router.get_metrics())["active_transactions"] == 0


async def test_a_failed_statement_fails_the_transaction_and_its_commit_says_so(
    router: QueryRouterNode, table: str, direct: asyncpg.Connection
) -> None:
    await answer(router, "begin", session_id="f")
    await answer(router, f"insert into {table} values (1, 'x', 1)", session_id="f")
    assert (await answer(router, "select 1/0", session_id="f"))["sqlstate"] == "22012"
    assert (await answer(router, "select 1", session_id="f"))["sqlstate"] == "25P02"
    ended = await answer(router, "commit", session_id="f")
    assert (ended["success"], ended["error_type"]) == (False, "TransactionRolledBackError")
    assert await direct.fetchval(f"select count(*) from {table}") == 0
    assert (await answer(router, "select 1 as one", session_id="f"))["data"] == [{"one": 1}]


async def test_an_end_without_a_beginning_and_a_beginning_too_many(router: QueryRouterNode) -> None:
    for text in ("begin", "commit", "savepoint x"):
        found = await answer(router, text)
        assert (found["success"], found["error_type"]) == (False, "StatementNotAllowedError")
        assert "session_id" in found["error"]
    for text in ("commit", "rollback", "savepoint x", "release x", "rollback to x"):
        found = await answer(router, text, session_id="n")
        assert "no open transaction" in found["error"]
    await answer(router, "begin", session_id="n")
    assert "SAVEPOINT" in (await answer(router, "begin", session_id="n"))["error"]
    with pytest.raises(ConfigError, match="SET LOCAL"):
        await answer(router, "select 1", session_id="n", settings={"work_mem": "1MB"})
    assert (await answer(router, "rollback", session_id="n"))["success"]


async def test_a_begin_that_fails_holds_nothing(pg18: EmbeddedServer, ray_cluster: Any) -> None:
    async with (
        own_pool(pg18, max_connections=1, acquire_timeout=1.0, **NO_BREAKER) as pool,
        QueryRouterNode("r", pool) as router,
    ):
        await answer(router, "begin", session_id="holder")
        with pytest.raises(PoolExhaustedError):
            await answer(router, "begin", session_id="late")
        await answer(router, "rollback", session_id="holder")
        assert not (await answer(router, "begin transaction isolation level nonsense", session_id="x"))["success"]
        metrics = await router.get_metrics()
        assert metrics["active_transactions"] == 0
        assert "no open transaction" in (await answer(router, "commit", session_id="late"))["error"]
        both = await asyncio.gather(*(answer(router, "begin", session_id="both") for _ in range(2)))
        assert sorted(found["success"] for found in both) == [False, True]
        await router.close()
        assert (await answer(router, "select 1 as one"))["data"] == [{"one": 1}]


async def test_a_transaction_that_is_left_alone_is_rolled_back_and_its_session_is_told_once(
    pool: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    async with QueryRouterNode("hasty", pool, session_timeout=0.3) as router:
        await answer(router, "begin", session_id="idle")
        await answer(router, f"insert into {table} values (1, 'x', 1)", session_id="idle")
        # What runs is not idle, however long it takes.
        assert (await answer(router, "select pg_sleep(0.8)", session_id="idle"))["success"]
        await eventually(lambda: router._sessions.in_transaction == 0)
        with pytest.raises(LeaseLostError, match=r"session 'idle' was rolled back: .* 0\.3 s"):
            await answer(router, f"insert into {table} values (2, 'x', 1)", session_id="idle")
        assert await direct.fetchval(f"select count(*) from {table}") == 0
        assert (await answer(router, "select 1 as one", session_id="idle"))["data"] == [{"one": 1}]


async def test_a_transaction_whose_backend_is_ended_is_told_as_lost(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    async with QueryRouterNode("r", pool) as router:
        await answer(router, "begin", session_id="killed")
        found = await answer(router, "select pg_backend_pid() as pid", session_id="killed")
        await direct.execute("select pg_terminate_backend($1)", found["data"][0]["pid"])
        await eventually(lambda: is_lost(router, "killed"))
        assert (await answer(router, "select 1 as one", session_id="killed"))["data"] == [{"one": 1}]


async def is_lost(router: QueryRouterNode, session_id: str) -> bool:
    try:
        await answer(router, "select 1", session_id=session_id)
    except LeaseLostError:
        return True
    return False


async def test_closing_gives_back_the_connections(pool: WorkflowConnectionPool) -> None:
    router = QueryRouterNode("r", pool)
    for number in range(3):
        await answer(router, "begin", session_id=f"s{number}")
    await router.close()
    assert (await router.get_metrics())["sessions"] == 0
    await eventually(lambda: nobody_holds_a_lease(pool))


async def nobody_holds_a_lease(pool: WorkflowConnectionPool) -> bool:
    status = await status_of_all(pool)
    return not any(connection.get("held_by") for connection in status["connections"].values())


async def test_sessions_are_forgotten_but_for_those_with_a_transaction(pool: WorkflowConnectionPool) -> None:
    async with QueryRouterNode("r", pool, max_sessions=10) as router:
        await answer(router, "begin", session_id="keep")
        await answer(router, "create temp table gone (a int)", session_id="writer")
        for number in range(50):
            router.token(f"s{number}")
        metrics = await router.get_metrics()
        assert metrics["sessions"] <= 11
        assert metrics["active_transactions"] == 1
        # Whoever is new here has seen all that was written through here.
        assert "primary" in router.token("newcomer")
        assert (await answer(router, "commit", session_id="keep"))["success"]


async def test_a_table_that_somebody_else_has_made_is_known_soon(
    router: QueryRouterNode, schema: str, direct: asyncpg.Connection
) -> None:
    assert (await router.classify("select 1")).kind == "READ"
    await direct.execute(f"create table {schema}.new (a int)")

    async def is_known() -> bool:
        return (await router.classify(f"select a from {schema}.new")).kind == "READ"

    await eventually(is_known, timeout=5)


async def test_metrics(pool: WorkflowConnectionPool, table: str) -> None:
    router = QueryRouterNode("counting", pool)
    fresh = await router.get_metrics()
    assert math.isnan(fresh["router_metrics"]["avg_routing_time_ms"])
    for text in (f"select * from {table}", f"insert into {table} (id) values (1)", "show work_mem", "selec"):
        await answer(router, text)
    metrics = await router.get_metrics()
    assert metrics["router_metrics"].items() >= {
        "queries_routed": 4, "cache_hits": 0, "cache_misses": 0, "routing_errors": 0, "replica_refusals": 0,
        "by_query_type": {"read_simple": 1, "write_simple": 1, "session": 1, "unknown": 1},
        "by_target": {"primary": 4},
    }.items()  # fmt: skip
    assert metrics["router_metrics"]["avg_routing_time_ms"] > 0
    assert metrics["routing_history"]["total_decisions"] == 4
    assert metrics["routing_history"]["recent_decisions"][0]["query_type"] == "read_simple"
    assert metrics["cache_stats"]["total_entries"] == 0


# --- with a replica ---


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
        await eventually(lambda: goes_to(router, "replica", "select 1 as one"))
        yield router


async def goes_to(router: QueryRouterNode, target: str, query: str, **more: Any) -> bool:
    found = await answer(router, query, **more)
    assert found["success"], found
    return bool(found["routing_metadata"]["target"] == target)


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
    await eventually(lambda: goes_to(splitting, "replica", f"select count(*) as n from {table}"))
    found = await answer(splitting, f"select count(*) as n from {table}")
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
        other = QueryRouterNode("other process", split)
        assert (await answer(other, count))["data"] == [{"n": 0}]  # by the replica, which is behind
        found = await answer(other, count, after=splitting.token("writer"))
        assert (found["data"], found["routing_metadata"]["target"]) == ([{"n": 5}], "primary")
        # It has seen that now, and never sees less again.
        assert (await answer(other, count))["data"] == [{"n": 5}]
        assert (await answer(QueryRouterNode("third", split), count, max_staleness=0.0))["data"] == [{"n": 5}]
    finally:
        await resume(replica)
    await caught_up(pg18, replica)
    await eventually(lambda: goes_to(splitting, "replica", count, session_id="writer"))


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
    function = f"create or replace function {schema}.g() returns bigint language sql as"
    await direct.execute(f"create sequence {schema}.n; {function} 'select 1::bigint'")
    splitting._catalogue.changed()
    await caught_up(pg18, replica)
    query = f"select {schema}.g() as n"
    assert (await splitting.classify(query)).kind == "READ"
    await direct.execute(f"{function} 'select nextval(''{schema}.n'')'")
    await caught_up(pg18, replica)
    assert (await answer(splitting, query, session_id="fresh"))["data"] == [{"n": 1}]
    verdict = await splitting.classify(query)
    assert (verdict.kind, (await splitting.get_metrics())["router_metrics"]["replica_refusals"]) == ("UNKNOWN", 1)
    assert (await answer(splitting, query, session_id="fresh"))["data"] == [{"n": 2}]
    splitting._catalogue.changed()
    verdict = await splitting.classify(query)
    assert (verdict.kind, verdict.reason) == ("WRITE", "function nextval is not harmless")


async def test_without_the_split_all_goes_to_the_primary(
    split: WorkflowConnectionPool, replica: EmbeddedServer
) -> None:
    async with QueryRouterNode("r", split, enable_read_write_split=False) as router:
        assert await goes_to(router, "primary", "select 1")
        assert await ask(replica, "select pg_is_in_recovery()")
