"""Statements of one pipeline in one write to the server, each with a Sync of its own: each is its own transaction.

They fare as if they had been sent one by one, only that nobody waits for an answer before the next is on its way. So if
the connection dies, more than one of them may have run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raypg.core import health
from raypg.core.sql import Verdict
from raypg.messages import BOTH, size_of
from raypg.portable import pack_error
from raypg.server.connection import ServerConnection
from raypg.server.lanes import Done, Rows, is_of_the_moment, result_of, singly
from raypg.server.outcomes import ConnectionLost, last_words, outcome_of
from raypg.server.reads import OUT_OF_DATE
from raypg.server.work import lost_error

if TYPE_CHECKING:
    from raypg.server.engine import Engine

MOST = 64
"""Most statements in one write; what is gained by more is small."""

MOST_BYTES = 256_000
"""Most bytes in one write, about."""

_COMMANDS = frozenset(("SELECT", "INSERT", "UPDATE", "DELETE", "MERGE"))


def may_travel(connection: ServerConnection, sql: str, verdict: Verdict) -> bool:
    """Whether statements of this text may be written together. Not those that write and return rows: whether they took
    effect would be unknown if their rows cannot be read."""
    return (
        not connection.pooled
        and verdict.statements == 1
        and verdict.command in _COMMANDS
        and (verdict.retryable or (verdict.command != "SELECT" and not verdict.returning))
        and connection.prepared(sql) is not None
    )


def how_many(rows: Rows, first: int) -> int:
    """How many of *rows*, from *first* on, go into one write."""
    size = 0
    for index in range(first, min(first + MOST, len(rows))):
        size += size_of(rows[index])
        if size > MOST_BYTES:
            return max(1, index - first)
    return min(MOST, len(rows) - first)


async def together(engine: Engine, connection: ServerConnection, sql: str, verdict: Verdict, rows: Rows) -> Done:
    """Run *rows*, in their order, in one write."""
    count = len(rows)
    prepared = connection.prepared(sql)
    done = Done(results=[None] * count, milliseconds=[0.0] * count, trips=1)
    answered = [False] * count
    anew: list[int] = []
    deaths: list[BaseException] = []
    token, started = engine.guard.token, engine.now()
    since = started

    def told(index: int, result: Any, error: BaseException | None) -> None:
        nonlocal since
        if error is not None and connection.raw.is_closed():
            deaths.append(error)
            return
        now = engine.now()
        seconds, since = now - since, now
        answered[index] = True
        done.milliseconds[index] = seconds * 1000
        if error is None:
            engine.guard.succeeded(token, seconds, now)
            (payload, status), names = outcome_of(BOTH, *result)
            engine.figures.wrote(status)
            done.results[index] = result_of(payload, names, status, verdict)
        elif isinstance(error, Exception):
            if engine.guard.answered(token, seconds, now, error):
                connection.health = health.after_error(connection.health)
            if isinstance(error, OUT_OF_DATE) or is_of_the_moment(error):
                anew.append(index)
                return
            done.errors[index] = pack_error(error)
        else:
            done.errors[index] = pack_error(error)
        engine.figures.ran(seconds, error is not None, sql, error)

    await connection.run_together([(prepared, row, 0) for row in rows], told)
    if connection.raw.is_closed():
        done.lost = lost = ConnectionLost(last_words(deaths[0]) if deaths else None)
        engine.guard.lost(token, started, lost)
        open_ones = [index for index in range(count) if not answered[index]] + anew
        if verdict.retryable and not lost.by_crash:
            done.decided = min(open_ones, default=count)
            return done
        done.errors.update(dict.fromkeys(open_ones, pack_error(lost_error(lost, sql, verdict.retryable))))
        done.decided = count
        return done
    for index in anew:  # the server refused to run them, or undid what they did
        if done.lost is None:
            one = await singly(engine, connection, sql, verdict, rows[index])
            done.trips += one.trips
            done.lost = one.lost
            done.retries[index] += 1 + one.retries[0]
            if one.decided:
                done.results[index] = one.results
                if one.errors:
                    done.errors[index] = one.errors[0]
                done.milliseconds[index] += one.milliseconds
                continue
        assert done.lost is not None
        done.errors[index] = pack_error(lost_error(done.lost, sql, verdict.retryable))
    done.decided = count
    return done
