"""Who waits for whom on the server now, and how many connections it has: one query of the control connection."""

from __future__ import annotations

from typing import Any

import asyncpg

from raypg.core.statements import identify, shown

__all__ = ["QUERY", "describe"]

MOST_BLOCKED = 50
"""Blocked sessions that are shown, those that wait longest."""

PREPARED = "prepared transaction"
"""What holds a lock for process 0, by ``pg_blocking_pids``."""

# waitstart came with PostgreSQL 14, and is null for a moment: then the statement's own start is the best that is known.
# Only sessions that wait for a lock are asked for their blockers: the function locks the lock manager for a moment.
QUERY = """
WITH waiting AS MATERIALIZED (
  SELECT pid, coalesce(
           (SELECT min((pg_catalog.to_jsonb(l) ->> 'waitstart')::timestamptz)
            FROM pg_catalog.pg_locks l WHERE l.pid = a.pid AND NOT l.granted),
           a.query_start) AS since
  FROM pg_catalog.pg_stat_activity a
  WHERE wait_event_type = 'Lock'
  ORDER BY since LIMIT $2
), blocked AS MATERIALIZED (
  SELECT pid, since, pg_catalog.pg_blocking_pids(pid) AS blocked_by FROM waiting
), concerned AS (
  SELECT pid FROM blocked WHERE pg_catalog.cardinality(blocked_by) > 0
  UNION SELECT pg_catalog.unnest(blocked_by) FROM blocked
), all_clients AS (
  SELECT count(*) AS backends FROM pg_catalog.pg_stat_activity WHERE backend_type = 'client backend'
)
SELECT all_clients.backends, pg_catalog.current_setting('max_connections')::int AS server_max_connections,
       c.pid, a.application_name, a.usename, pg_catalog.host(a.client_addr) AS client, a.state, a.backend_type,
       a.wait_event_type, a.wait_event, a.query, b.blocked_by,
       extract(epoch FROM pg_catalog.clock_timestamp() - CASE WHEN a.state = 'active' THEN a.query_start
                                                              ELSE a.state_change END)::float8 AS seconds,
       extract(epoch FROM pg_catalog.clock_timestamp() - b.since)::float8 AS waiting_seconds,
       (a.usename = current_user AND pg_catalog.starts_with(a.application_name, $1)) IS TRUE AS ours
FROM all_clients
LEFT JOIN concerned c ON true
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = c.pid
LEFT JOIN blocked b ON b.pid = c.pid
ORDER BY b.since NULLS LAST, c.pid
"""


def describe(records: list[asyncpg.Record]) -> dict[str, Any]:
    """The answer to :data:`QUERY` as plain data: ``sessions``, ``backends``, ``server_max_connections``.

    Statements are shown without literals: they may hold what is nobody's business.
    """
    first = records[0]
    return {
        "error": None,
        "sessions": [_session(record) for record in records if record["pid"] is not None],
        "backends": first["backends"],
        "server_max_connections": first["server_max_connections"],
    }


def _session(record: asyncpg.Record) -> dict[str, Any]:
    query = record["query"] or ""
    return {
        "pid": record["pid"],
        "application": record["application_name"] or "",
        "user": record["usename"] or "",
        "client": record["client"] or "",
        "state": record["state"] or (record["backend_type"] if record["pid"] else PREPARED) or "",
        "wait_event_type": record["wait_event_type"],
        "wait_event": record["wait_event"],
        "seconds": record["seconds"],
        "query": shown(query, identify(query)) if query else "",
        "blocked_by": list(record["blocked_by"] or ()),
        "waiting_seconds": record["waiting_seconds"] if record["blocked_by"] else None,
        "ours": record["ours"],
    }
