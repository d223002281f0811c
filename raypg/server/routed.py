"""A read that a replica may answer, on its way: from one server to the next, until one has answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raypg.messages import Note, Where
from raypg.portable import PortableError
from raypg.server.replies import BatchState, Client
from raypg.server.work import Statement

if TYPE_CHECKING:
    from raypg.server.engine import Engine
    from raypg.server.replica import Replica

REFUSALS = frozenset({"25006", "55000"})
"""SQLSTATEs of a standby that say that the statement writes, or asks what only a primary knows: *read-only
transaction*, *recovery is in progress*. It had no effect."""

_CONFLICTS = frozenset({"40001", "40P01"})
"""Those that say that it had to end because of what was replayed."""

_UNAVAILABLE = frozenset({"ConnectError", "CircuitBreakerError", "PoolExhaustedError"})


class RoutedRead(Statement):
    """A statement that a replica may answer.

    Attributes:
        home: the engine that it waits or runs in; ``None`` while it is to be found out which.
        replica: whose engine that is.
        where: what a replica must show.
        note: what its caller is told of who answered.
        sent_at, load: when it was sent to the replica, and how many times its own work was to be done before it.
        tries: replicas that it was sent to.
    """

    __slots__ = ("batch_of", "home", "load", "note", "replica", "sent_at", "tries", "where")

    def __init__(self, batch: BatchState, *more: Any) -> None:
        super().__init__(batch, *more)
        self.batch_of = batch
        self.home: Engine | None = None
        self.note: Note | None = None
        self.where: Where = (None, None)
        self.replica: Replica | None = None
        self.sent_at, self.load = 0.0, 1.0
        self.tries = 0

    @property
    def client(self) -> Client:
        """Whose it is."""
        return self.batch_of.client

    def withdraw(self, engine: Engine) -> bool:
        return self.home is not None and super().withdraw(self.home)

    def told(self, then: Callable[[RoutedRead, PortableError | None], bool]) -> None:
        """Let *then* see the outcome first; it says whether the caller is to have it."""
        self.batch = Detour(self, then)  # type: ignore[assignment]


class Detour:
    """Stands in for the batch of one read: its outcome passes through here."""

    __slots__ = ("_read", "_then")

    def __init__(self, read: RoutedRead, then: Callable[[RoutedRead, PortableError | None], bool]) -> None:
        self._read = read
        self._then = then

    @property
    def begun(self) -> bool:
        """Whether anything of the batch has begun."""
        return self._read.batch_of.begun

    @begun.setter
    def begun(self, value: bool) -> None:
        self._read.batch_of.begun = value

    def finish(
        self, position: int, payload: object, names: tuple[str, ...] | None, error: PortableError | None = None
    ) -> None:
        """The statement is done, here."""
        if self._then(self._read, error):
            self._read.batch_of.finish(position, payload, names, error, self._read.note)


def sqlstate_of(error: PortableError) -> str | None:
    """The SQLSTATE of an error of the server."""
    kind, _, _, attributes = error
    return attributes.get("sqlstate") if kind == "asyncpg" and attributes else None


def is_refusal(error: PortableError) -> bool:
    """Whether a standby will not run the statement, and the primary might."""
    return sqlstate_of(error) in REFUSALS


def may_go_on(error: PortableError, hung: bool) -> bool:
    """Whether another server may be asked: the statement itself has no part in this.

    Not when a server has died under it: the statement may be what killed it. A read that was ended on purpose has had
    its second try by then.

    Args:
        hung: the server did not answer, and was given up.
    """
    if error[0] == "raypg":
        return error[1] in _UNAVAILABLE or (hung and error[1] == "ConnectionLostError")
    return sqlstate_of(error) in _CONFLICTS
