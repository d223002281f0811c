"""Strategies, the optimizer, and the rest of what a pipeline's handle offers."""

from __future__ import annotations

import asyncio
import gc
import pickle
import re
from typing import Any

import asyncpg
import pytest
import ray
from pools import add_all, own_pool, pipeline_of
from waiting import eventually

from raypg import (
    CircuitBreakerError,
    ConfigError,
    QueryPipelineNode,
    StatementNotAllowedError,
    StatementNotRunError,
    WorkflowConnectionPool,
    get_pool,
)
from raypg.embedded import EmbeddedServer

# --- sequential ------------------------------------------------------------------------------------------------------


async def test_sequential_stops_at_the_first_failure(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, strategy="sequential", batch_size=10)
    ids = await add_all(
        pipeline, f"insert into {table} values ($1, $2)", [(i if i != 47 else 3, "x") for i in range(95)]
    )
    results = await pipeline.flush()
    assert [result.success for result in results] == [True] * 47 + [False] * 48
    assert isinstance(results[47].error, asyncpg.UniqueViolationError)
    for result in list(results)[48:]:
        assert isinstance(result.error, StatementNotRunError)
        assert result.error.culprit == ids[47]
        assert "not run" in str(result.error)
    assert await pool.fetchval(f"select count(*) from {table}") == 47
    # The next flush begins anew.
    await pipeline.add_query(f"insert into {table} values (500, 'x')")
    (result,) = await pipeline.flush()
    assert result.success
    await pipeline.close()


async def test_sequential_keeps_the_order_and_what_cannot_run_stops_it_too(
    pool: WorkflowConnectionPool, schema: str
) -> None:
    pipeline = pipeline_of(pool, strategy="sequential", batch_size=3, flush_interval=0.001)
    await pipeline.add_query(f"create table {schema}.step (id int)")
    await add_all(pipeline, f"insert into {schema}.step values ($1)", [(i,) for i in range(20)])
    await pipeline.add_query(f"alter table {schema}.step add column label text default 'new'")
    await asyncio.sleep(0.01)
    await pipeline.add_query(f"select count(*) as n, min(label) as label from {schema}.step")
    await pipeline.add_query("begin")
    await pipeline.add_query(f"drop table {schema}.step")
    results = await pipeline.flush()
    assert [r.success for r in results] == [True] * 23 + [False] * 2
    assert dict(results[22].result[0]) == {"n": 20, "label": "new"}
    assert isinstance(results[23].error, StatementNotAllowedError)
    assert isinstance(results[24].error, StatementNotRunError)
    await pipeline.close()


# --- parallel --------------------------------------------------------------------------------------------------------


async def test_parallel_returns_rows_and_the_errors_of_each(pool: WorkflowConnectionPool, table: str) -> None:
    await pool.execute(f"insert into {table} select n, 'l' || n from generate_series(0, 99) n")
    pipeline = pipeline_of(pool, strategy="parallel")
    await add_all(pipeline, f"select label from {table} where id = $1", [(i,) for i in range(300)])
    await pipeline.add_query("select 1 / 0")
    await pipeline.add_query("selekt")
    await pipeline.add_query("values (1), (2)")
    results = await pipeline.flush()
    assert [[tuple(row) for row in result.result] for result in results[:300]] == [
        [(f"l{i}",)] if i < 100 else [] for i in range(300)
    ]
    assert [type(r.error) for r in results[300:302]] == [asyncpg.DivisionByZeroError, asyncpg.PostgresSyntaxError]
    assert [tuple(row) for row in results[302].result] == [(1,), (2,)]
    await pipeline.close()


async def test_parallel_uses_all_connections(
    pool: WorkflowConnectionPool, pg: EmbeddedServer, direct: asyncpg.Connection, table: str
) -> None:
    """A slow report does not wait for another one."""
    pipeline = pipeline_of(pool, strategy="parallel", flush_interval=0)
    await add_all(pipeline, f"select $1::int as n, count(*) from {table}", [(n,) for n in range(6)])
    watcher = await asyncpg.connect(**pg.parameters)  # in a transaction pg_stat_activity never changes
    waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%' || $1"
    async with direct.transaction():
        await direct.execute(f"lock table {table} in access exclusive mode")
        flush = asyncio.create_task(pipeline.flush())

        async def all_wait() -> bool:
            return bool(await watcher.fetchval(waiting, f"count(*) from {table}") == 6)

        await eventually(all_wait)
    assert [result.result[0]["n"] for result in await flush] == list(range(6))
    await asyncio.gather(pipeline.close(), watcher.close())


@pytest.mark.parametrize(
    "sql",
    ["insert into t values (1)", "update t set a = 1", "select nextval('s')", "select 1 for update", "call f()",
     "begin", "create table t (a int)", "select f(1)"],
)  # fmt: skip
async def test_parallel_refuses_writes_when_they_are_added(sql: str) -> None:
    pipeline = QueryPipelineNode(name="p", connection_pool="nowhere", strategy="parallel", flush_interval=0)
    for _ in range(2):
        with pytest.raises(StatementNotAllowedError, match="parallel"):
            await pipeline.add_query(sql)
    assert pipeline.get_status()["total_queries"] == 0
    assert len(await pipeline.flush()) == 0


# --- the optimizer ---------------------------------------------------------------------------------------------------


async def executed(server: EmbeddedServer, mark: str) -> list[str]:
    """The statements that the server has logged with *mark* in them, in order."""
    found = re.findall(rf"(?:execute [^:]*|statement|STATEMENT): +(.*/\* {mark} \*/)", server.log_file.read_text())
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(("optimize", "expected"), [(True, [1, 3, 0, 2]), (False, [0, 1, 2, 3])])
async def test_the_optimizer_moves_reads_ahead(
    pg: EmbeddedServer, ray_cluster: Any, direct: asyncpg.Connection, schema: str, optimize: bool, expected: list[int]
) -> None:
    await direct.execute(
        "create table audit_log (a int); create table users (active bool); create table products (stock int); "
        "create table orders (a int); insert into products values (5)"
    )
    mark = f"m{schema}"
    texts = [
        f"INSERT INTO {schema}.audit_log VALUES (...) /* {mark} */",
        f"SELECT * FROM {schema}.users WHERE active = true /* {mark} */",
        f"UPDATE {schema}.products SET stock = stock - 1 /* {mark} */",
        f"SELECT COUNT(*) FROM {schema}.orders /* {mark} */",
    ]
    async with (
        own_pool(pg, max_connections=1, server_settings={"log_statement": "all"}) as pool,
        pipeline_of(pool, enable_optimization=optimize, flush_interval=0) as pipeline,
    ):
        for text in texts:
            await pipeline.add_query(text)
        results = await pipeline.flush()
    assert [result.success for result in results] == [False, True, True, True]
    assert isinstance(results[0].error, asyncpg.PostgresSyntaxError)
    assert (results[1].result, results[2].result, results[3].result[0][0]) == ([], "UPDATE 1", 0)
    assert await executed(pg, mark) == [texts[index] for index in expected]


async def test_reads_see_what_was_written_before_them_to_their_tables(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    """Also through partitions, views, triggers and foreign keys."""
    await direct.execute(
        f"""create table part (a int) partition by range (a);
        create table low partition of part for values from (0) to (9);
        create table base (a int); create view seen as select * from base;
        create table noted (a int); create table source (a int);
        create function note() returns trigger language plpgsql as
            $$ begin insert into {schema}.noted values (new.a); return new; end $$;
        create trigger x after insert on source for each row execute function note();
        create table parent (a int primary key); create table child (a int references parent on delete cascade);
        insert into parent values (1); insert into child values (1)"""
    )
    pairs = [
        ("insert into {s}.low values (1)", "select count(*) from {s}.part"),
        ("insert into {s}.part values (2)", "select count(*) - 1 from {s}.low"),
        ("insert into {s}.base values (1)", "select count(*) from {s}.seen"),
        ("insert into {s}.source values (1)", "select count(*) from {s}.noted"),
        ("delete from {s}.parent where a = 1", "select 1 - count(*) from {s}.child"),
    ]
    async with pipeline_of(pool, flush_interval=0) as pipeline:
        for write, read in pairs:
            await pipeline.add_query(write.format(s=schema))
            await pipeline.add_query(read.format(s=schema))
        results = await pipeline.flush()
    assert [result.result[0][0] for result in list(results)[1::2]] == [1] * len(pairs)


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["best_effort", "transactional", "sequential", "parallel"])
@pytest.mark.parametrize(
    ("sql", "params"),
    [("select $1::int, $2::int", [1]), ("select $1::int", [1, 2]), ("select 1", [1]), ("select $1::int", None)],
)
async def test_a_wrong_number_of_parameters_is_said_at_once(strategy: str, sql: str, params: Any) -> None:
    pipeline = QueryPipelineNode(name="p", connection_pool="nowhere", strategy=strategy, flush_interval=0)
    with pytest.raises(asyncpg.InterfaceError, match="parameter"):
        await pipeline.add_query(sql, params)
    assert pipeline.get_status()["total_queries"] == 0
    assert pipeline._unsent() == 0


# --- results ---------------------------------------------------------------------------------------------------------


async def test_callback_ids_and_single_results(pool: WorkflowConnectionPool, table: str) -> None:
    async with pipeline_of(pool, flush_interval=0) as pipeline:
        first = await pipeline.add_query(f"insert into {table} values (1, 'x')", callback_id="first")
        second = await pipeline.add_query("select 5 as five", callback_id=("any", "thing"))
        assert pipeline.get_result(first) is None
        results = await pipeline.flush()
        assert [result.callback_id for result in results] == ["first", ("any", "thing")]
        assert pipeline.get_result(first) == results[0]
        assert pipeline.get_result(second).result[0]["five"] == 5  # type: ignore[union-attr]
        await pipeline.add_query("select 1")
        await pipeline.flush()
        with pytest.raises(KeyError, match="earlier flush"):
            pipeline.get_result(first)
        for unknown in ("", "x", f"{first}9999", first.replace("test", "tset")):
            with pytest.raises(KeyError, match="no query"):
                pipeline.get_result(unknown)


async def test_ids_are_unique_over_processes(pool: WorkflowConnectionPool) -> None:
    """A pipeline that is sent to a task is another one there, and what is queued here stays here."""
    pipeline = pipeline_of(pool, flush_interval=0, batch_size=7, strategy="sequential", on_open="wait")
    here = await pipeline.add_query("select 1")

    @ray.remote(num_cpus=0)
    def ids(copy: QueryPipelineNode) -> Any:
        async def work() -> Any:
            assert (copy.batch_size, copy.strategy, copy.on_open) == (7, "sequential", "wait")
            added = [await copy.add_query("select $1::int", [n]) for n in range(3)]
            results = await copy.flush()
            assert all(result.success for result in results)
            await copy.close()
            return added

        return asyncio.run(work())

    there = [each for part in await asyncio.gather(*(ids.remote(pipeline) for _ in range(2))) for each in part]
    assert len({here, *there}) == 7
    (result,) = await pipeline.flush()
    assert result.query_id == here
    await pipeline.close()
    assert isinstance(pickle.loads(pickle.dumps(pipeline)), QueryPipelineNode)


async def test_drain_shows_how_far_it_is(
    pool: WorkflowConnectionPool, table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with pipeline_of(pool, flush_interval=0) as pipeline:
        await add_all(pipeline, f"insert into {table} values ($1, 'x')", [(i,) for i in range(2500)])
        results = await pipeline.drain(progress=True)
        assert len(results) == 2500
        shown = capsys.readouterr().out
        assert "test" in shown
        assert "2500/2500" in shown
        await pipeline.add_query("select 1")
        assert len(await pipeline.drain()) == 1
        assert capsys.readouterr().out == ""


async def test_a_flush_ends_though_others_go_on_adding(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, batch_size=10, flush_interval=0.001)
    going = True

    async def add() -> int:
        number = 0
        while going:
            await pipeline.add_query(f"insert into {table} values ($1, 'x')", [number])
            number += 1
            await asyncio.sleep(0.001)
        return number

    adder = asyncio.create_task(add())
    await asyncio.sleep(0.05)
    first = await asyncio.wait_for(pipeline.flush(), 20)
    going = False
    total = await adder
    assert len(first) + len(await pipeline.flush()) == total
    await pipeline.close()


async def test_a_dropped_pipeline_warns_with_the_count(
    pool: WorkflowConnectionPool, caplog: pytest.LogCaptureFixture
) -> None:
    for strategy in ("best_effort", "sequential", "transactional"):
        pipeline = pipeline_of(pool, flush_interval=0, strategy=strategy)
        await add_all(pipeline, "select $1::int", [(n,) for n in range(5)])
        with pytest.warns(ResourceWarning, match="5 unsent"):  # noqa: PT031
            del pipeline
            gc.collect()
        assert "5 unsent" in caplog.text
        caplog.clear()


async def test_250_000_adds_with_awaits_between(
    pool: WorkflowConnectionPool, direct: asyncpg.Connection, schema: str
) -> None:
    await direct.execute("create unlogged table many (id int)")
    sql = f"insert into {schema}.many values ($1)"
    pipeline = pipeline_of(pool, batch_size=1000, flush_interval=0.002)
    ids = []
    for number in range(250_000):
        ids.append(await pipeline.add_query(sql, (number,)))
        if number % 25 == 0:
            await asyncio.sleep(0)
    results = await pipeline.flush()
    assert len(results) == 250_000
    assert len({result.query_id for result in results}) == 250_000
    assert [result.query_id for result in results] == ids
    assert results.failures == 0
    assert await direct.fetchval(f"select count(distinct id) from {schema}.many") == 250_000
    await pipeline.close()


# --- from the pool ---------------------------------------------------------------------------------------------------


async def test_a_pool_with_pipelining_gives_pipelines(ray_cluster: Any, pg: EmbeddedServer, table: str) -> None:
    async with own_pool(pg, max_connections=2, enable_pipelining=True, pipeline_batch_size=33) as pool:
        async with pool.pipeline("bulk") as pipeline:
            assert (pipeline.name, pipeline.batch_size, pipeline.strategy) == ("bulk", 33, "best_effort")
            await pipeline.add_query(f"insert into {table} values (1, 'x')")
            (result,) = await pipeline.flush()
            assert result.success
        async with pool.pipeline(batch_size=5, strategy="transactional") as pipeline:
            assert (pipeline.batch_size, pipeline.strategy) == (5, "transactional")
        async with get_pool(pool.name).pipeline() as pipeline:
            await pipeline.add_query("select 1")
            (result,) = await pipeline.flush()
            assert result.success
    without = WorkflowConnectionPool(name="x")
    with pytest.raises(ConfigError, match="enable_pipelining"):
        without.pipeline()


# --- while the breaker is open ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["best_effort", "transactional", "sequential", "parallel"])
async def test_while_the_breaker_is_open_results_say_so_or_wait(pair: WorkflowConnectionPool, strategy: str) -> None:
    failing, waiting = (pipeline_of(pair, strategy=strategy, on_open=on) for on in ("fail", "wait"))
    await pair.circuit_breaker.force_open("maintenance")
    try:
        for pipeline in (failing, waiting):
            await add_all(pipeline, "select $1::int as n", [(n,) for n in range(20)])
        results = await failing.flush()
        assert len(results) == 20
        assert isinstance(results[0].error, CircuitBreakerError)
        kinds = {type(result.error) for result in results}
        assert kinds <= {CircuitBreakerError, StatementNotRunError}
        flush = asyncio.create_task(waiting.flush())
        assert not (await asyncio.wait((flush,), timeout=0.6))[0]
    finally:
        await pair.circuit_breaker.force_close("done")
    results = await asyncio.wait_for(flush, 10)
    assert [result.result[0]["n"] for result in results] == list(range(20))
    await asyncio.gather(failing.close(), waiting.close())
