"""One connection to PostgreSQL, owned by one worker: opened, polled, used, reset, cancelled, closed.

What is known after a failure follows one rule: an error of severity ERROR on a connection that answers again proves
that the statement did not take effect; a connection that dies under a statement proves nothing.
"""

from __future__ import annotations

import asyncio
import math
import random
import select
import time
from collections.abc import Sequence
from typing import Any

import asyncpg

from raypg import messages, naming
from raypg.core import health
from raypg.core.backoff import jittered
from raypg.core.sql_text import quoted
from raypg.server import _asyncpg, pooler, witness
from raypg.server.begin import begin_with
from raypg.server.guard import Guard
from raypg.server.held import Held
from raypg.server.outcomes import ConnectionLost, last_words, outcome_of, timed_out
from raypg.server.pipelining import Pipeline, Prepared, Told

CANCEL_GRACE = 5.0
"""Seconds that a server may take to answer a cancel request before its connection is given up."""

CANCEL_AGAIN = 0.1
"""Seconds after which a statement that goes on in spite of a cancel request is sent another one."""

MOST_ATTEMPTS = 4
"""How often a statement is sent whose table or prepared statement changes each time before it runs."""

FRESH = 0.001
"""Seconds after an answer in which the connection need not be polled: the loop has just read from its socket."""

STEP = -1
"""A mode beside those of :mod:`raypg.messages`: the arguments are a coroutine function of our own, which is given the
asyncpg connection; the statement is what it is about. What it returns is the payload."""

LIFETIME_JITTER = 0.1
"""Connections opened together must not all be replaced together."""

RESET = """
RESET SESSION AUTHORIZATION;
RESET ROLE;
SELECT pg_catalog.pg_advisory_unlock_all();
CLOSE ALL;
UNLISTEN *;
RESET ALL;
DISCARD TEMP;
DISCARD SEQUENCES;
DO $raypg$ DECLARE n pg_catalog.text; BEGIN
  FOR n IN SELECT name FROM pg_catalog.pg_prepared_statements WHERE from_sql LOOP
    EXECUTE pg_catalog.format('DEALLOCATE %I', n);
  END LOOP;
END $raypg$;
"""
"""Undoes whatever a statement may have left in its session, in one round trip.

``DISCARD ALL`` would do, but it also drops asyncpg's own prepared statements, and with them the speed of every later
call; statements that the *user* prepared are dropped by name instead.
"""


class ServerConnection:
    """A connection and what its worker must know about it.

    ``pooled``: a transaction pooler is at the other end. Then only a transaction has one session for itself, and
    ``pid`` is no backend's but a number of the pooler.

    ``taken_at``, ``uses``: since when it is in use now, and by how many callers.

    ``held_up``: seconds in which what runs has waited for its own caller, who reads slowly.

    ``guard``: whom to tell how statements end; ``None`` while it is opened. ``held``: what is being written to.
    """

    __slots__ = (
        "_cancel_reason",
        "_cancel_until",
        "_cancelling",
        "_pipeline",
        "_poll",
        "abandoned",
        "application_name",
        "busy",
        "dirty",
        "expires_at",
        "guard",
        "health",
        "held",
        "held_up",
        "last_used",
        "lease",
        "number",
        "opened_at",
        "pid",
        "pooled",
        "raw",
        "taken_at",
        "used",
        "uses",
    )

    def __init__(
        self,
        raw: asyncpg.Connection,
        number: int,
        now: float,
        lifetime: float | None,
        application_name: str = "",
        *,
        pooled: bool = False,
    ) -> None:
        self.raw = raw
        self.number = number
        self.application_name = application_name
        self.pooled = pooled
        self.pid: int = raw.get_server_pid()
        self.opened_at = now
        self.last_used = self.taken_at = now
        self.expires_at = math.inf if lifetime is None else now + jittered(lifetime, LIFETIME_JITTER, random.random())
        self.health = health.FULL
        self.guard: Guard | None = None
        self.held: Held | None = None
        self.held_up = 0.0
        self.used = self.uses = 0
        self.dirty = False
        self.abandoned = False
        self.busy = False
        self.lease: str | None = None
        self._cancelling: asyncio.Task[None] | None = None
        self._cancel_reason: str | None = None
        self._cancel_until: float | None = None
        self._pipeline = Pipeline(raw)
        self._poll = select.poll()
        self._poll.register(_asyncpg.file_descriptor(raw), select.POLLIN | select.POLLRDHUP)

    @property
    def identifier(self) -> str:
        """Name of this connection towards users; not a key to it."""
        return f"conn_{self.number}_{self.pid}"

    async def is_alive(self) -> bool:
        """Whether the connection still stands, asked of the socket: no round trip, about a microsecond.

        A backend that was terminated while idle has sent its last words already, but asyncpg only notices when the
        event loop next reads; without this check the next caller's statement would be written into a dead socket and
        its outcome unknown.
        """
        if self.raw.is_closed():
            return False
        if self._pipeline.may_have_ended:
            self._pipeline.may_have_ended = False
            return await self.ping(CANCEL_GRACE)
        if time.monotonic() - self.last_used < FRESH:
            return True
        for _ in range(4):
            if not self._poll.poll(0):
                return True
            await asyncio.sleep(0)  # lets the protocol read what lies there: a notice, or the end
            if self.raw.is_closed():
                return False
        hung_up = select.POLLRDHUP | select.POLLHUP | select.POLLERR
        return not any(event & hung_up for _, event in self._poll.poll(0))

    async def run(
        self,
        mode: int,
        sql: str,
        arguments: Any,
        timeout: float | None = None,
        settings: messages.Settings = None,
        simple: bool = False,
        reads: bool = False,
    ) -> tuple[Any, tuple[str, ...] | None]:
        """Run one statement.

        Args:
            mode: what is wanted back, see :mod:`raypg.messages`.
            arguments: tuple of parameters; for ``MANY`` a list of them.
            timeout: seconds until it is cancelled on the server.
            settings: PostgreSQL settings for it alone; it then has a transaction of its own around it.
            simple: send the text by the simple protocol (several statements in one text; only inside a lease).
            reads: it is proven to do no harm when it runs twice.

        Returns:
            (payload, column names): payload is a list of tuples for ``FETCH`` and ``ROW``, the command tag for
            ``STATUS``, (rows, tag) for ``BOTH``, ``None`` for ``MANY``.

        Raises:
            ConnectionLost: the outcome is unknown.
            QueryTimeoutError: cancelled by its timeout, had no effect.
            asyncpg.PostgresError, asyncpg.InterfaceError: had no effect; the connection is good.
            ResultLostError: it took effect, but its rows could not be read; the connection is good.
            StatementNotAllowedError: a pooler is in front, and it needs a session; nothing was sent.
        """
        guard = self.guard
        if guard is None:
            return await self._run(mode, sql, arguments, timeout, settings, simple, reads)
        token, started, self.held_up = guard.token, time.monotonic(), 0.0
        try:
            outcome = await self._run(mode, sql, arguments, timeout, settings, simple, reads)
        except ConnectionLost as lost:
            if lost.sent:
                guard.lost(token, started, lost)
            raise
        except Exception as error:
            if guard.answered(token, self.last_used - started - self.held_up, self.last_used, error):
                self.health = health.after_error(self.health)
            raise
        guard.succeeded(token, self.last_used - started - self.held_up, self.last_used)
        return outcome

    async def _run(
        self,
        mode: int,
        sql: str,
        arguments: Any,
        timeout: float | None,
        settings: messages.Settings,
        simple: bool,
        reads: bool,
    ) -> tuple[Any, tuple[str, ...] | None]:
        raw = self.raw
        if self.pooled:
            in_transaction = settings is not None or raw.is_in_transaction()
            refused = pooler.refusal(sql, in_transaction=in_transaction, leased=self.lease is not None)
            if refused is not None:
                raise refused
        undone = reads or settings is not None
        timer: asyncio.TimerHandle | None = None
        if timeout is not None:
            timer = asyncio.get_running_loop().call_later(max(timeout, 0.0), self.cancel, "timeout")
        self._cancel_reason = self._cancel_until = None
        self.used += 1
        self.busy = True
        try:
            for _ in range(MOST_ATTEMPTS - 1):
                alone = not raw.is_in_transaction()
                try:
                    return await self._attempt(mode, sql, arguments, settings, simple)
                except Exception as error:
                    if raw.is_closed() or self._cancelling is not None or not self._may_repeat(error, alone, undone):
                        raise
            return await self._attempt(mode, sql, arguments, settings, simple)
        except asyncpg.PostgresError as error:
            if raw.is_closed():
                raise ConnectionLost(last_words(error)) from error
            if error.sqlstate == "57014" and self._cancel_reason == "timeout":
                raise timed_out(timeout) from error
            raise
        except (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            if raw.is_closed():
                raise ConnectionLost(None, sent=not _asyncpg.was_not_sent(error)) from error
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if self._cancelling is not None:
                await self._cancel_over()
            self.busy = False
            self.last_used = time.monotonic()

    async def _cancel_over(self) -> None:
        """The cancel request must have been processed before anybody else uses this connection, or it would cancel the
        next statement."""
        while (request := self._cancelling) is not None:
            await asyncio.shield(request)
            if self._cancelling is request:  # or another one was sent meanwhile
                self._cancelling = None

    def prepared(self, sql: str) -> Any:
        """The prepared statement for *sql*, if this connection has it ready, or ``None``."""
        return self._pipeline.prepared(sql)

    async def run_together(self, statements: Sequence[Prepared], told: Told) -> None:
        """Run several reads, each on its own, in one write; see :meth:`Pipeline.run`. Returns when all are answered,
        or the connection is lost."""
        self._cancel_reason = self._cancel_until = None
        self.used += len(statements)
        self.busy = True
        try:
            await self._pipeline.run(statements, told)
        finally:
            if self._cancelling is not None:
                await self._cancel_over()
            self.busy = False
            self.last_used = time.monotonic()

    def _may_repeat(self, error: Exception, alone: bool, undone: bool) -> bool:
        """Whether *error* only says that asyncpg's memory is out of date, and the statement may be sent once more.

        Args:
            alone: no transaction was open before it.
            undone: what it did is rolled back if its rows cannot be read, or it only reads.
        """
        if isinstance(error, asyncpg.InvalidSQLStatementNameError) and "__asyncpg_" in str(error):
            # The user dropped asyncpg's prepared statements: the server did not know this one, so it did not run.
            # (The name tells it from a statement of the user's own, missed by a procedure that has done things.)
            _asyncpg.forget_statements(self.raw)
            return alone
        if isinstance(error, asyncpg.InvalidCachedStatementError):
            return alone  # its table has changed; the server refused to run the old plan
        # A type has changed. Found out when the rows were read: the statement has run. asyncpg has looked again.
        return isinstance(error, asyncpg.OutdatedSchemaCacheError) and undone

    async def _attempt(
        self, mode: int, sql: str, arguments: Any, settings: messages.Settings, simple: bool
    ) -> tuple[Any, tuple[str, ...] | None]:
        raw = self.raw
        if settings is None:
            sending = self._send(mode, sql, arguments, simple)
            if witness.is_needed(mode, sql, arguments, simple):
                return await witness.watched(raw, sql, sending)
            return await sending
        try:
            await raw.execute(begin_with(settings, self.application_name))
            outcome = await self._send(mode, sql, arguments, simple)
        except BaseException:
            if not raw.is_closed():
                await raw.execute("ROLLBACK")
            raise
        await raw.execute("COMMIT")
        return outcome

    def _noticed(self, status: str) -> str:
        if status in ("DISCARD ALL", "DEALLOCATE ALL"):
            _asyncpg.forget_statements(self.raw)  # a transaction would not survive finding it out
        if self.guard is not None:
            self.guard.figures.wrote(status)
        return status

    async def _send(self, mode: int, sql: str, arguments: Any, simple: bool) -> tuple[Any, tuple[str, ...] | None]:
        raw = self.raw
        if mode == STEP:
            return await arguments(raw), None
        if mode == messages.MANY:
            await raw.executemany(sql, arguments)
            if self.guard is not None:
                self.guard.figures.wrote_each(sql, len(arguments))
            return None, None
        if mode == messages.STATUS and not arguments:
            return self._noticed(await raw.execute(sql)), None
        if simple:
            status = self._noticed(await raw.execute(sql))
            return ([], status) if mode == messages.BOTH else [], None
        limit = 1 if mode == messages.ROW else 0
        records, status = await _asyncpg.fetch_with_status(raw, sql, arguments, limit)
        self._noticed(status)
        if self.guard is not None:
            return self.guard.figures.fetched(mode, records, status)
        return outcome_of(mode, records, status)

    def opening(self, begin: str | None, name: str) -> str | None:
        """Text that begins a lease: *begin*, if any, and *name* in ``application_name`` for as long as it is held.

        Behind a transaction pooler only a transaction has a session to be named.
        """
        if begin is None and self.pooled:
            return None
        setting = f"application_name = {quoted(naming.application_name(self.application_name, name))}"
        # By SET LOCAL, which takes no snapshot: the transaction's first is for its own first statement to take.
        return f"SET {setting}" if begin is None else f"{begin}; SET LOCAL {setting}"

    def cancel(self, reason: str) -> None:
        """Cancel what runs now, on the server. ``run`` then ends as the server says: cancelled, or done after all."""
        if self._cancelling is None:
            self._cancel_reason = reason
        elif not self._cancelling.done():
            return
        self._cancelling = asyncio.get_running_loop().create_task(self._cancel(self.used))

    async def _cancel(self, run: int) -> None:
        try:
            await asyncio.wait_for(_asyncpg.send_cancel(self.raw), CANCEL_GRACE)
        except (OSError, TimeoutError):
            # Not even a cancel request gets through: nothing more will come over this connection.
            self.abandon()
            return
        asyncio.get_running_loop().call_later(CANCEL_AGAIN, self._insist, run, time.monotonic() + CANCEL_GRACE)

    def _insist(self, run: int, until: float) -> None:
        """Ask again: a request that comes before its statement has begun is lost, and the server does not say so."""
        if not self.busy or self.used != run or self.raw.is_closed():
            return
        if self._cancel_until is None:
            self._cancel_until = until
        if time.monotonic() >= self._cancel_until:
            self.abandon()
        else:
            self.cancel("again")

    async def reset(self) -> None:
        """Put the session back to how it was when the connection was opened. One round trip.

        Behind a transaction pooler only an open transaction is ended: there the session is the pooler's to reset.

        Raises:
            ConnectionLost: the connection died.
            asyncpg.PostgresError: the session cannot be reset; the connection must not be used again.
        """
        try:
            rollback = "ROLLBACK;" if self.raw.is_in_transaction() else ""
            undo = rollback if self.pooled else rollback + RESET
            if undo:
                await self.raw.execute(undo, timeout=CANCEL_GRACE)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            if isinstance(error, TimeoutError):
                self.abandon()
            if self.raw.is_closed():
                raise ConnectionLost(None) from error
            raise
        self.dirty = False
        if self.held is not None:
            self.held.settle(self)

    async def ping(self, timeout: float) -> bool:
        """Whether the server answers within *timeout* seconds."""
        try:
            # Not an empty query: asyncpg 0.32 fails over the answer to one (AttributeError).
            await self.raw.execute("SELECT 1", timeout=timeout)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
            return False
        self.last_used = time.monotonic()
        self.health = health.after_ping(self.health)
        return True

    async def close(self, timeout: float = 2.0) -> bool:
        """Close the connection; True when the server has confirmed it, so that its slot is free."""
        if self.raw.is_closed():
            return True
        try:
            await self.raw.close(timeout=timeout)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            self.abandon()
            return False
        return True

    def abandon(self) -> None:
        """Give the connection up without the server's consent: its backend may live on until the server notices."""
        self.abandoned = True
        self.raw.terminate()
