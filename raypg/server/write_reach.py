"""Which tables a worker's statements may write to, by what it knows of the catalogue; or by their text alone.

What is known holds while the worker shares the catalogue: whoever changes that through raypg takes it back first, see
:mod:`raypg.core.coherence`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg

from raypg.cache_watch import FUNCTION
from raypg.core.coherence import EVERYTHING
from raypg.core.holding import CATALOGUE, Holding
from raypg.core.mentions import mentions
from raypg.core.reach import Reach
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

REMEMBER = 10.0
"""Seconds for which it is believed that nobody else has changed the catalogue."""


KNOWN_WITHIN = 1.0
"""Seconds, at most, that what may be a read waits for the catalogue to be known again. Sent at once, each of them would
be announced as a change of the catalogue, and while there is one nobody may know it: for ever, if they never cease."""


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
        self._unknown_since: float | None = None
        self._known_again: asyncio.Future[None] | None = None
        self._lent: list[ServerConnection] = []

    def _known(self, now: float) -> _Catalogue | None:
        known = self._catalogue
        return known if known is not None and self.holding.unchanged((CATALOGUE,), known.mark, now) else None

    async def wait_for(self, text: str, connection: ServerConnection) -> None:
        """Wait for a moment until it can be known what *text* does, if it may be a read: then it may be sent without a
        word. Meanwhile the catalogue is read by *connection*, as all may be taken by those who wait."""
        now = time.monotonic()
        if self._known(now) is not None:
            return
        self._unknown_since = now if self._unknown_since is None else self._unknown_since
        left = self._unknown_since + KNOWN_WITHIN - now
        if left <= 0 or _tables_of(text) != {CATALOGUE} or mentions(text).command != "SELECT":
            return
        if self._known_again is None:
            self._known_again = asyncio.get_running_loop().create_future()
        self._lent.append(connection)
        try:
            await asyncio.wait({self._known_again}, timeout=left)
            while self._reading is not None and not self._reading.done() and self._lent[0] is connection:
                await asyncio.wait({self._reading})
        finally:
            self._lent.remove(connection)

    def tables_of(self, text: str) -> frozenset[str]:
        """The tables that a statement may write to."""
        known = self._known(time.monotonic())
        if known is None:
            return _tables_of(text)
        found = known.texts.get(text)
        if found is None:
            if len(known.texts) >= MOST_TEXTS or len(text) > LONGEST:
                known.texts.clear()
            found = known.texts[text] = known.reach.of(text)
        return found

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
        if known is None or not self.holding.unchanged((CATALOGUE,), known.mark, now) or now - known.at > REMEMBER:
            self._reading = asyncio.ensure_future(self._read_catalogue())

    async def _read_catalogue(self) -> None:
        from raypg.server import facts_reader  # not for those whose results nobody keeps

        mark, known = self.holding.mark, self._catalogue
        try:
            digest = await facts_reader.digest(self._fetch)
            if known is not None and known.digest == digest:
                reach, texts = known.reach, known.texts
            else:
                reach, texts = await facts_reader.load_for_writes(self._fetch), {}
        except (Refused, asyncpg.PostgresError) as error:
            logger.warning(
                "pool %s: the catalogue cannot be read, so any write is taken to be one to all tables: %s",
                self._engine.config.name, error,
            )  # fmt: skip
            await asyncio.sleep(1.0)
            return
        except ConnectionLost:
            return  # whoever has lent it will see; it is tried again when the authority is heard next
        now = time.monotonic()
        self._catalogue = _Catalogue(reach, digest, mark, now, texts)
        if self._known(now) is not None:
            self._unknown_since = None
            if self._known_again is not None:
                self._known_again.set_result(None)
                self._known_again = None

    async def _fetch(self, query: str, *arguments: Any) -> list[dict[str, Any]]:
        async def work(connection: ServerConnection) -> tuple[list[Any], tuple[str, ...]]:
            return await connection.run(FETCH, query, arguments)  # type: ignore[return-value]

        rows, names = await (work(self._lent[0]) if self._lent else errand.run(self._engine, "raypg", work))
        return [dict(zip(names or (), row, strict=True)) for row in rows]


_CHANGES = frozenset(("INSERT", "UPDATE", "DELETE", "MERGE", "COPY", "TRUNCATE TABLE"))
_NOTHING = frozenset(
    ("SHOW", "SET", "RESET", "BEGIN", "START TRANSACTION", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "LISTEN")
) | {"UNLISTEN", "NOTIFY", "LOCK TABLE"}


def _tables_of(text: str) -> frozenset[str]:
    """Without knowing anything of the catalogue."""
    said = mentions(text)
    if said.statements == 1 and said.command in _NOTHING:
        return frozenset()
    if said.command in _CHANGES:
        return frozenset((EVERYTHING,))
    return frozenset((CATALOGUE,))
