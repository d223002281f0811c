"""Classification, measured on the corpus; and the corpus, held against a real primary and a real standby."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import asyncpg
import pytest
from standby import caught_up
from statements import Labelled, corpus, schema

from raypg.core.classifier import Classifier
from raypg.embedded import EmbeddedServer
from raypg.server import facts_reader

STATE = """
    select current_user, (select md5(string_agg(name || '=' || setting, ',' order by name)) from pg_settings),
        (select count(*) from pg_locks where pid = pg_backend_pid() and locktype = 'advisory'),
        (select array_agg(name order by name) from pg_prepared_statements where name !~ '^__asyncpg'),
        (select array_agg(name order by name) from pg_cursors)
"""
REFUSALS = {"25006", "0A000", "55000"}
"""What a standby says to what is not for it: read-only, not supported in recovery, not in the prerequisite state. Where
nobody expects it to get that far, it is an internal error that speaks of recovery."""

TAGS = {"BEGIN", "START TRANSACTION", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE"}


class Sides(NamedTuple):
    """Connections of the owner of the corpus, whom row-level security concerns: to a primary and to its standby."""

    primary: asyncpg.Connection
    standby: asyncpg.Connection


@pytest.fixture
async def sides(pg18: EmbeddedServer, standby18: EmbeddedServer) -> AsyncIterator[Sides]:
    name, password = f"corpus_{secrets.token_hex(4)}", secrets.token_hex(8)
    admin = await asyncpg.connect(**pg18.parameters)
    await admin.execute(f"create role {name} login createrole password '{password}'; grant pg_monitor to {name}")
    await admin.execute(f"create database {name} owner {name}")
    mine = {"user": name, "password": password, "database": name}
    primary = await asyncpg.connect(**(pg18.parameters | mine))
    await primary.execute(schema())
    await primary.execute("select pg_stat_force_next_flush()")  # what it counted; a standby counts for itself
    # Has another setting than the primary, and so another answer to who asks for it.
    await caught_up(pg18, standby18)
    standby = await asyncpg.connect(**(standby18.parameters | mine), server_settings={"work_mem": "5MB"})
    for connection in (primary, standby):
        await connection.execute("select average_of(1)")  # otherwise its first use of PL/pgSQL would add settings
    try:
        yield Sides(primary, standby)
    finally:
        standby.terminate()
        primary.terminate()
        await admin.execute(f"drop database {name} with (force)")
        await admin.execute(f"drop role {name}")
        await admin.close()


class Attempt(NamedTuple):
    """What came of a statement: rows, command tag, whether the session was another one after it; or an error."""

    rows: Any = None
    tag: str = ""
    changed: bool = False
    error: asyncpg.PostgresError | None = None

    @property
    def sqlstate(self) -> str:
        return self.error.sqlstate if self.error is not None else ""


async def attempt(connection: asyncpg.Connection, statement: Labelled, fresh: tuple[Any, ...]) -> Attempt:
    """Run it in a transaction that is rolled back, on a connection whose :func:`state` is *fresh*."""
    await connection.execute("begin")
    changed = True
    try:
        if statement.before:
            await connection.execute(statement.before)
            fresh = await state(connection)
        prepared = await connection.prepare(statement.sql)
        rows = [tuple(row) for row in await prepared.fetch()]
        tag = prepared.get_statusmsg()
        changed = tag in TAGS or fresh != await state(connection)
        return Attempt(rows, tag, changed)
    except asyncpg.PostgresError as error:
        changed = bool(statement.before)
        return Attempt(error=error)
    finally:
        with contextlib.suppress(asyncpg.PostgresError):
            await connection.execute("rollback")
        if changed:
            await connection.execute("select pg_advisory_unlock_all(); deallocate all; close all; reset all")
            await connection.reload_schema_state()


async def state(connection: asyncpg.Connection) -> tuple[Any, ...]:
    """What a statement may change in its session."""
    return tuple(await connection.fetchrow(STATE))


def objection(label: str, primary: Attempt, standby: Attempt) -> str:
    """What speaks against a label, by what two servers made of the statement; empty if nothing does."""
    if label == "UNKNOWN":
        # No server knows it, or it is not one statement.
        return "" if primary.error is not None and standby.error is not None else "it runs"
    if primary.error is not None and primary.sqlstate not in REFUSALS | {"25001"}:
        return f"the primary says {primary.error!r}"
    if label == "READ":
        if standby.error is not None:
            return f"the standby says {standby.error!r}"
        return "it changes the session" if primary.changed or standby.changed else ""
    if label == "TRANSACTION":
        return "" if primary.tag in TAGS else f"the primary answers {primary.tag}"
    if standby.error is not None:
        return (
            ""
            if standby.sqlstate in REFUSALS or "during recovery" in str(standby.error)
            else f"the standby says {standby.error!r}"
        )
    if standby.changed or (label == "SESSION" and primary.rows != standby.rows):
        return ""
    return "it runs on a standby, with no other answer, and changes nothing"


def test_the_corpus_is_large_and_has_no_statement_twice() -> None:
    statements = corpus()
    assert len(statements) >= 500
    assert len({(statement.sql, statement.before) for statement in statements}) == len(statements)
    assert {statement.label for statement in statements} == {
        *("READ", "WRITE", "DDL", "TRANSACTION", "SESSION", "UNKNOWN")
    }


async def test_each_label_is_what_a_primary_and_a_standby_make_of_the_statement(sides: Sides) -> None:
    facts = await facts_reader.load(sides.primary.fetch)
    classifier = Classifier(facts)
    fresh = [await state(connection) for connection in sides]
    wrong = []
    for statement in corpus():
        primary = await attempt(sides.primary, statement, fresh[0])
        standby = await attempt(sides.standby, statement, fresh[1])
        against = objection(statement.label, primary, standby)
        if not against and classifier.classify(statement.sql).deterministic and primary.rows != standby.rows:
            against = f"it is said to be deterministic, but gives {primary.rows} and {standby.rows}"
        if against:
            wrong.append(f"{statement.label} {statement.sql}: {against}")
    assert wrong == []


async def test_no_verdict_is_on_the_wrong_side_and_nearly_all_reads_are_found(
    sides: Sides, record_property: Any
) -> None:
    classifier = Classifier(await facts_reader.load(sides.standby.fetch))
    wrong, missed, other = [], [], []
    reads = 0
    for label, sql, _ in corpus():
        verdict = classifier.classify(sql)
        reads += label == "READ"
        if label == "READ" != verdict.kind:
            missed.append(f"{sql}: {verdict.kind}, {verdict.reason}")
        elif label != "READ" == verdict.kind:
            wrong.append(f"{label} {sql}")
        elif label != verdict.kind:
            other.append(f"{label} {sql}: {verdict.kind}, {verdict.reason}")
    found = 1 - len(missed) / reads
    print(f"{reads} reads, {found:.1%} recognised; not: ", *missed, sep="\n  ")
    record_property("recognised", found)
    assert wrong == []
    assert other == []
    assert found >= 0.9
    assert sum(classifier.counts.values()) == len(corpus())
