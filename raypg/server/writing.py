"""One batch of Arrow data into its table, in one transaction on one connection.

COPY into the table itself where that means the same as INSERT; by way of a temporary table and INSERT else: for
``ignore`` and ``upsert``, views, row-level security, rules, and types that the server has to cast.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg

from raypg.core import write_plan
from raypg.core.write_plan import Table, WritePlan
from raypg.core.write_state import BadRows, BatchCounts
from raypg.errors import IncompatibleDataError, OutcomeUnknownError, StatementNotAllowedError
from raypg.ingest import encoding
from raypg.messages import STATUS
from raypg.portable import PortableError, pack_error
from raypg.server import ledger, write_target
from raypg.server.connection import ServerConnection
from raypg.server.outcomes import ConnectionLost
from raypg.server.work import Request
from raypg.server.write_rows import Loader

if TYPE_CHECKING:
    from raypg.server.engine import Engine

AT_ONCE = 2
"""Batches that a worker holds at a time."""

REMEMBER = 10.0
"""Seconds for which what the catalogue said of a table is believed."""

CHANGED = frozenset({"42P01", "42703", "42704", "42804", "42P10", "0A000", "42809", "3F000", "22P03", "08P01"})
"""Errors that a table gives that has changed since we looked: then we look again, once."""

TRIES = 6
"""How often a batch is written that meets deadlocks, or loses its connection."""

PATIENCE = 60.0
"""Seconds to wait for another transaction that writes the same batch. That of a dead worker is ended long before, by
the Pool actor, and so it goes on: see :mod:`raypg.actors.membership`."""

RETRY_AFTER = 0.05
"""Seconds before the second try, about; each further one waits twice as long."""


class TableChanged(Exception):
    """The columns of the table are not those that were read lately."""


class Spec(NamedTuple):
    """What is to be done with a batch.

    Attributes:
        into: (schema, table).
        first: number of its first row within the data of its caller.
    """

    into: tuple[str | None, str]
    mode: str
    key: tuple[str, ...] | None
    pipeline: str
    batch_id: str | None
    on_bad_rows: str
    overriding: bool
    first: int


class Intake:
    """Takes batches in for the engine of one worker; a few at a time, since each is held in memory."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._gate = asyncio.Semaphore(AT_ONCE)
        # They have one interpreter: all at once, the first of them would be ready when the last one is.
        self.preparing = asyncio.Lock()
        self._tables: dict[tuple[str | None, str], tuple[float, Table]] = {}
        self.ledger_tables = 0  # how many of its two tables are there, as far as we know
        self.ledger_seen = False  # since we began

    async def write(self, job: str, spec: Spec, fetch: Callable[[], Awaitable[Any]]) -> tuple[int, int, int, bool]:
        """Write the batch that *fetch* gives.

        Returns:
            Its :class:`BatchCounts`.

        Raises:
            Refused: carries the packed error; nothing of the batch was written.
            OutcomeUnknownError: the connection died under COMMIT, and there is no batch id; or no other connection was
                to be had in time to look at the ledger.
            TypeError: what *fetch* gives is no Arrow data.
        """
        engine = self._engine
        async with self._gate:
            if engine.closed is not None:
                raise engine.closed
            batch = await asyncio.to_thread(encoding.one_batch, await fetch())  # of a Table of many pieces, a copy
            now = engine.now()
            request = WriteRequest(self, batch, spec, now, now + engine.config.acquire_timeout)
            engine.enqueue(job, request, cost=max(1.0, batch.num_rows / 1000))
            engine.pump()
            return tuple(await request.future)  # type: ignore[return-value]

    async def table(self, connection: ServerConnection, name: tuple[str | None, str], anew: bool) -> tuple[Table, bool]:
        """(what the catalogue says of a table, whether it says so now, and not only lately)."""
        now = self._engine.now()
        known = self._tables.get(name)
        if known is not None and now < known[0] and not anew:
            return known[1], False
        self._tables.pop(name, None)
        found = await write_target.read_table(connection, name)
        if len(self._tables) >= 1000:
            self._tables.clear()
        self._tables[name] = (now + REMEMBER, found)
        return found, True


class WriteRequest(Request[BatchCounts]):
    """A batch that waits for a connection, or is being written. What is to be tried again was rolled back, or the
    ledger will tell: it may always begin anew."""

    __slots__ = ("_batch", "_ended", "_intake", "_prepared", "_since", "_spec", "_tries", "_unsure")

    def __init__(self, intake: Intake, batch: Any, spec: Spec, arrived: float, deadline: float) -> None:
        super().__init__(arrived, deadline)
        self._intake = intake
        self._batch = batch
        self._spec = spec
        self._prepared: Prepared | None = None
        self._tries = 0
        self._unsure = False  # a COMMIT got no answer
        self._since: float | None = None  # we wait for another transaction since then

    def fail(self, error: PortableError) -> None:
        super().fail(pack_error(self._unknown()) if self._unsure else error)

    async def serve(self, engine: Engine, connection: ServerConnection) -> ServerConnection | None:
        try:
            return await self._serve(engine, connection)
        finally:
            if connection.held is not None:
                connection.held.settle(connection)

    async def _serve(self, engine: Engine, connection: ServerConnection) -> ServerConnection | None:
        engine.figures.waited(engine.now() - self.arrived, connection)
        connection.dirty = True
        anew = False
        while True:
            started = engine.now()
            text = self._prepared.text if self._prepared is not None else f"COPY {self._spec.into[1]}"
            self._ended = False
            try:
                if engine.writes.watched:
                    await engine.writes.begin(connection, engine.writes.texts_of_batch(self._spec))
                counts = await self._write(engine, connection, anew)
            except ConnectionLost as lost:
                engine.connections.drop(connection)
                self._lost(engine, lost)
                return None
            except Exception as error:
                if connection.raw.is_in_transaction():
                    try:
                        await connection.run(STATUS, "ROLLBACK", ())
                    except (ConnectionLost, asyncpg.InterfaceError) as lost:
                        # The latter: the socket died under a COPY, and asyncpg still waits for its answer.
                        connection.abandon()
                        engine.connections.drop(connection)
                        self._lost(engine, lost if isinstance(lost, ConnectionLost) else ConnectionLost(None))
                        return None
                if isinstance(error, TableChanged):
                    anew, self._prepared = True, None
                    continue
                engine.figures.ran(engine.now() - started, True, text, error)
                state = getattr(error, "sqlstate", None)
                if await self._again(engine, error):
                    continue
                self._intake.ledger_tables = 0
                if state in CHANGED and not anew and self._prepared is not None:
                    anew, self._prepared = True, None
                    continue
                self.fail(pack_error(error))
                return connection
            assert self._prepared is not None
            engine.figures.ran(engine.now() - started, False, self._prepared.text)
            if self._prepared.plan.table.quiet:
                connection.dirty = False  # what stays is an empty temporary table of ours
            if not self.future.done():
                self.future.set_result(counts)
            return connection

    def _lost(self, engine: Engine, lost: ConnectionLost) -> None:
        """The connection died. Before COMMIT was sent nothing is written; after it, the ledger tells."""
        self._unsure = self._unsure or (self._ended and lost.sent)
        if self._unsure and self._spec.batch_id is None:
            self.fail(pack_error(self._unknown()))
            return
        self._tries += 3 if lost.by_crash else 1  # the batch itself may be what the backend crashes of
        if self._tries >= TRIES:
            self.fail(
                pack_error(asyncpg.ConnectionDoesNotExistError("the server ended the connection again and again"))
            )
            return
        self.deadline = engine.deadline_anew()
        engine.put_first(self)

    def _unknown(self) -> OutcomeUnknownError:
        how = "the same write can be repeated" if self._spec.batch_id else "with batch_id=… it could be repeated"
        return OutcomeUnknownError(
            f"the server ended the connection at COMMIT of a batch into {self._spec.into[1]!r}; {how}"
        )

    async def _again(self, engine: Engine, error: Exception) -> bool:
        """Whether to write the batch once more: it was rolled back, for no fault of its own."""
        state = getattr(error, "sqlstate", None)
        now = engine.now()
        if (
            isinstance(error, asyncpg.LockNotAvailableError)
            and self._prepared is not None
            and not self._prepared.claimed
        ):
            self._since = now if self._since is None else self._since
            if now - self._since > PATIENCE:
                return False
        elif state in ("40P01", "40001"):
            self._tries += 1
            if self._tries >= TRIES:
                return False
        else:
            return False
        await asyncio.sleep(RETRY_AFTER * 2 ** min(self._tries, 5) * random.uniform(0.5, 1.0))
        return True

    async def _write(self, engine: Engine, connection: ServerConnection, anew: bool) -> BatchCounts:
        spec = self._spec
        if self._prepared is None:
            table, is_new = await self._intake.table(connection, spec.into, anew)
            try:
                async with self._intake.preparing:
                    self._prepared = await asyncio.to_thread(prepare, table, self._batch, spec)
            except (IncompatibleDataError, StatementNotAllowedError):
                if is_new:
                    raise
                raise TableChanged from None  # the user may just have mended it
        prepared = self._prepared
        prepared.claimed = prepared.entry is None
        tolerant = spec.on_bad_rows == "quarantine"
        needed = 2 if tolerant else int(prepared.entry is not None)
        if self._intake.ledger_tables < needed:
            upgrade, self._intake.ledger_seen = not self._intake.ledger_seen, True
            await ledger.ensure(connection, tolerant, upgrade)
            self._intake.ledger_tables = needed
        if prepared.entry is not None:
            counts = await self._claim(engine, connection, prepared.entry)
            self._unsure = False  # the ledger has told
            if counts is not None:
                return counts
            prepared.claimed = True
            # Not with BEGIN: for the table one waits as long as the role's own lock_timeout says.
            begin = "SET LOCAL lock_timeout = DEFAULT"
        else:
            begin = "BEGIN ISOLATION LEVEL READ COMMITTED"
        await connection.run(STATUS, begin + write_plan.begin_text(prepared.plan), ())
        if not prepared.plan.staged and not await write_target.is_unchanged(connection, prepared.plan.table):
            raise TableChanged
        loader = Loader(
            connection, prepared.plan, prepared.batch, prepared.chunks, prepared.bad, engine.config.command_timeout
        )
        written = await loader.load(tolerant, spec.first)
        counts = BatchCounts(written, prepared.bad.good - written, len(prepared.bad.found))
        try:
            if prepared.bad.found:
                await self._store(connection, prepared)
            if prepared.entry is not None and counts[1:] != (0, 0, False):
                await ledger.correct(connection, prepared.entry, counts)
        except asyncpg.InsufficientPrivilegeError as error:
            await connection.run(STATUS, "ROLLBACK", ())
            raise await ledger.forbidden(connection, error) from error
        self._ended = True
        await connection.run(STATUS, "COMMIT", ())
        return counts

    async def _claim(self, engine: Engine, connection: ServerConnection, entry: ledger.Entry) -> BatchCounts | None:
        """Begin the transaction with the batch's row in the ledger; what was written before, if it was."""
        for attempt in range(2):
            await connection.run(STATUS, ledger.BEGIN, ())
            try:
                counts = await ledger.claim(connection, entry)
            except asyncpg.PostgresError as error:
                await connection.run(STATUS, "ROLLBACK", ())
                if error.sqlstate in ledger.MISSING and not attempt:
                    await ledger.create(connection)
                    continue
                if error.sqlstate == ledger.FORBIDDEN:
                    raise await ledger.forbidden(connection, error) from error
                waited = 0.0 if self._since is None else engine.now() - self._since
                if isinstance(error, asyncpg.LockNotAvailableError) and waited > PATIENCE:
                    raise await ledger.held(connection, entry, PATIENCE) from error
                raise
            if counts is not None:
                await connection.run(STATUS, "ROLLBACK", ())
            return counts
        raise AssertionError("the second attempt returns or raises")

    async def _store(self, connection: ServerConnection, prepared: Prepared) -> None:
        spec = self._spec
        rows = [
            (spec.first + row, state, message, encoding.row_as_json(self._batch, row))
            for row, (state, message) in sorted(prepared.bad.found.items())
        ]
        await ledger.quarantine(connection, spec.pipeline, spec.batch_id, prepared.plan.table.shown, rows)


class Prepared:
    """A batch, checked against its table and in the types of it.

    Attributes:
        chunks: its bytes, if they are kept.
        bad: its rows that are known to be bad.
        entry: its row in the ledger; ``None`` without a batch id.
        claimed: that row is written, or there is none to write.
        text: of the statement, for the metrics.
    """

    def __init__(
        self, plan: WritePlan, batch: Any, chunks: list[bytes] | None, bad: BadRows, entry: ledger.Entry | None
    ) -> None:
        self.plan = plan
        self.batch = batch
        self.chunks = chunks
        self.bad = bad
        self.entry = entry
        self.claimed = False
        self.text = write_plan.copy_text(plan) if plan.mode == "append" else write_plan.insert_text(plan)


def prepare(table: Table, batch: Any, spec: Spec) -> Prepared:
    """Check *batch* against *table*, and bring it into its types. In a thread: for some milliseconds.

    Raises:
        IncompatibleDataError, StatementNotAllowedError: it does not fit.
        asyncpg.DataError: a value does not, and bad rows are to fail.
    """
    data = [(field.name, field.type) for field in batch.schema]
    plan = write_plan.make_plan(table, data, spec.mode, spec.key, spec.overriding)
    normal = encoding.normalise(batch, plan)
    bad = BadRows(batch.num_rows)
    for row, (state, message) in normal.bad.items():
        bad.add(row, state, message)
    ready = encoding.with_rows(normal.batch) if plan.staged else normal.batch
    chunks, entry = None, None
    if spec.batch_id is not None:
        about = repr((table.schema, table.name, spec.mode, plan.key, [field.column.name for field in plan.fields]))
        digest, chunks = encoding.Encoder(plan).digest(ready, about)
        entry = ledger.Entry(spec.pipeline, spec.batch_id, digest, table.shown, batch.num_rows)
    return Prepared(plan, ready, chunks, bad, entry)
