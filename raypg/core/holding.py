"""What one process may hold of the results of others' data: its side of the protocol of :mod:`raypg.core.coherence`.

A process *shares* a table while it may hold results of it. The version authority grants shares, and takes them back
before anybody writes to the table; it does so by *events*, which a process must do and acknowledge. All of it holds
only as long as the process's *lease*: who has not been heard for that long is not waited for any more, so it must not
use what it holds either. Times are its own monotonic clock, and a lease counts from when it was asked for.

Pure: no clock, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal, TypeAlias

__all__ = ["CATALOGUE", "LEASE", "MOST_SHARED", "Event", "Holding"]

LEASE: Final = 2.0
"""Seconds for which a process may use what it holds without a word of the authority."""

MOST_SHARED: Final = 4096
"""Most tables that one process shares."""

CATALOGUE: Final = ""
"""Stands among the tables for the catalogue: what a process has concluded from it holds while this is shared."""

Event: TypeAlias = "tuple[int, Literal['share', 'drop'], list[str] | None]"
"""(number, what is to be done, with which tables; ``None`` = with all)."""


class Holding:
    """What one process shares.

    Attributes:
        until: when its lease ends.
        done: number of the last event that it has done.
        mark: counts whatever changed of what is shared: grants, losses.
        wanted: tables that it has asked for, and does not share.
    """

    def __init__(self) -> None:
        self.until = -math.inf
        self.done = 0
        self.mark = 0
        self.wanted: dict[str, None] = {}
        self._since: dict[str, int] = {}

    def may_keep(self, tables: Iterable[str], now: float) -> bool:
        """Whether all of *tables* are shared, under a lease that holds. What is missing is put down as wanted."""
        missing = [table for table in tables if table not in self._since]
        if not missing:
            return now < self.until
        if len(self._since) + len(self.wanted) + len(missing) <= MOST_SHARED:
            self.wanted |= dict.fromkeys(missing)
        return False

    def unchanged(self, tables: Iterable[str], mark: int, now: float) -> bool:
        """Whether all of *tables* have been shared without a break since *mark*, and still are."""
        since = self._since
        return now < self.until and all(since.get(table, math.inf) <= mark for table in tables)

    def is_lost(self, now: float) -> bool:
        """Whether something is shared in vain: the lease has run out, and others need not have waited for us."""
        return bool(self._since) and now >= self.until

    def heard(self, sent: float, renews: bool, events: Sequence[Event]) -> Iterator[list[str] | None]:
        """An answer of the authority is here, in time.

        Args:
            sent: when it was asked for.
            renews: whether the lease goes on.
            events: those since ``done``, perhaps with some that were done already.

        Yields:
            Tables of which all results are to be dropped, ``None`` for all; by the time the next is asked for they
            must be. Only when all are done the events may be acknowledged.
        """
        for number, kind, tables in events:
            if number <= self.done:
                continue
            if kind == "drop":
                self._take_back(tables)
                yield tables
            else:
                self._grant(tables or ())
            self.done = number
        if renews:
            self.until = max(self.until, sent + LEASE)

    def begin_anew(self) -> None:
        """Nothing is shared any more: the lease is lost, or the authority does not know us. What was is to be dropped,
        and it is asked for again when it is wanted; as somebody new."""
        self._take_back(None)
        self.until, self.done = -math.inf, 0

    def _grant(self, tables: Iterable[str]) -> None:
        self.mark += 1
        for table in tables:
            self.wanted.pop(table, None)
            self._since[table] = self.mark

    def _take_back(self, tables: Iterable[str] | None) -> None:
        self.mark += 1
        if tables is None:
            self._since.clear()
        else:
            for table in tables:
                self._since.pop(table, None)
