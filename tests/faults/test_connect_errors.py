"""A database that cannot be reached, or does not let us in: told in time, in words, without the password."""

from __future__ import annotations

import asyncio
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import ray
from pgserver import main_server
from pools import NO_BREAKER, own_pool, unique_name
from proxy import Proxy
from waiting import eventually

from raypg import (
    ConnectError,
    PoolNotFoundError,
    QueryPipelineNode,
    UnavailableError,
    WorkflowConnectionPool,
    get_pool,
)
from raypg.config import from_kwargs
from raypg.embedded import EmbeddedServer
from raypg.server.connect import Connector

SECRET = "s3cr3t@/:%?-wörd"
CONNECT_TIMEOUT = 2.0


@pytest.fixture
def black_hole() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        yield listener.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# What is wrong → (settings, category, words that the message must have).
WRONG: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "password": ({"password": SECRET}, "authentication_failed", ["password", "postgres", "28P01"]),
    "no password": ({"password": None}, "authentication_failed", ["password"]),
    "user": ({"user": "nobody_here"}, "authentication_failed", ["nobody_here"]),
    "port": ({"port": -1}, "connection_refused", ["refused", "listens"]),
    "host": ({"host": "no-such-host.invalid"}, "connection_refused", ["no-such-host.invalid", "resolve"]),
    "database": ({"database": "no_such_database"}, "query_error", ["no_such_database", "3D000", "database name"]),
    "black hole": ({"port": -2}, "connection_timeout", ["did not answer", "connect_timeout", "2 s"]),
    "setting": ({"server_settings": {"no_such_setting": "1"}}, "query_error", ["no_such_setting"]),
    "value of a setting": ({"server_settings": {"work_mem": "much"}}, "query_error", ["work_mem"]),
    "TLS": ({"sslmode": "require"}, "connection_refused", ["TLS", "sslmode"]),
    "codec": ({"codecs": {"no_such_type": "json"}}, "connection_refused", ["no_such_type"]),
    "password variable": ({"password_env": "NO_SUCH_VARIABLE", "password": None}, "", ["NO_SUCH_VARIABLE"]),
    "password command": ({"password_command": "exit 3", "password": None}, "", ["exit"]),
}


def wrong_settings(
    label: str, server: EmbeddedServer, closed_port: int, black_hole: int
) -> tuple[dict[str, Any], str, list[str]]:
    changes, category, words = WRONG[label]
    changes = {**changes}
    if "port" in changes:
        changes["port"] = {-1: closed_port, -2: black_hole}[changes["port"]]
    return {**server.parameters, "connect_timeout": CONNECT_TIMEOUT, **changes}, category, words


def everything_said(error: BaseException) -> str:
    """Text, repr, attributes and traceback of *error* and of what caused it."""
    parts = []
    cause: BaseException | None = error
    while cause is not None:
        parts += [str(cause), repr(cause), repr(cause.args), repr(vars(cause)), *getattr(cause, "__notes__", [])]
        cause = cause.__cause__ or cause.__context__
    return "\n".join([*parts, *traceback.format_exception(error)])


@pytest.mark.parametrize("label", WRONG)
async def test_a_connection_that_fails_says_why(
    label: str, pg: EmbeddedServer, closed_port: int, black_hole: int
) -> None:
    settings, category, words = wrong_settings(label, pg, closed_port, black_hole)
    connector = Connector(from_kwargs(name="x", **settings), "raypg:test")
    started = time.monotonic()
    with pytest.raises(ConnectError) as caught:
        await connector.open()
    assert time.monotonic() - started < CONNECT_TIMEOUT + 17
    error = caught.value
    for word in words:
        assert word in str(error), error
    if category:
        assert error.category == category
    said = everything_said(error)
    assert SECRET not in said
    assert pg.password not in said


@pytest.mark.parametrize("label", ["password", "black hole"])
async def test_initialize_says_what_is_wrong_and_leaves_the_name_free(
    label: str, ray_cluster: Any, pg: EmbeddedServer, closed_port: int, black_hole: int
) -> None:
    settings, category, words = wrong_settings(label, pg, closed_port, black_hole)
    name = unique_name()
    wrong = WorkflowConnectionPool(name=name, **settings)
    started = time.monotonic()
    with pytest.raises(ConnectError) as caught:
        await wrong.process({"operation": "initialize"})
    took = time.monotonic() - started
    # What it takes to start two actors on this machine comes on top.
    assert took < CONNECT_TIMEOUT + 21
    assert caught.value.category == category
    for word in words:
        assert word in str(caught.value)
    said = everything_said(caught.value)
    assert SECRET not in said
    assert pg.password not in said

    right = WorkflowConnectionPool(name=name, **pg.parameters, max_connections=1)
    try:
        assert (await right.process({"operation": "initialize"}))["status"] == "initialized"
        assert await right.fetchval("select 1") == 1
    finally:
        await right.close()


async def test_the_first_call_without_initialize_says_it_too(ray_cluster: Any, pg: EmbeddedServer) -> None:
    settings = {**pg.parameters, "password": SECRET}
    wrong = WorkflowConnectionPool(name=unique_name(), **settings)
    calls = [
        wrong.fetchval("select 1"),
        wrong.process({"operation": "execute", "query": "select 1"}),
        wrong.process({"operation": "acquire"}),
        wrong.acquire()._acquire(),
        wrong.executemany("select $1", [(1,)]),
    ]
    results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
    assert all(isinstance(result, ConnectError) for result in results), results
    assert not any(SECRET in everything_said(result) for result in results if isinstance(result, ConnectError))
    pipeline = QueryPipelineNode(name="p", connection_pool=wrong, flush_interval=0)
    await pipeline.add_query("select 1")
    (result,) = await pipeline.flush()
    assert isinstance(result.error, ConnectError)
    await pipeline.close()
    with pytest.raises(PoolNotFoundError):
        get_pool(wrong.name)


async def test_a_thousand_first_calls_of_a_wrong_pool_all_learn_it_in_time(
    ray_cluster: Any, pg: EmbeddedServer
) -> None:
    settings = {**pg.parameters, "database": "no_such_database", "name": unique_name()}
    pools = [WorkflowConnectionPool(**settings) for _ in range(5)]
    started = time.monotonic()
    calls = [pools[number % 5].fetchval("select 1") for number in range(1000)]
    results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
    assert {type(result) for result in results} == {ConnectError}
    assert time.monotonic() - started < CONNECT_TIMEOUT + 8


async def test_a_wrong_password_appears_in_no_repr(ray_cluster: Any, pg: EmbeddedServer) -> None:
    pool = WorkflowConnectionPool(name=unique_name(), **{**pg.parameters, "password": SECRET})
    text = repr(pool) + str(pool) + repr(vars(pool)) + repr(pool._config)
    assert SECRET not in text


async def test_no_password_in_any_log_of_the_cluster(ray_cluster: Any, pg: EmbeddedServer) -> None:
    """Right ones, wrong ones, in a DSN, in the environment of nobody: not in one file of Ray's session directory."""
    name = unique_name()
    async with own_pool(pg, max_connections=1) as pool:
        with pytest.raises(asyncpg.PostgresError):
            await pool.execute(f"select '{SECRET}' from nowhere")
        await pool.process({"operation": "get_status"})
    for settings in (
        {**pg.parameters, "password": SECRET},
        {"connection_string": pg.conninfo(password=SECRET, sslmode="require")},
    ):
        wrong = WorkflowConnectionPool(name=name, **settings)
        with pytest.raises(ConnectError):
            await wrong.process({"operation": "initialize"})
    directory = Path(ray._private.worker.global_worker.node.get_session_dir_path()) / "logs"
    looked_at = 0
    for file in directory.rglob("*"):
        if file.is_file():
            looked_at += 1
            content = file.read_bytes()
            for secret in (SECRET, pg.password, SECRET.replace("@", "%40")):
                assert secret.encode() not in content, file
    assert looked_at > 5


async def test_the_server_is_full(ray_cluster: Any) -> None:
    """Another program holds the slots: a pool that has some works on with them, one that has none says so."""
    settings = {"max_connections": "8", "superuser_reserved_connections": "0"}
    with main_server(settings) as server:
        others = [await asyncpg.connect(**server.parameters) for _ in range(6)]
        try:
            async with own_pool(server, max_connections=3, min_connections=1) as pool:
                numbers = await asyncio.wait_for(
                    asyncio.gather(*(pool.fetchval("select $1::int", number) for number in range(50))), 20
                )
                assert numbers == list(range(50))
                while True:
                    try:
                        others.append(await asyncpg.connect(**server.parameters))
                    except asyncpg.TooManyConnectionsError:
                        break
                full = WorkflowConnectionPool(name=unique_name(), **server.parameters, max_connections=1)
                with pytest.raises(ConnectError, match="slots") as caught:
                    await full.process({"operation": "initialize"})
                assert caught.value.category == "pool_exhausted"
                assert caught.value.sqlstate == "53300"
                assert await pool.fetchval("select 1") == 1
        finally:
            await asyncio.gather(*(other.close() for other in others))


# --- the server goes away later --------------------------------------------------------------------------------------


async def test_a_stopped_server_fails_calls_fast_and_a_started_one_serves_them(ray_cluster: Any) -> None:
    with main_server() as server:
        async with own_pool(server, max_connections=4, connect_timeout=CONNECT_TIMEOUT, **NO_BREAKER) as pool:
            for mode in ("fast", "immediate"):
                await _down_and_up(pool, server, mode)


async def _down_and_up(pool: WorkflowConnectionPool, server: EmbeddedServer, mode: Any) -> None:
    assert await pool.fetchval("select 1") == 1
    await asyncio.to_thread(server.stop, mode)
    for _ in range(3):
        started = time.monotonic()
        with pytest.raises(UnavailableError):
            await pool.fetchval("select 1")
        assert time.monotonic() - started < CONNECT_TIMEOUT + 2
    calls = [pool.fetchval("select 1") for _ in range(200)]
    calls += [pool.execute("create table t (a int)") for _ in range(50)]
    calls += [pool.acquire()._acquire() for _ in range(10)]
    results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), CONNECT_TIMEOUT + 5)
    assert {type(result) for result in results} == {ConnectError}
    assert "refused" in str(results[0])
    assert server.password not in everything_said(results[0])
    await asyncio.to_thread(server.start)

    async def serves() -> bool:
        try:
            return bool(await pool.fetchval("select 1") == 1)
        except UnavailableError:
            return False

    started = time.monotonic()
    await eventually(serves, timeout=20)
    assert time.monotonic() - started < 6
    answers = await asyncio.gather(*(pool.fetchval("select $1::int", number) for number in range(300)))
    assert answers == list(range(300))


async def test_a_server_that_says_nothing_any_more(ray_cluster: Any, pg: EmbeddedServer) -> None:
    """Its host is gone without a word: what has a timeout ends soon after it, and nothing hangs at close."""
    async with (
        Proxy(pg.port) as proxy,
        own_pool(pg, port=proxy.port, max_connections=2, connect_timeout=CONNECT_TIMEOUT) as pool,
    ):
        assert await pool.fetchval("select 1") == 1
        proxy.frozen = True
        started = time.monotonic()
        results = await asyncio.wait_for(
            asyncio.gather(*(pool.fetchval("select 1", timeout=0.5) for _ in range(10)), return_exceptions=True), 30
        )
        assert all(isinstance(result, Exception) for result in results)
        assert time.monotonic() - started < 12
        proxy.frozen = False

        async def serves() -> bool:
            try:
                return bool(await pool.fetchval("select 1", timeout=2) == 1)
            except (UnavailableError, TimeoutError):
                return False

        await eventually(serves, timeout=20)
