"""What a router's cache does is told to the Metrics actor, once a second: totals, so that a message may be lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import weakref
from typing import TYPE_CHECKING

from raypg import cluster
from raypg.calling import send
from raypg.coherence import Coherence, OnChange

if TYPE_CHECKING:
    from raypg.dispatch import Dispatcher
    from raypg.router_cache import RouterCache

__all__ = ["Reporter"]

logger = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds between two reports."""


class Reporter:
    """Tells of one cache, and ends its part in the coherence if its router is dropped without having been closed.

    Args:
        cache: kept alive by its router alone.
        listener: what the coherence calls for it.
    """

    def __init__(self, cache: RouterCache, dispatcher: Dispatcher, coherence: Coherence, listener: OnChange) -> None:
        self._cache = weakref.ref(cache)
        self._dispatcher = dispatcher
        self._coherence = coherence
        self._listener = listener
        self._who = secrets.token_hex(8)
        self._task = asyncio.get_running_loop().create_task(self._report_often())

    async def close(self) -> None:
        """Tell the last, and hear of no writes any more."""
        self._task.cancel()
        self._tell()
        self._coherence.forget(self._listener)
        await self._coherence.close()

    async def _report_often(self) -> None:
        while self._dispatcher.closed is None:
            await asyncio.sleep(EVERY)
            if not self._tell():
                self._coherence.forget(self._listener)
                await self._coherence.close()
                return

    def _tell(self) -> bool:
        """Send the totals; whether the cache is still there."""
        cache = self._cache()
        if cache is None:
            return False
        with contextlib.suppress(Exception):  # nobody misses a report: the next one tells all
            metrics = cluster.find_metrics()
            if metrics is not None:
                send(metrics.cache_told, self._dispatcher.name, self._who, cache.totals())
        return True
