"""A worker's line to the Breaker: it reports what it has seen, and follows what it is told."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import asdict
from typing import Any

import ray

from raypg import _compat, cluster
from raypg.core.breaker import BreakerConfig
from raypg.core.quorum import Order
from raypg.server.guard import Guard

logger = logging.getLogger(__name__)

REPORT_EVERY = 1.0
"""Seconds between two reports if nothing happens. The Breaker takes four times as long for a sign of death."""

ANSWER_WITHIN = 2.0
"""Seconds in which the Breaker must answer."""

AGAIN_AFTER = 0.5
"""Seconds until the Breaker is looked for again."""


class BreakerLine:
    """Keeps one worker's guard and the Breaker in step, whoever of them is restarted.

    Args:
        pool: name of the pool.
        worker: number of this worker in it.
        incarnation: its life.
        guard: the breaker of this worker.
    """

    def __init__(self, pool: str, worker: int, incarnation: str, guard: Guard) -> None:
        self._pool = pool
        self._worker = worker
        self._incarnation = incarnation
        self._guard = guard
        self._task: asyncio.Task[None] | None = None
        self._workers = 1

    def keep(self, workers: int) -> None:
        """The pool has so many workers. Called often; the first time opens the line."""
        self._workers = workers
        self._guard.alone = workers == 1
        if self._task is None and not _compat.is_driver():  # a worker in a driver is one without Ray around it
            self._task = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        """No more reports."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            try:
                await self._talk(cluster.find_or_start_breaker())
            except (*_compat.ActorGone, TimeoutError):
                pass  # it is being restarted: this worker decides alone meanwhile
            except Exception:
                logger.exception("pool %s: internal error between a worker and the breaker", self._pool)
            await asyncio.sleep(AGAIN_AFTER)

    async def _talk(self, breaker: Any) -> None:
        guard, where = self._guard, (self._pool, self._worker, self._incarnation)
        me = [ray.get_runtime_context().current_actor]
        joined: tuple[BreakerConfig, int] | None = None
        while True:
            wanted = (guard.machine.config, self._workers)
            if joined != wanted:
                answer = await asyncio.wait_for(
                    breaker.join.remote(*where, me, asdict(wanted[0]), wanted[1]), ANSWER_WITHIN
                )
                if joined is None:
                    guard.forget_order()
                joined = wanted
                guard.follow(Order(*answer), time.monotonic())
            report = guard.report()
            answer = await asyncio.wait_for(breaker.report.remote(*where, tuple(report)), ANSWER_WITHIN)
            if answer is None:
                joined = None
                continue
            guard.told()
            guard.follow(Order(*answer), time.monotonic())
            try:
                await asyncio.wait_for(guard.news.wait(), REPORT_EVERY)
            except TimeoutError:
                pass
