"""SQL over HTTP, by a real client: what is answered, who is let in, and what is not run."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import psutil
import pytest
import yaml
from pools import running, unique_name
from pydantic import ValidationError
from ray import serve
from ray.serve.schema import ServeDeploySchema
from waiting import eventually

from raypg import WorkflowConnectionPool, access_token
from raypg.address import free_port
from raypg.deployments.router import RouterArgs, build
from raypg.embedded import EmbeddedServer
from raypg.metrics_access import snapshots

ROOT = Path(__file__).parents[2]
ALL = ("READ", "WRITE", "DDL", "TRANSACTION", "SESSION", "UNKNOWN")


@pytest.fixture(scope="module")
def address(serving: None, pool: WorkflowConnectionPool) -> Iterator[str]:
    """Serve on loopback, with five applications: as it is by default (``/raypg``), with all kinds of statements and
    small bodies (``/all``), with little patience (``/hasty``), for a pool that does not run (``/none``), of three
    replicas with caches (``/three``)."""
    port = free_port("127.0.0.1", 0, "try again")
    serve.shutdown()  # the one of the session has no HTTP
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    apps = {
        "/raypg": RouterArgs(pool=pool.name),
        "/all": RouterArgs(pool=pool.name, statements=ALL, max_body_bytes=10_000),
        "/hasty": RouterArgs(pool=pool.name, body_timeout=0.5, query_timeout=2.0),
        "/none": RouterArgs(pool=unique_name("nowhere")),
        "/three": RouterArgs(pool=pool.name, num_replicas=3, cache_size=100, cache_ttl=600.0),
    }
    targets = [
        serve.RunTarget(build(args), name=f"router{route[1:]}", route_prefix=route) for route, args in apps.items()
    ]
    serve.run_many(targets)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    serve.start(proxy_location="Disabled")


@pytest.fixture
async def client(address: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=address, timeout=30) as client:
        yield client


async def ask(client: httpx.AsyncClient, query: str, *params: Any, route: str = "/raypg", **more: Any) -> Any:
    return await client.post(f"{route}/query", json={"query": query, "params": list(params), **more})


async def test_a_statement_and_its_values(client: httpx.AsyncClient, table: str) -> None:
    answer = await ask(client, f"insert into {table} values ($1, $2, $3) returning *", 1, "one", 5)
    assert answer.status_code == 200
    assert answer.json()["data"] == [{"id": 1, "label": "one", "amount": 5}]
    answer = await ask(
        client, "select 1.50::numeric as n, '2020-01-01 00:00+00'::timestamptz as t, $1::text::date as d,"
        " '{1,2}'::int[] as a, 'nan'::float8 as f, int4range(1, 5) as r, '\\x00'::bytea as b, row(1, 'x') as c",
        "2020-02-03",
    )  # fmt: skip
    found = answer.json()
    assert found["data"][0].items() >= {
        "n": "1.50", "t": "2020-01-01T00:00:00+00:00", "d": "2020-02-03", "a": [1, 2], "f": "nan", "b": "AA==",
        "r": {"lower": 1, "upper": 5, "bounds": "[)"},
    }.items()  # fmt: skip
    assert found["routing_metadata"]["target"] == "primary"
    assert found["routing_metadata"]["query_type"] == "read_simple"
    assert found["session_token"].endswith("primary")
    more = {"session_id": "s", "max_staleness": 5, "after": found["session_token"], "timeout": 5}
    assert (await ask(client, f"select count(*) as n from {table}", **more)).json()["data"] == [{"n": 1}]


async def test_what_the_server_refuses_and_what_takes_too_long(client: httpx.AsyncClient, table: str) -> None:
    answer = await ask(client, f"insert into {table} values (1, 'x', -1)")
    assert (answer.status_code, answer.json()["sqlstate"]) == (422, "23514")
    answer = await ask(client, "select pg_sleep(30)", timeout=0.2)
    assert (answer.status_code, answer.json()["error_type"]) == (504, "QueryTimeoutError")
    # The deployment's own limit holds for those who ask for more.
    answer = await ask(client, "select pg_sleep(30)", timeout=100, route="/hasty")
    assert answer.status_code == 504


async def test_what_one_replica_writes_none_answers_from_before(
    client: httpx.AsyncClient, pool: WorkflowConnectionPool, table: str
) -> None:
    query = f"select amount from {table} where id = 1"
    await ask(client, f"insert into {table} values (1, 'x', 0)", route="/three")

    async def read(at_once: int) -> list[Any]:
        answers = await asyncio.gather(*(ask(client, query, route="/three") for _ in range(at_once)))
        found = [answer.json() for answer in answers]
        assert all(answer["success"] for answer in found), found
        return found

    async def all_three_keep_it() -> bool:
        await read(30)
        caches = (await snapshots([pool.name]))[pool.name]["caches"]
        return bool(caches["caches"] >= 3 and caches["cache_entries"] >= 3)

    await eventually(all_three_keep_it, 30)
    hits = 0
    for amount in range(1, 9):
        changed = await ask(client, f"update {table} set amount = $1", amount, route="/three", session_id=f"s{amount}")
        assert changed.json()["success"]
        for _ in range(3):
            found = await read(20)
            assert {answer["data"][0]["amount"] for answer in found} == {amount}
            hits += sum(answer["routing_metadata"]["cache_hit"] for answer in found)
            await asyncio.sleep(0.05)  # time for what is kept again
    assert hits > 20


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"{}", "query"),
        (b'{"query": 5}', "query"),
        (b'{"query": "select 1", "parms": []}', "parms"),
        (b'{"query": "select 1", "params": 5}', "params"),
        (b'{"query": "select 1", "session_id": ""}', "session_id"),
        (b'{"query": "select 1", "after": "x"}', "token"),
        (b'{"query": "select \\u0000"}', "NUL"),
        (b'{"query": "select 1", "params": ' + b"[" * 2000 + b"]" * 2000 + b"}", ""),
    ],
)
async def test_bad_bodies(client: httpx.AsyncClient, content: bytes, words: str) -> None:
    answer = await client.post("/all/query", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert words.lower() in answer.json()["error"].lower()
    assert (await ask(client, "select 1 as one", route="/all")).json()["data"] == [{"one": 1}]


async def test_texts_made_to_hurt_harm_only_themselves(client: httpx.AsyncClient) -> None:
    nested = f"select {'(' * 500_000}1{')' * 500_000}"
    hurt = {nested: 403, "select '" + "x" * 9_000: 403, "select '\0'": 400}
    asked = asyncio.gather(*(ask(client, text) for text in hurt))
    good = await asyncio.gather(*(ask(client, "select $1::int as n", number) for number in range(20)))
    assert [answer.json()["data"] for answer in good] == [[{"n": number}] for number in range(20)]
    for answer, status in zip(await asked, hurt.values(), strict=True):
        assert (answer.status_code, answer.json()["success"]) == (status, False)
    # Where all is run, the server has its say.
    answer = await ask(client, "select '" + "x" * 9_000, route="/all")
    assert (answer.status_code, answer.json()["sqlstate"]) == (422, "42601")
    answer = await ask(client, f"select {'(' * 4_500}1{')' * 4_500}", route="/all")
    assert answer.status_code in (200, 422)


async def test_it_holds_no_connection_to_the_database(client: httpx.AsyncClient, pg18: EmbeddedServer) -> None:
    assert (await ask(client, "select 1")).status_code == 200

    def connected(process: psutil.Process) -> bool:
        peers = (connection.raddr for connection in process.net_connections("tcp"))
        return any(peer and peer.port == pg18.port for peer in peers)

    processes = {kind: [] for kind in ("ServeReplica:", "PoolWorker")}  # as Ray calls them
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            for kind, found in processes.items():
                if kind in process.name() or kind in " ".join(process.cmdline()):
                    found.append(connected(process))
    assert len(processes["ServeReplica:"]) >= 3
    assert not any(processes["ServeReplica:"])
    assert any(processes["PoolWorker"])


async def test_limits_of_a_request(client: httpx.AsyncClient) -> None:
    answer = await ask(client, "select 1 /*" + "x" * 20_000 + "*/", route="/all")
    assert answer.status_code == 413

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 1000

    answer = await client.post("/all/query", content=chunks(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413

    async def slow() -> AsyncIterator[bytes]:
        yield b'{"query": '
        await asyncio.sleep(1)  # its body_timeout is 0.5 s
        yield b'"select 1"}'

    answer = await client.post("/hasty/query", content=slow(), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error_type"]) == (400, "TooSlow")
    answer = await client.post("/all/query", content=b'{"query": "select 1"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400
    assert (await client.get("/raypg/query")).status_code == 405


async def test_statements_that_are_not_on_the_list_are_not_run(
    client: httpx.AsyncClient, table: str, direct: asyncpg.Connection
) -> None:
    refused = {
        f"drop table {table}": "DDL", "begin": "TRANSACTION", "set work_mem = '1MB'": "SESSION", "selec 1": "UNKNOWN",
        "select pg_advisory_lock(1)": "SESSION", f"select 1; delete from {table}": "UNKNOWN",
        f"select * into {table}_2 from {table}": "DDL", f"do $$ begin drop table {table}; end $$": "UNKNOWN",
        f"copy {table} to program 'cat'": "UNKNOWN",
    }  # fmt: skip
    for query, kind in refused.items():
        answer = await ask(client, query)
        assert (answer.status_code, answer.json()["success"]) == (403, False), query
        assert f"kind {kind} " in answer.json()["error"]
    assert await direct.fetchval("select to_regclass($1)", table) is not None
    assert await direct.fetchval("select to_regclass($1)", f"{table}_2") is None


async def test_transactions_by_session_id_where_they_are_allowed(
    client: httpx.AsyncClient, table: str, direct: asyncpg.Connection
) -> None:
    for query in ("begin", f"insert into {table} (id) values (1)", "commit"):
        assert (await ask(client, query, route="/all", session_id="s")).status_code == 200
    assert await direct.fetchval(f"select count(*) from {table}") == 1
    assert (await ask(client, "commit", route="/all", session_id="s")).status_code == 400
    with pytest.raises(ValidationError, match="num_replicas=1"):
        RouterArgs(pool="p", statements=("READ", "TRANSACTION"), num_replicas=2)


async def test_without_the_right_token_nothing_is_run(
    client: httpx.AsyncClient, table: str, direct: asyncpg.Connection
) -> None:
    insert = {"query": f"insert into {table} (id) values (1)"}
    for headers in (
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic eDp5"},
        {"Host": "evil.example"},
        {"X-Forwarded-For": "10.0.0.1"},
    ):
        answer = await client.post("/raypg/query", json=insert, headers=headers)
        assert (answer.status_code, answer.json()["success"]) == (401, False), headers
        assert answer.headers["www-authenticate"] == "Bearer"
    assert await direct.fetchval(f"select count(*) from {table}") == 0
    right = {"Authorization": f"Bearer {access_token.token()}", "Host": "raypg.example", "X-Forwarded-For": "10.0.0.1"}
    assert (await client.post("/raypg/query", json=insert, headers=right)).status_code == 200
    assert await direct.fetchval(f"select count(*) from {table}") == 1


async def test_when_the_client_goes_away_its_statement_is_cancelled(
    client: httpx.AsyncClient, direct: asyncpg.Connection
) -> None:
    mark = f"raypg_{time.monotonic_ns()}"

    async def runs(count: int) -> bool:
        return await running(direct, mark) == count

    asked = asyncio.create_task(ask(client, f"select pg_sleep(25) as {mark}"))
    await eventually(lambda: runs(1))
    asked.cancel()
    await eventually(lambda: runs(0))


async def test_a_pool_that_does_not_run(client: httpx.AsyncClient) -> None:
    answer = await ask(client, "select 1", route="/none")
    assert (answer.status_code, answer.json()["error_type"]) == (503, "PoolNotFoundError")
    assert answer.headers["retry-after"] == "1"
    assert (await client.get("/none/healthz")).json() == {"status": "ok"}
    # Serve asks each replica how it is, and this is no reason to start another.
    application = serve.status().applications["routernone"]
    assert application.status == "RUNNING"
    assert application.deployments["Router"].status == "HEALTHY"


async def test_an_open_breaker_is_503_with_the_time_to_wait(
    client: httpx.AsyncClient, pool: WorkflowConnectionPool
) -> None:
    await pool.circuit_breaker.force_open("maintenance", ttl=30)
    try:
        answer = await ask(client, "select 1 as one")
        assert (answer.status_code, answer.json()["error_type"]) == (503, "CircuitBreakerError")
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert (await client.get("/raypg/healthz")).status_code == 200
    finally:
        await pool.circuit_breaker.force_close("over")
    assert (await ask(client, "select 1 as one")).json()["data"] == [{"one": 1}]


async def test_it_describes_itself(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/raypg/openapi.json")).json()
    operation = schema["paths"]["/query"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) >= {"query", "params", "session_id", "max_staleness"}
    assert set(operation["responses"]) >= {"200", "400", "401", "403", "413", "422", "503", "504"}
    assert schema["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert "numeric" in operation["description"]
    assert (await client.get("/raypg/docs")).status_code == 200


def test_the_file_for_serve_is_valid_and_on_loopback() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "serve.yaml").read_text()))
    assert config.http_options.host == "127.0.0.1"
    (application,) = config.applications
    assert application.route_prefix == "/raypg"
    module, _, name = application.import_path.partition(":")
    assert (module, name) == ("raypg.deployments.router", "build")
    RouterArgs.model_validate(application.args)
    assert list(inspect.signature(build).parameters) == ["args"]
    with pytest.raises(ValidationError):
        RouterArgs.model_validate({"pol": "x"})


async def test_on_an_address_that_others_reach_each_request_needs_the_token(
    address: str, pool: WorkflowConnectionPool, table: str, direct: asyncpg.Connection
) -> None:
    """The last one here: it starts Serve anew."""
    serve.shutdown()
    port = free_port("127.0.0.1", 0, "try again")
    serve.start(http_options={"host": "0.0.0.0", "port": port})
    serve.run(build(RouterArgs(pool=pool.name)), name="router", route_prefix="/raypg")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        insert = f"insert into {table} (id) values (1)"
        assert (await ask(client, insert)).status_code == 401
        assert await direct.fetchval(f"select count(*) from {table}") == 0
        client.headers["Authorization"] = f"Bearer {access_token.token()}"
        assert (await ask(client, insert)).json()["data"] == [{"rows_affected": 1}]
