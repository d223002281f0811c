"""The engine of a worker: a fair queue in front, connections behind, and lanes that carry work from one to the other.

Nothing here knows Ray. A *lane* is one connection at work: it takes the next item from the queue, serves it, puts the
session back in order if it may have been touched, and goes on until the queue is empty.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from raypg.config import PoolConfig
from raypg.core.backoff import Backoff
from raypg.core.fair_queue import FairQueue, QueueFull
from raypg.core.sql import classify
from raypg.errors import ConnectError, PoolClosedError, PoolExhaustedError, WorkerDrainingError
from raypg.messages import STATUS, Run
from raypg.portable import pack_error
from raypg.server import copying, ending, intake
from raypg.server.acquisitions import Acquisitions
from raypg.server.catalogue import Catalogue
from raypg.server.connect import Connector
from raypg.server.connection import ServerConnection
from raypg.server.connection_set import ConnectionSet
from raypg.server.figures import Figures
from raypg.server.guard import Guard
from raypg.server.leases import LeaseTable
from raypg.server.outcomes import ConnectionLost
from raypg.server.probing import Prober
from raypg.server.reads import Pace, gather
from raypg.server.replies import BatchState, Client
from raypg.server.streams import Streams
from raypg.server.work import Servable, Work
from raypg.server.writes import Writes

if TYPE_CHECKING:
    from raypg.server.replicas import Replicas

logger = logging.getLogger(__name__)

EXPIRY_TICK = 0.05
"""Seconds between two looks for callers that have waited too long."""

MAINTENANCE_TICK = 1.0
"""Seconds between two rounds of maintenance of the connections."""

ASKS_EVERY = 5.0
"""Seconds within which who waits for outcomes asks for them again, with a good margin."""

CLIENT_FORGOTTEN_AFTER = 60.0
"""Seconds after which outcomes that nobody fetches are thrown away: their process is gone."""


class Engine:
    """Runs statements on the connections of one worker.

    Args:
        config: the pool's configuration.
        connector: opens connections.
        figures: what is counted and timed; of a replica's engine that of the primary's.

    Attributes:
        replicas: where reads may go that need not run here.
        is_spare: whether another engine serves whom this one refuses.
    """

    def __init__(self, config: PoolConfig, connector: Connector, figures: Figures | None = None) -> None:
        self.config = config
        self._connector = connector
        self.is_spare = figures is not None
        self.figures = Figures() if figures is None else figures
        self.replicas: Replicas | None = None
        self.guard = Guard(config.name, config.breaker(), self._breaker_moved, self.figures)
        self.connections = ConnectionSet(connector, config, self.guard, self.pump)
        self._prober = Prober(self.connections, self.guard)
        self.writes = Writes(self)
        self.leases = LeaseTable(self.take_back, self.writes)
        self.acquisitions = Acquisitions(self)
        self.catalogue = Catalogue()
        self.pace = connector.learnt = Pace()
        self.streams = Streams()
        self.queue: FairQueue[Work] = FairQueue(limit=config.max_waiting)
        self.closed: PoolClosedError | None = None
        self.draining: WorkerDrainingError | None = None
        self._loop = asyncio.get_running_loop()
        self._clients: dict[str, Client] = {}
        self._held: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._connect_backoff = Backoff(first=0.05, most=2.0)
        self._connect_again_at, self._connect_failures = 0.0, 0
        self._pumping = False
        self._background(self._keep_time())
        self._background(self._maintain())

    @property
    def pooler(self) -> str | None:
        """What was found out about a pooler in front; ``None`` before the first connection."""
        return self._connector.pooler

    @property
    def target(self) -> str:
        """Addresses of its server."""
        return ",".join(self._connector.target.addresses)

    def now(self) -> float:
        """The monotonic clock, in seconds. Not the event loop's, which uvloop keeps in whole milliseconds."""
        return time.monotonic()

    def use(self, config: PoolConfig) -> None:
        """Go on with another configuration of the same pool."""
        if config.breaker() != self.config.breaker():
            self.guard.machine.configure(config.breaker(), self.now())
        self.config = self.connections.config = self._connector.config = config
        self.queue.limit = config.max_waiting
        if self.replicas is not None:
            self.replicas.use(config)

    # --- what callers ask for ---

    def submit(self, client: Client, number: int, runs: Sequence[Run]) -> BatchState:
        """Take in a batch; the outcomes appear in the returned state as they come."""
        return intake.submit(self, client, number, runs)

    def cancel(self, client: Client, number: int, position: int) -> None:
        """One caller of a batch has left; see :func:`raypg.server.intake.cancel`."""
        intake.cancel(self, client, number, position)

    async def run_leased(
        self, token: str, number: int, mode: int, sql: str, arguments: Any, timeout: float | None
    ) -> tuple[Any, tuple[str, ...] | None]:
        """Run one statement on a leased connection; see :meth:`LeaseTable.run`."""
        if self.guard.refusing and classify(sql).kind != "transaction":
            # What was begun may be ended; nothing new is asked of a server that is unwell.
            refusal = self.guard.refusal()
            self.figures.refused(refusal)
            raise refusal
        started = self.now()
        try:
            outcome = await self.leases.run(
                token, number, mode, sql, arguments, self.config.command_timeout if timeout is None else timeout
            )
        except BaseException as error:
            self.figures.ran(self.now() - started, True, sql, error)
            raise
        self.figures.ran(self.now() - started, False, sql)
        return outcome

    async def release(self, token: str, last: str | None, forgotten: bool = False) -> str | None:
        """End a lease; *last* (COMMIT, ROLLBACK) runs first, and its command tag is returned.

        Args:
            forgotten: nobody asked for it, but nobody can use the lease any more.

        As with asyncpg nothing is left of the session when this returns: no lock that its holder forgot, say.

        Raises:
            LeaseLostError: it had ended before.
            OutcomeUnknownError: the connection died under *last*.
        """
        lease = self.leases.find(token)
        status: str | None = None
        try:
            await copying.stop(self, token)
            if last is not None:
                status, _ = await self.leases.run(token, -1, STATUS, last, (), None)
        finally:
            dead = lease.connection.raw.is_closed()
            self.leases.end(token, "it was released", dead, "forgotten" if forgotten else None)
        await lease.over.wait()
        return status

    def client(self, identity: str, job: str) -> Client:
        """The client of that identity, made on first sight."""
        found = self._clients.get(identity)
        if found is None:
            found = self._clients[identity] = Client(identity, job)
        found.seen = self.now()
        return found

    async def held(self, client: str) -> None:
        """Returns when *client* has been let go."""
        await self._held.setdefault(client, asyncio.Event()).wait()

    def let_go(self, client: str) -> None:
        """Let ``held`` return."""
        event = self._held.pop(client, None)
        if event is not None:
            event.set()

    def client_died(self, client: str) -> None:
        """The process of *client* is gone: end its leases, and drop what it had waiting."""
        self.acquisitions.client_died(client)
        for lease in self.leases:
            if lease.owner.get("client") == client:
                self.leases.end(lease.token, "the process that held it died", reclaimed="process died")
        for line in [line for line in self._clients.values() if line.of == client]:
            for batch in tuple(line.batches.values()):
                for position in tuple(batch.statements):
                    self.cancel(line, batch.number, position)

    # --- queue and lanes ---

    def enqueue(self, job: str, work: Any, cost: float) -> None:
        """Put work in the queue, or fail it at once if it may not run. The caller pumps when all of it is in."""
        refusal = self.draining or (self.guard.refusal() if self.guard.refusing else None)
        if refusal is not None:
            self._refuse(work, refusal)
            return
        try:
            work.ticket = self.queue.push(job, work, cost=cost, deadline=work.deadline)
        except QueueFull as full:
            budget = self.connections.budget
            self._refuse(work, PoolExhaustedError(self.config.name, 0.0, full.depth, full.limit, budget, "full"))

    def put_first(self, work: Any) -> None:
        """Put work back that was taken out but not done: it keeps its turn, and waits no longer than its deadline."""
        refusal = self.guard.refusal() if self.guard.refusing else None if work.begun else self.draining
        if refusal is not None:
            self._refuse(work, refusal)
            return
        work.ticket = self.queue.push_front(work, deadline=work.deadline)
        self.pump()

    def deadline_anew(self, expires_at: float | None = None) -> float:
        """Until when work may wait that has run, and lost its connection: the time it ran was no waiting."""
        limit = self.now() + self.config.acquire_timeout
        return limit if expires_at is None else min(limit, expires_at)

    def pump(self) -> None:
        """Bring waiting work and free connections together. Cheap, and called whenever either may have changed."""
        connections = self.connections
        if self._pumping or self.guard.refusing:
            return
        self._pumping = True
        try:
            room = self.guard.room(connections.budget, self.now())
            while (
                len(self.queue)
                and connections.total - connections.idle < room
                and (connection := connections.take_idle()) is not None
            ):
                work = self.queue.pop(self.now())
                if work is None:
                    self.connections.put_back(connection)
                    break
                self._background(self._lane(connection, work))
            wanted = max(len(self.queue) - connections.opening, connections.missing)
            wanted = min(wanted, room - connections.slots)
            if self._connect_failures:
                # The last attempt failed: one at a time, and not at once.
                wanted = min(wanted, 1) if self.connections.opening == 0 and self._may_connect() else 0
            while wanted > 0 and self.connections.may_open:
                wanted -= 1
                self._background(self._open_lane(self.connections.open()))
        finally:
            self._pumping = False

    def _may_connect(self) -> bool:
        # With no connection at all, a caller is owed an attempt: it must learn what is wrong now.
        return self.now() >= self._connect_again_at or (self.connections.total == 0 and len(self.queue) > 0)

    async def _open_lane(self, opening: Awaitable[ServerConnection]) -> None:
        try:
            connection = await opening
        except ConnectError as error:
            self._connect_failures += 1
            delay = self._connect_backoff.next(random.random())
            self._connect_again_at = self.now() + delay
            if self.connections.total == 0:
                ending.fail_waiting(self, error)
            self._loop.call_later(delay, self.pump)
            return
        self._connect_failures = 0
        self._connect_backoff.reset()
        work = self.queue.pop(self.now())
        if work is None:
            self.connections.put_back(connection)
        else:
            await self._lane(connection, work)

    async def _lane(self, connection: ServerConnection, work: Work | None) -> None:
        while work is not None:
            if not await connection.is_alive():
                self.connections.drop(connection)
                self.put_first(work)
                return
            task: Servable = gather(self, connection, work) or work
            connection.taken_at, connection.uses = self.now(), 0
            try:
                kept = await task.serve(self, connection)
            except Exception as error:
                # A fault of ours must not leave a caller waiting for ever, nor a connection in nobody's hands.
                logger.exception("pool %s: internal error in a worker", self.config.name)
                task.fail(pack_error(error))
                self.connections.retire(connection)
                return
            if kept is not None or connection.raw.is_closed():
                self.figures.given_back(connection)
            if kept is None:
                self.pump()
                return
            if (connection.dirty or connection.raw.is_in_transaction()) and not await self._cleaned(connection):
                return
            if self.connections.is_unwanted(connection, self.now()):
                break
            work = self.queue.pop(self.now())
        self.connections.put_back(connection)

    async def _cleaned(self, connection: ServerConnection) -> bool:
        token, started = self.guard.token, self.now()
        try:
            await connection.reset()
        except ConnectionLost as lost:
            self.guard.lost(token, started, lost)
            self.connections.drop(connection)
        except Exception:
            logger.warning("pool %s: a session could not be reset, its connection is replaced", self.config.name)
            self.connections.retire(connection)
        else:
            return True
        self.pump()
        return False

    def take_back(self, connection: ServerConnection, over: asyncio.Event) -> None:
        """A lease has ended: clean its connection, set *over*, and let it serve again."""
        self.figures.given_back(connection)
        if connection.raw.is_closed():
            self.connections.drop(connection)
            over.set()
            self.pump()
        else:
            self._background(self._resume(connection, over))

    async def _resume(self, connection: ServerConnection, over: asyncio.Event) -> None:
        try:
            clean = await self._cleaned(connection)
        finally:
            over.set()
        if clean:
            await self._lane(connection, self.queue.pop(self.now()))

    @property
    def servers(self) -> list[Engine]:
        """The engines of all servers that this one's worker has connections to: its own, and those of replicas."""
        return [self] if self.replicas is None else list(self.replicas.engines)

    @property
    def budget(self) -> int:
        """Most connections, to all servers together."""
        return self.connections.budget if self.replicas is None else self.replicas.budget

    def grant(self, budget: int, valid_until: float) -> None:
        """Have so many connections at most, to all servers together, and open none after *valid_until*."""
        if self.replicas is not None:
            self.replicas.grant(budget, valid_until)
        else:
            self.connections.grant(budget, valid_until)
        self.pump()

    @property
    def demand(self) -> int:
        """Connections that there is work for now."""
        return self.connections.total - self.connections.idle + len(self.queue)

    # --- housekeeping ---

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("pool %s: internal error in a worker", self.config.name, exc_info=error)

    async def _keep_time(self) -> None:
        """What must happen in time, whatever else is slow or fails: callers who have waited too long are told so."""
        while self.closed is None:
            await asyncio.sleep(EXPIRY_TICK)
            now = self.now()
            try:
                self._expire(now)
                self.guard.tick(now)
                self._prober.look()
                self.connections.drop_dead()
                if self.connections.missing > 0 or self.guard.machine.load(now) < 1.0:
                    self.pump()
            except Exception:
                logger.exception("pool %s: internal error in a worker", self.config.name)

    async def _maintain(self) -> None:
        """Look after the connections. A server that is silent holds this up, for as long as pings may take."""
        while self.closed is None:
            await asyncio.sleep(MAINTENANCE_TICK)
            now = self.now()
            for identity, client in tuple(self._clients.items()):
                if now - client.seen > CLIENT_FORGOTTEN_AFTER and not any(b.open for b in client.batches.values()):
                    del self._clients[identity]
            try:
                await self.connections.maintain(now)
            except Exception:
                logger.exception("pool %s: maintenance of connections failed", self.config.name)
            self.pump()

    def _breaker_moved(self) -> None:
        if self.guard.refusing:
            if len(self.queue):
                ending.fail_waiting(self, self.guard.refusal())
        else:
            self._connect_failures = 0
            self._connect_backoff.reset()
            self.pump()

    def _expire(self, now: float) -> None:
        for work in self.queue.expire(now):
            connections = self.connections
            error = PoolExhaustedError(
                self.config.name,
                now - work.arrived,
                len(self.queue) + 1,
                self.config.max_waiting,
                connections.budget,
                use=connections.use(),
            )
            self._refuse(work, error)

    def _refuse(self, work: Work, error: Exception) -> None:
        if not self.is_spare:
            self.figures.refused(error)
        work.fail(pack_error(error))

    async def close(self, reason: str) -> None:
        """End all work and close the connections; see :func:`raypg.server.ending.close`."""
        await ending.close(self, reason)

    @property
    def at_rest(self) -> bool:
        """Whether nothing waits, nothing runs, nothing is leased, and all outcomes are told."""
        rests = not len(self.queue) and self.connections.idle == self.connections.total and not self.untold
        return rests and (self.replicas is None or self.replicas.at_rest)

    @property
    def untold(self) -> bool:
        """Whether outcomes have not reached their callers yet, who still ask for them."""
        return any(client.batches and self.now() - client.seen < ASKS_EVERY for client in self._clients.values())
