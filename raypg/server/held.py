"""What a connection is writing to, as far as that was announced: it hangs on the connection until it is over."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from raypg.core.intents import Intent, Intents

if TYPE_CHECKING:
    from raypg.server.connection import ServerConnection


Use = tuple[float, str | None]
"""One use of a connection: since when it is in use, and the lease that it is given to."""


class Held:
    """What one connection is writing to.

    Attributes:
        intents: what its statements have announced.
    """

    __slots__ = ("_all", "_widened", "intents")

    def __init__(self, all_of_them: Intents) -> None:
        self._all = all_of_them
        self._widened: dict[tuple[str, Use], Intent] = {}
        self.intents: dict[str, Intent] = {}

    def widen(self, table: str, use: Use) -> bool:
        """What runs in *use* may write to *table* too, until :meth:`over`: beside what is announced, by it or by who
        has the connection next. False if that was known."""
        if (table, use) in self._widened:
            return False
        self._widened[table, use] = self._all.enter((table,))[0]
        return True

    def over(self, table: str, use: Use) -> None:
        """That *use* has ended, and nothing else."""
        intent = self._widened.pop((table, use), None)
        if intent is not None:
            self._all.leave([intent], time.monotonic())

    def settle(self, connection: ServerConnection) -> None:
        """A statement is over: so is all that *connection* wrote, unless a transaction is open. Of one that is lost
        whoever drops it says so."""
        if not connection.raw.is_closed() and not connection.raw.is_in_transaction():
            self.end()

    def end(self) -> None:
        """It is over, whatever came of it."""
        intents = [*self.intents.values(), *self._widened.values()]
        self.intents, self._widened = {}, {}
        self._all.leave(intents, time.monotonic())
