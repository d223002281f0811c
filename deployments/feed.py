"""One state for all who watch: collected once a second while somebody does, and sent as what has changed."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from raypg.core.merge_patch import difference
from raypg.deployments.viewers import Viewers

__all__ = ["EVERY", "Feed"]

logger = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds from one frame to the next."""

FRESH = 1.0
"""Seconds for which a state is as good as a new one."""

PAST_THE_SECOND = 0.3
"""When in each second it is collected: the workers have told what happened in the one before."""


class Feed:
    """Sends the state to all viewers.

    Args:
        look: collects the state, a JSON object.
        viewers: who watches.
    """

    def __init__(self, look: Callable[[], Awaitable[dict[str, Any]]], viewers: Viewers) -> None:
        self._look = look
        self._viewers = viewers
        self._state: dict[str, Any] | None = None
        self._at = 0.0
        self._looked_at = 0.0
        self._number = 0
        self._turn = asyncio.Lock()

    async def state(self) -> dict[str, Any]:
        """The state as it is now."""
        if self._is_stale():
            async with self._turn:
                if self._is_stale():
                    await self._advance()
        assert self._state is not None
        return self._state

    async def first(self) -> str:
        """What a viewer gets first. All that is sent from the moment on at which this returns follows on it."""
        state = await self.state()
        return _encoded("state", self._number, self._at, state)

    async def run(self) -> None:
        """Goes on for ever."""
        while True:
            await self._viewers.arrived.wait()
            await asyncio.sleep(EVERY - (time.time() - PAST_THE_SECOND) % EVERY)
            if not self._viewers:
                continue  # nobody watches: nobody is asked anything
            try:
                async with self._turn:
                    await self._advance()
            except Exception:
                logger.exception("dashboard: internal error")

    def _is_stale(self) -> bool:
        """Whether nobody has looked lately. While somebody watches that is done by :meth:`run`."""
        age = time.monotonic() - self._looked_at
        return self._state is None or age > (5 * FRESH if self._viewers else FRESH)

    async def _advance(self) -> None:
        state = await self._look()
        before, self._state = self._state, state
        self._number += 1
        self._at, self._looked_at = time.time(), time.monotonic()
        if self._viewers and before is not None:
            self._viewers.send(_encoded("patch", self._number, self._at, difference(before, state)))


def _encoded(kind: str, number: int, at: float, content: dict[str, Any]) -> str:
    message = {"type": kind, "seq": number, "at": at, kind: content}
    return json.dumps(message, separators=(",", ":"), allow_nan=False)
