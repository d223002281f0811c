"""Probes: the few statements with which a worker finds out whether the server is well again.

No caller's statement is used for it: callers are refused until the probes have succeeded.
"""

from __future__ import annotations

import asyncio
import time

from raypg.errors import ConnectError
from raypg.server.connection import ServerConnection
from raypg.server.connection_set import ConnectionSet
from raypg.server.guard import Guard

PROBE_TIMEOUT = 2.5
"""Seconds that a probe may take, the connecting included. Less than the Breaker's patience with a prober."""


class Prober:
    """Probes while the breaker is half open.

    Args:
        connections: where a connection is taken from, or opened.
        guard: whom to ask for permission, and to tell the outcome.
    """

    def __init__(self, connections: ConnectionSet, guard: Guard) -> None:
        self._connections = connections
        self._guard = guard
        self._task: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Begin to probe if probes are wanted and none are under way. To be called often."""
        if self._task is not None and self._task.done():
            self._task.result()  # a fault of ours is not to be swallowed
            self._task = None
        if self._task is None and (token := self._guard.permit_probe()):
            self._task = asyncio.get_running_loop().create_task(self._probe(token))

    async def _probe(self, token: int) -> None:
        """Probe until no more probes are wanted, one after the other: the first one shows most of it."""
        while token:
            started = time.monotonic()
            try:
                async with asyncio.timeout(PROBE_TIMEOUT):
                    answered = await self._ask()
            except ConnectError as error:
                self._guard.probe_failed(token, time.monotonic() - started, error)
                return
            except TimeoutError:
                late = ConnectError(f"the server did not answer a probe within {PROBE_TIMEOUT:g} s")
                self._guard.probe_failed(token, PROBE_TIMEOUT, late)
                return
            except BaseException:
                self._guard.probe_given_up(token)
                raise
            if answered is None:
                self._guard.probe_given_up(token)  # every connection is leased; look again when one is not
                return
            seconds = time.monotonic() - started
            if answered:
                self._guard.probe_passed(token, seconds)
            else:
                self._guard.probe_failed(token, seconds, ConnectionError("the server ended a new connection"))
            token = self._guard.permit_probe()

    async def _ask(self) -> bool | None:
        """Whether the server answers on a connection; ``None`` if there is none to ask on.

        Raises:
            ConnectError: it does not let us in.
        """
        connections = self._connections
        while (connection := connections.take_idle()) is not None:
            if await self._answers(connection):
                return True  # else it is dead since long; only a new one can tell
        if not connections.may_open:
            return None
        return await self._answers(await connections.open())

    async def _answers(self, connection: ServerConnection) -> bool:
        answered = False
        try:
            answered = await connection.is_alive() and await connection.ping(PROBE_TIMEOUT)
        finally:
            if answered:
                self._connections.put_back(connection)
            else:
                self._connections.drop(connection)
        return answered
