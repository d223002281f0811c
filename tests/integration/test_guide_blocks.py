"""The code of the user's guide runs as it stands there; what it leaves undefined is supplied here."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import logging
import os
import re
import socket
import time
import types
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from pools import backends_of, figures
from waiting import eventually

import raypg
from raypg import QueryPipelineNode, WorkflowConnectionPool, get_pool
from raypg.core.sqlstate import CATEGORIES
from raypg.embedded import EmbeddedServer

GUIDE = Path(__file__).parent / "guide"


async def run(name: str, replaced: Mapping[str, str] | None = None, **supplied: Any) -> dict[str, Any]:
    """Run a block with top-level ``await``, as a notebook does; returns its names.

    Args:
        replaced: what is to stand in the place of what only its author has, such as the name of a host.
    """
    path = GUIDE / f"{name}.py"
    text = path.read_text()
    for theirs, ours in (replaced or {}).items():
        assert theirs in text
        text = text.replace(theirs, ours)
    code = compile(text, str(path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    namespace: dict[str, Any] = {"__name__": "__main__", **supplied}
    result = eval(code, namespace)
    if inspect.isawaitable(result):
        await result
    return namespace


@pytest.fixture
async def database(
    ray_cluster: Any, pg: EmbeddedServer, direct: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[asyncpg.Connection]:
    """A database of its own; the guide's "connection details" come from the environment of the caller.

    That is set when Ray's workers run already: what they need of it, the password included, has to be sent to them.
    """
    name = f"guide_{os.urandom(4).hex()}"
    await direct.execute(f"create database {name}")
    settings = {**pg.parameters, "database": name}
    for key, value in settings.items():
        monkeypatch.setenv(f"PG{key.upper()}", str(value))
    connection = await asyncpg.connect(**settings)
    yield connection
    await connection.close()
    await direct.execute(f"drop database {name} with (force)")


async def test_circuit_breaker(database: asyncpg.Connection) -> None:
    names = await run("01_circuit_breaker", logger=logging.getLogger("guide"))
    pool = names["pool"]
    try:
        assert isinstance(pool, WorkflowConnectionPool)
        connection_id = names["result"]["connection_id"]
        answer = await pool.process(
            {"operation": "execute", "query": "select current_database()", "connection_id": connection_id}
        )
        assert answer["data"] == [{"current_database": await database.fetchval("select current_database()")}]
        config = pool._config
        assert config is not None
        assert config.circuit_breaker_failure_threshold == 5
        assert config.circuit_breaker_recovery_timeout == 60
        assert config.circuit_breaker_error_rate == 0.5
        assert len(await backends_of(database, "protected_pool")) >= 1
    finally:
        await pool.close()


@pytest.mark.parametrize("name", ["02_conservative", "03_balanced", "04_tolerant"])
async def test_strategies_of_the_breaker_are_settings_of_the_pool(name: str) -> None:
    names = await run(name)
    settings = {key: value for key, value in names.items() if key.startswith("circuit_breaker_")}
    assert len(settings) == 3
    pool = WorkflowConnectionPool(name="x", **settings)
    assert {key: getattr(pool._config, key) for key in settings} == settings


async def test_manual_control_of_the_breaker(
    main_pool: WorkflowConnectionPool, capsys: pytest.CaptureFixture[str]
) -> None:
    names = await run("05_manual_control", pool=main_pool)
    assert capsys.readouterr().out == "State: closed\nFailures: 0\n"
    reasons = [change["reason"] for change in names["status"]["state_transitions"]]
    assert reasons == ["Database maintenance", "Maintenance complete"]


async def test_while_the_circuit_is_open_the_caller_of_the_guide_is_told(
    main_pool: WorkflowConnectionPool, caplog: pytest.LogCaptureFixture
) -> None:
    """The first block's `except CircuitBreakerError`, with the pool of that name held open."""
    handle = WorkflowConnectionPool(
        name="protected_pool",
        circuit_breaker_failure_threshold=5,
        circuit_breaker_recovery_timeout=60,
        circuit_breaker_error_rate=0.5,
    )
    await handle.circuit_breaker.force_open("Database maintenance")
    try:
        with caplog.at_level(logging.ERROR):
            supplied = {"logger": logging.getLogger("guide"), "CircuitBreakerError": raypg.CircuitBreakerError}
            names = await run("01_circuit_breaker", **supplied)
        assert "result" not in names
        assert "Database unavailable" in caplog.text
        assert "Database maintenance" in caplog.text
    finally:
        await handle.close()


VIRGIN = "Queries/sec: 0.0\nError rate: 0.00%\nP95 latency: nanms\n"


async def test_metrics_before_the_first_query(
    database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that the guide reads is there, and can be formatted and compared, when nothing was measured."""
    names = await run("06_metrics")
    pool, metrics = names["pool"], names["metrics"]
    try:
        assert capsys.readouterr().out == VIRGIN
        await run("07_error_analysis", metrics=metrics)
        expected = [f"{category}: 0" for category in CATEGORIES]
        assert capsys.readouterr().out.splitlines() == ["Total errors: 0", *expected]
        alerts = await alerts_of(pool)
        assert alerts == []
        assert metrics["pattern_insights"]["detected_patterns"] == []
        assert metrics["adaptive_control"]["recommended_size"] == 2
        assert set(metrics["monitoring"]) == {"dashboard_enabled", "dashboard_url"}
    finally:
        await pool.close()


async def test_metrics_after_good_days_and_bad(
    main_pool: WorkflowConnectionPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await main_pool.fetch("select pg_sleep(1.2)")
    for _ in range(2):
        with pytest.raises(asyncpg.DivisionByZeroError):
            await main_pool.fetch("select 1/0")
    metrics = await figures(main_pool)
    await run("07_error_analysis", metrics=metrics)
    assert capsys.readouterr().out.startswith("Total errors: 2\n")
    assert metrics["detailed_metrics"]["errors"]["errors_by_category"]["query_error"] == 2

    # Its file is in a directory that is Prometheus's own: here, in one that is the test's.
    target = tmp_path / "connection_pool.prom"

    def opened(path: str, mode: str) -> Any:
        assert path == "/var/lib/prometheus/connection_pool.prom"
        return target.open(mode)

    await run("08_prometheus", pool=main_pool, open=opened)
    text = target.read_text()
    assert text.endswith("\n")
    assert 'connection_pool_error_rate{pool="main_pool"} 0.66' in text

    with pytest.raises(asyncpg.PostgresError):
        await main_pool.fetch("select * from nowhere")
    await figures(main_pool)  # the guide asks once: what has been told by now is in every answer
    alerts = await alerts_of(main_pool)
    assert alerts[0] == "High error rate: 75.00%"
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(3):  # one of the four is kept for control
            await stack.enter_async_context(main_pool.acquire())
        await figures(main_pool)
        statistics = await main_pool.process({"operation": "get_pool_statistics"})
        assert statistics["utilization_rate"] == 0.75
    for _ in range(60):
        await main_pool.fetch("select pg_sleep(0)")
    await asyncio.gather(*(main_pool.fetch("select pg_sleep(1.1)") for _ in range(9)))
    await figures(main_pool)
    alerts = await alerts_of(main_pool)
    assert any(alert.startswith("Slow queries detected: P95=1") for alert in alerts)


async def alerts_of(pool: WorkflowConnectionPool) -> list[str]:
    """What the guide's health check says in its first round."""
    alerts: list[str] = []

    class NextRound(Exception):
        pass

    async def sleep(seconds: float) -> None:
        assert seconds == 60
        raise NextRound

    supplied = {"alert": alerts.append, "asyncio": types.SimpleNamespace(sleep=sleep)}
    names = await run("20_production_health", **supplied)
    with pytest.raises(NextRound):
        await names["monitor_pool_health"](pool)
    return alerts


@dataclass
class Record:
    timestamp: datetime
    type: str
    data: str


def large_dataset(count: int) -> list[Record]:
    start = datetime(2024, 1, 1, tzinfo=UTC)
    return [Record(start + timedelta(seconds=number), f"type {number % 7}", "x" * number) for number in range(count)]


@pytest.fixture
async def main_pool(database: asyncpg.Connection) -> AsyncIterator[WorkflowConnectionPool]:
    pool = WorkflowConnectionPool(name="main_pool", max_connections=4)
    await pool.process({"operation": "initialize"})
    yield pool
    await pool.close()


async def test_pipelines(
    database: asyncpg.Connection, main_pool: WorkflowConnectionPool, capsys: pytest.CaptureFixture[str]
) -> None:
    await insert_records(database, capsys)
    await compare_with_one_by_one(database, capsys)
    await mix_kinds_of_statements(database)


async def insert_records(database: asyncpg.Connection, capsys: pytest.CaptureFixture[str]) -> None:
    await database.execute("create table events (timestamp timestamptz, type text, data text)")
    names = await run("09_pipeline", large_dataset=large_dataset(1000))
    assert "Inserted 1000/1000 records" in capsys.readouterr().out
    stored = await database.fetch("select * from events order by timestamp")
    assert [tuple(row) for row in stored] == [(r.timestamp, r.type, r.data) for r in large_dataset(1000)]
    await names["pipeline"].close()


@pytest.mark.parametrize("name", ["10_best_effort", "11_transactional", "12_sequential", "13_parallel"])
async def test_strategies_of_the_pipeline(name: str) -> None:
    strategy = (await run(name))["strategy"]
    assert strategy == name[3:]
    assert QueryPipelineNode(name="p", connection_pool="main_pool", strategy=strategy).strategy == strategy


async def compare_with_one_by_one(database: asyncpg.Connection, capsys: pytest.CaptureFixture[str]) -> None:
    await database.execute("create table test (a int)")
    pipeline = QueryPipelineNode(name="bulk", connection_pool="main_pool")
    best = 0.0
    for runs in (1, 2, 3):  # its pipelined part is so short that one moment without the processor shows
        await run("14_performance", time=time, pool=get_pool("main_pool"), pipeline=pipeline)
        counts = await database.fetch("select a, count(*) as n from test group by a order by a")
        assert [tuple(row) for row in counts] == [(number, 2 * runs) for number in range(1000)]
        speedup = re.search(r"Speedup: ([\d.]+)x", capsys.readouterr().out)
        assert speedup is not None
        best = max(best, float(speedup[1]))
        if best > 5:
            break
    await pipeline.close()
    assert best > 5


async def mix_kinds_of_statements(database: asyncpg.Connection) -> None:
    await database.execute(
        "create table audit_log (what text); create table users (name text, active boolean); "
        "create table products (stock int); create table orders (id int); "
        "insert into users values ('ann', true), ('bob', false); insert into products values (5); "
        "insert into orders values (1), (2)"
    )
    names = await run("15_advanced")
    refused, users, update, count = names["results"]
    assert isinstance(refused.error, asyncpg.PostgresSyntaxError)
    assert [row["name"] for row in users.result] == ["ann"]
    assert update.result == "UPDATE 1"
    assert [tuple(row) for row in count.result] == [(2,)]
    assert await database.fetchval("select stock from products") == 4
    for text in ("INSERT INTO audit_log VALUES (...)", "SELECT * FROM users", "UPDATE products SET stock = stock - 1",
                 "SELECT COUNT(*) FROM orders"):  # fmt: skip
        await names["pipeline"].add_query(text)
    order = [step.statement.split()[0] for step in await names["pipeline"].explain()]
    assert order == ["SELECT", "SELECT", "INSERT", "UPDATE"]
    await names["pipeline"].close()


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


async def test_dashboard(database: asyncpg.Connection, serving: None) -> None:
    """It starts before the pool does, takes an alert, shows the pool when that is there, and stops."""
    await eventually(lambda: is_free(8080), timeout=120, what="port 8080, which the guide uses, is free")
    names = await run("16_dashboard", WorkflowConnectionPool=WorkflowConnectionPool)
    pool = names["pool"]
    try:
        async with aiohttp.ClientSession("http://localhost:8080") as http:
            async with http.get("/api/pools") as answer:
                assert "monitored_pool" not in await answer.json()  # nobody has used it
            await run("17_custom_alerts")  # and it need not run for that
            assert await pool.fetchval("select current_database()") == await database.fetchval(
                "select current_database()"
            )
            async with http.get("/api/alerts") as answer:
                (rule,) = [r for r in (await answer.json())["rules"] if r["name"] == "High Latency Alert"]
            assert rule["condition"] == "avg_query_time_ms > 100"
            assert (rule["duration_seconds"], rule["severity"]) == (60, "warning")

            async def shown() -> bool:
                async with http.get("/api/pools") as answer:
                    return "monitored_pool" in await answer.json()

            await eventually(shown)
            async with http.delete(f"/api/alerts/{rule['id']}") as answer:
                assert answer.status == 200
        await run("18_stop_dashboard", pool=pool)
        assert is_free(8080)
        await run("18_stop_dashboard", pool=pool)
        status = await pool.process({"operation": "get_comprehensive_status"})
        assert set(status["monitoring"]) == {"dashboard_enabled", "dashboard_url"}
    finally:
        await pool.close()


async def test_production(serving: None, pg18: EmbeddedServer, direct: asyncpg.Connection) -> None:
    """The complete example, but for its host."""
    await eventually(lambda: is_free(8080), timeout=120, what="port 8080, which the guide uses, is free")
    await direct.execute("create role app_user login password 'secure_password'")
    await direct.execute("create database main_db owner app_user")
    mine = {"user": "app_user", "password": "secure_password", "database": "main_db"}
    database = await asyncpg.connect(**(pg18.parameters | mine))
    await database.execute(
        "create table events (id int, type text, data text); create table users (name text, active boolean);"
        "insert into users values ('ann', true), ('bob', false)"
    )
    records = [types.SimpleNamespace(id=number, type="a", data="b") for number in range(500)]
    try:
        names = await run(
            "19_production",
            {
                "db.production.internal": "127.0.0.1",
                "5432": str(pg18.port),
            },
            bulk_data=records,
            logger=logging.getLogger("guide"),
            CircuitBreakerError=raypg.CircuitBreakerError,
        )
        assert names["result"]["success"]
        assert names["result"]["data"] == [{"name": "ann", "active": True}]
        assert names["result"]["routing_metadata"]["query_type"] == "read_simple"
        assert await database.fetchval("select count(*) from events") == 500
        router, request = names["router"], {"query": "SELECT * FROM users WHERE active = true", "operation": "execute"}
        assert (router.cache_size, router.pattern_learning) == (1000, True)

        async def is_kept() -> bool:
            found = await router.process(request)
            assert found["data"] == [{"name": "ann", "active": True}]
            return bool(found["routing_metadata"]["cache_hit"])

        await eventually(is_kept)
        await names["pool"].execute("UPDATE users SET active = true")
        assert len((await router.process(request))["data"]) == 2
        known = await router.get_metrics()
        assert known["cache_stats"]["hits"] >= 1
        assert known["pattern_insights"]["detected_patterns"]
        async with aiohttp.ClientSession("http://localhost:8080") as http, http.get("/api/pools") as answer:
            assert "production_pool" in await answer.json()
        await names["pool"].process({"operation": "stop_monitoring"})
        await names["pipeline"].close()
        await names["pool"].close()
    finally:
        await database.close()
        await direct.execute("drop database main_db with (force)")
        await direct.execute("drop role app_user")


def test_all_names_that_the_guide_imports_are_there() -> None:
    for path in GUIDE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module == "raypg"
                assert all(hasattr(raypg, alias.name) for alias in node.names)
