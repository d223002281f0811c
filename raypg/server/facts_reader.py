"""Reads from the catalogue what :mod:`raypg.core.facts_building` takes. One database has one answer, on any server.

Everything but temporary tables is read at once, so that a verdict needs no further trip. :func:`digest` says cheaply
whether anything changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from raypg.core.facts import Facts
from raypg.core.facts_building import build, seeds
from raypg.core.reach import Reach

__all__ = ["Fetch", "digest", "load", "load_for_writes"]

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

_INHERITS = """
SELECT n.nspname::text AS schema, c.relname::text AS name, pn.nspname::text AS parent_schema, p.relname::text AS parent
FROM pg_catalog.pg_inherits i
JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid AND c.relkind IN ('r', 'p', 'f')
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_class p ON p.oid = i.inhparent
JOIN pg_catalog.pg_namespace pn ON pn.oid = p.relnamespace
"""

# What else happens when a table is written to, for :mod:`raypg.core.reach`.

_TRIGGERS = """
SELECT DISTINCT n.nspname::text AS schema, c.relname::text AS name, fn.nspname::text AS function_schema,
       p.proname::text AS function
FROM pg_catalog.pg_trigger t
JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
JOIN pg_catalog.pg_namespace fn ON fn.oid = p.pronamespace
WHERE NOT t.tgisinternal AND c.relpersistence <> 't'
"""

_CASCADES = """
SELECT DISTINCT n.nspname::text AS schema, c.relname::text AS name, tn.nspname::text AS to_schema,
       t.relname::text AS to_name
FROM pg_catalog.pg_constraint k
JOIN pg_catalog.pg_class c ON c.oid = k.confrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_class t ON t.oid = k.conrelid
JOIN pg_catalog.pg_namespace tn ON tn.oid = t.relnamespace
WHERE k.contype = 'f' AND (k.confdeltype NOT IN ('a', 'r') OR k.confupdtype NOT IN ('a', 'r'))
"""

_RULES = """
SELECT DISTINCT n.nspname::text AS schema, c.relname::text AS name
FROM pg_catalog.pg_rewrite r
JOIN pg_catalog.pg_class c ON c.oid = r.ev_class
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE r.oid >= 16384 AND r.ev_type <> '1'
"""

# Functions behind defaults, checks, indexes, policies, partition keys; also those behind operators that they use.
_USES = """
WITH own (oid, classid, objid) AS (
    SELECT adrelid, 'pg_catalog.pg_attrdef'::regclass, oid FROM pg_catalog.pg_attrdef
    UNION ALL
    SELECT conrelid, 'pg_catalog.pg_constraint'::regclass, oid FROM pg_catalog.pg_constraint WHERE conrelid <> 0
    UNION ALL
    SELECT indrelid, 'pg_catalog.pg_class'::regclass, indexrelid FROM pg_catalog.pg_index
    UNION ALL
    SELECT polrelid, 'pg_catalog.pg_policy'::regclass, oid FROM pg_catalog.pg_policy
    UNION ALL
    SELECT oid, 'pg_catalog.pg_class'::regclass, oid FROM pg_catalog.pg_class WHERE relkind = 'p'
)
SELECT DISTINCT n.nspname::text AS schema, c.relname::text AS name, fn.nspname::text AS function_schema,
       p.proname::text AS function
FROM own
JOIN pg_catalog.pg_depend d ON d.classid = own.classid AND d.objid = own.objid
LEFT JOIN pg_catalog.pg_operator o ON d.refclassid = 'pg_catalog.pg_operator'::regclass AND o.oid = d.refobjid
JOIN pg_catalog.pg_proc p
  ON p.oid = CASE WHEN d.refclassid = 'pg_catalog.pg_proc'::regclass THEN d.refobjid ELSE o.oprcode END
JOIN pg_catalog.pg_class c ON c.oid = own.oid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_namespace fn ON fn.oid = p.pronamespace
WHERE p.oid >= 16384
"""

# Not what runs at a login: that is no statement of ours.
_EVENTS = """
SELECT DISTINCT n.nspname::text AS function_schema, p.proname::text AS function
FROM pg_catalog.pg_event_trigger e
JOIN pg_catalog.pg_proc p ON p.oid = e.evtfoid
JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
WHERE e.evtenabled <> 'D' AND e.evtevent <> 'login'
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
    (SELECT sum(hashtextextended(xmin::text || oid, 0)) FROM pg_catalog.pg_trigger WHERE NOT tgisinternal),
    (SELECT sum(hashtextextended(xmin::text || oid, 0)) FROM pg_catalog.pg_constraint WHERE conrelid <> 0),
    (SELECT sum(hashtextextended(xmin::text || oid, 0)) FROM pg_catalog.pg_attrdef),
    (SELECT sum(hashtextextended(xmin::text || oid, 0)) FROM pg_catalog.pg_event_trigger),
    (SELECT sum(hashtextextended(xmin::text || indexrelid, 0)) FROM pg_catalog.pg_index WHERE indexrelid >= 16384),
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
    "inherits": _INHERITS,
}
_MORE_QUERIES = {"triggers": _TRIGGERS, "cascades": _CASCADES, "rules": _RULES, "uses": _USES, "events": _EVENTS}


async def load(fetch: Fetch) -> Facts:
    """Read everything: nine queries, and one more where a type is not harmless.

    Raises:
        asyncpg.PostgresError, UnavailableError: what *fetch* raises.
    """
    return (await _load(fetch))[0]


async def load_for_writes(fetch: Fetch) -> Reach:
    """What statements may write to: five queries more. Errors as :func:`load`."""
    facts, rows = await _load(fetch)
    rows |= {name: await fetch(query) for name, query in _MORE_QUERIES.items()}
    return await asyncio.to_thread(Reach, facts, rows)


async def _load(fetch: Fetch) -> tuple[Facts, dict[str, Sequence[Any]]]:
    rows = {name: await fetch(query) for name, query in _QUERIES.items()}
    facts = await asyncio.to_thread(build, rows)
    known: frozenset[str] = frozenset()
    while (found := seeds(facts)) and found != known:
        known = found
        parts = await fetch(_PARTS, sorted(found))
        facts = build(rows, {row["seed"]: (row["types"], row["relations"]) for row in parts})
    return facts, rows


async def digest(fetch: Fetch) -> str:
    """A text that changes when anything does that :func:`load` reads. Errors as there."""
    return str((await fetch(_DIGEST))[0]["digest"])
