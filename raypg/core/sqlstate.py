"""What an SQLSTATE means for raypg: one table, and the few decisions that are taken from it.

Decided by code, severity and whether the connection lived; never by words of a message, which are translated.
Codes: appendix A of PostgreSQL's documentation. The exceptions of asyncpg carry them as ``sqlstate``, the
severity as ``severity`` (translated) and ``severity_en`` (not), the C function as ``server_source_function``.
asyncpg wraps the FATAL that ended a connection: look at ``__cause__`` of its ConnectionDoesNotExistError
first.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, get_args

__all__ = [
    "CATEGORIES",
    "CLASSES",
    "CODES",
    "Category",
    "Meaning",
    "Outcome",
    "Verdict",
    "bisection_kind",
    "breaker_verdict",
    "error_category",
    "is_rerun_whole_group",
    "is_row_error",
    "is_transient",
    "meaning",
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
CATEGORIES: Final[tuple[Category, ...]] = get_args(Category)
Outcome = Literal["not_applied", "unknown"]

Verdict = Literal["trip", "ignore"]


class Meaning(NamedTuple):
    """What a code, or every code of a class that has no entry of its own, means.

    Attributes:
        name: PostgreSQL's, of the class; of a code what it says.
        alive: for the breaker, when the severity is ERROR and the connection lives.
        dead: for the breaker, when the server ended the connection with it (FATAL, PANIC).
        transient: whether the same may succeed a little later though nobody mends anything. Sending it again is for
            those who know that it did nothing: see :func:`outcome`.
        category: the guide's, of a statement.
        connecting: the guide's, of an attempt to connect.
    """

    name: str
    alive: Verdict = "ignore"
    dead: Verdict = "trip"
    transient: bool = False
    category: Category = "query_error"
    connecting: Category = "query_error"


CLASSES: Final[dict[str, Meaning]] = {
    "00": Meaning("successful completion"),
    "01": Meaning("warning"),
    "02": Meaning("no data"),
    "03": Meaning("SQL statement not yet complete"),
    "08": Meaning(
        "connection exception", transient=True, connecting="connection_refused"
    ),  # on a live connection: dblink, an FDW or RAISE
    "09": Meaning("triggered action exception"),
    "0A": Meaning("feature not supported"),  # also "cached plan must not change result type"
    "0B": Meaning("invalid transaction initiation"),
    "0F": Meaning("locator exception"),
    "0L": Meaning("invalid grantor"),
    "0P": Meaning("invalid role specification"),
    "0Z": Meaning("diagnostics exception"),
    "10": Meaning("XQuery error"),
    "20": Meaning("case not found"),
    "21": Meaning("cardinality violation"),  # 21000: ON CONFLICT DO UPDATE meets one row twice
    "22": Meaning("data exception"),
    "23": Meaning("integrity constraint violation"),
    "24": Meaning("invalid cursor state"),
    "25": Meaning("invalid transaction state"),  # 25006 read-only, 25P03 and 25P04 timeouts
    "26": Meaning("invalid SQL statement name"),  # a pooler in between lost a prepared statement
    "27": Meaning("triggered data change violation"),
    "28": Meaning("invalid authorization specification", connecting="authentication_failed"),
    "2B": Meaning("dependent privilege descriptors still exist"),
    "2D": Meaning("invalid transaction termination"),  # CALL with COMMIT inside a transaction
    "2F": Meaning("SQL routine exception"),
    "34": Meaning("invalid cursor name"),
    "38": Meaning("external routine exception"),
    "39": Meaning("external routine invocation exception"),
    "3B": Meaning("savepoint exception"),
    "3D": Meaning("invalid catalog name"),  # the database does not exist
    "3F": Meaning("invalid schema name"),
    "40": Meaning("transaction rollback"),  # 40001 serialization, 40P01 deadlock
    "42": Meaning("syntax error or access rule violation"),
    "44": Meaning("WITH CHECK OPTION violation"),
    "53": Meaning(
        "insufficient resources", transient=True, connecting="connection_refused"
    ),  # 53300 too many connections
    "54": Meaning("program limit exceeded"),  # also: a value too long for its index
    "55": Meaning("object not in prerequisite state", connecting="connection_refused"),  # 55P03 lock not available
    "57": Meaning(
        "operator intervention", connecting="connection_refused"
    ),  # 57014 cancelled, 57P01 shutdown, 57P02 crash, 57P03 starting, 57P05 idle
    "58": Meaning("system error (external to PostgreSQL)", connecting="connection_refused"),
    "72": Meaning("snapshot failure", transient=True),  # until PostgreSQL 16
    "F0": Meaning("configuration file error"),
    "HV": Meaning("foreign data wrapper error"),
    "P0": Meaning("PL/pgSQL error"),  # P0001: RAISE EXCEPTION
    "XX": Meaning("internal error", connecting="connection_refused"),
}
"""Every class of appendix A: its first two characters → what its codes mean, but for those in ``CODES``."""

CODES: Final[dict[str, Meaning]] = {
    # The server says ERROR and goes on, and yet it is its own trouble, and not the statement's.
    "53100": Meaning("disk full", alive="trip", transient=True, connecting="connection_refused"),
    "53200": Meaning("out of memory", alive="trip", transient=True, connecting="connection_refused"),
    "58030": Meaning("I/O error", alive="trip", connecting="connection_refused"),
    "XX001": Meaning("data corrupted", alive="trip", connecting="connection_refused"),
    "XX002": Meaning("index corrupted", alive="trip", connecting="connection_refused"),
    # Somebody, or a limit that somebody set, has ended a statement or a session on purpose. A shutdown shows itself by
    # the connects that then fail.
    "25P03": Meaning("idle in transaction for too long", dead="ignore", category="query_timeout"),
    "25P04": Meaning("transaction for too long", dead="ignore", category="query_timeout"),
    "57P05": Meaning("idle for too long", dead="ignore", category="query_timeout", connecting="connection_refused"),
    "57014": Meaning("cancelled", dead="ignore", category="query_timeout", connecting="connection_refused"),
    "57P01": Meaning("ended by an administrator", dead="ignore", transient=True, connecting="connection_refused"),
    "57P03": Meaning("starting up or shutting down", transient=True, connecting="connection_refused"),
    "53300": Meaning("too many connections", transient=True, connecting="pool_exhausted"),
    "40001": Meaning("serialization failure", transient=True),
    "40P01": Meaning("deadlock", transient=True),
    "55P03": Meaning("lock not available", transient=True, connecting="connection_refused"),
    # Permission for a database is checked while connecting, as part of letting somebody in.
    "42501": Meaning("insufficient privilege", connecting="authentication_failed"),
}
"""Codes that mean something else than their class."""

_UNKNOWN: Final = Meaning("of no class that PostgreSQL has: raised by somebody's function")
# Without a code: refused, unreachable, or the connection ended without a word.
_SILENCE: Final = Meaning("nothing was said", alive="ignore", transient=True, connecting="connection_refused")

# Errors that one row of a group may cause while its neighbours are fine.
_ROW_CLASSES: Final = frozenset({"22", "23", "44", "P0"})
_ROW_CODES: Final = frozenset({"21000", "54000"})
# 42501 is a missing privilege (of all rows), unless the executor raised it for a policy's WITH CHECK.
_POLICY_VIOLATION: Final = "42501"
_POLICY_FUNCTION: Final = "ExecWithCheckOptions"

_RERUN: Final = frozenset({"40001", "40P01"})
_CRASH: Final = "57P02"


def meaning(sqlstate: str | None) -> Meaning:
    """The entry of a code; ``None``: the server said nothing."""
    if not sqlstate:
        return _SILENCE
    return CODES.get(sqlstate) or CLASSES.get(sqlstate[:2], _UNKNOWN)


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
    if timed_out:
        return "connection_timeout" if connecting else "query_timeout"
    known = meaning(sqlstate)
    if connecting:
        return known.connecting  # query_error: what it was asked for does not exist: 3D000, 22023 …
    if known.category == "query_timeout":
        return "query_error" if cancelled else "query_timeout"
    return "connection_refused" if connection_lost else known.category


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


def breaker_verdict(
    sqlstate: str | None, *, severity: str | None, connection_alive: bool, connecting: bool = False
) -> Verdict:
    """Whether an error says that the server is unwell, so that the breaker must count it.

    Args:
        sqlstate: the server's code, None if it said nothing.
        severity: ``severity_en`` of the error, None without one.
        connection_alive: whether the connection can still be used.
        connecting: whether it happened before the connection could be used: then it counts, whatever it was.
    """
    if connecting:
        return "trip"
    known = meaning(sqlstate)
    return known.alive if connection_alive and severity not in ("FATAL", "PANIC") else known.dead


def is_transient(sqlstate: str | None) -> bool:
    """Whether the same may succeed a little later though nobody mends anything."""
    return meaning(sqlstate).transient
