"""The rows of a batch into its table, inside an open transaction; and which of them are bad."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Iterable
from typing import Any

import asyncpg
import pyarrow as pa

from raypg.core import write_plan
from raypg.core.bisection import Bisection
from raypg.core.sqlstate import bisection_kind
from raypg.core.write_plan import WritePlan
from raypg.core.write_state import BadRows, line_of
from raypg.ingest.encoding import Encoder, with_rows
from raypg.messages import STATUS
from raypg.server import _asyncpg
from raypg.server.connection import STEP, ServerConnection

MESSAGE = 131_072
"""Bytes of one message of a COPY, at most: the server reads each as a whole, and is a tenth faster if that stays in the
cache of its processor."""

_SAVEPOINT = "raypg_rows"
_ROUND = "raypg_round"
_WRONG_FORM = "22P03"


class Loader:
    """Loads one batch.

    Args:
        batch: in the types of *plan*; if that is staged, with the numbers of its rows.
        chunks: its bytes, if they are at hand.
        bad: its rows that are known to be bad, and are left out; more are added.
        timeout: seconds for each statement.
    """

    def __init__(
        self,
        connection: ServerConnection,
        plan: WritePlan,
        batch: pa.RecordBatch,
        chunks: list[bytes] | None,
        bad: BadRows,
        timeout: float | None,
    ) -> None:
        self._connection = connection
        self._plan = plan
        self._batch = batch
        self._chunks = chunks
        self._bad = bad
        self._timeout = timeout
        self._encoder = Encoder(plan)
        self._first = 0

    async def load(self, tolerant: bool, first: int) -> int:
        """Load the rows; how many took effect.

        Args:
            tolerant: leave bad rows out, instead of failing with the first of them.
            first: number of the first row, for messages.

        Raises:
            asyncpg.PostgresError: a row is bad, which it names if that can be found out; or something else is.
        """
        self._first = first
        if self._bad.found and not tolerant:
            row, (state, message) = min(self._bad.found.items())
            raise self._located(asyncpg.PostgresError.new({"C": state, "M": message}), row)
        if self._plan.staged:
            await self._stage(tolerant)
            return await self._insert(tolerant)
        while True:
            if not self._bad.good:
                return 0
            try:
                await self._attempt(write_plan.copy_text(self._plan), tolerant)
                return self._bad.good
            except asyncpg.PostgresError as error:
                if _kind(error) != "row":
                    raise
                line = line_of(getattr(error, "context", None))
                if line is not None and not tolerant:
                    raise self._located(error, self._bad.original(line)) from error
                if line is not None and not self._bad.are_many:
                    self._note(error, self._bad.original(line))
                    continue
                if not self._plan.table.may_stage:
                    raise
                unplaced = error
            return await self._search(unplaced, tolerant)

    async def _search(self, error: asyncpg.PostgresError, tolerant: bool) -> int:
        """Find out, by way of a temporary table, which rows are bad."""
        if not tolerant:
            # Nothing of it will stay: the transaction is begun anew, to look for the row.
            await self._run("ROLLBACK")
            await self._run("BEGIN")
        self._batch, self._chunks = with_rows(self._batch), None
        self._plan = self._plan._replace(staged=True)
        await self._stage(tolerant)
        written = await self._insert(tolerant)
        if not tolerant:
            raise error  # each row is good by itself
        return written

    async def _stage(self, tolerant: bool) -> None:
        await self._run(write_plan.stage_text(self._plan, keep=not self._connection.pooled))
        while self._bad.good:
            try:
                await self._attempt(write_plan.copy_stage_text(self._plan), tolerant)
                return
            except asyncpg.PostgresError as error:
                line = line_of(getattr(error, "context", None))
                if _kind(error) != "row" or line is None:
                    raise
                if not tolerant:
                    raise self._located(error, self._bad.original(line)) from error
                self._note(error, self._bad.original(line))

    async def _insert(self, tolerant: bool) -> int:
        """INSERT what is staged; how many rows took effect.

        Of rows with an equal key the last shall win, and one of them count. That is so within a statement. When the
        rows do not go in one, their pieces only tell which rows are bad; then the pieces are undone, and the good rows
        go in one statement. Should that fail as well (one row is in the way of another, in this order), all but the
        last row of each key are left out first, so that it makes no difference in which pieces the rows go.
        """
        begin = f"SAVEPOINT {_ROUND}; "  # together with the first savepoint of the pieces: no trip of its own
        distinct = False
        while True:
            known = len(self._bad.found)
            written, whole = await self._in_pieces(tolerant, begin, backwards=distinct and not self._plan.key)
            none_new = len(self._bad.found) == known
            if whole or self._plan.mode == "append" or (distinct and none_new):
                return written
            await self._run(f"ROLLBACK TO SAVEPOINT {_ROUND}")
            await self._run(write_plan.leave_out_text(self._plan), list(self._bad.found))
            await self._run(f"SAVEPOINT {_ROUND}")
            begin, distinct = "", none_new
            if distinct and self._plan.key:
                await self._run(write_plan.leave_equal_out_text(self._plan), 0, self._bad.rows)

    async def _in_pieces(self, tolerant: bool, begin: str, backwards: bool) -> tuple[int, bool]:
        """INSERT what is staged as a whole, or if that is refused in pieces, and find out which rows are bad.

        Args:
            begin: what else to do first, as SQL.
            backwards: the last piece first: where no key tells which rows are equal, the last of them wins then too.

        Returns:
            (how many rows took effect, whether one statement took them all).
        """
        text = write_plan.insert_text(self._plan)
        rows = max(self._bad.rows, 1)
        search = Bisection(rows)
        written, indexed = 0, False
        while (trip := search.next()) is not None:
            first, end = (rows - trip[1], rows - trip[0]) if backwards else trip
            await self._run(f"{begin}SAVEPOINT {_SAVEPOINT}")
            begin = ""
            try:
                tag = await self._run(text, first, end)
            except asyncpg.PostgresError as error:
                if _kind(error) != "row":
                    raise
                await self._run(f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}; RELEASE SAVEPOINT {_SAVEPOINT}")
                if not indexed:
                    await self._run(write_plan.index_text(self._plan))
                    indexed = True
                if not search.failed("row"):
                    continue
                if not tolerant:
                    raise self._located(error, first) from error
                self._note(error, first)
            else:
                await self._run(f"RELEASE SAVEPOINT {_SAVEPOINT}")
                search.passed()
                written += int(tag.rpartition(" ")[2])
        if indexed:  # the table may stay, and is filled faster without
            await self._run(write_plan.drop_index_text(self._plan))
        return written, search.trips == 1

    async def _attempt(self, text: str, tolerant: bool) -> None:
        """COPY all rows that are not known to be bad."""
        if tolerant:
            await self._run(f"SAVEPOINT {_SAVEPOINT}")
        batch, chunks = self._batch, self._chunks
        if self._bad.found:
            chosen = [row for row in range(batch.num_rows) if row not in self._bad.found]
            batch, chunks = batch.take(pa.array(chosen, pa.int64())), None
        source = self._encoder.chunks(batch) if chunks is None else chunks
        try:
            await self._connection.run(STEP, text, functools.partial(_copy, text=text, source=source), self._timeout)
        except asyncpg.PostgresError:
            if tolerant:
                await self._run(f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}")
            raise
        if tolerant:
            await self._run(f"RELEASE SAVEPOINT {_SAVEPOINT}")

    async def _run(self, text: str, *arguments: Any) -> str:
        """The command tag."""
        tag, _ = await self._connection.run(STATUS, text, arguments, self._timeout)
        return str(tag)

    def _note(self, error: asyncpg.PostgresError, row: int) -> None:
        self._bad.add(row, error.sqlstate or "", str(error.args[0]))

    def _located(self, error: asyncpg.PostgresError, row: int) -> asyncpg.PostgresError:
        """*error*, with the number of the row in its words and as its ``row``."""
        located = type(error)(f"row {self._first + row} of the data: {error.args[0]}")
        located.__dict__.update({**vars(error), "row": self._first + row})
        return located


def _kind(error: asyncpg.PostgresError) -> str:
    if error.sqlstate == _WRONG_FORM:
        return "stop"  # the column has another type than the catalogue said
    return bisection_kind(
        error.sqlstate,
        severity=getattr(error, "severity_en", None),
        server_function=getattr(error, "server_source_function", None),
    )


async def _copy(raw: asyncpg.Connection, text: str, source: Iterable[bytes]) -> str:
    async def chunks() -> AsyncIterator[memoryview]:
        for chunk in source:
            whole = memoryview(chunk)
            for begin in range(0, len(chunk), MESSAGE):
                yield whole[begin : begin + MESSAGE]

    return await _asyncpg.copy_in(raw, text, chunks())
