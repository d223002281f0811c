"""Who may hold results of which table: the version authority of a pool, as a state machine.

Promise: while a process holds a result that it may use, no write through raypg to a table that it came from is between
its sending to the server and its end. It is kept as CPU caches keep theirs (shared and exclusive states, as in MESI),
with leases so that nobody's silence holds up anybody for long: C. Gray, D. Cheriton, "Leases: an efficient
fault-tolerant mechanism for distributed file cache consistency", SOSP 1989.

- A *holder* is a process that keeps something: a cache, or a worker, which keeps what it knows of the catalogue
  (:data:`CATALOGUE` stands for it among the tables). It *shares* a table by a grant of the authority, and gives it back
  when an event of the authority says so. See :mod:`raypg.core.holding`.
- A *worker* opens an *intent* on a table before it sends a statement that may write to it, and ends it when that is
  over. The intent is answered when every holder that shared the table has acknowledged that it has dropped it, or has
  lost its lease. While there is an intent the table is granted to nobody.
- A worker that cannot be heard might write without having asked. So no lease is renewed later than ``HEARD`` seconds
  after something the worker is known to have received; and a worker that hears nothing waits until all leases must have
  run out, see :mod:`raypg.core.intents`.

Pure: the time is told, in seconds of the authority's monotonic clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from raypg.core.holding import CATALOGUE, LEASE, Event

__all__ = ["DRIFT", "EVERYTHING", "HEARD", "IDLE", "Authority", "Report", "Waits"]

HEARD: Final = 2.0
"""Seconds after which a worker must have been heard again, or no lease is renewed."""

DRIFT: Final = 0.02
"""Seconds by which two clocks may drift apart during a lease."""

IDLE: Final = 5.0
"""Seconds without any cache after which workers need not ask any more."""

EVERYTHING: Final = "*"
"""As an intent: all tables, but not the catalogue. An intent on ``CATALOGUE`` is one on all tables too."""

Waits: TypeAlias = "dict[str, int]"
"""Number of the event that a holder must have done."""


class Report(NamedTuple):
    """What a worker says of itself when it attends.

    Attributes:
        life: of which worker.
        era: that it knows of.
        echo: time of the authority's last answer to it that has arrived; ``None`` before the first.
        newest: number of its newest intent.
        intents: those that are open, by number.
    """

    life: str
    era: int
    echo: float | None
    newest: int
    intents: Mapping[int, str]


@dataclass
class _Holder:
    expires: float
    life: str | None  # of the worker that it is
    shared: set[str] = field(default_factory=set)
    wanted: dict[str, None] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)  # that it has not acknowledged
    last: int = 0
    told: int = 0  # the last that it was told of
    done: int = 0

    def tell(self, kind: str, tables: Iterable[str] | None) -> None:
        self.last += 1
        self.events.append((self.last, kind, None if tables is None else sorted(tables)))  # type: ignore[arg-type]


@dataclass
class _Worker:
    heard: float
    joined: bool = False  # it has told, in this era, what it is writing
    gone: bool = False
    newest: int = 0
    intents: dict[int, str] = field(default_factory=dict)


class Authority:
    """Decides who may hold what.

    Args:
        now: the time.
        era: number of the time in which workers must ask; greater than any before.
        active: whether workers ask since an earlier life of the authority, so that leases of it may still hold.

    Attributes:
        complete: whether all workers that there are have been named by :meth:`expect`. Until then nothing is granted.
        invalidations: results of how many tables had to be dropped, counted by holder; all of a holder count as one.
    """

    def __init__(self, now: float, era: int, active: bool = False) -> None:
        self.active = active
        self.complete = True
        self.invalidations = 0
        self._era = era
        self._from = now + LEASE + DRIFT if active else now
        self._holders: dict[str, _Holder] = {}
        self._workers: dict[str, _Worker] = {}
        self._written: Counter[str] = Counter()
        self._idle_since = now

    @property
    def era(self) -> int:
        """The time in which workers must ask; 0 while they need not."""
        return self._era if self.active else 0

    @property
    def caches(self) -> int:
        """How many caches there are."""
        return sum(holder.life is None for holder in self._holders.values())

    @property
    def writers(self) -> dict[str, frozenset[str]]:
        """Tables of the open intents, by worker."""
        return {life: frozenset(worker.intents.values()) for life, worker in self._workers.items()}

    @property
    def listener(self) -> str | None:
        """The worker that is to listen for writes of others."""
        return min((life for life, worker in self._workers.items() if worker.joined and not worker.gone), default=None)

    # --- who is there ---

    def expect(self, life: str, at: float) -> None:
        """There is such a worker. It may run statements, once it has received what was sent to it later than *at*."""
        worker = self._workers.get(life)
        if worker is None:
            self._workers[life] = _Worker(at)
        else:
            worker.gone = False
            worker.heard = max(worker.heard, at)

    def gone(self, life: str, now: float) -> None:
        """All connections of that worker have ended for certain, and with them whatever it was writing."""
        worker = self._workers.get(life)
        if worker is not None:
            worker.gone = True
            self.expire(now)

    def leave(self, who: str) -> None:
        """That holder has dropped everything and holds nothing more."""
        self._holders.pop(who, None)

    def expire(self, now: float) -> None:
        """Forget the holders whose leases have run out, and workers that are gone; rest when there is no cache."""
        for who in [who for who, holder in self._holders.items() if holder.expires <= now]:
            del self._holders[who]
        lives = {holder.life for holder in self._holders.values()}
        for life in [life for life, worker in self._workers.items() if worker.gone and life not in lives]:
            self._reconcile(self._workers[life], {}, self._workers[life].newest)
            del self._workers[life]
        if self.caches or now < self._from:
            self._idle_since = now
        elif self.active and now - self._idle_since >= IDLE:
            self.active = False
            self._holders.clear()
            for worker in self._workers.values():
                self._reconcile(worker, {}, worker.newest)
                worker.joined = False
        self._grant()

    # --- holders ---

    def attend(self, who: str, received: float, done: int, wants: Iterable[str], report: Report | None = None) -> bool:
        """A holder is there. :meth:`answer` says what to tell it.

        Args:
            received: when its message came.
            done: number of the last event that it has done; 0 makes its acquaintance.
            wants: tables that it would share.
            report: of a worker.

        Returns:
            Whether it is known; if not, it is to drop all, and to begin anew under another name.
        """
        self.expire(received)
        worker = None if report is None else self._workers.get(report.life)
        if report is not None and (worker is None or worker.gone or report.era != self.era):
            return False
        holder = self._holders.get(who)
        if holder is None:
            if done:
                return False
            if report is None and not self.active:
                self.active = True
                self._era += 1
            holder = self._holders[who] = _Holder(received + LEASE + DRIFT, None if report is None else report.life)
        if worker is not None and report is not None:
            worker.joined = True
            if report.echo is not None and report.echo <= received:  # else it is of another clock
                worker.heard = max(worker.heard, report.echo)
            self._reconcile(worker, report.intents, report.newest)
        holder.done = max(holder.done, done)
        holder.events = [event for event in holder.events if event[0] > holder.done]
        self.want(who, wants)
        return True

    def want(self, who: str, tables: Iterable[str]) -> None:
        """A holder would share *tables*."""
        holder = self._holders.get(who)
        if holder is not None:
            holder.wanted |= dict.fromkeys(table for table in tables if table not in holder.shared)
            self._grant()

    def due(self, who: str) -> bool:
        """Whether there is something to tell that holder now."""
        holder = self._holders.get(who)
        return holder is None or bool(holder.events)

    def answer(self, who: str, received: float, now: float) -> tuple[bool, list[Event]] | None:
        """What to tell a holder whose message came at *received*: whether its lease goes on, and the events that it has
        not acknowledged; ``None`` if it is not known any more."""
        self.expire(now)
        holder = self._holders.get(who)
        if holder is None:
            return None
        renews = all(worker.gone or now <= worker.heard + HEARD for worker in self._workers.values())
        # Who sends and does not hear would hold up writers for ever.
        renews = renews and holder.done >= holder.told
        if renews:
            holder.expires = max(holder.expires, received + LEASE + DRIFT)
        holder.told = holder.last
        return renews, list(holder.events)

    # --- writers ---

    def intend(self, life: str, intents: Mapping[int, str], now: float) -> Waits | None:
        """A worker is to write to tables.

        Args:
            intents: by number; each is one table, or ``EVERYTHING``, or ``CATALOGUE``.

        Returns:
            What to wait for, see :meth:`may_write`; ``None`` if the worker is not known, or has not attended in this
            era: it must do that first.
        """
        self.expire(now)
        if not self.active:
            return {}
        worker = self._workers.get(life)
        if worker is None or not worker.joined or worker.gone:
            return None
        for number, table in intents.items():
            self._open(worker, number, table)
        waits: Waits = {}
        tables = set(intents.values())
        for who, holder in self._holders.items():
            pending = [number for number, kind, dropped in holder.events if kind == "drop" and _meet(dropped, tables)]
            if pending:
                waits[who] = pending[-1]
        return waits

    def may_write(self, waits: Waits, now: float) -> bool:
        """Whether all have dropped what they had to, or may not use it any more."""
        if now < self._from:
            return False
        self.expire(now)
        return all(who not in self._holders or self._holders[who].done >= number for who, number in waits.items())

    def until(self, waits: Waits, now: float) -> float:
        """When :meth:`may_write` may change for the passing of time alone."""
        times = [self._holders[who].expires for who in waits if who in self._holders]
        return max(now, min([self._from, *times] if now < self._from else times, default=now))

    def changed(self, tables: Iterable[str] | None) -> None:
        """Somebody has written to *tables* without a worker; ``None``: nobody knows to which."""
        for holder in self._holders.values():
            if holder.life is None:
                dropped = holder.shared - {CATALOGUE}
                self._take_back(holder, dropped if tables is None else dropped.intersection(tables))

    # --- inside ---

    def _take_back(self, holder: _Holder, tables: set[str], everything: bool = False) -> None:
        if tables:
            holder.shared -= tables
            holder.tell("drop", None if everything else tables)
            self.invalidations += 1

    def _open(self, worker: _Worker, number: int, table: str) -> None:
        worker.newest = max(worker.newest, number)
        if number in worker.intents:
            return
        worker.intents[number] = table
        self._written[table] += 1
        for holder in self._holders.values():
            if table == CATALOGUE:
                self._take_back(holder, set(holder.shared), everything=True)
            elif table == EVERYTHING:
                self._take_back(holder, holder.shared - {CATALOGUE})
            else:
                self._take_back(holder, holder.shared & {table})

    def _reconcile(self, worker: _Worker, intents: Mapping[int, str], newest: int) -> None:
        """All intents of a worker up to *newest* that are open are *intents*."""
        for number in [number for number in worker.intents if number <= newest and number not in intents]:
            table = worker.intents.pop(number)
            self._written[table] -= 1
            if not self._written[table]:
                del self._written[table]
        for number, table in intents.items():
            self._open(worker, number, table)

    def _grant(self) -> None:
        # A worker whose lease has run out may be writing to more than it has announced, see Writes.widen.
        lives = {holder.life for holder in self._holders.values()}
        told = all(worker.gone or (worker.joined and life in lives) for life, worker in self._workers.items())
        if not (self.active and self.complete and told):
            return
        written = self._written
        if CATALOGUE in written:
            return
        for holder in self._holders.values():
            if not holder.wanted:
                continue
            free = {
                table
                for table in holder.wanted
                if table == CATALOGUE or not (table in written or EVERYTHING in written)
            }
            if free:
                holder.shared |= free
                for table in free:
                    del holder.wanted[table]
                holder.tell("share", free)


def _meet(dropped: list[str] | None, tables: set[str]) -> bool:
    """Whether an intent on *tables* concerns what was dropped."""
    return dropped is None or not tables.isdisjoint((*dropped, EVERYTHING, CATALOGUE))
