"""The router: how long a verdict takes, what it costs a read, and what HTTP costs."""

from __future__ import annotations

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

from raypg import QueryRouterNode
from raypg.address import free_port
from raypg.core.classifier import Classifier
from raypg.deployments.router import RouterArgs, build
from raypg.server import facts_reader

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from statements import corpus

ROWS = 10_000
CLIENTS = 1_000
QUERY = "SELECT id, balance FROM accounts WHERE id = $1"

app = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0})
@serve.ingress(app)
class Empty:
    """A route that does nothing."""

    @app.post("/query")
    async def query(self) -> dict[str, bool]:
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
    figures = await compare({name: functools.partial(rate, work, 10_000, CLIENTS) for name, work in works.items()})
    lines = [
        f"router.{word} ÷ pool.{word}: {ratio(figures, f'router.{word}', f'pool.{word}'):.2f} (at least 0.90)"
        for word in ("fetchrow", "process")
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

        figures = await compare({"POST /query": lambda: p50("/raypg"), "an empty FastAPI route": lambda: p50("/empty")})
    lines = [f"POST /query ÷ empty: {ratio(figures, 'POST /query', 'an empty FastAPI route'):.2f} (limit 1.5)"]
    report("SQL over HTTP, one request at a time", "ms", figures, lines)
    serve.shutdown()


if __name__ == "__main__":
    answer({"verdicts": verdicts, "reads": reads, "http": http})
