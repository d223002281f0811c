"""A chunk of a pipeline: many statements of one owner, run in order on one connection.

Runs of the same plain INSERT go as one ``executemany``: one transaction, pipelined on the wire. Under ``best_effort``
a group that fails is bisected, so that its good rows commit and each bad one gets its own error. Inside a transaction
a group that fails is undone to its savepoint and repeated row by row, which names the culprit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import asyncpg

from raypg import messages
from raypg.core.bisection import Bisection, Failure
from raypg.core.sql import Verdict, classify, shorten
from raypg.core.sqlstate import bisection_kind
from raypg.errors import OutcomeUnknownError, StatementNotRunError
from raypg.portable import PortableError, pack_error
from raypg.server.connection import ServerConnection
from raypg.server.outcomes import ConnectionLost
from raypg.server.work import Refused, lost_error, refuse

if TYPE_CHECKING:
    from raypg.core.fair_queue import Ticket
    from raypg.server.engine import Engine

ChunkRun = tuple[str, list[tuple[Any, ...]]]
"""(SQL, one tuple of parameters per statement)."""

Outcome = tuple[int, int, Any, PortableError | None, float, int]
"""(first position, how many, result of each, error of each, milliseconds each, retries).

A result is ``("rows", column names, list of tuples)`` or a command tag. Successes without rows share an outcome.
"""

INSERTED = "INSERT 0 1"
"""Command tag of each statement of a group: a plain INSERT of one row into a table without triggers and rules."""

_SAVEPOINT = "raypg_group"


class ChunkRequest:
    """The statements of one message of a pipeline, waiting for or using a connection."""

    __slots__ = ("_done", "_job", "_most", "_position", "_runs", "arrived", "deadline", "future", "ticket", "trips")

    def __init__(self, runs: Sequence[ChunkRun], most: int, arrived: float, deadline: float) -> None:
        self._runs = list(runs)
        self._most = most
        self._position = 0  # of the first statement that has no outcome yet
        self._done: list[Outcome] = []
        self.trips = 0
        self.arrived = arrived
        self.deadline = deadline
        self.ticket: Ticket[Any] | None = None
        self.future: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()

    @staticmethod
    async def run(
        engine: Engine,
        job: str,
        runs: Sequence[ChunkRun],
        most: int,
        token: str | None,
        place: tuple[str, int, bool] | None = None,
    ) -> list[Outcome]:
        """Run a chunk: on any connection, or inside the leased transaction *token*.

        Args:
            most: most statements in one group, and thus in one transaction (the pipeline's ``batch_size``).
            place: (pipeline, number of this message, whether the one before it was still under way); messages of one
                pipeline run in their order.

        Returns:
            Outcomes in order of position. In a transaction they end with the first failure.

        Raises:
            PoolExhaustedError, ConnectError, PoolClosedError, StatementNotRunError: nothing was run.
            LeaseLostError: of *token*.
        """
        if place is not None:
            name, number, follows = place
            try:
                await engine.streams.turn(name, number, follows)
                return await ChunkRequest.run(engine, job, runs, most, token)
            finally:
                engine.streams.finished(name, number)
        now = engine.now()
        request = ChunkRequest(runs, most, now, now + engine.config.acquire_timeout)
        if token is not None:
            lease = engine.leases.find(token)
            async with lease.lock:
                lease = engine.leases.find(token)
                await request._in_transaction(engine, lease.connection, token)
            return request._done
        engine.enqueue(job, request, cost=max(1.0, sum(len(rows) for _, rows in runs) / 8))
        engine.pump()
        try:
            return await request.future
        except Refused as refused:
            if not request._done:
                raise
            # It was interrupted half way, and no other connection was to be had: what ran is told, the rest fails.
            request._fail_rest(refused.packed)
            return request._done

    # --- as work of the queue ---

    @property
    def begun(self) -> bool:
        return self._position > 0

    def fail(self, error: PortableError) -> None:
        if not self.future.done():
            self.future.set_exception(Refused(error))

    async def serve(self, engine: Engine, connection: ServerConnection) -> ServerConnection | None:
        engine.figures.waited(engine.now() - self.arrived, connection)
        connection.dirty = True
        while (group := self._next_group()) is not None:
            sql, rows = group
            if not await connection.is_alive():
                engine.connections.drop(connection)
                self.deadline = engine.deadline_anew()
                engine.put_first(self)  # nothing of this group was sent: another connection takes over
                return None
            try:
                await self._best_effort(engine, connection, sql, rows)
            except ConnectionLost:
                engine.connections.drop(connection)
                self.deadline = engine.deadline_anew()
                engine.put_first(self)
                return None
        if not self.future.done():
            self.future.set_result(self._done)
        return connection

    def _next_group(self) -> ChunkRun | None:
        """The next statements with the same text, at most ``most`` of them."""
        left = self._position
        for sql, rows in self._runs:
            if left < len(rows):
                return sql, rows[left : left + self._most]
            left -= len(rows)
        return None

    # --- best effort ---

    async def _best_effort(
        self, engine: Engine, connection: ServerConnection, sql: str, rows: list[tuple[Any, ...]]
    ) -> None:
        verdict = classify(sql)
        refusal = refuse(verdict, sql)
        if refusal is not None:
            self._note(len(rows), None, pack_error(refusal), 0.0)
            return
        if len(rows) > 1 and verdict.insert_values:
            try:
                grouped = await engine.catalogue.may_group(connection, sql, engine.now())
            except (asyncpg.PostgresError, asyncpg.InterfaceError):
                grouped = False  # the statement itself will tell what is wrong
            if grouped:
                await self._group(engine, connection, sql, rows)
                return
        for row in rows:
            await self._single(engine, connection, sql, row, verdict)

    async def _single(
        self,
        engine: Engine,
        connection: ServerConnection,
        sql: str,
        row: tuple[Any, ...],
        verdict: Verdict,
        in_transaction: bool = False,
    ) -> bool:
        """Run one statement and note its outcome; True if it succeeded.

        Raises:
            ConnectionLost: its outcome is noted as unknown, or it stays to be done: it only read, or was not sent, or
                the transaction around it is lost with it.
        """
        started = engine.now()
        self.trips += 1
        try:
            result = await _run_one(connection, sql, row, verdict)
        except ConnectionLost as lost:
            harmless = in_transaction or not lost.sent or (verdict.retryable and not lost.by_crash)
            if not harmless:
                engine.figures.ran(engine.now() - started, True, sql, lost)
                self._note(1, None, pack_error(lost_error(lost, sql, verdict.retryable)), _ms(engine, started))
            raise
        except Exception as error:
            engine.figures.ran(engine.now() - started, True, sql, error)
            self._note(1, None, pack_error(error), _ms(engine, started))
            return False
        engine.figures.ran(engine.now() - started, False, sql)
        self._note(1, result, None, _ms(engine, started))
        return True

    async def _group(self, engine: Engine, connection: ServerConnection, sql: str, rows: list[tuple[Any, ...]]) -> None:
        """Run a group; bisect it if a row fails. Outcomes are noted in order when the whole group is decided."""
        search = Bisection(len(rows))
        errors: dict[int, PortableError] = {}
        started = engine.now()
        lost: ConnectionLost | None = None
        cause: Exception | None = None  # of the failures, for the figures
        in_flight = (0, 0)
        while lost is None and (span := search.next()) is not None:
            first, end = in_flight = span
            self.trips += 1
            try:
                if end - first == 1:
                    await connection.run(messages.BOTH, sql, rows[first])
                else:
                    await connection.run(messages.MANY, sql, rows[first:end])
            except ConnectionLost as error:
                lost = cause = error
            except Exception as error:
                cause = error
                if search.failed(_kind_of(error)):
                    errors.update(dict.fromkeys(range(first, end), pack_error(error)))
            else:
                search.passed()
        seconds = engine.now() - started
        decided = len(rows)
        if lost is not None:
            first, end = in_flight
            # Ranges are tried from left to right: what lies behind was not sent yet.
            decided = end if lost.sent else first
            unknown = pack_error(OutcomeUnknownError("the connection died after the statement was sent", shorten(sql)))
            errors.update(dict.fromkeys(range(first, decided), unknown))
        else:
            stopped = pack_error(StatementNotRunError("not sent: the server cannot take this statement now"))
            errors.update((i, stopped) for i, status in enumerate(search.statuses) if status == "untried")
        self._note_group(decided, errors, seconds * 1000 / len(rows))
        if decided:
            engine.figures.ran_together(decided, len(errors), seconds, sql, cause)
        if lost is not None:
            raise lost

    # --- in a transaction ---

    async def _in_transaction(self, engine: Engine, connection: ServerConnection, token: str) -> None:
        """Run all, stop at the first failure. A lost connection has rolled back everything."""
        connection.dirty = True
        try:
            while (group := self._next_group()) is not None:
                sql, rows = group
                if not await self._group_in_transaction(engine, connection, sql, rows):
                    return
        except ConnectionLost as lost:
            engine.leases.end(token, "its connection died", dead=True)
            how = f"with {lost.sqlstate}" if lost.sqlstate else "without a word"
            self._fail_rest(
                pack_error(StatementNotRunError(f"the server ended the connection ({how}) and rolled all of it back"))
            )

    async def _group_in_transaction(
        self, engine: Engine, connection: ServerConnection, sql: str, rows: list[tuple[Any, ...]]
    ) -> bool:
        verdict = classify(sql)
        refusal = refuse(verdict, sql)
        if refusal is not None:
            self._note(1, None, pack_error(refusal), 0.0)
            return False
        if len(rows) > 1 and verdict.insert_values:
            started = engine.now()
            await connection.run(messages.STATUS, f"SAVEPOINT {_SAVEPOINT}", ())
            try:
                self.trips += 1
                await connection.run(messages.MANY, sql, rows)
            except ConnectionLost:
                raise
            except Exception:
                # Which row it was, only the rows themselves can tell.
                await connection.run(messages.STATUS, f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}", ())
            else:
                await connection.run(messages.STATUS, f"RELEASE SAVEPOINT {_SAVEPOINT}", ())
                self._note(len(rows), INSERTED, None, _ms(engine, started) / len(rows))
                engine.figures.ran_together(len(rows), 0, engine.now() - started, sql)
                return True
        for row in rows:
            if not await self._single(engine, connection, sql, row, verdict, in_transaction=True):
                return False
        return True

    # --- noting ---

    def _note(self, count: int, result: Any, error: PortableError | None, milliseconds: float) -> None:
        self._done.append((self._position, count, result, error, milliseconds, 0))
        self._position += count

    def _note_group(self, decided: int, errors: dict[int, PortableError], milliseconds: float) -> None:
        good = 0
        for index in range(decided):
            error = errors.get(index)
            if error is None:
                good += 1
                continue
            if good:
                self._note(good, INSERTED, None, milliseconds)
                good = 0
            self._note(1, None, error, milliseconds)
        if good:
            self._note(good, INSERTED, None, milliseconds)

    def _fail_rest(self, error: PortableError) -> None:
        left = sum(len(rows) for _, rows in self._runs) - self._position
        if left:
            self._note(left, None, error, 0.0)


async def _run_one(connection: ServerConnection, sql: str, row: tuple[Any, ...], verdict: Verdict) -> Any:
    (rows, status), names = await connection.run(messages.BOTH, sql, row, reads=verdict.retryable)
    if rows or verdict.returning or status.startswith(("SELECT", "SHOW", "FETCH", "EXPLAIN")):
        return "rows", names, rows
    return status


def _kind_of(error: Exception) -> Failure:
    """How a bisection must take *error*: of a row, of the moment (again), or of the statement or server (stop)."""
    if isinstance(error, asyncpg.PostgresError) and error.severity:
        return bisection_kind(error.sqlstate, severity=error.severity_en, server_function=error.server_source_function)
    return "row"  # a value that does not fit its type: found before it was sent


def _ms(engine: Engine, started: float) -> float:
    return (engine.now() - started) * 1000
