"""Asks one server, over the connections that a worker has to it, what it is and how far its log has come.

However many want to know at a time, one question is under way: whoever wants an answer to a question that is asked
*from now on* waits for that one to be answered, and shares the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import asyncpg

from raypg.core.replicas import Role
from raypg.errors import ConnectError
from raypg.portable import PortableError, unpack_error
from raypg.server import roles
from raypg.server.connection import STEP, ServerConnection
from raypg.server.outcomes import ConnectionLost

if TYPE_CHECKING:
    from raypg.core.fair_queue import Ticket
    from raypg.server.engine import Engine
    from raypg.server.work import Work

ANSWER_WITHIN = 2.0
"""Seconds in which a server must answer a question that was sent to it."""


class Question:
    """One question, waiting for a connection or under way."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.arrived = observer.engine.now()
        self.deadline = math.inf
        self.ticket: Ticket[Work] | None = None
        self.answer: asyncio.Future[Role | None] = asyncio.get_running_loop().create_future()

    @property
    def begun(self) -> bool:
        return False

    def fail(self, error: PortableError) -> None:
        self._observer.unanswered(self, unpack_error(error))

    async def serve(self, engine: Engine, connection: ServerConnection) -> ServerConnection | None:
        observer = self._observer
        asked_at = engine.now()
        timer = asyncio.get_running_loop().call_later(ANSWER_WITHIN, observer.silent, self, connection)
        observer.sent(self)
        try:
            row, _ = await connection.run(STEP, roles.QUERY, _fetch, reads=True)
        except ConnectionLost:
            engine.connections.drop(connection)
            observer.unanswered(self, ConnectError(f"{observer.where} ended the connection"))
            return None
        except Exception as error:
            observer.unanswered(self, error)
            return connection
        finally:
            timer.cancel()
        observer.answered(self, asked_at, roles.role_of(row))
        return connection


async def _fetch(raw: asyncpg.Connection) -> Any:
    return await raw.fetchrow(roles.QUERY)


class Observer:
    """Asks one server.

    Args:
        engine: through which it is asked.
        where: the server, for errors.
        take: told of each answer, and when its question was sent.
        failed: told why there is none, and whether the server hangs.
    """

    def __init__(
        self,
        engine: Engine,
        where: str,
        take: Callable[[float, Role], None],
        failed: Callable[[BaseException, bool], None],
    ) -> None:
        self.engine = engine
        self.where = where
        self._take = take
        self._failed = failed
        self._under_way: Question | None = None
        self._next: Question | None = None

    async def ask(self) -> Role | None:
        """What the server says to a question that is sent from now on; ``None`` if it does not answer."""
        question = self._next
        if question is None:
            question = self._next = Question(self)
            if self._under_way is None:
                self._enqueue(question)
        return await asyncio.shield(question.answer)

    async def look(self, raw: asyncpg.Connection) -> Role:
        """Ask over a connection that is just being opened, which nobody has used; see :attr:`Connector.on_open`."""
        asked_at = self.engine.now()
        role = roles.role_of(await raw.fetchrow(roles.QUERY))
        self._take(asked_at, role)
        return role

    def _enqueue(self, question: Question) -> None:
        engine = self.engine
        if engine.closed is not None:
            self.unanswered(question, engine.closed)
        elif engine.guard.refusing:
            self.unanswered(question, ConnectError(f"{self.where}: {engine.guard.machine.reason}"))
        else:
            engine.put_first(question)

    # --- from the question ---

    def sent(self, question: Question) -> None:
        """It is on its way to the server."""
        self._under_way, self._next = question, None

    def answered(self, question: Question, asked_at: float, role: Role) -> None:
        """The server has answered."""
        try:
            self._take(asked_at, role)
        finally:
            self._over(question, role)

    def unanswered(self, question: Question, error: BaseException) -> None:
        """There will be no answer."""
        if not question.answer.done():
            self._failed(error, False)
        self._over(question, None)

    def silent(self, question: Question, connection: ServerConnection) -> None:
        """The server has not answered in time: it hangs, and so does what else runs there."""
        if not question.answer.done():
            error = ConnectError(f"{self.where} did not answer within {ANSWER_WITHIN:g} s", "connection_timeout")
            self._failed(error, True)
            self._over(question, None)
            connection.abandon()

    def _over(self, question: Question, role: Role | None) -> None:
        with contextlib.suppress(asyncio.InvalidStateError):
            question.answer.set_result(role)
        if self._next is question:
            self._next = None
        elif self._under_way is question:
            self._under_way = None
            if self._next is not None:
                self._enqueue(self._next)
