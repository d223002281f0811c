"""What all handles of one pool share in one event loop: the membership, and a line to each worker."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle

from raypg import _compat, cluster, messages, naming, owner
from raypg.calling import send
from raypg.channel import Call, Channel, WorkerGone
from raypg.config import PoolConfig
from raypg.core.seen import NOTHING, Token
from raypg.core.sql import classify_under, shorten
from raypg.errors import (
    ConnectionLostError,
    OutcomeUnknownError,
    PoolClosedError,
    PoolNotFoundError,
    UnavailableError,
    WorkerDrainingError,
)
from raypg.messages import Where
from raypg.portable import unpack_error
from raypg.reading import Served, served

logger = logging.getLogger(__name__)

ANSWER_WITHIN = 5.0
"""Seconds in which the Pool actor must answer a question about its workers."""

VERIFIED_WITHIN = 10.0
"""Seconds in which the Pool actor must have found out whether a worker lives."""

RECONFIGURED_WITHIN = 30.0
"""Seconds in which all workers must have taken a new configuration, and new ones have started."""

LIFE_SIGN_WITHIN = 1.0
"""Seconds in which a worker must say that it is there."""

STALE = 2.0
"""Seconds without a word from any worker after which a handle asks where they are before it sends a write: all may have
been replaced meanwhile, and of a write that is sent to a dead one nobody knows what became of it."""

FOUND_WITHIN = 2.0
"""Seconds in which the Pool actor must say where the workers are when callers wait for it."""

RETRY_EVERY = 0.1
"""Seconds between two looks for a worker that can be used."""


class Dispatcher:
    """Sends statements of one event loop to the workers of one pool."""

    def __init__(self, name: str, pool: ActorHandle[Any], greeting: dict[str, Any]) -> None:
        self.name = name
        self.client = secrets.token_hex(8)
        context = ray.get_runtime_context()
        self.job: str = context.get_job_id()
        self.node: str = context.get_node_id()
        self.config = PoolConfig.from_dict(greeting["config"])
        self.pool = pool
        self._loop = asyncio.get_running_loop()
        self._channels: dict[int, Channel] = {}
        self._epoch = 0
        self._current_at = 0.0
        self._thread = threading.get_ident()
        self.closed: Exception | None = None
        self._parked: list[Call] = []
        self._finding: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._take(greeting)

    def is_here(self) -> bool:
        """Whether this dispatcher is open and belongs to the running event loop.

        Asked for every statement, and asyncio.get_running_loop() is a system call each time (it compares process ids):
        it took 17 % of the time of a busy caller. Only one loop runs in a thread, so thread and state say the same.
        """
        return self.closed is None and self._thread == threading.get_ident() and self._loop.is_running()

    def soon(self, work: Callable[[], object]) -> None:
        """Call *work* in the loop of this dispatcher, later. Safe from ``__del__``, in any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work)

    def owner(self) -> dict[str, Any]:
        """Who asks for a lease now; see :func:`raypg.owner.describe`."""
        return owner.describe(self.client)

    # --- statements ---

    async def run(
        self, mode: int, sql: str, arguments: Any, timeout: float | None, settings: messages.Settings = None
    ) -> tuple[Any, tuple[str, ...] | None]:
        """Run one statement on any worker; see :meth:`ServerConnection.run` for what comes back."""
        return await self._outcome(Call(mode, sql, arguments, timeout, settings, self._loop))

    async def read(
        self,
        mode: int,
        sql: str,
        arguments: Any,
        timeout: float | None,
        settings: messages.Settings,
        where: Where,
        failed: Callable[[Served], object] | None = None,
    ) -> tuple[Any, tuple[str, ...] | None, Served]:
        """Run a statement that is said to be a read where *where* allows, see :func:`raypg.reading.where_of`: on a
        replica, or on the primary if none will do. The last part of the answer says where that was.

        A replica refuses to write, and the primary runs what it has refused.

        Args:
            failed: is told who that was when the statement fails there.
        """
        call = Call(mode, sql, arguments, timeout, settings, self._loop, where)
        token = NOTHING if where[1] is None else Token(*where[1])
        try:
            payload, names = await self._outcome(call)
        except Exception:
            if failed is not None and call.note is not None:
                failed(served(call.note, token))
            raise
        return payload, names, served(call.note, token)

    async def _outcome(self, call: Call) -> tuple[Any, tuple[str, ...] | None]:
        self._send(call)
        try:
            return await call.future
        except asyncio.CancelledError:
            if call.channel is not None:
                call.channel.cancel(call)
            raise

    def _send(self, call: Call) -> None:
        if self.closed is not None:
            call.future.set_exception(self.closed)
            return
        channel = None if self._is_stale(call) else self.choose()
        if channel is None:
            self._parked.append(call)
            self._find_workers()
        else:
            channel.send(call)

    def _is_stale(self, call: Call) -> bool:
        """Whether what is known of the workers is too old to send this by."""
        if self._loop.time() - self._current_at < STALE:
            return False
        return not classify_under(call.sql, call.settings).retryable

    def choose(self, any_will_do: bool = False) -> Channel | None:
        """The worker to send to: the one on our node if it has room, else the least loaded for its share. One that is
        cut off from the database only if all are, or if *any_will_do*."""
        best: Channel | None = None
        best_load = 0.0
        for channel in self._channels.values():
            if not channel.usable or (channel.isolated and not any_will_do):
                continue
            if channel.node == self.node and channel.has_room:
                return channel
            load = (channel.open + channel.load) / max(channel.budget, 0.1)
            if best is None or load < best_load:
                best, best_load = channel, load
        return best if best is not None or any_will_do else self.choose(any_will_do=True)

    def is_final(self, refusal: BaseException) -> bool:
        """Whether what one worker refused no other one would do: it is cut off from the database, and so are all."""
        if isinstance(refusal, WorkerDrainingError):
            return False
        return all(channel.isolated or not channel.usable for channel in self._channels.values())

    @property
    def workers(self) -> int:
        """How many workers take work."""
        return sum(channel.usable for channel in self._channels.values())

    @property
    def connections(self) -> int:
        """How many connections they have together."""
        return sum(channel.budget for channel in self._channels.values() if channel.usable)

    @property
    def channels(self) -> list[Channel]:
        """The lines to all workers that live."""
        return [channel for channel in self._channels.values() if not channel.closed]

    def send_elsewhere(self, call: Call, refusal: BaseException) -> bool:
        """Send a call to another worker than the one that refused it; False if all would refuse, or have for long."""
        if self.is_final(refusal) or self._loop.time() - call.since > self.config.acquire_timeout:
            return False
        self._send(call)
        return True

    async def channel(self) -> Channel:
        """A worker to talk to directly, for a lease or a pipeline.

        Raises:
            UnavailableError: none was found in time.
        """
        until = self._loop.time() + self.config.acquire_timeout
        while True:
            if self.closed is not None:
                raise self.closed
            channel = self.choose()
            if channel is not None:
                return channel
            if self._loop.time() > until:
                raise self._no_worker()
            self._find_workers()
            await asyncio.sleep(RETRY_EVERY)

    async def token(self) -> Token:
        """How far the primary has come, as a worker finds out now.

        Raises:
            UnavailableError: no worker, or no primary, answers.
        """
        while True:
            try:
                kind, value = await (await self.channel()).ask("token")
            except WorkerGone:
                continue  # another one will say
            if kind == "error":
                raise unpack_error(value)
            return Token(*value)

    async def reconfigure(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Change settings of the pool.

        Raises:
            ConfigError: they cannot be changed, or not to this.
        """
        value = await self.ask_pool("reconfigure", changes, within=RECONFIGURED_WITHIN)
        self.config = self.config.changed(**changes)
        await self.refresh()
        return value  # type: ignore[no-any-return]

    async def ask_pool(self, method: str, *arguments: Any, within: float = ANSWER_WITHIN) -> Any:
        """Ask the Pool actor for something that only it knows.

        Raises:
            UnavailableError: no answer within *within* seconds, or it is just being restarted.
            RaypgError: what it says against it.
        """
        try:
            kind, value = await asyncio.wait_for(send(getattr(self.pool, method), *arguments), within)
        except (*_compat.ActorGone, TimeoutError):
            await self.refresh()
            raise self.closed or UnavailableError(
                f"the actor of pool {self.name!r} does not answer; statements go on without it, try again"
            ) from None
        if kind == "error":
            raise unpack_error(value)
        return value

    # --- membership ---

    def _take(self, membership: dict[str, Any]) -> None:
        if membership.get("closed"):
            self.close(PoolClosedError(membership["closed"]))
            return
        if membership["epoch"] < self._epoch:
            return
        self._epoch = membership["epoch"]
        places: list[messages.Place] = membership["workers"]
        listed = {index for index, *_ in places}
        for index in tuple(self._channels):
            if index not in listed:
                self._channels.pop(index).lose()  # its node is lost, or it has ended
        for index, name, node, budget, incarnation, draining in places:
            if incarnation is None:
                continue  # it has just been started; or the Pool actor has, and knows less than we do
            known = self._channels.get(index)
            if known is not None and known.incarnation != incarnation and self._is_other(known, name, node):
                known.lose()  # another worker has its number now
                known = None
            if known is not None and not known.closed:
                known.budget = budget  # we may know of a newer life of it than the Pool actor does
                known.draining = draining
            elif known is None:
                handle = self._handle(name)
                if handle is not None:
                    known = self._channels[index] = Channel(self, handle, index, node, budget, incarnation)
                    known.draining = draining

    def _is_other(self, known: Channel, name: str, node: str) -> bool:
        """Whether the worker of that name is another actor than the one that *known* leads to."""
        if known.node != node:
            return True
        handle = self._handle(name)
        return handle is not None and handle != known.handle

    @staticmethod
    def _handle(name: str) -> ActorHandle[Any] | None:
        try:
            return ray.get_actor(name, namespace=naming.NAMESPACE)
        except ValueError:
            return None  # it is just being ended

    async def refresh(self, within: float = ANSWER_WITHIN) -> None:
        """Ask the Pool actor where the workers are now. Its silence is no news."""
        try:
            reference = send(self.pool.membership)
            self._take(await asyncio.wait_for(reference, within))
        except TimeoutError:
            pass
        except _compat.ActorGone:
            # Restarting, or ended: a closed pool leaves no actor of that name.
            try:
                self.pool = cluster.find(self.name)
            except PoolNotFoundError:
                self.close(PoolClosedError(f"pool {self.name!r} was closed"))

    def heard_of(self, epoch: int) -> None:
        """A worker knows of the membership of *epoch*."""
        self._current_at = self._loop.time()
        if epoch > self._epoch:
            self.refresh_soon()

    def refresh_soon(self) -> None:
        """Ask the Pool actor where the workers are, and go on meanwhile."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = self._loop.create_task(self.refresh())

    async def is_current(self, channel: Channel) -> bool:
        """Whether the life of the worker that *channel* leads to goes on: it says so, or the Pool actor does, which
        knows within seconds."""
        if channel.closed or self.closed is not None:
            return False
        if not channel.is_quiet():
            return True
        incarnation = await self._life_of(channel)
        if incarnation is not None:
            channel.heard_from()
            return incarnation == channel.incarnation
        try:
            lives: bool = await asyncio.wait_for(
                send(self.pool.verify, channel.index, channel.incarnation), VERIFIED_WITHIN
            )
        except TimeoutError:
            return True
        except _compat.ActorGone:
            await self.refresh()
            return self.closed is None
        return lives

    def worker_gone(self, channel: Channel, sent: list[Call], unsent: list[Call]) -> None:
        """A worker died. Reads that were on their way are sent once more; of writes nobody knows; the rest goes on."""
        for call in sent:
            verdict = classify_under(call.sql, call.settings)
            if verdict.retryable and not call.retried:
                call.retried = True
                unsent.append(call)
            elif verdict.retryable:
                error = f"worker {channel.index} of pool {self.name!r} died while it read [{shorten(call.sql)}]"
                call.future.set_exception(ConnectionLostError(error))
            else:
                error = f"worker {channel.index} of pool {self.name!r} died after the statement was sent to it"
                call.future.set_exception(OutcomeUnknownError(error, shorten(call.sql)))
        for call in unsent:
            self._send(call)
        self._find_workers()

    def _find_workers(self) -> None:
        if self._finding is None or self._finding.done():
            self._finding = self._loop.create_task(self._find())

    async def _find(self) -> None:
        """Look for the new life of lost workers until every line stands again, and send what waits meanwhile."""
        while self.closed is None:
            try:
                await self.refresh(FOUND_WITHIN)
                self._current_at = self._loop.time()  # or nothing better is to be had
                self._send_parked()
                for channel in tuple(self._channels.values()):
                    if channel.closed and (line := await self._new_life(channel)) is not None:
                        self._channels[channel.index] = line
            except Exception:  # Ray's own state cannot be asked, say: callers wait here, for their time and no longer
                logger.exception("pool %s: internal error while looking for workers", self.name)
            self._send_parked()
            if not self._parked and not any(channel.closed for channel in self._channels.values()):
                return
            await asyncio.sleep(RETRY_EVERY)

    def _send_parked(self) -> None:
        """Send what waits for a worker, or tell its callers that they have waited for too long."""
        parked, self._parked = self._parked, []
        found, now = self.choose() is not None, self._loop.time()
        for call in parked:
            if call.future.done():
                continue  # its caller has left
            if found:
                self._send(call)
            elif now - call.since > min(self.config.acquire_timeout, call.timeout or math.inf):
                call.future.set_exception(self._no_worker())
            else:
                self._parked.append(call)

    async def _new_life(self, dead: Channel) -> Channel | None:
        """A line to the restarted worker, as soon as it answers: sooner than the Pool actor's next ping."""
        incarnation = await self._life_of(dead)
        if incarnation is None:
            return None
        return Channel(self, dead.handle, dead.index, dead.node, dead.budget, incarnation)

    @staticmethod
    async def _life_of(channel: Channel) -> str | None:
        try:
            incarnation: str = await asyncio.wait_for(send(channel.handle.here), LIFE_SIGN_WITHIN)
        except (*_compat.ActorGone, TimeoutError):
            return None
        return incarnation

    def _no_worker(self) -> UnavailableError:
        return UnavailableError(
            f"no worker of pool {self.name!r} answers (waited {self.config.acquire_timeout:g} s); "
            "see `raypg status` and `ray list actors`"
        )

    def close(self, error: Exception) -> None:
        """The pool is closed: all who wait get *error*."""
        if self.closed is None:
            self.closed = error
            for call in self._parked:
                if not call.future.done():
                    call.future.set_exception(error)
            self._parked.clear()
            for channel in self._channels.values():
                channel.close(error)
