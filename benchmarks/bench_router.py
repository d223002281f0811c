"""The router: how long a verdict takes, what it costs a read, and what HTTP costs."""

# FastAPI looks at the annotations of the routes in the replica, where it would not find what texts name: so there is no
# `from __future__ import annotations` here.
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from measure import Setting, answer, compare, rate, ratio, report
from ray import serve
from starlette.requests import Request

from raypg import QueryRouterNode
from raypg.address import free_port
from raypg.core.classifier import Classifier
from raypg.deployments.query_door import QueryRequest
from raypg.deployments.router import RouterArgs, build
from raypg.server import facts_reader

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from statements import corpus

ROWS = 10_000
CLIENTS = 1_000
READS = 5_000
QUERY = "SELECT id, balance FROM accounts WHERE id = $1"

EMPTY = "an empty FastAPI route of the same request"
UNREAD = "an empty FastAPI route that does not read its body"

app = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0})
@serve.ingress(app)
class Empty:
    """Two routes that do nothing."""

    @app.post("/query")
    async def query(self, request: Request) -> dict[str, bool]:
        QueryRequest.model_validate_json(await request.body())
        return {"success": True}

    @app.post("/unread/query")
    async def unread(self) -> dict[str, bool]:
        return {"success": True}


async def verdicts(here: Setting) -> None:
    """Over the labelled statements of the tests, with the facts of this database."""
    classifier = Classifier(await facts_reader.load(here.pool.fetch))
    texts = [statement.sql for statement in corpus()]

    async def each(call: Callable[[str], object]) -> float:
        started = time.perf_counter()
        for text in texts:
            call(text)
        return (time.perf_counter() - started) / len(texts) * 1e6

    figures = await compare(
        {"cached": lambda: each(classifier.classify), "cold": lambda: each(classifier._judge)}, rounds=20
    )
    cached, cold = (statistics.median(figures[name]) for name in ("cached", "cold"))
    lines = [f"cached {cached:.2f} µs (limit 2), cold {cold:.0f} µs (limit 150), over {len(texts)} statements"]
    report("A verdict on a statement", "µs", figures, lines)


async def reads(here: Setting) -> None:
    """Point reads of many coroutines, as in bench_reads.py."""
    pool = here.pool
    await pool.execute("CREATE TABLE accounts (id int PRIMARY KEY, balance int)")
    await pool.execute("INSERT INTO accounts SELECT g, g FROM generate_series(1, $1::int) g", ROWS)
    router = QueryRouterNode("bench", pool)

    async def by_router(number: int) -> None:
        await router.fetchrow(QUERY, number % ROWS + 1)

    async def by_pool(number: int) -> None:
        await pool.fetchrow(QUERY, number % ROWS + 1)

    async def by_routers_process(number: int) -> None:
        await router.process({"query": QUERY, "params": [number % ROWS + 1]})

    async def by_pools_process(number: int) -> None:
        await pool.process({"operation": "execute", "query": QUERY, "params": [number % ROWS + 1]})

    works = {
        "router.fetchrow": by_router,
        "pool.fetchrow": by_pool,
        "router.process": by_routers_process,
        "pool.process": by_pools_process,
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}

    async def one(name: str) -> float:
        before = time.process_time()
        found = await rate(works[name], READS, CLIENTS)
        seconds[name].append((time.process_time() - before) / READS * 1e6)
        return found

    figures = await compare({name: functools.partial(one, name) for name in works}, rounds=15)
    pairs = [(f"router.{word}", f"pool.{word}") for word in ("fetchrow", "process")]
    lines = [f"{ours} ÷ {theirs}: {ratio(figures, ours, theirs):.2f} (at least 0.90)" for ours, theirs in pairs]
    lines += [
        f"processor time of the caller: {ours} {statistics.median(seconds[ours]):.1f} µs for one read, {theirs} "
        f"{statistics.median(seconds[theirs]):.1f} µs"
        for ours, theirs in pairs
    ]
    report("Point reads through the router, without replicas", "reads/s", figures, lines)


async def http(here: Setting) -> None:
    """One request at a time, p50, over one connection of a client on the same machine."""
    port = free_port("127.0.0.1", 0, "try again")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    empty: Any = Empty
    serve.run(empty.bind(), name="empty", route_prefix="/empty")
    serve.run(build(RouterArgs(pool=here.pool.name)), name="raypg", route_prefix="/raypg")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:

        async def p50(route: str) -> float:
            body = {"query": QUERY, "params": [7]}
            times = []
            for _ in range(100):
                started = time.perf_counter()
                reply = await client.post(f"{route}/query", json=body)
                times.append((time.perf_counter() - started) * 1000)
                assert reply.json()["success"], reply.text
            return statistics.median(times)

        routes = {"POST /query": "/raypg", EMPTY: "/empty", UNREAD: "/empty/unread"}
        figures = await compare({name: functools.partial(p50, route) for name, route in routes.items()})
    lines = [f"POST /query ÷ {name}: {ratio(figures, 'POST /query', name):.2f} (limit 1.5)" for name in (EMPTY, UNREAD)]
    lines.append(
        f"the one empty route ÷ the other: {ratio(figures, EMPTY, UNREAD):.2f}. Serve's replica fetches a body from "
        "the proxy by a message of its own, before which no statement is known"
    )
    report("SQL over HTTP, one request at a time", "ms", figures, lines)
    serve.shutdown()


if __name__ == "__main__":
    answer({"verdicts": verdicts, "reads": reads, "http": http})
