"""The results that a router keeps, and what makes them as good as the database's own answer.

What is kept are proven reads that give the same as long as their tables do (:class:`raypg.core.classifier`), asked for
outside of transactions. The promise, with *writer* for whoever writes through raypg, in any process:

- **No answer is older than what the primary would have given when the call began**, as far as writers go: a result is
  dropped in every process before a write to its tables is sent to the server, and kept again only when that is over
  (:mod:`raypg.coherence`). So sessions read their own writes, and never see one go back. The same holds for reads that
  were not in the cache: those that a replica answers are made to show all that was written before, by their token.
- **Who writes past raypg** (psql, another application) is seen after ``ttl`` seconds at the latest; at once by who
  hands on a token of somebody who has seen it (``after=``): the session then is given only what was read from the
  primary after that, or from a replica that shows it.
- One call asks when several want the same at the same time. Those that came later share its answer if nothing was
  written in between. If it fails or is cancelled, they ask for themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
import weakref
from collections.abc import Awaitable, Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from raypg import messages
from raypg.cache_reporting import Reporter
from raypg.cached_values import kept, key_of, names_the_clock, size_of
from raypg.coherence import Coherence, OnChange, coherence_of
from raypg.core.patterns import Pattern, Patterns
from raypg.core.result_cache import Entry, How, ResultCache
from raypg.core.seen import NOTHING, PRIMARY, WROTE, Session, Token
from raypg.reading import Served

if TYPE_CHECKING:
    from raypg.core.classifier import Classification
    from raypg.dispatch import Dispatcher
    from raypg.router_place import Place
    from raypg.router_sessions import RouterSession

__all__ = ["Asked", "RouterCache", "asked_for"]

Outcome: TypeAlias = "tuple[Any, tuple[str, ...] | None]"
Ask: TypeAlias = "Callable[[int, Token], Awaitable[tuple[Outcome, Served]]]"
"""Runs the read on a server: in this mode, where it shows what this token has seen; tells who answered."""

CACHED = Served("cache", None, False, NOTHING)
"""Who answers what is kept."""


class _Kept(NamedTuple):
    """What is kept of an answer.

    Attributes:
        rows, names, status: the answer; only the first row of what was asked for with ``messages.ROW``.
        changeable: who gets it might change values in it, and gets copies.
        token: what who asked had seen then.
        by_primary: whether the primary answered.
        pattern: of the statement, if that is watched.
        staleness: seconds that it may have been older than the primary's, as far as others than writers go.
    """

    rows: list[tuple[Any, ...]]
    names: tuple[str, ...] | None
    status: str
    changeable: bool
    token: Token
    by_primary: bool
    staleness: float
    pattern: Pattern | None


class _Flight:
    """A read that is under way.

    Attributes:
        mark: of the coherence, when it was sent.
        generation: of the cache, at that time.
        timeout: seconds that it may take.
        done: its result, if it may be given to others; else ``None``.
    """

    __slots__ = ("done", "generation", "mark", "timeout")

    def __init__(self, mark: int, generation: int, timeout: float | None) -> None:
        self.mark = mark
        self.generation = generation
        self.timeout = timeout
        self.done: asyncio.Future[Entry[_Kept] | None] = asyncio.get_running_loop().create_future()


class Asked(NamedTuple):
    """A read that may be answered by the cache.

    Attributes:
        key: what it shares with all that ask the same; ``None`` if it cannot be told apart from others.
    """

    key: Hashable
    mode: int
    query: str
    arguments: tuple[Any, ...]
    timeout: float | None
    max_staleness: float | None
    verdict: Classification
    session: RouterSession


def asked_for(
    mode: int, query: str, arguments: Any, timeout: float | None, max_staleness: float | None, place: Place
) -> Asked:
    """The same, of a deterministic read of tables that is outside of a transaction; no other may be asked for here."""
    key = key_of(query, arguments, (place.settings, mode == messages.ROW))
    return Asked(key, mode, query, arguments, timeout, max_staleness, place.verdict, place.session)


class RouterCache:
    """The cache of one router.

    Args:
        most: results.
        most_bytes: that they take together.
        ttl: seconds after which a result is asked for again.
        reread: reads the catalogue once more, so that verdicts from then on are those of now; False if it could not.
        patterns: what is learnt of statements, also by what becomes of their results.

    Attributes:
        results: what is kept.
        coalesced: calls that were given another one's answer.
        unheld: results that were not used, as it was not certain that nobody had written.
    """

    def __init__(
        self,
        most: int,
        most_bytes: int,
        ttl: float,
        reread: Callable[[], Awaitable[bool]],
        patterns: Patterns | None = None,
    ) -> None:
        self.results: ResultCache[_Kept] = ResultCache(most, most_bytes, ttl, self._ended)
        self.coalesced = 0
        self.unheld = 0
        self._patterns = patterns
        self._reread = reread
        self._flights: dict[Hashable, _Flight] = {}
        self._dispatcher: Dispatcher | None = None
        self._coherence: Coherence | None = None
        self._everybody = Session()  # what any of us has seen: for reads whose results all may be given
        self._mark = -1
        self._catalogue = 0
        self._reporter: Reporter | None = None
        self._rereading: asyncio.Task[None] | None = None
        self._generation = 0  # of what may be kept: what was asked for before may be too old

    # --- answers ---

    def find(self, dispatcher: Dispatcher, asked: Asked) -> Outcome | None:
        """The answer, if it is kept and good enough for who asks. Some microseconds."""
        if dispatcher is not self._dispatcher or asked.mode not in _MODES:
            return None
        now = time.monotonic()
        entry = self.results.find(asked.key, now)
        if entry is None or not self._suits(entry, asked, now):
            return None
        patterns, pattern = self._patterns, entry.value.pattern
        if patterns is not None and pattern is not None:
            patterns.called(now)
            pattern.hit(now)
        return self._given(entry, asked)

    async def read(self, dispatcher: Dispatcher, asked: Asked, ask: Ask) -> tuple[Outcome, Served]:
        """Ask a server, or wait for another call's answer to the same, and keep the answer if it may be kept.

        Raises:
            What *ask* raises.
        """
        if asked.mode not in _MODES:
            return await ask(asked.mode, WROTE)
        if dispatcher is not self._dispatcher:
            await self._attach(dispatcher)
        coherence = self._coherence
        assert coherence is not None
        tables, key = frozenset(asked.verdict.reads), asked.key
        catalogue = coherence.catalogue  # that the verdict is of, if any
        flight = self._flights.get(key)
        if flight is not None and self._may_share(flight, asked, tables):
            entry = await asyncio.shield(flight.done)
            if entry is not None and self._suits(entry, asked, time.monotonic(), shared=True):
                self.coalesced += 1
                return self._given(entry, asked), CACHED
            flight = self._flights.get(key)
        mark = coherence.mark()
        keeps = (
            key is not None
            and not names_the_clock(asked.arguments)
            and self._is_worth_it(asked)
            and coherence.may_keep(tables)
            and self._knows_catalogue(coherence)
            and coherence.catalogue == catalogue
        )
        if mark != self._mark:
            self._everybody.wrote()
            self._mark = mark
        self.results.missed()
        if not keeps:
            # Somebody may be writing to the tables, or have written: nobody tells us.
            return await ask(asked.mode, WROTE)
        return await self._lead(asked, ask, tables, mark, first=flight is None)

    async def _lead(
        self, asked: Asked, ask: Ask, tables: frozenset[str], mark: int, first: bool
    ) -> tuple[Outcome, Served]:
        """Ask, for all who want the same if it is the first to, and keep what comes."""
        coherence = self._coherence
        assert coherence is not None
        flight, now = _Flight(mark, self._generation, asked.timeout), time.monotonic()
        begun = self._everybody.reads()
        if first:
            self._flights[asked.key] = flight
        entry: Entry[_Kept] | None = None
        try:
            mode = messages.BOTH if asked.mode == messages.FETCH else asked.mode
            outcome, who = await ask(mode, begun[0])
            self._everybody.saw(begun, who.token)
            if flight.generation == self._generation and coherence.unchanged(tables, mark):
                entry = self._keep(asked, tables, outcome, who, now)
        finally:
            if self._flights.get(asked.key) is flight:
                del self._flights[asked.key]
            flight.done.set_result(entry)
        payload, names = outcome
        return (payload[0], names) if mode != asked.mode else outcome, who

    def _may_share(self, flight: _Flight, asked: Asked, tables: frozenset[str]) -> bool:
        """Whether the answer of *flight* is no older than this call, and comes no later than its caller has time."""
        usual = None if self._dispatcher is None else self._dispatcher.config.command_timeout
        if (
            not comes_in_time(flight.timeout, asked.timeout, usual)
            or flight.generation != self._generation
            or self._coherence is None
        ):
            return False
        return self._coherence.unchanged(tables, flight.mark)

    def _is_worth_it(self, asked: Asked) -> bool:
        """Whether keeping the result gains anything, as far as is known."""
        patterns = self._patterns
        if patterns is None:
            return True
        now = time.monotonic()
        return patterns.of(asked.query, now).is_worth_keeping(now)

    def _suits(self, entry: Entry[_Kept], asked: Asked, now: float, shared: bool = False) -> bool:
        """Whether *entry* shows who asks all that it must.

        Args:
            shared: it was asked for while the caller waited, so that it is no older than the call.
        """
        coherence = self._coherence
        assert coherence is not None
        if not shared and not coherence.is_held():
            self.unheld += 1
            return False
        session, value = asked.session, entry.value
        if asked.max_staleness is not None and value.staleness + now - entry.began > asked.max_staleness:
            return False
        if entry.began >= session.floor and (value.by_primary or not session.floor):
            return True
        token = session.seen.token  # of what a server has shown it since, nobody can say whether the entry shows it
        return not token.seen and 0 < token.lsn <= value.token.lsn and token.timeline == value.token.timeline

    def _given(self, entry: Entry[_Kept], asked: Asked) -> Outcome:
        """What *entry* gives to one caller."""
        self.results.used(entry)
        value, seen = entry.value, asked.session.seen
        if value.token is not NOTHING and value.token is not seen.token and value.token != seen.token:
            seen.saw(seen.reads(), seen.token.joined(value.token))
        rows = copy.deepcopy(value.rows) if value.changeable else value.rows
        if asked.mode == messages.BOTH:
            return (rows, value.status), value.names
        return rows, value.names

    # --- keeping ---

    def _keep(
        self, asked: Asked, tables: frozenset[str], outcome: Outcome, who: Served, now: float
    ) -> Entry[_Kept] | None:
        payload, names = outcome
        rows, status = (payload, "") if asked.mode == messages.ROW else payload
        ours = kept(rows)
        if ours is None or who.refused:
            return None
        by_primary = who.target == "primary"
        age = asked.max_staleness
        staleness = 0.0 if by_primary else float("inf") if age is None else age
        token = who.token
        if by_primary and self._dispatcher is not None and self._dispatcher.config.replicas:
            token = token.having_seen(PRIMARY)
        pattern = None if self._patterns is None else self._patterns.of(asked.query, now)
        value = _Kept(ours[0], names, status, ours[1], token, by_primary, staleness, pattern)
        size = size_of(value.rows) + size_of(asked.query) + size_of(asked.arguments)
        self.results.keep(asked.key, value, tables, size, now)
        # What is too large to be kept is good for who waits for it all the same.
        return Entry(asked.key, value, tables, size, now, now)

    def invalidate(self, tables: frozenset[str] | None) -> int:
        """Forget what came from these tables, or everything; what is under way now is not kept either."""
        self._generation += 1
        self._everybody.wrote()
        return self.results.drop(tables)

    async def close(self) -> None:
        """Keep nothing any more, and hear of no writes."""
        reporter, self._reporter = self._reporter, None
        self._coherence = self._dispatcher = None
        self._changed(None)
        if reporter is not None:
            await reporter.close()

    def totals(self) -> dict[str, int]:
        """What is told to the Metrics actor; see :mod:`raypg.core.cache_figures`."""
        counts = self.results.counts
        return {
            "cache_hits": counts["hits"],
            "cache_misses": counts["misses"],
            "cache_invalidations": counts["invalidated"],
            "cache_evictions": counts["evicted"],
            "cache_entries": len(self.results),
            "cache_bytes": self.results.bytes,
        }

    def describe(self) -> dict[str, Any]:
        """What is kept, and what it was good for: see :meth:`ResultCache.statistics`; ``coalesced``: calls that were
        given the answer of another one; ``lease_missing``: hits that were none, as it was not certain that nobody had
        written."""
        return {**self.results.statistics(), "coalesced": self.coalesced, "lease_missing": self.unheld}

    # --- inside ---

    async def _attach(self, dispatcher: Dispatcher) -> None:
        """Go by what is heard through *dispatcher*: what came by another one may be of another database."""
        before, self._dispatcher = self._reporter, dispatcher
        self._changed(None)
        coherence = self._coherence = coherence_of(dispatcher)
        self._mark, self._catalogue, self._everybody = -1, 0, Session()
        listener = _listener(weakref.ref(self))
        coherence.on_change(listener)
        self._reporter = Reporter(self, dispatcher, coherence, listener)
        await coherence.start()
        if before is not None:
            with contextlib.suppress(RuntimeError):  # its event loop may be closed, and all of it over
                await before.close()

    def _changed(self, tables: frozenset[str] | None) -> None:
        if tables is None or "" in tables:
            self._generation += 1
            self.results.drop(None)
        else:
            self.results.drop(tables)

    def _ended(self, entry: Entry[_Kept], how: How) -> None:
        pattern = entry.value.pattern
        if pattern is not None and how != "replaced":
            pattern.ended(entry.uses, how == "invalidated", time.monotonic())

    def _knows_catalogue(self, coherence: Coherence) -> bool:
        """Whether verdicts are those of the catalogue as it is now; if not, it is read, for the next time."""
        if coherence.catalogue == self._catalogue:
            return True
        if self._rereading is None or self._rereading.done():
            self._rereading = asyncio.get_running_loop().create_task(self._look(coherence))
            self._rereading.add_done_callback(_retrieved)
        return False

    async def _look(self, coherence: Coherence) -> None:
        number = coherence.catalogue
        if await self._reread() and coherence is self._coherence:
            self._catalogue = number


_MODES = frozenset((messages.FETCH, messages.ROW, messages.BOTH))


def comes_in_time(theirs: float | None, ours: float | None, usual: float | None) -> bool:
    """Whether who may take *theirs* seconds is done before who begins now has waited *ours*; ``None``: those that are
    *usual*, which may be without end too."""
    theirs, ours = usual if theirs is None else theirs, usual if ours is None else ours
    return ours is None or (theirs is not None and theirs <= ours)


def _listener(cache: weakref.ref[RouterCache]) -> OnChange:
    def changed(tables: frozenset[str] | None) -> None:
        known = cache()
        if known is not None:
            known._changed(tables)

    return changed


def _retrieved(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # it is tried again
