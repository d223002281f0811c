"""A worker's line to an actor that serves all pools: found or started, and again whenever it has died."""

from __future__ import annotations

import asyncio
import logging

from raypg import _compat

logger = logging.getLogger(__name__)

AGAIN_AFTER = 0.5
"""Seconds until the actor is looked for again."""

ANSWER_WITHIN = 2.0
"""Seconds in which it must answer."""


class Line:
    """Keeps up a conversation, whoever of the two is restarted.

    Args:
        pool: name of the pool.
        worker: number of this worker in it.
        incarnation: its life.
    """

    def __init__(self, pool: str, worker: int, incarnation: str) -> None:
        self.pool = pool
        self.where = (pool, worker, incarnation)
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def open(self) -> None:
        """Begin to talk. Called often; the first time counts."""
        if self._closed or self._task is not None:
            return
        if not _compat.is_driver():  # a worker in a driver is one without Ray around it
            self._task = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        """Talk no more, whoever opens it."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()

    async def talk(self) -> None:
        """Find the other side, and talk to it until it dies."""
        raise NotImplementedError

    async def _run(self) -> None:
        while True:
            try:
                await self.talk()
            except (*_compat.ActorGone, TimeoutError):
                pass  # it is being restarted: this worker goes on alone meanwhile
            except Exception:
                logger.exception("pool %s: internal error in %s", self.pool, type(self).__name__)
            await asyncio.sleep(AGAIN_AFTER)
