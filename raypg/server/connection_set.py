"""The connections of one worker: never more than its budget, the idle ones kept warm, the old ones replaced."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING

from raypg.config import PoolConfig
from raypg.errors import ConnectError
from raypg.server.connect import Connector
from raypg.server.connection import ServerConnection
from raypg.server.guard import Guard

if TYPE_CHECKING:
    from raypg.server.held import Held

logger = logging.getLogger(__name__)

PING_TIMEOUT = 2.0
"""Seconds in which an idle connection must answer a ping."""

VALID = 3.0
"""Seconds for which a budget holds, from the moment at which this worker last told the Pool actor that it lives. Who
cannot be heard opens no new connections, so that its share can be given to others when its connections are ended."""


class ConnectionSet:
    """Owns the connections of a worker. A *slot* is one unit of budget; it is taken before a connection is opened
    and free again only when the server has confirmed the end of that connection.

    Args:
        connector: opens connections.
        config: lifetimes, sizes and timeouts.
        guard: told of connections that open, fail to, or do not answer.
        on_free: called when a connection or a slot may have become free.

    Attributes:
        budget: most slots.
        valid_until: until when connections may be opened, by the monotonic clock.
        least: connections to keep open, work or not.
    """

    def __init__(self, connector: Connector, config: PoolConfig, guard: Guard, on_free: Callable[[], None]) -> None:
        self._connector = connector
        self._guard = guard
        self.config = config
        self._on_free = on_free
        self._idle: list[ServerConnection] = []
        self._all: set[ServerConnection] = set()
        self._opening = 0
        self._retiring = 0
        self._unconfirmed: dict[int, float] = {}
        self._held: dict[int, list[Held]] = {}  # what they may still be writing to
        self._closers: set[asyncio.Task[None]] = set()
        self.budget = 0
        self.valid_until = 0.0
        self.least = 0
        self.created = 0
        self.recycled = 0
        self.failed = 0
        self.last_error: ConnectError | None = None

    # --- what there is ---

    def __iter__(self) -> Iterator[ServerConnection]:
        return iter(tuple(self._all))

    @property
    def total(self) -> int:
        """Connections that exist."""
        return len(self._all)

    @property
    def idle(self) -> int:
        """Connections that nobody uses."""
        return len(self._idle)

    @property
    def opening(self) -> int:
        """Connections being opened."""
        return self._opening

    @property
    def slots(self) -> int:
        """Slots in use: connections that exist, are being opened, or whose end the server has not confirmed."""
        return len(self._all) + self._opening + len(self._unconfirmed)

    @property
    def unconfirmed(self) -> list[int]:
        """Process ids of backends that were given up and may still exist."""
        return list(self._unconfirmed)

    def use(self) -> str:
        """What the connections are doing, in words, for errors."""
        counts = {
            "held by leases": sum(c.lease is not None for c in self._all),
            "running statements": sum(c.busy and c.lease is None for c in self._all),
            "idle": len(self._idle),
            "being opened": self._opening,
            "being closed": self._retiring,
            "not confirmed to have ended": len(self._unconfirmed),
        }
        counts["being put in order"] = len(self._all) - sum(list(counts.values())[:3]) - self._retiring
        words = ", ".join(f"{count} {what}" for what, count in counts.items() if count > 0)
        failed = f"; the last attempt to connect failed: {self.last_error}" if self.last_error is not None else ""
        return f"its {self.budget} connections: {words or 'none open'}{failed}"

    @property
    def may_open(self) -> bool:
        """Whether the budget has room for one more, and still holds."""
        return self.slots < self.budget and time.monotonic() < self.valid_until

    @property
    def _surplus(self) -> bool:
        return len(self._all) - self._retiring > self.budget

    def grant(self, budget: int, valid_until: float) -> None:
        """Take a budget; what is above it and idle is closed at once, what is in use when it comes back."""
        self.budget, self.valid_until = budget, valid_until
        while self._idle and self._surplus:
            self.retire(self._idle.pop(0))

    # --- using them ---

    def take_idle(self) -> ServerConnection | None:
        """The most recently used idle connection (the warmest), or ``None``. It may have died: ask ``is_alive``."""
        return self._idle.pop() if self._idle else None

    def open(self) -> Coroutine[None, None, ServerConnection]:
        """Begin to open a connection; its slot is taken at once. The caller has checked :attr:`may_open`.

        Raises:
            ConnectError: when awaited: the server could not be reached or refused.
        """
        self._opening += 1
        return self._open()

    async def _open(self) -> ServerConnection:
        guard = self._guard
        token, started = guard.token, time.monotonic()
        try:
            connection = await self._connector.open()
        except ConnectError as error:
            self.failed += 1
            self.last_error = error
            guard.connect_failed(token, time.monotonic() - started, error)
            raise
        finally:
            self._opening -= 1
        connection.guard = guard
        guard.connected(token, time.monotonic() - started)
        self.created += 1
        self.last_error = None
        self._all.add(connection)
        return connection

    def put_back(self, connection: ServerConnection) -> None:
        """Return a clean, living connection."""
        if connection.raw.is_closed():
            self.drop(connection)
        elif self.is_unwanted(connection, connection.last_used):
            self.retire(connection)
        else:
            self._idle.append(connection)
        self._on_free()

    def is_unwanted(self, connection: ServerConnection, now: float) -> bool:
        """Whether *connection* should be closed rather than used again: too old, unhealthy, or over the budget."""
        return self._surplus or now >= connection.expires_at or connection.health < self.config.health_threshold

    def drop(self, connection: ServerConnection) -> None:
        """Forget a connection that is of no more use. Its slot is free if it was the server that ended it."""
        self._all.discard(connection)
        self.recycled += 1
        if not connection.raw.is_closed():
            connection.abandon()
        self._ended(connection, not connection.abandoned)
        self._on_free()

    def _ended(self, connection: ServerConnection, confirmed: bool) -> None:
        """A connection is closed; *confirmed*: its backend is gone, and whatever it did."""
        held, connection.held = connection.held, None
        if not confirmed:
            self._unconfirmed[connection.pid] = connection.last_used
            if held is not None:
                self._held.setdefault(connection.pid, []).append(held)
        elif held is not None:
            held.end()

    def retire(self, connection: ServerConnection) -> None:
        """Close a connection in the background; its slot is free when the server has confirmed."""
        self._retiring += 1
        task = asyncio.get_running_loop().create_task(self._retire(connection))
        self._closers.add(task)
        task.add_done_callback(self._closers.discard)

    async def _retire(self, connection: ServerConnection) -> None:
        try:
            confirmed = await connection.close()
        finally:
            self._retiring -= 1
        self._all.discard(connection)
        self.recycled += 1
        self._ended(connection, confirmed)
        self._on_free()

    def confirm_gone(self, pids: set[int]) -> None:
        """The server no longer shows these backends: their slots are free."""
        for pid in pids:
            for held in self._held.pop(pid, ()):
                held.end()
        if [pid for pid in pids if self._unconfirmed.pop(pid, None) is not None]:
            self._on_free()

    def hold_unconfirmed(self, hold: Callable[[], Held]) -> None:
        """What the backends that were given up are writing to is not known: *hold* holds it until they are gone."""
        for pid in self._unconfirmed:
            self._held.setdefault(pid, []).append(hold())

    def is_in_use(self, connection: ServerConnection) -> bool:
        """Whether somebody uses it."""
        return connection in self._all and connection not in self._idle

    # --- keeping them ---

    async def warm_up(self, least: int) -> None:
        """Open connections until *least* exist, as far as the budget goes.

        Raises:
            ConnectError: of the first that failed, if no connection exists afterwards.
        """
        opening = []
        while self.slots < least and self.may_open:
            opening.append(self.open())
        results = await asyncio.gather(*opening, return_exceptions=True)
        for result in results:
            if isinstance(result, ServerConnection):
                self.put_back(result)
        errors = [result for result in results if isinstance(result, ConnectError)]
        if errors and not self._all:
            raise errors[0]

    @property
    def missing(self) -> int:
        """Connections to open so that there are as many as are to be kept."""
        if not self.config.pre_warm:
            return 0  # they are kept once there was need of them
        return self.least - len(self._all) - self._opening

    def drop_dead(self) -> None:
        """Forget idle connections that the server has ended. That alone is no failure: somebody may have ended them on
        purpose; but they are replaced at once, and if that fails, it counts."""
        for connection in [c for c in self._idle if c.raw.is_closed()]:
            self._idle.remove(connection)
            self.drop(connection)

    async def maintain(self, now: float) -> None:
        """Replace what is too old or unhealthy, close what is idle too long or over the budget, ping the rest."""
        config = self.config
        for connection in tuple(self._idle):
            idle = now - connection.last_used
            too_idle = config.max_idle is not None and self.total > self.least and idle > config.max_idle
            if too_idle or self.is_unwanted(connection, now):
                self._idle.remove(connection)
                self.retire(connection)
        if self._guard.refusing:
            return  # no load on a server that is unwell; what is dead is found out when it is needed
        due = [c for c in self._idle if now - c.last_used > config.health_check_interval]
        for connection in due:
            if connection not in self._idle:
                continue
            self._idle.remove(connection)  # nobody else may use it meanwhile
            answered = False
            try:
                answered = await connection.is_alive() and await self._ping(connection)
            finally:
                if answered:
                    self.put_back(connection)
                else:
                    self.drop(connection)  # whatever went wrong, it must not stay in nobody's hands

    async def _ping(self, connection: ServerConnection) -> bool:
        token, started = self._guard.token, time.monotonic()
        answered = await connection.ping(PING_TIMEOUT)
        seconds = time.monotonic() - started
        if answered:
            self._guard.ping_passed(token, seconds, connection.last_used)
        elif seconds >= PING_TIMEOUT:
            self._guard.ping_failed(token, seconds)  # else it was ended just now, which alone says nothing
        return answered

    async def close(self) -> None:
        """Close all connections; returns when the server has confirmed, or after the close timeout."""
        self.budget = 0
        self._idle.clear()
        closing, self._retiring = tuple(self._all), self._retiring + len(self._all)
        await asyncio.gather(*(self._retire(connection) for connection in closing), *self._closers)
