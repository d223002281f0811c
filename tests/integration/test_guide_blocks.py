"""The code of the user's guide runs as it stands there; what it leaves undefined is supplied here."""

from __future__ import annotations

import ast
import inspect
import logging
import os
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from pools import backends_of

import raypg
from raypg import QueryPipelineNode, WorkflowConnectionPool, get_pool
from raypg.embedded import EmbeddedServer

GUIDE = Path(__file__).parent / "guide"


async def run(name: str, **supplied: Any) -> dict[str, Any]:
    """Run a block with top-level ``await``, as a notebook does; returns its names."""
    path = GUIDE / f"{name}.py"
    code = compile(path.read_text(), str(path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
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


async def test_pipeline(
    database: asyncpg.Connection, main_pool: WorkflowConnectionPool, capsys: pytest.CaptureFixture[str]
) -> None:
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


async def test_performance(
    database: asyncpg.Connection, main_pool: WorkflowConnectionPool, capsys: pytest.CaptureFixture[str]
) -> None:
    await database.execute("create table test (a int)")
    pipeline = QueryPipelineNode(name="bulk", connection_pool="main_pool")
    await run("14_performance", time=time, pool=get_pool("main_pool"), pipeline=pipeline)
    await pipeline.close()
    counts = await database.fetch("select a, count(*) as n from test group by a order by a")
    assert [tuple(row) for row in counts] == [(number, 2) for number in range(1000)]
    speedup = re.search(r"Speedup: ([\d.]+)x", capsys.readouterr().out)
    assert speedup is not None
    assert float(speedup[1]) > 5


async def test_advanced_patterns(database: asyncpg.Connection, main_pool: WorkflowConnectionPool) -> None:
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


def test_all_names_that_the_guide_imports_are_there() -> None:
    for path in GUIDE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module == "raypg"
                assert all(hasattr(raypg, alias.name) for alias in node.names)
