"""Transactions and savepoints on a leased connection, with asyncpg's words and its refusal of misuse."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import asyncpg

from raypg import messages
from raypg.errors import ConfigError, LeaseLostError, RaypgError, TransactionRolledBackError

if TYPE_CHECKING:
    from raypg.lease import LeasedConnection

Isolation = Literal["read_uncommitted", "read_committed", "repeatable_read", "serializable"]

_LEVELS = {
    None: "",
    "read_uncommitted": " ISOLATION LEVEL READ UNCOMMITTED",
    "read_committed": " ISOLATION LEVEL READ COMMITTED",
    "repeatable_read": " ISOLATION LEVEL REPEATABLE READ",
    "serializable": " ISOLATION LEVEL SERIALIZABLE",
}

_NEW = "was not started yet"
_STARTED = "was started already"
_COMMITTED = "is over: it was committed"
_ROLLED_BACK = "is over: it was rolled back"
_FAILED = "is over: it failed"
_ENDED_AROUND = "is over: the transaction around it has ended"


class Transaction:
    """``async with connection.transaction():`` — commits at the end, rolls back on an error. Nested: a savepoint.

    By hand: ``start()``, then ``commit()`` or ``rollback()``. Each object is good for one transaction.

    Raises:
        asyncpg.InterfaceError: from any method that is not due: started twice, committed before it was started or
            after its end, ended by hand inside its ``async with``.
    """

    def __init__(
        self, connection: LeasedConnection, isolation: Isolation | None, readonly: bool, deferrable: bool
    ) -> None:
        self._connection = connection
        self._clauses = _clauses(isolation, readonly, deferrable)
        self._state = _NEW
        self._managed = False
        self._savepoint: str | None = None

    def __repr__(self) -> str:
        return f"<Transaction of {self._connection!r}, {self._state}>"

    async def start(self) -> None:
        """Begin the transaction, or set the savepoint.

        Raises:
            asyncpg.InterfaceError: see the class; also if a transaction was begun by ``execute("BEGIN")``, or one
                around it has other properties than are asked for.
        """
        self._check("start", _NEW)
        connection = self._connection
        self._state = _FAILED  # until it has succeeded; it may not be tried again
        if connection._depth:
            self._check_properties(connection._begun)
            self._savepoint = f"raypg_{connection._depth}"
            await connection.execute(f"SAVEPOINT {self._savepoint}")
        else:
            begin = f"BEGIN{''.join(self._clauses)}"
            try:
                await connection._run(messages.BEGIN, begin, (), None)
            except asyncio.CancelledError:
                # It may have begun all the same, and later statements must not find themselves in it.
                with contextlib.suppress(RaypgError, asyncpg.PostgresError):
                    await asyncio.shield(connection.execute("ROLLBACK"))
                raise
            connection._begun = begin
        self._state = _STARTED
        connection._transactions.append(self)

    async def commit(self) -> None:
        """Commit, or release the savepoint.

        Raises:
            asyncpg.InterfaceError: see the class.
            TransactionRolledBackError: a statement inside had failed, so the server rolled it back.
            OutcomeUnknownError: the connection was lost while COMMIT was under way.
        """
        self._check_by_hand("commit")
        await self._commit()

    async def rollback(self) -> None:
        """Roll back, to the savepoint if it is one.

        Raises:
            asyncpg.InterfaceError: see the class.
        """
        self._check_by_hand("roll back")
        await self._rollback()

    async def _commit(self) -> None:
        self._end("commit")
        if self._savepoint is not None:
            await self._connection.execute(f"RELEASE SAVEPOINT {self._savepoint}")
        else:
            raise_if_rolled_back(await self._connection.execute("COMMIT"))
        self._state = _COMMITTED

    async def _rollback(self) -> None:
        self._end("roll back")
        if self._savepoint is not None:
            await self._connection.execute(
                f"ROLLBACK TO SAVEPOINT {self._savepoint}; RELEASE SAVEPOINT {self._savepoint}"
            )
        else:
            await self._connection.execute("ROLLBACK")
        self._state = _ROLLED_BACK

    async def __aenter__(self) -> Transaction:
        if self._managed:
            raise asyncpg.InterfaceError("cannot enter: the transaction is in an `async with` block already")
        await self.start()
        self._managed = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._managed = False
        if kind is None:
            await self._commit()
            return
        if self._state == _ENDED_AROUND:
            return  # rolled back or committed with what was around it; what matters is the error on its way
        with contextlib.suppress(LeaseLostError):  # the server has rolled back already
            # A second cancellation must not leave the connection inside a transaction that nobody knows of.
            await asyncio.shield(self._rollback())

    # --- misuse ---

    def _check(self, action: str, due: str) -> None:
        if self._state != due:
            again = "" if due == _STARTED and self._state == _NEW else "; make another with connection.transaction()"
            raise asyncpg.InterfaceError(f"cannot {action}: the transaction {self._state}{again}")

    def _check_by_hand(self, action: str) -> None:
        self._check(action, _STARTED)
        if self._managed:
            raise asyncpg.InterfaceError(
                f"cannot {action} by hand inside `async with`: it commits at the end of the block, and rolls back if "
                "that raises"
            )

    def _check_properties(self, around: str) -> None:
        for clause in self._clauses:
            if clause not in around:
                raise asyncpg.InterfaceError(
                    f"a transaction inside another is a savepoint, and cannot be{clause.lower()} where the one around "
                    f"it is not: it was begun with {around or 'BEGIN'}"
                )

    def _end(self, action: str) -> None:
        """Take this one, and what was left open inside it, off the connection."""
        self._check(action, _STARTED)
        open_ones = self._connection._transactions
        position = open_ones.index(self)
        for inner in open_ones[position + 1 :]:
            inner._state = _ENDED_AROUND
        del open_ones[position:]
        self._state = _FAILED  # until it has succeeded


def begin_text(isolation: Isolation | None, readonly: bool, deferrable: bool) -> str:
    """The BEGIN statement for these properties.

    Raises:
        ConfigError: an unknown isolation level.
    """
    return f"BEGIN{''.join(_clauses(isolation, readonly, deferrable))}"


def _clauses(isolation: Isolation | None, readonly: bool, deferrable: bool) -> list[str]:
    if isolation not in _LEVELS:
        known = ", ".join(repr(level) for level in _LEVELS if level)
        raise ConfigError(f"isolation={isolation!r}: must be one of {known}")
    clauses = (_LEVELS[isolation], " READ ONLY" if readonly else "", " DEFERRABLE" if deferrable else "")
    return [clause for clause in clauses if clause]


def raise_if_rolled_back(status: str | None) -> None:
    """PostgreSQL answers COMMIT of a failed transaction with ROLLBACK: that must not pass for success."""
    if status == "ROLLBACK":
        raise TransactionRolledBackError("a statement in the transaction had failed: the server rolled all of it back")
