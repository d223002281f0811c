"""Something of our own that needs a connection, any connection, for a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from raypg.portable import PortableError, pack_error
from raypg.server.connection import ServerConnection
from raypg.server.outcomes import ConnectionLost
from raypg.server.work import Refused

if TYPE_CHECKING:
    from raypg.core.fair_queue import Ticket
    from raypg.server.engine import Engine

Work = Callable[[ServerConnection], Awaitable[Any]]


class Errand:
    """Work that waits for a connection. It may begin anew on another one: it must do no harm when it runs twice."""

    __slots__ = ("_work", "arrived", "deadline", "future", "ticket")

    def __init__(self, work: Work, arrived: float, deadline: float) -> None:
        self._work = work
        self.arrived = arrived
        self.deadline = deadline
        self.ticket: Ticket[Any] | None = None
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @property
    def begun(self) -> bool:
        return False

    def fail(self, error: PortableError) -> None:
        if not self.future.done():
            self.future.set_exception(Refused(error))

    async def serve(self, engine: Engine, connection: ServerConnection) -> ServerConnection | None:
        engine.figures.waited(engine.now() - self.arrived, connection)
        connection.dirty = True
        try:
            result = await self._work(connection)
        except ConnectionLost:
            engine.connections.drop(connection)
            engine.put_first(self)
            return None
        except Exception as error:
            self.fail(pack_error(error))
            return connection
        if not self.future.done():
            self.future.set_result(result)
        return connection


async def run(engine: Engine, job: str, work: Work) -> Any:
    """Do *work* on some connection.

    Raises:
        Refused: there is none to be had, or *work* failed; carries the packed error.
    """
    now = engine.now()
    errand = Errand(work, now, now + engine.config.acquire_timeout)
    engine.enqueue(job, errand, cost=1.0)
    engine.pump()
    return await errand.future
