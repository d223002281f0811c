"""Asking a server whether it is a primary or a standby, of which cluster, and how far its log has come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from raypg.core.replicas import Role
from raypg.core.seen import end_of_record, parse_lsn

QUERY: Final = """
SELECT recovering,
  (SELECT system_identifier FROM pg_catalog.pg_control_system()) AS system,
  (extract(epoch FROM pg_catalog.pg_postmaster_start_time()) * 1000000)::pg_catalog.int8 AS started,
  CASE WHEN recovering THEN coalesce((SELECT received_tli FROM pg_catalog.pg_stat_wal_receiver LIMIT 1),
                                     (SELECT timeline_id FROM pg_catalog.pg_control_checkpoint()))
       ELSE ('x' || pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_flush_lsn()), 1, 8)
            )::pg_catalog.bit(32)::pg_catalog.int4 END AS timeline,
  (CASE WHEN recovering THEN pg_catalog.pg_last_wal_replay_lsn()
        WHEN pg_catalog.current_setting('synchronous_commit') = 'off' THEN pg_catalog.pg_current_wal_insert_lsn()
        ELSE pg_catalog.pg_current_wal_flush_lsn() END)::pg_catalog.text AS lsn,
  CASE WHEN recovering THEN extract(epoch FROM pg_catalog.clock_timestamp()
                                               - pg_catalog.pg_last_xact_replay_timestamp())::pg_catalog.float8
       END AS age
FROM (SELECT pg_catalog.pg_is_in_recovery() AS recovering OFFSET 0) AS asked
"""
"""One row for :func:`role_of`.

On a primary ``lsn`` is what is on its disk: a commit was acknowledged only when it was. Not where it writes, which may
be in the middle of somebody's open transaction, and stay there: a standby is not sent it before it is flushed. Only
where commits do not wait for the disk (``synchronous_commit = off``) that would be too little.

The timeline of a standby is its receiver's, which takes the right to see it (pg_read_all_stats), and one that runs.
Else it is that of its last restart point, which comes late: after a promotion the standby is left aside until then.
"""


def role_of(row: Mapping[str, Any]) -> Role:
    """The answer to :data:`QUERY`."""
    lsn = 0 if row["lsn"] is None else parse_lsn(row["lsn"])
    return Role(
        recovering=row["recovering"],
        system=row["system"],
        life=f"{row['started']:x}",
        timeline=row["timeline"] or 0,
        lsn=lsn if row["recovering"] else end_of_record(lsn),
        age=row["age"],
    )
