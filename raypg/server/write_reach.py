"""Which tables a worker's statements may write to, by what it knows of the catalogue; or by their text alone.

What is known holds while the worker shares the catalogue: whoever changes that through raypg takes it back first, see
:mod:`raypg.core.coherence`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg

from raypg.cache_watch import FUNCTION
from raypg.core.coherence import EVERYTHING
from raypg.core.holding import CATALOGUE, Holding
from raypg.core.mentions import mentions
from raypg.core.reach import Reach
from raypg.errors import QueryTimeoutError
from raypg.messages import FETCH
from raypg.server import errand
from raypg.server.outcomes import ConnectionLost
from raypg.server.work import Refused

if TYPE_CHECKING:
    from raypg.server.connection import ServerConnection
    from raypg.server.engine import Engine

logger = logging.getLogger(__name__)

MOST_TEXTS = 4096
"""Statements whose tables are remembered."""

LONGEST = 65536
"""Characters of a statement that is worth remembering."""

READ_WITHIN = 1.0
"""Seconds that a write waits for the catalogue to be read, at most, unless it has lent its connection for that."""

READ_AT_MOST = 10.0
"""Seconds that reading it may take."""

UNLOCKED = (("lock_timeout", "1s"),)
"""To tell what a view is, the server locks its tables, and an open transaction of somebody may be in the way."""

REMEMBER = 10.0
"""Seconds for which it is believed that nobody else has changed the catalogue."""


class _Catalogue(NamedTuple):
    """What was read of the catalogue, while nothing of ours changed it since *mark*; and what it says of texts."""

    reach: Reach
    digest: str
    mark: int
    at: float
    texts: dict[str, frozenset[str]]


class WriteReach:
    """What one worker knows.

    Args:
        engine: by which the catalogue is read.

    Attributes:
        holding: what the worker shares: the catalogue.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.holding = Holding()
        self._catalogue: _Catalogue | None = None
        self._reading: asyncio.Task[None] | None = None
        self._not_before = 0.0
        self._lent: list[ServerConnection] = []

    def _known(self, now: float) -> _Catalogue | None:
        known = self._catalogue
        return known if known is not None and self.holding.unchanged((CATALOGUE,), known.mark, now) else None

    def may_write(self, text: str) -> bool:
        """Whether *text* may write though it looks like a mere read: by an overload of a harmless function, a domain, a
        cast. Where nothing is known of the catalogue the text is believed: no mere read shall wait for the authority.
        """
        return self._known(time.monotonic()) is not None and bool(self.tables_of(text))

    def tables_of(self, text: str) -> frozenset[str]:
        """The tables that a statement may write to. Better after :meth:`ready`."""
        known = self._known(time.monotonic())
        if known is None:
            return _tables_of(text)
        found = known.texts.get(text)
        if found is None:
            if len(known.texts) >= MOST_TEXTS or len(text) > LONGEST:
                known.texts.clear()
            found = known.texts[text] = known.reach.of(text)
        return found

    async def ready(self, connection: ServerConnection, until: float = math.inf) -> None:
        """Wait a moment for the catalogue, if it is just being read; that is done over *connection*, if it is free for
        it, as all may be taken by those who wait. Not while somebody changes the catalogue: nobody keeps anything then,
        so that to write to all tables is no worse.

        Args:
            until: when who waits has no more time.
        """
        now = time.monotonic()
        if self._known(now) is not None or now < self._not_before or not self.holding.may_keep((CATALOGUE,), now):
            return
        lends = connection.lease is None and not connection.raw.is_closed() and not connection.raw.is_in_transaction()
        lends = lends and until - now > READ_WITHIN
        if lends:
            self._lent.append(connection)
        try:
            self.heard()
            if (reading := self._reading) is not None:
                await asyncio.wait((reading,), timeout=min(READ_WITHIN, max(0.0, until - now)))
                while not reading.done() and self._lent[:1] == [connection]:
                    left = until - time.monotonic()
                    if left <= 0 and not connection.busy:
                        break
                    if left <= 0:
                        connection.cancel("timeout")  # what reads the catalogue over it
                    await asyncio.wait((reading,), timeout=left if 0 < left < math.inf else None)
        finally:
            if lends:
                self._lent.remove(connection)

    def tables_behind(self, schema: str, name: str) -> frozenset[str]:
        """The tables that a write to that one reaches."""
        known = self._catalogue
        return frozenset((EVERYTHING,)) if known is None else known.reach.of_table(schema, name)

    @property
    def has_watches(self) -> bool:
        """Whether there are triggers of ``raypg cache watch``."""
        return self._catalogue is not None and self._catalogue.reach.calls(*FUNCTION)

    def heard(self) -> None:
        """The authority has answered. What is known of the catalogue is read anew if it may have changed; and looked
        at again from time to time, since others may change it too."""
        now, known = time.monotonic(), self._catalogue
        if not self.holding.may_keep((CATALOGUE,), now) or (self._reading is not None and not self._reading.done()):
            return
        due = known is None or self._known(now) is None or now - known.at > REMEMBER
        if due and now >= self._not_before:
            self._reading = asyncio.ensure_future(self._read_catalogue())

    async def _read_catalogue(self) -> None:
        from raypg.server import facts_reader  # not for those whose results nobody keeps

        mark, known = self.holding.mark, self._catalogue
        fetch = functools.partial(self._fetch, time.monotonic() + READ_AT_MOST)
        try:
            digest = await facts_reader.digest(fetch)
            if known is not None and known.digest == digest:
                reach, texts = known.reach, known.texts
            else:
                reach, texts = await facts_reader.load_for_writes(fetch), {}
        except (Refused, QueryTimeoutError, asyncpg.PostgresError) as error:
            logger.warning(
                "pool %s: the catalogue cannot be read, so any write is taken to be one to all tables: %s",
                self._engine.config.name, error,
            )  # fmt: skip
            self._not_before = time.monotonic() + REMEMBER
            return
        except ConnectionLost:
            return  # whoever has lent it will see; it is tried again when the authority is heard next
        self._catalogue = _Catalogue(reach, digest, mark, time.monotonic(), texts)

    async def _fetch(self, until: float, query: str, *arguments: Any) -> list[dict[str, Any]]:
        async def work(connection: ServerConnection) -> tuple[list[Any], tuple[str, ...]]:
            left = until - time.monotonic()
            return await connection.run(FETCH, query, arguments, left, UNLOCKED)  # type: ignore[return-value]

        rows, names = await (work(self._lent[0]) if self._lent else errand.run(self._engine, "raypg", work))
        return [dict(zip(names or (), row, strict=True)) for row in rows]


_CHANGES = frozenset(("SELECT", "INSERT", "UPDATE", "DELETE", "MERGE", "COPY", "TRUNCATE TABLE", "EXECUTE")) | {
    "DECLARE CURSOR"
}
_NOTHING = frozenset(
    ("SHOW", "SET", "RESET", "BEGIN", "START TRANSACTION", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "LISTEN")
) | {"UNLISTEN", "NOTIFY", "LOCK TABLE", "FETCH", "CLOSE CURSOR"}


def _tables_of(text: str) -> frozenset[str]:
    """Without knowing anything of the catalogue. Not an intent on the catalogue where a function may change it: with
    ever new ones of that kind it would never be read."""
    said = mentions(text)
    if said.statements == 1 and said.command in _NOTHING:
        return frozenset()
    if said.command in _CHANGES:
        return frozenset((EVERYTHING,))
    return frozenset((CATALOGUE,))
