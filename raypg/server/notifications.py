"""What a leased connection hears by LISTEN, kept until its holder fetches it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import asyncpg

from raypg.server import _asyncpg

HOLD = 1.0
"""Seconds that ``next`` waits for something to tell; its answer, even if empty, shows that the worker lives."""

MOST_BYTES = 32 * 1024 * 1024
"""What may wait for one holder, estimated. A burst of 150,000 short ones fits."""

MOST_TOLD = 2_000
MOST_BYTES_TOLD = 1024 * 1024
"""Limits of one answer."""

_OVERHEAD = 200
"""Bytes that a notification takes beside its text."""

Notification = tuple[str, int, str]
"""(channel, process id of the backend that sent it, payload)."""


class Notifications:
    """The channels that the holder of one lease listens to, and what came over them and is not fetched yet.

    Args:
        raw: the leased connection.
        on_overflow: called once, with the reason, when more waits than may. None is ever dropped in silence.
    """

    def __init__(self, raw: asyncpg.Connection, on_overflow: Callable[[str], object]) -> None:
        self._raw = raw
        self._on_overflow = on_overflow
        self._heard: deque[Notification] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()
        self._closed = False

    def hear(self, channel: str) -> bool:
        """Keep what comes over *channel* from now on; False if that is so already. Sends nothing: LISTEN does."""
        return _asyncpg.hear(self._raw, channel, self._note)

    def ignore(self, channel: str) -> None:
        """Keep nothing of *channel* any more."""
        _asyncpg.ignore(self._raw, channel)

    def _note(self, _connection: object, pid: int, channel: str, payload: str) -> None:
        if self._closed:
            return
        self._heard.append((channel, pid, payload))
        self._bytes += _size((channel, pid, payload))
        self._changed.set()
        if self._bytes > MOST_BYTES:
            self._on_overflow(
                f"{len(self._heard):,} notifications ({self._bytes >> 20} MB) waited for its holder to take them"
            )

    async def next(self) -> list[Notification]:
        """What was heard since the last answer, in order; waits up to ``HOLD`` seconds for something."""
        if not self._heard and not self._closed:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), HOLD)
            except TimeoutError:
                return []
        told: list[Notification] = []
        size = 0
        while self._heard and len(told) < MOST_TOLD and size < MOST_BYTES_TOLD:
            told.append(self._heard.popleft())
            size += _size(told[-1])
        self._bytes -= size
        return told

    def close(self) -> None:
        """The lease has ended: nothing is kept, and who waits is woken."""
        self._closed = True
        self._heard.clear()
        _asyncpg.ignore_all(self._raw)
        self._changed.set()


def _size(notification: Notification) -> int:
    channel, _, payload = notification
    return len(channel) + len(payload) + _OVERHEAD
