"""The order of a pipeline's messages: two are under way, so that the worker never waits for the next, and Ray may
deliver a large one after a small one that was sent later."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict

from raypg.errors import StatementNotRunError

ARRIVES_WITHIN = 30.0
"""Seconds in which a message must arrive after a later one of its pipeline has."""

REMEMBER = 60.0
"""Seconds for which a pipeline without messages is remembered."""


class _Stream:
    __slots__ = ("finished", "here", "seen", "waiting")

    def __init__(self) -> None:
        self.finished = 0
        self.here: set[int] = set()
        self.seen = 0.0
        self.waiting: dict[int, asyncio.Future[None]] = {}


class Streams:
    """The pipelines that one worker hears of, and how far each has come."""

    def __init__(self) -> None:
        self._streams: OrderedDict[str, _Stream] = OrderedDict()

    def __len__(self) -> int:
        return len(self._streams)

    async def turn(self, name: str, number: int, follows: bool) -> None:
        """Wait until message *number* of stream *name* may run.

        Args:
            follows: message ``number - 1`` was under way to this worker when this one was sent.

        Raises:
            StatementNotRunError: that message does not arrive.
        """
        now = time.monotonic()
        stream = self._streams.pop(name, None) or _Stream()
        self._streams[name] = stream
        stream.seen = now
        stream.here.add(number)
        for oldest, known in tuple(self._streams.items()):
            if now - known.seen < REMEMBER or known.here:
                break
            del self._streams[oldest]
        if not follows or stream.finished >= number - 1:
            return
        due = asyncio.get_running_loop().create_future()
        stream.waiting[number] = due
        try:
            while not due.done():
                done, _ = await asyncio.wait((due,), timeout=ARRIVES_WITHIN)
                if not done and number - 1 not in stream.here:
                    raise StatementNotRunError(
                        f"not run: the part of the pipeline before it did not arrive within {ARRIVES_WITHIN:g} s"
                    )
        finally:
            stream.waiting.pop(number, None)

    def finished(self, name: str, number: int) -> None:
        """Message *number* is done, whatever came of it: the next may run."""
        stream = self._streams.get(name)
        if stream is None:
            return
        stream.seen = time.monotonic()
        stream.here.discard(number)
        stream.finished = max(stream.finished, number)
        due = stream.waiting.get(number + 1)
        if due is not None and not due.done():
            due.set_result(None)
