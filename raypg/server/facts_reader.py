"""Reads from the catalogue what :mod:`raypg.core.facts_building` takes. One database has one answer, on any server.

Everything but temporary tables is read at once, so that a verdict needs no further trip. :func:`digest` says cheaply
whether anything changed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from raypg.core.facts import Facts
from raypg.core.facts_building import build, seeds

__all__ = ["Fetch", "digest", "load"]

Fetch = Callable[..., Awaitable[Sequence[Any]]]
"""``fetch(query, *args)``, as asyncpg's and the pool's; rows by column name."""

# 16384 is the lowest oid that is not the system's own (FirstNormalObjectId).

_SETTINGS = "SELECT current_setting('standard_conforming_strings') AS strings"

_BUILTIN = """
SELECT proname::text AS name, bool_and(provolatile = 'i' AND prokind <> 'p') AS immutable
FROM pg_catalog.pg_proc
WHERE pronamespace = 'pg_catalog'::regnamespace AND oid < 16384
  AND NOT 'internal'::regtype = ANY (proargtypes::oid[])
GROUP BY proname
"""

_RELATIONS = """
WITH RECURSIVE up (oid) AS (
    SELECT i.inhparent FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
    WHERE c.relpersistence = 'u' OR c.relkind = 'f'
    UNION
    SELECT i.inhparent FROM pg_catalog.pg_inherits i JOIN up ON i.inhrelid = up.oid
)
SELECT n.nspname::text AS schema, c.relname::text AS name, c.relkind::text AS kind,
       c.relpersistence::text AS persistence, c.oid IN (SELECT oid FROM up) AS parts,
       CASE WHEN c.relkind = 'v' AND c.oid >= 16384 THEN pg_catalog.pg_get_viewdef(c.oid) END AS definition,
       CASE WHEN c.relrowsecurity THEN ARRAY(
           SELECT pg_catalog.pg_get_expr(p.polqual, p.polrelid) FROM pg_catalog.pg_policy p
           WHERE p.polrelid = c.oid AND p.polqual IS NOT NULL AND p.polcmd IN ('r', '*')
       ) END AS policies
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND n.nspname <> 'pg_toast' AND c.relpersistence <> 't'
"""

_FUNCTIONS = """
SELECT n.nspname::text AS schema, p.proname::text AS name, l.lanname::text AS language, p.prokind::text AS kind,
       p.provolatile::text AS volatility,
       CASE WHEN l.lanname IN ('sql', 'plpgsql') THEN
           CASE WHEN p.prosrc <> '' THEN p.prosrc ELSE pg_catalog.pg_get_function_sqlbody(p.oid) END
       END AS source,
       pg_catalog.pg_get_expr(p.proargdefaults, 0) AS defaults,
       ARRAY(
           SELECT t.typname::text FROM pg_catalog.pg_type t
           WHERE t.oid = ANY (coalesce(p.proallargtypes, p.proargtypes::oid[]) || p.prorettype) AND t.oid >= 16384
       ) AS types,
       (SELECT array_agg(ARRAY[fn.nspname::text, f.proname::text])
        FROM pg_catalog.pg_aggregate a
        JOIN pg_catalog.pg_proc f ON f.oid IN (a.aggtransfn, a.aggfinalfn, a.aggcombinefn, a.aggserialfn,
                                               a.aggdeserialfn, a.aggmtransfn, a.aggminvtransfn, a.aggmfinalfn)
        JOIN pg_catalog.pg_namespace fn ON fn.oid = f.pronamespace
        WHERE a.aggfnoid = p.oid) AS calls
FROM pg_catalog.pg_proc p
JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
JOIN pg_catalog.pg_language l ON l.oid = p.prolang
WHERE p.oid >= 16384
"""

_OPERATORS = """
SELECT o.oprname::text AS name, n.nspname::text AS schema, p.proname::text AS function,
       ARRAY(SELECT t.typname::text FROM pg_catalog.pg_type t
             WHERE t.oid IN (o.oprleft, o.oprright, o.oprresult) AND t.oid >= 16384) AS types
FROM pg_catalog.pg_operator o
JOIN pg_catalog.pg_proc p ON p.oid = o.oprcode
JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
WHERE o.oid >= 16384
"""

_CASTS = """
SELECT c.castcontext::text AS context, t.typname::text AS target, n.nspname::text AS schema,
       p.proname::text AS function,
       CASE WHEN s.oid >= 16384 THEN s.typname::text WHEN t.oid >= 16384 THEN t.typname::text END AS type
FROM pg_catalog.pg_cast c
JOIN pg_catalog.pg_type s ON s.oid = c.castsource
JOIN pg_catalog.pg_type t ON t.oid = c.casttarget
JOIN pg_catalog.pg_proc p ON p.oid = c.castfunc
JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
WHERE c.oid >= 16384
"""

_DOMAINS = """
SELECT t.typname::text AS name, array_agg(pg_catalog.pg_get_expr(c.conbin, 0)) AS checks
FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_type t ON t.oid = c.contypid
WHERE c.contypid >= 16384 AND c.conbin IS NOT NULL
GROUP BY t.oid, t.typname
"""

_CLASSES = """
SELECT DISTINCT t.typname::text AS type, n.nspname::text AS schema, p.proname::text AS function
FROM pg_catalog.pg_amproc a
JOIN pg_catalog.pg_proc p ON p.oid = a.amproc
JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
JOIN pg_catalog.pg_language l ON l.oid = p.prolang
JOIN pg_catalog.pg_type t ON t.oid IN (a.amproclefttype, a.amprocrighttype)
WHERE p.oid >= 16384 AND l.lanname NOT IN ('c', 'internal')
"""

# What a type is part of: arrays, domains over it, ranges, composites, and the relations with such columns.
_PARTS = """
WITH RECURSIVE part (seed, oid) AS (
    SELECT t.typname::text, t.oid FROM pg_catalog.pg_type t WHERE t.typname = ANY ($1::text[])
    UNION
    SELECT part.seed, t.oid
    FROM part JOIN LATERAL (
        SELECT t.oid FROM pg_catalog.pg_type t
        WHERE t.typelem = part.oid OR t.typbasetype = part.oid
           OR EXISTS (SELECT FROM pg_catalog.pg_range r
                      WHERE r.rngsubtype = part.oid AND t.oid IN (r.rngtypid, r.rngmultitypid))
           OR EXISTS (SELECT FROM pg_catalog.pg_attribute a
                      WHERE a.attrelid = t.typrelid AND a.atttypid = part.oid AND a.attnum > 0)
    ) t ON true
)
SELECT part.seed, array_agg(DISTINCT t.typname::text) AS types,
       coalesce(array_agg(DISTINCT c.relname::text) FILTER (WHERE c.relkind <> 'c'), '{}') AS relations
FROM part JOIN pg_catalog.pg_type t ON t.oid = part.oid
LEFT JOIN pg_catalog.pg_attribute a ON a.atttypid = t.oid AND a.attnum > 0
LEFT JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
GROUP BY part.seed
"""

_DIGEST = """
SELECT ARRAY[
    (SELECT sum(hashtextextended(xmin::text || oid || relname || relnamespace, relrowsecurity::int))
     FROM pg_catalog.pg_class
     WHERE oid >= 16384 AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND relpersistence <> 't'),
    (SELECT sum(hashtextextended(xmin::text || oid, 0)) FROM pg_catalog.pg_proc WHERE oid >= 16384),
    (SELECT sum(hashtextextended(xmin::text || oid, 0)) FROM pg_catalog.pg_rewrite WHERE oid >= 16384),
    (SELECT sum(hashtextextended(xmin::text || oid, 0)) FROM pg_catalog.pg_policy),
    (SELECT sum(hashtextextended(xmin::text || oid, 0)) FROM pg_catalog.pg_operator WHERE oid >= 16384),
    (SELECT sum(hashtextextended(xmin::text || oid, 0)) FROM pg_catalog.pg_cast WHERE oid >= 16384),
    (SELECT sum(hashtextextended(xmin::text || oid, 0)) FROM pg_catalog.pg_constraint WHERE contypid <> 0),
    (SELECT sum(hashtextextended(xmin::text || oid, 0)) FROM pg_catalog.pg_amproc WHERE oid >= 16384),
    (SELECT sum(hashtextextended(xmin::text || inhrelid, 0)) FROM pg_catalog.pg_inherits),
    (SELECT sum(hashtextextended(xmin::text || oid, 0)) FROM pg_catalog.pg_namespace
     WHERE oid >= 16384 AND nspname !~ '^pg_'),
    (SELECT hashtextextended(current_setting('standard_conforming_strings'), 0))
]::text AS digest
"""

_QUERIES = {
    "settings": _SETTINGS,
    "builtin": _BUILTIN,
    "relations": _RELATIONS,
    "functions": _FUNCTIONS,
    "operators": _OPERATORS,
    "casts": _CASTS,
    "domains": _DOMAINS,
    "classes": _CLASSES,
}


async def load(fetch: Fetch) -> Facts:
    """Read everything: eight queries, and one more where a type is not harmless.

    Raises:
        asyncpg.PostgresError, UnavailableError: what *fetch* raises.
    """
    rows = {name: await fetch(query) for name, query in _QUERIES.items()}
    facts = build(rows)
    known: frozenset[str] = frozenset()
    while (found := seeds(facts)) and found != known:
        known = found
        parts = await fetch(_PARTS, sorted(found))
        facts = build(rows, {row["seed"]: (row["types"], row["relations"]) for row in parts})
    return facts


async def digest(fetch: Fetch) -> str:
    """A text that changes when anything does that :func:`load` reads. Errors as there."""
    return str((await fetch(_DIGEST))[0]["digest"])
