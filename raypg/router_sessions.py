"""Sessions of a router: what each has seen of the database, and the connection of its open transaction."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from raypg import messages
from raypg.core.classifier import Classification
from raypg.core.seen import Session, Token
from raypg.core.sql_text import blank
from raypg.errors import ConfigError, LeaseLostError, StatementNotAllowedError
from raypg.lease import LeasedConnection, acquire, raise_if_rolled_back

if TYPE_CHECKING:
    from raypg.dispatch import Dispatcher

__all__ = ["RouterSession", "Sessions"]

LONGEST_ID = 256
_CHAIN = re.compile(r"\bAND\s+CHAIN\b", re.IGNORECASE)
_BEGINS = frozenset(("BEGIN", "START TRANSACTION"))
_ENDS = {"COMMIT": "COMMIT", "ROLLBACK": "ROLLBACK"}


class RouterSession:
    """One session.

    Attributes:
        id: as its user named it; empty for those who name none.
        seen: what it has seen.
        lease: the connection of its open transaction.
        has_ddl: DDL was run in that transaction.
        floor: when it was told last what others have seen, so that what was read before may be older than that.
    """

    __slots__ = ("_busy", "_lost", "_timer", "floor", "has_ddl", "id", "lease", "lock", "seen")

    def __init__(self, name: str, seen: Token) -> None:
        self.id = name
        self.seen = Session(seen)
        self.lease: LeasedConnection | None = None
        self.has_ddl = False
        self.floor = 0.0
        self.lock = asyncio.Lock()
        self._busy = 0
        self._lost = ""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it may be forgotten: there is no transaction, and nothing to be told of one."""
        return self.lease is None and not (self._busy or self._lost or self.lock.locked())

    def has_been_told(self, token: Token, now: float) -> None:
        """Another process has seen so much; now this session is to see no less. Only a place in the log says by itself
        when that was: of all else it may have been just now."""
        seen = self.seen
        if token.seen or not token.lsn or token.timeline != seen.token.timeline or token.lsn > seen.token.lsn:
            self.floor = now
        seen.saw(seen.reads(), seen.token.joined(token))

    async def holds(self) -> LeasedConnection | None:
        """The connection of its open transaction, when what begins or ends one is through.

        Raises:
            LeaseLostError: there was one, and it is gone; said once.
        """
        if self.lock.locked():
            async with self.lock:
                pass
        if self._lost:
            lost, self._lost = self._lost, ""
            raise LeaseLostError(lost)
        return self.lease

    async def run(
        self, mode: int, lease: LeasedConnection, query: str, arguments: Any, timeout: float | None, idle: float
    ) -> tuple[Any, Any]:
        """Run a statement inside its transaction. Errors as :meth:`LeasedConnection.fetch`."""
        self._busy += 1
        try:
            return await lease._run(mode, query, arguments, timeout)
        except LeaseLostError:
            self._forget(lease)
            raise
        finally:
            self._busy -= 1
            self._wait(idle)

    async def change(
        self, mode: int, dispatcher: Dispatcher, verdict: Classification, query: str, name: str | None, idle: float
    ) -> tuple[Any, Any]:
        """Begin a transaction, end it, or set and leave savepoints.

        Raises:
            StatementNotAllowedError: there is none to end, or one already.
            LeaseLostError: there was one, and it is gone.
            PoolExhaustedError, ConnectError …: no connection is to be had; no transaction was begun.
            TransactionRolledBackError: COMMIT of a transaction in which a statement had failed.
            OutcomeUnknownError: the connection was lost while COMMIT was under way.
        """
        command = verdict.command
        if not self.id:
            raise StatementNotAllowedError(f"{command} needs a session_id: a transaction belongs to one session")
        lease = await self.holds()
        async with self.lock:
            lease = self.lease
            if command in _BEGINS:
                if lease is not None:
                    raise StatementNotAllowedError(
                        f"session {self.id!r} has an open transaction: COMMIT or ROLLBACK it first, or use SAVEPOINT"
                    )
                # In one message with the lease: a BEGIN that fails holds nothing.
                self.lease = await acquire(dispatcher, None, None, query, name)
                self._wait(idle)
                return _tag(mode, command)
            if lease is None:
                raise StatementNotAllowedError(
                    f"{command}: session {self.id!r} has no open transaction; BEGIN one first"
                )
            if command in _ENDS and not _CHAIN.search(blank(query)):
                self._forget(lease)
                status = await asyncio.shield(lease._end(_ENDS[command]))
                if command == "COMMIT":
                    raise_if_rolled_back(status)
                return _tag(mode, command)
            outcome = await self.run(mode, lease, query, (), None, idle)
            if command == "PREPARE TRANSACTION":
                self._forget(lease)
                await lease.release()
            return outcome

    def expire(self, idle: float) -> None:
        """Nothing was asked of its transaction for *idle* seconds."""
        self._timer = None
        if self._busy or self.lock.locked():
            self._wait(idle)
            return
        lease, self.lease = self.lease, None
        if lease is None:
            return
        self._lost = (
            f"the transaction of session {self.id!r} was rolled back: nothing was asked of it for {idle:g} s "
            "(session_timeout); begin another"
        )
        _background(lease.release())

    async def close(self) -> None:
        """Roll back what is open."""
        lease = self.lease
        self._forget(lease)
        if lease is not None:
            await lease.release()

    def _forget(self, lease: LeasedConnection | None) -> None:
        if self.lease is lease:
            self.lease = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _wait(self, idle: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self.lease is not None:
            self._timer = asyncio.get_running_loop().call_later(idle, self.expire, idle)


class Sessions:
    """All sessions of one router: those without an id share one.

    What a session that is not known has seen cannot be known either: it begins with all that went through the router,
    so that nobody reads less for having been forgotten.

    Args:
        most: sessions to remember; those with a transaction beside.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[str, RouterSession] = OrderedDict()
        self._all = Session()
        self.shared = RouterSession("", Token())

    def find(self, name: object) -> RouterSession:
        """The session of that id, a new one if need be.

        Raises:
            ConfigError: it is no string of 1 to 256 characters.
        """
        if name is None:
            return self.shared
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST_ID:
            raise ConfigError(f"session_id={name!r:.80}: must be a string of 1 to {LONGEST_ID} characters")
        session = self._known.get(name)
        if session is None:
            session = self._known[name] = RouterSession(name, self._all.token)
            self._shrink()
        self._known.move_to_end(name)
        return session

    def wrote(self, session: RouterSession) -> None:
        """A statement of *session* has run on the primary, however it ended."""
        session.seen.wrote()
        self._all.wrote()

    @property
    def in_transaction(self) -> int:
        """How many have an open transaction."""
        return sum(session.lease is not None for session in self._known.values())

    def __len__(self) -> int:
        return len(self._known)

    async def close(self) -> None:
        """Roll back all that is open, and forget all."""
        sessions = list(self._known.values())
        self._known.clear()
        await asyncio.gather(*(session.close() for session in sessions), return_exceptions=True)

    def _shrink(self) -> None:
        over = len(self._known) - self._most
        if over <= 0:
            return
        for name, session in list(itertools.islice(self._known.items(), over + 64)):
            if session.is_idle and over > 0:
                del self._known[name]
                self._all.saw(self._all.reads(), self._all.token.joined(session.seen.token))
                over -= 1


def _tag(mode: int, command: str) -> tuple[Any, None]:
    """What a statement without rows gives."""
    if mode == messages.BOTH:
        return ([], command), None
    return (command if mode == messages.STATUS else []), None


_tasks: set[asyncio.Future[Any]] = set()


def _background(work: Any) -> None:
    task = asyncio.ensure_future(work)
    _tasks.add(task)
    task.add_done_callback(_done)


def _done(task: asyncio.Future[Any]) -> None:
    _tasks.discard(task)
    if not task.cancelled():
        task.exception()  # the server rolls back in any case
