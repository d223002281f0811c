"""A shop that uses a pool as applications do: many small reads, loads of rows, transactions, a mistake now and then."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg

from raypg import QueryPipelineNode, RaypgError, WorkflowConnectionPool

__all__ = ["open_shop"]

TABLES = """
DROP SCHEMA IF EXISTS shop CASCADE;
CREATE SCHEMA shop;
CREATE TABLE shop.customer (id int PRIMARY KEY, name text NOT NULL, city text NOT NULL);
CREATE TABLE shop."order" (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer_id int NOT NULL,
    state text NOT NULL,
    amount int NOT NULL
);
CREATE TABLE shop.event (at timestamptz NOT NULL DEFAULT now(), kind text NOT NULL, amount int NOT NULL);
CREATE TABLE shop.stock (item int PRIMARY KEY, pieces int NOT NULL);
INSERT INTO shop.customer SELECT id, 'Customer ' || id, 'City ' || id % 50 FROM generate_series(1, 2000) AS id;
INSERT INTO shop."order" (customer_id, state, amount)
    SELECT 1 + id % 2000, CASE id % 3 WHEN 0 THEN 'open' ELSE 'paid' END, id % 500 FROM generate_series(1, 10000) AS id;
INSERT INTO shop.stock SELECT item, 1000000 FROM generate_series(1, 100) AS item;
CREATE INDEX ON shop."order" (customer_id);
ANALYZE shop.customer, shop."order", shop.stock;
"""

ORDERS = 'SELECT id, amount FROM shop."order" WHERE customer_id = $1 AND state = $2 ORDER BY id DESC LIMIT 20'
NAME = "SELECT name, city FROM shop.customer WHERE id = $1"
BY_CITY = """SELECT city, count(*), sum(amount) FROM shop."order" JOIN shop.customer ON customer.id = customer_id
WHERE state = $1 GROUP BY city ORDER BY sum(amount) DESC"""
EVENT = "INSERT INTO shop.event (kind, amount) VALUES ($1, $2)"


class _Shop:
    def __init__(self, pool: WorkflowConnectionPool) -> None:
        self._pool = pool

    async def look_up(self) -> None:
        await self._pool.fetch(ORDERS, random.randrange(1, 2000), random.choice(["open", "paid"]))
        await self._pool.fetchrow(NAME, random.randrange(1, 2000))
        await asyncio.sleep(random.uniform(0.005, 0.03))

    async def report(self) -> None:
        await self._pool.fetch(BY_CITY, "paid")
        await asyncio.sleep(random.uniform(0.1, 0.4))

    async def sell(self) -> None:
        async with self._pool.transaction() as tx:
            await tx.execute("UPDATE shop.stock SET pieces = pieces - 1 WHERE item = $1", random.randrange(1, 100))
            await asyncio.sleep(random.uniform(0.05, 0.4))
        await asyncio.sleep(random.uniform(0.0, 0.3))

    async def load_events(self) -> None:
        async with QueryPipelineNode(name="events", connection_pool=self._pool, batch_size=500) as pipeline:
            for number in range(random.randrange(200, 1000)):
                await pipeline.add_query(EVENT, [random.choice(["view", "click", "buy"]), number])
            await pipeline.flush()
        await asyncio.sleep(random.uniform(0.5, 1.5))

    async def make_a_mistake(self) -> None:
        await asyncio.sleep(random.uniform(1.0, 3.0))
        await self._pool.execute("INSERT INTO shop.customer VALUES ($1, 'Twice', 'Nowhere')", 1)


@contextlib.asynccontextmanager
async def open_shop(pool: WorkflowConnectionPool, visitors: int = 4, sellers: int = 2) -> AsyncIterator[None]:
    """Use *pool* like this while the block runs, also while its database is away."""
    shop, over = _Shop(pool), asyncio.Event()

    async def again_and_again(work: Callable[[], Awaitable[None]]) -> None:
        while not over.is_set():
            try:
                await work()
            except (RaypgError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                await asyncio.sleep(0.05)  # what becomes of it is what the page shows

    works = [*[shop.look_up] * visitors, *[shop.sell] * sellers, shop.report, shop.load_events, shop.make_a_mistake]
    tasks = [asyncio.create_task(again_and_again(work)) for work in works]
    try:
        yield
    finally:
        over.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
