"""``pool.circuit_breaker``: the breaker of a pool, as those see and steer it who hold a handle."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import ray

from raypg import _compat, background, cluster
from raypg.asking import AGAIN_AFTER, ask
from raypg.breaker_status import describe
from raypg.config import PoolConfig
from raypg.core.breaker import State
from raypg.core.quorum import Quorum
from raypg.errors import ConfigError, PoolClosedError, UnavailableError
from raypg.portable import unpack_error

if TYPE_CHECKING:
    from raypg.pool import WorkflowConnectionPool

logger = logging.getLogger(__name__)

STATUS_WITHIN = 1.0
"""Seconds in which the Breaker must answer for its status."""

COMMAND_WITHIN = 10.0
"""Seconds in which it must have carried out a command; workers have 2 s of them to acknowledge."""

LISTEN_FOR = 30.0
"""Seconds in which it must have answered that there is no news; it does so every 10 s."""

Listener = Callable[[State, State, dict[str, Any]], Awaitable[None] | None]
"""Called with the old state, the new one, and the metrics as they were at the change."""


class PoolCircuitBreaker:
    """The circuit breaker of one pool; get it as ``pool.circuit_breaker``.

    There is one state for the whole cluster. What is done here holds for every job that uses the pool.
    """

    def __init__(self, pool: WorkflowConnectionPool) -> None:
        self._pool = pool
        self._known: dict[str, Any] | None = None
        self._listeners: list[Listener] = []
        self._listening: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<circuit breaker of {self._pool!r}>"

    # --- by hand ---

    async def force_open(self, reason: str, ttl: float | None = None) -> dict[str, Any]:
        """Refuse all calls until :meth:`force_close` or :meth:`reset`, or for *ttl* seconds; e.g. for maintenance.

        It holds whatever happens: no probe lifts it, and it outlives the death of every actor.

        Returns:
            ``{state, acknowledged, unreached}``: how many workers have acknowledged, and the numbers of those that
            could not be reached. These will follow when they can be.

        Raises:
            ConfigError: no reason, or a *ttl* that is no positive number.
            UnavailableError: the Breaker does not answer.
        """
        if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl < 1e9):
            raise ConfigError(f"ttl={ttl!r}: must be a positive number of seconds, or None")
        return await self._command("force_open", reason, ttl)

    async def force_close(self, reason: str = "closed by hand") -> dict[str, Any]:
        """Permit calls, with cleared counters; protection goes on. Returns and errors as :meth:`force_open`."""
        return await self._command("force_close", reason)

    async def reset(self) -> dict[str, Any]:
        """As :meth:`force_close`, and the totals begin at 0."""
        return await self._command("reset", "reset")

    async def disable(self, reason: str = "disabled by hand") -> dict[str, Any]:
        """Permit all calls, whatever comes of them, until :meth:`enable`."""
        return await self._command("disable", reason)

    async def enable(self, reason: str = "enabled by hand") -> dict[str, Any]:
        """Protect again after :meth:`disable`; does nothing otherwise."""
        return await self._command("enable", reason)

    async def _command(self, what: str, reason: str, ttl: float | None = None) -> dict[str, Any]:
        if not isinstance(reason, str) or not reason:
            raise ConfigError(f"reason={reason!r}: say why, in words: others will read it")
        await self._pool._dispatcher()
        kind, value = await self._ask("command", what, reason, ttl, within=COMMAND_WITHIN)
        if kind == "error":
            raise unpack_error(value)
        return value  # type: ignore[no-any-return]

    # --- how it stands ---

    @property
    def state(self) -> State:
        """``closed``, ``open``, ``half_open`` or ``disabled``; see :meth:`get_status`."""
        return self.get_status()["state"]  # type: ignore[no-any-return]

    def get_status(self) -> dict[str, Any]:
        """How the breaker stands now. Not a coroutine; takes some milliseconds, at most a second.

        Returns:
            ``state`` (closed, open, half_open, disabled), ``forced``, ``forced_reason``, ``reason`` of the last change,
            ``metrics`` (calls of all workers; durations in seconds), ``config``, ``time_until_recovery`` (seconds;
            ``None`` if it is closed or nobody knows), ``state_transitions`` (the last 5, each ``from``, ``to``,
            ``timestamp``, ``reason``, ``metrics``), ``workers`` (number → its own state, and whether it is isolated),
            ``as_of`` (ISO 8601). While the Breaker is being restarted, what was known last, with the ``as_of`` of then.
            Of a pool that was not started: closed, no calls.

        Raises:
            UnavailableError: Ray does not run in this process, or the Breaker does not answer, and never has.
            PoolClosedError: the handle was closed.
        """
        self._check()
        if not self._pool._started:
            return _never_started(self._pool._config)
        # Without an event loop, so that any thread may ask, and without ray.get, of which Ray warns in async actors.
        until = time.monotonic() + STATUS_WITHIN
        while (left := until - time.monotonic()) > 0:
            breaker = cluster.find_breaker()
            if breaker is not None:
                try:
                    return self._take(breaker.status.remote(self._pool.name).future().result(left))
                except concurrent.futures.TimeoutError:
                    break
                except _compat.ActorGone:
                    pass  # its next life has to be found anew
            time.sleep(AGAIN_AFTER)
        return self._last_known()

    async def status(self, *, within: float = STATUS_WITHIN) -> dict[str, Any]:
        """The same as :meth:`get_status`, for callers who would rather await it; takes at most *within* seconds."""
        self._check()
        return await self._status(within) if self._pool._started else _never_started(self._pool._config)

    async def _status(self, within: float) -> dict[str, Any]:
        try:
            answer = await self._ask("status", within=within)
        except UnavailableError:
            return self._last_known()
        return self._take(answer)

    def _take(self, answer: tuple[str, Any]) -> dict[str, Any]:
        kind, value = answer
        if kind == "error":
            raise unpack_error(value)
        self._known = value
        return value  # type: ignore[no-any-return]

    def _check(self) -> None:
        if self._pool._closed is not None:
            raise self._pool._closed
        if self._pool._started and not ray.is_initialized():
            raise UnavailableError(
                f"Ray does not run in this process (any more): nothing is known of pool {self._pool.name!r}"
            )

    def _last_known(self) -> dict[str, Any]:
        if self._known is None:
            raise UnavailableError(
                f"the breaker of pool {self._pool.name!r} does not answer within {STATUS_WITHIN:g} s; it may just be "
                "restarted: try again. Workers decide without it meanwhile"
            )
        return self._known

    # --- listening ---

    def add_listener(self, listener: Listener) -> Awaitable[None]:
        """Call ``listener(old, new, metrics)`` at each change of state, from now on, in this event loop.

        Plain and async functions will do. They are called one after the other, in the order of the changes; what they
        raise is logged. They may use the breaker. Without a running loop they are called on raypg's background thread.

        Returns:
            Something that may be awaited, but need not: it is done when every later change will be told.

        Raises:
            ConfigError: not to be called.
        """
        if not callable(listener):
            raise ConfigError(f"listener={listener!r}: must be a function of (old, new, metrics)")
        self._listeners.append(listener)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = background.loop()
            ready: asyncio.Future[None] = loop.create_future()
            loop.call_soon_threadsafe(self._listen, ready)
            return ready
        ready = loop.create_future()
        self._listen(ready)
        return ready

    def remove_listener(self, listener: Listener) -> None:
        """Call *listener* no more; does nothing if it is not called anyway."""
        if listener in self._listeners:
            self._listeners.remove(listener)
        if not self._listeners:
            self.stop_listening()

    def stop_listening(self) -> None:
        """Call nobody any more."""
        self._listeners.clear()
        task, self._listening = self._listening, None
        if task is not None and not task.get_loop().is_closed():
            task.get_loop().call_soon_threadsafe(task.cancel)

    def _listen(self, ready: asyncio.Future[None]) -> None:
        if self._listening is None or self._listening.done():
            self._listening = asyncio.get_running_loop().create_task(self._hear(ready))
        else:
            ready.set_result(None)

    async def _hear(self, ready: asyncio.Future[None]) -> None:
        position: tuple[str, int] | None = None
        while self._listeners:
            try:
                await self._pool._dispatcher()
                answer = await self._ask("transitions", position, within=LISTEN_FOR)
            except PoolClosedError:
                break
            except Exception as error:
                logger.debug("pool %s: listening to the breaker failed: %s", self._pool.name, error)
                await asyncio.sleep(0.5)
                continue
            if answer is not None:
                position, changes = answer
                for change in changes:
                    await self._tell(change)
            if not ready.done():
                ready.set_result(None)
        if not ready.done():
            ready.set_result(None)

    async def _tell(self, change: dict[str, Any]) -> None:
        for listener in tuple(self._listeners):
            try:
                result = listener(change["from"], change["to"], change["metrics"])
                if inspect.isawaitable(result):
                    await result
            except Exception:
                logger.exception("pool %s: a listener of the circuit breaker failed", self._pool.name)

    # --- inside ---

    async def _ask(self, method: str, *arguments: Any, within: float) -> Any:
        """Ask the Breaker actor about this pool.

        Raises:
            UnavailableError: it does not answer in time.
        """
        otherwise = f"the breaker of pool {self._pool.name!r} does not answer; workers decide without it, try again"
        return await ask(cluster.find_breaker, method, self._pool.name, *arguments, within=within, otherwise=otherwise)


def _never_started(config: PoolConfig | None) -> dict[str, Any]:
    """The status of a pool that has done nothing yet."""
    assert config is not None
    return describe(Quorum(config.breaker(), 0.0, random.random), 0.0, time.time())
