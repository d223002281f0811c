"""What the Pool actor asks the server itself, over its control connection: what it has room for, which given-up
connections are gone, and that those of dead workers end.

What may be ended is proven to be ours: see :mod:`raypg.server.control`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Sequence
from typing import Any

from raypg.core import sizing
from raypg.core.budget import Budget
from raypg.core.limits import Limits
from raypg.server.control import Control

logger = logging.getLogger(__name__)

IDLE_FOR = 30.0
"""Seconds after which an unused control connection is closed."""

GONE_WITHIN = 10.0
"""Seconds to wait for the connections of a dead worker to disappear before they are ended once more."""

AGAIN = 0.5
"""Seconds until a server that could not be asked is asked again."""

SELF_REAPING = 2.0
"""Seconds in which the backends of a dead process notice its death by themselves: four times
``client_connection_check_interval``. Below a cap of 4 control has no connection of its own. If nobody can lend it one
for so long it does without; but to ask after connections that must have ended by now, it takes the place of one."""

REPLICA_WITHIN = 3.0
"""Seconds that a control connection to a replica may take, and all that a start asks of it."""

UNREACHABLE = 30.0
"""Seconds after which a replica that cannot be reached is taken to have no connections of a dead worker any more: it
may stay away for long, and what they had of the cap is not to be missed until then."""

AUTHENTICATION_TIMEOUT = 60.0
"""PostgreSQL's default for ``authentication_timeout``, in seconds, until the server has told its own."""


class NoRoomError(Exception):
    """Every connection of the cap is in use: none can be lent for control."""


class Reaper:
    """Asks the server, one question at a time.

    Args:
        pool: its name.
        controls: the control connections to all servers, the primary's first. One is open at a time.
        prefix: what the application name of each connection of the pool begins with.
        cap: gives the most connections of the pool.
    """

    def __init__(self, pool: str, controls: Sequence[Control], prefix: str, cap: Callable[[], int]) -> None:
        self._pool = pool
        self._controls = controls
        self._prefix = prefix
        self._cap = cap
        self.has_room: Callable[[], bool] = lambda: False
        """Whether a connection may be opened that is in no account."""
        self.news: Callable[[], None] = lambda: None
        """Called when shares may move."""
        self.ended: Callable[[Any], None] = lambda life: None
        """Called when all connections of a life are gone."""
        self._turn = asyncio.Lock()
        self._reaping: dict[Hashable, asyncio.Task[None]] = {}
        self._authentication_timeout = AUTHENTICATION_TIMEOUT
        self._borrows = False

    @property
    def holds(self) -> int:
        """Connections that the division must leave free for control now, though none may be kept for it."""
        return int(self._borrows or any(control.is_open for control in self._controls))

    @contextlib.asynccontextmanager
    async def _looking(self, of_the_dead: bool = False, server: int = 0) -> AsyncIterator[Control]:
        """The control connection. Of a small cap one is borrowed for it, and given back.

        Args:
            server: to the primary (0) or a replica.
            of_the_dead: to ask after connections that nobody uses any more.

        Raises:
            NoRoomError: none can be lent.
        """
        async with self._turn:
            control = self._controls[server]
            for other in self._controls:
                if other is not control:
                    await other.close()
            if sizing.reserve(self._cap()):
                await self._open(server)
                yield control
                return
            self._borrows = True
            self.news()
            try:
                if not control.is_open:
                    await self._wait_for_room(of_the_dead)
                await self._open(server)
                yield control
            finally:
                try:
                    await control.close()
                finally:
                    self._borrows = False
                    self.news()

    async def _open(self, server: int) -> None:
        """A replica that does not answer must not hold up what is asked of others."""
        if server:
            async with asyncio.timeout(REPLICA_WITHIN):
                await self._controls[server].open()

    async def _wait_for_room(self, of_the_dead: bool) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + SELF_REAPING
        while not self.has_room():
            if loop.time() > until:
                if of_the_dead:
                    return
                raise NoRoomError("all connections of the pool are in use, none can be lent for control")
            await asyncio.sleep(0.02)

    # --- questions ---

    async def limits(self) -> Limits | None:
        """What the server has room for; ``None`` behind a pooler.

        Raises:
            ConnectError: it cannot be reached.
            NoRoomError: it cannot be asked now.
        """
        async with self._looking() as control:
            limits = await control.limits(self._prefix)
        if limits is not None:
            self._authentication_timeout = limits.authentication_timeout
        return limits

    async def activity(self) -> dict[str, Any]:
        """Who waits for whom on the primary; see :func:`raypg.server.activity.describe`. For those who watch: nothing
        is taken from the pool for it.

        Raises:
            ConnectError: the server cannot be reached.
            NoRoomError: there is no connection for it.
        """
        kept = sizing.reserve(self._cap())
        if kept and len(self._controls) == 1:
            return await self._controls[0].activity(self._prefix)  # between the questions of the others
        if not kept and (self._turn.locked() or not self.has_room()):
            raise NoRoomError(f"a pool of {self._cap()} connections has none to look with")
        async with self._looking() as control:
            return await control.activity(self._prefix)

    async def gone(self, backends: list[tuple[int, int]]) -> set[tuple[int, int]]:
        """Those of *backends*, (server, process id), that their server does not show any more; none of those of a
        server that cannot be asked."""
        gone: set[tuple[int, int]] = set()
        for server in sorted({server for server, _ in backends}):
            pids = [pid for place, pid in backends if place == server]
            try:
                async with self._looking(of_the_dead=True, server=server) as control:
                    pids = await control.gone(pids)
            except Exception as error:
                logger.debug("pool %s: control connection failed: %s", self._pool, error)
                if not _is_down(server, error):
                    continue
            gone.update((server, pid) for pid in pids)
        return gone

    async def sweep(self, living: Callable[[], Collection[str]]) -> None:
        """End the connections of workers that nobody knows of any more; returns when they are gone.

        Raises:
            Exception: the server cannot be asked.
        """
        total = 0
        for server in range(len(self._controls)):
            try:
                async with asyncio.timeout(REPLICA_WITHIN if server else None), self._looking(server=server) as control:
                    while not (ended := await control.end_orphans(self._prefix, living(), GONE_WITHIN))[1]:
                        pass
            except Exception as error:
                if not server:
                    raise
                logger.warning("pool %s: cannot look for old connections to a replica: %s", self._pool, error)
            else:
                total += ended[0]
        if total:
            logger.warning("pool %s: ended %d connections of workers that are gone", self._pool, total)

    # --- the dead ---

    async def bury(self, budget: Budget[Any], life: Hashable, name: str) -> None:
        """That life is over for certain: its share is free when its connections are gone."""
        ended = await self._end(name, lambda: True, dead=True)
        self.ended(life)
        known = budget.accounts.pop(life, None)
        if known is not None and (ended or known.charge):
            logger.info("pool %s: %s is gone, with %d connections that had to be ended", self._pool, name, ended)
        self.news()

    def reap(self, budget: Budget[Any], life: Hashable, name: str, still_lost: Callable[[], bool], had: int) -> None:
        """That life is silent: its connections are ended. It may still be there, and may have been about to connect:
        what it did not hold is free only when the server has given up every client that has not finished connecting.

        But if all that it *had* are gone already, a kernel has closed them: that of its host, when its process died.

        Does nothing while it is at it already.
        """
        if life not in self._reaping:
            task = asyncio.get_running_loop().create_task(self._reap(budget, life, name, still_lost, had))
            self._reaping[life] = task
            task.add_done_callback(lambda _: self._reaping.pop(life, None))

    async def _reap(
        self, budget: Budget[Any], life: Hashable, name: str, still_lost: Callable[[], bool], had: int
    ) -> None:
        ended = await self._end(name, still_lost)
        if not still_lost() or life not in budget.accounts:
            return
        self.ended(life)
        if had and not ended:
            budget.leave(life)
        else:
            budget.ended(life, ended)
        self.news()
        loop = asyncio.get_running_loop()
        until = loop.time() + self._authentication_timeout
        while still_lost() and life in budget.accounts and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(AGAIN)
        await self._end(name, still_lost)
        if still_lost() and life in budget.accounts:
            budget.leave(life)
            self.news()
        while still_lost():  # noqa: ASYNC110 - there is nothing left to do for it, and it must not begin anew
            await asyncio.sleep(AGAIN)

    async def _end(self, name: str, wanted: Callable[[], bool], dead: bool = False) -> int:
        """End the backends of *name* on all servers until none is left; how many there were."""
        return sum([await self._end_on(server, name, wanted, dead) for server in range(len(self._controls))])

    async def _end_on(self, server: int, name: str, wanted: Callable[[], bool], dead: bool) -> int:
        ended, complained, began = 0, False, time.monotonic()
        while wanted():
            try:
                async with self._looking(dead, server) as control:
                    more, clear = await control.end_backends(name, GONE_WITHIN)
            except Exception as error:
                if _is_down(server, error) or (server and time.monotonic() - began > UNREACHABLE):
                    break
                # If the server is down, the backends are gone with it: look again soon.
                if not complained:
                    complained = True
                    logger.warning("pool %s: cannot look for connections of a dead worker: %s", self._pool, error)
                await asyncio.sleep(AGAIN)
                continue
            ended += more
            if clear:
                break
        return ended

    async def rest(self) -> None:
        """Close the connection if it was not used lately, or if the cap has none to keep for it any more."""
        for control in self._controls:
            await control.rest(time.monotonic(), IDLE_FOR if sizing.reserve(self._cap()) else 0.0)

    async def close(self) -> None:
        """End what goes on, and the connection."""
        for task in tuple(self._reaping.values()):
            task.cancel()
        for control in self._controls:
            await control.close()


def _is_down(server: int, error: Exception) -> bool:
    """Whether a replica has no process any more, and so no connections. It may stay away for long: what it held must
    not be missed until then. (Of the primary nobody has connections meanwhile, so it can be waited for.)"""
    return bool(server) and isinstance(error.__cause__, ConnectionRefusedError)
