"""The version authority of one pool, inside its Pool actor: see :mod:`raypg.core.coherence`, which decides.

Whether workers must ask is put down outside of the actor, so that its next life knows that leases of this one may hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raypg import _compat
from raypg.core.coherence import Authority, Report
from raypg.core.holding import Event

HOLD = 0.5
"""Seconds for which a cache's attendance waits for news."""

HOLD_WORKER = 0.25
"""The same of a worker, which tells with the next one which of its writes are over."""

Answer = tuple[bool, list[Event], float, bool]
"""(whether the lease goes on, what to do, the authority's time, whether it is to listen for writes of others)."""


class VersionAuthority:
    """Receives and sends for one :class:`Authority`.

    Args:
        key: under which it is put down that workers must ask.
        life: number of this life of the Pool actor.
        news: called when workers are to hear of another era.
    """

    def __init__(self, key: str, life: int, news: Callable[[], None]) -> None:
        self._key = key
        restarted = _compat.was_restarted()
        active = restarted and _compat.kv_get(key) is not None
        self.core = Authority(time.monotonic(), (life << 32) + 1, active)
        self.core.complete = not restarted
        self._told = self.core.era
        self._news = news
        self._moved = asyncio.Event()

    @property
    def era(self) -> int:
        """What workers are to know: in which era they must ask, or 0."""
        return self.core.era

    def look(self, complete: bool) -> None:
        """Called once a second. *complete*: no worker of before is still to be heard."""
        self.core.complete = complete
        self.core.expire(time.monotonic())
        self._changed()

    def expect(self, life: str, at: float) -> None:
        """See :meth:`Authority.expect`."""
        self.core.expect(life, at)

    def gone(self, life: str) -> None:
        """See :meth:`Authority.gone`."""
        self.core.gone(life, time.monotonic())
        self._changed()

    async def attend(self, who: str, done: int, wants: Sequence[str], report: tuple[Any, ...] | None) -> Answer | None:
        """A holder is there; answers when there is something to tell it, or after a while."""
        received = time.monotonic()
        known = self.core.attend(who, received, done, wants, None if report is None else Report(*report))
        self._changed()
        until = received + (HOLD if report is None else HOLD_WORKER)
        while known and not self.core.due(who) and (left := until - time.monotonic()) > 0:
            await self._wait(left)
        now = time.monotonic()
        answer = self.core.answer(who, received, now) if known else None
        listens = report is not None and report[0] == self.core.listener
        return None if answer is None else (*answer, now, listens)

    def want(self, who: str, tables: Sequence[str] | None) -> None:
        """A holder would share *tables* too; ``None``: it leaves."""
        if tables is None:
            self.core.leave(who)
        else:
            self.core.want(who, tables)
        self._changed()

    def changed(self, tables: Sequence[str] | None) -> None:
        """See :meth:`Authority.changed`."""
        self.core.changed(tables)
        self._changed()

    async def intend(self, life: str, intents: Mapping[int, str]) -> bool:
        """A worker is to write; answers when it may. False: it must attend first."""
        waits = self.core.intend(life, intents, time.monotonic())
        if waits is None:
            return False
        self._changed()
        while not self.core.may_write(waits, now := time.monotonic()):
            await self._wait(self.core.until(waits, now) - now)
        return True

    def close(self) -> None:
        """The pool ends."""
        _compat.kv_delete(self._key)

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._moved.wait(), max(0.001, seconds))

    def _changed(self) -> None:
        if self._told != self.core.era:
            self._told = self.core.era
            if self._told:
                _compat.kv_put(self._key, b"1")
            else:
                _compat.kv_delete(self._key)
            self._news()
        self._moved.set()
        self._moved = asyncio.Event()
