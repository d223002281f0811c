"""What actors that serve all pools of a cluster have in common: pools join, and are forgotten; the last one ends it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from typing import Any

import ray

KNOWN_WITHIN = 3.0
"""Seconds in which the workers of a running pool join an actor that is new."""

LINGER = 10.0
"""Seconds after the end of the last pool in which another one may begin before the actor ends."""


class ServingAll:
    """Knows each pool whose workers have joined.

    (Not generic: what ``Generic`` adds to a class Ray would take for methods of the actor.)
    """

    def __init__(self) -> None:
        self.incarnation = secrets.token_hex(4)
        self.pools: dict[str, Any] = {}
        self._forgotten = 0  # pools, so far
        self._joined = asyncio.Event()

    def joined(self) -> None:
        """A worker has joined: wake those who wait for its pool."""
        self._joined.set()
        self._joined = asyncio.Event()

    async def find(self, pool: str) -> Any:
        """What is known of *pool*, as soon as its first worker has joined; ``None`` if none does."""
        until = time.monotonic() + KNOWN_WITHIN
        while (known := self.pools.get(pool)) is None and (left := until - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._joined.wait(), left)
        return known

    async def forget(self, pool: str) -> None:
        """*pool* has ended."""
        self.pools.pop(pool, None)
        self._forgotten += 1

    async def rest(self) -> None:
        """A pool has ended: end too, if it was the last one, and no other begins soon."""
        forgotten = self._forgotten
        await asyncio.sleep(LINGER)
        if not self.pools and self._forgotten == forgotten:
            ray.actor.exit_actor()
