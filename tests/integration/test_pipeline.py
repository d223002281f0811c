"""The pipeline gives for each query what a call of its own would have given, in order, and loses nothing."""

from __future__ import annotations

import asyncio
import gc
import warnings
from typing import Any

import pytest
from pools import add_all, pipeline_of
from waiting import eventually

from raypg import (
    ConfigError,
    PipelineClosedError,
    PipelineResult,
    PoolNotFoundError,
    QueryPipelineNode,
    WorkflowConnectionPool,
)

# --- complete, and in order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "flush_interval"), [(100, 0.005), (1, 0.1), (10_000, 0), (7, 0.001)])
async def test_a_flush_returns_every_result_in_order_of_submission(
    pool: WorkflowConnectionPool, table: str, batch_size: int, flush_interval: float
) -> None:
    count = 2500 if batch_size > 1 else 300
    pipeline = pipeline_of(pool, batch_size=batch_size, flush_interval=flush_interval)
    ids = []
    for number in range(count):
        ids.append(await pipeline.add_query(f"insert into {table} values ($1, $2)", [number, "x"]))
        if number % 50 == 0:
            await asyncio.sleep(0.005)  # the background sends meanwhile
    results = await pipeline.flush()
    assert len(results) == count
    assert [result.query_id for result in results] == ids
    assert len(set(ids)) == count
    assert all(result.success and result.error is None and result.result == "INSERT 0 1" for result in results)
    assert all(result.execution_time_ms >= 0 and result.retry_count == 0 for result in results)
    assert await pool.fetchval(f"select count(*) from {table}") == count
    assert len(await pipeline.flush()) == 0
    status = pipeline.get_status()
    assert (status["queued_queries"], status["total_queries"], status["total_failures"]) == (0, count, 0)
    assert status["success_rate"] == 1.0
    assert status["total_batches"] >= count / batch_size
    await pipeline.close()


async def test_what_is_added_is_sent_without_a_flush(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, flush_interval=0.05)
    await pipeline.add_query(f"insert into {table} values (1, 'x')")

    async def arrived() -> bool:
        return bool(await pool.fetchval(f"select count(*) from {table}") == 1)

    await eventually(arrived, timeout=5)
    (result,) = await pipeline.flush()
    assert result.success
    await pipeline.close()


async def test_with_a_flush_interval_of_0_it_is_not(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, flush_interval=0)
    await pipeline.add_query(f"insert into {table} values (1, 'x')")
    await asyncio.sleep(0.3)
    assert await pool.fetchval(f"select count(*) from {table}") == 0
    await pipeline.close()
    assert await pool.fetchval(f"select count(*) from {table}") == 1


async def test_results_are_a_sequence(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool)
    await add_all(pipeline, f"insert into {table} values ($1, $2)", [(i % 90, "x") for i in range(100)])
    results = await pipeline.flush()
    listed = list(results)
    looks = [repr(result) for result in listed]
    assert [repr(results[i]) for i in range(100)] == looks
    assert [repr(results[i]) for i in range(-100, 0)] == looks
    assert [repr(result) for result in results[10:95:7]] == looks[10:95:7]
    assert [repr(result) for result in reversed(results)] == looks[::-1]
    assert listed[3] in results
    assert isinstance(listed[0], PipelineResult)
    with pytest.raises(IndexError):
        results[100]
    assert [i for i, result in enumerate(results) if not result.success] == list(range(90, 100))
    await pipeline.close()


async def test_many_adders_at_once(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, batch_size=64, flush_interval=0.002)
    ids: list[str] = []

    async def add(base: int) -> None:
        for number in range(base, base + 100):
            ids.append(await pipeline.add_query(f"insert into {table} values ($1, $2)", [number, "x"]))
            await asyncio.sleep(0)

    await asyncio.gather(*(add(base) for base in range(0, 2000, 100)))
    results = await pipeline.flush()
    assert sorted(ids) == sorted(result.query_id for result in results)
    assert all(result.success for result in results)
    assert await pool.fetchval(f"select count(*) from {table}") == 2000
    await pipeline.close()


async def test_flushes_at_once_share_the_results_between_them(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, flush_interval=0)
    ids = await add_all(pipeline, f"insert into {table} values ($1, $2)", [(i, "x") for i in range(500)])
    parts = await asyncio.gather(*(pipeline.flush() for _ in range(4)))
    assert [result.query_id for part in parts for result in part] == ids
    await pipeline.close()


async def test_adding_while_a_flush_is_under_way_loses_nothing(pool: WorkflowConnectionPool, table: str) -> None:
    pipeline = pipeline_of(pool, batch_size=10, flush_interval=0.001)
    ids: list[str] = []
    seen: list[str] = []
    done = False

    async def flusher() -> None:
        while not done:
            seen.extend(result.query_id for result in await pipeline.flush())
            await asyncio.sleep(0)

    task = asyncio.create_task(flusher())
    for number in range(3000):
        ids.append(await pipeline.add_query(f"insert into {table} values ($1, $2)", [number, "x"]))
        if number % 20 == 0:
            await asyncio.sleep(0)
    done = True
    await task
    seen.extend(result.query_id for result in await pipeline.flush())
    assert seen == ids
    assert await pool.fetchval(f"select count(*) from {table}") == 3000
    await pipeline.close()


async def test_queries_run_in_order(pool: WorkflowConnectionPool, table: str) -> None:
    """Each sees what those before it did, also over several messages and without a flush between."""
    pipeline = pipeline_of(pool, batch_size=20, flush_interval=0.001)
    for number in range(400):
        await pipeline.add_query(f"insert into {table} values ($1, 'x', 0)", [number])
        await pipeline.add_query(f"update {table} set amount = amount + 1 where id <= $1", [number])
        await pipeline.add_query(f"select count(*) as n, sum(amount) as total from {table}")
        if number % 40 == 0:
            await asyncio.sleep(0.003)
    results = await pipeline.flush()
    counts = [result.result[0] for result in results if isinstance(result.result, list)]
    assert [row["n"] for row in counts] == list(range(1, 401))
    assert [row["total"] for row in counts] == [n * (n + 1) // 2 for n in range(1, 401)]
    assert [result.result for result in list(results)[1::3]] == [f"UPDATE {n}" for n in range(1, 401)]
    await pipeline.close()


# --- ends ------------------------------------------------------------------------------------------------------------


async def test_close_flushes_and_is_final(pool: WorkflowConnectionPool, table: str) -> None:
    async with pipeline_of(pool, flush_interval=0) as pipeline:
        await pipeline.add_query(f"insert into {table} values (1, 'x')")
    assert await pool.fetchval(f"select count(*) from {table}") == 1
    with pytest.raises(PipelineClosedError, match="test"):
        await pipeline.add_query("select 1")
    with pytest.raises(PipelineClosedError):
        await pipeline.flush()
    await pipeline.close()


async def test_failures_of_the_last_flush_are_logged(
    pool: WorkflowConnectionPool, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with pipeline_of(pool, flush_interval=0) as pipeline:
        await add_all(pipeline, f"insert into {table} values ($1, 'x')", [(1,), (1,), (1,)])
    assert "2 queries failed" in caplog.text


async def test_a_pipeline_that_is_dropped_with_queries_says_so(pool: WorkflowConnectionPool) -> None:
    pipeline = pipeline_of(pool, flush_interval=0)
    await pipeline.add_query("select 1")
    with pytest.warns(ResourceWarning, match="1 unsent"):  # noqa: PT031
        del pipeline
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = pipeline_of(pool)
        await pipeline.add_query("select 1")
        await pipeline.close()
        del pipeline
        gc.collect()


async def test_an_empty_flush(pool: WorkflowConnectionPool) -> None:
    for strategy in ("best_effort", "transactional", "sequential", "parallel"):
        async with pipeline_of(pool, strategy=strategy) as pipeline:
            assert list(await pipeline.flush()) == []
            assert pipeline.get_status()["success_rate"] == 1.0


# --- bad arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": ""}, "name"),
        ({"name": 5}, "name"),
        ({"connection_pool": ""}, "connection_pool"),
        ({"connection_pool": "no such name"}, "pool name"),
        ({"connection_pool": 5}, "connection_pool"),
        ({"connection_pool": "x", "batch_size": 0}, "batch_size"),
        ({"connection_pool": "x", "batch_size": True}, "batch_size"),
        ({"connection_pool": "x", "batch_size": 1.5}, "batch_size"),
        ({"connection_pool": "x", "flush_interval": -1}, "flush_interval"),
        ({"connection_pool": "x", "flush_interval": "fast"}, "flush_interval"),
        ({"connection_pool": "x", "flush_interval": float("nan")}, "flush_interval"),
        ({"connection_pool": "x", "strategy": "best-effort"}, "best_effort"),
        ({"connection_pool": "x", "strategy": ["parallel"]}, "strategy"),
        ({"connection_pool": "x", "on_open": "waits"}, "wait"),
        ({"connection_pool": "x", "transaction_idle_timeout": 0}, "transaction_idle_timeout"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        QueryPipelineNode(**{"name": "p", **arguments})


async def test_a_pool_that_does_not_run(ray_cluster: Any) -> None:
    pipeline = QueryPipelineNode(name="p", connection_pool="nowhere", flush_interval=0)
    await pipeline.add_query("select 1")
    (result,) = await pipeline.flush()
    assert isinstance(result.error, PoolNotFoundError)
    await pipeline.close()


@pytest.mark.parametrize(
    ("query", "params"), [(b"select 1", None), (5, None), ("select $1", "x"), ("select $1", 5), ("select $1", {"a": 1})]
)
async def test_wrong_types_are_refused_where_they_are_given(
    pool: WorkflowConnectionPool, query: Any, params: Any
) -> None:
    async with pipeline_of(pool) as pipeline:
        with pytest.raises(TypeError):
            await pipeline.add_query(query, params)
        assert pipeline.get_status()["total_queries"] == 0


async def test_params_may_be_reused_and_changed_after_adding(pool: WorkflowConnectionPool, table: str) -> None:
    async with pipeline_of(pool, flush_interval=0) as pipeline:
        row: list[Any] = [0, "x"]
        for number in range(10):
            row[0] = number
            await pipeline.add_query(f"insert into {table} values ($1, $2)", row)
        await pipeline.add_query(f"insert into {table} values ($1, $2)", (value for value in (10, "y")))
    assert await pool.fetchval(f"select count(*) from {table}") == 11


async def test_it_works_by_the_name_of_the_pool(pool: WorkflowConnectionPool, table: str) -> None:
    async with QueryPipelineNode(name="by_name", connection_pool=pool.name) as pipeline:
        await pipeline.add_query(f"insert into {table} values (1, 'x')")
        (result,) = await pipeline.flush()
    assert result.success
    assert result.query_id.startswith("by_name")


async def test_one_connection_is_enough(single: WorkflowConnectionPool, table: str) -> None:
    both = [pipeline_of(single), pipeline_of(single, strategy="transactional")]
    for number, pipeline in enumerate(both):
        await add_all(pipeline, f"insert into {table} values ($1, $2)", [(1000 * number + i, "x") for i in range(300)])
    parts = await asyncio.wait_for(asyncio.gather(*(pipeline.flush() for pipeline in both)), 30)
    assert all(result.success for part in parts for result in part)
    assert await single.fetchval(f"select count(*) from {table}") == 600
    await asyncio.gather(*(pipeline.close() for pipeline in both))
