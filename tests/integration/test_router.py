"""The router in a caller's process: shapes, transactions, sessions, misuse."""

from __future__ import annotations

import asyncio
import math
import pickle
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from pools import NO_BREAKER, own_pool, status_of_all
from routers import answer
from waiting import eventually

from raypg import (
    ConfigError,
    LeaseLostError,
    PoolExhaustedError,
    PoolNotFoundError,
    QueryRouterNode,
    QueryTimeoutError,
    StatementNotAllowedError,
    TransactionRolledBackError,
    WorkflowConnectionPool,
)
from raypg.embedded import EmbeddedServer


@pytest.fixture
async def router(pool: WorkflowConnectionPool) -> AsyncIterator[QueryRouterNode]:
    async with QueryRouterNode("test", pool) as router:
        yield router


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


async def test_asyncpgs_words_give_what_those_of_the_pool_give(
    router: QueryRouterNode, pool: WorkflowConnectionPool, table: str
) -> None:
    insert = f"insert into {table} values ($1, 'x', 5) returning id"
    assert await router.execute(insert, 1) == "INSERT 0 1"
    assert await router.fetchval(insert, 2) == 2
    assert await router.fetch(insert, 3) == [(3,)]
    query = f"select id, label from {table} where id > $1 order by id"
    assert [dict(row) for row in await router.fetch(query, 1)] == [{"id": 2, "label": "x"}, {"id": 3, "label": "x"}]
    for word in ("fetch", "fetchrow"):
        for number in (0, 7):
            assert await getattr(router, word)(query, number) == await getattr(pool, word)(query, number)
    assert (await router.fetchval(query, 0, column=1), await router.fetchval(query, 7)) == ("x", None)
    assert await router.fetchval("show work_mem", settings={"work_mem": "7MB"}) == "7MB"
    with pytest.raises(asyncpg.CheckViolationError):
        await router.fetch(f"insert into {table} values (9, 'x', -1)")
    with pytest.raises(QueryTimeoutError):
        await router.fetchval("select pg_sleep(30)", timeout=0.2)
    metrics = await router.get_metrics()
    assert metrics["router_metrics"]["routing_errors"] == 0  # what the server says is none
    assert metrics["router_metrics"]["queries_routed"] == 13
    for wrong, words in (
        ({"timeout": "1"}, "timeout"), ({"session_id": ""}, "session_id"), ({"max_staleness": -1}, "max_staleness"),
        ({"after": "x"}, "token"), ({"settings": {"a b": "c"}}, "setting"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            await router.fetch("select 1", **wrong)
    with pytest.raises(StatementNotAllowedError, match="NUL"):
        await router.fetch("select '\0'")
    assert (await router.get_metrics())["router_metrics"]["routing_errors"] == 6


async def test_a_transaction_in_asyncpgs_words(router: QueryRouterNode, table: str, direct: asyncpg.Connection) -> None:
    with pytest.raises(StatementNotAllowedError, match="session_id"):
        await router.execute("begin")
    assert await router.execute("begin", session_id="w") == "BEGIN"
    assert await router.fetch("savepoint a", session_id="w") == []
    assert await router.execute(f"insert into {table} (id) values (1)", session_id="w") == "INSERT 0 1"
    assert await router.fetchval(f"select id from {table}", session_id="w") == 1
    assert await router.fetchrow(f"select id from {table}") is None
    with pytest.raises(asyncpg.DivisionByZeroError):
        await router.fetchval("select 1/0", session_id="w")
    assert await router.execute("rollback to a", session_id="w") == "ROLLBACK"
    assert await router.fetchrow("commit", session_id="w") is None
    assert await direct.fetchval(f"select count(*) from {table}") == 0
    await router.execute("begin", session_id="w")
    with pytest.raises(asyncpg.PostgresSyntaxError):
        await router.execute("selec", session_id="w")
    with pytest.raises(TransactionRolledBackError):
        await router.execute("commit", session_id="w")


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
        own_pool(pg18, max_connections=1, acquire_timeout=4.0, **NO_BREAKER) as pool,
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
