"""What a connection is writing to, as far as that was announced: it hangs on the connection until it is over."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from raypg.core.intents import Intent, Intents

if TYPE_CHECKING:
    from raypg.server.connection import ServerConnection


class Held:
    """What one connection is writing to."""

    __slots__ = ("_all", "intents")

    def __init__(self, all_of_them: Intents) -> None:
        self._all = all_of_them
        self.intents: dict[str, Intent] = {}

    def settle(self, connection: ServerConnection) -> None:
        """A statement is over: so is all that *connection* wrote, unless a transaction is open. Of one that is lost
        whoever drops it says so."""
        if not connection.raw.is_closed() and not connection.raw.is_in_transaction():
            self.end()

    def end(self) -> None:
        """It is over, whatever came of it."""
        intents, self.intents = self.intents, {}
        self._all.leave(list(intents.values()), time.monotonic())
