"""What an SQLSTATE means for raypg: one table, and the few decisions that are taken from it.

Decided by code, severity and whether the connection lived; never by words of a message, which are translated.
Codes: appendix A of PostgreSQL's documentation. The exceptions of asyncpg carry them as ``sqlstate``, the
severity as ``severity`` (translated) and ``severity_en`` (not), the C function as ``server_source_function``.
asyncpg wraps the FATAL that ended a connection: look at ``__cause__`` of its ConnectionDoesNotExistError
first.
"""

from __future__ import annotations

from typing import Final, Literal

__all__ = [
    "CLASSES",
    "Category",
    "Outcome",
    "bisection_kind",
    "breaker_verdict",
    "error_category",
    "is_rerun_whole_group",
    "is_row_error",
    "outcome",
    "read_may_be_retried",
    "stops_bisection",
]

Category = Literal[
    "connection_timeout",
    "connection_refused",
    "authentication_failed",
    "query_timeout",
    "query_error",
    "pool_exhausted",
]
Outcome = Literal["not_applied", "unknown"]

CLASSES: Final[dict[str, str]] = {
    "00": "successful completion",
    "01": "warning",
    "02": "no data",
    "03": "SQL statement not yet complete",
    "08": "connection exception",  # on a live connection: dblink, an FDW or RAISE
    "09": "triggered action exception",
    "0A": "feature not supported",  # also "cached plan must not change result type"
    "0B": "invalid transaction initiation",
    "0F": "locator exception",
    "0L": "invalid grantor",
    "0P": "invalid role specification",
    "0Z": "diagnostics exception",
    "10": "XQuery error",
    "20": "case not found",
    "21": "cardinality violation",  # 21000: ON CONFLICT DO UPDATE meets one row twice
    "22": "data exception",
    "23": "integrity constraint violation",
    "24": "invalid cursor state",
    "25": "invalid transaction state",  # 25006 read-only, 25P03 and 25P04 timeouts
    "26": "invalid SQL statement name",  # a pooler in between lost a prepared statement
    "27": "triggered data change violation",
    "28": "invalid authorization specification",
    "2B": "dependent privilege descriptors still exist",
    "2D": "invalid transaction termination",  # CALL with COMMIT inside a transaction
    "2F": "SQL routine exception",
    "34": "invalid cursor name",
    "38": "external routine exception",
    "39": "external routine invocation exception",
    "3B": "savepoint exception",
    "3D": "invalid catalog name",  # the database does not exist
    "3F": "invalid schema name",
    "40": "transaction rollback",  # 40001 serialization, 40P01 deadlock
    "42": "syntax error or access rule violation",
    "44": "WITH CHECK OPTION violation",
    "53": "insufficient resources",  # 53300 too many connections
    "54": "program limit exceeded",  # also: a value too long for its index
    "55": "object not in prerequisite state",  # 55P03 lock not available
    "57": "operator intervention",  # 57014 cancelled, 57P01 shutdown, 57P02 crash, 57P03 starting, 57P05 idle
    "58": "system error (external to PostgreSQL)",
    "72": "snapshot failure",  # until PostgreSQL 16
    "F0": "configuration file error",
    "HV": "foreign data wrapper error",
    "P0": "PL/pgSQL error",  # P0001: RAISE EXCEPTION
    "XX": "internal error",
}
"""Every class of appendix A: its first two characters → its name."""

# Errors that one row of a group may cause while its neighbours are fine.
_ROW_CLASSES: Final = frozenset({"22", "23", "44", "P0"})
_ROW_CODES: Final = frozenset({"21000", "54000"})
# 42501 is a missing privilege (of all rows), unless the executor raised it for a policy's WITH CHECK.
_POLICY_VIOLATION: Final = "42501"
_POLICY_FUNCTION: Final = "ExecWithCheckOptions"

_RERUN: Final = frozenset({"40001", "40P01"})
_TIMEOUTS: Final = frozenset({"57014", "25P03", "25P04", "57P05"})
# Permission for a database is checked while connecting, as part of letting somebody in.
_NOT_LET_IN: Final = frozenset({"42501"})
_CONNECT_TROUBLE: Final = frozenset({"08", "53", "55", "57", "58", "XX"})
_CRASH: Final = "57P02"


def _class(sqlstate: str | None) -> str:
    return (sqlstate or "")[:2]


def error_category(
    sqlstate: str | None,
    *,
    connecting: bool,
    timed_out: bool,
    connection_lost: bool = False,
    cancelled: bool = False,
) -> Category:
    """Which of the six categories an error belongs to.

    Args:
        sqlstate: the server's code, None if it said nothing (refused, unreachable, EOF).
        connecting: whether it happened before the connection could be used.
        timed_out: whether raypg's own time limit ended it.
        connection_lost: whether the connection died with it, while a statement ran.
        cancelled: whether the caller cancelled it: then 57014 is no timeout.
    """
    if connecting:
        if timed_out:
            return "connection_timeout"
        if sqlstate == "53300":
            return "pool_exhausted"
        if _class(sqlstate) == "28" or sqlstate in _NOT_LET_IN:
            return "authentication_failed"
        if sqlstate is None or _class(sqlstate) in _CONNECT_TROUBLE:
            return "connection_refused"
        return "query_error"  # the server answered, and what it was asked for does not exist: 3D000, 22023 …
    if timed_out:
        return "query_timeout"
    if sqlstate in _TIMEOUTS:
        return "query_error" if cancelled else "query_timeout"
    return "connection_refused" if connection_lost else "query_error"


def is_row_error(sqlstate: str | None, *, server_function: str | None = None) -> bool:
    """Whether one row of a group may be to blame, so that the others may succeed without it.

    A code of a class that PostgreSQL does not have comes from somebody's trigger, and counts as of a row.

    Args:
        sqlstate: the server's code.
        server_function: the C function that raised it (field R of the error); tells row-level security from a
            missing privilege.
    """
    if not sqlstate:
        return False
    if sqlstate == _POLICY_VIOLATION:
        return server_function == _POLICY_FUNCTION
    return sqlstate in _ROW_CODES or _class(sqlstate) in _ROW_CLASSES or _class(sqlstate) not in CLASSES


def is_rerun_whole_group(sqlstate: str | None) -> bool:
    """Whether the same rows may succeed when sent again: the error proves that they were rolled back."""
    return sqlstate in _RERUN


def stops_bisection(sqlstate: str | None, *, server_function: str | None = None) -> bool:
    """Whether it is no row's fault: cancelled, locked, out of resources, connection lost, wrong SQL …"""
    return not is_rerun_whole_group(sqlstate) and not is_row_error(sqlstate, server_function=server_function)


def bisection_kind(
    sqlstate: str | None, *, severity: str | None = "ERROR", server_function: str | None = None
) -> Literal["row", "again", "stop"]:
    """What :meth:`raypg.core.bisection.Bisection.failed` is to be told.

    Args:
        sqlstate: the server's code, or asyncpg's own for a value that it cannot encode (22000).
        severity: ``severity_en``; None if asyncpg raised it itself. FATAL and PANIC stop the search.
        server_function: as for :func:`is_row_error`.
    """
    if severity not in ("ERROR", None) or stops_bisection(sqlstate, server_function=server_function):
        return "stop"
    return "again" if is_rerun_whole_group(sqlstate) else "row"


def outcome(
    severity: str | None,
    *,
    sent: bool = True,
    connection_alive: bool,
    ready_for_query: bool,
    crash: bool = False,
) -> Outcome:
    """Whether a failed statement outside a transaction is known to have had no effect.

    Known only if no byte was written, or if the server said ERROR and was then ready for the next statement.
    FATAL, an EOF, a timeout, or a command tag without that readiness: unknown.

    Args:
        severity: ``severity_en`` of the error, None without one.
        sent: whether a byte of it was written.
        connection_alive: whether the connection can still be used.
        ready_for_query: whether the server then reported that it was ready.
        crash: whether a backend crashed (57P02).
    """
    if not sent:
        return "not_applied"
    if severity == "ERROR" and connection_alive and ready_for_query and not crash:
        return "not_applied"
    return "unknown"


def read_may_be_retried(
    sqlstate: str | None, *, severity: str | None, connection_lost: bool, sent: bool = True
) -> bool:
    """Whether a retryable read that failed may be sent once more.

    Not after a crash (57P02, or an EOF without a FATAL): the read may be the killer, and would take the next
    backend.

    Args:
        sqlstate: the server's code, None without one.
        severity: ``severity_en`` of the server's last word, None if it said nothing.
        connection_lost: whether the connection died.
        sent: whether a byte of it was written; if not, it is harmless.
    """
    if not sent:
        return True
    if connection_lost:
        return severity == "FATAL" and sqlstate != _CRASH
    return is_rerun_whole_group(sqlstate)


# The server says ERROR, and goes on: only these are its own trouble, and not the statement's.
_TROUBLE: Final = frozenset({"53100", "53200", "58030", "XX001", "XX002"})
# Somebody, or a limit that somebody set, has ended a statement or a session on purpose. A shutdown shows itself by the
# connects that then fail.
_ON_PURPOSE: Final = frozenset({"25P03", "57P05", "57014", "57P01"})


def breaker_verdict(
    sqlstate: str | None, *, severity: str | None, connection_alive: bool, connecting: bool = False
) -> Literal["trip", "ignore"]:
    """Whether an error says that the server is unwell, so that the breaker must count it.

    Args:
        sqlstate: the server's code, None if it said nothing.
        severity: ``severity_en`` of the error, None without one.
        connection_alive: whether the connection can still be used.
        connecting: whether it happened before the connection could be used.
    """
    if connecting:
        return "trip"
    if sqlstate in _ON_PURPOSE:
        return "ignore"
    if connection_alive and severity not in ("FATAL", "PANIC"):
        return "trip" if sqlstate in _TROUBLE else "ignore"
    return "trip"
