"""LISTEN on a leased connection: what the server notifies reaches callbacks in the process that holds the lease."""

from __future__ import annotations

import asyncio
import inspect
import logging
import weakref
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import asyncpg

from raypg.channel import Channel, WorkerGone
from raypg.portable import unpack_error

if TYPE_CHECKING:
    from raypg.lease import LeasedConnection

logger = logging.getLogger(__name__)

RELEASED = "it was released"
"""Why a lease has ended that its holder gave back."""

Callback: TypeAlias = Callable[..., Any]
"""``callback(connection, pid, channel, payload)``, a plain or an async function. *pid*: of the backend that sent it."""


class Listeners:
    """The callbacks of one lease, by channel."""

    def __init__(self) -> None:
        self._callbacks: dict[str, dict[Callback, None]] = {}
        self._hearing: asyncio.Task[None] | None = None

    async def add(self, connection: LeasedConnection, channel: str, callback: Callback) -> None:
        """See :meth:`LeasedConnection.add_listener`."""
        _check(channel)
        if not callable(callback):
            raise asyncpg.InterfaceError(f"expected a callable or an async function, got {callback!r}")
        callbacks = self._callbacks.setdefault(channel, {})
        known = callback in callbacks
        callbacks[callback] = None  # at once: something may come before the answer
        try:
            # Even if it listens already: a transaction may have been rolled back since, and LISTEN with it.
            await connection._in_turn(None, "lease_listen", channel, True)
        except BaseException:
            if not known:
                self._forget(channel, callback)
            raise
        if self._hearing is None or self._hearing.done():
            self._hearing = asyncio.get_running_loop().create_task(
                _hear(weakref.ref(connection), connection._channel, connection._token)
            )
            _keep(self._hearing)

    async def remove(self, connection: LeasedConnection, channel: str, callback: Callback) -> None:
        """See :meth:`LeasedConnection.remove_listener`."""
        _check(channel)
        if connection._ended is not None or callback not in self._callbacks.get(channel, ()):
            return
        self._forget(channel, callback)
        if channel not in self._callbacks:
            await connection._in_turn(None, "lease_listen", channel, False)

    def _forget(self, channel: str, callback: Callback) -> None:
        callbacks = self._callbacks.get(channel, {})
        callbacks.pop(callback, None)
        if not callbacks:
            self._callbacks.pop(channel, None)

    def end(self, why: str) -> None:
        """The lease has ended: no callback is called any more. Nobody asked for that, unless it was released."""
        if self._callbacks and why != RELEASED:
            channels = ", ".join(map(repr, self._callbacks))
            logger.error(
                "listening to %s has ended, and later notifications are missed: the lease is gone: %s", channels, why
            )
        self._callbacks.clear()

    def __len__(self) -> int:
        return len(self._callbacks)

    def tell(self, connection: LeasedConnection, heard: Iterable[tuple[str, int, str]]) -> None:
        """Call the callbacks, in order. Async ones are started in order, as asyncpg does, each as a task."""
        for channel, pid, payload in heard:
            for callback in tuple(self._callbacks.get(channel, ())):
                if connection._ended is not None:
                    return
                try:
                    result = callback(connection, pid, channel, payload)
                except Exception:
                    logger.exception("a listener to %r raised", channel)
                else:
                    if inspect.isawaitable(result):
                        _keep(asyncio.ensure_future(_logged(result, channel)))


async def _hear(holder: weakref.ref[LeasedConnection], channel: Channel, token: str) -> None:
    """Fetch what the worker has heard, until the lease ends or nobody listens. A forgotten lease is not kept by it."""
    while True:
        lost: str | None = None
        try:
            kind, value = await channel.ask("lease_heard", token)
        except WorkerGone:
            lost = "its worker died"
        except Exception as error:
            logger.exception("a leased connection cannot be listened to any more")
            lost = f"{type(error).__name__}: {error}"
        else:
            if kind == "error":
                lost = str(unpack_error(value)).removeprefix("the lease is gone: ")
        connection = holder()
        if connection is None or connection._ended is not None:
            return
        if lost is not None:
            connection._mark_ended(lost)
            return
        if not connection._listeners:
            return
        connection._listeners.tell(connection, value)
        del connection


async def _logged(work: Awaitable[Any], channel: str) -> None:
    try:
        await work
    except Exception:
        logger.exception("a listener to %r raised", channel)


def _check(channel: object) -> None:
    if not isinstance(channel, str) or not channel or "\0" in channel:
        raise asyncpg.InterfaceError(f"the name of a channel must be a non-empty string, not {channel!r}")


_tasks: set[asyncio.Future[Any]] = set()


def _keep(task: asyncio.Future[Any]) -> None:
    """Hold *task* until it is done: the event loop itself only holds it weakly."""
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
