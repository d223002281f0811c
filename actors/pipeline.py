"""Pipeline: the actor that hands out credits, so that many jobs share a database without drowning it. One serves all
pools.

Its message:

- ``take``: a process wants to have so many bytes of statements under way; the answer is how many it may have, for about
  a second.

Statements and results do not pass through it, and who gets no answer goes on without. Its decisions are made in
:mod:`raypg.core.credits`. It keeps nothing: a new one learns all from what it is asked.
"""

from __future__ import annotations

import asyncio
import time

import ray

from raypg.core.credits import Ledger

LINGER = 30.0
"""Seconds without a question after which this actor ends; the next load starts another."""


class PipelineActor:
    """The credits of all pools of this cluster."""

    def __init__(self) -> None:
        self._ledgers: dict[str, Ledger] = {}
        self._asked = 0.0
        self._resting = False

    def __repr__(self) -> str:
        return "Pipeline"

    async def take(self, pool: str, capacity: int, client: str, job: str, wanted: int) -> int:
        """Credit for *client* of *job*; 0 wanted says that it is done.

        Args:
            capacity: bytes that the pool's database may be given at a time, as the asker knows its size.
        """
        now = self._asked = time.monotonic()
        if not self._resting:
            self._resting = True
            ray.get_runtime_context().current_actor.rest.remote()
        ledger = self._ledgers.setdefault(pool, Ledger(capacity))
        ledger.capacity = capacity
        if not wanted:
            ledger.leave(client)
            return 0
        return ledger.take(client, job, wanted, now)

    async def rest(self) -> None:
        """End when nobody has asked for a while. A call of its own: an actor can only end in one."""
        while (idle := time.monotonic() - self._asked) < LINGER:
            await asyncio.sleep(LINGER - idle)
            for pool, ledger in tuple(self._ledgers.items()):
                ledger.expire(time.monotonic())
                if not len(ledger):
                    del self._ledgers[pool]
        ray.actor.exit_actor()
