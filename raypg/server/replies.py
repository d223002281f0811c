"""Answers to callers: together while they come quickly, apart as soon as one of them is slow.

Many callers share a message to a worker. If the answer waited for the slowest statement of the message, a point read
that travels beside a report would take as long as the report. So ``run`` answers when all is done *or* when it stalls,
and what finishes later is fetched by ``collect``.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeAlias

from raypg.messages import Note, Part
from raypg.portable import PortableError

if TYPE_CHECKING:
    from raypg.server.work import Statement

STALL = 0.010
"""Seconds without any progress after which a batch is answered as far as it got."""

PATIENCE = 0.100
"""Seconds after which a batch is answered as far as it got, even while it makes progress or has not had its turn."""

MOST_EARLY = 1000
"""Callers remembered per client who left batches that are not here."""

HOLD = 1.0
"""Seconds that ``collect`` waits for something to tell; its answer, even if empty, shows that the worker lives."""


_Column: TypeAlias = "tuple[tuple[str, ...] | None, Note | None, list[int], list[object], dict[int, PortableError]]"
"""(names, note, positions, payloads, errors) of outcomes that have names and note in common."""


class BatchState:
    """What is known of one batch: how many of its statements are open, and the outcomes not yet told."""

    __slots__ = ("_untold", "_waiter", "begun", "client", "deferred", "number", "open", "statements")

    def __init__(self, client: Client, number: int, size: int) -> None:
        self.client = client
        self.number = number
        self.open = size
        self.begun = False
        self.deferred = False
        self.statements: dict[int, Statement] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._untold: dict[object, _Column] = {}

    def finish(
        self,
        position: int,
        payload: object,
        names: tuple[str, ...] | None,
        error: PortableError | None = None,
        note: Note | None = None,
    ) -> None:
        """Note the outcome of the statement at *position*; each position is finished once."""
        key = names if note is None else (note, names)
        column = self._untold.get(key)
        if column is None:
            column = self._untold[key] = (names, note, [], [], {})
        _, _, positions, payloads, errors = column
        if error is not None:
            errors[len(positions)] = error
        self.statements.pop(position, None)
        positions.append(position)
        payloads.append(payload)
        self.open -= 1
        if self.open == 0:
            self._wake()
        self.client.changed.set()

    async def done_or_stalled(self) -> None:
        """Returns when all is done, or there is reason to answer before: see ``STALL`` and ``PATIENCE``."""
        if not self.open:
            return
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(STALL, self._look, self.open, loop.time())
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _look(self, before: int, started: float) -> None:
        if self._waiter is None:
            return
        loop = asyncio.get_running_loop()
        if (self.begun and self.open == before) or loop.time() - started > PATIENCE:
            self._wake()
        else:
            loop.call_later(STALL, self._look, self.open, started)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def done(self) -> int:
        """Outcomes that wait to be told."""
        return sum(len(column[2]) for column in self._untold.values())

    def take(self) -> list[Part]:
        """The outcomes not told yet; afterwards they count as told."""
        parts: list[Part] = [
            (self.number, positions, names, payloads, errors or None, note)
            for names, note, positions, payloads, errors in self._untold.values()
        ]
        self._untold = {}
        return parts


class Client:
    """One line from one event loop of one process, as its worker sees it; *of* is the same for all lines from there."""

    __slots__ = ("batches", "changed", "early", "identity", "job", "of", "seen")

    def __init__(self, identity: str, job: str) -> None:
        self.identity = identity
        self.of = identity.partition("/")[0]
        self.job = job
        self.batches: dict[int, BatchState] = {}
        self.early: dict[tuple[int, int], bool] = {}
        self.changed = asyncio.Event()
        self.seen = asyncio.get_running_loop().time()

    def left_early(self, number: int, position: int) -> None:
        """Remember a caller who left a batch that is not here: it has been answered, or it is still to come, as Ray
        delivers a message above 100 kB after the small ones that were sent later."""
        self.early[number, position] = True
        while len(self.early) > MOST_EARLY:
            del self.early[next(iter(self.early))]

    async def first_reply(self, batch: BatchState) -> tuple[int, list[Part]]:
        """Answer to ``run``: complete, or as far as *batch* got when it stalled."""
        await batch.done_or_stalled()
        parts = batch.take()
        if batch.open == 0:
            self.batches.pop(batch.number, None)
        else:
            batch.deferred = True
        return len(self._deferred()), parts

    def _deferred(self) -> list[BatchState]:
        """The batches whose ``run`` was answered before their end: ``collect`` tells the rest."""
        return [batch for batch in self.batches.values() if batch.deferred]

    async def next_reply(self) -> tuple[int, list[Part]]:
        """Answer to ``collect``: what finished since, of all batches; waits up to ``HOLD`` seconds for something."""
        loop = asyncio.get_running_loop()
        self.seen = until = loop.time()
        until += HOLD
        while not any(batch.done for batch in self._deferred()):
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), until - loop.time())
            except TimeoutError:
                break
            if any(batch.open for batch in self._deferred()):
                await asyncio.sleep(STALL / 2)  # others that finish now travel along
        parts: list[Part] = []
        for batch in self._deferred():
            parts += batch.take()
            if batch.open == 0:
                del self.batches[batch.number]
        self.seen = loop.time()
        return len(self._deferred()), parts
