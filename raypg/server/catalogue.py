"""Facts of the catalogue: whether a read is what it seems, and whether inserts may travel as one group.

A read of a table leaves nothing behind. A read of a view, a foreign table, or a table with row-level security calls
functions that its text does not show.

A group is one transaction. It must give the same results as its statements one by one would: so no user triggers or
rules (they could tell the difference), no deferrable constraints (checked at the end), no defaults out of the now()
family (equal for all rows of a transaction), no default isolation above READ COMMITTED.
"""

from __future__ import annotations

from typing import Any

import pgparse

from raypg.server.connection import ServerConnection

REMEMBER = 10.0
"""Seconds for which a fact is believed: somebody may add a trigger at any time."""

_FACTS = """
WITH RECURSIVE family AS (
    SELECT to_regclass($1)::oid AS oid
    UNION SELECT inhrelid FROM pg_catalog.pg_inherits JOIN family ON inhparent = family.oid
)
SELECT coalesce(bool_and(
           c.relkind IN ('r', 'p')
           AND NOT c.relrowsecurity
           AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal)
           AND NOT EXISTS (SELECT FROM pg_catalog.pg_rewrite r WHERE r.ev_class = c.oid)
           AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint k WHERE k.conrelid = c.oid AND k.condeferrable)
       ), false)
       AND current_setting('default_transaction_isolation') IN ('read committed', 'read uncommitted') AS plain,
       ARRAY(
           SELECT a.attname::text
           FROM pg_catalog.pg_attrdef d
           JOIN pg_catalog.pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
           WHERE d.adrelid = to_regclass($1) AND a.attgenerated = ''
             AND pg_catalog.pg_get_expr(d.adbin, d.adrelid) ~ '[(]|CURRENT_|LOCALTIME'
             AND pg_catalog.pg_get_expr(d.adbin, d.adrelid) !~
                 '^(nextval\\(''[^'']*''::regclass\\)|(gen_random_uuid|uuidv[47]|random|clock_timestamp)\\(\\))$'
           UNION ALL
           SELECT a.attname::text
           FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
           WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.atthasdef AND t.typdefault IS NOT NULL
       ) AS clocked,
       ARRAY(
           SELECT a.attname::text FROM pg_catalog.pg_attribute a
           WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
       ) AS columns
FROM family JOIN pg_catalog.pg_class c ON c.oid = family.oid
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
        self._groupable: dict[str, tuple[float, bool]] = {}

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

    async def may_group(self, connection: ServerConnection, insert: str, now: float) -> bool:
        """Whether many runs of *insert*, an INSERT … VALUES without ON CONFLICT and RETURNING, may share a transaction.

        Raises:
            ConnectionLost, asyncpg.PostgresError: as :meth:`ServerConnection.run`.
        """
        known = self._groupable.get(insert)
        if known is not None and now < known[0]:
            return known[1]
        table, columns, width = _target(insert)
        rows, _ = await connection.run(0, _FACTS, (table,))
        verdict = False
        if rows:
            plain, clocked, every = rows[0]
            given = set(columns) if columns else set(every[:width])
            verdict = bool(plain) and not set(clocked) - given
        if len(self._groupable) >= 1000:
            self._groupable.clear()
        self._groupable[insert] = (now + REMEMBER, verdict)
        return verdict


def _target(insert: str) -> tuple[str, list[str], int]:
    """(table as text for to_regclass, its columns as far as named, number of values)."""
    statement: dict[str, Any] = pgparse.parse(insert)[0]["stmt"]["InsertStmt"]
    relation = statement["relation"]
    parts = [relation[key] for key in ("schemaname", "relname") if relation.get(key)]
    table = ".".join('"' + part.replace('"', '""') + '"' for part in parts)
    columns = [column["ResTarget"]["name"] for column in statement.get("cols", [])]
    values = statement["selectStmt"]["SelectStmt"]["valuesLists"][0]["List"]["items"]
    return table, columns, len(values)
