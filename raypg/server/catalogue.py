"""Facts of the catalogue: whether a read is what it seems, and what the planner must know of tables that are written.

A read of a table leaves nothing behind. A read of a view, a foreign table, or a table with row-level security calls
functions that its text does not show.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import asyncpg

from raypg.core.planner import TableFacts
from raypg.core.shape import default_is_clock
from raypg.server.connection import STEP, ServerConnection
from raypg.server.describe import describe

ParameterType: TypeAlias = "tuple[str, str, str]"
"""(schema, name, kind), as asyncpg tells them."""

REMEMBER = 10.0
"""Seconds for which a fact is believed: somebody may add a trigger at any time."""

ABSENT = 1.0
"""Seconds for which it is believed that there is no such table."""

HOLD = 0.2
"""Seconds for which a group of changes may hold what it has locked, about."""

LEAST_GROUP = 4
"""Changes that may always share a transaction."""

_FACTS = """
WITH RECURSIVE family AS (
    SELECT to_regclass($1)::oid AS oid WHERE to_regclass($1) IS NOT NULL
    UNION
    SELECT CASE WHEN i.inhparent = family.oid THEN i.inhrelid ELSE i.inhparent END
    FROM family JOIN pg_catalog.pg_inherits i ON family.oid IN (i.inhparent, i.inhrelid)
), pointing AS (
    SELECT contype = 'f' AS key, condeferrable AS late,
           conrelid IN (SELECT oid FROM family) AS ours,
           confrelid IN (SELECT oid FROM family) AS here,
           confdeltype NOT IN ('a', 'r') OR confupdtype NOT IN ('a', 'r') AS acts
    FROM pg_catalog.pg_constraint
    WHERE conrelid IN (SELECT oid FROM family) OR confrelid IN (SELECT oid FROM family)
)
SELECT array_agg(c.oid::bigint) AS family,
       string_agg(c.relkind::text, '') AS kinds,
       bool_or(c.relrowsecurity) AS row_security,
       bool_or(EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal)) AS triggers,
       bool_or(EXISTS (SELECT FROM pg_catalog.pg_rewrite r WHERE r.ev_class = c.oid)) AS rules,
       (SELECT coalesce(bool_or(late), false) FROM pointing) AS deferrable,
       (SELECT coalesce(bool_or(key AND ours AND here), false) FROM pointing) AS self_reference,
       (SELECT coalesce(bool_or(key), false) FROM pointing) AS foreign_keys,
       (SELECT coalesce(bool_or(key AND here AND acts), false) FROM pointing) AS actions,
       current_setting('default_transaction_isolation') AS isolation,
       ARRAY(
           SELECT ARRAY[a.attname::text, pg_catalog.pg_get_expr(d.adbin, d.adrelid)]
           FROM pg_catalog.pg_attrdef d
           JOIN pg_catalog.pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
           WHERE d.adrelid = to_regclass($1) AND a.attgenerated = ''
             AND pg_catalog.pg_get_expr(d.adbin, d.adrelid) ~ '[(]|CURRENT_|LOCALTIME'
             AND pg_catalog.pg_get_expr(d.adbin, d.adrelid) !~
                 '^(nextval\\(''[^'']*''::regclass\\)|(gen_random_uuid|uuidv[47]|random)\\(\\))$'
           UNION ALL
           SELECT ARRAY[a.attname::text, t.typdefault]
           FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
           WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.atthasdef AND t.typdefault IS NOT NULL
       ) AS defaults,
       ARRAY(
           SELECT a.attname::text FROM pg_catalog.pg_attribute a
           WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
       ) AS columns
FROM family JOIN pg_catalog.pg_class c ON c.oid = family.oid
HAVING count(*) > 0
"""

_HIDING = """
SELECT name FROM unnest($1::text[]) AS name
JOIN pg_catalog.pg_class c ON c.oid = to_regclass(name)
WHERE (c.relkind IN ('v', 'f') OR c.relrowsecurity)
  AND c.relnamespace NOT IN (SELECT oid FROM pg_catalog.pg_namespace
                             WHERE nspname IN ('pg_catalog', 'information_schema'))
"""


class Catalogue:
    """What one worker knows of tables, for a few seconds."""

    def __init__(self) -> None:
        self._plain: dict[tuple[str, ...], tuple[float, bool]] = {}
        self._facts: dict[str, tuple[float, TableFacts | None]] = {}
        self._types: dict[str, tuple[float, list[ParameterType] | None]] = {}
        self._refused: dict[str, float] = {}
        self._limits: dict[str, int] = {}

    async def are_plain(self, connection: ServerConnection, relations: tuple[str, ...], now: float) -> bool:
        """Whether *relations*, as a read names them, are tables that show all there is, or do not exist.

        Raises:
            ConnectionLost, asyncpg.PostgresError: as :meth:`ServerConnection.run`.
        """
        known = self._plain.get(relations)
        if known is not None and now < known[0]:
            return known[1]
        rows, _ = await connection.run(0, _HIDING, (list(relations),))
        if len(self._plain) >= 1000:
            self._plain.clear()
        self._plain[relations] = (now + REMEMBER, not rows)
        return not rows

    def known_plain(self, relations: tuple[str, ...], now: float) -> bool:
        """Whether it is known, without asking, that :meth:`are_plain` would say yes."""
        known = self._plain.get(relations)
        return known is not None and now < known[0] and known[1]

    async def hiding(self, connection: ServerConnection, relations: tuple[str, ...], now: float) -> list[str]:
        """Those of *relations* that are views, foreign tables, or have row-level security.

        Raises:
            ConnectionLost, asyncpg.PostgresError: as :meth:`ServerConnection.run`.
        """
        if not relations or await self.are_plain(connection, relations, now):
            return []
        return list(relations)

    async def facts(self, connection: ServerConnection, table: str, now: float) -> TableFacts | None:
        """What there is to know of *table*, as text for ``to_regclass``; ``None`` if there is none.

        Raises:
            ConnectionLost, asyncpg.PostgresError: as :meth:`ServerConnection.run`.
        """
        known = self._facts.get(table)
        if known is not None and now < known[0]:
            return known[1]
        rows, names = await connection.run(0, _FACTS, (table,))
        found = _facts_of(dict(zip(names or (), rows[0], strict=True))) if rows else None
        if len(self._facts) >= 1000:
            self._facts.clear()
        # What does not exist yet may exist in a moment.
        self._facts[table] = (now + (REMEMBER if found else ABSENT), found)
        return found

    async def types(self, connection: ServerConnection, sql: str, now: float) -> list[ParameterType] | None:
        """The types of the parameters of *sql*; ``None`` if the server does not tell.

        Raises:
            ConnectionLost: the connection died.
        """
        known = self._types.get(sql)
        if known is not None and now < known[0]:
            return known[1]
        found: list[ParameterType] | None = None
        if not connection.pooled:
            try:
                (parameters, _), _ = await connection.run(STEP, sql, functools.partial(describe, sql=sql))
                found = [(kind.schema, kind.name, kind.kind) for kind in parameters]
            except (asyncpg.PostgresError, asyncpg.InterfaceError):
                pass  # the statement itself will tell what is wrong
        if len(self._types) >= 1000:
            self._types.clear()
        self._types[sql] = (now + REMEMBER, found)
        return found

    def took(self, sql: str, rows: int, seconds: float) -> None:
        """A group of *rows* changes took so long: it shall not hold its locks for longer than ``HOLD``."""
        if seconds <= HOLD:
            self._limits.pop(sql, None)
            return
        if len(self._limits) >= 1000:
            self._limits.clear()
        self._limits[sql] = max(LEAST_GROUP, int(rows * HOLD / seconds))

    def limit(self, sql: str) -> int | None:
        """The most changes in a group, if they take long."""
        return self._limits.get(sql)

    def refused(self, sql: str, now: float) -> bool:
        """Whether the server lately refused to run *sql* by another lane than ``single``."""
        return now < self._refused.get(sql, 0.0)

    def refuse(self, sql: str, now: float) -> None:
        """The server did: it shall go one by one for a while."""
        if len(self._refused) >= 1000:
            self._refused.clear()
        self._refused[sql] = now + REMEMBER


def _facts_of(row: dict[str, Any]) -> TableFacts:
    defaults = row.pop("defaults")
    ticking = {name for name, expression in defaults if expression == "clock_timestamp()"}
    clocked = {name for name, expression in defaults if default_is_clock(expression)} - ticking
    return TableFacts(
        family=tuple(row["family"]),
        columns=tuple(row["columns"]),
        clocked=tuple(clocked),
        ticking=tuple(ticking),
        computed=tuple({name for name, _ in defaults} - clocked - ticking),
        **{key: row[key] for key in ("kinds", "row_security", "triggers", "rules", "deferrable", "self_reference")},
        **{key: row[key] for key in ("foreign_keys", "actions", "isolation")},
    )
