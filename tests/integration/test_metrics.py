"""The figures of a running pool, against what was counted beside it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import ray
from breakers import stands
from pools import NO_BREAKER, backends_of, figures, own_pool, unique_name
from waiting import eventually

from raypg import CircuitBreakerError, PoolExhaustedError, QueryPipelineNode, WorkflowConnectionPool, naming
from raypg.embedded import EmbeddedServer
from raypg.errors import ConfigError
from raypg.metrics_access import history

WORKERS = 3


@pytest.fixture
async def three(ray_cluster: Any, pg: EmbeddedServer) -> AsyncIterator[WorkflowConnectionPool]:
    """A pool of three workers of two connections each."""
    async with own_pool(pg, workers=WORKERS, max_connections=7, **NO_BREAKER) as pool:
        yield pool


@pytest.fixture
async def virgin(ray_cluster: Any, pg: EmbeddedServer) -> AsyncIterator[WorkflowConnectionPool]:
    """A pool that nobody has used."""
    async with own_pool(pg, max_connections=3, **NO_BREAKER) as pool:
        yield pool


def actors(pool: WorkflowConnectionPool) -> list[Any]:
    names = [naming.worker_actor(pool.name, index) for index in range(WORKERS)]
    return [ray.get_actor(name, namespace=naming.NAMESPACE) for name in names]


def listen_in(worker: Any) -> None:
    """Runs in a worker: keep each time that is recorded from now on, beside the figures."""
    from raypg.server.figures import Figures

    worker.heard = []
    ran, ran_together = Figures.ran, Figures.ran_together

    def listening(self: Figures, seconds: float, *rest: Any) -> None:
        worker.heard.append(seconds)
        ran(self, seconds, *rest)

    def listening_together(self: Figures, statements: int, failed: int, seconds: float, *rest: Any) -> None:
        worker.heard += [seconds / statements] * statements
        ran_together(self, statements, failed, seconds, *rest)

    Figures.ran, Figures.ran_together = listening, listening_together  # type: ignore[method-assign]


async def test_quantiles_over_all_workers_are_within_one_percent(three: WorkflowConnectionPool) -> None:
    await asyncio.gather(*(actor.__ray_call__.remote(listen_in) for actor in actors(three)))
    await asyncio.gather(*(three.fetch("select pg_sleep($1)", number % 40 / 1000) for number in range(600)))
    heard = await asyncio.gather(*(actor.__ray_call__.remote(lambda self: self.heard) for actor in actors(three)))
    assert all(heard)
    exact = sorted(seconds * 1000 for part in heard for seconds in part)
    assert len(exact) == 600
    known = (await figures(three, WORKERS))["detailed_metrics"]
    times = known["histograms"]["query_execution_ms"]
    assert times["count"] == 600
    assert times["sum"] == pytest.approx(sum(exact))
    for name, quantile in {"p50": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99}.items():
        assert times[name] == pytest.approx(exact[math.floor(quantile * 599)], rel=0.01)
    assert known["query_summary"]["SELECT"]["total_time_ms"] == pytest.approx(sum(exact))


async def test_every_figure_against_a_counted_workload(
    three: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    virgin = (await figures(three, WORKERS))["detailed_metrics"]["counters"]
    await asyncio.gather(*(three.fetch("select generate_series(1, $1)", 200) for _ in range(30)))
    for number in range(20):
        await three.execute(f"insert into {table} (id) values ($1)", number)
    for _ in range(5):
        with pytest.raises(asyncpg.UniqueViolationError):
            await three.execute(f"insert into {table} (id) values ($1)", 1)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await three.fetch("select pg_sleep(5)", timeout=0.05)
    async with three.transaction() as tx:
        async for _ in tx.cursor("select generate_series(1, 100)", prefetch=40):
            pass
    async with contextlib.AsyncExitStack() as stack:
        held = [await stack.enter_async_context(three.acquire()) for _ in range(6)]
        with pytest.raises(PoolExhaustedError):
            await three.fetch("select 1", timeout=0.2)
        during = await figures(three, WORKERS)
        real = await backends_of(direct, three.name, control=False)
        assert during["active_connections"] == len(held) == 6
        assert during["total_connections"] == len(real)
        assert during["utilization_rate"] == pytest.approx(6 / 7)
        assert during["detailed_metrics"]["gauges"]["workers_up"] == WORKERS
    known = await figures(three, WORKERS)
    details = known["detailed_metrics"]
    counts = {name: count - virgin[name] for name, count in details["counters"].items()}
    summary = details["query_summary"]
    assert summary["INSERT"]["count"] == 25
    assert summary["INSERT"]["errors"] == 5
    assert summary["SELECT"]["count"] == 30 + 3 + 3  # the cursor's portions are 40, 40 and 20 rows
    assert summary["SELECT"]["errors"] == 3
    assert counts["query_errors"] == 8
    assert counts["pool_exhaustion_events"] == counts["calls_refused"] == 1
    assert counts["calls_rejected"] == 0
    assert counts["rows_fetched"] == 30 * 200 + 100
    assert details["histograms"]["fetch_ms"]["count"] == 30 + 2
    errors = details["errors"]
    assert errors["total_errors"] == 9
    by_category = {name: count for name, count in errors["errors_by_category"].items() if count}
    assert by_category == {"query_error": 5, "query_timeout": 3, "pool_exhausted": 1}
    assert errors["errors_by_sqlstate"] == {"23505": 5}
    assert {error["error_type"] for error in errors["recent_errors"]} == {
        "UniqueViolationError",
        "QueryTimeoutError",
        "PoolExhaustedError",
    }
    assert known["error_rate"] == pytest.approx(9 / (counts["queries_total"] + 1))
    assert counts["connections_released"] == counts["connections_acquired"]
    assert details["counters"]["connections_created"] >= 6
    first_uses = counts["connections_acquired"] - counts["connections_reused"]
    assert 1 <= first_uses <= details["counters"]["connections_created"]
    patterns = {pattern["query"]: pattern for pattern in known["pattern_insights"]["detected_patterns"]}
    assert patterns[f"insert into {table} (id) values ($1)"]["count"] == 25
    stored = await direct.fetchval(f"select count(*) from {table}")
    assert stored == summary["INSERT"]["count"] - summary["INSERT"]["errors"]

    stats = await three.process({"operation": "stats"})
    assert stats["queries"]["executed"] == details["counters"]["queries_total"]
    assert stats["queries"]["errors"] == details["counters"]["query_errors"]
    text = (await three.process({"operation": "export_metrics"}))["prometheus_metrics"]
    assert f'connection_pool_queries_total{{pool="{three.name}",type="INSERT"}} 25.0' in text


async def test_connections_and_those_who_wait_against_the_server(
    three: WorkflowConnectionPool, direct: asyncpg.Connection
) -> None:
    before = await figures(three, WORKERS)
    counts = before["detailed_metrics"]["counters"]
    assert counts["connections_acquired"] == counts["queries_total"] == 0
    for _ in range(40):
        await three.fetch("select 1")
    known = await figures(three, WORKERS)
    assert 0 < known["queries_per_second"] <= 40
    assert known["query_time_samples"] == known["detailed_metrics"]["counters"]["connections_acquired"] == 40
    assert known["detailed_metrics"]["histograms"]["connection_acquisition_ms"]["count"] == 40
    assert 0 < known["avg_query_time_ms"] < 100
    assert known["avg_health_score"] == 100

    async with contextlib.AsyncExitStack() as stack:
        for _ in range(6):
            await stack.enter_async_context(three.acquire())
        waiting = [asyncio.create_task(three.fetch("select 1")) for _ in range(5)]

        async def all_wait() -> bool:
            return bool((await figures(three, WORKERS))["queue_depth"] == 5)

        await eventually(all_wait)
    await asyncio.gather(*waiting)
    assert (await figures(three, WORKERS))["queue_depth"] == 0

    ended = await direct.fetchval(
        "select count(pg_terminate_backend(pid, 5000)) from pg_stat_activity where pid = any($1::int[])",
        [row["pid"] for row in (await backends_of(direct, three.name, control=False))[:2]],
    )
    assert ended == 2

    async def replaced() -> bool:
        details = (await figures(three, WORKERS))["detailed_metrics"]
        return bool(details["counters"]["connections_recycled"] >= counts["connections_recycled"] + 2)

    await eventually(replaced)
    details = (await figures(three, WORKERS))["detailed_metrics"]
    created = details["counters"]["connections_created"]
    assert created - details["counters"]["connections_recycled"] == details["gauges"]["pool_connections_total"]
    assert details["histograms"]["connection_creation_ms"]["count"] == created

    await three.circuit_breaker.force_open("a test")
    for _ in range(4):
        with pytest.raises(CircuitBreakerError):
            await three.fetch("select 1")
    await three.circuit_breaker.force_close("over")

    async def told() -> bool:  # a worker tells the Breaker of them with its next report
        return bool(stands(three)["metrics"]["rejected_calls"] == 4)

    await eventually(told)
    known = await figures(three, WORKERS)
    rejected = known["detailed_metrics"]["counters"]["calls_rejected"]
    assert rejected == known["circuit_breaker"]["metrics"]["rejected_calls"] == 4
    assert known["detailed_metrics"]["errors"]["total_errors"] == 0
    assert known["error_rate"] == pytest.approx(4 / 49)


async def test_chunks_of_a_pipeline_count_each_statement(pool: WorkflowConnectionPool, table: str) -> None:
    async def inserts() -> tuple[int, int]:
        known = (await figures(pool))["detailed_metrics"]["query_summary"].get("INSERT", {"count": 0, "errors": 0})
        return known["count"], known["errors"]

    count, errors = await inserts()
    pipeline = QueryPipelineNode(name="p", connection_pool=pool)
    for number in range(500):
        await pipeline.add_query(f"insert into {table} (id) values ($1)", [number % 490])
    results = await pipeline.flush()
    await pipeline.close()
    assert sum(not result.success for result in results) == 10
    assert await inserts() == (count + 500, errors + 10)


SECRET = "hunter2-in-a-literal"


async def test_no_literal_and_no_parameter_is_shown_anywhere(virgin: WorkflowConnectionPool) -> None:
    long = f"select '{SECRET}" + "x" * 3_000_000 + "'::text is not null"
    await virgin.fetch(long)
    await virgin.fetch(f"select '{SECRET}'")
    for sql, arguments in [
        (f"selekt '{SECRET}'", ()),
        (f"{SECRET} nonsense", ()),
        (f"select '{SECRET}'::int", ()),
        ("select ($1::text)::int", (SECRET,)),
        (f"do $$ begin raise exception '{SECRET}'; end $$", ()),
    ]:
        with pytest.raises(asyncpg.PostgresError):
            await virgin.execute(sql, *arguments)
    known = await figures(virgin)
    text = await virgin.process({"operation": "export_metrics"})
    assert known["detailed_metrics"]["errors"]["total_errors"] == 5
    assert len(known["pattern_insights"]["detected_patterns"]) >= 4
    assert SECRET not in json.dumps(known, default=str)
    assert SECRET not in json.dumps(text)


async def test_history_has_what_happened_when(virgin: WorkflowConnectionPool) -> None:
    await asyncio.gather(*(virgin.fetch("select 1") for _ in range(50)))

    async def told() -> bool:
        step, points = await history(virgin.name, "queries", 60)
        assert step == 1
        return sum(value for _, value in points if not math.isnan(value)) == 50

    await eventually(told)
    step, points = await history(virgin.name, "p95_ms", 3600)
    assert step == 60
    assert any(value > 0 for _, value in points)
    with pytest.raises(ConfigError, match=r"querys.*queries"):
        await history(virgin.name, "querys", 60)


async def test_a_pool_that_ended_is_forgotten(ray_cluster: Any, pg: EmbeddedServer) -> None:
    name = unique_name()
    for _ in range(2):
        async with own_pool(pg, name=name, max_connections=2) as pool:
            known = await figures(pool)
            assert known["detailed_metrics"]["counters"]["queries_total"] == 0
            await pool.fetch("select 1")
            assert (await figures(pool))["detailed_metrics"]["counters"]["queries_total"] == 1
