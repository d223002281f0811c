"""Reads that travel together: several statements of independent callers in one write to the server.

Only proven reads go together (they may run twice without harm), only such whose text has been quick so far and gains by
it as far as is known (:class:`raypg.core.patterns.FoldGain`), and only while more wait than there are connections. What
holds for a statement sent alone holds here too: its own transaction, error, timeout and cancellation. If the first of
them turns out slow, the others do not wait behind it: after ``STALL`` they are queued once more, and the answers that
still come for them here are thrown away.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import asyncpg

from raypg import messages
from raypg.core import health
from raypg.core.patterns import FoldGain, Frequent
from raypg.core.sql import Verdict
from raypg.portable import PortableError, pack_error
from raypg.server.connection import ServerConnection
from raypg.server.figures import TIMED_ROWS
from raypg.server.outcomes import ConnectionLost, last_words, outcome_of, timed_out
from raypg.server.pipelining import Prepared
from raypg.server.work import Statement

if TYPE_CHECKING:
    from raypg.server.engine import Engine

MOST = 8
"""Most reads in one write. More gains little (measured: 4 give 2.0 times the speed of one by one, 8 give 2.5 times, 16
give 2.9 times), and what waits behind a slow one grows."""

QUICK = 0.005
"""Seconds that a text may take to count as quick."""

STALL = 0.020
"""Seconds without an answer after which the reads behind the first are queued once more."""

MOST_FAMILIAR = 8
"""Statements that a new connection has prepared before it is used."""

_MODES = frozenset((messages.FETCH, messages.ROW, messages.BOTH, messages.STATUS))
OUT_OF_DATE = (
    asyncpg.InvalidCachedStatementError,
    asyncpg.InvalidSQLStatementNameError,
    asyncpg.OutdatedSchemaCacheError,
)


class Pace:
    """What one worker has learnt of the SQL texts that it ran last: how long each took lately, whether it gains to send
    several together, and which come most often."""

    def __init__(self, most: int = 1000) -> None:
        self._most = most
        self._seconds: OrderedDict[str, float] = OrderedDict()
        self.gain = FoldGain(most)
        self.frequent = Frequent()

    def note(self, sql: str, seconds: float, together: bool = False) -> None:
        """*sql* took so long. One slow run counts at once, and is forgotten over the next dozens."""
        known = self._seconds.pop(sql, 0.0)
        self._seconds[sql] = seconds if seconds > known else known + (seconds - known) * 0.1
        if len(self._seconds) > self._most:
            self._seconds.popitem(last=False)
        self.gain.note(sql, seconds, together)

    def is_quick(self, sql: str) -> bool:
        """Whether *sql* has run, and was quick."""
        return self._seconds.get(sql, QUICK) < QUICK

    def familiar(self) -> list[str]:
        """What a new connection is to prepare."""
        return self.frequent.top(MOST_FAMILIAR)


def gather(engine: Engine, connection: ServerConnection, first: Any) -> Reads | None:
    """*first* and what may travel with it, taken from the queue; ``None`` if *first* goes alone."""
    waiting = len(engine.queue)
    room = min(MOST - 1, waiting // max(engine.connections.total, 1))
    now = engine.now()
    if not room or connection.pooled or not _may_join(engine, connection, first, now):
        return None
    statements = [first]
    while len(statements) <= room:
        following = engine.queue.pop(now, lambda work: _may_join(engine, connection, work, now))
        if following is None:
            break
        statements.append(following)
    return Reads(engine, connection, statements) if len(statements) > 1 else None


def _may_join(engine: Engine, connection: ServerConnection, work: Any, now: float) -> bool:
    if not isinstance(work, Statement) or work.settings is not None or work.alone or work.cancelled:
        return False
    verdict: Verdict = work.verdict
    return (
        verdict.retryable
        and verdict.clean
        and work.mode in _MODES
        and engine.pace.is_quick(work.sql)
        and engine.pace.gain.pays(work.sql)
        and (not verdict.relations or engine.catalogue.known_plain(verdict.relations, now))
        and not (engine.writes.watched and engine.writes.reach.may_write(work.sql))
        and connection.prepared(work.sql) is not None
    )


class Reads:
    """One run of several reads on one connection. A statement is *attached* while its outcome is to come from here."""

    def __init__(self, engine: Engine, connection: ServerConnection, statements: Sequence[Statement]) -> None:
        self._engine = engine
        self._connection = connection
        self._attached: list[Statement | None] = list(statements)
        self._first = 0  # the statement whose answer comes next
        self._since = 0.0  # when it began to run, as far as we can know
        self._token = 0  # the breaker's
        self._lost: BaseException | None = None

    def fail(self, error: PortableError) -> None:
        """Tell every caller that still waits."""
        for statement in self._attached:
            if statement is not None:
                self._detach(statement)
                statement.fail(error)

    async def serve(self, engine: Engine, connection: ServerConnection) -> ServerConnection | None:
        """Run them all; see :meth:`Work.serve` for what is returned."""
        self._since = started = engine.now()
        self._token = engine.guard.token
        engine.figures.together += len(self._attached)
        engine.figures.waited_together(started, self._attached, connection)
        prepared: list[Prepared] = []
        for statement in self._attached:
            assert statement is not None
            statement.batch.begun = True
            statement.connection = self
            most = 1 if statement.mode == messages.ROW else 0
            prepared.append((connection.prepared(statement.sql), statement.arguments, most))
        self._timer = asyncio.get_running_loop().call_later(STALL, self._look, 0)
        try:
            await connection.run_together(prepared, self._told)
        finally:
            self._timer.cancel()
        if not connection.raw.is_closed():
            return connection
        engine.connections.drop(connection)
        lost = ConnectionLost(last_words(self._lost) if self._lost is not None else None)
        engine.guard.lost(self._token, started, lost)
        # In the order of the queue, of which put_first makes the beginning.
        for index, statement in reversed(tuple(enumerate(self._attached))):
            if statement is None:
                continue
            self._detach(statement)
            if index > self._first and not statement.cancelled:
                # It waited behind the one that ran: it neither was the cause nor had its try.
                statement.alone = True
                engine.put_first(statement)
            else:
                statement.lost(engine, lost, self._since, retryable=True)
        return None

    def _told(self, index: int, result: Any, error: BaseException | None) -> None:
        """The answer to a statement is here."""
        engine = self._engine
        if error is not None and self._connection.raw.is_closed():
            if self._lost is None:
                self._lost = error  # the server's last words come to the one that ran
            return
        now = engine.now()
        seconds, self._since = now - self._since, now
        self._first = index + 1
        statement = self._attached[index]
        if statement is not None:
            self._finish(statement, result, error, seconds)
        if error is None:
            engine.guard.succeeded(self._token, seconds, now)
        elif isinstance(error, Exception) and engine.guard.answered(self._token, seconds, now, error):
            self._connection.health = health.after_error(self._connection.health)

    def _finish(self, statement: Statement, result: Any, error: BaseException | None, seconds: float) -> None:
        """Tell the caller of *statement*."""
        engine = self._engine
        engine.pace.note(statement.sql, seconds, together=True)
        engine.pace.frequent.note(statement.sql)
        self._detach(statement)
        if isinstance(error, OUT_OF_DATE):
            statement.alone = True  # that is where such errors are dealt with
            engine.put_first(statement)
            return
        engine.figures.ran(seconds, error is not None, statement.sql, error)
        if error is not None:
            statement.fail(pack_error(error))
        else:
            if len(result[0]) < TIMED_ROWS:
                engine.figures.rows += len(result[0])
                outcome = outcome_of(statement.mode, *result)
            else:
                outcome = engine.figures.fetched(statement.mode, *result)
            statement.batch.finish(statement.position, *outcome)

    def _detach(self, statement: Statement) -> None:
        self._attached[self._attached.index(statement)] = None
        statement.connection = None

    def _look(self, first: int) -> None:
        """Every ``STALL`` seconds: if there was no answer since, nobody shall wait behind the one that runs."""
        engine = self._engine
        now = engine.now()
        for index, statement in enumerate(self._attached):
            if statement is None:
                continue
            if statement.expires_at is not None and now >= statement.expires_at:
                self._leave(statement, timed_out(statement.expires_at - statement.arrived))
            elif index > first == self._first and not statement.alone:
                self._detach(statement)
                statement.alone = True
                engine.put_first(statement)
        if first == self._first < len(self._attached) and (slow := self._attached[first]) is not None:
            engine.pace.note(slow.sql, now - self._since)
        if not any(self._attached):
            self._connection.cancel("caller")  # nobody waits for what still runs
        self._timer = asyncio.get_running_loop().call_later(STALL, self._look, self._first)

    def cancel(self, _: str) -> None:
        """A caller has left: those with ``cancelled`` set are let go."""
        for statement in self._attached:
            if statement is not None and statement.cancelled:
                self._leave(statement, TimeoutError("cancelled; it only read"))

    def _leave(self, statement: Statement, error: Exception) -> None:
        """Tell *statement* that its time is over; cancel on the server only when nobody else would be hit."""
        self._detach(statement)
        self._engine.figures.ran(self._engine.now() - statement.arrived, True, statement.sql, error)
        statement.fail(pack_error(error))
        if not any(self._attached):
            self._connection.cancel("caller")
