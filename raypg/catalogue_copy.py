"""What a router's process knows of the database's catalogue, kept up to date while it is used."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import asyncpg

from raypg.core.classifier import Classification, Classifier
from raypg.core.facts import NOT_KNOWN

if TYPE_CHECKING:
    from raypg.pool import WorkflowConnectionPool

__all__ = ["CatalogueCopy"]

logger = logging.getLogger(__name__)

LOOK_EVERY = 10.0
"""Seconds after which somebody else's change of the catalogue is noticed."""

LOOK_AGAIN = 1.0
"""Seconds after which it is looked for what is not known: somebody may just have made it."""


class CatalogueCopy:
    """Verdicts on the statements for one pool's database.

    The catalogue is read, through the pool, when the first statement is to be classified, again after DDL that went
    through here, and when it has changed otherwise: that is looked for every ``LOOK_EVERY`` seconds while statements
    come, beside them; sooner when a statement names what is not known. Meanwhile a verdict may be old: a replica
    refuses to write, and what it refuses goes to the primary.
    """

    def __init__(self) -> None:
        self.classifier = Classifier()
        self._digest = ""
        self._wanted = 1  # number of the change of which verdicts must know
        self._had = 0  # and of the last one that they do know of
        self._looked_at = 0.0
        self._reads = 0
        self._looking: asyncio.Task[None] | None = None

    async def classify(self, pool: WorkflowConnectionPool, sql: str) -> Classification:
        """The verdict on *sql*.

        Raises:
            UnavailableError: the database cannot be asked, and what is known will not do.
        """
        while self._had < self._wanted:
            await asyncio.shield(self._look(pool))
        if time.monotonic() - self._looked_at > LOOK_EVERY:
            self._look(pool)
        found = self.classifier.classify(sql)
        if found.reason.endswith(NOT_KNOWN) and time.monotonic() - self._looked_at > LOOK_AGAIN:
            await asyncio.shield(self._look(pool))
            found = self.classifier.classify(sql)
        return found

    def known(self, sql: str, now: float) -> Classification | None:
        """The verdict on *sql*, if nothing has to be asked for it *now*, a time of ``time.monotonic()``."""
        if self._had < self._wanted or now - self._looked_at > LOOK_EVERY:
            return None
        found = self.classifier.classify(sql)
        return None if found.reason and found.reason.endswith(NOT_KNOWN) else found

    def changed(self) -> None:
        """The catalogue has changed, or may have: the next verdict waits for it to be read."""
        self._wanted += 1

    async def reread(self, pool: WorkflowConnectionPool) -> bool:
        """Look at the catalogue as it is now, not as it was when somebody began to look before; whether that could be
        done.

        Raises:
            UnavailableError: the database cannot be asked.
        """
        if self._looking is not None and not self._looking.done():
            await asyncio.wait({self._looking})
        before = self._reads
        await asyncio.shield(self._look(pool))
        return self._reads > before

    def _look(self, pool: WorkflowConnectionPool) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        if self._looking is None or self._looking.done() or self._looking.get_loop() is not loop:
            self._looked_at = time.monotonic()
            self._looking = loop.create_task(self._refresh(pool))
            self._looking.add_done_callback(_retrieved)
        return self._looking

    async def _refresh(self, pool: WorkflowConnectionPool) -> None:
        from raypg.server import facts_reader  # not for those who only use a pool

        wanted = self._wanted
        try:
            digest = await facts_reader.digest(pool.fetch)
            if digest != self._digest:
                self.classifier.update(await facts_reader.load(pool.fetch))
                self._digest = digest
            self._reads += 1
        except asyncpg.PostgresError as error:
            # Without it nothing is proven, and all goes to the primary.
            logger.warning(
                "the catalogue cannot be read, so reads that name tables are not sent to replicas: %s", error
            )
        self._had = wanted


def _retrieved(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # whoever waited for it was told
