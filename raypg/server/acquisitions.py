"""Callers that want a lease: those who wait for one, and those who stopped waiting."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from raypg.portable import pack_error
from raypg.server.leases import Lease
from raypg.server.work import LeaseRequest, Refused

if TYPE_CHECKING:
    from raypg.server.engine import Engine

Key = tuple[str, int]
"""(client, number of its request)."""

MOST_LEFT = 1000
"""Callers remembered who left before their request came."""


class Acquisitions:
    """The requests for a lease of one worker."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: dict[Key, LeaseRequest] = {}
        self._left: dict[Key, None] = {}

    async def lease(
        self, key: Key, job: str, owner: dict[str, Any], timeout: float, seconds: float, begin: str | None
    ) -> Lease:
        """Wait for a connection, at most *timeout* seconds, and lease it for at most *seconds*.

        Raises:
            Refused: there is none to be had, *begin* failed, or the caller has left; carries the packed error.
            PoolClosedError: the pool is closed.
        """
        engine = self._engine
        if engine.closed is not None:
            raise engine.closed
        if key in self._left:
            del self._left[key]
            raise _left()
        now = engine.now()
        request = self._waiting[key] = LeaseRequest(begin, owner.get("application_name") or job, now, now + timeout)
        engine.enqueue(job, request, cost=1.0)
        engine.pump()
        try:
            connection = await request.future
        except asyncio.CancelledError:
            if request.ticket is not None:
                engine.queue.cancel(request.ticket)
            raise
        finally:
            del self._waiting[key]
        connection.dirty = True
        if request.cancelled:  # between the grant and this line
            engine.take_back(connection, asyncio.Event())
            raise _left()
        lease = engine.leases.grant(connection, owner, seconds)
        lease.request = key
        return lease

    def cancel(self, key: Key) -> None:
        """The caller of *key* has left. Its request may wait, be granted, or be still on its way: nothing is kept."""
        request = self._waiting.get(key)
        if request is not None:
            request.cancelled = True
            if request.ticket is not None:
                self._engine.queue.cancel(request.ticket)
            request.fail(_left().packed)
            return
        for lease in self._engine.leases:
            if lease.request == key:
                self._engine.leases.end(lease.token, "its caller had stopped waiting for it")
                return
        self._left[key] = None
        while len(self._left) > MOST_LEFT:
            del self._left[next(iter(self._left))]

    def client_died(self, client: str) -> None:
        """Nobody waits any more for what *client* had asked for."""
        for key in tuple(self._waiting):
            if key[0] == client:
                self.cancel(key)


def _left() -> Refused:
    return Refused(pack_error(TimeoutError("its caller stopped waiting for a connection")))
