"""Something of our own that needs a connection, any connection, for a moment."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from raypg.portable import pack_error
from raypg.server.connection import ServerConnection
from raypg.server.outcomes import ConnectionLost
from raypg.server.work import Request

if TYPE_CHECKING:
    from raypg.server.engine import Engine

Work = Callable[[ServerConnection], Awaitable[Any]]


class Errand(Request[Any]):
    """Work that waits for a connection. It may begin anew on another one: it must do no harm when it runs twice."""

    __slots__ = ("_work",)

    def __init__(self, work: Work, arrived: float, deadline: float) -> None:
        super().__init__(arrived, deadline)
        self._work = work

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
