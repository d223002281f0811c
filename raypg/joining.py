"""How a process joins a pool: it finds the pool's actor or starts it, and keeps one dispatcher for each event loop."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import ray
from ray.actor import ActorHandle

from raypg import _compat, cluster, messages
from raypg.config import PoolConfig
from raypg.dispatch import Dispatcher
from raypg.errors import PoolClosedError, PoolNotFoundError, UnavailableError
from raypg.portable import unpack_error

STARTED_WITHIN = 90.0
"""Seconds in which a pool must have started: its actors, and its first connections."""

MOST_ATTEMPTS = 100
"""How often a pool that ends is waited for, ``RETRY_EVERY`` seconds each, before its name is used again."""

RETRY_EVERY = 0.1
"""Seconds between two looks for a pool that just ends."""

_dispatchers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Dispatcher]] = weakref.WeakKeyDictionary()


class _Attempts:
    """The attempts to reach a pool that one event loop makes: one at a time, and one for all who ask for the same."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.running: list[tuple[PoolConfig | None, asyncio.Task[tuple[Dispatcher, bool]]]] = []

    def find(self, config: PoolConfig | None) -> asyncio.Task[tuple[Dispatcher, bool]] | None:
        """The attempt that is made with *config*, if one is."""
        return next((task for asked, task in self.running if asked == config), None)

    def start(self, name: str, config: PoolConfig | None) -> asyncio.Task[tuple[Dispatcher, bool]]:
        """Make one. It goes on when the caller that wanted it leaves: others may wait for it."""
        task = asyncio.get_running_loop().create_task(_join(name, config, self.lock))
        entry = config, task
        self.running.append(entry)

        def ended(task: asyncio.Task[tuple[Dispatcher, bool]]) -> None:
            self.running.remove(entry)
            if not task.cancelled():
                task.exception()  # whoever waits gets it; if nobody does, nobody wants to know

        task.add_done_callback(ended)
        return task


_attempts: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Attempts]] = weakref.WeakKeyDictionary()


async def connect(name: str, config: PoolConfig | None) -> tuple[Dispatcher, bool]:
    """The dispatcher of pool *name* in the running event loop; handles of one pool share it.

    Args:
        config: start the pool with it if it does not run, and compare it if it does; ``None`` to only look for it.

    Returns:
        (dispatcher, whether the pool was started by this call).

    Raises:
        PoolNotFoundError, PoolConflictError, PoolVersionError, PoolClosedError, ConnectError, ConfigError.
    """
    loop = asyncio.get_running_loop()
    found = _dispatchers.get(loop, {}).get(name) if config is None else None
    if found is not None and found.closed is None:
        return found, False
    attempts = _attempts.setdefault(loop, {}).setdefault(name, _Attempts())
    # A thousand callers must not try in turn: all go on in the same step, and their statements in the same message.
    running = attempts.find(config)
    if running is not None:
        return (await asyncio.shield(running))[0], False
    return await asyncio.shield(attempts.start(name, config))


async def _join(name: str, config: PoolConfig | None, lock: asyncio.Lock) -> tuple[Dispatcher, bool]:
    async with lock:
        for ended in [other for other in tuple(_dispatchers) if other.is_closed()]:
            _dispatchers.pop(ended, None)  # a dispatcher holds its loop, so no entry would ever go by itself
        known = _dispatchers.setdefault(asyncio.get_running_loop(), {})
        found = known.get(name)
        if found is not None and found.closed is None and config is None:
            return found, False
        try:
            pool, greeting = await _greet(name, config)
        except PoolNotFoundError:
            if found is None or found.closed is None:
                raise
            raise found.closed from None
        if found is not None and found.pool != pool:
            found.close(PoolClosedError(f"pool {name!r} was closed, and another one started under its name"))
        if found is None or found.closed is not None:
            found = known[name] = Dispatcher(name, pool, greeting)
        return found, bool(greeting["first"])


async def _greet(name: str, config: PoolConfig | None) -> tuple[ActorHandle[Any], dict[str, Any]]:
    attempts = 0
    while True:
        pool = cluster.find(name) if config is None else cluster.find_or_start(config)
        asked = None if config is None else config.to_dict()
        try:
            kind, value = await asyncio.wait_for(pool.hello.remote(messages.hello(), asked), STARTED_WITHIN)
        except TimeoutError:
            raise UnavailableError(
                f"pool {name!r} did not start within {STARTED_WITHIN:g} s; see `ray list actors` and `raypg status`"
            ) from None
        except _compat.ActorGone as error:
            # It ended between our look and our word: a pool that could not start, or was just closed. Once more.
            attempts += 1
            if attempts > MOST_ATTEMPTS:
                raise UnavailableError(f"pool {name!r} does not start: {error}") from error
            await asyncio.sleep(RETRY_EVERY)
            continue
        if kind == "ok":
            return pool, value
        problem = unpack_error(value)
        if kind == "failed":
            ray.kill(pool)  # it could not start: a corrected configuration must find the name free
        if isinstance(problem, PoolClosedError) and config is not None and attempts < MOST_ATTEMPTS:
            attempts += 1  # the last pool of this name is still being ended
            await asyncio.sleep(RETRY_EVERY)
            continue
        raise problem


def forget(name: str, error: Exception) -> None:
    """This process is done with pool *name*: its dispatchers are closed in every loop."""
    for loop, known in tuple(_dispatchers.items()):
        dispatcher = known.pop(name, None)
        if dispatcher is not None and not loop.is_closed():
            if loop is _running():
                dispatcher.close(error)
            else:
                loop.call_soon_threadsafe(dispatcher.close, error)


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
