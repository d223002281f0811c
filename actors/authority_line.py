"""A worker's line to the version authority of its pool: it tells what the worker is writing to, and hears whether what
it knows of the catalogue still holds."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from typing import Any

from raypg import cluster
from raypg.actors.line import ANSWER_WITHIN, Line
from raypg.calling import send
from raypg.server.engine import Engine
from raypg.server.outside import Outside

AGAIN_AFTER = 0.1
"""Seconds until an authority is attended again that does not know us yet."""


class AuthorityLine(Line):
    """Keeps one worker and the authority in step while anybody in the cluster keeps results.

    Args:
        pool, worker, incarnation: as for every line.
        engine: of the worker.
        prefix: what the ``application_name`` of every connection of the pool begins with.
    """

    def __init__(self, pool: str, worker: int, incarnation: str, engine: Engine, prefix: str) -> None:
        super().__init__(pool, worker, incarnation)
        self._writes = writes = engine.writes
        self._pool: Any = None
        self._needed = asyncio.Event()
        writes.intents.life = life_of(worker, incarnation)
        writes.ask = self._ask
        self._outside = Outside(engine, prefix, self._tell)

    def keep(self, era: int, newest: bool) -> None:
        """The Pool actor has said in which era the authority must be asked; *newest*: it has said nothing later."""
        self._writes.intents.word = time.monotonic()
        if not newest:
            return
        self._writes.use(era)
        if era:
            self._needed.set()
            self.open()
        else:
            self._needed.clear()
            self._outside.keep(False)

    async def talk(self) -> None:
        self._pool = pool = cluster.find(self.pool)
        writes, intents, holding = self._writes, self._writes.intents, self._writes.reach.holding
        who = self._begin_anew()
        while True:
            await self._needed.wait()
            sent = time.monotonic()
            report = intents.report(sent)
            answer = await asyncio.wait_for(
                pool.attend.remote(who, holding.done, list(holding.wanted), tuple(report)), ANSWER_WITHIN
            )
            now = time.monotonic()
            if answer is None or holding.is_lost(now):
                who = self._begin_anew()
                if answer is None:
                    await asyncio.sleep(AGAIN_AFTER)
                continue
            renews, events, intents.echo, listens = answer
            intents.word = now
            for _ in holding.heard(sent, renews, events):
                writes.widen()  # only the catalogue is shared; whether it still is, is asked for each statement
            writes.reach.heard()
            self._outside.keep(listens)

    def _begin_anew(self) -> str:
        """As somebody new, under this name: what was shared is shared no longer, so what runs may write to more than
        was announced; and of the authority, which may be another one with another clock, nothing was heard yet."""
        self._writes.reach.holding.begin_anew()
        self._writes.widen()
        self._writes.intents.echo = None
        return f"worker:{secrets.token_hex(8)}"

    def close(self) -> None:
        super().close()
        self._outside.keep(False)

    async def _tell(self, tables: list[str] | None) -> None:
        await asyncio.wait_for(send(self._pool.changed, tables), ANSWER_WITHIN)

    async def _ask(self, numbered: Mapping[int, str]) -> bool:
        pool = self._pool
        if pool is None:
            pool = cluster.find(self.pool)
        return bool(await send(pool.intend, self._writes.intents.life, dict(numbered)))


def life_of(worker: int, incarnation: str) -> str:
    """The name of a worker's life among those that the authority knows."""
    return f"{worker}:{incarnation}"
