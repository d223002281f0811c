"""Writes that do not go through the pool, as the triggers of ``raypg cache watch`` tell of them: heard by one worker.

It keeps a connection for LISTEN as long as there are such triggers. What it cannot have heard (before it listened, or
after that connection was lost) counts as a change of everything: a *gap*.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from raypg.cache_watch import CHANNEL, changed_table
from raypg.core.coherence import EVERYTHING
from raypg.core.holding import CATALOGUE
from raypg.errors import LeaseLostError
from raypg.server.work import Refused

if TYPE_CHECKING:
    from raypg.server.engine import Engine

logger = logging.getLogger(__name__)

Tell = Callable[[list[str] | None], Awaitable[Any]]
"""Takes the tables that somebody has written to; ``None``: perhaps to any."""

HELD_FOR = 7 * 86400.0
"""Seconds for which a connection listens, at most; then another one does."""

AGAIN_AFTER = 1.0
"""Seconds until it is tried again to listen."""

LEAST = 2
"""Connections that a worker must have to keep one of them for this."""

_OWNER = {"held_by": "raypg cache watch", "job": "raypg", "client": "", "application_name": "cache watch"}


class Outside:
    """Listens for one worker.

    Args:
        engine: whose connection is used.
        prefix: what the ``application_name`` of every connection of the pool begins with.
        tell: whom to tell.
    """

    def __init__(self, engine: Engine, prefix: str, tell: Tell) -> None:
        self._engine = engine
        self._prefix = prefix
        self._tell = tell
        self._numbers = itertools.count()
        self._task: asyncio.Task[None] | None = None

    def keep(self, wanted: bool) -> None:
        """Listen, if there is something to hear, or do so no longer. Called often."""
        wanted = wanted and self._engine.writes.reach.has_watches and self._engine.draining is None
        if wanted and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._listen())
        elif not wanted and self._task is not None:
            self._task.cancel()
            self._task = None

    async def _listen(self) -> None:
        engine, token = self._engine, ""
        while True:
            try:
                if engine.budget < LEAST:
                    logger.warning("pool %s: no connection can be spared to listen for changes", engine.config.name)
                    await asyncio.sleep(AGAIN_AFTER * 30)
                    continue
                key = "raypg cache watch", next(self._numbers)
                timeout = engine.config.acquire_timeout
                lease = await engine.acquisitions.lease(key, "raypg", dict(_OWNER), timeout, HELD_FOR, None)
                token = lease.token
                await engine.leases.listen(token, 0, CHANNEL, True)
                await self._tell(None)
                while True:
                    await self._pass_on(await engine.leases.heard(token))
            except asyncio.CancelledError:
                raise
            except (Refused, LeaseLostError) as error:
                logger.info("pool %s: listens for changes no longer: %s", engine.config.name, error)
            except Exception:
                logger.exception("pool %s: internal error while listening for changes", engine.config.name)
            finally:
                engine.leases.end(token, "it listens no longer")
            await asyncio.sleep(AGAIN_AFTER)

    async def _pass_on(self, heard: list[tuple[str, int, str]]) -> None:
        changed: set[str] = set()
        for _, _, payload in heard:
            sender, schema, name = changed_table(payload)
            if not sender.startswith(self._prefix):  # what went through the pool is known already
                changed |= self._engine.writes.reach.tables_behind(schema, name)
        if changed:
            await self._tell(None if changed & {EVERYTHING, CATALOGUE} else sorted(changed))
