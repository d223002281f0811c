"""``pool.process({"operation": …})``: shapes, errors, figures."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from pools import all_open, backends_of, figures, nothing_leased, own_pool, status_of_all, unique_name
from waiting import eventually

from raypg import (
    ConfigError,
    LeaseLostError,
    PoolClosedError,
    PoolExhaustedError,
    PoolNotFoundError,
    WorkflowConnectionPool,
    get_pool,
)
from raypg.embedded import EmbeddedServer


@pytest.fixture
async def filled(table: str, direct: asyncpg.Connection) -> str:
    await direct.execute(f"insert into {table} select g, 'item ' || g, g * 10 from generate_series(1, 5) g")
    return table


async def run(pool: WorkflowConnectionPool, query: str, **more: Any) -> Any:
    return await pool.process({"operation": "execute", "query": query, **more})


# --- initialize ------------------------------------------------------------------------------------------------------


async def test_initialize_starts_once_and_joins_after_that(ray_cluster: Any, pg: EmbeddedServer) -> None:
    name = unique_name()
    first = WorkflowConnectionPool(name=name, **pg.parameters, min_connections=1, max_connections=3)
    try:
        answers = await asyncio.gather(*(first.process({"operation": "initialize"}) for _ in range(5)))
        assert sorted(answer["status"] for answer in answers) == ["already_initialized"] * 4 + ["initialized"]
        assert answers[0] | {"status": ""} == {
            "status": "",
            "pool_name": name,
            "min_connections": 1,
            "max_connections": 3,
            "adaptive_sizing": False,
            "query_routing": False,
        }
        again = WorkflowConnectionPool(name=name, **pg.parameters)
        assert (await again.process({"operation": "initialize"}))["status"] == "already_initialized"
        assert await again.fetchval("select 1") == 1
    finally:
        await first.close()


async def test_the_first_use_starts_the_pool_too(ray_cluster: Any, pg: EmbeddedServer) -> None:
    async with WorkflowConnectionPool(name=unique_name(), **pg.parameters, max_connections=1) as pool:
        assert await pool.fetchval("select 1") == 1


# --- execute ---------------------------------------------------------------------------------------------------------


async def test_execute_gives_rows_as_dicts(pool: WorkflowConnectionPool, filled: str) -> None:
    answer = await run(pool, f"select id, label from {filled} where id < $1 order by id", params=[3])
    assert answer["success"] is True
    assert answer["data"] == [{"id": 1, "label": "item 1"}, {"id": 2, "label": "item 2"}]
    assert answer["error"] is None
    assert answer["connection_id"] is None
    assert answer["execution_time_ms"] > 0


@pytest.mark.parametrize(
    ("mode", "where", "data"),
    [
        ("one", "id = 1", {"id": 1}),
        ("one", "true", {"id": 1}),
        ("one", "false", None),
        ("all", "id <= 2", [{"id": 1}, {"id": 2}]),
        ("all", "false", []),
        ("many", "id <= 2", [{"id": 1}, {"id": 2}]),
    ],
)
async def test_fetch_modes(pool: WorkflowConnectionPool, filled: str, mode: str, where: str, data: Any) -> None:
    answer = await run(pool, f"select id from {filled} where {where} order by id", fetch_mode=mode)
    assert answer["data"] == data


@pytest.mark.parametrize(
    ("sql", "data", "affected"),
    [
        ("update {} set amount = 0 where id <= 3", [{"rows_affected": 3}], 3),
        ("delete from {} where id = 77", [{"rows_affected": 0}], 0),
        ("insert into {} values (9, 'x') returning id", [{"id": 9}], 1),
        ("delete from {} where id = 77 returning id", [], 0),
        ("with gone as (delete from {} returning id) select id from gone where false", [], None),
        ("create index on {} (label)", [{"rows_affected": 0}], 0),
        ("table {} limit 0", [], None),
        ("values (1)", [{"column1": 1}], None),
        ("select", [{}], None),
    ],
)
async def test_data_and_count_of_each_kind_of_statement(
    pool: WorkflowConnectionPool, filled: str, sql: str, data: Any, affected: int | None
) -> None:
    answer = await run(pool, sql.format(filled))
    assert answer["success"], answer
    assert answer["data"] == data
    assert answer["rows_affected"] == affected


async def test_what_the_server_says_against_a_statement_is_an_answer(pool: WorkflowConnectionPool, filled: str) -> None:
    answer = await run(pool, f"insert into {filled} values ($1, 'x')", params=[1])
    assert answer["success"] is False
    assert answer["data"] is None
    assert "duplicate key" in answer["error"]
    assert answer["error_type"] == "UniqueViolationError"
    assert answer["error_category"] == "query_error"
    assert answer["sqlstate"] == "23505"


@pytest.mark.parametrize(
    ("query", "more", "category", "word"),
    [
        ("selekt", {}, "query_error", "syntax"),
        ("select $1::int", {"params": ["x"]}, "query_error", "invalid input"),
        ("select $1::int", {}, "query_error", "expects 1 argument"),
        ("begin", {}, "query_error", "transaction()"),
        ("select 1; select 2", {}, "query_error", "transaction()"),
        ("select '\0'", {}, "query_error", "NUL"),
        ("select pg_sleep(5)", {"timeout": 0.1}, "query_timeout", "timeout of 0.1 s"),
    ],
)
async def test_so_is_every_mistake_in_a_statement(
    pool: WorkflowConnectionPool, query: str, more: dict[str, Any], category: str, word: str
) -> None:
    answer = await run(pool, query, **more)
    assert answer["success"] is False
    assert answer["error_category"] == category
    assert word in answer["error"]


async def test_that_the_database_cannot_be_used_is_raised(ray_cluster: Any, pg: EmbeddedServer) -> None:
    async with own_pool(pg, max_connections=1) as pool:
        held = await pool.process({"operation": "acquire"})
        with pytest.raises(PoolExhaustedError):
            await run(pool, "select 1", timeout=0.2)
        await pool.process({"operation": "release", "connection_id": held["connection_id"]})
        assert (await run(pool, "select 1"))["success"]
    with pytest.raises(PoolClosedError):
        await run(pool, "select 1")


# --- bad requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"operation": "initialise"}, ["initialise", "initialize"]),
        ({"operation": "excute", "query": "select 1"}, ["excute", "execute"]),
        ({}, ["operation"]),
        ({"operation": None}, ["None"]),
        ({"operation": ["execute"]}, ["execute"]),
        ({"operation": "execute"}, ["query"]),
        ({"operation": "execute", "query": 5}, ["query"]),
        ({"operation": "execute", "query": "select 1", "parms": [1]}, ["parms", "params"]),
        ({"operation": "execute", "query": "select 1", "params": {"a": 1}}, ["params", "dict"]),
        ({"operation": "execute", "query": "select 1", "params": "a"}, ["params", "str"]),
        ({"operation": "execute", "query": "select 1", "fetch_mode": "first"}, ["fetch_mode", "first", "one"]),
        ({"operation": "execute", "query": "select 1", "connection_id": "conn_0"}, ["conn_0"]),
        ({"operation": "release"}, ["connection_id"]),
        ({"operation": "release", "connection_id": 5}, ["5"]),
        ({"operation": "release", "connection_id": ["x"]}, ["x"]),
        ({"operation": "acquire", "timeout": -1}, ["timeout", "-1"]),
        ({"operation": "acquire", "timeout": "soon"}, ["timeout", "soon"]),
        ({"operation": "acquire", "lease_timeout": math.nan}, ["lease_timeout", "nan"]),
        ({"operation": "adjust_pool_size", "new_size": 0}, ["new_size", "0"]),
        ({"operation": "adjust_pool_size", "new_size": "12"}, ["new_size", "12"]),
        ({"operation": "adjust_pool_size", "new_size": True}, ["new_size", "True"]),
        ({"operation": "adjust_pool_size", "size": 5}, ["size", "new_size"]),
        ("initialize", ["dict"]),
        (None, ["dict"]),
        ({"operation": "initialize", 5: 1}, ["5"]),
    ],
)
async def test_a_bad_request_says_what_is_wrong(pool: WorkflowConnectionPool, request_: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        await pool.process(request_)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("key", "nearest"), [("max_conections", "max_connections"), ("dsn", "connection_string"), ("passwd", "password")]
)
def test_an_unknown_key_of_the_constructor_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*{nearest}"):
        WorkflowConnectionPool(name="x", **{key: "y"})


async def test_the_name_of_a_pool_that_does_not_run_lists_those_that_do(pool: WorkflowConnectionPool) -> None:
    with pytest.raises(PoolNotFoundError, match=pool.name) as caught:
        get_pool("nobody")
    assert pool.name in caught.value.known
    with pytest.raises(ConfigError):
        get_pool("no such name")


# --- leases by process -----------------------------------------------------------------------------------------------


@pytest.fixture
async def held(pool: WorkflowConnectionPool) -> AsyncIterator[str]:
    answer = await pool.process({"operation": "acquire"})
    assert answer["health_score"] == 100
    assert answer["acquisition_time_ms"] >= 0
    yield answer["connection_id"]
    try:
        await pool.process({"operation": "release", "connection_id": answer["connection_id"]})
    except ConfigError:
        pass  # the test has released it


async def test_a_connection_acquired_keeps_its_session(pool: WorkflowConnectionPool, held: str) -> None:
    pids = [(await run(pool, "select pg_backend_pid() as pid", connection_id=held))["data"] for _ in range(3)]
    assert pids[0] == pids[1] == pids[2]
    assert (await run(pool, "create temp table kept (a int)", connection_id=held))["success"]
    assert (await run(pool, "insert into kept values (1), (2)", connection_id=held))["data"] == [{"rows_affected": 2}]
    answer = await run(pool, "select count(*) as n from kept", connection_id=held, fetch_mode="one")
    assert answer["data"] == {"n": 2}
    assert answer["connection_id"] == held
    assert (await run(pool, "select 1/0", connection_id=held))["sqlstate"] == "22012"
    released = await pool.process({"operation": "release", "connection_id": held})
    assert released == {"status": "released", "connection_id": held}
    with pytest.raises(ConfigError, match=held):
        await run(pool, "select 1", connection_id=held)
    assert (await run(pool, "select * from kept"))["sqlstate"] == "42P01"


async def test_a_connection_belongs_to_the_handle_that_acquired_it(pool: WorkflowConnectionPool, held: str) -> None:
    with pytest.raises(ConfigError, match=held):
        await run(get_pool(pool.name), "select 1", connection_id=held)


async def test_a_lease_that_was_lost_is_raised(pool: WorkflowConnectionPool, direct: asyncpg.Connection) -> None:
    answer = await pool.process({"operation": "acquire", "lease_timeout": 0.2})
    connection_id = answer["connection_id"]

    async def lost() -> bool:
        try:
            await run(pool, "select 1", connection_id=connection_id)
        except LeaseLostError:
            return True
        return False

    await eventually(lost)
    await pool.process({"operation": "release", "connection_id": connection_id})


# --- figures ---------------------------------------------------------------------------------------------------------


async def test_figures_before_the_first_query(ray_cluster: Any, pg: EmbeddedServer) -> None:
    async with own_pool(pg, max_connections=3) as pool:
        statistics = await pool.process({"operation": "get_pool_statistics"})
        stats = await pool.process({"operation": "stats"})
    assert statistics["error_rate"] == 0.0
    assert math.isnan(statistics["avg_query_time_ms"])
    assert math.isnan(statistics["avg_acquisition_time_ms"])
    assert stats["queries"] == {"executed": 0, "errors": 0, "refused": 0, "retries": 0, "error_rate": 0.0}
    assert f"{statistics['utilization_rate']:.2%} {statistics['avg_query_time_ms']:.1f}" == "0.00% nan"


async def test_figures_agree_with_what_was_done_and_with_the_server(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection
) -> None:
    async with own_pool(pg, min_connections=4, max_connections=5) as pool:
        await all_open(pool, direct, 4)
        await asyncio.gather(*(pool.fetchval("select $1::int", number) for number in range(40)))
        await asyncio.gather(*(pool.fetch("select 1/0") for _ in range(10)), return_exceptions=True)
        held = await pool.process({"operation": "acquire"})
        await figures(pool)  # what was counted until now is in all that is told from now on
        stats = await pool.process({"operation": "stats"})
        statistics = await pool.process({"operation": "get_pool_statistics"})
        status = await status_of_all(pool)
        real = {row["pid"] for row in await backends_of(direct, pool.name, control=False)}
        await pool.process({"operation": "release", "connection_id": held["connection_id"]})

    assert stats["queries"]["executed"] == 50
    assert stats["queries"]["errors"] == 10
    assert stats["queries"]["error_rate"] == pytest.approx(0.2)
    assert stats["performance"]["query_samples"] == 50
    assert stats["performance"]["avg_query_time_ms"] > 0
    assert stats["connections"]["created"] == statistics["total_connections"] == len(real) == 4
    assert statistics["active_connections"] == 1
    assert statistics["idle_connections"] == len(real) - 1
    assert statistics["utilization_rate"] == pytest.approx(1 / 5)
    assert statistics["max_connections"] == status["max_connections"] == 5
    assert statistics["avg_health_score"] == 100
    assert {connection["backend_pid"] for connection in status["connections"].values()} == real
    assert status["pool_size"] == len(real)
    assert (status["active_count"], status["available_count"]) == (1, len(real) - 1)
    (lease,) = [c["lease"] for c in status["connections"].values() if c["lease"]]
    assert lease["age"] >= 0
    assert lease["task"] == "driver"
    json.dumps(status)
    json.dumps(stats)


async def test_adjust_pool_size_moves_the_cap_both_ways(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection
) -> None:
    async with own_pool(pg, max_connections=3) as pool:

        async def reaches(count: int) -> bool:
            """Whether so many work at once; more never do."""
            pids = await asyncio.gather(
                *(pool.fetchval("select pg_backend_pid() from (select pg_sleep(0.1)) s") for _ in range(20))
            )
            assert len(set(pids)) <= count
            return len(set(pids)) == count

        await eventually(lambda: reaches(3))
        answer = await pool.process({"operation": "adjust_pool_size", "new_size": 8})
        assert answer == {"success": True, "previous_size": 3, "new_size": 8}
        await eventually(lambda: reaches(7))  # from 4 on, one of them is for control
        answer = await pool.process({"operation": "adjust_pool_size", "new_size": 2})
        assert answer == {"success": True, "previous_size": 8, "new_size": 2}

        async def shrunk() -> bool:
            return len(await backends_of(direct, pool.name)) <= 2

        await eventually(shrunk, what="backends over the new cap are closed")
        await eventually(lambda: reaches(2))


# --- close -----------------------------------------------------------------------------------------------------------


async def test_close_by_the_maker_ends_the_pool_and_its_backends(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection
) -> None:
    async with own_pool(pg, max_connections=3) as pool:
        other = get_pool(pool.name)
        assert await other.fetchval("select 1") == 1
        assert await pool.process({"operation": "close"}) == {"status": "closed"}
        assert await pool.process({"operation": "close"}) == {"status": "closed"}

        async def none_left() -> bool:
            return await backends_of(direct, pool.name) == []

        await eventually(none_left)
        with pytest.raises(PoolClosedError):
            await pool.fetchval("select 1")
        with pytest.raises((PoolClosedError, PoolNotFoundError), match=pool.name):
            await other.fetchval("select 1")
        with pytest.raises(PoolNotFoundError):
            get_pool(pool.name)


async def test_close_of_a_found_handle_only_detaches(pool: WorkflowConnectionPool) -> None:
    found = get_pool(pool.name)
    assert await found.process({"operation": "close"}) == {"status": "closed"}
    with pytest.raises(PoolClosedError, match="handle"):
        await found.fetchval("select 1")
    assert await pool.fetchval("select 1") == 1
    assert await get_pool(pool.name).fetchval("select 1") == 1


async def test_a_lease_is_given_back_when_its_handle_is_closed(pool: WorkflowConnectionPool) -> None:
    found = get_pool(pool.name)
    await found.process({"operation": "acquire"})
    before = (await status_of_all(pool))["connections"].values()
    assert sum(connection["lease"] is not None for connection in before) == 1
    await found.close()
    await eventually(lambda: nothing_leased(pool), what="the lease of the closed handle ended")
