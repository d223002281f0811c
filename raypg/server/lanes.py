"""The lanes in which a group of statements of one text runs on one connection; see :mod:`raypg.core.planner`.

Every statement gets the outcome that it would have got alone. A group that fails as a whole is searched for the rows
that are to blame (:mod:`raypg.core.bisection`), which then run by themselves and get an error of their own.
"""

from __future__ import annotations

import asyncio
import datetime
import decimal
import functools
import ipaddress
import logging
import random
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import asyncpg

from raypg import messages
from raypg.core import forms
from raypg.core.bisection import Bisection, Failure
from raypg.core.planner import Plan, unnest_types
from raypg.core.shape import Shape
from raypg.core.sql import Verdict, shorten
from raypg.core.sqlstate import bisection_kind, is_rerun_whole_group
from raypg.errors import OutcomeUnknownError, ResultLostError, StatementNotRunError
from raypg.portable import PortableError, pack_error, plain_rows
from raypg.server.catalogue import ParameterType
from raypg.server.connection import STEP, ServerConnection
from raypg.server.outcomes import ConnectionLost
from raypg.server.work import lost_error

if TYPE_CHECKING:
    from raypg.server.engine import Engine

logger = logging.getLogger(__name__)

INSERTED = "INSERT 0 1"
"""Command tag of each statement of a group: a plain INSERT of one row into a table without triggers and rules."""

TRIES = 3
"""How often a statement runs that the server refuses with a deadlock or serialization failure."""

SOON = 0.02
"""Seconds, at most, until it runs again: two that met shall not meet again."""

_SCALARS = {bool, bytes, float, int, str, type(None), datetime.date, datetime.datetime, datetime.time}
_SCALARS |= {datetime.timedelta, decimal.Decimal, uuid.UUID, ipaddress.IPv4Address, ipaddress.IPv6Address}

_TAGS = {"INSERT": "INSERT 0 ", "UPDATE": "UPDATE ", "DELETE": "DELETE "}

# What a text of ours may be refused for though the user's own would run, or be refused in other words.
_OURS_OR_THEIRS = ("0A", "21", "26", "2D", "42")


@dataclass(slots=True)
class Done:
    """The outcomes of a group, by index.

    Attributes:
        decided: so many from the first on have an outcome.
        results: of each; or one for all.
        errors: of those that failed.
        milliseconds: of each; or one for all.
        retries: of those that ran more than once.
        trips: how often the server was asked.
        lost: how the connection was lost.
        unfit: why the group could not go by its lane; nothing was applied, and ``decided`` is 0.
    """

    decided: int = 0
    results: Any = None
    errors: dict[int, PortableError] = field(default_factory=dict)
    milliseconds: Any = 0.0
    retries: Counter[int] = field(default_factory=Counter)
    trips: int = 0
    lost: ConnectionLost | None = None
    unfit: str = ""


class Rows:
    """The parameters of statements, kept in columns as they travel; as rows where they are wanted so."""

    __slots__ = ("columns", "count")

    def __init__(self, count: int, columns: list[list[Any]]) -> None:
        self.count = count
        self.columns = columns

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return zip(*self.columns, strict=True) if self.columns else iter([()] * self.count)

    @overload
    def __getitem__(self, index: int) -> tuple[Any, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> tuple[Any, ...] | Rows:
        if isinstance(index, int):
            return tuple(column[index] for column in self.columns)
        first, end, _ = index.indices(self.count)
        if first == 0 and end == self.count:
            return self
        return Rows(max(0, end - first), [column[first:end] for column in self.columns])

    def __add__(self, other: Rows) -> Rows:
        columns = [one + two for one, two in zip(self.columns, other.columns, strict=True)]
        return Rows(self.count + other.count, columns)


Send = Callable[[ServerConnection, Rows, int, int], Any]


# --- groups ----------------------------------------------------------------------------------------------------------


def sender(plan: Plan, sql: str, shape: Shape, types: Sequence[ParameterType] | None) -> Send:
    """What sends the rows *first* … *end* of a group by the lane of *plan*, and returns the result of each."""
    if plan.lane == "unnest" and types is not None and (arrays := unnest_types(types)) is not None:
        form = forms.unnest_form(sql, arrays)
        if form is not None:
            return functools.partial(_send_unnest, form, sql)
    if shape.returning:
        return functools.partial(_send_returning, forms.returning_form(sql, shape.parameters), sql)
    if shape.command == "INSERT" and shape.values and not shape.conflict:
        return functools.partial(_send_many, sql)
    return functools.partial(_send_counting, forms.counting_form(sql), sql, _TAGS[shape.command])


async def _send_many(sql: str, connection: ServerConnection, rows: Rows, first: int, end: int) -> Any:
    await connection.run(messages.MANY, sql, list(rows[first:end]))
    return INSERTED


async def _send_unnest(form: str, sql: str, connection: ServerConnection, rows: Rows, first: int, end: int) -> Any:
    columns = rows[first:end].columns
    if not all(_SCALARS.issuperset(map(type, column)) for column in columns):
        # What looks like an array would be taken for more dimensions of it.
        return await _send_many(sql, connection, rows, first, end)
    tag, _ = await connection.run(messages.STATUS, form, columns)
    if tag != f"INSERT 0 {end - first}":
        raise OutcomeUnknownError(f"{end - first} rows were sent, and the server says {tag}", shorten(sql))
    return INSERTED


async def _send_counting(
    form: str, sql: str, tag: str, connection: ServerConnection, rows: Rows, first: int, end: int
) -> Any:
    async def send(raw: asyncpg.Connection) -> Any:
        return await raw.fetchmany(form, list(rows[first:end]))

    counts, _ = await connection.run(STEP, sql, send)
    _wrote(connection, sum(count for (count,) in counts))
    return [f"{tag}{count}" for (count,) in counts]


async def _send_returning(form: str, sql: str, connection: ServerConnection, rows: Rows, first: int, end: int) -> Any:
    numbered = [(*row, number) for number, row in enumerate(rows[first:end])]

    async def send(raw: asyncpg.Connection) -> Any:
        if raw.is_in_transaction():
            return await raw.fetchmany(form, numbered)
        # If a row cannot be read, all is undone: one by one, only its own statement loses its rows.
        await raw.execute("BEGIN")
        try:
            found = await raw.fetchmany(form, numbered)
        except BaseException:
            if not raw.is_closed():
                await raw.execute("ROLLBACK")
            raise
        await raw.execute("COMMIT")
        return found

    records, _ = await connection.run(STEP, sql, send)
    _wrote(connection, len(records))
    names = tuple(records[0].keys())[1:] if records else None
    results: list[tuple[str, Any, list[Any]]] = [("rows", names, []) for _ in numbered]
    for row in plain_rows(records):
        results[row[0]][2].append(row[1:])
    return results


def _wrote(connection: ServerConnection, rows: int) -> None:
    """Its command tag does not tell."""
    if connection.guard is not None:
        connection.guard.figures.written += rows


async def grouped(
    engine: Engine, connection: ServerConnection, sql: str, verdict: Verdict, rows: Rows, send: Send
) -> Done:
    """Run a group as one transaction; bisect it if a row fails."""
    search = Bisection(len(rows))
    done = Done(results=[INSERTED] * len(rows))
    started = engine.now()
    in_flight = (0, 0)
    cause: Exception | None = None  # of the failures, for the figures
    while done.lost is None and (span := search.next()) is not None:
        first, end = in_flight = span
        done.trips += 1
        try:
            if end - first == 1:
                result: Any = await run_one(connection, sql, rows[first], verdict)
            else:
                result = await send(connection, rows, first, end)
        except ConnectionLost as error:
            done.lost = cause = error
        except (ResultLostError, OutcomeUnknownError) as error:  # of one alone
            cause = error
            search.passed()  # it took effect, or may have: it must not run again
            done.errors.update(dict.fromkeys(range(first, end), pack_error(error)))
        except Exception as error:
            cause, kind = error, kind_of(error)
            if kind == "stop" and end - first > 1 and (getattr(error, "sqlstate", None) or "")[:2] in _OURS_OR_THEIRS:
                if search.trips == 1:
                    done.unfit = str(error)
                    logger.info("not by its lane, but one by one: %s [%s]", error, shorten(sql))
                    return done
                kind = "row"
            if search.failed(kind):
                done.errors.update(dict.fromkeys(range(first, end), pack_error(error)))
            elif kind == "again":
                done.retries.update(range(first, end))
                await asyncio.sleep(SOON * random.random())
        else:
            search.passed()
            if type(result) is list and end - first > 1:
                done.results[first:end] = result
            elif end - first == 1:
                done.results[first] = result
    seconds = engine.now() - started
    done.decided = len(rows)
    if done.lost is not None:
        first, end = in_flight
        # Ranges are tried from left to right: what lies behind was not sent yet.
        done.decided = end if done.lost.sent else first
        unknown = pack_error(OutcomeUnknownError("the connection died after the statement was sent", shorten(sql)))
        done.errors.update(dict.fromkeys(range(first, done.decided), unknown))
    else:
        stopped = pack_error(StatementNotRunError("not sent: the server cannot take this statement now"))
        done.errors.update((i, stopped) for i, status in enumerate(search.statuses) if status == "untried")
    done.milliseconds = seconds * 1000 / len(rows)
    if done.decided:
        engine.figures.ran_together(done.decided, len(done.errors), seconds, sql, cause)
    return done


def kind_of(error: Exception) -> Failure:
    """How a bisection must take *error*: of a row, of the moment (again), or of the statement or server (stop)."""
    if isinstance(error, asyncpg.PostgresError) and error.severity:
        return bisection_kind(error.sqlstate, severity=error.severity_en, server_function=error.server_source_function)
    return "row"  # a value that does not fit its type: found before it was sent


# --- one by one ------------------------------------------------------------------------------------------------------


async def run_one(connection: ServerConnection, sql: str, row: Sequence[Any], verdict: Verdict) -> Any:
    """Run one statement: ``("rows", names, rows)`` or its command tag.

    Raises:
        As :meth:`ServerConnection.run`.
    """
    (rows, status), names = await connection.run(messages.BOTH, sql, row, reads=verdict.retryable)
    return result_of(rows, names, status, verdict)


def result_of(rows: list[Any], names: Any, status: str, verdict: Verdict) -> Any:
    """What a pipeline's caller is given for rows and command tag."""
    if rows or verdict.returning or status.startswith(("SELECT", "SHOW", "FETCH", "EXPLAIN")):
        return "rows", names, rows
    return status


async def singly(
    engine: Engine,
    connection: ServerConnection,
    sql: str,
    verdict: Verdict,
    row: Sequence[Any],
    *,
    in_transaction: bool = False,
    again: bool = True,
) -> Done:
    """Run one statement. ``decided`` is 0 if it stays to be done: the connection was lost, and it was not sent, or only
    read, or its transaction is lost with it.

    Args:
        again: it may run again after its connection was lost under it, if it only reads.
    """
    done = Done()
    started = engine.now()
    cause: Exception | None = None  # of a failure, for the figures
    for attempt in range(1, TRIES + 1):
        done.trips += 1
        try:
            done.results = await run_one(connection, sql, row, verdict)
        except ConnectionLost as lost:
            done.lost = cause = lost
            if in_transaction or not lost.sent or (again and verdict.retryable and not lost.by_crash):
                return done
            done.errors[0] = pack_error(lost_error(lost, sql, verdict.retryable))
        except Exception as error:
            if not in_transaction and attempt < TRIES and is_of_the_moment(error):
                done.retries[0] += 1  # the server says that it undid all of it
                await asyncio.sleep(SOON * random.random())
                continue
            cause = error
            done.errors[0] = pack_error(error)
        break
    done.decided = 1
    done.milliseconds = (engine.now() - started) * 1000
    engine.figures.ran(engine.now() - started, bool(done.errors), sql, cause)
    return done


def is_of_the_moment(error: Exception) -> bool:
    return (
        isinstance(error, asyncpg.PostgresError)
        and error.severity_en in ("ERROR", None)
        and is_rerun_whole_group(error.sqlstate)
    )
