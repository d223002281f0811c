"""A pooler (PgBouncer and its like) between raypg and PostgreSQL: how it is noticed, and what it takes away.

A transaction pooler gives each transaction whichever connection to the server is free. So nothing may be left in a
session: it would be met by whoever comes next, and not by its owner. What a text shows of that is refused here; what
happens inside functions and DO blocks cannot be seen. https://www.pgbouncer.org/features.html
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple

import asyncpg
import pgparse

from raypg.core.sql import LONGEST, classify, shorten
from raypg.errors import StatementNotAllowedError

Mode = Literal["off", "transaction", "session"]
"""What is shared by the pooler in front; ``off``: there is none."""

WARNING: Final = (
    "pool %s: a pooler stands between raypg and PostgreSQL, and is taken to share single transactions. So: no prepared "
    "statements are kept; a lease is one transaction (use pool.transaction()); SET, LISTEN, PREPARE, session advisory "
    "locks and temporary tables that outlive their transaction are refused; sessions are not reset, which is up to "
    "the pooler; max_connections counts connections to the pooler; backends of dead workers are left to the pooler, "
    "and client_connection_check_interval, tcp_user_timeout and idle_in_transaction_session_timeout are not set. "
    "Give pooler='transaction' to be spared this warning, pooler='session' if it shares whole sessions, or the "
    "server's own address."
)

_NAMED_STATEMENTS: Final = frozenset({"PrepareStmt", "ExecuteStmt", "DeallocateStmt"})
_SESSION_LOCKS: Final = frozenset({
    *(f"pg_{kind}advisory_lock{shared}" for kind in ("", "try_") for shared in ("", "_shared")),
    *("pg_advisory_unlock", "pg_advisory_unlock_shared", "pg_advisory_unlock_all"),
})  # fmt: skip
_SEQUENCE_STATE: Final = frozenset({"currval", "lastval"})
_WITH_HOLD: Final = 0x20  # CURSOR_OPT_HOLD of the parser
_FIRST_WORDS: Final = frozenset({"SET", "RESET", "LISTEN", "UNLISTEN", "PREPARE", "EXECUTE", "DEALLOCATE", "DISCARD"})


class _Trace(NamedTuple):
    """What a statement would leave in its session, and what to do instead."""

    what: str
    instead: str
    until_commit: bool = False  # it only does harm where no transaction holds the session


async def stands_between(raw: asyncpg.Connection) -> bool:
    """Whether what answers on *raw* is a pooler: then the process id that it gave at connect is not the backend's."""
    try:
        # Unnamed: a named statement would stay on some connection of the pooler, in the way of its next user.
        statement = await raw.prepare("SELECT pg_catalog.pg_backend_pid()", name="")
        return bool(await statement.fetchval() != raw.get_server_pid())
    except asyncpg.InvalidSQLStatementNameError:
        return True  # prepared on one backend, run on another


def refusal(sql: str, *, in_transaction: bool, leased: bool) -> StatementNotAllowedError | None:
    """Why a transaction pooler would not do justice to a statement, if so.

    Args:
        sql: the text.
        in_transaction: whether a transaction is open, so that the pooler keeps to one backend.
        leased: whether the caller holds the connection for longer than this statement.
    """
    trace = _trace(sql) if len(sql) <= LONGEST else _trace_of_first_word(sql)
    if trace is not None and not (trace.until_commit and in_transaction):
        return StatementNotAllowedError(
            f"{trace.what} cannot be used behind a transaction pooler, which gives each transaction another session: "
            f"{trace.instead} [{shorten(sql)}]"
        )
    if leased and not in_transaction and classify(sql).kind not in ("transaction", "empty"):
        return StatementNotAllowedError(
            "behind a transaction pooler a lease is one transaction, for outside of one each statement may meet "
            "another session: use `async with pool.transaction() as tx:`, or `async with connection.transaction():` "
            f"inside the lease [{shorten(sql)}]"
        )
    return None


@functools.lru_cache(maxsize=1024)
def _trace(sql: str) -> _Trace | None:
    if classify(sql).kind == "invalid":
        return _trace_of_first_word(sql)
    for raw in pgparse.parse(sql):
        for tag, body in _nodes(raw["stmt"]):
            trace = _trace_of_node(tag, body)
            if trace is not None:
                return trace
    return None


def _trace_of_first_word(sql: str) -> _Trace | None:
    """For texts that are not parsed."""
    word = classify(sql).command
    return _Trace(word, "send it to the server's own address") if word in _FIRST_WORDS else None


def _nodes(root: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """(tag, body) of all nodes of a tree, and the (key, value) of other dicts in it; without recursion."""
    todo = [root]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo.extend(node)
        elif isinstance(node, dict):
            todo.extend(node.values())
            yield from ((key, value) for key, value in node.items() if isinstance(value, dict))


def _trace_of_node(tag: str, body: dict[str, Any]) -> _Trace | None:
    if tag == "VariableSetStmt":
        if body.get("is_local") or body.get("name") in ("TRANSACTION", "TRANSACTION SNAPSHOT"):
            return None
        word = "RESET" if body.get("kind") in ("VAR_RESET", "VAR_RESET_ALL") else "SET"
        return _Trace(word, "use SET LOCAL in pool.transaction(), or settings={…} of a call, which end with it")
    if tag in ("ListenStmt", "UnlistenStmt"):
        return _Trace("LISTEN", "listen over a connection to the server's own address")
    if tag in _NAMED_STATEMENTS:
        return _Trace("PREPARE", "send the statement itself, with parameters")
    if tag == "DiscardStmt":
        return _Trace("DISCARD", "resetting sessions is up to the pooler")
    if tag == "LoadStmt":
        return _Trace("LOAD", "have the server load it (session_preload_libraries)")
    if tag == "DeclareCursorStmt" and body.get("options", 0) & _WITH_HOLD:
        return _Trace("a cursor WITH HOLD", "leave out WITH HOLD, and fetch inside the transaction")
    if tag == "FuncCall":
        return _trace_of_function(body)
    return _trace_of_temporary(tag, body)


def _trace_of_function(call: dict[str, Any]) -> _Trace | None:
    name = call["funcname"][-1].get("String", {}).get("sval", "")
    if name in _SESSION_LOCKS:
        return _Trace(f"{name}()", "use pg_advisory_xact_lock() in pool.transaction()")
    if name in _SEQUENCE_STATE:
        return _Trace(f"{name}()", "use RETURNING, or ask in the same pool.transaction()", until_commit=True)
    if name == "set_config":
        local = call.get("args", [])[2:]
        if not local or not local[0].get("A_Const", {}).get("boolval", {}).get("boolval", False):
            return _Trace("set_config(…, false)", "give true as the third argument, in pool.transaction()")
    return None


def _trace_of_temporary(tag: str, body: dict[str, Any]) -> _Trace | None:
    """Temporary tables, views and sequences that stay when the transaction ends."""
    made = {
        "CreateStmt": "relation",
        "ViewStmt": "view",
        "CreateSeqStmt": "sequence",
        "into": "rel",
        "intoClause": "rel",
    }
    relation = body.get(made.get(tag, ""))
    if not isinstance(relation, dict):
        return None
    temporary = relation.get("relpersistence") == "t" or relation.get("schemaname") == "pg_temp"
    if not temporary or "ONCOMMIT_DROP" in (body.get("oncommit"), body.get("onCommit")):
        return None
    return _Trace(
        "a temporary table, view or sequence that outlives its transaction",
        "make a table with ON COMMIT DROP, and use it in the same pool.transaction()",
    )
