"""How much the pipelines of this process may have under way to one pool.

A little is free. Who wants more asks the Pipeline actor, in the background, once a second for all pipelines of the
process together; until it answers, and when it does not, what was granted last holds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from raypg import cluster
from raypg.calling import send
from raypg.core.credits import SECONDS

if TYPE_CHECKING:
    from raypg.dispatch import Dispatcher

logger = logging.getLogger(__name__)

FREE = 2_000_000
"""Bytes that a process may have under way without asking anybody."""

PER_CONNECTION = 4_000_000
"""Bytes that a database may be given at a time for each connection of its pool."""

ANSWER_WITHIN = 2.0
"""Seconds in which the actor must answer; it takes about as long to start."""


class Credits:
    """The credit of one event loop for one pool.

    Args:
        find: finds or starts the Pipeline actor.
        pool, client, job: whose credit it is.
        connections: of the pool.
    """

    def __init__(
        self, find: Callable[[], Any], pool: str, client: str, job: str, connections: Callable[[], int]
    ) -> None:
        self._find = find
        self._who = (client, job)
        self._pool = pool
        self._connections = connections
        self.granted = FREE
        self.under_way = 0
        self._wanted = 0
        self._room = asyncio.Event()
        self._asking: asyncio.Task[None] | None = None

    async def take(self, size: int) -> None:
        """Wait until *size* more bytes may be under way. One message always may."""
        self._wanted = max(self._wanted, self.under_way + size)
        while self.under_way and self.under_way + size > self.granted:
            self._ask()
            self._room.clear()
            await self._room.wait()
        self.under_way += size

    def give_back(self, size: int) -> None:
        """So many bytes have been answered."""
        self.under_way -= size
        self._room.set()

    def _ask(self) -> None:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._keep_asking())

    async def _keep_asking(self) -> None:
        """Renew the credit while it is used for more than what is free."""
        actor: Any = None
        while True:
            # A little more than was used, so that a growing load shows itself.
            wanted = max(self._wanted, self.under_way) * 2 if self._wanted > FREE or self.under_way else 0
            self._wanted = self.under_way
            try:
                if actor is None:
                    actor = await asyncio.to_thread(self._find)
                capacity = self._connections() * PER_CONNECTION
                answer = send(actor.take, self._pool, capacity, *self._who, wanted)
                granted = int(await asyncio.wait_for(answer, ANSWER_WITHIN))
            except Exception as error:  # away, starting, or of another version: we go on as we are
                logger.debug("pool %s: no credit from the Pipeline actor: %s", self._pool, error)
                actor = None
            else:
                self.granted = max(granted, FREE) if not wanted else granted
                self._room.set()
            if not wanted:
                self.granted = FREE
                return
            await asyncio.sleep(SECONDS)


_credits: WeakKeyDictionary[Dispatcher, Credits] = WeakKeyDictionary()


def credits_of(dispatcher: Dispatcher) -> Credits:
    """The credit that all pipelines over *dispatcher* share."""
    found = _credits.get(dispatcher)
    if found is None:
        found = _credits[dispatcher] = Credits(
            cluster.find_or_start_pipeline,
            dispatcher.name,
            dispatcher.client,
            dispatcher.job,
            connections_of(dispatcher),
        )
    return found


def connections_of(dispatcher: Dispatcher) -> Callable[[], int]:
    """How many connections the pool has."""
    config = dispatcher.config  # not the dispatcher: it must be able to go
    return lambda: int(config.max_connections)
