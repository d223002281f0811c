"""Tables whose changes are told to caches even if they do not go through the pool: by triggers that notify.

What is made in the database: the schema ``raypg`` with a function ``cache_changed()``, and a trigger ``raypg_cache`` on
each table, once for each statement that writes to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from raypg.core.sql_text import quoted_name
from raypg.errors import ConfigError

if TYPE_CHECKING:
    from raypg.pool import WorkflowConnectionPool

__all__ = ["CHANNEL", "changed_table", "unwatch", "watch", "watched"]

CHANNEL: Final = "raypg_cache"
TRIGGER: Final = "raypg_cache"
FUNCTION: Final = ("raypg", "cache_changed")

_FUNCTION = f"""
DO $raypg$
BEGIN
  CREATE SCHEMA IF NOT EXISTS raypg;
  CREATE OR REPLACE FUNCTION raypg.cache_changed() RETURNS trigger LANGUAGE plpgsql AS $body$
BEGIN
  PERFORM pg_catalog.pg_notify('{CHANNEL}', pg_catalog.concat_ws(pg_catalog.chr(9),
    pg_catalog.current_setting('application_name'), tg_table_schema, tg_table_name));
  RETURN NULL;
END
$body$;
END
$raypg$
"""

_FIND = """
SELECT n.nspname::text AS schema, c.relname::text AS name, c.relkind::text AS kind
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass($1)
"""

_WATCHED = f"""
SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS name
FROM pg_catalog.pg_trigger t
JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE t.tgname = '{TRIGGER}' AND NOT t.tgisinternal ORDER BY 1
"""


def changed_table(payload: str) -> tuple[str, str, str]:
    """(application name of who wrote, schema, name), of what the triggers tell."""
    sender, schema, name = payload.rsplit("\t", 2)
    return sender, schema, name


async def watch(pool: WorkflowConnectionPool, tables: Iterable[str]) -> list[str]:
    """Have changes of *tables* told. Those who write to them need no more privileges than before.

    Returns:
        The tables, as PostgreSQL writes their names.

    Raises:
        ConfigError: there is no such table.
        asyncpg.InsufficientPrivilegeError: the pool's user does not own one.
    """
    found = [await _find(pool, table) for table in tables]
    await pool.execute(_FUNCTION)
    for schema, name in found:
        table = quoted_name(schema, name)
        async with pool.transaction() as tx:
            await tx.execute(f"DROP TRIGGER IF EXISTS {TRIGGER} ON {table}")
            await tx.execute(
                f"CREATE TRIGGER {TRIGGER} AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON {table} "
                "FOR EACH STATEMENT EXECUTE FUNCTION raypg.cache_changed()"
            )
    return [quoted_name(*name) for name in found]


async def unwatch(pool: WorkflowConnectionPool, tables: Iterable[str]) -> list[str]:
    """Have them told no longer. Errors as of :func:`watch`; a table that is not watched is none."""
    found = [await _find(pool, table) for table in tables]
    for name in found:
        await pool.execute(f"DROP TRIGGER IF EXISTS {TRIGGER} ON {quoted_name(*name)}")
    return [quoted_name(*name) for name in found]


async def watched(pool: WorkflowConnectionPool) -> list[str]:
    """The tables whose changes are told."""
    return [row["name"] for row in await pool.fetch(_WATCHED)]


async def _find(pool: WorkflowConnectionPool, table: str) -> tuple[str, str]:
    row = await pool.fetchrow(_FIND, table)
    if row is None:
        raise ConfigError(f"there is no table {table}: give its name with its schema, as in public.users")
    if row["kind"] not in ("r", "p"):
        raise ConfigError(f"{table} is no table: watch the tables that it is made of")
    return row["schema"], row["name"]
