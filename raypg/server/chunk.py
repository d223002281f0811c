"""A chunk of a pipeline: many statements of one owner, run on one connection.

They run in their order, but for reads that the optimizer moves ahead. The planner says how: each run of one text takes
a lane of :mod:`raypg.server.lanes`. Inside a transaction a group that fails is undone to its savepoint and repeated row
by row, which names the culprit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg

from raypg import messages
from raypg.core.planner import MOST_CHANGES, Plan
from raypg.core.sql import Verdict, classify
from raypg.errors import StatementNotRunError, UnavailableError
from raypg.portable import PortableError, pack_error
from raypg.server import planning, wire
from raypg.server.connection import ServerConnection
from raypg.server.lanes import Done, Rows, grouped, sender, singly
from raypg.server.outcomes import ConnectionLost
from raypg.server.work import Refused, Request, refuse

if TYPE_CHECKING:
    from raypg.server.engine import Engine

ChunkRun = tuple[str, int, list[list[Any]]]
"""(SQL, number of statements, one list of values for each parameter)."""

Outcome = tuple[int, int, Any, PortableError | None, Any, int]
"""(first position, how many, result of each, error of each, milliseconds of each, retries of each).

A result is ``("rows", column names, list of tuples)`` or a command tag. Successes without rows share an outcome, whose
milliseconds are then a list, or one number for all.
"""

MOST_IN_TRANSACTION = 5_000
"""Most statements in a group inside a transaction, where they fail together anyway."""

_SAVEPOINT = "raypg_group"


class How(NamedTuple):
    """What the pipeline's user has chosen.

    Attributes:
        strategy: of the pipeline.
        most: most statements in one group, and thus in one transaction (``batch_size``).
        optimize: reads may move ahead of writes.
        shared_now: ``now()`` may be the same for a group.
    """

    strategy: str
    most: int
    optimize: bool = False
    shared_now: bool = False


class _Run:
    """Statements of one text, and their positions in the message."""

    __slots__ = ("positions", "rows", "sql")

    def __init__(self, sql: str, rows: Rows, positions: Sequence[int]) -> None:
        self.sql = sql
        self.rows = rows
        self.positions = positions


class ChunkRequest(Request[None]):
    """The statements of one message of a pipeline, waiting for or using a connection."""

    __slots__ = ("_done", "_how", "_left", "_runs", "lanes", "trips")

    def __init__(self, runs: Sequence[ChunkRun], how: How, arrived: float, deadline: float) -> None:
        super().__init__(arrived, deadline)
        self._runs: list[_Run] = []  # what is left to do, the next one last
        position = 0
        for sql, count, columns in runs:
            self._runs.append(_Run(sql, Rows(count, columns), range(position, position + count)))
            position += count
        self._runs.reverse()
        self._left = position
        self._how = how
        self._done: list[Outcome] = []
        self.trips = 0
        self.lanes: Counter[str] = Counter()

    @staticmethod
    async def run(
        engine: Engine,
        job: str,
        runs: Sequence[ChunkRun],
        how: tuple[Any, ...],
        token: str | None,
        place: tuple[str, int, bool] | None = None,
    ) -> tuple[list[Outcome], int, dict[str, int]]:
        """Run a chunk: on any connection, or inside the leased transaction *token*.

        Args:
            how: see :class:`How`.
            place: (pipeline, number of this message, whether the one before it was still under way); messages of one
                pipeline run in their order.

        Returns:
            Outcomes, how often the server was asked, and how many statements took which lane. In a transaction, and
            under ``sequential``, outcomes end with the first failure.

        Raises:
            PoolExhaustedError, ConnectError, PoolClosedError, StatementNotRunError: nothing was run.
            LeaseLostError: of *token*.
        """
        if place is not None:
            name, number, follows = place
            try:
                await engine.streams.turn(name, number, follows)
                return await ChunkRequest.run(engine, job, runs, how, token)
            finally:
                engine.streams.finished(name, number)
        now = engine.now()
        request = ChunkRequest(runs, How(*how), now, now + engine.config.acquire_timeout)
        if token is not None:
            lease = engine.leases.find(token)
            async with lease.lock:
                lease = engine.leases.find(token)
                await request._in_transaction(engine, lease.connection, token)
            return request._told()
        engine.enqueue(job, request, cost=max(1.0, request._left / 8))
        engine.pump()
        try:
            await request.future
        except Refused as refused:
            if not request._done:
                raise
            # It was interrupted half way, and no other connection was to be had: what ran is told, the rest fails.
            request._fail_rest(refused.packed)
        return request._told()

    def _told(self) -> tuple[list[Outcome], int, dict[str, int]]:
        return self._done, self.trips, dict(self.lanes)

    # --- as work of the queue ---

    @property
    def begun(self) -> bool:
        return bool(self._done)

    async def serve(self, engine: Engine, connection: ServerConnection) -> ServerConnection | None:
        engine.figures.waited(engine.now() - self.arrived, connection)
        connection.dirty = True
        lost = False
        try:
            if engine.writes.watched:
                await self._announce(engine, connection)
            if self._how.optimize and len(self._runs) > 1 and not self._done:
                await self._optimize(engine, connection)
            while self._left and not lost:
                if not await connection.is_alive():
                    lost = True  # nothing of what is left was sent: another connection takes over
                elif self._how.strategy == "sequential":
                    lost = not await self._sequential(engine, connection)
                else:
                    lost = not await self._best_effort(engine, connection)
        except ConnectionLost:
            lost = True
        except UnavailableError as error:
            self._fail_rest(pack_error(error))
        finally:
            if connection.held is not None and not lost:
                connection.held.settle(connection)
        if lost:
            engine.connections.drop(connection)
            if self._left:
                self.deadline = engine.deadline_anew()
                engine.put_first(self)
                return None
        if not self.future.done():
            self.future.set_result(None)
        return None if lost else connection

    async def _announce(self, engine: Engine, connection: ServerConnection) -> None:
        """Have nobody hold results of what these statements write to."""
        texts = {run.sql for run in self._runs}
        await engine.writes.begin(connection, [sql for sql in texts if engine.writes.concerns(sql, classify(sql))])

    async def _optimize(self, engine: Engine, connection: ServerConnection) -> None:
        """Let reads run before writes that they have nothing to do with."""
        order = await planning.order(engine, connection, [run.sql for run in reversed(self._runs)])
        runs = self._runs[::-1]
        merged: list[_Run] = []
        for index in order:
            run = runs[index]
            if merged and merged[-1].sql == run.sql and len(merged[-1].rows.columns) == len(run.rows.columns):
                merged[-1] = _Run(run.sql, merged[-1].rows + run.rows, [*merged[-1].positions, *run.positions])
            else:
                merged.append(run)
        self._runs = merged[::-1]

    # --- best effort, parallel ---

    async def _best_effort(self, engine: Engine, connection: ServerConnection) -> bool:
        """Run the next group; False if the connection was lost."""
        run = self._runs[-1]
        verdict = classify(run.sql)
        if self._refuses(run, verdict):
            return True
        plan, types = await self._plan(engine, connection, run, min(len(run.rows), self._how.most))
        if plan.lane != "single":
            changes = plan.most <= MOST_CHANGES
            limit = engine.catalogue.limit(run.sql) if changes else None
            rows = run.rows[: min(self._how.most, plan.most, limit or plan.most)]
            send = sender(plan, run.sql, planning.shape_of(run.sql), types)
            started = engine.now()
            done = await grouped(engine, connection, run.sql, verdict, rows, send)
            if changes:
                engine.catalogue.took(run.sql, len(rows), engine.now() - started)
            if done.unfit:
                engine.catalogue.refuse(run.sql, engine.now())
                self.trips += done.trips
                return True
            self._note(run, done, plan.lane)
            return done.lost is None
        if wire.may_travel(connection, run.sql, verdict) and len(run.rows) > 1:
            rows = run.rows[: wire.how_many(run.rows, 0)]
            done = await wire.together(engine, connection, run.sql, verdict, rows)
        else:
            done = await singly(engine, connection, run.sql, verdict, run.rows[0])
        self._note(run, done, "single")
        return done.lost is None

    async def _plan(self, engine: Engine, connection: ServerConnection, run: _Run, count: int) -> tuple[Plan, Any]:
        if count < 2:
            return Plan("single", "it is alone"), None
        try:
            return await planning.plan_for(
                engine,
                connection,
                run.sql,
                count,
                in_transaction=self._how.strategy == "transactional",
                shared_now=self._how.shared_now,
            )
        except (asyncpg.PostgresError, asyncpg.InterfaceError):
            return Plan("single", "the catalogue could not be asked"), None  # the statement will tell what is wrong

    def _refuses(self, run: _Run, verdict: Verdict) -> bool:
        """Whether statements of this text cannot run without a lease; then that is their outcome."""
        refusal = refuse(verdict, run.sql)
        if refusal is None:
            return False
        self._note(run, Done(len(run.rows), errors=dict.fromkeys(range(len(run.rows)), pack_error(refusal))), "")
        return True

    # --- one after the other ---

    async def _sequential(self, engine: Engine, connection: ServerConnection) -> bool:
        """Run the next statement; after a failure nothing is left to do. False if the connection was lost."""
        run = self._runs[-1]
        verdict = classify(run.sql)
        refusal = refuse(verdict, run.sql)
        if refusal is not None:
            done = Done(1, errors={0: pack_error(refusal)})
        else:
            done = await singly(engine, connection, run.sql, verdict, run.rows[0], again=False)
        self._note(run, done, "single")
        if done.errors:
            self._left = 0
        return done.lost is None

    # --- in a transaction ---

    async def _in_transaction(self, engine: Engine, connection: ServerConnection, token: str) -> None:
        """Run all, stop at the first failure. A lost connection has rolled back everything."""
        connection.dirty = True
        try:
            if engine.writes.watched:
                await self._announce(engine, connection)
            while self._left:
                if not await self._group_in_transaction(engine, connection):
                    return
        except ConnectionLost as lost:
            engine.leases.end(token, "its connection died", dead=True)
            how = f"with {lost.sqlstate}" if lost.sqlstate else "without a word"
            self._fail_rest(
                pack_error(StatementNotRunError(f"the server ended the connection ({how}) and rolled all of it back"))
            )
        except UnavailableError as error:
            self._fail_rest(pack_error(error))

    async def _group_in_transaction(self, engine: Engine, connection: ServerConnection) -> bool:
        run = self._runs[-1]
        verdict = classify(run.sql)
        refusal = refuse(verdict, run.sql)
        if refusal is not None:
            self._note(run, Done(1, errors={0: pack_error(refusal)}), "single")
            return False
        if len(run.rows) > 1 and verdict.command in ("INSERT", "UPDATE", "DELETE"):
            await connection.run(messages.STATUS, f"SAVEPOINT {_SAVEPOINT}", ())
            group = await self._try_group(engine, connection, run)
            if group is None:
                # Which row it was, if any, only the rows themselves can tell.
                await connection.run(messages.STATUS, f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}", ())
                rows = run.rows[:MOST_IN_TRANSACTION]
            else:
                await connection.run(messages.STATUS, f"RELEASE SAVEPOINT {_SAVEPOINT}", ())
                self._note(run, *group)
                return True
        else:
            rows = run.rows
        for row in rows:
            done = await singly(engine, connection, run.sql, verdict, row, in_transaction=True)
            if done.lost is not None:
                raise done.lost
            self._note(run, done, "single")
            if done.errors:
                return False
        return True

    async def _try_group(self, engine: Engine, connection: ServerConnection, run: _Run) -> tuple[Done, str] | None:
        """Run a group; ``None`` if it failed, or may not be one."""
        plan, types = await self._plan(engine, connection, run, min(len(run.rows), MOST_IN_TRANSACTION))
        if plan.lane == "single":
            return None
        rows = run.rows[: min(MOST_IN_TRANSACTION, plan.most)]
        send = sender(plan, run.sql, planning.shape_of(run.sql), types)
        started = engine.now()
        self.trips += 1
        try:
            results = await send(connection, rows, 0, len(rows))
        except ConnectionLost:
            raise
        except Exception:
            return None
        seconds = engine.now() - started
        engine.figures.ran_together(len(rows), 0, seconds, run.sql)
        if type(results) is not list:
            results = [results] * len(rows)
        return Done(len(rows), results, milliseconds=seconds * 1000 / len(rows)), plan.lane

    # --- noting ---

    def _note(self, run: _Run, done: Done, lane: str) -> None:
        """Take down the outcomes of the first statements of *run*, and take them out of it."""
        self.trips += done.trips
        count = done.decided
        if lane:
            self.lanes[lane] += count
        several = type(done.results) is list
        timed = type(done.milliseconds) is list
        index = 0
        while index < count:
            position = run.positions[index]
            milliseconds = done.milliseconds[index] if timed else done.milliseconds
            retries = done.retries.get(index, 0)
            error = done.errors.get(index)
            result = None if error is not None else done.results[index] if several else done.results
            end = index + 1
            if type(result) is str:
                while (
                    end < count
                    and end not in done.errors
                    and run.positions[end] == position + end - index
                    and (not several or done.results[end] == result)
                    and done.retries.get(end, 0) == retries
                ):
                    end += 1
                if timed:
                    milliseconds = done.milliseconds[index:end]
            self._done.append((position, end - index, result, error, milliseconds, retries))
            index = end
        self._left -= count
        if count == len(run.rows):
            self._runs.pop()
        elif count:
            run.rows = run.rows[count:]
            run.positions = run.positions[count:]

    def _fail_rest(self, error: PortableError) -> None:
        """What has no outcome yet fails with *error*."""
        while self._runs:
            run = self._runs[-1]
            for position in run.positions:
                self._done.append((position, 1, None, error, 0.0, 0))
            self._left -= len(run.rows)
            self._runs.pop()
