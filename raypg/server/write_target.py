"""What the catalogue says of a table that is to be written to."""

from __future__ import annotations

import asyncpg

from raypg.core.arrow_types import Column
from raypg.core.write_plan import SIMPLE_KINDS, Key, Table, quoted
from raypg.server.connection import ServerConnection

_TABLE = """
WITH RECURSIVE target AS (SELECT to_regclass($1)::oid AS oid), family AS (
    SELECT oid FROM target
    UNION SELECT i.inhrelid FROM family JOIN pg_catalog.pg_inherits i ON i.inhparent = family.oid
)
SELECT n.nspname::text, c.relname::text, c.relkind::text,
       c.relkind IN ('r', 'p') AND pg_catalog.row_security_active(c.oid),
       EXISTS (SELECT FROM pg_catalog.pg_rewrite r WHERE r.ev_class = c.oid)
           OR NOT pg_catalog.has_table_privilege(c.oid, 'INSERT'),
       pg_catalog.has_database_privilege(pg_catalog.current_database(), 'TEMP'),
       NOT EXISTS (
           SELECT FROM family f JOIN pg_catalog.pg_class k ON k.oid = f.oid
           WHERE k.relrowsecurity
              OR EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = k.oid AND NOT t.tgisinternal)
              OR EXISTS (SELECT FROM pg_catalog.pg_constraint o WHERE o.conrelid = k.oid AND o.contype = 'c')
              OR EXISTS (SELECT FROM pg_catalog.pg_index x WHERE x.indrelid = k.oid
                         AND (x.indexprs IS NOT NULL OR x.indpred IS NOT NULL))
              OR EXISTS (SELECT FROM pg_catalog.pg_attrdef d WHERE d.adrelid = k.oid
                         AND pg_catalog.pg_get_expr(d.adbin, d.adrelid) ~ '[(]'
                         AND pg_catalog.pg_get_expr(d.adbin, d.adrelid) !~ '^(nextval[(]''|now[(][)]$)')
       ), __STAMP__,
       pg_catalog.quote_ident(pg_catalog.current_database()), pg_catalog.quote_ident(current_user)
FROM target JOIN pg_catalog.pg_class c ON c.oid = target.oid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
"""

_STAMP = """
(SELECT md5(string_agg(concat_ws(' ', a.attnum, a.attname, a.atttypid, a.atttypmod, a.attgenerated, a.attidentity), ','
                       ORDER BY a.attnum))
 FROM pg_catalog.pg_attribute a WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped)
"""

_BELOW = """(
    WITH RECURSIVE below AS (
        SELECT __TYPE__.oid AS oid, __TYPE__.typtype AS typtype, __TYPE__.typbasetype AS typbasetype
        UNION ALL
        SELECT d.oid, d.typtype, d.typbasetype FROM below JOIN pg_catalog.pg_type d ON d.oid = below.typbasetype
        WHERE below.typtype = 'd'
    )
    SELECT b.* FROM below JOIN pg_catalog.pg_type b ON b.oid = below.oid WHERE below.typtype <> 'd'
)"""
"""What a domain is made of; any other type itself."""

_COLUMNS = """
SELECT a.attname::text, base.typname::text, base.typtype::text,
       coalesce(CASE WHEN base.typelem <> 0 AND base.typlen = -1 THEN e.typname::text END, ''),
       pg_catalog.format_type(a.atttypid, a.atttypmod),
       pg_catalog.format_type(
           coalesce(nullif(CASE WHEN e.typtype = 'd' THEN inner_base.typarray END, 0), base.oid), -1
       ),
       (a.attnotnull OR t.typnotnull) AND NOT a.atthasdef AND t.typdefault IS NULL AND a.attidentity = '',
       a.attidentity::text, a.attgenerated <> ''
FROM pg_catalog.pg_attribute a
JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
CROSS JOIN LATERAL __BELOW_T__ AS base
LEFT JOIN pg_catalog.pg_type e ON e.oid = base.typelem
LEFT JOIN LATERAL __BELOW_E__ AS inner_base ON true
WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum
""".replace("__BELOW_T__", _BELOW.replace("__TYPE__", "t")).replace("__BELOW_E__", _BELOW.replace("__TYPE__", "e"))

_KEYS = """
SELECT ARRAY(SELECT a.attname::text FROM unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY AS k(number, place)
             JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number ORDER BY k.place),
       i.indisprimary, coalesce((to_jsonb(i)->>'indnullsnotdistinct')::bool, false)
FROM pg_catalog.pg_index i
WHERE i.indrelid = to_regclass($1) AND i.indisunique AND i.indimmediate AND i.indisvalid
  AND i.indexprs IS NULL AND i.indpred IS NULL
ORDER BY i.indisprimary DESC
"""

FETCH = 0


async def read_table(connection: ServerConnection, name: tuple[str | None, str]) -> Table:
    """The table of that (schema, name); without a schema, the one that search_path leads to.

    Raises:
        ConnectionLost, asyncpg.PostgresError: as :meth:`ServerConnection.run`.
        asyncpg.UndefinedTableError: there is none.
    """
    text = ".".join(quoted(part) for part in name if part is not None)
    rows, _ = await connection.run(FETCH, _TABLE.replace("__STAMP__", _STAMP), (text,), reads=True)
    if not rows:
        raise asyncpg.UndefinedTableError(f"relation {text} does not exist")
    ((schema, table, kind, secured, ruled, may_stage, quiet, *about),) = rows
    columns, _ = await connection.run(FETCH, _COLUMNS, (text,), reads=True)
    keys, _ = await connection.run(FETCH, _KEYS, (text,), reads=True)
    return Table(
        schema,
        table,
        kind,
        bool(secured),
        ruled and kind != "v",
        may_stage,
        quiet and kind in SIMPLE_KINDS,
        tuple(Column(*row) for row in columns),
        tuple(Key(tuple(names), primary, nulls) for names, primary, nulls in keys),
        *about,
    )


async def is_unchanged(connection: ServerConnection, table: Table) -> bool:
    """Whether the columns of *table* are those that were read; raises as :meth:`ServerConnection.run`."""
    ((stamp,),), _ = await connection.run(FETCH, f"SELECT {_STAMP}", (table.shown,))
    return bool(stamp == table.stamp)
