"""SQL over HTTP: starts a pool and the router on Ray Serve, and asks it as a program outside of Ray would.

    pip install httpx
    ray job submit -- python examples/query_over_http.py [PORT]

Where the database is, PGHOST, PGPORT, PGDATABASE and PGUSER say, as in load_from_ray_job.py. In production the pool is
started by `raypg up`, and the router by `serve deploy serve.yaml`; the second half of this file needs neither Ray nor
raypg.
"""

from __future__ import annotations

import asyncio
import sys

import httpx
from ray import serve

from raypg import WorkflowConnectionPool
from raypg.deployments.router import RouterArgs, build

POOL = "http_example"
PORT = int(sys.argv[1]) if len(sys.argv) > 1 else 8000


def ask(query: str, *params: object) -> None:
    """Run one statement, and print what came of it."""
    # On another address than loopback: headers={"Authorization": "Bearer …"}
    answer = httpx.post(f"http://127.0.0.1:{PORT}/raypg/query", json={"query": query, "params": params}, timeout=30)
    found = answer.json()
    if found["success"]:
        print(answer.status_code, found["data"], "by the", found["routing_metadata"]["target"])
    else:
        print(answer.status_code, found["error"])


def main() -> None:
    """Start the router, ask it three things, and end it."""
    pool = WorkflowConnectionPool(name=POOL, max_connections=2)
    asyncio.run(pool.process({"operation": "initialize"}))
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(build(RouterArgs(pool=POOL)), name=POOL, route_prefix="/raypg")
    try:
        ask("SELECT lower($1) AS word, $2::text::numeric AS price", "HELLO", "12.50")  # exact numbers are strings
        ask("SELECT 1 / 0")
        ask("DROP TABLE people")
    finally:
        serve.delete(POOL)
        asyncio.run(pool.close())


if __name__ == "__main__":
    main()
