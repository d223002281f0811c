"""A worker's line to the Breaker: it reports what it has seen, and follows what it is told."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict

import ray

from raypg import cluster
from raypg.actors.line import ANSWER_WITHIN, Line
from raypg.core.breaker import BreakerConfig
from raypg.core.quorum import Order
from raypg.server.guard import Guard

REPORT_EVERY = 1.0
"""Seconds between two reports if nothing happens. The Breaker takes four times as long for a sign of death."""


class BreakerLine(Line):
    """Keeps one worker's guard and the Breaker in step, whoever of them is restarted.

    Args:
        pool, worker, incarnation: as for every line.
        guard: the breaker of this worker.
    """

    def __init__(self, pool: str, worker: int, incarnation: str, guard: Guard) -> None:
        super().__init__(pool, worker, incarnation)
        self._guard = guard
        self._workers = 1

    def keep(self, workers: int) -> None:
        """The pool has so many workers. Called often; the first time opens the line."""
        self._workers = workers
        self._guard.alone = workers == 1
        self.open()

    async def talk(self) -> None:
        breaker = cluster.find_or_start_breaker()
        guard, where = self._guard, self.where
        me = [ray.get_runtime_context().current_actor]
        joined: tuple[BreakerConfig, int] | None = None
        while True:
            wanted = (guard.machine.config, self._workers)
            if joined != wanted:
                if joined is None:
                    guard.forget_order()  # before it is asked: what it orders meanwhile is newer than its answer
                answer = await asyncio.wait_for(
                    breaker.join.remote(*where, me, asdict(wanted[0]), wanted[1]), ANSWER_WITHIN
                )
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
