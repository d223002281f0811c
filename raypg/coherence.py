"""What this process may keep of what it has read, so that it never answers with less than the database would.

The Pool actor is the *version authority* of its pool: it knows which process *shares* which table, that is, may hold
results of it, and it has every process drop those before a write to the table is sent to the server. See
:mod:`raypg.core.coherence` for the protocol, and :mod:`raypg.core.holding` for this side of it.

Tables are named as in :class:`raypg.core.classifier.Classification`: ``"schema"."name"``, both quoted, views expanded.
Those of the system (``pg_catalog`` …) are never shared: they change without a write. Nor are temporary ones.

How a cache uses it, for a read of *tables* that is not in the cache::

    mark = coherence.mark()              # before the read is sent
    if mark != seen:                     # others may have written since we looked last: whoever reads from a replica
        sessions.wrote(…); seen = mark   # now must see it
    keep = coherence.may_keep(tables)    # asks for those that are missing, for the next time
    result = await …
    if keep and coherence.unchanged(tables, mark): store
    # … and a hit counts only while coherence.is_held(), the entry's tables being shared since it was stored: whatever
    # is not any more was dropped by the callback of on_change.
    # Verdicts on statements hold for one catalogue: when coherence.catalogue has another value than before, the
    # catalogue is to be read again before a verdict is used to store or to hit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakKeyDictionary

from raypg import _compat
from raypg.calling import send
from raypg.core.holding import CATALOGUE, Holding

if TYPE_CHECKING:
    from raypg.dispatch import Dispatcher

__all__ = ["Coherence", "coherence_of"]

logger = logging.getLogger(__name__)

ANSWER_WITHIN = 3.0
"""Seconds in which the authority must answer a poll, which it holds for a shorter time."""

AGAIN_AFTER = 0.2
"""Seconds until an authority that does not answer is asked again."""

_NEVER_SHARED = ('"pg_catalog".', '"information_schema".', '"pg_toast".', '"pg_temp')
"""How the names begin of tables that change without a write of anybody, or are another one for each session."""

OnChange: TypeAlias = "Callable[[frozenset[str] | None], None]"
"""Takes the tables of which all results are to be dropped, now; ``None``: of all tables."""


class Coherence:
    """One process's share in what a pool's database holds; of one event loop, see :func:`coherence_of`.

    Args:
        dispatcher: of the pool.

    Attributes:
        invalidations: how often results of some tables had to be dropped, as somebody was to write to them.
        flushes: how often those of all tables had to be: for a write of unknown effect, or as the lease was lost.
        losses: those of the last kind.
        catalogue: another number whenever the catalogue may have changed.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._holding = Holding()
        self._listeners: list[OnChange] = []
        self._task: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._users = 0
        self._who = ""
        self.invalidations = self.flushes = self.losses = 0
        self.catalogue = 0

    # --- for a cache: cheap, and without waiting ---

    def is_held(self) -> bool:
        """Whether what is shared may be used now."""
        return time.monotonic() < self._holding.until

    def may_keep(self, tables: frozenset[str]) -> bool:
        """Whether *tables* are shared by us, so that nobody writes to them now. What is not is asked for, in the
        background: it is granted when nobody writes to it. Never true of a table of the system, or a temporary one."""
        if self._task is None or any(table.startswith(_NEVER_SHARED) for table in tables):
            return False
        holding = self._holding
        before = len(holding.wanted)
        kept = holding.may_keep((*tables, CATALOGUE), time.monotonic())
        if len(holding.wanted) > before and (self._asking is None or self._asking.done()):
            self._asking = asyncio.get_running_loop().create_task(self._ask())
        return kept

    def mark(self) -> int:
        """How often so far anything has changed of what is shared: to be taken before a read is sent."""
        return self._holding.mark

    def unchanged(self, tables: frozenset[str], mark: int) -> bool:
        """Whether *tables* have been shared all the time since *mark* was taken, and still are: if so, a read that was
        sent then has a result that may be kept now."""
        return self._holding.unchanged((*tables, CATALOGUE), mark, time.monotonic())

    def on_change(self, callback: OnChange) -> None:
        """Have *callback* called whenever results are to be dropped, before anybody is told that they are. It must not
        raise, nor wait."""
        self._listeners.append(callback)

    def forget(self, callback: OnChange) -> None:
        """Do so no longer."""
        with contextlib.suppress(ValueError):
            self._listeners.remove(callback)

    # --- life ---

    async def start(self) -> None:
        """Begin to hear of writes; one :meth:`close` for each. Waits for nothing: until the authority has answered
        nothing is shared."""
        self._users += 1
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._listen())

    async def close(self) -> None:
        """The last one to close it gives up all that is shared."""
        self._users = max(0, self._users - 1)
        if self._users or self._task is None:
            return
        task, self._task = self._task, None
        task.cancel()
        self._drop(None)
        self._holding.begin_anew()
        with contextlib.suppress(*_compat.ActorGone, TimeoutError):  # it gives up who is not heard, too
            await asyncio.wait_for(send(self._dispatcher.pool.want, self._who, None), AGAIN_AFTER)

    # --- inside ---

    async def _listen(self) -> None:
        """Keep the lease, and do what the authority says, whoever of us is restarted."""
        holding, dispatcher = self._holding, self._dispatcher
        self._begin_anew()
        while dispatcher.closed is None:
            sent = time.monotonic()
            try:
                answer = await asyncio.wait_for(
                    send(dispatcher.pool.attend, self._who, holding.done, list(holding.wanted)), ANSWER_WITHIN
                )
            except (*_compat.ActorGone, TimeoutError):
                await asyncio.sleep(AGAIN_AFTER)
                continue
            except Exception:
                logger.exception("pool %s: internal error while listening for writes", dispatcher.name)
                await asyncio.sleep(AGAIN_AFTER)
                continue
            if answer is None or holding.is_lost(time.monotonic()):
                self._begin_anew()
                continue
            before = holding.mark
            renews, events, *_ = answer
            for tables in holding.heard(sent, renews, events):
                self._drop(None if tables is None else frozenset(tables))
            if holding.mark != before and any(kind == "share" and CATALOGUE in (t or ()) for _, kind, t in events):
                self.catalogue += 1
        self._drop(None)
        holding.begin_anew()

    def _begin_anew(self) -> None:
        """As somebody new, who shares nothing."""
        if self._holding.until > -math.inf:
            self.losses += 1
            self._drop(None)
        self._holding.begin_anew()
        self._who = f"cache:{secrets.token_hex(8)}"

    async def _ask(self) -> None:
        """Tell what is wanted before the next poll does."""
        with contextlib.suppress(*_compat.ActorGone):
            await send(self._dispatcher.pool.want, self._who, list(self._holding.wanted))

    def _drop(self, tables: frozenset[str] | None) -> None:
        if tables is None:
            self.flushes += 1
        else:
            self.invalidations += 1
        for listener in tuple(self._listeners):
            try:
                listener(tables)
            except Exception:
                logger.exception("internal error while results were dropped")


_known: WeakKeyDictionary[Dispatcher, Coherence] = WeakKeyDictionary()


def coherence_of(dispatcher: Dispatcher) -> Coherence:
    """The one of that dispatcher, that is, of one pool in one event loop: all caches there share it."""
    found = _known.get(dispatcher)
    if found is None:
        found = _known[dispatcher] = Coherence(dispatcher)
    return found
