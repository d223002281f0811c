"""A worker's line to the Metrics actor: once a second it tells what has happened since it told last.

What it told is kept until it is known to outlive the Metrics actor, and told again to its next life. While there is no
Metrics actor nothing is taken from the figures: they go on adding up, in fixed memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque

import ray

from raypg import cluster
from raypg.actors.line import ANSWER_WITHIN, Line
from raypg.core.pool_metrics import Delta
from raypg.server.engine import Engine

EVERY = 1.0
"""Seconds between two reports."""

LEFT_WITHIN = 1.0
"""Seconds that a worker which ends waits for its last figures to arrive."""

MOST_KEPT = 500
"""Deltas that are kept at most: one for each second, and one for each time that somebody looks."""


class MetricsLine(Line):
    """Tells the figures of one worker.

    Args:
        pool, worker, incarnation: as for every line.
        engine: what is told of.
    """

    def __init__(self, pool: str, worker: int, incarnation: str, engine: Engine) -> None:
        super().__init__(pool, worker, incarnation)
        self._engine = engine
        self._known: int | None = None  # the last delta that the Metrics actor is known to have; None: it knows nobody
        self._kept: deque[Delta] = deque(maxlen=MOST_KEPT)

    def deltas(self, known: int) -> list[Delta]:
        """All that happened since delta *known*, until now."""
        self._kept.append(self._engine.figures.take(self._engine))
        now = time.monotonic()
        return [{**delta, "age": now - delta["age"]} for delta in self._kept if delta["seq"] > known]

    async def leave(self) -> None:
        """The worker ends: tell the last."""
        self.close()
        metrics = None if self._known is None else cluster.find_metrics()
        if metrics is not None:
            with contextlib.suppress(Exception):  # nobody misses a worker of whom it has not heard
                await asyncio.wait_for(metrics.leave.remote(*self.where, self.deltas(self._known or 0)), LEFT_WITHIN)

    async def talk(self) -> None:
        metrics = cluster.find_or_start_metrics()
        me = [ray.get_runtime_context().current_actor]
        minutes: float | None = None
        known = 0
        while True:
            wanted = self._engine.config.metrics_retention_minutes
            if minutes != wanted:
                known = await asyncio.wait_for(metrics.join.remote(*self.where, me, wanted), ANSWER_WITHIN)
                self._known = known
                minutes = wanted
            answer = await asyncio.wait_for(metrics.report.remote(*self.where, self.deltas(known)), ANSWER_WITHIN)
            if answer is None:
                minutes = None
                continue
            known, durable = answer
            self._known = known
            while self._kept and self._kept[0]["seq"] <= durable:
                self._kept.popleft()
            await asyncio.sleep(EVERY)
