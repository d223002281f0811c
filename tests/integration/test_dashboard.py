"""The dashboard on real Ray Serve: its addresses, its frames, who is let in, and when it begins and ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import psutil
import pytest
import ray
from breakers import stands
from pools import own_pool, unique_name
from ray import serve
from waiting import eventually
from watching import Viewer, least, watch, without_nulls

from raypg import UnavailableError, WorkflowConnectionPool, access_token
from raypg.core.history import SERIES
from raypg.deployments.security import HEADERS
from raypg.embedded import EmbeddedServer


@pytest.fixture
async def http(dashboard: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(dashboard) as session:
        yield session


async def get(http: aiohttp.ClientSession, path: str, status: int = 200, **more: Any) -> Any:
    async with http.get(path, **more) as answer:
        assert answer.status == status, await answer.text()
        assert HEADERS.items() <= answer.headers.items()
        return await answer.json()


async def test_pools_metrics_and_history(http: aiohttp.ClientSession, pool: WorkflowConnectionPool) -> None:
    for number in range(20):
        await pool.fetchval("select $1::int", number)

    async def counted() -> bool:
        return bool((await get(http, "/api/pools"))[pool.name]["queries_per_second"])

    await eventually(counted)

    async def whole() -> Any:  # of who does not answer within a moment, a frame has nothing
        line, metrics = (await get(http, "/api/pools"))[pool.name], await get(http, "/api/metrics")
        frame = metrics["pools"][pool.name]
        looked = frame["activity"] and frame["activity"]["error"] is None
        told = frame["now"] and frame["workers"] and frame["total"] is not None
        return (line, metrics) if looked and told and line["breaker"] and frame["breaker"]["state"] else None

    line, metrics = await eventually(whole, timeout=30)
    assert (line["max_connections"], line["breaker"]) == (10, "closed")
    assert abs(datetime.fromisoformat(metrics["timestamp"]) - datetime.now(UTC)) < timedelta(seconds=10)
    frame = metrics["pools"][pool.name]
    assert re.fullmatch(r"postgres@\S+/postgres", frame["database"])
    assert set(frame["lights"]) == {"database", "breaker", "pool", "alerts"}
    assert frame["total"] == frame["active"] + frame["idle"]
    assert frame["activity"]["error"] is None
    assert frame["activity"]["backends"] >= frame["total"]
    assert [worker["index"] for worker in frame["workers"]] == [0]
    assert set(frame["now"]) == {"t", *SERIES}
    every = await get(http, f"/api/history?pool={pool.name}&seconds=60")
    assert set(every["metrics"]) == set(SERIES)
    assert sum(value or 0 for value in every["metrics"]["queries"]) >= 20
    one = await get(http, f"/api/history/queries?pool={pool.name}&minutes=60")
    assert (one["metric"], one["step"], len(one["points"])) == ("queries", 60, 60)
    assert all(at % 60 == 0 for at, _ in one["points"])
    async with http.get("/metrics") as answer:
        scraped = await answer.text()
    assert f'connection_pool_info{{pool="{pool.name}"}} 1.0' in scraped
    assert "raypg_metrics_up 1.0" in scraped


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/api/history/queriess?pool=POOL", 422, ["'queries'", "wait_p95_ms"]),
        ("/api/history/queries?pool=POOL&seconds=soon", 422, ["soon"]),
        ("/api/history/queries?pool=POOL&seconds=nan", 422, ["nan"]),
        ("/api/history/queries?pool=POOL&seconds=1&minutes=1", 422, ["not both"]),
        ("/api/history?pool=nobody", 404, ["nobody"]),
        ("/api/nothing", 404, ["Not Found"]),
        ("/static/../dashboard.py", 404, []),
        ("/static/..%2Fdashboard.py", 404, ["no file"]),
        ("/static/nothing.js", 404, ["no file"]),
        ("/static/a%00b.js", 404, ["no file"]),
        (f"/static/{'x' * 1000}.js", 404, ["no file"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
async def test_what_is_wrong_is_said_as_json(
    http: aiohttp.ClientSession, pool: WorkflowConnectionPool, path: str, status: int, words: list[str]
) -> None:
    error = (await get(http, path.replace("POOL", pool.name), status))["error"]
    assert {"type", "message"} <= error.keys()
    for word in words:
        assert word in json.dumps(error)


async def test_plotly_comes_from_its_package_and_is_sent_once(http: aiohttp.ClientSession) -> None:
    async with http.get("/static/plotly.min.js") as answer:
        body = await answer.read()
        assert answer.headers["Content-Encoding"] == "gzip"
        assert b"plotly.js" in body[:200]
        assert "max-age=" in answer.headers["Cache-Control"]
        tag = answer.headers["ETag"]
    async with http.get("/static/plotly.min.js", headers={"If-None-Match": tag}) as answer:
        assert (answer.status, await answer.read()) == (304, b"")


async def test_a_state_and_its_patches_add_up(http: aiohttp.ClientSession, pool: WorkflowConnectionPool) -> None:
    """Who has watched for a while sees what somebody sees who has just come."""
    early = await watch(http, "")
    for number in range(4):
        await asyncio.gather(*(pool.fetchval("select $1::int + 1", number) for _ in range(50)))
        await early.take()
    late = await watch(http, "")
    while early.number < late.number:
        await early.take()
    while late.number < early.number:
        await late.take()
    assert without_nulls(late.state) == without_nulls(early.state)
    assert early.state["pools"][pool.name]["statements"]
    assert {"rules", "active", "history"} <= early.state["alerts"].keys()
    assert "avg_query_time_ms" in early.state["names"]
    assert max(early.sizes[1:]) < early.sizes[0]


async def test_every_trouble_is_named_within_two_seconds(
    http: aiohttp.ClientSession, pg18: EmbeddedServer, schema: str, direct: asyncpg.Connection
) -> None:
    async with own_pool(pg18, max_connections=4) as pool:
        viewer = await watch(http, "")
        name = pool.name

        def text(state: dict[str, Any], light: str) -> str:
            return str(state["pools"][name]["lights"][light]["text"]) if name in state["pools"] else ""

        await viewer.until(lambda state: "in use" in text(state, "database"))
        await direct.execute(f"create table {schema}.t as select 1 as a")
        blocker = direct.get_server_pid()

        async def locked() -> float:
            """A lock is held, and somebody waits for it."""
            await direct.execute("begin")
            await direct.execute(f"lock table {schema}.t")
            waiting = asyncio.create_task(pool.fetch(f"select a from {schema}.t where a::text <> 'confidential'"))
            took = await viewer.until(lambda state: f"session {blocker}" in text(state, "database"))
            sessions = viewer.state["pools"][name]["activity"]["sessions"]
            (blocked,) = [session for session in sessions if session["ours"]]
            assert blocked["blocked_by"] == [blocker]
            assert "confidential" not in json.dumps(viewer.state)
            assert viewer.state["pools"][name]["verdict"]["text"].startswith("Database: session")
            await direct.execute("rollback")
            assert [tuple(row) for row in await waiting] == [(1,)]
            await viewer.until(lambda state: f"session {blocker}" not in text(state, "database"))
            return took

        async def saturated() -> float:
            """Every connection is in use, and somebody waits."""
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(3):
                    await stack.enter_async_context(pool.acquire())
                more = asyncio.create_task(pool.fetchval("select 7"))
                took = await viewer.until(lambda state: "saturated: all 3" in text(state, "pool"))
                await viewer.until(lambda state: len(state["pools"][name]["leases"]) == 3)
            assert await more == 7
            await viewer.until(lambda state: state["pools"][name]["verdict"]["level"] == "ok")
            return took

        for trouble in (locked, saturated):
            took = await least(trouble, 2.0)
            print(f"{trouble.__name__}: named after {took:.2f} s")
            assert took < 2.0


async def test_a_viewer_of_another_site_and_a_name_that_leads_here_are_refused(
    http: aiohttp.ClientSession, dashboard: str
) -> None:
    port = urlsplit(dashboard).port
    await get(http, "/api/pools", 421, headers={"Host": f"evil.example:{port}"})
    await get(http, "/api/pools", 403, headers={"Origin": "http://evil.example"})
    evil = {"Origin": "http://evil.example"}
    for headers in (evil, {"Host": f"evil.example:{port}"}):
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await http.ws_connect("/ws", headers=headers)
        assert caught.value.status == 403
    async with http.post("/api/alerts", json={"name": "x", "condition": "error_rate > 1"}, headers=evil) as answer:
        assert answer.status == 403
    async with http.ws_connect("/ws", headers={"Origin": dashboard}) as ours:
        assert json.loads(await ours.receive_str())["type"] == "state"


async def test_alerts_are_added_shown_and_deleted(http: aiohttp.ClientSession, pool: WorkflowConnectionPool) -> None:
    rule = {"name": "Slow", "condition": "avg_query_time_ms > 100000", "threshold": 100000, "severity": "warning"}
    async with http.post("/api/alerts", json={**rule, "duration_seconds": 60, "pool": pool.name}) as answer:
        assert answer.status == 200, await answer.text()
        known = (await answer.json())["id"]
    assert known in [found["id"] for found in (await get(http, "/api/alerts"))["rules"]]
    async with http.delete(f"/api/alerts/{known}") as answer:
        assert answer.status == 200
    async with http.delete(f"/api/alerts/{known}") as answer:
        assert answer.status == 404
    async with http.post("/api/alerts", json={**rule, "condition": "avg_query_tme_ms > 1"}) as answer:
        assert answer.status == 422
        error = (await answer.json())["error"]
        assert "avg_query_time_ms" in error["message"]
        assert {"avg_query_time_ms", "error_rate"} <= set(error["names"])
    async with http.post("/api/alerts", json={**rule, "colour": "red"}) as answer:
        assert answer.status == 422


async def test_the_breaker_is_forced_with_a_reason_a_name_and_a_time(
    http: aiohttp.ClientSession, pair: WorkflowConnectionPool
) -> None:
    path = f"/api/pools/{pair.name}/breaker"
    order = {"action": "force_open", "reason": "upgrade to 18.1", "by": "Ann", "ttl": 60}
    async with http.post(path, json=order) as answer:
        assert answer.status == 200, await answer.text()
        assert (await answer.json())["state"] == "open"
    status = stands(pair)
    assert status["forced_reason"] == "upgrade to 18.1 (by Ann, from 127.0.0.1, on the dashboard)"
    viewer = await watch(http, "")  # its first state may be of a second ago
    await viewer.until(lambda state: state["pools"][pair.name]["lights"]["breaker"]["level"] == "critical")
    assert "upgrade to 18.1 (by Ann" in viewer.state["pools"][pair.name]["lights"]["breaker"]["text"]
    async with http.post(path, json={"action": "force_close", "reason": "done", "by": "Ann"}) as answer:
        assert (await answer.json())["state"] == "closed"
    *_, opened, closed = stands(pair)["state_transitions"]
    assert (opened["to"], closed["to"]) == ("open", "closed")
    assert "by Ann" in closed["reason"]
    assert abs(datetime.fromisoformat(closed["timestamp"]) - datetime.now(UTC)) < timedelta(seconds=30)
    for wrong, status_code in (
        ({**order, "action": "open"}, 422),
        ({**order, "by": ""}, 422),
        ({**order, "reason": "a\nb"}, 422),
        ({**order, "ttl": -1}, 422),
        ({**order, "who": "Ann"}, 422),
        ([order], 422),
        ({**order, "reason": "x" * 70_000}, 413),
    ):
        async with http.post(path, json=wrong) as answer:
            assert answer.status == status_code, wrong
    async with http.post(path, data=json.dumps(order), headers={"Content-Type": "text/plain"}) as answer:
        assert answer.status == 415  # what a form of another site can send
    async with http.post("/api/pools/nobody/breaker", json=order) as answer:
        assert answer.status == 404
    assert stands(pair)["state"] == "closed"


async def test_fifty_viewers_take_little_of_one_core(http: aiohttp.ClientSession) -> None:
    replica = await serve.get_app_handle(await application(http)).who.remote()
    process = psutil.Process(replica["process"])
    viewers = await asyncio.gather(*(watch(http, "") for _ in range(50)))

    async def seconds(count: int) -> float:
        before, began = process.cpu_times(), time.monotonic()
        await asyncio.gather(*(_take(viewer, count) for viewer in viewers))
        after = process.cpu_times()
        return (after.user + after.system - before.user - before.system) / (time.monotonic() - began)

    share = await seconds(6)
    print(f"50 viewers: {share:.1%} of a core; a frame is {max(viewers[0].sizes[1:])} characters at most")
    assert share < 0.15
    assert (
        len({json.dumps(viewer.state, sort_keys=True) for viewer in viewers if viewer.number == viewers[0].number}) == 1
    )


async def _take(viewer: Viewer, count: int) -> None:
    for _ in range(count):
        await viewer.take()


async def application(http: aiohttp.ClientSession) -> str:
    """Name of the Serve application whose address *http* knows."""
    port = http._base_url.port if http._base_url else None
    (app,) = [name for name in serve.status().applications if name.endswith(f"-{port}")]
    return app


async def test_secrets_are_nowhere(
    http: aiohttp.ClientSession, pool: WorkflowConnectionPool, pg18: EmbeddedServer
) -> None:
    secrets = [pg18.password, access_token.token()]
    assert all(len(secret) > 8 for secret in secrets)
    shown = [repr(serve.status())]
    for path in (
        "/",
        "/api/pools",
        "/api/metrics",
        "/api/alerts",
        f"/api/history?pool={pool.name}",
        "/metrics",
        "/healthz",
    ):
        async with http.get(path) as answer:
            shown += [await answer.text(), repr(answer.headers)]
    shown.append(json.dumps((await watch(http, "")).state))
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    shown.append(repr(await controller.get_serve_instance_details.remote()))
    for text in shown:
        for secret in secrets:
            assert secret not in text


async def test_others_need_the_token_and_the_dashboard_ends_with_its_pool(serving: None, pg18: EmbeddedServer) -> None:
    async with own_pool(pg18, max_connections=2, monitoring_host="0.0.0.0", monitoring_port=0) as pool:
        assert (await pool.process({"operation": "stop_monitoring"}))["status"] == "not_running"
        url = (await pool.process({"operation": "start_monitoring"}))["dashboard_url"]
        again = await pool.process({"operation": "start_monitoring"})
        assert again == {"status": "already_running", "dashboard_url": url}
        known = await pool.process({"operation": "get_comprehensive_status"})
        assert known["monitoring"] == {"dashboard_enabled": True, "dashboard_url": url}
        assert not urlsplit(url).netloc.startswith(("127.", "localhost"))
        token = access_token.token()
        jar = aiohttp.CookieJar(unsafe=True)  # also of addresses
        async with aiohttp.ClientSession(url, cookie_jar=jar) as http:
            for path in ("/", "/api/pools", "/static/plotly.min.js", "/metrics"):
                await get(http, path, 401)
            await get(http, "/?token=wrong", 401)
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await http.ws_connect("/ws")
            assert pool.name in await get(http, "/api/pools", headers={"Authorization": f"Bearer {token}"})
            async with http.get(f"/?token={token}") as answer:
                assert answer.status == 200
                cookie = answer.headers["Set-Cookie"]
                assert {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
                assert token not in cookie
                assert token not in await answer.text()
            assert pool.name in await get(http, "/api/pools")
            assert pool.name in (await watch(http, "")).state["pools"]
            evil = {"Origin": "http://evil.example"}
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await http.ws_connect("/ws", headers=evil)
    port = urlsplit(url).port
    await eventually(lambda: not any(app.endswith(f"-{port}") for app in serve.status().applications), timeout=30)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


async def test_it_goes_on_for_the_pools_that_want_it(
    serving: None, dashboard: str, pool: WorkflowConnectionPool
) -> None:
    port = urlsplit(dashboard).port
    other = WorkflowConnectionPool(name=unique_name("other"), monitoring_port=port)
    joined = await other.process({"operation": "start_monitoring"})
    assert joined == {"status": "already_running", "dashboard_url": dashboard}
    left = await other.process({"operation": "stop_monitoring"})
    assert left == {"status": "stopped", "dashboard_url": dashboard, "running_for": [pool.name]}
    assert (await other.process({"operation": "stop_monitoring"}))["status"] == "not_running"


async def test_a_busy_port_is_named_at_once_and_nothing_is_left(serving: None) -> None:
    before = set(serve.status().applications)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        handle = WorkflowConnectionPool(name=unique_name("busy"), monitoring_port=port)
        began = time.monotonic()
        with pytest.raises(UnavailableError, match=rf"127\.0\.0\.1:{port} .*in use.*monitoring_port"):
            await handle.process({"operation": "start_monitoring"})
        assert time.monotonic() - began < 3.0
    assert set(serve.status().applications) == before
    assert (await handle.process({"operation": "stop_monitoring"}))["status"] == "not_running"


async def test_a_killed_replica_comes_back_where_it_was(
    http: aiohttp.ClientSession, pool: WorkflowConnectionPool
) -> None:
    replica = serve.get_app_handle(await application(http))
    before = (await replica.who.remote())["process"]
    psutil.Process(before).kill()

    async def back() -> bool:
        try:
            async with http.get("/api/pools") as answer:
                return answer.status == 200 and pool.name in await answer.json()
        except aiohttp.ClientError:
            return False

    await eventually(lambda: not psutil.pid_exists(before))
    await eventually(back, timeout=60)
    assert pool.name in (await watch(http, "")).state["pools"]
    assert (await pool.process({"operation": "get_comprehensive_status"}))["monitoring"]["dashboard_enabled"]
