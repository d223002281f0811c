"""What PostgreSQL gives for statements one by one, and what is then in its tables: the measure of every lane."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import asyncpg


def seen_of(error: BaseException | None) -> tuple[Any, ...] | None:
    """What a caller sees of an error."""
    if error is None:
        return None
    return (
        type(error),
        str(error),
        getattr(error, "sqlstate", None),
        getattr(error, "constraint_name", None),
        getattr(error, "detail", None),
    )


def kind(outcome: Any, wording: bool) -> Any:
    """Class, SQLSTATE, constraint and, if wanted, words of an error; not the words of asyncpg about a value.

    Those count the elements of a group. And the server qualifies names that the search_path does not lead to.
    """
    if not isinstance(outcome, tuple):
        return outcome
    cls, text, sqlstate, constraint, detail = outcome
    if not wording or text.startswith(("invalid input for query argument", "the server expects")):
        return cls, sqlstate, constraint
    return cls, re.sub(r"\bt_[0-9a-f]{12}\.", "", text), sqlstate, constraint, detail


async def one_by_one(direct: asyncpg.Connection, sql: str, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What asyncpg gives for each row alone: rows, a command tag, or what is seen of the error."""
    outcomes: list[Any] = []
    for row in rows:
        try:
            statement = await direct.prepare(sql)
            found = await statement.fetch(*row)
            returns = bool(statement.get_attributes())
            outcomes.append([tuple(each) for each in found] if returns else statement.get_statusmsg())
        except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            outcomes.append(seen_of(error))
    return outcomes


async def contents(direct: asyncpg.Connection, schema: str) -> dict[str, list[Any]]:
    """All rows of all tables of *schema*."""
    names = await direct.fetch("select tablename from pg_tables where schemaname = $1 order by 1", schema)
    return {name: sorted((await direct.fetch(f"select * from {schema}.{name}")), key=repr) for (name,) in names}


async def fresh(direct: asyncpg.Connection, schema: str, definition: str) -> None:
    """Make *schema* anew, with what *definition* creates in it."""
    await direct.execute(f"drop schema {schema} cascade; create schema {schema}; set search_path = {schema}, public")
    await direct.execute(definition)
