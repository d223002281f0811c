"""What one worker is writing to, as it tells the version authority: its side of :mod:`raypg.core.coherence`.

An intent is opened before a statement that may write is sent, used by all statements that write to the same table, and
lingers a little after the last one, so that sustained writing costs one question. What is open is told at each
attendance; an authority that knows nothing of it yet grants nothing.

Pure: the time is told, in seconds of the worker's monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from raypg.core.coherence import DRIFT, HEARD, Report
from raypg.core.holding import LEASE

__all__ = ["LINGER", "Intent", "Intents"]

LINGER: Final = 0.05
"""Seconds for which an intent stays open after the last write."""


@dataclass(eq=False)
class Intent:
    """One table that is written to, or will be.

    Attributes:
        number: of this one; later ones are greater.
        users: statements and transactions that write now.
        allowed: whether nobody holds results any more.
        ends: until when it stays open without users.
    """

    number: int
    table: str
    users: int = 0
    allowed: bool = False
    ends: float = math.inf


class Intents:
    """The intents of one worker.

    Attributes:
        life: of which worker.
        era: in which it must ask; 0 while nobody keeps anything, and nobody is asked.
        word: when something of the authority was received last.
    """

    def __init__(self, life: str) -> None:
        self.life = life
        self.era = 0
        self.word = -math.inf
        self.echo: float | None = None
        self._newest = 0
        self._open: dict[str, Intent] = {}

    def enter(self, tables: Iterable[str]) -> list[Intent]:
        """Something is to write to *tables*. It may when all of these are allowed; and must :meth:`leave` them."""
        found = []
        for table in tables:
            intent = self._open.get(table)
            if intent is None:
                self._newest += 1
                intent = self._open[table] = Intent(self._newest, table)
            intent.users += 1
            intent.ends = math.inf
            found.append(intent)
        return found

    def leave(self, intents: Sequence[Intent], now: float) -> None:
        """It is over, whatever came of it."""
        for intent in intents:
            intent.users -= 1
            if not intent.users:
                intent.ends = now + LINGER

    def may_write_alone(self, now: float) -> bool:
        """Whether all leases must have run out, if the authority was not heard since ``word``."""
        return now >= self.word + HEARD + LEASE + DRIFT

    def report(self, now: float) -> Report:
        """What to tell when attending, now."""
        for table in [table for table, intent in self._open.items() if not intent.users and intent.ends <= now]:
            del self._open[table]
        return Report(self.life, self.era, self.echo, self._newest, {i.number: i.table for i in self._open.values()})
