"""Load on a pool, and a look at what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator

import asyncpg

from raypg import OutcomeUnknownError, WorkflowConnectionPool


class Load:
    """Callers that read and write, each one thing after the other.

    Attributes:
        reads: answered so far.
        writes: numbers written and acknowledged.
        unknown: numbers of which nobody knows.
        failures: everything else that was raised.
    """

    def __init__(self, pool: WorkflowConnectionPool, table: str | None) -> None:
        self._pool = pool
        self._table = table
        self._over = False
        self._number = 0
        self.reads = 0
        self.writes: list[int] = []
        self.unknown: list[int] = []
        self.failures: list[BaseException] = []

    async def read(self) -> None:
        while not self._over:
            number = random.randrange(1000)
            try:
                assert await self._pool.fetchval("select $1::int from pg_sleep(0.001)", number) == number
                self.reads += 1
            except Exception as error:
                self.failures.append(error)

    async def write(self) -> None:
        assert self._table is not None
        while not self._over:
            self._number += 1
            number = self._number
            try:
                await self._pool.execute(f"insert into {self._table} values ($1)", number)
                self.writes.append(number)
            except OutcomeUnknownError:
                self.unknown.append(number)
            except Exception as error:
                self.failures.append(error)

    def stop(self) -> None:
        self._over = True

    async def check(self, direct: asyncpg.Connection) -> None:
        """Every acknowledged write is there once, every unknown one at most once, and nothing else."""
        assert self._table is not None
        stored = Counter(row[0] for row in await direct.fetch(f"select id from {self._table}"))
        assert all(count == 1 for count in stored.values())
        assert set(self.writes) <= stored.keys() <= {*self.writes, *self.unknown}


@contextlib.asynccontextmanager
async def load(
    pool: WorkflowConnectionPool, readers: int = 20, writers: int = 0, table: str | None = None
) -> AsyncIterator[Load]:
    """Run readers and writers while the block runs."""
    running = Load(pool, table)
    tasks = [asyncio.create_task(running.read()) for _ in range(readers)]
    tasks += [asyncio.create_task(running.write()) for _ in range(writers)]
    try:
        yield running
    finally:
        running.stop()
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
